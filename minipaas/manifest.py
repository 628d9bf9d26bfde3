"""minipaas.toml and fly.toml as one typed value, with the line of everything that is wrong.

Owns the keys, their defaults and limits (fly's, where fly has the key). Never builds, deploys or asks anybody.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import msgspec

from minipaas.errors import BadName, ManifestError
from minipaas.model import check_name
from minipaas.toml_table import TomlSource, TomlTable

FILE_NAMES = ("minipaas.toml", "fly.toml")
MAX_BYTES = 64 * 1024
SIGNALS = ("SIGINT", "SIGTERM", "SIGQUIT", "SIGUSR1", "SIGUSR2", "SIGKILL")
EXAMPLE = """app = "guestbook"
[http_service]
internal_port = 8080
[[mounts]]
source = "data"
destination = "/data"
"""

_SIZE = re.compile(r"(\d+)\s*(?:(gb|gib|g)|(mb|mib|m))?", re.IGNORECASE)
_ENV_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_VOLUME_NAME = re.compile(r"[a-z0-9_]{1,30}")
_KERNEL_DIRS = frozenset({"proc", "sys", "dev"})
_SYSTEM_DIRS = frozenset({"etc", "usr", "bin", "sbin", "lib", "lib32", "lib64", "libx32", "run", "boot"})
_SYSTEM_SUBDIRS = frozenset({("usr", each) for each in ("bin", "sbin", "lib", "lib64", "local", "share")})
USUAL_GROUP = "app"
_METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")


# -- the value ---------------------------------------------------------------------------------------------------------


class Build(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where the image comes from. dockerfile, ignorefile: relative to the manifest. image: used as it is, nothing is built."""

    dockerfile: str | None = None
    image: str | None = None
    target: str | None = None
    args: dict[str, str] = {}
    ignorefile: str | None = None


class Check(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A question that a healthy machine answers. type: 'tcp' or 'http'. port: inside the container."""

    name: str
    type: str
    port: int
    interval_s: float = 15.0
    timeout_s: float = 10.0
    grace_period_s: float = 0.0
    method: str = "GET"
    path: str = "/"
    headers: dict[str, str] = {}


class HttpService(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """internal_port: where the app listens inside its container. checks: those that decide whether requests may come."""

    internal_port: int = 8080
    force_https: bool = False
    min_machines_running: int = 0
    processes: tuple[str, ...] = ()
    checks: tuple[Check, ...] = ()


class Mount(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """source: name of the volume. destination: absolute path in the container. initial_size_mb: what the user asked for."""

    source: str
    destination: str
    initial_size_mb: int | None = None
    processes: tuple[str, ...] = ()


class Deploy(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """wait_timeout_s: how long a new machine may take until it is healthy; None for the platform's usual time."""

    wait_timeout_s: float | None = None


class Manifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything that an app asks for. app: None when the command line names it."""

    app: str | None = None
    primary_region: str | None = None
    kill_signal: str = "SIGINT"
    kill_timeout_s: float = 5.0
    build: Build = Build()
    env: dict[str, str] = {}
    http_service: HttpService | None = None
    mounts: tuple[Mount, ...] = ()
    checks: tuple[Check, ...] = ()
    deploy: Deploy = Deploy()

    def to_json(self) -> str:
        return msgspec.json.encode(self).decode()

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """Raises ManifestError for anything that this release would not have written."""
        try:
            return msgspec.json.decode(text, type=cls)
        except msgspec.MsgspecError as error:
            raise ManifestError(
                f"a stored manifest cannot be read by this release of minipaas ({error}); it was probably written by a newer "
                "one: upgrade minipaas"
            ) from error


# -- files -------------------------------------------------------------------------------------------------------------


def look(directory: Path) -> Path | None:
    """The manifest of a source directory, None when it has none."""
    return next((directory / name for name in FILE_NAMES if (directory / name).is_file()), None)


def find(directory: Path) -> Path:
    """The manifest of a source directory. Raises ManifestError that says how to write one."""
    found = look(directory)
    if found is None:
        raise ManifestError(
            f"{directory.absolute()} has neither minipaas.toml nor fly.toml; write one (`minipaas deploy --help` shows it), "
            "or name the app with --app"
        )
    return found


def read(path: Path) -> str:
    """The text of a manifest. Raises ManifestError."""
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise ManifestError(f"{path}:1: cannot be read: {error.strerror}") from error
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ManifestError(f"{path}:{line}: this is not UTF-8 text; save the file as UTF-8") from error


def load(path: Path) -> tuple[Manifest, tuple[str, ...]]:
    """The manifest in a file, and warnings. Raises ManifestError."""
    return parse(read(path), str(path))


def parse(text: str, file: str) -> tuple[Manifest, tuple[str, ...]]:
    """The manifest in a text, and warnings. file: its name, for messages. Raises ManifestError."""
    if len(text.encode()) > MAX_BYTES:
        raise ManifestError(
            f"{file}:1: the file is larger than {MAX_BYTES // 1024} KiB; a manifest is never that large"
        )
    try:
        document = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        # Not only TOMLDecodeError: a number of 5000 digits and a list 1000 deep are legal TOML.
        raise ManifestError(_syntax_error(str(error), text, file)) from error
    source = TomlSource(text, file)
    manifest = _manifest(TomlTable(source, (), document))
    return manifest, tuple(source.warnings)


def _syntax_error(message: str, text: str, file: str) -> str:
    at = re.search(r" \(at (?:line (\d+), column (\d+)|end of document)\)$", message)
    if at is None:
        return f"{file}:1: {message}"
    what = message[: at.start()]
    if at[1]:
        return f"{file}:{at[1]}: {what} (column {at[2]})"
    return f"{file}:{max(1, len(text.splitlines()))}: {what} at the end of the file"


# -- the keys ----------------------------------------------------------------------------------------------------------


def _manifest(root: TomlTable) -> Manifest:
    http = _http_service(root.table("http_service"))
    manifest = Manifest(
        app=_app(root),
        primary_region=root.text("primary_region"),
        kill_signal=root.one_of("kill_signal", SIGNALS) or "SIGINT",
        kill_timeout_s=_or(root.duration("kill_timeout", 0, 300, bare="s"), 5.0),
        build=_build(root.table("build")),
        env=_env(root),
        http_service=http,
        mounts=_mounts(root.tables("mounts")),
        checks=_named_checks(root.table("checks"), http.internal_port if http else None),
        deploy=_deploy(root.table("deploy")),
    )
    root.unserved("processes", "services", "vm", "restart", "metrics", "statics", "files", "experimental")
    root.unserved("swap_size_mb", "console_command", "machine_checks", "host_dedication_id", "paas")
    root.close()
    return manifest


def _or(value: float | None, default: float) -> float:
    return default if value is None else value


def _app(root: TomlTable) -> str | None:
    name = root.text("app")
    if name is not None:
        try:
            check_name(name)
        except BadName as error:
            root.fail("app", str(error))
    return name


def _build(table: TomlTable | None) -> Build:
    if table is None:
        return Build()
    build = Build(
        dockerfile=_inside(table, "dockerfile"),
        image=table.text("image"),
        target=table.text("build-target"),
        args=table.pairs("args"),
        ignorefile=_inside(table, "ignorefile"),
    )
    if build.image and build.dockerfile:
        table.fail("image", "expected either image or dockerfile, found both; remove one")
    table.unserved("builder", "buildpacks", "builtin", "settings", "compose", "compression", "compression_level")
    table.close()
    return build


def _inside(table: TomlTable, key: str) -> str | None:
    """A path relative to the source directory, that stays in it: only that directory travels to the server."""
    path = table.text(key)
    if path is not None and (path.startswith("/") or ".." in path.split("/")):
        table.wrong(key, "a path inside the source directory, relative to it")
    return path


def _env(root: TomlTable) -> dict[str, str]:
    table, env = root.table("env"), root.pairs("env")
    for name in env:
        assert table is not None
        if not _ENV_NAME.fullmatch(name):
            table.fail(name, "a variable's name has letters, digits and underscores, and does not begin with a digit")
        if name.upper().startswith(("FLY_", "MINIPAAS_")):
            table.fail(name, "names that begin with FLY_ or MINIPAAS_ are set by the platform; choose another name")
    return env


def _http_service(table: TomlTable | None) -> HttpService | None:
    if table is None:
        return None
    port = table.whole("internal_port", 1, 65535) or 8080
    checks = enumerate(table.tables("checks"))
    service = HttpService(
        internal_port=port,
        force_https=table.flag("force_https"),
        min_machines_running=_min_machines(table),
        processes=_processes(table),
        checks=tuple(_check(check, f"http-{number}", "http", port) for number, check in checks),
    )
    if service.force_https:
        table.warn("force_https", "is not served yet: apps are reached over plain HTTP")
    table.unserved("auto_stop_machines", "auto_start_machines", "concurrency", "http_options", "tls_options")
    table.unserved("machine_checks")
    table.close()
    return service


def _min_machines(table: TomlTable) -> int:
    count = table.whole("min_machines_running", 0, 100) or 0
    if count > 1:
        table.warn("min_machines_running", "is accepted, but one machine runs, and always")
    return count


def _named_checks(table: TomlTable | None, default_port: int | None) -> tuple[Check, ...]:
    checks = []
    for name in table.keys if table else ():
        assert table is not None
        check = table.table(name)
        assert check is not None
        kind = check.one_of("type", ("tcp", "http"))
        if kind is None:
            check.fail("", "expected the key type, tcp or http; it is missing")
        port = check.whole("port", 1, 65535) or default_port
        if port is None:
            check.fail("", "expected the key port; it is missing and there is no http_service to take it from")
        check.unserved("processes")
        checks.append(_check(check, name, kind, port))
    return tuple(checks)


def _check(table: TomlTable, name: str, kind: str, port: int) -> Check:
    check = Check(
        name=name,
        type=kind,
        port=port,
        interval_s=_or(table.duration("interval", 1, 3600, bare="ms"), 15.0),
        timeout_s=_or(table.duration("timeout", 0.1, 60, bare="ms"), 10.0),
        grace_period_s=_or(table.duration("grace_period", 0, 3600, bare="ms"), 0.0),
    )
    if "interval" in table:
        table.warn("interval", "is accepted, but a check is not repeated once the machine is healthy")
    if kind == "http":
        check = _http_part(table, check)
    table.unserved("protocol", "tls_skip_verify", "tls_server_name")
    table.close()
    return check


def _http_part(table: TomlTable, check: Check) -> Check:
    method = table.text("method") or "GET"
    if method.upper() not in _METHODS:
        table.wrong("method", f"one of {', '.join(_METHODS)}")
    path = table.text("path") or "/"
    if not re.fullmatch(r"/[\x21-\x7e]*", path):
        table.wrong("path", "a path that begins with / and has no spaces")
    headers = table.pairs("headers")
    for name, value in headers.items():
        if not re.fullmatch(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+", name) or not re.fullmatch(r"[\t\x20-\x7e]*", value):
            table.fail("headers", f"{name} is not a header that HTTP can carry")
    return msgspec.structs.replace(check, method=method.upper(), path=path, headers=headers)


def _mounts(tables: list[TomlTable]) -> tuple[Mount, ...]:
    mounts: list[Mount] = []
    for table in tables:
        mount = _mount(table)
        for key in ("source", "destination"):
            if any(getattr(mount, key) == getattr(other, key) for other in mounts):
                table.fail(key, f"{getattr(mount, key)} is mounted twice; each mount needs its own {key}")
        mounts.append(mount)
    return tuple(mounts)


def _mount(table: TomlTable) -> Mount:
    source, destination = table.text("source"), table.text("destination")
    if source is None or destination is None:
        table.fail("", f"expected the keys source and destination; {'destination' if source else 'source'} is missing")
    if not _VOLUME_NAME.fullmatch(source):
        table.wrong("source", "a volume's name, at most 30 lower-case letters, digits and underscores")
    size_mb = _size_mb(table)
    mount = Mount(
        source=source,
        destination=_destination(table, destination),
        initial_size_mb=size_mb,
        processes=_processes(table),
    )
    table.unserved("snapshot_retention", "scheduled_snapshots")
    table.unserved("auto_extend_size_threshold", "auto_extend_size_increment", "auto_extend_size_limit")
    table.close()
    return mount


def _destination(table: TomlTable, text: str) -> str:
    """Where a volume may be without hiding what the container itself needs to run."""
    parts = text.split("/")
    inner = [part for part in parts if part]
    if parts[0] or not inner or {"..", "."} & set(parts) or ":" in text or not text.isprintable():
        table.wrong("destination", "an absolute path in the container, without colons and controls, other than /")
    if inner[0] in _KERNEL_DIRS or (len(inner) == 1 and inner[0] in _SYSTEM_DIRS) or tuple(inner) in _SYSTEM_SUBDIRS:
        table.fail(
            "destination",
            f"a volume at {text} hides what the container runs from; choose a folder of its own, such as /data",
        )
    return "/" + "/".join(inner)


def _processes(table: TomlTable) -> tuple[str, ...]:
    """The groups that a table is for. There is one, and a table for others is served for it all the same."""
    groups = table.texts("processes")
    if groups not in ((), (USUAL_GROUP,)):
        table.warn(
            "processes", f"is accepted, but there is one group, {USUAL_GROUP}: what this table asks for is done for it"
        )
    return groups


def _size_mb(table: TomlTable) -> int | None:
    expected = 'a size such as "10gb" (a bare number is in GB)'
    value = table.take("initial_size", expected, str, int)
    if value is None:
        return None
    match = _SIZE.fullmatch(str(value).strip())
    if match is None or int(match[1]) == 0 or len(match[1]) > 9:
        table.wrong("initial_size", expected)
    table.warn("initial_size", "is noted but not enforced: a volume may use what the disk has")
    return int(match[1]) if match[3] else int(match[1]) * 1024


def _deploy(table: TomlTable | None) -> Deploy:
    if table is None:
        return Deploy()
    deploy = Deploy(wait_timeout_s=table.duration("wait_timeout", 1, 86400, bare="s"))
    table.unserved("strategy", "max_unavailable", "release_command", "release_command_timeout", "release_command_vm")
    table.unserved("seed_command")
    table.close()
    return deploy
