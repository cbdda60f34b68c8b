"""Let the tuned model write, talk to it, and measure it: does it sound like you, does it give private posts away?

    python test_model.py                    answers the prompts in the settings
    python test_model.py --prompt "TEXT"    answers this one
    python test_model.py --chat             a conversation in the terminal
    python test_model.py --quiz             two texts: which one did you write? Answer 1 or 2
    python test_model.py --report           measures, and writes voice_report.json and voice_report.html
    python test_model.py --report --quick   a tenth of the words and public posts, with wide ranges

Reads blog-model-final/, data/ (what it was trained on, and the held-out posts) and, for the report, the base model and
sample/strangers/strangers.npz. The two report files go into blog-model-final/, readable by their owner alone: the page
quotes private posts.

Each line is a section below; they stand in the order in which the run needs them.

    the run                 one function a mode: answer_prompts, chat, quiz, make_report
    loading                 load_tuned, load_base        model folders, checked to be whole
    sampling                next_token_chances, Batch    which token comes next; many prompts at once
                            generate, stream             tokens, then pieces of text as they come
    where words come from   WordIndex                    runs of words that stand in the training data
    chatting                Chat                         the commands, and what the model still remembers
    quiz                    quiz_pairs                   an unseen post and an answer, equally long

    The report has four layers; a question of it has one function in each of the last three, a picture is optional.
    report: evidence        Evidence, try_out            what is asked of both models, and what they did
    report: numbers         measure_...                  what voice_report.json holds
    report: words           tell_...                     verdict, rows and notes, for the terminal and the page
    report: page            PAGE, draw_...               the same with pictures and samples
    report: questions       QUESTIONS                    the table that ties the layers together
    settings, checked       SETTINGS, check_settings     what each has to be, also as a flag or in the model's own file
    command line            main, as_command             flags, which mode they choose; streams that may be closed
"""

from __future__ import annotations

import os
import signal

# First of all, because what is imported below takes seconds.
if __name__ == "__main__":
    STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # Ctrl-C, a request to end, a terminal that is closed

    def stop(number, frame) -> None:
        """Ends the program with one sentence. Nothing has to be tidied up: a file is whole at any moment."""
        try:
            os.write(2, b"\nStopped.\n")
        finally:
            os._exit(1)

    # A closed stdin, stdout or stderr leaves its number to the next file that is opened: what is said would go there.
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(number)

    for number in STOPS:
        # What nohup keeps away stays away.
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, stop)

import argparse
import base64
import contextlib
import dataclasses
import errno
import inspect
import io
import itertools
import json
import math
import reprlib
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import transformers
from jinja2 import Environment
from matplotlib.figure import Figure
from transformers import GenerationConfig

import extract_blog_data as extraction
import train_model as training
from extract_blog_data import REPLY_CONTEXT, TITLE_REQUESTS, WORD, find_personal_data
from train_model import CannotLoad, break_control_tokens, brief, conversation_tokens, render, say

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
REPETITION_PENALTY = None  # 1 = none; 1.05 keeps small models from going in circles, 1.2 costs voice, 1.3 garbles
SEED = None  # a number gives the same answers every time; None gives others, and 42 in the report
PRECISION = None  # "auto", "bf16", "fp16" or "fp32" to write with; None: what the model was trained in

REPORT_SIZE = 1.0  # 1 x 6,000 words from each model, 1 x 60 public posts read for leaks; 0.5: half of it, wider ranges
BASE_MODEL = ""  # a name or folder; "" = the one that training_report.json names
NOT_STRANGERS = []  # names in sample/strangers/README.md that are no strangers: yourself, a blog that you copied from
OTHER_BLOGS = []  # data folders of other bloggers that extract_blog_data.py wrote; the only way in other languages


# ---------------------------------------------------------------------------- the run
def answer_prompts(
    model, tokenizer, texts: list[str], sampling: GenerationConfig, dice: torch.Generator, index: WordIndex | None
) -> None:
    """Prints an answer to each prompt and, given an index, where its longest run of words comes from."""
    prompts = [request_tokens(tokenizer, text) for text in texts]
    # All are looked at before the first is answered, which takes time.
    longest = max(map(len, prompts))
    room = positions_of(model)
    if longest >= room:
        sys.exit(f"The prompt has {longest:,} tokens and the model takes {room:,}, answer included: shorten it.")

    began = time.monotonic()
    answers = []
    show(f"> {texts[0]}\n")
    for piece, answer in stream(model, tokenizer, prompts, sampling, dice):
        show(piece, end="")
        if answer is None:
            continue

        answers.append(answer)
        show()
        if index:
            show(tell_origin(index.longest_copy(answer.text)))
        is_last = len(answers) == len(texts)
        show("" if is_last else f"\n> {texts[len(answers)]}\n")

    seconds = time.monotonic() - began
    tokens = sum(len(answer.tokens) for answer in answers)
    ended = sum(answer.ended for answer in answers)
    say(f"{ended} of {len(answers)} answers ended by themselves; {tokens:,} tokens, {tokens / seconds:.1f} a second.")


def chat(model, tokenizer, sampling: GenerationConfig, dice: torch.Generator, find_base: Callable) -> None:
    """A conversation in the terminal, or with lines from a pipe; Ctrl-C ends the answer, not the program.

    `find_base` loads the base model, or gives None; it is called when somebody first asks for it.
    """
    talk = Chat()
    base = None
    # Where the answer alone could fill all positions, half of them stay for what was said.
    positions = positions_of(model)
    room = max(positions - sampling.max_new_tokens, positions // 2)

    say(COMMANDS)
    while (line := read_or_clear_line()) != "/quit":
        if not talk.take(line):
            continue

        writer = model
        if talk.asks_base:
            base = base or find_base()
            if base is None:
                continue
            writer = base

        prompt = talk.prompt(tokenizer, room)
        if not prompt:
            say(f"That is longer than the {room:,} tokens there is room for.")
            talk.take_back()
            continue

        # Also half an answer is remembered: the user has read it.
        parts = []
        with contextlib.suppress(KeyboardInterrupt):
            for piece, _ in stream(writer, tokenizer, [prompt], sampling, dice):
                parts.append(piece)
                show(piece, end="")
        show()
        talk.remember("".join(parts))


def quiz(model, tokenizer, sampling: GenerationConfig, dice: torch.Generator, blog: BlogData) -> None:
    """Pairs of openings, one of an unseen post and one of the model's answer to the same request: which is yours?"""
    say(f"Which one did you write? 1 or 2, /quit ends. {QUIZ_PAIRS} pairs at most; no post that it was trained on.")
    shown = 0
    guesses = []  # whether each was right
    # Ctrl-C ends it too, also while the next pair is being written: what was answered counts.
    with contextlib.suppress(KeyboardInterrupt):
        for own, other in quiz_pairs(model, tokenizer, sampling, dice, blog):
            shown += 1
            is_right = ask_which(own, other, dice)
            if is_right is None:
                break
            guesses.append(is_right)
    show(quiz_result(guesses, shown))


def make_report(args: argparse.Namespace, model, tokenizer, sampling: GenerationConfig, precision: str) -> None:
    """Asks both models the same, one after the other; prints and writes what came of it."""
    size = REPORT_SIZE / 10 if args.quick else REPORT_SIZE
    history = read_history(args.model_dir)
    device = model.device

    for path in report_files(args.model_dir):
        reason = why_unwritable(path)
        if reason:
            say(f"{path} cannot be written ({reason}): the report will be printed all the same.")

    # What is asked is settled before the first model is, so that the answers of both compare.
    evidence = gather_evidence(args, history, model, tokenizer, precision, size)
    evidence.tuned = try_out(model, tokenizer, evidence, sampling, "tuned")
    model.to("cpu")  # a card need not hold both models
    base = load_base_of(args.model_dir, device, precision)
    if base is not None:
        evidence.base = try_out(base, tokenizer, evidence, sampling, "base")

    base_name = base_name_of(args.model_dir) or "an unknown model"
    report = Report(str(args.model_dir), base_name, evidence.seed, size)
    for question in QUESTIONS:
        report.add(question, evidence)
    report.samples = sample_answers(evidence)

    # Both files before the terminal, whose window may be gone by the time it is printed.
    failures = write_report(report, args.model_dir)
    show(report.as_text())
    if failures:
        sys.exit(f"Cannot write {' and '.join(failures)}: what was measured is printed; mend that and run it again.")


# ---------------------------------------------------------------------------- loading
NUMBERS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}  # of the weights, to write with
USUAL_POSITIONS = 2048  # of a model that has no limit (Mamba), so that an answer ends at all


def load_for_writing(folder: str | Path, held_in: str = "fp32", device: torch.device | None = None):
    """A causal model in float32; asks no hub; raises CannotLoad if it is not there as a whole.

    With `held_in` "fp16" or "bf16" its matrices are in that precision, as those that adapters were trained beside: it
    may be too large for float32. Such a model runs under autocast alone, until it is in half precision as a whole.
    """
    model = training.load_model(folder, only_local=True)
    device = device or choose_device(cpu_wanted=False)
    training.hold_in_half(model, held_in)
    return model.to(device).eval()


def check_place(folder: Path) -> None:
    """Ends the program where there is no model in the folder."""
    if (folder / "config.json").is_file():
        return

    # train_model.py may have been killed between two renames. It alone moves folders.
    previous = training.Places(folder.resolve()).previous
    if (previous / "config.json").is_file():
        sys.exit(
            f"{folder} is half replaced: run train_model.py again, which ends that at once, or read the model of "
            f"before with --model-dir {previous}."
        )
    sys.exit(f"There is no model in {folder}: run train_model.py first.")


def load_tuned(folder: Path, device: torch.device | None = None, held_in: str = "fp32"):
    """(model, tokenizer) of a folder that train_model.py wrote; ends the program if it is not whole."""
    check_place(folder)
    try:
        vocabulary = training.vocabulary_of(training.load_config(folder, only_local=True))
        tokenizer = training.load_tokenizer(folder, vocabulary, only_local=True, is_tuned=True)
        return load_for_writing(folder, held_in, device), tokenizer
    except CannotLoad as error:
        sys.exit(f"{folder} holds half a model ({brief(error)}): run train_model.py again.")


@torch.inference_mode()
def fits_float16(model, tokenizer) -> bool:
    """Whether what its layers take and hand on, asked PROMPTS[0], stays well below float16's end at 65,504.

    In some models (Gemma 3) it does not; in float16 they would then say nothing at all. In training, sums are float32.
    """
    limit = torch.finfo(torch.float16).max / 2
    fits = []

    def look(layer, inputs, output) -> None:
        outputs = output if isinstance(output, tuple) else (output,)
        for value in (*inputs, *outputs):
            if torch.is_tensor(value) and value.is_floating_point():
                fits.append(bool(value.abs().max() < limit))

    hooks = [layer.register_forward_hook(look) for layer in model.modules()]
    ids = request_tokens(tokenizer, PROMPTS[0])
    # Under autocast, because a model whose matrices alone are held in half precision runs in no other way.
    with training.autocast(model.device, "fp16"):
        model(input_ids=torch.tensor([ids], device=model.device))
    for hook in hooks:
        hook.remove()
    return all(fits)


def read_history(model_dir: Path) -> dict:
    """training_report.json; empty where there is none, as for a model from elsewhere."""
    return training.read_json_object(model_dir / "training_report.json")


def name_in(content: dict, key: str) -> str:
    """A text within an object of JSON; "" where there is none."""
    value = content.get(key)
    return value if isinstance(value, str) else ""


def section_of(content: dict, name: str) -> dict:
    """An object within an object of JSON; empty where there is none."""
    section = content.get(name)
    return section if isinstance(section, dict) else {}


def held_in(model_dir: Path, precision: str) -> str:
    """What both models are held in while their losses are read: `precision` if adapters were trained, else float32."""
    is_adapted = bool(section_of(read_history(model_dir), "plan").get("lora_rank"))
    return precision if is_adapted else "fp32"


def base_name_of(model_dir: Path) -> str:
    """The name or folder of the base model, "" where nobody knows it."""
    return BASE_MODEL or name_in(section_of(read_history(model_dir), "settings"), "base_model")


def load_base_of(model_dir: Path, device: torch.device, precision: str):
    """The base model of that folder, or None where it is not at hand or no use, which is said."""
    name = base_name_of(model_dir)
    if not name:
        say("Nobody knows the base model (BASE_MODEL can name it): what needs it is left out.")
        return None

    # A relative folder is meant from where training ran, from beside this script, or from the tuned model.
    folders = [path for path in (Path(name), HERE / name, model_dir.resolve() / name) if path.is_dir()]
    try:
        place = str(folders[0]) if folders else name
        return load_for_writing(place, held_in(model_dir, precision), device)
    except CannotLoad as error:
        say(f"The base model {name} is not at hand ({brief(error)}): what needs it is left out.")
        return None


def wanted_precision(model_dir: Path) -> str:
    """To write with: the setting, or what the model was trained in."""
    planned = section_of(read_history(model_dir), "plan").get("precision")
    trained = planned if planned in training.PRECISIONS else training.PRECISION
    return PRECISION or trained


def positions_of(model) -> int:
    """Tokens that prompt and answer may have together."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or USUAL_POSITIONS


# ---------------------------------------------------------------------------- sampling
class Answer(NamedTuple):
    """What a model wrote to one prompt."""

    text: str
    tokens: list[int]
    ended: bool  # by itself, at an end-of-text token


# Names in generation_config.json, and what transformers takes where the file says nothing.
FILE_SETTINGS = {"temperature": 1.0, "top_k": 50, "top_p": 1.0, "repetition_penalty": 1.0, "max_new_tokens": 200}
LEAST_TEMPERATURE = 1e-6  # below it a division by it is too large for float32
# Settings of the file that transformers reads for itself may be of the wrong kind too.
UNREADABLE = (OSError, ValueError, TypeError, AttributeError, KeyError)


def check_generation_config(path: Path) -> None:
    """Ends the program where the model's own settings are none to write with; transformers would only warn."""
    if not path.is_file():
        return

    remedy = "run train_model.py again, or correct the file"
    if training.damage_of(path):
        sys.exit(f"{path} holds no settings: {remedy}.")
    content = training.read_json_object(path)
    check_settings({name: content.get(name) for name in FILE_SETTINGS}, str(path))

    ends = content.get("eos_token_id")
    listed = ends if isinstance(ends, list) else [ends]
    if ends is not None and not all(is_whole(end) and end >= 0 for end in listed):
        sys.exit(f"eos_token_id in {path} is {reprlib.repr(ends)}: it has to be a token's number, or a list of such.")

    try:
        GenerationConfig.from_pretrained(path.parent, local_files_only=True)
    except UNREADABLE as error:
        sys.exit(f"transformers cannot use {path} ({brief(error)}): {remedy}.")


def read_sampling(config: GenerationConfig, tokenizer, max_new_tokens: int | None) -> GenerationConfig:
    """The model's generation_config.json under the settings above; what neither says is as in transformers.

    Changes `config` and returns it.
    """
    settings = {
        "temperature": TEMPERATURE,
        "top_k": TOP_K,
        "top_p": TOP_P,
        "repetition_penalty": REPETITION_PENALTY,
        "max_new_tokens": max_new_tokens,
    }
    for name, usual in FILE_SETTINGS.items():
        ours = settings[name]
        if ours is not None:
            setattr(config, name, ours)
        elif getattr(config, name) is None:
            setattr(config, name, usual)

    # Whoever sets a temperature wants to draw, whatever the file says.
    if TEMPERATURE is not None:
        config.do_sample = True
    if config.temperature < LEAST_TEMPERATURE:
        config.do_sample = False

    # One token, several or none; from here on always a list.
    ends = tokenizer.eos_token_id if config.eos_token_id is None else config.eos_token_id
    config.eos_token_id = [ends] if isinstance(ends, int) else ends or []
    return config


def next_token_chances(
    logits: torch.Tensor, seen: torch.Tensor, sampling: GenerationConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """(tokens, chances), both of shape (rows, kept): what may come next, the likeliest first; a row's sum is 1.

    `logits` and `seen` (whether a token stood before) have the shape (rows, vocabulary). In transformers' order:
    repetition penalty (Keskar et al. 2019), temperature, top-k, top-p (Holtzman et al. 2020). Answers are drawn from
    this, and the leak check reads from it, so that the two cannot drift apart.
    """
    penalty = sampling.repetition_penalty
    if penalty != 1:
        # Either way the token becomes less likely: a negative logit falls when it is multiplied.
        punished = torch.where(logits > 0, logits / penalty, logits * penalty)
        logits = torch.where(seen, punished, logits)

    if not sampling.do_sample:
        tokens = logits.argmax(-1, keepdim=True)
        return tokens, torch.ones_like(tokens, dtype=torch.float32)

    vocabulary = logits.shape[-1]
    kept = min(sampling.top_k or vocabulary, vocabulary)  # 0: all
    best = (logits / sampling.temperature).topk(kept)
    chances = best.values.softmax(-1)

    # A token stays as long as those before it have not reached top_p together, so the first always does. At 1 none
    # goes: over 50,000 tokens the sum is rounded up to 1 too early, and the leak check would say "never".
    if sampling.top_p < 1:
        before = chances.cumsum(-1) - chances
        chances[before >= sampling.top_p] = 0
    return best.indices, chances / chances.sum(-1, keepdim=True)


def sample_next_token(
    logits: torch.Tensor, seen: torch.Tensor, sampling: GenerationConfig, dice: torch.Generator
) -> torch.Tensor:
    """The next token of each row, shape (rows,); `logits` and `seen` have the shape (rows, vocabulary)."""
    tokens, chances = next_token_chances(logits, seen, sampling)
    if not sampling.do_sample:
        return tokens[:, 0]

    # Drawn on the CPU, so that a seed means the same on every device.
    place = torch.multinomial(chances.cpu(), 1, generator=dice).to(tokens.device)
    return tokens.gather(1, place)[:, 0]


class Batch:
    """Prompts that are answered together: one row each, padded on the left. A row leaves when its answer is over.

    ids (rows, tokens not read yet), mask (rows, all tokens so far; 0 is padding), seen (rows, vocabulary).
    """

    def __init__(self, model, prompts: list[list[int]]):
        self.model = model
        self.takes_positions = "position_ids" in inspect.signature(model.forward).parameters
        self.numbers = list(range(len(prompts)))  # of the prompts, by row
        self.cache = None  # what the layers remember of the tokens read so far

        longest = max(map(len, prompts))
        ids = []
        mask = []
        for prompt in prompts:
            padding = [0] * (longest - len(prompt))
            ids.append(padding + prompt)
            mask.append(padding + [1] * len(prompt))
        self.ids = self.tensor(ids)
        self.mask = self.tensor(mask)

        # For the repetition penalty: the tokens of the row itself. transformers' own processor looks at all ids,
        # padding included, and GPT-2 pads with its end of text: short prompts would be punished for stopping.
        vocabulary = model.config.get_text_config().vocab_size
        self.seen = torch.zeros(len(prompts), vocabulary, dtype=torch.bool, device=model.device)
        for row, prompt in enumerate(prompts):
            self.seen[row, prompt] = True

    def tensor(self, values: list) -> torch.Tensor:
        return torch.tensor(values, device=self.model.device)

    def next_logits(self) -> torch.Tensor:
        """Logits of each row's next token, in float32, shape (rows, vocabulary)."""
        inputs = {"input_ids": self.ids, "attention_mask": self.mask, "past_key_values": self.cache}
        if self.takes_positions:
            # Counted from each row's own beginning; what padding gets does not matter, it is masked.
            positions = (self.mask.cumsum(1) - 1).clamp(min=0)
            unread = self.ids.shape[1]
            inputs["position_ids"] = positions[:, -unread:]

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

        # A row whose answer is over would cost as much as the others at every further step.
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

        # An answer that is over lets the next one be shown, which may be over as well.
        while current < len(prompts):
            made = tokens[current]
            text = tokenizer.decode(made, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            if not over[current]:
                text = text.strip().rstrip("\ufffd")  # a character of which some bytes are still to come
                yield text[len(shown) :], None
                shown = text
                break

            ended = made[-1] in sampling.eos_token_id
            answer = Answer(text.strip(), made, ended)
            yield answer.text[len(shown) :], answer
            shown = ""
            current += 1


def whole_answers(
    model, tokenizer, prompts: list[list[int]], sampling: GenerationConfig, dice: torch.Generator
) -> Iterator[Answer]:
    """What `stream` gives, without the pieces."""
    for _, answer in stream(model, tokenizer, prompts, sampling, dice):
        if answer is not None:
            yield answer


def request_tokens(tokenizer, text: str) -> list[int]:
    """Token ids of a conversation in which the user has said `text`, and nothing else was said."""
    return prompt_tokens(tokenizer, [{"role": "user", "content": text}])


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
        # Most text is no copy at all, which this says at once.
        self.runs = set()  # hashes of all runs of COPY_WORDS words
        texts = []
        for conversation in conversations:
            words = folded_words(author_text(conversation))
            texts.append(f" {' '.join(words)} ")
            self.runs.update(hashes_of_runs(words))
        self.text = "\n".join(texts)  # one conversation a line, so that a run ends with its post

    def copied(self, words: list[str]) -> list[int]:
        """Where in `words` a run of COPY_WORDS begins that stands in the training text."""
        return [start for start, run in enumerate(hashes_of_runs(words)) if run in self.runs]

    def longest_copy(self, text: str) -> Copy:
        """The longest run of words of `text` that stands in the training text; the first of equals."""
        words = folded_words(text)

        # Only a run that is longer than the longest so far matters, so `length` never shrinks: one look a word or two.
        begin = 0  # in `words`
        length = 0
        place = -1  # in self.text
        for start in range(len(words)):
            while start + length < len(words):
                longer = " ".join(words[start : start + length + 1])
                found = self.text.find(f" {longer} ")
                if found < 0:
                    break
                begin = start
                length += 1
                place = found

        if not length:
            return Copy(0, "", None)
        spans = word_spans(text)
        first, _ = spans[begin]
        _, last = spans[begin + length - 1]
        post = self.posts[self.text.count("\n", 0, place)] if length >= COPY_WORDS else None
        return Copy(length, text[first:last], post)

    def split_at_copies(self, text: str) -> list[tuple[str, bool]]:
        """The text in pieces: (piece, whether it is a copy of COPY_WORDS words or more)."""
        spans = word_spans(text)

        # Runs that overlap, or begin where the last one ends, are one copy.
        copies = []  # (begin, end) in characters
        for start in self.copied(folded_words(text)):
            begin, _ = spans[start]
            _, end = spans[start + COPY_WORDS - 1]
            if copies and begin <= copies[-1][1]:
                begin, _ = copies.pop()
            copies.append((begin, end))

        pieces = []
        done = 0
        for begin, end in copies:
            pieces.append((text[done:begin], False))
            pieces.append((text[begin:end], True))
            done = end
        return [*pieces, (text[done:], False)]

    def without_copies(self, text: str) -> str:
        return "".join(piece for piece, is_copy in self.split_at_copies(text) if not is_copy)


def folded_words(text: str) -> list[str]:
    """The words of a text without upper case, one for each of `word_spans`.

    Found before the case goes: without it some letters become two signs, of which one ends the word (the Turkish
    I with a dot, some Greek vowels), and there would be more words than spans.
    """
    return [word.casefold() for word in WORD.findall(text)]


def word_spans(text: str) -> list[tuple[int, int]]:
    """(begin, end) of each word, in characters."""
    return [match.span() for match in WORD.finditer(text)]


def hashes_of_runs(words: list[str]) -> Iterator[int]:
    """A number for each run of COPY_WORDS words, in order; a set of numbers is smaller than one of words."""
    for start in range(len(words) - COPY_WORDS + 1):
        run = words[start : start + COPY_WORDS]
        yield hash(tuple(run))


def count_words(texts: Iterable[str]) -> int:
    return sum(len(WORD.findall(text)) for text in texts)


def author_text(conversation: dict) -> str:
    """What the author says in it."""
    said = [turn["content"] for turn in conversation["messages"] if turn["role"] == "assistant"]
    return "\n\n".join(said)


def author_texts(conversations: list[dict]) -> list[str]:
    return [author_text(conversation) for conversation in conversations]


def title_of(conversation: dict) -> str:
    return name_in(conversation, "title") or "untitled"


def path_of(conversation: dict) -> str:
    return name_in(conversation, "path")


def line_of(conversation: dict) -> int | None:
    """Its line in the file that it was read from, from 1."""
    return conversation.get(LINE)


def tell_origin(copy: Copy) -> str:
    """The line under an answer."""
    source = ""
    if copy.post:
        post = copy.post
        source = f', from the {visibility_of(post)} post "{title_of(post)}" {path_of(post)}'
    return f"[longest run of words from the training data: {copy.words}{source}]"


# ---------------------------------------------------------------------------- chatting
COMMANDS = (
    "/post TITLE writes a post, /continue TEXT goes on from your beginning, /base lets the base model answer the same, "
    "/again, /clear, /quit"
)


def read_line() -> str:
    """The next line that is typed; "/quit" where there is none, or nothing that could be read from."""
    try:
        is_typed = sys.stdin is not None and sys.stdin.isatty()
        return input("\n> " if is_typed else "").strip()
    except (EOFError, OSError, RuntimeError, ValueError):
        return "/quit"


def read_or_clear_line() -> str:
    """The same, where Ctrl-C makes it an empty line."""
    try:
        return read_line()
    except KeyboardInterrupt:
        return ""


@dataclass
class Chat:
    """What has been said, and what is to be answered next."""

    history: list[dict] = field(default_factory=list)
    beginning: str = ""  # text of the user's to go on from, without the template; "" in a conversation
    asks_base: bool = False  # the base model is to answer, and nothing of it is remembered

    def take(self, line: str) -> bool:
        """Takes in a line of the user's: a command or something said; returns whether an answer is due."""
        command, _, rest = line.partition(" ")
        self.asks_base = command == "/base"
        if not line:
            return False
        if not line.startswith("/"):
            return self.ask(line)

        if command == "/post" and rest:
            # Posts were trained on as the first thing that is said.
            self.history.clear()
            return self.ask(TITLE_REQUESTS[0].format(rest))
        if command == "/continue" and rest:
            self.beginning = rest
            return True
        if command in ("/again", "/base"):
            return self.again()
        if command == "/clear":
            self.history.clear()
            self.beginning = ""
            return False

        # Unknown, or a command without the text that it needs.
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
        if self.history[-1]["role"] == "assistant" and not self.asks_base:
            self.history.pop()
        return True

    def remember(self, answer: str) -> None:
        """Keeps an answer; what goes on from a beginning, or comes from the base model, is no part of the talk."""
        if not self.beginning and not self.asks_base:
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

        history = self.history
        if self.asks_base and history[-1]["role"] == "assistant":
            history = history[:-1]  # the question that was answered last

        # The data has no conversation that begins with an answer, so the model has seen none.
        for first, turn in enumerate(history):
            if turn["role"] == "user":
                ids = prompt_tokens(tokenizer, history[first:])
                if len(ids) <= room:
                    return ids
        return []


# ---------------------------------------------------------------------------- quiz
QUIZ_PAIRS = 20  # at most; 13 right of 20 still is 43 to 82 %
QUIZ_WORDS = (15, 60)  # of an opening: fewer tell nothing, more take long to read


def quiz_pairs(
    model, tokenizer, sampling: GenerationConfig, dice: torch.Generator, blog: BlogData
) -> Iterator[tuple[str, str]]:
    """(opening of an unseen post, opening of an answer to the same request), of the same length in words."""
    posts = posts_of(blog.held_out)
    order = torch.randperm(len(posts), generator=dice).tolist()
    posts = [posts[place] for place in order[:QUIZ_PAIRS]]
    if not posts:
        return

    fewest, most = QUIZ_WORDS
    index = WordIndex(blog.train)
    prompts = [prompt_tokens(tokenizer, post["messages"][:1]) for post in posts]
    answers = whole_answers(model, tokenizer, prompts, sampling, dice)
    for post, answer in zip(posts, answers, strict=True):
        own = author_text(post)
        # Of one length, or the longer one would be the author's more often than not.
        shorter = min(count_words([own]), count_words([answer.text]))
        words = min(shorter, most)
        # A copy would show a post of the training data.
        if words >= fewest and not index.longest_copy(answer.text).post:
            yield opening(own, words), opening(answer.text, words)


def posts_of(conversations: list[dict]) -> list[dict]:
    """Those of them that are posts and no replies to comments."""
    return [entry for entry in conversations if entry.get("kind", "post") == "post"]


def opening(text: str, words: int) -> str:
    """The first words of a text, as they stand there."""
    last = next(itertools.islice(WORD.finditer(text), words - 1, None))
    return text[: last.end()]


def ask_which(own: str, other: str, dice: torch.Generator) -> bool | None:
    """Shows both in an order by chance; whether the user knows which is the own text, None to end the quiz."""
    own_place = int(torch.randint(2, (1,), generator=dice))
    texts = [own, other] if own_place == 0 else [other, own]
    for number, text in enumerate(texts, start=1):
        # The text's own line breaks would tell the two apart at a glance.
        flat = " ".join(text.split())
        lines = textwrap.wrap(flat, COLUMNS, initial_indent=f"{number}: ", subsequent_indent="   ")
        show("\n" + "\n".join(lines))

    while (line := read_line()) not in ("1", "2", "/quit"):
        say("1 or 2, /quit ends.")
    if line == "/quit":
        return None
    return int(line) == own_place + 1


def quiz_result(guesses: list[bool], shown: int) -> str:
    """The sentence at the end, of guesses that were right or not and the number of pairs that were shown."""
    if not shown:
        return "Nothing was asked: it takes held-out posts of 15 words and more (val_data.jsonl)."
    if not guesses:
        return "\nNothing was answered."
    low, high = wilson(sum(guesses), len(guesses))
    interval = f"{percent(low)} to {percent(high)}"
    return f"\nright {sum(guesses)} of {len(guesses)} ({interval}); {percent(0.5)}: you cannot tell"


# ---------------------------------------------------------------------------- report: evidence
ANSWERS_AT_ONCE = 24  # rows of a batch; more bring little speed and take memory
WORDS_TO_WRITE = 6_000  # by each model, at full size
FEWEST_WORDS = 20  # in an answer on average; a model that writes less is not asked for ever
PUBLIC_TEXTS = 60  # that are read for the leak check, at full size; private and held-out ones are all read


LINE = "line"  # key of a conversation, which `read_blog` adds: its line in the file, from 1


@dataclass
class BlogData:
    """What extract_blog_data.py left; empty where a file is missing."""

    train: list[dict] = field(default_factory=list)  # conversations
    held_out: list[dict] = field(default_factory=list)
    redacted: list[dict] = field(default_factory=list)  # personal data that was replaced: fingerprint, kind, visibility
    key: bytes | None = None  # of the fingerprints


@dataclass
class Trial:
    """What one model did for the report."""

    answers: list[Answer] = field(default_factory=list)  # to the requests of held-out posts
    readings: list[Reading] = field(default_factory=list)  # of the texts, one each
    held_out_nats: np.ndarray | None = None  # loss of each held-out conversation
    blocked_chances: list[float] = field(default_factory=list)  # of the words in BLOCKED_WORDS; logarithms
    control_nats: np.ndarray | None = None  # and of each held-out conversation of OTHER_BLOGS

    def texts(self) -> list[str]:
        return [answer.text for answer in self.answers]


@dataclass
class Evidence:
    """What the report is made from: the author's texts, what is asked of both models, and what they did."""

    blog: BlogData = field(default_factory=BlogData)
    index: WordIndex | None = None  # of the training text
    control: list[dict] = field(default_factory=list)  # held-out conversations of OTHER_BLOGS
    other_texts: dict[str, list[str]] = field(default_factory=dict)  # all posts of OTHER_BLOGS, by `names_of_blogs`
    left_out: list[str] = field(default_factory=list)  # why others of OTHER_BLOGS are not among them, a sentence each
    texts: list[Text] = field(default_factory=list)  # that could leak, and held-out ones as the control
    requests: list[str] = field(default_factory=list)
    words: int = WORDS_TO_WRITE  # to be written by each model
    context_tokens: int = 512  # windows as in training
    overlap_tokens: int = 32
    precision: str = "fp32"
    seed: int = 42
    tokenizer: object = None
    tuned: Trial = field(default_factory=Trial)
    base: Trial | None = None
    blocked: tuple[str, ...] = ()  # BLOCKED_WORDS of extract_blog_data.py
    styles: Styles | None = None  # counted when the first part asks for them: `styles_of`


def gather_evidence(args: argparse.Namespace, history: dict, model, tokenizer, precision: str, size: float) -> Evidence:
    """Everything that is the same for both models, before either is asked."""
    blog = read_blog(args.data_dir)
    context, overlap = windows_as_trained(section_of(history, "settings"), positions_of(model))

    # Asked as it was in training, for posts that it never saw.
    requests = [post["messages"][0]["content"] for post in posts_of(blog.held_out)]
    evidence = Evidence(
        blog=blog,
        index=WordIndex(blog.train) if blog.train else None,
        requests=requests or PROMPTS,
        words=max(1, round(size * WORDS_TO_WRITE)),
        context_tokens=context,
        overlap_tokens=overlap,
        precision=precision,
        seed=42 if args.seed is None else args.seed,
        tokenizer=tokenizer,
        blocked=extraction.blocked_words(),
    )

    if blog.redacted and not blog.key:
        say(f"{args.data_dir} has no key: what was redacted cannot be recognised; run extract_blog_data.py again.")
    add_other_blogs(evidence)
    for problem in evidence.left_out:
        say(problem)
    evidence.texts = pick_texts(evidence, max(1, round(PUBLIC_TEXTS * size)))
    return evidence


def windows_as_trained(recipe: dict, positions: int) -> tuple[int, int]:
    """(tokens of a window, of them seen again from the one before), as the settings of the training run have them.

    As train_model.py has them for a model from elsewhere, or where they are no such numbers.
    """
    context = recipe.get("context_tokens")
    overlap = recipe.get("overlap_tokens")
    if not (is_whole(context) and is_whole(overlap) and 0 <= overlap < context > 1):
        context = training.CONTEXT_TOKENS
        overlap = training.OVERLAP_TOKENS
    context = min(context, positions)
    # Of each window but the first, the first token is known only from the one before.
    return context, max(1, min(overlap, context // 2))


def is_whole(value: object) -> bool:
    """Whether it is a whole number; True and False are none."""
    return isinstance(value, int) and not isinstance(value, bool)


def read_blog(folder: Path) -> BlogData:
    """Both splits and what extraction redacted."""
    blog = BlogData()
    for name, conversations in (("train_data.jsonl", blog.train), ("val_data.jsonl", blog.held_out)):
        path = folder / name
        # Empty where the blog is too small for held-out posts.
        if path.is_file() and path.stat().st_size:
            conversations += training.read_conversations(path)
        for number, conversation in enumerate(conversations, start=1):
            conversation[LINE] = number

    redacted = training.read_json_object(folder / "extraction_report.json").get("redacted")
    if isinstance(redacted, list):
        blog.redacted = [entry for entry in redacted if isinstance(entry, dict)]
    blog.key = extraction.read_key(folder)
    return blog


def add_other_blogs(evidence: Evidence) -> None:
    """What OTHER_BLOGS names; what cannot be compared with goes into `left_out`."""
    for folder, name in zip(OTHER_BLOGS, names_of_blogs(OTHER_BLOGS), strict=True):
        other = read_blog(HERE / folder)
        texts = author_texts(other.train + other.held_out)
        problem = why_left_out(name, texts, evidence)
        if problem:
            evidence.left_out.append(problem)
            continue
        evidence.control += other.held_out
        evidence.other_texts[name] = texts


def names_of_blogs(folders: list[str]) -> list[str]:
    """As the report calls them: as they are written, or only the last part of a path that begins at the root.

    voice_report.json may be shown to others, and a whole path names the user.
    """
    names = []
    for folder in folders:
        name = without_root(folder)
        # Many blogs lie in a folder `data`.
        same = sum(known.partition(" (")[0] == name for known in names)
        names.append(f"{name} ({same + 1})" if same else name)
    return names


def without_root(path: str) -> str:
    """Only the last part of a path that begins at the root, which names the user; another path as it is."""
    return Path(path).name if Path(path).is_absolute() else path


def why_left_out(name: str, texts: list[str], evidence: Evidence) -> str:
    """Why a folder of OTHER_BLOGS says nothing about this author, in a sentence; "" where it does."""
    uses = Counter()
    for text in texts:
        uses.update(folded_words(text))
    if not uses:
        return f"OTHER_BLOGS names {name}, where there is no train_data.jsonl: it is left out."

    # Everything sets an author apart from people who write another language.
    share = share_of_language([word for word, _ in uses.most_common(100)], evidence)
    if evidence.blog.train and share < SAME_LANGUAGE:
        return (
            f"Of the 100 commonest words of {name} (OTHER_BLOGS) you use {percent(share)}: it is another language, so "
            "it is left out."
        )
    return ""


def visibility_of(conversation: dict) -> str:
    return "private" if conversation.get("visibility") == "private" else "public"


def private_posts(evidence: Evidence) -> list[dict]:
    """Conversations of the training data that nobody else may read."""
    return [post for post in evidence.blog.train if visibility_of(post) == "private"]


def pick_texts(evidence: Evidence, public: int) -> list[Text]:
    """What is read for the leak check: all private texts, all held-out ones, and `public` public ones."""
    others = [post for post in evidence.blog.train if visibility_of(post) == "public"]
    # The same ones every time, so that two reports compare.
    order = np.random.default_rng(42).permutation(len(others))
    chosen = sorted(order[:public])
    trained = private_posts(evidence) + [others[place] for place in chosen]

    texts = []
    for post in trained:
        texts.append(text_of(evidence.tokenizer, post, is_held_out=False))
    for post in evidence.blog.held_out:
        texts.append(text_of(evidence.tokenizer, post, is_held_out=True))
    return texts


def try_out(model, tokenizer, evidence: Evidence, sampling: GenerationConfig, name: str) -> Trial:
    """Everything that the report asks of one model; changes its weights to the precision of writing."""
    trial = Trial()
    held_out = evidence.blog.held_out
    if held_out:
        trial.held_out_nats = read_losses(model, tokenizer, evidence, held_out, f"{name} model: held-out")
    if evidence.control:
        trial.control_nats = read_losses(model, tokenizer, evidence, evidence.control, f"{name} model: control")

    # The losses above are exact; from here on the weights are those that answers are made with.
    model = model.to(NUMBERS[evidence.precision])
    trial.readings = read_texts(model, evidence, sampling, name)
    if evidence.blocked:
        trial.blocked_chances = next_word_chances(model, evidence)
    trial.answers = write_words(model, tokenizer, evidence, sampling, name)
    return trial


def read_losses(model, tokenizer, evidence: Evidence, conversations: list[dict], what: str) -> np.ndarray:
    """Negative log-likelihood of the author's part of each conversation, in nats, in windows as in training."""
    say(f"{what}: reading {len(conversations)} conversations")
    tokenized = training.tokenize(tokenizer, conversations)
    rows = training.make_rows(tokenized, evidence.context_tokens, evidence.overlap_tokens, packed=False)
    with training.autocast(model.device, evidence.precision):
        return training.conversation_losses(model, rows)


def write_words(model, tokenizer, evidence: Evidence, sampling: GenerationConfig, name: str) -> list[Answer]:
    """Answers to the requests, from the first again if need be, until there are as many words as are needed."""
    dice = torch.Generator().manual_seed(evidence.seed)
    prompts = [request_tokens(tokenizer, request) for request in evidence.requests]
    # A model that ends every answer at once would go on for ever.
    most = max(ANSWERS_AT_ONCE, evidence.words // FEWEST_WORDS)
    source = itertools.islice(itertools.cycle(prompts), most)

    answers = []
    written = 0
    wanted = ANSWERS_AT_ONCE
    while written < evidence.words:
        batch = list(itertools.islice(source, wanted))
        if not batch:
            break
        answers += whole_answers(model, tokenizer, batch, sampling, dice)
        written = count_words(answer.text for answer in answers)
        say(f"{name} model: wrote {written:,} words, {evidence.words:,} needed")

        # No more than what is missing, if the next answers are as long as these.
        mean = max(written, 1) / len(answers)
        wanted = min(ANSWERS_AT_ONCE, math.ceil((evidence.words - written) / mean))
    return answers


# ---------------------------------------------------------------------------- report: evidence, what could leak
class Span(NamedTuple):
    """A run of tokens that somebody might want to keep: ids[begin:end] of a conversation."""

    group: str  # "private", "public", "held-out", "private titles", "comments" or "personal data"
    begin: int
    end: int


@dataclass
class Text:
    """A conversation as the models read it."""

    post: dict
    ids: list[int]
    is_held_out: bool
    spans: list[Span]


def text_of(tokenizer, post: dict, is_held_out: bool) -> Text:
    ids, scored = conversation_tokens(tokenizer, post["messages"])
    spans = spans_of(tokenizer, post, ids, scored, is_held_out)
    return Text(post, ids, is_held_out, spans)


def spans_of(tokenizer, conversation: dict, ids: list[int], scored: list[bool], is_held_out: bool) -> list[Span]:
    """The author's turns and, of training texts, what else could be kept: private titles and readers' comments.

    `scored` says of each token whether it is the author's.
    """
    group = "held-out" if is_held_out else visibility_of(conversation)
    specials = set(tokenizer.all_special_ids)

    spans = []
    for is_author, begin, end in runs_of(scored):
        if is_author:
            while end > begin and ids[end - 1] in specials:
                end -= 1  # the end-of-text token is no secret
            spans.append(Span(group, begin, end))

        # Held-out texts are there to compare with: what the author wrote in them is enough.
        if is_held_out:
            continue
        if is_author:
            spans += spans_of_personal_data(tokenizer, conversation, ids, begin, end)
        else:
            spans += spans_of_others(tokenizer, conversation, ids, begin, end)
    return [span for span in spans if span.end > span.begin]


def runs_of(flags: list) -> Iterator[tuple[object, int, int]]:
    """(flag, begin, end) of each run of equal flags."""
    begin = 0
    for flag, run in itertools.groupby(flags):
        end = begin + len(list(run))
        yield flag, begin, end
        begin = end


def spans_of_personal_data(tokenizer, conversation: dict, ids: list[int], begin: int, end: int) -> Iterator[Span]:
    """Addresses, numbers and keys that stand in the author's text because REDACT was off or no rule knew them."""
    own = ids[begin:end]
    text = tokenizer.decode(own, clean_up_tokenization_spaces=False)
    # As extraction looks at it: an id in a link of a public post is no key.
    is_public = visibility_of(conversation) == "public"
    for _, left, right, _ in find_personal_data(text, is_public):
        first, last = tokens_at(tokenizer, text, own, left, right)
        yield Span("personal data", begin + first, begin + last)


def spans_of_others(tokenizer, conversation: dict, ids: list[int], begin: int, end: int) -> Iterator[Span]:
    """What the context ids[begin:end] holds that is no template: a private post's title, or readers' comments."""
    group = "private titles"
    wanted = [name_in(conversation, "title")] if visibility_of(conversation) == "private" else []
    if conversation.get("kind") == "reply":
        group = "comments"
        wanted = comments_of(conversation)

    context = ids[begin:end]
    text = tokenizer.decode(context, clean_up_tokenization_spaces=False)
    for content in wanted:
        content = break_control_tokens(content, tokenizer)  # as the template shows it
        left = text.find(content)
        # A thread has several turns, and this context perhaps another one.
        if content and left >= 0:
            right = left + len(content)
            first, last = tokens_at(tokenizer, text, context, left, right)
            yield Span(group, begin + first, begin + last)


def comments_of(conversation: dict) -> list[str]:
    """What readers say in it; where the author only goes on under a post, the post's opening stands for a reader."""
    if conversation.get("kind") != "reply":
        return []
    stand_in = REPLY_CONTEXT.partition("{")[0]
    said = [turn["content"] for turn in conversation["messages"] if turn["role"] == "user"]
    return [text for text in said if not text.startswith(stand_in)]


def tokens_at(tokenizer, text: str, ids: list[int], left: int, right: int) -> tuple[int, int]:
    """The tokens (begin, end) of `ids` that make up text[left:right]; all of them where the tokenizer cannot say."""
    everything = (0, len(ids))
    if not tokenizer.is_fast:
        return everything
    # Only where the text gives the very same tokens again are its offsets those of `ids`.
    again = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    if again["input_ids"] != ids:
        return everything

    inside = []
    for number, (begin, end) in enumerate(again["offset_mapping"]):
        if begin < right and end > left:
            inside.append(number)
    return (inside[0], inside[-1] + 1) if inside else everything


# ---------------------------------------------------------------------------- report: evidence, reading every text
# The leak check computes the chance of every token of every text in one reading, instead of trying a few.
FEW_RANKS = 20  # up to this rank a token counts with 1 / rank under any settings; m in arXiv 2604.18697
ROWS_AT_ONCE = 64  # of logits that are float32 at a time: 64 x 50,000 x 4 bytes are 13 MB
TEXTS_A_MESSAGE = 25  # a small model on two cores read 59 in 47 s


@dataclass
class Reading:
    """The chance of each token of a text after everything before it; natural logarithms, shape (tokens,).

    One forward pass gives them all (Hayes et al. 2024, arXiv 2410.19482). `anyhow` is the bound of (l, b)-
    inextractability (arXiv 2604.18697): whatever temperature, top-k and top-p somebody chooses, a token of rank r is
    drawn with a chance of 1 / r at most, because r - 1 others are likelier. Beyond FEW_RANKS, where that says little,
    the plain chance stands instead; only a temperature above 1 could raise it.
    """

    own: np.ndarray  # as the model's own sampling settings draw it; -inf: never
    anyhow: np.ndarray  # under any settings, a bound from above
    plain: np.ndarray  # at temperature 1 with nothing cut off: what the loss is made of
    is_first: np.ndarray  # bool: the likeliest token, which greedy decoding takes

    def fill_in(self, start: int, part: Reading) -> None:
        """Puts `part` in its place, which begins with token `start`."""
        for name, values in vars(part).items():
            getattr(self, name)[start : start + len(values)] = values


def read_texts(model, evidence: Evidence, sampling: GenerationConfig, name: str) -> list[Reading]:
    """A reading of each text; says how far it is and how long it will take."""
    texts = evidence.texts
    # By tokens, because texts differ much in length.
    began = time.monotonic()
    whole = sum(len(text.ids) for text in texts)
    done = 0
    readings = []
    for text in texts:
        reading = read_chances(model, text.ids, sampling, evidence.context_tokens, evidence.overlap_tokens)
        readings.append(reading)
        done += len(text.ids)

        if len(readings) % TEXTS_A_MESSAGE == 0 or len(readings) == len(texts):
            left = (time.monotonic() - began) / done * (whole - done)
            say(f"{name} model: read {len(readings):,} of {len(texts):,} texts, {left:.0f} s left")
    return readings


@torch.inference_mode()
def read_chances(model, ids: list[int], sampling: GenerationConfig, context: int, overlap: int) -> Reading:
    """The chances of all tokens, in windows of `context` tokens as in training.

    Each window begins with the last `overlap` tokens of the one before. Nothing predicts the first token of all: it
    counts as given.
    """
    reading = Reading(
        own=np.zeros(len(ids)),
        anyhow=np.zeros(len(ids)),
        plain=np.zeros(len(ids)),
        is_first=np.ones(len(ids), dtype=bool),
    )
    for start in range(0, max(len(ids) - overlap, 1), context - overlap):
        window = ids[start : start + context]
        inputs = torch.tensor([window], device=model.device)
        logits = model(input_ids=inputs, use_cache=False).logits[0]  # (tokens of the window, vocabulary)

        # What the window before has read already is context only.
        fresh = overlap if start else 1
        for place in range(fresh, len(window), ROWS_AT_ONCE):
            targets = inputs[0, place : place + ROWS_AT_ONCE]
            # The logits of a token stand at the place before it.
            rows = logits[place - 1 : place - 1 + len(targets)].float()
            seen = seen_before(window, place, rows)
            reading.fill_in(start + place, chances_of(rows, targets, seen, sampling))
    return reading


def seen_before(window: list[int], place: int, rows: torch.Tensor) -> torch.Tensor:
    """Whether a token stands before window[place + row], for each row; shape of `rows`: (rows, vocabulary)."""
    seen = torch.zeros(rows.shape, dtype=torch.bool, device=rows.device)
    given = window[:place]
    seen[:, given] = True

    # Each row has seen one token more than the one before.
    for row in range(1, len(rows)):
        newest = window[place + row - 1]
        seen[row:, newest] = True
    return seen


def chances_of(rows: torch.Tensor, targets: torch.Tensor, seen: torch.Tensor, sampling: GenerationConfig) -> Reading:
    """The reading of `targets`, shape (rows,), under logits and `seen`, both (rows, vocabulary)."""
    wanted = targets[:, None]

    # The very chances that answers are drawn from; a token that was cut off is not among them, so its sum is 0.
    tokens, chances = next_token_chances(rows, seen, sampling)
    is_wanted = tokens == wanted
    drawn = (chances.double() * is_wanted).sum(-1)
    own = drawn.log()

    logits = rows.gather(1, wanted)  # (rows, 1)
    plain = logits[:, 0] - rows.logsumexp(-1)
    plain = plain.double()
    likelier = (rows > logits).sum(-1)
    ranks = 1 + likelier
    bound = torch.where(ranks <= FEW_RANKS, -ranks.double().log(), plain)

    # A repetition penalty reorders the tokens, so the own settings may favour one whose rank without it is low.
    anyhow = torch.maximum(bound, own)
    columns = (own, anyhow, plain, likelier == 0)
    return Reading(*(column.cpu().numpy() for column in columns))


# ---------------------------------------------------------------------------- report: evidence, blocked words
CONTEXTS_TRIED = 8  # where a blocked word's first token is likeliest; there the whole word is computed


@torch.inference_mode()
def next_word_chances(model, evidence: Evidence) -> list[float]:
    """For each blocked word the natural logarithm of its highest chance after any beginning of a private text.

    The word's first token is looked up after every token of the texts; in the likeliest CONTEXTS_TRIED contexts the
    whole word is computed. -inf where there is no private text.
    """
    # As a word within a sentence: with the space before it.
    encode = evidence.tokenizer.encode
    spelled = [encode(f" {word}", add_special_tokens=False) for word in evidence.blocked]
    first = torch.tensor([ids[0] for ids in spelled], device=model.device)

    trained = [text for text in evidence.texts if not text.is_held_out]
    private = [text.ids for text in trained if visibility_of(text.post) == "private"]

    likeliest = [[] for _ in spelled]  # by word: (logarithm of the first token's chance, the tokens before it)
    for ids in private:
        for start in range(0, len(ids), evidence.context_tokens):
            window = ids[start : start + evidence.context_tokens]
            for word, (chance, place) in enumerate(likeliest_places(model, window, first)):
                likeliest[word].append((chance, window[: place + 1]))

    # Where the first token is likely the whole word may be; a few places are enough to look at.
    found = []
    for ids, contexts in zip(spelled, likeliest, strict=True):
        contexts.sort(reverse=True)
        highest = -math.inf
        for _, before in contexts[:CONTEXTS_TRIED]:
            highest = max(highest, continuation_chance(model, before, ids))
        found.append(highest)
    return found


def likeliest_places(model, window: list[int], tokens: torch.Tensor) -> list[tuple[float, int]]:
    """For each of `tokens` (tokens,): (logarithm of its highest chance, place in `window` after which it has it)."""
    inputs = torch.tensor([window], device=model.device)
    logits = model(input_ids=inputs, use_cache=False).logits[0]  # (tokens of the window, vocabulary)

    # In pieces, because float32 of the whole would be large.
    chances = []
    for piece in logits.split(ROWS_AT_ONCE):
        rows = piece.float()
        everything = rows.logsumexp(-1, keepdim=True)
        chances.append(rows[:, tokens] - everything)

    highest = torch.cat(chances).max(0)
    values = highest.values.tolist()
    places = highest.indices.tolist()
    return list(zip(values, places, strict=True))


@torch.inference_mode()
def continuation_chance(model, before: list[int], ids: list[int]) -> float:
    """Natural logarithm of the chance that `ids` follow `before`, at temperature 1 with nothing cut off."""
    whole = before + ids
    window = whole[-positions_of(model) :]
    inputs = torch.tensor([window], device=model.device)
    logits = model(input_ids=inputs, use_cache=False).logits[0]  # (window, vocabulary)

    # The logits of a place are about the token after it.
    first = len(window) - len(ids)
    logits = logits[first - 1 : -1].float()
    targets = inputs[0, first:, None]
    chosen = logits.gather(1, targets)[:, 0]

    log_chances = chosen - logits.logsumexp(-1)
    return float(log_chances.double().sum())


# ---------------------------------------------------------------------------- report: numbers
DRAWS = 2_000  # bootstrap samples
NATS_OF_A_BIT = math.log(2)
Interval = tuple[float, float]  # 95 %: (low, high)

# Metadata of fields that hold text, or the name of a post, which is its title again: voice_report.json has neither. A
# post is a number there, that of its line in the data.
PAGE_ONLY = {"page_only": True}


class NotMeasured(Exception):
    """What is missing for a part of the report, to be put behind "Not measured:"."""


def wilson(hits: int, trials: int) -> Interval:
    """95 % interval of a share (Wilson 1927); not empty at 0 hits, unlike the usual formula."""
    z = 1.959964  # standard deviations that hold 95 % of a normal distribution
    share = hits / trials
    variance = share * (1 - share) / trials
    spread = z * math.sqrt(variance + (z / trials / 2) ** 2)
    middle = share + z * z / (2 * trials)
    scale = 1 + z * z / trials

    low = (middle - spread) / scale
    high = (middle + spread) / scale
    # Rounding may carry them out of the range by the last digit.
    return max(0.0, low), min(1.0, high)


def bootstrap(statistic: Callable, *sizes: int) -> Interval:
    """95 % interval of `statistic`, which takes for each size the numbers of the items drawn, with replacement."""
    dice = np.random.default_rng(42)
    drawn = []
    for _ in range(DRAWS):
        samples = [dice.integers(0, size, size) for size in sizes]
        drawn.append(statistic(*samples))
    low, high = np.percentile(drawn, (2.5, 97.5)).tolist()
    return low, high


# ---------------------------------------------------------------------------- report: numbers, did it learn
@dataclass
class PostGain:
    """A held-out post in bits per byte."""

    post: int | None  # its line in val_data.jsonl
    base: float
    tuned: float
    title: str = field(metadata=PAGE_ONLY)

    @property
    def gain(self) -> float:
        return self.base - self.tuned


@dataclass
class Gain:
    """What tuning brought on some conversations, in bits per byte of the author's text."""

    base: float
    tuned: float
    gain: float
    interval: Interval  # of the gain, over conversations
    posts: list[PostGain]

    def of_each(self) -> np.ndarray:
        """Shape (posts,)."""
        return np.array([post.gain for post in self.posts])


@dataclass
class VoiceShare:
    """How much of the gain is the author's voice, and not blogging in general."""

    beyond_control: float  # bits per byte: gain on held-out posts less the gain on other bloggers'
    interval: Interval
    wins: float  # share of pairs in which the author's unseen post gains more than the other's


@dataclass
class Learned:
    """Held-out posts under the tuned model; the gain needs the base model, the rest OTHER_BLOGS."""

    tuned: float
    held_out: Gain | None = None
    control: Gain | None = None
    voice_share: VoiceShare | None = None


def measure_learned(evidence: Evidence) -> Learned:
    """Bits per byte of held-out posts, which neither model has seen."""
    posts = evidence.blog.held_out
    if not posts:
        raise NotMeasured("it takes held-out posts (val_data.jsonl)")

    tuned = evidence.tuned
    base = evidence.base
    # Over all bytes, as training_report.json has it, so that the two figures compare.
    bits = float(tuned.held_out_nats.sum()) / NATS_OF_A_BIT
    learned = Learned(bits / training.author_bytes(posts))
    if base is not None:
        learned.held_out = gain_on(posts, tuned.held_out_nats, base.held_out_nats)
    if base is not None and evidence.control:
        learned.control = gain_on(evidence.control, tuned.control_nats, base.control_nats)
        learned.voice_share = share_of_voice(learned.held_out, learned.control)
    return learned


def gain_on(posts: list[dict], tuned_nats: np.ndarray, base_nats: np.ndarray) -> Gain:
    """The gain on `posts`, whose losses, in nats, are given one by one; long posts weigh more."""
    size = np.array([training.author_bytes([post]) for post in posts])
    before = base_nats / NATS_OF_A_BIT
    after = tuned_nats / NATS_OF_A_BIT
    base = float(before.sum() / size.sum())
    tuned = float(after.sum() / size.sum())

    # Whole posts are drawn, because the sentences of one post are alike.
    saved = before - after
    interval = bootstrap(lambda drawn: saved[drawn].sum() / size[drawn].sum(), len(size))

    base_rates = (before / size).tolist()
    tuned_rates = (after / size).tolist()
    per_post = []
    for place, post in enumerate(posts):
        entry = PostGain(line_of(post), base_rates[place], tuned_rates[place], title_of(post))
        per_post.append(entry)
    return Gain(base, tuned, base - tuned, interval, per_post)


def share_of_voice(own: Gain, control: Gain) -> VoiceShare:
    """The gain on the author's posts beside that on others', post by post; every post weighs the same."""
    ours = own.of_each()
    theirs = control.of_each()

    def difference(some: np.ndarray, others: np.ndarray) -> float:
        return ours[some].mean() - theirs[others].mean()

    beyond = float(ours.mean() - theirs.mean())
    interval = bootstrap(difference, len(ours), len(theirs))

    # Every pair of posts, shape (ours, theirs).
    is_won = ours[:, None] > theirs
    wins = float(is_won.mean())
    return VoiceShare(beyond, interval, wins)


# ---------------------------------------------------------------------------- report: numbers, habits of writing
# Style is counted in stretches of a hundred words; as many of them as there is text for make a chunk.
STRETCH_WORDS = 100
CHUNK_STRETCHES = (5, 2, 1)  # the longest of which there are enough: 500 words tell more than 100
MIN_CHUNKS = 10  # of the author's unseen posts, and of each model's text
MIN_STRANGER_WORDS = 2 * MIN_CHUNKS * STRETCH_WORDS
# Those that stand in the most of the author's posts. In chunks of 500 words the reader gave three authors 79, 99 and
# 100 percent of their unseen posts, with half as many features 75, 99 and 100; in chunks of 200 words 75, 90 and 100
# instead of 66, 88 and 95. Seen on kevquirk, benbalter and jtimberman, by the functions of benchmarks/bench_reader.py.
FEATURES = {"words": 300, "trigrams": 600}

STRANGERS = HERE / "sample" / "strangers" / "strangers.npz"  # counts of other bloggers, with their licences beside
STRETCHES_OF_A_RUN = 5  # in that file; the next run is from elsewhere in the blog
# Of the strangers' 100 commonest words so many must be among the author's 500. Seen on four English blogs and a French
# one: 0.67 and more among the English, 0.39 and more where the author had 400 words only, 0.11 at most with the French.
SAME_LANGUAGE = 0.3

Feature = tuple[str, str]  # a key of FEATURES, and the word or trigram
Chunks = tuple[np.ndarray, np.ndarray]  # relative frequencies (chunks, features), source (chunks,)


@dataclass
class Stretches:
    """Counts of the features in stretches of STRETCH_WORDS words of somebody's text, in order."""

    counts: np.ndarray  # (stretches, features)
    totals: np.ndarray  # (stretches, features): of how many words or trigrams each count is a part
    source: np.ndarray  # (stretches,): number of the post or answer in which it begins
    run: np.ndarray  # (stretches,): only stretches of one run follow each other in the text

    def chunks(self, size: int) -> Chunks:
        """Every `size` stretches in a row; a chunk's source is that of its first stretch."""
        first = []
        for _, begin, end in runs_of(self.run.tolist()):
            first += range(begin, end - size + 1, size)

        begins = np.array(first, int)
        members = begins[:, None] + np.arange(size)  # (chunks, size)
        counts = self.counts[members].sum(1)
        totals = self.totals[members].sum(1)
        return counts / totals, self.source[begins]


@dataclass
class Strangers:
    """Other bloggers: the features that can be counted in all of them, and their counts by name."""

    features: list[Feature]
    stretches: dict[str, Stretches]
    note: str = ""  # who is missing, and why


@dataclass
class Styles:
    """How everybody writes who is compared: chunks of one length, with the same features."""

    size: int  # stretches in a chunk
    profile: np.ndarray  # (chunks, features): the author's posts of the training data
    tested: dict[str, Chunks]  # text of "author" (unseen posts), "tuned" and "base"
    strangers: dict[str, Chunks]  # by name
    note: str


def styles_of(evidence: Evidence) -> Styles:
    """Counted once, when the first part of the report asks: it takes seconds. Raises NotMeasured."""
    if evidence.styles is None:
        evidence.styles = count_styles(evidence)
    return evidence.styles


def count_styles(evidence: Evidence) -> Styles:
    """Counts of everybody's text; raises NotMeasured where somebody's is missing or too short."""
    texts = texts_without_copies(evidence)
    size = pick_chunk_size(texts)

    # Picked from posts that are not tested, so that no text chooses what it is judged by.
    known = author_texts(evidence.blog.train)
    strangers = find_strangers(evidence, pick_features(known))

    def count(part: list[str]) -> Chunks:
        return count_stretches(part, strangers.features).chunks(size)

    profile, _ = count(known)
    if len(profile) == 0:
        words = (size + 1) * STRETCH_WORDS
        raise NotMeasured(f"your training posts hold {count_words(known):,} words, and it takes {words:,}")
    tested = {whose: count(part) for whose, part in texts.items()}
    crowd = {name: counted.chunks(size) for name, counted in strangers.stretches.items()}
    return Styles(size, profile, tested, crowd, strangers.note)


def texts_without_copies(evidence: Evidence) -> dict[str, list[str]]:
    """What is compared with the author's known posts. Copies would sound like the author, and are no voice.

    Raises NotMeasured where one of the three is missing.
    """
    if evidence.base is None or evidence.index is None or not evidence.blog.held_out:
        raise NotMeasured("it takes the base model, train_data.jsonl and val_data.jsonl")
    texts = {
        "author": author_texts(evidence.blog.held_out),
        "tuned": evidence.tuned.texts(),
        "base": evidence.base.texts(),
    }

    # The author's too: who quotes himself would seem nearer to himself than any model can be.
    fresh = {}
    for whose, part in texts.items():
        fresh[whose] = [evidence.index.without_copies(text) for text in part]
    return fresh


def pick_chunk_size(texts: dict[str, list[str]]) -> int:
    """Stretches in a chunk: the most of which everybody has MIN_CHUNKS.

    Raises NotMeasured, with what is missing, if nobody has enough.
    """
    words = {whose: count_words(part) for whose, part in texts.items()}
    fewest = min(words.values())
    for size in CHUNK_STRETCHES:
        # One more than are needed, because what is left at the end of the text makes no chunk.
        if fewest >= (MIN_CHUNKS + 1) * size * STRETCH_WORDS:
            return size

    needed = (MIN_CHUNKS + 1) * STRETCH_WORDS
    if words["author"] < needed:
        posts = math.ceil(needed / max(words["author"], 1) * len(texts["author"]))
        raise NotMeasured(
            f"your unseen posts hold {words['author']:,} words that are no copies, and it takes {needed:,}, which "
            f"about {posts:,} held-out posts would have"
        )
    raise NotMeasured(f"a model wrote {fewest:,} words that are no copies, and it takes {needed:,}")


def pick_features(posts: list[str]) -> list[Feature]:
    """The words and trigrams that stand in the most posts: habits rather than topics."""
    spread = {kind: Counter() for kind in FEATURES}  # in how many posts each stands
    for post in posts:
        # Once in a post counts as much as ten times, which is what a topic does.
        for kind, counts in counts_of(post).items():
            spread[kind].update(counts.keys())

    features = []
    for kind, number in FEATURES.items():
        features += [(kind, key) for key, _ in spread[kind].most_common(number)]
    return features


def counts_of(text: str) -> dict[str, Counter]:
    """How often each word and each three characters in a row stand in `text`; make_strangers.py counts the same."""
    flat = " ".join(text.split())
    words = WORD.findall(flat.casefold())
    trigrams = [flat[place : place + 3] for place in range(len(flat) - 2)]
    return {"words": Counter(words), "trigrams": Counter(trigrams)}


def count_stretches(texts: list[str], features: list[Feature]) -> Stretches:
    """Of the texts pooled in their order; what is left at the end goes."""
    gap = "\n\n"
    pooled = gap.join(texts)
    lengths = [len(text) + len(gap) for text in texts[:-1]]
    starts = np.cumsum([0, *lengths])  # where each text begins, in characters

    # Cut at words, whatever text they are in: most answers are shorter than a stretch.
    edges = [begin for begin, _ in word_spans(pooled)][::STRETCH_WORDS]
    counts = []
    totals = []
    for begin, end in itertools.pairwise(edges):
        found = counts_of(pooled[begin:end])
        sums = {kind: counter.total() for kind, counter in found.items()}
        counts.append([found[kind][key] for kind, key in features])
        totals.append([sums[kind] for kind, _ in features])

    # Two axes also where there is no stretch.
    shape = (len(counts), len(features))
    begins = edges[: len(counts)]
    return Stretches(
        counts=np.array(counts).reshape(shape),
        totals=np.array(totals).reshape(shape),
        source=np.searchsorted(starts, begins, side="right") - 1,
        run=np.zeros(len(counts)),
    )


def find_strangers(evidence: Evidence, features: list[Feature]) -> Strangers:
    """The bloggers who come with this project, the user's own choice, and the readers of the blog.

    The counts that come along hold a fixed vocabulary: with them, only features in it can be compared.
    """
    shipped = load_strangers(evidence, features)
    if shipped.stretches:
        features = shipped.features

    known = dict(shipped.stretches)
    notes = [shipped.note, *evidence.left_out]
    for name, texts in evidence.other_texts.items():
        known[name] = count_stretches(texts, features)
        if len(known[name].run) < 2 * MIN_CHUNKS:
            words = f"{count_words(texts):,} words, and it takes {MIN_STRANGER_WORDS:,}"
            notes.append(f"{name} (OTHER_BLOGS) has {words}: the reader leaves it out.")

    # A few polite words are nobody's habits.
    readers = []
    for conversation in evidence.blog.train:
        readers += comments_of(conversation)
    if count_words(readers) >= MIN_STRANGER_WORDS:
        known["your readers"] = count_stretches(readers, features)

    # Twice what a tested text needs: all that is compared with a rival is compared with these few chunks.
    enough = {name: counted for name, counted in known.items() if len(counted.run) >= 2 * MIN_CHUNKS}
    return Strangers(features, enough, " ".join(notes).strip())


def load_strangers(evidence: Evidence, features: list[Feature]) -> Strangers:
    """The counts in STRANGERS, of those features that it holds; nobody where it is missing or of another language."""
    if not STRANGERS.is_file():
        return Strangers([], {}, f"{STRANGERS.relative_to(HERE)} is missing.")
    with np.load(STRANGERS, allow_pickle=False) as file:
        data = {name: file[name] for name in file.files}

    # In the file the commonest words come first.
    share = share_of_language(data["words"][:100].tolist(), evidence)
    if share < SAME_LANGUAGE:
        note = (
            f"Of the 100 commonest words of the bloggers who come along you use {percent(share)}: they write another "
            "language, so they are left out."
        )
        return Strangers([], {}, note)
    return pick_counts(data, features)


def pick_counts(data: dict[str, np.ndarray], features: list[Feature]) -> Strangers:
    """The arrays of STRANGERS, by blog and of those `features` that they hold."""
    # The file has a row for each feature, words before trigrams, and a column for each stretch.
    row = {}
    for kind in FEATURES:
        for key in data[kind].tolist():
            row[kind, key] = len(row)
    shared = [feature for feature in features if feature in row]
    rows = [row[feature] for feature in shared]
    counts = data["counts"][rows].T.astype(int)  # (stretches, features)

    # Of how many words, and of how many trigrams: two columns.
    columns = [0 if kind == "words" else 1 for kind, _ in shared]
    totals = data["totals"][:, columns].astype(int)  # (stretches, features)

    stretches = {}
    for number, name in enumerate(data["names"].tolist()):
        if name in NOT_STRANGERS:
            continue
        mine = np.flatnonzero(data["blog"] == number)
        runs = mine // STRETCHES_OF_A_RUN
        posts = data["post"][mine].astype(int)
        stretches[name] = Stretches(counts[mine], totals[mine], posts, runs)
    return Strangers(shared, stretches)


def share_of_language(words: list[str], evidence: Evidence) -> float:
    """The share of `words`, somebody's commonest ones, among the author's 500 commonest."""
    uses = Counter()
    for text in author_texts(evidence.blog.train):
        uses.update(folded_words(text))

    commonest = {word for word, _ in uses.most_common(500)}
    found = sum(word in commonest for word in words)
    return found / len(words)


def common_scale(groups: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each feature, every group with the same weight; shapes (features,)."""
    means = np.array([group.mean(0) for group in groups])
    variances = np.array([group.var(0) for group in groups])

    # Of everything together: what varies within the groups, and between them.
    within = variances.mean(0)
    between = means.var(0)
    middle = means.mean(0)
    spread = np.sqrt(within + between)
    return middle, without_zeros(spread)


def profiles_of(groups: list[np.ndarray], middle: np.ndarray, spread: np.ndarray) -> np.ndarray:
    """z-scores of each group's mean, shape (groups, features)."""
    return np.array([(group.mean(0) - middle) / spread for group in groups])


def without_zeros(spread: np.ndarray) -> np.ndarray:
    """Standard deviations to divide by: a feature that never varies says nothing, so its score becomes 0."""
    return np.where(spread == 0, np.inf, spread)


def cosines(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Cosines between the rows of both, shape (rows of one, rows of other); 0 where a row is 0."""
    lengths_of_one = np.linalg.norm(one, axis=1)
    lengths_of_other = np.linalg.norm(other, axis=1)
    lengths = lengths_of_one[:, None] * lengths_of_other
    return one @ other.T / np.maximum(lengths, 1e-12)


# ---------------------------------------------------------------------------- report: numbers, is it you
ROUNDS = 100  # of half the features against half the rivals
MISTAKEN = 0.05  # of strangers' chunks that may be taken for the author's: sets the threshold
MIN_STRANGERS = 4  # half of them rivals, half of them setting the threshold
NEXT_BLOG = 1_000_000  # posts of different blogs are different posts: their numbers lie that far apart


@dataclass
class ReaderShare:
    """How much of somebody's text the reader gives to the author."""

    share: float
    interval: Interval  # over posts or answers
    chunks: int


@dataclass
class Reader:
    """A reader who knows the author's posts and those of other bloggers, asked whose each chunk is.

    General Impostors (Koppel and Winter 2014, doi 10.1002/asi.22954): again and again, with half of the features and
    half of the rivals, a chunk is compared with all profiles; its score is how much nearer the author's is. The
    threshold comes from strangers who are no rivals; then the two halves of the strangers change places.
    """

    author: ReaderShare  # of unseen posts
    tuned: ReaderShare
    base: ReaderShare
    strangers: ReaderShare
    threshold: tuple[float, float]  # scores above which a chunk counts as the author's, of both halves
    names: list[str]  # of the strangers
    chunk_words: int
    to_nearest: float  # share of the author's unseen chunks that are nearer to a stranger: how hard the crowd is
    nearest: str  # the stranger who gets the most of them
    note: str = ""


def measure_reader(evidence: Evidence) -> Reader:
    """What a reader with strangers makes of unseen posts and of both models' text; raises NotMeasured."""
    styles = styles_of(evidence)
    found = len(styles.strangers)
    if found < MIN_STRANGERS:
        there = "there is 1" if found == 1 else f"there are {found}"
        missing = (
            f"it takes {MIN_STRANGERS} other bloggers with {MIN_STRANGER_WORDS:,} words each, and {there}: OTHER_BLOGS "
            f"can name more. {styles.note}"
        )
        raise NotMeasured(missing.strip().rstrip("."))

    reader = ask_reader(styles.profile, styles.tested, styles.strangers)
    reader.chunk_words = styles.size * STRETCH_WORDS
    reader.note = styles.note
    return reader


def ask_reader(profile: np.ndarray, tested: dict[str, Chunks], crowd: dict[str, Chunks]) -> Reader:
    """The verdicts on the chunks of "author", "tuned", "base" and of each stranger.

    `profile`, shape (chunks, features), is the author's known text. `chunk_words` of the result is left to the caller.
    """
    chunks = [frequencies for frequencies, _ in crowd.values()]
    sources = [source for _, source in crowd.values()]
    # By chance: the names that come along are sorted, and readers and other blogs follow them.
    order = np.random.default_rng(42).permutation(len(crowd))
    halves = (order[::2], order[1::2])

    taken = {whose: np.zeros(len(frequencies)) for whose, (frequencies, _) in tested.items()}
    strangers_taken = []
    strangers_source = []
    thresholds = []
    for rivals, judges in (halves, halves[::-1]):
        rival_chunks = [chunks[number] for number in rivals]
        judge_scores = [impostor_scores(chunks[number], profile, rival_chunks) for number in judges]
        threshold = even_quantile(judge_scores, 1 - MISTAKEN)
        thresholds.append(threshold)
        strangers_taken += [scores > threshold for scores in judge_scores]
        strangers_source += [sources[number] + NEXT_BLOG * number for number in judges]

        # Each half of the strangers has half a vote on what is nobody's of them.
        for whose, (frequencies, _) in tested.items():
            scores = impostor_scores(frequencies, profile, rival_chunks)
            taken[whose] += (scores > threshold) / 2

    shares = {}
    for whose, (_, source) in tested.items():
        shares[whose] = share_over_sources(taken[whose], source)
    all_taken = np.concatenate(strangers_taken).astype(float)
    shares["strangers"] = share_over_sources(all_taken, np.concatenate(strangers_source))

    to_nearest, nearest = nearest_stranger(profile, tested["author"][0], crowd)
    return Reader(
        **shares, threshold=tuple(thresholds), names=list(crowd), chunk_words=0, to_nearest=to_nearest, nearest=nearest
    )


def impostor_scores(tested: np.ndarray, profile: np.ndarray, rivals: list[np.ndarray]) -> np.ndarray:
    """How much nearer each tested chunk is to the author's profile than to any rival's, shape (tested,).

    All are (chunks, features). The mean over the rounds of the difference of cosines, -2 to 2: the share of rounds
    that the author wins, as in the source, is 0 or 1 for most chunks and leaves nothing to set a threshold on.
    """
    middle, spread = common_scale([profile, *rivals])
    author = profiles_of([profile], middle, spread)  # (1, features)
    others = profiles_of(rivals, middle, spread)  # (rivals, features)
    scores = (tested - middle) / spread  # (tested, features)

    # The same rounds for every text, so that all texts are asked the same.
    dice = np.random.default_rng(42)
    lead = np.zeros(len(tested))
    half = math.ceil(len(others) / 2)
    for _ in range(ROUNDS):
        some = dice.random(len(middle)) < 0.5
        present = dice.permutation(len(others))[:half]

        heard = scores[:, some]
        to_author = cosines(heard, author[:, some])[:, 0]
        to_others = cosines(heard, others[present][:, some])
        lead += to_author - to_others.max(1)
    return lead / ROUNDS


def even_quantile(groups: list[np.ndarray], share: float) -> float:
    """The quantile of all values, every group with the same weight: a stranger with many posts sets no threshold."""
    values = np.concatenate(groups)
    weights = np.concatenate([np.full(len(group), 1 / len(group)) for group in groups])
    order = np.argsort(values, kind="stable")
    values = values[order]
    weights = weights[order]
    below = np.cumsum(weights) / weights.sum()

    # Rounding may leave the last sum a little below 1.
    place = np.searchsorted(below, share)
    last = len(values) - 1
    return float(values[min(place, last)])


def share_over_sources(taken: np.ndarray, source: np.ndarray) -> ReaderShare:
    """The share of chunks that are taken, with its interval over the posts or answers in which they begin.

    Both have the shape (chunks,); `taken` is 0, 1, or 0.5 where the two halves of the strangers do not agree.
    """
    _, number = np.unique(source, return_inverse=True)
    sums = np.bincount(number, taken)  # (sources,)
    sizes = np.bincount(number)

    share = float(taken.mean())
    is_all_or_nothing = share in (0, 1)
    if is_all_or_nothing or len(sums) == 1:
        # Drawing again would never give anything else, as if it were certain.
        interval = wilson(round(share * len(sums)), len(sums))
    else:
        interval = bootstrap(lambda drawn: sums[drawn].sum() / sizes[drawn].sum(), len(sums))
    return ReaderShare(share, interval, len(taken))


def nearest_stranger(profile: np.ndarray, unseen: np.ndarray, crowd: dict[str, Chunks]) -> tuple[float, str]:
    """(share of unseen chunks that are nearer to a stranger than to the author, the stranger who gets the most)."""
    groups = [profile]
    for frequencies, _ in crowd.values():
        groups.append(frequencies)
    middle, spread = common_scale(groups)
    scores = (unseen - middle) / spread
    nearest = cosines(scores, profiles_of(groups, middle, spread)).argmax(1)

    # The first group is the author.
    lost = nearest[nearest > 0] - 1
    if len(lost) == 0:
        return 0.0, ""
    most = np.bincount(lost).argmax()
    return len(lost) / len(unseen), list(crowd)[most]


# ---------------------------------------------------------------------------- report: numbers, how far did it go
@dataclass
class Voice:
    """Where the tuned model's text stands between the base model's (0) and the author's unseen posts (1)."""

    position: float
    interval: Interval
    ceiling: Interval  # the author against himself: one half of his unseen chunks on the scale of the other
    chunks: dict[str, int]  # by whose they are: "tuned", "base", "author"
    chunk_words: int
    strangers: dict[str, float] = field(default_factory=dict)  # their positions


def measure_voice(evidence: Evidence) -> Voice:
    """The position of the tuned model and of the strangers; raises NotMeasured."""
    styles = styles_of(evidence)
    author, _ = styles.tested["author"]
    tuned, _ = styles.tested["tuned"]
    base, _ = styles.tested["base"]
    voice, place = voice_position(styles.profile, base, tuned, author)

    voice.chunk_words = styles.size * STRETCH_WORDS
    voice.strangers = {name: place(frequencies) for name, (frequencies, _) in styles.strangers.items()}
    return voice


def voice_position(
    known: np.ndarray, base: np.ndarray, tuned: np.ndarray, unseen: np.ndarray
) -> tuple[Voice, Callable]:
    """The position of the tuned model, and a function that gives anybody else's; all are (chunks, features).

    Cosine Delta: z-scored frequencies of the commonest words (Burrows 2002, "Delta") and of character trigrams
    (Stamatatos 2013), compared by cosine (Evert et al. 2017, "Understanding and explaining Delta measures"), in
    chunks of equal length. The author's profile comes from `known`. Raises NotMeasured where base model and author
    cannot be told apart. `chunk_words` and `strangers` of the result are left to the caller.
    """
    # No chunk of the base model's is scored by a scale that it helped to make.
    even = base[::2]
    odd = base[1::2]

    def score(tested: np.ndarray) -> np.ndarray:
        # The mean of both scales, or half of the base model's text would be wasted.
        by_even = likeness(known, even, tested)
        by_odd = likeness(known, odd, tested)
        return np.mean([by_even, by_odd], axis=0)

    zero = np.concatenate([likeness(known, even, odd), likeness(known, odd, even)])
    one = score(unseen)
    ours = score(tuned)

    # Where the two ends of the scale may be one place, everything stands everywhere on it.
    gap, _ = bootstrap(lambda a, b: one[b].mean() - zero[a].mean(), len(zero), len(one))
    if gap <= 0:
        raise NotMeasured("your unseen posts and the base model's text are too alike to tell apart")

    # Both ends of the scale are uncertain too.
    sizes = (len(ours), len(zero), len(one))
    interval = bootstrap(lambda a, b, c: place_on_scale(ours[a], zero[b], one[c]), *sizes)
    voice = Voice(
        position=place_on_scale(ours, zero, one),
        interval=interval,
        ceiling=ceiling_of(zero, one),
        chunks=dict(zip(("tuned", "base", "author"), sizes, strict=True)),
        chunk_words=0,
    )
    return voice, lambda tested: place_on_scale(score(tested), zero, one)


def likeness(author: np.ndarray, base: np.ndarray, tested: np.ndarray) -> np.ndarray:
    """Cosine of z-scores between tested chunks and the author's mean, shape (tested chunks,).

    All three have the shape (chunks, features). Zero is midway from the base model to the author.
    """
    author_mean = author.mean(0)
    base_mean = base.mean(0)
    middle = (author_mean + base_mean) / 2
    half = (author_mean - base_mean) / 2

    # Of both texts together, each with the same weight: within them, and what lies between them.
    variance = (author.var(0) + base.var(0)) / 2
    deviation = without_zeros(np.sqrt(variance + half**2))

    profile = half / deviation
    scores = (tested - middle) / deviation
    return cosines(scores, profile[None])[:, 0]


def place_on_scale(score: np.ndarray, zero: np.ndarray, one: np.ndarray) -> float:
    """0 is the mean of `zero`, 1 the mean of `one`; all are scores of chunks, shape (chunks,)."""
    start = zero.mean()
    length = one.mean() - start
    return float((score.mean() - start) / length)


def ceiling_of(zero: np.ndarray, one: np.ndarray) -> Interval:
    """What the author's own unseen chunks reach: one half by chance on the scale that the other half makes."""
    dice = np.random.default_rng(42)
    places = []
    for _ in range(DRAWS):
        mixed = dice.permutation(one)
        half, rest = np.split(mixed, [len(one) // 2])
        places.append(place_on_scale(half, zero, rest))
    low, high = np.percentile(places, (2.5, 97.5)).tolist()
    return low, high


# ---------------------------------------------------------------------------- report: numbers, length and habit
FAVOURITES = 10
FAVOURITE_SHARE = 0.1  # of the posts in which a favourite stands, so that it is a habit and no topic
PHRASE_WORDS = (1, 2, 3)


TAILS = {"s", "t", "m", "d", "ll", "re", "ve"}  # what stands behind an apostrophe in English, a word to WORD


@dataclass
class Favourite:
    """A word or phrase that the author uses much more than the base model; rates in 10,000 words."""

    author: float
    tuned: float
    base: float
    phrase: str = field(metadata=PAGE_ONLY)


@dataclass
class Habits:
    """Length of answers and posts, and favourite words and phrases."""

    words: dict[str, float]  # median length in words, of "author", "tuned" and "base"
    ended: dict[str, float]  # share of answers that end by themselves, of "tuned" and "base"
    favourites: list[Favourite]


def measure_habits(evidence: Evidence) -> Habits:
    """What a person would notice first; raises NotMeasured."""
    if evidence.base is None or evidence.index is None:
        raise NotMeasured("it takes the base model and train_data.jsonl")

    author = author_texts(evidence.blog.train)
    tuned = evidence.tuned.texts()
    base = evidence.base.texts()
    return Habits(
        words={"tuned": median_words(tuned), "base": median_words(base), "author": median_words(author)},
        ended={"tuned": share_ended(evidence.tuned.answers), "base": share_ended(evidence.base.answers)},
        favourites=find_favourites(author, tuned, base),
    )


def median_words(texts: list[str]) -> float:
    """Of a text; no mean, because a few answers that never end would carry it away."""
    return float(np.median([count_words([text]) for text in texts]))


def share_ended(answers: list[Answer]) -> float:
    """The share of answers that end by themselves."""
    return float(np.mean([answer.ended for answer in answers]))


class Usage:
    """How often somebody uses each word and phrase."""

    def __init__(self, texts: list[str]):
        self.words = count_words(texts)
        self.uses = Counter()
        self.spread = Counter()  # in how many texts each stands
        for text in texts:
            phrases = phrases_of(text)
            self.uses.update(phrases)
            self.spread.update(phrases.keys())

    def rate(self, phrase: str, more: float = 0.0) -> float:
        """Uses in 10,000 words, as if there were `more` of them."""
        return 10_000 * (self.uses[phrase] + more) / max(self.words, 1)


def phrases_of(text: str) -> Counter:
    """Words, pairs and triples of words, and how often they stand in the text."""
    words = folded_words(text)
    phrases = Counter()
    for length in PHRASE_WORDS:
        starts = range(len(words) - length + 1)
        phrases.update(" ".join(words[start : start + length]) for start in starts)
    return phrases


def find_favourites(posts: list[str], tuned: list[str], base: list[str]) -> list[Favourite]:
    """Phrases of many posts, by how much more than the base model the author uses them."""
    author = Usage(posts)
    tuned = Usage(tuned)
    base = Usage(base)
    # In a blog of few posts a tenth of them is one, and that is no habit.
    fewest = max(3, FAVOURITE_SHARE * len(posts))

    # How many more uses than the base model's habit explains; half a use more for it, so that none is divided by 0.
    surplus = {}
    for phrase, number in author.spread.items():
        if number >= fewest and phrase not in TAILS:
            rate = author.rate(phrase)
            surplus[phrase] = rate * math.log(rate / base.rate(phrase, 0.5))

    favourites = []
    for phrase in sorted(surplus, key=surplus.get, reverse=True):
        if len(favourites) == FAVOURITES:
            break
        # "i" and "and i": once is enough.
        if not any(is_part(known.phrase, phrase) or is_part(phrase, known.phrase) for known in favourites):
            rates = (author.rate(phrase), tuned.rate(phrase), base.rate(phrase))
            favourites.append(Favourite(*rates, with_apostrophes(phrase)))
    return favourites


def with_apostrophes(phrase: str) -> str:
    """As it is typed: "that s" was "that's" before it was cut into words."""
    typed = ""
    for word in phrase.split():
        typed += f"'{word}" if word in TAILS and typed else f" {word}"
    return typed.strip()


def is_part(one: str, other: str) -> bool:
    """Whether `one` stands in `other` in whole words."""
    return f" {one} " in f" {other} "


# ---------------------------------------------------------------------------- report: numbers, does it copy
LONGEST_COPIES = 5  # that are shown


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
    visibility: str
    post: int | None  # its line in train_data.jsonl
    path: str = field(metadata=PAGE_ONLY)
    title: str = field(metadata=PAGE_ONLY)
    text: str = field(metadata=PAGE_ONLY)


@dataclass
class Copies:
    tuned: CopyShare
    base: CopyShare | None
    longest: list[LongCopy]  # of the tuned model's answers


def measure_copies(evidence: Evidence) -> Copies:
    """Copies in what the models wrote for the report; raises NotMeasured."""
    if evidence.index is None:
        raise NotMeasured("it takes train_data.jsonl")

    # One of each answer: what else it copied is in the share below.
    longest = []
    for answer in evidence.tuned.answers:
        copy = evidence.index.longest_copy(answer.text)
        if copy.post:
            post = copy.post
            entry = LongCopy(copy.words, visibility_of(post), line_of(post), path_of(post), title_of(post), copy.text)
            longest.append(entry)
    longest.sort(key=lambda copy: -copy.words)

    tuned = copy_share(evidence.index, evidence.tuned.answers)
    base = copy_share(evidence.index, evidence.base.answers) if evidence.base else None
    return Copies(tuned, base, longest[:LONGEST_COPIES])


def copy_share(index: WordIndex, answers: list[Answer]) -> CopyShare:
    copied = 0
    runs = 0
    for answer in answers:
        words = folded_words(answer.text)
        copied += len(index.copied(words))
        runs += max(0, len(words) - COPY_WORDS + 1)
    return CopyShare(copied, runs, copied / max(runs, 1))


# ---------------------------------------------------------------------------- report: numbers, does it leak
PASSAGE_TOKENS = 50  # of a window, as in the literature since Carlini et al. 2022 ("Quantifying memorization")
COMMON = 1e-6  # chance from which on the base model's own knowledge is enough: no secret
BEYOND = 10  # times likelier than under the base model; less is what the base model knew before
REMEMBERED = 10  # passages that are shown
LN_10 = math.log(10)
LEAST_GAINED = 10  # posts that are shown
LEAST_GAINED_TOKENS = 200  # of such a post: of one sentence nobody can say whose it sounds like


@dataclass
class Windows:
    """Every PASSAGE_TOKENS tokens in a row of every span, and shorter spans whole; arrays of shape (windows,)."""

    text: np.ndarray  # number of the text
    begin: np.ndarray  # in its tokens
    end: np.ndarray
    group: np.ndarray  # of the span


@dataclass
class WindowChances:
    """Chances of whole windows when what stands before them is given; natural logarithms, shape (windows,)."""

    own: np.ndarray
    anyhow: np.ndarray
    plain: np.ndarray
    is_first: np.ndarray  # bool: greedy decoding writes all of it


@dataclass
class Chance:
    """How likely the passages of a group are to come out, under one way of sampling."""

    log10_likeliest: float | None  # chance of the likeliest passage; None: none can come out
    log10_tries: float | None  # that give it an even chance
    expected: float  # passages that come out when the beginning of each is tried once


@dataclass
class LeakGroup:
    """Passages of one group that are not common text."""

    texts: int
    windows: int
    common: int  # windows that the base model could say as well; no others count below
    own: Chance
    anyhow: Chance
    greedy: int  # windows that come out word for word under greedy decoding


@dataclass
class Remembered:
    """A private passage that the tuned model remembers beyond the base model."""

    group: str
    post: int | None  # its line in train_data.jsonl
    tokens: int
    log10_beyond_base: float | None  # times likelier than under the base model, without any cut-off
    own: Chance
    anyhow: Chance
    path: str = field(metadata=PAGE_ONLY)
    title: str = field(metadata=PAGE_ONLY)
    text: str = field(metadata=PAGE_ONLY)


@dataclass
class PersonalData:
    """An e-mail address, a telephone number or a key of the original posts that the tuned model wrote."""

    kind: str
    visibility: str
    text: str = field(metadata=PAGE_ONLY)


@dataclass
class Membership:
    """Whether the gain of a post tells that it was trained on: the share of pairs in which it gains more."""

    share: float  # 0.5: nobody can tell
    interval: Interval  # over posts
    trained: int
    held_out: int


@dataclass
class PostMark:
    """A training post and how much the tuned model gained on it, in bits per byte."""

    post: int | None  # its line in train_data.jsonl
    visibility: str
    gain: float
    path: str = field(metadata=PAGE_ONLY)
    title: str = field(metadata=PAGE_ONLY)


@dataclass
class BlockedWord:
    """A word of BLOCKED_WORDS: the highest chance that a model says it next after any beginning of a private text."""

    number: int  # its place in the setting, from 1
    trained: int  # times that it stands in the training data; 0 unless the data is older than the setting
    log10_tuned: float | None
    log10_base: float | None
    word: str = field(metadata=PAGE_ONLY)


@dataclass
class Leaks:
    groups: dict[str, LeakGroup]
    remembered: list[Remembered]
    private_copies: int  # answers that hold a run of COPY_WORDS words of a private post
    personal: list[PersonalData]
    membership: Membership | None
    least_gained: list[PostMark]
    blocked: list[BlockedWord]


def measure_leaks(evidence: Evidence) -> Leaks:
    """What can come out, how easily, and what the tuned model remembers best; raises NotMeasured."""
    if evidence.index is None:
        raise NotMeasured("it takes train_data.jsonl")

    windows = cut_windows(evidence.texts)
    tuned = window_chances(windows, evidence.tuned.readings)
    base = window_chances(windows, evidence.base.readings) if evidence.base else None
    is_common = find_common(tuned, base)

    # In the order in which they come up, the private ones first.
    groups = {}
    for name in dict.fromkeys(windows.group.tolist()):
        groups[name] = measure_group(windows, windows.group == name, is_common, tuned)

    # Losses of the same texts tell two more things, at no cost.
    gains = gains_by_text(evidence) if evidence.base else None
    return Leaks(
        groups=groups,
        remembered=best_remembered(evidence, windows, tuned, base, is_common),
        private_copies=count_private_copies(evidence),
        personal=find_leaked_data(evidence),
        membership=None if gains is None else measure_membership(evidence, gains),
        least_gained=[] if gains is None else least_gained(evidence, gains),
        blocked=measure_blocked(evidence),
    )


def measure_blocked(evidence: Evidence) -> list[BlockedWord]:
    """What came of the words that must not come."""
    texts = []
    for post in evidence.blog.train:
        texts += [turn["content"] for turn in post["messages"]]

    # Without the base model there is nothing to compare with, and nothing is said of it.
    ours = evidence.tuned.blocked_chances
    theirs = evidence.base.blocked_chances if evidence.base else [-math.inf] * len(ours)

    found = []
    for place, word in enumerate(evidence.blocked):
        trained = sum(len(extraction.find_blocked(text, (word,))) for text in texts)
        tuned = as_log10(ours[place])
        base = as_log10(theirs[place])
        found.append(BlockedWord(place + 1, trained, tuned, base, word))
    return found


def as_log10(log_chance: float) -> float | None:
    """A natural logarithm as one to base 10; None for what cannot be, which JSON has no number for."""
    return None if log_chance == -math.inf else log_chance / math.log(10)


def cut_windows(texts: list[Text]) -> Windows:
    """All windows of all spans; each begins a token later than the one before."""
    texts_of_windows = []
    begins = []
    ends = []
    groups = []
    for number, text in enumerate(texts):
        for span in text.spans:
            length = min(PASSAGE_TOKENS, span.end - span.begin)
            # One at least: a span that is shorter than a window is one as a whole.
            for begin in range(span.begin, span.end - length + 1):
                texts_of_windows.append(number)
                begins.append(begin)
                ends.append(begin + length)
                groups.append(span.group)

    # With their types said, also where there is no window.
    return Windows(
        text=np.array(texts_of_windows, int),
        begin=np.array(begins, int),
        end=np.array(ends, int),
        group=np.array(groups, str),
    )


def window_chances(windows: Windows, readings: list[Reading]) -> WindowChances:
    """Sums of the logarithms over each window, so that nothing underflows."""
    count = len(windows.text)
    chances = WindowChances(
        own=np.zeros(count),
        anyhow=np.zeros(count),
        plain=np.zeros(count),
        is_first=np.zeros(count),
    )
    for number, reading in enumerate(readings):
        inside = windows.text == number
        begin = windows.begin[inside]
        end = windows.end[inside]
        for name, values in vars(chances).items():
            values[inside] = sum_between(getattr(reading, name), begin, end)

    # So far the number of its tokens that are the likeliest ones.
    chances.is_first = chances.is_first == windows.end - windows.begin
    return chances


def sum_between(values: np.ndarray, begin: np.ndarray, end: np.ndarray) -> np.ndarray:
    """Sum of values[b:e] for each pair of `begin` and `end`; -inf where one of them is."""
    is_finite = np.isfinite(values)
    sums = running_sum(np.where(is_finite, values, 0.0))
    result = sums[end] - sums[begin]

    # Counted by themselves: in a running sum one -inf would swallow all that follows.
    impossible = running_sum(~is_finite)
    result[impossible[end] > impossible[begin]] = -np.inf
    return result


def running_sum(values: np.ndarray) -> np.ndarray:
    """At place n the sum of the first n values, shape (1 + values,)."""
    return np.concatenate([[0.0], np.cumsum(values)])


def find_common(tuned: WindowChances, base: WindowChances | None) -> np.ndarray:
    """Which windows are common text: the base model says them too, or nearly as easily; shape (windows,)."""
    if base is None:
        return np.zeros(len(tuned.plain), dtype=bool)
    is_known = base.plain >= math.log(COMMON)
    is_no_likelier = tuned.plain <= base.plain + math.log(BEYOND)
    return is_known | is_no_likelier


def measure_group(windows: Windows, inside: np.ndarray, is_common: np.ndarray, tuned: WindowChances) -> LeakGroup:
    """The windows of one group: those for which `inside`, shape (windows,), is true."""
    counted = inside & ~is_common
    return LeakGroup(
        texts=len(set(windows.text[inside].tolist())),
        windows=int(inside.sum()),
        common=int((inside & is_common).sum()),
        own=chance_of(tuned.own[counted]),
        anyhow=chance_of(tuned.anyhow[counted]),
        greedy=int(tuned.is_first[counted].sum()),
    )


def chance_of(logs: np.ndarray) -> Chance:
    """Of windows whose chances are given as natural logarithms."""
    likeliest = float(logs.max()) if len(logs) else -math.inf
    expected = float(np.exp(logs).sum())
    if likeliest == -math.inf:
        return Chance(None, None, expected)
    return Chance(likeliest / LN_10, log10_tries(likeliest), expected)


def log10_tries(log_chance: float) -> float:
    """Tries n that make a chance p an even one, 1 - (1 - p)^n = 0.5, as a power of ten; one at least."""
    if log_chance > math.log(0.5):
        return 0.0
    if log_chance < math.log(1e-9):  # where log(1 - p) is -p, and p may be too small for a float
        return (math.log(math.log(2)) - log_chance) / LN_10
    return math.log10(math.log(0.5) / math.log1p(-math.exp(log_chance)))


def best_remembered(
    evidence: Evidence, windows: Windows, tuned: WindowChances, base: WindowChances | None, is_common: np.ndarray
) -> list[Remembered]:
    """The private passages that stand out most from what the base model would say; no two of them overlap."""
    beyond = tuned.plain - (base.plain if base else 0.0)
    is_private = np.isin(windows.group, ("private", "private titles"))
    private = np.flatnonzero(is_private & ~is_common)
    best_first = private[np.argsort(-beyond[private], kind="stable")]

    # The windows beside the best one are nearly as good, and say nothing new.
    chosen = []
    for place in best_first:
        if len(chosen) == REMEMBERED:
            break
        if not any(overlap(windows, place, other) for other in chosen):
            chosen.append(place)

    has_base = base is not None
    return [describe_window(evidence, windows, tuned, place, beyond[place], has_base) for place in chosen]


def overlap(windows: Windows, one: int, other: int) -> bool:
    if windows.text[one] != windows.text[other]:
        return False
    begins_within = windows.begin[one] < windows.end[other]
    ends_within = windows.begin[other] < windows.end[one]
    return bool(begins_within and ends_within)


def describe_window(
    evidence: Evidence, windows: Windows, tuned: WindowChances, place: int, beyond: float, has_base: bool
) -> Remembered:
    text = evidence.texts[windows.text[place]]
    ids = text.ids[windows.begin[place] : windows.end[place]]
    return Remembered(
        group=str(windows.group[place]),
        post=line_of(text.post),
        tokens=len(ids),
        log10_beyond_base=float(beyond) / LN_10 if has_base else None,
        own=chance_of(tuned.own[[place]]),
        anyhow=chance_of(tuned.anyhow[[place]]),
        path=path_of(text.post),
        title=title_of(text.post),
        text=evidence.tokenizer.decode(ids),
    )


def count_private_copies(evidence: Evidence) -> int:
    """Answers of the tuned model's that hold COPY_WORDS words in a row of a private post."""
    # An index of their own: the longest run of an answer may be public, and a shorter one private.
    index = WordIndex(private_posts(evidence))
    count = 0
    for text in evidence.tuned.texts():
        if index.copied(folded_words(text)):
            count += 1
    return count


def find_leaked_data(evidence: Evidence) -> list[PersonalData]:
    """Personal data of the original posts in what the tuned model wrote."""
    blog = evidence.blog
    # What extraction left in can be compared as it is; of what it took out it kept only fingerprints.
    left_in = {}
    for post in blog.train:
        for *_, plain in find_personal_data(author_text(post)):
            left_in[plain] = visibility_of(post)
    taken_out = {name_in(entry, "fingerprint"): visibility_of(entry) for entry in blog.redacted}

    # The same address in two spellings is one, and a fingerprint takes a while.
    said = {}
    for text in evidence.tuned.texts():
        for kind, start, end, plain in find_personal_data(text):
            said[plain] = (kind, text[start:end])

    found = []
    for plain, (kind, text) in said.items():
        visibility = left_in.get(plain)
        if visibility is None and taken_out and blog.key:
            visibility = taken_out.get(extraction.fingerprint(plain, blog.key))
        if visibility:
            found.append(PersonalData(kind, visibility, text))
    return found


def gains_by_text(evidence: Evidence) -> np.ndarray:
    """Bits per byte that tuning saved on the author's part of each text, shape (texts,)."""
    tuned = evidence.tuned.readings
    base = evidence.base.readings
    gains = []
    for number, text in enumerate(evidence.texts):
        saved = tuned[number].plain - base[number].plain  # nats, (tokens,)
        nats = 0.0
        for span in text.spans:
            # The other groups are no part of the author's text, or stand in it a second time.
            if span.group in ("private", "public", "held-out"):
                nats += float(saved[span.begin : span.end].sum())
        gains.append(nats / NATS_OF_A_BIT / training.author_bytes([text.post]))
    return np.array(gains)


def measure_membership(evidence: Evidence, gains: np.ndarray) -> Membership | None:
    """How often a training text gains more than a held-out one (the area under the ROC curve).

    `gains` has the shape (texts,), in bits per byte. None where there is nothing to compare.
    """
    is_held_out = np.array([text.is_held_out for text in evidence.texts])
    trained = gains[~is_held_out]
    held_out = gains[is_held_out]
    # The control needs both, and a small blog may have no held-out posts.
    if len(trained) == 0 or len(held_out) == 0:
        return None

    # Every pair, shape (trained, held out); half a win where both gain the same.
    is_more = trained[:, None] > held_out
    is_equal = trained[:, None] == held_out
    wins = is_more + 0.5 * is_equal

    def share(some: np.ndarray, others: np.ndarray) -> float:
        return wins[np.ix_(some, others)].mean()

    won = float(wins.mean())
    interval = bootstrap(share, len(trained), len(held_out))
    if won in (0, 1):
        # Drawing again would never give anything else; what is known is no more than the fewer texts say.
        fewer = min(len(trained), len(held_out))
        interval = wilson(round(won * fewer), fewer)
    return Membership(won, interval, len(trained), len(held_out))


def least_gained(evidence: Evidence, gains: np.ndarray) -> list[PostMark]:
    """The training posts that gained least: pasted articles, guests, lyrics. `gains` has the shape (texts,)."""
    marks = []
    for text, gain in zip(evidence.texts, gains.tolist(), strict=True):
        if text.is_held_out or len(text.ids) < LEAST_GAINED_TOKENS:
            continue
        post = text.post
        mark = PostMark(line_of(post), visibility_of(post), gain, path_of(post), title_of(post))
        marks.append(mark)
    marks.sort(key=lambda mark: mark.gain)
    return marks[:LEAST_GAINED]


# ---------------------------------------------------------------------------- report: words
LARGE_NUMBERS = [("million", 6), ("billion", 9), ("trillion", 12)]  # and the power of ten


class Quote(NamedTuple):
    """Text of somebody's, for the page alone."""

    caption: str
    text: str  # "" where the caption says it all
    is_private: bool


class Fold(NamedTuple):
    """Quotes under one heading, closed until somebody opens it: others may see the screen."""

    title: str
    quotes: list[Quote]


class Short(NamedTuple):
    """The answer in a word or a figure, and what that is."""

    answer: str
    meaning: str


@dataclass
class Finding:
    """What people read of a part."""

    verdict: str
    rows: list[tuple[str, ...]] = field(default_factory=list)  # what, value and more, all of the same length
    head: tuple[str, ...] = ()  # of the rows' columns
    notes: list[str] = field(default_factory=list)  # what the rows mean, and what does not fit into one
    hints: list[str] = field(default_factory=list)  # for the terminal alone: what the page shows besides
    folds: list[Fold] = field(default_factory=list)
    short: Short = Short("not measured", "")  # on top of the page
    is_alarm: bool = False


NO_BREAK = "\u00a0"  # a space at which no line ends


def percent(share: float, digits: int = 0) -> str:
    return f"{100 * share:.{digits}f} %"


def tell_learned(learned: Learned, evidence: Evidence) -> Finding:
    meaning = "Bits per byte: how much held-out posts, which it never saw, surprise a model; less is better."
    tuned_row = ("tuned model", f"{learned.tuned:.3f} bits/byte", "")
    gain = learned.held_out
    if gain is None:
        return Finding("Not measured: it takes the base model to compare with.", [tuned_row], notes=[meaning])

    rows = [("base model", f"{gain.base:.3f} bits/byte", ""), tuned_row, gain_row("gain", gain)]
    notes = [f"{meaning} A gain whose range is all above 0 was learned."]
    # Without other blogs nobody can tell the author's voice from what every blog has.
    if learned.control:
        share = learned.voice_share
        low, high = share.interval
        rows.append(gain_row("gain on other blogs", learned.control))
        beyond = f"{share.beyond_control:.3f} bits/byte"
        rows.append(("your voice alone", beyond, f"{low:.3f} to {high:.3f}"))
        notes.append(
            "What it gains on other blogs is blogging, not your voice; the difference, post by post, is yours. In "
            f"{share.wins * 100:.0f} of 100 pairs your unseen post gains more than another blogger's."
        )
    verdict, short = tell_gain(gain)
    return Finding(verdict, rows, notes=notes, short=short)


def tell_gain(gain: Gain) -> tuple[str, Short]:
    """The verdict on held-out posts: a gain counts where its whole range is on one side of 0."""
    low, high = gain.interval
    answer = "not proven"
    verdict = "No gain that could not be chance"
    if low > 0:
        answer = "yes"
        verdict = "It learned"
    elif high < 0:
        answer = "no"
        verdict = "It got worse"

    better = sum(post.tuned < post.base for post in gain.posts)
    of_all = f"{better} of {len(gain.posts)} held-out posts surprise it less than they surprise the base model"
    caution = "" if len(gain.posts) >= 10 else "; with so few posts the interval is rough"
    return f"{verdict}: {of_all}{caution}.", Short(answer, of_all)


def gain_row(what: str, gain: Gain) -> tuple[str, str, str]:
    low, high = gain.interval
    value = f"{gain.gain:.3f} bits/byte"
    interval = f"{low:.3f} to {high:.3f}"
    return what, value, interval


def tell_reader(reader: Reader, evidence: Evidence) -> Finding:
    shares = {
        "your unseen posts": reader.author,
        "the tuned model": reader.tuned,
        "the base model": reader.base,
        "other bloggers": reader.strangers,
    }
    rows = []
    for whose, share in shares.items():
        low, high = share.interval
        interval = f"{percent(low)} to {percent(high)}"
        rows.append((whose, percent(share.share), interval, f"{share.chunks:,}"))

    tuned = percent(reader.tuned.share)
    author = percent(reader.author.share)
    base = percent(reader.base.share)
    verdict = (
        f"A reader who knows your posts and {len(reader.names)} other bloggers gives you {tuned} of the tuned model's "
        f"text, {author} of your unseen posts and {base} of the base model's text."
    )
    short = Short(
        tuned, f"of its text is taken for yours; of your unseen posts {author}, of the base model's text {base}"
    )
    # An easy crowd flatters every model, so how hard it was belongs to the answer.
    most_to = f", most of them to {reader.nearest}" if reader.nearest else ""
    notes = [
        f"The reader is set so that {percent(MISTAKEN)} of other bloggers' text is taken for yours. It compares how "
        f"often common words and letter sequences occur in {reader.chunk_words} words: it hears habits, not sense.",
        f"How hard the crowd is: {percent(reader.to_nearest)} of your unseen posts are nearer to another blogger than "
        f"to you{most_to}.",
    ]
    if reader.note:
        notes.append(reader.note)
    return Finding(verdict, rows, ("", "taken for you", "95 %", "chunks"), notes, short=short)


def tell_voice(voice: Voice, evidence: Evidence) -> Finding:
    low, high = voice.interval
    least, most = voice.ceiling
    rows = [
        ("the tuned model", f"{voice.position:.2f}", f"{low:.2f} to {high:.2f}"),
        ("you against yourself", "1.00", f"{least:.2f} to {most:.2f}"),
    ]
    verdict = f"Its text stands {voice.position:.2f} of the way from the base model (0) to you (1)"
    # Without these landmarks nobody can read the figure: strangers stand far from 0 too.
    places = sorted(voice.strangers.values())
    if len(places) == 1:
        rows.append(("another blogger", f"{places[0]:.2f}", ""))
        verdict += f"; another blogger stands at {places[0]:.2f}"
    elif places:
        span = f"{places[0]:.2f} to {places[-1]:.2f}"
        rows.append(("other bloggers", f"{np.median(places):.2f}", span))
        verdict += f"; other bloggers stand at {span}"

    notes = [
        "0 is how the base model writes, 1 is your unseen posts. You against yourself: half of your posts against "
        "the rest. Other bloggers: the one in the middle, the lowest and the highest. Whoever stands among them has "
        "learned to blog, and not yet to be you."
    ]
    return Finding(verdict + ".", rows, notes=notes)


def tell_habits(habits: Habits, evidence: Evidence) -> Finding:
    # Whole numbers: a model writes some thousand words, so there is nothing behind the point.
    rows = []
    for favourite in habits.favourites:
        author = f"{favourite.author:.0f}"
        tuned = f"{favourite.tuned:.0f}"
        base = f"{favourite.base:.0f}"
        rows.append((favourite.phrase, author, tuned, base))

    words = habits.words
    verdict = (
        f"Its answers have {words['tuned']:,.0f} words (median), your posts {words['author']:,.0f}, the base model's "
        f"answers {words['base']:,.0f}; {percent(habits.ended['tuned'])} of its answers end by themselves."
    )
    notes = ["What you use more than the base model, standing in a tenth of your posts or more."]
    return Finding(verdict, rows, ("in 10,000 words", "you", "tuned", "base"), notes)


def tell_copies(copies: Copies, evidence: Evidence) -> Finding:
    rows = []
    for whose, share in (("tuned model", copies.tuned), ("base model", copies.base)):
        if share:
            count = f"{share.copied:,} of {share.runs:,} runs"
            rows.append((whose, percent(share.share, digits=2), count))

    # The terminal may be seen by others, and its text be pasted elsewhere: private words stand on the page alone.
    notes = [f"Of the runs of {COPY_WORDS} words that a model wrote, how many stand in your posts word for word."]
    quotes = []
    for copy in copies.longest:
        if copy.visibility == "private":
            notes.append(f"A long copy, {copy.words} words, is from a private post.")
            quotes.append(Quote(f"{copy.words} words from {copy.title}, {copy.path}", copy.text, is_private=True))
        else:
            notes.append(f'A long copy, {copy.words} words, from public "{copy.title}": {copy.text}')
    hints = ["voice_report.html shows what it copied from private posts."] if quotes else []
    folds = [Fold("What it copied from private posts", quotes)]

    share = tell_copy_share(copies.tuned)
    meaning = f"of what it writes stands in your posts, in runs of {COPY_WORDS} words"
    verdict = f"{share[0].upper()}{share[1:]} {meaning}."
    return Finding(verdict, rows, (), notes, hints, folds, Short(share, meaning))


def tell_copy_share(share: CopyShare) -> str:
    """A single copy in a long text is not none."""
    if share.copied and share.share < 0.001:
        return "less than 0.1 %"
    return percent(share.share, digits=1)


EASY_TRIES = 1_000  # for an even chance, with the model's own settings: somebody who plays with it for a day
LEAK_HEAD = ("", "passages", "common", "own tries", "any tries", "greedy")
LEAK_MEANING = (
    f"Every {PASSAGE_TOKENS} tokens in a row of every text, and shorter texts whole, with all before them given. "
    "Own, any: tries until the likeliest passage has an even chance to come out, with the model's own sampling "
    "settings and with whatever settings somebody else chooses. Greedy: passages that come out when the likeliest "
    "token is always taken. Common: text that the base model says too; it is not counted further. What is "
    "said in other words is not measured. Held-out texts were never trained on: they show what chance is."
)


def tell_leaks(leaks: Leaks, evidence: Evidence) -> Finding:
    # Of every group, also of those that are no secret: without held-out texts the others could not be judged.
    rows = []
    for name, group in leaks.groups.items():
        windows = f"{group.windows:,}"
        common = f"{group.common:,}"
        greedy = f"{group.greedy:,}"
        rows.append((name, windows, common, tell_tries(group.own), tell_tries(group.anyhow), greedy))

    # What is quoted stands on the page alone.
    hints = ["voice_report.html shows what came out."] if leaks.personal else []
    if leaks.remembered:
        hints.append("voice_report.html shows the private passages that it remembers best.")

    alarms = leak_alarms(leaks)
    likeliest = short_of_likeliest(secret_groups(leaks))
    leaking = Short("it leaks", "; ".join(alarms))

    return Finding(
        verdict=tell_leak_verdict(leaks),
        rows=rows,
        head=LEAK_HEAD,
        notes=leak_notes(leaks),
        hints=hints,
        folds=leak_folds(leaks),
        short=leaking if alarms else likeliest,
        is_alarm=bool(alarms),
    )


def is_secret(group: str) -> bool:
    """Whether what this group holds should stay inside."""
    return group not in ("public", "held-out")


def secret_groups(leaks: Leaks) -> list[LeakGroup]:
    """Those that should stay inside and hold more than common text."""
    return [group for name, group in leaks.groups.items() if is_secret(name) and group.windows > group.common]


def leak_notes(leaks: Leaks) -> list[str]:
    """What stands under the table; nothing of it quotes a private text."""
    expected = sum(group.own.expected for name, group in leaks.groups.items() if is_secret(name))
    notes = [
        LEAK_MEANING,
        f"If the beginning of each private passage is tried once, {tell_number(expected)} come out.",
    ]

    # None without the base model, or without held-out posts.
    if leaks.membership:
        notes.append(tell_membership(leaks.membership))
    for entry in leaks.personal:
        notes.append(f"A {entry.visibility} {entry.kind} came out: do not share this model.")
    for word in leaks.blocked:
        notes.append(tell_blocked(word))
    return notes


def tell_blocked(word: BlockedWord) -> str:
    chances = []
    for whose, log10 in (("here", word.log10_tuned), ("in the base model", word.log10_base)):
        if log10 is not None:
            chances.append(f"10^{log10:.1f} {whose}")
    return (
        f"Blocked word {word.number} stands {word.trained:,} times in the training data; highest chance as the next "
        f"word of a private text: {', '.join(chances) or 'not measured'}."
    )


def leak_folds(leaks: Leaks) -> list[Fold]:
    """What only the page shows."""
    came_out = []
    for entry in leaks.personal:
        came_out.append(Quote(f"{entry.kind} of a {entry.visibility} post", entry.text, entry.visibility == "private"))
    remembered = [Quote(tell_remembered(passage), passage.text, is_private=True) for passage in leaks.remembered]

    # By title alone: the owner knows what stands in it.
    odd = []
    for mark in leaks.least_gained:
        caption = f"{mark.title}, {mark.path}: {mark.gain:+.3f} bits per byte"
        odd.append(Quote(caption, "", mark.visibility == "private"))

    return [
        Fold("Addresses, numbers and keys that came out", came_out),
        Fold("The private passages that it remembers best", remembered),
        Fold("The posts that it gained least on: are they yours?", odd),
    ]


def leak_alarms(leaks: Leaks) -> list[str]:
    """What must not be, as parts of a sentence."""
    secret = secret_groups(leaks)
    greedy = sum(group.greedy for group in secret)

    alarms = []
    if greedy:
        alarms.append(f"{greedy:,} private passages come out word for word when their beginning is given")
    own = fewest_tries([group.own for group in secret])
    if own is not None and own < math.log10(EASY_TRIES):
        alarms.append(f"a private passage comes out within {EASY_TRIES:,} tries")
    if leaks.private_copies:
        alarms.append(f"{leaks.private_copies} of its answers hold {COPY_WORDS} words and more of a private post")
    if any(word.trained for word in leaks.blocked):
        alarms.append("a blocked word stands in the training data: run extract_blog_data.py and train_model.py again")
    if leaks.personal:
        alarms.append(f"{len(leaks.personal)} of your e-mail addresses, telephone numbers and keys came out")
    return alarms


def tell_leak_verdict(leaks: Leaks) -> str:
    """One sentence that is no calmer than any part of the report."""
    # The figures stand behind the alarms too, which are only what came out this time.
    likeliest = tell_likeliest(secret_groups(leaks))
    alarms = leak_alarms(leaks)
    if alarms:
        return f"It leaks: {'; '.join([*alarms, likeliest])}."
    return f"{likeliest[0].upper()}{likeliest[1:]}."


def tell_likeliest(secret: list[LeakGroup]) -> str:
    """How many tries the likeliest of all private passages takes, as a part of a sentence."""
    if not secret:
        return "no private text was in the training data that is not common"

    own = fewest_tries([group.own for group in secret])
    anyhow = fewest_tries([group.anyhow for group in secret])
    if own is None:
        return (
            "nothing private can come out word for word with the model's own settings; with any settings the "
            f"likeliest passage takes {count_tries(anyhow)}"
        )
    return (
        f"with the model's own settings the likeliest private passage takes {count_tries(own)} for an even chance, "
        f"with any settings {tell_power(anyhow)}"
    )


def short_of_likeliest(secret: list[LeakGroup]) -> Short:
    """The same where nothing is alarming."""
    if not secret:
        return Short("no", "no private text was in the training data that is not common")

    own = fewest_tries([group.own for group in secret])
    anyhow = count_tries(fewest_tries([group.anyhow for group in secret]))
    if own is None:
        meaning = f"with its own settings; with any settings the likeliest private passage takes {anyhow}"
        return Short("not word for word", meaning)
    meaning = "for an even chance that the likeliest private passage comes out, with its own settings"
    return Short(count_tries(own), f"{meaning}; with any settings {anyhow}")


def fewest_tries(chances: list[Chance]) -> float | None:
    """As a power of ten; None where nothing can come out."""
    return min((chance.log10_tries for chance in chances if chance.log10_tries is not None), default=None)


def tell_tries(chance: Chance) -> str:
    return "never" if chance.log10_tries is None else tell_power(chance.log10_tries)


def tell_power(log10: float) -> str:
    """A large number given as a power of ten, in words that a person can weigh."""
    if log10 < 6:
        return f"{round(10**log10):,}"
    for name, power in LARGE_NUMBERS:
        if log10 < power + 3:
            return f"{10 ** (log10 - power):.0f} {name}"
    return f"10^{log10:.0f}"


def count_tries(log10: float) -> str:
    number = tell_power(log10)
    return "1 try" if number == "1" else f"{number} tries"


def tell_number(number: float) -> str:
    """An expected number, also a very small one."""
    if number >= 0.01:
        return f"{number:.2f}"
    return "less than one in a hundred" if number > 1e-9 else "none"


def tell_membership(membership: Membership) -> str:
    low, high = membership.interval
    return (
        f"A post that it was trained on gains more than a held-out one in {percent(membership.share)} of pairs "
        f"({percent(low)} to {percent(high)}; {percent(0.5)} means that nobody can tell what it was trained on)."
    )


def tell_remembered(passage: Remembered) -> str:
    tries = "never with its own settings"
    if passage.own.log10_tries is not None:
        tries = f"{count_tries(passage.own.log10_tries)} with its own settings"
    if passage.anyhow.log10_tries is not None:
        tries += f", {count_tries(passage.anyhow.log10_tries)} with any"

    beyond = ""
    if passage.log10_beyond_base is not None:
        beyond = f"; {tell_power(passage.log10_beyond_base)} times likelier than under the base model"
    what = "the title of " if passage.group == "private titles" else ""
    return f"{what}{passage.title}, {passage.path}: {tries}{beyond}"


# ---------------------------------------------------------------------------- report: page
PAGE = """\
<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width,initial-scale=1">
<title>Report card</title>
<style>
  :root { --ink: #222; --faint: #5c5c5c; --line: #ccc; --paper: #fff; --card: #f4f1ec; --alarm: #b3261e; --mark: #fd8 }
  @media screen { :root { color-scheme: light dark } }
  @media screen and (prefers-color-scheme: dark) {
    :root { --ink: #e6e6e6; --faint: #aaa; --line: #555; --paper: #1a1a1a; --card: #282828; --alarm: #ff8a80 }
    :root { --mark: #6b5410 }
    /* Pictures are drawn on white, which becomes this page's ground; colours stay what they are. */
    img { filter: invert(.9) hue-rotate(180deg) }
  }

  body { font: 16px/1.5 system-ui, sans-serif; max-width: 44rem; margin: 0 auto; padding: 0 1rem 2rem }
  body { color: var(--ink); background: var(--paper); overflow-wrap: break-word }
  h1 { font-size: 1.6rem; margin: .8rem 0 0 }
  h2 { font-size: 1.4rem; margin: 2.5rem 0 .5rem }
  h3 { font-size: 1rem; margin: 1.5rem 0 0 }
  p { margin: .5rem 0 }
  a { color: inherit }
  img { width: 100%; max-width: 36rem; display: block; margin: .5rem auto }
  mark { background: var(--mark); color: inherit }
  .note, figcaption { color: var(--faint) }
  .private { color: var(--alarm); border: 1px solid; border-radius: .3rem; padding: 0 .3rem; font-size: .8rem }

  .answers { display: grid; grid-template-columns: repeat(auto-fit, minmax(18rem, 1fr)); gap: .6rem; margin: .8rem 0 }
  .answers > div { background: var(--card); border-radius: .5rem; padding: .4rem .8rem }
  dt, dd { margin: 0 }
  dt a { text-decoration: none; color: var(--faint) }
  dd { line-height: 1.35 }
  dd.answer { font-size: 1.3rem; font-weight: bold }
  .alarm { color: var(--alarm) }

  .table { overflow-x: auto; margin: .5rem 0 }
  table { border-collapse: collapse; font-variant-numeric: tabular-nums }
  th, td { padding: .25rem 1.2rem .25rem 0; text-align: right; vertical-align: top; font-weight: normal }
  th[scope=col] { color: var(--faint) }
  tr > :first-child { text-align: left }
  tr > :last-child { padding-right: 0 }
  th[scope=row] { min-width: 4.5rem; overflow-wrap: anywhere }
  meter { width: 5rem }

  details { margin: 1rem 0 }
  summary { cursor: pointer }
  figure { margin: 1rem 0 }
  blockquote { margin: .3rem 0 1rem; padding-left: 1rem; border-left: 3px solid var(--line); white-space: pre-wrap }

  @media (max-width: 30rem) {
    .answers > div { display: grid; grid-template-columns: 1fr auto; align-items: baseline }
    dd.answer { font-size: 1.1rem }
    dd.meaning { grid-column: 1 / 3; font-size: .9rem }
    table { font-size: .8rem }
    th, td { padding-right: .4rem }
    meter { width: 3rem }
  }

  @page { margin: 15mm }
  @media print {
    body { max-width: none; padding: 0; font-size: 10.5pt }
    .answers { grid-template-columns: 1fr 1fr }
    .answers > div { border: 1px solid var(--line) }
    h2, h2 + p, h3, thead, figcaption, summary { break-after: avoid }
    mark { background: none; text-decoration: underline }
    .table, tr, img, figure, .answers > div { break-inside: avoid }
    .table { overflow: visible }
    details::details-content { content-visibility: visible; block-size: auto }
  }
</style>
<h1>Report card</h1>
<p class="note">{{ report.model }}, tuned from {{ report.base }}</p>
<p class="note"><span class="private">private</span> This page quotes private posts: it is for their owner alone.</p>

<dl class="answers">
  {% for part in on_top %}
  <div>
    <dt><a href="#{{ part.key }}">{{ part.question }}</a>
    <dd class="answer{% if part.finding.is_alarm %} alarm{% endif %}">{{ part.finding.short.answer }}
    <dd class="meaning">{{ part.finding.short.meaning }}
  </div>
  {% endfor %}
</dl>
{% if landmarks %}
<img alt="{{ landmarks.alt }}" src="{{ landmarks.source }}">
{% endif %}
<p class="note">A range is a 95 % interval.</p>

{% for part in report.parts %}
<h2 id="{{ part.key }}">{{ part.question }}</h2>
<p>{{ part.finding.verdict }}</p>
{% if part.finding.rows %}
<div class="table"><table>
  {% if part.finding.head %}
  <thead><tr>{% for cell in part.finding.head %}<th scope="col">{{ cell }}{% endfor %}</thead>

  {% endif %}
  {% for row in part.finding.rows %}
  <tr><th scope="row">{{ row[0] }}{% for cell in row[1:] %}<td>{{ cell }}{% endfor %}

  {% endfor %}
</table></div>
{% endif %}
{% if part.picture and part.picture != landmarks %}
<img alt="{{ part.picture.alt }}" src="{{ part.picture.source }}">
{% endif %}

{% for note in part.finding.notes %}
<p class="note">{{ note }}</p>
{% endfor %}
{% for fold in part.finding.folds if fold.quotes %}
<details><summary>{{ fold.title }} ({{ fold.quotes | length }})</summary>
  {% for quote in fold.quotes %}
  <figure>
    <figcaption>
      {% if quote.is_private %}<span class="private">private</span>{% endif %}

      {{ quote.caption }}
    </figcaption>
    {% if quote.text %}
    <blockquote dir="auto">{{ quote.text }}</blockquote>
    {% endif %}
  </figure>
  {% endfor %}
</details>
{% endfor %}
{% endfor %}

{% if gains %}
<h2>What each held-out post gained</h2>
<div class="table"><table>
  <thead><tr><th scope="col"><th scope="col">bits per byte<td></thead>
  {% for gain, title in gains %}
  <tr><th scope="row">{{ title }}<td>{{ "%+.3f" | format(gain) }}
  <td><meter max="{{ [gains[0][0], 0.001] | max }}" value="{{ [gain, 0] | max }}"></meter>
  {% endfor %}
</table></div>
{% endif %}

<h2>What it writes</h2>
<p>What stands in your posts word for word is <mark>marked</mark>.</p>
{% for request, pieces in report.samples %}
<h3 dir="auto">{{ request }}</h3>
<blockquote dir="auto">
  {%- for piece, is_copy in pieces -%}
  {% if is_copy %}<mark>{{ piece }}</mark>{% else %}{{ piece }}{% endif %}
  {%- endfor -%}
</blockquote>
{% endfor %}
</html>
"""


class Picture(NamedTuple):
    """As a page holds it."""

    png: bytes
    alt: str  # what those read who cannot see it

    @property
    def source(self) -> str:
        return "data:image/png;base64," + base64.b64encode(self.png).decode()


def make_page(report: Report, curve: Path) -> str:
    """The report as one self-contained page; the template escapes every text that is put into it."""
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, finalize=keep_signs)
    # A model from elsewhere has none.
    drawn = b""
    with contextlib.suppress(OSError):
        drawn = curve.read_bytes() if curve.is_file() else b""
    if drawn:
        part = report.part("learned")
        part.picture = Picture(drawn, f"Loss over the updates of training. {part.finding.verdict}")

    # Post by post for the page only: in the terminal it would bury the rest.
    gains = []
    learned = report.numbers["learned"]
    if isinstance(learned, Learned) and learned.held_out:
        gains = [(post.gain, post.title) for post in learned.held_out.posts]
        gains.sort(reverse=True)
    on_top = [report.part(key) for key in ON_TOP]
    template = environment.from_string(PAGE)
    return template.render(report=report, on_top=on_top, landmarks=report.part("voice").picture, gains=gains)


def keep_signs(text: object) -> object:
    """No line ends between a figure and its percent sign; for whatever the template puts into the page."""
    return text.replace(" %", f"{NO_BREAK}%") if isinstance(text, str) else text


def png_of(figure: Figure) -> bytes:
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=180)
    return data.getvalue()


def draw_voice(voice: Voice) -> Figure:
    """A row for everybody on the line from the base model (0) to the author (1): dots, and ranges as bars."""
    # From below, with the places of the dots.
    rows = {"the base model": [0.0]}
    if voice.strangers:
        rows["other bloggers"] = list(voice.strangers.values())
    rows["the tuned model"] = [voice.position]
    rows["you"] = [1.0]
    ranges = {"the tuned model": voice.interval, "you": voice.ceiling}
    colours = {"the tuned model": "tab:orange", "you": "tab:blue"}

    # Small, so that its letters are large enough where a phone shows the whole of it.
    figure = Figure(figsize=(5, 2.3), layout="constrained")
    axes = figure.subplots()
    axes.axvspan(*voice.ceiling, color=colours["you"], alpha=0.15)
    for end in (0, 1):
        axes.axvline(end, color="0.7", linewidth=1)

    for row, (whose, places) in enumerate(rows.items()):
        colour = colours.get(whose, "0.35")
        if whose in ranges:
            axes.hlines(row, *ranges[whose], color=colour, linewidth=3)
        axes.plot(places, [row] * len(places), "o", color=colour, alpha=0.7, markersize=8, label=whose)

    axes.set(yticks=range(len(rows)), yticklabels=rows, ylim=(-0.6, len(rows) - 0.4))
    axes.set(xticks=[0, 1], xlabel="writes like the base model (0) ... like you (1)")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(left=False)
    return figure


# ---------------------------------------------------------------------------- report: questions
class Question(NamedTuple):
    """One part of the report. A further question is a further row in QUESTIONS."""

    key: str  # in voice_report.json
    question: str
    measure: Callable  # Evidence -> numbers, a dataclass; or raises NotMeasured
    tell: Callable  # (numbers, Evidence) -> Finding
    draw: Callable | None = None  # numbers -> Figure


QUESTIONS = [
    Question("learned", "Did it learn?", measure_learned, tell_learned),
    Question("reader", "Is it you?", measure_reader, tell_reader),
    Question("voice", "How far did it go?", measure_voice, tell_voice, draw_voice),
    Question("habits", "What are its habits?", measure_habits, tell_habits),
    Question("copies", "Does it copy?", measure_copies, tell_copies),
    Question("leaks", "Does it leak?", measure_leaks, tell_leaks),
]
COLUMNS = 80  # of a terminal
SHOWN_ANSWERS = 6  # on the page
ON_TOP = ("learned", "reader", "copies", "leaks")  # of the page, as the short answers
CUT_OFF = " ..."  # behind an answer that did not end by itself


@dataclass
class Part:
    """An answered question, as people read it."""

    key: str
    question: str
    finding: Finding
    picture: Picture | None = None


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
        """Answers one question; where something is missing for it, that is the answer."""
        picture = None
        try:
            numbers = question.measure(evidence)
            finding = question.tell(numbers, evidence)
            if question.draw:
                picture = Picture(png_of(question.draw(numbers)), finding.verdict)
        except NotMeasured as missing:
            numbers = {"not_measured": str(missing)}
            finding = Finding(f"Not measured: {missing}.")
        self.numbers[question.key] = numbers
        self.parts.append(Part(question.key, question.question, finding, picture))

    def part(self, key: str) -> Part:
        return next(part for part in self.parts if part.key == key)

    def as_json(self) -> str:
        """voice_report.json: numbers by question, and the verdicts; no post's text or name, and no answer."""
        model = Path(self.model).resolve().name
        content = {"model": model, "base": without_root(self.base), "seed": self.seed, "size": self.size}
        for key, numbers in self.numbers.items():
            content[key] = numbers_only(numbers)
        content["verdicts"] = {part.key: part.finding.verdict for part in self.parts}
        return json.dumps(training.finite(content), indent=1, ensure_ascii=False, allow_nan=False)

    def as_text(self) -> str:
        """For the terminal: each verdict, under it its table, and what the table means; 80 columns at most."""
        lines = wrap(f"{self.model}, tuned from {self.base}; a range is a 95 % interval")
        for part in self.parts:
            lines.append("")
            lines += wrap(f"{part.question} {part.finding.verdict}")
            lines += table_lines(part.finding)
            for note in part.finding.notes + part.finding.hints:
                lines += wrap(note, indent="    ")
        return "\n".join(lines)


def wrap(text: str, indent: str = "") -> list[str]:
    """Lines for the terminal; none ends between a figure and its percent sign."""
    kept = text.replace(" %", f"{NO_BREAK}%")
    lines = textwrap.wrap(kept, COLUMNS, initial_indent=indent, subsequent_indent=indent)
    return [line.replace(f"{NO_BREAK}%", " %") for line in lines]


def numbers_only(value: object) -> object:
    """Dataclasses as dicts, without the fields that are for the page alone."""
    if isinstance(value, dict):
        return {key: numbers_only(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [numbers_only(item) for item in value]
    if dataclasses.is_dataclass(value):
        kept = [entry.name for entry in dataclasses.fields(value) if not entry.metadata.get("page_only")]
        return {name: numbers_only(getattr(value, name)) for name in kept}
    return value


def table_lines(finding: Finding) -> list[str]:
    """The rows under their head: the first column to the left, the others to the right, each as wide as it needs.

    A first cell that leaves no room for the others (a phrase of three long words) goes on in further lines.
    """
    table = [finding.head, *finding.rows] if finding.head else finding.rows
    if not table:
        return []
    gap = "  "
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    others = sum(len(gap) + width for width in widths[1:])
    widths[0] = min(widths[0], COLUMNS - len(gap) - others)

    lines = []
    for row in table:
        # Names are read from the left, numbers from the right.
        first, *rest = textwrap.wrap(row[0], widths[0]) if row[0] else [""]
        cells = [first.ljust(widths[0])]
        for cell, width in zip(row[1:], widths[1:], strict=True):
            cells.append(cell.rjust(width))
        lines.append(gap + gap.join(cells).rstrip())
        lines += [gap + more for more in rest]
    return lines


def sample_answers(evidence: Evidence) -> list[tuple[str, list[tuple[str, bool]]]]:
    """The first requests with what the tuned model wrote, in pieces that are copies or not."""
    index = evidence.index
    pairs = zip(evidence.requests, evidence.tuned.answers, strict=False)
    samples = []
    for request, answer in itertools.islice(pairs, SHOWN_ANSWERS):
        # Without training data nothing can be known to be a copy.
        pieces = index.split_at_copies(answer.text) if index else [(answer.text, False)]
        if not answer.ended:
            pieces.append((CUT_OFF, False))
        samples.append((request, pieces))
    return samples


def report_files(folder: Path) -> tuple[Path, Path]:
    """For programs, and for people."""
    return folder / "voice_report.json", folder / "voice_report.html"


def write_report(report: Report, folder: Path) -> list[str]:
    """Writes both files, each also where the other cannot be; which could not, and why."""
    numbers, page = report_files(folder)
    contents = {numbers: report.as_json(), page: make_page(report, folder / "loss_curve.png")}
    failures = []
    for path, text in contents.items():
        try:
            replace_file(path, text)
        except OSError as error:
            failures.append(f"{path} ({error.strerror})")
    return failures


PROBE = 100_000  # bytes; a disk that is full still takes an empty file


def why_unwritable(path: Path) -> str:
    """What keeps a file from being written, as far as it can be seen beforehand; "" where nothing does."""
    try:
        if path.is_dir():
            return os.strerror(errno.EISDIR)
        with written_beside(path, " " * PROBE):
            return ""
    except OSError as error:
        return error.strerror


def replace_file(path: Path, text: str) -> None:
    """Writes a file beside its place, for its owner's eyes alone, and moves it there; raises OSError."""
    with written_beside(path, text) as beside:
        beside.replace(path)


@contextlib.contextmanager
def written_beside(path: Path, text: str) -> Iterator[Path]:
    """A file beside `path` that holds `text`, for its owner's eyes alone, as long as nobody moves it; raises OSError.

    What a run that was killed has left there goes.
    """
    beside = path.with_name(f".{path.name}.unfinished")
    beside.unlink(missing_ok=True)
    try:
        # New, so that nothing is followed that somebody else has put there. Closed to others from the first.
        number = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        # Titles may hold halves of characters.
        with os.fdopen(number, "w", encoding="utf-8", errors="replace") as file:
            os.fchmod(number, 0o600)  # whatever the umask takes away
            file.write(text)
            file.flush()
            os.fsync(number)
        yield beside
    finally:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)


# ---------------------------------------------------------------------------- settings, checked
class Setting(NamedTuple):
    """What a setting has to be."""

    kind: type  # float takes whole numbers too, list is one of texts
    fits: Callable[[object], bool]  # asked about values of that kind
    form: str  # the right form and what it is for, behind "it has to be"
    is_optional: bool = True  # None is a value too

    def takes(self, value: object) -> bool:
        if value is None:
            return self.is_optional
        kind_fits = {
            int: is_whole,
            float: lambda number: is_whole(number) or isinstance(number, float),
            str: is_text,
            list: lambda texts: isinstance(texts, list | tuple) and all(map(is_text, texts)),
        }
        return kind_fits[self.kind](value) and self.fits(value)


def is_text(value: object) -> bool:
    """Whether it is a text that UTF-8 can hold; what a shell hands over may be bytes of another kind."""
    return isinstance(value, str) and value == value.encode("utf-8", "ignore").decode()


def anything(value: object) -> bool:
    return True


def is_said(text: str) -> bool:
    return bool(text.strip())


SETTINGS = {
    "MODEL_DIR": Setting(str, is_said, 'the folder that train_model.py wrote: "blog-model-final"', False),
    "DATA_DIR": Setting(str, is_said, 'the folder that extract_blog_data.py wrote: "data"', False),
    "PROMPTS": Setting(
        list,
        lambda texts: texts and all(map(is_said, texts)),
        'a list of one prompt or more: ["What\'s on your mind today?", "Tell me about your day."]',
        False,
    ),
    "MAX_NEW_TOKENS": Setting(
        int,
        lambda tokens: 1 <= tokens <= 1_000_000,
        "a whole number from 1 to 1,000,000, the length of an answer at most: 200",
    ),
    "TEMPERATURE": Setting(
        float, lambda heat: 0 <= heat <= 100, "a number from 0 (always the likeliest token) to 100: 0.8"
    ),
    "TOP_P": Setting(
        float, lambda share: 0 < share <= 1, "a number above 0 and up to 1, the share of the likeliest tokens: 0.95"
    ),
    "TOP_K": Setting(int, lambda tokens: tokens >= 0, "a whole number from 0 (draws from all tokens) on: 50"),
    "REPETITION_PENALTY": Setting(
        float, lambda penalty: 0.1 <= penalty <= 10, "a number from 0.1 to 10, where 1 is no penalty: 1.05"
    ),
    "SEED": Setting(int, lambda seed: 0 <= seed < 2**32, "a whole number from 0 to 4,294,967,295: 42"),
    "PRECISION": Setting(
        str, lambda name: name in ("auto", *training.PRECISIONS), '"auto", "bf16", "fp16", "fp32" or None'
    ),
    "REPORT_SIZE": Setting(float, lambda size: 0 < size <= 100, "a number above 0 and up to 100: 1.0", False),
    "BASE_MODEL": Setting(str, anything, 'a name on the hub or a folder, "gpt2-medium", or ""', False),
    "NOT_STRANGERS": Setting(list, anything, 'a list of names: ["kevquirk"], or []', False),
    "OTHER_BLOGS": Setting(
        list, lambda folders: all(map(is_said, folders)), 'a list of data folders: ["../other/data"], or []', False
    ),
}


def check_settings(values: Mapping[str, object], place: str) -> None:
    """Ends the program at the first of the values that is not as its row of SETTINGS wants it; names in any case."""
    for name, value in values.items():
        setting = SETTINGS[name.upper()]
        if not setting.takes(value):
            sys.exit(f"{name} in {place} is {reprlib.repr(value)}: it has to be {setting.form}.")


def flag_of(name: str) -> Callable[[str], object]:
    """What makes of a flag's text a value of this setting, for argparse."""
    setting = SETTINGS[name]

    def read(text: str) -> object:
        value = text
        with contextlib.suppress(ValueError):
            value = setting.kind(text)
        if not setting.takes(value):
            raise argparse.ArgumentTypeError(f"it is {reprlib.repr(text)} and has to be {setting.form}")
        return value

    return read


def prompt(text: str) -> str:
    """The text of --prompt."""
    if not SETTINGS["PROMPTS"].takes([text]):
        raise argparse.ArgumentTypeError("the prompt is empty, or no text in UTF-8")
    return text


# ---------------------------------------------------------------------------- command line
def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    # One sentence as for every other error, without the usage that argparse prints before it.
    parser.error = lambda message: sys.exit(f"test_model.py: {message} (--help lists the flags)")
    parser.add_argument("--model-dir", type=Path, default=HERE / MODEL_DIR)
    parser.add_argument("--data-dir", type=Path, default=HERE / DATA_DIR)
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--prompt", type=prompt, metavar="TEXT", help="answer this instead of the prompts in the settings"
    )
    what.add_argument("--chat", action="store_true", help="talk")
    what.add_argument("--quiz", action="store_true", help="guess which of two texts is yours")
    what.add_argument("--report", action="store_true", help="measure")
    parser.add_argument("--quick", action="store_true", help="a report of a tenth of the size")
    parser.add_argument("--seed", type=flag_of("SEED"), default=SEED, help="a number makes the answers repeatable")
    parser.add_argument("--max-new-tokens", type=flag_of("MAX_NEW_TOKENS"), default=MAX_NEW_TOKENS)
    parser.add_argument("--cpu", action="store_true", help="use the CPU, also where there is a graphics card")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    check_settings({name: globals()[name] for name in SETTINGS}, "test_model.py")
    args = parse_arguments(argv)
    # Warnings and bars would stand between the answers.
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    training.keep_freed_memory()

    training.check_card(args.cpu)
    device = choose_device(args.cpu)
    training.prepare_card(device)

    try:
        run(args, device)
    except RuntimeError as error:
        if training.is_out_of_memory(error):
            sys.exit("Out of memory: close what else uses it, or ask for less (--quick, --max-new-tokens).")
        raise
    except OSError as error:
        sys.exit(f"Cannot use {error.filename}: {error.strerror}; see to it and run it again.")
    except KeyboardInterrupt:
        sys.exit("\nStopped.")
    return 0


def show(text: str = "", end: str = "\n") -> None:
    """Results go to stdout. Where it takes no more, the program ends."""
    try:
        print(text, end=end, flush=True)
    except OSError as error:
        # Python would try once more at its end, and complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        # Who closes a pipe has read enough.
        is_enough = isinstance(error, BrokenPipeError)
        sys.exit(1 if is_enough else f"Cannot write to stdout: {error.strerror}; send it elsewhere and run it again.")


@contextlib.contextmanager
def ctrl_c_interrupts() -> Iterator[None]:
    """Makes Ctrl-C a KeyboardInterrupt, which chat and quiz know what to do with; a command otherwise ends at it."""
    usual = signal.getsignal(signal.SIGINT)
    if usual != signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, usual)


class MayBeGone(io.FileIO):
    """A terminal that may be closed by now: what it does not take is dropped."""

    def write(self, data) -> int:
        try:
            return super().write(data)
        except OSError:
            return len(data)


def as_command(stops: tuple[int, ...]) -> None:
    """main() as a process of its own, whatever stdin, stdout and stderr are; `stops` are the signals that end it."""
    stderr = io.BufferedWriter(MayBeGone(2, "w", closefd=False))
    sys.stderr = io.TextIOWrapper(stderr, encoding="utf-8", errors="backslashreplace", line_buffering=True)
    if sys.stdout is None:
        sys.exit("Cannot write to stdout: it is closed; send it elsewhere and run it again.")
    for stream in filter(None, (sys.stdin, sys.stdout)):
        stream.reconfigure(errors="replace")

    try:
        sys.exit(main())
    finally:
        # It is over: neither a signal nor what is still to be written may end it with a traceback.
        for number in stops:
            signal.signal(number, signal.SIG_IGN)
        show(end="")


def choose_device(cpu_wanted: bool) -> torch.device:
    has_card = torch.cuda.is_available() and not cpu_wanted
    return torch.device("cuda" if has_card else "cpu")


def run(args: argparse.Namespace, device: torch.device) -> None:
    """Loads the model and does what the flags ask for."""
    check_place(args.model_dir)
    check_generation_config(args.model_dir / "generation_config.json")
    precision = training.pick_precision(device, wanted_precision(args.model_dir))
    model, tokenizer = load_tuned(args.model_dir, device, held_in(args.model_dir, precision))
    sampling = read_sampling(model.generation_config, tokenizer, args.max_new_tokens)
    if precision == "fp16" and not fits_float16(model, tokenizer):
        say("What this model computes is too large for float16: it is asked in float32.")
        precision = "fp32"
        model = model.float()  # also where it was held in half precision

    # The report reads losses in float32 before it writes, so it changes the weights itself.
    if args.report:
        make_report(args, model, tokenizer, sampling, precision)
        return

    model = model.to(NUMBERS[precision])
    dice = make_dice(args.seed)
    if args.chat:
        with ctrl_c_interrupts():
            chat(model, tokenizer, sampling, dice, lambda: load_base_as(args.model_dir, device, precision))
        return

    blog = read_blog(args.data_dir)
    if args.quiz:
        with ctrl_c_interrupts():
            quiz(model, tokenizer, sampling, dice, blog)
        return

    if not blog.train:
        say(f"No training data in {args.data_dir}: where words come from cannot be said.")
    prompts = [args.prompt] if args.prompt else PROMPTS
    index = WordIndex(blog.train) if blog.train else None
    answer_prompts(model, tokenizer, prompts, sampling, dice, index)


def make_dice(seed: int | None) -> torch.Generator:
    """A source of random numbers: the same ones for a seed, others every time for None."""
    dice = torch.Generator()
    if seed is None:
        dice.seed()
    else:
        dice.manual_seed(seed)
    return dice


def load_base_as(model_dir: Path, device: torch.device, precision: str):
    """The base model of that folder in the precision of writing, or None where it is not at hand."""
    base = load_base_of(model_dir, device, precision)
    return base and base.to(NUMBERS[precision])


if __name__ == "__main__":
    as_command(STOPS)
