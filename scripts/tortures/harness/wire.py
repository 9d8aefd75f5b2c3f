"""Two network namespaces that see each other over a wire of ours, which loses, delays, reorders and holds packets.

Each has an end of it, a TUN device; what the kernel sends into one, a thread here reads, and writes to the other when
its time has come. So it can do what `tc netem` does, which few kernels of rented machines bring.
"""

import contextlib
import fcntl
import heapq
import os
import random
import select
import struct
import subprocess
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

LINK = "eth0"
"""The name of each end in its namespace."""
ADDRESSES = ("10.213.9.1", "10.213.9.2")
TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
"""From linux/if_tun.h: makes a device of IP packets, which come without a header of the driver's."""
LARGEST_PACKET = 1 << 16
HELD = 1.0
"""Seconds of a slow wire's time that may wait before it; what comes then is lost, as a router's queue does."""
CLONE_NEWNET = 0x40000000


@dataclass
class Quality:
    """What a wire does to packets, in each direction."""

    loss: float = 0.0
    """The share that is lost."""
    delay: float = 0.0
    """Seconds."""
    jitter: float = 0.0
    """Seconds on top, drawn for each packet: one may overtake another."""
    bits_per_second: float = float("inf")
    silent: bool = False
    """Whether all is lost."""


class Wire:
    """Carries packets between the namespaces `names`, by its `quality`, which may change at any time."""

    def __init__(self, seed: int):
        """Makes namespaces and devices; `seed` decides which packets are lost and how long they take."""
        self.quality = Quality()
        self.names = tuple(f"torture{os.getpid()}{side}" for side in "ab")
        self.carried = 0
        """Packets that came through."""
        self._random = random.Random(seed)
        self._closing = threading.Event()
        self._ends: list[int] = []
        for name, address in zip(self.names, ADDRESSES, strict=True):
            ip("netns", "add", name)
            self._ends.append(_tun(name[-15:]))
            ip("link", "set", name[-15:], "netns", name)
            ip("-n", name, "link", "set", name[-15:], "name", LINK)
            ip("-n", name, "address", "add", f"{address}/24", "dev", LINK)
            for device in ("lo", LINK):
                ip("-n", name, "link", "set", device, "up")
        self._thread = threading.Thread(target=self._carry, name="wire", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Removes all."""
        self._closing.set()
        self._thread.join()
        for end in self._ends:
            os.close(end)
        remove(self.names)

    def _carry(self) -> None:
        waiting: list[tuple[float, int, int, bytes]] = []  # when it leaves, which it is, to which end
        free, count = [0.0, 0.0], 0
        while not self._closing.is_set():
            pause = 0.1 if not waiting else min(0.1, max(0.0, waiting[0][0] - time.monotonic()))
            for end in select.select(self._ends, [], [], pause)[0]:
                here = self._ends.index(end)
                with contextlib.suppress(BlockingIOError):
                    for _ in range(64):
                        packet = os.read(end, LARGEST_PACKET)
                        now, quality = time.monotonic(), self.quality
                        begins = max(now, free[here])
                        lost = quality.silent or self._random.random() < quality.loss or begins - now > HELD
                        if not lost:
                            free[here] = begins + 8 * len(packet) / quality.bits_per_second
                            at, count = free[here] + quality.delay + self._random.random() * quality.jitter, count + 1
                            heapq.heappush(waiting, (at, count, self._ends[1 - here], packet))
            while waiting and waiting[0][0] <= time.monotonic():
                _, _, end, packet = heapq.heappop(waiting)
                with contextlib.suppress(OSError):  # its queue is full
                    os.write(end, packet)
                    self.carried += 1


@contextlib.contextmanager
def wire(seed: int) -> Iterator[Wire]:
    """Within it, there is one."""
    made = Wire(seed)
    try:
        yield made
    finally:
        made.close()


def why_not() -> str | None:
    """Why there can be none here, or None."""
    try:
        with wire(0):
            return None
    except subprocess.CalledProcessError as error:
        return f"network namespaces can't be made here ({error.stderr.strip()})"
    except OSError as error:
        return f"network devices can't be made here ({error})"
    finally:
        remove([f"torture{os.getpid()}{side}" for side in "ab"])


def enter(name: str) -> None:
    """Puts this process, which has one thread, into a namespace."""
    import ctypes

    with Path("/run/netns", name).open() as file:
        if ctypes.CDLL(None, use_errno=True).setns(file.fileno(), CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"setns {name}")


def ip(*arguments: str) -> None:
    """The system's `ip`."""
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


def remove(names: Iterable[str]) -> None:
    """Removes namespaces, if they are there."""
    for name in names:
        with contextlib.suppress(OSError):
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)


def _tun(name: str) -> int:
    end = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    fcntl.ioctl(end, TUNSETIFF, struct.pack("16sH22x", name.encode(), IFF_TUN | IFF_NO_PI))
    return end
