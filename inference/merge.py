"""Base and adapter → one checkpoint, from file to file: no model is ever built, and one matrix is in memory at a time.

The checkpoint has the base's files, tensor for tensor in Mixtral's original names. What the adapter leaves alone is
copied by the kernel; what it changes is read, folded and written. Everything happens in a hidden directory beside the
output, which takes its name when it is whole and verified.
"""

import datetime
import json
import os
import shutil
import struct
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table
from transformers import GenerationConfig

from configs.errors import UserError
from configs.receipt import machine, provenance
from configs.weights import INDEX, StoredWeights, local_directory
from data.template import BOS, EOS, UNK
from inference.adapter import Adapter
from inference.card import write_card
from inference.checkpoint import Piece, pieces
from inference.config import InferenceConfig
from inference.load import find_adapter, find_base, load_tokenizer
from inference.verify import verify

RECEIPT = "merge.json"
"""Written last into the output: what was merged, from what, by what, and what the verification measured."""

PACKAGES = ("openhermes-mixtral", "torch", "transformers", "peft", "safetensors", "tokenizers")

console = Console(stderr=True)


def merge(config: InferenceConfig) -> dict[str, Any]:
    """Writes `output` from base and adapter; returns its receipt.

    Raises:
        UserError: the two don't belong together, or the output can't be written, or would lose the adapter to rounding.
        VerificationError: what was written is not base + adapter.
    """
    started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    base = find_base(config)
    adapter = find_adapter(config, base)
    tokenizer = load_tokenizer(base)
    source = local_directory(base.source, base.revision, base.named)
    weights = StoredWeights(source, base.named)
    parts = pieces(weights, base.architecture, base.named)

    output = Path(str(config.output))
    _check_output(output, config.overwrite, source, adapter.directory, sum(piece.size for piece in parts))

    temporary = output.parent / f".{output.name}.tmp"
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        seconds = write_weights(temporary, parts, adapter)
        shutil.copyfile(source / "config.json", temporary / "config.json")
        GenerationConfig(bos_token_id=BOS, eos_token_id=EOS, pad_token_id=UNK).save_pretrained(temporary)
        tokenizer.save(temporary)
        receipt = {
            "started": started,
            **provenance(PACKAGES),
            "hardware": machine(),
            "base": {"path": base.source, "revision": base.revision, "fingerprint": weights.fingerprint},
            "adapter": {"path": str(adapter.directory), "settings": adapter.settings, "receipt": adapter.receipt},
            "merged": {"bytes": sum(piece.size for piece in parts), "seconds": seconds},
            "verification": verify(temporary, parts, adapter, tokenizer) if config.verify else None,
        }
        write_card(temporary, output.name, source, receipt, config.licence)
        (temporary / RECEIPT).write_text(json.dumps(receipt, indent=2) + "\n", encoding="utf-8")
        _take_the_name(temporary, output)
    except OSError as error:
        raise UserError(
            f"output={output}: it can't be written ({error.strerror or error}); name a writable place with room for "
            f"{sum(piece.size for piece in parts) / 1e9:.1f} GB"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    _show(output, receipt)
    return receipt


def write_weights(directory: Path, parts: list[Piece], adapter: Adapter) -> float:
    """Writes the merged tensors to files of the base's names, and their index; returns the seconds that it took."""
    started = time.perf_counter()
    buffer = bytearray(max(piece.size for piece in parts))
    names = list(dict.fromkeys(piece.stored.file.name for piece in parts))
    columns = ("Merging", BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("", total=sum(piece.size for piece in parts))
        for name in names:
            with (directory / name).open("wb", buffering=0) as file:
                here = [piece for piece in parts if piece.stored.file.name == name]
                _write(file, header(here))
                for piece in here:
                    if piece.parameter in adapter.updates:
                        tensor = piece.read(buffer)
                        adapter.fold(piece.parameter, tensor, piece.expert, piece.rows)
                        _write(file, memoryview(buffer)[: piece.size])
                    else:
                        _copy(piece, file)
                    progress.advance(bar, piece.size)
                os.fsync(file.fileno())
    if len(names) > 1:
        index = {
            "metadata": {"total_size": sum(piece.size for piece in parts)},
            "weight_map": {piece.stored.name: piece.stored.file.name for piece in parts},
        }
        (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return time.perf_counter() - started


def header(parts: list[Piece]) -> bytes:
    """The head of a safetensors file with these tensors in this order."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for piece in parts:
        begin, end = end, end + piece.size
        entry = {"dtype": piece.stored.dtype, "shape": list(piece.stored.shape), "data_offsets": [begin, end]}
        entries[piece.stored.name] = entry
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that tensors begin at multiples of eight bytes
    return struct.pack("<Q", len(text)) + text


def _write(file: Any, content: bytes | memoryview) -> None:
    view = memoryview(content)
    while view:
        view = view[file.write(view) :]


def _copy(piece: Piece, file: Any) -> None:
    """Copies a piece's bytes without bringing them into this process."""
    with piece.stored.file.open("rb") as source:
        at = piece.stored.begin
        while at < piece.stored.end:
            at += os.sendfile(file.fileno(), source.fileno(), at, piece.stored.end - at)


def _check_output(output: Path, overwrite: bool, source: Path, adapter: Path, size: int) -> None:
    place = output.resolve()
    if any(path.resolve().is_relative_to(place) for path in (source, adapter, Path.cwd())):
        raise UserError(f"output={output}: it holds the base, the adapter or the working directory; name another")
    if output.exists():
        if not (output / RECEIPT).is_file():
            raise UserError(f"output={output}: something is there that no merge wrote; name another directory")
        if not overwrite:
            raise UserError(f"output={output}: a merged model is there; name another, or give overwrite=true")
    parent = next(path for path in place.parents if path.exists())
    if not os.access(parent, os.W_OK):
        raise UserError(f"output={output}: {parent} is not writable; name another place")
    free = shutil.disk_usage(parent).free
    if free < size:
        raise UserError(
            f"output={output}: the model takes {size / 1e9:.1f} GB and {free / 1e9:.1f} GB are free; make room, or "
            f"name another disk"
        )


def _take_the_name(temporary: Path, output: Path) -> None:
    """Makes the output appear whole; an older one goes when the new one is there."""
    for path in (*temporary.iterdir(), temporary):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    old = output.parent / f".{output.name}.old"
    shutil.rmtree(old, ignore_errors=True)
    if output.exists():
        output.rename(old)
    temporary.rename(output)
    shutil.rmtree(old, ignore_errors=True)


def _show(output: Path, receipt: dict[str, Any]) -> None:
    table = Table(title=f"{output}", show_header=False, title_justify="left")
    merged = receipt["merged"]
    table.add_row("bytes written", f"{merged['bytes']:,} at {merged['bytes'] / merged['seconds'] / 1e9:.2f} GB/s")
    for name, value in (receipt["verification"] or {}).items():
        table.add_row(name.replace("_", " "), f"{value:,}" if isinstance(value, int) else f"{value:.2e}")
    console.print(table)
