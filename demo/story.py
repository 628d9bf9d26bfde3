"""The story: a host with an app is lost while people write to it, and an empty host elsewhere takes its place.

Owns the order of events and the measurements; hosts, load, verdict and layout have their own modules. ``tell`` can be called by
a test as well as by ``make demo``.
"""

from __future__ import annotations

import fcntl
import http.client
import json
import os
import re
import secrets
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from demo import commands
from demo.commands import HOSTNAME, HTTP_PORT, Bucket
from demo.host import Host
from demo.lab import Lab, check_allowed, wait_until
from demo.screen import Screen, Step
from demo.seaweed import SeaweedServer
from demo.verdict import Recovery, Row, Summary, judge
from demo.writer import Ledger, Writer, get_json
from images.make_base import make_base
from minipaas.access import token_path

CACHE = commands.REPOSITORY / ".cache"
POLL_S = 0.05
PAGE = 1000

READY_WITHIN_S = 60.0
DEPLOY_WITHIN_S = 300.0
ANSWER_WITHIN_S = 120.0
QUESTION_S = 30.0
DETAIL_WIDTH = 60
LOGGED = re.compile(r"\d{4}-\d\d-\d\d ")
AFTER_POWER_OFF_S = 0.5
"""How long the writer goes on after the power went."""


class StoryError(Exception):
    """The story cannot go on; the message says at which step, why, and where the log is, on one line."""


@dataclass(frozen=True)
class Loss:
    """The end of host a. power_off_s: monotonic."""

    ledger: Ledger
    power_off_s: float


# -- small steps -------------------------------------------------------------------------------------------------------


def last_line(log: Path) -> str:
    """Why a command ended, as it said itself."""
    lines = log.read_text(errors="replace").strip().splitlines() if log.exists() else []
    return lines[-1].lstrip("-> ") if lines else "it said nothing"


def news(log: Path) -> str:
    """What a command is doing: the last of its lines that is meant for people, or the last operation in its log."""
    for line in reversed(log.read_text(errors="replace").splitlines()):
        before, operation, what = line.partition(" operation=")
        if operation:
            return what[:DETAIL_WIDTH]
        if before.strip() and not LOGGED.match(before):
            return before.lstrip("-> ")[:DETAIL_WIDTH]
    return ""


def answers(host: Host) -> bool:
    """Whether guestbook gives a good answer on this host now."""
    try:
        return isinstance(get_json(host.address, HTTP_PORT, HOSTNAME, "/entries?after=0&limit=1", 2.0), dict)
    except (OSError, http.client.HTTPException, ValueError):
        return False


def api_answers(host: Host) -> bool:
    """Whether the API inside answers at all; it may well ask for the token."""
    try:
        return ask_api(host, "/v1/status", "")[0] < 500
    except (OSError, http.client.HTTPException):
        return False


def ask_api(host: Host, path: str, token: str) -> tuple[int, bytes]:
    """Status and body. Raises OSError, HTTPException."""
    connection = http.client.HTTPConnection("127.0.0.1", commands.API_PORT, timeout=2.0)
    connection.sock = host.connect(commands.API_PORT, 2.0)
    try:
        connection.request("GET", path, headers={"Authorization": f"Bearer {token}"} if token else {})
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def protection(host: Host) -> str:
    """How safe guestbook's database is, in the platform's words; '' when it cannot be asked now."""
    try:
        status, body = ask_api(host, "/v1/status", token_path(host.disk / "data").read_text().strip())
        databases = json.loads(body)["databases"] if status == 200 else []
        return next((str(entry["words"]) for entry in databases if entry["app"] == commands.APP), "")
    except (OSError, http.client.HTTPException, ValueError, KeyError):
        return ""


def ask(host: Host, path: str) -> dict[str, object]:
    """The JSON that guestbook answers. Raises StoryError."""
    try:
        answer = get_json(host.address, HTTP_PORT, HOSTNAME, path, QUESTION_S)
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise StoryError(f"guestbook on {host.name} does not answer {path}: {error}") from error
    if not isinstance(answer, dict):
        raise StoryError(f"guestbook on {host.name} answered {path} with something else than an object: {answer!r}")
    return answer


def read_rows(host: Host) -> list[Row]:
    """All entries of guestbook, in order of id."""
    rows: list[Row] = []
    while True:
        after = rows[-1].id if rows else 0
        entries = ask(host, f"/entries?after={after}&limit={PAGE}").get("entries")
        if not isinstance(entries, list):
            raise StoryError(f"guestbook on {host.name} answered something else than entries: {entries!r}")
        if not entries:
            return rows
        rows += [Row(int(entry["id"]), str(entry["message"])) for entry in entries]


def read_integrity(host: Host) -> str:
    """What ``PRAGMA integrity_check`` says inside the app."""
    return str(ask(host, "/check").get("integrity"))


def base_archive(step: Step) -> Path:
    """The base image that guestbook is built on, as an archive; made once, then kept in the cache."""
    archive = CACHE / "debian-python-bookworm.tar"
    CACHE.mkdir(exist_ok=True)
    with open(CACHE / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if archive.exists():
            step.result("from .cache")
            return archive
        for unfinished in CACHE.glob(".base-*"):
            shutil.rmtree(unfinished)
        return make_base(archive, on_line=lambda line: step.detail(line[:DETAIL_WIDTH]))


# -- the steps ---------------------------------------------------------------------------------------------------------


@contextmanager
def bucket_on(lab: Lab, screen: Screen) -> Iterator[Bucket]:
    folder = lab.folder / "s3"
    folder.mkdir()
    server = SeaweedServer(
        ip=lab.gateway,
        data_dir=folder,
        bucket="fleet",
        access_key=secrets.token_hex(10),
        secret_key=secrets.token_hex(20),
    )
    with screen.step("S3 server, as your bucket") as step:
        server.start()
        step.result(server.endpoint)
    try:
        yield Bucket(
            server.url("minipaas"), server.endpoint.removeprefix("http://"), server.access_key, server.secret_key
        )
    finally:
        if server.pid is not None:
            os.kill(server.pid, signal.SIGKILL)  # its data is thrown away: nothing needs the ten seconds of a clean end
        server.stop()


def set_up(host: Host, bucket: Bucket) -> str:
    """The recovery key, which is shown this once."""
    done = host.run(commands.setup(host, bucket), env=commands.environment(bucket))
    try:
        return str(json.loads(done.stdout)["recovery_key"])
    except (ValueError, KeyError):
        raise StoryError(f"minipaas setup on host {host.name} did not print its recovery key as JSON") from None


def start_node(host: Host, bucket: Bucket, logs: Path) -> str:
    """A new fleet with one node; its recovery key. Returns when the API answers."""
    log = logs / f"{host.name}-serve.log"
    check_way_to_bucket(host, bucket)
    recovery_key = set_up(host, bucket)
    process = host.popen(commands.serve(), env=commands.environment(bucket), log=log)

    def settled() -> bool:
        return process.poll() is not None or api_answers(host)

    if not wait_until(settled, READY_WITHIN_S, POLL_S) or process.poll() is not None:
        raise StoryError(f"minipaas serve on host {host.name} is not ready: {last_line(log)} (log: {log})")
    return recovery_key


def check_way_to_bucket(host: Host, bucket: Bucket) -> None:
    """Raises StoryError when the firewall of this machine stands between its hosts and the S3 server."""
    code = "import socket, sys; socket.create_connection((sys.argv[1], int(sys.argv[2])), 5).close()"
    done = host.run([sys.executable, "-I", "-c", code, bucket.address, str(bucket.port)], check=False)
    if done.returncode != 0:
        raise StoryError(
            f"host {host.name} cannot reach {bucket.address}:{bucket.port} on this machine: "
            "let the firewall accept traffic from interfaces named mpd*"
        )


def deploy_guestbook(host: Host, base: Path, step: Step, logs: Path) -> None:
    log = logs / f"{host.name}-deploy.log"
    for command in (commands.load_image(base), commands.deploy()):
        process = host.popen(command, env=commands.environment(), log=log)
        deadline = time.monotonic() + DEPLOY_WITHIN_S
        while process.poll() is None:
            step.detail(news(log))
            if time.monotonic() > deadline:
                raise StoryError(f"the deploy on {host.name} took more than {DEPLOY_WITHIN_S:.0f} s (log: {log})")
            time.sleep(POLL_S)
        if process.wait(1.0) != 0:
            raise StoryError(f"the deploy on {host.name} failed: {last_line(log)} (log: {log})")
    step.result(f"http://{HOSTNAME}")


def write_for(writer: Writer, host: Host, seconds: float, step: Step) -> None:
    """Let the load run, and show what is acknowledged and how far it is protected."""
    end_s = time.monotonic() + seconds
    while (now_s := time.monotonic()) < end_s:
        words = protection(host) if now_s > end_s - seconds + 1 else ""
        step.detail(f"{writer.count} acknowledged" + (f" · {words}" if words else ""))
        time.sleep(min(0.25, max(0.0, end_s - time.monotonic())))


def pull_the_plug(host: Host, writer: Writer, step: Step) -> Loss:
    """Everything of the host dies at once, while the writer goes on for a moment and hears nothing more."""
    power_off_s = host.power_off()
    time.sleep(AFTER_POWER_OFF_S)
    ledger = writer.stop()
    step.result(f"after {len(ledger.acknowledged)} acknowledged rows")
    return Loss(ledger, power_off_s)


def recover_on(host: Host, bucket: Bucket, recovery_key: str, step: Step, logs: Path) -> tuple[float, float]:
    """Monotonic times of the command's start and of the first good answer."""
    log = logs / f"{host.name}-recover.log"
    check_way_to_bucket(host, bucket)
    command_s = time.monotonic()
    process = host.popen(
        commands.recover(host, bucket),
        env=commands.environment(bucket),
        stdin=f"{recovery_key}\n".encode(),
        log=log,
    )
    deadline = command_s + ANSWER_WITHIN_S
    while not answers(host):
        step.detail(news(log))
        if process.poll() is not None:
            raise StoryError(f"minipaas recover on host {host.name} ended: {last_line(log)} (log: {log})")
        if time.monotonic() > deadline:
            raise StoryError(f"guestbook gave no answer on {host.name} in {ANSWER_WITHIN_S:.0f} s (log: {log})")
        time.sleep(POLL_S)
    first_answer_s = time.monotonic()
    step.result("guestbook answers")
    return command_s, first_answer_s


# -- the whole ---------------------------------------------------------------------------------------------------------


def tell(screen: Screen, *, writing_s: float = 20.0, rate: float = 50.0, logs: Path = CACHE / "demo") -> Summary:
    """The whole story. Raises StoryError, LabError, SeaweedError when it cannot be told to the end.

    logs: folder for what the commands print; what an earlier run left there is removed.
    """
    check_allowed()
    shutil.rmtree(logs, ignore_errors=True)
    logs.mkdir(parents=True)
    with screen.step("Base image of guestbook") as step:
        base = base_archive(step)
    with Lab() as lab, bucket_on(lab, screen) as bucket:
        with Host("a", region="ams", lab=lab) as a:
            with screen.step(f"Node a starts in ams, on {a.address}"):
                recovery_key = start_node(a, bucket, logs)
            with screen.step("guestbook is built and deployed on a") as step:
                deploy_guestbook(a, base, step, logs)
            loss = write_and_lose(a, screen, writing_s, rate)
        with Host("b", region="syd", lab=lab) as b:
            with screen.step("minipaas recover on b, an empty host in syd") as step:
                command_s, first_answer_s = recover_on(b, bucket, recovery_key, step, logs)
            with screen.step("guestbook on b is asked for all its rows") as step:
                rows, integrity = read_rows(b), read_integrity(b)
                step.result(f"{len(rows)} rows")
    return judge(loss.ledger, Recovery(loss.power_off_s, command_s, first_answer_s, integrity, rows))


def write_and_lose(host: Host, screen: Screen, writing_s: float, rate: float) -> Loss:
    writer = Writer(host.address, HTTP_PORT, HOSTNAME, rate=rate)
    try:
        with screen.step(f"{rate:.0f} rows a second are written") as step:
            if not wait_until(lambda: answers(host), ANSWER_WITHIN_S, POLL_S):
                raise StoryError(f"guestbook does not answer on {host.address}:{HTTP_PORT} though its deploy succeeded")
            writer.start()
            write_for(writer, host, writing_s, step)
        with screen.step(f"Host {host.name} loses power while they write") as step:
            return pull_the_plug(host, writer, step)
    finally:
        writer.stop()


def summary_rows(summary: Summary) -> list[tuple[str, str, str]]:
    """What, value, and what exactly was measured."""
    last = summary.last_moment_s
    moment = datetime.fromtimestamp(last, UTC).strftime("%H:%M:%S.%f")[:-3] + " UTC" if last else "none"
    return [
        ("Rows acknowledged", str(summary.acknowledged), "their ids were returned"),
        ("Rows recovered", str(summary.recovered), "guestbook on b returns them"),
        ("Last moment recovered", moment, "acknowledgement of the last recovered row"),
        ("RPO", f"{summary.rpo_s:.2f} s", "from that moment to the power cut"),
        ("RTO", f"{summary.rto_s:.1f} s", "from typing recover to the first good answer"),
        ("Integrity", summary.integrity, "PRAGMA integrity_check on b"),
        ("Gapless prefix", "yes" if summary.gapless else "NO", "ids 1, 2, 3 …, content as sent"),
    ]


def verdict(summary: Summary) -> str:
    if summary.good:
        return "Good: the host is gone, and guestbook is back with everything up to the last moment."
    return "NOT good: " + "; ".join(summary.problems)
