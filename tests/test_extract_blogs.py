"""Whole runs over tiny blogs: what is found, what becomes of it, and what happens when something is wrong."""

import functools
import hashlib
import itertools
import json
import multiprocessing
import os
import re
import signal
import stat
import subprocess
import sys
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path

import markdown
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import extract_blog_data as x

SCRIPT = Path(x.__file__).resolve()
DATA_FILES = ("redaction_key", "train_data.jsonl", "val_data.jsonl", "extraction_report.json")
SAMPLE = SCRIPT.parent / "sample"

PROSE = "the gull cat sat on the gull mat and looked at the gull sea, which was gull and wide and gull again, so there."
SETTINGS = x.parse_arguments([])


def write_blog(root: Path, files: dict[str, str | bytes]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return root


def post(body: str, **meta: str) -> str:
    return "---\n" + "".join(f"{key}: {value}\n" for key, value in meta.items()) + "---\n" + body


def many_posts(count: int) -> dict[str, str]:
    files = {}
    for n in range(count):
        body = " ".join(f"word{n}of{place}" for place in range(30))
        files[f"_posts/20{n % 20:02}-01-{n % 27 + 1:02}-post-{n}.md"] = post(body, title=f"About number {n} of them")
    return files


@pytest.fixture
def blog(tmp_path):
    return write_blog(tmp_path / "blog", many_posts(3))


def run(tmp_path: Path, *flags: str) -> tuple[list[dict], list[dict], dict]:
    """(train lines, validation lines, report) of a run that must succeed."""
    data = tmp_path / "data"
    assert x.main([*flags, "--data-dir", str(data)]) == 0
    report = json.loads((data / "extraction_report.json").read_text("utf-8"))
    train, val = (read_lines(data / name) for name in report["sha256"])
    check_contract(train + val, report)
    return train, val, report


def run_over(tmp_path: Path, files: dict[str, str | bytes], *flags: str) -> tuple[list[dict], dict]:
    """(all lines, report) of a run over a public blog of these files."""
    blog = write_blog(tmp_path / "blog", files)
    train, val, report = run(tmp_path, "--public", str(blog), *flags)
    return train + val, report


def read_lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text("utf-8").splitlines()]


def check_contract(lines: list[dict], report: dict):
    """What holds for every run."""
    assert report["files_found"] == report["files_kept"] + sum(report["files_skipped"].values())
    assert len(report["skipped"]) == sum(report["files_skipped"].values())
    assert sum(report["posts"].values()) == report["files_kept"]
    assert sum(row["count"] for row in report["conversations"]) == len(lines)
    for line in lines:
        keys = [key for key in line if key != "stand_in"]
        assert keys == ["messages", "kind", "visibility", "blog", "path", "title", "date"]
        roles = [turn["role"] for turn in line["messages"]]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
        assert roles
        assert all(turn["content"].strip() for turn in line["messages"])


def author_turns(lines: list[dict]) -> list[str]:
    return [turn["content"] for line in lines for turn in line["messages"] if turn["role"] == "assistant"]


COMMENTS = """---
title: The boat
date: 2006-08-25 22:17:00 +0000
comments:
- {id: 1, author: mossy, author_email: mossy@example.com, content: "<p>is it <i>really</i> one? call 415-555-0123</p>"}
- {id: 2, author: Wren, parent: 1, content: "it floats, it&#039;s a boat &lt;3"}
- {id: 3, author: mossy, parent: 2, content: <blockquote>it floats</blockquote>so does soap}
- {id: 4, author: wren, parent: 3, content: soap is a *small* boat}
- {id: 5, author: wrenfan, parent: 1, content: hello}
- {id: 6, author: wren, parent: 99, content: i meant the other one}
- {id: 7, author: wren, parent: 7, content: talking to myself here}
---
i bought a boat today. it is red.
"""
NESTED = "comments:\n- name: mossy\n  message: hi there\n  replies:\n  - name: wren\n    text: hi yourself\n"


def test_comments_become_conversations(tmp_path):
    files = {"boat": COMMENTS, "nested": f"---\n{NESTED}---\n"}
    paths = {f"_posts/2006-08-25-{name}.md": text for name, text in files.items()}
    lines, report = run_over(tmp_path, paths, "--author", "wren")
    replies = defaultdict(list)
    for line in lines:
        if line["kind"] == "reply":
            replies[line["path"]].append([turn["content"] for turn in line["messages"]])
    assert replies.pop("_posts/2006-08-25-nested.md") == [["hi there", "hi yourself"]]

    first, *of_the_post = replies.pop("_posts/2006-08-25-boat.md")
    asked, answered, *rest = first
    assert [asked, answered] == ["is it *really* one? call [phone]", "it floats, it's a boat <3"]
    assert rest == ["so does soap", "soap is a *small* boat"]
    assert [turns[1] for turns in of_the_post] == ["i meant the other one", "talking to myself here"]
    assert all("The boat" in turns[0] and "i bought a boat today." in turns[0] for turns in of_the_post)

    assert report["replies"] == {
        "answers a comment": 2,
        "answers a missing comment": 2,
        "within a longer conversation": 1,
    }
    assert sum(report["words"].values()) == sum(len(x.words_of(text)) for text in author_turns(lines))
    assert report["redactions"] == {"phone": 1}
    assert "mossy@example.com" not in json.dumps(lines) + json.dumps(report)
    assert {line["date"] for line in lines} == {"2006-08-25"}


THREADS = [
    # "comment>parent" in the order of the file; capitals are the author's; then the conversations
    ("a> B>a c>B D>c e>D F>e g>F H>g", ["a B", "c D e F g H"]),  # as deep as the setting, from a reader on
    ("a> B>a c>B D>c e>B F>e", ["a B c D", "e F"]),  # two branches of one answer
    ("a> B>a C>a", ["a B", "a C"]),
    ("a> B>a c>B D>c E>B", ["a B c D", "a E"]),  # more about an answer that is in another conversation
    ("F>e e>D D>c c>B B>a a>", ["a B c D e F"]),
    ("A>B B>A c>B D>c", ["A B c D"]),  # a cycle
]


@pytest.mark.parametrize(("thread", "expected"), THREADS)
def test_each_answer_of_a_thread_is_learnt_once(thread, expected):
    comments = {}
    for entry in thread.split():
        key, _, parent = entry.partition(">")
        comments[key] = x.Comment(parent, "wren" if key.isupper() else "mo", key)
    post = x.Post("b", "public", "p", text="words")
    x.add_replies(post, comments, replace(x.parse_arguments([]), authors=frozenset({"wren"})))
    found = ["\n\n".join(turn["content"] for turn in reply.messages) for reply in post.replies]
    found = [" ".join(word for word in text.split() if len(word) == 1 and word != "I") for text in found]
    assert found == expected
    assert post.cases.total() == sum(key.isupper() for key in comments)


def test_a_copy_of_a_post_adds_only_answers_that_are_new():
    def turns(text: str) -> x.Reply:
        messages = [{"role": "user" if key.islower() else "assistant", "content": key} for key in text]
        return x.Reply(messages, stand_in=False)

    kept = x.Post("b", "public", "p", replies=[turns("aBcD")])
    copy = x.Post("b", "private", "q", replies=[turns("aB"), turns("aBcDeF"), turns("gHaB"), turns("iJ")])
    x.drop_duplicate(copy, kept)
    assert ["".join(turn["content"] for turn in each.messages) for each in copy.replies] == ["eF", "gH", "iJ"]


SKIPS = {
    "_posts/2006-01-01-good.md": (post("a good long post of mine", title="Good"), None),
    "cat/_posts/2006-01-02-cat.md": (post("another post about the cat"), None),
    "_posts/deep/2006-1-3-deep.html": (post("<p>one more post, this time in HTML</p>"), None),
    "_posts/2006-01-04-none.md": ("just text", "no front matter"),
    "_posts/2006-01-05-out.md": (post("not for the public, this one", published="false"), "unpublished"),
    "_posts/2006-01-06-pic.md": (post("![x](x.png)"), "empty after cleaning"),
    "_posts/2006-01-07-short.md": (post("too short"), "too short"),
    "_posts/2006-01-08-other.md": (post("words by somebody else entirely", author="ann"), "other author"),
    "_posts/2006-01-09-bin.md": (b"---\n---\n\x00\x01\x02", "undecodable"),
    "_posts/2006-01-10-x.textile": (post("h1. textile"), "unsupported format"),
    "_posts/template.md": (post("the template of a post"), "undated file name"),
    "_posts/9999-12-31-later.md": (post("what the future brings to us"), "dated in the future"),
    "_posts/2006-01-12-copy.md": (post("a good long post of mine", title="Copy"), "duplicate"),
    "_posts/_2006-01-13-hidden.md": (post("hidden by its underscore sign"), "hidden from Jekyll"),
    "_posts/2006-01-14-ruled-out.md": (post("what the config excludes here"), "excluded in _config.yml"),
    "_posts/2006-01-15-big.md": (b"---\n---\n" + b"word " * 1_000_000, "too large"),
    "_drafts/idea.md": (post("an idea for a later post"), "draft"),
    "old/_posts/2006-01-01-old.md": (post("an old folder left out"), "excluded in _config.yml"),
    "old/_posts/deep/2006-01-02-old.png": (b"\x89PNG", "excluded in _config.yml"),
    "old/_drafts/old-idea.md": (post("an idea of old times"), "excluded in _config.yml"),
    "_other/cat/_posts/2006-01-01-x.md": (post("in a folder that Jekyll passes over"), "hidden from Jekyll"),
    "_other/2006-01-01-x.md": (post("in a collection, no post"), "not found"),
    "_site/_posts/2006-01-01-built.md": (post("what Jekyll has built there"), "not found"),
    "vendor/x/_posts/2006-01-01-gem.md": (post("a gem has posts, too"), "not found"),
    ".git/_posts/2006-01-01-git.md": (post("what git keeps for itself"), "not found"),
    "old/vendor/_posts/2006-01-01-gem.md": (post("a gem in an old folder"), "not found"),
}
CONFIG = "exclude:\n- old/\n- _posts/*ruled-out.md\n"


def test_every_file_is_accounted_for(tmp_path):
    blog = write_blog(tmp_path / "blog", {"deep/x": ""})
    outside = write_blog(tmp_path / "outside", {"2006-01-16-x.md": post("not of this blog at all")})
    write_blog(blog, {"_config.yml": CONFIG} | {name: text for name, (text, _) in SKIPS.items()})
    (blog / "_posts/2006-01-16-x.md").symlink_to(outside / "2006-01-16-x.md")
    (blog / "_posts/folder").symlink_to(outside)
    (blog / "_posts/around").symlink_to(blog)
    (blog / "_posts/2006-01-17-x.md").symlink_to("nowhere")
    (blog / "elsewhere").symlink_to(outside)
    (blog / "kitten").symlink_to("cat")
    (blog / "kitten/_drafts").symlink_to(outside)
    (blog / "deep/_posts").symlink_to("../_posts")
    (blog / "vendor/linked").symlink_to(outside)
    train, val, report = run(tmp_path, "--public", str(blog), "--author", "wren")

    expected = {name: reason for name, (_, reason) in SKIPS.items() if reason not in (None, "not found")}
    link = "link that leads out of the repository"
    expected |= dict.fromkeys(["_posts/2006-01-16-x.md", "_posts/folder", "elsewhere", "cat/_drafts"], link)
    expected |= dict.fromkeys(["_posts/around", "kitten", "deep/_posts"], "link to a folder")
    expected["_posts/2006-01-17-x.md"] = "not a regular file"
    assert {row["path"]: row["reason"] for row in report["skipped"]} == expected
    assert {line["path"] for line in train + val} == {name for name, (_, reason) in SKIPS.items() if reason is None}
    assert report["files_found"] == len(expected) + 3


def test_posts_are_read_in_the_source_in_included_folders_and_among_drafts_with_the_flag(tmp_path):
    config = {
        "_config.yml": "source: src\ninclude: [_more, .more]",
        "_posts/2006-01-01-a.md": post("out of the source"),
    }
    files = {
        "src/_more/_posts/2006-01-01-a.md": post("words in an included folder"),
        "src/.more/_posts/2006-01-02-b.md": post("more words in a folder with a dot"),
        "src/_drafts/idea.md": post("an idea for a later post"),
    }
    lines, report = run_over(tmp_path, files | config, "--drafts")
    assert {line["path"] for line in lines} == files.keys()
    assert report["config_problems"] == []


ODD_FILES = {
    "folder": Path.mkdir,
    "fifo": os.mkfifo,
    "link": lambda path: path.symlink_to("elsewhere"),
    "loop": lambda path: path.symlink_to(path.name),
}


def make(path: Path, content: str | bytes):
    """Makes a file of this content or, by its name, an odd one."""
    if content in ODD_FILES:
        ODD_FILES[content](path)
    else:
        write_blog(path.parent, {path.name: content})


NO_CONFIGS = {"_config.txt": "[", "_config.yml": "", "_config.yaml": "# a remark\n", "_config.toml": "title = 'x'\n"}


@pytest.mark.parametrize("name", NO_CONFIGS)
def test_a_config_that_is_missing_or_says_nothing_is_no_problem(tmp_path, name):
    write_blog(tmp_path, {name: NO_CONFIGS[name]})
    assert x.read_site(tmp_path, "public", SETTINGS).problem == ""


BROKEN_CONFIGS = [
    ("_config.yml", "exclude: [secret\ntitle: x\n", "line 2: "),
    ("_config.yml", b"title: caf\xe9\nexclude: [secret]\n", "'utf-8' codec can't decode byte 0xe9"),
    ("_config.yml", "exclude: " + "[" * 9000, "nested too deep"),
    ("_config.yml", "- exclude\n- secret\n", "it holds no settings"),
    ("_config.yml", "exclude: \x01\n", "unacceptable character"),
    ("_config.yml", "exclude: [secret]\n#" + "x" * 4_000_000, "larger than 4,000,000 bytes"),
    ("_config.yml", "folder", "Is a directory"),
    ("_config.yml", "fifo", "not a regular file"),
    ("_config.yml", "loop", "Too many levels of symbolic links"),
    ("_config.toml", "exclude = [secret]\n", "Invalid value (at line 1"),
    ("_config.toml", f"exclude = [{'9' * 5000}]\n", "Exceeds the limit (4300 digits)"),
    ("_config.toml", "exclude = " + "[" * 9000, "nested too deep"),
]


@pytest.mark.parametrize(("name", "content", "problem"), BROKEN_CONFIGS)
def test_a_config_that_cannot_be_read_is_not_applied(tmp_path, name, content, problem):
    make(tmp_path / name, content)
    site = x.read_site(tmp_path, "public", SETTINGS)
    assert site.problem.startswith(f"cannot be read ({problem}")
    assert site.problem.endswith("): its exclude, include, source and defaults are not applied")
    assert not site.excluded.match("secret")


@pytest.mark.parametrize("source", ["a" * 300, '"a\\0b"', "nowhere", "../elsewhere", "link", "_posts/2006-01-01-a.md"])
def test_a_source_that_is_no_folder_of_the_repository_is_not_read(tmp_path, source):
    write_blog(tmp_path / "elsewhere", {"_posts/2006-01-02-b.md": ""})
    blog = write_blog(tmp_path / "blog", {"_config.yml": f"source: {source}\n", "_posts/2006-01-01-a.md": ""})
    (blog / "link").symlink_to(tmp_path / "elsewhere")
    site = x.read_site(blog, "public", SETTINGS)
    assert site.root == blog
    assert site.problem.startswith('names a source, "')
    assert site.problem.endswith('", that is no folder of the repository: all of the repository is read')


def test_problems_of_a_config_are_said_and_stand_in_the_report(tmp_path, capsys):
    posts = {"_posts/2006-01-01-a.md": post("words to be read")}
    write_blog(tmp_path / "broken", {"_config.yml": "exclude: [_posts", **posts})
    write_blog(tmp_path / "lost", {"_config.yml": "source: nowhere", **many_posts(1)})
    _, _, report = run(tmp_path, "--public", str(tmp_path / "broken"), "--public", str(tmp_path / "lost"))
    said = capsys.readouterr()
    assert report["files_kept"] == 2
    assert [row["blog"] for row in report["config_problems"]] == ["broken", "lost"]
    for row in report["config_problems"]:
        sentence = f"{tmp_path / row['blog']}/_config.yml {row['problem']}; correct it and run again."
        assert sentence in said.err.splitlines()
    assert re.search(r"_config\.yml not applied in full +2\b", said.out)


def test_a_folder_that_cannot_be_read_is_a_row_of_the_table(tmp_path, monkeypatch, capsys):
    files = {f"{name}/2006-01-01-a.md": post("words and words") for name in ("_posts/deep", "other/_posts", "_drafts")}
    unreadable = ["_drafts", "_posts/deep", "other"]
    places = [str(tmp_path / "blog" / name) for name in unreadable]
    scandir = os.scandir

    def refuse(path):
        if path in places:
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    _, report = run_over(tmp_path, files | {"good/_posts/2006-01-01-a.md": post("what everybody may read")})
    row = {"blog": "blog", "reason": "unreadable folder", "detail": ""}
    assert report["skipped"] == [row | {"path": name} for name in unreadable]
    assert re.search(r"skipped: unreadable folder +3\b", capsys.readouterr().out)


def test_the_config_has_three_names_and_the_first_wins(tmp_path):
    for name in ("_config.toml", "_config.yaml", "_config.yml"):
        sign = "=" if name.endswith("toml") else ":"
        write_blog(tmp_path, {name: f"exclude{sign} ['{name}']"})
        site = x.read_site(tmp_path, "public", SETTINGS)
        assert site.config.name == name
        assert site.excluded.match(name)


def test_other_authors_are_left_out_only_when_the_author_is_known(tmp_path, capsys):
    files = {
        "_posts/2006-01-01-a.md": post("words by somebody else entirely", author="ann"),
        "_posts/2006-01-02-b.md": post("nobody says who wrote this one"),
        "_posts/2006-01-03-c.md": post("this one is by two people", authors="[ann, {name: Wren}]"),
    }
    _, report = run_over(tmp_path, files)
    assert report["files_kept"] == 3
    assert 'No post or comment is by "judytuna", so every post is treated as yours.' in capsys.readouterr().err
    _, report = run_over(tmp_path, files, "--author", "wren")
    assert [row["path"] for row in report["skipped"]] == ["_posts/2006-01-01-a.md"]
    _, report = run_over(tmp_path, files, "--author", "wre")
    assert report["files_kept"] == 1


def test_a_mistyped_author_is_said_with_the_posts_that_it_costs(tmp_path, capsys):
    blog = write_blog(tmp_path / "blog", many_posts(2))
    write_blog(blog, {"_posts/2006-01-01-a.md": post("words by one of three", author="Ann")})
    write_blog(blog, {"_posts/2006-01-02-b.md": post("words by another of the three", author="Carla")})
    run(tmp_path, "--public", str(blog), "--author", "Ann", "--author", "Karla")
    said = capsys.readouterr()
    assert 'No post is by "karla". Left out as other people\'s: 1 by "carla". Add your names' in said.err
    assert "words are held out, and test_model.py --report needs 1,100" in said.out


def test_a_post_in_two_repositories_is_kept_once_and_the_public_one_wins(tmp_path):
    words = [f"word{n}" for n in range(100)]
    edited = " ".join([*words[:98], "two", "more", "edits"])
    reply = "comments:\n- {id: 1, author: mo, content: why}\n- {id: 2, parent: 1, author: wren, content: because}\n"
    a = write_blog(tmp_path / "a", {"_posts/2006-01-01-x.md": post(" ".join(words), title="X rays")})
    b = write_blog(tmp_path / "b", {"_posts/2007-01-01-y.md": f"---\n{reply}---\n{edited}"})
    train, val, _ = run(tmp_path, "--public", str(a), "--private", str(b), "--author", "wren")
    assert [(line["kind"], line["blog"]) for line in train + val] == [("post", "a"), ("reply", "b")]
    assert not (train and val)


def held_out(numbers: range, share: float = 0.1) -> set[str]:
    posts = [x.Post("b", "public", f"{n}.md", group=str(n)) for n in numbers]
    return {posts[index].path for index in x.choose_validation(posts, share)}


def test_a_new_post_never_moves_an_old_one():
    before = held_out(range(60))
    for count in range(61, 161):
        assert before <= held_out(range(count))
        before = held_out(range(count))
    assert 10 <= len(before) <= 22
    assert before == {path for n in range(160, 180) for path in held_out(range(n)) if int(path[:-3]) < 160}


def test_a_small_blog_holds_out_one_or_two_posts_at_least_and_twice_the_share_at_most():
    for count in range(2, 40):
        for first in range(0, 4000, 100):
            held = held_out(range(first, first + count))
            assert 1 + (count >= 20) <= len(held) <= max(1, count // 5)
    assert held_out(range(1)) == set()
    assert len(held_out(range(40), share=0)) == 1


def test_a_share_that_chance_makes_far_from_the_setting_is_said(tmp_path, capsys, blog):
    run(tmp_path, "--public", str(blog))
    assert "1 of 3 posts are held out, 33% instead of 10%: " in capsys.readouterr().out
    assert [bool(x.tell_share({"train": 100 - n, "validation": n}, 0.1)) for n in (4, 6, 14, 16)] == [1, 0, 0, 1]


def test_a_longer_copy_of_a_post_stays_on_its_side():
    hashes = x.shingle_hashes(PROSE.split())
    for n in range(40):
        old = x.Post("b", "public", f"_posts/2006-01-01-{n}.md", text=PROSE, group="old", shingles=hashes)
        new = x.Post("b", "public", f"_posts/2007-01-01-{n}.md", text=PROSE + " again", group="new", shingles=hashes)
        before = x.chance_of([old])
        x.drop_duplicates([old, new], 0.8)
        assert old.reason == "duplicate"
        assert x.chance_of([new]) == before


def test_related_posts_stay_on_one_side():
    posts = [x.Post("b", "public", f"{n}.md", group=str(n // 3)) for n in range(60)]
    chosen = x.choose_validation(posts, 0.1)
    assert Counter(n // 3 for n in chosen) == Counter(dict.fromkeys({n // 3 for n in chosen}, 3))


def test_near_duplicates_are_exact():
    base = [f"w{n}" for n in range(104)]  # 100 shingles

    def edited(count):  # every change at the end costs one shingle
        return x.shingle_hashes([*base[: 104 - count], *(f"e{n}" for n in range(count))])

    sets = [x.shingle_hashes(base), edited(11), edited(12), edited(50)]
    assert x.find_duplicates(sets, 0.8) == {1: 0}  # 89/111 = 0.80, 88/112 = 0.79
    assert x.find_duplicates([sets[0]] * 500, 0.8) == dict.fromkeys(range(1, 500), 0)


def test_redaction_is_reported_by_fingerprints_only(tmp_path):
    files = {"_posts/2006-01-01-a.md": post("my address is Wren@Example.org, write me")}
    _, report = run_over(tmp_path, files)
    key = x.read_key(tmp_path / "data")
    mark = x.fingerprint("wren@example.org", key)
    assert report["redacted"] == [{"fingerprint": mark, "kind": "email", "visibility": "public"}]
    text = (tmp_path / "data/extraction_report.json").read_text().lower()
    assert "example.org" not in text
    assert key.hex() not in text

    # Another folder has another key, so that two reports cannot be compared either.
    (tmp_path / "data").rename(tmp_path / "old")
    assert run_over(tmp_path, files)[1]["redacted"][0]["fingerprint"] != mark


NAMED = {
    "_posts/2006-01-01-anna-is-born.md": """---
title: Anna is born
tags: [anna, babies]
comments:
- {id: 1, author: anna's aunt, content: "give ANNA a kiss, elm  street, call 415-555-0123"}
- {id: 2, author: wren, parent: 1, content: Anna's asleep}
- {id: 3, author: wren, content: i meant that anna}
---
anna sleeps and anna sings. Anna's room at 12 Elm\nStreet is ready. anna@example.org
""",
    "_posts/2006-01-02-copy-of-annas-day.md": post("Anna slept all day and then she sang", title="Anna", tags="[Anna]"),
    "_posts/2006-01-03-anna_again.md": post("Anna slept all day and then she sang", title="Anna"),
    "_posts/2006-01-04-by-anna.md": post("words by somebody else entirely", author="Anna Other"),
    "_posts/2006-01-05-anna.textile": post("h1. anna"),
    "_posts/2006-01-06-none.md": post("nobody is named in here at all", title="Nobody"),
}


@pytest.mark.slow
def test_private_words_stand_in_no_file_of_the_data_folder(tmp_path, monkeypatch, capsys):
    # Worker processes that know nothing of what a test has set, as on a Mac.
    pool = functools.partial(x.ProcessPoolExecutor, mp_context=multiprocessing.get_context("spawn"))
    monkeypatch.setattr(x, "ProcessPoolExecutor", pool)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1}, raising=False)

    others = {name.replace("-post-", "-anna-"): text for name, text in many_posts(70).items()}
    blog = write_blog(tmp_path / "anna-blog", {"_config.yml": "source: anna\n"} | NAMED | others)
    flags = ["--private", str(blog), "--author", "wren", "--author", "Anna Wren"]
    before = [{line["path"] for line in lines} for lines in run(tmp_path, *flags)[:2]]
    capsys.readouterr()

    monkeypatch.setattr(x, "BLOCKED_WORDS", ["Anna", "12 Elm Street", "elm street", "Smiht"])
    train, val, report = run(tmp_path, *flags)
    said = capsys.readouterr()
    for file in (tmp_path / "data").iterdir():
        assert not re.search(r"\banna\b|elm\s+street|smiht", file.read_text("utf-8").replace("\\n", " "), re.IGNORECASE)
    assert "anna" not in said.out.lower()

    # The words are counted by their places; what comes from where can still be told.
    assert report["blocked_words"] == [83, 1, 1, 0]
    assert report["redactions"] == {"email": 1, "phone": 1, "private word": 85}
    assert {row["kind"] for row in report["redacted"]} == {"email", "phone"}
    assert re.search(r"redacted: private word +85\b", said.out)
    assert re.search(r"^BLOCKED_WORDS found nowhere, number 4 +1$", said.out, re.M)
    assert "files with a private word in their names, [private] in the data: 74" in said.err
    assert {row["path"]: row["detail"] for row in report["skipped"]} == {
        "_posts/2006-01-03-[private]_again.md": "[private]-blog/_posts/2006-01-02-copy-of-annas-day.md",
        "_posts/2006-01-04-by-[private].md": "[private] other",
        "_posts/2006-01-05-[private].textile": "",
    }
    assert report["authors"] == ["[private] wren", "wren"]
    assert report["config_problems"][0]["problem"].startswith('names a source, "[private]"')

    # Neither the split nor the near-duplicates go by the words that are gone.
    after = [{line["path"] for line in lines} for lines in (train, val)]
    assert [{path.replace("-anna-", "-[private]-") for path in paths} for paths in before] == after

    texts = {line["kind"]: line["messages"] for line in train + val if line["path"].endswith("[private]-is-born.md")}
    assert '"[private] is born"' in texts["post"][0]["content"]
    assert texts["post"][1]["content"].endswith("[private]'s room at [private] is ready. [email]")
    assert '"[private] is born"' in texts["reply"][0]["content"]
    replies = [line["messages"] for line in train + val if line["kind"] == "reply"]
    assert replies[0][0]["content"] == "give [private] a kiss, [private], call [phone]"
    assert replies[0][1]["content"] == "[private]'s asleep"


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("umask", [0, 0o777])
def test_what_is_written_is_its_owners_alone_whatever_the_umask(tmp_path, blog, umask):
    before = os.umask(umask)
    try:
        run(tmp_path, "--public", str(blog))
    finally:
        os.umask(before)
    assert mode_of(tmp_path / "data") == 0o700
    assert {path.name: mode_of(path) for path in (tmp_path / "data").iterdir()} == dict.fromkeys(DATA_FILES, 0o600)


@pytest.mark.parametrize(("mode", "is_said"), [(0o2775, True), (0o701, True), (0o700, False)])
def test_a_folder_that_was_there_keeps_its_mode_and_all_that_is_in_it(tmp_path, capsys, blog, mode, is_said):
    others = {"mine.txt": "mine", ".train_data.jsonl.bak": "mine, too"}
    data = tmp_path / "data"
    data.symlink_to(write_blog(tmp_path / "real", others))
    data.chmod(mode)
    run(tmp_path, "--public", str(blog))
    assert mode_of(data) == mode
    assert data.is_symlink()
    assert contents(data).keys() == {*DATA_FILES, *others}
    assert ("Others can list" in capsys.readouterr().err) == is_said


LINE = '{"messages": [], "kind": "post", "visibility": "public", "blog": "b", "path": "p"}\n'
NO_DATA = ["mine\n", "\n" + LINE, "[]\n", '{"messages": []}\n', "[" * 100_000, b"\xff\n", "folder", "fifo", "link"]
NO_KEY = ["", "abc", "zz" * 32, "ab" * 31, "ab" * 3200, b"\xff" * 64, "folder", "fifo", "link"]
NOT_OURS = [(name, content) for name in DATA_FILES for content in (NO_KEY if name == "redaction_key" else NO_DATA)]


@pytest.mark.parametrize(("name", "content"), NOT_OURS)
def test_what_this_script_has_not_written_is_not_replaced(tmp_path, monkeypatch, blog, name, content):
    data = write_blog(tmp_path / "data", {"extraction_report.json": '{"files_found": 3}', "train_data.jsonl": LINE})
    write_blog(tmp_path, {"data/elsewhere": "ab" * 32})
    (data / name).unlink(missing_ok=True)
    make(data / name, content)
    before = sorted(path.lstat()[:7] for path in data.iterdir())

    monkeypatch.setattr(x, "list_posts", None)  # nothing is read before
    with pytest.raises(SystemExit) as stopped:
        x.main(["--public", str(blog), "--data-dir", str(data)])
    assert stopped.value.code.startswith(f"{data / name} ")
    assert re.search("move it away, (or name another data folder|and a new one will be made)", stopped.value.code)
    assert sorted(path.lstat()[:7] for path in data.iterdir()) == before


def test_files_of_an_earlier_run_are_replaced_and_the_same_blog_gives_the_same_bytes(tmp_path, blog):
    write_blog(blog, {"_posts/2006-01-01-mail.md": post("write to wren@example.org or to mossy@example.org")})
    run(tmp_path, "--public", str(blog))
    before = contents(tmp_path / "data")
    run(tmp_path, "--public", str(blog))
    assert contents(tmp_path / "data") == before
    write_blog(tmp_path / "data", dict.fromkeys(DATA_FILES[1:], ""))
    run(tmp_path, "--public", str(blog))
    assert contents(tmp_path / "data") == before


@pytest.mark.parametrize(
    ("folder", "sentence"),
    [
        ("file/data", "file is not a folder: name another data folder"),
        ("nowhere", "nowhere is not a folder: name another data folder"),
        ("/", "/ is the home folder or contains it: "),
        ("to-home", "to-home is the home folder or contains it: "),
        ("to-blog", "to-blog is a blog's repository or its folder of posts: "),
        ("blog/_posts", "_posts is a blog's repository or its folder of posts: "),
        ("blog/cat/_drafts/new", "new is a blog's repository or its folder of posts: "),
    ],
)
def test_a_folder_that_is_no_place_for_data_is_refused_before_anything_is_read(tmp_path, monkeypatch, folder, sentence):
    write_blog(tmp_path, {"file": "", "home/x": "", "blog/_posts/2006-01-01-a.md": post("some words to be read")})
    (tmp_path / "to-home").symlink_to("home")
    (tmp_path / "to-blog").symlink_to("blog")
    (tmp_path / "nowhere").symlink_to("elsewhere")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(x, "list_posts", None)
    with pytest.raises(SystemExit, match=re.escape(sentence)):
        x.main(["--public", str(tmp_path / "blog"), "--data-dir", str(tmp_path / folder)])


def test_a_folder_in_a_repository_is_warned_of(capsys, blog):
    assert x.main(["--public", str(blog), "--data-dir", str(blog / "new/data")]) == 0
    assert f"{blog}: Jekyll or git would publish what is written there" in capsys.readouterr().err


def test_what_killed_runs_have_left_is_swept_and_nothing_else(tmp_path):
    gone = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    dead = gone.stdout.strip()
    ours = [f".train_data.jsonl.{dead}", f".extraction_report.json.{dead}", f".redaction_key.{os.getpid()}"]
    others = [".train_data.jsonl.1", f".train_data.jsonl.{os.getppid()}", f"train_data.jsonl.{dead}", ".mine.1234567"]
    others += [f".train_data.jsonl.{end}" for end in (f"{dead}.bak", "0", "-1", "12345678")]
    write_blog(tmp_path, dict.fromkeys(ours + others, ""))
    make(tmp_path / f".val_data.jsonl.{dead}", "folder")
    make(tmp_path / f".redaction_key.{dead}", "link")
    x.sweep(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {*others, f".val_data.jsonl.{dead}", f".redaction_key.{dead}"}


# The function that finds the disk full, after how many calls, and how many files have been moved by then.
FULL_DISKS = [(os, "fsync", 0, 0), (os, "fsync", 3, 0), *((Path, "replace", moved, moved) for moved in range(4))]


@pytest.mark.parametrize(("owner", "name", "calls", "moved"), FULL_DISKS)
def test_a_full_disk_leaves_whole_files_and_those_of_two_runs_are_told_by_their_digests(
    tmp_path, monkeypatch, blog, owner, name, calls, moved
):
    run(tmp_path, "--public", str(blog))
    before = contents(tmp_path / "data")
    write_blog(blog, many_posts(40))
    write = getattr(owner, name)
    done = []

    def fail(*args):
        if len(done) == calls:
            raise OSError(28, "No space left on device")
        done.append(args)
        return write(*args)

    monkeypatch.setattr(owner, name, fail)
    with pytest.raises(SystemExit, match=f"/{DATA_FILES[calls]}: No space left on device.$"):
        x.main(["--public", str(blog), "--data-dir", str(tmp_path / "data")])
    after = contents(tmp_path / "data")
    assert after.keys() == before.keys()
    assert {file for file in DATA_FILES[1:] if after[file] != before[file]} == set(DATA_FILES[1:moved])

    digests = json.loads(after["extraction_report.json"])["sha256"]
    is_right = [hashlib.sha256(after[file]).hexdigest() == digest for file, digest in digests.items()]
    assert all(is_right) == (moved < 2)


@pytest.mark.slow
def test_a_killed_run_leaves_the_old_files_whole(tmp_path, blog):
    run(tmp_path, "--public", str(blog))
    before = contents(tmp_path / "data")
    write_blog(blog, many_posts(9))
    assert stopped_run(tmp_path, blog, "os.fsync", [9]).returncode == -9
    left = contents(tmp_path / "data")
    assert {name: left[name] for name in DATA_FILES} == before
    assert len(left) == 5
    run(tmp_path, "--public", str(blog))
    assert contents(tmp_path / "data").keys() == before.keys()


# The script as a user runs it, with a library function that first sends signals to the run.
STOPPED_RUN = """
import os, runpy, sys, {module}
sys.argv = sys.argv[1:]
run, true = os.getpid(), {module}.{name}
os.sched_getaffinity = lambda _: {{0, 1}}

def stop(*args, **options):
    for each in {signals}:
        os.kill(run, each)
    return true(*args, **options)

{module}.{name} = stop
runpy.run_path(sys.argv[0], run_name="__main__")
"""
STOPS = [
    # when, posts, function that is called then, signals
    ("libraries are loaded", 1, "re.compile", "SIGHUP"),
    ("a post is read", 9, "zlib.crc32", "SIGTERM"),
    ("workers read posts", 70, "zlib.crc32", "SIGINT"),
    ("workers read posts", 70, "zlib.crc32", "SIGHUP SIGTERM SIGINT SIGINT"),
    ("posts are compared", 9, "numpy.searchsorted", "SIGINT SIGINT SIGTERM SIGHUP"),
    ("files are written", 9, "os.fsync", "SIGINT SIGINT SIGTERM SIGHUP"),
]


def stopped_run(tmp_path: Path, blog: Path, function: str, signals: list[int]) -> subprocess.CompletedProcess:
    module, _, name = function.rpartition(".")
    code = STOPPED_RUN.format(module=module, name=name, signals=signals)
    flags = [SCRIPT, "--public", blog, "--data-dir", tmp_path / "data"]
    return subprocess.run([sys.executable, "-c", code, *flags], capture_output=True, text=True, timeout=60)


def sentences(stderr: str) -> list[str]:
    """Without what is said of an author whom no post names."""
    return [line for line in stderr.splitlines() if not line.startswith("No post or comment")]


@pytest.mark.slow
@pytest.mark.parametrize(("moment", "posts", "function", "signals"), STOPS)
def test_a_run_that_is_stopped_says_one_sentence(tmp_path, moment, posts, function, signals):
    blog = write_blog(tmp_path / "blog", many_posts(posts))
    done = stopped_run(tmp_path, blog, function, [int(getattr(signal, one)) for one in signals.split()])
    [said] = sentences(done.stderr)
    assert said.startswith("Stopped before ")
    assert done.returncode == 1
    assert done.stdout == ""
    left = {path.name for path in (tmp_path / "data").glob("*")}
    assert left == (set(DATA_FILES) if function == "os.fsync" else set())


@pytest.mark.slow
def test_workers_end_with_a_run_that_is_killed(tmp_path):
    blog = write_blog(tmp_path / "blog", many_posts(70))
    # Whoever of them lived on would hold the other end of stdout, and the call would not return.
    assert stopped_run(tmp_path, blog, "zlib.crc32", [9]).returncode == -9


STREAMS = [
    # redirection, status, sentence
    ("> /dev/full", 1, "Cannot print on stdout (No space left on device): the data are complete"),
    (">&-", 1, "Cannot print on stdout, which is closed: the data are complete"),
    ("| true", 0, ""),
    ("2>&-", 0, ""),
    ("2> /dev/full", 0, ""),
    ("<&- >&- 2>&-", 1, ""),
]


@pytest.mark.slow
@pytest.mark.parametrize(("redirection", "status", "sentence"), STREAMS)
def test_a_stream_that_is_full_or_closed_costs_no_data(tmp_path, redirection, status, sentence):
    write_blog(tmp_path / "blog", many_posts(70))
    command = f"{sys.executable} {SCRIPT} --public blog --data-dir data {redirection}"
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True)
    said = [line for line in sentences(done.stderr) if "are held out" not in line]
    assert len(said) == bool(sentence)
    assert all(line.startswith(sentence) for line in said)
    assert done.returncode == status
    assert not done.stdout or re.match(r"files found +70\n", done.stdout)
    assert contents(tmp_path / "data").keys() == set(DATA_FILES)


@pytest.mark.slow
def test_no_file_takes_the_number_of_a_closed_stream():
    code = (
        "import os, extract_blog_data as x; os.closerange(0, 3)\n"
        "try: x.main(['--public', 'nowhere'])\n"
        "finally: os._exit(os.open('.', 0))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=SCRIPT.parent).returncode > 2


@pytest.mark.slow
def test_names_that_are_not_utf8_end_in_no_traceback(tmp_path, blog):
    odd = os.fsencode(tmp_path) + b"/\xff"
    os.rename(blog, odd)  # noqa: PTH104
    command = [sys.executable, SCRIPT, "--public", odd, "--data-dir", odd + b"-data"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0
    assert "written to" in done.stdout
    assert "Traceback" not in done.stderr


MISTAKES = [
    # flags, what the sentence holds
    (["--public", "nowhere"], "There is no Jekyll repository at nowhere: .*make demo"),
    (["--public", "empty"], "No post found in .*/empty, .*make demo"),
    (["--public", "skipped"], r"None of the 1 files could be used \(1 no front matter\)"),
    (["--public", "\udcff"], "There is no Jekyll repository at \udcff: "),
    (["--author", "\udcff"], "argument --author: "),
    (["--author", " " * 5000], r"argument --author: ' +\.{3} +' must be"),
    (["--pub", "blog"], "--pub"),
]


@pytest.mark.parametrize(("flags", "sentence"), MISTAKES)
def test_mistakes_get_one_sentence(tmp_path, monkeypatch, capsys, flags, sentence):
    write_blog(tmp_path, {"empty/x": "", "skipped/_posts/2006-01-01-a.md": "nothing"})
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=sentence) as stopped:
        x.main([*flags, "--data-dir", "data"])
    assert "\n" not in stopped.value.code
    assert capsys.readouterr().out == ""


def test_a_file_that_takes_too_long_is_skipped(tmp_path, monkeypatch):
    clean_lines = x.clean_lines

    def slow(text, *more):
        while "slow" in text:
            pass
        return clean_lines(text, *more)

    monkeypatch.setattr(x, "MAX_SECONDS", 0.5)
    monkeypatch.setattr(x, "clean_lines", slow)
    _, report = run_over(tmp_path, many_posts(2) | {"_posts/2006-01-01-slow.md": post("slow " * 9)})
    assert [row["path"] for row in report["skipped"]] == ["_posts/2006-01-01-slow.md"]
    assert "took over" in report["skipped"][0]["reason"]


def test_an_interrupted_file_does_not_spoil_the_next_one(tmp_path):
    class Stop(markdown.treeprocessors.Treeprocessor):
        def run(self, root):
            if "slow" in "".join(root.itertext()):
                x.converter((), False).parser.state.set("list")  # as if the parser had been stopped inside of a list
                raise RecursionError

    x.converter((), False).treeprocessors.register(Stop(), "stop", 99)
    files = {"_posts/2006-01-01-a.md": post("so slow"), "_posts/2006-01-02-b.md": post("one and two\n\nand three")}
    [line], report = run_over(tmp_path, files)
    assert report["files_skipped"] == {"nested too deep": 1}
    assert line["messages"][-1]["content"] == "one and two\n\nand three"


DEEP = {
    "quotes": ">" * 10_000 + " a",
    "lists": "\n".join("    " * n + "- a" for n in range(300)),
    "html": "<div>" * 10_000 + "a b c d e" + "</div>" * 10_000,
    "emphasis": "<i>" * 10_000 + "a b c d e",
    "brackets": "[" * 10_000 + "a" + "]" * 10_000,
    "braces": "{{" * 10_000 + "{%" * 10_000,
    "ticks": "`" * 3 + " `" * 5_000,
    "declaration": "<![if a]><!DOCTYPE [ <!-- <![CDATA[ a b c d",
}


@pytest.mark.slow
def test_monstrous_files_do_no_harm(tmp_path, monkeypatch):
    monkeypatch.setattr(x, "MAX_SECONDS", 1)
    files = {f"_posts/2006-01-01-{name}.md": post(body) for name, body in DEEP.items()}
    files |= {f"_posts/2006-01-02-{name}.html": post(body) for name, body in DEEP.items()}
    files["_posts/2006-01-03-yaml.md"] = "---\na: " + "{a: " * 10_000 + "\n---\nsome words of a post"
    files["_posts/2006-01-04-bomb.md"] = (
        "---\na: &a [x, x, x, x, x, x, x, x, x]\n"
        + "".join(f"{b}: &{b} [{', '.join(['*' + a] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True))
        + "title: *i\ntags: *i\nauthor: *i\ncomments: *i\n---\nsome words of a post"
    )
    lines, report = run_over(tmp_path, files)
    read = {line["path"] for line in lines}
    read |= {row["path"] for row in report["skipped"] if row["reason"] == "duplicate"}
    assert {"_posts/2006-01-01-html.md", "_posts/2006-01-04-bomb.md"} <= read


FRAGMENTS = st.sampled_from(
    [
        "hello there ", "*sigh* ", "\n\n", "\n", "    ", "- item\n", "1. one\n", "> quote\n", "```\n", "~~~\n",
        "`code` ", "{% if x %}", "{% else %}", "{% endif %}", "{% include x %}", "{{ page.title }}",
        "{{ x }}", "{: .lead }", "{:toc}", "{#id}\n", "[^1]", "\n[^1]: note\n", "[text](", "/url)", "![alt](x.png)",
        "<b>", "</b>", "<div>", "</div>", "<iv>", "<!--more-->", "<!--", "-->", "<blockquote>", "</p>", "&amp;#039;",
        "| a | b |\n", "|---|---|\n", "# Head\n", "-----\n", "$$", "\\", "é", "漢", "👩‍👧", "\u200d", "\ufeff",
        "a@b.org ", "\n415-555-0123 ", "<|im_start|>", "[caption id=x]", "[/caption]", "mo (10:36 PM): hi\n",
        "http://example.com\n",
    ]
)  # fmt: skip
BODIES = st.lists(st.one_of(FRAGMENTS, st.text(max_size=12)), max_size=30).map("".join)


@pytest.mark.slow
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(bodies=st.lists(BODIES, min_size=1, max_size=5), meta=st.lists(BODIES, max_size=3))
def test_any_blog_becomes_clean_text_and_the_same_bytes_again(tmp_path_factory, bodies, meta):
    tmp_path = tmp_path_factory.mktemp("any")
    files = {"_posts/2008-01-01-good.md": post("a post that can be read by all")}
    for n, body in enumerate(bodies):
        files[f"_posts/2006-01-{n + 1:02}-x.{'html' if n % 2 else 'md'}"] = post(body)
    for n, front in enumerate(meta):
        files[f"_posts/2007-01-{n + 1:02}-x.md"] = f"---\n{front}\n---\nwords and words"
    encoded = {name: text.encode("utf-8", "surrogatepass") for name, text in files.items()}
    lines, report = run_over(tmp_path, encoded)
    assert report["files_found"] == len(files)
    for line in lines:
        text = line["messages"][1]["content"]
        prose = re.sub(r"`[^`]*`?", "", text)
        assert "{: .lead" not in prose
        assert "{% include x %}" not in prose
        assert "<|" not in text
        assert "415-555-0123" not in text
        assert not re.search("[\ue000-\ue002\ufeff\x00-\x08]", text)
        assert text == text.strip()

    before = contents(tmp_path / "data")
    run_over(tmp_path, encoded)
    assert contents(tmp_path / "data") == before


def test_a_long_wait_has_a_line_of_its_own_in_a_terminal_and_none_elsewhere(monkeypatch, capsys):
    looks = itertools.count(0, 2)  # two seconds from one look at the clock to the next
    monkeypatch.setattr(x.time, "monotonic", lambda: next(looks))
    assert list(x.watched("abc", "row", 3)) == ["a", "b", "c"]
    assert capsys.readouterr().err == ""

    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert list(x.watched("abc", "row", 3)) == ["a", "b", "c"]
    lines = [line.strip() for line in capsys.readouterr().err.split("\r")]
    assert lines == ["row 1 of 3, 4 s left", "row 2 of 3, 2 s left", "row 3 of 3, 0 s left", "", ""]

    # A terminal that is gone ends nothing.
    monkeypatch.setattr(sys, "stderr", None)
    assert list(x.watched("abc", "row", 3)) == ["a", "b", "c"]
