"""Saves that fail, on every rank alike; and which checkpoint a run continues from."""

import errno
import os
import resource
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from moa_dist.checkpoint import checkpointer
from moa_dist.checkpoint.check import damage
from moa_dist.checkpoint.checkpointer import Checkpointer
from moa_dist.checkpoint.format import Reader, checkpoint_folder, checkpoints, step_of
from moa_dist.checkpoint.note import Note, NoteKind
from moa_dist.config.run import Config
from moa_dist.errors import DataError, SaveError
from moa_dist.provenance import Change, provenance
from tests.distributed.layouts import Case
from tests.distributed.test_reshard import make_engine, owned_state, take_step
from tests.raises import raises_data_error

CASE = Case(optimizer="adamw", precision="fp32", zero_stage=1)


def with_policy(case: Case, **policy) -> Config:
    config = case.config()
    checkpoint = config.checkpoint.model_copy(update=policy)
    return config.model_copy(update={"checkpoint": checkpoint})


# ---- disks that fail ------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path | None]:
    """A file system of its own, or None where mounting is not allowed."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "none", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        yield None
        return
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@contextmanager
def full(folder: Path) -> Iterator[None]:
    filler = folder / "filler"
    with filler.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(4096))
    yield
    filler.unlink()


@contextmanager
def small_files() -> Iterator[None]:
    """No file of this process grows beyond a few bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
    yield
    subprocess.run(["mount", "-o", "remount,rw", str(folder)], check=True)


@contextmanager
def failing(how: str, folder: Path) -> Iterator[None]:
    """On every rank; what all of them share, rank 0 breaks and mends."""
    rank = dist.get_rank()
    breaks = {
        "full": full(folder) if rank == 0 else nullcontext(),
        "read-only": read_only(folder) if rank == 0 else nullcontext(),
        "small files": small_files(),
        "one rank": small_files() if rank == 1 else nullcontext(),
    }
    with breaks[how]:
        dist.barrier()
        yield
        dist.barrier()


def events(notes: list[Note]) -> list[tuple[NoteKind, int]]:
    """Kind and step of each note."""
    return [(note.kind, step_of(note.checkpoint)) for note in notes]


def settle(checkpointer: Checkpointer) -> list[Note]:
    """Poll as training does, until something is known."""
    deadline = time.monotonic() + 60
    while not (notes := checkpointer.poll()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return notes


def save_in_place_of_a_damaged_one(config: Config, folder: Path) -> list[str]:
    """Steps 1 and 2, which is altered, then 2 again and 3; what is left, and sound."""
    engine = make_engine(CASE, seed=0)
    checkpointer = Checkpointer(engine.state, config, folder)
    for step in (1, 2):
        take_step(engine, CASE, step)
        checkpointer.save(step, 8 * step)
        checkpointer.finish()
    if dist.get_rank() == 0:
        file = folder / "step-00000002/rank-00000.safetensors"
        file.write_bytes(file.read_bytes()[:-1] + b"?")
    dist.barrier()
    assert checkpointer.resume().step == 1
    for step in (2, 3):
        take_step(engine, CASE, step)
        checkpointer.save(step, 8 * step)
        checkpointer.finish()
    dist.barrier()
    left = [path.name for path in checkpoints(folder) if not damage(path)]
    engine.close()
    return left


def test_what_takes_a_damaged_one_s_place_is_kept(pools, tmp_path):
    config = with_policy(CASE, keep_last=2)
    for left in pools(2).run(save_in_place_of_a_damaged_one, config, tmp_path / "run"):
        assert left == ["step-00000002", "step-00000003"]


def save_while_an_old_one_is_held(config: Config, folder: Path) -> tuple[list[Note], list[str]]:
    """Notes on rank 0's side, and what is left."""
    engine = make_engine(CASE, seed=0)
    checkpointer = Checkpointer(engine.state, config, folder)
    checkpointer.save(1, 8)
    checkpointer.finish()
    take_step(engine, CASE, 1)
    busy = OSError(errno.EBUSY, os.strerror(errno.EBUSY), str(folder))
    with patch("moa_dist.checkpoint.write.discard", side_effect=busy):
        checkpointer.save(2, 16)
        notes = checkpointer.finish()
    dist.barrier()
    left = sorted(path.name for path in folder.iterdir())
    engine.close()
    return notes, left


def test_an_old_checkpoint_that_stays_is_no_failure(pools, tmp_path):
    """Such as one that somebody reads, on a network file system."""
    config = with_policy(CASE, keep_last=1)
    for notes, left in pools(2).run(save_while_an_old_one_is_held, config, tmp_path / "run"):
        assert events(notes) == [(NoteKind.SAVED, 2), (NoteKind.STAYS, 2)]
        assert os.strerror(errno.EBUSY) in notes[1].text
        assert left == ["step-00000001", "step-00000002"]


def save_while_failing(config: Config, how: str, folder: Path):
    """Save steps 1, 2 (in vain) and 3; what the second one led to, on each rank."""
    engine = make_engine(CASE, seed=0)
    run = folder / "run"
    checkpointer = Checkpointer(engine.state, config, run)
    take_step(engine, CASE, 1)
    checkpointer.save(1, 8)
    checkpointer.finish()
    take_step(engine, CASE, 2)
    stopped = False
    with failing(how, folder):
        try:
            (note,) = checkpointer.save(2, 16) or settle(checkpointer)
        except SaveError as error:
            text, stopped = str(error), True
        else:
            assert events([note]) == [(NoteKind.FAILED, 2)]
            text = note.text
        with pytest.raises(SaveError) as raised:  # no run ends well without its last checkpoint
            checkpointer.finish()
    assert str(raised.value) in text
    left = sorted(p.name for p in run.iterdir())
    assert checkpointer.num_failures == 1
    dist.barrier()
    take_step(engine, CASE, 3)
    checkpointer.save(3, 24)
    assert events(checkpointer.finish()) == [(NoteKind.SAVED, 3)]
    engine.close()
    return text, stopped, left


@pytest.mark.parametrize("policy", ["stop", "continue"])
@pytest.mark.parametrize(
    ("how", "cause"),
    [
        ("full", "(ENOSPC)"),
        ("read-only", "(EROFS)"),
        ("small files", "(EFBIG)"),
        ("one rank", "rank 1: {}: File too large (EFBIG)"),
    ],
)
def test_a_failed_save_is_one_decision(pools, tmp_path, small_disk, how, cause, policy):
    if how in ("full", "read-only") and small_disk is None:  # cannot mount: what is left to try
        how, cause = "small files", "(EFBIG)"
    folder = tmp_path if small_disk is None else small_disk
    config = with_policy(CASE, on_failure=policy)
    results = pools(2).run(save_while_failing, config, how, folder)
    assert results[0] == results[1]
    text, stopped, left = results[0]
    partial = folder / "run/step-00000002.partial"
    assert cause.format(partial / "rank-00001.safetensors") in text
    assert f"{folder / 'run/step-00000002'} " in text
    assert str(partial) in text
    assert stopped == (policy == "stop")
    assert left == ["step-00000001"]
    steps = [Reader(c).index.step for c in checkpoints(folder / "run")]
    assert steps == [1, 3]
    assert [damage(c) for c in checkpoints(folder / "run")] == [[], []]


# ---- which checkpoint is continued -----------------------------------------------------------


def save_steps(config: Config, folder: Path, last: int):
    engine = make_engine(CASE, seed=0)
    checkpointer = Checkpointer(engine.state, config, folder)
    states, notes = {}, []
    for step in range(1, last + 1):
        take_step(engine, CASE, step)
        states[step] = owned_state(engine)
        notes.append(checkpointer.save(step, 8 * step, {"skipped": [step, "x"]}))
    notes.append(checkpointer.finish())
    again = checkpointer.save(last, 8 * last, {"skipped": [last, "x"]})
    engine.close()
    return states, notes, again


def resume(config: Config, folder: Path, last_step: int | None = None):
    engine = make_engine(CASE, seed=1)
    try:
        resumed = Checkpointer(engine.state, config, folder).resume(last_step)
    except DataError as error:
        return error.path, error.key, [cause.path for cause in error.causes]
    else:
        return resumed, owned_state(engine)
    finally:
        engine.close()


def alter(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_newest_valid_one_is_continued(pools, tmp_path):
    config = with_policy(CASE, keep_last=3)
    saved = pools(2).run(save_steps, config, tmp_path, 3)
    for _, notes, again in saved:
        assert notes[0] == []  # still being written
        assert list(map(events, notes[1:])) == [[(NoteKind.SAVED, step)] for step in (1, 2, 3)]
        assert again == []  # is there already
    (tmp_path / "step-00000004.partial").mkdir()
    alter(tmp_path / "step-00000003/rank-00001.safetensors")  # rank 1's to check
    for (resumed, state), (states, *_) in zip(
        pools(2).run(resume, config, tmp_path), saved, strict=True
    ):
        assert (resumed.step, resumed.samples) == (2, 16)
        assert resumed.state == {"skipped": [2, "x"]}
        assert events(resumed.notes) == [(NoteKind.DAMAGED, 3), (NoteKind.RESUMED, 2)]
        assert str(tmp_path / "step-00000003/rank-00001.safetensors") in resumed.notes[0].text
        assert str(tmp_path / "step-00000002") in resumed.notes[1].text
        assert state.keys() == states[2].keys()
        assert all(torch.equal(state[key], states[2][key]) for key in state)
    assert len(list(tmp_path.iterdir())) == 3
    for step in (1, 2):
        (tmp_path / f"step-0000000{step}/checkpoint.json").unlink()
    all_damaged = [checkpoint_folder(tmp_path, step) for step in (3, 2, 1)]
    for refused in pools(2).run(resume, config, tmp_path):
        assert refused == (tmp_path, None, all_damaged)


def resume_with_another_numpy(config: Config, folder: Path):
    with pytest.MonkeyPatch.context() as patch:
        if dist.get_rank() == 0:  # the one whose environment is recorded
            own = provenance()
            other = replace(own, packages={**own.packages, "numpy": "1.0"})
            patch.setattr(checkpointer, "provenance", lambda: other)
        return resume(config, folder)


def test_other_packages_than_it_was_saved_with_are_noted(pools, tmp_path):
    config = with_policy(CASE)
    pools(2).run(save_steps, config, tmp_path, 1)
    for resumed, _ in pools(2).run(resume_with_another_numpy, config, tmp_path):
        assert events(resumed.notes) == [(NoteKind.RESUMED, 1), (NoteKind.CHANGED, 1)]
        assert str(Change("numpy", metadata.version("numpy"), "1.0")) in resumed.notes[1].text


def test_going_back_forgets_what_came_later(pools, tmp_path):
    config = with_policy(CASE, keep_last=3, asynchronous=False)
    _, notes, _ = pools(2).run(save_steps, config, tmp_path, 3)[0]
    saved = [[(NoteKind.SAVED, step)] for step in (1, 2, 3)]
    assert list(map(events, notes[:3])) == saved  # each before training went on
    for resumed, _ in pools(2).run(resume, config, tmp_path, 2):
        assert resumed.step == 2
    assert [c.name for c in checkpoints(tmp_path)] == ["step-00000001", "step-00000002"]


def go_back_at_once(config: Config, folder: Path):
    engine = make_engine(CASE, seed=0)
    checkpointer = Checkpointer(engine.state, config, folder)
    take_step(engine, CASE, 1)
    state = owned_state(engine)
    checkpointer.save(1, 8)
    resumed = checkpointer.resume()  # what is being written is what it goes back to
    same = all(torch.equal(value, state[key]) for key, value in owned_state(engine).items())
    with raises_data_error("step 0", path=folder, key="checkpoint.every"):
        checkpointer.resume(last_step=0)
    engine.close()
    return resumed.step, same, resumed.notes


def test_going_back_waits_for_what_is_being_written(pools, tmp_path):
    for step, same, notes in pools(2).run(go_back_at_once, with_policy(CASE), tmp_path):
        assert (step, same) == (1, True)
        assert events(notes) == [(NoteKind.SAVED, 1), (NoteKind.RESUMED, 1)]
    assert damage(checkpoints(tmp_path)[-1]) == []


def test_an_empty_folder_is_a_new_run(pools, tmp_path):
    for resumed, _ in pools(2).run(resume, with_policy(CASE), tmp_path / "none"):
        assert (resumed.step, resumed.samples, resumed.state, resumed.notes) == (0, 0, {}, [])


def save_before_any_update(case: Case, folder: Path):
    engine = make_engine(case, seed=0)
    checkpointer = Checkpointer(engine.state, case.config(), folder)
    checkpointer.save(1, 8)  # the first step was skipped
    checkpointer.finish()
    engine.close()
    engine = make_engine(case, seed=1)
    Checkpointer(engine.state, case.config(), folder).resume()
    moments = [f.view for f in engine.state.fragments(owned_only=True) if f.state != "master"]
    engine.close()
    return len(moments), any(bool(m.any()) for m in moments)


@pytest.mark.parametrize("zero_stage", [0, 1, 3])
def test_skipped_steps_are_no_updates(pools, tmp_path, zero_stage):
    case = replace(CASE, zero_stage=zero_stage)
    for count, changed in pools(2).run(save_before_any_update, case, tmp_path):
        assert count > 0
        assert not changed
    assert Reader(checkpoints(tmp_path)[-1]).index.updates == 0
