"""The examples of a second phase and of fine-tuning, run as their headings and the page say."""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import yaml

from tests.integration.conftest import write_text
from tests.integration.test_commands import run

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "configs/examples"
TINY = (
    "model.vocab_size=300", "model.d_model=16", "model.num_layers=2",
    "model.num_distinct_layers=1", "model.attention.d_head=8", "model.ffn.router.num_experts=10",
    "data.sequence_length=32", "data.workers=0", "train.steps=2", "train.global_batch=8",
    "train.micro_batch=8", "train.precision=fp32", "logging.trackers=[]", "logging.every=1",
    "evaluation.every=2", "evaluation.sequences=8", "schedule.warmup_steps=0",
)  # fmt: skip
"""The examples' sizes are for a GPU."""


def commands(example: str) -> list[list[str]]:
    """Words of the commands in an example's heading."""
    heading = re.findall(r"^#     (.*)$", (EXAMPLES / example).read_text(), re.MULTILINE)
    return [shlex.split(line) for line in "\n".join(heading).replace("\\\n", " ").splitlines()]


@pytest.fixture(scope="module")
def first(tmp_path_factory) -> Path:
    """A folder in which the first phase has been trained."""
    folder = tmp_path_factory.mktemp("phases")
    shutil.copytree(EXAMPLES.parent, folder / "configs")
    for name in ("my_texts", "my_best_texts", "my_letters"):
        write_text(folder / name)
    follow(folder, "own_text.yaml", "train.steps=2")
    return folder


def follow(folder: Path, example: str, *changes: str) -> dict[str, list[dict]]:
    """Run an example's commands, training as small as can be; returns the run's records by kind."""
    for words in commands(example):
        if words[1] == "prepare":
            smaller = {"8000": "300", "512": "32", "0.01": "0.1"}
            run(*(smaller.get(word, word) for word in words), cwd=folder)
        elif words[1] == "export":
            run(*words, cwd=folder)
        elif words[1] == "launcher/launch.py":
            train = ["python", str(ROOT / "launcher/train.py"), *words[2:]]
            run(*train, *TINY, *changes, cwd=folder)
    name = yaml.safe_load((EXAMPLES / example).read_text())["name"]
    lines = (folder / "runs" / name / "metrics.jsonl").read_text().splitlines()
    records: dict[str, list[dict]] = {}
    for record in map(json.loads, lines):
        records.setdefault(record["kind"], []).append(record)
    return records


@pytest.mark.full
def test_a_second_phase_starts_from_the_weights_of_the_first(first):
    phases = "schedule.phases=[{steps: 1, to: 1}, {to: 0}]"
    records = follow(first, "second_phase.yaml", phases)
    assert [record["step"] for record in records["step"]] == [1, 2]
    assert [record["lr"] for record in records["step"]] == [5e-4, 0.0]
    assert records["validation"][-1]["losses"].keys() == {"best", "mine"}
    notes = " ".join(record["message"] for record in records["note"])
    assert "example-own-text" in notes


@pytest.mark.full
def test_fine_tuning_shows_samples_and_ends_in_an_export(first):
    records = follow(first, "fine_tune.yaml", "evaluation.samples.tokens=3")
    (samples,) = records["samples"]
    assert samples["step"] == 2
    assert [sample["prompt"] for sample in samples["samples"]] == ["Dear ", "I was "]
    assert (first / "letters-model/config.json").is_file()
    assert list((first / "letters-model").glob("*.py"))
