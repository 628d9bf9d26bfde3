"""The containers of one node on Docker or Podman. Touches only those with the node's label; never decides what should run."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from itertools import islice
from pathlib import Path
from typing import Any

import docker
import docker.auth
import docker.errors
import docker.types
import docker.utils
import requests.exceptions
import urllib3.exceptions

from minipaas.engine import Container, ContainerSpec, LogLine, nobody_leaves
from minipaas.engine.docker_api.abilities import Abilities
from minipaas.engine.docker_api.connection import CALL_S, CONNECT_S, NODE_LABEL, Connection, is_gone, translated
from minipaas.engine.docker_api.network import NETWORK, ensure_network
from minipaas.engine.frames import buffered, frames, log_lines, parse_moment
from minipaas.errors import (
    ContainerMissing,
    EngineError,
    EngineUnavailable,
    ImageMissing,
    TimedOut,
)

# How often it is looked whether the reader of a log that says nothing is still there.
LOOK_S = 1.0
MAX_OUTPUT = 1 << 20
# How often what lost a race inside the engine is tried again.
RACES = 8
_LOG_OPTIONS = {"max-size": "10m", "max-file": "3"}
_STATES = {"running": "running", "paused": "running", "restarting": "running", "stopping": "running"}
_NOT_STARTED = {"created", "configured", "initialized"}


class DockerContainers:
    """The protocol Containers. revive: brings the engine back when it went away; None when it is not ours to start.

    abilities: what to try first on this engine and host.
    """

    def __init__(
        self,
        connection: Connection,
        node: str,
        revive: Callable[[], None] | None,
        abilities: Abilities | None = None,
    ) -> None:
        self._connection, self._node, self._revive = connection, node, revive
        self._api = connection.api
        self._abilities = abilities or Abilities()
        self._details: dict[tuple[str, str, str], Container] = {}

    def list(self) -> Sequence[Container]:
        """One call; and one more for each container whose state is new since the last."""
        try:
            return self._list()
        except EngineUnavailable:
            if self._revive is None:
                raise
            self._revive()
            return self._list()

    def _list(self) -> Sequence[Container]:
        with translated("list the containers"):
            known = {}
            for seen, since in self._rows():
                key = (seen.id, seen.state, since)
                detailed = self._details.get(key) or self._detailed(seen)
                if detailed is not None:
                    known[key] = detailed
            self._details = known
            return tuple(known.values())

    def _rows(self) -> Iterator[tuple[Container, str]]:
        """What there is, without details, each with something that differs when it was started anew.

        Podman is asked through its own API, as its copy of Docker's fails as a whole when a container is removed meanwhile.
        """
        label = f"{NODE_LABEL}={self._node}"
        if not self._connection.is_podman:
            for row in self._api.containers(all=True, filters={"label": [label]}):
                yield _of_row(row, row["Names"][0]), _address((row.get("NetworkSettings") or {}).get("Networks") or {})
            return
        ask = {"all": "true", "filters": json.dumps({"label": [label]})}
        for row in self._connection.libpod("GET", "/containers/json", params=ask):
            yield _of_row(row, row["Names"][0]), str(row.get("StartedAt"))

    def _detailed(self, seen: Container) -> Container | None:
        """None when it went between the two calls."""
        if seen.state == "created":
            return seen
        try:
            return _of_inspection(self._api.inspect_container(seen.id))
        except docker.errors.APIError as error:
            if not is_gone(error):
                raise
            return None

    def run(self, spec: ContainerSpec) -> Container:
        self._make_room(spec.name)
        ensure_network(self._connection, self._node)
        while True:
            tried = self._abilities
            try:
                with translated(f"start {spec.name} from {spec.image}"):
                    return self._create_and_start(spec, tried)
            except (ImageMissing, EngineUnavailable):
                raise
            except EngineError as error:
                less = tried.without(str(error))
                if less is None:
                    raise
                self._abilities = less

    def _create_and_start(self, spec: ContainerSpec, abilities: Abilities) -> Container:
        created = self._api.create_container(
            spec.image,
            _list_or_none(spec.command),
            name=spec.name,
            environment=dict(spec.env),
            labels={**spec.labels, NODE_LABEL: self._node},
            stop_signal=spec.stop_signal,
            stop_timeout=spec.stop_timeout_s,
            host_config=self._host_config(spec, abilities),
            networking_config=self._api.create_networking_config({NETWORK: self._api.create_endpoint_config()}),
        )
        try:
            self._api.start(created["Id"])
            return _of_inspection(self._api.inspect_container(created["Id"]))
        except docker.errors.APIError:
            self._discard(created["Id"])
            raise

    def _host_config(self, spec: ContainerSpec, abilities: Abilities) -> Any:
        mounts = [
            docker.types.Mount(each.target, str(each.source), type="bind", read_only=each.read_only)
            for each in spec.mounts
        ]
        log_config = None
        if not self._connection.is_podman:
            log_config = docker.types.LogConfig(type="json-file", config=_LOG_OPTIONS)
        ulimits = [docker.types.Ulimit(name=name, soft=value, hard=value) for name, value in abilities.ulimits]
        return self._api.create_host_config(
            network_mode=NETWORK,
            mounts=mounts,
            mem_limit=None if spec.memory_mb is None else spec.memory_mb << 20,
            nano_cpus=None if spec.cpus is None else round(spec.cpus * 1_000_000_000),
            log_config=log_config,
            init=True if abilities.init else None,
            ulimits=ulimits or None,
        )

    def _make_room(self, name: str) -> None:
        """Remove a container of this name that does not run. Raises EngineError when it runs or is not ours."""
        found = self._own(name)
        if found is None:
            self._discard_leftover(name)
            return
        container = _of_inspection(found)
        if container.state == "running":
            raise EngineError(f"container {name} runs already; stop it before starting it anew")
        with translated(f"replace the stopped container {name}"):
            self._discard(container.id)

    def _discard_leftover(self, name: str) -> None:
        """Podman killed in the middle of a creation leaves a name that is taken by nothing it can list."""
        if self._connection.is_podman:
            with translated(f"free the name {name}"):
                self._discard(name)

    def _discard(self, key: str) -> None:
        """A container whose engine was killed at work on it may need a second try: the first cleans up its mounts."""
        for left in reversed(range(RACES)):
            try:
                self._api.remove_container(key, force=True, v=True)
                return
            except docker.errors.APIError as error:
                if is_gone(error):
                    return
                if not left:
                    raise

    def _own(self, name: str) -> Mapping[str, Any] | None:
        """The inspection of a container of this node; None when there is none. Raises EngineError when it is another's."""
        with translated(f"look at container {name}"):
            try:
                found: Mapping[str, Any] = self._api.inspect_container(name)
            except docker.errors.APIError as error:
                if not is_gone(error):
                    raise
                return None
        if (found["Config"].get("Labels") or {}).get(NODE_LABEL) != self._node:
            raise EngineError(f"container {name} was not made by this node; rename or remove it yourself")
        return found

    def stop(self, name: str) -> None:
        found = self._own(name)
        if found is None or not found["State"].get("Running"):
            return
        patience = int(found["Config"].get("StopTimeout") or 10)
        with translated(f"stop {name}"):
            try:
                self._api.stop(found["Id"], timeout=patience)
            except docker.errors.APIError as error:
                if not is_gone(error):
                    raise

    def remove(self, name: str) -> None:
        found = self._own(name)
        if found is None:
            return
        with translated(f"remove {name}"):
            if found["State"].get("Running"):
                self._kill(found["Id"])
            self._discard(found["Id"])

    def _kill(self, key: str) -> None:
        """Podman's forced removal begins with the stop signal and waits; a kill first makes it what it says."""
        try:
            self._api.kill(key, "SIGKILL")
        except docker.errors.APIError as error:
            if error.status_code != 409 and not is_gone(error):
                raise

    def logs(
        self, name: str, *, tail: int | None = None, follow: bool = False, gone: Callable[[], bool] = nobody_leaves
    ) -> Iterator[LogLine]:
        """Podman 4 gives times in whole seconds. Following ends when the container does."""
        found = self._own(name)
        if found is None:
            raise ContainerMissing(f"there is no container {name}")
        return self._followed(found["Id"], tail, gone) if follow else self._log_lines(found["Id"], tail)

    def _followed(self, key: str, tail: int | None, gone: Callable[[], bool]) -> Iterator[LogLine]:
        try:
            yield from self._log_lines(key, tail, gone)
        except EngineError:
            if not gone():
                raise

    def _log_lines(self, key: str, tail: int | None, gone: Callable[[], bool] | None = None) -> Iterator[LogLine]:
        """gone: None for what is there already."""
        if tail is None or not self._connection.is_podman:
            return self._read_log(key, tail, gone)
        return self._tail_of_podman(key, tail, gone)

    def _tail_of_podman(self, key: str, tail: int, gone: Callable[[], bool] | None) -> Iterator[LogLine]:
        """Asked for the last lines, Podman 4 mixes up those that a program printed in several writes: all are read, and cut here."""
        if gone is None:
            return iter(deque(self._read_log(key, None, None), maxlen=tail))
        surplus = sum(1 for _ in self._read_log(key, None, None)) - tail
        return islice(self._read_log(key, None, gone), max(0, surplus), None)

    def _read_log(self, key: str, tail: int | None, gone: Callable[[], bool] | None) -> Iterator[LogLine]:
        ask = {"stdout": "1", "stderr": "1", "timestamps": "1", "tail": "all" if tail is None else str(tail)}
        if gone is not None:
            ask["follow"] = "1"
        silence_s = CALL_S if gone is None else None
        with (
            translated("read the log"),
            self._connection.stream("GET", f"/containers/{key}/logs", silence_s=silence_s, params=ask) as response,
        ):
            with nullcontext() if gone is None else _ended_when(gone, response.raw):
                yield from log_lines(buffered(response.raw.read1))

    def exec(self, name: str, command: Sequence[str], *, timeout_s: float) -> tuple[int, str]:
        """The last MAX_OUTPUT bytes of output. Raises ContainerMissing, TimedOut (after ending the command)."""
        found = self._own(name)
        if found is None:
            raise ContainerMissing(f"there is no container {name}")
        with translated(f"run {command[0]} in {name}"):
            key = self._api.exec_create(found["Id"], [*command])["Id"]
            try:
                output = self._exec_output(key, timeout_s)
            except (requests.exceptions.Timeout, urllib3.exceptions.TimeoutError, TimeoutError) as error:
                self._end_exec(key, found["Id"])
                raise TimedOut(f"{command[0]} in {name} did not end in {timeout_s:g} s") from error
            return self._exit_code(key), output

    def _exec_output(self, key: str, timeout_s: float) -> str:
        deadline = time.monotonic() + timeout_s
        kept = b""
        how = {"Detach": False, "Tty": False}
        with self._connection.stream("POST", f"/exec/{key}/start", silence_s=timeout_s, json=how) as response:
            for _, payload in frames(buffered(response.raw.read1)):
                kept = (kept + payload)[-MAX_OUTPUT:]
                if time.monotonic() > deadline:
                    raise TimeoutError
        return kept.decode(errors="replace")

    def _exit_code(self, key: str) -> int:
        """The output can end a moment before the engine has seen the exit."""
        limit = time.monotonic() + CONNECT_S
        while True:
            seen = self._api.exec_inspect(key)
            if not seen["Running"]:
                return int(seen["ExitCode"] or 0)
            if time.monotonic() > limit:
                raise TimeoutError
            time.sleep(0.02)

    def _end_exec(self, key: str, container: str) -> None:
        """The API cannot end a command, but its process is on this host: kill it if it is in the container's cgroup."""
        pid = int(self._api.exec_inspect(key).get("Pid") or 0)
        try:
            if pid > 1 and container in Path(f"/proc/{pid}/cgroup").read_text():
                os.kill(pid, signal.SIGKILL)
        except (FileNotFoundError, ProcessLookupError):
            pass


def _list_or_none(command: Sequence[str] | None) -> list[str] | None:
    return None if command is None else [*command]


def _state(text: str) -> str:
    return "created" if text in _NOT_STARTED else _STATES.get(text, "exited")


def _of_row(row: Mapping[str, Any], name: str) -> Container:
    """A row of either list: neither address nor, with Docker, exit code and start time."""
    return Container(
        id=row["Id"],
        name=name.lstrip("/"),
        image=row["Image"],
        labels=row.get("Labels") or {},
        state=_state(row["State"].lower()),
    )


def _of_inspection(found: Mapping[str, Any]) -> Container:
    seen = found["State"]
    state = _state(seen["Status"].lower())
    return Container(
        id=found["Id"],
        name=found["Name"].lstrip("/"),
        image=found["Config"]["Image"],
        labels=found["Config"].get("Labels") or {},
        state=state,
        address=_address(found["NetworkSettings"].get("Networks") or {}) if state == "running" else "",
        exit_code=int(seen["ExitCode"]) if state == "exited" else None,
        oom_killed=bool(seen.get("OOMKilled")),
        started_ms=None if state == "created" else parse_moment(seen.get("StartedAt") or ""),
    )


def _address(networks: Mapping[str, Any]) -> str:
    return str((networks.get(NETWORK) or {}).get("IPAddress") or "")


@contextmanager
def _ended_when(gone: Callable[[], bool], raw: Any) -> Iterator[None]:
    """A read of the raw response that waits for more ends when ``gone()``: only another thread can see to that."""
    done = threading.Event()

    def watch() -> None:
        while not done.wait(LOOK_S):
            if gone():
                with suppress(OSError, ValueError, RuntimeError):
                    raw.shutdown()
                return

    threading.Thread(target=watch, name="log-reader", daemon=True).start()
    try:
        yield
    finally:
        done.set()
