"""The settings of test_model.py: what each may be, and all of them as one object. Loads no heavy library."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from extract_blog_data import FOLDER, NAME, SENTENCE, TEXT, Setting, above, number, one_of, optional, whole
from extract_blog_data import Settings as ExtractionSettings

ROOT = Path(__file__).resolve().parent.parent  # the folder of the three scripts

# In the order of the settings block of test_model.py.
ROWS = {
    "MODEL_DIR": Setting(FOLDER, '"blog-model-final"'),
    "DATA_DIR": Setting(FOLDER, '"data"'),
    "PROMPTS": Setting(SENTENCE, '["What\'s on your mind today?", "Tell me about your day."]', least=1),
    "MAX_NEW_TOKENS": Setting(optional(whole(1, 1_000_000)), "200"),
    "TEMPERATURE": Setting(optional(number(0, 100)), "0.8"),
    "TOP_P": Setting(optional(above(0, 1)), "0.95"),
    "TOP_K": Setting(optional(whole(0, 2**31 - 1)), "50"),
    "REPETITION_PENALTY": Setting(optional(number(0.1, 10)), "1.05"),
    "SEED": Setting(optional(whole(0, 2**32 - 1)), "42"),
    "PRECISION": Setting(optional(one_of("auto", "bf16", "fp16", "fp32")), '"bf16"'),
    "REPORT_SIZE": Setting(above(0, 100), "1.0"),
    "BASE_MODEL": Setting(TEXT, '"gpt2-medium"'),
    "NOT_STRANGERS": Setting(NAME, '["kevquirk"]', least=0),
    "OTHER_BLOGS": Setting(FOLDER, '["../other/data"]', least=0),
}


@dataclass(frozen=True)
class Settings:
    """The constants of test_model.py under its flags."""

    model_dir: Path
    data_dir: Path
    prompts: tuple[str, ...]
    extraction: ExtractionSettings  # of the data: private words, spellings of telephone numbers, wordings of requests
    # None: as generation_config.json in the model folder has it.
    max_new_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    precision: str | None = None
    report_size: float = 1.0
    base_model: str = ""
    not_strangers: tuple[str, ...] = ()
    other_blogs: tuple[str, ...] = ()
    explain: bool = False  # the report says what its rows mean
    raw: bool = False  # shows the sentence in which an answer breaks off, too
