"""What Prometheus is told: the table of metrics, a collector that reads them when it is asked, and the server behind ``addr``.

Owns the names. Keeps no figure of its own, and costs nothing between two scrapes; never changes what is replicated.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from socketserver import TCPServer
from typing import Any, Literal
from urllib.parse import urlsplit

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric, SummaryMetricFamily
from prometheus_client.exposition import choose_encoder

from replicator import __version__
from replicator.errors import UsageError
from replicator.peers import BoundedThreads, Handler, parse_address
from replicator.store.measure import Measurement, Meter
from replicator.values import printable
from replicator.worker import DatabaseStatus, Protection

Kind = Literal["gauge", "counter", "summary"]


@dataclass(frozen=True)
class Described:
    """A metric: its name as Prometheus shows it, its labels, and what it means."""

    name: str
    kind: Kind
    meaning: str
    labels: tuple[str, ...] = ("db",)


Value = float | tuple[int, float] | None
"""Of a summary: how often, and the sum. None: not known (yet), so that nothing is shown."""

_OF_DATABASE: tuple[tuple[Described, Callable[[DatabaseStatus], Value]], ...] = (
    (
        Described("replicator_protected", "gauge", "1 when a commit is in the store after the lag, 0 when it is not"),
        lambda status: float(status.protection is Protection.PROTECTED),
    ),
    (
        Described("replicator_catching_up", "gauge", "1 while a copy or a backlog is on its way"),
        lambda status: float(status.protection is Protection.CATCHING_UP),
    ),
    (
        Described("replicator_not_protected", "gauge", "1 when a person must act; `replicator status` says why"),
        lambda status: float(status.protection is Protection.NOT_PROTECTED),
    ),
    (
        Described(
            "replicator_lag_seconds",
            "gauge",
            "age of the oldest commit that is not in the store; when all are, how long the last one took",
        ),
        lambda status: status.lag_s,
    ),
    (
        Described("replicator_timeline", "gauge", "number of the timeline that is written"),
        lambda status: status.captured.timeline if status.captured else None,
    ),
    (
        Described("replicator_captured_txid", "gauge", "newest transaction that is on the local disk"),
        lambda status: status.captured.txid if status.captured else None,
    ),
    (
        Described("replicator_durable_txid", "gauge", "everything up to this transaction is in the store"),
        lambda status: status.durable.txid if status.durable else None,
    ),
    (
        Described("replicator_durable_timestamp_seconds", "gauge", "when that was committed, since 1970"),
        lambda status: status.durable_ms / 1000 if status.durable and status.durable_ms else None,
    ),
    (
        Described("replicator_database_bytes", "gauge", "size of the database"),
        lambda status: status.page_size * status.page_count,
    ),
    (
        Described("replicator_wal_bytes", "gauge", "size of its WAL"),
        lambda status: status.wal_bytes,
    ),
    (
        Described("replicator_spool_bytes", "gauge", "size of the segments that wait on the local disk for the store"),
        lambda status: status.waiting_bytes,
    ),
    (
        Described("replicator_spool_segments", "gauge", "how many segments wait there"),
        lambda status: status.waiting_segments,
    ),
    (
        Described("replicator_checkpoint_seconds", "summary", "checkpoints: how many, and how long they took in all"),
        lambda status: (status.checkpoints, status.checkpoints_s),
    ),
    (
        Described(
            "replicator_barrier_seconds", "summary", "how long no commit could happen at the end of a checkpoint"
        ),
        lambda status: (status.checkpoints, status.barriers_s),
    ),
    (
        Described("replicator_barrier_longest_seconds", "gauge", "the longest of these"),
        lambda status: status.barrier_s,
    ),
    (
        Described("replicator_checkpoint_blocked", "gauge", "1 while a reader keeps the WAL from being written back"),
        lambda status: float(status.checkpoint_blocked),
    ),
)

_STORE_LABELS = ("replica", "operation", "outcome")
_OF_STORE: tuple[tuple[Described, Callable[[Measurement], float]], ...] = (
    (
        Described("replicator_store_requests_total", "counter", "requests to the store, each try", _STORE_LABELS),
        lambda found: found.requests,
    ),
    (
        Described("replicator_store_sent_bytes_total", "counter", "content of the objects sent", _STORE_LABELS),
        lambda found: found.sent_bytes,
    ),
    (
        Described("replicator_store_received_bytes_total", "counter", "content of the objects received", _STORE_LABELS),
        lambda found: found.received_bytes,
    ),
    (
        Described("replicator_store_request_seconds_total", "counter", "what these requests took", _STORE_LABELS),
        lambda found: found.seconds,
    ),
)

_DRILL = Described(
    "replicator_restore_drill_age_seconds", "gauge", "since the last restore drill that succeeded; absent before it"
)
_BUILD = Described("replicator_build_info", "gauge", "always 1", ("version",))

METRICS: tuple[Described, ...] = (
    _BUILD,
    *(described for described, _ in _OF_DATABASE),
    _DRILL,
    *(described for described, _ in _OF_STORE),
)


def reference() -> str:
    """The table of docs/replicator.md, in Markdown."""
    rows = [f"| `{it.name}` | {it.kind} | {', '.join(it.labels)} | {it.meaning} |" for it in METRICS]
    return "\n".join(["| metric | kind | labels | meaning |", "| --- | --- | --- | --- |", *rows]) + "\n"


class Collector:
    """For a registry of prometheus_client: asks for everything anew at each scrape.

    statuses: of every database. meters: of the stores, by the URL of the replica.
    """

    def __init__(
        self,
        statuses: Callable[[], Iterable[DatabaseStatus]],
        meters: Callable[[], Mapping[str, Meter]] = dict,
        *,
        now_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000,
    ) -> None:
        self._statuses = statuses
        self._meters = meters
        self._now_ms = now_ms

    def collect(self) -> Iterator[Metric]:
        yield _family(_BUILD, [((__version__,), 1.0)])
        statuses = list(self._statuses())
        for described, value in _OF_DATABASE:
            yield _family(described, (((_label(status.path),), value(status)) for status in statuses))
        now_ms = self._now_ms()
        yield _family(_DRILL, (((_label(status.path),), _drill_age_s(status, now_ms)) for status in statuses))
        measured = [(url, each) for url, meter in self._meters().items() for each in meter.snapshot()]
        for described, total in _OF_STORE:
            yield _family(described, (((url, it.operation, it.outcome), total(it)) for url, it in measured))

    def describe(self) -> Iterable[Metric]:
        """Nothing: a registry then asks for no values when this is registered."""
        return ()


def _drill_age_s(status: DatabaseStatus, now_ms: int) -> float | None:
    trial = status.trial
    return (now_ms - trial.proved_ms) / 1000 if trial is not None and trial.proved_ms else None


def _family(described: Described, samples: Iterable[tuple[tuple[str, ...], Value]]) -> Metric:
    kinds = {"gauge": GaugeMetricFamily, "counter": CounterMetricFamily, "summary": SummaryMetricFamily}
    family: Any = kinds[described.kind](described.name, described.meaning, labels=described.labels)
    for labels, value in samples:
        if isinstance(value, tuple):
            family.add_metric(labels, count_value=value[0], sum_value=value[1])
        elif value is not None:
            family.add_metric(labels, value)
    assert isinstance(family, Metric)
    return family


def _label(path: Path) -> str:
    """A name that is no valid UTF-8 must not keep all others from being told."""
    return printable(str(path))


# -- the server --------------------------------------------------------------------------------------------------------


class MetricsServer:
    """Serves ``GET /metrics`` from ``start`` to ``close``."""

    def __init__(self, address: str, collector: Collector) -> None:
        """address: ``:9090``, ``127.0.0.1:9090``, ``[::1]:9090``. Raises UsageError when nothing can listen there."""
        host, port = parse_address(address)
        registry = CollectorRegistry(auto_describe=False)
        registry.register(collector)
        try:
            self._server = _Server(host, port, registry)
        except OSError as error:
            raise UsageError(f"addr: nothing can listen at {address}: {error.strerror}; give another") from error
        self._thread = threading.Thread(target=self._server.serve_until_closed, name="metrics", daemon=True)

    @property
    def port(self) -> int:
        return int(self._server.server_address[1])

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        self._server.closing.set()
        if self._thread.is_alive():
            with suppress(OSError):
                self._server.socket.shutdown(socket.SHUT_RDWR)  # wakes the thread
            self._thread.join()
        self._server.server_close()


class _Server(BoundedThreads, TCPServer):
    allow_reuse_address = True

    def __init__(self, host: str, port: int, registry: CollectorRegistry) -> None:
        self.registry = registry
        self.closing = threading.Event()
        both = not host and socket.has_dualstack_ipv6()
        self.address_family = socket.AF_INET6 if both or ":" in host else socket.AF_INET
        self._both = both
        super().__init__((host or ("::" if both else "0.0.0.0"), port), _Handler)

    def server_bind(self) -> None:
        if self._both:
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        super().server_bind()

    def serve_until_closed(self) -> None:
        while not self.closing.is_set():
            self.handle_request()


class _Handler(Handler):
    server: _Server

    def do_GET(self) -> None:
        if urlsplit(self.path).path != "/metrics":
            self.send(404, "text/plain; charset=utf-8", b"the metrics are at /metrics\n")
            return
        encode, kind = choose_encoder(self.headers.get("Accept", ""))
        self.send(200, kind, encode(self.server.registry))
