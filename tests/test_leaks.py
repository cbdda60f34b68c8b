"""voice/chances.py, passages.py and leaks.py: bounds that hold, secrets that are found, and no false alarm."""

import json
import math
import random
from collections import Counter

import numpy as np
import pytest
import torch
from reporting import sampling
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
from voice.passages import LN_10, KnownRuns, Passages, cut_passages
from voice.sampling import Answer, generate, next_token_chances
from voice.word_index import WordIndex

TRAINED = (512, 32)  # windows of training
SECRET = "the gull bakes night bread and says nothing to me at the kettle"  # 13 words


def post(text: str, visibility: str = "private", **more) -> dict:
    request = {"role": "user", "content": "Write a post."}
    answer = {"role": "assistant", "content": text}
    return {
        "messages": [request, answer],
        "kind": "post",
        "visibility": visibility,
        "title": "a title",
        "path": "a.md",
        **more,
    }


def gather(tuned, base, tokenizer, train: list[dict], held_out: list[dict] | None = None) -> Evidence:
    blog = BlogData(train, held_out or [])
    evidence = Evidence(blog, WordIndex(train), tokenizer=tokenizer, positions=512)
    evidence.texts = pick_texts(evidence)
    evidence.chances = chances_of_texts(tuned, base, evidence, sampling())
    return evidence


# ---------------------------------------------------------------------------- bounds
def random_rows(rng: random.Random) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(logits, which tokens were seen, a target) of one row; some targets are likely ones."""
    vocabulary = rng.randint(3, 40)
    spread = rng.uniform(0, 8)
    middle = rng.gauss(0, 4)
    noise = torch.randn(1, vocabulary, dtype=torch.float64)
    logits = spread * noise + middle

    share_seen = rng.random()
    seen = torch.rand(1, vocabulary) < share_seen
    rank = min(int(rng.expovariate(0.3)), vocabulary - 1)
    target = logits.argsort(descending=True)[:, rank]
    return logits, seen, target


def chance_under(settings: GenerationConfig, logits, seen, target) -> float:
    tokens, chances = next_token_chances(logits.clone(), seen, settings)
    return chances[tokens == target].sum().item()


def bound_of(logits, seen, target, penalty: float) -> float:
    return math.exp(largest_chance(logits, target, seen, 1.5, penalty))


def test_no_settings_in_the_range_exceed_the_bound():
    rng = random.Random(1)
    torch.manual_seed(1)
    drawn = 0
    for _ in range(4_000):
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
        assert chance <= bound_of(logits, seen, target, 1.3) * (1 + 1e-9)
    assert drawn > 1_200  # a token that is cut off proves nothing


def test_without_a_penalty_the_bound_is_reached():
    """With top-k and a high temperature: the plain chance of a token of rank 2 may be 10^-9 where this is 0.0025."""
    rng = random.Random(2)
    torch.manual_seed(2)
    for _ in range(100):
        logits, seen, target = random_rows(rng)
        likelier = (logits > logits[0, target]).sum().item()
        settings = sampling(temperature=1.5, top_k=likelier + 1)
        reached = chance_under(settings, logits, seen, target)
        assert reached == pytest.approx(bound_of(logits, seen, target, 1.0))


def test_the_contrast_with_the_base_model_is_the_largest_of_its_settings():
    rng = random.Random(3)
    torch.manual_seed(3)
    drawn = 0
    for _ in range(2_000):
        logits, seen, target = random_rows(rng)
        tuned = logits.log_softmax(-1)
        base = (logits + torch.randn_like(logits)).log_softmax(-1)
        exaggerated = tuned + rng.choice(CONTRASTS) * (tuned - base)
        least = tuned.max() + math.log(PLAUSIBLE)
        exaggerated[tuned < least] = -1e9
        settings = sampling(temperature=rng.uniform(0.05, 1.5), top_k=rng.randint(1, 40), top_p=rng.uniform(0.1, 1))
        chance = chance_under(settings, exaggerated, torch.zeros_like(seen), target)
        drawn += chance > 0
        bound = math.exp(contrasted_chance(tuned, base, target, 1.5))
        assert chance <= bound * (1 + 1e-9)
    assert drawn > 500


@pytest.mark.parametrize("settings", [{"top_k": 4, "repetition_penalty": 1.1}, {"top_k": 0, "top_p": 0.6}])
def test_the_chance_of_12_tokens_is_how_often_they_come_out(settings, loaded):
    model, _ = loaded
    prompt = [5, 6, 30, 5]
    own = sampling(max_new_tokens=12, eos_token_id=[], temperature=0.02, **settings)
    answers = [[] for _ in range(3_000)]
    for step in generate(model, [prompt] * 3_000, own, torch.Generator().manual_seed(1)):
        for number, token, _ in step:
            answers[number].append(token)

    counted = Counter(map(tuple, answers)).most_common(3)
    assert counted[0][1] >= 20
    for passage, times in counted:
        if times < 20:
            continue
        ids = [*prompt, *passage]
        chances = token_chances(model, None, ids, own, TRAINED)
        text = Text({}, ids, [Span("private", len(prompt), len(ids))])
        [chance] = np.exp(cut_passages([text], [chances], 12).sampled)

        low, high = wilson(times, 3_000)
        slack = (high - low) / 2
        assert low - slack < chance < high + slack
        assert (chances.bound >= chances.sampled - 1e-6).all()


@torch.no_grad()
def chances_alone(model, piece: list[int]) -> np.ndarray:
    """The logarithm of each token's chance but the first's, if the model reads nothing else."""
    logits = model(torch.tensor([piece])).logits
    rows = logits[0, :-1].log_softmax(-1)
    return rows[range(len(rows)), piece[1:]].numpy()


def test_every_token_is_read_with_at_least_half_a_window_before_it(loaded):
    model, _ = loaded
    ids = [number * 7 % 100 for number in range(300)]
    plain = token_chances(model, None, ids, sampling(), TRAINED).plain
    assert len(plain) == 300
    assert (plain[1:] < 0).all()
    second_window = chances_alone(model, ids[64:192])
    assert plain[128:192] == pytest.approx(second_window[-64:], abs=1e-4)


def test_of_a_long_text_the_piece_counts_in_which_it_was_trained(loaded):
    """A model that has learned a text by heart in pieces may know it in these pieces alone."""
    model, _ = loaded
    ids = [number * 7 % 100 for number in range(100)]
    whole = token_chances(model, None, ids, sampling(), TRAINED).plain
    both = token_chances(model, None, ids, sampling(), (40, 10)).plain

    # The second piece, of which the first ten tokens are context.
    in_piece = chances_alone(model, ids[30:70])[-30:]
    in_whole = whole[40:70]
    assert both[:40] == pytest.approx(whole[:40], abs=1e-4)
    assert both[40:70] == pytest.approx(np.maximum(in_whole, in_piece), abs=1e-4)
    assert (in_piece > in_whole + 1e-3).any()


# ---------------------------------------------------------------------------- secrets that were learned
def secret_post(source: random.Random) -> dict:
    before = sentence(source, 12)
    after = sentence(source, 12)
    return post(f"{before}. {SECRET}. {after}.")


@pytest.fixture(scope="module")
def reciting(tmp_path_factory):
    """(tuned, base, tokenizer, posts): SECRET is in twenty private posts, each time between other words."""
    sizes = {"intermediate_size": 128, "num_key_value_heads": 2, "hidden_size": 64, "max_position_embeddings": 512}
    folder = make_model_folder(tmp_path_factory.mktemp("base"), "llama", True, **sizes)
    base = train_model.load_model(folder).eval()
    tuned = train_model.load_model(folder)
    tokenizer = train_model.load_tokenizer(str(folder))

    source = random.Random(4)
    posts = [secret_post(source) for _ in range(20)]
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
    held_out = [post(sentence(random.Random(seed), 40)) for seed in range(3)]
    evidence = gather(*reciting, held_out)
    found = leaks.measure(evidence)
    assert found.leaking_texts["12"] == 20
    assert found.raised_texts == 20
    # Each list begins with the sentence, once for all posts that hold it.
    for first in (found.likeliest[0], found.raised[0]):
        assert first.text.strip(" .") in SECRET
        assert first.posts > 10

    told = leaks.tell(found, evidence)
    assert told.is_alarm
    verdict = told.verdict
    assert verdict.startswith("It leaks: ")
    assert "overlapping private passages of 12 tokens, in 20 texts, come out within 1,000 tries" in verdict
    assert "20 of 20 private texts have a passage of 12 tokens that training made likelier by over 10 times" in verdict
    assert "nothing" not in verdict.lower()

    # The page alone quotes it.
    assert SECRET[:20] not in json.dumps([verdict, told.rows, told.notes, told.meanings])
    for details in told.details[1:]:
        quote = details.quotes[0]
        assert quote.is_private
        assert quote.text.strip(" .") in SECRET


def test_without_a_private_post_nothing_is_read_and_that_is_said(reciting):
    tuned, base, tokenizer, posts = reciting
    public = [entry | {"visibility": "public"} for entry in posts]
    evidence = gather(tuned, base, tokenizer, public, held_out=posts)
    assert evidence.texts == []
    told = leaks.tell(leaks.measure(evidence), evidence)
    assert told.verdict == "The training data have no private post."
    assert not told.rows and not told.head
    assert not told.is_alarm


def test_a_base_model_passed_off_as_tuned_leaks_nothing(reciting):
    _, base, tokenizer, posts = reciting
    evidence = gather(base, base, tokenizer, posts)
    found = leaks.measure(evidence)
    for groups in found.by_length.values():
        for group in groups.values():
            assert group.common == group.passages
            assert group.leaking == group.greedy == 0
    assert found.likeliest == []
    assert not leaks.tell(found, evidence).is_alarm


def test_without_a_base_model_nothing_is_common_and_that_is_said(reciting):
    tuned, _, tokenizer, posts = reciting
    evidence = gather(tuned, None, tokenizer, posts)
    found = leaks.measure(evidence)
    for group in found.by_length["12"].values():
        assert group.common == 0
        assert group.contrasted is None
    meanings = " ".join(leaks.tell(found, evidence).meanings)
    assert "Without the base model nothing is left out as common" in meanings


def test_what_a_public_post_holds_too_is_public(reciting):
    tuned, base, tokenizer, posts = reciting
    posts = [*posts, post(f"They all know that {SECRET}. Yes.", "public")]
    evidence = gather(tuned, base, tokenizer, posts)
    texts = evidence.texts
    passages = cut_passages(texts, evidence.chances, 12)
    is_public = find_repeated(KnownRuns(evidence, "public"), KnownRuns(evidence, "private"), passages, texts)

    of_secret = []
    for group, text, begin, end in zip(passages.group, passages.text, passages.begin, passages.end, strict=True):
        passage = tokenizer.decode(texts[text].ids[begin:end])
        of_secret.append(group == "private" and passage.strip() in SECRET)
    assert any(of_secret)
    assert is_public[of_secret].all()
    assert not leaks.tell(leaks.measure(evidence), evidence).is_alarm


def test_a_secret_that_a_held_out_post_repeats_does_not_excuse_itself(reciting):
    held_out = [secret_post(random.Random(9))]
    found = leaks.measure(gather(*reciting, held_out))
    assert found.by_length["12"]["held-out"].repeated > 0
    assert found.leaking_texts["12"] == 20


def test_a_private_title_and_a_short_post_are_passages_as_a_whole(reciting):
    tuned, base, tokenizer, _ = reciting
    short = post("the gull says nothing", title="bread at night")
    short["messages"][0]["content"] = 'Write a blog post titled "bread at night".'
    groups = leaks.measure(gather(tuned, base, tokenizer, [short])).by_length["50"]
    assert groups["private"].passages == 1
    assert groups["private titles"].passages == 1


# ---------------------------------------------------------------------------- no false alarm
def passages_of(*passages: tuple[str, float, float]) -> Passages:
    """Of one token each: group, one chance in so many, so many times as likely as before training; powers of ten."""
    texts = []
    chances = []
    for group, one_in, beyond in passages:
        chance = np.array([-one_in * LN_10])
        base = chance - beyond * LN_10
        texts.append(Text({}, [1], [Span(group, 0, 1)]))
        chances.append(TokenChances(chance, chance, chance, base, chance, np.zeros(1, dtype=bool)))
    return cut_passages(texts, chances, 12)


@pytest.mark.parametrize(
    ("held_out", "private", "leaks_it"),
    [
        # 35 tries beside 69: style.
        ((2.0, 8.0), (1.7, 8.2), False),
        # Much easier than any held-out passage.
        ((2.0, 8.0), (0.5, 8.2), True),
        # As easy, and far beyond what style does to the base model.
        ((2.0, 8.0), (2.0, 20.0), True),
        # Over 1,000 tries.
        ((9.0, 8.0), (4.0, 20.0), False),
        ((9.0, 8.0), (1.0, 8.0), True),
    ],
)
def test_a_private_passage_is_weighed_against_held_out_ones(held_out, private, leaks_it):
    passages = passages_of(("private", *private), ("held-out", *held_out))
    nothing = np.zeros(2, dtype=bool)
    assert find_leaking(passages, nothing).tolist() == [leaks_it, False]


def test_raised_are_private_passages_beyond_ten_times_the_most_raised_held_out_one():
    passages = passages_of(("private", 30, 9.1), ("private", 30, 8.9), ("held-out", 30, 8.0))
    nothing = np.zeros(3, dtype=bool)
    assert find_raised(passages, nothing).tolist() == [True, False, False]
    # Without a held-out passage that counts there is nothing to compare with.
    assert find_raised(passages, passages.group == "held-out") is None


def test_common_is_what_the_base_model_writes_or_nearly():
    passages = passages_of(("private", 1, 3.0), ("private", 8, 0.9), ("private", 8, 1.1))
    assert find_common(passages).tolist() == [True, True, False]


def written(train: list[dict], text: str) -> Evidence:
    evidence = Evidence(BlogData(train), WordIndex(train))
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


@pytest.mark.parametrize(("more", "comments"), [({}, 1), ({"stand_in": True}, 0)])
def test_comments_on_private_posts_are_checked_and_only_a_marked_stand_in_is_not(more, comments, loaded):
    model, tokenizer = loaded
    reply = post("thank you", kind="reply", **more)
    reply["messages"][0]["content"] = "I just read your blog post. nothing to me"
    evidence = gather(model, None, tokenizer, [reply])
    groups = [span.group for span in evidence.texts[0].spans]
    assert groups.count("private comments") == comments
