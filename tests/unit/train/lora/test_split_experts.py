"""The split forward against a reference that handles one token-expert pair at a time, and against stock PEFT."""

import contextlib
import copy
import functools
import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig as PeftConfig
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from transformers import MixtralConfig, MixtralForCausalLM
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from tests.conftest import Largest
from train.config.lora import EXPERT_TARGETS, LoraConfig
from train.config.model import ArchitectureConfig, ModelConfig
from train.config.train import TrainConfig
from train.lora import attach, dispatch, factors, peft_files, split_experts
from train.model import mixtral

PROJECTIONS = EXPERT_TARGETS


def make_experts(
    *,
    experts: int,
    hidden: int,
    intermediate: int,
    lora_rank: int | tuple[int, ...],
    dtype: torch.dtype,
    targets: tuple[str, ...],
    dropout: float = 0.0,
) -> nn.Module:
    config = MixtralConfig(hidden_size=hidden, intermediate_size=intermediate, num_local_experts=experts)
    config._experts_implementation = split_experts.IMPLEMENTATION
    holder = nn.ModuleDict({"experts": MixtralExperts(config)}).to(dtype)
    for weight in holder.parameters():
        nn.init.normal_(weight, std=0.3)
        weight.requires_grad_(False)
    ranks = [[lora_rank] * experts if isinstance(lora_rank, int) else list(lora_rank)]
    factors.attach(holder, ranks=ranks, projections=targets, scaling=factors.Scaling(3), dropout=dropout)
    for name, factor in holder.named_parameters():
        if name.endswith("_lora_B"):
            nn.init.normal_(factor, std=0.3)
    return holder["experts"]


def reference(
    experts: nn.Module,
    x: torch.Tensor,
    index: torch.Tensor,
    weights: torch.Tensor,
    keep: dict[str, torch.Tensor] | None = None,
) -> torch.Tensor:
    """Each token through each of its experts by plain matrix-vector products; shares no code with the split forward.

    `keep` is what dropout leaves of the adapters' inputs, [token-expert pairs, in] for each projection.
    """

    def project(name: str, expert: int, vector: torch.Tensor, pair: int) -> torch.Tensor:
        out = getattr(experts, name)[expert] @ vector
        if name in experts.lora and (rank := experts.lora[name].ranks[expert]):
            if keep is not None:
                vector = torch.where(keep[name][pair], vector / (1 - experts.lora[name].dropout), 0.0)
            above = sum(experts.lora[name].ranks[:expert])
            A, B = (getattr(experts, f"{name}_lora_{letter}")[above : above + rank] for letter in "AB")
            out = out + 3 / rank * (B.T @ (A @ vector))
        return out

    rows = []
    for token in range(x.shape[0]):
        total = torch.zeros_like(x[token])
        for slot in range(index.shape[1]):
            expert = int(index[token, slot])
            pair = token * index.shape[1] + slot
            gate, up = project("gate_up_proj", expert, x[token], pair).chunk(2)
            total = total + weights[token, slot] * project("down_proj", expert, nn.functional.silu(gate) * up, pair)
        rows.append(total)
    return torch.stack(rows)


def forward_and_gradients(run, experts: nn.Module, x: torch.Tensor, index, weights) -> list[torch.Tensor]:
    x = x.clone().requires_grad_()
    weights = weights.clone().requires_grad_()
    out = run(experts, x, index, weights)
    factors = [factor for factor in experts.parameters() if factor.requires_grad]
    mixture = torch.linspace(-1, 1, out.numel(), dtype=out.dtype, device=out.device).view_as(out)
    gradients = torch.autograd.grad((out * mixture).sum(), [x, weights, *factors], allow_unused=True)
    filled = [torch.zeros_like(p) if g is None else g for g, p in zip(gradients, [x, weights, *factors], strict=True)]
    return [out.detach(), *filled]


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
        targets=draw(st.sampled_from([PROJECTIONS, PROJECTIONS[:1], PROJECTIONS[1:], ()])),
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
        patch.setattr(dispatch, "row_multiple", lambda x: multiple)
        ours = example.forward_and_gradients(torch.float64)
    for a, b in zip(ours, example.expected(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@contextlib.contextmanager
def all_in_one_product() -> Iterator[None]:
    """The way of GPUs with a kernel for it, through torch's grouped product, which is there on the CPU as well."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "row_multiple", lambda x: 1)
        patch.setattr(dispatch, "in_one_product", lambda x, sizes: True)
        yield


@given(example=examples(whole=4))
def test_all_experts_in_one_product_equal_the_reference(example: Example) -> None:
    with all_in_one_product():
        ours = example.forward_and_gradients(torch.float32)
    for a, b in zip(ours, example.expected(), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4)


def masks(experts: nn.Module, pairs: int, device: str = "cpu") -> dict[str, torch.Tensor] | None:
    """What dropout keeps, drawn in the order and on the device of the forward; on the CPU."""
    if not any(adapter.dropout for adapter in experts.lora.values()):
        return None
    drawn = {}
    for name, adapter in sorted(experts.lora.items(), key=lambda item: EXPERT_TARGETS.index(item[0])):
        size_in = getattr(experts, name).shape[-1]
        drawn[name] = split_experts.draw_keep(pairs, size_in, adapter.dropout, torch.device(device)).cpu()
    return drawn


def test_dropout_is_drawn_for_each_pair_at_its_rate_and_not_in_evaluation() -> None:
    torch.manual_seed(0)
    keep = split_experts.draw_keep(500, 400, 0.3, torch.device("cpu"))
    assert keep.shape == (500, 400)
    assert float(keep.float().mean()) == pytest.approx(0.7, abs=0.005)
    assert float(keep.float().mean(dim=0).std()) < 0.03  # no input is favoured: √(0.3 · 0.7 / 500) is 0.02
    assert float(keep.float().mean(dim=1).std()) < 0.03
    sizes = {"experts": 4, "hidden": 16, "intermediate": 32, "lora_rank": 8, "targets": PROJECTIONS, "dropout": 0.5}
    experts = make_experts(**sizes, dtype=torch.float32)
    x, index = torch.randn(10, 16), torch.stack([torch.randperm(4)[:2] for _ in range(10)])
    first, second = (split_experts.split_lora_forward(experts, x, index, torch.ones(10, 2)) for _ in range(2))
    assert not torch.equal(first, second)
    experts.eval()
    first, second = (split_experts.split_lora_forward(experts, x, index, torch.ones(10, 2)) for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("way", [contextlib.nullcontext, all_in_one_product])
@pytest.mark.parametrize("lora_rank", [3, 8, 16, (16, 3, 0, 8, 1, 16, 0, 5)])
def test_bfloat16_stays_within_its_rounding(lora_rank: int | tuple[int, ...], way: Any) -> None:
    torch.manual_seed(0)
    sizes = {"experts": 8, "hidden": 64, "intermediate": 96, "lora_rank": lora_rank, "targets": PROJECTIONS}
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


FROZEN = {"experts": 4, "hidden": 16, "intermediate": 32, "targets": PROJECTIONS}


def routed(tokens: int, experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.stack([torch.randperm(experts)[:2] for _ in range(tokens)]), torch.rand(tokens, 2)


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
    weights_of = {getattr(experts, name).untyped_storage().data_ptr() for name in PROJECTIONS}
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
    sizes = {"experts": 8, "hidden": 512, "intermediate": 128, "lora_rank": 4, "targets": PROJECTIONS}
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
    assert largest.numel <= (16 + 8 * dispatch.ROW_MULTIPLE) * 512 < experts.down_proj.numel() / 3
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
        PeftConfig(r=4, target_modules=[], target_parameters=[f"experts.{name}" for name in PROJECTIONS]),
        autocast_adapter_dtype=False,
    )
    assert counted_memory(lambda: step(peft.base_model.model["experts"]))[0] > frozen


def counted_memory(run: Callable[[], None]) -> tuple[int, int]:
    """The bytes that torch's profiler sees allocated at the peak, and those in the end."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = profiler.profiler.kineto_results.events()
    changes = sorted((event for event in events if event.name() == "[memory]"), key=lambda event: event.start_ns())
    held = list(itertools.accumulate(change.nbytes() for change in changes))
    return max(held), held[-1]


def test_tokens_are_sorted_gathered_and_counted_once_for_a_block() -> None:
    """The backward uses what the forward found."""
    torch.manual_seed(0)
    experts = make_experts(**FROZEN, lora_rank=8, dtype=torch.float32)
    index, weights = routed(30, 4)
    x = torch.randn(30, 16, requires_grad=True)
    with Calls() as calls:
        out = split_experts.split_lora_forward(experts, x, index, weights)
    assert [calls.of["sort"], calls.of["searchsorted"]] == [1, 1]
    assert calls.of["index_select"] == 4 + 2  # the tokens of each expert, then the outputs of each choice
    with Calls() as calls:
        out.sum().backward()
    assert [calls.of["sort"], calls.of["searchsorted"]] == [0, 0]


@pytest.mark.parametrize("lora_rank", [8, (8, 0, 0, 8), (8, 4, 0, 8)])
def test_all_experts_in_one_product_make_the_host_wait_for_nothing(lora_rank: int | tuple[int, ...]) -> None:
    """Once the constants of the adapters are there: no number is asked for, none comes from a Python list, and none of
    the operations that have to know how much they will give. One rank for all that have an adapter is one scale."""
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
    assert calls.of["bucketize"] == (2 * 2 if lora_rank == (8, 4, 0, 8) else 0)


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


@pytest.mark.parametrize(
    ("dtype", "capability", "has"),
    [
        (torch.bfloat16, None, False),  # no CUDA device
        (torch.bfloat16, (8, 0), False),
        (torch.bfloat16, (8, 9), False),
        (torch.bfloat16, (9, 0), True),
        (torch.bfloat16, (10, 3), True),
        (torch.bfloat16, (12, 0), False),
        (torch.float16, (9, 0), False),
        (torch.float32, (9, 0), False),
    ],
)
def test_the_grouped_product_is_used_where_torch_has_a_kernel_for_it(
    dtype: torch.dtype, capability: tuple[int, int] | None, has: bool
) -> None:
    assert dispatch.has_grouped_kernel(dtype, capability) == has


def test_a_seed_gives_the_same_start_whatever_the_device() -> None:
    """The numbers are drawn on the CPU; on the meta device, where a plan is made, there are none."""
    how = {"ranks": [[4] * 4] * 2, "projections": PROJECTIONS, "scaling": factors.Scaling(8)}
    with torch.device("meta"):
        planned = mixtral.random_base(nano_config().model)
        with Calls() as calls:
            factors.attach(planned, **how)
    assert calls.of["uniform_"] == 0
    assert planned.model.layers[0].mlp.experts.gate_up_proj_lora_A.is_meta
    starts = []
    for dtype in ("float32", "bfloat16"):
        config = nano_config()
        config.model.dtype = dtype
        base = mixtral.random_base(config.model)
        torch.manual_seed(3)
        factors.attach(base, **how)
        starts.append(base.model.layers[1].mlp.experts.down_proj_lora_A.detach())
    assert torch.equal(starts[0].bfloat16(), starts[1])


class Calls(TorchDispatchMode):
    """Counts operations by name."""

    def __init__(self) -> None:
        super().__init__()
        self.of: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.of[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_all_that_trains_has_the_dtype_of_the_base(dtype: str) -> None:
    """Mixed dtypes fail under ZeRO-3; float32 masters are DeepSpeed's."""
    config = nano_config(router="trained")
    config.model.dtype = dtype
    adapted = mixtral.random_base(config.model)
    attach.add_adapters(adapted, config.lora)
    assert {parameter.dtype for parameter in adapted.parameters()} == {getattr(torch, dtype)}


def test_dropout_is_the_same_when_activations_are_computed_again() -> None:
    config = nano_config(dropout=0.5)
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        adapted = mixtral.random_base(config.model).train()
        attach.add_adapters(adapted, config.lora)
        for _, factor in attach.trainable(adapted):
            nn.init.normal_(factor, std=0.2)
        if checkpointing:
            adapted.activation_checkpointing_enable({"use_reentrant": False})
        ids = torch.randint(3, 500, (2, 25))
        torch.manual_seed(1)
        adapted(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        gradients.append({name: factor.grad for name, factor in attach.trainable(adapted)})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], msg=name)


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


def test_a_fresh_adapter_changes_nothing() -> None:
    torch.manual_seed(0)
    config = nano_config()
    plain = mixtral.random_base(config.model).eval()
    adapted = copy.deepcopy(plain)
    attach.add_adapters(adapted, config.lora)
    ids = torch.randint(3, 500, (1, 30))
    with torch.no_grad():
        torch.testing.assert_close(adapted(ids).logits, plain(ids).logits, rtol=1e-5, atol=1e-5)


# Stock PEFT


def nano_config(**lora: object) -> TrainConfig:
    architecture = ArchitectureConfig(
        vocab_size=500,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
    )
    return TrainConfig(
        model=ModelConfig(architecture=architecture, dtype="float32"),
        lora=LoraConfig(**({"rank": 4, "alpha": 8} | lora)),  # type: ignore[arg-type]
    )


def trained_nano(config: TrainConfig) -> tuple[MixtralForCausalLM, MixtralForCausalLM]:
    """A float64 base, and the same with adapters that are not zero."""
    torch.manual_seed(0)
    base = mixtral.random_base(config.model).double().eval()
    base.set_experts_implementation("eager")  # torch's grouped product knows no float64
    adapted = copy.deepcopy(base)
    attach.add_adapters(adapted, config.lora)
    for _, factor in attach.trainable(adapted):
        nn.init.normal_(factor, std=0.2)
    return base, adapted


def save(directory: Path, config: TrainConfig, adapted: MixtralForCausalLM) -> None:
    tensors = {name: factor.detach() for name, factor in attach.trainable(adapted)}
    peft_files.write(directory, config.model, config.lora, tensors, factors.adapters(adapted))


@pytest.mark.parametrize(
    "lora",
    [
        {},
        {"attention": []},
        {"projections": ["gate_up_proj"]},
        {"projections": ["down_proj"], "attention": ["q_proj", "v_proj"]},
        {"projections": []},
    ],
    ids=["all", "experts-only", "gate-up-only", "down-and-two-attention", "attention-only"],
)
def test_a_saved_adapter_gives_the_same_logits_in_stock_peft(tmp_path: Path, lora: dict[str, list[str]]) -> None:
    config = nano_config(**lora)
    base, adapted = trained_nano(config)
    save(tmp_path, config, adapted)

    stock = PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path), autocast_adapter_dtype=False).eval()
    ids = torch.randint(3, 500, (2, 25), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours, theirs, without = adapted(ids).logits, stock(ids).logits, base(ids).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    assert (ours - without).abs().max() > 0.01


def test_the_layout_is_that_of_pefts_own_delta_weight(tmp_path: Path) -> None:
    """Expert by expert: PEFT's W' - W must be s · B_e A_e of the same expert, not of a neighbour."""
    config = nano_config(attention=[])
    base, adapted = trained_nano(config)
    save(tmp_path, config, adapted)
    stock = PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path), autocast_adapter_dtype=False)

    seen = 0
    for wrapper in stock.modules():
        if not hasattr(wrapper, "parameter_name"):
            continue
        delta = wrapper.get_delta_weight("default")
        owner = next(name for name, module in stock.named_modules() if module is wrapper)
        layer = int(owner.split(".layers.")[1].split(".")[0])
        ours = adapted.model.layers[layer].mlp.experts
        A, B = (getattr(ours, f"{wrapper.parameter_name}_lora_{letter}").unflatten(0, (4, 4)) for letter in "AB")
        for expert in range(4):
            torch.testing.assert_close(delta[expert], 2.0 * B[expert].T @ A[expert], rtol=1e-10, atol=1e-10)
            seen += 1
    assert seen == 2 * 2 * 4  # layers × projections × experts


def test_keys_and_shapes_are_those_that_stock_peft_writes(tmp_path: Path) -> None:
    config = nano_config()
    base, adapted = trained_nano(config)
    save(tmp_path, config, adapted)
    ours = {key: tuple(tensor.shape) for key, tensor in load_file(tmp_path / "adapter_model.safetensors").items()}
    stock = get_peft_model(
        base,
        PeftConfig(
            r=4,
            lora_alpha=8,
            target_modules=list(config.lora.attention),
            target_parameters=[f"mlp.experts.{name}" for name in PROJECTIONS],
        ),
    )
    assert ours == {key: tuple(tensor.shape) for key, tensor in get_peft_model_state_dict(stock).items()}
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "LORA"


def test_gradients_are_those_of_stock_peft(tmp_path: Path) -> None:
    config = nano_config()
    base, adapted = trained_nano(config)
    save(tmp_path, config, adapted)
    stock = PeftModel.from_pretrained(base, str(tmp_path), autocast_adapter_dtype=False, is_trainable=True)
    ids = torch.randint(3, 500, (2, 25), generator=torch.Generator().manual_seed(1))
    for trained in (adapted, stock):
        trained(input_ids=ids, labels=ids).loss.backward()

    theirs = {n.replace(".default.", "."): p.grad for n, p in stock.named_parameters() if p.requires_grad}
    gradients = {name: factor.grad for name, factor in attach.trainable(adapted)}
    ours = peft_files.to_peft(config.lora, gradients, factors.adapters(adapted))
    assert ours.keys() == theirs.keys()
    for key, gradient in ours.items():
        torch.testing.assert_close(gradient, theirs[key], rtol=1e-9, atol=1e-11)


def test_an_unknown_projection_is_refused() -> None:
    with pytest.raises(ValueError, match="w1"):
        factors.attach(nn.Module(), ranks=[], projections=("w1",), scaling=factors.Scaling(8))


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
