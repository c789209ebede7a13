"""Saving and continuing a run: training waits for a copy to host memory, a thread writes it.

Main threads alone communicate with other ranks; the threads that write do so through files (see
`checkpoint.write`). So ranks agree on what became of a write at the next `poll`, `save` or
`finish`, which all of them call.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from threading import Event

import torch
import torch.distributed as dist
from pydantic import JsonValue

from moa_dist.checkpoint.agreement import broadcast_from_rank0, gather
from moa_dist.checkpoint.background import Background
from moa_dist.checkpoint.check import damage
from moa_dist.checkpoint.format import (
    FORMAT,
    MASTER,
    Index,
    Reader,
    checkpoint_folder,
    checkpoints,
    step_of,
)
from moa_dist.checkpoint.host_copy import HostCopy
from moa_dist.checkpoint.note import Note, NoteKind
from moa_dist.checkpoint.pending_write import Identity, PendingWrite, WriteProgress
from moa_dist.checkpoint.state_source import StateSource
from moa_dist.checkpoint.write import (
    IndexMaker,
    describe_write_error,
    discard,
    partial_folder,
    prune,
    publish,
    remove_leftovers,
    write_part,
)
from moa_dist.config.run import Config, OptimizerConfig
from moa_dist.errors import DataError, SaveError
from moa_dist.provenance import Provenance, differences, provenance


@dataclass(frozen=True)
class Resumed:
    """What a run goes on from."""

    step: int
    """Steps taken so far; 0 for a new run."""
    samples: int
    """Sequences consumed so far."""
    state: dict[str, JsonValue]
    """What was given to `save`."""
    config: Config | None
    """The configuration that it was saved with; None for a new run."""
    notes: list[Note]
    """What a person should know: from which checkpoint, and why no newer one."""


class Checkpointer:
    """The checkpoints of one run; at most one is being written.

    Methods are collective unless they say otherwise. Those that return notes, and those that
    raise, do so alike on every rank.
    """

    def __init__(self, source: StateSource, config: Config, folder: Path) -> None:
        """`folder` is the run's; the policy is `config.checkpoint`."""
        self._source = source
        self._config = config
        self._folder = folder
        self._host = HostCopy(source.device)
        self.provenance = broadcast_from_rank0(provenance)
        """Sources, packages and image of rank 0, which every checkpoint names."""
        self._write: PendingWrite | None = None
        self._saved: Identity | None = None  # identity of the newest checkpoint
        self._failed: str | None = None  # why the last one is not there
        self._damaged: list[Path] = []  # passed over by `resume`
        self.num_failures = 0
        """Checkpoints that could not be written."""

    def resume(self, last_step: int | None = None) -> Resumed:
        """Load the newest valid checkpoint into the source, whichever layout wrote it.

        `last_step` is for going back: later checkpoints are not considered, and are deleted.
        Waits for the pending write. Raises DataError if there are checkpoints, but none is valid
        or of this model, or if there is none to go back to; and like `save`.
        """
        notes = self._settle()
        folders = broadcast_from_rank0(self._tidy_and_list)
        later = [f for f in folders if last_step is not None and step_of(f) > last_step]
        damaged: list[Note] = []
        self._damaged = []
        for folder in reversed(folders[: len(folders) - len(later)]):
            if problem := self._damage(folder):
                damaged.append(problem)
                self._damaged.append(folder)
                continue
            resumed = self._load(folder)
            broadcast_from_rank0(partial(_discard_all, later))
            self._saved = Identity(resumed.step, resumed.samples, resumed.state)
            return replace(resumed, notes=[*notes, *damaged, *resumed.notes])
        self._require_none(damaged, last_step)
        return Resumed(0, 0, {}, None, notes)

    def branch(self, folder: Path) -> Resumed:
        """Load the checkpoint `folder` of another run, whose state this one continues.

        Raises DataError if it is damaged or of another model.
        """
        if problem := self._damage(folder):
            raise DataError(f"{problem}; use an older checkpoint, or a copy", path=folder)
        return self._load(folder)

    def _damage(self, folder: Path) -> Note | None:
        """Check a checkpoint's files, divided among the ranks."""
        rank, world_size = dist.get_rank(), dist.get_world_size()
        problems = [p for found in gather(damage(folder, rank, world_size)) for p in found]
        if not problems:
            return None
        return Note(NoteKind.DAMAGED, folder, f"{folder} is damaged ({problems[0]})")

    def _load(self, folder: Path) -> Resumed:
        index = load(self._source, folder, self._config.optimizer)
        resumed = Note(NoteKind.RESUMED, folder, f"continuing from {folder}")
        notes = [resumed, *self._changes(folder, index.provenance)]
        return Resumed(index.step, index.samples, index.state, index.config, notes)

    def _require_none(self, damaged: list[Note], last_step: int | None) -> None:
        """Raise DataError if a checkpoint was needed, or some are there and none is valid."""
        if damaged:
            lines = "\n  ".join(map(str, damaged))
            raise DataError(
                f"{self._folder}: no checkpoint is valid:\n  {lines}\n"
                "Restore one from a copy, or delete them all to start anew",
                path=self._folder,
                causes=[DataError(note.text, path=note.checkpoint) for note in damaged],
            )
        if last_step is not None:
            raise DataError(
                f"{self._folder}: no checkpoint up to step {last_step} to go back to; save more "
                "often (checkpoint.every) or keep more of them (checkpoint.keep_last)",
                path=self._folder,
                key="checkpoint.every",
            )

    def save(
        self, step: int, samples: int, state: dict[str, JsonValue] | None = None
    ) -> list[Note]:
        """Begin to write a checkpoint; returns when the source may change again.

        Waits for the one before. With `checkpoint.asynchronous` false, waits for this one too.

        Args:
            step: steps taken.
            samples: sequences consumed.
            state: whatever JSON can hold, given back by `resume`.

        Returns:
            What became of writes.

        Raises:
            SaveError: a write failed, and `checkpoint.on_failure` is `stop`.
        """
        notes = self._settle()
        identity = Identity(step, samples, state or {})
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

    def poll(self) -> list[Note]:
        """See whether the pending write has ended, without waiting; for now and then.

        Returns and raises like `save`.
        """
        if self._write is None:  # on every rank alike
            return []
        progress = torch.tensor(int(self._write.progress()), device=self._source.device)
        dist.all_reduce(progress, op=dist.ReduceOp.MAX)
        return [] if progress.item() == WriteProgress.RUNNING else self._settle()

    def finish(self) -> list[Note]:
        """Wait for the pending write.

        Returns like `save`. Raises SaveError if the last checkpoint could not be written,
        whatever the policy: a run should not end as if its result were there.
        """
        notes = self._settle()
        if self._failed is not None:
            raise SaveError(self._failed)
        return notes

    def _changes(self, folder: Path, then: Provenance | None) -> list[Note]:
        """Return a note if other sources, Python or `NUMERIC_PACKAGES` saved it than rank 0's."""
        changes = then and differences(then, self.provenance)
        text = f"changed since that was saved: {changes}"
        return [Note(NoteKind.CHANGED, folder, text)] if changes else []

    def _tidy_and_list(self) -> list[Path]:
        # Where the folder cannot be changed, saving will say so; reading may go on.
        with suppress(OSError):
            remove_leftovers(self._folder)
        return checkpoints(self._folder)

    def _prepare(self, target: Path) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(self._folder)
        partial_folder(target).mkdir()

    def _start_writing(self, target: Path, identity: Identity) -> PendingWrite:
        rank = dist.get_rank()
        updates = self._source.num_updates()
        if updates == 0:
            self._source.make_optimizer_state(0)  # all zero, but a whole checkpoint has it
        snapshot = self._host.take(self._source.fragments(owned_only=True))
        part = Background(lambda: write_part(partial_folder(target), rank, snapshot))
        canceled = Event()
        if rank > 0:
            return PendingWrite(target, identity, part, None, canceled)
        notes: list[Note] = []
        make_index = self._index_maker(identity, updates)
        publication = partial(self._publish_and_prune, target, make_index, canceled, notes)
        return PendingWrite(target, identity, part, Background(publication), canceled, notes)

    def _index_maker(self, identity: Identity, updates: int) -> IndexMaker:
        """What is known now of the checkpoint's index; its files are when they are written."""
        index = partial(
            Index,
            format=FORMAT,
            step=identity.step,
            samples=identity.samples,
            updates=updates,
            state=identity.state,
            world_size=dist.get_world_size(),
            config=self._config,
            provenance=self.provenance,
            shapes=self._source.global_shapes(),
        )
        return lambda files, tensors: index(files=files, tensors=tensors)

    def _publish_and_prune(
        self, target: Path, make_index: IndexMaker, canceled: Event, notes: list[Note]
    ) -> None:
        """Make the parts of all ranks a checkpoint and delete old ones; runs in a thread."""
        publish(target, dist.get_world_size(), make_index, canceled)
        self._damaged = [path for path in self._damaged if path != target]  # it is sound now
        keep, newest = self._config.checkpoint, step_of(target)
        try:
            prune(self._folder, newest, keep.keep_last, keep.keep_every, self._damaged)
        except OSError as error:  # such as one that somebody reads, on a network file system
            text = f"an old checkpoint stays: {describe_write_error(error)}"
            notes.append(Note(NoteKind.STAYS, target, text))

    def _settle(self) -> list[Note]:
        """Wait for the pending write, and agree on what became of it."""
        write, self._write = self._write, None
        if write is None:  # on every rank alike
            return []
        found = write.part.wait()
        errors = [
            f"rank {rank}: {text}"
            for rank, text in enumerate(gather(found and describe_write_error(found)))
            if text is not None
        ]
        if errors:
            write.canceled.set()
        error, seconds, notes = broadcast_from_rank0(write.outcome)
        if error is not None:
            return [self._note_failure(write.target, "; ".join(errors) or error)]
        self._saved, self._failed = write.identity, None
        text = f"saved {write.target} in {seconds:.1f} s"
        return [Note(NoteKind.SAVED, write.target, text), *notes]

    def _note_failure(self, target: Path, error: str) -> Note:
        """Count it; raises SaveError if that is the policy."""
        self.num_failures += 1
        self._failed = f"{target} was not saved: {error}"
        if self._config.checkpoint.on_failure == "stop":
            raise SaveError(self._failed)
        times = "once" if self.num_failures == 1 else f"{self.num_failures} times"
        text = f"{self._failed} (failed {times}; checkpoint.on_failure lets training go on)"
        return Note(NoteKind.FAILED, target, text)


def _discard_all(folders: list[Path]) -> None:
    for folder in folders:
        discard(folder)


@torch.no_grad()
def load(source: StateSource, folder: Path, optimizer: OptimizerConfig) -> Index:
    """Restore parameters and optimizer state, saved in any layout. Collective.

    Reads just the ranges that this rank holds. Moments are zero, as in a new run, if weights come
    from elsewhere or `optimizer` keeps others than the one that was saved.
    """
    reader = Reader(folder)
    reader.check_shapes(source.global_shapes())
    are_new = reader.index.step == 0 or _moments(reader.index.config.optimizer) != _moments(
        optimizer
    )
    source.make_optimizer_state(0 if are_new else reader.index.updates)
    for fragment in source.fragments(owned_only=False):
        if fragment.state != MASTER and are_new:
            fragment.view.zero_()
            continue
        name = f"{fragment.parameter}/{fragment.state}"
        reader.read_into(name, fragment.start, fragment.view)
    source.publish_masters()
    return reader.index


def _moments(optimizer: OptimizerConfig) -> tuple[str, bool]:
    """Return what decides which moments an optimizer keeps."""
    return optimizer.kind, optimizer.momentum > 0
