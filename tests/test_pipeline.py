"""The three scripts one after the other on the sample blogs, as a user runs them."""

import itertools
import json
import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import pytest

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


def test_every_conversation_is_learned_from_in_its_own_split(trained):
    data, model = trained
    learned = json.loads((model / "training_report.json").read_text(encoding="utf-8"))
    lines = {split: len((data / f"{split}_data.jsonl").read_text("utf-8").splitlines()) for split in ("train", "val")}
    assert {split: learned["data"][split]["conversations"] for split in lines} == lines
    assert all(learned["data"][split]["private"] == 20 * (split == "train") for split in lines)


def test_the_model_chats_through_a_pipe_until_a_signal_that_is_not_ignored(trained):
    """As nohup starts a program, for a terminal that will be closed; the libraries say nothing of their own."""
    data, model = trained
    chat = ["test_model.py", "--model-dir", str(model), "--data-dir", str(data), "--chat", "--seed", "1"]
    command = ["bash", "-c", "trap '' HUP; exec \"$@\"", "nohup", sys.executable, *chat]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen(command, **pipes, text=True, cwd=ROOT) as process:
        lines = iter(process.stderr.readline, "")
        before = list(itertools.takewhile(lambda line: not line.startswith("/post TITLE"), lines))
        process.send_signal(signal.SIGHUP)
        print("hello", file=process.stdin, flush=True)
        answer = process.stdout.readline()
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGTERM)
        *_, last = process.stderr.read().splitlines()
    assert process.returncode == 1
    assert last == "Stopped."
    assert not [line for line in before if "This CPU is slow in bf16" not in line]
    assert answer.strip() and "> " not in answer


def test_private_folders_are_ignored_by_git():
    command = ["git", "check-ignore", "data", "blog-model-final", "blog-model-final-unfinished"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout.split() == command[2:], "run from a git clone"


def test_starting_the_extractor_loads_no_training_library():
    code = "import sys, extract_blog_data; print(*sorted({'torch', 'transformers'} & set(sys.modules)))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.strip() == ""


@pytest.mark.parametrize("name", ["extract_blog_data.py", "train_model.py", "test_model.py"])
def test_importing_a_script_changes_no_environment_variable(name):
    before = dict(os.environ)
    runpy.run_path(str(ROOT / name))
    assert dict(os.environ) == before
