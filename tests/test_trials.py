"""LEARNING_RATE = "auto" in train_model.py: what the trials cost, and what they are."""

from pathlib import Path

import pytest
from training import run, settings_with

import train_model


def run_of(updates: int, held_out_rows: int) -> train_model.Run:
    """A run of so many updates of 8 rows, with an evaluation after every fourth."""
    row = {"input_ids": [1] * 512, "labels": [1] * 512}
    train = [row] * 40
    held_out = [row] * held_out_rows
    plan = train_model.Plan("cpu", "fp32", "adamw_torch_fused", False, 2, 4, 4, parameters=0, updates=updates)
    data = {"val": {"author_bytes": 1000 * held_out_rows}}
    return train_model.Run(settings_with(rows_per_update=8), Path(), plan, {"train": train, "val": held_out}, data)


def cost(run: train_model.Run) -> float:
    """In rows: three passes through those of an update, one through those of an evaluation."""
    plan = run.plan
    trained = plan.updates * run.settings.rows_per_update
    evaluations = 1 + plan.updates / plan.evaluate_every
    return 3 * trained + evaluations * len(run.rows_of["val"])


@pytest.mark.parametrize("held_out_rows", [1, 5, 40, 400])
@pytest.mark.parametrize("updates", [12, 24, 50, 500])
def test_the_trials_cost_a_quarter_of_the_run_at_most(updates, held_out_rows):
    whole = run_of(updates, held_out_rows)
    trial = train_model.shortened(whole, times=3)
    held_out = len(trial.rows_of["val"])
    own_cost = cost(trial) - held_out  # no trial measures the base model
    assert 3 * own_cost <= 0.25 * cost(whole)

    plan = trial.plan
    settings = trial.settings
    assert 2 <= plan.updates <= 5
    assert plan.updates == settings.max_steps
    assert plan.rows_at_once * plan.accumulation == settings.rows_per_update
    assert trial.data["val"]["author_bytes"] == pytest.approx(1000 * held_out)


@pytest.mark.parametrize(
    ("updates", "held_out_rows", "expected"),
    [
        (500, 40, (5, 8, 40)),
        (1, 3, (2, 2, 1)),
    ],
)
def test_trials_of_a_long_and_of_the_shortest_run(updates, held_out_rows, expected):
    whole = run_of(updates, held_out_rows)
    trial = train_model.shortened(whole, times=3)
    size = (trial.plan.updates, trial.settings.rows_per_update, len(trial.rows_of["val"]))
    assert size == expected


@pytest.mark.slow
@pytest.mark.usefixtures("small_training")
def test_a_trial_is_a_short_run_from_the_base_model(gpt2_folder, data_folder, tmp_path, monkeypatch, capsys):
    """With a schedule of its own: each rate's bits are those of a run of so many updates, also of the second one."""
    monkeypatch.setattr(train_model, "RATES_TO_TRY", (1e-3, 1e-2))
    monkeypatch.setattr(train_model, "TRIALS_SHARE", 10)  # whole updates, and all held-out posts

    flags = ("--max-steps", "6", "--learning-rate", "auto")
    found = run(gpt2_folder, data_folder, tmp_path / "found", *flags)
    assert " bits per byte on held-out posts, 2 of 2 tried, 0 s left\n" in capsys.readouterr().err

    flags = ("--max-steps", "5", "--learning-rate", "1e-2")
    short = run(gpt2_folder, data_folder, tmp_path / "short", *flags)
    measured = train_model.evaluations(short["log"])[-1]["eval_bits_per_byte"]
    assert found["learning_rate"]["bits_per_byte_of_tried"]["0.01"] == measured
