"""Count how other bloggers use common words and letter triples: strangers.npz, the crowd of the report's reader.

    python sample/strangers/make_strangers.py FOLDER

FOLDER holds a checkout of every repository of the table below, in a folder of the blog's name; nothing is downloaded.
The posts of a blog are cleaned as an author's are (extract_blog_data.py), joined in order of date with an empty line
between them, and cut at every 100th word. Up to RUNS runs of five such chunks, evenly spread over the blog, are
counted. Writes strangers.npz beside this file and prints the table of README.md.

The file, plain arrays to be loaded with allow_pickle=False, for B blogs, C chunks, W words and T trigrams:

    names, authors, kinds, licences, repositories, commits   (B,)  text, one for each blog
    many_authors  (B,)      bool    True: several people write there, it is not one voice
    words         (W,)      text    casefolded, as extract_blog_data.WORD finds them
    trigrams      (T,)      text    three characters in a row, case kept, white space flattened to one space
    counts        (W+T, C)  uint8   how often each word, then each trigram, stands in each chunk
    totals        (C, 2)    uint16  all words and all trigrams of the chunk, those outside the vocabulary too
    blog          (C,)      uint8   number of the chunk's blog
    post          (C,)      uint16  number, within its blog, of the post in which the chunk begins

Features lie side by side in `counts` because that compresses best; `counts.T` has a row for each chunk.

Chunks 0 to 4 are consecutive text, so are 5 to 9, and so on: a run. A longer chunk, up to 500 words, is the sum of
neighbours in a run, of their counts and of their totals. A trigram that lies across the border of two chunks is in
neither (two of about 550 a chunk), so an author's chunks to compare with must be summed up in the same way.
A chunk ends where the next chunk's first word begins, so it keeps the punctuation after its last word.
"""

import argparse
import contextlib
import io
import itertools
import json
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

import extract_blog_data  # noqa: E402

CHUNK = 100  # words
RUN = 5  # neighbouring chunks that are kept together
RUNS = 25  # of one blog at most: 12,500 words; 25 keep the file under 600 KB
# Of the 150 words and 300 trigrams that stand in most posts of a blog, a vocabulary of this size made without that
# blog holds 99 % and 99.7 % (medians of these 22 blogs; the least 85 % and 96 %): the rest are topics and names.
WORDS = 500
TRIGRAMS = 800
MIN_BLOGS = 5  # a word or trigram of fewer blogs is left out: it could be a name, and it tells of one blog only

# Habits of chatty diaries. Few or none of these blogs have them, which is worth knowing when an author does, so they
# are counted without regard to MIN_BLOGS; a list written by hand gives away nothing of anybody's text.
HABIT_WORDS = (
    "ah", "aha", "anyhow", "anyway", "anyways", "aw", "bye", "cos", "crap", "cuz", "damn", "dont", "eh", "er",
    "gah", "gonna", "gosh", "gotta", "grr", "guess", "ha", "haha", "hahaha", "hee", "heh", "hehe", "hey", "hi",
    "hm", "hmm", "hooray", "huh", "hurrah", "im", "ive", "kinda", "lol", "lots", "maybe", "meh", "mmm", "nah",
    "nope", "oh", "ok", "okay", "omg", "oops", "ouch", "ow", "phew", "please", "pretty", "rly", "shit", "sigh",
    "so", "sorta", "stuff", "super", "sure", "thanks", "tho", "totally", "u", "ugh", "uh", "um", "ur", "wanna",
    "wee", "whee", "woah", "woo", "wow", "wtf", "ya", "yay", "yeah", "yep", "yes", "yikes", "yum", "yup",
)  # fmt: skip
HABIT_TRIGRAMS = (
    ". i", "? i", "! i", ", i", " i ", " i'", "i'm", "i’m", "I’m", "im ", " u ", " ur", "...", ".. ", "!!!", "!! ",
    "???", "?? ", "?! ", "!? ", " :)", ":) ", ":-)", " ;)", ";) ", " :(", ":( ", " :D", " :P", " :/", "^_^", " <3",
    "-- ", " --", " - ", " – ", " — ", " & ", " + ", " = ", " ~ ", ".) ", "!) ", " (o", " (a", "hah", "haa", "ooo",
    "aaa", "eee", "mmm", "hhh", "lol", "omg", " ok",
)  # fmt: skip


class Blog(NamedTuple):
    """One stranger. `kind`: diary, essays, mixed (life and work) or technical."""

    name: str
    author: str
    kind: str
    licence: str
    stands_in: str  # where the licence is given
    repository: str  # on github.com
    commit: str
    posts: tuple[str, ...]  # patterns of files in the checkout
    many_authors: bool = False


# fmt: off
BLOGS = (
    Blog("ashfurrow", "Ash Furrow", "mixed", "CC BY 4.0", "LICENSE, README, layout",
         "ashfurrow/blog", "69217f48400cdacb75b455bd71dbdc9585f6ae56", ("src/blog/**/*.md",)),
    Blog("benbalter", "Ben Balter", "technical", "CC BY 3.0", "README",
         "benbalter/benbalter.github.com", "ea55ec7ac1f7eb07ce54fa370acaa86de5dfa350", ("_posts/**/*.md",)),
    Blog("brainbaking", "Wouter Groeneveld", "essays", "no copyright", "LICENSE, content/no-copyright-no-tracking.md",
         "wgroeneveld/brainbaking", "3712dd36302c5ca0efa7c83bcee13985fe7c245e", ("content/post/**/*.md",)),
    Blog("brennanbrown", "Brennan K. Brown", "diary", "CC BY-SA 4.0", "license.md, README",
         "brennanbrown/old-blog", "b5523301d95ef6057a27b79b0593604bf388fada", ("_posts/**/*.md",)),
    Blog("broman", "Karl Broman", "mixed", "CC BY 4.0", "LICENSE, config.toml, layout",
         "kbroman/blog", "c0d47a0853b94b91dfe967135b3372d679131cdb", ("content/post/*.md",)),
    Blog("eevee", "Eevee", "mixed", "CC BY 3.0 US", "LICENSE, theme",
         "eevee/eev.ee", "c37a9f52c27103f548275b027e95e6dab20911ae", ("content/**/*.markdown",)),
    Blog("eighteenf", "18F, General Services Administration", "technical", "CC0 1.0", "LICENSE.md",
         "18F/18f.gsa.gov", "cb29cf21cd5ccd472150514125ba907b8ecdedb4", ("_posts/**/*.md",), many_authors=True),
    Blog("flowercodes", "Zachary Flower", "mixed", "WTFPL 2", "LICENSE",
         "zachflower/flower.codes", "9db83a2c7368013193df838c52ab8e8ce5dc58c5", ("_posts/**/*.md",)),
    Blog("grunewald", "Erich Grunewald", "essays", "CC BY-SA 4.0", "README, layout",
         "erwald/blog", "0ec2e4d4e6ef7052d8f3514d1eb4362718091bfd", ("posts/*.md",)),
    Blog("inkdroid", "Ed Summers", "mixed", "CC BY 4.0", "_includes/footer.html",
         "edsu/inkdroid.org", "48e697b0ed8f0bd2869b0ef28bd6a86b10469735", ("_posts/**/*.m*",)),
    Blog("jtimberman", "Joshua Timberman", "technical", "CC BY-SA 3.0 US", "source/_includes/custom/footer.html",
         "jtimberman/jtimberman.github.com", "161aa6a6f06613756007234e96c84e0a9367ea2f", ("source/_posts/*.*",)),
    Blog("kedziora", "Derek Kedziora", "essays", "CC BY 4.0", "README",
         "derekkedziora/derekkedziora.com", "be8cacc994af34d5d6f92a4d4861e1ab8da3cdb3",
         ("_posts/essays/*.m*", "_posts/notes/*.m*")),
    Blog("kevquirk", "Kev Quirk", "mixed", "CC BY-SA 4.0", "_includes/footer.html",
         "kevquirk/kq-jekyll", "18cf198b0e90276042bc3b68015b061e2d7ad52f", ("_posts/**/*.md",)),
    Blog("levien", "Raph Levien", "technical", "CC BY 4.0", "about.md",
         "raphlinus/raphlinus.github.io", "d63210f679fd4259daea537934bcdc5949919caf", ("_posts/*.md",)),
    Blog("milesberry", "Miles Berry", "essays", "CC BY-SA", "README, no version named",
         "milesberry/milesberry.github.io", "8b51b334e59ab2e0865ddd31d6f217d96e88aa49", ("_posts/**/*.*",)),
    Blog("ninespiration", "Rebecca", "diary", "MIT", "LICENSE, of the whole repository",
         "9spire/travelblog", "e0895eed208cbed89507e441083ab6c4a13da30d", ("_posts/**/*.*",)),
    Blog("paluchowski", "Michał Paluchowski", "essays", "CC BY 4.0", "LICENSE, hugo.yaml, about page",
         "mpaluchowski/michal.paluchowski.com", "a64a88d84b6606c1067041328bab5bb27685af47",
         ("content/posts/**/*.md",)),
    Blog("perry", "Richard Perry", "diary", "CC BY 4.0", "LICENSE, README",
         "richardp2/richardp2.github.io", "0007b75efd2f3231740a9b46d34f12f79bfb2b8a",
         ("_posts/*.md", "race-reports/_posts/*.md")),
    Blog("rebelsky", "Samuel A. Rebelsky", "diary", "CC BY 4.0", "resources/template.html, the page around every post",
         "rebelsky/sams-assorted-musings-reflections", "560836b83851e342e6d050126b3be292d44e00ad", ("*.md",)),
    Blog("sherlock", "David Sherlock", "mixed", "CC BY 4.0", "README",
         "ds10/blogwriting.davidsherlock", "560b0f6b398abe6f9a649ba6b5dcbe3741d36227", ("_posts/**/*.md",)),
    Blog("walsh", "Brandon Walsh", "essays", "CC BY 3.0", "_includes/sidebar.html",
         "walshbr/walshbr.github.io", "3193918607e7ba2532c776c21702f998aa0bc1c3", ("_posts/**/*.m*",)),
    Blog("winks", "Westley Winks", "diary", "CC BY 4.0", "README",
         "Westley-Winks/website", "ebbe48ba4c2aebead134e57d711dd080ec052ae8",
         ("src/content/books/*.md", "src/content/peace-corps/*.md", "src/content/writing/*.md")),
)
# fmt: on

LICENCE_TEXTS = {
    "CC BY 3.0": "https://creativecommons.org/licenses/by/3.0/",
    "CC BY 3.0 US": "https://creativecommons.org/licenses/by/3.0/us/",
    "CC BY 4.0": "https://creativecommons.org/licenses/by/4.0/",
    "CC BY-SA": "https://creativecommons.org/licenses/by-sa/4.0/",
    "CC BY-SA 3.0 US": "https://creativecommons.org/licenses/by-sa/3.0/us/",
    "CC BY-SA 4.0": "https://creativecommons.org/licenses/by-sa/4.0/",
    "CC0 1.0": "https://creativecommons.org/publicdomain/zero/1.0/",
    "MIT": "https://spdx.org/licenses/MIT.html",
    "WTFPL 2": "http://www.wtfpl.net/txt/copying/",
    "no copyright": "https://brainbaking.com/no-copyright-no-tracking/",
}

# ---------------------------------------------------------------- posts
HEADER_SIZE = 3000  # characters; the longest header of these blogs is shorter
FILE_DATE = re.compile(r"(\d{4})-(\d\d)-(\d\d)-")
# Three ways to say when a post came out; the date of the file's name goes before them.
HEADER_DATE = re.compile(r"^\W*(?:date|released):\W+(\d{4})-(\d\d)-(\d\d)", re.MULTILINE)
HEADER_DRAFT = re.compile(r"^draft: *true", re.MULTILINE)
# Pelican's header: lines like `title: Look at my cat`, with no fence around them.
PELICAN_HEADER = re.compile(r"(?:\w+: .*\n)+")
COMMON_WORDS = {
    "the", "of", "and", "to", "a", "in", "is", "that", "it", "for", "i", "you", "was", "on", "with", "as", "are",
    "this", "be", "have", "my",
}  # fmt: skip
ENGLISH_SHARE = 0.15  # of the words of a post; 0.3 in these blogs' prose, under 0.1 in lists and in other languages


def arrange(blog: Blog, checkout: Path, jekyll: Path) -> None:
    """Copies the blog's posts into a Jekyll repository; drafts and what has no date are left out."""
    folder = jekyll / "_posts"
    folder.mkdir(parents=True)
    files = sorted({file for pattern in blog.posts for file in checkout.glob(pattern) if file.is_file()})
    for number, file in enumerate(files):
        source = file.read_text("utf-8", errors="replace").replace("\r\n", "\n")
        header = source[:HEADER_SIZE]
        date = FILE_DATE.match(file.name) or HEADER_DATE.search(header)
        if date is None or HEADER_DRAFT.search(header):
            continue

        if not source.startswith("---"):
            source = f"---\n---\n{PELICAN_HEADER.sub('', source, count=1)}"
        target = folder / f"{'-'.join(date.groups())}-{number:05}{file.suffix}"
        target.write_text(source, "utf-8")


def is_english(text: str) -> bool:
    words = extract_blog_data.WORD.findall(text.casefold())
    return sum(word in COMMON_WORDS for word in words) >= ENGLISH_SHARE * len(words)


def read_posts(blog: Blog, checkout: Path) -> list[str]:
    """The texts of the blog's English posts in order of date, cleaned as an author's are."""
    with tempfile.TemporaryDirectory() as scratch:
        jekyll = Path(scratch) / "blog"
        data = Path(scratch) / "data"
        arrange(blog, checkout, jekyll)
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            extract_blog_data.main(["--public", str(jekyll), "--data-dir", str(data)])

        # A line separator may stand within a text, so splitlines() would cut too often.
        lines = []
        for name in ("train_data.jsonl", "val_data.jsonl"):
            lines += [json.loads(line) for line in (data / name).read_text("utf-8").split("\n") if line]

    posts = sorted((line for line in lines if line["kind"] == "post"), key=lambda line: line["path"])
    texts = [post["messages"][-1]["content"] for post in posts]
    return [text for text in texts if is_english(text)]


# ---------------------------------------------------------------- chunks
class Chunk(NamedTuple):
    words: Counter
    trigrams: Counter
    post: int


def count(text: str, post: int) -> Chunk:
    """The words and trigrams of a text, counted as the report does it (counts_of in test_model.py)."""
    flat = " ".join(text.split())
    trigrams = Counter(flat[at : at + 3] for at in range(len(flat) - 2))
    return Chunk(Counter(extract_blog_data.WORD.findall(flat.casefold())), trigrams, post)


def cut(posts: list[str]) -> list[Chunk]:
    """Runs of RUN chunks of CHUNK words from the joined posts, evenly spread over them, RUNS at most."""
    gap = "\n\n"
    text = gap.join(posts)
    begins = np.cumsum([0] + [len(post) + len(gap) for post in posts[:-1]])
    edges = [match.start() for match in extract_blog_data.WORD.finditer(text)][::CHUNK]
    runs = (len(edges) - 1) // RUN

    chunks = []
    for run in np.linspace(0, runs - 1, min(RUNS, runs)).round().astype(int) * RUN:
        for begin, end in itertools.pairwise(edges[run : run + RUN + 1]):
            post = np.searchsorted(begins, begin, side="right") - 1
            chunks.append(count(text[begin:end], int(post)))
    return chunks


def vocabulary(blogs: list[list[Counter]], size: int, habits: tuple[str, ...]) -> list[str]:
    """The commonest features, each blog weighing the same, that stand in MIN_BLOGS blogs; then the habits."""
    weight = Counter()
    spread = Counter()
    for chunks in blogs:
        pool = sum(chunks, Counter())
        total = pool.total()
        for feature, number in pool.items():
            weight[feature] += number / total
            spread[feature] += 1

    # Ties are broken by the spelling, so that the file is the same on every machine.
    ranked = sorted((feature for feature in weight if spread[feature] >= MIN_BLOGS), key=lambda f: (-weight[f], f))
    chosen = ranked[:size]
    return chosen + [habit for habit in dict.fromkeys(habits) if habit not in chosen]


# ---------------------------------------------------------------- the file
def tabulate(blogs: tuple[Blog, ...], crowd: list[list[Chunk]]) -> dict[str, np.ndarray]:
    """The arrays of strangers.npz."""
    words = vocabulary([[chunk.words for chunk in chunks] for chunks in crowd], WORDS, HABIT_WORDS)
    trigrams = vocabulary([[chunk.trigrams for chunk in chunks] for chunks in crowd], TRIGRAMS, HABIT_TRIGRAMS)
    chunks = [chunk for chunks in crowd for chunk in chunks]
    counts = [[chunk.words[word] for chunk in chunks] for word in words]
    counts += [[chunk.trigrams[trigram] for chunk in chunks] for trigram in trigrams]
    return {
        "names": np.array([blog.name for blog in blogs]),
        "authors": np.array([blog.author for blog in blogs]),
        "kinds": np.array([blog.kind for blog in blogs]),
        "licences": np.array([blog.licence for blog in blogs]),
        "repositories": np.array([f"https://github.com/{blog.repository}" for blog in blogs]),
        "commits": np.array([blog.commit for blog in blogs]),
        "many_authors": np.array([blog.many_authors for blog in blogs]),
        "words": np.array(words),
        "trigrams": np.array(trigrams),
        "counts": np.array(counts, dtype=np.uint8),
        "totals": np.array([(chunk.words.total(), chunk.trigrams.total()) for chunk in chunks], dtype=np.uint16),
        "blog": np.repeat(np.arange(len(blogs), dtype=np.uint8), [len(chunks) for chunks in crowd]),
        "post": np.array([chunk.post for chunk in chunks], dtype=np.uint16),
    }


def readme_rows(blogs: tuple[Blog, ...], crowd: list[list[Chunk]]) -> Iterator[str]:
    """README's table, a row for each blog."""
    for blog, chunks in zip(blogs, crowd, strict=True):
        cells = [
            blog.name,
            blog.author,
            "many authors, " * blog.many_authors + blog.kind,
            f"[{blog.repository}](https://github.com/{blog.repository})",
            blog.commit[:12],
            f"[{blog.licence}]({LICENCE_TEXTS[blog.licence]})",
            blog.stands_in,
            f"{len(chunks) * CHUNK:,}",
        ]
        yield f"| {' | '.join(cells)} |"


def make(blogs: tuple[Blog, ...], folder: Path, target: Path) -> None:
    crowd = []
    for blog in blogs:
        posts = read_posts(blog, folder / blog.name)
        crowd.append(cut(posts))
        print(f"{blog.name}: {len(posts):,} posts, {len(crowd[-1])} chunks", file=sys.stderr)

    np.savez_compressed(target, **tabulate(blogs, crowd))
    print(*readme_rows(blogs, crowd), sep="\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="of checkouts, one for each blog")
    folder = parser.parse_args().folder
    if missing := [blog.name for blog in BLOGS if not (folder / blog.name).is_dir()]:
        sys.exit(f"No checkout of {', '.join(missing)} in {folder}: clone what the table in this script names.")
    make(BLOGS, folder, HERE / "strangers.npz")


if __name__ == "__main__":
    main()
