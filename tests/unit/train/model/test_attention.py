"""Packed attention against torch's own with a whole mask."""

import pyarrow as pa
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data.prepared.dataset import PAD_RUN, PackedTable
from data.prepared.layout import ROW_SCHEMA
from data.schema import PackedRow
from tests.conftest import Largest, Live
from tests.support.references import masked, positions_of
from train.model.attention import KEYS, QUERIES, Conversations, packed_attention


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 220), min_size=1, max_size=6),
    heads=st.sampled_from([(4, 4), (4, 2), (6, 1)]),
    seed=st.integers(0, 2**31),
)
def test_values_and_gradients_equal_those_with_a_mask_in_float64(
    lengths: list[int], heads: tuple[int, int], seed: int
) -> None:
    torch.manual_seed(seed)
    tokens = sum(lengths)
    tensors = [torch.randn(1, n, tokens, 8, dtype=torch.float64) for n in (heads[0], heads[1], heads[1])]
    weights = torch.randn(1, tokens, heads[0], 8, dtype=torch.float64)
    results = []
    for which in ("ours", "theirs"):
        q, k, v = (tensor.clone().requires_grad_() for tensor in tensors)
        if which == "ours":
            out, _ = packed_attention(torch.nn.Module(), q, k, v, None, 0.3, position_ids=positions_of(lengths)[None])
        else:
            out = masked(q, k, v, lengths)
        (out * weights).sum().backward()
        results.append([out.detach(), q.grad, k.grad, v.grad])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_rows_of_a_batch_are_apart() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, n, 50, 8, dtype=torch.float64) for n in (4, 2, 2))
    positions = torch.stack([positions_of([20, 30]), positions_of([50])])
    out, _ = packed_attention(torch.nn.Module(), q, k, v, None, 0.3, position_ids=positions)
    for row, lengths in enumerate(([20, 30], [50])):
        alone = masked(*(tensor[row : row + 1] for tensor in (q, k, v)), lengths)
        torch.testing.assert_close(out[row : row + 1], alone, rtol=1e-10, atol=1e-10)


def test_bfloat16_stays_within_its_rounding() -> None:
    torch.manual_seed(0)
    lengths = [300, 41, 170]
    q, k, v = (2 * torch.randn(1, n, sum(lengths), 64).bfloat16() for n in (8, 2, 2))
    exact = masked(q.double(), k.double(), v.double(), lengths)
    ours, _ = packed_attention(torch.nn.Module(), q, k, v, None, 0.3, position_ids=positions_of(lengths)[None])
    assert (ours.double() - exact).norm() <= 2**-8 * exact.norm()  # two roundings of 2^-9, one after the other


def test_blocks_hold_little_that_no_conversation_sees() -> None:
    lengths = [100] * 40 + [96]
    blocks = Conversations(positions_of(lengths)).blocks()
    computed = sum(block.bias().numel() for block in blocks)
    assert max(block.bias().numel() for block in blocks) <= QUERIES * (100 + QUERIES + KEYS)
    assert computed < sum(lengths) ** 2 / 10
    seen = sum(int((block.bias() == 0).sum()) for block in blocks)
    assert seen == sum(length * (length + 1) // 2 for length in lengths)


def test_padding_costs_little_and_makes_few_conversations() -> None:
    """Each slot as a conversation would be thousands, all slots as one would cost the square of their number."""
    rows = [PackedRow(ids=[1] * 100, spans=[1, 99], lengths=[100], rows=[0])]
    columns = {name: [getattr(row, name) for row in rows] for name in ROW_SCHEMA.names}
    batch = PackedTable(pa.table(columns, schema=ROW_SCHEMA), seq_len=4096).batch([0, None])
    conversations = Conversations(batch.positions.flatten())
    assert len(conversations.bounds) - 1 == 1 + -(-3996 // PAD_RUN) + 4096 // PAD_RUN
    assert conversations.longest == PAD_RUN
    assert max(block.bias().numel() for block in conversations.blocks()) <= QUERIES * (PAD_RUN + QUERIES + KEYS)


def test_no_tensor_of_the_square_of_a_row_is_made() -> None:
    lengths = [100] * 40 + [96]
    tokens = sum(lengths)
    q, k, v = (torch.randn(1, n, tokens, 8, requires_grad=True) for n in (4, 2, 2))
    with Largest() as largest:
        out, _ = packed_attention(torch.nn.Module(), q, k, v, None, 0.3, position_ids=positions_of(lengths)[None])
        out.sum().backward()
    assert largest.numel <= 4 * QUERIES * (100 + QUERIES + KEYS) < tokens**2 / 50


def test_the_mask_of_one_block_exists_at_a_time() -> None:
    """Those of all blocks of one long conversation together would be half of a [T, T] mask."""
    tokens = 4096
    q, k, v = (torch.randn(1, 1, tokens, 8, requires_grad=True) for _ in range(3))
    with Live() as live:
        out, _ = packed_attention(torch.nn.Module(), q, k, v, None, 0.3, position_ids=positions_of([tokens])[None])
        out.sum().backward()
    block = 4 * QUERIES * tokens
    assert live.peak <= 6 * block < 4 * tokens**2 / 4
