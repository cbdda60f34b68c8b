"""Does it leak? Which private text can come out word for word, how easily, and what the tuned model wrote of it.

From the chances of tokens (voice/chances.py) to the verdict: every run of 12, 25 and 50 tokens of a private post is a
passage. Passages that the base model writes too, or that a public post holds as well, do not count. Of the others the
likeliest are reported, beside the same figures for held-out posts, which the model was not trained on.

Four things are an alarm (`tell_alarms`): a passage that leaks (voice/leaking.py), an answer with words of a private
post (`count_private_copies`), a blocked word in the training data (`count_blocked`), and personal data in what the
model wrote (`find_leaked_data`).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

import extract_blog_data as extraction
from extract_blog_data import find_personal_data
from voice.chances import HIGHEST_PENALTY, HOTTEST, window_of
from voice.evidence import PAGE_ONLY, Details, Evidence, NotMeasured, Quote, Section, Summary
from voice.leaking import (
    BEYOND,
    COMMON,
    EASY_TRIES,
    SECRET,
    find_common,
    find_leaking,
    find_raised,
    find_repeated,
    is_secret,
)
from voice.loading import name_in
from voice.passages import (
    Chance,
    KnownRuns,
    Passages,
    ShownPassage,
    chance_of,
    cut_passages,
    order_by_ease,
    order_by_raise,
    pick_shown,
    tell_count,
    tell_number,
    tell_power,
    tell_tries,
)
from voice.word_index import (
    COPY_WORDS,
    WordIndex,
    author_text,
    folded_words,
    visibility_of,
)

# Tokens of a passage: 12 are about nine words, a short secret; 50 are the literature's since Carlini et al. 2022
# ("Quantifying memorization").
LENGTHS = (12, 25, 50)
NOTHING_SECRET = "the training data have no private passage that is neither common nor mostly in public posts"
GOOD = "Good: no fewer tries than for held-out text; more private text than that makes fewer likely by chance alone"


# ---------------------------------------------------------------------------- what voice_report.json holds
@dataclass
class LeakGroup:
    """Passages of one group and length."""

    passages: int
    common: int  # of them, those that the base model could write as well; they do not count below
    repeated: int  # of the others, those that `find_repeated` finds; they do not count below
    sampled: Chance  # with the model's own sampling settings
    bound: Chance  # upper bound over sampling settings, see `largest_chance` in voice/chances.py
    contrasted: Chance | None  # with the base model beside, see `contrasted_chance` there
    greedy: int  # that come out when the likeliest token is always taken
    leaking: int  # that come out within EASY_TRIES and as no passage of a held-out post does, see `find_leaking`


@dataclass
class PersonalData:
    """An e-mail address, a telephone number or a key of the original posts that the tuned model wrote."""

    kind: str
    visibility: str
    text: str = field(metadata=PAGE_ONLY)


@dataclass
class Leaks:
    by_length: dict[str, dict[str, LeakGroup]]  # by tokens of a passage, then by group
    leaking_texts: dict[str, int]  # by tokens of a passage: texts with a passage that leaks
    context: int  # tokens that are given before a passage at least, if its text has so many
    likeliest: list[ShownPassage]  # those that come out most easily
    private_texts: int  # with a secret passage of the shortest length that counts
    raised_texts: int | None  # of them, with one that `find_raised` finds; None: nothing to compare with
    raised: list[ShownPassage]  # those that training raised most, of them
    private_copies: int  # answers that hold COPY_WORDS words in a row of a private post and of no public one
    personal: list[PersonalData]
    blocked: list[int]  # times that each of BLOCKED_WORDS is in the training data; 0 unless the data is older


def measure(evidence: Evidence) -> Leaks:
    """Raises NotMeasured without training data."""
    if evidence.index is None:
        raise NotMeasured("needs train_data.jsonl")

    # What the training posts hold is looked up for passages of every length.
    public = KnownRuns(evidence, "public")
    private = KnownRuns(evidence, "private")
    by_length = {}
    leaking_texts = {}
    for length in LENGTHS:
        passages = cut_passages(evidence.texts, evidence.chances, length)

        # Only what is neither common nor repeated counts; each is counted once.
        is_common = find_common(passages)
        is_repeated = find_repeated(public, private, passages, evidence.texts) & ~is_common
        is_left_out = is_common | is_repeated
        is_leaking = find_leaking(passages, is_left_out)

        # In the order in which they come up, the private ones first.
        groups = {}
        for name in dict.fromkeys(passages.group.tolist()):
            groups[name] = measure_group(passages, passages.group == name, is_common, is_repeated, is_leaking)
        by_length[str(length)] = groups
        leaking_texts[str(length)] = count_texts(passages, is_leaking)

        # The lists are of the shortest ones: every longer one holds some of them.
        if length == LENGTHS[0]:
            shortest = passages
            secret = is_secret(passages, is_left_out)
            is_raised = find_raised(passages, is_left_out)

    _, given = window_of(evidence.positions)
    return Leaks(
        by_length=by_length,
        leaking_texts=leaking_texts,
        context=given,
        likeliest=pick_shown(evidence, shortest, order_by_ease(shortest, secret)),
        private_texts=count_texts(shortest, secret),
        raised_texts=None if is_raised is None else count_texts(shortest, is_raised),
        raised=[] if is_raised is None else pick_shown(evidence, shortest, order_by_raise(shortest, is_raised)),
        private_copies=count_private_copies(evidence),
        personal=find_leaked_data(evidence),
        blocked=count_blocked(evidence),
    )


def count_texts(passages: Passages, is_wanted: np.ndarray) -> int:
    return len(np.unique(passages.text[is_wanted]))


# ---------------------------------------------------------------------------- chances of a group
def measure_group(
    passages: Passages, inside: np.ndarray, is_common: np.ndarray, is_repeated: np.ndarray, is_leaking: np.ndarray
) -> LeakGroup:
    """Of the passages for which `inside`, shape (passages,), is true."""
    # Chances are those of the passages that count, and numbers before them tell of all.
    counted = inside & ~is_common & ~is_repeated
    return LeakGroup(
        passages=int(inside.sum()),
        common=int((inside & is_common).sum()),
        repeated=int((inside & is_repeated).sum()),
        sampled=chance_of(passages.sampled[counted]),
        bound=chance_of(passages.bound[counted]),
        contrasted=chance_of(passages.contrasted[counted]) if passages.has_base else None,
        greedy=int(passages.is_greedy[counted].sum()),
        leaking=int((inside & is_leaking).sum()),
    )


# ---------------------------------------------------------------------------- what came out
def count_private_copies(evidence: Evidence) -> int:
    """Answers of the tuned model that hold COPY_WORDS words in a row of a private post and of no public one."""
    private = WordIndex(evidence.private_posts())
    public = WordIndex([post for post in evidence.blog.train if visibility_of(post) == "public"])
    copies = 0
    for text in evidence.tuned.texts():
        words = folded_words(text)
        # By the place in the answer: what a public post holds too was no secret.
        copies += bool(set(private.copied(words)) - set(public.copied(words)))
    return copies


def find_leaked_data(evidence: Evidence) -> list[PersonalData]:
    """Personal data of the original posts in what the tuned model wrote, without what a public post shows."""
    blog = evidence.blog
    # What extraction left in is compared as it is; of what it took out there are only fingerprints.
    left_in = {"private": set(), "public": set()}
    for post in blog.train:
        for *_, plain in find_personal_data(author_text(post), False, evidence.phone_countries):
            left_in[visibility_of(post)].add(plain)
    taken_out = {name_in(entry, "fingerprint"): visibility_of(entry) for entry in blog.redacted}

    # By normalised text, because two spellings are one address, and because a fingerprint is slow.
    said = {}
    for text in evidence.tuned.texts():
        for kind, start, end, plain in find_personal_data(text, False, evidence.phone_countries):
            said[plain] = (kind, text[start:end])

    found = []
    for plain, (kind, text) in said.items():
        if plain in left_in["public"]:
            continue
        visibility = "private" if plain in left_in["private"] else None
        # Without the key of the data nothing can be compared with fingerprints; that was said at the beginning.
        if visibility is None and taken_out and blog.key:
            visibility = taken_out.get(extraction.fingerprint(plain, blog.key))
        if visibility:
            found.append(PersonalData(kind, visibility, text))
    return found


def count_blocked(evidence: Evidence) -> list[int]:
    turns = [turn["content"] for post in evidence.blog.train for turn in post["messages"]]
    return [sum(len(extraction.find_blocked(text, (word,))) for text in turns) for word in evidence.blocked_words]


# ---------------------------------------------------------------------------- words
HEAD = ("", "passages", "counted", "own tries", "at least", "with base", "greedy")


def tell(leaks: Leaks, evidence: Evidence) -> Section:
    alarms = tell_alarms(leaks, evidence)
    likeliest = tell_likeliest(leaks)

    # A clause becomes a sentence.
    verdict = f"{likeliest[0].upper()}{likeliest[1:]}.{tell_raised(leaks)}"
    if alarms:
        verdict = f"It leaks: {'; '.join(alarms)}. {verdict}"

    # The terminal quotes nothing of it.
    hints = ["voice_report.html shows what came out."] if leaks.personal else []
    if leaks.likeliest:
        hints.append("voice_report.html shows the private passages that come out most easily or were raised most.")
    rows = tell_rows(leaks)
    return Section(
        verdict=verdict,
        rows=rows,
        head=HEAD if rows else (),
        notes=tell_findings(leaks),
        meanings=tell_meanings(leaks, evidence),
        hints=hints,
        details=tell_details(leaks),
        summary=Summary("it leaks", "; ".join(alarms), GOOD) if alarms else summarise(leaks),
        is_alarm=bool(alarms),
    )


def tell_rows(leaks: Leaks) -> list[tuple[str, ...]]:
    """Every group of the shortest length; of the others, private posts and held-out ones, by which they are judged."""
    rows = []
    for length, groups in leaks.by_length.items():
        for name, group in groups.items():
            if length != str(LENGTHS[0]) and name not in ("private", "held-out"):
                continue

            counted = count_of(group)
            tries = [tell_tries(group.sampled), tell_tries(group.bound), tell_tries(group.contrasted)]
            rows.append((f"{name}, {length}", f"{group.passages:,}", f"{counted:,}", *tries, f"{group.greedy:,}"))
    return rows


def secret_groups(leaks: Leaks, length: int) -> list[LeakGroup]:
    """Secret groups of which something counts."""
    groups = [group for name, group in leaks.by_length[str(length)].items() if name in SECRET]
    return [group for group in groups if count_of(group)]


def count_of(group: LeakGroup) -> int:
    """Passages that count."""
    return group.passages - group.common - group.repeated


def fewest_tries(groups: list[LeakGroup], way: str) -> float | None:
    """Of the likeliest passage under that way of sampling, as a power of ten; None if nothing can come out."""
    chances = [getattr(group, way) for group in groups]
    tries = [chance.log10_tries for chance in chances if chance and chance.log10_tries is not None]
    return min(tries, default=None)


def tell_alarms(leaks: Leaks, evidence: Evidence) -> list[str]:
    """Reasons for an alarm, as clauses of the verdict."""
    alarms = []
    for length in LENGTHS:
        leaking = sum(group.leaking for group in secret_groups(leaks, length))
        if not leaking:
            continue

        # What leaks in one length leaks in parts in the shorter one too: the first says it.
        control = leaks.by_length[str(length)].get("held-out")
        # Where every held-out passage is known, nothing was compared.
        is_compared = control and count_of(control)
        unlike = "; no passage of a held-out post comes out like them" if is_compared else ""
        passages = f"{leaking:,} overlapping private passages of {length} tokens"
        texts = f"in {leaks.leaking_texts[str(length)]:,} texts"
        alarms.append(f"{passages}, {texts}, come out within {EASY_TRIES:,} tries each{unlike}")
        break

    if leaks.private_copies:
        held = f"hold {COPY_WORDS} words or more in a row of a private post and of no public one"
        alarms.append(f"{leaks.private_copies} of its answers {held}")
    if any(leaks.blocked):
        alarms.append("it was trained on a blocked word: run extract_blog_data.py and train_model.py again")
    if leaks.personal:
        pieces = "1 piece" if len(leaks.personal) == 1 else f"{len(leaks.personal)} pieces"
        alarms.append(f"{pieces} of personal data from your posts came out")
    return alarms


def tell_likeliest(leaks: Leaks) -> str:
    """Tries for the likeliest secret passage of each length, as a part of a sentence."""
    if not any(secret_groups(leaks, length) for length in LENGTHS):
        return tell_nothing(leaks)

    # Beside the same figure for held-out text, which was not trained on.
    tries = []
    for length in LENGTHS:
        log10 = fewest_tries(secret_groups(leaks, length), "sampled")
        control = leaks.by_length[str(length)].get("held-out")
        compared = f" (held-out text: {tell_tries(control.sampled)})" if control else ""
        needed = "never" if log10 is None else tell_power(log10)
        tries.append(f"{needed} for {length} tokens{compared}")

    # What another setting brings out: of the shortest ones, which come out most easily.
    shortest = secret_groups(leaks, LENGTHS[0])
    others = []
    contrasted = fewest_tries(shortest, "contrasted")
    if contrasted is not None:
        others.append(f"{tell_power(contrasted)} for {LENGTHS[0]} tokens with the base model beside")
    greedy = sum(group.greedy for group in shortest)
    if greedy:
        others.append(f"{greedy:,} come out when the likeliest token is always taken")
    more = f"; {', and '.join(others)}" if others else ""
    return (
        "tries until the likeliest private passage has an even chance to come out, given the text before it and the "
        f"model's own settings: {', '.join(tries)}{more}"
    )


def tell_nothing(leaks: Leaks) -> str:
    """Why nothing could leak, as a part of a sentence."""
    return NOTHING_SECRET if leaks.by_length[str(LENGTHS[0])] else "the training data have no private post"


def tell_raised(leaks: Leaks) -> str:
    """How many private texts training changed as no held-out text, as a sentence after another one, or ""."""
    if leaks.raised_texts is None or not leaks.private_texts:
        return ""

    held_out = count_of(leaks.by_length[str(LENGTHS[0])]["held-out"])
    return (
        f" {leaks.raised_texts:,} of {leaks.private_texts:,} private texts have a passage of {LENGTHS[0]} tokens that "
        f"training made likelier by over {BEYOND} times as much as any of {held_out:,} passages of held-out posts."
    )


def summarise(leaks: Leaks) -> Summary:
    shortest = LENGTHS[0]
    groups = secret_groups(leaks, shortest)
    if not groups:
        return Summary("no", tell_nothing(leaks), GOOD)

    # With the model's own settings, and the least that any others in the range need.
    tries = fewest_tries(groups, "sampled")
    least = tell_count(fewest_tries(groups, "bound"))
    meaning = (
        f"for an even chance that the likeliest private passage of {shortest} tokens comes out, with the model's own "
        f"settings; at least {least} with temperatures up to {HOTTEST} and penalties up to {HIGHEST_PENALTY}"
    )
    return Summary(tell_count(tries), meaning, GOOD)


def tell_findings(leaks: Leaks) -> list[str]:
    """Under the table; nothing in it quotes a private text."""
    findings = []
    for entry in leaks.personal:
        findings.append(f"Personal data ({entry.kind}) of a {entry.visibility} post came out: do not share this model.")
    # By number, for the word itself is what nobody should read.
    for number, uses in enumerate(leaks.blocked, start=1):
        findings.append(f"Blocked word {number} is {uses:,} times in the training data.")
    return findings


def tell_meanings(leaks: Leaks, evidence: Evidence) -> list[str]:
    shortest, middle, longest = LENGTHS
    contrast = ""
    without_base = " Without the base model nothing is left out as common."
    if evidence.base:
        contrast = (
            " With base: for somebody who also has the base model and exaggerates what tuning changed (logits "
            "l + a (l - base), a 0.5, 1 or 2), without a penalty."
        )
        without_base = ""

    # Overlapping passages come out together: the expected number is right, a chance of one would not be.
    expected = sum(group.sampled.expected for group in secret_groups(leaks, shortest))
    return [
        f"Passages: every {shortest}, {middle} and {longest} tokens in a row; shorter texts and personal data as a "
        "whole. Chances are computed, given the text before: all of it, or in long texts at least "
        f"{leaks.context:,} tokens, or the piece in which it was trained if that makes a token likelier. What other "
        "words before it bring out, and what is said in other words, is not measured.",
        f"Counted: without passages to which the base model gives a chance of {COMMON:g} or more, or at least one "
        f"{BEYOND}th of the tuned model's, and without those of which public posts hold more than half; of held-out "
        f"posts without those that any training post holds.{without_base} A short secret, a number or a name, behind a "
        "common or public phrase is not counted.",
        "Own tries: until the likeliest passage has an even chance to come out, with the model's own sampling "
        "settings; never: these cut off one of its tokens, by the numbers of this computer. "
        f"At least: no temperature up to {HOTTEST}, top-k, top-p, min-p or repetition penalty from 1 to "
        f"{HIGHEST_PENALTY} needs fewer, for these weights in this precision.{contrast}",
        "Held-out posts were not trained on here: what comes out of them was not learned from them.",
        "Made likelier: the passage's chance under the tuned model, divided by that under the base model.",
        f"If the text before every private passage of {shortest} tokens is tried once, {tell_number(expected)} of them "
        "are expected to come out.",
    ]


def tell_details(leaks: Leaks) -> list[Details]:
    """For the page only."""
    # Marked where the post is private.
    came_out = []
    for entry in leaks.personal:
        came_out.append(Quote(f"{entry.kind} of a {entry.visibility} post", entry.text, entry.visibility == "private"))
    return [
        Details("Addresses, numbers and keys that came out", came_out),
        Details("The private passages that come out most easily", quote(leaks.likeliest)),
        Details("The private passages that training raised most", quote(leaks.raised)),
    ]


def quote(passages: list[ShownPassage]) -> list[Quote]:
    return [Quote(tell_passage(passage), passage.text, is_private=True) for passage in passages]


def tell_passage(passage: ShownPassage) -> str:
    own = "1, greedily" if passage.is_greedy else f"{tell_tries(passage.sampled)} with its own settings"
    told = [own, f"at least {tell_tries(passage.bound)} with others"]
    if passage.contrasted:
        told.append(f"{tell_tries(passage.contrasted)} with the base model beside")
    if passage.log10_beyond_base is not None:
        told.append(f"{tell_power(passage.log10_beyond_base)} times likelier than under the base model")

    # Where it comes from first; the text follows as a quote.
    what = "the title of " if passage.group == "private titles" else ""
    where = f"{what}{passage.title}, {passage.path}"
    if passage.posts > 1:
        where += f" and {passage.posts - 1:,} more"
    return f"{where}: tries {'; '.join(told)}"
