"""Saving and continuing a run: training waits for a copy to host memory, a thread writes it.

Main threads alone talk to other ranks; the threads that write speak through files (see
`checkpoint_write`). So ranks agree on what became of a write at the next `poll`, `save` or
`finish`, which all of them call.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from threading import Event
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from pydantic import JsonValue

from moa_dist.checkpoint.background import Background
from moa_dist.checkpoint.check import damage
from moa_dist.checkpoint.format import (
    FORMAT,
    MASTER,
    Index,
    Piece,
    Reader,
    checkpoint_folder,
    checkpoints,
    step_of,
)
from moa_dist.checkpoint.host_copy import HostCopy
from moa_dist.checkpoint.write import (
    describe_write_error,
    discard,
    partial_folder,
    prune,
    publish,
    remove_leftovers,
    write_part,
)
from moa_dist.config.run import Config
from moa_dist.errors import DataError, SaveError
from moa_dist.provenance import Provenance, differences, provenance
from moa_dist.train.engine import Engine
from moa_dist.train.fragments import (
    fragments,
    global_shapes,
    make_optimizer_state,
    num_updates,
    publish_masters,
)

Result = TypeVar("Result")
_DONE, _RUNNING, _FAILED = 0, 1, 2


@dataclass(frozen=True)
class Resumed:
    """What a run goes on from."""

    step: int
    """Steps taken so far; 0 for a new run."""
    samples: int
    """Sequences consumed so far."""
    state: dict[str, JsonValue]
    """What was given to `save`."""
    notes: list[str]
    """What a person should know, a line each: from which checkpoint, and why no newer one."""


@dataclass(frozen=True)
class _Write:
    """A checkpoint on its way to the disk."""

    target: Path
    identity: tuple[Any, ...]
    """What tells it from others of the same run."""
    part: Background
    """Writes what this rank owns."""
    publication: Background | None
    """On rank 0, waits for all parts and makes them a checkpoint."""
    cancelled: Event
    """Tells it that a part will never come."""
    notes: list[str] = field(default_factory=list)
    """What else it met, to be said with its success."""

    def progress(self) -> int:
        """Done, running or failed, as far as this rank knows."""
        threads = [t for t in (self.part, self.publication) if t is not None]
        if any(t.failed() for t in threads):
            return _FAILED
        return _DONE if all(t.ended() for t in threads) else _RUNNING


class Checkpointer:
    """The checkpoints of one run; at most one is being written.

    Methods are collective unless they say otherwise. Those that return lines, and those that
    raise, do so alike on every rank.
    """

    def __init__(self, engine: Engine, config: Config, folder: Path) -> None:
        """`folder` is the run's; the policy is `config.checkpoint`."""
        self._engine = engine
        self._config = config
        self._folder = folder
        self._host = HostCopy(engine.device)
        self.provenance = broadcast_from_rank0(provenance)
        """Sources, packages and image of rank 0, which every checkpoint names."""
        self._write: _Write | None = None
        self._saved: tuple[Any, ...] = ()  # identity of the newest checkpoint
        self._failed: str | None = None  # why the last one is not there
        self._damaged: list[Path] = []  # passed over by `resume`
        self.num_failures = 0
        """Checkpoints that could not be written."""

    def resume(self, last_step: int | None = None) -> Resumed:
        """Load the newest valid checkpoint into the engine, whichever layout wrote it.

        `last_step` is for going back: later checkpoints are not considered, and are deleted.
        Waits for the pending write. Raises DataError if there are checkpoints, but none is valid
        or of this model, or if there is none to go back to; and like `save`.
        """
        notes = self._settle()
        folders = broadcast_from_rank0(self._tidy_and_list)
        later = [f for f in folders if last_step is not None and step_of(f) > last_step]
        damaged = []
        self._damaged = []
        for folder in reversed(folders[: len(folders) - len(later)]):
            rank, world_size = dist.get_rank(), dist.get_world_size()
            problems = [p for found in _gather(damage(folder, rank, world_size)) for p in found]
            if problems:
                damaged.append(f"{folder} is damaged ({problems[0]})")
                self._damaged.append(folder)
                continue
            index = load(self._engine, folder)
            broadcast_from_rank0(partial(_discard_all, later))
            self._saved = (index.step, index.samples, index.state)
            notes += [*damaged, f"continuing from {folder}", *self._changes(index.provenance)]
            return Resumed(index.step, index.samples, index.state, notes)
        if damaged:
            lines = "\n  ".join(damaged)
            raise DataError(
                f"{self._folder}: no checkpoint is valid:\n  {lines}\n"
                "Restore one from a copy, or delete them all to start anew"
            )
        if last_step is not None:
            raise DataError(
                f"{self._folder}: no checkpoint up to step {last_step} to go back to; save more "
                "often (checkpoint.every) or keep more of them (checkpoint.keep_last)"
            )
        return Resumed(0, 0, {}, notes)

    def save(self, step: int, samples: int, state: dict[str, JsonValue] | None = None) -> list[str]:
        """Begin to write a checkpoint; returns when the engine may change again.

        Waits for the one before. With `checkpoint.asynchronous` false, waits for this one too.

        Args:
            step: steps taken.
            samples: sequences consumed.
            state: whatever JSON can hold, given back by `resume`.

        Returns:
            What became of writes, a line each.

        Raises:
            SaveError: a write failed, and `checkpoint.on_failure` is `stop`.
        """
        notes = self._settle()
        identity = (step, samples, state or {})
        if identity == self._saved:  # asked to stop right after saving
            return notes
        target = checkpoint_folder(self._folder, step)
        try:
            broadcast_from_rank0(partial(self._prepare, target))
        except DataError as error:
            return [*notes, self._note_failure(target, str(error))]
        self._write = self._start_writing(target, identity)
        if not self._config.checkpoint.asynchronous:
            notes += self._settle()
        return notes

    def poll(self) -> list[str]:
        """See whether the pending write has ended, without waiting; for now and then.

        Returns and raises like `save`.
        """
        if self._write is None:  # on every rank alike
            return []
        progress = torch.tensor(self._write.progress(), device=self._engine.device)
        dist.all_reduce(progress, op=dist.ReduceOp.MAX)
        return [] if progress.item() == _RUNNING else self._settle()

    def finish(self) -> list[str]:
        """Wait for the pending write.

        Returns like `save`. Raises SaveError if the last checkpoint could not be written,
        whatever the policy: a run should not end as if its result were there.
        """
        notes = self._settle()
        if self._failed is not None:
            raise SaveError(self._failed)
        return notes

    def _changes(self, then: Provenance | None) -> list[str]:
        """A line if it was saved by other sources or packages than rank 0's of now."""
        changes = then and differences(then, self.provenance)
        return [f"changed since that was saved: {changes}"] if changes else []

    def _tidy_and_list(self) -> list[Path]:
        # Where the folder cannot be changed, saving will say so; reading may go on.
        with suppress(OSError):
            remove_leftovers(self._folder)
        return checkpoints(self._folder)

    def _prepare(self, target: Path) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(self._folder)
        partial_folder(target).mkdir()

    def _start_writing(self, target: Path, identity: tuple[Any, ...]) -> _Write:
        rank, world_size = dist.get_rank(), dist.get_world_size()
        updates = num_updates(self._engine)
        if updates == 0:
            make_optimizer_state(self._engine, 0)  # all zero, but a whole checkpoint has it
        snapshot = self._host.take(fragments(self._engine, owned_only=True))
        part = Background(lambda: write_part(partial_folder(target), rank, snapshot))
        cancelled = Event()
        if rank > 0:
            return _Write(target, identity, part, None, cancelled)
        step, samples, state = identity
        shapes, config = global_shapes(self._engine), self._config

        def make_index(files: dict[str, int], tensors: dict[str, list[Piece]]) -> Index:
            return Index(
                format=FORMAT,
                step=step,
                samples=samples,
                updates=updates,
                state=state,
                world_size=world_size,
                config=config,
                provenance=self.provenance,
                files=files,
                shapes=shapes,
                tensors=tensors,
            )

        notes: list[str] = []

        def publish_and_prune() -> None:
            publish(target, world_size, make_index, cancelled)
            self._damaged = [path for path in self._damaged if path != target]  # it is sound now
            keep = config.checkpoint
            try:
                prune(self._folder, step, keep.keep_last, keep.keep_every, self._damaged)
            except OSError as error:  # such as one that somebody reads, on a network file system
                notes.append(f"an old checkpoint stays: {describe_write_error(error)}")

        return _Write(target, identity, part, Background(publish_and_prune), cancelled, notes)

    def _settle(self) -> list[str]:
        """Wait for the pending write, and agree on what became of it."""
        write, self._write = self._write, None
        if write is None:  # on every rank alike
            return []
        found = write.part.wait()
        errors = [
            f"rank {rank}: {text}"
            for rank, text in enumerate(_gather(found and describe_write_error(found)))
            if text is not None
        ]
        if errors:
            write.cancelled.set()
        error, seconds, notes = broadcast_from_rank0(partial(_outcome, write))
        if error is not None:
            return [self._note_failure(write.target, "; ".join(errors) or error)]
        self._saved, self._failed = write.identity, None
        return [f"saved {write.target} in {seconds:.1f} s", *notes]

    def _note_failure(self, target: Path, error: str) -> str:
        """Count it; raises SaveError if that is the policy."""
        self.num_failures += 1
        self._failed = f"{target} was not saved: {error}"
        if self._config.checkpoint.on_failure == "stop":
            raise SaveError(self._failed)
        times = "once" if self.num_failures == 1 else f"{self.num_failures} times"
        return f"{self._failed} (failed {times}; checkpoint.on_failure lets training go on)"


def _outcome(write: _Write) -> tuple[str | None, float, list[str]]:
    """On rank 0: why there is no checkpoint, if so, how long it took, and what else happened."""
    assert write.publication is not None
    error = write.publication.wait()
    if error is None:
        return None, write.publication.seconds, write.notes
    # Gives the room back; if even that fails, the next save says so.
    shutil.rmtree(partial_folder(write.target), ignore_errors=True)
    return describe_write_error(error), write.publication.seconds, []


def _discard_all(folders: list[Path]) -> None:
    for folder in folders:
        discard(folder)


def _gather(value: Result) -> list[Result]:
    """Every rank's value, in rank order, on all ranks."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def broadcast_from_rank0(function: Callable[[], Result]) -> Result:
    """What `function` returns there, on all ranks.

    Rank 0 alone looks at names in the folder, which other nodes may see later. If it meets an
    OSError, all ranks raise DataError.
    """
    answer: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            answer[0] = function()
        except OSError as error:
            answer[1] = describe_write_error(error)
    dist.broadcast_object_list(answer)
    if answer[1] is not None:
        raise DataError(answer[1])
    result: Result = answer[0]
    return result


@torch.no_grad()
def load(engine: Engine, folder: Path) -> Index:
    """Restore parameters and optimizer state, saved in any layout. Collective.

    Reads just the ranges that this rank holds.
    """
    reader = Reader(folder)
    reader.check_shapes(global_shapes(engine))
    make_optimizer_state(engine, reader.index.updates)
    for fragment in fragments(engine, owned_only=False):
        if fragment.state != MASTER and reader.index.step == 0:
            fragment.view.zero_()  # weights from elsewhere come without moments
            continue
        name = f"{fragment.parameter}/{fragment.state}"
        reader.read_into(name, fragment.start, fragment.view)
    publish_masters(engine)
    return reader.index
