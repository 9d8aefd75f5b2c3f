"""The same code on CUDA. Skipped without a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.unit.train.test_attention import masked, positions_of
from tests.unit.train.test_expert_lora import forward_and_gradients, make_experts, reference
from train import expert_lora
from train.attention import packed_attention
from train.config import EXPERT_TARGETS

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    "lora_rank",
    [3, 16, (16, 8, 0, 8, 16, 16, 0, 8)],  # 3 is no whole 16 bytes: a product for each expert; else one for all
    ids=["one-by-one", "grouped", "a-rank-for-each"],
)
def test_the_split_forward_on_cuda_equals_the_reference(lora_rank: int | tuple[int, ...]) -> None:
    torch.manual_seed(0)
    sizes = {"experts": 8, "hidden": 64, "intermediate": 96, "lora_rank": lora_rank}
    experts = make_experts(**sizes, dtype=torch.bfloat16, targets=EXPERT_TARGETS)
    x = torch.randn(64, 64, dtype=torch.bfloat16)
    index = torch.stack([torch.randperm(7)[:2] for _ in range(64)])  # the last expert gets no token
    weights = torch.rand(64, 2, dtype=torch.bfloat16)
    theirs = forward_and_gradients(reference, experts.double(), x.double(), index, weights.double())
    on_gpu = experts.to("cuda", torch.bfloat16)
    ours = forward_and_gradients(expert_lora.split_lora_forward, on_gpu, x.cuda(), index.cuda(), weights.cuda())
    for a, b in zip(ours, theirs, strict=True):
        assert (a.cpu().double() - b).norm() <= 2**-6 * b.norm()


def test_packed_attention_on_cuda_equals_the_masked() -> None:
    torch.manual_seed(0)
    lengths = [300, 1, 41, 170]
    tensors = [torch.randn(1, n, sum(lengths), 64).bfloat16() for n in (8, 2, 2)]
    weights = torch.randn(1, sum(lengths), 8, 64)
    results = []
    for device, dtype in (("cuda", torch.bfloat16), ("cpu", torch.float64)):
        q, k, v = (tensor.to(device, dtype).requires_grad_() for tensor in tensors)
        if device == "cuda":
            positions = positions_of(lengths)[None].cuda()
            out, _ = packed_attention(torch.nn.Module(), q, k, v, None, 0.3, position_ids=positions)
        else:
            out = masked(q, k, v, lengths)
        (out * weights.to(device, dtype)).sum().backward()
        results.append([tensor.detach().cpu().double() for tensor in (out, q.grad, k.grad, v.grad)])
    for a, b in zip(*results, strict=True):
        assert (a - b).norm() <= 2**-6 * b.norm()


def test_training_on_cuda_lowers_the_loss(tmp_path: Path) -> None:
    def program(*arguments: str) -> None:
        environment = {k: v for k, v in os.environ.items() if k != "DS_ACCELERATOR"}
        subprocess.run([sys.executable, "-m", *arguments], cwd=ROOT, env=environment, check=True)

    program("data", "data=sample_general", f"output={tmp_path}/prepared")
    where = (f"dataset={tmp_path}/prepared", f"run_dir={tmp_path}/run")
    program("train", "recipe=quickstart_base", "logging=quiet", "hardware.device=cuda", "max_steps=20", *where)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["evaluation_loss"] for line in lines if "evaluation_loss" in line]
    assert losses[-1] < losses[0]
