"""Where tokens are in their text, and absolute positions added to embeddings.

Shapes: B sequences of S tokens.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from moa_dist.models.documents import Documents, first_of_document


def positions(
    tokens: Tensor,
    token_mask: Tensor | None,
    num_past: int = 0,
    documents: Documents | None = None,
) -> Tensor:
    """Count the real tokens before each of `tokens` [B, S]: [B, S], or [1, S] if all are real.

    Padding has the position of the real token before it. `token_mask` [B, num_past + S] bool and
    `documents`, within each of which tokens are counted, cover tokens read earlier as well.
    """
    if documents is not None:
        # Padding is no part of a document, and its own positions do not matter.
        count = torch.arange(documents.ids.shape[1], device=tokens.device)
        first = count.where(first_of_document(documents.ids), 0).cummax(1).values
        return (count - first)[:, num_past:]
    if token_mask is None:
        return torch.arange(num_past, num_past + tokens.shape[1], device=tokens.device)[None]
    # Padding in front of the first token shares its position.
    return (token_mask.cumsum(1)[:, num_past:] - 1).clamp(min=0)


def sinusoidal_positions(position: Tensor, d_model: int, dtype: torch.dtype) -> Tensor:
    """Embed positions [B, S] -> [B, S, d_model], sines first (Vaswani et al. 2017, section 3.5)."""
    half = d_model // 2
    frequency = torch.exp(
        torch.arange(half, device=position.device) * (-math.log(10000.0) / max(half - 1, 1))
    )
    angle = position[..., None] * frequency
    table = torch.cat([angle.sin(), angle.cos()], dim=-1)
    return F.pad(table, (0, d_model - 2 * half)).to(dtype)
