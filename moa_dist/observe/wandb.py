"""Keeps a run in wandb, which follows its own environment variables.

Points after a step are discarded by wandb's `resume_from`; where a server lacks it, the run goes on
as another one of the same name. Without a server, or without a key, wandb writes to the run's
folder, and `wandb sync` uploads that later, with what was discarded.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import wandb

from moa_dist.observe.metrics import RunStart, SampleMetrics
from moa_dist.observe.tracker import Identity, Point

_INIT_S = 30.0
"""Longest time to wait for a server at start."""
_FINISH_S = 15.0
"""Longest time to wait for it at the end."""


class Wandb:
    """One run of wandb, or several where points had to be discarded."""

    def __init__(self) -> None:
        self._started: RunStart | None = None
        self._identity: Identity | None = None
        self._run: Any = None

    def open(self, run: RunStart) -> Iterator[str]:
        """Begin a run, or continue it after `run.first_step`; yields notes."""
        self._started, self._identity = run, Identity.read(run, "wandb")
        yield from self._begin(run.first_step)

    def log(self, point: Point) -> None:
        """Add a point; wandb itself buffers it."""
        self._known.set(self._run.id, point.step)
        self._run.log(point.values, step=point.step)

    def log_samples(self, metrics: SampleMetrics) -> None:
        """Add a table of texts."""
        table = wandb.Table(columns=["prompt", "text"], data=[list(s) for s in metrics.samples])
        self._known.set(self._run.id, metrics.step)
        self._run.log({"samples": table}, step=metrics.step)

    def rewind(self, step: int) -> Iterator[str]:
        """Discard all points after `step`; yields notes."""
        self.close()
        yield from self._begin(step)

    def close(self) -> None:
        """End the run, and wait for what is being uploaded."""
        if self._run is not None:
            self._run.finish()
            self._run = None

    @property
    def _known(self) -> Identity:
        assert self._identity is not None, "open comes first"
        return self._identity

    def _begin(self, step: int) -> Iterator[str]:
        known = self._known
        how: dict[str, Any] = {"id": secrets.token_hex(4)}
        if known.id is not None and step > 0:
            time.sleep(1.0)  # wandb names a folder by id and second, and would write over the last
            how = {"id": known.id, "resume": "allow"}
            if known.last_step > step:
                how = {"resume_from": f"{known.id}?_step={step}"}
        is_online = wandb.setup().settings.mode == "online"
        problem = ""
        if is_online and not wandb.login(prompt=False, verify=False):
            problem = "no key: set WANDB_API_KEY, or run `wandb login`"
        attempts = [how] if is_online and not problem else []
        if attempts and "resume_from" in how:
            attempts.append({"id": secrets.token_hex(4)})
        for attempt in attempts:
            try:
                self._run = self._init(None, attempt)
            except Exception as error:  # they have no common base
                problem = " ".join(str(error).split())[:200]
                wandb.teardown()  # else the id stays in use
                continue
            if attempt is not how:
                yield (
                    f"wandb could not rewind to step {step} ({problem}): "
                    f"the run goes on as {self._run.id}"
                )
            break
        else:
            self._run = self._init("offline" if is_online else None, how)
            if problem:
                yield (
                    f"wandb writes to {self._run.settings.sync_dir} instead of its server "
                    f"({problem}); `wandb sync` uploads that"
                )
        known.set(self._run.id, step)

    def _init(self, mode: Any, how: dict[str, Any]) -> Any:
        assert self._started is not None, "open comes first"
        config, provenance = self._started.config, self._started.provenance
        return wandb.init(
            project=config.logging.project,
            name=config.name,
            group=config.name,
            tags=config.logging.tags,
            dir=Path(self._started.folder).resolve(),  # its own process is elsewhere
            mode=mode,
            config=config.model_dump(mode="json") | {"commit": provenance.commit},
            settings=wandb.Settings(
                console="off",  # the project writes its own logs
                silent=True,
                disable_git=True,
                save_code=False,
                init_timeout=_INIT_S,
                finish_timeout=_FINISH_S,
            ),
            **how,
        )
