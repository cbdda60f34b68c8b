"""The chance of every token of every text that could leak: which texts, which of their tokens, and how likely each is.

One forward pass gives the chances of all tokens of a window (Hayes et al. 2024, arXiv 2410.19482), so that nothing has
to be sampled.
"""

from __future__ import annotations

import bisect
import itertools
import time
from collections.abc import Iterator

import numpy as np
import torch
from transformers import GenerationConfig

from extract_blog_data import find_personal_data, say
from train_model import break_control_tokens, conversation_tokens
from voice.evidence import Evidence, Span, Text, TokenChances
from voice.loading import name_in
from voice.sampling import next_token_chances
from voice.word_index import visibility_of

# Up to this rank a token counts with 1 / rank, whatever the sampling settings; m in arXiv 2604.18697.
FEW_RANKS = 20
ROWS_AT_ONCE = 64  # of logits that are float32 at a time: 64 x 50,000 x 4 bytes are 13 MB
TEXTS_A_MESSAGE = 25  # a small model on two cores needed 47 s for 59


# ---------------------------------------------------------------------------- texts
def pick_texts(evidence: Evidence, public: int) -> list[Text]:
    """All private texts, `public` public ones, and all held-out ones."""
    others = [post for post in evidence.blog.train if visibility_of(post) == "public"]
    # The same ones every time, so that two reports compare.
    order = np.random.default_rng(42).permutation(len(others))
    chosen = sorted(order[:public])
    trained = evidence.private_posts() + [others[place] for place in chosen]

    texts = [text_of(evidence, post, is_held_out=False) for post in trained]
    texts += [text_of(evidence, post, is_held_out=True) for post in evidence.blog.held_out]
    return texts


def text_of(evidence: Evidence, post: dict, is_held_out: bool) -> Text:
    """The author's turns; of training texts also personal data in them, private titles and readers' comments."""
    tokenizer = evidence.tokenizer
    ids, scored = conversation_tokens(tokenizer, post["messages"])
    group = "held-out" if is_held_out else visibility_of(post)
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
        found = personal_data_in(text, post, evidence) if is_author else others_words_in(text, post, evidence)
        for name, left, right in found:
            first, last = tokens_at(tokenizer, turn, left, right)
            spans.append(Span(name, begin + first, begin + last))
    return Text(post, ids, is_held_out, [span for span in spans if span.end > span.begin])


def runs_of(flags: list) -> Iterator[tuple[object, int, int]]:
    """(flag, begin, end) of each run of equal flags."""
    begin = 0
    for flag, run in itertools.groupby(flags):
        end = begin + len(list(run))
        yield flag, begin, end
        begin = end


def personal_data_in(text: str, conversation: dict, evidence: Evidence) -> Iterator[tuple[str, int, int]]:
    """(group, begin, end) of e-mail addresses, numbers and keys: REDACT was off, or no rule matched."""
    # As in extraction: an id in a link of a public post is no key.
    is_public = visibility_of(conversation) == "public"
    for _, begin, end, _ in find_personal_data(text, is_public, evidence.phone_countries):
        yield "personal data", begin, end


def others_words_in(text: str, conversation: dict, evidence: Evidence) -> Iterator[tuple[str, int, int]]:
    """(group, begin, end) of what a turn before the author's holds: a private post's title, or readers' comments."""
    group = "private titles"
    wanted = [name_in(conversation, "title")] if visibility_of(conversation) == "private" else []
    if conversation.get("kind") == "reply":
        group = "comments"
        wanted = comments_of(conversation, evidence.reply_context)

    for content in wanted:
        content = break_control_tokens(content, evidence.tokenizer)  # as the template shows it
        begin = text.find(content)
        # A thread has several turns, and this may be another one.
        if content and begin >= 0:
            yield group, begin, begin + len(content)


def comments_of(conversation: dict, reply_context: str) -> list[str]:
    """Readers' comments in it, without the opening of the post that replaces one if the author replies to nobody."""
    if conversation.get("kind") != "reply":
        return []
    stand_in = reply_context.partition("{")[0]
    said = [turn["content"] for turn in conversation["messages"] if turn["role"] == "user"]
    return [text for text in said if not (stand_in and text.startswith(stand_in))]


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
def chances_of_texts(model, evidence: Evidence, sampling: GenerationConfig, name: str) -> list[TokenChances]:
    """For each text; says how far it is and how long the rest will need."""
    texts = evidence.texts
    # By tokens, because texts differ much in length.
    began = time.monotonic()
    total = sum(len(text.ids) for text in texts)
    done = 0
    chances = []
    for text in texts:
        chances.append(token_chances(model, text.ids, sampling, evidence.context_tokens, evidence.overlap_tokens))
        done += len(text.ids)

        if len(chances) % TEXTS_A_MESSAGE == 0 or len(chances) == len(texts):
            left = (time.monotonic() - began) / done * (total - done)
            say(f"{name} model: chances of {len(chances):,} of {len(texts):,} texts, {left:.0f} s left")
    return chances


@torch.inference_mode()
def token_chances(model, ids: list[int], sampling: GenerationConfig, context: int, overlap: int) -> TokenChances:
    """The chances of all tokens, in windows of `context` tokens as in training.

    Each window begins with the last `overlap` tokens of the one before. The first token, which nothing predicts,
    counts as given.
    """
    parts = [(np.zeros(1), np.zeros(1), np.zeros(1), np.ones(1, dtype=bool))]  # of the first token
    for start in range(0, max(len(ids) - overlap, 1), context - overlap):
        window = ids[start : start + context]
        inputs = torch.tensor([window], device=model.device)
        logits = model(input_ids=inputs, use_cache=False).logits[0]  # (tokens of the window, vocabulary)

        # What the window before has predicted is context only.
        fresh = overlap if start else 1
        for place in range(fresh, len(window), ROWS_AT_ONCE):
            targets = inputs[0, place : place + ROWS_AT_ONCE]
            # The logits that predict a token are those of the token before it.
            rows = logits[place - 1 : place - 1 + len(targets)].float()
            seen = seen_before(window, place, rows)
            parts.append(chances_of(rows, targets, seen, sampling))
    return TokenChances(*map(np.concatenate, zip(*parts, strict=True)))


def seen_before(window: list[int], place: int, rows: torch.Tensor) -> torch.Tensor:
    """Whether each token occurs before window[place + row], shape of `rows`: (rows, vocabulary)."""
    seen = torch.zeros(rows.shape, dtype=torch.bool, device=rows.device)
    given = window[:place]
    seen[:, given] = True

    # Each row has seen one token more than the one before.
    for row in range(1, len(rows)):
        newest = window[place + row - 1]
        seen[row:, newest] = True
    return seen


def chances_of(
    rows: torch.Tensor, targets: torch.Tensor, seen: torch.Tensor, sampling: GenerationConfig
) -> tuple[np.ndarray, ...]:
    """The fields of TokenChances for `targets`, shape (rows,), under logits and `seen`, both (rows, vocabulary).

    `bound` is that of (l, b)-inextractability (arXiv 2604.18697): whatever temperature, top-k and top-p somebody
    chooses, a token of rank r is drawn with a chance of 1 / r at most, because r - 1 others are likelier. Beyond
    FEW_RANKS, where that is far too high, the plain chance is used instead; a temperature above 1 can exceed it.
    """
    wanted = targets[:, None]

    # Exactly the chances that generation draws from; a token that is cut off is not among them, so its sum is 0.
    tokens, chances = next_token_chances(rows, seen, sampling)
    is_wanted = tokens == wanted
    sampled = (chances.double() * is_wanted).sum(-1).log()

    logits = rows.gather(1, wanted)  # (rows, 1)
    plain = (logits[:, 0] - rows.logsumexp(-1)).double()
    likelier = (rows > logits).sum(-1)
    ranks = 1 + likelier
    bound = torch.where(ranks <= FEW_RANKS, -ranks.double().log(), plain)

    # A repetition penalty reorders the tokens, so the model's own settings may favour a token of low rank.
    bound = torch.maximum(bound, sampled)
    columns = (sampled, bound, plain, likelier == 0)
    return tuple(column.cpu().numpy() for column in columns)
