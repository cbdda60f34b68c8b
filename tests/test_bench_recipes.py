"""benchmarks/bench_recipes.py: its rows are what train_model.py and test_model.py say."""

import json
import sys
from pathlib import Path

import pytest
import training
from tiny import conversations, write_jsonl

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
import bench_recipes

import train_model
from voice.leaks import tell_power

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("short_runs")]


@pytest.fixture
def blog(tmp_path, monkeypatch) -> Path:
    """Data of more posts than are asked for, all of them public; rows are made in this process."""
    monkeypatch.setattr(train_model, "ROWS_PER_UPDATE", 4)
    monkeypatch.setattr(train_model, "PRECISION", "fp32")
    monkeypatch.setattr(bench_recipes, "apart", lambda work, *given: work(*given))

    folder = tmp_path / "data"
    public = [post | {"visibility": "public"} for post in conversations(24, words=200)]
    write_jsonl(folder / "train_data.jsonl", public)
    write_jsonl(folder / "val_data.jsonl", conversations(9, seed=1, words=200))
    hashes = dict.fromkeys(("train_data.jsonl", "val_data.jsonl"), "of the whole data")
    (folder / "extraction_report.json").write_text(json.dumps({"sha256": hashes}))
    return folder


def table(capsys, monkeypatch, *flags) -> list[dict[str, str]]:
    """The rows that the benchmark prints, by the names of their columns."""
    monkeypatch.setattr(sys, "argv", ["bench_recipes.py", *map(str, flags)])
    bench_recipes.main()
    rows = []
    printed = capsys.readouterr().out
    for line in printed.splitlines():
        if line.startswith("| "):
            cells = line.strip("|").split("|")
            rows.append([cell.strip() for cell in cells])
    head, *rows = rows
    return [dict(zip(head, row, strict=True)) for row in rows]


def test_a_row_is_the_run_of_that_recipe(gpt2_folder, blog, tmp_path, capsys, monkeypatch):
    """Of as many posts as asked for, evaluated after each epoch; `auto` names the rate that it found."""
    flags = ("--base-model", gpt2_folder, "--data-dir", blog, "--posts", 12, 3, "--epochs", 2, "--bits-alone")
    rows = table(capsys, monkeypatch, *flags, "--rates", "1e-2", "auto", "--ranks", 4)
    tried = [row["learning rate"] for row in rows]
    assert tried == ["0.01, LORA_RANK 4", "auto (0.002), LORA_RANK 4"]

    # The first of them by hand.
    small = tmp_path / "small"
    for name, number in (("train_data.jsonl", 12), ("val_data.jsonl", 3)):
        posts = train_model.read_conversations(blog / name)
        write_jsonl(small / name, posts[:number])
    monkeypatch.setattr(train_model, "EVALUATIONS_PER_EPOCH", 1)
    monkeypatch.setattr(train_model, "LORA_RANK", 4)
    report = training.run(gpt2_folder, small, tmp_path / "model", "--epochs", "2", "--learning-rate", "1e-2")

    measured = train_model.evaluations(report["log"])
    bits = [entry["eval_bits_per_byte"] for entry in measured]
    base, *later = bits
    first = rows[0]
    assert first["base"] == f"{base:.4f}"
    assert [first["epoch 1"], first["epoch 2"]] == [f"{bits:.4f}" for bits in later]
    assert first["gain"] == f"{base - min(later):.4f}"


def test_the_report_s_columns_are_the_most_that_somebody_might_get_out():
    """Fewest tries of all texts that were trained on, and never those of held-out posts."""
    groups = {
        "private": {"bound": {"log10_tries": 12.0}, "sampled": {"log10_tries": None}},
        "private titles": {"bound": {"log10_tries": 3.0}, "sampled": {"log10_tries": 30.0}},
        "held-out": {"bound": {"log10_tries": 1.0}, "sampled": {"log10_tries": 1.0}},
    }
    seen = {
        "copies": {"tuned": {"share": 0.0123}},
        "leaks": {"by_length": {"12": groups}},
    }
    outcome = bench_recipes.Outcome("1e-4", seen=seen)
    assert outcome.tell_report() == ["1.23%", tell_power(3.0), tell_power(30.0)]
    # Without private posts nothing was read, which is no promise.
    groups.clear()
    assert outcome.tell_report() == ["1.23%", "not read", "not read"]


def test_what_a_model_gives_away_comes_from_its_report(gpt2_folder, blog, capsys, monkeypatch):
    """The reader, who needs more words than this, is left out."""
    monkeypatch.setattr(bench_recipes, "voice_of", lambda *_: None)
    flags = ("--base-model", gpt2_folder, "--data-dir", blog, "--posts", 12, 3, "--epochs", 1)
    base, row = table(capsys, monkeypatch, *flags, "--rates", "1e-2")
    assert base["learning rate"] == "base model"
    assert row["copied"].endswith("%")
    assert row["any settings: tries"] not in ("never", "not read")
