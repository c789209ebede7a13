"""Masked micro-batches do not depend on ranks, micro-batches or restarts."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from pathlib import Path

import pytest
import torch
from torch import Tensor

from moa_dist.config.run import Config
from moa_dist.data.batches import held_out_batches, training_batches
from moa_dist.data.folders import DataFolder
from moa_dist.data.manifest import Manifest
from moa_dist.models.cross_entropy import NO_TARGET
from moa_dist.models.objective import Batch

LENGTH, GLOBAL_BATCH, VOCABULARY, MASK = 20, 8, 48, 49
ROUTER = {"num_experts": 3, "top_k": 2, "score": "softmax"}


def config(folder: Path, micro_batch: int = 2, **router: int) -> Config:
    return Config.model_validate(
        {
            "name": "masked",
            "model": {
                "objective": "masked",
                "vocab_size": MASK + 1,
                "d_model": 8,
                "num_layers": 1,
                "attention": {"kind": "moa", "d_head": 4, "router": ROUTER | router},
                "ffn": {"kind": "dense", "d_ff": 8},
            },
            "data": {"train": str(folder), "sequence_length": LENGTH, "workers": 0, "seed": 5},
            "train": {"steps": 1, "global_batch": GLOBAL_BATCH, "micro_batch": micro_batch},
        }
    )


def rows_of(batches: list[Batch]) -> list[list[int]]:
    """Return for each sequence the tokens shown, then the labels."""
    return [
        torch.cat(pair).tolist()
        for batch in batches
        for pair in zip(batch.tokens, batch.labels(), strict=True)
    ]


def training_rows(
    folder: Path, manifest: Manifest, steps: int, *, world_size: int = 1, micro: int = 2, done=0
) -> list[list[list[int]]]:
    """Return by step the rows of the global batch in the order of samples."""
    ranks = []
    for rank in range(world_size):
        batches = training_batches(
            config(folder, micro),
            [DataFolder("train", folder, manifest)],
            rank=rank,
            world_size=world_size,
            consumed=done * GLOBAL_BATCH,
        )
        ranks.append(rows_of(list(islice(batches, steps * GLOBAL_BATCH // (world_size * micro)))))
    in_order = [row for rows in zip(*ranks, strict=True) for row in rows]
    return [in_order[i * GLOBAL_BATCH : (i + 1) * GLOBAL_BATCH] for i in range(steps)]


def test_layout_and_restart_change_no_mask(
    make_shards: Callable[..., Manifest], tmp_path: Path
) -> None:
    manifest = make_shards(tmp_path, block_length=LENGTH)
    whole = training_rows(tmp_path, manifest, 12)
    assert training_rows(tmp_path, manifest, 12, world_size=4, micro=1) == whole
    assert training_rows(tmp_path, manifest, 5, world_size=2, micro=4, done=7) == whole[7:]


def test_masks_are_new_in_every_epoch(make_shards: Callable[..., Manifest], tmp_path: Path) -> None:
    manifest = make_shards(tmp_path, block_length=LENGTH)
    epoch = manifest.num_samples // GLOBAL_BATCH
    rows = training_rows(tmp_path, manifest, 2 * epoch)
    # A sample consists of one token, which is what is predicted of it.
    first, second = (
        {max(row[LENGTH:]): row for step in part for row in step}
        for part in (rows[:epoch], rows[epoch:])
    )
    both = first.keys() & second.keys() - {NO_TARGET}
    assert len(both) > 30
    assert all(first[token] != second[token] for token in both)


def test_hidden_tokens_alone_are_predicted(
    make_shards: Callable[..., Manifest], tmp_path: Path
) -> None:
    manifest = make_shards(tmp_path, block_length=LENGTH)
    folders = [DataFolder("train", tmp_path, manifest)]
    (batch,) = islice(
        training_batches(config(tmp_path, 8), folders, rank=0, world_size=1, consumed=0), 1
    )
    labels: Tensor = batch.labels()
    predicted = labels != NO_TARGET
    assert batch.num_read() == labels.numel(), "what is hidden is read, too"
    assert 0 < batch.num_targets() == int(predicted.sum()) < labels.numel() // 2
    # A sample consists of one token.
    originals = labels.max(1).values[:, None].expand_as(labels)
    kept = ~predicted & (labels.max(1).values != NO_TARGET)[:, None]
    assert (batch.tokens[kept] == originals[kept]).all()
    assert (batch.tokens[predicted] == MASK).any()


def test_held_out_masks_are_fixed_and_fillers_have_none(
    make_shards: Callable[..., Manifest], tmp_path: Path
) -> None:
    manifest = make_shards(tmp_path, block_length=LENGTH)

    def rows(world_size: int, micro_batch: int) -> list[list[int]]:
        every: dict[int, list[list[int]]] = {}
        for rank in range(world_size):
            batches = held_out_batches(
                config(tmp_path),
                tmp_path,
                manifest,
                rank=rank,
                world_size=world_size,
                micro_batch=micro_batch,
                sequences=13,
            )
            every[rank] = rows_of(list(batches))
        return [row for rows in zip(*every.values(), strict=True) for row in rows]

    alone, shared = rows(1, 2), rows(2, 4)
    assert alone[:13] == shared[:13]
    assert all(set(row[LENGTH:]) == {NO_TARGET} for row in [*alone[13:], *shared[13:]])


def test_held_out_micro_batches_hold_whole_groups(
    make_shards: Callable[..., Manifest], tmp_path: Path
) -> None:
    """A group consists of sequences that share the experts' capacity."""
    manifest = make_shards(tmp_path, block_length=LENGTH)
    grouped = config(tmp_path, group_sequences=2)
    asked, rounded = (
        list(
            held_out_batches(
                grouped,
                tmp_path,
                manifest,
                rank=1,
                world_size=2,
                micro_batch=micro_batch,
                sequences=13,
            )
        )
        for micro_batch in (3, 4)
    )
    assert [batch.num_sequences for batch in asked] == [4, 4]
    assert rows_of(asked) == rows_of(rounded)


@pytest.mark.parametrize("objective", ["causal", "masked"])
def test_documents_end_with_their_end_token(
    make_shards: Callable[..., Manifest], tmp_path: Path, objective: str
) -> None:
    """Hidden or not. Of samples of one token, those of the end token are documents of one."""
    manifest = make_shards(tmp_path, block_length=LENGTH)
    run = config(tmp_path, 8)
    model = run.model.changed(objective=objective)
    apart = run.changed(model=model, data=run.data.changed(document_attention=True))
    ranks, folders = {"rank": 0, "world_size": 1}, [DataFolder("train", tmp_path, manifest)]
    for stream in (
        lambda run: islice(training_batches(run, folders, consumed=0, **ranks), 6),
        lambda run: held_out_batches(run, tmp_path, manifest, micro_batch=6, **ranks),
    ):
        lengths: list[int] = []
        plain = stream(run.changed(model=model))
        for batch, without in zip(stream(apart), plain, strict=True):
            assert without.documents is None
            assert torch.equal(batch.tokens, without.tokens)
            assert batch.documents is not None
            assert batch.documents.ids.shape == batch.inputs()[0].shape
            assert torch.equal(batch.labels(), without.labels())
            lengths += batch.documents.lengths
        assert lengths.count(1) == LENGTH
        assert set(lengths) == {1, LENGTH}
