"""Hand-made images for the tests of the engine: small tars in every shape that a user may bring."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import zstandard

from minipaas.engine.archive import machine_architecture

Entry = tuple[str, bytes | str | None, bytes]
BUSYBOX = Path("/bin/busybox")
APPLETS = (
    "sh",
    "sleep",
    "cat",
    "echo",
    "head",
    "tail",
    "tr",
    "ls",
    "true",
    "false",
    "nc",
    "httpd",
    "kill",
    "yes",
    "id",
)


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def digest(data: bytes) -> str:
    return f"sha256:{sha256(data)}"


def tar_of(files: Mapping[str, bytes], extra: Sequence[tarfile.TarInfo] = ()) -> bytes:
    """A tar of regular files, executable, and of further members without content."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size, info.mode = len(data), 0o755
            tar.addfile(info, io.BytesIO(data))
        for info in extra:
            tar.addfile(info)
    return out.getvalue()


def link(name: str, target: str, kind: bytes = tarfile.SYMTYPE) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def config_of(layers: Sequence[bytes], architecture: str | None = None, command: Sequence[str] = ("/bin/sh",)) -> bytes:
    return json.dumps(
        {
            "architecture": architecture or machine_architecture(),
            "os": "linux",
            "config": {"Cmd": list(command), "Env": ["PATH=/bin"]},
            "rootfs": {"type": "layers", "diff_ids": [digest(each) for each in layers]},
            "history": [{"created_by": "test"} for _ in layers],
        }
    ).encode()


def docker_archive(layers: Sequence[bytes], tag: str = "x:1", config: bytes | None = None) -> bytes:
    """As Podman saves: <sha256>.tar, <sha256>.json, manifest.json."""
    config = config or config_of(layers)
    manifest = [
        {"Config": f"{sha256(config)}.json", "RepoTags": [tag], "Layers": [f"{sha256(each)}.tar" for each in layers]}
    ]
    files = {f"{sha256(each)}.tar": each for each in layers}
    return tar_of({**files, f"{sha256(config)}.json": config, "manifest.json": json.dumps(manifest).encode()})


def nix_archive(layers: Sequence[bytes], tag: str = "nix:1") -> bytes:
    """As dockerTools.buildLayeredImage writes: <hash>/layer.tar, gzip around the whole."""
    config = config_of(layers)
    manifest = [
        {
            "Config": f"{sha256(config)}.json",
            "RepoTags": [tag],
            "Layers": [f"{sha256(each)}/layer.tar" for each in layers],
        }
    ]
    files = {f"./{sha256(each)}/layer.tar": each for each in layers}
    whole = tar_of({**files, f"{sha256(config)}.json": config, "manifest.json": json.dumps(manifest).encode()})
    return gzip.compress(whole, 1)


def oci_archive(layers: Sequence[bytes], packing: str = "gzip", architecture: str | None = None) -> bytes:
    """As ``podman save --format oci-archive`` and BuildKit write, with attestations beside the image."""
    pack = {"gzip": lambda data: gzip.compress(data, 1), "zstd": zstandard.compress, "": lambda data: data}[packing]
    stored = [pack(each) for each in layers]
    suffix = f"+{packing}" if packing else ""
    config = config_of(layers, architecture)
    described = [
        {"mediaType": f"application/vnd.oci.image.layer.v1.tar{suffix}", **descriptor(each)} for each in stored
    ]
    manifest = json.dumps({"schemaVersion": 2, "config": descriptor(config), "layers": described}).encode()
    platform = {"architecture": architecture or machine_architecture(), "os": "linux"}
    attestation = b'{"schemaVersion": 2}'
    index = {
        "schemaVersion": 2,
        "manifests": [
            {**descriptor(manifest), "platform": platform},
            {**descriptor(attestation), "platform": {"architecture": "unknown", "os": "unknown"}},
        ],
    }
    blobs = {f"blobs/sha256/{sha256(each)}": each for each in [*stored, config, manifest, attestation]}
    return tar_of({"oci-layout": b'{"imageLayoutVersion":"1.0.0"}', "index.json": json.dumps(index).encode(), **blobs})


def descriptor(data: bytes) -> dict[str, object]:
    return {"digest": digest(data), "size": len(data)}


def busybox_layer() -> bytes:
    return tar_of({"bin/busybox": BUSYBOX.read_bytes()}, [link(f"bin/{each}", "busybox") for each in APPLETS])
