"""Turn a Jekyll blog into conversations that a language model can be trained on.

    python extract_blog_data.py
    python extract_blog_data.py --public sample/public-blog --private sample/private-blog --author wrenlow

Reads the repositories in the settings or flags. Writes data/train_data.jsonl and data/val_data.jsonl (one conversation
a line) and data/extraction_report.json, and prints a table of what became of every file below a _posts or _drafts
folder (FOLDERS names others): kept, or skipped with a reason. Comments in _data/comments belong to the post of their
name. Other pages of Markdown are counted. Not searched: folders that begin with a dot (unless `include` in _config.yml
names them), _site, vendor, node_modules, gemfiles, and everything outside the config's `source` folder.

The sections of this file. The run uses all of them; every other section uses only itself and sections above it, so
that it can be read without those below.

    the run               extract             from the repositories to the data folder; fill_post processes one file
    words                 words_of            what a word is, and other characters that several sections look for
    records               Settings, Post      also the ledger of a post's words
    streams and signals   say, print_or_exit  stderr and stdout; how a run is stopped
    files                 decode              bytes to text
    front matter          read_front_matter   text to values and body; broken YAML is repaired
    finding posts         walk_posts          where Jekyll looks for posts, and why a file is skipped
    markup                strip_markup        Liquid, code, maths, shortcodes; to add a kind: a row of NOT_PROSE
    Markdown              markdown_to_html    emphasis and line breaks stay as typed
    chats                 take_chats          who says what in pasted chats; to add a program: a row of CHAT_LINES
    lines                 clean_lines         removes bare links and importers' footers
    plain text            to_text             paragraphs and list lines; no quotes, tables or captions
    personal data         find_personal_data  to add a kind of key, a telephone format: PHONE_COUNTRIES, PERSONAL_DATA
    private words         find_blocked        what BLOCKED_WORDS lists
    redaction             clean_for_training  replaces both of these, also in file names; fingerprints
    requests              make_request        what a post answers
    replies               add_replies         what the author's comments and lines in chats answer
    other people's posts  drop_other_authors
    near-duplicates       drop_duplicates     keeps one of each group
    split                 split_posts         train and validation
    data folder           write_files         each file is either the complete old or the complete new one
    report                make_report         counts, and why files were skipped
    checked settings      check_settings      what a setting may be; the other two scripts use it too
    command line          main                to add a setting: a row of SETTINGS
"""

# ruff: noqa: E402 - settings are on top, libraries below them
from __future__ import annotations  # so that the run can come before the classes that it uses

# ---------------------------------------------------------------- settings
# Paths are relative to this script's folder.
# These three are somebody's: put your own folders and names here.
PUBLIC_BLOGS = ["../judytuna-jekyll"]
PRIVATE_BLOGS = ["../judytuna-private"]  # [] if there is none
AUTHORS = ["judytuna"]  # names you sign posts and comments with; other people's posts are left out
DATA_DIR = "data"

FOLDERS = ["_posts"]  # also "_articles" (a collection) or "content/posts": what is read, at any depth
INCLUDE_DRAFTS = False  # True also reads _drafts/
MIN_WORDS = 4  # shorter posts are skipped; short posts are voice too, so keep this small
LINE_BREAKS = "auto"  # "keep" single newlines, "join" them, or "auto": join only where a post is hard-wrapped
REDACT = True  # False leaves e-mail and IP addresses, telephone, card and bank account numbers and keys in the texts
# ["US", "IT"]: whose telephone numbers are also found without +NN, from 8 digits on; two letters (ISO 3166)
PHONE_COUNTRIES = ["US"]
BLOCKED_WORDS = []  # ["Anna", "12 Elm Street", "Acme"]: whole words, in any case, become [private], whatever REDACT is
REPLY_DEPTH = 4  # turns of a comment thread before the author's reply, 1 to about 8
VALIDATION_SHARE = 0.10  # chance of a post to be held out; 0.05 to 0.2
SIMILARITY = 0.8  # Jaccard index of word 5-grams at which two posts count as one
MAX_BYTES = 4_000_000  # larger files are not read; the longest real post is under 100,000
MAX_SECONDS = 3  # processor time for one file

# The user's side of a conversation; {} is the title, the tags, or the title and the opening.
TITLE_REQUESTS = [
    'Write a blog post titled "{}".',
    'Write a post called "{}" for your blog.',
    'Could you write a blog entry with the title "{}"?',
    'Your next blog post is titled "{}". Write it.',
    'Blog about this: "{}".',
]
TAG_REQUESTS = ["Write a blog post about {}.", "Tell me something about {}.", "What's new with {}?"]
GENERAL_REQUESTS = [
    "What's on your mind today?",
    "Tell me about your day.",
    "Write a blog post about whatever you like.",
    "What have you been up to?",
    "What's new?",
]
REPLY_CONTEXT = "I just read your blog post{}{}\n\nAnything you would like to add?"


import os
import signal

if __name__ == "__main__":
    stopped = []

    def stop(*_) -> None:
        """A signal handler while the libraries are loaded; then main takes over."""
        if stopped:  # of many signals one says so
            return
        stopped.append(True)
        try:
            os.write(2, b"Stopped before anything was read.\n")
        finally:
            os._exit(1)

    # Ignored signals (nohup) stay ignored.
    for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(each) != signal.SIG_IGN:
            signal.signal(each, stop)

import argparse
import contextlib
import email.utils
import errno
import functools
import hashlib
import html
import ipaddress
import json
import multiprocessing
import re
import reprlib
import secrets
import stat
import sys
import threading
import time
import tomllib
import unicodedata
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence, Set
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from fnmatch import translate
from itertools import accumulate, count, groupby, pairwise
from pathlib import Path
from typing import NamedTuple

import frontmatter
import ftfy
import markdown
import numpy as np
import phonenumbers
import psutil
import yaml
from bs4 import BeautifulSoup, NavigableString, Tag
from bs4.element import PreformattedString
from bs4.exceptions import ParserRejectedMarkup
from markdown.blockprocessors import BlockQuoteProcessor
from markdown.inlinepatterns import HtmlInlineProcessor

# ---------------------------------------------------------------- the run
CHUNK = 8  # files that a process is given at once; a guess


def extract(settings: Settings):
    """Reads the repositories and writes the data folder. Exits with a sentence if no post can be used."""
    # All that can be wrong with settings and folders is said before any post is read.
    sites = read_sites(settings)
    check_data_folder(settings.data_dir, sites)
    key = read_or_make_key(settings.data_dir)
    found, unread = list_posts(sites, settings)
    posts = list(watched(read_all(found, settings), "reading file", len(found)))

    # Other people's posts first; otherwise one of them could be kept in place of the author's copy.
    drop_other_authors(posts, settings)
    drop_duplicates(posts, settings.similarity)
    kept = [post for post in posts if not post.reason]
    if not kept:
        reasons = Counter(post.reason for post in posts).most_common(3)
        most = ", ".join(f"{number} {reason}" for reason, number in reasons)
        sys.exit(
            f"None of the {len(posts)} files could be used ({most}): is this the right repository, and can you read it?"
        )

    # File names are changed last: requests and split depend on the real ones.
    splits = split_posts(kept, settings.validation_share)
    hide_in_origins(posts, settings.blocked_words)
    report = make_report(posts, splits, settings, sites, key)
    report["not_read"] = count_unread(unread, settings)
    report["ledger"] = make_ledger(posts, report["not_read"])
    report["speakers"] = count_speakers(posts, settings)
    for row in report["speakers"][:MOST_NAMES]:
        said = f"{row['name']} says {row['lines']:,} lines in {row['chats']:,} chats"
        say(f"{said}: name it in AUTHORS if it is you.")

    # The report is written last and has the digests of the data, which shows files of two runs.
    files = {TRAIN_FILE: json_lines(splits["train"]), VALIDATION_FILE: json_lines(splits["validation"])}
    report["sha256"] = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    files[REPORT_FILE] = encode(json.dumps(report, ensure_ascii=False, indent=1) + "\n")
    write_files(settings.data_dir, {KEY_FILE: encode(key.hex() + "\n"), **files})
    print_report(report, settings.data_dir)


def read_all(posts: list[Post], settings: Settings) -> Iterator[Post]:
    """The posts filled in, in order; more than a few are read by one process a core."""
    read = functools.partial(read_post, settings=settings)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

    # Fewer take under a second, so that more processes would save little.
    if cores == 1 or len(posts) < 60:
        yield from map(read, posts)
        return

    with ProcessPoolExecutor(cores, initializer=start_worker) as pool:
        # All workers start here, with signals blocked until start_worker has set their handlers.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        try:
            filled = pool.map(read, posts, chunksize=CHUNK)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        yield from filled


def start_worker():
    """A worker prints nothing when the run is stopped, and ends when the run ends, however that happens."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    threading.Thread(target=end_with_run, daemon=True).start()


def end_with_run():
    multiprocessing.parent_process().join()
    os._exit(1)


def read_post(post: Post, settings: Settings) -> Post:
    """Fills in the post of a file; an error in the file becomes the reason why it is skipped."""
    signal.signal(signal.SIGVTALRM, out_of_time)
    signal.setitimer(signal.ITIMER_VIRTUAL, settings.max_seconds, 1)  # processor time: a busy machine skips nothing
    try:
        if not post.reason or post.reason in COUNTED:
            post.reason = fill_post(post, settings)
        return post
    except TimeoutError:
        post.reason = f"took over {settings.max_seconds} s to parse"
    except RecursionError:
        post.reason = "nested too deep"
    except OSError as error:
        post.reason = "unreadable"
        post.detail = type(error).__name__
    except (ParserRejectedMarkup, AssertionError, ValueError) as error:
        post.reason = "broken markup"
        post.detail = type(error).__name__
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)

    # Nothing of it is used, however far it was read.
    post.text = ""
    post.words = 0
    post.replies = []
    post.left_out = Counter({UNUSED: post.found})
    converter.cache_clear()  # an interrupted converter cannot be used again
    return post


def out_of_time(*_):
    raise TimeoutError


def fill_post(post: Post, settings: Settings) -> str:
    """Reads the file into the post; returns the reason why it cannot be used, "" if it can."""
    data = read_regular(post.file, settings.max_bytes)
    if len(data) > settings.max_bytes:
        return post.reason or "too large"
    source = decode(data, post.repairs)
    if source is None:
        return post.reason or "undecodable"
    parts = read_front_matter(source, post.repairs)
    if parts is None:
        return post.reason or "no front matter"

    # Until the text is there, all words are left out.
    own, body = parts
    meta = overlay(post.defaults, own)
    comments = read_comments(meta.get("comments"))
    comments |= comments_in_files(post, settings)
    words = count_words(body) + sum(count_words(comment.content) for comment in comments.values())
    post.found += words
    post.left_out[UNUSED] = words
    if post.reason:
        return post.reason
    if str(meta.get("published", "")).lower() in ("false", "no", "off", "n"):
        return "unpublished"

    # One day of tolerance for time zones.
    day = parse_date(meta.get("date")) or date_in(post.path)
    if day and (day - settings.today).days > 1:
        return "dated in the future"
    post.date = day.isoformat() if day else None
    post.authors = authors_of(own) or authors_of(post.defaults)

    del post.left_out[UNUSED]
    read_text(post, body, meta, settings)
    add_replies(post, comments, settings)
    post.group = split_group(post)
    post.left_out["joined or split where markup stood (the remainder)"] = (
        post.found - kept_words(post) - post.left_out.total()
    )

    # A post with only a picture may have replies, which stay.
    words = words_of(post.text)
    if len(words) < settings.min_words:
        most = [f"{kind} {number:,}" for kind, number in post.left_out.most_common(3) if number > 0]
        post.detail = f"{len(words)} words" if words else ", ".join(most)
        leave_out(post, "too short")
        if post.replies:
            return ""
        return "too short" if words else "empty after cleaning"

    post.request = make_request(post, read_tags(meta, post, settings), settings)
    post.shingles = shingle_hashes(words)
    return ""


def read_text(post: Post, body: str, meta: dict, settings: Settings):
    """Title, text and chats of a post, each without personal data and private words."""
    is_html = post.file.suffix.lower() in HTML_SUFFIXES
    title = clean_title(meta.get("title"))
    post.title = clean_for_training(title, post, settings)

    source = strip_markup(body, meta, post.left_out)
    text, chats = to_text(source, is_html, title, settings.line_breaks, post.left_out)
    post.text = clean_words(text, post.left_out, post, settings)
    post.words = count_words(post.text)
    for chat in chats:
        add_chat(post, chat, settings)


def authors_of(meta: dict) -> list[str]:
    return [name.casefold() for name in strings(meta.get("author")) + strings(meta.get("authors"))]


# ---------------------------------------------------------------- words
CJK = r"\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"  # Chinese, Japanese, Korean: no spaces between words
WORD = re.compile(rf"[{CJK}]|[^\W{CJK}]+")  # a Chinese, Japanese or Korean character counts as a word
SPACE = re.compile(r"[ \t\r\n\f]+")
URL = re.compile(r"(?:https?://|www\.)\S*|[\w-]+(?:\.[\w-]+)*\.(?:com|org|net|edu|io|me|info|blog)\b\S*", re.I)
ENDS_OF_SENTENCE = ".!?:\u2026)\"'*"
LIST_MARK = r"(?:[-*+]|\d+[.)])[ \t]"
ENTITY = re.compile(r"&(?:#\d{1,7}|#[xX][0-9a-fA-F]{1,6}|[A-Za-z]\w{1,30});")
# Characters of the private-use area mark places on the way through Markdown; they are removed from the input.
HOLE, QUOTED = "\ue000", "\ue003"  # Liquid was here, a quote in it
SOFT, BRACE = "\ue001", "\ue002"  # a newline typed in a paragraph, a raw brace
NO_MARKS = str.maketrans("", "", HOLE + QUOTED + SOFT + BRACE)
# Control characters, soft hyphens, zero-width and bidi marks, U+FFFD, and zero-width joiners outside emoji, Arabic and
# Indic words.
INVISIBLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\u200b-\u200f\u202a-\u202e\u2060-\u2069\ufeff\ufffc\ufffd\ue000-\ue003]"
    "(?:(?<![\u200c\u200d])|(?<![\u0600-\u0dff\u2190-\U0010ffff].)|(?![\u0600-\u0dff\u2190-\U0010ffff]))",
    re.DOTALL,
)


def words_of(text: str) -> list[str]:
    return WORD.findall(text.casefold())


def count_words(text: str) -> int:
    return len(WORD.findall(text))


def counted_as(kind: str, left_out: Counter, before: str, after: str) -> str:
    """The text after a change; the words that it has cost are added to left_out, as everywhere, by their kind."""
    if after != before:
        left_out[kind] += count_words(before) - count_words(after)
    return after


def encode(text: str) -> bytes:
    """In UTF-8, also where the name of a file or folder has half a character."""
    return text.encode("utf-8", "replace")


def unescape(text: str) -> str:
    return ENTITY.sub(lambda entity: html.unescape(entity[0]), text)


# ---------------------------------------------------------------- records
@dataclass(frozen=True)
class Settings:
    """The settings block with the flags applied; passed to every worker, which in a spawned process knows no flags."""

    public_blogs: tuple[Path, ...]
    private_blogs: tuple[Path, ...]
    authors: frozenset[str]
    data_dir: Path
    folders: tuple[str, ...]
    include_drafts: bool
    min_words: int
    line_breaks: str
    redact: bool
    phone_countries: tuple[str, ...]
    blocked_words: tuple[str, ...]
    reply_depth: int
    validation_share: float
    similarity: float
    max_bytes: int
    max_seconds: float
    title_requests: tuple[str, ...]
    tag_requests: tuple[str, ...]
    general_requests: tuple[str, ...]
    reply_context: str
    author_is_given: bool  # by a flag
    today: date


class Unread(NamedTuple):
    """A source of words that no setting names."""

    blog: str
    source: str  # a folder, or what it is
    remedy: str  # how to have it read
    file: Path


class Reply(NamedTuple):
    """A conversation that ends with a comment of the author's."""

    messages: list[dict]
    stand_in: bool  # nobody said the first message: it quotes the post

    @property
    def words(self) -> int:
        """Of the author's."""
        return sum(count_words(turn["content"]) for turn in self.messages[1::2])


@dataclass(slots=True)
class Post:
    """One file below a _posts or _drafts folder: its content, or the reason why it is skipped."""

    blog: str
    visibility: str  # "public" or "private"
    path: str  # in the repository
    file: Path = Path()
    reason: str = ""  # why it is skipped; "" if it is not
    defaults: dict = field(default_factory=dict)  # front matter that _config.yml gives it
    comment_files: list[Path] = field(default_factory=list)
    detail: str = ""
    title: str = ""
    date: str | None = None
    authors: list[str] = field(default_factory=list)
    group: str = ""  # posts of one group stay on one side of the split
    copies: list[str] = field(default_factory=list)  # paths of its near-duplicates
    request: str = ""
    text: str = ""
    words: int = 0  # of the text
    shingles: np.ndarray | None = None
    replies: list[Reply] = field(default_factory=list)
    cases: Counter = field(default_factory=Counter)  # what the replies answer
    speakers: list[Counter] = field(default_factory=list)  # of each chat in which no author speaks: lines by name
    repairs: Counter = field(default_factory=Counter)
    redacted: list[tuple[str, str]] = field(default_factory=list)  # (kind, normalised); written to no file
    blocked: Counter = field(default_factory=Counter)  # index in BLOCKED_WORDS: times found
    found: int = 0  # words of the body and of the comments
    left_out: Counter = field(default_factory=Counter)  # kind: how many of these words are not kept


def kept_words(post: Post) -> int:
    return post.words + sum(reply.words for reply in post.replies)


def leave_out(post: Post, kind: str):
    """Empties the text of a post; its words are counted as left out."""
    post.left_out[kind] += post.words
    post.text = ""
    post.words = 0


UNUSED = "files that are not used"  # a kind of words that are left out; the others stand where the words go


# ---------------------------------------------------------------- streams and signals
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # Ctrl-C, kill, a closed terminal
STOPPED = "Stopped before the end; the files in the data folder are complete. Run the same command again."


def say(text: str, end: str = "\n"):
    """Prints on stderr; a closed or full stderr does not stop the run."""
    if sys.stderr is None:
        return
    try:
        print(text, end=end, file=sys.stderr, flush=True)
    except OSError:
        sys.stderr = None  # or Python would try again at exit


def is_watched() -> bool:
    """Whether stderr is a terminal, where one line may replace another; only the first of several processes may."""
    is_first = os.environ.get("RANK", "0") == "0"
    return is_first and sys.stderr is not None and sys.stderr.isatty()


def say_loading():
    """In a terminal, what the first seconds pass with."""
    if is_watched():
        say("Loading libraries ...")


def watched(steps: Iterable, what: str, number: int) -> Iterator:
    """The same steps; in a terminal with how many of `number` are done and how long the others will need.

    tqdm would end the run where stderr is gone.
    """
    began = time.monotonic()
    told = began
    for done, step in enumerate(steps, start=1):
        yield step
        now = time.monotonic()
        # At most once a second: printing takes time too.
        if is_watched() and now - told >= 1:
            left = tell_time((now - began) / done * (number - done))
            say(f"{what} {done:,} of {number:,}, {left} left   ", end="\r")
            told = now
    if told > began:
        say(" " * 60, end="\r")


def tell_time(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 120 else f"{seconds:.0f} s"


def print_or_exit(text: str, remedy: str, end: str = "\n"):
    """Prints on stdout. Exits with a sentence if it is closed or full, without one if its reader is gone (head)."""
    if sys.stdout is None:
        sys.exit(f"Cannot print on stdout, which is closed: {remedy}.")
    try:
        # A folder's name need not be UTF-8, and a terminal may lack a character.
        encoding = sys.stdout.encoding or "utf-8"
        print(text.encode(encoding, "backslashreplace").decode(encoding), end=end, flush=True)
    except BrokenPipeError:
        sys.stdout = None  # or Python would try again at exit
        sys.exit(1)
    except OSError as error:
        sys.stdout = None
        sys.exit(f"Cannot print on stdout ({error.strerror}): {remedy}.")


def hold_closed_streams():
    """Opens closed ones of stdin, stdout and stderr on /dev/null, or the next file opened would get their number."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)


@contextlib.contextmanager
def on_signals(handler: Callable) -> Iterator[None]:
    """The handler gets STOP_SIGNALS while the block runs; ignored signals (nohup) stay ignored."""
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    handled = [number for number, old in before.items() if old != signal.SIG_IGN]
    for number in handled:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number in handled:
            signal.signal(number, before[number])


@contextlib.contextmanager
def signals_wait() -> Iterator[None]:
    """Delays signals until the end of the block, which takes a fraction of a second."""
    waiting = []
    with on_signals(lambda number, _: waiting.append(number)):
        yield
    for number in waiting[:1]:
        signal.raise_signal(number)


ending = []  # of this process: holds something from its last sentence on


def end_at_once(sentence: str):
    """For signal handlers: one sentence, however many signals come. An exception could be swallowed."""
    if ending:
        return
    ending.append(sentence)
    try:
        os.write(2, f"{sentence}\n".encode())
    finally:
        os._exit(1)


def stop_at_once(*_):
    """A signal handler."""
    end_at_once(STOPPED)


# ---------------------------------------------------------------- files
# UTF-8 read as cp1252 leaves these pairs; ftfy then decides whether undoing it is certain.
MOJIBAKE = re.compile("[\u00c2\u00c3\u00e2\u00f0][\u0080-\u00bf\u0152-\u0178\u02c6\u02dc\u2013-\u2122]")


def read_regular(file: Path, most: int) -> bytes:
    """A regular file, or its first `most` + 1 bytes. Raises OSError; does not wait for a FIFO or a device."""
    mode = file.stat().st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):  # opening a folder raises an error of its own
        raise OSError(errno.EINVAL, "not a regular file", str(file))
    with file.open("rb") as opened:
        return opened.read(most + 1)


def is_folder(path: Path) -> bool:
    """Raises OSError if that cannot be known for lack of permission."""
    try:
        return stat.S_ISDIR(path.stat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False


def decode(data: bytes, repairs: Counter) -> str | None:
    """The text of a file with \\n as line end and without our own marks; None if it is not text."""
    is_utf16 = data.startswith((b"\xff\xfe", b"\xfe\xff"))
    try:
        text = data.decode("utf-16" if is_utf16 else "utf-8-sig")
    except UnicodeDecodeError:
        text = data.decode("cp1252", "replace")
        if "\ufffd" in text:
            return None
        repairs["read as cp1252"] += 1

    if MOJIBAKE.search(text):
        # By line: one correct line proves nothing for others.
        fixed = "\n".join(map(ftfy.fix_encoding, text.split("\n")))
        repairs["encoding repaired"] += fixed != text
        text = fixed
    return None if "\0" in text else text.replace("\r\n", "\n").replace("\r", "\n").translate(NO_MARKS)


# ---------------------------------------------------------------- front matter
# A one-line value at the top level of the front matter.
TOP_LEVEL = re.compile(r"^(['\"]?)([\w-]+)\1[ \t]*:[ \t]+([^\s|>\[{&*!#].*)$", re.MULTILINE)
NUMERIC_DATE = re.compile(r"(\d{4})[-/.](\d{1,2})[-/.](\d{1,2})(?!\d)")
BaseLoader = getattr(yaml, "CBaseLoader", yaml.BaseLoader)  # leaves every scalar as the string that was typed
DEEPEST_YAML = 200  # open brackets, or dashes in a row; libyaml's C stack overflows at some thousands
# Jekyll's rule of where front matter begins and ends.
JEKYLL = frontmatter.YAMLHandler(re.compile(r"\A---[ \t]*\n|^(?:---|\.\.\.)[ \t]*(?:\n|\Z)", re.MULTILINE))


def parse_yaml(text: str) -> object:
    """YAML without types, tags or code. Raises YAMLError, also where nesting would overflow the C stack."""
    steps = [1 if bracket in "[{" else -1 for bracket in re.findall(r"[\[\]{}]", text)]
    depth = max(accumulate(steps), default=0)
    in_a_row = re.search(rf"(?:[-?] +){{{DEEPEST_YAML}}}", text)
    if depth > DEEPEST_YAML or in_a_row:
        raise yaml.YAMLError("nested too deep")
    return JEKYLL.load(text, Loader=BaseLoader)


def read_front_matter(text: str, repairs: Counter) -> tuple[dict, str] | None:
    """(front matter, body), or None if the file has no front matter; broken YAML is repaired as far as possible."""
    parts = JEKYLL.FM_BOUNDARY.split(text, 2)
    if not JEKYLL.detect(text) or len(parts) < 3:
        return None
    _, block, body = parts

    # As it is first; each further attempt changes more.
    for attempt in repair_yaml(block):
        try:
            loaded = parse_yaml(attempt)
        except (yaml.YAMLError, RecursionError):
            continue
        if attempt is not block:
            repairs["front matter repaired"] += 1
        return (loaded if isinstance(loaded, dict) else {}), body
    return {}, body


def repair_yaml(block: str) -> Iterator[str]:
    """Front matter as it is; with tabs as spaces and one-line values quoted; only the one-line values."""
    yield block

    quoted = TOP_LEVEL.sub(quote_value, block.replace("\t", "  "))
    yield quoted

    # From the end, so that the first of two lines with one name stays; YAML would reject both.
    lines = {line[2]: line[0] for line in reversed([*TOP_LEVEL.finditer(quoted)])}
    yield "\n".join(lines.values())


def quote_value(line: re.Match) -> str:
    """A line of TOP_LEVEL with its value as a JSON string, which is also YAML."""
    value = line[3].strip()
    if value[0] in "'\"":
        value = re.sub(r"\\(['\"])", r"\1", value.strip(value[0]))
    return f"{line[2]}: {json.dumps(value, ensure_ascii=False)}"


def parse_date(text: object) -> date | None:
    """The day of a date as bloggers write it: "2006-08-25 22:17", "September 8, 2014", "Mon, 08 Sep 2014"."""
    text = text.strip() if isinstance(text, str) else ""
    try:
        if numeric := NUMERIC_DATE.match(text):
            return date(*map(int, numeric.groups()))
        day = email.utils.parsedate(f"{text} 00:00:00")
        return date(*day[:3]) if day else None
    except (ValueError, OverflowError):
        return None


def date_in(path: str) -> date | None:
    """The day in the name of a file, or in folders like 2006/08/25."""
    parts = path.split("/")
    ends = ("/".join(parts[start:]) for start in reversed(range(len(parts))))
    return next(filter(None, map(parse_date, ends)), None)


def strings(value: object) -> list[str]:
    """A string, a mapping with a name, or a list of these, as at most 100 plain strings."""
    values = value[:100] if isinstance(value, list) else [value]
    names = [item.get("name") if isinstance(item, dict) else item for item in values]
    return [name.strip() for name in names if isinstance(name, str) and name.strip()]


def first_of(item: dict, *names: str) -> str:
    """The first of these values that is not empty."""
    return next((text for name in names for text in strings(item.get(name))), "")


def mappings_in(value: object) -> list[dict]:
    """The mappings of a list; none of anything else."""
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


# ---------------------------------------------------------------- finding posts
MARKDOWN_SUFFIXES = {".md", ".markdown", ".mkd", ".mkdn", ".mkdown"}
HTML_SUFFIXES = {".html", ".htm", ".xhtml"}
CONFIG_NAMES = ("_config.yml", "_config.yaml", "_config.toml")  # Jekyll reads the first that exists
# Names of files and folders that Jekyll ignores unless they are included.
IGNORED = re.compile(r"[._#].*|.*~")
# Made by tools: large, and full of other people's posts.
NEVER_ENTERED = {"_site", "vendor", "node_modules", "gemfiles"}
DATED_NAME = re.compile(r"^\d{2,4}-\d{1,2}-\d{1,2}-(?=.)")
COMMENT_SUFFIXES = {".yml", ".yaml", ".json"}
TEMPLATES = {"_includes", "_layouts", "_data", "_sass", "_plugins"}  # Markdown in these is no page
OUTSIDE = "outside of FOLDERS"
# Reasons to skip a file whose words are counted all the same.
COUNTED = {"draft", "unsupported format", "hidden from Jekyll", "undated file name", "excluded in _config.yml"}
MOST_LOOKED_AT = 100_000  # characters of a page that is not read, to count its words
REMEDY = "name yours with --public or --private or in the settings, or see the whole job without one: `make demo`"


class Defaults(NamedTuple):
    """An entry of `defaults:` in _config.yml: front matter for the files of a path and a type."""

    path: str
    kind: str  # "posts", "drafts", "pages" or the name of a collection; "" for every file
    values: dict


@dataclass(frozen=True)
class Site:
    """A repository as Jekyll reads it."""

    repository: Path
    visibility: str
    root: Path  # where Jekyll looks: the repository, or the source folder of its _config.yml
    folders: tuple[tuple[str, ...], ...]  # the parts of each folder of posts
    excluded: re.Pattern  # of paths in root
    included: set[str]  # names that are not ignored
    config: Path
    problem: str = ""  # what is wrong with the config, and the consequence
    defaults: Sequence[Defaults] = ()
    collections_dir: str = ""


def read_sites(settings: Settings) -> list[Site]:
    """The repositories of the flags or settings. Exits if one is missing; reports problems of a _config.yml."""
    named = [(path, "public") for path in settings.public_blogs]
    named += [(path, "private") for path in settings.private_blogs]
    if not named:
        sys.exit(f"No repository is named: {REMEDY}.")

    # All are checked before one is read: a mistyped second name must not cost the reading of the first.
    for path, _ in named:
        if not is_folder(path):
            sys.exit(f"There is no Jekyll repository at {path}: {REMEDY}.")

    sites = [read_site(path.resolve(), visibility, settings) for path, visibility in named]
    for site in sites:
        if site.problem:
            say(f"{site.config} {site.problem}; correct it and run again.")
    return sites


def read_site(repository: Path, visibility: str, settings: Settings) -> Site:
    # A broken config is a problem to report, not a reason to stop.
    paths = [repository / name for name in CONFIG_NAMES]
    file = next(filter(os.path.lexists, paths), paths[0])
    config, problem = read_config(file, settings.max_bytes)
    if problem:
        problem = f"cannot be read ({problem}): its exclude, include, source and defaults are not applied"

    # A source folder outside the repository would be read although nobody named it.
    name = first_of(config, "source")
    root = repository / name
    if not os.path.isdir(root) or not is_within(root, repository):  # noqa: PTH112, since Path.is_dir may raise
        root = repository
        problem = f'names a source, "{name}", that is no folder of the repository: all of the repository is read'

    excluded = excluded_paths(strings(config.get("exclude")))
    collections_dir = first_of(config, "collections_dir").strip("/")
    folders = tuple(tuple(name.split("/")) for name in (*settings.folders, "_drafts"))
    included = {*sum(folders, ()), *strings(config.get("include")), collections_dir}
    defaults = read_defaults(config.get("defaults"))
    return Site(repository, visibility, root, folders, excluded, included, file, problem, defaults, collections_dir)


def excluded_paths(names: list[str]) -> re.Pattern:
    """A pattern for what "old", "old/" or "*.bak" means to Jekyll: that path itself, and everything below it."""
    plain = [name.strip("/") for name in names if name.strip("/")]
    patterns = [f"{translate(name)}|{re.escape(name)}/" for name in plain]
    return re.compile("|".join(patterns) or "(?!)")


def read_config(file: Path, max_bytes: int) -> tuple[dict, str]:
    """(the config, why it cannot be read); a repository without a config is no problem."""
    if not os.path.lexists(file):
        return {}, ""

    parse = tomllib.loads if file.suffix == ".toml" else parse_yaml
    try:
        data = read_regular(file, max_bytes)
        if len(data) > max_bytes:
            return {}, f"larger than {max_bytes:,} bytes"
        loaded = parse(data.decode("utf-8-sig"))
    except OSError as error:
        return {}, error.strerror or type(error).__name__
    except (RecursionError, MemoryError):
        return {}, "nested too deep"
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        return {}, f"line {mark.line + 1}: {error.problem}" if mark else str(error).split("\n")[0]
    except ValueError as error:  # not UTF-8, a mistake in TOML, or a number of 5,000 digits
        return {}, str(error).split(";")[0]

    # A file of comments alone is empty, which is no problem; a list or a sentence is no configuration.
    if loaded in (None, ""):
        return {}, ""
    return (loaded, "") if isinstance(loaded, dict) else ({}, "it holds no settings")


def read_defaults(entries: object) -> list[Defaults]:
    """The valid entries; what a later one says covers what an earlier one says, and a longer path comes later."""
    found = []
    for entry in mappings_in(entries):
        values = entry.get("values")
        scope = entry.get("scope", {})

        # Jekyll passes over an entry without values, or with another scope.
        if isinstance(values, dict) and isinstance(scope, dict):
            path = first_of(scope, "path").removeprefix("/")
            kind = first_of(scope, "type").removesuffix("s")

            # A config in TOML has dates and truth values; the rest of this script expects strings.
            plain = {name: value if isinstance(value, list | dict) else str(value) for name, value in values.items()}
            found.append(Defaults(path, kind, plain))
    return sorted(found, key=lambda entry: (len(entry.path), bool(entry.kind)))


def defaults_of(inside: Path, kind: str, site: Site) -> dict:
    """The front matter that _config.yml gives to a file."""
    above = f"{site.collections_dir}/" if site.collections_dir else ""
    path = inside.as_posix().removeprefix(above)
    values = {}
    for entry in site.defaults:
        scope = entry.path.removeprefix(above)
        is_within = glob_pattern(scope).match(path) if "*" in scope else path.startswith(scope)
        if is_within and entry.kind in ("", kind.removesuffix("s")):  # Jekyll also takes "post" for "posts"
            values = overlay(values, entry.values)
    return values


@functools.cache
def glob_pattern(glob: str) -> re.Pattern:
    """What Ruby's *, ** and ? match, and everything below it."""
    escaped = re.escape(glob.rstrip("/")).replace(r"\*\*/", "(?:[^/]+/)*")
    escaped = escaped.replace(r"\*", "[^/]*").replace(r"\?", "[^/]")
    return re.compile(f"{escaped}(?:/|$)")


def overlay(below: dict, above: dict) -> dict:
    """Both as Jekyll merges them: an empty value covers nothing, and mappings are merged."""
    values = dict(below)
    for name, value in above.items():
        old = below.get(name)
        if isinstance(old, dict) and isinstance(value, dict):
            values[name] = old | value
        elif name not in below or value not in ("", "~", "null"):
            values[name] = value
    return values


def list_posts(sites: list[Site], settings: Settings) -> tuple[list[Post], list[Unread]]:
    """Every file that might be a post, not read yet, and what else looks like writing. Exits if there is no post."""
    posts = []
    unread = []
    for site in sites:
        blog = site.repository.name
        here = []
        for file, reason in walk_posts(site, settings.include_drafts):
            inside = file.relative_to(site.root)
            if reason == OUTSIDE:
                unread.append(Unread(blog, *source_of(inside, site), file))
                continue
            path = encode(file.relative_to(site.repository).as_posix()).decode()
            defaults = defaults_of(inside, kind_of(inside, site), site)
            here.append(Post(blog, site.visibility, path, file, reason, defaults))

        lost = attach_comments(here, site)
        unread += [Unread(blog, "comments in _data", "no post has the name of their folder", file) for file in lost]
        posts += here

    # Where the writing is elsewhere, the setting that reads most of it is the remedy.
    if not posts:
        where = ", ".join(str(site.repository) for site in sites)
        remedy = REMEDY
        for setting, number in Counter(one.remedy for one in unread).most_common(1):
            remedy = f"{number} files are elsewhere: {setting}"
        sys.exit(f"No post found in {where}, that is, no file like _posts/2006-08-25-title.md: {remedy}.")
    return sorted(posts, key=lambda post: (post.visibility != "public", post.blog, post.path)), unread


def source_of(inside: Path, site: Site) -> tuple[str, str]:
    """(the folder of a file that is not read, the setting that reads it)."""
    above = inside.parts[:-1]
    if not above:
        return "pages in the top folder", "add their names to FOLDERS"
    depth = 2 if above[0] == site.collections_dir else 1
    folder = encode("/".join(above[:depth])).decode()
    return f"Markdown in {folder}", f'add "{folder}" to FOLDERS'


def slug_of(path: Path) -> str:
    """The name of a post; "index.md" has that of its folder."""
    return path.parent.name if path.stem == "index" else path.stem


def plain_name(name: str) -> str:
    return re.sub(r"[\W_]+", "-", name.casefold()).strip("-")


def attach_comments(posts: list[Post], site: Site) -> list[Path]:
    """Gives the posts of a site the files of their comments; returns those of no post."""
    # A full name with its date wins over a slug that several posts may have.
    usable = [post for post in reversed(posts) if not post.reason]
    named = {plain_name(DATED_NAME.sub("", slug_of(post.file))): post for post in usable}
    named |= {plain_name(slug_of(post.file)): post for post in usable}

    # _data/comments/SLUG/ANY.yml, _data/comments/YEAR/MONTH/DAY/SLUG/ANY.yml, _data/comments/SLUG.yml
    lost = []
    folder = site.root / "_data/comments"
    for parent, folders, files in os.walk(folder):
        folders.sort()
        for file in (Path(parent, name) for name in sorted(files)):
            if file.suffix.lower() not in COMMENT_SUFFIXES or not is_within(file, site.repository):
                continue

            # The longest name comes first.
            above = file.relative_to(folder).parts[:-1]
            names = ["-".join(above), *reversed(above), file.stem]
            known = [named[name] for name in map(plain_name, names) if name in named]
            if known:
                known[0].comment_files.append(file)
            else:
                lost.append(file)
    return lost


def is_within(path: Path, repository: Path) -> bool:
    return Path(os.path.realpath(path)).is_relative_to(repository)


def folder_end(inside: Path, site: Site) -> int:
    """How many parts of a path lead to the end of its folder of posts; 0 if it is in none."""
    for end in range(1, len(inside.parts) + 1):
        if any(inside.parts[:end][-len(folder) :] == folder for folder in site.folders):
            return end
    return 0


def kind_of(inside: Path, site: Site) -> str:
    """What Jekyll calls the type of a file: "posts", "drafts", the name of a collection, or "pages"."""
    end = folder_end(inside, site)
    folder = inside.parts[end - 1] if end else ""
    return folder.removeprefix("_") if folder.startswith("_") else "pages"


def walk_posts(site: Site, drafts: bool) -> Iterator[tuple[Path, str]]:
    """Every file below a folder of posts or drafts, and why it is skipped ("" if it is not).

    What looks like a post in a folder that Jekyll leaves out is counted, with the folder's reason. Only folders made by
    tools and those that begin with a dot are not entered, since they can be huge."""
    left_out = {}  # folder: reason
    unreadable = []
    for parent, folders, files in os.walk(site.root, onerror=unreadable.append):
        here = Path(parent)
        inside = here.relative_to(site.root)
        is_below_posts = folder_end(inside, site) > 0

        # os.walk does not follow a link to a folder, so the link is judged like a file. Path.is_symlink would raise
        # in a folder where names may be listed but nothing else.
        found = files + [name for name in folders if os.path.islink(here / name)]  # noqa: PTH114
        if not is_below_posts:
            hidden = {name for name in folders if name.startswith(".")} - site.included
            folders[:] = [name for name in folders if name not in NEVER_ENTERED | hidden]
            found = [name for name in found if folder_end(inside / name, site) or name in folders]

        # A folder that is left out is left out with everything below it, whatever the config says of that.
        reason = left_out.get(here, "")
        for name in folders:
            is_judged = not reason and not is_below_posts
            left_out[here / name] = why_folder_is_left_out(inside / name, site) if is_judged else reason

        for name in found:
            path = here / name
            yield path, reason or why_skipped(path, site, drafts)

        # A collection is hidden from Jekyll only as a folder of pages.
        is_of_pages = reason in ("", "hidden from Jekyll") and TEMPLATES.isdisjoint(inside.parts[:1])
        if is_of_pages and not is_below_posts:
            for name in files:
                if name not in found and Path(name).suffix.lower() in MARKDOWN_SUFFIXES:
                    yield here / name, OUTSIDE

    # An unknown number of posts may be in there.
    for error in unreadable:
        yield Path(error.filename), "unreadable folder"


def why_folder_is_left_out(inside: Path, site: Site) -> str:
    if site.excluded.match(inside.as_posix()):
        return "excluded in _config.yml"
    if inside.name not in site.included and IGNORED.fullmatch(inside.name):
        return "hidden from Jekyll"
    return ""


def why_skipped(path: Path, site: Site, drafts: bool) -> str:
    """Why a file below a folder of posts or drafts is no post; the first reason that applies."""
    inside = path.relative_to(site.root)
    kind = kind_of(inside, site)
    below = inside.parts[folder_end(inside, site) :]

    # The link comes first: nothing else may be read of a file outside the repository.
    if not is_within(path, site.repository):
        return "link that leads out of the repository"
    if site.excluded.match(inside.as_posix()):
        return "excluded in _config.yml"
    if problem := why_no_file(path):
        return problem
    if kind == "drafts" and not drafts:
        return "draft"
    if path.suffix.lower() not in MARKDOWN_SUFFIXES | HTML_SUFFIXES:
        return "unsupported format"
    if any(map(IGNORED.fullmatch, below)):
        return "hidden from Jekyll"
    if kind == "posts" and not DATED_NAME.match(path.name):
        return "undated file name"
    return ""


def why_no_file(path: Path) -> str:
    try:
        mode = path.stat().st_mode
    except PermissionError:
        return "unreadable"
    except OSError:  # a link to nothing, or to itself
        mode = 0

    # Only links to folders get here, folders do not.
    if stat.S_ISDIR(mode):
        return "link to a folder"
    return "" if stat.S_ISREG(mode) else "not a regular file"


# ---------------------------------------------------------------- markup
# To add a Liquid tag that contains quotes or code ({% name %} ... {% endname %}): write its name here. Of any other
# tag only the tag itself is removed, and the text up to its end tag stays.
# The value is the kind of words in the report.
LIQUID = "Liquid and shortcodes"
PUT_IN = "put in from the front matter"  # a negative number
DROPPED_TAGS = {
    **dict.fromkeys(("blockquote", "quote", "epigraph", "tweet"), "quotes"),  # somebody else's words
    **dict.fromkeys(("highlight", "codeblock", "code", "mermaid", "plantuml", "graphviz", "chart"), "code"),
    **dict.fromkeys(("math", "katex", "latex", "style", "stylesheet", "javascript", "script"), "code"),
    **dict.fromkeys(("schema", "comment", "doc", "button"), LIQUID),
    **dict.fromkeys(("for", "tablerow", "capture"), LIQUID),  # template code, not text
    **dict.fromkeys(("gallery", "figure", "caption"), "captions"),
    "table": "tables",
}
LIQUID_WORDS = {"content", "site", "page", "layout", "post", "paginator", "theme", "jekyll", "include", "forloop"}
PROSE_FIELDS = {"title", "description", "subtitle", "excerpt", "summary", "tagline"}
ASSIGNED = re.compile(r"\{%-?\s*(?:assign|capture)\s+([\w-]+)")
SHOWN = re.compile(r"(?:\{\{-?|=)\s*([\w-]+)")  # a variable that is output, or passed to an include
# Tags whose arguments may be the author's sentences, unless the name of the file or of the argument says otherwise.
TEXT_TAGS = {"include", "include_cached", "include_relative", "render", "sidenote", "marginnote", "newthought"}
ARGUMENT = re.compile(r"""(?:(?P<key>[\w-]+)\s*=\s*)?(?P<mark>["'])(?P<value>(?:\\.|(?!(?P=mark)).)*)(?P=mark)""", re.S)
NOT_OWN_INCLUDE = re.compile(
    r"(?i)quote|cit(?:e|ation)|figure|ima?ge?|picture|photo|gallery|video|youtube|vimeo|tweet|toot|embed|audio|code|button|"
    r"card|caption|map|chart|meta|seo|testimonial"
)
NOT_OWN_ARGUMENT = re.compile(r"(?i).*(?:alt|caption|title|quote|description|code|class|style|link|ur[li])")
NAMES_ANOTHER = re.compile(r"(?i)\b(?:author|by|cite|source|credit|attribution)\s*=")  # an include about their work
BRACED = re.compile(r"\{(?=[{%])")
ANY_LIQUID = re.compile(r"\{%.*?%\}|\{\{.*?\}\}", re.DOTALL)
RAW_BLOCK = re.compile(r"\{%-?\s*raw\s*-?%\}(.*?)\{%-?\s*endraw\s*-?%\}", re.DOTALL)
FUNCTION_WORD = re.compile(  # English, and some French, Spanish and German
    r"\b(?i:a|an|and|at|but|by|de|des|die|du|el|en|es|for|he|her|i|in|is|it|je|la|le|les|like|me|my|no|not|of|on|or|que|she"
    r"|so|that|the|they|this|to|un|und|une|was|we|were|what|with|you|your|\w+'\w+)\b"
)
CODE_SIGN = re.compile(r"[{};<>=$\\|@#_]|\w\(|//|::|->|^\s*(?:\.|-\w|sudo |\w+: )|\w[./]\w")
# Guesses. Of 58 blocks of nine public blogs and the sample (judgements.py, see benchmarks/README.md) they find 55 to be
# code, and 20 % more or less changes one.
MOST_CODE_LINES = 0.2  # of the lines of verse or prose
LEAST_WORDS = 4  # of a sentence in an argument or a capture; a guess
LEAST_FUNCTION_WORDS = 0.15  # of the words of verse or prose; a word with an accent counts, too

# Labels of boxes that themes make of block quotes for the author's own hints.
BOX = re.compile(
    r"(?is)^(?!.*quote).*?(?<![a-z])(?:notices?|tips?|notes?|warn(?:ing)?s?|info|alerts?|callout|important|caution|danger|hints?|success|"
    r"message|aside|admonition|prompt|disclaimer|box|panel|tldr)(?![a-z])"
)
BOX_OF_GITHUB = re.compile(r"[ \t]*>[ \t]*\[!(?!quote|cite)[a-z]+\][+-]?", re.IGNORECASE)  # and Obsidian's
ATTRIBUTE_LINE = r"[ \t]*\{:[^}\n]*\}[ \t]*"
BLOCK_QUOTE = re.compile(
    rf"^(?P<above>{ATTRIBUTE_LINE}\n)?(?P<quoted>[ \t]*>[^\n]*(?:\n(?!{ATTRIBUTE_LINE}$|[ \t]*$)[^\n]+)*+)"
    rf"(?P<below>\n{ATTRIBUTE_LINE}$)?",
    re.MULTILINE,
)


class Page(NamedTuple):
    """The variables of Liquid in a post."""

    meta: dict  # front matter
    assigned: set[str]  # names of variables that the post sets
    shown: set[str]  # names of variables that it outputs


class Markup(NamedTuple):
    """A kind of markup that is no prose."""

    kind: str  # also the name of its group in SCANNER
    pattern: str
    becomes: str | Callable[[re.Match, Page], tuple[str, int]]  # a text, or (text, where reading continues)
    example: str
    result: str  # what strip_markup makes of the example
    words: str = "markup"  # what the report calls the words that go


def strip_markup(text: str, meta: dict, left_out: Counter) -> str:
    """The source without template code, code blocks, display maths and kramdown attributes, ready for Markdown."""
    separator = meta.get("excerpt_separator")
    if isinstance(separator, str) and separator.strip():
        line = rf"^[ \t]*{re.escape(separator.strip())}[ \t]*$"
        text = counted_as("markup", left_out, text, re.sub(line, "", text, flags=re.MULTILINE))
    text = counted_as(LIQUID, left_out, text, RAW_BLOCK.sub(lambda raw: BRACED.sub(BRACE, raw[1]), text))
    text = counted_as("markup", left_out, text, BLOCK_QUOTE.sub(open_box, text))

    page = Page(meta, set(ASSIGNED.findall(text)), set(SHOWN.findall(text)))
    out = []
    position = 0
    while found := SCANNER.search(text, position):
        start = found.start()
        out.append(text[position:start])
        rule = RULES[found.lastgroup]
        if isinstance(rule.becomes, str):
            kept = rule.becomes
            position = found.end()
        else:
            kept, position = rule.becomes(found, page)
        out.append(kept)

        # Most matches are inline code, which stays.
        typed = text[start:position]
        if kept != typed:
            gone = count_words(typed) - count_words(kept)
            words = DROPPED_TAGS.get(found["name"], LIQUID) if found["name"] else rule.words
            left_out[words if gone >= 0 else PUT_IN] += gone
    whole = "".join(out) + text[position:]

    # A line with nothing but Liquid is dropped; otherwise it would end or begin a paragraph.
    whole = re.sub(f"^[ \t{HOLE}]+$", "", whole, flags=re.MULTILINE)
    return whole.replace(BRACE, "{")


def open_box(found: re.Match) -> str:
    """A block quote that is a box for the author's own words, as paragraphs; any other as it is."""
    labels = (found["above"] or "") + (found["below"] or "")
    own = found["quoted"]
    if box := BOX_OF_GITHUB.match(own):
        own = own[box.end() :]
    elif not BOX.search(labels):
        return found[0]
    return "\n" + re.sub(r"^([ \t]*)> ?", r"\1", own, flags=re.MULTILINE) + "\n"


def fenced_code(found: re.Match, page: Page) -> tuple[str, int]:
    """A code block is removed. Prose between ornaments (~~~) stays, and so does text after an unclosed fence."""
    lead = found["lead"]
    block = found["closed"]
    is_ornament = found["fence"][0] == "~" and not found["info"]
    if block is None or (is_ornament and looks_like_prose(block)):
        return lead, found.end("info")
    return lead + "\n", found.end()


def inline_code(found: re.Match, page: Page) -> tuple[str, int]:
    """Inline code stays, unless it is a block with its fences on the same lines."""
    is_block = len(found["ticks"]) > 2 and "\n" in found[0]
    return "" if is_block else found[0], found.end()


def mended_definition(found: re.Match, page: Page) -> tuple[str, int]:
    target = found["target"].replace(" ", "%20")
    return f"{found['label']} <{target}>", found.end()


def liquid_tag(found: re.Match, page: Page) -> tuple[str, int]:
    """A hole; reading continues after the tag's whole block if that is dropped or is not the first branch."""
    text = found.string
    end = found.end()
    name = found["name"]
    if name in TEXT_TAGS:
        return HOLE + "\n\n".join(own_arguments(found[0])), end
    if name == "capture" and is_shown(found, page):
        return HOLE, end

    if name in ("else", "elsif", "when"):
        name = "(?:if|unless|case)"
    elif name not in DROPPED_TAGS:
        return HOLE, end

    # The content of these is not read as Liquid: a second opening tag in it is text.
    nests = name not in ("highlight", "comment", "codeblock")
    depth = 1
    for tag in re.compile(rf"\{{%-?\s*(end)?{name}(?![\w-])[^%]*%\}}").finditer(text, end):
        if tag[1]:
            depth -= 1
        elif nests:
            depth += 1
        if depth == 0:
            stands_alone = DROPPED_TAGS.get(name) == "quotes" and text[: found.start()].endswith("\n\n")
            return f"{QUOTED}\n\n" if stands_alone else HOLE, tag.end()
    return HOLE, end


def own_arguments(tag: str) -> list[str]:
    """The sentences among the arguments of an include, unless it is made for pictures, others' works or the like."""
    called = re.split("[\"'=]", tag, maxsplit=1)[0]
    if NOT_OWN_INCLUDE.search(called) or NAMES_ANOTHER.search(tag):
        return []

    own = []
    for argument in ARGUMENT.finditer(tag):
        is_own = not NOT_OWN_ARGUMENT.fullmatch(argument["key"] or "")
        if is_own and is_sentence(argument["value"]):
            own.append(re.sub(r"\\(.)", r"\1", argument["value"]))
    return own


def is_shown(found: re.Match, page: Page) -> bool:
    """Whether a {% capture %} holds sentences that the post outputs."""
    name = ASSIGNED.match(found[0])
    if not name or name[1] not in page.shown:
        return False
    behind = found.string[found.end() :]
    content, closed, _ = behind.partition("endcapture")
    return bool(closed) and is_sentence(ANY_LIQUID.sub("", content))


def is_sentence(text: str) -> bool:
    parts = re.findall(rf"[{CJK}]|[^\s{CJK}]+", text)
    reads_like_one = text.rstrip().endswith((".", "!", "?")) or has_function_words(text)
    return len(parts) >= LEAST_WORDS and reads_like_one


def liquid_output(found: re.Match, page: Page) -> tuple[str, int]:
    """`{{ page.title }}` is the front matter's value, `{{word}}` the author's word; anything else is a hole."""
    expression, _, filters = found["expression"].partition("|")
    expression = expression.strip(" -\n")
    filters = filters.strip(" -\n")

    # A field of the page may be the author's words, unless it is made into a link. A word in braces is either a
    # variable of the template or, from an author who knows no Liquid, a word.
    kept = HOLE
    field_name = expression.removeprefix("page.")
    if field_name != expression and field_name in PROSE_FIELDS and "url" not in filters:
        value = page.meta.get(field_name)
        kept = value if isinstance(value, str) else HOLE
    elif expression.isalpha() and not filters and expression.lower() not in LIQUID_WORDS | page.assigned:
        kept = expression
    return kept, found.end()


def looks_like_prose(text: str) -> bool:
    """Whether an indented block is verse or prose rather than code, by its symbols and function words."""
    lines = [line for line in text.split("\n") if line.strip()]
    code_lines = len(list(filter(CODE_SIGN.search, lines)))
    has_letters = re.search(r"[^\W\d_]", text) is not None
    return has_letters and code_lines <= MOST_CODE_LINES * len(lines) and has_function_words(text)


def has_function_words(text: str) -> bool:
    # Accents tell languages that FUNCTION_WORD does not know from code.
    words = re.findall(r"[^\W\d_]+", text)
    accented = sum(not word.isascii() for word in words)
    function_words = len(FUNCTION_WORD.findall(text))
    return function_words + accented >= LEAST_FUNCTION_WORDS * len(words)


IAL_ITEM = r"""(?:(?:[.#][\w-]+)+|[\w:-]+=(?:"[^"\n]*"|'[^'\n]*'|[^\s"'}]+)|[A-Za-z][\w-]*:?)"""
SHORTCODE = "caption|gallery|youtube|vimeo|audio|video|embed|playlist|code|sourcecode|googlemaps|contact-form"
SAME_PARAGRAPH = r"(?:(?!\n[ \t]*\n).)"

# To add a rule: write a row with an example; the tests strip every example. At one position in the text the first row
# that matches wins, so a special case comes before the general one. A group in a pattern needs a name that no other
# row has, and the character with which new markup begins must be among those of BEGINS.
NOT_PROSE = [
    Markup(
        "fenced",
        rf"^(?P<lead>[ \t]*(?:{LIST_MARK}[ \t]*)?)"
        r"(?P<fence>`{3,}(?=[^`\n]*$)|~{3,}(?=[ \t]*[\w+#.-]*[ \t]*$))(?P<info>[^\n]*)$"
        r"(?P<closed>.*?^[ \t]*(?P=fence)[`~]*[ \t]*$)?",
        fenced_code,
        "- one\n\n    ```sh\n    ls -l | wc\n    ```",
        "- one\n\n\n",
        words="code",
    ),
    Markup(
        "code",
        rf"(?<!`)(?P<ticks>`+)(?!`){SAME_PARAGRAPH}{{1,2000}}?(?<!`)(?P=ticks)(?!`)",
        inline_code,
        "`{: .code }` and <div>```js\nx = 1;```</div>",
        "`{: .code }` and <div></div>",
        words="code",
    ),
    Markup("more", r"<!--\s*(?:more|excerpt|break).*?-->", "\n\n", "Hello.<!--more-->Bye.", "Hello.\n\nBye."),
    Markup("remark", r"<!--.*?-->", "", "Hello.<!-- {{ x }} -->", "Hello.", words="comments in the source"),
    Markup(
        "title",
        r"^[# \t]*\{\{-?\s*page\.title\b[^}\n]*\}\}[ \t]*$",
        "",
        "# {{ page.title }}\n\nHello.",
        "\n\nHello.",
        words=LIQUID,
    ),
    Markup("tag", r"\{%-?\s*(?P<name>#|[\w-]+).*?%\}", liquid_tag, "{% quote Ann %}hers{% endquote %} I", f"{HOLE} I"),
    Markup(
        "output",
        r"\{\{(?P<expression>.*?)\}\}",
        liquid_output,
        "{{ page.title }} {{avec}} {{ page.x }}.",
        f"My cat avec {HOLE}.",
        words=LIQUID,
    ),
    Markup(
        "kramdown_option",
        r"\{::comment\}.*?\{:/(?:comment)?\}|\{::[^}\n]*\}|\{:/\w*\}",
        "",
        "{::comment}no{:/comment}Hello. {::nomarkdown}Bye.{:/}",
        "Hello. Bye.",
    ),
    Markup("heading_id", r"[ \t]*\{#[\w:.-]+\}[ \t]*$", "", "## Head {#head-1}", "## Head"),
    Markup(
        "contents",
        rf"^[ \t]*{LIST_MARK}[^\n]*\n[ \t]*\{{:\s*toc\s*\}}",
        "",
        "1. Contents\n{:toc}\nHello.",
        "\nHello.",
        words="menus",
    ),
    Markup("contents_mark", r"^[ \t]*\[TOC\][ \t]*$", "", "[TOC]\n\nHello.", "\n\nHello."),
    Markup(
        "definition",
        r"^(?P<label> {0,3}\[[^\]\n^][^\]\n]*\]:)[ \t]+"
        r"""(?P<target>(?:https?://|mailto:|/)[^\s<>]*(?: +[^\s<>"'(]+)+)[ \t]*$""",
        mended_definition,
        "[x]: http://example.org/my cat.png",
        "[x]: <http://example.org/my%20cat.png>",
    ),
    Markup(
        "button",
        r"\[[^\[\]\n]*\]\([^()\n]*\)\s*\{:[^}\n]*\.(?:btn|button)\b[^}\n]*\}",
        "",
        "Hello. [Press me](/x){: .btn }",
        "Hello. ",
        words="menus",
    ),
    Markup(
        "attributes", rf"\{{:\s*{IAL_ITEM}(?:\s+{IAL_ITEM})*\s*\}}", "", 'Hello.\n{: .x #y key="v" z=b }', "Hello.\n"
    ),
    Markup(
        "display_maths",
        rf"^[ \t]*\$\$(?!\$){SAME_PARAGRAPH}+?\$\$[ \t]*$",
        "",
        "Hello.\n$$\nx = 1\n$$",
        "Hello.\n",
        words="code",
    ),
    Markup(
        "latex",
        r"^[ \t]*\\begin\{(?P<environment>[\w*]+)\}.*?\\end\{(?P=environment)\}",
        "",
        "Hello.\n\\begin{align*}\nx = 1\n\\end{align*}",
        "Hello.\n",
        words="code",
    ),
    Markup(
        "shortcode",
        rf"\[(?P<short>{SHORTCODE})\b[^\]\n]*\](?![(\[:]).*?\[/(?P=short)\]",
        "",
        "[caption id='a']<img src='x'> A caption[/caption] Mine.",
        " Mine.",
        words="captions",
    ),
    Markup(
        "shortcode_alone",
        rf"\[(?:gallery\b|(?:{SHORTCODE})\b[^\]\n]*=)[^\]\n]*\](?![(\[:])",
        "",
        '[gallery] Mine. [youtube id="x"]',
        " Mine. ",
        words=LIQUID,
    ),
    Markup(
        "footnote_mark",
        r"(?<!^)\[\^[\w.-]+\]|^\[\^[\w.-]+\](?!:)",
        "",
        "Mine.[^1]\n\n[^1]: A note.",
        "Mine.\n\n[^1]: A note.",
    ),
]
# Only rows that ask for the start of a line begin with another character. Without this test every row would be tried at
# every letter, which takes six times as long.
BEGINS = r"(?:^|(?=[`<{$\[]|[ \t]+\{#))"
ANY_KIND = "|".join(f"(?P<{rule.kind}>{rule.pattern})" for rule in NOT_PROSE)
SCANNER = re.compile(f"{BEGINS}(?:{ANY_KIND})", re.MULTILINE | re.DOTALL)
RULES = {rule.kind: rule for rule in NOT_PROSE}


# ---------------------------------------------------------------- Markdown
# A block quote, but not an emoticon such as >_< or >:( at the start of a line.
QUOTE_SIGN = r">(?![_.oO^-]+[<>]|<(?=\s|$)|[:;]['-]?[()DPO|/\\])"
QUOTE = re.compile(rf"(^|\n)[ ]{{0,3}}{QUOTE_SIGN}[ ]?(.*)")
# In a list item a quote may be indented as the item's text is.
QUOTE_IN_ITEM = re.compile(rf"^ *(?={QUOTE_SIGN})", re.MULTILINE)
# What ends a quote without a blank line, as in CommonMark: a list item, a heading, a fence, a rule.
ENDS_QUOTE = re.compile(rf"\n *(?:{LIST_MARK}|#{{1,6}} |```|~~~|(?:[-*_] ?){{3,}}$)", re.MULTILINE)
# A tag with a mistake that browsers forgive, like the missing space in <img src="a.png"alt="b">.
BROKEN_TAG = r"""(<[a-zA-Z][\w:-]*\s[^<>="']*[="'][^<>]*>)"""
# "2001. It was a good year" begins with a year and is not a list.
YEAR = re.compile(r"^( {0,3}\d{4,})(?=\. )", re.MULTILINE)
# Extension: the sign of it that a text must contain.
EXTENSIONS = {"footnotes": "[^", "tables": "|", "def_list": "\n:", "abbr": "*[", "md_in_html": "markdown="}


def markdown_to_html(source: str) -> str:
    extensions = tuple(name for name, sign in EXTENSIONS.items() if sign in source)
    return converter(extensions, "<" in source).reset().convert(YEAR.sub(r"\1\\", source))


@functools.lru_cache(maxsize=64)
def converter(extensions: tuple[str, ...], raw_html: bool) -> markdown.Markdown:
    """A Markdown instance that leaves emphasis as it was typed and keeps a list's first number."""
    md = markdown.Markdown(extensions=list(extensions))
    md.inlinePatterns.deregister("em_strong")
    md.treeprocessors.deregister("prettify")
    md.treeprocessors.register(KeepAsTyped(md), "keep_as_typed", 15)
    md.parser.blockprocessors.register(Quotes(md.parser), "quote", 20)
    md.parser.blockprocessors["olist"].LAZY_OL = False
    if not raw_html:  # these two take time
        md.preprocessors.deregister("html_block")
        md.inlinePatterns.deregister("html")
    else:
        md.inlinePatterns.register(HtmlInlineProcessor(BROKEN_TAG, md), "broken_tag", 89)
    return md


class Quotes(BlockQuoteProcessor):
    """Block quotes that begin in list items and end before them as CommonMark's do."""

    RE = QUOTE

    def test(self, parent, block):
        return super().test(parent, self.unindent(parent, block))

    def run(self, parent, blocks):
        block = self.unindent(parent, blocks[0])
        begin = self.RE.search(block).start(2)
        blocks[0] = block
        if end := ENDS_QUOTE.search(block, begin):
            blocks[0] = block[: end.start()]
            blocks.insert(1, block[end.start() + 1 :])
        super().run(parent, blocks)

    def unindent(self, parent, block: str) -> str:
        return QUOTE_IN_ITEM.sub("", block) if parent.tag == "li" else block


class KeepAsTyped(markdown.treeprocessors.Treeprocessor):
    """Marks the newlines that the author typed, and takes indented verse out of code blocks."""

    def run(self, root):
        for element in root.iter():
            code = element.find("code") if element.tag == "pre" else None
            is_verse = code is not None and looks_like_prose(code.text or "")
            if is_verse:
                element.tag = "p"
                code.tag = "span"
            elif element.get("class") == "footnote":
                # As a list the notes would get numbers, and the marks in the text are gone.
                parts = [*element.iter("ol"), *element.iter("li")]
                for part in parts:
                    part.tag = "div"

            if element.text:
                element.text = element.text.replace("\n", SOFT)
            if element.tail:
                element.tail = element.tail.replace("\n", SOFT)


# ---------------------------------------------------------------- chats
class ChatLine(NamedTuple):
    """A way in which a program begins the line of a chat."""

    program: str
    pattern: str  # "name" is who speaks
    example: str  # the tests read "mossy" and "hi there" from it


class Said(NamedTuple):
    """What somebody says in a chat without a break."""

    speaker: str  # as it is typed; "" for what a program says
    words: str
    lines: str  # with name and time


DAY = r"\d{1,4}[/.-]\d{1,2}[/.-]\d{1,4}"
CLOCK = r"\d{1,2}:\d\d(?::\d\d)?(?:[ \u202f]?[AaPp]\.?[Mm]\b\.?)?"
STAMP = rf"(?:{DAY},? )?{CLOCK}"
NICK = r"[\w.~+`|^-]{1,24}"
FULL_NAME = rf"{NICK}(?: [\w.'-]{{1,24}}){{0,3}}"

# To add a program: write a row with an example. Two lines of these that are near each other are a chat.
CHAT_LINES = [
    ChatLine(
        "AIM", rf"(?P<name>[^\s:(\[][^:(\[\n]{{0,30}})[(\[]{STAMP}[)\]][*_]*:[*_]*", "mossy (10:36:16 PM): hi there"
    ),
    ChatLine(
        "IRC, brackets", rf"[(\[]{STAMP}[)\]][ \t*_]*<[@+%&~ ]?(?P<name>[^>\n]{{1,30}})>", "[10:36] <@mossy> hi there"
    ),
    ChatLine("IRC", rf"{STAMP}\s*<[@+%&~ ]?(?P<name>[^>\n]{{1,30}})>", "10:36 <mossy> hi there"),
    ChatLine("IRC, an action", rf"[(\[]{STAMP}[)\]] \* ?(?P<name>{NICK})(?= \w)", "[10:36] * mossy hi there"),
    ChatLine(
        "MSN, Skype, WhatsApp on an iPhone, Telegram",
        rf"[(\[]{STAMP}[)\]][ \t*_]*(?P<name>{FULL_NAME})(?: says)?[*_]*:[*_]*",
        "[12/05/2020, 10:33:12] mossy: hi there",
    ),
    ChatLine(
        "WhatsApp on Android",
        rf"{DAY},? {CLOCK} [-\u2013] (?P<name>[^:\n]{{1,40}}):",
        "12/05/20, 10:33 - mossy: hi there",
    ),
]
# The same where the words stand on the next line; four of these, and two who speak twice, are a chat.
CHAT_HEADS = [
    ChatLine("Slack, old", rf"(?P<name>{FULL_NAME}) \[{STAMP}\]", "mossy [10:36 AM]\nhi there"),
    ChatLine("Slack", rf"(?P<name>{FULL_NAME}) {CLOCK}(?<=[Mm])", "mossy 10:36 AM\nhi there"),
    ChatLine(
        "Discord",
        rf"(?P<name>{FULL_NAME}) \u2014 (?:\w+ at |{DAY},? ){CLOCK}",
        "mossy \u2014 Today at 10:36 AM\nhi there",
    ),
    ChatLine("Telegram", rf"(?P<name>{FULL_NAME}),? \[{DAY},? {CLOCK}\]:?", "mossy, [12.05.20 10:33]\nhi there"),
    ChatLine("MSN", rf"(?P<name>{FULL_NAME}) says(?: \({STAMP}\))?:", "mossy says:\nhi there"),
]
LINE_STARTS = [re.compile("[-*_ ]*" + row.pattern) for row in CHAT_LINES]
HEADS = [re.compile(f"[*_]*{row.pattern}[*_]*$") for row in CHAT_HEADS]
# Any of CHAT_LINES, also as a part of other patterns, in which a group has no name.
TIMED = re.compile("[-*_ ]*(?:" + "|".join(row.pattern.replace("?P<name>", "?:") for row in CHAT_LINES) + ")")
# name: text / <name> text; one name is written with a blank behind each letter
SAID = re.compile(
    r"[*_<]*([^\W\d_](?: \w){2,15}|[^\W\d_][\w.'-]{0,23}(?: [\w.'-]{1,20})?)>?[*_]*:[*_]* +(?=\S)"
    r"|<([^\W\d_][\w.'-]{0,23})> +(?=\S)"
)
# What a program puts in place of what somebody said, or says for him.
AUTOMATIC = re.compile(
    r"""(?ix)\W*(?:
    (?:media|image|video|audio|gif|sticker|document|voice\ message)\ omitted
    | (?:this\ message\ was|you)\ deleted | missed\ (?:voice|video)\ call | messages\b.*\bencrypt
    | auto(?:matic)?[\ -]?(?:re(?:sponse|ply|sponded)|message|answer)\b | session\ (?:start|clos|conclud)
    )"""
)
# Who comes and goes, behind a name.
PRESENCE = re.compile(
    r"""(?ix)
    (?:has|have)\ (?:joined|left|quit|entered|signed|logged|gone|gotten|returned|been\ (?:added|removed))\b
    | (?:is|are)\ (?:now|no\ longer|currently|also)?\ ?(?:away|idle|online|offline|available|known\ as)\b
    | (?:signed|logged)\ (?:on|off|in|out)\b
    | (?:joined|joins|left|leaves|quit|quits|parts)\W*(?:\#|the\ (?:room|channel|chat|group|con\w+)|\(|$)
    | (?:created|added|changed|removed)\b | sets?\ mode\b"""
)
BY_PROGRAM = re.compile(rf"[(\[]?{STAMP}[)\]]? (?:-!-|\*\*\*|---) ")
DATED = re.compile(rf"[(\[]?{DAY},? {CLOCK}[)\]]?(?: [-\u2013])? \S")
AUTO_REPLY = "<AUTO-REPLY>"  # Pidgin's sign of an automatic answer
# <name> at the start of a line, which HTML takes for an element: behind a time, or with a sign that no element has
ANGLED = re.compile(rf"^((?:[(\[]?{STAMP}[)\]]?[ \t]*))?<(\w[^<>\n:/]{{0,29}})>(?=[ \t]+\S)|{AUTO_REPLY}", re.MULTILINE)

# Guesses. The nine public blogs and the sample hold one chat and three interviews (judgements.py, see
# benchmarks/README.md); 20 % more or less, at least one, changes none to four posts. The tests have texts just on
# either side.
LINES_BETWEEN = 4  # from one timed line of a chat to the next, that line included: long messages wrap
LEAST_SPOKEN = 4  # lines of a chat without times; three may be a joke
LEAST_SPEAKERS = 2  # who speak twice; a list of "eggs: two" has no name twice
LONGEST_SPOKEN = 40  # spaces in a line; longer ones are an interview
MOST_COMPOSED = 0.75  # of the lines without times are whole sentences; with more somebody has written a scene


def take_chats(text: str) -> tuple[str, list[list[Said]]]:
    """The text with blank lines in place of pasted chats, and who says what in each of them."""
    lines = text.replace("\u200e", "").split("\n")
    timed = with_system_lines(lines, timed_chat(lines) | headed_chat(lines))
    gone = timed | spoken_chat(lines)

    # Two chats have words of the author's between them.
    chats = []
    filled = [n for n, line in enumerate(lines) if line]
    for is_gone, numbers in groupby(filled, gone.__contains__):
        chat = list(numbers)
        if is_gone:
            is_timed = not timed.isdisjoint(chat)
            chats.append(read_chat([lines[n] for n in chat], is_timed))
    kept = ["" if n in gone else line for n, line in enumerate(lines)]
    return "\n".join(kept), chats


def timed_chat(lines: list[str]) -> set[int]:
    """Indexes of the lines of pasted chats whose lines begin with a name and the time."""
    timed = [n for n, line in enumerate(lines) if ":" in line and TIMED.match(line)]

    # A line alone with a time is no chat.
    gone = set()
    for first, last in pairwise(timed):
        between = sum(map(bool, lines[first:last]))
        if between <= LINES_BETWEEN:
            gone.update(range(first, last + 1))
    return gone


def headed_chat(lines: list[str]) -> set[int]:
    """Indexes of the lines of pasted chats in which a name and the time stand above what is said."""
    heads = {}
    for n, line in enumerate(lines):
        if ":" in line and any(head.match(line) for head in HEADS):
            heads[n] = speaker_of(line, HEADS)[0]
    if not is_chat(heads.values()):
        return set()

    # The last message ends at a blank line.
    end = [*lines, ""].index("", max(heads))
    return set(range(min(heads), end))


def with_system_lines(lines: list[str], chat: set[int]) -> set[int]:
    """Also what a program says right before the first line and right behind the last one."""
    near = set()
    for number in chat:
        for step in (-1, 1):
            place = number + step
            while 0 <= place < len(lines) and place not in chat and is_system(lines[place]):
                near.add(place)
                place += step
    return chat | near


def is_system(line: str) -> bool:
    """Whether a line without a name is what a program says."""
    behind_name = line.lstrip("*-! ").partition(" ")[2]
    return (
        AUTO_REPLY in line
        or any(pattern.match(line) for pattern in (BY_PROGRAM, DATED, AUTOMATIC))
        or bool(PRESENCE.match(behind_name))
    )


def escape_name(found: re.Match) -> str:
    """<wren_83> as text; <b> at the start of a line stays an element."""
    if found[0] == AUTO_REPLY:
        return html.escape(AUTO_REPLY)
    is_name = found[1] or re.fullmatch(r"(?=.*[\d_|])[\w|`^.-]{3,}", found[2])
    return f"{found[1] or ''}&lt;{found[2]}&gt;" if is_name else found[0]


def spoken_chat(lines: list[str]) -> set[int]:
    """Indexes of the lines of pasted chats without times: short lines in a row by recurring speakers."""
    gone = set()
    speakers = {}  # line: speaker, in the current row
    for n, line in enumerate([*lines, "end"]):
        said = SAID.match(line)
        if said and line.count(" ") < LONGEST_SPOKEN:
            speakers[n] = said[1] or said[2]
        elif line:  # a blank line does not end a chat
            if is_chat(speakers.values()) and not is_composed([lines[each] for each in speakers]):
                gone |= speakers.keys()
            speakers = {}
    return gone


def is_chat(speakers: Collection[str]) -> bool:
    times = Counter(map(plain_speaker, speakers))
    recurring = [name for name, number in times.items() if number > 1]
    return len(speakers) >= LEAST_SPOKEN and len(recurring) >= LEAST_SPEAKERS


def plain_speaker(name: str) -> str:
    """A screen name as chat programs compare them: without spaces, signs and case."""
    return re.sub(r"[\W_]+", "", name.casefold())


def is_composed(lines: list[str]) -> bool:
    """Whether somebody has written a scene or an interview: names and sentences as in a book, not as in a chat."""
    whole = 0
    for line in lines:
        speaker, words = speaker_of(line, [SAID])
        if speaker[0].islower():
            return False
        whole += not words[0].islower() and words[-1] in ENDS_OF_SENTENCE
    return whole > MOST_COMPOSED * len(lines)


def speaker_of(line: str, starts: list[re.Pattern]) -> tuple[str, str]:
    """(who speaks, what); ("", the line) if it begins with no name."""
    for start in starts:
        if found := start.match(line):
            name = next(filter(None, found.groups()), "")
            return name.strip(" *_"), line[found.end() :].strip()
    return "", line


def read_chat(lines: list[str], is_timed: bool) -> list[Said]:
    """Who says what, in order; a line without a name goes on with what was said before it."""
    starts = LINE_STARTS + HEADS if is_timed else [SAID]
    said = []
    for line in lines:
        speaker, words = speaker_of(line, starts)
        last = said[-1] if said else Said("", "", "")

        # Programs speak under a name, in place of one, or without.
        is_automatic = AUTO_REPLY in line or AUTOMATIC.match(words) or AUTOMATIC.match(speaker)
        is_presence = is_timed and not speaker and is_system(line)
        if is_automatic or is_presence or BY_PROGRAM.match(line) or not (speaker or last.speaker):
            said.append(Said("", "", line))
        elif speaker:
            said.append(Said(speaker, words, line))
        else:
            longer = f"{last.words}\n{words}".strip()
            said[-1] = Said(last.speaker, longer, f"{last.lines}\n{line}")
    return said


def mark_speakers(soup: BeautifulSoup):
    """Makes lines of a chat of the names and words in a <dl> or <dialog>; other lists of definitions stay."""
    for box in soup.find_all(["dl", "dialog"]):
        terms = box.find_all("dt")
        names = [term.get_text().strip(" :\n") for term in terms]
        if not is_chat(names):
            continue
        box.name = "div"
        for term, name in zip(terms, names, strict=True):
            words = term.find_next_sibling(["dd", "dt"])
            if words is not None and words.name == "dd":
                words.insert(0, f"{name}: ")
                term.decompose()


# ---------------------------------------------------------------- lines
# [text][4] without its definition, which Markdown leaves as it is; inline code is matched first to be skipped.
STRAY_LINK = re.compile(
    r"`[^`]*`|!?\[((?:`[^`]*`|[^\[\]`])+)\](?:\[[^\[\]`]*\]|\([^()\s`]*\)| \((?:https?://|www\.)[^()\s`]*\))"
)
# A line of bare URLs, or a table row.
BARE_URL = r"(?:https?://|www\.|[\w.-]+\.(?:com|org|net|edu|io|me|info|blog)/)\S+"
NO_TEXT = re.compile(rf"\s*(?:(?:{LIST_MARK})?[<(\[*_]*{BARE_URL}(?:\s+{BARE_URL})*|\|.*\|)\s*")
# Lines that blogging tools add, wherever they stand and at the end of a post.
TOOL_LINE = re.compile(
    r"(?i)[\W_]*(?:(?:technorati|del\.icio\.us|icerocket|livejournal|flickr)(?: tags?)?|current (?:mood|music|location)"
    r")[\W_]*:.*|[*_(\[]+(?:this (?:post|entry|article) was )?(?:originally|first) (?:posted|published) (?:at|on|by) "
    r".{0,80}[*_)\]]+\W*"
)
TAIL = re.compile(
    r"(?i)[\W_]*(?:(?:posted|blogged|sent) (?:via|with|using|by e-?mail|from my)|(?:cross|x)-?posted (?:to|on|at|from)|"
    r"powered by|originally (?:posted|published) (?:at|on|by)|this (?:entry|post) was (?:originally |cross-?)*posted|"
    r"(?:you can|please) comment (?:here|there)|related (?:articles|posts|stories)(?: by \w+)?$|share this\W*$|"
    r"(?:tags|labels|categories|filed under|mood|music|listening to)[\W_]*:)(?!\w).{0,120}"
)
# An address in running text, without the bracket or full stop that closes it. Inline code comes first, and so stays.
LONG_URL = re.compile(
    r"(?i)`[^`\n]*`|(?<![\w@/.-])(?:(?:https?|ftp)://(?:[^\s/@<>]*@)?(?:www\.)?|www\.|"
    r"(?=(?:[\w-]+\.)+(?:com|org|net|edu|io|me|info|blog)/))(?P<site>[\w-]+(?:\.[\w-]+)*(?::\d{2,5}\b)?)"
    r"(?:[:/?#](?:[^\s<>\"`()]|\([^\s<>()]*\))*)?(?<![.,;:!?'*_~])"
)
STARTS_A_LINE = re.compile(rf"{LIST_MARK}|{SAID.pattern}|{TIMED.pattern}")

# When an editor broke the lines. Guesses; nobody has labelled the posts. On nine public blogs and the sample (1,460
# texts; judgements.py, see benchmarks/README.md) they find it in 395. 20 % more or less changes at most 8 of these,
# except for LONGEST_LINE (all, if lines of exactly the width count as too long), SHORTEST_REACH (46 if larger) and
# FULL_LINES_OF_FEW (62 if larger).
NARROWEST = 52  # characters: columns of verse are narrower
WIDEST = 140  # characters: paragraphs on one line are wider
LONGEST_LINE = 1.12  # of the width: one word or link may be longer, but not many
SHORTEST_REACH = 0.86  # of the width: a line with the next word added must come near it
FULL_LINES = 0.66  # of the lines are full; the others end paragraphs
FULL_LINES_OF_FEW = 0.9  # the same for few lines: two lines that happen to be full prove little
MANY_LINES = 9
MOST_CLOSED = 0.3  # of the lines may end with a sentence


def is_hard_wrapped(source: str) -> bool:
    """Whether an editor broke the lines: most end because the next word would not have fitted."""
    broken = broken_lines(source)
    if not broken:
        return False

    is_few = len(broken) < MANY_LINES
    most_closed = 0 if is_few else MOST_CLOSED * len(broken)
    least_full = (FULL_LINES_OF_FEW if is_few else FULL_LINES) * len(broken)

    # An author who presses return ends lines where sentences end.
    closed = sum(line[-1] in ENDS_OF_SENTENCE for line, _ in broken)
    if closed > most_closed:
        return False

    # The third quartile: some lines are shorter because a paragraph ends there, hardly any are longer.
    lengths = sorted(len(line) for line, _ in broken)
    width = lengths[len(lengths) * 3 // 4]
    full = 0
    for line, word in broken:
        reach = len(line) + 1 + len(word)
        full += len(line) <= LONGEST_LINE * width and reach > SHORTEST_REACH * width
    return NARROWEST <= width <= WIDEST and full >= least_full


def broken_lines(source: str) -> list[tuple[str, str]]:
    """(line, first word of the next) for any two lines of a paragraph between which an editor may have broken it."""
    broken = []
    for line, following in pairwise(map(str.strip, source.split("\n"))):
        if not line or not following:
            continue
        word = following.partition(" ")[0]
        is_markup = line[0] in "#>|<" or word[0] in "#>|<" or STARTS_A_LINE.match(following)

        # Editors do not break a link, however long it makes the line.
        has_link = "](" in line or "http" in line or "[" in word or "http" in word
        if not is_markup and not has_link:
            broken.append((line, word))
    return broken


def clean_lines(text: str, left_out: Counter) -> str:
    """The text without bare URLs, table rows and importers' footers; no two blank lines in a row."""
    lines = []
    for line in text.split("\n"):
        if TOOL_LINE.fullmatch(line):
            left_out["tails"] += count_words(line)
        elif NO_TEXT.fullmatch(line):
            left_out["tables" if line.lstrip()[0] == "|" else "bare links"] += count_words(line)
        else:
            lines.append(line)

    # What goes is counted, so that the ledger of words adds up.
    text = "\n".join(lines)
    text = re.sub(r"\n{3,}", "\n\n", text).strip()
    text = text.replace("\xa0", " ").replace("\u202f", " ")
    text = counted_as("markup", left_out, text, STRAY_LINK.sub(lambda link: link[1] or link[0], text))
    text = counted_as("bare links", left_out, text, LONG_URL.sub(site_of, text))

    # Lines at the end that belong to no text, one after the other.
    head = text
    while TAIL.fullmatch(head[head.rfind("\n") + 1 :]):
        head = head[: head.rfind("\n") + 1].rstrip()
    text = counted_as("tails", left_out, text, head)
    text = counted_as("markup", left_out, text, INVISIBLE.sub("", text))
    return text.strip()


def site_of(url: re.Match) -> str:
    """The site's name alone: a model that has learned whole addresses invents some. An IP address is no name."""
    site = url["site"]
    if site is None:
        return url[0]
    return site if any(map(str.isalpha, site.rpartition(".")[2])) else ""


# ---------------------------------------------------------------- plain text
# Elements without words of the author's, or whose words cannot be read in order.
DROPPED = re.compile(
    "blockquote|pre|table|script|style|iframe|object|embed|video|audio|figure|figcaption|button|form|input|select|"
    "textarea|svg|math|noscript|canvas|template|head|nav|img|picture"
)
BLOCK = re.compile(
    "address|article|aside|body|center|dd|details|div|dl|dt|fieldset|footer|h[1-6]|header|hr|html|li|main|ol|p|section|"
    "summary|ul"
)
EMPHASIS = {"em": "*", "i": "*", "b": "**", "strong": "**", "del": "~~", "s": "~~", "strike": "~~"}
EMPHASIS |= {"code": "`", "tt": "`", "kbd": "`", "samp": "`"}
# Elements that have no sign in plain text; any other without attributes, <iv>, is what the author typed.
INVISIBLE_TAG = re.compile(
    "abbr|acronym|area|base|bdi|bdo|big|blink|cite|col|colgroup|dfn|font|ins|label|legend|link|lj|map|mark|marquee|"
    "meta|nobr|param|q|r[bpt]|ruby|small|source|span|sub|sup|t[dhr]|tbody|tfoot|thead|time|title|track|u|var|wbr|xmp"
)
# Classes and ids of what a theme, an importer or a service put around the author's text.
NOT_CONTENT = re.compile(
    r"(?i:comments?|comment-?list|respond|disqus[\w-]*|(?:wp-)?caption[\w-]*|shar(?:e|ing)[\w-]*|social[\w-]*|related[\w-]*|"
    r"addtoany[\w-]*|twitter-(?:tweet|video)|instagram-media|fb-post|highlight(?:er-rouge)?|quiz[\w-]*|"
    r"zemanta[\w-]*|wlwriter[\w-]*|blogger-post-footer|technorati[\w-]*|scribefire[\w-]*|jp-relatedposts|addthis[\w-]*|"
    r"feedflare|webmentions?|bibliography|footnote-(?:ref|backref)|reversefootnote|btn|button|mermaid|blockquote|pullquote)"
)
# Microformats of a post that is answered, shared or liked: https://indieweb.org/reply-context
CITED = re.compile(r"h-cite|u-(?:in-reply-to|quotation-of|repost-of|like-of|bookmark-of)")
CITED_TEXT = re.compile(r"[ep]-(?:content|summary)")
# Who is quoted: a line with a dash behind a quote, "On Monday ann@example.org wrote:" before one.
ATTRIBUTION = re.compile(r"[*_(\s]*(?:[\u2012-\u2015~]|--)\s*(?P<who>[^\n]+)")
NAMES = re.compile(rf"- (?:(?:[\W\d]*[^\W\d_a-z]\S*|@\S+|[\W\d]+|{FUNCTION_WORD.pattern})\s*)+")
# A paragraph that is one quotation and who said it.
SAYING = re.compile(
    r"[*_\s]*[\"\u201c\xab][^\"\u201c\u201d\xab\xbb]+[\"\u201d\xbb][*_\s]*(?P<by>(?:[\u2012-\u2015~]|--?)\s*\S.*)",
    re.DOTALL,
)
WROTE = re.compile(
    rf"(?:^|(?<=[\n{SOFT}]))(?i:(?:on|le|am|el|il)\b[^\n{SOFT}]{{5,150}}|[^\n{SOFT}]{{0,60}}\S@\S+)"
    r" (?i:wrote|a \xe9crit|schrieb[^\n:]{0,40}|escribi\xf3|ha scritto)\s?:$"
)
LONGEST_ATTRIBUTION = 15  # words; a guess
LONGEST_CAPTION = 40  # words; a guess
PARAGRAPH_TAG = re.compile(r"<(?:p|br|div)\b", re.IGNORECASE)
# An address without its closing quotation mark, which would swallow the text up to the next one.
UNCLOSED = re.compile(r'(<a\s[^<>"]*href="[^<>"\s]+)(?=>)')
# "i<n; n>j" and "a<b and c>d": HTML would read a tag up to the next >. No tag's name has such a sign, and words without
# values behind a letter are hardly attributes.
COMPARISON = re.compile(r"<(?:(?=[A-Za-z]\w*[,;)&|*])|(?<=[\w)]<)(?=[A-Za-z]\w*(?:\s+[\w,.;&|]+)+\s*>))")
# What may have words and is not text, by its form: tags, targets, definitions, references, list numbers, fences.
MARKUP_SIGN = re.compile(
    r"<[^<>]*>|\]\([^()\n]*(?:\([^()\n]*\)[^()\n]*)*\)|\]\s?\[[^\]]*\]|!\[[^\]]*(?=\])|\[\^[^\]]*\]|\{:[^}]*\}|"
    r"^[> ]*(?:\*?\[[^\]]*\]:.*(?:\n\s+[\"'(].*)?|\d+[.)]|(?:```|~~~).*)",
    re.MULTILINE,
)
# What the report calls the words in an element, by its name or label; those of others are a theme's or a tool's.
KINDS_OF_ELEMENTS = {
    "quotes": re.compile("blockquote|pullquote|h-cite|u-.*|twitter-.*|instagram-media|fb-post", re.I),
    "code": re.compile("pre|script|style|highlight.*|math|svg|mermaid", re.I),
    "tables": re.compile("table"),
    "captions": re.compile("figure|figcaption|(?:wp-)?caption.*", re.I),
    "menus": re.compile("nav|form|button|select|input|btn|shar.*|social.*|related.*", re.I),
}
# A line break with the spaces around it; a newline typed after a <br> is not a second one.
LINE_END = re.compile(rf"[^\S\n]*(?:(\n){SOFT}?|({SOFT}))[^\S\n]*")


def to_text(
    source: str, is_html: bool, title: str, line_breaks: str, left_out: Counter
) -> tuple[str, list[list[Said]]]:
    """HTML or Markdown (without Liquid) to plain text: paragraphs, list lines, emphasis as the author types it.

    The second value is the pasted chats, which are taken out."""
    source = UNCLOSED.sub(r'\1"', source)
    markup = COMPARISON.sub("&lt;", source)
    markup = ANGLED.sub(escape_name, markup)
    join = line_breaks == "join" or (line_breaks == "auto" and is_hard_wrapped(markup))

    if not is_html:
        markup = markdown_to_html(markup)
    elif not PARAGRAPH_TAG.search(markup):
        markup = re.sub(r"\n[ \t]*\n", "<p>", markup)  # as WordPress does
    tree = BeautifulSoup(markup, "html.parser")
    if "<dt" in markup:
        mark_speakers(tree)
    reader = PlainText(left_out)
    blocks = reader.read(tree)
    count_markup(source, tree, reader.texts, left_out)

    # The request contains the title; as the first heading it would be repeated.
    if blocks and blocks[0].kind == "heading" and blocks[0].text.casefold() == title.casefold():
        left_out["titles"] += count_words(blocks[0].text)
        del blocks[0]

    out = []
    last = ""
    for kind, text in blocks:
        out.append("\n" if kind == last == "list" else "\n\n")
        out.append(join_lines(text) if join else text.replace(SOFT, "\n"))
        last = kind
    text, chats = take_chats(re.sub(r"(?<=\S) {2,}", " ", "".join(out)))
    return clean_lines(text, left_out), chats


def count_markup(source: str, tree: Tag, texts: list[str], left_out: Counter):
    """Adds to left_out the words of the source that are in no text of the tree: alternative texts, tags, addresses.

    A word that is in none of these is one that the parser has lost."""
    # What was escaped twice is resolved twice, as in the texts.
    plain = html.unescape(unescape(source)).replace("\\_", "_")
    if plain != source:
        left_out["markup"] += count_words(source) - count_words(plain)

    # Words that are not shown are those of signs and of pictures.
    shown = " ".join(texts)
    signs = " ".join(MARKUP_SIGN.findall(plain))
    images = tree.find_all("img") if "![" in source or "<" in source else []
    captions = " ".join(str(image.get("alt", "")) for image in images)

    # Mostly the numbers fit. Where they do not, perhaps since a sign stands in code and is shown, the words tell.
    gone = count_words(plain) - count_words(shown)
    in_captions = count_words(captions)
    lost = gone - count_words(signs)
    if lost:
        bag = Counter(WORD.findall(plain)) - Counter(WORD.findall(shown))
        of_captions = Counter(WORD.findall(captions))
        of_signs = Counter(WORD.findall(signs))
        gone = bag.total()
        in_captions = (of_captions & bag).total()
        lost = (bag - of_captions - of_signs).total()
    left_out["captions"] += in_captions
    left_out["lost by the parser"] += lost
    left_out["markup"] += gone - in_captions - lost


def join_lines(text: str) -> str:
    """A block without the line breaks of the author's editor; list items and the lines of a chat keep theirs."""
    text = re.sub(rf"{SOFT}(?=[-*+\u2022] |\d+[.)] |{TIMED.pattern})", "\n", text)
    text = re.sub(f"(?<=[\u3000-\u9fff\uff00-\uffef]){SOFT}(?=[\u3000-\u9fff\uff00-\uffef])", "", text)
    return text.replace(SOFT, " ")


class Block(NamedTuple):
    kind: str  # "list", "heading" or "text"
    text: str


class PlainText:
    """Collects the text of an HTML tree, block by block, as the author would type it."""

    def __init__(self, left_out: Counter):
        self.left_out = left_out
        self.texts = []  # all that are in the tree
        self.blocks: list[Block] = []
        self.lists: list[Iterator[int] | None] = []  # the numbers of each open list, None for bullets
        self.item = ""  # the mark of a list item that has no text yet
        self.is_behind_quote = False
        self.begin_block()

    def begin_block(self):
        self.parts = []
        self.marks = []  # indexes in parts at which open emphases begin
        self.targets = set()  # of links
        self.in_link = 0  # links that are open
        self.is_outside = False  # whether a word stands outside links
        self.has_image = False  # before its first word

    def read(self, root: Tag) -> list[Block]:
        """The blocks of the tree; not recursive, because nesting 10,000 deep occurs."""
        stack = [(root, iter(root.contents))]
        while stack:
            node = next(stack[-1][1], None)
            if node is None:  # the innermost element is complete
                element, _ = stack.pop()
                self.close(element.name)
            elif type(node) is NavigableString:  # its subclasses are comments and declarations
                self.text(node)
            elif isinstance(node, Tag) and not self.is_dropped(node):
                self.open(node)
                stack.append((node, iter(node.contents)))
            elif isinstance(node, Tag):
                self.drop(node)

        self.flush()
        return self.blocks

    def is_dropped(self, tag: Tag) -> bool:
        labels = [*tag.get("class", ()), tag.get("id", "")] if tag.attrs else ()
        if any(map(CITED.fullmatch, labels)):  # a mere link to it may stand in a sentence
            return bool(BLOCK.fullmatch(tag.name) or tag.find(class_=CITED_TEXT))

        is_box = tag.name == "blockquote" and BOX.search(" ".join(labels))
        if DROPPED.fullmatch(tag.name):
            return not is_box
        return any(map(NOT_CONTENT.fullmatch, labels))

    def drop(self, tag: Tag):
        """Passes an element over; an inline one does not end the block."""
        name = tag.name
        if name == "blockquote":
            self.flush()
            self.pass_quote()
        elif name not in ("img", "a", "sup", "span"):
            self.flush()
        elif name == "img" and not "".join(self.parts).strip():
            self.has_image = True

        names = [name, *tag.get("class", ()), tag.get("id", "")]
        kinds = (kind for kind, pattern in KINDS_OF_ELEMENTS.items() if any(map(pattern.fullmatch, names)))
        texts = (text for text in tag.descendants if isinstance(text, NavigableString))
        shown = [text for text in texts if not isinstance(text, PreformattedString)]  # comments, declarations
        self.left_out[next(kinds, "themes and tools")] += count_words(" ".join(shown))
        self.texts += shown

    def open(self, tag: Tag):
        name = tag.name
        if name in EMPHASIS:
            self.marks.append(len(self.parts))
        elif name == "br":
            self.parts.append("\n")
        elif name == "a":
            self.targets.add(str(tag.get("href")))
            self.in_link += 1
        elif BLOCK.fullmatch(name):
            self.flush()
            self.open_list(tag)
        elif name in ("lj", "user") and tag.attrs:  # LiveJournal's ways to name a friend
            self.text(str(tag.get("user") or tag.get("comm") or tag.get("name") or ""))
        elif not tag.attrs and name.isalpha() and not INVISIBLE_TAG.fullmatch(name):
            self.text(f"<{name}>")

    def open_list(self, tag: Tag):
        """Begins a list or a list item; does nothing for any other block."""
        if tag.name == "ul":
            self.lists.append(None)
            self.is_behind_quote &= len(tag.find_all("li", limit=2)) == 1
        elif tag.name == "ol":
            start = str(tag.get("start"))
            self.lists.append(count(int(start) if start.isdecimal() else 1))
        elif tag.name == "li":
            numbers = self.lists[-1] if self.lists else None
            self.item = f"{next(numbers)}. " if numbers else "- "

    def text(self, text: str):
        text = unescape(SPACE.sub(" ", text))  # some are left over from double escaping
        if not self.in_link and not self.is_outside:
            self.is_outside = any(map(str.isalnum, text))
        self.parts.append(text)
        self.texts.append(text)

    def close(self, name: str):
        if name in EMPHASIS and self.marks:
            self.close_emphasis(EMPHASIS[name])
        elif name == "a":
            self.in_link = max(0, self.in_link - 1)
        elif BLOCK.fullmatch(name):
            is_heading = name[0] == "h" and name[1:].isdigit()
            self.flush("heading" if is_heading else "text")
            if name in ("ul", "ol"):
                self.lists.pop()

    def close_emphasis(self, mark: str):
        """Puts the mark around the words, not around the spaces beside them; without words there is no emphasis."""
        start = self.marks.pop()
        inner = "".join(self.parts[start:])
        core = inner.strip()
        if core:
            lead, _, trail = inner.partition(core)
            self.parts[start:] = [lead, mark, core, mark, trail]

    def pass_quote(self):
        """Takes the line that says who wrote a quote of somebody else from the block before it."""
        if self.blocks:
            kind, text = self.blocks[-1]
            own = counted_as("quotes", self.left_out, text, WROTE.sub("", text).rstrip(" \n" + SOFT))
            self.blocks[-1:] = [Block(kind, own)] if own else []
        self.is_behind_quote = True

    def is_who_said_it(self, text: str) -> bool:
        if saying := SAYING.fullmatch(text):
            return is_attribution(saying["by"])
        return self.is_behind_quote and is_attribution(text)

    def is_caption(self, text: str) -> bool:
        """An emphasis alone behind an image, without a blank line between them."""
        is_emphasis = bool(re.fullmatch(r"\*[^*]+\*", text))
        return self.has_image and is_emphasis and len(words_of(text)) <= LONGEST_CAPTION

    def flush(self, kind: str = "text"):
        """Ends a block; a row of links alone is navigation."""
        text = "".join(self.parts).strip(" \n\xa0" + SOFT + HOLE)
        if "\n" in text or SOFT in text:
            text = LINE_END.sub(r"\1\2", text)
        if text == QUOTED:
            self.pass_quote()
            text = ""

        # A single link may be the subject of the post; two and nothing else are a menu or a list of tags.
        # So is one to a place on this page.
        is_inside = all(target.startswith("#") for target in self.targets)
        is_links = len(self.targets) > (0 if is_inside else 1) and not self.is_outside
        if text and (not is_links or is_sentence_of_links(text)):
            mark = self.item
            self.item = ""
            if self.is_who_said_it(mark + text):
                self.left_out["quotes"] += count_words(text)
            elif self.is_caption(text):
                self.left_out["captions"] += count_words(text)
            else:
                self.add(kind, mark, text)
            self.is_behind_quote = False
        elif text:
            self.left_out["menus"] += count_words(text)
        self.begin_block()

    def add(self, kind: str, mark: str, text: str):
        if self.lists:
            kind = "list"
            self.left_out["markup"] -= mark[:1].isdigit()  # its number was counted as a sign
            text = "  " * (len(self.lists) - 1) + (mark or "  ") + text
        self.blocks.append(Block(kind, text))


def is_attribution(text: str) -> bool:
    """Whether a short line behind a quote says whose it is."""
    if len(words_of(text)) > LONGEST_ATTRIBUTION:
        return False

    # A sentence may begin with a dash, too.
    dashed = ATTRIBUTION.fullmatch(text)
    who = dashed["who"].lstrip("*_([") if dashed else ""
    is_sentence = who[:1].islower() or FUNCTION_WORD.match(who.removeprefix("The "))
    return bool(dashed and not is_sentence or NAMES.fullmatch(text))


def is_sentence_of_links(text: str) -> bool:
    """The pieces of a sentence may be links."""
    return text.rstrip("*_~)\"'\u2019\u201d").endswith((".", "!", "?")) and bool(FUNCTION_WORD.search(text))


def clean_title(title: object) -> str:
    """The title as plain text: Markdown, HTML and entities resolved."""
    text = SPACE.sub(" ", title).strip() if isinstance(title, str) else ""
    if re.search(r"[<&*_`\[\\~]", text):
        # The mark in front keeps "2001. A year" from being a list and "# 1" from being a heading.
        rendered = markdown.markdown(HOLE + text)
        text = unescape(BeautifulSoup(rendered, "html.parser").get_text())
    text = INVISIBLE.sub("", text.replace("\xa0", " "))
    return SPACE.sub(" ", text).strip()


# ---------------------------------------------------------------- personal data
class PersonalData(NamedTuple):
    """A way to write something that nobody else should read."""

    what: str
    pattern: str
    example: str  # the tests look for it
    in_links: bool = True  # False: in a link it may be the id of a video or a ticket


AT = r"(?:\\?@|\s?[\[({]\s?at\s?[\])}]\s?)"  # Perl and the shell want a backslash before it
DOT = r"(?:\s?[\[({]\s?dot\s?[\])}]\s?|\.)"
# Kind, which is the word that replaces it: how it is written. To add a telephone format that phonenumbers does not
# know, or the keys of another service: write a row with an example. The tests look for every example; they also fail if
# it contains none of the signs of PERSONAL_SIGN, which then needs one more. The first row of a kind that matches wins.
PERSONAL_DATA = {
    "phone": [
        PersonalData(
            "+NN in groups, also where the number is not valid",
            r"\+(?=(?:\D{0,3}\d){7})(?!\d{7})\d{1,3}(?:[ .\u00a0-]?\(?\d{1,4}\)?){2,6}",
            "+44 (0)20 7946 0958",
        ),
        PersonalData(
            "North America, also with an area code that does not exist",
            r"(?:1[ .-])?(?:\(\d{3}\) ?|\d{3}[ .-])\d{3}[ .-]\d{4}",
            "(415) 555-0123",
        ),
        PersonalData(
            "with a leading 0, of every country: in pairs, and as in Britain, Germany, Japan and Korea",
            r"0[1-9](?:[ .-]\d{2}){4}|\(?0\d{2,4}\)?[ /-]\d{3,4}[ -]?\d{3,4}|0\d{1,2}-\d{3,4}-\d{4}",
            "030 1234 5678",
        ),
        PersonalData("local, in films and examples", r"555-\d{4}", "555-0123"),
        PersonalData(
            "local, where announced", r"(?:(?<=call )|(?<=phone )|(?<=number is ))\d{3}[-. ]\d{4}", "call 867-5309"
        ),
    ],
    "secret": [
        PersonalData(
            "a private key",
            r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)",
            "-----BEGIN RSA PRIVATE KEY-----\nMIIE\n-----END RSA PRIVATE KEY-----",
        ),
        PersonalData(
            "a US social security number",
            r"(?<![.+/=#-])(?!000|666|9)\d{3}-(?!00)\d\d-(?!0000)\d{4}(?![\w/]|[.-]\d)",
            "123-45-6789",
        ),
        PersonalData("Amazon", r"(?:AKIA|ASIA)[0-9A-Z]{16}\b", "AKIA" + "ABCDEFGHIJKLMNOP"),
        PersonalData("GitHub", r"gh[oprsu]_\w{30,}|github_pat_\w{30,}", "ghp_" + "a1B2" * 9),
        PersonalData("OpenAI", r"sk-[\w-]{20,}", "sk-" + "a1B2" * 6),
        PersonalData("Slack", r"xox[a-z]-[\w-]{10,}", "xoxb-" + "1234567890-ab"),
        PersonalData("Google", r"AIza[\w-]{30,}", "AIza" + "a1B2" * 8),
        PersonalData(
            "a JSON web token", r"eyJ[\w-]{10,}\.[\w-]{10,}\.[\w-]*", "eyJhbGciOiJIUzI1.eyJzdWIiOiIxMjM0.c2ln"
        ),
        PersonalData(
            "a key or digest in hexadecimal: digits alone are a large number, letters alone a scream",
            r"(?=[0-9a-fA-F]{32})(?<![/-])(?=\d*[a-fA-F])(?=[a-fA-F]*\d)[0-9a-fA-F]+(?![\w-])",
            "0123456789abcdef" * 2,
            in_links=False,
        ),
        PersonalData(
            "letters of both cases with three digits or more",
            r"(?=[A-Za-z0-9_-]{30})(?<![/-])(?=[\w-]*[a-z])(?=[\w-]*[A-Z])(?=(?:[A-Za-z_-]*\d){3})[A-Za-z0-9_-]+(?![\w-])",
            "aB3" + "dE4fG5h" * 5,
            in_links=False,
        ),
    ],
    "email": [
        PersonalData(
            "name@host.com, name [at] host [dot] com",
            rf"(?!git@)[\w.+-]{{1,64}}{AT}[\w-]{{1,63}}(?:{DOT}[\w-]{{1,63}})+",
            "ann [at] example [dot] com",
        ),
        PersonalData(
            "name at host dot com",
            r"[\w.+-]{1,64} at [\w-]{1,63}(?: dot [\w-]{1,63})* dot (?:com|org|net|edu|gov|io|co|uk|de|fr|us)\b",
            "ann at example dot com",
        ),
    ],
    "card": [
        PersonalData(
            "in groups of four",
            r"(?:[45]\d|2[2-7]|6\d|35)\d\d(?:[ -]?\d{4}){3}(?: \d{3}|\d{0,3})",
            "4111 1111 1111 1111",
        ),
        PersonalData("American Express, Diners", r"3[04-9]\d\d[ -]?\d{6}[ -]?\d{4,5}", "3782 822463 10005"),
    ],
    "iban": [
        PersonalData(
            "a bank account",
            r"[A-Za-z]{2}\d\d(?:[ -]?[0-9A-Za-z]{4}){2,7}(?:[ -]?[0-9A-Za-z]{1,3})?",
            "DE89 3704 0044 0532 0130 00",
        ),
    ],
    "ip": [
        PersonalData("version 4", rf"[0-9]{{1,3}}(?:\.[0-9]{{1,3}}){{3}}(?![.-]?[^\W{CJK}])", "192.0.43.8"),
        PersonalData(
            "version 6; all of those in use begin with 2 or 3",
            r"(?<![0-9a-fA-F]{4}:)(?<!::)[23][0-9a-fA-F]{3}(?:::?[0-9a-fA-F]{1,4}){1,7}(?:::)?(?!:?\w)",
            "2620:0:2d0:200::8",
        ),
    ],
}
# Kind: what must not be before and after it. An address is not part of a longer one, a number not of a date, a version,
# a path or a link. What a kind begins with is tested first, to save time.
NO_DIGIT_BEHIND = rf"(?![^\W{CJK}]|/|[.-]\d)"  # a Korean or Japanese particle may follow
AROUND = {
    "secret": ("", ""),
    "email": (r"(?<![@.+-])", ""),
    "card": (r"(?=\d)(?<![.+/=#-])", NO_DIGIT_BEHIND),
    "iban": ("", rf"(?![^\W{CJK}])"),
    "ip": (r"(?=\d)(?<![.+-])(?<![^/]/)", ""),
    "phone": (r"(?=[\d+(])(?<![.+/=-])", NO_DIGIT_BEHIND),
}
# Text without any of these signs has no personal data; testing for them first saves most of the time.
PERSONAL_SIGN = re.compile(
    r"@|\d{2}[ .()-]*\d\d|[\w-]{14}|-----BEGIN|\bdot\b|\bat ?[\])}]|\d(?:\.\d{1,3}){3}|[23][0-9a-f]{3}:", re.IGNORECASE
)
SEVEN_DIGITS = re.compile(r"\d(?:[^\w\n]{0,3}\d){6}")  # the same for telephone numbers
# What phonenumbers also takes for a number: a difference, an IP address or a version, and what ends in one digit that
# stands alone, as an ISBN does.
NO_PHONE = re.compile(r"[1-9]\d* [-\u2013] \d+|\d{1,3}(?:\.\d{1,3}){3}|.*[ -]\d")


def any_of(kind: str) -> str:
    """The pattern of a kind; each row is a group of its own, "phone2" for PERSONAL_DATA["phone"][2]."""
    before, behind = AROUND[kind]
    rows = [f"(?P<{kind}{number}>{row.pattern})" for number, row in enumerate(PERSONAL_DATA[kind])]
    return f"{before}(?:{'|'.join(rows)}){behind}"


# A plain word begins nothing, unless it is the name of an address; testing for that first saves half of the time.
PLAIN_WORD = r"[^\W\d_]{1,15}[\s,;:](?!at |[\[({])"
PERSONAL = re.compile(rf"(?<![^\W{CJK}])(?!{PLAIN_WORD})(?:{'|'.join(map(any_of, AROUND))})", re.DOTALL)
BEFORE_PHONE = re.compile(rf"(?<![^\W{CJK}]){AROUND['phone'][0]}")
BEHIND_PHONE = re.compile(AROUND["phone"][1])


class Found(NamedTuple):
    """Something in a text that is to be replaced."""

    kind: str  # a key of PERSONAL_DATA, or "private"
    start: int
    end: int
    normalised: str  # one spelling for all of the same address or number


# Public name servers, and example.com.
KNOWN_SERVERS = ("1.1.1.", "1.0.0.", "8.8.8.", "8.8.4.", "9.9.9.", "149.112.112.", "208.67.22", "93.184.216.34")
CALLED_ADDRESS = re.compile(r"(?i)\bip(?:v4)?\b(?:[ -]?address(?:es)?)?\W*(?:(?:is|was|of|at)\W*)?$|://$")
CALLED_VERSION = re.compile(r"(?i)\b(?:v|ver|vers|version|versions|release|build|firmware)\W*$")
BEFORE_ID = re.compile(r"(?i)(?:https?://|www\.)[^\s?#]*[?#](?:\S*[?&;#])?(?P<name>[^\s?&;#=]*)=?$")
NAME_OF_A_KEY = re.compile(r"(?i)key|token|secret|sig|pass|pwd|auth|session|sid|credential|code")


def real_card(found: re.Match) -> str:
    from stdnum import luhn  # here: it needs 0.1 s to load, and hardly any blog has such a number

    return longest_valid(found[0], lambda number: len(number) > 13 and luhn.is_valid(number))


def real_iban(found: re.Match) -> str:
    from stdnum import iban  # the same

    return longest_valid(found[0], functools.partial(iban.is_valid, check_country=False))


def longest_valid(typed: str, is_valid: Callable[[str], bool]) -> str:
    """The longest start of it, up to the end of a word, that is valid: a security code or a name may follow."""
    ends = [end.start() for end in re.finditer(r"(?<=\w)\b", typed)]
    starts = [typed[:end] for end in reversed(ends)]
    return next((start for start in starts if is_valid(re.sub("[ -]", "", start))), "")


def is_id_in_link(found: re.Match) -> bool:
    """Whether it is a parameter of a link whose name does not suggest a key: the id of a video or a ticket."""
    link = BEFORE_ID.search(found.string[max(0, found.start() - 500) : found.start()])
    return bool(link) and not NAME_OF_A_KEY.search(link["name"])


def real_ip(found: re.Match) -> str:
    """An IP address that may lead to a person. 127.0.0.1, 192.168.1.1 and 2001:db8::1 lead nowhere."""
    try:
        address = ipaddress.ip_address(found[0])
    except ValueError:
        return ""
    if not address.is_global or address.is_multicast or found[0].startswith(KNOWN_SERVERS):
        return ""

    # Four numbers may also be a version. Small ones are taken for one unless the text calls them an address.
    before = found.string[max(0, found.start() - 20) : found.start()]
    if address.version == 6 or CALLED_ADDRESS.search(before):
        return found[0]
    first, second, *_ = address.packed
    has_small_numbers = first < 30 and (second < 10 or max(address.packed) < 100)
    return "" if has_small_numbers or CALLED_VERSION.search(before) else found[0]


# Kind: what of a match is really one, from its start on; "" if nothing is.
REAL = {"card": real_card, "iban": real_iban, "ip": real_ip}


def find_personal_data(text: str, is_public: bool, countries: Sequence[str]) -> list[Found]:
    """Every e-mail address, number and key, in order, not overlapping; in public an id in a link is no key.

    Telephone numbers are found in the spellings of these countries, and of every country with +NN."""
    found = []
    position = 0 if PERSONAL_SIGN.search(text) else len(text)

    # A match that is not real may contain something else, further on.
    while match := PERSONAL.search(text, position):
        kind = match.lastgroup.rstrip("0123456789")
        row = PERSONAL_DATA[kind][int(match.lastgroup.removeprefix(kind))]
        real = match[0]
        if kind in REAL:
            real = REAL[kind](match)
        elif is_public and not row.in_links and is_id_in_link(match):
            real = ""

        start = match.start()
        end = start + len(real)
        if real:
            found.append(Found(kind, start, end, normalise(kind, real)))
        position = max(end, start + 1)
    return not_overlapping(text, found + find_phones(text, countries))


def find_phones(text: str, countries: Sequence[str]) -> list[Found]:
    """What phonenumbers takes for a valid number in one of the countries, or with +NN; may overlap."""
    if not SEVEN_DIGITS.search(text):
        return []

    found = []
    for country in countries or [None]:
        for match in phonenumbers.PhoneNumberMatcher(text, country):
            typed = match.raw_string
            is_alone = BEFORE_PHONE.match(text, match.start) and BEHIND_PHONE.match(text, match.end)

            # Seven digits without an area code may be any number.
            digits = re.sub(r"\D", "", typed)
            if is_alone and len(digits) > 7 and not NO_PHONE.fullmatch(typed):
                found.append(Found("phone", match.start, match.end, normalise("phone", typed)))
    return found


def not_overlapping(text: str, found: list[Found]) -> list[Found]:
    """In order; of two that overlap the one that comes first in the list."""
    is_taken = bytearray(len(text))
    kept = []
    for one in found:
        if not any(is_taken[one.start : one.end]):
            kept.append(one)
            is_taken[one.start : one.end] = b"\1" * (one.end - one.start)
    return sorted(kept, key=lambda one: one.start)


def normalise(kind: str, typed: str) -> str:
    """One spelling for all of the same address or number, so that their fingerprints are the same."""
    if kind in ("phone", "card"):
        return re.sub(r"\D", "", typed)
    if kind == "iban":
        return re.sub("[ -]", "", typed).upper()
    if kind == "ip":
        return str(ipaddress.ip_address(typed))
    # "name (at) host [dot] org" is an address too.
    if kind == "email":
        address = typed.lower().replace("\\", "")
        if "@" not in address:
            address = re.sub(r"\W*\bat\b\W*", "@", address)
        return re.sub(r"[\s\[({]+dot[\s\])}]+", ".", address)
    return typed


# ---------------------------------------------------------------- private words
# What a whole word is not part of; an underscore is emphasis, or the space of a file name. Accents may be characters of
# their own.
NO_WORD_BEFORE = rf"(?<![^\W_{CJK}])"
NO_WORD_BEHIND = rf"(?![^\W_{CJK}]|[\u0300-\u036f])"
BETWEEN_WORDS = r"(?:[\s_+-]|%20)+"  # in a text, in a file name, in a link


def find_blocked(text: str, blocked: tuple[str, ...]) -> list[Found]:
    """Every private word of a text, in order, not overlapping; normalised is its index in `blocked`."""
    matches = blocked_pattern(blocked).finditer(text)
    return [Found("private", *match.span(), match.lastgroup.removeprefix("word")) for match in matches]


@functools.cache
def blocked_pattern(blocked: tuple[str, ...]) -> re.Pattern:
    """A group "word3" for blocked[3]; where two begin at the same position, the longer one is found."""
    longest_first = sorted(enumerate(blocked), key=lambda entry: -len(entry[1]))
    groups = [f"(?P<word{index}>{phrase_pattern(phrase)})" for index, phrase in longest_first]
    return re.compile("|".join(groups) or "(?!)", re.IGNORECASE)


def phrase_pattern(phrase: str) -> str:
    """For a phrase in any case, with any white space, either apostrophe, and ss or \u00df."""
    words = [word for word in re.split(r"[\s_-]+", phrase) if word]

    # Editors turn a straight apostrophe into a curly one, and Swiss keyboards have no \u00df.
    inner = BETWEEN_WORDS.join(map(any_spelling, words))
    inner = re.sub("['\u2019]", "['\u2019]", inner)
    inner = inner.replace("ss", "(?:ss|\u00df)")

    # Chinese and Japanese have no spaces at which a word could begin or end; Korean appends endings to a name.
    before = "" if re.match(f"[{CJK}]", words[0]) else NO_WORD_BEFORE
    behind = "" if re.search(f"[{CJK}]$", words[-1]) else NO_WORD_BEHIND
    return before + inner + behind


def any_spelling(word: str) -> str:
    """For a word in lower case, with accents as part of their letters or as characters of their own."""
    folded = unicodedata.normalize("NFC", word.casefold())
    found = [folded, unicodedata.normalize("NFD", folded)]

    # Where folding changes the length (a Turkish I with a dot, a German \u00df) re does not match the two.
    if len(folded) != len(word):
        found.append(word)
    either = "|".join(map(re.escape, found))
    return f"(?:{either})"


# ---------------------------------------------------------------- redaction
# What common tokenizers would read as a control token; a space after its first character makes it plain text.
CONTROL_TOKEN = re.compile(
    r"(?i:<[|\uff5c]|[|\uff5c]>|</?s>|\[/?INST\]|<</?SYS>>|</?(?:bos|eos|pad|unk|mask|(?:start|end)_of_turn|think)>)"
)
KEY_FILE = "redaction_key"  # in the data folder: 32 bytes in hexadecimal


def clean_for_training(text: str, post: Post, settings: Settings) -> str:
    """Text that may leave the blog: without personal data and private words, with its control tokens broken.

    What was replaced is recorded in the post."""
    personal = []
    if settings.redact:
        is_public = post.visibility == "public"
        personal = find_personal_data(text, is_public, settings.phone_countries)
    post.redacted += [(one.kind, one.normalised) for one in personal]

    # Searched in the original text: a name in an e-mail address is counted, and the whole address is replaced.
    private = find_blocked(text, settings.blocked_words)
    post.blocked.update(one.normalised for one in private)
    redacted = redact(text, personal + private)

    # Those of any model; training also breaks those of its own tokenizer.
    return CONTROL_TOKEN.sub(lambda token: token[0][0] + " " + token[0][1:], redacted)


def clean_words(text: str, left_out: Counter, post: Post, settings: Settings) -> str:
    """The same; the words that go are added to left_out."""
    return counted_as("personal data", left_out, text, clean_for_training(text, post, settings))


def redact(text: str, found: list[Found]) -> str:
    """The text with [email], [private] and so on in place of what was found; two that overlap become the first."""
    out = []
    position = 0
    for one in sorted(found, key=lambda one: (one.start, -one.end)):
        if one.start >= position:
            out += [text[position : one.start], f"[{one.kind}]"]
        position = max(position, one.end)
    return "".join(out) + text[position:]


def hide_in_origins(posts: list[Post], blocked: tuple[str, ...]):
    """Replaces private words in the names that say where a text is from; says so, since no file has these names."""
    hidden = 0
    for post in posts:
        # Only the path counts: the name of the repository is that of all its posts.
        found = find_blocked(post.path, blocked)
        hidden += bool(found)
        post.blocked.update(one.normalised for one in found)
        post.path = redact(post.path, found)
        post.blog = without_blocked(post.blog, blocked)
        post.detail = without_blocked(post.detail, blocked)

    if hidden:
        say(f"files with a private word in their names, [private] in the data: {hidden:,}")


def without_blocked(text: str, blocked: tuple[str, ...]) -> str:
    return redact(text, find_blocked(text, blocked))


@functools.cache
def fingerprint(normalised: str, key: bytes) -> str:
    """What the report has in place of an address, a number or a key that was replaced; 64 hexadecimal digits.

    There are so few telephone numbers that a plain hash can be undone by trying them all. With the key each try needs
    16 ms of a core and 4 MiB, the million numbers of an area code four to five hours: the key is as private as they."""
    return hashlib.scrypt(encode(normalised), salt=key, n=2**12, r=8, p=1, dklen=32).hex()


def read_key(data_dir: Path) -> bytes | None:
    """The key of the data folder's fingerprints; None if there is none or it cannot be read."""
    try:
        key = bytes.fromhex(read_regular(data_dir / KEY_FILE, 100).decode("ascii"))
    except (OSError, ValueError):
        return None
    return key if len(key) == 32 else None


def read_or_make_key(data_dir: Path) -> bytes:
    """The key is kept, so that the same blog gives the same bytes. Exits if it is broken, or a link."""
    file = data_dir / KEY_FILE
    key = read_key(data_dir) if os.path.lexists(file) else secrets.token_bytes(32)
    if key is None or file.is_symlink():
        sys.exit(f"{file} cannot be read or is no key of this script: move it away, and a new one will be made.")
    return key


# ---------------------------------------------------------------- requests
# Untitled, a date, a number, signs only: no request can be made of it.
PLACEHOLDER = re.compile(
    r"\W*(?i:untitled|no (?:title|subject)|title|none|null|nil|n/a|test|blog|post|\d{4}\W\d\d?\W\d\d?.*|[\d\W]*)\W*"
)
# What is left of a title or tag that was only a name.
REDACTED = re.compile(r"\W*\[(?:private|secret|email|card|iban|ip|phone)\]\W*")
HANDLE = re.compile(r"@\w+|(?=\w*[a-z])(?=\w*\d)[a-z]\w+|[a-z0-9]+_\w+", re.I)
DULL_TAGS = {"uncategorized", "general", "misc", "blog", "post", "posts", "other", "default", "livejournal", "all"}
LONGEST_TITLE = 200  # characters; a longer one is a misplaced paragraph
TAG_LENGTHS = range(3, 40)  # characters


def split_group(post: Post) -> str:
    """Posts with the same day and title are one: a draft beside its post, a post in both repositories."""
    title_words = words_of(post.title)
    return f"{post.date} {title_words}" if post.date and title_words else f"{post.blog}/{post.path}"


def read_tags(meta: dict, post: Post, settings: Settings) -> list[str]:
    tags = meta.get("tags")
    if isinstance(tags, str):  # Jekyll splits only at spaces, but "cats, dogs" means two tags
        tags = tags.split("," if "," in tags else None)
    return [clean_for_training(clean_title(tag), post, settings) for tag in strings(tags)]


def make_request(post: Post, tags: list[str], settings: Settings) -> str:
    """The user's message that the post answers: made of a title that gives nothing away, of the tags, or general."""
    # By the path and not by chance: the same blog gives the same bytes.
    origin = f"{post.blog}/{post.path}"
    number = zlib.crc32(encode(origin))
    if is_telling(post.title) and not repeats_title(post):
        request = choose(settings.title_requests, number)
        return request.format(post.title)

    # Half of the posts with tags get a request with them, the others a general one, since people use both.
    useful = [tag for tag in tags if len(tag) in TAG_LENGTHS and tag.lower() not in DULL_TAGS]
    topics = [tag for tag in useful if not (URL.fullmatch(tag) or REDACTED.fullmatch(tag))]
    if topics and number % 2:
        request = choose(settings.tag_requests, number // 2)
        wanted = " and ".join(topics[:2])
        return request.format(wanted)
    return choose(settings.general_requests, number // 2)


def choose(requests: Sequence[str], number: int) -> str:
    return requests[number % len(requests)]


def is_telling(title: str) -> bool:
    is_useless = any(useless.fullmatch(title) for useless in (PLACEHOLDER, REDACTED, URL, HANDLE))
    return len(title) <= LONGEST_TITLE and bool(words_of(title)) and not is_useless


def repeats_title(post: Post) -> bool:
    """Whether the post begins with the words of its title: a request with that title would contain the answer."""
    title_words = words_of(post.title)
    opening = post.text[: 8 * len(post.title) + 200]  # has as many words, however many signs are between them
    return words_of(opening)[: len(title_words)] == title_words


# ---------------------------------------------------------------- replies
OPENING = 200  # characters of a post that a reader quotes
YES = ("true", "yes", "on", "y")
MOST_COMMENTS = 5000  # of a post; an alias in YAML can unfold to millions
# Names of the text of a comment; each program has its own.
CONTENT = ("content", "message", "body", "text", "comment")
# What names the comment that one answers; a number may count the comments that answer none.
LINKS = ("replying_to_uid", "replyToId", "replying_to", "reply_to", "replyTo", "in_reply_to", "parent_id", "parent")
PAGE_LINK = "_parent"  # the same, but mostly of the page


class Comment(NamedTuple):
    parent: str  # key of the comment that it answers; "" if it answers the post
    author: str
    content: str


def read_comments(comments: object) -> dict[str, Comment]:
    """Comments in their usual spellings, by their keys; nested replies become comments with a parent."""
    found = {}
    waiting = [(comments, "")]  # (list of comments, key of the comment that contains it)
    while waiting and len(found) < MOST_COMMENTS:
        items, above = waiting.pop()
        for item in mappings_in(items):
            # Without an id, or with another comment's, it can still be answered by comments nested in it.
            key = first_of(item, "id", "_id")
            if not key or key in found:
                key = f"number {len(found)}"

            parent = first_of(item, "parent", "parent_id", "replying_to", "reply_to")
            if parent in ("", "0", "null", "~"):
                parent = above

            author = first_of(item, "author", "name").casefold()
            found[key] = Comment(parent, author, first_of(item, *CONTENT))
            waiting += [(item[name], key) for name in ("replies", "children") if name in item]
    return found


def comments_in_files(post: Post, settings: Settings) -> dict[str, Comment]:
    """The comments of Staticman's files by their keys, in order of time; what is hidden is left out.

    A comment of the author's that names none answers the one before it."""
    items = {}
    for file in post.comment_files:
        for number, item in enumerate(load_comments(file, post.repairs, settings.max_bytes)):
            if str(item.get("hidden")).lower() in YES or len(items) == MOST_COMMENTS:
                words = count_words(first_of(item, *CONTENT))
                post.found += words
                post.left_out["hidden comments"] += words
                continue

            # No key is that of a comment in the front matter.
            name = first_of(item, "_id", "id", "uid")
            key = f"in files: {name}"
            if not name or key in items:
                key = f"in files: {name}{file.stem} {number}"
            items[key] = item

    tops = [key for key, item in items.items() if not first_of(item, *LINKS)]
    found = {}
    for key, item in sorted(items.items(), key=lambda entry: time_of(entry[1])):
        author = first_of(item, "author", "name").casefold()
        parent = parent_of(item, items.keys() - {key}, tops)
        if not parent and author in settings.authors:
            parent = next(reversed(found), "")
        found[key] = Comment(parent, author, first_of(item, *CONTENT))
    return found


def load_comments(file: Path, repairs: Counter, max_bytes: int) -> list[dict]:
    """A file holds a comment, a list of them, or a mapping of names to comments."""
    try:
        data = read_regular(file, max_bytes)
        text = decode(data, repairs) if len(data) <= max_bytes else None
        loaded = parse_yaml((text or "").replace("\t", "  "))
    except (OSError, yaml.YAMLError, RecursionError):
        text = None

    # The post is kept without them, and the report says so.
    if text is None:
        repairs["file of comments not readable"] += 1
        return []

    # A mapping of names to comments, unlike a comment, holds mappings.
    if isinstance(loaded, dict) and any(isinstance(value, dict) for value in loaded.values()):
        loaded = list(loaded.values())
    return mappings_in(loaded if isinstance(loaded, list) else [loaded])


def parent_of(item: dict, keys: Set[str], tops: list[str]) -> str:
    """The key of the comment that a comment names; "" if it names none of these."""
    for name in (*LINKS, PAGE_LINK):
        link = first_of(item, name)
        if f"in files: {link}" in keys:
            return f"in files: {link}"
        if name != PAGE_LINK and link.isdecimal() and 0 < int(link[:9]) <= len(tops):
            return tops[int(link) - 1]
    return ""


def time_of(item: dict) -> float:
    """Seconds since 1970 of "1554242400", "1554242400000" or "2019-04-02T22:00:00Z"; 0 if there is no such date."""
    text = first_of(item, "date", "timestamp", "created_at", "published")
    try:
        moment = datetime.fromtimestamp(int(text[:10]), UTC) if text.isdecimal() else datetime.fromisoformat(text)
    except (ValueError, OverflowError):
        return 0
    return moment.replace(tzinfo=moment.tzinfo or UTC).timestamp()


def add_replies(post: Post, comments: dict[str, Comment], settings: Settings):
    """Conversations that hold each of the author's comments once, after the comments that it answers."""

    # Cached because cleaning also records in the post what it redacts, and each comment must be counted once.
    @functools.cache
    def said(key: str) -> str:
        if key not in comments:
            return ""
        is_own = comments[key].author in settings.authors
        left_out = post.left_out if is_own else Counter()
        source = strip_markup(comments[key].content, {}, left_out)
        text, _ = to_text(source, bool(PARAGRAPH_TAG.search(source)), "", "keep", left_out)
        return clean_words(text, left_out, post, settings)

    others = [comment.content for comment in comments.values() if comment.author not in settings.authors]
    post.left_out["other people's comments"] += sum(map(count_words, others))
    own = {key for key, comment in comments.items() if comment.author in settings.authors and said(key)}
    found = {}  # by the key of the last comment
    learnt = set()

    # The deepest first: its conversation holds most of the others, which would be learnt twice.
    # The own comments are taken from all of them: of a set the order would be another each time.
    in_order = sorted(comments, key=lambda key: depth_of(key, comments), reverse=True)
    for key in filter(own.__contains__, in_order):
        if key in learnt:
            post.cases["within a longer conversation"] += 1
            continue
        chain = chain_of(key, comments, said, own, learnt, settings.reply_depth)
        learnt.update(own.intersection(chain))
        turns = [("assistant" if one in own else "user", said(one)) for one in chain]

        # A thread that begins with the author answers the post, or a missing comment: a reader quotes the post.
        case = "answers a comment"
        stand_in = turns[0][0] == "assistant"
        if stand_in:
            case = "answers a missing comment" if comments[key].parent else "comments on the post"
            turns.insert(0, ("user", quote_post(post, settings.reply_context)))

        if turns[0][1]:
            found[key] = Reply(merge_turns(turns), stand_in)
        else:
            case = "left out, answers nothing"
            post.left_out["comments that answer nothing"] += sum(count_words(said(one)) for one in chain if one in own)
        post.cases[case] += 1
    post.replies += [found[key] for key in comments if key in found]


def depth_of(key: str, comments: dict[str, Comment]) -> int:
    """How many comments a comment answers, one by way of the other, itself included."""
    seen = set()
    while key in comments and key not in seen:
        seen.add(key)
        key = comments[key].parent
    return len(seen)


def chain_of(
    key: str, comments: dict[str, Comment], said: Callable[[str], str], own: set[str], learnt: set[str], depth: int
) -> list[str]:
    """Keys of a comment and of those that it answers, oldest first; ends at a cycle, a gap or an empty comment.

    Begins with a reader's comment if there is one, and holds nothing of the author's that is in another chain."""
    chain = []
    seen = set()
    while key not in seen and said(key):
        # A reader's comment has begun it: older ones are its context, as many as are wanted.
        is_whole = bool(chain) and chain[-1] not in own
        if is_whole and (len(chain) > depth or key in learnt):
            break
        if key not in learnt:
            chain.append(key)
        seen.add(key)
        key = comments[key].parent
    return chain[::-1]


def add_chat(post: Post, chat: list[Said], settings: Settings):
    """A conversation of a chat in which the author speaks; of any other only who spoke is noted."""
    authors = {plain_speaker(name) for name in settings.authors}
    own_names = {said.speaker for said in chat if plain_speaker(said.speaker) in authors}
    others = [said.words for said in chat if said.speaker not in own_names]
    post.left_out["names and times in chats"] += sum(count_words(said.lines) - count_words(said.words) for said in chat)
    post.left_out["other people's lines in chats"] += sum(map(count_words, others))
    if not own_names:
        post.speakers.append(Counter(said.speaker for said in chat if said.speaker))
        return

    turns = []
    for said in chat:
        is_own = said.speaker in own_names
        left_out = post.left_out if is_own else Counter()
        text = clean_words(clean_lines(said.words, left_out), left_out, post, settings)
        turns.append(("assistant" if is_own else "user", text))

    # What is said behind the author's last line is answered by nobody.
    turns = [turn for turn in turns if turn[1]]
    while turns and turns[-1][0] == "user":
        turns.pop()
    if not turns:
        return

    if turns[0][0] == "assistant":
        number = zlib.crc32(encode(turns[0][1]))
        turns.insert(0, ("user", choose(settings.general_requests, number)))
    post.replies.append(Reply(merge_turns(turns, "\n"), stand_in=False))
    post.cases["speaks in a chat"] += 1


def merge_turns(turns: list[tuple[str, str]], between: str = "\n\n") -> list[dict]:
    """Messages in which user and assistant alternate: consecutive texts of one of them become one message."""
    messages = []
    for role, same in groupby(turns, lambda turn: turn[0]):
        content = between.join(text for _, text in same)
        messages.append({"role": role, "content": content})
    return messages


def quote_post(post: Post, template: str) -> str:
    """The post as a reader would mention it: its title and opening; empty if it has neither."""
    opening = post.text[: 2 * OPENING].split("\n\n")[0]
    if len(opening) > OPENING:
        opening = opening[:OPENING].rpartition(" ")[0] + " ..."

    # A title that is only a name or a date says nothing of the post.
    title = "" if PLACEHOLDER.fullmatch(post.title) or REDACTED.fullmatch(post.title) else post.title
    if not title and not opening:
        return ""
    called = f' "{title}".' if title else "."
    begins = f" It begins:\n\n{opening}" if opening else ""
    return template.format(called, begins)


# ---------------------------------------------------------------- other people's posts
LEAST_CHATS = 3  # in which a name speaks that may be another one of the author's
MOST_NAMES = 5  # that a message lists


def count_speakers(posts: list[Post], settings: Settings) -> list[dict]:
    """Who speaks in many chats in which no name of AUTHORS does; the one in most chats first."""
    # Two spellings are one speaker; the first one is shown.
    lines = Counter()
    chats = Counter()
    typed = {}
    for speakers in (chat for post in posts for chat in post.speakers):
        for name, number in speakers.items():
            lines[plain_speaker(name)] += number
            typed.setdefault(plain_speaker(name), name)
        chats.update(set(map(plain_speaker, speakers)))

    found = [(-number, plain) for plain, number in chats.items() if number >= LEAST_CHATS]
    rows = []
    for _, plain in sorted(found):
        # The report holds no blocked word.
        name = without_blocked(typed[plain], settings.blocked_words)
        rows.append({"name": name, "lines": lines[plain], "chats": chats[plain]})
    return rows


def drop_other_authors(posts: list[Post], settings: Settings):
    """Leaves out what others wrote; if nobody has one of the names in the settings, says so and leaves out nothing."""
    # A name that nobody has is probably the settings' example; with it every signed post would be left out. The cases
    # of a post are of comments that the author has written.
    authors = settings.authors
    if not settings.author_is_given and not any(post.cases or authors.intersection(post.authors) for post in posts):
        names = " or ".join(f'"{name}"' for name in sorted(authors))
        remedy = "Use --author NAME if you sign differently."
        say(f"No post or comment is by {names}, so every post is treated as yours. {remedy}")
        return

    others = Counter()
    for post in posts:
        # A guest's post is dropped, but the author's replies below it stay.
        is_others = post.authors and not authors.intersection(post.authors)
        if is_others and not post.reason:
            leave_out(post, "other authors")
            post.detail = ", ".join(post.authors)
            post.reason = "" if post.replies else "other author"
            others.update(post.authors)

    # A mistyped name would otherwise cost these posts without a word.
    unsigned = authors.difference(*[post.authors for post in posts])
    if others and unsigned:
        names = " or ".join(f'"{name}"' for name in sorted(unsigned))
        theirs = ", ".join(f'{number:,} by "{name}"' for name, number in others.most_common(MOST_NAMES))
        theirs = without_blocked(theirs, settings.blocked_words)
        say(f"No post is by {names}. Left out as other people's: {theirs}. Add your names to AUTHORS.")


# ---------------------------------------------------------------- near-duplicates
SHINGLE = 5  # words


def drop_duplicates(posts: list[Post], similarity: float):
    """Keeps one of each group of near-duplicates: a public one, the longest; of the others only new replies."""
    # Posts that are kept only for their replies have nothing to be compared.
    texts = [post for post in posts if not post.reason and post.text]

    def order(post: Post) -> tuple[bool, int]:
        """Of two equal posts the public one comes first, so that no private copy stays without need."""
        is_private = post.visibility != "public"
        return is_private, -len(post.text)

    texts.sort(key=order)
    shingles = [post.shingles for post in texts]
    duplicates = find_duplicates(shingles, similarity)
    for number, earlier in duplicates.items():
        drop_duplicate(texts[number], texts[earlier])


def drop_duplicate(post: Post, kept: Post):
    """Leaves of a post only the answers that its kept copy does not have."""
    leave_out(post, "duplicates")
    post.left_out["duplicates"] += kept_words(post)
    known = {turn["content"] for reply in kept.replies for turn in reply.messages[1::2]}
    replies = []
    for reply in post.replies:
        messages = without_known(reply.messages, known)
        if messages:
            stand_in = reply.stand_in and messages[0] is reply.messages[0]
            replies.append(Reply(messages, stand_in))
    post.replies = replies
    post.left_out["duplicates"] -= kept_words(post)

    # Its replies refer to the text that is kept: they belong to the same side of the split.
    post.group = kept.group
    kept.copies.append(post.path)
    if not post.replies:
        post.reason = "duplicate"
        post.detail = f"{kept.blog}/{kept.path}"


def without_known(turns: list[dict], known: set[str]) -> list[dict]:
    """A conversation without the answers that are known, if these are its first or last ones."""
    while turns and turns[1]["content"] in known:
        turns = turns[2:]
    while turns and turns[-1]["content"] in known:
        turns = turns[:-2]
    return turns


def shingle_hashes(words: list[str]) -> np.ndarray:
    """Sorted distinct 64-bit hashes of a text's word 5-grams; a shorter text is one shingle."""
    # Hashes of numbers are the same in every process, unlike those of strings.
    codes = [zlib.crc32(encode(word)) for word in words]
    hashes = set()
    for start in range(max(1, len(codes) - SHINGLE + 1)):
        shingle = codes[start : start + SHINGLE]
        hashes.add(hash(tuple(shingle)))
    return np.sort(np.fromiter(hashes, np.int64))


def find_duplicates(sets: list[np.ndarray], threshold: float) -> dict[int, int]:
    """For each text that is near an earlier kept one, the index of that one; near by the Jaccard index, exactly.

    Two sets that have so much in common share one of the rarest shingles of either, so that only texts with such a
    shingle are compared: prefix filtering, https://doi.org/10.1109/ICDE.2006.9"""
    everything = np.concatenate([np.array([], np.int64), *sets])
    values, times = np.unique(everything, return_counts=True)
    kept = defaultdict(list)  # rare shingle: texts that are kept
    near = {}
    for number, hashes in enumerate(sets):
        # Rare ones first; what stands in this text alone is near to nothing.
        counts = times[np.searchsorted(values, hashes)]
        most = len(hashes) - int(threshold * len(hashes)) + 1
        rarest = np.argsort(counts, kind="stable")[:most]
        shared = hashes[rarest[counts[rarest] > 1]].tolist()

        # Of the earlier texts only kept ones count: a text that is near a dropped one alone stays.
        candidates = sorted({text for shingle in shared for text in kept[shingle]})
        match = next((text for text in candidates if is_near(hashes, sets[text], threshold)), None)
        if match is not None:
            near[number] = match
            continue
        for shingle in shared:
            kept[shingle].append(number)
    return near


def is_near(one: np.ndarray, other: np.ndarray, threshold: float) -> bool:
    common = np.intersect1d(one, other, assume_unique=True).size
    return common >= threshold * (one.size + other.size - common)


# ---------------------------------------------------------------- split
def split_posts(posts: list[Post], share: float) -> dict[str, list[Post]]:
    chosen = choose_validation(posts, share)
    train = [post for number, post in enumerate(posts) if number not in chosen]
    validation = [post for number, post in enumerate(posts) if number in chosen]
    return {"train": train, "validation": validation}


def choose_validation(posts: list[Post], share: float) -> set[int]:
    """Indexes of the posts for validation: whole groups, each by a hash of its own name alone.

    In a small blog chance could hold out none, or a third: at least one post is held out, from 20 posts on two, and at
    most twice the share. Only there can a new post move another."""
    groups = defaultdict(list)
    for number, post in enumerate(posts):
        groups[post.group].append(number)
    chances = []
    for members in groups.values():
        chance = chance_of([posts[number] for number in members])
        chances.append((chance, members))

    fewest = 2 if len(posts) >= 20 else 1
    most = max(1, int(2 * share * len(posts)))
    chosen = set()
    for chance, members in sorted(chances):
        # With all of the posts in one group none can be held out.
        is_first = not chosen and len(posts) > len(members)
        is_wanted = chance < share or 0 < len(chosen) < fewest
        has_room = len(chosen) + len(members) <= most
        if is_first or (is_wanted and has_room):
            chosen.update(members)
    return chosen


def chance_of(members: list[Post]) -> float:
    """From 0 to 1, by the first name of a group: names begin with a date, so that a later copy changes nothing."""
    first = min(slug_of(Path(path)) for post in members for path in (post.path, *post.copies))
    digest = hashlib.sha256(encode(first)).digest()
    return int.from_bytes(digest[:8]) / 2**64


# ---------------------------------------------------------------- data folder
TRAIN_FILE = "train_data.jsonl"
VALIDATION_FILE = "val_data.jsonl"
REPORT_FILE = "extraction_report.json"
LINE_FIELDS = {"messages", "kind", "visibility", "blog", "path"}
# The fields that show that a file was written by this script.
OWN_FIELDS = {TRAIN_FILE: LINE_FIELDS, VALIDATION_FILE: LINE_FIELDS, REPORT_FILE: {"files_found"}}
LARGEST_OWN = 200_000_000  # bytes of our report, or of a line of our data; a guess
# What a run writes before it moves it into place, with the run's process.
TEMPORARY = re.compile(rf"\.(?:{'|'.join(map(re.escape, (KEY_FILE, *OWN_FIELDS)))})\.([1-9][0-9]{{0,6}})")
ANOTHER = "name another data folder with --data-dir"


def check_data_folder(folder: Path, sites: list[Site]):
    """Exits with a sentence if data cannot or must not be written there; says who could read it."""
    # The folder, or the nearest one above it in which it would be made.
    existing = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    if not is_folder(existing):
        sys.exit(f"{existing} is not a folder: {ANOTHER}.")
    if not os.access(existing, os.W_OK | os.X_OK):
        sys.exit(f"You may not write in {existing}: {ANOTHER}.")

    # Neither a folder with a meaning of its own nor a file of somebody else's may be changed.
    check_surroundings(folder, sites)
    for name in OWN_FIELDS:
        file = folder / name
        if os.path.lexists(file):
            check_own(file)

    mode = stat.S_IMODE(existing.stat().st_mode)
    if existing == folder and mode & 0o077:
        say(f"Others can list {folder} (mode {mode:o}), but not read what is written there: chmod 700 {folder}")


def check_surroundings(folder: Path, sites: list[Site]):
    """Exits where data would be among other things; says so where it would be published."""
    real = Path(os.path.realpath(folder))
    home = os.path.expanduser("~")  # noqa: PTH111, since Path.home raises where no home is known
    if Path(os.path.realpath(home)).is_relative_to(real):
        sys.exit(f"{folder} is the home folder or contains it: {ANOTHER}.")

    for site in sites:
        if not real.is_relative_to(site.repository):
            continue
        inside = real.relative_to(site.repository)
        if not inside.parts or folder_end(inside, site):
            sys.exit(f"{folder} is a blog's repository or its folder of posts: {ANOTHER}.")
        say(f"{folder} is in the repository {site.repository}: Jekyll or git would publish what is written there.")


def check_own(file: Path):
    """Exits unless the file was written by an earlier run, or is empty."""
    status = file.lstat()
    if not stat.S_ISREG(status.st_mode):
        sys.exit(f"{file} is not a regular file: move it away, or {ANOTHER}.")
    if not status.st_size:
        return

    # The report is one JSON object, the data has one on each line.
    with file.open("rb") as opened:
        data = opened.read(LARGEST_OWN) if file.name == REPORT_FILE else opened.readline(LARGEST_OWN)
    try:
        entry = json.loads(data)
    except (ValueError, RecursionError):
        entry = None
    if not isinstance(entry, dict) or not entry.keys() >= OWN_FIELDS[file.name]:
        sys.exit(f"{file} was not written by this script and would be replaced: move it away, or {ANOTHER}.")


def sweep(folder: Path):
    """Deletes what killed runs left beside the data: files with a name of ours whose process is gone."""
    for path in folder.iterdir():
        name = TEMPORARY.fullmatch(path.name)
        if not name or (psutil.pid_exists(int(name[1])) and int(name[1]) != os.getpid()):
            continue
        with contextlib.suppress(FileNotFoundError):  # a second run may delete it at the same time
            if stat.S_ISREG(path.lstat().st_mode):
                path.unlink()


def conversations(post: Post) -> Iterator[dict]:
    """The lines of the data files: messages, "post" or "reply", and where they are from."""
    origin = {key: getattr(post, key) for key in ("visibility", "blog", "path", "title", "date")}
    if post.text:
        messages = [{"role": "user", "content": post.request}, {"role": "assistant", "content": post.text}]
        yield {"messages": messages, "kind": "post", **origin}
    for reply in post.replies:
        mark = {"stand_in": True} if reply.stand_in else {}
        yield {"messages": reply.messages, "kind": "reply", **mark, **origin}


def json_lines(posts: list[Post]) -> bytes:
    lines = [json.dumps(line, ensure_ascii=False) + "\n" for post in posts for line in conversations(post)]
    return encode("".join(lines))


def write_files(folder: Path, files: dict[str, bytes]):
    """Writes all files beside their places and moves them when every one is complete. Raises OSError.

    Each file is always complete, old or new. A kill between two moves leaves some of each: then the digests in the
    report, which is moved last, are not those of the data."""
    if not folder.is_dir():
        folder.mkdir(0o700, parents=True)
        folder.chmod(0o700)  # whatever the umask is
    sweep(folder)

    beside = {}  # where a file is written: its place
    with signals_wait():
        try:
            for name, data in files.items():
                place = folder / name
                with errors_named(place):
                    path = folder / f".{name}.{os.getpid()}"
                    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
                    beside[path] = place
                    write_to_disk(handle, data)

            for path, place in beside.items():
                with errors_named(place):
                    path.replace(place)
        finally:
            for path in beside:
                path.unlink(missing_ok=True)


def write_to_disk(handle: int, data: bytes):
    """Writes and closes a file; only what is on the disk may replace an old file."""
    with os.fdopen(handle, "wb") as out:
        os.fchmod(handle, 0o600)  # whatever the umask is
        out.write(data)
        out.flush()
        os.fsync(handle)


@contextlib.contextmanager
def errors_named(file: Path) -> Iterator[None]:
    """An OSError in the block names this file: the error of a full disk names none, others the temporary one."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(file)) from error


# ---------------------------------------------------------------- report
MOST_ROWS = 5  # of a list in the summary
FAR_OFF = 0.5  # of VALIDATION_SHARE: a share that differs by more is said
MOST_LOSERS = 20  # posts of which the report says by kind what is left out
# Of held-out posts, for the report's question "Is it you?": eleven chunks of 100 words (voice/style.py).
WORDS_OF_READER = 1_100


def make_report(
    posts: list[Post], splits: dict[str, list[Post]], settings: Settings, sites: list[Site], key: bytes
) -> dict:
    """Numbers of the run, then every skipped file; of what was redacted fingerprints, of private words only counts."""
    kept = [post for members in splits.values() for post in members]
    skipped = [(post.blog, post.path, post.reason, post.detail) for post in posts if post.reason]

    # Of an address that stands in several posts one fingerprint is enough; private words are told by their numbers.
    redacted = set()
    redactions = Counter()
    for post in kept:
        for kind, typed in post.redacted:
            redacted.add((fingerprint(typed, key), kind, post.visibility))
            redactions[kind] += 1
    blocked = sum((post.blocked for post in kept), Counter())
    redactions["private word"] = blocked.total()

    # Names and problems may contain private words, too.
    hide = functools.partial(without_blocked, blocked=settings.blocked_words)
    problems = [(hide(site.repository.name), hide(site.problem)) for site in sites if site.problem]

    # test_model.py recognises by the fingerprints what the model must not say.
    return {
        "files_found": len(posts),
        "files_kept": len(kept),
        "files_skipped": total([Counter(reason for _, _, reason, _ in skipped)]),
        "config_problems": table(("blog", "problem"), problems),
        "posts": {split: len(members) for split, members in splits.items()},
        "validation_share": settings.validation_share,
        "words": {split: sum(map(kept_words, members)) for split, members in splits.items()},
        "conversations": table(("split", "kind", "visibility", "count"), count_conversations(splits)),
        "replies": total(post.cases for post in kept),
        "repairs": total(post.repairs for post in kept),
        "redactions": total([redactions]),
        "blocked_words": [blocked[str(index)] for index in range(len(settings.blocked_words))],
        "redacted": table(("fingerprint", "kind", "visibility"), sorted(redacted)),
        "authors": [hide(author) for author in sorted(settings.authors)],
        "skipped": table(("blog", "path", "reason", "detail"), skipped),
    }


def tell_share(posts: dict[str, int], wanted: float) -> list[str]:
    """A sentence where chance held out far more or fewer posts than the setting says."""
    total = sum(posts.values())
    held_out = posts["validation"]
    share = held_out / total
    if total == 1 or abs(share - wanted) <= FAR_OFF * wanted:
        return []

    said = f"{held_out:,} of {total:,} posts are held out, {share:.0%} instead of {wanted:.0%}"
    return [f"{said}: chance decides for each post alone, so that a new one moves no other"]


def count_unread(unread: list[Unread], settings: Settings) -> list[dict]:
    """A row for each source that is not read, the one with most words first."""
    files = Counter()
    words = Counter()
    for one in unread:
        # Names of folders may contain private words.
        names = (one.blog, one.source, one.remedy)
        source = tuple(without_blocked(name, settings.blocked_words) for name in names)
        number = count_file(one.file, settings)
        files[source] += number > 0
        words[source] += number

    rows = [(*source, files[source], number) for source, number in words.most_common() if number]
    return table(("blog", "source", "remedy", "files", "words"), rows)


def count_file(file: Path, settings: Settings) -> int:
    """The words of a file of comments, or of a page with front matter; none if it only lists other pages, in Liquid."""
    if file.suffix.lower() not in MARKDOWN_SUFFIXES:
        comments = load_comments(file, Counter(), settings.max_bytes)
        return sum(count_words(first_of(comment, *CONTENT)) for comment in comments)
    try:
        text = read_regular(file, settings.max_bytes).decode("utf-8", "replace").lstrip("\ufeff")
    except OSError:
        return 0

    # Hugo's front matter in TOML counts, too.
    fence = text[:3]
    if fence not in ("---", "+++"):
        return 0
    body = text[3:].partition(f"\n{fence}")[2]
    beginning = strip_markup(body[:MOST_LOOKED_AT], {}, Counter())
    return count_words(body) if count_words(beginning) >= settings.min_words else 0


def make_ledger(posts: list[Post], not_read: list[dict]) -> dict:
    """Where the words are: found = kept in posts and replies + left out, by kind; a negative number was put in."""
    unread = sum(row["words"] for row in not_read)
    left_out = Counter({"sources that are not read": unread})
    for post in posts:
        left_out.update(post.left_out)

    # Where a rule takes too much, it shows in the posts that lose most.
    losers = sorted(posts, key=lambda post: post.left_out.total(), reverse=True)
    rows = []
    for post in losers[:MOST_LOSERS]:
        rows.append((post.blog, post.path, post.found, kept_words(post), nonzero(post.left_out)))
    return {
        "found": sum(post.found for post in posts) + unread,
        "kept_in_posts": sum(post.words for post in posts),
        "kept_in_replies": sum(reply.words for post in posts for reply in post.replies),
        "left_out": nonzero(left_out),
        "posts_that_lose_most": table(("blog", "path", "found", "kept", "left_out"), rows),
    }


def nonzero(counts: Counter) -> dict[str, int]:
    return {kind: number for kind, number in counts.most_common() if number}


def ledger_rows(ledger: dict) -> dict[str, int]:
    """The ledger as it is printed: what is above a hundredth by its kind, the rest as one row."""
    most = {kind: words for kind, words in ledger["left_out"].items() if words > ledger["found"] / 100}
    others = sum(ledger["left_out"].values()) - sum(most.values())
    return {
        "words found": ledger["found"],
        "  kept in posts": ledger["kept_in_posts"],
        "  kept in replies and chats": ledger["kept_in_replies"],
        **{f"  left out: {kind}": words for kind, words in most.items()},
        "  left out: other kinds (see the report)": others,
    }


def count_conversations(splits: dict[str, list[Post]]) -> list[tuple]:
    """Rows of split, kind, visibility and number of conversations."""
    numbers = Counter()
    for split, members in splits.items():
        for post in members:
            for line in conversations(post):
                row = (split, line["kind"], line["visibility"])
                numbers[row] += 1
    return [(*key, number) for key, number in sorted(numbers.items())]


def total(counts: Iterable[Counter]) -> dict[str, int]:
    return dict(sorted(sum(counts, Counter()).items()))


def table(names: tuple[str, ...], rows: list[tuple]) -> list[dict]:
    return [dict(zip(names, row, strict=True)) for row in rows]


def print_report(report: dict, data_dir: Path):
    """A row for each number of the report; problems first, since they put the other rows in doubt."""
    rows = {}
    if report["config_problems"]:
        rows["_config.yml not applied in full"] = len(report["config_problems"])
    rows["files found"] = report["files_found"]
    rows["  kept"] = report["files_kept"]
    for reason, number in report["files_skipped"].items():
        rows[f"  skipped: {reason}"] = number

    rows |= ledger_rows(report["ledger"])
    for split, number in report["words"].items():
        rows[f"words, {split}"] = number
    for line in report["conversations"]:
        rows[f"{line['split']}: {line['visibility']} {line['kind']} conversations"] = line["count"]

    for key, label in {"replies": "replies", "repairs": "files", "redactions": "redacted"}.items():
        for name, number in report[key].items():
            rows[f"{label}: {name}"] = number
    for row in report["not_read"][:MOST_ROWS]:
        rows[f"not read: {row['source']} ({row['remedy']})"] = row["files"]
    if others := sum(row["files"] for row in report["not_read"][MOST_ROWS:]):
        rows["not read: other folders (see the report)"] = others
    if 0 in report["blocked_words"]:
        # By their place in the setting: the terminal need not show them.
        places = [str(place) for place, uses in enumerate(report["blocked_words"], start=1) if not uses]
        rows[f"BLOCKED_WORDS found nowhere, number {' '.join(places[:MOST_ROWS])}"] = len(places)

    width = max(map(len, rows))
    lines = [f"{name:<{width}} {number:>9,}" for name, number in rows.items()]
    lines += tell_share(report["posts"], report["validation_share"])
    held_out = report["words"]["validation"]
    if held_out < WORDS_OF_READER:
        needed = f"test_model.py --report needs {WORDS_OF_READER:,} to tell whether the model sounds like you"
        lines.append(f"{held_out:,} words are held out, and {needed}: more posts, or a larger VALIDATION_SHARE")
    lines.append(f"written to {data_dir}: {TRAIN_FILE}, {VALIDATION_FILE}, {REPORT_FILE} (lists every skipped file)")
    print_or_exit("\n".join(lines), f"the data are complete, and {data_dir / REPORT_FILE} has the numbers")


# ---------------------------------------------------------------- checked settings
class Kind(NamedTuple):
    """What a value must be."""

    words: str  # "must be ..."
    allows: Callable[[object], bool]
    read: Callable[[str], object] = str  # the value of a flag's text; raises ValueError


class Setting(NamedTuple):
    """A row of a script's table of settings."""

    kind: Kind
    example: str  # a right value, as it is typed
    least: int | None = None  # for a list of this kind: how many entries it needs; None: the setting is no list
    flag: str = ""  # the flag for the same value


def number(low: float, high: float) -> Kind:
    # NaN is in no range.
    def allows(value: object) -> bool:
        return isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high

    return Kind(f"a number from {low:,} to {high:,}", allows, float)


def whole(low: int, high: int) -> Kind:
    within = number(low, high)
    words = f"a whole number from {low:,} to {high:,}"
    return Kind(words, lambda value: isinstance(value, int) and within.allows(value), int)


def above(low: float, high: float) -> Kind:
    within = number(low, high)
    words = f"a number above {low:,} and up to {high:,}"
    return Kind(words, lambda value: within.allows(value) and value != low, float)


def one_of(*names: str) -> Kind:
    *first, last = [f'"{name}"' for name in names]
    words = f"{', '.join(first)} or {last}" if first else last
    return Kind(words, lambda value: isinstance(value, str) and value in names)


def either(one: Kind, other: Kind) -> Kind:
    """Of the two kinds, a flag's text is read as the second; if that fails, it stays text."""
    words = f"{one.words} or {other.words}"
    return Kind(words, lambda value: one.allows(value) or other.allows(value), other.read)


def optional(kind: Kind) -> Kind:
    return either(Kind("None", lambda value: value is None), kind)


def template(places: int) -> Kind:
    """A text with this many {}, and no other braces that str.format would read."""

    def allows(value: object) -> bool:
        if not is_filled(value):
            return False
        without_escaped = re.sub(r"\{\{|\}\}", "", value)
        return re.findall(r"\{\}|[{}]", without_escaped) == ["{}"] * places

    return Kind(f"a sentence with {'exactly one' if places == 1 else places} {{}} in it", allows)


def is_text(value: object) -> bool:
    """Whether it is a text that UTF-8 can hold; a shell may pass bytes of another encoding."""
    return isinstance(value, str) and "\0" not in value and value == value.encode("utf-8", "ignore").decode()


def is_filled(value: object) -> bool:
    return is_text(value) and bool(value.strip())


TEXT = Kind("a text in UTF-8", is_text)  # may be empty
NAME = Kind("a name that is not empty, in UTF-8", is_filled)
SENTENCE = Kind("a sentence in quotation marks, in UTF-8", is_filled)
FOLDER = Kind(
    "the name of a folder, not empty",
    lambda value: isinstance(value, str | os.PathLike) and bool(str(value).strip()) and "\0" not in str(value),
)
YES_OR_NO = Kind("True or False", lambda value: isinstance(value, bool))


def check_settings(values: Mapping[str, object], rows: Mapping[str, Setting], script: str):
    """Exits with a sentence at the first value that the row of its name does not allow; `script` holds the settings."""
    for name, value in values.items():
        setting = rows[name]
        example = f"{name} = {setting.example}"
        entries = {name: value}

        # In a list each entry is checked, and named by its number.
        if setting.least is not None:
            is_list = isinstance(value, list | tuple)
            is_long_enough = is_list and len(value) >= setting.least
            if not is_long_enough:
                at_least = " with something in it" if setting.least else ""
                sys.exit(f"{name} in {script} must be a list{at_least}: {example}.")
            entries = {f"Number {place} of {name}": entry for place, entry in enumerate(value, 1)}

        for what, entry in entries.items():
            if not setting.kind.allows(entry):
                sys.exit(f"{what} in {script} must be {setting.kind.words}: {example}.")


def flag_type(setting: Setting) -> Callable[[str], object]:
    """For argparse's type=: the value of a flag's text, which must be one that the setting allows."""

    def read(text: str) -> object:
        value = text
        with contextlib.suppress(ValueError):
            value = setting.kind.read(text)
        if not setting.kind.allows(value):
            raise argparse.ArgumentTypeError(f"{reprlib.repr(text)} must be {setting.kind.words}")
        return value

    return read


def parser_of(script: str, description: str) -> argparse.ArgumentParser:
    """A parser whose every error is one sentence and exit status 1."""
    parser = argparse.ArgumentParser(prog=script, description=description, allow_abbrev=False)
    parser.error = lambda message: sys.exit(f"{script}: {message} (--help lists the flags)")
    parser.print_help = lambda: print_or_exit(parser.format_help(), f"the flags are at the end of {script}", end="")
    return parser


# ---------------------------------------------------------------- command line
COUNTRY = Kind(
    "a country's code of two letters", lambda value: is_text(value) and value in phonenumbers.SUPPORTED_REGIONS
)
RELATIVE = Kind(
    "the path of a folder in the repository",
    lambda value: is_filled(value) and not Path(value).is_absolute() and {".", ".."}.isdisjoint(value.split("/")),
)
WORD_OR_WORDS = Kind("a word in quotation marks", lambda value: is_text(value) and any(map(str.isalnum, value)))

# Every setting of the settings block; each is also a field of Settings.
SETTINGS = {
    "PUBLIC_BLOGS": Setting(FOLDER, '["../judytuna-jekyll"]', 0, "--public"),
    "PRIVATE_BLOGS": Setting(FOLDER, '["../judytuna-private"]', 0, "--private"),
    "AUTHORS": Setting(NAME, '["judytuna"]', 1, "--author"),
    "DATA_DIR": Setting(FOLDER, '"data"', flag="--data-dir"),
    "FOLDERS": Setting(RELATIVE, '["_posts"]', 1),
    "INCLUDE_DRAFTS": Setting(YES_OR_NO, "False", flag="--drafts"),
    "MIN_WORDS": Setting(whole(1, 1000), "4"),
    "LINE_BREAKS": Setting(one_of("auto", "keep", "join"), '"auto"'),
    "REDACT": Setting(YES_OR_NO, "True"),
    "PHONE_COUNTRIES": Setting(COUNTRY, '["US"]', 0),
    "BLOCKED_WORDS": Setting(WORD_OR_WORDS, '["Anna", "12 Elm Street"]', 0),
    "REPLY_DEPTH": Setting(whole(1, 100), "4"),
    "VALIDATION_SHARE": Setting(number(0, 0.5), "0.10"),
    "SIMILARITY": Setting(number(0.1, 1), "0.8"),
    "MAX_BYTES": Setting(whole(1, 1_000_000_000), "4_000_000"),
    "MAX_SECONDS": Setting(number(0.01, 3600), "3"),
    "TITLE_REQUESTS": Setting(template(1), """['Write a blog post titled "{}".']""", 1),
    "TAG_REQUESTS": Setting(template(1), '["Write a blog post about {}."]', 1),
    "GENERAL_REQUESTS": Setting(SENTENCE, """["What's on your mind today?"]""", 1),
    "REPLY_CONTEXT": Setting(template(2), '"I just read your blog post{}{} Anything to add?"'),
}


def parse_arguments(argv: list[str] | None) -> Settings:
    """The settings block with the flags applied. Exits with a sentence if a setting or flag is wrong."""
    # A setting whose line is gone is wrong, too.
    block = {name: globals().get(name) for name in SETTINGS}
    check_settings(block, SETTINGS, "extract_blog_data.py")
    here = Path(__file__).resolve().parent
    args = make_parser(here).parse_args(argv)

    # A repository in a flag replaces all those in the settings, also of the other kind.
    public = [here / name for name in PUBLIC_BLOGS]
    private = [here / name for name in PRIVATE_BLOGS]
    if args.public + args.private:
        public = map(Path, args.public)
        private = map(Path, args.private)

    fields = {name.lower(): tuple(value) if isinstance(value, list) else value for name, value in block.items()}

    fields |= {
        "public_blogs": tuple(public),
        "private_blogs": tuple(private),
        "authors": frozenset(name.strip().casefold() for name in args.author or AUTHORS),
        "data_dir": Path(args.data_dir),
        "folders": tuple(name.strip().strip("/") for name in FOLDERS),
        "include_drafts": args.drafts,
        "blocked_words": tuple(word.strip() for word in BLOCKED_WORDS),
    }
    return Settings(**fields, author_is_given=bool(args.author), today=date.today())


def make_parser(here: Path) -> argparse.ArgumentParser:
    parser = parser_of("extract_blog_data.py", __doc__.splitlines()[0])
    shown = str(DATA_DIR).replace("%", "%%")

    def add(name: str, **how):
        setting = SETTINGS[name]
        parser.add_argument(setting.flag, type=flag_type(setting), **how)

    # A flag that may be repeated replaces the list of its setting.
    several = {"action": "append", "default": []}
    add("PUBLIC_BLOGS", **several, metavar="DIR", help="a public repository (repeatable)")
    add("PRIVATE_BLOGS", **several, metavar="DIR", help="a private repository (repeatable)")
    add("AUTHORS", **several, metavar="NAME", help="a name you write under (repeatable)")
    add("DATA_DIR", metavar="DIR", default=str(here / DATA_DIR), help=f"default: {shown}")
    parser.add_argument("--drafts", action="store_true", default=INCLUDE_DRAFTS, help="read _drafts/ too")
    return parser


def main(argv: list[str] | None = None, on_stop: Callable = signal.default_int_handler) -> int:
    hold_closed_streams()
    try:
        with on_signals(on_stop):
            extract(parse_arguments(argv))
    except KeyboardInterrupt:
        sys.exit(STOPPED)
    except BrokenProcessPool:
        sys.exit("A worker process was killed, probably for lack of memory: close other programs and run again.")
    except OSError as error:
        sys.exit(f"Cannot read or write {error.filename or 'the data folder'}: {error.strerror or error}.")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(on_stop=stop_at_once))
    finally:
        # The run is over: a signal must not end it with a traceback.
        for each in STOP_SIGNALS:
            signal.signal(each, signal.SIG_IGN)
