"""GPUs and the links between them, as far as a plan needs them.

Figures come from vendors' data sheets, without sparsity; links count one direction. The share of
them that a job reaches is assumed in `moa_dist.plan.time`.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from moa_dist.peak_flops import peak_flops


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU."""

    name: str
    """NVIDIA's name."""
    capability: tuple[int, int]
    """Compute capability."""
    memory: int
    """Memory in bytes; a data sheet's GB are 10^9."""
    memory_bandwidth: float
    """Bytes per second."""
    link_bandwidth: float
    """Bytes per second that a GPU sends to others of its node by NVLink."""
    network_bandwidth: float
    """Bytes per second that a GPU sends to other nodes, with one adapter per GPU."""
    host_bandwidth: float
    """Bytes per second to or from its node's memory over PCIe."""

    def flops(self, precision: str) -> float | None:
        """Return peak FLOPs per second, None for a type that it does not train in."""
        return peak_flops(f"cuda (NVIDIA {self.name})", precision)


GPUS = {
    gpu.name.lower(): gpu
    for gpu in (
        Gpu("A100", (8, 0), int(80e9), 2.039e12, 300e9, 25e9, 32e9),
        Gpu("H100", (9, 0), int(80e9), 3.35e12, 450e9, 50e9, 64e9),
        Gpu("H200", (9, 0), int(141e9), 4.8e12, 450e9, 50e9, 64e9),
        Gpu("B200", (10, 0), int(180e9), 7.7e12, 900e9, 50e9, 64e9),
    )
}
"""SXM modules by their name in commands; adapters of 200 Gb/s and PCIe 4 with A100, else of
400 and PCIe 5."""


@dataclass(frozen=True)
class NetworkLink:
    """The effective link of a collective among some ranks."""

    bandwidth: float
    """Bytes per second and rank."""
    latency: float
    """Seconds per collective, whatever its size."""


@dataclass(frozen=True)
class Cluster:
    """Equal GPUs in equal nodes; consecutive ranks fill a node."""

    num_gpus: int
    """Number of ranks (W)."""
    gpus_per_node: int
    """Number of consecutive ranks that fast links connect."""
    gpu: Gpu
    """The GPU of each rank."""
    link_latency: float = 10e-6
    """Seconds per collective inside a node."""
    network_latency: float = 25e-6
    """Seconds per collective between nodes."""

    def members_per_node(self, size: int, stride: int) -> int:
        """Count the ranks of one node in a group of `size` ranks that are `stride` apart."""
        return min(size, max(1, self.gpus_per_node // stride))

    def ring(self, size: int, stride: int) -> NetworkLink:
        """Return the link of an all-reduce, a gather or a scatter.

        Across nodes a group runs one ring per rank that it has in a node, each with an adapter of
        its own and a share of the data.
        """
        members = self.members_per_node(size, stride)
        if members == size:
            return NetworkLink(self.gpu.link_bandwidth, self.link_latency)
        across = members * self.gpu.network_bandwidth
        return NetworkLink(min(self.gpu.link_bandwidth, across), self.network_latency)

    def all_to_all(self, size: int) -> NetworkLink:
        """Return the link of an all-to-all among `size` consecutive ranks with equal shares.

        Traffic inside the node and traffic to other nodes overlap.
        """
        members = self.members_per_node(size, stride=1)
        if members == size:
            return NetworkLink(self.gpu.link_bandwidth, self.link_latency)
        away = (size - members) / (size - 1)
        slowest = max((1 - away) / self.gpu.link_bandwidth, away / self.gpu.network_bandwidth)
        return NetworkLink(1 / slowest, self.network_latency)


def with_figures(gpu: Gpu, **figures: float | None) -> Gpu:
    """Replace some figures of a GPU; None keeps the original."""
    own = {field.name: getattr(gpu, field.name) for field in fields(gpu)}
    return Gpu(**own | {name: value for name, value in figures.items() if value is not None})
