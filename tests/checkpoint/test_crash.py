"""A process killed at any instant of a save leaves a valid checkpoint: the new one or the old."""

import os
import sys
import threading
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch

from moa_dist.checkpoint.check import damage
from moa_dist.checkpoint.format import checkpoints, step_of
from moa_dist.checkpoint.write import remove_leftovers
from tests.checkpoint.saved import read, save, values
from tests.distributed.pool import PRELOADED

KILLED = 77
FILE_OPERATIONS = {"mkdir", "open", "write", "flush", "fsync", "rename", "unlink", "rmdir", "close"}


def save_until(folder: Path, step: int, instant: int) -> None:
    """Save, and die just before or after the file operation of that number, without a clean-up.

    Python reports every call of a built-in function and every return from one, so this needs no
    opening in the code, and no operation can be forgotten.
    """
    seen, lock = 0, threading.Lock()

    def profile(_frame, event, function):
        nonlocal seen
        if event in ("c_call", "c_return") and function.__name__ in FILE_OPERATIONS:
            with lock:
                if seen == instant:
                    os._exit(KILLED)
                seen += 1

    threading.setprofile(profile)
    sys.setprofile(profile)
    save(folder, step, keep_last=1)
    os._exit(0)  # later than all instants


def killed(folder: Path, step: int, instant: int) -> bool:
    child = os.fork()
    if child == 0:
        save_until(folder, step, instant)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, KILLED)
    return code == KILLED


def kill_at_every_instant(folder: Path, old: int, new: int) -> list[int]:
    """Steps of the newest checkpoints after each kill."""
    torch.set_num_threads(1)
    save(folder, old)
    newest_steps = []
    while killed(folder, new, instant=len(newest_steps)):
        remove_leftovers(folder)  # as the next job does
        for checkpoint in checkpoints(folder):
            assert damage(checkpoint) == []
            assert torch.equal(read(checkpoint), values(step_of(checkpoint)))
        assert set(folder.iterdir()) == set(checkpoints(folder)), "something is left over"
        newest_steps.append(step_of(checkpoints(folder)[-1]))
        if newest_steps[-1] != old:
            save(folder, old, keep_last=1)
            remove_later(folder, old)
    assert torch.equal(read(checkpoints(folder)[-1]), values(new))
    return newest_steps


def remove_later(folder: Path, step: int) -> None:
    for checkpoint in checkpoints(folder):
        if step_of(checkpoint) > step:
            checkpoint.rename(checkpoint.with_name(checkpoint.name + ".partial"))
    remove_leftovers(folder)


@pytest.mark.parametrize(
    "new",
    [pytest.param(2, id="next step"), pytest.param(1, id="same step", marks=pytest.mark.full)],
)
def test_killed_at_every_instant_of_a_save(tmp_path, new):
    """Keep only one checkpoint; also kill while another of the same step replaces it."""
    context = get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with context.Pool(1) as clean:  # children are forked there, where no other threads run
        work = clean.apply_async(kill_at_every_instant, (tmp_path / "run", 1, new))
        newest_steps = work.get(timeout=120)
    assert len(newest_steps) >= 60
    assert newest_steps == sorted(newest_steps), "once there, it stays"
    assert set(newest_steps) == {1, new}
