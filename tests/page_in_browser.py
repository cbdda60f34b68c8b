"""The page of test_model.py --page in a real browser: `make test-page`, apart from `make test` as it needs Chromium."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import psutil
import pytest
from playwright.sync_api import expect, sync_playwright
from tiny import conversations, make_model_folder, write_jsonl
from transformers import GenerationConfig

import extract_blog_data
import test_model

CHROMIUM = shutil.which("chromium")
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync"]
expect.set_options(timeout=60_000)  # a busy machine
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="Chromium is missing: apt install chromium")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tuned model of random weights, its base model and its data, and where the page may leave something."""
    folder = tmp_path_factory.mktemp("page")
    sizes = {"intermediate_size": 64, "num_key_value_heads": 1}
    for name in ("tuned", "base"):
        make_model_folder(folder / name, "llama", True, **sizes)
    GenerationConfig(do_sample=True, top_p=0.95, max_new_tokens=30, eos_token_id=[2]).save_pretrained(folder / "tuned")
    report = {"settings": {"base_model": str(folder / "base")}}
    (folder / "tuned" / "training_report.json").write_text(json.dumps(report), encoding="utf-8")
    write_jsonl(folder / "data" / "train_data.jsonl", conversations(9))
    (folder / "elsewhere").mkdir()
    return folder


@pytest.fixture(scope="module")
def server(folder):
    """(process, address, key)"""
    places = dict.fromkeys(("HOME", "TMPDIR"), str(folder / "elsewhere"))
    command = [sys.executable, test_model.__file__, "--page", "--model-dir", str(folder / "tuned")]
    process = subprocess.Popen(
        [*command, "--data-dir", str(folder / "data"), "--seed", "1"],
        stderr=subprocess.PIPE,
        text=True,
        cwd=folder / "elsewhere",
        env={**os.environ, **places, "MPLCONFIGDIR": str(folder / "matplotlib"), "OMP_NUM_THREADS": "1"},
    )
    for line in process.stderr:
        if found := re.match(r"The page is at (http://127\.0\.0\.1:\d+)/\?key=(\S+) ", line):
            break
    yield process, *found.groups()
    process.kill()
    process.communicate()


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


class Opened:
    """The page in a window of its own, with the addresses that it asked for."""

    def __init__(self, browser, address: str, key: str):
        self.window = browser.new_page()
        self.asked = []
        self.window.on("request", lambda request: self.asked.append(request.url))
        self.window.goto(f"{address}/?key={key}")
        self.tuned, self.base = (self.window.get_by_label("chatbot conversation").nth(place) for place in (0, 1))
        self.box = self.window.locator("textarea")

    def send(self, text: str, mode: str = "Talk") -> None:
        self.window.get_by_label(mode).check()
        self.box.fill(text)
        self.press("Send")

    def press(self, name: str) -> None:
        self.window.get_by_role("button", name=name, exact=True).click()

    def set(self, name: str, value: str) -> None:
        if not self.window.get_by_label(name).is_visible():
            self.window.get_by_text("How it writes").click()
        self.window.get_by_label(name).fill(value)

    def answer(self, column=None) -> str:
        """The last answer, once it is complete: the line under it comes then."""
        answer = (column or self.tuned).locator(".bot.message").last
        expect(answer).to_contain_text("[longest run of words from the training data:")
        return answer.inner_text()


def text_of(answer: str) -> str:
    """Without the line under it."""
    return answer.partition("[longest run")[0].strip()


@pytest.fixture
def page(browser, server):
    opened = Opened(browser, *server[1:])
    yield opened
    opened.window.close()


def test_it_talks_and_every_request_stays_on_this_machine(page, server):
    page.send("hi")
    assert page.answer()
    expect(page.box).to_have_value("")
    page.send("so?")
    expect(page.tuned.locator(".bot.message")).to_have_count(2)
    assert page.answer()
    local = re.compile(re.escape(server[1]) + r"/|data:|blob:")
    assert page.asked
    assert [url for url in page.asked if not local.match(url)] == []


def test_it_writes_a_post_about_a_title(page):
    page.send("hi")
    page.answer()
    page.send("Bread", "Write about")
    request = extract_blog_data.TITLE_REQUESTS[0].format("Bread")
    expect(page.tuned.locator(".user.message")).to_have_text([request])
    assert page.answer()


def test_it_goes_on_from_the_users_words_and_again(page):
    words = "the kettle sings at night"
    page.send(words, "Go on from my words")
    first = page.answer()
    assert first.startswith(words) and text_of(first) != words
    page.press("Again")
    expect(page.tuned.locator(".bot.message").last).not_to_contain_text(text_of(first))
    assert page.answer().startswith(words)
    expect(page.tuned.locator(".bot.message")).to_have_count(1)


def test_the_base_model_answers_beside_it_on_request(page):
    expect(page.base).not_to_be_visible()
    page.window.get_by_label("The base model answers, too").check()
    page.send("hi")
    assert page.answer() != page.answer(page.base)
    left, right = (column.bounding_box() for column in (page.tuned, page.base))
    assert left["x"] < right["x"] and left["y"] == right["y"]


def test_what_is_set_counts_and_a_wrong_value_is_one_sentence(page):
    page.set("temperature", "0")
    page.send("hi")
    likeliest = page.answer()
    page.set("max_new_tokens", "5")
    page.press("Again")
    expect(page.tuned.locator(".bot.message").last).not_to_contain_text(text_of(likeliest))
    begun = text_of(page.answer())
    assert begun and text_of(likeliest).startswith(begun)
    page.set("top_p", "7")
    page.press("Again")
    expect(page.window.get_by_text("top_p must be None or a number above 0 and up to 1.")).to_be_visible()
    assert text_of(page.answer()) == begun


def test_a_stopped_answer_is_kept_and_cleared_with_the_rest(page):
    page.set("max_new_tokens", "200")
    page.set("top_k", "1")
    page.send("hi")
    expect(page.tuned.locator(".bot.message")).to_be_visible()
    page.press("Stop")
    page.send("and?")
    expect(page.tuned.locator(".bot.message")).to_have_count(2)
    page.answer()
    assert "[longest" not in page.tuned.locator(".bot.message").first.inner_text()
    page.window.get_by_role("button", name="Clear").first.click()
    expect(page.tuned.locator(".message")).to_have_count(0)
    page.press("Again")
    expect(page.window.get_by_text("There is nothing to answer yet.")).to_be_visible()


def test_a_picture_in_what_is_said_is_not_fetched(page):
    page.send("![x](http://example.invalid/x.png) <img src='http://example.invalid/y.png'>", "Go on from my words")
    assert "<img src='http://example.invalid/y.png'>" in page.answer()
    assert not any("example.invalid" in url for url in page.asked)


def test_the_browser_keeps_nothing(page):
    page.send("a very private kettle")
    page.answer()
    kept = page.window.evaluate(
        "async () => JSON.stringify([localStorage, sessionStorage, (await indexedDB.databases()).map(d => d.name)])"
    )
    assert "kettle" not in kept
    assert json.loads(kept)[2] == []
    page.window.reload()
    expect(page.box).to_be_visible()
    expect(page.tuned.locator(".message")).to_have_count(0)


def test_it_listens_to_this_machine_and_hands_out_no_file(server, folder):
    process, address, key = server
    listening = [each.laddr.ip for each in psutil.Process(process.pid).net_connections() if each.status == "LISTEN"]
    assert listening == ["127.0.0.1"]
    for file in (folder / "data" / "train_data.jsonl", folder / "elsewhere"):
        asked = urllib.request.Request(f"{address}/gradio_api/file={file}", headers={"Cookie": f"key={key}"})
        with pytest.raises(urllib.error.HTTPError, match="40[34]"):
            urllib.request.urlopen(asked)


@pytest.mark.parametrize("path", ["", "?key=wrong", "config", "gradio_api/info", "gradio_api/file=/etc/hostname"])
def test_without_the_key_there_is_nothing(path, server):
    asked = urllib.request.Request(f"{server[1]}/{path}", headers={"Cookie": "key=wrong"})
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(asked)


def test_ctrl_c_ends_it_and_nothing_is_left(server, folder):
    """The last test: it ends the server."""
    process, *_ = server
    process.send_signal(signal.SIGINT)
    assert process.wait() == 0
    assert list((folder / "elsewhere").rglob("*")) == []
