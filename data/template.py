"""The only place where text becomes ids, and the only place that decides which tokens are trained.

The text of a turn is `<s>[INST] {user} [/INST] {assistant} </s>`; a system message is joined with the first user text,
and then the whole is stripped, so that the edges between the two stay as they were written. `<s>` and `</s>` are placed
as ids; all other text goes through the vocabulary's merges alone, in which no control token takes part. So nothing that
a message says can become a control token, however it is spelled.
"""

import hashlib
import json
import re
from array import array
from functools import cached_property
from importlib import resources
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

from configs.program.errors import UserError
from data.disk import hub
from data.schema import Conversation, TokenizedConversation

EMBEDDED = "embedded"
"""The Mixtral vocabulary that the package mistral-common carries."""

UNK, BOS, EOS = 0, 1, 2
"""Ids of `<unk>`, `<s>` and `</s>` in the Mixtral vocabulary."""

BOS_ID, EOS_ID = (array("H", [token]).tobytes() for token in (BOS, EOS))
"""The same, as they stand in `TokenizedConversation.packed_ids`."""

SPACE = "▁"
"""How SentencePiece writes a space (U+2581)."""

MARKERS = ("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>")
"""The template's own words. They are plain text to the vocabulary, so only a policy keeps them out of contents."""

SENTENCEPIECE = "tokenizer.model"

LARGEST_MODEL = 16 << 20
"""Bytes of the largest SentencePiece model that is read; Mixtral's has half a megabyte."""

TOKENIZER_FILES = ("tokenizer.json", SENTENCEPIECE)
"""The files that hold a vocabulary, the preferred first."""

FIRST_PIECE = 259
"""Ids from here on are pieces of text; below are the control tokens and the 256 bytes."""

FINGERPRINT = "f5960015e10ae442ae6af9b2ea717c316445fb88954689e0cac575ec2826370d"
"""`ChatTokenizer.fingerprint` of the Mixtral vocabulary."""

# Ids for texts that the common mistakes get wrong: no space before the first piece after a control token ("[" 28792 for
# "▁[" 733), control tokens read from text, byte pieces, runs of spaces. Computed with SentencePiece from the model
# tokenizer.model.v1 of mistral-common. The fingerprint covers the vocabulary, these what the library makes of it.
PROBES: tuple[tuple[str, tuple[int, ...]], ...] = (
    ("[INST] Hello [/INST]", (733, 16289, 28793, 22557, 733, 28748, 16289, 28793)),
    ("</s>", (1867, 28713, 28767)),
    ("x   y\n", (1318, 259, 337, 13)),
    ("🧿 <0x0A>", (28705, 243, 162, 170, 194, 523, 28734, 28744, 28734, 28741, 28767)),
)


UNIT = re.compile(r"\n| *[^ \n]+| +")
"""A word with the spaces before it, a line end, or spaces that end a line."""

CACHED_UNITS = 1 << 18
"""Units whose ids are kept, about 50 MB."""

LONGEST_CACHED = 32
"""Characters of the longest unit that is kept: what is longer seldom comes again."""


class UnitIds(dict[str, bytes]):
    """The ids of units of text, computed when first asked for.

    No piece of the vocabulary has a space after another character, and none holds a line end with something else, so no
    merge reaches over the border of two units: the ids of a text are those of its units, end to end. Most units come
    again and again, and looking them up is several times faster than merging a whole text.
    """

    def __init__(self, tokenizer: Tokenizer):
        super().__init__()
        self._merge = tokenizer.model.tokenize  # the merges alone: nothing is put before the text

    def text(self, text: str) -> bytes:
        """The ids of a text, each a native uint16."""
        # SentencePiece does not tell its own sign for a space from a space.
        return b"".join(map(self.__getitem__, UNIT.findall(text.replace(SPACE, " "))))

    def __missing__(self, unit: str) -> bytes:
        ids = array("H", [token.id for token in self._merge(unit.replace(" ", SPACE))]).tobytes()
        if len(unit) <= LONGEST_CACHED:
            if len(self) >= CACHED_UNITS:
                self.clear()
            self[unit] = ids
        return ids


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
        self._text = _merges_only(vocabulary)
        self._ids_of = UnitIds(self._text)
        for text, expected in PROBES:
            found = memoryview(self._ids_of.text(f" {text}")).cast("H").tolist()
            if tuple(found) != expected:
                raise RuntimeError(
                    f"this version of the library tokenizers encodes {text!r} as {found}, and SentencePiece as "
                    f"{list(expected)}: install the one in constraints.txt"
                )

    @classmethod
    def load(
        cls, source: str = EMBEDDED, *, revision: str | None = None, setting: str = "tokenizer"
    ) -> "ChatTokenizer":
        """Loads the vocabulary of a model directory, a hub id, or `"embedded"`.

        `tokenizer.json` and `tokenizer.model` give the same ids here: only the vocabulary is taken from either, never
        the stored merges and processing, which differ between versions of the same tokenizer.

        `revision` is the commit, tag or branch of a hub id; `setting` names the user's setting in errors.

        Raises:
            UserError: nothing usable is there, or the vocabulary is not Mixtral's.
        """
        named = f"{setting}={source}"
        path = _locate(source, revision, named)
        return cls(_read_json(path, named) if path.suffix == ".json" else _read_sentencepiece(path, named), named)

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
        for place in range(0, len(turns), 2):
            user = turns[place].content
            if place == 0 and conversation.system is not None:
                user = f"<<SYS>>\n{conversation.system.content}\n<</SYS>>\n\n{user}"
            prompt = f"[INST] {user.strip()} [/INST]"
            reply = turns[place + 1] if place + 1 < len(turns) else None
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

    def decode(self, ids: list[int]) -> str:
        """The text of generated ids: control tokens left out, surrounding space stripped as in training."""
        return self._text.decode([i for i in ids if i not in (UNK, BOS, EOS)]).strip()

    def spell(self, ids: list[int]) -> str:
        """The text of ids, control tokens and surrounding space included: of `encode`'s ids what `render` gives.

        Bytes that are no UTF-8, as where a character is cut, become U+FFFD.
        """
        text = b""
        for place, token in enumerate(ids):
            piece = self.pieces[token]
            if EOS < token < FIRST_PIECE:
                text += bytes([token - EOS - 1])
                continue
            # After <s> stands a space that is SentencePiece's, not the text's.
            piece = piece.removeprefix(SPACE) if place and ids[place - 1] == BOS else piece
            text += piece.replace(SPACE, " ").encode()
        return text.decode(errors="replace")

    @cached_property
    def pieces(self) -> list[str]:
        """The piece of each id, as the vocabulary spells it."""
        return sorted(self._vocabulary, key=self._vocabulary.__getitem__)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the pieces in the order of their ids: equal exactly where the ids of every text are equal."""
        pieces = sorted(self._vocabulary.items(), key=lambda item: item[1])
        return hashlib.sha256(json.dumps(pieces).encode()).hexdigest()

    def save(self, directory: Path, base: Path | None = None) -> None:
        """Writes `tokenizer.json` and `tokenizer_config.json`, with the chat template, for stock transformers, and
        `tokenizer.model`, from which other programs take the pieces' scores.

        The model is that of the directory `base` where it has one that says the same as the embedded one, which is
        taken else.
        """
        (directory / SENTENCEPIECE).write_bytes(_sentencepiece(base))
        stock = _merges_only(self._vocabulary)
        stock.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in CONTROL])
        unescape = [normalizers.Replace(BREAK, ""), normalizers.Replace(ESCAPED, ESCAPE)]
        stock.normalizer = normalizers.Sequence([*unescape, stock.normalizer])
        # Answers begin with the space that the template puts before them; stock programs show what is decoded.
        stock.decoder = decoders.Sequence([stock.decoder, decoders.Strip(" ", 1, 0)])
        # Not by its own `save`, whose error is no OSError where the disk is full.
        (directory / "tokenizer.json").write_text(stock.to_str(pretty=True), encoding="utf-8")
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<s>",
            "eos_token": "</s>",
            "unk_token": "<unk>",
            "add_bos_token": False,
            "clean_up_tokenization_spaces": False,
            "chat_template": CHAT_TEMPLATE,
        }
        (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n")


# Stock tokenizers match `<s>` and `</s>` anywhere in the rendered text, also where a message only spells them. So the
# stored template breaks up those of a message with a character that Unicode keeps for a program's own use, and the
# stored tokenizer takes the breaks out again after it has looked for control tokens: the ids are those of `encode`
# whatever a message says, that character among it.
CONTROL = ("<unk>", "<s>", "</s>")
ESCAPE = "\ufdd0"
BREAK, ESCAPED = f"{ESCAPE}1", f"{ESCAPE}0"


def _escapes() -> str:
    """The filters of the template that escape a message."""
    pairs = [(ESCAPE, ESCAPED), *((token, f"{token[0]}{BREAK}{token[1:]}") for token in CONTROL)]
    return "".join(f" | replace('{text}', '{escaped}')" for text, escaped in pairs)


CHAT_TEMPLATE = (
    "{%- macro plain(text) -%}{{ text" + _escapes() + " }}{%- endmacro -%}"
    "{%- set system = plain(messages[0]['content']) if messages[0]['role'] == 'system' else none -%}"
    "{%- set turns = messages[1:] if system is not none else messages -%}"
    "{%- for message in turns -%}"
    "{%- if message['role'] != ('user' if loop.index0 % 2 == 0 else 'assistant') -%}"
    "{{ raise_exception('after an optional system message, user and assistant alternate, the user first') }}"
    "{%- endif -%}"
    "{%- if message['role'] == 'user' -%}"
    "{{ '<s>[INST] ' }}"
    "{%- set opening = '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' if loop.first and system is not none else '' -%}"
    "{{ (opening + plain(message['content'])) | trim + ' [/INST]' }}"
    "{%- else -%}"
    "{{ ' ' + plain(message['content']) | trim + ' </s>' }}"
    "{%- endif -%}"
    "{%- endfor -%}"
)
"""The same template in Jinja, stored with exported models for programs that do not use this one."""


def _merges_only(vocabulary: dict[str, int]) -> Tokenizer:
    """The vocabulary's merges, with SentencePiece's leading space, and without any token that is matched in text."""
    tokenizer = Tokenizer(
        models.BPE(vocab=vocabulary, merges=_merges(vocabulary), unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    tokenizer.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


def _sentencepiece(base: Path | None) -> bytes:
    """Mixtral's SentencePiece model: the base's own, or the embedded one where that has other ids, or there is none."""
    embedded = _locate(EMBEDDED, None, "tokenizer").read_bytes()
    own = None if base is None else base / SENTENCEPIECE
    if own is None or not own.is_file() or own.stat().st_size > LARGEST_MODEL:
        return embedded
    try:
        content = own.read_bytes()
        return content if _meaning(content) == _meaning(embedded) else embedded
    except Exception:  # it is damaged; protobuf's DecodeError lives in a different place in each of its implementations
        return embedded


def _meaning(content: bytes) -> tuple[object, ...]:
    """What decides the ids in a SentencePiece model: pieces with scores and kinds, and what is done to the text."""
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString(content)
    pieces = [(piece.piece, piece.score, piece.type) for piece in model.pieces]
    trained = model.trainer_spec
    return pieces, model.normalizer_spec.SerializeToString(), trained.model_type, trained.byte_fallback


def has_tokenizer(directory: Path) -> bool:
    """Whether a model directory brings a tokenizer of its own."""
    return any((directory / name).is_file() for name in TOKENIZER_FILES)


def _locate(source: str, revision: str | None, named: str) -> Path:
    """The tokenizer's file for a directory, a hub id or `"embedded"`."""
    if source == EMBEDDED:
        return Path(str(resources.files("mistral_common") / "data" / "tokenizer.model.v1"))
    directory = Path(source)
    if directory.is_dir():
        for name in TOKENIZER_FILES:
            if (directory / name).is_file():
                return directory / name
        raise UserError(f"{named}: the directory holds neither {' nor '.join(TOKENIZER_FILES)}; name a model directory")
    remedy = "name a model directory, or a hub id such as mistralai/Mixtral-8x7B-Instruct-v0.1"
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", source) or source.startswith("."):
        raise UserError(f"{named}: there is no such directory; {remedy}")
    repository = hub.find("model", source, revision, named)
    held = repository.files()
    for name in TOKENIZER_FILES:
        if name in held:
            return repository.fetch([name]) / name
    raise UserError(f"{named}: the hub has neither {' nor '.join(TOKENIZER_FILES)} of it; {remedy}")


def local_tokenizer(source: str) -> str:
    """The same tokenizer without a hub: a directory that holds it, or `embedded`.

    Raises:
        UserError: a hub doesn't give it.
    """
    return EMBEDDED if source == EMBEDDED else str(_locate(source, None, f"tokenizer={source}").parent)


def _read_json(path: Path, named: str) -> dict[str, int]:
    """The vocabulary of a `tokenizer.json`."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8"))["model"]["vocab"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(
            f"{named}: its {path.name} is not one with a vocabulary ({error}); name a Mixtral-8x7B model"
        ) from error


def _read_sentencepiece(path: Path, named: str) -> dict[str, int]:
    """The vocabulary of a SentencePiece model."""
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()
    try:
        model.ParseFromString(path.read_bytes())
    except Exception as error:  # protobuf's DecodeError lives in a different place in each of its implementations
        raise UserError(f"{named}: its {path.name} is no SentencePiece model; name a Mixtral-8x7B model") from error
    return {piece.piece: place for place, piece in enumerate(model.pieces)}


def _merges(vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    """The merges of BPE, strongest first: each way to cut a piece in two is a merge.

    SentencePiece ranks pieces, here by id, and merges the leftmost of equals; a list of merges ranks the cuts of one
    piece too. Putting the cut with the longer left part first gives SentencePiece's ids; stored files have other
    orders, which differ on long runs of one character. Runs of spaces share the last rank.
    """
    pieces = sorted(vocabulary, key=lambda piece: (not piece.strip(SPACE), vocabulary[piece]))
    return [
        (piece[:cut], piece[cut:])
        for piece in pieces
        if vocabulary[piece] >= FIRST_PIECE
        for cut in range(len(piece) - 1, 0, -1)
        if piece[:cut] in vocabulary and piece[cut:] in vocabulary
    ]
