"""An adapter directory: which of the base's parameters it changes, and by what.

Stock PEFT says what a configuration means: it is applied to a base without weights, and names, shapes and scalings
are read off the layers that this makes. So targets by list or pattern, ranks and alphas by pattern, rank-stabilised
scaling and modules that are stored in full mean here what they mean there. The sums are our own: PEFT rounds a delta
before it adds it, and holds a second copy of every expert while it does.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import MixtralConfig

from configs.program.errors import UserError
from data.disk import adapter_directory
from data.disk.adapter_directory import (
    CONFIG,
    RECEIPT,
    WEIGHTS,
    Receipt,
    TrainedOn,
    read_shapes,
    separate_experts,
    trained_in,
)
from data.disk.formats import sizes
from data.disk.formats.json_text import read_json
from data.disk.mixtral_files import original_name, parameter_of, stored_parts
from data.disk.weights import StoredWeights
from inference import unfused
from inference.peft_layers import Layers, LowRank, Replacement

BLOCK = {"cpu": 2**18, "cuda": 2**26}
"""Elements of a weight that are summed at a time: their float32 copies fit a core's cache, or a GPU's memory."""


class Adapter:
    """An adapter's updates by the matrices that they change, in Mixtral's original names."""

    def __init__(self, directory: Path, architecture: MixtralConfig):
        """Reads the configuration and the headers, and checks them against the architecture of the base.

        Raises:
            UserError: a setting is not understood, or names or shapes are not those that the configuration makes of
                this base.
        """
        self.directory = directory
        self.settings = read_settings(directory)
        found = self._read_shapes()
        self.is_unfused = any(f".{unfused.BLOCK}." in key for key in found)
        """Whether it names each expert's w1, w2 and w3, as adapters of transformers 4 do."""
        layers = Layers(directory, self.settings, architecture, unfused=self.is_unfused)
        self._check_keys(found, layers.expected, {key: shape for key, (_, shape) in layers.beside.items()})
        self.keys = set(found)
        for key in self.keys & layers.beside.keys():
            parameter = layers.beside[key][0]
            update = layers.updates.get(parameter)
            layers.updates[parameter] = replace(update, base=key) if isinstance(update, LowRank) else Replacement(key)
        self.updates = {
            matrix: update
            for parameter, of_parameter in layers.updates.items()
            if parameter in layers.parameters
            for matrix, update in _by_matrix(parameter, layers.parameters[parameter], of_parameter)
        }
        self._uses = Counter(key for update in layers.updates.values() for key in update.keys)
        self._shared = layers.shared
        self._obstacle = layers.obstacle
        self._cached = lru_cache(maxsize=16)(self.tensor)  # experts of a layer come one after the other

    def _read_shapes(self) -> dict[str, tuple[int, ...]]:
        """The file's keys and the shapes of their tensors."""
        return {key: tensor.shape for key, tensor in read_shapes(self.directory, f"adapter={self.directory}").items()}

    def _check_keys(
        self,
        found: dict[str, tuple[int, ...]],
        expected: dict[str, tuple[int, ...]],
        beside: dict[str, tuple[int, ...]],
    ) -> None:
        """Raises `UserError` unless the file has the keys that are expected, and perhaps embeddings beside them."""
        known = expected | beside
        named, remedy = (
            f"adapter={self.directory}",
            "give the base it was trained on, and the adapter as it was written",
        )
        for key in sorted(expected | found, key=lambda key: (key in found, key)):
            if key not in found:
                raise UserError(f"{named}: its tensor {key} is missing; {remedy}")
            if key not in known:
                raise UserError(f"{named}: its tensor {key} is unknown; {remedy}")
            if found[key] != known[key]:
                raise UserError(
                    f"{named}: its tensor {key} is {list(found[key])}, and this base takes {list(known[key])}; {remedy}"
                )

    @property
    def receipt(self) -> dict[str, Any]:
        """As `read_receipt` returns it."""
        return read_receipt(self.directory)

    @property
    def trained_on(self) -> str | None:
        """The fingerprint of the base's weights in the receipt; None if there is none."""
        base: TrainedOn = self.receipt.get("base", {})
        return base.get("fingerprint")

    @property
    def trained_in(self) -> str:
        """The form in which training held the base, `bf16` or `nf4`."""
        return trained_in(self.receipt.get("base", {}))

    def check_base(self, weights: StoredWeights) -> None:
        """Raises `UserError` if the receipt says that the adapter was trained on other weights."""
        trained_on = self.trained_on
        if trained_on is not None and trained_on != weights.fingerprint:
            raise UserError(
                f"{weights.named}: its fingerprint is {weights.fingerprint[:16]}…, and base.fingerprint in the "
                f"adapter's {RECEIPT} is {trained_on[:16]}…: the adapter was trained on other weights, or on the same "
                f"in another dtype or layout (the experts in one tensor, or apart); give those, or check_base=false to "
                f"use these anyway"
            )

    def check_numbers(self) -> None:
        """Raises `UserError` if a number of the adapter is not finite, as after a training that diverged."""
        for key in sorted(self.keys):
            if not is_finite(self.tensor(key)):
                raise UserError(
                    f"adapter={self.directory}: its tensor {key} holds numbers that are not finite, as after a "
                    f"training that diverged; give an earlier checkpoint, or train again"
                )

    def check_foldable(self) -> None:
        """Raises `UserError` unless each update changes exactly one parameter of the base, and no other update changes
        that one: otherwise folding would lose an update, or change more than was trained."""
        obstacle = self._obstacle
        for parameter, names in self._shared.items():
            if parameter in self.updates:
                obstacle = f"it changes {parameter}, which is one tensor with {' and '.join(names)} in this base"
        if obstacle is None and (unused := sorted(key for key in self.keys if self._uses[key] != 1)):
            obstacle = f"its tensor {unused[0]} changes no single parameter"
        if obstacle is not None:
            raise UserError(
                f"adapter={self.directory}: {obstacle}, so it can't be folded or merged; give fold=false, which leaves "
                f"it to stock PEFT, or use PEFT itself to merge it, and give the result as base="
            )

    def factors(self, matrix: str) -> tuple[torch.Tensor, torch.Tensor, float]:
        """A [r, in] and B [out, r] as stored, and the scaling, of a matrix."""
        update = self.updates[matrix]
        assert isinstance(update, LowRank)
        A, B = self._cached(update.A), self._cached(update.B)
        if update.transposed:
            A, B = B.T, A.T
        if update.experts is not None:
            A, B = (factors[update.expert] for factors in separate_experts(A, B, update.experts))
        return A, B[update.rows], update.scaling

    def stored(self, matrix: str) -> torch.Tensor | None:
        """What the adapter's file has in place of W, before factors are added; None if W is the base's."""
        update = self.updates[matrix]
        if isinstance(update, LowRank):
            return None if update.base is None else self._cached(update.base)
        tensor = self._cached(update.key)
        return (tensor if update.expert is None else tensor[update.expert])[update.rows]

    def changes(self, matrix: str) -> bool:
        """Whether the factors add anything to a matrix: the factors of untrained experts are zeros."""
        A, B, scaling = self.factors(matrix)
        return bool((scaling * A.abs().amax(1) * B.abs().amax(0)).any())

    def fold(self, matrix: str, weight: torch.Tensor, rows: slice = slice(None)) -> None:
        """Updates `weight` in place: a matrix [out, in], or some rows of it.

        The sum is made in float32 and rounded to the weight's dtype once.
        """
        update = self.updates[matrix]
        if (stored := self.stored(matrix)) is not None:
            weight.copy_(stored[rows])
        if isinstance(update, Replacement):
            return
        A, B, scaling = self.factors(matrix)
        exact = torch.promote_types(weight.dtype, torch.float32)
        A, B = A.to(weight.device, exact), B[rows].to(weight.device, exact).contiguous()
        step = max(1, BLOCK.get(weight.device.type, BLOCK["cuda"]) // weight.shape[1])
        for weight_block, B_block in zip(weight.split(step), B.split(step), strict=True):
            add_product(weight_block, B_block, A, scaling)

    def tensor(self, key: str) -> torch.Tensor:
        """A tensor of the file as it is stored."""
        with safe_open(self.directory / WEIGHTS, "pt") as stored:
            return stored.get_tensor(key)


def _by_matrix(
    parameter: str, tensor: torch.Tensor, update: LowRank | Replacement
) -> Iterator[tuple[str, LowRank | Replacement]]:
    """The matrices of a parameter in Mixtral's original names, each with its part of an update."""
    if tensor.dim() < 3:
        yield original_name(parameter), update
        return
    for matrix, part in stored_parts(parameter, tensor):
        _, expert, rows = parameter_of(matrix, part.shape[0])
        yield matrix, replace(update, expert=expert, rows=rows)


def add_product(weight: torch.Tensor, B: torch.Tensor, A: torch.Tensor, scaling: float) -> None:
    """`weight += scaling · B A` in place, summed in the dtype of the factors and rounded once."""
    weight.copy_(torch.addmm(weight.to(A.dtype), B, A, alpha=scaling))


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether all of its numbers are finite; makes no copy of them."""
    return tensor.numel() == 0 or all(bool(end.isfinite()) for end in tensor.aminmax())


def read_receipt(directory: Path) -> dict[str, Any]:
    """What training recorded beside the adapter; empty if there is no receipt.

    Raises:
        UserError: there is one that can't be read: nobody could tell whether the base is the right one.
    """
    path, remedy = directory / RECEIPT, "give the adapter as it was written, or take the receipt away"
    return dict(read_json(path, Receipt, f"adapter={directory}", remedy, largest=sizes.RECORD)) if path.exists() else {}


def read_settings(directory: Path) -> dict[str, Any]:
    """adapter_config.json of an adapter directory.

    Raises:
        UserError: the directory holds no adapter, or one of its settings is not understood here.
    """
    remedy = "give the directory adapter/ of a training run"
    of_hub = "" if directory.exists() else ", or download one of a hub first"
    if (directory / "config.json").is_file():
        raise UserError(f"adapter={directory}: it is a whole model; give it as base={directory}, without an adapter")
    for name in (CONFIG, WEIGHTS):
        if not (directory / name).is_file():
            raise UserError(f"adapter={directory}: it is not an adapter directory, {name} is missing; {remedy}{of_hub}")
    return adapter_directory.read_settings(directory, f"adapter={directory}")
