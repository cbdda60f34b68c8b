"""No token may see those after it: train_model.py tests the model that it trains, in the run's precision."""

import pytest
import torch
from training import run
from transformers import AutoConfig, AutoModelForCausalLM

import train_model

pytestmark = pytest.mark.usefixtures("small_training")


def tiny(architecture: str, **sizes):
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 200, **sizes}
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, **sizes))


def look_ahead(model, only_in_half: bool = False) -> None:
    """Break the model's attention on purpose: each layer adds the mean of the row, also of what is to come."""

    def hook(layer, inputs, output):
        if only_in_half and not torch.is_autocast_enabled("cpu"):
            return output
        return output + output.mean(dim=1, keepdim=True)

    for layer in model.modules():
        if type(layer).__name__ in ("GPT2MLP", "LlamaMLP"):
            layer.register_forward_hook(hook)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("architecture", ["gpt2", "llama", "mamba"])
def test_whole_models_are_causal_in_every_precision(architecture, precision):
    assert train_model.is_causal(tiny(architecture), precision)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_a_model_that_looks_ahead_is_caught(architecture, precision):
    model = tiny(architecture)
    look_ahead(model)
    assert not train_model.is_causal(model, precision)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_attention_without_its_mask_is_caught(precision):
    model = tiny("gpt2", attn_implementation="eager")
    for block in model.transformer.h:
        block.attn.is_causal = False
    model.transformer.forward = without_mask(model.transformer.forward)
    assert not train_model.is_causal(model, precision)


def without_mask(forward):
    def run(input_ids, **options):
        every = torch.zeros(1, 1, input_ids.shape[1], input_ids.shape[1])
        return forward(input_ids, **{**options, "attention_mask": every})

    return run


def test_a_row_that_is_wrong_only_where_it_is_long_is_caught():
    model = tiny("gpt2")

    def hook(layer, inputs, output):
        return output + output.mean(dim=1, keepdim=True) if output.shape[1] > 8 else output

    model.transformer.h[0].mlp.register_forward_hook(hook)
    assert not train_model.is_causal(model, "fp32")


def train_looking_ahead(monkeypatch, only_in_half: bool) -> None:
    """In bfloat16."""
    load = train_model.load_for_training

    def broken(*arguments):
        model = load(*arguments)
        look_ahead(model, only_in_half)
        return model

    monkeypatch.setattr(train_model, "load_for_training", broken)
    monkeypatch.setattr(train_model, "pick_precision", lambda *_: "bf16")


@pytest.mark.slow
def test_where_half_precision_looks_ahead_the_run_goes_on_in_float32(
    gpt2_folder, data_folder, tmp_path, monkeypatch, capsys
):
    train_looking_ahead(monkeypatch, only_in_half=True)
    report = run(gpt2_folder, data_folder, tmp_path / "model", "--max-steps", "1", "--cpu")
    said = capsys.readouterr().err
    assert said.count("In bf16 this CPU lets tokens see those after them: going on in float32.\n") == 1
    assert report["plan"]["precision"] == report["settings"]["precision"] == "fp32"


def test_where_float32_looks_ahead_too_nothing_is_trained(gpt2_folder, data_folder, tmp_path, monkeypatch):
    train_looking_ahead(monkeypatch, only_in_half=False)
    with pytest.raises(SystemExit, match=r"^Tokens of .* see those after them, so it cannot learn to write: choose"):
        run(gpt2_folder, data_folder, tmp_path / "model", "--max-steps", "1", "--cpu")
    assert not (tmp_path / "model").exists()
