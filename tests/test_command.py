"""test_model.py as a command: errors, settings, device and precision, streams and signals."""

import io
import json
import math
import os
import re
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from reporting import SCRIPT, report, run, settings_with, start
from transformers import AutoModelForCausalLM

import test_model
import train_model
import voice.loading
from voice.settings import ROWS

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("small_report")]


def broken(kind: str, model_folder: Path, place: Path) -> Path:
    folder = Path(shutil.copytree(model_folder, place / "model"))
    if kind == "no model":
        shutil.rmtree(folder)
    if kind == "no weights":
        (folder / "model.safetensors").unlink()
    if kind == "cut weights":
        (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:5000])
    if kind == "pickled weights":
        weights = AutoModelForCausalLM.from_pretrained(folder).state_dict()
        torch.save(weights, folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
    if kind == "no template":
        (folder / "chat_template.jinja").unlink()
    if kind == "no tokenizer":
        for path in folder.glob("tokenizer*"):
            path.unlink()
    return folder


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        ("no model", "There is no model in .*: run train_model.py first"),
        ("no weights", "is incomplete .*: run train_model.py again"),
        ("cut weights", "is incomplete .*: run train_model.py again"),
        ("pickled weights", "is incomplete .*: run train_model.py again"),
        ("no tokenizer", "is incomplete .*: run train_model.py again"),
        ("no template", "has no chat template.: run train_model.py again"),
    ],
)
def test_a_model_that_cannot_be_used_is_one_sentence(kind, sentence, model_folder, tmp_path):
    with pytest.raises(SystemExit) as stop:
        run(broken(kind, model_folder, tmp_path), tmp_path)
    assert re.search(sentence, stop.value.code) and "\n" not in stop.value.code


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--prompt", " "], "argument --prompt: ' ' must be a sentence"),
        (["--prompt", "kettle " * 300], r"The prompt has \d+ tokens and the model has 128"),
        (["--nonsense"], "unrecognized arguments: --nonsense"),
        (["--rep"], "unrecognized arguments: --rep"),
        (["--chat", "--report"], "not allowed with"),
        (["--prompt", "caf\udce9"], "must be a sentence in quotation marks, in UTF-8"),  # as a shell hands over Latin-1
        (["--max-new-tokens", "0"], "argument --max-new-tokens: '0' must be None or a whole number from 1 to"),
        (["--max-new-tokens", "9" * 5_000], "must be None or a whole number from 1 to 1,000,000"),
        (["--seed", "1e30"], "argument --seed: '1e30' must be None or a whole number from 0 to 4,294,967,295"),
        (["--seed", "-1"], "must be None or a whole number from 0"),
        (["--seed", str(2**32)], "must be None or a whole number from 0"),
        (["--seed", "nan"], "must be None or a whole number from 0"),
    ],
)
def test_a_wrong_command_is_one_sentence(flags, sentence, model_folder, data_folder):
    with pytest.raises(SystemExit) as stop:
        run(model_folder, data_folder, *flags)
    assert re.search(sentence, stop.value.code) and "\n" not in stop.value.code


def test_without_data_samples_still_come_and_it_is_said(model_folder, tmp_path, capsys):
    assert run(model_folder, tmp_path, "--prompt", "hi") == 0
    out, err = capsys.readouterr()
    assert "> hi" in out and "longest run" not in out and "No training data" in err


# ---------------------------------------------------------------------------- settings, checked
@pytest.mark.parametrize(
    ("name", "wrong", "form"),
    [
        ("MODEL_DIR", [3, None, ["a"], "", b"model"], "must be the name of a folder"),
        ("DATA_DIR", [3, None, ["a"], " "], "must be the name of a folder"),
        ("PROMPTS", ["hi", [], [""], ["hi", 3], [" "], None, {"hi"}, ["\udce9"]], "must be "),
        ("MAX_NEW_TOKENS", [0, -1, 1.5, "200", True, 10**9], "must be None or a whole number from 1 to 1,000,000"),
        ("TEMPERATURE", [-0.1, math.nan, math.inf, "hot", True, [1], 101], "must be None or a number from 0 to 100"),
        ("TOP_P", [0, -1, 1.01, 2, math.nan, "0.9"], "must be None or a number above 0 and up to 1"),
        ("TOP_K", [-5, 1.5, "50", math.nan], "must be None or a whole number from 0 "),
        ("REPETITION_PENALTY", [0, -1, math.inf, math.nan, "1.1"], "must be None or a number from 0.1 to 10"),
        ("SEED", [-1, 2**32, 1e30, "42"], "must be None or a whole number from 0 to 4,294,967,295"),
        ("PRECISION", ["bfloat16", 16, ""], 'must be None or "auto", "bf16", "fp16" or "fp32"'),
        ("REPORT_SIZE", [0, -1, math.nan, "1", None, 1e9], "must be a number above 0 and up to 100"),
        ("BASE_MODEL", [None, 3, ["base"]], "must be a text"),
        ("NOT_STRANGERS", ["kevquirk", [3], None], "must be a"),
        ("OTHER_BLOGS", ["../other/data", [""], [None], None], "must be "),
    ],
)
def test_a_setting_of_the_wrong_kind_or_range_is_one_sentence_with_the_right_form(name, wrong, form, monkeypatch):
    for value in wrong:
        monkeypatch.setattr(test_model, name, value)
        with pytest.raises(SystemExit) as stop:
            test_model.main([])
        assert f"{name} in test_model.py " in stop.value.code and "\n" not in stop.value.code
        assert form in stop.value.code


def test_every_setting_is_checked_and_the_ones_that_come_along_are_right():
    block = SCRIPT.read_text(encoding="utf-8").partition("-- settings\n")[2].partition("-- command line\n")[0]
    assert list(ROWS) == re.findall(r"^([A-Z_]+) = ", block, re.M)
    test_model.parse_arguments([])


# ---------------------------------------------------------------------------- weights, device, precision
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_no_numbers_are_one_sentence_and_no_base_model(
    value, model_folder, data_folder, tmp_path, capsys
):
    folder = Path(shutil.copytree(model_folder, tmp_path / "model"))
    base = Path(shutil.copytree(model_folder, tmp_path / "base"))
    model = AutoModelForCausalLM.from_pretrained(base)
    model.get_input_embeddings().weight.data[7, 7] = value
    model.save_pretrained(base)
    with pytest.raises(SystemExit, match="holds NaN or infinite weights in .*: run train_model.py again"):
        run(base, data_folder, "--prompt", "hi")
    (folder / "training_report.json").write_text(json.dumps({"settings": {"base_model": str(base)}}))
    assert report(folder, data_folder)["learned"]["held_out"] is None
    assert "holds NaN or infinite weights in " in capsys.readouterr().err


@pytest.mark.parametrize("is_wanted", [False, True])
def test_the_device_is_chosen_once_by_the_flag(is_wanted, model_folder, tmp_path, monkeypatch):
    """On a machine with a card; the run itself is left out."""
    given = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(train_model, "check_card", lambda cpu_wanted: given.append(cpu_wanted))
    monkeypatch.setattr(train_model, "prepare_card", lambda device: given.append(device.type))
    monkeypatch.setattr(test_model, "run", lambda settings, args, device: given.append(device.type))
    run(model_folder, tmp_path, *["--cpu"] * is_wanted)
    device = "cpu" if is_wanted else "cuda"
    assert given == [is_wanted, device, device]


def test_it_writes_in_the_precision_of_the_setting_then_of_the_folder(tmp_path):
    assert voice.loading.wanted_precision(settings_with(tmp_path, precision=None)) == "auto"
    (tmp_path / "training_report.json").write_text(json.dumps({"plan": {"precision": "bf16"}}))
    assert voice.loading.wanted_precision(settings_with(tmp_path, precision=None)) == "bf16"
    assert voice.loading.wanted_precision(settings_with(tmp_path, precision="fp32")) == "fp32"


# ---------------------------------------------------------------------------- streams and signals
@pytest.mark.parametrize("stdin", [None, "closed", "ends", "write only"])
def test_a_stdin_that_gives_nothing_is_the_end_of_the_input(stdin, model_folder, tmp_path, monkeypatch, capsys):
    streams = {"closed": io.StringIO(), "ends": io.StringIO(), "write only": (tmp_path / "file").open("w")}
    streams["closed"].close()
    monkeypatch.setattr(sys, "stdin", streams.get(stdin))
    assert run(model_folder, tmp_path, "--chat") == 0
    assert run(model_folder, tmp_path, "--quiz") == 0
    assert "Nothing to ask" in capsys.readouterr().out


def test_a_folder_that_cannot_be_looked_into_is_one_sentence(model_folder, tmp_path):
    with pytest.raises(SystemExit, match="^Cannot use .*: File name too long; solve that and run it again.$"):
        run(model_folder, tmp_path / ("a" * 300), "--prompt", "hi")


NOWHERE = "Cannot print on stdout{}: send it elsewhere and run it again."


def full() -> io.TextIOWrapper:
    return Path("/dev/full").open("w", encoding="utf-8")


def pipe_that_nobody_reads() -> io.TextIOWrapper:
    out, into = os.pipe()
    os.close(out)
    return os.fdopen(into, "w")


def closed() -> None:
    """What Python has for a stream that is closed when it begins."""


@pytest.mark.parametrize(
    ("stdout", "is_heard", "code"),
    [
        (full, True, NOWHERE.format(" (No space left on device)")),
        (closed, True, NOWHERE.format(", which is closed")),
        (closed, False, NOWHERE.format(", which is closed")),  # nothing is open
        (pipe_that_nobody_reads, True, 1),  # as of `| head`, who has read enough
    ],
)
def test_a_stdout_that_takes_nothing_ends_in_a_sentence(stdout, is_heard, code, model_folder, monkeypatch):
    command = ["test_model.py", "--model-dir", str(model_folder), "--data-dir", "none", "--prompt", "hi"]
    monkeypatch.setattr(sys, "argv", command)
    monkeypatch.setattr(sys, "stderr", sys.stderr if is_heard else None)  # so that it comes back
    monkeypatch.setattr(sys, "stdin", None)
    monkeypatch.setattr(sys, "stdout", stdout())
    with pytest.raises(SystemExit) as stop:
        test_model.as_command()
    assert stop.value.code == code
    if sys.stdout is not None:
        sys.stdout.close()  # nothing is left in it that would fail once more


@pytest.mark.parametrize("mode", ["--chat", "--quiz"])
def test_bytes_that_are_no_text_are_replaced_in_what_is_typed(mode, model_folder, quiz_data, monkeypatch, capsys):
    typed = io.BytesIO(b"caf\xe9\n/begin \xff\n1\n/post \xc3\n")
    folders = ["--model-dir", str(model_folder), "--data-dir", str(quiz_data)]
    monkeypatch.setattr(sys, "argv", ["test_model.py", *folders, mode, "--max-new-tokens", "60"])
    monkeypatch.setattr(sys, "stderr", sys.stderr)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(typed, encoding="utf-8"))
    with pytest.raises(SystemExit) as stop:
        test_model.as_command()
    assert stop.value.code == 0 and capsys.readouterr().out


@pytest.mark.parametrize(
    ("script", "number", "library", "sentence"),
    [
        (SCRIPT, "INT", "numpy", "Stopped."),
        (SCRIPT, "TERM", "torch", "Stopped."),
        (train_model.__file__, "TERM", "yaml", "Stopped before anything was begun."),
        (train_model.__file__, "HUP", "numpy", "Stopped before anything was begun."),
    ],
)
def test_signals_while_libraries_load_are_one_sentence_and_status_1(script, number, library, sentence):
    command = (sys.executable, "-X", "importtime", str(script))
    with start(*command, until=f"import time: .* {library}$") as process:
        for _ in range(20):
            process.send_signal(signal.Signals[f"SIG{number}"])
        rest = process.stderr.read()
    assert process.returncode == 1
    said = [line for line in rest.splitlines() if line and not line.startswith("import time:")]
    assert said == [sentence]
