"""Where the words come from: defaults of _config.yml, folders beside _posts, comments in data files."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
from test_extract_blogs import SETTINGS, author_turns, post, run, run_over, write_blog

import extract_blog_data as x


def entry(path: str = "", kind: str = "", **values) -> dict:
    scope = {name: value for name, value in (("path", path), ("type", kind)) if value}
    return {"scope": scope, "values": values}


DEFAULTS = [
    # entries, path, type, author
    ([{"values": {"author": "ann"}}], "_posts/a.md", "posts", "ann"),
    ([entry("", "posts", author="ann")], "_drafts/a.md", "drafts", None),
    ([entry("", "post", author="ann")], "_posts/a.md", "posts", "ann"),
    ([entry("/guests/", author="bo")], "guests/_posts/a.md", "posts", "bo"),
    ([entry("guests", author="bo")], "_posts/guests/a.md", "posts", None),
    ([entry("*/_posts", author="bo")], "guests/_posts/a.md", "posts", "bo"),
    ([entry("*/_posts", author="bo")], "_posts/a.md", "posts", None),
    ([entry("**/guests/*.md", author="bo")], "_posts/x/guests/a.md", "posts", "bo"),
    ([entry("_posts/*-guest", author="bo")], "_posts/x/2019-guest/a.md", "posts", None),
    ([entry("_posts", author="bo"), entry(author="ann")], "_posts/a.md", "posts", "bo"),
    ([entry("_posts", author="ann"), entry("_posts", author="bo")], "_posts/a.md", "posts", "bo"),
    ([entry("_posts", "posts", author="ann"), entry("_posts", author="bo")], "_posts/a.md", "posts", "ann"),
    ([entry("_posts", author="ann"), entry("_posts", "posts", author="bo")], "_posts/a.md", "posts", "bo"),
    ([entry("col/_diary", author="ann")], "col/_diary/a.md", "diary", "ann"),
    ([entry("_diary", "diary", author="ann")], "col/_diary/a.md", "diary", "ann"),
    (["x", {"scope": "x", "values": {"author": "ann"}}, {"values": ["author"]}, None], "_posts/a.md", "posts", None),
    ("ann", "_posts/a.md", "posts", None),
]


@pytest.mark.parametrize(("entries", "path", "kind", "author"), DEFAULTS)
def test_defaults_reach_the_files_that_jekyll_gives_them_to(tmp_path, entries, path, kind, author):
    site = x.read_site(write_blog(tmp_path, {"_config.yml": "collections_dir: col"}), "public", SETTINGS)
    site = replace(site, defaults=x.read_defaults(entries))
    assert x.defaults_of(Path(path), kind, site).get("author") == author


def test_front_matter_covers_defaults_unless_it_is_empty():
    assert x.overlay({"author": "ann", "tags": ["a"]}, {"author": "", "tags": []}) == {"author": "ann", "tags": []}
    assert x.overlay({"a": {"b": "1", "c": "2"}}, {"a": {"b": "3"}}) == {"a": {"b": "3", "c": "2"}}


CONFIG = """
defaults:
- scope: {path: ""}
  values: {author: wren}
- scope: {path: visitors}
  values: {author: Bo}
- scope: {path: visitors/_posts/2006-01-03-mine.md}
  values: {author: Wren, date: 2005-05-05, tags: [cats]}
- scope: {path: hidden, type: posts}
  values: {published: false}
"""


def test_guests_and_unpublished_posts_of_defaults_stay_out(tmp_path, capsys):
    files = {
        "_config.yml": CONFIG,
        "_posts/2006-01-01-a.md": post("what i wrote on my own"),
        "_posts/2006-01-01-b.md": post("what two of us wrote together", authors="[bo, di]"),
        "visitors/_posts/2006-01-02-a.md": post("what somebody else wrote for me"),
        "visitors/_posts/2006-01-03-mine.md": post("among all of these one of my own"),
        "visitors/_posts/2006-01-04-b.md": post("and another one of my own", author="wren"),
        "hidden/_posts/2006-01-05-a.md": post("nobody was meant to see this"),
        "hidden/_posts/2006-01-06-b.md": post("everybody was meant to see that", published="true"),
    }
    train, val, report = run(tmp_path, "--public", str(write_blog(tmp_path / "blog", files)), "--author", "wren")
    dates = {line["path"].rpartition("/")[2]: line["date"] for line in train + val}
    assert dates.keys() == {"2006-01-01-a.md", "2006-01-03-mine.md", "2006-01-04-b.md", "2006-01-06-b.md"}
    assert dates["2006-01-03-mine.md"] == "2005-05-05"
    assert report["files_skipped"] == {"other author": 2, "unpublished": 1}


def test_defaults_of_a_toml_config(tmp_path):
    files = {
        "_config.toml": '[[defaults]]\nscope = {path = "a"}\nvalues = {published = false}\n[[defaults]]\nscope = '
        '{path = "b"}\nvalues = {date = 2001-02-03}\n',
        "a/_posts/2006-01-05-a.md": post("nobody was meant to see this"),
        "b/_posts/2006-01-05-b.md": post("everybody was meant to see that"),
    }
    train, val, _ = run(tmp_path, "--public", str(write_blog(tmp_path / "blog", files)))
    assert [(line["path"], line["date"]) for line in train + val] == [("b/_posts/2006-01-05-b.md", "2001-02-03")]


@pytest.mark.parametrize(
    ("tags", "topics"), [("cats, big dogs", ["cats", "big dogs"]), ("cats dogs", ["cats", "dogs"])]
)
def test_tags_on_one_line(tags, topics):
    assert x.read_tags({"tags": tags}, x.Post("b", "public", "p"), SETTINGS) == topics


PAGES = {
    "_posts/2006-01-01-a.md": post("one post among all of these"),
    "_posts/undated.md": post("no post since it has no date"),
    "_articles/on-bread.md": post("an article about bread and more", date="2010-03-04"),
    "_articles/2011-05-06-on-salt.md": post("an article about salt and pepper"),
    "_articles/_hidden.md": post("an article that is not ready"),
    "content/posts/2012/07/08/tea/index.md": post("everything about tea and its leaves"),
    "content/posts/2012/07/09/rum/index.md": post("everything about rum and its sailors"),
    "content/notes/a.md": post("a note about nothing in particular"),
    "about.md": post("who i am and what i do"),
    "tags.md": post("{% for tag in site.tags %}a list of all of them{% endfor %}"),
    "README.md": "how this repository is made into a blog",
    "_includes/box.md": post("a box of the theme of this blog"),
    "old/page.md": post("an old page that the config excludes"),
    "_config.yml": "exclude: [old]\n",
}


def test_what_looks_like_writing_is_read_if_it_is_named_and_counted_if_not(tmp_path, monkeypatch, capsys):
    _, report = run_over(tmp_path, PAGES)
    assert {row["source"]: row["files"] for row in report["not_read"]} == {
        "Markdown in _articles": 3,
        "Markdown in content": 3,
        "pages in the top folder": 1,
    }
    assert re.search(r'not read: Markdown in _articles \(add "_articles" to FOLDERS\) +3\b', capsys.readouterr().out)
    assert sum(row["words"] for row in report["not_read"]) == 43
    assert report["ledger"]["left_out"] == {"sources that are not read": 43, x.UNUSED: 7}

    monkeypatch.setattr(x, "FOLDERS", ["_posts", "_articles", "content/posts/", "about.md"])
    lines, report = run_over(tmp_path, PAGES)
    assert {line["path"]: line["date"] for line in lines} == {
        "_posts/2006-01-01-a.md": "2006-01-01",
        "_articles/on-bread.md": "2010-03-04",
        "_articles/2011-05-06-on-salt.md": "2011-05-06",
        "content/posts/2012/07/08/tea/index.md": "2012-07-08",
        "content/posts/2012/07/09/rum/index.md": "2012-07-09",
        "about.md": None,
    }
    assert report["files_skipped"] == {"hidden from Jekyll": 1, "undated file name": 1}
    assert [row["source"] for row in report["not_read"]] == ["Markdown in content"]


def test_a_blog_whose_posts_are_elsewhere_is_told_which_setting_reads_them(tmp_path):
    blog = write_blog(tmp_path / "blog", {name: text for name, text in PAGES.items() if "content/" in name})
    with pytest.raises(SystemExit, match=r'No post found .*: 3 files are elsewhere: add "content" to FOLDERS\.$'):
        run(tmp_path, "--public", str(blog))


def test_names_like_index_do_not_bind_posts_together():
    assert len({x.chance_of([x.Post("b", "public", f"posts/{name}/index.md")]) for name in ("one", "two", "six")}) == 3


def comment(**values) -> str:
    return "".join(f"{name}: {value}\n" for name, value in values.items())


COMMENTED = {
    "_posts/2006-01-01-boat.md": post("i bought a boat today, and it is red", title="The boat"),
    "_posts/2006-01-02-kites.md": post("i lost a kite today, and it was blue", title="The kite"),
    # by an id, and in the wrong order of names
    "_data/comments/2006-01-01-boat/a.yml": comment(_id="i2", name="Wren", message="as a tomato", replying_to="i1"),
    "_data/comments/2006-01-01-boat/b.yml": comment(_id="i1", name="Mo", message="how red?", date=1136200000),
    # by the time
    "_data/comments/kites/1.yml": comment(name="Mo", message="again?", date="2006-01-02T10:00:00Z"),
    "_data/comments/kites/2.yml": comment(name="wren", message="and again", date="2006-01-02T11:00:00Z"),
    "_data/comments/kites/3.yml": comment(name="Al", message="buy spam", date=1136200000, hidden="true"),
    "_data/comments/kites/4.json": '{\n\t"name": "wren", "message": "it came back", "date": "1136200000000"}',
    "_data/comments/kites/5.yml": comment(name="Di", message="hurray", date="2006-01-03"),
    "_data/comments/kites/6.yml": "name: [broken",
    # nobody's
    "_data/comments/gone/1.yml": comment(name="Mo", message="where did the post go?"),
    "_data/comments/notes.txt": "nothing to be read",
}


def test_comments_in_data_files_find_their_post_and_what_they_answer(tmp_path):
    lines, report = run_over(tmp_path, COMMENTED, "--author", "wren")
    replies = [line for line in lines if line["kind"] == "reply"]
    assert {line["path"]: [turn["content"] for turn in line["messages"]] for line in replies} == {
        "_posts/2006-01-01-boat.md": ["how red?", "as a tomato"],
        "_posts/2006-01-02-kites.md": ["again?", "and again\n\nit came back"],
    }
    assert report["repairs"] == {"file of comments not readable": 1}
    assert [(row["source"], row["files"]) for row in report["not_read"]] == [("comments in _data", 1)]
    assert sum(report["words"].values()) == sum(map(x.count_words, author_turns(lines)))

    ledger = report["ledger"]
    assert (ledger["found"], ledger["kept_in_posts"], ledger["kept_in_replies"]) == (37, 18, 8)
    assert ledger["left_out"] == {"sources that are not read": 5, "other people's comments": 4, "hidden comments": 2}


@pytest.mark.parametrize(
    ("place", "text"),
    [
        ("2006/01/01/boat/1.yml", comment(name="wren", message="mine", id="9")),
        ("boat.yml", "- {name: Mo, message: what}\n- {name: wren, message: mine, parent: x}\n"),
        ("2006-01-01-boat.yml", "a: {name: wren, message: mine}\n"),
        ("The_Boat/1.yaml", comment(author="wren", comment="mine")),
    ],
)
def test_the_places_and_forms_of_comments(tmp_path, place, text):
    name = "_posts/2006-01-01-the-boat.md" if "The" in place else "_posts/2006-01-01-boat.md"
    blog = write_blog(tmp_path / "blog", {name: post("i bought a boat"), f"_data/comments/{place}": text})
    train, val, report = run(tmp_path, "--public", str(blog), "--author", "wren")
    assert "mine" in author_turns(train + val)
    assert report["not_read"] == []


def test_a_number_counts_the_comments_that_answer_none(tmp_path):
    files = {
        f"_data/comments/boat/{number}.yml": comment(name=name, message=text, **link)
        for number, (name, text, link) in enumerate(
            [
                ("Mo", "first", {}),
                ("Al", "first of first", {"replying_to": 1}),
                ("Di", "second", {}),
                ("wren", "to the second", {"replying_to": 2}),
                ("wren", "to none of them", {"replying_to": 77, "_parent": "/boat/"}),
            ]
        )
    }
    lines, _ = run_over(tmp_path, files | {"_posts/2006-01-01-boat.md": post("i bought a boat")}, "--author", "wren")
    replies = [[turn["content"] for turn in line["messages"]] for line in lines if line["kind"] == "reply"]
    assert replies == [["second", "to the second\n\nto none of them"]]


def test_a_time_without_a_zone_is_in_utc_and_an_odd_one_is_only_early_or_late():
    assert x.time_of({"date": "2019-04-02 22:00:00"}) == 1554242400
    assert x.time_of({"date": "9" * 400}) == 9999999999
    assert x.time_of({"date": "0001-01-01"}) < 0
