"""What a new user types, and what comes back; also when it is wrong."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import socket
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
from support.node import GUESTBOOK, MakeNode, Node, free_port, wait_for
from support.seaweed import SeaweedServer

from images.make_base import TAG as BASE_TAG

pytestmark = [pytest.mark.real, pytest.mark.slow, pytest.mark.timeout(420)]

HELLO = """
[http_service]
internal_port = 8080
"""


def hello_manifest(folder: Path, app: str) -> Path:
    """A directory with nothing but a manifest: the image comes from elsewhere."""
    folder.mkdir()
    (folder / "minipaas.toml").write_text(f'app = "{app}"\n{HELLO}')
    return folder


def one_layer(source: Path) -> bytes:
    """An uncompressed layer that holds a folder as /app."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as layer:
        layer.add(source, arcname="app")
    return out.getvalue()


def nix_like(base: Path, out: Path) -> Path:
    """A gzip'd docker-archive as Nix's dockerTools writes it: layers named by hash, one of them ours on top of the base's."""
    layer = one_layer(GUESTBOOK)
    with tarfile.open(base) as tar:
        manifest = json.loads(tar.extractfile("manifest.json").read())[0]  # type: ignore[union-attr]
        config = json.loads(tar.extractfile(manifest["Config"]).read())  # type: ignore[union-attr]
        layers = [(name, tar.extractfile(name).read()) for name in manifest["Layers"]]  # type: ignore[union-attr]
    digest = hashlib.sha256(layer).hexdigest()
    config["rootfs"]["diff_ids"].append(f"sha256:{digest}")
    config.setdefault("config", {})["Cmd"] = ["python3", "/app/app.py"]
    body = json.dumps(config).encode()
    name = f"{hashlib.sha256(body).hexdigest()}.json"
    files = [*layers, (f"{digest}/layer.tar", layer), (name, body)]
    index = [{"Config": name, "RepoTags": ["library:nix"], "Layers": [*manifest["Layers"], f"{digest}/layer.tar"]}]
    with gzip.open(out, "wb", compresslevel=1) as packed, tarfile.open(fileobj=packed, mode="w") as tar:
        for path, content in [*files, ("manifest.json", json.dumps(index).encode())]:
            entry = tarfile.TarInfo(path)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return out


def error_of(result: subprocess.CompletedProcess[str], code: int) -> str:
    """The one clear line of a command that must fail so."""
    assert result.returncode == code, f"{result.returncode}: {result.stdout}{result.stderr}"
    assert "Traceback" not in result.stderr
    lines = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert len(lines) == 1, result.stderr
    return result.stderr


def test_an_app_lives_as_its_owner_types(node: Node) -> None:
    first = node.deploy()
    assert first.returncode == 0, first.stderr
    assert "guestbook v1 is live" in first.stdout
    assert node.request("POST", "/", json.dumps({"name": "me", "message": "hello"}).encode())[0] == 200
    assert "guestbook" in node.done("apps")
    assert "listens on port 8080" in node.done("logs", "guestbook")
    follow = subprocess.Popen(
        [sys.executable, "-m", "minipaas", "logs", "guestbook", "-f", "-n", "1"],
        env=node.environment(), stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert follow.stdout is not None
        assert "guestbook" in follow.stdout.readline()
        node.done("restart", "guestbook")
        assert node.check()["rows"] == 1
    finally:
        follow.kill()
        follow.wait()
    wait_for(lambda: node.protection().get("guestbook.db", ("", ""))[0].startswith("protected"), 20, "protected")
    assert "guestbook.db" in node.done("volumes")
    assert node.deploy().returncode == 0
    assert [release["status"] for release in node.json("releases", "guestbook")] in (
        ["live", "superseded"],
        ["superseded", "live"],
    )
    node.done("secrets", "set", "-a", "guestbook", "COLOUR=green")
    assert "COLOUR" in node.done("secrets", "list", "-a", "guestbook")
    assert "green" not in node.done("secrets", "list", "-a", "guestbook", "--json")
    assert node.podman("exec", node.containers()[0], "printenv", "COLOUR").strip() == "green"
    said = node.done("destroy", "guestbook", "-y")
    assert "kept until 20" in said
    wait_for(lambda: node.containers() == [], 30, "the container ends")
    assert node.request("GET", "/")[0] == 404
    volume = node.json("volumes")[0]
    assert volume["purge_after_ms"] > time.time() * 1000
    assert (Path(volume["directory"]) / "guestbook.db").exists()
    assert "brought back app guestbook" in node.deploy().stdout
    assert node.check()["rows"] == 1


def test_an_image_by_reference_and_images_in_tarballs_are_deployed(
    shared_node: Node, base_archive: Path, tmp_path: Path
) -> None:
    node = shared_node
    build = tmp_path / "build"
    build.mkdir()
    (build / "Containerfile").write_text(f'FROM {BASE_TAG}\nCMD ["python3", "-m", "http.server", "8080"]\n')
    node.podman("build", "-t", "localhost/web:1", str(build))
    folder = hello_manifest(tmp_path / "by-reference", "by-reference")
    node.done("deploy", str(folder), "--image", "localhost/web:1")
    assert node.request("GET", "/", app="by-reference")[0] == 200

    saved = tmp_path / "saved.tar"
    saved.write_bytes(subprocess.run(
        ["podman", "--remote", "--url", f"unix://{node.run}/podman.sock", "save", "localhost/web:1"],
        capture_output=True, check=True,
    ).stdout)  # fmt: skip
    node.done("deploy", str(hello_manifest(tmp_path / "saved", "saved")), "--archive", str(saved))
    assert node.request("GET", "/", app="saved")[0] == 200

    layout = tmp_path / "layout.tar"
    layout.write_bytes(subprocess.run(
        ["podman", "--remote", "--url", f"unix://{node.run}/podman.sock", "save", "--format", "oci-archive", "localhost/web:1"],
        capture_output=True, check=True,
    ).stdout)  # fmt: skip
    node.done("deploy", str(hello_manifest(tmp_path / "layout", "layout")), "--archive", str(layout))
    assert node.request("GET", "/", app="layout")[0] == 200

    nix = nix_like(base_archive, tmp_path / "nix.tar.gz")
    folder = hello_manifest(tmp_path / "nix", "nix")
    with (folder / "minipaas.toml").open("a") as file:
        file.write('\n[[mounts]]\nsource = "data"\ndestination = "/data"\n')
    node.done("deploy", str(folder), "--archive", str(nix))
    assert node.request("GET", "/health", app="nix")[0] == 200

    cut = tmp_path / "cut.tar"
    cut.write_bytes(saved.read_bytes()[: saved.stat().st_size // 2])
    assert "truncated" in error_of(node.command("deploy", str(tmp_path / "saved"), "--archive", str(cut)), 1)
    assert node.request("GET", "/", app="saved")[0] == 200


def test_what_is_wrong_with_a_deploy_is_said_in_one_line(shared_node: Node, tmp_path: Path) -> None:
    node = shared_node
    folder = tmp_path / "app"
    folder.mkdir()
    assert "minipaas.toml" in error_of(node.command("deploy", str(folder)), 2)
    manifest = folder / "minipaas.toml"
    manifest.write_text('app = "x"\n\n[http_service]\ninternal_prot = 8080\n')
    said = error_of(node.command("deploy", str(folder)), 2)
    assert "minipaas.toml:4" in said
    assert "internal_port" in said
    manifest.write_text('app = "Not A Name"\n')
    assert "minipaas.toml:1" in error_of(node.command("deploy", str(folder)), 2)
    manifest.write_text(f'app = "x"\n{HELLO}')
    assert "Containerfile" in error_of(node.command("deploy", str(folder)), 1)
    (folder / "Containerfile").write_text(f"FROM {BASE_TAG}\nRUN echo useful words; exit 7\n")
    failed = node.command("deploy", str(folder))
    error_of(failed, 1)
    assert "useful words" in failed.stdout + failed.stderr
    (folder / "Containerfile").write_text(f'FROM {BASE_TAG}\nCMD ["sh", "-c", "echo last words; exit 3"]\n')
    crashed = node.command("deploy", str(folder))
    assert "exited with 3" in error_of(crashed, 1)
    assert "last words" in crashed.stdout + crashed.stderr
    result = node.command("deploy", str(folder), "--image", "localhost/never-made:1")
    assert "never-made" in error_of(result, 1)
    error_of(node.command("deploy", str(tmp_path / "nowhere")), 2)
    error_of(node.command("status", "nobody"), 1)
    assert "token" in error_of(node.command("apps", MINIPAAS_TOKEN="mp_wrong"), 4)


def test_what_is_wrong_with_a_node_is_said_in_one_line(
    make_node: MakeNode, seaweed: SeaweedServer, prefix: str
) -> None:
    a = make_node()
    assert "minipaas setup" in error_of(a.command("serve"), 1)
    nowhere = make_node("b", bucket=seaweed.url(prefix).replace(seaweed.endpoint, f"http://127.0.0.1:{free_port()}"))
    error_of(nowhere.command("setup", *nowhere.node_options()), 1)
    missing = make_node("c", bucket=seaweed.url(prefix).replace("s3://bucket/", "s3://no-such-bucket/"))
    assert "no-such-bucket" in error_of(missing.command("setup", *missing.node_options()), 1)
    error_of(a.command("setup", *a.node_options(), MINIPAAS_SECRET_KEY="wrong"), 1)
    assert not a.data.exists()
    a.setup()
    assert "not an empty directory" in error_of(a.command("setup", *a.node_options()), 2)
    second = make_node("d")
    assert "recover" in error_of(second.command("setup", *second.node_options()), 1)
    assert "is `minipaas serve` running" in error_of(a.command("apps"), 1)
    a.start()
    assert "another minipaas" in error_of(a.command("serve"), 2)


def test_setup_shows_key_and_token_once_and_serve_says_that_it_is_ready(make_node: MakeNode) -> None:
    a = make_node()
    shown = a.done("setup", *a.node_options())
    assert shown.count("AGE-SECRET-KEY-1") == 1
    assert shown.count((a.data / "token").read_text().strip()) == 1
    key = next(word for word in shown.split() if word.startswith("AGE-SECRET-KEY-1"))
    assert [path for path in a.data.rglob("*") if path.is_file() and key.encode() in path.read_bytes()] == []
    a.start()
    assert f"ready: API and page on http://127.0.0.1:{a.api}/, apps on 127.0.0.1:{a.http}" in a.log.read_text()
    assert a.json("apps") == []
    assert "no app yet" in a.done("apps")


def test_a_port_that_is_taken_is_said_in_one_line(make_node: MakeNode) -> None:
    a = make_node()
    a.setup()
    for port in (a.http, a.api):
        with socket.create_server(("127.0.0.1", port)):
            assert f"cannot listen on 127.0.0.1:{port}" in error_of(a.command("serve"), 1)
    a.start()


def test_every_listing_is_json_for_programs(shared_node: Node) -> None:
    node = shared_node
    assert node.deploy().returncode == 0
    node.done("secrets", "set", "-a", "guestbook", "COLOUR=green", "SIZE=3")
    node.done("secrets", "unset", "-a", "guestbook", "SIZE")
    assert [each["name"] for each in node.json("secrets", "list", "-a", "guestbook")] == ["COLOUR"]
    assert "guestbook" in [each["name"] for each in node.json("apps")]
    assert [each["number"] for each in node.json("releases", "guestbook")]
    assert node.json("status")["name"] == "a"
    assert "guestbook" in [each["app"] for each in node.json("volumes")]
    lines = node.done("logs", "guestbook", "-n", "1", "--json").splitlines()
    assert "guestbook" in json.loads(lines[0])["text"]
