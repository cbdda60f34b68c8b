"""The crowd of other bloggers: the file that is shipped, and the script that counts it."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

import voice.style

FOLDER = Path(__file__).parents[1] / "sample" / "strangers"
FILE = FOLDER / "strangers.npz"


def load_script():
    spec = importlib.util.spec_from_file_location("make_strangers", FOLDER / "make_strangers.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


make_strangers = load_script()


@pytest.fixture(scope="module")
def crowd() -> dict[str, np.ndarray]:
    with np.load(FILE, allow_pickle=False) as file:
        return dict(file)


# ---------------------------------------------------------------- the file
def test_the_file_is_small():
    assert FILE.stat().st_size < 900_000


def test_shapes_agree(crowd):
    blogs = len(crowd["names"])
    chunks = len(crowd["blog"])
    assert blogs >= 10
    for name in ("authors", "kinds", "licences", "repositories", "commits", "many_authors"):
        assert crowd[name].shape == (blogs,)
    assert crowd["counts"].shape == (len(crowd["words"]) + len(crowd["trigrams"]), chunks)
    assert crowd["totals"].shape == (chunks, 2)
    assert crowd["post"].shape == (chunks,)
    assert set(crowd["blog"].tolist()) == set(range(blogs))


def test_features_are_named_once_and_well_formed(crowd):
    words = crowd["words"].tolist()
    trigrams = crowd["trigrams"].tolist()
    assert len(set(words)) == len(words)
    assert len(set(trigrams)) == len(trigrams)
    assert all(make_strangers.extract_blog_data.WORD.findall(word) == [word] == [word.casefold()] for word in words)
    assert all(len(trigram) == 3 for trigram in trigrams)


def test_chunks_hold_a_hundred_words_and_come_in_runs(crowd):
    words = crowd["counts"][: len(crowd["words"])].sum(0)
    trigrams = crowd["counts"][len(crowd["words"]) :].sum(0)
    assert (crowd["totals"][:, 0] == make_strangers.CHUNK).all()
    assert (words <= crowd["totals"][:, 0]).all()
    assert (trigrams <= crowd["totals"][:, 1]).all()

    runs = crowd["blog"].reshape(-1, make_strangers.RUN)
    posts = crowd["post"].reshape(-1, make_strangers.RUN)
    assert (runs == runs[:, :1]).all()
    assert (np.diff(posts.astype(int), axis=1) >= 0).all()


@pytest.mark.parametrize("kind", ["words", "trigrams"])
def test_nothing_is_in_the_vocabulary_that_few_blogs_use(crowd, kind):
    start = 0 if kind == "words" else len(crowd["words"])
    habits = make_strangers.HABIT_WORDS if kind == "words" else make_strangers.HABIT_TRIGRAMS
    for number, feature in enumerate(crowd[kind].tolist(), start):
        blogs = np.unique(crowd["blog"][crowd["counts"][number] > 0])
        assert len(blogs) >= make_strangers.MIN_BLOGS or feature in habits, feature


def test_half_of_the_crowd_are_diarists_and_essayists(crowd):
    assert set(crowd["kinds"].tolist()) <= {"diary", "essays", "mixed", "technical"}
    assert np.isin(crowd["kinds"], ["diary", "essays"]).mean() >= 0.5


def test_readme_attributes_every_blog(crowd):
    rows = [line.split(" | ") for line in (FOLDER / "README.md").read_text("utf-8").splitlines() if line[:2] == "| "]
    rows = {cells[0].strip("| "): cells for cells in rows}
    keys = ("authors", "repositories", "commits", "licences")
    for name, author, repository, commit, licence in zip(crowd["names"], *(crowd[key] for key in keys), strict=True):
        cells = rows[name]
        assert cells[1] == author
        assert f"]({repository})" in cells[3]
        assert cells[4] == commit[:12]
        assert cells[5] == f"[{licence}]({make_strangers.LICENCE_TEXTS[licence]})"


def test_the_file_names_the_blogs_of_the_script(crowd):
    columns = zip(*(crowd[key].tolist() for key in ("names", "commits", "licences")), strict=True)
    assert list(columns) == [(blog.name, blog.commit, blog.licence) for blog in make_strangers.BLOGS]


# ---------------------------------------------------------------- the script
SENTENCE = "I was in the kitchen with {} and the kettle, and it is {} that we have to wait for the bread. "


def make_blog(folder: Path, name: str, friend: str, posts: int = 3):
    """A blog whose posts have 20 x 20 words; the newest sorts first by name."""
    blog = make_strangers.Blog(name, "A. Baker", "diary", "CC0 1.0", "README", "a/b", "c0ffee", ("notes/*.md",))
    notes = folder / name / "notes"
    notes.mkdir(parents=True)
    for number in range(posts):
        text = "".join(SENTENCE.format(friend, f"day{number}") for _ in range(20))
        (notes / f"{9 - number}.md").write_text(f"---\ntitle: Bread\ndate: 2006-08-{10 + number}\n---\n{text}\n")
    return blog


@pytest.fixture
def made(tmp_path):
    """Five made-up blogs, of which four know Wenzeslaus, counted by the script."""
    friends = ["Wenzeslaus"] * 4 + ["Mia"]
    blogs = tuple(make_blog(tmp_path, f"blog{number}", friend) for number, friend in enumerate(friends))
    make_strangers.make(blogs, tmp_path, tmp_path / "made.npz")
    with np.load(tmp_path / "made.npz", allow_pickle=False) as file:
        return dict(file)


def test_a_made_up_blog_is_counted_as_the_report_counts(made):
    text = "\n\n".join("".join(SENTENCE.format("Wenzeslaus", f"day{n}") for _ in range(20)).strip() for n in range(3))
    edges = [match.start() for match in make_strangers.extract_blog_data.WORD.finditer(text)][:: make_strangers.CHUNK]
    assert (made["blog"] == 0).sum() == 10  # 1,260 words: two runs of five

    for number in range(10):
        counts = voice.style.counts_of(text[edges[number] : edges[number + 1]])
        row = made["counts"][:, number]
        words = [counts["words"][word] for word in made["words"].tolist()]
        trigrams = [counts["trigrams"][trigram] for trigram in made["trigrams"].tolist()]
        assert row.tolist() == words + trigrams
        assert made["totals"][number].tolist() == [counts["words"].total(), counts["trigrams"].total()]
    assert made["post"][:10].tolist() == [0, 0, 0, 0, 0, 1, 1, 1, 1, 2]


def test_what_only_four_blogs_use_is_left_out(made):
    words = made["words"].tolist()
    assert "kitchen" in words
    assert "wenzeslaus" not in words
    assert "Wen" not in made["trigrams"].tolist()


def test_habits_are_counted_though_nobody_has_them(made):
    row = made["counts"][made["words"].tolist().index("haha")]
    assert row.tolist() == [0] * len(made["blog"])


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
    before = make_strangers.read_posts(blog, tmp_path / "blog")
    (tmp_path / "blog" / "notes" / name).write_text(source)
    assert make_strangers.read_posts(blog, tmp_path / "blog") == before


def test_a_header_without_a_fence_is_no_text(tmp_path):
    blog = make_blog(tmp_path, "blog", "Mia", posts=1)
    text = (
        "title: Look at my cat\ndate: 2013-01-29 20:16\ncategory: personal\n\nI have a cat that is as bald as an egg.\n"
    )
    (tmp_path / "blog" / "notes" / "cat.md").write_text(text)
    assert make_strangers.read_posts(blog, tmp_path / "blog")[1] == "I have a cat that is as bald as an egg."


def test_a_missing_checkout_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["make_strangers.py", str(tmp_path)])
    with pytest.raises(SystemExit, match="No checkout of ashfurrow, .* in "):
        make_strangers.main()
