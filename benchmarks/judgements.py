"""Show what the extractor's guesses decide, and how much hangs on their numbers.

    python benchmarks/judgements.py BLOG [BLOG ...]
    python benchmarks/judgements.py --show BLOG     also prints the path of every post that is judged hard-wrapped

Reads the blogs as the extractor does and keeps what its guesses were asked: whether an editor broke a post's lines
(is_hard_wrapped), whether a block is verse or code (looks_like_prose), which lines are pasted chats (timed_chat,
headed_chat, spoken_chat). First a row a blog: what was asked and how often the answer was yes. Then a row for each
number of the guesses: how many answers change if it is a fifth smaller or a fifth larger. A number that changes none of
them can stay as it is; one that changes many ought to be looked at with --show.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import extract_blog_data as x

NUMBERS = {
    "is_hard_wrapped": [
        "NARROWEST",
        "WIDEST",
        "LONGEST_LINE",
        "SHORTEST_REACH",
        "FULL_LINES",
        "FULL_LINES_OF_FEW",
        "MANY_LINES",
        "MOST_CLOSED",
    ],
    "looks_like_prose": ["MOST_CODE_LINES", "LEAST_FUNCTION_WORDS"],
    "timed_chat": ["LINES_BETWEEN"],
    "headed_chat": ["LEAST_SPOKEN", "LEAST_SPEAKERS"],
    "spoken_chat": ["LEAST_SPOKEN", "LEAST_SPEAKERS", "LONGEST_SPOKEN", "MOST_COMPOSED"],
}


class Witness:
    """Stands in for a function that judges, and remembers what it was asked."""

    def __init__(self, name: str):
        self.judge: Callable = getattr(x, name)
        self.asked: list[tuple[str, object]] = []  # (path, argument)
        self.path = ""

    def __call__(self, argument):
        self.asked.append((self.path, argument))
        return self.judge(argument)

    def answers(self) -> list:
        return [self.judge(argument) for _, argument in self.asked]


def question_posts(blog: Path) -> dict[str, Witness]:
    """What the guesses were asked while the blog's posts were read, those that are passed over left out."""
    witnesses = {name: Witness(name) for name in NUMBERS}
    settings = x.parse_arguments([])
    site = x.read_site(blog.resolve(), "public", settings)
    with mock.patch.multiple(x, **witnesses):
        for file, reason in x.walk_posts(site, drafts=False):
            path = file.relative_to(site.repository).as_posix()
            for witness in witnesses.values():
                witness.path = path
            x.read_post(x.Post(blog.name, "public", path, file, reason), settings)
    return witnesses


def count_changes(witnesses: list[Witness], number: str, factor: float) -> int:
    """Answers that are others if the number is multiplied by the factor (a whole number moves by one at least)."""
    value = getattr(x, number)
    other = value * factor
    if isinstance(value, int):
        other = min(value - 1, round(other)) if factor < 1 else max(value + 1, round(other))

    before = [answer for witness in witnesses for answer in witness.answers()]
    with mock.patch.object(x, number, other):
        after = [answer for witness in witnesses for answer in witness.answers()]
    return sum(old != new for old, new in zip(before, after, strict=True))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("blogs", nargs="+", type=Path)
    parser.add_argument("--show", action="store_true")
    args = parser.parse_args()

    print(f"{'blog':<24}{'texts':>7}{'wrapped':>9}{'blocks':>8}{'verse':>7}{'chats':>7}")
    seen = []
    for blog in args.blogs:
        witnesses = question_posts(blog)
        seen.append(witnesses)
        yes = {name: sum(map(bool, witness.answers())) for name, witness in witnesses.items()}
        print(
            f"{blog.resolve().name:<24}{len(witnesses['is_hard_wrapped'].asked):>7}{yes['is_hard_wrapped']:>9}"
            f"{len(witnesses['looks_like_prose'].asked):>8}{yes['looks_like_prose']:>7}"
            f"{yes['timed_chat'] + yes['headed_chat'] + yes['spoken_chat']:>7}",
            flush=True,
        )
        wrapped = witnesses["is_hard_wrapped"]
        for (path, _), is_wrapped in zip(wrapped.asked, wrapped.answers(), strict=True):
            if args.show and is_wrapped:
                print(f"    {path}")

    print(f"\n{'number':<24}{'is':>7}{'changes if a fifth smaller':>29}{'larger':>9}")
    for judge, numbers in NUMBERS.items():
        witnesses = [blog[judge] for blog in seen]
        for number in numbers:
            fewer = count_changes(witnesses, number, 0.8)
            more = count_changes(witnesses, number, 1.2)
            print(f"{number:<24}{getattr(x, number):>7}{fewer:>29}{more:>9}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
