"""Writes a job for Kubernetes: an indexed Job whose pods each run one launcher.

There are four objects: a ConfigMap with the whole configuration, a Secret by which the pods of this
job know each other, a headless Service that gives pods their names, and the Job. The launchers
restart failed ranks themselves, so Kubernetes only replaces pods that are gone. Exit codes decide
how: a pod that was preempted or lost a peer is replaced without counting as a failure, and one for
which a restart cannot help fails the Job.
Requires Kubernetes 1.31 or newer.
"""

from __future__ import annotations

import posixpath
import re
from dataclasses import dataclass
from typing import Any

import yaml

from moa_dist.config import to_yaml
from moa_dist.config.data import is_remote
from moa_dist.config.run import Config
from moa_dist.errors import ConfigError, ExitCode
from moa_dist.launch.handshake import SECRET_VARIABLE, new_nonce

WORK_FOLDER = "/app"
"""Working folder of the image (docker/Dockerfile), to which relative paths refer."""
USER_ID = 10001
"""User ID of the image."""
PORT = 29500
"""Port of node 0's launcher. Every pod has its own address, so any port is free."""
_CONFIG_FOLDER = "/etc/moa-dist"
_SECRET_KEY = "job-secret"
_MAX_LOST_LAUNCHERS = 20
_MAX_NAME_LENGTH = 63
_LABEL = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?")
_QUANTITY = re.compile(r"[0-9]+(\.[0-9]+)?([kMGTPE]i?|m)?")


@dataclass(frozen=True)
class KubernetesJob:
    """The resources that a Job requests from Kubernetes."""

    nodes: int
    """Number of pods."""
    ranks_per_node: int
    """Number of ranks in each pod."""
    gpus: bool
    """Whether each rank gets a GPU; otherwise ranks compute on CPUs."""
    image: str
    """Reference of an image built from docker/Dockerfile."""
    volumes: tuple[tuple[str, str], ...]
    """Persistent volume claims, each with the folder where it is mounted."""
    grace_s: int
    """Seconds between SIGTERM and SIGKILL, enough for one step and one save."""
    cpu: str | None = None
    """CPUs to request for each pod."""
    memory: str | None = None
    """Memory to request for each pod, which is also its limit."""
    shared_memory: str = "8Gi"
    """Size limit of /dev/shm, which holds batches and NCCL's traffic inside a node."""


def manifest(config: Config, job: KubernetesJob) -> str:
    """Return the objects as YAML, for `kubectl apply -f -`.

    Raises:
        ConfigError: Kubernetes would reject the objects, or the run's files would be lost.
    """
    name = _object_name(config.name)
    problems = [*_name_problems(config, name, job.nodes), *_problems(config, job)]
    if problems:
        raise ConfigError(problems, "Kubernetes job")
    metadata = {"name": name, "labels": {"app.kubernetes.io/name": "moa-dist"}}
    objects: list[dict[str, Any]] = [
        {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": metadata,
            "immutable": True,
            "data": {"config.yaml": to_yaml(config)},
        },
        {
            "apiVersion": "v1",
            "kind": "Secret",
            "metadata": metadata,
            "immutable": True,  # a pod that is replaced must get what the others have
            "stringData": {_SECRET_KEY: new_nonce()},
        },
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": metadata,
            "spec": {
                "clusterIP": "None",
                "selector": {"batch.kubernetes.io/job-name": name},
                "publishNotReadyAddresses": True,  # pods need each other's names to become ready
                "ports": [{"name": "launcher", "port": PORT}],
            },
        },
        {"apiVersion": "batch/v1", "kind": "Job", "metadata": metadata, "spec": _job(name, job)},
    ]
    return yaml.dump_all(objects, Dumper=_Dumper, sort_keys=False)


def _job(name: str, job: KubernetesJob) -> dict[str, Any]:
    final = [ExitCode.DEFECT, ExitCode.USER, ExitCode.NOT_FINITE, ExitCode.NOT_SAVED]
    again = [ExitCode.PREEMPTED, ExitCode.LOST_PEER]
    return {
        "completionMode": "Indexed",
        "completions": job.nodes,
        "parallelism": job.nodes,
        "backoffLimit": _MAX_LOST_LAUNCHERS,
        "podFailurePolicy": {
            "rules": [
                {"action": "FailJob", "onExitCodes": _one_of(final)},
                {"action": "Ignore", "onExitCodes": _one_of(again)},
                {
                    "action": "Ignore",
                    "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}],
                },
            ]
        },
        "template": {"spec": _pod(name, job)},
    }


def _one_of(codes: list[ExitCode]) -> dict[str, Any]:
    return {"operator": "In", "values": sorted(code.value for code in codes)}


def _pod(name: str, job: KubernetesJob) -> dict[str, Any]:
    gpus = {"nvidia.com/gpu": str(job.ranks_per_node)} if job.gpus else {}
    memory = {"memory": job.memory} if job.memory else {}
    mounts = {f"claim-{n}": volume for n, volume in enumerate(job.volumes)}
    return {
        "restartPolicy": "Never",  # required by the failure policy
        "subdomain": name,
        "terminationGracePeriodSeconds": job.grace_s,
        "securityContext": {"runAsNonRoot": True, "runAsUser": USER_ID, "fsGroup": USER_ID},
        "containers": [
            {
                "name": "launcher",
                "image": job.image,
                "args": _arguments(name, job),
                "env": [
                    {
                        "name": SECRET_VARIABLE,
                        "valueFrom": {"secretKeyRef": {"name": name, "key": _SECRET_KEY}},
                    }
                ],
                "resources": {
                    "requests": ({"cpu": job.cpu} if job.cpu else {}) | memory,
                    "limits": gpus | memory,
                },
                "volumeMounts": [
                    {"name": "config", "mountPath": _CONFIG_FOLDER, "readOnly": True},
                    {"name": "shared-memory", "mountPath": "/dev/shm"},
                    *({"name": key, "mountPath": path} for key, (_, path) in mounts.items()),
                ],
            }
        ],
        "volumes": [
            {"name": "config", "configMap": {"name": name}},
            {
                "name": "shared-memory",
                "emptyDir": {"medium": "Memory", "sizeLimit": job.shared_memory},
            },
            *(
                {"name": key, "persistentVolumeClaim": {"claimName": claim}}
                for key, (claim, _) in mounts.items()
            ),
        ],
    }


def _arguments(name: str, job: KubernetesJob) -> list[str]:
    """Return the arguments of `launcher/launch.py`; pods are named after the Job and an index."""
    values = {
        "--config": f"{_CONFIG_FOLDER}/config.yaml",
        "--nodes": str(job.nodes),
        "--node-rank": "$(JOB_COMPLETION_INDEX)",
        "--master-addr": f"{name}-0.{name}",
        "--master-port": str(PORT),
        "--ranks": str(job.ranks_per_node),
    }
    return [word for pair in values.items() for word in pair]


def _object_name(name: str) -> str:
    """Convert a run's name to one that Kubernetes allows."""
    return re.sub(r"[_. ]+", "-", name.lower())


def _name_problems(config: Config, name: str, nodes: int) -> list[str]:
    longest = _MAX_NAME_LENGTH - len(f"-{nodes - 1}")  # the pod's name is its host name
    if _LABEL.fullmatch(name) and not name[0].isdigit() and len(name) <= longest:
        return []
    return [
        f'`name` is "{config.name}", which cannot name a Job and its Service: start with a letter, '
        f"and use letters, digits and single hyphens, at most {longest} characters"
    ]


def _problems(config: Config, job: KubernetesJob) -> list[str]:
    problems = []
    for option, quantity in (
        ("--cpu", job.cpu),
        ("--memory", job.memory),
        ("--shared-memory", job.shared_memory),
    ):
        if quantity is not None and not _QUANTITY.fullmatch(quantity):
            problems.append(f"{option} is `{quantity}`: write a quantity such as 16 or 64Gi")
    for claim, path in job.volumes:
        if not all(map(_LABEL.fullmatch, claim.split("."))):
            problems.append(f"--volume: `{claim}` is not a name of a persistent volume claim")
        if not path.startswith("/") or ":" in path or posixpath.normpath(path) == "/":
            problems.append(f"--volume: `{path}` is not an absolute folder: write CLAIM:/FOLDER")
    if len({path for _, path in job.volumes}) < len(job.volumes):
        problems.append("--volume: two claims are mounted at the same folder")
    places = [("output", config.output)]
    places += [("data.train", source.path) for source in config.data.sources]
    places += [("data.valid", folder.path) for folder in config.data.held_out]
    for field, place in places:
        if is_remote(place):
            continue
        inside = posixpath.normpath(posixpath.join(WORK_FOLDER, place))
        if not any(
            posixpath.commonpath([inside, path]) == posixpath.normpath(path)
            for _, path in job.volumes
            if path.startswith("/")
        ):
            problems.append(
                f"`{field}` is {place}, which is {inside} in a pod and on none of its volumes: add "
                f"--volume CLAIM:{posixpath.dirname(inside) if field != 'output' else inside}"
            )
    return problems


class _Dumper(yaml.SafeDumper):
    """Writes multi-line strings as literal blocks, and repeats values instead of using aliases."""

    def ignore_aliases(self, data: object) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = "|" if "\n" in text else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _text)
