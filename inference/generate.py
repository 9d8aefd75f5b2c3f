"""A prompt to an answer, token by token."""

from collections.abc import Callable

import torch
from transformers import GenerationConfig
from transformers.generation.streamers import BaseStreamer

from data.schema import Conversation, Message
from data.template import EOS, UNK, ChatTokenizer
from inference.config import InferenceConfig
from inference.load import Loaded


class TextStream(BaseStreamer):
    """Gives the text of an answer to `write` as far as it is certain.

    A character may take several tokens (byte pieces), so text is held back while it ends in half of one; trailing
    space is held back too, because the template ends every reply with a space that is not part of it.
    """

    def __init__(self, tokenizer: ChatTokenizer, write: Callable[[str], None]):
        self._tokenizer = tokenizer
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
        text = self._tokenizer.decode(self._ids)
        if not text.endswith("\ufffd"):
            self._flush(text)

    def end(self) -> None:
        """Writes what is left."""
        self._flush(self._tokenizer.decode(self._ids))

    def _flush(self, text: str) -> None:
        if len(text) > self._written:
            self._write(text[self._written :])
            self._written = len(text)


def generate(loaded: Loaded, config: InferenceConfig, write: Callable[[str], None]) -> list[int]:
    """Answers `config.prompt`, streaming the text to `write`; returns the generated ids, `</s>` among them.

    The prompt's ids are those of training, `ChatTokenizer.encode_prompt`.
    """
    messages = [Message("system", config.system)] if config.system else []
    conversation = Conversation((*messages, Message("user", config.prompt)))
    prompt = torch.tensor([loaded.tokenizer.encode_prompt(conversation)], device=loaded.model.device)
    sampling = (
        {"do_sample": True, "temperature": config.temperature, "top_p": config.top_p, "top_k": config.top_k}
        if config.temperature > 0
        else {"do_sample": False}
    )
    torch.manual_seed(config.seed)
    with torch.inference_mode():
        output = loaded.model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            generation_config=GenerationConfig(
                max_new_tokens=config.max_new_tokens, eos_token_id=EOS, pad_token_id=UNK, **sampling
            ),
            streamer=TextStream(loaded.tokenizer, write),
        )
    return output[0, prompt.shape[1] :].tolist()
