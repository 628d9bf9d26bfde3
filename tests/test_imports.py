"""Imports point one way: a test walks them and fails on the offender."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

ONLY_IN = {
    "boto3": {"replicator/store/s3.py"},
    "botocore": {"replicator/store/s3.py"},
    "docker": {"minipaas/engine/docker_api/"},
    "watchdog": {"replicator/watch.py"},
    "apsw": {
        "replicator/database.py",
        "replicator/restore.py",
        "replicator/past.py",
        "replicator/diff.py",
        "replicator/follow.py",
        "replicator/followed.py",
        "minipaas/state.py",
    },
    "prometheus_client": {"replicator/metrics.py"},
    "pyrage": {"minipaas/sealing.py", "replicator/age.py"},
    "cryptography": {"replicator/store/seal.py"},
    "click": {"replicator/cli/", "minipaas/cli/"},
    "rich": {"replicator/cli/progress.py", "minipaas/cli/"},
    "waitress": {"minipaas/web/door.py"},
    "requests": {"minipaas/cli/client.py", "minipaas/engine/docker_api/"},
}
PURE = {
    "replicator/values.py",
    "replicator/wal.py",
    "replicator/walindex.py",
    "replicator/segment.py",
    "replicator/pagehash.py",
    "replicator/layout.py",
    "replicator/envelope.py",
    "replicator/litestream/chain.py",
    "replicator/ltx.py",
    "replicator/chain.py",
    "replicator/merge.py",
    "replicator/levels.py",
    "replicator/btree.py",
    "minipaas/model.py",
    "minipaas/plan.py",
    "minipaas/manifest.py",
    "minipaas/toml_table.py",
}
IMPURE = {"os", "socket", "subprocess", "time", "threading", "logging", "random", "shutil", "requests", "urllib"}
ENTRY_POINTS = {
    "replicator/cli/",
    "replicator/__main__.py",
    "minipaas/cli/",
    "minipaas/__main__.py",
}


def sources() -> list[str]:
    found = [*ROOT.glob("replicator/**/*.py"), *ROOT.glob("minipaas/**/*.py")]
    return sorted(str(path.relative_to(ROOT)) for path in found)


def imports(source: str) -> Iterator[str]:
    """Full names of the modules that a file imports, wherever in it."""
    for node in ast.walk(ast.parse((ROOT / source).read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def within(source: str, places: set[str]) -> bool:
    return any(source == place or (place.endswith("/") and source.startswith(place)) for place in places)


@pytest.mark.parametrize("source", sources())
def test_imports_point_one_way(source: str) -> None:
    names = set(imports(source))
    tops = {name.split(".")[0] for name in names}
    if source.startswith("replicator/"):
        assert not tops & {"minipaas", "demo", "images", "bench", "tests"}, (
            "the replicator knows nothing of the platform"
        )
    assert not tops & {"demo", "bench", "tests", "support"}, "the product needs nothing of its demo and tests"
    assert "sqlite3" not in tops, "one SQLite library in the process, and that is apsw"
    for library, places in ONLY_IN.items():
        if library in tops:
            assert within(source, places), f"{library} is imported in {sorted(places)} only"
    if source in PURE:
        assert not tops & IMPURE, "a pure part does no I/O"
    if not within(source, ENTRY_POINTS):
        assert not {name for name in names if name.startswith(("replicator.cli", "minipaas.cli"))}, (
            "nothing imports an entry point"
        )


@pytest.mark.parametrize("source", [s for s in sources() if s.startswith("minipaas/")])
def test_the_platform_uses_the_replicator_through_its_public_names(source: str) -> None:
    used = {name for name in imports(source) if name.split(".")[0] == "replicator"}
    public = {"replicator"} | {f"replicator.{name}" for name in __import__("replicator").__all__}
    assert used <= public, f"{sorted(used - public)} is not among replicator.__all__"
