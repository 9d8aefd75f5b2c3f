"""The result of an evaluation on the screen: the card's table with ours beside it, and what changed."""

import math
import sys
from typing import Any

from rich.console import Console
from rich.table import Table

from data.stages.leaderboard import ENOUGH
from inference.evaluation.leaderboard.tasks import TASKS
from inference.evaluation.results import said_of_prompts


def show(result: dict[str, Any]) -> None:
    """Prints the tables to stdout."""
    console = Console(file=sys.stdout, markup=False, highlight=False, emoji=False)
    if result["tasks"]:
        console.print(beside_what_was_published(result))
        console.print(prompts_beside_the_leaderboards(result))
    for line in remarks(result):
        console.print(line, soft_wrap=True)
    if result["comparison"] is not None and result["comparison"]["tasks"]:
        console.print(before_and_after(result))
    if result["others"]:
        console.print(others(result))
    if any("clean" in scores for scores in result["tasks"].values()):
        console.print(without_trained_on(result))


def beside_what_was_published(result: dict[str, Any]) -> Table:
    """Ours and what was published, in percent: the card's scores, then others with the number of their source."""
    table = _table("", "task", "questions", "score", "published", "difference")
    sources = sources_of(result)
    for row in result["published"]:
        name, source = row["task"], sources.index((row["whose"], row["source"]))
        scores = result["average"] if name == "average" else result["tasks"][name]
        asked = result["prompts"].get(name)
        table.add_row(
            _title(name) + (f" [{source}]" if source else ""),
            "" if asked is None or source else _count(scores["questions"], asked["documents"]),
            percent(scores),
            _percent(row["score"], row["standard_error"]),
            in_errors(scores, row),
        )
    return table


def sources_of(result: dict[str, Any]) -> list[tuple[str, str]]:
    """Whose the published scores are, and where they stand; the card's come first."""
    return list(dict.fromkeys((row["whose"], row["source"]) for row in result["published"]))


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
        lines.append(f"Fewer than {ENOUGH} questions of {', '.join(few)}: too few to be compared with the card.")
    for number, (whose, source) in enumerate(sources_of(result)):
        lines.append(f"{f'[{number}]' if number else 'Published:'} {whose} ({source}).")
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
    """The metrics of lm-eval's tasks, as it gives them: not all are shares."""
    before = (result["before"] or {}).get("others", {})
    table = _table("Of lm-eval", "task", "metric", "questions", *(["before"] if before else []), "score")
    for name, of_task in result["others"].items():
        questions = "" if of_task["questions"] is None else f"{of_task['questions']:,}"
        for metric, value in of_task["metrics"].items():
            earlier = [_measured(before[name]["metrics"][metric])] if before else []
            table.add_row(name, metric, questions, *earlier, _measured(value))
    return table


def _measured(metric: dict[str, float | None]) -> str:
    value, error = metric["value"], metric["standard_error"]
    if value is None:  # no number in JSON
        return "–"
    return f"{value:.4f}" if error is None or math.isnan(error) else f"{value:.4f} ± {error:.4f}"


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
    return _percent(scores["score"], scores["standard_error"])


def _percent(score: float, error: float | None) -> str:
    return f"{100 * score:.2f}" if error is None else f"{100 * score:.2f} ± {100 * error:.2f}"


def in_errors(scores: dict[str, Any], published: dict[str, Any]) -> str:
    """The difference to a published score, in standard errors of the difference if both are known and ours isn't 0, as
    of a few questions that were all answered alike."""
    difference = 100 * (scores["score"] - published["score"])
    error = 100 * math.hypot(scores["standard_error"], published["standard_error"] or 0.0)
    if published["standard_error"] is None or not scores["standard_error"] > 0:
        return f"{difference:+.2f}"
    return f"{difference:+.2f} ({difference / error:+.1f} SE)"


def _title(name: str) -> str:
    return "average" if name == "average" else TASKS[name].title


def _signed(estimate: dict[str, float]) -> str:
    return f"{100 * estimate['value']:+.2f} ± {100 * estimate['error']:.2f}"


def _count(some: int, all_: int) -> str:
    return f"{some:,}" if some == all_ else f"{some:,} of {all_:,}"


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title or None, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for index, name in enumerate(columns):
        table.add_column(name, justify="left" if index == 0 or name in ("hash", "") else "right", overflow="fold")
    return table
