"""The same code on CUDA. Skipped without a GPU."""

import copy
import functools
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter

from tests.support import operators
from tests.support.experts import forward_and_gradients, make_experts, masks, reference
from tests.support.nano import nano_config
from tests.support.references import check_norm, chunked, masked, positions_of, whole
from train.config.lora import EXPERT_TARGETS
from train.lora import elementwise, products, split_experts
from train.model import mixtral, rotary
from train.model.attention import packed_attention

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

ROOT = Path(__file__).parents[2]


TOLERANCES = {torch.bfloat16: 2**-6, torch.float32: 1e-4, torch.float64: 1e-10}


@pytest.mark.parametrize("dtype", TOLERANCES)  # in bfloat16 torch's grouped product where it has a kernel
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("lora_rank", [3, 16, (16, 8, 0, 5, 16, 16, 0, 8)])
def test_the_split_forward_on_cuda_equals_the_reference(
    lora_rank: int | tuple[int, ...], dropout: float, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    sizes = {"experts": 8, "hidden": 64, "intermediate": 96, "lora_rank": lora_rank, "dropout": dropout}
    experts = make_experts(**sizes, dtype=dtype, targets=EXPERT_TARGETS)
    x = torch.randn(64, 64, dtype=dtype)
    index = torch.stack([torch.randperm(7)[:2] for _ in range(64)])  # the last expert gets no token
    weights = torch.rand(64, 2, dtype=dtype)
    torch.manual_seed(1)
    keep = masks(experts, index.numel(), "cuda")
    exact = copy.deepcopy(experts).double()
    run = functools.partial(reference, keep=keep)
    theirs = forward_and_gradients(run, exact, x.double(), index, weights.double())
    # Memory that was used before and is given out again holds NaN, as it would after other work.
    used = torch.full((64 << 20,), torch.nan, device="cuda")
    del used
    torch.manual_seed(1)
    on_gpu = experts.to("cuda")
    ours = forward_and_gradients(split_experts.split_lora_forward, on_gpu, x.cuda(), index.cuda(), weights.cuda())
    for a, b in zip(ours, theirs, strict=True):
        assert (a.cpu().double() - b).norm() <= TOLERANCES[dtype] * b.norm()


@pytest.mark.parametrize("dtype", operators.TOLERANCES)
@pytest.mark.parametrize("size", operators.SIZES)
def test_the_operators_are_triton_kernels_and_right(dtype: torch.dtype, size: int) -> None:
    assert elementwise._kernels() is not None
    operators.check_swiglu(elementwise, dtype, size, "cuda")
    operators.check_weighted_sum(elementwise, dtype, size, torch.float32, "cuda")
    for width, position_rows in itertools.product(operators.WIDTHS, (1, 2)):
        operators.check_rotary(rotary, dtype, width, position_rows, "cuda")


@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_the_norm_on_cuda_is_transformers(dtype: torch.dtype, trains: bool) -> None:
    check_norm(dtype, trains, "cuda")


def test_a_step_of_a_block_takes_less_memory_than_its_frozen_weights() -> None:
    torch.manual_seed(0)
    sizes = {"experts": 8, "hidden": 1024, "intermediate": 2048, "lora_rank": 16}
    experts = make_experts(**sizes, dtype=torch.bfloat16, targets=EXPERT_TARGETS).cuda()
    frozen = 2 * (experts.gate_up_proj.numel() + experts.down_proj.numel())
    x = torch.randn(64, 1024, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    index = torch.stack([torch.randperm(8)[:2] for _ in range(64)]).cuda()
    weights = torch.rand(64, 2, dtype=torch.bfloat16, device="cuda")
    for _ in range(2):  # the first also makes what libraries keep
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        split_experts.split_lora_forward(experts, x, index, weights).sum().backward()
    assert torch.cuda.max_memory_allocated() - before < frozen / 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_head_on_cuda_equals_that_over_whole_logits(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(600, 64).to(dtype), (torch.randn(500, 64) / 8).to(dtype)
    targets = torch.randint(0, 500, (600,))
    results = []
    for loss_of, device, wide in ((chunked, "cuda", dtype), (whole, "cpu", torch.float64)):
        h, w = (
            hidden.to(device, wide, copy=True).requires_grad_(),
            torch.nn.Parameter(weight.to(device, wide, copy=True)),
        )
        loss = loss_of(h, w, targets.to(device))
        loss.backward()
        results.append([tensor.detach().cpu().double() for tensor in (loss, h.grad, w.grad)])
    for a, b in zip(*results, strict=True):
        assert (a - b).norm() <= TOLERANCES[dtype] * b.norm()


@pytest.mark.parametrize("own", [torch.bfloat16, torch.float32])  # flash attention, and blocks of queries
def test_packed_attention_on_cuda_equals_the_masked(own: torch.dtype) -> None:
    torch.manual_seed(0)
    lengths = [300, 1, 41, 170]
    tensors = [torch.randn(1, n, sum(lengths), 64).to(own) for n in (8, 2, 2)]
    weights = torch.randn(1, sum(lengths), 8, 64)
    results = []
    for device, dtype in (("cuda", own), ("cpu", torch.float64)):
        q, k, v = (tensor.to(device, dtype, copy=True).requires_grad_() for tensor in tensors)
        if device == "cuda":
            positions = positions_of(lengths)[None].cuda()
            out, _ = packed_attention(torch.nn.Module(), q, k, v, None, 0.3, position_ids=positions)
        else:
            out = masked(q, k, v, lengths)
        (out * weights.to(device, dtype)).sum().backward()
        results.append([tensor.detach().cpu().double() for tensor in (out, q.grad, k.grad, v.grad)])
    for a, b in zip(*results, strict=True):
        assert (a - b).norm() <= TOLERANCES[own] * b.norm()


def test_at_mixtrals_size_the_grouped_product_equals_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """8,192 rows: what int32 ends, strides and alignment make of them."""
    torch.manual_seed(0)
    sizes = {"experts": 8, "hidden": 4096, "intermediate": 14336, "lora_rank": 16}
    with torch.device("cuda"):
        experts = make_experts(**sizes, dtype=torch.bfloat16, targets=EXPERT_TARGETS)
        x, weights = torch.randn(4096, 4096, dtype=torch.bfloat16), torch.rand(4096, 2, dtype=torch.bfloat16)
        index = torch.rand(4096, 8).topk(2).indices
    if products.way(x, (4096, 14336)) is not products.AllExperts:
        pytest.skip("this GPU has no kernel for the grouped product")
    results = []
    for way in (products.AllExperts, products.OneExpert):
        monkeypatch.setattr(products, "way", lambda x, sizes, way=way: way)
        results.append(forward_and_gradients(split_experts.split_lora_forward, experts, x, index, weights))
    for a, b in zip(*results, strict=True):
        assert (a.float() - b.float()).norm() <= 2**-6 * b.float().norm()


@pytest.mark.parametrize("what", ["attention", "full"])
def test_the_routers_choose_the_same_when_activations_are_computed_again(what: str) -> None:
    """CUDA computes them in another thread, with other workspaces. Where a token fell to another expert, the gradients
    would still be right; that it happens is worth knowing."""
    config = nano_config()
    config.model.dtype, config.activation_checkpointing = "bfloat16", what
    adapted = mixtral.build(config).cuda().train()
    chosen: dict[str, list[torch.Tensor]] = {}
    for name, module in adapted.named_modules():
        if isinstance(module, MixtralTopKRouter):
            module.register_forward_hook(
                lambda _, __, out, name=name: chosen.setdefault(name, []).append(out[2].clone())
            )
    ids = torch.randint(3, 500, (4, 512), device="cuda")
    adapted(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    assert {name: len(of_router) for name, of_router in chosen.items()} == dict.fromkeys(
        chosen, 2 if what == "full" else 1
    )
    assert all(torch.equal(of_router[0], of_router[-1]) for of_router in chosen.values())


@pytest.mark.parametrize("zero", ["none", "zero2", "zero3"])
def test_training_on_cuda_lowers_the_loss(tmp_path: Path, zero: str) -> None:
    """In full, and then adapters with all options on top of that, with activations computed again."""

    def program(*arguments: str) -> None:
        environment = {k: v for k, v in os.environ.items() if k != "DS_ACCELERATOR"}
        subprocess.run([sys.executable, "-m", *arguments], cwd=ROOT, env=environment, check=True)

    program("data", "data=sample_general", f"output={tmp_path}/prepared")
    common = ("logging=quiet", "hardware.device=cuda", f"deepspeed={zero}", f"dataset={tmp_path}/prepared")
    program("train", "recipe=quickstart_base", *common, "max_steps=20", f"run_dir={tmp_path}/base")
    options = ("lora.dropout=0.1", "lora.router=trained", "lora.expert_ranks=[16,8,8,0,8,8,4,4]")
    how = ("activation_checkpointing=full", f"model.path={tmp_path}/base/model", "max_steps=60", "optim.lr=2e-3")
    program("train", "recipe=quickstart", *common, *options, *how, f"run_dir={tmp_path}/run")
    for name in ("base", "run"):
        lines = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        losses = [line["evaluation_loss"] for line in lines if "evaluation_loss" in line]
        assert losses[-1] < losses[0], name
