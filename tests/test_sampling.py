"""voice/sampling.py: how a token is drawn, what the model's settings may be, and that pieces make up the answers."""

import json
import math
import os
import re
import shutil
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from reporting import NO_OBJECTS, run, sampling, settings_with
from tiny import make_model_folder
from transformers import AutoModelForCausalLM, GenerationConfig

import test_model
from voice.loading import run_settings
from voice.sampling import (
    FEW_ROWS,
    LinearOfFewRows,
    generate,
    next_token_chances,
    read_sampling,
    sample_next_token,
    stream,
)

pytestmark = pytest.mark.usefixtures("small_report")


@pytest.fixture
def folder(model_folder, tmp_path) -> Path:
    """A copy of the model, which may be written to."""
    return Path(shutil.copytree(model_folder, tmp_path / "model"))


def test_each_prompt_is_answered_and_the_words_traced(model_folder, data_folder, capsys):
    assert run(model_folder, data_folder, "--seed", "1") == 0
    out, err = capsys.readouterr()
    assert re.findall(r"^> (.*)", out, re.M) == test_model.PROMPTS
    traced = re.findall(r"^\[longest run of words from the training data: \d+", out, re.M)
    assert len(traced) == len(test_model.PROMPTS)
    assert re.search(r"^\d of 6 answers ended by themselves; \d+ tokens, [\d.]+ a second\.$", err, re.M)


def test_the_seed_makes_the_answers_repeatable(model_folder, data_folder, capsys):
    texts = []
    for seed in ("1", "1", "2"):
        run(model_folder, data_folder, "--prompt", "the kettle", "--seed", seed, "--max-new-tokens", "40")
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize("rows", [1, 2, FEW_ROWS, FEW_ROWS + 1])
@pytest.mark.parametrize("has_bias", [True, False])
def test_few_rows_go_through_a_linear_layer_as_always(rows, has_bias):
    layer = torch.nn.Linear(16, 40, has_bias)
    inputs = torch.randn(rows, 1, 16)
    expected = layer(inputs)
    with LinearOfFewRows():
        torch.testing.assert_close(layer(inputs), expected)


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "mamba", "jamba"])  # Mamba keeps no cache of tokens
def test_a_batch_answers_as_each_prompt_alone_and_as_transformers_does(architecture, tmp_path):
    sizes = {"intermediate_size": 64, "num_key_value_heads": 1} if architecture in ("llama", "jamba") else {}
    if architecture == "jamba":
        sizes |= {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2, "use_mamba_kernels": False}
    model = AutoModelForCausalLM.from_pretrained(make_model_folder(tmp_path, architecture, False, **sizes)).eval()
    greedy = sampling(do_sample=False, repetition_penalty=1.3, eos_token_id=[7])
    prompts = [[5, 6], list(range(20, 60)), [30]]
    together = [[], [], []]
    for step in generate(model, prompts, greedy, None):
        for row, token, _ in step:
            together[row].append(token)
    settings = {"max_new_tokens": 12, "do_sample": False, "repetition_penalty": 1.3}
    for row, prompt in enumerate(prompts):
        alone = [step[0][1] for step in generate(model, [prompt], greedy, None)]
        ids = torch.tensor([prompt])
        [whole] = model.generate(ids, attention_mask=torch.ones_like(ids), **settings, eos_token_id=7, pad_token_id=0)
        assert together[row] == alone == whole[len(prompt) :].tolist()


def test_prompt_and_answer_never_outgrow_the_positions(loaded):
    model, _ = loaded
    prompts = [[5] * 120, [6] * 10, [7] * 127]
    endless = sampling(max_new_tokens=500, eos_token_id=[])
    lengths = Counter(row for step in generate(model, prompts, endless, torch.Generator()) for row, *_ in step)
    assert lengths == {0: 8, 1: 118, 2: 1}


@pytest.mark.parametrize(
    ("settings", "seen", "tokens"),
    [
        ({"top_p": 0.7}, [], {0, 1}),
        ({"top_k": 1}, [], {0}),
        ({"temperature": 9.0}, [], {0, 1, 2, 3}),
        ({"do_sample": False, "repetition_penalty": 2.0}, [0], {1}),
    ],
)
def test_top_p_and_top_k_leave_only_likely_tokens_and_a_penalty_drops_seen_ones(settings, seen, tokens):
    logits = torch.tensor([[3.0, 2.0, 1.0, -9.0]]).repeat(200, 1)
    is_seen = torch.zeros(200, 4, dtype=torch.bool)
    is_seen[:, seen] = True
    drawn = sample_next_token(logits, is_seen, sampling(**settings), torch.Generator().manual_seed(0))
    assert set(drawn.tolist()) == tokens


def test_top_p_of_1_keeps_the_whole_vocabulary():
    """In float32 the sum over 50,000 tokens reaches 1 before the last of them."""
    logits = 3 * torch.randn(4, 50_000, generator=torch.Generator().manual_seed(0))
    seen = torch.zeros(4, 50_000, dtype=torch.bool)
    _, chances = next_token_chances(logits, seen, sampling(top_k=0))
    assert chances.shape == (4, 50_000) and (chances > 0).all()


def test_settings_go_before_the_file_and_the_file_before_the_usual(loaded):
    _, tokenizer = loaded
    file = GenerationConfig(do_sample=True, temperature=0.7, max_new_tokens=33, eos_token_id=[3, 4])
    read = read_sampling(file, tokenizer, settings_with())
    assert (read.temperature, read.top_p, read.max_new_tokens, read.eos_token_id) == (0.7, 1.0, 33, [3, 4])
    read = read_sampling(file, tokenizer, settings_with(temperature=0.2, max_new_tokens=5))
    assert (read.temperature, read.max_new_tokens, read.do_sample) == (0.2, 5, True)
    assert not read_sampling(file, tokenizer, settings_with(temperature=0)).do_sample


def test_pieces_make_up_the_answers_and_any_end_token_counts(loaded):
    model, tokenizer = loaded
    settings = sampling(max_new_tokens=30, eos_token_id=list(range(0, 400, 9)))
    dice = torch.Generator().manual_seed(3)
    pieces = [""]
    answers = []
    for piece, answer in stream(model, tokenizer, [[5, 6], [7], [9, 9]], settings, dice):
        pieces[-1] += piece
        if answer:
            answers.append(answer)
            pieces.append("")
    assert pieces == [*[answer.text for answer in answers], ""]
    assert len(answers) == 3
    ended = [answer.ended for answer in answers]
    assert any(ended) and ended == [answer.tokens[-1] % 9 == 0 for answer in answers]


def test_a_pipe_in_the_place_of_a_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "training_report.json")
    assert run_settings(tmp_path) == {}


UNUSABLE = "transformers cannot use .*: run train_model.py again, or correct the file"
ODD_SETTINGS = [
    ("temperature", [-1, "hot", math.nan], "temperature in .* must be None or a number from 0 "),
    ("top_k", [-5, "50"], "top_k in .* must be None or a whole number from 0 "),
    ("top_p", [0, 2], "top_p in .* must be None or a number above 0 and up to 1"),
    ("repetition_penalty", [0], "repetition_penalty in .* must be None or a number from 0.1 to 10"),
    ("max_new_tokens", [0, "x"], "max_new_tokens in .* must be None or a whole number from 1"),
    ("eos_token_id", ["x", [1, None], -1], "eos_token_id in .* must be a token id or a list of them"),
    ("cache_implementation", [7], UNUSABLE),
    ("watermarking_config", [3], UNUSABLE),
    ("pad_token_id", ["x"], UNUSABLE),
]
ODD_FILES = [(text, "holds no settings: run train_model.py again, or correct the file.") for text in NO_OBJECTS]
ODD_FILES += [(json.dumps({name: value}), sentence) for name, values, sentence in ODD_SETTINGS for value in values]


@pytest.mark.parametrize(("content", "sentence"), ODD_FILES)
def test_odd_settings_of_the_model_are_one_sentence_that_names_the_file(content, sentence, folder, tmp_path):
    file = folder / "generation_config.json"
    file.write_text(content, encoding="utf-8")
    with pytest.raises(SystemExit) as stop:
        run(folder, tmp_path, "--prompt", "hi")
    told = stop.value.code
    assert re.search(sentence, told) and str(file) in told and "\n" not in told


@pytest.mark.parametrize("temperature", [0, 0.0, 1e-300, 1e-40])
def test_a_temperature_of_0_takes_the_likeliest_token_wherever_it_stands(
    temperature, folder, model_folder, tmp_path, monkeypatch, capsys
):
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
    file = GenerationConfig(eos_token_id=ends)
    read = read_sampling(file, tokenizer, settings_with())
    assert read.eos_token_id == listed
