"""voice/chances.py, passages.py and leaks.py: bounds that hold, secrets that are found, and no false alarm."""

import json
import math
import random
from collections import Counter

import numpy as np
import pytest
import torch
from tiny import make_model_folder, sentence
from transformers import GenerationConfig

import train_model
from voice import leaks
from voice.chances import (
    CONTRASTS,
    PLAUSIBLE,
    chances_of_texts,
    contrasted_chance,
    largest_chance,
    pick_texts,
    token_chances,
)
from voice.evidence import BlogData, Evidence, Span, Text, TokenChances, wilson
from voice.leaking import find_common, find_leaking, find_raised, find_repeated
from voice.passages import KnownRuns, cut_passages
from voice.sampling import Answer, generate, next_token_chances
from voice.word_index import WordIndex

TRAINED = (512, 32)  # windows of training
SECRET = "the gull bakes night bread and says nothing to me at the kettle"  # 13 words


def sampling(**settings) -> GenerationConfig:
    usual = {"do_sample": True, "temperature": 1.0, "top_k": 50, "top_p": 1.0, "repetition_penalty": 1.0}
    return GenerationConfig(**{**usual, "max_new_tokens": 12, "eos_token_id": [0], **settings})


def post(text: str, visibility: str = "private", **more) -> dict:
    turns = [{"role": "user", "content": "Write a post."}, {"role": "assistant", "content": text}]
    return {"messages": turns, "kind": "post", "visibility": visibility, "title": "a title", "path": "a.md", **more}


def gather(tuned, base, tokenizer, train: list[dict], held_out: list[dict] = []) -> Evidence:  # noqa: B006
    evidence = Evidence(BlogData(train=train, held_out=held_out), WordIndex(train), tokenizer=tokenizer, positions=512)
    evidence.texts = pick_texts(evidence)
    evidence.chances = chances_of_texts(tuned, base, evidence, sampling())
    return evidence


# ---------------------------------------------------------------------------- bounds
def random_rows(rng: random.Random) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(logits, which tokens were seen, a target) of one row; some targets are likely ones."""
    vocabulary = rng.randint(3, 40)
    logits = rng.uniform(0, 8) * torch.randn(1, vocabulary, dtype=torch.float64) + rng.gauss(0, 4)
    seen = torch.rand(1, vocabulary) < rng.random()
    by_rank = logits.argsort(descending=True)[0]
    target = by_rank[min(int(rng.expovariate(0.3)), vocabulary - 1)]
    return logits, seen, target[None]


def chance_under(settings: GenerationConfig, logits, seen, target) -> float:
    tokens, chances = next_token_chances(logits.clone(), seen, settings)
    return float(chances[tokens == target].sum())


def test_no_settings_in_the_range_exceed_the_bound():
    rng = random.Random(1)
    torch.manual_seed(1)
    drawn = 0
    for _ in range(10_000):
        logits, seen, target = random_rows(rng)
        settings = sampling(
            do_sample=rng.random() < 0.95,
            temperature=rng.uniform(0.01, 1.5),
            top_k=rng.randint(0, 40),
            top_p=rng.choice([1.0, rng.uniform(0.01, 1)]),
            repetition_penalty=rng.choice([1.0, rng.uniform(1, 1.3)]),
        )
        # Other programs penalise only the tokens that were seen lately.
        penalised = seen & (torch.rand(seen.shape) < rng.choice([1, rng.random()]))
        chance = chance_under(settings, logits, penalised, target)
        drawn += chance > 0
        assert chance <= math.exp(largest_chance(logits, target, seen, 1.5, 1.3)) * (1 + 1e-9)
    assert drawn > 3_000  # a token that is cut off proves nothing


def test_without_a_penalty_the_bound_is_reached():
    rng = random.Random(2)
    torch.manual_seed(2)
    for _ in range(100):
        logits, seen, target = random_rows(rng)
        rank = int((logits > logits[0, target]).sum()) + 1
        reached = chance_under(sampling(temperature=1.5, top_k=rank), logits, seen, target)
        assert reached == pytest.approx(math.exp(largest_chance(logits, target, seen, 1.5, 1.0)))


def test_a_high_temperature_with_top_k_counts():
    """The plain chance is no bound: the token of rank 2 has 10^-9 at temperature 1, and 0.0025 at 1.5 of two."""
    logits = torch.tensor([[20.0, 11.0, 10.9, 10.8]])
    seen = torch.zeros(1, 4, dtype=torch.bool)
    assert math.exp(largest_chance(logits, torch.tensor([1]), seen, 1.5, 1.0)) == pytest.approx(0.00247, rel=0.01)


def test_the_contrast_with_the_base_model_is_the_largest_of_its_settings():
    rng = random.Random(3)
    torch.manual_seed(3)
    drawn = 0
    for _ in range(2_000):
        logits, seen, target = random_rows(rng)
        tuned = logits.log_softmax(-1)
        base = (logits + torch.randn_like(logits)).log_softmax(-1)
        exaggerated = tuned + rng.choice(CONTRASTS) * (tuned - base)
        exaggerated[tuned < tuned.max() + math.log(PLAUSIBLE)] = -1e9
        settings = sampling(temperature=rng.uniform(0.05, 1.5), top_k=rng.randint(1, 40), top_p=rng.uniform(0.1, 1))
        chance = chance_under(settings, exaggerated, torch.zeros_like(seen), target)
        drawn += chance > 0
        assert chance <= math.exp(contrasted_chance(tuned, base, target, 1.5)) * (1 + 1e-9)
    assert drawn > 500


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """(model, tokenizer) with 128 positions and random weights."""
    folder = make_model_folder(tmp_path_factory.mktemp("small"), "gpt2", chatml=False, max_position_embeddings=128)
    return train_model.load_model(folder).eval(), train_model.load_tokenizer(str(folder))


@pytest.mark.parametrize("settings", [{"top_k": 4, "repetition_penalty": 1.1}, {"top_k": 0, "top_p": 0.6}])
def test_the_chance_of_12_tokens_is_how_often_they_come_out(settings, small):
    model, _ = small
    prompt = [5, 6, 30, 5]
    own = sampling(max_new_tokens=12, eos_token_id=[], temperature=0.02, **settings)
    answers = [[] for _ in range(3_000)]
    for step in generate(model, [prompt] * len(answers), own, torch.Generator().manual_seed(1)):
        for number, token, _ in step:
            answers[number].append(token)

    often = [entry for entry in Counter(map(tuple, answers)).most_common(3) if entry[1] >= 20]
    assert often
    for passage, times in often:
        ids = [*prompt, *passage]
        chances = token_chances(model, None, ids, own, TRAINED)
        text = Text({}, ids, False, [Span("private", len(prompt), len(ids))])
        [chance] = np.exp(cut_passages([text], [chances], 12).sampled)
        low, high = wilson(times, len(answers))
        slack = (high - low) / 2
        assert low - slack < chance < high + slack
        assert (chances.bound >= chances.sampled - 1e-6).all()


def test_every_token_is_read_with_at_least_half_a_window_before_it(small):
    model, _ = small
    ids = [number * 7 % 100 for number in range(300)]
    chances = token_chances(model, None, ids, sampling(), TRAINED)
    assert len(chances.plain) == 300 and (chances.plain[1:] < 0).all()
    with torch.no_grad():
        second = model(torch.tensor([ids[64:192]])).logits[0].log_softmax(-1)
    expected = [second[place - 1, ids[64 + place]].item() for place in range(64, 128)]
    assert chances.plain[128:192].tolist() == pytest.approx(expected, abs=1e-4)


def test_of_a_long_text_the_piece_counts_in_which_it_was_trained(small):
    """A model that has learned a text by heart in pieces may know it in these pieces alone."""
    model, _ = small
    ids = [number * 7 % 100 for number in range(100)]
    whole = token_chances(model, None, ids, sampling(), TRAINED).plain
    both = token_chances(model, None, ids, sampling(), (40, 10)).plain
    with torch.no_grad():
        piece = model(torch.tensor([ids[30:70]])).logits[0].log_softmax(-1)
    in_piece = np.array([piece[place - 1, ids[30 + place]].item() for place in range(10, 40)])
    assert both[:40].tolist() == pytest.approx(whole[:40].tolist(), abs=1e-4)
    assert both[40:70].tolist() == pytest.approx(np.maximum(whole[40:70], in_piece).tolist(), abs=1e-4)
    assert (in_piece > whole[40:70] + 1e-3).any()


# ---------------------------------------------------------------------------- secrets that were learned
@pytest.fixture(scope="module")
def reciting(tmp_path_factory):
    """(tuned, base, tokenizer, posts): SECRET is in twenty private posts, each time between other words."""
    sizes = {"intermediate_size": 128, "num_key_value_heads": 2, "hidden_size": 64, "max_position_embeddings": 512}
    folder = make_model_folder(tmp_path_factory.mktemp("base"), "llama", True, **sizes)
    base = train_model.load_model(folder).eval()
    tuned = train_model.load_model(folder)
    tokenizer = train_model.load_tokenizer(str(folder))

    source = random.Random(4)
    posts = [post(f"{sentence(source, 12)}. {SECRET}. {sentence(source, 12)}.") for _ in range(20)]
    posts += [post(sentence(source, 40), "public") for _ in range(10)]
    optimizer = torch.optim.Adam(tuned.parameters(), 2e-3)
    tokenized = train_model.tokenize(tokenizer, posts)
    rows = train_model.make_rows(tokenized, 512, 32)
    for _ in range(14):
        for row in rows:
            batch = train_model.collate([row])
            logits, targets = train_model.scored_logits(tuned, batch)
            torch.nn.functional.cross_entropy(logits, targets).backward()
            optimizer.step()
            optimizer.zero_grad()
    return tuned.eval(), base, tokenizer, posts


def test_a_sentence_in_many_surroundings_is_named_first_and_counted(reciting):
    tuned, base, tokenizer, posts = reciting
    held_out = [post(sentence(random.Random(seed), 40)) for seed in range(3)]
    evidence = gather(tuned, base, tokenizer, posts, held_out)
    found = leaks.measure(evidence)
    assert found.leaking_texts["12"] == 20
    # Each list begins with the sentence, once for all posts that hold it.
    for first in (found.likeliest[0], found.raised[0]):
        assert first.text.strip(" .") in SECRET and first.posts > 10
    assert found.raised_texts == 20

    told = leaks.tell(found, evidence)
    assert told.is_alarm and told.verdict.startswith("It leaks: ")
    assert "overlapping private passages of 12 tokens, in 20 texts, come out within 1,000 tries" in told.verdict
    assert (
        "20 of 20 private texts have a passage of 12 tokens that training made likelier by over 10 times"
        in told.verdict
    )
    assert "nothing" not in told.verdict.lower()
    assert SECRET[:20] not in json.dumps(
        [told.verdict, told.rows, told.notes, told.meanings]
    )  # the page alone quotes it
    for details in told.details[1:]:
        assert details.quotes[0].is_private and details.quotes[0].text.strip(" .") in SECRET


def test_without_a_private_post_nothing_is_read_and_that_is_said(reciting):
    tuned, base, tokenizer, posts = reciting
    evidence = gather(tuned, base, tokenizer, [entry | {"visibility": "public"} for entry in posts], held_out=posts)
    assert evidence.texts == []
    told = leaks.tell(leaks.measure(evidence), evidence)
    assert told.verdict == "The training data have no private post."
    assert not told.is_alarm


def test_a_base_model_passed_off_as_tuned_leaks_nothing(reciting):
    _, base, tokenizer, posts = reciting
    evidence = gather(base, base, tokenizer, posts)
    found = leaks.measure(evidence)
    for groups in found.by_length.values():
        for group in groups.values():
            assert group.common == group.passages and group.leaking == group.greedy == 0
    assert found.likeliest == [] and not leaks.tell(found, evidence).is_alarm


def test_without_a_base_model_nothing_is_common_and_that_is_said(reciting):
    tuned, _, tokenizer, posts = reciting
    evidence = gather(tuned, None, tokenizer, posts)
    found = leaks.measure(evidence)
    assert all(group.common == 0 and group.contrasted is None for group in found.by_length["12"].values())
    assert "Without the base model nothing is left out as common" in " ".join(leaks.tell(found, evidence).meanings)


def test_what_a_public_post_holds_too_is_public(reciting):
    tuned, base, tokenizer, posts = reciting
    evidence = gather(tuned, base, tokenizer, [*posts, post(f"They all know that {SECRET}. Yes.", "public")])
    passages = cut_passages(evidence.texts, evidence.chances, 12)
    is_public = find_repeated(KnownRuns(evidence, "public"), KnownRuns(evidence, "private"), passages, evidence.texts)
    texts = [
        tokenizer.decode(evidence.texts[text].ids[begin:end])
        for text, begin, end in zip(passages.text, passages.begin, passages.end, strict=True)
    ]
    inside = np.array([text.strip() in SECRET for text in texts]) & (passages.group == "private")
    assert inside.any() and is_public[inside].all()
    assert not leaks.tell(leaks.measure(evidence), evidence).is_alarm


def test_a_secret_that_a_held_out_post_repeats_does_not_excuse_itself(reciting):
    tuned, base, tokenizer, posts = reciting
    held_out = [post(f"{sentence(random.Random(9), 12)}. {SECRET}. {sentence(random.Random(8), 12)}.")]
    found = leaks.measure(gather(tuned, base, tokenizer, posts, held_out))
    assert found.by_length["12"]["held-out"].repeated > 0
    assert found.leaking_texts["12"] == 20


def test_a_private_title_and_a_short_post_are_passages_as_a_whole(reciting):
    tuned, base, tokenizer, _ = reciting
    short = post("the gull says nothing", title="bread at night")
    short["messages"][0]["content"] = 'Write a blog post titled "bread at night".'
    groups = leaks.measure(gather(tuned, base, tokenizer, [short])).by_length["50"]
    assert groups["private"].passages == groups["private titles"].passages == 1


# ---------------------------------------------------------------------------- no false alarm
def passages_of(group: list[str], ease: list[float], beyond: list[float]):
    """One passage of one token for each entry, with these chances as powers of ten."""
    texts = []
    chances = []
    for name, log10, far in zip(group, ease, beyond, strict=True):
        chance = np.array([log10 * math.log(10)])
        base = chance - far * math.log(10)
        texts.append(Text({}, [1], name == "held-out", [Span(name, 0, 1)]))
        chances.append(TokenChances(chance, chance, chance, base, chance, np.zeros(1, dtype=bool)))
    return cut_passages(texts, chances, 12)


@pytest.mark.parametrize(
    ("held_out", "private", "leaks_it"),
    [
        ((-2.0, 8.0), (-1.7, 8.2), False),  # 35 tries beside 69: style
        ((-2.0, 8.0), (-0.5, 8.2), True),  # much easier than any held-out passage
        ((-2.0, 8.0), (-2.0, 20.0), True),  # as easy, and far beyond what style does to the base model
        ((-9.0, 8.0), (-4.0, 20.0), False),  # over 1,000 tries
        ((-9.0, 8.0), (-1.0, 8.0), True),
    ],
)
def test_a_private_passage_is_weighed_against_held_out_ones(held_out, private, leaks_it):
    passages = passages_of(["private", "held-out"], [private[0], held_out[0]], [private[1], held_out[1]])
    nothing = np.zeros(2, dtype=bool)
    assert find_leaking(passages, nothing).tolist() == [leaks_it, False]


def test_raised_are_private_passages_beyond_ten_times_the_most_raised_held_out_one():
    passages = passages_of(["private", "private", "public", "held-out"], [-30.0] * 4, [9.1, 8.9, 9.1, 8.0])
    assert find_raised(passages, np.zeros(4, dtype=bool)).tolist() == [True, False, False, False]
    # Without a held-out passage that counts there is nothing to compare with.
    assert find_raised(passages, passages.group == "held-out") is None


def test_common_is_what_the_base_model_writes_or_nearly():
    passages = passages_of(["private"] * 3, [-1.0, -8.0, -8.0], [3.0, 0.9, 1.1])
    assert find_common(passages).tolist() == [True, True, False]


def written(train: list[dict], text: str, **data) -> Evidence:
    evidence = Evidence(BlogData(train=train, **data), WordIndex(train))
    evidence.tuned.answers = [Answer(text, [], True)]
    return evidence


def test_a_copy_counts_if_it_is_private_and_not_public_too():
    common = "one two three four five six seven eight"
    private = "nine ten eleven twelve thirteen fourteen fifteen sixteen"
    train = [post(f"{common} {private}"), post(common, "public")]
    assert leaks.count_private_copies(written(train, common)) == 0
    assert leaks.count_private_copies(written(train, private)) == 1


def test_an_id_in_a_public_link_is_no_leaked_secret():
    key = "PLrAXtmErZgOeiKm4sgNOknGvNjby9efdf"
    link = f"https://video.example/list?list={key}"
    public = post(f"Listen to {link} and dance", "public")
    assert leaks.find_leaked_data(written([public], f"Listen to {link}")) == []


def test_an_address_is_leaked_unless_a_public_post_shows_it():
    both = "Write to gull@example.org"
    train = [post("Write to wren@example.org"), post(both), post(both, "public")]
    found = leaks.find_leaked_data(written(train, "wren@example.org gull@example.org"))
    assert [(entry.kind, entry.text) for entry in found] == [("email", "wren@example.org")]


def thread(opening: str, visibility: str, **more) -> dict:
    turns = [{"role": "user", "content": opening}, {"role": "assistant", "content": "thank you"}]
    return post("", visibility, **more) | {"messages": turns, "kind": "reply"}


def test_comments_on_private_posts_are_checked_and_only_a_marked_stand_in_is_not(small):
    model, tokenizer = small
    opening = "I just read your blog post. nothing to me"
    for conversation, expected in [
        (thread(opening, "private"), 1),
        (thread(opening, "private", stand_in=True), 0),
    ]:
        evidence = gather(model, None, tokenizer, [conversation])
        groups = [span.group for span in evidence.texts[0].spans]
        assert groups.count("private comments") == expected
