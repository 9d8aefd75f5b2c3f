"""What a step moves between two hosts under ZeRO-3: a base in four bits against bfloat16, and what a node's copy saves.

The hosts are network namespaces of this machine with a cable between them, those of the tests; that takes root. The
bytes are those that the two ends of the cable count. Each run is made twice, and what the longer one received more is
divided by the steps that it took more: so loading, evaluating and saving are not in it.

As in Mixtral, nearly all weights are experts. Attention, embeddings and head stay whole on each process, and after each
update DeepSpeed sends them all the same: at this size 8 MB a step, and of Mixtral-8x7B a hundredth of its gathers.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.load import make
from configs.program.errors import UserError

ROOT = Path(__file__).parents[2]
VOCABULARY = 32_000
RUNS: dict[str, tuple[int, tuple[str, ...]]] = {
    "bf16": (1, ()),
    "nf4": (1, ("model.weights=nf4",)),
    "bf16, two processes a host": (2, ()),
    "the same, node_copy": (2, ("deepspeed.node_copy=true",)),
}
"""Processes on each host, and settings."""


def arguments(parser: argparse.ArgumentParser) -> None:
    """What the user may set."""
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--intermediate", type=int, default=8192)
    parser.add_argument("--layers", type=int, default=5)
    parser.add_argument("--steps", type=int, default=10, help="counted steps (10)")


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measures, prints, and returns the figures."""
    import pytest

    from tests.integration.hosts import two_hosts

    with tempfile.TemporaryDirectory() as directory:
        top = Path(directory)
        make(top / "base", options.hidden, options.intermediate, options.layers)
        prepare = (sys.executable, "-m", "data", "data=sample", f"output={top}/prepared")
        subprocess.run(prepare, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        try:
            with two_hosts(top, dataset=top / "prepared", base=top / "base") as hosts:
                moved = {name: _bytes_of_a_step(hosts, name, options) for name in RUNS}
        except pytest.skip.Exception as reason:
            raise UserError(f"network: {reason}; run it as root, with iproute2") from reason
    bf16, nf4, without, with_copy = moved.values()
    figures = {
        "settings": {name: getattr(options, name) for name in ("hidden", "intermediate", "layers", "steps")},
        "bytes_of_a_step": moved,
        "nf4_of_bf16": nf4 / bf16,
        "node_copy_of_none": with_copy / without,
    }
    table = Table("", "MB over the cable in a step", "", title="Two hosts, ZeRO-3")
    for name, size in moved.items():
        against = {"nf4": f"{nf4 / bf16:.3f}", "the same, node_copy": f"{with_copy / without:.3f}"}
        table.add_row(name, f"{size / 1e6:,.2f}", against.get(name, ""))
    Console().print(table)
    return figures


def _bytes_of_a_step(hosts: Any, name: str, options: argparse.Namespace) -> float:
    one, more = (_received(hosts, name, steps, options) for steps in (1, 1 + options.steps))
    return (more - one) / options.steps


def _received(hosts: Any, name: str, steps: int, options: argparse.Namespace) -> int:
    """Bytes that the hosts received in a run of that many steps."""
    processes, changed = RUNS[name]
    before = [host.received() for host in hosts]
    settings = (
        *("recipe=quickstart", "lora=attention", "hardware=cpu", "hardware.threads=1", "logging=quiet"),
        *("dataset=prepared", "model.path=base", f"run_dir=runs/{list(RUNS).index(name)}-{steps}"),
        *(f"max_steps={steps}", "global_batch=4", f"deepspeed.persistence_threshold={VOCABULARY * options.hidden}"),
        *changed,
    )
    where = ("--nodes", "2", "--master-addr", hosts[0].address, "--gpus-per-node", str(processes))
    started = [
        host.start("scripts/launch/per_node.sh", *where, "--node-rank", str(rank), *settings)
        for rank, host in enumerate(hosts)
    ]
    for process, host in zip(started, hosts, strict=True):
        if process.wait():
            raise RuntimeError(f"a run ended with {process.returncode}:\n{host.log.read_text()[-4000:]}")
    return sum(host.received() - first for host, first in zip(hosts, before, strict=True))
