"""The pages of the recipes' plans, in five lines each, and a picture of memory and time by part. Nothing is measured.

Each is planned by `task=plan` on the cluster that it was set for.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RECIPE = "openhermes_mixtral_8x7b"
PLANS = {
    "8 × H100": (f"recipe={RECIPE}", "cluster=h100_8"),
    "2 × 8 × H100": (f"recipe={RECIPE}", "cluster=h100_2x8", "deepspeed.node_copy=true"),
    "one 48 GB": (f"recipe={RECIPE}_one_gpu", "cluster=l40s_1"),
    "8 × 24 GB": (f"recipe={RECIPE}_8x24gb", "cluster=rtx4090_8"),
}
"""What is planned: its name in the picture, and the settings."""
GB = 1e9


def arguments(parser: argparse.ArgumentParser) -> None:
    """What the user may set."""
    parser.add_argument("--picture", type=Path, metavar="PNG", help="draw memory and time by part there")


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Plans, prints, draws."""
    plans = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name, said in PLANS.items():
            written = Path(scratch) / "plan.json"
            settings = [*said, "task=plan", f"plan.json={written}"]
            command = [sys.executable, "-m", "train", *settings]
            environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
            subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL)
            plans[name] = json.loads(written.read_text())
            print("\n".join([" ".join(said), *page(plans[name]), ""]))
    if options.picture:
        draw(plans, options.picture)
    kept = ("rows", "batch", "fits", "memory", "step", "run")
    return {name: {key: plan[key] for key in kept} for name, plan in plans.items()}


def page(plan: dict[str, Any]) -> list[str]:
    """A plan in five lines."""
    memory, step, whole, machine = plan["memory"], plan["step"], plan["run"], plan["machine"]
    fits = "fits" if plan["fits"] else f"does not fit ({plan['refused']})"
    return [
        f"{machine['name']}: it {fits}, {memory['peak'] / GB:.1f} of {machine['memory'] / GB:.1f} GB on each GPU",
        f"peak: {memory['where']}",
        f"{step['seconds']:.3g} s a step, {step['tokens_per_second']:,.0f} tokens/s, bound by {step['bound']}",
        f"{whole['steps']:,} steps, {whole['epoch_hours']:.3g} hours an epoch, {whole['hours']:.3g} hours in all",
        f"${whole['dollars']:,.0f} at ${machine['price']:g} per GPU-hour",
    ]


def draw(plans: dict[str, Any], path: Path) -> None:
    """Two panels of stacked bars, a bar for each plan: GB of a process, and the share of a step's seconds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(12, 5), layout="constrained")
    memory = {name: {part: size / GB for part, size in plan["memory"]["parts"].items()} for name, plan in plans.items()}
    _stack(axes[0], memory, "GB of a GPU at the peak")
    for index, plan in enumerate(plans.values()):
        edges = {"xmin": index - 0.4, "xmax": index + 0.4}
        label = "what the GPU has" if index == 0 else None
        axes[0].hlines(plan["machine"]["memory"] / GB, **edges, colors="black", linestyles="dashed", label=label)
    seconds = {}
    for name, plan in plans.items():
        step = plan["step"]["seconds"]
        seconds[f"{name}\n{step:.3g} s"] = {part: took / step for part, took in plan["step"]["parts"].items()}
    _stack(axes[1], seconds, "share of a step's seconds")
    for axis in axes:
        axis.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=8, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def _stack(axis: Any, bars: dict[str, dict[str, float]], label: str) -> None:
    parts = list(dict.fromkeys(part for bar in bars.values() for part in bar))
    below = [0.0] * len(bars)
    for number, part in enumerate(parts):
        heights = [bar.get(part, 0.0) for bar in bars.values()]
        axis.bar(list(bars), heights, bottom=below, label=part, color=f"C{number % 10}", alpha=1 - 0.5 * (number > 9))
        below = [low + height for low, height in zip(below, heights, strict=True)]
    axis.set_ylabel(label)
    axis.grid(axis="y", alpha=0.3)
