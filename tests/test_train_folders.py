"""train_model.py: a new model replaces an old one, and no kill in between loses a model."""

import itertools
import json
import os
from pathlib import Path

import pytest
from training import make_checkpoint, model_folder, run
from transformers import AutoModelForCausalLM

import train_model

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("small_training")]

STEPS = ("rename", "unlink", "rmdir")  # what changes names on the disk; a rename of pathlib's and rmtree end in these


def finished_run(home: Path, old: bool) -> train_model.Places:
    """A run that has to put its model in place, beside an older model or none."""
    places = train_model.Places(home / "model")
    if old:
        model_folder(places.output, "old", notes="mine")
    model_folder(places.best, "new")
    make_checkpoint(places.unfinished / "checkpoint-9", 1.0)
    (places.unfinished / "run.json").write_text("{}")
    places.lock.touch()
    return places


class Killed(BaseException):
    """What nobody catches, as nobody catches SIGKILL."""


def kill_before_step(number: int, act, places: train_model.Places) -> bool:
    """Runs `act` up to the given step, and nothing from there on; whether it was killed, or came to its end before."""
    steps = itertools.count()

    def counting(original):
        def step(*args, **options):
            if next(steps) >= number:
                raise Killed
            return original(*args, **options)

        return step

    with pytest.MonkeyPatch.context() as patch:
        for name in STEPS:
            patch.setattr(os, name, counting(getattr(os, name)))
        try:
            act(places)
        except Killed:
            return True
    return False


def whole_contents(home: Path) -> set[str]:
    """What the complete model folders below `home`, of whatever name, say; one with files missing says nothing."""
    found = set()
    for config in home.rglob("config.json"):
        texts = {name: (config.parent / name) for name in ("model.safetensors", "README.md", "training_report.json")}
        if all(path.is_file() for path in texts.values()):
            found.add(config.read_text())
    return found


@pytest.mark.parametrize("old", [True, False], ids=["with an old model", "without"])
def test_a_kill_at_any_step_of_replacing_a_folder_loses_no_model(old, tmp_path):
    """Also when the recovery is killed, at any step of its own; and the owner's notes are in the model folder again."""
    kills = 0
    for first in itertools.count():
        killed = True
        for second in itertools.count():
            home = tmp_path / f"{first}-{second}"
            places = finished_run(home, old)
            killed = kill_before_step(first, train_model.put_in_place, places)
            kills += killed
            assert whole_contents(home), (first, second)
            killed_again = kill_before_step(second, train_model.recover, places)
            assert whole_contents(home), (first, second)
            train_model.recover(places)

            assert whole_contents(home), (first, second)
            if not places.best.exists():
                assert (places.output / "config.json").read_text() == "new" and not places.previous.exists()
            assert len(list(home.rglob("notes"))) == old
            if places.output.exists():
                assert not old or (places.output / "notes").read_text() == "mine"
            if not killed_again:
                break
        if not killed:
            break
    assert kills > (10 if old else 1)


def test_two_models_are_both_kept_where_a_run_was_killed_and_somebody_put_a_model_there(tmp_path):
    places = finished_run(tmp_path, old=True)
    places.output.rename(places.previous)
    model_folder(places.output, "somebody's")
    with pytest.raises(SystemExit, match="hold a model each: move one of the two away"):
        train_model.recover(places)
    assert len(whole_contents(tmp_path)) == 3


def test_a_link_to_a_model_on_another_disk_is_followed(gpt2_folder, data_folder, tmp_path):
    (tmp_path / "home").mkdir()
    link = tmp_path / "home" / "model"
    link.symlink_to(model_folder(tmp_path / "disk" / "model", "old"))
    run(gpt2_folder, data_folder, link, "--max-steps", "1")
    assert link.is_symlink() and [path.name for path in (tmp_path / "home").iterdir()] == ["model"]
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["model"]


def test_a_run_killed_between_its_two_renames_has_its_model_at_the_next_start(
    gpt2_folder, data_folder, tmp_path, capsys
):
    model_folder(tmp_path / "model", "old", notes="mine")
    rename = os.rename

    def kill_between_the_two(old, new):
        rename(old, new)
        if str(new).endswith("/previous"):
            raise Killed

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(os, "rename", kill_between_the_two)
        run(gpt2_folder, data_folder, tmp_path / "model", "--max-steps", "2")
    assert not (tmp_path / "model").exists()

    run(gpt2_folder, data_folder, tmp_path / "model", "--max-steps", "2")
    said = capsys.readouterr().err
    assert f"that model is in {tmp_path / 'model'} now" in said and "notes" in said
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "model").config.model_type == "gpt2"
    assert json.loads((tmp_path / "model" / "training_report.json").read_text())["verdict"]
    assert (tmp_path / "model" / "notes").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
