"""What every edge does, the real and the fake."""

from __future__ import annotations

import json
import threading

from minipaas.edge import Route


def name_of(answer):
    return json.loads(answer.body)["name"]


def test_requests_go_to_the_app_of_their_host(subject, upstream):
    a, b = upstream("a"), upstream("b")
    subject.edge.apply([Route("a", ("a.test", "www.a.test"), (a.address,)), Route("b", ("b.test",), (b.address,))])
    assert [name_of(subject.send(host)) for host in ("a.test", "b.test", "www.a.test")] == ["a", "b", "a"]


def test_an_unknown_host_is_404_and_named(subject, upstream):
    subject.edge.apply([Route("a", ("a.test",), (upstream().address,))])
    answer = subject.send("other.test")
    assert (answer.status, b"other.test" in answer.body) == (404, True)


def test_an_app_without_machine_is_503_named_and_may_be_tried_again(subject):
    subject.edge.apply([Route("guestbook", ("a.test",), ())])
    answer = subject.send("a.test")
    assert (answer.status, b"guestbook" in answer.body, int(answer.headers["Retry-After"]) > 0) == (503, True, True)


def test_a_megabyte_passes_both_ways(subject, upstream):
    subject.edge.apply([Route("a", ("a.test",), (upstream().address,))])
    body = bytes(range(256)) * 4096
    assert subject.send("a.test", "POST", "/echo", body).body == body


def test_several_machines_share_the_requests(subject, upstream):
    a, b = upstream("a"), upstream("b")
    subject.edge.apply([Route("app", ("a.test",), (a.address, b.address))])
    senders = [threading.Thread(target=subject.send, args=("a.test", "GET", "/slow")) for _ in range(6)]
    for sender in senders:
        sender.start()
    for one in (a, b):
        threading.Timer(0.3, one.let_go.set).start()
    for sender in senders:
        sender.join()
    assert a.seen and b.seen


def test_a_held_request_waits_and_reaches_the_new_machine(subject, upstream, in_background, until):
    old, new = upstream("old"), upstream("new")
    subject.edge.apply([Route("a", ("a.test",), (old.address,))])
    subject.edge.apply([Route("a", ("a.test",), (old.address,), held=True)])
    answers = in_background(lambda: subject.send("a.test", "POST", "/", b"x" * 100_000))
    until(lambda: not answers)
    subject.edge.apply([Route("a", ("a.test",), (new.address,))])
    until(lambda: bool(answers))
    assert (answers[0].status, name_of(answers[0]), json.loads(answers[0].body)["size"]) == (200, "new", 100_000)
    assert old.seen == []


def test_a_request_that_is_with_the_old_machine_finishes_there_while_held(subject, upstream, in_background, until):
    old = upstream("old")
    subject.edge.apply([Route("a", ("a.test",), (old.address,))])
    answers = in_background(lambda: subject.send("a.test", "POST", "/slow"))
    until(lambda: subject.edge.in_flight(old.address) == 1)
    subject.edge.apply([Route("a", ("a.test",), (old.address,), held=True)])
    assert subject.edge.in_flight(old.address) == 1
    old.let_go.set()
    until(lambda: bool(answers))
    assert (answers[0].status, name_of(answers[0])) == (200, "old")
    until(lambda: subject.edge.in_flight(old.address) == 0)


def test_a_hold_that_takes_too_long_is_503_and_says_so(subject, upstream):
    subject.edge.apply([Route("a", ("a.test",), (upstream().address,), held=True, hold_s=0.3)])
    answer = subject.send("a.test", "POST", "/", b"x")
    assert (answer.status, b"a is being replaced" in answer.body) == (503, True)


def test_a_machine_that_is_just_starting_is_waited_for(subject, upstream, in_background, until):
    first = upstream("first")
    first.kill()
    subject.edge.apply([Route("a", ("a.test",), (first.address,))])
    answers = in_background(lambda: subject.send("a.test", "POST", "/", b"x" * 100_000))
    upstream("second", first.port)
    until(lambda: bool(answers))
    assert (answers[0].status, json.loads(answers[0].body)["size"]) == (200, 100_000)


def test_a_request_that_the_app_may_have_acted_on_is_not_repeated(subject, upstream):
    app = upstream()
    subject.edge.apply([Route("a", ("a.test",), (app.address,))])
    assert (subject.send("a.test", "GET", "/break").status, app.seen) == (502, ["/break"])


def test_nothing_is_in_flight_to_an_upstream_that_nobody_asked(subject):
    subject.edge.apply([])
    assert subject.edge.in_flight("127.0.0.1:1") == 0
