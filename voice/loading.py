"""Loads the tuned model and its base model, and reads what is known of the training run."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

import train_model as training
from extract_blog_data import say
from train_model import CannotLoad, brief
from voice.settings import ROOT, Settings

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}  # of the weights when generating
USUAL_POSITIONS = 2048  # for a model without a limit (Mamba), so that every answer ends


def load_model(folder: str | Path, held_in: str = "fp32", device: torch.device | None = None):
    """A causal model in float32, from the disk or the hub's cache; raises CannotLoad if it is missing or incomplete.

    With `held_in` "fp16" or "bf16" its matrices are in that precision, as adapters were trained beside: it may be too
    large for float32. Run such a model under autocast until all of it is in half precision.
    """
    model = training.load_model(folder, only_local=True)
    device = device or choose_device(cpu_wanted=False)
    training.hold_in_half(model, held_in)
    return model.to(device).eval()


def choose_device(cpu_wanted: bool) -> torch.device:
    has_card = torch.cuda.is_available() and not cpu_wanted
    return torch.device("cuda" if has_card else "cpu")


def check_place(folder: Path) -> None:
    """Exits with a sentence if there is no model in the folder."""
    if (folder / "config.json").is_file():
        return

    # train_model.py may have been killed between two renames; only train_model.py moves folders.
    previous = training.Places(folder.resolve()).previous
    if (previous / "config.json").is_file():
        sys.exit(
            f"{folder} is only half replaced: run train_model.py again, which finishes that at once, or use the "
            f"previous model with --model-dir {previous}."
        )
    sys.exit(f"There is no model in {folder}: run train_model.py first.")


def load_tuned(folder: Path, device: torch.device | None = None, held_in: str = "fp32"):
    """(model, tokenizer) of a folder that train_model.py wrote; exits with a sentence if it is incomplete."""
    check_place(folder)
    try:
        # The tokenizer first, which is read in a moment: a token too many for the model is found before it is loaded.
        vocabulary = training.vocabulary_of(training.load_config(folder, only_local=True))
        tokenizer = training.load_tokenizer(folder, vocabulary, only_local=True, is_tuned=True)
        return load_model(folder, held_in, device), tokenizer
    except CannotLoad as error:
        sys.exit(f"{folder} is incomplete ({brief(error)}): run train_model.py again.")


def load_base(settings: Settings, device: torch.device, precision: str):
    """The base model of the tuned one; None, with a message, if it is unknown or cannot be loaded."""
    name = base_name(settings)
    if not name:
        say("The base model is unknown; set BASE_MODEL to compare with it. Skipping comparisons.")
        return None

    # A relative folder may be relative to where training ran, to the scripts, or to the tuned model.
    folders = [path for path in (Path(name), ROOT / name, settings.model_dir.resolve() / name) if path.is_dir()]
    try:
        place = str(folders[0]) if folders else name
        return load_model(place, held_in(settings.model_dir, precision), device)
    except CannotLoad as error:
        reason = f" ({brief(error)})" if folders else ""
        remedy = "set BASE_MODEL in test_model.py to its folder, or its name on the hub"
        say(f"Cannot load the base model {name}{reason}: {remedy}. Skipping comparisons.")
        return None


def base_name(settings: Settings) -> str:
    """The name or folder of the base model; "" if unknown."""
    return settings.base_model or name_in(run_settings(settings.model_dir), "base_model")


@torch.inference_mode()
def fits_float16(model, ids: list[int]) -> bool:
    """Whether all layer inputs and outputs for this prompt stay below half of float16's maximum, 65,504.

    In some models (Gemma 3) they do not; in float16 such a model would generate nothing.
    """
    limit = torch.finfo(torch.float16).max / 2
    fits = []

    def look(layer, inputs, output) -> None:
        outputs = output if isinstance(output, tuple) else (output,)
        for value in (*inputs, *outputs):
            if torch.is_tensor(value) and value.is_floating_point():
                fits.append(bool(value.abs().max() < limit))

    # Of every layer, since the largest values are between them.
    hooks = [layer.register_forward_hook(look) for layer in model.modules()]
    # A model whose matrices alone are in half precision runs only under autocast.
    with training.autocast(model.device, "fp16"):
        model(input_ids=torch.tensor([ids], device=model.device))
    for hook in hooks:
        hook.remove()
    return all(fits)


def positions_of(model) -> int:
    """Maximum number of tokens of prompt and answer together."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or USUAL_POSITIONS


# ---------------------------------------------------------------------------- what the training run wrote down
def run_settings(model_dir: Path) -> dict:
    """Settings of the training run; empty for a model from elsewhere."""
    return section_of(training.read_json_object(model_dir / "training_report.json"), "settings")


def run_plan(model_dir: Path) -> dict:
    """What the training run chose for its device; empty for a model from elsewhere."""
    return section_of(training.read_json_object(model_dir / "training_report.json"), "plan")


def held_in(model_dir: Path, precision: str) -> str:
    """Precision of the weights while losses are measured: `precision` if adapters were trained, else float32."""
    return precision if run_plan(model_dir).get("lora_rank") else "fp32"


def wanted_precision(settings: Settings) -> str:
    """For generating: the setting, else what the model was trained in, else "auto"."""
    trained = run_plan(settings.model_dir).get("precision")
    return settings.precision or (trained if trained in training.PRECISIONS else "auto")


def tell_changed_data(settings: Settings) -> str:
    """A sentence if the data are not those that the model was trained on; "" if they are, or if nobody knows."""
    trained = run_settings(settings.model_dir)

    # The splits are files of their own: one may be another while the other is the same.
    for split, name in training.DATA_FILES.items():
        path = settings.data_dir / name
        known = name_in(trained, f"{split}_sha256")
        # A model of an older version, or of somebody else's, does not know.
        if known and path.is_file() and training.file_hash(path) != known:
            return (
                f"{name} is not the file that this model was trained with: what is said about copies, leaks and "
                "held-out posts is about other posts than those of its training. Run train_model.py again."
            )
    return ""


def name_in(content: dict, key: str) -> str:
    """A text in a JSON object; "" if it is missing or something else."""
    value = content.get(key)
    return value if isinstance(value, str) else ""


def section_of(content: dict, key: str) -> dict:
    """An object in a JSON object; empty if it is missing or something else."""
    section = content.get(key)
    return section if isinstance(section, dict) else {}


def is_whole(value: object) -> bool:
    """Whether it is a whole number; True and False are not."""
    return isinstance(value, int) and not isinstance(value, bool)
