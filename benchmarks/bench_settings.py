"""Sampling settings by what they do to the voice: a small grid, one model after the other.

    python benchmarks/bench_settings.py NAME=DATA=MODEL ... [--words 3000] [--penalties 1.0 1.05 1.1]

NAME as in bench_reader.py. A row: how much of the text a reader with strangers takes for the author's, with its 95 %
interval, how many of its 8-word runs stand in the training posts, how many of its 4-word runs stood in the same answer
before (the author's own unseen posts, cut to the answers' length, are in the first row), the median length of an answer
in words, and how many end by themselves. `--penalties` tries these instead of the grid, all else as shipped.
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
OPENING_WORDS = 160  # what 200 tokens come to


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


RUN = 4  # words; said twice in an answer, they are going in circles or are a habit


def repeated(texts: list[str]) -> float:
    """Share of the runs of RUN words that stood in the same text before."""
    again = 0
    total = 0
    for text in texts:
        words = test_model.folded_words(text)
        runs = [tuple(words[place : place + RUN]) for place in range(len(words) - RUN + 1)]
        again += len(runs) - len(set(runs))
        total += len(runs)
    return again / max(total, 1)


def own_row(name: str, blog: test_model.BlogData) -> str:
    """How often the author repeats himself in the first words of his unseen posts, as many as an answer has."""
    openings = [" ".join(test_model.author_text(post).split()[:OPENING_WORDS]) for post in blog.held_out]
    return f"| {name}'s own unseen posts | | | | | | | {repeated(openings):.1%} | {OPENING_WORDS} | |"


def row(name: str, data: Path, blog: test_model.BlogData, settings: Settings, answers: list[test_model.Answer]) -> str:
    index = test_model.WordIndex(blog.train)
    copies = test_model.copy_share(index, answers)
    fresh = [index.without_copies(answer.text) for answer in answers]
    taken = bench_reader.judge(data, {"text": fresh}, left_out=[name])["text"]

    length = np.median([len(test_model.folded_words(answer.text)) for answer in answers])
    ended = test_model.share_ended(answers)
    low, high = taken.interval
    cells = [name, *map(str, settings), f"{taken.share:.0%} ({low:.0%} to {high:.0%})"]
    again = repeated([answer.text for answer in answers])
    cells += [f"{copies.share:.2%}", f"{again:.1%}", f"{length:.0f}", f"{ended:.0%}"]
    return f"| {' | '.join(cells)} |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", metavar="NAME=DATA=MODEL")
    parser.add_argument("--words", type=int, default=3_000, help="that each row takes")
    parser.add_argument("--penalties", type=float, nargs="+", default=[])
    args = parser.parse_args()
    grid = [Settings(0.8, 50, 0.95, penalty) for penalty in args.penalties] or GRID

    columns = ["blog", "temperature", "top-k", "top-p", "penalty", "taken for the author", "copied"]
    columns += ["repeated", "words", "ended"]
    print(f"| {' | '.join(columns)} |")
    print("|---" * len(columns) + "|", flush=True)
    for entry in args.models:
        name, data, folder = entry.split("=")
        model, tokenizer = test_model.load_tuned(Path(folder))
        precision = train_model.pick_precision(model.device, train_model.PRECISION)
        model = model.to(test_model.NUMBERS[precision])

        blog = test_model.read_blog(Path(data))
        prompts = [test_model.prompt_tokens(tokenizer, post["messages"][:1]) for post in blog.held_out]
        print(own_row(name, blog), flush=True)
        for settings in grid:
            answers = answers_with(model, tokenizer, settings, prompts, args.words)
            print(row(name, Path(data), blog, settings, answers), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
