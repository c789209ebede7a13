"""The objects for Kubernetes. `tests/cluster/kubernetes.py` validates and runs them."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from moa_dist.config import load_config

ROOT = Path(__file__).parents[2]
CONFIG = str(ROOT / "configs/quickstart.yaml")
VOLUMES = ["--volume", "shards:/app/data", "--volume", "results:/app/runs"]
NODES = ["--nodes", "2", "--gpus-per-node", "4", "parallel.expert_parallel=8"]
BATCH = ["train.micro_batch=2"]


def job(*arguments: str, expect: int = 0) -> str:
    done = subprocess.run(
        [sys.executable, str(ROOT / "launcher/job.py"), "kubernetes", "--config", CONFIG,
         "--image", "registry/moa-dist:1", *arguments],
        text=True, capture_output=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == expect, done.stderr
    return done.stdout if expect == 0 else done.stderr


def objects(*arguments: str) -> dict[str, dict]:
    return {x["kind"]: x for x in yaml.safe_load_all(job(*NODES, *BATCH, *VOLUMES, *arguments))}


def test_objects_fit_each_other():
    made = objects("name=My_Run", "--memory", "64Gi", "--cpu", "16", "--grace", "120")
    assert {x["metadata"]["name"] for x in made.values()} == {"my-run"}
    spec = made["Job"]["spec"]
    assert (spec["completionMode"], spec["completions"], spec["parallelism"]) == ("Indexed", 2, 2)
    service = made["Service"]["spec"]
    assert service["clusterIP"] == "None"
    assert service["selector"] == {"batch.kubernetes.io/job-name": "my-run"}
    assert service["publishNotReadyAddresses"] is True
    pod = spec["template"]["spec"]
    assert pod["subdomain"] == "my-run"
    assert pod["restartPolicy"] == "Never"
    assert pod["terminationGracePeriodSeconds"] == 120
    (container,) = pod["containers"]
    assert container["args"] == [
        *("--config", "/etc/moa-dist/config.yaml", "--nodes", "2"),
        *("--node-rank", "$(JOB_COMPLETION_INDEX)"),
        *("--master-addr", "my-run-0.my-run", "--master-port", "29500", "--ranks", "4"),
    ]
    assert container["resources"] == {
        "requests": {"cpu": "16", "memory": "64Gi"},
        "limits": {"nvidia.com/gpu": "4", "memory": "64Gi"},
    }
    mounts = {x["name"]: x["mountPath"] for x in container["volumeMounts"]}
    claims = {
        mounts[x["name"]]: x["persistentVolumeClaim"]["claimName"]
        for x in pod["volumes"]
        if "persistentVolumeClaim" in x
    }
    assert claims == {"/app/data": "shards", "/app/runs": "results"}
    assert mounts["shared-memory"] == "/dev/shm"
    assert mounts.keys() == {x["name"] for x in pod["volumes"]}


def test_pods_share_a_secret_that_each_job_generates():
    made, other = objects("name=a"), objects("name=a")
    (container,) = made["Job"]["spec"]["template"]["spec"]["containers"]
    (variable,) = container["env"]
    assert variable["name"] == "MOA_DIST_JOB_SECRET"
    reference = variable["valueFrom"]["secretKeyRef"]
    assert reference["name"] == made["Secret"]["metadata"]["name"]
    secret = made["Secret"]["stringData"][reference["key"]]
    assert len(secret) == 64
    assert secret != other["Secret"]["stringData"][reference["key"]]
    assert made["Secret"]["immutable"] is True  # pods that are replaced get the same


def test_configuration_travels_whole(tmp_path):
    text = objects("train.steps=77")["ConfigMap"]["data"]["config.yaml"]
    (tmp_path / "config.yaml").write_text(text)
    read = load_config(tmp_path / "config.yaml")
    assert read == load_config(CONFIG, [NODES[-1], *BATCH, "train.steps=77"])


def test_exit_statuses_decide_what_a_failed_pod_means():
    rules = objects()["Job"]["spec"]["podFailurePolicy"]["rules"]
    meaning = {
        code: rule["action"]
        for rule in reversed(rules)
        for code in rule.get("onExitCodes", {"values": []})["values"]
    }
    assert meaning == dict.fromkeys((1, 2, 3, 4), "FailJob") | dict.fromkeys((75, 76), "Ignore")
    assert [r["onPodConditions"][0]["type"] for r in rules if "onPodConditions" in r] == [
        "DisruptionTarget"
    ]


@pytest.mark.parametrize(
    ("arguments", "quoted"),
    [
        (["name=1b"], ["`name`", '"1b"']),
        ([f"name={'x' * 62}"], ["`name`", "61"]),
        (["output=elsewhere"], ["`output`", "/app/elsewhere"]),
        (["data.train=/shards/train"], ["`data.train`", "--volume CLAIM:/shards"]),
        (["--memory", "64 GB"], ["--memory", "`64 GB`", "64Gi"]),
        (["--volume", "Claim:/x"], ["--volume", "`Claim`"]),
        (["--volume", "claim"], ["--volume", "``", "CLAIM:/FOLDER"]),
        (["--volume", "more:/app/runs"], ["--volume"]),
        (["data.readers=9"], ["data.readers", "quickstart on 2 x 4 ranks"]),
    ],
)
def test_wrong_values_end_in_one_error(arguments, quoted):
    error = job(*NODES, *BATCH, *VOLUMES, *arguments, expect=2)
    problems = [line for line in error.splitlines() if line.startswith("  - ")]
    assert len(problems) == 1
    assert all(word in error for word in quoted)
    assert "Traceback" not in error


def test_run_without_a_volume_is_refused():
    error = job(*NODES, *BATCH, expect=2)
    for field in ("output", "data.train", "data.valid"):
        assert f"`{field}` is " in error
    assert "--volume CLAIM:/app/runs" in error
