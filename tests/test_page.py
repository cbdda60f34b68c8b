"""voice/page.html: self-contained, escaped, private words closed, fit for phones."""

import copy
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
from reporting import crafted_report, report
from tiny import write_jsonl

import train_model
import voice.copies
import voice.evidence
import voice.leaks
import voice.learned
import voice.reader
import voice.report
import voice.sampling

pytestmark = pytest.mark.usefixtures("small_report")


class Reader(HTMLParser):
    """The page's tags and text; anything that would run or be fetched is remembered."""

    def __init__(self):
        super().__init__()
        self.tags, self.text, self.active = set(), "", []
        self.pictures, self.order = [], []  # what stands for them, and the answers on top and pictures in their order
        self.folded = ""  # the text that is closed until somebody opens it
        self.is_folded = False

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        given = dict(attributes)
        is_picture = tag == "img" and given.get("src", "").startswith("data:image/png;base64,")
        is_within = tag == "a" and given.get("href", "").startswith("#")
        is_harmless = is_picture or is_within
        if (
            tag in {"script", "link", "iframe"}
            or given.keys() & {"src", "href", "onclick", "onerror"}
            and not is_harmless
        ):
            self.active.append(tag)
        if tag in {"dt", "img"}:
            self.order.append(tag)
        if tag == "img":
            self.pictures.append(given.get("alt", ""))
        if tag == "details":
            self.is_folded = True

    def handle_endtag(self, tag):
        if tag == "details":
            self.is_folded = False

    def handle_data(self, data):
        self.text += data
        if self.is_folded:
            self.folded += data


@pytest.mark.slow
def test_the_page_is_self_contained_and_every_text_in_it_is_escaped(overfitted, tmp_path):
    evil = "<img src=x onerror=alert(1)>&<script>"
    folder, base, posts = overfitted
    folder = Path(shutil.copytree(folder, tmp_path / "<b>model"))
    posts = [copy.deepcopy(post) | {"title": evil} for post in posts]
    posts[0]["messages"][0]["content"] = evil
    (folder / "training_report.json").write_text(json.dumps({"settings": {"base_model": str(base)}}))
    log = [{"step": 0, "eval_loss": 3.0}, {"step": 1, "loss": 2.5}, {"step": 2, "loss": 2.0}]
    train_model.draw_curve([*log, {"step": 2, "eval_loss": 2.0}], folder / "loss_curve.png")
    for split in ("train", "val"):
        write_jsonl(tmp_path / f"{split}_data.jsonl", posts)
    report(folder, tmp_path)
    page = Reader()
    page.feed((folder / "voice_report.html").read_text(encoding="utf-8"))
    assert page.active == [] and {"img", "table", "meter", "mark", "blockquote"} <= page.tags
    assert evil in page.text and "<b>model" in page.text


def reader_with(**each: float) -> voice.reader.Reader:
    shares = [voice.reader.ReaderShare(share, (share - 0.1, share), 9) for share in (0.9, 0.5, 0.2, 0.05)]
    return voice.reader.Reader(*shares, each, 200, 0.1, "ann", "")


def test_everybody_has_a_row_in_the_picture_of_the_reader():
    axes = voice.reader.draw(reader_with(ann=0.3, bob=0.7)).axes[0]
    dots = {line.get_label(): list(line.get_xdata()) for line in axes.lines}
    rows = [label.get_text() for label in axes.get_yticklabels()]
    assert rows == list(dots) == ["other bloggers", "the base model", "the tuned model", "you"]
    assert list(dots.values()) == [[0.3, 0.7], [0.2], [0.5], [0.9]]


def crafted_leaks(**fields) -> voice.leaks.Leaks:
    own = voice.leaks.Chance(4.0, 0.0)
    counts = {"common": 0, "repeated": 0, "greedy": 0, "leaking": 0}
    group = voice.leaks.LeakGroup(passages=9, sampled=own, bound=own, contrasted=own, **counts)
    by_length = {str(length): {"private": group} for length in voice.leaks.LENGTHS}
    nothing = {"likeliest": [], "raised": [], "private_copies": 0, "personal": [], "blocked": []}
    nothing |= {"private_texts": 3, "raised_texts": None}
    leaking = dict.fromkeys(by_length, 0)
    return voice.leaks.Leaks(by_length, leaking, 512, **{**nothing, **fields})


def test_the_page_fits_phones_the_dark_and_paper(tmp_path):
    page = voice.report.make_page(crafted_report(reader=reader_with(ann=0.3), leaks=crafted_leaks()), tmp_path / "none")
    assert '<meta name="viewport" content="width=device-width' in page
    assert "color-scheme: light dark" in page and "(prefers-color-scheme: dark)" in page and "@media print" in page
    # A wide table scrolls by itself; without that the whole page would.
    assert page.count("<table>") == page.count('<div class="table"><table>') == 2
    assert re.search(r"\.table { overflow-x: auto", page)


def test_the_four_answers_stand_before_the_first_picture_and_pictures_can_be_read_out(tmp_path):
    curve = tmp_path / "loss_curve.png"
    train_model.draw_curve([{"step": 0, "eval_loss": 3.0}, {"step": 1, "loss": 2.5}], curve)
    report = crafted_report(reader=reader_with(ann=0.3), leaks=crafted_leaks(private_copies=2))
    page = Reader()
    page.feed(voice.report.make_page(report, curve))
    assert page.order == ["dt"] * len(voice.report.ON_TOP) + ["img", "img"]
    top = page.text[: page.text.index("A range is")]
    for key in voice.report.ON_TOP:
        assert report.part(key).question in top
    assert "it leaks" in top and "2 of its answers hold 8 words or more in a row of a private post" in top
    assert (
        "not measured" in top
        and "of the tuned model's text to you" in page.pictures[0]
        and "Loss over" in page.pictures[1]
    )


def test_private_words_are_marked_and_closed_until_somebody_opens_them(tmp_path):
    chance = voice.leaks.Chance(4.0, 0.0)
    names = {"path": "a.md", "title": "the keys", "text": "under the third pot"}
    passage = voice.leaks.ShownPassage("private", 1, 1, 12, 9.0, False, chance, chance, chance, **names)
    came_out = voice.leaks.PersonalData("phone", "private", "+1 555 867 5309")
    odd = voice.learned.PostMark(2, "private", 0.01, "b.md", "the quiet one")
    copy = voice.copies.LongCopy(9, "private", 3, "c.md", "the letter", "nine words of a letter to nobody at all")
    share = voice.copies.CopyShare(1, 5_000, 1 / 5_000)
    report = crafted_report(
        leaks=crafted_leaks(likeliest=[passage], personal=[came_out]),
        learned=voice.learned.Learned(2.0, voice.learned.Gain(2.5, 2.0, 0.5, (0.4, 0.6), []), [odd]),
        copies=voice.copies.Copies(share, None, [copy]),
    )
    text = voice.report.make_page(report, tmp_path / "none")
    page = Reader()
    page.feed(text)
    for words in ("under the third pot", "+1 555 867 5309", "the quiet one", "nine words of a letter"):
        assert page.text.count(words) == page.folded.count(words) == 1
    assert page.folded.count("private\n") == 4 and 'class="private"' in text
    assert "Less than 0.1 % of its 8-word sequences" in report.as_text()
    # What the page shows is said in the terminal, and not on the page itself.
    assert "voice_report.html" in report.as_text() and "voice_report.html" not in page.text


def test_an_answer_that_was_cut_off_is_seen_to_be():
    said = [voice.sampling.Answer("it ended", [1], True), voice.sampling.Answer("it went on and", [1], False)]
    evidence = voice.evidence.Evidence(requests=["one?", "two?"], tuned=voice.evidence.ModelRun(answers=said))
    texts = {request: "".join(text for text, _ in pieces) for request, pieces in voice.report.sample_answers(evidence)}
    assert texts == {"one?": "it ended", "two?": "it went on and ..."}


def test_no_line_ends_between_a_figure_and_its_percent_sign():
    for length in range(70, 81):
        lines = voice.report.wrap("x" * length + " 50 % of them")
        assert " ".join(lines) == "x" * length + " 50 % of them" and not any(line.startswith("%") for line in lines)
