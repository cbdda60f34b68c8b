"""Let the tuned model write, talk to it, and measure it: does it sound like you, does it give private posts away?

    python test_model.py                    answers the prompts in the settings
    python test_model.py --prompt "TEXT"    answers this one
    python test_model.py --begin "TEXT"     goes on from these words, with --prompt as an answer to it
    python test_model.py --chat             a conversation in the terminal
    python test_model.py --page             the same on a page in the browser (after `make page`)
    python test_model.py --quiz             two texts: which one did you write? Answer 1 or 2
    python test_model.py --report           measures, and writes voice_report.json and voice_report.html
    python test_model.py --report --quick   a tenth of the words, with wide ranges
    python test_model.py --report --explain what each row means, too

Reads blog-model-final/, data/ (what it was trained on, and the held-out posts) and, for the report, the base model and
sample/strangers/strangers.npz. The two report files go into blog-model-final/, readable by their owner only: the page
quotes private posts.

Sections: settings; command line (first, because the libraries after it need seconds to load); the run, one function a
mode; chatting; quiz; start and end. Loading, sampling and every question of the report are modules of voice/.
"""

# ruff: noqa: E402 - settings are on top; the command line is read before the libraries are loaded, which takes seconds
from __future__ import annotations

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
MAX_NEW_TOKENS = None  # at most in an answer: as many as nine of ten posts have; 200 tokens are about 150 words
TEMPERATURE = None  # 0 always takes the likeliest token; 0.7 careful, 1.0 as the model has it, above that wild
TOP_P = None  # share of the likeliest tokens that are drawn from: 0.9 to 1
TOP_K = None  # draws from so many tokens at most; transformers has 50 if the file says nothing
REPETITION_PENALTY = None  # 1 = none; 1.05 keeps small models from going in circles, 1.2 costs voice, 1.3 garbles
SEED = None  # a number gives the same answers every time; None gives others, and 42 in the report
PRECISION = None  # "auto", "bf16", "fp16" or "fp32" to write with; None: what the model was trained in

REPORT_SIZE = 1.0  # 1 x 6,000 words from each model, 60 training posts looked at; 0.5: half of it, wider ranges
BASE_MODEL = ""  # a name or folder; "" = the one that training_report.json names
NOT_STRANGERS = []  # names in sample/strangers/README.md: yourself, or a blog that you copied from
OTHER_BLOGS = []  # data folders of other bloggers, made by extract_blog_data.py; needed for other languages


import os
import signal

if __name__ == "__main__":
    stopped = []

    def stop(number, frame) -> None:
        """Ends the program with one sentence. Nothing needs tidying up: files are complete at any moment."""
        if stopped:  # of many signals one says so
            return
        stopped.append(True)
        try:
            os.write(2, b"\nStopped.\n")
        finally:
            os._exit(1)

    # First of all, because the imports need seconds. What nohup ignores stays ignored.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, stop)

import argparse
import importlib.util
import sys
from pathlib import Path

import extract_blog_data as extraction
from extract_blog_data import (
    STOP_SIGNALS,
    check_settings,
    flag_type,
    hold_closed_streams,
    parser_of,
    print_or_exit,
    say,
    say_loading,
)
from voice.settings import ROOT, ROWS, Settings


# ---------------------------------------------------------------------------- command line
def parse_arguments(argv: list[str] | None) -> tuple[Settings, argparse.Namespace]:
    """The settings under the flags, and the flags that choose a mode; exits with a sentence if one of them is wrong."""
    constants = {name: globals().get(name) for name in ROWS}
    check_settings(constants, ROWS, "test_model.py")
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.begin and (args.chat or args.page or args.quiz or args.report):
        parser.error("--begin goes alone or with --prompt; in the chat it is /begin")

    values = {name.lower(): tuple(value) if isinstance(value, list) else value for name, value in constants.items()}
    values |= {name: getattr(args, name) for name in ("model_dir", "data_dir", "seed", "max_new_tokens")}
    if args.page and importlib.util.find_spec("gradio") is None:
        sys.exit("The page needs Gradio, which is not installed: run make page, then this again.")
    extraction_settings = extraction.parse_arguments([])
    if args.prompt:
        values["prompts"] = (args.prompt,)
    elif args.begin:
        # What posts without a telling title answer in training.
        values["prompts"] = (extraction_settings.general_requests[0],)
    if args.quick:
        values["report_size"] = REPORT_SIZE / 10
    return Settings(**values, raw=args.raw, explain=args.explain, extraction=extraction_settings), args


def make_parser() -> argparse.ArgumentParser:
    parser = parser_of("test_model.py", __doc__.splitlines()[0])

    def add(flag: str, name: str, **more) -> None:
        parser.add_argument(flag, type=flag_type(ROWS[name]), **more)

    parser.add_argument("--model-dir", type=Path, default=ROOT / MODEL_DIR)
    parser.add_argument("--data-dir", type=Path, default=ROOT / DATA_DIR)
    mode = parser.add_mutually_exclusive_group()
    prompt = {"type": flag_type(ROWS["PROMPTS"]), "metavar": "TEXT"}
    mode.add_argument("--prompt", **prompt, help="answer this instead of the prompts in the settings")
    mode.add_argument("--chat", action="store_true", help="talk")
    mode.add_argument("--page", action="store_true", help="talk on a page in the browser, on this machine only")
    mode.add_argument("--quiz", action="store_true", help="guess which of two texts is yours")
    mode.add_argument("--report", action="store_true", help="measure")
    parser.add_argument("--begin", **prompt, help="words of yours that the answer goes on from; in the chat: /begin")
    parser.add_argument("--raw", action="store_true", help="show the sentence in which an answer breaks off, too")
    parser.add_argument("--quick", action="store_true", help="a report of a tenth of the size")
    parser.add_argument("--explain", action="store_true", help="what the rows of the report mean, too")
    add("--seed", "SEED", default=SEED, help="a number makes the answers repeatable")
    add("--max-new-tokens", "MAX_NEW_TOKENS", default=MAX_NEW_TOKENS)
    parser.add_argument("--cpu", action="store_true", help="use the CPU, also where there is a graphics card")
    return parser


if __name__ == "__main__":
    hold_closed_streams()
    parse_arguments(None)  # --help and mistyped flags need no libraries
    say_loading()

import contextlib
import textwrap
import time
from collections.abc import Callable, Iterator
from functools import partial

import torch
import transformers
from transformers import GenerationConfig

import train_model as training
from voice.asking import read_blog
from voice.conversation import COMMANDS, Chat, new_chat
from voice.copies import tell_origin
from voice.evidence import BlogData, percent, wilson
from voice.loading import (
    DTYPES,
    check_place,
    choose_device,
    fits_float16,
    held_in,
    load_base,
    load_tuned,
    positions_of,
    tell_changed_data,
    wanted_precision,
)
from voice.report import COLUMNS, make_report
from voice.sampling import (
    begun_tokens,
    check_generation_config,
    make_rng,
    prompt_tokens,
    read_sampling,
    request_tokens,
    room_for_prompt,
    stream,
    whole_answers,
)
from voice.web import Writer, serve
from voice.word_index import (
    WordIndex,
    author_text,
    count_words,
    posts_of,
    word_spans,
)


# ---------------------------------------------------------------------------- the run
def run(settings: Settings, args: argparse.Namespace, device: torch.device) -> None:
    """Loads the model and does what the flags ask for."""
    # What is wrong with the folder is said before the model is loaded.
    check_place(settings.model_dir)
    check_generation_config(settings.model_dir / "generation_config.json")
    precision = training.pick_precision(device, wanted_precision(settings))
    model, tokenizer = load_tuned(settings.model_dir, device, held_in(settings.model_dir, precision))
    sampling = read_sampling(model.generation_config, tokenizer, settings)
    if precision == "fp16" and not fits_float16(model, request_tokens(tokenizer, settings.prompts[0])):
        say("This model overflows float16; generating in float32.")
        precision = "fp32"
        model = model.float()  # also where it was in half precision

    # The chat reads no data.
    changed = "" if args.chat else tell_changed_data(settings)
    if changed:
        say(changed)

    # The report needs losses in float32 first, so it converts the weights itself.
    if args.report:
        make_report(settings, model, tokenizer, sampling, precision)
        return

    model = model.to(DTYPES[precision])
    rng = make_rng(settings.seed)
    find_base = partial(load_base_to_generate, settings, device, precision)
    if args.chat:
        with ctrl_c_interrupts():
            chat(new_chat(settings), model, tokenizer, sampling, rng, find_base, settings.raw)
        return

    blog = read_blog(settings.data_dir)
    if args.quiz:
        with ctrl_c_interrupts():
            quiz(model, tokenizer, sampling, rng, blog)
        return

    if not blog.train:
        say(f"No training data in {settings.data_dir}: copied passages cannot be shown.")
    index = WordIndex(blog.train) if blog.train else None
    if args.page:
        with ctrl_c_interrupts():
            serve(Writer(settings, model, tokenizer, rng, index, find_base))
        return

    answer_prompts(model, tokenizer, settings, sampling, rng, index, args.begin)


def load_base_to_generate(settings: Settings, device: torch.device, precision: str):
    """The base model, or None if it cannot be loaded."""
    base = load_base(settings, device, precision)
    return base and base.to(DTYPES[precision])


def answer_prompts(
    model,
    tokenizer,
    settings: Settings,
    sampling: GenerationConfig,
    rng: torch.Generator,
    index: WordIndex | None,
    words: str | None,
) -> None:
    """Prints an answer to each prompt and, given an index, where its longest run of words comes from.

    Given the user's own words, the answer goes on from them.
    """
    texts = settings.prompts
    begun = begun_tokens(tokenizer, [{"role": "user", "content": texts[0]}], words) if words else []
    prompts = [request_tokens(tokenizer, text) + begun for text in texts]
    # All are checked before the first is answered, which needs time.
    longest = max(map(len, prompts))
    room = positions_of(model)
    if longest >= room:
        sys.exit(
            f"The prompt has {longest:,} tokens and the model has {room:,} positions, answer included: shorten it."
        )

    began = time.monotonic()
    answers = []
    show(f"> {texts[0]}\n")
    for piece, answer in stream(model, tokenizer, prompts, sampling, rng, begun, settings.raw):
        show(piece, end="")
        if answer is None:
            continue

        answers.append(answer)
        show()
        if index:
            show(tell_origin(index.longest_copy(answer.text)))
        is_last = len(answers) == len(texts)
        show("" if is_last else f"\n> {texts[len(answers)]}\n")

    # An answer that did not end was cut at the length.
    seconds = time.monotonic() - began
    tokens = sum(len(answer.tokens) for answer in answers)
    ended = sum(answer.ended for answer in answers)
    say(f"{ended} of {len(answers)} answers ended by themselves; {tokens:,} tokens, {tokens / seconds:.1f} a second.")
    if ended < len(answers) and not settings.raw:
        which = "It" if len(answers) == 1 else "The others"
        say(f"{which} reached the length (--max-new-tokens) and stopped at a whole sentence; --raw shows the rest.")


def chat(
    talk: Chat,
    model,
    tokenizer,
    sampling: GenerationConfig,
    rng: torch.Generator,
    find_base: Callable,
    raw: bool = False,
) -> None:
    """A conversation in the terminal, or with lines from a pipe; Ctrl-C ends the answer, not the program.

    `find_base` loads the base model, or returns None; called when somebody first asks for it.
    """
    base = None
    room = room_for_prompt(model, sampling)

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

        # Without the oldest turns where there is no room for them.
        prompt, begun = talk.prompt(tokenizer, room)
        if not prompt:
            say(f"That is longer than the {room:,} tokens there is room for.")
            talk.take_back()
            continue

        # Half an answer is remembered too: the user has read it.
        parts = []
        with contextlib.suppress(KeyboardInterrupt):
            for piece, _ in stream(writer, tokenizer, [prompt], sampling, rng, begun, raw):
                parts.append(piece)
                show(piece, end="")
        show()
        talk.remember("".join(parts))


def quiz(model, tokenizer, sampling: GenerationConfig, rng: torch.Generator, blog: BlogData) -> None:
    """Pairs of openings, one of an unseen post and one of the model's answer to the same request: which is yours?"""
    say(f"Which one did you write? 1 or 2, /quit ends. {QUIZ_PAIRS} pairs at most; no post that it was trained on.")
    shown = 0
    guesses = []  # whether each was right
    # Ctrl-C ends it too, also while the next pair is being generated: the answers so far count.
    with contextlib.suppress(KeyboardInterrupt):
        for own, other in quiz_pairs(model, tokenizer, sampling, rng, blog):
            shown += 1
            is_right = ask_which(own, other, rng)
            if is_right is None:
                break
            guesses.append(is_right)
    show(quiz_result(guesses, shown))


# ---------------------------------------------------------------------------- chatting
def read_line() -> str:
    """The next line that is typed; "/quit" at the end of the input, or if there is none."""
    try:
        is_typed = sys.stdin is not None and sys.stdin.isatty()
        return input("\n> " if is_typed else "").strip()
    except (EOFError, OSError, RuntimeError, ValueError):
        return "/quit"


def read_or_clear_line() -> str:
    """The next line that is typed; "" after Ctrl-C, "/quit" at the end of the input."""
    try:
        return read_line()
    except KeyboardInterrupt:
        return ""


# ---------------------------------------------------------------------------- quiz
QUIZ_PAIRS = 20  # at most; 13 right of 20 still is 43 to 82 %
QUIZ_WORDS = (15, 60)  # of an opening: fewer tell nothing, more take long to read


def quiz_pairs(
    model, tokenizer, sampling: GenerationConfig, rng: torch.Generator, blog: BlogData
) -> Iterator[tuple[str, str]]:
    """(opening of an unseen post, opening of an answer to the same request), of the same length in words."""
    posts = posts_of(blog.held_out)
    order = torch.randperm(len(posts), generator=rng).tolist()
    posts = [posts[place] for place in order[:QUIZ_PAIRS]]
    if not posts:
        return

    fewest, most = QUIZ_WORDS
    index = WordIndex(blog.train)
    prompts = [prompt_tokens(tokenizer, post["messages"][:1]) for post in posts]
    answers = whole_answers(model, tokenizer, prompts, sampling, rng)
    for post, answer in zip(posts, answers, strict=True):
        own = author_text(post)
        # Equally long, or the longer one would mostly be the author's.
        shorter = min(count_words([own]), count_words([answer.text]))
        words = min(shorter, most)
        # A copy would show a training post.
        if words >= fewest and not index.longest_copy(answer.text).post:
            yield opening(own, words), opening(answer.text, words)


def opening(text: str, words: int) -> str:
    """The first words of a text, with everything between them."""
    _, end = word_spans(text)[words - 1]
    return text[:end]


def ask_which(own: str, other: str, rng: torch.Generator) -> bool | None:
    """Shows both in random order; returns whether the user picks the own text, None to end the quiz."""
    own_place = int(torch.randint(2, (1,), generator=rng))
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
        return "Nothing to ask: the quiz needs held-out posts of 15 words and more (val_data.jsonl)."
    if not guesses:
        return "\nNothing was answered."
    low, high = wilson(sum(guesses), len(guesses))
    interval = f"{percent(low)} to {percent(high)}"
    return f"\nright {sum(guesses)} of {len(guesses)} ({interval}); {percent(0.5)}: you cannot tell"


# ---------------------------------------------------------------------------- start and end
def main(argv: list[str] | None = None) -> int:
    settings, args = parse_arguments(argv)
    show(end="")  # a closed stdout is said before anything is loaded
    # Warnings and bars would be between the answers.
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    training.keep_freed_memory()

    training.use_one_card()
    training.check_card(args.cpu)
    device = choose_device(args.cpu)
    training.prepare_card(device)

    try:
        run(settings, args, device)
    except RuntimeError as error:
        if training.is_out_of_memory(error):
            sys.exit("Out of memory: close other programs, or use --quick or a smaller --max-new-tokens.")
        raise
    except OSError as error:
        sys.exit(f"Cannot use {error.filename}: {error.strerror}; solve that and run it again.")
    except KeyboardInterrupt:
        sys.exit("\nStopped.")
    return 0


def show(text: str = "", end: str = "\n") -> None:
    """Results go to stdout; the program ends if it is closed or full."""
    print_or_exit(text, "send it elsewhere and run it again", end)


@contextlib.contextmanager
def ctrl_c_interrupts() -> Iterator[None]:
    """Ctrl-C raises KeyboardInterrupt, which chat and quiz handle; elsewhere it ends the command."""
    usual = signal.getsignal(signal.SIGINT)
    if usual != signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, usual)


def as_command() -> None:
    """main() as a process of its own."""
    if sys.stdin is not None:
        sys.stdin.reconfigure(errors="replace")
    sys.exit(main())


if __name__ == "__main__":
    try:
        as_command()
    finally:
        # The run is over: a signal must not end it with a traceback.
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)
