"""Chooses the network interface of gloo's sockets between nodes: the one that leads to the rendezvous.

By default gloo takes the interface to which the node's own name resolves, which on many systems is loopback.
NCCL is left alone: it prefers InfiniBand, and the route to the rendezvous may be a slow management network.
"""

import ipaddress
import logging
import os
import socket
from collections.abc import Callable, MutableMapping

import psutil

log = logging.getLogger(__name__)
_VARIABLE = "GLOO_SOCKET_IFNAME"


def source_address(host: str) -> str | None:
    """Return this machine's source address for packets to `host`; None if there is no route."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(address)  # makes the kernel look up the route; sends nothing
            return str(probe.getsockname()[0])
    except OSError:
        return None


def interface_of(address: str) -> str | None:
    """Return the network interface with the given address."""
    for name, held in psutil.net_if_addrs().items():
        if any(entry.address.partition("%")[0] == address for entry in held):
            return name
    return None


def choose_interface(
    environment: MutableMapping[str, str] = os.environ,
    *,
    source: Callable[[str], str | None] = source_address,
    interface: Callable[[str], str | None] = interface_of,
) -> None:
    """Set GLOO_SOCKET_IFNAME for processes on several nodes, unless it is already set.

    The first node's own name may resolve to a loopback address, so it uses the route to another node, one of those
    listed in TIDE_NODES. If no route is found, gloo chooses.
    """
    if environment.get(_VARIABLE) or "MASTER_ADDR" not in environment:
        return
    for host in [environment["MASTER_ADDR"], *environment.get("TIDE_NODES", "").split()]:
        address = source(host)
        if address is None or ipaddress.ip_address(address.partition("%")[0]).is_loopback:
            continue
        if name := interface(address):
            environment[_VARIABLE] = name
            log.info("gloo's sockets use %s, which leads to %s", name, host)
            return
    level = logging.WARNING if environment.get("LOCAL_RANK", "0") == "0" else logging.DEBUG
    log.log(
        level,
        "no network interface leads to %s: gloo chooses one; set TIDE_IFNAME or GLOO_SOCKET_IFNAME if the "
        "processes do not find each other",
        environment["MASTER_ADDR"],
    )
