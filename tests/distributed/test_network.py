"""Which interface gloo and NCCL are told to use."""

import pytest

from moa_dist.distributed.network import choose_interfaces, host_name, is_loopback


def test_interface_of_the_route_to_rank_0_is_chosen():
    environment = {"MASTER_ADDR": "127.0.0.1"}
    words = choose_interfaces(environment)
    assert environment["GLOO_SOCKET_IFNAME"] == "lo"
    assert environment["NCCL_SOCKET_IFNAME"] == "=lo"
    assert "the route to 127.0.0.1" in words


def test_what_was_set_stays():
    environment = {"MASTER_ADDR": "127.0.0.1", "NCCL_SOCKET_IFNAME": "ib0"}
    words = choose_interfaces(environment)
    assert environment["NCCL_SOCKET_IFNAME"] == "ib0"
    assert "NCCL_SOCKET_IFNAME=ib0, as set" in words


def test_unknown_master_chooses_nothing():
    environment = {"MASTER_ADDR": "no-such-host.invalid"}
    assert "no interface chosen" in choose_interfaces(environment)
    assert list(environment) == ["MASTER_ADDR"]


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        *(("127.0.0.1", True), ("127.0.1.1", True), ("::1", True), ("localhost", True)),
        *(("10.0.0.1", False), ("node-1", False)),
    ],
)
def test_loopback_is_told_by_spelling(host, expected):
    assert is_loopback(host) == expected


def test_name_that_the_launcher_gave_comes_first(monkeypatch):
    monkeypatch.setenv("MOA_DIST_HOST", "node-7")
    assert host_name() == "node-7"
