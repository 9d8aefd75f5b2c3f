"""A plan on one page of 100 columns."""

from collections.abc import Iterator

from rich.console import Console
from rich.table import Table

from train.planning.alternatives import Alternative, ranked
from train.planning.given.machine import GB
from train.planning.given.sizes import Sizes
from train.planning.plan import Plan

WIDTH = 100
SHOWN = 8
"""Alternatives on the page, of those that fit; the JSON has all."""


def show(console: Console, plan: Plan, sizes: Sizes, found: list[Alternative]) -> None:
    """Prints it."""
    machine, batch, speed = plan.machine, plan.batch, plan.speed
    each = f"{batch.processes} processes" if batch.processes > 1 else "1 process"
    console.print(f"machine       {machine.name}, {each}, {machine.memory / GB:.1f} GB each")
    console.print(f"rates         {_rates(plan)}")
    console.print(f"base          {sizes.base_parameters:,} parameters, {sizes.trained:,} trained", highlight=False)
    console.print(f"batch         {batch}")
    console.print(f"rows          {plan.rows.said}")
    console.print()
    console.print(_memory(plan))
    fits = "it fits" if plan.refused is None else f"it does not fit: {plan.refused}"
    console.print(f"Peak {plan.memory.peak / GB:.1f} of {machine.memory / GB:.1f} GB, {plan.memory.where}; {fits}.")
    if plan.memory.host:
        console.print(f"A node's own memory holds {plan.memory.host / GB:.0f} GB of {machine.host_memory / GB:.0f}.")
    console.print()
    console.print(_step(plan))
    console.print(f"{speed.step:.4g} s a step, {speed.tokens_per_second:,.0f} tokens/s; what bounds it: {speed.bound}.")
    for line in _run(plan):
        console.print(line)
    if found:
        console.print()
        for part in _alternatives(found):
            console.print(part)
    console.print()
    console.print(_certainty(plan))


def _rates(plan: Plan) -> str:
    machine = plan.machine
    said = f"{machine.flops / 1e12:.3g} TFLOP/s of products, {machine.bandwidth / GB:,.4g} GB/s of memory"
    if plan.batch.processes > 1:
        said += f", {machine.link / GB:.3g} GB/s between processes" if machine.link else ", link unknown"
    return said + (", measured here" if machine.is_measured else ", assumed shares of the data sheet")


def _memory(plan: Plan) -> Table:
    table = Table("memory of a process", box=None, padding=(0, 3, 0, 0))
    table.add_column("GB", justify="right")
    for name, size in plan.memory.parts.items():
        table.add_row(name, f"{size / GB:.2f}")
    return table


def _step(plan: Plan) -> Table:
    table = Table("a step", box=None, padding=(0, 3, 0, 0))
    table.add_column("s", justify="right")
    for name, seconds in plan.speed.parts.items():
        table.add_row(name, f"{seconds:.3g}")
    for name, seconds in plan.speed.hidden.items():
        table.add_row(f"{name}, while something is computed", f"({seconds:.3g})")
    return table


def _run(plan: Plan) -> Iterator[str]:
    price = plan.machine.price
    if plan.steps:
        cost = f", ${plan.dollars:,.0f} at ${price:g} per GPU-hour" if price else ""
        yield f"{plan.steps:,} steps, {plan.epoch_hours:.3g} hours an epoch, {plan.hours:.3g} hours in all{cost}."
    yield f"Loading takes about {plan.loading:.0f} s, a checkpoint {plan.checkpoint:.1f} s beside training."


def _alternatives(found: list[Alternative]) -> Iterator[Table | str]:
    best = ranked(found)
    table = Table(
        "what fits, the cheapest first; within 2 %, what leaves most memory",
        box=None,
        padding=(0, 2, 0, 0),
    )
    for name in ("GB", "tokens/s", "hours", "$"):
        table.add_column(name, justify="right")
    for each in best[:SHOWN]:
        plan = each.plan
        numbers = (f"{plan.memory.peak / GB:.1f}", f"{plan.speed.tokens_per_second:,.0f}")
        of_run = (f"{plan.hours:.3g}", f"{plan.dollars:,.0f}") if plan.steps else ("", "")
        table.add_row(_short(each), *numbers, *of_run)
    yield table
    if not best:
        yield "None fits."
    refused = [each for each in found if each.plan.refused]
    if refused:
        yield f"{len(best)} of {len(found)} fit. Of the others, the nearest to it:"
        for each in sorted(refused, key=lambda each: each.plan.memory.peak)[:3]:
            yield f"  {_short(each)}: {each.plan.refused}"


def _short(each: Alternative) -> str:
    config = each.plan.config
    zero = config.deepspeed
    said = [f"stage {zero.stage}", config.model.weights, f"micro-batch {config.micro_batch}"]
    said.append(f"recompute {config.activation_checkpointing}")
    if zero.offload_optimizer == "cpu":
        said.append("offload")
    return ", ".join(said + ["node copy"] * zero.node_copy)


def _certainty(plan: Plan) -> str:
    arithmetic = "Memory is arithmetic over the sizes of what training allocates"
    if plan.machine.is_measured:
        by = "the seconds of a layer that were measured here" if plan.machine.layer else "rates measured here"
        return f"{arithmetic}; seconds are arithmetic by {by}."
    return f"{arithmetic}, seconds are arithmetic at assumed rates: nothing here was measured on such a machine."
