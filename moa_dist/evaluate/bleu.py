"""Measures BLEU with sacrebleu, an optional dependency, and records its signature."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from moa_dist.errors import DataError
from moa_dist.evaluate.trained import Trained
from moa_dist.evaluate.translate import Progress, Search, translate


class Bleu(NamedTuple):
    """Holds a BLEU score and how it was measured."""

    score: float
    """The score, from 0 to 100."""
    signature: str
    """Sacrebleu's tokenizer, smoothing and version; compare only scores with equal signatures."""


def require_sacrebleu() -> None:
    """Raise DataError if sacrebleu is not installed."""
    try:
        import sacrebleu  # noqa: F401
    except ImportError as error:
        raise DataError(
            "BLEU needs sacrebleu, which is not installed; run: pip install 'moa-dist[bleu]'"
        ) from error


def bleu(
    trained: Trained,
    sources: Sequence[str],
    references: Sequence[str],
    search: Search,
    *,
    batch: int,
    progress: Progress | None = None,
) -> Bleu:
    """Translate a corpus and score it against one reference per source; see `translate`.

    Raises:
        DataError: there are no sources, the number of references differs, sacrebleu is missing,
            or `translate` raises it.
    """
    require_sacrebleu()
    from sacrebleu.metrics.bleu import BLEU

    if len(sources) != len(references):
        raise DataError(
            f"{len(sources)} texts to translate, but {len(references)} references: line i of one "
            "file must be the translation of line i of the other",
            key="references",
        )
    if not sources:
        raise DataError("no text to translate: the files are empty; give others", key="sources")
    found = translate(trained, sources, search, batch=batch, progress=progress)
    metric = BLEU()
    score = metric.corpus_score(found, [list(references)])
    return Bleu(score.score, str(metric.get_signature()))
