"""What a node costs while nothing happens: requests to the bucket, processor, memory."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from support.faultproxy import FaultProxy
from support.node import Node, processes_of, wait_for
from support.seaweed import SeaweedServer

pytestmark = [pytest.mark.real, pytest.mark.slow, pytest.mark.timeout(240)]

IDLE_S = 12.0
MEMORY_MB = 200.0
"""Together, private memory and their share of what they share: serve about 80, Caddy and Podman's service about 45 each."""


def ours(node: Node) -> dict[int, str]:
    """The node's processes: serve, the edge, the engine's service and the monitors of containers; not the apps themselves."""
    assert node.process is not None
    found = {
        pid: line.split()[0].rpartition("/")[2] for root in (node.data, node.run) for pid, line in processes_of(root)
    }
    return {**found, node.process.pid: "serve"}


def cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def memory_mb(pid: int) -> float:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1024


def measured(node: Node, what: Callable[[int], float]) -> dict[str, float]:
    """By name of the program; those of one name together."""
    sums: dict[str, float] = {}
    for pid, name in ours(node).items():
        sums[name] = sums.get(name, 0.0) + what(pid)
    return sums


def test_an_idle_node_asks_the_bucket_for_nothing_but_its_lease_and_needs_little(
    node: Node, seaweed: SeaweedServer, record_property: Callable[[str, object], None]
) -> None:
    assert node.deploy().returncode == 0
    wait_for(lambda: node.protection().get("guestbook.db", ("", ""))[0].startswith("protected"), 20, "protected")
    assert node.stop() == 0
    with FaultProxy(seaweed.endpoint) as proxy:
        settings = node.data / "node.toml"
        settings.write_text(settings.read_text().replace(seaweed.endpoint, proxy.endpoint))
        node.start()
        node.settled()
        time.sleep(5)
        proxy.clear_log()
        before = measured(node, cpu_s)
        time.sleep(IDLE_S)
        after = measured(node, cpu_s)
        asked = [(entry.method, entry.path) for entry in proxy.log if "lease.json" not in entry.path]
        memory = measured(node, memory_mb)
        used = {name: (after[name] - before.get(name, 0.0)) / IDLE_S for name in after}
        record_property("idle_memory_mb", memory)
        record_property("idle_cpu_share", used)
        print(f"idle: memory MB {memory}, share of one core {used}")
        node.end()
    assert asked == []
    assert sum(memory.values()) < MEMORY_MB, memory
    assert sum(used.values()) < 0.05, used
