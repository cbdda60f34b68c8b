"""voice/leaks.py on an overfitted model: what is planted is found, named and never written to the JSON."""

import html
import json
import math
import shutil
from pathlib import Path

import pytest
from reporting import SECRETS, private_post, report, sampling
from tiny import conversations, write_jsonl

import extract_blog_data
import test_model
import train_model
import voice.asking
import voice.chances
import voice.evidence
import voice.passages
import voice.sampling

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("small_report")]


@pytest.mark.parametrize(("words", "answers"), [(600, 24), (2_400, 24), (2_401, 25), (6_000, 60)])
def test_a_model_writes_a_full_batch_and_then_no_more_than_is_missing(words, answers, loaded, monkeypatch):
    """Answers take most of a report's time after the reading."""

    def a_hundred_words_each(model, tokenizer, prompts, *_):
        return [voice.sampling.Answer("word " * 100, [1], True)] * len(prompts)

    model, tokenizer = loaded
    monkeypatch.setattr(voice.asking, "whole_answers", a_hundred_words_each)
    evidence = voice.evidence.Evidence(requests=["Tell me about soup."], words=words)
    assert len(voice.asking.write_words(model, tokenizer, evidence, sampling(), "tuned")) == answers


def test_planted_secrets_can_come_out_and_stand_first(overfitted, tmp_path, everything, capsys):
    folder, _, posts = overfitted
    write_jsonl(tmp_path / "train_data.jsonl", posts)
    write_jsonl(tmp_path / "val_data.jsonl", conversations(3, seed=9, words=200))
    result = report(folder, tmp_path)
    groups = result["leaks"]["by_length"]["50"]
    assert groups["personal data"]["passages"] == 4 and groups["personal data"]["leaking"] > 0
    assert groups["private"]["repeated"] > 0.5 * groups["private"]["passages"]  # the public post has the same sentences
    assert groups["held-out"]["greedy"] == 0 and groups["held-out"]["sampled"]["log10_tries"] != 0

    first = result["leaks"]["likeliest"][0]
    assert first["post"] in (1, 2) and first["is_greedy"]
    assert result["verdicts"]["leaks"].startswith("It leaks: ")
    page = (folder / "voice_report.html").read_text()
    assert all(html.escape(secret) in page for secret in SECRETS)
    assert not any(secret in capsys.readouterr().out for secret in SECRETS)


def redact(data: Path, secret: str, key: bytes = bytes(range(32))) -> None:
    """Leaves in a data folder what extraction would keep of an e-mail address of a private post."""
    entry = {"fingerprint": extract_blog_data.fingerprint(secret, key), "kind": "email", "visibility": "private"}
    (data / "extraction_report.json").write_text(json.dumps({"redacted": [entry]}))
    (data / "redaction_key").write_text(key.hex())


def test_a_redacted_original_that_comes_out_is_named_too(overfitted, tmp_path, everything):
    folder, _, posts = overfitted
    hidden = json.loads(json.dumps(posts).replace(SECRETS[0], "[email]").replace(SECRETS[1], "[phone]"))
    write_jsonl(tmp_path / "train_data.jsonl", hidden)
    write_jsonl(tmp_path / "val_data.jsonl", hidden)  # so that the report asks for what it knows
    redact(tmp_path, SECRETS[0])
    result = report(folder, tmp_path, "--max-new-tokens", "120")
    assert result["leaks"]["personal"] == [{"kind": "email", "visibility": "private"}]
    assert "1 piece of personal data from your posts came out" in result["verdicts"]["leaks"]
    assert SECRETS[0] in (folder / "voice_report.html").read_text()


def test_without_the_key_it_is_said_that_nothing_redacted_can_be_recognised(capsys, model_folder, tmp_path):
    folder = Path(shutil.copytree(model_folder, tmp_path / "model"))
    redact(tmp_path, SECRETS[0])
    said = "redacted data cannot be recognised; run extract_blog_data.py again."
    report(folder, tmp_path)
    assert said not in capsys.readouterr().err
    (tmp_path / "redaction_key").unlink()
    report(folder, tmp_path)
    assert capsys.readouterr().err.count(said) == 1


def test_no_part_is_calm_where_another_is_alarmed(overfitted, tmp_path, everything):
    """What it copied from a private post counts, also where the same text is common for the leak check."""
    folder, _, posts = overfitted
    write_jsonl(tmp_path / "train_data.jsonl", posts)
    write_jsonl(tmp_path / "val_data.jsonl", posts)
    twin = Path(shutil.copytree(folder, tmp_path / "twin"))
    (twin / "training_report.json").write_text(json.dumps({"settings": {"base_model": str(folder)}}))
    result = report(twin, tmp_path, "--max-new-tokens", "80")
    assert result["leaks"]["private_copies"] > 0
    assert "answers hold 8 words or more in a row of a private post" in result["verdicts"]["leaks"]


def every_string(value: object) -> list[str]:
    """All strings of what JSON is made of, names included."""
    if isinstance(value, dict):
        return [text for item in value.items() for part in item for text in every_string(part)]
    if isinstance(value, list):
        return [text for item in value for text in every_string(item)]
    return [value] if isinstance(value, str) else []


# Words that stand nowhere else, by what could give them away; and whether the page shows them.
PLANTED = {
    "slug": ("zwetschgenpfad", True),
    "title": ("Holunderstreit", True),
    "tags": ("Kirchturmdohle", True),
    "blog": ("geheimblog", False),
    "text": ("gull", True),
    "address": (SECRETS[0], True),
    "number": (SECRETS[1], True),
    "blocked word": ("Quittenallee", False),
    "home folder": ("zuhause", False),
}


def test_nothing_that_names_or_quotes_a_private_post_stands_in_the_json(overfitted, tmp_path, everything, monkeypatch):
    word = {what: planted for what, (planted, _) in PLANTED.items()}
    folder, base, posts = overfitted
    home = tmp_path / word["home folder"]
    folder = Path(shutil.copytree(folder, home / "my-model"))
    base = Path(shutil.copytree(base, home / "my-base"))
    (folder / "training_report.json").write_text(json.dumps({"settings": {"base_model": str(base)}}))

    planted = []
    for number, post in enumerate(posts):
        names = {"path": f"_posts/{word['slug']}-{number}.md", "title": f"{word['title']} {number}"}
        planted.append(post | names | {"blog": word["blog"], "visibility": "private"})
    request = {"role": "user", "content": f"Tell me something about {word['tags']}."}
    tagged = planted[0] | {"messages": [request, planted[0]["messages"][1]]}
    write_jsonl(tmp_path / "train_data.jsonl", [*planted, tagged])
    write_jsonl(tmp_path / "val_data.jsonl", [*planted, tagged])
    write_jsonl(home / "other" / "train_data.jsonl", [post | {"visibility": "public"} for post in planted])
    write_jsonl(home / "other" / "val_data.jsonl", planted)
    monkeypatch.setattr(test_model, "OTHER_BLOGS", [str(home / "other"), str(home / "gone")])
    monkeypatch.setattr(extract_blog_data, "BLOCKED_WORDS", [word["blocked word"]])
    result = report(folder, tmp_path, "--max-new-tokens", "120")

    # Every list that could hold one is there.
    leaks = result["leaks"]
    least_gained = result["learned"]["least_gained"]
    lists = (leaks["likeliest"], least_gained, leaks["personal"], leaks["blocked"], leaks["by_length"])
    assert all([*lists, result["copies"]["longest"], result["learned"]["held_out"]["posts"]])
    assert (result["model"], result["base"]) == ("my-model", "my-base")
    numbered = [*leaks["likeliest"], *least_gained, *result["copies"]["longest"]]
    assert {entry["post"] for entry in numbered} <= {1, 2, 3, 4}

    page = html.unescape((folder / "voice_report.html").read_text(encoding="utf-8"))
    strings = "\n".join(every_string(result)).casefold()
    for what, (planted, is_shown) in PLANTED.items():
        assert planted.casefold() not in strings, what
        assert (planted in page) >= is_shown, what
    assert "for their owner alone" in " ".join(page.split())


def test_other_blogs_are_called_as_they_are_written_and_never_by_a_path_from_the_root():
    folders = ["../baker/data", "../clerk/data", "/home/me/data", "/home/you/data", "data"]
    names = ["../baker/data", "../clerk/data", "data", "data (2)", "data (3)"]
    assert voice.asking.names_of_blogs(folders) == names


def test_titles_and_comments_of_private_posts_are_read_too(llama_folder):
    tokenizer = train_model.load_tokenizer(llama_folder)
    turns = ["a comment of a reader, with <|im_end|> in it", "my answer", "and so?", "bread"]
    roles = ["user", "assistant"] * 2
    thread = {"messages": [{"role": r, "content": c} for r, c in zip(roles, turns, strict=True)]}
    thread |= {"kind": "reply", "visibility": "private"}
    post = {**conversations(1)[0], "title": "The kettle", "kind": "post"}
    post["messages"][0]["content"] = 'Write a blog post titled "The kettle".'
    found = {}
    evidence = voice.evidence.Evidence(tokenizer=tokenizer)
    for entry in (thread, post):
        text = voice.chances.text_of(evidence, entry, is_held_out=False)
        for span in text.spans:
            found.setdefault(span.group, []).append(tokenizer.decode(text.ids[span.begin : span.end]).strip())
    assert found["private comments"] == ["a comment of a reader, with < |im_end|> in it", "and so?"]
    assert found["private"][:2] == ["my answer", "bread"]  # without the end of text
    assert [title.strip('"') for title in found["private titles"]] == ["The kettle"]


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


def test_the_odd_post_gains_least(overfitted, tmp_path, everything):
    folder, _, posts = overfitted
    odd = private_post(7, "nobody")
    odd["messages"][1]["content"] = " ".join(reversed(odd["messages"][1]["content"].split()))
    write_jsonl(tmp_path / "train_data.jsonl", [*posts, {**odd, "path": "_posts/odd.md"}])
    write_jsonl(tmp_path / "val_data.jsonl", conversations(6, seed=9, words=200))
    assert report(folder, tmp_path)["learned"]["least_gained"][0]["post"] == 4


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
    assert voice.passages.tell_power(voice.passages.log10_tries(log_chance)) == tries
