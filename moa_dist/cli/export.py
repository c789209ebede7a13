"""`moa-dist export`: writes a trained model for any use, or as the JetMoE of transformers."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from moa_dist.cli.arguments import add_model_path
from moa_dist.evaluate.export import MODEL_FILE, export
from moa_dist.evaluate.trained import find_checkpoint
from moa_dist.evaluate.transformers_files import is_for_transformers
from moa_dist.transfer.jetmoe_files import export_jetmoe
from moa_dist.units import short

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_FORMATS = {
    "moa-dist": (export, 'moa_dist.load_model("{}")'),
    "jetmoe": (export_jetmoe, 'transformers.JetMoeForCausalLM.from_pretrained("{}")'),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    add_model_path(parser, with_exports=False)
    parser.add_argument(
        "output",
        type=Path,
        metavar="OUT",
        help=f"folder to create, with {MODEL_FILE}, a configuration, tokenizer.json and, for a "
        "causal model, the code that transformers runs",
    )
    parser.add_argument(
        "--format",
        choices=_FORMATS,
        default="moa-dist",
        help="what this package and transformers load, the latter with code that comes with it "
        "(moa-dist), or what transformers loads as its own JetMoE, if the model is one",
    )
    parser.add_argument(
        "--dtype", choices=_DTYPES, default="fp32", help="type of the weights in the file (fp32)"
    )


def run(args: argparse.Namespace) -> int:
    """Write the files and print how to load them; returns the exit status."""
    write, how_to_load = _FORMATS[args.format]
    checkpoint = find_checkpoint(args.path)
    written = write(checkpoint, args.output, _DTYPES[args.dtype])
    print(f"{args.output / MODEL_FILE}: {short(written.num_bytes)}B, from {checkpoint}")
    print(f"in Python: {how_to_load.format(args.output)}")
    if args.format == "moa-dist" and is_for_transformers(args.output):
        print(
            "without this package: transformers.AutoModelForCausalLM.from_pretrained("
            f'"{args.output}", trust_remote_code=True)'
        )
    return 0
