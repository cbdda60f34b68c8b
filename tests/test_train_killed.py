"""train_model.py: killed and stopped runs, damaged checkpoints, and what makes two runs the same."""

import json
import multiprocessing
import os
import re
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import conversations, write_jsonl
from training import (
    cut_in_half,
    flags,
    losses,
    make_checkpoint,
    make_noise,
    nine_updates,
    run,
    stopped_and_continued,
    stopped_run,
    train_this_way,
)

import train_model

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("small_training")]


def train_until_killed(arguments: list[str]) -> None:
    def die(callback, args, state, control, **_):
        if state.global_step == 5:
            os.kill(os.getpid(), signal.SIGKILL)

    train_model.Progress.on_log = die
    train_model.main(arguments)


def test_a_killed_run_continues_and_ends_as_if_nothing_had_happened(gpt2_folder, data_folder, tmp_path, capsys):
    arguments = flags(gpt2_folder, data_folder, tmp_path / "killed")
    # Only another process can be killed.
    victim = multiprocessing.get_context("fork").Process(target=train_until_killed, args=[arguments])
    victim.start()
    victim.join()
    assert victim.exitcode == -signal.SIGKILL
    assert not (tmp_path / "killed").exists()
    continued = run(gpt2_folder, data_folder, tmp_path / "killed", "--max-steps", "9")
    assert "Continuing the run that stopped after update" in capsys.readouterr().err
    assert losses(continued) == losses(nine_updates(gpt2_folder, data_folder))


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
    continued = stopped_and_continued(gpt2_folder, data_folder, tmp_path / "stopped", *more)
    assert losses(continued) == losses(whole)
    # The MLP's weights are large enough to have theirs in one byte each.
    assert {torch.uint8, torch.float32} <= set(loaded)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, but for the lock."""
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock"}


OTHERWISE = (
    "had MAX_STEPS = 9 (now 8), LEARNING_RATE = 0.0001 (now 0.001), LORA_RANK = 0 (now 4), SEED = 42 (now 7), "
    "other training posts: set that back"
)


def test_only_fresh_throws_an_unfinished_run_away(gpt2_folder, data_folder, tmp_path, monkeypatch, capsys):
    unfinished = shutil.copytree(stopped_run(gpt2_folder, data_folder), tmp_path / "model-unfinished")
    before = contents(unfinished)
    data = shutil.copytree(data_folder, tmp_path / "data")
    write_jsonl(data / "train_data.jsonl", conversations(41))
    monkeypatch.setattr(train_model, "SEED", 7)
    monkeypatch.setattr(train_model, "LORA_RANK", 4)
    others = ("--max-steps", "8", "--learning-rate", "1e-3")
    with pytest.raises(SystemExit, match=re.escape(OTHERWISE)):
        run(gpt2_folder, data, tmp_path / "model", *others)
    assert contents(unfinished) == before

    capsys.readouterr()
    run(gpt2_folder, data, tmp_path / "model", *others, "--fresh")
    assert "Continuing" not in capsys.readouterr().err
    assert not unfinished.exists()


def change_state(**values):
    def change(path: Path) -> None:
        path.write_bytes(json.dumps({**json.loads(path.read_bytes()), **values}).encode())

    return change


DAMAGED = [
    ("run.json", cut_in_half, "run.json cannot be read"),
    ("run.json", lambda path: path.write_text("[]"), "run.json cannot be read"),
    ("checkpoint-5/trainer_state.json", cut_in_half, "trainer_state.json is damaged or missing"),
    ("checkpoint-5/trainer_state.json", change_state(global_step=9), "trainer_state.json is not its state"),
    ("checkpoint-5/trainer_state.json", change_state(log_history=[]), "trainer_state.json is not its state"),
    ("checkpoint-5/trainer_state.json", change_state(stateful_callbacks=5), "trainer_state.json is damaged"),
    ("checkpoint-5/trainer_state.json", change_state(of_another_version=1), "trainer_state.json is damaged"),
    ("checkpoint-5/complete", lambda path: path.write_text(""), "complete is damaged or missing"),
    ("checkpoint-5/optimizer.pt", cut_in_half, "optimizer.pt is damaged or missing"),
    ("checkpoint-5/optimizer.pt", make_noise, "optimizer.pt is damaged or missing"),
    ("checkpoint-5/scheduler.pt", Path.unlink, "scheduler.pt is damaged or missing"),
    ("checkpoint-5/rng_state.pth", make_noise, "rng_state.pth is damaged or missing"),
    ("checkpoint-5/model.safetensors", cut_in_half, "model.safetensors is damaged or missing"),
    ("checkpoint-5/model.safetensors", make_noise, "model.safetensors is damaged or missing"),
]


@pytest.mark.parametrize(("name", "damage", "said"), DAMAGED)
def test_what_is_damaged_of_an_unfinished_run_is_said_and_the_run_starts_over(
    name, damage, said, gpt2_folder, data_folder, tmp_path, capsys
):
    unfinished = shutil.copytree(stopped_run(gpt2_folder, data_folder), tmp_path / "model-unfinished")
    settings = train_model.parse_arguments(flags(gpt2_folder, data_folder, tmp_path / "model"))
    identity = train_model.identity_of_run(settings, "fp32")
    damage(unfinished / name)
    capsys.readouterr()
    train_model.open_unfinished(unfinished, identity, fresh=False, optimizer=OPTIMIZER)
    assert said in capsys.readouterr().err
    assert {path.name for path in unfinished.iterdir()} == {"run.json", "train_model.lock"}


@pytest.mark.parametrize(
    ("name", "fresh"), [("run.json", ()), ("rates.json", ()), ("checkpoint-5/optimizer.pt", ("--fresh",))]
)
def test_a_run_over_damaged_files_ends_as_a_whole_run(name, fresh, gpt2_folder, data_folder, tmp_path):
    unfinished = shutil.copytree(stopped_run(gpt2_folder, data_folder), tmp_path / "model-unfinished")
    (unfinished / name).write_text("{")
    report = run(gpt2_folder, data_folder, tmp_path / "model", "--max-steps", "9", *fresh)
    assert losses(report) == losses(nine_updates(gpt2_folder, data_folder))


OPTIMIZER = "adamw_torch_fused"


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
    train_model.open_unfinished(unfinished, {**identity, "seed": 7}, fresh=False, optimizer=OPTIMIZER)
    assert [path.name for path in unfinished.iterdir()] == ["run.json"]
    assert not capsys.readouterr().err


def test_every_setting_is_part_of_the_identity_of_a_run(gpt2_folder, data_folder, tmp_path):
    """But for those that are named as making no difference; so a new setting cannot be forgotten."""
    settings = train_model.parse_arguments(flags(gpt2_folder, data_folder, tmp_path / "model"))
    before = train_model.identity_of_run(settings, "bf16")
    others = set(vars(settings)) - train_model.NOT_IN_THE_IDENTITY
    assert set(before) == others | {"train_sha256", "val_sha256"}
    for name in vars(settings):
        changed = train_model.identity_of_run(replace(settings, **{name: data_folder}), "bf16")
        differ = [key for key in before if changed[key] != before[key]]
        assert differ == ([] if name in {*train_model.NOT_IN_THE_IDENTITY, "precision"} else [name])


def test_a_checkpoint_of_float16_is_not_continued_in_bfloat16(gpt2_folder, data_folder, tmp_path, capsys):
    """PRECISION is "auto" in both: the card, or the torch, has changed. Named by hand, the same one is the same run."""
    settings = train_model.parse_arguments(flags(gpt2_folder, data_folder, tmp_path / "model"))
    settings = replace(settings, precision="auto")
    unfinished = tmp_path / "model-unfinished"
    train_model.open_unfinished(
        unfinished, train_model.identity_of_run(settings, "fp16"), fresh=False, optimizer=OPTIMIZER
    )
    make_checkpoint(unfinished / "checkpoint-5", None)

    settings = replace(settings, precision="fp16")
    train_model.open_unfinished(
        unfinished, train_model.identity_of_run(settings, "fp16"), fresh=False, optimizer=OPTIMIZER
    )
    assert "Continuing the run that stopped after update 5" in capsys.readouterr().err
    with pytest.raises(SystemExit, match=re.escape("had PRECISION = 'fp16' (now 'bf16')")):
        train_model.open_unfinished(
            unfinished, train_model.identity_of_run(settings, "bf16"), fresh=False, optimizer=OPTIMIZER
        )
    assert (unfinished / "checkpoint-5").exists()
