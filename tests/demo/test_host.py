"""A Host is a machine: its containers can be reached, no other host sees them, and pulling the plug leaves nothing."""

from __future__ import annotations

import http.client
import os
import signal
import subprocess
import sys
import tarfile
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from demo.host import Host
from demo.lab import BRIDGE_PREFIX, LAB_ROOT, Lab, LabError, wait_until

pytestmark = pytest.mark.real

REPOSITORY = Path(__file__).parents[2]
ENGINE_SETTINGS = """\
[containers]
default_ulimits = ["nofile=10000:10000", "nproc=10000:10000"]
[engine]
runtime = "runc"
events_logger = "file"
cgroup_manager = "cgroupfs"
"""
FORWARD = """
import socket, sys, threading
def pump(a, b):
    while chunk := a.recv(65536):
        b.sendall(chunk)
    b.shutdown(socket.SHUT_WR)
with socket.create_server(("0.0.0.0", 80)) as door:
    print("listening", flush=True)
    while True:
        client, _ = door.accept()
        there = socket.create_connection((sys.argv[1], 8080))
        for pair in ((client, there), (there, client)):
            threading.Thread(target=pump, args=pair, daemon=True).start()
"""


class Podman:
    """An engine whose storage is on the disk of one host."""

    def __init__(self, host: Host) -> None:
        self._host = host
        (host.disk / "containers.conf").write_text(ENGINE_SETTINGS)

    def __call__(self, *arguments: str) -> str:
        data, run = Host.DATA, Host.RUN
        folders = ["--root", f"{data}/storage", "--runroot", f"{run}/storage", "--tmpdir", f"{run}/tmp"]
        command = ["podman", *folders, "--network-config-dir", f"{data}/networks", *arguments]
        return self._host.run(command, env={"CONTAINERS_CONF": str(LAB_ROOT / "containers.conf")}).stdout.strip()


@pytest.fixture
def lab() -> Iterator[Lab]:
    with Lab() as lab:
        yield lab


@pytest.fixture(scope="module")
def busybox_tar(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("image") / "busybox.tar"
    with tarfile.open(target, "w") as tar:
        tar.add("/bin/busybox", "bin/busybox")
        for applet in ("sh", "httpd", "mkdir", "echo"):
            link = tarfile.TarInfo(f"bin/{applet}")
            link.type, link.linkname = tarfile.SYMTYPE, "busybox"
            tar.addfile(link)
    return target


def get(address: str, port: int) -> bytes:
    connection = http.client.HTTPConnection(address, port, timeout=5)
    try:
        connection.request("GET", "/")
        return connection.getresponse().read()
    finally:
        connection.close()


def start_web_container(host: Host, busybox_tar: Path) -> str:
    """A container that serves a page and writes to its volume without end; its address."""
    podman = Podman(host)
    (host.disk / "busybox.tar").write_bytes(busybox_tar.read_bytes())
    (host.disk / "volume").mkdir()
    podman("import", str(LAB_ROOT / "busybox.tar"), "localhost/busybox:latest")
    podman("network", "create", "--disable-dns", "apps")
    script = "echo here >/index.html; httpd -p 8080 -h /; while :; do echo $((n+=1)) >>/volume/log; done"
    volume = f"{LAB_ROOT / 'volume'}:/volume"
    podman("run", "-d", "--name=web", "--network=apps", "-v", volume, "localhost/busybox:latest", "sh", "-c", script)
    return podman("inspect", "-f", "{{.NetworkSettings.Networks.apps.IPAddress}}", "web")


def traces(lab: Lab, container: str) -> list[str]:
    """What a host and its container have on this machine outside of processes and disk."""
    cables = [str(path) for path in Path("/sys/class/net").glob(f"{lab.bridge}-*")]
    return cables + [str(path) for path in Path("/sys/fs/cgroup").glob(f"**/libpod_parent/libpod-{container}")]


def test_a_container_is_reached_through_the_hosts_address_and_dies_with_the_host_while_it_writes(
    lab: Lab, busybox_tar: Path
) -> None:
    host = Host("a", region="ams", lab=lab)
    with host:
        inner = start_web_container(host, busybox_tar)
        container = Podman(host)("ps", "-q", "--no-trunc")
        assert len(traces(lab, container)) > 1
        proxy = host.popen([sys.executable, "-c", FORWARD, inner])
        assert proxy.stdout and proxy.stdout.readline() == b"listening\n"
        assert get(host.address, 80) == b"here\n"
        written = host.disk / "volume" / "log"
        assert wait_until(lambda: written.exists() and written.stat().st_size > 1000, 10)
        descriptor = os.open(written, os.O_RDONLY)

        host.power_off()

        size_bytes = os.fstat(descriptor).st_size
        assert proxy.poll() is not None or proxy.wait(5) != 0
        assert not host.disk.exists()
        assert os.fstat(descriptor).st_size == size_bytes
        os.close(descriptor)
        with pytest.raises(OSError):
            get(host.address, 80)
    assert traces(lab, container) == []


def test_nothing_of_one_host_is_seen_on_another(lab: Lab, busybox_tar: Path) -> None:
    with Host("a", lab=lab) as a, Host("b", lab=lab) as b:
        start_web_container(a, busybox_tar)
        podman = Podman(b)
        assert podman("ps", "-aq") == podman("images", "-q") == ""
        assert "httpd" not in b.run(["ps", "-eo", "comm"]).stdout
        assert b.run(["ls", "-A", Host.DATA]).stdout.split() == ["networks", "storage"]
        assert str(a.disk) not in b.run(["sh", "-c", "find /var/lib/minipaas-demo /run -maxdepth 2"]).stdout


def test_a_hosts_program_gets_signals_and_its_log_and_input(lab: Lab, tmp_path: Path) -> None:
    log = tmp_path / "log"
    script = "import signal; print(input(), flush=True); signal.sigwait({signal.SIGTERM}); print('bye')"
    code = f"import signal; signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM]); {script}"
    with Host("a", lab=lab) as host:
        program = host.popen([sys.executable, "-c", code], log=log, stdin=b"hello\n")
        assert wait_until(lambda: log.read_bytes() == b"hello\n", 10)
        program.terminate()
        assert program.wait(10) == 0
        assert log.read_bytes() == b"hello\nbye\n"


def test_what_listens_on_a_hosts_loopback_only_is_reached_from_inside_it(lab: Lab) -> None:
    listen = "import socket; door = socket.create_server(('127.0.0.1', 7070)); print('up', flush=True)"
    serve = f"{listen}; door.accept()[0].send(b'in')"
    with Host("a", lab=lab) as host, Host("b", lab=lab) as other:
        server = host.popen([sys.executable, "-c", serve])
        assert server.stdout and server.stdout.readline() == b"up\n"
        with pytest.raises(ConnectionRefusedError):
            other.connect(7070)
        with host.connect(7070) as connection:
            assert connection.recv(10) == b"in"


def test_a_host_that_was_off_comes_back_empty(lab: Lab) -> None:
    host = Host("a", lab=lab)
    for _ in range(2):
        with host:
            assert host.run(["ls", "-A", Host.DATA]).stdout == ""
            host.run(["touch", f"{Host.DATA}/file"])
    with pytest.raises(LabError, match="host a is off"):
        host.run(["true"])


def test_what_a_killed_lab_leaves_is_gone_with_the_next_one_and_a_living_lab_stays(lab: Lab) -> None:
    script = textwrap.dedent("""
        import time
        from demo.host import Host
        from demo.lab import Lab
        with Lab() as lab, Host("a", lab=lab) as host:
            host.popen(["sleep", "1000"])
            print(lab.token, host._init_pid, flush=True)
            time.sleep(1000)
    """)
    with Host("b", lab=lab) as living:
        maker = subprocess.Popen([sys.executable, "-c", script], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
        assert maker.stdout
        token, init = maker.stdout.readline().split()
        maker.send_signal(signal.SIGKILL)
        maker.communicate()
        assert wait_until(lambda: not Path("/proc", init).exists(), 10)
        with Lab() as other:
            assert other.gateway != lab.gateway
            assert not (LAB_ROOT / f"lab-{token}").exists()
            assert not Path("/sys/class/net", BRIDGE_PREFIX + token).exists()
            assert living.run(["hostname"]).stdout == "b\n"


def test_without_root_a_lab_says_so_in_one_line() -> None:
    done = subprocess.run(
        [
            "setpriv",
            "--reuid=65534",
            "--clear-groups",
            sys.executable,
            "-c",
            "import demo.lab as lab; lab.Lab().__enter__()",
        ],
        cwd=REPOSITORY,
        env={"PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "run it as root" in done.stderr.splitlines()[-1]
