"""A graphics card's path, as far as a CPU can run it: float16 with loss scaling, what trials leave, plans."""

import argparse
import gc
import inspect
import json
import math
import textwrap
import weakref
from dataclasses import replace
from pathlib import Path

import accelerate.accelerator
import psutil
import pytest
import torch
from tiny import make_model_folder
from training import losses, run, stopped, stopped_and_continued, train_this_way
from transformers import AutoConfig
from transformers.integrations import sdpa_attention

import test_model
import train_model
from voice import asking

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("small_training")]

FUSED = "adamw_torch_fused"
EIGHT_BIT = "adamw_bnb_8bit"
WAYS = [(FUSED, False, 4), (FUSED, True, 2), (EIGHT_BIT, False, 2), (EIGHT_BIT, True, 1)]
SHAPES = {
    "gpt2": {},
    "llama": {"intermediate_size": 64, "num_key_value_heads": 1},
    "qwen2": {"intermediate_size": 64, "num_key_value_heads": 1},
    "gpt_neox": {"intermediate_size": 64},
}


@pytest.fixture(scope="module")
def shapes(tmp_path_factory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("shapes")
    return {name: make_model_folder(home / name, name, False, **sizes) for name, sizes in SHAPES.items()}


@pytest.fixture
def float16(monkeypatch):
    """accelerate's whole float16 path with a scaler of the CPU; it refuses float16 there in two lines, which go."""
    module = accelerate.accelerator
    source = textwrap.dedent(inspect.getsource(module.Accelerator.__init__))
    for line, instead in {
        'and self.device.type != "cpu"': "",
        'supported_device = ("xpu",': 'supported_device = ("cpu", "xpu",',
    }.items():
        assert source.count(line) == 1
        source = source.replace(line, instead)

    made = {}
    exec(source, vars(module), made)
    monkeypatch.setattr(module.Accelerator, "__init__", made["__init__"])
    monkeypatch.setattr(module, "get_grad_scaler", lambda *_, **__: torch.amp.GradScaler("cpu", growth_interval=2000))
    monkeypatch.setattr(train_model, "pick_precision", lambda *_: "fp16")


def scale_of(trainer) -> float:
    return trainer.accelerator.scaler.get_scale()


@pytest.fixture
def trainers(monkeypatch) -> list:
    """Every trainer that a run makes."""
    made = []
    original = train_model.trainer_with

    def watched(*given):
        made.append(original(*given))
        return made[-1]

    monkeypatch.setattr(train_model, "trainer_with", watched)
    return made


LEARN = ("--max-steps", "6", "--learning-rate", "1e-2")


@pytest.mark.parametrize("shape", SHAPES)
def test_float16_learns_what_float32_learns_in_every_way_to_train(
    shape, shapes, data_folder, tmp_path, monkeypatch, request
):
    """Unscaled before it is clipped: losses and gradient norms are those of float32. The saved model is checked too."""
    train_this_way(monkeypatch)
    exact = run(shapes[shape], data_folder, tmp_path / "exact", *LEARN)
    request.getfixturevalue("float16")
    made = request.getfixturevalue("trainers")
    # Of the other shapes in one way that pads rows and recomputes activations.
    for number, way in enumerate(WAYS if shape == "gpt2" else WAYS[1:2]):
        train_this_way(monkeypatch, *way)
        scaled = run(shapes[shape], data_folder, tmp_path / str(number), *LEARN)
        # bitsandbytes rounds the averages of large layers, and its AdamW is another program.
        assert losses(scaled) == pytest.approx(losses(exact), abs=2e-3 if way[0] == FUSED else 2e-2), way
        norms = [[entry["grad_norm"] for entry in report["log"] if "grad_norm" in entry] for report in (exact, scaled)]
        assert norms[1][0] == pytest.approx(norms[0][0], rel=1e-2), way
        assert scale_of(made[-1]) == train_model.FIRST_SCALE
        # What stands between float16's logits and the loss, a float32 copy, is gone.
        assert not hasattr(made[-1].model, "_original_forward")


def test_an_update_that_overflows_changes_no_weight_is_said_and_lowers_the_scale(
    shapes, data_folder, tmp_path, monkeypatch, capsys, float16, trainers
):
    monkeypatch.setattr(train_model, "FIRST_SCALE", 2.0**26)
    train_this_way(monkeypatch, EIGHT_BIT, False, 2)
    report = run(shapes["gpt2"], data_folder, tmp_path / "model", "--max-steps", "30", "--learning-rate", "1e-2")
    updates = [entry for entry in report["log"] if "grad_norm" in entry]
    skipped = [entry for entry in updates if entry.get("skipped")]
    assert skipped and len(skipped) == sum(entry["grad_norm"] is None for entry in updates)
    assert capsys.readouterr().err.count("was skipped: float16 overflowed") == len(skipped)
    assert scale_of(trainers[0]) == 2.0**26 / 2 ** len(skipped)
    assert report["best"]["eval_loss"] < report["base"]["eval_loss"]


def test_a_stopped_run_in_float16_ends_as_if_nothing_had_happened(shapes, data_folder, tmp_path, monkeypatch, float16):
    monkeypatch.setattr(train_model, "FIRST_SCALE", 2.0**22)
    train_this_way(monkeypatch, FUSED, False, 2)
    more = ("--max-steps", "9", "--learning-rate", "1e-2")
    whole = run(shapes["llama"], data_folder, tmp_path / "whole", *more)
    continued = stopped_and_continued(shapes["llama"], data_folder, tmp_path / "stopped", *more)
    assert losses(continued) == losses(whole)


# ---------------------------------------------------------------------------- trials
@pytest.mark.parametrize(("optimizer", "rank"), [(FUSED, 4), (EIGHT_BIT, 0)])
def test_nothing_keeps_a_parameter_of_a_trial(optimizer, rank, gpt2_folder, data_folder, tmp_path, monkeypatch):
    """A card need not hold two models. Python's collector would come at some time of its own, and bitsandbytes kept the
    embeddings of each for good: 0.6 GB of a card when the run itself began."""
    monkeypatch.setattr(train_model, "LORA_RANK", rank)
    train_this_way(monkeypatch, optimizer)
    monkeypatch.setattr(train_model, "RATES_TO_TRY", (1e-4, 1e-3, 1e-2))
    seen = []
    still_there = []
    load = train_model.load_for_training

    def watched(name, dropout):
        still_there.append(sum(weight() is not None for weight in seen))
        model = load(name, dropout)
        seen.extend(weakref.ref(weight) for weight in model.parameters())
        return model

    monkeypatch.setattr(train_model, "load_for_training", watched)
    gc.disable()
    try:
        run(gpt2_folder, data_folder, tmp_path / "model", "--max-steps", "3", "--learning-rate", "auto")
    finally:
        gc.enable()
    assert still_there == [0] * 5


def test_where_all_trials_skip_their_updates_that_is_said_and_the_middle_rate_is_taken(
    gpt2_folder, data_folder, tmp_path, monkeypatch, capsys, float16
):
    monkeypatch.setattr(train_model, "FIRST_SCALE", 2.0**60)
    monkeypatch.setattr(train_model, "RATES_TO_TRY", (1e-4, 1e-3, 1e-2))
    train_this_way(monkeypatch)
    report = run(gpt2_folder, data_folder, tmp_path / "model", "--max-steps", "3", "--learning-rate", "auto")
    said = capsys.readouterr().err
    assert report["learning_rate"]["used"] == 1e-3
    assert "0.001 is used, the middle one, as all gave the same loss" in said
    assert said.count("was skipped: float16 overflowed") >= 3 * 2


# ---------------------------------------------------------------------------- plans
@pytest.fixture(scope="module")
def medium():
    config = AutoConfig.for_model("gpt2", n_embd=1024, n_layer=24, n_head=16)
    return train_model.shape_of(config, train_model.parse_arguments([]), 512, machine(7))


def machine(gigabytes: float, device: str = "cuda", processes: int = 1, precision: str = "fp16"):
    return train_model.Machine(torch.device(device), processes, precision, int(gigabytes * 1e9))


def test_a_run_keeps_the_optimizer_that_it_was_begun_with(medium):
    way, _ = train_model.fit_into_memory(medium, lambda: medium, 8, machine(24), EIGHT_BIT)
    assert way.optimizer == EIGHT_BIT

    with pytest.raises(SystemExit) as ended:
        train_model.fit_into_memory(medium, lambda: medium, 8, machine(7), FUSED)
    assert str(ended.value) == (
        "The unfinished run was begun with adamw_torch_fused, which needs more than the 7.0 GB of memory that are free "
        "now: close other programs to continue it, or throw it away with --fresh."
    )


def test_a_stopped_run_goes_on_with_its_optimizer_where_memory_now_allows_another(
    gpt2_folder, data_folder, tmp_path, monkeypatch
):
    little = ((EIGHT_BIT, False),)
    monkeypatch.setattr(train_model, "OPTIMIZERS", little)
    whole = run(gpt2_folder, data_folder, tmp_path / "whole", *LEARN)
    stopped(gpt2_folder, data_folder, tmp_path / "stopped", *LEARN)
    monkeypatch.setattr(train_model, "OPTIMIZERS", ((FUSED, False), *little))
    continued = run(gpt2_folder, data_folder, tmp_path / "stopped", *LEARN)
    assert losses(continued) == losses(whole)
    assert continued["plan"]["optimizer"] == EIGHT_BIT


def test_several_processes_plan_from_the_least_memory_and_with_their_gradients_twice(medium, monkeypatch):
    process = argparse.Namespace(device=torch.device("cpu"), num_processes=2)
    monkeypatch.setattr(train_model, "gather_object", lambda mine: [*mine, 3])
    assert train_model.look_at_machine(process, "auto").free_memory == 3

    way = train_model.WayToTrain(FUSED, False, 1)
    one, two = (train_model.memory_needed(medium, machine(24, processes=n), way) for n in (1, 2))
    assert {name: two[name] - one[name] for name in one if two[name] != one[name]} == {
        "gradients": 4 * medium.parameters
    }


@pytest.mark.parametrize(("capability", "repeated"), [((7, 5), True), ((8, 6), False)])
def test_an_old_card_repeats_keys_instead_of_taking_the_plainest_kernel(capability, repeated, monkeypatch):
    monkeypatch.setattr(sdpa_attention, "use_gqa_in_sdpa", before := (lambda *_: True))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", lambda wanted: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (int(7e9), int(8e9)))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda share: None)
    train_model.prepare_card(torch.device("cuda"))
    assert (sdpa_attention.use_gqa_in_sdpa is not before) == repeated
    assert sdpa_attention.use_gqa_in_sdpa(None, None, None) != repeated


def test_grouped_queries_give_the_same_with_repeated_keys(llama_folder, monkeypatch):
    model = train_model.load_model(llama_folder).eval()
    ids = torch.arange(8).reshape(1, 8)
    with torch.no_grad():
        usual = model(input_ids=ids).logits
        monkeypatch.setattr(sdpa_attention, "use_gqa_in_sdpa", lambda *_: False)
        assert torch.allclose(model(input_ids=ids).logits, usual, atol=1e-5)


def test_a_number_that_no_card_has_is_not_taken_for_an_old_driver(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    for number, remedy in {"7": "CUDA_VISIBLE_DEVICES is '7', which names none of the cards", "0": "newer"}.items():
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", number)
        assert remedy in train_model.tell_remedy("No CUDA GPUs are available")


def test_emulated_bfloat16_is_refused_for_training(monkeypatch):
    monkeypatch.setattr(train_model, "free_memory", lambda device: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA GeForce RTX 2080")
    with pytest.raises(SystemExit, match='needs memory that the plan does not count: set PRECISION = "auto"'):
        train_model.look_at_machine(argparse.Namespace(device=torch.device("cuda"), num_processes=1), "bf16")


def test_a_card_needs_room_for_the_weights_in_the_computer_s_memory_too(medium, monkeypatch):
    large = replace(medium, parameters=int(1.7e9))
    for available, fits in ((int(8e9), True), (int(7e9), False)):
        memory = psutil.virtual_memory()._replace(available=available)
        monkeypatch.setattr(train_model.psutil, "virtual_memory", lambda memory=memory: memory)
        train_model.check_host_memory(large, machine(8, "cpu"))
        if fits:
            train_model.check_host_memory(large, machine(8))
        else:
            with pytest.raises(SystemExit, match=r"memory first, which needs 7\.8 GB, and 7\.0 GB are free"):
                train_model.check_host_memory(large, machine(8))


def test_without_bitsandbytes_no_plan_needs_it(medium, monkeypatch):
    assert all("8bit" not in way[0] for way in train_model.ways_to_train(medium, torch.device("mps")))
    monkeypatch.setattr(train_model.importlib.util, "find_spec", lambda name: None)
    with_adapters = replace(medium, lora_rank=16, trained=6_291_456)
    with pytest.raises(SystemExit, match="set LORA_RANK = 16"):
        train_model.fit_into_memory(medium, lambda: with_adapters, 8, machine(7))


# ---------------------------------------------------------------------------- asking an adapted model
@pytest.mark.parametrize(("shape", "fits"), [*((shape, True) for shape in SHAPES), ("llama", False)])
def test_an_adapted_model_answers_and_is_measured_in_float16(
    shape, fits, shapes, data_folder, tmp_path, monkeypatch, capsys
):
    """On a card before sm_80; what is held in half precision runs under autocast, or is not held so."""
    monkeypatch.setattr(train_model, "LORA_RANK", 4)
    run(shapes[shape], data_folder, tmp_path / "model", "--max-steps", "2")
    report = json.loads((tmp_path / "model" / "training_report.json").read_text())
    report["plan"]["precision"] = "fp16"
    (tmp_path / "model" / "training_report.json").write_text(json.dumps(report))

    monkeypatch.setattr(train_model, "pick_precision", lambda *_: "fp16")
    monkeypatch.setattr(asking, "WORDS_TO_WRITE", 30)
    if not fits:
        monkeypatch.setattr(test_model, "fits_float16", lambda *_: False)
    arguments = ["--model-dir", str(tmp_path / "model"), "--data-dir", str(data_folder), "--cpu"]
    assert test_model.main([*arguments, "--prompt", "hi", "--max-new-tokens", "5"]) == 0
    assert test_model.main([*arguments, "--report", "--quick", "--max-new-tokens", "5"]) == 0
    result = json.loads((tmp_path / "model" / "voice_report.json").read_text())
    assert math.isfinite(result["learned"]["held_out"]["gain"])
