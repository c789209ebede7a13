"""Run the objects for Kubernetes without a cluster: `python -m tests.cluster.kubernetes`.

Validates them against the published schemas, then does for the Job what a cluster would do. Every
pod is a root folder and a network namespace with its own address, host name and process IDs; it
runs the image's entry point with the container's arguments, and is replaced according to the
failure policy. One pod is asked to stop and another is killed; the job must end bit for bit like
one on a single machine. Prints every test that passed; exit status 1 if one failed.

Needs root, and network access for the schemas (pip, into a temporary folder). Takes about four
minutes.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import yaml

from tests.cluster.same_run import main as compare
from tests.cluster.same_run import steps

ROOT = Path(__file__).parents[2]
CONFIG = str(ROOT / "tests/cluster/tiny.yaml")
SCHEMAS = ("1.31", "1.35")
"""Versions of Kubernetes: the first that has all features used here, and a recent one."""
IMAGE = ("docker", "launcher", "moa_dist")
"""The folders of the image below /app that are needed here."""
WAIT_S = 400.0
OBJECTS = ("--nodes", "2", "--ranks-per-node", "1", "--image", "moa-dist", "--grace", "60",
           "--volume", "data:/app/data", "--volume", "runs:/app/runs")  # fmt: skip
# Creates the root folder $1 and runs the rest in it as process 1, with the machine's programs but
# its own /etc, /app and /dev/shm.
ENTER = """
set -eu
root=$1 hosts=$2
shift 2
mount -t tmpfs none "$root"
for folder in /*; do
    name=$root$folder
    case $folder in
    /etc) cp -a /etc "$name" ;;
    /dev) mkdir "$name" && mount --rbind "$folder" "$name" ;;
    /proc) mkdir "$name" && mount -t proc proc "$name" ;;
    /app) ;;
    *) if [ -L "$folder" ]; then cp -P "$folder" "$name"
       elif [ -d "$folder" ]; then mkdir "$name" && mount --bind "$folder" "$name"; fi ;;
    esac
done
printf '%s' "$hosts" >"$root/etc/hosts"
while [ "$1" != -- ]; do
    mkdir -p "$root$2"
    if [ "$1" = memory ]; then mount -t tmpfs none "$root$2"
    else mount --bind "$1" "$root$2"; fi
    shift 2
done
shift
cd "$root/app"
exec chroot "$root" env -C /app "$@"
"""


class Pod:
    """A running pod of a Job."""

    def __init__(self, objects: dict[str, Any], index: int, work: Path) -> None:
        """Start the pod as the Job's controller and a node's kubelet would."""
        name = objects["Job"]["metadata"]["name"]
        spec = objects["Job"]["spec"]["template"]["spec"]
        (container,) = spec["containers"]
        service = objects["Service"]["metadata"]["name"]
        assert spec["subdomain"] == service
        names = [f"10.0.0.{n + 1} {name}-{n}.{service} {name}-{n}\n" for n in range(2)]
        environment = {
            "JOB_COMPLETION_INDEX": str(index),
            "PATH": os.environ["PATH"],
            "PYTHONPATH": "/app",
            "OMP_NUM_THREADS": "1",  # the pods share this machine
        }
        for variable in container["env"]:
            reference = variable["valueFrom"]["secretKeyRef"]
            assert reference["name"] == objects["Secret"]["metadata"]["name"]
            environment[variable["name"]] = objects["Secret"]["stringData"][reference["key"]]
        arguments = [
            re.sub(r"\$\((\w+)\)", lambda found: environment[found[1]], argument)
            for argument in container["args"]
        ]
        root = work / f"pod-{index}"
        root.mkdir(exist_ok=True)
        isolate = ["ip", "netns", "exec", f"pod-{index}"]
        isolate += ["unshare", "--uts", "--mount", "--pid", "--fork", "--kill-child", "sh", "-c"]
        self.log = work / f"pod-{index}.log"
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [
                    *(*isolate, f"hostname {name}-{index}\n{ENTER}", "pod"),
                    *(str(root), "127.0.0.1 localhost\n" + "".join(names)),
                    *(str(word) for word in _mounts(objects, spec, container, work)),
                    *("--", "-i", *(f"{key}={value}" for key, value in environment.items())),
                    *("/app/docker/entrypoint.sh", *arguments),
                ],
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def evict(self) -> None:
        """Send SIGTERM to process 1, as a node does when it is drained."""
        (first,) = psutil.Process(self.process.pid).children()
        first.terminate()

    def kill(self) -> None:
        """Kill all its processes, as a node does when it is out of memory."""
        self.process.kill()


def _mounts(
    objects: dict[str, Any], spec: dict[str, Any], container: dict[str, Any], work: Path
) -> list[Path | str]:
    """Return pairs of what to mount, a path or `memory`, and where."""
    config = work / "config-map"
    config.mkdir(exist_ok=True)
    for name, text in objects["ConfigMap"]["data"].items():
        (config / name).write_text(text)
    pairs: list[Path | str] = [word for part in IMAGE for word in (ROOT / part, f"/app/{part}")]
    volumes = {volume["name"]: volume for volume in spec["volumes"]}
    for mount in container["volumeMounts"]:
        volume = volumes[mount["name"]]
        source: Path | str = "memory"
        if "configMap" in volume:
            assert volume["configMap"]["name"] == objects["ConfigMap"]["metadata"]["name"]
            source = config
        elif "persistentVolumeClaim" in volume:
            source = work / volume["persistentVolumeClaim"]["claimName"]
        pairs += [source, mount["mountPath"]]
    return pairs


class Job:
    """Replaces pods until all have succeeded, or the policy fails the Job."""

    def __init__(self, objects: dict[str, Any], work: Path) -> None:
        """Start all pods."""
        self._objects, self._work = objects, work
        self.spec = objects["Job"]["spec"]
        self.pods = {i: Pod(objects, i, work) for i in range(self.spec["completions"])}
        self.ends: list[tuple[int, int, str]] = []
        """Pods that ended: index, status, and the action of the policy."""

    def until(self, holds: Callable[[], bool]) -> None:
        """Run the Job until the condition holds."""
        deadline = time.monotonic() + WAIT_S
        while not holds():
            if time.monotonic() > deadline:
                raise TimeoutError(f"not within {WAIT_S:g} s: {self.ends}")
            for index, pod in list(self.pods.items()):
                status = pod.process.poll()
                if status is not None and self.pods:
                    self._ended(index, status if status >= 0 else 128 - status)
            time.sleep(0.1)

    @property
    def over(self) -> bool:
        """Whether no pod is left."""
        return not self.pods

    def counted(self, action: str) -> int:
        """Return how often the policy took an action."""
        return sum(what == action for *_, what in self.ends)

    def _ended(self, index: int, status: int) -> None:
        action = self._action(status)
        self.ends.append((index, status, action))
        del self.pods[index]
        if action == "FailJob" or self.counted("Count") > self.spec["backoffLimit"]:
            self.end()
        elif action != "Complete":
            self.pods[index] = Pod(self._objects, index, self._work)

    def _action(self, status: int) -> str:
        if status == 0:
            return "Complete"
        for rule in self.spec["podFailurePolicy"]["rules"]:
            if status in rule.get("onExitCodes", {"values": ()})["values"]:
                return str(rule["action"])
        return "Count"

    def end(self) -> None:
        """Kill all pods."""
        for pod in self.pods.values():
            pod.kill()
            pod.process.wait()
        self.pods = {}


def make(name: str, *arguments: str) -> dict[str, Any]:
    """Return the objects by kind."""
    command = [sys.executable, str(ROOT / "launcher/job.py"), "kubernetes", "--config", CONFIG]
    text = subprocess.check_output([*command, *OBJECTS, f"name={name}", *arguments], text=True)
    return {made["kind"]: made for made in yaml.safe_load_all(text)}


def check_schemas(work: Path) -> None:
    """Validate the objects; raises an error if the API would reject one."""
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.check_call([*pip, "--target", str(work / "validator"), "kubernetes-validate"])
    sys.path.append(str(work / "validator"))
    from kubernetes_validate import validate

    for arguments in ([], ["--cpu", "8", "--memory", "64Gi"]):
        for made in make("proof", *arguments).values():
            for version in SCHEMAS:
                validate(made, version, strict=True)
    print(f"PASSED: all objects follow the schemas of Kubernetes {' and '.join(SCHEMAS)}")


def make_network() -> None:
    """Create the namespaces of two pods, joined by a cable; `/run` belongs to this process."""
    for line in (
        "mount -t tmpfs none /run",
        "ip netns add pod-0",
        "ip netns add pod-1",
        "ip link add eth0 netns pod-0 type veth peer name eth0 netns pod-1",
        *(f"ip -n pod-{n} link set {link} up" for n in (0, 1) for link in ("lo", "eth0")),
        *(f"ip -n pod-{n} address add 10.0.0.{n + 1}/24 dev eth0" for n in (0, 1)),
        "ip link set lo up",
    ):
        subprocess.check_call(shlex.split(line))


def train(work: Path) -> None:
    """Check that the Job trains, continues, and fails as it should."""
    (work / "runs").mkdir()
    subprocess.check_call(
        [
            *(sys.executable, "-m", "moa_dist.cli.main", "prepare", "--output", "data"),
            *("--input", str(ROOT / "moa_dist"), "--valid-share", "0.1", "--vocab-size", "300"),
            *("--sequence-length", "32", "--max-bytes", "100000"),
        ],
        cwd=work,
        stderr=subprocess.DEVNULL,
    )
    with (work / "calm.log").open("w") as log:
        subprocess.check_call(
            [sys.executable, ROOT / "launcher/launch.py", "--config", CONFIG, "--ranks", "2"],
            cwd=work, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=log, stderr=log,
        )  # fmt: skip
    run = work / "runs/proof"

    def reached(step: int) -> bool:
        return (run / "metrics.jsonl").exists() and len(steps(run)) >= step

    job = Job(make("proof"), work)
    try:
        job.until(lambda: reached(5))
        job.pods[1].evict()
        job.until(lambda: len(job.ends) == 2)
        assert sorted(job.ends) == [(0, 75, "Ignore"), (1, 75, "Ignore")], job.ends
        saved = len(steps(run))
        assert (run / f"step-{saved:08d}").exists()
        print(f"PASSED: a pod was evicted; saved at step {saved}, both exited with 75, replaced")
        job.until(lambda: reached(saved + 5))
        job.pods[0].kill()
        job.until(lambda: job.over)
        assert sorted(job.ends[2:]) == [(0, 0, "Complete"), (0, 137, "Count"), (1, 0, "Complete")]
        print("PASSED: pod 0 was killed and replaced, pod 1 waited for it; all completed")
        if compare(work / "runs/calm", run):
            raise AssertionError("not equal to the undisturbed job")
        job = Job(make("wrong", "data.train=data/nowhere"), work)
        job.until(lambda: job.over)
        assert job.ends[0][1:] == (2, "FailJob"), job.ends
        print("PASSED: a data error ended with 2, which fails the Job")
    except BaseException:
        for log in sorted(work.glob("*.log")):
            print(f"--- {log.name}", *log.read_text().splitlines()[-40:], sep="\n")
        raise
    finally:
        job.end()


def main() -> int:
    """Run all tests; returns the exit status."""
    if sys.argv[1:2] == ["--inside"]:
        make_network()
        train(Path(sys.argv[2]))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        check_schemas(Path(folder))
        isolate = ["unshare", "--mount", "--net", "--pid", "--fork", "--mount-proc", "--kill-child"]
        inside = [sys.executable, "-m", "tests.cluster.kubernetes", "--inside", folder]
        return subprocess.run([*isolate, *inside], cwd=ROOT).returncode


if __name__ == "__main__":
    sys.exit(main())
