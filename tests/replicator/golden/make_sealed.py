"""Writes an encrypted object of the format version that the code writes now: run once per version, commit what it made.

``sealed-vN.bin`` is the object, ``sealed-vN.json`` what must come out of it. Never overwrites: golden files are history.

    python tests/replicator/golden/make_sealed.py
"""

from __future__ import annotations

import json
from pathlib import Path

import pyrage

from replicator.envelope import VERSION
from replicator.store.memory import MemoryStore
from replicator.store.seal import sealed

FOLDER = Path(__file__).parent
PATTERN, SIZE = "golden ", 65536 + 100
KEY = "segments/00000001/0/0000000000000001-0000000000000001.seg"


def main() -> None:
    pair = pyrage.x25519.Identity.generate()
    inner = MemoryStore()
    store = sealed(inner, recipients=[str(pair.to_public())], identities=[str(pair)])
    store.put(KEY, (PATTERN.encode() * SIZE)[:SIZE])
    stem = FOLDER / f"sealed-v{VERSION}"
    with stem.with_suffix(".bin").open("xb") as out:
        out.write(inner.get(KEY))
    about = {"key": KEY, "identity": str(pair), "pattern": PATTERN, "size_bytes": SIZE}
    stem.with_suffix(".json").write_text(json.dumps(about, indent=2) + "\n")


if __name__ == "__main__":
    main()
