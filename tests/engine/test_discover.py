"""Which engine a node finds."""

from __future__ import annotations

import json
import socketserver
import tempfile
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest

from minipaas.engine.discover import connect
from minipaas.engine.podman_service import PodmanService, answers
from minipaas.errors import EngineError, EngineMissing, EngineUnavailable


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DOCKER_HOST", "MINIPAAS_ENGINE", "XDG_RUNTIME_DIR"):
        monkeypatch.delenv(name, raising=False)


def test_a_named_engine_that_does_not_answer_is_an_error_and_no_other_is_taken(tmp_path: Path) -> None:
    with pytest.raises(EngineUnavailable, match="nothing.sock"):
        connect(data_dir=tmp_path, run_dir=tmp_path, node="n", engine_url=f"unix://{tmp_path}/nothing.sock")


def test_docker_host_names_the_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/other.sock")
    with pytest.raises(EngineUnavailable, match="other.sock"):
        connect(data_dir=tmp_path, run_dir=tmp_path, node="n")


def test_an_engine_that_was_asked_for_and_is_not_there_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MINIPAAS_ENGINE", "docker")
    with pytest.raises(EngineMissing, match="start Docker"):
        connect(data_dir=tmp_path, run_dir=tmp_path, node="n")
    monkeypatch.setenv("MINIPAAS_ENGINE", "lxc")
    with pytest.raises(EngineError, match="docker or podman"):
        connect(data_dir=tmp_path, run_dir=tmp_path, node="n")


@pytest.fixture
def docker() -> Iterator[str]:
    """The address of something that answers as an engine does, as far as it is asked here."""
    with tempfile.TemporaryDirectory(prefix="mp-") as folder:
        path = Path(folder) / "docker.sock"
        server = EngineServer(str(path), Answers)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield f"unix://{path}"
        server.shutdown()
        server.server_close()


class EngineServer(socketserver.ThreadingUnixStreamServer):
    daemon_threads = True


class Answers(BaseHTTPRequestHandler):
    def address_string(self) -> str:
        return ""

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        body = json.dumps({"ApiVersion": "1.41", "MinAPIVersion": "1.12", "Version": "27"}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def test_the_engine_that_was_used_is_remembered_and_another_is_never_taken_in_its_place(
    docker: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DOCKER_HOST", docker)
    connect(data_dir=tmp_path, run_dir=tmp_path, node="n").close()
    monkeypatch.delenv("DOCKER_HOST")
    assert connect(data_dir=tmp_path, run_dir=tmp_path, node="n").describe() == f"Docker 27 at {docker}"
    Path(docker.removeprefix("unix://")).unlink()
    with pytest.raises(EngineUnavailable, match="this node runs its apps on unix.*which is away.*engine.choice"):
        connect(data_dir=tmp_path, run_dir=tmp_path, node="n")
    assert not (tmp_path / "engine").exists()


def test_the_environment_does_not_move_a_node_to_another_engine(
    docker: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "engine.choice").write_text("podman\n")
    monkeypatch.setenv("DOCKER_HOST", docker)
    with pytest.raises(EngineError, match="DOCKER_HOST is unix.*but this node runs its apps on podman"):
        connect(data_dir=tmp_path, run_dir=tmp_path, node="n")
    monkeypatch.delenv("DOCKER_HOST")
    monkeypatch.setenv("MINIPAAS_ENGINE", "docker")
    with pytest.raises(EngineError, match="MINIPAAS_ENGINE is docker"):
        connect(data_dir=tmp_path, run_dir=tmp_path, node="n")


def test_an_engine_that_is_named_in_the_settings_is_taken_and_remembered(docker: str, tmp_path: Path) -> None:
    (tmp_path / "engine.choice").write_text("podman\n")
    connect(data_dir=tmp_path, run_dir=tmp_path, node="n", engine_url=docker).close()
    assert connect(data_dir=tmp_path, run_dir=tmp_path, node="n").describe().endswith(docker)


def test_a_socket_that_nobody_serves_does_not_answer(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert not answers(tmp_path / "file") and not answers(tmp_path / "missing")


@pytest.mark.real
def test_a_socket_that_answers_is_used(podman_service: PodmanService, tmp_path: Path) -> None:
    engine = connect(data_dir=tmp_path, run_dir=tmp_path, node="n", engine_url=podman_service.url)
    assert engine.describe().startswith("Podman") and engine.containers.list() == ()
    engine.close()


@pytest.mark.real
def test_with_only_the_executable_the_node_s_own_podman_is_started_and_found_again() -> None:
    with tempfile.TemporaryDirectory(prefix="mp-") as folder:
        data, run = Path(folder) / "data", Path(folder) / "run"
        try:
            first = connect(data_dir=data, run_dir=run, node="n")
            pid = (run / "podman.pid").read_text()
            second = connect(data_dir=data, run_dir=run, node="n")
            assert first.describe() == second.describe() and str(run) in first.describe()
            assert (run / "podman.pid").read_text() == pid
            first.close()
            second.close()
        finally:
            PodmanService(data, run).wipe()
        assert not data.joinpath("engine").exists() and not run.exists()
