"""DeepSpeed's configuration, made from ours."""

from __future__ import annotations

from typing import Any

import torch

from moa_dist.config.run import Config
from moa_dist.config.zero_sizes import DEFAULT_ZERO_SIZES, ZeroSizes


def deepspeed_config(
    config: Config,
    world_size: int,
    largest_parameter: int,
    sizes: ZeroSizes = DEFAULT_ZERO_SIZES,
) -> dict[str, Any]:
    """Generate all of DeepSpeed's configuration; it ignores unknown keys, so users write none.

    `largest_parameter` counts the elements of the largest parameter that one rank holds.
    """
    stage = config.parallel.zero_stage
    accumulation = config.train.global_batch // (world_size * config.train.micro_batch)
    result = {
        "train_micro_batch_size_per_gpu": config.train.micro_batch,
        "gradient_accumulation_steps": accumulation,
        # Defaults to 1.0, so always given; stage 0 is clipped by zero0.py.
        "gradient_clipping": (config.optimizer.clip_norm or 0.0) if stage > 0 else 0.0,
        "zero_optimization": _zero_section(config, largest_parameter, sizes),
        "zero_allow_untested_optimizer": True,
        # Torch's fused AdamW updates in host memory too, without compiling DeepSpeed's own.
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
        "wall_clock_breakdown": False,
        # It would wait for the device twice in every micro-batch.
        "timers": {"throughput": {"enabled": False}},
    }
    if config.train.precision == "bf16":
        # Gradients are summed over micro-batches and ranks in fp32: bf16 keeps 8 bits.
        result["bf16"] = {"enabled": True}
        result["communication_data_type"] = "fp32"
        result["data_types"] = {"grad_accum_dtype": "fp32"}
    return result


def _zero_section(config: Config, largest_parameter: int, sizes: ZeroSizes) -> dict[str, Any]:
    stage = config.parallel.zero_stage
    zero: dict[str, Any] = {"stage": stage}
    if config.optimizer.offload == "host":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    overlap = torch.cuda.is_available()
    bucket = sizes.bucket
    if overlap and stage in (1, 2):
        bucket = sizes.overlapped_bucket(largest_parameter)
    if stage > 0:
        zero |= {
            "contiguous_gradients": True,
            "reduce_scatter": True,
            "overlap_comm": overlap,
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": sizes.bucket,
        }
    if stage == 3:
        zero["stage3_param_persistence_threshold"] = sizes.persistent
    return zero
