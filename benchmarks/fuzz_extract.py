"""Feed the extractor mutated posts and check that it neither crashes nor hangs, and accounts for every file.

    python benchmarks/fuzz_extract.py --files 100000 --seed 1

Takes the sample's files, mutates front matter, bodies and bytes, and adds monsters (nesting 10,000 deep, a 50 MB file,
binary data). Each file is read as the extractor's workers read it, with its time taken; then batches of 2,000 go
through main(). Exits with status 1 at the first file over 5 seconds, at any exception, and if the account of files or
the ledger of words does not add up.
"""

import argparse
import json
import os
import random
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from functools import partial
from io import StringIO
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import extract_blog_data  # noqa: E402

BATCH = 2000
BLOCKED = ("June", "the Kettle", "a")
MARKUP = r"""
{% raw %} {% endraw %} {% if x %} {% else %} {% endif %} {% for a in b %} {% endfor %} {{ }} {{ x {: .a } {:toc} {%
``` ~~~ ` `` $$ > >> ** __ [ ]( ) ![ [^1] [^1]: <!-- --> <div> </div> <pre> <code> <b> <iv> <![if &#0; &#x110000;
&amp;amp; | --- ... - 1. : ! & * @a !!python/object:os.system % \\ [caption [/caption] <|im_start|> 10:36
"""
SPICES = [*MARKUP.split(), *"\x00\x1b\u2028\ufeff\u200d\ue000\ud7ff"]
MONSTERS = {
    "quotes": ">" * 10_000 + "a",
    "divs": "<div>" * 10_000 + "a b c d",
    "italics": "<i>" * 10_000 + "a b c d",
    "lists": "\n".join("  " * n + "- a" for n in range(1000)),
    "items": "- " * 10_000 + "a",
    "brackets": "[" * 10_000 + "](",
    "liquid": "{% if a %}" * 10_000,
    "loops": "{% for a in b %}" * 10_000,
    "outputs": "{{" * 10_000,
    "ticks": "` `` " * 5_000,
    "stars": "*a **b " * 10_000,
    "underscores": "_" * 50_000,
    "attributes": "{: .a" * 10_000,
    "comments": "<!-- " * 10_000,
    "tags": "<a b='" * 10_000,
    "entities": "&amp;" * 20_000,
    "table": "| a " * 20_000 + "\n|" + "---|" * 20_000,
    "line": "a" * 1_000_000,
    "words": "a " * 400_000,
    "newlines": "\n" * 500_000 + "a",
    "digits": "1" * 100_000,
    "phones": "+1 234 " * 20_000,
    "at": "a@" * 50_000,
    "dots": "a@b" + ".c" * 50_000,
}


def mutate(data: bytes, rng: random.Random) -> bytes:
    """One to five random edits: bytes flipped, slices cut, doubled or moved, markup strewn in, encodings changed."""
    for _ in range(rng.randint(1, 5)):
        a, b = sorted(rng.randrange(len(data) + 1) for _ in range(2))
        b = min(b, a + 400)
        kind = rng.randrange(8)
        if kind == 0:
            noise = bytes(rng.randrange(256) for _ in range(rng.randint(1, 8)))
            data = data[:a] + noise + data[a:]
        elif kind == 1:
            data = data[:a] + data[b:]
        elif kind == 2:
            data = data[:b] + data[a:b] * rng.randint(1, 30) + data[b:]
        elif kind in (3, 4, 5):
            spice = rng.choice(SPICES).encode("utf-8", "surrogatepass")
            spice *= rng.choice([1, 1, 1, 2, 50])
            before = rng.choice([b"", b"\n", b" "])
            after = rng.choice([b"", b"\n", b" "])
            data = data[:a] + before + spice + after + data[a:]
        elif kind == 6:
            data = data[:a] + data[b:] + data[a:b]
        else:
            encoding = rng.choice(["cp1252", "utf-16", "utf-8-sig"])
            data = data.decode("utf-8", "replace").encode(encoding, "replace")
    return data


def monsters() -> list[bytes]:
    """Every monster as a body and as a value of the front matter, binary data and a 50 MB file."""
    files = [f"---\ntitle: a\n---\n{text}\n".encode() for text in MONSTERS.values()]
    files += [f"---\ntitle: {text}\n---\nsome words of a post\n".encode() for text in MONSTERS.values()]
    return [*files, bytes(range(256)) * 100, b"---\n---\n" + b"fifty megabytes " * 3_300_000, b"", b"---", b"---\n---"]


def read_timed(post: extract_blog_data.Post, settings: extract_blog_data.Settings) -> tuple[float, int]:
    """(seconds that the file took, words of its body that its ledger lacks)."""
    start = time.process_time()
    post = extract_blog_data.read_post(post, settings)
    taken = time.process_time() - start
    texts = [post.text]
    for reply in post.replies:
        texts += [turn["content"] for turn in reply.messages[1::2]]
    kept = sum(map(extract_blog_data.count_words, texts))
    return taken, post.found - kept - post.left_out.total()


def check_batch(files: dict[str, bytes], seconds: list[float]) -> Counter:
    """Reads each file of a batch and then the whole batch as a blog; returns the account."""
    with tempfile.TemporaryDirectory() as folder:
        blog = Path(folder) / "blog"
        (blog / "_posts").mkdir(parents=True)
        for name, data in files.items():
            (blog / "_posts" / name).write_bytes(data)

        posts = [extract_blog_data.Post("blog", "public", f"_posts/{name}", blog / "_posts" / name) for name in files]
        settings = replace(extract_blog_data.parse_arguments(["--author", "wrenlow"]), blocked_words=BLOCKED)
        read = partial(read_timed, settings=settings)
        with ProcessPoolExecutor(os.cpu_count()) as pool:
            for (taken, missing), name in zip(pool.map(read, posts, chunksize=20), files, strict=True):
                seconds.append(taken)
                if taken > 5:
                    sys.exit(f"{name} took {taken:.1f} s: {files[name][:300]!r}")
                if missing:
                    sys.exit(f"the ledger of {name} lacks {missing} words: {files[name][:300]!r}")

        with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            extract_blog_data.main(["--public", str(blog), "--author", "wrenlow", "--data-dir", f"{folder}/data"])
        report = json.loads(Path(folder, "data", "extraction_report.json").read_text("utf-8"))
        accounted = report["files_kept"] + sum(report["files_skipped"].values())
        if not len(files) == report["files_found"] == accounted:
            sys.exit(f"the account is wrong: {report['files_found']} of {len(files)} files")
        ledger = report["ledger"]
        kept = ledger["kept_in_posts"] + ledger["kept_in_replies"]
        if ledger["found"] != kept + sum(ledger["left_out"].values()) or kept != sum(report["words"].values()):
            sys.exit(f"the ledger is wrong: {ledger}")
        return Counter(report["files_skipped"]) + Counter(kept=report["files_kept"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--files", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    start = time.monotonic()
    seeds = [path.read_bytes() for path in sorted((ROOT / "sample").glob("*-blog/**/_posts/**/*.*"))]

    account = Counter()
    seconds = []
    done = 0
    while done < args.files:
        batch = monsters() if not done else []
        missing = min(BATCH, args.files - done) - len(batch)
        batch += [mutate(rng.choice(seeds), rng) for _ in range(missing)]
        files = {}
        for n, data in enumerate(batch):
            ending = rng.choice([".md", ".md", ".html"])
            files[f"2006-01-{n % 28 + 1:02}-post-{done + n}{ending}"] = data
        account += check_batch(files, seconds)
        done += len(files)
        print(f"{done:,} files, {time.monotonic() - start:,.0f} s", file=sys.stderr, flush=True)

    print(f"{done:,} files, seed {args.seed}: no crash, slowest {max(seconds):.2f} s, account adds up")
    for name, count in account.most_common():
        print(f"{name:<24} {count:>9,}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
