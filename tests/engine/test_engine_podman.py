"""What only a real engine shows: processes, logs, networks, builds, and what survives whom."""

from __future__ import annotations

import os
import re
import signal
import threading
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest

from minipaas import bundle
from minipaas.engine import Container, ContainerSpec, Mount
from minipaas.engine.docker_api import DockerEngine
from minipaas.engine.docker_api.abilities import Abilities
from minipaas.engine.docker_api.connection import Connection
from minipaas.engine.docker_api.containers import DockerContainers
from minipaas.engine.podman_service import PodmanService
from minipaas.errors import BuildFailed, EngineError, EngineUnavailable, ImageRefused, TimedOut
from replicator.store.memory import MemoryStore

pytestmark = pytest.mark.real


def wait_for(condition: Callable[[], bool], limit_s: float = 10.0) -> None:
    limit = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < limit, "not in time"
        time.sleep(0.02)


def shell(image: str, script: str, name: str = "real-1", **changes: object) -> ContainerSpec:
    return ContainerSpec(name=name, image=image, command=("/bin/sh", "-c", script), **changes)  # type: ignore[arg-type]


def state(engine: DockerEngine, name: str = "real-1") -> Container:
    return next(each for each in engine.containers.list() if each.name == name)


def texts(engine: DockerEngine, **how: object) -> list[tuple[str, str]]:
    return [(line.stream, line.text) for line in engine.containers.logs("real-1", **how)]  # type: ignore[arg-type]


def build(engine: DockerEngine, context: Path, lines: list[str], **how: object) -> str:
    given = {"tag": "localhost/test/built:1", "containerfile": "Containerfile", "args": {}, "target": None, **how}
    return engine.images.build(context, on_line=lines.append, **given)  # type: ignore[arg-type]


def test_a_follower_of_a_silent_container_is_let_go(podman: DockerEngine, busybox: str) -> None:
    podman.containers.run(shell(busybox, "echo hello; sleep 600"))
    gone = threading.Event()
    lines = podman.containers.logs("real-1", follow=True, gone=gone.is_set)
    assert next(lines).text == "hello"
    gone.set()
    assert list(lines) == []


def test_a_container_gets_its_environment_mounts_and_command(
    podman: DockerEngine, busybox: str, tmp_path: Path
) -> None:
    (tmp_path / "in").write_text("from the host")
    mounts = (Mount(tmp_path, "/data"), Mount(tmp_path, "/fixed", read_only=True))
    script = 'cat /data/in; echo; echo "$GREETING"; echo x > /data/out; echo x > /fixed/no || echo read-only'
    podman.containers.run(shell(busybox, script, env={"GREETING": "a=b c"}, mounts=mounts))
    out = [text for stream, text in texts(podman, follow=True) if stream == "stdout"]
    assert out == ["from the host", "a=b c", "read-only"]
    assert (tmp_path / "out").read_text() == "x\n"


def test_the_exit_code_of_a_process_that_ended_is_listed(podman: DockerEngine, busybox: str) -> None:
    podman.containers.run(shell(busybox, "exit 7"))
    wait_for(lambda: state(podman).state == "exited")
    assert state(podman).exit_code == 7


def test_a_command_that_does_not_exist_leaves_no_container(podman: DockerEngine, busybox: str) -> None:
    with pytest.raises(EngineError, match="/bin/nothing") as caught:
        podman.containers.run(ContainerSpec("real-1", busybox, command=("/bin/nothing",)))
    assert "\n" not in str(caught.value)
    assert podman.containers.list() == ()


def test_a_container_answers_on_its_address(podman: DockerEngine, busybox: str) -> None:
    script = "echo hello > /index.html; exec httpd -f -p 8080 -h /"
    started = podman.containers.run(shell(busybox, script))

    def answers() -> bool:
        try:
            with urllib.request.urlopen(f"http://{started.address}:8080/", timeout=1) as response:
                return bool(response.read() == b"hello\n")
        except OSError:
            return False

    wait_for(answers)


def test_stop_sends_the_stop_signal_of_the_container(podman: DockerEngine, busybox: str) -> None:
    script = "trap 'echo term; exit 4' TERM; echo ready; while :; do sleep 0.05; done"
    podman.containers.run(shell(busybox, script, stop_signal="SIGTERM", stop_timeout_s=10))
    wait_for(lambda: ("stdout", "ready") in texts(podman))
    podman.containers.stop("real-1")
    assert state(podman).exit_code == 4 and texts(podman)[-1] == ("stdout", "term")


def test_a_process_that_ignores_its_stop_signal_is_killed_when_its_time_is_up(
    podman: DockerEngine, busybox: str
) -> None:
    script = "trap '' INT; echo ready; while :; do sleep 0.05; done"
    podman.containers.run(shell(busybox, script, stop_timeout_s=1))
    wait_for(lambda: ("stdout", "ready") in texts(podman))
    started = time.monotonic()
    podman.containers.stop("real-1")
    assert 0.9 < time.monotonic() - started < 6
    assert state(podman).exit_code == 137


def test_remove_does_not_wait_for_the_stop_time(podman: DockerEngine, busybox: str) -> None:
    podman.containers.run(shell(busybox, "trap '' INT TERM; while :; do sleep 0.05; done", stop_timeout_s=60))
    started = time.monotonic()
    podman.containers.remove("real-1")
    assert time.monotonic() - started < 5 and podman.containers.list() == ()


def test_following_a_log_ends_with_the_container(podman: DockerEngine, busybox: str) -> None:
    podman.containers.run(shell(busybox, "echo a; echo b >&2; sleep 0.5; echo c"))
    assert sorted(texts(podman, follow=True)) == [("stderr", "b"), ("stdout", "a"), ("stdout", "c")]
    assert texts(podman, tail=1) == [("stdout", "c")]
    now_ms = time.time() * 1000
    assert all(abs(line.at_ms - now_ms) < 60_000 for line in podman.containers.logs("real-1"))


def test_the_last_lines_are_whole_however_they_were_printed(podman: DockerEngine, busybox: str) -> None:
    script = "for i in 1 2 3; do printf a; sleep 0.1; printf $i; sleep 0.1; echo; done; sleep 0.3; echo end"
    podman.containers.run(shell(busybox, script))
    wait_for(lambda: ("stdout", "a3") in texts(podman))
    assert texts(podman, tail=2, follow=True) == [("stdout", "a2"), ("stdout", "a3"), ("stdout", "end")]
    assert texts(podman, tail=2) == [("stdout", "a3"), ("stdout", "end")]
    assert texts(podman, tail=0) == []


def test_a_line_longer_than_the_engine_s_buffer_stays_one_line(podman: DockerEngine, busybox: str) -> None:
    podman.containers.run(shell(busybox, "head -c 50000 /dev/zero | tr '\\0' x; echo; echo end"))
    assert texts(podman, follow=True) == [("stdout", "x" * 50_000), ("stdout", "end")]


def test_exec_gives_both_streams_and_the_exit_code(podman: DockerEngine, busybox: str) -> None:
    podman.containers.run(shell(busybox, "sleep 60"))
    code, output = podman.containers.exec("real-1", ["/bin/sh", "-c", "echo out; echo err >&2; exit 3"], timeout_s=5)
    assert (code, sorted(output.split())) == (3, ["err", "out"])


def test_exec_that_takes_too_long_is_ended(podman: DockerEngine, busybox: str) -> None:
    podman.containers.run(shell(busybox, "sleep 60"))
    with pytest.raises(TimedOut, match="did not end in 0.5 s"):
        podman.containers.exec("real-1", ["/bin/sleep", "33"], timeout_s=0.5)
    processes = "cat /proc/[0-9]*/cmdline | tr '\\0' ' '"
    wait_for(lambda: "sleep 33" not in podman.containers.exec("real-1", ["/bin/sh", "-c", processes], timeout_s=5)[1])


def test_memory_and_processor_limits_reach_the_container(podman: DockerEngine, busybox: str) -> None:
    podman.containers.run(shell(busybox, "sleep 60", memory_mb=64, cpus=0.5))
    limits = Connection(podman.describe().rpartition(" ")[2]).api.inspect_container("real-1")["HostConfig"]
    assert (limits["Memory"], limits["NanoCpus"]) == (64 << 20, 500_000_000)


def test_limits_that_the_host_does_not_allow_are_lowered_until_it_does(
    podman_service: PodmanService, podman: DockerEngine, busybox: str
) -> None:
    too_high = Abilities(ulimits=(("nofile", 1 << 18), ("nproc", 1 << 18)))
    containers = DockerContainers(Connection(podman_service.url), "limits", None, too_high)
    try:
        assert containers.run(shell(busybox, "sleep 60", "limits-1")).state == "running"
    finally:
        containers.remove("limits-1")


def test_containers_of_another_node_are_neither_seen_nor_touched(
    podman_service: PodmanService, podman: DockerEngine, busybox: str, tmp_path: Path
) -> None:
    podman.containers.run(shell(busybox, "sleep 60"))
    other = DockerEngine(podman_service.url, node="other", scratch=tmp_path)
    assert other.containers.list() == ()
    for touch in (
        other.containers.stop,
        other.containers.remove,
        lambda name: other.containers.run(shell(busybox, "true", name)),
    ):
        with pytest.raises(EngineError, match="not made by this node"):
            touch("real-1")
    other.close()
    assert state(podman).state == "running"


def test_containers_outlive_the_service_and_list_brings_it_back(
    podman_service: PodmanService, podman: DockerEngine, busybox: str
) -> None:
    podman.containers.run(shell(busybox, "sleep 60"))
    pid = int((podman_service.socket.parent / "podman.pid").read_text().split()[0])
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: not podman_service.answers())
    assert state(podman).state == "running"
    assert podman_service.answers()


def test_listing_never_fails_while_containers_come_and_go(podman: DockerEngine, busybox: str) -> None:
    failures: list[Exception] = []
    done = threading.Event()

    def listing() -> None:
        while not done.is_set():
            try:
                podman.containers.list()
            except Exception as error:
                failures.append(error)

    watcher = threading.Thread(target=listing)
    watcher.start()
    try:
        for _ in range(4):
            podman.containers.run(shell(busybox, "sleep 60"))
            podman.containers.remove("real-1")
    finally:
        done.set()
        watcher.join()
    assert failures == []


@pytest.mark.slow
@pytest.mark.parametrize("delay_s", [0.01, 0.05, 0.09, 0.13])
def test_a_start_that_was_cut_by_the_death_of_the_engine_can_be_done_again(
    podman_service: PodmanService, podman: DockerEngine, busybox: str, delay_s: float
) -> None:
    pid = int((podman_service.socket.parent / "podman.pid").read_text().split()[0])
    death = threading.Timer(delay_s, os.kill, (pid, signal.SIGKILL))
    death.start()
    try:
        podman.containers.run(shell(busybox, "sleep 60"))
    except EngineError:
        pass
    death.join()
    wait_for(lambda: not podman_service.answers())
    if any(each.state == "running" for each in podman.containers.list()):
        podman.containers.remove("real-1")
    assert podman.containers.run(shell(busybox, "sleep 60")).state == "running"
    assert [each.name for each in podman.containers.list()] == ["real-1"]


def test_a_build_sends_the_directory_and_takes_arguments_and_target(
    podman: DockerEngine, busybox: str, tmp_path: Path
) -> None:
    (tmp_path / "Containerfile").write_text(
        f'ARG BASE\nFROM ${{BASE}} AS first\nARG WORD=none\nCOPY . /app/\nRUN echo "$WORD" > /app/word\n'
        f'CMD ["/bin/sh", "-c", "cat /app/word; ls /app"]\nFROM {busybox} AS second\nRUN false\n'
    )
    (tmp_path / "file").write_text("x")
    (tmp_path / "secret").write_text("x")
    (tmp_path / ".dockerignore").write_text("secret\n")
    lines: list[str] = []
    image_id = build(podman, tmp_path, lines, args={"BASE": busybox, "WORD": "hello"}, target="first")
    podman.containers.run(ContainerSpec("real-1", "localhost/test/built:1"))
    out = [text for _, text in texts(podman, follow=True)]
    assert out == ["hello", "Containerfile", "file", "word"]
    assert re.fullmatch(r"sha256:[0-9a-f]{64}", image_id) and any("COPY" in line for line in lines)


def test_a_build_that_fails_says_why_with_its_last_lines(podman: DockerEngine, busybox: str, tmp_path: Path) -> None:
    (tmp_path / "Containerfile").write_text(f"FROM {busybox}\nRUN echo about to fail && exit 9\n")
    with pytest.raises(BuildFailed, match="exit status 9") as caught:
        build(podman, tmp_path, [])
    assert any("about to fail" in line for line in caught.value.log)
    (tmp_path / "Containerfile").write_text("FROM localhost/none:1\n")
    with pytest.raises(BuildFailed, match="localhost/none"):
        build(podman, tmp_path, [])


def test_an_image_goes_through_the_bucket_and_runs_again(podman: DockerEngine, busybox: str, tmp_path: Path) -> None:
    (tmp_path / "Containerfile").write_text(f'FROM {busybox}\nCOPY note /note\nCMD ["/bin/cat", "/note"]\n')
    (tmp_path / "note").write_text("through the bucket\n")
    built = build(podman, tmp_path, [], tag="localhost/test/bundle:1")
    store = MemoryStore()
    digest = bundle.push(podman.images, "localhost/test/bundle:1", store, scratch=tmp_path / "scratch")
    podman.images.remove("localhost/test/bundle:1")
    assert not podman.images.exists("localhost/test/bundle:1")
    assert bundle.pull(store, digest, podman.images, "localhost/test/bundle:2", scratch=tmp_path / "scratch") == built
    podman.containers.run(ContainerSpec("real-1", "localhost/test/bundle:2"))
    assert texts(podman, follow=True) == [("stdout", "through the bucket")]
    assert bundle.push(podman.images, "localhost/test/bundle:2", store, scratch=tmp_path / "scratch") == digest


@pytest.mark.parametrize(
    ("reference", "kind", "words"),
    [
        ("::bad::", ImageRefused, "image '::bad::': this is no image reference; write REGISTRY/NAME:TAG"),
        ("UPPER/x", ImageRefused, "image 'UPPER/x': "),
        ("a b", ImageRefused, "image 'a b': this is no image reference"),
        ("a@sha256:1", ImageRefused, "this is no image reference"),
        (
            "no-such-short-name",
            ImageRefused,
            "it names no registry; write it in full, such as docker.io/library/NAME:TAG",
        ),
        ("127.0.0.1:1/x", EngineUnavailable, "image '127.0.0.1:1/x': its registry cannot be reached from the node"),
    ],
)
def test_an_image_that_cannot_be_had_is_explained_on_one_line(
    podman: DockerEngine, reference: str, kind: type[EngineError], words: str
) -> None:
    with pytest.raises(kind) as error:
        podman.images.pull(reference, tag="localhost/test/pulled:1", on_line=lambda line: None)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_two_services_on_one_host_share_nothing(
    podman: DockerEngine, busybox: str, busybox_tar: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("b")
    service = PodmanService(folder / "data", folder / "run")
    try:
        service.start()
        other = DockerEngine(service.url, node="b" * 16, scratch=folder)
        assert not other.images.exists(busybox)
        other.images.load(busybox_tar, tag=busybox)
        one = podman.containers.run(shell(busybox, "sleep 60"))
        two = other.containers.run(shell(busybox, "sleep 60"))
        assert one.address.rpartition(".")[0] != two.address.rpartition(".")[0]
        other.close()
    finally:
        service.wipe()
    assert state(podman).state == "running" and not (folder / "data" / "engine").exists()
