"""A node is lost and another takes its place: what recovery refuses, what it brings back, what it does when it is interrupted."""

from __future__ import annotations

import hashlib
import json
import random
import subprocess
import time
from pathlib import Path

import pytest
from support.bucket import bucket_of
from support.node import MakeNode, Node, processes_of, serving, wait_for
from support.seaweed import SeaweedServer

from images.make_base import TAG as BASE_TAG
from replicator import Replica

pytestmark = [pytest.mark.real, pytest.mark.slow, pytest.mark.timeout(420)]

SECRET = "correct-horse-battery"
APP = """
import hashlib, http.server, json, os, sqlite3
os.makedirs("/data/deep/er", exist_ok=True)
PATHS = {"one": "/data/one.db", "two": "/data/deep/er/two words.db"}
if not os.path.exists(PATHS["one"]):
    os.close(os.open(PATHS["one"], os.O_CREAT, 0o600))
    os.chmod(PATHS["one"], 0o640)
    os.chown(PATHS["one"], 1234, 4321)
for path in PATHS.values():
    db = sqlite3.connect(path)
    db.execute("PRAGMA journal_mode=wal")
    db.execute("CREATE TABLE IF NOT EXISTS t (n)")
    db.commit()
    db.close()
os.chmod(PATHS["one"], 0o640)

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        name = self.path.strip("/")
        if name in PATHS:
            db = sqlite3.connect(PATHS[name]); rows = db.execute("SELECT count(*) FROM t").fetchone()[0]; db.close()
            stat = os.stat(PATHS[name])
            body = {"rows": rows, "mode": oct(stat.st_mode & 0o777), "owner": [stat.st_uid, stat.st_gid]}
        else:
            body = {"secret": hashlib.sha256(os.environ.get("SESAME", "").encode()).hexdigest(), "region": os.environ["FLY_REGION"]}
        self.answer(body)
    def do_POST(self):
        db = sqlite3.connect(PATHS[self.path.strip("/")]); db.execute("INSERT INTO t VALUES (1)"); db.commit(); db.close()
        self.answer({})
    def answer(self, body):
        data = json.dumps(body).encode()
        self.send_response(200); self.send_header("Content-Length", str(len(data))); self.end_headers(); self.wfile.write(data)
    def log_message(self, *args): pass

http.server.ThreadingHTTPServer(("0.0.0.0", int(os.environ["PORT"])), Handler).serve_forever()
"""

MANIFEST = """
app = "library"

[http_service]
internal_port = 8080

[[mounts]]
source = "data"
destination = "/data"
"""


def deploy_library(node: Node) -> None:
    """An app with two databases in one volume, one of them in a subfolder, and a secret."""
    source = node.root / "library"
    source.mkdir()
    (source / "app.py").write_text(APP)
    (source / "Containerfile").write_text(f'FROM {BASE_TAG}\nCOPY app.py /app.py\nCMD ["python3", "/app.py"]\n')
    (source / "minipaas.toml").write_text(MANIFEST)
    node.done("apps", "create", "library")
    node.done("secrets", "set", "-a", "library", "SESAME", stdin=SECRET)
    node.done("deploy", str(source))


def ask(node: Node, path: str) -> dict[str, object]:
    status, body = node.request("GET", path, app="library")
    assert status == 200, body
    return dict(json.loads(body))


def objects(seaweed: SeaweedServer, prefix: str) -> dict[str, str]:
    return {info.key: info.etag for info in bucket_of(seaweed.url(prefix), seaweed).list()}


def forks_of(seaweed: SeaweedServer, prefix: str) -> dict[str, list[int | None]]:
    """Name of each replica in the bucket -> parents of its timelines, in order."""
    store = bucket_of(seaweed.url(prefix), seaweed)
    names = {info.key.partition("/timelines/")[0] for info in store.list() if "/timelines/" in info.key}
    return {
        name: [timeline.parent for _, timeline in sorted(Replica(store.sub(name)).timelines().items())]
        for name in names
    }


def test_everything_of_a_lost_node_comes_back_on_another(
    make_node: MakeNode, base_archive: Path, seaweed: SeaweedServer, prefix: str
) -> None:
    a = serving(make_node(), base_archive)
    deploy_library(a)
    assert a.deploy().returncode == 0
    for path, count in (("/one", 5), ("/two", 7)):
        for _ in range(count):
            assert a.request("POST", path, app="library")[0] == 200
    wait_for(lambda: {"one.db", "two words.db"} <= set(a.protection()), 20, "both databases were found")
    time.sleep(1.5)
    token = (a.data / "token").read_text().strip()
    a.kill()
    a.end_at_once()

    b = make_node("b", "syd")
    began = time.monotonic()
    b.recover(a.recovery_key, "--takeover")
    wait_for(lambda: _answers(b, "/one"), 60, b.tail())
    assert time.monotonic() - began < 20
    assert ask(b, "/one") == {"rows": 5, "mode": "0o640", "owner": [1234, 4321]}
    assert ask(b, "/two") == {"rows": 7, "mode": "0o644", "owner": [0, 0]}
    assert ask(b, "/") == {"secret": hashlib.sha256(SECRET.encode()).hexdigest(), "region": "syd"}
    b.settled("guestbook")
    assert {app["name"] for app in b.json("apps")} == {"library", "guestbook"}
    assert b.log.read_text().count("fetch image") == 2, "both images come from the bucket"
    assert b.command("apps", MINIPAAS_TOKEN=token).returncode == 0, "a token given out on a is good on b"
    durable = {Path(d["path"]).name: d["durable"] for d in b.json("status")["databases"]}
    wait_for(lambda: all(p[0].startswith("protected") for p in b.protection().values()), 30, str(b.protection()))
    assert {name: position.split(":")[0] for name, position in durable.items()} == dict.fromkeys(durable, "2")
    forks = forks_of(seaweed, prefix)
    assert len(forks) == 4
    assert {parent for parents in forks.values() for parent in parents} == {None, 1}, forks
    assert b.request("POST", "/one", app="library")[0] == 200
    assert ask(b, "/one")["rows"] == 6


def _answers(node: Node, path: str) -> bool:
    try:
        return node.request("GET", path, app="library", timeout_s=3)[0] == 200
    except OSError:
        return False


def test_recovery_refuses_before_it_writes_anything(make_node: MakeNode, seaweed: SeaweedServer, prefix: str) -> None:
    a = make_node()
    a.setup()
    b = make_node("b", "syd")
    before = objects(seaweed, prefix)
    wrong_key = "AGE-SECRET-KEY-1QQQSYQCYQ5RQWZQFPG9SCRGWPUGPZYSNZS23V9CCRYDPK8QARC0JQXGPZ2"
    other = a.recovery_key[:-6] + ("QQQQQQ" if not a.recovery_key.endswith("QQQQQQ") else "PPPPPP")
    for key in (wrong_key, other, "nonsense", ""):
        result = b.command("recover", *b.node_options(), "--takeover", stdin=f"{key}\n")
        assert result.returncode in (2, 4), result.stderr
        assert result.stderr.startswith("Error: "), result.stderr
        assert "Traceback" not in result.stderr
        assert not b.data.exists()
    assert objects(seaweed, prefix) == before

    b.data.mkdir()
    (b.data / "precious").write_text("x")
    result = b.command("recover", *b.node_options(), "--takeover", stdin=f"{a.recovery_key}\n")
    assert (result.returncode, (b.data / "precious").read_text()) == (2, "x")
    assert "not empty" in result.stderr

    elsewhere = make_node("c", "syd", seaweed.url(f"{prefix}-nothing-here"))
    result = elsewhere.command("recover", *elsewhere.node_options(), stdin=f"{a.recovery_key}\n")
    assert result.returncode == 1
    assert "holds no fleet" in result.stderr


def test_a_live_node_is_not_robbed_and_one_that_was_taken_over_stops_its_apps(node: Node, make_node: MakeNode) -> None:
    assert node.deploy().returncode == 0
    assert node.stop() == 0
    settings = node.data / "node.toml"
    settings.write_text(settings.read_text().replace("lease_ttl_s = 60.0", "lease_ttl_s = 3.0"))
    node.start()
    b = make_node("b", "syd")
    refused = b.command("recover", *b.node_options(), stdin=f"{node.recovery_key}\n")
    assert refused.returncode == 6
    assert "alive" in refused.stderr
    assert "--takeover" in refused.stderr
    assert not b.data.exists()
    b.recover(node.recovery_key, "--takeover")
    assert node.process is not None
    assert node.process.wait(60) != 0
    assert "node b" in node.tail()
    assert [*processes_of(node.data), *processes_of(node.run)] == [], "what may write here has not ended"
    with pytest.raises(OSError):
        node.request("GET", "/")
    b.settled()
    assert b.request("GET", "/")[0] == 200


def test_an_interrupted_recovery_is_run_again_and_comes_to_the_same_end(
    make_node: MakeNode, base_archive: Path, seaweed: SeaweedServer, prefix: str
) -> None:
    a = serving(make_node(), base_archive)
    assert a.deploy().returncode == 0
    for number in range(20):
        assert a.request("POST", "/", json.dumps({"name": "x", "message": str(number)}).encode())[0] == 200
    time.sleep(1.5)
    a.kill()
    a.end_at_once()
    b = make_node("b", "syd")
    chance = random.Random(5)
    for _ in range(7):
        b.launch(*go_on(b), stdin=f"{a.recovery_key}\n")
        time.sleep(chance.uniform(0.3, 2.5))
        b.kill()
    b.start(*go_on(b), stdin=f"{a.recovery_key}\n")
    b.settled()
    assert b.check() == {"integrity": "ok", "rows": 20, "max_id": 20}
    assert len(b.containers()) == 1
    again = b.command("recover", *b.node_options(), "--takeover", stdin=f"{a.recovery_key}\n")
    assert again.returncode == 2
    assert "go on with: minipaas serve" in again.stderr


def go_on(node: Node) -> tuple[str, ...]:
    """What its owner types after an interruption: the same again, until the node says that it is one."""
    if (node.data / "node.toml").exists():
        return ("serve",)
    return ("recover", *node.node_options(), "--takeover")


def test_no_secret_is_in_plain_text_where_it_need_not_be(node: Node, seaweed: SeaweedServer, prefix: str) -> None:
    deploy_library(node)
    time.sleep(1.5)
    token = (node.data / "token").read_text().strip()
    hidden = [SECRET, node.recovery_key]
    for path in node.data.rglob("*"):
        if path.is_file() and "engine" not in path.relative_to(node.data).parts:
            content = path.read_bytes()
            found = [text for text in (*hidden, token, seaweed.secret_key) if text.encode() in content]
            allowed = {"token": [token], "credentials": [seaweed.secret_key]}.get(path.name, [])
            assert [text for text in found if text not in allowed] == [], path
            if found:
                assert path.stat().st_mode & 0o077 == 0, path
    # Below it is the environment of containers, in Podman's own files.
    assert (node.data / "engine").stat().st_mode & 0o077 == 0
    store = bucket_of(seaweed.url(prefix), seaweed)
    for key in objects(seaweed, prefix):
        if not key.startswith("images/blobs/"):
            content = store.get(key)
            assert not [text for text in (*hidden, token, seaweed.secret_key) if text.encode() in content], key
    printed = (
        node.log.read_text()
        + subprocess.run(["ps", "axww", "-o", "args"], capture_output=True, text=True, check=True).stdout
    )
    assert not [text for text in (*hidden, token, seaweed.secret_key) if text in printed]
