"""Optimizer steps of one model in any layout, and the same steps on one process.

The reference (`moa_dist.verify.reference`) shares nothing with the engine but the model: plain
torch, the whole batch at once.
"""

from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import Any

import torch

from moa_dist.checkpoint.format import MASTER
from moa_dist.config.recompute import Recompute
from moa_dist.config.run import Config
from moa_dist.config.zero_sizes import ZeroSizes
from moa_dist.distributed.mesh import Mesh, make_mesh
from moa_dist.models.cross_entropy import NO_TARGET
from moa_dist.models.language_model import build_model
from moa_dist.models.objective import Batch
from moa_dist.moe.sharding import shard_experts
from moa_dist.train.engine import Engine
from moa_dist.verify import reference

VOCABULARY, D_MODEL, LENGTH, SEQUENCES = 31, 16, 12, 8


def router(num_experts: int, top_k: int, score: str = "sigmoid", **more: Any) -> dict[str, Any]:
    return {"num_experts": num_experts, "top_k": top_k, "score": score, **more}


SWITCHHEAD = {"kind": "switchhead", "num_heads": 2, "d_head": 8}
MOA = {"kind": "moa", "d_head": 8}
RATES = {"sgd": 1.0, "adamw": 1e-2, "muon": 1e-3}
"""With SGD, the step is the gradient. Muon enlarges rounding in its small singular values."""
CAPACITY = {"factor": 1.0, "policy": "probability"}


def balanced(attention: dict[str, Any] = SWITCHHEAD, **balance: Any) -> dict[str, Any]:
    """Shared layers whose routers are all balanced so."""
    return {
        "position": "sinusoidal",  # else equal tokens of a sequence tie in the first layer
        "attention": attention | {"router": router(6, 2, "softmax", balance=balance)},
        "ffn": {"kind": "moe", "d_expert": 8, "router": router(7, 2, balance=balance)},
    }


@dataclass(frozen=True)
class Case:
    """A model and a layout."""

    world_size: int = 2
    expert_parallel: int = 2
    zero_stage: int = 0
    micro_batch: int = 2
    precision: str = "fp64"
    optimizer: str = "sgd"
    offload: str = "none"
    clip_norm: float | None = None
    momentum: float = 0.0
    exchange: str = "tokens"
    overlap: bool = False
    recompute: Recompute = False
    padded: bool = True
    skewed: bool = False
    """Few tokens are frequent, as in language: then some experts get none."""
    documents: bool = False
    """Sequences are short documents that do not see each other."""
    sequences: int = SEQUENCES
    steps: int = 1
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    uneven: bool = False
    """Two micro-batches on each of two ranks, no two of one size, as of buckets of pairs."""
    eps: float = 1e-8
    """Of AdamW. A large one makes its first step feel the size of a gradient, and tiny ones
    less of their rounding."""
    lr: float | None = None
    """Learning rate; None for that of `RATES`."""
    model: dict[str, Any] = field(default_factory=dict)

    def config(self) -> Config:
        model = {
            "vocab_size": VOCABULARY,
            "d_model": D_MODEL,
            "num_layers": 4,
            "num_distinct_layers": 2,
            "norm_placement": "peri",
            # 2 x 3 flat experts and 5 experts: shards of unequal size.
            "attention": SWITCHHEAD | {"router": router(3, 2, balance={"entropy": 0.1})},
            "ffn": {"kind": "moe", "d_expert": 8, "router": router(5, 2, capacity=CAPACITY)},
            **self.model,
        }
        return Config.model_validate(
            {
                "name": "test",
                "model": model,
                "data": {
                    "train": "none",
                    "sequence_length": LENGTH,
                    "document_attention": self.documents,
                },
                "parallel": {
                    "expert_parallel": self.expert_parallel,
                    "zero_stage": self.zero_stage,
                    "expert_exchange": {"attention": self.exchange, "ffn": self.exchange},
                },
                "optimizer": {
                    "kind": self.optimizer,
                    "offload": self.offload,
                    "lr": self.lr or RATES[self.optimizer],
                    "weight_decay": 0.0 if self.optimizer == "sgd" else 0.1,
                    "clip_norm": self.clip_norm,
                    "momentum": self.momentum,
                    "eps": self.eps,
                },
                "train": {
                    "steps": self.steps,
                    "global_batch": self.sequences,
                    "micro_batch": self.micro_batch,
                    "precision": self.precision,
                    "recompute": self.recompute,
                    "label_smoothing": self.label_smoothing,
                    "z_loss": self.z_loss,
                },
            }
        )

    def batch(self, step: int = 1) -> Batch:
        """The global batch: other tokens in every sequence, some padded at the end."""
        tasks = torch.arange(self.sequences)
        batch = self._texts(step).with_tasks(tasks, self.config().model.num_tasks)
        if not self.documents:
            return batch
        generator = torch.Generator().manual_seed(step)
        is_end = torch.rand(batch.tokens.shape, generator=generator) < 0.3
        return batch._replace(tokens=batch.tokens.masked_fill(is_end, 0)).in_documents(0)

    def _texts(self, step: int) -> Batch:
        generator = torch.Generator().manual_seed(step)
        tokens = torch.randint(VOCABULARY, (self.sequences, LENGTH + 1), generator=generator)
        if self.skewed:
            tokens = tokens**4 // VOCABULARY**3
        if not self.padded:
            return Batch(tokens)
        # Beyond eight, one sequence is all padding and one has no target.
        lengths = torch.tensor([13, 13, 9, 13, 4, 13, 11, 2, 13, 6, 13, 13, 0, 13, 1, 10])
        real = torch.arange(LENGTH + 1) < lengths[: self.sequences, None]
        match self.model.get("objective", "causal"):
            case "masked":
                hidden = real & (torch.rand(tokens.shape, generator=generator) < 0.3)
                return Batch(tokens, real, tokens.masked_fill(~hidden, NO_TARGET))
            case "translation":
                lengths = torch.randint(LENGTH, (self.sequences, 1), generator=generator)
                source_mask = torch.arange(LENGTH) < lengths
                return Batch(tokens, real, None, tokens[:, 1:].flip(0), source_mask)
        return Batch(tokens, real)


@dataclass(frozen=True)
class Outcome:
    """Whole-model values: of the last step, or after it."""

    loss: float
    aux_losses: dict[str, float]
    grad_norm: float
    parameters: dict[str, torch.Tensor]
    """And buffers."""
    dropped: int
    unused_experts: int


def one_process(case: Case) -> Outcome:
    """The reference of `moa-dist verify`: plain torch, which knows no ranks."""
    config = case.config()
    batches = [case.batch(step) for step in range(1, case.steps + 1)]
    result = reference.one_process(config, batches, config.optimizer, config.optimizer.lr)
    (grad_norm,) = result.grad_norms
    return Outcome(
        loss=result.loss,
        aux_losses=result.aux_losses,
        grad_norm=grad_norm,
        parameters=result.parameters,
        dropped=sum(int(dropped.sum()) for dropped in result.dropped.values()),
        unused_experts=sum(int((load == 0).sum()) for load in result.load.values()),
    )


AS_IF_LARGE = ZeroSizes(bucket=300, persistent=0)
"""What large models meet: many buckets; no parameter whole at ZeRO 3."""


def micro_batches(case: Case, mesh: Mesh, step: int = 1) -> list[Batch]:
    """This rank's: every W-th sequence."""
    batch = case.batch(step)
    if case.uneven:
        parts = torch.arange(case.sequences).tensor_split([1, 5, 11])
        return [batch.rows(rows) for rows in parts[mesh.rank :: 2]]
    mine = torch.arange(mesh.rank, case.sequences, mesh.world_size).split(case.micro_batch)
    return [batch.rows(rows) for rows in mine]


def on_rank(case: Case) -> tuple[float, dict[str, float], float, list[Any], int]:
    """Runs on every rank of a pool: engine steps, and the fragments this rank owns."""
    config = case.config()
    mesh = make_mesh(case.expert_parallel)
    model = build_model(
        config.model,
        recompute=case.recompute,
        parallelize=partial(
            shard_experts,
            mesh=mesh,
            exchange=config.parallel.expert_exchange,
            overlap=case.overlap,
        ),
    )
    engine = Engine(model, config, mesh, torch.device("cpu"), AS_IF_LARGE)
    for step in range(1, case.steps + 1):
        result = engine.step(micro_batches(case, mesh, step), config.optimizer.lr)
    owned = [
        (f.parameter, f.start, f.view.clone())
        for f in engine.state.fragments(owned_only=True)
        if f.state == MASTER
    ]
    engine.close()
    dropped = sum(int(r.dropped.sum()) for r in result.routing.values())
    return result.loss, result.aux_losses, result.grad_norm, owned, dropped


def whole(
    states: list[dict[tuple[str, str, int], torch.Tensor]], case: Case
) -> dict[tuple[str, str], torch.Tensor]:
    """Global tensors, put together from what each rank owns."""
    sizes = {n: t.numel() for n, t in build_model(case.config().model).state_dict().items()}
    tensors: dict[tuple[str, str], torch.Tensor] = {}
    for state in states:
        for (name, kind, start), values in state.items():
            flat = tensors.setdefault((name, kind), values.new_full((sizes[name],), float("nan")))
            assert flat[start : start + len(values)].isnan().all(), f"{name}: owned twice"
            flat[start : start + len(values)] = values
    assert not any(t.isnan().any() for t in tensors.values())
    return tensors


def distributed(pools, case: Case) -> Outcome:
    results = pools(case.world_size).run(on_rank, case)
    losses, auxiliaries, norms, owned, dropped = zip(*results, strict=True)
    assert len(set(losses)) == 1
    assert all(aux_losses == auxiliaries[0] for aux_losses in auxiliaries)
    assert len(set(norms)) == 1, "ranks disagree on the gradient norm"
    parameters = {}
    for name, parameter in build_model(case.config().model).double().state_dict().items():
        flat = torch.full((parameter.numel(),), float("nan"), dtype=torch.float64)
        for piece_name, start, values in chain.from_iterable(owned):
            if piece_name == name:
                assert flat[start : start + len(values)].isnan().all(), f"{name}: owned twice"
                flat[start : start + len(values)] = values
        parameters[name] = flat.view(parameter.shape)
    return Outcome(losses[0], auxiliaries[0], norms[0], parameters, sum(dropped), 0)


def assert_equal(ours: Outcome, reference: Outcome, bound: float) -> None:
    assert ours.dropped == reference.dropped, "assignments dropped"
    assert abs(ours.loss - reference.loss) < bound * abs(reference.loss), "loss"
    assert ours.aux_losses.keys() == reference.aux_losses.keys()
    for name, value in reference.aux_losses.items():
        assert abs(ours.aux_losses[name] - value) < bound * abs(value), name
    assert abs(ours.grad_norm - reference.grad_norm) < bound * reference.grad_norm, "norm"
    for name, value in reference.parameters.items():
        error = (ours.parameters[name] - value).abs().max().item()
        assert error < bound, f"{name} is off by {error:.1e}"
