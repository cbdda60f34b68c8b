"""Generates answers: which token may come next and how likely it is, many prompts in one batch, text piece by piece."""

from __future__ import annotations

import contextlib
import inspect
import itertools
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from transformers import GenerationConfig
from transformers.cache_utils import DynamicLayer

import train_model as training
from extract_blog_data import check_settings, say
from voice.loading import is_whole, positions_of
from voice.settings import ROWS, Settings


class Answer(NamedTuple):
    """What a model wrote to one prompt."""

    text: str
    tokens: list[int]
    ended: bool  # with an end-of-text token


# Names in generation_config.json, with transformers' defaults.
DEFAULTS = {
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
    "repetition_penalty": 1.0,
    "max_new_tokens": 200,
}
LEAST_TEMPERATURE = 1e-6  # logits divided by less overflow float32
# What transformers raises for values of the wrong type.
UNREADABLE = (OSError, ValueError, TypeError, AttributeError, KeyError)


# ---------------------------------------------------------------------------- sampling settings
def check_generation_config(path: Path) -> None:
    """Exits with a sentence if the model's own sampling settings cannot be used; transformers would only warn."""
    if not path.is_file():
        return

    remedy = "run train_model.py again, or correct the file"
    if training.damage_of(path):
        sys.exit(f"{path} holds no settings: {remedy}.")
    content = training.read_json_object(path)
    values = {name: content.get(name) for name in DEFAULTS}
    rows = {name: ROWS[name.upper()] for name in DEFAULTS}
    check_settings(values, rows, str(path))

    ends = content.get("eos_token_id")
    listed = ends if isinstance(ends, list) else [ends]
    are_tokens = all(is_whole(end) and end >= 0 for end in listed)
    if ends is not None and not are_tokens:
        sys.exit(f"eos_token_id in {path} must be a token id or a list of them: {remedy}.")

    try:
        GenerationConfig.from_pretrained(path.parent, local_files_only=True)
    except UNREADABLE as error:
        sys.exit(f"transformers cannot use {path} ({training.brief(error)}): {remedy}.")


def read_sampling(config: GenerationConfig, tokenizer, settings: Settings) -> GenerationConfig:
    """The model's generation_config.json under the settings, with transformers' defaults below both.

    Changes `config` and returns it.
    """
    for name, default in DEFAULTS.items():
        setting = getattr(settings, name)
        if setting is not None:
            setattr(config, name, setting)
        elif getattr(config, name) is None:
            setattr(config, name, default)
            if name == "max_new_tokens":
                say(f"The model's generation_config.json gives no length: answers have {default} tokens at most.")

    # A temperature in the settings means sampling, even if the file says greedy.
    if settings.temperature is not None:
        config.do_sample = True
    if config.temperature < LEAST_TEMPERATURE:
        config.do_sample = False

    # One token, several or none; from here on always a list.
    ends = tokenizer.eos_token_id if config.eos_token_id is None else config.eos_token_id
    config.eos_token_id = [ends] if isinstance(ends, int) else ends or []
    return config


def make_rng(seed: int | None) -> torch.Generator:
    """Seeded with `seed`, or differently every time for None."""
    rng = torch.Generator()
    if seed is None:
        rng.seed()
    else:
        rng.manual_seed(seed)
    return rng


# ---------------------------------------------------------------------------- the next token
def next_token_chances(logits: Tensor, seen: Tensor, sampling: GenerationConfig) -> tuple[Tensor, Tensor]:
    """(tokens, chances), both of shape (rows, kept): what may come next, the likeliest first; each row sums to 1.

    `logits` and `seen` (whether a token occurred before) have the shape (rows, vocabulary). In transformers' order:
    repetition penalty (Keskar et al. 2019), temperature, top-k, top-p (Holtzman et al. 2020). Both generation and the
    leak check use this function, so that they cannot drift apart.
    """
    vocabulary = logits.shape[-1]
    penalty = sampling.repetition_penalty
    if penalty != 1:
        # Both branches lower the logit: multiplying makes a negative one smaller.
        penalised = torch.where(logits > 0, logits / penalty, logits * penalty)
        logits = torch.where(seen, penalised, logits)

    if not sampling.do_sample:
        tokens = logits.argmax(-1, keepdim=True)
        return tokens, torch.ones_like(tokens, dtype=torch.float32)

    kept = min(sampling.top_k or vocabulary, vocabulary)  # 0: all
    scaled = logits / sampling.temperature
    best = scaled.topk(kept)
    chances = best.values.softmax(-1)

    # A token is kept while those before it sum to less than top_p, so the first always is. Skipped at 1: over 50,000
    # tokens the sum rounds up to 1 too early, and the leak check would say "never".
    if sampling.top_p < 1:
        before = chances.cumsum(-1) - chances
        chances[before >= sampling.top_p] = 0
    return best.indices, chances / chances.sum(-1, keepdim=True)


def sample_next_token(logits: Tensor, seen: Tensor, sampling: GenerationConfig, rng: torch.Generator) -> Tensor:
    """The next token of each row, shape (rows,); `logits` and `seen` have the shape (rows, vocabulary)."""
    tokens, chances = next_token_chances(logits, seen, sampling)
    if not sampling.do_sample:
        return tokens[:, 0]

    # Drawn on the CPU, so that a seed means the same on every device.
    place = torch.multinomial(chances.cpu(), 1, generator=rng)
    drawn = tokens.gather(1, place.to(tokens.device))
    return drawn[:, 0]


# ---------------------------------------------------------------------------- a batch of prompts
ROOM = 128  # tokens


class RoomyLayer(DynamicLayer):
    """Keys and values of a layer, shape (rows, heads, tokens, size), as the beginning of tensors with room for more.

    transformers copies all of them for every token: a third of the 900th step of 8 answers, profiled on two cores.
    """

    def __init__(self, layer: DynamicLayer):
        super().__init__()
        self.lazy_initialization(layer.keys, layer.values)
        self.keys = layer.keys
        self.values = layer.values
        self.with_room = []  # keys and values, and ROOM behind them

    def update(self, key_states: Tensor, value_states: Tensor, *_, **__) -> tuple[Tensor, ...]:
        begin = self.keys.shape[-2]
        new = key_states.shape[-2]
        end = begin + new
        if self.room() < end:
            longer = (0, 0, 0, new + ROOM)  # of the last but one dimension
            held = (self.keys, self.values)
            self.with_room = [functional.pad(states, longer) for states in held]

        keys, values = self.with_room
        keys[..., begin:end, :] = key_states
        values[..., begin:end, :] = value_states
        self.keys = keys[..., :end, :]
        self.values = values[..., :end, :]
        return self.keys, self.values

    def room(self) -> int:
        """Tokens for which there is room, those that are held among them."""
        if not self.with_room:
            return 0
        keys, _ = self.with_room
        return keys.shape[-2]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        self.with_room = []


FEW_ROWS = 32


class LinearOfFewRows(TorchFunctionMode):
    """While it is active, linear layers multiply their weight by the rows, not the rows by their weight.

    For float32 on a CPU. The output layer of SmolLM2-135M needs 13 ms for 4 rows instead of 40, 17 for 8 instead of 44
    and 20 for one either way; two cores of an AMD EPYC, torch 2.13.
    """

    def __torch_function__(self, function, types, arguments=(), options=None):
        if function is not functional.linear or options:
            return function(*arguments, **(options or {}))

        inputs, weight, bias = (*arguments, None)[:3]
        shape = inputs.shape[:-1]
        rows = shape.numel()
        if not 1 < rows <= FEW_ROWS:
            return function(*arguments)
        columns = inputs.reshape(rows, -1).T
        product = weight @ columns  # (outputs, rows)
        result = product.T.contiguous().view(*shape, -1)
        return result if bias is None else result + bias


class Batch:
    """Prompts that are answered together: one row each, padded on the left. A row leaves when its answer is complete.

    ids (rows, tokens not processed yet), mask (rows, all tokens so far; 0 is padding), seen (rows, vocabulary).
    """

    def __init__(self, model, prompts: list[list[int]]):
        self.model = model
        is_slow = model.device.type == "cpu" and model.dtype == torch.float32
        self.layers = LinearOfFewRows() if is_slow else contextlib.nullcontext()
        # Mamba and BLOOM have none.
        self.takes_positions = "position_ids" in inspect.signature(model.forward).parameters
        self.numbers = list(range(len(prompts)))  # of the prompts, by row
        self.cache = None  # of the tokens processed so far

        longest = max(map(len, prompts))
        ids = []
        mask = []
        for prompt in prompts:
            padding = [0] * (longest - len(prompt))
            ids.append(padding + prompt)
            mask.append(padding + [1] * len(prompt))
        self.ids = self.tensor(ids)
        self.mask = self.tensor(mask)

        # For the repetition penalty: only the row's own tokens. transformers' processor also counts padding, and
        # GPT-2 pads with its end of text, so short prompts would be penalised for stopping.
        vocabulary = model.config.get_text_config().vocab_size
        self.seen = torch.zeros(len(prompts), vocabulary, dtype=torch.bool, device=model.device)
        for row, prompt in enumerate(prompts):
            self.seen[row, prompt] = True

    def tensor(self, values: list) -> Tensor:
        return torch.tensor(values, device=self.model.device)

    def next_logits(self) -> Tensor:
        """Logits of each row's next token, in float32, shape (rows, vocabulary)."""
        inputs = {"input_ids": self.ids, "attention_mask": self.mask, "past_key_values": self.cache}
        if self.takes_positions:
            # Counted from each row's own beginning; padding is masked, so its positions do not matter.
            counted = self.mask.cumsum(1) - 1
            positions = counted.clamp(min=0)
            new = self.ids.shape[1]
            inputs["position_ids"] = positions[:, -new:]

        with self.layers:
            output = self.model(**inputs, use_cache=True, logits_to_keep=1)
        if self.cache is None:
            self.cache = getattr(output, "past_key_values", None)
            self.make_room()
        return output.logits[:, -1].float()

    def make_room(self) -> None:
        """In the layers that hold every token; windows and linear attention grow no further."""
        layers = getattr(self.cache, "layers", [])
        for number, layer in enumerate(layers):
            if type(layer) is DynamicLayer and layer.is_initialized:
                layers[number] = RoomyLayer(layer)

    def append(self, tokens: Tensor) -> None:
        """Adds one token to each row; `tokens` has the shape (rows,)."""
        new = tokens[:, None]
        # Without a cache (Mamba) all tokens are processed again at every step.
        self.ids = new if self.cache is not None else torch.cat([self.ids, new], 1)
        self.mask = torch.cat([self.mask, torch.ones_like(new)], 1)
        self.seen.scatter_(1, new, True)

    def keep(self, rows: list[int]) -> None:
        """Removes all other rows."""
        self.numbers = [self.numbers[row] for row in rows]
        index = self.tensor(rows)
        self.ids = self.ids[index]
        self.mask = self.mask[index]
        self.seen = self.seen[index]
        if self.cache is not None:
            self.cache.reorder_cache(index)  # the only way to drop rows that linear attention supports too


@torch.inference_mode()
def generate(
    model, prompts: list[list[int]], sampling: GenerationConfig, rng: torch.Generator
) -> Iterator[list[tuple[int, int, bool]]]:
    """Answers to all prompts (token ids) at once; each step yields (prompt's number, token, whether it is its last).

    Prompt and answer together never exceed the model's positions.
    """
    room = [room_for_answer(model, prompt, sampling) for prompt in prompts]
    batch = Batch(model, prompts)
    for length in itertools.count(1):
        chosen = sample_next_token(batch.next_logits(), batch.seen, sampling, rng)

        step = []
        for number, token in zip(batch.numbers, chosen.tolist(), strict=True):
            is_last = token in sampling.eos_token_id or length >= room[number]
            step.append((number, token, is_last))
        yield step

        # A row whose answer is complete would cost as much as the others at every further step.
        unfinished = [row for row, (_, _, is_last) in enumerate(step) if not is_last]
        if not unfinished:
            return
        batch.append(chosen)
        if len(unfinished) < len(step):
            batch.keep(unfinished)


def room_for_answer(model, prompt: list[int], sampling: GenerationConfig) -> int:
    """Tokens that an answer can have at most."""
    return min(sampling.max_new_tokens, positions_of(model) - len(prompt))


def room_for_prompt(model, sampling: GenerationConfig) -> int:
    """Tokens that a prompt can have: half of the positions, if the answer alone could fill all of them."""
    positions = positions_of(model)
    return max(positions - sampling.max_new_tokens, positions // 2)


# ---------------------------------------------------------------------------- text
# Where a sentence is complete: its mark, what closes quotes, brackets and emphasis, and a space. Languages that write
# without spaces have marks of their own. A paragraph is complete too: headings and lists end without a mark.
SENTENCE_END = re.compile(r"""[.!?…]+["'”’»)\]*_]*(?=\s|$)|[。！？]+[」』”）]*|\S(?=\n\n)""")
# The last tokens of the longest answer are shown by whole sentences, since it may break off. A guess: few are longer.
HELD_BACK = 60


def whole_sentences(text: str) -> str:
    """The text up to the end of its last whole sentence; all of it if there is none."""
    ends = [found.end() for found in SENTENCE_END.finditer(text)]
    return text[: ends[-1]] if ends else text


def stream(
    model,
    tokenizer,
    prompts: list[list[int]],
    sampling: GenerationConfig,
    rng: torch.Generator,
    begun: Sequence[int] = (),
    raw: bool = True,
    progress: Callable = iter,
) -> Iterator[tuple[str, Answer | None]]:
    """(piece of text, the complete answer with its last piece, else None), one prompt after the other.

    All are generated together: the first answer is shown as it grows, the next one from where it is by then. `begun`
    are the tokens at the end of every prompt that are the beginning of the answer, and so of its text. Unless `raw`, an
    answer that has no room to end loses the sentence in which it breaks off. `progress` sees each step go by.
    """
    tokens = [[] for _ in prompts]
    is_complete = [False for _ in prompts]
    current = 0  # number of the answer that is being shown
    shown = ""  # of its text
    for step in progress(generate(model, prompts, sampling, rng)):
        for number, token, is_last in step:
            tokens[number].append(token)
            is_complete[number] = is_last

        # After a complete answer comes the next one, which may be complete as well.
        while current < len(prompts):
            ids = tokens[current]
            written = [*begun, *ids]
            text = tokenizer.decode(written, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            text = text.strip()
            ended = ids[-1] in sampling.eos_token_id
            room = room_for_answer(model, prompts[current], sampling)
            left = room - len(ids)
            if not raw and not ended and left < HELD_BACK:
                text = whole_sentences(text)

            if not is_complete[current]:
                text = text.rstrip("\ufffd")  # the bytes of a character may come in several tokens
                yield text[len(shown) :], None
                shown = max(shown, text, key=len)
                break

            answer = Answer(text, ids, ended)
            yield text[len(shown) :], answer
            shown = ""
            current += 1


def whole_answers(
    model,
    tokenizer,
    prompts: list[list[int]],
    sampling: GenerationConfig,
    rng: torch.Generator,
    progress: Callable = iter,
) -> Iterator[Answer]:
    """The answers in the order of the prompts, each as soon as it and those before it are complete."""
    for _, answer in stream(model, tokenizer, prompts, sampling, rng, progress=progress):
        if answer is not None:
            yield answer


def request_tokens(tokenizer, text: str) -> list[int]:
    """Token ids of a prompt for an answer to `text`, the only turn so far."""
    return prompt_tokens(tokenizer, [{"role": "user", "content": text}])


def prompt_tokens(tokenizer, messages: list[dict]) -> list[int]:
    """Token ids of a conversation up to where the assistant's next turn begins."""
    text = training.render(tokenizer, messages, add_generation_prompt=True)
    return tokenizer.encode(text, add_special_tokens=False)


def begun_tokens(tokenizer, messages: list[dict], words: str) -> list[int]:
    """Token ids of an answer to `messages` that begins with `words`, as training has it, up to the end of the words."""
    words = training.break_control_tokens(words, tokenizer).strip()
    turn = {"role": "assistant", "content": words}
    said = [*messages, turn]
    rendered = training.render(tokenizer, said)
    _, answer = training.split_at_answer(tokenizer, said, rendered)

    # What the template puts before an answer, a space perhaps, belongs to it.
    before, found, _ = answer.partition(words)
    begun = before + words if found else words
    return tokenizer.encode(begun, add_special_tokens=False)
