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
import os
import random
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NamedTuple
from unittest import mock

os.environ["HF_HUB_OFFLINE"] = "1"  # all models are made here
if "--tiny" in sys.argv:
    os.environ["OMP_NUM_THREADS"] = "1"  # the fastest for tiny models; child processes inherit it
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import transformers
from accelerate.state import AcceleratorState
from bench_train import UPDATE, Clock, fastest_update, hardware, train_stock
from tokenizers import ByteLevelBPETokenizer
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import train_model
from train_model import prepare_card

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
            _, total = torch.cuda.mem_get_info()
            share = (free - 3e8) / total
            torch.cuda.set_per_process_memory_fraction(min(1.0, share))

    def forget(self) -> None:
        """Free the card's memory and restart its count, as in a new process."""
        train_model.forget_trial("adamw_bnb_8bit")
        AcceleratorState._reset_state(reset_partial_state=True)  # otherwise the device of the last run stays
        if self.has_card:
            torch.cuda.empty_cache()
            torch.cuda.set_per_process_memory_fraction(1.0)
            torch.cuda.reset_peak_memory_stats()


# ---------------------------------------------------------------------------- models, data, runs
SMALL = {"CONTEXT_TOKENS": 64, "OVERLAP_TOKENS": 8}  # settings for tiny models
TINY = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 256}
MODELS = {
    "gpt2": {**TINY, "model_type": "gpt2", "vocab_size": 500},
    "llama": {**TINY, "model_type": "llama", "vocab_size": 500, "intermediate_size": 128, "num_key_value_heads": 1},
    # GPT2-medium, 1.4 GB
    "medium": {"model_type": "gpt2", "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16},
}
WORDS = ["the", "kettle", "sings", "at", "night", "and", "bakes", "bread"]


def make_model(lab: Lab, name: str = "gpt2") -> Path:
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


def make_data(lab: Lab, posts: int = 40, words: int = 60) -> Path:
    """Made-up posts of up to `words` words, and 6 held-out ones."""
    rng = random.Random(0)
    folder = lab.folder / f"data-{posts}"
    folder.mkdir(exist_ok=True)
    for split, count in (("train", posts), ("val", 6)):
        with (folder / f"{split}_data.jsonl").open("w", encoding="utf-8") as file:
            for number in range(count):
                post = make_post(rng, number, words)
                file.write(json.dumps(post) + "\n")
    return folder


def make_post(rng: random.Random, number: int, words: int) -> dict:
    length = rng.randint(words // 4, words)
    text = " ".join(rng.choices(WORDS, k=length))
    request = {"role": "user", "content": f"Write about {rng.choice(WORDS)}."}
    post = {"kind": "post", "blog": "blog", "path": f"{number}.md", "title": f"post {number}", "date": "2006-08-25"}
    post["visibility"] = "private" if number % 2 else "public"
    post["messages"] = [request, {"role": "assistant", "content": text}]
    return post


def make_rows(lengths: list[int], updates: int):
    """Packed rows, shuffled, of documents of these lengths in tokens, random and all scored."""
    rng = random.Random(0)
    tokenized = [(rng.choices(range(1, 500), k=length), [True] * length) for length in lengths]
    rows = train_model.make_rows(tokenized, train_model.CONTEXT_TOKENS, 0, multiple=UPDATE)
    return rows.shuffle(seed=0).select(range(updates * UPDATE))


def run_training(lab: Lab, name: str, *flags: str, cpu: bool = False, **settings) -> str:
    """Run train_model.main with `settings` into the folder `name`; returns its output. Raises what it raises."""
    lab.forget()
    arguments = ["--output-dir", str(lab.folder / name), *flags]
    if cpu or not lab.has_card:
        arguments.append("--cpu")
        # Use a precision that this CPU is slow in, too: its code is to be run.
        settings["pick_precision"] = lambda _, wanted: "fp32" if wanted == "auto" else wanted

    output = io.StringIO()
    with mock.patch.multiple(train_model, **settings), redirect_stderr(output), redirect_stdout(output):
        train_model.main(arguments)
    return output.getvalue()


def input_flags(base: Path, data: Path, updates: int, rate: str = "1e-3") -> list[str]:
    folders = ["--base-model", str(base), "--data-dir", str(data)]
    return [*folders, "--max-steps", str(updates), "--learning-rate", rate]


def training_report(lab: Lab, name: str) -> dict:
    return json.loads((lab.folder / name / "training_report.json").read_text(encoding="utf-8"))


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
    pairs = zip(loss_history(lab, one), loss_history(lab, other), strict=False)
    differences = [abs(left - right) for left, right in pairs]
    largest = max(differences)
    measured = f"{len(differences)} losses, {largest:.1e} nats apart"
    return Row(name, measured, f"at most {TOLERANCE:g}", largest <= TOLERANCE)


def plan_and_train(lab: Lab, rows, free: float) -> tuple[train_model.Plan, float, Clock]:
    """Train as train_model.py does with `free` bytes: (plan, planned bytes, clock). SystemExit if nothing fits."""
    base = make_model(lab, lab.large)
    updates = len(rows) // UPDATE
    args = train_model.parse_arguments(input_flags(base, lab.folder, updates))
    device = train_model.PartialState(cpu=not lab.has_card).device
    machine = train_model.Machine(device, 1, lab.precision, int(free))
    lab.prepare(free)
    plan, forecast = train_model.make_plan(args, train_model.load_config(base), rows, machine)

    model = train_model.prepare_to_train(train_model.load_for_training(base), plan)
    clock = Clock()
    callbacks = [train_model.CastWeightsOnce(model.device), clock]
    rows_of = {"train": rows, "val": rows.select(range(2))}
    data = {"val": {"author_bytes": 1}}
    trainer = train_model.trainer_with(callbacks, args, lab.folder / "trial", plan, model, rows_of, data)
    trainer.args.train_sampling_strategy = "sequential"
    trainer.train()
    return plan, sum(forecast.memory.values()), clock


# ---------------------------------------------------------------------------- the checks
def losses(lab: Lab) -> Iterator[Row]:
    """Another device and another precision must learn the same as the CPU in float32."""
    precision = "auto" if lab.has_card else "bf16"
    for name in ("gpt2", "llama"):
        expected = f"{name}-cpu"
        found = f"{name}-here"
        flags = input_flags(make_model(lab, name), make_data(lab), 8)
        run_training(lab, expected, *flags, cpu=True, **SMALL, PRECISION="fp32")
        run_training(lab, found, *flags, **SMALL, PRECISION=precision)

        used = training_report(lab, found)["plan"]["precision"]
        title = f"losses: {name}, {used} on {lab.device.type}, beside the CPU's"
        yield compare_losses(lab, title, found, expected)


def memory(lab: Lab) -> Iterator[Row]:
    """Measured beside planned memory: each way to train, then the planned way with little memory free."""
    free = train_model.free_memory(lab.device)
    runs = [(free, (way,), 0) for way in train_model.OPTIMIZERS]
    runs.append((free, train_model.OPTIMIZERS_OF_ADAPTERS[:1], train_model.USUAL_RANK))
    runs += [(min(cap, free), train_model.OPTIMIZERS, 0) for cap in CAPS]
    for free_bytes, ways, rank in runs:
        name = f"memory: {free_bytes / 1e9:.1f} GB free"
        yield from tried(lab, name, measure, name, free_bytes, ways, rank)


def measure(lab: Lab, name: str, free: float, ways: tuple, rank: int) -> Iterator[Row]:
    """Train in the first of `ways` that fits into `free` bytes."""
    half = train_model.CONTEXT_TOKENS // 2  # two documents a row, so that attention needs a mask
    rows = make_rows([half] * 8 * UPDATE, updates=4)
    try:
        with mock.patch.multiple(train_model, LORA_RANK=rank, OPTIMIZERS=ways, OPTIMIZERS_OF_ADAPTERS=ways):
            plan, planned, _ = plan_and_train(lab, rows, free)
    except SystemExit as stop:
        # A small card may lack memory for one of the ways, but the planned way must fit.
        passed = None if len(ways) == 1 else False
        yield Row(f"{name}, {ways[0]}", f"skipped: {stop}", "", passed)
        return

    peak = torch.cuda.max_memory_reserved()
    passed = peak <= planned + 1e9 if lab.has_card else None
    measured = f"{peak / 1e9:.2f} GB"
    wanted = f"at most {planned / 1e9:.2f} + 1 GB"
    yield Row(f"{name}, {describe(plan)}", measured, wanted, passed)


def describe(plan: train_model.Plan) -> str:
    recomputed = ", recomputed" if plan.checkpointing else ""
    return f"{plan.optimizer}{recomputed}, rank {plan.lora_rank}, {plan.rows_at_once} rows at once"


def recipe(lab: Lab) -> Iterator[Row]:
    """The default recipe as on an 8 GB card: three trials of the learning rate, then the run."""
    data = make_data(lab, posts=240, words=500) if lab.has_card else make_data(lab)
    flags = input_flags(make_model(lab, lab.large), data, 24, rate=train_model.AUTO)
    run_training(
        lab, "recipe", *flags, free_memory=lambda _: FREE_OF_8_GB, prepare_card=lambda _: lab.prepare(FREE_OF_8_GB)
    )

    found = training_report(lab, "recipe")
    bits = found["learning_rate"]["bits_per_byte_of_tried"].values()
    trials = sum(value is not None for value in bits)
    plan = describe(train_model.Plan(**found["plan"]))
    measured = f"{plan}; {trials} trials; {found['verdict']}"
    yield Row("recipe: 7.0 GB free", measured, "3 trials", trials == 3)


def speed(lab: Lab) -> Iterator[Row]:
    """Tokens a second in the fastest update, beside the stock recipe: Trainer as it comes, one document a row."""
    updates = 12 if lab.has_card else 4
    context = train_model.CONTEXT_TOKENS
    lengths = random.Random(0).choices(range(16, 2 * context), k=2 * updates * UPDATE)
    rows = make_rows(lengths, updates)
    _, _, clock = plan_and_train(lab, rows, train_model.free_memory(lab.device))
    ours = fastest_update(clock, [len(tokens) for tokens in rows["input_ids"]])

    lab.forget()
    lengths = [min(length, context) for length in lengths[: updates * UPDATE]]
    stock_rows = [{"input_ids": [1] * length} for length in lengths]
    try:
        with redirect_stdout(io.StringIO()):  # the trainer's log
            clock = train_stock(make_model(lab, lab.large), stock_rows, lab.device, lab.precision)
        stock = fastest_update(clock, lengths)
    except torch.OutOfMemoryError:
        stock = 0.0
    measured = f"{ours:,.0f} tokens/s beside {stock:,.0f} (0: out of memory)"
    # On a CPU, the speed of a tiny model means nothing.
    yield Row("speed: beside the stock recipe", measured, "more, on a card", ours > stock or not lab.has_card)


def resume(lab: Lab) -> Iterator[Row]:
    """A killed run continues as if nothing had happened, with the averages of 8-bit Adam."""
    train_resumably(lab, "whole")
    # Only another process can be killed.
    command = [sys.executable, __file__, "--victim", str(lab.folder)]
    if not lab.has_card:
        command.append("--tiny")
    status = subprocess.run(command, capture_output=True, timeout=300, check=False).returncode

    output = train_resumably(lab, "killed")
    goes_on = f"the run that stopped after update {KILLED_AT - 1}" in output
    passed = goes_on and status == -signal.SIGKILL
    measured = f"status {status}, went on {goes_on}"
    yield Row("resume: a killed run", measured, "status -9, went on True", passed)
    yield compare_losses(lab, "resume: losses beside the uninterrupted run's", "killed", "whole")


def train_resumably(lab: Lab, name: str) -> str:
    settings = {**SMALL, "OPTIMIZERS": (("adamw_bnb_8bit", False),), "CHECKPOINT_MINUTES": 0}
    flags = input_flags(make_model(lab), make_data(lab), 10)
    return run_training(lab, name, *flags, **settings)


def die(callback, args, state, control, **_) -> None:
    """Replaces Progress.on_log: kills the process before the checkpoint of the update is written."""
    if state.global_step == KILLED_AT:
        os.kill(os.getpid(), signal.SIGKILL)


def report(lab: Lab) -> Iterator[Row]:
    """The report of a fully trained model and of one with adapters."""
    script = str(Path(train_model.__file__).with_name("test_model.py"))
    data = make_data(lab)
    for name, rank in (("full", 0), ("adapters", 4)):
        flags = input_flags(make_model(lab), data, 4)
        run_training(lab, name, *flags, **SMALL, LORA_RANK=rank)
        command = [sys.executable, script, "--report", "--quick"]
        command += ["--model-dir", str(lab.folder / name), "--data-dir", str(data)]
        if not lab.has_card:
            command.append("--cpu")
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        last_line = "".join(done.stderr.splitlines()[-1:])
        measured = f"status {done.returncode}; {last_line}"
        yield Row(f"report: {name}", measured, "status 0", done.returncode == 0)


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
    parser.add_argument("--victim", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if not args.tiny and not torch.cuda.is_available():
        sys.exit("PyTorch finds no graphics card; use --tiny to test this script on the CPU.")

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    device = torch.device("cpu" if args.tiny else "cuda")
    large = "gpt2" if args.tiny else "medium"
    small = mock.patch.dict(vars(train_model), SMALL if args.tiny else {})
    with tempfile.TemporaryDirectory(prefix="bench_gpu-") as folder, small:
        precision = train_model.fastest_precision(device)
        lab = Lab(args.victim or Path(folder), device, not args.tiny, precision, large)
        if args.victim:
            with mock.patch.object(train_model.Progress, "on_log", die):
                train_resumably(lab, "killed")
            return 0
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
