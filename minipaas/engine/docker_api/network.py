"""The network that a node's containers share. Makes it, and never removes it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from ipaddress import IPv4Network
from itertools import islice
from typing import Any

import docker
import docker.auth
import docker.errors
import docker.types
import docker.utils

from minipaas.engine.docker_api.connection import NODE_LABEL, Connection, one_line, translated
from minipaas.engine.subnet import candidates, host_routes
from minipaas.errors import (
    EngineError,
)

NETWORK = "minipaas"
NETWORK_LABEL = "minipaas.network"


def ensure_network(connection: Connection, node: str) -> None:
    """Make the network if it is not there. Raises EngineError when its name is taken or no subnet is free."""
    with translated(f"make the network {NETWORK}"):
        known = connection.api.networks()
        if _has_network(known):
            return
        refusal = "every subnet is taken"
        for subnet in islice(candidates(node, host_routes() + _subnets(known)), 20):
            try:
                _create_network(connection, node, subnet)
                return
            except docker.errors.APIError as error:
                refusal = one_line(error)
            if _has_network(connection.api.networks()):
                return
    raise EngineError(f"cannot make the network {NETWORK}: {refusal}")


def _has_network(known: Sequence[Mapping[str, Any]]) -> bool:
    named = next((each for each in known if each["Name"] == NETWORK), None)
    if named is not None and NETWORK_LABEL not in (named.get("Labels") or {}):
        raise EngineError(f"the engine has a network named {NETWORK} that is not minipaas's; remove or rename it")
    return named is not None


def _subnets(networks: Sequence[Mapping[str, Any]]) -> list[IPv4Network]:
    configs = [config for each in networks for config in (each.get("IPAM") or {}).get("Config") or ()]
    return [IPv4Network(each["Subnet"], strict=False) for each in configs if "." in each.get("Subnet", "")]


def _create_network(connection: Connection, node: str, subnet: IPv4Network) -> None:
    """The bridge is named after the node, as two nodes on one host would else choose the same name.

    Podman is asked through its own API, as only that can leave out its DNS server, which is one more process to lose.
    """
    labels = {NETWORK_LABEL: "1", NODE_LABEL: node}
    bridge = f"mp-{node[:8]}"
    if not connection.is_podman:
        ipam = docker.types.IPAMConfig(pool_configs=[docker.types.IPAMPool(subnet=str(subnet))])
        options = {"com.docker.network.bridge.name": bridge}
        connection.api.create_network(NETWORK, driver="bridge", ipam=ipam, labels=labels, options=options)
        return
    body = {
        "name": NETWORK,
        "driver": "bridge",
        "network_interface": bridge,
        "subnets": [{"subnet": str(subnet)}],
        "dns_enabled": False,
        "labels": labels,
    }
    connection.libpod("POST", "/networks/create", json=body)
