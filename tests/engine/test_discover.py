"""Which engine a node finds."""

from __future__ import annotations

import tempfile
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
