"""Writes the golden segments of the format version that the code writes now: run once per version, commit what it made.

For each segment two files: ``segment-vN-NAME.seg`` and ``segment-vN-NAME.json`` with what a reader must find in it: every field
of the header, and each page as hexadecimal, trailing zeros left out. Never overwrites: golden files are history.

    python tests/replicator/golden/make_segments.py
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from replicator.pagehash import StateHashes, page_hash
from replicator.segment import VERSION, SegmentHeader, SegmentWriter, Source

HERE = Path(__file__).parent
DATABASE = "00112233445566778899aabbccddeeff"


def page(text: str) -> bytes:
    return text.encode().ljust(512, b"\0")


def write(name: str, header: SegmentHeader, pages: dict[int, bytes]) -> None:
    stem = HERE / f"segment-v{VERSION}-{name}"
    with stem.with_suffix(".seg").open("xb") as out:
        writer = SegmentWriter(out, header)
        for page_no, data in pages.items():
            writer.add(page_no, data)
        writer.finish()
    expected = {"header": asdict(header), "pages": {n: data.rstrip(b"\0").hex() for n, data in pages.items()}}
    stem.with_suffix(".json").write_text(json.dumps(expected, indent=1) + "\n")


def main() -> None:
    state = StateHashes(3)
    first = {n: page(f"page {n} of the snapshot") for n in (1, 2, 3)}
    for n, data in first.items():
        state.set(n, page_hash(n, data))
    snapshot = SegmentHeader(
        database=DATABASE,
        timeline=1,
        first=7,
        last=7,
        snapshot=True,
        page_size=512,
        page_count=3,
        pages_before=0,
        first_commit_ms=1764000000000,
        last_commit_ms=1764000000123,
        state_before=0,
        state_after=state.checksum,
    )
    write("snapshot", snapshot, first)

    before = state.checksum
    state.resize(5)
    second = {n: page(f"page {n} of the increment") for n in (2, 4, 5)}
    for n, data in second.items():
        state.set(n, page_hash(n, data))
    increment = SegmentHeader(
        database=DATABASE,
        timeline=1,
        first=8,
        last=10,
        snapshot=False,
        page_size=512,
        page_count=5,
        pages_before=3,
        first_commit_ms=1764000001000,
        last_commit_ms=1764000002000,
        state_before=before,
        state_after=state.checksum,
        source=Source(0xFD00, 123456789, 0xA1B2C3D4, 0x01020304, 0xDEADBEEF, 0xCAFEF00D, 32 + 3 * 536, True),
    )
    write("increment", increment, second)


if __name__ == "__main__":
    main()
