"""What torch is seen to do: operations counted by name, and memory."""

import itertools
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

OF_MATRICES = ("aten.mm", "aten.addmm", "aten.addmm_")
"""Products of two matrices, as `counted_work` names them."""


class Calls(TorchDispatchMode):
    """Counts operations by name."""

    def __init__(self) -> None:
        super().__init__()
        self.of: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.of[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def counted_memory(run: Callable[[], None]) -> tuple[int, int]:
    """The bytes that torch's profiler sees allocated at the peak, and those in the end."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = profiler.profiler.kineto_results.events()
    changes = sorted((event for event in events if event.name() == "[memory]"), key=lambda event: event.start_ns())
    held = list(itertools.accumulate(change.nbytes() for change in changes))
    return max(held), held[-1]


def counted_work(run: Callable[[], object]) -> dict[str, int]:
    """The floating-point operations that torch counts of products, by operator; of those in place too."""

    def in_place(_: torch.Size, a: torch.Size, b: torch.Size, **others: Any) -> int:
        return 2 * a[0] * a[1] * b[1]

    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: in_place}) as counter:
        run()
    return {str(op): flops for op, flops in counter.get_flop_counts()["Global"].items()}
