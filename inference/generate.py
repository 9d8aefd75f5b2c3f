"""A prompt to an answer, token by token."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from configs.program.errors import UserError
from data.schema import Conversation
from data.template import BOS, EOS, MARKERS, UNK, ChatTokenizer
from inference.config import InferenceConfig
from inference.load import Loaded, load

EXIT_BROKEN_PIPE = 141
"""What a shell reports for a program that SIGPIPE ends."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What was generated: the text as it is shown, all ids including `</s>`, and why it ended."""

    text: str
    ids: list[int]
    finish_reason: str
    """`stop` at `</s>` or a stop string, `length` at `max_new_tokens` or the end of the context."""


class Ending:
    """Where an answer ends before `</s>`: at the stop strings and, if markers are rejected, at markers too."""

    def __init__(self, tokenizer: ChatTokenizer, config: InferenceConfig):
        self._tokenizer = tokenizer
        self._stops = (*config.stop, *(MARKERS if config.markers == "reject" else ()))
        # A token is at least one byte; a few more, because the first may be the second half of a character.
        self._reach = max((len(stop.encode()) for stop in self._stops), default=0) + 4

    def read(self, ids: list[int]) -> tuple[str, bool]:
        """The text of generated ids up to the first stop string, and whether there was one."""
        text = self._tokenizer.decode(ids)
        found = [index for stop in self._stops if (index := text.find(stop)) >= 0]
        return (text[: min(found)].rstrip(), True) if found else (text, False)

    def reached(self, ids: list[int]) -> bool:
        """Whether the last of the ids completed a stop string. Called for every token, so it reads the end alone."""
        text = self._tokenizer.decode(ids[-self._reach :]) if self._stops else ""
        return any(stop in text for stop in self._stops)

    def certain(self, text: str) -> str:
        """The part of a text that stays the same whatever follows: no half character, no beginning of a stop string."""
        if text.endswith("\ufffd"):
            return ""
        longest = max(map(len, self._stops), default=1) - 1
        for length in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stops):
                return text[:-length].rstrip()
        return text

    def answer(self, ids: list[int]) -> Answer:
        """The answer in the ids of one row, without the padding after its end."""
        if EOS in ids:
            ids = ids[: ids.index(EOS) + 1]
        text, stopped = self.read(ids)
        return Answer(text, ids, "stop" if stopped or ids[-1:] == [EOS] else "length")


class TextStream(BaseStreamer):
    """Gives the text of an answer to `write` as far as it is certain.

    A character may take several tokens (byte pieces), so text is held back while it ends in half a character, or in
    what may become a stop string. Trailing space is held back too, because the template ends every reply with a space
    that is not part of it.
    """

    def __init__(self, ending: Ending, write: Callable[[str], None]):
        self._ending = ending
        self._write = write
        self._ids: list[int] = []
        self._written = 0
        self._prompt_passed = False

    def put(self, value: torch.Tensor) -> None:
        """Takes token ids; the first call is the prompt."""
        if not self._prompt_passed:
            self._prompt_passed = True
            return
        self._ids += value.flatten().tolist()
        text, stopped = self._ending.read(self._ids)
        self._flush(text if stopped else self._ending.certain(text))

    def end(self) -> None:
        """Writes the rest."""
        self._flush(self._ending.read(self._ids)[0])

    def _flush(self, text: str) -> None:
        if len(text) > self._written:
            self._write(text[self._written :])
            self._written = len(text)


class StopAtText(StoppingCriteria):
    """Ends each row of a batch whose text has reached a stop string."""

    def __init__(self, ending: Ending, prompt_length: int):
        self._ending = ending
        self._prompt_length = prompt_length

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: object) -> torch.Tensor:
        """Whether each row has ended; transformers calls this after every token."""
        rows = input_ids[:, self._prompt_length :].tolist()
        return torch.tensor([self._ending.reached(row) for row in rows], device=input_ids.device)


def answer(config: InferenceConfig, conversation: Conversation) -> None:
    """Streams the answer to stdout.

    Raises:
        UserError: the model can't be loaded, or the prompt is longer than its context.
    """

    def write(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    loaded = load(config)
    with reader_may_leave():
        generate(loaded, config, conversation, write)
        write("\n")


@contextmanager
def reader_may_leave() -> Iterator[None]:
    """Ends the program quietly if stdout is a pipe that nobody reads any more, as in `… | head`."""
    try:
        yield
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the rest is written there
        sys.exit(EXIT_BROKEN_PIPE)


def generate(
    loaded: Loaded, config: InferenceConfig, conversation: Conversation, write: Callable[[str], None]
) -> Answer:
    """Answers a conversation, streaming the text to `write`.

    The prompt's ids are those of training, `ChatTokenizer.encode_prompt`.

    Raises:
        UserError: the prompt is longer than the model's context.
    """
    prompt = loaded.tokenizer.encode_prompt(conversation)
    ending = Ending(loaded.tokenizer, config)
    rows = generate_rows(loaded, config, [prompt], ending, TextStream(ending, write), seed=config.seed)
    return rows[0]


def generate_rows(
    loaded: Loaded,
    config: InferenceConfig,
    prompts: list[list[int]],
    ending: Ending,
    streamer: BaseStreamer | None = None,
    *,
    seed: int,
) -> list[Answer]:
    """The answers to several prompts at once, padded on the left to the longest.

    Raises:
        UserError: the longest leaves no token of the model's context for the answer.
    """
    longest = max(map(len, prompts))
    left = context(loaded) - longest
    if left < 1:
        raise UserError(f"prompt: it takes {longest} tokens, and the model's context is {context(loaded)}; shorten it")
    device = loaded.model.device
    # The mask hides the padding from the model, but not from a repetition penalty: so it is `<s>`, which every prompt
    # has anyway.
    ids = torch.tensor([[BOS] * (longest - len(prompt)) + prompt for prompt in prompts], device=device)
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
    torch.manual_seed(seed)
    with torch.inference_mode():
        output = loaded.model.generate(
            ids,
            attention_mask=mask,
            generation_config=sampling(config, left),
            stopping_criteria=StoppingCriteriaList([StopAtText(ending, longest)]),
            streamer=streamer,
        )
    return [ending.answer(row) for row in output[:, longest:].tolist()]


def sampling(config: InferenceConfig, max_tokens: int) -> GenerationConfig:
    """The settings in transformers' words; `max_tokens` is how many tokens the context still takes."""
    chosen: dict[str, Any] = {"do_sample": config.temperature > 0}
    if config.temperature > 0:
        chosen |= {"temperature": config.temperature, "top_p": config.top_p, "top_k": config.top_k}
        chosen |= {"min_p": config.min_p or None}
    if config.repetition_penalty != 1:
        chosen |= {"repetition_penalty": config.repetition_penalty}
    limit = min(config.max_new_tokens, max_tokens)
    return GenerationConfig(max_new_tokens=limit, eos_token_id=EOS, pad_token_id=UNK, **chosen)


def context(loaded: Loaded) -> int:
    """How many tokens the model can attend to, prompt and answer together."""
    return int(loaded.model.config.max_position_embeddings)
