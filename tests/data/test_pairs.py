"""Pairs: what was written is read; buckets hold each once per epoch, in any layout alike."""

from __future__ import annotations

import argparse
import io
import tarfile
from itertools import chain, islice
from pathlib import Path

import numpy as np
import pytest
import torch

from moa_dist.cli import prepare as command
from moa_dist.config.run import Config, DataConfig
from moa_dist.data.batches import held_out_batches, training_batches
from moa_dist.data.check import check_data
from moa_dist.data.corruption import find_corrupt_shards
from moa_dist.data.folders import DataFolder, RunData
from moa_dist.data.manifest import ShardEntry, load_manifest, load_pair_manifest, sha256_of
from moa_dist.data.pairs import BucketOrder, read_pairs
from moa_dist.data.prepare_pairs import PairFiles, prepare_pairs
from moa_dist.data.tokenizer import load_tokenizer
from moa_dist.errors import DataError
from moa_dist.models.objective import Batch
from tests.parallel_text import LENGTH, lines, write_lines, write_pairs
from tests.raises import raises_data_error

BUCKET_TOKENS, GLOBAL_BATCH = 100, 4


def config(folder: Path, micro_batch: int = 1) -> Config:
    return Config.model_validate(
        {
            "name": "translation",
            "model": {
                "objective": "translation",
                "vocab_size": 300,
                "d_model": 8,
                "num_layers": 1,
                "attention": {"kind": "dense", "num_heads": 2, "d_head": 4, "rope": None},
                "ffn": {"kind": "dense", "d_ff": 8},
            },
            "data": {
                "train": str(folder),
                "sequence_length": LENGTH,
                "bucket_tokens": BUCKET_TOKENS,
                "seed": 3,
            },
            "train": {"steps": 1, "global_batch": GLOBAL_BATCH, "micro_batch": micro_batch},
        }
    )


def order_of(folder: Path, seed: int = 3) -> BucketOrder:
    pairs = read_pairs(folder, load_pair_manifest(folder))
    return BucketOrder(pairs.longest, BUCKET_TOKENS, seed)


def texts_of(batch: Batch) -> list[tuple[list[int], list[int]]]:
    """Source and target of each sequence, without padding."""
    assert batch.source is not None
    everything = torch.ones_like
    real = everything(batch.tokens).bool() if batch.token_mask is None else batch.token_mask
    source_mask = (
        everything(batch.source).bool() if batch.source_mask is None else batch.source_mask
    )
    return [
        (source[s].tolist(), tokens[t].tolist())
        for source, s, tokens, t in zip(batch.source, source_mask, batch.tokens, real, strict=True)
    ]


def test_what_was_written_is_read(tmp_path: Path) -> None:
    manifest = write_pairs(tmp_path / "data")
    assert load_pair_manifest(tmp_path / "data") == manifest
    pairs, tokenizer = read_pairs(tmp_path / "data", manifest), load_tokenizer(tmp_path / "data")
    assert len(pairs) == manifest.pairs == 60
    assert len(manifest.shards) == 4
    decoded = [
        (tokenizer.decode(pairs.source(i)), tokenizer.decode(pairs.target(i))) for i in range(60)
    ]
    assert decoded == lines(60)
    assert manifest.target_tokens == sum(len(pairs.target(i)) + 1 for i in range(60))
    assert manifest.target_bytes == sum(len(target.encode()) for _, target in lines(60))
    longest = [max(len(pairs.source(i)), len(pairs.target(i))) + 1 for i in range(60)]
    assert pairs.longest.tolist() == longest
    again = write_pairs(tmp_path / "again")
    assert again == manifest, "the same text gives the same bytes"


def test_empty_and_long_texts_are_left_out_and_counted(tmp_path: Path) -> None:
    write_pairs(tmp_path / "data")
    files = write_lines(
        tmp_path, [("a", "b"), ("", "b"), ("a", ""), ("sea " * 50, "b"), ("c", "d\r")]
    )
    manifest = prepare_pairs(
        [files, files],
        tmp_path / "some",
        block_length=LENGTH,
        tokenizer=tmp_path / "data",
        pairs_per_shard=3,
    )
    assert (manifest.pairs, manifest.skipped, len(manifest.shards)) == (4, 6, 2)


def test_files_of_unequal_length_are_refused(tmp_path: Path) -> None:
    files = write_lines(tmp_path, lines(5))
    files.target.write_text("one\ntwo\n")
    with raises_data_error(2, files.source, path=files.target, line=3):
        prepare_pairs([files], tmp_path / "data", block_length=LENGTH, pairs_per_shard=3)
    assert not (tmp_path / "data").exists()
    missing = PairFiles(files.source, tmp_path / "nowhere")
    with raises_data_error(path=missing.target):
        prepare_pairs([missing], tmp_path / "data", block_length=LENGTH, pairs_per_shard=3)


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = write_lines(tmp_path, lines(30))
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    arguments = f"--pairs {files.source} {files.target} --output {tmp_path}/out --vocab-size 300"
    arguments += f" --sequence-length {LENGTH}"
    assert command.run(parser.parse_args(arguments.split())) == 0
    assert "30 pairs" in capsys.readouterr().out
    with raises_data_error("--valid-share", "--pairs"):
        command.run(parser.parse_args([*arguments.split(), "--valid-share", "0.1", "--force"]))


def test_buckets_hold_every_pair_once_per_epoch_within_the_limit(tmp_path: Path) -> None:
    write_pairs(tmp_path / "data")
    order = order_of(tmp_path / "data")
    epochs = [
        list(order.take(range(n * order.num_buckets, (n + 1) * order.num_buckets)))
        for n in range(3)
    ]
    assert 5 < order.num_buckets < 60
    for buckets in epochs:
        assert sorted(np.concatenate(buckets).tolist()) == list(range(60))
        for pairs in buckets:
            assert len(pairs) * order.longest[pairs].max() <= BUCKET_TOKENS
            assert order.longest[pairs].max() - order.longest[pairs].min() <= 12
    assert len({str(buckets) for buckets in epochs}) == 3, "a fresh order every epoch"
    assert str(epochs[0]) != str(list(order_of(tmp_path / "data", 4).take(range(len(epochs[0])))))
    middle = list(order.take(range(7, 20)))
    assert str(middle) == str([pairs for buckets in epochs for pairs in buckets][7:20])
    in_file_order = np.concatenate(list(order.in_file_order()))
    assert sorted(in_file_order.tolist()) == list(range(60))


def epochs_of(longest: list[int], number: int) -> list[list[tuple[int, ...]]]:
    """Pairs of every bucket, epoch by epoch; a bucket has room for 32 tokens."""
    order = BucketOrder(np.array(longest), bucket_tokens=32, seed=3)
    buckets = [tuple(pairs.tolist()) for pairs in order.take(range(number * order.num_buckets))]
    return [buckets[i : i + order.num_buckets] for i in range(0, len(buckets), order.num_buckets)]


def test_each_epoch_puts_pairs_of_one_length_together_anew() -> None:
    epochs = epochs_of([8] * 32, number=5)
    assert len({frozenset(map(frozenset, epoch)) for epoch in epochs}) == 5


def test_each_epoch_has_an_order_of_buckets_of_its_own() -> None:
    epochs = epochs_of(list(range(17, 33)), number=5)  # each pair alone fills a bucket
    assert len({frozenset(epoch) for epoch in epochs}) == 1
    assert len(set(map(tuple, epochs))) == 5


@pytest.mark.parametrize(("world_size", "micro_batch"), [(1, 4), (2, 2), (4, 1), (2, 1)])
def test_layout_and_restart_change_no_global_batch(
    tmp_path: Path, world_size: int, micro_batch: int
) -> None:
    manifest = write_pairs(tmp_path / "data")

    def global_batches(world_size: int, micro_batch: int, steps: int, done: int = 0) -> list[list]:
        ranks = []
        for rank in range(world_size):
            batches = training_batches(
                config(tmp_path / "data", micro_batch),
                [DataFolder("train", tmp_path / "data", manifest)],
                rank=rank,
                world_size=world_size,
                consumed=done * GLOBAL_BATCH,
            )
            per_step = GLOBAL_BATCH // (world_size * micro_batch)
            mine = [texts_of(batch) for batch in islice(batches, steps * per_step)]
            ranks.append([[*chain(*mine[i * per_step :][:per_step])] for i in range(steps)])
        return [sorted(chain(*parts)) for parts in zip(*ranks, strict=True)]

    whole = global_batches(1, 1, 12)
    assert global_batches(world_size, micro_batch, 12) == whole
    assert global_batches(world_size, micro_batch, 5, done=7) == whole[7:]
    for step in whole:
        for source, target in step:
            assert source[-1] == target[0] == target[-1] == manifest.end_of_document


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_held_out_pairs_come_once_in_as_many_batches_for_every_rank(
    tmp_path: Path, world_size: int
) -> None:
    manifest = write_pairs(tmp_path / "data")
    pairs = read_pairs(tmp_path / "data", manifest)
    by_rank = [
        list(
            held_out_batches(
                config(tmp_path / "data"),
                tmp_path / "data",
                manifest,
                rank=rank,
                world_size=world_size,
                micro_batch=1,
                sequences=23,
            )
        )
        for rank in range(world_size)
    ]
    assert len({len(batches) for batches in by_rank}) == 1
    real = [batch for batches in by_rank for batch in batches if batch.num_targets()]
    seen = [source[:-1] for batch in real for source, _ in texts_of(batch)]
    assert sorted(seen) == sorted(pairs.source(i) for i in range(23))


def test_damage_is_named(tmp_path: Path) -> None:
    manifest = write_pairs(tmp_path / "data")
    file = tmp_path / "data/shard-000002.tar"
    content = bytearray(file.read_bytes())
    content[600] ^= 1
    file.write_bytes(content)
    with raises_data_error(path=file, key="sha256"):
        read_pairs(tmp_path / "data", manifest)
    file.unlink()
    with raises_data_error(path=file, key="file"):
        read_pairs(tmp_path / "data", manifest)
    folders = (DataFolder("data", tmp_path / "data", manifest),)
    with raises_data_error(path=file, key="file"):  # not in the first step
        training_batches(config(tmp_path / "data", 1), folders, rank=0, world_size=1, consumed=0)
    held_out = DataConfig(
        train="other", valid=str(tmp_path / "data"), sequence_length=9, verify="checksums"
    )
    with raises_data_error(path=file, key="file"):
        find_corrupt_shards(held_out, RunData(folders, folders))


def test_nothing_but_texts_of_pairs_in_order_is_accepted(tmp_path: Path) -> None:
    """Even if the manifest says that it was written so."""
    manifest = write_pairs(tmp_path / "data")
    file = tmp_path / "data/shard-000000.tar"
    with tarfile.open(file) as tar:
        members = [(m.name, tar.extractfile(m).read()) for m in tar.getmembers()]  # type: ignore[union-attr]

    def refused(changed: list[tuple[str, bytes]], *values: object, key: str) -> None:
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for name, data in changed:
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        file.write_bytes(buffer.getvalue())
        entry = ShardEntry(
            file=file.name, sha256=sha256_of(buffer.getvalue()), bytes=len(buffer.getvalue())
        )
        bad = manifest.model_copy(update={"shards": (entry, *manifest.shards[1:])})
        with raises_data_error(*values, path=file, key=key):
            read_pairs(tmp_path / "data", bad)

    name, data = members[0]
    refused([*members, ("000000016.source", data)], key="000000016.source")
    refused(members[:-1], 31, 32, key="pairs_per_shard")
    refused([("x.pyd", data), *members[1:]], "000000000.source", key="x.pyd")
    refused([(name, data + b"\0"), *members[1:]], len(data) + 1, 39, key=name)
    refused([(name, b"\0" * 80), *members[1:]], 80, 39, key=name)
    refused([(name, b"\xff\xff"), *members[1:]], 65535, key="vocab_size")


def test_text_and_pairs_are_not_taken_for_each_other(tmp_path: Path, make_shards) -> None:
    write_pairs(tmp_path / "pairs")
    make_shards(tmp_path / "text")
    with raises_data_error("--input", path=tmp_path / "pairs/manifest.json", key="kind"):
        load_manifest(tmp_path / "pairs")
    with raises_data_error("--pairs", path=tmp_path / "text/manifest.json", key="kind"):
        load_pair_manifest(tmp_path / "text")
    data = DataConfig(train=str(tmp_path / "pairs"), sequence_length=LENGTH, readers=4)
    train, valid = check_data(data, vocab_size=300, world_size=3, objective="translation")
    assert [folder.manifest for folder in train] == [load_pair_manifest(tmp_path / "pairs")]
    assert valid == ()


def test_a_masked_model_needs_an_id_for_the_mask(tmp_path: Path, make_shards) -> None:
    make_shards(tmp_path / "text")
    data = DataConfig(train=str(tmp_path / "text"), sequence_length=3)
    check_data(data, vocab_size=49, world_size=1, objective="masked")
    with pytest.raises(DataError) as caught:
        check_data(data, vocab_size=48, world_size=1, objective="masked")
    (cause,) = caught.value.causes
    assert (cause.path, cause.key) == (tmp_path / "text", "model.vocab_size")
    assert "at least 49" in str(cause)
