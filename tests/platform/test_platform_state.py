"""The state database: transactions, migrations, what is in its bytes."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import apsw
import pytest
from platform_support import GUESTBOOK, Stage

from minipaas.access import authenticate, issue_local_token
from minipaas.errors import Conflict, NotAuthorised, NotFound, StateTooNew
from minipaas.model import Node
from minipaas.sealing import Identity, Sealer, seal, unseal
from minipaas.state import State
from minipaas.uploads import Uploads


def test_a_second_release_is_refused_while_one_is_deployed(stage: Stage) -> None:
    stage.want(GUESTBOOK)
    with pytest.raises(Conflict, match="is being deployed"):
        stage.want(GUESTBOOK)
    assert [release.number for release in stage.state.releases("guestbook")] == [1]


def test_what_fails_halfway_changes_nothing(stage: Stage) -> None:
    stage.want(GUESTBOOK, secrets={"A": "1", "B": "2"})
    before = stage.state.release_secrets("guestbook", 1)
    seen: list[bytes] = []

    def fail_at_the_second(sealed: bytes) -> bytes:
        seen.append(sealed)
        if len(seen) == 2:
            raise ValueError("cannot seal")
        return b"changed"

    with pytest.raises(ValueError, match="cannot seal"):
        stage.state.reseal(fail_at_the_second)
    assert stage.state.release_secrets("guestbook", 1) == before


def test_the_state_survives_being_opened_again(stage: Stage) -> None:
    stage.want(GUESTBOOK)
    before = stage.state.desired("guestbook")
    stage.reboot()
    assert stage.state.desired("guestbook") == before


def test_a_state_of_a_newer_release_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    State(path, lambda: 1).close()
    connection = apsw.Connection(str(path))
    connection.pragma("user_version", 99)
    connection.close()
    with pytest.raises(StateTooNew, match="version 99"):
        State(path, lambda: 1)


def test_a_new_state_is_durable_and_strict(tmp_path: Path) -> None:
    State(tmp_path / "state.db", lambda: 1).close()
    connection = apsw.Connection(str(tmp_path / "state.db"))
    tables = [
        sql
        for (sql,) in connection.execute(
            "SELECT sql FROM sqlite_schema WHERE type = 'table' AND name NOT LIKE 'sqlite_%'"
        )
    ]
    connection.close()
    assert len(tables) > 8
    assert all("STRICT" in sql for sql in tables)


def test_secrets_are_never_plain_in_the_files_of_the_state(stage: Stage) -> None:
    stage.want(GUESTBOOK, secrets={"KEY": "correct horse battery staple"})
    stage.state.change_secrets("guestbook", {"KEY": stage.sealer.seal("correct horse battery staple")}, ())
    stage.settle()
    data = b"".join(path.read_bytes() for path in stage.directory.glob("state.db*"))
    assert b"guestbook" in data
    assert b"correct horse" not in data


def test_the_recovery_key_alone_opens_the_secrets_and_seals_them_to_another_node(stage: Stage) -> None:
    stage.want(GUESTBOOK, secrets={"KEY": "s3cret"})
    other = Sealer(Identity.generate(), stage.owner.recipient)
    assert stage.state.reseal(lambda sealed: other.seal(unseal(sealed, stage.owner))) == 1
    assert other.unseal(stage.state.release_secrets("guestbook", 1)["KEY"]) == "s3cret"


def test_secrets_keys_and_tokens_do_not_print() -> None:
    identity = Identity.generate()
    assert "AGE-SECRET-KEY" not in repr(identity) + repr(Sealer(identity, identity.recipient))
    assert b"s3cret" not in seal("s3cret", [identity.recipient])


def test_everything_of_a_lost_node_moves_to_the_new_one(stage: Stage) -> None:
    stage.want(GUESTBOOK)
    stage.settle()
    new = Node(id="b" * 16, name="b", region="syd", recipient="", joined_ms=2)
    stage.state.move_everything("a" * 16, new)
    assert [machine.node for machine in stage.state.machines("guestbook")] == [new.id]
    assert [(volume.node, volume.state) for volume in stage.state.volumes()] == [(new.id, "restoring")]
    assert [node.name for node in stage.state.nodes()] == ["b"]


def test_the_journal_is_bounded(tmp_path: Path) -> None:
    state = State(tmp_path / "state.db", lambda: 1, kept_events=5)
    for number in range(12):
        state.add_event("", f"line {number}")
    assert [event.text for event in state.events()] == [f"line {number}" for number in range(11, 6, -1)]
    state.close()


def test_only_the_newest_local_token_of_a_node_is_known(stage: Stage) -> None:
    first = issue_local_token(stage.state, stage.directory, 1, "a")
    second = issue_local_token(stage.state, stage.directory, 2, "a")
    assert authenticate(stage.state.tokens(), f"Bearer {second}").name == "owner of a"
    with pytest.raises(NotAuthorised):
        authenticate(stage.state.tokens(), f"Bearer {first}")
    data = b"".join(path.read_bytes() for path in stage.directory.glob("state.db*"))
    assert second.encode() not in data
    assert ((stage.directory / "token").stat().st_mode & 0o777) == 0o600


def test_whose_token_it_is_can_be_told_while_the_state_is_held(stage: Stage) -> None:
    token = issue_local_token(stage.state, stage.directory, 1, "a")
    stage.want(GUESTBOOK, secrets={"KEY": "s3cret"})
    told: list[str] = []
    with ThreadPoolExecutor(1) as pool:

        def ask(sealed: bytes) -> bytes:
            asked = pool.submit(lambda: authenticate(stage.state.tokens(), f"Bearer {token}").name)
            told.append(asked.result(2))
            return sealed

        stage.state.reseal(ask)
    assert told == ["owner of a"]


def test_tokens_survive_the_state_being_opened_again(stage: Stage) -> None:
    token = issue_local_token(stage.state, stage.directory, 1, "a")
    stage.reboot()
    assert authenticate(stage.state.tokens(), f"Bearer {token}").name == "owner of a"


def test_an_app_that_is_not_there_is_not_found(stage: Stage) -> None:
    with pytest.raises(NotFound, match="there is no app"):
        stage.state.desired("nobody")


def test_what_a_client_names_is_removed_only_if_it_is_an_upload(tmp_path: Path) -> None:
    uploads = Uploads(tmp_path / "uploads", max_bytes=100, keep_s=60)
    uploads.clean()
    precious = tmp_path / "node.key"
    precious.write_text("x")
    for name in ("../node.key", str(precious), "..", ""):
        uploads.remove(name)
    assert precious.read_text() == "x"
    kept = uploads.begin()
    uploads.remove(kept)
    with pytest.raises(NotFound):
        uploads.path(kept)
