"""Damage of every kind is found and named; policies of keeping; parts that never come."""

import json
import subprocess
from functools import partial
from threading import Event, Thread, Timer

import pytest
import torch

from moa_dist.checkpoint.check import damage, newest_index
from moa_dist.checkpoint.format import Reader, checkpoint_folder, checkpoints, step_of
from moa_dist.checkpoint.write import partial_folder, prune, publish
from moa_dist.errors import DataError
from tests.checkpoint.saved import CONFIG, begin, make_index, read, save, values, write_rank
from tests.raises import raises_data_error

TENSORS = "rank-00001.safetensors"


def alter(path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


INDEX, SUMS = "checkpoint.json", "SHA256SUMS"
DAMAGE = {  # the file, what happens to it, and the key of the problem
    "missing file": (TENSORS, lambda p: p.unlink(), "file"),
    "truncated file": (TENSORS, lambda p: p.write_bytes(p.read_bytes()[:-4]), "bytes"),
    "altered value": (TENSORS, lambda p: alter(p, -1), "sha256"),
    "altered header": (TENSORS, lambda p: alter(p, 12), "sha256"),
    "no index": (INDEX, lambda p: p.unlink(), "file"),
    "index cut": (INDEX, lambda p: p.write_bytes(p.read_bytes()[:99]), None),
    "altered number": (
        INDEX,
        lambda p: p.write_text(p.read_text().replace('"samples": 1', '"samples": 3')),
        "sha256",
    ),
    "binary index": (INDEX, lambda p: p.write_bytes(b"\xff\xfe"), None),
    "no checksums": (SUMS, lambda p: p.unlink(), "file"),
    "checksums cut": (SUMS, lambda p: p.write_bytes(p.read_bytes()[:50]), None),
    "a checksum less": (
        SUMS,
        lambda p: p.write_text("\n".join(p.read_text().splitlines()[:-1])),
        TENSORS,
    ),
}


def problems_after(checkpoint, file, do) -> list[DataError]:
    assert damage(checkpoint) == []
    do(checkpoint / file)
    problems = [p for rank in range(2) for p in damage(checkpoint, rank, 2)]
    assert problems
    for problem in problems:
        assert "\n" not in str(problem)
        assert str(problem).startswith(str(problem.path))
    return problems


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_found_and_named(tmp_path, kind):
    file, do, key = DAMAGE[kind]
    checkpoint = save(tmp_path, 1)
    size = (checkpoint / file).stat().st_size
    problem, *others = problems_after(checkpoint, file, do)
    assert (problem.path, problem.key) == (checkpoint / file, key)
    assert all((other.path, other.key) == (problem.path, problem.key) for other in others)
    if kind == "truncated file":
        assert all(str(number) in str(problem) for number in (size - 4, size))


def test_a_wrong_checksum_cannot_be_distinguished_from_a_wrong_file(tmp_path):
    checkpoint = save(tmp_path, 1)
    sha256, first = (checkpoint / SUMS).read_text().split()[:2]
    other = ("1" if sha256[0] == "0" else "0") + sha256[1:]
    (problem,) = problems_after(
        checkpoint, SUMS, lambda p: p.write_text(p.read_text().replace(sha256, other))
    )
    assert (problem.path, problem.key) == (checkpoint / first, "sha256")


def test_checksums_are_those_of_common_tools(tmp_path):
    checkpoint = save(tmp_path, 1)
    subprocess.run(["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=checkpoint, check=True)


@pytest.mark.parametrize("file", ["../other.safetensors", "/etc/passwd", "..", "a/b", ".hidden"])
def test_an_index_cannot_lead_out_of_its_folder(tmp_path, file):
    checkpoint = save(tmp_path, 1)
    path = checkpoint / "checkpoint.json"
    index = json.loads(path.read_text())
    index["tensors"]["w/master"][0][0] = file
    path.write_text(json.dumps(index))
    with raises_data_error("tensors.w/master.0", path=path):
        Reader(checkpoint)


def test_a_piece_that_lies_about_its_size(tmp_path):
    checkpoint = save(tmp_path, 1)
    path = checkpoint / "checkpoint.json"
    index = json.loads(path.read_text())
    index["tensors"]["w/master"][0][3] = 600
    path.write_text(json.dumps(index))
    with raises_data_error(600, key="w/master/0"):
        read(checkpoint)


def test_last_and_every_so_many_are_kept(tmp_path):
    for step in range(1, 11):
        save(tmp_path, step, keep_last=2, keep_every=4)
    assert [step_of(c) for c in checkpoints(tmp_path)] == [4, 8, 9, 10]
    for checkpoint in checkpoints(tmp_path):
        assert torch.equal(read(checkpoint), values(step_of(checkpoint)))


def test_a_damaged_later_one_costs_no_earlier_one(tmp_path):
    """After step 3 was found damaged, the run saves step 2 and must keep it."""
    for step in (1, 3):
        save(tmp_path, step)
    save(tmp_path, 2, keep_last=1)
    assert [step_of(c) for c in checkpoints(tmp_path)] == [2, 3]


def test_damaged_ones_do_not_count(tmp_path):
    """Damaged checkpoints are not among the two that are kept."""
    for step in (1, 2, 3):
        save(tmp_path, step, keep_last=3)
    save(tmp_path, 4, keep_last=3)
    prune(tmp_path, 4, 2, None, damaged=[checkpoint_folder(tmp_path, 3)])
    assert [step_of(c) for c in checkpoints(tmp_path)] == [2, 4]


def test_newest_readable_index(tmp_path):
    assert newest_index(tmp_path) is None
    for step in (1, 2):
        save(tmp_path, step)
    (tmp_path / "step-00000002/checkpoint.json").unlink()
    index = newest_index(tmp_path)
    assert index is not None
    assert index.step == 1
    assert index.config == CONFIG


def test_missing_ranks_are_named_in_time(tmp_path):
    target = begin(tmp_path, 1)
    write_rank(target, 1, 0)
    with raises_data_error(path=partial_folder(target), key="rank 1, 2"):
        publish(target, 3, lambda *_: None, Event(), patience_s=0.2)
    assert checkpoints(tmp_path) == []


def test_no_rank_is_late_while_rank_0_writes(tmp_path):
    target = begin(tmp_path, 1)
    write_rank(target, 1, 1)
    late = Timer(0.6, write_rank, (target, 1, 0))
    late.start()
    publish(target, 2, partial(make_index, 1), Event(), patience_s=0.3)
    late.join()
    assert torch.equal(read(target), values(1))


def test_a_failed_rank_ends_the_wait(tmp_path):
    target, canceled, errors = begin(tmp_path, 1), Event(), []

    def wait() -> None:
        try:
            publish(target, 2, lambda *_: None, canceled)
        except DataError as error:
            errors.append(error)

    waiting = Thread(target=wait)
    waiting.start()
    canceled.set()
    waiting.join(10)
    assert not waiting.is_alive()
    assert [error.key for error in errors] == ["rank 0, 1"]


def test_parts_of_a_dead_job_are_not_taken_for_new_ones(tmp_path):
    target = begin(tmp_path, 1)
    write_rank(target, 99, 1)  # other values, by a job that died here
    save(tmp_path, 1)
    assert torch.equal(read(target), values(1))


def test_a_part_cannot_name_a_file_elsewhere(tmp_path):
    target = begin(tmp_path, 1)
    write_rank(target, 1, 0)
    part = partial_folder(target) / "rank-00000.json"
    part.write_text(part.read_text().replace('"file":"rank', '"file":"../rank'))
    with raises_data_error(path=part, key="file"):
        publish(target, 1, lambda *_: None, Event())
