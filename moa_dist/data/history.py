"""What has decided a run's order of samples so far: weights of sources, and excluded shards.

Both may change when a run resumes, and both are part of a checkpoint's state, so that samples keep
the places at which they were consumed.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import NamedTuple

from pydantic import JsonValue

from moa_dist.config.data import DataConfig
from moa_dist.data.mixture import (
    Stages,
    configured_stages,
    continue_stages,
    read_stages,
    stages_as_json,
)
from moa_dist.data.order import Exclusions, as_json, exclude, read_exclusions


class OrderHistory(NamedTuple):
    """Decides the order of samples, together with seed, manifests and readers."""

    stages: Stages = ()
    """Weights of the sources, and since when; none if they are still to be configured."""
    exclusions: Mapping[str, Exclusions] = {}
    """Source -> its excluded shards, and since which global sample."""

    @staticmethod
    def read(state: Mapping[str, JsonValue]) -> OrderHistory:
        """Read what `state` put into a checkpoint."""
        return OrderHistory(
            read_stages(state.get("mixture")), read_exclusions(state.get("exclusions"))
        )

    def state(self) -> dict[str, JsonValue]:
        """Return what a checkpoint keeps."""
        return {"mixture": stages_as_json(self.stages), "exclusions": as_json(self.exclusions)}

    def continued(
        self, data: DataConfig, sample: int, damaged: Mapping[str, tuple[int, ...]]
    ) -> OrderHistory:
        """Return the history of a run that continues at `sample`.

        Args:
            data: its data section, whose weights apply from there on.
            sample: number of samples consumed.
            damaged: source -> shards to exclude from there on.
        """
        return OrderHistory(
            continue_stages(self.stages, sample, configured_stages(data)),
            {
                **self.exclusions,
                **{
                    name: exclude(self.exclusions.get(name, ()), sample, shards)
                    for name, shards in damaged.items()
                },
            },
        )

    def without_exclusions(self, sources: Collection[str]) -> OrderHistory:
        """Forget the excluded shards of sources that now hold other data."""
        kept = {name: each for name, each in self.exclusions.items() if name not in sources}
        return self._replace(exclusions=kept)
