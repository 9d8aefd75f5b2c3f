"""A conversation in the terminal: history, line editing, commands, and a context that never overflows."""

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from rich.console import Console

from configs.program.errors import UserError
from data.schema import Conversation, Message
from data.template import ChatTokenizer
from inference.config import InferenceConfig
from inference.generate import context, generate, reader_may_leave
from inference.load import Loaded, load
from inference.prompt import check

HELP = """\
/reset          forgets the conversation; the system message stays
/save FILE      adds the conversation to FILE as a line of JSON, in the schema `messages` of python -m data
/system TEXT    starts a new conversation with this system message; without TEXT, with none
/help           shows this
/exit           ends; so does Ctrl-D
Ctrl-C stops an answer. Alt-Enter begins a new line of the same message."""

console = Console(highlight=False)


def chat(config: InferenceConfig) -> None:
    """Answers what is typed, or each line of a pipe, until it ends.

    Raises:
        UserError: the model can't be loaded.
    """
    talk = Talk(load(config), config)
    with reader_may_leave():
        console.print("[dim]Say something. /help lists the commands, Ctrl-D ends.[/dim]")
        for line in _typed() if sys.stdin.isatty() else _piped():
            if not talk.take(line):
                break


class Talk:
    """The conversation so far, and what a typed line does to it."""

    def __init__(self, loaded: Loaded, config: InferenceConfig):
        self.loaded = loaded
        self.config = config
        self.system = config.system
        self.turns: list[Message] = []

    def take(self, line: str) -> bool:
        """Does what a line says; False if it says to end. A mistake is reported and changes nothing."""
        command, _, rest = line.strip().partition(" ")
        commands: dict[str, Callable[[str], None]] = {
            "/reset": self._reset,
            "/save": self._save,
            "/system": self._set_system,
            "/help": lambda _: console.print(HELP, markup=False, style="dim"),
        }
        try:
            if command in ("/exit", "/quit"):
                return False
            if command in commands:
                commands[command](rest.strip())
            elif command.startswith("/") and command[1:].isalpha():
                raise UserError(f"{command}: there is no such command; /help lists them")
            elif command:
                self._answer(line)
        except UserError as error:
            console.print(str(error), markup=False, style="red")
        return True

    def _answer(self, text: str) -> None:
        asked = Message("user", text)
        check(Conversation((asked,)), self.config.markers)
        max_tokens = context(self.loaded) - min(self.config.max_new_tokens, context(self.loaded) // 2)
        conversation, dropped = fit(self.loaded.tokenizer, self.system, [*self.turns, asked], max_tokens)
        if dropped:
            turns = "turn is" if dropped == 1 else f"{dropped} turns are"
            console.print(f"The context is full: the oldest {turns} no longer seen.", style="dim")
        said: list[str] = []

        def write(piece: str) -> None:
            said.append(piece)
            sys.stdout.write(piece)
            sys.stdout.flush()

        try:
            generate(self.loaded, self.config, conversation, write)
        except KeyboardInterrupt:
            console.print(" (stopped)", end="", style="dim")
        print(flush=True)
        # An answer without a word would leave the template without a turn to put it in.
        self.turns = [*conversation.turns, Message("assistant", "".join(said))] if "".join(said) else self.turns

    def _reset(self, _: str = "") -> None:
        self.turns = []
        console.print("Forgotten.", style="dim")

    def _set_system(self, text: str) -> None:
        if text:
            check(Conversation((Message("system", text), Message("user", "x"))), self.config.markers)
        self.system, self.turns = text or None, []
        console.print("A new conversation.", style="dim")

    def _save(self, name: str) -> None:
        if not name:
            raise UserError("/save: it names no file; give for example /save chat.jsonl")
        if not self.turns:
            raise UserError("/save: nothing was said yet; say something first")
        messages = [Message("system", self.system), *self.turns] if self.system else self.turns
        row = {"messages": [{"role": message.role, "content": message.content} for message in messages]}
        try:
            with Path(name).expanduser().open("a", encoding="utf-8") as file:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
        except OSError as error:
            raise UserError(f"/save {name}: it can't be written ({error.strerror}); name another file") from error
        console.print(f"Added to {name}.", style="dim", markup=False)


def fit(
    tokenizer: ChatTokenizer, system: str | None, turns: list[Message], max_tokens: int
) -> tuple[Conversation, int]:
    """The conversation without its oldest turns, so that its prompt takes at most `max_tokens`; how many it lost.

    Raises:
        UserError: the last message alone takes more.
    """
    head = (Message("system", system),) if system else ()
    for first in range(0, len(turns), 2):
        conversation = Conversation((*head, *turns[first:]))
        needed = len(tokenizer.encode_prompt(conversation))
        if needed <= max_tokens:
            return conversation, first // 2
    raise UserError(f"prompt: it takes {needed} tokens, and the context has room for {max_tokens}; shorten it")


def _piped() -> Iterator[str]:
    for number, line in enumerate(sys.stdin):
        yield (line.removeprefix("\ufeff") if number == 0 else line).rstrip("\n")


def _typed() -> Iterator[str]:
    """Lines from the terminal, edited as in a shell; Ctrl-C empties the line."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.formatted_text import HTML
    from prompt_toolkit.key_binding import KeyBindings

    keys = KeyBindings()

    @keys.add("escape", "enter")
    def _(event: object) -> None:
        event.current_buffer.insert_text("\n")  # type: ignore[attr-defined]

    session: PromptSession[str] = PromptSession(key_bindings=keys)
    while True:
        try:
            yield session.prompt(HTML("<b>&gt; </b>"), prompt_continuation="  ")
        except KeyboardInterrupt:
            continue
        except EOFError:
            return
