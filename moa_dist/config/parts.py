"""What the sections of attention and of feed-forward parts have in common."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, Self

from moa_dist.config.routers import RouterConfig
from moa_dist.config.section import Kind
from moa_dist.errors import Problem

Part = Literal["attention", "ffn"]
"""The two parts of a layer that may hold experts."""
PARTS: tuple[Part, ...] = ("attention", "ffn")


class PartConfig(Kind):
    """What the schema of an attention or FFN kind says of itself; a dense kind has no router."""

    @property
    def routers(self) -> dict[str, RouterConfig]:
        """Routers by the field that holds them."""
        return {name: value for name, value in self if isinstance(value, RouterConfig)}

    @property
    def num_flat_experts(self) -> int:
        """Experts of one layer among which expert parallelism divides, all heads together.

        0 for a dense kind; the fewest of any router where there are several.
        """
        return min((router.num_experts for router in self.routers.values()), default=0)

    def problems(self, path: str) -> Iterable[Problem]:
        """Report what is wrong within this section, which is found at `path`; nothing by default.

        A kind whose own sizes must fit each other overrides it.
        """
        return ()

    def with_routers(self, **fields: Any) -> Self:
        """A copy with other values in these fields of all its routers."""
        routers = {name: router.changed(**fields) for name, router in self.routers.items()}
        return self.model_copy(update=routers)

    def shrink(self, expert_parallel: int) -> Self:
        """A small copy that makes the same choices; see `moa_dist.config.shrink`.

        By default only the routers shrink: a kind that has sizes of its own shrinks these too.
        """
        return self.changed(**self._shrunk_routers(expert_parallel))

    def _shrunk_routers(self, expert_parallel: int) -> dict[str, RouterConfig]:
        return {
            name: router.shrink(expert_parallel, expert_parallel)
            for name, router in self.routers.items()
        }
