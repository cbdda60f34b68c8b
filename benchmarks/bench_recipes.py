"""What a recipe is worth: held-out bits per byte, the voice, and what is given away, one trained model a row.

    python benchmarks/bench_recipes.py --base-model sample/model --data-dir data [--rates 2e-5 1e-4 2e-4 auto]
        [--epochs 3] [--posts 18 6] [--name kevquirk] [--words 3000] [--dropouts 0.1] [--overlaps 64] [--ranks 0 16 64]
        [--seeds 42 43 44] [--bits-alone]

`--posts 18 6` takes the first 18 conversations to train on and the first 6 held-out ones: a smaller blog. `--name` is
what the author is called in sample/strangers/README.md, to be left out of the crowd. A rate is a number, or "auto",
whose row names what was found. Every rate is tried with each of `--ranks` (LORA_RANK), which is 0 unless given; the
settings of `--dropouts` and `--overlaps` one by one, at the rate given last.

Each row is a process of its own: train_model.py, with an evaluation after every epoch; then test_model.py's report at
a fortieth of its size (REPORT_SIZE = 0.025), for what is given away: tries until the likeliest 12 tokens of the private
posts (with `--posts` all count as private) have an even chance to come out. Last `--words` words, which the report's
reader judges, who knows all training posts of the whole blog; `--bits-alone` leaves the two last out. A first row gives
the voice of the base model. Minutes are those of the training, gigabytes the most that it took.
"""

import argparse
import contextlib
import itertools
import json
import multiprocessing
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

from transformers import logging

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from bench_reader import judge, write
from bench_train import hardware, peak_gigabytes

import test_model
import train_model
from extract_blog_data import flag_type
from train_model import DATA_FILES
from voice.leaks import LENGTHS, tell_power
from voice.loading import choose_device
from voice.reader import ReaderShare

REPORTED = ("copied", "any settings: tries", "own settings: tries")
COLUMNS = ("gain", "minutes", "GB", "taken for the author", *REPORTED)


@dataclass
class Outcome:
    """What came of one recipe: a row of the table."""

    recipe: str
    bits: list[float] = field(default_factory=list)  # bits per byte of the base model and after each epoch
    minutes: float | None = None
    gigabytes: float | None = None
    taken: ReaderShare | None = None
    seen: dict = field(default_factory=dict)  # voice_report.json

    def line(self, epochs: int) -> str:
        bits = [f"{value:.4f}" for value in self.bits] or [""] * (1 + epochs)
        gain = f"{self.bits[0] - min(self.bits[1:]):.4f}" if self.bits else ""
        reported = self.tell_report() if self.seen else [""] * len(REPORTED)
        cells = [self.recipe, *bits, gain]
        cells += [tell(self.minutes), tell(self.gigabytes), tell_taken(self.taken), *reported]
        return f"| {' | '.join(cells)} |"

    def tell_report(self) -> list[str]:
        """The columns REPORTED: what somebody might get out of the training posts."""
        copied = self.seen["copies"]["tuned"]["share"]
        by_group = self.seen["leaks"]["by_length"][str(LENGTHS[0])]
        groups = [group for name, group in by_group.items() if name != "held-out"]
        return [f"{copied:.2%}", fewest_tries(groups, "bound"), fewest_tries(groups, "sampled")]


def tell(number: float | None) -> str:
    return "" if number is None else f"{number:.1f}"


def tell_taken(taken: ReaderShare | None) -> str:
    if taken is None:
        return ""
    low, high = taken.interval
    return f"{taken.share:.0%} ({low:.0%} to {high:.0%})"


def fewest_tries(groups: list[dict], chance: str) -> str:
    """Tries until the likeliest passage of all groups has an even chance to come out; only private posts are read."""
    if not groups:
        return "not read"
    tries = [group[chance]["log10_tries"] for group in groups]
    possible = [number for number in tries if number is not None]
    return tell_power(min(possible)) if possible else "never"


@contextlib.contextmanager
def smaller_blog(folder: Path, posts: list[int] | None) -> Iterator[Path]:
    """A data folder with the first conversations of each split, or `folder` itself if `posts` is None.

    In the small one every conversation counts as private, so that the leak check reads it.
    """
    if posts is None:
        yield folder
        return

    with tempfile.TemporaryDirectory() as scratch:
        for split, number in zip(DATA_FILES, posts, strict=True):
            name = f"{split}_data.jsonl"
            with (folder / name).open(encoding="utf-8") as lines:
                chosen = [json.loads(line) | {"visibility": "private"} for line in itertools.islice(lines, number)]
            text = "".join(json.dumps(conversation) + "\n" for conversation in chosen)
            Path(scratch, name).write_text(text, encoding="utf-8")
        # Its hashes are those of the whole data.
        report = json.loads((folder / "extraction_report.json").read_text(encoding="utf-8"))
        report.pop("sha256", None)
        Path(scratch, "extraction_report.json").write_text(json.dumps(report), encoding="utf-8")
        yield Path(scratch)


def our_recipe(args: argparse.Namespace, data: Path, rate: float | str, seed: int, others: dict) -> Outcome:
    """Train and report with train_model.py under `others`, by the name of the setting."""
    logging.set_verbosity_error()
    train_model.keep_freed_memory()
    changed = "".join(f", {name.upper()} {value:g}" for name, value in others.items())
    changed += f", seed {seed}" if len(args.seeds) > 1 else ""
    outcome = Outcome(f"{rate}{changed}")

    with tempfile.TemporaryDirectory() as scratch, contextlib.redirect_stdout(sys.stderr):
        model = Path(scratch, "model")
        flags = ["--base-model", args.base_model, "--data-dir", str(data), "--output-dir", str(model)]
        recipe = {"learning_rate": rate, "epochs": args.epochs, "seed": seed, **others}
        settings = replace(train_model.parse_arguments(flags), **recipe)
        began = time.monotonic()
        train_model.train(replace(settings, evaluations_per_epoch=1, patience=args.epochs + 1))
        outcome.minutes = (time.monotonic() - began) / 60
        outcome.gigabytes = peak_gigabytes()

        history = train_model.read_json_object(model / "training_report.json")
        if rate == train_model.AUTO:
            outcome.recipe = f"{rate} ({history['learning_rate']['used']:g}){changed}"
        outcome.bits = [entry["eval_bits_per_byte"] for entry in train_model.evaluations(history["log"])]
        if not args.bits_alone:
            outcome.seen = report_of(args, data, model)
            outcome.taken = voice_of(args, model)
    return outcome


def report_of(args: argparse.Namespace, data: Path, model: Path) -> dict:
    """What voice_report.json holds, made from a fortieth of the words."""
    settings, mode = test_model.parse_arguments(["--data-dir", str(data), "--model-dir", str(model), "--report"])
    settings = replace(settings, report_size=0.025, not_strangers=names_of(args))
    test_model.run(settings, mode, choose_device(cpu_wanted=False))
    return train_model.read_json_object(model / "voice_report.json")


def names_of(args: argparse.Namespace) -> tuple[str, ...]:
    """Of the author among the strangers."""
    return (args.name,) if args.name else ()


def voice_of(args: argparse.Namespace, model: Path) -> ReaderShare:
    """How much of what a model writes the reader gives to the author, known by the whole blog."""
    texts = write(model, args.data_dir, args.words)
    return judge(args.data_dir, {"model": texts}, names_of(args))["model"]


def base_voice(args: argparse.Namespace) -> Outcome:
    """The first row: how much of the base model's text passes for the author's."""
    logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as scratch:
        # test_model.py asks a tuned model by its chat template, which train_model.py gives to a base model without.
        model = Path(scratch, "model")
        shutil.copytree(args.base_model, model)
        train_model.load_tokenizer(args.base_model).save_pretrained(model)
        return Outcome("base model", taken=voice_of(args, model))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base-model", required=True)
    parser.add_argument("--data-dir", type=Path, default=Path("data"))
    parser.add_argument("--posts", type=int, nargs=2, metavar=("TRAIN", "VAL"))
    parser.add_argument("--name", help="of the author among the strangers")
    parser.add_argument("--words", type=int, default=3_000, help="that the reader judges")
    parser.add_argument("--epochs", type=int, default=3)
    rate = flag_type(train_model.SETTINGS["LEARNING_RATE"])
    parser.add_argument("--rates", type=rate, nargs="+", default=[2e-5, 1e-4, 2e-4, 4e-4])
    parser.add_argument("--dropouts", type=float, nargs="*", default=[])
    parser.add_argument("--overlaps", type=int, nargs="*", default=[])
    parser.add_argument("--ranks", type=int, nargs="+", default=[0], help="LORA_RANK; 0 trains the whole model")
    parser.add_argument("--seeds", type=int, nargs="+", default=[42], help="every row once with each")
    parser.add_argument("--bits-alone", action="store_true", help="no report and no voice: gains only")
    return parser.parse_args()


def apart(work, *given) -> Outcome:
    """`work(*given)` in a new process, so that its memory is its own."""
    with ProcessPoolExecutor(max_workers=1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(work, *given).result()


def main() -> None:
    args = parse_arguments()
    epochs = [f"epoch {epoch + 1}" for epoch in range(args.epochs)]
    columns = ["learning rate", "base", *epochs, *COLUMNS]
    print(f"{hardware()}\n\n| {' | '.join(columns)} |")
    print("|---" * len(columns) + "|", flush=True)

    last_rate = args.rates[-1]
    tries = [(rate, {"lora_rank": rank} if rank else {}) for rate in args.rates for rank in args.ranks]
    tries += [(last_rate, {"dropout": value}) for value in args.dropouts]
    tries += [(last_rate, {"overlap_tokens": value}) for value in args.overlaps]

    with smaller_blog(args.data_dir, args.posts) as data:
        if not args.bits_alone:
            print(apart(base_voice, args).line(args.epochs), flush=True)
        for (rate, others), seed in itertools.product(tries, args.seeds):
            print(apart(our_recipe, args, data, rate, seed, others).line(args.epochs), flush=True)


if __name__ == "__main__":
    main()
