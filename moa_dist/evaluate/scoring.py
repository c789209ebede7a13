"""Log-likelihood of continuations: what every zero-shot task asks of a model.

What is scored. A sequence is the end-of-document token, after which every document of the
training data begins, then the tokens of the context, then those of the continuation. Both texts
are encoded by themselves, once the white space at the end of the context has moved to the
beginning of the continuation: a byte-level BPE joins a space to the word after it, so the tokens
are those of the whole text wherever the continuation begins with a space. The score is the sum of
the continuation's log-probabilities, natural logarithm.

What does not fit. A model sees no more tokens than it was trained on (L). The leftmost tokens are
cut off, the end-of-document token among them. A continuation of more than L tokens is scored in
pieces of L, the last one shorter; each is predicted from the last L tokens before its end, so no
token is left out, and none is scored twice.

Shapes: B rows of S inputs, N scored tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from moa_dist.config.model import sequences_per_group
from moa_dist.data.tokenizer import Tokenizer
from moa_dist.distributed.collectives import sum_over_ranks
from moa_dist.distributed.comm_timer import CommTimer
from moa_dist.evaluate.trained import Trained
from moa_dist.models.language_model import LanguageModel


class Request(NamedTuple):
    """A continuation to score."""

    context: str
    """Text before it; empty for the beginning of a document."""
    continuation: str
    """Text to score, with the space, if any, between the two."""


class Score(NamedTuple):
    """What the model says to a request."""

    log_likelihood: float
    """Sum over the continuation's tokens, nats."""
    num_tokens: int
    """Tokens of the continuation."""
    greedy: bool
    """Whether each of them is the most probable one, given those before it."""
    cut: bool = False
    """Whether the text was longer than the model sees."""

    @property
    def per_token(self) -> float:
        """Mean log-likelihood of a token, nats."""
        return self.log_likelihood / max(self.num_tokens, 1)


Progress = Callable[[int, int], None]
"""Called with sequences done, and all sequences."""


class _Piece(NamedTuple):
    """One row for the model."""

    place: int
    """Place among all pieces."""
    tokens: list[int]
    """At most L inputs, and the last target."""
    num_scored: int
    """Targets that count, from the last backwards."""


@dataclass(frozen=True)
class Scorer:
    """Scores requests with one model."""

    model: LanguageModel
    """In evaluation mode, whole on every rank."""
    tokenizer: Tokenizer
    """The model's."""
    max_length: int
    """Tokens that the model sees (L)."""
    micro_batch: int
    """Sequences of L tokens at once; of shorter ones, as many as have no more tokens together."""

    def score(self, requests: Sequence[Request], progress: Progress | None = None) -> list[Score]:
        """Score of each request, in their order.

        Pieces of similar length share a batch. Batch i is for rank i mod W, and batches are the
        same for any number of ranks, and so are the scores. Collective if a process group exists:
        every rank brings the same requests and gets all scores.

        Raises:
            DataError: a text cannot be encoded.
        """
        encoded = self._encode(requests)
        pieces: list[_Piece] = []
        pieces_of: list[range] = []
        for context, continuation in encoded:
            first = len(pieces)
            pieces += self._pieces(context, continuation, first)
            pieces_of.append(range(first, len(pieces)))
        sums = self._sums(pieces, progress)
        scores = []
        for (context, continuation), indices in zip(encoded, pieces_of, strict=True):
            own = [sums[index] for index in indices]
            loss, misses = (sum(column) for column in zip((0.0, 0.0), *own, strict=True))
            cut = len(context) + len(continuation) > self.max_length  # the last is only a target
            scores.append(Score(-loss, len(continuation), misses == 0, cut))
        return scores

    def _encode(self, requests: Sequence[Request]) -> list[tuple[list[int], list[int]]]:
        """Tokens of context and continuation; those of each different text are computed once."""
        split = []
        for context, continuation in requests:
            kept = context.rstrip()
            split.append((kept, context[len(kept) :] + continuation))
        texts = list(dict.fromkeys(text for pair in split for text in pair))
        ids = dict(zip(texts, self.tokenizer.encode_batch(texts), strict=True))
        return [(ids[context], ids[continuation]) for context, continuation in split]

    def _pieces(self, context: list[int], continuation: list[int], place: int) -> list[_Piece]:
        tokens = [self.tokenizer.end_of_document, *context, *continuation]
        begin = len(tokens) - len(continuation)
        pieces: list[_Piece] = []
        for start in range(begin, len(tokens), self.max_length):
            end = min(start + self.max_length, len(tokens))
            row = tokens[max(end - self.max_length - 1, 0) : end]
            pieces.append(_Piece(place + len(pieces), row, end - start))
        return pieces

    def _sums(self, pieces: list[_Piece], progress: Progress | None) -> list[list[float]]:
        """Per piece: negative log-likelihood, and number of tokens that were not the likeliest."""
        ranked = dist.is_initialized()
        rank, world_size = (dist.get_rank(), dist.get_world_size()) if ranked else (0, 1)
        sums = torch.zeros(len(pieces), 2, dtype=torch.float64)
        done = 0
        for number, batch in enumerate(self._batches(pieces)):
            if number % world_size == rank:
                sums[[piece.place for piece in batch]] = self._run(batch)
            done += len(batch)
            if progress is not None:
                progress(done, len(pieces))
        if ranked:  # each piece is zero on all ranks but one
            device = next(self.model.parameters()).device
            sums = sum_over_ranks([sums.to(device)], CommTimer(), "scores")[0].cpu()
        return sums.tolist()

    def _batches(self, pieces: list[_Piece]) -> list[list[_Piece]]:
        """All pieces, the longest first: if memory does not suffice, it shows at once."""
        ordered = sorted(pieces, key=lambda piece: -len(piece.tokens))
        batches, start = [], 0
        while start < len(ordered):
            length = len(ordered[start].tokens) - 1
            size = max(self.micro_batch * self.max_length // length, 1)
            batches.append(ordered[start : start + size])
            start += size
        return batches

    @torch.no_grad()
    def _run(self, batch: list[_Piece]) -> Tensor:
        """[len(batch), 2] in fp64, on the CPU: a row of what `_sums` returns for each piece."""
        # A group of sequences shares the experts' capacity. Each gets one piece, and rows of
        # padding, so that no score depends on what else is in the batch.
        stride = sequences_per_group(self.model.config)
        rows, length = len(batch) * stride, max(len(piece.tokens) for piece in batch) - 1
        tokens = torch.zeros(rows, length + 1, dtype=torch.int64)
        token_mask = torch.zeros(rows, length, dtype=torch.bool)
        scored = torch.zeros(rows, length, dtype=torch.bool)
        for row, piece in zip(range(0, rows, stride), batch, strict=True):
            end = len(piece.tokens) - 1
            tokens[row, : end + 1] = torch.tensor(piece.tokens)
            token_mask[row, :end] = True
            scored[row, end - piece.num_scored : end] = True
        device = next(self.model.parameters()).device
        padded = None if bool(token_mask.all()) else token_mask.to(device)
        logits_NV = self.model(tokens[:, :-1].to(device), padded).logits[scored.to(device)]
        targets_N = tokens[:, 1:][scored].to(device)
        wide = torch.promote_types(logits_NV.dtype, torch.float32)
        loss_N = F.cross_entropy(logits_NV.to(wide), targets_N, reduction="none")
        result = torch.zeros(rows, length, 2, dtype=torch.float64)
        result[..., 0][scored] = loss_N.double().cpu()
        result[..., 1][scored] = (logits_NV.argmax(-1) != targets_N).double().cpu()
        return result.sum(1)[::stride]


def scorer_of(trained: Trained, micro_batch: int) -> Scorer:
    """A scorer for a trained model, which sees as many tokens as in its training."""
    length = trained.config.data.sequence_length
    return Scorer(trained.model, trained.tokenizer, length, micro_batch)
