"""Tiny random models and a small set of conversations; nothing is downloaded."""

import json
import os
import random
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # a test that reaches for the hub fails at once

import torch
import transformers
from tokenizers import ByteLevelBPETokenizer
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

torch.set_num_threads(1)  # tiny models are faster so, and a busy machine disturbs less

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
WORDS = ["the", "kettle", "sings", "at", "night", "and", "gull", "says", "nothing", "to", "me", "bake", "bread"]
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 256}


def sentence(source: random.Random, words: int) -> str:
    return " ".join(source.choice(WORDS) for _ in range(words))


def conversations(count: int, seed: int = 0, words: int = 60) -> list[dict]:
    """Posts of very uneven length, from a few words to several windows."""
    source = random.Random(seed)
    return [
        {
            "messages": [
                {"role": "user", "content": f"Write a post about {source.choice(WORDS)}."},
                {"role": "assistant", "content": sentence(source, source.randint(3, words))},
            ],
            "kind": "post",
            "visibility": "private" if number % 3 == 0 else "public",
            "blog": "blog",
            "path": f"_posts/{number}.md",
            "title": f"post {number}",
            "date": "2006-08-25",
        }
        for number in range(count)
    ]


def write_jsonl(path: Path, entries: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8")


def make_tokenizer(chatml: bool) -> PreTrainedTokenizerFast:
    source = random.Random(1)
    trained = ByteLevelBPETokenizer()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"] if chatml else ["<|endoftext|>"]
    text = [sentence(source, 200), "User: Assistant: user assistant system Write a post about What's on your mind?"]
    trained.train_from_iterator(text, vocab_size=400, special_tokens=special, show_progress=False)
    end = "<|im_end|>" if chatml else "<|endoftext|>"
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=trained._tokenizer, eos_token=end, additional_special_tokens=special
    )
    if chatml:
        tokenizer.chat_template = CHATML
        tokenizer.pad_token = "<|endoftext|>"
    return tokenizer


def make_model_folder(folder: Path, architecture: str, chatml: bool, **sizes) -> Path:
    """A model folder of the given architecture with random weights and a tokenizer of its own."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer(chatml)
    config = transformers.AutoConfig.for_model(
        architecture,
        **{**SIZES, **sizes},
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
