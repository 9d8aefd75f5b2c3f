"""Means, errors and tests in pairs, against definitions and figures from elsewhere."""

import math
import random

import numpy as np
import pytest
from scipy import stats

from inference.evaluation.leaderboard.tasks import PUBLISHED, TASKS
from inference.evaluation.statistics import Estimate, average, estimate, holm, paired


def test_the_cards_own_errors_follow_from_its_scores() -> None:
    """ARC, Winogrande, GSM8K, HellaSwag: shares of right answers. TruthfulQA's and MMLU's are of other questions."""
    for name in ("arc", "winogrande", "gsm8k", "hellaswag"):
        task = TASKS[name]
        right = round(task.card / 100 * task.rows)
        found = estimate({name: [1.0] * right + [0.0] * (task.rows - right)})
        assert 100 * found.value == pytest.approx(task.card, abs=0.005)
        assert 100 * found.error == pytest.approx(task.card_error, abs=0.006)
    whole = average([Estimate(task.card, task.card_error) for task in TASKS.values()])
    published = next(row for row in PUBLISHED if row.task == "average")
    assert whole.value == pytest.approx(published.score, abs=0.005)
    assert whole.error == pytest.approx(published.error, abs=0.006)


def test_groups_count_the_same_whatever_their_size() -> None:
    found = estimate({"a": [1.0, 0.0], "b": [1.0] * 98 + [0.0] * 2})
    assert found.value == pytest.approx((0.5 + 0.98) / 2)
    errors = [0.5, np.std([1.0] * 98 + [0.0] * 2, ddof=1) / 10]
    assert found.error == pytest.approx(math.hypot(*errors) / 2)
    assert estimate({"a": [1.0], "b": [0.0, 1.0]}).error == pytest.approx(
        math.sqrt(np.var([1, 0, 1], ddof=1) * (1 + 1 / 2)) / 2
    )
    assert math.isnan(estimate({"a": [1.0]}).error)


def test_a_group_of_one_is_no_nuisance_to_a_simulation() -> None:
    """The error of a mean over subjects is what repeated draws show."""
    draw = random.Random(0)
    shares = [draw.random() for _ in range(20)]
    sizes = [draw.randrange(20, 60) for _ in range(20)]

    def sample() -> Estimate:
        groups = zip(shares, sizes, strict=True)
        return estimate({str(i): [float(draw.random() < p) for _ in range(n)] for i, (p, n) in enumerate(groups)})

    samples = [sample() for _ in range(400)]
    spread = np.std([each.value for each in samples])
    assert np.mean([each.error for each in samples]) == pytest.approx(spread, rel=0.12)


@pytest.mark.parametrize(("won", "lost", "p"), [(10, 2, 0.03857), (1, 0, 1.0), (0, 0, 1.0), (20, 20, 1.0)])
def test_mcnemar_is_exact(won: int, lost: int, p: float) -> None:
    before = [0.0] * won + [1.0] * lost + [1.0, 0.0]
    after = [1.0] * won + [0.0] * lost + [1.0, 0.0]
    found = paired({"t": before}, {"t": after})
    assert (found.won, found.lost) == (won, lost)
    both = sum(math.comb(won + lost, k) for k in range(min(won, lost) + 1)) / 2 ** (won + lost) * 2
    assert found.p == pytest.approx(min(1.0, both), abs=1e-9)
    assert found.p == pytest.approx(p, abs=1e-4)
    assert found.difference.value == pytest.approx((won - lost) / (won + lost + 2))


def test_scores_between_are_compared_by_a_paired_t() -> None:
    draw = random.Random(1)
    before = [draw.random() for _ in range(50)]
    after = [value + draw.gauss(0.05, 0.1) for value in before]
    found = paired({"t": before}, {"t": after})
    assert found.p == pytest.approx(stats.ttest_rel(after, before).pvalue)
    assert found.difference.error == pytest.approx(stats.sem(np.subtract(after, before)))
    assert found.difference.error < math.hypot(stats.sem(before), stats.sem(after)) / 2


def test_equal_answers_differ_by_nothing() -> None:
    found = paired({"t": [0.25, 0.5, 0.75]}, {"t": [0.25, 0.5, 0.75]})
    assert (found.difference, found.won, found.lost, found.p) == (Estimate(0.0, 0.0), 0, 0, 1.0)


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []
