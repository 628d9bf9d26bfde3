"""The JSON API: who may ask, what errors look like, and what streams."""

from __future__ import annotations

import json
import queue
import threading
from collections.abc import Iterator

import pytest
from flask.testing import FlaskClient
from platform_support import GUESTBOOK, QUICK, Live, tar_of, until

from minipaas.access import new_token, token_hash
from minipaas.model import Token
from minipaas.settings import Limits
from minipaas.web import create_app

FILES = {"Containerfile": b"FROM scratch\n"}


class Api:
    def __init__(self, live: Live) -> None:
        self.live = live
        self.flask = create_app(live.platform, QUICK)
        self.client: FlaskClient = self.flask.test_client()
        self.owner = self.token("owner", ("*",))
        self.nobody = self.token("nobody", ())

    def token(self, name: str, abilities: tuple[str, ...]) -> dict[str, str]:
        token = new_token()
        self.live.stage.state.replace_token(
            Token(name=name, sha256=token_hash(token), abilities=abilities, created_ms=1)
        )
        return {"Authorization": f"Bearer {token}"}

    def upload(self, content: bytes) -> str:
        upload = str(self.client.post("/v1/uploads", headers=self.owner).json["id"])  # type: ignore[index]
        answer = self.client.put(f"/v1/uploads/{upload}?at=0", data=content, headers=self.owner)
        assert answer.json == {"size": len(content)}
        return upload

    def deploy(self) -> list[dict[str, object]]:
        upload = self.upload(tar_of(FILES))
        body = {"source": {"kind": "source", "upload": upload}, "manifest": GUESTBOOK, "file": "minipaas.toml"}
        answer = self.client.post("/v1/apps/guestbook/deploys", json=body, headers=self.owner)
        assert answer.mimetype == "application/x-ndjson"
        return [json.loads(line) for line in answer.data.splitlines()]


@pytest.fixture
def api(live: Live) -> Iterator[Api]:
    yield Api(live)


def routes(api: Api) -> list[tuple[str, str]]:
    rules = [rule for rule in api.flask.url_map.iter_rules() if rule.rule.startswith("/v1")]
    return [
        (method, rule.rule.replace("<app>", "guestbook"))
        for rule in rules
        for method in (rule.methods or set()) - {"HEAD", "OPTIONS"}
    ]


def test_every_route_asks_for_a_token_and_for_the_right(api: Api) -> None:
    assert len(routes(api)) >= 15
    for method, path in routes(api):
        assert api.client.open(path, method=method).status_code == 401, path
        wrong = api.client.open(path, method=method, headers={"Authorization": "Bearer wrong"})
        assert wrong.status_code == 401, path
        denied = api.client.open(path, method=method, headers=api.nobody)
        assert (denied.status_code, denied.json["error"]["code"]) == (403, "Forbidden"), path


def test_a_deploy_streams_its_steps_and_its_end(api: Api) -> None:
    events = api.deploy()
    assert {"event", "text", "release"} == set(events[0])
    assert events[-1] == {"event": "done", "text": "guestbook v1 is live", "release": 1}


def test_a_deploy_goes_on_when_the_client_goes_away(api: Api) -> None:
    upload = api.upload(tar_of(FILES))
    body = {"source": {"kind": "source", "upload": upload}, "manifest": GUESTBOOK}
    answer = api.client.post("/v1/apps/guestbook/deploys", json=body, headers=api.owner, buffered=False)
    next(answer.response)
    answer.close()
    until(lambda: api.client.get("/v1/apps/guestbook", headers=api.owner).json.get("release") == 1)


def test_a_deploy_that_fails_ends_with_the_reason(api: Api) -> None:
    api.live.stage.engine.fake.faults.refuse_build = "RUN exited with 2"
    assert api.deploy()[-1]["event"] == "failed"


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/v1/apps/nobody", 404, "NotFound"),
        ("GET", "/v1/nothing", 404, "NotFound"),
        ("PATCH", "/v1/apps", 405, "BadRequest"),
        ("POST", "/v1/apps", 400, "BadRequest"),
        ("GET", "/v1/apps/nobody/logs?tail=x", 400, "BadRequest"),
        ("GET", f"/v1/apps/nobody/logs?tail={'9' * 5000}", 400, "BadRequest"),
        ("GET", "/v1/apps/nobody/logs?tail=99999999999", 400, "BadRequest"),
        ("PUT", "/v1/apps/nobody/secrets", 400, "BadRequest"),
        ("DELETE", "/v1/apps/nobody/secrets", 400, "BadRequest"),
        ("PUT", "/v1/uploads/up_1?at=0", 400, "BadRequest"),
        ("PUT", f"/v1/uploads/up_{'0' * 24}?at=0", 404, "NotFound"),
        ("PUT", f"/v1/uploads/up_{'0' * 24}", 400, "BadRequest"),
        ("POST", "/v1/apps/nobody/restart", 404, "NotFound"),
    ],
)
def test_errors_are_json_with_their_class_and_status(api: Api, method: str, path: str, status: int, code: str) -> None:
    answer = api.client.open(path, method=method, headers=api.owner)
    assert (answer.status_code, answer.json["error"]["code"]) == (status, code)
    assert answer.json["error"]["message"]


def test_an_unknown_field_is_refused_by_name(api: Api) -> None:
    answer = api.client.post("/v1/apps", json={"name": "site", "colour": "red"}, headers=api.owner)
    assert answer.status_code == 400
    assert "colour" in answer.json["error"]["message"]


def test_an_upload_beyond_the_limit_is_refused_and_not_kept(api: Api) -> None:
    upload = api.upload(bytes(QUICK.upload_bytes))
    answer = api.client.put(f"/v1/uploads/{upload}?at={QUICK.upload_bytes}", data=b"x", headers=api.owner)
    assert (answer.status_code, answer.json["error"]["code"]) == (413, "TooMuch")
    assert list(api.live.uploads._directory.iterdir()) == []


def test_a_part_of_an_upload_may_come_again_but_none_may_be_left_out(api: Api) -> None:
    upload = api.upload(b"first")
    for at, status in ((5, 200), (5, 200), (11, 409)):
        answer = api.client.put(f"/v1/uploads/{upload}?at={at}", data=b"again", headers=api.owner)
        assert answer.status_code == status
    assert api.live.uploads.path(upload).read_bytes() == b"firstagain"


def test_apps_volumes_releases_and_status_are_lists_and_values(api: Api) -> None:
    api.deploy()
    get = lambda path: api.client.get(f"/v1/{path}", headers=api.owner).json
    assert [app["name"] for app in get("apps")] == ["guestbook"]
    assert get("apps/guestbook")["state"] == "deployed"
    assert [release["status"] for release in get("apps/guestbook/releases")] == ["live"]
    assert [volume["name"] for volume in get("volumes")] == ["data"]
    assert get("status")["name"] == "a"


def test_secrets_come_back_as_names_only(api: Api) -> None:
    api.client.post("/v1/apps", json={"name": "guestbook"}, headers=api.owner)
    put = api.client.put("/v1/apps/guestbook/secrets", json={"KEY": "s3cret"}, headers=api.owner)
    assert put.json == {"changed": ["KEY"], "release": None}
    again = api.client.put("/v1/apps/guestbook/secrets", json={"KEY": "s3cret"}, headers=api.owner)
    assert again.json == {"changed": [], "release": None}
    answer = api.client.get("/v1/apps/guestbook/secrets", headers=api.owner)
    assert [secret["name"] for secret in answer.json] == ["KEY"]
    assert b"s3cret" not in answer.data
    gone = api.client.delete("/v1/apps/guestbook/secrets", json={"names": ["KEY"]}, headers=api.owner)
    assert gone.status_code == 200


def test_logs_are_lines_of_json(api: Api) -> None:
    api.deploy()
    api.live.stage.engine.fake.containers.say(api.live.stage.engine.running()[0].name, "hello")
    answer = api.client.get("/v1/apps/guestbook/logs?tail=5", headers=api.owner)
    assert [json.loads(line)["text"] for line in answer.data.splitlines()] == ["hello"]


def test_events_begin_with_a_snapshot(api: Api) -> None:
    answer = api.client.get("/v1/events", headers=api.owner, buffered=False)
    first = next(answer.response)  # type: ignore[call-overload]
    answer.close()
    assert first.startswith(b"event: snapshot\ndata: {")
    assert json.loads(first.split(b"data: ")[1])["node"]["name"] == "a"


def test_changes_that_wait_are_bounded_and_status_answers(api: Api) -> None:
    api.deploy()
    answers: queue.SimpleQueue[tuple[int, str]] = queue.SimpleQueue()

    def restart() -> None:
        answer = api.flask.test_client().post("/v1/apps/guestbook/restart", headers=api.owner)
        answers.put((answer.status_code, answer.json.get("error", {}).get("message", "")))  # type: ignore[union-attr]

    with api.live.platform._turns.take("guestbook", "a deploy by alice", print, 1.0):
        threads = [threading.Thread(target=restart) for _ in range(QUICK.changes + 4)]
        for thread in threads:
            thread.start()
        refused = [answers.get(timeout=5) for _ in range(len(threads) - QUICK.waiting_changes)]
        assert {status for status, _ in refused} == {429}
        assert any("busy with a deploy by alice" in words for _, words in refused)
        assert api.client.get("/v1/status", headers=api.owner).status_code == 200
    assert [answers.get(timeout=10)[0] for _ in range(QUICK.waiting_changes)] == [200] * QUICK.waiting_changes
    for thread in threads:
        thread.join(5)


def test_a_deploy_counts_until_it_is_over_though_its_client_has_gone(api: Api) -> None:
    go_on = threading.Event()
    api.live.before_push = lambda: go_on.wait(10)
    for number in range(QUICK.changes):
        begin_and_leave(api, f"app-{number}")
    refused = api.client.post("/v1/apps/app-0/restart", headers=api.owner)
    assert (refused.status_code, refused.json["error"]["code"]) == (429, "TooManyClients")
    go_on.set()
    until(lambda: api.client.post("/v1/apps/nobody/restart", headers=api.owner).status_code == 404)
    until(lambda: [app["state"] for app in api.client.get("/v1/apps", headers=api.owner).json].count("deployed") == 8)


def begin_and_leave(api: Api, app: str) -> None:
    upload = api.upload(tar_of(FILES))
    manifest = GUESTBOOK.replace("guestbook", app)
    body = {"source": {"kind": "source", "upload": upload}, "manifest": manifest}
    answer = api.client.post(f"/v1/apps/{app}/deploys", json=body, headers=api.owner, buffered=False)
    assert answer.status_code == 200
    answer.close()


def test_answers_that_last_leave_threads_for_those_that_do_not() -> None:
    limits = Limits()
    assert 2 * limits.followers + limits.changes + 8 <= limits.api_threads


def test_no_more_clients_follow_than_there_may_be(api: Api) -> None:
    open_answers = [api.client.get("/v1/events", headers=api.owner, buffered=False) for _ in range(QUICK.followers)]
    assert api.client.get("/v1/events", headers=api.owner).status_code == 429
    for answer in open_answers:
        answer.close()
    again = api.client.get("/v1/events", headers=api.owner, buffered=False)
    assert again.status_code == 200
    again.close()
