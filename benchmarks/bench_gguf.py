"""What each GGUF type costs: held-out bits per byte of a converted model in llama.cpp beside transformers' float32.

    make gguf && make .venv/installed-for-gguf-tests
    python benchmarks/bench_gguf.py [MODEL_FOLDER] [DATA_FOLDER]

Quantizes blog-model.gguf (f16) to the other types in a scratch folder and reads the held-out posts with each, in the
same windows as train_model.py.
"""

import ctypes
import math
import platform
import sys
import tempfile
from pathlib import Path

import llama_cpp
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import test_model
import train_model

TYPES = {"q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0, "q4_K_M": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M}


def quantize(source: Path, target: Path, kind: int) -> Path:
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype = kind
    if llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(settings)):
        sys.exit(f"llama.cpp cannot quantize {source} to {target.stem}.")
    return target


def nats_of(path: Path, rows) -> float:
    """Sum of the negative log-likelihoods of the author's tokens, in nats, as llama.cpp computes them."""
    model, total = llama_cpp.Llama(str(path), n_ctx=512, n_batch=512, logits_all=True, verbose=False), 0.0
    for row in rows:
        model.reset()
        model.eval(row["input_ids"])
        following = torch.tensor(row["labels"][1:])
        keep = following != train_model.UNSCORED
        logits = torch.tensor(model.scores[: len(following)])[keep]
        total += torch.nn.functional.cross_entropy(logits, following[keep], reduction="sum").item()
    return total


def main() -> int:
    here = Path(__file__).resolve().parent.parent
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else here / "blog-model-final")
    posts = train_model.read_conversations(Path(sys.argv[2] if len(sys.argv) > 2 else here / "data") / "val_data.jsonl")
    model, tokenizer = test_model.load_tuned(folder)
    tokenized = [train_model.conversation_tokens(tokenizer, post["messages"]) for post in posts]
    rows = train_model.make_rows(tokenized, 512, train_model.OVERLAP_TOKENS, packed=False)
    nats = {"transformers, float32": train_model.conversation_losses(model, rows).sum()}
    sizes = {"transformers, float32": (folder / "model.safetensors").stat().st_size}
    with tempfile.TemporaryDirectory() as scratch:
        whole = folder / "blog-model.gguf"
        files = {"f16": whole} | {name: quantize(whole, Path(scratch, name), kind) for name, kind in TYPES.items()}
        for name, path in files.items():
            nats[f"llama.cpp, {name}"], sizes[f"llama.cpp, {name}"] = nats_of(path, rows), path.stat().st_size
    base, scale = nats["transformers, float32"], math.log(2) * train_model.author_bytes(posts)
    print(f"{len(posts)} held-out conversations; {platform.machine()}, llama-cpp-python {llama_cpp.__version__}\n")
    print(f"{'':<24}{'MB':>8}{'bits/byte':>12}{'change':>10}")
    for name, value in nats.items():
        print(f"{name:<24}{sizes[name] / 1e6:>8.0f}{value / scale:>12.4f}{(value - base) / scale:>+10.4f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
