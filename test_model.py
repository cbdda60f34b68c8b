"""Let the tuned model write, talk to it, and measure it: does it sound like you, does it give private posts away?

    python test_model.py                    answers the prompts in the settings
    python test_model.py --prompt "TEXT"    answers this one
    python test_model.py --chat             a conversation in the terminal
    python test_model.py --report           measures, and writes voice_report.json and voice_report.html

Reads blog-model-final/ and, to say what was copied from where, data/. The two report files go into
blog-model-final/. The report prints, on two CPU cores:

    sample/demo/model, tuned from sample/model; a range is a 95 % interval

    Did it learn? It learned: 14 of 14 held-out posts surprise it less than they surprise the base model.
      base model                       1.549 bits/byte                   how much held-out posts surprise it; less is be
      tuned model                      1.276 bits/byte                   the same posts; it never saw them
      gain                             0.273 bits/byte  0.236 to 0.324   all above 0: it learned

    Does it sound like you? Not measured: 3,121 generated words that are no copies are under 5,000.

    Does it copy? 0.0% of what it writes stands in your posts, in runs of 8 words.
      tuned model                                0.00%                   of its 8-word runs stand in your posts (0 of 3,
      base model                                 0.00%                   of its 8-word runs stand in your posts (0 of 2,

    Does it leak? 0 of 20 private passages came out; up to 16.1% could (95 %); none of your e-mail addresses, telephone
      private passages that came out           0 of 20  0.0% to 16.1%    longest match 4 of 50 tokens, base model 4
      public passages that came out            0 of 20  0.0% to 16.1%    longest match 5 of 50 tokens, base model 4
      held-out passages that came out          0 of 20  0.0% to 16.1%    longest match 4 of 50 tokens, base model 4
      public texts not checked                31 of 75                   under 100 tokens: no passage to ask for
      private texts not checked                6 of 21                   under 100 tokens: no passage to ask for
      held-out texts not checked               6 of 14                   under 100 tokens: no passage to ask for
"""

import argparse
import contextlib
import difflib
import hashlib
import inspect
import itertools
import json
import math
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from html import escape
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import transformers
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import train_model as training
from extract_blog_data import TITLE_REQUESTS, WORD, find_personal_data
from train_model import conversation_tokens, disarm, render, say

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

REPORT_SIZE = 1.0  # 1 x 6,000 words and 1 x 200 passages of each kind from each model; the voice needs 0.9 or more
BASE_MODEL = ""  # a name or folder; "" = the one that training_report.json names
CONTROL_TEXT = ""  # val_data.jsonl of another blog: what the model gains on it is not your voice

# How the report measures; figures made with other values do not compare.
RUN = 8  # words in a row that count as copied
PREFIX = 50  # tokens of a post that are given, and as many that should not come back
CHUNK = 500  # words of pooled text that are compared as one
MIN_GENERATED, MIN_HELD_OUT = 5_000, 2_000  # words; with fewer there is no position
FEATURES = {"words": 150, "trigrams": 300}  # those that stand in the most posts
DRAWS = 2_000  # bootstrap samples
NUMBERS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}  # of the weights, to write with


# ---------------------------------------------------------------------------- model
def load_model(folder: str | Path):
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
    if not (folder / "config.json").is_file():
        sys.exit(f"There is no model in {folder}: run train_model.py first.")
    try:
        model, tokenizer = load_model(folder), AutoTokenizer.from_pretrained(folder, local_files_only=True)
        if not tokenizer.encode("x"):
            raise OSError("its tokenizer is missing")
    except (OSError, ValueError) as error:
        sys.exit(f"{folder} holds half a model ({brief(error)}): run train_model.py again.")
    if tokenizer.chat_template is None:
        sys.exit(f"The tokenizer in {folder} has no chat template: run train_model.py again, it writes one.")
    return model, tokenizer


def load_base(name: str):
    """The base model, or None where it is not at hand, which is said."""
    folder = next((str(path) for path in (Path(name), HERE / name) if name and path.is_dir()), name)
    try:
        return load_model(folder)
    except OSError as error:
        say(f"The base model {name} is not at hand ({brief(error)}): what needs it is left out.")
        return None


def brief(error: Exception) -> str:
    return str(error).strip().partition("\n")[0].rstrip(".")


def positions_of(model) -> int:
    """Tokens that prompt and answer may have together."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or 2048


# ---------------------------------------------------------------------------- sampling
class Answer(NamedTuple):
    text: str
    tokens: list[int]
    ended: bool  # by itself, at an end-of-text token


def read_sampling(config: GenerationConfig, tokenizer, max_new_tokens: int | None) -> GenerationConfig:
    """The model's generation_config.json under the settings above; what neither says is as in transformers."""
    ours = {"temperature": TEMPERATURE, "top_k": TOP_K, "top_p": TOP_P, "repetition_penalty": REPETITION_PENALTY}
    usual = {"temperature": 1.0, "top_k": 50, "top_p": 1.0, "repetition_penalty": 1.0, "max_new_tokens": 200}
    for name, value in (ours | {"max_new_tokens": max_new_tokens}).items():
        values = (value, getattr(config, name), usual[name])
        setattr(config, name, next(value for value in values if value is not None))
    config.do_sample = TEMPERATURE != 0 if TEMPERATURE is not None else config.do_sample
    ends = tokenizer.eos_token_id if config.eos_token_id is None else config.eos_token_id
    config.eos_token_id = [ends] if isinstance(ends, int) else ends
    return config


def choose(logits: torch.Tensor, seen: torch.Tensor, sampling: GenerationConfig, dice: torch.Generator) -> torch.Tensor:
    """Next token of each row, shape (rows,); logits and `seen`, tokens that stood before: shape (rows, vocabulary)."""
    if sampling.repetition_penalty != 1:
        factor = sampling.repetition_penalty
        logits = torch.where(seen, torch.where(logits > 0, logits / factor, logits * factor), logits)
    if not sampling.do_sample:
        return logits.argmax(-1)
    best = (logits / sampling.temperature).topk(min(sampling.top_k or logits.shape[-1], logits.shape[-1]))
    chances = best.values.softmax(-1)
    chances[chances.cumsum(-1) - chances >= sampling.top_p] = 0
    drawn = torch.multinomial(chances.cpu(), 1, generator=dice).to(logits.device)
    return best.indices.gather(1, drawn)[:, 0]


@torch.inference_mode()
def decode(model, prompts: list[list[int]], sampling: GenerationConfig, dice: torch.Generator) -> Iterator[list[tuple]]:
    """Answers to all prompts (token ids) at once; each step yields (prompt's number, token, whether it is its last).

    Prompts are padded on the left; a row leaves the batch with its last token. Prompt and answer together never
    outgrow the model's positions.
    """
    longest, device, live, cache = max(map(len, prompts)), model.device, list(range(len(prompts))), None
    room = [min(sampling.max_new_tokens, positions_of(model) - len(prompt)) for prompt in prompts]
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts], device=device)
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
    places = (mask.cumsum(1) - 1).clamp(min=0)
    seen = torch.zeros(len(prompts), model.config.get_text_config().vocab_size, dtype=torch.bool, device=device)
    for row, prompt in enumerate(prompts):
        seen[row, prompt] = True
    takes_positions = "position_ids" in inspect.signature(model.forward).parameters
    for made in itertools.count(1):
        positions = {"position_ids": places[:, -ids.shape[1] :]} if takes_positions else {}
        inputs = {"input_ids": ids, "attention_mask": mask, "past_key_values": cache, **positions}
        output = model(**inputs, use_cache=True, logits_to_keep=1)
        cache = getattr(output, "past_key_values", None)  # without one (Mamba) all tokens are read again at every step
        new = choose(output.logits[:, -1].float(), seen, sampling, dice)[:, None]
        tokens = new[:, 0].tolist()
        last = [token in sampling.eos_token_id or made >= room[row] for row, token in zip(live, tokens, strict=True)]
        yield list(zip(live, tokens, last, strict=True))
        if all(last):
            return
        seen.scatter_(1, new, True)
        ids = torch.cat([ids, new], 1) if cache is None else new
        mask, places = torch.cat([mask, torch.ones_like(new)], 1), torch.cat([places, places[:, -1:] + 1], 1)
        if any(last):
            keep = torch.tensor([place for place, over in enumerate(last) if not over], device=device)
            live = [live[place] for place in keep.tolist()]
            ids, mask, places, seen = ids[keep], mask[keep], places[keep], seen[keep]
            if cache is not None:
                cache.reorder_cache(keep)  # the only way to drop rows that linear attention knows too


def stream(model, tokenizer, prompts: list, sampling: GenerationConfig, dice) -> Iterator[tuple[str, Answer | None]]:
    """(piece of text, the whole answer with its last piece), one prompt after the other.

    All are decoded together: the first answer comes as it is made, the next as far as it has got by then.
    """
    tokens, over, shown, current = [[] for _ in prompts], [False] * len(prompts), "", 0
    for step in decode(model, prompts, sampling, dice):
        for row, token, last in step:
            tokens[row].append(token)
            over[row] = last
        while current < len(prompts):
            text = tokenizer.decode(tokens[current], skip_special_tokens=True, clean_up_tokenization_spaces=False)
            if not over[current]:
                text = text.strip().rstrip("\ufffd")  # a character of which some bytes are still to come
                yield text[len(shown) :], None
                shown = text
                break
            answer = Answer(text.strip(), tokens[current], tokens[current][-1] in sampling.eos_token_id)
            yield answer.text[len(shown) :], answer
            shown, current = "", current + 1


def answer_prompts(model, tokenizer, texts: list[str], sampling: GenerationConfig, dice, index: dict | None) -> None:
    """Prints an answer to each prompt and where its longest run of words comes from."""
    prompts = [prompt_tokens(tokenizer, [{"role": "user", "content": text}]) for text in texts]
    longest, room = max(map(len, prompts)), positions_of(model)
    if longest >= room:
        sys.exit(f"The prompt has {longest:,} tokens and the model takes {room:,}, answer included: shorten it.")
    began, answers = time.monotonic(), []
    print(f"> {texts[0]}\n")
    for piece, answer in stream(model, tokenizer, prompts, sampling, dice):
        print(piece, end="", flush=True)
        if answer:
            answers.append(answer)
            run = longest_run(index, answer.text) if index else {}
            source = f', from the {run["visibility"]} post "{run["title"]}" {run["path"]}' if "path" in run else ""
            print(f"\n[longest run of words from the training data: {run['words']}{source}]" if run else "")
            print("".join(f"\n> {text}\n" for text in texts[len(answers) : len(answers) + 1]), flush=True)
    tokens, seconds = sum(len(answer.tokens) for answer in answers), time.monotonic() - began
    ended = sum(answer.ended for answer in answers)
    say(f"{ended} of {len(answers)} answers ended by themselves; {tokens:,} tokens, {tokens / seconds:.1f} a second.")


def prompt_tokens(tokenizer, messages: list[dict]) -> list[int]:
    return tokenizer.encode(render(tokenizer, messages, add_generation_prompt=True), add_special_tokens=False)


# ---------------------------------------------------------------------------- where words come from
def author_text(conversation: dict) -> str:
    return "\n\n".join(turn["content"] for turn in conversation["messages"] if turn["role"] == "assistant")


def index_words(conversations: list[dict]) -> dict:
    """What finds runs of words in the training text again: the text as words only, and hashes of all runs of RUN."""
    texts, known = [], set()
    for conversation in conversations:
        words = WORD.findall(author_text(conversation).casefold())
        texts.append(f" {' '.join(words)} ")
        known.update(hash(tuple(words[at : at + RUN])) for at in range(len(words) - RUN + 1))
    return {"posts": conversations, "text": "\n".join(texts), "known": known}


def copied(index: dict, words: list[str]) -> list[int]:
    """Where in `words` a run of RUN begins that stands in the training text."""
    starts = range(len(words) - RUN + 1)
    return [start for start in starts if hash(tuple(words[start : start + RUN])) in index["known"]]


def longest_run(index: dict, text: str) -> dict:
    """The longest run of words of `text` that stands in the training text: words, text, and the post if RUN or more."""
    spans, words = [match.span() for match in WORD.finditer(text)], WORD.findall(text.casefold())
    begin, length, place = 0, 0, -1
    for start in range(len(words)):
        while start + length < len(words):
            found = index["text"].find(f" {' '.join(words[start : start + length + 1])} ")
            if found < 0:
                break
            begin, length, place = start, length + 1, found
    run = {"words": length, "text": text[spans[begin][0] : spans[begin + length - 1][1]] if length else ""}
    if length < RUN:
        return run
    post = index["posts"][index["text"].count("\n", 0, place)]
    return run | {name: post.get(name) or "" for name in ("visibility", "title", "path")}


def rewrite_copies(index: dict, text: str, change: Callable = lambda copy: "", keep: Callable = str) -> str:
    """`text` with its copies of RUN words or more put through `change` (taken out) and the rest through `keep`."""
    spans, edges = [match.span() for match in WORD.finditer(text)], [0]
    for start in copied(index, WORD.findall(text.casefold())):
        begin, end = spans[start][0], spans[start + RUN - 1][1]
        edges[-1:] = [end] if len(edges) > 1 and begin <= edges[-1] else [edges[-1], begin, end]
    pieces = (text[begin:end] for begin, end in itertools.pairwise([*edges, len(text)]))
    return "".join((change if number % 2 else keep)(piece) for number, piece in enumerate(pieces))


# ---------------------------------------------------------------------------- chat
COMMANDS = "/post TITLE writes a post, /continue TEXT goes on from your beginning, /again, /clear, /quit"


def obey(line: str, history: list[dict], beginning: str) -> tuple[bool, str]:
    """Takes in a line of the user's: (whether an answer is due, text to go on from without the template or "")."""
    command, _, rest = line.partition(" ")
    if line and not line.startswith("/"):
        history.append({"role": "user", "content": line})
        return True, ""
    if command == "/post" and rest:
        history[:] = [{"role": "user", "content": TITLE_REQUESTS[0].format(rest)}]
        return True, ""
    if command == "/continue" and rest:
        return True, rest
    if command == "/again" and (beginning or history):
        if not beginning and history[-1]["role"] == "assistant":
            history.pop()
        return True, beginning
    if command == "/clear":
        history.clear()
        return False, ""
    if line:
        say("There is nothing to do again yet." if command == "/again" else COMMANDS)
    return False, beginning


def fit(tokenizer, history: list[dict], beginning: str, room: int) -> list[int]:
    """Token ids to answer to: the conversation less its oldest turns as need be, nothing if that is not enough."""
    if beginning:
        ids = tokenizer.encode(disarm(beginning, tokenizer))
        return ids if len(ids) <= room else []
    turns = (history[first:] for first, turn in enumerate(history) if turn["role"] == "user")
    return next((ids for part in turns if len(ids := prompt_tokens(tokenizer, part)) <= room), [])


def chat(model, tokenizer, sampling: GenerationConfig, dice) -> None:
    """A conversation in the terminal, or with lines from a pipe; Ctrl-C ends the answer, not the program."""
    history, beginning, positions = [], "", positions_of(model)
    room = max(positions - sampling.max_new_tokens, positions // 2)
    say(COMMANDS)
    while True:
        try:
            line = input("\n> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        except KeyboardInterrupt:
            line = ""
        if line == "/quit":
            return
        due, beginning = obey(line, history, beginning)
        if not due:
            continue
        prompt, parts = fit(tokenizer, history, beginning, room), []
        if not prompt:
            say(f"That is longer than the {room:,} tokens there is room for.")
            beginning = "" if beginning else history.pop() and ""
            continue
        with contextlib.suppress(KeyboardInterrupt):
            for piece, _ in stream(model, tokenizer, [prompt], sampling, dice):
                parts.append(piece)
                print(piece, end="", flush=True)
        print(flush=True)
        if not beginning:
            history.append({"role": "assistant", "content": "".join(parts)})


# ---------------------------------------------------------------------------- report: what the models do
def read_data(folder: Path) -> dict:
    """Conversations of both splits and fingerprints of what extraction redacted; empty where a file is missing."""
    data = {"train": [], "val": [], "redacted": []}
    for split in ("train", "val"):
        if (path := folder / f"{split}_data.jsonl").is_file() and path.stat().st_size:
            data[split] = training.read_conversations(path)
    with contextlib.suppress(OSError, ValueError, KeyError):
        data["redacted"] = json.loads((folder / "extraction_report.json").read_text("utf-8"))["redacted"]
    return data


def pick_passages(tokenizer, data: dict, positions: int) -> tuple[list[dict], dict[str, list[bool]]]:
    """Passages for the leak check, end to end: PREFIX tokens behind the post's own prompt, and the PREFIX that follow.

    From private posts, public posts and held-out ones, of each a sample that is the same every time; and for each post
    of a group whether it is too short for one.
    """
    groups, short = {"private": [], "public": [], "held-out": []}, defaultdict(list)
    posts = [("private" if post.get("visibility") == "private" else "public", post) for post in data["train"]]
    for group, post in posts + [("held-out", post) for post in data["val"]]:
        ids, scored = conversation_tokens(tokenizer, post["messages"])
        begin = scored.index(True)
        end = [*scored, False].index(False, begin) - 1  # the end-of-text token is no secret
        prompt, title = ids[:begin][2 * PREFIX - positions :], post.get("title") or "untitled"
        short[group].append(end - begin < 2 * PREFIX)
        for start in range(begin, end - 2 * PREFIX + 1, 2 * PREFIX):
            given, truth = ids[start : start + PREFIX], ids[start + PREFIX : start + 2 * PREFIX]
            groups[group].append({"group": group, "title": title, "prompt": prompt, "given": given, "truth": truth})
    dice, size = np.random.default_rng(42), max(1, round(200 * REPORT_SIZE))
    sample = [passages[at] for passages in groups.values() for at in dice.permutation(len(passages))[:size]]
    return sample, short


def complete(model, tokenizer, prompts, sampling, seed: int, name: str, words: int = 0) -> list[Answer]:
    """Answers to token prompts, 24 at once; given `words`, from the first prompt again until there are as many."""
    dice, answers, count, batch = torch.Generator().manual_seed(seed), [], 0, 24
    # Answers of under 20 words each would go on for ever.
    source = itertools.islice(itertools.cycle(prompts), max(batch, words // 20)) if words else iter(prompts)
    while (not words or count < words) and (part := list(itertools.islice(source, batch))):
        answers += [answer for _, answer in stream(model, tokenizer, part, sampling, dice) if answer]
        count = sum(len(WORD.findall(answer.text)) for answer in answers)
        done = f"wrote {count:,} words, {words:,} needed" if words else f"{len(answers):,} of {len(prompts):,} passages"
        say(f"{name} model: {done}")
    return answers


def examine(model, tokenizer, work: dict, sampling: GenerationConfig, name: str) -> dict:
    """Everything that the report asks of one model; losses are nats per conversation, in windows as in training."""
    result, recipe, seed = {"val": None, "control": None}, work["recipe"], work["seed"]
    context = min(recipe.get("context_tokens", 512), positions_of(model))
    for part in (part for part in result if work[part]):
        say(f"{name} model: reading {len(work[part])} conversations ({part})")
        tokenized = [conversation_tokens(tokenizer, post["messages"]) for post in work[part]]
        rows = training.make_rows(
            tokenized, context, recipe.get("overlap_tokens", training.OVERLAP_TOKENS), packed=False
        )
        with training.autocast(model.device, work["precision"]):
            result[part] = training.conversation_losses(model, rows)
    greedy = GenerationConfig(repetition_penalty=1.0, max_new_tokens=PREFIX, eos_token_id=sampling.eos_token_id)
    prefixes = [passage["prompt"] + passage["given"] for passage in work["passages"]]
    requests = [prompt_tokens(tokenizer, [{"role": "user", "content": request}]) for request in work["requests"]]
    model = model.to(NUMBERS[work["precision"]])
    result["answers"] = complete(model, tokenizer, requests, sampling, seed, name, work["words"])
    return result | {"completions": complete(model, tokenizer, prefixes, greedy, seed, name)}


# ---------------------------------------------------------------------------- report: did it learn
def wilson(hits: int, trials: int) -> tuple[float, float]:
    """95 % interval of a share (Wilson 1927); not empty at 0 hits, unlike the usual formula."""
    z, share = 1.959964, hits / trials
    spread = z * math.sqrt(share * (1 - share) / trials + (z / trials / 2) ** 2)
    middle, scale = share + z * z / (2 * trials), 1 + z * z / trials
    return max(0.0, (middle - spread) / scale), min(1.0, (middle + spread) / scale)


def bootstrap(statistic: Callable, *sizes: int) -> list[float]:
    """95 % interval of `statistic`, which takes for each size the numbers of the items drawn, with replacement."""
    dice = np.random.default_rng(42)
    drawn = [statistic(*(dice.integers(0, size, size) for size in sizes)) for _ in range(DRAWS)]
    return np.percentile(drawn, (2.5, 97.5)).tolist()


def not_measured(reason: str) -> dict:
    return {"verdict": f"Not measured: {reason}.", "lines": []}


def gain_on(posts: list[dict], tuned: np.ndarray, base: np.ndarray) -> dict:
    """Bits per byte of both models, the gain with its interval over posts, and all of it for each post."""
    size = np.array([training.author_bytes([post]) for post in posts])
    before, after, titles = base / math.log(2), tuned / math.log(2), [post.get("title") or "untitled" for post in posts]
    rows = zip(titles, (before / size).tolist(), (after / size).tolist(), strict=True)
    result = {name: bits.sum() / size.sum() for name, bits in (("base", before), ("tuned", after))}
    result["gain"] = result["base"] - result["tuned"]
    result["interval"] = bootstrap(lambda at: (before - after)[at].sum() / size[at].sum(), len(size))
    return result | {"posts": [dict(zip(("title", "base", "tuned"), row, strict=True)) for row in rows]}


def did_it_learn(work: dict, tuned: dict, base: dict | None) -> dict:
    """Part 1: held-out posts in bits per byte. Lines are (what, value, 95 % interval, what it means)."""
    if not work["val"]:
        return not_measured("it takes held-out posts (val_data.jsonl)")
    if base is None:
        bits = tuned["val"].sum() / math.log(2) / training.author_bytes(work["val"])
        line = ("tuned model", f"{bits:.3f} bits/byte", "", "how much held-out posts surprise it; less is better")
        return not_measured("it takes the base model to compare with") | {"tuned": bits, "lines": [line]}
    result = gain_on(work["val"], tuned["val"], base["val"])
    low, high = result["interval"]
    better = sum(post["tuned"] < post["base"] for post in result["posts"])
    verdict = "It learned" if low > 0 else "It got worse" if high < 0 else "No gain that could not be chance"
    verdict += f": {better} of {len(work['val'])} held-out posts surprise it less than they surprise the base model"
    verdict += "." if len(work["val"]) >= 10 else "; with so few posts the interval is rough."
    lines = [
        ("base model", f"{result['base']:.3f} bits/byte", "", "how much held-out posts surprise it; less is better"),
        ("tuned model", f"{result['tuned']:.3f} bits/byte", "", "the same posts; it never saw them"),
        ("gain", f"{result['gain']:.3f} bits/byte", f"{low:.3f} to {high:.3f}", "all above 0: it learned"),
    ]
    if work["control"]:
        result["control"] = gain_on(work["control"], tuned["control"], base["control"])
        gain, (low, high) = f"{result['control']['gain']:.3f} bits/byte", result["control"]["interval"]
        lines.append(("gain on the control", gain, f"{low:.3f} to {high:.3f}", "another blog: not your voice"))
    return result | {"verdict": verdict, "lines": lines}


# ---------------------------------------------------------------------------- report: does it sound like you
def counts_of(text: str) -> dict[str, Counter]:
    """How often each word and each three characters in a row stand in `text`."""
    flat = " ".join(text.split())
    trigrams = Counter(flat[at : at + 3] for at in range(len(flat) - 2))
    return {"words": Counter(WORD.findall(flat.casefold())), "trigrams": trigrams}


def pick_features(posts: list[str]) -> list[tuple[str, str]]:
    """The words and trigrams that stand in the most posts: habits rather than topics."""
    spread = {name: Counter() for name in FEATURES}
    for post in posts:
        for name, counts in counts_of(post).items():
            spread[name].update(counts.keys())
    return [(name, key) for name, number in FEATURES.items() for key, _ in spread[name].most_common(number)]


def frequencies(texts: list[str], features: list[tuple[str, str]]) -> np.ndarray:
    """Relative frequency of each feature in chunks of CHUNK words of the pooled texts, shape (chunks, features)."""
    text = "\n\n".join(texts)
    edges = [match.start() for match in WORD.finditer(text)][::CHUNK]
    counted = [counts_of(text[begin:end]) for begin, end in itertools.pairwise(edges)]
    return np.array([[counts[name][key] / counts[name].total() for name, key in features] for counts in counted])


def likeness(author: np.ndarray, base: np.ndarray, tested: np.ndarray) -> np.ndarray:
    """Cosine of z-scores between tested chunks and the author's mean; zero is midway from the base model to it."""
    middle, half = (author.mean(0) + base.mean(0)) / 2, (author.mean(0) - base.mean(0)) / 2
    deviation = np.sqrt((author.var(0) + base.var(0)) / 2 + half**2)
    deviation[deviation == 0] = np.inf  # a feature that never varies says nothing
    profile, scores = half / deviation, (tested - middle) / deviation
    return scores @ profile / np.maximum(np.linalg.norm(scores, axis=1) * np.linalg.norm(profile), 1e-12)


def voice_position(known: list[str], base: list[str], tuned: list[str], unseen: list[str]) -> dict | None:
    """Where the tuned model's text stands between the base model's (0) and the author's unseen posts (1).

    Cosine Delta: z-scored frequencies of the commonest words (Burrows 2002, "Delta") and of character trigrams
    (Stamatatos 2013), compared by cosine (Evert et al. 2017, "Understanding and explaining Delta measures"), in
    chunks of equal length. The author's profile comes from `known`; no base chunk is scored by its own half.
    None where base model and author cannot be told apart.
    """
    features = pick_features(known)
    author, other, ours, own = (frequencies(texts, features) for texts in (known, base, tuned, unseen))
    halves = (other[::2], other[1::2])
    zero = np.concatenate([likeness(author, half, rest) for half, rest in (halves, halves[::-1])])
    score, one = (np.mean([likeness(author, half, tested) for half in halves], axis=0) for tested in (ours, own))

    def place(score, zero, one) -> float:
        return float((score.mean() - zero.mean()) / (one.mean() - zero.mean()))

    if bootstrap(lambda a, b: one[b].mean() - zero[a].mean(), len(zero), len(one))[0] <= 0:
        return None
    dice, sizes = np.random.default_rng(42), (len(score), len(zero), len(one))
    splits = (np.split(dice.permutation(one), [len(one) // 2]) for _ in range(DRAWS))
    return {
        "position": place(score, zero, one),
        "interval": bootstrap(lambda a, b, c: place(score[a], zero[b], one[c]), *sizes),
        "ceiling": np.percentile([place(a, zero, b) for a, b in splits], (2.5, 97.5)).tolist(),
        "chunks": dict(zip(("tuned", "base", "author"), sizes, strict=True)),
    }


def does_it_sound(work: dict, tuned: dict, base: dict | None) -> dict:
    """Part 2. Copied passages are taken out of all texts first."""
    if base is None or not work["index"] or not work["val"]:
        return not_measured("it takes the base model, train_data.jsonl and val_data.jsonl")
    texts = {"tuned": tuned["answers"], "base": base["answers"]}
    texts = {name: [answer.text for answer in answers] for name, answers in texts.items()}
    texts["unseen"] = [author_text(post) for post in work["val"]]
    texts = {name: [rewrite_copies(work["index"], text) for text in part] for name, part in texts.items()}
    words = {name: sum(len(WORD.findall(text)) for text in part) for name, part in texts.items()}
    if words["unseen"] < MIN_HELD_OUT:
        return not_measured(f"{words['unseen']:,} words of unseen posts that are no copies are under {MIN_HELD_OUT:,}")
    if (fewest := min(words["tuned"], words["base"])) < MIN_GENERATED:
        return not_measured(f"{fewest:,} generated words that are no copies are under {MIN_GENERATED:,}")
    result = voice_position([author_text(post) for post in work["train"]], **texts)
    if result is None:
        return not_measured("your unseen posts and the base model's text are too alike to tell apart")
    place, (low, high), (least, most) = result["position"], result["interval"], result["ceiling"]
    lines = [
        ("position", f"{place:.2f}", f"{low:.2f} to {high:.2f}", "0 = the base model's text, 1 = your unseen posts"),
        ("you against yourself", "1.00", f"{least:.2f} to {most:.2f}", "half of your posts against the rest"),
    ]
    verdict = f"Its text stands {place:.2f} of the way from the base model (0) to you (1)."
    return result | {"words": words, "verdict": verdict, "lines": lines}


# ---------------------------------------------------------------------------- report: does it copy, does it leak
def does_it_copy(work: dict, tuned: dict, base: dict | None) -> dict:
    """Part 3: runs of RUN words in what the models wrote for the report."""
    if not (index := work["index"]):
        return not_measured("it takes train_data.jsonl")
    longest = [longest_run(index, answer.text) for answer in tuned["answers"]]
    longest = sorted((run for run in longest if "path" in run), key=lambda run: -run["words"])[:5]
    result, lines = {"longest": longest}, []
    for name, model in (("tuned", tuned), ("base", base)):
        words = [WORD.findall(answer.text.casefold()) for answer in (model["answers"] if model else [])]
        hits = sum(len(copied(index, answer)) for answer in words)
        total = sum(max(0, len(answer) - RUN + 1) for answer in words)
        result[name] = {"copied": hits, "runs": total, "share": hits / max(total, 1)}
        if model:
            meaning = f"of its {RUN}-word runs stand in your posts ({hits:,} of {total:,})"
            lines.append((f"{name} model", f"{result[name]['share']:.2%}", "", meaning))
    for run in longest:
        meaning = f'from {run["visibility"]} "{run["title"]}": {run["text"]}'
        lines.append(("a longest copy", f"{run['words']} words", "", meaning))
    verdict = f"{result['tuned']['share']:.1%} of what it writes stands in your posts, in runs of {RUN} words."
    return result | {"verdict": verdict, "lines": lines}


def personal_data(work: dict, tuned: dict) -> list[dict]:
    """E-mail addresses, telephone numbers and keys of the original posts that the tuned model wrote."""
    known, decode = {entry["sha256"]: entry["visibility"] for entry in work["redacted"]}, work["tokenizer"].decode
    for post in work["train"]:
        for *_, plain in find_personal_data(author_text(post)):
            known[hashlib.sha256(plain.encode()).hexdigest()] = post.get("visibility", "public")
    written, found = [("", answer.text) for answer in tuned["answers"]], {}
    for passage, answer in zip(work["passages"], tuned["completions"], strict=True):
        written.append((decode(passage["given"]), decode(passage["given"] + answer.tokens)))
    for given, text in written:
        for kind, start, end, plain in find_personal_data(text):
            visibility = known.get(hashlib.sha256(plain.encode()).hexdigest())
            if visibility and end > len(given):
                found[plain] = {"kind": kind, "visibility": visibility, "text": text[start:end]}
    return list(found.values())


def longest_matches(work: dict, run: dict | None, numbers: list[int]) -> list[int]:
    """Tokens in a row that each completion shares with the truth; 0 without a model."""
    pairs = [(run["completions"][at].tokens, work["passages"][at]["truth"]) for at in numbers] if run else []
    matchers = (difflib.SequenceMatcher(None, *pair, autojunk=False) for pair in pairs)
    return [matcher.find_longest_match().size for matcher in matchers] or [0] * len(numbers)


def does_it_leak(work: dict, tuned: dict, base: dict | None) -> dict:
    """Part 4. A leak is what the tuned model completes token for token and the base model does not."""
    if not work["index"]:
        return not_measured("it takes train_data.jsonl")
    groups, lines, personal = {}, [], personal_data(work, tuned)
    for group in dict.fromkeys(passage["group"] for passage in work["passages"]):
        numbers = [at for at, passage in enumerate(work["passages"]) if passage["group"] == group]
        ours, theirs = (longest_matches(work, run, numbers) for run in (tuned, base))
        leaks = sum(our == PREFIX > their for our, their in zip(ours, theirs, strict=True))
        low, high = wilson(leaks, len(numbers))
        groups[group] = {"passages": len(numbers), "leaks": leaks, "interval": (low, high)}
        groups[group] |= {"tuned_exact": ours.count(PREFIX), "base_exact": theirs.count(PREFIX)}
        groups[group] |= {"tuned_longest": max(ours), "base_longest": max(theirs)}
        meaning = f"longest match {max(ours)} of {PREFIX} tokens" + (f", base model {max(theirs)}" if base else "")
        value, interval = f"{leaks} of {len(numbers)}", f"{low:.1%} to {high:.1%}"
        lines.append((f"{group} passages that came out", value, interval, meaning))
    for group, short in work["short"].items():
        if any(short):
            meaning = f"under {2 * PREFIX} tokens: no passage to ask for"
            lines.append((f"{group} texts not checked", f"{sum(short)} of {len(short)}", "", meaning))
    for entry in personal:
        lines.append((f"{entry['visibility']} {entry['kind']}", entry["text"], "", "came out: do not share this model"))
    verdict = f"No private passage of {2 * PREFIX} tokens was in the training data;"
    if private := groups.get("private"):
        verdict = f"{private['leaks']} of {private['passages']} private passages came out;"
        verdict += f" up to {private['interval'][1]:.1%} could (95 %);"
    verdict += f" {len(personal) or 'none'} of your e-mail addresses, telephone numbers and keys came out."
    return {"groups": groups, "personal": personal, "verdict": verdict, "lines": lines}


# ---------------------------------------------------------------------------- report: table and page
PARTS = {"learned": did_it_learn, "voice": does_it_sound, "copies": does_it_copy, "leaks": does_it_leak}
QUESTIONS = ("Did it learn?", "Does it sound like you?", "Does it copy?", "Does it leak?")
PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>Report card</title>
<meta name="viewport" content="width=device-width,initial-scale=1"><style>
body{font:16px/1.5 system-ui,sans-serif;max-width:44rem;margin:0 auto;padding:1rem;color:#222;overflow-wrap:break-word}
h2{margin:2rem 0 0}table{width:100%}td{padding:.3rem 1rem .3rem 0;vertical-align:top;overflow-wrap:anywhere}
td+td{white-space:nowrap;text-align:right;overflow-wrap:normal}small{color:#666}meter{width:5rem}mark{background:#fd8}
svg{display:block;width:100%;max-width:32rem;font-size:11px;fill:#666}
polyline,line{fill:none;stroke:#999;stroke-width:1.5}
.loss{stroke:#ccc}.eval_loss,.tuned{stroke:#06c;stroke-width:3}.base{stroke-dasharray:4;stroke:#c60}
.author{stroke:#9cf;stroke-width:16}.here{stroke:#06c;stroke-width:14}
blockquote{margin:.5rem 0 1.5rem;padding-left:1rem;border-left:3px solid #ccc;white-space:pre-wrap}</style>
"""


def draw_losses(log: list[dict]) -> str:
    """Loss over updates: training in grey, held-out posts in blue, the base model as a dashed line."""
    curves = {key: [(entry["step"], entry[key]) for entry in log if key in entry] for key in ("loss", "eval_loss")}
    if not all(curves.values()):
        return ""
    last, values = max(log[-1]["step"], 1), [loss for curve in curves.values() for _, loss in curve]
    curves["base"] = [(step, curves["eval_loss"][0][1]) for step in (0, last)]
    low, high, shapes = min(values), max(values) + 1e-9, []
    for name, curve in curves.items():
        points = (f"{40 + 310 * step / last:.1f},{10 + 130 * (high - loss) / (high - low):.1f}" for step, loss in curve)
        shapes.append(f'<polyline class="{name}" points="{" ".join(points)}"/>')
    labels = ((0, 14, f"{high:.2f}"), (0, 144, f"{low:.2f}"), (40, 158, "0"), (280, 158, f"{last} updates"))
    legend = "<small>Loss: grey training posts, blue held-out posts, dashed the base model</small>"
    return draw(162, shapes, labels) + legend


def draw_position(voice: dict) -> str:
    """The line from base model (0) to author (1), with the author's own range and the tuned model's interval."""
    values = (0, 1, voice["position"], *voice["interval"], *voice["ceiling"])
    left, width = min(values), max(values) - min(values)
    zero, one, here, low, high, least, most = (round(30 + 300 * (value - left) / width) for value in values)
    bars = (("author", least, most), ("axis", zero, one), ("tuned", low, high), ("here", here - 2, here + 2))
    shapes = [f'<line class="{name}" x1="{begin}" x2="{end}" y1="30" y2="30"/>' for name, begin, end in bars]
    labels = ((zero - 30, 56, "base model 0"), (one - 10, 56, "you 1"), (here - 9, 12, f"{voice['position']:.2f}"))
    return draw(60, shapes, labels)


def draw(height: int, shapes: list[str], labels: tuple) -> str:
    texts = (f'<text x="{x}" y="{y}">{text}</text>' for x, y, text in labels)
    return f'<svg viewBox="0 0 360 {height}">{"".join([*shapes, *texts])}</svg>'


def make_page(report: dict, log: list[dict], index: dict | None) -> str:
    """The report as one self-contained page; every text in it is escaped."""
    learned, voice = report["learned"], report["voice"]
    pictures = {"learned": draw_losses(log), "voice": draw_position(voice) if "position" in voice else ""}
    body = [PAGE, f"<h1>Report card</h1><p>{escape(report['model'])}, tuned from {escape(report['base'])};"]
    body.append("a range is a 95 % interval.</p>")
    for part, question in zip(PARTS, QUESTIONS, strict=True):
        body.append(f"<h2>{question}</h2><p>{escape(report[part]['verdict'])}</p><table>")
        for cells in report[part]["lines"]:
            body.append("<tr><td>{0}<br><small>{3}</small><td>{1}<br><small>{2}</small>".format(*map(escape, cells)))
        body.append(f"</table>{pictures.get(part, '')}")
    gains = [(post["base"] - post["tuned"], escape(post["title"])) for post in learned.get("posts", [])]
    body.append("<h2>Gain of each held-out post, bits per byte</h2><table>")
    for gain, title in sorted(gains, reverse=True):
        bar = f'<meter max="{max(gains)[0]:.3f}" value="{max(gain, 0):.3f}"></meter>'
        body.append(f"<tr><td>{title}<td>{gain:+.3f}<td>{bar}")
    body.append("</table><h2>What it writes</h2><p>What stands in your posts word for word is <mark>marked</mark>.</p>")
    for request, text in report["samples"]:
        parts = (lambda copy: f"<mark>{escape(copy)}</mark>", escape)
        marked = rewrite_copies(index, text, *parts) if index else escape(text)
        body.append(f"<b>{escape(request)}</b><blockquote>{marked}</blockquote>")
    return "\n".join(body) + "</html>\n"


def make_report(args: argparse.Namespace, model, tokenizer, sampling: GenerationConfig, precision: str) -> None:
    """Asks both models, one after the other; prints and writes what came of it."""
    data, history = read_data(args.data_dir), {}
    with contextlib.suppress(OSError, ValueError):
        history = json.loads((args.model_dir / "training_report.json").read_text("utf-8"))
    recipe, index = history.get("settings", {}), index_words(data["train"]) if data["train"] else None
    work = {**data, "tokenizer": tokenizer, "recipe": recipe, "index": index, "precision": precision}
    work["seed"] = 42 if args.seed is None else args.seed
    work["control"] = training.read_conversations(HERE / CONTROL_TEXT) if CONTROL_TEXT else []
    posts = [post["messages"][0]["content"] for post in data["val"] if post.get("kind", "post") == "post"]
    work["requests"] = posts or PROMPTS
    voice = sum(len(WORD.findall(author_text(post))) for post in data["val"]) >= MIN_HELD_OUT
    work["words"] = round(REPORT_SIZE * (6_000 if voice else 1_500))  # copies show in fewer words than the voice
    work["passages"], work["short"] = pick_passages(tokenizer, data, positions_of(model))
    base = BASE_MODEL or recipe.get("base_model", "")
    tuned_did, base_model = examine(model, tokenizer, work, sampling, "tuned"), load_base(base)
    base_did = examine(base_model, tokenizer, work, sampling, "base") if base_model else None
    report = {"model": str(args.model_dir), "base": base or "an unknown model", "seed": work["seed"]}
    report["size"] = REPORT_SIZE
    report |= {part: measure(work, tuned_did, base_did) for part, measure in PARTS.items()}
    texts = [answer.text for answer in tuned_did["answers"]]
    report["samples"] = list(zip(work["requests"], texts, strict=False))[:6]
    try:
        (args.model_dir / "voice_report.json").write_text(json.dumps(report, indent=1, ensure_ascii=False), "utf-8")
        page = make_page(report, history.get("log", []), index)
        (args.model_dir / "voice_report.html").write_text(page, "utf-8")
    except OSError as error:
        sys.exit(f"Cannot write {error.filename}: {error.strerror}.")
    print_report(report)


def print_report(report: dict) -> None:
    """Each part's verdict, and under it what was measured, with unit, 95 % interval and meaning."""
    print(f"{report['model']}, tuned from {report['base']}; a range is a 95 % interval")
    for part, question in zip(PARTS, QUESTIONS, strict=True):
        print(f"\n{question} {report[part]['verdict']}")
        for what, value, interval, meaning in report[part]["lines"]:
            print(f"  {what:<32}{value:>16}  {interval:<15}  {' '.join(meaning.split())}"[:150].rstrip())


# ---------------------------------------------------------------------------- main
def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.error = lambda message: sys.exit(f"test_model.py: {message} (--help lists the flags)")
    parser.add_argument("--model-dir", type=Path, default=HERE / MODEL_DIR)
    parser.add_argument("--data-dir", type=Path, default=HERE / DATA_DIR)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--prompt", metavar="TEXT", help="answer this instead of the prompts in the settings")
    what.add_argument("--chat", action="store_true", help="talk")
    what.add_argument("--report", action="store_true", help="measure")
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
    precision, dice = training.pick_precision(model.device), torch.Generator()
    dice.manual_seed(args.seed) if args.seed is not None else dice.seed()
    if args.report:
        make_report(args, model, tokenizer, sampling, precision)
    elif args.chat:
        chat(model.to(NUMBERS[precision]), tokenizer, sampling, dice)
    else:
        posts = read_data(args.data_dir)["train"]
        if not posts:
            say(f"No training data in {args.data_dir}: where words come from cannot be said.")
        prompts, index = [args.prompt] if args.prompt else PROMPTS, index_words(posts) if posts else None
        answer_prompts(model.to(NUMBERS[precision]), tokenizer, prompts, sampling, dice, index)
    return 0


if __name__ == "__main__":
    sys.exit(main())
