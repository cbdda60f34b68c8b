"""Pasted chats: what is one, who says what in it, and what becomes of it."""

import re
from collections import Counter
from dataclasses import replace

import pytest
from test_extract_blogs import author_turns, post, run, run_over, write_blog

import extract_blog_data as x

SETTINGS = replace(x.parse_arguments([]), authors=frozenset({"wren"}), phone_countries=("US",), blocked_words=())


def chats_of(body: str, is_html: bool = False) -> tuple[str, list[list[str]], x.Post]:
    """(the text without its chats, the turns of each conversation, the post)."""
    text, found = x.to_text(x.strip_markup(body, {}, Counter()), is_html, "", "keep", Counter())
    told = x.Post("b", "public", "p")
    for chat in found:
        x.add_chat(told, chat, SETTINGS)
    turns = [reply.messages for reply in told.replies]
    for each in turns:
        assert [turn["role"] for turn in each] == ["user", "assistant"] * (len(each) // 2)
    return text, [[turn["content"] for turn in each] for each in turns], told


@pytest.mark.parametrize("row", [*x.CHAT_LINES, *x.CHAT_HEADS], ids=lambda row: row.program)
def test_a_chat_of_every_program_becomes_a_conversation(row):
    words = ["hi there", "what now", "where then", "tea at noon"]
    lines = [row.example.replace("hi there", said) for said in words]
    chat = "\n".join([lines[0], lines[1].replace("mossy", "Wren"), lines[2], lines[3].replace("mossy", "wren_")])
    text, turns, told = chats_of(f"Before.\n\n{chat}\n\nAfter.")
    assert text == "Before.\n\nAfter."
    assert turns == [words]
    assert told.cases == {"speaks in a chat": 1}


ASKED = "general"
TURNS = [
    # (chat, turns); ASKED stands for a general request
    ("mo (1:02 PM): one\nmo (1:03 PM): two\nwren (1:04 PM): three\nwren (1:05 PM): four", ["one\ntwo", "three\nfour"]),
    ("mo (1:02 PM): one\nal (1:03 PM): two\nw r e n (1:04 PM): three\nmo (1:05 PM): four", ["one\ntwo", "three"]),
    ("wren (1:02 PM): one\nmo (1:03 PM): two\nwren (1:04 PM): three", [ASKED, "one", "two", "three"]),
    ("mo (1:02 PM): one\nand more\n\nof it\nwren (1:03 PM): *two*", ["one\nand more\nof it", "*two*"]),
    ("**mo (1:02 PM):** one\n**wren (1:03 PM):** two", ["one", "two"]),
    ("mo (1:02 PM): ring 415-555-0123\nwren (1:03 PM): see [this](http://x.org/y)", ["ring [phone]", "see this"]),
    ("1/2/2020, 10:33\u202fAM - +44 7700 900123: one\n1/2/2020, 10:34\u202fAM - Wren: two", ["one", "two"]),
    ("\u200e[1/2/20, 10:33:12] Mo Low: one\n\u200e[1/2/20, 10:33:15] Wren: two", ["one", "two"]),
    ("mo: one\n\nwren: two\n\nmo: three\n\nwren: four", ["one", "two", "three", "four"]),
    ("mo83: one\nw r e n: two\nmo83: three\nwren: four", ["one", "two", "three", "four"]),
    ("<mo83> one\n<wren> two\n<mo83> three\n<wren> four", ["one", "two", "three", "four"]),
    ("[10:36] <mo> one\n[10:37] <wren> two\nand on\n[10:38] <mo> bye", ["one", "two\nand on"]),
    ("mo\n: one\n\nwren\n: two\n\nmo\n: three\n\nwren\n: four", ["one", "two", "three", "four"]),
]  # fmt: skip


@pytest.mark.parametrize(("chat", "expected"), TURNS)
def test_turns_of_a_chat(chat, expected):
    text, turns, _ = chats_of(f"Before.\n\n{chat}\n\nAfter.")
    assert text == "Before.\n\nAfter."
    if expected[0] == ASKED:
        assert turns[0].pop(0) in SETTINGS.general_requests
        expected = expected[1:]
    assert turns == [expected]


@pytest.mark.parametrize("box", ["dl", "dialog"])
def test_a_chat_in_html_is_one_and_other_lists_of_terms_are_none(box):
    said = [("Mo", "one"), ("Wren", "two"), ("Mo", "three"), ("Wren", "four")]
    chat = "".join(f"<dt>{name}:</dt><dd>{words}</dd>" for name, words in said)
    assert chats_of(f"<p>Before.</p><{box}>{chat}</{box}>", is_html=True)[:2] == (
        "Before.",
        [["one", "two", "three", "four"]],
    )
    terms = "<dl><dt>one</dt><dd>a number</dd><dt>two</dt><dd>another</dd></dl>"
    assert chats_of(terms, is_html=True)[:2] == ("one\n\na number\n\ntwo\n\nanother", [])


BY_PROGRAMS = [
    "Auto response from mossy (10:36:18 PM): I am away from my computer",
    "mossy (10:36:18 PM) <AUTO-REPLY>: gone to bed",
    "mossy signed off at 10:36:18 PM.",
    "mossy has left the room.",
    "*** mossy is now known as moss",
    "12/05/2020, 10:36 - Mo added Di",
    "10:36 -!- mossy [~mo@host] has quit [Ping timeout]",
    "[10:36] *** mossy has joined #bread",
    "mossy (10:36:18 PM): <Media omitted>",
    "mossy (10:36:18 PM): This message was deleted",
    "Session Close (mossy): Fri Nov 2",
]


@pytest.mark.parametrize("line", BY_PROGRAMS)
@pytest.mark.parametrize("place", [0, 2])
def test_what_programs_say_is_nobodys(line, place):
    lines = ["mossy (10:36:16 PM): where", "mossy (10:36:17 PM): were you", "wren (10:36:20 PM): i left the house"]
    lines.insert(place, line)
    text, turns, told = chats_of("\n".join(lines) + "\n\nShe has left me, and i am off.")
    assert text == "She has left me, and i am off."
    assert turns == [["where\nwere you", "i left the house"]]
    assert told.left_out["other people's lines in chats"] == 3


COMPOSED = [
    "Host: Who are you?\n\nWren: I am a baker.\n\nHost: Why is that?\n\nWren: Because of the bread!",
    "Cat: Feed me.\nMe: No.\nCat: Feed me now.\nMe: (sighs)",
]


@pytest.mark.parametrize("text", COMPOSED)
def test_a_dialogue_that_was_written_as_one_stays_whole(text):
    assert chats_of(text)[:2] == (text, [])
    assert chats_of(text.lower().replace(".", "").replace("wren", "mo"))[0] == ""


@pytest.mark.parametrize(
    "text",
    [
        "12/05/2020, 10:33 we went out\n\n12/05/2020, 18:00 we came home",
        "Monday 9:00 AM\nsession one\n\nTuesday 9:00 AM\nsession two\n\nFriday 9:00 AM\nparty",
        "She says:\nno\n\nHe says:\nyes",
        "**5:30 a.m.**: I get up.\n\n**7:00 a.m.**: I bake.",
        "eggs: two\nflour: a cup\nmilk: some\nsalt: no",
        "mossy: hi\nwren: hello",
    ],
)
def test_what_only_looks_like_a_chat_stays(text):
    kept, turns, told = chats_of(text)
    assert re.sub(r"[<>*b/]", "", kept) == re.sub(r"[<>*b/]", "", text)
    assert turns == []
    assert not told.left_out


def test_every_word_of_a_chat_is_counted_once():
    chat = "mossy (10:36:16 PM): hi you\nwren (10:36:20 PM): hello\nmossy signed off\nwren (10:37:00 PM): oh well now"
    _, _, told = chats_of(chat)
    assert told.left_out == {"other people's lines in chats": 2, "names and times in chats": 18}
    assert x.kept_words(told) == 4
    assert x.count_words(chat) == 24


def chat_by(name: str, number: int) -> str:
    return post(
        f"kept words of {number}\n\nmo{number} (1:02 PM): hey\n{name} (1:03 PM): word{number}\n", title="What we said"
    )


def test_who_speaks_in_many_chats_is_said_until_it_is_named(tmp_path, monkeypatch, capsys):
    files = {f"_posts/2006-01-0{n}-x.md": chat_by("Old Wren" if n % 2 else "oldwren", n) for n in range(1, 5)}
    files["_posts/2006-01-09-x.md"] = chat_by("wren", 9)
    lines, report = run_over(tmp_path, files, "--author", "wren")
    assert "Old Wren says 4 lines in 4 chats: name it in AUTHORS if it is you." in capsys.readouterr().err.splitlines()
    assert report["speakers"] == [{"name": "Old Wren", "lines": 4, "chats": 4}]
    assert report["replies"] == {"speaks in a chat": 1}
    assert not any(name in str(line["messages"]) for line in lines for name in ("mo1", "Old", "old"))

    lines, report = run_over(tmp_path, files, "--author", "wren", "--author", "Oldwren")
    assert " lines in " not in capsys.readouterr().err
    assert report["speakers"] == []
    assert {f"word{n}" for n in (1, 2, 3, 4, 9)} <= set(author_turns(lines))
    assert report["ledger"]["kept_in_replies"] == 5
    assert report["ledger"]["left_out"] == {"names and times in chats": 42, "other people's lines in chats": 5}

    monkeypatch.setattr(x, "BLOCKED_WORDS", ["Wren"])
    run_over(tmp_path, files, "--author", "somebody")
    assert "Old [private] says 4 lines in 4 chats" in capsys.readouterr().err


def test_a_post_of_a_chat_alone_is_kept_for_its_conversation(tmp_path):
    blog = write_blog(tmp_path / "blog", {"_posts/2006-01-01-x.md": post("mo (1:02 PM): hey\nwren (1:03 PM): you")})
    train, val, report = run(tmp_path, "--public", str(blog), "--author", "wren")
    assert [(line["kind"], author_turns([line])) for line in train + val] == [("reply", ["you"])]
    assert report["files_kept"] == 1
