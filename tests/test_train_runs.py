"""train_model.py: whole runs, what they leave, and that the seed decides them."""

import json
import math
import multiprocessing
import os
import re
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState
from tiny import conversations, make_model_folder, write_jsonl
from torch.distributed import TCPStore
from training import TALK, losses, run, stopped, train_this_way
from transformers import AutoModelForCausalLM, AutoTokenizer

import train_model

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("small_training")]


def test_a_run_leaves_a_model_that_anybody_can_load(gpt2_folder, data_folder, tmp_path, capsys):
    folder = tmp_path / "model"
    report = run(gpt2_folder, data_folder, folder, "--epochs", "2", "--learning-rate", "1e-2")
    assert list(tmp_path.iterdir()) == [folder]
    names = {path.name for path in folder.iterdir()}
    assert {"model.safetensors", "config.json", "generation_config.json", "tokenizer.json"} <= names
    assert {"chat_template.jinja", "README.md", "training_report.json", "loss_curve.png"} <= names
    assert not any(name.endswith((".bin", ".pt", ".pth", ".pkl")) for name in names)

    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    config = model.config
    assert config.use_cache
    assert config.activation_function == "gelu_new"
    assert config.n_ctx == 256  # without which llama.cpp's converter stops
    assert model.lm_head.weight.data_ptr() == model.transformer.wte.weight.data_ptr()
    assert model.generation_config.eos_token_id == [tokenizer.eos_token_id]
    assert model.generation_config.do_sample
    inputs = tokenizer.apply_chat_template(TALK[:1], add_generation_prompt=True, return_tensors="pt", return_dict=True)
    written = model.generate(**inputs, max_new_tokens=5)
    longest = inputs["input_ids"].shape[1] + 5
    assert written.shape[1] <= longest

    trained = report["data"]["train"]
    held_out = report["data"]["val"]
    best = report["best"]
    assert trained["conversations"] == 40
    assert trained["private"] == 14
    assert best["eval_loss"] < report["base"]["eval_loss"]
    bits = best["eval_loss"] * held_out["author_tokens"] / math.log(2)
    assert best["eval_bits_per_byte"] == pytest.approx(bits / held_out["author_bytes"])
    out, err = capsys.readouterr()
    assert "it learned. It" in out
    assert f"{trained['author_tokens']:,} scored an epoch" in err


def test_an_update_is_the_same_however_many_rows_go_through_at_once_as_on_another_card(
    gpt2_folder, data_folder, tmp_path, monkeypatch, capsys
):
    """Over more than an epoch, of ten updates, so that the rows which only fill up an update are among them."""
    learn = ("--max-steps", "12", "--learning-rate", "1e-2")
    one_by_one = run(gpt2_folder, data_folder, tmp_path / "whole", *learn)
    train_this_way(monkeypatch, rows_at_once=4)
    stopped(gpt2_folder, data_folder, tmp_path / "moved", *learn)
    capsys.readouterr()
    train_this_way(monkeypatch, rows_at_once=2)
    moved = run(gpt2_folder, data_folder, tmp_path / "moved", *learn)
    assert "Continuing the run that stopped after update 5" in capsys.readouterr().err
    assert one_by_one["plan"]["accumulation"] == 2 * moved["plan"]["accumulation"] == 4
    assert losses(moved) == pytest.approx(losses(one_by_one), abs=1e-4)


def test_a_model_of_another_architecture_trains(data_folder, tmp_path):
    base = make_model_folder(tmp_path / "base", "phi", False, intermediate_size=64, num_key_value_heads=2)
    report = run(base, data_folder, tmp_path / "model", "--max-steps", "1")
    assert report["best"]["step"] == 1


def test_the_plan_counts_the_rows_of_a_model_that_cannot_pack(data_folder, tmp_path, capsys):
    """BLOOM has a row for each window, so more updates than the plan before loading says."""
    base = make_model_folder(tmp_path / "base", "bloom", False, n_head=2, n_layer=2)
    report = run(base, data_folder, tmp_path / "model", "--epochs", "1")
    plans = re.findall(r"(\d+) rows of up to 64 tokens, (\d+) updates", capsys.readouterr().err)
    [(rows, fewer), (more_rows, updates)] = [map(int, plan) for plan in plans]
    assert rows < more_rows
    assert fewer < updates
    measured = [entry["step"] for entry in train_model.evaluations(report["log"])]
    assert measured == [0, math.ceil(updates / 2), updates]
    assert report["log"][-1]["step"] == updates


def test_a_model_without_a_limit_of_positions_trains_to_the_end(data_folder, tmp_path):
    """As Mamba and BLOOM are; the Modelfile then names the length of the windows it was trained with."""
    base = make_model_folder(tmp_path / "base", "mamba", False)
    config = json.loads((base / "config.json").read_text())
    del config["max_position_embeddings"]
    (base / "config.json").write_text(json.dumps(config))
    run(base, data_folder, tmp_path / "model", "--max-steps", "1")
    assert "PARAMETER num_ctx 64\n" in (tmp_path / "model" / "Modelfile").read_text()


def test_training_stops_when_validation_gets_worse(gpt2_folder, tmp_path, monkeypatch, capsys):
    """The validation post is made of what training makes ever less likely."""
    write_jsonl(tmp_path / "train_data.jsonl", conversations(30))
    [worse] = conversations(1)
    worse["messages"][1]["content"] = "QQ ZZ !! ?? 77 %% QQ ZZ"
    write_jsonl(tmp_path / "val_data.jsonl", [worse])
    monkeypatch.setattr(train_model, "PATIENCE", 2)
    report = run(gpt2_folder, tmp_path, tmp_path / "model", "--epochs", "30", "--learning-rate", "1e-1")
    out, err = capsys.readouterr()
    assert report["log"][-1]["step"] < 100
    assert "Stopped early" in err
    assert "it did not learn" in out


# ---------------------------------------------------------------------------- several processes
def train_both_ways(rank: int, port: int, folder: Path, arguments: list[str]) -> None:
    """One of two processes, as torchrun starts them."""
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ.update(address, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    AcceleratorState._reset_state(reset_partial_state=True)
    for name, settings in BOTH_WAYS.items():
        vars(train_model).update(settings)
        train_model.main([*arguments, "--output-dir", str(folder / name)])


BOTH_WAYS = {
    "full training": {"LEARNING_RATE": 1e-3},
    # With recomputed activations, which find no gradient twice.
    "adapters": {
        "LEARNING_RATE": "auto",
        "LORA_RANK": 4,
        "OPTIMIZERS_OF_ADAPTERS": train_model.OPTIMIZERS_OF_ADAPTERS[1:],
        "RATES_FOR_ADAPTERS": train_model.RATES_FOR_ADAPTERS[1:],
    },
}


def test_two_processes_give_the_losses_of_one(llama_folder, data_folder, tmp_path, monkeypatch, capfd):
    port = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False).port
    arguments = ["--base-model", str(llama_folder), "--data-dir", str(data_folder), "--max-steps", "3", "--cpu"]
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=train_both_ways, args=(rank, port, tmp_path, arguments)) for rank in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    output, errors = capfd.readouterr()
    assert [process.exitcode for process in processes] == [0, 0], errors
    assert output.count("Validation") == 2
    assert errors.count("update 3/3  train") == 2
    assert errors.count("is the best and is used") == 1

    for name, settings in BOTH_WAYS.items():
        together = json.loads((tmp_path / name / "training_report.json").read_text())
        for setting, value in settings.items():
            monkeypatch.setattr(train_model, setting, value)
        alone = run(llama_folder, data_folder, tmp_path / f"{name} alone", "--max-steps", "3")
        assert together["plan"]["checkpointing"] == (name == "adapters")
        assert losses(together) == pytest.approx(losses(alone), abs=1e-5)
        rates = together["learning_rate"]
        expected = alone["learning_rate"]
        assert rates["used"] == expected["used"]
        assert len(rates["bits_per_byte_of_tried"]) == (2 if name == "adapters" else 0)
        assert rates["bits_per_byte_of_tried"] == pytest.approx(expected["bits_per_byte_of_tried"], abs=1e-5)
