"""Ollama writes the prompts that transformers writes: `make test-ollama`, apart from `make test` because it needs Go.

Renders the TEMPLATE of our Modelfile with Go's text/template, as Ollama does, and compares every byte with the chat
template. llama.cpp puts the token of beginning in front by itself, so that is taken off.
"""

import json
import os
import re
import subprocess
from pathlib import Path

import pytest
from tiny import CHATML, make_tokenizer
from tokenizers.processors import TemplateProcessing

import train_model

HERE = Path(__file__).parent

# Llama 3's, and SmolLM2's, which has a message of its own for who gives none.
LLAMA3 = (
    "{% for message in messages %}{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' "
    "+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}"
    "{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
DEFAULT = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\\nYou are a helper.<|im_end|>\\n' }}{% endif %}"
)
TEMPLATES = {
    "plain": None,
    "plain after BOS": None,
    "ChatML": CHATML,
    "with a default": DEFAULT + CHATML,
    "Llama 3": LLAMA3,
}

FIRST = {"role": "user", "content": 'What\'s on your mind?\n\nBread & {{ braces }}, "quotes", <3'}
REPLY = {"role": "assistant", "content": "Été, naïve — 面包"}
SECOND = {"role": "user", "content": "so?"}
SYSTEM = {"role": "system", "content": "You are a baker: be brief."}
TALKS = {
    "one turn": [FIRST],
    "two turns": [FIRST, REPLY, SECOND],
    "three turns": [FIRST, REPLY, SECOND, REPLY, FIRST],
    "a system message": [SYSTEM, FIRST],
    "a system message and two turns": [SYSTEM, FIRST, REPLY, SECOND],
}


def tokenizer_with(name: str, folder: Path):
    """A tokenizer that train_model.py has loaded, with the template of this name."""
    tokenizer = make_tokenizer(chatml=name in ("ChatML", "with a default"))
    if name in ("Llama 3", "plain after BOS"):
        tokenizer.add_special_tokens({"bos_token": "<|begin_of_text|>"})
        start = ("<|begin_of_text|>", tokenizer.bos_token_id)
        begin = TemplateProcessing(single="<|begin_of_text|> $A", special_tokens=[start])
        tokenizer.backend_tokenizer.post_processor = begin
    tokenizer.chat_template = TEMPLATES[name]
    tokenizer.save_pretrained(folder / name)
    return train_model.load_tokenizer(str(folder / name))


def in_go(cases: list[dict]) -> list[str]:
    command = ["go", "run", str(HERE / "ollama_template.go")]
    cache = HERE.parent / ".venv" / "cache" / "go"  # Go would take the home folder
    environment = {**os.environ, "GOCACHE": str(cache), "GOTELEMETRY": "off", "GO111MODULE": "off"}
    done = subprocess.run(command, input=json.dumps(cases), capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def template_of(tokenizer) -> str:
    text = train_model.modelfile(tokenizer, ["</s>"], 512, train_model.SAMPLING)
    return re.search(r'TEMPLATE """(.*?)"""', text, re.DOTALL)[1]


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_modelfile_makes_the_prompts_of_the_chat_template(name, tmp_path):
    tokenizer = tokenizer_with(name, tmp_path)
    begins = tokenizer.bos_token if train_model.starts_with_bos(tokenizer) else ""
    assert bool(begins) == (name in ("Llama 3", "plain after BOS"))
    prompts = in_go([{"template": template_of(tokenizer), "messages": talk} for talk in TALKS.values()])
    for (talk, messages), prompt in zip(TALKS.items(), prompts, strict=True):
        expected = train_model.render(tokenizer, messages, add_generation_prompt=True)
        assert expected.startswith(begins)
        assert prompt == expected.removeprefix(begins), talk


def test_a_system_message_that_the_template_has_no_turn_for_is_left_out(tmp_path, capsys):
    """Gemma 2 refuses it, Gemma 3 puts it into the user's turn."""
    tokenizer = tokenizer_with("ChatML", tmp_path)
    refusing = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    tokenizer.chat_template = refusing + CHATML
    prompt, without = in_go(
        [{"template": template_of(tokenizer), "messages": talk} for talk in ([SYSTEM, FIRST], [FIRST])]
    )
    assert prompt == without == train_model.render(tokenizer, [FIRST], add_generation_prompt=True)
    assert "has no turn for system messages" in capsys.readouterr().err
