"""What a manifest says, and what is told to whoever wrote it wrongly."""

from __future__ import annotations

import tomllib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minipaas.errors import ManifestError
from minipaas.manifest import EXAMPLE, MAX_BYTES, Build, Check, HttpService, Manifest, Mount, find, load, parse
from minipaas.toml_lines import key_lines

FULL = """
app = "guestbook"
primary_region = "ams"
kill_signal = "SIGTERM"
kill_timeout = "1m30s"

[build]
dockerfile = "docker/Containerfile"
build-target = "prod"
ignorefile = ".ignore"
[build.args]
VERSION = "3"

[env]
LOG_LEVEL = "debug"
WORKERS = 4
FAST = true

[http_service]
internal_port = 5000
min_machines_running = 1
processes = ["app"]
[[http_service.checks]]
interval = "10s"
timeout = 2000
grace_period = "5s"
method = "head"
path = "/health"
headers = { X-Check = "yes" }

[[mounts]]
source = "data"
destination = "/data/"

[checks.port]
type = "tcp"

[deploy]
wait_timeout = "2m"
"""


def refused(text: str) -> str:
    with pytest.raises(ManifestError) as error:
        parse(text, "minipaas.toml")
    return str(error.value)


def warned(text: str) -> tuple[str, ...]:
    return parse(text, "fly.toml")[1]


def test_every_served_key_arrives():
    manifest, warnings = parse(FULL, "minipaas.toml")
    assert [warning.partition(": ")[2].split()[0] for warning in warnings] == ["http_service.checks[0].interval"]
    assert manifest == Manifest(
        app="guestbook",
        primary_region="ams",
        kill_signal="SIGTERM",
        kill_timeout_s=90.0,
        build=Build(
            dockerfile="docker/Containerfile", target="prod", ignorefile=".ignore", args={"VERSION": "3"}, image=None
        ),
        env={"LOG_LEVEL": "debug", "WORKERS": "4", "FAST": "true"},
        http_service=HttpService(
            internal_port=5000,
            min_machines_running=1,
            processes=("app",),
            checks=(
                Check(
                    name="http-0",
                    type="http",
                    port=5000,
                    interval_s=10.0,
                    timeout_s=2.0,
                    grace_period_s=5.0,
                    method="HEAD",
                    path="/health",
                    headers={"X-Check": "yes"},
                ),
            ),
        ),
        mounts=(Mount(source="data", destination="/data"),),
        checks=(Check(name="port", type="tcp", port=5000),),
        deploy=manifest.deploy,
    )
    assert manifest.deploy.wait_timeout_s == 120.0


def test_an_empty_manifest_has_flys_defaults():
    manifest, _ = parse("", "minipaas.toml")
    assert (manifest.kill_signal, manifest.kill_timeout_s, manifest.http_service) == ("SIGINT", 5.0, None)
    assert parse("[http_service]", "f")[0].http_service == HttpService(internal_port=8080)


def test_a_single_mounts_table_of_older_files_counts():
    assert len(parse('[mounts]\nsource = "data"\ndestination = "/data"', "fly.toml")[0].mounts) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("app = 1", "minipaas.toml:1: app: expected a text, found 1"),
        ('\n\napp = "Guest"', "minipaas.toml:3: app: 'Guest' is not a name"),
        ("[http_servce]", "minipaas.toml:1: http_servce: there is no such key; did you mean http_service?"),
        (
            "[env]\n[http_service]\ninternal_prt = 1",
            "minipaas.toml:3: http_service.internal_prt: .*did you mean internal_port",
        ),
        (
            "[http_service]\r\ninternal_port = 70000",
            r"minipaas.toml:2: http_service.internal_port: expected a whole .*70000",
        ),
        ("[http_service]\ninternal_port = true", "internal_port: expected a whole number from 1 to 65535, found true"),
        ('[http_service]\nforce_https = "yes"', 'force_https: expected true or false, found "yes"'),
        ("http_service = 5", r"http_service: expected a table, \[http_service\], found 5"),
        ("kill_timeout = 301", "kill_timeout: expected a duration from 0 s to 300 s"),
        ('kill_timeout = "5 parsecs"', 'kill_timeout: expected a duration .* found "5 parsecs"'),
        ('kill_signal = "SIGWINCH"', "kill_signal: expected one of SIGINT"),
        ('[env]\nFLY_X = "1"', "minipaas.toml:2: env.FLY_X: names that begin with FLY_ or MINIPAAS_"),
        ('[env]\nminipaas_x = "1"', "env.minipaas_x: names that begin with"),
        ('[env]\n"A B" = "1"', "env.A B: a variable's name"),
        ("[env]\nA = []", "minipaas.toml:2: env.A: expected a text, a number or true or false, found a list"),
        ('[[mounts]]\nsource = "Data"\ndestination = "/d"', "minipaas.toml:2: .*source: expected a volume's name"),
        (
            '[[mounts]]\nsource = "d"\ndestination = "/"',
            r"minipaas.toml:3: mounts\[0\].destination: expected an absolute",
        ),
        ('[[mounts]]\nsource = "d"\ndestination = "/a/../b"', "destination: expected an absolute path"),
        ('[[mounts]]\nsource = "d"', r"minipaas.toml:1: mounts\[0\]: .*destination is missing"),
        (
            '[[mounts]]\nsource="a"\ndestination="/d"\n[[mounts]]\nsource="b"\ndestination="/d/"',
            r"minipaas.toml:6: mounts\[1\].destination: /d is mounted twice",
        ),
        ("[checks.web]\nport = 1", "checks.web: expected the key type"),
        ('[checks.web]\ntype = "tcp"', "checks.web: expected the key port"),
        ('[checks.web]\ntype = "tcp"\nport = 1\npath = "/"', "minipaas.toml:4: checks.web.path: there is no such key"),
        (
            '[http_service]\n[[http_service.checks]]\ninterval = "10ms"',
            "minipaas.toml:3: .*interval: expected a duration from 1 s",
        ),
        ('[http_service]\n[[http_service.checks]]\npath = "health"', "path: expected a path that begins with /"),
        ('[build]\nimage = "x"\ndockerfile = "y"', "build.image: expected either image or dockerfile"),
        ('[build]\ndockerfile = "../Dockerfile"', "build.dockerfile: expected a path inside the source directory"),
        ('a = """\nx', "minipaas.toml:2: .* at the end of the file"),
        ("a = 1\nb = = 2", "minipaas.toml:2: .*column 5"),
        ("a = 1\na = 2", "minipaas.toml:2: Cannot overwrite a value"),
        ("a = " + "[" * 5000, "minipaas.toml:1: "),
        ("a = " + "9" * 5000, "minipaas.toml:1: "),
        ("#" * (MAX_BYTES + 1), "larger than 64 KiB"),
    ],
)
def test_what_is_wrong_is_named_with_file_line_and_key(text, message):
    import re

    assert re.match(f"(?s).*{message}", refused(text)), refused(text)
    assert refused(text).startswith("minipaas.toml:")


def test_keys_of_fly_that_are_not_served_are_named_with_their_line():
    assert warned('app = "a"\n[[services]]\ninternal_port = 1\n[deploy]\nrelease_command = "migrate"') == (
        "fly.toml:5: deploy.release_command is not served yet: it has no effect",
        "fly.toml:2: services is not served yet: it has no effect",
    )


@pytest.mark.parametrize(
    "destination",
    [
        "/proc",
        "/proc/x",
        "/sys/fs",
        "/dev/shm",
        "/etc",
        "/etc/",
        "/usr",
        "/bin",
        "//sbin",
        "/lib",
        "/lib64",
        "/run",
        "/usr/lib",
    ],
)
def test_a_volume_never_hides_what_a_container_runs_from(destination):
    text = f'[[mounts]]\nsource = "data"\ndestination = "{destination}"'
    assert refused(text) == (
        f"minipaas.toml:3: mounts[0].destination: a volume at {destination} hides what the container runs from; "
        "choose a folder of its own, such as /data"
    )


@pytest.mark.parametrize(
    "destination", ["data", "./data", "/", "//", "/./data", "/a/..", "/a\\nb", "/a\\u001b[2J", "/a:/b", "/a\\u202e"]
)
def test_a_volume_has_an_absolute_path_that_can_be_printed(destination):
    words = refused(f'[[mounts]]\nsource = "data"\ndestination = "{destination}"')
    assert words.startswith("minipaas.toml:3: mounts[0].destination: expected an absolute path")
    assert words.isprintable()


@pytest.mark.parametrize(
    "destination", ["/data", "/etc/app", "/usr/local/app/data", "/var/lib/app", "/run/app", "/my data"]
)
def test_a_volume_may_be_in_any_folder_of_its_own(destination):
    text = f'[[mounts]]\nsource = "data"\ndestination = "{destination}"'
    assert parse(text, "minipaas.toml")[0].mounts[0].destination == destination


@pytest.mark.parametrize("source", ["a/b", "../a", "a b", "A", "a\\n", "a" * 31])
def test_a_volume_has_a_plain_name(source):
    assert "source: expected a volume's name" in refused(f'[[mounts]]\nsource = "{source}"\ndestination = "/data"')


def test_what_is_accepted_and_done_otherwise_is_named():
    text = """[http_service]
min_machines_running = 2
processes = ["web"]
[[http_service.checks]]
interval = "30s"
[[mounts]]
source = "data"
destination = "/data"
processes = ["web"]
"""
    found = [warning.partition(" is accepted, but ")[::2] for warning in warned(text)]
    assert found == [
        ("fly.toml:2: http_service.min_machines_running", "one machine runs, and always"),
        (
            "fly.toml:3: http_service.processes",
            "there is one group, app: what this table asks for is done for it",
        ),
        ("fly.toml:5: http_service.checks[0].interval", "a check is not repeated once the machine is healthy"),
        ("fly.toml:9: mounts[0].processes", "there is one group, app: what this table asks for is done for it"),
    ]
    assert warned('[http_service]\nmin_machines_running = 1\nprocesses = ["app"]') == ()


def test_an_unknown_key_is_answered_with_the_keys_that_are_served():
    words = refused("zzz = 1")
    assert words == (
        "minipaas.toml:1: zzz: there is no such key; what is served here: app, build, checks, deploy, env, http_service, "
        "kill_signal, kill_timeout, mounts, primary_region"
    )


def test_https_and_sizes_are_not_promised():
    assert "plain HTTP" in warned("[http_service]\nforce_https = true")[0]
    assert "not enforced" in warned('[[mounts]]\nsource="a"\ndestination="/a"\ninitial_size="10gb"')[0]


def test_a_stored_manifest_comes_back():
    manifest, _ = parse(FULL, "f")
    assert Manifest.from_json(manifest.to_json()) == manifest


@pytest.mark.parametrize("text", ['{"app":"a","novelty":1}', '{"http_service":{"x":1}}', '{"app":5}', "", "[]"])
def test_a_stored_manifest_of_a_newer_release_is_refused(text):
    with pytest.raises(ManifestError, match="upgrade minipaas"):
        Manifest.from_json(text)


def test_minipaas_toml_goes_before_fly_toml(tmp_path):
    (tmp_path / "fly.toml").write_text("")
    assert find(tmp_path).name == "fly.toml"
    (tmp_path / "minipaas.toml").write_text("")
    assert find(tmp_path).name == "minipaas.toml"


def test_a_directory_without_manifest_is_told_on_one_line_where_an_example_is(tmp_path):
    with pytest.raises(ManifestError, match="neither minipaas.toml nor fly.toml") as error:
        find(tmp_path)
    assert "\n" not in str(error.value)
    assert "minipaas deploy --help" in str(error.value)
    assert parse(EXAMPLE, "f")[0].mounts[0].destination == "/data"


def test_a_file_that_is_not_utf8_is_named_with_its_line(tmp_path):
    (tmp_path / "minipaas.toml").write_bytes(b'app = "a"\n# \xff')
    with pytest.raises(ManifestError, match=r"minipaas.toml:2: this is not UTF-8"):
        load(tmp_path / "minipaas.toml")


# -- lines -------------------------------------------------------------------------------------------------------------


def test_lines_of_everything_that_toml_can_write():
    text = (
        '# [not.a.table]\n"quoted key" = 1\na.b."c.d" = 2\ntext = """\n[no]\nfake = 1\n"""\nlist = [\n  1, # ]\n  { x = 1 },\n]\n'
        "[t]\r\nk = '''\n]\n'''\nm = 1\n[[arr]]\nx = 1\n[[arr]]\n[arr.sub]\ny = { z = 1 }\n[[arr.deep]]\n[[arr.deep]]\nq = 1\n"
    )
    lines = key_lines(text)
    assert {
        ("quoted key",): 2,
        ("a", "b", "c.d"): 3,
        ("text",): 4,
        ("list", 1, "x"): 8,
        ("t",): 12,
        ("t", "k"): 13,
        ("t", "m"): 16,
        ("arr", 0, "x"): 18,
        ("arr", 1): 19,
        ("arr", 1, "sub", "y", "z"): 21,
        ("arr", 1, "deep", 1, "q"): 24,
    }.items() <= lines.items()
    assert ("fake",) not in lines


def test_a_text_made_to_be_slow_costs_lines_not_minutes():
    lines = key_lines("first = 1\na = [\n" + "[1],\n" * 2000 + "]\n")
    assert lines == {("first",): 1}


def every_path(value, at=()):
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, below in items:
        yield (*at, key)
        yield from every_path(below, (*at, key))


KEYS = st.sampled_from(["a", "b", '"c d"', "'e.f'", "g.h", '"]"', '"#"', '"\\n"'])
VALUES = st.sampled_from(
    [
        "1",
        '"x # y"',
        "'''\n[a]\nb = 1\n'''",
        '"""\\\n]\n"""',
        "[\n1,\n# ]\n[2],\n]",
        "{ i = { j = [1] } }",
        "[{ k = 1 }, {}]",
    ]
)
PIECES = st.one_of(
    st.tuples(KEYS, VALUES).map(lambda pair: f"{pair[0]} = {pair[1]} # end"),
    KEYS.map(lambda key: f"[{key}]"),
    KEYS.map(lambda key: f"  [[ {key} ]]"),
    KEYS.map(lambda key: f"[x.{key}]"),
    st.sampled_from(["", "# [a]", "\t"]),
)


@given(st.lists(PIECES, max_size=12), st.sampled_from(["\n", "\r\n"]))
def test_every_path_of_a_document_has_the_line_of_its_statement(pieces, newline):
    kept: list[str] = []
    for piece in pieces:
        try:
            tomllib.loads("\n".join([*kept, piece]))
        except tomllib.TOMLDecodeError:
            continue
        kept.append(piece)
    text = "\n".join(kept).replace("\n", newline)
    lines = key_lines(text)
    starts = {sum(piece.count("\n") + 1 for piece in kept[:n]) + 1 for n in range(len(kept))}
    paths = set(every_path(tomllib.loads(text)))
    assert paths <= set(lines)
    assert set(lines.values()) <= starts
    for path in paths:
        assert not isinstance(path[-1], str) or spelled(path[-1]) in text.split("\n")[lines[path] - 1]


def spelled(key: str) -> str:
    """How the key is written inside its quotes."""
    return key.replace("\n", "\\n")
