"""benchmarks/bench_gpu.py on a CPU: its stages run, a fault is found, and no stage takes another's results along."""

import contextlib
import json
import math
import re
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
import bench_gpu

import test_model
import train_model


@pytest.fixture
def lab(tmp_path):
    """What a stage is given on a machine without a card; signal handlers are put back after it."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    folder = tmp_path / "folder"
    folder.mkdir()
    yield bench_gpu.Lab("now", "stage", tmp_path / "results.jsonl", folder, torch.device("cpu"), bench_gpu.TINY)
    for number, handler in handlers.items():
        signal.signal(number, handler)


def results_of(lab) -> list[bench_gpu.Result]:
    return bench_gpu.read_results(lab.results, "now")


def failed(lab) -> list[str]:
    return [result.what for result in results_of(lab) if result.passed is False]


# ---------------------------------------------------------------------------- stages
@pytest.mark.parametrize("name", ["end-to-end", "isolation", "attention", "memory", "checkpoint", "sampling"])
def test_a_stage_runs_without_a_card(name, lab):
    bench_gpu.STAGES[name].run(lab)
    assert failed(lab) == []
    assert bench_gpu.verdict_of(results_of(lab)) == bench_gpu.PASS


def test_documents_that_see_each_other_are_found(lab, monkeypatch):
    monkeypatch.setattr(bench_gpu, "ISOLATED", {"gpt2": {}})

    def with_a_mask(model, batch):
        following = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=train_model.UNSCORED)
        keep = following != train_model.UNSCORED
        inputs = {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"]}
        mask = torch.ones_like(batch["input_ids"])
        logits = model(**inputs, attention_mask=mask, use_cache=False, logits_to_keep=keep).logits
        return logits, following[keep]

    monkeypatch.setattr(train_model, "scored_logits", with_a_mask)
    bench_gpu.isolation(lab)
    [what] = failed(lab)
    seen = re.search(r"math in fp32: (\d+) logits, (\d+) gradients", what)
    assert int(seen[1]) > 0
    assert int(seen[2]) > 0


def test_autocast_that_reaches_into_the_backward_pass_is_found(lab, monkeypatch):
    def cast_all(self, device):
        self.casting = torch.autocast(device.type, torch.bfloat16)

    rows = bench_gpu.random_rows(lab.size, bench_gpu.UPDATE)
    bench_gpu.watch_autocast(lab, rows)
    assert failed(lab) == []
    monkeypatch.setattr(train_model.CastWeightsOnce, "__init__", cast_all)
    bench_gpu.watch_autocast(lab, rows)
    assert "gradients that were made under autocast" in failed(lab)


def test_other_words_than_transformers_generate_are_found(lab, monkeypatch):
    sample = test_model.sample_next_token

    def second_best(logits, seen, sampling, dice):
        logits.scatter_(1, logits.argmax(-1, keepdim=True), -math.inf)
        return sample(logits, seen, sampling, dice)

    monkeypatch.setattr(test_model, "sample_next_token", second_best)
    bench_gpu.sampling(lab)
    [what] = failed(lab)
    assert "generate" in what


def test_rows_at_once_are_timed_and_change_no_loss(lab):
    """Each way sees the same rows in the same order."""
    rows = bench_gpu.random_rows(lab.size, 3 * bench_gpu.UPDATE)
    one, _ = bench_gpu.time_ours(lab, rows, 1, "fp32", 3)
    eight, _ = bench_gpu.time_ours(lab, rows, 8, "fp32", 3)
    assert len(one) == 3
    assert bench_gpu.largest_difference(one, eight) < 1e-5
    assert bench_gpu.largest_difference(one, [*one[:2], one[2] + 1]) == pytest.approx(1)


def test_a_value_that_is_no_number_passes_nothing_and_is_json(lab):
    lab.at_most("loss", math.nan, 1.0)
    lab.at_least("gain", math.nan, 1.0)
    assert failed(lab) == ["loss", "gain"]
    for line in lab.results.read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)


# ---------------------------------------------------------------------------- the process that starts them
TELL = """
import json, sys
def tell(stage, what, value, passed):
    result = {"run": sys.argv[1], "stage": stage, "what": what, "value": value, "passed": passed}
    with open(sys.argv[2], "a") as file:
        file.write(json.dumps(result) + "\\n")
"""
FAKES = {
    "machine": 'tell("machine", "models", "tiny", None)',
    "good": 'tell("good", "loss", 1.5, True)',
    "wrong": 'tell("wrong", "loss", 9.5, False)',
    "broken": 'tell("broken", "before", 1, True); raise ValueError("the reason")',
    "endless": (
        'import os, signal; tell("endless", "before", 1, True); '
        'child = os.fork(); child and tell("endless", "child", child, None); signal.pause()'
    ),
    "cardless": 'tell("cardless", "kernels", "needs a card", None)',
}


@pytest.fixture
def run_fakes(tmp_path, monkeypatch):
    """Runs these fake stages as the parent runs real ones; (exit status, path of the results)."""

    def command_of(name, args, run):
        return [sys.executable, "-c", TELL + FAKES[name], run, str(args.results)]

    def run(*names: str) -> tuple[int, Path]:
        results = tmp_path / "results.jsonl"
        args = bench_gpu.parse_arguments(["--results", str(results)])
        return bench_gpu.run_stages(list(names), args), results

    stages = {name: bench_gpu.Stage(None, 60) for name in FAKES}
    monkeypatch.setattr(bench_gpu, "STAGES", stages)
    monkeypatch.setattr(bench_gpu, "command_of", command_of)
    return run


def test_a_stage_that_fails_stops_no_other(run_fakes, capsys):
    status, _ = run_fakes("wrong", "broken", "cardless", "good")
    said = capsys.readouterr()
    assert status == 1
    assert said.out.split("| stage | |\n|---|---|\n")[1].startswith(
        "| wrong | FAIL |\n| broken | FAIL |\n| cardless | needs a card |\n| good | PASS |\n"
    )
    assert "| broken | came to its end | exit status 1: ValueError: the reason | at most 60 | NOT OK |" in said.out
    assert "the reason" in said.err


def test_all_is_well_when_no_stage_fails(run_fakes, capsys):
    status, _ = run_fakes("good", "cardless")
    assert status == 0
    assert "| good | loss | 1.5 |" in capsys.readouterr().out


def test_a_stage_over_its_limit_is_ended_with_what_it_started_and_keeps_what_it_found(run_fakes, tmp_path, monkeypatch):
    wait = subprocess.Popen.wait

    def until_it_has_a_child(process, timeout=None):
        """Its time is over when it has told of its child, however fast this machine is."""
        if timeout is None or "endless" not in " ".join(process.args):
            return wait(process, timeout)
        while '"child"' not in (tmp_path / "results.jsonl").read_text():
            with contextlib.suppress(subprocess.TimeoutExpired):
                return wait(process, 0.05)
        raise subprocess.TimeoutExpired("endless", timeout)

    monkeypatch.setattr(subprocess.Popen, "wait", until_it_has_a_child)
    status, path = run_fakes("endless", "good")
    results = bench_gpu.read_results(path, json.loads(path.read_text().splitlines()[0])["run"])
    assert status == 1
    found = {result.what: result.value for result in results if result.stage == "endless"}
    assert found["before"] == 1
    assert found[bench_gpu.ENDED] == "out of time after 60 s"
    assert [result.passed for result in results if result.stage == "good"] == [True, True]

    # Nobody may have waited for it yet.
    child = found["child"]
    assert not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE


def test_results_are_appended_and_each_run_reads_its_own(run_fakes, monkeypatch, capsys):
    _, path = run_fakes("wrong")
    earlier = path.read_text()
    lines = [json.loads(line) for line in earlier.splitlines()]
    path.write_text("".join(json.dumps({**line, "run": "yesterday"}) + "\n" for line in lines))

    status, _ = run_fakes("good")
    assert status == 0
    assert len(bench_gpu.read_results(path, "yesterday")) == len(lines)


def test_a_machine_that_cannot_even_say_what_it_is_ends_the_run(run_fakes, monkeypatch):
    monkeypatch.setitem(FAKES, "machine", "raise ImportError('no datasets')")
    with pytest.raises(SystemExit, match="Nothing can be measured here: exit status 1: ImportError: no datasets"):
        run_fakes("good")


def test_the_whole_script_runs_a_stage(tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    results = tmp_path / "results.jsonl"
    # Ten times the time, for a machine that does other things as well.
    assert bench_gpu.main(["--only", "isolation", "--results", str(results), "--limit", "5200"]) == 0
    said = capfd.readouterr().out
    assert f"PyTorch: {torch.__version__}" in said
    assert "The models are tiny" in said
    assert said.count("another document is seen") == 2 * len(bench_gpu.ISOLATED)  # as it comes, and in the table
    assert "| isolation | PASS |" in said
    assert list(tmp_path.iterdir()) == [results]
