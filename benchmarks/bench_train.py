"""Speed of train_model.py beside the stock recipe and bare matrix products, in one run.

    python benchmarks/bench_train.py MODEL_FOLDER --data-dir data [--updates 3] [--rounds 2]

Stock: Trainer with DataCollatorForLanguageModeling, one post a row cut at 512, the model's config as it comes.
Both sides: batch 1, accumulation 8, bfloat16 autocast over float32 weights. Each measurement is a process of its own,
the sides take turns, and of each the fastest update but the first counts. Bare: the products of one training step of
the same model on the same rows, nothing else. Prints tokens per second and shares of the bare products' speed, which
count 6 x parameters x tokens as everybody does; last, the memory that train_model.py plans with beside what it took.
"""

import argparse
import json
import platform
import random
import resource
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    logging,
)

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train_model

UPDATE = 8  # rows of up to 512 tokens
NAMES = {"stock": "stock recipe", "ours": "train_model.py", "full": "train_model.py, full windows only"}


class Clock(TrainerCallback):
    """Seconds of each update."""

    def __init__(self):
        self.seconds = []

    def on_step_begin(self, *_, **__):
        self.began = time.perf_counter()

    def on_step_end(self, args, *_, **__):
        if args.device.type != "cpu":  # which is still at work when Python has told it everything
            torch.accelerator.synchronize()
        self.seconds.append(time.perf_counter() - self.began)


def stock_rows(tokenizer, conversations: list[dict]) -> tuple[list[dict], list[int]]:
    """Rows as the stock recipe makes them, and how many tokens of the author's each holds."""
    cut = [train_model.conversation_tokens(tokenizer, entry["messages"]) for entry in conversations]
    return [{"input_ids": ids[:512]} for ids, _ in cut], [sum(scored[:512]) for _, scored in cut]


def measure_stock(model_folder: str, conversations: list[dict], updates: int) -> dict:
    tokenizer = train_model.load_tokenizer(model_folder)
    random.Random(0).shuffle(conversations)
    rows, authors = stock_rows(tokenizer, conversations[: updates * UPDATE])
    model = AutoModelForCausalLM.from_pretrained(model_folder, trust_remote_code=False, dtype=torch.float32)
    clock = Clock()
    stock_trainer(model, tokenizer, rows, updates, "bf16", clock).train()
    return figures(clock, [len(row["input_ids"]) for row in rows], authors)


def stock_trainer(model, tokenizer, rows: list[dict], updates: int, precision: str, clock: Clock) -> Trainer:
    """The stock recipe on the device that the model is on; `precision` is "bf16", "fp16" or "fp32"."""
    arguments = TrainingArguments(
        output_dir="/nonexistent", per_device_train_batch_size=1, gradient_accumulation_steps=UPDATE, max_steps=updates,
        bf16=precision == "bf16", fp16=precision == "fp16", use_cpu=model.device.type == "cpu", save_strategy="no",
        report_to="none", disable_tqdm=True, train_sampling_strategy="sequential",
    )  # fmt: skip
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    return Trainer(model, arguments, train_dataset=rows, data_collator=collator, callbacks=[clock])


def measure_ours(model_folder: str, conversations: list[dict], updates: int, full: bool) -> dict:
    train_model.keep_freed_memory()
    before = peak_gigabytes()  # Python and its libraries, which no plan counts
    tokenizer, model = train_model.load_tokenizer(model_folder), train_model.load_for_training(model_folder)
    tokenized = [train_model.conversation_tokens(tokenizer, entry["messages"]) for entry in conversations]
    rows = train_model.make_rows(tokenized, 512, train_model.OVERLAP_TOKENS)
    if full:
        rows = rows.filter(lambda row: len(row["input_ids"]) == 512)
    rows = rows.shuffle(seed=0).select(range(updates * UPDATE))
    clock = Clock()
    train_model.use_sparse_embedding_gradient(model)
    trainer = train_model.BlogTrainer(
        model=model,
        args=TrainingArguments(
            output_dir="/nonexistent", per_device_train_batch_size=1, gradient_accumulation_steps=UPDATE,
            max_steps=updates, use_cpu=True, save_strategy="no", report_to="none", disable_tqdm=True,
            train_sampling_strategy="sequential", remove_unused_columns=False,
        ),
        data_collator=train_model.collate, train_dataset=rows, precision="bf16",
        callbacks=[train_model.CastWeightsOnce(model.device), clock],
    )  # fmt: skip
    trainer.train()
    authors = [sum(label != -100 for label in labels) for labels in rows["labels"]]
    found = figures(clock, [len(ids) for ids in rows["input_ids"]], authors)
    return {**found, "taken": found["gigabytes"] - before, "planned": planned_gigabytes(model_folder, 512)}


def planned_gigabytes(model_folder: str, tokens: int) -> float:
    shape = train_model.shape_of(AutoConfig.from_pretrained(model_folder, trust_remote_code=False))
    way = train_model.WayToTrain("adamw_torch_fused", checkpointing=False, rows_at_once=1)
    return sum(train_model.memory_needed(shape, tokens, "bf16", way).values()) / 1e9


def peak_gigabytes() -> float:
    """The most memory that this process has had so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def figures(clock: Clock, tokens: list[int], authors: list[int]) -> dict:
    """Speed in the fastest update, because other work on the machine only ever makes one slower."""
    per_update = [sum(tokens[start : start + UPDATE]) for start in range(0, len(tokens), UPDATE)]
    speed = max(count / seconds for count, seconds in list(zip(per_update, clock.seconds, strict=True))[1:])
    return {
        "tokens": speed,
        "authors": speed * sum(authors) / sum(tokens),
        "gigabytes": peak_gigabytes(),
    }


def measure_bare(model_folder: str) -> dict:
    """Tokens per second of nothing but the matrix products of one row of 512 tokens, forward and backward."""
    train_model.keep_freed_memory()
    seconds, share = time_products(
        AutoConfig.from_pretrained(model_folder, trust_remote_code=False), 512, torch.bfloat16, torch.device("cpu")
    )
    return {"tokens": 512 * share / seconds}


def time_products(config, tokens: int, numbers: torch.dtype, device: torch.device) -> tuple[float, float]:
    """(seconds, share of the parameters): the products of one training step of `tokens` tokens, the fastest of six."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    shapes = [tuple(p.shape) for name, p in model.named_parameters() if p.dim() == 2 and "wpe" not in name]
    weights = [torch.randn(shape, dtype=numbers, device=device) for shape in shapes]
    inputs = [torch.randn(tokens, min(shape), dtype=numbers, device=device) for shape in shapes]
    seconds = []
    for _ in range(6):
        began = time.perf_counter()
        for weight, given in zip(weights, inputs, strict=True):
            weight = weight if weight.shape[0] == given.shape[1] else weight.T
            out = given @ weight
            out @ weight.T
            given.T @ out
        if device.type != "cpu":
            torch.accelerator.synchronize()
        seconds.append(time.perf_counter() - began)
    share = sum(weight.numel() for weight in weights) / model.num_parameters()
    return min(seconds), share


def hardware() -> str:
    capabilities = torch.cpu.get_capabilities()
    return (
        f"{capabilities.get('cpu_name', platform.machine())}, {torch.get_num_threads()} threads, "
        f"avx512_bf16 {bool(capabilities.get('avx512_bf16'))}, torch {torch.__version__}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model_folder")
    parser.add_argument("--data-dir", type=Path, default=Path("data"))
    parser.add_argument("--updates", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--side", choices=("bare", "stock", "ours", "full"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    logging.set_verbosity_error()
    if args.side == "bare":
        print(json.dumps(measure_bare(args.model_folder)))
    elif args.side:
        conversations = train_model.read_conversations(args.data_dir / "train_data.jsonl")
        measure = {"stock": measure_stock, "ours": partial(measure_ours, full=False)}
        measure["full"] = partial(measure_ours, full=True)
        print(json.dumps(measure[args.side](args.model_folder, conversations, args.updates)))
    else:
        compare(args)


def compare(args: argparse.Namespace) -> None:
    command = [sys.executable, __file__, args.model_folder, "--data-dir", str(args.data_dir)]
    command += ["--updates", str(args.updates)]
    print(hardware() + "\n")
    print("| side | tokens/s | author's tokens/s | peak GB | of bare products |")
    print("|---" * 5 + "|")
    for _ in range(args.rounds):
        results = {}
        for side in ("bare", "stock", "ours", "full"):
            process = subprocess.run([*command, "--side", side], check=True, capture_output=True, text=True)
            results[side] = json.loads(process.stdout.splitlines()[-1])
        bare = results["bare"]["tokens"]
        print(f"| bare products | {bare:.0f} | | | 100 % |")
        for side in ("stock", "ours", "full"):
            found = results[side]
            print(
                f"| {NAMES[side]} | {found['tokens']:.0f} | {found['authors']:.0f} | "
                f"{found['gigabytes']:.1f} | {found['tokens'] / bare:.0%} |",
                flush=True,
            )
        print(f"| ours / stock | | {results['ours']['authors'] / results['stock']['authors']:.2f} | | |", flush=True)

    full = results["full"]
    share = full["planned"] / full["taken"]
    print(f"\nmemory: {full['planned']:.2f} GB planned, {full['taken']:.2f} GB taken beside Python itself: {share:.0%}")


if __name__ == "__main__":
    main()
