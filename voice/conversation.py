"""A conversation with the model, in the terminal or on the page: what was said, and what is to be answered next."""

from __future__ import annotations

from dataclasses import dataclass, field

from extract_blog_data import say
from voice.sampling import begun_tokens, prompt_tokens
from voice.settings import Settings

COMMANDS = (
    "/post TITLE writes a post, /begin TEXT answers again from your words, /base lets the base model answer the same, "
    "/again, /clear, /quit"
)


def new_chat(settings: Settings) -> Chat:
    return Chat(settings.extraction.title_requests[0], settings.extraction.general_requests[0])


@dataclass
class Chat:
    """What has been said, and what is to be answered next."""

    title_request: str  # what /post asks with
    general_request: str  # what /begin answers where nothing was asked
    history: list[dict] = field(default_factory=list)
    beginning: str = ""  # words of the user's that the answer goes on from
    asks_base: bool = False  # the base model answers, and its answer is not remembered

    def take(self, line: str) -> bool:
        """Handles a line that the user typed, a command or a turn; returns whether an answer is due."""
        command, _, rest = line.partition(" ")
        self.asks_base = command == "/base"
        if not line:
            return False
        if not line.startswith("/"):
            return self.ask(line)

        if command == "/post" and rest:
            return self.post(rest)
        if command == "/begin" and rest:
            return self.begin(rest)
        if command in ("/again", "/base"):
            return self.again()
        if command == "/clear":
            self.history.clear()
            return False

        # What is left lacks its text, or is no command.
        if command in ("/post", "/begin"):
            say(f"{command} needs a text behind it.")
        else:
            say(f"There is no {command}. {COMMANDS}")
        return False

    def ask(self, text: str) -> bool:
        self.history.append({"role": "user", "content": text})
        self.beginning = ""
        return True

    def post(self, title: str) -> bool:
        # Posts were trained on as the first thing that is said.
        self.history.clear()
        return self.ask(self.title_request.format(title))

    def begin(self, words: str) -> bool:
        if not self.history:
            self.ask(self.general_request)
        self.beginning = words
        return self.again()

    def again(self) -> bool:
        if not self.history:
            say("There is nothing to repeat yet.")
            return False
        if self.history[-1]["role"] == "assistant" and not self.asks_base:
            self.history.pop()
        return True

    def remember(self, answer: str) -> None:
        """Keeps an answer, unless it comes from the base model."""
        if not self.asks_base:
            self.history.append({"role": "assistant", "content": answer})

    def take_back(self) -> None:
        """Forgets what cannot be answered."""
        self.history.pop()

    def prompt(self, tokenizer, room: int) -> tuple[list[int], list[int]]:
        """Token ids of the prompt, and of the words at its end that the answer begins with.

        Without the oldest turns if need be; both are empty if the last turn does not fit.
        """
        # The base model answers the same as the tuned one did.
        history = self.history
        if self.asks_base and history[-1]["role"] == "assistant":
            history = history[:-1]  # the question that was answered last
        begun = begun_tokens(tokenizer, history, self.beginning) if self.beginning else []

        # The data has no conversation that begins with an answer, so the model has seen none.
        for first, turn in enumerate(history):
            if turn["role"] == "user":
                ids = prompt_tokens(tokenizer, history[first:]) + begun
                if len(ids) <= room:
                    return ids, begun
        return [], []
