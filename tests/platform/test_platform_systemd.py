"""Claims about the systemd unit: it names what exists, it fits what ``serve`` does at a stop, and systemd understands it."""

from __future__ import annotations

import configparser
import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
from click.testing import CliRunner

from minipaas import backups
from minipaas.cli import root
from minipaas.edge import caddy
from minipaas.engine import podman_service
from minipaas.errors import BadRequest, NotFound
from minipaas.settings import Limits, Settings, write_settings
from minipaas.systemd import STOP_TIMEOUT_S, unit

PYTHON = Path("/opt/minipaas/.venv/bin/python")
DATA = Path("/srv/my node")


def sections(text: str) -> Mapping[str, Mapping[str, str]]:
    parser = configparser.ConfigParser(interpolation=None, delimiters=("=",))
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read_string(text)
    return parser


def test_the_unit_starts_a_command_that_exists_with_options_that_exist() -> None:
    python, *arguments = shlex.split(sections(unit(PYTHON, DATA))["Service"]["ExecStart"])
    assert python == str(PYTHON)
    assert arguments[:3] == ["-P", "-m", "minipaas"]
    command = root.get_command(root.make_context("minipaas", [], resilient_parsing=True), arguments[3])
    assert command is not None
    assert command.make_context(arguments[3], arguments[4:]).params["data_dir"] == DATA


def test_apps_edge_and_engine_outlive_a_stop_of_the_unit() -> None:
    service = sections(unit(PYTHON, DATA))["Service"]
    assert service["KillMode"] == "process"
    assert service["Delegate"] == "yes"
    assert not set(service) & {"RuntimeDirectory", "PrivateTmp", "ProtectSystem", "ExecStopPost"}


def test_a_node_that_ends_is_started_again_for_ever() -> None:
    parsed = sections(unit(PYTHON, DATA))
    assert parsed["Service"]["Restart"] == "always"
    assert parsed["Unit"]["StartLimitIntervalSec"] == "0"
    assert "docker.service" in parsed["Unit"]["After"].split()


def test_a_stop_has_time_for_a_start_that_is_under_way_and_for_the_last_commits() -> None:
    limits = Limits()
    start_s = podman_service.START_S + caddy.START_TIMEOUT_S + backups.SHIPPING_PATIENCE_S
    stop_s = limits.stop_workers_s + 2 * limits.stop_sync_s
    assert start_s + stop_s < STOP_TIMEOUT_S
    assert sections(unit(PYTHON, DATA))["Service"]["TimeoutStopSec"] == str(STOP_TIMEOUT_S)


@pytest.mark.parametrize("name", ["50%", "$HOME", 'a"b', "a\\b", "a\nb"])
def test_a_path_that_systemd_would_read_otherwise_is_refused(name: str) -> None:
    with pytest.raises(BadRequest, match="cannot stand in a systemd unit"):
        unit(PYTHON, Path("/srv") / name)


def test_the_command_prints_the_unit_of_this_node(tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path, node_id="a" * 16, node="a", region="ams", bucket="s3://bucket/fleet")
    write_settings(settings)
    result = CliRunner().invoke(root, ["systemd-unit", "--data", str(tmp_path)], catch_exceptions=False)
    assert result.output == unit(Path(sys.executable), tmp_path)


def test_there_is_no_unit_for_a_directory_that_is_no_node(tmp_path: Path) -> None:
    result = CliRunner().invoke(root, ["systemd-unit", "--data", str(tmp_path)])
    assert isinstance(result.exception, NotFound)


@pytest.mark.real
def test_systemd_understands_the_unit(tmp_path: Path) -> None:
    """It warns of a key that it does not know and still succeeds, so that its silence is what counts."""
    path = tmp_path / "minipaas.service"
    path.write_text(unit(Path(sys.executable), DATA))
    checked = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", "--recursive-errors=no", str(path)],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert (checked.returncode, checked.stderr) == (0, "")
