"""Docker and Podman over the Docker Engine API: the real containers and images.

The only importer of ``docker``. Owns the translation of specs, answers and failures; touches only containers with this node's
label ``minipaas.node``, and never decides what should run.
Source: docs.docker.com/reference/api/engine/version/v1.41; Podman 4.3 and later serve the same.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from ipaddress import IPv4Network
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
from minipaas.engine.archive import normalised
from minipaas.engine.context import check_containerfile, context_stream
from minipaas.engine.frames import buffered, frames, log_lines, parse_moment
from minipaas.engine.subnet import candidates, host_routes
from minipaas.errors import (
    BuildFailed,
    ContainerMissing,
    EngineError,
    EngineUnavailable,
    ImageMissing,
    ImageRefused,
    TimedOut,
)

NODE_LABEL = "minipaas.node"
NETWORK = "minipaas"
NETWORK_LABEL = "minipaas.network"

CONNECT_S = 5
CALL_S = 60
# Between two signs of life of a build, a pull, a load or a save; a compiler may be silent for long.
SILENCE_S = 900
# How often it is looked whether the reader of a log that says nothing is still there.
LOOK_S = 1.0
MAX_OUTPUT = 1 << 20
# How often what lost a race inside the engine is tried again.
RACES = 8
# What engines give a container where the host allows it, and what is too little for any server.
MAX_ULIMIT, MIN_ULIMIT = 1 << 20, 256
_LOG_OPTIONS = {"max-size": "10m", "max-file": "3"}
_STATES = {"running": "running", "paused": "running", "restarting": "running", "stopping": "running"}
_NOT_STARTED = {"created", "configured", "initialized"}


# -- the connection ----------------------------------------------------------------------------------------------------


class Connection:
    """One engine's API. Its methods raise only PlatformError and its subclasses."""

    def __init__(self, url: str) -> None:
        self.url = url
        with translated(f"connect to the container engine at {url}"):
            self.api: Any = docker.APIClient(base_url=url, version="auto", timeout=CALL_S, num_pools=16)
            self.version: Mapping[str, Any] = self.api.version()
        names = [str(each.get("Name", "")) for each in self.version.get("Components") or ()]
        self.is_podman = any("podman" in name.lower() for name in names)

    def path(self, path: str) -> str:
        return f"{self.api.base_url}/v{self.api.api_version}{path}"

    @contextmanager
    def stream(self, method: str, path: str, *, silence_s: float | None, **arguments: Any) -> Iterator[Any]:
        """A response whose body is read piece by piece, with at most ``silence_s`` between two pieces."""
        timeout = (CONNECT_S, silence_s)
        response = self.api.request(method, self.path(path), stream=True, timeout=timeout, **arguments)
        try:
            if response.status_code >= 400:
                raise docker.errors.APIError(
                    _message_of(response), response=response, explanation=_message_of(response)
                )
            yield response
        finally:
            response.close()

    def libpod(self, method: str, path: str, **arguments: Any) -> Any:
        """The answer of a call of Podman's own API. Raises docker.errors.APIError, so that it is translated like the others."""
        url = f"{self.api.base_url}/v4.0.0/libpod{path}"
        response = self.api.request(method, url, timeout=CALL_S, **arguments)
        if response.status_code >= 400:
            raise docker.errors.APIError(_message_of(response), response=response, explanation=_message_of(response))
        return json.loads(response.content)

    def messages(self, response: Any) -> Iterator[dict[str, Any]]:
        """The JSON objects of a progress stream."""
        for line in response.iter_lines():
            if line.strip():
                yield json.loads(line)


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


def _message_of(response: Any) -> str:
    try:
        body = json.loads(response.content)
        return str(body.get("message") or body.get("cause") or body)
    except (ValueError, AttributeError):
        return f"HTTP {response.status_code}"


@contextmanager
def translated(doing: str) -> Iterator[None]:
    """Failures of the libraries below, as ours; ``doing`` says what was tried."""
    try:
        yield
    except docker.errors.ImageNotFound as error:
        raise ImageMissing(f"cannot {doing}: {_one_line(error)}") from error
    except docker.errors.NotFound as error:
        raise ContainerMissing(f"cannot {doing}: {_one_line(error)}") from error
    except docker.errors.APIError as error:
        raise EngineError(f"cannot {doing}: {_one_line(error)}") from error
    except (requests.exceptions.Timeout, urllib3.exceptions.TimeoutError, TimeoutError) as error:
        raise EngineUnavailable(f"cannot {doing}: the container engine does not answer in time") from error
    except (
        docker.errors.DockerException,
        requests.exceptions.RequestException,
        urllib3.exceptions.HTTPError,
        OSError,
    ) as error:
        raise EngineUnavailable(
            f"cannot {doing}: the container engine is not reachable ({_one_line(error)})"
        ) from error
    except ValueError as error:
        raise EngineError(f"cannot {doing}: the container engine's answer makes no sense ({error})") from error


def _is_gone(error: docker.errors.APIError) -> bool:
    """Podman answers 500 when a container is removed while it looks at it."""
    return error.status_code == 404 or "no such container" in _one_line(error).lower()


def _one_line(error: Exception) -> str:
    return " ".join(str(getattr(error, "explanation", None) or error).split())[:500]


# -- what this engine and host cannot do -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Abilities:
    """Found out by trying, and remembered. init: a small init runs as PID 1. ulimits: name and value to lower, () for the
    engine's own."""

    init: bool = True
    ulimits: tuple[tuple[str, int], ...] = ()

    def without(self, message: str) -> Abilities | None:
        """What is left after a failure with this message; None when it is about something else."""
        text = message.lower()
        if self.init and any(each in text for each in ("container-init binary", "docker-init", "catatonit")):
            return replace(self, init=False)
        if "rlimit" in text and (lower := _lower(self.ulimits)):
            return replace(self, ulimits=lower)
        return None


def _lower(ulimits: tuple[tuple[str, int], ...]) -> tuple[tuple[str, int], ...]:
    """The next to try; () when there is nothing left that an app could live with."""
    if not ulimits:
        return host_ulimits()
    halved = tuple((name, value // 2) for name, value in ulimits)
    return halved if all(value >= MIN_ULIMIT for _, value in halved) else ()


def host_ulimits() -> tuple[tuple[str, int], ...]:
    """This process's hard limits, which a container on this host may have too. Podman lowers nproc to the kernel's pid_max."""
    found = []
    for name, which, top in (
        ("nofile", resource.RLIMIT_NOFILE, MAX_ULIMIT),
        ("nproc", resource.RLIMIT_NPROC, int(Path("/proc/sys/kernel/pid_max").read_text())),
    ):
        hard = resource.getrlimit(which)[1]
        found.append((name, top if hard == resource.RLIM_INFINITY else min(hard, top)))
    return tuple(found)


# -- containers --------------------------------------------------------------------------------------------------------


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
            if not _is_gone(error):
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
                if _is_gone(error):
                    return
                if not left:
                    raise

    def _own(self, name: str) -> Mapping[str, Any] | None:
        """The inspection of a container of this node; None when there is none. Raises EngineError when it is another's."""
        with translated(f"look at container {name}"):
            try:
                found: Mapping[str, Any] = self._api.inspect_container(name)
            except docker.errors.APIError as error:
                if not _is_gone(error):
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
                if not _is_gone(error):
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
            if error.status_code != 409 and not _is_gone(error):
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


# -- the network -------------------------------------------------------------------------------------------------------


def ensure_network(connection: Connection, node: str) -> None:
    """Make the network if it is not there. Raises EngineError when its name is taken or no subnet is free."""
    with translated(f"make the network {NETWORK}"):
        known = connection.api.networks()
        if _has_network(known):
            return
        refusal = "every subnet is taken"
        for subnet in islice(candidates(node, host_routes() + _subnets(known)), 20):
            try:
                _create_network(connection, node, subnet)
                return
            except docker.errors.APIError as error:
                refusal = _one_line(error)
            if _has_network(connection.api.networks()):
                return
    raise EngineError(f"cannot make the network {NETWORK}: {refusal}")


def _has_network(known: Sequence[Mapping[str, Any]]) -> bool:
    named = next((each for each in known if each["Name"] == NETWORK), None)
    if named is not None and NETWORK_LABEL not in (named.get("Labels") or {}):
        raise EngineError(f"the engine has a network named {NETWORK} that is not minipaas's; remove or rename it")
    return named is not None


def _subnets(networks: Sequence[Mapping[str, Any]]) -> list[IPv4Network]:
    configs = [config for each in networks for config in (each.get("IPAM") or {}).get("Config") or ()]
    return [IPv4Network(each["Subnet"], strict=False) for each in configs if "." in each.get("Subnet", "")]


def _create_network(connection: Connection, node: str, subnet: IPv4Network) -> None:
    """The bridge is named after the node, as two nodes on one host would else choose the same name.

    Podman is asked through its own API, as only that can leave out its DNS server, which is one more process to lose.
    """
    labels = {NETWORK_LABEL: "1", NODE_LABEL: node}
    bridge = f"mp-{node[:8]}"
    if not connection.is_podman:
        ipam = docker.types.IPAMConfig(pool_configs=[docker.types.IPAMPool(subnet=str(subnet))])
        options = {"com.docker.network.bridge.name": bridge}
        connection.api.create_network(NETWORK, driver="bridge", ipam=ipam, labels=labels, options=options)
        return
    body = {
        "name": NETWORK,
        "driver": "bridge",
        "network_interface": bridge,
        "subnets": [{"subnet": str(subnet)}],
        "dns_enabled": False,
        "labels": labels,
    }
    connection.libpod("POST", "/networks/create", json=body)


# -- images ------------------------------------------------------------------------------------------------------------


class DockerImages:
    """The protocol Images. scratch: a folder for big temporary files; made when needed."""

    def __init__(self, connection: Connection, node: str, scratch: Path) -> None:
        self._connection, self._node, self._scratch = connection, node, scratch
        self._api = connection.api

    def exists(self, reference: str) -> bool:
        with translated(f"look for image {reference}"):
            try:
                self._api.inspect_image(reference)
            except docker.errors.NotFound:
                return False
            return True

    def _id(self, reference: str) -> str:
        """The engine's id, as sha256:… for every engine."""
        found = str(self._api.inspect_image(reference)["Id"])
        return found if found.startswith("sha256:") else f"sha256:{found}"

    def build(
        self,
        context: Path,
        *,
        tag: str,
        containerfile: str,
        args: Mapping[str, str],
        target: str | None,
        on_line: Callable[[str], None],
    ) -> str:
        check_containerfile(context, containerfile)
        ask = {
            "t": tag,
            "dockerfile": containerfile,
            "buildargs": json.dumps(dict(args)),
            "rm": "true",
            "forcerm": "true",
            "networkmode": "default",
        }
        if target:
            ask["target"] = target
        last: deque[str] = deque(maxlen=20)
        try:
            with translated(f"build {context}"):
                for line in self._build_lines(ask, context_stream(context, containerfile)):
                    last.append(line)
                    on_line(line)
                return self._id(tag)
        except (EngineUnavailable, BuildFailed):
            raise
        except EngineError as error:
            raise BuildFailed(f"the build of {context} failed: {_reason(error)}", tuple(last)) from error

    def _build_lines(self, ask: Mapping[str, str], context: Iterator[bytes]) -> Iterator[str]:
        headers = {"Content-Type": "application/x-tar"}
        with self._connection.stream(
            "POST", "/build", silence_s=SILENCE_S, params=ask, data=context, headers=headers
        ) as response:
            for message in self._connection.messages(response):
                _raise_error(message)
                for line in str(message.get("stream", "")).splitlines():
                    if line.strip():
                        yield line.rstrip()

    def pull(self, reference: str, *, tag: str, on_line: Callable[[str], None]) -> str:
        try:
            self._pull_unless_here(reference, on_line)
            with translated(f"pull {reference}"):
                self._tag(reference, tag)
                return self._id(tag)
        except EngineError as error:
            raise _explained(reference, error) from error

    def _pull_unless_here(self, reference: str, on_line: Callable[[str], None]) -> None:
        here = self.exists(reference)
        if here and reference.startswith("localhost/"):
            return
        try:
            self._pull(reference, on_line)
        except EngineError as error:
            if not here:
                raise
            on_line(f"using the {reference} that is here: {error}")

    def _pull(self, reference: str, on_line: Callable[[str], None]) -> None:
        repository, version = docker.utils.parse_repository_tag(reference)
        registry, _ = docker.auth.resolve_repository_name(repository)
        ask = {"fromImage": repository, "tag": version or "latest"}
        with translated(f"pull {reference}"):
            credentials = docker.auth.get_config_header(self._api, registry)
            headers = {"X-Registry-Auth": credentials} if credentials else {}
            with self._connection.stream(
                "POST", "/images/create", silence_s=SILENCE_S, params=ask, headers=headers
            ) as response:
                for message in self._connection.messages(response):
                    _raise_error(message)
                    if line := _pull_line(message):
                        on_line(line)

    def load(self, archive: Path, *, tag: str) -> str:
        self._scratch.mkdir(parents=True, exist_ok=True)
        architecture = str(self._connection.version.get("Arch") or "") or None
        with normalised(archive, tag=tag, scratch=self._scratch, architecture=architecture) as (path, image_id):
            with translated(f"load {archive}"), path.open("rb") as file:
                headers = {"Content-Type": "application/x-tar"}
                with self._connection.stream(
                    "POST", "/images/load", silence_s=SILENCE_S, data=file, headers=headers
                ) as response:
                    for message in self._connection.messages(response):
                        _raise_error(message)
                return self._id(tag) if self.exists(tag) else self._loaded(image_id, tag)

    def _loaded(self, image_id: str, tag: str) -> str:
        self._tag(image_id, tag)
        return self._id(tag)

    def _tag(self, reference: str, tag: str) -> None:
        repository, version = docker.utils.parse_repository_tag(tag)
        self._api.tag(reference, repository, version or "latest")

    def save(self, reference: str) -> Iterator[bytes]:
        with translated(f"save {reference}"):
            self._api.inspect_image(reference)
            with self._connection.stream("GET", f"/images/{reference}/get", silence_s=SILENCE_S) as response:
                yield from response.iter_content(1 << 20)

    def remove(self, reference: str) -> None:
        with translated(f"remove image {reference}"):
            try:
                self._api.remove_image(reference)
            except docker.errors.NotFound:
                pass


def _raise_error(message: Mapping[str, Any]) -> None:
    """Progress streams begin with status 200 and tell a failure at their end."""
    error = message.get("error") or (message.get("errorDetail") or {}).get("message")
    if not error and "message" in message and "stream" not in message:
        error = message["message"]
    if error:
        text = str(error)
        kind = docker.errors.ImageNotFound if _is_missing(text) else docker.errors.APIError
        raise kind(text, explanation=text)


def _is_missing(text: str) -> bool:
    return any(each in text.lower() for each in ("manifest unknown", "not found", "no such image"))


_PULL_FAILURES = (
    (("invalid reference", "expected colon-separated transport", "invalid repository name"), ImageRefused,
     "this is no image reference; write REGISTRY/NAME:TAG, such as docker.io/library/nginx:1.27"),
    (("short-name", "unqualified-search"), ImageRefused, "it names no registry; write it in full, such as docker.io/library/NAME:TAG"),
    (("unauthorized", "authentication required", "denied", "forbidden"), ImageMissing,
     "its registry does not give it to us: there is no such image, or it needs `podman login` (or `docker login`) on the node"),
    (("manifest unknown", "not found", "no such image", "name unknown"), ImageMissing,
     "its registry has no such image; check name and tag"),
    (("no such host", "dial tcp", "i/o timeout", "connection refused", "network is unreachable", "name resolution"), EngineUnavailable,
     "its registry cannot be reached from the node; check the name of the registry and the network"),
)  # fmt: skip
"""What engines say when a pull fails, and what that means to whoever gave the reference. The first that matches counts."""


def _explained(reference: str, error: EngineError) -> EngineError:
    said = str(error)
    for signs, kind, meaning in _PULL_FAILURES:
        if any(sign in said.lower() for sign in signs):
            return kind(f"image {reference!r}: {meaning} (the engine: {_last_reason(said)})")
    return error


def _last_reason(said: str) -> str:
    """Engines put what they did before what went wrong, over and over."""
    reason = said.rpartition(": ")[2].strip()
    return reason if len(reason) <= 120 else f"{reason[:119]}…"


def _pull_line(message: Mapping[str, Any]) -> str:
    if "progressDetail" in message and message.get("progress"):
        return ""
    text = str(message.get("status") or message.get("stream") or "").strip()
    return f"{message['id']}: {text}" if text and message.get("id") else text


def _reason(error: EngineError) -> str:
    return str(error).partition(": ")[2] or str(error)


# -- the engine --------------------------------------------------------------------------------------------------------


class DockerEngine:
    """The protocol Engine.

    url: unix:///…, tcp://… or ssh://…. node: the node's id, the value of the label on all it makes. scratch: a folder for big
    temporary files. revive: starts the engine again, when it is ours to start. Raises EngineUnavailable.
    """

    def __init__(self, url: str, *, node: str, scratch: Path, revive: Callable[[], None] | None = None) -> None:
        self._connection = Connection(url)
        self._containers = DockerContainers(self._connection, node, revive)
        self._images = DockerImages(self._connection, node, scratch)

    @property
    def containers(self) -> DockerContainers:
        return self._containers

    @property
    def images(self) -> DockerImages:
        return self._images

    @property
    def is_rootless(self) -> bool:
        """Containers of a rootless engine have addresses that the host cannot reach."""
        with translated("ask the container engine what it is"):
            info = self._connection.api.info()
        return bool(info.get("Rootless")) or "name=rootless" in (info.get("SecurityOptions") or ())

    def describe(self) -> str:
        kind = "Podman" if self._connection.is_podman else "Docker"
        return f"{kind} {self._connection.version.get('Version', '?')} at {self._connection.url}"

    def close(self) -> None:
        self._connection.api.close()
