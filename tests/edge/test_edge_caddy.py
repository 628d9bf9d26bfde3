"""The real Caddy: its process, its headers, what a swap and a reload do to requests under way."""

from __future__ import annotations

import base64
import json
import os
import signal
import socket
import stat
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from minipaas.edge import Route
from minipaas.edge.caddy import CaddyEdge
from minipaas.errors import EdgeError

pytestmark = pytest.mark.real


def told(answer):
    return json.loads(answer.body)


# -- the process -------------------------------------------------------------------------------------------------------


def test_another_object_adopts_the_running_caddy(caddy, place, upstream):
    caddy.apply([Route("a", ("a.test",), (upstream().address,))])
    again = place.edge()
    again.start()
    assert again._pid() == caddy._pid()
    assert place.send("a.test").status == 200


def test_a_killed_caddy_is_started_anew_and_takes_its_routes(caddy, place, upstream):
    route = Route("a", ("a.test",), (upstream().address,))
    caddy.apply([route])
    os.kill(caddy._pid(), signal.SIGKILL)
    caddy._process.wait()
    caddy.start()
    assert place.send("a.test").status == 503
    caddy.apply([route])
    assert place.send("a.test").status == 200


def test_a_stopped_caddy_leaves_no_process_and_no_socket(caddy, place):
    pid = caddy._pid()
    caddy.stop()
    assert not Path(f"/proc/{pid}").exists()
    assert list(place.run_dir.glob("*.sock")) == []


def test_only_the_owner_may_use_the_admin_socket(caddy, place):
    mode = (place.run_dir / "caddy-admin.sock").stat().st_mode
    assert stat.S_IMODE(mode) == 0o600


def test_a_port_in_use_is_named_with_its_holder(place):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", place.port))
        taken.listen()
        with pytest.raises(EdgeError, match=rf"127.0.0.1:{place.port}: .*process {os.getpid()}.*another port"):
            place.edge().start()


def test_a_second_caddy_does_not_share_the_port_in_silence(caddy, place, tmp_path):
    with pytest.raises(EdgeError, match="caddy"):
        CaddyEdge(tmp_path / "data", place.run_dir / "other", ("127.0.0.1", place.port)).start()


def test_a_caddy_that_cannot_run_says_why(place, tmp_path):
    broken = tmp_path / "caddy"
    broken.write_text("#!/bin/sh\necho no luck today >&2\nexit 1\n")
    broken.chmod(0o755)
    with pytest.raises(EdgeError, match="no luck today"):
        CaddyEdge(place.data_dir, place.run_dir, ("127.0.0.1", place.port), executable=broken).start()


def test_a_run_directory_too_deep_for_sockets_is_refused(tmp_path):
    with pytest.raises(EdgeError, match="too long for a socket"):
        CaddyEdge(tmp_path, tmp_path / ("x" * 100))


def test_a_host_of_two_apps_is_refused(caddy):
    with pytest.raises(EdgeError, match="belongs to both a and b"):
        caddy.apply([Route("a", ("x.test",), ()), Route("b", ("X.test",), ())])


# -- configuration -----------------------------------------------------------------------------------------------------


def test_two_hundred_routes_are_applied_within_a_second_and_a_second_time_nothing_changes(caddy, place, upstream):
    address = upstream().address
    routes = [Route(f"app{n}", (f"app{n}.test",), (address,)) for n in range(200)]
    began = time.monotonic()
    caddy.apply(routes)
    assert time.monotonic() - began < 1.0
    before = caddy._admin("GET", "/config/"), {p: p.stat().st_mtime_ns for p in (place.run_dir / "upstreams").iterdir()}
    reloads = _reloads(caddy)
    caddy.apply(routes)
    assert _reloads(caddy) == reloads
    after = caddy._admin("GET", "/config/"), {p: p.stat().st_mtime_ns for p in (place.run_dir / "upstreams").iterdir()}
    assert after == before
    assert place.send("app199.test").status == 200


def test_a_swap_needs_no_reload(caddy, upstream):
    old, new = upstream("old"), upstream("new")
    caddy.apply([Route("a", ("a.test",), (old.address,))])
    reloads = _reloads(caddy)
    for route in (
        Route("a", ("a.test",), (old.address,), held=True),
        Route("a", ("a.test",), (new.address,)),
        Route("a", ("a.test",), ()),
    ):
        caddy.apply([route])
    assert _reloads(caddy) == reloads


def _reloads(caddy: CaddyEdge) -> float:
    """When Caddy last loaded a configuration, in its own metrics."""
    connection = caddy._connect()
    connection.request("GET", "/metrics")
    lines = connection.getresponse().read().decode().splitlines()
    connection.close()
    requests = [line for line in lines if line.startswith("caddy_admin_http_requests_total") and '"/load"' in line]
    return sum(float(line.rpartition(" ")[2]) for line in requests)


# -- what the app sees -------------------------------------------------------------------------------------------------

LIES = {
    "Fly-Client-IP": "6.6.6.6",
    "Fly-Anything": "x",
    "X-Forwarded-For": "6.6.6.6",
    "X-Forwarded-Proto": "https",
    "X-Forwarded-Port": "1",
    "X-Real-IP": "6.6.6.6",
    "X-Request-Id": "mine",
    "Minipaas-Hops": "x",
}


def _headers_are_honest(headers, place):
    headers = {name.lower(): value for name, value in headers.items()}
    assert headers["fly-client-ip"] == headers["x-forwarded-for"] == "127.0.0.1"
    assert headers["fly-forwarded-port"] == headers["x-forwarded-port"] == str(place.port)
    assert headers["fly-request-id"] == headers["x-request-id"] != "mine"
    assert (headers["x-forwarded-proto"], headers["x-forwarded-host"], headers["host"]) == ("http", "a.test", "a.test")
    assert headers["via"].startswith("1.1 Caddy")
    assert not {"fly-anything", "x-real-ip", "minipaas-hops"} & set(headers)


def test_the_app_sees_who_asks_and_no_lies(caddy, place, upstream):
    caddy.apply([Route("a", ("a.test",), (upstream().address,))])
    _headers_are_honest(told(place.send("a.test", headers=LIES))["headers"], place)


def test_a_request_that_a_reload_moved_while_it_was_held_shows_the_same_headers(
    caddy, place, upstream, in_background, until
):
    app = upstream()
    held = Route("a", ("a.test",), (app.address,), held=True)
    caddy.apply([held])
    answers = in_background(lambda: place.send("a.test", "POST", "/", b"x" * 500_000, headers=LIES))
    _until_waiting(caddy, place, until)
    for n in range(3):
        caddy.apply([held, Route("b", (f"b{n}.test",), ())])
    caddy.apply([Route("a", ("a.test",), (app.address,))])
    until(lambda: bool(answers))
    assert (answers[0].status, told(answers[0])["size"]) == (200, 500_000)
    _headers_are_honest(told(answers[0])["headers"], place)


def _until_waiting(caddy, place, until):
    """The held request has arrived: Caddy has an accepted connection on its port."""
    port, wanted = f":{place.port:04X}", "01"

    def connected():
        rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
        return any(row[1].endswith(port) and row[3] == wanted for row in rows)

    until(connected)


@pytest.mark.slow
def test_many_held_requests_outlive_many_reloads(caddy, place, upstream, until):
    app = upstream()
    held = Route("a", ("a.test",), (app.address,), held=True)
    caddy.apply([held])
    with ThreadPoolExecutor(20) as pool:
        answers = [pool.submit(place.send, "a.test", "POST", f"/{n}", b"x" * 1000) for n in range(20)]
        _until_waiting(caddy, place, until)
        for n in range(10):
            caddy.apply([held, Route("b", (f"b{n}.test",), ())])
        caddy.apply([Route("a", ("a.test",), (app.address,))])
        assert [answer.result().status for answer in answers] == [200] * 20
    assert sorted(app.seen) == sorted(f"/{n}" for n in range(20))


def test_a_websocket_passes_and_outlives_a_reload(caddy, place):
    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=_serve_echo_after_upgrade, args=(server,), daemon=True).start()
        route = Route("a", ("a.test",), (f"127.0.0.1:{server.getsockname()[1]}",))
        caddy.apply([route])
        with socket.create_connection(("127.0.0.1", place.port), timeout=10) as client:
            key = base64.b64encode(bytes(16)).decode()
            client.sendall(
                f"GET / HTTP/1.1\r\nHost: a.test\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
                f"Sec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n\r\n".encode()
            )
            head = b""
            while b"\r\n\r\n" not in head:
                head += client.recv(4096)
            assert head.startswith(b"HTTP/1.1 101")
            client.sendall(b"one")
            assert _exactly(client, 3) == b"one"
            caddy.apply([route, Route("b", ("b.test",), ())])
            client.sendall(b"two")
            assert _exactly(client, 3) == b"two"


def _exactly(client: socket.socket, count: int) -> bytes:
    """So many bytes; a socket with a time-out may give them in pieces."""
    data = b""
    while len(data) < count and (more := client.recv(count - len(data))):
        data += more
    return data


def _serve_echo_after_upgrade(server: socket.socket) -> None:
    connection, _ = server.accept()
    with connection:
        connection.recv(4096)
        connection.sendall(b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
        while data := connection.recv(4096):
            connection.sendall(data)


def test_a_streamed_answer_arrives_as_it_is_written(caddy, place):
    more = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(4096)
                connection.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\none\r\n")
                more.wait(10)
                connection.sendall(b"3\r\ntwo\r\n0\r\n\r\n")

        threading.Thread(target=serve, daemon=True).start()
        caddy.apply([Route("a", ("a.test",), (f"127.0.0.1:{server.getsockname()[1]}",))])
        with socket.create_connection(("127.0.0.1", place.port), timeout=10) as client:
            client.sendall(b"GET / HTTP/1.1\r\nHost: a.test\r\nConnection: close\r\n\r\n")
            got = b""
            while b"one" not in got:
                got += client.recv(4096)
            assert b"two" not in got
            more.set()
            while chunk := client.recv(4096):
                got += chunk
            assert b"two" in got


def test_one_connection_serves_many_requests(caddy, place, upstream):
    caddy.apply([Route("a", ("a.test",), (upstream().address,))])
    with socket.create_connection(("127.0.0.1", place.port), timeout=10) as client:
        for _ in range(3):
            client.sendall(b"GET /gone HTTP/1.1\r\nHost: nobody.test\r\n\r\n")
            answer = b""
            while not answer.endswith(b"answers to nobody.test.\n"):
                answer += client.recv(4096)
            assert answer.startswith(b"HTTP/1.1 404")


# -- the swap ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_writes_across_a_swap_are_all_answered_exactly_once(caddy, place, upstream, until, record_property):
    old, route, ended = upstream("old"), ("a", ("a.test",)), threading.Event()
    caddy.apply([Route(*route, (old.address,))])
    with ThreadPoolExecutor(100) as pool:
        writes = []
        writing = pool.submit(_write_steadily, pool, place, writes, ended)
        until(lambda: len(old.seen) > 25)
        began = time.monotonic()
        caddy.apply([Route(*route, (old.address,), held=True)])
        until(lambda: caddy.in_flight(old.address) == 0)
        old.kill()
        sent = len(writes)
        until(lambda: len(writes) >= sent + 50)
        new = upstream("new")
        caddy.apply([Route(*route, (new.address,))])
        held_s = time.monotonic() - began
        until(lambda: len(new.seen) > 75)
        ended.set()
        writing.result()
        answers = [write.result() for write in writes]
    worst_s = max(seconds for _, _, seconds in answers)
    record_property("worst_wait_s", worst_s)
    print(f"{len(answers)} writes; held for {held_s:.3f} s, the longest write took {worst_s:.3f} s")
    assert {status for _, status, _ in answers} == {200}
    assert sorted(old.seen + new.seen) == sorted(path for path, _, _ in answers)
    assert worst_s < held_s + 0.5


def _write_steadily(pool, place, writes, ended):
    """50 requests a second, each on time whatever the others do, until it is enough."""
    while not ended.wait(0.02):
        writes.append(pool.submit(_timed_write, place, f"/{len(writes)}"))


def _timed_write(place, path):
    began = time.monotonic()
    answer = place.send("a.test", "POST", path, b"x" * 200)
    return path, answer.status, time.monotonic() - began
