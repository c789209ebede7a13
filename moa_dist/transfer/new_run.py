"""Creates runs that start from given weights: a checkpoint of step 0 that any layout continues.

It holds no moments, because they are zero before the first update.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from moa_dist.checkpoint.convert import make_partial
from moa_dist.checkpoint.format import FORMAT, MASTER, Index, Piece, checkpoint_folder
from moa_dist.checkpoint.tensor_file import TensorSpec, write_file, write_tensors
from moa_dist.checkpoint.write import move_into_place, seal
from moa_dist.config import to_yaml
from moa_dist.config.run import Config
from moa_dist.data.tokenizer import TOKENIZER_FILE
from moa_dist.evaluate.export import CONFIG_FILE

_FILE = "weights.safetensors"


def write_new_model(target: Path, config: Config, model: nn.Module, tokenizer: Path) -> int:
    """Create a run as `write_new_run` does, from a model and a tokenizer's file, if it exists."""
    state = model.state_dict()
    return write_new_run(
        target,
        config,
        [TensorSpec(name, torch.float32, tuple(t.shape)) for name, t in state.items()],
        (tensor.float().contiguous() for tensor in state.values()),
        tokenizer.read_bytes() if tokenizer.exists() else None,
    )


def write_new_run(
    target: Path,
    config: Config,
    specs: list[TensorSpec],
    values: Iterable[Tensor],
    tokenizer: bytes | None,
) -> int:
    """Create the run's folder `target`, which must not exist yet, with a checkpoint of step 0.

    Args:
        target: the run's folder.
        config: the run's configuration.
        specs: every parameter and buffer of the model, in any order.
        values: the values of `specs`, one at a time, contiguous.
        tokenizer: content of its file; None to create a run without one.

    Returns:
        Size of the weights in bytes.

    Raises:
        DataError: `target` exists.
    """
    partial = make_partial(target)
    folder = checkpoint_folder(partial, 0)
    folder.mkdir()
    flat = [TensorSpec(f"{s.key}/{MASTER}", s.dtype, (math.prod(s.shape),)) for s in specs]
    written = write_tensors(folder / _FILE, flat, values)
    index = Index(
        format=FORMAT,
        step=0,
        samples=0,
        updates=0,
        state={},
        world_size=1,
        config=config,
        files={_FILE: written.num_bytes},
        shapes={spec.key: spec.shape for spec in specs},
        tensors={s.key: [Piece(_FILE, s.key, 0, s.shape[0])] for s in flat},
    )
    seal(folder, index, {_FILE: written.sha256})
    write_file(partial / CONFIG_FILE, [to_yaml(config).encode()])
    if tokenizer is not None:
        write_file(partial / TOKENIZER_FILE, [tokenizer])
    move_into_place(partial, target)
    return written.num_bytes
