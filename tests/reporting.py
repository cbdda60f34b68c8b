"""Tuned models and reports for tests: a tiny model as train_model.py leaves it, one that is overfitted, one report."""

import dataclasses
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from tiny import conversations, make_model_folder, write_jsonl
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import test_model
import train_model
import voice.evidence
import voice.loading
import voice.report
from voice.settings import Settings

SCRIPT = Path(test_model.__file__)
torch.set_num_threads(1)  # models this small only wait for each other's threads
SECRETS = ["wren@example.org", "+1 555 867 5309"]


def tuned(folder: Path, **generation) -> Path:
    """Makes of a bare model folder one as train_model.py leaves it."""
    train_model.load_tokenizer(str(folder)).save_pretrained(folder)
    settings = {"do_sample": True, "temperature": 0.8, "top_p": 0.95, "max_new_tokens": 12} | generation
    GenerationConfig(**settings, eos_token_id=AutoTokenizer.from_pretrained(folder).eos_token_id).save_pretrained(
        folder
    )
    return folder


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory) -> Path:
    """GPT-2's shape: positions learned, and only 128 of them."""
    folder = tmp_path_factory.mktemp("tuned")
    return tuned(make_model_folder(folder, "gpt2", chatml=False, max_position_embeddings=128))


@pytest.fixture(scope="session")
def loaded(model_folder):
    return voice.loading.load_tuned(model_folder)


@pytest.fixture
def small_report(monkeypatch):
    monkeypatch.setattr(test_model, "PRECISION", "fp32")
    monkeypatch.setattr(test_model, "REPORT_SIZE", 0.05)


def settings_with(folder: Path = Path("none"), **values) -> Settings:
    """Settings as they come, but for `values`, for a model in `folder`."""
    settings, _ = test_model.parse_arguments(["--model-dir", str(folder)])
    return dataclasses.replace(settings, **values)


def run(model: Path, data: Path, *flags: str) -> int:
    return test_model.main(["--model-dir", str(model), "--data-dir", str(data), *flags])


def sampling(**settings) -> GenerationConfig:
    usual = {"do_sample": True, "temperature": 1.0, "top_k": 50, "top_p": 1.0, "repetition_penalty": 1.0}
    return GenerationConfig(**{**usual, "max_new_tokens": 12, "eos_token_id": [0], **settings})


# ---------------------------------------------------------------------------- where words come from


@pytest.fixture
def prompts(loaded, monkeypatch) -> list[str]:
    """What the model is given, as text; it answers "one", "two" and so on."""
    _, tokenizer = loaded
    given, words = [], iter(["one", "two", "three", "four", "five"])

    def stream(model, tokenizer, rows, *_):
        given.append(tokenizer.decode(rows[0]))
        yield next(words), None

    monkeypatch.setattr(test_model, "stream", stream)
    return given


# ---------------------------------------------------------------------------- quiz
@pytest.fixture
def quiz_data(tmp_path) -> Path:
    def post(number: int, text: str) -> dict:
        entry = conversations(1, seed=number)[0]
        return entry | {"messages": [entry["messages"][0], {"role": "assistant", "content": text}]}

    write_jsonl(tmp_path / "train_data.jsonl", [post(0, "a trained post that nobody may see here at all, " * 5)])
    own = [
        post(number, f"an unseen post of mine, number {number}, about " + "bread and kettles " * 30)
        for number in range(8)
    ]
    write_jsonl(tmp_path / "val_data.jsonl", [*own, post(9, "short")])
    return tmp_path


# ---------------------------------------------------------------------------- leaks
def private_post(number: int, secret: str) -> dict:
    start = conversations(1, seed=number, words=3)[0]
    words = f"{number} the gull says nothing to me at night and the kettle sings bread " * 4
    text = f"{words}. Write to {secret}. And the night is nothing to the gull, " * 2
    turns = [
        start["messages"][0] | {"content": f"Write a post about {number}."},
        {"role": "assistant", "content": text},
    ]
    return start | {"messages": turns, "visibility": "private" if number < 2 else "public", "title": f"secret {number}"}


@pytest.fixture(scope="session")
def overfitted(tmp_path_factory) -> tuple[Path, Path, list[dict]]:
    """(tuned, base, posts): a model that knows its posts by heart, and the same model untrained."""
    sizes = {"intermediate_size": 128, "num_key_value_heads": 2, "hidden_size": 64, "max_position_embeddings": 512}
    base = tuned(make_model_folder(tmp_path_factory.mktemp("base"), "llama", True, **sizes), temperature=0.05)
    folder = Path(shutil.copytree(base, tmp_path_factory.mktemp("overfitted") / "model"))
    posts = [private_post(number, secret) for number, secret in enumerate([*SECRETS, "nobody"])]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    rows = train_model.make_rows(
        [train_model.conversation_tokens(tokenizer, post["messages"]) for post in posts], 512, 0, False
    )
    for _ in range(120):
        for row in rows:
            ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
            model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    (folder / "training_report.json").write_text(json.dumps({"settings": {"base_model": str(base)}}))
    return folder, base, posts


def know(data: Path, posts: list[dict]) -> None:
    """Data whose held-out posts are those of training, so that the report asks for what the model knows."""
    write_jsonl(data / "train_data.jsonl", posts)
    write_jsonl(data / "val_data.jsonl", posts)


def report(model: Path, data: Path, *flags: str) -> dict:
    assert run(model, data, "--report", *flags) == 0
    return json.loads((model / "voice_report.json").read_text())


@pytest.fixture
def everything(monkeypatch):
    monkeypatch.setattr(test_model, "REPORT_SIZE", 0.1)


def crafted_report(**numbers) -> voice.report.Report:
    """A report of these numbers, by key of their question; the others are not measured."""
    report = voice.report.Report("model", "base", 42, 1.0)
    for question in voice.report.QUESTIONS:

        def measure(_, key=question.key):
            if key not in numbers:
                raise voice.evidence.NotMeasured("it is not asked here")
            return numbers[key]

        report.add(question._replace(measure=measure), voice.evidence.Evidence())
    return report


# ---------------------------------------------------------------------------- odd JSON
NO_OBJECTS = ["", "{", "[]", "3", "null", "NaN", '"text"', "[" * 100_000, '{"a": ' * 100_000]


def start(*command: str, until: str) -> subprocess.Popen:
    """A process, as soon as a line of its stderr matches `until`."""
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    process = subprocess.Popen(command, **pipes, text=True)
    for line in process.stderr:
        if re.search(until, line):
            break
    return process
