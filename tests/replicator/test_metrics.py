"""What Prometheus is told, that the docs have the table of it, and that a scraper that hangs holds up nobody."""

from __future__ import annotations

import dataclasses
import socket
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from replicator.errors import UsageError
from replicator.metrics import METRICS, Collector, MetricsServer, reference
from replicator.peers import parse_address
from replicator.store.measure import MeasuredStore, Meter
from replicator.store.memory import MemoryStore
from replicator.trials import TrialRecord
from replicator.values import Position
from replicator.worker import DatabaseStatus, Protection

DOCS = Path(__file__).parents[2] / "docs" / "replicator.md"
APP = DatabaseStatus(
    path=Path("/data/app.db"),
    url="s3://bucket/app",
    protection=Protection.CATCHING_UP,
    reason="2 segments wait for upload",
    lag_s=6.5,
    captured=Position(2, 9),
    durable=Position(2, 7),
    durable_ms=1_790_000_000_123,
    waiting_segments=2,
    waiting_bytes=512,
    wal_bytes=4152,
    page_size=4096,
    page_count=3,
    checkpoint_blocked=True,
    barrier_s=0.004,
    checkpoints=5,
    checkpoints_s=0.5,
    barriers_s=0.01,
    trial=TrialRecord("2:7", commit_ms=1_789_999_000_000, proved_ms=1_790_000_000_000, tried_ms=1_790_000_050_000),
)
UNKNOWN = dataclasses.replace(
    APP,
    path=Path("/data/\udcff.db"),
    captured=None,
    durable=None,
    durable_ms=0,
    trial=TrialRecord(tried_ms=1_790_000_050_000, problem="a segment is damaged"),
)


@pytest.fixture
def server() -> Iterator[MetricsServer]:
    meter = Meter()
    MeasuredStore(MemoryStore(), meter).put("a", b"12345")
    collector = Collector(
        lambda: [APP, UNKNOWN],
        lambda: {"s3://bucket/app": meter},
        now_ms=lambda: 1_790_000_060_000,
    )
    running = MetricsServer("127.0.0.1:0", collector)
    running.start()
    yield running
    running.close()


def scraped(server: MetricsServer, path: str = "/metrics") -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{server.port}{path}", timeout=5) as answer:
        return str(answer.read().decode())


def values(text: str) -> dict[tuple[str, ...], float]:
    """By name and labels, in the order of their names. The parser takes only what Prometheus would."""
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_a_scrape_has_the_figures_of_each_database_and_store(server: MetricsServer) -> None:
    found = values(scraped(server))
    db = "/data/app.db"
    assert found["replicator_catching_up", db] == 1
    assert found["replicator_protected", db] == found["replicator_not_protected", db] == 0
    assert found["replicator_lag_seconds", db] == 6.5
    assert (found["replicator_captured_txid", db], found["replicator_durable_txid", db]) == (9, 7)
    assert found["replicator_durable_timestamp_seconds", db] == 1_790_000_000.123
    assert found["replicator_database_bytes", db] == 3 * 4096
    assert (found["replicator_checkpoint_seconds_count", db], found["replicator_checkpoint_seconds_sum", db]) == (
        5,
        0.5,
    )
    assert found["replicator_barrier_seconds_sum", db] == 0.01
    assert found["replicator_restore_drill_age_seconds", db] == 60
    assert found["replicator_store_requests_total", "put", "ok", "s3://bucket/app"] == 1
    assert found["replicator_store_sent_bytes_total", "put", "ok", "s3://bucket/app"] == 5


def test_what_is_not_known_is_absent_and_a_name_that_is_no_utf8_spoils_nothing(server: MetricsServer) -> None:
    found = values(scraped(server))
    unknown = next(key[1] for key in found if key[0] == "replicator_lag_seconds" and key[1] != "/data/app.db")
    assert ("replicator_durable_txid", unknown) not in found
    assert ("replicator_restore_drill_age_seconds", unknown) not in found
    assert found["replicator_wal_bytes", unknown] == 4152


def test_the_table_names_what_a_scrape_has_and_the_docs_have_the_table(server: MetricsServer) -> None:
    families = {family.name: family for family in text_string_to_metric_families(scraped(server))}
    described = {each.name.removesuffix("_total"): each for each in METRICS}
    assert families.keys() == described.keys()
    assert {name: family.type for name, family in families.items()} == {n: it.kind for n, it in described.items()}
    assert reference() in DOCS.read_text("utf-8")


def test_openmetrics_is_spoken_to_who_asks_for_it(server: MetricsServer) -> None:
    request = urllib.request.Request(
        f"http://127.0.0.1:{server.port}/metrics", headers={"Accept": "application/openmetrics-text; version=1.0.0"}
    )
    with urllib.request.urlopen(request, timeout=5) as answer:
        assert answer.headers["Content-Type"].startswith("application/openmetrics-text")
        assert answer.read().endswith(b"# EOF\n")


def test_nothing_else_is_served(server: MetricsServer) -> None:
    with pytest.raises(urllib.error.HTTPError, match="404"):
        scraped(server, "/")


def test_a_scraper_that_hangs_holds_up_nobody(server: MetricsServer) -> None:
    with socket.create_connection(("127.0.0.1", server.port)) as hanging:
        hanging.sendall(b"GET /met")
        assert "replicator_build_info" in scraped(server)


def test_an_address_that_is_taken_is_refused_in_words(server: MetricsServer) -> None:
    with pytest.raises(UsageError, match=f"nothing can listen at 127.0.0.1:{server.port}: Address already in use"):
        MetricsServer(f"127.0.0.1:{server.port}", Collector(list))


def test_without_a_host_every_address_of_this_computer_answers() -> None:
    running = MetricsServer(":0", Collector(list))
    running.start()
    try:
        assert "replicator_build_info" in scraped(running)
    finally:
        running.close()


def test_a_server_that_was_never_started_can_be_closed() -> None:
    MetricsServer("127.0.0.1:0", Collector(list)).close()


@pytest.mark.parametrize(
    ("text", "parsed"),
    [(":9090", ("", 9090)), ("127.0.0.1:80", ("127.0.0.1", 80)), ("[::1]:9090", ("::1", 9090)), ("h:0", ("h", 0))],
)
def test_addresses(text: str, parsed: tuple[str, int]) -> None:
    assert parse_address(text) == parsed


@pytest.mark.parametrize("text", ["9090", "", ":", ":http", ":70000", "::1:9090", "http://h:1", "h:-1", ":٣"])
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(UsageError, match="is not an address; write :9090"):
        parse_address(text)
