"""Which interface gloo is given: the kernel's own answer on loopback, and made-up networks."""

import logging

import pytest
import torch

from tide_mega.parallel import groups
from tide_mega.parallel.device import Device
from tide_mega.parallel.groups import World, start_distributed
from tide_mega.parallel.interface import choose_interface, interface_of, source_address

ROUTES = {
    "head": "10.1.0.1",
    "head-as-itself": "127.0.1.1",
    "node2": "10.1.0.2",
    "v6": "fd00::2%eth1",
    "far": None,
}
HELD = {"10.1.0.1": "ib0", "10.1.0.2": "bond0", "fd00::2%eth1": "eth1", "127.0.1.1": "lo"}


def chosen(**environment):
    choose_interface(environment, source=ROUTES.__getitem__, interface=HELD.get)
    return environment.get("GLOO_SOCKET_IFNAME")


def test_the_kernel_is_asked_for_the_route_and_for_who_has_the_address():
    assert source_address("127.0.0.1") == "127.0.0.1"
    assert interface_of("127.0.0.1") == "lo"
    assert interface_of("203.0.113.7") is None
    assert source_address("no.such.host.invalid") is None


def test_the_interface_leads_to_the_first_node():
    assert chosen(MASTER_ADDR="head", TIDE_NODES="head node2") == "ib0"
    assert chosen(MASTER_ADDR="v6") == "eth1"


def test_a_first_node_that_knows_itself_as_loopback_takes_the_way_to_another():
    assert chosen(MASTER_ADDR="head-as-itself", TIDE_NODES="head-as-itself node2") == "bond0"


def test_what_is_given_is_kept():
    assert chosen(MASTER_ADDR="head", GLOO_SOCKET_IFNAME="eth9") == "eth9"


def test_where_nothing_leads_there_it_says_so_and_leaves_it_to_gloo(caplog):
    assert chosen(MASTER_ADDR="far") is None
    assert "no network interface leads to far: gloo chooses one; set TIDE_IFNAME" in caplog.text
    caplog.clear()
    assert chosen(MASTER_ADDR="far", LOCAL_RANK="3") is None and caplog.text == ""
    assert chosen() is None and caplog.text == ""


@pytest.mark.parametrize(("local_size", "asked"), [(2, []), (1, ["interface"])])
def test_processes_of_several_nodes_choose_before_they_meet(monkeypatch, caplog, local_size, asked):
    caplog.set_level(logging.INFO)
    steps = []
    monkeypatch.setenv("MASTER_ADDR", "10.1.0.1")
    monkeypatch.setenv("MASTER_PORT", "1")
    monkeypatch.setattr(groups, "choose_interface", lambda: steps.append("interface"))
    monkeypatch.setattr(groups.dist, "is_initialized", lambda: False)
    monkeypatch.setattr(groups.dist, "init_process_group", lambda *_, **__: steps.append("meet"))
    device = Device(torch.device("cpu"), "gloo", "cpu")
    start_distributed(device, World(0, 2, 0, local_size), timeout_minutes=1)
    assert steps == [*asked, "meet"]
