"""The only place where conversations become ids, and the only place that decides which tokens are trained.

The text of a turn is `<s>[INST] {user} [/INST] {assistant} </s>`; a system message is joined with the first user text,
and then the whole is stripped, so that the edges between the two stay as they were written. `<s>` and `</s>` are placed
as ids; all other text goes through the vocabulary's merges alone, in which no control token takes part. So nothing that
a message says can become a control token, however it is spelled.
"""

from array import array
from functools import cache, cached_property
from pathlib import Path

from configs.program.errors import UserError
from data import export
from data.merges import SPACE, merged
from data.schema import Conversation, TokenizedConversation
from data.vocabulary import EMBEDDED, FINGERPRINT, FIRST_PIECE, fingerprint, load_vocabulary

UNK, BOS, EOS = 0, 1, 2
"""Ids of `<unk>`, `<s>` and `</s>` in the Mixtral vocabulary."""

BOS_ID, EOS_ID = (array("H", [token]).tobytes() for token in (BOS, EOS))
"""The same, as they stand in `TokenizedConversation.packed_ids`."""

MARKERS = ("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>")
"""The template's own words. They are plain text to the vocabulary, so only a policy keeps them out of contents."""


class ChatTokenizer:
    """Renders conversations with the LLaMA-2 chat template and encodes them with the Mixtral vocabulary."""

    def __init__(self, vocabulary: dict[str, int], named: str = "tokenizer"):
        """Builds the tokenizer from the vocabulary, piece → id; errors begin with `named`.

        Raises:
            UserError: the vocabulary is not Mixtral's, so training would learn the wrong tokens.
        """
        self._vocabulary = vocabulary
        if self.fingerprint != FINGERPRINT:
            raise UserError(f"{named}: its vocabulary is not Mixtral's; name a Mixtral-8x7B model")
        self._text, self._ids_of = merged(tuple(self.pieces))

    @classmethod
    def load(
        cls, source: str = EMBEDDED, *, revision: str | None = None, setting: str = "tokenizer"
    ) -> "ChatTokenizer":
        """Loads the vocabulary of a model directory, a hub id, or `"embedded"`.

        `revision` is the commit, tag or branch of a hub id; `setting` names the user's setting in errors.

        Raises:
            UserError: nothing usable is there, or the vocabulary is not Mixtral's.
        """
        named = f"{setting}={source}"
        return _embedded(named) if source == EMBEDDED else cls(load_vocabulary(source, revision, named), named)

    # Text

    def render(self, conversation: Conversation) -> str:
        """The exact text of a conversation, control tokens spelled out."""
        return "".join(
            f"<s>{prompt}" if reply is None else f"<s>{prompt}{reply}</s>"
            for prompt, reply, _ in self._turn_texts(conversation)
        )

    @staticmethod
    def _turn_texts(conversation: Conversation) -> list[tuple[str, str | None, bool]]:
        """For each turn the text up to `[/INST]`, the reply with its spaces, or None, and whether that is masked."""
        turns = conversation.turns
        texts: list[tuple[str, str | None, bool]] = []
        for index in range(0, len(turns), 2):
            user = turns[index].content
            if index == 0 and conversation.system is not None:
                user = f"<<SYS>>\n{conversation.system.content}\n<</SYS>>\n\n{user}"
            prompt = f"[INST] {user.strip()} [/INST]"
            reply = turns[index + 1] if index + 1 < len(turns) else None
            texts.append(
                (prompt, None, False) if reply is None else (prompt, f" {reply.content.strip()} ", reply.masked)
            )
        return texts

    # Ids

    def encode(self, conversation: Conversation) -> TokenizedConversation:
        """Ids, and which are trained: each reply that is not masked, the space after it, and `</s>`."""
        pieces: list[bytes] = []
        spans: list[int] = []
        for prompt, reply, masked in self._turn_texts(conversation):
            # The leading space is SentencePiece's. The text of a turn may be cut before the reply, as at any space.
            prompt_ids = self._ids_of.text(f" {prompt}")
            pieces += (BOS_ID, prompt_ids)
            prompt_length = 1 + len(prompt_ids) // 2
            if reply is None:
                spans.append(prompt_length)
                continue
            reply_ids = self._ids_of.text(reply)
            pieces += (reply_ids, EOS_ID)
            reply_length = len(reply_ids) // 2 + 1
            spans += (prompt_length + reply_length, 0) if masked else (prompt_length, reply_length)
        return TokenizedConversation(b"".join(pieces), tuple(spans))

    def encode_prompt(self, conversation: Conversation) -> list[int]:
        """The ids that generation starts from: everything up to the last `[/INST]`.

        For a conversation that ends with a reply, this is the prompt of that reply, a strict prefix of `encode`.
        """
        turns = conversation.messages if conversation.is_prompt else conversation.messages[:-1]
        return self.encode(Conversation(turns)).ids

    def encode_text(self, text: str, *, begins: bool = True) -> "array[int]":
        """The ids of plain text outside the template, without `<s>`; nothing in it becomes a control token.

        `begins` says whether the text begins there, so that SentencePiece's leading space comes first. A text may be
        encoded in parts if each but the first begins with a space.
        """
        return array("H", self._ids_of.text(f" {text}" if begins else text))

    def decode(self, ids: list[int]) -> str:
        """The text of generated ids: control tokens left out, surrounding space stripped as in training."""
        return self._text.decode([i for i in ids if i not in (UNK, BOS, EOS)]).strip()

    def spell(self, ids: list[int]) -> str:
        """The text of ids, control tokens and surrounding space included: of `encode`'s ids what `render` gives.

        Bytes that are not UTF-8, such as those of a character that was cut, become U+FFFD.
        """
        text = b""
        for index, token in enumerate(ids):
            piece = self.pieces[token]
            if EOS < token < FIRST_PIECE:
                text += bytes([token - EOS - 1])
                continue
            # After <s> stands a space that is SentencePiece's, not the text's.
            piece = piece.removeprefix(SPACE) if index and ids[index - 1] == BOS else piece
            text += piece.replace(SPACE, " ").encode()
        return text.decode(errors="replace")

    @cached_property
    def pieces(self) -> list[str]:
        """The piece of each id, as the vocabulary spells it."""
        return sorted(self._vocabulary, key=self._vocabulary.__getitem__)

    @cached_property
    def fingerprint(self) -> str:
        """The hash of the vocabulary; see `data.vocabulary.fingerprint`."""
        return fingerprint(self._vocabulary)

    def save(self, directory: Path, base: Path | None = None) -> None:
        """Writes `tokenizer.json` and `tokenizer_config.json`, with the chat template, for stock transformers, and
        `tokenizer.model`, from which other programs take the pieces' scores.

        `tokenizer.model` is that of the directory `base` if it has one that gives the same ids as the embedded one,
        and the embedded one if not.
        """
        export.save(self._vocabulary, directory, base)


@cache
def _embedded(named: str) -> ChatTokenizer:
    """The tokenizer of the embedded vocabulary, made once in a process: each checkpoint of a run writes it."""
    return ChatTokenizer(load_vocabulary(EMBEDDED, None, named), named)
