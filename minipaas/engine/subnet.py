"""The addresses of a node's containers: a subnet that nothing on the host uses yet. Pure, but for reading the routes."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator
from ipaddress import IPv4Network
from pathlib import Path

# 10.201.0.0 to 10.219.255.255: away from what home routers, Docker, Podman, Kubernetes and common VPNs take.
_FIRST, _LAST = int(IPv4Network("10.201.0.0/24").network_address), int(IPv4Network("10.219.255.0/24").network_address)
_COUNT = (_LAST - _FIRST) // 256 + 1


def candidates(node: str, taken: Collection[IPv4Network]) -> Iterator[IPv4Network]:
    """Free /24 subnets, beginning at one that depends on the node's id, so that nodes of a fleet seldom share one."""
    start = int.from_bytes(hashlib.sha256(node.encode()).digest()[:4], "big")
    for step in range(_COUNT):
        subnet = IPv4Network((_FIRST + (start + step) % _COUNT * 256, 24))
        if not any(subnet.overlaps(each) for each in taken):
            yield subnet


def parse_routes(table: str) -> list[IPv4Network]:
    """Destinations in the text of /proc/net/route, without the default route."""
    found = []
    for line in table.splitlines()[1:]:
        fields = line.split()
        if len(fields) < 8:
            continue
        address, mask = (int.from_bytes(bytes.fromhex(each)[::-1], "big") for each in (fields[1], fields[7]))
        if mask:
            found.append(IPv4Network((address, mask.bit_count()), strict=False))
    return found


def host_routes() -> list[IPv4Network]:
    table = Path("/proc/net/route")
    return parse_routes(table.read_text()) if table.exists() else []
