"""Fine-tune a small language model on the conversations that extract_blog_data.py wrote.

    python train_model.py

Reads data/train_data.jsonl and data/val_data.jsonl. Writes blog-model-final/: a model folder that transformers loads
as it is (safetensors), with a model card (README.md), training_report.json, loss_curve.png and a Modelfile for Ollama.
A run that is stopped continues from its last checkpoint, in blog-model-final-unfinished/, when it is started again.
Nothing else is written, and no folder is replaced that this script did not write.

Each line is a section below.

    settings, command line                    constants and flags become one record, before the slow libraries load
    the run              train                the whole story, one paragraph a step: read this first
    folders              check_places         what may be written, one run a folder, how a model replaces another
    loading              load_config          config, tokenizer and weights: complete, and without code of their own
    conversations        read_conversations   one line of the data is one conversation
    tokens               conversation_tokens  the model's chat template, and which tokens are the author's
    rows                 make_rows            windows of 512 tokens; short ones share a row
    model and loss       conversation_losses  float32 weights; the loss of the author's tokens only
    plan                 make_plan            precision, optimizer, memory and disk, before any weights are loaded
    adapters             add_adapters         LORA_RANK: a frozen base and thin matrices, merged when it is saved
    learning rate        find_rates           LEARNING_RATE = "auto": three short runs choose it
    training             build_trainer        Trainer with our loss and our evaluation; what happens between updates
    unfinished runs      open_unfinished      which checkpoint may be continued
    the finished folder  save_companions      model card, curve, report; the saved model is loaded and measured again
    graphics cards       check_card           what must be checked or set before a card is used
    speed on a CPU       (its table)          six tricks that only save time; a reader may skip them
    for Ollama           modelfile            the chat template in Ollama's language
    signals and errors   main                 every error is one sentence
"""

# ruff: noqa: E402 - settings are on top; the command line is read before the libraries are loaded, which takes seconds
from __future__ import annotations  # so that the run may stand above the classes that it uses

# ---------------------------------------------------------------------------- settings
BASE_MODEL = "gpt2-medium"  # a name on the Hugging Face hub, or a model folder; 355M parameters fit 8 GB
DATA_DIR = "data"
OUTPUT_DIR = "blog-model-final"

CONTEXT_TOKENS = 512  # longer posts are cut into windows of this length, shorter ones share one
OVERLAP_TOKENS = 32  # the last tokens of a window begin the next one, as context, and are not scored twice
ROWS_PER_UPDATE = 8  # 4,096 tokens; how many rows are computed at once depends on the memory
EPOCHS = 3
MAX_STEPS = 0  # updates; 0 = as many as the epochs need
# "auto" tries three for a few updates each and uses the best (`find_rates`), as none is best for every model: on
# two real blogs SmolLM2-135M wants 2e-4 and Gemma 3 270M 5e-5 (benchmarks/README.md); GPT2-medium is not measured.
# 2e-5 is too low to learn the voice, and 4e-4 overfits.
LEARNING_RATE = "auto"
WARMUP_SHARE = 0.1  # of all updates, rising to the learning rate; it falls to zero afterwards
# 0 trains all weights; 16 adapters on a frozen base model, so that 1 to 1.7 billion parameters fit 8 GB (64: 1 GB more,
# and room for more text). Adapters need ten times the LEARNING_RATE, 1e-3 (benchmarks/README.md); "auto" does that.
LORA_RANK = 0
DROPOUT = 0.0  # GPT-2 was trained with 0.1; it costs a fifth of the speed on a CPU
PRECISION = "auto"  # the fastest native one; or "bf16", "fp16", "fp32"; the weights that are trained are float32
SEED = 42

EVALUATIONS_PER_EPOCH = 2
PATIENCE = 3  # evaluations without a better one before training stops early
CHECKPOINT_MINUTES = 10  # of training that a crash can cost; GPT2-medium's checkpoint is 4.3 GB; 0 = every update
SAMPLE_PROMPT = "What's on your mind today?"  # answered at each evaluation
# The best of a small grid on two real blogs (benchmarks/README.md): most like the author without repeating itself more.
# A repetition penalty of 1.1 costs some of the voice; without one, 3 to 7 % of an answer repeats what it said before.
# "auto" lets an answer be as long as nine of ten posts (`answer_length`).
SAMPLING = {"temperature": 0.8, "top_k": 50, "top_p": 0.95, "repetition_penalty": 1.05, "max_new_tokens": "auto"}


import os
import signal

if __name__ == "__main__":
    stopped = []

    def stop_before(*_) -> None:
        """A signal handler for the seconds in which the libraries are loaded; then main takes over."""
        if stopped:  # of many signals one says so
            return
        stopped.append(True)
        try:
            os.write(2, b"Stopped before anything was begun.\n")
        finally:
            os._exit(1)

    # Ignored signals (nohup) stay ignored.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, stop_before)

import contextlib
import copy
import ctypes
import errno
import functools
import gc
import hashlib
import importlib.util
import inspect
import json
import logging
import math
import pickle
import platform
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.parse
import urllib.request
import warnings
import zipfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import extract_blog_data
from extract_blog_data import (
    FOLDER,
    NAME,
    SENTENCE,
    STOP_SIGNALS,
    Kind,
    Setting,
    above,
    check_settings,
    either,
    end_at_once,
    flag_type,
    hold_closed_streams,
    is_watched,
    on_signals,
    one_of,
    parser_of,
    print_or_exit,
    say_loading,
    tell_time,
    watched,
    whole,
)


# ---------------------------------------------------------------------------- command line
@dataclass(frozen=True)
class Settings:
    """The settings above, as a run has them: a flag stands in for its setting."""

    base_model: str
    data_dir: Path
    output_dir: Path
    context_tokens: int
    overlap_tokens: int
    rows_per_update: int
    epochs: float
    max_steps: int
    learning_rate: float | str
    warmup_share: float
    lora_rank: int
    dropout: float
    precision: str
    seed: int
    evaluations_per_epoch: int
    patience: int
    checkpoint_minutes: float
    sample_prompt: str
    sampling: dict
    fresh: bool
    cpu: bool


# Only these may differ between a run and the one that continues it: they do not change what the model learns.
NOT_IN_THE_IDENTITY = {"data_dir", "output_dir", "checkpoint_minutes", "sample_prompt", "sampling", "fresh", "cpu"}

HERE = Path(__file__).resolve().parent
AUTO = "auto"
PRECISIONS = ("bf16", "fp16", "fp32")


def is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


SHARE = Kind("a number from 0 and below 1", lambda value: is_number(value) and 0 <= value < 1)
POSITIVE = Kind("a number above 0", lambda value: is_number(value) and value > 0, float)
NOT_NEGATIVE = Kind("a number from 0", lambda value: is_number(value) and value >= 0)
SAMPLING_KINDS = {
    "temperature": POSITIVE,
    "top_k": whole(0, 1_000_000),
    "top_p": above(0, 1),
    "repetition_penalty": POSITIVE,
    "max_new_tokens": either(one_of(AUTO), whole(1, 1_000_000)),
}


def is_sampling(value: object) -> bool:
    if not isinstance(value, dict) or set(value) != set(SAMPLING_KINDS):
        return False
    return all(kind.allows(value[name]) for name, kind in SAMPLING_KINDS.items())


SAMPLING_WORDS = "a dict of " + ", ".join(f"{name} ({kind.words})" for name, kind in SAMPLING_KINDS.items())

# Every setting of the settings block; each is also a field of Settings.
SETTINGS = {
    "BASE_MODEL": Setting(NAME, '"gpt2-medium"', flag="--base-model"),
    "DATA_DIR": Setting(FOLDER, '"data"', flag="--data-dir"),
    "OUTPUT_DIR": Setting(FOLDER, '"blog-model-final"', flag="--output-dir"),
    "CONTEXT_TOKENS": Setting(whole(16, 1_000_000), "512"),
    "OVERLAP_TOKENS": Setting(whole(1, 500_000), "32"),
    "ROWS_PER_UPDATE": Setting(whole(1, 100_000), "8"),
    "EPOCHS": Setting(POSITIVE, "3", flag="--epochs"),
    "MAX_STEPS": Setting(whole(0, 1_000_000_000), "0", flag="--max-steps"),
    "LEARNING_RATE": Setting(either(one_of(AUTO), POSITIVE), '"auto"', flag="--learning-rate"),
    "WARMUP_SHARE": Setting(SHARE, "0.1"),
    "LORA_RANK": Setting(whole(0, 100_000), "16"),
    "DROPOUT": Setting(SHARE, "0.1"),
    "PRECISION": Setting(one_of("auto", *PRECISIONS), '"auto"'),
    "SEED": Setting(whole(0, 2**32 - 1), "42"),
    "EVALUATIONS_PER_EPOCH": Setting(whole(1, 100_000), "2"),
    "PATIENCE": Setting(whole(1, 100_000), "3"),
    "CHECKPOINT_MINUTES": Setting(NOT_NEGATIVE, "10"),
    "SAMPLE_PROMPT": Setting(SENTENCE, '"What is on your mind?"'),
    "SAMPLING": Setting(
        Kind(SAMPLING_WORDS, is_sampling),
        '{"temperature": 0.8, "top_k": 50, "top_p": 0.95, "repetition_penalty": 1.05, "max_new_tokens": "auto"}',
    ),
}


def parse_arguments(argv: list[str] | None) -> Settings:
    """The settings block with the flags applied; exits with a sentence if a setting or flag is wrong."""
    block = {name: globals().get(name) for name in SETTINGS}
    check_settings(block, SETTINGS, "train_model.py")
    if CONTEXT_TOKENS < 2 * OVERLAP_TOKENS:
        sys.exit("OVERLAP_TOKENS in train_model.py must be at most half of CONTEXT_TOKENS.")

    parser = parser_of("train_model.py", __doc__.splitlines()[0])
    for name, setting in SETTINGS.items():
        if setting.flag:
            default = HERE / block[name] if setting.kind is FOLDER else block[name]
            parser.add_argument(setting.flag, type=flag_type(setting), default=default, help=setting.kind.words)
    parser.add_argument("--fresh", action="store_true", help="do not continue an unfinished run")
    parser.add_argument("--cpu", action="store_true", help="train on the CPU even if there is a graphics card")

    fields = {name.lower(): value for name, value in block.items()} | vars(parser.parse_args(argv))
    fields["data_dir"] = Path(fields["data_dir"])
    fields["output_dir"] = Path(fields["output_dir"])
    return Settings(**fields)


def use_one_card() -> None:
    """One process uses one card, the first that is visible; torchrun starts a process for each."""
    if "WORLD_SIZE" not in os.environ:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0")
        os.environ["CUDA_VISIBLE_DEVICES"] = visible.split(",")[0]


if __name__ == "__main__":
    hold_closed_streams()
    parse_arguments(None)  # --help and a wrong flag do not wait for the libraries
    say_loading()
    use_one_card()

# Trainer imports peft, and peft bitsandbytes with a compiler, for 4-bit weights: two seconds. None are used here, so it
# is left to its optimizer to be loaded, and the warning about a package for such weights is kept silent.
sys.modules.setdefault("bitsandbytes", None)
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.CRITICAL)  # `shape_of` says what failed

import numpy as np
import psutil
import torch
import transformers
from accelerate import PartialState
from accelerate.utils import extract_model_from_parallel, gather_object
from filelock import FileLock, Timeout
from huggingface_hub import constants as hub
from huggingface_hub.errors import StrictDataclassError
from jinja2.exceptions import TemplateError
from matplotlib.figure import Figure
from peft import LoraConfig, PeftModel, get_peft_model
from peft.import_utils import is_bnb_4bit_available, is_bnb_available
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError, safe_open
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    EarlyStoppingCallback,
    GenerationConfig,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
)
from transformers.integrations import hub_kernels, sdpa_attention
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D

if sys.modules["bitsandbytes"] is None:
    # peft remembers the answer; its optimizer is loaded where it is used.
    is_bnb_available()
    is_bnb_4bit_available()
    del sys.modules["bitsandbytes"]

# ---------------------------------------------------------------------------- the run
DATA_FILES = {"train": "train_data.jsonl", "val": "val_data.jsonl"}


def train(settings: Settings) -> None:
    """One run. With several processes (torchrun) each calls this; all train, only the first writes and prints."""
    places = check_places(settings)
    check_card(settings.cpu)
    process = PartialState(cpu=settings.cpu or not torch.accelerator.is_available())
    prepare_card(process.device)
    if is_on_windows_drive(places.output):
        say(f"{places.output} is on a Windows drive, which is slow from WSL: --output-dir ~/my-model is faster.")

    with only_run(places, process):
        was_finished = process.is_main_process and recover(places)
        if agreed([was_finished])[0]:
            say(f"The last run was stopped while it put its model in place; that model is in {places.output} now.")
            return
        train_in(places, settings, process)


def train_in(places: Places, settings: Settings, process: PartialState) -> None:
    """The run itself; `places` are locked for it."""
    # Conversations become tokens, and tokens become rows, in which each of the author's tokens is scored once.
    check_data_folder(settings.data_dir)
    conversations = {split: read_conversations(settings.data_dir / name) for split, name in DATA_FILES.items()}
    check_hub(settings.base_model)
    config = load_config(settings.base_model)
    tokenizer = load_tokenizer(settings.base_model, vocabulary_of(config))
    tokenized = {split: tokenize(tokenizer, entries) for split, entries in conversations.items()}
    rows_of = split_rows(tokenized, config, settings, process.num_processes)
    say_data(tokenized, rows_of)

    # What cannot fit is said here, before minutes are spent on loading weights.
    begun = None if settings.fresh else begun_with(places.unfinished)
    machine = look_at_machine(process, settings.precision)
    plan = make_plan(settings, config, rows_of["train"], machine, begun)
    say_plan(plan, settings)
    say(f"disk     {check_disk(places, plan)}")

    # What only the model itself can tell changes the plan.
    model, is_packed, precision = load_and_test(settings, plan)
    if not is_packed:
        say("This architecture cannot keep packed documents apart: one window per row, which is slower.")
        rows_of = split_rows(tokenized, config, settings, process.num_processes, packed=False)
        say_data(tokenized, rows_of)
    if not is_packed or precision != plan.precision:
        machine = machine._replace(precision=precision)
        plan = make_plan(settings, config, rows_of["train"], machine, begun)
        say_plan(plan, settings)

    # The first process decides whether to continue; the others look at what it left.
    identity = identity_of_run(settings, plan.precision)
    with process.main_process_first():
        if process.is_main_process:
            open_unfinished(places.unfinished, identity, settings.fresh, plan.optimizer)
        checkpoint = last_checkpoint(places.unfinished)

    run = Run(settings, places.unfinished, plan, rows_of, count_data(conversations, rows_of))
    tried = {}
    if settings.learning_rate == AUTO:
        # Each trial loads a model of its own, so this one is dropped.
        del model
        free_model()
        tried = find_rates(run)
        run = replace(run, settings=replace(settings, learning_rate=best_rate(tried)))
        model = prepare_to_train(load_for_training(settings.base_model, settings.dropout), plan, settings)

    # From here on a kill costs at most CHECKPOINT_MINUTES of training.
    trainer = build_trainer(run, model, tokenizer)
    log = run_to_the_end(trainer, checkpoint, settings)
    if not process.is_main_process:
        return

    # Room for the model that `finish` loads to check what was saved.
    del model, trainer
    free_model()
    names = {"base_model": name_to_share(settings.base_model, places.output), "output_dir": places.output.name}
    report = {
        "settings": {**identity, **names},
        "data": run.data,
        "answer_tokens": answer_length(conversations["train"], tokenized["train"]),
        "plan": asdict(plan),
        "learning_rate": {"used": run.settings.learning_rate, "bits_per_byte_of_tried": tried},
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "log": without_samples(log),
    }
    outcome = finish(places, settings, tokenizer, rows_of["val"], process.device, report)
    print_or_exit(outcome, f"the model is in place; {outcome}")


def finish(places: Places, settings: Settings, tokenizer, rows: list[dict], device: torch.device, report: dict) -> str:
    """Complete the best model's folder, check it and put it in place; returns the verdict."""
    # The base model is not a candidate: if training made it worse, the report has to show that.
    base, *later = evaluations(report["log"])
    best = min(later, key=lambda entry: entry["eval_loss"])
    report["base"] = base
    report["best"] = best
    report["verdict"] = verdict(base, best, report["data"]["val"]["conversations"])
    report["advice"] = tell_epochs(base, later)

    save_companions(places.best, settings, tokenizer, report)
    check_saved(places.best, rows, device, report["plan"], best["eval_loss"])

    # The names must not reach the disk before what they name.
    close_to_others(places.best)
    flush_to_disk(places.best)
    put_in_place(places)
    return f"{report['verdict']} {report['advice']}".strip()


def check_hub(name: str) -> None:
    """If the hub cannot be reached, say so and look for the model `name` only among earlier downloads.

    Exits if `name` is the path of a folder that is not there. Without this huggingface_hub would wait 23 seconds for
    each file, in five more attempts. A proxy is not tested.
    """
    if Path(name).is_dir():
        return
    if name.startswith(("/", ".", "~")):
        sys.exit(f"There is no folder {name}: give the base model's folder, or its name on the hub, with --base-model.")
    if hub.is_offline_mode() or urllib.request.getproxies():
        return

    address = urllib.parse.urlsplit(hub.ENDPOINT)
    try:
        socket.create_connection((address.hostname, address.port or 443), timeout=10).close()
    except OSError as error:
        say(f"{hub.ENDPOINT} cannot be reached ({error.strerror or error}): only an earlier download can be used.")
        hub.HF_HUB_OFFLINE = True


def say(text: str, end: str = "\n") -> None:
    """Progress and diagnostics on stderr, from the first of several processes only."""
    if os.environ.get("RANK", "0") == "0":
        extract_blog_data.say(text, end)


# ---------------------------------------------------------------------------- folders
# Two folders are written, side by side. Whatever else is in them, and every other folder, is left alone.
#
#     blog-model-final/              the finished model; its training_report.json lists the files that are this script's
#     blog-model-final-unfinished/
#         train_model.lock           held while a run works, and the mark that the folder is this script's
#         run.json                   settings and data of the run
#         rates.json                 what the trials of the learning rate found
#         checkpoint-120/            to continue from
#         best/                      the best model so far
#         previous/                  the model of an earlier run, while it is replaced
#
# The model is replaced by renames only, because a rename is atomic:
#
#     step                     after a kill here                           what `recover` does at the next start
#     PLACE -> previous        nothing at the place, both models beside    moves the new one in
#     best  -> PLACE           the new one is at its place                 clears away
#     clear away               the same, with less beside it               clears away the rest
ADDED_LATER = {  # to a finished model, by test_model.py --report and `make gguf`
    "voice_report.json",
    "voice_report.html",
    ".voice_report.json.unfinished",
    ".voice_report.html.unfinished",
    "blog-model.gguf",
    "unfinished.gguf",
}
# What a run has in its unfinished folder, beside its checkpoints, the model before, and the lock.
FILES_OF_A_RUN = ("rates.json", "rates.json.new", "run.json", "run.json.new")
OF_A_RUN = ("best", "best-incomplete", "best-previous", "best-replaced", *FILES_OF_A_RUN)


class Places:
    """Where a run writes."""

    def __init__(self, output: Path):
        self.output = output  # the finished model; absolute, links followed
        self.unfinished = output.parent / f"{output.name}-unfinished"
        self.lock = self.unfinished / "train_model.lock"
        self.best = self.unfinished / "best"
        self.previous = self.unfinished / "previous"


def check_places(settings: Settings) -> Places:
    """Where this run may write; exits if other files are there. Nothing is touched."""
    try:
        places = Places(settings.output_dir.resolve())

        # Folders that hold more than a model, or that this run reads.
        keep = {
            "these scripts": HERE,
            "the current folder": Path.cwd(),
            "your home folder": Path.home(),
            "the data": settings.data_dir.resolve(),
        }
        if Path(settings.base_model).is_dir():
            keep["the base model"] = Path(settings.base_model).resolve()
        problem = why_not_to_write(places, keep)
    except (OSError, RuntimeError, ValueError) as error:  # a loop of links, a name that is too long or not UTF-8
        problem = f"cannot be used ({brief(error)})"

    if problem:
        sys.exit(f"--output-dir {settings.output_dir} {problem}: name a new folder, such as blog-model-final-2.")
    return places


def why_not_to_write(places: Places, folders_to_keep: dict[str, Path]) -> str:
    """Why these places must not be written, as the second half of a sentence; "" if they may be."""
    str(places.output).encode()  # raises UnicodeError if no file could name it
    base = folders_to_keep.get("the base model")
    if base and places.output.is_relative_to(base) and places.output != base:
        return "is inside the base model"
    for what, folder in folders_to_keep.items():
        if folder == places.output:
            return f"is {what}"
        if folder.is_relative_to(places.output):
            return f"holds {what} ({folder})"
        if folder.is_relative_to(places.unfinished):
            return f"needs {places.unfinished}, which is or holds {what}"

    if os.path.lexists(places.output):
        if not places.output.is_dir():
            return "is not a folder"
        if places.output.is_mount():
            return "is a mount point, which cannot be renamed"
        if any(places.output.iterdir()) and not hashes_of_ours(places.output):
            return "is a folder with files that train_model.py did not write"

    unfinished = places.unfinished
    if os.path.lexists(unfinished):
        # A run may have been killed before it wrote its lock.
        is_marked = places.lock.is_file() and not places.lock.is_symlink()
        is_folder = unfinished.is_dir() and not unfinished.is_symlink()
        if not is_folder or not (is_marked or not any(unfinished.iterdir())):
            return f"needs {unfinished}, which train_model.py did not write"
        if unfinished.is_mount():
            return f"needs {unfinished}, which is a mount point"
    return ""


def hashes_of_ours(folder: Path) -> dict[str, str]:
    """SHA-256 of the files that a run wrote into a model folder, by name; empty if none did."""
    listed = read_json_object(folder / "training_report.json").get("files")
    return listed if isinstance(listed, dict) else {}


@contextlib.contextmanager
def only_run(places: Places, process: PartialState) -> Iterator[None]:
    """Hold the lock of the unfinished folder; exits if another run holds it, and names that run."""
    if not process.is_main_process:
        yield
        return

    places.unfinished.mkdir(mode=0o700, parents=True, exist_ok=True)
    lock = FileLock(places.lock, timeout=0, mode=0o600)
    try:
        lock.acquire()
    except Timeout:
        other = places.lock.read_text(encoding="utf-8") or "another process"
        sys.exit(f"{places.output} is being trained by {other}: wait for it, or name another --output-dir.")
    places.lock.write_text(f"process {os.getpid()}, since {time.strftime('%H:%M on %d %B')}", encoding="utf-8")

    try:
        yield
    finally:
        # A run that ended before its first checkpoint leaves nothing behind.
        if {path.name for path in places.unfinished.iterdir()} <= {places.lock.name, "run.json"}:
            remove_run(places.unfinished)
            places.lock.unlink()
            places.unfinished.rmdir()
        lock.release()


def put_in_place(places: Places) -> None:
    """Make the complete model in `places.best` the one at `places.output`; exits if another was put there meanwhile."""
    problem = why_not_to_write(places, {})
    if problem:
        sys.exit(f"{places.output} {problem}: the new model is complete, in {places.best}; move one of the two away.")
    replace_by(places.best, places.output, places.previous)
    clear_up(places)


def replace_by(new: Path, place: Path, aside: Path) -> None:
    """Rename the folder `new` to `place`; a folder that was there is renamed to `aside`."""
    if place.exists():
        place.rename(aside)
    new.rename(place)


def recover(places: Places) -> bool:
    """Finish what a killed `put_in_place` began; whether there was something to finish."""
    if places.previous.exists():
        if places.best.exists() and places.output.exists():  # somebody has put another model there
            sys.exit(f"{places.output} and {places.previous} hold a model each: move one of the two away.")
        if places.best.exists():
            places.best.rename(places.output)
        elif not places.output.exists():
            sys.exit(f"{places.output} is gone, and {places.previous} holds an earlier model: move that one away.")
    elif not ((places.unfinished / "best-replaced").exists() and places.output.exists()):
        return False

    clear_up(places)
    return True


def clear_up(places: Places) -> None:
    """Remove the replaced model and the run; the user's own files move to the new model folder."""
    if places.previous.exists():
        keep_files_of_others(places.previous, places.output)
        # From here on it holds nothing to keep, even if removing it is interrupted.
        places.previous.rename(places.unfinished / "best-replaced")
    remove_run(places.unfinished)


def keep_files_of_others(old: Path, new: Path) -> None:
    """Move files that these scripts did not write, or that were changed since, to the new model folder; say so."""
    hashes = hashes_of_ours(old)
    for path in sorted(old.iterdir()):
        is_file = path.is_file() and not path.is_symlink()
        is_ours = path.name in ADDED_LATER or path.name == "training_report.json"
        if is_file and (is_ours or hashes.get(path.name) == file_hash(path)):
            continue

        place = new / path.name
        while os.path.lexists(place):
            place = place.with_name(place.name + "-previous")
        path.rename(place)
        say(f"Kept: {place}, which train_model.py did not write or which was changed since.")


def remove_run(folder: Path) -> None:
    """Remove a run's files from its unfinished folder; other files stay, and are named."""
    for path in [*checkpoints_of(folder), *(folder / name for name in OF_A_RUN)]:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)

    for path in folder.iterdir():
        if path.name not in ("train_model.lock", "previous"):
            say(f"Kept: {path}, which train_model.py did not write.")


def checkpoints_of(folder: Path) -> list[Path]:
    """The folders of checkpoints, whole or not, from the oldest."""
    found = [path for path in folder.glob("checkpoint-*") if path.name[11:].isdecimal() and path.is_dir()]
    return sorted(found, key=update_of)


def update_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


def write_whole(path: Path, text: str) -> None:
    """Write a file beside its place, flush it and rename it, so that it is never there in part."""
    new = path.with_name(path.name + ".new")
    with new.open("w", encoding="utf-8") as out:
        out.write(text)
        out.flush()
        os.fsync(out.fileno())
    new.replace(path)


def read_json_object(path: Path) -> dict:
    """The JSON object in a file; empty if there is no such file or no object in it."""
    content = None
    with contextlib.suppress(OSError, ValueError, RecursionError):
        if path.is_file():  # reading a pipe would block
            content = json.loads(path.read_bytes())
    return content if isinstance(content, dict) else {}


def close_to_others(folder: Path) -> None:
    """Make a model folder readable by its owner only, whatever the umask: it can repeat private text."""
    folder.chmod(0o700)
    for path in folder.rglob("*"):
        path.chmod(0o700 if path.is_dir() else 0o600)


def name_to_share(base_model: str, output: Path) -> str:
    """The base model's name in the finished folder: no absolute path, which would show whose machine it was."""
    path = Path(base_model)
    if not path.is_absolute():
        return base_model
    shares_only_root = os.path.commonpath([path, output]) == path.anchor
    return path.name if shares_only_root else os.path.relpath(path, output)


# ---------------------------------------------------------------------------- loading
# Every config, tokenizer and model is loaded here, also by test_model.py and the benchmarks.
class CannotLoad(Exception):
    """A model cannot be used; the message is one sentence with the next step."""


# What transformers and its parsers raise for files that are cut, of another kind or malicious.
LOADING_ERRORS = (
    OSError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ImportError,
    RuntimeError,
    ArithmeticError,
    AssertionError,
    EOFError,
    MemoryError,
    SafetensorError,
    StrictDataclassError,
    pickle.UnpicklingError,
)
GIT_LFS = b"version https://git-lfs"  # the start of the pointer that git-lfs leaves in a file's place
# Buffers in old files, which transformers does not all recognise; they hold nothing learned.
NOTHING_LEARNED = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq", ".position_ids")
TEMPLATE_SECONDS = 5  # CPU time for a conversation of two sentences
ANOTHER_MODEL = "choose another base model"


class Reading(contextlib.AbstractContextManager):
    """A context that turns errors in the files of the model `name` into CannotLoad."""

    def __init__(self, name: str | Path):
        self.name = name

    def __exit__(self, kind, error, traceback) -> None:
        # The tokenizers library raises plain Exception.
        is_ours = kind is Exception or isinstance(error, LOADING_ERRORS)
        if not is_ours or (isinstance(error, RuntimeError) and is_out_of_memory(error)):
            return

        message = (
            f"Cannot load {self.name}: give a model folder with --base-model, or connect to the hub ({brief(error)})."
        )
        if "trust_remote_code" in str(error):
            message = f"{self.name} needs code that comes with it (auto_map), which is never run: {ANOTHER_MODEL}."
        elif Path(self.name).is_dir():
            message = f"Cannot load {self.name}: {brief(error)}; copy it again or {ANOTHER_MODEL}."
        raise CannotLoad(message) from error


def brief(error: Exception) -> str:
    """The first line of an error's message, for use in a sentence."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].rstrip(".:")


def check_files(folder: Path) -> None:
    """Raises CannotLoad for the first file of a model folder that is damaged or not supported."""
    if (folder / "adapter_config.json").exists():
        raise CannotLoad(f"{folder} holds adapters without their base model: merge them into it first.")

    for path in sorted(folder.iterdir()):
        problem = damage_of(path)
        if problem:
            raise CannotLoad(f"{path} {problem}.")


def damage_of(path: Path) -> str:
    """What is wrong with a file of a model folder, as the second half of a sentence; "" if nothing is found."""
    if not path.is_file():
        is_read = path.suffix == ".safetensors" or path.name in (*MODEL_JSON, "chat_template.jinja")
        return "is not a file: copy it again" if is_read else ""
    with path.open("rb") as file:
        if file.read(len(GIT_LFS)) == GIT_LFS:
            return f"is only a pointer to the file: run `git lfs pull` in {path.parent}"

    copy = "is cut or damaged ({}): copy it again"
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt") as tensors:
                kinds = {key: tensors.get_slice(key).get_dtype() for key in tensors.keys()}  # noqa: SIM118
        except SafetensorError as error:
            return copy.format(brief(error))
        odd = [key for key, kind in kinds.items() if key.endswith("weight") and not kind.startswith(("F", "BF"))]
        return f"holds {odd[0]} as {kinds[odd[0]]}: use the model that it was quantised from" if odd else ""
    if path.name in MODEL_JSON:
        try:
            content = json.loads(path.read_bytes())
        except (ValueError, RecursionError) as error:
            return copy.format(brief(error))
        if not isinstance(content, dict):
            return "is not a JSON object: copy it again"
        parts = content.get("weight_map", {})
        if path.name.endswith(".index.json") and not all(str(part).endswith(".safetensors") for part in parts.values()):
            return "names a pickle, which is never loaded: copy the model as safetensors"
    return ""


MODEL_JSON = {
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "model.safetensors.index.json",
}


def load_config(name: str | Path, only_local: bool = False):
    """The config of a model that can be trained here; raises CannotLoad."""
    hub_kernels._kernels_enabled = False  # transformers would run code from the hub in place of its own
    hub.HF_HUB_DISABLE_TELEMETRY = True
    os.environ["DISABLE_SAFETENSORS_CONVERSION"] = "1"  # transformers would ask a server to convert other weights
    with Reading(name):
        if Path(name).is_dir():
            check_files(Path(name))
        config = AutoConfig.from_pretrained(name, trust_remote_code=False, local_files_only=only_local)

    # From here on nothing refers to code that comes with the model, and neither do the folders that are saved.
    for key in ("auto_map", "custom_pipelines"):
        if hasattr(config, key):
            delattr(config, key)

    # The loss needs logits by name, and nothing else.
    config.return_dict = True
    config.output_attentions = False
    config.output_hidden_states = False

    quantised = getattr(config, "quantization_config", None)
    if quantised:
        method = quantised.get("quant_method") if isinstance(quantised, dict) else None
        method = method or "quantization_config"
        raise CannotLoad(f"{name} is quantised ({method}): use the model that it was quantised from.")
    if getattr(config, "is_encoder_decoder", False):
        kind = f"an encoder-decoder ({config.model_type}), not a causal language model"
        raise CannotLoad(f"{name} is {kind}: {ANOTHER_MODEL}.")
    if "/" in str(getattr(config, "_attn_implementation", None)):
        raise CannotLoad(f"{name} needs attention code from the hub, which is never run: {ANOTHER_MODEL}.")
    return config


def vocabulary_of(config) -> int | None:
    """Rows of the model's embeddings; None if the config does not say."""
    return getattr(config.get_text_config(), "vocab_size", None)


def load_model(name: str | Path, config=None, only_local: bool = False):
    """A causal model in float32, complete: no tensor is missing, left over, misshapen or NaN. Raises CannotLoad.

    `config` is one from `load_config`, possibly changed.
    """
    config = config or load_config(name, only_local)
    with Reading(name):
        model, info = AutoModelForCausalLM.from_pretrained(
            name,
            config=config,
            dtype=torch.float32,
            trust_remote_code=False,
            use_safetensors=True,  # a pickle is a program
            local_files_only=only_local,
            output_loading_info=True,
            # They are listed in `info` instead, and named below.
            ignore_mismatched_sizes=True,
        )

    # transformers fills what is missing with random numbers and only warns.
    left_over = [key for key in info["unexpected_keys"] if not key.endswith(NOTHING_LEARNED)]
    problems = {
        "lacks {}": sorted(info["missing_keys"]),
        "has {}, which its config does not know": sorted(left_over),
        "has {} in another shape than its config says": sorted(key for key, *_ in info["mismatched_keys"]),
        "holds NaN or infinite weights in {}": [
            key for key, weight in model.named_parameters() if not torch.isfinite(weight).all()
        ],
    }
    for problem, tensors in problems.items():
        if tensors:
            more = f" and {len(tensors) - 1} more" if len(tensors) > 1 else ""
            raise CannotLoad(f"{name} {problem.format(tensors[0] + more)}: it is incomplete, copy it again.")
    return model


def load_tokenizer(name: str | Path, vocabulary: int | None = None, only_local: bool = False, is_tuned: bool = False):
    """The model's tokenizer with its chat template; without one it gets the plain one, unless the model `is_tuned`.

    Raises CannotLoad, also if it has tokens outside a `vocabulary` of this size.
    """
    with Reading(name):
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False, local_files_only=only_local)
        # If its files are missing, transformers makes an empty one.
        is_empty = not tokenizer.encode("x", add_special_tokens=False)
    tokenizer.init_kwargs.pop("auto_map", None)  # not used, and not to be saved
    tokenizer._auto_map = None
    if is_empty:
        raise CannotLoad(f"{name} has no tokenizer: copy tokenizer.json and tokenizer_config.json into it.")
    if tokenizer.eos_token is None:
        raise CannotLoad(f"The tokenizer of {name} has no end-of-text token, so the model could never learn to stop.")

    if tokenizer.chat_template is None:
        if is_tuned:
            raise CannotLoad(f"The tokenizer in {name} has no chat template.")
        # Llama's models have never seen a text without their beginning-of-sequence token.
        bos = "{{ bos_token }}" if starts_with_bos(tokenizer) else ""
        tokenizer.chat_template = bos + PLAIN_TEMPLATE
    # GPT-2 has none; any token will do, because padding is not scored.
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    check_tokens(tokenizer, name, vocabulary)
    return tokenizer


def check_tokens(tokenizer, name: str | Path, vocabulary: int | None) -> None:
    """Raises CannotLoad if the chat template fails or uses a token that the model does not have."""
    words = ("Tell me of the kettle.", "It sings at night.")
    question = {"role": "user", "content": words[0]}
    answer = {"role": "assistant", "content": words[1]}
    problem = ""
    try:
        with time_limit(TEMPLATE_SECONDS):
            whole = render_or_raise(tokenizer, [question, answer])
            render_or_raise(tokenizer, [question], add_generation_prompt=True)
        if not all(said in whole for said in words):
            problem = "leaves out part of the conversation"
        elif len(whole) > 100_000:
            problem = f"makes {len(whole):,} characters of two sentences"
    except TEMPLATE_ERRORS as error:
        problem = f"fails ({type(error).__name__}: {brief(error)})"
    if problem:
        raise CannotLoad(f"The chat template of {name} {problem}: {ANOTHER_MODEL}.")

    # Other control tokens (images) may be outside the vocabulary: `break_control_tokens` keeps them out.
    added = control_tokens(tokenizer)
    ordinary = [place for token, place in tokenizer.get_vocab().items() if token not in added]
    used = tokenizer.encode(whole, add_special_tokens=False)
    largest = max([*ordinary, *used, tokenizer.eos_token_id])
    if vocabulary and largest >= vocabulary:
        token = f"the token {tokenizer.convert_ids_to_tokens(largest)!r} as number {largest:,}"
        problem = f"has {token}, and the model knows {vocabulary:,}: the two do not belong together"
        raise CannotLoad(f"The tokenizer of {name} {problem}.")


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises TimeoutError after this much CPU time; has no effect outside the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def out_of_time(*_):
        raise TimeoutError(f"it needs more than {seconds} s")

    before = signal.signal(signal.SIGVTALRM, out_of_time)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


# ---------------------------------------------------------------------------- conversations
def check_data_folder(folder: Path) -> None:
    """Exits if the data files are not those that extraction_report.json was written with, if there is one."""
    hashes = read_json_object(folder / "extraction_report.json").get("sha256")
    for name in DATA_FILES.values():
        path = folder / name
        expected = hashes.get(name) if isinstance(hashes, dict) else None
        if expected and path.is_file() and expected != file_hash(path):
            sys.exit(
                f"{path} is not the file that extraction_report.json beside it was written with: run "
                'extract_blog_data.py again (or, after changing it by hand, take "sha256" out of the report).'
            )


def file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_conversations(path: Path) -> list[dict]:
    """The conversations of a JSONL file; exits at the first line that holds none."""
    if not path.is_file():
        sys.exit(f"{path} is missing: run extract_blog_data.py first.")

    # A model trained on half of the data would look like a success.
    conversations = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        conversation = parse_conversation(line)
        if conversation is None:
            sys.exit(f"{path}, line {number} holds no conversation with an answer: run extract_blog_data.py again.")
        conversations.append(conversation)

    if not conversations:
        sys.exit(f"{path} is empty: more posts are needed, see extraction_report.json beside it for what was left out.")
    return conversations


ROLES = ("system", "user", "assistant")


def parse_conversation(line: bytes) -> dict | None:
    """The conversation in a line of JSON, its roles in lower case; None if there is none, or no answer in it."""
    answers = []
    try:
        conversation = json.loads(line)
        for turn in conversation["messages"]:
            # Both raise TypeError for other types than str; encode raises UnicodeError for half a surrogate pair.
            turn["role"] = str.lower(turn["role"])
            text = str.encode(turn["content"])
            if turn["role"] not in ROLES:
                return None
            if turn["role"] == "assistant":
                answers.append(text)
    except (ValueError, LookupError, TypeError, RecursionError):
        return None

    return conversation if any(map(bytes.strip, answers)) else None


def author_bytes(conversations: list[dict]) -> int:
    """UTF-8 bytes of the author's text: the denominator of bits per byte."""
    turns = [turn for conversation in conversations for turn in conversation["messages"]]
    return sum(len(turn["content"].encode()) for turn in turns if turn["role"] == "assistant")


def count_data(conversations: dict[str, list[dict]], rows_of: dict[str, list[dict]]) -> dict[str, dict]:
    """What training_report.json says about each split."""
    return {
        split: {
            "conversations": len(entries),
            "private": sum(entry.get("visibility") == "private" for entry in entries),
            "author_tokens": scored_tokens(rows_of[split]),
            "author_bytes": author_bytes(entries),
        }
        for split, entries in conversations.items()
    }


# ---------------------------------------------------------------------------- tokens
# For models without a chat template. Plain text rather than new control tokens, whose embeddings would be untrained.
# `generation` marks the answer for tools that need it (TRL); rendering ignores it.
PLAIN_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "Assistant:{% generation %}{{ ' ' + message['content'] + eos_token }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ message['role'].capitalize() + ': ' + message['content'] + '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)


def starts_with_bos(tokenizer) -> bool:
    """Whether the tokenizer puts a beginning-of-sequence token before a text."""
    return tokenizer("x")["input_ids"][0] == tokenizer.bos_token_id


@functools.lru_cache(maxsize=4)
def control_tokens(tokenizer) -> frozenset[str]:
    """The added tokens of a tokenizer that are not text, of which `all_special_tokens` names only some."""
    found = set(tokenizer.all_special_tokens)
    for token in tokenizer.added_tokens_decoder.values():
        # Of those not marked as special, runs of spaces (Pythia, Gemma) and words are text; "<think>" is not.
        is_markup = token.content[:1] in ("<", "[", "{", "|") and any(map(str.isalnum, token.content))
        if token.special or is_markup:
            found.add(token.content)
    return frozenset(found)


@functools.lru_cache(maxsize=4)
def control_pattern(tokenizer) -> re.Pattern:
    """Matches any of the control tokens, the longest first."""
    longest_first = sorted(control_tokens(tokenizer), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)))


def break_control_tokens(text: str, tokenizer) -> str:
    """`text` with a space in each control token, so that it is encoded as words."""
    return control_pattern(tokenizer).sub(lambda found: f"{found[0][0]} {found[0][1:]}", text)


# A template is a program, and can fail like one.
TEMPLATE_ERRORS = (TemplateError, *LOADING_ERRORS)


def render(tokenizer, messages: list[dict], add_generation_prompt: bool = False) -> str:
    """A conversation as the model sees it, in its chat template; exits if the template refuses it."""
    try:
        return render_or_raise(tokenizer, messages, add_generation_prompt)
    except TEMPLATE_ERRORS as error:
        sys.exit(f"The model's chat template refuses a conversation: {brief(error)}.")


def render_or_raise(tokenizer, messages: list[dict], add_generation_prompt: bool = False) -> str:
    """A conversation in the chat template; raises TEMPLATE_ERRORS."""
    safe = [{**message, "content": break_control_tokens(message["content"], tokenizer)} for message in messages]
    return tokenizer.apply_chat_template(safe, tokenize=False, add_generation_prompt=add_generation_prompt)


def tokenize(tokenizer, conversations: list[dict]) -> list[tuple[list[int], list[bool]]]:
    return [conversation_tokens(tokenizer, conversation["messages"]) for conversation in conversations]


def conversation_tokens(tokenizer, messages: list[dict]) -> tuple[list[int], list[bool]]:
    """Token ids of a conversation, and for each whether it is scored: the author's words and the end of the turn.

    In ChatML, with the scored part in [brackets]; the author is the assistant, and the last character is a newline:

        <|im_start|>user
        Write a post about bread.<|im_end|>
        <|im_start|>assistant
        [It rises at night.<|im_end|>]

    Most templates do not mark the assistant's part, so it is what the full rendering adds to the prompt. If a template
    renders earlier turns differently once a later one follows (Qwen3), the later turn has its own context.
    """
    ids = []
    scored = []
    done = ""  # the rendering up to the end of the last answer
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue

        full = render(tokenizer, messages[: turn + 1])
        prompt, answer = split_at_answer(tokenizer, messages[: turn + 1], full)
        # Encoded separately, as in generation: no token may span the boundary.
        before = tokenizer.encode(prompt.removeprefix(done), add_special_tokens=False)
        reply, closed_at = reply_tokens(tokenizer, answer, message["content"])

        ids += before + reply
        scored += [False] * len(before)
        scored += [place <= closed_at for place in range(len(reply))]
        done = full
    return ids, scored


def split_at_answer(tokenizer, messages: list[dict], full: str) -> tuple[str, str]:
    """(prompt, answer): what the model is given to generate the last message, and what it should generate.

    `full` is the rendering of `messages`. If the prompt ends in something that the finished turn lacks (some templates
    open a thought and drop it later), it stays, because that is the prompt in generation.
    """
    words = break_control_tokens(messages[-1]["content"], tokenizer).strip()
    earlier = messages[:-1]

    prompt = ""
    if earlier:
        prompt = render(tokenizer, earlier, add_generation_prompt=True)
    if not prompt:  # the author speaks first
        prompt = full.partition(words)[0] if words else full

    # Where the turn lacks the end of the prompt, an answer may begin like it: "<3" where the prompt says <think>.
    shared = len(os.path.commonprefix([full, prompt]))
    place = full.find(words, max(0, shared - len(words)))
    begins = place if 0 <= place < shared < len(prompt) else shared
    return prompt, full[begins:]


def reply_tokens(tokenizer, text: str, content: str) -> tuple[list[int], int]:
    """Token ids of an answer, and the index of the control token that closes it; what follows is the template's."""
    control = control_ids(tokenizer)
    ids = tokenizer.encode(text, add_special_tokens=False)
    places = [place for place, token in enumerate(ids) if token in control]

    # Control tokens before the end of the words (such as an opened thought) do not close the answer.
    words = break_control_tokens(content, tokenizer).strip()
    start = 0 if text.startswith(words) else text.rfind(words)
    end = start + len(words)
    said = text[:end] if start >= 0 else ""  # the template may have changed the words
    said_ids = tokenizer.encode(said, add_special_tokens=False)
    opened = [token for token in said_ids if token in control]

    if len(opened) >= len(places):  # a template that never closes the turn
        return [*ids, tokenizer.eos_token_id], len(ids)
    return ids, places[len(opened)]


@functools.lru_cache(maxsize=4)
def control_ids(tokenizer) -> frozenset[int]:
    """Ids of the tokens that are marked as control tokens; one of them closes an answer."""
    marked = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return frozenset(marked | set(tokenizer.all_special_ids))


# ---------------------------------------------------------------------------- rows
UNSCORED = -100  # label of a token that is context only


class Window(NamedTuple):
    """Tokens of one conversation that the model reads at once."""

    ids: list[int]
    labels: list[int]  # the token itself where it is scored, else UNSCORED
    conversation: int  # its number in the data


def cut(ids: list[int], scored: list[bool], conversation: int, context: int, overlap: int) -> Iterator[Window]:
    """Windows of at most `context` tokens; each scored token has its label in exactly one of them."""
    labels = [token if counts else UNSCORED for token, counts in zip(ids, scored, strict=True)]
    step = context - overlap
    stop = max(len(ids) - overlap, 1)
    for start in range(0, stop, step):
        end = start + context
        # The overlap is context; it has its labels in the window before.
        repeated = overlap if start else 0
        fresh = labels[start + repeated : end]

        # A window without the author's tokens would cost time and teach nothing.
        teaches = any(label != UNSCORED for label in fresh)
        if teaches:
            window_labels = [UNSCORED] * repeated + fresh
            yield Window(ids[start:end], window_labels, conversation)


def pack(windows: list[Window], size: int) -> list[list[Window]]:
    """Windows in groups of at most `size` tokens, by best fit, the longest first."""
    groups = []
    open_groups = defaultdict(list)  # by the number of tokens that still fit
    for window in sorted(windows, key=lambda window: len(window.ids), reverse=True):
        length = len(window.ids)
        # The fullest group with enough room, or a new one.
        room = next((room for room in range(length, size) if open_groups[room]), size)

        if room < size:
            group = open_groups[room].pop()
        else:
            group = []
            groups.append(group)
        group.append(window)
        open_groups[room - length].append(group)
    return groups


def make_rows(
    tokenized: list[tuple[list[int], list[bool]]],
    context: int,
    overlap: int,
    packed: bool = True,
    multiple: int = 1,
) -> list[dict]:
    """Rows of up to `context` tokens from (ids, scored) of each conversation; rows without labels fill up a `multiple`.

    A row holds lists of its length: input_ids, labels, conversation (its number) and, if packed, position_ids, which
    restart at 0 in each window.
    """
    windows = []
    for number, (ids, scored) in enumerate(tokenized):
        windows += cut(ids, scored, number, context, overlap)

    groups = pack(windows, context) if packed else [[window] for window in windows]
    # Fillers do not change the loss: they have no label, and the loss is divided by the number of labels.
    filler = Window(ids=[0, 0], labels=[UNSCORED, UNSCORED], conversation=0)
    while len(groups) % multiple:
        groups.append([filler])

    rows = []
    for group in groups:
        row = {
            "input_ids": [token for window in group for token in window.ids],
            "labels": [label for window in group for label in window.labels],
            "conversation": [window.conversation for window in group for _ in window.ids],
        }
        if packed:
            row["position_ids"] = [place for window in group for place in range(len(window.ids))]
        rows.append(row)
    return rows


def split_rows(
    tokenized: dict[str, list], config, settings: Settings, processes: int, packed: bool = True
) -> dict[str, list[dict]]:
    """Rows of each split, no longer than the model has positions."""
    context = min(settings.context_tokens, positions_of(config, settings.context_tokens))
    overlap = min(settings.overlap_tokens, context // 2)
    # Whole updates, so that any number of processes shuffles the same rows into the same updates.
    multiple = math.lcm(settings.rows_per_update, processes)
    return {
        "train": make_rows(tokenized["train"], context, overlap, packed, multiple),
        "val": make_rows(tokenized["val"], context, overlap, packed),
    }


def positions_of(config, unlimited: int) -> int:
    """Tokens that the model can read at once; `unlimited` for a model without such a limit (Mamba, BLOOM)."""
    return getattr(config.get_text_config(), "max_position_embeddings", unlimited)


def say_data(tokenized: dict[str, list], rows_of: dict[str, list[dict]]) -> None:
    """A line per split; its two numbers of tokens are equal, or something was lost or is scored twice."""
    for split, entries in tokenized.items():
        tokens = sum(sum(scored) for _, scored in entries)
        say(
            f"{split:<8} {len(entries):,} conversations, {tokens:,} tokens of the author's, "
            f"{scored_tokens(rows_of[split]):,} scored an epoch"
        )


def scored_tokens(rows: list[dict]) -> int:
    return sum(label != UNSCORED for row in rows for label in row["labels"])


def collate(examples: list[dict]) -> dict[str, torch.Tensor]:
    """Rows as tensors of shape (rows, longest); padding is one more document, so no attention mask is needed."""
    longest = max(len(example["input_ids"]) for example in examples)
    batch = {}
    for name in examples[0]:
        # 0 in position_ids, too: it begins another document.
        filler = UNSCORED if name == "labels" else 0
        padded = [example[name] + [filler] * (longest - len(example[name])) for example in examples]
        batch[name] = torch.tensor(padded)
    return batch


# ---------------------------------------------------------------------------- model and loss
def load_for_training(name: str, dropout: float = 0.0):
    """The model in float32: bfloat16 weights would round updates of 2e-5 away. Raises CannotLoad."""
    config = load_config(name)
    set_dropout(config, dropout)
    usual_names = fuse_activations(config)
    if hasattr(config, "n_positions"):
        config.n_ctx = config.n_positions  # llama.cpp's converter needs it

    model = load_model(name, config)
    model.generation_config = GenerationConfig()  # sampling uses the setting SAMPLING
    for key, value in usual_names.items():  # the saved folder keeps the name that other tools know
        setattr(model.config, key, value)
    return model


def load_and_test(settings: Settings, plan: Plan) -> tuple[torch.nn.Module, bool, str]:
    """The model, ready to train; whether it suits packed rows; the plan's precision, or "fp32" if that one is wrong."""
    model = load_for_training(settings.base_model, settings.dropout)
    with Reading(settings.base_model):
        is_packed = keeps_documents_apart(model)
    model = prepare_to_train(model, plan, settings)
    if is_causal(model, plan.precision):
        return model, is_packed, plan.precision

    if plan.precision == "fp32":
        sys.exit(f"Tokens of {settings.base_model} see those after them, so it cannot learn to write: choose another.")
    say(f"In {plan.precision} this {plan.device.upper()} lets tokens see those after them: going on in float32.")
    return load_and_test(settings, replace(plan, precision="fp32"))


def set_dropout(config, dropout: float) -> None:
    """Set every dropout of the config; their names differ between architectures."""
    for key, value in config.to_dict().items():
        if key.endswith(("dropout", "pdrop")) and isinstance(value, float):
            setattr(config, key, dropout)


@torch.no_grad()
def keeps_documents_apart(model) -> bool:
    """Whether this architecture derives from the positions that a second document begins in a row."""
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return False

    # Eight different tokens at positions 0 to 3, twice, against the last four alone.
    ids = torch.arange(1, 9, device=model.device).reshape(1, 8) % vocabulary_of(model.config)
    positions = torch.arange(4, device=model.device).repeat(2).reshape(1, 8)
    model.eval()
    together = model(input_ids=ids, position_ids=positions, use_cache=False).logits[:, 4:]
    alone = model(input_ids=ids[:, 4:], use_cache=False).logits
    return torch.allclose(together, alone, atol=1e-4, rtol=1e-3)


# By how much of the largest logit others may move and still count as unmoved: some roundings. Guesses.
UNMOVED = {"fp32": 1e-4, "fp16": 2e-3, "bf16": 2e-2}


@torch.no_grad()
def is_causal(model, precision: str) -> bool:
    """Whether no token sees those after it, in the precision of the run and on its device.

    PyTorch for Macs computes wrong attention in half precision (https://github.com/pytorch/pytorch/issues/195910).
    """
    model.eval()
    # Another second half must not move the logits of the first.
    for half in (4, 32):
        ids = torch.arange(1, 1 + 3 * half, device=model.device) % vocabulary_of(model.config)
        first, second, another = ids.chunk(3)
        logits = []
        for rest in (second, another):
            row = torch.cat([first, rest])[None]
            with autocast(model.device, precision):
                logits.append(model(input_ids=row, use_cache=False).logits[0, :half].float())
        moved = (logits[0] - logits[1]).abs().max()
        if moved > UNMOVED[precision] * logits[0].abs().max():
            return False
    return True


def scored_logits(model, batch: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (scored tokens, vocabulary) and targets (scored tokens); others skip the output layer."""
    # The logits at a position predict the next token.
    labels = batch["labels"]
    following = functional.pad(labels[:, 1:], (0, 1), value=UNSCORED)
    keep = following != UNSCORED

    # No cache and no attention mask: with either, packed documents see each other.
    inputs = {name: batch[name] for name in ("input_ids", "position_ids") if name in batch}
    logits = model(**inputs, use_cache=False, logits_to_keep=keep).logits
    targets = following[keep]
    return logits, targets


@torch.inference_mode()
def conversation_losses(model, rows: list[dict]) -> np.ndarray:
    """Exact negative log-likelihood of the author's tokens of each conversation, in nats."""
    model.eval()
    last_numbers = [max(row["conversation"]) for row in rows]
    last = max(last_numbers, default=0)
    losses = np.zeros(last + 1)

    # One row at a time: nothing is padded, and logits are large.
    for row in watched(rows, "measuring row", len(rows)):
        tensors = collate([row])
        batch = {name: tensor.to(model.device) for name, tensor in tensors.items()}
        logits, targets = scored_logits(model, batch)
        nats = functional.cross_entropy(logits.float(), targets, reduction="none")

        # A row may hold several conversations. Nothing predicts its first token, so it has no loss.
        is_scored = np.array(row["labels"][1:]) != UNSCORED
        owners = np.array(row["conversation"][1:])[is_scored]
        np.add.at(losses, owners, nats.cpu().double().numpy())
    return losses


@torch.inference_mode()
def answer(model, tokenizer, prompt: str, sampling: dict, seed: int) -> str:
    """One answer to `prompt`, the same for the same weights; the random state of training is not changed."""
    model.eval()
    text = render(tokenizer, [{"role": "user", "content": prompt}], add_generation_prompt=True)
    inputs = tokenizer(text, return_tensors="pt", add_special_tokens=False).to(model.device)
    # Trainer has switched off the cache in the model's config.
    options = {**sampling, "do_sample": True, "use_cache": True, "pad_token_id": tokenizer.pad_token_id}

    cards = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=cards):
        torch.manual_seed(seed)
        [output] = model.generate(**inputs, **options)
    prompt_length = inputs["input_ids"].shape[1]
    return tokenizer.decode(output[prompt_length:], skip_special_tokens=True).strip()


# ---------------------------------------------------------------------------- plan
HALF_PRECISION = {"bf16": torch.bfloat16, "fp16": torch.float16}
FAST_BFLOAT16 = ("avx512_bf16", "amx_bf16")  # CPUs without them train faster in float32
# The first compute capability with native kernels: RTX 30xx and A100; V100 and RTX 20xx; all.
FIRST_CARDS = {"bf16": (8, 0), "fp16": (7, 0), "fp32": (0, 0)}

# From the most exact to the least memory: (Trainer's name of the optimizer, whether activations are recomputed).
OPTIMIZERS = (("adamw_torch_fused", False), ("adamw_bnb_8bit", False), ("adamw_bnb_8bit", True))
# The averages of adapters are small: recomputing activations saves more, and stays exact.
OPTIMIZERS_OF_ADAPTERS = (("adamw_torch_fused", False), ("adamw_torch_fused", True), ("adamw_bnb_8bit", True))


class WayToTrain(NamedTuple):
    """Choices that trade memory for speed; only the 8-bit optimizer changes the loss, and hardly."""

    optimizer: str
    checkpointing: bool  # activations are recomputed in the backward pass, which saves memory
    rows_at_once: int  # of one process


@dataclass(frozen=True)
class Plan:
    """How the run will be done. training_report.json keeps it under "plan"."""

    device: str
    precision: str  # "bf16", "fp16" or "fp32"
    optimizer: str  # see `WayToTrain`
    checkpointing: bool
    rows_at_once: int
    accumulation: int  # batches of one process in an update
    evaluate_every: int  # updates
    parameters: int  # of the model without adapters
    lora_rank: int = 0  # 0: all weights are trained
    trained: int = 0  # parameters: all, or those of the adapters
    rows: int = 0  # that hold a scored token
    updates: int = 0
    memory: dict[str, int] = field(default_factory=dict)  # bytes needed, by purpose
    free_memory: int = 0  # bytes


def say_plan(plan: Plan, settings: Settings) -> None:
    if (plan.optimizer, plan.checkpointing) != OPTIMIZERS[0]:
        recomputed = " and recomputed activations." if plan.checkpointing else ""
        say(f"Memory is short: training with {plan.optimizer}{recomputed}")

    size = f"{plan.parameters / 1e6:.0f}M parameters"
    if plan.lora_rank:
        size += f" frozen, {plan.trained / 1e6:.1f}M trained in adapters of rank {plan.lora_rank}"
    say(f"model    {settings.base_model}, {size}, {plan.precision} on {plan.device}")

    updates = f"{plan.updates} updates"
    if plan.rows_at_once > 1:
        updates += f", {plan.rows_at_once} rows at once"
    say(f"data     {plan.rows:,} rows of up to {settings.context_tokens} tokens, {updates}")

    parts = ", ".join(f"{name} {size / 1e9:.1f}" for name, size in plan.memory.items())
    needed = sum(plan.memory.values()) / 1e9
    free = plan.free_memory / 1e9
    say(f"memory   {needed:.1f} GB ({parts}) of {free:.1f} GB free")


class Machine(NamedTuple):
    """What a run can use, before its weights are loaded."""

    device: torch.device
    processes: int
    precision: str  # "bf16", "fp16" or "fp32"
    free_memory: int  # bytes


def look_at_machine(process: PartialState, wanted: str) -> Machine:
    free = free_memory(process.device)
    if process.num_processes > 1:
        # All must make the same plan, including the one whose card also shows the desktop.
        free = min(gather_object([free]))

    precision = pick_precision(process.device, wanted)
    if process.device.type == "cuda" and precision == "bf16" != fastest_precision(process.device):
        sys.exit('Training with emulated bfloat16 needs memory that the plan does not count: set PRECISION = "auto".')
    return Machine(process.device, process.num_processes, precision, free)


def make_plan(settings: Settings, config, rows: list[dict], machine: Machine, begun: str | None = None) -> Plan:
    """How to train on `rows`; exits if no way fits into memory. No weights are loaded for it.

    A run that was `begun` keeps this optimizer; how many rows are computed at once, and what is recomputed, may change.
    """
    longest = max(len(row["input_ids"]) for row in rows)
    with Reading(settings.base_model):
        shape = shape_of(config, settings, longest, machine)
    check_host_memory(shape, machine)
    rows_of_process = max(1, settings.rows_per_update // machine.processes)
    adapted = replace(settings, lora_rank=USUAL_RANK)
    with_adapters = functools.partial(shape_of, config, adapted, longest, machine)
    way, memory = fit_into_memory(shape, with_adapters, rows_of_process, machine, begun)

    # The rows are a multiple of an update's.
    updates_per_epoch = math.ceil(len(rows) / settings.rows_per_update)
    updates = settings.max_steps or math.ceil(updates_per_epoch * settings.epochs)
    return Plan(
        device=machine.device.type,
        precision=machine.precision,
        **way._asdict(),
        accumulation=rows_of_process // way.rows_at_once,
        # A run shorter than an epoch (MAX_STEPS) has its evaluations, too.
        evaluate_every=math.ceil(min(updates, updates_per_epoch) / settings.evaluations_per_epoch),
        parameters=shape.parameters,
        lora_rank=shape.lora_rank,
        trained=shape.trained,
        rows=sum(max(row["labels"]) != UNSCORED for row in rows),
        updates=updates,
        memory=memory,
        free_memory=machine.free_memory,
    )


def pick_precision(device: torch.device, wanted: str) -> str:
    """One of PRECISIONS for `wanted`, which may also be "auto"; says so if the device is slow in it."""
    fastest = fastest_precision(device)
    if device.type == "cuda":
        if wanted == "bf16" != fastest:
            name = torch.cuda.get_device_name(device)
            say(f'{name} only emulates bfloat16: PRECISION = "{fastest}" (or "auto") is faster on it.')
        return fastest if wanted == "auto" else wanted

    # Trainer refuses fp16 on every other device.
    wanted = "bf16" if wanted == "auto" else wanted
    if wanted not in ("fp32", fastest):
        say(f"This {device.type.upper()} is slow in {wanted}; using float32.")
        return "fp32"
    return wanted


def fastest_precision(device: torch.device) -> str:
    """The fastest of PRECISIONS that the device computes natively."""
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        return next(precision for precision, first in FIRST_CARDS.items() if capability >= first)

    # Of the other devices only a CPU is trusted.
    fast = device.type == "cpu" and any(torch.cpu.get_capabilities().get(name) for name in FAST_BFLOAT16)
    return "bf16" if fast else "fp32"


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Matrix products in `precision` over float32 weights; no effect for "fp32"."""
    return torch.autocast(device.type, HALF_PRECISION.get(precision), enabled=precision in HALF_PRECISION)


@dataclass(frozen=True)
class Shape:
    """What decides how much memory training a model needs."""

    parameters: int  # of the model without adapters
    embeddings: int  # of the parameters; those of tokens, and of positions where they are learned
    trained: int  # parameters: all, or those of the adapters
    vocabulary: int
    width: int  # channels that a layer hands to the next
    lora_rank: int  # 0: all weights are trained
    tokens: int  # of the longest row
    kept: tuple[int, ...]  # bytes of such a row that each layer keeps for the backward pass
    kept_besides: int  # bytes that the rest of the model keeps


def shape_of(config, settings: Settings, tokens: int, machine: Machine) -> Shape:
    """The shape of a model that is trained on rows of up to this many `tokens`. No weights are loaded for it."""
    config = copy.deepcopy(config)
    set_dropout(config, settings.dropout)
    fuse_activations(config)
    with torch.device("meta"):  # tensors with a shape and no memory
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False).train()
        parameters = model.num_parameters()
        embeddings = [module.weight for module in model.modules() if isinstance(module, torch.nn.Embedding)]
        if settings.lora_rank:
            model = add_adapters(model, machine.precision, settings)
        else:
            # Autocast would keep copies of the weights, which `memory_needed` counts with the weights.
            hold_in_half(model, machine.precision)

    kept = ()
    kept_besides = 0
    try:
        kept, kept_besides = bytes_kept(model, tokens, machine)
    except LOADING_ERRORS as error:  # some mixtures of experts
        say(f"What the layers of {config.model_type} keep in memory is not in the plan: {brief(error)}.")
    return Shape(
        parameters=parameters,
        embeddings=sum(weight.numel() for weight in embeddings),
        trained=sum(weight.numel() for weight in model.parameters() if weight.requires_grad),
        vocabulary=vocabulary_of(config),
        width=config.get_text_config().hidden_size,
        lora_rank=settings.lora_rank,
        tokens=tokens,
        kept=kept,
        kept_besides=kept_besides,
    )


def bytes_kept(model, tokens: int, machine: Machine) -> tuple[tuple[int, ...], int]:
    """Bytes of one row that each layer of `model` keeps for the backward pass, and that all the rest of it keeps.

    Measured in a forward pass of fake tensors, which have a shape and no memory; `model` is of no use afterwards.
    """
    saved = set()
    layers = []
    passes = {}  # of each kind of layer: what it hands on, and the bytes that it keeps

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved.add(tensor.untyped_storage())
        return tensor

    def total() -> int:
        return sum(storage.nbytes() for storage in saved - weights)

    # One pass through each kind of layer; a hybrid model has two or three. Kinds can differ in flags alone (Gemma 4).
    def pass_once(layer: torch.nn.Module, forward: Callable, *inputs, **options):
        values = [value for module in layer.modules() for value in vars(module).values()]
        kind = f"{layer} {[value for value in values if isinstance(value, str | bool)]}"
        if kind not in passes:
            before = total()
            passes[kind] = forward(*inputs, **options), total() - before
        handed_on, size = passes[kind]
        layers.append(size)
        return handed_on

    for layer in model.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            layer.forward = functools.partial(pass_once, layer, layer.forward)

    cpu = torch.device("cpu")  # its kernels keep what a card's do
    attention = attention_of(machine.device.type, machine.precision, checkpointing=False)
    saving = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with FakeTensorMode(), attention(), autocast(cpu, machine.precision), saving:
        parts = {}
        for name, part in [*model.named_parameters(), *model.named_buffers()]:
            parts[name] = torch.empty(part.shape, dtype=part.dtype, requires_grad=part.requires_grad)
        weights = {part.untyped_storage() for part in parts.values()}
        row = {"input_ids": torch.zeros(1, tokens, dtype=torch.long), "use_cache": False}
        torch.func.functional_call(model, parts, (), row)
        besides = total() - sum(size for _, size in passes.values())
    return tuple(layers), besides


def memory_needed(shape: Shape, machine: Machine, way: WayToTrain) -> dict[str, int]:
    """Bytes by purpose; autocast keeps a second copy of the weights except for "fp32"."""
    # Frozen weights are held in the precision of the computation, so autocast needs no copy of them.
    mixed = machine.precision != "fp32"
    low_precision = 2 if mixed else 0
    number = 2 if mixed else 4  # bytes of a frozen weight or a logit
    is_frozen = shape.lora_rank > 0
    frozen = shape.parameters * number if is_frozen else 0

    # AdamW's two averages, in one byte each with bitsandbytes, except for embeddings.
    in_full = shape.trained
    if "8bit" in way.optimizer:
        in_full = 0 if is_frozen else shape.embeddings
    averages = in_full * 8 + (shape.trained - in_full) * 2

    # With recomputation a layer keeps only its input, and the current layer everything.
    kept = sum(shape.kept)
    if way.checkpointing:
        kept = len(shape.kept) * shape.tokens * shape.width * 4 + max(shape.kept, default=0)

    # The peak is at one of two moments: the loss holds the logits, their gradient and float32 copies of a piece;
    # then the output layer, unless it is frozen, holds its gradient in both precisions.
    batch = shape.tokens * way.rows_at_once
    logits = batch * shape.vocabulary
    gradient = logits * (2 if machine.precision == "bf16" else 4)
    piece = min(batch, LOSS_PIECE[machine.device.type]) * shape.vocabulary * 8
    loss = logits * number + gradient + piece
    output_layer = gradient + logits * low_precision
    if not is_frozen:
        output_layer += shape.vocabulary * shape.width * (4 + low_precision)
    activations = way.rows_at_once * (kept + shape.kept_besides) + max(loss, output_layer)

    # An evaluation needs hardly any of them, but a copy of the frozen weights: see `merged`.
    if machine.device.type == "cpu":
        activations = max(activations, frozen)
    # Each of several processes has the gradients twice: its own, and in the buckets in which they are exchanged.
    gradients = shape.trained * (8 if machine.processes > 1 else 4)
    return {
        "weights": frozen + shape.trained * (4 + low_precision),
        "gradients": gradients,
        "optimizer": averages,
        "activations": activations,
    }


def fit_into_memory(
    shape: Shape, with_adapters: Callable[[], Shape], rows: int, machine: Machine, begun: str | None = None
) -> tuple[WayToTrain, dict[str, int]]:
    """The first way to train that leaves 1 GB free, with as many of an update's `rows` at once as it has room for.

    Returns it with its bytes by purpose; exits if there is none, and says whether adapters would fit.
    """
    fitting = first_that_fits(shape, rows, machine, begun)
    if fitting:
        return fitting

    free = f"{machine.free_memory / 1e9:.1f} GB"
    if begun and first_that_fits(shape, rows, machine):
        sys.exit(
            f"The unfinished run was begun with {begun}, which needs more than the {free} of memory that are free now: "
            "close other programs to continue it, or throw it away with --fresh."
        )

    way_out = "choose a smaller BASE_MODEL or lower CONTEXT_TOKENS."
    adapted = None if shape.lora_rank else first_that_fits(with_adapters(), rows, machine)
    if adapted:
        size = sum(adapted[1].values()) / 1e9
        adapters = f'LORA_RANK = {USUAL_RANK} with LEARNING_RATE = "auto" or {USUAL_RATE}'
        way_out = f"set {adapters}, which needs {size:.1f} GB, {way_out}"

    # The last way needs the least.
    way = WayToTrain(*ways_to_train(shape, machine.device)[-1], rows_at_once=1)
    needed = sum(memory_needed(shape, machine, way).values()) / 1e9
    sys.exit(f"Training needs about {needed:.1f} GB of memory plus 1 GB to spare and {free} are free: {way_out}")


def ways_to_train(shape: Shape, device: torch.device) -> list[tuple[str, bool]]:
    """Optimizer and recomputation; bitsandbytes may not be installed (macOS) and has no kernels for MPS."""
    ways = OPTIMIZERS_OF_ADAPTERS if shape.lora_rank else OPTIMIZERS
    has_8_bit = device.type != "mps" and importlib.util.find_spec("bitsandbytes") is not None
    return [way for way in ways if has_8_bit or "8bit" not in way[0]]


def first_that_fits(
    shape: Shape, rows: int, machine: Machine, begun: str | None = None
) -> tuple[WayToTrain, dict[str, int]] | None:
    # A card computes 2 or 8 rows in little more time than one; a CPU has enough to do with one.
    sizes = [1]
    if machine.device.type == "cuda":
        sizes = [size for size in (8, 4, 2, 1) if rows % size == 0]

    # 1 GB is a guess at what is not counted: CUDA's own memory, fragments, the desktop.
    for optimizer, checkpointing in ways_to_train(shape, machine.device):
        if begun and optimizer != begun:
            continue
        for size in sizes:
            way = WayToTrain(optimizer, checkpointing, size)
            memory = memory_needed(shape, machine, way)
            if sum(memory.values()) + 1e9 <= machine.free_memory:
                return way, memory
    return None


def check_host_memory(shape: Shape, machine: Machine) -> None:
    """Exits if a model for a card does not fit into the computer's memory, where it is loaded in float32 first."""
    needed = 4 * shape.parameters + 1e9
    free = psutil.virtual_memory().available
    if machine.device.type == "cuda" and needed > free:
        sys.exit(
            f"The model is loaded into the computer's memory first, which needs {tell_bytes(needed)}, and "
            f"{tell_bytes(free)} are free: choose a smaller BASE_MODEL, or under WSL set memory= in .wslconfig."
        )


def free_memory(device: torch.device) -> int:
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available


def check_disk(places: Places, plan: Plan) -> str:
    """Exits if the disk lacks room for a checkpoint, the best model, and one more of the larger of the two."""
    # Bytes a parameter: weights and two averages, or the weights alone.
    checkpoint = 12 * plan.trained
    is_half = plan.lora_rank and plan.precision != "fp32"
    best = plan.parameters * (2 if is_half else 4)
    # The old one stays until the new one is complete.
    needed = checkpoint + best + max(checkpoint, best)

    # The files of an unfinished run are kept or replaced.
    files = [path for path in places.unfinished.rglob("*") if path.is_file()]
    held = sum(path.stat().st_size for path in files)
    free = shutil.disk_usage(places.output.parent).free + held
    told = tell_bytes(free)
    if needed > free:
        sys.exit(f"Training needs {tell_bytes(needed)} on disk for its checkpoints, and {told} are free.")
    return f"{tell_bytes(needed)} of {told} free"


def tell_bytes(number: float) -> str:
    return f"{number / 1e9:.1f} GB" if number >= 1e8 else f"{number / 1e6:.1f} MB"


# ---------------------------------------------------------------------------- adapters
# Low-Rank Adaptation (https://arxiv.org/abs/2106.09685) with LORA_RANK = r, of all linear layers but the output layer:
#
#     y = W x + scale * B (A x)        W: out x in, frozen;  A: r x in, random;  B: out x r, zero at first
#
# Merged, W + scale * B A, whenever the model is measured, sampled or saved: merging rounds, so that only the merged
# model's loss is that of the saved model. The scale is LORA_ALPHA / r, so that one learning rate suits every rank. All
# linear layers, this alpha and ten times the rate of full training are best according to "LoRA Without Regret"
# (https://thinkingmachines.ai/blog/lora); rate and rank were also tried here: benchmarks/README.md.
LORA_ALPHA = 32
USUAL_RANK = 16  # a plan suggests it if full training does not fit
USUAL_RATE = "1e-3"  # with it; a tenth of it is too low for adapters


def layers_to_adapt(model) -> list[str]:
    """Names of the linear layers that get adapters: all but the output layer."""
    left_out = {model.get_output_embeddings()}
    for module in model.modules():
        # Mamba's fused kernels read the weights of all its layers but the first past an adapter.
        is_mamba = hasattr(module, "A_log") and hasattr(module, "D")
        if is_mamba:
            left_out.update(layer for name, layer in module.named_children() if name != "in_proj")

    linear = (torch.nn.Linear, Conv1D)  # GPT-2 has the second, with weights of in x out
    return [name for name, layer in model.named_modules() if isinstance(layer, linear) and layer not in left_out]


def add_adapters(model, precision: str, settings: Settings) -> PeftModel:
    """`model`, frozen and held in `precision`, with float32 adapters."""
    hold_in_half(model, precision)
    # With a name, peft would ask the hub for the base model's config at every checkpoint.
    model.name_or_path = ""
    config = LoraConfig(
        r=settings.lora_rank,
        lora_alpha=LORA_ALPHA,
        lora_dropout=settings.dropout,
        target_modules=layers_to_adapt(model),
        fan_in_fan_out=any(isinstance(layer, Conv1D) for layer in model.modules()),
    )

    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        torch.manual_seed(settings.seed)
        # peft uses a name that transformers has deprecated.
        warnings.simplefilter("ignore", FutureWarning)
        return get_peft_model(model, config)


def hold_in_half(model, precision: str) -> None:
    """Hold the matrices in the half precision that autocast would cast them to; "fp32" changes nothing.

    What one layer passes to the next stays float32 under autocast, as a sum over all layers in float16 loses terms.
    """
    if precision not in HALF_PRECISION:
        return
    for weight in model.parameters():
        if weight.dim() > 1:
            weight.data = weight.data.to(HALF_PRECISION[precision])
    model.get_input_embeddings().register_forward_hook(widen)


def widen(embedding, inputs: tuple, output: torch.Tensor) -> torch.Tensor:
    """A forward hook: float32 under autocast; a model entirely in half precision stays so."""
    return output.float() if torch.is_autocast_enabled(output.device.type) else output


@contextlib.contextmanager
def merged(model, seed: int):
    """Within this context the adapters of `model`, if it has any, are merged with the same rounding each time."""
    if not isinstance(model, PeftModel):
        yield
        return

    rng = torch.Generator(model.device).manual_seed(seed)
    layers = [layer for layer in model.modules() if isinstance(layer, LoraLayer)]
    weights = [layer.get_base_layer().weight.data for layer in layers]
    # Subtracting the adapters would not restore the frozen weights, which rounding changes.
    frozen = [weight.to("cpu", copy=True) for weight in weights]
    with model.disable_adapter():
        for layer, weight in zip(layers, weights, strict=True):
            learned = layer.get_delta_weight("default").detach()
            weight.copy_(rounded(weight.float() + learned, weight.dtype, rng))
        try:
            yield
        finally:
            for weight, before in zip(weights, frozen, strict=True):
                weight.copy_(before)


def rounded(values: torch.Tensor, number_type: torch.dtype, rng: torch.Generator) -> torch.Tensor:
    """float32 `values` as they are saved; to bfloat16 they are rounded stochastically, which keeps their mean.

    Near 0.2 bfloat16 has steps of 0.001 and an adapter adds 0.0002: rounded to nearest, four fifths of the weights
    would not change. SmolLM2-135M in bfloat16 with adapters of rank 16, two epochs of the sample blog, nats per token:
    3.849 before, 3.677 merged with rounding to nearest, 3.646 stochastic, 3.645 in float32 or (to nearest) float16.
    """
    if number_type != torch.bfloat16:
        return values.to(number_type)

    # bfloat16 is the upper half of float32's bits. The lower half plus a random number carries into it in proportion.
    bits = values.contiguous().view(torch.int32)
    noise = torch.randint(0, 1 << 16, bits.shape, dtype=torch.int32, device=bits.device, generator=rng)
    carried = bits + noise
    upper_half = carried & -(1 << 16)
    return upper_half.view(torch.float32).to(torch.bfloat16)


def without_adapters(model) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """(model, its weights by name) as if there were no adapters; call it while they are `merged`."""
    if not isinstance(model, PeftModel):
        return model, model.state_dict()

    base = model.get_base_model()
    weights = {}
    for name, weight in base.state_dict().items():
        if ".lora_" not in name:
            weights[name.replace(".base_layer.", ".")] = weight
    return base, weights


def prepare_to_train(model, plan: Plan, settings: Settings):
    """`model` on its device, ready for training, with adapters if the plan has any."""
    # Halved before it is moved to the card, which may not have room for it in float32.
    if plan.lora_rank:
        model = add_adapters(model, plan.precision, settings)
    model.to(PartialState().device)
    use_sparse_embedding_gradient(model)
    return model


# ---------------------------------------------------------------------------- learning rate
# LEARNING_RATE = "auto": a short run at each of three rates, from the same weights, with its own schedule, on the rows
# that the run begins with. The one with the lowest loss on some held-out posts is used; the run then starts again.
# Trials of two to eight updates on real blogs chose the first for Gemma 3 270M and the last for SmolLM2-135M
# (benchmarks/README.md). Higher rates look good in a trial and overfit later. For adapters: see LORA_ALPHA.
RATES_TO_TRY = (5e-5, 1e-4, 2e-4)
RATES_FOR_ADAPTERS = (5e-4, 1e-3, 2e-3)
TRIAL_UPDATES = 5  # at most
TRIALS_SHARE = 0.25  # of what the run costs, all trials together


def find_rates(run: Run) -> dict[float, float]:
    """Held-out bits per byte after a trial of each rate, by the rate.

    What an earlier start of this run has found, and left in its folder, is not tried again.
    """
    rates = RATES_FOR_ADAPTERS if run.plan.lora_rank else RATES_TO_TRY
    trial = shortened(run, len(rates))
    names = ", ".join(f"{rate:g}" for rate in rates)
    updates = f"{trial.plan.updates} updates of {trial.settings.rows_per_update} rows"
    say(f"rate     each of {names} has a trial of {updates}, from the same start")

    tried = known_rates(run.folder)
    for number, rate in enumerate(rates, start=1):
        began = time.monotonic()
        if rate not in tried:
            tried[rate] = try_rate(replace(trial, settings=replace(trial.settings, learning_rate=rate)))
            keep_rates(run.folder, tried)
            forget_trial(run.plan.optimizer)
        left = tell_time((time.monotonic() - began) * (len(rates) - number))
        outcome = "the loss became NaN"
        if math.isfinite(tried[rate]):
            outcome = f"{tried[rate]:.4f} bits per byte on held-out posts"
        say(f"rate     {rate:<6g}  {outcome}, {number} of {len(rates)} tried, {left} left")

    if all(map(math.isinf, tried.values())):
        remedy = f'PRECISION = "fp32", or a LEARNING_RATE below {rates[0]:g}'
        sys.exit(f"Training diverged at every learning rate that was tried: set {remedy}.")
    is_tie = len(set(tried.values())) == 1
    outcome = "used, the middle one, as all gave the same loss" if is_tie else "the best and is used"
    say(f"rate     {best_rate(tried):g} is {outcome}")
    return tried


def shortened(run: Run, times: int) -> Run:
    """A trial: `run` with so few updates and held-out rows that as many `times` cost at most TRIALS_SHARE of it."""
    rows = run.rows_of["train"]
    held_out = run.rows_of["val"]
    of_update = run.settings.rows_per_update
    row = count_tokens(rows) / len(rows)
    measured = count_tokens(held_out)
    evaluations = 1 + run.plan.updates / run.plan.evaluate_every
    # In tokens, which count three times in an update, forward and backward.
    cost = 3 * run.plan.updates * of_update * row + evaluations * measured
    budget = TRIALS_SHARE * cost / times

    # Two thirds are for the updates: rather several small ones, as the first has a rate of 0, the start of the warm-up.
    affordable = int(budget * 2 / 3 / (3 * row))
    updates = min(TRIAL_UPDATES, max(2, affordable // 2))
    of_update = min(of_update, max(2, affordable // updates))

    # Held-out rows are sorted by their length: every n-th, and at least one.
    left = budget - 3 * updates * of_update * row
    affordable = max(1, int(left / measured * len(held_out)))
    every = math.ceil(len(held_out) / affordable)
    some = held_out[::every]
    part = scored_tokens(some) / scored_tokens(held_out)
    of_val = {**run.data["val"], "author_bytes": run.data["val"]["author_bytes"] * part}

    here = max(1, of_update // PartialState().num_processes)
    at_once = math.gcd(run.plan.rows_at_once, here)
    ways = {"rows_at_once": at_once, "accumulation": here // at_once}
    return replace(
        run,
        settings=replace(run.settings, max_steps=updates, rows_per_update=of_update),
        plan=replace(run.plan, updates=updates, evaluate_every=updates, **ways),  # measured once, at its end
        rows_of={**run.rows_of, "val": some},
        data={**run.data, "val": of_val},
    )


def count_tokens(rows: list[dict]) -> int:
    return sum(len(row["input_ids"]) for row in rows)


def try_rate(trial: Run) -> float:
    """Held-out bits per byte after the updates of a trial; infinite if it diverged."""
    model = load_for_training(trial.settings.base_model, trial.settings.dropout)
    model = prepare_to_train(model, trial.plan, trial.settings)
    trainer = trainer_with([CastWeightsOnce(model.device), SaySkipped()], trial, model)
    trainer.train()

    [measured] = evaluations(trainer.state.log_history)
    bits = measured["eval_bits_per_byte"]
    return bits if math.isfinite(bits) else math.inf


def best_rate(tried: dict[float, float]) -> float:
    """The rate with the lowest loss; the middle one if all gave the same, as when float16 skips every update."""
    rates = sorted(tried)
    is_tie = len(set(tried.values())) == 1
    return rates[len(rates) // 2] if is_tie else min(rates, key=tried.get)


def forget_trial(optimizer: str) -> None:
    # bitsandbytes keeps a list of the layers with 32-bit averages, and with it their weights: 0.2 GB for GPT2-medium.
    if "8bit" in optimizer:
        from bitsandbytes.optim import GlobalOptimManager

        GlobalOptimManager.get_instance().initialize()
    free_model()


def known_rates(folder: Path) -> dict[float, float]:
    """The results of earlier trials of the run in `folder`; empty if they cannot be read."""
    found = read_json_object(folder / "rates.json")
    try:
        return {float(rate): math.inf if bits is None else float(bits) for rate, bits in found.items()}
    except (ValueError, TypeError):
        return {}


def keep_rates(folder: Path, tried: dict[float, float]) -> None:
    if PartialState().is_main_process:
        write_whole(folder / "rates.json", json.dumps(finite(tried)))


# ---------------------------------------------------------------------------- training
class BlogTrainer(Trainer):
    """Trainer with the loss of the author's tokens only, all of the same weight, and an exact evaluation."""

    def __init__(self, *arguments, validation_bytes: int = 0, precision: str = "fp32", **options):
        super().__init__(*arguments, **options)
        self.validation_bytes = validation_bytes  # UTF-8 bytes of the author's text in eval_dataset
        # Of forward pass and loss; Trainer's bf16=True would cover the backward pass and copy the logits to float32.
        self.precision = precision
        # compute_loss divides by the scored tokens of the whole update, so Trainer must count them, ...
        self.model_accepts_loss_kwargs = True
        # ... and must not divide by the number of batches again.
        self.loss_is_scaled_for_ga = True
        self.attention = attention_of(self.args.device.type, precision, self.args.activation_checkpointing)

    def compute_loss_context_manager(self) -> torch.autocast:
        return autocast(self.args.device, self.precision)

    def floating_point_ops(self, inputs) -> int:
        """Not used; Trainer would loop over all parameters for every batch."""
        return 0

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        with self.attention():
            logits, targets = scored_logits(model, inputs)
        loss = SummedCrossEntropy.apply(logits, targets) / num_items_in_batch
        return loss * self.accelerator.num_processes  # the processes average their gradients

    def evaluate(self, **_) -> dict[str, float]:
        """Nats per token and bits per byte over eval_dataset; Trainer's own is a mean of batch means."""
        give_back_memory()

        # Each process measures every n-th row; nats add up.
        rank = self.args.process_index
        mine = self.eval_dataset[rank :: self.args.world_size]
        # The merged model is measured, saved and sampled.
        with merged(self.model, self.args.seed):
            with self.compute_loss_context_manager():
                losses = conversation_losses(self.model, mine)
            nats = sum(gather_object([losses.sum()]))
            metrics = {
                "eval_loss": nats / scored_tokens(self.eval_dataset),
                "eval_bits_per_byte": nats / math.log(2) / self.validation_bytes,
            }
            self.log(metrics)
            self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


@dataclass(frozen=True)
class Run:
    """What is trained, and how; a trial of a learning rate is a short one."""

    settings: Settings
    folder: Path  # for checkpoints and the best model
    plan: Plan
    rows_of: dict[str, list[dict]]
    data: dict[str, dict]  # see `count_data`


def build_trainer(run: Run, model, tokenizer) -> BlogTrainer:
    # Called in this order: NaN ends the run before anything is printed, and Progress prints the sample of LogSample.
    callbacks = [
        CastWeightsOnce(model.device),
        StopAtNaN(),
        SaySkipped(),
        KeepBest(),
        LogSample(tokenizer, run.plan.precision, run.settings),
        Progress(run.data["train"]["author_tokens"], run.settings.sample_prompt),
        EarlyStoppingCallback(run.settings.patience),
    ]
    return trainer_with(callbacks, run, model)


def trainer_with(callbacks: list[TrainerCallback], run: Run, model) -> BlogTrainer:
    trainer = BlogTrainer(
        model=model,
        args=training_arguments(run),
        data_collator=collate,
        train_dataset=run.rows_of["train"],
        eval_dataset=run.rows_of["val"],
        validation_bytes=run.data["val"]["author_bytes"],
        precision=run.plan.precision,
        callbacks=callbacks,
    )

    # PrinterCallback prints log entries on stdout.
    trainer.remove_callback(PrinterCallback)
    scaler = trainer.accelerator.scaler
    if scaler:
        scaler.load_state_dict({**scaler.state_dict(), "scale": FIRST_SCALE})
    return trainer


def training_arguments(run: Run) -> TrainingArguments:
    settings = run.settings
    plan = run.plan

    return TrainingArguments(
        output_dir=str(run.folder),
        # updates
        per_device_train_batch_size=plan.rows_at_once,
        gradient_accumulation_steps=plan.accumulation,
        num_train_epochs=settings.epochs,
        max_steps=settings.max_steps or -1,  # -1: as many as the epochs need
        learning_rate=settings.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=settings.warmup_share,  # below 1, Trainer reads it as a share
        optim=plan.optimizer,
        seed=settings.seed,
        data_seed=settings.seed,
        # hardware
        use_cpu=plan.device == "cpu",
        fp16=plan.precision == "fp16",  # for its scaling of the loss; see BlogTrainer for the rest
        activation_checkpointing=plan.checkpointing,
        dataloader_pin_memory=plan.device == "cuda",
        # evaluations; `Checkpoints` decides when to save
        eval_strategy="steps",
        eval_steps=plan.evaluate_every,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        save_strategy="no",
        restore_callback_states_from_checkpoint=True,
        # every update is logged as it is, NaN too: `StopAtNaN` has to see it
        logging_steps=1,
        logging_nan_inf_filter=False,
        disable_tqdm=True,
        # nothing is reported; the column "conversation" is not the model's, but our loss reads it
        report_to="none",
        push_to_hub=False,
        remove_unused_columns=False,
    )


def run_to_the_end(trainer: BlogTrainer, checkpoint: Path | None, settings: Settings) -> list[dict]:
    """Train, from `checkpoint` if there is one; returns the log. Exits if the user stopped the run."""
    checkpoints = Checkpoints(settings.checkpoint_minutes)
    trainer.add_callback(checkpoints)
    # The base model is measured before the first update.
    trainer.args.eval_on_start = checkpoint is None
    with on_signals(checkpoints.ask_to_stop):
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)

    state = trainer.state
    if state.global_step < state.max_steps:
        after = f"after update {state.global_step} of {state.max_steps}"
        if checkpoints.asked_to_stop:
            sys.exit(f"Stopped {after}: run the same command again to continue.")
        say(f"Stopped early {after}: validation did not improve in {settings.patience} evaluations.")
    return state.log_history


def evaluations(log_history: list[dict]) -> list[dict]:
    """The evaluations of a run, the base model's first."""
    return [entry for entry in log_history if "eval_loss" in entry]


class StopAtNaN(TrainerCallback):
    """Exits when a loss is NaN or infinite: no later update can repair the weights."""

    def on_log(self, args, state, control, logs, **_):
        loss = logs.get("loss", logs.get("eval_loss", 0.0))
        if math.isfinite(loss):
            return
        remedy = f"a LEARNING_RATE below {args.learning_rate:g}"
        if args.fp16:  # it ends at 65,504, which the activations of some models (Gemma 3) exceed
            remedy = f'PRECISION = "bf16" or "fp32", or {remedy}'
        sys.exit(
            f"The loss became {loss} at update {state.global_step}: set {remedy} and start with --fresh; "
            "nothing was overwritten."
        )


# Of the loss in float16. torch's 65,536 overflows in the first updates of larger models. A guess, not tuned on a card.
FIRST_SCALE = 4096.0


class SaySkipped(TrainerCallback):
    """Says which updates float16's loss scaling skipped, and keeps their infinite gradient norm out of the log."""

    def on_log(self, args, state, control, logs, **_):
        if math.isfinite(logs.get("grad_norm", 0.0)):
            return

        entry = state.log_history[-1]
        entry["grad_norm"] = None
        if args.fp16:
            entry["skipped"] = True
            say(f"Update {state.global_step} was skipped: float16 overflowed; the loss is scaled less from now on.")


class KeepBest(TrainerCallback):
    """Keeps the model with the lowest validation loss in the folder "best"; the base model is not a candidate."""

    def on_evaluate(self, args, state, control, metrics, model, **_):
        # Trainer updates best_metric after this callback.
        is_better = metrics["eval_loss"] < (state.best_metric or math.inf)
        if is_better and state.global_step > 0 and state.is_world_process_zero:
            self.save(model, Path(args.output_dir))

    def save(self, model, folder: Path) -> None:
        new = folder / "best-incomplete"
        model, weights = without_adapters(model)
        model.config.use_cache = True  # which Trainer switches off
        model.save_pretrained(new, state_dict=weights)
        flush_to_disk(new)
        replace_by(new, folder / "best", aside=folder / "best-previous")
        shutil.rmtree(folder / "best-previous", ignore_errors=True)


SAMPLE_TOKENS = 40  # at most


class LogSample(TrainerCallback):
    """Puts an answer of the model into the log entry of each evaluation, to watch the voice develop."""

    def __init__(self, tokenizer, precision: str, settings: Settings):
        self.tokenizer = tokenizer
        self.precision = precision
        self.prompt = settings.sample_prompt
        self.sampling = {**settings.sampling, "max_new_tokens": SAMPLE_TOKENS}
        self.seed = settings.seed

    def on_evaluate(self, args, state, control, model, **_):
        if not state.is_world_process_zero:
            return
        with autocast(model.device, self.precision):
            words = answer(model, self.tokenizer, self.prompt, self.sampling, self.seed).split()
        state.log_history[-1]["sample"] = " ".join(words)


class Progress(TrainerCallback):
    """Prints a line every few updates and at each evaluation."""

    def __init__(self, tokens_per_epoch: int, prompt: str):
        self.tokens_per_epoch = tokens_per_epoch
        self.prompt = prompt  # of the samples
        self.seconds = 0.0  # in updates only, without evaluations
        self.updates = 0  # of this process: fewer than the state's after a checkpoint
        self.losses = []  # since the last line

    def on_step_begin(self, args, state, control, **_):
        self.began = time.monotonic()

    def on_step_end(self, args, state, control, **_):
        # A card works asynchronously.
        if args.device.type != "cpu":
            torch.accelerator.synchronize()
        self.seconds += time.monotonic() - self.began
        self.updates += 1
        if is_watched():
            say(f"update {state.global_step}/{state.max_steps}, {self.time_left(state)} left   ", end="\r")

    def time_left(self, state) -> str:
        return tell_time(self.seconds / self.updates * (state.max_steps - state.global_step))

    def on_log(self, args, state, control, logs, **_):
        if "loss" not in logs:
            return
        self.losses.append(logs["loss"])

        # About forty lines for a run of any length.
        if state.global_step % max(1, state.max_steps // 40) == 0:
            tokens_per_update = self.tokens_per_epoch * state.epoch / state.global_step
            speed = tokens_per_update * self.updates / self.seconds
            loss = np.mean(self.losses)
            self.say_line(state, f"train {loss:.3f}  {speed:.0f} tokens/s  {self.time_left(state)} left")
            self.losses.clear()

    def on_evaluate(self, args, state, control, metrics, **_):
        if not state.is_world_process_zero:
            return
        bits = metrics["eval_bits_per_byte"]
        change = bits - evaluations(state.log_history)[0]["eval_bits_per_byte"]
        measured = f"{metrics['eval_loss']:.3f}  {bits:.4f} bits per byte ({change:+.4f} against base)"
        self.say_line(state, f"validation {measured}\n  {self.prompt} {state.log_history[-1]['sample']}")

    def say_line(self, state, text: str) -> None:
        say(f"epoch {state.epoch or 0:.2f}  update {state.global_step}/{state.max_steps}  {text}")


class Checkpoints(TrainerCallback):
    """Keeps one complete checkpoint, a new one every few `minutes`; a signal writes one and stops the run."""

    def __init__(self, minutes: float):
        self.minutes = minutes
        self.asked_to_stop = False
        self.saved = time.monotonic()

    def ask_to_stop(self, *_):
        """A signal handler; the second call ends the process."""
        if self.asked_to_stop:
            stop_at_once()
        self.asked_to_stop = True
        say("Stopping after this update; once more stops at once.")

    def on_step_end(self, args, state, control, **_):
        minutes = (time.monotonic() - self.saved) / 60
        # Processes have their own clocks and signals, and all must save together.
        is_due, stop = agreed([minutes >= self.minutes, self.asked_to_stop])

        # After the last update the model itself is saved.
        is_last = state.global_step >= state.max_steps
        control.should_save = (is_due or stop) and not is_last
        if stop:
            self.asked_to_stop = True
            control.should_training_stop = True

    def on_save(self, args, state, control, **_):
        self.saved = time.monotonic()
        if not state.is_world_process_zero:
            return
        new = Path(args.output_dir, f"checkpoint-{state.global_step}")
        # The mark must not reach the disk before the files.
        flush_to_disk(new)
        # Another process may still be writing its random state.
        names = [path.name for path in new.iterdir() if not path.name.startswith("rng_state")]
        write_whole(new / "complete", json.dumps(names))
        flush_to_disk(new)

        for old in checkpoints_of(Path(args.output_dir)):
            if old != new:
                shutil.rmtree(old)


def agreed(answers: list[bool]) -> list[bool]:
    """For each question, whether any process answers yes; the same in all processes."""
    if PartialState().num_processes == 1:
        return answers
    return [any(said) for said in zip(*gather_object([answers]), strict=True)]


# ---------------------------------------------------------------------------- unfinished runs
def identity_of_run(settings: Settings, precision: str) -> dict:
    """Settings and data; a run may only continue the checkpoint of a run with the same identity.

    `precision` is the one that was picked: "auto" depends on the device.
    """
    identity = {name: value for name, value in asdict(settings).items() if name not in NOT_IN_THE_IDENTITY}
    hashes = {f"{split}_sha256": file_hash(settings.data_dir / name) for split, name in DATA_FILES.items()}
    return {**identity, "precision": precision, **hashes}


def begun_with(folder: Path) -> str | None:
    """The optimizer with which the run in `folder` was begun, if it has a checkpoint, which holds its averages."""
    if not last_checkpoint(folder):
        return None
    begun = read_json_object(folder / "run.json").get(BEGUN_WITH)
    return begun if isinstance(begun, str) else None


BEGUN_WITH = "begun_with"  # key in run.json, beside those of the identity


def open_unfinished(folder: Path, identity: dict, fresh: bool, optimizer: str) -> None:
    """Keep `folder` as it is if it holds a checkpoint of the same run; otherwise make it the folder of a new run.

    Exits if it holds another run: only `fresh` throws that away.
    """
    # `KeepBest` may have been killed between its two renames.
    if (folder / "best-previous").is_dir() and not (folder / "best").exists():
        (folder / "best-previous").rename(folder / "best")

    earlier = {} if fresh else read_json_object(folder / "run.json")
    earlier.pop(BEGUN_WITH, None)
    checkpoint = None if fresh else last_checkpoint(folder, say)
    rates = {} if fresh else known_rates(folder)

    # Once the best model is in its place the run is over, and its rates with it.
    is_over = bool(checkpoints_of(folder)) and not (folder / "best").is_dir()
    something_left = checkpoint or (folder / "best").is_dir() or (rates and not is_over)
    if earlier and earlier != identity and something_left:
        sys.exit(
            f"The unfinished run in {folder} had {tell_differences(earlier, identity)}: set that back to continue it, "
            "or throw it away with --fresh."
        )
    if earlier == identity and checkpoint:
        say(f"Continuing the run that stopped after update {update_of(checkpoint)} (--fresh starts over).")
        return
    if something_left and not fresh and not earlier:
        say(f"{folder / 'run.json'} cannot be read, so nothing there can be continued: this run starts over.")

    folder.mkdir(mode=0o700, exist_ok=True)
    remove_run(folder)
    write_whole(folder / "run.json", json.dumps({**identity, BEGUN_WITH: optimizer}, indent=1))
    # A run that was killed before its first checkpoint keeps the rates it has tried.
    if rates and earlier == identity:
        keep_rates(folder, rates)


def tell_differences(earlier: dict, now: dict) -> str:
    """What two runs' settings and data differ in: "EPOCHS = 3 (now 5), other training posts"."""
    names = {"train_sha256": "other training posts", "val_sha256": "other held-out posts"}
    told = []
    for key in {**now, **earlier}:
        before = earlier.get(key)
        after = now.get(key)
        if before != after:
            told.append(names.get(key) or f"{key.upper()} = {before!r} (now {after!r})")
    return ", ".join(told)


def last_checkpoint(folder: Path, tell: Callable = lambda text: None) -> Path | None:
    """The newest complete checkpoint whose best model is still beside it; damaged ones are reported to `tell`."""
    for checkpoint in reversed(checkpoints_of(folder)):
        if not (checkpoint / "complete").is_file():
            continue
        damage = damage_of_checkpoint(checkpoint)
        if damage:
            tell(f"{checkpoint} cannot be continued: {damage}.")
            continue

        # Once the best model is in its place the run is over.
        needs_best = read_json_object(checkpoint / "trainer_state.json").get("best_metric") is not None
        return None if needs_best and not (folder / "best").is_dir() else checkpoint
    return None


def damage_of_checkpoint(checkpoint: Path) -> str:
    """What is wrong with a checkpoint, "" if nothing is found: checksums of torch's files, headers, JSON.

    Raises OSError if a file cannot be read, which may be temporary.
    """
    path = checkpoint / "complete"
    try:
        names = json.loads(path.read_bytes())
        path = checkpoint / "trainer_state.json"
        state = TrainerState.load_from_json(path)
        if state.global_step != update_of(checkpoint) or not evaluations(state.log_history):
            return f"{path.name} is not its state"

        for path in {checkpoint / name for name in names} | set(checkpoint.iterdir()):
            if path.suffix in (".pt", ".pth"):
                with zipfile.ZipFile(path) as parts:
                    damaged = parts.testzip()
            elif path.suffix == ".safetensors":
                with safe_open(path, framework="pt"):
                    damaged = None
            else:
                damaged = not path.exists()
            if damaged:
                return f"{path.name} is damaged or missing"
    except (FileNotFoundError, ValueError, TypeError, zipfile.BadZipFile, SafetensorError):
        return f"{path.name} is damaged or missing"
    return ""


def flush_to_disk(folder: Path) -> None:
    """fsync every file of `folder`, so that a power cut cannot lose it."""
    for path in [*folder.rglob("*"), folder]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        except OSError as error:
            # Some file systems (a Windows drive under WSL) cannot flush folders, as fsync(2) allows.
            if error.errno != errno.EINVAL or not path.is_dir():
                raise
        finally:
            os.close(handle)


# ---------------------------------------------------------------------------- the finished folder
CARD = """---
base_model: {settings[base_model]}
library_name: transformers
pipeline_tag: text-generation
license: other
license_name: private
---
# A model trained on one blogger's posts

Fine-tuned from `{settings[base_model]}`, whose licence still applies, on \
{data[train][conversations]:,} conversations,
{data[train][author_tokens]:,} tokens of one author's blog; {data[train][private]:,} of the conversations are private.

**{warning}**

| on {data[val][conversations]:,} held-out conversations | bits per byte | nats per token |
|---|---|---|
| base model | {base[eval_bits_per_byte]:.4f} | {base[eval_loss]:.4f} |
| this model | {best[eval_bits_per_byte]:.4f} | {best[eval_loss]:.4f} |

In this folder:

```python
from transformers import pipeline

write = pipeline("text-generation", ".")
print(write([{{"role": "user", "content": "{sample_prompt}"}}])[0]["generated_text"][-1]["content"])
```
"""


def save_companions(folder: Path, settings: Settings, tokenizer, report: dict) -> None:
    """Write what belongs beside the weights: tokenizer, sampling settings, report, card, Modelfile and curve."""
    stops = stop_tokens(tokenizer)
    written = {Path(path).name for path in tokenizer.save_pretrained(folder)}
    written |= {path.name for path in folder.glob("model*.safetensors*")}
    positions = positions_of(load_config(folder), settings.context_tokens)
    sampling = settings.sampling
    if sampling["max_new_tokens"] == AUTO:
        # Other tools fail where prompt and answer outgrow the positions, so a quarter of them is left to the prompt.
        most = max(1, positions - positions // 4)
        sampling = sampling | {"max_new_tokens": min(report["answer_tokens"], most)}

    generation = GenerationConfig(
        **sampling,
        do_sample=True,
        eos_token_id=stops,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
    )
    generation.save_pretrained(folder)

    warning = "It was trained on public posts and can repeat them."
    if report["data"]["train"]["private"]:
        warning = "It was trained on private posts and can repeat them: do not publish it."
    texts = {
        "README.md": CARD.format(**report, warning=warning, sample_prompt=settings.sample_prompt),
        "Modelfile": modelfile(tokenizer, tokenizer.convert_ids_to_tokens(stops), positions, sampling),
    }
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    draw_curve(report["log"], folder / "loss_curve.png")
    written |= {*texts, "config.json", "generation_config.json", "chat_template.jinja", "loss_curve.png"}

    # The next run replaces the files in this list that are unchanged; all others are the user's.
    report["files"] = {path.name: file_hash(path) for path in sorted(folder.iterdir()) if path.name in written}
    content = json.dumps(finite(report), indent=1, ensure_ascii=False, allow_nan=False)
    (folder / "training_report.json").write_text(content, encoding="utf-8")


def answer_length(conversations: list[dict], tokenized: list[tuple[list[int], list[bool]]]) -> int:
    """Tokens that nine of ten posts have at most, their end of text included; replies count only without posts."""
    lengths = []
    of_posts = []
    for conversation, (_, scored) in zip(conversations, tokenized, strict=True):
        length = sum(scored)
        lengths.append(length)
        if conversation.get("kind") == "post":
            of_posts.append(length)

    ninth_decile = np.quantile(of_posts or lengths, 0.9)
    return math.ceil(ninth_decile)


def without_samples(log: list[dict]) -> list[dict]:
    """The log without samples, which can repeat a private post: the report may be shown to others."""
    return [{key: value for key, value in entry.items() if key != "sample"} for entry in log]


def finite(value):
    """The JSON `value` with None for infinity and NaN, which JSON does not have."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def stop_tokens(tokenizer) -> list[int]:
    """The tokens that end an answer: the one that closes it in this template, and the end of text."""
    exchange = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "x"}]
    ids, scored = conversation_tokens(tokenizer, exchange)
    *_, last_scored = (token for token, counts in zip(ids, scored, strict=True) if counts)
    return sorted({last_scored, tokenizer.eos_token_id})


def check_saved(folder: Path, rows: list[dict], device: torch.device, plan: dict, reported: float) -> None:
    """Load the folder as a user would and measure it again: its loss must be the reported one."""
    say("Loading the saved model, to measure it once more ...")
    model = load_model(folder)
    if plan["lora_rank"]:
        hold_in_half(model, plan["precision"])
    model.to(device)
    with autocast(device, plan["precision"]):
        nats = conversation_losses(model, rows).sum()
    loss = nats / scored_tokens(rows)

    if not abs(loss - reported) < 1e-3:  # `not <`, so that NaN fails, too
        sys.exit(f"The saved model's validation loss is {loss:.4f}, not {reported:.4f}: {folder} was not put in place.")


def draw_curve(log_history: list[dict], path: Path) -> None:
    """Loss over updates as a picture: training, validation, and the base model's validation as a line."""
    # pyplot keeps every figure and may look for a screen. Small, so that its text is readable on a phone.
    figure = Figure(figsize=(5, 4), layout="constrained")
    axes = figure.subplots()
    styles = {
        "loss": {"color": "0.5", "label": "train, each update"},
        "eval_loss": {"color": "tab:blue", "marker": "o", "label": "validation: held-out posts"},
    }
    for key, style in styles.items():
        entries = [entry for entry in log_history if key in entry]
        steps = [entry["step"] for entry in entries]
        axes.plot(steps, [entry[key] for entry in entries], **style)
    base_loss = evaluations(log_history)[0]["eval_loss"]
    axes.axhline(base_loss, linestyle="--", color="tab:orange", label="base model on the same posts")

    axes.set(xlabel="updates", ylabel="loss (nats per token)", title="Blue below the dashed line: it learned")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.15), frameon=False)  # below, where it hides no line
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=180)


FEW_HELD_OUT = 5  # conversations; as in the report, which then says that it cannot tell


def verdict(base: dict, best: dict, conversations: int) -> str:
    """Whether the model learned, in one sentence; `base` and `best` are evaluations."""
    # Bits per byte can be compared between models, nats per token cannot.
    before = base["eval_bits_per_byte"]
    after = best["eval_bits_per_byte"]
    unseen = f"over {conversations} held-out conversations"
    if after >= before:
        bits = f"{before:.4f} bits per byte before, {after:.4f} after, {unseen}"
        remedy = "more posts, more EPOCHS or another LEARNING_RATE may help"
        return f"Validation did not fall ({bits}): it did not learn; {remedy}."

    # With two digits a smaller change would read "fell from 1.28 to 1.28".
    if before - after < 0.01:
        return f"Validation fell by {before - after:.4f} bits per byte {unseen}: it hardly learned."
    doubt = ", as far as so few can tell" if conversations < FEW_HELD_OUT else ""
    return f"Validation fell from {before:.2f} to {after:.2f} bits per byte {unseen}: it learned{doubt}."


# The last evaluation's share of the whole gain above which more epochs are worth their time. It is low because the
# learning rate has fallen to zero by then. A guess: two real blogs, after a third and half of an epoch, had 14 %.
STILL_LEARNING = 0.04


def tell_epochs(base: dict, later: list[dict]) -> str:
    """Whether more epochs would help, from the evaluations after the base model's; "" if nothing was learned."""
    last = later[-1]
    best = min(later, key=lambda entry: entry["eval_loss"])
    gain = base["eval_loss"] - best["eval_loss"]
    if gain <= 0:
        return ""

    if best is not last:
        return f"It was best after epoch {best['epoch']:.1f}, and that model was kept: more epochs would not help."
    if len(later) == 1:
        return "Only one evaluation, so it is unknown whether more epochs would help."
    if later[-2]["eval_loss"] - last["eval_loss"] > STILL_LEARNING * gain:
        return "It was still learning when it ended: more EPOCHS would help."
    return "It hardly changed at the end: more epochs would bring little."


# ---------------------------------------------------------------------------- graphics cards
# The oldest NVIDIA driver for the CUDA that PyTorch was built with ("CUDA 13.x: >= 580"):
# https://docs.nvidia.com/deploy/cuda-compatibility/minor-version-compatibility.html
DRIVER_NEEDED = {"11": 450, "12": 525, "13": 580}

CARD_OF_WSL = Path("/dev/dxg")  # also exists for cards of Intel and AMD


def check_card(cpu_wanted: bool) -> None:
    """Exits if there is an NVIDIA card that PyTorch cannot use: on a CPU the run could take days.

    A card that the user has hidden (CUDA_VISIBLE_DEVICES is empty) counts as none.
    """
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    if cpu_wanted or hidden:
        return
    try:
        torch.ones(1, device="cuda").item()
        return
    except (RuntimeError, AssertionError) as error:  # the second without CUDA
        if torch.cuda.is_available() and "no kernel image" not in str(error):
            raise
        reason = brief(error).split(". ")[0]

    name = torch.cuda.get_device_name() if torch.cuda.is_available() else find_nvidia_card()
    if name and (torch.cuda.is_available() or not torch.accelerator.is_available()):
        sys.exit(
            f"{name} is there and PyTorch {torch.__version__} cannot use it ({reason}): {tell_remedy(reason)}, "
            "or train without the card, which is slow: --cpu."
        )
    if CARD_OF_WSL.exists() and not name:
        say("WSL sees a graphics card and no NVIDIA driver: if it is NVIDIA's, install its driver in Windows.")


def tell_remedy(reason: str) -> str:
    """What to do about an NVIDIA card that PyTorch cannot use for this reason, in its own words."""
    other_pytorch = "install another PyTorch for it (https://pytorch.org/get-started/locally)"
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0")
    if "No CUDA GPUs" in reason and visible != "0":
        return f"CUDA_VISIBLE_DEVICES is {visible!r}, which names none of the cards: set it to 0"
    if "no kernel image" in reason or torch.version.cuda is None:
        return other_pytorch

    needed = DRIVER_NEEDED.get(torch.version.cuda.split(".")[0], "of the same age")
    return (
        f"CUDA {torch.version.cuda} needs the driver {needed} or newer; update it (for WSL, in Windows) and restart, "
        f"or {other_pytorch}"
    )


def find_nvidia_card() -> str:
    """The name and driver of this machine's NVIDIA card, even if PyTorch cannot use it; "" if there is none."""
    # Not every WSL has the second on its path.
    program = shutil.which("nvidia-smi") or shutil.which("/usr/lib/wsl/lib/nvidia-smi")
    if program:
        question = [program, "--query-gpu=name,driver_version", "--format=csv,noheader"]
        try:
            said = subprocess.run(question, capture_output=True, text=True, timeout=30, check=True).stdout
            name, driver = said.splitlines()[0].split(", ")
            return f"{name} (driver {driver})"
        except (OSError, subprocess.SubprocessError, IndexError, ValueError):
            pass  # no card, or a driver that is half updated

    cards = Path("/proc/driver/nvidia/gpus")
    return "An NVIDIA card" if cards.is_dir() and any(cards.iterdir()) else ""


def prepare_card(device: torch.device) -> None:
    """Settings for NVIDIA cards; no effect on other devices."""
    if device.type != "cuda":
        return

    # cuDNN, the first choice on an H100, makes a new plan for every row length: half a second each, as reported in
    # https://github.com/modelscope/FunASR/issues/3704; not measured here.
    torch.backends.cuda.enable_cudnn_sdp(False)

    # Before sm_80 only the slowest kernel supports fewer keys than queries (SmolLM2, Qwen, Llama 3), and it keeps all
    # attention weights for the backward pass; with repeated keys the efficient kernel can be used.
    if torch.cuda.get_device_capability(device) < FIRST_CARDS["bf16"]:
        sdpa_attention.use_gqa_in_sdpa = lambda *_: False

    # When the card is full, WSL moves data to the computer's memory, many times slower, instead of failing.
    # 0.3 GB is a guess at what CUDA needs beside PyTorch's tensors.
    free, total = torch.cuda.mem_get_info()
    share = (free - 3e8) / total
    torch.cuda.set_per_process_memory_fraction(min(1.0, max(0.1, share)))


def is_out_of_memory(error: RuntimeError) -> bool:
    """PyTorch's own exception covers its tensors only; cuBLAS and the CPU are recognised by their messages."""
    words = ("out of memory", "allocate memory", "ALLOC_FAILED", "CUBLAS_STATUS_NOT_INITIALIZED")
    return isinstance(error, torch.OutOfMemoryError) or any(word in str(error) for word in words)


def is_on_windows_drive(folder: Path) -> bool:
    """Whether the folder is on a Windows drive under WSL, such as /mnt/c."""
    is_wsl = "microsoft" in platform.release().lower()
    return is_wsl and bool(re.match("/mnt/[a-z](/|$)", str(folder.resolve())))


# ---------------------------------------------------------------------------- speed on a CPU
# SummedCrossEntropy and CastWeightsOnce are also used on a card.
#
#     trick                                                          tokens/s      gain
#     keep_freed_memory: memory is not asked for anew each time      75-80 -> 86   10 %
#     CastWeightsOnce: one low-precision copy of the weights         86 -> 91       6 %
#     FUSED_ACTIVATIONS: one kernel in place of eight                91 -> 98       7 %
#     use_sparse_embedding_gradient: only the rows that were read                   6 %
#     SummedCrossEntropy: loss and gradient in one pass                             9 %
#     attention_in_bfloat16: sums of attention not in float32                       5 %
#
# GPT2-medium on two Zen 4 cores (AVX512-BF16), one run each, in the order in which they were added; of the last two
# only the gain was noted. This measures all of them beside a stock Trainer; to see what one is worth, take it out:
#
#     python benchmarks/bench_train.py MODEL --data-dir data

# GPT-2's activation is written as eight operations; this is the same function as one.
FUSED_ACTIVATIONS = {"gelu_new": "gelu_pytorch_tanh", "gelu_fast": "gelu_pytorch_tanh"}


def fuse_activations(config) -> dict[str, str]:
    """Set the fused form of each activation in `config`; returns the original names."""
    usual_names = {key: value for key, value in config.to_dict().items() if str(value) in FUSED_ACTIVATIONS}
    for key, value in usual_names.items():
        setattr(config, key, FUSED_ACTIVATIONS[value])
    return usual_names


def use_sparse_embedding_gradient(model) -> None:
    """Make the input embedding's gradient sparse: only the rows that were read."""
    embedding = model.get_input_embeddings()
    output = model.get_output_embeddings()
    alone = os.environ.get("WORLD_SIZE", "1") == "1" and model.device.type == "cpu"
    # The output layer's gradient is added to it, which makes it dense, as AdamW and DistributedDataParallel need it.
    is_tied = output is not None and output.weight is embedding.weight
    embedding.sparse = alone and is_tied and embedding.weight.requires_grad


# Tokens whose logits are float32 at a time. A CPU is faster if they fit its cache; a card with fewer calls.
LOSS_PIECE = defaultdict(lambda: 64, cuda=512)


class SummedCrossEntropy(torch.autograd.Function):
    """Sum of the negative log-likelihoods, in nats, of targets (tokens,) under logits (tokens, vocabulary).

    The gradient is made in the same pass, some tokens at a time, where autograd would hold several tensors of its size.
    """

    @staticmethod
    def forward(ctx, logits, targets):
        total = logits.new_zeros((), dtype=torch.float32)
        # float16 would lose small values.
        kept_type = torch.bfloat16 if logits.dtype == torch.bfloat16 else torch.float32
        gradient = torch.empty_like(logits, dtype=kept_type)

        size = LOSS_PIECE[logits.device.type]
        pieces = zip(logits.split(size), targets.split(size), gradient.split(size), strict=True)
        for some, wanted, out in pieces:
            log_probabilities = functional.log_softmax(some.float(), dim=-1)
            total += functional.nll_loss(log_probabilities, wanted, reduction="sum")

            # The gradient of a token's loss: the probabilities, less 1 at the target.
            probabilities = log_probabilities.exp_()
            places = torch.arange(len(wanted), device=wanted.device)
            probabilities[places, wanted] -= 1
            out.copy_(probabilities)

        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx, upstream):
        return ctx.saved_tensors[0].mul_(upstream), None


class CastWeightsOnce(TrainerCallback):
    """Lets the batches of an update share one low-precision copy of the weights.

    Autocast keeps such copies until its outermost context ends.
    """

    def __init__(self, device: torch.device):
        self.casting = torch.autocast(device.type, enabled=False)  # as backward passes run in it, too

    def on_train_begin(self, args, state, control, model, **_):
        # float16's loss scaling adds a wrapper that copies the logits to float32, 100 MB.
        extract_model_from_parallel(model, keep_fp32_wrapper=False)

    def on_step_begin(self, args, state, control, **_):
        self.casting.__enter__()

    def on_pre_optimizer_step(self, args, state, control, **_):
        self.casting.__exit__(None, None, None)


def attention_of(device: str, precision: str, checkpointing: bool) -> Callable:
    """The context of training's forward pass; not with recomputation, which torch runs outside of it."""
    is_rounded = device == "cpu" and precision == "bf16" and not checkpointing
    return attention_in_bfloat16 if is_rounded else contextlib.nullcontext


@contextlib.contextmanager
def attention_in_bfloat16() -> Iterator[None]:
    """Attention written out, its scores and their sums in bfloat16, for a forward pass that a backward pass follows.

    Forward and backward of a layer of GPT2-medium then take 18 ms instead of 29 on two Zen 4 cores, as torch's fused
    kernel converts to float32 and back. It keeps the attention's weights, tokens x tokens a head.
    """
    usual = torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed()
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)  # of the CPU too, whatever the name says
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(usual)


def keep_freed_memory() -> None:
    """Make glibc keep large blocks instead of mapping new ones for every tensor."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD
        libc.mallopt(-2, 64 << 20)  # M_TOP_PAD


def free_model() -> None:
    """Free the memory of a model that nothing names any more, and which Python has not collected yet."""
    gc.collect()
    give_back_memory()


def give_back_memory() -> None:
    """Return the memory that glibc keeps (see `keep_freed_memory`) to the system.

    On two cores, SmolLM2-135M with adapters of rank 16 then took 1.49 GB at most beside Python instead of 1.98.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


# ---------------------------------------------------------------------------- for Ollama
# A Modelfile describes a model to Ollama. Its template is in Go's template language, so it is built from pieces of the
# model's own, which is Jinja. Ollama fills in the messages, with all system messages in .System, and adds an empty
# answer at the end.
MARK = "\ue000"  # stands for the content of a message; no template contains this private-use character
OLLAMA_NAMES = {"repetition_penalty": "repeat_penalty", "max_new_tokens": "num_predict"}
# Ollama reserves memory for num_ctx tokens at once; Llama 3.2's 131,072 would need more than its weights.
LONGEST_CHAT = 4_096  # tokens


def modelfile(tokenizer, stops: list[str], positions: int, sampling: dict) -> str:
    """Text of the Modelfile for blog-model.gguf, which `make gguf` writes; `stops` are strings that end an answer."""
    # Ollama drops the beginning of a text longer than num_ctx, so half of it is for the prompt.
    context = min(positions, LONGEST_CHAT)
    longest_answer = max(1, context // 2)
    options = {**sampling, "max_new_tokens": min(sampling["max_new_tokens"], longest_answer)}

    lines = ["FROM ./blog-model.gguf", f'TEMPLATE """{ollama_template(tokenizer)}"""']
    for name, value in options.items():
        lines.append(f"PARAMETER {OLLAMA_NAMES.get(name, name)} {value}")
    lines.append(f"PARAMETER num_ctx {context}")

    # Ollama quotes strings as JSON does.
    for stop in stops:
        lines.append(f"PARAMETER stop {json.dumps(stop)}")
    return "\n".join(lines) + "\n"


def ollama_template(tokenizer) -> str:
    """The chat template in Go's language; says so where it cannot be written, or has no system messages (Gemma)."""
    one = render_marks(tokenizer, "user")
    two = render_marks(tokenizer, "user", "assistant")
    three = render_marks(tokenizer, "user", "assistant", "user")
    whole = render_marks(tokenizer, "user", "assistant", "user", asked=True)

    # What each message adds to the rendering so far. If this varies, the whole is not the sum of its pieces.
    reply = two.removeprefix(one)
    question = three.removeprefix(two)
    answer = whole.removeprefix(three)
    start = one.removesuffix(question)
    if not whole or whole != start + question + reply + question + answer or holds_go(whole):
        say("The chat template cannot be converted for Ollama: write the TEMPLATE of the Modelfile yourself.")
        return "{{ .Prompt }}"

    turns = {"user": question, "assistant": reply}
    with_system = render_marks(tokenizer, "system", "user")
    before = with_system.removesuffix(question)
    if before == with_system or holds_go(before):
        say("The chat template has no turn for system messages: Ollama will leave them out.")
    else:
        turns["system"] = before.removeprefix(start)
        if not before.startswith(start):  # the template has a default system message (SmolLM2)
            start = "{{ if .System }}{{ else }}" + start + "{{ end }}"

    contents = {role: turn.replace(MARK, "{{ .Content }}") for role, turn in turns.items()}
    cases = [f'if eq .Role "{role}" }}}}{content}{{{{ ' for role, content in contents.items()]
    return start + "{{ range .Messages }}{{ " + "else ".join(cases) + "end }}{{ end }}" + answer


def render_marks(tokenizer, *roles: str, asked: bool = False) -> str:
    """Messages of these roles, each with MARK for content; "" if the template refuses them."""
    messages = [{"role": role, "content": MARK} for role in roles]
    try:
        text = render_or_raise(tokenizer, messages, asked)
    except TEMPLATE_ERRORS:  # for a combination of turns that the data does not have
        return ""
    # llama.cpp adds the beginning-of-sequence token itself.
    return text.removeprefix(tokenizer.bos_token) if starts_with_bos(tokenizer) else text


def holds_go(text: str) -> bool:
    """Whether a text contains Go's template syntax or the end of the template."""
    return any(sign in text for sign in ("{{", "}}", '"""'))


# ---------------------------------------------------------------------------- signals and errors
def stop(*_):
    """A signal handler: the first signal stops what is being done, the second ends the process."""
    for number in STOP_SIGNALS:
        if signal.getsignal(number) is stop:
            signal.signal(number, stop_at_once)
    raise KeyboardInterrupt


def stop_at_once(*_):
    """A signal handler. The files are complete at every moment, so there is nothing to clean up."""
    end_at_once("\nStopped at once: run the same command again to continue from the last checkpoint.")


def main(argv: list[str] | None = None) -> int:
    os.umask(0o077)  # whatever is written can repeat what is private
    try:
        with on_signals(stop):
            settings = parse_arguments(argv)
            transformers.logging.set_verbosity_error()
            if Path(settings.base_model).is_dir():  # a download shows its progress
                transformers.logging.disable_progress_bar()
            keep_freed_memory()
            train(settings)

    except CannotLoad as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        sys.exit("Stopped: run the same command again; it continues from the last checkpoint, if there is one.")
    except RuntimeError as error:
        # These kinds of RuntimeError differ only in their messages.
        if is_out_of_memory(error):
            sys.exit(
                "Out of memory: close other programs and run the same command again, which makes a new plan and "
                "continues; a lower CONTEXT_TOKENS or a smaller BASE_MODEL needs less, and starts over with --fresh."
            )
        if any(word in str(error) for word in ("PytorchStreamWriter", "inline_container")):
            sys.exit(f"Cannot write a checkpoint: is the disk full? ({brief(error)}); earlier files are not changed.")
        raise

    except pickle.UnpicklingError as error:  # a pickle that is refused
        sys.exit(f"The checkpoint was not written by train_model.py ({brief(error)}): start over with --fresh.")
    except SafetensorError as error:  # while saving; loading raises CannotLoad
        sys.exit(f"Cannot write a model: is the disk full? ({brief(error)}); earlier files are not changed.")
    except OSError as error:
        what = f"{error.filename or 'a file'}: {error.strerror or error}"
        sys.exit(f"Cannot read or write {what}; earlier files are not changed.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
