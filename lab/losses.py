"""Sums of losses, which the steps of all tasks return."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lab.batches import IGNORE


def summed(losses: Tensor) -> Tensor:
    """Sum losses in float64, or in float32 on MPS, which has nothing better."""
    return losses.sum(dtype=torch.float32 if losses.device.type == "mps" else torch.float64)


def token_loss(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return the negative log-likelihoods of the targets, summed, in nats, and how many targets there are.

    Args:
        logits: (B, T, vocabulary).
        targets: (B, T), int64, `IGNORE` where padded.
    """
    losses = F.cross_entropy(
        logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="none"
    )  # (B*T,), 0 where padded
    return summed(losses), (targets != IGNORE).sum()
