"""A file's first bytes → its content unpacked and what that is, or a sentence about what can't be taken.

Names mislead: a download loses the right ending or keeps a wrong one. What the bytes say comes first.
"""

import bz2
import io
import lzma
from collections.abc import Callable
from pathlib import PurePath
from typing import Any

from configs.program.errors import UserError

BLOCK = 1 << 20
"""Bytes that are read at a time."""

LARGE = 8 << 20
"""Bytes of a table that is cut in two, and of a row that stays in the process that read it."""

PEEK = 512
"""Bytes that tell what a file is; a tar archive says so after 257."""

PACKED: dict[bytes, Callable[[str], Any]] = {
    b"\x1f\x8b": lambda name: _unpacked_by_arrow(name, "gzip"),
    b"\x28\xb5\x2f\xfd": lambda name: _unpacked_by_arrow(name, "zstd"),
    b"BZh": bz2.BZ2File,
    b"\xfd7zXZ\0": lzma.LZMAFile,
}
"""First bytes of compressed files, and what unpacks them."""

PACKED_ENDINGS = (".gz", ".zst", ".bz2", ".xz")
TABLES = {".parquet": "Parquet", ".pq": "Parquet", ".arrow": "Arrow", ".csv": "CSV", ".tsv": "CSV"}
LINES = (".jsonl", ".ndjson")

UNPACK = "unpack it, and name the files in it"
REFUSED = {
    b"version https://git-lfs.github.com/spec/": "a Git LFS pointer, not the file itself; fetch that by `git lfs pull`",
    b"PK\x03\x04": f"a zip archive; {UNPACK}",
    b"7z\xbc\xaf\x27\x1c": f"a 7z archive; {UNPACK}",
    b"Rar!\x1a\x07": f"a rar archive; {UNPACK}",
    b"<!doctype html": "a web page; download the file itself",
    b"<html": "a web page; download the file itself",
}
"""First bytes, in lower case if they are letters of a page, of what holds no rows, and what to do."""

UTF16 = "UTF-16 text; write it as UTF-8, for example by `iconv -f UTF-16 -t UTF-8`"
UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")
UTF32_STARTS = (b"\xff\xfe\0\0", b"\0\0\xfe\xff", b"{\0\0\0", b"[\0\0\0", b"\0\0\0{", b"\0\0\0[")
UTF32 = "UTF-32 text; write it as UTF-8, for example by `iconv -f UTF-32 -t UTF-8`"


def opened(name: str) -> tuple[io.BufferedReader, str]:
    """A file's content, unpacked if it is compressed, and what that is: Parquet, Arrow, CSV, lines (of JSON) or JSON.

    Raises:
        UserError: it is something that rows are not read from.
        EOFError, OSError, lzma.LZMAError: it can't be unpacked.
    """
    file: io.BufferedReader[Any] = io.BufferedReader(io.FileIO(name), BLOCK)
    try:
        beginning = file.read(PEEK)
        file.seek(0)
        unpack = next((PACKED[magic] for magic in PACKED if beginning.startswith(magic)), None)
        if unpack is not None:
            file.close()
            file = io.BufferedReader(unpack(name), BLOCK)
            beginning = file.peek(PEEK)[:PEEK]
        if refused := _refused(beginning):
            raise UserError(f"files={name}: it is {refused}")
        return file, _kind(beginning, PurePath(name), is_packed=unpack is not None)
    except BaseException:
        file.close()
        raise


def _unpacked_by_arrow(name: str, compression: str) -> Any:
    import pyarrow as pa

    return pa.input_stream(name, compression=compression)


def plain_name(name: str) -> PurePath:
    """A file's name without the ending that says how it is compressed."""
    path = PurePath(name)
    return path.with_suffix("") if path.suffix.lower() in PACKED_ENDINGS else path


def _kind(beginning: bytes, path: PurePath, *, is_packed: bool) -> str:
    if beginning.startswith(b"PAR1"):
        return "Parquet"
    if beginning.startswith(b"ARROW1"):
        return "Arrow"
    # A name that promises a compression which isn't there promises nothing else either.
    ending = (plain_name(str(path)) if is_packed else path).suffix.lower()
    if ending in LINES:
        return "lines"
    is_json = beginning.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] in (b"{", b"[")
    return "JSON" if is_json else TABLES.get(ending, "JSON")


def _refused(beginning: bytes) -> str:
    # With its mark or without, the zero bytes beside JSON's first sign give it away.
    if beginning[:4] in UTF32_STARTS:
        return UTF32
    if beginning[:2] in (b"{\0", b"[\0", b"\0{", b"\0[") or (beginning[:2] in UTF16_MARKS and b"\0" in beginning):
        return UTF16
    if beginning[257:262] == b"ustar":
        return f"a tar archive; {UNPACK}"
    lowered = beginning.lstrip()[:64].lower()
    return next(
        (refused for magic, refused in REFUSED.items() if beginning.startswith(magic) or lowered.startswith(magic)), ""
    )
