"""Turn a Jekyll blog into conversations that a language model can be trained on.

    python extract_blog_data.py
    python extract_blog_data.py --public sample/public-blog --private sample/private-blog --author wrenlow

Reads every post of the repositories in the settings and writes data/train_data.jsonl, data/val_data.jsonl
(one conversation a line) and data/extraction_report.json (what became of every file). The second command prints:

    files found                                   88
      kept                                        75
      skipped: draft                               2
      skipped: duplicate                           2
      ...
    words, train                              17,297
    words, validation                          2,369
    train: public post conversations              48
    train: public reply conversations             27
    ...
    redacted: email                                4
"""

import argparse
import functools
import hashlib
import html
import json
import math
import os
import re
import signal
import sys
import threading
import time
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from datetime import date
from fnmatch import fnmatch
from pathlib import Path

import frontmatter
import ftfy
import markdown
import numpy as np
import yaml
from bs4 import BeautifulSoup, NavigableString, Tag
from bs4.exceptions import ParserRejectedMarkup

# ---------------------------------------------------------------- settings
# Paths are relative to this script's folder.
PUBLIC_BLOGS = ["../judytuna-jekyll"]
PRIVATE_BLOGS = ["../judytuna-private"]
AUTHORS = ["judytuna"]  # names you sign posts and comments with; other people's posts are left out
DATA_DIR = "data"

INCLUDE_DRAFTS = False  # True also reads _drafts/
MIN_WORDS = 4  # shorter posts are skipped; short posts are voice too, so keep this small
LINE_BREAKS = "auto"  # "keep" single newlines, "join" them, or "auto": join only where a post is hard-wrapped
REDACT = True  # e-mail addresses, telephone numbers and keys become [email], [phone], [secret]
REPLY_DEPTH = 4  # turns of a comment thread before the author's reply, 1 to about 8
VALIDATION_SHARE = 0.10  # of the posts; 0.05 to 0.2
SIMILARITY = 0.8  # Jaccard of word 5-grams from which on two posts count as one
MAX_BYTES = 4_000_000  # larger files are not read; the longest real post is under 100,000
MAX_SECONDS = 3  # of processor time that a file may take

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

# ---------------------------------------------------------------- posts
MARKDOWN_SUFFIXES = {".md", ".markdown", ".mkd", ".mkdn", ".mkdown"}
HTML_SUFFIXES = {".html", ".htm", ".xhtml"}
NEVER_ENTERED = {"_site", "vendor", "node_modules", ".sass-cache", ".jekyll-cache", "gemfiles"}


@dataclass(slots=True)
class Post:
    """One candidate file: what was found in it, or the reason why it is skipped."""

    blog: str
    visibility: str
    path: str
    reason: str = ""
    detail: str = ""
    title: str = ""
    date: str | None = None
    authors: list[str] = field(default_factory=list)
    names: set[str] = field(default_factory=set)  # which of the names asked for sign here
    group: str = ""  # posts of one group stay on one side of the split
    request: str = ""
    text: str = ""
    words: int = 0
    shingles: np.ndarray | None = None
    replies: list[list[dict]] = field(default_factory=list)
    cases: Counter = field(default_factory=Counter)  # what the replies answer
    repairs: Counter = field(default_factory=Counter)
    redacted: list[tuple[str, str]] = field(default_factory=list)  # (kind, SHA-256)


def find_posts(repository: Path, drafts: bool) -> Iterator[tuple[Path, str]]:
    """Every file below a `_posts` or `_drafts` folder where Jekyll looks, and why it is left out ("" if it is not)."""
    try:
        config = load_yaml((repository / "_config.yml").read_text("utf-8-sig"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError):
        config = None
    config = config if isinstance(config, dict) else {}
    source = config.get("source")
    root = repository / source if isinstance(source, str) and (repository / source).is_dir() else repository
    excludes = [pattern.strip("/") for pattern in as_list(config.get("exclude"), "\n")]
    includes = [*as_list(config.get("include"), "\n"), *as_list(config.get("collections_dir"), "\n")]
    for parent, folders, names in os.walk(root):
        folders.sort()
        inside = Path(parent).relative_to(root)
        kind = next((part for part in inside.parts if part in ("_posts", "_drafts")), None)
        links = [name for name in folders if (Path(parent) / name).is_symlink()]
        if kind is None:
            names = [name for name in links if name == "_posts"]
            folders[:] = [name for name in folders if is_entered(inside / name, includes, excludes)]
        for name in sorted({*names, *(links if kind else [])}):
            path = Path(parent) / name
            excluded = is_excluded(inside / name, excludes)
            yield path, "excluded in _config.yml" if excluded else why_not(path, kind, drafts, repository)


def is_entered(folder: Path, includes: list[str], excludes: list[str]) -> bool:
    plain = folder.name in ("_posts", "_drafts", *includes) or folder.name[0] not in "._#" and folder.name[-1] != "~"
    return plain and folder.name not in NEVER_ENTERED and not is_excluded(folder, excludes)


def is_excluded(path: Path, excludes: list[str]) -> bool:
    posix = path.as_posix()
    return any(fnmatch(posix, pattern) or posix.startswith(pattern + "/") for pattern in excludes if pattern)


def why_not(file: Path, kind: str | None, drafts: bool, repository: Path) -> str:
    """Why Jekyll, or this script, does not read the file; empty if it is read."""
    inside = file.relative_to(repository).as_posix().rpartition(f"{kind}/")[2]
    if file.is_symlink() and not file.resolve().is_relative_to(repository.resolve()):
        return "link that leads out of the repository"
    if not file.is_file():
        return "not a regular file"
    if kind == "_drafts" and not drafts:
        return "draft"
    if file.suffix.lower() not in MARKDOWN_SUFFIXES | HTML_SUFFIXES:
        return "unsupported format"
    if any(part[0] in "._#" for part in inside.split("/")) or file.name.endswith("~"):
        return "hidden from Jekyll"
    dated = kind == "_drafts" or re.match(r"\d{2,4}-\d{1,2}-\d{1,2}-.", file.name)
    return "" if dated else "undated file name"


def as_list(value: object, separator: str | None = None) -> list[str]:
    """A value that may be a string or a list, as at most 100 plain strings."""
    values = value.split(separator) if isinstance(value, str) else value
    return [item.strip() for item in values[:100] if isinstance(item, str)] if isinstance(values, list) else []


# ---------------------------------------------------------------- front matter
# Characters of the private-use area carry structure through Markdown; input that contains them loses them.
HOLE, SOFT, BUTTON = "\ue000", "\ue001", "\ue002"  # Liquid was here; a newline typed in a paragraph; a button's link
PRIVATE = str.maketrans("", "", HOLE + SOFT + BUTTON)
# UTF-8 read as cp1252 leaves these pairs; ftfy then decides whether undoing it is certain.
MOJIBAKE = re.compile("[\u00c2\u00c3\u00e2\u00f0][\u0080-\u00bf\u0152-\u0178\u02c6\u02dc\u2013-\u2122]")
# A one-line value at the top level of the front matter.
TOP_LEVEL = re.compile(r"^(['\"]?)([\w-]+)\1[ \t]*:[ \t]+([^\s|>\[{&*!#].*)$", re.MULTILINE)
NUMERIC_DATE = re.compile(r"(\d{4})[-/.](\d{1,2})[-/.](\d{1,2})(?!\d)")
# "September 8, 2014", "8 Sep 2014", "Mon, 08 Sep 2014 10:00": the month's first three letters decide.
NAMED_DATE = re.compile(
    r"(?:(\d{1,2})(?:st|nd|rd|th)?\s+)?(jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec)[a-z]*\.?,?\s+"
    r"(?:(\d{1,2})(?:st|nd|rd|th)?,?\s+)?(\d{4})",
    re.IGNORECASE,
)
MONTHS = ["jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec"]
BaseLoader = getattr(yaml, "CBaseLoader", yaml.BaseLoader)  # every scalar stays the string that was typed


class JekyllFrontMatter(frontmatter.YAMLHandler):
    """python-frontmatter's YAML handler with Jekyll's idea of where front matter begins and ends."""

    FM_BOUNDARY = re.compile(r"\A---[ \t]*\n|^(?:---|\.\.\.)[ \t]*(?:\n|\Z)", re.MULTILINE)


def decode(data: bytes, repairs: Counter) -> str | None:
    """UTF-8, UTF-16 with its mark, or cp1252; None for anything else."""
    try:
        text = data.decode("utf-16" if data.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig")
    except UnicodeDecodeError:
        try:
            text = data.decode("cp1252")
        except UnicodeDecodeError:
            return None
        repairs["read as cp1252"] += 1
    if "\0" in text:
        return None
    if MOJIBAKE.search(text):
        lines = text.split("\n")
        fixed = [ftfy.fix_encoding(line) if MOJIBAKE.search(line) else line for line in lines]
        repairs["encoding repaired"] += fixed != lines
        text = "\n".join(fixed)
    return text.replace("\r\n", "\n").replace("\r", "\n").translate(PRIVATE)


def load_yaml(text: str) -> object:
    """YAML without types, tags or code. Raises YAMLError, also for nesting that would exhaust the C stack."""
    depth = deepest = 0
    for bracket in re.findall(r"[\[\]{}]", text):
        depth += 1 if bracket in "[{" else -1
        deepest = max(deepest, depth)
    if deepest > 200 or re.search(r"(?:[-?] +){200}", text):
        raise yaml.YAMLError("nested too deep")
    return JekyllFrontMatter().load(text, Loader=BaseLoader)


def read_front_matter(text: str, repairs: Counter) -> tuple[dict, str] | None:
    """(front matter, body), or None if the file has no front matter; broken YAML is mended as far as it can be."""
    handler = JekyllFrontMatter()
    try:
        block, body = handler.split(text) if handler.detect(text) else None
    except (ValueError, TypeError):
        return None
    for mend in (str, quote_values, keep_top_level):
        try:
            meta = load_yaml(mend(block))
        except (yaml.YAMLError, RecursionError):
            continue
        repairs["front matter repaired"] += mend is not str
        return (meta if isinstance(meta, dict) else {}), body
    return {}, body


def quote_values(block: str) -> str:
    """The front matter with tabs made spaces and top-level values quoted, so that whatever was typed is YAML."""

    def quoted(match: re.Match) -> str:
        value = match[3].strip()
        if value[0] in "'\"":
            value = re.sub(r"\\(['\"])", r"\1", value.strip(value[0]))
        doubled = value.replace("'", "''")
        return f"{match[2]}: '{doubled}'"

    return TOP_LEVEL.sub(quoted, block.replace("\t", "  "))


def keep_top_level(block: str) -> str:
    """Only the one-line values of the front matter, the first of each name."""
    found = {match[2]: match[0] for match in reversed(list(TOP_LEVEL.finditer(quote_values(block))))}
    return "\n".join(found.values())


def parse_date(text: object) -> date | None:
    """The day in a date as bloggers spell it."""
    text = text.strip() if isinstance(text, str) else ""
    try:
        if numeric := NUMERIC_DATE.match(text):
            return date(*map(int, numeric.groups()))
        if named := NAMED_DATE.search(text):
            return date(int(named[4]), MONTHS.index(named[2].lower()) + 1, int(named[1] or named[3] or 1))
    except ValueError:
        pass
    return None


def author_names(value: object) -> list[str]:
    """`author` or `authors`: a string, a mapping with a name, or a list of these."""
    values = value[:100] if isinstance(value, list) else [value]
    names = [item.get("name") if isinstance(item, dict) else item for item in values]
    return [name.strip().casefold() for name in names if isinstance(name, str) and name.strip()]


# ---------------------------------------------------------------- Liquid
IAL_ITEM = r"""(?:(?:[.\#][\w-]+)+|[\w:-]+=(?:"[^"\n]*"|'[^'\n]*'|[^\s"'}]+)|[A-Za-z][\w-]*:?)"""
TOKEN = re.compile(
    rf"""^(?P<lead>[ \t]*(?:(?:[-*+]|\d+[.)])[ \t]+)?)                        # a fence, perhaps in a list item
            (?P<fence>`{{3,}}(?=[^`\n]*$)|~{{3,}}(?=[ \t]*[\w+\#.-]*[ \t]*$))(?P<info>[^\n]*)$
      | (?P<code>(?<!`)(?P<ticks>`+)(?!`)(?:(?!\n[ \t]*\n).){{1,2000}}?(?<!`)(?P=ticks)(?!`))
      | (?P<comment><!--.*?-->)
      | \{{%-?\s*(?P<tag>\#|[\w-]+)(?P<args>.*?)-?%\}}
      | \{{\{{(?P<output>.*?)\}}\}}
      | \{{::comment\}}.*?\{{:/(?:comment)?\}} | \{{::[^}}\n]*\}} | \{{:/\w*\}} | [ \t]*\{{\#[\w:.-]+\}}[ \t]*$
      | \{{:\s*(?P<ial>{IAL_ITEM}(?:\s+{IAL_ITEM})*)\s*\}}
      | ^[ \t]*\$\$(?!\$)(?:(?!\n[ \t]*\n).)+?\$\$[ \t]*$                     # display maths
      | (?<!\$)\$\$(?P<inline>[^$\n]+)\$\$(?!\$)
      | \[(?P<short>caption|gallery|youtube|vimeo|audio|video|embed|playlist|code|sourcecode|googlemaps|contact-form)\b
            (?P<short_args>[^\]\n]*)\](?![(\[:])                              # a WordPress shortcode
      | (?<!^)\[\^[\w.-]+\] | ^\[\^[\w.-]+\](?!:)                             # the mark of a footnote""",
    re.VERBOSE | re.MULTILINE | re.DOTALL,
)
# Tags whose content is code, a template's loop, or somebody else's words.
DROPPED_TAGS = re.compile(
    "highlight|codeblock|code|comment|doc|blockquote|quote|epigraph|tweet|for|tablerow|capture|schema|style|stylesheet|"
    "javascript|script|mermaid|math|katex|latex|plantuml|graphviz|chart|table|gallery|figure|caption|button"
)
LIQUID_WORDS = {"content", "site", "page", "layout", "post", "paginator", "theme", "jekyll", "include", "forloop"}
PROSE_FIELDS = {"title", "description", "subtitle", "excerpt", "summary", "tagline"}
ASSIGNED = re.compile(r"\{%-?\s*(?:assign|capture)\s+([\w-]+)")
RAW_TAG = re.compile(r"\{%-?\s*(?:end)?raw\s*-?%\}")
LIST_LINE = re.compile(r"[ \t]*(?:[-*+]|\d+[.)])[ \t]")
FUNCTION_WORD = re.compile(
    r"\b(?:a|an|and|are|as|at|be|but|by|de|des|die|do|du|el|en|es|est|et|for|from|had|has|he|her|his|i|in|is|it|its|je|la"
    r"|le|les|like|me|my|no|not|of|on|or|que|she|so|that|the|their|there|they|this|to|un|und|une|was|we|were|what|with"
    r"|you|your|\w+'\w+)\b",
    re.IGNORECASE,
)
CODE_SIGN = re.compile(r"[{};<>=$\\|@#_]|\w\(|//|::|->|^\s*(?:\.|-\w|sudo |\w+: )|\w[./]\w")


def strip_liquid(text: str, meta: dict, liquid: bool = True) -> str:
    """The source without template code, code blocks, display maths and kramdown attributes, ready for Markdown."""
    if not any(sign in text for sign in ("{", "`", "~~~", "<!--", "$$", "[")):
        return text
    out: list[str] = []
    branches: list[list] = []  # [tag, whether one of its branches was begun]
    assigned = set(ASSIGNED.findall(text)) if liquid else set()
    position = 0
    while token := TOKEN.search(text, position):
        out.append(text[position : token.start()])
        position = token.end()
        alone = is_alone(text, token)
        if token["tag"] or token["output"] is not None:
            if not liquid:
                kept = token[0]
            elif token["tag"]:
                kept, position = resolve_tag(text, token, "" if alone else HOLE, meta, branches)
            else:
                kept = resolve_output(token["output"], meta, assigned, alone)
        elif token["fence"] or token["short"]:
            kept, position = resolve_block(text, token)
        elif token["ial"]:
            kept = resolve_attributes(token["ial"], out, alone)
        elif token["comment"]:
            kept = "\n\n" if re.match(r"<!--\s*(?:more|excerpt|break)", token[0]) else ""
        else:
            block = len(token["ticks"] or "") > 2 and "\n" in token[0]  # code whose fences share its lines
            kept = RAW_TAG.sub("", token["code"]) if token["code"] and not block else token["inline"] or ""
        out.append(kept)
    return "".join(out) + text[position:]


def is_alone(text: str, token: re.Match) -> bool:
    """Whether the token has its line, or lines, for itself."""
    end = text.find("\n", token.end())
    before = text[text.rfind("\n", 0, token.start()) + 1 : token.start()].strip("# \t")
    return not (before or text[token.end() : end if end >= 0 else None].strip())


def resolve_tag(text: str, token: re.Match, hole: str, meta: dict, branches: list[list]) -> tuple[str, int]:
    """(what remains of a Liquid tag, where reading goes on): the first branch of an if, nothing of most blocks."""
    name, position = token["tag"], token.end()
    if name == "raw":
        start, end = end_of_block(text, position, name) or (position, position)
        return strip_liquid(text[position:start], meta, liquid=False), end
    if DROPPED_TAGS.fullmatch(name):
        return hole, (end_of_block(text, position, name) or (0, position))[1]
    if name in ("if", "unless", "case"):
        branches.append([name, name != "case"])
    elif branches and name == "end" + branches[-1][0]:
        branches.pop()
    elif branches and name in ("else", "elsif", "when"):
        if branches[-1][1] and (block := end_of_block(text, position, branches[-1][0])):
            branches.pop()
            return hole, block[1]
        branches[-1][1] = True
    return hole, position


def end_of_block(text: str, position: int, name: str) -> tuple[int, int] | None:
    """Start and end of the tag that closes the block `name` open at `position`."""
    depth = 1
    for tag in re.compile(rf"\{{%-?\s*(end)?{re.escape(name)}\b[^%]*%\}}").finditer(text, position):
        depth += -1 if tag[1] else name not in ("raw", "highlight", "comment", "codeblock")
        if not depth:
            return tag.span()
    return None


def resolve_output(expression: str, meta: dict, assigned: set[str], alone: bool) -> str:
    """`{{ page.title }}` is the front matter's value, `{{word}}` the author's word, anything else leaves a hole."""
    name, _, filters = (part.strip(" -\n") for part in expression.partition("|"))
    key = name.removeprefix("page.")
    if key != name and key in PROSE_FIELDS and "url" not in filters:
        value = meta.get(key)
        return value if isinstance(value, str) and not (alone and key == "title") else HOLE
    return name if name.isalpha() and not filters and name.lower() not in LIQUID_WORDS | assigned else HOLE


def resolve_block(text: str, token: re.Match) -> tuple[str, int]:
    """Fenced code and paired shortcodes go whole; an unclosed fence goes alone; prose between ~~~ ornaments stays."""
    if token["short"]:
        close = text.find(f"[/{token['short']}]", token.end())
        if close >= 0:
            return "", close + len(token["short"]) + 3
        gone = "=" in token["short_args"] or token["short"] == "gallery"
        return "" if gone else token[0], token.end()
    mark = token["fence"]
    close = re.compile(rf"^[ \t]*{mark[0]}{{{len(mark)},}}[ \t]*$", re.MULTILINE).search(text, token.end())
    bare = mark[0] == "~" and not token["info"].strip()
    if not close or (bare and looks_like_prose(text[token.end() : close.start()])):
        return token["lead"], token.end()
    return token["lead"] + "\n", close.end()


def resolve_attributes(attributes: str, out: list[str], alone: bool) -> str:
    """A kramdown attribute list: `toc` takes the list item above it along, a button class marks the link before."""
    if attributes == "toc":
        above = "".join(out).rstrip().rsplit("\n", 1)
        if LIST_LINE.match(above[-1]):
            out[:] = [*above[:-1], "\n"]
    elif re.search(r"\.(?:btn|button)\b", attributes):
        out[:] = ["".join(out).rstrip(), BUTTON]
        return "\n" if alone else ""
    return ""


def looks_like_prose(text: str) -> bool:
    """Whether an indented block is verse or prose rather than code, by its signs and its little words."""
    lines = [line for line in text.split("\n") if line.strip()]
    words = re.findall(r"[^\W\d_]+", text)
    if not words or sum(bool(CODE_SIGN.search(line)) for line in lines) > 0.2 * len(lines):
        return False
    return len(FUNCTION_WORD.findall(text)) + sum(not word.isascii() for word in words) >= 0.15 * len(words)


# ---------------------------------------------------------------- Markdown
# A block quote, but not an emoticon such as >_< or >:( at the start of a line.
QUOTE = re.compile(r"(^|\n)[ ]{0,3}>(?![_.oO^-]+[<>]|<(?=\s|$)|[:;]['-]?[()DPO|/\\])[ ]?(.*)")
# "2001. It was a good year" begins with a year, no list.
YEAR = re.compile(r"^( {0,3}\d{4,})(?=\. )", re.MULTILINE)


class KeepAsTyped(markdown.treeprocessors.Treeprocessor):
    """Marks the newlines that the author typed, and takes indented verse out of the code blocks."""

    def run(self, root):
        for element in root.iter():
            if element.tag == "pre" and len(element) and looks_like_prose(element[0].text or ""):
                element.tag, element[0].tag = "p", "span"
            elif element.get("class") == "footnote":
                for part in element.iter():
                    part.tag = "div" if part.tag in ("ol", "li") else part.tag
            element.text = element.text and element.text.replace("\n", SOFT)
            tail = element.tail and (element.tail.removeprefix("\n") if element.tag == "br" else element.tail)
            element.tail = tail and tail.replace("\n", SOFT)


@functools.lru_cache(maxsize=64)
def converter(extensions: tuple[str, ...], raw_html: bool) -> markdown.Markdown:
    """A Markdown instance that leaves emphasis as it was typed and keeps a list's first number."""
    md = markdown.Markdown(extensions=list(extensions))
    md.inlinePatterns.deregister("em_strong")
    md.treeprocessors.deregister("prettify")
    md.treeprocessors.register(KeepAsTyped(md), "keep_as_typed", 15)
    md.parser.blockprocessors["quote"].RE = QUOTE
    md.parser.blockprocessors["olist"].LAZY_OL = False
    if not raw_html:  # these two take time
        md.preprocessors.deregister("html_block")
        md.inlinePatterns.deregister("html")
    return md


def to_html(text: str) -> str:
    """Markdown to HTML with only the extensions that the text shows signs of."""
    signs = {"footnotes": "[^", "tables": "|", "def_list": "\n:", "abbr": "*[", "md_in_html": "markdown="}
    md = converter(tuple(name for name, sign in signs.items() if sign in text), "<" in text)
    return md.reset().convert(YEAR.sub(r"\1\\", text))


# ---------------------------------------------------------------- HTML tree to text
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
# Elements that are nothing in plain text; any other without attributes, <iv>, is what the author typed.
INVISIBLE_TAG = re.compile(
    "a|abbr|acronym|area|base|basefont|bdi|bdo|big|blink|br|cite|col|colgroup|data|datalist|dfn|dir|font|frame|frameset|"
    "ins|label|legend|link|lj|map|mark|marquee|menu|meta|meter|nobr|noembed|noframes|optgroup|option|output|param|"
    "progress|q|rb|rp|rt|rtc|ruby|small|source|span|sub|sup|t[dhr]|tbody|tfoot|thead|time|title|track|u|var|wbr|xmp"
)
# Classes and ids of what a theme, an importer or a service put around the author's text.
FURNITURE = re.compile(
    r"(?:comments?|comment-?list|respond|disqus[\w-]*|(?:wp-)?caption[\w-]*|shar(?:e|ing)[\w-]*|social[\w-]*|related"
    r"[\w-]*|sharedaddy|addtoany[\w-]*|twitter-(?:tweet|video)|instagram-media|fb-post|highlight(?:er-rouge)?|quiz[\w-]*|"
    r"bibliography|footnote-(?:ref|backref)|reversefootnote|btn|button|mermaid|blockquote|pullquote)",
    re.IGNORECASE,
)
SPACE = re.compile(r"[ \t\r\n\f]+")
ENTITY = re.compile(r"&(?:#\d{1,7}|#[xX][0-9a-fA-F]{1,6}|[A-Za-z]\w{1,30});")
# Control characters, soft hyphens, zero-width and bidi marks, U+FFFD, and zero-width joiners outside of emoji, Arabic
# and Indic words.
INVISIBLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\u200b\u200e\u200f\u202a-\u202e\u2060-\u2069\ufeff\ufffc\ufffd\ue000-\ue002]"
    "|(?<![\u0600-\u0dff\u2190-\U0010ffff])[\u200c\u200d]|[\u200c\u200d](?![\u0600-\u0dff\u2190-\U0010ffff])"
)
# [text][4] without its definition, which Markdown leaves as it is; inline code is matched first to be left alone.
STRAY_LINK = re.compile(r"`[^`]*`|!?\[((?:`[^`]*`|[^\[\]`])+)\](?:\[[^\[\]`]*\]|\([^()\s`]*\))")
BARE_URL = re.compile(r"[<(\[*_]*(?:https?://|www\.)\S+(?:\s+(?:https?://|www\.)\S+)*")
TABLE_ROW = re.compile(r"\s*\|.*\|\s*")
TAIL = re.compile(r"[\W_]*(?:posted (?:via|with|using)|sent (?:via|from) my|cross-?posted (?:to|on|at))\b.{0,80}", re.I)
CLOCK = r"\d{1,2}:\d\d(?::\d\d)?(?: ?[AaPp][Mm])?"
# name (10:36:16 PM): text / [10:36] <name> text / [10:36] name: text / 10:36 <name> text
TIMED = re.compile(
    rf"[-*_ ]*(?:[^\s:(\[][^:(\[\n]{{0,30}}[(\[]{CLOCK}[)\]][*_]*:|"
    rf"[(\[]{CLOCK}[)\]][ \t*_]*(?:<[^>\n]{{1,30}}>|[\w.-]{{1,24}}[*_]*:)|{CLOCK}\s*<[^>\n]{{1,30}}>)"
)
SAID = re.compile(r"[*_<]*([^\W\d_][\w.'-]{0,23}(?: [\w.'-]{1,20})?)>?[*_]*:[*_]* +\S")


def to_text(markup: str, is_html: bool, title: str = "", line_breaks: str = "keep") -> str:
    """HTML or Markdown (Liquid already gone) to plain text: paragraphs, list lines, emphasis as the author types it."""
    join = line_breaks == "join" or (line_breaks == "auto" and is_hard_wrapped(markup))
    if is_html and not re.search(r"<(?:p|br|div)\b", markup, re.IGNORECASE):
        markup = re.sub(r"\n[ \t]*\n", "<p>", markup)  # WordPress makes paragraphs of blank lines
    reader = PlainText()
    for event, node in events(BeautifulSoup(markup if is_html else to_html(markup), "html.parser")):
        getattr(reader, event)(node)
    reader.flush()
    blocks = reader.blocks
    if blocks and blocks[0][0] == "heading" and blocks[0][1].casefold() == title.casefold():
        del blocks[0]
    return tidy([(kind, settle_lines(text, join)) for kind, text in blocks])


def events(root: Tag) -> Iterator[tuple[str, Tag | str]]:
    """("open" | "close" | "text" | "skip", node) in document order, without recursion."""
    stack = [(root, iter(root.contents))]
    while stack:
        tag, children = stack[-1]
        node = next(children, None)
        if node is None:
            stack.pop()
            yield "close", tag
        elif type(node) is NavigableString:
            yield "text", node
        elif isinstance(node, Tag):
            gone = DROPPED.fullmatch(node.name) or (node.attrs and is_furniture(node))
            yield "skip" if gone else "open", node
            if not gone:
                stack.append((node, iter(node.contents)))


def is_furniture(tag: Tag) -> bool:
    labels = tag.get("class") or []
    labels = [*(labels if isinstance(labels, list) else [labels]), tag.get("id") or ""]
    return any(FURNITURE.fullmatch(label) for label in labels)


class PlainText:
    """Collects the text of an HTML tree, block by block, as the author would type it."""

    def __init__(self):
        self.blocks: list[tuple[str, str]] = []  # (kind: "list", "heading" or "text", text)
        self.lists: list[int | None] = []  # of each open list its next number, None for bullets
        self.item = ""  # the mark of a list item that has no text yet
        self.clear()

    def clear(self):
        self.parts: list[str] = []
        self.marks: list[int] = []  # where the open emphases begin in parts
        self.links = self.in_link = self.link_start = self.outside = 0

    def open(self, tag: Tag):
        name = tag.name
        if name in EMPHASIS:
            self.marks.append(len(self.parts))
        elif name == "br":
            self.parts.append("\n")
        elif name == "a":
            self.links, self.in_link, self.link_start = self.links + 1, self.in_link + 1, len(self.parts)
        elif BLOCK.fullmatch(name):
            self.flush()
            if name in ("ul", "ol"):
                start = str(tag.get("start") or 1)
                self.lists.append(None if name == "ul" else int(start) if start.isdecimal() else 1)
            elif name == "li":
                number = self.lists[-1] if self.lists else None
                self.item = "- " if number is None else f"{number}. "
                self.lists[-1:] = [number and number + 1]
        elif name == "lj":
            self.parts.append(str(tag.get("user") or ""))  # LiveJournal's way to name a friend
        elif not tag.attrs and name.isalpha() and not INVISIBLE_TAG.fullmatch(name):
            self.text(f"<{name}>")

    def text(self, text: str):
        text = SPACE.sub(" ", text)
        if "&" in text:
            text = ENTITY.sub(lambda entity: html.unescape(entity[0]), text)
        if BUTTON in text and self.links:
            del self.parts[self.link_start :]
        self.outside += not self.in_link and any(map(str.isalnum, text))
        self.parts.append(text)

    def close(self, tag: Tag):
        name = tag.name
        if name in EMPHASIS and self.marks:
            start, mark = self.marks.pop(), EMPHASIS[name]
            inner = "".join(self.parts[start:])
            if core := inner.strip():
                lead, _, trail = inner.partition(core)
                self.parts[start:] = [lead, mark, core, mark, trail]
        elif name == "a":
            self.in_link = max(0, self.in_link - 1)
        elif BLOCK.fullmatch(name):
            self.flush("heading" if name[0] == "h" and name[1:].isdigit() else "text")
            if name in ("ul", "ol") and self.lists:
                self.lists.pop()

    def skip(self, tag: Tag):
        if tag.name != "img" and (BLOCK.fullmatch(tag.name) or DROPPED.fullmatch(tag.name)):
            self.flush()

    def flush(self, kind: str = "text"):
        text = "".join(self.parts).strip(" \n" + SOFT + HOLE)
        row_of_links = self.links > 1 and not self.outside
        self.clear()
        if not text or row_of_links:
            return
        if self.lists:
            kind, text = "list", "  " * (len(self.lists) - 1) + (self.item or "  ") + text
        self.item = ""
        self.blocks.append((kind, text))


def is_hard_wrapped(source: str) -> bool:
    """Whether an editor broke the lines: most end because the next word would not have fitted in any more."""
    pairs, closed = [], 0  # (length, length with the next line's first word); lines that end a sentence
    lines = [line.strip() for line in source.split("\n")]
    for line, following in zip(lines, lines[1:], strict=False):
        word = following.partition(" ")[0]
        markup = line[:1] in "#>|<" or word[:1] in "#>|<" or LIST_LINE.match(following)
        markup = markup or SAID.match(following) or TIMED.match(following)
        if not (markup or "](" in line or "http" in line or "[" in word or "http" in word):
            pairs.append((len(line), len(line) + 1 + len(word)))
            closed += line[-1] in ".!?:\u2026)\"'*"
    few = len(pairs) < 9  # then the signs must be clear
    if not pairs or closed > (0 if few else 0.3 * len(pairs)):
        return False
    width = sorted(length for length, _ in pairs)[len(pairs) * 3 // 4]
    full = sum(length <= 1.12 * width and reach > 0.86 * width for length, reach in pairs)
    return 52 <= width <= 140 and full >= (0.9 if few else 0.66) * len(pairs)


def settle_lines(text: str, join: bool) -> list[str]:
    """The lines of a block; newlines typed in a paragraph are breaks or spaces; bare URLs and table rows are gone."""
    if join and SOFT in text:
        text = re.sub(rf" *{SOFT} *(?=[-*+\u2022] |\d+[.)] |{TIMED.pattern})", "\n", text)
        text = re.sub(f"(?<=[\u3000-\u9fff\uff00-\uffef]){SOFT}(?=[\u3000-\u9fff\uff00-\uffef])", "", text)
        text = re.sub(f" *{SOFT} *", " ", text)
    lines = [re.sub(r"(?<=\S) {2,}", " ", line.rstrip()) for line in text.replace(SOFT, "\n").split("\n")]
    return [line for line in lines if not (BARE_URL.fullmatch(line.strip()) or TABLE_ROW.fullmatch(line))]


def tidy(blocks: list[tuple[str, list[str]]]) -> str:
    """Blocks to text: chat logs and importers' tails gone, blank lines between blocks but not between list items."""
    drop_chat_logs([lines for _, lines in blocks])
    out, last = [], ""
    for kind, lines in blocks:
        text = re.sub(r"\n{3,}", "\n\n", "\n".join(line if kind == "list" else line.strip() for line in lines)).strip(
            "\n"
        )
        if text.strip():
            out += ["\n" if kind == last == "list" else "\n\n", text]
            last = kind
    text = "".join(out[1:]).replace("\xa0", " ").replace("\u202f", " ")
    if "][" in text or "](" in text:
        text = STRAY_LINK.sub(lambda link: link[1] or link[0], text)
    head, _, tail = text.rpartition("\n\n")
    return INVISIBLE.sub("", head if TAIL.fullmatch(tail) else text).strip()


def drop_chat_logs(blocks: list[list[str]]):
    """Empties pasted chats in place: runs of timed lines, and 4 or more short lines in a row by recurring speakers."""
    flat = [(lines, i) for lines in blocks for i in range(len(lines)) if lines[i].strip()]
    timed = [n for n, (lines, i) in enumerate(flat) if ":" in lines[i] and TIMED.match(lines[i])]
    gone = {n for a, b in zip(timed, timed[1:], strict=False) if b - a <= 4 for n in range(a, b + 1)}
    run: list[tuple[int, str]] = []
    for n, (lines, i) in enumerate([*flat, ([""], 0)]):
        speaker = SAID.match(lines[i])
        if speaker and lines[i].count(" ") < 40:  # longer ones are an interview
            run.append((n, speaker[1].casefold()))
            continue
        turns = Counter(name for _, name in run)
        if len(run) >= 4 and sum(count > 1 for count in turns.values()) >= 2:
            gone |= {n for n, _ in run}
        run = []
    for n in gone:
        lines, i = flat[n]
        lines[i] = ""


def clean_title(title: object) -> str:
    """The title as plain text: Markdown, HTML and entities resolved."""
    text = SPACE.sub(" ", title).strip() if isinstance(title, str) else ""
    if re.search(r"[<&*_`\[\\~]", text):
        text = BeautifulSoup(markdown.markdown(HOLE + text), "html.parser").get_text()
        text = ENTITY.sub(lambda entity: html.unescape(entity[0]), text)
    return SPACE.sub(" ", INVISIBLE.sub("", text.replace("\xa0", " "))).strip()


# ---------------------------------------------------------------- personal data
EMAIL = re.compile(r"(?<![@\w.+-])[\w.+-]{1,64}@[\w-]{1,63}(?:\.[\w-]{1,63})+")
# name [at] host [dot] com, name at host dot com
SPELLED_EMAIL = re.compile(
    r"(?<![\w.+-])[\w.+-]{1,64}\s?[\[({]\s?at\s?[\])}]\s?[\w-]{1,63}(?:(?:\s?[\[({]\s?dot\s?[\])}]\s?|\.)[\w-]{1,63})+"
    r"|(?<![\w.+-])[\w.+-]{1,64} at [\w-]{1,63}(?: dot [\w-]{1,63})* dot (?:com|org|net|edu|gov|io|co|uk|de|fr|us)\b",
    re.IGNORECASE,
)
PHONE = re.compile(
    r"(?<![\w.+/=-])(?:"
    r"\+\d{1,3}(?:[ .\u00a0-]?\(?\d{1,4}\)?){2,6}"  # international
    r"|(?:1[ .-])?(?:\(\d{3}\) ?|\d{3}[ .-])\d{3}[ .-]\d{4}"  # North America
    r"|0[1-9](?:[ .-]\d{2}){4}"  # France, in pairs
    r"|\(?0\d{2,4}\)?[ /-]\d{3,4}[ -]?\d{3,4}|0\d{1,2}-\d{3,4}-\d{4}"  # Britain, Germany, Korea
    r"|555-\d{4}"
    # a bare local number counts only after a word that announces one
    r"|(?<=call )\d{3}[-. ]\d{4}|(?<=phone )\d{3}[-. ]\d{4}|(?<=number is )\d{3}[-. ]\d{4}"
    r")(?![\w/]|[.-]\d)",
    re.IGNORECASE,
)
SECRET = re.compile(
    r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)"
    r"|\b(?:AKIA|ASIA)[0-9A-Z]{16}\b|\bgh[oprsu]_\w{30,}|\bgithub_pat_\w{30,}|\bsk-[\w-]{20,}|\bxox[a-z]-[\w-]{10,}"
    r"|\bAIza[\w-]{30,}|\beyJ[\w-]{10,}\.[\w-]{10,}\.[\w-]*"
    r"|(?<![\w/-])[0-9a-fA-F]{32,}(?![\w-])"  # a key or a digest in hexadecimal
    r"|(?<![\w/-])(?=[\w-]*[a-z])(?=[\w-]*[A-Z])(?=(?:[A-Za-z_-]*\d){3})[A-Za-z0-9_-]{30,}(?![\w-])",  # a token
    re.DOTALL,
)
# What the usual tokenizers would read as a control token; a space after its first sign makes it plain text.
CONTROL_TOKEN = re.compile(
    r"<\||\|>|</?s>|\[/?INST\]|<</?SYS>>|</?(?:bos|eos|pad|unk|mask|start_of_turn|end_of_turn|think)>"
    "|<\uff5c|\uff5c>",
    re.IGNORECASE,
)


def find_personal_data(text: str) -> list[tuple[str, int, int, str]]:
    """(kind, start, end, normalised) of every e-mail address, telephone number and key, in order, not overlapping."""
    found = []
    if re.search(r"[\w-]{14}|-----BEGIN", text):
        found += [("secret", *match.span(), match[0]) for match in SECRET.finditer(text)]
    if "@" in text:
        found += [("email", *match.span(), match[0].lower()) for match in EMAIL.finditer(text)]
    if re.search(r"\bdot\b|\bat ?[\])}]", text, re.IGNORECASE):
        for match in SPELLED_EMAIL.finditer(text):
            plain = re.sub(r"\s?[\[({]?\s?\bat\b\s?[\])}]?\s?", "@", match[0].lower())
            plain = re.sub(r"\s?[\[({]?\s?\bdot\b\s?[\])}]?\s?", ".", plain)
            found.append(("email", *match.span(), plain))
    for match in PHONE.finditer(text) if re.search(r"\d{2}[ .()-]*\d\d", text) else ():
        digits = re.sub(r"\D", "", match[0])
        if 7 <= len(digits) <= 15:
            found.append(("phone", *match.span(), digits))
    kept: list[tuple[str, int, int, str]] = []
    for item in sorted(found, key=lambda item: (item[1], -item[2], item[0])):
        if not kept or item[1] >= kept[-1][2]:
            kept.append(item)
    return kept


def redact(text: str) -> tuple[str, list[tuple[str, str]]]:
    """The text with placeholders instead of personal data, and (kind, SHA-256 of the normalised original) of each."""
    out, position, digests = [], 0, []
    for kind, start, end, normalised in find_personal_data(text):
        out += [text[position:start], f"[{kind}]"]
        position = end
        digests.append((kind, hashlib.sha256(normalised.encode("utf-8", "replace")).hexdigest()))
    return "".join(out) + text[position:], digests


def protect(text: str, post: Post) -> str:
    """Text that may leave the blog: redacted (counted in the post) and free of control tokens."""
    if REDACT:
        text, digests = redact(text)
        post.redacted += digests
    return CONTROL_TOKEN.sub(lambda token: token[0][0] + " " + token[0][1:], text)


# ---------------------------------------------------------------- conversations
# Untitled, a date, a number, signs only: nothing that a request could be made of.
PLACEHOLDER = re.compile(
    r"\W*(?:untitled|no (?:title|subject)|title|none|null|nil|n/a|test|blog|post|\d{4}\W\d{1,2}\W\d{1,2}.*|[\d\W]*)\W*",
    re.I,
)
URL = re.compile(r"(?:https?://|www\.)\S*|[\w-]+(?:\.[\w-]+)*\.(?:com|org|net|edu|io|me|info|blog)\b\S*", re.I)
HANDLE = re.compile(r"@\w+|(?=\w*[a-z])(?=\w*\d)[a-z]\w+|[a-z0-9]+_\w+", re.I)
DULL_TAGS = {"uncategorized", "general", "misc", "blog", "post", "posts", "other", "default", "livejournal", "all"}
# A word; a Chinese, Japanese or Korean character counts as one.
WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|[^\W\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]+")


def words_of(text: str) -> list[str]:
    return WORD.findall(text.casefold())


def make_request(post: Post, tags: list[str]) -> str:
    """What the user says so that the post is the answer: from the title, else the tags, else in general.

    A title that is a placeholder, an address, a handle or the post's own first words is not used."""
    dice = zlib.crc32(f"{post.blog}/{post.path}".encode("utf-8", "replace"))
    title, words = post.title, words_of(post.title)
    usable = len(title) <= 200 and not any(useless.fullmatch(title) for useless in (PLACEHOLDER, URL, HANDLE))
    if words and usable and words_of(post.text[: 8 * len(title) + 200])[: len(words)] != words:
        return TITLE_REQUESTS[dice % len(TITLE_REQUESTS)].format(title)
    topics = [tag for tag in tags if 2 < len(tag) < 40 and tag.lower() not in DULL_TAGS and not URL.fullmatch(tag)]
    if topics and dice % 2:
        return TAG_REQUESTS[dice // 2 % len(TAG_REQUESTS)].format(" and ".join(topics[:2]))
    return GENERAL_REQUESTS[dice // 2 % len(GENERAL_REQUESTS)]


def flatten_comments(comments: object) -> list[dict]:
    """Comments in their usual spellings, nested replies included, as {id, parent, author, content}."""
    found: list[dict] = []
    waiting = [(comments, "")]
    while waiting and len(found) < 5000:
        items, above = waiting.pop()
        for item in items if isinstance(items, list) else []:
            if not isinstance(item, dict):
                continue
            values = {name: value.strip() for name, value in item.items() if isinstance(value, str)}

            def first(*names, values=values):
                return next((values[name] for name in names if values.get(name)), "")

            key, parent = first("id", "_id"), first("parent", "parent_id", "replying_to", "reply_to")
            author = (author_names(item.get("author") or item.get("name")) or [""])[0]
            content = first("content", "message", "body", "text")
            key, parent = key or f"number {len(found)}", above if parent in ("", "0", "null", "~") else parent
            found.append({"id": key, "parent": parent, "author": author, "content": content})
            waiting += [(item[name], key) for name in ("replies", "children") if name in item]
    return found


def make_replies(post: Post, comments: list[dict], authors: frozenset[str]):
    """One conversation for each of the author's comments, with the comments it answers before it."""
    by_id = {comment["id"]: comment for comment in reversed(comments)}

    @functools.cache
    def said(key: str) -> str:
        source = strip_liquid(by_id[key]["content"], {}) if key in by_id else ""
        return protect(to_text(source, bool(re.search(r"<(?:p|br|div)\b", source, re.I))), post)

    for comment in comments:
        if comment["author"] not in authors or not said(comment["id"]):
            continue
        chain, seen, key = [], set(), comment["id"]
        while key not in seen and len(chain) <= REPLY_DEPTH and said(key):
            seen.add(key)
            chain.append(("assistant" if by_id[key]["author"] in authors else "user", said(key)))
            key = by_id[key]["parent"]
        chain.reverse()
        case = "answers a comment"
        if chain[0][0] == "assistant":
            case = "answers a missing comment" if comment["parent"] else "comments on the post"
            chain.insert(0, ("user", reply_context(post)))
        if not chain[0][1]:
            case = "left out, answers nothing"
        else:
            post.replies.append(merge_turns(chain))
        post.cases[case] += 1


def reply_context(post: Post) -> str:
    """The post as a reader would bring it up: its title and opening; empty if it has neither."""
    opening = post.text[:400].split("\n\n")[0]
    if len(opening) > 200:
        opening = opening[:200].rpartition(" ")[0] + " ..."
    title = f' "{post.title}".' if post.title and not PLACEHOLDER.fullmatch(post.title) else "."
    return REPLY_CONTEXT.format(title, opening and f" It begins:\n\n{opening}") if len(title) > 1 or opening else ""


def merge_turns(chain: list[tuple[str, str]]) -> list[dict]:
    """Messages in which the roles alternate."""
    messages: list[dict] = []
    for role, content in chain:
        if messages and messages[-1]["role"] == role:
            messages[-1]["content"] += "\n\n" + content
        else:
            messages.append({"role": role, "content": content})
    return messages


# ---------------------------------------------------------------- one file
def read_post(job: tuple[str, str, str, str, str], authors: frozenset[str], today: date) -> Post:
    """One file to a Post; whatever is wrong with it becomes the reason why it is skipped."""
    file, *post_fields = job
    post = Post(*post_fields)
    if post.reason:
        return post
    timer = hasattr(signal, "setitimer") and threading.current_thread() is threading.main_thread()
    try:
        if timer:  # counts processor time, so that a busy machine skips nothing
            signal.signal(signal.SIGVTALRM, out_of_time)
            signal.setitimer(signal.ITIMER_VIRTUAL, MAX_SECONDS, 1)
        fill_post(post, Path(file), authors, today)
    except TimeoutError:
        post.reason = f"took over {MAX_SECONDS} s to parse"
    except RecursionError:
        post.reason = "nested too deep"
    except (ParserRejectedMarkup, AssertionError, ValueError) as error:
        post.reason, post.detail = "broken markup", type(error).__name__
    except OSError as error:
        post.reason, post.detail = "unreadable", error.strerror or ""
    finally:
        if timer:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    return post


def out_of_time(*_):
    raise TimeoutError


def fill_post(post: Post, file: Path, authors: frozenset[str], today: date):
    if file.stat().st_size > MAX_BYTES:
        post.reason = "too large"
    elif (text := decode(file.read_bytes(), post.repairs)) is None:
        post.reason = "undecodable"
    elif (parts := read_front_matter(text, post.repairs)) is None:
        post.reason = "no front matter"
    else:
        meta, body = parts
        day = parse_date(meta.get("date")) or parse_date(file.name)
        post.date = day.isoformat() if day else None
        post.authors = author_names(meta.get("author")) + author_names(meta.get("authors"))
        if str(meta.get("published", "")).lower() in ("false", "no", "off", "n"):
            post.reason = "unpublished"
        elif day and (day - today).days > 1:
            post.reason = "dated in the future"
        else:
            fill_text(post, meta, body, file.suffix.lower() in HTML_SUFFIXES, authors)


def fill_text(post: Post, meta: dict, body: str, is_html: bool, authors: frozenset[str]):
    title = clean_title(meta.get("title"))
    text = to_text(strip_liquid(body, meta), is_html, title, LINE_BREAKS)
    post.title, post.text = protect(title, post), protect(text, post)
    comments = flatten_comments(meta.get("comments"))
    post.names = set(authors.intersection([*post.authors, *(comment["author"] for comment in comments)]))
    if post.names:
        make_replies(post, comments, authors)
    words, title_words = words_of(post.text), words_of(post.title)
    post.words = len(words)
    post.group = f"{post.date} {title_words}" if post.date and title_words else f"{post.blog}/{post.path}"
    if len(words) >= MIN_WORDS:
        post.request = make_request(post, [protect(clean_title(tag), post) for tag in as_list(meta.get("tags"))])
        post.shingles = shingle_hashes(words)
        return
    post.text = ""
    if not post.replies:
        post.reason, post.detail = ("too short", f"{len(words)} words") if words else ("empty after cleaning", "")


def read_all(jobs: list[tuple], authors: frozenset[str]) -> Iterator[Post]:
    """Posts in the order of the jobs, read by as many processes as there are cores; a handful is read right here."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    read = functools.partial(read_post, authors=authors, today=date.today())
    if cores == 1 or len(jobs) < 60:
        yield from map(read, jobs)
        return
    with ProcessPoolExecutor(cores) as pool:
        yield from pool.map(read, jobs, chunksize=min(64, len(jobs) // (4 * cores)))


# ---------------------------------------------------------------- near-duplicates
@functools.lru_cache(maxsize=100_000)
def word_hash(word: str) -> int:
    return zlib.crc32(word.encode("utf-8", "replace"))


def shingle_hashes(words: list[str], size: int = 5) -> np.ndarray:
    """Sorted distinct 64-bit hashes of a text's word 5-grams; a shorter text is one shingle."""
    codes = np.array([word_hash(word) for word in words], dtype=np.uint64)
    size = min(size, len(codes))
    hashes = np.zeros(len(codes) - size + 1, dtype=np.uint64)
    for offset in range(size):
        hashes = hashes * np.uint64(0x9E3779B97F4A7C15) + codes[offset : offset + len(hashes)]
    return np.unique((hashes ^ hashes >> np.uint64(29)) * np.uint64(0xBF58476D1CE4E5B9))


def find_duplicates(sets: list[np.ndarray], threshold: float) -> dict[int, int]:
    """For each text that is near an earlier kept one, the index of that one; exact, by prefix filtering.

    Two sets can only reach the threshold if they share one of their |s| - ceil(threshold |s|) + 1 rarest elements
    (Bayardo et al., Scaling Up All Pairs Similarity Search, 2007), so only these are indexed."""
    bucket = np.uint64(42)  # 22 bits are left: how rare a shingle is need only be counted roughly
    counts = np.zeros(1 << 22, dtype=np.int32)
    for hashes in sets:
        counts[hashes >> bucket] += 1
    prefixes = []
    for hashes in sets:
        rarest = np.argsort(counts[hashes >> bucket], kind="stable")
        prefixes.append(hashes[rarest[: hashes.size - math.ceil(threshold * hashes.size) + 1]])
    everything = np.sort(np.concatenate(prefixes)) if prefixes else np.zeros(0, np.uint64)
    shared = np.unique(everything[1:][everything[1:] == everything[:-1]])
    index: dict[int, list[int]] = defaultdict(list)
    near: dict[int, int] = {}
    for i, hashes in enumerate(sets):
        keys = prefixes[i][np.isin(prefixes[i], shared, assume_unique=True)].tolist()
        for j in sorted({j for key in keys for j in index[key]}):
            if threshold * hashes.size <= sets[j].size <= hashes.size / threshold:
                common = np.intersect1d(hashes, sets[j], assume_unique=True).size
                if common >= threshold * (hashes.size + sets[j].size - common):
                    near[i] = j
                    break
        else:
            for key in keys:
                index[key].append(i)
    return near


def drop_duplicates(posts: list[Post]):
    """Keeps one of each group of near-duplicates: a public one, the longest; of the others only new replies."""
    texts = [post for post in posts if not post.reason and post.text]
    texts.sort(key=lambda post: (post.visibility != "public", -post.words, post.blog, post.path))
    for i, j in find_duplicates([post.shingles for post in texts], SIMILARITY).items():
        post, kept = texts[i], texts[j]
        answers = {turns[-1]["content"] for turns in kept.replies}
        post.replies = [turns for turns in post.replies if turns[-1]["content"] not in answers]
        post.text, post.group = "", kept.group
        if not post.replies:
            post.reason, post.detail = "duplicate", f"{kept.blog}/{kept.path}"


# ---------------------------------------------------------------- split
def split_posts(posts: list[Post], share: float) -> set[int]:
    """Indexes of the posts for validation: exactly that share, groups whole, in the order of a hash of their slugs."""
    groups: dict[str, list[int]] = defaultdict(list)
    for i, post in enumerate(posts):
        groups[post.group].append(i)

    def rank(members: list[int]) -> str:
        slug = min(Path(posts[i].path).stem for i in members)
        return hashlib.sha256(slug.encode("utf-8", "replace")).hexdigest()

    wanted = max(int(len(posts) * share + 0.5), int(len(posts) > 1))
    chosen: set[int] = set()
    for members in sorted(groups.values(), key=rank):
        if len(chosen) + len(members) <= wanted:
            chosen.update(members)
    return chosen


# ---------------------------------------------------------------- writing
def conversations(post: Post) -> Iterator[dict]:
    """The lines of the data files that come from a post."""
    tail = {key: getattr(post, key) for key in ("visibility", "blog", "path", "title", "date")}
    if post.text:
        turns = [{"role": "user", "content": post.request}, {"role": "assistant", "content": post.text}]
        yield {"messages": turns, "kind": "post", **tail}
    for turns in post.replies:
        yield {"messages": turns, "kind": "reply", **tail}


def json_lines(posts: list[Post], validation: set[int], wanted: bool) -> Iterator[str]:
    for i, post in enumerate(posts):
        if (i in validation) == wanted:
            yield from (json.dumps(line, ensure_ascii=False) + "\n" for line in conversations(post))


def write_files(folder: Path, files: dict[str, Iterable[str]]):
    """Writes all files beside their places and moves them in only when every one is complete."""
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)
    temporary = {name: folder / f".{name}.{os.getpid()}" for name in files}
    try:
        for name, lines in files.items():
            temporary[name].touch(0o600)
            with temporary[name].open("w", encoding="utf-8", errors="replace") as out:
                out.writelines(lines)
                out.flush()
                os.fsync(out.fileno())
        for name, path in temporary.items():
            path.replace(folder / name)
    finally:
        for path in temporary.values():
            path.unlink(missing_ok=True)


# ---------------------------------------------------------------- report
def make_report(posts: list[Post], kept: list[Post], validation: set[int], authors: list[str]) -> dict:
    """What data/extraction_report.json holds."""
    words, lines = {"train": 0, "validation": 0}, Counter()
    for i, post in enumerate(kept):
        split = "validation" if i in validation else "train"
        for line in conversations(post):
            lines[split, line["kind"], post.visibility] += 1
            words[split] += len(words_of(line["messages"][-1]["content"]))
    skipped = [post for post in posts if post.reason]
    digests = {(digest, kind, post.visibility) for post in kept for kind, digest in post.redacted}

    def table(names: tuple, rows: list) -> list[dict]:
        return [dict(zip(names, row, strict=True)) for row in rows]

    def counted(items: Iterator) -> dict:
        return dict(sorted(Counter(items).items()))

    return {
        "files_found": len(posts),
        "files_kept": len(kept),
        "files_skipped": counted(post.reason for post in skipped),
        "posts": {"train": len(kept) - len(validation), "validation": len(validation)},
        "words": words,
        "conversations": table(
            ("split", "kind", "visibility", "count"), [(*key, n) for key, n in sorted(lines.items())]
        ),
        "replies": counted(case for post in kept for case in post.cases.elements()),
        "repairs": counted(repair for post in kept for repair in post.repairs.elements()),
        "redactions": counted(kind for post in kept for kind, _ in post.redacted),
        "redacted": table(("sha256", "kind", "visibility"), sorted(digests)),
        "authors": authors,
        "skipped": table(("blog", "path", "reason", "detail"), [(p.blog, p.path, p.reason, p.detail) for p in skipped]),
    }


def print_report(report: dict, data_dir: Path):
    """The table for the terminal."""
    rows = [("files found", report["files_found"]), ("  kept", report["files_kept"])]
    rows += [(f"  skipped: {reason}", count) for reason, count in report["files_skipped"].items()]
    rows += [(f"words, {split}", count) for split, count in report["words"].items()]
    for line in report["conversations"]:
        rows.append((f"{line['split']}: {line['visibility']} {line['kind']} conversations", line["count"]))
    for key, label in (("replies", "replies"), ("repairs", "files"), ("redactions", "redacted")):
        rows += [(f"{label}: {name}", count) for name, count in report[key].items()]
    width = max(len(name) for name, _ in rows)
    for name, count in rows:
        print(f"{name:<{width}} {count:>9,}")
    print(f"written to {data_dir}: train_data.jsonl, val_data.jsonl, extraction_report.json (lists every skipped file)")


def show_progress(done: int, total: int, start: float):
    """Files read, rate and time left on stderr: one line that moves on a terminal, else a few lines."""
    terminal = sys.stderr.isatty()
    if done == total or done % max(1, total // (200 if terminal else 4)) == 0:
        rate = done / max(time.monotonic() - start, 0.001)
        line = f"read {done:,} of {total:,} files, {rate:,.0f}/s, {(total - done) / rate:,.0f} s left   "
        print(line, end="\r" if terminal and done < total else "\n", file=sys.stderr, flush=True)


# ---------------------------------------------------------------- main
class UserError(Exception):
    """Something the user can put right; its text is the one sentence they see."""


class Parser(argparse.ArgumentParser):
    """argparse whose complaint is one sentence and exit status 1."""

    def error(self, message: str):
        self.exit(1, f"{self.prog}: {message}; --help lists the flags.\n")


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    here = Path(__file__).resolve().parent
    parser = Parser(description="Turn a Jekyll blog into training data.", allow_abbrev=False)
    parser.add_argument("--public", action="append", metavar="DIR", type=Path, help="a public repository (repeatable)")
    parser.add_argument(
        "--private", action="append", metavar="DIR", type=Path, help="a private repository (repeatable)"
    )
    parser.add_argument("--author", action="append", metavar="NAME", help="a name you write under (repeatable)")
    parser.add_argument("--data-dir", metavar="DIR", type=Path, default=here / DATA_DIR, help=f"default: {DATA_DIR}")
    parser.add_argument("--drafts", action="store_true", default=INCLUDE_DRAFTS, help="read _drafts/ too")
    args = parser.parse_args(argv)
    if not (args.public or args.private):
        args.public, args.private = [here / name for name in PUBLIC_BLOGS], [here / name for name in PRIVATE_BLOGS]
    args.strict, args.author = bool(args.author), frozenset(name.strip().casefold() for name in args.author or AUTHORS)
    return args


def list_jobs(args: argparse.Namespace) -> list[tuple[str, str, str, str, str]]:
    """(file, blog, visibility, path in the blog, reason to skip it) of every candidate file."""
    jobs = []
    for visibility in ("public", "private"):
        for repository in getattr(args, visibility) or []:
            if not repository.is_dir():
                raise UserError(
                    f"There is no Jekyll repository at {repository}: name yours with --public or --private or in the "
                    "settings of extract_blog_data.py, or run `make demo` to see the whole job without one."
                )
            repository = repository.resolve()
            for file, reason in find_posts(repository, args.drafts):
                path = file.relative_to(repository).as_posix().encode("utf-8", "replace").decode()
                jobs.append((str(file), repository.name, visibility, path, reason))
    if not jobs:
        raise UserError(
            "No post found in "
            + ", ".join(str(repository) for repository in [*(args.public or []), *(args.private or [])])
            + ": a Jekyll blog keeps them in files like _posts/2006-08-25-title.md (`make demo` needs no blog)."
        )
    return sorted(jobs, key=lambda job: (job[2] != "public", job[1], job[3]))


def keep_own_posts(posts: list[Post], authors: frozenset[str], strict: bool):
    """Leaves out what others wrote, unless nobody goes by the names in the settings."""
    if authors and not strict and not any(post.names for post in posts):
        print(
            f"nobody here is called {', '.join(sorted(authors))}: every post is taken as the author's own; "
            "--author NAME sets who replies",
            file=sys.stderr,
        )
        return
    for post in posts:
        if authors and not post.reason and post.authors and not authors.intersection(post.authors):
            post.text = ""
            if not post.replies:
                post.reason, post.detail = "other author", ", ".join(post.authors)


def extract(args: argparse.Namespace):
    """Reads the blogs of the flags or settings and writes the data folder; raises UserError."""
    jobs, posts, start = list_jobs(args), [], time.monotonic()
    for post in read_all(jobs, args.author):
        posts.append(post)
        show_progress(len(posts), len(jobs), start)
    keep_own_posts(posts, args.author, args.strict)
    drop_duplicates(posts)
    kept = [post for post in posts if not post.reason]
    if not kept:
        reasons = ", ".join(f"{n} {reason}" for reason, n in Counter(post.reason for post in posts).most_common(3))
        raise UserError(f"None of the {len(posts)} files could be used ({reasons}): is this the right repository?")
    validation = split_posts(kept, VALIDATION_SHARE)
    report = make_report(posts, kept, validation, sorted(args.author))
    files = {
        "train_data.jsonl": json_lines(kept, validation, False),
        "val_data.jsonl": json_lines(kept, validation, True),
    }
    files["extraction_report.json"] = [json.dumps(report, ensure_ascii=False, indent=1) + "\n"]
    write_files(args.data_dir, files)
    print_report(report, args.data_dir)


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    try:
        extract(args)
        return 0
    except UserError as error:
        message = str(error)
    except BrokenProcessPool:
        message = "A worker process was killed, most likely for want of memory: close other programs and run again."
    except OSError as error:
        message = f"Cannot read or write {error.filename or 'the data folder'}: {error.strerror}."
    print(message, file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
