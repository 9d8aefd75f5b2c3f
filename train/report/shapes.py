"""What the report relies on in files that others wrote: an evaluation, answers, a plan, a dataset's manifest."""

from typing import Annotated, NotRequired, TypedDict

from msgspec import Meta

from train.run_files import Count

Share = Annotated[float, Meta(ge=0, le=1)]


class Score(TypedDict):
    """The score of a task, or the average."""

    score: Share
    standard_error: Share
    questions: NotRequired[Count]


class Difference(TypedDict):
    """The difference of two shares, with its standard error."""

    value: Annotated[float, Meta(ge=-1, le=1)]
    error: Share


class Pair(TypedDict):
    """A task's answers before and after, compared question by question."""

    difference: Difference
    won: Count
    lost: Count
    p_holm: Share


class Metric(TypedDict):
    """A metric of one of lm-eval's tasks; None for what is not a number."""

    value: float | None
    standard_error: float | None


class Other(TypedDict):
    """One of lm-eval's tasks."""

    shots: Count | None
    questions: Count | None
    metrics: dict[str, Metric]


class Published(TypedDict):
    """A score that stands beside ours."""

    task: str
    score: Share
    standard_error: Share | None
    whose: str
    source: str


class Before(TypedDict):
    """The scores of the base."""

    tasks: dict[str, Score]
    average: NotRequired[Score | None]
    others: NotRequired[dict[str, Other]]


class Comparison(TypedDict):
    """The comparison of both models, by task."""

    tasks: dict[str, Pair]
    average: NotRequired[Difference | None]


class Evaluation(TypedDict):
    """`evaluation/results.json`."""

    tasks: dict[str, Score]
    average: NotRequired[Score | None]
    before: NotRequired[Before | None]
    comparison: NotRequired[Comparison | None]
    published: NotRequired[list[Published]]
    others: NotRequired[dict[str, Other]]


class Answer(TypedDict):
    """What was asked, and what both models answered."""

    prompt: str
    base: NotRequired[str | None]
    tuned: NotRequired[str | None]


class Planned(TypedDict):
    """A quantity as it was planned, and as it came."""

    planned: float | str | None
    measured: float | str | None


Rows = TypedDict("Rows", {"in": Count, "kept": Count})


class Split(TypedDict):
    """What is trained on."""

    packed_rows: Count
    tokens: Count
    supervised_tokens: Count


class Dataset(TypedDict):
    """A manifest, of any layout."""

    rows: Rows
    train: Split
    seq_len: Count
