"""What a user deploys, as an image in the engine: an upload of sources, an image archive, or an image reference.

Owns the choice of the Containerfile and the tag of what comes out. Never records anything.
"""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

import msgspec

from minipaas import tarball
from minipaas.engine import Images
from minipaas.errors import BadRequest
from minipaas.manifest import Manifest
from minipaas.settings import Limits
from minipaas.uploads import Uploads

CONTAINERFILES = ("Containerfile", "Dockerfile")


class Source(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """kind source: ``upload`` is a tarball of a directory with a Containerfile. archive: ``upload`` is an image tarball
    (docker save, OCI layout). image: ``ref`` is what a registry calls it."""

    kind: Literal["source", "archive", "image"]
    upload: str = ""
    ref: str = ""


def image_tag(app: str, release: int) -> str:
    """Unique, so that a deploy that was interrupted and its successor never share one."""
    return f"localhost/minipaas/{app}:v{release}-{secrets.token_hex(4)}"


class Builder:
    """Makes images of sources, in the engine. Leaves nothing behind but the image."""

    def __init__(self, images: Images, uploads: Uploads, limits: Limits) -> None:
        self._images, self._uploads, self._limits = images, uploads, limits

    def make(
        self, source: Source, manifest: Manifest, args: Mapping[str, str], tag: str, on_line: Callable[[str], None]
    ) -> None:
        """The image is in the engine under ``tag``. Raises BuildFailed, ImageRefused, ImageMissing, BadRequest, NotFound."""
        if source.kind == "image" or (source.kind == "source" and manifest.build.image):
            reference = source.ref or manifest.build.image or ""
            if not reference:
                raise BadRequest("no image is named; give its reference")
            self._images.pull(reference, tag=tag, on_line=on_line)
        elif source.kind == "archive":
            self._images.load(self._uploads.path(source.upload), tag=tag)
        else:
            self._build(source, manifest, args, tag, on_line)

    def _build(
        self, source: Source, manifest: Manifest, args: Mapping[str, str], tag: str, on_line: Callable[[str], None]
    ) -> None:
        context = self._uploads.scratch()
        try:
            with self._uploads.path(source.upload).open("rb") as stream:
                tarball.unpack(
                    stream, context, max_bytes=self._limits.unpacked_bytes, max_files=self._limits.unpacked_files
                )
            self._images.build(
                context,
                tag=tag,
                containerfile=_containerfile(context, manifest),
                args={**manifest.build.args, **args},
                target=manifest.build.target,
                on_line=on_line,
            )
        finally:
            shutil.rmtree(context, ignore_errors=True)


def _containerfile(context: Path, manifest: Manifest) -> str:
    if manifest.build.dockerfile:
        return manifest.build.dockerfile
    for name in CONTAINERFILES:
        if (context / name).is_file():
            return name
    raise BadRequest(
        f"the directory has neither {' nor '.join(CONTAINERFILES)}; add one, name it in [build] dockerfile, or deploy an image"
    )
