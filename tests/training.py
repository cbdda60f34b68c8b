"""Training runs for tests: whole ones, killed ones, and settings that make them small and exact."""

import functools
import json
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import train_model

SCRIPT = Path(train_model.__file__)
TALK = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "hello"},
    {"role": "user", "content": "so?"},
    {"role": "assistant", "content": "bread <3"},
]


# Short windows, float32, a known rate: fast on a CPU and comparable to the last digit.
SMALL = {
    "CONTEXT_TOKENS": 64,
    "OVERLAP_TOKENS": 8,
    "ROWS_PER_UPDATE": 4,
    "PRECISION": "fp32",
    "CHECKPOINT_MINUTES": 0,
    "LEARNING_RATE": 1e-4,
}


@pytest.fixture
def small_training(short_runs, monkeypatch) -> None:
    for name, value in SMALL.items():
        monkeypatch.setattr(train_model, name, value)


@pytest.fixture
def short_runs(monkeypatch) -> None:
    """Without what takes 40 % of a tiny run: its samples are short and its picture empty.

    The run of test_pipeline.py has both, and test_page.py draws.
    """
    monkeypatch.setattr(train_model, "SAMPLE_TOKENS", 4)
    monkeypatch.setattr(train_model, "draw_curve", lambda _, path: path.write_bytes(b"drawn"))


def run(base: Path, data: Path, output: Path, *flags: str) -> dict:
    """A whole training run in this process; returns its report."""
    arguments = ["--base-model", str(base), "--data-dir", str(data), "--output-dir", str(output), *flags]
    assert train_model.main(arguments) == 0
    return json.loads((output / "training_report.json").read_text())


def settings_with(**values) -> train_model.Settings:
    return replace(train_model.parse_arguments([]), **values)


def losses(report: dict) -> list[float]:
    return [entry.get("loss", entry.get("eval_loss")) for entry in report["log"] if "train_loss" not in entry]


def train_this_way(monkeypatch, optimizer="adamw_torch_fused", checkpointing=False, rows_at_once=1) -> None:
    """Let the plan take this way to train, as if the memory asked for it."""
    way = train_model.WayToTrain(optimizer, checkpointing, rows_at_once)
    monkeypatch.setattr(train_model, "fit_into_memory", lambda *_: (way, {"weights": 1}))


@pytest.fixture
def rank_4(monkeypatch):
    monkeypatch.setattr(train_model, "LORA_RANK", 4)


def flags(base: Path, data: Path, output: Path) -> list[str]:
    return ["--base-model", str(base), "--data-dir", str(data), "--output-dir", str(output), "--max-steps", "9"]


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


def stopped(base: Path, data: Path, output: Path, *more: str) -> Path:
    """The unfinished folder of a run that died in its sixth update."""
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, 5)
        with pytest.raises(ZeroDivisionError):
            run(base, data, output, *more)
    return output.with_name(output.name + "-unfinished")


def stopped_and_continued(base: Path, data: Path, output: Path, *more: str) -> dict:
    stopped(base, data, output, *more)
    return run(base, data, output, *more)


KEPT = tempfile.TemporaryDirectory()  # for runs that several tests look at


@functools.cache
def nine_updates(base: Path, data: Path) -> dict:
    """The report of a whole run of nine updates."""
    return run(base, data, Path(KEPT.name, "whole"), "--max-steps", "9")


@functools.cache
def stopped_run(base: Path, data: Path) -> Path:
    """The unfinished folder of the same run, which died in its sixth update; to be copied, not changed."""
    return stopped(base, data, Path(KEPT.name, "stopped"), "--max-steps", "9")


def cut_in_half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def make_noise(path: Path) -> None:
    path.write_bytes(b"\xa5" * path.stat().st_size)


def make_checkpoint(folder: Path, best_metric: float | None) -> None:
    folder.mkdir(parents=True)
    state = {"best_metric": best_metric, "global_step": int(folder.name.split("-")[1]), "stateful_callbacks": {}}
    state = json.dumps({**state, "log_history": [{"eval_loss": 1.0}]})
    (folder / "trainer_state.json").write_text(state)
    (folder / "complete").write_text('["trainer_state.json"]')


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
