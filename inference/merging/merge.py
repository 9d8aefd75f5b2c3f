"""Base and adapter → one checkpoint, from file to file: no model is built, and each thread holds one block of a matrix.

The checkpoint has the base's files, tensor for tensor in Mixtral's original names. The kernel copies what the adapter
leaves alone; what it changes is read, folded and written. Everything happens in a hidden directory beside the output,
which takes the output's name when it is complete and verified.
"""

import datetime
import errno
import json
import os
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO

import torch
from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table
from transformers import GenerationConfig

from configs.program.console import console
from configs.program.errors import UserError, one_line
from configs.program.provenance import machine, provenance
from data.card import read_story
from data.disk import nf4
from data.disk.adapter_directory import public
from data.disk.architecture import exported, read_settings
from data.disk.files import occupied, staging, take_place
from data.disk.formats import sizes
from data.disk.mixtral_files import Piece, pieces
from data.disk.plain_text import json_if_readable
from data.disk.tensor_file import header
from data.disk.weights import INDEX, SINGLE
from data.template import BOS, EOS, UNK
from inference.adapter import BLOCK, Adapter
from inference.card.merged import write_card
from inference.card.scores import read_scores
from inference.config import InferenceConfig
from inference.load import find_adapter, find_base, load_tokenizer
from inference.merging.verify import verify

RECEIPT = "merge.json"
"""Written last into the output: what was merged, from what, with which versions, and what the verification measured."""

PACKAGES = ("openhermes-mixtral", "torch", "transformers", "peft", "safetensors", "tokenizers")

NOT_BY_THE_KERNEL = (errno.EXDEV, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS)
"""How copy_file_range fails between some file systems, on some of them, and if a kernel or sandbox lacks it."""

COPIED_AT_ONCE = 4 << 20
"""Bytes."""

MOST_THREADS = 8
"""More of them would only wait for the disk."""


def merge(config: InferenceConfig) -> dict[str, Any]:
    """Writes `output` from base and adapter; returns its receipt.

    Raises:
        UserError: the two don't belong together, the output can't be written, or rounding would lose the adapter.
        VerificationError: what was written is not base + adapter.
    """
    started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    base = find_base(config)
    adapter = find_adapter(config, base)
    tokenizer = load_tokenizer(base)
    if config.verify and adapter.trained_in == nf4.FORM:
        nf4.check_available("verify=true, of an adapter that was trained in nf4")
    parts = pieces(base.weights, base.architecture)
    training = adapter.receipt
    story = read_story(base.directory, adapter.directory, adapter.settings, training)
    scores, left_out = read_scores(adapter.directory, base.weights.fingerprint)
    settings = exported(read_settings(base.directory, base.named))
    for sentence in (*story.left_out, *([left_out] if left_out else ())):
        console.print(sentence, soft_wrap=True)

    output, size = Path(str(config.output)), sum(piece.size for piece in parts)
    _check_output(output, config.overwrite, base.directory, adapter.directory)
    with staging(output, setting="output") as temporary:
        _check_free(output, temporary, size)  # after what killed runs left is gone
        directory = temporary / "model"
        directory.mkdir()
        seconds = write_weights(directory, parts, adapter)
        (directory / "config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        GenerationConfig(bos_token_id=BOS, eos_token_id=EOS, pad_token_id=UNK).save_pretrained(directory)
        tokenizer.save(directory, base.directory)
        of_hub = adapter.directory != Path(str(config.adapter))
        receipt = {
            "started": started,
            **provenance(PACKAGES),
            "hardware": machine(),
            "base": {"path": base.source, "revision": base.revision, "fingerprint": base.weights.fingerprint},
            "adapter": {
                "path": config.adapter,
                "revision": adapter.directory.name if of_hub else None,
                "settings": adapter.settings,
                "trained_on_base_in": adapter.trained_in,
                "receipt": training,
            },
            "merged": {"bytes": size, "seconds": seconds},
            "verification": verify(directory, parts, adapter, tokenizer) if config.verify else None,
        }
        write_card(directory, output.name, story, scores, receipt, config.licence)
        receipt["files"] = sorted([RECEIPT, *(path.name for path in directory.iterdir())])
        receipt = public(receipt)
        (directory / RECEIPT).write_text(json.dumps(receipt, indent=2) + "\n", encoding="utf-8")
        # once more: another process may have been faster
        _check_output(output, config.overwrite, base.directory, adapter.directory)
        take_place(directory, output)
    _show(output, receipt)
    return receipt


def write_weights(directory: Path, parts: list[Piece], adapter: Adapter) -> float:
    """Writes the merged tensors to files of the base's names, and their index; returns the seconds that it took.

    Each thread takes a tensor and does its small sums alone: torch's own threads would wait for each other after every
    block, and for whatever else runs on the machine.
    """
    started = time.perf_counter()
    names = list(dict.fromkeys(piece.stored.file.name for piece in parts))
    columns = ("Merging", BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with (
        single_threaded_torch(),
        ThreadPoolExecutor(min(os.cpu_count() or 1, MOST_THREADS)) as threads,
        Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress,
    ):
        bar = progress.add_task("", total=sum(piece.size for piece in parts))
        for name in names:
            here = [piece for piece in parts if piece.stored.file.name == name]
            with (directory / name).open("wb", buffering=0) as file:
                head = header((p.stored.name, p.stored.dtype, p.stored.shape, p.size) for p in here)
                file.write(head)
                ends = accumulate((piece.size for piece in here), initial=len(head))
                begins = list(ends)[:-1]
                for size in threads.map(lambda piece, at: write_piece(piece, adapter, file, at), here, begins):
                    progress.advance(bar, size)
    if names != [SINGLE]:
        index = {
            "metadata": {"total_size": sum(piece.size for piece in parts)},
            "weight_map": {piece.stored.name: piece.stored.file.name for piece in parts},
        }
        (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return time.perf_counter() - started


def write_piece(piece: Piece, adapter: Adapter, file: BinaryIO, at: int) -> int:
    """Writes a piece at an offset of a file, with the adapter's change if it has one; returns its bytes.

    A few hundred kilobytes are read, summed and written at a time, so that they never leave the processor's cache.
    """
    with piece.stored.file.open("rb", buffering=0) as source:
        if piece.stored.name not in adapter.updates:
            copy(source.fileno(), piece.stored.begin, file.fileno(), at, piece.size)
            return piece.size
        height = piece.stored.shape[0]
        row_bytes = piece.size // height
        step = max(1, BLOCK["cpu"] * piece.dtype.itemsize // row_bytes)
        buffer = bytearray(step * row_bytes)
        for row in range(0, height, step):
            view = memoryview(buffer)[: min(step, height - row) * row_bytes]
            _exactly(os.preadv(source.fileno(), [view], piece.stored.begin + row * row_bytes), view)
            block = torch.frombuffer(view, dtype=piece.dtype).view(-1, *piece.stored.shape[1:])
            adapter.fold(piece.stored.name, block, slice(row, row + len(block)))
            _exactly(os.pwrite(file.fileno(), view, at + row * row_bytes), view)
    return piece.size


def copy(source: int, begin: int, target: int, at: int, size: int) -> None:
    """Copies bytes from an offset of one open file to an offset of another.

    The kernel does it without bringing them into this process, if it can. Between file systems it may be unable to,
    and some file systems answer that nothing was copied; then the bytes are read and written.

    Raises:
        OSError: the source ends too early, or the disk is full.
    """
    end = begin + size
    while begin < end:
        try:
            count = os.copy_file_range(source, target, end - begin, begin, at)
        except OSError as error:
            if error.errno not in NOT_BY_THE_KERNEL:
                raise
            count = 0
        if count == 0:
            break
        begin, at = begin + count, at + count
    buffer = memoryview(bytearray(min(COPIED_AT_ONCE, end - begin)))
    while begin < end:
        block = buffer[: min(len(buffer), end - begin)]
        count = os.preadv(source, [block], begin)
        if count == 0:
            raise OSError(f"the file ends {end - begin} bytes too early")
        _exactly(os.pwrite(target, block[:count], at), block[:count])
        begin, at = begin + count, at + count


def _exactly(count: int, view: memoryview) -> None:
    if count != len(view):
        raise OSError(f"{count} of {len(view)} bytes were moved")


@contextmanager
def single_threaded_torch() -> Iterator[None]:
    """Within it, each operation of torch runs in one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _check_output(output: Path, overwrite: bool, source: Path, adapter: Path) -> None:
    """Raises `UserError` unless the output is free, or is a merged model that may be replaced."""
    try:
        there = occupied(output, [source, adapter])
    except OSError as error:
        raise UserError(f"output={output}: it can't be a directory ({one_line(error)}); name another") from error
    if there.needed:
        raise UserError(f"output={output}: it holds the base, the adapter or the working directory; name another")
    if not there:
        return
    if not (output / RECEIPT).is_file():
        raise UserError(f"output={output}: something is there that no merge wrote; name another directory")
    if not overwrite:
        raise UserError(f"output={output}: a merged model is there; name another, or give overwrite=true")
    ours = json_if_readable(output / RECEIPT, sizes.RECORD).get("files", [])
    ours = ours if isinstance(ours, list) else []
    if foreign := there.foreign(ours):
        raise UserError(f"output={output}: {foreign} is in it, which no merge wrote; move it elsewhere")


def _check_free(output: Path, temporary: Path, size: int) -> None:
    free = shutil.disk_usage(temporary).free
    if free < size:
        raise UserError(
            f"output={output}: the model takes {size / 1e9:.1f} GB and {free / 1e9:.1f} GB are free; make room, or "
            f"name another disk"
        )


def _show(output: Path, receipt: dict[str, Any]) -> None:
    table = Table(title=f"{output}", show_header=False, title_justify="left")
    merged = receipt["merged"]
    table.add_row("bytes written", f"{merged['bytes']:,} at {merged['bytes'] / merged['seconds'] / 1e9:.2f} GB/s")
    for name, value in (receipt["verification"] or {}).items():
        table.add_row(name.replace("_", " "), f"{value:,}" if isinstance(value, int) else f"{value:.2e}")
    console.print(table)
