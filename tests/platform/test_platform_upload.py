"""Uploads as the command line sends them: in parts, over the network."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from flask import Flask, Response, jsonify, request
from platform_support import QUICK

from minipaas.cli.client import PART_BYTES, Client, Server, parts
from minipaas.web.door import listening


@dataclass
class Receiver:
    """Keeps the parts that it gets, after it has refused some. busy: how many it refuses yet."""

    client: Client
    busy: int = 0
    got: dict[int, bytes] = field(default_factory=dict)


@pytest.fixture
def receiver(tmp_path: Path) -> Iterator[Receiver]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    receiver = Receiver(Client(Server(tmp_path, f"http://127.0.0.1:{port}", "mp_x")))
    app = Flask(__name__)

    @app.post("/v1/uploads")
    def begin() -> Response:
        return jsonify({"id": "up_1"})

    @app.put("/v1/uploads/up_1")
    def write() -> tuple[Response, int]:
        if receiver.busy > 0:
            receiver.busy -= 1
            return jsonify({"error": {"code": "Unavailable", "message": "later"}}), 503
        receiver.got[int(request.args["at"])] = request.get_data()
        return jsonify({}), 200

    with listening(app, "127.0.0.1", port, QUICK, lambda header: None):
        yield receiver


def test_an_upload_travels_in_parts(receiver: Receiver) -> None:
    assert receiver.client.upload([bytes(3 << 20), b"x" * (2 << 20)]) == "up_1"
    assert {at: len(part) for at, part in receiver.got.items()} == {0: PART_BYTES, PART_BYTES: 1 << 20}


def test_a_part_that_is_lost_is_sent_again(receiver: Receiver) -> None:
    receiver.busy = 1
    receiver.client.upload([b"content"])
    assert receiver.got == {0: b"content"}


@pytest.mark.parametrize("sizes", [[], [1], [4], [3, 6, 0, 1], [9]])
def test_parts_are_the_same_bytes(sizes: list[int]) -> None:
    chunks = [bytes([size]) * size for size in sizes]
    cut = list(parts(chunks, 4))
    assert b"".join(cut) == b"".join(chunks)
    assert all(len(part) == 4 for part in cut[:-1])
