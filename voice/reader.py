"""Is it you? A reader who knows the author and other bloggers says whose each chunk of text is."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure
from numpy import ndarray

from voice.evidence import Evidence, Interval, NotMeasured, Section, Summary, bootstrap, percent, wilson
from voice.style import MIN_STRANGER_WORDS, Chunks, count_styles

GOOD = "Good: as much as of your unseen posts, and far more than of the base model's text"
ROUNDS = 100  # with half the features and half the rivals each
MISTAKEN = 0.05  # of strangers' chunks that may be taken for the author's: sets the threshold
MIN_STRANGERS = 4  # half of them rivals, half of them setting the threshold
NEXT_BLOG = 1_000_000  # added to the numbers of posts, so that those of different blogs differ


@dataclass
class ReaderShare:
    """How much of somebody's text the reader attributes to the author."""

    share: float
    interval: Interval  # over posts or answers
    chunks: int


@dataclass
class Reader:
    """What the reader attributes to the author.

    General Impostors (Koppel and Winter 2014, doi 10.1002/asi.22954): in each round, with half of the features and
    half of the rivals, a chunk is compared with all profiles; its score is how much nearer the author's is. The
    threshold comes from strangers who are no rivals; then the two halves of the strangers change places.
    """

    author: ReaderShare  # of unseen posts
    tuned: ReaderShare
    base: ReaderShare
    strangers: ReaderShare
    each: dict[str, float]  # share of each stranger
    chunk_words: int
    to_nearest: float  # share of the author's unseen chunks that are nearer to a stranger: how hard the task is
    nearest: str  # the stranger who gets the most of them
    note: str  # who is missing among the strangers, and why


def measure(evidence: Evidence) -> Reader:
    """Raises NotMeasured if text or strangers are missing."""
    styles = count_styles(evidence)
    found = len(styles.strangers)
    if found < MIN_STRANGERS:
        there = "there is 1" if found == 1 else f"there are {found}"
        missing = (
            f"needs {MIN_STRANGERS} other bloggers with {MIN_STRANGER_WORDS:,} words each, and {there}: OTHER_BLOGS "
            f"can name more. {styles.note}"
        )
        raise NotMeasured(missing.strip().rstrip("."))

    shares, each = attribute(styles.profile, styles.tested, styles.strangers)
    unseen, _ = styles.tested["author"]
    to_nearest, nearest = nearest_stranger(styles.profile, unseen, styles.strangers)
    return Reader(
        **shares,
        each=each,
        chunk_words=styles.chunk_words,
        to_nearest=to_nearest,
        nearest=nearest,
        note=styles.note,
    )


def attribute(
    profile: ndarray, tested: dict[str, Chunks], strangers: dict[str, Chunks]
) -> tuple[dict[str, ReaderShare], dict[str, float]]:
    """(the shares of all that are tested and of "strangers" together, the share of each stranger).

    `profile`, shape (chunks, features), is the author's known text.
    """
    # Shuffled: the names of strangers.npz are sorted, and the blog's readers and OTHER_BLOGS follow them.
    rng = np.random.default_rng(42)
    names = list(strangers)
    order = rng.permutation(len(names))
    one_half = [names[place] for place in order[::2]]
    other_half = [names[place] for place in order[1::2]]

    votes = dict.fromkeys(tested, 0.0)  # each becomes an array of shape (chunks,)
    strangers_taken = {}
    for rivals, judges in ((one_half, other_half), (other_half, one_half)):
        rival_chunks = [strangers[name][0] for name in rivals]
        scores = {}
        for name in judges:
            frequencies, _ = strangers[name]
            scores[name] = impostor_scores(frequencies, profile, rival_chunks)

        of_strangers = list(scores.values())
        threshold = even_quantile(of_strangers, 1 - MISTAKEN)
        for name in judges:
            is_taken = scores[name] > threshold
            strangers_taken[name] = is_taken.astype(float)

        # Each half of the strangers has half a vote on text that is none of theirs.
        for whose, (frequencies, _) in tested.items():
            of_tested = impostor_scores(frequencies, profile, rival_chunks)
            is_taken = of_tested > threshold
            votes[whose] = votes[whose] + is_taken / 2

    shares = {}
    for whose, (_, source) in tested.items():
        shares[whose] = share_over_sources(votes[whose], source)

    # All strangers together; posts of two blogs are two sources.
    each = {}
    taken = []
    sources = []
    for number, name in enumerate(names):
        _, source = strangers[name]
        each[name] = float(strangers_taken[name].mean())
        taken.append(strangers_taken[name])
        sources.append(source + NEXT_BLOG * number)
    shares["strangers"] = share_over_sources(np.concatenate(taken), np.concatenate(sources))
    return shares, each


def impostor_scores(tested: ndarray, profile: ndarray, rivals: list[ndarray]) -> ndarray:
    """How much nearer each tested chunk is to the author's profile than to any rival's, shape (tested,).

    All are (chunks, features). The mean over the rounds of the difference of cosines, -2 to 2: the share of rounds
    that the author wins, as in the source, is 0 or 1 for most chunks and leaves nothing to set a threshold on.
    """
    middle, spread = common_scale([profile, *rivals])
    author = profiles_of([profile], middle, spread)  # (1, features)
    others = profiles_of(rivals, middle, spread)  # (rivals, features)
    scores = (tested - middle) / spread  # (tested, features)

    # The same rounds for every text.
    rng = np.random.default_rng(42)
    margin = np.zeros(len(tested))
    half = math.ceil(len(others) / 2)
    for _ in range(ROUNDS):
        features = rng.random(len(middle)) < 0.5
        shuffled = rng.permutation(len(others))
        present = shuffled[:half]
        present_others = others[present]

        part = scores[:, features]
        to_author = cosines(part, author[:, features])  # (tested, 1)
        to_others = cosines(part, present_others[:, features])
        margin += to_author[:, 0] - to_others.max(1)
    return margin / ROUNDS


def common_scale(groups: list[ndarray]) -> tuple[ndarray, ndarray]:
    """Mean and standard deviation of each feature, every group with the same weight; shapes (features,)."""
    means = np.array([group.mean(0) for group in groups])  # (groups, features)
    variances = np.array([group.var(0) for group in groups])
    middle = means.mean(0)

    # Of everything together: what varies within the groups, and between them.
    within = variances.mean(0)
    between = means.var(0)
    spread = np.sqrt(within + between)
    # A feature that never varies says nothing: divided by infinity its score is 0.
    spread[spread == 0] = np.inf
    return middle, spread


def profiles_of(groups: list[ndarray], middle: ndarray, spread: ndarray) -> ndarray:
    """z-scores of each group's mean, shape (groups, features)."""
    scores = []
    for group in groups:
        beyond_middle = group.mean(0) - middle
        scores.append(beyond_middle / spread)
    return np.array(scores)


def cosines(one: ndarray, other: ndarray) -> ndarray:
    """Cosines between the rows of both, shape (rows of one, rows of other); 0 where a row is 0."""
    lengths_of_one = np.linalg.norm(one, axis=1)
    lengths_of_other = np.linalg.norm(other, axis=1)
    lengths = np.outer(lengths_of_one, lengths_of_other)
    products = one @ other.T
    return products / np.maximum(lengths, 1e-12)


def even_quantile(groups: list[ndarray], share: float) -> float:
    """The quantile of all values, every group with the same weight: many posts give a stranger no more influence."""
    values = np.concatenate(groups)
    sizes = [len(group) for group in groups]
    weights = np.repeat([1 / size for size in sizes], sizes)
    order = np.argsort(values, kind="stable")
    values = values[order]
    weights = weights[order]
    total = weights.sum()
    below = np.cumsum(weights) / total

    # Rounding may leave the last sum a little below 1.
    place = np.searchsorted(below, share)
    last = len(values) - 1
    return float(values[min(place, last)])


def share_over_sources(taken: ndarray, source: ndarray) -> ReaderShare:
    """The share of chunks that are taken, with its interval over the posts or answers in which they begin.

    Both have the shape (chunks,); `taken` is 0, 1, or 0.5 where the two halves of the strangers do not agree.
    """
    _, number = np.unique(source, return_inverse=True)
    sums = np.bincount(number, taken)  # (sources,)
    sizes = np.bincount(number)

    share = float(taken.mean())
    is_all_or_nothing = share in (0, 1)
    if is_all_or_nothing or len(sums) == 1:
        # Every bootstrap sample would be the same, as if the share were certain.
        found = round(share * len(sums))
        interval = wilson(found, len(sums))
    else:

        def share_of(drawn: ndarray) -> float:
            return sums[drawn].sum() / sizes[drawn].sum()

        interval = bootstrap(share_of, len(sums))
    return ReaderShare(share, interval, len(taken))


def nearest_stranger(profile: ndarray, unseen: ndarray, strangers: dict[str, Chunks]) -> tuple[float, str]:
    """(share of unseen chunks that are nearer to a stranger than to the author, the stranger who gets the most)."""
    others = [frequencies for frequencies, _ in strangers.values()]
    groups = [profile, *others]
    middle, spread = common_scale(groups)
    scores = (unseen - middle) / spread
    profiles = profiles_of(groups, middle, spread)
    nearest = cosines(scores, profiles).argmax(1)

    # The first group is the author.
    lost = nearest[nearest > 0]
    if len(lost) == 0:
        return 0.0, ""
    names = ["", *strangers]
    most = np.bincount(lost).argmax()
    share = len(lost) / len(unseen)
    return share, names[most]


def tell(reader: Reader, evidence: Evidence) -> Section:
    shares = {
        "your unseen posts": reader.author,
        "the tuned model": reader.tuned,
        "the base model": reader.base,
        "other bloggers": reader.strangers,
    }

    # Each with its range: the share of a few chunks says little.
    rows = []
    for whose, share in shares.items():
        low, high = share.interval
        interval = f"{percent(low)} to {percent(high)}"
        rows.append((whose, percent(share.share), interval, f"{share.chunks:,}"))

    tuned = percent(reader.tuned.share)
    author = percent(reader.author.share)
    base = percent(reader.base.share)
    verdict = (
        f"A reader program that knows your posts and {len(reader.each)} other bloggers attributes {tuned} of the tuned "
        f"model's text to you, {author} of your unseen posts and {base} of the base model's text."
    )
    meaning = f"of its text is attributed to you; of your unseen posts {author}, of the base model's text {base}"
    # Very different strangers flatter every model, so how different they are belongs to the answer.
    most_to = f", more to {reader.nearest} than to any other" if reader.nearest else ""
    meanings = [
        f"The reader is set so that {percent(MISTAKEN)} of other bloggers' text is taken for yours. It compares how "
        f"often common words and letter sequences occur in {reader.chunk_words} words: it knows habits, not meaning.",
        f"How hard that is: {percent(reader.to_nearest)} of the chunks of your unseen posts are nearer to another "
        f"blogger than to you{most_to}.",
    ]
    return Section(
        verdict=verdict,
        rows=rows,
        head=("", "taken for you", "95 %", "chunks"),
        notes=[reader.note] if reader.note else [],
        meanings=meanings,
        summary=Summary(tuned, meaning, GOOD),
    )


def draw(reader: Reader) -> Figure:
    """What share of everybody's text is taken for the author's: dots, and ranges as bars."""
    rows = {
        "other bloggers": None,
        "the base model": reader.base,
        "the tuned model": reader.tuned,
        "you": reader.author,
    }
    # Small, so that its letters are large enough on a phone.
    figure = Figure(figsize=(5, 2.3), layout="constrained")
    axes = figure.subplots()
    for row, (whose, share) in enumerate(rows.items()):
        places = [share.share] if share else list(reader.each.values())
        if share:
            axes.hlines(row, *share.interval, color="0.35", linewidth=3)
        axes.plot(places, [row] * len(places), "o", alpha=0.7, markersize=8, label=whose)

    axes.set_ylim(-0.6, len(rows) - 0.4)
    axes.set_yticks(range(len(rows)), rows)
    axes.set_xlim(-0.03, 1.03)
    axes.set_xticks([0, 0.5, 1], ["0 %", "50 %", "100 %"])
    axes.set_xlabel("taken for you")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(left=False)
    return figure
