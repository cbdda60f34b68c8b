"""The report: its questions, what becomes of their answers in the terminal, in JSON and on a page, and the files."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import errno
import io
import itertools
import json
import os
import sys
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from jinja2 import Environment
from matplotlib.figure import Figure
from transformers import GenerationConfig

import train_model as training
from extract_blog_data import print_or_exit, say
from voice import copies, habits, leaks, learned, reader
from voice.asking import gather_evidence, run_model, without_root
from voice.chances import chances_of_texts
from voice.evidence import NO_BREAK, Evidence, NotMeasured, Section
from voice.loading import base_name, load_base, tell_changed_data
from voice.settings import Settings

COLUMNS = 80  # of a terminal
SHOWN_ANSWERS = 6  # on the page
ON_TOP = ("learned", "reader", "copies", "leaks")  # of the page, as summaries
CUT_OFF = " ..."  # after an answer that did not end by itself
TEMPLATE = Path(__file__).with_name("page.html")


class Question(NamedTuple):
    """A question of the report: a module of its own, and a row below."""

    key: str  # the module's name; in voice_report.json
    question: str
    measure: Callable  # Evidence -> numbers, a dataclass; or raises NotMeasured
    tell: Callable  # (numbers, Evidence) -> Section
    draw: Callable | None = None  # numbers -> Figure


# To add a question: write a module with these functions (copies.py is the shortest one) and a row here, in ON_TOP too
# if it is to be at the top of the page, and in LAYERS of tests/test_voice.py. voice/evidence.py has what `measure` is
# given, the data and what both models did (Evidence), and what `tell` returns (Section).
QUESTIONS = [
    Question("learned", "Did it learn?", learned.measure, learned.tell),
    Question("reader", "Is it you?", reader.measure, reader.tell, reader.draw),
    Question("habits", "What are its habits?", habits.measure, habits.tell),
    Question("copies", "Does it copy?", copies.measure, copies.tell),
    Question("leaks", "Does it leak?", leaks.measure, leaks.tell),
]


def make_report(settings: Settings, model, tokenizer, sampling: GenerationConfig, precision: str) -> None:
    """Runs the tuned model and its base model on the same requests and texts; prints and writes what was measured."""
    device = model.device
    for path in report_files(settings.model_dir):
        reason = why_unwritable(path)
        if reason:
            say(f"{path} cannot be written ({reason}); the report will be printed.")

    # One model after the other: a card need not hold both.
    warning = tell_changed_data(settings)
    evidence = gather_evidence(settings, model, tokenizer, precision)
    evidence.tuned = run_model(model, tokenizer, evidence, sampling, "tuned")
    model.to("cpu")
    base = load_base(settings, device, precision)
    if base is not None:
        evidence.base = run_model(base, tokenizer, evidence, sampling, "base")

    # Token by token the two are compared, so that both are needed at once.
    if base is not None and evidence.texts and not has_room(model, device):
        say("The graphics card has no room for both models: the base model's chances are computed on the CPU, slowly.")
        base = base.to("cpu").float()
    evidence.chances = chances_of_texts(model.to(device), base, evidence, sampling)

    report = Report(
        model=str(settings.model_dir),
        base=base_name(settings) or "an unknown model",
        seed=evidence.seed,
        size=settings.report_size,
        warning=warning,
        samples=sample_answers(evidence),
    )
    for question in QUESTIONS:
        report.add(question, evidence)

    # Files first: the terminal may be closed by the time they are ready.
    failures = write_report(report, settings.model_dir)
    print_or_exit(report.as_text(settings.explain), "both files are written, unless named above")
    if failures:
        sys.exit(f"Cannot write {' and '.join(failures)}: the report is printed; solve that and run it again.")


def has_room(model, device: torch.device) -> bool:
    """Whether the model and 2 GB for its logits fit beside what is on the device; the 2 GB are a guess."""
    if device.type != "cuda":
        return True
    size = sum(weight.numel() * weight.element_size() for weight in model.parameters())
    return torch.cuda.mem_get_info(device)[0] > size + 2e9


def sample_answers(evidence: Evidence) -> list[tuple[str, list[tuple[str, bool]]]]:
    """The first requests with the tuned model's answers, in pieces that are copies or not."""
    index = evidence.index
    pairs = zip(evidence.requests, evidence.tuned.answers, strict=False)
    samples = []
    for request, answer in itertools.islice(pairs, SHOWN_ANSWERS):
        pieces = index.split_at_copies(answer.text) if index else [(answer.text, False)]
        if not answer.ended:
            pieces.append((CUT_OFF, False))
        samples.append((request, pieces))
    return samples


# ---------------------------------------------------------------------------- numbers and words
@dataclass
class Part:
    """An answered question."""

    key: str
    question: str
    section: Section
    picture: Picture | None = None


@dataclass
class Report:
    """All that was measured, as numbers and in words."""

    model: str
    base: str
    seed: int
    size: float
    warning: str = ""  # of everything below
    samples: list[tuple[str, list]] = field(default_factory=list)  # (request, pieces of the answer)
    numbers: dict[str, object] = field(default_factory=dict)  # by key of the question
    parts: list[Part] = field(default_factory=list)

    def add(self, question: Question, evidence: Evidence) -> None:
        """Answers one question; if something is missing for it, that is the answer."""
        # A question that lacks something is no error: the others are answered.
        picture = None
        try:
            numbers = question.measure(evidence)
            section = question.tell(numbers, evidence)
            if question.draw:
                picture = Picture(png_of(question.draw(numbers)), section.verdict)
        except NotMeasured as missing:
            numbers = {"not_measured": str(missing)}
            section = Section(f"Not measured: {missing}.")
        self.numbers[question.key] = numbers
        self.parts.append(Part(question.key, question.question, section, picture))

    def part(self, key: str) -> Part:
        return next(part for part in self.parts if part.key == key)

    def as_json(self) -> str:
        """voice_report.json: numbers by question, verdicts and the warning; no post's text or name, and no answer."""
        model = Path(self.model).resolve().name
        content = {"model": model, "base": without_root(self.base), "seed": self.seed, "size": self.size}
        content["warning"] = self.warning

        # Numbers alone: the file may be shared.
        for key, numbers in self.numbers.items():
            content[key] = numbers_only(numbers)
        content["verdicts"] = {part.key: part.section.verdict for part in self.parts}
        return json.dumps(training.finite(content), indent=1, ensure_ascii=False, allow_nan=False)

    def as_text(self, explain: bool = False) -> str:
        """For the terminal: each verdict and its table, and if wanted what the table means; 80 columns at most."""
        lines = wrap(f"{self.model}, tuned from {self.base}; a range is a 95 % interval")
        lines += wrap(self.warning)

        for part in self.parts:
            lines.append("")
            lines += wrap(f"{part.question} {part.section.verdict}")
            lines += table_lines(part.section)
            meanings = part.section.meanings if explain else []
            for note in meanings + part.section.notes + part.section.hints:
                lines += wrap(note, indent="    ")
        if not explain:
            lines += ["", "What the rows mean: --explain, or the page."]
        return "\n".join(lines)


def numbers_only(value: object) -> object:
    """Dataclasses as dicts, without the fields that are for the page alone."""
    if isinstance(value, dict):
        return {key: numbers_only(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [numbers_only(item) for item in value]
    if dataclasses.is_dataclass(value):
        kept = [entry.name for entry in dataclasses.fields(value) if not entry.metadata.get("page_only")]
        return {name: numbers_only(getattr(value, name)) for name in kept}
    return value


def wrap(text: str, indent: str = "") -> list[str]:
    """Lines for the terminal; none ends between a figure and its percent sign."""
    kept = text.replace(" %", f"{NO_BREAK}%")
    lines = textwrap.wrap(kept, COLUMNS, initial_indent=indent, subsequent_indent=indent)
    return [line.replace(f"{NO_BREAK}%", " %") for line in lines]


def table_lines(section: Section) -> list[str]:
    """The rows under their head: first column left-aligned, the others right-aligned.

    A first cell that leaves no room for the others (a phrase of three long words) continues on further lines.
    """
    table = [section.head, *section.rows] if section.head else section.rows
    if not table:
        return []

    gap = "  "
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    others = sum(len(gap) + width for width in widths[1:])
    widths[0] = min(widths[0], COLUMNS - len(gap) - others)

    lines = []
    for row in table:
        first, *rest = textwrap.wrap(row[0], widths[0]) if row[0] else [""]
        cells = [first.ljust(widths[0])]
        for cell, width in zip(row[1:], widths[1:], strict=True):
            cells.append(cell.rjust(width))
        lines.append(gap + gap.join(cells).rstrip())
        lines += [gap + more for more in rest]
    return lines


# ---------------------------------------------------------------------------- page
class Picture(NamedTuple):
    png: bytes
    alt: str  # for people who cannot see it

    @property
    def source(self) -> str:
        return "data:image/png;base64," + base64.b64encode(self.png).decode()


def make_page(report: Report, curve: Path) -> str:
    """The report as one self-contained page; the template escapes every text."""
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, finalize=keep_signs)
    pictures = {part.key: part.picture for part in report.parts}
    # A model from elsewhere has no loss curve.
    with contextlib.suppress(OSError):
        drawn = curve.read_bytes() if curve.is_file() else b""
        if drawn:
            verdict = report.part("learned").section.verdict
            pictures["learned"] = Picture(drawn, f"Loss over the updates of training. {verdict}")

    # Post by post on the page only: in the terminal it would bury the rest.
    gains = []
    numbers = report.numbers["learned"]
    if isinstance(numbers, learned.Learned) and numbers.held_out:
        gains = [(post.gain, post.title) for post in numbers.held_out.posts]
        gains.sort(reverse=True)

    # Answers first, for readers who read no further.
    on_top = [report.part(key) for key in ON_TOP]
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(report=report, on_top=on_top, pictures=pictures, gains=gains)


def keep_signs(text: object) -> object:
    """No line ends between a figure and its percent sign; for everything that the template prints."""
    return text.replace(" %", f"{NO_BREAK}%") if isinstance(text, str) else text


def png_of(figure: Figure) -> bytes:
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=180)
    return data.getvalue()


# ---------------------------------------------------------------------------- files
PROBE = 100_000  # bytes; a full disk still takes an empty file


def report_files(folder: Path) -> tuple[Path, Path]:
    """For programs, and for people."""
    return folder / "voice_report.json", folder / "voice_report.html"


def write_report(report: Report, folder: Path) -> list[str]:
    """Writes both files, each even if the other fails; returns which failed, and why."""
    numbers, page = report_files(folder)
    contents = {numbers: report.as_json(), page: make_page(report, folder / "loss_curve.png")}
    failures = []
    for path, text in contents.items():
        try:
            replace_file(path, text)
        except OSError as error:
            failures.append(f"{path} ({error.strerror})")
    return failures


def why_unwritable(path: Path) -> str:
    """Why a file cannot be written, as far as can be told beforehand; "" if it can."""
    try:
        if path.is_dir():
            return os.strerror(errno.EISDIR)
        with written_beside(path, " " * PROBE):
            return ""
    except OSError as error:
        return error.strerror


def replace_file(path: Path, text: str) -> None:
    """Writes a file beside its place, readable by its owner only, and moves it there; raises OSError."""
    with written_beside(path, text) as beside:
        beside.replace(path)


@contextlib.contextmanager
def written_beside(path: Path, text: str) -> Iterator[Path]:
    """A file beside `path` with this text, readable by its owner only, while the block runs; raises OSError.

    Removes what a killed run left there.
    """
    beside = path.with_name(f".{path.name}.unfinished")
    beside.unlink(missing_ok=True)
    try:
        # O_EXCL: no link that somebody else put there is followed. Closed to others from the first.
        handle = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        # Titles may hold halves of characters.
        with os.fdopen(handle, "w", encoding="utf-8", errors="replace") as file:
            os.fchmod(handle, 0o600)  # whatever the umask was
            file.write(text)
            file.flush()
            os.fsync(handle)
        yield beside
    finally:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)
