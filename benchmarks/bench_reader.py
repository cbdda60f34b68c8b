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

import test_model
import train_model
from voice.asking import read_blog, write_words
from voice.evidence import Evidence, NotMeasured
from voice.loading import DTYPES, load_tuned
from voice.reader import ReaderShare, attribute
from voice.sampling import read_sampling
from voice.style import Chunks, count_stretches, find_strangers, pick_chunk_size, pick_features
from voice.word_index import WordIndex, author_texts


def write(model_dir: Path, data_dir: Path, words: int) -> list[str]:
    """What a model answers to the requests of its author's unseen posts, copies of its training posts taken out."""
    settings, _ = test_model.parse_arguments([])
    model, tokenizer = load_tuned(model_dir)
    sampling = read_sampling(model.generation_config, tokenizer, settings)
    precision = train_model.pick_precision(model.device, train_model.AUTO)

    blog = read_blog(data_dir)
    requests = [post["messages"][0]["content"] for post in blog.held_out]
    evidence = Evidence(blog, requests=requests, words=words)
    answers = write_words(model.to(DTYPES[precision]), tokenizer, evidence, sampling, model_dir.name)
    index = WordIndex(blog.train)
    return [index.without_copies(answer.text) for answer in answers]


def judge(data_dir: Path, tested: dict[str, list[str]], left_out: tuple[str, ...]) -> dict[str, ReaderShare]:
    """How much of each tested text a reader who knows the author's training posts gives to the author."""
    blog = read_blog(data_dir)
    known = author_texts(blog.train)
    evidence = Evidence(blog, not_strangers=left_out)
    strangers = find_strangers(evidence, pick_features(known))
    sizes = []
    for whose, texts in tested.items():
        try:
            sizes.append(pick_chunk_size({"author": texts}))
        except NotMeasured as missing:
            sys.exit(f"Too little to judge in {whose}: {missing}.")
    size = min(sizes)

    def chunks(texts: list[str]) -> Chunks:
        return count_stretches(texts, strangers.features).chunks(size)

    profile, _ = chunks(known)
    crowd = {name: counted.chunks(size) for name, counted in strangers.stretches.items()}
    shares, _ = attribute(profile, {name: chunks(texts) for name, texts in tested.items()}, crowd)
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
        blog = read_blog(folders[name])
        tested[f"{name}'s posts"] = author_texts(blog.held_out)
        if model:
            tested[f"{name}'s model"] = write(Path(model[0]), folders[name], args.words)

    columns = ["reader of", *tested]
    print(f"| {' | '.join(columns)} |")
    print("|---" * len(columns) + "|")
    for name, folder in folders.items():
        cells = [name]
        shares = judge(folder, tested, tuple(folders))
        for whose in tested:
            cells.append(f"{shares[whose].share:.0%}")
        print(f"| {' | '.join(cells)} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
