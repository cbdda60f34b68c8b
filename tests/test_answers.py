"""How long answers are, where they end, and answers that begin with the user's own words."""

import json
import random
from pathlib import Path

import pytest
from tiny import conversations, make_model_folder, sentence, write_jsonl
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import extract_blog_data
import test_model
import train_model
import voice.asking
import voice.evidence
import voice.sampling
from voice.sampling import begun_tokens, prompt_tokens, whole_sentences


def sampling(**settings) -> GenerationConfig:
    usual = {"do_sample": False, "top_k": 0, "top_p": 1.0, "temperature": 1.0, "repetition_penalty": 1.0}
    return GenerationConfig(**{**usual, "max_new_tokens": 200, "eos_token_id": [0], **settings})


# ---------------------------------------------------------------------------- how long
@pytest.mark.parametrize(
    ("posts", "replies", "tokens"),
    [(range(1, 102), [], 91), ([9], [400], 9), ([], [400], 400)],
)
def test_an_answer_is_as_long_as_nine_of_ten_posts(posts, replies, tokens):
    kinds = ["post"] * len(posts) + ["reply"] * len(replies)
    tokenized = [([5] * (3 + length), [False] * 3 + [True] * length) for length in (*posts, *replies)]
    assert train_model.answer_length([{"kind": kind} for kind in kinds], tokenized) == tokens


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "setting", "longest"),
    [(60, "auto", None), (900, "auto", 192), (60, 7, 7)],  # 192 of 256 positions
)
def test_the_length_is_in_the_folder_and_leaves_room_for_the_request(
    words, setting, longest, gpt2_folder, tmp_path, monkeypatch, short_runs
):
    data = conversations(12, words=words)
    write_jsonl(tmp_path / "data" / "train_data.jsonl", data)
    write_jsonl(tmp_path / "data" / "val_data.jsonl", data[:2])
    monkeypatch.setattr(train_model, "SAMPLING", {**train_model.SAMPLING, "max_new_tokens": setting})
    folder = tmp_path / "model"
    flags = ["--data-dir", str(tmp_path / "data"), "--output-dir", str(folder), "--max-steps", "1"]
    train_model.main(["--base-model", str(gpt2_folder), "--learning-rate", "1e-4", *flags])

    tokenized = train_model.tokenize(AutoTokenizer.from_pretrained(folder), data)
    expected = longest or train_model.answer_length(data, tokenized)
    assert GenerationConfig.from_pretrained(folder).max_new_tokens == expected
    assert f"PARAMETER num_predict {min(expected, 128)}\n" in (folder / "Modelfile").read_text(encoding="utf-8")


@pytest.fixture
def folder(tmp_path) -> Path:
    """As train_model.py leaves it."""
    folder = make_model_folder(tmp_path / "model", "llama", True, intermediate_size=64, num_key_value_heads=1)
    sampling(do_sample=True, max_new_tokens=40, eos_token_id=[2]).save_pretrained(folder)
    return folder


def test_a_folder_without_a_length_is_said(folder, tmp_path, capsys):
    file = folder / "generation_config.json"
    settings = json.loads(file.read_text(encoding="utf-8"))
    del settings["max_new_tokens"]
    file.write_text(json.dumps(settings), encoding="utf-8")
    said = "generation_config.json gives no length: answers have 200 tokens at most."
    command = ["--model-dir", str(folder), "--data-dir", str(tmp_path), "--prompt", "hi"]
    test_model.main(command)
    assert capsys.readouterr().err.count(said) == 1
    test_model.main([*command, "--max-new-tokens", "5"])
    assert said not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "longest", "answers"), [(600, 200, 24), (600, 400, 12), (600, 1_500, 4), (6_000, 1_500, 12)]
)
def test_a_report_of_long_answers_begins_with_fewer(words, longest, answers, monkeypatch):
    monkeypatch.setattr(voice.asking, "request_tokens", lambda *_: [5])
    asked = []

    def enough(model, tokenizer, prompts, *_):
        asked.append(len(prompts))
        return [voice.sampling.Answer("word " * 1_000, [1], True)] * len(prompts)

    monkeypatch.setattr(voice.asking, "whole_answers", enough)
    evidence = voice.evidence.Evidence(requests=["Tell me about soup."], words=words)
    voice.asking.write_words(None, None, evidence, sampling(max_new_tokens=longest), "tuned")
    assert asked == [answers]


# ---------------------------------------------------------------------------- where they end
@pytest.mark.parametrize(
    ("text", "whole"),
    [
        ("One. Two! And a th", "One. Two!"),
        ("One. Two!", "One. Two!"),
        ('She said "go." And th', 'She said "go."'),
        ("It was *good.* And th", "It was *good.*"),
        ("About 3.5 of them. Or 4.2 th", "About 3.5 of them."),
        ("A title\n\nIt bega", "A title"),
        ("没有。还有！那", "没有。还有！"),
        ("no end at all", "no end at all"),
        ("", ""),
    ],
)
def test_a_text_up_to_its_last_whole_sentence(text, whole):
    assert whole_sentences(text) == whole


LONG = "The gull says nothing. The kettle sings at night! Bread and th"


@pytest.fixture
def writes(monkeypatch):
    """Lets the model write the given texts token by token; the last token is an end of text if it `ends`."""

    def arrange(tokenizer, text: str, ends: bool) -> GenerationConfig:
        ids = tokenizer.encode(text) + [tokenizer.eos_token_id] * ends
        steps = [[(0, token, place == len(ids))] for place, token in enumerate(ids, start=1)]
        monkeypatch.setattr(voice.sampling, "generate", lambda *_: iter(steps))
        return sampling(max_new_tokens=len(ids), eos_token_id=[tokenizer.eos_token_id])

    return arrange


@pytest.mark.parametrize(
    ("ends", "raw", "shown"),
    [(False, False, LONG.rpartition(" Bread")[0]), (True, False, LONG), (False, True, LONG)],
)
def test_an_answer_that_breaks_off_is_shown_to_its_last_whole_sentence(ends, raw, shown, folder, writes):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    settings = writes(tokenizer, LONG, ends)
    pieces = list(voice.sampling.stream(model, tokenizer, [[5]], settings, None, raw=raw))
    answer = pieces[-1][1]
    assert "".join(piece for piece, _ in pieces) == answer.text == shown
    assert len(answer.tokens) == settings.max_new_tokens  # what it wrote is all there


def test_only_the_last_tokens_of_the_longest_answer_wait_for_their_sentence(folder, writes):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    text = "the kettle sings at night. " * 30
    settings = writes(tokenizer, text, ends=True)
    pieces = [piece for piece, _ in voice.sampling.stream(model, tokenizer, [[5]], settings, None, raw=False)]
    at_once = len(pieces) - voice.sampling.HELD_BACK
    assert all(pieces[:at_once])
    assert sum(map(bool, pieces[at_once:])) < voice.sampling.HELD_BACK / 2
    assert "".join(pieces) == text.strip()


@pytest.mark.parametrize("flags", [[], ["--raw"]])
def test_the_command_shows_the_rest_only_if_asked(flags, folder, tmp_path, writes, monkeypatch, capsys):
    settings = writes(AutoTokenizer.from_pretrained(folder), LONG, ends=False)
    monkeypatch.setattr(test_model, "MAX_NEW_TOKENS", settings.max_new_tokens)
    test_model.main(["--model-dir", str(folder), "--data-dir", str(tmp_path), "--prompt", "hi", *flags])
    out, err = capsys.readouterr()
    assert ("Bread" in out) == bool(flags)
    assert ("stopped at a whole sentence" in err) == (not flags)


# ---------------------------------------------------------------------------- from the user's own words
@pytest.mark.parametrize("chatml", [True, False])
def test_words_to_begin_with_are_tokens_as_in_training(chatml, tmp_path):
    architecture = "llama" if chatml else "gpt2"
    tokenizer = train_model.load_tokenizer(str(make_model_folder(tmp_path, architecture, chatml)))
    request = [{"role": "user", "content": "hi"}]
    begun = begun_tokens(tokenizer, request, " the kettle sings ")
    answered = [*request, {"role": "assistant", "content": "the kettle sings at night"}]
    trained, _ = train_model.conversation_tokens(tokenizer, answered)
    given = prompt_tokens(tokenizer, request) + begun
    assert trained[: len(given)] == given
    assert tokenizer.decode(begun).strip() == "the kettle sings"


@pytest.mark.parametrize("request_flags", [[], ["--prompt", "so?"]])
def test_begin_goes_on_from_the_words_and_shows_them(request_flags, folder, tmp_path, monkeypatch, capsys):
    given = []
    generate = voice.sampling.generate

    def look(model, prompts, *more):
        given.extend(prompts)
        return generate(model, prompts, *more)

    monkeypatch.setattr(voice.sampling, "generate", look)
    words = "the kettle sings"
    flags = ["--model-dir", str(folder), "--data-dir", str(tmp_path), *request_flags]
    test_model.main([*flags, "--begin", words, "--max-new-tokens", "8", "--seed", "1"])
    asked, answer = capsys.readouterr().out.split("\n\n", 1)

    request = request_flags[1] if request_flags else extract_blog_data.GENERAL_REQUESTS[0]
    assert asked == f"> {request}"
    assert answer.startswith(words) and len(answer.strip()) > len(words)
    prompt = f"<|im_start|>user\n{request}<|im_end|>\n<|im_start|>assistant\n{words}"
    assert [AutoTokenizer.from_pretrained(folder).decode(ids) for ids in given] == [prompt]


@pytest.mark.parametrize("mode", ["--chat", "--quiz", "--report"])
def test_begin_with_another_mode_is_one_sentence(mode):
    with pytest.raises(SystemExit, match="--begin goes alone or with --prompt; in the chat it is /begin"):
        test_model.parse_arguments(["--begin", "the kettle", mode])


def test_words_that_leave_no_room_are_one_sentence(folder, tmp_path):
    words = sentence(random.Random(1), 400)
    with pytest.raises(SystemExit, match=r"The prompt has [\d,]+ tokens and the model has 256 positions"):
        test_model.main(["--model-dir", str(folder), "--data-dir", str(tmp_path), "--begin", words])
