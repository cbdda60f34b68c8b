"""What a recipe is worth: held-out bits per byte of the first version of this project beside train_model.py.

    python benchmarks/bench_recipes.py --base-model sample/model --data-dir data [--epochs 3] [--rates 2e-5 5e-5]
                                       [--dropouts 0.1] [--overlaps 64]

The first version held its weights in bfloat16, cut every post at 512 tokens and took the loss over prompt and answer
alike. Both sides get the same base model, posts, learning rate and number of updates; both are measured by
train_model.py's exact evaluation after every epoch. Of our models test_model.py's report, at a quarter of its size,
says what they copy and give away. Prints a table.
"""

import argparse
import contextlib
import json
import sys
import tempfile
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

COLUMNS = (
    "best gain",
    "8-word runs copied",
    "taken for the author",
    "passages by greedy decoding",
    "tries, any settings",
)


class Measure(TrainerCallback):
    """Held-out bits per byte after every epoch, by the exact evaluation of train_model.py."""

    def __init__(self, rows, bytes_scored: int):
        self.rows, self.bytes_scored, self.bits = rows, bytes_scored, []

    def measure(self, model) -> None:
        model.eval()
        nats = train_model.conversation_losses(model, self.rows).sum()
        self.bits.append(nats / torch.log(torch.tensor(2.0)).item() / self.bytes_scored)

    def on_train_begin(self, args, state, control, model, **_):
        self.measure(model)

    def on_epoch_end(self, args, state, control, model, **_):
        self.measure(model)


def first_recipe(args, conversations: dict, rate: float, updates_per_epoch: int) -> list[float]:
    """Bits per byte of the base and after each epoch with the first version's recipe."""
    tokenizer = train_model.load_tokenizer(args.base_model)
    rows, _ = stock_rows(tokenizer, conversations["train"])
    held_out = [train_model.conversation_tokens(tokenizer, entry["messages"]) for entry in conversations["val"]]
    held_out = train_model.make_rows(held_out, 512, train_model.OVERLAP_TOKENS)
    measure = Measure(held_out, train_model.author_bytes(conversations["val"]))
    accumulation = max(1, round(len(rows) / updates_per_epoch))
    arguments = TrainingArguments(
        output_dir="/nonexistent", per_device_train_batch_size=1, gradient_accumulation_steps=accumulation,
        num_train_epochs=args.epochs, learning_rate=rate, warmup_steps=0.1, bf16=True, use_cpu=True, seed=42,
        save_strategy="no", report_to="none", disable_tqdm=True,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(args.base_model, dtype=torch.bfloat16)
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    with contextlib.redirect_stdout(sys.stderr):
        Trainer(model, arguments, train_dataset=rows, data_collator=collator, callbacks=[measure]).train()
    return measure.bits


def our_recipe(args, rate: float, **settings) -> tuple[list[float], int, list[str]]:
    """The same with train_model.py under other `settings`; its updates per epoch; what the model copies and leaks."""
    usual = {name: getattr(train_model, name) for name in settings}
    vars(train_model).update(settings, EVALUATIONS_PER_EPOCH=1, PATIENCE=99)
    with tempfile.TemporaryDirectory() as scratch:
        output, data = str(Path(scratch, "model")), ["--data-dir", str(args.data_dir)]
        flags = ["--base-model", args.base_model, "--learning-rate", str(rate), "--epochs", str(args.epochs)]
        with contextlib.redirect_stdout(sys.stderr):
            train_model.main([*flags, *data, "--output-dir", output])
            test_model.main([*data, "--model-dir", output, "--report"])
        report = json.loads(Path(output, "training_report.json").read_text(encoding="utf-8"))
        seen = json.loads(Path(output, "voice_report.json").read_text(encoding="utf-8"))
    vars(train_model).update(usual)
    evaluations = train_model.evaluations(report["log"])
    # What could come out of the training texts; the held-out ones are only there to compare with.
    groups = [group for name, group in seen["leaks"]["groups"].items() if name != "held-out"]
    greedy = sum(group["greedy"] for group in groups)
    windows = sum(group["windows"] for group in groups)
    tries = min(group["anyhow"]["log10_tries"] for group in groups if group["anyhow"]["log10_tries"] is not None)

    reader = seen["reader"]
    taken = f"{reader['tuned']['share']:.0%}" if "tuned" in reader else "not measured"
    copied = f"{seen['copies']['tuned']['share']:.2%}"
    harm = [copied, taken, f"{greedy:,} of {windows:,}", test_model.tell_power(tries)]
    return [entry["eval_bits_per_byte"] for entry in evaluations], evaluations[1]["step"], harm


def row(name: str, bits: list[float], harm: list[str]) -> str:
    numbers = [*(f"{value:.4f}" for value in bits), f"{min(bits) - bits[0]:+.4f}"]
    return f"| {' | '.join([name, *numbers, *harm])} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base-model", required=True)
    parser.add_argument("--data-dir", type=Path, default=Path("data"))
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--rates", type=float, nargs="+", default=[2e-5, 5e-5, 1e-4, 2e-4])
    parser.add_argument("--dropouts", type=float, nargs="*", default=[], help="tried at the best rate")
    parser.add_argument("--overlaps", type=int, nargs="*", default=[], help="tried at the best rate")
    args = parser.parse_args()
    logging.set_verbosity_error()
    train_model.keep_freed_memory()
    test_model.REPORT_SIZE = 0.25
    splits = {name: train_model.read_conversations(args.data_dir / f"{name}_data.jsonl") for name in ("train", "val")}
    epochs = [f"epoch {epoch + 1}" for epoch in range(args.epochs)]
    print(hardware() + f"\n\n| {' | '.join(['recipe', 'base', *epochs, *COLUMNS])} |")
    print("|---" * (args.epochs + 2 + len(COLUMNS)) + "|", flush=True)
    gains = {}
    for rate in args.rates:
        bits, updates, harm = our_recipe(args, rate)
        gains[rate] = bits[0] - min(bits)
        print(row(f"train_model.py, {rate:g}", bits, harm), flush=True)
        if rate == args.rates[0]:
            first = first_recipe(args, splits, rate, updates)
            print(row(f"first version, {rate:g}", first, ["", "", ""]))
            print(
                f"| gain against the first version's | {gains[rate] / (first[0] - min(first)):.1f} times |", flush=True
            )
    best = max(gains, key=gains.get)
    tries = [("DROPOUT", size) for size in args.dropouts] + [("OVERLAP_TOKENS", size) for size in args.overlaps]
    for name, size in tries:
        bits, _, harm = our_recipe(args, best, **{name: size})
        print(row(f"train_model.py, {best:g}, {name} {size:g}", bits, harm), flush=True)


if __name__ == "__main__":
    main()
