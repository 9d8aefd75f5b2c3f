"""What operations move and compute, counted from the sizes of their tensors: on the meta device, without a GPU."""

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

MOVES_NOTHING = {"empty", "empty_like", "new_empty", "new_empty_strided", "empty_strided", "detach", "_unsafe_view"}
"""The operations beside views that touch no element."""
ONLY_WRITES = {"copy_", "zero_", "fill_", "bernoulli_", "uniform_", "normal_"}
"""Operations that change a tensor without reading it."""
PICKS = {"index_select", "index", "gather", "embedding"}
"""Operations that read as much of their first tensor as they give, and no more."""


def _grouped_mm_flops(x: torch.Tensor, weight: torch.Tensor, *_: Any, out_val: torch.Tensor, **__: Any) -> int:
    """Of all groups together: a row of x meets one matrix, or a column of x all of weight's in one group."""
    return 2 * x.numel() * (out_val.shape[-1] if weight.dim() == 3 else weight.shape[1])


FLOPS = {
    torch.ops.aten._grouped_mm: _grouped_mm_flops,
    torch.ops.aten.addmm_: flop_registry[torch.ops.aten.addmm],
}
"""Those that torch doesn't count."""


@dataclass(slots=True)
class Sum:
    """What some operations move and compute."""

    kernels: int = 0
    """Each operation counted as one; a sort is several."""
    read: int = 0
    """Bytes, each input once."""
    written: int = 0
    """Bytes."""
    flops: int = 0
    """Of matrix products and attention."""

    def __add__(self, other: "Sum") -> "Sum":
        return Sum(*(getattr(self, name) + getattr(other, name) for name in self.__slots__))

    @property
    def moved(self) -> int:
        """Bytes."""
        return self.read + self.written

    def seconds(self, flops: float, bandwidth: float) -> float:
        """By arithmetic: what takes longer, computing or moving."""
        return max(self.flops / flops, self.moved / bandwidth)


class Trace(TorchDispatchMode):
    """Counts every operation under it; an operation that has a kernel of its own counts as one, whatever is in it."""

    def __init__(self) -> None:
        super().__init__()
        self.phase = ""
        """Under which what follows is counted."""
        self.counted: dict[tuple[str, str, tuple[int, ...]], list[Sum]] = defaultdict(list)
        """Each operation, by phase, name, and shape of the largest tensor."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        if not func.is_view and name not in MOVES_NOTHING:
            tensors = [leaf for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, torch.Tensor)]
            largest = max((tuple(tensor.shape) for tensor in tensors), key=_numel, default=())
            self.counted[self.phase, name, largest].append(_count(func, name, args, kwargs, out))
        return out


def _count(func: Any, name: str, args: Any, kwargs: Any, out: Any) -> Sum:
    read, written = 0, 0
    given = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)) | kwargs
    outputs = _size(out)
    for index, argument in enumerate(func._schema.arguments):
        size = _size(given.get(argument.name))
        changed = argument.alias_info is not None and argument.alias_info.is_write
        if changed:
            written += _changed(name, given, size)
        if not (argument.is_out or (changed and (name in ONLY_WRITES or name.startswith("index_")))):
            read += min(size, outputs) if index == 0 and name in PICKS else size
    if all(result.alias_info is None for result in func._schema.returns):
        written += outputs
    count = FLOPS.get(func.overloadpacket) or flop_registry.get(func.overloadpacket)
    flops = count(*args, **kwargs, out_val=out) if count else 0
    # torch counts attention as if every token saw all others
    return Sum(1, read, written, flops // 2 if "attn" in name else flops)


def _changed(name: str, given: dict[str, Any], size: int) -> int:
    """The bytes of a tensor that are written: by an index, as many as what is put there."""
    return _size(given.get("values", given.get("source"))) if name.startswith("index_") else size


def _size(tensors: Any) -> int:
    """The bytes of all tensors in it; of an expanded one, those that are there."""
    total = 0
    for tensor in tree_leaves(tensors):
        if isinstance(tensor, torch.Tensor):
            there = [size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride or size == 0]
            total += _numel(tuple(there)) * tensor.dtype.itemsize
    return total


def _numel(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()
