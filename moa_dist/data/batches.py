"""Turns prepared data into one rank's micro-batches, according to the model's objective.

    causal        samples; each token predicts the next one
    masked        the same samples with some tokens hidden (see `masking`)
    translation   buckets of sentence pairs (see `pairs`)

Shapes: B sequences of L tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import count, islice
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moa_dist.config.run import Config
from moa_dist.config.sequence_groups import whole_groups
from moa_dist.data.folders import DataFolder
from moa_dist.data.history import OrderHistory
from moa_dist.data.manifest import AnyManifest, Manifest, PairManifest
from moa_dist.data.masking import hide
from moa_dist.data.mixture import Mixture, configured_stages
from moa_dist.data.pairs import BucketOrder, Pairs, read_pairs
from moa_dist.data.stream import SampleStream, build_loader
from moa_dist.data.validation import validation_batches
from moa_dist.models.cross_entropy import NO_TARGET
from moa_dist.models.objective import Batch

_TRAINING, _HELD_OUT = 0, 1  # tags that give training and validation different masks


def training_batches(
    config: Config,
    folders: Sequence[DataFolder],
    *,
    rank: int,
    world_size: int,
    consumed: int,
    history: OrderHistory = OrderHistory(),  # noqa: B008 - immutable
) -> Iterator[Batch]:
    """Yield this rank's micro-batches, starting at global sample `consumed`, endlessly.

    Micro-batch b holds the samples `consumed + rank + W * (b * micro_batch + j)` for j from 0.
    `folders` are mixed by the weights of `history`, or of the configuration if it has none. Pairs,
    of one folder, are all read by this call, before any time limit on a step starts. Raises
    DataError, now or while iterating: see `SampleStream`.
    """
    manifest = folders[0].manifest
    if isinstance(manifest, PairManifest):
        pairs = read_pairs(folders[0].path, manifest)
        samples = count(consumed + rank, world_size)
        return _buckets(config, pairs, manifest.end_of_document, samples)
    if not history.stages:
        history = history._replace(stages=configured_stages(config.data))
    return _samples(config, folders, manifest, rank, world_size, consumed, history)


def _samples(
    config: Config,
    folders: Sequence[DataFolder],
    manifest: Manifest,
    rank: int,
    world_size: int,
    consumed: int,
    history: OrderHistory,
) -> Iterator[Batch]:
    """Yield micro-batches of samples; `manifest` is of any of the folders."""
    data, micro_batch = config.data, config.train.micro_batch
    stream = SampleStream(
        folders,
        readers=data.readers,
        seed=data.seed,
        rank=rank,
        world_size=world_size,
        consumed=consumed,
        micro_batch=micro_batch,
        history=history,
    )
    task_of = {folder.name: folder.task for folder in folders}
    mixture = Mixture(history.stages, data.readers)
    sample = consumed + rank
    for tokens in build_loader(stream, workers=data.workers):
        samples = range(sample, sample + world_size * micro_batch, world_size)
        if config.model.objective == "masked":
            keys = [(data.seed, _TRAINING, number) for number in samples]
            batch = _masked(tokens, keys, config, manifest)
        else:
            batch = in_documents(Batch(tokens), config, manifest)
        if config.model.num_tasks:
            batch = of_tasks(batch, [task_of[mixture.locate(number)[0]] for number in samples])
        yield batch
        sample += world_size * micro_batch


def _buckets(config: Config, pairs: Pairs, end: int, samples: Iterable[int]) -> Iterator[Batch]:
    """Yield micro-batches of `train.micro_batch` buckets each."""
    order = BucketOrder(pairs.longest, config.data.bucket_tokens, config.data.seed)
    buckets = order.take(samples)
    while chosen := list(islice(buckets, config.train.micro_batch)):
        yield _translated(pairs, np.concatenate(chosen), end)


def held_out_batches(
    config: Config,
    folder: Path,
    manifest: AnyManifest,
    *,
    rank: int,
    world_size: int,
    micro_batch: int,
    sequences: int | None = None,
    task: int | None = None,
) -> Iterator[Batch]:
    """Yield this rank's share of the first `sequences` samples or pairs, or of all, of one task.

    Every rank gets the same number of micro-batches. The mask of a sample depends only on its
    position in the folder. `micro_batch` is rounded up to whole groups of `group_sequences`; it
    has no effect on pairs, which come in buckets. Raises DataError if a shard is missing or
    damaged.
    """
    model = config.model
    micro_batch = whole_groups(micro_batch, model)
    if isinstance(manifest, PairManifest):
        pairs = read_pairs(folder, manifest)
        order = BucketOrder(pairs.longest[:sequences], config.data.bucket_tokens, seed=0)
        yield from _share(order, pairs, manifest.end_of_document, rank, world_size)
        return
    batches = validation_batches(
        folder,
        manifest,
        rank=rank,
        world_size=world_size,
        micro_batch=micro_batch,
        sequences=sequences,
    )
    sample = rank
    for tokens, counts in batches:
        token_mask = None if bool(counts.all()) else counts[:, None].expand_as(tokens)
        if model.objective == "masked":
            keys = [(_HELD_OUT, sample + world_size * row) for row in range(len(tokens))]
            batch = _masked(tokens, keys, config, manifest, token_mask)
        else:
            batch = in_documents(Batch(tokens, token_mask), config, manifest)
        yield of_tasks(batch, [task] * batch.num_sequences)
        sample += world_size * micro_batch


def _share(
    order: BucketOrder, pairs: Pairs, end: int, rank: int, world_size: int
) -> Iterator[Batch]:
    """Yield buckets `rank`, `rank` + W, ... in file order, then padding if others have more."""
    buckets = list(order.in_file_order())
    for bucket in range(rank, -(-len(buckets) // world_size) * world_size, world_size):
        if bucket < len(buckets):
            yield _translated(pairs, buckets[bucket], end)
        else:
            padding = torch.zeros(1, 2, dtype=torch.int64)
            yield Batch(padding, padding.bool(), None, padding, padding.bool())


def _translated(pairs: Pairs, chosen: NDArray[np.intp], end: int) -> Batch:
    """Build a batch: sources end with the token `end`, targets begin and end with it."""
    tokens, token_mask = padded([[end, *pairs.target(pair), end] for pair in chosen.tolist()])
    source, source_mask = padded([[*pairs.source(pair), end] for pair in chosen.tolist()])
    return Batch(tokens, token_mask, None, source, source_mask)


def padded(texts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor | None]:
    """Pad texts at their end: tokens [B, S] int64 and their mask, None if nothing is padding."""
    lengths = torch.tensor([len(text) for text in texts])
    tokens = torch.zeros(len(texts), int(lengths.max()), dtype=torch.int64)
    token_mask = torch.arange(tokens.shape[1]) < lengths[:, None]
    tokens[token_mask] = torch.tensor([token for text in texts for token in text])
    return tokens, None if bool(token_mask.all()) else token_mask


def _masked(
    tokens: Tensor,
    keys: Sequence[tuple[int, ...]],
    config: Config,
    manifest: Manifest,
    token_mask: Tensor | None = None,
) -> Batch:
    """Mask the first L of `tokens` [B, L + 1], row i by key i; the mask token is the last id."""
    originals, token_mask = tokens[:, :-1], None if token_mask is None else token_mask[:, :-1]
    mask_token = config.model.vocab_size - 1
    rows = [
        hide(row, *key, mask_token=mask_token, vocab_size=manifest.vocab_size)
        for row, key in zip(originals.numpy(), keys, strict=True)
    ]
    shown, hidden = (torch.from_numpy(np.stack(part)) for part in zip(*rows, strict=True))
    predicted = hidden if token_mask is None else hidden & token_mask
    targets = originals.masked_fill(~predicted, NO_TARGET)
    # A hidden end token ends its document all the same.
    batch = in_documents(Batch(originals, token_mask, targets), config, manifest)
    return batch._replace(tokens=shown)


def of_tasks(batch: Batch, tasks: Sequence[int | None]) -> Batch:
    """Set the task of each sequence, if all are known."""
    known = [task for task in tasks if task is not None]
    return batch._replace(tasks=torch.tensor(known)) if len(known) == len(tasks) else batch


def in_documents(batch: Batch, config: Config, manifest: Manifest) -> Batch:
    """Keep documents apart if the run does; `batch` has the tokens that end them."""
    if not config.data.document_attention:
        return batch
    return batch.in_documents(manifest.end_of_document)
