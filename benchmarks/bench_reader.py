"""Who is taken for whom: the report's reader on several authors, and on a model of each.

    python benchmarks/bench_reader.py NAME=DATA ... [NAME=DATA=MODEL ...] [--words 6000]

DATA is a folder that extract_blog_data.py wrote, MODEL one that train_model.py made of it. NAME is what the author is
called in sample/strangers/README.md, or anything else; nobody who is tested is in the crowd. Each row is a reader who
knows that author's training posts, each column somebody's unseen posts, or the text of somebody's model: the figure is
how much of it the reader gives to the author of the row. Own posts stand on the diagonal; off it, 5 % is what the
reader is set to.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch

import test_model
import train_model


def write(model_dir: Path, data_dir: Path, words: int) -> list[str]:
    """What a model answers to the requests of its author's unseen posts, copies of its training posts taken out."""
    model, tokenizer = test_model.load_tuned(model_dir)
    sampling = test_model.read_sampling(model.generation_config, tokenizer, None)
    precision = train_model.pick_precision(model.device, train_model.PRECISION)
    dtype = test_model.NUMBERS[precision]
    model = model.to(dtype)
    blog = test_model.read_blog(data_dir)
    index = test_model.WordIndex(blog.train)
    prompts = []
    for post in blog.held_out:
        request = post["messages"][:1]
        prompts.append(test_model.prompt_tokens(tokenizer, request))

    rng = torch.Generator().manual_seed(42)
    texts = []
    while test_model.count_words(texts) < words:
        places = range(len(texts), len(texts) + 24)
        batch = [prompts[place % len(prompts)] for place in places]
        for answer in test_model.whole_answers(model, tokenizer, batch, sampling, rng):
            texts.append(index.without_copies(answer.text))
    return texts


def judge(data_dir: Path, tested: dict[str, list[str]], left_out: list[str]) -> dict[str, test_model.ReaderShare]:
    """How much of each tested text a reader who knows the author's training posts gives to the author."""
    blog = test_model.read_blog(data_dir)
    known = [test_model.author_text(post) for post in blog.train]
    features = test_model.pick_features(known)
    test_model.NOT_STRANGERS = left_out
    evidence = test_model.Evidence(blog)
    strangers = test_model.find_strangers(evidence, features)
    size = test_model.pick_chunk_size(tested)

    def chunks(texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        counted = test_model.count_stretches(texts, strangers.features)
        return counted.chunks(size)

    profile, _ = chunks(known)
    crowd = {name: counted.chunks(size) for name, counted in strangers.stretches.items()}
    shares = {}
    for name, texts in tested.items():
        counted = chunks(texts)
        asked = {"author": counted, "tuned": counted, "base": counted}
        reader = test_model.ask_reader(profile, asked, crowd)
        shares[name] = reader.author
    return shares


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("authors", nargs="+", metavar="NAME=DATA[=MODEL]")
    parser.add_argument("--words", type=int, default=6_000, help="that each model writes")
    args = parser.parse_args()

    folders = {}
    tested = {}
    for entry in args.authors:
        name, data, *model = entry.split("=")
        folders[name] = Path(data)
        blog = test_model.read_blog(folders[name])
        tested[f"{name}'s posts"] = [test_model.author_text(post) for post in blog.held_out]
        if model:
            tested[f"{name}'s model"] = write(Path(model[0]), folders[name], args.words)

    columns = ["reader of", *tested]
    print(f"| {' | '.join(columns)} |")
    print("|---" * len(columns) + "|")
    for name, folder in folders.items():
        cells = [name]
        for taken in judge(folder, tested, list(folders)).values():
            cells.append(f"{taken.share:.0%}")
        print(f"| {' | '.join(cells)} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
