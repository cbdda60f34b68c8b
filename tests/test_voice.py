"""The measures of the report: does the voice measure know an author, are the intervals right."""

import ast
import random
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from tiny import write_jsonl

import voice.asking
import voice.evidence
import voice.habits
import voice.learned
import voice.reader
import voice.report
import voice.sampling
import voice.style
import voice.word_index

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


def answers(texts: list[str]) -> voice.evidence.ModelRun:
    return voice.evidence.ModelRun(answers=[voice.sampling.Answer(text, [], True) for text in texts])


def conversations(texts: list[str]) -> list[dict]:
    return [{"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": text}]} for text in texts]


def count_styles(train: list[str], held_out: list[str], tuned: list[str], base: list[str] | None):
    blog = voice.evidence.BlogData(train=conversations(train), held_out=conversations(held_out))
    index = voice.word_index.WordIndex(blog.train) if train else None
    evidence = voice.evidence.Evidence(blog, index, tuned=answers(tuned), base=answers(base) if base else None)
    return voice.style.count_styles(evidence)


def test_style_is_measured_on_text_that_is_no_copy():
    known = write("baker", 1, 20_000)
    with pytest.raises(voice.evidence.NotMeasured, match="^a model wrote 0 words that are no copies; needs 1,100$"):
        count_styles(known, write("baker", 2, 4_000), known[:24], write("clerk", 4, 6_000))


@pytest.mark.parametrize(
    ("held_out", "tuned", "base", "reason"),
    [
        (500, 6_000, 6_000, "unseen posts have 482 words .* needs 1,100, about 5 held-out posts"),
        (4_000, 1_000, 6_000, "a model wrote 9.. words that are no copies"),
        (4_000, 6_000, 750, "a model wrote 7.. words that are no copies"),
        (4_000, 6_000, 0, "needs the base model"),
        (0, 6_000, 6_000, "needs the base model, train_data.jsonl and val_data.jsonl"),
    ],
)
def test_no_number_without_enough_text_and_the_reason_is_said(held_out, tuned, base, reason):
    with pytest.raises(voice.evidence.NotMeasured, match=reason):
        count_styles(
            write("baker", 1, 9_000), write("baker", 2, held_out), write("baker", 3, tuned), write("clerk", 4, base)
        )


def test_training_posts_that_make_no_chunk_are_no_profile():
    with pytest.raises(voice.evidence.NotMeasured, match="your training posts have 240 words; needs 600"):
        count_styles(
            write("baker", 1, 250), write("baker", 2, 6_000), write("baker", 3, 6_000), write("clerk", 4, 6_000)
        )


@pytest.mark.parametrize(("words", "size"), [(5_500, 5), (5_000, 2), (2_000, 1), (1_100, 1)])
def test_chunks_are_as_long_as_the_text_allows(words, size):
    text = ["word " * words]
    assert voice.style.pick_chunk_size({"author": text, "tuned": text, "base": ["word " * 9_000]}) == size


def test_stretches_hold_exact_counts_and_the_posts_in_which_they_begin():
    texts = ["a " * 150, "b " * 60, "c " * 291]
    counted = voice.style.count_stretches(texts, [("words", "a"), ("words", "c"), ("trigrams", "a a")])
    assert counted.counts[:, :2].tolist() == [[100, 0], [50, 0], [0, 90], [0, 100], [0, 100]]
    assert counted.totals[:, 0].tolist() == [100] * 5 and counted.source.tolist() == [0, 0, 1, 2, 2]
    frequencies, source = counted.chunks(2)
    assert frequencies[:, 0].tolist() == [0.75, 0] and source.tolist() == [0, 1]
    counted.run = np.array([0, 0, 0, 1, 2])
    assert len(counted.chunks(2)[0]) == 1  # only what follows in the text is joined


# ---------------------------------------------------------------------------- the reader with strangers
def blogger(number: int, seed: int, words: int, accent: float = 1.0) -> list[str]:
    """Posts of 250 words: small words by habits of the blogger's own (`accent` 0: everybody's), topics by chance."""
    smalls = sorted({word for habits in HABITS.values() for word in habits})
    weights = np.random.default_rng(number).gamma(2.0, size=len(smalls)) ** accent
    source = np.random.default_rng((number, seed))
    posts = []
    for _ in range(words // 250):
        small = source.choice(smalls, 125, p=weights / weights.sum())
        topic = source.choice(TOPICS, 125)
        posts.append(" ".join(word for pair in zip(small, topic, strict=True) for word in pair))
    return posts


def ask(author: int, *, unseen: int | None = None, tuned: list[str], base: list[str], crowd=range(20, 36)):
    """The reader's shares of blogger `author` among sixteen others."""
    known = blogger(author, 1, 15_000)
    features = voice.style.pick_features(known)

    def count(texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        return voice.style.count_stretches(texts, features).chunks(2)

    own = blogger(author if unseen is None else unseen, 2, 5_000)
    tested = {"author": count(own), "tuned": count(tuned), "base": count(base)}
    others = {f"stranger {number}": count(blogger(number, 3, 8_000)) for number in crowd}
    shares, each = voice.reader.attribute(count(known)[0], tested, others)
    return SimpleNamespace(**shares, each=each)


def test_the_reader_knows_the_author_and_takes_five_in_a_hundred_strangers_for_him():
    reader = ask(1, tuned=blogger(1, 5, 5_000), base=blogger(6, 5, 5_000))
    assert reader.author.share > 0.9 and reader.tuned.share > 0.9 and reader.base.share < 0.3
    assert reader.strangers.share == pytest.approx(0.05, abs=0.04)
    assert reader.author.interval[0] < reader.author.share <= reader.author.interval[1]
    assert reader.author.chunks > 20 and len(reader.each) == 16


def test_roles_swapped_the_posts_of_somebody_else_are_taken_as_often_as_a_strangers():
    shares = [
        ask(1, unseen=n, tuned=blogger(1, 5, 3_000), base=blogger(6, 5, 3_000)).author.share for n in range(40, 46)
    ]
    assert np.mean(shares) < 0.15


def test_the_base_model_passed_off_as_tuned_gets_what_the_base_model_gets():
    base = blogger(6, 5, 5_000)
    reader = ask(1, tuned=base, base=base)
    assert reader.tuned == reader.base


def test_shuffled_labels_give_everybody_the_same():
    pool = blogger(1, 6, 18_000) + blogger(6, 6, 18_000)
    random.Random(0).shuffle(pool)
    reader = ask(1, tuned=pool[:72], base=pool[72:])
    low, high = reader.tuned.interval
    least, most = reader.base.interval
    assert low <= most and least <= high and 0.2 < reader.tuned.share < 0.9


def test_more_of_the_author_is_given_to_him_more_often():
    def mixed(share: float) -> list[str]:
        own, other = blogger(1, 7, 6_000), blogger(6, 7, 6_000)
        return [
            " ".join(a.split()[: int(250 * share)] + b.split()[int(250 * share) :])
            for a, b in zip(own, other, strict=True)
        ]

    shares = [ask(1, tuned=mixed(share), base=mixed(0)).tuned.share for share in (0.0, 0.4, 0.7, 1.0)]
    assert shares == sorted(shares) and shares[0] < 0.35 and shares[-1] > 0.9


def test_who_is_no_stranger_is_left_out_of_the_crowd():
    with np.load(voice.style.STRANGERS, allow_pickle=False) as file:
        data = {name: file[name] for name in file.files}
    features = [("words", "the"), ("trigrams", " th")]
    everybody = voice.style.pick_counts(data, features, ()).stretches
    left_out = data["names"].tolist()[3]
    others = voice.style.pick_counts(data, features, (left_out,)).stretches
    assert set(everybody) - set(others) == {left_out} and len(others) == len(everybody) - 1
    assert all((counted.counts == everybody[name].counts).all() for name, counted in others.items())


def test_who_cannot_be_compared_is_left_out_in_a_sentence_and_the_rest_is_measured(tmp_path):
    """An empty folder, another language, too little text, and the one stranger who is left."""
    french = ["le chat est sur la table et il regarde par la fenêtre " * 300]
    blogs = {"french": french, "brief": write("clerk", 7, 500), "clerk": write("clerk", 8, 6_000), "nothing": []}
    for name, posts in blogs.items():
        write_jsonl(tmp_path / name / "train_data.jsonl", conversations(posts))
    folders = tuple(str(tmp_path / name) for name in [*blogs, "gone"])

    train = conversations(write("baker", 1, 20_000))
    blog = voice.evidence.BlogData(train, held_out=conversations(write("baker", 2, 6_000)))
    evidence = voice.evidence.Evidence(blog, voice.word_index.WordIndex(train), tuned=answers(write("baker", 3, 6_000)))
    evidence.base = answers(write("clerk", 4, 6_000))
    voice.asking.add_other_blogs(evidence, folders)

    with pytest.raises(voice.evidence.NotMeasured) as missing:
        voice.reader.measure(evidence)
    told = str(missing.value)
    assert told.startswith("needs 4 other bloggers with 2,000 words each, and there is 1: ")
    assert "You use 0 % of the 100 commonest words of french (OTHER_BLOGS): another language" in told
    assert "brief (OTHER_BLOGS) has 482 words, and needs 2,000: left out" in told
    assert all(f"OTHER_BLOGS names {name}, which has no" in told for name in ("nothing", "gone"))
    assert "bloggers in strangers.npz" in told  # the baker's words are no language
    assert set(voice.style.count_styles(evidence).strangers) == {"clerk"}


def test_a_stranger_with_many_posts_sets_no_threshold_alone():
    many, few = np.full(900, 0.9), np.full(100, 0.1)
    assert voice.reader.even_quantile([many, few], 0.4) == pytest.approx(0.1)
    assert voice.reader.even_quantile([many, few], 0.95) == pytest.approx(0.9)


def test_the_interval_is_over_posts_and_not_over_chunks():
    taken = np.repeat([1.0, 0.0, 1.0, 0.0, 1.0, 0.0], 50)
    low, high = voice.reader.share_over_sources(taken, np.repeat(np.arange(6), 50)).interval
    assert low <= 0.2 and high >= 0.8  # over 300 chunks it would be 0.44 to 0.56
    all_taken = voice.reader.share_over_sources(np.ones(40), np.repeat(np.arange(4), 10))
    assert all_taken.share == 1 and all_taken.interval == pytest.approx(voice.evidence.wilson(4, 4))


# ---------------------------------------------------------------------------- habits
def test_favourites_are_what_the_author_says_more_than_the_base_model():
    posts = [
        "the bread and anyway the bread so it goes",
        "the cat and anyway so it goes",
        "anyway the bread so it goes",
    ] * 4
    public = ["the bread and so it goes"]
    favourites = voice.habits.find_favourites(posts, public, ["anyway the bread"], ["the bread and the cat"] * 3)
    phrases = [favourite.phrase for favourite in favourites]
    assert "anyway" in phrases and "the" not in phrases
    assert not any(f" {a} " in f" {b} " for a in phrases for b in phrases if a != b)  # no phrase within another
    assert {favourite.phrase for favourite in favourites if not favourite.is_private} >= {"bread", "goes"}
    assert voice.habits.with_apostrophes("that s what i ve seen s") == "that's what i've seen's"
    anyway = favourites[phrases.index("anyway")]
    assert anyway.author == pytest.approx(10_000 * 12 / 96, rel=0.2) and anyway.tuned > anyway.base == 0

    # What no public post says is for the page alone.
    told = voice.habits.tell(
        voice.habits.Habits(dict.fromkeys(("tuned", "base", "author"), 9.0), {"tuned": 1.0}, favourites), None
    )
    assert anyway.is_private and "anyway" in [quote.text for quote in told.details[0].quotes]
    assert "anyway" not in str(told.rows) and "goes" in str(told.rows)


@pytest.mark.parametrize(
    ("hits", "trials", "low", "high"),
    [(0, 200, 0, 0.018846), (10, 10, 0.722460, 1), (5, 20, 0.111862, 0.468701), (1, 2, 0.094531, 0.905469)],
)
def test_wilson_intervals_are_those_of_the_tables(hits, trials, low, high):
    assert voice.evidence.wilson(hits, trials) == pytest.approx((low, high), abs=2e-4)


def test_the_bootstrap_interval_of_a_mean_is_that_of_theory():
    values = np.random.default_rng(0).normal(5, 2, 400)
    low, high = voice.evidence.bootstrap(lambda at: values[at].mean(), len(values))
    half = 1.96 * values.std() / 20
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.03)


def test_gain_is_weighted_by_bytes_and_measured_per_post():
    posts = conversations(["a" * 100, "b" * 300])
    nats = np.log(2)
    gain = voice.learned.gain_on(posts, np.array([100, 300]) * nats, np.array([200, 450]) * nats)
    assert (gain.tuned, gain.base, gain.gain) == pytest.approx((1, 650 / 400, 250 / 400))
    assert [(post.base, post.tuned) for post in gain.posts] == [pytest.approx((2, 1)), pytest.approx((1.5, 1))]
    assert gain.interval == pytest.approx((0.5, 1.0))


@pytest.mark.parametrize(("posts", "verdict"), [(4, "Too few held-out posts to tell"), (5, "It learned")])
def test_a_gain_on_four_posts_proves_nothing(posts, verdict):
    gain = voice.learned.gain_on(conversations(["a" * 100] * posts), np.full(posts, 50.0), np.full(posts, 90.0))
    assert voice.learned.tell_gain(gain)[0].startswith(verdict)


# ---------------------------------------------------------------------------- modules
FOLDER = Path(voice.report.__file__).parent
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


def test_imports_go_one_way_and_a_question_is_a_module():
    layer_of = {module: number for number, modules in enumerate(LAYERS) for module in modules}
    files = {path.stem: path for path in FOLDER.glob("*.py") if path.stem != "__init__"}
    assert set(files) == set(layer_of)
    for module, path in files.items():
        text = path.read_text(encoding="utf-8")
        assert len(text.splitlines()) <= 450 and "test_model" not in imports_of(text), module
        for name in imports_of(text):
            below = name.removeprefix("voice.")
            assert below not in layer_of or layer_of[below] < layer_of[module], f"{module} imports {below}"
    assert all(question.measure.__module__ == f"voice.{question.key}" for question in voice.report.QUESTIONS)


def imports_of(text: str) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom):
            names |= {alias.name for alias in node.names} if node.module == "voice" else {node.module}
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names
