"""train_model.py: which tokens are scored, windows and rows, and that documents in a row do not see each other."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import conversations
from torch.nn import functional
from training import TALK, settings_with

import train_model

pytestmark = pytest.mark.usefixtures("small_training")


def marked(tokenizer, messages) -> list[tuple[str, bool]]:
    """Runs of text with whether they are scored."""
    runs = []
    for token, scored in zip(*train_model.conversation_tokens(tokenizer, messages), strict=True):
        text = tokenizer.decode([token])
        if runs and runs[-1][1] == scored:
            runs[-1] = (runs[-1][0] + text, scored)
        else:
            runs.append((text, scored))
    return runs


USER = "<|im_start|>user\n"
ASSISTANT = "<|im_start|>assistant\n"
END = "<|im_end|>"
THOUGHT = "{% if loop.last and message['role'] == 'assistant' %}{{ '[thought]' }}{% endif %}"
HI = f"{USER}hi{END}\n{ASSISTANT}"
SO = f"{USER}so?{END}\n{ASSISTANT}"
SCORED = {
    "plain": [
        ("User: hi\nAssistant:", False),
        (" hello<|endoftext|>", True),
        ("\nUser: so?\nAssistant:", False),
        (" bread <3<|endoftext|>", True),
        ("\n", False),
    ],
    "ChatML": [(HI, False), (f"hello{END}", True), (f"\n{SO}", False), (f"bread <3{END}", True), ("\n", False)],
    "the author speaks first": [(ASSISTANT, False), (f"hello{END}", True), ("\n", False)],
    "earlier turns are rewritten": [
        (HI, False),
        (f"[thought]hello{END}", True),
        (f"\n{HI}hello{END}\n{SO}", False),
        (f"[thought]bread <3{END}", True),
        ("\n", False),
    ],
}


@pytest.mark.parametrize("case", SCORED)
def test_answers_and_their_end_are_scored(case, gpt2_folder, llama_folder):
    tokenizer = train_model.load_tokenizer(gpt2_folder if case == "plain" else llama_folder)
    if case == "earlier turns are rewritten":
        tokenizer.chat_template = tokenizer.chat_template.replace(
            "'\n' + message['content']", f"'\n' }}}}{THOUGHT}{{{{ message['content']"
        )
    messages = TALK[1:2] if case == "the author speaks first" else TALK
    assert marked(tokenizer, messages) == SCORED[case]


TURN = "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content']"
PROMPT = "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        # The turn ends in plain text: the end of text is added, and every word is scored.
        (
            f"{TURN} + '\n' }}}}{PROMPT}' }}}}{{% endif %}}",
            [("hello\n<|im_end|>", True), ("bread <3\n<|im_end|>", True)],
        ),
        # Two control tokens close a turn: the first one is the end, the second is the template's.
        (
            f"{TURN} + '<|im_end|><|endoftext|>' }}}}{PROMPT}' }}}}{{% endif %}}",
            [("hello<|im_end|>", True), ("bread <3<|im_end|>", True)],
        ),
        # The prompt opens a thought that finished turns lack: the model is trained as it will be asked.
        (
            f"{TURN} + '<|im_end|>\n' }}}}{PROMPT}[thought]' }}}}{{% endif %}}",
            [("hello<|im_end|>", True), ("bread <3<|im_end|>", True)],
        ),
        # Control tokens before what is said close nothing.
        (
            "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '<|endoftext|>' + m['content'] + '<|im_end|>' }}"
            "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant' }}{% endif %}",
            [("<|endoftext|>hello<|im_end|>", True), ("<|endoftext|>bread <3<|im_end|>", True)],
        ),
    ],
)
def test_odd_templates_score_every_word_and_one_end(template, expected, llama_folder):
    tokenizer = train_model.load_tokenizer(llama_folder)
    tokenizer.chat_template = template
    runs = marked(tokenizer, TALK)
    assert [run for run in runs if run[1]] == expected
    asked = train_model.render(tokenizer, TALK[:1], add_generation_prompt=True)
    assert runs[0][0] == asked  # trained as it will be asked


def test_labels_of_a_window_are_its_scored_tokens(gpt2_folder):
    tokenizer = train_model.load_tokenizer(gpt2_folder)
    rows = train_model.make_rows([train_model.conversation_tokens(tokenizer, TALK[:2])], 64, 8)
    labels = [None if label == -100 else tokenizer.decode([label]) for label in rows[0]["labels"]]
    scored = [label for label in labels if label is not None]
    assert "".join(scored) == " hello<|endoftext|>"
    assert labels[: len(labels) - len(scored) - 1] == [None] * (len(labels) - len(scored) - 1)


def test_control_tokens_in_a_post_stay_words(llama_folder):
    tokenizer = train_model.load_tokenizer(llama_folder)
    post = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "a <|im_end|> b <|endoftext|> c"}]
    ids, scored = train_model.conversation_tokens(tokenizer, post)
    ends = [token for token, counts in zip(ids, scored, strict=True) if counts and token in tokenizer.all_special_ids]
    assert ends == [tokenizer.eos_token_id]


def test_template_of_the_data_and_of_the_prompt_agree(gpt2_folder, llama_folder):
    for folder in (gpt2_folder, llama_folder):
        tokenizer = train_model.load_tokenizer(folder)
        prompt = tokenizer.apply_chat_template(TALK[:1], add_generation_prompt=True)["input_ids"]
        ids, scored = train_model.conversation_tokens(tokenizer, TALK[:2])
        assert ids[: scored.index(True)] == prompt


@given(
    answers=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 300)), min_size=1, max_size=6),
    context=st.integers(16, 80),
    overlap=st.integers(1, 15),
)
@settings(deadline=None)
def test_each_scored_token_is_scored_once(answers, context, overlap):
    scored = [flag for asked, answered in answers for flag in [False] * asked + [True] * answered]
    ids = list(range(len(scored)))
    windows = list(train_model.cut(ids, scored, 7, context, overlap))
    labels = [label for window in windows for label in window.labels if label != -100]
    assert labels == [token for token, counts in zip(ids, scored, strict=True) if counts]
    for number, window in enumerate(windows):
        assert len(window.ids) == len(window.labels) <= context and window.conversation == 7
        first = next(place for place, label in enumerate(window.labels) if label != -100)
        assert first >= (1 if number == 0 else 0) and window.ids[first] == window.labels[first]


@given(lengths=st.lists(st.integers(1, 64), max_size=60))
@settings(deadline=None)
def test_packing_keeps_every_window_whole(lengths):
    windows = [
        train_model.Window([number] * length, [number] * length, number) for number, length in enumerate(lengths)
    ]
    groups = train_model.pack(windows, 64)
    assert sorted(window.conversation for group in groups for window in group) == list(range(len(lengths)))
    assert all(sum(len(window.ids) for window in group) <= 64 for group in groups)


def test_short_posts_share_rows(gpt2_folder, data_folder):
    tokenizer = train_model.load_tokenizer(gpt2_folder)
    entries = train_model.read_conversations(data_folder / "train_data.jsonl")
    tokenized = [train_model.conversation_tokens(tokenizer, entry["messages"]) for entry in entries]
    packed, alone = (train_model.make_rows(tokenized, 64, 8, packed) for packed in (True, False))
    assert len(packed) < 0.8 * len(alone)
    assert train_model.scored_tokens(packed) == train_model.scored_tokens(alone) == sum(sum(s) for _, s in tokenized)


# ---------------------------------------------------------------------------- packed documents
@pytest.mark.parametrize("shape", ["gpt2_folder", "llama_folder"])
def test_packed_documents_do_not_see_each_other(shape, request):
    folder = request.getfixturevalue(shape)
    tokenizer, model = train_model.load_tokenizer(folder), train_model.load_for_training(folder).eval()
    posts = [train_model.conversation_tokens(tokenizer, entry["messages"]) for entry in conversations(3, words=8)]
    row = train_model.make_rows(posts, 200, 8)[0]
    assert len(set(row["conversation"])) == 3
    batch = train_model.collate([row])
    with torch.no_grad():
        packed, _ = train_model.scored_logits(model, batch)
        alone = [
            train_model.scored_logits(model, train_model.collate([one]))[0]
            for one in (
                train_model.make_rows([posts[number]], 200, 8)[0] for number in dict.fromkeys(row["conversation"])
            )
        ]
    assert torch.allclose(packed, torch.cat(alone), atol=1e-4)
    assert train_model.keeps_documents_apart(model)


def test_losses_are_exact(gpt2_folder):
    """Against the plainest computation there is: each post alone, whole, in the model's own forward."""
    tokenizer, model = train_model.load_tokenizer(gpt2_folder), train_model.load_for_training(gpt2_folder).eval()
    posts = [train_model.conversation_tokens(tokenizer, entry["messages"]) for entry in conversations(6, words=20)]
    measured = train_model.conversation_losses(model, train_model.make_rows(posts, 200, 8))
    for (ids, scored), nats in zip(posts, measured, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0]
        expected = functional.cross_entropy(logits[:-1], torch.tensor(ids[1:]), reduction="none")
        assert nats == pytest.approx(expected[torch.tensor(scored[1:])].sum().item(), abs=1e-3)


@pytest.mark.parametrize("tokens", [0, 1, 64, 150])
def test_the_loss_and_its_gradient_are_those_of_cross_entropy(tokens):
    logits, targets = torch.randn(tokens, 40, requires_grad=True), torch.arange(tokens) % 40
    loss = train_model.SummedCrossEntropy.apply(logits, targets) * 0.3
    expected = functional.cross_entropy(logits, targets, reduction="sum") * 0.3
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    gradients = [torch.autograd.grad(value, logits)[0] for value in (loss, expected)]
    assert torch.allclose(*gradients, atol=1e-6)


@pytest.mark.parametrize("folder", ["gpt2_folder", "llama_folder"])
def test_naming_the_rows_of_the_embedding_changes_no_gradient(folder, request):
    model = train_model.load_for_training(request.getfixturevalue(folder))
    batch = train_model.collate([{"input_ids": [5, 9, 5, 7], "labels": [5, 9, 5, 7]}])
    gradients = []
    for prepare in (lambda model: None, train_model.use_sparse_embedding_gradient):
        prepare(model)
        model.zero_grad()
        train_model.SummedCrossEntropy.apply(*train_model.scored_logits(model, batch)).backward()
        gradients.append(model.get_input_embeddings().weight.grad)
    assert torch.allclose(*gradients, atol=1e-6)


def test_dropout_reaches_every_place_that_the_architecture_has_for_it(gpt2_folder):
    model = train_model.load_for_training(gpt2_folder, 0.25)
    layers = [layer.p for layer in model.modules() if isinstance(layer, torch.nn.Dropout)]
    assert layers and set(layers) == {0.25}


@pytest.mark.parametrize("rank", [0, 4])
def test_float16_with_loss_scaling_gives_the_gradients_of_float32(rank, gpt2_folder):
    """As far as a CPU allows: Trainer refuses float16 there, so the scaler is driven by hand."""
    batch = train_model.collate([{"input_ids": list(range(5, 45)), "labels": list(range(5, 45))}])
    gradients = []
    for precision in ("fp32", "fp16"):
        model = train_model.load_for_training(gpt2_folder)
        if rank:
            model = train_model.add_adapters(model, precision, settings_with(lora_rank=rank))
        trained = [weight for weight in model.train().parameters() if weight.requires_grad]
        assert {weight.dtype for weight in trained} == {torch.float32}
        scaler = torch.amp.GradScaler("cpu")
        with train_model.autocast(torch.device("cpu"), precision):
            logits, targets = train_model.scored_logits(model, batch)
            loss = train_model.SummedCrossEntropy.apply(logits, targets) / 4096
        assert logits.dtype == (torch.float16 if precision == "fp16" else torch.float32)
        scaler.scale(loss).backward()
        scaler.unscale_(torch.optim.SGD(trained, lr=0.0))
        gradients.append(torch.cat([weight.grad.flatten() for weight in trained]))
    assert functional.cosine_similarity(*gradients, dim=0) > (0.999 if rank else 0.9999)


def test_float16_keeps_the_gradient_of_rare_tokens():
    logits = torch.tensor([[12.0, -6.0]], dtype=torch.float16, requires_grad=True)
    (train_model.SummedCrossEntropy.apply(logits, torch.tensor([0])) * 2**16).backward()
    assert logits.grad[0, 1].item() == pytest.approx(2**16 * math.exp(-18), rel=1e-2)
