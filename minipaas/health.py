"""Is an app ready: TCP and HTTP checks against a container's address, and words for what is wrong.

Owns what passes and what does not. Never decides what follows from it.
"""

from __future__ import annotations

import http.client
import io
import re
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

REFUSED = "nothing listens on port"


@dataclass(frozen=True)
class Probe:
    """One check, ready to be made. kind: tcp or http. headers: sent with an HTTP check."""

    kind: str
    port: int
    path: str = "/"
    method: str = "GET"
    timeout_s: float = 2.0
    grace_s: float = 0.0
    headers: tuple[tuple[str, str], ...] = ()


class Prober(Protocol):
    def probe(self, address: str, probe: Probe) -> str:
        """'' when it passes, else why not, in words."""
        ...


class SocketProber:
    """Over the network. HTTP passes with 200 to 299; a redirect is not followed and does not pass, as on fly. No body is read."""

    def probe(self, address: str, probe: Probe) -> str:
        try:
            if probe.kind == "tcp":
                with socket.create_connection((address, probe.port), timeout=probe.timeout_s):
                    return ""
            return self._http(address, probe)
        except TimeoutError:
            return f"no answer on port {probe.port} within {probe.timeout_s:g} s"
        except ConnectionRefusedError:
            return f"{REFUSED} {probe.port}"
        except (OSError, http.client.HTTPException) as error:
            return f"port {probe.port}: {str(error) or type(error).__name__}"

    def _http(self, address: str, probe: Probe) -> str:
        deadline = time.monotonic() + probe.timeout_s
        connection = http.client.HTTPConnection(address, probe.port, timeout=probe.timeout_s)
        try:
            connection.request(probe.method, probe.path, headers=dict(probe.headers))
            answer = cast(socket.socket, _Hasty(connection.sock, deadline))
            with http.client.HTTPResponse(answer, method=probe.method) as response:
                response.begin()
                status = response.status
        finally:
            connection.close()
        return "" if 200 <= status < 300 else f"{probe.method} {probe.path} gave {status}"


class _Hasty(io.RawIOBase):
    """What a socket gives until a deadline; the time-out of the socket itself begins anew with every byte. For ``HTTPResponse``."""

    def __init__(self, sock: socket.socket, deadline: float) -> None:
        self._socket, self._deadline = sock, deadline

    def makefile(self, mode: str) -> io.BufferedReader:
        return io.BufferedReader(self)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self._socket.settimeout(left)
        return self._socket.recv_into(buffer)


def first_failure(prober: Prober, address: str, probes: Sequence[Probe]) -> str:
    """'' when all pass."""
    for probe in probes:
        if words := prober.probe(address, probe):
            return words
    return ""


@dataclass(frozen=True, order=True)
class Listener:
    """A TCP socket that listens. loopback: only processes in the same container reach it."""

    port: int
    loopback: bool


def listeners(proc_net_tcp: str) -> frozenset[Listener]:
    """Of the text of /proc/net/tcp and /proc/net/tcp6, in any order; other lines are skipped.

    Source: Documentation/networking/proc_net_tcp.rst; state 0A is LISTEN, addresses are host-endian words in hex.
    """
    found = set()
    for address, port, state in re.findall(
        r"^\s*\d+: ([0-9A-F]+):([0-9A-F]{4}) [0-9A-F]+:[0-9A-F]{4} ([0-9A-F]{2})", proc_net_tcp, re.M
    ):
        if state == "0A":
            found.add(Listener(int(port, 16), _is_loopback(address)))
    return frozenset(found)


def _is_loopback(address: str) -> bool:
    mapped = len(address) == 32 and address.startswith("0000000000000000FFFF0000")
    last = address[-8:] if mapped or len(address) == 8 else ""
    return last.endswith("7F") or address == "00000000000000000000000001000000"


def explain(words: str, port: int, found: frozenset[Listener] | None) -> str:
    """Better words for a check that failed, given what listens in the container; None when that is not known."""
    answered = not words.startswith(REFUSED)
    if answered or found is None or any(each.port == port and not each.loopback for each in found):
        return words
    if any(each.port == port for each in found):
        return f"it listens on 127.0.0.1:{port} only, where the edge cannot reach it; listen on 0.0.0.0:{port}"
    others = sorted({each.port for each in found if not each.loopback})
    if others:
        listed = ", ".join(map(str, others))
        return f"it listens on port {listed}, not on {port}; set internal_port = {others[0]}, or listen on $PORT"
    return f"it listens on no port; expected {port} (internal_port), which is also in $PORT"
