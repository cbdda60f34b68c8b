"""The fixtures of all tests; tiny.py, training.py and reporting.py have what they are made of."""

from pathlib import Path

import pytest

# Fixtures, which are found by their names here.
from reporting import everything, loaded, model_folder, overfitted, prompts, quiz_data, small_report  # noqa: F401
from tiny import conversations, make_model_folder, write_jsonl
from training import rank_4, short_runs, small_training  # noqa: F401


@pytest.fixture(scope="session")
def gpt2_folder(tmp_path_factory) -> Path:
    """GPT-2's shape: learned positions, pad token and chat template missing, Conv1D weights."""
    return make_model_folder(tmp_path_factory.mktemp("gpt2"), "gpt2", chatml=False)


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory) -> Path:
    """Llama's shape with a ChatML template."""
    return make_model_folder(
        tmp_path_factory.mktemp("llama"), "llama", chatml=True, intermediate_size=64, num_key_value_heads=1
    )


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_jsonl(folder / "train_data.jsonl", conversations(40))
    write_jsonl(folder / "val_data.jsonl", conversations(5, seed=1))
    return folder
