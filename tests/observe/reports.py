"""Reports of a small run, as the trainer would make them."""

import math

import torch

from moa_dist.config import Config
from moa_dist.distributed.traffic import TrafficKey, TrafficVolume
from moa_dist.models.calls import RouterCall
from moa_dist.moe.statistics import RoutingReport
from moa_dist.observe.metrics import Sample, SampleMetrics, StepMetrics, Timing, ValidationMetrics
from moa_dist.provenance import Provenance

PROVENANCE = Provenance("0123456789abcdef", None, "3.11.2", {"torch": "2.13.0"}, image=None)


def make_config(attention: str = "switchhead", **changes) -> Config:
    router = {"num_experts": 4, "top_k": 2, "score": "sigmoid"}
    kinds = {
        "switchhead": {"kind": "switchhead", "num_heads": 2, "d_head": 8, "router": router},
        "dense": {"kind": "dense", "num_heads": 2, "d_head": 8},
    }
    return Config.model_validate(
        {
            "name": "tiny",
            "model": {
                "vocab_size": 50,
                "d_model": 16,
                "num_layers": 2,
                "num_distinct_layers": 1,
                "attention": kinds[attention],
                "ffn": {"kind": "moe", "d_expert": 8, "router": router},
            },
            "data": {"train": "data", "sequence_length": 64},
            "parallel": {"expert_parallel": 2, "zero_stage": 2},
            "train": {"steps": 650, "global_batch": 32, "micro_batch": 8},
        }
        | changes
    )


def routing() -> dict[RouterCall, RoutingReport]:
    """Two repeats of one FFN router: 10 assignments of 5 tokens each."""
    load = torch.tensor([[[6, 4, 0, 0]], [[3, 3, 2, 2]]])
    dropped = torch.tensor([[[3, 0, 0, 0]], [[0, 0, 0, 0]]])
    entropy = torch.tensor([5 * math.log(2), 5.0], dtype=torch.float64)
    return {RouterCall(0, r, "ffn"): RoutingReport(load[r], dropped[r], entropy) for r in (0, 1)}


def step_metrics(step: int, **changes) -> StepMetrics:
    values = {
        "step": step,
        "loss": 5.0 + 1 / (3 * step),
        "aux_losses": {"ffn/entropy": -0.03, "attention/entropy": -0.001},
        "grad_norm": 0.41,
        "lr": 0.1 + 0.2,
        "samples": 16 * step,
        "digest": "00000000ff",
        "tokens": 2048,
        "tokens_read": 16 * 64 * step,
        "tokens_per_second": 12345.678,
        "timing": Timing.of([0.5, 0.3], [0.1, 0.3], ["node-1", "node-2"]),
        "routing": routing(),
        "traffic": {
            TrafficKey("stack.layers.0.ffn", "dispatch", False): TrafficVolume(2, 3 * 2**20),
            TrafficKey("stack.layers.0.ffn", "dispatch", True): TrafficVolume(2, 2**20),
        },
    }
    return StepMetrics(**(values | changes))


def sample_metrics(step: int) -> SampleMetrics:
    samples = [Sample("The", " ship\nsails"), Sample("", "ünï 🚢")]
    return SampleMetrics(step=step, tokens_read=16 * 64 * step, samples=samples)


def validation_metrics(step: int) -> ValidationMetrics:
    return ValidationMetrics(
        step=step,
        loss=4.5,
        perplexity=math.exp(4.5),
        bits_per_byte=1.98,
        tokens=65536,
        tokens_read=16 * 64 * step,
    )
