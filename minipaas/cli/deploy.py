"""``deploy``: sends what is in a directory, and shows what the server makes of it. Owns the choice of the source."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from minipaas import manifest, tarball
from minipaas.cli import text as texts
from minipaas.cli.client import Client, goes_on, with_client
from minipaas.errors import BadRequest, PlatformError, Unavailable

CHUNK_BYTES = 1 << 20


_EXAMPLE = "\n".join(f"  {line}" for line in manifest.EXAMPLE.splitlines())


@click.command(epilog=f"\b\nA minipaas.toml to begin with:\n{_EXAMPLE}")
@click.argument("directory", type=click.Path(exists=True, file_okay=False, path_type=Path), default=Path())
@click.option(
    "-c",
    "--config",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Instead of minipaas.toml (or fly.toml) in DIRECTORY.",
)
@click.option("-a", "--app", default="", help="Instead of the app that the file names.")
@click.option("-i", "--image", default="", help="Deploy this image reference; nothing is built.")
@click.option("--archive", type=click.Path(exists=True, dir_okay=False, path_type=Path),
              help="Deploy this image tarball (docker save, OCI layout); nothing is built.")  # fmt: skip
@click.option("--build-arg", multiple=True, metavar="NAME=VALUE", help="Build argument; may be given several times.")
@with_client
def deploy(
    client: Client,
    directory: Path,
    config: Path | None,
    app: str,
    image: str,
    archive: Path | None,
    build_arg: tuple[str, ...],
) -> None:
    """Build what is in DIRECTORY, and run it as the next release of its app.

    The old release serves until the new one is healthy. An app with a volume has one writer: its requests wait while it is swapped.
    With --app and without a file, an app keeps the configuration that it has.
    """
    if image and archive:
        raise BadRequest("--image and --archive are two sources; name one")
    path = config or (manifest.look(directory) if app else manifest.find(directory))
    text = manifest.read(path) if path else None
    parsed = manifest.parse(text, str(path))[0] if text is not None else manifest.Manifest()
    app = app or parsed.app or ""
    if not app:
        raise BadRequest(f'{path} names no app; add `app = "NAME"`, or say --app NAME')
    body = {
        "source": _source(client, directory, parsed, image or (parsed.build.image or ""), archive),
        "manifest": text,
        "file": path.name if path else "",
        "build_args": dict(_build_arg(each) for each in build_arg),
    }
    with goes_on("the deploy", app):
        _follow(client.stream("POST", f"/v1/apps/{app}/deploys", body))


def _source(
    client: Client, directory: Path, parsed: manifest.Manifest, image: str, archive: Path | None
) -> dict[str, str]:
    if archive is not None:
        texts.say(f"-----> Sending {archive.name}, {archive.stat().st_size / 1048576:.1f} MiB")
        return {"kind": "archive", "upload": client.upload(_chunks(archive))}
    if image:
        return {"kind": "image", "ref": image}
    texts.say(f"-----> Sending {directory.resolve().name}")
    ignorefile = directory / parsed.build.ignorefile if parsed.build.ignorefile else None
    return {
        "kind": "source",
        "upload": client.upload(tarball.pack(directory, ignorefile, keep=_containerfiles(parsed))),
    }


def _containerfiles(parsed: manifest.Manifest) -> tuple[str, ...]:
    """They travel although an ignore file names them, as it often does."""
    return tuple(name for name in ("Containerfile", "Dockerfile", parsed.build.dockerfile) if name)


def _chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            yield chunk


def _build_arg(text: str) -> tuple[str, str]:
    name, separator, value = text.partition("=")
    if not separator or not name:
        raise BadRequest(f"--build-arg {text!r}: write NAME=VALUE")
    return name, value


def _follow(events: Iterator[dict[str, Any]]) -> None:
    for event in events:
        text = event.get("text", "")
        match event["event"]:
            case "step":
                texts.say(f"-----> {text}")
            case "warning":
                texts.note(f"Warning: {text}")
            case "done":
                texts.say(f"-----> {text}")
                return
            case "failed":
                raise PlatformError(text)
            case _:
                click.echo(f"       {texts.output_of_app(text)}")
    raise Unavailable("the server ended the answer before the deploy was done; look with: minipaas status")


COMMANDS = (deploy,)
