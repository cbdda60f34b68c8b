"""What a recipe is worth: held-out bits per byte of the first version of this project beside train_model.py.

    python benchmarks/bench_recipes.py --base-model sample/model --data-dir data [--epochs 3] [--rates 2e-5 5e-5]
                                       [--dropouts 0.1]

The first version held its weights in bfloat16, cut every post at 512 tokens and took the loss over prompt and answer
alike. Both sides get the same base model, posts, learning rate and number of updates; both are measured by
train_model.py's exact evaluation after every epoch. Prints a table.
"""

import argparse
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

import train_model


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
    Trainer(model, arguments, train_dataset=rows, data_collator=collator, callbacks=[measure]).train()
    return measure.bits


def our_recipe(args, rate: float, dropout: float = 0.0) -> tuple[list[float], int]:
    """The same with train_model.py, and its updates per epoch."""
    train_model.EVALUATIONS_PER_EPOCH, train_model.PATIENCE, train_model.DROPOUT = 1, 99, dropout
    with tempfile.TemporaryDirectory() as scratch:
        output = Path(scratch, "model")
        flags = ["--base-model", args.base_model, "--data-dir", str(args.data_dir), "--output-dir", str(output)]
        train_model.main([*flags, "--learning-rate", str(rate), "--epochs", str(args.epochs)])
        report = json.loads((output / "training_report.json").read_text(encoding="utf-8"))
    evaluations = train_model.evaluations(report["log"])
    return [entry["eval_bits_per_byte"] for entry in evaluations], evaluations[1]["step"]


def row(name: str, bits: list[float]) -> str:
    return f"| {name} | " + " | ".join(f"{value:.4f}" for value in bits) + f" | {min(bits) - bits[0]:+.4f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base-model", required=True)
    parser.add_argument("--data-dir", type=Path, default=Path("data"))
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--rates", type=float, nargs="+", default=[2e-5, 5e-5, 1e-4, 2e-4])
    parser.add_argument("--dropouts", type=float, nargs="*", default=[], help="tried at the first rate")
    args = parser.parse_args()
    logging.set_verbosity_error()
    train_model.keep_freed_memory()
    splits = {name: train_model.read_conversations(args.data_dir / f"{name}_data.jsonl") for name in ("train", "val")}
    print(
        hardware()
        + "\n\n| recipe | base |"
        + "".join(f" epoch {epoch + 1} |" for epoch in range(args.epochs))
        + " best gain |"
    )
    print("|---" * (args.epochs + 3) + "|")
    for place, rate in enumerate(args.rates):
        bits, updates = our_recipe(args, rate)
        print(row(f"train_model.py, {rate:g}", bits), flush=True)
        if place == 0:
            first = first_recipe(args, splits, rate, updates)
            print(row(f"first version, {rate:g}", first), flush=True)
            print(f"| gain against the first version's | {(bits[0] - min(bits)) / (first[0] - min(first)):.1f} times |")
            for dropout in args.dropouts:
                print(
                    row(f"train_model.py, {rate:g}, dropout {dropout:g}", our_recipe(args, rate, dropout)[0]),
                    flush=True,
                )


if __name__ == "__main__":
    main()
