"""`moa-dist export`: a trained model as one safetensors file; see `moa_dist.evaluate.export`."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from moa_dist.evaluate.export import MODEL_FILE, export
from moa_dist.evaluate.trained import find_checkpoint
from moa_dist.observe.units import short

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "path",
        type=Path,
        metavar="RUN_OR_CHECKPOINT",
        help="folder of a run, for its newest checkpoint, or of one checkpoint",
    )
    parser.add_argument(
        "output",
        type=Path,
        metavar="OUT",
        help=f"folder to be made, with {MODEL_FILE}, config.yaml and tokenizer.json",
    )
    parser.add_argument(
        "--dtype", choices=_DTYPES, default="fp32", help="of the weights in the file (fp32)"
    )


def run(args: argparse.Namespace) -> int:
    """Write it and say where; returns the exit status."""
    checkpoint = find_checkpoint(args.path)
    written = export(checkpoint, args.output, _DTYPES[args.dtype])
    print(f"{args.output / MODEL_FILE}: {short(written.num_bytes)}B, from {checkpoint}")
    print(f'in Python: moa_dist.load_model("{args.output}")')
    return 0
