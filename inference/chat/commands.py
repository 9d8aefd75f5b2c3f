"""What a line means: a command, or a message to the model."""

import json
import shlex
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from configs.program.arguments import readable
from configs.program.entry import CONFIG_DIR
from configs.program.errors import UserError
from configs.program.explanations.composing import explain
from configs.program.explanations.program import Program
from data.rows.columns import names_of
from data.rows.conversion import Converter
from data.rows.reading import RawRow, Reject, read_file
from data.schema import Conversation, Message
from inference.chat.talk import Talk, tell
from inference.config import InferenceConfig
from inference.generate import context
from inference.prompt import check, is_blank

HELP = """\
/retry          answers the last message again
/undo           takes the last message and its answer back
/reset          forgets the conversation; the system message stays
/system TEXT    starts a new conversation with this system message; without TEXT, with none
/set NAME=VALUE changes settings, as in /set temperature=0.7 top_p=0.9; alone, it shows them
/stats          how fast the last answer was, and how full the context is
/save FILE      adds the conversation to FILE as a line of JSON, in the schema `messages` of python -m data
/load FILE      goes on with the last conversation of FILE, which /save has written or python -m data reads
/help           shows this
/exit           ends; so does Ctrl-D
Ctrl-C stops an answer. Alt-Enter begins a new line of the same message. Tab completes commands."""

ENDS = ("/exit", "/quit")
FILES = ("/save", "/load")
"""Commands that a path follows."""

SETTABLE = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "max_new_tokens",
    "stop",
    "seed",
    "markers",
)
"""The settings that may change within a conversation."""


class Commands:
    """Takes lines, and does to a conversation what they say."""

    def __init__(self, talk: Talk):
        self.talk = talk
        self._commands: dict[str, Callable[[str], None]] = {
            "/retry": lambda _: talk.retry(),
            "/undo": self._undo,
            "/reset": self._reset,
            "/system": self._system,
            "/set": self._set,
            "/stats": self._stats,
            "/save": self._save,
            "/load": self._load,
            "/help": lambda _: tell(HELP),
        }

    @property
    def names(self) -> tuple[str, ...]:
        """Every command."""
        return (*self._commands, *ENDS)

    def take(self, line: str) -> bool:
        """Does what a line says; False if it says to end.

        Raises:
            UserError: it can't be done; nothing has changed.
        """
        command, _, rest = line.strip().partition(" ")
        if command in ENDS:
            return False
        if command in self._commands:
            self._commands[command](rest.strip())
        elif command.startswith("/") and command[1:].isalpha():
            raise UserError(f"{command}: there is no such command; /help lists them")
        elif not is_blank(line):
            self.talk.ask(line)
        return True

    def _undo(self, _: str) -> None:
        words = " ".join(self.talk.undo().split())
        tell(f"Taken back: {words if len(words) <= 60 else f'{words[:59]}…'}")

    def _reset(self, _: str) -> None:
        self.talk.begin(self.talk.system, [])
        tell("Forgotten.")

    def _system(self, text: str) -> None:
        if text:
            check(Conversation((Message("system", text), Message("user", "x"))), self.talk.config.markers)
        self.talk.begin(text or None, [])
        tell("A new conversation.")

    def _set(self, text: str) -> None:
        if text:
            config = changed(self.talk.config, text)
            if config.seed != self.talk.config.seed:
                self.talk.answers = 0
            self.talk.config = config
        tell(" ".join(f"{name}={_shown(getattr(self.talk.config, name))}" for name in SETTABLE))

    def _stats(self, _: str) -> None:
        talk, last = self.talk, self.talk.timing
        if last is not None and last.ended is not None:
            seconds = last.ended - last.started
            speed = "stopped" if last.tokens is None else f"{last.tokens} tokens, {last.tokens / seconds:.1f} tokens/s"
            first = "" if last.first is None else f"the first words after {last.first - last.started:.2f} s, "
            tell(f"The last answer: {speed}; {first}all after {seconds:.2f} s; the prompt had {last.prompt} tokens.")
        longest = context(talk.loaded)
        tell(f"The conversation: {_turns(talk.turns)}, {talk.tokens():,} tokens; the context has room for {longest:,}.")

    def _save(self, name: str) -> None:
        if not name:
            raise UserError("/save: it names no file; give for example /save chat.jsonl")
        turns = self.talk.answered
        if not turns:
            raise UserError("/save: nothing was said yet; say something first")
        messages = [Message("system", self.talk.system), *turns] if self.talk.system else turns
        row = {"messages": [{"role": message.role, "content": message.content} for message in messages]}
        try:
            with Path(name).expanduser().open("a", encoding="utf-8") as file:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
        except OSError as error:
            raise UserError(f"/save {name}: it can't be written ({error.strerror}); name another file") from error
        tell(f"Added to {name}.")

    def _load(self, name: str) -> None:
        if not name:
            raise UserError("/load: it names no file; give for example /load chat.jsonl")
        conversation = last_conversation(name, self.talk.config)
        turns = list(conversation.turns)
        tell(f"Read from {name}: {_turns(turns)}{', and a message to answer' if len(turns) % 2 else ''}.")
        for message in turns[-2:]:
            tell(f"{'> ' if message.role == 'user' else ''}{message.content}")
        self.talk.begin(None if conversation.system is None else conversation.system.content, turns)


def changed(config: InferenceConfig, text: str) -> InferenceConfig:
    """The settings with those that a text names as the command line does: `temperature=0.7 top_p=0.9`.

    Raises:
        UserError: it names others than `SETTABLE`, or gives one a value that it can't have.
    """
    try:
        arguments = shlex.split(text)
    except ValueError as error:
        raise UserError(f"/set {text}: a quotation is not closed; close it") from error
    for argument in arguments:
        name, equals, _ = argument.partition("=")
        if name not in SETTABLE or not equals:
            raise UserError(f"/set {argument}: it changes {', '.join(SETTABLE)}, as in /set temperature=0.7")
    try:
        overrides = OverridesParser.create().parse_overrides(readable(arguments, InferenceConfig).arguments)
        for override in overrides:
            if override.is_sweep_override():
                raise UserError(f"/set {override.input_line}: it takes one value, as in /set temperature=0.7")
            if override.key_or_group == "stop" and not isinstance(override.value(), list):
                raise UserError(f"/set {override.input_line}: it takes a list; write /set stop=[END]")
        values = {override.key_or_group: override.value() for override in overrides}
        merged: Any = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(config), values))
    except (HydraException, OmegaConfBaseException) as error:
        program = Program("inference", "inference", InferenceConfig, CONFIG_DIR)
        raise UserError(explain(error, program, [CONFIG_DIR])) from error
    assert isinstance(merged, InferenceConfig)
    merged.check_sampling()
    return merged


def last_conversation(name: str, config: InferenceConfig) -> Conversation:
    """The last row of a file that `python -m data` reads.

    Raises:
        UserError: there is none, or it is not a conversation.
    """
    path = Path(name).expanduser()
    if not path.is_file():
        raise UserError(f"/load {name}: there is no such file; check the path")
    try:
        last: deque[RawRow | Reject] = deque((row for chunk in read_file(str(path)) for row in chunk.rows()), maxlen=1)
    except UserError as error:  # data calls the setting by another name
        raise UserError(str(error).replace(f"files={path}", f"/load {name}", 1)) from error
    if not last:
        raise UserError(f"/load {name}: it holds no rows; give a file that /save has written")
    row: RawRow | Reject | Conversation = last[0]
    where = f"{last[0].unit} {last[0].number}"
    if isinstance(row, RawRow):
        names = names_of(row.value, {})
        if names is None:
            raise UserError(f"/load {name}: {where} is not a conversation; give a file that /save has written")
        row = Converter(names, keep_markers=config.markers == "keep", reply_needed=False).convert(row)
    if not isinstance(row, Conversation):
        assert isinstance(row, Reject)
        raise UserError(f"/load {name}: {where} can't be used ({row.detail}); give a file that /save has written")
    check(row, config.markers)
    return row


def _turns(turns: list[Message]) -> str:
    count = len(turns) // 2
    return "1 turn" if count == 1 else f"{count} turns"


def _shown(value: object) -> str:
    return f"[{','.join(value)}]" if isinstance(value, list) else str(value)
