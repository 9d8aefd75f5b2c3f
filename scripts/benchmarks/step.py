"""One training step: ours against TRL's SFTTrainer with PEFT's target_parameters, on the same weights and packed rows.

The trainers run in processes of their own and take their steps in turn, each pair of steps between two measurements of
the machine's matrix-product peak. Memory is the peak of each process above the loaded model.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers.utils.logging import disable_progress_bar

from benchmarks.harness.peak import peak_flops
from benchmarks.harness.trainers import Settings
from benchmarks.harness.turns import Trainer
from configs.program.errors import UserError
from data.prepared.dataset import PreparedDataset
from data.schema import IGNORE_INDEX
from train.config.model import ArchitectureConfig, ModelConfig
from train.config.train import LoggingConfig
from train.model import mixtral
from train.model.work import of_frozen

ROOT = Path(__file__).parents[2]
DATA = ROOT.parent / "shared" / "data"
FIRST_LOSSES_AGREE = 1e-4
"""How far apart, relatively, the first losses may be in float32: both are of the same weights and rows, in sums of
another order. The noise of bfloat16 would hide other targets, or conversations that see each other."""
console = Console(width=120)


def arguments(parser: argparse.ArgumentParser) -> None:
    """What the user may set."""
    files = [str(DATA / "gpteacher_codegen.json"), str(DATA / "alpaca_en_demo.json")]
    parser.add_argument("--data", nargs="+", default=files, metavar="FILE", help="rows, as `python -m data` takes them")
    parser.add_argument("--row", type=int, default=1024, help="tokens of a packed row (1024)")
    parser.add_argument("--rows-per-step", type=int, default=1, help="rows of a step (1)")
    parser.add_argument("--lora-rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=15, help="timed steps of each trainer (15)")
    parser.add_argument("--warmup", type=int, default=5, help="steps before them, not timed (5)")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="CPU threads of a trainer")
    parser.add_argument("--checkpointing", action="store_true", help="activation checkpointing in both trainers")
    parser.add_argument("--stage", type=int, choices=(0, 2, 3), default=0, help="our ZeRO stage (0)")
    parser.add_argument("--model", type=Path, help="a Mixtral's directory, in place of random weights of these sizes:")
    for name, size in {
        "hidden": 512,
        "intermediate": 1792,
        "layers": 4,
        "heads": 8,
        "kv-heads": 2,
        "experts": 8,
    }.items():
        parser.add_argument(f"--{name}", type=int, default=size)
    parser.add_argument(
        "--weights", choices=("bf16", "nf4"), default="bf16", help="nf4: ours on four bits beside ours on bf16, no TRL"
    )
    parser.add_argument("--curves", type=Path, metavar="PNG", help="also measure how the cost grows, and draw it there")


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measures, prints, and returns the figures."""
    check(options)
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as scratch:
        if options.weights == "nf4":
            return _compare_weights(options, Path(scratch))
        figures = _compare(options, Path(scratch))
        if options.curves:
            figures["curves"] = _curves(options, Path(scratch), figures)
            _draw(figures["curves"], options.curves)
    return figures


def check(options: argparse.Namespace) -> None:
    """Raises `UserError` if the rows are not there."""
    missing = [file for file in options.data if not Path(file).is_file()]
    if missing:
        raise UserError(f"--data={missing[0]}: there is no such file; name files of instruction or chat rows")


def shown(options: argparse.Namespace) -> dict[str, Any]:
    """The options as they stand beside the figures; of the rows, only the files' names."""
    return {key: str(value) for key, value in vars(options).items()} | {"data": [Path(f).name for f in options.data]}


def _compare(options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Both trainers on the same rows, in turn."""
    settings, needed = prepare(options, scratch)
    exact = {name: _first_loss(name, replace(settings, dtype="float32")) for name in ("ours", "trl")}
    trainers = {name: Trainer(name, settings) for name in ("ours", "trl")}
    times, peaks = _in_turn(trainers, options)
    ends = {name: trainer.end() for name, trainer in trainers.items()}
    memory = {name: end["peak_mib"] for name, end in ends.items()}

    timed = {name: turns[options.warmup :] for name, turns in times.items()}
    rates = _rates(timed)
    flops = [needed[turn] for turn in range(options.warmup, options.warmup + options.steps)]
    share = [f / turn["seconds"] / p for f, turn, p in zip(flops, timed["ours"], peaks, strict=True)]
    first_loss = {name: turns[0]["loss"] for name, turns in times.items()}
    figures = {
        "settings": shown(options),
        "tokens_per_second": {name: statistics.median(rate) for name, rate in rates.items()},
        "speedup": statistics.median(a / b for a, b in zip(rates["ours"], rates["trl"], strict=True)),
        "memory_above_model_mib": memory,
        "memory_ratio": memory["ours"] / memory["trl"],
        "seconds": {name: [turn["seconds"] for turn in turns] for name, turns in timed.items()},
        "matrix_product_peak_gflops": statistics.median(peaks) / 1e9,
        "needed_gflop_per_step": statistics.median(flops) / 1e9,
        "share_of_peak": statistics.median(share),
        "watching_routers_share": ends["ours"]["watching_seconds"]
        / statistics.median(turn["seconds"] for turn in timed["ours"])
        / LoggingConfig().routing_every,
        "first_loss": first_loss,
        "first_loss_float32": exact,
        "losses": {name: [turn["loss"] for turn in turns] for name, turns in times.items()},
        "failed": disagreement(exact, options),
    }
    _print(figures)
    return figures


def _in_turn(
    trainers: dict[str, "Trainer"], options: argparse.Namespace
) -> tuple[dict[str, list[dict[str, float]]], list[float]]:
    """The steps of each trainer, and the machine's matrix-product peak after each pair that is timed."""
    times: dict[str, list[dict[str, float]]] = {name: [] for name in trainers}
    peaks = []
    for number in range(options.warmup + options.steps):
        # first one, then the other, so that a machine that grows warm or noisy slows both alike
        order = sorted(trainers, reverse=bool(number % 2))
        taken = {name: trainers[name].step() for name in order}
        for name in trainers:
            times[name].append(taken[name])
        if number >= options.warmup:
            peaks.append(peak_flops(options.device, getattr(torch, options.dtype)))
    return times, peaks


def _rates(timed: dict[str, list[dict[str, float]]]) -> dict[str, list[float]]:
    return {name: [turn["tokens"] / turn["seconds"] for turn in turns] for name, turns in timed.items()}


def _compare_weights(options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Ours on a base in four bits beside ours on the same base as it comes."""
    settings, _ = prepare(options, scratch)
    trainers = {form: Trainer("ours", replace(settings, weights=form)) for form in ("bf16", "nf4")}
    times, _ = _in_turn(trainers, options)
    ends = {form: trainer.end() for form, trainer in trainers.items()}
    rates = _rates({form: turns[options.warmup :] for form, turns in times.items()})
    base, layers = ({form: end[key] for form, end in ends.items()} for key in ("base_mib", "layers_mib"))
    figures = {
        "settings": shown(options),
        "tokens_per_second": {form: statistics.median(rate) for form, rate in rates.items()},
        "speed_ratio": statistics.median(a / b for a, b in zip(rates["nf4"], rates["bf16"], strict=True)),
        "base_mib": base,
        "base_ratio": base["nf4"] / base["bf16"],
        "layers_mib": layers,
        "layers_ratio": layers["nf4"] / layers["bf16"],
        "memory_above_model_mib": {form: end["peak_mib"] for form, end in ends.items()},
        "losses": {form: [turn["loss"] for turn in turns] for form, turns in times.items()},
    }
    table = Table("", *trainers, "ratio", title="One training step")
    for name, ratio in (
        ("tokens_per_second", "speed_ratio"),
        ("base_mib", "base_ratio"),
        ("layers_mib", "layers_ratio"),
    ):
        numbers = (f"{figures[name][form]:,.0f}" for form in trainers)
        table.add_row(name.replace("_", " "), *numbers, f"{figures[ratio]:.3f}")
    console.print(table)
    return figures


def prepare(options: argparse.Namespace, scratch: Path) -> tuple[Settings, list[float]]:
    """Model and rows on disk, and the operations that each step must do."""
    dataset = scratch / f"rows-{options.row}"
    if not dataset.exists():
        command = [sys.executable, "-m", "data", f"files=[{','.join(options.data)}]", f"seq_len={options.row}"]
        done = subprocess.run([*command, f"output={dataset}"], cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode:
            raise UserError(f"--data: {done.stderr.strip().splitlines()[-1]}")
    path = options.model or scratch / f"model-{options.experts}"
    if not path.exists():
        torch.manual_seed(0)
        sizes = {
            "hidden_size": options.hidden,
            "intermediate_size": options.intermediate,
            "num_hidden_layers": options.layers,
            "num_attention_heads": options.heads,
            "num_key_value_heads": options.kv_heads,
            "num_local_experts": options.experts,
        }
        config = ModelConfig(architecture=ArchitectureConfig(**sizes), dtype=options.dtype)
        disable_progress_bar()
        mixtral.random_base(config).save_pretrained(path)
    settings = Settings(
        model=str(path),
        dataset=str(dataset),
        lora_rank=options.lora_rank,
        dtype=options.dtype,
        rows_per_step=options.rows_per_step,
        device=options.device,
        threads=options.threads,
        checkpointing=options.checkpointing,
        stage=options.stage,
    )
    config = json.loads((path / "config.json").read_text())
    table = PreparedDataset(dataset).train
    order = settings.order(len(table))
    needed = []
    for number in range(options.warmup + options.steps):
        rows = [table[order[(number * options.rows_per_step + p) % len(table)]] for p in range(options.rows_per_step)]
        needed.append(
            sum(needed_flops(config, row.lengths, sum(x != IGNORE_INDEX for x in row.labels)) for row in rows)
        )
    return settings, needed


def needed_flops(config: dict[str, Any], lengths: list[int], supervised: int) -> float:
    """Floating-point operations that a row of conversations must cost, as `of_frozen` counts them: no adapters."""
    pairs = sum(length * (length + 1) / 2 for length in lengths)
    return of_frozen(config).flops(sum(lengths), pairs, supervised)


def disagreement(first_loss: dict[str, float], options: argparse.Namespace) -> list[str]:
    """A sentence if the trainers' first losses are not of the same thing, so that their times can't be compared."""
    ours, theirs = first_loss["ours"], first_loss["trl"]
    if abs(ours - theirs) <= FIRST_LOSSES_AGREE * abs(theirs):
        return []
    return [
        f"in float32 the first loss is {ours:.4f} in ours and {theirs:.4f} in TRL's with --row {options.row}, "
        f"--lora-rank {options.lora_rank} and --experts {options.experts}"
    ]


def _first_loss(name: str, settings: Settings) -> float:
    """The loss of a trainer before its first update."""
    trainer = Trainer(name, settings)
    loss = trainer.step()["loss"]
    trainer.end()
    return loss


def _print(figures: dict[str, Any]) -> None:
    table = Table("", "ours", "TRL + PEFT", "ratio", title="One training step")
    rate, memory = figures["tokens_per_second"], figures["memory_above_model_mib"]
    table.add_row("tokens/s (median)", f"{rate['ours']:,.0f}", f"{rate['trl']:,.0f}", f"{figures['speedup']:.2f}")
    table.add_row(
        "MiB above the model", f"{memory['ours']:,.0f}", f"{memory['trl']:,.0f}", f"{figures['memory_ratio']:.2f}"
    )
    for name, loss in {"first loss": figures["first_loss"], "in float32": figures["first_loss_float32"]}.items():
        table.add_row(name, f"{loss['ours']:.4f}", f"{loss['trl']:.4f}", f"{loss['ours'] / loss['trl']:.6f}")
    console.print(table)
    for sentence in figures["failed"]:
        console.print(f"Failed: {sentence}")
    share, peak = figures["share_of_peak"], figures["matrix_product_peak_gflops"]
    needed = figures["needed_gflop_per_step"]
    watching = figures["watching_routers_share"]
    console.print(f"Noting the routers every {LoggingConfig().routing_every} steps takes {watching:.3%} of the time")
    console.print(f"{share:.1%} of the matrix-product peak, {peak:,.0f} GFLOP/s, counting {needed:,.0f} GFLOP a step")


def _curves(options: argparse.Namespace, scratch: Path, here: dict[str, Any]) -> dict[str, Any]:
    """How the cost of a step grows along experts, LoRA ranks and row lengths, with everything else as asked.

    `here` are the figures of what was asked; each curve passes through them, and what failed in any is noted there."""
    lines = {"lora_rank": (8, 16, 32, 64, 128), "row": (512, 1024, 2048, 4096)}
    if options.model is None:  # a model that is given has as many experts as it has
        lines = {"experts": (2, 4, 8)} | lines
    kept = ("tokens_per_second", "speedup", "memory_above_model_mib", "memory_ratio", "share_of_peak")
    curves = {}
    for name, values in lines.items():
        points = []
        for value in values:
            console.rule(f"{name} {value}")
            changed = argparse.Namespace(**vars(options) | {name: value})
            figures = here
            if value != getattr(options, name):
                figures = _compare(changed, scratch)
                here["failed"] += figures["failed"]
            points.append({name: value} | {key: figures[key] for key in kept})
        curves[name] = points
    return curves


def _draw(curves: dict[str, Any], path: Path) -> None:
    """Tokens per second above, memory below, a column for each curve."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = {"experts": "experts (2 active)", "lora_rank": "LoRA rank", "row": "tokens of a row"}
    figure, axes = pyplot.subplots(2, len(curves), figsize=(10, 5), sharey="row", sharex="col")
    for column, (name, points) in enumerate(curves.items()):
        x = [point[name] for point in points]
        for row, (key, label) in enumerate(
            {"tokens_per_second": "tokens/s", "memory_above_model_mib": "MiB above model"}.items()
        ):
            axis = axes[row][column]
            for trainer, shown in {"ours": "ours", "trl": "TRL + PEFT"}.items():
                axis.plot(x, [point[key][trainer] for point in points], "o-", label=shown)
            axis.set_xscale("log", base=2)
            axis.set_xticks(x, [str(value) for value in x])
            axis.grid(alpha=0.3)
            if column == 0:
                axis.set_ylabel(label)
        axes[1][column].set_xlabel(names[name])
    for row in axes:
        row[0].set_ylim(bottom=0)  # of the whole row of plots, after all of it is drawn
    axes[0][0].legend(frameon=False)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
