"""Tokens per second of test_model.py beside transformers' pipeline("text-generation") as it comes.

    python benchmarks/bench_sampling.py [MODEL_FOLDER] [TOKENS]

Both answer the prompts of the settings with the same number of tokens each (no answer may end early), with the
same sampling settings and the same number of threads. Each measurement is a process of its own, the ways take turns,
and a short answer goes before the clock starts. One row a way, the best of three rounds: tokens per second over all
prompts, and how long the first words take to be seen.
"""

import multiprocessing
import os
import platform
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import transformers
from transformers import GenerationConfig, pipeline

import test_model
import train_model

ROUNDS = 3


def hardware() -> str:
    """Processor, cores and threads used, as the table's caption."""
    cpus = Path("/proc/cpuinfo")
    lines = cpus.read_text("utf-8").splitlines() if cpus.is_file() else []
    names = [line.split(":")[1].strip() for line in lines if "model name" in line]
    fast = [name for name in train_model.FAST_BFLOAT16 if torch.cpu.get_capabilities().get(name)]
    where = names[0] if names else platform.processor()
    return f"{where}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, {' '.join(fast) or 'no fast bfloat16'}"


def time_pipeline(folder: Path, tokens: int) -> tuple[float, float]:
    """(seconds for all prompts, seconds to the first words): it returns an answer when it is complete."""
    transformers.logging.set_verbosity_error()
    write = pipeline("text-generation", str(folder), device="cpu")
    messages = [[{"role": "user", "content": text}] for text in test_model.PROMPTS]
    write(messages[0], max_new_tokens=4)
    began = time.perf_counter()
    write(messages[0], max_new_tokens=tokens, min_new_tokens=tokens)
    first = time.perf_counter() - began
    for message in messages[1:]:
        write(message, max_new_tokens=tokens, min_new_tokens=tokens)
    return time.perf_counter() - began, first


def time_ours(folder: Path, tokens: int, together: bool) -> tuple[float, float]:
    """The same by test_model.stream, all prompts in one batch as the script does it, or one after the other."""
    train_model.keep_freed_memory()
    model, tokenizer = test_model.load_tuned(folder)
    sampling = test_model.read_sampling(model.generation_config, tokenizer, tokens)
    sampling.eos_token_id = []
    short = GenerationConfig(**sampling.to_dict() | {"max_new_tokens": 4})
    precision = train_model.pick_precision(model.device, train_model.PRECISION)
    model = model.to(test_model.NUMBERS[precision])
    prompts = [test_model.prompt_tokens(tokenizer, [{"role": "user", "content": text}]) for text in test_model.PROMPTS]
    list(test_model.stream(model, tokenizer, prompts[:1], short, torch.Generator()))
    began, first = time.perf_counter(), None
    for batch in [prompts] if together else [[prompt] for prompt in prompts]:
        for piece, _ in test_model.stream(model, tokenizer, batch, sampling, torch.Generator().manual_seed(0)):
            if piece.strip() and first is None:
                first = time.perf_counter() - began
    return time.perf_counter() - began, first


def main() -> int:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else test_model.HERE / "blog-model-final")
    tokens = int(sys.argv[2]) if len(sys.argv) > 2 else 100
    ways = {
        'pipeline("text-generation")': (time_pipeline,),
        "one prompt after the other": (time_ours, False),
        "all prompts, first streamed": (time_ours, True),
    }
    best, context = {}, multiprocessing.get_context("spawn")
    for _ in range(ROUNDS):
        for name, (measure, *together) in ways.items():
            with ProcessPoolExecutor(1, mp_context=context) as process:
                result = process.submit(measure, folder, tokens, *together).result()
            best[name] = min(best.get(name, result), result)
    total, (slow, _) = tokens * len(test_model.PROMPTS), next(iter(best.values()))
    print(f"{folder.name}, {len(test_model.PROMPTS)} prompts, {tokens} tokens each; {hardware()}\n")
    print(f"{'':<30}{'tokens/s':>10}{'times':>8}{'first words':>14}")
    for name, (seconds, first) in best.items():
        print(f"{name:<30}{total / seconds:>10.1f}{slow / seconds:>8.2f}{first:>12.2f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
