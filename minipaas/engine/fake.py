"""A container engine in memory, for tests: the same contract as the real one, and failures on demand.

Owns states, addresses and images; runs no process. Images are real archives, so that what is saved can be loaded elsewhere.
"""

from __future__ import annotations

import hashlib
import secrets
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import msgspec

from minipaas.engine import Container, ContainerSpec, LogLine, nobody_leaves
from minipaas.engine.archive import (
    TAR_END,
    config_name,
    docker_manifest,
    layer_name,
    machine_architecture,
    open_image,
    tar_header,
    tar_padding,
)
from minipaas.engine.context import check_containerfile, context_stream
from minipaas.errors import BuildFailed, ContainerMissing, EngineError, EngineUnavailable, ImageMissing


@dataclass(frozen=True)
class FakeImage:
    """config: JSON bytes. layers: uncompressed tars."""

    config: bytes
    layers: tuple[bytes, ...]

    @property
    def id(self) -> str:
        return f"sha256:{hashlib.sha256(self.config).hexdigest()}"


def make_image(layers: Sequence[bytes], architecture: str | None = None) -> FakeImage:
    diff_ids = [f"sha256:{hashlib.sha256(each).hexdigest()}" for each in layers]
    config = {
        "architecture": architecture or machine_architecture(),
        "os": "linux",
        "config": {},
        "rootfs": {"type": "layers", "diff_ids": diff_ids},
    }
    return FakeImage(msgspec.json.encode(config), tuple(layers))


@dataclass
class Faults:
    """What goes wrong. unavailable: every call fails. crash: exit code of containers of an image, on start. refuse_start:
    message of the failing start of an image. refuse_build: message of the next builds. stop_takes_s: how long stops take."""

    unavailable: bool = False
    crash: dict[str, int] = field(default_factory=dict)
    refuse_start: dict[str, str] = field(default_factory=dict)
    refuse_build: str = ""
    stop_takes_s: float = 0.0

    def check(self) -> None:
        if self.unavailable:
            raise EngineUnavailable("the container engine is not reachable (fake)")


def _wall_clock_ms() -> int:
    return int(time.time() * 1000)


class FakeContainers:
    """The protocol Containers. specs: of what was run, by name. address_of: an address for a started container."""

    def __init__(
        self, images: FakeImages, faults: Faults, now_ms: Callable[[], int], sleep: Callable[[float], None]
    ) -> None:
        self._images, self._faults, self._now_ms, self._sleep = images, faults, now_ms, sleep
        self._all: dict[str, Container] = {}
        self._logs: dict[str, list[LogLine]] = {}
        self._next_address = 2
        self.specs: dict[str, ContainerSpec] = {}
        self.exec_answer: Callable[[str, Sequence[str]], tuple[int, str]] = lambda name, command: (0, "")
        self.address_of: Callable[[ContainerSpec], str] = self._new_address

    def _new_address(self, spec: ContainerSpec) -> str:
        self._next_address += 1
        return f"10.255.{self._next_address // 250}.{self._next_address % 250 + 1}"

    def list(self) -> Sequence[Container]:
        self._faults.check()
        return tuple(self._all.values())

    def run(self, spec: ContainerSpec) -> Container:
        self._faults.check()
        existing = self._all.get(spec.name)
        if existing is not None and existing.state == "running":
            raise EngineError(f"container {spec.name} runs already; stop it before starting it anew")
        if not self._images.exists(spec.image):
            raise ImageMissing(f"cannot start {spec.name} from {spec.image}: no such image")
        if message := self._faults.refuse_start.get(spec.image):
            raise EngineError(f"cannot start {spec.name} from {spec.image}: {message}")
        self.specs[spec.name] = spec
        self._logs[spec.name] = []
        started = Container(
            id=secrets.token_hex(32),
            name=spec.name,
            image=spec.image,
            labels=dict(spec.labels),
            state="running",
            address=self.address_of(spec),
            started_ms=self._now_ms(),
        )
        self._all[spec.name] = started
        if (code := self._faults.crash.get(spec.image)) is not None:
            self.end(spec.name, exit_code=code)
        return self._all[spec.name]

    def end(self, name: str, *, exit_code: int, oom_killed: bool = False) -> None:
        """For tests: the process in it ends by itself."""
        running = self._all[name]
        self._all[name] = replace(running, state="exited", address="", exit_code=exit_code, oom_killed=oom_killed)

    def say(self, name: str, text: str, stream: str = "stdout") -> None:
        """For tests: the process in it writes a line."""
        self._logs[name].append(LogLine(self._now_ms(), stream, text))

    def stop(self, name: str) -> None:
        self._faults.check()
        if name in self._all and self._all[name].state == "running":
            slow = self._faults.stop_takes_s > self.specs[name].stop_timeout_s
            self._sleep(min(self._faults.stop_takes_s, self.specs[name].stop_timeout_s))
            self.end(name, exit_code=137 if slow else 0)

    def remove(self, name: str) -> None:
        self._faults.check()
        self._all.pop(name, None)
        self._logs.pop(name, None)

    def logs(
        self, name: str, *, tail: int | None = None, follow: bool = False, gone: Callable[[], bool] = nobody_leaves
    ) -> Iterator[LogLine]:
        """Following gives what is there and what comes until the container has ended."""
        self._faults.check()
        if name not in self._logs:
            raise ContainerMissing(f"there is no container {name}")
        return self._log_lines(name, tail, follow, gone)

    def _log_lines(self, name: str, tail: int | None, follow: bool, gone: Callable[[], bool]) -> Iterator[LogLine]:
        lines = self._logs[name]
        at = 0 if tail is None else max(0, len(lines) - tail)
        while True:
            running = name in self._all and self._all[name].state == "running"
            while at < len(lines):
                yield lines[at]
                at += 1
            if not (follow and running) or gone():
                return
            self._sleep(0.01)

    def exec(self, name: str, command: Sequence[str], *, timeout_s: float) -> tuple[int, str]:
        self._faults.check()
        if name not in self._all:
            raise ContainerMissing(f"there is no container {name}")
        if self._all[name].state != "running":
            raise EngineError(f"cannot run {command[0]} in {name}: it is not running")
        return self.exec_answer(name, command)


class FakeImages:
    """The protocol Images. remote: what can be pulled, by reference."""

    def __init__(self, faults: Faults) -> None:
        self._faults = faults
        self._images: dict[str, FakeImage] = {}
        self.remote: dict[str, FakeImage] = {}

    def exists(self, reference: str) -> bool:
        self._faults.check()
        return self._find(reference) is not None

    def _find(self, reference: str) -> FakeImage | None:
        if reference in self._images:
            return self._images[reference]
        return next((each for each in self._images.values() if each.id == reference), None)

    def put(self, tag: str, image: FakeImage) -> str:
        """For tests: have an image without building it."""
        self._images[tag] = image
        return image.id

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
        self._faults.check()
        check_containerfile(context, containerfile)
        on_line(f"STEP 1: {containerfile}")
        if self._faults.refuse_build:
            last = (f"STEP 1: {containerfile}", self._faults.refuse_build)
            raise BuildFailed(f"the build of {context} failed: {self._faults.refuse_build}", last)
        return self.put(tag, make_image([b"".join(context_stream(context, containerfile))]))

    def pull(self, reference: str, *, tag: str, on_line: Callable[[str], None]) -> str:
        self._faults.check()
        image = self.remote.get(reference) or self._find(reference)
        if image is None:
            raise ImageMissing(f"cannot pull {reference}: not found")
        on_line(f"pulling {reference}")
        return self.put(tag, image)

    def load(self, archive: Path, *, tag: str) -> str:
        self._faults.check()
        with tempfile.TemporaryDirectory() as scratch, open_image(archive, scratch=Path(scratch)) as image:
            layers = tuple(b"".join(image.read_layer(index)) for index in range(len(image.diff_ids)))
            return self.put(tag, FakeImage(image.config, layers))

    def save(self, reference: str) -> Iterator[bytes]:
        self._faults.check()
        image = self._find(reference)
        if image is None:
            raise ImageMissing(f"cannot save {reference}: no such image")
        diff_ids = [f"sha256:{hashlib.sha256(each).hexdigest()}" for each in image.layers]
        parts = [(layer_name(diff_id), layer) for diff_id, layer in zip(diff_ids, image.layers, strict=True)]
        parts += [
            (config_name(image.id), image.config),
            ("manifest.json", docker_manifest(image.id, diff_ids, reference)),
        ]
        for name, data in parts:
            yield tar_header(name, len(data)) + data + bytes(tar_padding(len(data)))
        yield TAR_END

    def remove(self, reference: str) -> None:
        self._faults.check()
        self._images.pop(reference, None)


class FakeEngine:
    """The protocol Engine. now_ms, sleep: the clock, for logs, start times and slow stops."""

    def __init__(
        self, *, now_ms: Callable[[], int] = _wall_clock_ms, sleep: Callable[[float], None] = time.sleep
    ) -> None:
        self.faults = Faults()
        self._images = FakeImages(self.faults)
        self._containers = FakeContainers(self._images, self.faults, now_ms, sleep)

    @property
    def containers(self) -> FakeContainers:
        return self._containers

    @property
    def images(self) -> FakeImages:
        return self._images

    def describe(self) -> str:
        return "fake engine in memory"

    def close(self) -> None:
        pass
