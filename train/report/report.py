"""`task=report`, and the page that every run writes beside its metrics."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from markupsafe import Markup

from configs.program.console import console
from configs.program.errors import UserError, one_line
from configs.program.page.charts import Line, Mark, heatmap, intervals, line_chart, short, timeline
from configs.program.page.page import render
from data.config import PrepareConfig
from data.disk.adapter_directory import EVALUATION, SCORES
from data.disk.files import replace_file
from data.disk.formats import sizes
from data.disk.formats.json_text import shaped
from data.disk.formats.regular import UnreadableError
from data.disk.plain_text import json_if_readable
from data.prepared.layout import MANIFEST, SPLITS, open_split
from data.prepared.report import example
from data.prepared.selection import selected
from data.stages.leaderboard import ENOUGH, HUB_TASKS
from data.template import ChatTokenizer
from train.config.train import TrainConfig
from train.report.answers import ask
from train.report.recorded import Recorded, changed_settings, number, part, read_run
from train.report.shapes import Answer, Dataset, Evaluation, Planned
from train.run_files import ANSWERS, CONFIG, REPORT

MOST_COLUMNS = 24
"""Steps of a heatmap."""

EXAMPLES = 3
"""Rows of the dataset that are shown."""


def report(config: TrainConfig) -> None:
    """Writes the report of the run in `run_dir`, its answers included.

    Raises:
        UserError: there is no run, or nothing can be asked.
    """
    run = read_run(Path(str(config.run_dir)))
    if config.answers:
        ask(run, config.prompts, new_tokens=config.answer_tokens)
    path = write_report(run.directory, lambda line: console.print(line, soft_wrap=True, markup=False))
    console.print(f"Wrote {path}", soft_wrap=True)


def write_report(
    directory: Path, tell: Callable[[str], None] = lambda line: None, *, with_examples: bool = True
) -> Path:
    """Writes `report.html` of what the run directory holds now; `with_examples` of the dataset's rows.

    What is damaged is left out, and `tell` is called with a line that says what.

    Raises:
        UserError: there is no run, or the page can't be written.
    """
    run = read_run(directory)
    page = render(Path(__file__).with_name("report.html.j2"), **content(run, with_examples=with_examples))
    if run.damaged:
        tell(f"Left out: {'; '.join(run.damaged)}")
    try:
        replace_file(directory / REPORT, [page.encode("utf-8", "replace")])
    except OSError as error:
        raise UserError(
            f"run_dir={directory}: its {REPORT} can't be written ({error.strerror}); make room for it"
        ) from error
    return directory / REPORT


def try_report(directory: Path, *, with_examples: bool = True) -> None:
    """The same while a run is on: what can't be reported costs a line and nothing else."""
    if not (directory / CONFIG).is_file():  # nothing of the run was written yet
        return
    try:
        write_report(directory, with_examples=with_examples)
    except Exception as error:  # of any kind: the run is worth more than its report
        if not isinstance(error.__cause__, OSError):  # a full disk is reported by metrics.jsonl's own line
            console.print(f"{REPORT} can't be written ({one_line(error)}); training goes on", soft_wrap=True)


def content(run: Recorded, *, with_examples: bool) -> dict[str, Any]:
    """The values of the page; `run.damaged` gets what could not be among them."""
    parts: dict[str, Any] = {
        name: _made(run, name, make, otherwise)
        for name, make, otherwise in (
            ("tiles", tiles, []),
            ("charts", charts, []),
            ("heatmaps", heatmaps, []),
            ("timeline", when, Markup("")),
            ("evaluation", scored, None),
            ("plan", planned, None),
        )
    }
    receipt = {k: v for k, v in run.receipt.items() if k != "experts_moved"}
    return {
        "name": run.directory.name,
        "run": run,
        **parts,
        "changed": changed_settings(run.settings),
        "dataset": dataset(run, with_examples=with_examples),
        "answers": part(run.directory / ANSWERS, list[Answer], run.damaged) or [],
        "receipt": json.dumps(receipt, indent=1, ensure_ascii=False),
    }


def _made(run: Recorded, name: str, make: Callable[[Recorded], Any], otherwise: Any) -> Any:
    """A part of the page; `otherwise` if the numbers that it is made of can't be a run's."""
    try:
        return make(run)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        run.damaged.append(f"{name} can't be shown ({one_line(error)})")
        return otherwise


def planned(run: Recorded) -> dict[str, Planned] | None:
    """What the receipt says of the plan."""
    plan: dict[str, Planned] | None = shaped(run.receipt.get("plan"), dict[str, Planned] | None)  # type: ignore[arg-type]
    return plan


def tiles(run: Recorded) -> list[tuple[str, str]]:
    """The run in a few numbers."""
    losses, evaluations = run.series("loss"), run.series("evaluation_loss")
    speeds = sorted(value for _, value in run.series("tokens_per_second"))
    tokens = sum(value for _, value in run.series("tokens"))
    memory = max((value for _, value in run.series("memory_gib")), default=math.nan)
    found = [("steps", f"{run.steps:,}")]
    if losses:
        found.append(("loss of the last step", f"{losses[-1][1]:.4f}"))
    if evaluations:
        found.append(("evaluation loss", f"{evaluations[0][1]:.4f} → {evaluations[-1][1]:.4f}"))
    if speeds:
        found.append(("tokens/s, median", f"{speeds[len(speeds) // 2]:,.0f}"))
        found.append(("tokens", f"{tokens:,.0f}" if tokens < 1e7 else short(tokens)))
    if math.isfinite(memory):
        found.append(("peak memory of process 0", f"{memory:.2f} GiB"))
    return found


def charts(run: Recorded) -> list[tuple[str, str, Markup, list[str]]]:
    """Title, unit, picture and names of the lines of each chart."""
    skipped = [
        Mark(line["step"], f"step {line['step']}: the update was skipped")
        for line in run.lines
        if line.get("applied") is False
    ]
    spikes = [Mark(line["step"], f"step {line['step']}: {line['wrong']}") for line in run.lines if line.get("wrong")]
    evaluations = run.series("evaluation_loss")
    found = []
    for title, unit, names, marks in (
        ("Loss", "nats per supervised token", ("loss",), spikes),
        ("Learning rate", "", ("learning_rate",), []),
        ("Gradient norm", "before clipping; skipped updates are marked", ("gradient_norm",), skipped),
        ("Speed", "tokens a second", ("tokens_per_second",), []),
        ("Memory", "GiB, peak of process 0 so far", ("memory_gib",), []),
        ("Routers' balance", "load-balancing loss before its weight", ("load_balancing_loss",), []),
    ):
        lines = [Line(name.replace("_", " "), run.series(name)) for name in names]
        if title == "Loss" and evaluations:
            lines.append(Line("evaluation loss", evaluations))
        picture = line_chart(lines, marks=marks, label=f"{title} over the steps of the run")
        found.append((title, unit, picture, [line.name for line in lines] if len(lines) > 1 else []))
    return found


def heatmaps(run: Recorded) -> list[tuple[str, str, Markup, list[str]]]:
    """Title, remark, picture and names of lines of what experts got and learned."""
    found: list[tuple[str, str, Markup, list[str]]] = []
    routed = run.routed()
    if routed is not None:
        load = [[number(share) for share in layer] for layer in routed["expert_load"]]
        names = [f"layer {layer}" for layer in range(len(load))]
        remark = f"share of the layer's choices in step {routed['step']:,}; even would be {1 / len(load[0]):.3g}"
        picture = heatmap(load, names=names, label="Load of each expert", digits=2)
        found.append(("Load of the experts", remark, picture, []))
        found += _entropy(run, names, even=math.log(len(load[0])))
    moved = run.receipt.get("experts_moved") or []
    for projection in dict.fromkeys(entry["projection"] for entry in moved):
        rows = [entry for entry in moved if entry["projection"] == projection]
        numbers = [
            [number(norm) if rank else None for norm, rank in zip(row["norms"], row["ranks"], strict=True)]
            for row in rows
        ]
        names = [f"layer {row['layer']}" for row in rows]
        label = f"How far each expert's adapter on {projection} has moved"
        picture = heatmap(numbers, names=names, label=label)
        found.append((f"Movement of {projection}", "‖s(BA − B₀A₀)‖ of each expert", picture, []))
    return found


def _entropy(run: Recorded, names: list[str], *, even: float) -> list[tuple[str, str, Markup, list[str]]]:
    """The routers' entropy over the steps: every layer in colours, and three of them as lines."""
    steps = [line for line in run.lines if "router_entropy" in line]
    shown = [steps[round(index)] for index in _spread(len(steps), MOST_COLUMNS)]
    rows = [[number(line["router_entropy"][layer]) for line in shown] for layer in range(len(names))]
    finite = [[value if math.isfinite(value) else None for value in row] for row in rows]
    picture = heatmap(
        finite,
        names=names,
        label="Entropy of each layer's router over the steps",
        columns=("step", [line["step"] for line in shown]),
        highest=even,
    )
    remark = f"nats, step by step; full colour is {even:.3g}, all experts alike, and none is 0, one expert alone"
    lines = [
        Line(names[layer], [(line["step"], number(line["router_entropy"][layer])) for line in steps])
        for layer in sorted({0, len(names) // 2, len(names) - 1})
    ]
    return [
        ("Entropy of the routers", remark, picture, []),
        (
            "Entropy of single layers",
            "nats; of the first, a middle and the last layer",
            line_chart(lines, label="Entropy of the routers over the steps"),
            [line.name for line in lines],
        ),
    ]


def _spread(count: int, most: int) -> list[float]:
    """At most that many of the positions of a list, evenly apart, first and last among them."""
    chosen = min(count, most)
    return [index * (count - 1) / max(1, chosen - 1) for index in range(chosen)]


def when(run: Recorded) -> Markup:
    """Checkpoints and interruptions."""
    saved = [
        Mark(line["step"], f"step {line['step']:,}: checkpoint, on the disk after {line['checkpoint_seconds']:.2g} s")
        for line in run.lines
        if "checkpoint_seconds" in line
    ]
    resumed = [
        Mark(
            launch.get("resumed_after_step") or 0,
            f"went on after step {launch['resumed_after_step']:,} "
            f"at {launch.get('started')}, on {launch.get('processes')} processes",
        )
        for launch in run.launches
        if launch.get("resumed_after_step")
    ]
    return timeline(run.steps, saved, resumed, label="Checkpoints and interruptions over the steps of the run")


def dataset(run: Recorded, *, with_examples: bool) -> dict[str, Any]:
    """The dataset's counts, and a few of its rows, if it is still the one of the run."""
    named = run.receipt.get("dataset") or {}
    path = Path(str(run.settings.get("dataset")))
    manifest = json_if_readable(path / MANIFEST, sizes.MANIFEST, sha256=named.get("manifest_sha256"))
    try:
        shaped(manifest or None, Dataset | None)  # type: ignore[arg-type]
    except UnreadableError as error:
        run.damaged.append(f"{path / MANIFEST} is not as it was written ({error})")
        manifest = {}
    found: dict[str, Any] = {"path": str(path), "manifest": manifest, "examples": []}
    if manifest and with_examples:
        try:
            tokenizer = ChatTokenizer.load(PrepareConfig().tokenizer)
            tables = {split: open_split(path, split) for split in SPLITS}
            rows = selected(path, manifest, tables, PrepareConfig(rows=EXAMPLES), spread=True)
            found["examples"] = [example(row, tokenizer) for row in rows]
        except (UserError, OSError, ValueError):
            found["examples"] = []
    return found


def scored(run: Recorded) -> dict[str, Any] | None:
    """The evaluation beside the adapter, in percent, with the intervals of base and tuned model."""
    evaluation = part(run.directory / EVALUATION / SCORES, Evaluation, run.damaged)
    if evaluation is None or not (evaluation["tasks"] or evaluation.get("others")):
        return None
    before = evaluation.get("before") or {}
    tuned, base = _by_title(evaluation), _by_title(before)
    compared = evaluation.get("comparison") or {"tasks": {}}
    pairs = _by_title(compared)
    if compared.get("average") is not None:
        pairs["average"] = {"difference": compared["average"]}
    rows = [
        (title, [(who, *_percent(of[title])) for who, of in (("tuned", tuned), ("base", base)) if title in of])
        for title in tuned
    ]
    published = [row for row in evaluation.get("published") or [] if _title(row["task"]) in tuned]
    questions = {title: scores["questions"] for title, scores in tuned.items() if "questions" in scores}
    return {
        "rows": rows,
        "comparison": pairs,
        "picture": intervals(rows, low=0, high=100, label="Scores with two standard errors"),
        "has_base": bool(base),
        "questions": questions,
        "few": [title for title, asked in questions.items() if asked < ENOUGH],
        "enough": ENOUGH,
        "published": [(title := _title(row["task"]), tuned[title], row) for row in published],
        "sources": list(dict.fromkeys((row["whose"], row["source"]) for row in published)),
        "others": evaluation.get("others") or {},
        "others_before": before.get("others") or {},
    }


def _by_title(results: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The tasks by what the card calls them, and their average if all are there."""
    found = {_title(name): each for name, each in results.get("tasks", {}).items()}
    average = results.get("average")
    return found if average is None else found | {"average": average}


def _title(name: str) -> str:
    return HUB_TASKS[name].title if name in HUB_TASKS else name


def _percent(scores: dict[str, Any]) -> tuple[float, float]:
    return 100 * scores["score"], 100 * scores["standard_error"]
