"""The engine's multiplexed output of a container: frames in, lines of its log out. Pure, over a stream of reads.

Source: docs.docker.com/reference/api/engine, operation ContainerAttach, section "Stream format".
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta

from minipaas.engine import LogLine

MAX_LINE = 1 << 20
MAX_FRAME = 16 << 20
_CHUNK = 1 << 16
_STREAMS = {1: "stdout", 2: "stderr"}
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def buffered(read_some: Callable[[int], bytes]) -> Callable[[int], bytes]:
    """A read of exactly so many bytes, fewer at the end only, over one that gives what has come, b"" at the end."""
    waiting = bytearray()

    def read(size: int) -> bytes:
        while len(waiting) < size and (some := read_some(_CHUNK)):
            waiting.extend(some)
        taken = bytes(waiting[:size])
        del waiting[:size]
        return taken

    return read


def frames(read: Callable[[int], bytes]) -> Iterator[tuple[str, bytes]]:
    """Stream name and payload of each frame, until the stream ends; a frame that is cut off is dropped.

    read: gives exactly that many bytes, or fewer at the end.
    """
    while len(header := read(8)) == 8:
        size = int.from_bytes(header[4:], "big")
        if header[0] not in (0, 1, 2) or size > MAX_FRAME:
            return
        payload = read(size)
        if len(payload) < size:
            return
        yield _STREAMS.get(header[0], "stdout"), payload


def log_lines(read: Callable[[int], bytes]) -> Iterator[LogLine]:
    """Lines of frames that begin with a time stamp. A long line comes in several frames, of which only the last ends
    with a newline; they are one line again, cut at MAX_LINE bytes."""
    open_lines: dict[str, LogLine] = {}
    for stream, payload in frames(read):
        at_ms, text = split_stamp(payload)
        begun = open_lines.pop(stream, None)
        if begun is not None:
            at_ms, text = begun.at_ms, (begun.text + text)[:MAX_LINE]
        line = LogLine(at_ms, stream, text)
        if payload.endswith(b"\n"):
            yield from _whole(line)
        else:
            open_lines[stream] = line
    yield from open_lines.values()


def _whole(line: LogLine) -> Iterator[LogLine]:
    for text in line.text[:-1].split("\n") if line.text.endswith("\n") else [line.text]:
        yield LogLine(line.at_ms, line.stream, text.removesuffix("\r"))


def split_stamp(payload: bytes) -> tuple[int, str]:
    """UTC milliseconds since 1970 and the text after it; 0 when there is no time stamp."""
    stamp, _, rest = payload.partition(b" ")
    at_ms = parse_moment(stamp.decode("ascii", "replace"))
    return (0, payload.decode(errors="replace")) if at_ms is None else (at_ms, rest.decode(errors="replace"))


def parse_moment(text: str) -> int | None:
    """UTC milliseconds since 1970 of the engine's RFC 3339 time; None for its zero time and for what is no time."""
    head, dot, fraction = text.partition(".")
    if dot:
        digits = len(fraction) - len(fraction.lstrip("0123456789"))
        text = f"{head}.{fraction[:digits][:6].ljust(6, '0')}{fraction[digits:]}"
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        return None
    if moment.tzinfo is None or moment.year < 1970:
        return None
    return (moment - _EPOCH) // timedelta(milliseconds=1)
