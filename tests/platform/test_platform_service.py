"""What users can ask for: deploys that wait, fail and go on; secrets; logs; access."""

from __future__ import annotations

import threading

import pytest
from platform_support import GUESTBOOK, OWNER, SITE, Live, until

from minipaas.access import Action, Principal, authorise
from minipaas.engine.fake import make_image
from minipaas.errors import BadRequest, BuildFailed, DeployFailed, Forbidden, NotFound, PlatformError, Unavailable
from minipaas.service import DeployRequest, Progress, SecretsChange
from minipaas.sources import Source
from minipaas.workload import container_name

FILES = {"Containerfile": b"FROM scratch\n", "app.py": b"print('hello')\n"}


def request_of(live: Live, manifest: str = GUESTBOOK) -> DeployRequest:
    return DeployRequest(Source(kind="source", upload=live.upload(FILES)), manifest)


def test_a_deploy_of_sources_ends_live_and_tells_its_steps(live: Live) -> None:
    told: list[Progress] = []
    release = live.platform.deploy(OWNER, "guestbook", request_of(live), told.append)
    assert (release.number, release.status) == (1, "live")
    texts = [progress.text for progress in told]
    assert texts[:2] == ["created app guestbook", "making the image"]
    assert "storing the image in the bucket" in texts
    assert "wait until v1 is healthy" in texts
    assert list(live.uploads._directory.iterdir()) == []


def test_the_image_is_in_the_bucket_before_the_release_is_wanted(live: Live) -> None:
    release = live.platform.deploy(OWNER, "guestbook", request_of(live))
    digest = release.image_digest.removeprefix("sha256:")
    assert live.stage.backups.images.head(f"manifests/{digest}.json").size_bytes > 0


def test_a_build_that_fails_leaves_no_release(live: Live) -> None:
    live.stage.engine.fake.faults.refuse_build = "RUN exited with 2"
    with pytest.raises(BuildFailed, match="RUN exited with 2"):
        live.platform.deploy(OWNER, "guestbook", request_of(live))
    assert live.platform.releases(OWNER, "guestbook") == []


def test_a_bucket_that_is_away_refuses_a_deploy_and_the_old_release_serves(live: Live) -> None:
    live.platform.deploy(OWNER, "guestbook", request_of(live))
    live.bucket_away = True
    with pytest.raises(Unavailable, match="so nothing was deployed"):
        live.platform.deploy(OWNER, "guestbook", request_of(live))
    assert live.platform.app(OWNER, "guestbook").release == 1
    assert len(live.platform.releases(OWNER, "guestbook")) == 1


def test_an_app_that_is_destroyed_while_it_is_deployed_leaves_no_image(live: Live) -> None:
    live.before_push = lambda: live.platform.destroy(OWNER, "guestbook")
    with pytest.raises(NotFound, match="was destroyed while it was deployed"):
        live.platform.deploy(OWNER, "guestbook", request_of(live))
    (tag,) = live.pushed
    assert not live.stage.engine.images.exists(tag)


def test_the_upload_of_a_deploy_that_is_refused_is_not_kept(live: Live) -> None:
    for name, manifest in (("guestbook", "not toml"), ("Guest Book", GUESTBOOK), ("other", GUESTBOOK)):
        with pytest.raises(PlatformError):
            live.platform.deploy(OWNER, name, request_of(live, manifest))
    assert list(live.uploads._directory.iterdir()) == []


def test_an_upload_that_is_gone_is_to_be_sent_again(live: Live) -> None:
    request = DeployRequest(Source(kind="source", upload="up_" + "0" * 24), GUESTBOOK)
    with pytest.raises(NotFound, match="send it again"):
        live.platform.deploy(OWNER, "guestbook", request)


def test_a_release_that_crashes_is_a_failed_deploy_and_the_old_one_goes_on(live: Live) -> None:
    live.platform.deploy(OWNER, "guestbook", request_of(live))
    crash_next_release(live)
    with pytest.raises(DeployFailed, match="exited with 1") as failure:
        live.platform.deploy(OWNER, "guestbook", request_of(live))
    assert str(failure.value).endswith("; v1 goes on serving")
    assert live.platform.app(OWNER, "guestbook").machines[0].state == "started"
    assert live.platform.app(OWNER, "guestbook").release == 1


def test_what_does_not_serve_again_is_not_said_to_serve(live: Live) -> None:
    live.platform.deploy(OWNER, "guestbook", request_of(live))
    live.stage.prober.failing = _Everything("not yet")
    with pytest.raises(DeployFailed) as failure:
        live.platform.deploy(OWNER, "guestbook", request_of(live))
    assert "; v1 does not serve either: guestbook does not come up again: not yet" in str(failure.value)


def crash_next_release(live: Live) -> None:
    """Every container but the first ends at once."""
    containers = live.stage.engine.fake.containers
    images = {each.image for each in containers.list()}
    faults = live.stage.engine.fake.faults

    def watch(spec):  # type: ignore[no-untyped-def]
        if spec.image not in images:
            faults.crash[spec.image] = 1
        return containers._new_address(spec)

    containers.address_of = watch


def test_two_deploys_of_an_app_take_turns_and_the_second_says_for_whom_it_waits(live: Live) -> None:
    hold = threading.Event()
    told: list[str] = []
    first = threading.Thread(
        target=lambda: live.platform.deploy(
            Principal("alice"), "guestbook", request_of(live), lambda progress: hold.wait(5) and None
        )
    )
    first.start()
    until(lambda: "guestbook" in live.platform._turns._holders)
    second = threading.Thread(
        target=lambda: live.platform.deploy(OWNER, "guestbook", request_of(live), lambda each: told.append(each.text))
    )
    second.start()
    until(lambda: "waiting for a deploy by alice" in told)
    hold.set()
    first.join(10)
    second.join(10)
    assert [release.number for release in live.platform.releases(OWNER, "guestbook")] == [2, 1]
    assert live.platform.app(OWNER, "guestbook").release == 2


def test_a_deploy_must_be_for_the_app_that_its_file_names(live: Live) -> None:
    with pytest.raises(BadRequest, match="says app = 'guestbook', but 'other'"):
        live.platform.deploy(OWNER, "other", request_of(live))


def test_an_image_reference_is_pulled(live: Live) -> None:
    live.stage.engine.images.remote["docker.io/library/site:1"] = make_image([b"\0" * 1024])
    request = DeployRequest(Source(kind="image", ref="docker.io/library/site:1"), SITE)
    assert live.platform.deploy(OWNER, "site", request).status == "live"


def test_secrets_reach_the_app_with_a_new_release_and_win_over_env(live: Live) -> None:
    live.platform.deploy(OWNER, "guestbook", request_of(live))
    assert live.platform.set_secrets(OWNER, "guestbook", {"COLOUR": "red"}) == SecretsChange(("COLOUR",), 2)
    assert live.stage.engine.witness.runs[-1].env["COLOUR"] == "red"
    live.platform.unset_secrets(OWNER, "guestbook", ["COLOUR"])
    assert live.stage.engine.witness.runs[-1].env["COLOUR"] == "green"


def test_a_change_of_secrets_that_changes_nothing_makes_no_release(live: Live) -> None:
    live.platform.deploy(OWNER, "guestbook", request_of(live))
    live.platform.set_secrets(OWNER, "guestbook", {"KEY": "a", "OTHER": ""})
    before = live.stage.engine.running()[0].id
    assert live.platform.set_secrets(OWNER, "guestbook", {"KEY": "a", "OTHER": ""}) == SecretsChange()
    assert live.platform.set_secrets(OWNER, "guestbook", {"KEY": "b", "OTHER": ""}) == SecretsChange(("KEY",), 3)
    assert len(live.platform.releases(OWNER, "guestbook")) == 3
    assert live.stage.engine.running()[0].id != before


def test_secrets_whose_release_failed_are_set_again_with_the_same_value(live: Live) -> None:
    live.platform.deploy(OWNER, "guestbook", request_of(live))
    live.stage.prober.failing = _Everything("not yet")
    with pytest.raises(DeployFailed):
        live.platform.set_secrets(OWNER, "guestbook", {"KEY": "a"})
    live.stage.prober.failing = {}
    assert live.platform.set_secrets(OWNER, "guestbook", {"KEY": "a"}) == SecretsChange(("KEY",), 3)
    assert live.stage.engine.witness.runs[-1].env["KEY"] == "a"


def test_no_secrets_at_all_are_refused(live: Live) -> None:
    live.platform.create_app(OWNER, "guestbook")
    with pytest.raises(BadRequest, match="no secret is named"):
        live.platform.set_secrets(OWNER, "guestbook", {})
    with pytest.raises(BadRequest, match="no secret is named"):
        live.platform.unset_secrets(OWNER, "guestbook", [])


def test_a_secret_that_cannot_be_opened_is_set_anew(live: Live) -> None:
    live.platform.create_app(OWNER, "guestbook")
    live.stage.state.change_secrets("guestbook", {"KEY": b"sealed to nobody"}, ())
    assert live.platform.set_secrets(OWNER, "guestbook", {"KEY": "a"}) == SecretsChange(("KEY",))
    assert live.platform.set_secrets(OWNER, "guestbook", {"KEY": "a"}) == SecretsChange()


@pytest.mark.parametrize("name", ["FLY_APP_NAME", "MINIPAAS_NODE", "1X", "A-B", ""])
def test_names_that_are_ours_or_no_variables_are_refused(live: Live, name: str) -> None:
    live.platform.create_app(OWNER, "guestbook")
    with pytest.raises(BadRequest):
        live.platform.set_secrets(OWNER, "guestbook", {name: "x"})


def test_a_restart_returns_when_the_new_container_is_healthy(live: Live) -> None:
    live.platform.deploy(OWNER, "guestbook", request_of(live))
    before = live.stage.engine.running()[0].id
    live.platform.restart(OWNER, "guestbook")
    assert live.stage.engine.running()[0].id != before


def test_a_restart_that_does_not_come_up_says_why(live: Live) -> None:
    live.platform.deploy(OWNER, "guestbook", request_of(live))
    live.stage.engine.fake.faults.crash[live.stage.engine.running()[0].image] = 7
    with pytest.raises(Unavailable, match="exited with 7"):
        live.platform.restart(OWNER, "guestbook")


def test_destroy_says_until_when_the_data_are_kept(live: Live) -> None:
    live.platform.deploy(OWNER, "guestbook", request_of(live))
    app = live.platform.destroy(OWNER, "guestbook")
    assert app.purge_after_ms == live.stage.now_ms + 7 * 86_400_000
    until(lambda: live.stage.engine.containers.list() == ())
    assert [volume.state for volume in live.platform.volumes(OWNER)] == ["pending_destroy"]
    assert live.platform.app(OWNER, "guestbook").state == "destroyed"


def test_an_app_that_is_destroyed_while_it_is_deployed_is_gone(live: Live) -> None:
    live.stage.prober.failing = _Everything("not yet")
    failures: list[Exception] = []

    def deploy() -> None:
        try:
            live.platform.deploy(OWNER, "guestbook", request_of(live))
        except DeployFailed as error:
            failures.append(error)

    thread = threading.Thread(target=deploy)
    thread.start()
    until(lambda: len(live.stage.engine.running()) == 1)
    live.platform.destroy(OWNER, "guestbook")
    thread.join(5)
    assert "the app was destroyed" in str(failures[0])
    until(lambda: live.stage.engine.containers.list() == ())


class _Everything(dict[str, str]):
    def __init__(self, words: str) -> None:
        self._words = words

    def get(self, key: str, default: object = None) -> str:  # type: ignore[override]
        return self._words


def test_followed_logs_go_on_with_the_next_release(live: Live) -> None:
    live.platform.deploy(OWNER, "guestbook", request_of(live))
    lines: list[str] = []
    gone = threading.Event()

    def follow() -> None:
        for _, line in live.platform.logs(OWNER, "guestbook", tail=None, follow=True, gone=gone.is_set):
            lines.append(line.text)

    thread = threading.Thread(target=follow)
    say(live, "from the first")
    thread.start()
    until(lambda: lines == ["from the first"])
    live.platform.deploy(OWNER, "guestbook", request_of(live))
    say(live, "from the second")
    until(lambda: lines == ["from the first", "from the second"])
    gone.set()
    say(live, "the end")
    thread.join(5)
    assert not thread.is_alive()


def say(live: Live, text: str) -> None:
    machine = live.stage.state.machines("guestbook")[0]
    live.stage.engine.fake.containers.say(container_name(machine), text)


def test_status_shows_machines_volumes_and_databases(live: Live) -> None:
    live.platform.deploy(OWNER, "guestbook", request_of(live))
    snapshot = live.platform.snapshot(OWNER)
    (app,) = snapshot.apps
    assert (app.state, app.release, app.url) == ("deployed", 1, "http://guestbook.localhost/")
    assert [machine.state for machine in app.machines] == ["started"]
    assert [database.words for database in app.volumes[0].databases] == ["protected (lag 0.0 s)"]
    assert snapshot.node.durable


def test_a_full_disk_is_a_trouble_that_heals(live: Live) -> None:
    live.platform.deploy(OWNER, "guestbook", request_of(live))
    state = live.stage.state
    state._db.pragma("max_page_count", 1)
    with pytest.raises(Unavailable, match="is full; make room"):
        for _ in range(500):
            state.add_event("", "x" * 4000)
    assert live.platform.app(OWNER, "guestbook").release == 1
    state._db.pragma("max_page_count", 2**31)
    live.platform.restart(OWNER, "guestbook")


def test_authorise_lets_pass_only_what_a_token_gives() -> None:
    reader = Principal("reader", ("read",))
    authorise(reader, Action.READ, "guestbook")
    with pytest.raises(Forbidden, match="'reader' does not give the right to: destroy guestbook"):
        authorise(reader, Action.DESTROY, "guestbook")


class EveryImageBut(dict[str, int]):
    """Exit codes of containers of all images but one."""

    def __init__(self, image: str) -> None:
        self.image = image

    def get(self, image: str, default: object = None) -> object:  # type: ignore[override]
        return default if image == self.image else 1


def test_the_engine_keeps_the_image_that_serves_and_few_of_those_that_failed(live: Live) -> None:
    images = live.stage.engine.images
    images.remote["site"] = make_image([bytes(1024)])
    request = DeployRequest(Source(kind="image", ref="site"), SITE)
    live.platform.deploy(OWNER, "site", request)
    serving = live.stage.state.release("site", 1).image
    live.stage.engine.fake.faults.crash = EveryImageBut(serving)
    for _ in range(5):
        with pytest.raises(DeployFailed):
            live.platform.deploy(OWNER, "site", request)
    known = [release.image for release in live.stage.state.releases("site")]
    assert [image for image in known if images.exists(image)] == [*known[:3], serving]
