"""Two hosts on one machine: network namespaces with a cable between them, and a disk of its own for each."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LINK = "eth0"
"""The name of a host's end of the cable."""

# What a host sees: its own disk at `node`, its own shared memory and /run, and nothing of the other host.
MOUNTS = """
set -e
mount --bind "$1" "$2"
mount -t tmpfs none "${1%/*}"
mount -t tmpfs none /dev/shm
mount -t tmpfs none /run
mkdir /run/sshd
cd "$2/checkout"
shift 2
exec "$@"
"""


@dataclass(frozen=True)
class Host:
    """One of the two. Paths below `node` are what its processes see, those below `disk` the same files from here."""

    namespace: str
    address: str
    disk: Path
    node: Path

    @property
    def checkout(self) -> Path:
        """Its checkout, from here."""
        return self.disk / "checkout"

    def start(self, *command: str, **variables: str) -> subprocess.Popen[str]:
        """Starts a command in its checkout; what it prints goes to `log`."""
        environment = os.environ | {"DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}
        environment |= {"GLOO_SOCKET_IFNAME": LINK, "TMPDIR": f"{self.node}/tmp"} | variables
        environment["PATH"] = f"{self.node}/bin:{Path(sys.executable).parent}:{os.environ['PATH']}"
        inside = ("bash", "-c", MOUNTS, "bash", str(self.disk), str(self.node), *command)
        with self.log.open("a") as log:
            return subprocess.Popen(
                ("ip", "netns", "exec", self.namespace, *inside), env=environment, stdout=log, stderr=log, text=True
            )

    @property
    def log(self) -> Path:
        """What its commands have printed."""
        return self.disk / "log.txt"

    def received(self) -> int:
        """Bytes that came over the cable so far."""
        shown = _ip("-n", self.namespace, "-j", "-s", "link", "show", LINK)
        return int(json.loads(shown)[0]["stats64"]["rx"]["bytes"])

    def unplug(self) -> None:
        """Takes its end of the cable down."""
        _ip("-n", self.namespace, "link", "set", LINK, "down")

    def plug(self) -> None:
        """Takes it up again."""
        _ip("-n", self.namespace, "link", "set", LINK, "up")

    def processes(self) -> dict[int, str]:
        """What runs there: process ids and their command lines."""
        pids = [int(pid) for pid in _ip("netns", "pids", self.namespace).split()]
        lines = {}
        for pid in pids:
            with contextlib.suppress(OSError):  # gone meanwhile
                lines[pid] = Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
        return lines

    def left(self) -> dict[int, str]:
        """What still runs there after some seconds."""
        for _ in range(100):
            if not self.processes():
                break
            time.sleep(0.1)
        return self.processes()


@contextlib.contextmanager
def two_hosts(directory: Path, *, dataset: Path, base: Path) -> Iterator[tuple[Host, Host]]:
    """Two hosts that see each other over a cable, each with copies of checkout, dataset and base on its own disk.

    Skips the test where network namespaces are not permitted. Afterwards nothing of them is left, and the test fails
    where a process was.
    """
    node = directory / "node"
    node.mkdir()
    hosts = tuple(
        Host(f"oh{os.getpid()}{letter}", f"10.77.0.{number}", directory / "disks" / letter, node)
        for number, letter in enumerate("ab", start=1)
    )
    if not shutil.which("ip"):
        pytest.skip("there is no ip (of iproute2) to make network namespaces with")
    made: list[Host] = []
    left: dict[int, str] = {}
    try:
        for host in hosts:
            tried = subprocess.run(("ip", "netns", "add", host.namespace), capture_output=True, text=True, check=False)
            if tried.returncode:
                pytest.skip(f"network namespaces are not permitted here ({tried.stderr.strip()})")
            made.append(host)
            _fill(host, dataset, base)
        first, second = hosts
        ends = ("link", "add", LINK, "netns", first.namespace, "type", "veth", "peer", "name", LINK)
        _ip(*ends, "netns", second.namespace)
        for host in hosts:
            _ip("-n", host.namespace, "address", "add", f"{host.address}/24", "dev", LINK)
            host.plug()
            _ip("-n", host.namespace, "link", "set", "lo", "up")
        yield first, second
    finally:
        for host in made:
            here = host.left()
            left |= here
            for pid in here:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, 9)
            _ip("netns", "del", host.namespace)
    assert not left, f"these were still running: {left}"


@contextlib.contextmanager
def serve_ssh(hosts: tuple[Host, Host]) -> Iterator[None]:
    """Within it, each host has an sshd with a key of its own, and on the first `ssh` gets into both."""
    first = hosts[0]
    _key(first.disk / "user")
    for host in hosts:
        _key(host.disk / "host")
        shutil.copy(first.disk / "user.pub", host.disk / "authorized_keys")
        (host.disk / "sshd_config").write_text(
            f"ListenAddress {host.address}\nHostKey {host.node}/host\nAuthorizedKeysFile {host.node}/authorized_keys\n"
            "PidFile none\nStrictModes no\nUsePAM no\nPasswordAuthentication no\nPermitRootLogin prohibit-password\n"
        )
    (first.disk / "ssh_config").write_text(
        f"IdentityFile {first.node}/user\nIdentitiesOnly yes\nStrictHostKeyChecking no\n"
        "UserKnownHostsFile /dev/null\nLogLevel ERROR\n"
    )
    ssh = first.disk / "bin" / "ssh"
    ssh.write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {first.node}/ssh_config "$@"\n')
    ssh.chmod(0o755)
    daemons = [host.start("/usr/sbin/sshd", "-D", "-e", "-f", f"{host.node}/sshd_config") for host in hosts]
    try:
        for host in hosts:
            while "Server listening" not in host.log.read_text():
                assert all(daemon.poll() is None for daemon in daemons), host.log.read_text()
                time.sleep(0.05)
        yield
    finally:
        for daemon in daemons:
            daemon.terminate()
            daemon.wait()


def _key(path: Path) -> None:
    subprocess.run(("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(path)), check=True)


def _fill(host: Host, dataset: Path, base: Path) -> None:
    for name in ("configs", "data", "scripts", "train"):
        shutil.copytree(ROOT / name, host.checkout / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(dataset, host.checkout / "prepared")
    shutil.copytree(base, host.checkout / "base")
    for name in ("bin", "tmp"):
        (host.disk / name).mkdir()


def _ip(*arguments: str) -> str:
    return subprocess.run(("ip", *arguments), capture_output=True, text=True, check=True).stdout
