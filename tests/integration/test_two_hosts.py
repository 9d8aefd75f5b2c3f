"""A run over two hosts is that of two processes on one: by scripts/launch, over a cable, with nothing else shared."""

import json
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.conftest import Quickstart, train
from tests.integration.hosts import LINK, Host, serve_ssh, two_hosts

pytestmark = pytest.mark.slow

STEPS = 6
SETTINGS = (
    *("recipe=quickstart", "hardware=cpu", "logging=quiet", f"max_steps={STEPS}"),
    # Left alone, a process shares its host's cores with those beside it; with another number of threads, sums round
    # otherwise.
    "hardware.threads=1",
)
ON_A_HOST = ("dataset=prepared", "model.path=base", "run_dir=runs/over_two", "failures.peer_timeout=20", *SETTINGS)


@pytest.fixture
def hosts(quickstart: Quickstart, tmp_path: Path) -> Iterator[tuple[Host, Host]]:
    with two_hosts(tmp_path, dataset=quickstart.sample, base=quickstart.base_run / "model") as both:
        yield both


@pytest.fixture(scope="module")
def on_one_host(quickstart: Quickstart, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of two processes on one host."""
    run_dir = tmp_path_factory.mktemp("one_host") / "run"
    start = (f"dataset={quickstart.sample}", f"model.path={quickstart.base_run}/model", f"run_dir={run_dir}")
    train(2, *SETTINGS, *start)
    return run_dir


def start(host: Host, number: int, first: Host) -> subprocess.Popen[str]:
    """The per-node form on one of the two hosts."""
    where = ("--nodes", "2", "--node-rank", str(number), "--master-addr", first.address, "--gpus-per-node", "1")
    return host.start("scripts/launch/per_node.sh", *where, *ON_A_HOST)


def start_both(hosts: tuple[Host, Host]) -> list[subprocess.Popen[str]]:
    return [start(host, number, hosts[0]) for number, host in enumerate(hosts)]


def steps_done(host: Host) -> int:
    """How far the run has come."""
    path = host.checkout / "runs/over_two/metrics.jsonl"
    return max((line["step"] for line in numbers(path.parent) if "loss" in line), default=0) if path.exists() else 0


def ended(process: subprocess.Popen[str], host: Host, expect: int = 0) -> None:
    """Waits for a command, and fails with its host's log where the exit code is another one."""
    code = process.wait(timeout=300)
    assert code == expect, f"{process.args!r} ended with {code}:\n{host.log.read_text()}"


def all_ended(processes: list[subprocess.Popen[str]], hosts: tuple[Host, Host], expect: int = 0) -> None:
    """The same of both."""
    for process, host in zip(processes, hosts, strict=True):
        ended(process, host, expect)


def files(host: Host) -> set[str]:
    """The files of a host's checkout, without what Python keeps for itself."""
    found = (path.relative_to(host.checkout) for path in host.checkout.rglob("*") if path.is_file())
    return {str(path) for path in found if "__pycache__" not in path.parts}


def assert_same_run(one: Path, other: Path) -> None:
    """The same losses and gradient norms and the same adapter, to the last bit."""
    assert numbers(one) == numbers(other)
    assert len([line for line in numbers(one) if "loss" in line]) == STEPS
    adapters = [(run_dir / "adapter" / "adapter_model.safetensors").read_bytes() for run_dir in (one, other)]
    assert adapters[0] == adapters[1]


def numbers(run_dir: Path) -> list[dict[str, float]]:
    """The losses of metrics.jsonl and what belongs to them, without how fast it went."""
    whole = (run_dir / "metrics.jsonl").read_text().split("\n")[:-1]  # a line may be half written
    lines = [json.loads(line) for line in whole]
    kept = ("step", "loss", "gradient_norm", "evaluation_loss", "supervised_tokens", "load_balancing_loss")
    losses = [line for line in lines if "loss" in line or "evaluation_loss" in line]
    return [{key: line[key] for key in kept if key in line} for line in losses]


@pytest.mark.skipif(
    not all(shutil.which(tool) for tool in ("pdsh", "ssh", "ssh-keygen", "/usr/sbin/sshd")),
    reason="pdsh, ssh and sshd are not all here",
)
def test_the_hostfile_form_gives_them_too(hosts: tuple[Host, Host], on_one_host: Path) -> None:
    first, second = hosts
    before = files(second)
    (first.checkout / "hostfile").write_text("".join(f"{host.address} slots=1\n" for host in hosts))
    (first.checkout / ".deepspeed_env").write_text(f"GLOO_SOCKET_IFNAME={LINK}\nDS_ACCELERATOR=cpu\nHF_HUB_OFFLINE=1\n")
    with serve_ssh(hosts):
        ended(first.start("scripts/launch/hostfile.sh", "hostfile", *ON_A_HOST), first)
    assert_same_run(first.checkout / "runs/over_two", on_one_host)
    assert files(second) == before


def test_the_per_node_form_gives_the_losses_of_one_host_through_a_signal_and_a_cable_that_comes_loose(
    hosts: tuple[Host, Host], on_one_host: Path
) -> None:
    first, second = hosts
    before = files(second)

    processes = start_both(hosts)
    wait_for_step(1, first, processes)
    processes[1].send_signal(signal.SIGTERM)  # as a node that is drained; the other node hears of it by the run alone
    all_ended(processes, hosts, expect=75)
    saved = steps_done(first)
    assert 1 <= saved < STEPS

    processes = start_both(hosts)
    wait_for_step(saved + 1, first, processes)
    second.unplug()
    all_ended(processes, hosts, expect=76)
    assert steps_done(first) < STEPS
    for number, host in enumerate(hosts):
        # steps are so short that it may last have been heard of in its start
        other = rf"process {1 - number} has not been heard of .* in (step \d+|its start) \("
        assert re.search(other, host.log.read_text()), host.log.read_text()
        assert not host.left()

    second.plug()
    all_ended(start_both(hosts), hosts)
    assert_same_run(first.checkout / "runs/over_two", on_one_host)
    # Only process 0 writes.
    assert files(second) == before
    # It did go over the cable: a step gathers each shard for the forward and again for the backward.
    base = (first.checkout / "base" / "model.safetensors").stat().st_size
    for host in hosts:
        assert host.received() > STEPS * base / 2


def wait_for_step(step: int, host: Host, processes: list[subprocess.Popen[str]]) -> None:
    """Waits until the run has taken that step."""
    while steps_done(host) < step:
        assert all(process.poll() is None for process in processes), host.log.read_text()
        time.sleep(0.02)
