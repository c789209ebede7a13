"""Results of `moa-dist plan --gpus`: a run's memory and time on a cluster, and its best layouts."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from moa_dist.config import Config, find_layout_problems
from moa_dist.errors import ConfigError
from moa_dist.plan.cluster import Cluster
from moa_dist.plan.exchange_choice import decide_exchange
from moa_dist.plan.layouts import Planned, Planner, why_too_much
from moa_dist.plan.memory import FRAGMENTED
from moa_dist.plan.recomputation import recompute_name
from moa_dist.plan.terms import Term
from moa_dist.plan.time import Assumptions
from moa_dist.units import duration, short

_TITLES = {
    "masters": "fp32 masters",
    "moments": "optimizer moments",
    "staged": "gradients and parameters",
    "gathered": "gathered experts, in flight",
    "kept": "activations",
    "working": "temporary activations",
    "buffers": "communication buffers",
    "updating": "optimizer step, after activations are freed",
    "context": "context",
}


def cluster_as_json(
    config: Config, cluster: Cluster, assumed: Assumptions, num_layouts: int
) -> dict[str, Any]:
    """Return the plan as JSON types. Raises ConfigError if the cluster allows no layout at all."""
    planner = Planner(config, cluster, assumed)
    problems = find_layout_problems(config, cluster.num_gpus)
    fitting, reasons = planner.ranked()
    if not fitting and not reasons:
        raise ConfigError(problems, f"{config.name} on {cluster.num_gpus} GPUs")
    counts, gpu = planner.counts, cluster.gpu
    detailed = _configured(planner)
    if detailed is None and fitting:
        detailed = {"title": "the best layout"} | _in_detail(fitting[0], gpu.memory)
    return {
        "name": config.name,
        "parameters": {"total": counts.total, "active": counts.training.active},
        "cluster": {
            "gpus": cluster.num_gpus,
            "gpus_per_node": cluster.gpus_per_node,
            "gpu": gpu.name,
            "memory_bytes": gpu.memory,
            "memory_bandwidth": gpu.memory_bandwidth,
            "flops": gpu.flops(config.train.precision),
            "precision": config.train.precision,
            "link_bandwidth": gpu.link_bandwidth,
            "network_bandwidth": gpu.network_bandwidth,
            "link_latency": cluster.link_latency,
            "network_latency": cluster.network_latency,
        },
        "assumed": asdict(assumed) | {"fragmented": FRAGMENTED},
        "problems": [str(problem) for problem in problems],
        "detailed": detailed,
        "layouts": [_in_short(planned) for planned in fitting[:num_layouts]],
        "num_fitting": len(fitting),
        "do_not_fit": reasons,
    }


def _configured(planner: Planner) -> dict[str, Any] | None:
    """Return the configuration's own layout in detail; None if it does not divide the cluster."""
    config, num_gpus = planner.config, planner.cluster.num_gpus
    parallel, train = config.parallel, config.train
    if num_gpus % parallel.expert_parallel or train.global_batch % (num_gpus * train.micro_batch):
        return None
    available = planner.cluster.gpu.memory
    decision = decide_exchange(config, num_gpus, available, planner.model)
    decided = parallel.model_copy(update={"expert_exchange": decision.exchange})
    config = config.model_copy(update={"parallel": decided})
    return {
        "title": "as configured",
        "expert_exchange": decision.because,
        **_in_detail(planner.plan(config), available),
        "recompute": _recomputation(planner.fit(config)),
    }


def _in_detail(planned: Planned, available: int) -> dict[str, Any]:
    """Return a layout with every line of its memory and time."""
    memory = planned.memory
    return _in_short(planned) | {
        "memory": _lines(memory.parts()),
        "host_memory": _lines(memory.states.in_host_memory()),
        "host_bytes": memory.host_total,
        "margin_bytes": memory.margin,
        "too_much": why_too_much(memory, available) if memory.total > available else None,
        "time": [span._asdict() for span in planned.time.spans],
    }


def _lines(parts: dict[str, list[Term]]) -> dict[str, list[dict[str, Any]]]:
    return {
        part: [
            {"name": line.name, "formula": line.formula, "bytes": line.value}
            for line in lines
            if line.value
        ]
        for part, lines in parts.items()
    }


def _in_short(planned: Planned) -> dict[str, Any]:
    time = planned.time
    return {
        "layout": planned.name,
        "overrides": planned.overrides,
        "bytes": planned.memory.total,
        "seconds": time.seconds,
        "mfu": time.mfu,
        "tokens_per_second": time.tokens_per_second,
        "days": planned.config.train.steps * time.seconds / 86400,
        "recompute": _recomputation(planned),
    }


def _recomputation(planned: Planned) -> dict[str, Any] | None:
    """Return what a layout recomputes to fit, and what else was compared."""
    choice = planned.recomputation
    if choice is None:
        return None
    return {
        "because": str(choice),
        "costs": {recompute_name(option): cost._asdict() for option, cost in choice.costs.items()},
    }


def cluster_as_text(plan: dict[str, Any]) -> str:
    """Format the result of `cluster_as_json` for people."""
    cluster, parameters = plan["cluster"], plan["parameters"]
    lines = [
        f"{plan['name']}, {parameters['total']:,} parameters, {parameters['active']:,} active per "
        f"token, on {cluster['gpus']:,} {cluster['gpu']} in nodes of {cluster['gpus_per_node']}",
    ]
    if plan["detailed"]:
        lines += ["", f"{plan['detailed']['title']}: {plan['detailed']['layout']}"]
        lines += _memory_lines(plan["detailed"], cluster)
        lines += _time_lines(plan["detailed"])
    if plan["problems"]:
        lines += ["", "fix these to start as configured on these GPUs:"]
        lines += [f"  - {problem}" for problem in plan["problems"]]
    lines += _layout_lines(plan)
    lines += ["", "assumed", *(f"  {line}" for line in _assumptions(plan))]
    return "\n".join(lines)


def _memory_lines(detailed: dict[str, Any], cluster: dict[str, Any]) -> list[str]:
    ends = [
        ("  margin", detailed["margin_bytes"]),
        ("  total", detailed["bytes"]),
        ("  available", cluster["memory_bytes"]),
    ]
    lines = ["", "peak MiB per GPU", *_table(detailed["memory"], ends)]
    if detailed["too_much"]:
        lines.append(f"  does not fit: {detailed['too_much']}")
    lines.append(f"  {detailed['recompute']['because']}")
    if detailed["host_memory"]:
        num_bytes, ranks = detailed["host_bytes"], cluster["gpus_per_node"]
        ends = [
            ("  total (pinned buffers rounded up to powers of two)", num_bytes),
            (f"  a node with {ranks} GPUs", ranks * num_bytes),
        ]
        lines += ["", "MiB of host memory per GPU", *_table(detailed["host_memory"], ends)]
    return lines


def _table(memory: dict[str, list[dict[str, Any]]], ends: list[tuple[str, int]]) -> list[str]:
    rows: list[tuple[str, int]] = []
    for part, entries in memory.items():
        if entries:
            whole = sum(entry["bytes"] for entry in entries)
            rows.append((f"  {_TITLES.get(part, part)}", whole))
            rows += [(f"    {e['name']}: {e['formula']}", e["bytes"]) for e in entries]
    rows += ends
    width = max(len(text) for text, _ in rows)
    return [f"{text:<{width}}{num_bytes / 2**20:>12,.1f}" for text, num_bytes in rows]


def _time_lines(detailed: dict[str, Any]) -> list[str]:
    rows = [
        (f"  {span['name']}: {span['formula']}", span["seconds"], span["exposed"])
        for span in detailed["time"]
    ]
    width = max(len(text) for text, *_ in rows)
    lines = ["", f"{'ms per step':<{width}}{'alone':>10}{'exposed':>10}"]
    for text, alone, exposed in rows:
        lines.append(f"{text:<{width}}{alone * 1e3:>10,.1f}{exposed * 1e3:>10,.1f}")
    lines.append(f"{'  step':<{width + 10}}{detailed['seconds'] * 1e3:>10,.1f}")
    lines.append(
        f"  {detailed['mfu']:.1%} MFU, {short(detailed['tokens_per_second'])} tokens/s, "
        f"{duration(detailed['days'] * 86400)} for all steps"
    )
    return lines


def _layout_lines(plan: dict[str, Any]) -> list[str]:
    shown, num_fitting = plan["layouts"], plan["num_fitting"]
    lines = [""]
    if shown:
        lines.append(f"best {len(shown)} of {num_fitting:,} layouts that fit")
        lines.append(
            f"  {'':<74}{'GiB':>8}{'s/step':>9}{'MFU':>7}{'tokens/s':>10}{'all steps':>11}"
        )
    for entry in shown:
        lines.append(
            f"  {entry['layout']:<74}{entry['bytes'] / 2**30:>8.1f}{entry['seconds']:>9.3f}"
            f"{entry['mfu']:>7.1%}{short(entry['tokens_per_second']):>10}"
            f"{duration(entry['days'] * 86400):>11}"
        )
    if shown:
        lines.append(f"  overrides of the first: {' '.join(shown[0]['overrides'])}")
        lines.append(f"  {shown[0]['recompute']['because']}")
    if plan["do_not_fit"]:
        lines += ["", "do not fit, with the least memory that each needs"]
        lines += [f"  {reason}" for reason in plan["do_not_fit"]]
    return lines


def _assumptions(plan: dict[str, Any]) -> list[str]:
    cluster, assumed = plan["cluster"], plan["assumed"]
    return [
        f"{cluster['gpu']} data sheet, dense: {short(cluster['flops'])} FLOPs/s in "
        f"{cluster['precision']}, {short(cluster['memory_bytes'])}B of memory at "
        f"{short(cluster['memory_bandwidth'])}B/s",
        f"a GPU sends {short(cluster['link_bandwidth'])}B/s within its node and "
        f"{short(cluster['network_bandwidth'])}B/s to other nodes; latency of a collective: "
        f"{cluster['link_latency'] * 1e6:g} or {cluster['network_latency'] * 1e6:g} us",
        f"efficiency: matrix products reach {assumed['matmul_efficiency']:.0%} of peak FLOPs, "
        f"expert rows {assumed['memory_efficiency']:.0%} of memory bandwidth, collectives "
        f"{assumed['network_efficiency']:.0%} of link bandwidth",
        "routing is balanced, without drops or padding; norms, router scores and softmax take no "
        "time",
        "overlapped with computation: gradients at ZeRO 2 and 3 and parameters at ZeRO 3, each "
        "with half of it; nothing else",
        f"fragmentation: {assumed['fragmented']:.0%} of everything except states",
    ]
