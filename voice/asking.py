"""Collects what the report is made from: the data, what both models are given, and what each of them does."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import torch
from transformers import GenerationConfig

import extract_blog_data as extraction
import train_model as training
from extract_blog_data import say, watched
from voice.chances import pick_texts
from voice.evidence import BlogData, Evidence, ModelRun, percent
from voice.loading import DTYPES, is_whole, positions_of, run_settings
from voice.sampling import Answer, request_tokens, whole_answers
from voice.settings import ROOT, Settings
from voice.style import SAME_LANGUAGE, share_of_language
from voice.word_index import LINE, WordIndex, author_texts, count_words, folded_words, posts_of, word_spans

ANSWERS_AT_ONCE = 24  # rows of a batch; more are hardly faster and need memory
# Of the first answers, before anybody knows how long they become. One batch of more answers is faster than two.
FIRST_ANSWERS = 4  # at least
FIRST_TOKENS = 4_800  # of all of them at most, or if that is more,
TOKENS_A_WORD = 3  # for each word that is wanted: most answers end before they are as long as they may be
WORDS_TO_WRITE = 6_000  # by each model, at full size
FEWEST_WORDS = 20  # in an answer on average; limits the loop for a model that writes less
DRAWN_POSTS = 60  # training posts, at full size, of which those that gained least are shown
DRAWN_WORDS = 250  # of such a post are read: enough to see whose it is
USUAL_WINDOW = (512, 32)  # tokens of a window, of them overlapping, for a model without a training report


# ---------------------------------------------------------------------------- the same for both models
def gather_evidence(settings: Settings, model, tokenizer, precision: str) -> Evidence:
    """Everything that is settled before either model runs, so that their results compare."""
    blog = read_blog(settings.data_dir)
    context, overlap = window_of_training(run_settings(settings.model_dir), positions_of(model))

    # The requests as in training, of posts that neither model has seen.
    requests = [post["messages"][0]["content"] for post in posts_of(blog.held_out)]
    evidence = Evidence(
        blog=blog,
        index=WordIndex(blog.train) if blog.train else None,
        not_strangers=settings.not_strangers,
        blocked_words=settings.extraction.blocked_words,
        phone_countries=settings.extraction.phone_countries,
        requests=requests or list(settings.prompts),
        words=max(1, round(settings.report_size * WORDS_TO_WRITE)),
        context_tokens=context,
        overlap_tokens=overlap,
        precision=precision,
        seed=42 if settings.seed is None else settings.seed,
        tokenizer=tokenizer,
        positions=positions_of(model),
    )

    # What is missing or left out is said before minutes are spent.
    if blog.redacted and not blog.key:
        say(f"{settings.data_dir} has no key: redacted data cannot be recognised; run extract_blog_data.py again.")
    add_other_blogs(evidence, settings.other_blogs)
    for problem in evidence.left_out:
        say(problem)
    evidence.drawn = draw_posts(posts_of(blog.train), max(1, round(DRAWN_POSTS * settings.report_size)))
    evidence.texts = pick_texts(evidence)
    return evidence


def draw_posts(posts: list[dict], number: int) -> list[dict]:
    """The beginnings of so many posts at most; of the same ones every time, so that two reports compare."""
    order = np.random.default_rng(42).permutation(len(posts))
    drawn = [posts[place] for place in sorted(order[:number])]
    return [shortened(post, DRAWN_WORDS) for post in drawn]


def shortened(post: dict, words: int) -> dict:
    """A post whose text ends after so many words."""
    *before, answer = post["messages"]
    text = answer["content"]
    ends = [end for _, end in word_spans(text)]
    if len(ends) > words:
        text = text[: ends[words - 1]]
    return post | {"messages": [*before, answer | {"content": text}]}


def window_of_training(recipe: dict, positions: int) -> tuple[int, int]:
    """(tokens of a window, of them overlapping) by the training run's settings, or the usual ones."""
    context = recipe.get("context_tokens")
    overlap = recipe.get("overlap_tokens")
    if not (is_whole(context) and is_whole(overlap) and 0 <= overlap < context > 1):
        context, overlap = USUAL_WINDOW
    context = min(context, positions)
    # The first token of a window is predicted only in the window before.
    return context, max(1, min(overlap, context // 2))


def read_blog(folder: Path) -> BlogData:
    """Both splits, and what extraction redacted."""
    blog = BlogData()
    splits = {"train_data.jsonl": blog.train, "val_data.jsonl": blog.held_out}
    for name, conversations in splits.items():
        path = folder / name
        # A small blog has no held-out posts, and an empty file.
        if path.is_file() and path.stat().st_size:
            conversations += training.read_conversations(path)
        for number, conversation in enumerate(conversations, start=1):
            conversation[LINE] = number

    redacted = training.read_json_object(folder / "extraction_report.json").get("redacted")
    if isinstance(redacted, list):
        blog.redacted = [entry for entry in redacted if isinstance(entry, dict)]
    blog.key = extraction.read_key(folder)
    return blog


# ---------------------------------------------------------------------------- OTHER_BLOGS
def add_other_blogs(evidence: Evidence, folders: tuple[str, ...]) -> None:
    """Their texts; why one cannot be compared with goes into `left_out`."""
    for folder, name in zip(folders, names_of_blogs(folders), strict=True):
        other = read_blog(ROOT / folder)
        texts = author_texts(other.train + other.held_out)
        problem = why_left_out(name, texts, evidence)
        if problem:
            evidence.left_out.append(problem)
        else:
            evidence.other_texts[name] = texts


def names_of_blogs(folders: tuple[str, ...]) -> list[str]:
    """Their names in the report, which may be shown to others; many blogs are in a folder `data`."""
    names = []
    for folder in folders:
        name = without_root(folder)
        same = sum(known.partition(" (")[0] == name for known in names)
        names.append(f"{name} ({same + 1})" if same else name)
    return names


def without_root(path: str) -> str:
    """The last part of an absolute path, which would name the user; a relative one unchanged."""
    return Path(path).name if Path(path).is_absolute() else path


def why_left_out(name: str, texts: list[str], evidence: Evidence) -> str:
    """Why a folder of OTHER_BLOGS cannot be compared with, as a sentence; "" if it can."""
    uses = Counter()
    for text in texts:
        uses.update(folded_words(text))
    if not uses:
        return f"OTHER_BLOGS names {name}, which has no train_data.jsonl: left out."

    # Everything would tell the author from people who write another language.
    commonest = [word for word, _ in uses.most_common(100)]
    share = share_of_language(commonest, evidence.blog.train)
    if evidence.blog.train and share < SAME_LANGUAGE:
        return (
            f"You use {percent(share)} of the 100 commonest words of {name} (OTHER_BLOGS): another language, left out."
        )
    return ""


# ---------------------------------------------------------------------------- one model after the other
def run_model(model, tokenizer, evidence: Evidence, sampling: GenerationConfig, name: str) -> ModelRun:
    """Everything that the report needs of one model; converts its weights to the precision of generating."""
    run = ModelRun()
    held_out = evidence.blog.held_out
    drawn = evidence.drawn
    if held_out:
        say(f"{name} model: loss of {len(held_out)} held-out conversations and {len(drawn)} training posts")
        run.held_out_nats = losses_of(model, tokenizer, evidence, held_out)
        run.drawn_nats = losses_of(model, tokenizer, evidence, drawn)

    # The losses above are exact; from here on the weights are those that answers are generated with.
    model = model.to(DTYPES[evidence.precision])
    run.answers = write_words(model, tokenizer, evidence, sampling, name)
    return run


def losses_of(model, tokenizer, evidence: Evidence, conversations: list[dict]) -> np.ndarray:
    """Negative log-likelihood of the author's part of each conversation, in nats, in windows as in training."""
    if not conversations:
        return np.zeros(0)
    tokenized = training.tokenize(tokenizer, conversations)
    rows = training.make_rows(tokenized, evidence.context_tokens, evidence.overlap_tokens, packed=False)
    with training.autocast(model.device, evidence.precision):
        return training.conversation_losses(model, rows)


def write_words(model, tokenizer, evidence: Evidence, sampling: GenerationConfig, name: str) -> list[Answer]:
    """Answers to the requests, again and again, until there are enough words."""
    rng = torch.Generator().manual_seed(evidence.seed)
    prompts = [request_tokens(tokenizer, request) for request in evidence.requests]
    # A model that answers with nothing would never have written enough.
    most = max(ANSWERS_AT_ONCE, evidence.words // FEWEST_WORDS)
    source = itertools.islice(itertools.cycle(prompts), most)

    # The time left is mostly too high: few answers are so long.
    progress = partial(watched, what="token", number=sampling.max_new_tokens)
    answers = []
    written = 0

    # How long answers become is known after the first ones only.
    tokens = max(FIRST_TOKENS, TOKENS_A_WORD * evidence.words)
    first = max(FIRST_ANSWERS, tokens // sampling.max_new_tokens)
    wanted = min(ANSWERS_AT_ONCE, first)
    while written < evidence.words:
        batch = list(itertools.islice(source, wanted))
        if not batch:
            break

        number = "1 answer" if len(batch) == 1 else f"{len(batch)} answers"
        say(f"{name} model: writing {number} of at most {sampling.max_new_tokens:,} tokens")
        answers += whole_answers(model, tokenizer, batch, sampling, rng, progress)
        written = count_words(answer.text for answer in answers)

        # No more answers than needed, if the next ones are as long as these.
        mean = max(written, 1) / len(answers)
        missing = (evidence.words - written) / mean
        wanted = min(ANSWERS_AT_ONCE, math.ceil(missing))
    say(f"{name} model: wrote {written:,} words")
    return answers
