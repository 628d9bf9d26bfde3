"""Claims about upkeep: replicas stay small and quick to restore, and no moment of the window is ever lost to it."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from restore_support import ReplicaBuilder

from replicator.errors import NothingToRestore, StoreUnavailable
from replicator.layout import SNAPSHOT_LEVEL, SegmentRef
from replicator.replica import Replica
from replicator.restore import RestoreOptions, restore
from replicator.store import ObjectStore
from replicator.store.memory import MemoryStore
from replicator.upkeep import Upkeep, UpkeepSettings
from replicator.values import Position

PAGE = 512
START_MS = 1_790_000_000_000
QUICK = UpkeepSettings(levels_s=(10, 60), snapshot_s=300, retention_s=600, fine_s=120, grace_s=20)

_targets = itertools.count()


class Site:
    """A replica that is written, and its upkeep, in a time that passes only when the test says so.

    commits: per timeline, when something was committed on it or on what it forked from, the state then, and its txid.
    asked: the store as the upkeep sees it, with hooks of its own.
    """

    def __init__(self, store: MemoryStore | None = None, settings: UpkeepSettings = QUICK, seed: int = 0) -> None:
        self.store = store or MemoryStore()
        self.settings = settings
        self.asked = self.store.sub("")  # the same, as the upkeep sees it
        self.builder = ReplicaBuilder(self.store, PAGE)
        self.now_s = 0.0
        self.timeline = 1
        self.txid = 0
        self.commits: dict[int, list[tuple[int, bytes, int]]] = {1: []}
        self.left_ms: dict[int, int] = {}
        self._random = random.Random(seed)
        self._due: float | None = None
        self.builder.timeline(1)
        self.upkeep = self.started()
        self.commit(snapshot=True)

    @property
    def now_ms(self) -> int:
        return START_MS + round(self.now_s * 1000)

    @property
    def replica(self) -> Replica:
        return Replica(self.store)

    def started(self) -> Upkeep:
        """A new process takes over; the one before is not asked any more."""
        self._due = self.now_s + self.settings.survey_s
        self.asked.before = self.asked.after = lambda operation, key: None
        self.upkeep = Upkeep(
            self.asked,
            self.settings,
            lambda: self.timeline,
            self._wake,
            now_ms=lambda: self.now_ms,
            monotonic=lambda: self.now_s,
        )
        return self.upkeep

    def _wake(self, upkeep: Upkeep, delay_s: float) -> None:
        if upkeep is self.upkeep:
            self._due = min(self._due or self.now_s + delay_s, self.now_s + delay_s)

    def state(self) -> bytes:
        """The next one: some pages more or less, a few of them changed."""
        last = self.commits[self.timeline][-1][1] if self.commits[self.timeline] else b""
        pages = [last[at : at + PAGE] for at in range(0, len(last), PAGE)]
        count = max(1, min(20, len(pages) + self._random.choice([-6, -1, 0, 0, 0, 0, 1, 2, 5])))
        pages = pages[:count] + [self._random.randbytes(PAGE) for _ in range(count - len(pages))]
        pages[self._random.randrange(count)] = self._random.randbytes(PAGE)
        return b"".join(pages)

    def commit(self, *, snapshot: bool = False) -> None:
        self.txid += 1
        at, state = Position(self.timeline, self.txid), self.state()
        self.builder.times[at] = self.now_ms
        ref = self.builder.snapshot(at, state) if snapshot else self.builder.commit(at, state)
        self.commits[self.timeline].append((self.now_ms, state, self.txid))
        self.upkeep.arrived(ref, self.replica.header(ref))

    def fork(self, txid: int, *, epoch: int = 0) -> None:
        """Another writer goes on from an earlier position that can be restored."""
        old, number = self.timeline, max(self.commits) + 1
        self.builder.states.setdefault(Position(old, txid), self.restored(RestoreOptions(txid=txid, timeline=old)))
        self.builder.timeline(number, Position(old, txid), self.now_ms, epoch=epoch)
        self.commits[number] = [one for one in self.commits[old] if one[2] <= txid]
        self.left_ms.setdefault(old, self.now_ms)
        self.timeline, self.txid = number, txid
        self.started()

    def turn_to(self, timeline: int) -> None:
        """What is done from now on is done by the writer of another timeline."""
        self.timeline, self.txid = timeline, self.commits[timeline][-1][2]
        self.started()

    def pass_time(self, seconds: float) -> None:
        """As the scheduler would: steps are made when they are due."""
        end = self.now_s + seconds
        for _ in range(10_000):
            if self._due is None or self._due > end:
                self.now_s = end
                return
            self.now_s = max(self.now_s, self._due)
            self._due = None
            wait_s = self.upkeep.step()
            if wait_s is not None:
                self._wake(self.upkeep, wait_s)
        raise AssertionError("the upkeep runs hot")

    def busy(self, seconds: int, every_s: int = 1) -> None:
        for _ in range(0, seconds, every_s):
            self.commit()
            self.pass_time(every_s)

    def segments(self, level: int | None = None) -> list[SegmentRef]:
        return [ref for ref in self.replica.segments() if level is None or ref.level == level]

    def restored(self, options: RestoreOptions, store: ObjectStore | None = None) -> bytes:
        target = Path(f"/dev/shm/upkeep-{id(self)}-{next(_targets)}.db")
        try:
            restore(
                store or self.store,
                target,
                RestoreOptions(**{**vars(options), "integrity_check": "none", "parallelism": 2}),
            )
            return target.read_bytes()
        finally:
            target.unlink(missing_ok=True)

    def check(self, moments: int = 12) -> None:
        """Moments all over the window give what was committed then; the newest state and the recent ones exactly."""
        assert self.settings.retention_s is not None
        for number, commits in self.commits.items():
            end_ms = self.left_ms.get(number, self.now_ms)
            if end_ms < self.now_ms - self.settings.retention_s * 1000:
                continue
            assert self.restored(RestoreOptions(timeline=number)) == commits[-1][1]
            begin_ms = max(commits[0][0], self.now_ms - round(self.settings.retention_s * 1000))
            for _ in range(moments):
                at_ms = self._random.randint(begin_ms, max(begin_ms, end_ms))
                self._check_moment(number, commits, at_ms)

    def _check_moment(self, number: int, commits: list[tuple[int, bytes, int]], at_ms: int) -> None:
        before = [one for one in commits if one[0] <= at_ms]
        found = self.restored(RestoreOptions(at_ms=at_ms, timeline=number))
        place = max((n for n, (_, state, _) in enumerate(before) if state == found), default=None)
        assert place is not None, "a state that was not committed by then"
        if at_ms >= self.now_ms - self.settings.fine_s * 1000:
            assert found == before[-1][1]
        elif found != before[-1][1]:
            assert before[-1][0] - before[place + 1][0] <= 2 * self.settings.survey_s * 1000


# -- compaction --------------------------------------------------------------------------------------------------------


def test_what_was_shipped_is_merged_level_by_level() -> None:
    site = Site()
    site.busy(30)
    assert site.segments(1) and not site.segments(2)
    site.busy(40)
    assert site.segments(2)
    assert [ref.first for ref in site.segments(2)] == [2]
    site.check()


def test_in_the_steady_state_a_replica_is_listed_once_in_the_longest_interval() -> None:
    site = Site()
    site.busy(600, 2)
    listed = [key for operation, key in site.store.calls if operation == "list" and key == "segments/"]
    assert len(listed) <= 10


def test_an_idle_replica_is_asked_for_nothing() -> None:
    site = Site()
    site.busy(100)
    site.pass_time(3 * 86400)
    asked = len(site.store.calls)
    site.pass_time(30 * 86400)
    assert len(site.store.calls) == asked
    site.check()


def test_a_restore_after_many_commits_needs_few_segments() -> None:
    site = Site()
    site.busy(1500, 2)
    assert len(site.segments()) < 150
    assert len(site.segments(SNAPSHOT_LEVEL)) >= 2
    assert max(ref.last for ref in site.segments(SNAPSHOT_LEVEL)) > 600
    site.check()


def test_of_a_database_that_is_seldom_written_every_state_is_kept_for_the_window() -> None:
    site = Site(settings=UpkeepSettings())
    for _ in range(20):
        site.commit()
        site.pass_time(86400)
        assert site.upkeep.problem is None
    for ms, state, _ in site.commits[1][-7:]:
        assert site.restored(RestoreOptions(at_ms=ms + 86_000_000)) == state
    assert len(site.segments()) < 20


def test_a_database_of_which_little_changes_is_not_stored_anew() -> None:
    site = Site()
    large = random.Random(1).randbytes(PAGE * 4000)
    site.state = lambda: large[:-PAGE] + random.Random(site.txid).randbytes(PAGE)  # type: ignore[method-assign]
    site.commit(snapshot=False)
    site.txid += 1
    at = Position(1, site.txid)
    site.builder.times[at] = site.now_ms
    site.builder.snapshot(at, large)
    site.commits[1].append((site.now_ms, large, site.txid))
    site.busy(600, 60)
    assert [ref.last for ref in site.segments(SNAPSHOT_LEVEL) if ref.last > at.txid] == []


def test_without_levels_segments_stay_as_they_were_shipped() -> None:
    site = Site(settings=UpkeepSettings(levels_s=(), retention_s=None))
    site.busy(100)
    site.pass_time(4000)
    assert not site.segments(1) and len(site.segments(0)) == 100


def test_a_merge_goes_on_where_a_failure_ended_it_and_status_says_so_meanwhile() -> None:
    site = Site()
    site.busy(5)
    site.store.fail_next("put", StoreUnavailable("the store is down"), times=3)
    site.pass_time(30)
    assert str(site.upkeep.problem) == "the store is down"
    assert not site.segments(1)
    site.pass_time(600)
    assert site.upkeep.problem is None
    assert site.segments(1) or site.segments(2)
    site.check()


def test_what_a_killed_process_merged_and_did_not_verify_is_verified_by_the_next() -> None:
    site = Site()
    site.busy(8)
    site.builder.increment(Position(1, 9), 2)  # the same that the upkeep will want to store
    site.pass_time(60)
    assert site.upkeep.problem is None or "not what was to be stored" in str(site.upkeep.problem)
    site.pass_time(200)
    assert site.upkeep.problem is None
    site.check()


def test_a_merged_segment_that_reads_back_damaged_is_taken_away_again() -> None:
    site = Site()

    def damage(operation: str, key: str) -> None:
        if operation == "put" and "/1/" in key:
            site.asked.after = lambda operation, key: None
            body = site.store.get(key)
            site.store.delete([key])
            site.store.put(key, body[:200] + bytes([body[200] ^ 1]) + body[201:])

    site.busy(5)
    site.asked.after = damage
    site.pass_time(20)
    assert "damaged" in str(site.upkeep.problem)
    assert not site.segments(1)
    site.pass_time(300)
    assert site.upkeep.problem is None
    site.check()


def test_stop_ends_a_merge_and_nothing_of_it_is_stored() -> None:
    site = Site()
    site.busy(8)
    site.asked.before = lambda operation, key: site.upkeep.stop() if operation == "put" else None
    site.pass_time(100)
    assert not site.segments(1)
    assert site.upkeep.step() is None


# -- retention ---------------------------------------------------------------------------------------------------------


def test_what_the_window_does_not_need_is_deleted() -> None:
    site = Site()
    site.busy(2000, 2)
    oldest = min(site.replica.header(ref).last_commit_ms for ref in site.segments())
    assert oldest >= site.now_ms - 2 * 600_000
    shipped = [site.replica.header(ref).last_commit_ms for ref in site.segments(0)]
    assert min(shipped) >= site.now_ms - 400_000
    assert len(shipped) >= 60
    site.check(moments=40)


def test_nothing_is_deleted_when_that_is_wished() -> None:
    site = Site(settings=UpkeepSettings(levels_s=(10, 60), retention_s=None))
    site.busy(300)
    site.pass_time(10 * 86400)
    assert len(site.segments(0)) == 300


def test_what_can_go_stays_for_the_grace_period() -> None:
    site = Site(settings=UpkeepSettings(levels_s=(10, 60), fine_s=1, retention_s=600, grace_s=1000))
    site.busy(300)
    site.pass_time(600)
    assert len(site.segments(0)) == 300
    site.pass_time(1500)
    assert len(site.segments(0)) < 30
    site.check()


def test_after_a_restart_a_merged_segment_is_read_before_what_it_replaces_is_deleted() -> None:
    site = Site()
    site.busy(65)
    (merged,) = site.segments(2)
    site.builder.damage(merged, lambda body: body[:200] + bytes([body[200] ^ 1]) + body[201:])
    site.started()
    site.pass_time(400)
    assert "damaged" in str(site.upkeep.problem)
    assert {ref.last for ref in site.segments(0)} >= {*range(2, 62)}  # until the window has passed
    site.builder.damage(merged, lambda body: body[:200] + bytes([body[200] ^ 1]) + body[201:])
    site.pass_time(86400)
    assert site.upkeep.problem is None
    assert len(site.segments(0)) < 65


def test_a_damaged_segment_keeps_nothing_else_from_being_merged_and_thinned() -> None:
    site = Site()
    site.busy(50)
    site.fork(45)
    damaged = next(ref for ref in site.segments(0) if ref.timeline == 1 and ref.last == 47)
    site.builder.damage(damaged, lambda body: body[:170] + bytes([body[170] ^ 1]) + body[171:])
    site.busy(450, 2)
    assert damaged.key in str(site.upkeep.problem)
    assert site.segments(2) and len(site.segments(SNAPSHOT_LEVEL)) > 1
    assert site.restored(RestoreOptions()) == site.commits[2][-1][1]


def test_a_replica_that_was_emptied_is_named() -> None:
    site = Site()
    site.busy(50)
    site.store.delete([info.key for info in site.store.list()])
    site.pass_time(30)
    assert "was it emptied?" in str(site.upkeep.problem)


def test_the_writer_of_a_timeline_that_was_left_does_nothing_any_more() -> None:
    site = Site()
    site.busy(200)
    old = site.upkeep
    before = site.segments()
    site.builder.timeline(2, Position(1, 150))
    site.pass_time(86400)
    assert site.upkeep is old and set(before) <= set(site.segments())


def test_a_timeline_that_begins_while_something_is_to_be_deleted_stops_that() -> None:
    site = Site()
    site.busy(200)
    deletions: list[str] = []

    def begin(operation: str, key: str) -> None:
        if operation == "delete" and not deletions:
            deletions.append(key)
        if operation == "list" and key == "segments/" and len(site.replica.timelines()) == 1:
            site.asked.before = lambda operation, key: deletions.append(key) if operation == "delete" else None
            site.builder.timeline(2, Position(1, 3))

    site.pass_time(200)
    shipped = site.segments(0)
    site.asked.before = begin
    site.pass_time(86400)
    assert deletions == [] and site.segments(0) == shipped


def test_an_abandoned_end_stays_for_the_window_and_goes_after_it() -> None:
    site = Site()
    site.busy(100)
    site.fork(90)
    site.busy(300, 2)
    site.check(moments=30)
    assert site.restored(RestoreOptions(position=Position(1, 101))) == site.commits[1][-1][1]
    site.busy(1600, 4)
    site.pass_time(1000)
    assert {ref.timeline for ref in site.segments()} == {2}
    site.check()


def test_a_late_writer_under_an_older_epoch_merges_and_deletes_nothing_that_a_newer_one_needs() -> None:
    site = Site()
    site.busy(100)
    site.fork(90, epoch=1)
    site.busy(200, 2)
    site.turn_to(1)
    site.fork(101)
    before = site.segments()
    site.busy(30)
    site.pass_time(86400)
    assert site.timeline == 3
    assert [ref for ref in site.segments() if ref.timeline < 3] == before
    assert len([ref for ref in site.segments(0) if ref.timeline == 3]) == 30
    assert site.restored(RestoreOptions()) == site.commits[2][-1][1]


def test_the_newest_epoch_keeps_its_replica_small_though_a_late_writer_took_a_higher_number() -> None:
    site = Site()
    site.busy(100)
    site.fork(90, epoch=1)
    site.busy(100)
    site.turn_to(1)
    site.fork(101)
    site.busy(30)
    site.left_ms[3] = site.now_ms
    site.turn_to(2)
    site.busy(300, 2)
    site.check(moments=30)
    site.busy(1600, 4)
    site.pass_time(1000)
    assert {ref.timeline for ref in site.segments()} == {2} and len(site.segments()) < 60
    site.check()


def test_what_leads_to_the_fork_of_a_late_writer_stays_until_it_has_shipped_something() -> None:
    site = Site()
    site.busy(100)
    site.fork(90, epoch=1)
    site.busy(450, 2)
    site.turn_to(1)
    site.fork(101)
    site.turn_to(2)
    site.busy(300, 2)
    assert site.now_ms - site.left_ms[1] > 1000 * site.settings.retention_s
    site.turn_to(3)
    site.commit()
    assert site.restored(RestoreOptions(timeline=3)) == site.commits[3][-1][1]


def test_a_merged_segment_never_crosses_a_fork() -> None:
    site = Site()
    site.busy(25)
    site.fork(20)
    site.busy(300, 2)
    assert all(not (ref.first <= 20 < ref.last) for ref in site.segments(2) if ref.timeline == 1)
    site.check(moments=30)


def test_a_restore_that_is_under_way_finds_another_way_when_a_segment_is_deleted() -> None:
    site = Site(settings=UpkeepSettings(levels_s=(10, 60), fine_s=1, retention_s=600, grace_s=0))
    site.busy(70)
    expected = site.commits[1][-1][1]
    newest = site.segments(0)[-1]

    def delete_meanwhile(operation: str, key: str) -> None:
        if operation == "get" and key == newest.key:
            site.store.before = lambda operation, key: None
            site.pass_time(200)

    site.store.before = delete_meanwhile
    assert site.restored(RestoreOptions(txid=newest.last)) == expected
    assert not any(ref.last < 60 for ref in site.segments(0))


# -- any sequence ------------------------------------------------------------------------------------------------------


ACTIONS = st.one_of(
    st.tuples(st.just("busy"), st.integers(1, 90)),
    st.tuples(st.just("idle"), st.integers(1, 900)),
    st.tuples(st.just("restart"), st.just(0)),
    st.tuples(st.just("fork"), st.integers(0, 40)),
    st.tuples(st.just("fail"), st.integers(0, 30)),
)


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(st.lists(ACTIONS, min_size=3, max_size=12), st.integers(0, 1000))
def test_after_any_sequence_every_moment_of_the_window_gives_what_was_committed_then(
    actions: list[tuple[str, int]], seed: int
) -> None:
    site = Site(seed=seed)
    for name, number in actions:
        act(site, name, number)
    site.check(moments=6)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_after_some_sequences_too(seed: int) -> None:
    chance = random.Random(seed)
    site = Site(seed=seed)
    for _ in range(6):
        act(site, "busy", chance.randint(1, 60))
        act(site, chance.choice(["idle", "restart", "fork", "fail"]), chance.randint(0, 30))
    site.check(moments=4)


def act(site: Site, name: str, number: int) -> None:
    if name == "busy":
        site.busy(number)
    elif name == "idle":
        site.pass_time(number)
    elif name == "restart":
        site.started()
    elif name == "fork":
        own = sorted({ref.last for ref in site.segments() if ref.timeline == site.timeline})
        if own:
            site.fork(own[-1 - min(number, len(own) - 1)])
    else:
        fail_from_call(site, number)


def fail_from_call(site: Site, number: int) -> None:
    """The upkeep's call after so many more fails, before or after it took effect; then all is well again."""
    left = itertools.count(number, -1)

    def fail(operation: str, key: str) -> None:
        if next(left) == 0:
            raise StoreUnavailable(f"{operation} {key} failed")

    setattr(site.asked, "after" if number % 2 else "before", fail)


def test_a_moment_before_the_first_commit_is_refused() -> None:
    with pytest.raises(NothingToRestore):
        Site().restored(RestoreOptions(at_ms=START_MS - 1))
