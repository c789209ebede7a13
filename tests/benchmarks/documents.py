"""What `data.document_attention` costs a training step: `python -m tests.benchmarks.documents`.

Checks attention within documents against fp64, and exits with 1 if it is wrong. Then times
sequences of 1,024 tokens, each of 8 documents of 128, against the same tokens as one text, in
turns; with `--device cuda` in bf16, for models of full size.
"""

import argparse
import sys

import torch

from moa_dist.bench.measure import Table, as_text, compare
from moa_dist.config import load_config
from moa_dist.models.documents import Documents, document_attention
from moa_dist.models.language_model import build_model
from moa_dist.models.objective import Batch, objective

LENGTH, NUM_DOCUMENTS = 1024, 8
MODELS = {
    "cpu": ("small/dense", "small/moa", "small/moeut"),
    "cuda": ("dense/244m", "moa/8k16e256d", "moeut/244m"),
}
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}
"""Bound of the largest deviation, relative to the largest number."""


def equal_documents(sequences: int, length: int, number: int) -> Documents:
    """Cut each sequence into `number` documents of equal length."""
    return Documents.from_ids((torch.arange(length) * number // length).expand(sequences, -1))


def deviation(dtype: torch.dtype, device: torch.device, *, causal: bool) -> float:
    """Return how far results and gradients are from those in fp64.

    Heads share keys, and their width of 82 is one that flash attention does not take as it is.
    """
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(2, heads, 256, 82, generator=generator).to(device, dtype) for heads in (8, 2, 2)
    )
    ids = (torch.rand(2, 256, generator=generator) < 0.03).cumsum(1)
    documents = Documents.from_ids(ids).moved(lambda part: part.to(device))
    results = []
    for wide in (False, True):
        inputs = [(x.double() if wide else x.clone()).requires_grad_() for x in (q, k, v)]
        y = document_attention(*inputs, documents, causal=causal)
        upstream = torch.linspace(-1, 1, y.numel(), device=device).view_as(y).to(y.dtype)
        results.append([y, *torch.autograd.grad(y, inputs, upstream)])
    return max(
        ((ours.double() - right).abs().max() / right.abs().max()).item()
        for ours, right in zip(*results, strict=True)
    )


def step_time(name: str, device: torch.device, sequences: int, repetitions: int) -> Table:
    """Time forward and backward pass of a model, with and without documents."""
    model = build_model(load_config(f"configs/{name}.yaml").model).train().to(device)
    if device.type == "cuda":
        for parameter in model.parameters():
            parameter.data = parameter.data.to(torch.bfloat16)
    shape = (sequences, LENGTH)
    tokens = torch.randint(model.config.vocab_size, shape)
    one_text = Batch(tokens, targets=tokens)
    apart = one_text._replace(documents=equal_documents(*shape, NUM_DOCUMENTS))

    def step(batch: Batch) -> None:
        model.zero_grad()
        objective(model, batch.to(device)).loss(float(tokens.numel())).backward()

    work = {"one text": lambda: step(one_text), "documents": lambda: step(apart)}
    rows = compare(work, device, repetitions=repetitions)
    return Table(f"{name}, {sequences} x {LENGTH} tokens", rows, tokens.numel())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=MODELS, default="cpu")
    parser.add_argument("--repetitions", type=int, default=5)
    args = parser.parse_args()
    device, wrong = torch.device(args.device), False
    for dtype, bound in TOLERANCE.items():
        for causal in (True, False):
            found = deviation(dtype, device, causal=causal)
            print(f"{str(dtype)[6:]}, {causal=}: largest deviation {found:.1e}")
            wrong |= not found < bound
    for name in MODELS[args.device]:
        sequences = 8 if args.device == "cuda" else 2
        print(f"\n{as_text(step_time(name, device, sequences, args.repetitions))}", flush=True)
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
