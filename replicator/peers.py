"""What every server of ours does with its peers: a thread for each, so many at once, and none that may hang for long.

Owns these bounds. Never knows what is asked.
"""

from __future__ import annotations

import logging
import threading
from http.server import BaseHTTPRequestHandler
from socketserver import ThreadingMixIn
from typing import Any

from replicator import __version__
from replicator.errors import UsageError

log = logging.getLogger(__name__)

PEER_TIMEOUT_S = 10.0
"""A peer that sends nothing, or takes nothing, for so long is hung up on."""
MAX_PEERS = 64


class BoundedThreads(ThreadingMixIn):
    """For a server of the standard library: beyond MAX_PEERS at once, one more is hung up on."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = MAX_PEERS

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self._places = threading.BoundedSemaphore(MAX_PEERS)
        super().__init__(*arguments, **options)

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._places.acquire(blocking=False):
            self.shutdown_request(request)  # type: ignore[attr-defined]  # of the server that this is mixed into
            return
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._places.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        log.debug("a peer went away", exc_info=True)


class Handler(BaseHTTPRequestHandler):
    """HTTP for such a server: bounded in time, and nothing in the log but for debugging."""

    timeout = PEER_TIMEOUT_S
    server_version = f"replicator/{__version__}"

    def log_message(self, format: str, *args: Any) -> None:
        log.debug(format, *args)

    def send(self, code: int, kind: str, body: bytes) -> None:
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def parse_address(text: str) -> tuple[str, int]:
    """Host ('' for every address of this computer) and port. Raises UsageError."""
    host, colon, port = text.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    if not colon or not port.isascii() or not port.isdigit() or int(port) > 65535 or (":" in host and not bracketed):
        raise UsageError(f"{text!r} is not an address; write :9090 or 127.0.0.1:9090")
    return (host[1:-1] if bracketed else host), int(port)
