"""What only a graphics card can show of train_model.py and test_model.py, in nine minutes, with random weights.

    python benchmarks/bench_gpu.py [--only STAGE ...] [--results FILE] [--tiny]

Each of the nine stages is a process of its own with a time limit; one that fails, or is out of time, stops no other.
What it finds is printed, and appended to FILE as a line of JSON, at once. At the end stand a table and PASS or FAIL;
the exit status is 1 if a stage failed. A number with a bound is a check, one without is a figure.

Nothing is downloaded; 12 GB are needed in the folder for temporary files (TMPDIR). For a machine that reaches no
registry, collect_packages.py makes a folder of what it lacks. Without a card, or with --tiny, the models are tiny: that
tests this script, and its seconds mean nothing. What only a card can answer then says so.

What it cannot show: WSL, whose memory spills, and the kernels of older cards. In the memory stage's last run the flash
and cuDNN kernels are switched off, so that an RTX 20xx's kind of attention does the work.
"""

import argparse
import contextlib
import datetime
import gc
import json
import math
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import conftest
import numpy as np
import psutil
import torch
import transformers
from accelerate.state import AcceleratorState
from bench_train import UPDATE, Clock, stock_trainer, time_products
from torch.autograd import DeviceType
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoModelForCausalLM, GenerationConfig, IntervalStrategy, PrinterCallback, TrainerCallback

import test_model
import train_model
from train_model import WayToTrain

HERE = Path(__file__).resolve().parent

LIMIT = 520  # seconds for all stages together
FUSED = "adamw_torch_fused"
EIGHT_BITS = "adamw_bnb_8bit"


# ---------------------------------------------------------------------------- what a stage works with
class Size(NamedTuple):
    """A model of GPT-2's shape, and the rows for it."""

    layers: int
    width: int
    heads: int
    vocabulary: int
    positions: int
    context: int  # tokens of a row


MEDIUM = Size(layers=24, width=1024, heads=16, vocabulary=50_257, positions=1024, context=512)
TINY = Size(layers=2, width=64, heads=2, vocabulary=500, positions=256, context=64)


@dataclass
class Result:
    """One number or word that a stage found: a line of the results file."""

    run: str  # when it began: the file may hold several
    stage: str
    what: str
    value: float | str
    unit: str = ""
    bound: str = ""  # "" for a figure
    passed: bool | None = None  # None for a figure

    def line(self) -> str:
        verdict = {True: "ok", False: "NOT OK", None: ""}[self.passed]
        bound = f" ({self.bound}: {verdict})" if self.bound else ""
        return f"{self.stage:<11} {self.what}: {self.shown()}{bound}"

    def shown(self) -> str:
        value = self.value if isinstance(self.value, str) else tell_number(self.value)
        return f"{value} {self.unit}".strip()


def tell_number(value: float) -> str:
    """Four digits, and none of a whole number or a large one's lost."""
    if value == int(value) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def append(path: Path, result: Result) -> None:
    """Prints it and has it in the file, also if the next moment is the last."""
    print(result.line(), flush=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(result)) + "\n")


@dataclass
class Lab:
    """What a stage is given: where it runs, how large, where it may write, and whom it tells."""

    run: str
    stage: str
    results: Path
    folder: Path  # empty at first, removed afterwards
    device: torch.device
    size: Size

    @property
    def has_card(self) -> bool:
        return self.device.type == "cuda"

    @property
    def is_real(self) -> bool:
        """Whether bytes and seconds mean something: of a tiny model all that is not counted is larger."""
        return self.has_card and self.size == MEDIUM

    @property
    def precision(self) -> str:
        """The fast one of a card; on a CPU, where nothing here is fast, bfloat16 for the sake of its code."""
        return train_model.fastest_precision(self.device) if self.has_card else "bf16"

    def figure(self, what: str, value: float | str, unit: str = "") -> None:
        self.tell(what, value, unit, "", None)

    def at_most(self, what: str, value: float, bound: float, unit: str = "") -> None:
        # A value that is no number passes nothing.
        self.tell(what, value, unit, f"at most {tell_number(bound)}", bool(value <= bound))

    def at_least(self, what: str, value: float, bound: float, unit: str = "") -> None:
        self.tell(what, value, unit, f"at least {tell_number(bound)}", bool(value >= bound))

    def same(self, what: str, value: float | str, wanted: float | str, unit: str = "") -> None:
        shown = wanted if isinstance(wanted, str) else tell_number(wanted)
        self.tell(what, value, unit, f"exactly {shown}", value == wanted)

    def needs_card(self, what: str) -> None:
        self.tell(what, "needs a card", "", "", None)

    def tell(self, what: str, value: float | str, unit: str, bound: str, passed: bool | None) -> None:
        if not isinstance(value, str) and not math.isfinite(value):
            value = str(value)  # JSON has neither infinity nor NaN
        append(self.results, Result(self.run, self.stage, what, value, unit, bound, passed))

    def wait(self) -> None:
        """A card is still at work when Python has told it everything."""
        if self.has_card:
            torch.cuda.synchronize()

    def seconds(self, act: Callable[[], object]) -> float:
        self.wait()
        began = time.perf_counter()
        act()
        self.wait()
        return time.perf_counter() - began

    def forget(self) -> None:
        """Memory that nobody uses any more goes back to the card."""
        gc.collect()
        if self.has_card:
            torch.cuda.empty_cache()


# ---------------------------------------------------------------------------- models and rows
def config_of(size: Size, ours: bool = True):
    """GPT-2's config; `ours` as load_for_training changes it, else as it comes."""
    config = transformers.GPT2Config(
        n_layer=size.layers,
        n_embd=size.width,
        n_head=size.heads,
        vocab_size=size.vocabulary,
        n_positions=size.positions,
        bos_token_id=0,
        eos_token_id=None,  # so that no answer ends early
        pad_token_id=0,
    )
    if ours:
        train_model.set_dropout(config)
        train_model.fuse_activations(config)
    return config


def model_on(device: torch.device, config):
    """Random weights, the same ones each time on the same kind of device."""
    torch.manual_seed(0)
    with device:
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    train_model.use_sparse_embedding_gradient(model)
    return model


def model_folder(lab: Lab, size: Size) -> Path:
    """A folder as from the hub, with a tokenizer of a few hundred tokens: the model knows more of them, and may."""
    folder = lab.folder / "base"
    tokenizer = conftest.make_tokenizer(chatml=False)
    config = config_of(size, ours=False)
    config.vocab_size = max(size.vocabulary, len(tokenizer))
    config.eos_token_id = tokenizer.eos_token_id
    model_on(lab.device, config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def data_folder(lab: Lab, posts: int, words: int) -> Path:
    folder = lab.folder / "data"
    conftest.write_jsonl(folder / "train_data.jsonl", conftest.conversations(posts, words=words))
    conftest.write_jsonl(folder / "val_data.jsonl", conftest.conversations(5, seed=1, words=words))
    return folder


def random_documents(size: Size, tokens: int) -> list[list[int]]:
    """Documents of random tokens, `tokens` or more together. Their lengths are log-normal around half a row."""
    source = np.random.default_rng(0)
    documents = []
    while sum(map(len, documents)) < tokens:
        length = int(source.lognormal(math.log(size.context / 2), 0.8))
        length = min(max(length, 16), 3 * size.context)
        documents.append(source.integers(1, size.vocabulary, length).tolist())
    return documents


def random_rows(size: Size, count: int):
    """`count` rows in a random order, packed by make_rows: one document or several, short ones, one with no label."""
    tokenized = []
    for document in random_documents(size, (count + 2 * UPDATE) * size.context):
        scored = [place >= 8 for place in range(len(document))]  # a request stands before an answer
        tokenized.append((document, scored))
    rows = train_model.make_rows(tokenized, size.context, size.context // 16, multiple=UPDATE)
    return rows.shuffle(seed=0).select(range(count))


def full_rows(size: Size, count: int):
    """Rows with no token to spare, of two documents each, so that attention has a mask: what memory is planned for."""
    source = np.random.default_rng(0)
    half = size.context // 2
    tokenized = []
    for _ in range(2 * count):
        tokenized.append((source.integers(1, size.vocabulary, half).tolist(), [True] * half))
    return train_model.make_rows(tokenized, size.context, 0)


def batches_of(lab: Lab, rows, rows_at_once: int) -> list[dict[str, torch.Tensor]]:
    examples = list(rows)
    batches = []
    for start in range(0, len(examples), rows_at_once):
        batch = train_model.collate(examples[start : start + rows_at_once])
        batches.append({name: tensor.to(lab.device) for name, tensor in batch.items()})
    return batches


def trainer_for(lab: Lab, model, rows, way: WayToTrain, precision: str, updates: int, callbacks: list):
    """A BlogTrainer that does nothing but update, on the rows in their order."""
    plan = train_model.Plan(
        device=lab.device.type,
        precision=precision,
        optimizer=way.optimizer,
        checkpointing=way.checkpointing,
        rows_at_once=way.rows_at_once,
        accumulation=UPDATE // way.rows_at_once,
        evaluate_every=updates + 1,
        parameters=0,
    )
    flags = argparse.Namespace(epochs=1, max_steps=updates, learning_rate=1e-4)
    arguments = train_model.training_arguments(flags, lab.folder, plan)
    arguments.train_sampling_strategy = "sequential"
    arguments.eval_strategy = IntervalStrategy.NO  # else the last update is followed by one

    trainer = train_model.BlogTrainer(
        model=model,
        args=arguments,
        data_collator=train_model.collate,
        train_dataset=rows,
        precision=precision,
        callbacks=[*callbacks, train_model.SaySkipped()],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def losses_of(log_history: list[dict]) -> list[float]:
    """Of the updates and evaluations, in their order."""
    return [entry.get("loss", entry.get("eval_loss")) for entry in log_history if "train_loss" not in entry]


def largest_difference(one: list[float], other: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(one, other, strict=True))


def forward_backward(lab: Lab, model, batch: dict, precision: str, scale: float = 1.0) -> None:
    """One row or several, as BlogTrainer treats them; gradients are added up, `scale` times too large."""
    with train_model.autocast(lab.device, precision):
        logits, targets = train_model.scored_logits(model, batch)
        loss = train_model.SummedCrossEntropy.apply(logits, targets) / max(1, len(targets))
    (loss * scale).backward()


def run_training(lab: Lab, base: Path, data: Path, output: Path, *flags: str, **settings) -> str:
    """train_model.main with these settings; returns the sentence with which it ended itself, "" if it did not."""
    # accelerate would stay on the device of the run before.
    AcceleratorState._reset_state(reset_partial_state=True)
    arguments = ["--base-model", str(base), "--data-dir", str(data), "--output-dir", str(output), *flags]
    if not lab.has_card:
        arguments.append("--cpu")
        # A CPU that is slow in bfloat16 would choose float32.
        settings.setdefault("pick_precision", lambda device, wanted: wanted)

    small = {}
    if lab.size.context < train_model.CONTEXT_TOKENS:
        small = {"CONTEXT_TOKENS": lab.size.context, "OVERLAP_TOKENS": lab.size.context // 8}
    with mock.patch.multiple(train_model, **{**small, **settings}), contextlib.redirect_stdout(sys.stderr):
        try:
            train_model.main(arguments)
        except SystemExit as stop:
            return str(stop.code)
    return ""


def report_of(output: Path) -> dict:
    return json.loads((output / "training_report.json").read_text(encoding="utf-8"))


# ---------------------------------------------------------------------------- stage 1
def end_to_end(lab: Lab) -> None:
    """Whole runs of tiny models: another device and another precision must learn the same."""
    # Differences of losses, in nats. On a CPU bfloat16 was 8e-5 apart from float32; the rest is room.
    bounds = {"fp32": 1e-4, "bf16": 1e-3, "fp16": 1e-3} if lab.has_card else {"bf16": 1e-3}
    for architecture in ("gpt2", "llama"):
        base, data = tiny_folder(lab, architecture), data_folder(lab, 40, 60)
        on_cpu = lab.folder / f"{architecture}-cpu"
        flags = ("--max-steps", "10", "--learning-rate", "1e-3")
        tiny = {"CONTEXT_TOKENS": 64, "OVERLAP_TOKENS": 8}
        said = run_training(lab, base, data, on_cpu, *flags, "--cpu", PRECISION="fp32", **tiny)
        lab.same(f"{architecture}, CPU, fp32: it came to its end", said or "done", "done")
        expected = losses_of(report_of(on_cpu)["log"])

        for precision, bound in bounds.items():
            name = f"{architecture}, {lab.device.type}, {precision}"
            output = lab.folder / f"{architecture}-{precision}"
            said = run_training(lab, base, data, output, *flags, PRECISION=precision, **tiny)
            lab.same(f"{name}: it came to its end", said or "done", "done")
            if said:
                continue

            found = losses_of(report_of(output)["log"])
            compared = updates_that_compare(report_of(output)["log"])
            difference = largest_difference(found[:compared], expected[:compared])
            lab.at_most(f"{name}: losses beside the CPU's, {compared} of {len(found)}", difference, bound, "nats")
            lab.same(f"{name}: the saved folder is loaded and writes", tokens_written_by(output), 8, "tokens")


def tiny_folder(lab: Lab, architecture: str) -> Path:
    extra = {} if architecture == "gpt2" else {"intermediate_size": 64, "num_key_value_heads": 1}
    return conftest.make_model_folder(lab.folder / architecture, architecture, architecture != "gpt2", **extra)


def updates_that_compare(log: list[dict]) -> int:
    """Losses up to the first update that float16's loss scaling skipped: after it the weights are other ones."""
    entries = [entry for entry in log if "train_loss" not in entry]
    skipped = [place for place, entry in enumerate(entries) if entry.get("skipped")]
    return min(skipped) + 1 if skipped else len(entries)


def tokens_written_by(folder: Path) -> int:
    model, tokenizer = test_model.load_tuned(folder)
    prompts = [test_model.request_tokens(tokenizer, "What's on your mind today?")]
    return len(write(model, prompts, greedy(8))[0])


# ---------------------------------------------------------------------------- stage 2
ISOLATED = {
    "gpt2": {},
    "llama": {"intermediate_size": 128, "num_key_value_heads": 1},
    "gpt_neox": {"intermediate_size": 128},
    "qwen2": {"intermediate_size": 128, "num_key_value_heads": 1},
}
KERNELS = {
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
}
# What PyTorch, and cuDNN through it, say when a kernel is not made for this card, or not for these numbers.
NO_KERNEL = ("No available kernel", "No viable backend", "execution plan")


def isolation(lab: Lab) -> None:
    """Documents in a row must not see each other, to the last bit, whichever kernel does the attention."""
    kernels = ("efficient", "math", "cuDNN") if lab.has_card else ("flash", "math")
    precisions = ("fp32", "bf16", "fp16") if lab.has_card else ("fp32", "bf16")
    missing = set()
    for architecture, extra in ISOLATED.items():
        config = transformers.AutoConfig.for_model(
            architecture, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=500,
            max_position_embeddings=256, **extra,
        )  # fmt: skip
        model = model_on(lab.device, config).eval()

        leaks = []
        ways = 0
        for precision in precisions:
            for kernel in kernels:
                try:
                    with sdpa_kernel(KERNELS[kernel]):
                        logits, gradients = leaked(lab, model, precision)
                except RuntimeError as error:
                    if not any(words in str(error) for words in NO_KERNEL):
                        raise
                    missing.add(f"{kernel} in {precision}")
                    continue
                ways += 1
                if logits or gradients:
                    leaks.append(f"{kernel} in {precision}: {logits} logits, {gradients} gradients")
        what = f"{architecture}: ways, of {ways}, in which another document is seen"
        lab.same("; ".join([what, *leaks]), len(leaks), 0)
        lab.at_least(f"{architecture}: ways in which attention can be computed", ways, len(precisions))
    lab.figure("kernels that this device lacks", ", ".join(sorted(missing)) or "none")


def leaked(lab: Lab, model, precision: str) -> tuple[int, int]:
    """(logits of the second documents that another first document changes, entries of the gradient that reach it).

    Two rows of two documents each, the second row is padded.
    """
    first, rows, changed = 40, [], []
    source = np.random.default_rng(0)
    for second in (57, 23):
        for where, seed in ((rows, 1), (changed, 2)):
            before = np.random.default_rng(seed).integers(1, 500, first).tolist()
            where.append([before])
        after = source.integers(1, 500, second).tolist()
        rows[-1].append(after)
        changed[-1].append(after)

    logits, gradient = read_pairs(lab, model, rows, precision)
    other, _ = read_pairs(lab, model, changed, precision)
    if not gradient[:, first:].any() or torch.isnan(logits).any():
        raise AssertionError("the second documents have no gradient of their own, so that of the first says nothing")
    return int((logits != other).sum()), int((gradient[:, :first] != 0).sum())


def read_pairs(lab: Lab, model, pairs: list[list[list[int]]], precision: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(logits of the second documents, gradient of their loss at the embeddings (rows, tokens, width))."""
    examples = []
    for first, second in pairs:
        unscored = [train_model.UNSCORED] * (len(first) + 1)
        positions = [*range(len(first)), *range(len(second))]
        examples.append({"input_ids": first + second, "labels": unscored + second[1:], "position_ids": positions})
    batch = {name: tensor.to(lab.device) for name, tensor in train_model.collate(examples).items()}

    embedded = []
    hook = model.get_input_embeddings().register_forward_hook(lambda module, inputs, output: embedded.append(output))
    with train_model.autocast(lab.device, precision):
        logits, targets = train_model.scored_logits(model, batch)
        loss = train_model.SummedCrossEntropy.apply(logits, targets)
    hook.remove()

    seen = logits.detach().clone()  # the loss may work in place
    return seen, torch.autograd.grad(loss, embedded[0])[0]


# ---------------------------------------------------------------------------- stage 3
def attention(lab: Lab) -> None:
    """Which kernels do the attention, and what a length costs that was not there before."""
    size = lab.size._replace(layers=2, vocabulary=500)
    model = model_on(lab.device, config_of(size))
    for precision in ("bf16", "fp16") if lab.has_card else ("bf16",):
        for cudnn in (False, True) if lab.has_card else (False,):
            torch.backends.cuda.enable_cudnn_sdp(cudnn)
            for length in (size.context, size.context - 15):
                for documents in (1, 2):
                    operations, kernels = attention_used(lab, model, row_of(lab, size, length, documents), precision)
                    what = f"{precision}, cuDNN {'on' if cudnn else 'off'}, {length} tokens, {documents} documents"
                    # With cuDNN allowed its version decides, so that is a figure.
                    wanted = expected_attention(lab, precision, documents)
                    if cudnn:
                        lab.figure(f"{what}: attention", operations)
                    else:
                        lab.same(f"{what}: attention", operations, wanted)
                    lab.figure(f"{what}: kernels", kernels)

    # Lengths of their own for each, because a plan that is made stays.
    for first, cudnn in enumerate((False, True) if lab.has_card else (False,)):
        torch.backends.cuda.enable_cudnn_sdp(cudnn)
        lengths = range(size.context // 2 + first, size.context - 1, size.context // 26)
        cost = 1000 * cost_of_new_length(lab, model, size, lengths)
        what = f"a length seen for the first time, cuDNN {'on' if cudnn else 'off'}, {len(lengths)} of them"
        # Half a second each is what others saw with cuDNN on; a tenth of that is the bound without.
        if lab.has_card and not cudnn:
            lab.at_most(what, cost, 50, "ms")
        else:
            lab.figure(what, cost, "ms")
    if not lab.has_card:
        lab.needs_card("cuDNN's attention")


def row_of(lab: Lab, size: Size, length: int, documents: int) -> dict[str, torch.Tensor]:
    source = np.random.default_rng(length)
    ids = source.integers(1, size.vocabulary, length).tolist()
    border = length // documents
    positions = [*range(border), *range(length - border)]
    example = {"input_ids": ids, "labels": ids, "position_ids": positions[:length]}
    return {name: tensor.to(lab.device) for name, tensor in train_model.collate([example]).items()}


def expected_attention(lab: Lab, precision: str, documents: int) -> str:
    """By PyTorch's order of choice: flash takes no mask, and neither it nor bfloat16 is for cards before RTX 30xx."""
    if not lab.has_card:
        return "flash_attention_for_cpu"
    is_new = torch.cuda.get_device_capability(lab.device) >= (8, 0)
    if is_new and documents == 1:
        return "flash_attention"
    return "efficient_attention" if is_new or precision == "fp16" else "attention_math"


def attention_used(lab: Lab, model, batch: dict, precision: str) -> tuple[str, str]:
    """(PyTorch's operations of attention, the names of the card's kernels for it) in one row, there and back."""
    forward_backward(lab, model, batch, precision)  # the first time also loads and plans
    profile = profile_of(lab, lambda: forward_backward(lab, model, batch, precision))

    prefix = "aten::_scaled_dot_product_"
    operations = set()
    kernels = set()
    for event in profile.events():
        if event.name.startswith(prefix) and "backward" not in event.name:
            operations.add(event.name.removeprefix(prefix))
        words = ("fmha", "flash", "attention", "sdpa")
        if event.device_type == DeviceType.CUDA and any(word in event.name.lower() for word in words):
            kernels.add(event.name.removeprefix("void ")[:60])
    return " ".join(sorted(operations)), " ".join(sorted(kernels)) or "none named so"


def profile_of(lab: Lab, act: Callable[[], object]) -> torch.profiler.profile:
    activities = [torch.profiler.ProfilerActivity.CPU]
    if lab.has_card:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        act()
        lab.wait()
    return profile


def cost_of_new_length(lab: Lab, model, size: Size, lengths: range) -> float:
    """Seconds that the first row of a length takes longer than the second, forward and backward; the median."""
    model.train()
    forward_backward(lab, model, row_of(lab, size, size.context, 2), lab.precision)
    more = []
    for length in lengths:
        batch = row_of(lab, size, length, 2)
        first = lab.seconds(lambda batch=batch: forward_backward(lab, model, batch, lab.precision))
        second = lab.seconds(lambda batch=batch: forward_backward(lab, model, batch, lab.precision))
        more.append(first - second)
    return statistics.median(more)


# ---------------------------------------------------------------------------- stage 4
def low_precision(lab: Lab) -> None:
    """GPT2-medium's losses and gradients in each precision, and where autocast is on."""
    updates = 12 if lab.has_card else 3
    rows = random_rows(lab.size, updates * UPDATE)
    precisions = ("fp32", "bf16", "fp16") if lab.has_card else ("fp32", "bf16")
    compare_gradients(lab, rows.select(range(UPDATE)), precisions)

    curves = {}
    for name in precisions:
        curves[name] = losses_after(lab, rows, name, updates, cast_once=True)
        if name != "fp32":
            difference = largest_difference(curves[name], curves["fp32"])
            lab.figure(f"{name}: losses of {updates} updates beside float32's", difference, "nats")

    # What CastWeightsOnce is for saves time and must change nothing else.
    plain = losses_after(lab, rows, lab.precision, updates, cast_once=False)
    difference = largest_difference(plain, curves[lab.precision])
    lab.at_most(f"{lab.precision}: losses without CastWeightsOnce beside those with it", difference, 1e-3, "nats")
    watch_autocast(lab, rows)


def compare_gradients(lab: Lab, rows, precisions: tuple[str, ...]) -> None:
    """Whether one update's gradient points where float32's does."""
    # Of GPT2-medium's width on a CPU, two rows of 128 tokens: 5e-5 in bfloat16. The bounds are guesses above that.
    bounds = {"bf16": 1e-3, "fp16": 1e-4}
    model = model_on(lab.device, config_of(lab.size))
    batches = batches_of(lab, rows, 1)
    exact = []
    for name in precisions:
        model.zero_grad()
        # float16 loses what is below 6e-8, which is why Trainer scales its loss; here by a number that never overflows.
        for batch in batches:
            forward_backward(lab, model, batch, name, scale=1024.0)
        gradient = [weight.grad.to_dense() for weight in model.parameters()]
        if name == "fp32":
            exact = [part.clone() for part in gradient]
        else:
            short_of_1 = 1 - cosine(gradient, exact)
            lab.at_most(f"{name}: the gradient's cosine with float32's is short of 1 by", short_of_1, bounds[name])
    model.zero_grad()
    lab.forget()


def cosine(one: list[torch.Tensor], other: list[torch.Tensor]) -> float:
    """Of all parameters together."""

    def product(a: list[torch.Tensor], b: list[torch.Tensor]) -> float:
        return sum((x * y).sum(dtype=torch.float64).item() for x, y in zip(a, b, strict=True))

    return product(one, other) / math.sqrt(product(one, one) * product(other, other))


def losses_after(lab: Lab, rows, name: str, updates: int, cast_once: bool) -> list[float]:
    model = model_on(lab.device, config_of(lab.size))
    callbacks = [train_model.CastWeightsOnce(lab.device)] if cast_once else []
    trainer = trainer_for(lab, model, rows, WayToTrain(FUSED, False, 1), name, updates, callbacks)
    trainer.train()
    skipped = sum(bool(entry.get("skipped")) for entry in trainer.state.log_history)
    if name == "fp16":
        lab.figure("fp16: updates skipped", skipped)
    losses = losses_of(trainer.state.log_history)
    del trainer, model
    lab.forget()
    return losses


class Watch(TrainerCallback):
    """What autocast is doing when an update is over; stands before and after CastWeightsOnce in the list."""

    def __init__(self, lab: Lab):
        self.lab = lab
        self.was_on = False
        self.allocated = []

    def on_pre_optimizer_step(self, *_, **__):
        self.was_on = self.was_on or torch.is_autocast_enabled(self.lab.device.type)
        if self.lab.has_card:
            self.allocated.append(torch.cuda.memory_allocated())


def watch_autocast(lab: Lab, rows) -> None:
    """Autocast is off but in the forward pass, and its copies of the weights are gone when the optimizer comes."""
    model = model_on(lab.device, config_of(lab.size))
    in_backward = []
    for weight in model.parameters():
        weight.register_post_accumulate_grad_hook(
            lambda _: in_backward.append(torch.is_autocast_enabled(lab.device.type))
        )

    before, after = Watch(lab), Watch(lab)
    callbacks = [before, train_model.CastWeightsOnce(lab.device), after]
    way = WayToTrain(FUSED, False, 1)
    trainer = trainer_for(lab, model, rows, way, lab.precision, 1, callbacks)
    cast = casts_in(lab, trainer)
    lab.same("gradients that were made under autocast", sum(in_backward), 0)
    lab.at_least("gradients that were looked at", len(in_backward), UPDATE)
    lab.same("autocast is on before the optimizer's step", str(before.was_on or after.was_on), "False")

    if lab.is_real:
        # Of two bytes a parameter; positions and norms have no copy.
        copies = 2 * sum(weight.numel() for weight in model.parameters())
        freed = before.allocated[0] - after.allocated[0]
        lab.at_least("share of the weights' copies that is freed before the step", freed / copies, 0.95)
    else:
        lab.needs_card("memory of GPT2-medium's copied weights")

    del trainer, model
    lab.forget()
    model = model_on(lab.device, config_of(lab.size))
    without = casts_in(lab, trainer_for(lab, model, rows, way, lab.precision, 1, []))
    lab.figure("casts in an update without CastWeightsOnce", without)
    lab.at_most("casts in an update with it", cast, without - 1)


def casts_in(lab: Lab, trainer) -> int:
    profile = profile_of(lab, trainer.train)
    return sum(event.count for event in profile.key_averages() if event.key == "aten::_to_copy")


# ---------------------------------------------------------------------------- stage 5
# What an 8 GB card has free beside a desktop, and less than that for tensors.
FREE_OF_8_GB = 7_200_000_000
CAP_OF_8_GB = 6_600_000_000
TOO_LITTLE = 4_000_000_000


def memory(lab: Lab) -> None:
    """Whether memory_needed tells the truth, and whether GPT2-medium trains on a card with 8 GB."""
    base, data = model_folder(lab, lab.size), data_folder(lab, 420 if lab.has_card else 60, lab.size.context)
    refuse(lab, base, data)
    measure_ways(lab)
    train_on_8_gb(lab, base, data)


def refuse(lab: Lab, base: Path, data: Path) -> None:
    """Less memory than any way needs: one sentence, and no weights are loaded for it."""
    free = TOO_LITTLE if lab.size == MEDIUM else 500_000_000
    settings = {"PRECISION": "fp16", "free_memory": lambda device: free}
    said = run_training(lab, base, data, lab.folder / "refused", **settings)
    lab.figure(f"said when {free / 1e9:.1f} GB are free", said or "nothing")
    is_refusal = said.startswith("Training needs about") and said.count("\n") == 0
    lab.same(f"it is refused in one sentence when {free / 1e9:.1f} GB are free", str(is_refusal), "True")


def train_on_8_gb(lab: Lab, base: Path, data: Path) -> None:
    """A whole run with evaluations, samples, checkpoints and the check of what was saved, under a cap on memory."""
    updates = 30 if lab.has_card else 4
    output = lab.folder / "capped"
    settings = {
        "PRECISION": "fp16" if lab.has_card else "bf16",
        "free_memory": lambda device: FREE_OF_8_GB,
        "prepare_card": be_an_8_gb_card,
        "CHECKPOINT_MINUTES": 0.15,
    }
    lab.forget()
    if lab.has_card:
        torch.cuda.reset_peak_memory_stats()
    # Three trials before it, whose memory has to be free again.
    flags = ("--max-steps", str(updates), "--learning-rate", "auto")
    said = run_training(lab, base, data, output, *flags, **settings)
    lab.same(
        f"{updates} updates, evaluated, saved and checked, with {FREE_OF_8_GB / 1e9} GB free", said or "done", "done"
    )

    if not said:
        plan = report_of(output)["plan"]
        recomputed = ", activations computed twice" if plan["checkpointing"] else ""
        lab.figure("its plan", f"{plan['optimizer']}, {plan['rows_at_once']} rows at once{recomputed}")
    if lab.has_card:
        lab.figure("memory reserved at most", torch.cuda.max_memory_reserved() / 1e9, "GB")
    else:
        lab.needs_card("memory under the cap")


def be_an_8_gb_card(device: torch.device) -> None:
    """In prepare_card's place: the cap, and the kernels of attention that an RTX 20xx has."""
    if device.type != "cuda":
        return
    torch.backends.cuda.enable_cudnn_sdp(False)
    torch.backends.cuda.enable_flash_sdp(False)
    _, total = torch.cuda.mem_get_info()
    torch.cuda.set_per_process_memory_fraction(min(1.0, CAP_OF_8_GB / total))


def measure_ways(lab: Lab) -> None:
    """The peak of every way to train beside what memory_needed says, in rows that are full."""
    torch.backends.cuda.enable_cudnn_sdp(False)
    shape = train_model.shape_of(config_of(lab.size))
    rows = full_rows(lab.size, 2 * UPDATE)
    before = torch.cuda.memory_allocated() if lab.has_card else 0
    # One model for all: bitsandbytes would keep the embeddings of each.
    model = model_on(lab.device, config_of(lab.size))

    for name in ("bf16", "fp16") if lab.has_card else ("bf16",):
        for optimizer, checkpointing in train_model.OPTIMIZERS:
            for rows_at_once in (1, 2, 4, 8) if lab.has_card else (2,):
                way = WayToTrain(optimizer, checkpointing, rows_at_once)
                needed = sum(train_model.memory_needed(shape, lab.size.context, name, way, lab.device.type).values())
                measure_way(lab, model, rows, way, name, before, needed)

    # No plan counts with it, but bfloat16 on an RTX 20xx, where somebody insists on it, gets no other attention.
    if lab.has_card:
        with sdpa_kernel(SDPBackend.MATH):
            measure_way(lab, model, rows, WayToTrain(EIGHT_BITS, False, 1), "bf16", before, None)
    else:
        lab.needs_card("peaks of memory")


def measure_way(lab: Lab, model, rows, way: WayToTrain, name: str, before: int, needed: int | None) -> None:
    """`before` are bytes that are not this run's; `needed` is the forecast, None where there is none."""
    lab.forget()
    if lab.has_card:
        torch.cuda.reset_peak_memory_stats()
    trainer = trainer_for(lab, model, rows, way, name, 2, [train_model.CastWeightsOnce(lab.device)])
    trainer.train()
    model.activation_checkpointing_disable()
    model.zero_grad()

    recomputed = ", computed twice" if way.checkpointing else ""
    what = f"{name}, {way.optimizer}{recomputed}, {way.rows_at_once} rows at once"
    if not lab.has_card:
        losses = losses_of(trainer.state.log_history)
        lab.same(f"{what}: losses that are no number", sum(map(math.isnan, losses)), 0)
        return
    peak = torch.cuda.max_memory_allocated() - before
    reserved = torch.cuda.max_memory_reserved()
    told = f"{what}: peak of {peak / 1e9:.2f} GB ({reserved / 1e9:.2f} reserved)"
    if needed is None:
        lab.figure(f"{what}, attention by single products: peak", peak / 1e9, "GB")
    elif not lab.is_real:
        lab.figure(told, needed / 1e9, "GB needed")
    else:
        lab.at_most(f"{told} beside {needed / 1e9:.2f} GB: apart by", abs(peak / needed - 1), 0.15)


# ---------------------------------------------------------------------------- stage 6
WARM_UP = 2  # updates that no speed is read from


class Wall(TrainerCallback):
    """The time at the end of each update, and how much of it Progress has counted; stands after Progress."""

    def __init__(self, progress: train_model.Progress):
        self.progress = progress
        self.marks = []

    def on_step_end(self, *_, **__):
        self.marks.append((time.perf_counter(), self.progress.seconds))


def speed(lab: Lab) -> None:
    """Tokens a second beside the stock recipe and bare products, and that rows at once change no loss."""
    torch.backends.cuda.enable_cudnn_sdp(False)
    updates = WARM_UP + (10 if lab.has_card else 2)
    name = lab.precision

    bare = {}
    for tokens in (lab.size.context, UPDATE * lab.size.context):
        numbers = test_model.NUMBERS[name]
        seconds, share = time_products(config_of(lab.size), tokens, numbers, lab.device)
        bare[tokens] = tokens * share / seconds
        lab.figure(f"bare products, {tokens} tokens at once", bare[tokens], "tokens/s")
    lab.forget()

    stock = time_stock(lab, name, updates)
    lab.figure("stock recipe, one row after the other", stock, "tokens/s")
    lab.figure("stock recipe beside the bare products", stock / bare[lab.size.context], "times")

    rows = random_rows(lab.size, updates * UPDATE)
    losses = {}
    best = 0.0
    for rows_at_once in (1, 2, 4, 8):
        losses[rows_at_once], ours = time_ours(lab, rows, rows_at_once, name, updates)
        lab.figure(f"{rows_at_once} rows at once beside the bare products", ours / max(bare.values()), "times")
        best = max(best, ours)
    if lab.is_real:
        lab.at_least("the fastest of them beside the stock recipe", best / stock, 1.0, "times")
    difference = largest_difference(losses[1], losses[8])
    lab.at_most(f"{name}: losses of 8 rows at once beside 1", difference, 1e-3, "nats")

    few = rows.select(range(4 * UPDATE))
    exact = [losses_and_times(lab, few, rows_at_once, "fp32", 4)[0] for rows_at_once in (1, 8)]
    lab.at_most("fp32: losses of 8 rows at once beside 1", largest_difference(*exact), 5e-5, "nats")

    host_time(lab)
    for rows_at_once in (1, 8):
        busy_share(lab, rows.select(range(UPDATE)), rows_at_once)


def time_stock(lab: Lab, name: str, updates: int) -> float:
    """Tokens a second of the stock recipe: one document a row, cut at the context; the median update."""
    model = model_on(lab.device, config_of(lab.size, ours=False))
    tokenizer = conftest.make_tokenizer(chatml=False)
    tokenizer.pad_token = tokenizer.eos_token
    documents = random_documents(lab.size, 4 * updates * UPDATE * lab.size.context)
    rows = [{"input_ids": document[: lab.size.context]} for document in documents[: updates * UPDATE]]
    clock = Clock()
    with contextlib.redirect_stdout(sys.stderr):  # where it prints its log
        stock_trainer(model, tokenizer, rows, updates, name, clock).train()
    del model
    lab.forget()
    return median_speed([len(row["input_ids"]) for row in rows], clock.seconds)


def time_ours(lab: Lab, rows, rows_at_once: int, name: str, updates: int) -> tuple[list[float], float]:
    """(losses, tokens a second of the median update); tells more."""
    losses, clock, wall = losses_and_times(lab, rows, rows_at_once, name, updates)
    tokens = [len(ids) for ids in rows["input_ids"]]
    median = median_speed(tokens, clock.seconds)
    what = f"ours, {rows_at_once} rows at once"
    lab.figure(what, median, "tokens/s")

    # Whoever waits looks at another clock: it also counts what lies between two updates.
    (began, counted), (ended, counted_by_then) = wall.marks[WARM_UP - 1], wall.marks[-1]
    passed = ended - began
    lab.figure(f"{what}, all that passes counted", sum(tokens[WARM_UP * UPDATE :]) / passed, "tokens/s")
    told = f"{what}: printed speed beside the true one"
    if lab.is_real:
        lab.at_most(told, passed / (counted_by_then - counted), 1.25, "times")
    else:
        lab.figure(told, passed / (counted_by_then - counted), "times")
    return losses, median


def losses_and_times(lab: Lab, rows, rows_at_once: int, name: str, updates: int) -> tuple[list[float], Clock, Wall]:
    model = model_on(lab.device, config_of(lab.size))
    clock = Clock()
    progress = train_model.Progress(train_model.scored_tokens(rows))
    wall = Wall(progress)
    callbacks = [train_model.CastWeightsOnce(lab.device), progress, clock, wall]
    trainer = trainer_for(lab, model, rows, WayToTrain(FUSED, False, rows_at_once), name, updates, callbacks)
    trainer.train()
    losses = losses_of(trainer.state.log_history)
    del trainer, model
    lab.forget()
    return losses, clock, wall


def median_speed(tokens: list[int], seconds: list[float]) -> float:
    """Tokens a second, of the updates after the first ones."""
    per_update = [sum(tokens[start : start + UPDATE]) for start in range(0, len(tokens), UPDATE)]
    return statistics.median(count / took for count, took in list(zip(per_update, seconds, strict=True))[WARM_UP:])


def host_time(lab: Lab) -> None:
    """What Python takes for a row, whatever the card: the layers of the model, and hardly any work in them."""
    thin = lab.size._replace(width=64, heads=2, vocabulary=500)
    model = model_on(lab.device, config_of(thin))
    batch = row_of(lab, thin, 64, 2)
    with torch.autocast(lab.device.type, enabled=False):  # as CastWeightsOnce does
        took = [lab.seconds(lambda: forward_backward(lab, model, batch, lab.precision)) for _ in range(12)]
    lab.figure("a row's host time", 1000 * statistics.median(took[2:]), "ms")


def busy_share(lab: Lab, rows, rows_at_once: int) -> None:
    """How much of an update's rows the card is at work; the rest it waits for Python."""
    model = model_on(lab.device, config_of(lab.size))
    batches = batches_of(lab, rows, rows_at_once)

    def act() -> None:
        with torch.autocast(lab.device.type, enabled=False):
            for batch in batches:
                forward_backward(lab, model, batch, lab.precision)

    act()
    seconds = min(lab.seconds(act) for _ in range(2))
    profile = profile_of(lab, act)
    at_work = 0.0  # microseconds
    for event in profile.events():
        # An annotation spans kernels that are counted themselves.
        if event.device_type == DeviceType.CUDA and not event.is_user_annotation:
            at_work += event.time_range.elapsed_us()
    what = f"share of an update's rows that the card is busy, {rows_at_once} rows at once"
    if lab.has_card:
        lab.figure(what, at_work / 1e6 / seconds)
    else:
        lab.needs_card(what)


# ---------------------------------------------------------------------------- stage 7
RESUMED_UPDATES = 8
KILLED_AFTER = 4
SCALE = 1024.0  # of float16's loss: not the one that a new run begins with


def resume(lab: Lab) -> None:
    """A run that is killed, or asked to stop, goes on as if nothing had happened: 8-bit Adam, float16's scale."""
    base = model_folder(lab, resumed_size(lab))
    data = data_folder(lab, 60, lab.size.context)
    whole = train_resumably(lab, base, data, lab.folder / "whole")
    lab.same("without interruption", whole.said or "done", "done")

    # Only another process can be killed.
    command = [sys.executable, str(HERE / "bench_gpu.py"), "--victim", str(lab.folder)]
    killed = subprocess.run([*command, *([] if lab.size == MEDIUM else ["--tiny"])], stdout=sys.stderr, check=False)
    lab.same("exit status of the killed run", killed.returncode, -signal.SIGKILL)
    stopped = train_resumably(lab, base, data, lab.folder / "stopped", at_update=stop_kindly)
    lab.figure("said by the run that was asked to stop", stopped.said)

    # Who is asked to stop makes the update that has begun.
    for name, done in {"killed": KILLED_AFTER, "stopped": KILLED_AFTER + 1}.items():
        again = train_resumably(lab, base, data, lab.folder / name)
        lab.same(f"{name}: continued after update", again.began, done)
        if again.losses:
            difference = largest_difference(again.losses, whole.losses)
            lab.at_most(f"{name}: losses beside the uninterrupted run's", difference, 1e-4, "nats")
        lab.same(f"{name}: kinds of numbers in the optimizer's state", again.kinds, whole.kinds)
        if lab.has_card:
            lab.same(f"{name}: scale of the loss", again.scale, SCALE)
    if not lab.has_card:
        lab.needs_card("the scale of float16's loss")


def resumed_size(lab: Lab) -> Size:
    """Few layers, so that a checkpoint is small; tensors of 4,096 numbers or more, or none would have 8 bits."""
    return lab.size._replace(layers=4, width=256, heads=4, vocabulary=500) if lab.has_card else lab.size


class Resumed(NamedTuple):
    """What a run, or the rest of it, was like."""

    said: str
    losses: list[float]  # also of the updates before it was interrupted
    began: int  # after so many updates
    kinds: str  # of numbers in the optimizer's state at the end
    scale: float  # of the loss, before the first update that was its own


class Look(TrainerCallback):
    """Looks into the trainer, sets the scale of the loss in a run that begins, and calls `act` before one update."""

    def __init__(self, trainer, act: Callable[[], None] | None):
        self.trainer = trainer
        self.act = act
        self.began = None
        self.kinds = ""
        self.scale = 0.0

    def on_step_begin(self, args, state, control, **_):
        scaler = self.trainer.accelerator.scaler
        # Before its first loss a scaler has nothing that could be set.
        if scaler is not None and self.began == 0 and state.global_step == 1:
            scaler.update(SCALE)
        if self.began is None:
            self.began = state.global_step
        if scaler is not None and state.global_step == max(self.began, 2):
            self.scale = scaler.get_scale()
        if self.act and state.global_step == KILLED_AFTER:
            self.act()

    def on_train_end(self, args, state, control, **_):
        kinds = set()
        for values in self.trainer.optimizer.state.values():
            kinds |= {str(value.dtype) for value in values.values() if isinstance(value, torch.Tensor)}
        self.kinds = " ".join(sorted(kinds))


def train_resumably(lab: Lab, base: Path, data: Path, output: Path, at_update: Callable | None = None) -> Resumed:
    looks = []
    build = train_model.build_trainer

    def build_and_look(*arguments):
        trainer = build(*arguments)
        looks.append(Look(trainer, at_update))
        trainer.add_callback(looks[-1])
        return trainer

    settings = {
        "PRECISION": "fp16" if lab.has_card else "fp32",
        "OPTIMIZERS": ((EIGHT_BITS, False),),
        "CHECKPOINT_MINUTES": 0,
        "build_trainer": build_and_look,
    }
    flags = ("--max-steps", str(RESUMED_UPDATES), "--learning-rate", "1e-3")
    said = run_training(lab, base, data, output, *flags, **settings)
    if not looks:
        raise RuntimeError(f"no update was made: {said}")
    losses = [] if said else losses_of(report_of(output)["log"])
    look = looks[0]
    return Resumed(said, losses, look.began, look.kinds, look.scale)


def stop_kindly() -> None:
    """As a machine that shuts down; the update that comes is the last."""
    os.kill(os.getpid(), signal.SIGTERM)


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


# ---------------------------------------------------------------------------- stage 8
def checkpoint(lab: Lab) -> None:
    """How long a checkpoint and the best weights take, and whether they are as large as check_disk says."""
    lab.figure("file system of the folder for temporary files", file_system(lab.folder))
    model = model_on(lab.device, config_of(lab.size))
    parameters = model.num_parameters()
    rows = random_rows(lab.size, UPDATE)
    callbacks = [train_model.CastWeightsOnce(lab.device)]
    folder = lab.folder / "checkpoint"
    for optimizer in (FUSED, EIGHT_BITS):
        trainer = trainer_for(lab, model, rows, WayToTrain(optimizer, False, 1), lab.precision, 1, callbacks)
        trainer.train()
        folder.mkdir()

        # The parts of Trainer's _save_checkpoint that take time, and what Checkpoints does after it.
        parts = {
            "weights": lambda trainer=trainer: trainer.save_model(str(folder), _internal_call=True),
            "optimizer": lambda trainer=trainer: trainer._save_optimizer_and_scheduler(str(folder)),
            "having it on the disk": lambda: train_model.flush_to_disk(folder),
        }
        for name, act in parts.items():
            lab.figure(f"checkpoint, {optimizer}: {name}", lab.seconds(act), "s")
        lab.at_most(f"checkpoint, {optimizer}", megabytes(folder), (12 * parameters + 1e6) / 1e6, "MB")
        shutil.rmtree(folder)
        del trainer
        model.zero_grad()
        lab.forget()

    keep = train_model.KeepBest()
    lab.figure("best weights, with having them on the disk", lab.seconds(lambda: keep.save(model, lab.folder)), "s")
    lab.at_most("best weights", megabytes(lab.folder / "best"), (4 * parameters + 1e6) / 1e6, "MB")


def megabytes(folder: Path) -> float:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6


def file_system(folder: Path) -> str:
    """Its kind; a tmpfs is memory, and its seconds say nothing about a disk."""
    mounted = [part for part in psutil.disk_partitions(all=True) if folder.is_relative_to(part.mountpoint)]
    return max(mounted, key=lambda part: len(part.mountpoint)).fstype if mounted else "unknown"


# ---------------------------------------------------------------------------- stage 9
def sampling(lab: Lab) -> None:
    """test_model.py's own loop beside transformers' generate: the same words, and how fast."""
    torch.backends.cuda.enable_cudnn_sdp(False)
    model = model_on(lab.device, config_of(lab.size)).eval()
    source = np.random.default_rng(0)
    count = 24 if lab.has_card else 4
    prompts = []
    for _ in range(count):
        length = int(source.integers(4, lab.size.context // 8))
        prompts.append(source.integers(1, lab.size.vocabulary, length).tolist())

    tokens = 40 if lab.has_card else 12
    ours = write(model, prompts, greedy(tokens))
    theirs = write_by_transformers(model, prompts, greedy(tokens))
    equal = sum(a == b for one, other in zip(ours, theirs, strict=True) for a, b in zip(one, other, strict=True))
    lab.same(f"likeliest tokens in float32 that are generate's too, of {count} prompts", equal, count * tokens)

    tokens = 100 if lab.has_card else 12
    settings = GenerationConfig(do_sample=True, **{**train_model.SAMPLING, "max_new_tokens": tokens})
    for name in ("bf16", "fp16") if lab.has_card else ("bf16",):
        half = model.to(test_model.NUMBERS[name])
        write(half, prompts[:2], greedy(4))  # the first time loads kernels
        ways = {
            f"ours, {count} prompts": (write, prompts),
            "ours, one prompt": (write, prompts[:1]),
            f"generate, {count} prompts": (write_by_transformers, prompts),
        }
        for way, (act, some) in ways.items():
            seconds = lab.seconds(lambda act=act, some=some, half=half: act(half, some, settings))
            lab.figure(f"{way}, {name}", len(some) * tokens / seconds, "tokens/s")
    compare_cudnn(lab, model, prompts)
    room_for_base(lab, model)


def greedy(tokens: int) -> GenerationConfig:
    return GenerationConfig(do_sample=False, max_new_tokens=tokens, repetition_penalty=1.0)


def write(model, prompts: list[list[int]], settings: GenerationConfig) -> list[list[int]]:
    """The answers' tokens by test_model.generate; none ends early."""
    settings.eos_token_id = []
    answers = [[] for _ in prompts]
    for step in test_model.generate(model, prompts, settings, test_model.make_dice(0)):
        for number, token, _ in step:
            answers[number].append(token)
    return answers


def write_by_transformers(model, prompts: list[list[int]], settings: GenerationConfig) -> list[list[int]]:
    """The same by model.generate, in one batch, padded on the left."""
    settings.eos_token_id = None
    settings.pad_token_id = 0
    longest = max(map(len, prompts))
    padded = [[0] * (longest - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    ids = torch.tensor(padded, device=model.device)
    with torch.inference_mode():
        output = model.generate(
            input_ids=ids,
            attention_mask=torch.tensor(mask, device=model.device),
            generation_config=settings,
            use_cache=True,
        )
    return output[:, longest:].tolist()


def compare_cudnn(lab: Lab, model, prompts: list[list[int]]) -> None:
    """Each token makes the cache longer, so cuDNN plans anew for each: few tokens, or this takes all the time."""
    if not lab.has_card:
        lab.needs_card("what cuDNN's attention costs in writing")
        return
    tokens = 20
    for cudnn in (False, True):
        torch.backends.cuda.enable_cudnn_sdp(cudnn)
        seconds = lab.seconds(lambda: write(model, prompts, greedy(tokens)))
        lab.figure(f"a token for all prompts, cuDNN {'on' if cudnn else 'off'}", 1000 * seconds / tokens, "ms")
    torch.backends.cuda.enable_cudnn_sdp(False)


def room_for_base(lab: Lab, model) -> None:
    """The report moves the tuned model to the CPU before the base model comes: the card must then be empty."""
    if not lab.has_card:
        lab.needs_card("memory after the tuned model has gone")
        return
    lab.figure("memory of writing at most, all of this stage", torch.cuda.max_memory_allocated() / 1e9, "GB")
    model.to("cpu")
    lab.forget()
    # cuBLAS keeps some tens of megabytes to work in.
    lab.at_most("memory after the tuned model has gone", torch.cuda.memory_allocated() / 1e9, 0.2, "GB")


# ---------------------------------------------------------------------------- the machine
def machine(lab: Lab) -> None:
    """What the figures are of."""
    if lab.has_card:
        lab.figure("card", train_model.find_nvidia_card() or torch.cuda.get_device_name())
        lab.figure("compute capability", ".".join(map(str, torch.cuda.get_device_capability())))
        free, total = torch.cuda.mem_get_info()
        lab.figure("memory", f"{free / 1e9:.1f} GB of {total / 1e9:.1f} GB free")
        lab.figure("cuDNN", str(torch.backends.cudnn.version()))
    lab.figure("processor", f"{platform.machine()}, {os.cpu_count()} cores")
    lab.figure("PyTorch", f"{torch.__version__}, CUDA {torch.version.cuda}")
    lab.figure("transformers", transformers.__version__)
    lab.figure("Python", platform.python_version())
    lab.figure(DEVICE, lab.device.type)
    lab.figure(MODELS, "GPT2-medium's size" if lab.size == MEDIUM else "tiny")


DEVICE = "device"
MODELS = "models"


# ---------------------------------------------------------------------------- one process a stage
class Stage(NamedTuple):
    run: Callable[[Lab], None]
    limit: int  # seconds, with the start of Python


MACHINE = "machine"
STAGES = {
    "end-to-end": Stage(end_to_end, 55),
    "isolation": Stage(isolation, 25),
    "attention": Stage(attention, 40),
    "precision": Stage(low_precision, 60),
    "memory": Stage(memory, 120),
    "speed": Stage(speed, 70),
    "resume": Stage(resume, 60),
    "checkpoint": Stage(checkpoint, 35),
    "sampling": Stage(sampling, 35),
}
MACHINE_LIMIT = 60


def be_stage(args: argparse.Namespace) -> None:
    """The work of one stage, in its own process."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    act = machine if args.stage == MACHINE else STAGES[args.stage].run
    with tempfile.TemporaryDirectory(prefix="bench_gpu-") as folder:
        act(lab_for(args, Path(folder)))


def lab_for(args: argparse.Namespace, folder: Path) -> Lab:
    has_card = torch.cuda.is_available()
    device = torch.device("cuda" if has_card else "cpu")
    size = MEDIUM if has_card and not args.tiny else TINY
    return Lab(args.run, args.stage or "", args.results, folder, device, size)


def be_victim(args: argparse.Namespace) -> None:
    """The run of stage 7 that ends itself in the middle."""
    lab = lab_for(args, args.victim)
    train_resumably(lab, args.victim / "base", args.victim / "data", args.victim / "killed", at_update=kill)


def run_stages(names: list[str], args: argparse.Namespace) -> int:
    """All of them, one after the other; returns the exit status."""
    began = time.monotonic()
    run = datetime.datetime.now().isoformat(timespec="seconds")
    share = args.limit / LIMIT  # a slower machine has more time for each
    wrong = run_stage(MACHINE, args, run, MACHINE_LIMIT * share)
    if wrong:
        sys.exit(f"Nothing can be measured here: {wrong}")
    if facts_of(args.results, run)[MODELS] == "tiny":
        print("\nThe models are tiny: this tests the script, and no second or token of it is a figure.\n", flush=True)

    for name in names:
        left = args.limit - (time.monotonic() - began)
        run_stage(name, args, run, min(STAGES[name].limit * share, left))

    results = read_results(args.results, run)
    verdicts = {name: verdict_of([result for result in results if result.stage == name]) for name in names}
    print_tables(results, verdicts)
    print(f"\n{time.monotonic() - began:.0f} s in all; every line is in {args.results}")
    return 1 if FAIL in verdicts.values() else 0


def run_stage(name: str, args: argparse.Namespace, run: str, limit: float) -> str:
    """Starts the stage, waits for it, appends how it ended; returns what went wrong, "" if nothing did."""
    began = time.monotonic()
    wrong = ""
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as said:
        # A group of its own, because a stage may start processes too.
        process = subprocess.Popen(command_of(name, args, run), stderr=said, process_group=0)
        try:
            status = process.wait(max(limit, 0))
            if status:
                said.seek(0)
                wrong = f"exit status {status}: {last_line(said.read())}"
        except subprocess.TimeoutExpired:
            wrong = f"out of time after {max(limit, 0):.0f} s"
        finally:
            # Also when this process is asked to end.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

        if wrong:
            said.seek(0)
            print(*said.read().splitlines()[-LINES_OF_A_FAILURE:], sep="\n", file=sys.stderr, flush=True)

    seconds = time.monotonic() - began
    bound = f"at most {limit:.0f}"
    end = Result(run, name, ENDED, seconds, "s", bound, True)
    if wrong:
        end = Result(run, name, ENDED, wrong, "", bound, False)
    append(args.results, end)
    return wrong


ENDED = "came to its end"
LINES_OF_A_FAILURE = 40  # that are shown of what the stage said


def command_of(name: str, args: argparse.Namespace, run: str) -> list[str]:
    command = [sys.executable, str(HERE / "bench_gpu.py"), "--stage", name, "--run", run]
    command += ["--results", str(args.results)]
    return [*command, "--tiny"] if args.tiny else command


def last_line(text: str) -> str:
    """What a traceback ends with."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else "it said nothing"


# ---------------------------------------------------------------------------- tables
PASS, FAIL, NO_CARD = "PASS", "FAIL", "needs a card"


def read_results(path: Path, run: str) -> list[Result]:
    results = [Result(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
    return [result for result in results if result.run == run]


def facts_of(path: Path, run: str) -> dict[str, float | str]:
    return {result.what: result.value for result in read_results(path, run) if result.stage == MACHINE}


def verdict_of(results: list[Result]) -> str:
    """PASS if nothing failed; a stage of which only its end can be said here, for want of a card, has no verdict."""
    if any(result.passed is False for result in results):
        return FAIL
    checks = [result for result in results if result.passed and result.what != ENDED]
    wants_card = any(result.value == NO_CARD for result in results)
    return NO_CARD if wants_card and not checks else PASS


def print_tables(results: list[Result], verdicts: dict[str, str]) -> None:
    print("\n| stage | what | value | bound | |")
    print("|---|---|---:|---|---|")
    for result in results:
        verdict = {True: "ok", False: "NOT OK", None: ""}[result.passed]
        cells = [result.stage, result.what, result.shown(), result.bound, verdict]
        print("| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |")

    print("\n| stage | |")
    print("|---|---|")
    for name, verdict in verdicts.items():
        print(f"| {name} | {verdict} |")


# ---------------------------------------------------------------------------- command line
def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", nargs="+", choices=STAGES, default=list(STAGES), metavar="STAGE", help=", ".join(STAGES)
    )
    usual = Path(tempfile.gettempdir(), "bench_gpu.jsonl")
    parser.add_argument(
        "--results", type=Path, default=usual, metavar="FILE", help=f"appended to; {usual} if not given"
    )
    parser.add_argument("--tiny", action="store_true", help="tiny models, also on a card")
    parser.add_argument(
        "--limit",
        type=float,
        default=LIMIT,
        help=f"seconds for everything; {LIMIT} if not given, and for each stage its share",
    )
    parser.add_argument("--stage", choices=[MACHINE, *STAGES], help=argparse.SUPPRESS)
    parser.add_argument("--run", default="", help=argparse.SUPPRESS)
    parser.add_argument("--victim", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def end_politely(number, frame):
    """timeout(1) sends SIGTERM: the stage that runs must not outlive this process."""
    sys.exit("Stopped from outside.")


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    if args.victim:
        be_victim(args)
        return 0
    if args.stage:
        be_stage(args)
        return 0
    if not args.results.absolute().parent.is_dir():
        sys.exit(f"There is no folder {args.results.absolute().parent} for the results: make it, or name another file.")
    signal.signal(signal.SIGTERM, end_politely)
    return run_stages(args.only, args)


if __name__ == "__main__":
    sys.exit(main())
