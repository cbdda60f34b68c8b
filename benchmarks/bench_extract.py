"""Time the extractor against `jekyll build` on the same posts, and show how its cost grows.

    python benchmarks/bench_extract.py                        against Jekyll, then 1,000 to 100,000 alone
    python benchmarks/bench_extract.py --against 200 --growth 200 2000

The posts are made from the sample blogs: paragraphs of several posts shuffled together and every fifth word changed,
so that no two are near-duplicates. Jekyll (Debian package) gets a minimal configuration: no theme, no plugins. Both
run as processes of their own, one after the other, with all cores; wall clock, best of two for up to 10,000 posts.
"""

import argparse
import os
import platform
import random
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "extract_blog_data.py"


def sample_posts() -> list[tuple[str, list[str]]]:
    """(front matter, paragraphs) of every post of the sample that Jekyll can build alone."""
    posts = []
    for path in sorted((ROOT / "sample").glob("*-blog/**/_posts/**/*.md")):
        text = path.read_bytes().decode("utf-8", "replace").replace("\r\n", "\n")
        parts = text.split("---\n", 2)
        if len(parts) == 3 and "9999" not in path.name and not re.search(r"published: false|\t|{%", text):
            posts.append((parts[1], [part for part in parts[2].split("\n\n") if part.strip()]))
    return posts


def make_blog(folder: Path, count: int, seed: int = 1) -> Path:
    """A blog of `count` distinct posts, with the lengths and the mess of the sample's."""
    chance, posts = random.Random(seed), sample_posts()
    vocabulary = re.findall(r"[a-z]{4,}", " ".join(" ".join(body) for _, body in posts))
    for n in range(count):
        meta, body = posts[n % len(posts)]
        donors = [chance.choice(posts)[1] for _ in body]
        paragraphs = [chance.choice(donor) if donor else part for donor, part in zip(donors, body, strict=True)]
        text = re.sub(
            r"\b[a-z]{4,}\b",
            lambda m: chance.choice(vocabulary) if chance.random() < 0.2 else m[0],
            "\n\n".join(paragraphs),
        )
        day = f"{2000 + n % 20}-{n // 20 % 12 + 1:02}-{n // 240 % 28 + 1:02}"
        meta = re.sub(r"(?m)^(date|title):.*\n", "", meta)
        path = folder / "_posts" / day[:4] / f"{day}-post-{n}.md"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"---\ntitle: Number {n} of them\n{meta}---\n{text}\n", encoding="utf-8")
    (folder / "_config.yml").write_text("title: benchmark\n", encoding="utf-8")
    return folder


def run(command: list[str]) -> float:
    """Wall seconds of a command that must succeed."""
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{command[0]} failed: {done.stderr[-500:]}")
    return time.perf_counter() - start


def extract(blog: Path, out: Path) -> list[str]:
    return [sys.executable, str(SCRIPT), "--public", str(blog), "--author", "wrenlow", "--data-dir", str(out)]


def run_sampled(command: list[str]) -> tuple[float, float, float]:
    """(wall seconds, processor seconds, peak MB of the command and its workers together, sampled every 50 ms).

    Pages that the processes share are counted once for each of them.
    """
    before, start, peak = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter(), 0
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None:
        peak = max(peak, sum(map(resident_bytes, [process.pid, *children_of(process.pid)])))
        time.sleep(0.05)
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, peak / 1e6


def children_of(pid: int) -> list[int]:
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for task in tasks for child in read_proc(task).split()]


def resident_bytes(pid: int) -> int:
    fields = read_proc(Path(f"/proc/{pid}/statm")).split()
    return int(fields[1]) * os.sysconf("SC_PAGE_SIZE") if fields else 0


def read_proc(path: Path) -> str:
    """A file of /proc, or nothing once its process has ended."""
    try:
        return path.read_text("ascii")
    except OSError:
        return ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--against", type=int, nargs="*", default=[1000, 5000], help="posts for the race with Jekyll")
    parser.add_argument("--growth", type=int, nargs="*", default=[1000, 10_000, 100_000], help="posts for the table")
    args = parser.parse_args()
    model = (
        re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text("utf-8"))
        if Path("/proc/cpuinfo").exists()
        else None
    )
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    print(f"{model[1] if model else platform.processor()}, {cores} cores, Python {platform.python_version()}")
    jekyll = shutil.which("jekyll")
    if jekyll and args.against:
        print(f"\n{'posts':>8} {'jekyll s':>9} {'extract s':>10} {'times as fast':>14}")
    for count in args.against if jekyll else []:
        with tempfile.TemporaryDirectory() as folder:
            blog, out = make_blog(Path(folder) / "blog", count), Path(folder) / "out"
            build = [jekyll, "build", "--quiet", "--source", str(blog), "--destination", str(out / "site")]
            theirs = min(run([*build, "--disable-disk-cache"]) for _ in range(2))
            ours = min(run(extract(blog, out / "data")) for _ in range(2))
            print(f"{count:>8,} {theirs:>9.2f} {ours:>10.2f} {theirs / ours:>14.1f}", flush=True)
    if not jekyll:
        print("jekyll is not installed: no comparison (apt-get install jekyll)")
    print(
        f"\n{'posts':>8} {'seconds':>8} {'cpu s':>7} {'posts/s':>8} {'ms cpu/post':>12} {'peak MB, all processes':>23}"
    )
    for count in args.growth:
        with tempfile.TemporaryDirectory() as folder:
            blog, out = make_blog(Path(folder) / "blog", count), Path(folder) / "data"
            wall, used, peak = min(run_sampled(extract(blog, out)) for _ in range(2 if count <= 10_000 else 1))
            rate, each = count / wall, 1000 * used / count
            print(f"{count:>8,} {wall:>8.2f} {used:>7.1f} {rate:>8,.0f} {each:>12.2f} {peak:>23,.0f}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
