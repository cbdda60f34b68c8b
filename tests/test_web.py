"""The page without its browser: what it answers, and what it says where Gradio is missing; see page_in_browser.py."""

import asyncio
import importlib.util
from pathlib import Path

import pytest
import torch
from tiny import make_model_folder
from transformers import AutoModelForCausalLM, AutoTokenizer

import test_model
import voice.web
from voice.conversation import new_chat
from voice.sampling import read_sampling
from voice.web import AGAIN, NoAnswer, Writer, column
from voice.word_index import WordIndex

TALK, WRITE, GO_ON = voice.web.MODES
POST = {"messages": [{"role": "assistant", "content": "o rolls, o rolls, you were on time and I was late"}]}
AS_IT_IS = dict.fromkeys(voice.web.DEFAULTS)


@pytest.fixture
def writer(tmp_path, monkeypatch) -> Writer:
    """It answers "one", "one two" and so on, and its base model the same, with "base" in front."""
    folder = make_model_folder(tmp_path / "model", "llama", True, intermediate_size=64, num_key_value_heads=1)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    settings, _ = test_model.parse_arguments(["--model-dir", str(folder), "--max-new-tokens", "40"])
    read_sampling(model.generation_config, tokenizer, settings)
    writer = Writer(settings, model, tokenizer, torch.Generator(), WordIndex([POST]), lambda: "base")
    writer.given = []

    def stream(asked, tokenizer, prompts, sampling, rng, begun, raw):
        writer.given.append((tokenizer.decode(prompts[0]), sampling))
        first = "base" if asked == "base" else tokenizer.decode(begun) or "one"
        return iter([(first, None), (" two", None)])

    monkeypatch.setattr(voice.web, "stream", stream)
    return writer


def shown_of(talk, whose: str = "tuned") -> list[str]:
    return [message["content"] for message in column(talk.history, whose)]


def answer(writer: Writer, talk, act: str, text: str = "", with_base: bool = False, **values) -> None:
    for _ in writer.respond(talk, act, text, with_base, AS_IT_IS | values):
        pass


ORIGIN = "\n\n[longest run of words from the training data: 0]"


def test_an_answer_grows_and_is_remembered_without_the_line_under_it(writer):
    talk = new_chat(writer.settings)
    steps = [shown_of(talk)[-1] for _ in writer.respond(talk, TALK, "hi", False, AS_IT_IS)]
    assert steps == ["one", "one two", f"one two{ORIGIN}"]
    answer(writer, talk, TALK, "so?")
    prompt, _ = writer.given[-1]
    assert "one two<|im_end|>" in prompt and "longest" not in prompt


def test_a_post_begins_anew_and_words_are_gone_on_from(writer):
    talk = new_chat(writer.settings)
    answer(writer, talk, TALK, "hi")
    answer(writer, talk, WRITE, "Bread")
    request = writer.settings.extraction.title_requests[0].format("Bread")
    assert shown_of(talk) == [request, f"one two{ORIGIN}"]
    answer(writer, talk, GO_ON, "the gull")
    answer(writer, talk, AGAIN)
    assert shown_of(talk) == [request, f"the gull two{ORIGIN}"]
    assert [prompt.endswith("assistant\nthe gull") for prompt, _ in writer.given] == [False, False, True, True]


def test_the_base_model_answers_the_same_and_is_not_remembered(writer):
    talk = new_chat(writer.settings)
    answer(writer, talk, TALK, "hi", with_base=True)
    assert shown_of(talk, "base") == ["hi", f"base two{ORIGIN}"]
    assert writer.given[0][0] == writer.given[1][0]
    answer(writer, talk, TALK, "so?")
    assert "base" not in writer.given[-1][0]


def test_without_a_base_model_the_answer_stays_and_it_is_said(writer):
    writer.find_base = lambda: None
    talk = new_chat(writer.settings)
    with pytest.raises(NoAnswer, match="base model cannot be loaded"):
        answer(writer, talk, TALK, "hi", with_base=True)
    assert shown_of(talk) == ["hi", f"one two{ORIGIN}"]


def test_an_answer_that_is_stopped_is_remembered_as_far_as_it_was_shown(writer):
    talk = new_chat(writer.settings)
    next(writer.respond(talk, TALK, "hi", False, AS_IT_IS))
    assert [turn["content"] for turn in talk.history] == ["hi", "one"]


def test_the_settings_of_the_page_count_for_their_answer_alone(writer):
    talk = new_chat(writer.settings)
    answer(writer, talk, TALK, "hi", temperature=0.3, max_new_tokens=7)
    answer(writer, talk, AGAIN)
    (_, changed), (_, usual) = writer.given
    assert (changed.temperature, changed.max_new_tokens) == (0.3, 7)
    assert (usual.temperature, usual.max_new_tokens) == (1.0, 40)


@pytest.mark.parametrize(
    ("act", "text", "values", "sentence"),
    [
        (AGAIN, "", {}, "There is nothing to answer yet."),
        (TALK, "", {}, "There is nothing to answer yet."),
        (TALK, "hi", {"top_p": 7}, "top_p must be None or a number above 0 and up to 1."),
        (TALK, "the kettle " * 300, {}, "That is longer than the 216 tokens there is room for."),
    ],
)
def test_what_cannot_be_answered_is_one_sentence_and_forgotten(act, text, values, sentence, writer):
    talk = new_chat(writer.settings)
    with pytest.raises(NoAnswer) as refused:
        answer(writer, talk, act, text, **values)
    assert (str(refused.value), talk.history) == (sentence, [])


def test_what_is_said_is_shown_as_text_and_never_as_html(writer):
    talk = new_chat(writer.settings)
    answer(writer, talk, TALK, "<img src=x> & so")
    assert shown_of(talk)[0] == "&lt;img src=x&gt; &amp; so"


def test_without_gradio_it_is_said_before_anything_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="^The page needs Gradio, which is not installed: run make page, then this"):
        test_model.main(["--page", "--model-dir", str(tmp_path)])


def test_gradio_is_asked_for_with_a_version_of_its_own():
    """It is no package of the three scripts."""
    root = Path(test_model.__file__).parent
    assert "gradio==" in (root / "voice" / "requirements.txt").read_text(encoding="utf-8")
    assert "gradio" not in (root / "requirements.txt").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("query", "cookie", "status"),
    [
        ("", "", 401),
        ("key=wrong", "key=wrong", 401),
        ("", "key=", 401),
        ("key=right", "", 303),
        ("", "a=b; key=right", 200),
    ],
)
def test_only_who_was_given_the_key_sees_the_page(query, cookie, status):
    sent = []

    async def page(scope, receive, send):
        await send({"status": 200})

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "path": "/", "query_string": query.encode(), "headers": [(b"cookie", cookie.encode())]}
    asyncio.run(voice.web.OnlyWithKey(page, "right")(scope, None, send))
    assert sent[0]["status"] == status
    assert ("right" in str(sent)) == (status == 303)
