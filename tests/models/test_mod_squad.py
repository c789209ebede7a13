"""Mod-Squad computes what its authors' code computes, in fp64; see `test_relatives`."""

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from moa_dist.config.attention import MoAConfig
from moa_dist.config.family import TaskRouterConfig
from moa_dist.config.routers import BalanceConfig
from moa_dist.errors import DataError
from moa_dist.models.mask import AttentionMask
from moa_dist.models.moa import MoAAttention
from moa_dist.moe.token_state import TokenState
from tests.models.test_relatives import GOLDEN, close

TASKS, COEFFICIENT = 3, 20.0


def ours(golden: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Their tensors by our names: routers of all tasks are one matrix."""
    (k, v), (k_bias, v_bias) = (golden[f"{prefix}.{n}_kv"].chunk(2) for n in "wb")
    gates = [golden[f"{prefix}.task_gate.{task}"] for task in range(TASKS)]
    return {
        "router.logits.weight": torch.cat(gates),
        "q.weight": golden[f"{prefix}.w_q"],
        "o.weight": golden[f"{prefix}.w_o"],
        "k.weight": k,
        "v.weight": v,
        "k.bias": k_bias,
        "v.bias": v_bias,
    }


def layer(sequences: int) -> MoAAttention:
    router = TaskRouterConfig(
        num_experts=6,
        top_k=2,
        tasks=TASKS,
        task_information=COEFFICIENT,
        group_sequences=sequences,
        balance=BalanceConfig(scope="micro_batch"),
    )
    config = MoAConfig(d_head=8, rope=None, kv_bias=True, router=router)
    return MoAAttention(config, 24, 1.0).double()


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
def test_mod_squad(padded):
    golden = load_file(GOLDEN / f"modsquad_attention{'_padded' if padded else ''}.safetensors")
    per_task = golden["x"].shape[1]
    x = golden["x"].flatten(0, 1).requires_grad_()
    tasks = torch.arange(TASKS).repeat_interleave(per_task)
    module = layer(len(x))
    module.load_state_dict(ours(golden, "param"))
    real = ~golden["pad"].flatten(0, 1) if padded else None
    mask = AttentionMask(False, real, real)
    output = module(x, x, x, mask, state=TokenState(tasks=tasks))
    (loss,) = module.router.losses(output.statistics["query"]).values()
    main = (output.y * golden["grad_y"].flatten(0, 1)).sum()
    (main if padded else main + loss).backward()
    y, theirs = output.y, golden["y"].flatten(0, 1)
    close(y if real is None else y[real], theirs if real is None else theirs[real])
    close(x.grad, golden["grad.x"].flatten(0, 1))
    for name, gradient in ours(golden, "grad").items():
        # Biases of keys have none, but for rounding.
        error = (module.get_parameter(name).grad - gradient).norm()
        assert error <= 1e-9 * max(gradient.norm(), 1e-3), name
    if not padded:  # their loss counts padding
        close(loss, COEFFICIENT * golden["mi"].squeeze())


def test_without_tasks_it_says_so():
    x = torch.zeros(2, 3, 24, dtype=torch.float64)
    with pytest.raises(DataError) as refused:
        layer(2)(x, x, x, AttentionMask(causal=True))
    assert refused.value.key == "tasks"
