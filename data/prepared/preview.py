"""`task=preview`: rows of a prepared dataset as the model sees them."""

from pathlib import Path

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from configs.program.errors import UserError
from data.config import PrepareConfig
from data.prepared.whole import open_checked
from data.schema import IGNORE_INDEX, PackedRow
from data.template import ChatTokenizer

TRAINED = "bold green"
UNTRAINED = "dim"
MARK = "^"
"""Stands under trained tokens if there is no colour."""

NUMBER_WIDTH = 6


def preview(config: PrepareConfig) -> None:
    """Prints the first rows of the training split: tokens, which of them are trained, positions, pack boundaries."""
    directory = Path(config.output)
    manifest, tables = open_checked(directory, "output")
    table = tables["train"]
    if not table.num_rows:
        raise UserError(f"output={directory}: it holds no rows; prepare more")
    pieces = ChatTokenizer.load(config.tokenizer).pieces
    console = Console(highlight=False, markup=False)
    shown = min(config.rows, table.num_rows)
    sign = f"marked {MARK}" if console.no_color or console.color_system is None else "green"
    console.print(
        f"{directory}: the first {shown} of {table.num_rows:,} rows; trained tokens are {sign}", soft_wrap=True
    )
    for number in range(shown):
        row = PackedRow(**table.slice(number, 1).to_pylist()[0])
        supervised = sum(row.spans[1::2])
        console.print(
            f"\nrow {number}: {len(row.ids)} of {manifest['seq_len']} tokens, "
            f"{len(row.lengths)} conversations, {supervised} trained tokens",
            style="bold",
            soft_wrap=True,
        )
        _print_row(row, pieces, console)


def _print_row(row: PackedRow, pieces: list[str], console: Console) -> None:
    start = 0
    labels = row.labels
    for number, (length, source) in enumerate(zip(row.lengths, row.rows, strict=True), start=1):
        end = start + length
        console.rule(f"conversation {number}, from input row {source}: {length} tokens", align="left", style="cyan")
        tokens = [
            (pieces[token], label != IGNORE_INDEX)
            for token, label in zip(row.ids[start:end], labels[start:end], strict=True)
        ]
        _print_tokens(tokens, console)
        start = end


def _print_tokens(tokens: list[tuple[str, bool]], console: Console) -> None:
    """Lines of tokens, each after the position of its first one."""
    marks = console.no_color or console.color_system is None
    width = max(20, console.width - NUMBER_WIDTH - 2)
    first = 0
    while first < len(tokens):
        last, used = first, 0
        while last < len(tokens) and (last == first or used + cell_len(tokens[last][0]) <= width):
            used += cell_len(tokens[last][0]) + 1
            last += 1
        line = Text(f"{first:>{NUMBER_WIDTH}}  ", style="cyan")
        under = " " * (NUMBER_WIDTH + 2)
        for piece, trained in tokens[first:last]:
            line.append(f"{piece} ", style=TRAINED if trained else UNTRAINED)
            under += (MARK if trained else " ") * cell_len(piece) + " "
        console.print(line, soft_wrap=True)
        if marks and MARK in under:
            console.print(under.rstrip(), soft_wrap=True)
        first = last
