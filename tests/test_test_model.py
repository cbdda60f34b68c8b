"""test_model.py: what it writes, how it talks, where words come from, what leaks, and the report as a whole."""

import dataclasses
import errno
import html
import io
import itertools
import json
import math
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import conversations, make_model_folder, write_jsonl
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import extract_blog_data
import test_model
import train_model
import voice.asking
import voice.chances
import voice.copies
import voice.evidence
import voice.leaks
import voice.learned
import voice.loading
import voice.reader
import voice.report
import voice.sampling
import voice.word_index
from voice.settings import ROWS, Settings

SCRIPT = Path(test_model.__file__)
torch.set_num_threads(1)  # models this small only wait for each other's threads
SECRETS = ["wren@example.org", "+1 555 867 5309"]


def tuned(folder: Path, **generation) -> Path:
    """Makes of a bare model folder one as train_model.py leaves it."""
    train_model.load_tokenizer(str(folder)).save_pretrained(folder)
    settings = {"do_sample": True, "temperature": 0.8, "top_p": 0.95, "max_new_tokens": 12} | generation
    GenerationConfig(**settings, eos_token_id=AutoTokenizer.from_pretrained(folder).eos_token_id).save_pretrained(
        folder
    )
    return folder


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> Path:
    """GPT-2's shape: positions learned, and only 128 of them."""
    folder = tmp_path_factory.mktemp("tuned")
    return tuned(make_model_folder(folder, "gpt2", chatml=False, max_position_embeddings=128))


@pytest.fixture(scope="module")
def loaded(model_folder):
    return voice.loading.load_tuned(model_folder)


@pytest.fixture(autouse=True)
def small_and_exact(monkeypatch):
    monkeypatch.setattr(test_model, "PRECISION", "fp32")
    monkeypatch.setattr(test_model, "REPORT_SIZE", 0.05)


def settings_with(folder: Path = Path("none"), **values) -> Settings:
    """Settings as they come, but for `values`, for a model in `folder`."""
    settings, _ = test_model.parse_arguments(["--model-dir", str(folder)])
    return dataclasses.replace(settings, **values)


def run(model: Path, data: Path, *flags: str) -> int:
    return test_model.main(["--model-dir", str(model), "--data-dir", str(data), *flags])


def sampling(**settings) -> GenerationConfig:
    usual = {"do_sample": True, "temperature": 1.0, "top_k": 50, "top_p": 1.0, "repetition_penalty": 1.0}
    return GenerationConfig(**{**usual, "max_new_tokens": 12, "eos_token_id": [0], **settings})


# ---------------------------------------------------------------------------- sampling
def test_each_prompt_is_answered_and_the_words_traced(model_folder, data_folder, capsys):
    assert run(model_folder, data_folder, "--seed", "1") == 0
    out, err = capsys.readouterr()
    assert [line[2:] for line in out.splitlines() if line.startswith("> ")] == test_model.PROMPTS
    assert len(re.findall(r"^\[longest run of words from the training data: \d+", out, re.M)) == len(test_model.PROMPTS)
    assert re.search(r"^\d of 6 answers ended by themselves; \d+ tokens, [\d.]+ a second\.$", err, re.M)


def test_the_seed_makes_the_answers_repeatable(model_folder, data_folder, capsys):
    texts = []
    for seed in ("1", "1", "2"):
        run(model_folder, data_folder, "--prompt", "the kettle", "--seed", seed, "--max-new-tokens", "40")
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "mamba", "jamba"])  # Mamba keeps no cache of tokens
def test_a_batch_answers_as_each_prompt_alone_and_as_transformers_does(architecture, tmp_path):
    sizes = {"intermediate_size": 64, "num_key_value_heads": 1} if architecture in ("llama", "jamba") else {}
    if architecture == "jamba":
        sizes |= {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2, "use_mamba_kernels": False}
    model = AutoModelForCausalLM.from_pretrained(make_model_folder(tmp_path, architecture, False, **sizes)).eval()
    greedy = sampling(do_sample=False, repetition_penalty=1.3, eos_token_id=[7])
    prompts, together = [[5, 6], list(range(20, 60)), [30]], {0: [], 1: [], 2: []}
    for step in voice.sampling.generate(model, prompts, greedy, None):
        for row, token, _ in step:
            together[row].append(token)
    for row, prompt in enumerate(prompts):
        alone = [step[0][1] for step in voice.sampling.generate(model, [prompt], greedy, None)]
        settings = {
            "max_new_tokens": 12,
            "do_sample": False,
            "repetition_penalty": 1.3,
            "eos_token_id": 7,
            "pad_token_id": 0,
        }
        expected = model.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), **settings)
        assert together[row] == alone == expected[0, len(prompt) :].tolist()


def test_prompt_and_answer_never_outgrow_the_positions(loaded):
    model, _ = loaded
    prompts = [[5] * 120, [6] * 10, [7] * 127]
    steps = list(
        voice.sampling.generate(model, prompts, sampling(max_new_tokens=500, eos_token_id=[]), torch.Generator())
    )
    lengths = [sum(row == number for step in steps for row, *_ in step) for number in range(3)]
    assert lengths == [8, 118, 1]


def test_top_p_and_top_k_leave_only_likely_tokens_and_a_penalty_drops_seen_ones():
    logits = torch.tensor([[3.0, 2.0, 1.0, -9.0]]).repeat(200, 1)
    dice, seen = torch.Generator().manual_seed(0), torch.zeros(200, 4, dtype=torch.bool)
    drawn = {
        name: set(voice.sampling.sample_next_token(logits, seen, sampling(**settings), dice).tolist())
        for name, settings in {"p": {"top_p": 0.7}, "k": {"top_k": 1}, "all": {"temperature": 9.0}}.items()
    }
    assert drawn == {"p": {0, 1}, "k": {0}, "all": {0, 1, 2, 3}}
    seen[:, 0] = True
    penalised = sampling(do_sample=False, repetition_penalty=2.0, eos_token_id=[3])
    assert set(voice.sampling.sample_next_token(logits, seen, penalised, dice).tolist()) == {1}


def test_top_p_of_1_keeps_the_whole_vocabulary():
    """In float32 the sum over 50,000 tokens reaches 1 before the last of them."""
    logits = 3 * torch.randn(4, 50_000, generator=torch.Generator().manual_seed(0))
    seen = torch.zeros(4, 50_000, dtype=torch.bool)
    _, chances = voice.sampling.next_token_chances(logits, seen, sampling(top_k=0))
    assert chances.shape == (4, 50_000) and (chances > 0).all()


def test_settings_go_before_the_file_and_the_file_before_the_usual(loaded):
    _, tokenizer = loaded
    file = GenerationConfig(do_sample=True, temperature=0.7, max_new_tokens=33, eos_token_id=[3, 4])
    read = voice.sampling.read_sampling(file, tokenizer, settings_with())
    assert (read.temperature, read.top_p, read.max_new_tokens, read.eos_token_id) == (0.7, 1.0, 33, [3, 4])
    read = voice.sampling.read_sampling(file, tokenizer, settings_with(temperature=0.2, max_new_tokens=5))
    assert (read.temperature, read.max_new_tokens, read.do_sample) == (0.2, 5, True)
    assert not voice.sampling.read_sampling(file, tokenizer, settings_with(temperature=0)).do_sample


def test_pieces_make_up_the_answers_and_any_end_token_counts(loaded):
    model, tokenizer = loaded
    settings = sampling(max_new_tokens=30, eos_token_id=list(range(0, 400, 9)))
    pieces, answers = [""], []
    for piece, answer in voice.sampling.stream(
        model, tokenizer, [[5, 6], [7], [9, 9]], settings, torch.Generator().manual_seed(3)
    ):
        pieces[-1] += piece
        if answer:
            answers.append(answer)
            pieces.append("")
    assert pieces[:-1] == [answer.text for answer in answers] and len(answers) == 3
    assert all(answer.ended == (answer.tokens[-1] % 9 == 0) for answer in answers) and any(a.ended for a in answers)


# ---------------------------------------------------------------------------- where words come from
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


# ---------------------------------------------------------------------------- chat
def chat(model_folder, monkeypatch, capsys, lines: str, *flags: str) -> list[str]:
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    assert run(model_folder, Path("none"), "--chat", "--seed", "1", *flags) == 0
    return capsys.readouterr()


@pytest.fixture
def prompts(loaded, monkeypatch) -> list[str]:
    """What the model is given, as text; it answers "one", "two" and so on."""
    _, tokenizer = loaded
    given, words = [], iter(["one", "two", "three", "four", "five"])

    def stream(model, tokenizer, rows, *_):
        given.append(tokenizer.decode(rows[0]))
        yield next(words), None

    monkeypatch.setattr(test_model, "stream", stream)
    return given


def test_chat_remembers_repeats_clears_writes_posts_and_goes_on(model_folder, prompts, monkeypatch, capsys):
    lines = "hi\nso\n/again\n/begin the kettle\n/post Bread\n\n/clear\n/again\n/nonsense\n/quit\nnever\n"
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


def test_chat_works_from_a_pipe_without_prompts_in_its_output(model_folder):
    command = [sys.executable, str(SCRIPT), "--model-dir", str(model_folder), "--chat", "--seed", "1"]
    done = subprocess.run(command, input="hello\n/quit\n", capture_output=True, text=True, timeout=100)
    assert (done.returncode, "> " in done.stdout) == (0, False) and done.stdout.strip()


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


# ---------------------------------------------------------------------------- quiz
@pytest.fixture
def quiz_data(tmp_path) -> Path:
    def post(number: int, text: str) -> dict:
        entry = conversations(1, seed=number)[0]
        return entry | {"messages": [entry["messages"][0], {"role": "assistant", "content": text}]}

    write_jsonl(tmp_path / "train_data.jsonl", [post(0, "a trained post that nobody may see here at all, " * 5)])
    own = [
        post(number, f"an unseen post of mine, number {number}, about " + "bread and kettles " * 30)
        for number in range(8)
    ]
    write_jsonl(tmp_path / "val_data.jsonl", [*own, post(9, "short")])
    return tmp_path


def answer_with(monkeypatch, texts: list[str]) -> None:
    def stream(model, tokenizer, prompts, sampling, dice):
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

    def stream(*_):
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


def test_a_quiz_without_unseen_posts_says_what_it_takes(model_folder, tmp_path, capsys):
    assert run(model_folder, tmp_path, "--quiz") == 0
    assert "held-out posts" in capsys.readouterr().out


# ---------------------------------------------------------------------------- leaks
def private_post(number: int, secret: str) -> dict:
    start = conversations(1, seed=number, words=3)[0]
    words = f"{number} the gull says nothing to me at night and the kettle sings bread " * 4
    text = f"{words}. Write to {secret}. And the night is nothing to the gull, " * 2
    turns = [
        start["messages"][0] | {"content": f"Write a post about {number}."},
        {"role": "assistant", "content": text},
    ]
    return start | {"messages": turns, "visibility": "private" if number < 2 else "public", "title": f"secret {number}"}


@pytest.fixture(scope="module")
def overfitted(tmp_path_factory) -> tuple[Path, Path, list[dict]]:
    """(tuned, base, posts): a model that knows its posts by heart, and the same model untrained."""
    sizes = {"intermediate_size": 128, "num_key_value_heads": 2, "hidden_size": 64, "max_position_embeddings": 512}
    base = tuned(make_model_folder(tmp_path_factory.mktemp("base"), "llama", True, **sizes), temperature=0.05)
    folder = Path(shutil.copytree(base, tmp_path_factory.mktemp("overfitted") / "model"))
    posts = [private_post(number, secret) for number, secret in enumerate([*SECRETS, "nobody"])]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    rows = train_model.make_rows(
        [train_model.conversation_tokens(tokenizer, post["messages"]) for post in posts], 512, 0, False
    )
    for _ in range(120):
        for row in rows:
            ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
            model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    (folder / "training_report.json").write_text(json.dumps({"settings": {"base_model": str(base)}}))
    return folder, base, posts


def report(model: Path, data: Path, *flags: str) -> dict:
    assert run(model, data, "--report", *flags) == 0
    return json.loads((model / "voice_report.json").read_text())


@pytest.fixture
def everything(monkeypatch):
    monkeypatch.setattr(test_model, "REPORT_SIZE", 0.1)


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
    assert groups["private"]["public"] > 0.5 * groups["private"]["passages"]  # the public post has the same sentences
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
    assert "1 of your e-mail addresses" in result["verdicts"]["leaks"]
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
    assert "answers hold 8 words and more of a private post" in result["verdicts"]["leaks"]


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
    assert "a blocked word is in the training data" in result["verdicts"]["leaks"]
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
    assert voice.leaks.tell_power(voice.leaks.log10_tries(log_chance)) == tries


# ---------------------------------------------------------------------------- report
def test_an_overfitted_model_is_seen_to_copy(overfitted, tmp_path):
    folder, _, posts = overfitted
    write_jsonl(tmp_path / "train_data.jsonl", posts)
    write_jsonl(tmp_path / "val_data.jsonl", posts)  # so that the report's prompts are those it knows
    result = report(folder, tmp_path, "--max-new-tokens", "80")
    assert result["copies"]["tuned"]["share"] > 0.8 > 0.1 > result["copies"]["base"]["share"]
    longest = result["copies"]["longest"][0]
    assert longest["words"] > 30 and longest["post"] in (1, 2, 3)
    learned = result["learned"]["held_out"]
    assert learned["tuned"] < learned["base"] and learned["interval"][0] > 0
    assert "It learned" in result["verdicts"]["learned"]
    assert "<mark>" in (folder / "voice_report.html").read_text()


def test_the_held_out_figure_is_the_one_that_training_reported(model_folder, data_folder, tmp_path):
    folder = Path(shutil.copytree(model_folder, tmp_path / "model"))
    (folder / "training_report.json").write_text(json.dumps({"settings": {"base_model": str(model_folder)}}))
    result = report(folder, data_folder)
    learned = result["learned"]["held_out"]
    model, tokenizer = voice.loading.load_tuned(folder)
    posts = train_model.read_conversations(data_folder / "val_data.jsonl")
    tokenized = [train_model.conversation_tokens(tokenizer, post["messages"]) for post in posts]
    nats = train_model.conversation_losses(model, train_model.make_rows(tokenized, 128, 64)).sum()
    bits = nats / torch.tensor(2.0).log().item() / train_model.author_bytes(posts)
    assert learned["tuned"] == learned["base"] == pytest.approx(bits, rel=1e-5)
    assert "No gain" in result["verdicts"]["learned"]


def test_a_folder_of_other_blogs_without_data_is_left_out_in_a_sentence(
    model_folder, data_folder, tmp_path, monkeypatch, capsys
):
    folder = Path(shutil.copytree(model_folder, tmp_path / "model"))
    monkeypatch.setattr(test_model, "OTHER_BLOGS", [str(tmp_path / "empty")])
    report(folder, data_folder)
    assert "OTHER_BLOGS names empty, which has no train_data.jsonl: left out." in capsys.readouterr().err


@pytest.mark.parametrize("base", ["", "no/such-model"])
def test_without_the_base_model_the_rest_is_reported_and_it_is_said(base, model_folder, data_folder, tmp_path, capsys):
    folder = Path(shutil.copytree(model_folder, tmp_path / "model"))
    (folder / "training_report.json").write_text(json.dumps({"settings": {"base_model": base}}))
    result = report(folder, data_folder)
    out, err = capsys.readouterr()
    assert "base model" in err and "kipping comparisons" in err
    assert result["leaks"]["by_length"]["12"]["private"]["common"] == 0  # nothing is known to be common
    assert all("Not measured" in result["verdicts"][part] for part in ("learned", "reader", "habits"))
    assert result["copies"]["tuned"] and not re.search(r"^ +base model ", out, re.M)
    assert re.search(r"^  tuned model +[\d.]+ bits/byte$", out, re.M)  # what it can say alone


def test_without_data_the_report_says_which_parts_it_cannot_give(model_folder, tmp_path, capsys):
    folder = Path(shutil.copytree(model_folder, tmp_path / "model"))
    result = report(folder, tmp_path / "nothing")
    assert [key for key, verdict in result["verdicts"].items() if "Not measured" in verdict] == [
        question.key for question in voice.report.QUESTIONS
    ]
    assert capsys.readouterr().out.count("Not measured") == len(voice.report.QUESTIONS)
    assert "What's on your mind today?" in html.unescape((folder / "voice_report.html").read_text())


def test_the_printed_report_fits_a_terminal_and_cuts_nothing(overfitted, tmp_path, everything, capsys):
    folder, _, posts = overfitted
    write_jsonl(tmp_path / "train_data.jsonl", posts)
    write_jsonl(tmp_path / "val_data.jsonl", posts)
    result = report(folder, tmp_path)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    flat = " ".join(" ".join(lines).split())
    assert all(" ".join(verdict.split()) in flat for verdict in result["verdicts"].values())
    assert all(f"A long copy, {copy['words']} words" in flat for copy in result["copies"]["longest"])


def test_a_row_that_is_too_wide_goes_on_in_further_lines():
    phrase = "donaudampfschifffahrtsgesellschaft rechtsschutzversicherungsgesellschaften und"
    rows = [(phrase, "12", "3", "0"), ("so", "9", "1", "0")]
    lines = voice.report.table_lines(voice.evidence.Section("", rows, ("", "you", "tuned", "base")))
    assert max(map(len, lines)) <= 80
    assert all(word in " ".join(lines) for word in phrase.split()) and lines[1].endswith("12      3     0")
    assert lines[-1].split() == ["so", "9", "1", "0"]
    assert voice.report.table_lines(voice.evidence.Section("", [], ("", "you", "tuned"))) == ["    you  tuned"]


def test_quick_is_a_tenth_of_the_size(model_folder, data_folder, tmp_path, monkeypatch):
    folder = Path(shutil.copytree(model_folder, tmp_path / "model"))
    monkeypatch.setattr(test_model, "REPORT_SIZE", 0.5)
    assert report(folder, data_folder, "--quick")["size"] == 0.05


def test_a_model_of_adapters_is_reported_on_in_the_precision_it_was_trained_in(
    llama_folder, data_folder, tmp_path, monkeypatch
):
    """Both models in half the memory, and with the very losses of the training run."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    monkeypatch.setattr(test_model, "PRECISION", None)
    for name, value in {"PRECISION": "bf16", "LORA_RANK": 4, "CONTEXT_TOKENS": 64, "OVERLAP_TOKENS": 8}.items():
        monkeypatch.setattr(train_model, name, value)
    folder = tmp_path / "model"
    flags = ["--base-model", str(llama_folder), "--data-dir", str(data_folder), "--output-dir", str(folder)]
    assert train_model.main([*flags, "--max-steps", "3", "--learning-rate", "1e-2"]) == 0

    held = []
    losses_of = voice.asking.losses_of

    def watched(model, *arguments):
        held.append({weight.dtype for weight in model.parameters() if weight.dim() > 1})
        return losses_of(model, *arguments)

    monkeypatch.setattr(voice.asking, "losses_of", watched)
    measured = report(folder, data_folder, "--quick")["learned"]["held_out"]
    assert held == [{torch.bfloat16}, {torch.bfloat16}]
    trained = json.loads((folder / "training_report.json").read_text())
    for model, evaluation in (("tuned", trained["best"]), ("base", trained["base"])):
        assert measured[model] == pytest.approx(evaluation["eval_bits_per_byte"], abs=1e-3)


def test_the_report_is_its_owners_alone_and_replaces_the_old_one(model_folder, data_folder, tmp_path):
    folder = Path(shutil.copytree(model_folder, tmp_path / "model"))
    for name in ("voice_report.json", "voice_report.html"):
        (folder / name).write_text("old")
        (folder / name).chmod(0o644)
        os.link(folder / name, tmp_path / name)
    report(folder, data_folder)
    for name in ("voice_report.json", "voice_report.html"):
        assert stat.S_IMODE((folder / name).stat().st_mode) == 0o600
        assert (tmp_path / name).read_text() == "old"  # replaced, not written over
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("umask", [0, 0o077, 0o777])
@pytest.mark.parametrize("leftover", ["none", "file", "link"])
def test_a_file_is_its_owners_alone_whatever_the_umask_and_whatever_a_killed_run_left(umask, leftover, tmp_path):
    path = tmp_path / "voice_report.json"
    beside = tmp_path / ".voice_report.json.unfinished"
    mine = tmp_path / "mine"
    mine.write_text("mine")
    if leftover == "file":
        beside.write_text("half of it")
        beside.chmod(0o666)
    if leftover == "link":
        beside.symlink_to(mine)

    usual = os.umask(umask)
    try:
        voice.report.replace_file(path, "half a character: \udce9")
    finally:
        os.umask(usual)
    assert path.read_text() == "half a character: ?" and stat.S_IMODE(path.stat().st_mode) == 0o600
    assert mine.read_text() == "mine" and not beside.exists() and not path.is_symlink()


@pytest.mark.parametrize(
    "lost", [["voice_report.json"], ["voice_report.html"], ["voice_report.json", "voice_report.html"]]
)
def test_a_report_that_cannot_be_written_is_printed_and_the_other_file_is_written(
    lost, model_folder, data_folder, tmp_path, capsys
):
    folder = Path(shutil.copytree(model_folder, tmp_path / "model"))
    for name in lost:
        (folder / name).mkdir()
    with pytest.raises(SystemExit) as stop:
        run(folder, data_folder, "--report")

    out, err = capsys.readouterr()
    assert all(question.question in out for question in voice.report.QUESTIONS)
    assert stop.value.code.startswith("Cannot write ") and "\n" not in stop.value.code
    said, _, measuring = err.partition("tuned model: ")  # the first thing that is measured
    for name in ("voice_report.json", "voice_report.html"):
        sentence = f"{folder / name} cannot be written (Is a directory); the report will be printed.\n"
        assert (sentence in said) == (f"{folder / name} (Is a directory)" in stop.value.code) == (name in lost)
        assert (folder / name).is_file() != (name in lost)
    assert measuring and ".unfinished" not in err + stop.value.code
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


def test_a_full_disk_is_seen_before_and_the_sentence_names_the_file_itself(tmp_path, monkeypatch):
    def fsync(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fsync)
    (tmp_path / "voice_report.json").write_text("old")
    assert voice.report.why_unwritable(tmp_path / "voice_report.json") == "No space left on device"
    failures = voice.report.write_report(crafted_report(), tmp_path)
    names = ("voice_report.json", "voice_report.html")
    assert failures == [f"{tmp_path / name} (No space left on device)" for name in names]
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("voice_report.json", "old")]


def test_losses_that_are_no_numbers_are_null_in_the_json():
    learned = voice.learned.Learned(math.nan)
    assert json.loads(crafted_report(learned=learned).as_json())["learned"]["tuned"] is None


@pytest.mark.parametrize("too_large", [False, True])
def test_a_model_that_float16_cannot_hold_is_asked_in_float32(
    too_large, model_folder, data_folder, tmp_path, monkeypatch, capsys
):
    """As Gemma 3 on an RTX 20xx: in float16 it would answer nothing, and nobody would know why."""
    folder = Path(shutil.copytree(model_folder, tmp_path / "model"))
    if too_large:
        model = AutoModelForCausalLM.from_pretrained(folder)
        model.get_input_embeddings().weight.data.mul_(1e6)  # the first norm takes that back
        model.save_pretrained(folder)

    monkeypatch.setattr(train_model, "pick_precision", lambda *_: "fp16")
    asked = []
    answer_prompts = test_model.answer_prompts

    def watched(model, *given) -> None:
        asked.append(model.dtype)
        answer_prompts(model, *given)

    monkeypatch.setattr(test_model, "answer_prompts", watched)
    run(folder, data_folder, "--prompt", "hi", "--max-new-tokens", "3")
    assert asked == [torch.float32 if too_large else torch.float16]
    assert ("overflows float16; generating in float32" in capsys.readouterr().err) == too_large


class Reader(HTMLParser):
    """The page's tags and text; anything that would run or be fetched is remembered."""

    def __init__(self):
        super().__init__()
        self.tags, self.text, self.active = set(), "", []
        self.pictures, self.order = [], []  # what stands for them, and the answers on top and pictures in their order
        self.folded = ""  # the text that is closed until somebody opens it
        self.is_folded = False

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        given = dict(attributes)
        is_picture = tag == "img" and given.get("src", "").startswith("data:image/png;base64,")
        is_within = tag == "a" and given.get("href", "").startswith("#")
        is_harmless = is_picture or is_within
        if (
            tag in {"script", "link", "iframe"}
            or given.keys() & {"src", "href", "onclick", "onerror"}
            and not is_harmless
        ):
            self.active.append(tag)
        if tag in {"dt", "img"}:
            self.order.append(tag)
        if tag == "img":
            self.pictures.append(given.get("alt", ""))
        if tag == "details":
            self.is_folded = True

    def handle_endtag(self, tag):
        if tag == "details":
            self.is_folded = False

    def handle_data(self, data):
        self.text += data
        if self.is_folded:
            self.folded += data


def test_the_page_is_self_contained_and_every_text_in_it_is_escaped(overfitted, tmp_path):
    evil = "<img src=x onerror=alert(1)>&<script>"
    folder, base, posts = overfitted
    folder = Path(shutil.copytree(folder, tmp_path / "<b>model"))
    posts = [post | {"title": evil} for post in posts]
    posts[0]["messages"][0]["content"] = evil
    (folder / "training_report.json").write_text(json.dumps({"settings": {"base_model": str(base)}}))
    log = [{"step": 0, "eval_loss": 3.0}, {"step": 1, "loss": 2.5}, {"step": 2, "loss": 2.0}]
    train_model.draw_curve([*log, {"step": 2, "eval_loss": 2.0}], folder / "loss_curve.png")
    for split in ("train", "val"):
        write_jsonl(tmp_path / f"{split}_data.jsonl", posts)
    report(folder, tmp_path)
    page = Reader()
    page.feed((folder / "voice_report.html").read_text(encoding="utf-8"))
    assert page.active == [] and {"img", "table", "meter", "mark", "blockquote"} <= page.tags
    assert evil in page.text and "<b>model" in page.text


def reader_with(**each: float) -> voice.reader.Reader:
    shares = [voice.reader.ReaderShare(share, (share - 0.1, share), 9) for share in (0.9, 0.5, 0.2, 0.05)]
    return voice.reader.Reader(*shares, each, 200, 0.1, "ann", "")


def test_everybody_has_a_row_in_the_picture_of_the_reader():
    axes = voice.reader.draw(reader_with(ann=0.3, bob=0.7)).axes[0]
    dots = {line.get_label(): list(line.get_xdata()) for line in axes.lines}
    rows = [label.get_text() for label in axes.get_yticklabels()]
    assert rows == list(dots) == ["other bloggers", "the base model", "the tuned model", "you"]
    assert list(dots.values()) == [[0.3, 0.7], [0.2], [0.5], [0.9]]


def crafted_report(**numbers) -> voice.report.Report:
    """A report of these numbers, by key of their question; the others are not measured."""
    report = voice.report.Report("model", "base", 42, 1.0)
    for question in voice.report.QUESTIONS:

        def measure(_, key=question.key):
            if key not in numbers:
                raise voice.evidence.NotMeasured("it is not asked here")
            return numbers[key]

        report.add(question._replace(measure=measure), voice.evidence.Evidence())
    return report


def crafted_leaks(**fields) -> voice.leaks.Leaks:
    own = voice.leaks.Chance(4.0, 0.0)
    counts = {"common": 0, "public": 0, "greedy": 0, "leaking": 0}
    group = voice.leaks.LeakGroup(passages=9, sampled=own, bound=own, contrasted=own, **counts)
    by_length = {str(length): {"private": group} for length in voice.leaks.LENGTHS}
    nothing = {"likeliest": [], "private_copies": 0, "personal": [], "blocked": []}
    leaking = dict.fromkeys(by_length, 0)
    return voice.leaks.Leaks(by_length, leaking, 512, **{**nothing, **fields})


def test_the_page_fits_phones_the_dark_and_paper(tmp_path):
    page = voice.report.make_page(crafted_report(reader=reader_with(ann=0.3), leaks=crafted_leaks()), tmp_path / "none")
    assert '<meta name="viewport" content="width=device-width' in page
    assert "color-scheme: light dark" in page and "(prefers-color-scheme: dark)" in page and "@media print" in page
    # A wide table scrolls by itself; without that the whole page would.
    assert page.count("<table>") == page.count('<div class="table"><table>') == 2
    assert re.search(r"\.table { overflow-x: auto", page)


def test_the_four_answers_stand_before_the_first_picture_and_pictures_can_be_read_out(tmp_path):
    curve = tmp_path / "loss_curve.png"
    train_model.draw_curve([{"step": 0, "eval_loss": 3.0}, {"step": 1, "loss": 2.5}], curve)
    report = crafted_report(reader=reader_with(ann=0.3), leaks=crafted_leaks(private_copies=2))
    page = Reader()
    page.feed(voice.report.make_page(report, curve))
    assert page.order == ["dt", "dt", "dt", "dt", "img", "img"]
    top = page.text[: page.text.index("A range is")]
    for question in ("Did it learn?", "Is it you?", "Does it copy?", "Does it leak?"):
        assert question in top
    assert "it leaks" in top and "2 of its answers hold 8 words and more of a private post" in top
    assert (
        "not measured" in top
        and "of the tuned model's text to you" in page.pictures[0]
        and "Loss over" in page.pictures[1]
    )


def test_private_words_are_marked_and_closed_until_somebody_opens_them(tmp_path):
    chance = voice.leaks.Chance(4.0, 0.0)
    names = {"path": "a.md", "title": "the keys", "text": "under the third pot"}
    passage = voice.leaks.LikelyPassage("private", 1, 1, 12, 9.0, False, chance, chance, chance, **names)
    came_out = voice.leaks.PersonalData("phone", "private", "+1 555 867 5309")
    odd = voice.learned.PostMark(2, "private", 0.01, "b.md", "the quiet one")
    copy = voice.copies.LongCopy(9, "private", 3, "c.md", "the letter", "nine words of a letter to nobody at all")
    share = voice.copies.CopyShare(1, 5_000, 1 / 5_000)
    report = crafted_report(
        leaks=crafted_leaks(likeliest=[passage], personal=[came_out]),
        learned=voice.learned.Learned(2.0, voice.learned.Gain(2.5, 2.0, 0.5, (0.4, 0.6), []), [odd]),
        copies=voice.copies.Copies(share, None, [copy]),
    )
    text = voice.report.make_page(report, tmp_path / "none")
    page = Reader()
    page.feed(text)
    for words in ("under the third pot", "+1 555 867 5309", "the quiet one", "nine words of a letter"):
        assert page.text.count(words) == page.folded.count(words) == 1
    assert page.folded.count("private\n") == 4 and 'class="private"' in text
    assert "Less than 0.1 % of its 8-word sequences" in report.as_text()
    # What the page shows is said in the terminal, and not on the page itself.
    assert "voice_report.html" in report.as_text() and "voice_report.html" not in page.text


def test_an_answer_that_was_cut_off_is_seen_to_be():
    said = [voice.sampling.Answer("it ended", [1], True), voice.sampling.Answer("it went on and", [1], False)]
    evidence = voice.evidence.Evidence(requests=["one?", "two?"], tuned=voice.evidence.ModelRun(answers=said))
    texts = {request: "".join(text for text, _ in pieces) for request, pieces in voice.report.sample_answers(evidence)}
    assert texts == {"one?": "it ended", "two?": "it went on and ..."}


def test_no_line_ends_between_a_figure_and_its_percent_sign():
    for length in range(70, 81):
        lines = voice.report.wrap("x" * length + " 50 % of them")
        assert " ".join(lines) == "x" * length + " 50 % of them" and not any(line.startswith("%") for line in lines)


# ---------------------------------------------------------------------------- errors
def broken(kind: str, model_folder: Path, place: Path) -> Path:
    folder = Path(shutil.copytree(model_folder, place / "model"))
    if kind == "no model":
        shutil.rmtree(folder)
    if kind == "no weights":
        (folder / "model.safetensors").unlink()
    if kind == "cut weights":
        (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:5000])
    if kind == "pickled weights":
        weights = AutoModelForCausalLM.from_pretrained(folder).state_dict()
        torch.save(weights, folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
    if kind == "no template":
        (folder / "chat_template.jinja").unlink()
    if kind == "no tokenizer":
        for path in folder.glob("tokenizer*"):
            path.unlink()
    return folder


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        ("no model", "There is no model in .*: run train_model.py first"),
        ("no weights", "is incomplete .*: run train_model.py again"),
        ("cut weights", "is incomplete .*: run train_model.py again"),
        ("pickled weights", "is incomplete .*: run train_model.py again"),
        ("no tokenizer", "is incomplete .*: run train_model.py again"),
        ("no template", "has no chat template.: run train_model.py again"),
    ],
)
def test_a_model_that_cannot_be_used_is_one_sentence(kind, sentence, model_folder, tmp_path):
    with pytest.raises(SystemExit) as stop:
        run(broken(kind, model_folder, tmp_path), tmp_path)
    assert re.search(sentence, stop.value.code) and "\n" not in stop.value.code


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--prompt", " "], "argument --prompt: ' ' must be a sentence"),
        (["--prompt", "kettle " * 300], r"The prompt has \d+ tokens and the model has 128"),
        (["--nonsense"], "unrecognized arguments: --nonsense"),
        (["--rep"], "unrecognized arguments: --rep"),
        (["--chat", "--report"], "not allowed with"),
        (["--prompt", "caf\udce9"], "must be a sentence in quotation marks, in UTF-8"),  # as a shell hands over Latin-1
        (["--max-new-tokens", "0"], "argument --max-new-tokens: '0' must be None or a whole number from 1 to"),
        (["--max-new-tokens", "9" * 5_000], "must be None or a whole number from 1 to 1,000,000"),
        (["--seed", "1e30"], "argument --seed: '1e30' must be None or a whole number from 0 to 4,294,967,295"),
        (["--seed", "-1"], "must be None or a whole number from 0"),
        (["--seed", str(2**32)], "must be None or a whole number from 0"),
        (["--seed", "nan"], "must be None or a whole number from 0"),
    ],
)
def test_a_wrong_command_is_one_sentence(flags, sentence, model_folder, data_folder):
    with pytest.raises(SystemExit) as stop:
        run(model_folder, data_folder, *flags)
    assert re.search(sentence, stop.value.code) and "\n" not in stop.value.code


def test_without_data_samples_still_come_and_it_is_said(model_folder, tmp_path, capsys):
    assert run(model_folder, tmp_path, "--prompt", "hi") == 0
    out, err = capsys.readouterr()
    assert "> hi" in out and "longest run" not in out and "No training data" in err


def test_as_a_command_an_error_is_one_line_and_status_1(tmp_path):
    command = [sys.executable, str(SCRIPT), "--model-dir", str(tmp_path / "none")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)


# ---------------------------------------------------------------------------- settings, checked
@pytest.mark.parametrize(
    ("name", "wrong", "form"),
    [
        ("MODEL_DIR", [3, None, ["a"], "", b"model"], "must be the name of a folder"),
        ("DATA_DIR", [3, None, ["a"], " "], "must be the name of a folder"),
        ("PROMPTS", ["hi", [], [""], ["hi", 3], [" "], None, {"hi"}, ["\udce9"]], "must be "),
        ("MAX_NEW_TOKENS", [0, -1, 1.5, "200", True, 10**9], "must be None or a whole number from 1 to 1,000,000"),
        ("TEMPERATURE", [-0.1, math.nan, math.inf, "hot", True, [1], 101], "must be None or a number from 0 to 100"),
        ("TOP_P", [0, -1, 1.01, 2, math.nan, "0.9"], "must be None or a number above 0 and up to 1"),
        ("TOP_K", [-5, 1.5, "50", math.nan], "must be None or a whole number from 0 "),
        ("REPETITION_PENALTY", [0, -1, math.inf, math.nan, "1.1"], "must be None or a number from 0.1 to 10"),
        ("SEED", [-1, 2**32, 1e30, "42"], "must be None or a whole number from 0 to 4,294,967,295"),
        ("PRECISION", ["bfloat16", 16, ""], 'must be None or "auto", "bf16", "fp16" or "fp32"'),
        ("REPORT_SIZE", [0, -1, math.nan, "1", None, 1e9], "must be a number above 0 and up to 100"),
        ("BASE_MODEL", [None, 3, ["base"]], "must be a text"),
        ("NOT_STRANGERS", ["kevquirk", [3], None], "must be a"),
        ("OTHER_BLOGS", ["../other/data", [""], [None], None], "must be "),
    ],
)
def test_a_setting_of_the_wrong_kind_or_range_is_one_sentence_with_the_right_form(name, wrong, form, monkeypatch):
    for value in wrong:
        monkeypatch.setattr(test_model, name, value)
        with pytest.raises(SystemExit) as stop:
            test_model.main([])
        assert f"{name} in test_model.py " in stop.value.code and "\n" not in stop.value.code
        assert form in stop.value.code


def test_every_setting_is_checked_and_the_ones_that_come_along_are_right():
    block = SCRIPT.read_text(encoding="utf-8").partition("-- settings\n")[2].partition("-- command line\n")[0]
    assert list(ROWS) == re.findall(r"^([A-Z_]+) = ", block, re.M)
    test_model.parse_arguments([])


# ---------------------------------------------------------------------------- odd JSON
NO_OBJECTS = ["", "{", "[]", "3", "null", "NaN", '"text"', "[" * 100_000, '{"a": ' * 100_000]
ODD_HISTORIES = [
    {"settings": [], "plan": 3, "log": {}},
    {"settings": "x", "plan": "x", "log": "x"},
    {"settings": {"base_model": 3}, "plan": {"precision": [], "lora_rank": 0}},
    {"settings": {"context_tokens": "512", "overlap_tokens": None}, "plan": {"precision": "fp64"}, "log": [3]},
    {"settings": {"context_tokens": 0, "overlap_tokens": 0}},
    {"settings": {"context_tokens": 32, "overlap_tokens": 32}},
    {"settings": {"context_tokens": True, "overlap_tokens": -1}},
]


@pytest.mark.parametrize("text", [*NO_OBJECTS, *map(json.dumps, ODD_HISTORIES)])
def test_an_odd_training_report_counts_as_none(text, tmp_path):
    (tmp_path / "training_report.json").write_text(text, encoding="utf-8")
    settings = settings_with(tmp_path, precision=None)
    assert voice.loading.held_in(tmp_path, "bf16") == "fp32" and voice.loading.base_name(settings) == ""
    assert voice.loading.wanted_precision(settings) == "auto"
    assert voice.asking.window_of_training(voice.loading.run_settings(tmp_path), 1024) == (512, 32)


@pytest.mark.parametrize(
    ("recipe", "positions", "windows"),
    [
        ({"context_tokens": 64, "overlap_tokens": 8}, 128, (64, 8)),
        ({"context_tokens": 512, "overlap_tokens": 32}, 128, (128, 32)),
        ({"context_tokens": 512, "overlap_tokens": 32}, 16, (16, 8)),  # or no window would get on
        ({"context_tokens": 64, "overlap_tokens": 0}, 128, (64, 1)),
    ],
)
def test_windows_are_those_of_training_where_they_can_be_read(recipe, positions, windows):
    assert voice.asking.window_of_training(recipe, positions) == windows


def test_a_report_over_odd_files_is_made_all_the_same(model_folder, data_folder, tmp_path):
    folder = Path(shutil.copytree(model_folder, tmp_path / "model"))
    data = Path(shutil.copytree(data_folder, tmp_path / "data"))
    (folder / "training_report.json").write_text(json.dumps(ODD_HISTORIES[0]))
    (data / "extraction_report.json").write_text(json.dumps({"redacted": {}}))
    assert report(folder, data)["learned"]["tuned"] > 0


@pytest.mark.parametrize("redacted", [*NO_OBJECTS, "{}", '{"redacted": {}}', '{"redacted": [3, null, []]}'])
def test_an_odd_extraction_report_has_redacted_nothing(redacted, tmp_path):
    (tmp_path / "extraction_report.json").write_text(redacted, encoding="utf-8")
    assert voice.asking.read_blog(tmp_path).redacted == []


def test_a_pipe_in_the_place_of_a_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "training_report.json")
    assert voice.loading.run_settings(tmp_path) == {}


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        *[(text, "holds no settings: run train_model.py again, or correct the file.") for text in NO_OBJECTS],
        ({"temperature": -1}, "temperature in .* must be None or a number from 0 "),
        ({"temperature": "hot"}, "temperature in .* must be None or a number from 0 "),
        ({"temperature": math.nan}, "temperature in .* must be None or a number from 0 "),
        ({"top_k": -5}, "top_k in .* must be None or a whole number from 0 "),
        ({"top_k": "50"}, "top_k in .* must be None or a whole number from 0 "),
        ({"top_p": 0}, "top_p in .* must be None or a number above 0 and up to 1"),
        ({"top_p": 2}, "top_p in .* must be None or a number above 0 and up to 1"),
        ({"repetition_penalty": 0}, "repetition_penalty in .* must be None or a number from 0.1 to 10"),
        ({"max_new_tokens": 0}, "max_new_tokens in .* must be None or a whole number from 1"),
        ({"max_new_tokens": "x"}, "max_new_tokens in .* must be None or a whole number from 1"),
        ({"eos_token_id": "x"}, "eos_token_id in .* must be a token id or a list of them"),
        ({"eos_token_id": [1, None]}, "eos_token_id in .* must be a token id"),
        ({"eos_token_id": -1}, "eos_token_id in .* must be a token id"),
        ({"cache_implementation": 7}, "transformers cannot use .*: run train_model.py again, or correct the file"),
        ({"watermarking_config": 3}, "transformers cannot use .*: run train_model.py again, or correct the file"),
        ({"pad_token_id": "x"}, "transformers cannot use .*: run train_model.py again, or correct the file"),
    ],
)
def test_odd_settings_of_the_model_are_one_sentence_that_names_the_file(content, sentence, model_folder, tmp_path):
    folder = Path(shutil.copytree(model_folder, tmp_path / "model"))
    file = folder / "generation_config.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    with pytest.raises(SystemExit) as stop:
        run(folder, tmp_path, "--prompt", "hi")
    assert re.search(sentence, stop.value.code) and str(file) in stop.value.code and "\n" not in stop.value.code


@pytest.mark.parametrize("temperature", [0, 0.0, 1e-300, 1e-40])
def test_a_temperature_of_0_takes_the_likeliest_token_wherever_it_stands(
    temperature, model_folder, tmp_path, monkeypatch, capsys
):
    folder = Path(shutil.copytree(model_folder, tmp_path / "model"))
    file = folder / "generation_config.json"
    settings = json.loads(file.read_text())
    file.write_text(json.dumps(settings | {"do_sample": False}))
    run(folder, tmp_path, "--prompt", "the kettle")
    likeliest = capsys.readouterr().out
    file.write_text(json.dumps(settings | {"temperature": temperature}))
    run(folder, tmp_path, "--prompt", "the kettle")
    assert capsys.readouterr().out == likeliest
    monkeypatch.setattr(test_model, "TEMPERATURE", temperature)
    run(model_folder, tmp_path, "--prompt", "the kettle")
    assert capsys.readouterr().out == likeliest


@pytest.mark.parametrize(("ends", "listed"), [(None, []), ([], []), (3, [3]), ([3, 4], [3, 4])])
def test_the_end_tokens_are_a_list_also_where_there_is_none(ends, listed):
    tokenizer = SimpleNamespace(eos_token_id=None)
    read = voice.sampling.read_sampling(GenerationConfig(eos_token_id=ends), tokenizer, settings_with())
    assert read.eos_token_id == listed


# ---------------------------------------------------------------------------- weights, device, precision
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_no_numbers_are_one_sentence_and_no_base_model(
    value, model_folder, data_folder, tmp_path, capsys
):
    folder = Path(shutil.copytree(model_folder, tmp_path / "model"))
    base = Path(shutil.copytree(model_folder, tmp_path / "base"))
    model = AutoModelForCausalLM.from_pretrained(base)
    model.get_input_embeddings().weight.data[7, 7] = value
    model.save_pretrained(base)
    with pytest.raises(SystemExit, match="holds NaN or infinite weights in .*: run train_model.py again"):
        run(base, data_folder, "--prompt", "hi")
    (folder / "training_report.json").write_text(json.dumps({"settings": {"base_model": str(base)}}))
    assert report(folder, data_folder)["learned"]["held_out"] is None
    assert "holds NaN or infinite weights in " in capsys.readouterr().err


@pytest.mark.parametrize("is_wanted", [False, True])
def test_the_device_is_chosen_once_by_the_flag(is_wanted, model_folder, tmp_path, monkeypatch):
    """On a machine with a card; the run itself is left out."""
    given = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(train_model, "check_card", lambda cpu_wanted: given.append(cpu_wanted))
    monkeypatch.setattr(train_model, "prepare_card", lambda device: given.append(device.type))
    monkeypatch.setattr(test_model, "run", lambda settings, args, device: given.append(device.type))
    run(model_folder, tmp_path, *["--cpu"] * is_wanted)
    device = "cpu" if is_wanted else "cuda"
    assert given == [is_wanted, device, device]


def test_it_writes_in_the_precision_of_the_setting_then_of_the_folder(tmp_path):
    assert voice.loading.wanted_precision(settings_with(tmp_path, precision=None)) == "auto"
    (tmp_path / "training_report.json").write_text(json.dumps({"plan": {"precision": "bf16"}}))
    assert voice.loading.wanted_precision(settings_with(tmp_path, precision=None)) == "bf16"
    assert voice.loading.wanted_precision(settings_with(tmp_path, precision="fp32")) == "fp32"


# ---------------------------------------------------------------------------- streams and signals
@pytest.mark.parametrize("stdin", [None, "closed", "ends", "write only"])
def test_a_stdin_that_gives_nothing_is_the_end_of_the_input(stdin, model_folder, tmp_path, monkeypatch, capsys):
    streams = {"closed": io.StringIO(), "ends": io.StringIO(), "write only": (tmp_path / "file").open("w")}
    streams["closed"].close()
    monkeypatch.setattr(sys, "stdin", streams.get(stdin))
    assert run(model_folder, tmp_path, "--chat") == 0
    assert run(model_folder, tmp_path, "--quiz") == 0
    assert "Nothing to ask" in capsys.readouterr().out


def test_a_folder_that_cannot_be_looked_into_is_one_sentence(model_folder, tmp_path):
    with pytest.raises(SystemExit, match="^Cannot use .*: File name too long; solve that and run it again.$"):
        run(model_folder, tmp_path / ("a" * 300), "--prompt", "hi")


NOWHERE = "Cannot print on stdout{}: send it elsewhere and run it again."


def full() -> io.TextIOWrapper:
    return Path("/dev/full").open("w", encoding="utf-8")


def pipe_that_nobody_reads() -> io.TextIOWrapper:
    out, into = os.pipe()
    os.close(out)
    return os.fdopen(into, "w")


def closed() -> None:
    """What Python has for a stream that is closed when it begins."""


@pytest.mark.parametrize("flags", [["--prompt", "hi", "--max-new-tokens", "3"]])
@pytest.mark.parametrize(
    ("stdout", "code"),
    [
        (full, NOWHERE.format(" (No space left on device)")),
        (closed, NOWHERE.format(", which is closed")),
        (pipe_that_nobody_reads, 1),  # as of `| head`, who has read enough
    ],
)
def test_a_stdout_that_takes_nothing_ends_in_a_sentence(stdout, code, flags, model_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["test_model.py", "--model-dir", str(model_folder), "--data-dir", "none", *flags])
    monkeypatch.setattr(sys, "stderr", sys.stderr)  # so that it comes back
    monkeypatch.setattr(sys, "stdin", None)
    monkeypatch.setattr(sys, "stdout", stdout())
    with pytest.raises(SystemExit) as stop:
        test_model.as_command()
    assert stop.value.code == code
    if sys.stdout is not None:
        sys.stdout.close()  # nothing is left in it that would fail once more


@pytest.mark.parametrize("mode", ["--chat", "--quiz"])
def test_bytes_that_are_no_text_are_replaced_in_what_is_typed(mode, model_folder, quiz_data, monkeypatch, capsys):
    typed = io.BytesIO(b"caf\xe9\n/begin \xff\n1\n/post \xc3\n")
    folders = ["--model-dir", str(model_folder), "--data-dir", str(quiz_data)]
    monkeypatch.setattr(sys, "argv", ["test_model.py", *folders, mode, "--max-new-tokens", "60"])
    monkeypatch.setattr(sys, "stderr", sys.stderr)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(typed, encoding="utf-8"))
    with pytest.raises(SystemExit) as stop:
        test_model.as_command()
    assert stop.value.code == 0 and capsys.readouterr().out


@pytest.mark.parametrize("streams", ["<&- >&- 2>&-", "2>&- | head -c 1"])
def test_as_a_command_it_ends_quietly_where_nothing_is_open(streams, model_folder, tmp_path):
    command = f"{sys.executable} {SCRIPT} --model-dir {model_folder} --data-dir {tmp_path} {streams}"
    done = subprocess.run(
        ["bash", "-c", f"{command}; exit ${{PIPESTATUS[0]}}"], capture_output=True, text=True, timeout=100
    )
    assert (done.returncode, done.stderr) == (1, "") and len(done.stdout) < 2


def start(*command: str, until: str) -> subprocess.Popen:
    """A process, as soon as a line of its stderr matches `until`."""
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    process = subprocess.Popen(command, **pipes, text=True)
    for line in process.stderr:
        if re.search(until, line):
            break
    return process


@pytest.mark.parametrize(
    ("number", "moment", "flags"),
    [
        (signal.SIGINT, "import time: .* numpy$", []),
        (signal.SIGTERM, "import time: .* torch$", []),
        (signal.SIGHUP, "import time: .* numpy$", []),
        (signal.SIGINT, "held-out conversations", ["--report"]),
        (signal.SIGTERM, "^/post TITLE", ["--chat"]),
    ],
)
def test_a_signal_at_any_moment_even_twice_is_one_sentence_and_status_1(
    number, moment, flags, model_folder, data_folder
):
    folders = ["--model-dir", str(model_folder), "--data-dir", str(data_folder)]
    with start(sys.executable, "-X", "importtime", str(SCRIPT), *folders, *flags, until=moment) as process:
        process.send_signal(number)
        process.send_signal(number)
        rest = process.stderr.read()
    assert process.returncode == 1
    said = [line for line in rest.splitlines() if line and not line.startswith("import time:")]
    assert said[-1] == "Stopped." and said.count("Stopped.") == 1 and "Traceback" not in rest


def test_a_signal_that_is_ignored_stays_so(model_folder, data_folder):
    """As nohup starts a program, for a terminal that will be closed."""
    folders = ["--model-dir", str(model_folder), "--data-dir", str(data_folder)]
    command = ["bash", "-c", "trap '' HUP; exec \"$@\"", "nohup", sys.executable, str(SCRIPT), *folders, "--chat"]
    with start(*command, until="^/post TITLE") as process:
        process.send_signal(signal.SIGHUP)
        process.communicate("/quit\n")
    assert process.returncode == 0
