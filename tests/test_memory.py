"""The memory plan of train_model.py: what is measured of an architecture, and which way to train fits."""

import functools
import re

import pytest
import torch
from training import settings_with
from transformers import AutoConfig, AutoModelForCausalLM

import train_model

TOKENS = 90  # no weight below has this width, so what is saved in it is no weight


def machine(precision: str, kind: str = "cpu", gigabytes: float = 8) -> train_model.Machine:
    return train_model.Machine(torch.device(kind), processes=1, precision=precision, free_memory=int(gigabytes * 1e9))


# ---------------------------------------------------------------------------- what is measured
GATED = {"intermediate_size": 192, "num_key_value_heads": 2, "head_dim": 32}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 32, "mamba_d_state": 16}
OF_GEMMA_4 = {"vocab_size_per_layer_input": 300, "hidden_size_per_layer_input": 16, "global_head_dim": 32}
TEXT_OF_GEMMA_4 = {"hidden_size": 64, "num_attention_heads": 4, "vocab_size": 300, **GATED, **OF_GEMMA_4}
SMALL_TOWER = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
ARCHITECTURES = {
    "GPT-2": ("gpt2", {}),
    "GPT-NeoX": ("gpt_neox", {"intermediate_size": 256}),
    "Llama": ("llama", {"intermediate_size": 192, "num_key_value_heads": 2}),
    "Qwen3": ("qwen3", GATED),
    "Qwen3.5": (
        "qwen3_5_text",  # three layers of linear attention, then one of full attention
        {**GATED, "linear_num_key_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16},
    ),
    "Gemma 3": ("gemma3_text", GATED),
    # The second half takes its keys and values from the last layers of the first, one of each kind.
    "Gemma 4": (
        "gemma4_text",
        {
            **GATED,
            **OF_GEMMA_4,
            "num_hidden_layers": 6,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
            "num_kv_shared_layers": 3,
        },
    ),
    "Gemma 4 with eyes": (
        "gemma4",
        {"text_config": {**TEXT_OF_GEMMA_4, "num_hidden_layers": 2}, "vision_config": SMALL_TOWER},
    ),
    "LFM2": (
        "lfm2",
        {"intermediate_size": 192, "num_key_value_heads": 2, "layer_types": ["conv", "conv", "full_attention", "conv"]},
    ),
    "Granite 4": ("granite", {"intermediate_size": 192, "num_key_value_heads": 2}),
    "Granite 4 hybrid": (
        "granitemoehybrid",
        {
            "shared_intermediate_size": 128,
            "num_key_value_heads": 2,
            "num_local_experts": 0,
            "layer_types": ["mamba", "mamba", "mamba", "attention"],
            **MAMBA,
        },
    ),
    "Falcon-H1": ("falcon_h1", {"intermediate_size": 192, "num_key_value_heads": 2, "mamba_d_ssm": 128, **MAMBA}),
    "OLMo 2": ("olmo2", {"intermediate_size": 192}),
}


def config_of(name: str):
    architecture, sizes = ARCHITECTURES[name]
    if "text_config" in sizes:
        return AutoConfig.for_model(architecture, **sizes)
    usual = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 4, "vocab_size": 300}
    return AutoConfig.for_model(architecture, **{**usual, **sizes})


def packed_row() -> dict[str, torch.Tensor]:
    """Two documents in a row."""
    ids = torch.arange(TOKENS)[None] % 50
    return {"input_ids": ids, "labels": ids, "position_ids": torch.arange(TOKENS)[None] % (TOKENS // 2)}


def saved_by_autograd(model, precision: str) -> int:
    """Bytes that a pass through a row keeps; weights, and autocast's copies of them, are none of it."""
    shapes = {weight.shape for weight in model.parameters()}
    shapes |= {weight.mT.shape for weight in model.parameters() if weight.dim() > 1}
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    saved = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if tensor.shape not in shapes and storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage
        return tensor

    attention = train_model.attention_of("cpu", precision, checkpointing=False)
    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with attention(), train_model.autocast(torch.device("cpu"), precision), hooks:
        logits, _ = train_model.scored_logits(model, packed_row())
    assert logits.requires_grad
    return sum(storage.nbytes() for storage in saved.values())


WAYS = [("bf16", 0), ("fp32", 4), ("bf16", 4), ("fp32", 0)]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_model_keeps_as_many_bytes_for_the_backward_pass_as_the_plan_says(name):
    # Each precision and each way to train, and for two of the models all four together.
    for precision, rank in WAYS if name in ("GPT-2", "Llama") else WAYS[:2]:
        config = config_of(name)
        shape = train_model.shape_of(config, settings_with(lora_rank=rank), TOKENS, machine(precision))
        assert len(shape.kept) == config.get_text_config().num_hidden_layers

        train_model.fuse_activations(config)
        train_model.set_dropout(config, 0.0)
        model = AutoModelForCausalLM.from_config(config).train()
        assert shape.parameters == model.num_parameters()
        if rank:
            model = train_model.add_adapters(model, precision, settings_with(lora_rank=rank))
        assert shape.trained == sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
        truth = saved_by_autograd(model, precision)
        assert sum(shape.kept) + shape.kept_besides == pytest.approx(truth, rel=0.06), (precision, rank)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_layer_has_adapters_and_all_of_them_learn(name):
    """A fused kernel that reads a weight past its adapter leaves it without a gradient."""
    model = AutoModelForCausalLM.from_config(config_of(name)).train()
    model = train_model.add_adapters(model, "fp32", settings_with(lora_rank=4))
    logits, targets = train_model.scored_logits(model, packed_row())
    train_model.SummedCrossEntropy.apply(logits, targets).backward()

    gradients = {name: weight.grad for name, weight in model.named_parameters() if "lora_B" in name}
    of_text = {name: gradient for name, gradient in gradients.items() if "vision" not in name}
    layers = {number for name in of_text for number in re.findall(r"\.(\d+)\.", name)}
    assert len(layers) == model.config.get_text_config().num_hidden_layers
    assert all(gradient is not None and gradient.abs().max() > 0 for gradient in of_text.values())


def test_dropout_keeps_masks():
    config = config_of("GPT-2")
    without, with_dropout = (
        train_model.shape_of(config, settings_with(dropout=dropout), TOKENS, machine("fp32")) for dropout in (0.0, 0.1)
    )
    assert with_dropout.kept[0] >= without.kept[0] + 2 * TOKENS * 64  # after attention and MLP, a byte each


def test_what_cannot_be_measured_is_said(capsys):
    """torch's fake tensors lack the float32 form of a mixture's products."""
    config = AutoConfig.for_model("granitemoe", hidden_size=64, num_attention_heads=4, num_hidden_layers=2)
    shape = train_model.shape_of(config, settings_with(), TOKENS, machine("fp32"))
    assert (shape.kept, shape.kept_besides) == ((), 0) and shape.trained > 0
    said = capsys.readouterr().err
    assert (
        said.startswith("What the layers of granitemoe keep in memory is not in the plan: ") and said.count("\n") == 1
    )


# ---------------------------------------------------------------------------- the plan
GPT2_MEDIUM = AutoConfig.for_model("gpt2", n_layer=24, n_embd=1024, n_head=16)
WTE = 50257 * 1024
WPE = 1024 * 1024
PARAMETERS = WTE + WPE + 24 * (12 * 1024**2 + 13 * 1024) + 2 * 1024
# The attention's two layers and the MLP's two, what goes in and what comes out of each.
OF_ADAPTERS = 16 * 24 * ((1024 + 3072) + (1024 + 1024) + (1024 + 4096) + (4096 + 1024))


@functools.cache
def medium(precision: str = "fp16", rank: int = 0, kind: str = "cuda", tokens: int = 512) -> train_model.Shape:
    return train_model.shape_of(GPT2_MEDIUM, settings_with(lora_rank=rank), tokens, machine(precision, kind))


def fit(shape: train_model.Shape, gigabytes: float, rows: int = 8, kind: str = "cuda"):
    with_adapters = functools.partial(medium, rank=16)
    return train_model.fit_into_memory(shape, with_adapters, rows, machine("fp16", kind, gigabytes))


@pytest.mark.parametrize(
    ("gigabytes", "optimizer", "rows_at_once"),
    [
        (7.0, "adamw_bnb_8bit", 1),
        (7.6, "adamw_bnb_8bit", 2),
        (8.7, "adamw_torch_fused", 1),  # exact averages rather than more rows
        (12, "adamw_torch_fused", 4),
        (16, "adamw_torch_fused", 8),
        (80, "adamw_torch_fused", 8),
    ],
)
def test_a_card_takes_as_many_rows_at_once_as_it_has_room_for(gigabytes, optimizer, rows_at_once):
    way, _ = fit(medium(), gigabytes)
    assert way == train_model.WayToTrain(optimizer, False, rows_at_once)
    # Half of an update's rows are another process's; a CPU has enough to do with one row.
    assert fit(medium(), gigabytes, rows=1)[0].rows_at_once == 1
    assert fit(medium(), gigabytes, kind="cpu")[0].rows_at_once == 1


def test_the_memory_of_gpt2_medium_is_what_its_parts_take():
    """Worked out by hand, in MB, for one row of 512 tokens."""
    assert (medium().parameters, medium().embeddings, medium().trained) == (PARAMETERS, WTE + WPE, PARAMETERS)
    # 36 bytes a channel; of each token what 16 heads and 2 norms divide by, and a row of the attention mask.
    layer = 512 * (36 * 1024 + 16 * 4 + 2 * 8 + 512 * 2)
    assert medium().kept == (layer,) * 24

    card = machine("fp16", "cuda")
    way = train_model.WayToTrain("adamw_bnb_8bit", False, 1)
    frugal = train_model.memory_needed(medium(), card, way)
    assert {name: round(size / 1e6) for name, size in frugal.items()} == {
        "weights": 2129,  # 6 bytes each
        "gradients": 1419,
        "optimizer": 1025,  # 8 bytes for 52.5 million in the embeddings, 2 for the rest
        "activations": 933,  # 24 layers, the last norm; gradients of logits and of the output layer, 6 each
    }
    exact = way._replace(optimizer="adamw_torch_fused")
    assert train_model.memory_needed(medium(), card, exact)["optimizer"] == 8 * PARAMETERS
    assert train_model.memory_needed(medium("fp32"), machine("fp32"), exact)["weights"] == 4 * PARAMETERS

    recomputed = train_model.memory_needed(medium(), card, way._replace(checkpointing=True))
    assert frugal["activations"] - recomputed["activations"] == 23 * layer - 512 * 24 * 4 * 1024
    two_rows = train_model.memory_needed(medium(), card, way._replace(rows_at_once=2))
    another_row = 24 * layer + medium().kept_besides + 512 * 6 * 50257
    assert two_rows["activations"] - frugal["activations"] == another_row

    # A CPU keeps, in bfloat16, how much each of 16 heads looks from every token at every other one.
    looks = 24 * 16 * 512 * 512 * 2
    on_a_card, on_a_cpu = (sum(medium("bf16", kind=kind).kept) for kind in ("cuda", "cpu"))
    assert looks <= on_a_cpu - on_a_card <= 1.3 * looks

    # In many tokens the loss is larger than the output layer's gradient: logits in 2 bytes, their gradient in 4, and
    # a piece of 512 tokens in float32 twice.
    many = medium(tokens=8192)
    recomputed = train_model.memory_needed(many, card, way._replace(checkpointing=True))["activations"]
    layers = 24 * 8192 * 4 * 1024 + many.kept[0] + many.kept_besides
    assert recomputed == layers + 8192 * 6 * 50257 + max(512 * 8 * 50257, 6 * 50257 * 1024)


def test_the_memory_of_adapters_is_what_their_parts_take():
    """Worked out by hand, for GPT2-medium and one row of 512 tokens."""
    shape = medium(rank=16)
    assert (shape.parameters, shape.trained) == (PARAMETERS, OF_ADAPTERS)

    card = machine("fp16", "cuda")
    way = train_model.WayToTrain("adamw_torch_fused", False, 1)
    half = train_model.memory_needed(shape, card, way)
    assert half["weights"] == 2 * PARAMETERS + 6 * OF_ADAPTERS  # with autocast's copy of the adapters
    assert half["gradients"] == 4 * OF_ADAPTERS
    assert half["optimizer"] == 8 * OF_ADAPTERS
    # Logits in 2 bytes, their gradient in 4, a piece of it in float32 twice; the output layer is frozen.
    assert half["activations"] == sum(shape.kept) + shape.kept_besides + 512 * 50257 * (2 + 4 + 8)

    # While it is measured, a model on the CPU lies in the same memory as the weights that are put aside.
    one_token = medium(rank=16, tokens=1)
    assert train_model.memory_needed(one_token, machine("fp16"), way)["activations"] == 2 * PARAMETERS
    assert train_model.memory_needed(one_token, card, way)["activations"] < 2 * PARAMETERS

    exact = train_model.memory_needed(medium("fp32", rank=16), machine("fp32", "cuda"), way)
    assert exact["weights"] == 4 * PARAMETERS + 4 * OF_ADAPTERS
    thrifty = train_model.memory_needed(shape, card, way._replace(optimizer="adamw_bnb_8bit"))
    assert thrifty["optimizer"] == 2 * OF_ADAPTERS


@pytest.mark.parametrize(
    ("gigabytes", "rank", "way"),
    [
        (80, 16, ("adamw_torch_fused", False, 8)),
        (2.4, 16, ("adamw_torch_fused", True, 1)),  # exact averages, which are small, rather than kept activations
        (2.4, 0, None),
    ],
)
def test_adapters_give_up_activations_before_exactness(gigabytes, rank, way):
    fitting = train_model.first_that_fits(medium(rank=rank), 8, machine("fp16", "cuda", gigabytes))
    assert fitting is None if way is None else tuple(fitting[0]) == way


def test_where_full_training_does_not_fit_the_way_out_is_named_if_it_is_one():
    """5 GB are too few for all weights of GPT2-medium and enough for adapters; 1.5 GB are too few for either."""
    with pytest.raises(SystemExit) as error:
        fit(medium(), 5)
    _, memory = fit(medium(rank=16), 5)
    size = sum(memory.values()) / 1e9
    assert str(error.value).endswith(
        f'and 5.0 GB are free: set LORA_RANK = 16 with LEARNING_RATE = "auto" or 1e-3, which needs {size:.1f} GB, '
        "choose a smaller BASE_MODEL or lower CONTEXT_TOKENS."
    )
    for rank in (0, 16):
        with pytest.raises(SystemExit, match="GB are free: choose a smaller BASE_MODEL or lower CONTEXT_TOKENS"):
            fit(medium(rank=rank), 1.5)
