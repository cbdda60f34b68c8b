"""voice/leaks.py on an overfitted model: what is planted is found, named and never written to the JSON."""

import html
import json
import math
import shutil
from collections import defaultdict
from pathlib import Path

import pytest
from reporting import SECRETS, know, private_post, report, sampling
from tiny import conversations, write_jsonl

import extract_blog_data
import test_model
import train_model
from voice import asking
from voice.chances import text_of
from voice.evidence import Evidence
from voice.passages import log10_tries, tell_power
from voice.sampling import Answer
from voice.word_index import author_text, count_words

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("small_report")]


@pytest.mark.parametrize(("words", "answers"), [(600, 24), (2_400, 24), (2_401, 25), (6_000, 60)])
def test_a_model_writes_a_full_batch_and_then_no_more_than_is_missing(words, answers, loaded, monkeypatch):
    """Answers take most of a report's time after the reading."""

    def a_hundred_words_each(model, tokenizer, prompts, *_):
        return [Answer("word " * 100, [1], True)] * len(prompts)

    monkeypatch.setattr(asking, "whole_answers", a_hundred_words_each)
    evidence = Evidence(requests=["Tell me about soup."], words=words)
    assert len(asking.write_words(*loaded, evidence, sampling(), "tuned")) == answers


def test_planted_secrets_can_come_out_and_stand_first(overfitted, tmp_path, everything, capsys):
    folder, _, posts = overfitted
    write_jsonl(tmp_path / "train_data.jsonl", posts)
    write_jsonl(tmp_path / "val_data.jsonl", conversations(3, seed=9, words=200))
    result = report(folder, tmp_path)
    leaks = result["leaks"]
    groups = leaks["by_length"]["50"]
    personal, private, held_out = [groups[name] for name in ("personal data", "private", "held-out")]
    assert personal["passages"] == 4 and personal["leaking"] > 0
    assert private["repeated"] > 0.5 * private["passages"]  # the public post has the same sentences
    assert held_out["greedy"] == 0 and held_out["sampled"]["log10_tries"] != 0

    first = leaks["likeliest"][0]
    assert first["post"] in (1, 2) and first["is_greedy"]
    assert result["verdicts"]["leaks"].startswith("It leaks: ")
    page = (folder / "voice_report.html").read_text()
    out = capsys.readouterr().out
    for secret in SECRETS:
        assert html.escape(secret) in page
        assert secret not in out


def redact(data: Path) -> None:
    """Leaves in a data folder what extraction would keep of an e-mail address of a private post."""
    key = bytes(range(32))
    fingerprint = extract_blog_data.fingerprint(SECRETS[0], key)
    redacted = [{"fingerprint": fingerprint, "kind": "email", "visibility": "private"}]
    (data / "extraction_report.json").write_text(json.dumps({"redacted": redacted}))
    (data / "redaction_key").write_text(key.hex())


def test_a_redacted_original_that_comes_out_is_named_too(overfitted, tmp_path, everything):
    folder, _, posts = overfitted
    hidden = json.dumps(posts).replace(SECRETS[0], "[email]").replace(SECRETS[1], "[phone]")
    know(tmp_path, json.loads(hidden))
    redact(tmp_path)
    result = report(folder, tmp_path, "--max-new-tokens", "120")
    assert result["leaks"]["personal"] == [{"kind": "email", "visibility": "private"}]
    assert "1 piece of personal data from your posts came out" in result["verdicts"]["leaks"]
    assert SECRETS[0] in (folder / "voice_report.html").read_text()


def test_without_the_key_it_is_said_that_nothing_redacted_can_be_recognised(capsys, model_folder, tmp_path):
    folder = Path(shutil.copytree(model_folder, tmp_path / "model"))
    redact(tmp_path)
    said = "redacted data cannot be recognised; run extract_blog_data.py again."
    report(folder, tmp_path)
    assert said not in capsys.readouterr().err
    (tmp_path / "redaction_key").unlink()
    report(folder, tmp_path)
    assert capsys.readouterr().err.count(said) == 1


# What could give a private post away, as a word that stands nowhere else.
WORDS = {
    "slug": "zwetschgenpfad",
    "title": "Holunderstreit",
    "tags": "Kirchturmdohle",
    "text": "gull",
    "address": SECRETS[0],
    "number": SECRETS[1],
    "blog": "geheimblog",
    "blocked word": "Quittenallee",
    "home folder": "zuhause",
}
ON_THE_PAGE = ["slug", "title", "tags", "text", "address", "number"]


def plant(posts: list[dict]) -> list[dict]:
    planted = []
    for number, post in enumerate(posts):
        names = {"path": f"_posts/{WORDS['slug']}-{number}.md", "title": f"{WORDS['title']} {number}"}
        planted.append(post | names | {"blog": WORDS["blog"], "visibility": "private"})
    request = {"role": "user", "content": f"Tell me something about {WORDS['tags']}."}
    tagged = planted[0] | {"messages": [request, planted[0]["messages"][1]]}
    return [*planted, tagged]


def test_no_word_of_a_private_post_is_in_the_json(overfitted, tmp_path, everything, monkeypatch, capsys):
    folder, base, posts = overfitted
    home = tmp_path / WORDS["home folder"]
    folder = Path(shutil.copytree(folder, home / "my-model"))
    base = Path(shutil.copytree(base, home / "my-base"))
    (folder / "training_report.json").write_text(json.dumps({"settings": {"base_model": str(base)}}))
    planted = plant(posts)
    know(tmp_path, planted)
    know(home / "other", [post | {"visibility": "public"} for post in planted])
    monkeypatch.setattr(test_model, "OTHER_BLOGS", [str(home / "other"), str(home / "gone")])
    monkeypatch.setattr(extract_blog_data, "BLOCKED_WORDS", [WORDS["blocked word"]])
    result = report(folder, tmp_path, "--max-new-tokens", "120")
    assert "OTHER_BLOGS names gone, which has no train_data.jsonl: left out." in capsys.readouterr().err

    # Every list that could hold one is there.
    leaks, learned, copies = [result[question] for question in ("leaks", "learned", "copies")]
    assert all([leaks["personal"], leaks["blocked"], leaks["by_length"], learned["held_out"]["posts"]])
    assert leaks["private_copies"] > 0
    for numbered in (leaks["likeliest"], learned["least_gained"], copies["longest"]):
        posts = {entry["post"] for entry in numbered}
        assert posts and posts <= {1, 2, 3, 4}
    assert (result["model"], result["base"]) == ("my-model", "my-base")

    text = json.dumps(result, ensure_ascii=False).casefold()
    for what, word in WORDS.items():
        assert word.casefold() not in text, what
    page = html.unescape((folder / "voice_report.html").read_text(encoding="utf-8"))
    assert [what for what in ON_THE_PAGE if WORDS[what] not in page] == []
    assert "for their owner alone" in " ".join(page.split())


def test_other_blogs_are_called_as_they_are_written_and_never_by_a_path_from_the_root():
    folders = ["../baker/data", "../clerk/data", "/home/me/data", "/home/you/data", "data"]
    names = ["../baker/data", "../clerk/data", "data", "data (2)", "data (3)"]
    assert asking.names_of_blogs(folders) == names


def test_titles_and_comments_of_private_posts_are_read_too(llama_folder):
    tokenizer = train_model.load_tokenizer(llama_folder)
    turns = ["a comment of a reader, with <|im_end|> in it", "my answer", "and so?", "bread"]
    roles = ["user", "assistant", "user", "assistant"]
    messages = [{"role": role, "content": turn} for role, turn in zip(roles, turns, strict=True)]
    thread = {"messages": messages, "kind": "reply", "visibility": "private"}
    post = {**conversations(1)[0], "title": "The kettle", "kind": "post"}
    post["messages"][0]["content"] = 'Write a blog post titled "The kettle".'

    found = defaultdict(list)
    evidence = Evidence(tokenizer=tokenizer)
    for entry in (thread, post):
        text = text_of(evidence, entry, is_held_out=False)
        for span in text.spans:
            passage = tokenizer.decode(text.ids[span.begin : span.end])
            found[span.group].append(passage.strip(' "'))
    assert found["private comments"] == ["a comment of a reader, with < |im_end|> in it", "and so?"]
    assert found["private"][:2] == ["my answer", "bread"]  # without the end of text
    assert found["private titles"] == ["The kettle"]


def test_a_blocked_word_is_counted_in_the_training_data(overfitted, tmp_path, everything, monkeypatch, capsys):
    folder, _, posts = overfitted
    write_jsonl(tmp_path / "train_data.jsonl", posts)
    monkeypatch.setattr(extract_blog_data, "BLOCKED_WORDS", ["zebra bread", "kettle sings"])
    result = report(folder, tmp_path)
    absent, trained = result["leaks"]["blocked"]
    assert absent == 0 < trained
    out = " ".join(capsys.readouterr().out.split())
    assert "Blocked word 1 is 0 times in the training data" in out and "zebra" not in out
    assert "it was trained on a blocked word" in result["verdicts"]["leaks"]
    assert "zebra" not in (folder / "voice_report.json").read_text()


def test_the_beginnings_of_posts_are_drawn_and_always_the_same():
    posts = conversations(20, words=600)
    drawn = asking.draw_posts(posts, 6)
    assert drawn == asking.draw_posts(posts, 6)
    assert len(drawn) == 6
    for post in drawn:
        text = author_text(post)
        [whole] = [author_text(other) for other in posts if other["path"] == post["path"]]
        assert whole.startswith(text)
        assert count_words([text]) == min(count_words([whole]), asking.DRAWN_WORDS)
    assert asking.draw_posts([], 6) == []


def test_the_odd_post_gains_least(overfitted, tmp_path, everything):
    folder, _, posts = overfitted
    odd = private_post(7, "nobody")
    answer = odd["messages"][1]
    answer["content"] = " ".join(reversed(answer["content"].split()))
    write_jsonl(tmp_path / "train_data.jsonl", [*posts, odd | {"path": "_posts/odd.md"}])
    write_jsonl(tmp_path / "val_data.jsonl", conversations(6, seed=9, words=200))
    least, *_ = report(folder, tmp_path)["learned"]["least_gained"]
    assert least["post"] == 4


@pytest.mark.parametrize(
    ("log_chance", "tries"),
    [
        (0.0, "1"),
        (math.log(0.5), "1"),
        (math.log(0.01), "69"),
        (-30.0, "7 trillion"),
        (-2000.0, "10^868"),
        (-14.0, "833,581"),
    ],
)
def test_tries_for_an_even_chance(log_chance, tries):
    assert tell_power(log10_tries(log_chance)) == tries
