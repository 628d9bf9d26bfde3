"""One connection to an engine's API, and its failures as ours."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import docker
import docker.auth
import docker.errors
import docker.types
import docker.utils
import requests.exceptions
import urllib3.exceptions

from minipaas.errors import (
    ContainerMissing,
    EngineError,
    EngineUnavailable,
    ImageMissing,
)

NODE_LABEL = "minipaas.node"
CONNECT_S = 5
CALL_S = 60


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
                raise docker.errors.APIError(message_of(response), response=response, explanation=message_of(response))
            yield response
        finally:
            response.close()

    def libpod(self, method: str, path: str, **arguments: Any) -> Any:
        """The answer of a call of Podman's own API. Raises docker.errors.APIError, so that it is translated like the others."""
        url = f"{self.api.base_url}/v4.0.0/libpod{path}"
        response = self.api.request(method, url, timeout=CALL_S, **arguments)
        if response.status_code >= 400:
            raise docker.errors.APIError(message_of(response), response=response, explanation=message_of(response))
        return json.loads(response.content)

    def messages(self, response: Any) -> Iterator[dict[str, Any]]:
        """The JSON objects of a progress stream."""
        for line in response.iter_lines():
            if line.strip():
                yield json.loads(line)


def message_of(response: Any) -> str:
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
        raise ImageMissing(f"cannot {doing}: {one_line(error)}") from error
    except docker.errors.NotFound as error:
        raise ContainerMissing(f"cannot {doing}: {one_line(error)}") from error
    except docker.errors.APIError as error:
        raise EngineError(f"cannot {doing}: {one_line(error)}") from error
    except (requests.exceptions.Timeout, urllib3.exceptions.TimeoutError, TimeoutError) as error:
        raise EngineUnavailable(f"cannot {doing}: the container engine does not answer in time") from error
    except (
        docker.errors.DockerException,
        requests.exceptions.RequestException,
        urllib3.exceptions.HTTPError,
        OSError,
    ) as error:
        raise EngineUnavailable(f"cannot {doing}: the container engine is not reachable ({one_line(error)})") from error
    except ValueError as error:
        raise EngineError(f"cannot {doing}: the container engine's answer makes no sense ({error})") from error


def is_gone(error: docker.errors.APIError) -> bool:
    """Podman answers 500 when a container is removed while it looks at it."""
    return error.status_code == 404 or "no such container" in one_line(error).lower()


def one_line(error: Exception) -> str:
    return " ".join(str(getattr(error, "explanation", None) or error).split())[:500]
