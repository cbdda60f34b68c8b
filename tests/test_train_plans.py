"""train_model.py: memory, disk, precision and the card."""

import argparse
import contextlib
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import make_model_folder
from torch.nn import functional
from training import run, settings_with, train_this_way

import train_model

pytestmark = pytest.mark.usefixtures("small_training")


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_attention_in_bfloat16_gives_the_gradients_of_the_fused_kernel(architecture, tmp_path):
    """And goes away with its context: the evaluation of the same model is exact again."""
    model = train_model.load_for_training(
        make_model_folder(tmp_path / architecture, architecture, chatml=False)
    ).train()
    ids = list(range(5, 45))
    row = {"input_ids": ids, "labels": ids, "position_ids": [*range(25), *range(15)]}
    batch = train_model.collate([row])

    gradients = {}
    for attention in (train_model.attention_in_bfloat16, contextlib.nullcontext):
        model.zero_grad()
        with train_model.autocast(model.device, "bf16"), attention():
            logits, targets = train_model.scored_logits(model, batch)
        train_model.SummedCrossEntropy.apply(logits, targets).backward()
        gradients[attention] = torch.cat([weight.grad.flatten() for weight in model.parameters()])

    assert functional.cosine_similarity(*gradients.values(), dim=0) > 0.999
    assert not torch.equal(*gradients.values())
    assert not torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed()
    assert torch.backends.cuda.flash_sdp_enabled()


@pytest.mark.slow
def test_a_run_in_bfloat16_learns_also_where_activations_are_computed_twice(
    gpt2_folder, data_folder, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(train_model, "is_on_windows_drive", lambda folder: True)
    monkeypatch.setattr(train_model, "pick_precision", lambda *_: "bf16")
    train_this_way(monkeypatch, checkpointing=True)
    report = run(gpt2_folder, data_folder, tmp_path / "model", "--max-steps", "6", "--learning-rate", "1e-2")
    assert report["best"]["eval_loss"] < report["base"]["eval_loss"]
    assert capsys.readouterr().err.count("is on a Windows drive") == 1


FULL = "model    gpt2, 355M parameters, bf16 on cuda"
ADAPTED = "model    gpt2, 355M parameters frozen, 18.1M trained in adapters of rank 16, bf16 on cuda"


@pytest.mark.parametrize(
    ("optimizer", "checkpointing", "rank", "first"),
    [
        ("adamw_torch_fused", False, 0, [FULL]),
        ("adamw_bnb_8bit", False, 0, ["Memory is short: training with adamw_bnb_8bit", FULL]),
        (
            "adamw_bnb_8bit",
            True,
            16,
            ["Memory is short: training with adamw_bnb_8bit and recomputed activations.", ADAPTED],
        ),
    ],
)
def test_a_plan_says_what_is_saved_when_memory_is_short(optimizer, checkpointing, rank, first, capsys):
    plan = train_model.Plan("cuda", "bf16", optimizer, checkpointing, 2, 4, 20, 354_823_168, rank, 18_087_936)
    memory = {"weights": int(2.1e9), "optimizer": int(0.7e9)}
    plan = replace(plan, rows=1320, updates=495, memory=memory, free_memory=int(7.6e9))
    train_model.say_plan(plan, settings_with(base_model="gpt2"))
    lines = capsys.readouterr().err.splitlines()
    assert lines[:-2] == first
    assert lines[-2:] == [
        "data     1,320 rows of up to 64 tokens, 495 updates, 2 rows at once",
        "memory   2.8 GB (weights 2.1, optimizer 0.7) of 7.6 GB free",
    ]


@pytest.mark.parametrize(
    ("precision", "rank", "trained", "needed"),
    [
        ("fp16", 0, int(1e9), 28e9),  # two checkpoints of 12 bytes a parameter, and the best weights in 4
        ("fp16", 16, 10_000_000, 4.12e9),  # one checkpoint of the adapters, and two models of 2 bytes a parameter
        ("fp32", 16, 10_000_000, 8.12e9),
    ],
)
def test_the_disk_holds_checkpoints_of_what_is_trained_and_whole_models(precision, rank, trained, needed, tmp_path):
    plan = train_model.Plan("cuda", precision, "adamw_torch_fused", False, 1, 8, 20, int(1e9), rank, trained)
    assert train_model.check_disk(train_model.Places(tmp_path / "model"), plan).startswith(f"{needed / 1e9:.1f} GB of")


def test_what_cannot_fit_stops_before_anything_is_loaded(gpt2_folder, data_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(train_model, "free_memory", lambda device: int(5e8))
    monkeypatch.setattr(train_model, "load_for_training", None)
    with pytest.raises(SystemExit, match="choose a smaller BASE_MODEL or lower CONTEXT_TOKENS"):
        run(gpt2_folder, data_folder, tmp_path / "model")


def test_a_disk_without_room_stops_the_run(gpt2_folder, data_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(train_model.shutil, "disk_usage", lambda folder: argparse.Namespace(free=10))
    with pytest.raises(SystemExit, match="on disk for its checkpoints"):
        run(gpt2_folder, data_folder, tmp_path / "model")


def card(monkeypatch, capability: tuple[int, int], name: str = "NVIDIA GeForce RTX 2080") -> torch.device:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: name)
    return torch.device("cuda")


@pytest.mark.parametrize(
    ("capability", "fastest"),
    [((6, 1), "fp32"), ((7, 0), "fp16"), ((7, 5), "fp16"), ((8, 0), "bf16"), ((8, 9), "bf16"), ((12, 0), "bf16")],
)
def test_a_card_trains_in_what_it_is_made_for(capability, fastest, monkeypatch, capsys):
    device = card(monkeypatch, capability)
    assert train_model.pick_precision(device, "auto") == fastest
    assert [train_model.pick_precision(device, wanted) for wanted in ("fp16", "fp32")] == ["fp16", "fp32"]
    assert not capsys.readouterr().err


def test_an_old_card_that_has_to_emulate_is_told_what_is_faster(monkeypatch, capsys):
    assert train_model.pick_precision(card(monkeypatch, (7, 5)), "bf16") == "bf16"
    assert 'RTX 2080 only emulates bfloat16: PRECISION = "fp16" (or "auto") is faster' in capsys.readouterr().err


def test_a_card_without_kernels_is_named(monkeypatch):
    def without_kernels(*_, **__):
        raise RuntimeError("CUDA error: no kernel image is available for execution on the device")

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    card(monkeypatch, (6, 1), "NVIDIA GeForce GTX 1080")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "ones", without_kernels)
        sentence = (
            r"GeForce GTX 1080 is there and PyTorch .* cannot use it \(.* no kernel image .*\): install another .*--cpu"
        )
        with pytest.raises(SystemExit, match=sentence):
            train_model.check_card(cpu_wanted=False)
        train_model.check_card(cpu_wanted=True)
    monkeypatch.setattr(torch, "ones", lambda *_, **__: torch.tensor(1.0))
    train_model.check_card(cpu_wanted=False)


def machine(monkeypatch, folder: Path, says: str, status: int = 0) -> None:
    """One whose nvidia-smi says this."""
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/sh\necho '{says}'\nexit {status}\n")
    program.chmod(0o700)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setattr(torch, "ones", refuse)


def refuse(*_, **__):
    raise RuntimeError("The NVIDIA driver on your system is too old (found version 11040). Please update your GPU")


def test_a_driver_that_is_too_old_ends_the_run_unless_the_cpu_is_wanted(tmp_path, monkeypatch):
    machine(monkeypatch, tmp_path, "NVIDIA GeForce RTX 2080, 470.82.01")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with pytest.raises(SystemExit) as error:
        train_model.check_card(cpu_wanted=False)
    assert str(error.value) == (
        f"NVIDIA GeForce RTX 2080 (driver 470.82.01) is there and PyTorch {torch.__version__} cannot use it (The "
        "NVIDIA driver on your system is too old (found version 11040)): CUDA 13.0 needs the driver 580 or newer; "
        "update it (for WSL, in Windows) and restart, or install another PyTorch for it "
        "(https://pytorch.org/get-started/locally), or train without the card, which is slow: --cpu."
    )
    train_model.check_card(cpu_wanted=True)


def test_a_pytorch_without_cuda_beside_a_card_is_one_sentence(tmp_path, monkeypatch):
    machine(monkeypatch, tmp_path, "NVIDIA GeForce RTX 3060, 580.10")
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(
        SystemExit, match=r"RTX 3060 \(driver 580\.10\) is there and PyTorch .*: install another PyTorch"
    ):
        train_model.check_card(cpu_wanted=False)


@pytest.mark.parametrize(("says", "status"), [("No devices were found", 0), ("failed to initialize NVML", 18)])
def test_a_machine_without_a_card_trains_on_its_cpu(says, status, tmp_path, monkeypatch, capsys):
    """Under WSL that may be a card of Intel's, so that it is said and is no error."""
    machine(monkeypatch, tmp_path, says, status)
    train_model.check_card(cpu_wanted=False)
    assert not capsys.readouterr().err
    monkeypatch.setattr(train_model, "CARD_OF_WSL", tmp_path)
    train_model.check_card(cpu_wanted=False)
    assert "WSL sees a graphics card and no NVIDIA driver" in capsys.readouterr().err


def test_a_card_that_its_user_hides_counts_as_none(tmp_path, monkeypatch):
    machine(monkeypatch, tmp_path, "NVIDIA GeForce RTX 3060, 580.10")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    train_model.check_card(cpu_wanted=False)


def test_a_card_has_no_attention_of_cudnn_and_a_limit_at_what_is_free(monkeypatch):
    """8 GB, of which a desktop holds one; and a card that is all but full."""
    said = []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 6))
    monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", lambda wanted: said.append(("cudnn", wanted)))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda share: said.append(("share", share)))
    for free in (int(7e9), int(4e8)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda free=free: (free, int(8e9)))
        train_model.prepare_card(torch.device("cuda"))
    assert said == [("cudnn", False), ("share", pytest.approx(6.7 / 8)), ("cudnn", False), ("share", 0.1)]
    train_model.prepare_card(torch.device("cpu"))
    assert len(said) == 4


@pytest.mark.parametrize(
    ("release", "folder", "warned"),
    [
        ("5.15.153.1-microsoft-standard-WSL2", "/mnt/c/Users/judy/model", True),
        ("5.15.153.1-microsoft-standard-WSL2", "/mnt/c", True),
        ("5.15.153.1-microsoft-standard-WSL2", "/mnt/wsl/model", False),
        ("5.15.153.1-microsoft-standard-WSL2", "/home/judy/model", False),
        ("5.15.153.1-microsoft-standard-WSL2", "/mnt", False),
        ("6.1.0-18-amd64", "/mnt/c/model", False),
    ],
)
def test_a_windows_drive_is_known_by_its_place_under_wsl(release, folder, warned, monkeypatch):
    monkeypatch.setattr(train_model.platform, "release", lambda: release)
    assert train_model.is_on_windows_drive(Path(folder)) == warned


@pytest.mark.parametrize(
    ("fast", "wanted", "picked", "said"),
    [
        (True, "auto", "bf16", ""),
        (True, "bf16", "bf16", ""),
        (True, "fp16", "fp32", "This CPU is slow in fp16; using float32.\n"),
        (True, "fp32", "fp32", ""),
        (False, "auto", "fp32", "This CPU is slow in bf16; using float32.\n"),
        (False, "bf16", "fp32", "This CPU is slow in bf16; using float32.\n"),
        (False, "fp32", "fp32", ""),
    ],
)
def test_a_processor_trains_in_bfloat16_if_it_has_kernels_for_it(fast, wanted, picked, said, monkeypatch, capsys):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": fast})
    assert train_model.pick_precision(torch.device("cpu"), wanted) == picked
    assert capsys.readouterr().err == said
