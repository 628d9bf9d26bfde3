"""Every key of the configuration file: its type, its meaning, and for Litestream's keys that do nothing here, what happens instead.

Owns the one table that the parser, the messages and docs/replicator.md are made from. Never reads a file.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Kind = Literal[
    "text",
    "secret",
    "path",
    "duration",
    "count",
    "flag",
    "octal",
    "level",
    "format",
    "type",
    "section",
    "sections",
    "texts",
]


@dataclass(frozen=True)
class Key:
    """meaning: for the docs. instead: a key that is accepted, but what happens is this. refused: why it cannot be accepted."""

    name: str
    kind: Kind
    meaning: str = ""
    instead: str = ""
    refused: str = ""
    section: tuple[Key, ...] = field(default=(), repr=False)


def _unused(kind: Kind, instead: str, *names: str, section: tuple[Key, ...] = ()) -> tuple[Key, ...]:
    return tuple(Key(name, kind, instead=instead, section=section) for name in names)


_OTHER_STORE = "belongs to a kind of store that is not built yet; replicas go to s3 or file"
_S3_CLIENT = "the S3 client decides this by itself"
_NO_SERVER = "not built yet: nothing listens there"
_CUSTOMER_KEYS = (
    "encryption with your own key in the bucket is not built yet; set the bucket's default encryption instead"
)

_SNAPSHOT = Key(
    "snapshot",
    "section",
    "when snapshots are taken, and the window in which every moment can be restored",
    section=(
        Key(
            "interval",
            "duration",
            "a snapshot is taken this often of a database that changes noticeably; sooner when the changes outweigh it. Default 24h",
        ),
        Key("retention", "duration", "the window: what it does not need is deleted. Default 7d"),
    ),
)

AGE_KEYS: tuple[Key, ...] = (
    Key(
        "recipients",
        "texts",
        "`age1…`: what is written from now on can be opened by the identity of each of them; at most 6",
    ),
    Key(
        "identities",
        "texts",
        "`AGE-SECRET-KEY-1…`: open what is stored; one of them at least belongs to a recipient, since what is written is read back too",
    ),
    Key("identity-file", "path", "file with identities, one a line, as age-keygen writes it; ours, not Litestream's"),
)

STORE_KEYS: tuple[Key, ...] = (
    Key(
        "access-key-id",
        "secret",
        "of the store; else LITESTREAM_ACCESS_KEY_ID, AWS_ACCESS_KEY_ID, the AWS files or the instance's role",
    ),
    Key("secret-access-key", "secret", "belongs to access-key-id"),
    Key("bucket", "text", "name of the S3 bucket"),
    Key("endpoint", "text", "of an S3 server that is not Amazon's, such as `https://s3.example.com`"),
    Key("region", "text", "of the bucket"),
    Key("force-path-style", "flag", "`https://host/bucket` instead of `https://bucket.host`; found out when not given"),
    Key(
        "sync-interval",
        "duration",
        "under an endless stream of commits one segment leaves in this time; a single commit leaves at once. Default 1s",
    ),
    Key(
        "put-budget",
        "section",
        "how many segments may leave, all databases of this replica taken together; ours, not Litestream's. Default no limit",
        section=(
            Key("per-hour", "count", "so many on average; what must wait longer joins the commits after it"),
            Key("burst", "count", "so many at once after a pause. Default 100"),
        ),
    ),
    Key("age", "section", "encryption of all that is stored; its keys are below", section=AGE_KEYS),
    Key(
        "validation-interval",
        "duration",
        "the replica is restored for a trial this often (see Proof); 0 for never. Default: `interval` of `validation`",
    ),
    *_unused("count", "a segment ends at the first commit after 64 MiB of WAL", "max-sync-ltx-files"),
    *_unused("flag", "local state that is damaged is always set aside, and a new timeline begins", "auto-recover"),
    *_unused("flag", _S3_CLIENT, "sign-payload", "require-content-md5", "sign-accept-encoding"),
    *_unused("flag", "certificates are always verified; name the authority in AWS_CA_BUNDLE", "skip-verify"),
    *_unused("text", _S3_CLIENT, "part-size"),
    *_unused("count", "all databases share 16 uploads", "concurrency"),
    *_unused("text", "objects get the bucket's default class", "storage-class"),
    *(
        Key(name, "secret", refused=_CUSTOMER_KEYS)
        for name in ("sse-customer-algorithm", "sse-customer-key", "sse-customer-key-path", "sse-kms-key-id")
    ),
    *_unused(
        "secret",
        _OTHER_STORE,
        "account-name",
        "account-key",
        "sas-token",
        "host",
        "user",
        "password",
        "key-path",
        "host-key",
    ),
    *_unused("secret", _OTHER_STORE, "webdav-url", "webdav-username", "webdav-password"),
    *_unused("secret", _OTHER_STORE, "jwt", "seed", "creds", "nkey", "username", "token", "client-cert", "client-key"),
    *_unused("flag", _OTHER_STORE, "concurrent-writes", "tls"),
    *_unused("texts", _OTHER_STORE, "root-cas"),
    *_unused("count", _OTHER_STORE, "max-reconnects"),
    *_unused("duration", _OTHER_STORE, "reconnect-wait", "timeout"),
)
"""Of a replica, and at the top of the file for all replicas."""

REPLICA_KEYS: tuple[Key, ...] = (
    Key(
        "url",
        "text",
        "where the replica is: `s3://bucket/prefix?endpoint=…&region=…` or `file:///folder`; or the keys below",
    ),
    Key("type", "type", "`s3` or `file`; known from the others when not given"),
    Key("path", "text", "prefix in the bucket, or the folder of a `file` replica"),
    *STORE_KEYS,
    *_unused("text", "a database has one replica, which needs no name", "name"),
)

DATABASE_KEYS: tuple[Key, ...] = (
    Key("path", "path", "the database file; it need not exist yet"),
    Key("dir", "path", "a folder, instead of `path`: every database in it is replicated, those that appear later too"),
    Key("pattern", "text", "of file names in `dir`, such as `*.db`. Default `*`: whatever is an SQLite database"),
    Key("recursive", "flag", "`dir` with all folders in it. Default false"),
    Key("watch", "flag", "`dir` is always watched, so that this is always true"),
    Key("replica", "section", "where to; its keys are below", section=REPLICA_KEYS),
    Key("replicas", "sections", "the same as a list of one, as older files have it", section=REPLICA_KEYS),
    Key("meta-path", "path", "folder for our local state. Default `.NAME-replicator` beside the database"),
    Key("meta-dir", "path", "the same for `dir`, with a folder for each database in it"),
    Key(
        "checkpoint-interval",
        "duration",
        "a WAL is written back to the database after this long without a commit; 0 for never. Default 1m",
    ),
    Key(
        "min-checkpoint-page-count", "count", "a WAL is written back and started anew after so many pages. Default 1000"
    ),
    Key(
        "restore-if-db-not-exists",
        "flag",
        "`replicate` restores the database first when there is none at `path`. Default false",
    ),
    *_unused(
        "duration",
        "file events wake the replicator; sweep-interval is what catches the ones that got lost",
        "monitor-interval",
    ),
    *_unused("duration", "a lock that is not to be had is tried again later, never waited for", "busy-timeout"),
    *_unused(
        "count",
        "the WAL starts anew after every checkpoint, so that it needs no truncation",
        "truncate-page-n",
        "max-checkpoint-page-count",
    ),
    *_unused("count", "a segment ends at the first commit after 64 MiB of WAL", "max-sync-wal-bytes"),
    _SNAPSHOT,
)

TOP_KEYS: tuple[Key, ...] = (
    Key("dbs", "sections", "list of the databases and folders; their keys are below", section=DATABASE_KEYS),
    Key("exec", "text", "a program that runs as long as replication, as with `--exec`"),
    Key(
        "logging",
        "section",
        "how `replicate` logs",
        section=(
            Key("level", "level", "`debug`, `info`, `warn` or `error`. Default `info`"),
            Key("type", "format", "`text` or `json`. Default `text`"),
            *_unused("flag", "logs always go to stderr", "stderr"),
            *_unused("flag", "log lines name no place in the source", "source"),
        ),
    ),
    Key(
        "socket",
        "section",
        "where `status` and `sync` find the running replicator",
        section=(
            Key("enabled", "flag", "Default true"),
            Key("path", "path", "Default `/run/replicator.sock` for root, else `$XDG_RUNTIME_DIR/replicator.sock`"),
            Key("permissions", "octal", "Default `0600`"),
        ),
    ),
    Key(
        "sweep-interval",
        "duration",
        "every database is looked at this often without an event; ours, not Litestream's. Default 1m",
    ),
    Key(
        "shutdown-sync-timeout",
        "duration",
        "time for the last commits at the end, as with `--shutdown-timeout`. Default 30s",
    ),
    *STORE_KEYS,
    *_unused(
        "duration", "the last commits are tried all the time until shutdown-sync-timeout", "shutdown-sync-interval"
    ),
    Key(
        "levels",
        "sections",
        "how segments are merged: one `interval` for each level, the shortest first. Default 5m and 1h; an empty list for no merging",
        section=(Key("interval", "duration", "how often segments are merged into this level"),),
    ),
    _SNAPSHOT,
    Key(
        "retention",
        "section",
        "whether anything is deleted",
        section=(Key("enabled", "flag", "false to keep every segment for ever. Default true"),),
    ),
    Key(
        "l0-retention",
        "duration",
        "the part of the window in which every shipped segment is kept, so that every commit that was shipped alone can be restored. "
        "Default 24h",
    ),
    *_unused("duration", "looked at once in the longest interval of levels", "l0-retention-check-interval"),
    Key(
        "validation",
        "section",
        "trial restores of all replicas",
        section=(
            Key(
                "interval",
                "duration",
                "each replica is restored for a trial this often, such as `24h`; 0 for never. Default 0",
            ),
        ),
    ),
    *_unused("flag", "what was merged is always read back and verified", "verify-compaction"),
    Key(
        "addr",
        "text",
        "where metrics for Prometheus are served, at `/metrics`: `:9090` on every address of this computer, or "
        "`127.0.0.1:9090`. Default nowhere",
    ),
    Key(
        "heartbeat-url",
        "secret",
        "this URL is asked for (GET) at the start and every heartbeat-interval, as long as every database is protected",
    ),
    Key("heartbeat-interval", "duration", "Default 5m"),
    *_unused("text", _NO_SERVER, "mcp-addr"),
)


def reference() -> str:
    """The tables of docs/replicator.md, in Markdown."""
    logging = next(key for key in TOP_KEYS if key.name == "logging")
    socket = next(key for key in TOP_KEYS if key.name == "socket")
    levels = next(key for key in TOP_KEYS if key.name == "levels")
    retention = next(key for key in TOP_KEYS if key.name == "retention")
    validation = next(key for key in TOP_KEYS if key.name == "validation")
    tables = (
        ("At the top of the file", tuple(key for key in TOP_KEYS if key not in STORE_KEYS)),
        ("In `logging`", logging.section),
        ("In `socket`", socket.section),
        ("In an entry of `levels`", levels.section),
        ("In `snapshot`", _SNAPSHOT.section),
        ("In `retention`", retention.section),
        ("In `validation`", validation.section),
        ("In an entry of `dbs`", DATABASE_KEYS),
        ("In `replica`", REPLICA_KEYS),
        ("In `age`", AGE_KEYS),
        ("In `put-budget`", next(key for key in STORE_KEYS if key.name == "put-budget").section),
    )
    return "\n\n".join(f"### {title}\n\n{_table(keys)}" for title, keys in tables) + "\n"


def _table(keys: tuple[Key, ...]) -> str:
    rows = [f"| `{key.name}` | {_kind(key)} | {key.meaning} |" for key in keys if not key.instead and not key.refused]
    others: dict[str, list[str]] = {}
    for key in keys:
        if key.instead or key.refused:
            others.setdefault(f"refused: {key.refused}" if key.refused else f"accepted: {key.instead}", []).append(
                key.name
            )
    rows += [f"| {', '.join(f'`{name}`' for name in names)} | | {words} |" for words, names in others.items()]
    return "\n".join(["| key | value | meaning |", "| --- | --- | --- |", *rows])


def _kind(key: Key) -> str:
    words = {
        "text": "text",
        "secret": "text",
        "path": "path",
        "duration": "duration",
        "count": "number",
        "flag": "true or false",
        "octal": "octal",
        "section": "section",
        "sections": "list",
        "texts": "list",
    }
    return words.get(key.kind, "word")
