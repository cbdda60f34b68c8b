"""A page to type in: the chat of test_model.py in a browser on this machine. Needs Gradio (`make page`).

Gradio is told to serve only this machine, and there only who has the key, to report nothing, and to keep no history,
which it would else do in the browser. Answers are shown as plain text: a picture in one would make the browser fetch it
from elsewhere.
"""

from __future__ import annotations

import copy
import html
import os
import secrets
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from transformers import GenerationConfig

from extract_blog_data import say
from voice.conversation import Chat, new_chat
from voice.copies import tell_origin
from voice.sampling import DEFAULTS, read_sampling, room_for_prompt, stream
from voice.settings import ROWS, Settings
from voice.word_index import WordIndex

AGAIN = "Again"
# What the text that was typed is for, and an example of it.
ACTS = {
    "Talk": (Chat.ask, "What's on your mind today?"),
    "Write about": (Chat.post, "A title"),
    "Go on from my words": (Chat.begin, "Today I was thinking"),
    AGAIN: (lambda talk, _: talk.again(), ""),
}
MODES = [name for name in ACTS if name != AGAIN]


class NoAnswer(Exception):
    """Why there is none, in a sentence."""


# ---------------------------------------------------------------------------- answers
@dataclass
class Writer:
    """Both models and what they write by, for as many conversations as there are open pages."""

    settings: Settings
    model: object
    tokenizer: object
    rng: torch.Generator
    index: WordIndex | None  # of the training data
    find_base: Callable  # loads the base model, or returns None
    base: object = None  # once somebody has asked for it

    def respond(self, talk: Chat, act: str, text: str, with_base: bool, values: dict) -> Iterator[None]:
        """Answers, and yields whenever `talk.history` has more to show; raises NoAnswer.

        An answer in it has, beside its content, what is shown of each model: its text and where the words come from.
        """
        sampling = self.sampling_with(values)
        talk.asks_base = False
        do, _ = ACTS[act]
        if not (text or act == AGAIN) or not do(talk, text):
            raise NoAnswer("There is nothing to answer yet.")

        # It is in the history from its first words, so that one that is stopped is remembered as far as it was read.
        answer = {"role": "assistant", "content": ""}
        for text, shown in self.write(talk, sampling):
            if talk.history[-1] is not answer:
                talk.history.append(answer)
            answer |= {"content": text, "tuned": shown}
            yield

        if with_base:
            talk.asks_base = True
            for _, shown in self.write(talk, sampling):
                answer["base"] = shown
                yield

    def write(self, talk: Chat, sampling: GenerationConfig) -> Iterator[tuple[str, str]]:
        """(the answer that is due, as far as it is written; what is shown of it); raises NoAnswer."""
        # Loaded once, when somebody first wants it.
        writer = self.model
        if talk.asks_base:
            self.base = self.base or self.find_base()
            writer = self.base
        if writer is None:
            raise NoAnswer("The base model cannot be loaded; the terminal says why.")

        room = room_for_prompt(self.model, sampling)
        prompt, begun = talk.prompt(self.tokenizer, room)
        if not prompt:
            talk.take_back()
            raise NoAnswer(f"That is longer than the {room:,} tokens there is room for.")

        text = ""
        for piece, _ in stream(writer, self.tokenizer, [prompt], sampling, self.rng, begun, self.settings.raw):
            text += piece
            yield text, text
        if self.index:
            yield text, f"{text}\n\n{tell_origin(self.index.longest_copy(text))}"

    def sampling_with(self, values: dict) -> GenerationConfig:
        """The model's sampling settings under those of the page; raises NoAnswer."""
        for name, value in values.items():
            kind = ROWS[name.upper()].kind
            if not kind.allows(value):
                raise NoAnswer(f"{name} must be {kind.words}.")
        usual = copy.deepcopy(self.model.generation_config)
        return read_sampling(usual, self.tokenizer, replace(self.settings, **values))


def column(history: list[dict], whose: str) -> list[dict]:
    """What is shown of a conversation in the column of a model: "tuned" or "base"."""
    told = [(turn["role"], turn["content"] if turn["role"] == "user" else turn.get(whose)) for turn in history]
    # Gradio takes it for HTML, whatever `render_markdown` says.
    return [{"role": role, "content": html.escape(text, quote=False)} for role, text in told if text is not None]


# ---------------------------------------------------------------------------- the page
def build_page(gradio, writer: Writer):
    settings = writer.settings

    def answer(talk: Chat, act: str, text: str, with_base: bool, *values) -> Iterator[tuple]:
        unchanged = gradio.skip()
        # The box is emptied once, so that the next line can be typed meanwhile.
        typed = unchanged if act == AGAIN else ""
        try:
            for _ in writer.respond(talk, act, text.strip(), with_base, dict(zip(DEFAULTS, values, strict=True))):
                yield typed, *both(talk)
                typed = unchanged
        except NoAnswer as reason:
            gradio.Warning(str(reason))
            yield unchanged, *both(talk)

    def both(talk: Chat) -> tuple:
        return column(talk.history, "tuned"), column(talk.history, "base")

    def clear(talk: Chat) -> tuple:
        talk.take("/clear")
        return both(talk)

    with gradio.Blocks(title=settings.model_dir.name, analytics_enabled=False) as page:
        talk = gradio.State(lambda: new_chat(settings))
        size = {"height": None, "min_height": "30vh", "max_height": "60vh"}
        look = {"render_markdown": False, "buttons": ["copy"], "feedback_options": None, **size}
        with gradio.Row():
            tuned = gradio.Chatbot(label=settings.model_dir.name, **look)
            base = gradio.Chatbot(label="base model", visible=False, **look)
        mode = gradio.Radio(MODES, value=MODES[0], show_label=False, container=False)
        box = gradio.Textbox(placeholder=ACTS[MODES[0]][1], show_label=False, container=False, max_lines=8)
        with gradio.Row():
            send = gradio.Button("Send", variant="primary", min_width=60)
            stop = gradio.Button("Stop", min_width=60)
            again = gradio.Button(AGAIN, min_width=60)
        with_base = gradio.Checkbox(label="The base model answers, too")
        with gradio.Accordion("How it writes (empty = usual)", open=False), gradio.Row():
            values = []
            for setting, usual in DEFAULTS.items():
                now = getattr(writer.model.generation_config, setting)
                digits = 0 if isinstance(usual, int) else None
                values.append(gradio.Number(now, label=setting, precision=digits, min_width=120))

        shown = [box, tuned, base]
        given = [box, with_base, *values]
        # One answer at a time, whoever asks.
        queue = {"concurrency_id": "model", "concurrency_limit": 1, "show_progress": "hidden"}
        writing = [
            gradio.on([box.submit, send.click], answer, [talk, mode, *given], shown, **queue),
            again.click(answer, [talk, gradio.State(AGAIN), *given], shown, **queue),
        ]

        # A stopped answer stays as far as it was read.
        stop.click(None, cancels=writing)
        gradio.on([tuned.clear, base.clear], clear, talk, [tuned, base], cancels=writing)
        with_base.change(lambda wanted: gradio.update(visible=wanted), with_base, base)
        mode.change(lambda name: gradio.update(placeholder=ACTS[name][1]), mode, box)
    return page


class OnlyWithKey:
    """An ASGI application that answers nobody but the browser in which the address with the key was opened.

    Other users of this computer can reach 127.0.0.1 too, and so can a page from elsewhere whose name is made to lead
    there; the answers name private posts. The cookie goes to no other host, and with no request of another site's.
    """

    def __init__(self, app, key: str):
        self.app = app
        self.key = key

    async def __call__(self, scope, receive, send) -> None:
        # The other path is what Gradio itself asks for before it serves.
        if scope["type"] == "lifespan" or scope["path"].endswith("/startup-events") or self.is_known(scope):
            await self.app(scope, receive, send)
            return

        # Opened with the key in the address: from then on the browser has it as a cookie.
        status = 401
        headers = [(b"content-type", b"text/plain")]
        if self.is_right(scope.get("query_string", b"").decode("latin-1").removeprefix("key=")):
            status = 303
            headers += [(b"location", b"/"), (b"set-cookie", f"key={self.key}; HttpOnly; SameSite=Strict".encode())]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": b"Open the address that the terminal shows."})

    def is_known(self, scope) -> bool:
        lines = [value.decode("latin-1") for name, value in scope["headers"] if name == b"cookie"]
        cookies = [pair.strip() for line in lines for pair in line.split(";")]
        return any(self.is_right(cookie.removeprefix("key=")) for cookie in cookies)

    def is_right(self, key: str) -> bool:
        return secrets.compare_digest(key.encode(), self.key.encode())


def serve(writer: Writer) -> None:
    """Serves the page until Ctrl-C."""
    key = secrets.token_urlsafe(16)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder
        os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
        os.environ["no_proxy"] = "*"  # it asks itself whether it is there
        import gradio  # here, because it reads the environment
        from starlette.middleware import Middleware  # comes with Gradio

        page = build_page(gradio, writer)
        _, address, _ = page.launch(
            server_name="127.0.0.1",
            theme=gradio.themes.Default(primary_hue="indigo", font="system-ui", font_mono="monospace"),
            footer_links=[],
            quiet=True,
            prevent_thread_lock=True,
            max_file_size="1kb",  # there is nothing to upload
            app_kwargs={"middleware": [Middleware(OnlyWithKey, key=key)]},
            **dict.fromkeys(("share", "run_history", "enable_monitoring", "ssr_mode", "mcp_server", "pwa"), False),
        )
        say(f"The page is at {address}?key={key} for this machine's browser; Ctrl-C ends it.")
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            page.close(verbose=False)
