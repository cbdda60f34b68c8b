"""The trained folder in other people's tools: transformers' pipeline, serve and chat, and OpenAI's client."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import openai
import pytest
import torch
from training import run
from transformers import AutoTokenizer, GenerationConfig, pipeline

import test_model
import train_model
from voice.loading import load_tuned
from voice.sampling import prompt_tokens, read_sampling, stream

pytestmark = pytest.mark.slow

QUESTION = [{"role": "user", "content": "What's on your mind?"}]
TALK = [*QUESTION, {"role": "assistant", "content": "bread"}, {"role": "user", "content": "so?"}]
SYSTEM = {"role": "system", "content": "Be brief."}
TRANSFORMERS = Path(sys.executable).with_name("transformers")


@pytest.fixture(scope="module", params=["gpt2_folder", "llama_folder"])
def trained(request, data_folder, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "model"
    with pytest.MonkeyPatch.context() as settings:
        settings.setattr(train_model, "CONTEXT_TOKENS", 64)
        settings.setattr(train_model, "SAMPLE_TOKENS", 4)
        settings.setattr(train_model, "SAMPLING", {**train_model.SAMPLING, "max_new_tokens": 20})
        base = request.getfixturevalue(request.param)
        run(base, data_folder, folder, "--max-steps", "2", "--learning-rate", "1e-2")
    return folder


@pytest.fixture(scope="module")
def server(trained):
    """(folder, address) of `transformers serve` on a port that the system picked."""
    command = [TRANSFORMERS, "serve", str(trained), "--device", "cpu", "--port", "0"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    lines = iter(process.stderr.readline, "")
    address = next(found[0] for line in lines if (found := re.search(r"http://[\w.]+:[1-9]\d+", line)))
    yield trained, address
    process.kill()
    process.communicate()


def ours(folder: Path, messages: list[dict]) -> str:
    """What test_model.py --chat answers, greedily."""
    model, tokenizer = load_tuned(folder)
    settings, _ = test_model.parse_arguments([])
    sampling = read_sampling(model.generation_config, tokenizer, settings)
    sampling.do_sample = False
    prompt = prompt_tokens(tokenizer, messages)
    *_, (_, answer) = stream(model, tokenizer, [prompt], sampling, torch.Generator())
    return answer.text.strip()


ONCE = pytest.mark.parametrize("trained", ["gpt2_folder"], indirect=True)  # the pipeline below reads both templates


@ONCE
@pytest.mark.parametrize("messages", [QUESTION, TALK])
def test_an_openai_client_gets_the_answer_of_the_chat(server, messages):
    folder, address = server
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
    # Without max_tokens the server asks for 1,024 new tokens, more than GPT-2's positions leave beside a prompt.
    request = {"model": str(folder), "messages": messages, "temperature": 0.0, "max_tokens": 20}
    whole = client.chat.completions.create(**request)
    expected = ours(folder, messages)
    assert whole.choices[0].message.content.strip() == expected

    pieces = client.chat.completions.create(**request, stream=True)
    streamed = [piece.choices[0].delta.content or "" for piece in pieces]
    assert "".join(streamed).strip() == expected


@ONCE
def test_transformers_chat_talks_to_the_server(server):
    folder, address = server
    command = [TRANSFORMERS, "chat", str(folder), address, "do_sample=False", "max_new_tokens=20"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "0", "COLUMNS": "2000", "TERM": "dumb"}  # it refuses localhost too
    typed = f"{QUESTION[0]['content']}\nn\n!exit\n"  # n: not to be continued beyond its twenty tokens
    done = subprocess.run(command, input=typed, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert ours(folder, QUESTION).split()[0] in done.stdout


def test_a_pipeline_answers_as_the_chat_does(trained):
    write = pipeline("text-generation", str(trained), device="cpu")
    [answered] = write(QUESTION, do_sample=False)
    answer = answered["generated_text"][-1]
    assert answer["role"] == "assistant"
    assert answer["content"].strip() == ours(trained, QUESTION)


def test_the_modelfile_holds_template_stops_and_sampling(trained):
    modelfile = (trained / "Modelfile").read_text(encoding="utf-8")
    template = re.search(r'TEMPLATE """(.*?)"""', modelfile, re.DOTALL)[1]
    loop = r"(.*)\{\{ range .Messages \}\}(.*)\{\{ end \}\}\{\{ end \}\}(.*)"
    start, turns, answer = re.fullmatch(loop, template, re.DOTALL).groups()
    _, *pieces = re.split(r'\{\{ (?:else )?if eq .Role "(\w+)" \}\}', turns)
    turn_of = dict(zip(pieces[::2], pieces[1::2], strict=True))
    tokenizer = AutoTokenizer.from_pretrained(trained)
    for talk in (TALK, [SYSTEM, *TALK]):
        said = [turn_of[turn["role"]].replace("{{ .Content }}", turn["content"]) for turn in talk]
        written = "".join([start, *said, answer])
        assert written == train_model.render(tokenizer, talk, add_generation_prompt=True)

    settings = GenerationConfig.from_pretrained(trained)
    stops = re.findall(r"^PARAMETER stop (.*)$", modelfile, re.MULTILINE)
    assert tokenizer.convert_tokens_to_ids([json.loads(stop) for stop in stops]) == settings.eos_token_id
    assert f"temperature {settings.temperature}\n" in modelfile
    assert "num_ctx 256\n" in modelfile


SAMPLING = {**train_model.SAMPLING, "max_new_tokens": 200}


def test_a_template_that_depends_on_what_is_said_is_named(gpt2_folder, capsys):
    tokenizer = train_model.load_tokenizer(gpt2_folder)
    tokenizer.chat_template = "{% for m in messages %}{{ loop.length }}{{ m['content'] }}{{ eos_token }}{% endfor %}"
    assert "{{ .Prompt }}" in train_model.modelfile(tokenizer, ["</s>"], 64, SAMPLING)
    assert "TEMPLATE" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("positions", "longest", "kept"),
    [(1024, 200, 1024), (400, 200, 400), (256, 128, 256), (64, 32, 64), (1, 1, 1), (131_072, 200, 4096)],
)
def test_an_answer_leaves_half_of_the_positions_to_its_prompt(positions, longest, kept, gpt2_folder):
    """A model that could read a book does not take all memory in Ollama."""
    tokenizer = train_model.load_tokenizer(gpt2_folder)
    text = train_model.modelfile(tokenizer, ["</s>"], positions, SAMPLING)
    assert f"PARAMETER num_predict {longest}\nPARAMETER num_ctx {kept}\n" in text
