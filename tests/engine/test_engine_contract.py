"""The contract that the fake and the real engine keep alike."""

from __future__ import annotations

from pathlib import Path

import pytest

from minipaas.engine import Container, ContainerSpec, Engine
from minipaas.errors import ContainerMissing, EngineError, ImageMissing

SLEEP = ("/bin/sh", "-c", "trap 'exit 0' INT; while :; do sleep 0.05; done")


def spec(image: str, name: str = "contract-1", **changes: object) -> ContainerSpec:
    return ContainerSpec(name=name, image=image, command=SLEEP, stop_timeout_s=3, **changes)  # type: ignore[arg-type]


def only(engine: Engine) -> Container:
    (container,) = engine.containers.list()
    return container


def test_a_container_that_was_run_is_listed_as_running_with_an_address(engine: Engine, busybox: str) -> None:
    started = engine.containers.run(spec(busybox, labels={"minipaas.app": "guestbook"}))
    seen = only(engine)
    assert seen == started
    assert (seen.name, seen.image, seen.state, seen.exit_code) == ("contract-1", busybox, "running", None)
    assert seen.labels["minipaas.app"] == "guestbook"
    assert seen.address.count(".") == 3 and seen.started_ms is not None


def test_an_image_that_is_not_there_is_image_missing(engine: Engine) -> None:
    with pytest.raises(ImageMissing, match="localhost/none:1"):
        engine.containers.run(spec("localhost/none:1"))
    assert engine.containers.list() == ()


def test_a_stopped_container_is_listed_as_exited_without_address(engine: Engine, busybox: str) -> None:
    engine.containers.run(spec(busybox))
    engine.containers.stop("contract-1")
    seen = only(engine)
    assert (seen.state, seen.address, seen.exit_code, seen.oom_killed) == ("exited", "", 0, False)


def test_stop_and_remove_of_what_is_gone_are_no_errors(engine: Engine, busybox: str) -> None:
    engine.containers.stop("contract-1")
    engine.containers.remove("contract-1")
    engine.containers.run(spec(busybox))
    engine.containers.stop("contract-1")
    engine.containers.stop("contract-1")
    engine.containers.remove("contract-1")
    engine.containers.remove("contract-1")
    assert engine.containers.list() == ()


def test_a_stopped_container_of_the_same_name_is_replaced(engine: Engine, busybox: str) -> None:
    first = engine.containers.run(spec(busybox))
    engine.containers.stop("contract-1")
    second = engine.containers.run(spec(busybox))
    assert only(engine).id == second.id != first.id


def test_a_running_container_of_the_same_name_is_not_replaced(engine: Engine, busybox: str) -> None:
    first = engine.containers.run(spec(busybox))
    with pytest.raises(EngineError, match="contract-1 runs already"):
        engine.containers.run(spec(busybox))
    assert only(engine).id == first.id


def test_remove_takes_a_running_container(engine: Engine, busybox: str) -> None:
    engine.containers.run(spec(busybox))
    engine.containers.remove("contract-1")
    assert engine.containers.list() == ()


def test_two_containers_have_two_addresses(engine: Engine, busybox: str) -> None:
    one = engine.containers.run(spec(busybox, "contract-1"))
    two = engine.containers.run(spec(busybox, "contract-2"))
    assert one.address != two.address


def test_logs_and_exec_of_what_is_gone_are_container_missing(engine: Engine) -> None:
    with pytest.raises(ContainerMissing, match="contract-9"):
        engine.containers.logs("contract-9")
    with pytest.raises(ContainerMissing, match="contract-9"):
        engine.containers.exec("contract-9", ["/bin/true"], timeout_s=5)


def test_exec_in_a_running_container_gives_its_exit_code(engine: Engine, busybox: str) -> None:
    engine.containers.run(spec(busybox))
    assert engine.containers.exec("contract-1", ["/bin/true"], timeout_s=5) == (0, "")


def test_exec_in_a_stopped_container_is_an_error(engine: Engine, busybox: str) -> None:
    engine.containers.run(spec(busybox))
    engine.containers.stop("contract-1")
    with pytest.raises(EngineError):
        engine.containers.exec("contract-1", ["/bin/true"], timeout_s=5)


def test_an_image_saved_and_loaded_keeps_its_id(
    engine: Engine, busybox: str, busybox_tar: Path, tmp_path: Path
) -> None:
    saved = tmp_path / "saved.tar"
    saved.write_bytes(b"".join(engine.images.save(busybox)))
    first = engine.images.load(busybox_tar, tag="localhost/test/one:1")
    second = engine.images.load(saved, tag="localhost/test/two:1")
    assert first == second
    for tag in ("localhost/test/one:1", "localhost/test/two:1"):
        assert engine.images.exists(tag)
        engine.images.remove(tag)
        assert not engine.images.exists(tag)
    engine.images.remove("localhost/test/two:1")


def test_saving_an_image_that_is_not_there_is_image_missing(engine: Engine) -> None:
    with pytest.raises(ImageMissing, match="localhost/none:1"):
        b"".join(engine.images.save("localhost/none:1"))
