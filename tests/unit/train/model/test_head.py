"""The chunked cross-entropy against torch's own over whole logits, in float64 and at the edges."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from tests.conftest import Largest
from tests.support.references import chunked, whole
from train.model.head import CHUNK


def compare(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, tolerance: float) -> float:
    """Asserts that loss and gradients of both are the same; the loss."""
    results = []
    for loss_of in (chunked, whole):
        h, w = hidden.clone().requires_grad_(), nn.Parameter(weight.clone())
        loss = loss_of(h, w, targets)
        (loss / 3).backward()
        results.append([loss.detach(), h.grad, w.grad])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
    return float(results[0][0])


@pytest.mark.parametrize("positions", [0, 1, CHUNK, 2 * CHUNK + 37])
def test_loss_and_gradients_equal_those_over_whole_logits_in_float64(positions: int) -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(positions, 16).double(), torch.randn(90, 16).double()
    compare(hidden, weight, torch.randint(0, 90, (positions,)), 1e-12)


def test_a_target_that_is_almost_impossible_has_its_exact_loss_in_float32() -> None:
    hidden = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    weight = torch.tensor([[200.0, 0.0], [0.0, 0.0], [100.0, 0.0]])
    loss = compare(hidden, weight, torch.tensor([1, 0, 2]), 1e-5)
    assert loss == pytest.approx(200 + 1.0986123, rel=1e-6)


def test_the_loss_of_bfloat16_is_summed_in_float32() -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(700, 32).bfloat16(), torch.randn(500, 32).bfloat16()
    targets = torch.randint(0, 500, (700,))
    loss = chunked(hidden, nn.Parameter(weight), targets).detach()
    assert loss.dtype == torch.float32
    expected = F.cross_entropy(F.linear(hidden, weight).double(), targets, reduction="sum")
    assert float(loss) == pytest.approx(float(expected), rel=1e-6)


def test_without_autograd_no_gradient_is_computed() -> None:
    """A weight that trains says that it needs one, also in evaluation."""
    hidden, weight = torch.randn(CHUNK + 3, 8), nn.Parameter(torch.randn(300, 8))
    targets = torch.randint(0, 300, (CHUNK + 3,))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        evaluated = chunked(hidden, weight, targets)
    assert counter.get_total_flops() == 2 * hidden.numel() * 300
    assert torch.equal(evaluated, chunked(hidden, weight, targets).detach())


def test_logits_of_more_than_a_chunk_never_exist() -> None:
    hidden, weight = torch.randn(4 * CHUNK, 8, requires_grad=True), nn.Parameter(torch.randn(300, 8))
    with Largest() as largest:
        chunked(hidden, weight, torch.randint(0, 300, (4 * CHUNK,))).backward()
    assert largest.numel == CHUNK * 300
