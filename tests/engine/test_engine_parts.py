"""The pure parts of the adapter: log frames, subnets, settings, what a host cannot do."""

from __future__ import annotations

import io
import tomllib
from dataclasses import replace
from ipaddress import IPv4Network
from itertools import islice
from pathlib import Path

import pytest

from minipaas.engine import LogLine
from minipaas.engine.docker_api.abilities import Abilities
from minipaas.engine.frames import log_lines, parse_moment
from minipaas.engine.podman_service import Host, PodmanService, choose_runtime, containers_conf
from minipaas.engine.subnet import candidates, parse_routes
from minipaas.errors import EngineError, EngineMissing

HOST = Host("hybrid", False, ("crun", "runc"), (("nofile", 20000), ("nproc", 4096)), "", "netavark")


def frame(stream: int, payload: bytes) -> bytes:
    return bytes([stream, 0, 0, 0]) + len(payload).to_bytes(4, "big") + payload


def lines(*frames: bytes) -> list[LogLine]:
    return list(log_lines(io.BytesIO(b"".join(frames)).read))


def test_lines_keep_their_stream_and_time() -> None:
    got = lines(frame(1, b"1970-01-01T00:00:01.25Z out\n"), frame(2, b"1970-01-01T00:00:02.123456789Z err\n"))
    assert got == [LogLine(1250, "stdout", "out"), LogLine(2123, "stderr", "err")]


def test_a_long_line_in_several_frames_is_one_line() -> None:
    got = lines(
        frame(1, b"1970-01-01T00:00:01Z aaa"),
        frame(2, b"1970-01-01T00:00:01Z other\n"),
        frame(1, b"1970-01-01T00:00:02Z bbb\n"),
    )
    assert got == [LogLine(1000, "stderr", "other"), LogLine(1000, "stdout", "aaabbb")]


def test_a_last_line_without_newline_is_not_lost_and_a_cut_frame_is_dropped() -> None:
    whole = frame(1, b"1970-01-01T00:00:01Z end")
    assert lines(whole, frame(1, b"1970-01-01T00:00:01Z cut\n")[:-3]) == [LogLine(1000, "stdout", "end")]


@pytest.mark.parametrize(
    ("text", "ms"),
    [
        ("2026-11-24T08:27:06.861824396Z", 1795508826861),
        ("2026-11-24T08:27:06Z", 1795508826000),
        ("2026-11-24T10:27:06.5+02:00", 1795508826500),
        ("0001-01-01T00:00:00Z", None),
        ("yesterday", None),
        ("", None),
    ],
)
def test_moments_of_the_engine(text: str, ms: int | None) -> None:
    assert parse_moment(text) == ms


def test_a_subnet_that_something_uses_is_never_proposed() -> None:
    taken = [IPv4Network("10.200.0.0/13"), IPv4Network("10.208.0.0/16")]
    proposed = list(candidates("node", taken))
    assert proposed and not any(each.overlaps(other) for each in proposed for other in taken)
    assert list(candidates("node", [IPv4Network("10.0.0.0/8")])) == []


def test_nodes_begin_at_different_subnets_and_each_always_at_the_same() -> None:
    first = [next(candidates(f"node{number}", [])) for number in range(20)]
    assert len(set(first)) > 15
    assert list(islice(candidates("a", []), 3)) == list(islice(candidates("a", []), 3))


def test_routes_of_the_host_are_read_without_the_default() -> None:
    table = (
        "Iface\tDestination\tGateway\tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT\n"
        "eth0\t00000000\t010200C0\t0003\t0\t0\t0\t00000000\t0\t0\t0\n"
        "mp-1\t0007C90A\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\t0\t0\n"
    )
    assert parse_routes(table) == [IPv4Network("10.201.7.0/24")]


def test_the_runtime_fits_the_cgroups() -> None:
    assert choose_runtime("v2", ("crun", "runc")) == "crun"
    assert choose_runtime("hybrid", ("crun", "runc")) == "runc"
    assert choose_runtime("v1", ("crun",)) == "crun"
    with pytest.raises(EngineMissing, match="apt install runc"):
        choose_runtime("v2", ())


def test_settings_stay_below_the_host_s_limits() -> None:
    written = tomllib.loads(containers_conf(HOST))
    assert written["containers"]["default_ulimits"] == ["nofile=20000:20000", "nproc=4096:4096"]
    assert written["engine"]["runtime"] == "runc" and written["engine"]["cgroup_manager"] == "cgroupfs"
    assert written["network"]["network_backend"] == "netavark"
    assert tomllib.loads(containers_conf(replace(HOST, has_systemd=True)))["engine"]["cgroup_manager"] == "systemd"


def test_what_a_host_cannot_do_is_learnt_from_the_engine_s_words() -> None:
    first = Abilities()
    no_init = first.without("container-init binary not found on the host: stat /usr/libexec/podman/catatonit")
    assert no_init == Abilities(init=False)
    lowered = first.without("runc: error setting rlimit type 7: operation not permitted")
    assert lowered is not None and lowered.init and dict(lowered.ulimits)["nofile"] > 0
    again = lowered.without("crun: setrlimit `RLIMIT_NOFILE`: Operation not permitted")
    assert again is not None and dict(again.ulimits)["nofile"] == dict(lowered.ulimits)["nofile"] // 2
    assert first.without("no space left on device") is None
    assert Abilities(ulimits=(("nofile", 300),)).without("rlimit") is None


def test_a_run_directory_too_deep_for_a_socket_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="choose a shorter run directory"):
        PodmanService(tmp_path, tmp_path / ("x" * 100))
