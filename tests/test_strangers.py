"""The crowd of other bloggers: the file that is shipped, and the script that counts it."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from voice.style import count_stretches

FOLDER = Path(__file__).parents[1] / "sample/strangers"
FILE = FOLDER / "strangers.npz"


def load_script():
    spec = importlib.util.spec_from_file_location("make_strangers", FOLDER / "make_strangers.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


make_strangers = load_script()


def read(path: Path) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as file:
        return dict(file)


@pytest.fixture(scope="module")
def crowd() -> dict[str, np.ndarray]:
    return read(FILE)


@pytest.fixture(scope="module")
def counts(crowd) -> dict[str, np.ndarray]:
    """The rows of the words and those of the trigrams."""
    words, trigrams = np.split(crowd["counts"], [len(crowd["words"])])
    return {"words": words, "trigrams": trigrams}


# ---------------------------------------------------------------- the file
def test_the_file_is_small():
    assert FILE.stat().st_size < 900_000


def test_features_are_named_once_and_well_formed(crowd):
    words = crowd["words"].tolist()
    assert len(set(words)) == len(words)
    for word in words:
        assert word == word.casefold()
        assert make_strangers.extract_blog_data.WORD.fullmatch(word)

    trigrams = crowd["trigrams"].tolist()
    assert len(set(trigrams)) == len(trigrams)
    assert {len(trigram) for trigram in trigrams} == {3}


def test_chunks_hold_a_hundred_words_and_come_in_runs(crowd, counts):
    all_words, all_trigrams = crowd["totals"].T
    assert (all_words == make_strangers.CHUNK).all()
    assert (counts["words"].sum(0) <= all_words).all()
    assert (counts["trigrams"].sum(0) <= all_trigrams).all()

    runs = (-1, make_strangers.RUN)
    blogs = crowd["blog"].reshape(runs)
    posts = crowd["post"].reshape(runs).astype(int)
    assert not np.diff(blogs).any()
    assert (np.diff(posts) >= 0).all()


@pytest.mark.parametrize(
    ("kind", "habits"),
    [
        ("words", make_strangers.HABIT_WORDS),
        ("trigrams", make_strangers.HABIT_TRIGRAMS),
    ],
)
def test_nothing_is_in_the_vocabulary_that_few_blogs_use(crowd, counts, kind, habits):
    for feature, row in zip(crowd[kind].tolist(), counts[kind], strict=True):
        blogs = np.unique(crowd["blog"][row > 0])
        assert len(blogs) >= make_strangers.MIN_BLOGS or feature in habits, feature


def test_half_of_the_crowd_are_diarists_and_essayists(crowd):
    assert set(crowd["kinds"].tolist()) <= {"diary", "essays", "mixed", "technical"}
    assert np.isin(crowd["kinds"], ["diary", "essays"]).mean() >= 0.5


def test_readme_attributes_every_blog(crowd):
    readme = (FOLDER / "README.md").read_text("utf-8")
    rows = [line.strip("| ").split(" | ") for line in readme.splitlines()]
    cells_of = {cells[0]: cells for cells in rows}
    columns = [crowd[key] for key in ("names", "authors", "repositories", "commits", "licences")]
    for name, author, repository, commit, licence in zip(*columns, strict=True):
        cells = cells_of[name]
        licence_text = make_strangers.LICENCE_TEXTS[licence]
        assert cells[1] == author
        assert f"]({repository})" in cells[3]
        assert cells[4] == commit[:12]
        assert cells[5] == f"[{licence}]({licence_text})"


def test_the_file_names_the_blogs_of_the_script(crowd):
    columns = [crowd[key].tolist() for key in ("names", "commits", "licences")]
    expected = [(blog.name, blog.commit, blog.licence) for blog in make_strangers.BLOGS]
    assert list(zip(*columns, strict=True)) == expected


# ---------------------------------------------------------------- the script
SENTENCE = "I was in the kitchen with {} and the kettle, and it is {} that we have to wait for the bread. "


def post_of(friend: str, day: int) -> str:
    """20 times 21 words."""
    return 20 * SENTENCE.format(friend, f"day{day}")


def make_blog(folder: Path, name: str, friend: str, posts: int = 3):
    """A blog whose newest post sorts first by name."""
    blog = make_strangers.Blog(name, "A. Baker", "diary", "CC0 1.0", "README", "a/b", "c0ffee", ("notes/*.md",))
    notes = folder / name / "notes"
    notes.mkdir(parents=True)
    for day in range(posts):
        header = f"---\ntitle: Bread\ndate: 2006-08-{10 + day}\n---\n"
        (notes / f"{9 - day}.md").write_text(header + post_of(friend, day))
    return blog


@pytest.fixture
def made(tmp_path):
    """Five made-up blogs, of which four know Wenzeslaus, counted by the script."""
    friends = ["Wenzeslaus"] * 4 + ["Mia"]
    blogs = [make_blog(tmp_path, f"blog{number}", friend) for number, friend in enumerate(friends)]
    make_strangers.make(tuple(blogs), tmp_path, tmp_path / "made.npz")
    return read(tmp_path / "made.npz")


def test_a_made_up_blog_is_counted_as_the_report_counts(made):
    posts = [post_of("Wenzeslaus", day).strip() for day in range(3)]
    words = [("words", word) for word in made["words"].tolist()]
    trigrams = [("trigrams", trigram) for trigram in made["trigrams"].tolist()]
    expected = count_stretches(posts, words + trigrams)

    # 1,260 words make twelve chunks, of which two runs of five are kept.
    of_blog = made["blog"] == 0
    assert of_blog.sum() == 10
    assert made["counts"].T[of_blog].tolist() == expected.counts[:10].tolist()
    assert made["totals"][of_blog].tolist() == expected.totals[:10, [0, -1]].tolist()
    assert made["post"][of_blog].tolist() == [0, 0, 0, 0, 0, 1, 1, 1, 1, 2]


def test_what_only_four_blogs_use_is_left_out(made):
    words = made["words"].tolist()
    assert "kitchen" in words
    assert "wenzeslaus" not in words
    assert "Wen" not in made["trigrams"].tolist()


def test_habits_are_counted_though_nobody_has_them(made):
    row = made["words"].tolist().index("haha")
    assert not made["counts"][row].any()


def test_a_long_blog_gives_runs_from_all_its_years():
    posts = [" ".join(["bread"] * 600) for _ in range(100)]
    chunks = make_strangers.cut(posts)
    starts = [chunk.post for chunk in chunks[:: make_strangers.RUN]]
    assert len(chunks) == make_strangers.RUNS * make_strangers.RUN
    assert starts[0] == 0
    assert starts[-1] >= 98
    assert max(np.diff(starts)) <= 5


@pytest.mark.parametrize(
    "name, source",
    [
        ("undated.md", "---\ntitle: Bread\n---\nI was in the kitchen with the kettle.\n"),
        ("2006-08-25-draft.md", "---\ndraft: true\n---\nI was in the kitchen with the kettle.\n"),
        ("2006-08-25-brot.md", "---\ntitle: Brot\n---\nIch stand in der Backstube und wartete auf das Brot.\n"),
    ],
)
def test_undated_drafts_and_other_languages_are_left_out(tmp_path, name, source):
    blog = make_blog(tmp_path, "blog", "Mia")
    folder = tmp_path / "blog"
    before = make_strangers.read_posts(blog, folder)
    (folder / "notes" / name).write_text(source)
    assert make_strangers.read_posts(blog, folder) == before


def test_a_header_without_a_fence_is_no_text(tmp_path):
    blog = make_blog(tmp_path, "blog", "Mia", posts=1)
    folder = tmp_path / "blog"
    header = "title: Look at my cat\ndate: 2013-01-29 20:16\ncategory: personal\n\n"
    text = "I have a cat that is as bald as an egg."
    (folder / "notes" / "cat.md").write_text(f"{header}{text}\n")
    assert make_strangers.read_posts(blog, folder)[1] == text


def test_a_missing_checkout_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["make_strangers.py", str(tmp_path)])
    with pytest.raises(SystemExit, match="No checkout of ashfurrow, .* in "):
        make_strangers.main()
