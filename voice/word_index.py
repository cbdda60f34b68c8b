"""Words of a text, the author's text in a conversation, and runs of words that occur in the training data."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from extract_blog_data import WORD
from voice.loading import name_in

COPY_WORDS = 8  # words in a row that count as copied; figures made with another number do not compare
LINE = "line"  # key of a conversation: its line in its file, from 1


# ---------------------------------------------------------------------------- conversations
def author_text(conversation: dict) -> str:
    said = [turn["content"] for turn in conversation["messages"] if turn["role"] == "assistant"]
    return "\n\n".join(said)


def author_texts(conversations: list[dict]) -> list[str]:
    return [author_text(conversation) for conversation in conversations]


def posts_of(conversations: list[dict]) -> list[dict]:
    """Without the author's replies to comments."""
    return [entry for entry in conversations if entry.get("kind", "post") == "post"]


def title_of(conversation: dict) -> str:
    return name_in(conversation, "title") or "untitled"


def path_of(conversation: dict) -> str:
    return name_in(conversation, "path")


def line_of(conversation: dict) -> int | None:
    return conversation.get(LINE)


def visibility_of(conversation: dict) -> str:
    return "private" if conversation.get("visibility") == "private" else "public"


# ---------------------------------------------------------------------------- words
def folded_words(text: str) -> list[str]:
    """The words of a text without upper case, one for each of `word_spans`.

    Split before folding: some letters fold into two characters, one of which ends a word (the Turkish dotted I, some
    Greek vowels), and there would be more words than spans.
    """
    return [word.casefold() for word in WORD.findall(text)]


def word_spans(text: str) -> list[tuple[int, int]]:
    """(begin, end) of each word, in characters."""
    return [match.span() for match in WORD.finditer(text)]


def count_words(texts: Iterable[str]) -> int:
    return sum(len(WORD.findall(text)) for text in texts)


# ---------------------------------------------------------------------------- copies
class Copy(NamedTuple):
    """A run of words that occurs in the training data; `post` is its conversation if it has COPY_WORDS words."""

    words: int
    text: str
    post: dict | None


class WordIndex:
    """Finds runs of words in the author's training text."""

    def __init__(self, conversations: list[dict]):
        self.posts = conversations
        # Most text is no copy, which a set of hashes tells at once.
        self.runs = set()  # hashes of all runs of COPY_WORDS words
        texts = []
        for conversation in conversations:
            words = folded_words(author_text(conversation))
            texts.append(f" {' '.join(words)} ")
            self.runs.update(hashes_of_runs(words))
        self.text = "\n".join(texts)  # one conversation a line, so that a run ends with its post

    def copied(self, words: list[str]) -> list[int]:
        """Places in `words` where a run of COPY_WORDS words begins that occurs in the training text."""
        hashes = hashes_of_runs(words)
        return [start for start, run in enumerate(hashes) if run in self.runs]

    def longest_copy(self, text: str) -> Copy:
        """The longest run of words of `text` that occurs in the training text; the first of equally long ones."""
        words = folded_words(text)

        # Only longer runs than the longest so far matter, so `length` never shrinks: one or two searches a word.
        begin = 0  # in `words`
        length = 0
        place = -1  # in self.text
        for start in range(len(words)):
            while start + length < len(words):
                end = start + length
                longer = " ".join(words[start : end + 1])
                found = self.text.find(f" {longer} ")
                if found < 0:
                    break
                begin = start
                length += 1
                place = found

        if not length:
            return Copy(0, "", None)

        post = None
        if length >= COPY_WORDS:
            number = self.text.count("\n", 0, place)
            post = self.posts[number]

        spans = word_spans(text)
        first, _ = spans[begin]
        _, last = spans[begin + length - 1]
        return Copy(length, text[first:last], post)

    def split_at_copies(self, text: str) -> list[tuple[str, bool]]:
        """The text in pieces: (piece, whether it is a copy of COPY_WORDS words or more)."""
        spans = word_spans(text)

        # Runs that overlap or touch are one copy.
        copies = []  # (begin, end) in characters
        done = 0
        for start in self.copied(folded_words(text)):
            begin, _ = spans[start]
            _, end = spans[start + COPY_WORDS - 1]
            if copies and begin <= done:
                begin, _ = copies.pop()
            copies.append((begin, end))
            done = end

        pieces = []
        done = 0
        for begin, end in copies:
            pieces.append((text[done:begin], False))
            pieces.append((text[begin:end], True))
            done = end
        return [*pieces, (text[done:], False)]

    def without_copies(self, text: str) -> str:
        return "".join(piece for piece, is_copy in self.split_at_copies(text) if not is_copy)


def hashes_of_runs(words: list[str]) -> Iterator[int]:
    """A hash for each run of COPY_WORDS words, in order; hashes take less memory than the words."""
    last = len(words) - COPY_WORDS
    for start in range(last + 1):
        run = words[start : start + COPY_WORDS]
        yield hash(tuple(run))
