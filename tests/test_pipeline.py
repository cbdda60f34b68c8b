"""The three scripts one after the other on the sample blogs, as a user runs them."""

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

import extract_blog_data
import test_model
import train_model

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent
BLOGS = ["--public", "sample/public-blog", "--private", "sample/private-blog", "--author", "wrenlow"]


def script(name: str, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(ROOT / name), *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory, gpt2_folder) -> tuple[Path, Path]:
    """The data and the model folder of a short run as three processes."""
    folder = tmp_path_factory.mktemp("pipeline")
    data, model = folder / "data", folder / "model"
    for name, *arguments in (
        ("extract_blog_data.py", *BLOGS, "--data-dir", str(data)),
        ("train_model.py", "--base-model", str(gpt2_folder), "--data-dir", str(data), "--output-dir", str(model),
         "--max-steps", "2"),
    ):  # fmt: skip
        done = script(name, *arguments)
        assert done.returncode == 0, done.stderr
    return data, model


def test_every_file_and_every_word_is_accounted_for(trained):
    data, model = trained
    extracted = json.loads((data / "extraction_report.json").read_text(encoding="utf-8"))
    learned = json.loads((model / "training_report.json").read_text(encoding="utf-8"))
    assert extracted["files_found"] == extracted["files_kept"] + sum(extracted["files_skipped"].values())
    lines = {split: len((data / f"{split}_data.jsonl").read_text("utf-8").splitlines()) for split in ("train", "val")}
    assert {split: learned["data"][split]["conversations"] for split in lines} == lines
    assert all(learned["data"][split]["private"] == 20 * (split == "train") for split in lines)


def test_the_data_is_the_owners_alone(trained):
    data, _ = trained
    assert stat.S_IMODE(data.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in data.iterdir()} == {0o600}


def test_no_private_address_or_number_reaches_the_data(trained):
    data, _ = trained
    text = "".join((data / f"{split}_data.jsonl").read_text(encoding="utf-8") for split in ("train", "val"))
    assert "@example" not in text and "555-01" not in text
    assert "[email]" in text and "[phone]" in text and "[secret]" in text


def test_the_model_answers(trained):
    data, model = trained
    folders = ["--model-dir", str(model), "--data-dir", str(data)]
    done = script("test_model.py", *folders, "--prompt", "Tell me about soup.", "--seed", "1", "--max-new-tokens", "20")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


@pytest.mark.parametrize(
    ("module", "arguments", "sentence"),
    [
        (extract_blog_data, ["--public", "nowhere"], "make demo"),
        (train_model, ["--data-dir", "nowhere"], "run extract_blog_data.py first"),
        (test_model, ["--model-dir", "nowhere"], "train_model.py"),
    ],
)
def test_what_is_missing_is_one_sentence_with_the_next_step(module, arguments, sentence, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    try:
        status, said = module.main(arguments), ""
    except SystemExit as stopped:
        status, said = 1, stopped.code
    said += capsys.readouterr().err
    assert status == 1 and sentence in said and said.count("\n") <= 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["extract_blog_data.py", "train_model.py", "test_model.py"])
def test_an_unknown_flag_is_one_sentence(name):
    done = script(name, "--no-such-flag")
    assert done.returncode == 1 and done.stdout == ""
    assert "--no-such-flag" in done.stderr and "Traceback" not in done.stderr and done.stderr.count("\n") == 1


def test_private_folders_are_ignored_by_git():
    command = ["git", "check-ignore", "data", "blog-model-final", "blog-model-final-unfinished"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout.split() == command[2:], "run from a git clone"


def test_starting_the_extractor_loads_no_training_library():
    code = "import sys, extract_blog_data; print(*sorted({'torch', 'transformers'} & set(sys.modules)))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.strip() == ""
