"""Let the tuned model write, talk to it, and measure it: does it sound like you, does it give private posts away?

    python test_model.py                    answers the prompts in the settings
    python test_model.py --prompt "TEXT"    answers this one
    python test_model.py --chat             a conversation in the terminal
    python test_model.py --report           measures, and writes voice_report.json and voice_report.html
    python test_model.py --report --quick   the same in a tenth of the time, with wide ranges

Reads blog-model-final/ and, to say what was copied from where, data/. The two report files go into
blog-model-final/, readable by their owner alone: they quote private posts.

How it goes (each is a section below):

    the run                 main modes: answer_prompts, chat, make_report
    loading                 load_tuned, load_base        model folders, checked to be whole
    sampling                next_token_chances, Batch    which token comes next; many prompts at once
                            generate, stream             tokens, then pieces of text as they come
    where words come from   WordIndex                    runs of words that stand in the training data
    chatting                Chat                         the commands, and what the model still remembers

    The report has four layers; a question of it has one function in each of the last three.
    report: evidence        Evidence, try_out            what is asked of both models, and what they did
    report: numbers         measure_...                  what voice_report.json holds
    report: words           tell_...                     verdict, rows and notes, for the terminal and the page
    report: page            PAGE, draw_...               the same with pictures and samples
    questions               QUESTIONS                    the table that ties the layers together
"""

import argparse
import base64
import contextlib
import dataclasses
import difflib
import hashlib
import inspect
import io
import itertools
import json
import math
import os
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import transformers
from jinja2 import Environment
from matplotlib.figure import Figure
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import train_model as training
from extract_blog_data import TITLE_REQUESTS, WORD, find_personal_data
from train_model import break_control_tokens, conversation_tokens, render, say

HERE = Path(__file__).resolve().parent

# ---------------------------------------------------------------------------- settings
MODEL_DIR = "blog-model-final"
DATA_DIR = "data"
PROMPTS = [
    "What's on your mind today?",
    "What are your thoughts on writing?",
    "Tell me about your day.",
    "How do you stay motivated?",
    "What did you learn this week?",
    "Write a blog post about something small that made you happy.",
]

# None: as generation_config.json in the model folder has it.
MAX_NEW_TOKENS = None  # an answer's length at most; 200 tokens are about 150 words
TEMPERATURE = None  # 0 always takes the likeliest token; 0.7 careful, 1.0 as the model has it, above that wild
TOP_P = None  # share of the likeliest tokens that are drawn from: 0.9 to 1
TOP_K = None  # draws from so many tokens at most; transformers takes 50 when the file says nothing
REPETITION_PENALTY = None  # 1 = none; 1.1 keeps small models from going in circles, 1.3 garbles them
SEED = None  # a number gives the same answers every time; None gives others, and 42 in the report
PRECISION = None  # "bf16", "fp16" or "fp32" to write with; None: the PRECISION of train_model.py

REPORT_SIZE = 1.0  # 1 x 6,000 words and 1 x 200 passages of each kind from each model; the voice needs 0.9 or more
BASE_MODEL = ""  # a name or folder; "" = the one that training_report.json names
CONTROL_TEXT = ""  # val_data.jsonl of another blog: what the model gains on it is not your voice


# ---------------------------------------------------------------------------- the run
def answer_prompts(model, tokenizer, texts: list[str], sampling: GenerationConfig, dice, index) -> None:
    """Prints an answer to each prompt and, given a WordIndex, where its longest run of words comes from."""
    prompts = [prompt_tokens(tokenizer, [{"role": "user", "content": text}]) for text in texts]
    longest = max(map(len, prompts))
    room = positions_of(model)
    if longest >= room:
        sys.exit(f"The prompt has {longest:,} tokens and the model takes {room:,}, answer included: shorten it.")

    began = time.monotonic()
    answers = []
    print(f"> {texts[0]}\n")
    for piece, answer in stream(model, tokenizer, prompts, sampling, dice):
        print(piece, end="", flush=True)
        if answer is None:
            continue

        answers.append(answer)
        print("\n" + tell_origin(index.longest_copy(answer.text)) if index else "")
        if len(answers) < len(texts):
            print(f"\n> {texts[len(answers)]}\n", flush=True)
        else:
            print(flush=True)

    seconds = time.monotonic() - began
    tokens = sum(len(answer.tokens) for answer in answers)
    ended = sum(answer.ended for answer in answers)
    say(f"{ended} of {len(answers)} answers ended by themselves; {tokens:,} tokens, {tokens / seconds:.1f} a second.")


def chat(model, tokenizer, sampling: GenerationConfig, dice) -> None:
    """A conversation in the terminal, or with lines from a pipe; Ctrl-C ends the answer, not the program."""
    talk = Chat()
    positions = positions_of(model)
    room = max(positions - sampling.max_new_tokens, positions // 2)

    say(COMMANDS)
    while (line := read_line()) != "/quit":
        if not talk.take(line):
            continue

        prompt = talk.prompt(tokenizer, room)
        if not prompt:
            say(f"That is longer than the {room:,} tokens there is room for.")
            talk.take_back()
            continue

        parts = []
        with contextlib.suppress(KeyboardInterrupt):
            for piece, _ in stream(model, tokenizer, [prompt], sampling, dice):
                parts.append(piece)
                print(piece, end="", flush=True)
        print(flush=True)
        talk.remember("".join(parts))


def make_report(args: argparse.Namespace, model, tokenizer, sampling: GenerationConfig, precision: str) -> None:
    """Asks both models the same, one after the other; prints and writes what came of it."""
    size = REPORT_SIZE / 10 if args.quick else REPORT_SIZE
    history = read_history(args.model_dir)
    base_name = BASE_MODEL or history.get("settings", {}).get("base_model", "")
    evidence = gather_evidence(args, history, model, tokenizer, precision, size)

    evidence.tuned = try_out(model, tokenizer, evidence, sampling, "tuned")
    base = load_base(base_name)
    if base is not None:
        evidence.base = try_out(base, tokenizer, evidence, sampling, "base")

    report = Report(str(args.model_dir), base_name or "an unknown model", evidence.seed, size)
    for question in QUESTIONS:
        report.add(question, evidence)
    report.samples = sample_answers(evidence)

    try:
        replace_file(args.model_dir / "voice_report.json", report.as_json())
        replace_file(args.model_dir / "voice_report.html", make_page(report, args.model_dir / "loss_curve.png"))
    except OSError as error:
        sys.exit(f"Cannot write {error.filename}: {error.strerror}.")
    print(report.as_text())


# ---------------------------------------------------------------------------- loading
NUMBERS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}  # of the weights, to write with


def load_for_writing(folder: str | Path):
    """A causal model in float32 from safetensors; asks no hub; raises OSError if it is not there as a whole."""
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, use_safetensors=True, local_files_only=True, output_loading_info=True
        )
    except (SafetensorError, ValueError, RuntimeError, KeyError) as error:
        raise OSError(str(error)) from error
    if info["missing_keys"]:
        raise OSError(f"{len(info['missing_keys'])} of its tensors are missing")
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def load_tuned(folder: Path):
    """(model, tokenizer) of a folder that train_model.py wrote; ends the program if it is not whole."""
    training.recover(folder)
    if not (folder / "config.json").is_file():
        sys.exit(f"There is no model in {folder}: run train_model.py first.")

    try:
        model = load_for_writing(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        if not tokenizer.encode("x"):
            raise OSError("its tokenizer is missing")
    except (OSError, ValueError) as error:
        sys.exit(f"{folder} holds half a model ({brief(error)}): run train_model.py again.")

    if tokenizer.chat_template is None:
        sys.exit(f"The tokenizer in {folder} has no chat template: run train_model.py again, it writes one.")
    return model, tokenizer


def load_base(name: str):
    """The base model, or None where it is not at hand, which is said."""
    folder = name
    for path in (Path(name), HERE / name):
        if name and path.is_dir():
            folder = str(path)
            break

    try:
        return load_for_writing(folder)
    except OSError as error:
        say(f"The base model {name} is not at hand ({brief(error)}): what needs it is left out.")
        return None


def brief(error: Exception) -> str:
    """The first line of an error's message, to be put into a sentence."""
    return str(error).strip().partition("\n")[0].rstrip(".")


def positions_of(model) -> int:
    """Tokens that prompt and answer may have together; models without a table of positions (Mamba) get 2,048."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or 2048


# ---------------------------------------------------------------------------- sampling
class Answer(NamedTuple):
    """What a model wrote to one prompt."""

    text: str
    tokens: list[int]
    ended: bool  # by itself, at an end-of-text token


def read_sampling(config: GenerationConfig, tokenizer, max_new_tokens: int | None) -> GenerationConfig:
    """The model's generation_config.json under the settings above; what neither says is as in transformers."""
    settings = {
        # name in the file: (what the user set, what transformers takes where the file says nothing)
        "temperature": (TEMPERATURE, 1.0),
        "top_k": (TOP_K, 50),
        "top_p": (TOP_P, 1.0),
        "repetition_penalty": (REPETITION_PENALTY, 1.0),
        "max_new_tokens": (max_new_tokens, 200),
    }
    for name, (ours, usual) in settings.items():
        if ours is not None:
            setattr(config, name, ours)
        elif getattr(config, name) is None:
            setattr(config, name, usual)

    if TEMPERATURE is not None:
        config.do_sample = TEMPERATURE != 0

    # One token or several; from here on always a list.
    ends = tokenizer.eos_token_id if config.eos_token_id is None else config.eos_token_id
    config.eos_token_id = [ends] if isinstance(ends, int) else ends
    return config


def next_token_chances(
    logits: torch.Tensor, seen: torch.Tensor, sampling: GenerationConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """(tokens, chances), both of shape (rows, kept): what may come next, the likeliest first; a row's sum is 1.

    `logits` and `seen` (whether a token stood before) have the shape (rows, vocabulary). In transformers' order:
    repetition penalty (Keskar et al. 2019), temperature, top-k, top-p (Holtzman et al. 2020).
    """
    penalty = sampling.repetition_penalty
    if penalty != 1:
        punished = torch.where(logits > 0, logits / penalty, logits * penalty)
        logits = torch.where(seen, punished, logits)

    if not sampling.do_sample:
        tokens = logits.argmax(-1, keepdim=True)
        return tokens, torch.ones_like(tokens, dtype=torch.float32)

    vocabulary = logits.shape[-1]
    best = (logits / sampling.temperature).topk(min(sampling.top_k or vocabulary, vocabulary))
    chances = best.values.softmax(-1)
    # A token stays as long as those before it have not reached top_p together, so the first always does.
    before = chances.cumsum(-1) - chances
    chances[before >= sampling.top_p] = 0
    return best.indices, chances / chances.sum(-1, keepdim=True)


def sample_next_token(
    logits: torch.Tensor, seen: torch.Tensor, sampling: GenerationConfig, dice: torch.Generator
) -> torch.Tensor:
    """The next token of each row, shape (rows,)."""
    tokens, chances = next_token_chances(logits, seen, sampling)
    if not sampling.do_sample:
        return tokens[:, 0]

    # Drawn on the CPU, so that a seed means the same on every device.
    place = torch.multinomial(chances.cpu(), 1, generator=dice).to(tokens.device)
    return tokens.gather(1, place)[:, 0]


class Batch:
    """Prompts that are answered together: one row each, padded on the left. A row leaves when its answer is over."""

    def __init__(self, model, prompts: list[list[int]]):
        longest = max(map(len, prompts))
        padding = [longest - len(prompt) for prompt in prompts]
        vocabulary = model.config.get_text_config().vocab_size

        self.model = model
        self.takes_positions = "position_ids" in inspect.signature(model.forward).parameters
        self.numbers = list(range(len(prompts)))  # of the prompts, by row
        self.cache = None  # what the layers remember of the tokens read so far
        self.ids = self.tensor([[0] * pad + prompt for pad, prompt in zip(padding, prompts, strict=True)])
        self.mask = self.tensor([[0] * pad + [1] * (longest - pad) for pad in padding])  # (rows, tokens); 0 = padding

        # For the repetition penalty: the tokens of the row itself. transformers' own processor looks at all ids,
        # padding included, and GPT-2 pads with its end of text: short prompts would be punished for stopping.
        self.seen = torch.zeros(len(prompts), vocabulary, dtype=torch.bool, device=model.device)
        for row, prompt in enumerate(prompts):
            self.seen[row, prompt] = True

    def tensor(self, values: list) -> torch.Tensor:
        return torch.tensor(values, device=self.model.device)

    def next_logits(self) -> torch.Tensor:
        """Logits of each row's next token, in float32, shape (rows, vocabulary)."""
        inputs = {"input_ids": self.ids, "attention_mask": self.mask, "past_key_values": self.cache}
        if self.takes_positions:
            positions = (self.mask.cumsum(1) - 1).clamp(min=0)
            inputs["position_ids"] = positions[:, -self.ids.shape[1] :]

        output = self.model(**inputs, use_cache=True, logits_to_keep=1)
        self.cache = getattr(output, "past_key_values", None)
        return output.logits[:, -1].float()

    def append(self, tokens: torch.Tensor) -> None:
        """Adds one token to each row; `tokens` has the shape (rows,)."""
        new = tokens[:, None]
        # Without a cache (Mamba) all tokens are read again at every step.
        self.ids = new if self.cache is not None else torch.cat([self.ids, new], 1)
        self.mask = torch.cat([self.mask, torch.ones_like(new)], 1)
        self.seen.scatter_(1, new, True)

    def keep(self, rows: list[int]) -> None:
        """Lets all other rows leave."""
        self.numbers = [self.numbers[row] for row in rows]
        index = self.tensor(rows)
        self.ids = self.ids[index]
        self.mask = self.mask[index]
        self.seen = self.seen[index]
        if self.cache is not None:
            self.cache.reorder_cache(index)  # the only way to drop rows that linear attention knows too


@torch.inference_mode()
def generate(
    model, prompts: list[list[int]], sampling: GenerationConfig, dice: torch.Generator
) -> Iterator[list[tuple[int, int, bool]]]:
    """Answers to all prompts (token ids) at once; each step yields (prompt's number, token, whether it is its last).

    Prompt and answer together never outgrow the model's positions.
    """
    room = [min(sampling.max_new_tokens, positions_of(model) - len(prompt)) for prompt in prompts]
    batch = Batch(model, prompts)
    for made in itertools.count(1):
        chosen = sample_next_token(batch.next_logits(), batch.seen, sampling, dice)

        step = []
        for number, token in zip(batch.numbers, chosen.tolist(), strict=True):
            is_last = token in sampling.eos_token_id or made >= room[number]
            step.append((number, token, is_last))
        yield step

        going_on = [row for row, (_, _, is_last) in enumerate(step) if not is_last]
        if not going_on:
            return
        batch.append(chosen)
        if len(going_on) < len(step):
            batch.keep(going_on)


def stream(
    model, tokenizer, prompts: list[list[int]], sampling: GenerationConfig, dice: torch.Generator
) -> Iterator[tuple[str, Answer | None]]:
    """(piece of text, the whole answer with its last piece), one prompt after the other.

    All are made together: the first answer comes as it is made, the next as far as it has got by then.
    """
    tokens = [[] for _ in prompts]
    over = [False for _ in prompts]
    current = 0  # number of the answer that is being shown
    shown = ""  # of it
    for step in generate(model, prompts, sampling, dice):
        for number, token, is_last in step:
            tokens[number].append(token)
            over[number] = is_last

        while current < len(prompts):
            text = tokenizer.decode(tokens[current], skip_special_tokens=True, clean_up_tokenization_spaces=False)
            if not over[current]:
                text = text.strip().rstrip("\ufffd")  # a character of which some bytes are still to come
                yield text[len(shown) :], None
                shown = text
                break

            answer = Answer(text.strip(), tokens[current], tokens[current][-1] in sampling.eos_token_id)
            yield answer.text[len(shown) :], answer
            shown = ""
            current += 1


def prompt_tokens(tokenizer, messages: list[dict]) -> list[int]:
    """Token ids of a conversation that ends where the assistant is to speak."""
    return tokenizer.encode(render(tokenizer, messages, add_generation_prompt=True), add_special_tokens=False)


# ---------------------------------------------------------------------------- where words come from
COPY_WORDS = 8  # words in a row that count as copied; figures made with another number do not compare


class Copy(NamedTuple):
    """A run of words that stands in the training data; `post` is the conversation if it is long enough to count."""

    words: int
    text: str
    post: dict | None


class WordIndex:
    """The author's training text as words alone, made to find runs of words in it again."""

    def __init__(self, conversations: list[dict]):
        self.posts = conversations
        self.runs = set()  # hashes of all runs of COPY_WORDS words
        texts = []
        for conversation in conversations:
            words = WORD.findall(author_text(conversation).casefold())
            texts.append(f" {' '.join(words)} ")
            for start in range(len(words) - COPY_WORDS + 1):
                self.runs.add(hash(tuple(words[start : start + COPY_WORDS])))
        self.text = "\n".join(texts)  # one conversation a line, so that a run ends with its post

    def copied(self, words: list[str]) -> list[int]:
        """Where in `words` a run of COPY_WORDS begins that stands in the training text."""
        starts = range(len(words) - COPY_WORDS + 1)
        return [start for start in starts if hash(tuple(words[start : start + COPY_WORDS])) in self.runs]

    def longest_copy(self, text: str) -> Copy:
        """The longest run of words of `text` that stands in the training text; the first of equals."""
        spans = [match.span() for match in WORD.finditer(text)]
        words = WORD.findall(text.casefold())

        # Only a run that is longer than the longest so far matters, so `length` never shrinks: one look a word or two.
        begin, length, place = 0, 0, -1
        for start in range(len(words)):
            while start + length < len(words):
                longer = " ".join(words[start : start + length + 1])
                found = self.text.find(f" {longer} ")
                if found < 0:
                    break
                begin, length, place = start, length + 1, found

        if not length:
            return Copy(0, "", None)
        copy = text[spans[begin][0] : spans[begin + length - 1][1]]
        post = self.posts[self.text.count("\n", 0, place)] if length >= COPY_WORDS else None
        return Copy(length, copy, post)

    def split_at_copies(self, text: str) -> list[tuple[str, bool]]:
        """The text in pieces: (piece, whether it is a copy of COPY_WORDS words or more)."""
        spans = [match.span() for match in WORD.finditer(text)]

        copies = []  # (begin, end) in characters
        for start in self.copied(WORD.findall(text.casefold())):
            begin = spans[start][0]
            end = spans[start + COPY_WORDS - 1][1]
            if copies and begin <= copies[-1][1]:
                copies[-1] = (copies[-1][0], end)
            else:
                copies.append((begin, end))

        pieces = []
        done = 0
        for begin, end in copies:
            pieces += [(text[done:begin], False), (text[begin:end], True)]
            done = end
        return [*pieces, (text[done:], False)]

    def without_copies(self, text: str) -> str:
        return "".join(piece for piece, is_copy in self.split_at_copies(text) if not is_copy)


def author_text(conversation: dict) -> str:
    """What the author says in it."""
    return "\n\n".join(turn["content"] for turn in conversation["messages"] if turn["role"] == "assistant")


def title_of(conversation: dict) -> str:
    return conversation.get("title") or "untitled"


def tell_origin(copy: Copy) -> str:
    """The line under an answer."""
    source = ""
    if copy.post:
        visibility, title, path = (copy.post.get(name) or "" for name in ("visibility", "title", "path"))
        source = f', from the {visibility} post "{title}" {path}'
    return f"[longest run of words from the training data: {copy.words}{source}]"


# ---------------------------------------------------------------------------- chatting
COMMANDS = "/post TITLE writes a post, /continue TEXT goes on from your beginning, /again, /clear, /quit"


def read_line() -> str:
    """The next line that is typed; Ctrl-C makes it an empty one, the end of the input is "/quit"."""
    try:
        return input("\n> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return "/quit"
    except KeyboardInterrupt:
        return ""


@dataclass
class Chat:
    """What has been said, and what is to be answered next."""

    history: list[dict] = field(default_factory=list)
    beginning: str = ""  # text of the user's to go on from, without the template; "" in a conversation

    def take(self, line: str) -> bool:
        """Takes in a line of the user's: a command or something said; returns whether an answer is due."""
        command, _, rest = line.partition(" ")
        if not line:
            return False
        if not line.startswith("/"):
            return self.ask(line)
        if command == "/post" and rest:
            self.history.clear()
            return self.ask(TITLE_REQUESTS[0].format(rest))
        if command == "/continue" and rest:
            self.beginning = rest
            return True
        if command == "/again":
            return self.again()
        if command == "/clear":
            self.history.clear()
            self.beginning = ""
            return False
        say(COMMANDS)
        return False

    def ask(self, text: str) -> bool:
        self.history.append({"role": "user", "content": text})
        self.beginning = ""
        return True

    def again(self) -> bool:
        if self.beginning:
            return True
        if not self.history:
            say("There is nothing to do again yet.")
            return False
        if self.history[-1]["role"] == "assistant":
            self.history.pop()
        return True

    def remember(self, answer: str) -> None:
        """Keeps an answer; what goes on from a beginning is no part of the conversation."""
        if not self.beginning:
            self.history.append({"role": "assistant", "content": answer})

    def take_back(self) -> None:
        """Forgets what cannot be answered."""
        if self.beginning:
            self.beginning = ""
        else:
            self.history.pop()

    def prompt(self, tokenizer, room: int) -> list[int]:
        """Token ids to answer to: the conversation less its oldest turns as need be, nothing if that is not enough."""
        if self.beginning:
            ids = tokenizer.encode(break_control_tokens(self.beginning, tokenizer))
            return ids if len(ids) <= room else []

        for first, turn in enumerate(self.history):
            if turn["role"] == "user":
                ids = prompt_tokens(tokenizer, self.history[first:])
                if len(ids) <= room:
                    return ids
        return []


# ---------------------------------------------------------------------------- report: evidence
# Figures made with other values do not compare.
PASSAGE_TOKENS = 50  # tokens of a post that are given, and as many that should not come back
ANSWERS_AT_ONCE = 24  # rows of a batch; more bring little speed and take memory
MIN_HELD_OUT, MIN_GENERATED = 2_000, 5_000  # words; with fewer there is no position
WORDS_FOR_VOICE, WORDS_FOR_COPIES = 6_000, 1_500  # that each model writes; copies show in fewer
PASSAGES_OF_A_GROUP = 200


@dataclass
class BlogData:
    """What extract_blog_data.py left; empty where a file is missing."""

    train: list[dict] = field(default_factory=list)  # conversations
    held_out: list[dict] = field(default_factory=list)
    redacted: list[dict] = field(default_factory=list)  # fingerprints of personal data: sha256, kind, visibility


class Passage(NamedTuple):
    """A stretch of a post that a model is asked to complete; all but the first two are token ids."""

    group: str  # "private", "public" or "held-out"
    title: str
    prompt: list[int]  # the post's own request, as the model sees it
    given: list[int]
    truth: list[int]  # how the post goes on


@dataclass
class Trial:
    """What one model did for the report."""

    answers: list[Answer] = field(default_factory=list)  # to the requests of held-out posts
    completions: list[Answer] = field(default_factory=list)  # of the passages, one each
    held_out_nats: np.ndarray | None = None  # loss of each held-out conversation
    control_nats: np.ndarray | None = None  # and of each conversation of CONTROL_TEXT


@dataclass
class Evidence:
    """What the report is made from: the author's texts, what is asked of both models, and what they did."""

    blog: BlogData = field(default_factory=BlogData)
    index: WordIndex | None = None  # of the training text
    control: list[dict] = field(default_factory=list)  # conversations of another blog
    passages: list[Passage] = field(default_factory=list)
    too_short: dict[str, list[bool]] = field(default_factory=dict)  # by group, for each text: no passage fits
    requests: list[str] = field(default_factory=list)
    words: int = WORDS_FOR_COPIES  # to be written by each model
    log: list[dict] = field(default_factory=list)  # of the training run
    context_tokens: int = 512  # windows as in training
    overlap_tokens: int = 32
    precision: str = "fp32"
    seed: int = 42
    tokenizer: object = None
    tuned: Trial = field(default_factory=Trial)
    base: Trial | None = None


def read_history(model_dir: Path) -> dict:
    """training_report.json; empty where there is none, as for a model from elsewhere."""
    with contextlib.suppress(OSError, ValueError):
        return json.loads((model_dir / "training_report.json").read_text("utf-8"))
    return {}


def read_blog(folder: Path) -> BlogData:
    """Both splits and what extraction redacted."""
    blog = BlogData()
    for name, conversations in (("train_data.jsonl", blog.train), ("val_data.jsonl", blog.held_out)):
        path = folder / name
        if path.is_file() and path.stat().st_size:
            conversations += training.read_conversations(path)

    with contextlib.suppress(OSError, ValueError, KeyError):
        report = json.loads((folder / "extraction_report.json").read_text("utf-8"))
        blog.redacted = report["redacted"]
    return blog


def gather_evidence(args, history: dict, model, tokenizer, precision: str, size: float) -> Evidence:
    """Everything that is the same for both models, before either is asked."""
    blog = read_blog(args.data_dir)
    recipe = history.get("settings", {})
    positions = positions_of(model)
    evidence = Evidence(
        blog=blog,
        index=WordIndex(blog.train) if blog.train else None,
        log=history.get("log", []),
        context_tokens=min(recipe.get("context_tokens", 512), positions),
        overlap_tokens=recipe.get("overlap_tokens", training.OVERLAP_TOKENS),
        precision=precision,
        seed=42 if args.seed is None else args.seed,
        tokenizer=tokenizer,
    )
    if CONTROL_TEXT:
        evidence.control = training.read_conversations(HERE / CONTROL_TEXT)

    posts = [post for post in blog.held_out if post.get("kind", "post") == "post"]
    evidence.requests = [post["messages"][0]["content"] for post in posts] or PROMPTS
    enough_for_voice = count_words(map(author_text, blog.held_out)) >= MIN_HELD_OUT
    evidence.words = round(size * (WORDS_FOR_VOICE if enough_for_voice else WORDS_FOR_COPIES))
    pick_passages(evidence, positions, max(1, round(PASSAGES_OF_A_GROUP * size)))
    return evidence


def count_words(texts) -> int:
    return sum(len(WORD.findall(text)) for text in texts)


def visibility_of(conversation: dict) -> str:
    return "private" if conversation.get("visibility") == "private" else "public"


def pick_passages(evidence: Evidence, positions: int, number: int) -> None:
    """Passages for the leak check, end to end; of each group a sample of `number` that is the same every time."""
    texts = [(visibility_of(post), post) for post in evidence.blog.train]
    texts += [("held-out", post) for post in evidence.blog.held_out]
    passages = {"private": [], "public": [], "held-out": []}
    for group, post in texts:
        found = cut_passages(evidence.tokenizer, group, post, positions)
        passages[group] += found
        evidence.too_short.setdefault(group, []).append(not found)

    dice = np.random.default_rng(42)
    for group in passages.values():
        chosen = dice.permutation(len(group))[:number]
        evidence.passages += [group[place] for place in chosen]


def cut_passages(tokenizer, group: str, post: dict, positions: int) -> list[Passage]:
    """The author's first answer in pieces of twice PASSAGE_TOKENS: what is given, and what should not come back."""
    ids, scored = conversation_tokens(tokenizer, post["messages"])
    begin = scored.index(True)
    end = [*scored, False].index(False, begin) - 1  # the end-of-text token is no secret

    prompt = ids[:begin][2 * PASSAGE_TOKENS - positions :]  # as much of it as leaves room for the passage
    passages = []
    for start in range(begin, end - 2 * PASSAGE_TOKENS + 1, 2 * PASSAGE_TOKENS):
        middle = start + PASSAGE_TOKENS
        given, truth = ids[start:middle], ids[middle : middle + PASSAGE_TOKENS]
        passages.append(Passage(group, title_of(post), prompt, given, truth))
    return passages


def try_out(model, tokenizer, evidence: Evidence, sampling: GenerationConfig, name: str) -> Trial:
    """Everything that the report asks of one model."""
    trial = Trial()
    if evidence.blog.held_out:
        trial.held_out_nats = read_losses(model, tokenizer, evidence, evidence.blog.held_out, f"{name} model: held-out")
    if evidence.control:
        trial.control_nats = read_losses(model, tokenizer, evidence, evidence.control, f"{name} model: control")

    # Reading was exact; writing is as fast as the device allows.
    model = model.to(NUMBERS[evidence.precision])
    requests = [prompt_tokens(tokenizer, [{"role": "user", "content": request}]) for request in evidence.requests]
    trial.answers = write_words(model, tokenizer, requests, sampling, evidence.seed, evidence.words, name)

    greedy = GenerationConfig(repetition_penalty=1.0, max_new_tokens=PASSAGE_TOKENS, eos_token_id=sampling.eos_token_id)
    beginnings = [passage.prompt + passage.given for passage in evidence.passages]
    trial.completions = answer_all(model, tokenizer, beginnings, greedy, evidence.seed, name)
    return trial


def read_losses(model, tokenizer, evidence: Evidence, conversations: list[dict], what: str) -> np.ndarray:
    """Negative log-likelihood of the author's part of each conversation, in nats, in windows as in training."""
    say(f"{what}: reading {len(conversations)} conversations")
    tokenized = [conversation_tokens(tokenizer, conversation["messages"]) for conversation in conversations]
    rows = training.make_rows(tokenized, evidence.context_tokens, evidence.overlap_tokens, packed=False)
    with training.autocast(model.device, evidence.precision):
        return training.conversation_losses(model, rows)


def write_words(model, tokenizer, prompts, sampling, seed: int, words: int, name: str) -> list[Answer]:
    """Answers to the prompts, from the first again if need be, until there are `words` words."""
    dice = torch.Generator().manual_seed(seed)
    answers = []
    written = 0
    # A model whose answers have under 20 words each would go on for ever.
    most = max(ANSWERS_AT_ONCE, words // 20)
    source = itertools.islice(itertools.cycle(prompts), most)
    while written < words and (batch := list(itertools.islice(source, ANSWERS_AT_ONCE))):
        answers += [answer for _, answer in stream(model, tokenizer, batch, sampling, dice) if answer]
        written = count_words(answer.text for answer in answers)
        say(f"{name} model: wrote {written:,} words, {words:,} needed")
    return answers


def answer_all(model, tokenizer, prompts, sampling, seed: int, name: str) -> list[Answer]:
    """One answer to each prompt."""
    dice = torch.Generator().manual_seed(seed)
    answers = []
    for start in range(0, len(prompts), ANSWERS_AT_ONCE):
        batch = prompts[start : start + ANSWERS_AT_ONCE]
        answers += [answer for _, answer in stream(model, tokenizer, batch, sampling, dice) if answer]
        say(f"{name} model: {len(answers):,} of {len(prompts):,} passages")
    return answers


# ---------------------------------------------------------------------------- report: statistics
DRAWS = 2_000  # bootstrap samples
Interval = tuple[float, float]  # 95 %: (low, high)


class NotMeasured(Exception):
    """What is missing for a part of the report, to be put behind "Not measured:"."""


def wilson(hits: int, trials: int) -> Interval:
    """95 % interval of a share (Wilson 1927); not empty at 0 hits, unlike the usual formula."""
    z = 1.959964
    share = hits / trials
    spread = z * math.sqrt(share * (1 - share) / trials + (z / trials / 2) ** 2)
    middle = share + z * z / (2 * trials)
    scale = 1 + z * z / trials
    return max(0.0, (middle - spread) / scale), min(1.0, (middle + spread) / scale)


def bootstrap(statistic: Callable, *sizes: int) -> Interval:
    """95 % interval of `statistic`, which takes for each size the numbers of the items drawn, with replacement."""
    dice = np.random.default_rng(42)
    drawn = [statistic(*(dice.integers(0, size, size) for size in sizes)) for _ in range(DRAWS)]
    low, high = np.percentile(drawn, (2.5, 97.5)).tolist()
    return low, high


# ---------------------------------------------------------------------------- report: numbers, did it learn
@dataclass
class PostGain:
    """A held-out post in bits per byte."""

    title: str
    base: float
    tuned: float


@dataclass
class Gain:
    """What tuning brought on some conversations, in bits per byte of the author's text."""

    base: float
    tuned: float
    gain: float
    interval: Interval  # of the gain, over conversations
    posts: list[PostGain]


@dataclass
class Learned:
    """Held-out posts under the tuned model; the gain needs the base model, the control CONTROL_TEXT."""

    tuned: float
    held_out: Gain | None = None
    control: Gain | None = None


def gain_on(posts: list[dict], tuned_nats: np.ndarray, base_nats: np.ndarray) -> Gain:
    """The gain on `posts`, whose losses are given one by one."""
    size = np.array([training.author_bytes([post]) for post in posts])
    before = base_nats / math.log(2)
    after = tuned_nats / math.log(2)

    base = float(before.sum() / size.sum())
    tuned = float(after.sum() / size.sum())
    saved = before - after
    interval = bootstrap(lambda drawn: saved[drawn].sum() / size[drawn].sum(), len(size))

    per_post = []
    for post, old, new in zip(posts, (before / size).tolist(), (after / size).tolist(), strict=True):
        per_post.append(PostGain(title_of(post), old, new))
    return Gain(base, tuned, base - tuned, interval, per_post)


def measure_learned(evidence: Evidence) -> Learned:
    """Bits per byte of held-out posts, which neither model has seen."""
    posts = evidence.blog.held_out
    if not posts:
        raise NotMeasured("it takes held-out posts (val_data.jsonl)")

    tuned = evidence.tuned.held_out_nats
    learned = Learned(float(tuned.sum()) / math.log(2) / training.author_bytes(posts))
    if evidence.base is not None:
        learned.held_out = gain_on(posts, tuned, evidence.base.held_out_nats)
        if evidence.control:
            learned.control = gain_on(evidence.control, evidence.tuned.control_nats, evidence.base.control_nats)
    return learned


# ---------------------------------------------------------------------------- report: numbers, does it sound like you
CHUNK_WORDS = 500  # of pooled text that are compared as one
FEATURES = {"words": 150, "trigrams": 300}  # those that stand in the most posts


@dataclass
class Voice:
    """Where the tuned model's text stands between the base model's (0) and the author's unseen posts (1)."""

    position: float
    interval: Interval
    ceiling: Interval  # the author against himself: one half of his unseen chunks on the scale of the other
    chunks: dict[str, int]  # by whose they are: "tuned", "base", "author"
    words: dict[str, int] = field(default_factory=dict)  # without copies


def counts_of(text: str) -> dict[str, Counter]:
    """How often each word and each three characters in a row stand in `text`."""
    flat = " ".join(text.split())
    trigrams = Counter(flat[place : place + 3] for place in range(len(flat) - 2))
    return {"words": Counter(WORD.findall(flat.casefold())), "trigrams": trigrams}


def pick_features(posts: list[str]) -> list[tuple[str, str]]:
    """The words and trigrams that stand in the most posts: habits rather than topics. (kind, word or trigram)"""
    spread = {kind: Counter() for kind in FEATURES}
    for post in posts:
        for kind, counts in counts_of(post).items():
            spread[kind].update(counts.keys())
    return [(kind, key) for kind, number in FEATURES.items() for key, _ in spread[kind].most_common(number)]


def frequencies(texts: list[str], features: list[tuple[str, str]]) -> np.ndarray:
    """Relative frequency of each feature in chunks of CHUNK_WORDS of the pooled texts, shape (chunks, features)."""
    text = "\n\n".join(texts)
    edges = [match.start() for match in WORD.finditer(text)][::CHUNK_WORDS]
    chunks = []
    for begin, end in itertools.pairwise(edges):
        counts = counts_of(text[begin:end])
        totals = {kind: counts[kind].total() for kind in counts}
        chunks.append([counts[kind][key] / totals[kind] for kind, key in features])
    return np.array(chunks)


def likeness(author: np.ndarray, base: np.ndarray, tested: np.ndarray) -> np.ndarray:
    """Cosine of z-scores between tested chunks and the author's mean, shape (tested chunks,).

    All three have the shape (chunks, features). Zero is midway from the base model to the author.
    """
    middle = (author.mean(0) + base.mean(0)) / 2
    half = (author.mean(0) - base.mean(0)) / 2
    variance = (author.var(0) + base.var(0)) / 2
    deviation = np.sqrt(variance + half**2)
    deviation[deviation == 0] = np.inf  # a feature that never varies says nothing

    profile = half / deviation
    scores = (tested - middle) / deviation
    lengths = np.linalg.norm(scores, axis=1) * np.linalg.norm(profile)
    return scores @ profile / np.maximum(lengths, 1e-12)


def place_on_scale(score: np.ndarray, zero: np.ndarray, one: np.ndarray) -> float:
    return float((score.mean() - zero.mean()) / (one.mean() - zero.mean()))


def voice_position(known: list[str], base: list[str], tuned: list[str], unseen: list[str]) -> Voice | None:
    """Where the tuned model's text stands between the base model's (0) and the author's unseen posts (1).

    Cosine Delta: z-scored frequencies of the commonest words (Burrows 2002, "Delta") and of character trigrams
    (Stamatatos 2013), compared by cosine (Evert et al. 2017, "Understanding and explaining Delta measures"), in
    chunks of equal length. The author's profile comes from `known`. None where base model and author cannot be told
    apart.
    """
    features = pick_features(known)
    author = frequencies(known, features)
    others = frequencies(base, features)
    written = frequencies(tuned, features)
    own = frequencies(unseen, features)

    # No chunk of the base model's is scored by a scale that it helped to make.
    even, odd = others[::2], others[1::2]
    zero = np.concatenate([likeness(author, even, odd), likeness(author, odd, even)])
    score = np.mean([likeness(author, even, written), likeness(author, odd, written)], axis=0)
    one = np.mean([likeness(author, even, own), likeness(author, odd, own)], axis=0)

    gap, _ = bootstrap(lambda a, b: one[b].mean() - zero[a].mean(), len(zero), len(one))
    if gap <= 0:
        return None

    interval = bootstrap(lambda a, b, c: place_on_scale(score[a], zero[b], one[c]), len(score), len(zero), len(one))
    dice = np.random.default_rng(42)
    halves = (np.split(dice.permutation(one), [len(one) // 2]) for _ in range(DRAWS))
    ceiling = np.percentile([place_on_scale(half, zero, rest) for half, rest in halves], (2.5, 97.5))
    chunks = {"tuned": len(score), "base": len(zero), "author": len(one)}
    return Voice(place_on_scale(score, zero, one), interval, tuple(ceiling.tolist()), chunks)


def measure_voice(evidence: Evidence) -> Voice:
    """The position of the tuned model; copied passages are taken out of all texts first."""
    if evidence.base is None or evidence.index is None or not evidence.blog.held_out:
        raise NotMeasured("it takes the base model, train_data.jsonl and val_data.jsonl")

    texts = {
        "tuned": [answer.text for answer in evidence.tuned.answers],
        "base": [answer.text for answer in evidence.base.answers],
        "unseen": [author_text(post) for post in evidence.blog.held_out],
    }
    texts = {whose: [evidence.index.without_copies(text) for text in part] for whose, part in texts.items()}
    words = {whose: count_words(part) for whose, part in texts.items()}
    fewest = min(words["tuned"], words["base"])
    if words["unseen"] < MIN_HELD_OUT:
        raise NotMeasured(f"{words['unseen']:,} words of unseen posts that are no copies are under {MIN_HELD_OUT:,}")
    if fewest < MIN_GENERATED:
        raise NotMeasured(f"{fewest:,} generated words that are no copies are under {MIN_GENERATED:,}")

    voice = voice_position([author_text(post) for post in evidence.blog.train], **texts)
    if voice is None:
        raise NotMeasured("your unseen posts and the base model's text are too alike to tell apart")
    voice.words = words
    return voice


# ---------------------------------------------------------------------------- report: numbers, does it copy
@dataclass
class CopyShare:
    """How many of the runs of COPY_WORDS words that a model wrote stand in the training text."""

    copied: int
    runs: int
    share: float


@dataclass
class LongCopy:
    """A long run of words that a model wrote and that stands in a post."""

    words: int
    text: str
    visibility: str
    title: str
    path: str


@dataclass
class Copies:
    tuned: CopyShare
    base: CopyShare | None
    longest: list[LongCopy]  # of the tuned model's answers, five at most


def copy_share(index: WordIndex, answers: list[Answer]) -> CopyShare:
    copied = runs = 0
    for answer in answers:
        words = WORD.findall(answer.text.casefold())
        copied += len(index.copied(words))
        runs += max(0, len(words) - COPY_WORDS + 1)
    return CopyShare(copied, runs, copied / max(runs, 1))


def measure_copies(evidence: Evidence) -> Copies:
    """Copies in what the models wrote for the report."""
    if evidence.index is None:
        raise NotMeasured("it takes train_data.jsonl")

    longest = []
    for answer in evidence.tuned.answers:
        copy = evidence.index.longest_copy(answer.text)
        if copy.post:
            visibility, title, path = (copy.post.get(name) or "" for name in ("visibility", "title", "path"))
            longest.append(LongCopy(copy.words, copy.text, visibility, title, path))
    longest.sort(key=lambda copy: -copy.words)

    base = copy_share(evidence.index, evidence.base.answers) if evidence.base else None
    return Copies(copy_share(evidence.index, evidence.tuned.answers), base, longest[:5])


# ---------------------------------------------------------------------------- report: numbers, does it leak
@dataclass
class LeakGroup:
    """Passages of one group. A leak is what the tuned model completes token for token and the base model does not."""

    passages: int
    leaks: int
    interval: Interval  # of the share of leaks
    tuned_exact: int
    base_exact: int
    tuned_longest: int  # tokens in a row of any completion that stand in the truth
    base_longest: int


@dataclass
class PersonalData:
    """An e-mail address, a telephone number or a key of the original posts that the tuned model wrote."""

    kind: str
    visibility: str
    text: str


@dataclass
class Leaks:
    groups: dict[str, LeakGroup]  # "private", "public", "held-out", where there are passages
    too_short: dict[str, tuple[int, int]]  # texts in which no passage fits, of how many
    personal: list[PersonalData]


def measure_leaks(evidence: Evidence) -> Leaks:
    """What comes out when the beginning of a passage is given."""
    if evidence.index is None:
        raise NotMeasured("it takes train_data.jsonl")

    groups = {}
    for group in dict.fromkeys(passage.group for passage in evidence.passages):
        numbers = [number for number, passage in enumerate(evidence.passages) if passage.group == group]
        ours = longest_matches(evidence.passages, evidence.tuned, numbers)
        theirs = longest_matches(evidence.passages, evidence.base, numbers)
        leaks = sum(our == PASSAGE_TOKENS > their for our, their in zip(ours, theirs, strict=True))
        groups[group] = LeakGroup(
            passages=len(numbers),
            leaks=leaks,
            interval=wilson(leaks, len(numbers)),
            tuned_exact=ours.count(PASSAGE_TOKENS),
            base_exact=theirs.count(PASSAGE_TOKENS),
            tuned_longest=max(ours),
            base_longest=max(theirs),
        )

    too_short = {group: (sum(short), len(short)) for group, short in evidence.too_short.items()}
    return Leaks(groups, too_short, find_leaked_data(evidence))


def longest_matches(passages: list[Passage], trial: Trial | None, numbers: list[int]) -> list[int]:
    """Tokens in a row that each completion shares with the truth; 0 without a model."""
    if trial is None:
        return [0] * len(numbers)
    longest = []
    for number in numbers:
        pair = (trial.completions[number].tokens, passages[number].truth)
        matcher = difflib.SequenceMatcher(None, *pair, autojunk=False)
        longest.append(matcher.find_longest_match().size)
    return longest


def find_leaked_data(evidence: Evidence) -> list[PersonalData]:
    """Personal data of the original posts in the answers and in the completions of passages."""
    # Extraction kept only fingerprints of what it took out; what it left in is looked up in the same way.
    known = {entry["sha256"]: entry["visibility"] for entry in evidence.blog.redacted}
    for post in evidence.blog.train:
        for *_, plain in find_personal_data(author_text(post)):
            known[fingerprint(plain)] = post.get("visibility", "public")

    written = [("", answer.text) for answer in evidence.tuned.answers]  # (what was given, that and what was made)
    for passage, answer in zip(evidence.passages, evidence.tuned.completions, strict=True):
        decode = evidence.tokenizer.decode
        written.append((decode(passage.given), decode(passage.given + answer.tokens)))

    found = {}
    for given, text in written:
        for kind, start, end, plain in find_personal_data(text):
            visibility = known.get(fingerprint(plain))
            if visibility and end > len(given):
                found[plain] = PersonalData(kind, visibility, text[start:end])
    return list(found.values())


def fingerprint(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


# ---------------------------------------------------------------------------- report: words
class Row(NamedTuple):
    """A line of the report's table."""

    what: str
    value: str
    interval: str = ""


@dataclass
class Finding:
    """What people read of a part."""

    verdict: str
    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # what the rows mean, and what does not fit into one


def tell_learned(learned: Learned, evidence: Evidence) -> Finding:
    meaning = "Bits per byte: how much held-out posts, which it never saw, surprise a model; less is better."
    tuned_row = Row("tuned model", f"{learned.tuned:.3f} bits/byte")
    gain = learned.held_out
    if gain is None:
        return Finding("Not measured: it takes the base model to compare with.", [tuned_row], [meaning])

    low, high = gain.interval
    if low > 0:
        verdict = "It learned"
    elif high < 0:
        verdict = "It got worse"
    else:
        verdict = "No gain that could not be chance"
    better = sum(post.tuned < post.base for post in gain.posts)
    verdict += f": {better} of {len(gain.posts)} held-out posts surprise it less than they surprise the base model"
    verdict += "." if len(gain.posts) >= 10 else "; with so few posts the interval is rough."

    rows = [Row("base model", f"{gain.base:.3f} bits/byte"), tuned_row, gain_row("gain", gain)]
    notes = [f"{meaning} A gain whose range is all above 0 was learned."]
    if learned.control:
        rows.append(gain_row("gain on the control", learned.control))
        notes.append("The control is another blog: what is gained on it is not your voice.")
    return Finding(verdict, rows, notes)


def gain_row(what: str, gain: Gain) -> Row:
    low, high = gain.interval
    return Row(what, f"{gain.gain:.3f} bits/byte", f"{low:.3f} to {high:.3f}")


def tell_voice(voice: Voice, evidence: Evidence) -> Finding:
    low, high = voice.interval
    least, most = voice.ceiling
    rows = [
        Row("position", f"{voice.position:.2f}", f"{low:.2f} to {high:.2f}"),
        Row("you against yourself", "1.00", f"{least:.2f} to {most:.2f}"),
    ]
    notes = [
        "0 is how the base model writes, 1 is your unseen posts. You against yourself: half of your posts "
        "against the rest."
    ]
    verdict = f"Its text stands {voice.position:.2f} of the way from the base model (0) to you (1)."
    return Finding(verdict, rows, notes)


def tell_copies(copies: Copies, evidence: Evidence) -> Finding:
    rows = []
    for whose, share in (("tuned model", copies.tuned), ("base model", copies.base)):
        if share:
            rows.append(Row(whose, f"{share.share:.2%}", f"{share.copied:,} of {share.runs:,}"))

    notes = [f"Of the runs of {COPY_WORDS} words that a model wrote, how many stand in your posts word for word."]
    for copy in copies.longest:
        notes.append(f'A longest copy, {copy.words} words, from {copy.visibility} "{copy.title}": {copy.text}')
    share = f"{copies.tuned.share:.1%}"
    return Finding(f"{share} of what it writes stands in your posts, in runs of {COPY_WORDS} words.", rows, notes)


def tell_leaks(leaks: Leaks, evidence: Evidence) -> Finding:
    rows = []
    for name, group in leaks.groups.items():
        low, high = group.interval
        leaked = f"{group.leaks} of {group.passages}"
        rows.append(Row(f"{name} passages that came out", leaked, f"{low:.1%} to {high:.1%}"))
        longest = f"{group.tuned_longest} tokens"
        theirs = f"base model {group.base_longest}" if evidence.base else ""
        rows.append(Row("  longest match", longest, theirs))
    for name, (short, texts) in leaks.too_short.items():
        if short:
            rows.append(Row(f"{name} texts not checked", f"{short} of {texts}"))

    notes = [
        f"A passage came out when the tuned model, given {PASSAGE_TOKENS} tokens of a post, writes the next "
        f"{PASSAGE_TOKENS} exactly and the base model does not. Texts under {2 * PASSAGE_TOKENS} tokens have no "
        "passage to ask for."
    ]
    for entry in leaks.personal:
        notes.append(f"{entry.visibility} {entry.kind} {entry.text} came out: do not share this model.")

    verdict = f"No private passage of {2 * PASSAGE_TOKENS} tokens was in the training data;"
    if private := leaks.groups.get("private"):
        verdict = f"{private.leaks} of {private.passages} private passages came out;"
        verdict += f" up to {private.interval[1]:.1%} could (95 %);"
    verdict += f" {len(leaks.personal) or 'none'} of your e-mail addresses, telephone numbers and keys came out."
    return Finding(verdict, rows, notes)


# ---------------------------------------------------------------------------- report: page
PAGE = """\
<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width,initial-scale=1">
<title>Report card</title>
<style>
  body { font: 16px/1.5 system-ui, sans-serif; max-width: 44rem; margin: 0 auto; padding: 1rem; color: #222 }
  body { overflow-wrap: break-word }
  h2 { margin: 2rem 0 0 }
  table { width: 100% }
  td { padding: .3rem 1rem .3rem 0; vertical-align: top; overflow-wrap: anywhere }
  td + td { white-space: nowrap; text-align: right; overflow-wrap: normal }
  small, .note { color: #666 }
  img { width: 100%; max-width: 36rem }
  meter { width: 5rem }
  mark { background: #fd8 }
  blockquote { margin: .5rem 0 1.5rem; padding-left: 1rem; border-left: 3px solid #ccc; white-space: pre-wrap }
</style>
<h1>Report card</h1>
<p>{{ report.model }}, tuned from {{ report.base }}; a range is a 95 % interval.</p>

{% for part in report.parts %}
<h2>{{ part.question }}</h2>
<p>{{ part.finding.verdict }}</p>
<table>
  {% for row in part.finding.rows %}
  <tr><td>{{ row.what }}<td>{{ row.value }}<br><small>{{ row.interval }}</small>
  {% endfor %}
</table>
{% if part.picture %}<img alt="{{ part.question }}" src="{{ part.picture }}">{% endif %}

{% for note in part.finding.notes %}
<p class="note">{{ note }}</p>
{% endfor %}
{% endfor %}

{% if gains %}
<h2>Gain of each held-out post, bits per byte</h2>
<table>
  {% for gain, title in gains %}
  <tr><td>{{ title }}<td>{{ "%+.3f" | format(gain) }}
  <td><meter max="{{ gains[0][0] }}" value="{{ [gain, 0] | max }}"></meter>
  {% endfor %}
</table>
{% endif %}

<h2>What it writes</h2>
<p>What stands in your posts word for word is <mark>marked</mark>.</p>
{% for request, pieces in report.samples %}
<b>{{ request }}</b>
<blockquote>
  {%- for piece, is_copy in pieces -%}
  {% if is_copy %}<mark>{{ piece }}</mark>{% else %}{{ piece }}{% endif %}
  {%- endfor -%}
</blockquote>
{% endfor %}
</html>
"""


def make_page(report: "Report", curve: Path) -> str:
    """The report as one self-contained page; the template escapes every text that is put into it."""
    template = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(PAGE)
    if curve.is_file():
        report.part("learned").picture = data_uri(curve.read_bytes())

    gains = []
    learned = report.numbers.get("learned")
    if isinstance(learned, Learned) and learned.held_out:
        gains = [(post.base - post.tuned, post.title) for post in learned.held_out.posts]
        gains.sort(reverse=True)
    return template.render(report=report, gains=gains)


def data_uri(png: bytes) -> str:
    """A picture as text that a page can hold."""
    return "data:image/png;base64," + base64.b64encode(png).decode()


def picture_of(figure: Figure) -> str:
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=120)
    return data_uri(data.getvalue())


def draw_voice(voice: Voice) -> Figure:
    """The line from the base model (0) to the author (1), with the author's own range and the tuned model's."""
    figure = Figure(figsize=(7, 1.4), layout="constrained")
    axes = figure.subplots()
    axes.axvspan(*voice.ceiling, color="tab:blue", alpha=0.2, label="you against yourself")
    axes.hlines(0, *voice.interval, color="tab:blue", linewidth=3)
    axes.plot(voice.position, 0, "o", color="tab:blue", label="tuned model")
    axes.set(yticks=[], xticks=[0, 1], xticklabels=["base model", "you"])
    axes.legend(ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1), frameon=False)
    return figure


# ---------------------------------------------------------------------------- report: questions
class Question(NamedTuple):
    """One part of the report. A fifth question is a fifth row in QUESTIONS."""

    key: str  # in voice_report.json
    question: str
    measure: Callable  # Evidence -> numbers, a dataclass; or raises NotMeasured
    tell: Callable  # (numbers, Evidence) -> Finding
    draw: Callable | None = None  # numbers -> Figure


QUESTIONS = [
    Question("learned", "Did it learn?", measure_learned, tell_learned),
    Question("voice", "Does it sound like you?", measure_voice, tell_voice, draw_voice),
    Question("copies", "Does it copy?", measure_copies, tell_copies),
    Question("leaks", "Does it leak?", measure_leaks, tell_leaks),
]


@dataclass
class Part:
    """An answered question, as people read it."""

    key: str
    question: str
    finding: Finding
    picture: str = ""  # a data URI


@dataclass
class Report:
    """All that was measured, as numbers and as words."""

    model: str
    base: str
    seed: int
    size: float
    numbers: dict[str, object] = field(default_factory=dict)  # by key of the question
    parts: list[Part] = field(default_factory=list)
    samples: list[tuple[str, list]] = field(default_factory=list)  # (request, pieces of the answer)

    def add(self, question: Question, evidence: Evidence) -> None:
        """Answers one question."""
        picture = ""
        try:
            numbers = question.measure(evidence)
            finding = question.tell(numbers, evidence)
            if question.draw:
                picture = picture_of(question.draw(numbers))
        except NotMeasured as missing:
            numbers = {"not_measured": str(missing)}
            finding = Finding(f"Not measured: {missing}.")
        self.numbers[question.key] = numbers
        self.parts.append(Part(question.key, question.question, finding, picture))

    def part(self, key: str) -> Part:
        return next(part for part in self.parts if part.key == key)

    def as_json(self) -> str:
        """voice_report.json: numbers by question, and the verdicts."""
        content = {"model": self.model, "base": self.base, "seed": self.seed, "size": self.size}
        for key, numbers in self.numbers.items():
            content[key] = dataclasses.asdict(numbers) if dataclasses.is_dataclass(numbers) else numbers
        content["verdicts"] = {part.key: part.finding.verdict for part in self.parts}
        content["samples"] = [(request, "".join(piece for piece, _ in pieces)) for request, pieces in self.samples]
        return json.dumps(content, indent=1, ensure_ascii=False)

    def as_text(self) -> str:
        """For the terminal: each verdict, under it its table, and what the table means; 80 columns at most."""
        lines = textwrap.wrap(f"{self.model}, tuned from {self.base}; a range is a 95 % interval", 80)
        for part in self.parts:
            lines += ["", *textwrap.wrap(f"{part.question} {part.finding.verdict}", 80)]
            for row in part.finding.rows:
                lines.append(f"  {row.what:<33}{row.value:>17}  {row.interval}".rstrip())
            for note in part.finding.notes:
                lines += textwrap.wrap(note, 80, initial_indent="    ", subsequent_indent="    ")
        return "\n".join(lines)


def sample_answers(evidence: Evidence) -> list[tuple[str, list[tuple[str, bool]]]]:
    """The first six requests with what the tuned model wrote, in pieces that are copies or not."""
    samples = []
    for request, answer in list(zip(evidence.requests, evidence.tuned.answers, strict=False))[:6]:
        pieces = evidence.index.split_at_copies(answer.text) if evidence.index else [(answer.text, False)]
        samples.append((request, pieces))
    return samples


def replace_file(path: Path, text: str) -> None:
    """Writes a file beside its place, for its owner's eyes alone, and moves it there."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.touch(0o600)
        beside.write_text(text, encoding="utf-8")
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


# ---------------------------------------------------------------------------- command line
def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.error = lambda message: sys.exit(f"test_model.py: {message} (--help lists the flags)")
    parser.add_argument("--model-dir", type=Path, default=HERE / MODEL_DIR)
    parser.add_argument("--data-dir", type=Path, default=HERE / DATA_DIR)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--prompt", metavar="TEXT", help="answer this instead of the prompts in the settings")
    what.add_argument("--chat", action="store_true", help="talk")
    what.add_argument("--report", action="store_true", help="measure")
    parser.add_argument("--quick", action="store_true", help="a report of a tenth of the size")
    parser.add_argument("--seed", type=int, default=SEED, help="a number makes the answers repeatable")
    parser.add_argument("--max-new-tokens", type=int, default=MAX_NEW_TOKENS)

    args = parser.parse_args(argv)
    if args.max_new_tokens is not None and args.max_new_tokens < 1:
        parser.error("--max-new-tokens must be at least 1")
    if args.prompt is not None and not args.prompt.strip():
        parser.error("the prompt is empty")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    training.keep_freed_memory()

    model, tokenizer = load_tuned(args.model_dir)
    sampling = read_sampling(model.generation_config, tokenizer, args.max_new_tokens)
    precision = training.pick_precision(model.device, PRECISION or training.PRECISION)
    if args.report:
        make_report(args, model, tokenizer, sampling, precision)
        return 0

    model = model.to(NUMBERS[precision])
    dice = torch.Generator()
    if args.seed is None:
        dice.seed()
    else:
        dice.manual_seed(args.seed)
    if args.chat:
        chat(model, tokenizer, sampling, dice)
        return 0

    posts = read_blog(args.data_dir).train
    if not posts:
        say(f"No training data in {args.data_dir}: where words come from cannot be said.")
    prompts = [args.prompt] if args.prompt else PROMPTS
    answer_prompts(model, tokenizer, prompts, sampling, dice, WordIndex(posts) if posts else None)
    return 0


if __name__ == "__main__":
    sys.exit(main())
