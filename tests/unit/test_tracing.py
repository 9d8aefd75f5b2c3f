"""What the tracer of `scripts/benchmark.py traffic` counts, against what can be counted by hand."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture
def tracing(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    from benchmarks.harness import tracing

    yield tracing
    for name in [name for name in sys.modules if name.partition(".")[0] == "benchmarks"]:
        del sys.modules[name]


def counted(tracing: Any, run: Any) -> list[tuple[str, int, int, int]]:
    """Name, bytes read, bytes written and operations of each."""
    with tracing.Trace() as trace:
        run()
    each = [(name, one) for (_, name, _), sums in trace.counted.items() for one in sums]
    return [(name, one.read, one.written, one.flops) for name, one in each]


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_bytes_are_those_of_the_tensors(tracing: Any, device: str) -> None:
    a, b = torch.ones(2, 3, device=device), torch.ones(2, 3, device=device)
    half, index = torch.ones(8, 3, dtype=torch.bfloat16, device=device), torch.tensor([1, 5], device=device)
    two = torch.ones(2, 3, dtype=torch.bfloat16, device=device)
    expected = {
        "add": (lambda: a + b, 48, 24),
        "add_": (lambda: a.add_(b), 48, 24),
        "copy_": (lambda: a.copy_(b), 24, 24),
        "zero_": (a.zero_, 0, 24),
        "mul": (lambda: torch.mul(a, b, out=torch.empty_like(a)), 48, 24),
        "index_select": (lambda: half.index_select(0, index), 2 * 6 + 16, 2 * 6),
        "index_put_": (lambda: half.index_put_((index,), two), 2 * 6 + 16, 2 * 6),
        "sum": (lambda: a[:1].expand(5, 3).sum(), 12, 4),  # what is there once is read once
    }
    for name, (run, read, written) in expected.items():
        assert counted(tracing, run) == [(name, read, written, 0)], name


def test_views_and_empty_tensors_move_nothing(tracing: Any) -> None:
    a = torch.ones(4, 6)
    assert counted(tracing, lambda: (a.view(6, 4).T[1:].unsqueeze(0), torch.empty_like(a), a.detach())) == []


def test_products_are_counted_with_their_operations(tracing: Any) -> None:
    x, weight, total = torch.ones(8, 4), torch.ones(4, 6), torch.ones(8, 6)
    assert counted(tracing, lambda: x @ weight) == [("mm", 4 * (32 + 24), 4 * 48, 2 * 8 * 4 * 6)]
    in_place = [("addmm", 4 * (48 + 32 + 24), 4 * 48, 2 * 8 * 4 * 6)]
    assert counted(tracing, lambda: torch.addmm(total, x, weight, out=total)) == in_place
    ((name, *figures),) = counted(tracing, lambda: total.addmm_(x, weight))
    assert (name, figures) == ("addmm_", [4 * (48 + 32 + 24), 4 * 48, 2 * 8 * 4 * 6])
    columns = x.T.contiguous()
    ends, matrices = torch.tensor([2, 8], dtype=torch.int32), torch.ones(2, 4, 4)
    ((name, *_, flops),) = counted(tracing, lambda: F.grouped_mm(x, matrices, offs=ends))
    assert (name, flops) == ("_grouped_mm", 2 * 8 * 4 * 4)
    ((name, *_, flops),) = counted(tracing, lambda: F.grouped_mm(columns, x, offs=ends))
    assert (name, flops) == ("_grouped_mm", 2 * 8 * 4 * 4)


def test_an_operation_takes_as_long_as_what_holds_it_up(tracing: Any) -> None:
    assert tracing.Sum(1, 300, 100, 50).seconds(flops=10, bandwidth=200) == 5
    assert tracing.Sum(1, 300, 100, 5).seconds(flops=10, bandwidth=200) == 2


def test_what_is_computed_again_is_counted(tracing: Any) -> None:
    """A layer of Mixtral's, 128 tokens: the forward's products once more, those of attention or all but the last."""
    from benchmarks import traffic

    of_products = {}
    for what in ("none", "attention", "full"):
        trace = traffic.trace_layer(128, 16, 0.0, what)
        of_products[what] = {
            phase: sum(one.flops for one in traffic.totals(trace, phase)["products"]) for phase in traffic.PHASES
        }
    assert len({each["forward"] for each in of_products.values()}) == 1
    again = {what: each["backward"] - of_products["none"]["backward"] for what, each in of_products.items()}
    on_attention = 128 * 2 * 2 * 4096 * (4096 + 1024)
    assert on_attention <= again["attention"] <= 1.1 * on_attention  # scores and adapters on top
    assert 0.6 <= again["full"] / of_products["full"]["forward"] <= 1
