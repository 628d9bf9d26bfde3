"""A base image with Python, made of Debian packages and nothing else: for machines that reach no image registry.

Owns the list of packages and what is left out. Usage: ``python images/make_base.py OUT.tar``; the result is a docker-archive
named ``localhost/minipaas/debian-python:bookworm``. Needs root and ``mmdebstrap``.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

import msgspec

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from minipaas.engine.archive import (
    TAR_END,
    config_name,
    docker_manifest,
    layer_name,
    machine_architecture,
    tar_header,
    tar_padding,
)

TAG = "localhost/minipaas/debian-python:bookworm"
SUITE = "bookworm"
# usr-is-merged stands in for usrmerge, which would bring the whole of Perl.
PACKAGES = ("python3", "usr-is-merged")
_HOOKS = "/usr/share/mmdebstrap/hooks/maybe-merged-usr"
# 2024-01-01: the same packages give the same image.
EPOCH = 1704067200
CHUNK = 1 << 20
_LEFT_OUT = ("doc/*", "man/*", "locale/*", "info/*", "lintian/*", "bug/*", "common-licenses/*")
_CLEAN = (
    'rm -rf "$1"/var/lib/apt/lists/* "$1"/var/cache/apt/* "$1"/var/cache/debconf/*-old "$1"/var/lib/dpkg/*-old '
    '"$1"/var/log/* "$1"/var/cache/ldconfig/aux-cache "$1"/etc/hostname "$1"/etc/resolv.conf && '
    ': > "$1"/etc/machine-id && ln -sf python3 "$1"/usr/bin/python'
)


class BaseImageFailed(Exception):
    """The message says why and what to do."""


def make_base(out: Path, *, on_line: Callable[[str], None] = print) -> Path:
    """Write the image to ``out``, replacing it in one step; ``out`` itself. Takes 20 to 30 s. Raises BaseImageFailed."""
    program = shutil.which("mmdebstrap")
    if program is None:
        raise BaseImageFailed("mmdebstrap is not installed: apt-get install --no-install-recommends mmdebstrap")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".base-") as folder:
        root = Path(folder) / "rootfs.tar"
        _bootstrap(program, root, on_line)
        on_line(f"packing {root.stat().st_size >> 20} MB")
        archive = Path(folder) / "image.tar"
        _pack(root, archive)
        archive.replace(out)
    return out


def _bootstrap(program: str, root: Path, on_line: Callable[[str], None]) -> None:
    options = [f"--dpkgopt=path-exclude=/usr/share/{each}" for each in _LEFT_OUT]
    command = [
        program,
        "--variant=minbase",
        f"--include={','.join(PACKAGES)}",
        "--aptopt=Acquire::Languages none",
        "--aptopt=Acquire::Retries 3",
        *options,
        f"--hook-dir={_HOOKS}",
        f"--customize-hook={_CLEAN}",
        SUITE,
        str(root),
    ]
    environment = {**os.environ, "SOURCE_DATE_EPOCH": str(EPOCH), "LC_ALL": "C"}
    last = ""
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    ) as process:
        for line in process.stdout or ():
            if line.startswith(("I:", "E:", "W:")):
                on_line(line[3:].strip())
                last = line.strip()
    if process.returncode:
        raise BaseImageFailed(f"mmdebstrap failed: {last}; is the Debian mirror in reach?")


def _pack(root: Path, archive: Path) -> None:
    """The root as the one layer of a docker-archive."""
    with root.open("rb") as file:
        diff_id = f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"
    config = msgspec.json.encode(_config(diff_id))
    image_id = f"sha256:{hashlib.sha256(config).hexdigest()}"
    with archive.open("wb") as into, root.open("rb") as file:
        size = root.stat().st_size
        into.write(tar_header(layer_name(diff_id), size))
        shutil.copyfileobj(file, into, CHUNK)
        into.write(bytes(tar_padding(size)))
        _add(into, config_name(image_id), config)
        _add(into, "manifest.json", docker_manifest(image_id, [diff_id], TAG))
        into.write(TAR_END)


def _add(into: IO[bytes], name: str, data: bytes) -> None:
    into.write(tar_header(name, len(data)) + data + bytes(tar_padding(len(data))))


def _config(diff_id: str) -> dict[str, object]:
    return {
        "architecture": machine_architecture(),
        "os": "linux",
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(EPOCH)),
        "config": {
            "Env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LANG=C.UTF-8"],
            "Cmd": ["python3"],
        },
        "rootfs": {"type": "layers", "diff_ids": [diff_id]},
        "history": [{"created_by": f"mmdebstrap {SUITE} {' '.join(PACKAGES)}"}],
    }


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit("usage: python images/make_base.py OUT.tar")
    try:
        made = make_base(Path(sys.argv[1]))
    except BaseImageFailed as error:
        sys.exit(f"error: {error}")
    print(f"{made}: {TAG}, {made.stat().st_size >> 20} MB")


if __name__ == "__main__":
    main()
