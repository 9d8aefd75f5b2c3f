"""What ZeRO-3 makes whole, when, and for how long: DeepSpeed's coordinator of sharded parameters, played through once.

Each module's parameters are gathered when the pass comes to it; ahead of that, as many as the prefetch bucket and
`max_live_parameters` allow; and released after it, unless they are used again within `REUSE` elements of the way.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from train.config.engine import DeepSpeedConfig
from train.planning.given.sizes import Sizes, Tensor

REUSE = 1_000_000_000
"""DeepSpeed's default of `stage3_max_reuse_distance`, in elements."""


@dataclass(frozen=True, slots=True)
class Gathers:
    """Of a micro-step."""

    held: int
    """Bytes that are whole at once, at most, beside what always is."""
    forward: int
    """Bytes that are gathered in the forward."""
    backward: int
    """Bytes that are gathered in the backward, recomputed layers' as well."""
    largest: int
    """Bytes of the largest module: at least these must have come before it is computed with."""


def persists(tensor: Tensor, config: DeepSpeedConfig) -> bool:
    """Whether a parameter stays whole on every process."""
    return tensor.elements < config.persistence_threshold


def gathers(sizes: Sizes, config: DeepSpeedConfig, checkpointing: str) -> Gathers:
    """Of a micro-step over more than one process, once DeepSpeed knows the order of the modules."""
    way = list(_way(sizes, checkpointing))
    sharded = {number: [t for t in unit.tensors if not persists(t, config)] for number, unit in enumerate(sizes.units)}
    elements = {number: sum(t.elements for t in tensors) for number, tensors in sharded.items()}
    size = {number: sum(t.bytes for t in tensors) for number, tensors in sharded.items()}
    next_use, passed = _next_uses(sizes, way)
    prefetch = config.prefetch_bucket_size or config.bucket_size
    live: set[int] = set()
    moved = {False: 0, True: 0}
    elements_live, bytes_live, held, ahead = 0, 0, 0, 0
    for index, (number, is_backward) in enumerate(way):
        wanted = [] if number in live else [(number, is_backward)]
        ahead = max(ahead, index + 1)
        allowed = config.max_live_parameters - elements_live - sum(elements[number] for number, _ in wanted)
        begun = 0
        while ahead < len(way) and begun < min(prefetch, allowed):
            following, _ = way[ahead]
            if following not in live and following != number:
                wanted.append(way[ahead])
                begun += elements[following]
            ahead += 1
        for gathered, in_backward in wanted:
            if gathered not in live:
                live.add(gathered)
                moved[in_backward] += size[gathered]
                elements_live += elements[gathered]
                bytes_live += size[gathered]
        held = max(held, bytes_live)
        later = next_use[index]
        soon = later is not None and (later < ahead or passed[later] - passed[index + 1] < REUSE)
        if not soon:
            live.discard(number)
            elements_live -= elements[number]
            bytes_live -= size[number]
    return Gathers(held, moved[False], moved[True], max(size.values()))


def _next_uses(sizes: Sizes, way: list[tuple[int, bool]]) -> tuple[list[int | None], list[int]]:
    """For each index of the way, the index at which its unit is passed again, and the elements passed before it."""
    passed = [0]
    for number, _ in way:
        passed.append(passed[-1] + sum(tensor.elements for tensor in sizes.units[number].tensors))
    last: dict[int, int] = {}
    next_use: list[int | None] = [None] * len(way)
    for index in reversed(range(len(way))):
        next_use[index] = last.get(way[index][0])
        last[way[index][0]] = index
    return next_use, passed


def _way(sizes: Sizes, checkpointing: str) -> Iterator[tuple[int, bool]]:
    """The number of each unit in the order in which it is passed, and whether that is in the backward."""
    numbers = range(len(sizes.units))
    yield from ((number, False) for number in numbers)
    of_layer: dict[int | None, list[int]] = {}
    for number in numbers:
        of_layer.setdefault(sizes.units[number].layer, []).append(number)
    for number in reversed(numbers):
        unit = sizes.units[number]
        layer = of_layer[unit.layer]
        attention = [other for other in layer if not sizes.units[other].experts]
        if unit.layer is not None and checkpointing == "full" and number == layer[-1]:
            yield from ((other, True) for other in layer)
        elif unit.layer is not None and checkpointing == "attention" and number == attention[-1]:
            yield from ((other, True) for other in attention)
        yield number, True
