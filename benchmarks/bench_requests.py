"""Requests that an instruct model writes for posts without a title, against the templates of extract_blog_data.py.

    python benchmarks/bench_requests.py WRITER BASE BLOG [BLOG ...] [--train-posts 60] [--updates 12] [--seed 42]

WRITER is the folder of an instruct model, BASE that of the model that is scored and trained, each BLOG a Jekyll
repository. Only posts with a usable title are taken, so that all kinds of request are for the same posts:

    title     the template with the post's title
    untitled  what the extractor asks where there is no title: by the tags, or in general
    model     what WRITER says the post is about, from its first 300 tokens; no 5 words in a row of the post's are left
    words     the three words of the same tokens that tell the post from the others of its blog (tf-idf)

Read are all held-out posts and `--train-posts` others. A row is a kind: bits per byte of the first 256 tokens of the
posts given their requests; how often the first 128 tokens of a post are likelier given its own request than given those
of nine other posts of its blog (Wilson; requests that are the same share that); then both less those of the templates
(paired bootstrap over the posts). The first table is the base model's.

Then the base model is trained once with each kind, on the same posts of the first BLOG, and reads the held-out posts of
that blog: given requests of the kind it was trained with, and given titles, which is what a reader would type.
"""

import argparse
import contextlib
import json
import math
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from bench_recipes import settings_of
from bench_train import hardware

import extract_blog_data as x
import test_model
import train_model

TEMPLATES = ("title", "untitled")
KINDS = (*TEMPLATES, "model", "words")
READ_TOKENS = 300  # of a post, by the writer
SCORED_TOKENS = 256  # of a post, given its own request
COMPARED_TOKENS = 128  # of a post, given each of ten
CANDIDATES = 10  # requests that a post is tried with, its own among them
ECHO_WORDS = 5  # in a row of the post's own: a request would hold a part of the answer
MOST_WORDS = 25  # of a topic
LOOSE_ENDS = (
    " a an and as at but by for from in into is of on or that the this to was which with your "  # no topic ends so
)
TRAINED_TOKENS = 512 * 8  # in an update


class Wording(NamedTuple):
    """How a writer is asked, and how its answer begins; what it writes after that is the topic."""

    question: str
    start: str


WORDINGS = {
    "ten words": Wording(
        "What is this blog post about?\n\n{}\n\nSay it in at most ten words of your own.", "Write a post about"
    ),
    "summary": Wording("Summarize this blog post in one short sentence.\n\n{}", "This post is about"),
    "topic": Wording("{}\n\n---\nName the topic of this text in a few words.", "This text is about"),
}


@dataclass(eq=False)
class Post:
    blog: str
    text: str
    line: dict  # of the data file
    is_held_out: bool
    requests: dict[str, str] = field(default_factory=dict)  # by kind
    others: list["Post"] = field(default_factory=list)  # whose requests it is tried with


# ---------------------------------------------------------------- posts and their requests
def read_blog(repository: Path) -> list[Post]:
    """The posts of a repository that have a usable title, with both requests that the extractor makes of them."""
    titled = extract(repository)
    # As if no title told anything.
    with mock.patch.object(x, "is_telling", lambda title: False):
        untitled = extract(repository)

    posts = []
    for (split, line), (_, same) in zip(titled, untitled, strict=True):
        request, answer = (turn["content"] for turn in line["messages"])
        if request in [template.format(line["title"]) for template in x.TITLE_REQUESTS]:
            requests = {"title": request, "untitled": same["messages"][0]["content"]}
            posts.append(Post(repository.name, answer, line, split == "val", requests))
    return posts


def extract(repository: Path) -> list[tuple[str, dict]]:
    """(split, line) of each post that extract_blog_data.py writes."""
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        with contextlib.redirect_stdout(sys.stderr):
            x.main(["--public", str(repository), "--data-dir", folder])
        for split in train_model.SPLITS:
            entries = train_model.read_conversations(Path(folder, f"{split}_data.jsonl"))
            lines += [(split, entry) for entry in entries if entry["kind"] == "post"]
    return lines


def beginning(tokenizer, text: str) -> str:
    return tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)[:READ_TOKENS])


def write_topics(model, tokenizer, wording: Wording, texts: list[str]) -> Iterator[str]:
    """What the writer says each text is about, as it says it."""
    sampling = test_model.read_sampling(model.generation_config, tokenizer, 60)
    sampling.do_sample = False
    sampling.repetition_penalty = 1.0

    # The answer's beginning is given, or a small model would answer with whatever comes to its mind.
    start = tokenizer.encode(wording.start, add_special_tokens=False)
    prompts = [test_model.request_tokens(tokenizer, wording.question.format(text)) + start for text in texts]
    for begin in range(0, len(prompts), 16):
        answers = test_model.whole_answers(model, tokenizer, prompts[begin : begin + 16], sampling, torch.Generator())
        for answer in answers:
            yield answer.text


def clean_topic(written: str) -> str:
    """The first sentence of what a writer wrote, at most MOST_WORDS words, without quotes and the full stop."""
    lines = written.strip().splitlines() or [""]
    sentence = re.split(r"(?<=[.!?])\s", lines[0])[0]
    words = sentence.strip(" .!?:;,'\"*“”‘’").split()
    return without_loose_end(words[:MOST_WORDS])


def without_echo(topic: str, post: str) -> str:
    """`topic` up to where ECHO_WORDS words in a row stand in the post."""
    in_post = f" {' '.join(x.words_of(post))} "
    words = topic.split()
    for end in range(1, len(words) + 1):
        run = x.words_of(" ".join(words[:end]))[-ECHO_WORDS:]
        if len(run) == ECHO_WORDS and f" {' '.join(run)} " in in_post:
            return without_loose_end(words[: end - 1])
    return topic


def without_loose_end(words: list[str]) -> str:
    """The words without those at their end that something has to follow."""
    while words and f" {words[-1].lower()} " in LOOSE_ENDS:
        words = words[:-1]
    return " ".join(words)


def add_written(posts: list[Post], model, tokenizer, wording: Wording) -> str:
    """Adds the writer's requests; says how many were cut, and how many posts keep the template."""
    cut = 0
    kept = 0
    texts = [beginning(tokenizer, post.text) for post in posts]
    for post, written in zip(posts, write_topics(model, tokenizer, wording, texts), strict=True):
        topic = clean_topic(written)
        own = without_echo(topic, post.text)
        cut += own != topic

        # One word, or none, says nothing.
        says_something = len(x.words_of(own)) > 1
        kept += not says_something
        post.requests["model"] = f"Write a blog post about {own}." if says_something else post.requests["untitled"]
    return f"{len(posts)} requests written: {cut} held {ECHO_WORDS} words in a row of the post, {kept} said nothing"


def add_words(posts: list[Post], tokenizer) -> None:
    """Adds requests of the three words with the highest tf-idf among the posts of one blog."""
    counts = [Counter(x.words_of(beginning(tokenizer, post.text))) for post in posts]
    documents = Counter(word for count in counts for word in count)
    for post, count in zip(posts, counts, strict=True):
        weights = {word: number * math.log(len(posts) / documents[word]) for word, number in count.items()}
        telling = sorted((word for word in weights if word.isalpha()), key=weights.get, reverse=True)
        first, second, third = [*telling, "this", "and", "that"][:3]
        post.requests["words"] = f"Write a blog post about {first}, {second} and {third}."


# ---------------------------------------------------------------- what a request is worth
class Score(NamedTuple):
    """Of one kind of request under one model, by post."""

    nats: np.ndarray
    likeliest: np.ndarray  # 1 where the post is likeliest given its own request, 1/n where n are the same as it


def answer_nats(model, tokenizer, pairs: list[tuple[str, str]], tokens: int) -> np.ndarray:
    """Nats of the first `tokens` tokens of each text given its request; `pairs` are (request, text)."""
    tokenized = []
    for request, text in pairs:
        turns = [{"role": "user", "content": request}, {"role": "assistant", "content": text}]
        ids, scored = train_model.conversation_tokens(tokenizer, turns)
        end = scored.index(True) + tokens
        tokenized.append((ids[:end], scored[:end]))

    rows = train_model.make_rows(tokenized, train_model.CONTEXT_TOKENS, train_model.OVERLAP_TOKENS)
    return train_model.conversation_losses(model, rows)


def answer_bytes(tokenizer, posts: list[Post]) -> np.ndarray:
    """UTF-8 bytes of what answer_nats scores of each post."""
    sizes = []
    for post in posts:
        ids = tokenizer.encode(post.text, add_special_tokens=False)[:SCORED_TOKENS]
        sizes.append(len(tokenizer.decode(ids).encode()))
    return np.array(sizes)


def score(model, tokenizer, posts: list[Post], kind: str) -> Score:
    nats = answer_nats(model, tokenizer, [(post.requests[kind], post.text) for post in posts], SCORED_TOKENS)
    likeliest = []
    for number, post in enumerate(posts, 1):
        own = post.requests[kind]
        asked = [own, *(other.requests[kind] for other in post.others)]
        different = list(dict.fromkeys(asked))  # the own one comes first
        losses = answer_nats(model, tokenizer, [(request, post.text) for request in different], COMPARED_TOKENS)
        likeliest.append((losses.argmin() == 0) / asked.count(own))
        print(f"{kind}: post {number} of {len(posts)}", end="\r", file=sys.stderr, flush=True)
    return Score(nats, np.array(likeliest))


def print_row(name: str, kind: str, one: Score, templates: dict[str, Score], sizes: np.ndarray) -> None:
    """A row of the table; those templates that it is compared with are `templates`."""
    low, high = test_model.wilson(one.likeliest.sum(), len(sizes))
    cells = [name, kind, f"{bits(one.nats, sizes):.4f}", f"{one.likeliest.mean():.0%} ({low:.0%} to {high:.0%})"]
    for other in TEMPLATES:
        cells += tell_difference(one, templates[other], sizes) if other in templates else ["", ""]
    print(f"| {' | '.join(cells)} |", flush=True)


def bits(nats: np.ndarray, sizes: np.ndarray) -> float:
    return nats.sum() / math.log(2) / sizes.sum()


def tell_difference(one: Score, other: Score, sizes: np.ndarray) -> list[str]:
    """(bits per byte, share likeliest) of one kind less those of the other, with 95 % intervals."""
    fewer = one.nats - other.nats
    more = one.likeliest - other.likeliest
    low, high = test_model.bootstrap(lambda drawn: bits(fewer[drawn], sizes[drawn]), len(sizes))
    least, most = test_model.bootstrap(lambda drawn: more[drawn].mean(), len(sizes))
    return [
        f"{bits(fewer, sizes):+.4f} ({low:+.4f} to {high:+.4f})",
        f"{100 * more.mean():+.0f} ({100 * least:+.0f} to {100 * most:+.0f})",
    ]


def print_head() -> None:
    columns = ["model", "request", "bits/byte", "likeliest of ten", "bits, less title", "points, less title"]
    columns += ["bits, less untitled", "points, less untitled"]
    print(f"\n| {' | '.join(columns)} |")
    print("|---" * len(columns) + "|", flush=True)


# ---------------------------------------------------------------- models
def reading(model) -> torch.autocast:
    """What a model is to read in: the precision of the evaluation while training."""
    return train_model.autocast(model.device, train_model.pick_precision(model.device, train_model.PRECISION))


def train_on(kind: str, posts: list[Post], checked: list[Post], args: argparse.Namespace, folder: Path) -> Path:
    """The folder of a model that was trained on the posts, asked for by requests of this kind."""
    for split, some in (("train", posts), ("val", checked)):
        with (folder / f"{split}_data.jsonl").open("w", encoding="utf-8") as out:
            for post in some:
                turns = [
                    {"role": "user", "content": post.requests[kind]},
                    {"role": "assistant", "content": post.text},
                ]
                out.write(json.dumps({**post.line, "messages": turns}) + "\n")

    output = folder / f"model-{kind}"
    flags = ["--base-model", args.base, "--data-dir", str(folder), "--output-dir", str(output)]
    flags += ["--learning-rate", str(args.rate), "--max-steps", str(args.updates)]
    # One evaluation, at the end: the last weights are kept, whatever the few posts say that it reads.
    once = settings_of(train_model, {"EVALUATIONS_PER_EPOCH": 1, "PATIENCE": 100, "SEED": args.seed})
    with once, contextlib.redirect_stdout(sys.stderr):
        train_model.main(flags)
    return output


def posts_to_train(posts: list[Post], tokenizer, updates: int, dice: np.random.Generator) -> list[Post]:
    """Posts drawn until they fill the updates, so that each is read about once."""
    chosen = []
    tokens = 0
    for number in dice.permutation(len(posts)):
        if tokens >= updates * TRAINED_TOKENS:
            break
        chosen.append(posts[number])
        tokens += len(tokenizer.encode(posts[number].text))
    return chosen


def pick_wording(args: argparse.Namespace, posts: list[Post], writer, tokenizer) -> None:
    """Prints what each wording's requests are worth to the base model, and its first requests."""
    base = test_model.load_for_writing(args.base)
    base_tokenizer = train_model.load_tokenizer(args.base)
    sizes = answer_bytes(base_tokenizer, posts)
    for name, wording in WORDINGS.items():
        told = add_written(posts, writer, tokenizer, wording)
        with reading(base):
            nats = answer_nats(
                base, base_tokenizer, [(post.requests["model"], post.text) for post in posts], SCORED_TOKENS
            )
        print(f"\n{name}: {bits(nats, sizes):.4f} bits per byte; {told}", flush=True)
        for post in posts[: args.examples]:
            print(f"    {post.requests['title']}  ->  {post.requests['model']}")


# ---------------------------------------------------------------- command line
def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("writer")
    parser.add_argument("base")
    parser.add_argument("blogs", nargs="+", type=Path, metavar="BLOG")
    parser.add_argument("--wording", choices=WORDINGS, default="summary", help="how the writer is asked")
    parser.add_argument("--pick-wording", action="store_true", help="compare the wordings on training posts, then end")
    parser.add_argument("--train-posts", type=int, default=60, help="that the base model reads beside the held-out")
    parser.add_argument("--updates", type=int, default=12, help="of each training; 0: none is trained")
    parser.add_argument("--rate", type=float, default=2e-4)
    parser.add_argument("--seed", type=int, default=42, help="of which posts are taken, and of the training")
    parser.add_argument("--examples", type=int, default=0, help="requests to print; they quote the blogs")
    return parser.parse_args()


def main() -> int:
    args = parse_arguments()
    dice = np.random.default_rng(args.seed)
    tokenizer = train_model.load_tokenizer(args.base)
    blogs = [read_blog(repository.resolve()) for repository in args.blogs]
    for posts in blogs:
        add_words(posts, tokenizer)

    # What is read, and what is trained: one draw of each blog's training posts, and the first blog's again.
    pool = [post for posts in blogs for post in posts if not post.is_held_out]
    drawn = [pool[number] for number in dice.permutation(len(pool))[: args.train_posts]]
    held_out = [post for posts in blogs for post in posts if post.is_held_out]
    read = held_out + drawn
    trained = posts_to_train([post for post in blogs[0] if not post.is_held_out], tokenizer, args.updates, dice)

    writer = test_model.load_for_writing(args.writer)
    writer_tokenizer = train_model.load_tokenizer(args.writer)
    if args.pick_wording:
        pick_wording(args, drawn, writer, writer_tokenizer)
        return 0
    for posts in blogs:
        needed = [post for post in posts if post in read or post in trained]
        told = add_written(needed, writer, writer_tokenizer, WORDINGS[args.wording])
        print(f"{posts[0].blog}: {told}", flush=True)
    del writer
    for post in read[: args.examples]:
        print("  ".join(f"[{kind}] {post.requests[kind]}" for kind in KINDS))

    # The nine others are the same for every kind.
    for post in read:
        rivals = [other for other in read if other.blog == post.blog and other is not post]
        post.others = [rivals[number] for number in dice.permutation(len(rivals))[: CANDIDATES - 1]]

    print(f"\n{hardware()}; base model, {len(held_out)} held-out posts and {len(drawn)} others")
    print_head()
    base = test_model.load_for_writing(args.base)
    sizes = answer_bytes(tokenizer, read)
    scores = {}
    for kind in KINDS:
        with reading(base):
            scores[kind] = score(base, tokenizer, read, kind)
        print_row("base", kind, scores[kind], others_of(kind, scores), sizes)
    del base

    if args.updates:
        compare_trained(args, tokenizer, trained, [post for post in held_out if post in blogs[0]])
    return 0


def others_of(kind: str, scores: dict[str, Score]) -> dict[str, Score]:
    return {other: one for other, one in scores.items() if other != kind}


def compare_trained(args: argparse.Namespace, tokenizer, posts: list[Post], held_out: list[Post]) -> None:
    """Trains a model with each kind of request, and prints what it makes of its own kind and of titles."""
    print(f"\n{args.updates} updates on {len(posts)} posts, seed {args.seed}; {len(held_out)} held-out posts read")
    print_head()
    sizes = answer_bytes(tokenizer, held_out)
    own = {}
    asked_by_title = {}
    for kind in KINDS:
        with tempfile.TemporaryDirectory() as folder:
            model = test_model.load_for_writing(train_on(kind, posts, held_out[:3], args, Path(folder)))
        with reading(model):
            own[kind] = score(model, tokenizer, held_out, kind)
            asked_by_title[kind] = own[kind] if kind == "title" else score(model, tokenizer, held_out, "title")

        print_row("trained so", kind, own[kind], others_of(kind, own), sizes)
        print_row("trained so, asked by title", kind, asked_by_title[kind], others_of(kind, asked_by_title), sizes)


if __name__ == "__main__":
    sys.exit(main())
