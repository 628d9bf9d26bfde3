"""The command lines of minipaas that the demo types, all in one place. Values only: nothing is run here.

A host's data is in Host.DATA, what is in memory in Host.RUN; credentials travel in the environment, never in arguments.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path

from demo.host import Host
from images.make_base import TAG as BASE_TAG

REPOSITORY = Path(__file__).resolve().parent.parent
GUESTBOOK = REPOSITORY / "images" / "guestbook"
DOMAIN = "demo.test"
APP = "guestbook"
HOSTNAME = f"{APP}.{DOMAIN}"
HTTP_PORT = 80
API_PORT = 7070


@dataclass(frozen=True)
class Bucket:
    """url: with its endpoint, without credentials. endpoint: ADDRESS:PORT of the server."""

    url: str
    endpoint: str
    access_key: str
    secret_key: str = field(repr=False)

    @property
    def address(self) -> str:
        return self.endpoint.rpartition(":")[0]

    @property
    def port(self) -> int:
        return int(self.endpoint.rpartition(":")[2])

    @property
    def environment(self) -> dict[str, str]:
        return {"MINIPAAS_ACCESS_KEY": self.access_key, "MINIPAAS_SECRET_KEY": self.secret_key}


def environment(bucket: Bucket | None = None) -> dict[str, str]:
    """What every command of ours gets. PYTHONPATH: the demo runs from a clone that need not be installed."""
    folder = str(Path(sys.executable).parent)
    base = {
        "PATH": f"{folder}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "PYTHONPATH": str(REPOSITORY),
        "PYTHONUNBUFFERED": "1",
    }
    return base | (bucket.environment if bucket else {})


def minipaas(*arguments: str) -> list[str]:
    script = Path(sys.executable).with_name("minipaas")
    return [*([str(script)] if script.exists() else [sys.executable, "-m", "minipaas"]), *arguments]


def setup(host: Host, bucket: Bucket) -> list[str]:
    """Prints the recovery key, among others, as JSON."""
    return minipaas(
        "setup", "--data", Host.DATA, "--run", Host.RUN, "--bucket", bucket.url, "--name", host.name,
        "--region", host.region, "--domain", DOMAIN, "--http", f"0.0.0.0:{HTTP_PORT}", "--api", f"127.0.0.1:{API_PORT}", "--json",
    )  # fmt: skip


def serve() -> list[str]:
    return minipaas("serve", "--data", Host.DATA)


def load_image(archive: Path) -> list[str]:
    """Into the engine of the node, as a pull would do it: the archive carries the name BASE_TAG."""
    return ["podman", "--remote", "--url", f"unix://{Host.RUN}/podman.sock", "load", "--input", str(archive)]


def deploy() -> list[str]:
    return minipaas("deploy", str(GUESTBOOK), "--data", Host.DATA, "--build-arg", f"BASE={BASE_TAG}")


def recover(host: Host, bucket: Bucket) -> list[str]:
    """Goes on as ``serve``. The recovery key is given on standard input."""
    return minipaas(
        "recover", "--data", Host.DATA, "--run", Host.RUN, "--bucket", bucket.url,
        "--name", host.name, "--region", host.region, "--takeover",
    )  # fmt: skip
