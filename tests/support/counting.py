"""What torch is seen to do: operations counted by name, and memory."""

import itertools
from collections import Counter
from collections.abc import Callable

from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode


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
