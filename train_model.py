"""Fine-tune a small language model on the conversations that extract_blog_data.py wrote.

    python train_model.py

Reads data/train_data.jsonl and data/val_data.jsonl. Writes blog-model-final/: a model folder that
transformers loads as it is (safetensors), with a model card (README.md), training_report.json and
loss_curve.png. Stopped at any moment, the next run continues from the last checkpoint, which lies in
blog-model-final-unfinished/ until the model is complete. Prints, on two CPU cores:

    train    96 conversations, 23,387 tokens of the author's, 23,387 scored an epoch
    val      14 conversations, 3,183 tokens of the author's, 3,183 scored an epoch
    model    sample/model, 135M parameters, bf16 on cpu
    data     57 rows of up to 512 tokens, 8 updates
    memory   3.3 GB (weights 0.8, gradients 0.5, optimizer 1.1, activations 0.9) of 23.9 GB free
    disk     3.8 GB of 63 GB free
    epoch 0.00  update 0/8  validation 3.847  1.5486 bits per byte (+0.0000 against base)
    epoch 0.88  update 7/8  train 3.267  158 tokens/s  19 s left
    epoch 1.00  update 8/8  train 3.279  152 tokens/s  0 s left
    epoch 1.00  update 8/8  validation 3.169  1.2757 bits per byte (-0.2729 against base)
    Validation fell from 1.55 to 1.28 bits per byte over 14 conversations it never saw: it learned.
"""

import argparse
import ctypes
import gc
import hashlib
import inspect
import json
import math
import os
import shutil
import signal
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
if "WORLD_SIZE" not in os.environ:  # one process, one GPU; torchrun starts one process for each
    os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]

import numpy as np
import psutil
import torch
import transformers
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset
from jinja2.exceptions import TemplateError
from matplotlib.figure import Figure
from safetensors import SafetensorError
from torch.nn import functional
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    EarlyStoppingCallback,
    GenerationConfig,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

HERE = Path(__file__).resolve().parent

# ---------------------------------------------------------------------------- settings
BASE_MODEL = "gpt2-medium"  # a name on the Hugging Face hub, or a model folder; 355M parameters fit 8 GB
DATA_DIR = "data"
OUTPUT_DIR = "blog-model-final"

CONTEXT_TOKENS = 512  # longer posts are cut into windows of this length, shorter ones share one
OVERLAP_TOKENS = 32  # of a window are seen again from the window before, as context, and not scored twice
BATCH_SIZE = 1  # windows at once; 1 x 8 = 8 windows, 4,096 tokens per update
GRADIENT_ACCUMULATION = 8
EPOCHS = 3
MAX_STEPS = 0  # updates; 0 = as many as the epochs need
LEARNING_RATE = 2e-5  # for GPT2-medium; SmolLM2-135M gained more at every step up to 2e-4 (README, Figures)
WARMUP_SHARE = 0.1  # of all updates, rising to the learning rate; it falls to zero afterwards
DROPOUT = 0.0  # 0.1 is what GPT-2 was made with; it costs a fifth of the speed on a CPU
PRECISION = "bf16"  # "bf16", "fp16" (for an RTX 20xx and older) or "fp32"; weights are float32 in all three
SEED = 42

EVALUATIONS_PER_EPOCH = 2
PATIENCE = 3  # evaluations without a better one before training stops early
CHECKPOINT_EVERY = 50  # updates; what a crash can cost
SAMPLE_PROMPT = "What's on your mind today?"  # answered at each evaluation
SAMPLING = {"temperature": 0.8, "top_k": 50, "top_p": 0.95, "repetition_penalty": 1.1, "max_new_tokens": 200}

# Plain text instead of new control tokens: those would grow the vocabulary by rows that nothing has trained.
PLAIN_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "Assistant:{% generation %}{{ ' ' + message['content'] + eos_token }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ message['role'].capitalize() + ': ' + message['content'] + '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
# The same function in one kernel instead of eight: GPT-2 trains 7 % faster on a CPU.
FUSED_ACTIVATIONS = {"gelu_new": "gelu_pytorch_tanh", "gelu_fast": "gelu_pytorch_tanh"}
FAST_BFLOAT16 = ("avx512_bf16", "amx_bf16")  # processors without them train faster in float32
UNSCORED = -100  # label of a token that is context only


def say(text: str, end: str = "\n") -> None:
    """Progress and diagnostics go to stderr, from the first process only."""
    if os.environ.get("RANK", "0") == "0":
        print(text, end=end, file=sys.stderr, flush=True)


# ---------------------------------------------------------------------------- conversations
def read_conversations(path: Path) -> list[dict]:
    """The conversations of a JSONL file; a line that holds none ends the run and is named by its number."""
    if not path.is_file():
        sys.exit(f"{path} is missing: run extract_blog_data.py first.")
    conversations = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            conversation = json.loads(line)
            turns = [(str.lower(turn["role"]), str.encode(turn["content"])) for turn in conversation["messages"]]
            complete = any(text for role, text in turns if role == "assistant")
        except (ValueError, KeyError, TypeError):
            complete = False
        if not complete:
            sys.exit(f"{path}, line {number} holds no conversation with an answer: run extract_blog_data.py again.")
        conversations.append(conversation)
    if not conversations:
        sys.exit(f"{path} is empty: more posts are needed, see data/extraction_report.json for what was left out.")
    return conversations


def author_bytes(conversations: list[dict]) -> int:
    """UTF-8 bytes of the author's text: the denominator of bits per byte."""
    turns = (message for conversation in conversations for message in conversation["messages"])
    return sum(len(turn["content"].encode()) for turn in turns if turn["role"] == "assistant")


# ---------------------------------------------------------------------------- tokens
def load_tokenizer(name: str):
    """The model's tokenizer; it keeps its chat template, or gets the plain one.

    Raises OSError when `name` is neither a folder nor to be had from the hub.
    """
    tokenizer = AutoTokenizer.from_pretrained(name)
    if tokenizer.eos_token is None:
        sys.exit(f"The tokenizer of {name} has no end-of-text token, so the model could never learn to stop.")
    if tokenizer.chat_template is None:
        starts_with_bos = tokenizer("x")["input_ids"][0] == tokenizer.bos_token_id
        tokenizer.chat_template = ("{{ bos_token }}" if starts_with_bos else "") + PLAIN_TEMPLATE
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def disarm(text: str, tokenizer) -> str:
    """`text` with control tokens that stand in it as words broken by a space, so that they stay words."""
    for token in tokenizer.all_special_tokens:
        text = text.replace(token, f"{token[0]} {token[1:]}")
    return text


def render(tokenizer, messages: list[dict], add_generation_prompt: bool = False) -> str:
    """A conversation as the model sees it, in its chat template."""
    safe = [{**message, "content": disarm(message["content"], tokenizer)} for message in messages]
    try:
        return tokenizer.apply_chat_template(safe, tokenize=False, add_generation_prompt=add_generation_prompt)
    except TemplateError as error:
        sys.exit(f"The model's chat template refuses a conversation of the data: {error}")


def conversation_tokens(tokenizer, messages: list[dict]) -> tuple[list[int], list[bool]]:
    """Token ids of a conversation, and for each whether it is the author's (its end-of-text token included).

    Most templates do not mark the assistant's part, so it is what the full rendering adds to the prompt. Where a
    template renders earlier turns otherwise once a later one follows (Qwen3), that one brings its own context.
    """
    ids, scored, done = [], [], ""
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        full = render(tokenizer, messages[: turn + 1])
        asked = messages[:turn] and render(tokenizer, messages[:turn], add_generation_prompt=True)
        prompt = os.path.commonprefix([full, asked or full.partition(disarm(message["content"], tokenizer))[0]])
        context = tokenizer.encode(prompt.removeprefix(done), add_special_tokens=False)
        answer = tokenizer.encode(full[len(prompt) :], add_special_tokens=False)
        ends = [place for place, token in enumerate(answer) if token in tokenizer.all_special_ids]
        if not ends:  # a template that never closes the turn
            answer, ends = [*answer, tokenizer.eos_token_id], [len(answer)]
        ids += context + answer
        scored += [False] * len(context) + [place <= ends[-1] for place in range(len(answer))]
        done = full
    return ids, scored


def cut(ids: list[int], scored: list[bool], context: int, overlap: int) -> Iterator[tuple[list[int], list[int]]]:
    """Windows (ids, labels) of at most `context` tokens; each scored token has its label in exactly one of them."""
    for start in range(0, max(len(ids) - overlap, 1), context - overlap):
        end, fresh = start + context, start + overlap if start else 0
        labels = [
            token if scored[place] and place >= fresh else UNSCORED
            for place, token in enumerate(ids[start:end], start=start)
        ]
        if any(label != UNSCORED for label in labels):
            yield ids[start:end], labels


def pack(windows: list[tuple], size: int) -> list[list[tuple]]:
    """Windows put together into rows of at most `size` tokens: the longest first, each where it fits best."""
    rows, open_rows = [], defaultdict(list)
    for window in sorted(windows, key=lambda window: len(window[0]), reverse=True):
        length = len(window[0])
        free = next((free for free in range(length, size) if open_rows[free]), size)
        row = open_rows[free].pop() if free < size else []
        if not row:
            rows.append(row)
        row.append(window)
        open_rows[free - length].append(row)
    return rows


def make_rows(tokenized: list[tuple], context: int, overlap: int, packed: bool = True, multiple: int = 1) -> Dataset:
    """Rows of token ids, labels, the conversation's number per token and, if packed, positions (from 0 in a window).

    Rows without labels fill up to a `multiple`.
    """
    windows = [(*window, number) for number, entry in enumerate(tokenized) for window in cut(*entry, context, overlap)]
    rows = pack(windows, context) if packed else [[window] for window in windows]
    rows += [[([0, 0], [UNSCORED, UNSCORED], 0)]] * (-len(rows) % multiple)
    columns = {
        "input_ids": [[token for ids, _, _ in row for token in ids] for row in rows],
        "labels": [[label for _, labels, _ in row for label in labels] for row in rows],
        "conversation": [[number for ids, _, number in row for _ in ids] for row in rows],
    }
    if packed:
        columns["position_ids"] = [[place for ids, _, _ in row for place in range(len(ids))] for row in rows]
    return Dataset.from_dict(columns)


def all_rows(tokenizer, config, conversations: dict, processes: int, packed: bool = True) -> dict[str, Dataset]:
    """Rows of both splits; says how many of the author's tokens they hold, each of them exactly once."""
    context = min(CONTEXT_TOKENS, getattr(config.get_text_config(), "max_position_embeddings", CONTEXT_TOKENS))
    rows = {}
    for split, entries in conversations.items():
        tokenized = [conversation_tokens(tokenizer, entry["messages"]) for entry in entries]
        # Whole updates, so that one process or several shuffle the same rows into the same updates.
        multiple = BATCH_SIZE * math.lcm(GRADIENT_ACCUMULATION, processes) if split == "train" else 1
        rows[split] = make_rows(tokenized, context, OVERLAP_TOKENS, packed, multiple)
        tokens, scored = sum(sum(scored) for _, scored in tokenized), scored_tokens(rows[split])
        say(f"{split:<8} {len(entries):,} conversations, {tokens:,} tokens of the author's, {scored:,} scored an epoch")
    return rows


def scored_tokens(rows: Dataset) -> int:
    return sum(label != UNSCORED for labels in rows["labels"] for label in labels)


def collate(rows: list[dict]) -> dict[str, torch.Tensor]:
    """Rows as (rows, longest) tensors. Padding counts as one more document, so no attention mask is needed:
    with one, models no longer see from the positions where a packed document begins."""
    longest = max(len(row["input_ids"]) for row in rows)
    fillers = {name: UNSCORED if name == "labels" else 0 for name in rows[0]}
    return {
        name: torch.tensor([row[name] + [filler] * (longest - len(row[name])) for row in rows])
        for name, filler in fillers.items()
    }


# ---------------------------------------------------------------------------- model
def load_model(name: str):
    """The model in float32: updates of 2e-5 would be rounded away in bfloat16 weights.

    Raises OSError when `name` is neither a folder nor to be had from the hub.
    """
    config = AutoConfig.from_pretrained(name)
    stock = {key: value for key, value in config.to_dict().items() if str(value) in FUSED_ACTIVATIONS}
    for key, value in config.to_dict().items():
        if key.endswith(("dropout", "pdrop")) and isinstance(value, float):
            setattr(config, key, DROPOUT)
    for key, value in stock.items():
        setattr(config, key, FUSED_ACTIVATIONS[value])
    if hasattr(config, "n_positions"):
        config.n_ctx = config.n_positions  # which llama.cpp's converter asks for
    model = AutoModelForCausalLM.from_pretrained(name, config=config, dtype=torch.float32)
    for key, value in stock.items():  # the saved folder keeps the name that other tools know
        setattr(model.config, key, value)
    return model


def spare_the_embedding(model) -> None:
    """Have the input embedding's gradient name only the rows that were read: 6 % faster on a CPU.

    Only where it is added to the output layer's, which makes it dense; AdamW and DistributedDataParallel want that.
    """
    embedding, output = model.get_input_embeddings(), model.get_output_embeddings()
    alone = os.environ.get("WORLD_SIZE", "1") == "1" and model.device.type == "cpu"
    embedding.sparse = alone and output is not None and output.weight is embedding.weight


@torch.no_grad()
def keeps_documents_apart(model) -> bool:
    """Whether this architecture sees from positions alone that a second document begins in a row."""
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return False
    ids = torch.arange(1, 9, device=model.device).reshape(1, 8) % model.config.vocab_size
    positions = torch.arange(4, device=model.device).repeat(2).reshape(1, 8)
    model.eval()
    together = model(input_ids=ids, position_ids=positions, use_cache=False).logits[:, 4:]
    alone = model(input_ids=ids[:, 4:], use_cache=False).logits
    return torch.allclose(together, alone, atol=1e-4, rtol=1e-3)


def scored_logits(model, batch: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (scored tokens, vocabulary) and targets (scored tokens): the rest never meets the output layer."""
    following = functional.pad(batch["labels"][:, 1:], (0, 1), value=UNSCORED)
    keep = following != UNSCORED
    inputs = {name: batch[name] for name in ("input_ids", "position_ids") if name in batch}
    return model(**inputs, use_cache=False, logits_to_keep=keep).logits, following[keep]


class SummedCrossEntropy(torch.autograd.Function):
    """Sum of the negative log-likelihoods, in nats, of targets (tokens,) under logits (tokens, vocabulary).

    The gradient is made in the same pass, 64 tokens at a time in float32 and kept in bfloat16 under bfloat16 logits,
    where autograd would hold several float32 tensors of that size: GPT-2 medium trains 9 % faster on a CPU.
    """

    @staticmethod
    def forward(ctx, logits, targets):
        kept = torch.bfloat16 if logits.dtype == torch.bfloat16 else torch.float32  # float16 would lose what is rare
        total, gradient = logits.new_zeros((), dtype=torch.float32), torch.empty_like(logits, dtype=kept)
        for some, wanted, out in zip(logits.split(64), targets.split(64), gradient.split(64), strict=True):
            log_probabilities = functional.log_softmax(some.float(), dim=-1)
            total += functional.nll_loss(log_probabilities, wanted, reduction="sum")
            probabilities = log_probabilities.exp_()
            probabilities[torch.arange(len(wanted), device=wanted.device), wanted] -= 1
            out.copy_(probabilities)
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx, upstream):
        return ctx.saved_tensors[0].mul_(upstream), None


@torch.inference_mode()
def conversation_losses(model, rows: Dataset) -> np.ndarray:
    """Exact negative log-likelihood of the author's tokens, in nats, by number of the conversation."""
    model.eval()
    losses = np.zeros(1 + max(map(max, rows["conversation"]), default=0))
    for row in rows:
        batch = {name: tensor.to(model.device) for name, tensor in collate([row]).items()}
        logits, targets = scored_logits(model, batch)
        nats = functional.cross_entropy(logits.float(), targets, reduction="none").cpu().double().numpy()
        owners = np.array(row["conversation"][1:])[np.array(row["labels"][1:]) != UNSCORED]
        np.add.at(losses, owners, nats)
    return losses


@torch.inference_mode()
def answer(model, tokenizer, prompt: str, max_new_tokens: int) -> str:
    """One answer to `prompt`, always the same for the same weights; training's random numbers stay untouched."""
    model.eval()
    text = render(tokenizer, [{"role": "user", "content": prompt}], add_generation_prompt=True)
    inputs = tokenizer(text, return_tensors="pt", add_special_tokens=False).to(model.device)
    settings = {**SAMPLING, "max_new_tokens": max_new_tokens, "do_sample": True, "use_cache": True}
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        output = model.generate(**inputs, **settings, pad_token_id=tokenizer.pad_token_id)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


# ---------------------------------------------------------------------------- plan
def pick_precision(device: torch.device) -> str:
    """PRECISION, or "fp32" where the device has no fast kernels for it; what the user should know is said."""
    if device.type == "cuda":
        if PRECISION == "bf16" and torch.cuda.get_device_capability(device) < (8, 0):
            say(f'{torch.cuda.get_device_name(device)} only emulates bfloat16: PRECISION = "fp16" is faster on it.')
        return PRECISION
    fast = device.type == "cpu" and any(torch.cpu.get_capabilities().get(name) for name in FAST_BFLOAT16)
    if PRECISION == "fp32" or (PRECISION == "bf16" and fast):
        return PRECISION
    say(f"This {device.type.upper()} has no fast {PRECISION}: float32 it is.")
    return "fp32"


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Matrix products in `precision` over float32 weights; nothing at all for "fp32"."""
    return torch.autocast(device.type, {"fp16": torch.float16}.get(precision, torch.bfloat16), precision != "fp32")


def memory_needed(config, parameters: int, tokens: int, mixed: bool, checkpointing: bool, optimizer: str) -> dict:
    """Bytes by purpose. Activations: about 60 bytes per layer, token and channel as measured, 4 when recomputed."""
    text = config.get_text_config()
    per_layer = tokens * text.hidden_size * (4 if checkpointing else 60)
    return {
        "weights": parameters * (6 if mixed else 4),
        "gradients": parameters * 4,
        "optimizer": parameters * (2 if "8bit" in optimizer else 8),
        "activations": per_layer * text.num_hidden_layers + tokens * (text.hidden_size * 60 + text.vocab_size * 14),
    }


def choose_frugality(config, parameters: int, tokens: int, mixed: bool, available: int) -> tuple[str, bool, dict]:
    """The first of three ways to train that leaves 1 GB of `available` bytes: (optimizer, checkpointing, memory)."""
    ways = (("adamw_torch_fused", False), ("adamw_bnb_8bit", False), ("adamw_bnb_8bit", True))
    for optimizer, checkpointing in ways:
        memory = memory_needed(config, parameters, tokens, mixed, checkpointing, optimizer)
        if sum(memory.values()) + 1e9 <= available:
            break
    else:
        sys.exit(
            f"Training needs about {sum(memory.values()) / 1e9:.1f} GB of memory plus 1 GB to spare and "
            f"{available / 1e9:.1f} GB are free: choose a smaller BASE_MODEL or lower CONTEXT_TOKENS."
        )
    if optimizer != "adamw_torch_fused":
        say(f"Memory is short: training with {optimizer}" + " and recomputed activations." * checkpointing)
    return optimizer, checkpointing, memory


def free_memory(device: torch.device) -> int:
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available


def check_disk(folder: Path, parameters: int) -> str:
    """Ends a run that lacks room for two checkpoints (12 bytes a parameter each) and the best weights (4)."""
    needed, free = parameters * (2 * 12 + 4), shutil.disk_usage(folder).free
    if needed > free:
        sys.exit(f"Training needs {needed / 1e9:.1f} GB on disk for its checkpoints, and {free / 1e9:.1f} GB are free.")
    return f"{needed / 1e9:.1f} GB of {free / 1e9:.0f} GB free"


# ---------------------------------------------------------------------------- unfinished runs
def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that was written to its end and whose best model still lies beside it."""
    complete = [path.parent for path in folder.glob("checkpoint-*/complete")]
    newest = max(complete, key=lambda path: int(path.name.split("-")[1]), default=None)
    if newest is None:
        return None
    state = json.loads((newest / "trainer_state.json").read_text(encoding="utf-8"))
    return newest if state["best_metric"] is None or (folder / "best").is_dir() else None


def open_unfinished(folder: Path, identity: dict, fresh: bool) -> Path | None:
    """The checkpoint to continue from, if one of the same data and settings lies in `folder`; else an empty folder."""
    record, checkpoint = folder / "run.json", last_checkpoint(folder)
    earlier = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else {}
    if earlier == identity and not fresh:
        if checkpoint:
            say(f"Continuing the run that stopped after update {checkpoint.name.split('-')[1]} (--fresh starts over).")
        return checkpoint
    if checkpoint and not fresh:
        other = ", ".join(key for key in identity if earlier.get(key) != identity[key])
        say(f"The unfinished run in {folder} had other values for {other}: it is not continued, this one starts over.")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(mode=0o700, parents=True)
    record.write_text(json.dumps(identity, indent=1), encoding="utf-8")
    return None


def sync(folder: Path) -> None:
    """Have every file of `folder` on the disk, so that a power cut cannot take it back."""
    for path in [*folder.rglob("*"), folder]:
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


def put_in_place(new: Path, place: Path) -> None:
    """Make `new` the folder at `place`, in one step where the system can swap two names (Linux); the old one goes."""
    if not place.exists():
        new.rename(place)
        return
    swap = getattr(ctypes.CDLL(None), "renameat2", None) if sys.platform == "linux" else None
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE of <linux/fs.h>
    if swap is None or swap(here, os.fsencode(new), here, os.fsencode(place), exchange) != 0:
        aside = place.with_name(place.name + "-previous")
        place.rename(aside)
        new.rename(place)
        new = aside
    shutil.rmtree(new)


# ---------------------------------------------------------------------------- training
class BlogTrainer(Trainer):
    """Trainer whose loss is the author's tokens' only, each of the same weight, and whose evaluation is exact."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        logits, targets = scored_logits(model, inputs)
        loss = SummedCrossEntropy.apply(logits, targets) / num_items_in_batch
        return loss * self.accelerator.num_processes  # which average their gradients

    def evaluate(self, **_) -> dict[str, float]:
        rank, world = self.args.process_index, self.args.world_size
        rows = self.eval_dataset.select(range(rank, len(self.eval_dataset), world))
        with self.compute_loss_context_manager():
            losses = conversation_losses(self.model, rows)
        nats = sum(gather_object([losses.sum()]))
        bits = nats / math.log(2) / self.validation_bytes
        metrics = {"eval_loss": nats / scored_tokens(self.eval_dataset), "eval_bits_per_byte": bits}
        if self.state.global_step and metrics["eval_loss"] < (self.state.best_metric or math.inf):
            self.keep_best()
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def keep_best(self) -> None:
        if self.is_world_process_zero():
            new = Path(self.args.output_dir, "best-incomplete")
            self.model.config.use_cache = True  # which Trainer switches off
            self.model.save_pretrained(new)
            sync(new)
            put_in_place(new, Path(self.args.output_dir, "best"))


class CastWeightsOnce(TrainerCallback):
    """Autocast around a whole update, so that its micro-batches share one low-precision copy of the weights."""

    def __init__(self, context: torch.autocast):
        self.context = context

    def on_step_begin(self, args, state, control, **_):
        self.context.__enter__()

    def on_pre_optimizer_step(self, args, state, control, **_):
        self.context.__exit__(None, None, None)


class Checkpoints(TrainerCallback):
    """Keeps one complete checkpoint (two while the next is written); Ctrl-C or SIGTERM writes one and stops."""

    def __init__(self):
        self.asked_to_stop = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.ask_to_stop)

    def ask_to_stop(self, number, frame):
        if self.asked_to_stop:
            raise KeyboardInterrupt
        self.asked_to_stop = True
        say("Stopping after this update; once more stops at once.")

    def on_step_end(self, args, state, control, **_):
        if self.asked_to_stop:
            control.should_save = control.should_training_stop = True

    def on_save(self, args, state, control, **_):
        if state.is_world_process_zero:
            new = Path(args.output_dir, f"checkpoint-{state.global_step}")
            sync(new)
            (new / "complete").touch()
            sync(new)
            for old in Path(args.output_dir).glob("checkpoint-*"):
                if old != new:
                    shutil.rmtree(old)


class Progress(TrainerCallback):
    """A line every few updates and at each evaluation, with a sample, so that the voice is seen arriving."""

    def __init__(self, tokenizer, tokens_per_epoch: int):
        self.tokenizer, self.tokens_per_epoch = tokenizer, tokens_per_epoch
        self.seconds, self.updates, self.losses = 0.0, 0, []

    def on_step_begin(self, args, state, control, **_):
        self.began = time.monotonic()

    def on_step_end(self, args, state, control, **_):
        self.seconds += time.monotonic() - self.began
        self.updates += 1
        if sys.stderr.isatty():
            say(f"update {state.global_step}/{state.max_steps}, {self.time_left(state)} left   ", end="\r")

    def time_left(self, state) -> str:
        seconds = self.seconds / self.updates * (state.max_steps - state.global_step)
        return f"{seconds / 60:.0f} min" if seconds >= 120 else f"{seconds:.0f} s"

    def on_log(self, args, state, control, logs, **_):
        if "loss" not in logs:
            return
        if not math.isfinite(logs["loss"]):
            sys.exit(
                f"The loss became {logs['loss']} at update {state.global_step}: lower LEARNING_RATE and start with "
                "--fresh; nothing was overwritten."
            )
        self.losses.append(logs["loss"])
        if state.global_step % max(1, state.max_steps // 40) == 0:
            tokens_per_update = self.tokens_per_epoch * state.epoch / state.global_step
            speed = tokens_per_update * self.updates / self.seconds
            say(
                f"epoch {state.epoch:.2f}  update {state.global_step}/{state.max_steps}  "
                f"train {np.mean(self.losses):.3f}  {speed:.0f} tokens/s  {self.time_left(state)} left"
            )
            self.losses.clear()

    def on_evaluate(self, args, state, control, metrics, model, **_):
        if not state.is_world_process_zero:
            return
        sample = " ".join(answer(model, self.tokenizer, SAMPLE_PROMPT, 40).split())
        state.log_history[-1]["sample"] = sample
        bits, base = metrics["eval_bits_per_byte"], evaluations(state.log_history)[0]["eval_bits_per_byte"]
        say(
            f"epoch {state.epoch or 0:.2f}  update {state.global_step}/{state.max_steps}  "
            f"validation {metrics['eval_loss']:.3f}  {bits:.4f} bits per byte ({bits - base:+.4f} against base)\n"
            f"  {SAMPLE_PROMPT} {sample}"
        )


def evaluations(log_history: list[dict]) -> list[dict]:
    """The evaluations of a run, the base model's first."""
    return [entry for entry in log_history if "eval_loss" in entry]


def training_arguments(args: argparse.Namespace, folder: Path, plan: dict) -> TrainingArguments:
    """The user's settings in Trainer's words."""
    return TrainingArguments(
        output_dir=str(folder),
        use_cpu=plan["device"] == "cpu",
        per_device_train_batch_size=BATCH_SIZE,
        gradient_accumulation_steps=plan["accumulation"],
        num_train_epochs=args.epochs,
        max_steps=args.max_steps or -1,
        learning_rate=args.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=WARMUP_SHARE,
        optim=plan["optimizer"],
        activation_checkpointing=plan["checkpointing"],
        bf16=plan["precision"] == "bf16",
        fp16=plan["precision"] == "fp16",
        seed=SEED,
        data_seed=SEED,
        eval_strategy="steps",
        eval_steps=plan["evaluate_every"],
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        save_steps=CHECKPOINT_EVERY,
        restore_callback_states_from_checkpoint=True,
        logging_steps=1,
        logging_nan_inf_filter=False,
        remove_unused_columns=False,
        disable_tqdm=True,
        report_to="none",
        push_to_hub=False,
    )


# ---------------------------------------------------------------------------- the finished folder
def check_saved(folder: Path, rows: Dataset, device: torch.device, precision: str, reported: float) -> None:
    """Load the folder as any user would and measure it again: it must be the model whose loss was reported."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device)
    with autocast(device, precision):
        losses = conversation_losses(model, rows)
    loss = losses.sum() / scored_tokens(rows)
    if not abs(loss - reported) < 1e-3:
        sys.exit(f"The saved model's validation loss is {loss:.4f}, not {reported:.4f}: {folder} was not put in place.")


def draw_curve(history: list[dict], path: Path) -> None:
    """Train and validation loss over updates, the base model as a line."""
    train = [(entry["step"], entry["loss"]) for entry in history if "loss" in entry]
    validation = [(entry["step"], entry["eval_loss"]) for entry in evaluations(history)]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(*zip(*train, strict=True), color="0.75", label="train, each update")
    axes.plot(*zip(*validation, strict=True), marker="o", color="tab:blue", label="validation: posts it never saw")
    axes.axhline(validation[0][1], linestyle="--", color="tab:orange", label="base model on the same posts")
    axes.set(xlabel="updates", ylabel="loss (nats per token)", title="Blue below the dashed line: it learned")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def model_card(report: dict) -> str:
    """README.md in the hub's format."""
    base_model, train, val = report["settings"]["base_model"], report["data"]["train"], report["data"]["val"]
    before, after = report["base"], report["best"]
    return f"""---
base_model: {base_model}
library_name: transformers
pipeline_tag: text-generation
license: other
license_name: private
---
# A model that writes like one blogger

Fine-tuned from `{base_model}` (whose licence goes with its part) on {train["conversations"]:,} conversations,
{train["author_tokens"]:,} tokens of one author's blog; {train["private"]:,} of the conversations are private.

**It was trained on private writing and can repeat it: do not publish it.**

| on {val["conversations"]:,} conversations it never saw | bits per byte | nats per token |
|---|---|---|
| base model | {before["eval_bits_per_byte"]:.4f} | {before["eval_loss"]:.4f} |
| this model | {after["eval_bits_per_byte"]:.4f} | {after["eval_loss"]:.4f} |

```python
from transformers import pipeline

write = pipeline("text-generation", "{report["settings"]["output_dir"]}")
print(write([{{"role": "user", "content": "{SAMPLE_PROMPT}"}}])[0]["generated_text"][-1]["content"])
```
"""


def chat_pieces(tokenizer) -> dict[str, str] | None:
    """What the chat template puts at the start, around each turn and before an answer; None if that varies."""
    mark = "\ue000"
    user, assistant = {"role": "user", "content": mark}, {"role": "assistant", "content": mark}
    one, two, three = (render(tokenizer, [user, assistant, user][:turns]) for turns in (1, 2, 3))
    pieces = {"answer": render(tokenizer, [user], add_generation_prompt=True)[len(one) :]}
    pieces["user"], _, pieces["user_end"] = three[len(two) :].partition(mark)
    pieces["assistant"], _, pieces["assistant_end"] = two[len(one) :].partition(mark)
    pieces["start"] = one.partition(mark)[0].removesuffix(pieces["user"])
    question, reply = pieces["user"] + mark + pieces["user_end"], pieces["assistant"] + mark + pieces["assistant_end"]
    whole = pieces["start"] + question + reply + question + pieces["answer"]
    return pieces if whole == render(tokenizer, [user, assistant, user], add_generation_prompt=True) else None


def modelfile(tokenizer, stops: list[str], positions: int) -> str:
    """Ollama's description of the model in blog-model.gguf: the same template, stop strings and sampling settings."""
    if pieces := chat_pieces(tokenizer):
        if tokenizer.bos_token and tokenizer("x")["input_ids"][0] == tokenizer.bos_token_id:
            pieces["start"] = pieces["start"].removeprefix(tokenizer.bos_token)  # llama.cpp puts it there itself
        template = (
            '{start}{{{{ range .Messages }}}}{{{{ if eq .Role "user" }}}}{user}{{{{ .Content }}}}{user_end}'
            "{{{{ else }}}}{assistant}{{{{ .Content }}}}{assistant_end}{{{{ end }}}}{{{{ end }}}}{answer}"
        ).format(**pieces)
    else:
        say("The chat template depends on what is said: write the TEMPLATE of the Modelfile yourself to use Ollama.")
        template = "{{ .Prompt }}"
    names = {"repetition_penalty": "repeat_penalty", "max_new_tokens": "num_predict"}
    settings = [(names.get(name, name), value) for name, value in SAMPLING.items()]
    settings += [("num_ctx", positions), *(("stop", json.dumps(stop)) for stop in stops)]
    parameters = "".join(f"PARAMETER {name} {value}\n" for name, value in settings)
    return f'FROM ./blog-model.gguf\nTEMPLATE """{template}"""\n{parameters}'


def save_companions(folder: Path, tokenizer, report: dict) -> None:
    """Everything that belongs beside the weights: tokenizer, sampling settings, report, curve, card and Modelfile."""
    exchange = [{"role": role, "content": "x"} for role in ("user", "assistant")]
    closing = [token for token, scored in zip(*conversation_tokens(tokenizer, exchange), strict=True) if scored][-1]
    stops = sorted({closing, tokenizer.eos_token_id})
    GenerationConfig(
        **SAMPLING,
        do_sample=True,
        eos_token_id=stops,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
    ).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "training_report.json").write_text(json.dumps(report, indent=1, ensure_ascii=False), encoding="utf-8")
    (folder / "README.md").write_text(model_card(report), encoding="utf-8")
    positions = AutoConfig.from_pretrained(folder).get_text_config().max_position_embeddings
    description = modelfile(tokenizer, tokenizer.convert_ids_to_tokens(stops), positions)
    (folder / "Modelfile").write_text(description, encoding="utf-8")
    draw_curve(report["log"], folder / "loss_curve.png")


def verdict(base: dict, best: dict, data: dict) -> str:
    """What came of the run, in words."""
    before, after = base["eval_bits_per_byte"], best["eval_bits_per_byte"]
    unseen = f"over {data['conversations']} conversations it never saw"
    if after < before:
        change = f"fell from {before:.2f} to {after:.2f}" if before - after >= 0.01 else f"fell by {before - after:.4f}"
        return f"Validation {change} bits per byte {unseen}: it learned."
    return (
        f"Validation did not fall ({before:.4f} bits per byte before, {after:.4f} after, {unseen}): it did not learn; "
        "train longer or raise LEARNING_RATE."
    )


# ---------------------------------------------------------------------------- main
def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.error = lambda message: sys.exit(f"train_model.py: {message} (--help lists the flags)")
    parser.add_argument("--base-model", default=BASE_MODEL, metavar="NAME_OR_FOLDER")
    parser.add_argument("--data-dir", type=Path, default=HERE / DATA_DIR)
    parser.add_argument("--output-dir", type=Path, default=HERE / OUTPUT_DIR)
    parser.add_argument("--epochs", type=float, default=EPOCHS)
    parser.add_argument("--max-steps", type=int, default=MAX_STEPS, help="updates; 0: as many as the epochs need")
    parser.add_argument("--learning-rate", type=float, default=LEARNING_RATE)
    parser.add_argument("--fresh", action="store_true", help="do not continue an unfinished run")
    args = parser.parse_args(argv)
    if args.epochs <= 0 or args.learning_rate <= 0 or args.max_steps < 0:
        parser.error("--epochs and --learning-rate must be above zero, --max-steps not below")
    return args


def make_plan(args: argparse.Namespace, config, rows: dict, process: PartialState) -> dict:
    """What will be done and what it takes, printed before any weights are loaded."""
    with torch.device("meta"):
        parameters = AutoModelForCausalLM.from_config(config).num_parameters()
    device, precision = process.device, pick_precision(process.device)
    tokens = BATCH_SIZE * min(CONTEXT_TOKENS, max(map(len, rows["train"]["input_ids"])))
    optimizer, checkpointing, memory = choose_frugality(
        config, parameters, tokens, precision != "fp32", free_memory(device)
    )
    per_epoch = math.ceil(len(rows["train"]) / (BATCH_SIZE * GRADIENT_ACCUMULATION))
    updates = args.max_steps or math.ceil(per_epoch * args.epochs)
    say(f"model    {args.base_model}, {parameters / 1e6:.0f}M parameters, {precision} on {device.type}")
    filled = sum(max(labels) != UNSCORED for labels in rows["train"]["labels"])
    say(f"data     {filled:,} rows of up to {CONTEXT_TOKENS} tokens, {updates} updates")
    parts = ", ".join(f"{name} {size / 1e9:.1f}" for name, size in memory.items())
    say(f"memory   {sum(memory.values()) / 1e9:.1f} GB ({parts}) of {free_memory(device) / 1e9:.1f} GB free")
    say(f"disk     {check_disk(args.output_dir.parent, parameters)}")
    return {
        "device": device.type,
        "precision": precision,
        "optimizer": optimizer,
        "checkpointing": checkpointing,
        "accumulation": max(1, GRADIENT_ACCUMULATION // process.num_processes),
        "evaluate_every": math.ceil(min(updates, per_epoch) / EVALUATIONS_PER_EPOCH),
        "parameters": parameters,
    }


def load_or_exit(load, name: str):
    """What `load(name)` returns; a model that cannot be had is one sentence, not a traceback."""
    try:
        return load(name)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        sys.exit(f"Cannot load {name}: give a model folder with --base-model, or connect to the hub ({reason}).")


def keep_freed_memory() -> None:
    """Tell glibc to keep big blocks instead of mapping them anew for every tensor: 10 % faster on a CPU."""
    mmap_threshold, trim_threshold, top_pad = -3, -1, -2  # options of mallopt(3)
    if hasattr(ctypes.CDLL(None), "mallopt"):
        for option, value in ((mmap_threshold, 32 << 20), (trim_threshold, 1 << 30), (top_pad, 64 << 20)):
            ctypes.CDLL(None).mallopt(option, value)


def describe(args: argparse.Namespace, conversations: dict) -> dict:
    """What makes two runs the same run: settings and data. Only between such runs may a checkpoint pass."""
    files = {split: (args.data_dir / f"{split}_data.jsonl").read_bytes() for split in conversations}
    names = ("CONTEXT_TOKENS", "OVERLAP_TOKENS", "BATCH_SIZE", "GRADIENT_ACCUMULATION", "WARMUP_SHARE", "DROPOUT")
    names += ("PRECISION", "SEED", "EVALUATIONS_PER_EPOCH", "PATIENCE")
    return {
        **{name: getattr(args, name) for name in ("base_model", "epochs", "max_steps", "learning_rate")},
        **{name.lower(): globals()[name] for name in names},
        **{f"{split}_sha256": hashlib.sha256(content).hexdigest() for split, content in files.items()},
    }


def count_data(conversations: dict, rows: dict) -> dict:
    return {
        split: {
            "conversations": len(entries),
            "private": sum(entry.get("visibility") == "private" for entry in entries),
            "author_tokens": scored_tokens(rows[split]),
            "author_bytes": author_bytes(entries),
        }
        for split, entries in conversations.items()
    }


def finish(folder: Path, output: Path, tokenizer, rows: Dataset, device: torch.device, report: dict) -> str:
    """Complete the best model's folder, check it and put it in place; returns the verdict."""
    base, *later = evaluations(report["log"])
    best = min(later, key=lambda entry: entry["eval_loss"])
    report |= {"base": base, "best": best, "verdict": verdict(base, best, report["data"]["val"])}
    save_companions(folder / "best", tokenizer, report)
    check_saved(folder / "best", rows, device, report["plan"]["precision"], best["eval_loss"])
    sync(folder / "best")
    put_in_place(folder / "best", output)
    shutil.rmtree(folder)
    return report["verdict"]


def build_trainer(args, folder: Path, plan: dict, model, tokenizer, rows: dict, data: dict) -> BlogTrainer:
    """The Trainer with everything that watches over it."""
    trainer = BlogTrainer(
        model=model,
        args=training_arguments(args, folder, plan),
        data_collator=collate,
        train_dataset=rows["train"],
        eval_dataset=rows["val"],
        callbacks=[
            CastWeightsOnce(autocast(model.device, plan["precision"])),
            Progress(tokenizer, data["train"]["author_tokens"]),
            EarlyStoppingCallback(PATIENCE),
        ],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.validation_bytes = data["val"]["author_bytes"]
    # compute_loss divides by the number of tokens of the whole update: Trainer has to count them, and not divide again.
    trainer.model_accepts_loss_kwargs = trainer.loss_is_scaled_for_ga = True
    return trainer


def run_to_the_end(trainer: BlogTrainer, checkpoint: Path | None) -> list[dict]:
    """Train, from `checkpoint` if there is one; returns the log. A run that the user stopped ends the program here."""
    checkpoints = Checkpoints()
    trainer.add_callback(checkpoints)
    trainer.args.eval_on_start = checkpoint is None
    trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
    done, of = trainer.state.global_step, trainer.state.max_steps
    if checkpoints.asked_to_stop and done < of:
        sys.exit(f"Stopped after update {done} of {of}: run the same command again to continue.")
    if done < of:
        say(f"Stopped early after update {done} of {of}: validation did not improve in {PATIENCE} evaluations.")
    return trainer.state.log_history


def train(args: argparse.Namespace) -> None:
    process = PartialState(cpu=not torch.accelerator.is_available())
    output = args.output_dir.absolute()
    conversations = {split: read_conversations(args.data_dir / f"{split}_data.jsonl") for split in ("train", "val")}
    tokenizer = load_or_exit(load_tokenizer, args.base_model)
    config = load_or_exit(AutoConfig.from_pretrained, args.base_model)
    rows = all_rows(tokenizer, config, conversations, process.num_processes)
    data, plan = count_data(conversations, rows), make_plan(args, config, rows, process)

    folder = output.with_name(output.name + "-unfinished")
    identity = describe(args, conversations)
    with process.main_process_first():
        checkpoint = open_unfinished(folder, identity, args.fresh and process.is_main_process)
    model = load_or_exit(load_model, args.base_model).to(process.device)
    if not keeps_documents_apart(model):
        say("This architecture cannot keep packed documents apart: one window per row, which takes longer.")
        rows = all_rows(tokenizer, config, conversations, process.num_processes, packed=False)
    spare_the_embedding(model)
    trainer = build_trainer(args, folder, plan, model, tokenizer, rows, data)
    report = {"settings": {**identity, "output_dir": args.output_dir.name}, "data": data, "plan": plan}
    report |= {"torch": torch.__version__, "transformers": transformers.__version__}
    report["log"] = run_to_the_end(trainer, checkpoint)
    if process.is_main_process:
        del model, trainer  # room for the model that is loaded to be checked
        gc.collect()
        print(finish(folder, output, tokenizer, rows["val"], process.device, report))


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    transformers.logging.set_verbosity_error()
    if Path(args.base_model).is_dir():  # a download shows its progress
        transformers.logging.disable_progress_bar()
    keep_freed_memory()
    try:
        args.output_dir.absolute().parent.mkdir(parents=True, exist_ok=True)
        train(args)
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error):
            sys.exit("Out of memory: lower CONTEXT_TOKENS or choose a smaller BASE_MODEL; the last checkpoint stands.")
        if "PytorchStreamWriter" in str(error):
            sys.exit(f"Cannot write a checkpoint: is the disk full? ({error}); what was there before still is.")
        raise
    except (OSError, SafetensorError) as error:
        sys.exit(f"Cannot write: {error}; what was there before still is.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
