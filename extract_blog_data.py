"""Turn a Jekyll blog into conversations that a language model can be trained on.

    python extract_blog_data.py
    python extract_blog_data.py --public sample/public-blog --private sample/private-blog --author wrenlow

Reads every post of the repositories in the settings and writes data/train_data.jsonl, data/val_data.jsonl
(one conversation a line) and data/extraction_report.json (what became of every file). The second command prints:

    files found                                   88
      kept                                        75
      skipped: dated in the future                 1
      ...
    words, train                              17,297
    ...
    train: public post conversations              48
    ...
"""

import argparse
import contextlib
import email.utils
import functools
import hashlib
import html
import json
import math
import os
import re
import signal
import sys
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from datetime import date
from fnmatch import translate
from itertools import accumulate, count, groupby, pairwise
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
# Names of files and folders that Jekyll passes over unless they are included.
PASSED_OVER = re.compile(r"[._#].*|.*~")
NEVER_ENTERED = {"_site", "vendor", "node_modules", "gemfiles"}


@dataclass(slots=True)
class Post:
    """One candidate file: what was found in it, or the reason why it is skipped."""

    blog: str
    visibility: str
    path: str  # in the repository
    file: Path = Path()
    reason: str = ""
    detail: str = ""
    title: str = ""
    date: str | None = None
    authors: list[str] = field(default_factory=list)
    group: str = ""  # posts of one group stay on one side of the split
    request: str = ""
    text: str = ""
    shingles: np.ndarray | None = None
    replies: list[list[dict]] = field(default_factory=list)
    cases: Counter = field(default_factory=Counter)  # what the replies answer
    repairs: Counter = field(default_factory=Counter)
    redacted: list[tuple[str, str]] = field(default_factory=list)  # (kind, SHA-256)


def find_posts(repository: Path, drafts: bool) -> Iterator[tuple[Path, str]]:
    """Every file below a `_posts` or `_drafts` folder where Jekyll looks, and why it is left out ("" if it is not)."""
    config = {}
    with contextlib.suppress(OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError):
        config = load_yaml((repository / "_config.yml").read_text("utf-8-sig"))
    source = repository / "".join(strings(config.get("source"))[:1])
    root = source if source.is_dir() and source.resolve().is_relative_to(repository) else repository
    patterns = [pattern.strip("/") for pattern in strings(config.get("exclude"))]
    excluded = re.compile("|".join(f"{translate(name)}|{re.escape(name)}/" for name in patterns if name) or "(?!)")
    includes = {"_posts", "_drafts", *strings(config.get("include")), *strings(config.get("collections_dir"))}
    for parent, folders, files in os.walk(root):
        inside = Path(parent).relative_to(root)
        at, kind = next(((n, part) for n, part in enumerate(inside.parts) if part in ("_posts", "_drafts")), (0, None))
        found = files + [name for name in folders if Path(parent, name).is_symlink()]
        if kind is None:
            found = [name for name in found if name == "_posts"]
            folders[:] = [name for name in folders if name in includes or not PASSED_OVER.fullmatch(name)]
            ruled_out = {name for name in folders if excluded.match((inside / name).as_posix())} | NEVER_ENTERED
            folders[:] = [name for name in folders if name not in ruled_out]
        for name in found:
            path = Path(parent, name)
            leads_out = not Path(os.path.realpath(path)).is_relative_to(repository)
            reasons = {
                "link that leads out of the repository": leads_out,
                "excluded in _config.yml": excluded.match((inside / name).as_posix()),
                "not a regular file": leads_out or not path.is_file(),
                "draft": kind == "_drafts" and not drafts,
                "unsupported format": path.suffix.lower() not in MARKDOWN_SUFFIXES | HTML_SUFFIXES,
                "hidden from Jekyll": any(map(PASSED_OVER.fullmatch, (*inside.parts[at + 1 :], name))),
                "undated file name": kind == "_posts" and not re.match(r"\d{2,4}-\d{1,2}-\d{1,2}-.", name),
            }
            yield path, next((reason for reason, applies in reasons.items() if applies), "")


def strings(value: object) -> list[str]:
    """A string, a mapping with a name, or a list of these, as at most 100 plain strings."""
    values = value[:100] if isinstance(value, list) else [value]
    names = [item.get("name") if isinstance(item, dict) else item for item in values]
    return [name.strip() for name in names if isinstance(name, str) and name.strip()]


# ---------------------------------------------------------------- front matter
# Characters of the private-use area carry structure through Markdown; input that contains them loses them.
HOLE, SOFT, BRACE = "\ue000", "\ue001", "\ue002"  # Liquid was here; a newline typed in a paragraph; a raw brace
PRIVATE = str.maketrans("", "", HOLE + SOFT + BRACE)
# UTF-8 read as cp1252 leaves these pairs; ftfy then decides whether undoing it is certain.
MOJIBAKE = re.compile("[\u00c2\u00c3\u00e2\u00f0][\u0080-\u00bf\u0152-\u0178\u02c6\u02dc\u2013-\u2122]")
# A one-line value at the top level of the front matter.
TOP_LEVEL = re.compile(r"^(['\"]?)([\w-]+)\1[ \t]*:[ \t]+([^\s|>\[{&*!#].*)$", re.MULTILINE)
NUMERIC_DATE = re.compile(r"(\d{4})[-/.](\d{1,2})[-/.](\d{1,2})(?!\d)")
BaseLoader = getattr(yaml, "CBaseLoader", yaml.BaseLoader)  # every scalar stays the string that was typed


class JekyllFrontMatter(frontmatter.YAMLHandler):
    """python-frontmatter's YAML handler with Jekyll's idea of where front matter begins and ends."""

    FM_BOUNDARY = re.compile(r"\A---[ \t]*\n|^(?:---|\.\.\.)[ \t]*(?:\n|\Z)", re.MULTILINE)


def decode(data: bytes, repairs: Counter) -> str | None:
    """UTF-8, UTF-16 with its mark, or cp1252; None for anything else."""
    try:
        text = data.decode("utf-16" if data.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig")
    except UnicodeDecodeError:
        text = data.decode("cp1252", "replace").replace("\ufffd", "\0")
        repairs["read as cp1252"] += "\0" not in text
    if MOJIBAKE.search(text):
        fixed = "\n".join(map(ftfy.fix_encoding, text.split("\n")))
        repairs["encoding repaired"] += fixed != text
        text = fixed
    return None if "\0" in text else text.replace("\r\n", "\n").replace("\r", "\n").translate(PRIVATE)


def load_yaml(text: str) -> dict:
    """A YAML mapping without types, tags or code. Raises YAMLError, also where nesting would exhaust the C stack."""
    steps = (1 if bracket in "[{" else -1 for bracket in re.findall(r"[\[\]{}]", text))
    if max(accumulate(steps), default=0) > 200 or re.search(r"(?:[-?] +){200}", text):
        raise yaml.YAMLError("nested too deep")
    loaded = JekyllFrontMatter().load(text, Loader=BaseLoader)
    return loaded if isinstance(loaded, dict) else {}


def read_front_matter(text: str, repairs: Counter) -> tuple[dict, str] | None:
    """(front matter, body), or None if the file has no front matter; broken YAML is mended as far as it can be."""
    handler = JekyllFrontMatter()
    if not handler.detect(text) or len(parts := handler.FM_BOUNDARY.split(text, 2)) < 3:
        return None
    for repaired, block in enumerate(mend_yaml(parts[1])):
        with contextlib.suppress(yaml.YAMLError, RecursionError):
            meta = load_yaml(block)
            repairs["front matter repaired"] += repaired > 0
            return meta, parts[2]
    return {}, parts[2]


def mend_yaml(block: str) -> Iterator[str]:
    """Front matter as it is; with tabs made spaces and one-line values quoted; only the one-line values."""

    def quote(match: re.Match) -> str:
        value = match[3].strip()
        if value[0] in "'\"":
            value = re.sub(r"\\(['\"])", r"\1", value.strip(value[0]))
        return f"{match[2]}: {json.dumps(value, ensure_ascii=False)}"

    yield block
    yield (quoted := TOP_LEVEL.sub(quote, block.replace("\t", "  ")))
    yield "\n".join({match[2]: match[0] for match in reversed([*TOP_LEVEL.finditer(quoted)])}.values())


def parse_date(text: object) -> date | None:
    """The day in a date as bloggers spell it: "2006-08-25 22:17", "September 8, 2014", "Mon, 08 Sep 2014"."""
    text = text.strip() if isinstance(text, str) else ""
    try:
        if numeric := NUMERIC_DATE.match(text):
            return date(*map(int, numeric.groups()))
        day = email.utils.parsedate(f"{text} 00:00:00")
        return date(*day[:3]) if day else None
    except (ValueError, OverflowError):
        return None


# ---------------------------------------------------------------- Liquid
IAL_ITEM = r"""(?:(?:[.\#][\w-]+)+|[\w:-]+=(?:"[^"\n]*"|'[^'\n]*'|[^\s"'}]+)|[A-Za-z][\w-]*:?)"""
SHORTCODE = "caption|gallery|youtube|vimeo|audio|video|embed|playlist|code|sourcecode|googlemaps|contact-form"
LIST_MARK = r"(?:[-*+]|\d+[.)])[ \t]"
# What is no prose, and what becomes of it: see strip_liquid. The name of the outermost group tells the kind.
TOKEN = re.compile(
    rf"""^(?P<lead>[ \t]*(?:{LIST_MARK}[ \t]*)?)                              # fenced code, perhaps in a list item
            (?P<fence>`{{3,}}(?=[^`\n]*$)|~{{3,}}(?=[ \t]*[\w+\#.-]*[ \t]*$))(?P<info>[^\n]*)$
            (?P<closed>.*?^[ \t]*(?P=fence)[`~]*[ \t]*$)?
      | (?P<code>(?<!`)(?P<ticks>`+)(?!`)(?:(?!\n[ \t]*\n).){{1,2000}}?(?<!`)(?P=ticks)(?!`))
      | (?P<more><!--\s*(?:more|excerpt|break).*?-->) | <!--.*?-->
      | ^[\# \t]*\{{\{{-?\s*page\.title\b[^}}\n]*\}}\}}[ \t]*$                # a line that repeats the title
      | \{{%-?\s*case\b[^%]*%\}}\s*\{{%-?\s*when\b[^%]*%\}}
      | (?P<tag>\{{%-?\s*(?P<name>\#|[\w-]+).*?%\}})
      | \{{\{{(?P<output>.*?)\}}\}}
      | \{{::comment\}}.*?\{{:/(?:comment)?\}} | \{{::[^}}\n]*\}} | \{{:/\w*\}} | [ \t]*\{{\#[\w:.-]+\}}[ \t]*$
      | ^[ \t]*{LIST_MARK}[^\n]*\n[ \t]*\{{:\s*toc\s*\}}                       # a list item that asks for a list
      | \[[^\[\]\n]*\]\([^()\n]*\)\s*\{{:[^}}\n]*\.(?:btn|button)\b[^}}\n]*\}} # a link that is a button
      | \{{:\s*{IAL_ITEM}(?:\s+{IAL_ITEM})*\s*\}}
      | ^[ \t]*\$\$(?!\$)(?:(?!\n[ \t]*\n).)+?\$\$[ \t]*$                     # display maths
      | (?<!\$)\$\$(?P<inline>[^$\n]+)\$\$(?!\$)
      | \[(?P<short>{SHORTCODE})\b[^\]\n]*\](?![(\[:]).*?\[/(?P=short)\]      # a WordPress shortcode
      | \[(?:gallery\b|(?:{SHORTCODE})\b[^\]\n]*=)[^\]\n]*\](?![(\[:])
      | (?<!^)\[\^[\w.-]+\] | ^\[\^[\w.-]+\](?!:)                             # the mark of a footnote""",
    re.VERBOSE | re.MULTILINE | re.DOTALL,
)
RAW_BLOCK = re.compile(r"\{%-?\s*raw\s*-?%\}(.*?)\{%-?\s*endraw\s*-?%\}", re.DOTALL)
# Tags whose content is code, a template's loop, or somebody else's words.
DROPPED_TAGS = re.compile(
    "highlight|codeblock|code|comment|doc|blockquote|quote|epigraph|tweet|for|tablerow|capture|schema|style|stylesheet|"
    "javascript|script|mermaid|math|katex|latex|plantuml|graphviz|chart|table|gallery|figure|caption|button"
)
LIQUID_WORDS = {"content", "site", "page", "layout", "post", "paginator", "theme", "jekyll", "include", "forloop"}
PROSE_FIELDS = {"title", "description", "subtitle", "excerpt", "summary", "tagline"}
ASSIGNED = re.compile(r"\{%-?\s*(?:assign|capture)\s+([\w-]+)")
FUNCTION_WORD = re.compile(  # English, and some French, Spanish and German
    r"\b(?i:a|an|and|at|but|by|de|des|die|du|el|en|es|for|he|her|i|in|is|it|je|la|le|les|like|me|my|no|not|of|on|or|que|she"
    r"|so|that|the|they|this|to|un|und|une|was|we|were|what|with|you|your|\w+'\w+)\b"
)
CODE_SIGN = re.compile(r"[{};<>=$\\|@#_]|\w\(|//|::|->|^\s*(?:\.|-\w|sudo |\w+: )|\w[./]\w")


def strip_liquid(text: str, meta: dict) -> str:
    """The source without template code, code blocks, display maths and kramdown attributes, ready for Markdown."""
    if not any(sign in text for sign in ("{", "`", "~~~", "<!--", "$$", "[")):
        return text
    if "endraw" in text:
        text = RAW_BLOCK.sub(lambda raw: re.sub(r"\{(?=[{%])", BRACE, raw[1]), text)
    assigned = set(ASSIGNED.findall(text))
    out, position = [], 0
    while token := TOKEN.search(text, position):
        out.append(text[position : token.start()])
        kept, position, kind = "", token.end(), token.lastgroup
        if kind == "tag":
            kept, position = HOLE, end_of_tag(text, token)
        elif kind == "output":
            kept = resolve_output(token["output"], meta, assigned)
        elif kind == "code":
            block = len(token["ticks"]) > 2 and "\n" in token[0]  # code whose fences share its lines
            kept = "" if block else token[0]
        elif kind == "closed" and (token["fence"][0] == "`" or token["info"] or not looks_like_prose(token["closed"])):
            kept = token["lead"] + "\n"
        elif kind in ("closed", "info"):  # prose between ornaments, or a fence that is never closed
            kept, position = token["lead"], token.end("info")
        else:
            kept = "\n\n" if kind == "more" else token["inline"] or ""
        out.append(kept)
    whole = "".join(out) + text[position:]
    return re.sub(f"^[ \t{HOLE}]+$", "", whole, flags=re.MULTILINE).replace(BRACE, "{")


def end_of_tag(text: str, token: re.Match) -> int:
    """Where reading goes on after a Liquid tag: after its whole block if that is dropped or is no first branch."""
    name = token["name"]
    if name in ("else", "elsif", "when"):
        name = "(?:if|unless|case)"
    elif not DROPPED_TAGS.fullmatch(name):
        return token.end()
    nests, depth = name not in ("highlight", "comment", "codeblock"), 1
    for tag in re.compile(rf"\{{%-?\s*(end)?{name}\b[^%]*%\}}").finditer(text, token.end()):
        depth += -1 if tag[1] else nests
        if not depth:
            return tag.end()
    return token.end()


def resolve_output(expression: str, meta: dict, assigned: set[str]) -> str:
    """`{{ page.title }}` is the front matter's value, `{{word}}` the author's word, anything else leaves a hole."""
    name, _, filters = (part.strip(" -\n") for part in expression.partition("|"))
    key = name.removeprefix("page.")
    if key != name and key in PROSE_FIELDS and "url" not in filters:
        return meta[key] if isinstance(meta.get(key), str) else HOLE
    return name if name.isalpha() and not filters and name.lower() not in LIQUID_WORDS | assigned else HOLE


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
# Extension: the sign of it that a text must show.
EXTENSIONS = {"footnotes": "[^", "tables": "|", "def_list": "\n:", "abbr": "*[", "md_in_html": "markdown="}


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
            element.tail = element.tail and element.tail.replace("\n", SOFT)


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
    "a|abbr|acronym|area|base|bdi|bdo|big|blink|br|cite|col|colgroup|dfn|font|ins|label|legend|link|lj|map|mark|marquee|"
    "meta|nobr|param|q|r[bpt]|ruby|small|source|span|sub|sup|t[dhr]|tbody|tfoot|thead|time|title|track|u|var|wbr|xmp"
)
# Classes and ids of what a theme, an importer or a service put around the author's text.
FURNITURE = re.compile(
    r"(?i:comments?|comment-?list|respond|disqus[\w-]*|(?:wp-)?caption[\w-]*|shar(?:e|ing)[\w-]*|social[\w-]*|related[\w-]*|"
    r"sharedaddy|addtoany[\w-]*|twitter-(?:tweet|video)|instagram-media|fb-post|highlight(?:er-rouge)?|quiz[\w-]*|"
    r"bibliography|footnote-(?:ref|backref)|reversefootnote|btn|button|mermaid|blockquote|pullquote)"
)
PARAGRAPH_TAG = re.compile(r"<(?:p|br|div)\b", re.IGNORECASE)
# A line break with the blanks around it; a newline typed behind a <br> is not a second one.
LINE_END = re.compile(rf"[^\S\n]*(?:(\n){SOFT}?|({SOFT}))[^\S\n]*")
SPACE = re.compile(r"[ \t\r\n\f]+")
ENTITY = re.compile(r"&(?:#\d{1,7}|#[xX][0-9a-fA-F]{1,6}|[A-Za-z]\w{1,30});")
# Control characters, soft hyphens, zero-width and bidi marks, U+FFFD, and zero-width joiners outside of emoji, Arabic
# and Indic words.
INVISIBLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\u200b\u200e\u200f\u202a-\u202e\u2060-\u2069\ufeff\ufffc\ufffd\ue000-\ue002]"
    "|(?<![\u0600-\u0dff\u2190-\U0010ffff])[\u200c\u200d]|[\u200c\u200d](?![\u0600-\u0dff\u2190-\U0010ffff])"
)


def to_text(markup: str, is_html: bool, title: str = "", line_breaks: str = "keep") -> str:
    """HTML or Markdown (Liquid already gone) to plain text: paragraphs, list lines, emphasis as the author types it."""
    join = line_breaks == "join" or (line_breaks == "auto" and is_hard_wrapped(markup))
    if is_html and not PARAGRAPH_TAG.search(markup):
        markup = re.sub(r"\n[ \t]*\n", "<p>", markup)  # WordPress makes paragraphs of blank lines
    if not is_html:
        extensions = tuple(name for name, sign in EXTENSIONS.items() if sign in markup)
        markup = converter(extensions, "<" in markup).reset().convert(YEAR.sub(r"\1\\", markup))
    blocks = PlainText().read(BeautifulSoup(markup, "html.parser"))
    if blocks and blocks[0][0] == "heading" and blocks[0][1].casefold() == title.casefold():
        del blocks[0]
    out, last = [], ""
    for kind, block in blocks:
        if join:
            block = re.sub(rf"{SOFT}(?=[-*+\u2022] |\d+[.)] |{TIMED.pattern})", "\n", block)
            block = re.sub(f"(?<=[\u3000-\u9fff\uff00-\uffef]){SOFT}(?=[\u3000-\u9fff\uff00-\uffef])", "", block)
            block = block.replace(SOFT, " ")
        out += ["\n" if kind == last == "list" else "\n\n", block.replace(SOFT, "\n")]
        last = kind
    return tidy("".join(out))


class PlainText:
    """Collects the text of an HTML tree, block by block, as the author would type it."""

    def __init__(self):
        self.blocks: list[tuple[str, str]] = []  # (kind: "list", "heading" or "text", text)
        self.lists: list[Iterator[int] | None] = []  # of each open list its numbers, None for bullets
        self.item = ""  # the mark of a list item that has no text yet
        self.parts: list[str] = []
        self.marks: list[int] = []  # where the open emphases begin in parts
        self.links = self.in_link = self.outside = 0

    def read(self, root: Tag) -> list[tuple[str, str]]:
        """The blocks of the tree; not recursive, because nesting 10,000 deep occurs."""
        stack = [(root, iter(root.contents))]
        while stack:
            node = next(stack[-1][1], None)
            if node is None:
                self.close(stack.pop()[0].name)
            elif type(node) is NavigableString:
                self.text(node)
            elif isinstance(node, Tag):
                labels = [*node.get("class", ()), node.get("id", "")] if node.attrs else ()
                if DROPPED.fullmatch(node.name) or any(map(FURNITURE.fullmatch, labels)):
                    if node.name not in ("img", "a", "sup", "span"):  # these stand in the line
                        self.flush()
                else:
                    self.open(node)
                    stack.append((node, iter(node.contents)))
        self.flush()
        return self.blocks

    def open(self, tag: Tag):
        name = tag.name
        if name in EMPHASIS:
            self.marks.append(len(self.parts))
        elif name == "br":
            self.parts.append("\n")
        elif name == "a":
            self.links, self.in_link = self.links + 1, self.in_link + 1
        elif BLOCK.fullmatch(name):
            self.flush()
            if name in ("ul", "ol"):
                start = str(tag.get("start"))
                self.lists.append(count(int(start) if start.isdecimal() else 1) if name == "ol" else None)
            elif name == "li":
                self.item = f"{next(self.lists[-1])}. " if self.lists and self.lists[-1] else "- "
        elif name == "lj":
            self.parts.append(str(tag.get("user") or ""))  # LiveJournal's way to name a friend
        elif not tag.attrs and name.isalpha() and not INVISIBLE_TAG.fullmatch(name):
            self.text(f"<{name}>")

    def text(self, text: str):
        text = SPACE.sub(" ", text)
        if "&" in text:  # left over from double escaping
            text = ENTITY.sub(lambda entity: html.unescape(entity[0]), text)
        self.outside += not self.in_link and any(map(str.isalnum, text))
        self.parts.append(text)

    def close(self, name: str):
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

    def flush(self, kind: str = "text"):
        """Ends a block; a row of links alone is navigation."""
        text = "".join(self.parts).strip(" \n\xa0" + SOFT + HOLE)
        if "\n" in text or SOFT in text:
            text = LINE_END.sub(r"\1\2", text)
        if text and (self.outside or self.links < 2):
            if self.lists:
                kind, text = "list", "  " * (len(self.lists) - 1) + (self.item or "  ") + text
            self.item = ""
            self.blocks.append((kind, text))
        self.parts, self.marks, self.links, self.in_link, self.outside = [], [], 0, 0, 0


def clean_title(title: object) -> str:
    """The title as plain text: Markdown, HTML and entities resolved."""
    text = SPACE.sub(" ", title).strip() if isinstance(title, str) else ""
    if re.search(r"[<&*_`\[\\~]", text):
        text = BeautifulSoup(markdown.markdown(HOLE + text), "html.parser").get_text()
        text = ENTITY.sub(lambda entity: html.unescape(entity[0]), text)
    return SPACE.sub(" ", INVISIBLE.sub("", text.replace("\xa0", " "))).strip()


# ---------------------------------------------------------------- lines
# [text][4] without its definition, which Markdown leaves as it is; inline code is matched first to be left alone.
STRAY_LINK = re.compile(r"`[^`]*`|!?\[((?:`[^`]*`|[^\[\]`])+)\](?:\[[^\[\]`]*\]|\([^()\s`]*\))")
# A line of bare URLs, or a table row.
NO_TEXT = re.compile(r"\s*(?:[<(\[*_]*(?:https?://|www\.)\S+(?:\s+(?:https?://|www\.)\S+)*|\|.*\|)\s*")
TAIL = re.compile(r"[\W_]*(?:posted (?:via|with|using)|sent (?:via|from) my|cross-?posted (?:to|on|at))\b.{0,80}", re.I)
CLOCK = r"\d{1,2}:\d\d(?::\d\d)?(?: ?[AaPp][Mm])?"
# name (10:36:16 PM): text / [10:36] <name> text / [10:36] name: text / 10:36 <name> text
TIMED = re.compile(
    rf"[-*_ ]*(?:[^\s:(\[][^:(\[\n]{{0,30}}[(\[]{CLOCK}[)\]][*_]*:|"
    rf"[(\[]{CLOCK}[)\]][ \t*_]*(?:<[^>\n]{{1,30}}>|[\w.-]{{1,24}}[*_]*:)|{CLOCK}\s*<[^>\n]{{1,30}}>)"
)
SAID = re.compile(r"[*_<]*([^\W\d_][\w.'-]{0,23}(?: [\w.'-]{1,20})?)>?[*_]*:[*_]* +\S")
NEW_LINE = re.compile(rf"{LIST_MARK}|{SAID.pattern}|{TIMED.pattern}")


def is_hard_wrapped(source: str) -> bool:
    """Whether an editor broke the lines: most end because the next word would not have fitted in any more."""
    pairs, closed = [], 0  # (length, length with the next line's first word); lines that end a sentence
    for line, following in pairwise(map(str.strip, source.split("\n"))):
        word = following.partition(" ")[0]
        markup = line[:1] in "#>|<" or word[:1] in "#>|<" or NEW_LINE.match(following)
        if not (markup or "](" in line or "http" in line or "[" in word or "http" in word):
            pairs.append((len(line), len(line) + 1 + len(word)))
            closed += line[-1] in ".!?:\u2026)\"'*"
    few = len(pairs) < 9  # then the signs must be clear
    if not pairs or closed > (0 if few else 0.3 * len(pairs)):
        return False
    width = sorted(length for length, _ in pairs)[len(pairs) * 3 // 4]
    full = sum(length <= 1.12 * width and reach > 0.86 * width for length, reach in pairs)
    return 52 <= width <= 140 and full >= (0.9 if few else 0.66) * len(pairs)


def tidy(text: str) -> str:
    """The text without chat logs, bare URLs, table rows and importers' tails; no two blank lines in a row."""
    text = re.sub(r"(?<=\S) {2,}", " ", text)
    lines = [line for line in text.split("\n") if not NO_TEXT.fullmatch(line)]
    chat = chat_lines(lines)
    text = "\n".join("" if n in chat else line for n, line in enumerate(lines))
    text = re.sub(r"\n{3,}", "\n\n", text).strip().replace("\xa0", " ").replace("\u202f", " ")
    if "][" in text or "](" in text:
        text = STRAY_LINK.sub(lambda link: link[1] or link[0], text)
    head, _, tail = text.rpartition("\n\n")
    return INVISIBLE.sub("", head if TAIL.fullmatch(tail) else text).strip()


def chat_lines(lines: list[str]) -> set[int]:
    """Indexes of pasted chats: runs of timed lines, and 4 or more short lines in a row by recurring speakers."""
    timed = [n for n, line in enumerate(lines) if ":" in line and TIMED.match(line)]
    gone = {n for a, b in pairwise(timed) if sum(map(bool, lines[a:b])) <= 4 for n in range(a, b + 1)}
    run: dict[int, str] = {}
    for n, line in enumerate([*lines, "end"]):
        speaker = SAID.match(line)
        if speaker and line.count(" ") < 40:  # longer ones are an interview
            run[n] = speaker[1].casefold()
        elif line:
            if len(run) >= 4 and sum(count > 1 for count in Counter(run.values()).values()) >= 2:
                gone |= run.keys()
            run = {}
    return gone


# ---------------------------------------------------------------- personal data
# Text without any of these signs holds none.
PERSONAL_SIGN = re.compile(r"@|\d{2}[ .()-]*\d\d|[\w-]{14}|-----BEGIN|\bdot\b|\bat ?[\])}]", re.IGNORECASE)
PERSONAL_DATA = re.compile(
    r"""(?<!\w)(?:
      (?P<secret>-----BEGIN\ [A-Z ]*PRIVATE\ KEY-----.*?(?:-----END\ [A-Z ]*PRIVATE\ KEY-----|\Z)
        | (?:AKIA|ASIA)[0-9A-Z]{16}\b | gh[oprsu]_\w{30,} | github_pat_\w{30,} | sk-[\w-]{20,} | xox[a-z]-[\w-]{10,}
        | AIza[\w-]{30,} | eyJ[\w-]{10,}\.[\w-]{10,}\.[\w-]*
        | (?<![/-])[0-9a-fA-F]{32,}(?![\w-])                                # a key or a digest in hexadecimal
        | (?<![/-])(?=[\w-]*[a-z])(?=[\w-]*[A-Z])(?=(?:[A-Za-z_-]*\d){3})[A-Za-z0-9_-]{30,}(?![\w-]))   # a token
      | (?<![@.+-])(?P<email>[\w.+-]{1,64}(?:@|\s?[\[({]\s?at\s?[\])}]\s?)  # name@host.com, name [at] host [dot] com
            [\w-]{1,63}(?:(?:\s?[\[({]\s?dot\s?[\])}]\s?|\.)[\w-]{1,63})+
        | [\w.+-]{1,64}\ at\ [\w-]{1,63}(?:\ dot\ [\w-]{1,63})*\ dot\ (?:com|org|net|edu|gov|io|co|uk|de|fr|us)\b)
      | (?<![.+/=-])(?P<phone>\+(?=(?:\D{0,3}\d){7})\d{1,3}(?:[ .\u00a0-]?\(?\d{1,4}\)?){2,6}           # international
        | (?:1[ .-])?(?:\(\d{3}\)\ ?|\d{3}[ .-])\d{3}[ .-]\d{4}             # North America
        | 0[1-9](?:[ .-]\d{2}){4}                                           # France, in pairs
        | \(?0\d{2,4}\)?[ /-]\d{3,4}[ -]?\d{3,4} | 0\d{1,2}-\d{3,4}-\d{4}   # Britain, Germany, Korea
        | 555-\d{4} | (?:(?<=call\ )|(?<=phone\ )|(?<=number\ is\ ))\d{3}[-. ]\d{4}   # local, where announced
        )(?![\w/]|[.-]\d)
    )""",
    re.VERBOSE | re.DOTALL,
)
# What the usual tokenizers would read as a control token; a space after its first sign makes it plain text.
CONTROL_TOKEN = re.compile(
    r"(?i:<[|\uff5c]|[|\uff5c]>|</?s>|\[/?INST\]|<</?SYS>>|</?(?:bos|eos|pad|unk|mask|(?:start|end)_of_turn|think)>)"
)


def find_personal_data(text: str) -> list[tuple[str, int, int, str]]:
    """(kind, start, end, normalised) of every e-mail address, telephone number and key, in order, not overlapping."""
    found = []
    for match in PERSONAL_DATA.finditer(text) if PERSONAL_SIGN.search(text) else ():
        kind, plain = match.lastgroup, match[0]
        if kind == "phone":
            plain = re.sub(r"\D", "", plain)
        elif kind == "email":
            plain = plain.lower() if "@" in plain else re.sub(r"\W*\bat\b\W*", "@", plain.lower())
            plain = re.sub(r"[\s\[({]+dot[\s\])}]+", ".", plain)
        found.append((kind, *match.span(), plain))
    return found


def protect(text: str, post: Post) -> str:
    """Text that may leave the blog: personal data replaced (counted in the post), control tokens made harmless."""
    out, position = [], 0
    for kind, start, end, normalised in find_personal_data(text) if REDACT else []:
        post.redacted.append((kind, hashlib.sha256(normalised.encode("utf-8", "replace")).hexdigest()))
        out += [text[position:start], f"[{kind}]"]
        position = end
    return CONTROL_TOKEN.sub(lambda token: token[0][0] + " " + token[0][1:], "".join(out) + text[position:])


# ---------------------------------------------------------------- conversations
# Untitled, a date, a number, signs only: nothing that a request could be made of.
PLACEHOLDER = re.compile(
    r"\W*(?i:untitled|no (?:title|subject)|title|none|null|nil|n/a|test|blog|post|\d{4}\W\d\d?\W\d\d?.*|[\d\W]*)\W*"
)
URL = re.compile(r"(?:https?://|www\.)\S*|[\w-]+(?:\.[\w-]+)*\.(?:com|org|net|edu|io|me|info|blog)\b\S*", re.I)
HANDLE = re.compile(r"@\w+|(?=\w*[a-z])(?=\w*\d)[a-z]\w+|[a-z0-9]+_\w+", re.I)
DULL_TAGS = {"uncategorized", "general", "misc", "blog", "post", "posts", "other", "default", "livejournal", "all"}
# A word; a Chinese, Japanese or Korean character counts as one.
WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|[^\W\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]+")


def words_of(text: str) -> list[str]:
    return WORD.findall(text.casefold())


def make_request(post: Post, tags: list[str]) -> str:
    """What the user says so that the post is the answer: from a title that gives nothing away, the tags, or neither."""
    dice = zlib.crc32(f"{post.blog}/{post.path}".encode("utf-8", "replace"))
    title, words = post.title, words_of(post.title)
    usable = len(title) <= 200 and not any(useless.fullmatch(title) for useless in (PLACEHOLDER, URL, HANDLE))
    if words and usable and words_of(post.text[: 8 * len(title) + 200])[: len(words)] != words:
        return TITLE_REQUESTS[dice % len(TITLE_REQUESTS)].format(title)
    topics = [tag for tag in tags if 2 < len(tag) < 40 and tag.lower() not in DULL_TAGS and not URL.fullmatch(tag)]
    if topics and dice % 2:
        return TAG_REQUESTS[dice // 2 % len(TAG_REQUESTS)].format(" and ".join(topics[:2]))
    return GENERAL_REQUESTS[dice // 2 % len(GENERAL_REQUESTS)]


def read_comments(comments: object) -> dict[str, dict]:
    """Comments in their usual spellings, nested replies included, as {id: {parent, author, content}}."""
    found: dict[str, dict] = {}
    waiting = [(comments, "")]
    while waiting and len(found) < 5000:
        items, above = waiting.pop()
        for item in (item for item in items if isinstance(item, dict)) if isinstance(items, list) else ():

            def first(*names: str, item=item) -> str:
                return next((text for name in names for text in strings(item.get(name))), "")

            key, parent = first("id", "_id"), first("parent", "parent_id", "replying_to", "reply_to")
            key = key if key and key not in found else f"number {len(found)}"
            found[key] = {
                "parent": above if parent in ("", "0", "null", "~") else parent,
                "author": first("author", "name").casefold(),
                "content": first("content", "message", "body", "text"),
            }
            waiting += [(item[name], key) for name in ("replies", "children") if name in item]
    return found


def add_replies(post: Post, comments: dict[str, dict], authors: frozenset[str]):
    """One conversation for each of the author's comments, with the comments it answers before it."""

    @functools.cache
    def said(key: str) -> str:
        source = strip_liquid(comments[key]["content"], {}) if key in comments else ""
        return protect(to_text(source, bool(PARAGRAPH_TAG.search(source))), post)

    for key, comment in comments.items():
        if comment["author"] not in authors or not said(key):
            continue
        chain: dict[str, tuple[str, str]] = {}
        while key not in chain and len(chain) <= REPLY_DEPTH and said(key):
            chain[key] = ("assistant" if comments[key]["author"] in authors else "user", said(key))
            key = comments[key]["parent"]
        turns, case = [*reversed(chain.values())], "answers a comment"
        if turns[0][0] == "assistant":
            case = "answers a missing comment" if comment["parent"] else "comments on the post"
            turns.insert(0, ("user", reply_context(post)))
        if turns[0][1]:
            merged = [(role, [text for _, text in same]) for role, same in groupby(turns, lambda turn: turn[0])]
            post.replies.append([{"role": role, "content": "\n\n".join(texts)} for role, texts in merged])
        post.cases[case if turns[0][1] else "left out, answers nothing"] += 1


def reply_context(post: Post) -> str:
    """The post as a reader would bring it up: its title and opening; empty if it has neither."""
    opening = post.text[:400].split("\n\n")[0]
    if len(opening) > 200:
        opening = opening[:200].rpartition(" ")[0] + " ..."
    title = f' "{post.title}".' if post.title and not PLACEHOLDER.fullmatch(post.title) else "."
    return REPLY_CONTEXT.format(title, opening and f" It begins:\n\n{opening}") if len(title) > 1 or opening else ""


# ---------------------------------------------------------------- one file
def read_post(post: Post, authors: frozenset[str], today: date) -> Post:
    """Fills in the post of a file; whatever is wrong with it becomes the reason why it is skipped."""
    signal.signal(signal.SIGVTALRM, out_of_time)
    signal.setitimer(signal.ITIMER_VIRTUAL, MAX_SECONDS, 1)  # processor time, so that a busy machine skips nothing
    try:
        post.reason = post.reason or fill_post(post, authors, today)
        return post
    except TimeoutError:
        post.reason = f"took over {MAX_SECONDS} s to parse"
    except RecursionError:
        post.reason = "nested too deep"
    except (ParserRejectedMarkup, AssertionError, ValueError, OSError) as error:
        post.reason = "unreadable" if isinstance(error, OSError) else "broken markup"
        post.detail = type(error).__name__
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    converter.cache_clear()  # what was interrupted is in no state to be used again
    return post


def out_of_time(*_):
    raise TimeoutError


def fill_post(post: Post, authors: frozenset[str], today: date) -> str:
    """Reads the file into the post; returns the reason why it cannot be used, if there is one."""
    if post.file.stat().st_size > MAX_BYTES:
        return "too large"
    if (source := decode(post.file.read_bytes(), post.repairs)) is None:
        return "undecodable"
    if (parts := read_front_matter(source, post.repairs)) is None:
        return "no front matter"
    meta, body = parts
    day = parse_date(meta.get("date")) or parse_date(post.file.name)
    if str(meta.get("published", "")).lower() in ("false", "no", "off", "n"):
        return "unpublished"
    if day and (day - today).days > 1:
        return "dated in the future"
    title = clean_title(meta.get("title"))
    text = to_text(strip_liquid(body, meta), post.file.suffix.lower() in HTML_SUFFIXES, title, LINE_BREAKS)
    post.date, post.title, post.text = day and day.isoformat(), protect(title, post), protect(text, post)
    post.authors = [name.casefold() for name in strings(meta.get("author")) + strings(meta.get("authors"))]
    add_replies(post, read_comments(meta.get("comments")), authors)
    words, title_words = words_of(post.text), words_of(post.title)
    post.group = f"{post.date} {title_words}" if day and title_words else f"{post.blog}/{post.path}"
    if len(words) < MIN_WORDS:
        post.text, post.detail = "", f"{len(words)} words" if words else ""
        return "" if post.replies else "too short" if words else "empty after cleaning"
    tags = meta.get("tags")
    tags = strings(tags.split() if isinstance(tags, str) else tags)
    post.request = make_request(post, [protect(clean_title(tag), post) for tag in tags])
    post.shingles = shingle_hashes(words)
    return ""


def read_all(posts: list[Post], authors: frozenset[str]) -> Iterator[Post]:
    """The posts filled in, in order, by as many processes as there are cores; a handful is read right here."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    read = functools.partial(read_post, authors=authors, today=date.today())
    with ProcessPoolExecutor(cores) as pool:
        share = min(64, len(posts) // (4 * cores))
        yield from map(read, posts) if cores == 1 or len(posts) < 60 else pool.map(read, posts, chunksize=share)


# ---------------------------------------------------------------- near-duplicates
def shingle_hashes(words: list[str], size: int = 5) -> np.ndarray:
    """Sorted distinct 64-bit hashes of a text's word 5-grams; a shorter text is one shingle."""
    codes = np.array([zlib.crc32(word.encode("utf-8", "replace")) for word in words], dtype=np.uint64)
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
    everything = np.concatenate([np.zeros(0, np.uint64), *prefixes])
    _, which, times = np.unique(everything, return_inverse=True, return_counts=True)
    shared = np.split(times[which] > 1, np.cumsum([prefix.size for prefix in prefixes]))
    index: dict[int, list[int]] = defaultdict(list)
    near: dict[int, int] = {}
    for i, hashes in enumerate(sets):
        keys = prefixes[i][shared[i]].tolist()
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
    texts.sort(key=lambda post: (post.visibility != "public", -len(post.text), post.blog, post.path))
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
    wanted = max(int(len(posts) * share + 0.5), int(len(posts) > 1))
    chosen: set[int] = set()
    slugs = [(min(Path(posts[i].path).stem for i in members), members) for members in groups.values()]
    for _, members in sorted(slugs, key=lambda slug: hashlib.sha256(slug[0].encode("utf-8", "replace")).digest()):
        if len(chosen) + len(members) <= wanted:
            chosen.update(members)
    return chosen


# ---------------------------------------------------------------- output
def conversations(post: Post) -> Iterator[dict]:
    """The lines of the data files that come from a post."""
    tail = {key: getattr(post, key) for key in ("visibility", "blog", "path", "title", "date")}
    if post.text:
        turns = [{"role": "user", "content": post.request}, {"role": "assistant", "content": post.text}]
        yield {"messages": turns, "kind": "post", **tail}
    yield from ({"messages": turns, "kind": "reply", **tail} for turns in post.replies)


def json_lines(posts: list[Post]) -> Iterator[str]:
    return (json.dumps(line, ensure_ascii=False) + "\n" for post in posts for line in conversations(post))


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


def make_report(posts: list[Post], splits: dict[str, list[Post]], authors: list[str]) -> dict:
    """What data/extraction_report.json holds."""
    kept, skipped = sum(splits.values(), []), [post for post in posts if post.reason]
    words, lines = dict.fromkeys(splits, 0), Counter()
    for split, post in ((split, post) for split, members in splits.items() for post in members):
        for line in conversations(post):
            words[split] += len(words_of(line["messages"][-1]["content"]))
            lines[split, line["kind"], post.visibility] += 1
    conversation_rows = [(*key, lines[key]) for key in sorted(lines)]
    digests = {(digest, kind, post.visibility) for post in kept for kind, digest in post.redacted}

    def counted(items: Iterable[str]) -> dict[str, int]:
        return dict(sorted(Counter(items).items()))

    def table(names: tuple[str, ...], rows: list[tuple]) -> list[dict]:
        return [dict(zip(names, row, strict=True)) for row in rows]

    return {
        "files_found": len(posts),
        "files_kept": len(kept),
        "files_skipped": counted(post.reason for post in skipped),
        "posts": {split: len(members) for split, members in splits.items()},
        "words": words,
        "conversations": table(("split", "kind", "visibility", "count"), conversation_rows),
        "replies": counted(case for post in kept for case in post.cases.elements()),
        "repairs": counted(repair for post in kept for repair in post.repairs.elements()),
        "redactions": counted(kind for post in kept for kind, _ in post.redacted),
        "redacted": table(("sha256", "kind", "visibility"), sorted(digests)),
        "authors": authors,
        "skipped": table(("blog", "path", "reason", "detail"), [(p.blog, p.path, p.reason, p.detail) for p in skipped]),
    }


def print_report(report: dict, data_dir: Path):
    """The table for the terminal."""
    rows = {"files found": report["files_found"], "  kept": report["files_kept"]}
    rows |= {f"  skipped: {reason}": count for reason, count in report["files_skipped"].items()}
    rows |= {f"words, {split}": count for split, count in report["words"].items()}
    for line in report["conversations"]:
        rows[f"{line['split']}: {line['visibility']} {line['kind']} conversations"] = line["count"]
    for key, label in {"replies": "replies", "repairs": "files", "redactions": "redacted"}.items():
        rows |= {f"{label}: {name}": count for name, count in report[key].items()}
    width = max(map(len, rows))
    for name, number in rows.items():
        print(f"{name:<{width}} {number:>9,}")
    print(f"written to {data_dir}: train_data.jsonl, val_data.jsonl, extraction_report.json (lists every skipped file)")


# ---------------------------------------------------------------- main
REMEDY = "name yours with --public or --private or in the settings, or see the whole job without one: `make demo`"


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    here = Path(__file__).resolve().parent
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.error = lambda message: sys.exit(f"extract_blog_data.py: {message} (--help lists the flags)")
    several = {"action": "append", "default": []}
    parser.add_argument("--public", **several, metavar="DIR", type=Path, help="a public repository (repeatable)")
    parser.add_argument("--private", **several, metavar="DIR", type=Path, help="a private repository (repeatable)")
    parser.add_argument("--author", **several, metavar="NAME", help="a name you write under (repeatable)")
    parser.add_argument("--data-dir", metavar="DIR", type=Path, default=here / DATA_DIR, help=f"default: {DATA_DIR}")
    parser.add_argument("--drafts", action="store_true", default=INCLUDE_DRAFTS, help="read _drafts/ too")
    args = parser.parse_args(argv)
    if not args.public + args.private:
        args.public, args.private = [here / name for name in PUBLIC_BLOGS], [here / name for name in PRIVATE_BLOGS]
    args.strict, args.author = bool(args.author), frozenset(name.strip().casefold() for name in args.author or AUTHORS)
    return args


def list_posts(args: argparse.Namespace) -> list[Post]:
    """Every candidate file of the repositories, not read yet."""
    posts = []
    for visibility in ("public", "private"):
        for repository in getattr(args, visibility):
            if not repository.is_dir():
                sys.exit(f"There is no Jekyll repository at {repository}: {REMEDY}.")
            root = repository.resolve()
            for file, reason in find_posts(root, args.drafts):
                path = file.relative_to(root).as_posix().encode("utf-8", "replace").decode()
                posts.append(Post(root.name, visibility, path, file, reason))
    if not posts:
        where = ", ".join(map(str, args.public + args.private))
        sys.exit(f"No post found in {where}, that is, no file like _posts/2006-08-25-title.md: {REMEDY}.")
    return sorted(posts, key=lambda post: (post.visibility != "public", post.blog, post.path))


def drop_other_authors(posts: list[Post], authors: frozenset[str], strict: bool):
    """Leaves out what others wrote, unless nobody goes by the names in the settings."""
    if not (strict or any(post.cases or authors.intersection(post.authors) for post in posts)):
        message = "every post is taken as the author's own; --author NAME sets who replies"
        print(f"nobody here is called {', '.join(sorted(authors))}: {message}", file=sys.stderr)
        return
    for post in posts:
        if not post.reason and post.authors and not authors.intersection(post.authors):
            post.text, post.detail = "", ", ".join(post.authors)
            post.reason = "" if post.replies else "other author"


def extract(args: argparse.Namespace):
    """Reads the blogs of the flags or settings and writes the data folder."""
    found, posts = list_posts(args), []
    for post in read_all(found, args.author):
        posts.append(post)
        if len(posts) % 50 == 0 or len(posts) == len(found):
            end = "\r" if len(posts) < len(found) else "\n"
            print(f"read {len(posts):,} of {len(found):,} files", end=end, file=sys.stderr, flush=True)
    drop_other_authors(posts, args.author, args.strict)
    drop_duplicates(posts)
    kept = [post for post in posts if not post.reason]
    if not kept:
        reasons = ", ".join(f"{n} {reason}" for reason, n in Counter(post.reason for post in posts).most_common(3))
        sys.exit(f"None of the {len(posts)} files could be used ({reasons}): is this the right repository?")
    chosen = split_posts(kept, VALIDATION_SHARE)
    splits = {
        "train": [post for i, post in enumerate(kept) if i not in chosen],
        "validation": [post for i, post in enumerate(kept) if i in chosen],
    }
    report = make_report(posts, splits, sorted(args.author))
    files = {"train_data.jsonl": json_lines(splits["train"]), "val_data.jsonl": json_lines(splits["validation"])}
    files["extraction_report.json"] = [json.dumps(report, ensure_ascii=False, indent=1) + "\n"]
    write_files(args.data_dir, files)
    print_report(report, args.data_dir)


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    try:
        extract(args)
    except BrokenProcessPool:
        sys.exit("A worker process was killed, most likely for want of memory: close other programs and run again.")
    except OSError as error:
        sys.exit(f"Cannot read or write {error.filename or 'the data folder'}: {error.strerror}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
