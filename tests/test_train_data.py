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
            ["hello\n<|im_end|>", "bread <3\n<|im_end|>"],
        ),
        # Two control tokens close a turn: the first one is the end, the second is the template's.
        (
            f"{TURN} + '<|im_end|><|endoftext|>' }}}}{PROMPT}' }}}}{{% endif %}}",
            ["hello<|im_end|>", "bread <3<|im_end|>"],
        ),
        # The prompt opens a thought that finished turns lack: the model is trained as it will be asked.
        (
            f"{TURN} + '<|im_end|>\n' }}}}{PROMPT}[thought]' }}}}{{% endif %}}",
            ["hello<|im_end|>", "bread <3<|im_end|>"],
        ),
        # Control tokens before what is said close nothing.
        (
            "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '<|endoftext|>' + m['content'] + '<|im_end|>' }}"
            "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant' }}{% endif %}",
            ["<|endoftext|>hello<|im_end|>", "<|endoftext|>bread <3<|im_end|>"],
        ),
    ],
)
def test_odd_templates_score_every_word_and_one_end(template, expected, llama_folder):
    tokenizer = train_model.load_tokenizer(llama_folder)
    tokenizer.chat_template = template
    (prompt, _), *runs = marked(tokenizer, TALK)
    assert [text for text, is_scored in runs if is_scored] == expected
    asked = train_model.render(tokenizer, TALK[:1], add_generation_prompt=True)
    assert prompt == asked  # trained as it will be asked


@pytest.mark.parametrize("answer", ["<3 to you", "<t", "<", "hello", "<think aloud", "hi", "<|im_start|>assistant"])
def test_an_answer_that_begins_like_the_end_of_the_prompt_keeps_its_first_letters(answer, llama_folder):
    tokenizer = train_model.load_tokenizer(llama_folder)
    tokenizer.chat_template = f"{TURN} + '<|im_end|>\n' }}}}{PROMPT}<think>' }}}}{{% endif %}}"
    talk = [TALK[0], {"role": "assistant", "content": answer}]
    prompt, rest = train_model.split_at_answer(tokenizer, talk, train_model.render(tokenizer, talk))
    assert prompt.endswith("assistant\n<think>")
    assert rest == train_model.break_control_tokens(answer, tokenizer) + "<|im_end|>\n"


@given(
    answers=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 300)), min_size=1, max_size=6),
    context=st.integers(16, 80),
    overlap=st.integers(1, 15),
)
@settings(deadline=None)
def test_each_scored_token_is_scored_once(answers, context, overlap):
    scored = []
    for asked, answered in answers:
        scored += [False] * asked + [True] * answered
    windows = list(train_model.cut(list(range(len(scored))), scored, 7, context, overlap))

    labels = []
    for window in windows:
        assert len(window.ids) == len(window.labels) <= context
        assert window.conversation == 7
        own = [place for place, label in enumerate(window.labels) if label != -100]
        assert [window.ids[place] for place in own] == [window.labels[place] for place in own]
        labels += [window.labels[place] for place in own]
    assert labels == [token for token, counts in enumerate(scored) if counts]


@given(lengths=st.lists(st.integers(1, 64), max_size=60))
@settings(deadline=None)
def test_packing_keeps_every_window_whole(lengths):
    windows = [train_model.Window([0] * length, [0] * length, number) for number, length in enumerate(lengths)]
    packed = []
    for group in train_model.pack(windows, 64):
        assert sum(len(window.ids) for window in group) <= 64
        packed += [window.conversation for window in group]
    assert sorted(packed) == list(range(len(lengths)))


def test_short_posts_share_rows(gpt2_folder, data_folder):
    tokenizer = train_model.load_tokenizer(gpt2_folder)
    entries = train_model.read_conversations(data_folder / "train_data.jsonl")
    tokenized = [train_model.conversation_tokens(tokenizer, entry["messages"]) for entry in entries]
    packed = train_model.make_rows(tokenized, 64, 8)
    alone = train_model.make_rows(tokenized, 64, 8, packed=False)
    assert len(packed) < 0.8 * len(alone)
    tokens = sum(sum(scored) for _, scored in tokenized)
    assert train_model.scored_tokens(packed) == train_model.scored_tokens(alone) == tokens


# ---------------------------------------------------------------------------- packed documents
@pytest.mark.parametrize("shape", ["gpt2_folder", "llama_folder"])
def test_packed_documents_do_not_see_each_other(shape, request):
    folder = request.getfixturevalue(shape)
    model = train_model.load_for_training(folder).eval()
    posts = train_model.tokenize(train_model.load_tokenizer(folder), conversations(3, words=8))
    [row] = train_model.make_rows(posts, 200, 8)
    order = list(dict.fromkeys(row["conversation"]))
    assert len(order) == 3

    alone = []
    with torch.no_grad():
        packed, _ = train_model.scored_logits(model, train_model.collate([row]))
        for number in order:
            rows = list(train_model.make_rows([posts[number]], 200, 8))
            logits, _ = train_model.scored_logits(model, train_model.collate(rows))
            alone.append(logits)
    assert torch.allclose(packed, torch.cat(alone), atol=1e-4)
    assert train_model.keeps_documents_apart(model)


def test_losses_are_exact(gpt2_folder):
    """Against the plainest computation there is: each post alone, whole, in the model's own forward."""
    model = train_model.load_for_training(gpt2_folder).eval()
    posts = train_model.tokenize(train_model.load_tokenizer(gpt2_folder), conversations(6, words=20))
    measured = train_model.conversation_losses(model, train_model.make_rows(posts, 200, 8))
    for (ids, scored), nats in zip(posts, measured, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0]
        losses = functional.cross_entropy(logits[:-1], torch.tensor(ids[1:]), reduction="none")
        expected = losses[torch.tensor(scored[1:])].sum()
        assert nats == pytest.approx(expected.item(), abs=1e-3)


@pytest.mark.parametrize("tokens", [0, 1, 64, 150])
def test_the_loss_and_its_gradient_are_those_of_cross_entropy(tokens):
    logits = torch.randn(tokens, 40, requires_grad=True)
    targets = torch.arange(tokens) % 40
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


def test_adapters_get_the_gradients_of_float32_in_float16_with_loss_scaling(gpt2_folder):
    """As far as a CPU allows: Trainer refuses float16 there, so the scaler is driven by hand."""
    batch = train_model.collate([{"input_ids": list(range(5, 45)), "labels": list(range(5, 45))}])
    gradients = []
    for precision in ("fp32", "fp16"):
        model = train_model.load_for_training(gpt2_folder)
        model = train_model.add_adapters(model, precision, settings_with(lora_rank=4))
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
    assert functional.cosine_similarity(*gradients, dim=0) > 0.999


def test_float16_keeps_the_gradient_of_rare_tokens():
    logits = torch.tensor([[12.0, -6.0]], dtype=torch.float16, requires_grad=True)
    (train_model.SummedCrossEntropy.apply(logits, torch.tensor([0])) * 2**16).backward()
    assert logits.grad[0, 1].item() == pytest.approx(2**16 * math.exp(-18), rel=1e-2)
