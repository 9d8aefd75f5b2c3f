"""The Mixtral vocabulary: where it is, how it is read, and whether it is Mixtral's. Needs no tokenizers library."""

import hashlib
import json
import re
from importlib import resources
from pathlib import Path
from typing import Annotated, TypedDict

from msgspec import Meta

from configs.program.errors import UserError
from data.disk import hub
from data.disk.formats import sizes
from data.disk.formats.json_text import read_json
from data.disk.formats.regular import UnreadableError, read_regular

EMBEDDED = "embedded"
"""The Mixtral vocabulary that the package mistral-common carries."""

SENTENCEPIECE = "tokenizer.model"

TOKENIZER_FILES = ("tokenizer.json", SENTENCEPIECE)
"""The files that hold a vocabulary, the preferred first."""

FIRST_PIECE = 259
"""Ids from here on are pieces of text; below are the control tokens and the 256 bytes."""

FINGERPRINT = "f5960015e10ae442ae6af9b2ea717c316445fb88954689e0cac575ec2826370d"
"""`ChatTokenizer.fingerprint` of the Mixtral vocabulary."""


REMEDY = "name a Mixtral-8x7B model"


class Vocabulary(TypedDict):
    """Pieces and their ids."""

    vocab: dict[str, Annotated[int, Meta(ge=0, lt=1 << 24)]]


class Tokenizer(TypedDict):
    """What is read of a tokenizer.json."""

    model: Vocabulary


def load_vocabulary(source: str, revision: str | None, named: str) -> dict[str, int]:
    """The pieces and their ids.

    `tokenizer.json` and `tokenizer.model` give the same ids here: only the vocabulary is taken from either, never the
    stored merges and processing, which differ between versions of the same tokenizer.

    Args:
        source: a model directory, a hub id, or `"embedded"`.
        revision: the commit, tag or branch of a hub id.
        named: how errors begin.

    Raises:
        UserError: nothing usable is there.
    """
    path = _locate(source, revision, named)
    return _read_json(path, named) if path.suffix == ".json" else _read_sentencepiece(path, named)


def fingerprint(vocabulary: dict[str, int]) -> str:
    """SHA-256 over the pieces in the order of their ids: equal exactly if the ids of every text are equal."""
    pieces = sorted(vocabulary.items(), key=lambda item: item[1])
    return hashlib.sha256(json.dumps(pieces).encode()).hexdigest()


def has_tokenizer(directory: Path) -> bool:
    """Whether a model directory brings a tokenizer of its own."""
    return any((directory / name).is_file() for name in TOKENIZER_FILES)


def local_tokenizer(source: str) -> str:
    """The same tokenizer without a hub: a directory that holds it, or `embedded`.

    Raises:
        UserError: a hub doesn't give it.
    """
    return EMBEDDED if source == EMBEDDED else str(_locate(source, None, f"tokenizer={source}").parent)


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


def _read_json(path: Path, named: str) -> dict[str, int]:
    """The vocabulary of a `tokenizer.json`."""
    vocabulary = read_json(path, Tokenizer, named, REMEDY, largest=sizes.TOKENIZER)["model"]["vocab"]
    if len(set(vocabulary.values())) < len(vocabulary):
        raise UserError(f"{named}: its {path.name} gives one id to two pieces; {REMEDY}")
    return vocabulary


def _read_sentencepiece(path: Path, named: str) -> dict[str, int]:
    """The vocabulary of a SentencePiece model."""
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()
    try:
        content = read_regular(
            path, sizes.SENTENCEPIECE, linked=path.name != SENTENCEPIECE
        )  # a package may be linked to
    except UnreadableError as error:
        raise UserError(f"{named}: its {path.name} can't be read ({error}); {REMEDY}") from error
    try:
        model.ParseFromString(content)
    except Exception as error:  # protobuf's DecodeError lives in a different place in each of its implementations
        raise UserError(f"{named}: its {path.name} is not a SentencePiece model; {REMEDY}") from error
    if not all(isinstance(piece.piece, str) for piece in model.pieces):  # what is not UTF-8 comes as bytes
        raise UserError(f"{named}: its {path.name} holds a piece that is not text; {REMEDY}")
    return {piece.piece: index for index, piece in enumerate(model.pieces)}


def sentencepiece_model(base: Path | None) -> bytes:
    """Mixtral's SentencePiece model: the base's own, or the embedded one if that has other ids or there is none."""
    embedded = _locate(EMBEDDED, None, "tokenizer").read_bytes()
    own = None if base is None else base / SENTENCEPIECE
    if own is None:
        return embedded
    try:
        content = read_regular(own, sizes.SENTENCEPIECE)
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
