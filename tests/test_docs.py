"""The documentation names what there is: modules, files, commands, options, targets."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from minipaas import manifest
from minipaas.cli import root as minipaas
from minipaas.settings import DEFAULT_DATA_DIR, LEASE_TTL_S, Limits
from minipaas.systemd import ENVIRONMENT_FILE
from replicator.cli import replicator
from replicator.lease import RENEWALS_PER_TTL

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").rglob("*.md"))]
PROGRAMS: dict[str, click.Command] = {"minipaas": minipaas, "replicator": replicator}
SPOKEN_OF = re.compile(r"`((?:minipaas|replicator)/[\w/]+(?:\.py|/))`")


def modules() -> list[str]:
    found = [*ROOT.glob("replicator/**/*.py"), *ROOT.glob("minipaas/**/*.py")]
    return sorted(str(path.relative_to(ROOT)) for path in found if not path.name.startswith("__"))


def code_lines(page: Path) -> Iterator[str]:
    """Lines of code blocks, without comments; a backslash at the end joins two."""
    for language, block in re.findall(r"^```(\w*)\n(.*?)^```", page.read_text("utf-8"), re.MULTILINE | re.DOTALL):
        if language in ("", "sh"):
            yield from (line.partition(" #")[0].strip() for line in block.replace("\\\n", " ").splitlines())


def commands(page: Path) -> Iterator[list[str]]:
    """Every call of one of our programs in the page's code, as words."""
    for line in code_lines(page):
        for part in re.split(r"\s(?:&&|\||&|;)(?:\s|$)", line):
            words = [word for word in _words(part) if not re.fullmatch(r"[A-Z_]+=.*", word)]
            if words and words[0] in PROGRAMS:
                yield words


def _words(text: str) -> list[str]:
    """[] for a line that is no command, such as one of a drawing."""
    try:
        return shlex.split(text.partition(" >")[0])
    except ValueError:
        return []


def unknown_words(words: list[str]) -> list[str]:
    """Those that name no command where one is needed, or no option of theirs."""
    command = PROGRAMS[words[0]]
    rest = words[1:]
    while isinstance(command, click.Group) and rest and not rest[0].startswith("-"):
        inner = command.get_command(click.Context(command), rest[0])
        if inner is None:
            return [rest[0]]
        command, rest = inner, rest[1:]
    known = {option for each in command.params for option in (*each.opts, *each.secondary_opts)} | {"-h", "--help"}
    return [word for word in rest if word.startswith("-") and word.partition("=")[0] not in known]


def test_every_module_is_in_the_architecture() -> None:
    named = set(SPOKEN_OF.findall((ROOT / "docs" / "architecture.md").read_text("utf-8")))
    folders = tuple(name for name in named if name.endswith("/"))
    assert [each for each in modules() if each not in named and not each.startswith(folders)] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_a_page_names_is_there(page: Path) -> None:
    text = page.read_text("utf-8")
    assert [name for name in SPOKEN_OF.findall(text) if not (ROOT / name).exists()] == []
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)]+)\)", text) if "://" not in link]
    assert [link for link in links if not (page.parent / link).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_and_options_of_a_page_exist(page: Path) -> None:
    assert {" ".join(words): unknown for words in commands(page) if (unknown := unknown_words(words))} == {}


def test_the_readme_shows_how_each_command_of_a_node_is_used() -> None:
    shown = {words[1] for words in commands(README) if words[0] == "minipaas"}
    assert {"setup", "systemd-unit", "deploy", "status", "logs", "secrets", "down", "recover"} <= shown


def test_targets_of_make_that_a_page_names_exist() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {name for page in PAGES for name in re.findall(r"\bmake ([a-z]+)`", page.read_text("utf-8"))}
    named |= {name for page in PAGES for line in code_lines(page) for name in re.findall(r"\bmake ([a-z]+)$", line)}
    assert named - targets == set()
    assert {"check", "test", "demo", "install"} <= named


def test_the_manifest_of_the_readme_is_served_as_it_is() -> None:
    (text,) = re.findall(r"^```toml\n(.*?)^```", README.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    parsed, warnings = manifest.parse(text, "minipaas.toml")
    assert (parsed.app, warnings) == ("guestbook", ())


def test_times_and_places_in_the_readme_are_those_of_the_code() -> None:
    text = README.read_text("utf-8")
    assert f"renews a lease in the bucket every {LEASE_TTL_S / RENEWALS_PER_TTL:.0f} s" in text
    assert f"watches it for {LEASE_TTL_S:.0f} s" in text
    assert "ships the last commits first, for at most half a minute" in text
    assert Limits().stop_workers_s + 2 * Limits().stop_sync_s <= 30
    assert f"`{ENVIRONMENT_FILE}`" in text
    assert f"`{DEFAULT_DATA_DIR}`" in text
