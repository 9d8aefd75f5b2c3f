"""`task=preview`: rows of a prepared dataset as the model sees them."""

from pathlib import Path

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from data.config import PrepareConfig
from data.prepared.layout import SPLITS
from data.prepared.selection import ShownConversation, selected
from data.prepared.whole import open_checked
from data.schema import IGNORE_INDEX
from data.template import ChatTokenizer

TRAINED = "bold green"
UNTRAINED = "dim"
MARK = "^"
"""Stands under trained tokens if there is no colour."""

NUMBER_WIDTH = 6


def preview(config: PrepareConfig) -> None:
    """Prints rows or conversations: tokens, which of them are trained, positions, pack boundaries."""
    directory = Path(config.output)
    manifest, tables = open_checked(directory, "output")
    rows = selected(directory, manifest, tables, config, spread=False)
    pieces = ChatTokenizer.load(config.tokenizer).pieces
    console = Console(highlight=False, markup=False)
    sign = f"marked {MARK}" if console.no_color or console.color_system is None else "green"
    sizes = " and ".join(f"{manifest[split]['packed_rows']:,} rows of {split}" for split in SPLITS)
    console.print(f"{directory}: {sizes}; trained tokens are {sign}", soft_wrap=True)
    for row in rows:
        packed, name = row.packed, "row" if row.split == "train" else f"row of {row.split}"
        console.print(
            f"\n{name} {row.number}: {len(packed.ids)} of {manifest['seq_len']} tokens, "
            f"{len(packed.lengths)} conversations, {sum(packed.spans[1::2])} trained tokens",
            style="bold",
            soft_wrap=True,
        )
        for conversation in row.conversations:
            _print_conversation(conversation, pieces, console)


def _print_conversation(conversation: ShownConversation, pieces: list[str], console: Console) -> None:
    tokenized = conversation.tokenized
    title = f"conversation {conversation.number}, {conversation.place}: {len(tokenized)} tokens "
    # Not console.rule, which shortens a title that is long: the place can be pasted after where=.
    console.print(title + "─" * (console.width - cell_len(title)), style="cyan", soft_wrap=True)
    tokens = [
        (pieces[token], label != IGNORE_INDEX) for token, label in zip(tokenized.ids, tokenized.labels, strict=True)
    ]
    _print_tokens(tokens, console)


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
