"""The split forward and backward against a reference that handles one token-expert pair at a time."""

import contextlib
import copy
import functools
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig as PeftConfig
from peft import get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from tests.conftest import Largest
from tests.support.counting import Calls, counted_memory
from tests.support.experts import (
    all_in_one_product,
    forward_and_gradients,
    make_experts,
    masks,
    reference,
    routed,
)
from train.config.lora import EXPERT_TARGETS
from train.lora import products, split_experts

FROZEN = {"experts": 4, "hidden": 16, "intermediate": 32, "targets": EXPERT_TARGETS}


@dataclass
class Example:
    """A block with adapters, and tokens with their routing, all in float64."""

    experts: nn.Module
    x: torch.Tensor
    index: torch.Tensor
    weights: torch.Tensor
    seed: int

    def forward_and_gradients(self, dtype: torch.dtype) -> list[torch.Tensor]:
        """By the split forward, in another dtype."""
        experts = copy.deepcopy(self.experts).to(dtype)
        torch.manual_seed(self.seed)
        return forward_and_gradients(
            split_experts.split_lora_forward, experts, self.x.to(dtype), self.index, self.weights.to(dtype)
        )

    def expected(self) -> list[torch.Tensor]:
        """By the reference, with the same dropout."""
        torch.manual_seed(self.seed)
        run = functools.partial(reference, keep=masks(self.experts, self.index.numel()))
        return forward_and_gradients(run, self.experts, self.x, self.index, self.weights)


@st.composite
def examples(draw: st.DrawFn, *, whole: int = 1) -> Example:
    """Sizes up to 24, in multiples of `whole`."""
    seed = draw(st.integers(0, 2**31))
    torch.manual_seed(seed)
    number, tokens = draw(st.integers(1, 8)), draw(st.integers(1, 16))
    k = draw(st.integers(1, min(3, number)))
    size = st.integers(1, 24 // whole).map(lambda size: size * whole)
    # one rank for all, or one for each with experts that have no adapter among them
    ranks = st.one_of(st.integers(1, 9), st.tuples(*[st.integers(0, 5)] * number))
    experts = make_experts(
        experts=number,
        hidden=draw(size),
        intermediate=draw(size),
        lora_rank=draw(ranks),
        dtype=torch.float64,
        targets=draw(st.sampled_from([EXPERT_TARGETS, EXPERT_TARGETS[:1], EXPERT_TARGETS[1:], ()])),
        dropout=draw(st.sampled_from([0.0, 0.4])),
    )
    # Experts without a token, and at the extreme all tokens on the same.
    used = draw(st.integers(k, number))
    among = torch.randperm(number)[:used]
    index = torch.stack([among[torch.randperm(used)[:k]] for _ in range(tokens)])
    x, weights = torch.randn(tokens, experts.hidden_dim).double(), torch.rand(tokens, k).double()
    return Example(experts, x, index, weights, seed)


@given(example=examples(), multiple=st.sampled_from([1, 1, 4]))
def test_split_forward_and_backward_equal_the_reference_in_float64(example: Example, multiple: int) -> None:
    """Also with the rows of experts filled up, as they are in half precision."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(products.OneExpert, "row_multiple", lambda x: multiple)
        ours = example.forward_and_gradients(torch.float64)
    for a, b in zip(ours, example.expected(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@given(example=examples(whole=4))
def test_all_experts_in_one_product_equal_the_reference(example: Example) -> None:
    with all_in_one_product():
        ours = example.forward_and_gradients(torch.float32)
    for a, b in zip(ours, example.expected(), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4)


def test_weights_that_train_get_the_references_gradient() -> None:
    """Training in full, `lora=none`, goes through the same forward; one expert gets no token."""
    torch.manual_seed(0)
    experts = make_experts(experts=4, hidden=6, intermediate=10, lora_rank=3, dtype=torch.float64, targets=())
    experts.requires_grad_(True)
    x, weights = torch.randn(9, 6, dtype=torch.float64), torch.rand(9, 2, dtype=torch.float64)
    index = torch.stack([torch.randperm(3)[:2] for _ in range(9)])
    ours = forward_and_gradients(split_experts.split_lora_forward, experts, x, index, weights)
    theirs = forward_and_gradients(reference, experts, x, index, weights)
    assert len(ours) == 5
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("way", [contextlib.nullcontext, all_in_one_product])
@pytest.mark.parametrize("lora_rank", [3, 8, 16, (16, 3, 0, 8, 1, 16, 0, 5)])
def test_bfloat16_stays_within_its_rounding(lora_rank: int | tuple[int, ...], way: Any) -> None:
    torch.manual_seed(0)
    sizes = {"experts": 8, "hidden": 64, "intermediate": 96, "lora_rank": lora_rank, "targets": EXPERT_TARGETS}
    experts = make_experts(**sizes, dtype=torch.bfloat16)
    exact = copy.deepcopy(experts).double()
    x = torch.randn(40, 64, dtype=torch.bfloat16)
    index = torch.stack([torch.randperm(8)[:2] for _ in range(40)])
    weights = torch.rand(40, 2, dtype=torch.bfloat16)

    with way():
        ours = forward_and_gradients(split_experts.split_lora_forward, experts, x, index, weights)
    theirs = forward_and_gradients(reference, exact, x.double(), index, weights.double())
    for a, b in zip(ours, theirs, strict=True):
        # bfloat16 keeps 8 bits: one rounding is 2^-9 of the value, and a handful of them follow one another.
        assert (a.double() - b).norm() <= 2**-6 * b.norm()


def test_dropout_is_drawn_for_each_pair_at_its_rate_and_not_in_evaluation() -> None:
    torch.manual_seed(0)
    keep = split_experts.draw_keep(500, 400, 0.3, torch.device("cpu"))
    assert keep.shape == (500, 400)
    assert float(keep.float().mean()) == pytest.approx(0.7, abs=0.005)
    assert float(keep.float().mean(dim=0).std()) < 0.03  # no input is favoured: √(0.3 · 0.7 / 500) is 0.02
    assert float(keep.float().mean(dim=1).std()) < 0.03
    sizes = {"experts": 4, "hidden": 16, "intermediate": 32, "lora_rank": 8, "targets": EXPERT_TARGETS, "dropout": 0.5}
    experts = make_experts(**sizes, dtype=torch.float32)
    x, index = torch.randn(10, 16), torch.stack([torch.randperm(4)[:2] for _ in range(10)])
    first, second = (split_experts.split_lora_forward(experts, x, index, torch.ones(10, 2)) for _ in range(2))
    assert not torch.equal(first, second)
    experts.eval()
    first, second = (split_experts.split_lora_forward(experts, x, index, torch.ones(10, 2)) for _ in range(2))
    assert torch.equal(first, second)


def test_frozen_weights_get_no_gradient_and_no_work_for_one() -> None:
    """Counted by torch: forward, and backward for inputs, once each; the factors' share comes on top."""
    torch.manual_seed(0)
    experts = make_experts(**FROZEN, lora_rank=8, dtype=torch.float32)
    tokens, hidden, intermediate, lora_rank = 10, 16, 32, 8
    x = torch.randn(tokens, hidden, requires_grad=True)
    index, weights = routed(tokens, 4)
    with FlopCounterMode(display=False) as counter:
        split_experts.split_lora_forward(experts, x, index, weights).square().sum().backward()
    assert experts.gate_up_proj.grad is None
    assert experts.down_proj.grad is None
    assert all(factor.grad is not None for factor in experts.parameters() if factor.requires_grad)
    pairs = tokens * 2
    frozen = 2 * pairs * (hidden * 2 * intermediate + intermediate * hidden)
    # A and B of both projections: forward, input gradient, and their own gradient
    low = 2 * pairs * lora_rank * (hidden + 2 * intermediate + intermediate + hidden)
    assert counter.get_total_flops() == 2 * frozen + 3 * low


def test_what_the_backward_keeps_holds_no_view_of_a_weight() -> None:
    """Under ZeRO-3 a view would keep the gathered block alive until the backward; the parameter itself does not."""
    torch.manual_seed(0)
    experts = make_experts(**FROZEN, lora_rank=8, dtype=torch.float32)
    weights_of = {getattr(experts, name).untyped_storage().data_ptr() for name in EXPERT_TARGETS}
    views, kept = [], 0

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal kept
        kept += tensor.numel() * (not isinstance(tensor, nn.Parameter))
        if tensor.untyped_storage().data_ptr() in weights_of and not isinstance(tensor, nn.Parameter):
            views.append(tuple(tensor.shape))
        return tensor

    index, weights = routed(100, 4)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        split_experts.split_lora_forward(experts, torch.randn(100, 16, requires_grad=True), index, weights)
    assert views == []
    # x, the routing weights, the gate and up values, the outputs, and s·A x of both projections
    activations = 100 * 16 + 100 * 2 + 200 * (2 * 32 + 16 + 2 * 8)
    assert kept == activations + 2 * 200 + 4  # the rows of the pairs and the pairs of the rows, the experts' ends


def test_memory_of_a_step_does_not_grow_with_the_weights() -> None:
    """The largest tensor is one of activations; torch's own counter sees a peak of less than half the frozen weights,
    and in the end nothing but the factors' gradients. Stock PEFT's peak, counted alike, is more than all of them."""
    torch.manual_seed(0)
    sizes = {"experts": 8, "hidden": 512, "intermediate": 128, "lora_rank": 4, "targets": EXPERT_TARGETS}
    experts = make_experts(**sizes, dtype=torch.bfloat16)
    index, weights = routed(8, 8)
    x = torch.randn(8, 512, dtype=torch.bfloat16)
    factors = [factor for factor in experts.parameters() if factor.requires_grad]

    def step(block: nn.Module) -> None:
        block(x.requires_grad_(), index, weights.bfloat16()).float().sum().backward()
        x.grad = None

    step(experts)  # what is made once, such as generated code
    for factor in factors:
        factor.grad = None
    with Largest() as largest:
        step(experts)
    assert largest.numel <= (16 + 8 * products.ROW_MULTIPLE) * 512 < experts.down_proj.numel() / 3
    for factor in factors:
        factor.grad = None
    frozen = 2 * (experts.gate_up_proj.numel() + experts.down_proj.numel())
    peak, left = counted_memory(lambda: step(experts))
    assert peak < frozen / 2
    assert left == 2 * sum(factor.numel() for factor in factors)

    config = copy.deepcopy(experts.config)
    config._experts_implementation = "grouped_mm"
    peft = get_peft_model(
        nn.ModuleDict({"experts": MixtralExperts(config).bfloat16()}),
        PeftConfig(r=4, target_modules=[], target_parameters=[f"experts.{name}" for name in EXPERT_TARGETS]),
        autocast_adapter_dtype=False,
    )
    assert counted_memory(lambda: step(peft.base_model.model["experts"]))[0] > frozen


def test_tokens_are_sorted_gathered_and_counted_once_for_a_block() -> None:
    """The backward uses what the forward found."""
    torch.manual_seed(0)
    experts = make_experts(**FROZEN, lora_rank=8, dtype=torch.float32)
    index, weights = routed(30, 4)
    x = torch.randn(30, 16, requires_grad=True)
    with Calls() as calls:
        out = split_experts.split_lora_forward(experts, x, index, weights)
    assert [calls.of["sort"], calls.of["searchsorted"]] == [1, 1]
    assert [calls.of["index_select"], calls.of["weighted_sum"]] == [4, 1]  # the tokens of each expert
    with Calls() as calls:
        out.sum().backward()
    assert [calls.of["sort"], calls.of["searchsorted"]] == [0, 0]


@pytest.mark.parametrize("lora_rank", [8, (8, 0, 0, 8), (8, 4, 0, 8)])
def test_all_experts_in_one_product_make_the_host_wait_for_nothing(lora_rank: int | tuple[int, ...]) -> None:
    """Once the constants of the adapters are there: no number is asked for, none comes from a Python list, and none of
    the operations that have to know how much they will give."""
    torch.manual_seed(0)
    experts = make_experts(**FROZEN, lora_rank=lora_rank, dtype=torch.float32)
    index, weights = routed(30, 4)
    x = torch.randn(30, 16, requires_grad=True)
    with all_in_one_product():
        split_experts.split_lora_forward(experts, x, index, weights).sum().backward()
        with Calls() as calls:
            split_experts.split_lora_forward(experts, x, index, weights).sum().backward()
    waiting = {"_local_scalar_dense", "bincount", "nonzero", "lift_fresh", "_to_copy", "masked_select"}
    assert {name for name in waiting if calls.of[name]} <= {"_to_copy"}  # of the groups' ends to int32, on the device


@pytest.mark.parametrize("lora_rank", [8, (8, 4, 0, 8)])
def test_one_expert_after_another_asks_the_device_once_in_each_direction(lora_rank: int | tuple[int, ...]) -> None:
    """For all the experts' ends, so that a GPU without the grouped kernel waits once, not once for each product."""
    torch.manual_seed(0)
    experts = make_experts(**FROZEN, lora_rank=lora_rank, dtype=torch.float32)
    index, weights = routed(30, 4)
    x = torch.randn(30, 16, requires_grad=True)
    lists = []

    def listed(tensor: torch.Tensor) -> Any:
        lists.append(tensor)
        return to_list(tensor)

    to_list = torch.Tensor.tolist
    with pytest.MonkeyPatch.context() as patch, Calls() as calls:
        patch.setattr(torch.Tensor, "tolist", listed)
        out = split_experts.split_lora_forward(experts, x, index, weights)
        assert len(lists) == 1
        out.sum().backward()
    assert len(lists) == 2
    assert calls.of["_local_scalar_dense"] == 0


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("lora_rank", [8, (8, 3, 0, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])  # in bfloat16 the rows of an expert are filled up
@pytest.mark.parametrize("way", [contextlib.nullcontext, all_in_one_product])
def test_a_token_routed_elsewhere_when_activations_are_computed_again_gives_the_gradients_of_that_routing(
    way: Any, dtype: torch.dtype, lora_rank: int | tuple[int, ...], dropout: float
) -> None:
    """One of 512, as rounding may do to a token that stands between two experts: every row behind it moves."""
    torch.manual_seed(0)
    experts = make_experts(**FROZEN, lora_rank=lora_rank, dtype=dtype, dropout=dropout)
    tokens = 512
    x = torch.randn(tokens, 16, dtype=dtype)
    index, weights = routed(tokens, 4)
    flipped = index.clone()
    flipped[100, 0] = next(expert for expert in range(4) if expert not in index[100])

    def gradients(*routings: torch.Tensor) -> list[torch.Tensor]:
        """Of the last routing, which the backward must see; the one before is that of the forward."""
        waiting = list(routings)

        def again(experts: nn.Module, x: torch.Tensor, _: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
            def block(x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
                return split_experts.split_lora_forward(experts, x, waiting.pop(0), weights)

            out: torch.Tensor = checkpoint(block, x, weights, use_reentrant=False)
            return out

        torch.manual_seed(1)
        _, *found = forward_and_gradients(again, experts, x, index, weights.to(dtype))
        assert not waiting
        return found

    with way():
        ours, expected, before = gradients(index, flipped), gradients(flipped, flipped), gradients(index, index)
    assert not torch.equal(expected[0], before[0])
    for a, b in zip(ours, expected, strict=True):
        assert torch.equal(a, b)
