"""What preparing data can be told."""

from dataclasses import dataclass, field

from configs.errors import UserError
from data.template import EMBEDDED

AUTO = "auto"
"""The schema is found by looking at the rows."""
SCHEMAS = ("instruction", "sharegpt", "messages")
OVERLONG = ("drop", "truncate", "split_turns")


@dataclass(kw_only=True, slots=True)
class PrepareConfig:
    """Settings of `python -m data`. One docstring per field."""

    files: list[str] = field(default_factory=list)
    """Local files of rows: a JSON array, JSON Lines or Parquet, each also as .gz or .zst; patterns such as
    `rows/*.jsonl` stand for the files that match, in the order of their names. Relative paths start at the working
    directory."""
    schema: str = AUTO
    """`instruction` (instruction, input, output), `sharegpt` (conversations: from, value), `messages` (messages: role,
    content), or `auto`: the one whose field the first rows of a source have."""
    columns: dict[str, str] = field(default_factory=dict)
    """Where a field of the schema has another name in the rows: `columns={output: answer}`."""
    dataset: str | None = None
    """A hub dataset id, read with the library `datasets`; used where `files` is empty."""
    revision: str | None = None
    """The commit, tag or branch of `dataset`. A commit makes the run reproducible."""
    split: str = "train"
    """The split of `dataset`."""
    output: str = "prepared/dataset"
    """The directory of the prepared dataset. An older prepared dataset there is replaced when the new one is whole."""
    tokenizer: str = EMBEDDED
    """A model directory, a hub id, or `embedded`: the Mixtral vocabulary that ships with mistral-common."""
    seq_len: int = 2048
    """Tokens of a packed row."""
    overlong: str = "drop"
    """What to do with a conversation that is longer than a row: `drop` rejects it; `truncate` drops its last turns and
    cuts the end of the last reply that is left; `split_turns` makes several conversations of its turns."""
    eval_fraction: float = 0.02
    """Share of the conversations held out for evaluation, at least one where it is above 0."""
    seed: int = 0
    """Decides which conversations are held out, and the order in which they are packed."""
    markers: str = "reject"
    """What to do with a row whose text holds the template's own markers, such as `[INST]`: `reject` or `keep`."""
    max_reject_fraction: float = 0.1
    """Rejecting more than this share of the rows stops the run."""

    def check(self) -> None:
        """Raises `UserError` for values that can't be used, alone or together."""
        if not self.files and not self.dataset:
            raise UserError("files: nothing to prepare; name files, as in files=[rows.jsonl], or a dataset on the hub")
        if self.files and self.dataset:
            raise UserError(f"dataset={self.dataset}: files are named too; keep one of the two")
        if self.schema not in (AUTO, *SCHEMAS):
            choices = ", ".join((AUTO, *SCHEMAS))
            raise UserError(f"schema={self.schema}: there is no such schema; choose one of {choices}")
        if self.seq_len < 16:
            raise UserError(f"seq_len={self.seq_len}: a row needs at least 16 tokens; give for example seq_len=2048")
        if self.overlong not in OVERLONG:
            raise UserError(f"overlong={self.overlong}: there is no such policy; choose one of {', '.join(OVERLONG)}")
        if not 0 <= self.eval_fraction < 1:
            raise UserError(f"eval_fraction={self.eval_fraction}: it is a share; give a number from 0 to below 1")
        if not 0 <= self.max_reject_fraction <= 1:
            raise UserError(f"max_reject_fraction={self.max_reject_fraction}: it is a share; give a number from 0 to 1")
        if self.markers not in ("reject", "keep"):
            raise UserError(f"markers={self.markers}: there is no such policy; choose reject or keep")
