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
from transformers import AutoTokenizer, GenerationConfig, pipeline

import test_model
import train_model
import voice.loading
import voice.sampling

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
        settings.setattr(train_model, "SAMPLING", {**train_model.SAMPLING, "max_new_tokens": 20})
        base = str(request.getfixturevalue(request.param))
        flags = ["--base-model", base, "--data-dir", str(data_folder), "--output-dir", str(folder)]
        train_model.main([*flags, "--max-steps", "2", "--learning-rate", "1e-2"])
    return folder


def serve(folder: Path, port: int) -> subprocess.Popen:
    command = [TRANSFORMERS, "serve", str(folder), "--device", "cpu", "--port", str(port)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)


@pytest.fixture(scope="module")
def server(trained):
    """(folder, address) of `transformers serve` on a port that the system picked."""
    process = serve(trained, 0)
    lines = iter(process.stderr.readline, "")
    address = next(found[0] for line in lines if (found := re.search(r"http://[\w.]+:[1-9]\d+", line)))
    yield trained, address
    process.kill()
    process.communicate()


def ours(folder: Path, messages: list[dict], seed: int | None = None) -> str:
    """What test_model.py --chat answers; greedily without a seed."""
    model, tokenizer = voice.loading.load_tuned(folder)
    sampling = voice.sampling.read_sampling(model.generation_config, tokenizer, test_model.parse_arguments([])[0])
    sampling.do_sample = seed is not None
    prompt = voice.sampling.prompt_tokens(tokenizer, messages)
    *_, (_, answer) = voice.sampling.stream(
        model, tokenizer, [prompt], sampling, torch.Generator().manual_seed(seed or 0)
    )
    return answer.text


@pytest.mark.parametrize("messages", [QUESTION, TALK])
def test_an_openai_client_gets_the_answer_of_the_chat(server, messages):
    folder, address = server
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
    # Without max_tokens the server asks for 1,024 new tokens, more than GPT-2's positions leave beside a prompt.
    request = {"model": str(folder), "messages": messages, "temperature": 0.0, "max_tokens": 20}
    whole = client.chat.completions.create(**request).choices[0]
    assert whole.message.content.strip() == ours(folder, messages)
    pieces = [chunk.choices[0].delta.content or "" for chunk in client.chat.completions.create(**request, stream=True)]
    assert "".join(pieces).strip() == ours(folder, messages)


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
    answer = write(QUESTION, do_sample=False)[0]["generated_text"][-1]
    assert answer["role"] == "assistant" and answer["content"].strip() == ours(trained, QUESTION)


def test_the_modelfile_holds_template_stops_and_sampling(trained):
    lines = (trained / "Modelfile").read_text(encoding="utf-8")
    template = re.search(r'TEMPLATE """(.*?)"""', lines, re.DOTALL)[1]
    start, turns, answer = re.fullmatch(
        r"(.*)\{\{ range .Messages \}\}(.*)\{\{ end \}\}\{\{ end \}\}(.*)", template, re.DOTALL
    ).groups()
    _, *pieces = re.split(r'\{\{ (?:else )?if eq .Role "(\w+)" \}\}', turns)
    turn_of = dict(zip(pieces[::2], pieces[1::2], strict=True))
    tokenizer = AutoTokenizer.from_pretrained(trained)
    for talk in (TALK, [SYSTEM, *TALK]):
        said = "".join(turn_of[turn["role"]].replace("{{ .Content }}", turn["content"]) for turn in talk)
        assert start + said + answer == train_model.render(tokenizer, talk, add_generation_prompt=True)
    settings = GenerationConfig.from_pretrained(trained)
    stops = [json.loads(stop) for stop in re.findall(r"^PARAMETER stop (.*)$", lines, re.MULTILINE)]
    assert tokenizer.convert_tokens_to_ids(stops) == settings.eos_token_id
    assert f"temperature {settings.temperature}\n" in lines and "num_ctx 256\n" in lines


SAMPLING = {**train_model.SAMPLING, "max_new_tokens": 200}


def test_a_template_that_depends_on_what_is_said_is_named(gpt2_folder, capsys):
    tokenizer = train_model.load_tokenizer(gpt2_folder)
    tokenizer.chat_template = "{% for m in messages %}{{ loop.length }}{{ m['content'] }}{{ eos_token }}{% endfor %}"
    assert "{{ .Prompt }}" in train_model.modelfile(tokenizer, ["</s>"], 64, SAMPLING)
    assert "TEMPLATE" in capsys.readouterr().err


@pytest.mark.parametrize(("positions", "longest"), [(1024, 200), (400, 200), (256, 128), (64, 32), (1, 1)])
def test_an_answer_leaves_half_of_the_positions_to_its_prompt(positions, longest, gpt2_folder):
    text = train_model.modelfile(train_model.load_tokenizer(gpt2_folder), ["</s>"], positions, SAMPLING)
    assert f"PARAMETER num_predict {longest}\nPARAMETER num_ctx {positions}\n" in text


def test_a_model_that_could_read_a_book_does_not_take_all_memory_in_ollama(gpt2_folder):
    text = train_model.modelfile(train_model.load_tokenizer(gpt2_folder), ["</s>"], 131_072, SAMPLING)
    assert "PARAMETER num_ctx 4096\n" in text
