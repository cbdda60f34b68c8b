"""benchmarks/bench_gpu.py on a CPU: its checks pass, a fault is found, and what fails stops no other."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
import bench_gpu

import train_model

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("short_runs")]


@pytest.mark.parametrize(("name", "rows"), [("speed", 1), ("resume", 2)])
def test_a_check_passes_without_a_card(name, rows, capsys):
    assert bench_gpu.main(["--tiny", "--only", name]) == 0
    assert capsys.readouterr().out.count("| PASS |") == rows


def test_other_losses_than_the_cpus_are_found(capsys, monkeypatch):
    """Of one model in one precision only, as a card's kernels might; the other model's are right."""
    exact = train_model.scored_logits

    def too_large(model, batch):
        logits, targets = exact(model, batch)
        is_wrong = torch.is_autocast_enabled("cpu") and model.config.model_type == "llama"
        return (logits * 1.1 if is_wrong else logits), targets

    monkeypatch.setattr(train_model, "scored_logits", too_large)
    assert bench_gpu.main(["--tiny", "--only", "losses"]) == 1
    table = capsys.readouterr().out
    assert table.count("| PASS |") == table.count("| FAIL |") == 1


def test_a_check_that_raises_fails_and_stops_no_other(capsys, monkeypatch):
    def out_of_memory(lab):
        yield bench_gpu.Row("before", "1")
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")

    def fine(lab):
        yield bench_gpu.Row("after", "2", "2", True)

    monkeypatch.setattr(bench_gpu, "CHECKS", {"large": out_of_memory, "fine": fine})
    assert bench_gpu.main(["--tiny"]) == 1
    table = capsys.readouterr().out
    assert "| before | 1 |  | - |\n| large | OutOfMemoryError CUDA out of memory. | no error | FAIL |" in table
    assert "| after | 2 | 2 | PASS |" in table


def test_without_a_card_it_says_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="finds no graphics card; use --tiny"):
        bench_gpu.main([])
