"""What only a graphics card can show of train_model.py and test_model.py, in about eight minutes, with random weights.

    python benchmarks/bench_gpu.py                    # on a card
    python benchmarks/bench_gpu.py --tiny             # on a CPU, with tiny models: tests this script
    python benchmarks/bench_gpu.py --collect FOLDER   # packages for a machine that reaches no registry

Prints a table, each row as soon as it is measured; "-" is a figure that nothing is asked of. The exit status is 1 if a
row says FAIL. Needs what `make install` installs, no hub, and 10 GB in the folder for temporary files (TMPDIR).
"""

import argparse
import gc
import importlib.metadata
import io
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import zipfile
from collections import namedtuple
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import NamedTuple
from unittest import mock

os.environ["HF_HUB_OFFLINE"] = "1"  # models are made here
if "--tiny" in sys.argv:
    os.environ["OMP_NUM_THREADS"] = "1"  # tiny models are faster so, also in other processes
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import transformers
from accelerate.state import AcceleratorState
from bench_train import UPDATE, Clock, hardware, stock_trainer
from tokenizers import ByteLevelBPETokenizer
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import train_model
from train_model import prepare_card

TOLERANCE = 1e-3  # nats; in bfloat16 on a CPU losses are 2e-4 from float32's, the rest is room
CAPS = (6.2e9, 6.4e9, 6.6e9, 7.2e9)  # bytes free, about where the plan for GPT2-medium changes
FREE_OF_8_GB = 7_000_000_000  # bytes, beside a desktop
WARM_UP = 2  # updates that no speed is read from
KILLED_AT = 5  # the update that a run is killed in
NO_CARD = "no card: skipped"
Row = namedtuple("Row", "name measured wanted passed", defaults=("", None))  # passed is None for a figure


class Lab(NamedTuple):
    """What a check is given: where it may write, where it runs, and as what."""

    folder: Path
    device: torch.device
    has_card: bool
    precision: str
    large: str  # the model whose size counts, of MODELS

    def prepare(self, free: float) -> None:
        """As prepare_card, which leaves 0.3 GB to CUDA itself, where the card has `free` bytes."""
        prepare_card(self.device)
        if self.has_card:
            _, total = torch.cuda.mem_get_info()
            torch.cuda.set_per_process_memory_fraction(min(1.0, (free - 3e8) / total))

    def forget(self) -> None:
        """As a new process would begin: all of the card's memory is free, and counted from here."""
        if "bitsandbytes" in sys.modules:  # which keeps the embeddings of every model that it trained
            sys.modules["bitsandbytes"].optim.GlobalOptimManager.get_instance().initialize()
        AcceleratorState._reset_state(reset_partial_state=True)  # it would stay on the device of the run before
        gc.collect()
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
WORDS = ["the", "kettle", "sings", "at", "night", "and", "gull", "says", "nothing", "to", "me", "bake", "bread"]


def make_model(lab: Lab, name: str = "gpt2") -> Path:
    """A model folder as from the hub, made once. Its tokenizer has a few hundred tokens; the model may know more."""
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
    AutoModelForCausalLM.from_config(config, trust_remote_code=False).save_pretrained(folder)
    return folder


def make_data(lab: Lab, posts: int = 40, words: int = 60) -> Path:
    """Made-up posts of up to `words` words, and 6 held-out ones."""
    dice = random.Random(0)
    folder = lab.folder / f"data-{posts}"
    folder.mkdir(exist_ok=True)
    for split, count in (("train", posts), ("val", 6)):
        lines = []
        for number in range(count):
            text = " ".join(dice.choices(WORDS, k=dice.randint(words // 4, words)))
            post = {"kind": "post", "visibility": ("public", "private")[number % 2], "path": f"{number}.md"}
            post |= {"blog": "blog", "title": f"post {number}", "date": "2006-08-25"}
            request = {"role": "user", "content": f"Write about {dice.choice(WORDS)}."}
            post["messages"] = [request, {"role": "assistant", "content": text}]
            lines.append(json.dumps(post) + "\n")
        (folder / f"{split}_data.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder


def make_rows(lengths: list[int], updates: int):
    """Packed rows, in a random order, of documents with so many random tokens, all scored."""
    dice = random.Random(0)
    tokenized = [(dice.choices(range(1, 500), k=length), [True] * length) for length in lengths]
    rows = train_model.make_rows(tokenized, train_model.CONTEXT_TOKENS, 0, multiple=UPDATE)
    return rows.shuffle(seed=0).select(range(updates * UPDATE))


def run_training(lab: Lab, name: str, *flags: str, cpu: bool = False, **settings) -> str:
    """train_model.main with these settings, into the folder `name`; returns what it said. Raises SystemExit as it."""
    lab.forget()
    arguments = ["--output-dir", str(lab.folder / name), *flags]
    if cpu or not lab.has_card:
        arguments.append("--cpu")
        settings["pick_precision"] = lambda _, wanted: "fp32" if wanted == "auto" else wanted
    said = io.StringIO()
    with mock.patch.multiple(train_model, **settings), redirect_stderr(said), redirect_stdout(said):
        train_model.main(arguments)
    return said.getvalue()


def input_flags(base: Path, data: Path, updates: int, rate: str = "1e-3") -> tuple[str, ...]:
    return "--base-model", str(base), "--data-dir", str(data), "--max-steps", str(updates), "--learning-rate", rate


def report_of(lab: Lab, name: str) -> dict:
    return json.loads((lab.folder / name / "training_report.json").read_text(encoding="utf-8"))


def compare_losses(lab: Lab, name: str, one: str, other: str) -> Row:
    """Of updates and evaluations of two runs, up to the first that float16's scaling skipped."""
    histories = []
    for run in (one, other):
        entries = itertools.takewhile(lambda entry: not entry.get("skipped"), report_of(lab, run)["log"])
        histories.append([entry.get("loss", entry.get("eval_loss")) for entry in entries if "train_loss" not in entry])
    apart = [abs(found - expected) for found, expected in zip(*histories, strict=False)]
    return Row(
        name, f"{len(apart)} losses, {max(apart):.1e} nats apart", f"at most {TOLERANCE:g}", max(apart) <= TOLERANCE
    )


def plan_and_train(lab: Lab, rows, free: float) -> tuple[train_model.Plan, float, Clock]:
    """Trains as train_model.py does with `free` bytes; (plan, bytes planned, clock). SystemExit where nothing fits."""
    base = make_model(lab, lab.large)
    args = train_model.parse_arguments([*input_flags(base, lab.folder, len(rows) // UPDATE)])
    machine = train_model.Machine(train_model.PartialState(cpu=not lab.has_card).device, 1, lab.precision, int(free))
    lab.prepare(free)
    plan, forecast = train_model.make_plan(args, train_model.load_config(base), rows, machine)
    model = train_model.prepare_to_train(train_model.load_for_training(base), plan)
    callbacks = [train_model.CastWeightsOnce(model.device), Clock()]
    rows_of = {"train": rows, "val": rows.select(range(2))}
    data = {"val": {"author_bytes": 1}}
    trainer = train_model.trainer_with(callbacks, args, lab.folder / "trial", plan, model, rows_of, data)
    trainer.args.train_sampling_strategy = "sequential"
    trainer.train()
    return plan, sum(forecast.memory.values()), callbacks[1]


# ---------------------------------------------------------------------------- the checks
def card(lab: Lab) -> Iterator[Row]:
    """What the figures are of."""
    told = NO_CARD
    if lab.has_card:
        free, total = torch.cuda.mem_get_info()
        generation = ".".join(map(str, torch.cuda.get_device_capability()))
        told = f"{train_model.find_nvidia_card()}, {generation}, {free / 1e9:.1f} GB of {total / 1e9:.1f} GB free"
    yield Row("card", f"{told}; {lab.precision}; torch {torch.__version__}, CUDA {torch.version.cuda}")


def losses(lab: Lab) -> Iterator[Row]:
    """Another device and another precision must learn the same as the CPU in float32."""
    precision = "auto" if lab.has_card else "bf16"  # slow or not, for the sake of its code
    for name in ("gpt2", "llama"):
        flags = input_flags(make_model(lab, name), make_data(lab), 8)
        run_training(lab, f"{name}-cpu", *flags, cpu=True, **SMALL, PRECISION="fp32")
        run_training(lab, f"{name}-here", *flags, **SMALL, PRECISION=precision)
        used = report_of(lab, f"{name}-here")["plan"]["precision"]
        told = f"losses: {name}, {used} on {lab.device.type}, beside the CPU's"
        yield compare_losses(lab, told, f"{name}-here", f"{name}-cpu")


def memory(lab: Lab) -> Iterator[Row]:
    """Measured beside planned for every way to train, then for what is planned with little memory."""
    free = train_model.free_memory(lab.device)
    runs = [(free, (way,), 0) for way in train_model.OPTIMIZERS]
    runs.append((free, train_model.OPTIMIZERS_OF_ADAPTERS[:1], train_model.USUAL_RANK))
    runs += [(min(cap, free), train_model.OPTIMIZERS, 0) for cap in CAPS]
    for run in runs:
        yield from tried(lab, f"memory: {run[0] / 1e9:.1f} GB free, {run[1][0][0]}", measure, *run)


def measure(lab: Lab, free: float, ways: tuple, rank: int) -> Iterator[Row]:
    """Trains in the first of `ways` that fits into `free` bytes."""
    half = train_model.CONTEXT_TOKENS // 2  # two documents a row, so that attention needs a mask
    rows = make_rows([half] * 8 * UPDATE, updates=4)
    try:
        with mock.patch.multiple(train_model, LORA_RANK=rank, OPTIMIZERS=ways, OPTIMIZERS_OF_ADAPTERS=ways):
            plan, needed, _ = plan_and_train(lab, rows, free)
    except SystemExit as stop:
        # A small card need not have room for every way, but for that which is planned.
        yield Row(f"memory: {ways[0]}", f"skipped: {stop}", "", None if len(ways) == 1 else False)
        return
    name = f"memory: {free / 1e9:.1f} GB free, {tell_plan(plan)}"
    peak = torch.cuda.max_memory_reserved() if lab.has_card else 0
    row = Row(name, f"{peak / 1e9:.2f} GB", f"at most {needed / 1e9:.2f} + 1 GB", peak <= needed + 1e9)
    yield row if lab.has_card else Row(name, NO_CARD)


def tell_plan(plan: train_model.Plan) -> str:
    way = plan.optimizer + (", recomputed" if plan.checkpointing else "")
    return f"{way}, adapters of rank {plan.lora_rank}" if plan.lora_rank else f"{way}, {plan.rows_at_once} rows at once"


def recipe(lab: Lab) -> Iterator[Row]:
    """The default recipe as on a card with 8 GB: three trials of the learning rate, the run, the model's folder."""
    data = make_data(lab, *((240, 500) if lab.has_card else (24, 60)))
    flags = input_flags(make_model(lab, lab.large), data, 24 if lab.has_card else 6, rate=train_model.AUTO)
    settings = {"free_memory": lambda _: FREE_OF_8_GB, "prepare_card": lambda _: lab.prepare(FREE_OF_8_GB)}
    run_training(lab, "recipe", *flags, **settings)
    found = report_of(lab, "recipe")
    bits = [bits for bits in found["learning_rate"]["bits_per_byte_of_tried"].values() if bits is not None]
    is_whole = (lab.folder / "recipe" / "model.safetensors").is_file()
    told = f"{tell_plan(train_model.Plan(**found['plan']))}; {len(bits)} trials; {found['verdict']}"
    yield Row("recipe: 7.0 GB free", told, "3 trials, a model's folder", is_whole and len(bits) == 3)


def speed(lab: Lab) -> Iterator[Row]:
    """Tokens a second beside the stock recipe: Trainer as it comes, one document a row, one row at a time."""
    updates = WARM_UP + (10 if lab.has_card else 2)
    context = train_model.CONTEXT_TOKENS
    lengths = random.Random(0).choices(range(16, 2 * context), k=2 * updates * UPDATE)
    rows = make_rows(lengths, updates)
    _, _, clock = plan_and_train(lab, rows, train_model.free_memory(lab.device))
    ours = tokens_a_second(rows["input_ids"], clock.seconds)
    lab.forget()
    base = make_model(lab, lab.large)
    tokenizer = train_model.load_tokenizer(base)
    model = AutoModelForCausalLM.from_pretrained(base, trust_remote_code=False, dtype=torch.float32)
    stock_rows = [{"input_ids": [1] * min(length, context)} for length in lengths[: updates * UPDATE]]
    clock = Clock()  # stock_trainer prints its log, and does not fit a small card
    with redirect_stdout(io.StringIO()), suppress(torch.OutOfMemoryError):
        stock_trainer(model.to(lab.device), tokenizer, stock_rows, updates, lab.precision, clock).train()
    stock = tokens_a_second([row["input_ids"] for row in stock_rows], clock.seconds)
    told = f"{ours:,.0f} tokens/s beside {stock:,.0f} (0: out of memory)"
    # On a CPU a tiny model's seconds mean nothing.
    yield Row("speed: beside the stock recipe", told, "more, on a card", ours > stock or not lab.has_card)


def tokens_a_second(rows: list[list[int]], seconds: list[float]) -> float:
    """Padding not counted; 0 where training broke off."""
    tokens = sum(map(len, rows[WARM_UP * UPDATE :]))
    return tokens / sum(seconds[WARM_UP:]) if len(seconds) * UPDATE == len(rows) else 0.0


def resume(lab: Lab) -> Iterator[Row]:
    """A run that is killed goes on as if nothing had happened, with 8-bit Adam's averages."""
    train_resumably(lab, "whole")
    # Only another process can be killed.
    command = [sys.executable, __file__, "--victim", str(lab.folder), *([] if lab.has_card else ["--tiny"])]
    killed = subprocess.run(command, capture_output=True, timeout=300, check=False).returncode
    said = train_resumably(lab, "killed")
    goes_on = f"the run that stopped after update {KILLED_AT - 1}" in said
    told = f"status {killed}, went on {goes_on}"
    yield Row("resume: a killed run", told, "status -9, went on True", goes_on and killed == -signal.SIGKILL)
    yield compare_losses(lab, "resume: losses beside the uninterrupted run's", "killed", "whole")


def train_resumably(lab: Lab, name: str) -> str:
    settings = {**SMALL, "OPTIMIZERS": (("adamw_bnb_8bit", False),), "CHECKPOINT_MINUTES": 0}
    return run_training(lab, name, *input_flags(make_model(lab), make_data(lab), 10), **settings)


def die(callback, args, state, control, **_) -> None:
    """In place of Progress.on_log: ends the run in the middle, before the checkpoint of its update is written."""
    if state.global_step == KILLED_AT:
        os.kill(os.getpid(), signal.SIGKILL)


def report(lab: Lab) -> Iterator[Row]:
    """The report, and an answer, of a tuned model, also of one with adapters."""
    script = str(Path(train_model.__file__).with_name("test_model.py"))
    data = make_data(lab)
    for name, rank in (("full", 0), ("adapters", 4)):
        run_training(lab, name, *input_flags(make_model(lab), data, 4), **SMALL, LORA_RANK=rank)
        command = [sys.executable, script, "--model-dir", str(lab.folder / name), "--data-dir", str(data)]
        command += [] if lab.has_card else ["--cpu"]
        for mode in (["--report", "--quick"], ["--prompt", "What is new?"]):
            done = subprocess.run([*command, *mode], capture_output=True, text=True, timeout=300, check=False)
            told = f"status {done.returncode}; {' '.join(done.stderr.splitlines()[-1:])}"
            yield Row(f"report: {name}, {mode[0]}", told, "status 0", done.returncode == 0)


CHECKS = {act.__name__: act for act in (card, losses, memory, recipe, speed, resume, report)}
ERRORS = (RuntimeError, SystemExit, subprocess.SubprocessError, OSError, ValueError, LookupError, TypeError)


def tried(lab: Lab, name: str, act: Callable[..., Iterator[Row]], *arguments) -> Iterator[Row]:
    """The rows of `act`; an error is one more, and ends only these."""
    lab.forget()
    try:
        yield from act(lab, *arguments)
    except ERRORS as error:
        yield Row(name, " ".join([type(error).__name__, *str(error).splitlines()[:1]]), "no error", False)


# ---------------------------------------------------------------------------- packages
# For a machine with PyTorch, numpy, pandas, pyarrow, matplotlib, and what these and an older transformers need.
PACKAGES = """transformers tokenizers huggingface-hub httpx2 httpcore2 truststore click fsspec safetensors accelerate
    datasets dill multiprocess xxhash bitsandbytes peft psutil python-frontmatter PyYAML Markdown beautifulsoup4
    soupsieve ftfy wcwidth Jinja2 MarkupSafe"""
OTHER_LIBRARIES = ("_cuda11", "_cuda12", "_rocm", "_xpu")  # of bitsandbytes: 125 MB for other machines


def collect(folder: Path) -> int:
    """Wheels for Linux (x86-64) and Python 3.12 in `folder`, in the versions that are installed here."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--python-version=3.12", "--implementation=cp", f"--dest={folder}"]
    command += [f"--platform=manylinux_2_{minor}_x86_64" for minor in (34, 31, 28, 27, 24, 17, 12, 5)]
    command += [f"{name}=={importlib.metadata.version(name)}" for name in PACKAGES.split()]
    if subprocess.run(command, check=False).returncode:
        sys.exit("pip could not get the packages; what it said stands above.")
    for wheel in folder.glob("bitsandbytes-*.whl"):
        thin = wheel.with_suffix(".thin")
        with zipfile.ZipFile(wheel) as old, zipfile.ZipFile(thin, "w", zipfile.ZIP_DEFLATED) as new:
            for name in old.namelist():
                if not any(other in name for other in OTHER_LIBRARIES):
                    new.writestr(name, old.read(name))
        thin.replace(wheel)
    print(f"There: pip install --no-index --no-deps --target packages {folder.name}/*.whl")
    return 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="tiny models, on the CPU")
    parser.add_argument("--only", choices=CHECKS, metavar="NAME", help=", ".join(CHECKS))
    parser.add_argument("--collect", type=Path, metavar="FOLDER", help="download packages, and do nothing else")
    parser.add_argument("--victim", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.collect:
        return collect(args.collect)
    if not args.tiny and not torch.cuda.is_available():
        sys.exit("PyTorch sees no graphics card here: --tiny tests this script on the CPU.")

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    device = torch.device("cpu" if args.tiny else "cuda")
    size = "gpt2" if args.tiny else "medium"
    small = mock.patch.dict(vars(train_model), SMALL if args.tiny else {})
    with tempfile.TemporaryDirectory(prefix="bench_gpu-") as folder, small:
        lab = Lab(args.victim or Path(folder), device, not args.tiny, train_model.fastest_precision(device), size)
        if args.victim:
            with mock.patch.object(train_model.Progress, "on_log", die):
                train_resumably(lab, "killed")
            return 0
        return run_checks(lab, [args.only] if args.only else list(CHECKS))


def run_checks(lab: Lab, names: list[str]) -> int:
    """Prints each row as soon as it is there; returns the exit status."""
    print(f"{hardware()}\n\n| check | measured | wanted | |\n|---|---|---|---|", flush=True)
    verdicts = {True: "PASS", False: "FAIL", None: "-"}
    found = []
    for name in names:
        for row in tried(lab, name, CHECKS[name]):
            found.append(verdicts[row.passed])
            print(f"| {row.name} | {row.measured} | {row.wanted} | {found[-1]} |", flush=True)
    return 1 if "FAIL" in found else 0


if __name__ == "__main__":
    sys.exit(main())
