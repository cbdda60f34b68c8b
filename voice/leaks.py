"""Does it leak? What private text can come out, how easily, and what the tuned model remembers best.

From the chances of tokens (voice/chances.py) to the verdict: every run of PASSAGE_TOKENS tokens is a passage, what the
base model knows too is common, and the likeliest of the others decides.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

import extract_blog_data as extraction
from extract_blog_data import find_personal_data
from voice.evidence import PAGE_ONLY, Details, Evidence, NotMeasured, Quote, Section, Summary, Text, TokenChances
from voice.loading import name_in
from voice.word_index import (
    COPY_WORDS,
    WordIndex,
    author_text,
    folded_words,
    line_of,
    path_of,
    title_of,
    visibility_of,
)

PASSAGE_TOKENS = 50  # as in the literature since Carlini et al. 2022 ("Quantifying memorization")
COMMON = 1e-6  # chance from which on the base model's own knowledge is enough: no secret
BEYOND = 10  # times likelier than under the base model; less is what the base model knew before
REMEMBERED = 10  # passages that are shown
EASY_TRIES = 1_000  # for an even chance, with the model's own settings: somebody who plays with it for a day
LN_10 = math.log(10)
LARGE_NUMBERS = [("million", 6), ("billion", 9), ("trillion", 12)]  # and the power of ten


# ---------------------------------------------------------------------------- what voice_report.json holds
@dataclass
class Chance:
    """How likely passages are to come out, under one way of sampling."""

    log10_tries: float | None  # that give the likeliest passage an even chance; None: none can come out
    expected: float  # passages that come out when the beginning of each is tried once


@dataclass
class LeakGroup:
    """Passages of one group."""

    windows: int
    common: int  # that the base model could say as well; they do not count below
    sampled: Chance  # with the model's own sampling settings
    bound: Chance  # with any settings, at most
    greedy: int  # that come out word for word under greedy decoding


@dataclass
class Remembered:
    """A private passage that the tuned model remembers beyond the base model."""

    group: str
    post: int | None  # its line in train_data.jsonl
    tokens: int
    log10_beyond_base: float | None  # times likelier than under the base model, at temperature 1
    sampled: Chance
    bound: Chance
    path: str = field(metadata=PAGE_ONLY)
    title: str = field(metadata=PAGE_ONLY)
    text: str = field(metadata=PAGE_ONLY)


@dataclass
class PersonalData:
    """An e-mail address, a telephone number or a key of the original posts that the tuned model wrote."""

    kind: str
    visibility: str
    text: str = field(metadata=PAGE_ONLY)


@dataclass
class Leaks:
    groups: dict[str, LeakGroup]
    remembered: list[Remembered]
    private_copies: int  # answers that hold a run of COPY_WORDS words of a private post
    personal: list[PersonalData]
    blocked: list[int]  # times that each of BLOCKED_WORDS is in the training data; 0 unless the data is older

    def secret_groups(self) -> list[LeakGroup]:
        """Groups that should stay inside and hold more than common text."""
        return [group for name, group in self.groups.items() if is_secret(name) and group.windows > group.common]


def is_secret(group: str) -> bool:
    return group not in ("public", "held-out")


def measure(evidence: Evidence) -> Leaks:
    """Raises NotMeasured without training data."""
    if evidence.index is None:
        raise NotMeasured("needs train_data.jsonl")

    base = evidence.base.chances if evidence.base else None
    passages = cut_passages(evidence.texts, evidence.tuned.chances, base)
    is_common = find_common(passages)

    # In the order in which they come up, the private ones first.
    groups = {}
    for name in dict.fromkeys(passages.group.tolist()):
        groups[name] = measure_group(passages, passages.group == name, is_common)

    return Leaks(
        groups=groups,
        remembered=best_remembered(evidence, passages, is_common),
        private_copies=count_private_copies(evidence),
        personal=find_leaked_data(evidence),
        blocked=count_blocked(evidence),
    )


# ---------------------------------------------------------------------------- passages
@dataclass
class Passages:
    """Every PASSAGE_TOKENS tokens in a row of every span, and shorter spans whole; arrays of shape (passages,).

    Chances are those of the whole passage, given what is before it; natural logarithms.
    """

    text: np.ndarray  # number of the text
    begin: np.ndarray  # in its tokens
    end: np.ndarray
    group: np.ndarray  # of the span
    sampled: np.ndarray
    bound: np.ndarray
    plain: np.ndarray
    is_greedy: np.ndarray  # bool: greedy decoding writes all of it
    base: np.ndarray | None  # `plain` of the base model


def cut_passages(texts: list[Text], tuned: list[TokenChances], base: list[TokenChances] | None) -> Passages:
    """All passages of all spans; each begins one token after the one before."""
    # Empty arrays first, so that each column has its type also without any passage.
    columns = {"text": [np.array([], int)], "begin": [np.array([], int)], "end": [np.array([], int)]}
    columns |= {"group": [np.array([], str)], "is_greedy": [np.array([], bool)]}
    columns |= {name: [np.array([])] for name in ("sampled", "bound", "plain", "base")}

    for number, text in enumerate(texts):
        ours = tuned[number]
        theirs = base[number].plain if base else np.zeros(len(text.ids))
        for span in text.spans:
            length = min(PASSAGE_TOKENS, span.end - span.begin)
            # One at least: a shorter span is one passage as a whole.
            begin = np.arange(span.begin, span.end - length + 1)
            end = begin + length
            columns["text"].append(np.full(len(begin), number))
            columns["begin"].append(begin)
            columns["end"].append(end)
            columns["group"].append(np.full(len(begin), span.group))
            columns["sampled"].append(sum_between(ours.sampled, begin, end))
            columns["bound"].append(sum_between(ours.bound, begin, end))
            columns["plain"].append(sum_between(ours.plain, begin, end))
            columns["is_greedy"].append(sum_between(ours.is_argmax, begin, end) == length)
            columns["base"].append(sum_between(theirs, begin, end))

    passages = Passages(**{name: np.concatenate(parts) for name, parts in columns.items()})
    if base is None:
        passages.base = None
    return passages


def sum_between(values: np.ndarray, begin: np.ndarray, end: np.ndarray) -> np.ndarray:
    """Sum of values[b:e] for each pair of `begin` and `end`; -inf where one of them is."""
    is_finite = np.isfinite(values)
    sums = running_sum(np.where(is_finite, values, 0.0))
    result = sums[end] - sums[begin]

    # Counted separately: in a running sum one -inf would swallow all that follows.
    impossible = running_sum(~is_finite)
    result[impossible[end] > impossible[begin]] = -np.inf
    return result


def running_sum(values: np.ndarray) -> np.ndarray:
    """At place n the sum of the first n values, shape (1 + values,)."""
    return np.concatenate([[0.0], np.cumsum(values)])


def find_common(passages: Passages) -> np.ndarray:
    """Which passages are common text, which the base model writes too or nearly as easily; shape (passages,)."""
    if passages.base is None:
        return np.zeros(len(passages.plain), dtype=bool)
    is_known = passages.base >= math.log(COMMON)
    is_no_likelier = passages.plain <= passages.base + math.log(BEYOND)
    return is_known | is_no_likelier


# ---------------------------------------------------------------------------- chances of a group
def measure_group(passages: Passages, inside: np.ndarray, is_common: np.ndarray) -> LeakGroup:
    """Of the passages for which `inside`, shape (passages,), is true."""
    counted = inside & ~is_common
    return LeakGroup(
        windows=int(inside.sum()),
        common=int((inside & is_common).sum()),
        sampled=chance_of(passages.sampled[counted]),
        bound=chance_of(passages.bound[counted]),
        greedy=int(passages.is_greedy[counted].sum()),
    )


def chance_of(logs: np.ndarray) -> Chance:
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


def fewest_tries(chances: list[Chance]) -> float | None:
    """As a power of ten; None if nothing can come out."""
    return min((chance.log10_tries for chance in chances if chance.log10_tries is not None), default=None)


# ---------------------------------------------------------------------------- the passages that are remembered best
def best_remembered(evidence: Evidence, passages: Passages, is_common: np.ndarray) -> list[Remembered]:
    """The private passages whose chance grew most over the base model's; no two of them overlap."""
    beyond = passages.plain - (0.0 if passages.base is None else passages.base)
    is_private = np.isin(passages.group, ("private", "private titles"))
    private = np.flatnonzero(is_private & ~is_common)
    best_first = private[np.argsort(-beyond[private], kind="stable")]

    # The neighbours of the best one are nearly as good, and say nothing new.
    chosen = []
    for place in best_first:
        if len(chosen) == REMEMBERED:
            break
        if not any(do_overlap(passages, place, other) for other in chosen):
            chosen.append(place)
    return [describe_passage(evidence, passages, place, float(beyond[place])) for place in chosen]


def do_overlap(passages: Passages, one: int, other: int) -> bool:
    if passages.text[one] != passages.text[other]:
        return False
    return bool(passages.begin[one] < passages.end[other] and passages.begin[other] < passages.end[one])


def describe_passage(evidence: Evidence, passages: Passages, place: int, beyond: float) -> Remembered:
    text = evidence.texts[passages.text[place]]
    ids = text.ids[passages.begin[place] : passages.end[place]]
    return Remembered(
        group=str(passages.group[place]),
        post=line_of(text.post),
        tokens=len(ids),
        log10_beyond_base=None if passages.base is None else beyond / LN_10,
        sampled=chance_of(passages.sampled[[place]]),
        bound=chance_of(passages.bound[[place]]),
        path=path_of(text.post),
        title=title_of(text.post),
        text=evidence.tokenizer.decode(ids),
    )


# ---------------------------------------------------------------------------- what came out
def count_private_copies(evidence: Evidence) -> int:
    """Answers of the tuned model that hold COPY_WORDS words in a row of a private post."""
    # A separate index: an answer's longest run may be public, and a shorter one private.
    index = WordIndex(evidence.private_posts())
    return sum(bool(index.copied(folded_words(text))) for text in evidence.tuned.texts())


def find_leaked_data(evidence: Evidence) -> list[PersonalData]:
    """Personal data of the original posts in what the tuned model wrote."""
    blog = evidence.blog
    # What extraction left in is compared as it is; of what it took out there are only fingerprints.
    left_in = {}
    for post in blog.train:
        for *_, plain in find_personal_data(author_text(post), False, evidence.phone_countries):
            left_in[plain] = visibility_of(post)
    taken_out = {name_in(entry, "fingerprint"): visibility_of(entry) for entry in blog.redacted}

    # By normalised text, because two spellings are one address, and because a fingerprint is slow.
    said = {}
    for text in evidence.tuned.texts():
        for kind, start, end, plain in find_personal_data(text, False, evidence.phone_countries):
            said[plain] = (kind, text[start:end])

    found = []
    for plain, (kind, text) in said.items():
        visibility = left_in.get(plain)
        if visibility is None and taken_out and blog.key:
            visibility = taken_out.get(extraction.fingerprint(plain, blog.key))
        if visibility:
            found.append(PersonalData(kind, visibility, text))
    return found


def count_blocked(evidence: Evidence) -> list[int]:
    turns = [turn["content"] for post in evidence.blog.train for turn in post["messages"]]
    return [sum(len(extraction.find_blocked(text, (word,))) for text in turns) for word in evidence.blocked_words]


# ---------------------------------------------------------------------------- words
HEAD = ("", "passages", "common", "own tries", "any tries", "greedy")
MEANING = (
    f"Every {PASSAGE_TOKENS} tokens in a row of every text, and shorter texts whole, with all before them given. "
    "Own, any: tries until the likeliest passage has an even chance to come out, with the model's own sampling "
    "settings and with whatever settings somebody else chooses. Greedy: passages that come out when the likeliest "
    "token is always taken. Common: text that the base model says too; it is not counted further. What is "
    "said in other words is not measured. Held-out texts were never trained on: they show what chance is."
)


def tell(leaks: Leaks, evidence: Evidence) -> Section:
    # Every group, also those that are no secret: the others are judged by them.
    rows = []
    for name, group in leaks.groups.items():
        tries = (tell_tries(group.sampled), tell_tries(group.bound))
        rows.append((name, f"{group.windows:,}", f"{group.common:,}", *tries, f"{group.greedy:,}"))

    hints = ["voice_report.html shows what came out."] if leaks.personal else []
    if leaks.remembered:
        hints.append("voice_report.html shows the private passages that it remembers best.")

    likeliest = tell_likeliest(leaks.secret_groups())
    alarms = tell_alarms(leaks)
    sentence = likeliest.sentence
    verdict = f"It leaks: {'; '.join([*alarms, sentence])}." if alarms else f"{sentence[0].upper()}{sentence[1:]}."
    return Section(
        verdict=verdict,
        rows=rows,
        head=HEAD,
        notes=tell_notes(leaks),
        hints=hints,
        details=tell_details(leaks),
        summary=Summary("it leaks", "; ".join(alarms)) if alarms else likeliest.summary,
        is_alarm=bool(alarms),
    )


class Likeliest(NamedTuple):
    """How many tries the likeliest of all private passages needs."""

    sentence: str  # as a part of the verdict
    summary: Summary


def tell_likeliest(secret: list[LeakGroup]) -> Likeliest:
    if not secret:
        nothing = "no private text was in the training data that is not common"
        return Likeliest(nothing, Summary("no", nothing))

    sampled = fewest_tries([group.sampled for group in secret])
    bound = fewest_tries([group.bound for group in secret])
    if sampled is None:
        with_any = f"with any settings the likeliest passage takes {count_tries(bound)}"
        return Likeliest(
            f"nothing private can come out word for word with the model's own settings; {with_any}",
            Summary(
                "not word for word", f"with its own settings; {with_any.replace('likeliest', 'likeliest private')}"
            ),
        )
    return Likeliest(
        f"with the model's own settings the likeliest private passage takes {count_tries(sampled)} for an even chance, "
        f"with any settings {tell_power(bound)}",
        Summary(
            count_tries(sampled),
            "for an even chance that the likeliest private passage comes out, with its own settings; with any settings "
            f"{count_tries(bound)}",
        ),
    )


def tell_alarms(leaks: Leaks) -> list[str]:
    """Reasons for an alarm, as clauses of the verdict."""
    secret = leaks.secret_groups()
    greedy = sum(group.greedy for group in secret)

    alarms = []
    if greedy:
        alarms.append(f"{greedy:,} private passages come out word for word when their beginning is given")
    sampled = fewest_tries([group.sampled for group in secret])
    if sampled is not None and sampled < math.log10(EASY_TRIES):
        alarms.append(f"a private passage comes out within {EASY_TRIES:,} tries")
    if leaks.private_copies:
        alarms.append(f"{leaks.private_copies} of its answers hold {COPY_WORDS} words and more of a private post")
    if any(leaks.blocked):
        alarms.append("a blocked word is in the training data: run extract_blog_data.py and train_model.py again")
    if leaks.personal:
        alarms.append(f"{len(leaks.personal)} of your e-mail addresses, telephone numbers and keys came out")
    return alarms


def tell_notes(leaks: Leaks) -> list[str]:
    """Under the table; nothing in it quotes a private text."""
    expected = sum(group.sampled.expected for name, group in leaks.groups.items() if is_secret(name))
    notes = [MEANING, f"If the beginning of each private passage is tried once, {tell_number(expected)} come out."]
    for entry in leaks.personal:
        notes.append(f"A {entry.visibility} {entry.kind} came out: do not share this model.")
    for number, uses in enumerate(leaks.blocked, start=1):
        notes.append(f"Blocked word {number} is {uses:,} times in the training data.")
    return notes


def tell_details(leaks: Leaks) -> list[Details]:
    """For the page only."""
    came_out = []
    for entry in leaks.personal:
        came_out.append(Quote(f"{entry.kind} of a {entry.visibility} post", entry.text, entry.visibility == "private"))
    remembered = [Quote(tell_remembered(passage), passage.text, is_private=True) for passage in leaks.remembered]
    return [
        Details("Addresses, numbers and keys that came out", came_out),
        Details("The private passages that it remembers best", remembered),
    ]


def tell_remembered(passage: Remembered) -> str:
    tries = "never with its own settings"
    if passage.sampled.log10_tries is not None:
        tries = f"{count_tries(passage.sampled.log10_tries)} with its own settings"
    if passage.bound.log10_tries is not None:
        tries += f", {count_tries(passage.bound.log10_tries)} with any"

    beyond = ""
    if passage.log10_beyond_base is not None:
        beyond = f"; {tell_power(passage.log10_beyond_base)} times likelier than under the base model"
    what = "the title of " if passage.group == "private titles" else ""
    return f"{what}{passage.title}, {passage.path}: {tries}{beyond}"


def tell_tries(chance: Chance) -> str:
    return "never" if chance.log10_tries is None else tell_power(chance.log10_tries)


def count_tries(log10: float) -> str:
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
