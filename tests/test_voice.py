"""The measures of the report: does the voice measure know an author, are the intervals right."""

import ast
import functools
import random
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from tiny import write_jsonl

import voice.style
from voice import habits, learned, reader
from voice.asking import add_other_blogs
from voice.evidence import BlogData, Evidence, ModelRun, NotMeasured, bootstrap, wilson
from voice.report import QUESTIONS
from voice.sampling import Answer
from voice.style import count_stretches, count_styles, pick_chunk_size, pick_counts, pick_features
from voice.word_index import WordIndex

# The same topics; what differs is how often small words and signs are used.
HABITS = {
    "baker": "and and so anyway i i you the -- sez not becos very all",
    "clerk": "the the of which however it therefore ; that is one shall by as",
}
SMALL_WORDS = sorted(set(" ".join(HABITS.values()).split()))
TOPICS = ["bread", "kettle", "gull", "harbour", "night", "letter", "oven", "street", "rain", "window", "boat", "cat"]


def posts_of(small_words: list[str], words: int, source: np.random.Generator, chances=None) -> list[str]:
    """Posts of 250 words: small words and topics by turns."""
    posts = []
    for _ in range(words // 250):
        small = source.choice(small_words, 125, p=chances)
        topics = source.choice(TOPICS, 125)
        pairs = zip(small, topics, strict=True)
        posts.append(" ".join(map(" ".join, pairs)))
    return posts


def write(author: str, seed: int, words: int) -> list[str]:
    """Posts by one of the two authors."""
    small_words = HABITS[author].split()
    return posts_of(small_words, words, np.random.default_rng(seed))


def answers(texts: list[str]) -> ModelRun:
    return ModelRun([Answer(text, [], True) for text in texts])


def conversations(texts: list[str]) -> list[dict]:
    request = {"role": "user", "content": "?"}
    return [{"messages": [request, {"role": "assistant", "content": text}]} for text in texts]


def evidence_of(train: list[str], held_out: list[str], tuned: list[str], base: list[str]) -> Evidence:
    blog = BlogData(conversations(train), conversations(held_out))
    runs = {"tuned": answers(tuned), "base": answers(base) if base else None}
    return Evidence(blog, WordIndex(blog.train), **runs)


def test_style_is_measured_on_text_that_is_no_copy():
    known = write("baker", 1, 20_000)
    evidence = evidence_of(known, write("baker", 2, 4_000), known[:24], write("clerk", 4, 6_000))
    with pytest.raises(NotMeasured, match="^a model wrote 0 words that are no copies; needs 1,100$"):
        count_styles(evidence)


@pytest.mark.parametrize(
    ("train", "held_out", "tuned", "base", "reason"),
    [
        (9_000, 500, 6_000, 6_000, "unseen posts have 477 words .* needs 1,100, about 5 held-out posts"),
        (9_000, 4_000, 1_000, 6_000, "a model wrote 9.. words that are no copies"),
        (9_000, 4_000, 6_000, 750, "a model wrote 7.. words that are no copies"),
        (9_000, 4_000, 6_000, 0, "needs the base model"),
        (9_000, 0, 6_000, 6_000, "needs the base model, train_data.jsonl and val_data.jsonl"),
        (250, 6_000, 6_000, 6_000, "your training posts have 244 words; needs 600"),  # they make no chunk
    ],
)
def test_no_number_without_enough_text_and_the_reason_is_said(train, held_out, tuned, base, reason):
    by_baker = [write("baker", seed, words) for seed, words in enumerate((train, held_out, tuned), 1)]
    evidence = evidence_of(*by_baker, base=write("clerk", 4, base))
    with pytest.raises(NotMeasured, match=reason):
        count_styles(evidence)


@pytest.mark.parametrize(("words", "size"), [(5_500, 5), (5_000, 2), (2_000, 1), (1_100, 1)])
def test_chunks_are_as_long_as_the_text_allows(words, size):
    text = ["word " * words]
    longer = ["word " * 9_000]
    texts = {"author": text, "tuned": text, "base": longer}
    assert pick_chunk_size(texts) == size


def test_stretches_hold_exact_counts_and_the_posts_in_which_they_begin():
    texts = ["a " * 150, "b " * 60, "c " * 291]
    counted = count_stretches(texts, [("words", "a"), ("words", "c"), ("trigrams", "a a")])
    assert counted.counts[:, :2].tolist() == [[100, 0], [50, 0], [0, 90], [0, 100], [0, 100]]
    assert counted.totals[:, 0].tolist() == [100] * 5
    assert counted.source.tolist() == [0, 0, 1, 2, 2]

    frequencies, source = counted.chunks(2)
    assert frequencies[:, 0].tolist() == [0.75, 0]
    assert source.tolist() == [0, 1]
    # Only what follows in the text is joined.
    counted.run = np.array([0, 0, 0, 1, 2])
    frequencies, _ = counted.chunks(2)
    assert len(frequencies) == 1


# ---------------------------------------------------------------------------- the reader with strangers
def blogger(number: int, seed: int, words: int) -> list[str]:
    """Posts with small words by habits of the blogger's own, and topics by chance."""
    weights = np.random.default_rng(number).gamma(2.0, size=len(SMALL_WORDS))
    chances = weights / weights.sum()
    return posts_of(SMALL_WORDS, words, np.random.default_rng((number, seed)), chances)


TUNED = blogger(1, 5, 5_000)
BASE = blogger(6, 5, 5_000)


def count(texts: list[str], features: list[tuple[str, str]]) -> tuple[np.ndarray, np.ndarray]:
    return count_stretches(texts, features).chunks(2)


@functools.cache
def known_and_strangers() -> tuple:
    """(features, profile of blogger 1, chunks of sixteen others by name), as every question has them."""
    known = blogger(1, 1, 15_000)
    features = pick_features(known)
    profile, _ = count(known, features)
    return features, profile, {str(number): count(blogger(number, 3, 8_000), features) for number in range(20, 36)}


def ask(tuned: list[str] = TUNED, base: list[str] = BASE, unseen: int = 1) -> SimpleNamespace:
    """The reader's shares of blogger 1 among sixteen others; the unseen posts are those of blogger `unseen`."""
    features, profile, strangers = known_and_strangers()
    texts = {"author": blogger(unseen, 2, 5_000), "tuned": tuned, "base": base}
    tested = {whose: count(posts, features) for whose, posts in texts.items()}
    shares, each = reader.attribute(profile, tested, strangers)
    return SimpleNamespace(**shares, each=each)


def test_the_reader_knows_the_author_and_takes_five_in_a_hundred_strangers_for_him():
    shares = ask()
    author = shares.author
    low, high = author.interval
    assert low < author.share <= high
    assert author.share > 0.9
    assert shares.tuned.share > 0.9
    assert shares.base.share < 0.3
    assert shares.strangers.share == pytest.approx(0.05, abs=0.04)
    assert author.chunks > 20
    assert len(shares.each) == 16


def test_roles_swapped_the_posts_of_somebody_else_are_taken_as_often_as_a_strangers():
    shares = [ask(unseen=number).author.share for number in range(40, 46)]
    assert np.mean(shares) < 0.15


def test_the_base_model_passed_off_as_tuned_gets_what_the_base_model_gets():
    shares = ask(tuned=BASE)
    assert shares.tuned == shares.base


def test_shuffled_labels_give_everybody_the_same():
    pool = blogger(1, 6, 18_000) + blogger(6, 6, 18_000)
    random.Random(0).shuffle(pool)
    shares = ask(tuned=pool[:72], base=pool[72:])
    low, high = shares.tuned.interval
    least, most = shares.base.interval
    assert low <= most
    assert least <= high
    assert 0.2 < shares.tuned.share < 0.9


def test_posts_of_two_blogs_are_two_sources(monkeypatch):
    """Though both are numbered from 0: the range of the strangers' share is drawn over posts."""
    given = []
    monkeypatch.setattr(reader, "share_over_sources", lambda taken, source: given.append(source))
    rng = np.random.default_rng(0)
    posts = np.array([0, 0, 1])
    profile = rng.random((6, 5))
    strangers = {}
    for name in "abcd":
        frequencies = rng.random((3, 5))
        strangers[name] = (frequencies, posts)

    reader.attribute(profile, {}, strangers)
    [source] = given
    numbers = np.unique(source)
    assert len(numbers) == 8


def mixed(own_words: int) -> list[str]:
    """Posts of 250 words: the first are blogger 1's, the others blogger 6's."""
    posts = []
    for own, other in zip(blogger(1, 7, 6_000), blogger(6, 7, 6_000), strict=True):
        words = own.split()[:own_words] + other.split()[own_words:]
        posts.append(" ".join(words))
    return posts


def test_more_of_the_author_is_given_to_him_more_often():
    base = mixed(0)
    least, less, more, most = [ask(mixed(own_words), base).tuned.share for own_words in (0, 100, 175, 250)]
    assert least <= less <= more <= most
    assert least < 0.35 < 0.9 < most


def test_who_is_no_stranger_is_left_out_of_the_crowd():
    with np.load(voice.style.STRANGERS, allow_pickle=False) as file:
        data = dict(file)
    features = [("words", "the"), ("trigrams", " th")]
    left_out = str(data["names"][3])

    expected = pick_counts(data, features, ()).stretches
    del expected[left_out]
    others = pick_counts(data, features, (left_out,)).stretches
    assert set(others) == set(expected)
    for name, counted in others.items():
        assert (counted.counts == expected[name].counts).all()


def test_who_cannot_be_compared_is_left_out_in_a_sentence_and_the_rest_is_measured(tmp_path):
    """An empty folder, another language, too little text, and the one stranger who is left."""
    blogs = {
        "french": ["le chat est sur la table et il regarde par la fenêtre " * 300],
        "brief": write("clerk", 7, 500),
        "clerk": write("clerk", 8, 6_000),
        "nothing": [],
    }
    for name, posts in blogs.items():
        write_jsonl(tmp_path / name / "train_data.jsonl", conversations(posts))
    by_baker = [write("baker", 1, 20_000), write("baker", 2, 6_000), write("baker", 3, 6_000)]
    evidence = evidence_of(*by_baker, base=write("clerk", 4, 6_000))
    add_other_blogs(evidence, tuple(str(tmp_path / name) for name in [*blogs, "gone"]))

    with pytest.raises(NotMeasured) as missing:
        reader.measure(evidence)
    told = str(missing.value)
    assert told.startswith("needs 4 other bloggers with 2,000 words each, and there is 1: ")
    assert "You use 0 % of the 100 commonest words of french (OTHER_BLOGS): another language" in told
    assert "brief (OTHER_BLOGS) has 485 words, and needs 2,000: left out" in told
    assert "OTHER_BLOGS names nothing, which has no" in told
    assert "OTHER_BLOGS names gone, which has no" in told
    assert "bloggers in strangers.npz" in told  # the baker's words are no language
    assert set(count_styles(evidence).strangers) == {"clerk"}


def test_a_stranger_with_many_posts_sets_no_threshold_alone():
    groups = [np.full(900, 0.9), np.full(100, 0.1)]
    assert reader.even_quantile(groups, 0.4) == pytest.approx(0.1)
    assert reader.even_quantile(groups, 0.95) == pytest.approx(0.9)


def test_the_interval_is_over_posts_and_not_over_chunks():
    taken = np.repeat([1.0, 0.0, 1.0, 0.0, 1.0, 0.0], 50)
    posts = np.repeat(range(6), 50)
    low, high = reader.share_over_sources(taken, posts).interval
    assert low <= 0.2 < 0.8 <= high  # over 300 chunks it would be 0.44 to 0.56


def test_where_every_chunk_is_taken_the_interval_is_not_empty():
    all_taken = reader.share_over_sources(np.ones(40), np.repeat(range(4), 10))
    assert all_taken.share == 1
    assert all_taken.interval == pytest.approx(wilson(4, 4))


# ---------------------------------------------------------------------------- habits
@pytest.fixture
def favourites() -> dict[str, habits.Favourite]:
    """By phrase; only what is in the public post is no private phrase."""
    posts = [
        "the bread and anyway the bread so it goes",
        "the cat and anyway so it goes",
        "anyway the bread so it goes",
    ]
    public = ["the bread and so it goes"]
    found = habits.find_favourites(4 * posts, public, ["anyway the bread"], ["the bread and the cat"] * 3)
    return {favourite.phrase: favourite for favourite in found}


def test_favourites_are_what_the_author_says_more_than_the_base_model(favourites):
    assert "the" not in favourites
    within = [(one, other) for one in favourites for other in favourites if f" {one} " in f" {other} "]
    assert all(one == other for one, other in within)  # no phrase within another

    anyway = favourites["anyway"]
    assert anyway.author == pytest.approx(10_000 * 12 / 96, rel=0.2)
    assert anyway.tuned > anyway.base == 0


def test_a_favourite_that_no_public_post_holds_is_for_the_page_alone(favourites):
    assert favourites["anyway"].is_private
    assert not favourites["bread"].is_private
    assert not favourites["goes"].is_private

    lengths = {"tuned": 9.0, "base": 9.0, "author": 9.0}
    found = habits.Habits(lengths, {"tuned": 1.0}, list(favourites.values()))
    told = habits.tell(found, None)
    assert "anyway" in [quote.text for quote in told.details[0].quotes]
    assert "anyway" not in str(told.rows)
    assert "goes" in str(told.rows)


def test_apostrophes_come_back():
    assert habits.with_apostrophes("that s what i ve seen s") == "that's what i've seen's"


# ---------------------------------------------------------------------------- intervals
@pytest.mark.parametrize(
    ("hits", "trials", "low", "high"),
    [(0, 200, 0, 0.018846), (10, 10, 0.722460, 1), (5, 20, 0.111862, 0.468701), (1, 2, 0.094531, 0.905469)],
)
def test_wilson_intervals_are_those_of_the_tables(hits, trials, low, high):
    assert wilson(hits, trials) == pytest.approx((low, high), abs=2e-4)


def test_the_bootstrap_interval_of_a_mean_is_that_of_theory():
    values = np.random.default_rng(0).normal(5, 2, 400)
    mean = values.mean()
    half = 1.96 * values.std() / 20
    interval = bootstrap(lambda drawn: values[drawn].mean(), 400)
    assert interval == pytest.approx((mean - half, mean + half), abs=0.03)


def test_gain_is_weighted_by_bytes_and_measured_per_post():
    posts = conversations(["a" * 100, "b" * 300])
    tuned_bits = np.array([100, 300])
    base_bits = np.array([200, 450])
    nats = np.log(2)
    gain = learned.gain_on(posts, tuned_bits * nats, base_bits * nats)
    assert (gain.tuned, gain.base, gain.gain) == pytest.approx((1, 650 / 400, 250 / 400))
    assert gain.interval == pytest.approx((0.5, 1.0))
    assert [post.base for post in gain.posts] == pytest.approx([2, 1.5])
    assert [post.tuned for post in gain.posts] == pytest.approx([1, 1])


@pytest.mark.parametrize(("posts", "verdict"), [(4, "Too few held-out posts to tell"), (5, "It learned")])
def test_a_gain_on_four_posts_proves_nothing(posts, verdict):
    tuned_nats = np.full(posts, 50.0)
    base_nats = np.full(posts, 90.0)
    gain = learned.gain_on(conversations(["a" * 100] * posts), tuned_nats, base_nats)
    told, _ = learned.tell_gain(gain)
    assert told.startswith(verdict)


# ---------------------------------------------------------------------------- modules
FOLDER = Path(voice.style.__file__).parent
FILES = {path.stem: path for path in FOLDER.glob("*.py") if path.stem != "__init__"}
LAYERS = [
    {"settings"},
    {"loading"},
    {"sampling", "word_index"},
    {"evidence", "conversation"},
    {"chances", "passages"},
    {"style", "leaking"},
    {"asking", "learned", "reader", "habits", "copies", "leaks"},
    {"report", "web"},
]
LAYER_OF = {module: number for number, modules in enumerate(LAYERS) for module in modules}


def imports_of(text: str) -> set[str]:
    """Dotted names, also of what is taken from a module."""
    names = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names


def test_imports_go_one_way_and_no_module_is_long():
    assert set(FILES) == set(LAYER_OF)
    for module, path in FILES.items():
        text = path.read_text(encoding="utf-8")
        assert len(text.splitlines()) <= 450, module
        for name in imports_of(text):
            package, *below = name.split(".")
            assert package != "test_model", module
            assert package != "voice" or LAYER_OF[below[0]] < LAYER_OF[module], f"{module} imports {name}"


def test_a_question_is_a_module():
    for question in QUESTIONS:
        assert question.measure.__module__ == f"voice.{question.key}"
