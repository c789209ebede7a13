"""BLEU of translations by sacrebleu, an optional dependency, with the signature that names it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from moa_dist.errors import DataError
from moa_dist.evaluate.trained import Trained
from moa_dist.evaluate.translate import Progress, Search, translate


class Bleu(NamedTuple):
    """A score that says how it was measured."""

    score: float
    """0 to 100."""
    signature: str
    """Of sacrebleu: tokenizer, smoothing, version. Scores compare only if it is the same."""


def require_sacrebleu() -> None:
    """Raise DataError if it is not installed."""
    try:
        import sacrebleu  # noqa: F401
    except ImportError as error:
        raise DataError(
            "BLEU is measured by sacrebleu, which is not installed: pip install 'moa-dist[bleu]'"
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
    """Of the translations of a whole corpus, against one reference each; see `translate`.

    Raises:
        DataError: there are no sources, or not as many references, sacrebleu is missing, or as
            `translate`.
    """
    require_sacrebleu()
    from sacrebleu.metrics.bleu import BLEU

    if len(sources) != len(references):
        raise DataError(
            f"{len(sources)} texts to translate, but {len(references)} references: line i of one "
            "file must be the translation of line i of the other"
        )
    if not sources:
        raise DataError("no text to translate: the files are empty; give others")
    found = translate(trained, sources, search, batch=batch, progress=progress)
    metric = BLEU()
    score = metric.corpus_score(found, [list(references)])
    return Bleu(score.score, str(metric.get_signature()))
