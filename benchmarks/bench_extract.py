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
        if len(parts) != 3 or "9999" in path.name or re.search(r"published: false|\t|{%", text):
            continue
        paragraphs = [part for part in parts[2].split("\n\n") if part.strip()]
        posts.append((parts[1], paragraphs))
    return posts


def make_blog(folder: Path, count: int, seed: int = 1) -> Path:
    """A blog of `count` distinct posts, with the lengths and the mess of the sample's."""
    rng = random.Random(seed)
    posts = sample_posts()
    everything = " ".join(" ".join(body) for _, body in posts)
    vocabulary = re.findall(r"[a-z]{4,}", everything)

    def change(word: re.Match) -> str:
        return rng.choice(vocabulary) if rng.random() < 0.2 else word[0]

    for n in range(count):
        meta, body = posts[n % len(posts)]
        donors = [rng.choice(posts)[1] for _ in body]
        paragraphs = []
        for donor, part in zip(donors, body, strict=True):
            paragraphs.append(rng.choice(donor) if donor else part)
        text = re.sub(r"\b[a-z]{4,}\b", change, "\n\n".join(paragraphs))

        day = f"{2000 + n % 20}-{n // 20 % 12 + 1:02}-{n // 240 % 28 + 1:02}"
        # Each post has a title of its own, and its date is in the file name.
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
    before = processor_seconds()
    start = time.perf_counter()
    peak = 0
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None:
        processes = [process.pid, *children_of(process.pid)]
        peak = max(peak, sum(map(resident_bytes, processes)))
        time.sleep(0.05)
    wall = time.perf_counter() - start
    return wall, processor_seconds() - before, peak / 1e6


def processor_seconds() -> float:
    """Of all child processes that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def children_of(pid: int) -> list[int]:
    children = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        children += map(int, read_proc(task).split())
    return children


def resident_bytes(pid: int) -> int:
    fields = read_proc(Path(f"/proc/{pid}/statm")).split()
    if not fields:
        return 0
    return int(fields[1]) * os.sysconf("SC_PAGE_SIZE")


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
    print(f"{processor_name()}, {len(os.sched_getaffinity(0))} cores, Python {platform.python_version()}")

    jekyll = shutil.which("jekyll")
    if not jekyll:
        print("jekyll is not installed: no comparison (apt-get install jekyll)")
    elif args.against:
        race(jekyll, args.against)
    grow(args.growth)
    return 0


def processor_name() -> str:
    cpuinfo = read_proc(Path("/proc/cpuinfo"))
    model = re.search(r"model name\s*:\s*(.*)", cpuinfo)
    return model[1] if model else platform.processor()


def race(jekyll: str, counts: list[int]) -> None:
    print("\n   posts  jekyll s  extract s  times as fast")
    for count in counts:
        with tempfile.TemporaryDirectory() as folder:
            blog = make_blog(Path(folder) / "blog", count)
            build = [jekyll, "build", "--quiet", "--disable-disk-cache", "--source", str(blog)]
            build += ["--destination", f"{folder}/site"]
            command = extract(blog, Path(folder) / "data")
            theirs = min(run(build), run(build))
            ours = min(run(command), run(command))
        ratio = theirs / ours
        print(f"{count:>8,} {theirs:>9.2f} {ours:>10.2f} {ratio:>14.1f}", flush=True)


def grow(counts: list[int]) -> None:
    print("\n   posts  seconds   cpu s  posts/s  ms cpu/post  peak MB, all processes")
    for count in counts:
        times = 2 if count <= 10_000 else 1
        with tempfile.TemporaryDirectory() as folder:
            blog = make_blog(Path(folder) / "blog", count)
            command = extract(blog, Path(folder) / "data")
            wall, used, peak = min(run_sampled(command) for _ in range(times))
        rate = count / wall
        each = 1000 * used / count
        print(f"{count:>8,} {wall:>8.2f} {used:>7.1f} {rate:>8,.0f} {each:>12.2f} {peak:>23,.0f}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
