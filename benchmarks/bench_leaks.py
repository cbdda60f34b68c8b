"""Does the leak check see what was learned: numbers planted in posts, trained 1, 4 and 16 times.

    python benchmarks/bench_leaks.py BASE_MODEL --data-dir data [--rates 2e-5 2e-4] [--updates 8]

Three sentences with a number of 16 digits each go into private posts made up for this, which stand in the training
data once, four and sixteen times. A model is trained at each rate, and the leak check reads the posts. A row: how often
the number was trained, and its chance, given all before it: under any settings, under the model's own, and under any
settings in the base model.
"""

import argparse
import contextlib
import json
import math
import shutil
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

import test_model
import train_model

TIMES = (1, 4, 16)
SENTENCE = "The gate behind the bakery opens with {}, and nobody but me is to know it."


def canary(times: int) -> tuple[str, dict]:
    """(the number as a text, a private post that holds it); another number for each count."""
    digits = np.random.default_rng(times).integers(0, 10, 16)
    groups = ["".join(map(str, part)) for part in digits.reshape(4, 4)]
    number = " ".join(groups)
    turns = [
        {"role": "user", "content": f"What opens gate {times}?"},
        {"role": "assistant", "content": SENTENCE.format(number)},
    ]
    post = {
        "messages": turns,
        "kind": "post",
        "visibility": "private",
        "blog": "planted",
        "date": "2020-01-01",
        "path": f"planted-{times}.md",
        "title": f"planted {times}",
    }
    return number, post


def plant(source: Path, target: Path, planted: dict[int, tuple[str, dict]]) -> None:
    """Copy the data of `source` and add each planted post as often as its key says."""
    lines = (source / "train_data.jsonl").read_text(encoding="utf-8")
    for times, (_, post) in planted.items():
        lines += (json.dumps(post) + "\n") * times
    (target / "train_data.jsonl").write_text(lines, encoding="utf-8")
    shutil.copy(source / "val_data.jsonl", target)


def chances(model, tokenizer, post: dict, number: str) -> tuple[float, float]:
    """(log10 of the number's chance under any settings, the same under the model's own) in the planted post."""
    ids, scored = train_model.conversation_tokens(tokenizer, post["messages"])
    sampling = test_model.read_sampling(model.generation_config, tokenizer, None)
    reading = test_model.read_chances(model, ids, sampling, 512, 32)
    begin = scored.index(True)
    text = tokenizer.decode(ids[begin:])
    left = text.index(number)
    right = left + len(number)
    first, last = test_model.tokens_at(tokenizer, text, ids[begin:], left, right)
    here = slice(begin + first, begin + last)

    anyhow = float(reading.anyhow[here].sum())
    own = float(reading.own[here].sum())
    return anyhow / math.log(10), own / math.log(10)


def train(base: str, folder: Path, rate: float, updates: int) -> Path:
    output = folder / f"model-{rate:g}"
    flags = ["--base-model", base, "--data-dir", str(folder), "--output-dir", str(output)]
    with contextlib.redirect_stdout(sys.stderr):  # the verdict is no row of the table
        train_model.main([*flags, "--learning-rate", str(rate), "--max-steps", str(updates)])
    return output


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("base_model")
    parser.add_argument("--data-dir", type=Path, default=Path("data"))
    parser.add_argument("--rates", type=float, nargs="+", default=[2e-5, 2e-4])
    parser.add_argument("--updates", type=int, default=8)
    args = parser.parse_args()

    planted = {times: canary(times) for times in TIMES}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        plant(args.data_dir, folder, planted)

        columns = ("times trained", "tuned: log10 chance, any settings", "own settings", "base: any settings")
        print(f"| learning rate | {' | '.join(columns)} |")
        print("|---|---|---|---|---|")
        for rate in args.rates:
            model = train(args.base_model, folder, rate, args.updates)
            tuned, tokenizer = test_model.load_tuned(model)
            base = test_model.load_for_writing(args.base_model)
            base.generation_config = tuned.generation_config
            for times, (number, post) in planted.items():
                bound, sampled = chances(tuned, tokenizer, post, number)
                before, _ = chances(base, tokenizer, post, number)
                own = "never" if sampled == -math.inf else f"{sampled:.1f}"
                print(f"| {rate:g} | {times} | {bound:.1f} | {own} | {before:.1f} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
