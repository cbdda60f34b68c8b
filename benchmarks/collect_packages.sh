#!/bin/sh
# Download what bench_gpu.py needs on a machine without network that has PyTorch, numpy, pandas, pyarrow and matplotlib:
# wheels for Linux (x86-64) and Python 3.12, in the versions that are installed here. Needs zip.
#
#     sh benchmarks/collect_packages.sh FOLDER                              # here
#     pip install --no-index --no-deps --target packages FOLDER/*.whl       # there
set -eu
python="$(dirname "$0")/../.venv/bin/python"
names='transformers|tokenizers|huggingface.hub|httpx2|httpcore2|truststore|click|fsspec|safetensors|accelerate'
names="$names|dill|multiprocess|xxhash|bitsandbytes|peft|psutil|python-frontmatter|PyYAML|Markdown|beautifulsoup4"
names="$names|soupsieve|ftfy|wcwidth|Jinja2|MarkupSafe"
versions=$("$python" -m pip list --format=freeze | grep -iE "^($names)==")
platforms=$(printf -- '--platform manylinux_2_%s_x86_64 ' 34 31 28 27 24 17 12 5)

# shellcheck disable=SC2086  # lists of words
"$python" -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
    $platforms --dest "$1" $versions
# bitsandbytes holds 125 MB of libraries for other machines than one with CUDA 13.
zip --quiet --delete "$1"/bitsandbytes-*.whl '*_cuda11*' '*_cuda12*' '*_rocm*' '*_xpu*'
