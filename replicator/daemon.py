"""The foreground process behind ``replicator replicate``: builds the parts, runs until it is told to stop, ships the last commits.

Owns logging, signals, the program that runs beside it, and the order of starting and stopping. Decides nothing about replication.
"""

from __future__ import annotations

import json
import logging
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from replicator import control, systemd
from replicator.config import Config, DatabaseConfig
from replicator.descriptors import raise_descriptor_limit
from replicator.errors import NothingToRestore, ReplicatorError, SyncTimeout, UsageError
from replicator.heartbeat import Heartbeat
from replicator.litestream.choice import choose
from replicator.litestream.restore import restore as restore_litestream
from replicator.replica import Replica
from replicator.restore import restore
from replicator.restore_plan import RestoreOptions
from replicator.restored import mark_restored
from replicator.roster import Roster
from replicator.service import Replicator, default_state
from replicator.signals import heard
from replicator.store import ObjectStore
from replicator.store.seal import bare
from replicator.values import Position, format_time, printable
from replicator.worker import DatabaseStatus, Protection

if TYPE_CHECKING:
    from replicator.metrics import MetricsServer

log = logging.getLogger("replicator.daemon")

SLICE_S = 2.0
"""How long one wait of ``once`` is, before it looks whether there was progress."""
ANNOUNCE_PAUSE_S = 30.0
"""Between two looks at a database that is not safe yet; its worker goes on by itself meanwhile."""
CLOSING_S = 2.0
"""For letting go of everything when the time for the last commits is used up."""
_AT_START = {
    "exec_command": "exec",
    "socket_enabled": "socket",
    "socket_path": "socket",
    "socket_mode": "socket",
    "sweep_s": "sweep-interval",
    "metrics_address": "addr",
}
"""What is read once, by the name of its key."""


# -- logging -----------------------------------------------------------------------------------------------------------


class _Text(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line = (
            f"{format_time(int(record.created * 1000))} {record.levelname.lower():7} {printable(record.getMessage())}"
        )
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


class _Json(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        fields = {
            "time": format_time(int(record.created * 1000)),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        return json.dumps(fields)


def set_up_logging(level: str, form: str) -> None:
    """To stderr. Libraries below warning are left out: what they say of each request is no change of state."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Json() if form == "json" else _Text())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("watchdog").setLevel(logging.CRITICAL)  # it complains of events that come while it stops
    logging.getLogger("replicator").setLevel(level.upper())


def mention(notes: Iterable[str]) -> None:
    """What the configuration asks for and what happens instead."""
    for note in notes:
        log.warning("%s", note)


# -- what came of it ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """One database at the end. position: durable up to there; None when it is not, and then why."""

    path: Path
    position: Position | None
    reason: str = ""


def _say(outcomes: list[Outcome]) -> bool:
    """One line for each; whether all is durable."""
    for outcome in outcomes:
        if outcome.position is not None:
            log.info("%s: everything is in the store, up to %s", outcome.path, outcome.position)
        else:
            log.error(
                "%s: NOT durable: %s; what is missing waits here for the next start", outcome.path, outcome.reason
            )
    return all(outcome.position is not None for outcome in outcomes)


# -- signals -----------------------------------------------------------------------------------------------------------


class _Signals:
    """The first signal asks to stop, the second ends at once. on_hangup: what SIGHUP does; None to stop."""

    def __init__(self, on_hangup: Callable[[], None] | None = None) -> None:
        self.wanted = threading.Event()
        self.child: subprocess.Popen[bytes] | None = None
        self._on_hangup = on_hangup
        self._told = False

    def handled(self) -> AbstractContextManager[None]:
        return heard((signal.SIGTERM, signal.SIGINT, signal.SIGHUP), self._on_signal)

    def _on_signal(self, number: int) -> None:
        if number == signal.SIGHUP and self._on_hangup is not None:
            self._on_hangup()
            return
        if self._told:
            self._end_child(signal.SIGKILL)
            os._exit(128 + number)
        self._told = True
        self.wanted.set()
        # A terminal sends its interrupt to the child itself.
        if not (number == signal.SIGINT and _at_terminal()):
            self._end_child(number)

    def _end_child(self, number: int) -> None:
        if self.child is not None:
            with suppress(ProcessLookupError):
                self.child.send_signal(number)


def _at_terminal() -> bool:
    return sys.stdin is not None and sys.stdin.isatty()


# -- the process -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RunOptions:
    """What the command line adds. socket_path: None when none was named. log_format: '' for that of the configuration.

    shutdown_timeout_s: None for that of the configuration. load: reads the configuration anew; None when there is no file.
    """

    once: bool = False
    exec_command: str = ""
    socket_path: Path | None = None
    shutdown_timeout_s: float | None = None
    log_format: str = ""
    load: Callable[[], Config] | None = None


class Daemon:
    """One run of ``replicate``. Used by the main thread."""

    def __init__(self, config: Config, options: RunOptions) -> None:
        self._config = config
        self._options = options
        # A terminal that closes ends what runs in it.
        reloads = options.load is not None and not options.once and not _at_terminal()
        self._signals = _Signals(self._reload_soon if reloads else None)
        self._stop_stores = threading.Event()
        self._replicator = Replicator(sweep_s=config.sweep_s)
        self._roster = Roster(self._replicator, self._stop_stores, _prepare)
        self._reloading = threading.Lock()
        self._heartbeat: Heartbeat | None = None
        self._loaded_ms = self._started_ms = _now_ms()
        self._reload_problem = ""

    @property
    def _shutdown_timeout_s(self) -> float:
        given = self._options.shutdown_timeout_s
        return self._config.shutdown_timeout_s if given is None else given

    def run(self) -> int:
        """The exit code: 0 when everything is durable, else 1; that of the program if one ran and did not return 0."""
        command = shlex.split(self._options.exec_command)
        raise_descriptor_limit()
        with self._signals.handled():
            self._replicator.start()
            try:
                self._roster.load(self._config.databases)
            except (ReplicatorError, OSError):
                self._finish([])
                raise
            return self._once() if self._options.once else self._until_told(command)

    # -- until the end of time -----------------------------------------------------------------------------------------

    def _until_told(self, command: list[str]) -> int:
        watchdog = systemd.Watchdog(self._replicator.is_alive)
        servers = self._serve()
        self._beat()
        log.info("replicating %s", ", ".join(str(entry.path) for entry in self._config.databases))
        systemd.notify("READY=1")
        watchdog.start()
        threading.Thread(target=self._announce, name="announce", daemon=True).start()
        try:
            code = self._run_command(command) if command else self._wait()
        finally:
            log.info("stopping")
            systemd.notify("STOPPING=1")
            for server in servers:
                server.close()
            if self._heartbeat is not None:
                self._heartbeat.stop()
        durable = self._finish(self._last_sync())
        watchdog.stop()
        return code if code or durable else 1

    def _serve(self) -> list[control.ControlServer | MetricsServer]:
        servers: list[control.ControlServer | MetricsServer] = []
        try:
            if self._config.metrics_address:
                servers.append(self._serve_metrics(self._config.metrics_address))
            if (socket := self._serve_control()) is not None:
                servers.append(socket)
        except UsageError:
            for server in servers:
                server.close()
            self._finish([])
            raise
        for server in servers:
            server.start()
        return servers

    def _serve_metrics(self, address: str) -> MetricsServer:
        from replicator.metrics import Collector, MetricsServer  # it takes memory that nobody needs without it

        return MetricsServer(address, Collector(self._roster.status, self._roster.meters))

    def _serve_control(self) -> control.ControlServer | None:
        if not self._config.socket_enabled:
            return None
        named = self._options.socket_path or self._config.socket_path
        try:
            return control.ControlServer(
                named or control.default_path(), self._roster, self._config.socket_mode, info=self._info
            )
        except control.SocketInUse as error:
            log.warning("%s; `status` and `sync` will not find this one", error)
            return None
        except UsageError as error:
            if named is not None:
                raise
            log.warning("%s; `status` and `sync` will not find this replicator", error)
            return None

    def _info(self) -> dict[str, Any]:
        return {
            "started": format_time(self._started_ms),
            "config": str(self._config.file) if self._config.file else None,
            "config_loaded": format_time(self._loaded_ms),
            "reload_problem": self._reload_problem,
        }

    def _beat(self) -> None:
        """As the configuration has it now."""
        if self._heartbeat is not None:
            self._heartbeat.stop()
        self._heartbeat = None
        if self._config.heartbeat_url:
            self._heartbeat = Heartbeat(self._config.heartbeat_url, self._config.heartbeat_s, self._is_protected)
            self._heartbeat.start()

    def _is_protected(self) -> bool:
        return all(status.protection is Protection.PROTECTED for status in self._roster.status())

    # -- another configuration -----------------------------------------------------------------------------------------

    def _reload_soon(self) -> None:
        """In a thread of its own: a database may have to be restored first, and a signal to stop must not wait for that."""
        threading.Thread(target=self._reload, name="reload", daemon=True).start()

    def _reload(self) -> None:
        with self._reloading:
            systemd.notify_reloading()
            try:
                self._apply(self._options.load() if self._options.load else self._config)
                self._reload_problem = ""
            except (ReplicatorError, OSError) as error:
                self._reload_problem = str(error)
                log.error("the configuration is not loaded, the one from before stays in use: %s", error)
            finally:
                systemd.notify("READY=1")

    def _apply(self, config: Config) -> None:
        changes = self._roster.reload(config.databases)
        before, self._config, self._loaded_ms = self._config, config, _now_ms()
        set_up_logging(config.log_level, self._options.log_format or config.log_format)
        mention(config.notes)
        if (config.heartbeat_url, config.heartbeat_s) != (before.heartbeat_url, before.heartbeat_s):
            self._beat()
        for name, key in _AT_START.items():
            if getattr(before, name) != getattr(config, name):
                log.warning("%s: a change of %s takes effect at the next start", config.file, key)
        log.info(
            "the configuration is loaded again: %d added, %d changed, %d removed, %d as before",
            changes.added,
            changes.changed,
            changes.removed,
            changes.same,
        )

    # -- how it ends ---------------------------------------------------------------------------------------------------

    def _announce(self) -> None:
        """Say once of each database that is there at the start when it is safe."""
        pending = [status for status in self._replicator.status() if status.path.exists()]
        while pending and not self._signals.wanted.is_set():
            pending = [status for status in pending if not self._is_safe(status)]
            if pending:
                self._signals.wanted.wait(ANNOUNCE_PAUSE_S)

    def _is_safe(self, status: DatabaseStatus) -> bool:
        try:
            position = self._replicator.sync(status.path, ANNOUNCE_PAUSE_S)
        except ReplicatorError:
            return False
        log.info("%s is protected: everything is in %s, up to %s", status.path, status.url, position)
        return True

    def _wait(self) -> int:
        self._signals.wanted.wait()
        return 0

    def _run_command(self, command: list[str]) -> int:
        """The program's exit code; 128 and the signal's number when one ended it, as a shell has it."""
        try:
            child = subprocess.Popen(command)
        except OSError as error:
            self._finish(self._last_sync())
            raise UsageError(f"{command[0]} cannot be run: {error.strerror}") from error
        self._signals.child = child
        if self._signals.wanted.is_set():  # the signal came before there was a child
            child.terminate()
        ended = threading.Event()

        def wait_for_child() -> None:
            child.wait()
            ended.set()
            self._signals.wanted.set()

        threading.Thread(target=wait_for_child, name="exec", daemon=True).start()
        self._signals.wanted.wait()
        if not ended.wait(self._shutdown_timeout_s):
            log.warning("%s does not end within %g s; it is killed", command[0], self._shutdown_timeout_s)
            child.kill()
            ended.wait()
        self._signals.child = None
        code = child.returncode
        log.info("%s has ended with %d", command[0], code)
        return code if code >= 0 else 128 - code

    # -- once ----------------------------------------------------------------------------------------------------------

    def _once(self) -> int:
        outcomes = [self._ship_all(status.path) for status in self._replicator.status()]
        return 0 if self._finish(outcomes) else 1

    def _ship_all(self, path: Path) -> Outcome:
        """Wait as long as there is progress; give up when there was none for the time that a shutdown may take."""
        if not path.exists():
            return Outcome(path, None, "there is no such file")
        seen: object = None
        patience_ends = time.monotonic() + self._shutdown_timeout_s
        while True:
            try:
                return Outcome(path, self._replicator.sync(path, SLICE_S))
            except SyncTimeout as error:
                status = next((known for known in self._replicator.status() if known.path == path), None)
                progress = status and (status.captured, status.durable, status.waiting_bytes)
                stuck = status is None or status.protection is Protection.NOT_PROTECTED
                if progress != seen or not stuck:
                    seen, patience_ends = progress, time.monotonic() + self._shutdown_timeout_s
                if time.monotonic() > patience_ends or self._signals.wanted.is_set():
                    return Outcome(path, None, str(error))
            except ReplicatorError as error:
                return Outcome(path, None, str(error))

    # -- the end -------------------------------------------------------------------------------------------------------

    def _last_sync(self) -> list[Outcome]:
        deadline = time.monotonic() + self._shutdown_timeout_s
        paths = [status.path for status in self._replicator.status() if status.path.exists()]
        if not paths:
            return []
        with ThreadPoolExecutor(min(32, len(paths)), thread_name_prefix="last-sync") as pool:
            return list(pool.map(lambda path: self._synced(path, deadline), paths))

    def _synced(self, path: Path, deadline: float) -> Outcome:
        try:
            return Outcome(path, self._replicator.sync(path, max(0.1, deadline - time.monotonic())))
        except ReplicatorError as error:
            return Outcome(path, None, str(error))

    def _finish(self, outcomes: list[Outcome]) -> bool:
        """Let go of everything; whether all is durable. What a commit in the very last moment missed counts too."""
        late = {found.path: found.reason for found in self._replicator.stop(CLOSING_S)}
        self._stop_stores.set()
        known = {outcome.path for outcome in outcomes}
        outcomes = [
            Outcome(outcome.path, None, late[outcome.path]) if outcome.position and outcome.path in late else outcome
            for outcome in outcomes
        ]
        return _say(outcomes + [Outcome(path, None, reason) for path, reason in late.items() if path not in known])


def _prepare(entry: DatabaseConfig, store: ObjectStore) -> None:
    if entry.restore_if_missing:
        restore_if_missing(entry, store)


def restore_if_missing(entry: DatabaseConfig, store: ObjectStore) -> None:
    """Restore a database that is not there, from a replica that is, ours or Litestream's. Raises RestoreError, StoreError."""
    if entry.path.exists():
        return
    chosen = choose(store)
    if chosen.besides:
        log.warning("%s: %s", entry.path, chosen.besides)
    if chosen.is_litestream:
        found = restore_litestream(bare(store), entry.path, RestoreOptions())
        reached = format_time(found.reached_ms)
        log.info("%s was not there; restored from Litestream's replica to %s, %s", entry.path, found.position, reached)
        return
    try:
        report = restore(store, entry.path, RestoreOptions())
    except NothingToRestore:
        log.info("%s is not there, and neither is a replica of it; it begins anew", entry.path)
        return
    timeline = Replica(store).timelines()[report.position.timeline]
    mark_restored(entry.state or default_state(entry.path), report, timeline)
    log.info("%s was not there; restored to %s, %s", entry.path, report.position, format_time(report.reached_ms))


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


def end_process(code: int) -> None:
    """End although uploads may hang: their threads are not waited for, since what they have is in the spool."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
