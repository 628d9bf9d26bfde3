"""scripts/system-packages says what it is about to install, installs only what is missing, and fails in one clear line."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.real

SCRIPT = Path(__file__).parents[2] / "scripts" / "system-packages"
TOOLS = ("bash", "env", "mktemp", "rm", "tail", "sleep", "touch")


class Machine:
    """What commands there are is what is in one folder; an apt-get in it is made up."""

    def __init__(self, folder: Path) -> None:
        self._bin = folder / "bin"
        self._bin.mkdir()
        self.calls = folder / "calls"
        for tool in TOOLS:
            (self._bin / tool).symlink_to(shutil.which(tool) or tool)

    def has(self, name: str, script: str = "exit 0") -> None:
        path = self._bin / name
        path.write_text(f"#!/bin/bash\n{script}\n")
        path.chmod(0o755)

    def has_apt(self, install: str = "exit 0") -> None:
        self.has("apt-get", f'echo "$@" >>{self.calls}; [[ $1 == update ]] || {{ {install}; }}')

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["/bin/bash", str(SCRIPT), *arguments],
            env={"PATH": str(self._bin), "TMPDIR": str(self._bin.parent)},
            capture_output=True,
            text=True,
            check=False,
        )

    def installed(self) -> list[str]:
        """What the last call of apt-get was to install."""
        return [word for word in self.calls.read_text().splitlines()[-1].split() if not word.startswith(("-", "D"))][1:]


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_a_missing_engine_is_announced_before_it_is_installed(machine: Machine) -> None:
    machine.has_apt()
    done = machine.run("demo")
    assert done.returncode == 0
    assert (
        done.stdout.splitlines()[0]
        == "There is no container engine here, neither Podman nor Docker: installing Podman."
    )
    assert "podman" in machine.installed()
    assert "chromium" not in machine.installed()


def test_podman_is_installed_beside_docker_and_the_reason_is_given(machine: Machine) -> None:
    machine.has_apt()
    machine.has("docker")
    assert machine.run("demo").stdout.startswith("Docker is here, but each host of the demo needs an engine of its own")


def test_what_is_there_is_not_installed(machine: Machine) -> None:
    machine.has_apt()
    machine.has("podman")
    done = machine.run("demo")
    assert "engine here" not in done.stdout
    assert not machine.calls.exists() or "podman" not in machine.installed()


def test_without_apt_the_missing_packages_are_named(machine: Machine) -> None:
    done = machine.run("demo")
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert "no apt-get; install these" in done.stderr
    assert "podman" in done.stderr


def test_a_failure_is_tried_once_more_and_then_ends_with_the_reason(machine: Machine) -> None:
    machine.has_apt(install="echo 'E: no such mirror' >&2; exit 100")
    done = machine.run("demo")
    assert done.returncode == 1
    assert "trying once more" in done.stdout
    assert "E: no such mirror" in done.stderr
    assert "could not install" in done.stderr.splitlines()[-1]


def test_a_failure_that_passes_is_no_failure(machine: Machine, tmp_path: Path) -> None:
    mark = tmp_path / "tried"
    machine.has_apt(install=f"[[ -e {mark} ]] || {{ touch {mark}; exit 100; }}")
    assert machine.run("demo").returncode == 0


def test_another_word_than_demo_or_test_is_refused(machine: Machine) -> None:
    done = machine.run("all")
    assert done.returncode == 2
    assert done.stderr.startswith("usage: scripts/system-packages ")
