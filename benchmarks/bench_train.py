"""Speed of train_model.py beside the stock recipe and bare matrix products, in one run.

    python benchmarks/bench_train.py MODEL_FOLDER --data-dir data [--updates 3] [--rounds 2]

Stock: Trainer with DataCollatorForLanguageModeling, one post a row cut at 512, the model's config as it comes.
Both sides: batch 1, accumulation 8, bfloat16 autocast over float32 weights. Each measurement is a process of its own,
the sides take turns, and of each the fastest update but the first counts. Bare: only the matrix products of one
training step of the same model on 512 tokens. Prints tokens per second and shares of the bare products' speed, counted
as usual as 6 x parameters x tokens; last, the memory that train_model.py plans beside the memory it used.
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
        if args.device.type != "cpu":  # an accelerator works on after its last call has returned
            torch.accelerator.synchronize()
        self.seconds.append(time.perf_counter() - self.began)


def stock_rows(tokenizer, conversations: list[dict]) -> tuple[list[dict], list[int]]:
    """(rows as the stock recipe makes them, the number of the author's tokens in each)."""
    cut = [train_model.conversation_tokens(tokenizer, entry["messages"]) for entry in conversations]
    return [{"input_ids": ids[:512]} for ids, _ in cut], [sum(scored[:512]) for _, scored in cut]


def measure_stock(model_folder: str, conversations: list[dict], updates: int) -> dict:
    tokenizer = train_model.load_tokenizer(model_folder)
    random.Random(0).shuffle(conversations)
    rows, authors = stock_rows(tokenizer, conversations[: updates * UPDATE])
    clock = train_stock(model_folder, rows, torch.device("cpu"), "bf16")
    return figures(clock, [len(row["input_ids"]) for row in rows], authors)


def train_stock(model_folder: str | Path, rows: list[dict], device: torch.device, precision: str) -> Clock:
    """Train with the stock recipe, once over `rows`; `precision` is "bf16", "fp16" or "fp32"."""
    tokenizer = train_model.load_tokenizer(model_folder)
    model = AutoModelForCausalLM.from_pretrained(model_folder, trust_remote_code=False, dtype=torch.float32)
    arguments = TrainingArguments(
        **training_arguments(len(rows) // UPDATE),
        use_cpu=device.type == "cpu",
        bf16=precision == "bf16",
        fp16=precision == "fp16",
    )
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    clock = Clock()
    trainer = Trainer(model.to(device), arguments, train_dataset=rows, data_collator=collator, callbacks=[clock])
    trainer.train()
    return clock


def training_arguments(updates: int) -> dict:
    """What both sides have in common."""
    return {
        "output_dir": "/nonexistent",
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": UPDATE,
        "max_steps": updates,
        "train_sampling_strategy": "sequential",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def measure_ours(model_folder: str, conversations: list[dict], updates: int, full: bool) -> dict:
    train_model.keep_freed_memory()
    before = peak_gigabytes()  # Python and its libraries, which no plan counts
    tokenizer = train_model.load_tokenizer(model_folder)
    model = train_model.load_for_training(model_folder)
    tokenized = [train_model.conversation_tokens(tokenizer, entry["messages"]) for entry in conversations]
    settings = train_model.parse_arguments([])
    rows = train_model.make_rows(tokenized, 512, settings.overlap_tokens)
    if full:
        rows = [row for row in rows if len(row["input_ids"]) == 512]
    random.Random(0).shuffle(rows)
    rows = rows[: updates * UPDATE]

    train_model.use_sparse_embedding_gradient(model)
    clock = Clock()
    trainer = train_model.BlogTrainer(
        model=model,
        args=TrainingArguments(**training_arguments(updates), use_cpu=True, remove_unused_columns=False),
        data_collator=train_model.collate,
        train_dataset=rows,
        precision="bf16",
        callbacks=[train_model.CastWeightsOnce(model.device), clock],
    )
    trainer.train()

    authors = [train_model.scored_tokens([row]) for row in rows]
    found = figures(clock, [len(row["input_ids"]) for row in rows], authors)
    return {**found, "taken": found["gigabytes"] - before, "planned": planned_gigabytes(model_folder, 512)}


def planned_gigabytes(model_folder: str, tokens: int) -> float:
    config = AutoConfig.from_pretrained(model_folder, trust_remote_code=False)
    machine = train_model.Machine(torch.device("cpu"), 1, "bf16", 0)
    shape = train_model.shape_of(config, train_model.parse_arguments([]), tokens, machine)
    way = train_model.WayToTrain("adamw_torch_fused", checkpointing=False, rows_at_once=1)
    return sum(train_model.memory_needed(shape, machine, way).values()) / 1e9


def peak_gigabytes() -> float:
    """The most memory that this process has had so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def figures(clock: Clock, tokens: list[int], authors: list[int]) -> dict:
    speed = fastest_update(clock, tokens)
    return {
        "tokens": speed,
        "authors": speed * sum(authors) / sum(tokens),
        "gigabytes": peak_gigabytes(),
    }


def fastest_update(clock: Clock, tokens: list[int]) -> float:
    """Tokens a second in the fastest update but the first: other work on the machine only makes one slower.

    `tokens` has the length of each row.
    """
    per_update = [sum(tokens[start : start + UPDATE]) for start in range(0, len(tokens), UPDATE)]
    speeds = [count / seconds for count, seconds in zip(per_update, clock.seconds, strict=True)]
    return max(speeds[1:])


def measure_bare(model_folder: str) -> dict:
    """Tokens per second of nothing but the matrix products of one row of 512 tokens, forward and backward."""
    train_model.keep_freed_memory()
    config = AutoConfig.from_pretrained(model_folder, trust_remote_code=False)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    shapes = [tuple(p.shape) for name, p in model.named_parameters() if p.dim() == 2 and "wpe" not in name]
    weights = [torch.randn(shape, dtype=torch.bfloat16) for shape in shapes]
    inputs = [torch.randn(512, min(shape), dtype=torch.bfloat16) for shape in shapes]

    seconds = []
    for _ in range(6):
        began = time.perf_counter()
        for weight, given in zip(weights, inputs, strict=True):
            weight = weight if weight.shape[0] == given.shape[1] else weight.T
            out = given @ weight
            out @ weight.T
            given.T @ out
        seconds.append(time.perf_counter() - began)

    # Count as if all parameters took part, as both sides are counted.
    share = sum(weight.numel() for weight in weights) / model.num_parameters()
    return {"tokens": 512 * share / min(seconds)}


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
