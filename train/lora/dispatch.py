"""Tokens to experts: the token-expert pairs of a block, sorted by expert.

Shapes: E experts, T tokens, k experts per token, H hidden, P rows: token-expert pairs sorted by expert, and filling.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Routed:
    """Which row each token-expert pair has when the pairs are sorted by expert: found once per block.

    top_k_index   | 1 0 | 0 2 |             tokens 0 and 1 of E = 3 experts; here filled up to multiples of 2 rows
    pair_P        | 1 2 | 0 - | 3 - |       the pair of each row, expert by expert; - is filling
    token_P       | 0 1 | 0 - | 1 - |       its token
    row_of_Tk     | 2 0 | 1 4 |

    The shapes are the same for every routing of as many tokens. When activations are computed again, a token that
    stands between two experts may fall to another one than before. The backward must then see that routing and no
    other, so all it needs is in `tensors`, saved with the activations that belong to it.
    """

    row_of_Tk: torch.Tensor
    pair_P: torch.Tensor
    """As many of them as the largest number of filling rows requires."""
    ends_E: torch.Tensor
    """The end of each expert's rows, filling included."""
    token_P: torch.Tensor

    @classmethod
    def from_choices(cls, top_k_index: torch.Tensor, experts: int, multiple: int) -> "Routed":
        """Sorts the pairs.

        Args:
            top_k_index: [T, k] int64, the experts that the router chose.
            experts: E.
            multiple: each expert's rows are filled up to a multiple of this.
        """
        device = top_k_index.device
        expert_S, order_S = top_k_index.flatten().sort(stable=True)
        # not bincount, which makes a CUDA device tell the host the largest expert first
        stops_E = torch.searchsorted(expert_S, torch.arange(experts, device=device), right=True)
        counts_E = stops_E.diff(prepend=stops_E.new_zeros(1))
        filled_E = (counts_E + multiple - 1) // multiple * multiple
        filling_E = filled_E - counts_E
        row_S = torch.arange(len(order_S), device=device) + (filling_E.cumsum(0) - filling_E)[expert_S]
        row_of_Tk = torch.empty_like(order_S)
        row_of_Tk[order_S] = row_S
        # Filling rows repeat the first pair: numbers like any other, which nothing reads and whose gradient is 0.
        pair_P = order_S.new_zeros(len(order_S) + experts * (multiple - 1))
        pair_P[row_S] = order_S
        return cls.from_tensors(row_of_Tk.view(top_k_index.shape), pair_P, filled_E.cumsum(0))

    @classmethod
    def from_tensors(cls, row_of_Tk: torch.Tensor, pair_P: torch.Tensor, ends_E: torch.Tensor) -> "Routed":
        """The inverse of `tensors`."""
        return cls(row_of_Tk, pair_P, ends_E, pair_P // row_of_Tk.shape[1])

    @property
    def tensors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """All that the backward needs to know of the routing."""
        return self.row_of_Tk, self.pair_P, self.ends_E
