"""Style as numbers: how often common words and letter sequences occur in chunks of everybody's text.

Text is counted in stretches of a hundred words; as many of them in a row as there is text for make a chunk.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from dataclasses import dataclass

import numpy as np
from numpy import ndarray

from extract_blog_data import WORD
from voice.chances import comments_of, runs_of
from voice.evidence import Evidence, NotMeasured, percent
from voice.settings import ROOT
from voice.word_index import author_texts, count_words, folded_words, word_spans

STRETCH_WORDS = 100
CHUNK_STRETCHES = (5, 2, 1)  # the longest chunk of which there are enough: 500 words tell more than 100
MIN_CHUNKS = 10  # of the author's unseen posts, and of each model's text
MIN_STRANGER_WORDS = 2 * MIN_CHUNKS * STRETCH_WORDS
# Those that occur in the most posts of the author. In chunks of 500 words the reader gave three authors 79, 99 and 100
# percent of their unseen posts, with half as many features 75, 99 and 100; in chunks of 200 words 75, 90 and 100
# instead of 66, 88 and 95. On kevquirk, benbalter and jtimberman, by the functions of benchmarks/bench_reader.py.
FEATURES = {"words": 300, "trigrams": 600}

STRANGERS = ROOT / "sample" / "strangers" / "strangers.npz"  # counts of other bloggers, with their licences beside
STRETCHES_OF_A_RUN = 5  # in that file; the next run is from elsewhere in the blog
# Share of the strangers' 100 commonest words that must be among the author's 500. On four English blogs and a French
# one: 0.67 and more among the English, 0.39 and more if the author had 400 words only, 0.11 at most with the French.
SAME_LANGUAGE = 0.3

Feature = tuple[str, str]  # a key of FEATURES, and the word or trigram
Chunks = tuple[ndarray, ndarray]  # relative frequencies (chunks, features), source (chunks,)


@dataclass
class Stretches:
    """Counts of the features in stretches of STRETCH_WORDS words of somebody's text, in order."""

    counts: ndarray  # (stretches, features)
    totals: ndarray  # (stretches, features): number of all words or trigrams that each count is a part of
    source: ndarray  # (stretches,): number of the post or answer in which it begins
    run: ndarray  # (stretches,): stretches of one run follow each other in the text

    def chunks(self, size: int) -> Chunks:
        """Every `size` stretches in a row; a chunk's source is that of its first stretch."""
        first = []
        for _, begin, end in runs_of(self.run.tolist()):
            last = end - size
            first += range(begin, last + 1, size)

        begins = np.array(first, int)
        offsets = np.arange(size)
        members = begins[:, None] + offsets  # (chunks, size)
        counts = self.counts[members].sum(1)
        totals = self.totals[members].sum(1)
        return counts / totals, self.source[begins]


@dataclass
class Strangers:
    """Other bloggers: the features that can be counted in all of them, and their counts by name."""

    features: list[Feature]
    stretches: dict[str, Stretches]
    note: str = ""  # who is missing, and why


@dataclass
class Styles:
    """Everybody who is compared, in chunks of one length, with the same features."""

    chunk_words: int
    profile: ndarray  # (chunks, features): the author's training posts
    tested: dict[str, Chunks]  # text of "author" (unseen posts), "tuned" and "base"
    strangers: dict[str, Chunks]  # by name
    note: str


def count_styles(evidence: Evidence) -> Styles:
    """Raises NotMeasured if somebody's text is missing or too short."""
    texts = texts_without_copies(evidence)
    size = pick_chunk_size(texts)

    # Features come from posts that are not tested, so that no text chooses what it is judged by.
    known = author_texts(evidence.blog.train)
    features = pick_features(known)
    strangers = find_strangers(evidence, features)

    stretches = count_stretches(known, strangers.features)
    profile, _ = stretches.chunks(size)
    if len(profile) == 0:
        words = (size + 1) * STRETCH_WORDS
        raise NotMeasured(f"your training posts have {count_words(known):,} words; needs {words:,}")

    tested = {}
    for whose, part in texts.items():
        stretches = count_stretches(part, strangers.features)
        tested[whose] = stretches.chunks(size)
    return Styles(
        chunk_words=size * STRETCH_WORDS,
        profile=profile,
        tested=tested,
        strangers={name: counted.chunks(size) for name, counted in strangers.stretches.items()},
        note=strangers.note,
    )


# ---------------------------------------------------------------------------- texts
def texts_without_copies(evidence: Evidence) -> dict[str, list[str]]:
    """What is compared with the author's training posts; copies would sound like the author, and are no voice.

    Raises NotMeasured if one of the three is missing.
    """
    if evidence.base is None or evidence.index is None or not evidence.blog.held_out:
        raise NotMeasured("needs the base model, train_data.jsonl and val_data.jsonl")
    texts = {
        "author": author_texts(evidence.blog.held_out),
        "tuned": evidence.tuned.texts(),
        "base": evidence.base.texts(),
    }

    # The author's too: an author who quotes himself would seem nearer to himself than any model can be.
    for whose, part in texts.items():
        texts[whose] = [evidence.index.without_copies(text) for text in part]
    return texts


def pick_chunk_size(texts: dict[str, list[str]]) -> int:
    """Stretches in a chunk: the most of which everybody has MIN_CHUNKS.

    Raises NotMeasured, with what is missing, if somebody has too few of any size.
    """
    words = {whose: count_words(part) for whose, part in texts.items()}
    fewest = min(words.values())
    for size in CHUNK_STRETCHES:
        # One more than needed, because the rest at the end of the text makes no chunk.
        needed = (MIN_CHUNKS + 1) * size * STRETCH_WORDS
        if fewest >= needed:
            return size

    # What is needed for the shortest chunks, the last ones.
    of_author = words["author"]
    if of_author < needed:
        share = needed / max(of_author, 1)
        posts = math.ceil(share * len(texts["author"]))
        raise NotMeasured(
            f"your unseen posts have {of_author:,} words that are no copies; needs {needed:,}, about {posts:,} "
            "held-out posts"
        )
    raise NotMeasured(f"a model wrote {fewest:,} words that are no copies; needs {needed:,}")


# ---------------------------------------------------------------------------- counting
def pick_features(posts: list[str]) -> list[Feature]:
    """The words and trigrams that occur in the most posts: habits rather than topics."""
    spread = {kind: Counter() for kind in FEATURES}  # number of posts that hold each
    for post in posts:
        for kind, counts in counts_of(post).items():
            spread[kind].update(counts.keys())

    features = []
    for kind, number in FEATURES.items():
        features += [(kind, key) for key, _ in spread[kind].most_common(number)]
    return features


def counts_of(text: str) -> dict[str, Counter]:
    """How often each word and each three characters in a row occur in `text`; make_strangers.py counts the same."""
    flat = " ".join(text.split())
    words = WORD.findall(flat.casefold())
    last = len(flat) - 3
    trigrams = [flat[place : place + 3] for place in range(last + 1)]
    return {
        "words": Counter(words),
        "trigrams": Counter(trigrams),
    }


def count_stretches(texts: list[str], features: list[Feature]) -> Stretches:
    """Of the texts joined in their order; an incomplete stretch at the end is dropped."""
    gap = "\n\n"
    joined = gap.join(texts)
    lengths = [len(text) + len(gap) for text in texts[:-1]]
    starts = np.cumsum([0, *lengths])  # where each text begins, in characters

    # Across the borders of texts: most answers are shorter than a stretch.
    begins = [begin for begin, _ in word_spans(joined)]
    edges = begins[::STRETCH_WORDS]
    counts = []
    totals = []
    for begin, end in itertools.pairwise(edges):
        found = counts_of(joined[begin:end])
        sums = {kind: counter.total() for kind, counter in found.items()}
        counts.append([found[kind][key] for kind, key in features])
        totals.append([sums[kind] for kind, _ in features])

    # Two axes also without any stretch.
    shape = (len(counts), len(features))
    counts = np.array(counts).reshape(shape)
    totals = np.array(totals).reshape(shape)
    after = np.searchsorted(starts, edges[: len(counts)], side="right")
    return Stretches(
        counts=counts,
        totals=totals,
        source=after - 1,
        run=np.zeros(len(counts)),
    )


# ---------------------------------------------------------------------------- strangers
def find_strangers(evidence: Evidence, features: list[Feature]) -> Strangers:
    """The bloggers of strangers.npz, those of OTHER_BLOGS, and the blog's own readers.

    With the bloggers of the file, only features of its fixed vocabulary can be compared.
    """
    shipped = load_strangers(evidence, features)
    if shipped.stretches:
        features = shipped.features

    known = dict(shipped.stretches)
    notes = [shipped.note, *evidence.left_out]
    for name, texts in evidence.other_texts.items():
        known[name] = count_stretches(texts, features)
        if not is_enough(known[name]):
            words = f"{count_words(texts):,} words, and needs {MIN_STRANGER_WORDS:,}"
            notes.append(f"{name} (OTHER_BLOGS) has {words}: left out.")

    # A few polite words show no habits.
    comments = []
    for conversation in evidence.blog.train:
        comments += comments_of(conversation)
    if count_words(comments) >= MIN_STRANGER_WORDS:
        known["your readers"] = count_stretches(comments, features)

    enough = {name: counted for name, counted in known.items() if is_enough(counted)}
    return Strangers(
        features=features,
        stretches=enough,
        note=" ".join(notes).strip(),
    )


def is_enough(stretches: Stretches) -> bool:
    """Twice as many as a tested text needs: everything is compared with these few chunks."""
    return len(stretches.run) >= 2 * MIN_CHUNKS


def load_strangers(evidence: Evidence, features: list[Feature]) -> Strangers:
    """The bloggers of strangers.npz, with those features that it holds; nobody if they write another language."""
    if not STRANGERS.is_file():
        missing = f"{STRANGERS.relative_to(ROOT)} is missing."
        return Strangers([], {}, missing)
    # Without pickles, which could run anything.
    with np.load(STRANGERS, allow_pickle=False) as file:
        data = {name: file[name] for name in file.files}

    # The file has the commonest words first.
    commonest = data["words"][:100].tolist()
    share = share_of_language(commonest, evidence.blog.train)
    if share < SAME_LANGUAGE:
        note = (
            f"You use {percent(share)} of the 100 commonest words of the bloggers in {STRANGERS.name}: they write "
            "another language and are left out."
        )
        return Strangers([], {}, note)
    return pick_counts(data, features, evidence.not_strangers)


def pick_counts(data: dict[str, ndarray], features: list[Feature], not_strangers: tuple[str, ...]) -> Strangers:
    """From the arrays of strangers.npz: by blog, and of those `features` that it holds."""
    # The file has a row for each feature, words before trigrams, and a column for each stretch.
    row = {}
    for kind in FEATURES:
        for key in data[kind].tolist():
            row[kind, key] = len(row)
    shared = [feature for feature in features if feature in row]
    rows = [row[feature] for feature in shared]
    counts = data["counts"][rows].T.astype(int)  # (stretches, features)

    # Two columns: number of all words, and of all trigrams.
    columns = [0 if kind == "words" else 1 for kind, _ in shared]
    totals = data["totals"][:, columns].astype(int)  # (stretches, features)

    stretches = {}
    for number, name in enumerate(data["names"].tolist()):
        if name in not_strangers:
            continue
        mine = np.flatnonzero(data["blog"] == number)
        posts = data["post"][mine]
        stretches[name] = Stretches(
            counts=counts[mine],
            totals=totals[mine],
            source=posts.astype(int),
            run=mine // STRETCHES_OF_A_RUN,
        )
    return Strangers(shared, stretches)


def share_of_language(words: list[str], conversations: list[dict]) -> float:
    """The share of `words`, somebody's commonest ones, among the author's 500 commonest."""
    uses = Counter()
    for text in author_texts(conversations):
        uses.update(folded_words(text))

    commonest = {word for word, _ in uses.most_common(500)}
    found = sum(word in commonest for word in words)
    return found / len(words)
