"""The result of an evaluation on the screen: the card's table with ours beside it, and what changed."""

import math
import sys
from typing import Any

from rich.console import Console
from rich.table import Table

from inference.evaluation.leaderboard.tasks import CARD_AVERAGE, CARD_AVERAGE_ERROR, OTHER_ROWS, TASKS
from inference.evaluation.results import said_of_prompts

ENOUGH = 400
"""Questions of a task below which nothing may be said beside the card: its standard error is above 2.4 points."""


def show(result: dict[str, Any]) -> None:
    """Prints the tables to stdout."""
    console = Console(file=sys.stdout, markup=False, highlight=False, emoji=False)
    console.print(beside_the_card(result))
    console.print(prompts_beside_the_leaderboards(result))
    for line in remarks(result):
        console.print(line, soft_wrap=True)
    if result["comparison"] is not None:
        console.print(before_and_after(result))
    if result["others"]:
        console.print(others(result))
    if any("clean" in scores for scores in result["tasks"].values()):
        console.print(without_trained_on(result))


def beside_the_card(result: dict[str, Any]) -> Table:
    """Ours and the card's, task by task, in percent."""
    table = _table("", "task", "questions", "score", "the card", "difference")
    for name, scores in result["tasks"].items():
        task, prompts = TASKS[name], result["prompts"][name]
        table.add_row(
            task.title,
            _count(scores["questions"], prompts["documents"]),
            percent(scores),
            f"{task.card:.2f} ± {task.card_error:.2f}",
            in_errors(scores, task.card, task.card_error),
        )
    if result["average"] is not None:
        table.add_row(
            "average",
            "",
            percent(result["average"]),
            f"{CARD_AVERAGE:.2f} ± {CARD_AVERAGE_ERROR:.2f}",
            in_errors(result["average"], CARD_AVERAGE, CARD_AVERAGE_ERROR),
        )
    return table


def prompts_beside_the_leaderboards(result: dict[str, Any]) -> Table:
    """The hash of each task's prompts, and whether it is the one that the leaderboard published."""
    table = _table("Prompts", "task", "hash", "")
    for name, prompts in result["prompts"].items():
        table.add_row(TASKS[name].title, prompts["hash"], said_of_prompts(prompts))
    return table


def remarks(result: dict[str, Any]) -> list[str]:
    """What belongs beside the table."""
    lines = []
    few = [TASKS[name].title for name, scores in result["tasks"].items() if scores["questions"] < ENOUGH]
    if few:
        lines.append(f"Fewer than {ENOUGH} questions of {', '.join(few)}: nothing may be said beside the card.")
    for whose, published, source in OTHER_ROWS:
        known = [
            f"{'average' if name == 'average' else TASKS[name].title} {value:.2f}"
            for name, value in published.items()
            if name == "average" or name in result["tasks"]
        ]
        if known:
            lines.append(f"Published of {whose}: {', '.join(known)} ({source}).")
    return lines


def before_and_after(result: dict[str, Any]) -> Table:
    """The differences with their paired errors, in points of percent."""
    against = result["compared_with"]
    columns = ("task", "before", "after", "difference", "won", "lost", "p")
    table = _table(f"Against {against}, on the same questions", *columns)
    for name, pair in result["comparison"]["tasks"].items():
        difference, after = pair["difference"], result["tasks"][name]
        table.add_row(
            TASKS[name].title,
            f"{100 * (after['score'] - difference['value']):.2f}",
            f"{100 * after['score']:.2f}",
            _signed(difference),
            str(pair["won"]),
            str(pair["lost"]),
            f"{pair['p']:.3g} (Holm {pair['p_holm']:.3g})",
        )
    if (average := result["comparison"]["average"]) is not None:
        after_average = result["average"]["score"]
        before = f"{100 * (after_average - average['value']):.2f}"
        table.add_row("average", before, f"{100 * after_average:.2f}", _signed(average), "", "", "")
    return table


def others(result: dict[str, Any]) -> Table:
    """The metrics of lm-eval's tasks."""
    before = (result["before"] or {}).get("others", {})
    table = _table("Of lm-eval", "task", "metric", *(["before"] if before else []), "score")
    for name, metrics in result["others"].items():
        for metric, value in metrics.items():
            if isinstance(value, float) and "stderr" not in metric:
                earlier = [f"{before[name][metric]:.4f}"] if before else []
                table.add_row(name, metric.partition(",")[0], *earlier, f"{value:.4f}")
    return table


def without_trained_on(result: dict[str, Any]) -> Table:
    """The scores on the questions that share no thirteen words with the training rows."""
    table = _table("Questions that were trained on, and the others", "task", "trained on", "all", "the others")
    for name, scores in result["tasks"].items():
        clean = scores["clean"]
        others = "none" if clean is None else percent(clean)
        table.add_row(TASKS[name].title, _count(scores["trained_on"], scores["questions"]), percent(scores), others)
    return table


def percent(scores: dict[str, Any]) -> str:
    """A score and its standard error."""
    return f"{100 * scores['score']:.2f} ± {100 * scores['standard_error']:.2f}"


def in_errors(scores: dict[str, Any], card: float, card_error: float) -> str:
    """The difference to the card in standard errors of the difference."""
    error = math.hypot(100 * scores["standard_error"], card_error)
    difference = 100 * scores["score"] - card
    return f"{difference:+.2f}" if not error > 0 else f"{difference:+.2f} ({difference / error:+.1f} SE)"


def _signed(estimate: dict[str, float]) -> str:
    return f"{100 * estimate['value']:+.2f} ± {100 * estimate['error']:.2f}"


def _count(some: int, all_: int) -> str:
    return f"{some:,}" if some == all_ else f"{some:,} of {all_:,}"


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title or None, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for index, name in enumerate(columns):
        table.add_column(name, justify="left" if index == 0 or name in ("hash", "") else "right", overflow="fold")
    return table
