"""train_model.py: the search for a learning rate."""

import functools
from pathlib import Path

import pytest
from training import KEPT, losses, run, stopped, stopped_and_continued

import train_model

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("small_training")]

LEARN = ("--max-steps", "9", "--learning-rate", "auto")
TRIED = (1e-4, 1e-2, 1e30)  # too low, right, and one that breaks everything


@pytest.fixture
def tries(monkeypatch) -> None:
    monkeypatch.setattr(train_model, "RATES_TO_TRY", TRIED)
    monkeypatch.setattr(train_model, "RATES_FOR_ADAPTERS", TRIED)


@functools.cache
def found_rate(base: Path, data: Path) -> dict:
    """The report of a whole run that tries these."""
    return run(base, data, Path(KEPT.name, "found"), *LEARN)


def test_the_best_of_three_rates_is_found_and_the_run_is_that_of_this_rate(
    gpt2_folder, data_folder, tmp_path, tries, capsys
):
    """To the last digit: no trial leaves anything behind in the weights, the random numbers or the schedule."""
    found = run(gpt2_folder, data_folder, tmp_path / "found", "--max-steps", "9", "--learning-rate", "auto")
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("rate ")]
    given = run(gpt2_folder, data_folder, tmp_path / "given", "--max-steps", "9", "--learning-rate", "1e-2")
    assert losses(found) == losses(given)

    assert said[0] == "rate     each of 0.0001, 0.01, 1e+30 has a trial of 2 updates of 2 rows, from the same start"
    assert said[3] == "rate     1e+30   the loss became NaN, 3 of 3 tried, 0 s left"
    assert said[4] == "rate     0.01 is the best and is used"
    tried = found["learning_rate"]["bits_per_byte_of_tried"]
    assert found["learning_rate"]["used"] == 1e-2 and found["settings"]["learning_rate"] == "auto"
    assert tried["0.01"] < tried["0.0001"] and tried["1e+30"] is None


def test_where_no_rate_keeps_the_loss_a_number_the_run_does_not_begin(
    gpt2_folder, data_folder, tmp_path, monkeypatch, capsys
):
    """As with float16 and a model whose activations it cannot hold."""
    monkeypatch.setattr(train_model, "RATES_TO_TRY", (1e29, 1e30))
    with pytest.raises(
        SystemExit, match='Training diverged at every learning rate that was tried: set PRECISION = "fp32", or'
    ):
        run(gpt2_folder, data_folder, tmp_path / "model", "--max-steps", "9", "--learning-rate", "auto")
    assert "update 0/9" not in capsys.readouterr().err
    assert not (tmp_path / "model").exists()


def test_adapters_are_tried_at_rates_of_their_own(gpt2_folder, data_folder, tmp_path, rank_4, monkeypatch):
    monkeypatch.setattr(train_model, "RATES_FOR_ADAPTERS", (1e-3, 1e-2))
    found = run(gpt2_folder, data_folder, tmp_path / "found", "--max-steps", "4", "--learning-rate", "auto")
    given = run(gpt2_folder, data_folder, tmp_path / "given", "--max-steps", "4", "--learning-rate", "1e-2")
    assert list(found["learning_rate"]["bits_per_byte_of_tried"]) == ["0.001", "0.01"]
    assert losses(found) == losses(given)


def test_a_run_killed_in_its_trials_tries_only_what_is_left(
    gpt2_folder, data_folder, tmp_path, tries, monkeypatch, capsys
):
    whole = found_rate(gpt2_folder, data_folder)
    tried = []
    try_rate = train_model.try_rate

    def dying_at_the_second(trial) -> float:
        tried.append(trial.settings.learning_rate)
        if len(tried) == 2:
            raise KeyboardInterrupt
        return try_rate(trial)

    monkeypatch.setattr(train_model, "try_rate", dying_at_the_second)
    with pytest.raises(SystemExit, match="Stopped: run the same command again; it continues"):
        run(gpt2_folder, data_folder, tmp_path / "killed", *LEARN)
    assert not (tmp_path / "killed").exists()

    continued = run(gpt2_folder, data_folder, tmp_path / "killed", *LEARN)
    assert tried == [1e-4, 1e-2, 1e-2, 1e30]
    assert losses(continued) == losses(whole) and continued["learning_rate"] == whole["learning_rate"]


def test_a_run_killed_after_its_trials_goes_on_with_the_rate_that_they_found(
    gpt2_folder, data_folder, tmp_path, tries, monkeypatch, capsys
):
    whole = found_rate(gpt2_folder, data_folder)
    continued = stopped_and_continued(gpt2_folder, data_folder, tmp_path / "stopped", *LEARN)
    assert "Continuing the run that stopped after update 5" in capsys.readouterr().err
    assert losses(continued) == losses(whole) and continued["learning_rate"] == whole["learning_rate"]


def test_what_was_tried_for_another_run_is_tried_anew(gpt2_folder, data_folder, tmp_path, tries, monkeypatch):
    stopped(gpt2_folder, data_folder, tmp_path / "model", *LEARN)

    tried = []

    def remember(trial) -> float:
        tried.append(trial.settings.learning_rate)
        return trial.settings.learning_rate

    monkeypatch.setattr(train_model, "try_rate", remember)
    run(gpt2_folder, data_folder, tmp_path / "model", *LEARN, "--fresh")
    assert tried == list(TRIED)
