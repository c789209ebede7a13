"""A trace says where the time of a step went; running out of memory says who holds it."""

import gzip
import json
from functools import partial
from pathlib import Path

import pytest
import torch

from moa_dist.distributed.mesh import make_mesh
from moa_dist.errors import MemoryLimitError
from moa_dist.models.language_model import build_model
from moa_dist.moe.sharding import shard_experts
from moa_dist.profiling import PREFIX
from moa_dist.train.engine import Engine
from moa_dist.train.out_of_memory import explain_out_of_memory, holdings, remedies
from moa_dist.train.profile import FOLDER, Tracer
from tests.distributed.layouts import Case, micro_batches

CPU = torch.device("cpu")
CASE = Case(zero_stage=2, precision="fp32", optimizer="adamw", recompute=True)


def make_engine(case: Case) -> Engine:
    config, mesh = case.config(), make_mesh(case.expert_parallel)
    shard = partial(shard_experts, mesh=mesh)
    model = build_model(config.model, recompute=case.recompute, parallelize=shard)
    return Engine(model, config, mesh, CPU)


def traced(folder: Path) -> list[str]:
    engine = make_engine(CASE)
    config = CASE.config().profile.model_copy(update={"steps": (2, 3), "ranks": (0,)})
    tracer, notes = Tracer(config, folder, engine.mesh.rank, CPU), []
    for step in (1, 2, 3, 4):
        with tracer.step(step):
            engine.step(micro_batches(CASE, engine.mesh), lr=0.1)
        notes += tracer.write()
    tracer.close()
    engine.close()
    return notes


def test_a_trace_of_chosen_steps_shows_the_parts(pools, tmp_path):
    (where, shares), (same,) = pools(2).run(traced, tmp_path)
    assert f"traced steps 2 to 3: {tmp_path / FOLDER / 'rank-0.json.gz'}; open one at" in where
    assert same == where
    assert " ms per traced step on rank 0: " in shares
    assert sorted(path.name for path in (tmp_path / FOLDER).iterdir()) == [
        "rank-0.json.gz",
        "rank-0.parts.json",
    ]
    with gzip.open(tmp_path / FOLDER / "rank-0.json.gz") as file:
        names = [event.get("name", "") for event in json.load(file)["traceEvents"]]
    # Two steps of two micro-batches; recomputation runs everything but the loss again.
    assert names.count(f"{PREFIX}loss") == names.count(f"{PREFIX}backward") == 2 * 2
    assert names.count(f"{PREFIX}ffn") == 2 * 2 * 4 * 2
    assert names.count(f"{PREFIX}optimizer") == 2
    record = json.loads((tmp_path / FOLDER / "rank-0.parts.json").read_text())
    parts = record["milliseconds"]
    once = {"loss", "backward", "optimizer", "other"} & set(parts)
    both = {"router", "dispatch", "exchange", "experts", "attention", "ffn"}
    assert once >= {"loss", "backward", "optimizer", "other"}
    assert set(parts) >= both | {f"{annotate} (backward)" for annotate in both}
    assert all(milliseconds > 0 for milliseconds in parts.values())


def run_out(folder: Path, zero_stage: int) -> tuple[str, dict[str, int], int]:
    case = Case(zero_stage=zero_stage, precision="fp32", optimizer="adamw")
    engine = make_engine(case)
    batches = micro_batches(case, engine.mesh)
    engine.step(batches, lr=0.1)
    held = holdings(engine)
    # More than any machine has, in the middle of a layer.
    engine.model.stack.layers[1].ffn.register_forward_hook(lambda *_: torch.empty(1 << 50))
    try:
        with explain_out_of_memory(engine, case.config(), folder, step=2):
            engine.step(batches, lr=0.1)
    except MemoryLimitError as error:
        size = sum(p.numel() for p in engine.model.parameters())
        engine.close()
        return str(error), held, size
    raise AssertionError("there was enough memory")


@pytest.mark.parametrize("zero_stage", [0, 2])
def test_running_out_says_who_holds_what_and_what_to_change(pools, tmp_path, zero_stage):
    for rank, (text, held, size) in enumerate(pools(2).run(run_out, tmp_path, zero_stage)):
        first, *table, last = text.splitlines()
        assert f"rank {rank} (host " in first
        assert "step 2: [enforce fail" in first
        assert [line.split("  ")[1] for line in table[:4]] == [
            "parameters", "gradients", "optimizer state", "activations and all else",
        ]  # fmt: skip
        assert "train.micro_batch=1 (now 2); train.recompute=true; " in last
        assert (tmp_path / f"out-of-memory/rank-{rank}.txt").read_text() == text + "\n"
        # Padding of ZeRO's buffers, and a step counter per parameter.
        assert held["parameters"] == pytest.approx(4 * size, rel=0.1)
        if zero_stage == 0:
            assert held["optimizer state"] == pytest.approx(2 * 4 * size, rel=0.1)
        else:  # masters and two moments, of dense parameters a half
            assert 3 * 4 * size / 2 < held["optimizer state"] < 3 * 4 * size


def fail_in_other_ways(folder: Path) -> list[str]:
    engine, said = make_engine(CASE), []
    for error in (MemoryError(), torch.OutOfMemoryError("CUDA"), RuntimeError("another")):
        try:
            with explain_out_of_memory(engine, CASE.config(), folder, step=2):
                raise error
        except (MemoryLimitError, RuntimeError) as raised:
            said.append(str(raised))
    engine.close()
    return said


def test_other_kinds_of_running_out_count_and_other_errors_do_not(pools, tmp_path):
    for host, gpu, another in pools(2).run(fail_in_other_ways, tmp_path):
        assert "step 2: MemoryError" in host
        assert "step 2: CUDA" in gpu
        assert another == "another"


def test_remedies_change_what_holds_most_first():
    config = Case(expert_parallel=1, zero_stage=1, precision="fp32", micro_batch=4).config()
    state = {"parameters": 9, "activations and all else": 1}
    assert remedies(config, 2, state) == [
        "parallel.expert_parallel=2 (now 1)",
        "parallel.zero_stage=2 (now 1)",
        "train.micro_batch=2 (now 4)",
        "train.recompute=true",
    ]
    assert "optimizer.offload=host (slower)" in remedies(config, 2, state, on_gpu=True)
    config = Case(expert_parallel=2, zero_stage=3, micro_batch=1, recompute=True).config()
    (last_resort,) = remedies(config, 2, state)
    assert "=" not in last_resort  # nothing of the configuration is left to change
