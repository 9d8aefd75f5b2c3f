"""Packed sequences → the log-likelihoods of their continuations."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from inference.evaluation.sequences import PackedSequences

HEAD_ROWS = 256
"""Positions whose logits are held at a time: 32 MB each for logits and log-softmax at Mixtral's vocabulary."""


@dataclass(frozen=True, slots=True)
class LogLikelihood:
    """How likely a continuation is."""

    total: float
    """The sum over its ids of their log-probabilities, natural logarithm; the softmax is in float32."""
    is_greedy: bool
    """Whether each id was the likeliest."""


@torch.inference_mode()
def log_likelihoods(model: PreTrainedModel, packed: PackedSequences) -> list[LogLikelihood]:
    """The log-likelihood of each sequence's continuation, from one forward of the model.

    The head is applied where a continuation is predicted, and nowhere else.
    """
    causal = causal_model(model)
    device = model.device
    window = getattr(causal.config, "sliding_window", None)
    hidden_TH = causal.model(
        input_ids=torch.tensor([packed.ids], device=device),
        position_ids=torch.tensor([packed.positions], device=device),
        attention_mask=_additive(packed, causal.dtype, window).to(device),
        use_cache=False,
    ).last_hidden_state[0]
    # The position at which each id of each continuation is predicted.
    positions: list[int] = []
    targets: list[int] = []
    for path, sequence in zip(packed.paths, packed.sequences, strict=True):
        positions += path[-sequence.continuation :]
        targets += sequence.ids[-sequence.continuation :]
    totals, greedy = _scores(causal, hidden_TH, positions, targets)
    results, start = [], 0
    for sequence in packed.sequences:
        end = start + sequence.continuation
        results.append(LogLikelihood(float(totals[start:end].sum()), bool(greedy[start:end].all())))
        start = end
    return results


def causal_model(model: PreTrainedModel) -> Any:
    """The Mixtral within stock PEFT's wrapper, whose layers it has; without one, the model."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _scores(
    causal: Any, hidden_TH: torch.Tensor, positions: list[int], targets: list[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """[N] float64 log-probability of each target, and [N] whether it was the likeliest, both on the CPU."""
    totals, greedy = [], []
    # MMLU's four letters are predicted at one position: its logits are computed once.
    unique, inverse = torch.tensor(positions).unique(return_inverse=True)
    of_target = torch.tensor(targets)
    order = inverse.argsort(stable=True)
    bounds = torch.searchsorted(inverse[order], torch.arange(0, len(unique) + HEAD_ROWS, HEAD_ROWS))
    for first, (begin, end) in enumerate(zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)):
        rows = unique[first * HEAD_ROWS : (first + 1) * HEAD_ROWS].to(hidden_TH.device)
        logits_NV = causal.lm_head(hidden_TH[rows]).float()
        asked = order[begin:end]
        row = (inverse[asked] - first * HEAD_ROWS).to(logits_NV.device)
        target = of_target[asked].to(logits_NV.device)
        totals.append((logits_NV[row, target] - logits_NV.logsumexp(-1)[row]).double().cpu())
        greedy.append((logits_NV.argmax(-1)[row] == target).cpu())
    back = order.argsort()
    return torch.cat(totals)[back], torch.cat(greedy)[back]


def _additive(packed: PackedSequences, dtype: torch.dtype, window: int | None) -> torch.Tensor:
    """[1, 1, T, T]: 0 where an id is attended to, the lowest number of the dtype elsewhere."""
    attended = packed.mask()
    if window is not None:
        positions = torch.tensor(packed.positions)
        attended &= positions[:, None] - positions[None, :] < window
    additive = torch.zeros(attended.shape, dtype=dtype)
    return additive.masked_fill_(~attended, torch.finfo(dtype).min)[None, None]
