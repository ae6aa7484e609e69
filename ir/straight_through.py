"""Masks that are hard going forward and soft going back, so that scores receive a gradient.

A hard mask does not change under a small change of the scores: its gradient is zero everywhere.
With M = hard + soft - stop(soft) the value is the hard mask and the gradient that of the soft one
(Bengio et al., arXiv 1308.3432).
"""

from __future__ import annotations

import torch

from zeroskip.ir.patterns import NM, Block, SparsityPattern, Unstructured


def straight_through(
    log_scores: torch.Tensor,
    keep: torch.Tensor,
    thresholds: torch.Tensor,
    pattern: SparsityPattern,
    temperature: float,
) -> torch.Tensor:
    """Returns the mask as numbers: the values of `keep`, the gradient of a sigmoid.

    soft = sigmoid((log score - threshold) / temperature); thresholds count as constants.

    Args:
        log_scores: Natural logarithms, [out, in].
        keep: Boolean [out, in]: what the pattern keeps of these scores.
        thresholds: What `find_thresholds` gives.
        pattern: The pattern that chose what is kept.
        temperature: Width of the soft step, in units of log score.
    """
    soft = torch.sigmoid((_competitors(log_scores, pattern) - thresholds) / temperature)
    if isinstance(pattern, Block):
        soft = soft.repeat_interleave(pattern.rows, 0).repeat_interleave(pattern.columns, 1)
    return keep + (soft - soft.detach())


@torch.no_grad()
def find_thresholds(
    log_scores: torch.Tensor, keep: torch.Tensor, pattern: SparsityPattern
) -> torch.Tensor:
    """Returns what a score has to pass to be kept, in a shape that broadcasts against the scores.

    Midway between the highest score that is pruned and the lowest that is kept, among those that
    compete; infinite where all are kept or all pruned, so that the soft step has no slope there.

    Args:
        log_scores: Natural logarithms, [out, in]; blocks compete by the logarithm of their sum.
        keep: Boolean [out, in]: what the pattern keeps of these scores.
        pattern: The pattern that chose it.
    """
    scores = _competitors(log_scores, pattern)
    if isinstance(pattern, Block):
        keep = keep[:: pattern.rows, :: pattern.columns]
    width = scores.shape[1]
    if isinstance(pattern, NM):
        padding = (0, -width % pattern.m)
        # What fills up a short group is neither kept nor the highest that is pruned.
        scores = torch.nn.functional.pad(scores, padding, value=-torch.inf).view(-1, pattern.m)
        keep = torch.nn.functional.pad(keep, padding).view(-1, pattern.m)
    elif not isinstance(pattern, Unstructured) or pattern.comparison == "matrix":
        scores, keep = scores.reshape(1, -1), keep.reshape(1, -1)
    lowest_kept = scores.masked_fill(~keep, torch.inf).amin(1, keepdim=True)
    highest_pruned = scores.masked_fill(keep, -torch.inf).amax(1, keepdim=True)
    middle = (lowest_kept + highest_pruned) / 2
    if not isinstance(pattern, NM):
        return middle
    return middle.expand_as(scores).reshape(len(log_scores), -1)[:, :width]


def _competitors(log_scores: torch.Tensor, pattern: SparsityPattern) -> torch.Tensor:
    """The scores that compete with one another: of weights, or of whole blocks."""
    if not isinstance(pattern, Block):
        return log_scores
    out, width = log_scores.shape
    blocks = log_scores.view(out // pattern.rows, pattern.rows, width // pattern.columns, -1)
    return blocks.logsumexp((1, 3))
