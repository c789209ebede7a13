"""Hostfiles: what DeepSpeed would warn of, misread or pass on to pdsh is one clear error."""

from pathlib import Path

import pytest

from moa_dist.errors import ClusterError
from moa_dist.launch.hostfile import Host, read_hostfile, write_hostfile


def hostfile(folder: Path, text: str) -> Path:
    path = folder / "hosts"
    path.write_text(text)
    return path


def test_hosts_keep_their_order_and_comments_are_left_out(tmp_path):
    path = hostfile(tmp_path, "# all\nnode-2 slots=8\n\n  me@10.0.0.1   slots=4  # the small one\n")
    hosts = read_hostfile(path)
    assert hosts == [Host("node-2", 8), Host("me@10.0.0.1", 4)]
    write_hostfile(path, hosts)
    assert read_hostfile(path) == hosts


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "no host; write a line for each"),
        ("# none\n", "no host"),
        ("a slots=1\nb\n", "hosts:2: `b` is not `NAME slots=RANKS`; write `b slots=8`"),
        ("a slots=two\n", "`a slots=two` is not"),
        ("a slots=1 max_slots=2\n", "is not `NAME slots=RANKS`"),
        ("a slots=0\n", "no slots on `a`"),
        ("a slots=1\na slots=1\n", "hosts:2: `a` comes a second time"),
        ("node[1-3] slots=8\n", "`node[1-3]` is no host name"),
        ("a,b slots=8\n", "`a,b` is no host name"),
        ("a;reboot slots=8\n", "is no host name"),
        ("-oProxyCommand=x slots=1\n", "is no host name"),
    ],
)
def test_everything_wrong_is_said_with_its_line(tmp_path, text, problem):
    with pytest.raises(ClusterError) as error:
        read_hostfile(hostfile(tmp_path, text))
    assert problem in str(error.value)


def test_all_problems_are_said_at_once(tmp_path):
    with pytest.raises(ClusterError, match="2 wrong") as error:
        read_hostfile(hostfile(tmp_path, "a\nb slots=0\n"))
    assert "hosts:1" in str(error.value)
    assert "hosts:2" in str(error.value)


def test_missing_file_is_an_error(tmp_path):
    with pytest.raises(ClusterError, match="nowhere cannot be read: No such file"):
        read_hostfile(tmp_path / "nowhere")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ClusterError, match="it is not text"):
        read_hostfile(tmp_path / "binary")
