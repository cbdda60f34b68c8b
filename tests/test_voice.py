"""The measures of the report: does the voice measure know an author, are the intervals right."""

import random

import numpy as np
import pytest

import test_model

HABITS = {  # the same topics; what differs is how often small words and signs are used
    "baker": ["and", "and", "so", "anyway", "i", "i", "you", "the", "--", "sez", "not", "becos", "very", "all"],
    "clerk": ["the", "the", "of", "which", "however", "it", "therefore", ";", "that", "is", "one", "shall", "by", "as"],
}
TOPICS = ["bread", "kettle", "gull", "harbour", "night", "letter", "oven", "street", "rain", "window", "boat", "cat"]


def write(author: str, seed: int, words: int, share: float = 1.0) -> list[str]:
    """Posts of 250 words by one of the two authors; `share` of the small words are theirs, the others the other's."""
    source, other = random.Random(seed), next(name for name in HABITS if name != author)
    posts = []
    for _ in range(words // 250):
        pairs = (
            (source.choice(HABITS[author if source.random() < share else other]), source.choice(TOPICS))
            for _ in range(125)
        )
        posts.append(" ".join(word for pair in pairs for word in pair))
    return posts


def position(tuned: list[str], seed: int = 0) -> test_model.Voice:
    known, unseen = write("baker", 10 + seed, 20_000), write("baker", 20 + seed, 6_000)
    return test_model.voice_position(known, write("clerk", 30 + seed, 6_000), tuned, unseen)


@pytest.mark.parametrize("seed", range(3))
def test_unseen_text_of_the_author_scores_one_and_of_the_other_zero(seed):
    own, other = position(write("baker", 40 + seed, 6_000), seed), position(write("clerk", 50 + seed, 6_000), seed)
    assert own.position == pytest.approx(1, abs=0.1) and own.interval[0] < 1.02 and own.interval[1] > 0.98
    assert other.position == pytest.approx(0, abs=0.1)
    assert other.interval[1] < own.interval[0]


def test_text_in_between_stands_in_between_and_more_of_the_author_stands_nearer():
    places = [position(write("baker", 60, 6_000, share)).position for share in (0.25, 0.5, 0.75)]
    assert 0 < places[0] < places[1] < places[2] < 1
    assert places[1] == pytest.approx(0.5, abs=0.2)


def test_an_author_against_himself_is_the_ceiling():
    low, high = position(write("baker", 70, 6_000)).ceiling
    assert 0.9 < low < 1 < high < 1.1


def test_two_samples_of_one_author_are_not_told_apart():
    clerk = [write("clerk", seed, 6_000) for seed in range(4)]
    assert test_model.voice_position(*clerk) is None


def answers(texts: list[str]) -> test_model.Trial:
    return test_model.Trial(answers=[test_model.Answer(text, [], True) for text in texts])


def conversations(texts: list[str]) -> list[dict]:
    return [{"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": text}]} for text in texts]


def voice(train: list[str], held_out: list[str], tuned: list[str], base: list[str] | None) -> test_model.Voice:
    blog = test_model.BlogData(train=conversations(train), held_out=conversations(held_out))
    index = test_model.WordIndex(blog.train) if train else None
    evidence = test_model.Evidence(blog, index, tuned=answers(tuned), base=answers(base) if base else None)
    return test_model.measure_voice(evidence)


def test_the_voice_is_measured_on_text_that_is_no_copy():
    known = write("baker", 1, 20_000)
    fresh, clerk = write("baker", 3, 6_000), write("clerk", 4, 6_000)
    assert voice(known, write("baker", 2, 4_000), fresh, clerk).position == pytest.approx(1, abs=0.15)
    with pytest.raises(test_model.NotMeasured, match="^0 generated words that are no copies are under 5,000$"):
        voice(known, write("baker", 2, 4_000), known[:24], clerk)


@pytest.mark.parametrize(
    ("held_out", "tuned", "base", "reason"),
    [
        (1_000, 6_000, 6_000, "words of unseen posts that are no copies are under 2,000"),
        (4_000, 3_000, 6_000, "generated words that are no copies are under 5,000"),
        (4_000, 6_000, 2_500, "generated words that are no copies are under 5,000"),
        (4_000, 6_000, 0, "it takes the base model"),
        (0, 6_000, 6_000, "it takes the base model, train_data.jsonl and val_data.jsonl"),
    ],
)
def test_no_number_without_enough_text_and_the_reason_is_said(held_out, tuned, base, reason):
    with pytest.raises(test_model.NotMeasured, match=reason):
        voice(write("baker", 1, 9_000), write("baker", 2, held_out), write("baker", 3, tuned), write("clerk", 4, base))


@pytest.mark.parametrize(
    ("hits", "trials", "low", "high"),
    [(0, 200, 0, 0.018846), (10, 10, 0.722460, 1), (5, 20, 0.111862, 0.468701), (1, 2, 0.094531, 0.905469)],
)
def test_wilson_intervals_are_those_of_the_tables(hits, trials, low, high):
    assert test_model.wilson(hits, trials) == pytest.approx((low, high), abs=2e-4)


def test_the_bootstrap_interval_of_a_mean_is_that_of_theory():
    values = np.random.default_rng(0).normal(5, 2, 400)
    low, high = test_model.bootstrap(lambda at: values[at].mean(), len(values))
    half = 1.96 * values.std() / 20
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.03)


def test_gain_is_weighted_by_bytes_and_measured_per_post():
    posts = conversations(["a" * 100, "b" * 300])
    nats = np.log(2)
    gain = test_model.gain_on(posts, np.array([100, 300]) * nats, np.array([200, 450]) * nats)
    assert (gain.tuned, gain.base, gain.gain) == pytest.approx((1, 650 / 400, 250 / 400))
    assert [(post.base, post.tuned) for post in gain.posts] == [pytest.approx((2, 1)), pytest.approx((1.5, 1))]
    assert gain.interval == pytest.approx((0.5, 1.0))
