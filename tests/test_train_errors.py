"""train_model.py: bad input, a missing network, a full disk, a loss that is no number: one sentence each."""

import argparse
import errno
import io
import math
import os
import resource
import shutil
import stat
from pathlib import Path

import pytest
import torch
from training import model_folder, run
from transformers import AutoModelForCausalLM

import train_model

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("small_training")]


ONE_POST = '{"messages": [{"role": "assistant", "content": "x"}]}\n'


@pytest.mark.parametrize(
    ("split", "text", "message"),
    [
        ("train", ONE_POST + '{"messages": [\n', "line 2 holds no conversation"),
        ("val", "", "val_data.jsonl is empty"),
    ],
)
def test_broken_data_is_named(split, text, message, gpt2_folder, data_folder, tmp_path):
    data = shutil.copytree(data_folder, tmp_path / "data")
    (data / f"{split}_data.jsonl").write_text(text)
    with pytest.raises(SystemExit, match=message):
        run(gpt2_folder, data, tmp_path / "model")


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
        Logged("fp16", **{key: math.nan}).to(train_model.StopAtNaN())
    with pytest.raises(SystemExit, match="at update 3: set a LEARNING_RATE below 0.1 and start"):
        Logged("bf16", **{key: math.inf}).to(train_model.StopAtNaN())
    Logged("fp16", **{key: 3.0}).to(train_model.StopAtNaN())


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


@pytest.mark.parametrize(
    "flag", ["--learning-rate=nan", "--learning-rate=high", "--learning-rate=inf", "--epochs=inf", "--max-steps=-1"]
)
def test_numbers_out_of_range_are_one_sentence(flag):
    name, value = flag.split("=")
    with pytest.raises(
        SystemExit, match=rf"^train_model.py: argument {name}: '{value}' must be (\"auto\" or )?a (whole )?number"
    ):
        train_model.main([flag])


def test_a_full_disk_leaves_the_old_model(gpt2_folder, data_folder, tmp_path):
    model_folder(tmp_path / "model", "old")
    usual = resource.getrlimit(resource.RLIMIT_FSIZE)
    _, hard = usual
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        with pytest.raises(SystemExit, match="^Cannot write"):
            run(gpt2_folder, data_folder, tmp_path / "model", "--max-steps", "9")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, usual)
    assert (tmp_path / "model" / "config.json").read_text() == "old"


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory"),
    ],
    ids=["of the card", "of cuBLAS", "at the start of cuBLAS", "of the computer"],
)
def test_out_of_memory_names_the_settings(error, monkeypatch):
    def starved(settings):
        raise error

    monkeypatch.setattr(train_model, "train", starved)
    with pytest.raises(SystemExit, match="run the same command again, which makes a new plan and continues"):
        train_model.main([])


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
