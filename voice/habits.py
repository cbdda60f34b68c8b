"""What are its habits? Length of answers and posts, and the words and phrases that the author likes."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from extract_blog_data import URL
from voice.evidence import PAGE_ONLY, Details, Evidence, NotMeasured, Quote, Section, percent
from voice.sampling import Answer
from voice.word_index import author_texts, count_words, folded_words, visibility_of

FAVOURITES = 10
FAVOURITE_SHARE = 0.1  # of the posts that hold a favourite, so that it is a habit and no topic
PHRASE_WORDS = (1, 2, 3)
OVERDONE = 2  # times the author's rate; a guess
TAILS = {"s", "t", "m", "d", "ll", "re", "ve"}  # after an apostrophe in English; words to WORD


@dataclass
class Favourite:
    """A word or phrase that the author uses much more than the base model; rates in 10,000 words."""

    author: float
    tuned: float
    base: float
    is_private: bool  # in no public post
    phrase: str = field(metadata=PAGE_ONLY)


@dataclass
class Habits:
    words: dict[str, float]  # median length in words, of "author", "tuned" and "base"
    ended: dict[str, float]  # share of answers that end by themselves, of "tuned" and "base"
    favourites: list[Favourite]


def measure(evidence: Evidence) -> Habits:
    """Raises NotMeasured without the base model or training data."""
    if evidence.base is None or evidence.index is None:
        raise NotMeasured("needs the base model and train_data.jsonl")

    posts = evidence.blog.train
    author = author_texts(posts)
    public = author_texts([post for post in posts if visibility_of(post) == "public"])
    tuned = evidence.tuned.texts()
    base = evidence.base.texts()
    return Habits(
        words={"tuned": median_words(tuned), "base": median_words(base), "author": median_words(author)},
        ended={"tuned": share_ended(evidence.tuned.answers), "base": share_ended(evidence.base.answers)},
        favourites=find_favourites(author, public, tuned, base),
    )


def median_words(texts: list[str]) -> float:
    """Of a text; not the mean, which a few endless answers would dominate."""
    return float(np.median([count_words([text]) for text in texts]))


def share_ended(answers: list[Answer]) -> float:
    return float(np.mean([answer.ended for answer in answers]))


class Usage:
    """How often somebody uses each word and phrase."""

    def __init__(self, texts: list[str]):
        texts = [URL.sub(" ", text) for text in texts]  # "http" is nobody's word
        self.words = count_words(texts)
        self.uses = Counter()
        self.spread = Counter()  # number of texts that hold it
        for text in texts:
            phrases = phrases_of(text)
            self.uses.update(phrases)
            self.spread.update(phrases.keys())

    def rate(self, phrase: str, more: float = 0.0) -> float:
        """Uses in 10,000 words, as if there were `more` of them."""
        return 10_000 * (self.uses[phrase] + more) / max(self.words, 1)


def phrases_of(text: str) -> Counter:
    """Words, pairs and triples of words, and how often each occurs in the text."""
    words = folded_words(text)
    phrases = Counter()
    for length in PHRASE_WORDS:
        starts = range(len(words) - length + 1)
        phrases.update(" ".join(words[start : start + length]) for start in starts)
    return phrases


def find_favourites(posts: list[str], public: list[str], tuned: list[str], base: list[str]) -> list[Favourite]:
    """Phrases of many posts, by how much more than the base model the author uses them. `public` are some of them."""
    author = Usage(posts)
    published = Usage(public)
    tuned = Usage(tuned)
    base = Usage(base)

    # In a blog of few posts a tenth of them is one, and that is no habit.
    fewest = max(3, FAVOURITE_SHARE * len(posts))

    # How many more uses than the base model's habit explains; half a use more for it, so that none is divided by 0.
    surplus = {}
    for phrase, number in author.spread.items():
        if number >= fewest and phrase not in TAILS:
            rate = author.rate(phrase)
            surplus[phrase] = rate * math.log(rate / base.rate(phrase, 0.5))

    favourites = []
    for phrase in sorted(surplus, key=surplus.get, reverse=True):
        if len(favourites) == FAVOURITES:
            break
        # "i" and "and i": once is enough.
        if not any(is_part(known.phrase, phrase) or is_part(phrase, known.phrase) for known in favourites):
            rates = (author.rate(phrase), tuned.rate(phrase), base.rate(phrase))
            # What public posts hold too may be shown in the terminal.
            is_private = phrase not in published.uses
            favourites.append(Favourite(*rates, is_private, with_apostrophes(phrase)))
    return favourites


def with_apostrophes(phrase: str) -> str:
    """As it is typed: "that s" was "that's" before it was split into words."""
    typed = ""
    for word in phrase.split():
        typed += f"'{word}" if word in TAILS and typed else f" {word}"
    return typed.strip()


def is_part(one: str, other: str) -> bool:
    """Whether `one` is in `other`, in whole words."""
    return f" {one} " in f" {other} "


def tell(habits: Habits, evidence: Evidence) -> Section:
    # Whole numbers: from some thousand words no decimals can be known.
    rows = []
    quotes = []
    for favourite in habits.favourites:
        rates = [f"{rate:.0f}" for rate in (favourite.author, favourite.tuned, favourite.base)]
        is_overdone = favourite.tuned > OVERDONE * favourite.author

        # Others may see the terminal: words of private posts alone are on the page, folded.
        if favourite.is_private:
            quotes.append(Quote(f"you, tuned and base model: {', '.join(rates)}", favourite.phrase, is_private=True))
        else:
            rows.append((favourite.phrase, *rates, "too often" if is_overdone else ""))

    words = habits.words
    verdict = (
        f"Its answers have {words['tuned']:,.0f} words (median), your posts {words['author']:,.0f}, the base model's "
        f"answers {words['base']:,.0f}; {percent(habits.ended['tuned'])} of its answers end by themselves."
    )
    meanings = [
        "What you use more than the base model, in a tenth of your posts or more; too often: at more than "
        f"{OVERDONE} times your rate."
    ]
    details = [Details("What you say in private posts only, in 10,000 words", quotes)]
    return Section(verdict, rows, ("in 10,000 words", "you", "tuned", "base", ""), meanings=meanings, details=details)
