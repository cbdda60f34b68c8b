"""Sampling settings by what they do to the voice: a small grid, one model after the other.

    python benchmarks/bench_settings.py NAME=DATA=MODEL ... [--words 3000]

NAME as in bench_reader.py. A row: how much of the text a reader with strangers takes for the author's, with its 95 %
interval, how many of its 8-word runs stand in the training posts, the median length of an answer in words, and how
many end by themselves.
"""

import argparse
import sys
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import bench_reader
import numpy as np
import torch

import test_model
import train_model


class Settings(NamedTuple):
    temperature: float
    top_k: int  # 0: all tokens
    top_p: float
    repetition_penalty: float


GRID = [
    Settings(0.6, 50, 0.95, 1.1),
    Settings(0.8, 50, 0.95, 1.0),
    Settings(0.8, 50, 0.95, 1.1),  # the default
    Settings(0.8, 50, 0.95, 1.2),
    Settings(0.8, 0, 0.9, 1.1),
    Settings(1.0, 50, 0.95, 1.1),
    Settings(1.0, 0, 1.0, 1.0),  # plain sampling
]


def answers_with(model, tokenizer, settings: Settings, prompts: list[list[int]], words: int) -> list[test_model.Answer]:
    """Answers to the prompts, from the first again if need be, until there are `words` words."""
    sampling = test_model.read_sampling(model.generation_config, tokenizer, None)
    for name, value in settings._asdict().items():
        setattr(sampling, name, value)

    dice = torch.Generator().manual_seed(42)
    answers = []
    while test_model.count_words(answer.text for answer in answers) < words:
        batch = [prompts[(len(answers) + place) % len(prompts)] for place in range(24)]
        answers += test_model.whole_answers(model, tokenizer, batch, sampling, dice)
    return answers


def row(name: str, data: Path, blog: test_model.BlogData, settings: Settings, answers: list[test_model.Answer]) -> str:
    index = test_model.WordIndex(blog.train)
    copies = test_model.copy_share(index, answers)
    fresh = [index.without_copies(answer.text) for answer in answers]
    taken = bench_reader.judge(data, {"text": fresh}, left_out=[name])["text"]

    length = np.median([len(test_model.folded_words(answer.text)) for answer in answers])
    ended = test_model.share_ended(answers)
    low, high = taken.interval
    cells = [name, *map(str, settings), f"{taken.share:.0%} ({low:.0%} to {high:.0%})"]
    cells += [f"{copies.share:.2%}", f"{length:.0f}", f"{ended:.0%}"]
    return f"| {' | '.join(cells)} |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", metavar="NAME=DATA=MODEL")
    parser.add_argument("--words", type=int, default=3_000, help="that each row takes")
    args = parser.parse_args()

    columns = ["blog", "temperature", "top-k", "top-p", "penalty", "taken for the author", "copied", "words", "ended"]
    print(f"| {' | '.join(columns)} |")
    print("|---" * len(columns) + "|", flush=True)
    for entry in args.models:
        name, data, folder = entry.split("=")
        model, tokenizer = test_model.load_tuned(Path(folder))
        precision = train_model.pick_precision(model.device, train_model.PRECISION)
        model = model.to(test_model.NUMBERS[precision])

        blog = test_model.read_blog(Path(data))
        prompts = [test_model.prompt_tokens(tokenizer, post["messages"][:1]) for post in blog.held_out]
        for settings in GRID:
            answers = answers_with(model, tokenizer, settings, prompts, args.words)
            print(row(name, Path(data), blog, settings, answers), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
