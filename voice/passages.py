"""Passages of a text: which there are, how likely each is, what other posts hold too, and which the owner is shown."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field

import numpy as np
from numpy import ndarray

from train_model import conversation_tokens
from voice.evidence import PAGE_ONLY, Evidence, Span, Text, TokenChances
from voice.word_index import line_of, path_of, title_of, visibility_of

KNOWN_RUN = 8  # tokens; shorter runs are in every blog
MOSTLY = 0.5  # of a passage's tokens: more, and it is known; a guess
SHOWN = 10  # passages of each list
LARGE_NUMBERS = [("million", 6), ("billion", 9), ("trillion", 12)]  # and the power of ten
LN_10 = math.log(10)
NO_HASHES = np.array([], np.uint64)


@dataclass
class Passages:
    """Every `length` tokens in a row of every span; shorter spans and personal data whole; arrays of shape (passages,).

    Chances are those of the whole passage, given what is before it; natural logarithms.
    """

    text: ndarray  # number of the text
    begin: ndarray  # in its tokens
    end: ndarray
    group: ndarray  # of the span
    sampled: ndarray
    bound: ndarray
    contrasted: ndarray  # 0 without a base model
    base: ndarray  # `plain` of the base model; 0 without one
    plain: ndarray
    is_greedy: ndarray  # bool: greedy decoding writes all of it
    has_base: bool

    @property
    def beyond(self) -> ndarray:
        """How much likelier than under the base model, as a natural logarithm."""
        return self.plain - self.base if self.has_base else np.zeros(len(self.plain))


SUMS = ("sampled", "bound", "contrasted", "base", "plain")  # columns that are sums of the tokens' logarithms
COLUMNS = {"text": int, "begin": int, "end": int, "group": str, "is_greedy": bool, **dict.fromkeys(SUMS, float)}


def cut_passages(texts: list[Text], chances: list[TokenChances], length: int) -> Passages:
    """All passages of all spans; each begins one token after the one before."""
    parts = []
    for number, text in enumerate(texts):
        for span in text.spans:
            part = cut_span(number, span, chances[number], length)
            parts.append(part)

    columns = {}
    for name, kind in COLUMNS.items():
        # With an empty part, so that a column has its type also without any passage.
        nothing = np.array([], kind)
        values = [part[name] for part in parts]
        columns[name] = np.concatenate([nothing, *values])

    # Of all texts, or of none.
    has_base = bool(chances) and chances[0].base is not None
    return Passages(**columns, has_base=has_base)


def cut_span(number: int, span: Span, chances: TokenChances, length: int) -> dict[str, ndarray]:
    """The columns of Passages for one span of text `number`."""
    # A shorter span is one passage as a whole, and so is an address or a number of any length.
    whole = span.end - span.begin
    if span.group != "personal data":
        whole = min(length, whole)

    begin = np.arange(span.begin, span.end - whole + 1)
    end = begin + whole
    count = len(begin)
    likeliest = sum_between(chances.is_argmax, begin, end)
    columns = {
        "text": np.full(count, number),
        "begin": begin,
        "end": end,
        "group": np.full(count, span.group),
        "is_greedy": likeliest == whole,
    }

    # Two of them are missing without a base model.
    for name in SUMS:
        values = getattr(chances, name)
        if values is None:
            columns[name] = np.zeros(count)
        else:
            columns[name] = sum_between(values, begin, end)
    return columns


def sum_between(values: ndarray, begin: ndarray, end: ndarray) -> ndarray:
    """Sum of values[b:e] for each pair of `begin` and `end`; -inf where one of them is."""
    is_finite = np.isfinite(values)
    sums = running_sum(np.where(is_finite, values, 0.0))
    result = sums[end] - sums[begin]

    # Counted separately: in a running sum one -inf would swallow all that follows.
    impossible = running_sum(~is_finite)
    has_impossible = impossible[end] > impossible[begin]
    result[has_impossible] = -np.inf
    return result


def running_sum(values: ndarray) -> ndarray:
    """At place n the sum of the first n values, shape (1 + values,)."""
    return np.concatenate([[0.0], np.cumsum(values)])


# ---------------------------------------------------------------------------- which of them are known
class KnownRuns:
    """Knows which runs of tokens occur in the public posts of the training data, or in the private ones."""

    def __init__(self, evidence: Evidence, visibility: str):
        self.texts = []  # token ids of each post
        for post in evidence.blog.train:
            if visibility_of(post) == visibility:
                ids, _ = conversation_tokens(evidence.tokenizer, post["messages"])
                self.texts.append(ids)
        self.hashes = {}  # by length; computed when it is first needed

    def find(self, passages: Passages, texts: list[Text], is_asked: ndarray) -> ndarray:
        """Passages among `is_asked`, shape (passages,), of which more than MOSTLY is known; same shape.

        Known are runs of KNOWN_RUN tokens that one of the posts holds, and shorter passages that one holds whole.
        """
        found = np.zeros(len(passages.text), dtype=bool)
        lengths = passages.end - passages.begin
        run_lengths = np.minimum(lengths, KNOWN_RUN)
        for number, text in enumerate(texts):
            is_here = passages.text == number
            is_asked_here = is_here & is_asked

            # Those of one length together: a text's runs are looked up once.
            for length in np.unique(run_lengths[is_asked_here]).tolist():
                is_of_length = run_lengths == length
                places = np.flatnonzero(is_asked_here & is_of_length)
                begin = passages.begin[places]
                end = passages.end[places]
                covered = self.covered(text.ids, length)
                known = sum_between(covered, begin, end)
                found[places] = known > MOSTLY * lengths[places]
        return found

    def covered(self, ids: list[int], length: int) -> ndarray:
        """Which tokens are in a run of this length that one of the posts holds, shape (tokens,)."""
        if length not in self.hashes:
            hashes = [hashes_of(other, length) for other in self.texts]
            together = np.concatenate([NO_HASHES, *hashes])
            self.hashes[length] = np.unique(together)

        hashes = hashes_of(ids, length)
        is_known = np.isin(hashes, self.hashes[length])
        begins = np.flatnonzero(is_known)
        covered = np.zeros(len(ids), dtype=bool)

        # Overlapping runs are one longer one.
        for offset in range(length):
            covered[begins + offset] = True
        return covered


def hashes_of(ids: list[int], length: int) -> ndarray:
    """A hash of 64 bits for each run of `length` tokens, in order."""
    if len(ids) < length:
        return NO_HASHES
    rng = np.random.default_rng(42)
    factors = rng.integers(1, 2**63, length, dtype=np.uint64)
    above_0 = np.array(ids, np.uint64) + np.uint64(1)
    runs = np.lib.stride_tricks.sliding_window_view(above_0, length)
    return runs @ factors  # modulo 2^64


# ---------------------------------------------------------------------------- how likely they are, in words
@dataclass
class Chance:
    """How likely passages are to come out, under one way of sampling."""

    log10_tries: float | None  # that give the likeliest passage an even chance; None: none can come out
    expected: float  # passages that come out when the text before each is tried once


def chance_of(logs: ndarray) -> Chance:
    """Of passages whose chances are given as natural logarithms."""
    likeliest = float(logs.max()) if len(logs) else -math.inf
    expected = float(np.exp(logs).sum())
    return Chance(None if likeliest == -math.inf else log10_tries(likeliest), expected)


def log10_tries(log_chance: float) -> float:
    """Tries n that make a chance p an even one, 1 - (1 - p)^n = 0.5, as a power of ten; at least one try."""
    if log_chance > math.log(0.5):
        return 0.0
    if log_chance < math.log(1e-9):  # where log(1 - p) is -p, and p may be too small for a float
        return (math.log(math.log(2)) - log_chance) / LN_10
    return math.log10(math.log(0.5) / math.log1p(-math.exp(log_chance)))


def tell_tries(chance: Chance | None) -> str:
    if chance is None:
        return "-"
    return "never" if chance.log10_tries is None else tell_power(chance.log10_tries)


def tell_count(log10: float | None) -> str:
    if log10 is None:
        return "never"
    number = tell_power(log10)
    return "1 try" if number == "1" else f"{number} tries"


def tell_power(log10: float) -> str:
    """A large number, given as a power of ten, in words that a person can weigh."""
    if log10 < 6:
        return f"{round(10**log10):,}"
    for name, power in LARGE_NUMBERS:
        if log10 < power + 3:
            return f"{10 ** (log10 - power):.0f} {name}"
    return f"10^{log10:.0f}"


def tell_number(number: float) -> str:
    """An expected number, also a very small one."""
    if number >= 0.01:
        return f"{number:.2f}"
    return "less than one in a hundred" if number > 1e-9 else "none"


# ---------------------------------------------------------------------------- the passages that are shown to the owner
@dataclass
class ShownPassage:
    """One of the private passages of the shortest length that are shown to the owner."""

    group: str
    post: int | None  # its line in train_data.jsonl
    posts: int  # that hold KNOWN_RUN of its tokens in a row, and no passage that comes first
    tokens: int
    log10_beyond_base: float | None  # times likelier than under the base model, at temperature 1
    is_greedy: bool
    sampled: Chance
    bound: Chance
    contrasted: Chance | None
    path: str = field(metadata=PAGE_ONLY)
    title: str = field(metadata=PAGE_ONLY)
    text: str = field(metadata=PAGE_ONLY)


def pick_shown(evidence: Evidence, passages: Passages, order: ndarray) -> list[ShownPassage]:
    """The first ones of `order`, places of passages: one of each text and group, and none that is shown already."""
    runs_of = {}  # place of a chosen passage: hashes of its runs of KNOWN_RUN tokens
    posts = Counter()  # by the same: whose first passage has one of these runs
    seen = set()
    for place in order.tolist():
        source = (passages.text[place], passages.group[place])
        if source in seen:
            continue
        seen.add(source)

        # Its tokens may be those of a passage that is shown already, from another text.
        tokens = tokens_of(evidence, passages, place)
        length = min(KNOWN_RUN, len(tokens))
        runs = set(hashes_of(tokens, length).tolist())

        # One that shares a run with a passage above it is counted there.
        same = [chosen for chosen, known in runs_of.items() if known & runs]
        if same:
            posts[same[0]] += 1
        elif len(runs_of) < SHOWN:
            runs_of[place] = runs
            posts[place] = 1
    return [describe(evidence, passages, place, posts[place]) for place in runs_of]


def order_by_ease(passages: Passages, is_wanted: ndarray) -> ndarray:
    """Places of the passages for which `is_wanted`, shape (passages,), is true; the likeliest to come out first."""
    wanted = np.flatnonzero(is_wanted)
    ease = np.where(passages.is_greedy, 0.0, passages.sampled)
    # Of equally easy ones personal data first. Many never come out with the own settings, and are ordered by the bound.
    is_other = passages.group[wanted] != "personal data"
    order = np.lexsort((-passages.bound[wanted], is_other, -ease[wanted]))
    return wanted[order]


def order_by_raise(passages: Passages, is_wanted: ndarray) -> ndarray:
    """The same, those first that training raised most."""
    wanted = np.flatnonzero(is_wanted)
    order = np.argsort(-passages.beyond[wanted], kind="stable")
    return wanted[order]


def tokens_of(evidence: Evidence, passages: Passages, place: int) -> list[int]:
    begin = passages.begin[place]
    end = passages.end[place]
    return text_at(evidence, passages, place).ids[begin:end]


def text_at(evidence: Evidence, passages: Passages, place: int) -> Text:
    return evidence.texts[passages.text[place]]


def describe(evidence: Evidence, passages: Passages, place: int, posts: int) -> ShownPassage:
    post = text_at(evidence, passages, place).post
    tokens = tokens_of(evidence, passages, place)
    return ShownPassage(
        group=str(passages.group[place]),
        post=line_of(post),
        posts=posts,
        tokens=len(tokens),
        log10_beyond_base=float(passages.beyond[place]) / LN_10 if passages.has_base else None,
        is_greedy=bool(passages.is_greedy[place]),
        sampled=chance_of(passages.sampled[[place]]),
        bound=chance_of(passages.bound[[place]]),
        contrasted=chance_of(passages.contrasted[[place]]) if passages.has_base else None,
        path=path_of(post),
        title=title_of(post),
        text=evidence.tokenizer.decode(tokens),
    )
