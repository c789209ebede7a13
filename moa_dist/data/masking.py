"""Hides tokens for masked language models.

As in BERT (Devlin et al. 2018, arXiv 1810.04805, section 3.1), 15 % of the tokens are predicted;
of these 80 % are replaced by the mask token, 10 % by a random one, and 10 % are left unchanged. The
choice is a pure function of a key, such as (seed, sample): masks differ between epochs, are the
same in any layout, and continue exactly after a restart.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

HIDDEN, MASKED, RANDOM = 0.15, 0.8, 0.1
"""Share of tokens to predict, and the shares of those replaced by the mask and a random token."""

Ids = NDArray[np.int64]


def hide(tokens: Ids, *key: int, mask_token: int, vocab_size: int) -> tuple[Ids, NDArray[np.bool_]]:
    """Return the tokens to show instead of `tokens` [L], and a mask of those to predict [L].

    Random tokens are below `vocab_size`. `key` consists of non-negative integers.
    """
    raw = np.random.PCG64(np.random.SeedSequence(key)).random_raw(3 * len(tokens))
    chosen, replaced = raw[: 2 * len(tokens)].reshape(2, -1) / 2.0**64
    random = (raw[2 * len(tokens) :] % vocab_size).astype(np.int64)
    hidden = chosen < HIDDEN
    shown = np.where(hidden & (replaced < MASKED), mask_token, tokens)
    by_random = hidden & (replaced >= MASKED) & (replaced < MASKED + RANDOM)
    return np.where(by_random, random, shown), hidden
