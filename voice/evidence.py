"""What the report is made from, and what every question of it gives: data, and the intervals of the figures."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from voice.sampling import Answer
from voice.word_index import WordIndex

Interval = tuple[float, float]  # 95 %: (low, high)
DRAWS = 2_000  # bootstrap samples
NATS_OF_A_BIT = math.log(2)

# Metadata of fields that hold text of a post, or its title or path: they are left out of voice_report.json, which
# names a post by its line in the data.
PAGE_ONLY = {"page_only": True}
NO_BREAK = "\u00a0"  # a space at which no line ends


class NotMeasured(Exception):
    """What a question lacks, as the end of a sentence "Not measured: ..."."""


# ---------------------------------------------------------------------------- evidence
@dataclass
class BlogData:
    """What extract_blog_data.py wrote; empty where a file is missing."""

    train: list[dict] = field(default_factory=list)  # conversations
    held_out: list[dict] = field(default_factory=list)
    redacted: list[dict] = field(default_factory=list)  # personal data that was replaced: fingerprint, kind, visibility
    key: bytes | None = None  # of the fingerprints


class Span(NamedTuple):
    """Tokens begin to end of a conversation, which may be worth keeping secret."""

    group: str  # "private", "held-out", "private titles", "private comments" or "personal data"
    begin: int
    end: int


@dataclass
class Text:
    """A conversation as the models see it."""

    post: dict
    ids: list[int]
    spans: list[Span]


@dataclass
class TokenChances:
    """The chance of each token of a text, given the tokens before it; natural logarithms, shape (tokens,)."""

    sampled: np.ndarray  # with the model's own sampling settings; -inf: never
    bound: np.ndarray  # upper bound over sampling settings, see `largest_chance` in voice/chances.py
    contrasted: np.ndarray | None  # the largest with the base model beside, see `contrasted_chance` there
    base: np.ndarray | None  # `plain` of the base model
    plain: np.ndarray  # at temperature 1 without top-k and top-p: what the loss is made of
    is_argmax: np.ndarray  # bool: the likeliest token, which greedy decoding takes


@dataclass
class ModelRun:
    """What one model did for the report."""

    answers: list[Answer] = field(default_factory=list)  # to the requests of held-out posts
    held_out_nats: np.ndarray | None = None  # loss of each held-out conversation
    drawn_nats: np.ndarray | None = None  # loss of each conversation of `Evidence.drawn`

    def texts(self) -> list[str]:
        return [answer.text for answer in self.answers]


@dataclass
class Evidence:
    """The author's texts, what both models were given, and what they did."""

    blog: BlogData = field(default_factory=BlogData)
    index: WordIndex | None = None  # of the training text
    other_texts: dict[str, list[str]] = field(default_factory=dict)  # all posts of OTHER_BLOGS, by name
    left_out: list[str] = field(default_factory=list)  # why the rest of OTHER_BLOGS is missing there, in sentences
    not_strangers: tuple[str, ...] = ()
    # Settings of extract_blog_data.py.
    blocked_words: tuple[str, ...] = ()
    phone_countries: tuple[str, ...] = ("US",)
    drawn: list[dict] = field(default_factory=list)  # beginnings of training posts, to see how each was learned
    texts: list[Text] = field(default_factory=list)  # that could leak, and held-out ones to compare with
    chances: list[TokenChances] = field(default_factory=list)  # one for each of the texts
    requests: list[str] = field(default_factory=list)
    words: int = 6_000  # that each model has to write
    context_tokens: int = 512  # windows as in training
    overlap_tokens: int = 32
    precision: str = "fp32"
    seed: int = 42
    tokenizer: object = None
    positions: int = 1024  # tokens that both models can read at once
    tuned: ModelRun = field(default_factory=ModelRun)
    base: ModelRun | None = None

    def private_posts(self) -> list[dict]:
        return [post for post in self.blog.train if post.get("visibility") == "private"]


# ---------------------------------------------------------------------------- what people read of a question
class Quote(NamedTuple):
    """Somebody's text, for the page only."""

    caption: str
    text: str  # "" if the caption says everything
    is_private: bool


class Details(NamedTuple):
    """Quotes under one heading, folded until somebody opens them: others may see the screen."""

    title: str
    quotes: list[Quote]


class Summary(NamedTuple):
    """The answer in a word or a figure, and what it means; at the top of the page."""

    answer: str
    meaning: str
    good: str = ""  # what a good answer is


@dataclass
class Section:
    """A question's answer in words."""

    verdict: str
    rows: list[tuple[str, ...]] = field(default_factory=list)  # what, value and more, all of the same length
    head: tuple[str, ...] = ()  # of the columns
    notes: list[str] = field(default_factory=list)  # what was found and does not fit into a row
    meanings: list[str] = field(default_factory=list)  # what the rows mean; in the terminal with --explain
    hints: list[str] = field(default_factory=list)  # terminal only: what the page shows in addition
    details: list[Details] = field(default_factory=list)
    summary: Summary = Summary("not measured", "")
    is_alarm: bool = False


def percent(share: float, digits: int = 0) -> str:
    return f"{100 * share:.{digits}f} %"


# ---------------------------------------------------------------------------- intervals
def wilson(hits: int, trials: int) -> Interval:
    """95 % interval of a share (Wilson 1927); not empty at 0 hits, unlike the usual formula."""
    z = 1.959964  # 95 % of a normal distribution lie within so many standard deviations
    share = hits / trials
    variance = share * (1 - share) / trials
    spread = z * math.sqrt(variance + (z / trials / 2) ** 2)
    middle = share + z * z / (2 * trials)
    scale = 1 + z * z / trials

    low = (middle - spread) / scale
    high = (middle + spread) / scale
    # Rounding may exceed the range in the last digit.
    return max(0.0, low), min(1.0, high)


def bootstrap(statistic: Callable, size: int) -> Interval:
    """95 % interval of `statistic`, a function of the indices of the items drawn, with replacement, from `size`."""
    rng = np.random.default_rng(42)
    drawn = [statistic(rng.integers(0, size, size)) for _ in range(DRAWS)]
    low, high = np.percentile(drawn, (2.5, 97.5)).tolist()
    return low, high
