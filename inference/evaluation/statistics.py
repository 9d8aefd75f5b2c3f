"""Scores of questions → a task's score with its standard error, and two models' scores compared in pairs.

MMLU is a mean over subjects, each counting the same; the other tasks have one group. Shares, not percent.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, variance

Groups = Mapping[str, Sequence[float]]
"""The scores of a task's questions, by subject."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean and its standard error."""

    value: float
    error: float
    """NaN of a single question."""


def estimate(groups: Groups) -> Estimate:
    """The mean over groups of their means; the error is that of a stratified sample.

    A group of one question has no variance of its own; then all groups take that of all questions together.
    """
    means = [fmean(scores) for scores in groups.values()]
    together = [score for scores in groups.values() for score in scores]
    alone = any(len(scores) < 2 for scores in groups.values())
    pooled = variance(together) if len(together) > 1 else math.nan
    parts = [(pooled if alone else variance(scores)) / len(scores) for scores in groups.values()]
    return Estimate(fmean(means), math.sqrt(sum(parts)) / len(parts))


def average(estimates: Sequence[Estimate]) -> Estimate:
    """The mean of independent estimates."""
    return Estimate(
        fmean(each.value for each in estimates), math.sqrt(sum(each.error**2 for each in estimates)) / len(estimates)
    )


@dataclass(frozen=True, slots=True)
class Paired:
    """Two models on the same questions."""

    difference: Estimate
    """After minus before. Its error is of the differences of the single questions, which is much smaller than that of
    two samples."""
    won: int
    """Questions whose score went up."""
    lost: int
    """Questions whose score went down."""
    p: float
    """Two-sided: McNemar's exact test of right and wrong answers; the paired t-test of scores between."""


def paired(before: Groups, after: Groups) -> Paired:
    """Compares the scores of the same questions in the same order."""
    from scipy import stats

    differences = {group: [new - old for old, new in zip(before[group], after[group], strict=True)] for group in before}
    together = [difference for group in differences.values() for difference in group]
    won = sum(difference > 0 for difference in together)
    lost = sum(difference < 0 for difference in together)
    if won + lost == 0:
        p = 1.0
    elif all(difference in (-1.0, 0.0, 1.0) for difference in together):
        p = float(stats.binomtest(won, won + lost).pvalue)
    elif len(set(together)) == 1:  # the test would divide by a variance of 0
        p = 0.0 if len(together) > 1 else math.nan
    else:
        p = float(stats.ttest_1samp(together, 0.0).pvalue)
    return Paired(estimate(differences), won, lost, p)


def holm(values: Sequence[float]) -> list[float]:
    """The p-values as they are when that many are looked at together (Holm 1979), in the same order."""
    adjusted = [0.0] * len(values)
    highest = 0.0
    order = sorted(range(len(values)), key=lambda index: (math.isnan(values[index]), values[index]))
    for rank, index in enumerate(order):
        highest = max(highest, min(1.0, (len(values) - rank) * values[index]))
        adjusted[index] = highest
    return adjusted
