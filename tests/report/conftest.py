"""A run's folder as observers write it."""

from dataclasses import replace
from pathlib import Path

import pytest

from moa_dist.config import to_yaml
from moa_dist.observe.jsonl import MetricsFile
from moa_dist.observe.metrics import RouterSize, RunStart
from tests.observe.reports import PROVENANCE, make_config, step_metrics, validation_metrics


@pytest.fixture
def write_run(tmp_path):
    """Create `tmp_path/name` with metrics of some steps and a configuration; returns the folder.

    `validation` and `changes` replace values of validations and of steps.
    """

    def write(
        name: str = "tiny", steps=range(1, 21), label: str | None = None, validation=None, **changes
    ) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        config = make_config(name=label or name)
        start = RunStart(
            config=config,
            folder=str(folder),
            world_size=2,
            device="cpu",
            backend="gloo",
            num_parameters=4_020_000,
            num_active_parameters=1_310_000,
            flops_per_token=1.5e7,
            first_step=0,
            provenance=PROVENANCE,
            hosts=["node-1", "node-2"],
            routers={"ffn": RouterSize(groups=1, experts=4, choices=2)},
        )
        file = MetricsFile()
        file.start(start)
        for step in steps:
            file.step(step_metrics(step, **changes))
            if step % 10 == 0:
                values = {"perplexity": 90.0 + 1 / step} | (validation or {})
                file.validation(replace(validation_metrics(step), **values))
        file.note("step 21 refused: <b>spike</b>")
        file.close()
        (folder / "config.yaml").write_text(to_yaml(config))
        return folder

    return write
