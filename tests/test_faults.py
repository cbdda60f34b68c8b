"""train_model.py and what it shares: odd folders, models of others, settings. Nothing is deleted, run or half taken."""

import ast
import dataclasses
import errno
import io
import json
import math
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import conversations, write_jsonl
from training import cut_in_half, losses, make_noise, model_folder, nine_updates, run

import extract_blog_data
import train_model

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("small_training")]

ROOT = Path(train_model.__file__).parent


# ---------------------------------------------------------------------------- where a run may write
def tree(folder: Path) -> dict[str, tuple]:
    """Name, kind, mode and content of everything below a folder; links are not followed."""
    found = {}
    for path in sorted(folder.rglob("*")):
        status = path.lstat()
        content = None
        if stat.S_ISREG(status.st_mode):
            content = path.read_bytes()
        elif stat.S_ISLNK(status.st_mode):
            content = str(path.readlink())
        found[str(path)] = (status.st_mode, content)
    return found


@pytest.fixture
def home(tmp_path, gpt2_folder, data_folder, monkeypatch) -> Path:
    """A home folder with a project in it, which is the current folder, and odd things beside it."""
    home = tmp_path / "home"
    project = home / "project"
    shutil.copytree(gpt2_folder, project / "base")
    shutil.copytree(data_folder, project / "data")
    (project / "thesis").mkdir()
    (project / "thesis" / "chapter.md").write_text("years of work")
    (project / "thesis-link").symlink_to("thesis")
    (project / "loop").symlink_to("loop")
    (project / "file").write_text("a file")
    (project / "file-link").symlink_to("file")
    os.mkfifo(project / "fifo")
    (project / "a-unfinished").mkdir()
    (project / "a-unfinished" / "novel.md").write_text("unfinished indeed")
    (project / "d-unfinished" / "checkpoint-500").mkdir(parents=True)
    (project / "d-unfinished" / "checkpoint-500" / "weights.bin").write_text("somebody's")
    (project / "d-unfinished" / "run.json").write_text('{"my": "experiment"}')
    (project / "d-unfinished" / "lock").write_text("mine")
    (project / "b-unfinished").write_text("a file")
    (project / "c-unfinished").symlink_to("thesis")
    model_folder(project / "c-previous", "a backup")
    shutil.copytree(gpt2_folder, project / "others-model")
    (project / ".git").mkdir()
    (project / ".git" / "HEAD").write_text("ref: refs/heads/main")
    (project / "odd").mkdir()
    (project / "odd" / "training_report.json").write_text("[1, 2]")
    monkeypatch.chdir(project)
    monkeypatch.setenv("HOME", str(home))
    return home


ODD_PLACES = [
    ("", "must be the name of a folder"),
    (".", "is the current folder"),
    ("./thesis/..", "is the current folder"),
    ("..", "holds the current folder|is your home folder"),
    ("/", "holds"),
    ("~home", "is your home folder|holds the current folder"),
    ("~scripts", "is these scripts|holds these scripts"),
    ("data", "is the data"),
    ("base", "is the base model"),
    ("thesis", "is a folder with files that train_model.py did not write"),
    ("thesis-link", "is a folder with files that train_model.py did not write"),
    ("others-model", "is a folder with files that train_model.py did not write"),
    ("odd", "is a folder with files that train_model.py did not write"),
    (".git", "is a folder with files that train_model.py did not write"),
    ("loop", "cannot be used"),
    ("file", "is not a folder"),
    ("file-link", "is not a folder"),
    ("file/below", "cannot be used|Not a directory"),
    ("fifo", "is not a folder"),
    ("a", "a-unfinished, which train_model.py did not write"),
    ("b", "b-unfinished, which train_model.py did not write"),
    ("c", "c-unfinished, which train_model.py did not write"),
    ("d", "d-unfinished, which train_model.py did not write"),
    ("base/in-it", "is inside the base model"),
    ("n" * 300, "cannot be used|File name too long"),
    ("\udcff", "cannot be used"),
    ("/dev/null", "is not a folder"),
    ("/proc", "is a mount point|did not write"),
]


@pytest.mark.parametrize(("place", "reason"), ODD_PLACES)
def test_a_place_that_is_somebody_s_is_refused_and_left_byte_for_byte(place, reason, home):
    named = {"~home": str(home), "~scripts": str(ROOT)}.get(place, place)
    before = tree(home)
    arguments = ["--base-model", "base", "--data-dir", "data", "--output-dir", named, "--max-steps", "1", "--fresh"]
    with pytest.raises(SystemExit) as ended:
        train_model.main(arguments)
    assert re.search(reason, str(ended.value)) and "\n" not in str(ended.value)
    assert tree(home) == before


def test_data_and_base_model_in_the_unfinished_folder_are_kept(home):
    for name, flag in {"data": "--data-dir", "base": "--base-model"}.items():
        shutil.copytree(name, f"e-unfinished/{name}")
        before = tree(home)
        arguments = {"--base-model": "base", "--data-dir": "data", flag: f"e-unfinished/{name}", "--output-dir": "e"}
        with pytest.raises(SystemExit, match="e-unfinished, which is or holds"):
            train_model.main([word for pair in arguments.items() for word in pair])
        assert tree(home) == before


def test_an_empty_folder_is_taken_and_what_others_put_into_it_or_beside_it_is_kept(home, capsys):
    Path("mine").mkdir()
    for word in ("previous", "ready"):
        model_folder(Path(f"mine-{word}"), word)
    others = {path: tree(path) for path in Path().iterdir() if path.is_dir() and path.name != "mine"}
    run(Path("base"), Path("data"), Path("mine"), "--max-steps", "1")
    Path("mine/notes.md").write_text("about this model", encoding="utf-8")
    Path("mine/Modelfile").write_text("a template of my own", encoding="utf-8")
    Path("mine/loss_curve.png").unlink()
    Path("mine/loss_curve.png").mkdir()
    Path("mine/loss_curve.png/notes.md").write_text("notes", encoding="utf-8")
    run(Path("base"), Path("data"), Path("mine"), "--max-steps", "1")
    assert {path: tree(path) for path in others} == others
    assert not Path("mine-unfinished").exists()
    assert Path("mine/notes.md").read_text(encoding="utf-8") == "about this model"
    assert Path("mine/Modelfile-previous").read_text(encoding="utf-8") == "a template of my own"
    assert Path("mine/loss_curve.png-previous/notes.md").exists()
    assert capsys.readouterr().err.count("Kept: ") == 3
    names = {"notes.md", "Modelfile-previous", "loss_curve.png-previous", *train_model.hashes_of_ours(Path("mine"))}
    assert {path.name for path in Path("mine").iterdir()} <= {*names, "training_report.json"}


def test_what_others_have_put_beside_a_run_stays_there(home, capsys):
    places = train_model.Places(Path("mine").resolve())
    places.unfinished.mkdir()
    places.lock.touch()
    for name in ("best-notes.txt", "checkpoint-notes.txt", "rates.json.bak"):
        (places.unfinished / name).write_text("mine", encoding="utf-8")
    run(Path("base"), Path("data"), Path("mine"), "--max-steps", "1")
    assert len(list(places.unfinished.glob("*.*"))) == 4
    assert capsys.readouterr().err.count("-unfinished/") >= 3


def test_what_comes_to_lie_at_the_place_during_a_run_is_left_alone(home, monkeypatch):
    check = train_model.check_saved

    def meanwhile(*given):
        check(*given)
        Path("mine").symlink_to("thesis")

    monkeypatch.setattr(train_model, "check_saved", meanwhile)
    with pytest.raises(SystemExit, match="did not write: the new model is complete, in .*mine-unfinished/best"):
        run(Path("base"), Path("data"), Path("mine"), "--max-steps", "1")
    assert Path("thesis/chapter.md").exists() and Path("mine-unfinished/best/training_report.json").exists()


def test_the_second_run_in_a_folder_names_the_first(home):
    hold = "held = filelock.FileLock('mine-unfinished/train_model.lock'); held.acquire(); print(flush=True); input()"
    lock = f"import filelock; {hold}"
    Path("mine-unfinished").mkdir()
    Path("mine-unfinished/train_model.lock").write_text("process 4711, since 09:30 on 27 November", encoding="utf-8")
    first = subprocess.Popen([sys.executable, "-c", lock], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    first.stdout.readline()
    before = tree(home)
    with pytest.raises(SystemExit, match=r"is being trained by process 4711, since 09:30 on 27 November: wait for it"):
        run(Path("base"), Path("data"), Path("mine"), "--max-steps", "1")
    assert tree(home) == before
    first.communicate("\n")


def test_a_run_that_does_not_begin_leaves_nothing_behind(home):
    before = tree(home)
    with pytest.raises(SystemExit):
        run(Path("thesis"), Path("data"), Path("mine"))
    assert tree(home) == before


def test_a_model_folder_is_its_owner_s_alone_and_holds_no_sample_and_no_path(gpt2_folder, data_folder, tmp_path):
    umask = os.umask(0)
    try:
        report = run(gpt2_folder, data_folder, tmp_path / "model", "--max-steps", "2")
    finally:
        os.umask(umask)
    assert stat.S_IMODE((tmp_path / "model").stat().st_mode) == 0o700
    assert not [entry for entry in report["log"] if "sample" in entry]
    assert report["settings"]["base_model"] == os.path.relpath(gpt2_folder, tmp_path / "model")
    for path in (tmp_path / "model").iterdir():
        text = path.read_bytes()
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert str(tmp_path).encode() not in text and str(gpt2_folder).encode() not in text, path.name


@pytest.mark.parametrize(
    ("base", "shared"),
    [
        ("gpt2-medium", "gpt2-medium"),
        ("sample/model", "sample/model"),
        ("/home/judy/models/base", "../../models/base"),
        ("/opt/models/base", "base"),
    ],
)
def test_the_base_model_is_named_without_the_way_to_it(base, shared):
    assert train_model.name_to_share(base, Path("/home/judy/blog/blog-model-final")) == shared


# ---------------------------------------------------------------------------- models of others
def edit_json(name: str, **values):
    def edit(folder: Path) -> None:
        path = folder / name
        content = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps({**content, **values}))

    return edit


def edit_weights(change):
    def edit(folder: Path) -> None:
        from safetensors.torch import load_file, save_file

        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return edit


def write(name: str, text: str):
    return lambda folder: (folder / name).write_text(text)


def template(text: str):
    return write(TEMPLATE, text)


def without(*names: str):
    def remove(folder: Path) -> None:
        for name in names:
            (folder / name).unlink(missing_ok=True)

    return remove


def last(tensors: dict) -> str:
    return sorted(name for name in tensors if "weight" in name)[-1]


WEIGHTS = "model.safetensors"
PICKLED = '{"weight_map": {"a": "pytorch_model.bin"}}'
TEMPLATE = "chat_template.jinja"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 1519984962\n"
LOOPS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
SAYS = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}{% endfor %}"
BROKEN_MODELS = {
    "a tensor is missing": (edit_weights(lambda t: t.pop(last(t))), "lacks .*: it is incomplete"),
    "a tensor is left over": (edit_weights(lambda t: t.update(extra=torch.ones(2))), "config does not know"),
    "half of the layers": (edit_json("config.json", n_layer=1, num_hidden_layers=1), "config does not know"),
    "another shape": (edit_json("config.json", n_positions=128), "in another shape"),
    "no numbers": (edit_weights(lambda t: t[last(t)].fill_(math.nan)), "NaN or infinite weights"),
    "an infinite number": (edit_weights(lambda t: t[last(t)][0].fill_(math.inf)), "NaN or infinite weights"),
    "weights cut": (lambda folder: cut_in_half(folder / WEIGHTS), "model.safetensors is cut or damaged"),
    "weights of noise": (lambda folder: make_noise(folder / WEIGHTS), "model.safetensors is cut or damaged"),
    "weights in a pickle": (lambda folder: pickle_weights(folder), "Cannot load .*model.safetensors"),
    "no weights": (without("model.safetensors"), "Cannot load"),
    "weights of git-lfs": (write("model.safetensors", POINTER), "run `git lfs pull` in"),
    "tokenizer of git-lfs": (write("tokenizer.json", POINTER), "tokenizer.json is only a pointer to the file"),
    "config cut": (lambda folder: cut_in_half(folder / "config.json"), "config.json is cut or damaged"),
    "config is a list": (write("config.json", "[]"), "config.json is not a JSON object"),
    "config too deep": (write("config.json", "[" * 100_000), "config.json is cut or damaged"),
    "config of odd sizes": (edit_json("config.json", n_embd="wide"), "Cannot load"),
    "generation config is a list": (write("generation_config.json", "[]"), "generation_config.json is not a JSON"),
    "a config of no width": (edit_json("config.json", n_embd=0, hidden_size=0), "Cannot load"),
    "an activation of nobody's": (edit_json("config.json", activation_function="evil"), "Cannot load"),
    "a config that returns tuples": (edit_json("config.json", return_dict=False, output_attentions=True), "^$"),
    "stop strings": (edit_json("generation_config.json", stop_strings=["e"], return_dict_in_generate=True), "^$"),
    "an odd end": (edit_json("generation_config.json", eos_token_id="x"), "Cannot load|^$"),
    "whole numbers as weights": (edit_weights(lambda t: t.update({last(t): t[last(t)].to(torch.int8)})), "as I8: use"),
    "an index that names a pickle": (write(f"{WEIGHTS}.index.json", PICKLED), "names a pickle, which is never loaded"),
    "a template that is a pipe": (lambda folder: os.mkfifo(folder / TEMPLATE), "chat_template.jinja is not"),
    "no config": (without("config.json"), "Cannot load"),
    "no tokenizer": (
        without("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt"),
        "has no tokenizer|Cannot load",
    ),
    "tokenizer cut": (lambda folder: cut_in_half(folder / "tokenizer.json"), "tokenizer.json is cut or damaged"),
    "tokenizer of nothing": (write("tokenizer.json", "{}"), "has no tokenizer|Cannot load"),
    "vocabulary too small": (
        lambda folder: (edit_json("config.json", vocab_size=300)(folder), shrink_vocabulary(folder)),
        "the two do not belong together",
    ),
    "code beside it": (
        edit_json(
            "config.json", model_type="evil", auto_map={"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.M"}
        ),
        r"auto_map\), which is never run",
    ),
    "a tokenizer with code beside it": (
        edit_json("tokenizer_config.json", tokenizer_class="Evil", auto_map={"AutoTokenizer": ["evil.Evil", None]}),
        "auto_map|^$",
    ),
    "GPTQ": (edit_json("config.json", quantization_config={"quant_method": "gptq", "bits": 4}), r"quantised \(gptq\)"),
    "encoder and decoder": (edit_json("config.json", model_type="t5"), "is an encoder-decoder|Cannot load"),
    "adapters": (write("adapter_config.json", "{}"), "holds adapters without their base model"),
    "attention from the hub": (
        edit_json("config.json", _attn_implementation="kernels-community/flash-attn", attn_implementation="a/b"),
        "never run|Cannot load|^$",
    ),
    "template: syntax": (template("{% for %}"), "chat template of .* fails"),
    "template: types": (template("{{ 1 + 'a' }}"), "chat template of .* fails"),
    "template: division": (template("{{ 1 // 0 }}"), "chat template of .* fails"),
    "template: a long range": (template("{% for i in range(10**9) %}x{% endfor %}"), "chat template of .* fails"),
    "template: loops": (template(LOOPS + SAYS), "chat template of .* fails"),
    "template: long": (template("{{ 'a' * 200000 }}" + SAYS), "makes 200,0"),
    "template: of the question alone": (template("{{ messages[0]['content'] }}"), "leaves out part of the"),
    "template: refuses": (template("{{ raise_exception('no') }}"), "chat template of .* fails"),
    "template: of code": (template("{{ ''.__class__.__mro__[1].__subclasses__() }}"), "chat template of .* fails"),
}


def pickle_weights(folder: Path) -> None:
    from safetensors.torch import load_file

    torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()


def shrink_vocabulary(folder: Path) -> None:
    """Weights for fewer tokens than the tokenizer has."""

    def change(tensors: dict) -> None:
        for name in [name for name in tensors if name.endswith(("wte.weight", "lm_head.weight"))]:
            tensors[name] = tensors[name][:300].clone()

    edit_weights(change)(folder)


EVIL = """
import pathlib
pathlib.Path(__file__).with_name("ran").touch()
class Evil: pass
class M: pass
"""


@pytest.mark.parametrize("case", BROKEN_MODELS)
def test_a_model_that_is_not_whole_or_brings_code_is_one_sentence(
    case, gpt2_folder, data_folder, tmp_path, monkeypatch, capsys
):
    spoil, reason = BROKEN_MODELS[case]
    monkeypatch.setattr(train_model, "TEMPLATE_SECONDS", 1)
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    base = shutil.copytree(gpt2_folder, tmp_path / "base")
    (base / "evil.py").write_text(EVIL)
    spoil(base)
    try:
        run(base, data_folder, tmp_path / "model", "--max-steps", "1")
    except SystemExit as ended:
        said = str(ended)
        assert re.search(reason, said) and str(base) in said and "\n" not in said
        assert not re.search("Cannot write|Traceback", said)
    else:
        # What cannot happen any more at all is not named in a sentence.
        assert re.search(reason, "")
        assert not list((tmp_path / "model").glob("*.py"))
    assert not (base / "ran").exists()
    assert not (tmp_path / "model-unfinished").exists()


def test_old_buffers_that_hold_nothing_learned_are_no_sign_of_half_a_model(gpt2_folder, tmp_path):
    base = shutil.copytree(gpt2_folder, tmp_path / "base")
    old = {"transformer.h.0.attn.bias": torch.ones(4), "transformer.h.0.attn.masked_bias": torch.tensor(-1e4)}
    edit_weights(lambda tensors: tensors.update(old))(base)
    train_model.load_model(base)


def test_a_known_model_with_a_note_of_code_trains_without_it_and_passes_no_note_on(gpt2_folder, data_folder, tmp_path):
    base = shutil.copytree(gpt2_folder, tmp_path / "base")
    (base / "evil.py").write_text(EVIL)
    edit_json("config.json", auto_map={"AutoModelForCausalLM": "evil.M"})(base)
    edit_json("tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Evil", None]})(base)
    run(base, data_folder, tmp_path / "model", "--max-steps", "1")
    assert not (base / "ran").exists()
    for path in (tmp_path / "model").iterdir():
        assert path.suffix != ".py" and b"auto_map" not in path.read_bytes(), path.name


LOADERS = {"from_pretrained", "from_config"}
DATA_ONLY = {"GenerationConfig", "LoraConfig", "PeftModel"}  # which read numbers, and know no such argument


def test_whatever_loads_a_model_says_that_no_code_of_it_is_trusted():
    """In the scripts, and in the benchmarks and the sample as well."""
    scripts = [
        *ROOT.glob("*.py"),
        *ROOT.glob("voice/*.py"),
        *ROOT.glob("benchmarks/*.py"),
        *ROOT.glob("sample/**/*.py"),
    ]
    calls = 0
    for script in scripts:
        for node in ast.walk(ast.parse(script.read_text())):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            if node.func.attr not in LOADERS or getattr(node.func.value, "id", "") in DATA_ONLY:
                continue
            calls += 1
            trusted = [word.value for word in node.keywords if word.arg == "trust_remote_code"]
            assert trusted and trusted[0].value is False, f"{script.name}:{node.lineno}"
    assert calls >= 4


# ---------------------------------------------------------------------------- control tokens
def test_no_control_token_of_a_text_reaches_the_model_as_one(llama_folder):
    """Also those that the tokenizer does not name, as 14 of SmolLM2's 17; runs of spaces stay as they are."""
    tokenizer = train_model.load_tokenizer(llama_folder)
    from tokenizers import AddedToken

    tokenizer.add_tokens([AddedToken("<filename>", special=True), AddedToken("<repo_name>", special=True)])
    tokenizer.add_tokens([AddedToken("<think>", special=False), AddedToken("    ", special=False)])
    train_model.control_tokens.cache_clear()
    train_model.control_pattern.cache_clear()

    text = "cp <filename> <repo_name> <think>    and <|im_end|>"
    conversation = [{"role": "user", "content": text}, {"role": "assistant", "content": text}]
    ids, _ = train_model.conversation_tokens(tokenizer, conversation)
    said = tokenizer.decode(ids, skip_special_tokens=True)
    assert said.count("cp < filename> < repo_name> < think>    and < |im_end|>") == 2
    added = {number for number, token in tokenizer.added_tokens_decoder.items() if token.content.startswith("<")}
    ours = [tokenizer.convert_ids_to_tokens(token) for token in ids if token in added]
    assert ours == ["<|im_start|>", "<|im_end|>", "<|im_start|>", "<|im_end|>"]


@pytest.mark.parametrize("around", ['"""', "{{ .Secret }}", "}}", '" """ SYSTEM """'])
def test_a_template_that_would_end_the_modelfile_s_is_not_put_into_it(around, llama_folder, capsys):
    tokenizer = train_model.load_tokenizer(llama_folder)
    quoted = around.replace('"', '\\"')
    tokenizer.chat_template = tokenizer.chat_template.replace("'<|im_end|>\n'", f'"<|im_end|>{quoted}\\n"')
    assert around in train_model.render(tokenizer, [{"role": "user", "content": "x"}])
    assert train_model.ollama_template(tokenizer) == "{{ .Prompt }}"
    assert "write the TEMPLATE of the Modelfile yourself" in capsys.readouterr().err


# ---------------------------------------------------------------------------- data
def test_roles_in_capitals_are_the_roles():
    [post] = conversations(1)
    line = json.dumps(post).replace('"user"', '"User"').replace('"assistant"', '"ASSISTANT"')
    assert train_model.parse_conversation(line.encode()) == post


@pytest.mark.parametrize(
    "line",
    [
        b"[" * 100_000,
        b"null",
        b"[]",
        b'{"messages": {}}',
        b'{"messages": "assistant"}',
        b'{"messages": [null]}',
        b'{"messages": [{"role": "user", "content": "x"}]}',
        b'{"messages": [{"role": "assistant", "content": " "}]}',
        b'{"messages": [{"role": "assistant", "content": "\\ud83d"}]}',
        b'{"messages": [{"role": 3, "content": "x"}]}',
        b'{"messages": [{"role": "narrator", "content": "x"}, {"role": "assistant", "content": "y"}]}',
        b'{"messages": [{"role": "assistant", "content": "caf\xe9"}]}',
        b"\xff\xfe",
        b"1e999",
    ],
)
def test_a_line_that_is_no_conversation_is_none(line):
    assert train_model.parse_conversation(line) is None


def test_data_of_two_extractions_is_refused(gpt2_folder, data_folder, tmp_path):
    data = shutil.copytree(data_folder, tmp_path / "data")
    hashes = {path.name: train_model.file_hash(path) for path in data.glob("*.jsonl")}
    (data / "extraction_report.json").write_text(json.dumps({"sha256": hashes}))
    train_model.check_data_folder(data)

    write_jsonl(data / "val_data.jsonl", conversations(6, seed=1))
    with pytest.raises(SystemExit, match=r"val_data\.jsonl is not the file that extraction_report\.json"):
        run(gpt2_folder, data, tmp_path / "model", "--max-steps", "1")


# ---------------------------------------------------------------------------- settings and signals
WRONG_SETTINGS = [
    ("BASE_MODEL", ""),
    ("BASE_MODEL", 3),
    ("DATA_DIR", None),
    ("OUTPUT_DIR", " "),
    ("CONTEXT_TOKENS", 8),
    ("CONTEXT_TOKENS", 512.0),
    ("OVERLAP_TOKENS", 0),
    ("OVERLAP_TOKENS", -1),
    ("ROWS_PER_UPDATE", 0),
    ("ROWS_PER_UPDATE", True),
    ("EPOCHS", 0),
    ("EPOCHS", "3"),
    ("EPOCHS", math.nan),
    ("MAX_STEPS", -1),
    ("MAX_STEPS", None),
    ("LEARNING_RATE", "Auto"),
    ("LEARNING_RATE", 0),
    ("WARMUP_SHARE", 1),
    ("LORA_RANK", -1),
    ("LORA_RANK", 1.5),
    ("LORA_RANK", "16"),
    ("DROPOUT", 1),
    ("PRECISION", "bfloat16"),
    ("SEED", 2**32),
    ("EVALUATIONS_PER_EPOCH", 0),
    ("PATIENCE", 0),
    ("CHECKPOINT_MINUTES", -1),
    ("SAMPLE_PROMPT", []),
    ("SAMPLING", {}),
    ("SAMPLING", {**train_model.SAMPLING, "temperature": 0}),
    ("SAMPLING", {**train_model.SAMPLING, "top_k": -5}),
    ("SAMPLING", {**train_model.SAMPLING, "top_p": 2}),
    ("SAMPLING", {**train_model.SAMPLING, "beams": 4}),
]


@pytest.mark.parametrize(("name", "value"), WRONG_SETTINGS)
def test_a_setting_that_is_none_is_one_sentence_before_anything_is_read(name, value, monkeypatch):
    monkeypatch.setattr(train_model, name, value)
    with pytest.raises(SystemExit, match=rf"^{name} in train_model.py must be .*: {name} = .*\.$"):
        train_model.main([])


def test_every_setting_has_a_row_that_its_default_passes():
    fields = [field.name.upper() for field in dataclasses.fields(train_model.Settings)]
    assert [*train_model.SETTINGS, "FRESH", "CPU"] == fields
    train_model.parse_arguments([])


def test_an_overlap_of_more_than_half_a_window_is_one_sentence(monkeypatch):
    monkeypatch.setattr(train_model, "OVERLAP_TOKENS", 33)
    with pytest.raises(SystemExit, match="OVERLAP_TOKENS in train_model.py must be at most half of CONTEXT_TOKENS"):
        train_model.main([])


@pytest.mark.parametrize("arguments", [["--help"], ["--no-such-flag"]])
def test_flags_are_answered_before_the_libraries_are_loaded(arguments):
    lines = [
        "import runpy, sys",
        f"sys.argv = ['train_model.py', *{arguments}]",
        "try: runpy.run_path('train_model.py', run_name='__main__')",
        "except SystemExit: print('torch' in sys.modules)",
    ]
    command = [sys.executable, "-c", "\n".join(lines)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.splitlines()[-1] == "False"


def test_no_model_is_loaded_with_kernels_from_the_hub(gpt2_folder, monkeypatch):
    """Whoever loads it: test_model.py and the benchmarks load here, too."""
    monkeypatch.setattr(train_model.hub_kernels, "_kernels_enabled", True)
    monkeypatch.setattr(train_model.hub, "HF_HUB_DISABLE_TELEMETRY", False)
    train_model.load_model(gpt2_folder)
    assert not train_model.hub_kernels._kernels_enabled
    assert train_model.hub.HF_HUB_DISABLE_TELEMETRY


@pytest.mark.parametrize("number", train_model.STOP_SIGNALS)
def test_a_signal_outside_of_training_is_one_sentence(number, gpt2_folder, data_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(train_model, "check_data_folder", lambda *_: signal.raise_signal(number))
    with pytest.raises(SystemExit, match=r"^Stopped: run the same command again; it continues from the last [^\n]*\.$"):
        run(gpt2_folder, data_folder, tmp_path / "model")


@pytest.mark.parametrize("number", train_model.STOP_SIGNALS)
def test_a_signal_in_training_leaves_a_checkpoint(number, gpt2_folder, data_folder, tmp_path, monkeypatch):
    """Before it is time for one, and it is as good as any other."""
    monkeypatch.setattr(train_model, "CHECKPOINT_MINUTES", 10)
    begin = train_model.Progress.on_step_begin

    def signalled(self, args, state, *given, **options):
        begin(self, args, state, *given, **options)
        if state.global_step == 5:
            signal.raise_signal(number)

    with monkeypatch.context() as patch:
        patch.setattr(train_model.Progress, "on_step_begin", signalled)
        with pytest.raises(SystemExit, match="^Stopped after update 6 of 9: run the same command again to continue"):
            run(gpt2_folder, data_folder, tmp_path / "model", "--max-steps", "9")
    assert train_model.last_checkpoint(tmp_path / "model-unfinished").name == "checkpoint-6"
    continued = run(gpt2_folder, data_folder, tmp_path / "model", "--max-steps", "9")
    assert losses(continued) == losses(nine_updates(gpt2_folder, data_folder))


def test_a_second_signal_ends_a_run_at_once_in_one_sentence(gpt2_folder, data_folder, tmp_path, monkeypatch, capfd):
    def stopped_twice(folder):
        try:
            signal.raise_signal(signal.SIGINT)
        finally:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(train_model, "check_data_folder", stopped_twice)

    def ended_with_another(status):
        signal.raise_signal(signal.SIGINT)
        sys.exit(status)

    monkeypatch.setattr(os, "_exit", ended_with_another)
    monkeypatch.setattr(extract_blog_data, "ending", [])
    with pytest.raises(SystemExit) as ended:
        run(gpt2_folder, data_folder, tmp_path / "model")
    assert ended.value.code == 1
    said = capfd.readouterr().err
    assert said.strip().startswith("Stopped at once")
    assert said.count("Stopped") == 1


def test_under_nohup_a_closed_window_is_no_reason_to_stop(monkeypatch):
    before = signal.getsignal(signal.SIGHUP)
    try:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        with train_model.on_signals(train_model.stop):
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) is train_model.stop
    finally:
        signal.signal(signal.SIGHUP, before)


class Full(io.StringIO):
    def flush(self) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_result_that_cannot_be_printed_is_said_and_the_model_is_there(
    gpt2_folder, data_folder, tmp_path, monkeypatch
):
    monkeypatch.setattr(sys, "stdout", Full())
    with pytest.raises(SystemExit, match="^Cannot print on stdout"):
        run(gpt2_folder, data_folder, tmp_path / "model", "--max-steps", "1")
    assert (tmp_path / "model" / "config.json").exists()


def test_the_disk_plan_counts_what_an_unfinished_run_holds(tmp_path, monkeypatch):
    places = train_model.Places(tmp_path / "model")
    (places.unfinished / "checkpoint-5").mkdir(parents=True)
    (places.unfinished / "checkpoint-5" / "optimizer.pt").write_bytes(bytes(1_000_000))
    plan = train_model.Plan("cpu", "fp32", "adamw_torch_fused", False, 1, 1, 1, parameters=50_000, trained=50_000)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(train_model.shutil, "disk_usage", lambda _: usage._replace(free=500_000))
    assert train_model.check_disk(places, plan) == "1.4 MB of 1.5 MB free"
    (places.unfinished / "checkpoint-5" / "optimizer.pt").unlink()
    with pytest.raises(SystemExit, match=r"Training needs 1\.4 MB on disk for its checkpoints, and 0\.5 MB are free"):
        train_model.check_disk(places, plan)
