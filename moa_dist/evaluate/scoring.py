"""Computes log-likelihoods of continuations, which every zero-shot task is built on.

Sequences: a sequence is the end-of-document token, which precedes every document of the training
data, then the tokens of the context, then those of the continuation. The two texts are encoded
separately, after moving white space from the end of the context to the start of the continuation:
a byte-level BPE joins a space to the following word, so the tokens equal those of the whole text
whenever the continuation starts with a space. Other tokenizers encode the whole text, and a token
that holds characters of both counts as continuation. The score is the sum of the continuation's
log-probabilities, in nats.

Documents: to a model trained with `data.document_attention` the end-of-document token is what it is
in training, the end of another document: no token of the text sees it, and positions start after
it. So the tokens of a text score as those of a document in a packed sample do. Only the first of
them is predicted from less, from an end token without the document that it ends.

Truncation: a model sees at most as many tokens as it was trained on (L). The leftmost tokens are
cut off, including the end-of-document token. A continuation of more than L tokens is scored in
pieces of L, the last one shorter; each is predicted from the last L tokens before its end, so
every token is scored exactly once.

Shapes: B rows of S inputs, N scored tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from moa_dist.config.model import ModelConfig
from moa_dist.config.sequence_groups import sequences_per_group
from moa_dist.data.tokenizer import Tokenizer
from moa_dist.distributed.collectives import sum_over_ranks
from moa_dist.distributed.comm_timer import CommTimer
from moa_dist.evaluate.trained import Trained
from moa_dist.models.documents import Documents
from moa_dist.models.language_model import LanguageModelOutput


class Request(NamedTuple):
    """Holds a continuation to score."""

    context: str
    """Text before the continuation; empty at the start of a document."""
    continuation: str
    """Text to score, including the space, if any, between the two."""


class Score(NamedTuple):
    """Holds the score of a request."""

    log_likelihood: float
    """Sum over the continuation's tokens, in nats."""
    num_tokens: int
    """Number of tokens in the continuation."""
    greedy: bool
    """Whether each token is the most probable one, given those before it."""
    cut: bool = False
    """Whether the text was longer than the model's context."""

    @property
    def per_token(self) -> float:
        """Return the mean log-likelihood per token, in nats."""
        return self.log_likelihood / max(self.num_tokens, 1)


Progress = Callable[[int, int], None]
"""Called with (sequences done, total sequences)."""


class _Piece(NamedTuple):
    """Holds one row of model input."""

    number: int
    """Index among all pieces."""
    tokens: list[int]
    """At most L inputs, and the last target."""
    num_scored: int
    """How many targets at the end are scored."""


@dataclass(frozen=True)
class Scorer:
    """Scores requests with one model."""

    model: nn.Module
    """A `LanguageModel` in evaluation mode, whole or sharded over the ranks, or its engine."""
    config: ModelConfig
    """The model's configuration."""
    tokenizer: Tokenizer
    """The model's tokenizer."""
    max_length: int
    """Maximum context length in tokens (L)."""
    micro_batch: int
    """Sequences of L tokens per batch; more if they are shorter, up to the same token count."""
    document_attention: bool = False
    """Whether the model was trained with `data.document_attention`."""

    def score(self, requests: Sequence[Request], progress: Progress | None = None) -> list[Score]:
        """Score each request, in order.

        Pieces of similar length share a batch. Batch i goes to rank i mod W; batches, and hence
        scores, do not depend on the number of ranks. Collective if a process group exists: every
        rank passes the same requests, enters the same number of forwards, since experts and
        parameters may be elsewhere, and gets all scores.

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
        """Encode context and continuation of each request."""
        split = []
        for context, continuation in requests:
            kept = context.rstrip()
            split.append((kept, context[len(kept) :] + continuation))
        return self.tokenizer.encode_after(split)

    def _pieces(self, context: list[int], continuation: list[int], first: int) -> list[_Piece]:
        """Split a request into pieces with indices from `first` on."""
        tokens = [self.tokenizer.end_of_document, *context, *continuation]
        begin = len(tokens) - len(continuation)
        pieces: list[_Piece] = []
        for start in range(begin, len(tokens), self.max_length):
            end = min(start + self.max_length, len(tokens))
            row = tokens[max(end - self.max_length - 1, 0) : end]
            pieces.append(_Piece(first + len(pieces), row, end - start))
        return pieces

    def _sums(self, pieces: list[_Piece], progress: Progress | None) -> list[list[float]]:
        """Return per piece the negative log-likelihood and the number of tokens not greedy."""
        ranked = dist.is_initialized()
        rank, world_size = (dist.get_rank(), dist.get_world_size()) if ranked else (0, 1)
        sums = torch.zeros(len(pieces), 2, dtype=torch.float64)
        batches = self._batches(pieces)
        done = 0
        for first in range(0, len(batches), world_size):
            together = batches[first : first + world_size]
            if rank < len(together):
                sums[[piece.number for piece in together[rank]]] = self._run(together[rank])
            else:  # nothing is left for this rank, but the others may need it
                self._run(together[0][:1])
            done += sum(map(len, together))
            if progress is not None:
                progress(done, len(pieces))
        if ranked:  # each piece is zero on all ranks but one
            device = next(self.model.parameters()).device
            sums = sum_over_ranks([sums.to(device)], CommTimer(), "scores")[0].cpu()
        return sums.tolist()

    def _batches(self, pieces: list[_Piece]) -> list[list[_Piece]]:
        """Batch all pieces, longest first, so that running out of memory shows at once."""
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
        """Return the row of `_sums` for each piece, [len(batch), 2] in fp64 on the CPU."""
        # A group of sequences shares the experts' capacity. Each group gets one piece and rows of
        # padding, so that no score depends on the rest of the batch.
        stride = sequences_per_group(self.config)
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
        documents = None
        if self.document_attention:
            end = self.tokenizer.end_of_document
            found = Documents.of(tokens[:, :-1], end, token_mask)
            documents = found.moved(lambda part: part.to(device))
        output: LanguageModelOutput = self.model(
            tokens[:, :-1].to(device), padded, documents=documents
        )
        logits_NV = output.logits[scored.to(device)]
        targets_N = tokens[:, 1:][scored].to(device)
        wide = torch.promote_types(logits_NV.dtype, torch.float32)
        loss_N = F.cross_entropy(logits_NV.to(wide), targets_N, reduction="none")
        result = torch.zeros(rows, length, 2, dtype=torch.float64)
        result[..., 0][scored] = loss_N.double().cpu()
        result[..., 1][scored] = (logits_NV.argmax(-1) != targets_N).double().cpu()
        return result.sum(1)[::stride]


def scorer_of(trained: Trained, micro_batch: int) -> Scorer:
    """Create a scorer for a trained model with the context length that it was trained on."""
    return Scorer(
        trained.model,
        trained.config.model,
        trained.tokenizer,
        max_length=trained.config.data.sequence_length,
        micro_batch=micro_batch,
        document_attention=trained.config.data.document_attention,
    )
