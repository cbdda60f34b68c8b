"""Did it learn? Bits per byte of held-out posts under both models, and which training posts gained least."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from train_model import author_bytes
from voice.evidence import (
    NATS_OF_A_BIT,
    PAGE_ONLY,
    Details,
    Evidence,
    Interval,
    NotMeasured,
    Quote,
    Section,
    Summary,
    bootstrap,
)
from voice.word_index import line_of, path_of, title_of, visibility_of

MIN_POSTS = 5  # held out: of fewer the interval says nothing
GOOD = "Good: the whole range of the gain is above 0"
LEAST_GAINED = 1 / 6  # of the posts that were drawn are shown
LEAST_GAINED_BYTES = 600  # of such a post, about 120 words


@dataclass
class PostGain:
    """A held-out post in bits per byte."""

    post: int | None  # its line in val_data.jsonl
    base: float
    tuned: float
    title: str = field(metadata=PAGE_ONLY)

    @property
    def gain(self) -> float:
        return self.base - self.tuned


@dataclass
class Gain:
    """The base model's bits per byte of the author's text less the tuned model's."""

    base: float
    tuned: float
    gain: float
    interval: Interval  # of the gain, over posts
    posts: list[PostGain]


@dataclass
class PostMark:
    """A training post and the tuned model's gain on its beginning, in bits per byte."""

    post: int | None  # its line in train_data.jsonl
    visibility: str
    gain: float
    path: str = field(metadata=PAGE_ONLY)
    title: str = field(metadata=PAGE_ONLY)


@dataclass
class Learned:
    tuned: float  # bits per byte of held-out posts
    held_out: Gain | None = None  # None without the base model
    least_gained: list[PostMark] = field(default_factory=list)


def measure(evidence: Evidence) -> Learned:
    """Raises NotMeasured without held-out posts."""
    posts = evidence.blog.held_out
    if not posts:
        raise NotMeasured("needs held-out posts (val_data.jsonl)")

    # Over all bytes, as in training_report.json, so that the two figures compare.
    nats = evidence.tuned.held_out_nats
    bits = float(nats.sum()) / NATS_OF_A_BIT
    learned = Learned(bits / author_bytes(posts))
    if evidence.base is not None:
        learned.held_out = gain_on(posts, nats, evidence.base.held_out_nats)
        learned.least_gained = least_gained(evidence)
    return learned


def gain_on(posts: list[dict], tuned_nats: np.ndarray, base_nats: np.ndarray) -> Gain:
    """The gain on `posts`, given the loss of each in nats; long posts weigh more."""
    # Bytes, not tokens: models with other tokenizers compare.
    size = np.array([author_bytes([post]) for post in posts])
    before = base_nats / NATS_OF_A_BIT
    after = tuned_nats / NATS_OF_A_BIT
    total = size.sum()
    base = float(before.sum() / total)
    tuned = float(after.sum() / total)

    # Whole posts are drawn, because the sentences of one post are alike.
    saved = before - after
    interval = bootstrap(lambda drawn: saved[drawn].sum() / size[drawn].sum(), len(size))

    base_rates = (before / size).tolist()
    tuned_rates = (after / size).tolist()
    per_post = []
    for post, base_rate, tuned_rate in zip(posts, base_rates, tuned_rates, strict=True):
        per_post.append(PostGain(line_of(post), base_rate, tuned_rate, title_of(post)))
    return Gain(base, tuned, base - tuned, interval, per_post)


def least_gained(evidence: Evidence) -> list[PostMark]:
    """Of the training posts that were drawn those that gained least: pasted articles, guests, lyrics."""
    marks = []
    saved = (evidence.base.drawn_nats - evidence.tuned.drawn_nats) / NATS_OF_A_BIT
    for post, bits in zip(evidence.drawn, saved.tolist(), strict=True):
        size = author_bytes([post])

        # A sentence alone does not tell whose it is.
        if size < LEAST_GAINED_BYTES:
            continue
        mark = PostMark(
            post=line_of(post),
            visibility=visibility_of(post),
            gain=bits / size,
            path=path_of(post),
            title=title_of(post),
        )
        marks.append(mark)

    # A part of them: most gain as much as the author's.
    marks.sort(key=lambda mark: mark.gain)
    shown = math.ceil(LEAST_GAINED * len(marks))
    return marks[:shown]


def tell(learned: Learned, evidence: Evidence) -> Section:
    meaning = "Bits per byte: how badly a model predicts posts that it was not trained on; lower is better."
    tuned_row = ("tuned model", f"{learned.tuned:.3f} bits/byte", "")
    gain = learned.held_out
    if gain is None:
        return Section("Not measured: needs the base model to compare with.", [tuned_row], meanings=[meaning])

    low, high = gain.interval
    rows = [
        ("base model", f"{gain.base:.3f} bits/byte", ""),
        tuned_row,
        ("gain", f"{gain.gain:.3f} bits/byte", f"{low:.3f} to {high:.3f}"),
    ]

    # By title alone: the owner knows what is in it.
    odd = []
    for mark in learned.least_gained:
        caption = f"{mark.title}, {mark.path}: {mark.gain:+.3f} bits per byte"
        odd.append(Quote(caption, "", mark.visibility == "private"))
    title = f"The training posts whose beginnings gained least, of {len(evidence.drawn)} drawn: are they yours?"
    details = [Details(title, odd)]

    verdict, summary = tell_gain(gain)
    return Section(verdict, rows, meanings=[f"{meaning} {GOOD}."], details=details, summary=summary)


def tell_gain(gain: Gain) -> tuple[str, Summary]:
    """A gain counts if its whole range is on one side of 0."""
    low, high = gain.interval
    answer = "not proven"
    verdict = "No clear gain, it may be chance"
    if len(gain.posts) < MIN_POSTS:
        verdict = "Too few held-out posts to tell"
    elif low > 0:
        answer = "yes"
        verdict = "It learned"
    elif high < 0:
        answer = "no"
        verdict = "It got worse"

    better = sum(post.tuned < post.base for post in gain.posts)
    of_all = f"{better} of {len(gain.posts)} held-out posts surprise it less than they surprise the base model"
    caution = "" if len(gain.posts) >= 10 else "; with so few posts the interval is rough"
    return f"{verdict}: {of_all}{caution}.", Summary(answer, of_all, GOOD)
