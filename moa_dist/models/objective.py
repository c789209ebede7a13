"""The objective of one micro-batch, scaled so that any split of a batch adds up.

Whatever a model learns, a batch says what it reads and what it is to predict where; see
`moa_dist.data.batches`. Shapes: B sequences of S tokens, R tokens of a source text.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from moa_dist.models.calls import RouterCall
from moa_dist.models.cross_entropy import NO_TARGET, cross_entropy, cross_entropy_and_z
from moa_dist.models.documents import Documents
from moa_dist.models.language_model import LanguageModelOutput
from moa_dist.moe.statistics import RoutingStatistics
from moa_dist.profiling import annotate

_UPLOAD = ("cpu", "cuda")


class Batch(NamedTuple):
    """Sequences with their targets."""

    tokens: Tensor
    """[B, S] int64, or [B, S + 1] without `targets`: then each token is to predict the next."""
    token_mask: Tensor | None = None
    """Of the shape of `tokens`, bool, false at padding; None when there is none."""
    targets: Tensor | None = None
    """[B, S] int64: what is to be predicted at each token, or NO_TARGET."""
    source: Tensor | None = None
    """[B, R] int64: what the sequences are translations of."""
    source_mask: Tensor | None = None
    """[B, R] bool, false at padding; None when there is none."""
    documents: Documents | None = None
    """Documents of the S tokens that the model reads; None if it sees them as one text."""
    tasks: Tensor | None = None
    """[B] int64: the task of each sequence, for routers that have one per task."""

    @property
    def num_sequences(self) -> int:
        """Number of sequences (B)."""
        return len(self.tokens)

    def inputs(self) -> tuple[Any, ...]:
        """Return what the model is called with: tokens, their mask, and what else it needs."""
        tokens, token_mask = self.tokens, self.token_mask
        if self.targets is None:
            tokens, token_mask = tokens[:, :-1], None if token_mask is None else token_mask[:, :-1]
        others = (self.source, self.source_mask, self.documents, self.tasks)
        if all(other is None for other in others):
            return tokens, token_mask
        return tokens, token_mask, None, *others

    def in_documents(self, end: int) -> Batch:
        """Return a batch in which each token sees its own document only; for batches on the host.

        Documents end with the token `end` in what the model reads.
        """
        tokens, token_mask, *_ = self.inputs()
        return self._replace(documents=Documents.of(tokens, end, token_mask))

    def with_tasks(self, tasks: Tensor, num_tasks: int) -> Batch:
        """Add the tasks [B] of sequences, modulo `num_tasks`; nothing for models without any."""
        return self._replace(tasks=tasks % num_tasks) if num_tasks else self

    def labels(self) -> Tensor:
        """Return what is to be predicted at each input token, or NO_TARGET: [B, S] int64."""
        if self.targets is not None:
            return self.targets
        following = self.tokens[:, 1:]
        if self.token_mask is None:
            return following
        return following.masked_fill(~self.token_mask[:, 1:], NO_TARGET)

    def num_targets(self) -> int:
        """Count the tokens to predict."""
        return int((self.labels() != NO_TARGET).sum())

    def num_read(self) -> int:
        """Count the tokens that the model reads, without padding and those of a source."""
        tokens, token_mask, *_ = self.inputs()
        assert tokens is not None
        return tokens.numel() if token_mask is None else int(token_mask.sum())

    def to(self, device: torch.device) -> Batch:
        """Copy the batch to `device`; the host does not wait for it."""

        def copy(field: Tensor) -> Tensor:
            # Only from pinned memory is a copy to a GPU asynchronous.
            pinned = field.pin_memory() if (field.device.type, device.type) == _UPLOAD else field
            return pinned.to(device, non_blocking=True)

        documents = None if self.documents is None else self.documents.moved(copy)
        return self._each(copy, documents)

    def rows(self, index: Tensor | slice) -> Batch:
        """Select the sequences at `index`, a slice or [n]."""
        documents = None if self.documents is None else self.documents.rows(index)
        return self._each(lambda field: field[index], documents)

    def _each(self, change: Callable[[Tensor], Tensor], documents: Documents | None) -> Batch:
        others = (self.token_mask, self.targets, self.source, self.source_mask)
        mask, targets, source, source_mask = (None if x is None else change(x) for x in others)
        tasks = None if self.tasks is None else change(self.tasks)
        return Batch(change(self.tokens), mask, targets, source, source_mask, documents, tasks)


class Objective(NamedTuple):
    """Loss of one micro-batch."""

    cross_entropy: Tensor
    """Scalar, summed over targets, nats."""
    aux_losses: dict[str, Tensor]
    """Losses of the routers, see `LanguageModelOutput`."""
    statistics: dict[RouterCall, RoutingStatistics]
    """What the routers did, likewise."""
    z: Tensor | None = None
    """Scalar, the z-loss summed over targets, coefficient applied; None without one."""
    token_sums: dict[str, Tensor] = {}  # noqa: RUF012  # never changed
    """What layers report of tokens, see `LanguageModelOutput`."""

    def loss(self, targets_per_micro_batch: float, weight: float = 1.0) -> Tensor:
        """Return a scalar whose mean over a step's micro-batches on all ranks is the step's loss.

        `targets_per_micro_batch` is the mean number of targets over them; dividing by it
        rather than by this micro-batch's own number makes every token count alike, also
        with uneven padding. `weight` is this micro-batch's number of sequences over their mean:
        auxiliary losses are means over sequences.
        """
        aux_losses = sum(self.aux_losses.values(), torch.zeros_like(self.cross_entropy))
        of_targets = self.cross_entropy if self.z is None else self.cross_entropy + self.z
        return of_targets / targets_per_micro_batch + weight * aux_losses


def objective(
    model: nn.Module, batch: Batch, label_smoothing: float = 0.0, z_loss: float = 0.0
) -> Objective:
    """Run the model on a micro-batch and sum cross-entropy and z-loss of its targets."""
    output: LanguageModelOutput = model(*batch.inputs())
    with annotate("loss"):
        logits, targets = output.logits.flatten(0, 1), batch.labels().flatten()
        # The result leaves out the logits: nobody needs the largest of all tensors any longer.
        if not z_loss:
            loss = cross_entropy(logits, targets, label_smoothing)
            return Objective(
                loss, output.aux_losses, output.statistics, token_sums=output.token_sums
            )
        loss, z = cross_entropy_and_z(logits, targets, label_smoothing)
        return Objective(loss, output.aux_losses, output.statistics, z_loss * z, output.token_sums)
