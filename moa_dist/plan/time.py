"""Estimates how long a step takes, with every assumption stated.

    step = products + rows + orthogonalization + update + exposed communication

Products run at a share of the GPU's peak. Rows are what routed experts move through memory around
their products to gather, weight and sum up; with small experts that takes longer than the products.
Orthogonalization, which Muon alone needs, and update are the optimizer's, in the type of masters.
Communication is bytes over a link plus a latency per collective.

Shapes: W ranks, P that share experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from moa_dist.config.parts import PARTS, Part
from moa_dist.config.run import Config
from moa_dist.config.zero_sizes import DEFAULT_ZERO_SIZES
from moa_dist.distributed.traffic import TrafficKey, TrafficVolume
from moa_dist.models.counts import Counts, Work
from moa_dist.models.language_model import LanguageModel
from moa_dist.models.stack_counts import token_uses
from moa_dist.moe.routed_module import RoutedProjection, routed_modules
from moa_dist.plan.cluster import Cluster, NetworkLink
from moa_dist.plan.orthogonalization import orthogonalization
from moa_dist.plan.predicted_traffic import MASTER_BYTES, Layout, state_traffic
from moa_dist.plan.states import Sizes
from moa_dist.units import short

_BYTES_PER_UPDATE = 32
"""Bytes of memory traffic per master: AdamW reads and writes it and two moments and reads a
gradient, all in fp32, and writes a parameter."""


@dataclass(frozen=True)
class Assumptions:
    """Efficiencies, which cannot be counted."""

    matmul_efficiency: float = 0.5
    """Share of the peak FLOPs that products reach."""
    memory_efficiency: float = 0.7
    """Share of memory bandwidth that rows and updates reach."""
    network_efficiency: float = 0.8
    """Share of a link's bandwidth that collectives reach."""


class Span(NamedTuple):
    """One part of a step."""

    name: str
    """Name of the part."""
    formula: str
    """Amount over rate, as text."""
    seconds: float
    """Seconds if it ran alone."""
    exposed: float
    """Seconds of it that no other part hides."""


@dataclass(frozen=True)
class StepTime:
    """A predicted optimizer step."""

    spans: tuple[Span, ...]
    """Parts of the step."""
    model_flops: float
    """FLOPs per rank that the model needs, recomputation left out."""
    peak_flops: float
    """Peak FLOPs per second of a GPU."""
    tokens: int
    """Tokens of all ranks."""

    @property
    def seconds(self) -> float:
        """Seconds of the step."""
        return sum(span.exposed for span in self.spans)

    @property
    def mfu(self) -> float:
        """Model FLOPs utilization: share of the peak that the model's FLOPs reach."""
        return self.model_flops / (self.seconds * self.peak_flops)

    @property
    def tokens_per_second(self) -> float:
        """Tokens of all ranks."""
        return self.tokens / self.seconds


def step_time(
    config: Config,
    counts: Counts,
    rows_moved: RowBytes,
    layout: Layout,
    traffic: Mapping[TrafficKey, TrafficVolume],
    sizes: Sizes,
    cluster: Cluster,
    assumed: Assumptions,
) -> StepTime:
    """Predict a step; `traffic` is expert traffic of all ranks."""
    peak = cluster.gpu.flops(config.train.precision)
    assert peak is not None, "checked when the cluster was described"
    sequences = layout.num_micro_batches * config.train.micro_batch
    work = counts.training
    macs_again, rows_again = _computed_again(layout, work, rows_moved)
    flops = 2 * (3 * work.total_macs + macs_again) * sequences  # the backward pass costs two
    products = _span("products", flops, "FLOPs", assumed.matmul_efficiency, peak)
    of_a_token = sum(rows_moved.forward.values()) + rows_again + rows_moved.backward
    moved = of_a_token * sequences * counts.sequence_length
    reach = assumed.memory_efficiency
    rows = _span("rows of experts", moved, "B", reach, cluster.gpu.memory_bandwidth)
    stage = config.parallel.zero_stage
    update_spans = _muon_spans if config.optimizer.kind == "muon" else _update_spans
    spans = [products, rows, *update_spans(config, sizes, layout, cluster, assumed)]
    spans += _expert_spans(traffic, layout, cluster, assumed)
    spans += _state_spans(sizes, layout, stage, cluster, assumed, products.seconds + rows.seconds)
    return StepTime(
        spans=tuple(spans),
        model_flops=2 * 3 * work.total_macs * sequences,
        peak_flops=peak,
        tokens=sequences * counts.sequence_length * layout.world_size,
    )


def _computed_again(layout: Layout, work: Work, rows_moved: RowBytes) -> tuple[int, float]:
    """Count multiply-accumulates of a sequence and bytes of a token's rows that occur again."""
    macs, rows = 0, 0.0
    if "block" in layout.recompute:
        macs = work.layer_macs["rest"].total()
    for part in PARTS:
        of_part = work.layer_macs[part]
        if layout.recompute & {"block", part}:
            macs, rows = macs + of_part.total(), rows + rows_moved.forward[part]
        elif "experts" in layout.recompute:
            macs, rows = macs + of_part["experts"], rows + rows_moved.forward[part]
    return macs, rows


def _update_spans(
    config: Config, sizes: Sizes, layout: Layout, cluster: Cluster, assumed: Assumptions
) -> list[Span]:
    """Time the update of this rank's masters.

    In host memory, PCIe is assumed to be as fast as a GPU's share of that memory.
    """
    stage, copies = config.parallel.zero_stage, layout.world_size // layout.expert_parallel
    share = (layout.world_size, copies) if stage else (1, 1)
    masters = sum(sizes.dense) / share[0] + sum(sizes.experts) / share[1]
    gpu, updated = cluster.gpu, _BYTES_PER_UPDATE * masters
    reach = assumed.memory_efficiency
    if config.optimizer.offload == "none":
        return [_span("update", updated, "B", reach, gpu.memory_bandwidth)]
    of_master = MASTER_BYTES * _gradient_copies(stage, layout) + layout.element_bytes
    moved, reach_pcie = of_master * masters, assumed.network_efficiency
    return [
        _span("gradients and parameters over PCIe", moved, "B", reach_pcie, gpu.host_bandwidth),
        _span("update in host memory", updated, "B", reach, gpu.host_bandwidth),
    ]


def _gradient_copies(zero_stage: int, layout: Layout) -> int:
    """Count how often a gradient crosses PCIe in a step, as deepspeed 0.19 offloads optimizers.

    Where sums over micro-batches are in host memory, each micro-batch fetches and returns them.
    """
    match zero_stage, layout.element_bytes:
        case 3, _:
            return 2 * layout.num_micro_batches + 1
        case 2, 4 if layout.num_micro_batches > 1:
            return 2 * layout.num_micro_batches
    return 1


def _muon_spans(
    config: Config, sizes: Sizes, layout: Layout, cluster: Cluster, assumed: Assumptions
) -> list[Span]:
    """Time Muon on the busiest rank, and AdamW for what is not a matrix."""
    stage, gpu, ranks = config.parallel.zero_stage, cluster.gpu, layout.world_size
    copies = ranks // layout.expert_parallel
    peak = gpu.flops("tf32" if config.train.precision == "tf32" else "fp32")
    assert peak is not None, "checked when the cluster was described"
    dense = orthogonalization(sizes.dense_matrices, stage, ranks)
    experts = orthogonalization(sizes.expert_matrices, stage, copies)
    others = sum(sizes.dense) - sum(tensor.numel for tensor in sizes.dense_matrices)
    num_bytes = _BYTES_PER_UPDATE * others / (ranks if stage else 1)
    num_bytes += dense.num_bytes + experts.num_bytes
    flops = dense.flops + experts.flops
    spans = [
        _span("orthogonalization", flops, "FLOPs", assumed.matmul_efficiency, peak),
        _span("update", num_bytes, "B", assumed.memory_efficiency, gpu.memory_bandwidth),
    ]
    for kind, work, num_ranks, link in (
        ("dense", dense, ranks, cluster.ring(ranks, 1)),
        ("expert", experts, copies, cluster.ring(copies, layout.expert_parallel)),
    ):
        if work.exchanges:  # two all-reduces of each
            sent = 4 * (num_ranks - 1) / num_ranks * sum(work.exchanges) * MASTER_BYTES
            messages, name = 2 * len(work.exchanges), f"{kind} matrices exchanged"
            spans.append(_sent(name, sent, messages, link, assumed, hidden_by=0.0))
    return spans


def _span(name: str, amount: float, unit: str, efficiency: float, rate: float) -> Span:
    seconds = amount / (efficiency * rate)
    formula = f"{short(amount)} {unit} / ({efficiency:g} x {short(rate)} {unit}/s)"
    return Span(name, formula, seconds, seconds)


class RowBytes(NamedTuple):
    """Bytes that routed rows of one token move through memory in all layers."""

    forward: dict[Part, float]
    """Bytes in a forward, by part of a layer."""
    backward: float
    """Bytes in a backward pass."""


def row_bytes(model: LanguageModel, element_bytes: int, length: int) -> RowBytes:
    """Count what the kernels of `moa_dist.kernels.triton_fused` read and write per row.

    A gathered row counts as often as it is gathered, and a shared module once per application, in
    the mean over the tokens of a sequence of `length`.
    """
    forward: dict[Part, float] = dict.fromkeys(PARTS, 0.0)
    backward, times = 0.0, token_uses(model, length)
    for _, module in routed_modules(model):
        layers, repeats = module.expert_layers(), times[module]
        for projection in module.routed_projections():
            router = module.router_of(projection)
            chosen = router.num_groups * router.config.experts_per_token(training=True).mean
            hidden = [layers[name].d_out for name in projection.experts[:-1]]
            moved = _numbers_moved(projection, hidden)
            forward[module.part] += chosen * element_bytes * moved[0] * repeats
            backward += chosen * element_bytes * moved[1] * repeats
    return RowBytes(forward, backward)


def _numbers_moved(projection: RoutedProjection, hidden: list[int]) -> tuple[float, float]:
    """Count numbers per assignment, forward and backward.

    `hidden` has the widths of the products before `down`.
    """
    d_in, d_out, num_ups = projection.d_in, projection.d_out, len(hidden)
    inner = hidden[0] if hidden else d_in
    scales_results = projection.weighted and inner > d_out
    # Results are written, and read to be summed unless they have an output row of their own.
    forward = d_in + (1 if projection.write == "slot" else 2) * d_out
    grad_x = (1 if projection.read == "slot" else 2) * d_in
    weighing = 3 * d_out * scales_results
    if hidden:
        # Products and hidden rows; then both, their gradients, and the two sides of each matrix.
        forward += (num_ups + 2) * inner
        backward = weighing + 2 * d_out + num_ups * d_in + (4 * num_ups + 2) * inner
    elif projection.weighted and not scales_results:
        backward = 2 * d_out + 3 * d_in  # x, weighted for the matrix, once more for that
    else:
        backward = weighing + 2 * d_out + d_in
    return forward, backward + grad_x


def _expert_spans(
    traffic: Mapping[TrafficKey, TrafficVolume],
    layout: Layout,
    cluster: Cluster,
    assumed: Assumptions,
) -> list[Span]:
    """Time the exchange of rows and weights, taken as fully exposed."""
    kinds = {
        "tokens exchanged": (cluster.all_to_all(layout.expert_parallel), False),
        "weights gathered": (cluster.ring(layout.expert_parallel, 1), True),
    }
    spans = []
    for name, (link, of_weights) in kinds.items():
        volumes = [v for key, v in traffic.items() if (key.purpose == "gather") == of_weights]
        if volumes:
            num_bytes = sum(v.num_bytes for v in volumes) / layout.world_size
            messages = sum(v.messages for v in volumes) / layout.world_size
            spans.append(_sent(name, num_bytes, messages, link, assumed, hidden_by=0.0))
    return spans


def _state_spans(
    sizes: Sizes,
    layout: Layout,
    zero_stage: int,
    cluster: Cluster,
    assumed: Assumptions,
    computing: float,
) -> list[Span]:
    """Time gradients and parameters, of which ZeRO sends some while it computes.

    Gradients at stages 2 and 3 overlap with the backward pass of their micro-batch, and parameters
    at stage 3 with computation; half of the computing time is assumed to hide each.
    """
    copies = layout.world_size // layout.expert_parallel
    gradients_hidden_by = computing / 2 if zero_stage >= 2 else 0.0
    parameters_hidden_by = computing / 2 if zero_stage == 3 else 0.0
    spans = []
    for kind, dense, experts, link in (
        ("dense", sizes.dense, (), cluster.ring(layout.world_size, 1)),
        ("expert", (), sizes.experts, cluster.ring(copies, layout.expert_parallel)),
    ):
        moved = state_traffic(dense, experts, layout, zero_stage)
        for what, num_bytes, hidden_by in (
            ("gradients", moved.gradients, gradients_hidden_by),
            ("parameters", moved.parameters, parameters_hidden_by),
        ):
            if not num_bytes:
                continue
            of_rank = num_bytes / layout.world_size
            messages = max(1, of_rank / (DEFAULT_ZERO_SIZES.bucket * layout.element_bytes))
            span = _sent(f"{kind} {what}", of_rank, messages, link, assumed, hidden_by)
            spans.append(span)
            if what == "gradients":
                gradients_hidden_by = max(0.0, gradients_hidden_by - span.seconds)
            else:
                parameters_hidden_by = max(0.0, parameters_hidden_by - span.seconds)
    return spans


def _sent(
    name: str,
    num_bytes: float,
    messages: float,
    link: NetworkLink,
    assumed: Assumptions,
    hidden_by: float,
) -> Span:
    reach = assumed.network_efficiency
    seconds = num_bytes / (reach * link.bandwidth) + messages * link.latency
    formula = (
        f"{short(num_bytes)} B / ({reach:g} x {short(link.bandwidth)} B/s) + "
        f"{messages:,.0f} x {link.latency * 1e6:g} us"
    )
    return Span(name, formula, seconds, max(0.0, seconds - hidden_by))
