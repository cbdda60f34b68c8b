"""Count markup that the extractor left in the author's words, outside inline code.

    python benchmarks/residue.py BLOG [BLOG ...]
    python benchmarks/residue.py --show BLOG     also prints every hit

One row a blog: files kept, words, and the hits of each kind. Liquid that a post shows on purpose
({% raw %}{{ x }}{% endraw %}) counts too, so that a row may be right and yet not zero.
"""

import argparse
import json
import re
import sys
import tempfile
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import extract_blog_data

INLINE_CODE = re.compile(r"`[^`\n]+`")
ELEMENTS = (
    "a|abbr|b|blockquote|br|button|center|code|del|details|div|em|figure|figcaption|font|h[1-6]|hr|i|iframe|img|ins|kbd|"
    "li|ol|p|pre|script|small|span|strong|style|sub|summary|sup|table|tbody|td|th|tr|u|ul|video"
)
KINDS = {
    "Liquid": re.compile(r"\{\{|\}\}|\{%|%\}"),
    "attribute": re.compile(r"\{:{1,2}/?[\s.#\w]|\{#[\w-]+\}"),
    "fence": re.compile(r"^\s*(?:```|~~~)", re.MULTILINE),
    "footnote": re.compile(r"\[\^[^\]\s]+\]"),
    "HTML tag": re.compile(rf"</?(?:{ELEMENTS})(?:\s[^<>]*)?/?>", re.IGNORECASE),
    "link": re.compile(r"!?\[[^\]\n]*\]\([^)\n]*\)|\[[^\]\n]+\]\[[^\]\n]*\]|^\[[^\]\n]+\]:\s*\S", re.MULTILINE),
    "entity": re.compile(r"&(?:#\d+|#x[0-9a-f]+|[a-z]+);", re.IGNORECASE),
}


def assistant_texts(blog: Path) -> list[tuple[str, str]]:
    """(path, text) of every answer that extracting the blog gives."""
    with tempfile.TemporaryDirectory() as folder:
        with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            extract_blog_data.main(["--public", str(blog), "--data-dir", folder])
        texts = []
        for name in ("train_data.jsonl", "val_data.jsonl"):
            for line in (Path(folder) / name).read_text("utf-8").splitlines():
                row = json.loads(line)
                texts += [(row["path"], turn["content"]) for turn in row["messages"] if turn["role"] == "assistant"]
    return texts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("blogs", nargs="+", type=Path)
    parser.add_argument("--show", action="store_true")
    args = parser.parse_args()
    print(f"{'blog':<24}{'answers':>9}{'words':>10}" + "".join(f"{kind:>11}" for kind in KINDS))
    for blog in args.blogs:
        texts = assistant_texts(blog)
        hits = {kind: [] for kind in KINDS}
        for path, text in texts:
            prose = INLINE_CODE.sub("`code`", text)
            for kind, pattern in KINDS.items():
                hits[kind] += [(path, prose[max(0, m.start() - 50) : m.end() + 30]) for m in pattern.finditer(prose)]
        words = sum(len(extract_blog_data.words_of(text)) for _, text in texts)
        row = "".join(f"{len(found):>11}" for found in hits.values())
        print(f"{blog.resolve().name:<24}{len(texts):>9}{words:>10,}{row}")
        if args.show:
            for kind, found in hits.items():
                for path, excerpt in found:
                    print(f"    {kind}: {path}: {excerpt!r}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
