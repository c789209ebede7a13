"""Names for the layers and routers of a model, and for each of their applications."""

from __future__ import annotations

from typing import NamedTuple

RouterKey = tuple[int, str]
"""Identifies a router: its distinct layer, and its name within the layer."""


LayerCall = tuple[int, int]
"""Identifies one application of a layer: the number of its block, and the block's repeat."""


class RouterCall(NamedTuple):
    """Identifies one application of a router."""

    layer: int
    """Number of the first block that uses the router; in a model that translates, the decoder's
    blocks are counted after the encoder's."""
    repeat: int
    """Earlier applications of that router, 0 ... R - 1."""
    router: str
    """Name of the router within the layer, such as `ffn`."""

    @property
    def key(self) -> RouterKey:
        """The router, which is the same for all repeats of a layer."""
        return self.layer, self.router


class PlannedLayer(NamedTuple):
    """One application of a layer, as planned when a stack is built."""

    block: int
    """Index of the block in its stack."""
    call: LayerCall
    """Identifies this application."""
    routers: dict[str, RouterCall]
    """Identifies the applications of its routers, by their names within the layer."""
