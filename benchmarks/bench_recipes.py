"""What a recipe is worth: held-out bits per byte, the voice, and what is given away, one trained model a row.

    python benchmarks/bench_recipes.py --base-model sample/model --data-dir data [--rates 2e-5 1e-4 2e-4 4e-4]
        [--epochs 3] [--posts 18 6] [--name kevquirk] [--dropouts 0.1] [--overlaps 64] [--ranks 16 64] [--first-version]
        [--bits-alone]

`--posts 18 6` takes the first 18 conversations to train on and the first 6 held-out ones: a smaller blog. `--name` is
what the author is called in sample/strangers/README.md, to be left out of the crowd. The settings of `--dropouts`,
`--overlaps` and `--ranks` (LORA_RANK) are tried one by one, at the rate given last.

Each row is train_model.py, with an evaluation after every epoch, and then test_model.py's report at a fortieth of its
size (`--report --quick` with REPORT_SIZE = 0.25), which `--bits-alone` leaves out. `--first-version` adds a row for the
first version of this project, which held its weights in bfloat16, cut every post at 512 tokens and took the loss over
prompt and answer alike; it gets the same posts, rate and number of updates, and is measured by train_model.py's exact
evaluation. Prints a table.
"""

import argparse
import contextlib
import itertools
import json
import math
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    logging,
)

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from bench_train import hardware, stock_rows

import test_model
import train_model

SPLITS = ("train", "val")
COLUMNS = ("gain", "taken for the author", "copied", "any settings: tries", "own settings: tries", "membership")


@dataclass
class Outcome:
    """What came of one recipe: a row of the table."""

    recipe: str
    bits: list[float]  # bits per byte of the base model and after each epoch
    seen: dict = field(default_factory=dict)  # voice_report.json

    def gain(self) -> float:
        base, *later = self.bits
        return base - min(later)

    def line(self) -> str:
        cells = [self.recipe]
        cells += [f"{value:.4f}" for value in self.bits]
        cells.append(f"{self.gain():.4f}")
        cells += self.tell_report() if self.seen else [""] * (len(COLUMNS) - 1)
        return f"| {' | '.join(cells)} |"

    def tell_report(self) -> list[str]:
        """The columns that the report has measured, of what somebody might get out of the training posts."""
        reader = self.seen["reader"]
        taken = "not measured"
        if "tuned" in reader:
            low, high = reader["tuned"]["interval"]
            taken = f"{reader['tuned']['share']:.0%} ({low:.0%} to {high:.0%})"

        leaks = self.seen["leaks"]
        groups = [group for name, group in leaks["groups"].items() if name != "held-out"]
        membership = leaks.get("membership")
        return [
            taken,
            f"{self.seen['copies']['tuned']['share']:.2%}",
            fewest_tries(groups, "anyhow"),
            fewest_tries(groups, "own"),
            f"{membership['share']:.0%}" if membership else "",
        ]


def fewest_tries(groups: list[dict], chance: str) -> str:
    """Tries until the likeliest passage of all groups has an even chance to come out."""
    tries = [group[chance]["log10_tries"] for group in groups]
    possible = [number for number in tries if number is not None]
    return test_model.tell_power(min(possible)) if possible else "never"


@contextlib.contextmanager
def smaller_blog(folder: Path, posts: list[int] | None) -> Iterator[Path]:
    """A data folder with the first conversations of each split, or `folder` itself if `posts` is None."""
    if posts is None:
        yield folder
        return

    with tempfile.TemporaryDirectory() as scratch:
        for split, number in zip(SPLITS, posts, strict=True):
            name = f"{split}_data.jsonl"
            with (folder / name).open(encoding="utf-8") as lines:
                Path(scratch, name).write_text("".join(itertools.islice(lines, number)), encoding="utf-8")
        shutil.copy(folder / "extraction_report.json", scratch)
        yield Path(scratch)


@contextlib.contextmanager
def settings_of(module, values: dict) -> Iterator[None]:
    """The settings of a script as in `values` for a while."""
    usual = {name: getattr(module, name) for name in values}
    vars(module).update(values)
    try:
        yield
    finally:
        vars(module).update(usual)


def our_recipe(args: argparse.Namespace, data: Path, rate: float, **settings) -> Outcome:
    """Train and report with train_model.py under other `settings`."""
    watching = {"EVALUATIONS_PER_EPOCH": 1, "PATIENCE": args.epochs + 1}
    reporting = {"REPORT_SIZE": 0.25, "NOT_STRANGERS": [args.name] if args.name else []}

    with tempfile.TemporaryDirectory() as scratch, contextlib.redirect_stdout(sys.stderr):
        model = Path(scratch, "model")
        recipe = ["--learning-rate", str(rate), "--epochs", str(args.epochs)]
        with settings_of(train_model, {**watching, **settings}):
            folders = ["--data-dir", str(data), "--output-dir", str(model)]
            train_model.main(["--base-model", args.base_model, *recipe, *folders])
        history = json.loads((model / "training_report.json").read_text(encoding="utf-8"))

        seen = {}
        if not args.bits_alone:
            with settings_of(test_model, reporting):
                test_model.main(["--data-dir", str(data), "--model-dir", str(model), "--report", "--quick"])
            seen = json.loads((model / "voice_report.json").read_text(encoding="utf-8"))

    bits = [entry["eval_bits_per_byte"] for entry in train_model.evaluations(history["log"])]
    others = "".join(f", {name} {value:g}" for name, value in settings.items())
    return Outcome(f"{rate:g}{others}", bits, seen)


class Measure(TrainerCallback):
    """Held-out bits per byte before training and after every epoch, by the exact evaluation of train_model.py."""

    def __init__(self, rows, bytes_scored: int):
        self.rows = rows
        self.bytes_scored = bytes_scored
        self.bits = []

    def measure(self, model) -> None:
        model.eval()
        nats = train_model.conversation_losses(model, self.rows).sum()
        self.bits.append(nats / math.log(2) / self.bytes_scored)

    def on_train_begin(self, args, state, control, model, **_):
        self.measure(model)

    def on_epoch_end(self, args, state, control, model, **_):
        self.measure(model)


def first_recipe(args: argparse.Namespace, data: Path, rate: float) -> Outcome:
    """The first version's recipe, in as many updates as train_model.py makes of the same posts."""
    tokenizer = train_model.load_tokenizer(args.base_model)
    conversations = {split: train_model.read_conversations(data / f"{split}_data.jsonl") for split in SPLITS}
    tokenized = {split: train_model.tokenize(tokenizer, entries) for split, entries in conversations.items()}
    ours = {
        split: train_model.make_rows(entries, 512, train_model.OVERLAP_TOKENS) for split, entries in tokenized.items()
    }
    measure = Measure(ours["val"], train_model.author_bytes(conversations["val"]))

    rows, _ = stock_rows(tokenizer, conversations["train"])
    updates_per_epoch = math.ceil(len(ours["train"]) / train_model.ROWS_PER_UPDATE)
    arguments = TrainingArguments(
        output_dir="/nonexistent",
        per_device_train_batch_size=1,
        gradient_accumulation_steps=max(1, round(len(rows) / updates_per_epoch)),
        num_train_epochs=args.epochs,
        learning_rate=rate,
        warmup_steps=0.1,
        bf16=True,
        use_cpu=True,
        seed=42,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    model = AutoModelForCausalLM.from_pretrained(args.base_model, dtype=torch.bfloat16)
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    with contextlib.redirect_stdout(sys.stderr):
        Trainer(model, arguments, train_dataset=rows, data_collator=collator, callbacks=[measure]).train()
    return Outcome(f"first version, {rate:g}", measure.bits)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base-model", required=True)
    parser.add_argument("--data-dir", type=Path, default=Path("data"))
    parser.add_argument("--posts", type=int, nargs=2, metavar=("TRAIN", "VAL"))
    parser.add_argument("--name", help="of the author among the strangers")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--rates", type=float, nargs="+", default=[2e-5, 1e-4, 2e-4, 4e-4])
    parser.add_argument("--dropouts", type=float, nargs="*", default=[])
    parser.add_argument("--overlaps", type=int, nargs="*", default=[])
    parser.add_argument("--ranks", type=int, nargs="*", default=[])
    parser.add_argument("--first-version", action="store_true")
    parser.add_argument("--bits-alone", action="store_true", help="no report: gains only, in a third less time")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    logging.set_verbosity_error()
    train_model.keep_freed_memory()

    epochs = [f"epoch {epoch + 1}" for epoch in range(args.epochs)]
    columns = ["learning rate", "base", *epochs, *COLUMNS]
    print(f"{hardware()}\n\n| {' | '.join(columns)} |")
    print("|---" * len(columns) + "|", flush=True)

    last_rate = args.rates[-1]
    tries = [(rate, {}) for rate in args.rates]
    tries += [(last_rate, {"DROPOUT": value}) for value in args.dropouts]
    tries += [(last_rate, {"OVERLAP_TOKENS": value}) for value in args.overlaps]
    tries += [(last_rate, {"LORA_RANK": value}) for value in args.ranks]

    with smaller_blog(args.data_dir, args.posts) as data:
        if args.first_version:
            print(first_recipe(args, data, args.rates[0]).line(), flush=True)
        for rate, settings in tries:
            print(our_recipe(args, data, rate, **settings).line(), flush=True)


if __name__ == "__main__":
    main()
