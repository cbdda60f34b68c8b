"""What only a graphics card can show of train_model.py and test_model.py, in about eight minutes, with random weights.

    python benchmarks/bench_gpu.py           # on a card
    python benchmarks/bench_gpu.py --tiny    # on a CPU, with tiny models: tests this script

Prints a table row by row; "-" marks a figure without a limit. The exit status is 1 if a row says FAIL. Needs what
`make install` installs (collect_packages.sh fetches it for a machine without network), and 10 GB in the folder for
temporary files (TMPDIR).
"""

import argparse
import io
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple
from unittest import mock

os.environ["HF_HUB_OFFLINE"] = "1"  # all models are made here
if "--tiny" in sys.argv:
    # Child processes inherit both; one thread is the fastest for tiny models.
    os.environ.update(OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import transformers
from accelerate.state import AcceleratorState
from bench_train import UPDATE, Clock, fastest_update, hardware, train_stock
from tokenizers import ByteLevelBPETokenizer
from torch import cuda
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import train_model
from train_model import OPTIMIZERS, CastWeightsOnce, Machine, PartialState, Plan, Run, Settings, prepare_card

TOLERANCE = 1e-3  # nats; on a CPU, bfloat16 losses are within 2e-4 of float32's
CAPS = (6.2e9, 6.4e9, 6.6e9, 7.2e9)  # bytes free, near the sizes at which the plan for GPT2-medium changes
FREE_OF_8_GB = 7_000_000_000  # bytes, on an 8 GB card that also drives a desktop
KILLED_AT = 5  # the update during which a run is killed


class Row(NamedTuple):
    name: str
    measured: str
    wanted: str = ""
    passed: bool | None = None  # None: a figure without a limit


class Lab(NamedTuple):
    """Where a check may write, and what it runs on."""

    folder: Path
    device: torch.device
    has_card: bool
    precision: str
    large: str  # key of MODELS: the model for checks of memory and speed

    def prepare(self, free: float) -> None:
        """Like train_model.prepare_card, but with `free` bytes of the card, 0.3 GB of them for CUDA itself."""
        prepare_card(self.device)
        if self.has_card:
            _, total = cuda.mem_get_info()
            share = (free - 3e8) / total
            cuda.set_per_process_memory_fraction(min(1.0, share))

    def forget(self) -> None:
        """Free the card's memory and restart its count, as in a new process."""
        train_model.forget_trial("adamw_bnb_8bit")
        AcceleratorState._reset_state(reset_partial_state=True)  # otherwise the device of the last run stays
        if self.has_card:
            cuda.empty_cache()
            cuda.set_per_process_memory_fraction(1.0)
            cuda.reset_peak_memory_stats()


# ---------------------------------------------------------------------------- models, data, runs
TINY = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 256}
MODELS = {
    "gpt2": {**TINY, "model_type": "gpt2", "vocab_size": 500},
    "llama": {**TINY, "model_type": "llama", "vocab_size": 500, "intermediate_size": 128, "num_key_value_heads": 1},
    # GPT2-medium, 1.4 GB
    "medium": {"model_type": "gpt2", "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16},
}
WORDS = ["the", "kettle", "sings", "at", "night", "and", "bakes", "bread"]


def make_model(lab: Lab, name: str) -> Path:
    """A model folder as from the hub, made once. The tokenizer has at most 400 tokens, the model may have more."""
    folder = lab.folder / name
    if folder.exists():
        return folder

    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator([" ".join(WORDS)] * 9, vocab_size=400, special_tokens=["<end>"], show_progress=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=trained._tokenizer, eos_token="<end>")
    tokenizer.save_pretrained(folder)

    torch.manual_seed(0)
    ends = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), tokenizer.eos_token_id)
    config = transformers.AutoConfig.for_model(**MODELS[name], **ends)
    model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    model.save_pretrained(folder)
    return folder


def make_data(lab: Lab) -> Path:
    """A folder of 240 made-up posts, 20 of them private, and 6 held-out ones."""
    rng = random.Random(0)
    folder = lab.folder / "data"
    folder.mkdir(exist_ok=True)
    for split, count in (("train", 240), ("val", 6)):
        with (folder / f"{split}_data.jsonl").open("w", encoding="utf-8") as file:
            for number in range(count):
                post = make_post(rng, number)
                file.write(json.dumps(post) + "\n")
    return folder


def make_post(rng: random.Random, number: int) -> dict:
    words = rng.choices(WORDS, k=rng.randint(15, 60))
    request = {"role": "user", "content": f"Write about {words[0]}."}
    answer = {"role": "assistant", "content": " ".join(words)}
    visibility = "private" if number < 20 else "public"
    return {"messages": [request, answer], "visibility": visibility}


def settings_for(lab: Lab, name: str, updates: int, **others) -> Settings:
    """Train the model `name` on the made-up posts; windows are small for a tiny one. `others` are other settings."""
    base = str(make_model(lab, name))
    settings = replace(train_model.parse_arguments([]), base_model=base, data_dir=make_data(lab), max_steps=updates)
    if name != "medium":
        settings = replace(settings, context_tokens=64, overlap_tokens=8)
    if not lab.has_card:
        settings = replace(settings, cpu=True, precision="fp32")
    return replace(settings, **{"learning_rate": 1e-3, **others})


def make_rows(lengths: list[int], settings: Settings) -> list[dict]:
    """Packed rows for all updates, shuffled, of documents of these lengths in tokens, random and all scored."""
    rng = random.Random(0)
    tokenized = [(rng.choices(range(1, 500), k=length), [True] * length) for length in lengths]
    rows = train_model.make_rows(tokenized, settings.context_tokens, overlap=0, multiple=UPDATE)
    rng.shuffle(rows)
    return rows[: settings.max_steps * UPDATE]


def run_training(lab: Lab, name: str, settings: Settings) -> str:
    """Run train_model.train into the folder `name`; returns its output. Raises what it raises."""
    lab.forget()
    settings = replace(settings, output_dir=lab.folder / name)
    output = io.StringIO()
    with redirect_stderr(output), redirect_stdout(output):
        train_model.train(settings)
    return output.getvalue()


def training_report(lab: Lab, name: str) -> dict:
    return train_model.read_json_object(lab.folder / name / "training_report.json")


def loss_history(lab: Lab, name: str) -> list[float]:
    """Losses of a run's updates and evaluations, up to the first update that float16's loss scaling skipped."""
    history = []
    for entry in training_report(lab, name)["log"]:
        if entry.get("skipped"):
            break
        if "train_loss" not in entry:
            history.append(entry.get("loss", entry.get("eval_loss")))
    return history


def compare_losses(lab: Lab, name: str, one: str, other: str) -> Row:
    differences = []
    for left, right in zip(loss_history(lab, one), loss_history(lab, other), strict=False):
        differences.append(abs(left - right))
    largest = max(differences)
    measured = f"{len(differences)} losses, {largest:.1e} nats apart"
    return Row(name, measured, f"at most {TOLERANCE:g}", largest <= TOLERANCE)


def plan_and_train(lab: Lab, settings: Settings, rows: list[dict], free: float) -> tuple[Plan, float, Clock]:
    """Train as train_model.py does with `free` bytes: (plan, planned bytes, clock). SystemExit if nothing fits."""
    base = settings.base_model
    device = PartialState(cpu=not lab.has_card).device
    machine = Machine(device, 1, lab.precision, int(free))
    lab.prepare(free)
    config = train_model.load_config(base)
    plan = train_model.make_plan(settings, config, rows, machine)

    model = train_model.load_for_training(base)
    model = train_model.prepare_to_train(model, plan, settings)
    clock = Clock()
    callbacks = [CastWeightsOnce(model.device), clock]
    rows_of = {"train": rows, "val": rows[:2]}
    data = {"val": {"author_bytes": 1}}
    run = Run(settings, lab.folder / "trial", plan, rows_of, data)
    trainer = train_model.trainer_with(callbacks, run, model)
    trainer.args.train_sampling_strategy = "sequential"
    trainer.train()
    planned = sum(plan.memory.values())
    return plan, planned, clock


# ---------------------------------------------------------------------------- the checks
def losses(lab: Lab) -> Iterator[Row]:
    """Another device and another precision must learn the same as the CPU in float32."""
    precision = lab.precision if lab.has_card else "bf16"
    for name in ("gpt2", "llama"):
        expected = f"{name}-cpu"
        found = f"{name}-here"
        updates = 8 if lab.has_card else 4
        settings = settings_for(lab, name, updates, precision=precision)
        run_training(lab, expected, replace(settings, precision="fp32", cpu=True))
        # Also on a CPU that is slow in bfloat16, and would not take it.
        with mock.patch.object(train_model, "pick_precision", lambda _, wanted: wanted):
            run_training(lab, found, settings)
        title = f"losses: {name}, {precision} on {lab.device.type}, beside the CPU's"
        yield compare_losses(lab, title, found, expected)


def memory(lab: Lab) -> Iterator[Row]:
    """Measured beside planned memory: each way to train, then the planned way with little memory free."""
    free = train_model.free_memory(lab.device)
    runs = [(free, train_model.OPTIMIZERS_OF_ADAPTERS[:1], train_model.USUAL_RANK)]
    for way in OPTIMIZERS:
        runs.append((free, (way,), 0))
    for cap in CAPS:
        runs.append((min(cap, free), OPTIMIZERS, 0))

    for free_bytes, ways, rank in runs:
        name = f"memory: {free_bytes / 1e9:.1f} GB free"
        yield from tried(lab, name, measure, name, free_bytes, ways, rank)


def measure(lab: Lab, name: str, free: float, ways: tuple, rank: int) -> Iterator[Row]:
    """Train in the first of `ways` that fits into `free` bytes."""
    settings = settings_for(lab, lab.large, updates=4, lora_rank=rank)
    half = settings.context_tokens // 2  # two documents a row, so that attention needs a mask
    rows = make_rows([half] * 8 * UPDATE, settings)
    try:
        with mock.patch.object(train_model, "ways_to_train", lambda *_: ways):
            plan, planned, _ = plan_and_train(lab, settings, rows, free)
    except SystemExit as stop:
        # A small card may lack memory for one of the ways, but the planned way must fit.
        passed = None if len(ways) == 1 else False
        yield Row(f"{name}, {ways[0]}", f"skipped: {stop}", "", passed)
        return

    peak = cuda.max_memory_reserved()
    passed = peak <= planned + 1e9 if lab.has_card else None
    measured = f"{peak / 1e9:.2f} GB"
    wanted = f"at most {planned / 1e9:.2f} + 1 GB"
    yield Row(f"{name}, {describe(plan)}", measured, wanted, passed)


def describe(plan: Plan) -> str:
    recomputed = ", recomputed" if plan.checkpointing else ""
    return f"{plan.optimizer}{recomputed}, rank {plan.lora_rank}, {plan.rows_at_once} rows at once"


def recipe(lab: Lab) -> Iterator[Row]:
    """The default recipe as on an 8 GB card: three trials of the learning rate, then the run."""
    settings = settings_for(lab, lab.large, updates=24, learning_rate=train_model.AUTO)
    small_card = {"free_memory": lambda _: FREE_OF_8_GB, "prepare_card": lambda _: lab.prepare(FREE_OF_8_GB)}
    with mock.patch.multiple(train_model, **small_card):
        run_training(lab, "recipe", settings)

    found = training_report(lab, "recipe")
    plan = describe(Plan(**found["plan"]))
    bits = found["learning_rate"]["bits_per_byte_of_tried"].values()
    yield Row("recipe: 7.0 GB free", f"{plan}; {found['verdict']}", "no trial broke down", None not in bits)


def speed(lab: Lab) -> Iterator[Row]:
    """Tokens a second in the fastest update, beside the stock recipe: Trainer as it comes, one document a row."""
    settings = settings_for(lab, lab.large, updates=12 if lab.has_card else 4)
    context = settings.context_tokens
    documents = settings.max_steps * UPDATE
    lengths = random.Random(0).choices(range(16, 2 * context), k=2 * documents)
    rows = make_rows(lengths, settings)
    _, _, clock = plan_and_train(lab, settings, rows, train_model.free_memory(lab.device))
    ours = fastest_update(clock, [len(row["input_ids"]) for row in rows])

    lab.forget()
    lengths = [min(length, context) for length in lengths[:documents]]
    stock_rows = [{"input_ids": [1] * length} for length in lengths]
    try:
        with redirect_stdout(io.StringIO()):  # the trainer's log
            clock = train_stock(settings.base_model, stock_rows, lab.device, lab.precision)
        stock = fastest_update(clock, lengths)
    except torch.OutOfMemoryError:
        stock = 0.0
    measured = f"{ours:,.0f} tokens/s beside {stock:,.0f} (0: out of memory)"
    # On a CPU, the speed of a tiny model means nothing.
    yield Row("speed: beside the stock recipe", measured, "more, on a card", ours > stock or not lab.has_card)


def resume(lab: Lab) -> Iterator[Row]:
    """A killed run continues as if nothing had happened, with the averages of 8-bit Adam."""
    train_resumably(lab, "whole")
    # Only another process can be killed; one that uses a card cannot be forked.
    context = multiprocessing.get_context("spawn" if lab.has_card else "fork")
    victim = context.Process(target=train_until_killed, args=(lab,), daemon=True)
    victim.start()
    victim.join(timeout=300)

    output = train_resumably(lab, "killed")
    goes_on = f"the run that stopped after update {KILLED_AT - 1}" in output
    passed = goes_on and victim.exitcode == -signal.SIGKILL
    measured = f"status {victim.exitcode}, went on {goes_on}"
    yield Row("resume: a killed run", measured, "status -9, went on True", passed)
    yield compare_losses(lab, "resume: losses beside the uninterrupted run's", "killed", "whole")


def train_resumably(lab: Lab, name: str) -> str:
    settings = settings_for(lab, "gpt2", updates=10, checkpoint_minutes=0)
    with mock.patch.object(train_model, "ways_to_train", lambda *_: [("adamw_bnb_8bit", False)]):
        return run_training(lab, name, settings)


def train_until_killed(lab: Lab) -> None:
    """As train_resumably; the process is killed before the checkpoint of an update is written."""

    def die(callback, args, state, control, **_) -> None:
        if state.global_step == KILLED_AT:
            os.kill(os.getpid(), signal.SIGKILL)

    with mock.patch.object(train_model.Progress, "on_log", die):
        train_resumably(lab, "killed")


def report(lab: Lab) -> Iterator[Row]:
    """The report of a fully trained model and of one with adapters."""
    for name, rank in (("full", 0), ("adapters", 4)):
        settings = settings_for(lab, "gpt2", updates=4, lora_rank=rank)
        run_training(lab, name, settings)
        command = [sys.executable, "test_model.py", "--report", "--quick"]
        command += ["--model-dir", str(lab.folder / name), "--data-dir", str(settings.data_dir)]
        done = subprocess.run(command, cwd=train_model.HERE, capture_output=True, text=True, timeout=300, check=False)
        *_, last_line = done.stderr.splitlines() or [""]
        yield Row(f"report: {name}", last_line, "exit status 0", done.returncode == 0)


CHECKS = {check.__name__: check for check in (losses, memory, recipe, speed, resume, report)}
ERRORS = (RuntimeError, SystemExit, subprocess.SubprocessError, OSError, ValueError, LookupError, TypeError)


def tried(lab: Lab, name: str, check: Callable[..., Iterator[Row]], *arguments) -> Iterator[Row]:
    """The rows of `check`; an error becomes a row that fails, and the other checks go on."""
    lab.forget()
    try:
        yield from check(lab, *arguments)
    except ERRORS as error:
        first_line = "".join(str(error).splitlines()[:1])
        yield Row(name, f"{type(error).__name__} {first_line}", "no error", False)


# ---------------------------------------------------------------------------- command line
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="tiny models, on the CPU")
    parser.add_argument("--only", choices=CHECKS, metavar="NAME", help=", ".join(CHECKS))
    args = parser.parse_args(argv)
    if not args.tiny and not cuda.is_available():
        sys.exit("PyTorch finds no graphics card; use --tiny to test this script on the CPU.")

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    device = torch.device("cpu" if args.tiny else "cuda")
    precision = train_model.fastest_precision(device)
    large = "gpt2" if args.tiny else "medium"
    with tempfile.TemporaryDirectory(prefix="bench_gpu-") as folder:
        lab = Lab(Path(folder), device, not args.tiny, precision, large)
        return run_checks(lab, [args.only] if args.only else list(CHECKS))


def run_checks(lab: Lab, names: list[str]) -> int:
    """Print each row as soon as it is measured; returns the exit status."""
    card = train_model.find_nvidia_card() if lab.has_card else "no card"
    print(f"{hardware()}, CUDA {torch.version.cuda}; {card}, {lab.precision}\n")
    print("| check | measured | wanted | |\n|---|---|---|---|", flush=True)
    verdicts = {True: "PASS", False: "FAIL", None: "-"}
    passed = []
    for name in names:
        for row in tried(lab, name, CHECKS[name]):
            passed.append(row.passed)
            print(f"| {row.name} | {row.measured} | {row.wanted} | {verdicts[row.passed]} |", flush=True)
    return int(False in passed)


if __name__ == "__main__":
    sys.exit(main())
