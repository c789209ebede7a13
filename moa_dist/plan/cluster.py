"""GPUs and the links between them, as far as a plan needs them.

Figures are those of vendors' data sheets, dense, never with sparsity; links count one direction.
What a job reaches of them is assumed apart, in `moa_dist.plan.time`.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from moa_dist.peak_flops import peak_flops


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU."""

    name: str
    """As NVIDIA calls it."""
    capability: tuple[int, int]
    """Compute capability."""
    memory: int
    """Bytes; a data sheet's GB are 10^9."""
    memory_bandwidth: float
    """Bytes a second."""
    link_bandwidth: float
    """Bytes a second that a GPU sends to others of its node: NVLink, half of both directions."""
    network_bandwidth: float
    """Bytes a second that a GPU sends to other nodes, with the usual one adapter per GPU."""

    def flops(self, precision: str) -> float | None:
        """Peak FLOPs a second, None if the type is not for training on it."""
        return peak_flops(f"cuda (NVIDIA {self.name})", precision)


GPUS = {
    gpu.name.lower(): gpu
    for gpu in (
        Gpu("A100", (8, 0), int(80e9), 2.039e12, 300e9, 25e9),
        Gpu("H100", (9, 0), int(80e9), 3.35e12, 450e9, 50e9),
        Gpu("H200", (9, 0), int(141e9), 4.8e12, 450e9, 50e9),
        Gpu("B200", (10, 0), int(180e9), 7.7e12, 900e9, 50e9),
    )
}
"""SXM modules by the name that a command takes; adapters of 200 Gb/s beside A100, else 400."""


@dataclass(frozen=True)
class NetworkLink:
    """What a collective of some ranks runs over."""

    bandwidth: float
    """Bytes a second and rank."""
    latency: float
    """Seconds that it takes however little it carries."""


@dataclass(frozen=True)
class Cluster:
    """Equal GPUs in equal nodes; neighbouring ranks fill a node."""

    num_gpus: int
    """W."""
    gpus_per_node: int
    """As many ranks are neighbours by fast links."""
    gpu: Gpu
    """What each rank has."""
    link_latency: float = 10e-6
    """Seconds per collective inside a node."""
    network_latency: float = 25e-6
    """Seconds per collective between nodes."""

    def members_per_node(self, size: int, stride: int) -> int:
        """Ranks of one node in a group of `size` ranks, each `stride` after the one before."""
        return min(size, max(1, self.gpus_per_node // stride))

    def ring(self, size: int, stride: int) -> NetworkLink:
        """Link of an all-reduce, a gather or a scatter: rings that use all adapters of the group.

        Across nodes a group's ring is cut into as many as it has ranks in a node, each with its
        own adapter, and each carries its part of the data.
        """
        members = self.members_per_node(size, stride)
        if members == size:
            return NetworkLink(self.gpu.link_bandwidth, self.link_latency)
        across = members * self.gpu.network_bandwidth
        return NetworkLink(min(self.gpu.link_bandwidth, across), self.network_latency)

    def all_to_all(self, size: int) -> NetworkLink:
        """Link of an all-to-all among `size` neighbours, which send each other equally much.

        What goes to the own node and what goes to others leave side by side.
        """
        members = self.members_per_node(size, stride=1)
        if members == size:
            return NetworkLink(self.gpu.link_bandwidth, self.link_latency)
        away = (size - members) / (size - 1)
        slowest = max((1 - away) / self.gpu.link_bandwidth, away / self.gpu.network_bandwidth)
        return NetworkLink(1 / slowest, self.network_latency)


def with_figures(gpu: Gpu, **figures: float | None) -> Gpu:
    """The same with some figures replaced; None keeps one."""
    own = {field.name: getattr(gpu, field.name) for field in fields(gpu)}
    return Gpu(**own | {name: value for name, value in figures.items() if value is not None})
