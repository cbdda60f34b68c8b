"""voice/sampling.py: how a token is drawn, what the model's settings may be, and that pieces make up the answers."""

import json
import math
import os
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from reporting import NO_OBJECTS, run, sampling, settings_with
from tiny import make_model_folder
from transformers import AutoModelForCausalLM, GenerationConfig

import test_model
import voice.loading
import voice.sampling

pytestmark = pytest.mark.usefixtures("small_report")


def test_each_prompt_is_answered_and_the_words_traced(model_folder, data_folder, capsys):
    assert run(model_folder, data_folder, "--seed", "1") == 0
    out, err = capsys.readouterr()
    assert [line[2:] for line in out.splitlines() if line.startswith("> ")] == test_model.PROMPTS
    assert len(re.findall(r"^\[longest run of words from the training data: \d+", out, re.M)) == len(test_model.PROMPTS)
    assert re.search(r"^\d of 6 answers ended by themselves; \d+ tokens, [\d.]+ a second\.$", err, re.M)


def test_the_seed_makes_the_answers_repeatable(model_folder, data_folder, capsys):
    texts = []
    for seed in ("1", "1", "2"):
        run(model_folder, data_folder, "--prompt", "the kettle", "--seed", seed, "--max-new-tokens", "40")
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "mamba", "jamba"])  # Mamba keeps no cache of tokens
def test_a_batch_answers_as_each_prompt_alone_and_as_transformers_does(architecture, tmp_path):
    sizes = {"intermediate_size": 64, "num_key_value_heads": 1} if architecture in ("llama", "jamba") else {}
    if architecture == "jamba":
        sizes |= {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2, "use_mamba_kernels": False}
    model = AutoModelForCausalLM.from_pretrained(make_model_folder(tmp_path, architecture, False, **sizes)).eval()
    greedy = sampling(do_sample=False, repetition_penalty=1.3, eos_token_id=[7])
    prompts, together = [[5, 6], list(range(20, 60)), [30]], {0: [], 1: [], 2: []}
    for step in voice.sampling.generate(model, prompts, greedy, None):
        for row, token, _ in step:
            together[row].append(token)
    for row, prompt in enumerate(prompts):
        alone = [step[0][1] for step in voice.sampling.generate(model, [prompt], greedy, None)]
        settings = {
            "max_new_tokens": 12,
            "do_sample": False,
            "repetition_penalty": 1.3,
            "eos_token_id": 7,
            "pad_token_id": 0,
        }
        expected = model.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), **settings)
        assert together[row] == alone == expected[0, len(prompt) :].tolist()


def test_prompt_and_answer_never_outgrow_the_positions(loaded):
    model, _ = loaded
    prompts = [[5] * 120, [6] * 10, [7] * 127]
    steps = list(
        voice.sampling.generate(model, prompts, sampling(max_new_tokens=500, eos_token_id=[]), torch.Generator())
    )
    lengths = [sum(row == number for step in steps for row, *_ in step) for number in range(3)]
    assert lengths == [8, 118, 1]


def test_top_p_and_top_k_leave_only_likely_tokens_and_a_penalty_drops_seen_ones():
    logits = torch.tensor([[3.0, 2.0, 1.0, -9.0]]).repeat(200, 1)
    dice, seen = torch.Generator().manual_seed(0), torch.zeros(200, 4, dtype=torch.bool)
    drawn = {
        name: set(voice.sampling.sample_next_token(logits, seen, sampling(**settings), dice).tolist())
        for name, settings in {"p": {"top_p": 0.7}, "k": {"top_k": 1}, "all": {"temperature": 9.0}}.items()
    }
    assert drawn == {"p": {0, 1}, "k": {0}, "all": {0, 1, 2, 3}}
    seen[:, 0] = True
    penalised = sampling(do_sample=False, repetition_penalty=2.0)
    assert set(voice.sampling.sample_next_token(logits, seen, penalised, dice).tolist()) == {1}


def test_top_p_of_1_keeps_the_whole_vocabulary():
    """In float32 the sum over 50,000 tokens reaches 1 before the last of them."""
    logits = 3 * torch.randn(4, 50_000, generator=torch.Generator().manual_seed(0))
    seen = torch.zeros(4, 50_000, dtype=torch.bool)
    _, chances = voice.sampling.next_token_chances(logits, seen, sampling(top_k=0))
    assert chances.shape == (4, 50_000) and (chances > 0).all()


def test_settings_go_before_the_file_and_the_file_before_the_usual(loaded):
    _, tokenizer = loaded
    file = GenerationConfig(do_sample=True, temperature=0.7, max_new_tokens=33, eos_token_id=[3, 4])
    read = voice.sampling.read_sampling(file, tokenizer, settings_with())
    assert (read.temperature, read.top_p, read.max_new_tokens, read.eos_token_id) == (0.7, 1.0, 33, [3, 4])
    read = voice.sampling.read_sampling(file, tokenizer, settings_with(temperature=0.2, max_new_tokens=5))
    assert (read.temperature, read.max_new_tokens, read.do_sample) == (0.2, 5, True)
    assert not voice.sampling.read_sampling(file, tokenizer, settings_with(temperature=0)).do_sample


def test_pieces_make_up_the_answers_and_any_end_token_counts(loaded):
    model, tokenizer = loaded
    settings = sampling(max_new_tokens=30, eos_token_id=list(range(0, 400, 9)))
    pieces, answers = [""], []
    for piece, answer in voice.sampling.stream(
        model, tokenizer, [[5, 6], [7], [9, 9]], settings, torch.Generator().manual_seed(3)
    ):
        pieces[-1] += piece
        if answer:
            answers.append(answer)
            pieces.append("")
    assert pieces[:-1] == [answer.text for answer in answers] and len(answers) == 3
    assert all(answer.ended == (answer.tokens[-1] % 9 == 0) for answer in answers) and any(a.ended for a in answers)


def test_a_pipe_in_the_place_of_a_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "training_report.json")
    assert voice.loading.run_settings(tmp_path) == {}


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        *[(text, "holds no settings: run train_model.py again, or correct the file.") for text in NO_OBJECTS],
        ({"temperature": -1}, "temperature in .* must be None or a number from 0 "),
        ({"temperature": "hot"}, "temperature in .* must be None or a number from 0 "),
        ({"temperature": math.nan}, "temperature in .* must be None or a number from 0 "),
        ({"top_k": -5}, "top_k in .* must be None or a whole number from 0 "),
        ({"top_k": "50"}, "top_k in .* must be None or a whole number from 0 "),
        ({"top_p": 0}, "top_p in .* must be None or a number above 0 and up to 1"),
        ({"top_p": 2}, "top_p in .* must be None or a number above 0 and up to 1"),
        ({"repetition_penalty": 0}, "repetition_penalty in .* must be None or a number from 0.1 to 10"),
        ({"max_new_tokens": 0}, "max_new_tokens in .* must be None or a whole number from 1"),
        ({"max_new_tokens": "x"}, "max_new_tokens in .* must be None or a whole number from 1"),
        ({"eos_token_id": "x"}, "eos_token_id in .* must be a token id or a list of them"),
        ({"eos_token_id": [1, None]}, "eos_token_id in .* must be a token id"),
        ({"eos_token_id": -1}, "eos_token_id in .* must be a token id"),
        ({"cache_implementation": 7}, "transformers cannot use .*: run train_model.py again, or correct the file"),
        ({"watermarking_config": 3}, "transformers cannot use .*: run train_model.py again, or correct the file"),
        ({"pad_token_id": "x"}, "transformers cannot use .*: run train_model.py again, or correct the file"),
    ],
)
def test_odd_settings_of_the_model_are_one_sentence_that_names_the_file(content, sentence, model_folder, tmp_path):
    folder = Path(shutil.copytree(model_folder, tmp_path / "model"))
    file = folder / "generation_config.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    with pytest.raises(SystemExit) as stop:
        run(folder, tmp_path, "--prompt", "hi")
    assert re.search(sentence, stop.value.code) and str(file) in stop.value.code and "\n" not in stop.value.code


@pytest.mark.parametrize("temperature", [0, 0.0, 1e-300, 1e-40])
def test_a_temperature_of_0_takes_the_likeliest_token_wherever_it_stands(
    temperature, model_folder, tmp_path, monkeypatch, capsys
):
    folder = Path(shutil.copytree(model_folder, tmp_path / "model"))
    file = folder / "generation_config.json"
    settings = json.loads(file.read_text())
    file.write_text(json.dumps(settings | {"do_sample": False}))
    run(folder, tmp_path, "--prompt", "the kettle")
    likeliest = capsys.readouterr().out
    file.write_text(json.dumps(settings | {"temperature": temperature}))
    run(folder, tmp_path, "--prompt", "the kettle")
    assert capsys.readouterr().out == likeliest
    monkeypatch.setattr(test_model, "TEMPERATURE", temperature)
    run(model_folder, tmp_path, "--prompt", "the kettle")
    assert capsys.readouterr().out == likeliest


@pytest.mark.parametrize(("ends", "listed"), [(None, []), ([], []), (3, [3]), ([3, 4], [3, 4])])
def test_the_end_tokens_are_a_list_also_where_there_is_none(ends, listed):
    tokenizer = SimpleNamespace(eos_token_id=None)
    read = voice.sampling.read_sampling(GenerationConfig(eos_token_id=ends), tokenizer, settings_with())
    assert read.eos_token_id == listed
