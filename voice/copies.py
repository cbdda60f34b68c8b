"""Does it copy? Runs of words that the models wrote and that are in the training posts."""

from __future__ import annotations

from dataclasses import dataclass, field

from voice.evidence import PAGE_ONLY, Details, Evidence, NotMeasured, Quote, Section, Summary, percent
from voice.sampling import Answer
from voice.word_index import COPY_WORDS, Copy, WordIndex, folded_words, line_of, path_of, title_of, visibility_of

GOOD = "Good: no more than the base model, which was not trained on them here"
LONGEST_COPIES = 5  # that are shown


@dataclass
class CopyShare:
    """How many of a model's runs of COPY_WORDS words are in the training text."""

    copied: int
    runs: int
    share: float


@dataclass
class LongCopy:
    """A long run of words that a model wrote and that is in a post."""

    words: int
    visibility: str
    post: int | None  # its line in train_data.jsonl
    path: str = field(metadata=PAGE_ONLY)
    title: str = field(metadata=PAGE_ONLY)
    text: str = field(metadata=PAGE_ONLY)


@dataclass
class Copies:
    tuned: CopyShare
    base: CopyShare | None
    longest: list[LongCopy]  # of the tuned model's answers


def measure(evidence: Evidence) -> Copies:
    """Raises NotMeasured without training data."""
    if evidence.index is None:
        raise NotMeasured("needs train_data.jsonl")

    # One of each answer; the share below counts the others too.
    longest = []
    for answer in evidence.tuned.answers:
        copy = evidence.index.longest_copy(answer.text)
        if copy.post:
            post = copy.post
            entry = LongCopy(copy.words, visibility_of(post), line_of(post), path_of(post), title_of(post), copy.text)
            longest.append(entry)
    longest.sort(key=lambda copy: -copy.words)

    tuned = copy_share(evidence.index, evidence.tuned.answers)
    base = copy_share(evidence.index, evidence.base.answers) if evidence.base else None
    return Copies(tuned, base, longest[:LONGEST_COPIES])


def tell_origin(copy: Copy) -> str:
    """The line under an answer: its longest run of words, and the post that it is from."""
    source = ""
    if copy.post:
        post = copy.post
        source = f', from the {visibility_of(post)} post "{title_of(post)}" {path_of(post)}'
    return f"[longest run of words from the training data: {copy.words}{source}]"


def copy_share(index: WordIndex, answers: list[Answer]) -> CopyShare:
    copied = 0
    runs = 0
    for answer in answers:
        words = folded_words(answer.text)
        copied += len(index.copied(words))
        runs += max(0, len(words) - COPY_WORDS + 1)
    return CopyShare(copied, runs, copied / max(runs, 1))


def tell(copies: Copies, evidence: Evidence) -> Section:
    # The base model's share is what common phrases make.
    rows = []
    for whose, share in (("tuned model", copies.tuned), ("base model", copies.base)):
        if share:
            count = f"{share.copied:,} of {share.runs:,} runs"
            rows.append((whose, percent(share.share, digits=2), count))

    # Others may see the terminal, or what is pasted from it: private words are on the page alone.
    notes = []
    quotes = []
    for copy in copies.longest:
        if copy.visibility == "private":
            notes.append(f"It copied {copy.words} words in a row from a private post.")
            quotes.append(Quote(f"{copy.words} words from {copy.title}, {copy.path}", copy.text, is_private=True))
        else:
            notes.append(f'It copied {copy.words} words in a row from public "{copy.title}": {copy.text}')
    hints = ["voice_report.html shows what it copied from private posts."] if quotes else []
    details = [Details("What it copied from private posts", quotes)]

    # A single copy in a long text is not none.
    is_tiny = copies.tuned.copied and copies.tuned.share < 0.001
    share = "less than 0.1 %" if is_tiny else percent(copies.tuned.share, digits=1)
    meaning = f"of its {COPY_WORDS}-word sequences appear in your training posts"
    verdict = f"{share[0].upper()}{share[1:]} {meaning}."
    return Section(verdict, rows, notes=notes, hints=hints, details=details, summary=Summary(share, meaning, GOOD))
