"""Nobody outside this machine can reach the processes of a job that runs on it alone."""

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
LOOPBACK = {"0100007F", "00000000000000000000000001000000"}


def listening() -> list[str]:
    """Addresses that this process listens on, as the kernel writes them."""
    sockets = set()
    for descriptor in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{descriptor}")
        except OSError:  # the one that listed them
            continue
        sockets.add(target.removeprefix("socket:[").removesuffix("]"))
    found = []
    for table in ("tcp", "tcp6"):
        lines = Path(f"/proc/self/net/{table}").read_text().splitlines()[1:]
        for address, state, inode in (
            (f[1].split(":")[0], f[3], f[9]) for f in map(str.split, lines)
        ):
            if state == "0A" and inode in sockets:
                found.append(address)
    return found


def test_ranks_listen_on_loopback_only(pools):
    first, second = pools(2).run(listening)
    assert first  # rank 0 has the store
    assert set(first) | set(second) <= LOOPBACK


ALONE = """
from moa_dist.distributed.start import init_distributed
from tests.distributed.test_store import LOOPBACK, listening
with init_distributed() as this_job:
    import torch.distributed as dist
    dist.barrier()
    found = listening()
assert found and set(found) <= LOOPBACK, found
"""


def test_one_rank_without_a_launcher_listens_on_loopback_only():
    subprocess.run([sys.executable, "-c", ALONE], cwd=ROOT, check=True, timeout=60)


TAKEN = """
import os, sys
from moa_dist.distributed.start import init_distributed
from moa_dist.errors import MoaDistError
try:
    with init_distributed():
        sys.exit("joined at a port that is taken")
except MoaDistError as error:
    assert os.environ["MASTER_PORT"] in str(error), error
"""


def test_a_taken_port_is_one_clear_error():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        environment = os.environ | {
            "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1",
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
        }  # fmt: skip
        subprocess.run(
            [sys.executable, "-c", TAKEN], cwd=ROOT, env=environment, check=True, timeout=60
        )
