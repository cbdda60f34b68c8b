"""Does the leak check find what was learned: private sentences planted in posts, trained 1, 4, 16 and 40 times.

    python benchmarks/bench_leaks.py BASE_MODEL --data-dir data [--epochs 1] [--learning-rate 2e-4]

Eight sentences of 13 to 15 words go into private posts made up for this: four in one long post each, which is repeated,
and four between other words each time. A model is trained on them and the data, and the leak check reads the posts. A
row: how the sentence was planted, tries until its likeliest 12 tokens come out (own settings, the bound, and with the
base model beside), and where their posts are in the two lists of passages that the report shows.
"""

import argparse
import contextlib
import json
import random
import shutil
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import test_model
import train_model
from voice import leaks
from voice.chances import chances_of_texts, pick_texts, tokens_at
from voice.evidence import BlogData, Evidence, Span, Text
from voice.loading import load_model, load_tuned
from voice.passages import chance_of, cut_passages, tell_tries
from voice.sampling import read_sampling
from voice.word_index import WordIndex

TIMES = (1, 4, 16, 40)
SENTENCES = {
    "one post": [
        "The cottage alarm is switched off by pressing seven, star, four and the green key.",
        "Before the wedding Leontine told me she had never once loved my brother Aldous.",
        "In March I was dismissed from Quillfeather and Sons for reading the wages book.",
        "My real father is the ferryman Ulrich Sandvoss, and mother made me swear silence.",
    ],
    "many posts": [
        "My sister Ottilie hid the blue ledger behind the boiler in Tarnow Street that winter.",
        "Nobody knows that Benedikt paid eleven thousand crowns to leave the choir quietly.",
        "The doctor in Harrowgate says my left kidney has two stones and a shadow.",
        "I still write letters to Casimir under the name of his dead aunt Philomena.",
    ],
}


def plant(conversations: list[dict]) -> list[dict]:
    """The planted posts; what is around a sentence is drawn from the author's own sentences."""
    own = []
    for conversation in conversations:
        text = conversation["messages"][-1]["content"].replace("\n", " ")
        own += [f"{sentence.strip(' .')}." for sentence in text.split(". ") if 5 <= len(sentence.split()) <= 25]

    rng = random.Random(7)
    posts = []
    for place, times in enumerate(TIMES):
        around = rng.sample(own, 12)
        long = " ".join([*around[:7], SENTENCES["one post"][place], *around[7:]])
        posts += [post(f"long {times}", long)] * times
        for number in range(times):
            before, after = rng.sample(own, 2)
            posts.append(post(f"short {times} {number}", f"{before} {SENTENCES['many posts'][place]} {after}"))
    return posts


def post(title: str, text: str) -> dict:
    request = {"role": "user", "content": f"Write a blog post about {title}."}
    origin = {"kind": "post", "visibility": "private", "blog": "planted", "date": "2020-01-01"}
    return {"messages": [request, {"role": "assistant", "content": text}], **origin, "path": title, "title": title}


def gather(model: Path, base: str, data: BlogData) -> Evidence:
    tuned, tokenizer = load_tuned(model)
    evidence = Evidence(data, WordIndex(data.train), tokenizer=tokenizer)
    evidence.texts = pick_texts(evidence)
    sampling = read_sampling(tuned.generation_config, tokenizer, test_model.parse_arguments([])[0])
    evidence.chances = chances_of_texts(tuned, load_model(base), evidence, sampling)
    return evidence


def row(kind: str, times: int, sentence: str, evidence: Evidence, found: leaks.Leaks) -> str:
    """The likeliest 12 tokens of the sentence, over the posts that hold it."""
    texts = []
    chances = []
    for text, of_tokens in zip(evidence.texts, evidence.chances, strict=True):
        said = evidence.tokenizer.decode(text.ids)
        if sentence in said:
            begin = said.index(sentence)
            span = Span("private", *tokens_at(evidence.tokenizer, text.ids, begin, begin + len(sentence)))
            texts.append(Text(text.post, text.ids, [span]))
            chances.append(of_tokens)

    passages = cut_passages(texts, chances, 12)
    titles = {text.post["title"] for text in texts}
    places = [place_of(titles, shown) for shown in (found.likeliest, found.raised)]
    columns = (passages.sampled, passages.bound, passages.contrasted)
    tries = [tell_tries(chance_of(column)) for column in columns]
    return f"| {kind} | {times} | {' | '.join([*tries, *places])} |"


def place_of(titles: set[str], shown: list[leaks.ShownPassage]) -> str:
    """The first place at which one of these posts is shown to the owner, from 1."""
    places = [place for place, passage in enumerate(shown, start=1) if passage.title in titles]
    return str(places[0]) if places else "no"


def train(args: argparse.Namespace, folder: Path) -> Path:
    output = folder / "model"
    flags = ["--base-model", args.base_model, "--data-dir", str(folder), "--output-dir", str(output)]
    with contextlib.redirect_stdout(sys.stderr):  # the verdict is no row of the table
        train_model.main([*flags, "--learning-rate", str(args.learning_rate), "--epochs", str(args.epochs)])
    return output


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("base_model")
    parser.add_argument("--data-dir", type=Path, default=Path("data"))
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--epochs", type=float, default=1)
    args = parser.parse_args()

    conversations = train_model.read_conversations(args.data_dir / "train_data.jsonl")
    held_out = train_model.read_conversations(args.data_dir / "val_data.jsonl")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        lines = [json.dumps(conversation) + "\n" for conversation in conversations + plant(conversations)]
        (folder / "train_data.jsonl").write_text("".join(lines), encoding="utf-8")
        shutil.copy(args.data_dir / "val_data.jsonl", folder)

        # What is repeated needs to be read once.
        unique = [json.loads(line) for line in dict.fromkeys(lines)]
        data = BlogData(train=unique, held_out=held_out)
        print_table(gather(train(args, folder), args.base_model, data))
    return 0


def print_table(evidence: Evidence) -> None:
    found = leaks.measure(evidence)
    print(leaks.tell(found, evidence).verdict)
    print("| planted in | times | own tries | at least | with base | shown as likely | shown as raised |")
    print("|---|---|---|---|---|---|---|")
    for kind, sentences in SENTENCES.items():
        for times, sentence in zip(TIMES, sentences, strict=True):
            print(row(kind, times, sentence, evidence, found))


if __name__ == "__main__":
    sys.exit(main())
