"""train_model.py: the search for a learning rate."""

import contextlib
import functools
import io
from pathlib import Path

import pytest
from training import KEPT, losses, run, stopped_and_continued

import train_model

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("small_training")]

LEARN = ("--max-steps", "9", "--learning-rate", "auto")
TRIED = (1e-4, 1e-2, 1e30)  # too low, right, and one that breaks everything


@pytest.fixture
def tries(monkeypatch) -> None:
    monkeypatch.setattr(train_model, "RATES_TO_TRY", TRIED)


@functools.cache
def found_rate(base: Path, data: Path) -> tuple[dict, list[str]]:
    """The report of a whole run that tries these, and what it says of them."""
    with contextlib.redirect_stderr(io.StringIO()) as said:
        report = run(base, data, Path(KEPT.name, "found"), *LEARN)
    return report, [line for line in said.getvalue().splitlines() if line.startswith("rate ")]


def test_the_best_of_three_rates_is_found_and_the_run_is_that_of_this_rate(gpt2_folder, data_folder, tmp_path, tries):
    """To the last digit: no trial leaves anything behind in the weights, the random numbers or the schedule."""
    found, said = found_rate(gpt2_folder, data_folder)
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


def test_a_run_killed_in_its_trials_and_once_more_after_them_tries_no_rate_twice(
    gpt2_folder, data_folder, tmp_path, tries, monkeypatch, capsys
):
    whole, _ = found_rate(gpt2_folder, data_folder)
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

    continued = stopped_and_continued(gpt2_folder, data_folder, tmp_path / "killed", *LEARN)
    assert "Continuing the run that stopped after update 5" in capsys.readouterr().err
    assert tried == [1e-4, 1e-2, 1e-2, 1e30]
    assert losses(continued) == losses(whole) and continued["learning_rate"] == whole["learning_rate"]


def test_only_fresh_tries_anew_what_was_tried(tmp_path):
    for fresh, kept in ((False, {1e-4: 1.0}), (True, {})):
        train_model.open_unfinished(tmp_path, {"seed": 42}, fresh, optimizer="adamw_torch_fused")
        (tmp_path / "rates.json").write_text('{"0.0001": 1.0}', encoding="utf-8")
        train_model.open_unfinished(tmp_path, {"seed": 42}, fresh, optimizer="adamw_torch_fused")
        assert train_model.known_rates(tmp_path) == kept
