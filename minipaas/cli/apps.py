"""Commands about apps and what belongs to them. Owns their tables; every one is a call of the API and its answer, printed."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from minipaas import manifest
from minipaas.cli import text
from minipaas.cli.client import Client, goes_on, with_client
from minipaas.errors import BadRequest

json_option = click.option("-j", "--json", "as_json", is_flag=True, help="As JSON.")
app_option = click.option(
    "-a", "--app", default="", envvar=["MINIPAAS_APP", "FLY_APP"], help="The app; else that of minipaas.toml here."
)
yes_option = click.option("-y", "--yes", is_flag=True, help="Do not ask.")


def _app(name: str, app: str = "") -> str:
    """The app that a command is about: its argument, -a, or the one that the directory's file names."""
    if name or app:
        return name or app
    path = manifest.look(Path())
    found = manifest.load(path)[0].app if path else None
    if not found:
        where = f"{path} names none" if path else "there is no minipaas.toml here"
        raise BadRequest(f"which app? say its name, or --app NAME; {where}")
    return found


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


class _Listing(click.Group):
    """A noun alone, or with options only, lists."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        help_wanted = bool(args) and args[0] in ("-h", "--help")
        if not help_wanted and (not args or args[0].startswith("-")):
            args = ["list", *args]
        return super().parse_args(ctx, args)


@click.group(cls=_Listing)
def apps() -> None:
    """List, create and destroy apps."""


@apps.command("list")
@json_option
@with_client
def list_apps(client: Client, as_json: bool) -> None:
    """All apps, and how they are."""
    found = client.get("/v1/apps")
    if as_json:
        text.as_json(found)
        return
    rows = [(a["name"], a["state"], f"v{a['release']}" if a["release"] else "", a["url"], a["words"]) for a in found]
    text.table(
        ("APP", "STATE", "RELEASE", "URL", ""), rows, "no app yet; write a minipaas.toml and type: minipaas deploy"
    )


@apps.command()
@click.argument("name")
@with_client
def create(client: Client, name: str) -> None:
    """Reserve a name."""
    client.post("/v1/apps", {"name": name})
    text.say(f"created {name}")


@click.command()
@click.argument("name", default="")
@app_option
@json_option
@with_client
def status(client: Client, name: str, app: str, as_json: bool) -> None:
    """The node, or one app: machines, volumes, and how safe each database is."""
    if not (name or app):
        _node_status(client, as_json)
        return
    found = client.get(f"/v1/apps/{_app(name, app)}")
    if as_json:
        text.as_json(found)
    else:
        _show_app(found)


def _node_status(client: Client, as_json: bool) -> None:
    node = client.get("/v1/status")
    if as_json:
        text.as_json(node)
        return
    text.say(f"node {node['name']} ({node['region']}), {node['engine']}")
    text.say(f"bucket {node['bucket']}")
    for trouble in node["troubles"]:
        text.say(f"  ! {trouble}")
    _show_databases(node["databases"])


def _show_app(app: dict[str, Any]) -> None:
    release = f"v{app['release']}" if app["release"] else "no release"
    text.say(f"{app['name']}: {app['state']}, {release}  {app['url']}")
    if app["words"]:
        text.say(f"  {app['words']}")
    last = app["last_release"]
    if last and last["status"] == "failed" and last["message"] != app["words"]:
        text.say(f"  v{last['number']} failed: {last['message']}")
    if app["purge_after_ms"]:
        text.say(f"  its data is kept until {text.moment(app['purge_after_ms'], _now_ms())}")
    now_ms = _now_ms()
    machines = [
        (m["id"], m["state"], f"v{m['release']}", m["group"], m["node"], text.ago(m["started_ms"], now_ms), m["words"])
        for m in app["machines"]
    ]
    text.table(("MACHINE", "STATE", "RELEASE", "GROUP", "NODE", "STARTED", ""), machines, "no machine")
    if app["volumes"]:
        _show_volumes(app["volumes"])
        _show_databases([database for volume in app["volumes"] for database in volume["databases"]])


def _show_volumes(volumes: list[dict[str, Any]]) -> None:
    now_ms = _now_ms()
    rows = [
        (v["id"], v["app"], v["name"], v["state"], v["node"], str(len(v["databases"])), v["directory"],
         f"kept until {text.moment(v['purge_after_ms'], now_ms)}" if v["purge_after_ms"] else v["words"])
        for v in volumes
    ]  # fmt: skip
    text.table(("VOLUME", "APP", "NAME", "STATE", "NODE", "DATABASES", "DIRECTORY", ""), rows, "no volume")


def _show_databases(databases: list[dict[str, Any]]) -> None:
    now_ms = _now_ms()
    rows = [
        (d["app"] or "(platform)", d["path"], f"{d['words']}{': ' + d['reason'] if d['reason'] else ''}", d["durable"],
         text.moment(d["durable_ms"], now_ms), text.size(d["size_bytes"]))
        for d in databases
    ]  # fmt: skip
    text.table(("APP", "DATABASE", "PROTECTION", "DURABLE", "LAST DURABLE COMMIT", "SIZE"), rows, "no database")


@click.command()
@click.argument("name", default="")
@app_option
@click.option("-f", "--follow", is_flag=True, help="Go on with what comes.")
@click.option("-n", "--tail", type=click.IntRange(0), default=100, show_default=True, help="How many lines back.")
@json_option
@with_client
def logs(client: Client, name: str, app: str, follow: bool, tail: int, as_json: bool) -> None:
    """What an app prints."""
    path = f"/v1/apps/{_app(name, app)}/logs"
    for line in client.stream("GET", path, follow=int(follow), tail=tail):
        if as_json:
            click.echo(json.dumps(line))
        else:
            at = text.moment(line["at_ms"], line["at_ms"]).split(" UTC")[0]
            click.echo(f"{at} {line.get('machine', '')[:8]} {text.output_of_app(line['text'])}")


@click.command()
@click.argument("name", default="")
@app_option
@with_client
def restart(client: Client, name: str, app: str) -> None:
    """Stop and start an app's machines; its requests wait meanwhile."""
    found = _app(name, app)
    text.note(f"restarting {found}; its requests wait until its machine is healthy")
    with goes_on(f"the restart of {found}", found):
        client.post(f"/v1/apps/{found}/restart")
    text.say(f"{found} restarted")


@click.command()
@click.argument("name")
@yes_option
@with_client
def destroy(client: Client, name: str, yes: bool) -> None:
    """End an app. Its volumes and databases are kept for some days, and it says until when."""
    if not yes:
        if not sys.stdin.isatty():
            raise BadRequest(f"destroying {name} needs a yes: say -y")
        if click.prompt(f"This ends {name}. Type its name to go on") != name:
            raise BadRequest("that is another name; nothing was done")
    with goes_on(f"the end of {name}", name):
        answer = client.delete(f"/v1/apps/{name}")
    until = text.moment(answer.get("purge_after_ms"), _now_ms())
    text.say(f"{name} is destroyed: it is being stopped, and its data is kept until {until}")


apps.add_command(destroy)
apps.add_command(restart)


@click.command()
@click.argument("name", default="")
@app_option
@json_option
@with_client
def releases(client: Client, name: str, app: str, as_json: bool) -> None:
    """The releases of an app, newest first."""
    found = client.get(f"/v1/apps/{_app(name, app)}/releases")
    if as_json:
        text.as_json(found)
        return
    now_ms = _now_ms()
    rows = [
        (f"v{r['number']}", r["status"], text.moment(r["created_ms"], now_ms), r["image_digest"][:19], r["message"])
        for r in found
    ]
    text.table(
        ("RELEASE", "STATUS", "CREATED", "IMAGE", ""), sorted(rows, key=lambda row: -int(row[0][1:])), "no release yet"
    )


@click.group(cls=_Listing)
def volumes() -> None:
    """Volumes and the databases in them."""


@volumes.command("list")
@json_option
@with_client
def list_volumes(client: Client, as_json: bool) -> None:
    """All volumes, those of destroyed apps too."""
    found = client.get("/v1/volumes")
    if as_json:
        text.as_json(found)
        return
    _show_volumes(found)
    if found:
        _show_databases([database for volume in found for database in volume["databases"]])


@click.group(cls=_Listing)
def secrets() -> None:
    """What an app gets in its environment and nobody else may read. Sealed before it is stored."""


@secrets.command("list")
@app_option
@json_option
@with_client
def list_secrets(client: Client, app: str, as_json: bool) -> None:
    """Names only; values are never shown."""
    found = client.get(f"/v1/apps/{_app('', app)}/secrets")
    if as_json:
        text.as_json(found)
        return
    now_ms = _now_ms()
    text.table(("NAME", "SET"), [(s["name"], text.moment(s["updated_ms"], now_ms)) for s in found], "no secret")


@secrets.command("set")
@click.argument("pairs", nargs=-1, metavar="NAME=VALUE…")
@app_option
@with_client
def set_secrets(client: Client, pairs: tuple[str, ...], app: str) -> None:
    """Set secrets. NAME alone reads its value from standard input, so that it stays out of the shell's history.

    A running app is started anew with them, as its next release. An empty value has to be meant: NAME= with nothing after it.
    """
    if not pairs:
        raise BadRequest("name at least one secret: NAME=VALUE, or NAME to read its value from standard input")
    found, values = _app("", app), _given(pairs)
    with _new_release(found, "setting secrets of {}; if it runs, its next release starts with them"):
        answer = client.put(f"/v1/apps/{found}/secrets", values)
    text.say(_changed("set", answer))


def _given(pairs: Sequence[str]) -> dict[str, str]:
    values, read = {}, ""
    for pair in pairs:
        name, separator, value = pair.partition("=")
        if name in values:
            raise BadRequest(f"{name} is named twice; nothing was set")
        if separator and value != "-":
            values[name] = value
        elif read:
            raise BadRequest(f"standard input holds one value, for {read} or for {name}; set them one by one")
        else:
            read, values[name] = name, _from_standard_input(name)
    return values


def _from_standard_input(name: str) -> str:
    """Asked for without echo at a terminal. Nothing is no value: it is what a pipe gives whose other end has failed."""
    if sys.stdin.isatty():
        value = str(click.prompt(f"Value of {name}", hide_input=True, default="", show_default=False))
    else:
        try:
            value = sys.stdin.read().rstrip("\n")
        except UnicodeDecodeError as error:
            raise BadRequest(f"the value of {name} is not text in UTF-8; nothing was set") from error
    if not value:
        raise BadRequest(f"nothing came on standard input for {name}, so nothing was set; {name}= sets an empty value")
    return value


@secrets.command()
@click.argument("names", nargs=-1, required=True)
@app_option
@with_client
def unset(client: Client, names: tuple[str, ...], app: str) -> None:
    """Remove secrets."""
    found = _app("", app)
    with _new_release(found, "removing secrets of {}; if it runs, its next release starts without them"):
        answer = client.delete(f"/v1/apps/{found}/secrets", {"names": list(names)})
    text.say(_changed("removed", answer))


@contextmanager
def _new_release(app: str, words: str) -> Iterator[None]:
    text.note(words.format(app))
    with goes_on(f"the change of {app}'s secrets", app):
        yield


def _changed(what: str, answer: dict[str, Any]) -> str:
    if not answer["changed"]:
        return "nothing changed: the values are the same"
    runs = f"v{answer['release']} runs with them" if answer["release"] else "the first release will run with them"
    return f"{len(answer['changed'])} {what}; {runs}"


COMMANDS = (apps, status, logs, restart, destroy, releases, volumes, secrets)
