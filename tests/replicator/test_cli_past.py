"""The commands ``query`` and ``diff`` as a user has them: a folder as the store, words and exit codes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from restore_support import STEP_MS, T0_MS, ReplicaBuilder, SourceDatabase

from replicator import Position, cli, open_store
from replicator.values import format_time

ROOT = Path(__file__).parents[2]


@pytest.fixture
def url(tmp_path: Path) -> str:
    """Positions 1:1 (one row), 1:2 (two rows, one changed), 1:3 (a table more, a row less)."""
    found = f"file://{tmp_path}/bucket"
    builder = ReplicaBuilder(open_store(found))
    builder.timeline(1)
    source = SourceDatabase(tmp_path / "source.db")
    builder.snapshot(
        Position(1, 1), source.commit("CREATE TABLE t(id INTEGER PRIMARY KEY, v)", "INSERT INTO t VALUES (1, 'one')")
    )
    builder.commit(
        Position(1, 2),
        source.commit("UPDATE t SET v = x'00ff' WHERE id = 1", "INSERT INTO t VALUES (2, 'a' || char(10) || 'b')"),
    )
    builder.commit(Position(1, 3), source.commit("CREATE TABLE u(x)", "DELETE FROM t WHERE id = 1"))
    source.close()
    return found


def moment(txid: int) -> str:
    return format_time(T0_MS + txid * STEP_MS)


def test_query_prints_a_table_and_says_which_moment_it_is(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["query", url, "SELECT id, v, NULL AS absent FROM t", "--as-of", moment(2)]) == 0
    out, err = capsys.readouterr()
    assert out.splitlines() == [
        "id  v        absent",
        "--  -------  ------",
        "1   x'00ff'  NULL",
        r"2   a\nb     NULL",
    ]
    assert err == f"1:2, last commit {moment(2)}\n"


def test_query_prints_several_results_as_json(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    sql = "SELECT * FROM t; SELECT 9e999 AS a, 2 AS a WHERE 1; SELECT 1 AS b WHERE 0"
    assert cli.run(["query", url, sql, "--txid", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "position": "1:2",
        "reached": moment(2),
        "results": [
            {"columns": ["id", "v"], "rows": [[1, {"blob": "00ff"}], [2, "a\nb"]]},
            {"columns": ["a", "a"], "rows": [["inf", 2]]},
            {"columns": ["b"], "rows": []},
        ],
    }


def test_query_prints_csv_up_to_a_limit(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    sql = "SELECT v, NULL AS n FROM t; SELECT 1 AS x UNION ALL SELECT 2 UNION ALL SELECT 3"
    assert cli.run(["query", url, sql, "--txid", "1:2", "--csv", "--limit", "2", "-v"]) == 0
    out, err = capsys.readouterr()
    assert out == "v,n\nx'00ff',\n\"a\nb\",\n\nx\n1\n2\n"
    assert "fetched" in err


@pytest.mark.parametrize(
    ("sql", "words"),
    [
        ("DELETE FROM t", "can only be read"),
        ("ATTACH '/tmp/x.db' AS x", "can only be read"),
        ("SELECT * FROM absent", "no such table: absent"),
    ],
)
def test_query_fails_with_one_line(url: str, sql: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["query", url, sql]) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("replicator: ")
    assert words in last


def test_query_of_a_moment_before_the_first_says_which_is_the_first(
    url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["query", url, "SELECT 1", "--as-of", "2001-01-01T00:00:00Z"]) == 1
    assert moment(1) in capsys.readouterr().err


def test_query_ends_quietly_when_its_reader_does(url: str) -> None:
    numbers = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 100000) SELECT i FROM n"
    with subprocess.Popen(
        [sys.executable, "-m", "replicator", "query", url, numbers],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout and process.stderr
        assert process.stdout.readline().strip() == "i"
        process.stdout.close()
        assert process.wait(30) == 1
        assert process.stderr.read() == f"1:3, last commit {moment(3)}\n"


def test_diff_counts_rows_and_names_schema_changes(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["diff", url, "--from", "1"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"from 1:1 ({moment(1)}) to 1:3 ({moment(3)})",
        "added table u",
        "TABLE  ADDED  REMOVED  CHANGED",
        "t      1      1        0",
    ]


def test_diff_prints_rows_as_lines_of_json(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["diff", url, "--from", moment(1), "--to", "1:2", "--table", "t", "--rows", "-v"]) == 0
    out, err = capsys.readouterr()
    assert [json.loads(line) for line in out.splitlines()] == [
        {
            "table": "t",
            "change": "changed",
            "before": {"id": 1, "v": "one"},
            "after": {"id": 1, "v": {"blob": "00ff"}},
        },
        {"table": "t", "change": "added", "before": None, "after": {"id": 2, "v": "a\nb"}},
    ]
    assert err.splitlines()[:2] == [f"1:{n}, last commit {moment(n)}" for n in (1, 2)]


def test_diff_as_json_and_of_a_position_with_itself(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["diff", url, "--from", "2", "--to", "3", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["from"] == {"position": "1:2", "reached": moment(2)}
    assert document["tables"] == [{"table": "t", "added": 0, "removed": 1, "changed": 0}]
    assert [one["after"] for one in document["schema"]] == ["CREATE TABLE u(x)"]
    assert cli.run(["diff", url, "--from", "3", "--timeline", "1"]) == 0
    assert capsys.readouterr().out.splitlines()[1:] == ["nothing changed"]


def test_options_that_exclude_each_other_are_used_wrongly(url: str) -> None:
    assert cli.run(["query", url, "SELECT 1", "--csv", "--json"]) == 2
    assert cli.run(["query", url, "SELECT 1", "--as-of", "5m", "--txid", "1"]) == 2
    assert cli.run(["diff", url, "--from", "1", "--rows", "--json"]) == 2
    assert cli.run(["diff", url, "--from", "yesterday"]) == 2
