"""The API as the commands see it. Owns how a command finds the server and its token, and turns its errors back into ours.

Never prints. The token comes from MINIPAAS_TOKEN or the node's data directory, never from an argument.
"""

from __future__ import annotations

import functools
import io
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import click
import requests

from minipaas import access, errors
from minipaas.errors import BadRequest, Interrupted, NotAuthorised, NotFound, PlatformError, TimedOut, Unavailable
from minipaas.settings import DEFAULT_DATA_DIR, listen_address, read_settings

CONNECT_S = 5.0
ANSWER_S = 150.0
STREAM_S = 3600.0
PART_BYTES = 4 << 20
PART_ATTEMPTS = 4


@dataclass(frozen=True)
class Server:
    """Where the API is. data: the node's data directory on this host; api: URL, for a node elsewhere."""

    data: Path
    api: str = ""
    token: str = field(default="", repr=False)

    def url(self) -> str:
        if self.api:
            return _server_url(self.api)
        try:
            settings = read_settings(self.data)
        except NotFound as error:
            raise NotFound(
                f"there is no node in {self.data}; name its directory with --data, or a node elsewhere with --api and MINIPAAS_TOKEN"
            ) from error
        host, port = listen_address(settings.api_listen, "api_listen")
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    def bearer(self) -> str:
        if self.token:
            return self.token
        path = access.token_path(self.data)
        try:
            return path.read_text().strip()
        except OSError as error:
            why = f"in {path}: {error.strerror}" if not self.api else f"for {self.api}"
            raise NotAuthorised(f"there is no token {why}; set MINIPAAS_TOKEN, or be root on the node") from error


def _server_url(text: str) -> str:
    try:
        parts = urlsplit(text)
        known = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        known = False
    if not known or parts.query or parts.fragment:
        raise BadRequest(f"--api (or MINIPAAS_API) {text!r} is not the URL of a node; write http://HOST:PORT")
    return text.rstrip("/")


class Client:
    """One server. Every method raises the error that the server had, or Unavailable when it cannot be reached."""

    def __init__(self, server: Server) -> None:
        self._url = server.url()
        self._session = requests.Session()
        self._session.trust_env = False
        self._session.headers["Authorization"] = f"Bearer {server.bearer()}"

    def get(self, path: str, **query: object) -> Any:
        return self._call("GET", path, params=_query(query)).json()

    def post(self, path: str, body: object = None) -> Any:
        return self._call("POST", path, json=body if body is not None else {}).json()

    def put(self, path: str, body: object) -> Any:
        return self._call("PUT", path, json=body).json()

    def delete(self, path: str, body: object = None) -> Any:
        return self._call("DELETE", path, json=body).json()

    def upload(self, content: Iterable[bytes]) -> str:
        """The id under which the server keeps the bytes. They travel in parts, each of which is sent again when it is lost."""
        upload = str(self.post("/v1/uploads")["id"])
        at = 0
        for part in parts(content, PART_BYTES):
            self._send_part(f"/v1/uploads/{upload}", at, part)
            at += len(part)
        return upload

    def _send_part(self, path: str, at: int, part: bytes) -> None:
        for attempt in range(PART_ATTEMPTS):
            try:
                self._call("PUT", path, params={"at": str(at)}, data=io.BytesIO(part))
                return
            except (Unavailable, TimedOut):
                if attempt + 1 == PART_ATTEMPTS:
                    raise
                time.sleep(attempt)

    def stream(self, method: str, path: str, body: object = None, **query: object) -> Iterator[dict[str, Any]]:
        """Values of a newline-delimited JSON answer, as they come."""
        answer = self._call(method, path, json=body, params=_query(query), stream=True, timeout=(CONNECT_S, STREAM_S))
        try:
            for line in answer.iter_lines():
                if line:
                    yield json.loads(line)
        except (requests.RequestException, json.JSONDecodeError) as error:
            raise Unavailable(
                "the server closed the connection before it was done; look with: minipaas status"
            ) from error

    def _call(self, method: str, path: str, **options: Any) -> requests.Response:
        options.setdefault("timeout", (CONNECT_S, ANSWER_S))
        try:
            answer = self._session.request(method, f"{self._url}{path}", **options)
        except requests.Timeout as error:
            raise TimedOut(f"{self._url} does not answer in time; is the node overloaded?") from error
        except requests.RequestException as error:
            raise Unavailable(f"nothing answers at {self._url}; is `minipaas serve` running?") from error
        if answer.status_code >= 400:
            raise _error(answer)
        return answer


def parts(content: Iterable[bytes], size: int) -> Iterator[bytes]:
    """The same bytes, ``size`` at a time; the last part is what is left."""
    waiting = bytearray()
    for chunk in content:
        waiting += chunk
        while len(waiting) >= size:
            yield bytes(waiting[:size])
            del waiting[:size]
    if waiting:
        yield bytes(waiting)


@contextmanager
def goes_on(change: str, app: str) -> Iterator[None]:
    """Around a call that changes something: who interrupts it ends the command, not the change, and is told so."""
    try:
        yield
    except KeyboardInterrupt:
        raise Interrupted(
            f"interrupted here, but {change} may be recorded by now and then goes on at the node; look with: minipaas status {app}"
        ) from None


def _query(values: dict[str, object]) -> dict[str, str]:
    return {name: str(value) for name, value in values.items() if value is not None}


def _error(answer: requests.Response) -> PlatformError:
    """The class that the server named, with its message."""
    try:
        said = answer.json()["error"]
        kind = getattr(errors, str(said["code"]), PlatformError)
        message = str(said["message"])
    except (ValueError, KeyError, TypeError):
        kind, message = PlatformError, f"the server answered {answer.status_code}: {answer.text[:200].strip()}"
    if not (isinstance(kind, type) and issubclass(kind, PlatformError)):
        kind = PlatformError
    return kind(message)


def with_client(command: Callable[..., None]) -> Callable[..., None]:
    """Gives a command the options that find the server, and a ``client`` as its first argument."""

    @click.option("--data", type=click.Path(path_type=Path), default=DEFAULT_DATA_DIR, envvar="MINIPAAS_DATA", show_default=True,
                  help="Data directory of the node on this host.")  # fmt: skip
    @click.option(
        "--api", default="", envvar="MINIPAAS_API", help="URL of a node elsewhere; its token in MINIPAAS_TOKEN."
    )
    @functools.wraps(command)
    def wrapped(*args: Any, data: Path, api: str, **options: Any) -> None:
        command(Client(Server(data, api, os.environ.get("MINIPAAS_TOKEN", ""))), *args, **options)

    return wrapped
