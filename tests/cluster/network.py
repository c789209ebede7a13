"""Two hosts on one machine: network namespaces on a bridge, each with its own address and sshd.

Everything is inside namespaces and a temporary folder, including keys and the ssh configuration;
the machine's network and the user's `~/.ssh` are not touched. Needs root.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

SUBNET = "10.77.0"
PORT, ODD_PORT = 22, 2022
"""Port of each host's sshd, and of a second one whose sessions see other files."""
TOOLS = {
    "ip": "iproute2",
    "/usr/sbin/sshd": "openssh-server",
    "ssh": "openssh-client",
    "pdsh": "pdsh",
    "unshare": "util-linux",
    "mount": "mount",
}
SSHD = """\
Port {port}
ListenAddress {address}
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/user_key.pub
PidFile none
UsePAM no
StrictModes no
PermitRootLogin prohibit-password
PasswordAuthentication no
"""
SSH = """\
Host *
  IdentityFile {folder}/user_key
  IdentitiesOnly yes
  UserKnownHostsFile {folder}/known_hosts
  GlobalKnownHostsFile /dev/null
  StrictHostKeyChecking accept-new
  LogLevel ERROR
Host node-a
  HostName {subnet}.1
Host node-b
  HostName {subnet}.2
Host odd-b
  HostName {subnet}.2
  Port {odd_port}
Host node-c
  HostName {subnet}.9
"""


def run(*command: str) -> str:
    """Run a command that must succeed, and return its output."""
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)}: {result.stderr.strip()}")
    return result.stdout


@dataclass
class Host:
    """A host, which is a network namespace."""

    name: str
    """Host name."""
    namespace: str
    """Name of its network namespace."""
    address: str
    """Address on the bridge."""
    plug: str
    """Device at the bridge's end of its cable."""
    switch: str
    """Namespace of the bridge."""

    def command(self, *words: str) -> list[str]:
        """Return the command that runs `words` on the host."""
        named = 'hostname "$0"; exec "$@"'
        inside = ["ip", "netns", "exec", self.namespace]
        return [*inside, "unshare", "--uts", "sh", "-c", named, self.name, *words]

    def start(self, *words: str, log: Path, cwd: Path | None = None, **env: str):
        """Start a command on the host, with its output in `log`."""
        with log.open("ab") as output:
            return subprocess.Popen(
                self.command(*words),
                cwd=cwd,
                env=os.environ | env,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def cable(self, state: str) -> None:
        """Set the cable's state: `down` cuts it, `up` repairs it."""
        run("ip", "-n", self.switch, "link", "set", self.plug, state)

    def processes(self) -> list[psutil.Process]:
        """Return all processes on the host, whoever started them, except its sshd."""
        wanted = os.stat(f"/run/netns/{self.namespace}").st_ino
        found = []
        for process in psutil.process_iter(["name"]):
            try:
                own = os.stat(f"/proc/{process.pid}/ns/net").st_ino
            except OSError:
                continue
            if own == wanted and not process.info["name"].startswith("sshd"):
                found.append(process)
        return found


def missing_tools() -> list[str]:
    """Return the Debian packages that must be installed first."""
    from shutil import which

    return sorted({package for tool, package in TOOLS.items() if which(tool) is None})


@contextmanager
def two_hosts(folder: Path, odd: dict[Path, Path], hidden: Path) -> Iterator[tuple[Host, Host]]:
    """Create `node-a` and `node-b`, with `ssh -F folder/ssh_config` between them.

    Under the name `odd-b`, node-b shows the values of `odd` in place of its keys, and an empty
    folder in place of `hidden`.
    """
    tag = f"moa{os.getpid()}"
    with ExitStack() as stack:
        for key in ("host_key", "user_key"):
            run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / key))
        text = SSH.format(folder=folder, subnet=SUBNET, odd_port=ODD_PORT)
        (folder / "ssh_config").write_text(text)
        Path("/run/sshd").mkdir(exist_ok=True)  # needed for sshd's privilege separation
        switch = _namespace(stack, f"{tag}s")
        run("ip", "-n", switch, "link", "add", "bridge", "type", "bridge")
        run("ip", "-n", switch, "link", "set", "bridge", "up")
        hosts = [_host(stack, number, tag, switch) for number in (1, 2)]
        for host in hosts:
            _sshd(stack, host, folder, PORT, "")
        mounts = [f"mount --bind {there} {here}" for here, there in odd.items()]
        mounts.append(f"mount -t tmpfs none {hidden}")
        _sshd(stack, hosts[1], folder, ODD_PORT, " && ".join(mounts))
        yield hosts[0], hosts[1]


def _namespace(stack: ExitStack, name: str) -> str:
    run("ip", "netns", "add", name)
    stack.callback(run, "ip", "netns", "del", name)
    run("ip", "-n", name, "link", "set", "lo", "up")
    return name


def _host(stack: ExitStack, number: int, tag: str, switch: str) -> Host:
    letter = " ab"[number]
    namespace, plug = _namespace(stack, f"{tag}{letter}"), f"plug-{letter}"
    address = f"{SUBNET}.{number}"
    run("ip", "-n", switch, "link", "add", plug, "type", "veth", "peer", "eth0", "netns", namespace)
    run("ip", "-n", switch, "link", "set", plug, "master", "bridge", "up")
    run("ip", "-n", namespace, "addr", "add", f"{address}/24", "dev", "eth0")
    run("ip", "-n", namespace, "link", "set", "eth0", "up")
    # A second network with only this host in it, which would be the wrong choice.
    unplugged = f"unplugged-{letter}"
    run("ip", "-n", namespace, "link", "add", "aaa0", "type", "veth", "peer", unplugged)
    run("ip", "-n", namespace, "link", "set", unplugged, "up")
    run("ip", "-n", namespace, "addr", "add", f"10.88.{number}.1/24", "dev", "aaa0")
    run("ip", "-n", namespace, "link", "set", "aaa0", "up")
    return Host(f"node-{letter}", namespace, address, plug, switch)


def _sshd(stack: ExitStack, host: Host, folder: Path, port: int, before: str) -> None:
    config = folder / f"sshd-{host.name}-{port}"
    config.write_text(SSHD.format(port=port, address=host.address, folder=folder))
    serve = f"/usr/sbin/sshd -D -e -f {config}"
    script = f"{before} && exec {serve}" if before else f"exec {serve}"
    words = ["unshare", "--mount", "sh", "-c", script]
    process = host.start(*words, log=folder / f"{config.name}.log")
    stack.callback(_end, host, process)


def _end(host: Host, process: subprocess.Popen[bytes]) -> None:
    """End an sshd and the sessions that it serves."""
    try:
        family = psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        family = []
    process.terminate()
    for child in family:
        with suppress(psutil.NoSuchProcess):
            child.kill()
    process.wait(timeout=20)


if __name__ == "__main__":
    sys.exit("this is a helper module; run python -m tests.cluster.two_hosts")
