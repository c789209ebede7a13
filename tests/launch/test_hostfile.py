"""Hostfiles: what DeepSpeed would ignore, misread or pass on to pdsh is one clear error."""

from pathlib import Path

import pytest

from moa_dist.launch.hostfile import Host, HostfileError, read_hostfile, write_hostfile


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
    ("text", "line", "kind"),
    [
        ("", None, "empty"),
        ("# none\n", None, "empty"),
        ("a slots=1\nb\n", 2, "syntax"),
        ("a slots=two\n", 1, "syntax"),
        ("a slots=1 max_slots=2\n", 1, "syntax"),
        ("a slots=0\n", 1, "slots"),
        ("a slots=1\na slots=1\n", 2, "duplicate"),
        ("node[1-3] slots=8\n", 1, "name"),
        ("a,b slots=8\n", 1, "name"),
        ("a;reboot slots=8\n", 1, "name"),
        ("-oProxyCommand=x slots=1\n", 1, "name"),
    ],
)
def test_a_problem_is_reported_with_its_line(tmp_path, text, line, kind):
    path = hostfile(tmp_path, text)
    with pytest.raises(HostfileError) as error:
        read_hostfile(path)
    (problem,) = error.value.problems
    assert (problem.line, problem.kind) == (line, kind)
    assert (str(path) if line is None else f"{path}:{line}: ") in str(error.value)


def test_all_problems_are_reported_at_once(tmp_path):
    with pytest.raises(HostfileError) as error:
        read_hostfile(hostfile(tmp_path, "a\nb slots=0\n"))
    assert [(p.line, p.kind) for p in error.value.problems] == [(1, "syntax"), (2, "slots")]
    assert "hosts:1" in str(error.value)
    assert "hosts:2" in str(error.value)


def test_a_file_that_cannot_be_read_is_an_error(tmp_path):
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    for name in ("nowhere", "binary"):
        with pytest.raises(HostfileError) as error:
            read_hostfile(tmp_path / name)
        assert [p.kind for p in error.value.problems] == ["unreadable"]
        assert str(tmp_path / name) in str(error.value)
