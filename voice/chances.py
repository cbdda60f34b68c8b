"""The chance of every token of every text that could leak: which texts, which of their tokens, and how likely each is.

One forward pass gives the chances of all tokens of a window (Hayes et al. 2024, arXiv 2410.19482), so that nothing has
to be sampled.
"""

from __future__ import annotations

import bisect
import itertools
import math
import time
from collections.abc import Iterator
from dataclasses import fields

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig

from extract_blog_data import find_personal_data, say
from train_model import break_control_tokens, conversation_tokens
from voice.evidence import Evidence, Span, Text, TokenChances
from voice.loading import name_in, positions_of
from voice.sampling import next_token_chances

# Sampling settings for which the bound holds, in addition to any top-k, top-p and min-p; see `largest_chance`.
HOTTEST = 1.5  # temperature; above it a small model writes no sentences
HIGHEST_PENALTY = 1.1  # for repetition, from 1: Ollama's own; from 1.2 on small models garble

# Logits l + a (l - base) exaggerate what tuning has changed (Contrastive Decoding, Li et al. 2023, arXiv 2210.15097).
CONTRASTS = (0.5, 1.0, 2.0)
PLAUSIBLE = 1e-3  # of the likeliest token's chance; rarer tokens are ruled out, as a large factor a would prefer noise

WINDOW = 1024  # tokens that are read at once; each token is read with the half before it, or with all there is
ROWS_AT_ONCE = 64  # of logits that are float32 at a time: 64 x 50,000 x 4 bytes are 13 MB
TEXTS_A_MESSAGE = 25


# ---------------------------------------------------------------------------- texts
def pick_texts(evidence: Evidence) -> list[Text]:
    """All private texts, and all held-out ones to compare with; none if nothing is private."""
    private = evidence.private_posts()
    if not private:
        return []
    texts = [text_of(evidence, post, is_held_out=False) for post in private]
    texts += [text_of(evidence, post, is_held_out=True) for post in evidence.blog.held_out]
    return texts


def text_of(evidence: Evidence, post: dict, is_held_out: bool) -> Text:
    """The author's turns; of private texts also personal data in them, their titles and readers' comments."""
    tokenizer = evidence.tokenizer
    ids, scored = conversation_tokens(tokenizer, post["messages"])
    group = "held-out" if is_held_out else "private"
    specials = set(tokenizer.all_special_ids)

    spans = []
    for is_author, begin, end in runs_of(scored):
        if is_author:
            while end > begin and ids[end - 1] in specials:
                end -= 1  # the end-of-text token is no secret
            spans.append(Span(group, begin, end))

        # Of held-out texts, which are there to compare with, the author's turns are enough.
        if is_held_out:
            continue
        turn = ids[begin:end]
        text = tokenizer.decode(turn, clean_up_tokenization_spaces=False)
        found = personal_data_in(text, evidence) if is_author else others_words_in(text, post, evidence)
        for name, left, right in found:
            first, last = tokens_at(tokenizer, turn, left, right)
            span = Span(name, begin + first, begin + last)
            spans.append(span)
    not_empty = [span for span in spans if span.end > span.begin]
    return Text(post, ids, not_empty)


def runs_of(flags: list) -> Iterator[tuple[object, int, int]]:
    """(flag, begin, end) of each run of equal flags."""
    begin = 0
    for flag, run in itertools.groupby(flags):
        end = begin + len(list(run))
        yield flag, begin, end
        begin = end


def personal_data_in(text: str, evidence: Evidence) -> Iterator[tuple[str, int, int]]:
    """(group, begin, end) of e-mail addresses, numbers and keys: REDACT was off, or no rule matched."""
    for _, begin, end, _ in find_personal_data(text, False, evidence.phone_countries):
        yield "personal data", begin, end


def others_words_in(text: str, conversation: dict, evidence: Evidence) -> Iterator[tuple[str, int, int]]:
    """(group, begin, end) of what a turn before the author's holds of a private post: its title, or comments on it."""
    group = "private titles"
    wanted = [name_in(conversation, "title")]
    if conversation.get("kind") == "reply":
        group = "private comments"
        wanted = comments_of(conversation)

    for content in wanted:
        content = break_control_tokens(content, evidence.tokenizer)  # as the template shows it
        begin = text.find(content)
        # A thread has several turns, and this may be another one.
        if content and begin >= 0:
            yield group, begin, begin + len(content)


def comments_of(conversation: dict) -> list[str]:
    """Readers' comments in it; a turn that extraction made up from the post's opening is marked, and is none."""
    if conversation.get("kind") != "reply":
        return []
    said = [turn["content"] for turn in conversation["messages"] if turn["role"] == "user"]
    if conversation.get("stand_in") is True:
        return said[1:]
    return said


def tokens_at(tokenizer, ids: list[int], begin: int, end: int) -> tuple[int, int]:
    """The tokens (first, last + 1) of `ids` that make up the characters begin to end of their text."""

    def length(count: int) -> int:
        return len(decoded(count))

    def complete(count: int) -> int:
        # Without a character of which some bytes are in the next token.
        return len(decoded(count).rstrip("\ufffd"))

    def decoded(count: int) -> str:
        return tokenizer.decode(ids[:count], clean_up_tokenization_spaces=False)

    counts = range(len(ids) + 1)
    first = bisect.bisect_right(counts, begin, key=length) - 1
    last = bisect.bisect_left(counts, end, key=complete)
    return first, last


# ---------------------------------------------------------------------------- chances
def chances_of_texts(tuned, base, evidence: Evidence, sampling: GenerationConfig) -> list[TokenChances]:
    """For each text; `base` is None if there is no base model. Says how far it is and how long the rest will need."""
    texts = evidence.texts
    trained = (evidence.context_tokens, evidence.overlap_tokens)
    # The time left is told by tokens, because texts differ much in length.
    began = time.monotonic()
    total = sum(len(text.ids) for text in texts)
    done = 0
    chances = []
    for number, text in enumerate(texts, start=1):
        found = token_chances(tuned, base, text.ids, sampling, trained)
        chances.append(found)
        done += len(text.ids)

        if number % TEXTS_A_MESSAGE == 0 or number == len(texts):
            seconds = time.monotonic() - began
            left = seconds / done * (total - done)
            say(f"leaks: chances of {number:,} of {len(texts):,} texts, {left:.0f} s left")
    return chances


def window_of(positions: int) -> tuple[int, int]:
    """(tokens of a window, of them in the window before too) for a model with so many positions."""
    size = min(WINDOW, positions)
    return size, size // 2


def token_chances(
    tuned,
    base,
    ids: list[int],
    sampling: GenerationConfig,
    trained: tuple[int, int],  # tokens of a window of training, of them in the window before too
) -> TokenChances:
    """The chances of all tokens, each with all tokens before it, or in a long text at least with `window_of`'s half.

    A text longer than the windows of training was learned in pieces, and comes out more easily in such a piece where
    the model has learned it by heart: each token has the larger chance of both.
    """
    models = [tuned] if base is None else [tuned, base]
    size, overlap = window_of(min(positions_of(model) for model in models))
    chances = chances_in_windows(models, ids, sampling, size, overlap)
    if len(ids) <= trained[0]:
        return chances

    in_pieces = chances_in_windows(models, ids, sampling, *trained)
    larger = {}
    for column in fields(TokenChances):
        of_text = getattr(chances, column.name)
        of_pieces = getattr(in_pieces, column.name)
        # Two columns are missing without a base model.
        is_there = of_text is not None
        larger[column.name] = np.maximum(of_text, of_pieces) if is_there else None
    return TokenChances(**larger)


@torch.inference_mode()
def chances_in_windows(
    models: list,  # the tuned model, perhaps the base model
    ids: list[int],
    sampling: GenerationConfig,
    size: int,  # of a window, in tokens
    overlap: int,  # of them, in the window before too
) -> TokenChances:
    """The chances of all tokens in one pass for each window; the first, which nothing predicts, is given."""
    certain = np.zeros(1)
    is_argmax = np.ones(1, dtype=bool)
    parts = [(certain,) * 5 + (is_argmax,)]  # of the first token
    last = max(len(ids) - overlap, 1)
    device = models[0].device
    for start in range(0, last, size - overlap):
        window = ids[start : start + size]
        logits = []  # of each model: (tokens of the window, vocabulary)
        for model in models:
            inputs = torch.tensor([window], device=model.device)
            output = model(input_ids=inputs, use_cache=False)
            logits.append(output.logits[0])

        # What the window before has predicted is context only.
        fresh = overlap if start else 1
        for place in range(fresh, len(window), ROWS_AT_ONCE):
            end = place + ROWS_AT_ONCE
            targets = torch.tensor(window[place:end], device=device)

            # The logits that predict a token are those of the token before it.
            first = place - 1
            last_row = first + len(targets)
            rows = []
            for of_model in logits:
                part = of_model[first:last_row]
                rows.append(part.to(device).float())
            seen = seen_before(window, place, rows[0])
            columns = chances_of(*rows, targets=targets, seen=seen, sampling=sampling)
            parts.append(columns)

    columns = [np.concatenate(column) for column in zip(*parts, strict=True)]
    chances = TokenChances(*columns)
    if len(models) == 1:
        chances.contrasted = None
        chances.base = None
    return chances


def seen_before(window: list[int], place: int, rows: Tensor) -> Tensor:
    """Whether each token occurs before window[place + row], shape of `rows`: (rows, vocabulary)."""
    seen = torch.zeros(rows.shape, dtype=torch.bool, device=rows.device)
    seen[:, window[:place]] = True

    # Each row has seen one token more than the one before.
    for row in range(1, len(rows)):
        newest = window[place + row - 1]
        seen[row:, newest] = True
    return seen


def chances_of(
    rows: Tensor,  # logits, (rows, vocabulary)
    base_rows: Tensor | None = None,  # the same of the base model
    *,
    targets: Tensor,  # (rows,)
    seen: Tensor,  # (rows, vocabulary)
    sampling: GenerationConfig,
) -> tuple[np.ndarray, ...]:
    """The fields of TokenChances for `targets`."""
    wanted = targets[:, None]

    # Exactly the chances that generation draws from; a token that is cut off is not among them, so its sum is 0.
    tokens, chances = next_token_chances(rows, seen, sampling)
    is_wanted = tokens == wanted
    of_wanted = chances.double() * is_wanted
    sampled = of_wanted.sum(-1).log()

    # The model's own settings are among those of the bound, also if somebody has set them higher.
    hottest = max(HOTTEST, sampling.temperature)
    penalty = max(HIGHEST_PENALTY, sampling.repetition_penalty)
    bound = largest_chance(rows, targets, seen, hottest, penalty)
    plain = rows.log_softmax(-1)
    is_likelier = rows > rows.gather(1, wanted)
    is_argmax = is_likelier.sum(-1) == 0

    # Placeholders without a base model.
    contrasted = torch.zeros_like(bound)
    base = torch.zeros_like(bound)
    if base_rows is not None:
        base_plain = base_rows.log_softmax(-1)
        contrasted = contrasted_chance(plain, base_plain, targets, hottest)
        base = base_plain.gather(1, wanted)[:, 0]

    plain_of_wanted = plain.gather(1, wanted)[:, 0]
    columns = []
    for column in (sampled, bound, contrasted, base, plain_of_wanted):
        on_cpu = column.double().cpu()
        columns.append(on_cpu.numpy())
    return (*columns, is_argmax.cpu().numpy())


def largest_chance(
    logits: Tensor,  # (rows, vocabulary), before penalty and temperature
    targets: Tensor,  # (rows,)
    seen: Tensor,  # (rows, vocabulary)
    hottest: float,
    penalty: float,
) -> Tensor:
    """Log of an upper bound of the chance that sampling gives each target, shape (rows,).

    It holds for every temperature T up to `hottest`, every repetition penalty p from 1 to `penalty` on all seen tokens
    or on some of them (llama.cpp looks at the last 64), and every rule that cuts off the least likely tokens (top-k,
    top-p, min-p).

    Derivation. A penalised logit is l / p if l > 0 and l p if not, so that it only falls with p. Let z be the target
    and d_j the difference of the logits of j and z after the penalty. It is least where z is not penalised and j, if
    seen, is penalised with `penalty`: call that m_j. If z is kept, then so is every j with m_j > 0, since d_j >= m_j.
    The chance of z is therefore at most 1 / (1 + sum of exp(d_j / T) over those j), and replacing d_j by m_j and T by
    `hottest` makes each exp(d_j / T) smaller and the bound larger. Without a penalty it is reached: by top-k with
    k = the rank of z, at T = `hottest`.
    """
    wanted = targets[:, None]
    target = logits.gather(1, wanted)  # (rows, 1)
    lowered = torch.where(logits > 0, logits / penalty, logits * penalty)
    least = torch.where(seen, lowered, logits)
    above = least - target

    exponents = above / hottest
    exponents = exponents.masked_fill(above <= 0, -math.inf)
    itself = torch.zeros_like(target)
    together = torch.cat([exponents, itself], 1)
    return -together.logsumexp(-1)


def contrasted_chance(
    tuned: Tensor,  # logarithms of chances, (rows, vocabulary)
    base: Tensor,  # the same of the base model
    targets: Tensor,  # (rows,)
    hottest: float,
) -> Tensor:
    """Log of the largest chance of each target that any of CONTRASTS gives, shape (rows,).

    A token below PLAUSIBLE has no chance. For each contrast it is the exact largest chance over temperatures up to
    `hottest`, top-k, top-p and min-p.
    """
    wanted = targets[:, None]
    target = tuned.gather(1, wanted)
    likeliest = tuned.max(-1, keepdim=True).values
    least = likeliest + math.log(PLAUSIBLE)

    # Only the plausible tokens are computed with, some hundred of 50,000. They are the likeliest ones of the row.
    is_plausible = tuned >= least
    most = is_plausible.sum(-1).max()
    kept = tuned.topk(int(most))
    is_ruled_out = kept.values < least
    difference = kept.values - base.gather(1, kept.indices)
    is_target = kept.indices == wanted
    place = is_target.int().argmax(-1)

    # A penalty is not among the settings here.
    unseen = torch.zeros_like(is_ruled_out)
    best = torch.full(targets.shape, -math.inf, device=tuned.device)
    for factor in CONTRASTS:
        exaggerated = kept.values + factor * difference
        logits = exaggerated.masked_fill(is_ruled_out, -math.inf)
        chance = largest_chance(logits, place, unseen, hottest, 1.0)
        best = torch.maximum(best, chance)
    is_implausible = target < least
    return best.masked_fill(is_implausible[:, 0], -math.inf)
