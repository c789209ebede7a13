"""Compare two runs: `python tests/cluster/same_run.py RUN RUN`.

Exit status 1 unless every step consumed the same samples and has the same loss and gradient norm,
and the last checkpoints hold the same parameters and moments, bit for bit.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from moa_dist.checkpoint.format import checkpoints

_COMPARED = ("samples", "digest", "loss", "grad_norm")


def steps(run: Path) -> list[tuple[object, ...]]:
    """Return each step with its samples and metrics; a repeated step must be listed only once."""
    records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [(r["step"], *(r[k] for k in _COMPARED)) for r in records if r["kind"] == "step"]


def state(run: Path) -> dict[str, torch.Tensor]:
    """Return all tensors in the newest checkpoint."""
    newest = max(checkpoints(run), key=lambda path: path.name)
    files = sorted(newest.glob("*.safetensors"))
    return {f"{newest.name}/{f.name}/{k}": v for f in files for k, v in load_file(f).items()}


def main(one: Path, other: Path) -> int:
    """Compare the runs; returns the exit status."""
    ours, theirs = steps(one), steps(other)
    if [step for step, *_ in ours] != list(range(1, len(ours) + 1)) or ours != theirs:
        differ = [a[0] for a, b in zip(ours, theirs, strict=False) if a != b]
        print(f"steps differ: {len(ours)} and {len(theirs)}, first at {differ[:1]}")
        return 1
    a, b = state(one), state(other)
    if not a or a.keys() != b.keys():
        print(f"checkpoints hold different things: {sorted(a.keys() ^ b.keys())[:5]}")
        return 1
    changed = [name for name in a if not torch.equal(a[name], b[name])]
    if changed:
        print(f"{len(changed)} of {len(a)} tensors differ, such as {changed[0]}")
        return 1
    numbers = sum(tensor.numel() for tensor in a.values())
    print(f"{len(ours)} steps and {numbers:,} parameters and moments are equal bit for bit")
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
