"""voice/word_index.py: the longest run of words that an answer shares with the author's posts."""

import pytest
from reporting import run
from tiny import write_jsonl

import test_model
import voice.sampling
import voice.word_index

pytestmark = pytest.mark.usefixtures("small_report")

POSTS = [
    {
        "messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": text}],
        "visibility": visibility,
        "title": title,
        "path": f"{title}.md",
    }
    for title, visibility, text in [
        ("Rolls", "public", "O rolls, o rolls, you forty-eight, you were on time and I was late. Out!"),
        ("Gulls", "private", "The gull says nothing to me. You were on time and I was early, the gull sez twice."),
    ]
]


@pytest.mark.parametrize(
    ("text", "words", "copy", "title"),
    [
        ("Well: YOU WERE ON TIME, and i was late... again", 8, "YOU WERE ON TIME, and i was late", "Rolls"),
        (
            "and so you were on time and I was early, the gull ate",
            10,
            "you were on time and I was early, the gull",
            "Gulls",
        ),
        ("you were on time and I was never", 7, "you were on time and I was", None),
        ("late out the gull", 2, "late out", None),
        ("late. Out! The gull says nothing", 4, "The gull says nothing", None),  # a run ends with its post
        ("zebra", 0, "", None),
        ("", 0, "", None),
    ],
)
def test_the_longest_run_is_found_and_from_eight_words_on_its_post(text, words, copy, title):
    found = voice.word_index.WordIndex(POSTS).longest_copy(text)
    assert (found.words, found.text, found.post and found.post["title"]) == (words, copy, title)


def test_copies_are_taken_out_or_marked_and_the_rest_is_kept():
    index = voice.word_index.WordIndex(POSTS)
    text = "Hm, you were on time and I was late. Out! New words; o rolls, o rolls, you forty-eight, you were. End"
    assert index.without_copies(text) == "Hm, ! New words; . End"
    assert index.split_at_copies(text) == [
        ("Hm, ", False),
        ("you were on time and I was late. Out", True),
        ("! New words; ", False),
        ("o rolls, o rolls, you forty-eight, you were", True),
        (". End", False),
    ]
    assert index.without_copies("nothing of it") == "nothing of it"


def test_a_letter_that_becomes_two_without_upper_case_moves_no_copy():
    """Casefolded, the Turkish I with a dot is an i and a sign that ends the word."""
    text = "İzmir ve İstanbul: " * 3 + "you were on time and I was early, the gull"
    index = voice.word_index.WordIndex(POSTS)
    copy = "you were on time and I was early, the gull"
    assert index.longest_copy(text).text == copy
    assert (copy, True) in index.split_at_copies(text)


def test_the_line_under_an_answer_names_the_post(model_folder, tmp_path, monkeypatch, capsys):
    write_jsonl(tmp_path / "train_data.jsonl", POSTS)
    copy = voice.sampling.Answer("you were on time and I was late", [1], True)
    monkeypatch.setattr(test_model, "stream", lambda *_: iter([(copy.text, copy)]))
    run(model_folder, tmp_path, "--prompt", "?")
    line = '[longest run of words from the training data: 8, from the public post "Rolls" Rolls.md]'
    assert line in capsys.readouterr().out
