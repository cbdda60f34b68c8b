"""train_model.py: low-rank adapters, their merging and their exactness."""

import json
from pathlib import Path

import pytest
import torch
from training import losses, run, settings_with, stopped
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import train_model

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("small_training")]


SHAPES = ["gpt2_folder", "llama_folder"]


def adapted(folder: Path, precision: str = "fp32"):
    """A model whose adapters have learned something: B is no longer zero."""
    model = train_model.add_adapters(train_model.load_for_training(folder), precision, settings_with(lora_rank=4))
    torch.manual_seed(1)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.05)
    return model.eval()


def logits_of(model) -> torch.Tensor:
    ids = list(range(5, 45))
    batch = train_model.collate([{"input_ids": ids, "labels": ids}])
    logits, _ = train_model.scored_logits(model, batch)
    return logits


def in_bfloat16(monkeypatch) -> None:
    """Train in it, whether this processor has kernels for it or not."""
    monkeypatch.setattr(train_model, "PRECISION", "bf16")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})


@pytest.mark.parametrize("shape", SHAPES)
def test_merged_adapters_give_the_logits_of_the_base_with_adapters_and_the_base_comes_back(shape, rank_4, request):
    folder = request.getfixturevalue(shape)
    model = adapted(folder)
    with torch.no_grad():
        base = logits_of(train_model.load_for_training(folder).eval())
        beside = logits_of(model)
        with train_model.merged(model, 42):
            inside = logits_of(model)
            plain, weights = train_model.without_adapters(model)
            alone = AutoModelForCausalLM.from_config(plain.config).eval()
            assert not alone.load_state_dict(weights).missing_keys
            saved = logits_of(alone)
        again = logits_of(model)

    assert (beside - base).abs().max() > 1e-3
    assert torch.allclose(inside, beside, atol=1e-5)
    assert torch.allclose(saved, inside, atol=1e-5)
    assert torch.equal(again, beside)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_the_frozen_weights_survive_merging_bit_by_bit(precision, gpt2_folder, rank_4):
    """In half precision, where W + BA - BA is another W."""
    model = adapted(gpt2_folder, precision)
    before = {name: weight.clone() for name, weight in model.named_parameters()}

    def changed() -> list[str]:
        return [name for name, weight in model.named_parameters() if not torch.equal(weight, before[name])]

    for _ in range(3):
        with train_model.merged(model, 42):
            assert changed()
    assert not changed()

    held_in = train_model.HALF_PRECISION.get(precision, torch.float32)
    for weight in model.parameters():
        is_matrix = weight.dim() > 1
        is_frozen = not weight.requires_grad
        expected = held_in if is_matrix and is_frozen else torch.float32
        assert weight.dtype == expected


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("shape", SHAPES)
def test_adapters_learn_and_leave_a_folder_as_full_training_does(
    shape, rank_4, data_folder, tmp_path, request, monkeypatch, capsys
):
    base_folder = request.getfixturevalue(shape)
    folder = tmp_path / "model"
    report = run(base_folder, data_folder, folder, "--epochs", "2", "--learning-rate", "1e-2")
    assert report["best"]["eval_loss"] < report["base"]["eval_loss"] - 0.05
    plan = report["plan"]
    assert report["settings"]["lora_rank"] == plan["lora_rank"] == 4
    said = capsys.readouterr().err
    assert f"frozen, {plan['trained'] / 1e6:.1f}M trained in adapters of rank 4, fp32 on cpu" in said
    assert "arning" not in said

    monkeypatch.setattr(train_model, "LORA_RANK", 0)
    full = tmp_path / "full"
    run(base_folder, data_folder, full, "--max-steps", "1")
    assert names_in(folder) == names_in(full)
    config = (folder / "config.json").read_text()
    expected = (full / "config.json").read_text()
    assert json.loads(config) == json.loads(expected)

    # Every linear layer has learned, and what no adapter stands beside is the base's to the last bit.
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    learned = {id(model.get_submodule(name).weight) for name in train_model.layers_to_adapt(model)}
    base = dict(AutoModelForCausalLM.from_pretrained(base_folder).named_parameters())
    for name, weight in model.named_parameters():
        has_learned = id(weight) in learned
        assert torch.equal(weight, base[name]) != has_learned, name
    is_tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert is_tied == AutoConfig.from_pretrained(base_folder).tie_word_embeddings


def test_what_is_measured_in_half_precision_is_what_anybody_loads(
    gpt2_folder, rank_4, data_folder, tmp_path, monkeypatch
):
    """A merge rounds: the loss of the base with adapters beside it is another one."""
    in_bfloat16(monkeypatch)
    folder = tmp_path / "model"
    report = run(gpt2_folder, data_folder, folder, "--epochs", "1", "--learning-rate", "1e-2")
    reported = report["best"]["eval_loss"]
    assert reported < report["base"]["eval_loss"] - 0.02

    model = AutoModelForCausalLM.from_pretrained(folder)
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    size, full_size = [(path / "model.safetensors").stat().st_size for path in (folder, gpt2_folder)]
    assert size < 0.6 * full_size

    # To the last digit but for the sum: 1e-3, which the run itself demands, would also let a model pass that was
    # measured with its adapters beside it.
    entries = train_model.read_conversations(data_folder / "val_data.jsonl")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenized = train_model.tokenize(tokenizer, entries)
    rows = train_model.make_rows(tokenized, 64, 8)
    saved = train_model.load_for_training(folder)
    train_model.hold_in_half(saved, "bf16")
    with train_model.autocast(torch.device("cpu"), "bf16"):
        nats = train_model.conversation_losses(saved, rows).sum()
    assert nats / train_model.scored_tokens(rows) == pytest.approx(reported, abs=1e-7)


@pytest.mark.parametrize("weight", [0.19, -0.19])
def test_a_merge_into_bfloat16_keeps_in_the_mean_what_each_weight_would_lose(weight):
    """Weights of 0.19, which lie 0.001 apart; to the nearest, nothing of 0.0001 more would be left."""
    rng = torch.Generator().manual_seed(0)
    base = torch.full((400, 400), weight).bfloat16().float()
    step = 2.0**-10
    merged = train_model.rounded(base + 0.1 * step, torch.bfloat16, rng)
    assert merged.dtype == torch.bfloat16
    steps = (merged.float() - base) / step
    assert set(steps.unique().tolist()) == {0.0, 1.0}
    assert steps.mean().item() == pytest.approx(0.1, abs=0.01)
    # What has a number of its own keeps it: a base model without anything learned is the base model.
    again = train_model.rounded(base, torch.bfloat16, rng)
    assert torch.equal(again.float(), base)


def test_a_merge_into_float16_is_to_the_nearest():
    weight = torch.tensor([0.19003])
    merged = train_model.rounded(weight, torch.float16, torch.Generator())
    assert torch.equal(merged, weight.half())


def test_layers_hand_on_float32_over_a_base_in_half_precision(llama_folder, rank_4):
    model = adapted(llama_folder, "fp16")
    seen = set()
    for layer in model.get_base_model().model.layers:
        layer.register_forward_hook(lambda layer, inputs, output: seen.update([inputs[0].dtype, output.dtype]))
    with train_model.autocast(torch.device("cpu"), "fp16"):
        assert logits_of(model).dtype == torch.float16
    assert seen == {torch.float32}


def test_a_killed_run_of_adapters_ends_as_if_nothing_had_happened(
    gpt2_folder, data_folder, tmp_path, rank_4, monkeypatch, capsys
):
    """Its merges round alike, too."""
    in_bfloat16(monkeypatch)
    flags = ("--max-steps", "7", "--learning-rate", "1e-2")
    whole = run(gpt2_folder, data_folder, tmp_path / "whole", *flags)

    # A checkpoint has the adapters and no copy of the base model, and names nobody who could be asked for one.
    checkpoint = train_model.last_checkpoint(stopped(gpt2_folder, data_folder, tmp_path / "killed", *flags))
    assert (checkpoint / "adapter_model.safetensors").is_file()
    assert not (checkpoint / "model.safetensors").exists()
    config = json.loads((checkpoint / "adapter_config.json").read_text())
    assert not config["base_model_name_or_path"]

    capsys.readouterr()
    continued = run(gpt2_folder, data_folder, tmp_path / "killed", *flags)
    assert "Continuing the run that stopped after update 5" in capsys.readouterr().err
    assert losses(continued) == losses(whole)
    weights = (tmp_path / "killed" / "model.safetensors").read_bytes()
    assert weights == (tmp_path / "whole" / "model.safetensors").read_bytes()
