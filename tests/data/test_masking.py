"""Hidden tokens: shares, and that nothing but the key decides."""

from __future__ import annotations

import numpy as np

from moa_dist.data.masking import hide

MASK, VOCABULARY = 1000, 900


def test_shares_are_those_of_bert() -> None:
    tokens = np.full(200_000, 950)  # which no random token can be
    shown, hidden = hide(tokens, 0, 1, mask_token=MASK, vocab_size=VOCABULARY)
    assert abs(hidden.mean() - 0.15) < 0.003
    of_hidden = shown[hidden]
    assert abs((of_hidden == MASK).mean() - 0.8) < 0.01
    assert abs((of_hidden == 950).mean() - 0.1) < 0.01
    random = of_hidden[of_hidden < VOCABULARY]
    assert abs(len(random) / len(of_hidden) - 0.1) < 0.01
    assert abs(random.mean() / VOCABULARY - 0.5) < 0.02
    assert (shown[~hidden] == 950).all()


def test_key_decides() -> None:
    tokens = np.arange(100)
    one, again, other = (
        hide(tokens, *key, mask_token=MASK, vocab_size=VOCABULARY)
        for key in ((3, 5, 7), (3, 5, 7), (3, 5, 8))
    )
    assert all((a == b).all() for a, b in zip(one, again, strict=True))
    assert (one[1] != other[1]).any()
    # The order of samples, and with it every mask, must survive another version or machine.
    assert np.flatnonzero(one[1]).tolist() == [7, 9, 11, 16, 32, 33, 34, 54, 59, 69, 73, 78, 81, 83]
