"""train_model.py: what is scored, that nothing is lost, that a run is safe, and that it says what it did."""

import argparse
import contextlib
import errno
import io
import itertools
import json
import math
import os
import re
import resource
import shutil
import signal
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from conftest import conversations, make_model_folder, write_jsonl
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import train_model

SCRIPT = Path(train_model.__file__)
TALK = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "hello"},
    {"role": "user", "content": "so?"},
    {"role": "assistant", "content": "bread <3"},
]


@pytest.fixture(autouse=True)
def small_and_exact(monkeypatch):
    """Short windows, float32, a known rate: fast on a CPU and comparable to the last digit."""
    monkeypatch.setattr(train_model, "CONTEXT_TOKENS", 64)
    monkeypatch.setattr(train_model, "OVERLAP_TOKENS", 8)
    monkeypatch.setattr(train_model, "ROWS_PER_UPDATE", 4)
    monkeypatch.setattr(train_model, "PRECISION", "fp32")
    monkeypatch.setattr(train_model, "CHECKPOINT_MINUTES", 0)
    monkeypatch.setattr(train_model, "LEARNING_RATE", 1e-4)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def run(base: Path, data: Path, output: Path, *flags: str) -> dict:
    """A whole training run in this process; returns its report."""
    arguments = ["--base-model", str(base), "--data-dir", str(data), "--output-dir", str(output), *flags]
    assert train_model.main(arguments) == 0
    return json.loads((output / "training_report.json").read_text())


def settings_with(**values) -> train_model.Settings:
    return replace(train_model.parse_arguments([]), **values)


def losses(report: dict) -> list[float]:
    return [entry.get("loss", entry.get("eval_loss")) for entry in report["log"] if "train_loss" not in entry]


# ---------------------------------------------------------------------------- what is scored
def marked(tokenizer, messages) -> list[tuple[str, bool]]:
    """Runs of text with whether they are scored."""
    runs = []
    for token, scored in zip(*train_model.conversation_tokens(tokenizer, messages), strict=True):
        text = tokenizer.decode([token])
        if runs and runs[-1][1] == scored:
            runs[-1] = (runs[-1][0] + text, scored)
        else:
            runs.append((text, scored))
    return runs


def test_plain_template_scores_answers_and_their_end(gpt2_folder):
    assert marked(train_model.load_tokenizer(gpt2_folder), TALK) == [
        ("User: hi\nAssistant:", False),
        (" hello<|endoftext|>", True),
        ("\nUser: so?\nAssistant:", False),
        (" bread <3<|endoftext|>", True),
        ("\n", False),
    ]


def test_chatml_template_scores_answers_and_their_end(llama_folder):
    assert marked(train_model.load_tokenizer(llama_folder), TALK) == [
        ("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n", False),
        ("hello<|im_end|>", True),
        ("\n<|im_start|>user\nso?<|im_end|>\n<|im_start|>assistant\n", False),
        ("bread <3<|im_end|>", True),
        ("\n", False),
    ]


def test_an_author_who_speaks_first_is_scored(llama_folder):
    assert marked(train_model.load_tokenizer(llama_folder), TALK[1:2]) == [
        ("<|im_start|>assistant\n", False),
        ("hello<|im_end|>", True),
        ("\n", False),
    ]


def test_a_template_that_rewrites_earlier_turns_loses_none(llama_folder):
    tokenizer = train_model.load_tokenizer(llama_folder)
    thought = "{% if loop.last and message['role'] == 'assistant' %}{{ '[thought]' }}{% endif %}"
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "'\n' + message['content']", f"'\n' }}}}{thought}{{{{ message['content']"
    )
    start, end = "<|im_start|>", "<|im_end|>\n"
    first, second = f"{start}user\nhi{end}{start}assistant\n", f"{start}user\nso?{end}{start}assistant\n"
    assert marked(tokenizer, TALK) == [
        (first, False),
        ("[thought]hello<|im_end|>", True),
        ("\n" + first + "hello" + end + second, False),
        ("[thought]bread <3<|im_end|>", True),
        ("\n", False),
    ]


TURN = "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content']"
PROMPT = "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        # The turn ends in plain text: the end of text is added, and every word is scored.
        (
            f"{TURN} + '\n' }}}}{PROMPT}' }}}}{{% endif %}}",
            [("hello\n<|im_end|>", True), ("bread <3\n<|im_end|>", True)],
        ),
        # Two control tokens close a turn: the first one is the end, the second is the template's.
        (
            f"{TURN} + '<|im_end|><|endoftext|>' }}}}{PROMPT}' }}}}{{% endif %}}",
            [("hello<|im_end|>", True), ("bread <3<|im_end|>", True)],
        ),
        # The prompt opens a thought that finished turns lack: the model is trained as it will be asked.
        (
            f"{TURN} + '<|im_end|>\n' }}}}{PROMPT}[thought]' }}}}{{% endif %}}",
            [("hello<|im_end|>", True), ("bread <3<|im_end|>", True)],
        ),
        # Control tokens before what is said close nothing.
        (
            "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '<|endoftext|>' + m['content'] + '<|im_end|>' }}"
            "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant' }}{% endif %}",
            [("<|endoftext|>hello<|im_end|>", True), ("<|endoftext|>bread <3<|im_end|>", True)],
        ),
    ],
)
def test_odd_templates_score_every_word_and_one_end(template, expected, llama_folder):
    tokenizer = train_model.load_tokenizer(llama_folder)
    tokenizer.chat_template = template
    runs = marked(tokenizer, TALK)
    assert [run for run in runs if run[1]] == expected
    asked = train_model.render(tokenizer, TALK[:1], add_generation_prompt=True)
    assert runs[0][0] == asked  # trained as it will be asked


def test_labels_of_a_window_are_its_scored_tokens(gpt2_folder):
    tokenizer = train_model.load_tokenizer(gpt2_folder)
    rows = train_model.make_rows([train_model.conversation_tokens(tokenizer, TALK[:2])], 64, 8)
    labels = [None if label == -100 else tokenizer.decode([label]) for label in rows[0]["labels"]]
    scored = [label for label in labels if label is not None]
    assert "".join(scored) == " hello<|endoftext|>"
    assert labels[: len(labels) - len(scored) - 1] == [None] * (len(labels) - len(scored) - 1)


def test_control_tokens_in_a_post_stay_words(llama_folder):
    tokenizer = train_model.load_tokenizer(llama_folder)
    post = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "a <|im_end|> b <|endoftext|> c"}]
    ids, scored = train_model.conversation_tokens(tokenizer, post)
    ends = [token for token, counts in zip(ids, scored, strict=True) if counts and token in tokenizer.all_special_ids]
    assert ends == [tokenizer.eos_token_id]


def test_template_of_the_data_and_of_the_prompt_agree(gpt2_folder, llama_folder):
    for folder in (gpt2_folder, llama_folder):
        tokenizer = train_model.load_tokenizer(folder)
        prompt = tokenizer.apply_chat_template(TALK[:1], add_generation_prompt=True)["input_ids"]
        ids, scored = train_model.conversation_tokens(tokenizer, TALK[:2])
        assert ids[: scored.index(True)] == prompt


@given(
    answers=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 300)), min_size=1, max_size=6),
    context=st.integers(16, 80),
    overlap=st.integers(1, 15),
)
@settings(deadline=None)
def test_each_scored_token_is_scored_once(answers, context, overlap):
    scored = [flag for asked, answered in answers for flag in [False] * asked + [True] * answered]
    ids = list(range(len(scored)))
    windows = list(train_model.cut(ids, scored, 7, context, overlap))
    labels = [label for window in windows for label in window.labels if label != -100]
    assert labels == [token for token, counts in zip(ids, scored, strict=True) if counts]
    for number, window in enumerate(windows):
        assert len(window.ids) == len(window.labels) <= context and window.conversation == 7
        first = next(place for place, label in enumerate(window.labels) if label != -100)
        assert first >= (1 if number == 0 else 0) and window.ids[first] == window.labels[first]


@given(lengths=st.lists(st.integers(1, 64), max_size=60))
@settings(deadline=None)
def test_packing_keeps_every_window_whole(lengths):
    windows = [
        train_model.Window([number] * length, [number] * length, number) for number, length in enumerate(lengths)
    ]
    groups = train_model.pack(windows, 64)
    assert sorted(window.conversation for group in groups for window in group) == list(range(len(lengths)))
    assert all(sum(len(window.ids) for window in group) <= 64 for group in groups)


def test_short_posts_share_rows(gpt2_folder, data_folder):
    tokenizer = train_model.load_tokenizer(gpt2_folder)
    entries = train_model.read_conversations(data_folder / "train_data.jsonl")
    tokenized = [train_model.conversation_tokens(tokenizer, entry["messages"]) for entry in entries]
    packed, alone = (train_model.make_rows(tokenized, 64, 8, packed) for packed in (True, False))
    assert len(packed) < 0.8 * len(alone)
    assert train_model.scored_tokens(packed) == train_model.scored_tokens(alone) == sum(sum(s) for _, s in tokenized)


# ---------------------------------------------------------------------------- packed documents
@pytest.mark.parametrize("shape", ["gpt2_folder", "llama_folder"])
def test_packed_documents_do_not_see_each_other(shape, request):
    folder = request.getfixturevalue(shape)
    tokenizer, model = train_model.load_tokenizer(folder), train_model.load_for_training(folder).eval()
    posts = [train_model.conversation_tokens(tokenizer, entry["messages"]) for entry in conversations(3, words=8)]
    row = train_model.make_rows(posts, 200, 8)[0]
    assert len(set(row["conversation"])) == 3
    batch = train_model.collate([row])
    with torch.no_grad():
        packed, _ = train_model.scored_logits(model, batch)
        alone = [
            train_model.scored_logits(model, train_model.collate([one]))[0]
            for one in (
                train_model.make_rows([posts[number]], 200, 8)[0] for number in dict.fromkeys(row["conversation"])
            )
        ]
    assert torch.allclose(packed, torch.cat(alone), atol=1e-4)
    assert train_model.keeps_documents_apart(model)


def test_losses_are_exact(gpt2_folder):
    """Against the plainest computation there is: each post alone, whole, in the model's own forward."""
    tokenizer, model = train_model.load_tokenizer(gpt2_folder), train_model.load_for_training(gpt2_folder).eval()
    posts = [train_model.conversation_tokens(tokenizer, entry["messages"]) for entry in conversations(6, words=20)]
    measured = train_model.conversation_losses(model, train_model.make_rows(posts, 200, 8))
    for (ids, scored), nats in zip(posts, measured, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0]
        expected = functional.cross_entropy(logits[:-1], torch.tensor(ids[1:]), reduction="none")
        assert nats == pytest.approx(expected[torch.tensor(scored[1:])].sum().item(), abs=1e-3)


@pytest.mark.parametrize("tokens", [0, 1, 64, 150])
def test_the_loss_and_its_gradient_are_those_of_cross_entropy(tokens):
    logits, targets = torch.randn(tokens, 40, requires_grad=True), torch.arange(tokens) % 40
    loss = train_model.SummedCrossEntropy.apply(logits, targets) * 0.3
    expected = functional.cross_entropy(logits, targets, reduction="sum") * 0.3
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    gradients = [torch.autograd.grad(value, logits)[0] for value in (loss, expected)]
    assert torch.allclose(*gradients, atol=1e-6)


@pytest.mark.parametrize("folder", ["gpt2_folder", "llama_folder"])
def test_naming_the_rows_of_the_embedding_changes_no_gradient(folder, request):
    model = train_model.load_for_training(request.getfixturevalue(folder))
    batch = train_model.collate([{"input_ids": [5, 9, 5, 7], "labels": [5, 9, 5, 7]}])
    gradients = []
    for prepare in (lambda model: None, train_model.use_sparse_embedding_gradient):
        prepare(model)
        model.zero_grad()
        train_model.SummedCrossEntropy.apply(*train_model.scored_logits(model, batch)).backward()
        gradients.append(model.get_input_embeddings().weight.grad)
    assert torch.allclose(*gradients, atol=1e-6)


def test_dropout_reaches_every_place_that_the_architecture_has_for_it(gpt2_folder):
    model = train_model.load_for_training(gpt2_folder, 0.25)
    layers = [layer.p for layer in model.modules() if isinstance(layer, torch.nn.Dropout)]
    assert layers and set(layers) == {0.25}


def test_float16_with_loss_scaling_gives_the_gradients_of_float32(gpt2_folder):
    """As far as a CPU allows: Trainer refuses float16 there, so the scaler is driven by hand."""
    model, device = train_model.load_for_training(gpt2_folder).train(), torch.device("cpu")
    batch = train_model.collate([{"input_ids": list(range(5, 45)), "labels": list(range(5, 45))}])
    scaler, optimizer, gradients = torch.amp.GradScaler("cpu"), torch.optim.SGD(model.parameters(), lr=0.0), {}
    for precision in ("fp32", "fp16"):
        optimizer.zero_grad()
        with train_model.autocast(device, precision):
            logits, targets = train_model.scored_logits(model, batch)
            loss = train_model.SummedCrossEntropy.apply(logits, targets) / 4096
        assert logits.dtype == (torch.float16 if precision == "fp16" else torch.float32)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        gradients[precision] = torch.cat([p.grad.flatten() for p in model.parameters()])
        scaler.step(optimizer)
        scaler.update()
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert functional.cosine_similarity(*gradients.values(), dim=0) > 0.9999


def test_float16_keeps_the_gradient_of_rare_tokens():
    logits = torch.tensor([[12.0, -6.0]], dtype=torch.float16, requires_grad=True)
    (train_model.SummedCrossEntropy.apply(logits, torch.tensor([0])) * 2**16).backward()
    assert logits.grad[0, 1].item() == pytest.approx(2**16 * math.exp(-18), rel=1e-2)


# ---------------------------------------------------------------------------- whole runs
def test_a_run_leaves_a_model_that_anybody_can_load(gpt2_folder, data_folder, tmp_path, capsys):
    report = run(gpt2_folder, data_folder, tmp_path / "model", "--epochs", "2", "--learning-rate", "1e-2")
    names = {path.name for path in (tmp_path / "model").iterdir()}
    assert {
        "model.safetensors",
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "chat_template.jinja",
    } <= names
    assert {"README.md", "training_report.json", "loss_curve.png"} <= names
    assert not any(name.endswith((".bin", ".pt", ".pth", ".pkl")) for name in names)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]

    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(tmp_path / "model"),
        AutoTokenizer.from_pretrained(tmp_path / "model"),
    )
    assert model.config.use_cache and model.config.activation_function == "gelu_new"
    assert model.config.n_ctx == 256  # without which llama.cpp's converter stops
    assert model.lm_head.weight.data_ptr() == model.transformer.wte.weight.data_ptr()
    assert model.generation_config.eos_token_id == [tokenizer.eos_token_id] and model.generation_config.do_sample
    inputs = tokenizer.apply_chat_template(TALK[:1], add_generation_prompt=True, return_tensors="pt", return_dict=True)
    assert model.generate(**inputs, max_new_tokens=5).shape[1] <= inputs["input_ids"].shape[1] + 5

    assert report["data"]["train"]["conversations"] == 40 and report["data"]["train"]["private"] == 14
    assert report["best"]["eval_loss"] < report["base"]["eval_loss"]
    val = report["data"]["val"]
    bits = report["best"]["eval_loss"] * val["author_tokens"] / math.log(2) / val["author_bytes"]
    assert report["best"]["eval_bits_per_byte"] == pytest.approx(bits)
    output = capsys.readouterr()
    assert "it learned. It" in output.out
    assert f"{report['data']['train']['author_tokens']:,} scored an epoch" in output.err


def test_same_seed_same_losses_and_the_old_model_is_replaced(llama_folder, data_folder, tmp_path):
    first = run(llama_folder, data_folder, tmp_path / "model", "--epochs", "1")
    again = run(llama_folder, data_folder, tmp_path / "model", "--epochs", "1")
    assert losses(first) == losses(again)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("rows_at_once", [2, 4])
def test_an_update_is_the_same_however_many_rows_go_through_at_once(
    rows_at_once, gpt2_folder, data_folder, tmp_path, monkeypatch
):
    """Over more than an epoch, so that rows which only fill up the last update are among them."""
    flags = ("--epochs", "2", "--learning-rate", "1e-2")
    one_by_one = run(gpt2_folder, data_folder, tmp_path / "one-by-one", *flags)
    train_this_way(monkeypatch, rows_at_once=rows_at_once)
    together = run(gpt2_folder, data_folder, tmp_path / "together", *flags)
    assert together["plan"]["rows_at_once"] == rows_at_once
    assert together["plan"]["accumulation"] * rows_at_once == one_by_one["plan"]["accumulation"]
    assert losses(one_by_one) == pytest.approx(losses(together), abs=1e-4)


def test_a_run_goes_on_with_other_rows_at_once_as_on_another_card(
    gpt2_folder, data_folder, tmp_path, monkeypatch, capsys
):
    whole = run(gpt2_folder, data_folder, tmp_path / "whole", "--max-steps", "9")
    with monkeypatch.context() as patch:
        train_this_way(patch, rows_at_once=4)
        stop_at(patch, 5)
        with pytest.raises(ZeroDivisionError):
            run(gpt2_folder, data_folder, tmp_path / "moved", "--max-steps", "9")
    capsys.readouterr()
    train_this_way(monkeypatch, rows_at_once=2)
    moved = run(gpt2_folder, data_folder, tmp_path / "moved", "--max-steps", "9")
    assert "Continuing the run that stopped after update 5" in capsys.readouterr().err
    assert losses(moved) == pytest.approx(losses(whole), abs=1e-5)


@pytest.mark.parametrize("architecture", ["gpt_neox", "qwen2", "phi", "bloom"])
def test_other_architectures_train_and_keep_their_template(architecture, data_folder, tmp_path):
    chatml = architecture == "qwen2"
    base = make_model_folder(tmp_path / "base", architecture, chatml, intermediate_size=64, num_key_value_heads=2)
    report = run(base, data_folder, tmp_path / "model", "--max-steps", "1")
    assert report["best"]["step"] == 1
    template = AutoTokenizer.from_pretrained(tmp_path / "model").chat_template
    assert template.startswith(
        "{% for message in messages %}{{ '<|im_start|>'" if chatml else train_model.PLAIN_TEMPLATE[:40]
    )


def test_the_plan_counts_the_rows_of_a_model_that_cannot_pack(data_folder, tmp_path, capsys):
    """BLOOM has a row for each window, so more updates than the plan before loading says."""
    base = make_model_folder(tmp_path / "base", "bloom", False, n_head=2, n_layer=2)
    report = run(base, data_folder, tmp_path / "model", "--epochs", "1")
    plans = re.findall(r"([\d,]+) rows of up to 64 tokens, (\d+) updates", capsys.readouterr().err)
    assert len(plans) == 2 and int(plans[0][0]) < int(plans[1][0])
    updates = report["log"][-1]["step"]
    assert int(plans[1][1]) == updates > int(plans[0][1])
    measured = [entry["step"] for entry in report["log"] if "eval_loss" in entry]
    assert measured == [0, math.ceil(updates / 2), updates]


def test_a_model_without_a_limit_of_positions_trains_to_the_end(data_folder, tmp_path):
    """As Mamba and BLOOM are; the Modelfile then names the length of the windows it was trained with."""
    base = make_model_folder(tmp_path / "base", "mamba", False)
    config = json.loads((base / "config.json").read_text())
    del config["max_position_embeddings"]
    (base / "config.json").write_text(json.dumps(config))
    run(base, data_folder, tmp_path / "model", "--max-steps", "1")
    assert "PARAMETER num_ctx 64\n" in (tmp_path / "model" / "Modelfile").read_text()


def train_this_way(monkeypatch, optimizer="adamw_torch_fused", checkpointing=False, rows_at_once=1) -> None:
    """Let the plan take this way to train, as if the memory asked for it."""
    way = train_model.WayToTrain(optimizer, checkpointing, rows_at_once)
    monkeypatch.setattr(train_model, "fit_into_memory", lambda *_: (way, {"weights": 1}))


def test_frugal_training_trains(gpt2_folder, data_folder, tmp_path, monkeypatch):
    train_this_way(monkeypatch, optimizer="adamw_bnb_8bit", checkpointing=True)
    report = run(gpt2_folder, data_folder, tmp_path / "model", "--epochs", "1", "--learning-rate", "1e-2")
    assert report["best"]["eval_loss"] < report["base"]["eval_loss"]
    assert AutoConfig.from_pretrained(tmp_path / "model").use_cache


def test_training_stops_when_validation_gets_worse(gpt2_folder, tmp_path, monkeypatch, capsys):
    """The validation post is made of what training makes ever less likely."""
    write_jsonl(tmp_path / "train_data.jsonl", conversations(30))
    worse = conversations(1)
    worse[0]["messages"][1]["content"] = "QQ ZZ !! ?? 77 %% QQ ZZ"
    write_jsonl(tmp_path / "val_data.jsonl", worse)
    monkeypatch.setattr(train_model, "PATIENCE", 2)
    report = run(gpt2_folder, tmp_path, tmp_path / "model", "--epochs", "30", "--learning-rate", "1e-1")
    output = capsys.readouterr()
    assert report["log"][-1]["step"] < 100
    assert "Stopped early" in output.err and "it did not learn" in output.out


# ---------------------------------------------------------------------------- adapters
@pytest.fixture(scope="session")
def qwen2_folder(tmp_path_factory) -> Path:
    """Qwen2's shape: biases in the attention alone, an output layer of its own."""
    return make_model_folder(
        tmp_path_factory.mktemp("qwen2"), "qwen2", chatml=True, intermediate_size=64, num_key_value_heads=2
    )


SHAPES = ["gpt2_folder", "llama_folder", "qwen2_folder"]


@pytest.fixture
def rank_4(monkeypatch):
    monkeypatch.setattr(train_model, "LORA_RANK", 4)


def adapted(folder: Path, precision: str = "fp32"):
    """A model whose adapters have learned something: B is no longer zero."""
    model = train_model.add_adapters(train_model.load_for_training(folder), precision, settings_with(lora_rank=4))
    torch.manual_seed(1)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.05)
    return model.eval()


def one_row(length: int = 40) -> dict[str, torch.Tensor]:
    return train_model.collate([{"input_ids": list(range(5, 5 + length)), "labels": list(range(5, 5 + length))}])


def in_bfloat16(monkeypatch) -> None:
    """Train in it, whether this processor has kernels for it or not."""
    monkeypatch.setattr(train_model, "PRECISION", "bf16")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})


@pytest.mark.parametrize("shape", SHAPES)
def test_merged_adapters_give_the_logits_of_the_base_with_adapters_and_the_base_comes_back(shape, rank_4, request):
    folder = request.getfixturevalue(shape)
    model, batch = adapted(folder), one_row()
    with torch.no_grad():
        base, _ = train_model.scored_logits(train_model.load_for_training(folder).eval(), batch)
        beside, _ = train_model.scored_logits(model, batch)
        with train_model.merged(model, 42):
            inside, _ = train_model.scored_logits(model, batch)
            plain, weights = train_model.without_adapters(model)
            alone = AutoModelForCausalLM.from_config(plain.config).eval()
            assert not alone.load_state_dict(weights).missing_keys
            saved, _ = train_model.scored_logits(alone, batch)
        again, _ = train_model.scored_logits(model, batch)
    assert (beside - base).abs().max() > 1e-3
    assert torch.allclose(inside, beside, atol=1e-5)
    assert torch.allclose(saved, inside, atol=1e-5)
    assert torch.equal(again, beside)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_the_frozen_weights_survive_merging_bit_by_bit(precision, gpt2_folder, rank_4):
    """In half precision, where W + BA - BA is another W."""
    model = adapted(gpt2_folder, precision)
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    for _ in range(3):
        with train_model.merged(model, 42):
            assert not all(torch.equal(weight, before[name]) for name, weight in model.named_parameters())
    assert all(torch.equal(weight, before[name]) for name, weight in model.named_parameters())
    frozen = {weight.dtype for weight in model.parameters() if weight.dim() > 1 and not weight.requires_grad}
    assert frozen == {{"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)}
    assert {weight.dtype for weight in model.parameters() if weight.requires_grad} == {torch.float32}


@pytest.mark.parametrize("shape", SHAPES)
def test_adapters_learn_and_leave_a_folder_as_full_training_does(
    shape, rank_4, data_folder, tmp_path, request, monkeypatch, capsys
):
    base_folder = request.getfixturevalue(shape)
    report = run(base_folder, data_folder, tmp_path / "model", "--epochs", "2", "--learning-rate", "1e-2")
    assert report["best"]["eval_loss"] < report["base"]["eval_loss"] - 0.05
    updates = [entry["loss"] for entry in report["log"] if "loss" in entry]
    assert np.mean(updates[-5:]) < np.mean(updates[:5]) - 0.05
    assert report["settings"]["lora_rank"] == report["plan"]["lora_rank"] == 4
    said = capsys.readouterr().err
    assert f"frozen, {report['plan']['trained'] / 1e6:.1f}M trained in adapters of rank 4, fp32 on cpu" in said
    assert "arning" not in said

    monkeypatch.setattr(train_model, "LORA_RANK", 0)
    run(base_folder, data_folder, tmp_path / "full", "--max-steps", "1")
    names = [sorted(path.name for path in (tmp_path / name).iterdir()) for name in ("model", "full")]
    assert names[0] == names[1] and "model.safetensors" in names[0]
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("model", "full")]
    assert configs[0] == configs[1] and configs[0]["use_cache"]

    # Every linear layer has learned, and what no adapter stands beside is the base's to the last bit.
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    learned = [model.get_submodule(name).weight for name in train_model.layers_to_adapt(model)]
    base = dict(AutoModelForCausalLM.from_pretrained(base_folder).named_parameters())
    for name, weight in model.named_parameters():
        assert torch.equal(weight, base[name]) != any(weight is other for other in learned), name
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert tied == AutoConfig.from_pretrained(base_folder).tie_word_embeddings


@pytest.mark.parametrize("shape", ["gpt2_folder", "llama_folder"])
def test_what_is_measured_in_half_precision_is_what_anybody_loads(
    shape, rank_4, data_folder, tmp_path, request, monkeypatch
):
    """A merge rounds: the loss of the base with adapters beside it is another one."""
    in_bfloat16(monkeypatch)
    base_folder = request.getfixturevalue(shape)
    report = run(base_folder, data_folder, tmp_path / "model", "--epochs", "1", "--learning-rate", "1e-2")
    assert report["best"]["eval_loss"] < report["base"]["eval_loss"] - 0.02

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    full_size = (base_folder / "model.safetensors").stat().st_size
    assert (tmp_path / "model" / "model.safetensors").stat().st_size < 0.6 * full_size

    # To the last digit but for the sum: 1e-3, which the run itself demands, would also let a model pass that was
    # measured with its adapters beside it.
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    entries = train_model.read_conversations(data_folder / "val_data.jsonl")
    tokenized = train_model.tokenize(tokenizer, entries)
    rows = train_model.make_rows(tokenized, 64, 8)
    saved = train_model.load_for_training(tmp_path / "model")
    train_model.hold_in_half(saved, "bf16")
    with train_model.autocast(torch.device("cpu"), "bf16"):
        nats = train_model.conversation_losses(saved, rows).sum()
    assert nats / train_model.scored_tokens(rows) == pytest.approx(report["best"]["eval_loss"], abs=1e-7)


def test_a_merge_into_bfloat16_keeps_in_the_mean_what_each_weight_would_lose():
    """Weights of 0.19, which lie 0.001 apart; to the nearest, nothing of 0.0001 more would be left."""
    rng = torch.Generator().manual_seed(0)
    for sign in (1, -1):
        base = (sign * torch.full((400, 400), 0.19)).bfloat16().float()
        step = 2.0**-10
        merged = train_model.rounded(base + 0.1 * step, torch.bfloat16, rng)
        assert merged.dtype == torch.bfloat16
        change = (merged.float() - base) / step
        assert set(change.unique().tolist()) == {0.0, 1.0}
        assert change.mean().item() == pytest.approx(0.1, abs=0.01)
        # What has a number of its own keeps it: a base model without anything learned is the base model.
        assert torch.equal(train_model.rounded(base, torch.bfloat16, rng).float(), base)
    near = torch.tensor([0.19003])
    assert torch.equal(train_model.rounded(near, torch.float16, rng), near.half())


def test_layers_hand_on_float32_over_a_base_in_half_precision(llama_folder, rank_4):
    model, seen = adapted(llama_folder, "fp16"), []
    for layer in model.get_base_model().model.layers:
        layer.register_forward_hook(lambda layer, inputs, output: seen.append((inputs[0].dtype, output.dtype)))
    with train_model.autocast(torch.device("cpu"), "fp16"):
        logits, _ = train_model.scored_logits(model, one_row())
    assert set(seen) == {(torch.float32, torch.float32)} and logits.dtype == torch.float16


def test_adapters_in_float16_get_the_gradients_of_float32(gpt2_folder, rank_4):
    """What the card with 8 GB does: a scaler takes gradients of float32 weights only."""
    gradients = []
    for precision in ("fp32", "fp16"):
        model = adapted(gpt2_folder, precision).train()
        trained = [weight for weight in model.parameters() if weight.requires_grad]
        scaler, optimizer = torch.amp.GradScaler("cpu"), torch.optim.SGD(trained, lr=0.0)
        with train_model.autocast(torch.device("cpu"), precision):
            logits, targets = train_model.scored_logits(model, one_row())
            loss = train_model.SummedCrossEntropy.apply(logits, targets) / 4096
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        gradients.append(torch.cat([weight.grad.flatten() for weight in trained]))
    assert functional.cosine_similarity(*gradients, dim=0) > 0.999


def test_adapters_learn_the_same_with_recomputed_activations(llama_folder, data_folder, tmp_path, rank_4, monkeypatch):
    """The embedding is frozen, so that nothing which a layer is given asks for a gradient."""
    flags = ("--max-steps", "4", "--learning-rate", "1e-2")
    kept = run(llama_folder, data_folder, tmp_path / "kept", *flags)
    train_this_way(monkeypatch, checkpointing=True)
    recomputed = run(llama_folder, data_folder, tmp_path / "recomputed", *flags)
    assert recomputed["plan"]["checkpointing"] and not kept["plan"]["checkpointing"]
    assert losses(recomputed) == pytest.approx(losses(kept), abs=1e-5)
    assert recomputed["best"]["eval_loss"] < recomputed["base"]["eval_loss"]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_killed_run_of_adapters_ends_as_if_nothing_had_happened(
    precision, gpt2_folder, data_folder, tmp_path, rank_4, monkeypatch, capsys
):
    if precision == "bf16":
        in_bfloat16(monkeypatch)
    flags = ("--max-steps", "7", "--learning-rate", "1e-2")
    whole = run(gpt2_folder, data_folder, tmp_path / "whole", *flags)
    with monkeypatch.context() as patch:
        stop_at(patch, 5)
        with pytest.raises(ZeroDivisionError):
            run(gpt2_folder, data_folder, tmp_path / "killed", *flags)

    # A checkpoint has the adapters and no copy of the base model, and names nobody who could be asked for one.
    checkpoint = train_model.last_checkpoint(tmp_path / "killed-unfinished")
    assert (checkpoint / "adapter_model.safetensors").is_file() and not (checkpoint / "model.safetensors").exists()
    assert not json.loads((checkpoint / "adapter_config.json").read_text())["base_model_name_or_path"]

    capsys.readouterr()
    continued = run(gpt2_folder, data_folder, tmp_path / "killed", *flags)
    assert "Continuing the run that stopped after update 5" in capsys.readouterr().err
    assert losses(continued) == losses(whole)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "killed")]
    assert weights[0] == weights[1]


# ---------------------------------------------------------------------------- LEARNING_RATE = "auto"
TRIED = (1e-4, 1e-2, 1e30)  # too low, right, and one that breaks everything


@pytest.fixture
def tries(monkeypatch) -> None:
    monkeypatch.setattr(train_model, "RATES_TO_TRY", TRIED)
    monkeypatch.setattr(train_model, "RATES_FOR_ADAPTERS", TRIED)


def test_the_best_of_three_rates_is_found_and_the_run_is_that_of_this_rate(
    gpt2_folder, data_folder, tmp_path, tries, capsys
):
    """To the last digit: no trial leaves anything behind in the weights, the random numbers or the schedule."""
    found = run(gpt2_folder, data_folder, tmp_path / "found", "--max-steps", "9", "--learning-rate", "auto")
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("rate ")]
    given = run(gpt2_folder, data_folder, tmp_path / "given", "--max-steps", "9", "--learning-rate", "1e-2")
    assert losses(found) == losses(given)

    assert said[0] == "rate     each of 0.0001, 0.01, 1e+30 has a trial of 2 updates of 2 rows, from the same start"
    assert said[3] == "rate     1e+30   the loss became NaN, 3 of 3 tried, 0 s left"
    assert said[4] == "rate     0.01 is the best and is used"
    tried = found["learning_rate"]["bits_per_byte_of_tried"]
    assert found["learning_rate"]["used"] == 1e-2 and found["settings"]["learning_rate"] == "auto"
    assert tried["0.01"] < tried["0.0001"] and tried["1e+30"] is None


def test_where_no_rate_keeps_the_loss_a_number_the_run_does_not_begin(
    gpt2_folder, data_folder, tmp_path, monkeypatch, capsys
):
    """As with float16 and a model whose activations it cannot hold."""
    monkeypatch.setattr(train_model, "RATES_TO_TRY", (1e29, 1e30))
    with pytest.raises(
        SystemExit, match='Training diverged at every learning rate that was tried: set PRECISION = "fp32", or'
    ):
        run(gpt2_folder, data_folder, tmp_path / "model", "--max-steps", "9", "--learning-rate", "auto")
    assert "update 0/9" not in capsys.readouterr().err
    assert not (tmp_path / "model").exists()


def test_adapters_are_tried_at_rates_of_their_own(gpt2_folder, data_folder, tmp_path, rank_4, monkeypatch):
    monkeypatch.setattr(train_model, "RATES_FOR_ADAPTERS", (1e-3, 1e-2))
    found = run(gpt2_folder, data_folder, tmp_path / "found", "--max-steps", "4", "--learning-rate", "auto")
    given = run(gpt2_folder, data_folder, tmp_path / "given", "--max-steps", "4", "--learning-rate", "1e-2")
    assert list(found["learning_rate"]["bits_per_byte_of_tried"]) == ["0.001", "0.01"]
    assert losses(found) == losses(given)


def test_a_run_killed_in_its_trials_tries_only_what_is_left(
    gpt2_folder, data_folder, tmp_path, tries, monkeypatch, capsys
):
    more = ("--max-steps", "9", "--learning-rate", "auto")
    whole = run(gpt2_folder, data_folder, tmp_path / "whole", *more)
    tried = []
    try_rate = train_model.try_rate

    def dying_at_the_second(trial) -> float:
        tried.append(trial.settings.learning_rate)
        if len(tried) == 2:
            raise KeyboardInterrupt
        return try_rate(trial)

    monkeypatch.setattr(train_model, "try_rate", dying_at_the_second)
    with pytest.raises(SystemExit, match="Stopped: run the same command again; it continues"):
        run(gpt2_folder, data_folder, tmp_path / "killed", *more)
    assert not (tmp_path / "killed").exists()

    continued = run(gpt2_folder, data_folder, tmp_path / "killed", *more)
    assert tried == [1e-4, 1e-2, 1e-2, 1e30]
    assert losses(continued) == losses(whole) and continued["learning_rate"] == whole["learning_rate"]


def test_a_run_killed_after_its_trials_goes_on_with_the_rate_that_they_found(
    gpt2_folder, data_folder, tmp_path, tries, monkeypatch, capsys
):
    more = ("--max-steps", "9", "--learning-rate", "auto")
    whole = run(gpt2_folder, data_folder, tmp_path / "whole", *more)
    continued = stopped_and_continued(gpt2_folder, data_folder, tmp_path / "stopped", monkeypatch, *more)
    assert "Continuing the run that stopped after update 5" in capsys.readouterr().err
    assert losses(continued) == losses(whole) and continued["learning_rate"] == whole["learning_rate"]


def test_what_was_tried_for_another_run_is_tried_anew(gpt2_folder, data_folder, tmp_path, tries, monkeypatch):
    learn = ("--max-steps", "9", "--learning-rate", "auto")
    with monkeypatch.context() as patch:
        stop_at(patch, 5)
        with pytest.raises(ZeroDivisionError):
            run(gpt2_folder, data_folder, tmp_path / "model", *learn)

    tried = []

    def remember(trial) -> float:
        tried.append(trial.settings.learning_rate)
        return trial.settings.learning_rate

    monkeypatch.setattr(train_model, "try_rate", remember)
    run(gpt2_folder, data_folder, tmp_path / "model", *learn, "--fresh")
    assert tried == list(TRIED)


# ---------------------------------------------------------------------------- killed runs
DRIVER = """
import sys, train_model as t
t.CONTEXT_TOKENS, t.OVERLAP_TOKENS, t.ROWS_PER_UPDATE, t.PRECISION, t.CHECKPOINT_MINUTES = 64, 8, 4, "fp32", 0
t.LEARNING_RATE = 1e-4
sys.exit(t.main(sys.argv[1:]))
"""


def start(*arguments: str, launcher: tuple[str, ...] = ("-c", DRIVER), **options) -> subprocess.Popen:
    """The script in a process of its own, with as many threads as the tests have: sums depend on it."""
    options.setdefault("env", {**os.environ, "OMP_NUM_THREADS": "1"})
    return subprocess.Popen(
        [sys.executable, *launcher, *arguments],
        cwd=SCRIPT.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def flags(base: Path, data: Path, output: Path) -> list[str]:
    return ["--base-model", str(base), "--data-dir", str(data), "--output-dir", str(output), "--max-steps", "9"]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_run_continues_and_ends_as_if_nothing_had_happened(number, gpt2_folder, data_folder, tmp_path, capsys):
    whole = run(gpt2_folder, data_folder, tmp_path / "whole", "--max-steps", "9")
    process = start(*flags(gpt2_folder, data_folder, tmp_path / "killed"))
    for line in process.stderr:
        if "update 5/9" in line:
            process.send_signal(number)
            break
    _, rest = process.communicate()
    if number == signal.SIGINT:
        assert process.returncode == 1 and "run the same command again to continue" in rest
    assert not (tmp_path / "killed").exists()
    capsys.readouterr()
    continued = run(gpt2_folder, data_folder, tmp_path / "killed", "--max-steps", "9")
    assert "Continuing the run that stopped after update" in capsys.readouterr().err
    assert losses(continued) == losses(whole)


def stop_at(monkeypatch, update: int) -> None:
    """Let a run die, as by a power cut, in the given update."""
    original = train_model.BlogTrainer.training_step

    def dying(self, *arguments, **options):
        if self.state.global_step == update:
            # A process that dies takes the copies of its weights along, `CastWeightsOnce` has them.
            torch.autocast_decrement_nesting()
            torch.clear_autocast_cache()
            raise ZeroDivisionError
        return original(self, *arguments, **options)

    monkeypatch.setattr(train_model.BlogTrainer, "training_step", dying)


def stopped_and_continued(base: Path, data: Path, output: Path, monkeypatch, *more: str) -> dict:
    with monkeypatch.context() as patch:
        stop_at(patch, 5)
        with pytest.raises(ZeroDivisionError):
            run(base, data, output, *more)
    return run(base, data, output, *more)


def test_a_stopped_run_with_8_bit_averages_ends_as_if_nothing_had_happened(
    gpt2_folder, data_folder, tmp_path, monkeypatch
):
    train_this_way(monkeypatch, optimizer="adamw_bnb_8bit")
    more = ("--max-steps", "9", "--learning-rate", "1e-2")
    whole = run(gpt2_folder, data_folder, tmp_path / "whole", *more)

    loaded = []
    load = train_model.BlogTrainer._load_optimizer_and_scheduler

    def watched(self, checkpoint):
        load(self, checkpoint)
        for averages in self.optimizer.state.values():
            loaded.extend(value.dtype for value in averages.values() if torch.is_tensor(value))

    monkeypatch.setattr(train_model.BlogTrainer, "_load_optimizer_and_scheduler", watched)
    continued = stopped_and_continued(gpt2_folder, data_folder, tmp_path / "stopped", monkeypatch, *more)
    assert losses(continued) == losses(whole)
    # The MLP's weights are large enough to have theirs in one byte each.
    assert {torch.uint8, torch.float32} <= set(loaded)


def unfinished_run(base: Path, data: Path, output: Path, monkeypatch) -> Path:
    """The folder of a run that died in its sixth update."""
    with monkeypatch.context() as patch:
        stop_at(patch, 5)
        with pytest.raises(ZeroDivisionError):
            run(base, data, output, "--max-steps", "9")
    return output.with_name(output.name + "-unfinished")


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, but for the lock."""
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock"}


OTHER_RUNS = [
    ("--learning-rate=1e-3", None, "had LEARNING_RATE = 0.0001 (now 0.001): set that back"),
    ("--max-steps=8", ("SEED", 7), "had MAX_STEPS = 9 (now 8), SEED = 42 (now 7)"),
    ("--max-steps=9", ("LORA_RANK", 4), "had LORA_RANK = 0 (now 4)"),
    ("--max-steps=9", ("OTHER DATA", None), "had other training posts: set that back"),
]


@pytest.mark.parametrize(("flag", "setting", "message"), OTHER_RUNS)
def test_only_fresh_throws_an_unfinished_run_away(
    flag, setting, message, gpt2_folder, data_folder, tmp_path, monkeypatch, capsys
):
    unfinished = unfinished_run(gpt2_folder, data_folder, tmp_path / "model", monkeypatch)
    before = contents(unfinished)
    if setting and setting[0] == "OTHER DATA":
        data_folder = shutil.copytree(data_folder, tmp_path / "data")
        write_jsonl(data_folder / "train_data.jsonl", conversations(41))
    elif setting:
        monkeypatch.setattr(train_model, *setting)

    with pytest.raises(SystemExit, match=re.escape(message)):
        run(gpt2_folder, data_folder, tmp_path / "model", "--max-steps", "9", flag)
    assert contents(unfinished) == before

    capsys.readouterr()
    run(gpt2_folder, data_folder, tmp_path / "model", "--max-steps", "9", flag, "--fresh")
    assert "Continuing" not in capsys.readouterr().err
    assert not unfinished.exists()


def cut_in_half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def make_noise(path: Path) -> None:
    path.write_bytes(b"\xa5" * path.stat().st_size)


def change_state(**values):
    """A state of the same size in bytes as the one that is noted."""

    def change(path: Path) -> None:
        text = json.dumps({**json.loads(path.read_text(encoding="utf-8")), **values})
        path.write_text(text, encoding="utf-8")
        sizes = json.loads((path.parent / "complete").read_text(encoding="utf-8"))
        (path.parent / "complete").write_text(json.dumps({**sizes, path.name: len(text)}), encoding="utf-8")

    return change


DAMAGED = [
    ("run.json", cut_in_half, "run.json cannot be read"),
    ("run.json", lambda path: path.write_text("[]"), "run.json cannot be read"),
    ("rates.json", lambda path: path.write_text("{"), ""),
    ("checkpoint-5/trainer_state.json", cut_in_half, "cannot be continued"),
    ("checkpoint-5/trainer_state.json", change_state(global_step=9), "cannot be continued"),
    ("checkpoint-5/trainer_state.json", change_state(log_history=[]), "cannot be continued"),
    ("checkpoint-5/trainer_state.json", change_state(stateful_callbacks=5), "cannot be continued"),
    ("checkpoint-5/trainer_state.json", change_state(of_another_version=1), "cannot be continued"),
    ("checkpoint-5/complete", lambda path: path.write_text(""), "cannot be continued"),
    ("checkpoint-5/optimizer.pt", cut_in_half, "optimizer.pt is cut or missing"),
    ("checkpoint-5/optimizer.pt", make_noise, "optimizer.pt is damaged"),
    ("checkpoint-5/scheduler.pt", Path.unlink, "scheduler.pt is cut or missing"),
    ("checkpoint-5/rng_state.pth", make_noise, "rng_state.pth is damaged"),
    ("checkpoint-5/model.safetensors", cut_in_half, "model.safetensors is cut or missing"),
    ("checkpoint-5/model.safetensors", make_noise, "model.safetensors is damaged"),
]


@pytest.mark.parametrize("fresh", [(), ("--fresh",)], ids=["again", "fresh"])
@pytest.mark.parametrize(("name", "damage", "said"), DAMAGED)
def test_what_is_damaged_of_an_unfinished_run_is_said_and_the_run_starts_over(
    name, damage, said, fresh, gpt2_folder, data_folder, tmp_path, monkeypatch, capsys
):
    unfinished = unfinished_run(gpt2_folder, data_folder, tmp_path / "model", monkeypatch)
    (unfinished / "rates.json").write_text("{}")
    damage(unfinished / name)
    capsys.readouterr()
    report = run(gpt2_folder, data_folder, tmp_path / "model", "--max-steps", "9", *fresh)
    assert sum("loss" in entry for entry in report["log"]) == 9
    if not fresh:
        assert said in capsys.readouterr().err


BEGUN = train_model.Begun("adamw_torch_fused", int(8e9))


def make_checkpoint(folder: Path, best_metric: float | None) -> None:
    folder.mkdir(parents=True)
    state = {"best_metric": best_metric, "global_step": int(folder.name.split("-")[1]), "stateful_callbacks": {}}
    state = json.dumps({**state, "log_history": [{"eval_loss": 1.0}]})
    (folder / "trainer_state.json").write_text(state)
    (folder / "complete").write_text(json.dumps({"trainer_state.json": len(state)}))


def test_a_half_written_checkpoint_is_not_used(tmp_path):
    for name in ("checkpoint-5", "checkpoint-10"):
        make_checkpoint(tmp_path / name, 1.0)
    (tmp_path / "checkpoint-10" / "complete").unlink()
    assert train_model.last_checkpoint(tmp_path) is None  # its best model is gone: the run ended after this
    (tmp_path / "best").mkdir()
    assert train_model.last_checkpoint(tmp_path).name == "checkpoint-5"


def test_a_finished_run_that_was_not_cleared_away_is_not_continued(gpt2_folder, data_folder, tmp_path, capsys):
    """Killed between moving its best model out and removing the rest: the checkpoint belongs to no model any more."""
    unfinished = tmp_path / "model-unfinished"
    settings = train_model.parse_arguments(flags(gpt2_folder, data_folder, tmp_path / "model"))
    identity = train_model.identity_of_run(settings, "fp32")
    make_checkpoint(unfinished / "checkpoint-9", 1.0)
    (unfinished / "rates.json").write_text('{"0.1": 1.0}')
    (unfinished / "run.json").write_text(json.dumps(identity))
    train_model.open_unfinished(unfinished, {**identity, "seed": 7}, fresh=False, begun=BEGUN)
    assert [path.name for path in unfinished.iterdir()] == ["run.json"]
    assert not capsys.readouterr().err


def test_every_setting_is_part_of_the_identity_of_a_run(gpt2_folder, data_folder, tmp_path):
    """But for those that are named as making no difference; so a new setting cannot be forgotten."""
    settings = train_model.parse_arguments(flags(gpt2_folder, data_folder, tmp_path / "model"))
    before = train_model.identity_of_run(settings, "bf16")
    assert set(before) == {
        "base_model",
        "context_tokens",
        "dropout",
        "epochs",
        "evaluations_per_epoch",
        "learning_rate",
        "lora_rank",
        "max_steps",
        "overlap_tokens",
        "patience",
        "precision",
        "rows_per_update",
        "seed",
        "train_sha256",
        "val_sha256",
        "warmup_share",
    }
    for name in vars(settings):
        changed = train_model.identity_of_run(replace(settings, **{name: data_folder}), "bf16")
        differ = [key for key in before if changed[key] != before[key]]
        assert differ == ([] if name in {*train_model.NOT_IN_THE_IDENTITY, "precision"} else [name])


def test_a_checkpoint_of_float16_is_not_continued_in_bfloat16(gpt2_folder, data_folder, tmp_path, capsys):
    """PRECISION is "auto" in both: the card, or the torch, has changed. Named by hand, the same one is the same run."""
    settings = train_model.parse_arguments(flags(gpt2_folder, data_folder, tmp_path / "model"))
    settings = replace(settings, precision="auto")
    unfinished = tmp_path / "model-unfinished"
    train_model.open_unfinished(unfinished, train_model.identity_of_run(settings, "fp16"), fresh=False, begun=BEGUN)
    make_checkpoint(unfinished / "checkpoint-5", None)

    settings = replace(settings, precision="fp16")
    train_model.open_unfinished(unfinished, train_model.identity_of_run(settings, "fp16"), fresh=False, begun=BEGUN)
    assert "Continuing the run that stopped after update 5" in capsys.readouterr().err
    with pytest.raises(SystemExit, match=re.escape("had PRECISION = 'fp16' (now 'bf16')")):
        train_model.open_unfinished(unfinished, train_model.identity_of_run(settings, "bf16"), fresh=False, begun=BEGUN)
    assert (unfinished / "checkpoint-5").exists()


# ---------------------------------------------------------------------------- replacing a folder
STEPS = ("rename", "unlink", "rmdir")  # what changes names on the disk; a rename of pathlib's and rmtree end in these


def model_folder(path: Path, content: str, **more: str) -> Path:
    """A folder that says which model it holds, and which of its files are the script's; `more` are its owner's."""
    path.mkdir(parents=True)
    for name in ("config.json", "model.safetensors", "README.md"):
        (path / name).write_text(content)
    listed = {file.name: train_model.file_hash(file) for file in path.iterdir()}
    (path / "training_report.json").write_text(json.dumps({"files": listed}))
    for name, text in more.items():
        (path / name).write_text(text)
    return path


def finished_run(home: Path, old: bool) -> train_model.Places:
    """A run that has to put its model in place, beside an older model or none."""
    places = train_model.Places(home / "model")
    if old:
        model_folder(places.output, "old", notes="mine")
    model_folder(places.best, "new")
    make_checkpoint(places.unfinished / "checkpoint-9", 1.0)
    (places.unfinished / "run.json").write_text("{}")
    places.lock.touch()
    return places


def kill_before_step(number: int, act, *arguments: Path) -> bool:
    """Runs `act` in a process that is killed before the given step; whether it was, or came to its end before."""
    child = os.fork()
    if child == 0:
        steps = itertools.count()

        def counting(original):
            def step(*args, **options):
                if next(steps) == number:
                    os.kill(os.getpid(), signal.SIGKILL)
                return original(*args, **options)

            return step

        for name in STEPS:
            setattr(os, name, counting(getattr(os, name)))
        try:
            act(*arguments)
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


def whole_contents(home: Path) -> set[str]:
    """What the complete model folders below `home`, of whatever name, say; one with files missing says nothing."""
    found = set()
    for config in home.rglob("config.json"):
        texts = {name: (config.parent / name) for name in ("model.safetensors", "README.md", "training_report.json")}
        if all(path.is_file() for path in texts.values()):
            found.add(config.read_text())
    return found


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("old", [True, False], ids=["with an old model", "without"])
def test_a_kill_at_any_step_of_replacing_a_folder_loses_no_model(old, tmp_path):
    """Also when the recovery is killed, at any step of its own; and the owner's notes are in the model folder again."""
    kills = 0
    for first in itertools.count():
        killed = True
        for second in itertools.count():
            home = tmp_path / f"{first}-{second}"
            places = finished_run(home, old)
            killed = kill_before_step(first, train_model.put_in_place, places)
            kills += killed
            assert whole_contents(home), (first, second)
            killed_again = kill_before_step(second, train_model.recover, places)
            assert whole_contents(home), (first, second)
            train_model.recover(places)

            assert whole_contents(home), (first, second)
            if not places.best.exists():
                assert (places.output / "config.json").read_text() == "new" and not places.previous.exists()
            assert len(list(home.rglob("notes"))) == old
            if places.output.exists():
                assert not old or (places.output / "notes").read_text() == "mine"
            if not killed_again:
                break
        if not killed:
            break
    assert kills > (10 if old else 1)


def test_two_models_are_both_kept_where_a_run_was_killed_and_somebody_put_a_model_there(tmp_path):
    places = finished_run(tmp_path, old=True)
    places.output.rename(places.previous)
    model_folder(places.output, "somebody's")
    with pytest.raises(SystemExit, match="hold a model each: move one of the two away"):
        train_model.recover(places)
    assert len(whole_contents(tmp_path)) == 3


def test_a_link_to_a_model_on_another_disk_is_followed(gpt2_folder, data_folder, tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "home").mkdir()
    link = tmp_path / "home" / "model"
    link.symlink_to(tmp_path / "disk" / "model")
    for rounds in ("1", "2"):
        run(gpt2_folder, data_folder, link, "--max-steps", rounds)
    assert link.is_symlink() and [path.name for path in (tmp_path / "home").iterdir()] == ["model"]
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["model"]


KILLED_IN_THE_MIDDLE = """
import os, signal
rename = os.rename
def kill_between_the_two(old, new):
    rename(old, new)
    if str(new).endswith("/previous"):
        os.kill(os.getpid(), signal.SIGKILL)
os.rename = kill_between_the_two
"""


def test_a_run_killed_between_its_two_renames_has_its_model_at_the_next_start(
    gpt2_folder, data_folder, tmp_path, capsys
):
    model_folder(tmp_path / "model", "old", notes="mine")
    arguments = [*flags(gpt2_folder, data_folder, tmp_path / "model")[:-1], "2"]
    process = start(*arguments, launcher=("-c", KILLED_IN_THE_MIDDLE + DRIVER))
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not (tmp_path / "model").exists()

    run(gpt2_folder, data_folder, tmp_path / "model", "--max-steps", "2")
    said = capsys.readouterr().err
    assert f"that model is in {tmp_path / 'model'} now" in said and "notes" in said
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "model").config.model_type == "gpt2"
    assert json.loads((tmp_path / "model" / "training_report.json").read_text())["verdict"]
    assert (tmp_path / "model" / "notes").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


# ---------------------------------------------------------------------------- several processes
@pytest.mark.parametrize(
    "launcher",
    [
        ("torch.distributed.run", "--nproc_per_node=2", "--standalone"),
        ("accelerate.commands.launch", "--cpu", "--num_processes=2", "--main_process_port=0"),
    ],
    ids=["torchrun", "accelerate launch"],
)
def test_two_processes_give_the_losses_of_one(launcher, gpt2_folder, data_folder, tmp_path):
    learn = ["--max-steps", "3", "--learning-rate", "auto"]
    alone = run(gpt2_folder, data_folder, tmp_path / "alone", *learn)
    (tmp_path / "driver.py").write_text(DRIVER)
    launcher = ("-m", *launcher, str(tmp_path / "driver.py"))
    environment = {**os.environ, "PYTHONPATH": str(SCRIPT.parent), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    arguments = [*flags(gpt2_folder, data_folder, tmp_path / "together")[:-2], *learn]
    process = start(*arguments, launcher=launcher, env=environment)
    output, errors = process.communicate()
    assert process.returncode == 0, errors
    assert output.count("Validation") == 1 and errors.count("update 3/3  train") == 1
    assert errors.count("is the best and is used") == 1
    together = json.loads((tmp_path / "together" / "training_report.json").read_text())
    assert losses(together) == pytest.approx(losses(alone), abs=1e-5)
    assert together["learning_rate"]["used"] == alone["learning_rate"]["used"]
    tried = [report["learning_rate"]["bits_per_byte_of_tried"] for report in (together, alone)]
    assert tried[0] == pytest.approx(tried[1], abs=1e-5)


ADAPTED_DRIVER = DRIVER.replace(
    "sys.exit",
    """
t.LORA_RANK = 4
t.OPTIMIZERS_OF_ADAPTERS = t.OPTIMIZERS_OF_ADAPTERS[1:]  # with recomputed activations
sys.exit""",
)


def test_two_processes_train_the_adapters_of_one(rank_4, llama_folder, data_folder, tmp_path):
    """Also with recomputed activations, which find no gradient twice."""
    learn = ["--max-steps", "3", "--learning-rate", "1e-2"]
    alone = run(llama_folder, data_folder, tmp_path / "alone", *learn)
    (tmp_path / "driver.py").write_text(ADAPTED_DRIVER)
    launcher = ("-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", str(tmp_path / "driver.py"))
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(SCRIPT.parent), os.environ.get("PYTHONPATH", "")])
    arguments = [*flags(llama_folder, data_folder, tmp_path / "together")[:-2], *learn]
    process = start(*arguments, launcher=launcher, env=environment)
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    together = json.loads((tmp_path / "together" / "training_report.json").read_text())
    assert together["plan"]["checkpointing"]
    assert losses(together) == pytest.approx(losses(alone), abs=1e-5)


# ---------------------------------------------------------------------------- plans and errors
@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_attention_in_bfloat16_gives_the_gradients_of_the_fused_kernel(architecture, tmp_path):
    """And goes away with its context: the evaluation of the same model is exact again."""
    model = train_model.load_for_training(
        make_model_folder(tmp_path / architecture, architecture, chatml=False)
    ).train()
    ids = list(range(5, 45))
    row = {"input_ids": ids, "labels": ids, "position_ids": [*range(25), *range(15)]}
    batch = train_model.collate([row])

    gradients = {}
    for attention in (train_model.attention_in_bfloat16, contextlib.nullcontext):
        model.zero_grad()
        with train_model.autocast(model.device, "bf16"), attention():
            logits, targets = train_model.scored_logits(model, batch)
        train_model.SummedCrossEntropy.apply(logits, targets).backward()
        gradients[attention] = torch.cat([weight.grad.flatten() for weight in model.parameters()])

    assert functional.cosine_similarity(*gradients.values(), dim=0) > 0.999
    assert not torch.equal(*gradients.values())
    assert not torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed()
    assert torch.backends.cuda.flash_sdp_enabled()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_run_in_bfloat16_learns_also_where_activations_are_computed_twice(
    checkpointing, gpt2_folder, data_folder, tmp_path, monkeypatch
):
    monkeypatch.setattr(train_model, "pick_precision", lambda *_: "bf16")
    train_this_way(monkeypatch, checkpointing=checkpointing)
    report = run(gpt2_folder, data_folder, tmp_path / "model", "--max-steps", "6", "--learning-rate", "1e-2")
    assert report["best"]["eval_loss"] < report["base"]["eval_loss"]


@pytest.mark.parametrize(
    ("optimizer", "checkpointing", "first"),
    [
        ("adamw_torch_fused", False, "model    gpt2, 355M parameters, bf16 on cuda"),
        ("adamw_bnb_8bit", False, "Memory is short: training with adamw_bnb_8bit"),
        ("adamw_bnb_8bit", True, "Memory is short: training with adamw_bnb_8bit and recomputed activations."),
    ],
)
def test_a_plan_says_what_is_saved_when_memory_is_short(optimizer, checkpointing, first, capsys):
    plan = train_model.Plan("cuda", "bf16", optimizer, checkpointing, 2, 4, 20, 354_823_168)
    memory = {"weights": int(2.1e9), "optimizer": int(0.7e9)}
    plan = replace(plan, rows=1320, updates=495, memory=memory, free_memory=int(7.6e9))
    train_model.say_plan(plan, settings_with(base_model="gpt2"))
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == first
    assert lines[-2:] == [
        "data     1,320 rows of up to 64 tokens, 495 updates, 2 rows at once",
        "memory   2.8 GB (weights 2.1, optimizer 0.7) of 7.6 GB free",
    ]


def test_a_plan_says_what_is_frozen_and_what_is_trained(capsys):
    plan = train_model.Plan("cuda", "fp16", "adamw_torch_fused", True, 1, 8, 20, 1_711_376_384, 16, 18_087_936)
    train_model.say_plan(plan, settings_with(base_model="smol"))
    lines = capsys.readouterr().err.splitlines()
    assert lines[:2] == [
        "Memory is short: training with adamw_torch_fused and recomputed activations.",
        "model    smol, 1711M parameters frozen, 18.1M trained in adapters of rank 16, fp16 on cuda",
    ]


@pytest.mark.parametrize(
    ("precision", "rank", "trained", "needed"),
    [
        ("fp16", 0, int(1e9), 28e9),  # two checkpoints of 12 bytes a parameter, and the best weights in 4
        ("fp16", 16, 10_000_000, 4.12e9),  # one checkpoint of the adapters, and two models of 2 bytes a parameter
        ("fp32", 16, 10_000_000, 8.12e9),
    ],
)
def test_the_disk_holds_checkpoints_of_what_is_trained_and_whole_models(precision, rank, trained, needed, tmp_path):
    plan = train_model.Plan("cuda", precision, "adamw_torch_fused", False, 1, 8, 20, int(1e9), rank, trained)
    assert train_model.check_disk(train_model.Places(tmp_path / "model"), plan).startswith(f"{needed / 1e9:.1f} GB of")


def test_what_cannot_fit_stops_before_anything_is_loaded(gpt2_folder, data_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(train_model, "free_memory", lambda device: int(5e8))
    monkeypatch.setattr(train_model, "load_for_training", None)
    with pytest.raises(SystemExit, match="choose a smaller BASE_MODEL or lower CONTEXT_TOKENS"):
        run(gpt2_folder, data_folder, tmp_path / "model")


def test_a_disk_without_room_stops_the_run(gpt2_folder, data_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(
        train_model.shutil, "disk_usage", lambda folder: os.statvfs_result((0,) * 10) and type("", (), {"free": 10})
    )
    with pytest.raises(SystemExit, match="on disk for its checkpoints"):
        run(gpt2_folder, data_folder, tmp_path / "model")


def card(monkeypatch, capability: tuple[int, int], name: str = "NVIDIA GeForce RTX 2080") -> torch.device:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: name)
    return torch.device("cuda")


@pytest.mark.parametrize(
    ("capability", "fastest"),
    [((6, 1), "fp32"), ((7, 0), "fp16"), ((7, 5), "fp16"), ((8, 0), "bf16"), ((8, 9), "bf16"), ((12, 0), "bf16")],
)
def test_a_card_trains_in_what_it_is_made_for(capability, fastest, monkeypatch, capsys):
    device = card(monkeypatch, capability)
    assert train_model.pick_precision(device, "auto") == fastest
    assert [train_model.pick_precision(device, wanted) for wanted in ("fp16", "fp32")] == ["fp16", "fp32"]
    assert not capsys.readouterr().err


def test_an_old_card_that_has_to_emulate_is_told_what_is_faster(monkeypatch, capsys):
    assert train_model.pick_precision(card(monkeypatch, (7, 5)), "bf16") == "bf16"
    assert 'RTX 2080 only emulates bfloat16: PRECISION = "fp16" (or "auto") is faster' in capsys.readouterr().err


def test_a_card_without_kernels_is_named(gpt2_folder, data_folder, tmp_path, monkeypatch):
    def without_kernels(*_, **__):
        raise RuntimeError("CUDA error: no kernel image is available for execution on the device")

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    card(monkeypatch, (6, 1), "NVIDIA GeForce GTX 1080")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "ones", without_kernels)
        sentence = r"has no kernels for NVIDIA GeForce GTX 1080 \(compute capability 6\.1\): install another .*--cpu"
        with pytest.raises(SystemExit, match=sentence):
            run(gpt2_folder, data_folder, tmp_path / "model")
        train_model.check_card(cpu_wanted=True)
    monkeypatch.setattr(torch, "ones", lambda *_, **__: torch.tensor(1.0))
    train_model.check_card(cpu_wanted=False)


def machine(monkeypatch, folder: Path, says: str, status: int = 0) -> None:
    """One whose nvidia-smi says this."""
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/sh\necho '{says}'\nexit {status}\n")
    program.chmod(0o700)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)


def test_a_driver_that_is_too_old_ends_the_run_unless_the_cpu_is_wanted(
    gpt2_folder, data_folder, tmp_path, monkeypatch
):
    def refuse():
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 11040). Please update your GPU")

    machine(monkeypatch, tmp_path, "NVIDIA GeForce RTX 2080, 470.82.01")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "init", refuse)
    with pytest.raises(SystemExit) as error:
        run(gpt2_folder, data_folder, tmp_path / "model")
    assert str(error.value) == (
        f"NVIDIA GeForce RTX 2080 (driver 470.82.01) is there and PyTorch {torch.__version__} cannot use it (The "
        "NVIDIA driver on your system is too old (found version 11040)): CUDA 13.0 needs the driver 580 or newer; "
        "update it (for WSL, in Windows) and restart, or install another PyTorch for it "
        "(https://pytorch.org/get-started/locally), or train without the card, which is slow: --cpu."
    )
    assert run(gpt2_folder, data_folder, tmp_path / "model", "--max-steps", "1", "--cpu")["plan"]["device"] == "cpu"


def test_a_pytorch_without_cuda_beside_a_card_is_one_sentence(tmp_path, monkeypatch):
    machine(monkeypatch, tmp_path, "NVIDIA GeForce RTX 3060, 580.10")
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(SystemExit, match=r"RTX 3060 \(driver 580\.10\) is there and PyTorch .* was built without CUDA"):
        train_model.check_card(cpu_wanted=False)


@pytest.mark.parametrize(("says", "status"), [("No devices were found", 0), ("failed to initialize NVML", 18)])
def test_a_machine_without_a_card_trains_on_its_cpu(says, status, tmp_path, monkeypatch, capsys):
    """Under WSL that may be a card of Intel's, so that it is said and is no error."""
    machine(monkeypatch, tmp_path, says, status)
    train_model.check_card(cpu_wanted=False)
    assert not capsys.readouterr().err
    monkeypatch.setattr(train_model, "CARD_OF_WSL", tmp_path)
    train_model.check_card(cpu_wanted=False)
    assert "WSL sees a graphics card and no NVIDIA driver" in capsys.readouterr().err


def test_a_card_that_its_user_hides_counts_as_none(tmp_path, monkeypatch):
    machine(monkeypatch, tmp_path, "NVIDIA GeForce RTX 3060, 580.10")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    train_model.check_card(cpu_wanted=False)


def test_a_card_has_no_attention_of_cudnn_and_a_limit_at_what_is_free(monkeypatch):
    """8 GB, of which a desktop holds one; and a card that is all but full."""
    said = []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 6))
    monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", lambda wanted: said.append(("cudnn", wanted)))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda share: said.append(("share", share)))
    for free in (int(7e9), int(4e8)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda free=free: (free, int(8e9)))
        train_model.prepare_card(torch.device("cuda"))
    assert said == [("cudnn", False), ("share", pytest.approx(6.7 / 8)), ("cudnn", False), ("share", 0.1)]
    train_model.prepare_card(torch.device("cpu"))
    assert len(said) == 4


@pytest.mark.parametrize(
    ("release", "folder", "warned"),
    [
        ("5.15.153.1-microsoft-standard-WSL2", "/mnt/c/Users/judy/model", True),
        ("5.15.153.1-microsoft-standard-WSL2", "/mnt/c", True),
        ("5.15.153.1-microsoft-standard-WSL2", "/mnt/wsl/model", False),
        ("5.15.153.1-microsoft-standard-WSL2", "/home/judy/model", False),
        ("5.15.153.1-microsoft-standard-WSL2", "/mnt", False),
        ("6.1.0-18-amd64", "/mnt/c/model", False),
    ],
)
def test_a_windows_drive_is_known_by_its_place_under_wsl(release, folder, warned, monkeypatch):
    monkeypatch.setattr(train_model.platform, "release", lambda: release)
    assert train_model.is_on_windows_drive(Path(folder)) == warned


def test_a_model_on_a_windows_drive_is_warned_about_once(gpt2_folder, data_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train_model, "is_on_windows_drive", lambda folder: True)
    run(gpt2_folder, data_folder, tmp_path / "model", "--max-steps", "1")
    assert capsys.readouterr().err.count("is on a Windows drive") == 1


@pytest.mark.parametrize(
    ("fast", "wanted", "picked", "said"),
    [
        (True, "auto", "bf16", ""),
        (True, "bf16", "bf16", ""),
        (True, "fp16", "fp32", "This CPU is slow in fp16; using float32.\n"),
        (True, "fp32", "fp32", ""),
        (False, "auto", "fp32", "This CPU is slow in bf16; using float32.\n"),
        (False, "bf16", "fp32", "This CPU is slow in bf16; using float32.\n"),
        (False, "fp32", "fp32", ""),
    ],
)
def test_a_processor_trains_in_bfloat16_if_it_has_kernels_for_it(fast, wanted, picked, said, monkeypatch, capsys):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": fast})
    assert train_model.pick_precision(torch.device("cpu"), wanted) == picked
    assert capsys.readouterr().err == said


def broken(folder: Path, *, train: str | None = None, val: str | None = None) -> Path:
    good = json.dumps(conversations(1)[0]) + "\n"
    folder.mkdir()
    (folder / "train_data.jsonl").write_text(good * 3 if train is None else train)
    (folder / "val_data.jsonl").write_text(good if val is None else val)
    return folder


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            {"train": '{"messages": [{"role": "assistant", "content": "x"}]}\n{"messages": [\n'},
            "line 2 holds no conversation",
        ),
        ({"train": '{"messages": [{"role": "user", "content": "x"}]}\n'}, "line 1 holds no conversation"),
        (
            {"val": '{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": ""}]}\n'},
            "line 1 holds no conversation",
        ),
        (
            {"val": '{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "\\ud83d"}]}\n'},
            "line 1 holds no conversation",
        ),
        ({"val": '{"messages": [{"role": 3, "content": "x"}]}\n'}, "line 1 holds no conversation"),
        ({"val": ""}, "val_data.jsonl is empty"),
    ],
)
def test_broken_data_is_named(files, message, gpt2_folder, tmp_path):
    with pytest.raises(SystemExit, match=message):
        run(gpt2_folder, broken(tmp_path / "data", **files), tmp_path / "model")


def test_missing_things_are_one_sentence(gpt2_folder, data_folder, tmp_path):
    with pytest.raises(SystemExit, match=r"run extract_blog_data\.py first"):
        run(gpt2_folder, tmp_path / "nowhere", tmp_path / "model")
    with pytest.raises(SystemExit, match="Cannot load gpt2-medium: give a model folder"):
        run(Path("gpt2-medium"), data_folder, tmp_path / "model")
    with pytest.raises(SystemExit, match="unrecognized arguments: --lr"):
        train_model.main(["--lr", "1"])


def without_a_network(*_, **__):
    raise OSError(-2, "Name or service not known")


def test_without_the_hub_a_run_ends_at_once(data_folder, tmp_path, monkeypatch, capsys):
    """huggingface_hub waits between its attempts, and would ask again for each file."""
    waits = []
    monkeypatch.setattr(train_model.hub, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(train_model.hub, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(train_model.urllib.request, "getproxies", dict)
    monkeypatch.setattr(train_model.socket, "create_connection", without_a_network)
    monkeypatch.setattr(train_model.time, "sleep", waits.append)
    with pytest.raises(SystemExit, match="Cannot load gpt2-medium: give a model folder with --base-model, or connect"):
        run(Path("gpt2-medium"), data_folder, tmp_path / "model")
    assert "https://huggingface.co cannot be reached (Name or service not known)" in capsys.readouterr().err
    assert not waits


@pytest.mark.parametrize("case", ["a folder", "behind a proxy", "told to be offline", "a hub within reach"])
def test_the_hub_is_only_looked_for_when_it_is_needed(case, gpt2_folder, monkeypatch, capsys):
    name = str(gpt2_folder) if case == "a folder" else "gpt2-medium"
    proxies = {"https": "http://proxy:3128"} if case == "behind a proxy" else {}
    connect = without_a_network
    if case == "a hub within reach":
        connect = lambda place, timeout: io.StringIO() if place == ("huggingface.co", 443) else None  # noqa: E731
    monkeypatch.setattr(train_model.hub, "HF_HUB_OFFLINE", case == "told to be offline")
    monkeypatch.setattr(train_model.urllib.request, "getproxies", lambda: proxies)
    monkeypatch.setattr(train_model.socket, "create_connection", connect)
    train_model.check_hub(name)
    assert train_model.hub.is_offline_mode() == (case == "told to be offline")
    assert not capsys.readouterr().err


def test_a_loss_that_is_not_a_number_stops_the_run(gpt2_folder, data_folder, tmp_path):
    model_folder(tmp_path / "model", "old")
    with pytest.raises(SystemExit, match="set a LEARNING_RATE below 1e"):
        run(gpt2_folder, data_folder, tmp_path / "model", "--epochs", "3", "--learning-rate", "1e30")
    assert (tmp_path / "model" / "config.json").read_text() == "old"


class Logged:
    """What Trainer hands to a callback's on_log, of an update with the given entry in the log."""

    def __init__(self, precision: str, **entry):
        self.args = argparse.Namespace(fp16=precision == "fp16", learning_rate=0.1)
        self.state = argparse.Namespace(global_step=3, log_history=[entry])

    def to(self, callback) -> dict:
        entry = self.state.log_history[-1]
        callback.on_log(self.args, self.state, None, logs=dict(entry))
        return entry


@pytest.mark.parametrize("key", ["loss", "eval_loss"])
def test_a_loss_that_is_not_a_number_in_float16_names_other_precisions(key):
    with pytest.raises(SystemExit, match='set PRECISION = "bf16" or "fp32", or a LEARNING_RATE below 0.1'):
        Logged("fp16", **{key: math.nan}).to(train_model.StopAtNaN("fp16"))
    with pytest.raises(SystemExit, match="at update 3: set a LEARNING_RATE below 0.1 and start"):
        Logged("bf16", **{key: math.inf}).to(train_model.StopAtNaN("bf16"))
    Logged("fp16", **{key: 3.0}).to(train_model.StopAtNaN("fp16"))


def test_an_update_that_float16_skipped_is_said_and_leaves_no_infinity_in_the_log(capsys):
    for norm in (math.inf, math.nan):
        entry = Logged("fp16", loss=3.0, grad_norm=norm).to(train_model.SaySkipped())
        assert entry == {"loss": 3.0, "grad_norm": None, "skipped": True}
        assert "Update 3 was skipped: float16 overflowed" in capsys.readouterr().err
    assert Logged("fp16", loss=3.0, grad_norm=1.5).to(train_model.SaySkipped()) == {"loss": 3.0, "grad_norm": 1.5}
    assert Logged("bf16", loss=3.0, grad_norm=math.inf).to(train_model.SaySkipped())["grad_norm"] is None
    assert not capsys.readouterr().err


def test_gradients_that_overflow_leave_checkpoints_and_report_readable(gpt2_folder, data_folder, tmp_path, monkeypatch):
    """The norm of one update is infinite: neither the state of a checkpoint nor the report may hold Infinity."""
    norm = train_model.BlogTrainer._get_grad_norm
    endless = lambda self, *_, **__: math.inf if self.state.global_step == 1 else norm(self, *_, **__)  # noqa: E731
    monkeypatch.setattr(train_model.BlogTrainer, "_get_grad_norm", endless)
    written = []
    flush = train_model.flush_to_disk

    def reading(folder):
        written.extend(path.read_text() for path in folder.glob("*.json"))
        flush(folder)

    monkeypatch.setattr(train_model, "flush_to_disk", reading)
    run(gpt2_folder, data_folder, tmp_path / "model", "--max-steps", "3")
    assert sum('"grad_norm": null' in text for text in written) > 1
    assert not [text for text in written if "Infinity" in text or "NaN" in text]


def test_json_gets_no_number_that_it_cannot_hold():
    assert train_model.finite({"a": [1.5, math.nan, {"b": -math.inf}], "c": "NaN", "d": 2}) == {
        "a": [1.5, None, {"b": None}],
        "c": "NaN",
        "d": 2,
    }


@pytest.mark.parametrize("flag", ["--learning-rate=nan", "--learning-rate=inf", "--epochs=inf", "--max-steps=-1"])
def test_numbers_out_of_range_are_one_sentence(flag):
    with pytest.raises(
        SystemExit, match=rf"^train_model.py: argument {flag.split('=')[0]}: '.*' must be .*a (whole )?number"
    ):
        train_model.main([flag])


def test_a_word_that_is_no_rate_is_one_sentence():
    with pytest.raises(SystemExit, match="'high' must be \"auto\" or a number above 0"):
        train_model.main(["--learning-rate", "high"])


def test_a_full_disk_leaves_the_old_model(gpt2_folder, data_folder, tmp_path):
    model_folder(tmp_path / "model", "old")
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))  # noqa: E731
    process = start(*flags(gpt2_folder, data_folder, tmp_path / "model"), preexec_fn=limit)
    _, errors = process.communicate()
    assert process.returncode == 1 and "Traceback" not in errors
    assert errors.splitlines()[-1].startswith("Cannot write")
    assert (tmp_path / "model" / "config.json").read_text() == "old"


def test_an_output_folder_that_cannot_be_made_is_one_sentence(gpt2_folder, data_folder, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match=r"^(--output-dir|Cannot read or write) .*file"):
        run(gpt2_folder, data_folder, tmp_path / "file" / "model")


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory"),
    ],
    ids=["of the card", "of cuBLAS", "of the computer"],
)
def test_out_of_memory_names_the_settings(error, gpt2_folder, data_folder, tmp_path, monkeypatch):
    def starved(*_, **__):
        raise error

    monkeypatch.setattr(train_model, "scored_logits", starved)
    with pytest.raises(SystemExit, match="run the same command again, which makes a new plan"):
        run(gpt2_folder, data_folder, tmp_path / "model")


def test_a_saved_model_that_differs_is_not_put_in_place(gpt2_folder, data_folder, tmp_path, monkeypatch):
    original = train_model.KeepBest.save

    def spoil(self, model, folder):
        original(self, model, folder)
        model = AutoModelForCausalLM.from_pretrained(folder / "best")
        model.lm_head.weight.data += 0.1 * torch.randn_like(model.lm_head.weight)
        model.save_pretrained(folder / "best")

    monkeypatch.setattr(train_model.KeepBest, "save", spoil)
    with pytest.raises(SystemExit, match="was not put in place"):
        run(gpt2_folder, data_folder, tmp_path / "model", "--max-steps", "2")
    assert not (tmp_path / "model").exists()


def test_versions_named_in_the_requirements_are_those_installed():
    assert transformers.__version__.startswith("5.23.") and np.__version__.startswith("2.4.")


@pytest.mark.parametrize(
    ("losses", "advice"),
    [
        ([3.0, 2.8, 2.7], "still learning"),
        ([3.0, 2.8, 2.795], "hardly changed"),
        ([3.0, 2.8, 2.7, 2.75], "best after epoch 2.0"),
        ([3.0, 2.8], "Only one evaluation"),
        ([3.0, 3.1, 3.2], ""),
    ],
)
def test_the_verdict_says_whether_more_epochs_would_help(losses, advice):
    base, *later = ({"eval_loss": loss, "epoch": float(epoch)} for epoch, loss in enumerate(losses))
    said = train_model.tell_epochs(base, later)
    assert advice in said
    assert bool(said) == bool(advice)


def test_a_drive_that_cannot_flush_folders_is_no_error_and_one_that_cannot_flush_files_is(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")

    def refuse(kind):
        def fsync(handle):
            if stat.S_IFMT(os.fstat(handle).st_mode) == kind:
                raise OSError(errno.EINVAL, "Invalid argument")

        return fsync

    monkeypatch.setattr(os, "fsync", refuse(stat.S_IFDIR))
    train_model.flush_to_disk(tmp_path)
    monkeypatch.setattr(os, "fsync", refuse(stat.S_IFREG))
    with pytest.raises(OSError):
        train_model.flush_to_disk(tmp_path)
