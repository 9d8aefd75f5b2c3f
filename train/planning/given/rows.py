"""What a plan needs of the dataset: from its manifest, or assumed while it isn't prepared."""

import math
import sys
from dataclasses import dataclass

from configs.program.errors import UserError
from data.prepared.dataset import PreparedDataset
from train.config.train import TrainConfig


@dataclass(frozen=True, slots=True)
class Rows:
    """Packed rows."""

    length: int
    """Slots of a row."""
    tokens: float
    """Of a row, without padding; a mean."""
    supervised: float
    """The share of the tokens that is trained."""
    conversation: float
    """Tokens of a conversation, a mean."""
    of_epoch: int
    """Rows; 0 if that isn't known."""
    said: str
    """Where all this is from, as a sentence."""


def rows_of(config: TrainConfig) -> Rows:
    """Of the run's dataset; assumed by the group `plan` if the command names none and the recipe's isn't there yet.

    Raises:
        UserError: the command names a dataset, and there is none.
    """
    try:
        return of_dataset(PreparedDataset(config.dataset))
    except UserError:
        if any(argument.startswith("dataset=") for argument in sys.argv[1:]):
            raise
    plan = config.plan
    of_epoch = math.ceil(plan.conversations * plan.conversation_length / plan.row_length)
    counted = (
        f"{plan.conversations:,} conversations (plan.conversations) of {plan.conversation_length:,} tokens on average "
        f"(plan.conversation_length), packed into {of_epoch:,} rows"
        if of_epoch
        else "an unknown number of rows (plan.conversations)"
    )
    said = (
        f"{config.dataset} isn't prepared, so this is assumed: {counted} of {plan.row_length:,} (plan.row_length), "
        f"{plan.supervised:.0%} of the tokens supervised (plan.supervised)"
    )
    conversation = min(plan.conversation_length, plan.row_length)
    return Rows(plan.row_length, plan.row_length, plan.supervised, conversation, of_epoch, said)


def of_dataset(dataset: PreparedDataset) -> Rows:
    """Of a prepared dataset, by its manifest."""
    of_epoch = dataset.manifest["train"]
    many, tokens = max(1, of_epoch["packed_rows"]), max(1, of_epoch["tokens"])
    supervised = of_epoch["supervised_tokens"]
    said = f"{dataset.directory}: {many:,} rows of {dataset.seq_len:,}, {supervised:,} of {tokens:,} tokens supervised"
    return Rows(
        length=dataset.seq_len,
        tokens=tokens / many,
        supervised=supervised / tokens,
        conversation=tokens / max(1, of_epoch["conversations"]),
        of_epoch=many,
        said=said,
    )
