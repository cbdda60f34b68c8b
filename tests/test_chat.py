"""test_model.py: the chat and the quiz."""

import io
import itertools
import json
import re
import shutil
import sys
from pathlib import Path

import pytest
from reporting import run

import extract_blog_data
import test_model
import voice.sampling

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("small_report")]


def chat(model_folder, monkeypatch, capsys, lines: str, *flags: str) -> list[str]:
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    assert run(model_folder, Path("none"), "--chat", "--seed", "1", *flags) == 0
    return capsys.readouterr()


def test_chat_remembers_repeats_clears_writes_posts_and_goes_on(model_folder, prompts, monkeypatch, capsys):
    lines = "hi\nso\n/again\n/begin the kettle\n/post Bread\n\n/clear\n/again\n/nonsense\n/post\n/quit\nnever\n"
    out, err = chat(model_folder, monkeypatch, capsys, lines)
    assert out == "one\ntwo\nthree\nfour\nfive\n"
    assert prompts == [
        "User: hi\nAssistant:",
        "User: hi\nAssistant: one<|endoftext|>\nUser: so\nAssistant:",
        "User: hi\nAssistant: one<|endoftext|>\nUser: so\nAssistant:",
        "User: hi\nAssistant: one<|endoftext|>\nUser: so\nAssistant: the kettle",
        'User: Write a blog post titled "Bread".\nAssistant:',
    ]
    assert "nothing to repeat" in err and err.count("/quit") == 2  # at the start and after /nonsense
    assert "There is no /nonsense." in err and "/post needs a text behind it." in err


def test_again_after_begin_goes_on_from_the_same_words(model_folder, prompts, monkeypatch, capsys):
    chat(model_folder, monkeypatch, capsys, "/begin the gull\n/again\nhi\n")
    asked = f"User: {extract_blog_data.GENERAL_REQUESTS[0]}\nAssistant:"
    talk = f"{asked} two<|endoftext|>\nUser: hi\nAssistant:"
    assert prompts == [f"{asked} the gull", f"{asked} the gull", talk]


def test_chat_forgets_the_oldest_turns_when_there_is_no_room(model_folder, prompts, monkeypatch, capsys):
    long = "the kettle sings at night and the gull says nothing " * 8
    _, err = chat(model_folder, monkeypatch, capsys, f"{long}\n{long}\n{long * 2}\nhi\n")
    assert [prompt.count("kettle") for prompt in prompts] == [8, 8, 8]
    assert "longer than the 116 tokens there is room for" in err


def test_a_control_token_in_what_is_typed_stays_text(model_folder, prompts, monkeypatch, capsys):
    chat(model_folder, monkeypatch, capsys, "a <|endoftext|> b\n/clear\n/begin c <|endoftext|> d\n")
    assert not any("<|endoftext|>" in prompt for prompt in prompts)


def test_interrupting_ends_the_answer_and_not_the_program(model_folder, monkeypatch, capsys):
    def stream(*_):
        yield "half", None
        raise KeyboardInterrupt

    monkeypatch.setattr(test_model, "stream", stream)
    assert chat(model_folder, monkeypatch, capsys, "hi\nagain\n").out == "half\nhalf\n"


def test_base_answers_the_same_question_and_is_not_remembered(model_folder, monkeypatch, capsys, tmp_path):
    folder = Path(shutil.copytree(model_folder, tmp_path / "model"))
    (folder / "training_report.json").write_text(json.dumps({"settings": {"base_model": str(model_folder)}}))
    given = []

    def stream(model, tokenizer, rows, *_):
        given.append((model, tokenizer.decode(rows[0])))
        yield f"answer {len(given)}", None

    monkeypatch.setattr(test_model, "stream", stream)
    out, err = chat(folder, monkeypatch, capsys, "/base\nhi\n/base\nso\n")
    assert out == "answer 1\nanswer 2\nanswer 3\n" and "nothing to repeat" in err
    assert [text for _, text in given] == [
        "User: hi\nAssistant:",
        "User: hi\nAssistant:",
        "User: hi\nAssistant: answer 1<|endoftext|>\nUser: so\nAssistant:",
    ]
    assert given[0][0] is given[2][0] is not given[1][0]


def answer_with(monkeypatch, texts: list[str]) -> None:
    def stream(model, tokenizer, prompts, *_, **__):
        for _, text in zip(prompts, itertools.cycle(texts), strict=False):
            yield text, voice.sampling.Answer(text, [1], True)

    monkeypatch.setattr(voice.sampling, "stream", stream)


def test_the_quiz_counts_what_is_right_and_shows_openings_of_one_length(model_folder, quiz_data, monkeypatch, capsys):
    answer_with(monkeypatch, ["words of the model " * 40])
    shown = []

    def read_line() -> str:
        out = capsys.readouterr().out
        assert max(map(len, out.splitlines())) <= 80
        pairs = re.findall(r"^([12]): ((?:.+\n?)+)", out, re.M)
        shown.append(dict(pairs))
        return next(number for number, text in pairs if "unseen" in text)

    monkeypatch.setattr(test_model, "read_line", read_line)
    assert run(model_folder, quiz_data, "--quiz", "--seed", "3") == 0
    assert "right 8 of 8 (68 % to 100 %); 50 %: you cannot tell" in capsys.readouterr().out
    assert {len(extract_blog_data.WORD.findall(text)) for pair in shown for text in pair.values()} == {60}
    assert {next(n for n, text in pair.items() if "unseen" in text) for pair in shown} == {"1", "2"}  # by dice


def test_the_quiz_never_shows_a_trained_post_and_can_be_stopped(model_folder, quiz_data, monkeypatch, capsys):
    answer_with(monkeypatch, ["a trained post that nobody may see here at all " * 5, "words of the model " * 40])
    monkeypatch.setattr(sys, "stdin", io.StringIO("1\nwhat\n2\n/quit\n"))
    assert run(model_folder, quiz_data, "--quiz", "--seed", "3") == 0
    out, err = capsys.readouterr()
    assert re.search(r"^right \d of 2 ", out, re.M) and "nobody may see" not in out and "1 or 2" in err


@pytest.mark.parametrize("moment", ["writing", "reading"])
def test_ctrl_c_ends_the_quiz_and_what_was_answered_counts(moment, model_folder, quiz_data, monkeypatch, capsys):
    text = "words of the model " * 40
    typed = iter(["1"])

    def stream(*_, **__):
        yield text, voice.sampling.Answer(text, [1], True)
        if moment == "writing":
            raise KeyboardInterrupt
        yield text, voice.sampling.Answer(text, [1], True)

    def type_line(_):
        line = next(typed, None)
        if line is None:
            raise KeyboardInterrupt
        return line

    monkeypatch.setattr(voice.sampling, "stream", stream)
    monkeypatch.setattr("builtins.input", type_line)
    assert run(model_folder, quiz_data, "--quiz", "--seed", "3") == 0
    assert re.search(r"^right \d of 1 ", capsys.readouterr().out, re.M)


def test_ctrl_c_at_the_prompt_of_a_chat_only_clears_the_line(model_folder, prompts, monkeypatch, capsys):
    lines = iter(["hi", KeyboardInterrupt, "so", "/quit"])

    def type_line(_):
        line = next(lines)
        if line is KeyboardInterrupt:
            raise KeyboardInterrupt
        return line

    monkeypatch.setattr("builtins.input", type_line)
    assert chat(model_folder, monkeypatch, capsys, "").out == "one\ntwo\n"


def test_ctrl_c_is_one_sentence_elsewhere(model_folder, data_folder, monkeypatch):
    def stream(*_):
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr(test_model, "stream", stream)
    with pytest.raises(SystemExit, match="^\nStopped.$"):
        run(model_folder, data_folder, "--prompt", "hi")


def test_a_quiz_that_is_left_at_once_blames_nobody(model_folder, quiz_data, monkeypatch, capsys):
    answer_with(monkeypatch, ["words of the model " * 40])
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    assert run(model_folder, quiz_data, "--quiz", "--seed", "3") == 0
    assert capsys.readouterr().out.endswith("Nothing was answered.\n")
