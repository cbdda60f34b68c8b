"""Collect what bench_gpu.py needs on a rented machine that reaches no registry.

    python benchmarks/collect_packages.py FOLDER

Downloads packages for Linux (x86-64) and Python 3.12, in the versions that are installed here, and leaves FOLDER so
that PYTHONPATH can name it as it is. Prints a table of sizes and the command to run there; ends with exit status 1
where the folder would be larger than 60 MB.

The other machine brings what is too large to carry: PyTorch with its CUDA 13.0, numpy, pandas, pyarrow (24 or newer,
for datasets; 170 MB unpacked), matplotlib. It also brings what an older transformers has put there (regex, requests,
tqdm, typer and what these ask for), psutil and pytest.
"""

import argparse
import importlib.metadata
import shutil
import subprocess
import sys
from pathlib import Path

LIMIT = 60_000_000  # bytes, unpacked
PYTHON = "3.12"  # of the other machine
# pip takes each of these names by itself: a newer one does not include an older.
PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in (34, 31, 28, 27, 24, 17)]
PLATFORMS += ["manylinux2014_x86_64", "manylinux1_x86_64"]

# The package on the registry, and what of it is imported.
PACKAGES = {
    "transformers": ["transformers"],
    "tokenizers": ["tokenizers"],
    "huggingface-hub": ["huggingface_hub"],
    "httpx2": ["httpx2"],  # the hub's client; also imported by whoever never asks the hub
    "httpcore2": ["httpcore2"],
    "truststore": ["truststore"],
    "click": ["click"],
    "fsspec": ["fsspec"],
    "safetensors": ["safetensors"],
    "accelerate": ["accelerate"],
    "datasets": ["datasets"],
    "dill": ["dill"],
    "multiprocess": ["multiprocess", "_multiprocess"],
    "xxhash": ["xxhash"],
    "bitsandbytes": ["bitsandbytes"],
    "python-frontmatter": ["frontmatter"],
    "PyYAML": ["yaml", "_yaml"],
    "Markdown": ["markdown"],
    "beautifulsoup4": ["bs4"],
    "soupsieve": ["soupsieve"],
    "ftfy": ["ftfy"],
    "wcwidth": ["wcwidth"],
    "Jinja2": ["jinja2"],
    "MarkupSafe": ["markupsafe"],
}

# Of transformers' 540 architectures those that bench_gpu.py builds, and what is imported with any: 45 MB less.
ARCHITECTURES = {"auto", "audioflamingo3", "encoder_decoder", "gpt2", "gpt_neox", "llama", "qwen2"}
# bitsandbytes brings one library for each CUDA, ROCm and XPU: 125 MB of them for other machines.
LIBRARIES = {"libbitsandbytes_cpu.so", "libbitsandbytes_cuda130.so"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a new folder; it must not be there yet")
    folder = parser.parse_args().folder.absolute()
    if folder.exists():
        sys.exit(f"{folder} is there already: remove it, or name another one.")

    # Only a complete folder gets its name.
    unfinished = folder.with_name(folder.name + "-unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    download([f"{name}=={version_here(name)}" for name in PACKAGES], unfinished)
    take_out_what_is_not_used(unfinished)

    sizes = {f"{name} {version_here(name)}": size_of(name, unfinished) for name in PACKAGES}
    total = size_below(unfinished)
    print_table(sizes, total)
    if total > LIMIT:
        sys.exit(f"{unfinished} has {total / 1e6:.1f} MB, more than the {LIMIT / 1e6:.0f} MB that may travel.")

    unfinished.rename(folder)
    print(f"\nOn the other machine: PYTHONPATH={folder.name} python benchmarks/bench_gpu.py")
    return 0


def version_here(name: str) -> str:
    """The version that this Python has installed: the one that requirements.txt gave and the tests ran with."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        sys.exit(f"{name} is not installed here, so its version is not known: run this with .venv/bin/python.")


def download(requirements: list[str], folder: Path) -> None:
    """Unpack wheels of exactly these packages, and none that they ask for, into `folder`."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-compile", "--only-binary=:all:"]
    command += ["--python-version", PYTHON, "--implementation", "cp", "--target", str(folder)]
    for platform in PLATFORMS:
        command += ["--platform", platform]

    try:
        subprocess.run([*command, *requirements], check=True)
    except subprocess.CalledProcessError as error:
        sys.exit(f"pip could not get the packages (exit status {error.returncode}); what it said stands above.")


def take_out_what_is_not_used(folder: Path) -> None:
    for path in (folder / "transformers" / "models").iterdir():
        if path.is_dir() and path.name not in ARCHITECTURES:
            shutil.rmtree(path)
    for path in (folder / "bitsandbytes").glob("libbitsandbytes_*"):
        if path.name not in LIBRARIES:
            path.unlink()

    # Programs for the command line, which begin with the path of this machine's Python.
    shutil.rmtree(folder / "bin", ignore_errors=True)


def size_of(name: str, folder: Path) -> int:
    """Bytes of what is imported of a package, as it lies in `folder` now."""
    total = 0
    for module in PACKAGES[name]:
        # A package is a folder, a compiled module one file.
        for top in folder.glob(f"{module}*"):
            if top.stem.split(".")[0] == module:
                total += size_below(top)
    return total


def size_below(place: Path) -> int:
    return sum(path.stat().st_size for path in [place, *place.rglob("*")] if path.is_file())


def print_table(sizes: dict[str, int], total: int) -> None:
    print("| package | MB |")
    print("|---|---:|")
    for name, size in sorted(sizes.items(), key=lambda item: -item[1]):
        print(f"| {name} | {size / 1e6:.2f} |")
    print(f"| all, with their notes on licences and versions | {total / 1e6:.2f} |")


if __name__ == "__main__":
    sys.exit(main())
