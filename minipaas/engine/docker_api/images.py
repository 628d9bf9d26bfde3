"""The images of an engine: build, pull, load, save, remove. Never decides which are needed."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import docker
import docker.auth
import docker.errors
import docker.types
import docker.utils

from minipaas.engine.archive import normalised
from minipaas.engine.context import check_containerfile, context_stream
from minipaas.engine.docker_api.connection import Connection, translated
from minipaas.errors import (
    BuildFailed,
    EngineError,
    EngineUnavailable,
    ImageMissing,
    ImageRefused,
)

# Between two signs of life of a build, a pull, a load or a save; a compiler may be silent for long.
SILENCE_S = 900


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
