"""voice/report.py: what is measured, what is left out and said, and the two files."""

import errno
import html
import io
import json
import math
import os
import re
import shutil
import stat
from pathlib import Path

import pytest
import torch
import training
from reporting import NO_OBJECTS, crafted_report, know, report, run, settings_with
from tiny import conversations, write_jsonl
from transformers import AutoModelForCausalLM

import test_model
import train_model
from voice import asking
from voice.evidence import Section
from voice.learned import Learned
from voice.loading import base_name, held_in, load_tuned, run_settings, wanted_precision
from voice.report import QUESTIONS, replace_file, table_lines, why_unwritable, write_report

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("small_report")]

FILES = ("voice_report.json", "voice_report.html")


@pytest.fixture
def folder(model_folder, tmp_path) -> Path:
    """A copy of the model, which may be written to."""
    return Path(shutil.copytree(model_folder, tmp_path / "model"))


def trained_with(folder: Path, **settings) -> None:
    (folder / "training_report.json").write_text(json.dumps({"settings": settings}))


def test_an_overfitted_model_is_seen_to_copy(overfitted, tmp_path):
    folder, _, posts = overfitted
    know(tmp_path, 2 * posts)
    result = report(folder, tmp_path, "--max-new-tokens", "80")
    copies = result["copies"]
    assert copies["tuned"]["share"] > 0.8 > 0.1 > copies["base"]["share"]
    longest = copies["longest"][0]
    assert longest["words"] > 30 and longest["post"] in (1, 2, 3)
    learned = result["learned"]["held_out"]
    assert learned["tuned"] < learned["base"] and learned["interval"][0] > 0
    assert "It learned" in result["verdicts"]["learned"]
    assert "<mark>" in (folder / "voice_report.html").read_text()


def test_the_held_out_figure_is_the_one_that_training_reported(folder, model_folder, data_folder):
    trained_with(folder, base_model=str(model_folder))
    result = report(folder, data_folder)
    learned = result["learned"]["held_out"]
    model, tokenizer = load_tuned(folder)
    posts = train_model.read_conversations(data_folder / "val_data.jsonl")
    rows = train_model.make_rows(train_model.tokenize(tokenizer, posts), 128, 64)
    nats = train_model.conversation_losses(model, rows).sum()
    bits = nats / math.log(2) / train_model.author_bytes(posts)
    assert learned["tuned"] == learned["base"] == pytest.approx(bits, rel=1e-5)
    assert "No clear gain" in result["verdicts"]["learned"]


@pytest.mark.parametrize("changed", train_model.DATA_FILES.values())
def test_data_changed_since_training_are_said_before_and_in_the_report(
    changed, folder, data_folder, tmp_path, capsys, monkeypatch
):
    hashes = {
        f"{split}_sha256": train_model.file_hash(data_folder / name) for split, name in train_model.DATA_FILES.items()
    }
    trained_with(folder, **hashes)
    assert report(folder, data_folder)["warning"] == ""

    data = Path(shutil.copytree(data_folder, tmp_path / "data"))
    posts = train_model.read_conversations(data / changed)
    write_jsonl(data / changed, posts[1:])
    capsys.readouterr()
    warning = report(folder, data)["warning"]
    assert warning.startswith(f"{changed} is not the file that this model was trained with")
    out, err = capsys.readouterr()
    assert warning in " ".join(out.split()) and warning in err
    assert warning in html.unescape((folder / "voice_report.html").read_text())

    # The chat reads no data.
    monkeypatch.setattr("sys.stdin", io.StringIO("/quit\n"))
    run(folder, data, "--chat")
    assert warning not in capsys.readouterr().err


def test_a_blog_of_replies_alone_is_reported_on(folder, model_folder, tmp_path):
    trained_with(folder, base_model=str(model_folder))
    know(tmp_path, [post | {"kind": "reply"} for post in conversations(12)])
    assert report(folder, tmp_path)["learned"]["least_gained"] == []


@pytest.mark.parametrize("base", ["", "no/such-model"])
def test_without_the_base_model_the_rest_is_reported_and_it_is_said(base, folder, data_folder, tmp_path, capsys):
    trained_with(folder, base_model=base)
    result = report(folder, data_folder)
    out, err = capsys.readouterr()
    assert "base model" in err and "kipping comparisons" in err
    assert all("Not measured" in result["verdicts"][part] for part in ("learned", "reader", "habits"))
    assert result["leaks"]["by_length"]["12"]["private"]["common"] == 0  # nothing is known to be common
    # What the tuned model can say alone.
    assert result["copies"]["tuned"]
    assert re.search(r"^  tuned model +[\d.]+ bits/byte$", out, re.M)
    assert not re.search(r"^ +base model ", out, re.M)


def test_without_data_the_report_says_which_parts_it_cannot_give(folder, tmp_path, capsys):
    result = report(folder, tmp_path / "nothing")
    assert list(result["verdicts"]) == [question.key for question in QUESTIONS]
    assert all("Not measured" in verdict for verdict in result["verdicts"].values())
    assert capsys.readouterr().out.count("Not measured") == len(QUESTIONS)
    assert "What's on your mind today?" in html.unescape((folder / "voice_report.html").read_text())


def test_the_printed_report_fits_a_terminal_cuts_nothing_and_explains_itself_if_wanted(
    overfitted, tmp_path, everything, capsys
):
    folder, _, posts = overfitted
    know(tmp_path, posts)
    result = report(folder, tmp_path)
    short = capsys.readouterr().out
    lines = short.splitlines()
    assert max(map(len, lines)) <= 80 and len(lines) <= 60
    flat = " ".join(short.split())
    assert all(" ".join(verdict.split()) in flat for verdict in result["verdicts"].values())
    assert all(f"It copied {copy['words']} words" in flat for copy in result["copies"]["longest"])

    meaning = "Own tries: until the likeliest passage has an even chance"
    assert "--explain" in short and meaning not in short
    report(folder, tmp_path, "--explain")
    assert meaning in capsys.readouterr().out


def test_a_row_that_is_too_wide_goes_on_in_further_lines():
    phrase = "donaudampfschifffahrtsgesellschaft rechtsschutzversicherungsgesellschaften und"
    rows = [(phrase, "12", "3", "0"), ("so", "9", "1", "0")]
    lines = table_lines(Section("", rows, ("", "you", "tuned", "base")))
    assert max(map(len, lines)) <= 80
    assert set(phrase.split()) <= set(" ".join(lines).split())
    assert lines[1].endswith("12      3     0") and lines[-1].split() == ["so", "9", "1", "0"]
    assert table_lines(Section("", [], ("", "you", "tuned"))) == ["    you  tuned"]


def test_adapters_are_reported_on_in_the_precision_of_training(llama_folder, data_folder, tmp_path, monkeypatch):
    """Both models in half the memory, and with the very losses of the training run."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    monkeypatch.setattr(test_model, "PRECISION", None)
    for name, value in {"PRECISION": "bf16", "LORA_RANK": 4, "CONTEXT_TOKENS": 64, "OVERLAP_TOKENS": 8}.items():
        monkeypatch.setattr(train_model, name, value)
    folder = tmp_path / "model"
    trained = training.run(llama_folder, data_folder, folder, "--max-steps", "3", "--learning-rate", "1e-2")

    held = []
    losses_of = asking.losses_of

    def watched(model, *arguments):
        held.append({weight.dtype for weight in model.parameters() if weight.dim() > 1})
        return losses_of(model, *arguments)

    monkeypatch.setattr(asking, "losses_of", watched)
    result = report(folder, data_folder, "--quick")
    assert result["size"] == pytest.approx(test_model.REPORT_SIZE / 10)
    measured = result["learned"]["held_out"]
    assert held == 4 * [{torch.bfloat16}]  # held-out and drawn posts, of both models
    for model, evaluation in {"tuned": trained["best"], "base": trained["base"]}.items():
        assert measured[model] == pytest.approx(evaluation["eval_bits_per_byte"], abs=1e-3)


def test_the_report_is_its_owners_alone_and_replaces_the_old_one(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    for name in FILES:
        (folder / name).write_text("old")
        (folder / name).chmod(0o644)
        os.link(folder / name, tmp_path / name)
    assert not write_report(crafted_report(), folder)
    for name in FILES:
        assert stat.S_IMODE((folder / name).stat().st_mode) == 0o600
        assert (tmp_path / name).read_text() == "old"  # replaced, not written over
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("umask", [0, 0o077, 0o777])
@pytest.mark.parametrize("leftover", ["none", "file", "link"])
def test_a_file_is_its_owners_alone_whatever_the_umask_and_whatever_a_killed_run_left(umask, leftover, tmp_path):
    path = tmp_path / "voice_report.json"
    beside = tmp_path / ".voice_report.json.unfinished"
    mine = tmp_path / "mine"
    mine.write_text("mine")
    if leftover == "file":
        beside.write_text("half of it")
        beside.chmod(0o666)
    if leftover == "link":
        beside.symlink_to(mine)

    usual = os.umask(umask)
    try:
        replace_file(path, "half a character: \udce9")
    finally:
        os.umask(usual)
    assert path.read_text() == "half a character: ?"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert mine.read_text() == "mine"
    assert not beside.exists() and not path.is_symlink()


@pytest.mark.parametrize("lost", [FILES[:1], FILES[1:], FILES])
def test_a_report_that_cannot_be_written_is_printed_and_the_rest_written(lost, folder, data_folder, tmp_path, capsys):
    for name in lost:
        (folder / name).mkdir()
    with pytest.raises(SystemExit) as stop:
        run(folder, data_folder, "--report")

    out, err = capsys.readouterr()
    assert all(question.question in out for question in QUESTIONS)
    told = stop.value.code
    assert told.startswith("Cannot write ") and "\n" not in told
    before, _, measuring = err.partition("tuned model: ")  # the first thing that is measured
    assert measuring and ".unfinished" not in err + told
    for name in FILES:
        path = folder / name
        is_lost = name in lost
        assert (f"{path} cannot be written (Is a directory); the report will be printed.\n" in before) == is_lost
        assert (f"{path} (Is a directory)" in told) == is_lost
        assert path.is_file() != is_lost
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


def test_a_full_disk_is_seen_before_and_the_sentence_names_the_file_itself(tmp_path, monkeypatch):
    def fsync(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fsync)
    (tmp_path / "voice_report.json").write_text("old")
    assert why_unwritable(tmp_path / "voice_report.json") == "No space left on device"
    failures = write_report(crafted_report(), tmp_path)
    assert failures == [f"{tmp_path / name} (No space left on device)" for name in FILES]
    assert [path.name for path in tmp_path.iterdir()] == ["voice_report.json"]
    assert (tmp_path / "voice_report.json").read_text() == "old"


def test_losses_that_are_no_numbers_are_null_in_the_json():
    learned = Learned(math.nan)
    assert json.loads(crafted_report(learned=learned).as_json())["learned"]["tuned"] is None


@pytest.mark.parametrize("too_large", [False, True])
def test_what_float16_cannot_hold_is_asked_in_float32(too_large, folder, data_folder, tmp_path, monkeypatch, capsys):
    """As Gemma 3 on an RTX 20xx: in float16 it would answer nothing, and nobody would know why."""
    if too_large:
        model = AutoModelForCausalLM.from_pretrained(folder)
        model.get_input_embeddings().weight.data.mul_(1e6)  # the first norm takes that back
        model.save_pretrained(folder)

    monkeypatch.setattr(train_model, "pick_precision", lambda *_: "fp16")
    asked = []
    answer_prompts = test_model.answer_prompts

    def watched(model, *given) -> None:
        asked.append(model.dtype)
        answer_prompts(model, *given)

    monkeypatch.setattr(test_model, "answer_prompts", watched)
    run(folder, data_folder, "--prompt", "hi", "--max-new-tokens", "3")
    assert asked == [torch.float32 if too_large else torch.float16]
    assert ("overflows float16; generating in float32" in capsys.readouterr().err) == too_large


ODD_HISTORIES = [
    {"settings": [], "plan": 3, "log": {}},
    {"settings": "x", "plan": "x", "log": "x"},
    {"settings": {"base_model": 3}, "plan": {"precision": [], "lora_rank": 0}},
    {"settings": {"context_tokens": "512", "overlap_tokens": None}, "plan": {"precision": "fp64"}, "log": [3]},
    {"settings": {"context_tokens": 0, "overlap_tokens": 0}},
    {"settings": {"context_tokens": 32, "overlap_tokens": 32}},
    {"settings": {"context_tokens": True, "overlap_tokens": -1}},
]


@pytest.mark.parametrize("text", [*NO_OBJECTS, *map(json.dumps, ODD_HISTORIES)])
def test_an_odd_training_report_counts_as_none(text, tmp_path):
    (tmp_path / "training_report.json").write_text(text, encoding="utf-8")
    settings = settings_with(tmp_path, precision=None)
    assert held_in(tmp_path, "bf16") == "fp32" and base_name(settings) == ""
    assert wanted_precision(settings) == "auto"
    assert asking.window_of_training(run_settings(tmp_path), 1024) == (512, 32)


@pytest.mark.parametrize(
    ("recipe", "positions", "windows"),
    [
        ({"context_tokens": 64, "overlap_tokens": 8}, 128, (64, 8)),
        ({"context_tokens": 512, "overlap_tokens": 32}, 128, (128, 32)),
        ({"context_tokens": 512, "overlap_tokens": 32}, 16, (16, 8)),  # or no window would get on
        ({"context_tokens": 64, "overlap_tokens": 0}, 128, (64, 1)),
    ],
)
def test_windows_are_those_of_training_where_they_can_be_read(recipe, positions, windows):
    assert asking.window_of_training(recipe, positions) == windows


def test_a_report_over_odd_files_is_made_all_the_same(folder, data_folder, tmp_path):
    data = Path(shutil.copytree(data_folder, tmp_path / "data"))
    (folder / "training_report.json").write_text(json.dumps(ODD_HISTORIES[0]))
    (data / "extraction_report.json").write_text(json.dumps({"redacted": {}}))
    assert report(folder, data)["learned"]["tuned"] > 0


@pytest.mark.parametrize("redacted", [*NO_OBJECTS, "{}", '{"redacted": {}}', '{"redacted": [3, null, []]}'])
def test_an_odd_extraction_report_has_redacted_nothing(redacted, tmp_path):
    (tmp_path / "extraction_report.json").write_text(redacted, encoding="utf-8")
    assert asking.read_blog(tmp_path).redacted == []
