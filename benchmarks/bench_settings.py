"""Sampling settings by what they do to the voice: a small grid, one model after the other.

    python benchmarks/bench_settings.py NAME=DATA=MODEL ... [--words 3000]

NAME as in bench_reader.py. A row: how much of the text a reader with strangers takes for the author's, how many of its
8-word runs stand in the training posts, the median length of an answer in words, and how many end by themselves.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import bench_reader
import numpy as np
import torch

import test_model
import train_model

GRID = [
    # temperature, top-k, top-p, repetition penalty
    (0.6, 50, 0.95, 1.1),
    (0.8, 50, 0.95, 1.0),
    (0.8, 50, 0.95, 1.1),
    (0.8, 50, 0.95, 1.2),
    (0.8, 0, 0.9, 1.1),
    (1.0, 50, 0.95, 1.1),
    (1.0, 0, 1.0, 1.0),
]


def answers_with(model, tokenizer, sampling, prompts: list[list[int]], words: int) -> list[test_model.Answer]:
    """Answers to the prompts, from the first again if need be, until there are `words` words."""
    dice = torch.Generator().manual_seed(42)
    answers = []
    while sum(len(test_model.WORD.findall(answer.text)) for answer in answers) < words:
        batch = [prompts[(len(answers) + place) % len(prompts)] for place in range(24)]
        answers += [answer for _, answer in test_model.stream(model, tokenizer, batch, sampling, dice) if answer]
    return answers


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", metavar="NAME=DATA=MODEL")
    parser.add_argument("--words", type=int, default=3_000, help="that each row takes")
    args = parser.parse_args()

    print(
        "| blog | temperature | top-k | top-p | penalty | taken for the author | copied | words | end by themselves |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for entry in args.models:
        name, data, folder = entry.split("=")
        model, tokenizer = test_model.load_tuned(Path(folder))
        model = model.to(test_model.NUMBERS[train_model.pick_precision(model.device, train_model.PRECISION)])
        blog = test_model.read_blog(Path(data))
        index = test_model.WordIndex(blog.train)
        prompts = [test_model.prompt_tokens(tokenizer, post["messages"][:1]) for post in blog.held_out]

        for temperature, top_k, top_p, penalty in GRID:
            sampling = test_model.read_sampling(model.generation_config, tokenizer, None)
            sampling.temperature, sampling.top_k = temperature, top_k
            sampling.top_p, sampling.repetition_penalty = top_p, penalty
            answers = answers_with(model, tokenizer, sampling, prompts, args.words)
            texts = [answer.text for answer in answers]

            runs = [test_model.WORD.findall(text.casefold()) for text in texts]
            copied = sum(len(index.copied(words)) for words in runs) / max(1, sum(len(words) for words in runs))
            without = {"text": [index.without_copies(text) for text in texts]}
            share = bench_reader.judge(Path(data), without, [name])["text"]
            length = np.median([len(words) for words in runs])
            ended = np.mean([answer.ended for answer in answers])
            settings = f"{temperature} | {top_k} | {top_p} | {penalty}"
            print(f"| {name} | {settings} | {share:.0%} | {copied:.2%} | {length:.0f} | {ended:.0%} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
