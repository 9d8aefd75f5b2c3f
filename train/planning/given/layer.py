"""How long one layer of the run takes on this machine, and the head: training's own code on random weights."""

import copy
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn
from transformers import MixtralForCausalLM

from data.disk import nf4
from data.disk.loading.layers import quantise
from data.schema import IGNORE_INDEX
from train.config.train import TrainConfig
from train.lora import attach, split_experts
from train.model import mixtral, norm
from train.model.loss import MixtralWithLoss
from train.planning.given.rows import Rows
from train.planning.given.sizes import Sizes

TIMES, MOST, ENOUGH = 3, 12, 4.0
"""Forwards and backwards, the first of which is not counted: the fewest, the most, and the seconds after which no more
are begun."""
CACHES = 1 << 28
"""Bytes, more than caches hold."""
LARGE = 10**8
"""Elements from which on drawing random numbers takes longer than it is worth."""


def seconds_of_layer(config: TrainConfig, sizes: Sizes, rows: Rows, device: torch.device) -> dict[str, float]:
    """Medians, as a run is judged by the median of its steps: `forward` and `backward` of a layer, nothing computed
    again, `head` with its loss, and `around` these, from the embedding to the routers' loss; and the `tokens` of the
    micro-batch.

    Args:
        config: of the run.
        sizes: of base and adapters.
        rows: whose micro-batch is taken: as long, with as long conversations and as many supervised tokens.
        device: where it is computed.
    """
    module = MixtralWithLoss(_one_layer(config, sizes, device).train(), with_router_loss=config.router_aux_loss > 0)
    module.differentiates_input = True
    tokens = rows.length * config.micro_batch
    positions = (torch.arange(tokens) % max(1, round(rows.conversation)))[None]
    watch = _Watch(module, device, _others(sizes))
    took: list[dict[str, float]] = []
    began = time.perf_counter()
    while len(took) < TIMES or (len(took) < MOST and time.perf_counter() - began < ENOUGH):
        # Another one each time, as in a run: experts get other numbers of rows, for which oneDNN makes code anew.
        ids = torch.randint(3, sizes.config.vocab_size, (1, tokens))
        targets = torch.where(torch.rand(1, tokens) < rows.supervised, ids, IGNORE_INDEX)
        batch = [tensor.to(device) for tensor in (ids, positions, targets, torch.ones_like(ids, dtype=torch.bool))]
        watch.note("begins")
        cross_entropy, balance = module(*batch)
        (cross_entropy / tokens + config.router_aux_loss * balance).backward()
        watch.note("ends")
        took.append(watch.taken())
        module.zero_grad(set_to_none=True)
    return {"tokens": tokens} | {name: statistics.median(each[name] for each in took[1:]) for name in took[0]}


def _one_layer(config: TrainConfig, sizes: Sizes, device: torch.device) -> MixtralForCausalLM:
    architecture = copy.deepcopy(sizes.config)
    architecture.num_hidden_layers = 1
    architecture.use_cache = False
    dtype = mixtral.DTYPES[config.model.dtype]
    with torch.device("meta"):
        model = MixtralForCausalLM._from_config(architecture, dtype=dtype, attn_implementation=config.model.attention)
    model.to_empty(device=device)
    rotary = model.model.rotary_emb
    model.model.rotary_emb = type(rotary)(architecture).to(device)
    with torch.no_grad():
        for parameter in model.parameters():
            # Large ones may be the same everywhere: the embedding and the router alone decide who goes where.
            parameter.fill_(1e-3) if parameter.numel() > LARGE and parameter.dim() > 2 else parameter.normal_(std=0.02)
    norm.replace(model)
    if config.lora.method == "none":
        model.set_experts_implementation(split_experts.IMPLEMENTATION)
    else:
        attach.add_adapters(model, config.lora)
    if config.model.weights == nf4.FORM:
        quantise(model, f"model.weights={nf4.FORM}")
    return model


def _others(sizes: Sizes) -> int:
    """Bytes of the base that a run passes between two passes of the same layer, as far as caches can tell."""
    of_layer = sum(tensor.bytes for unit in sizes.units if unit.layer == 0 for tensor in unit.tensors)
    return min(CACHES, sizes.bytes - of_layer)


class _Watch:
    """Notes when a layer and the head begin and end, and lets a layer find in the caches what a run would have left.

    A run comes back to a layer after all others. One layer alone would find its weights in the caches each time.
    """

    def __init__(self, module: MixtralWithLoss, device: torch.device, others: int):
        self._device, self._at = device, dict[str, float]()
        self._others, self._passing = torch.zeros(others, dtype=torch.uint8, device=device), 0.0
        layer: nn.Module = module.causal_lm.model.layers[0]
        layer.register_forward_pre_hook(self._pass_others)
        layer.register_full_backward_pre_hook(self._pass_others)
        for name, of in (("forward", layer), ("head", module.head)):
            of.register_forward_pre_hook(self._noting(f"{name} begins"))
            of.register_forward_hook(self._noting(f"{name} ends"))
        layer.register_full_backward_pre_hook(self._noting("backward begins"))
        layer.register_full_backward_hook(self._noting("backward ends"))

    def _noting(self, name: str) -> Callable[..., None]:
        return lambda *_: self.note(name)

    def _pass_others(self, *_: object) -> None:
        began = self._now()
        self._others += 1
        self._passing += self._now() - began

    def _now(self) -> float:
        """The time, once the device has come so far."""
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def note(self, name: str) -> None:
        """Notes the time, once the device has come so far."""
        self._at[name] = self._now()

    def taken(self) -> dict[str, float]:
        """Seconds of each since the last call."""
        at, passing, self._passing = self._at, self._passing, 0.0
        took = {name: at[f"{name} ends"] - at[f"{name} begins"] for name in ("forward", "backward", "head")}
        return took | {"around": max(0.0, at["ends"] - at["begins"] - passing - sum(took.values()))}
