"""The settings of `python -m data`, and their checks."""

import math
from dataclasses import dataclass, field
from typing import get_args

from configs.program.checks import ABOVE_0, BELOW_1, between, choice, share
from configs.program.errors import UserError
from data.schema import REPAIRS, ROW_FIELDS, Role, fields_of
from data.vocabulary import EMBEDDED

AUTO = "auto"
"""The schema is found by looking at the rows."""
SHAPELESS = ("task", "output", "workers", "rows", "conversations", "where", "train_rows")
"""Settings that do not change what a prepared dataset holds."""


@dataclass(kw_only=True, slots=True)
class PrepareConfig:
    """Settings of `python -m data`. One docstring per field."""

    task: str = "prepare"
    """`prepare` makes the prepared dataset; `preview` prints some of its rows as the model sees them; `report` writes a
    page about it beside it. The last two need nothing but `output`."""
    files: list[str] = field(default_factory=list)
    """Local files of rows: JSON (lines, an array, or objects in a row), Parquet, Arrow, CSV or TSV, also compressed by
    gzip, zstd, bz2 or xz; what is in a file says which it is. Patterns such as `rows/*.jsonl` stand for the files that
    match, in the order of their names. Relative paths start at the working directory."""
    schema: str = AUTO
    """`instruction` (instruction, input, output), `sharegpt` (conversations: from, value), `messages` (messages: role,
    content), or `auto`: the one that the first rows of a source fit, also by other usual names such as prompt and
    completion. The summary says what was found."""
    limits: dict[str, int] = field(default_factory=dict)
    """Rows to read of a source, from its beginning: `limits={rows.jsonl: 1000}`. A source is named as in `files` or
    `dataset`; a pattern's limit holds for each of its files, unless the file is named too."""
    weights: dict[str, float] = field(default_factory=dict)
    """How often an epoch trains on each conversation of a source: 2 is twice, 0.5 a seeded half of them. Named as in
    `limits`. What is held out is held out once."""
    columns: dict[str, str] = field(default_factory=dict)
    """Names that fields of the schema have in the rows, if they differ: `columns={output: answer}`, for fields of a row
    and of a turn. What is read as one field is not read as another too."""
    roles: dict[str, str] = field(default_factory=dict)
    """The roles of speakers who don't have a usual name: `roles={customer: user, agent: assistant}`. Known are system,
    user and assistant, and usual names such as human, gpt, chatgpt and model, in capitals or not."""
    repair: list[str] = field(default_factory=list)
    """What may be done to turns that are out of order; by default such rows are rejected. `drop_last_user` drops what
    the user says after the last reply, `drop_leading_assistant` a greeting before the first question, and
    `merge_same_role` joins messages of one role in a row by a blank line. The manifest counts the rows by repair."""
    dataset: str | None = None
    """A dataset of a hub, such as `teknium/openhermes`, or a directory that is laid out as one, if `files` is empty.
    Parquet, Arrow, JSON, JSON Lines, CSV and TSV are read."""
    dataset_config: str | None = None
    """The config of `dataset`, if it has several."""
    revision: str | None = None
    """The commit, tag or branch of `dataset` on a hub. The manifest names the commit that was read."""
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
    packing: bool = True
    """Several conversations in a row, by best fit. With `false` each has a row of its own, and training batches rows of
    like length and pads them to the longest."""
    eval_fraction: float = 0.02
    """Share of the rows held out for evaluation, at least one if it is above 0."""
    seed: int = 0
    """Decides which conversations are held out, and the order in which they are packed."""
    markers: str = "reject"
    """What to do with a row whose text holds the template's own markers, such as `[INST]`: `reject` or `keep`."""
    unread: str = "tell"
    """What to do with fields that no schema reads, such as `tools`: `tell` names them and counts the rows that have
    them, `reject` rejects these rows. Fields that only describe a row, such as `id` and `source`, don't count."""
    max_reject_fraction: float = 0.1
    """Rejecting more than this share of the rows as unusable stops the run."""
    duplicates: str = "keep"
    """What to do with a conversation that was there before: `keep`, `drop` if it is exactly the same, or `drop_near`,
    which also drops what is nearly the same."""
    near_threshold: float = 0.8
    """Conversations are nearly the same if their five-word sequences have this estimated Jaccard similarity or more."""
    contamination: list[str] = field(default_factory=list)
    """Evaluation data to keep out of training: a row that shares thirteen words in a row with it is rejected, or as
    much in scripts without spaces. Files as `files` takes them, any JSON, or text; or tasks of the Open LLM
    Leaderboard: arc, hellaswag, mmlu, truthfulqa, winogrande, gsm8k."""
    workers: int = 0
    """Processes that encode, the first one included; 0 means one a core, fewer if there is little to do. What is
    written is the same."""
    rows: int = 3
    """Rows that `task=preview` prints, the first ones, and `task=report` shows, from all over the training split."""
    conversations: int = 0
    """Shows this many conversations instead of whole rows; 0 for whole rows."""
    where: str | None = None
    """The row to show, by file and by line or item, as rejects.jsonl counts them: `where=rows.jsonl:17`."""
    train_rows: list[int] = field(default_factory=list)
    """The rows of the training split to show, by the numbers that a training run gives: `train_rows=[3,17]`."""

    def check(self) -> None:
        """Raises `UserError` for values that can't be used, alone or together."""
        choice("task", self.task, "prepare", "preview", "report")
        choice("schema", self.schema, AUTO, *ROW_FIELDS)
        choice("overlong", self.overlong, "drop", "truncate", "split_turns")
        choice("markers", self.markers, "reject", "keep")
        choice("unread", self.unread, "tell", "reject")
        for repair in self.repair:
            choice("repair", repair, *REPAIRS)
        for speaker, role in self.roles.items():
            choice(f"roles.{speaker}", role, *get_args(Role))
        choice("duplicates", self.duplicates, "keep", "drop", "drop_near")
        wanted = "a row needs at least 16 tokens, at most a million; give for example seq_len=2048"
        between("seq_len", self.seq_len, 16, 2**20, wanted)
        between("eval_fraction", self.eval_fraction, 0, BELOW_1, "it is a share; give a number from 0 to below 1")
        share("max_reject_fraction", self.max_reject_fraction)
        wanted = "it is a similarity; give a number above 0, at most 1"
        between("near_threshold", self.near_threshold, ABOVE_0, 1, wanted)
        between("workers", self.workers, 0, 1024, "it is a number of processes; give 1 or more, or 0 for one a core")
        between("conversations", self.conversations, 0, math.inf, "it can't be negative; give 0 for whole rows")
        if self.where is not None and self.train_rows:
            raise UserError(f"where={self.where}: train_rows are named too; keep one of the two")
        between("rows", self.rows, 1, math.inf, "there is nothing to show; give at least 1")
        if self.task != "prepare":
            return
        if not self.files and not self.dataset:
            raise UserError(
                "files: nothing to prepare; name files, as in 'files=[rows.jsonl]', or a dataset on the hub"
            )
        if self.files and self.dataset:
            raise UserError(f"dataset={self.dataset}: files are named too; keep one of the two")
        schemas = tuple(ROW_FIELDS) if self.schema == AUTO else (self.schema,)
        known = dict.fromkeys(field for schema in schemas for field in fields_of(schema))
        for name in self.columns:
            if name not in known:
                who = "no schema has" if self.schema == AUTO else f"schema={self.schema} does not have"
                raise UserError(f"columns.{name}: {who} such a field; it is one of {', '.join(known)}")
        self._check_shares()

    def _check_shares(self) -> None:
        for setting, of_source in (("limits", self.limits), ("weights", self.weights)):
            for name, value in of_source.items():
                least, most = (1, math.inf) if setting == "limits" else (0, 1000)
                if not least <= value <= most:
                    raise UserError(f"{setting}.{name}={value}: it is out of bounds; give a number from {least} up")
