"""The command ``verify``: says whether a replica can be restored, by doing it. Owns its words and its scratch folder."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from replicator.cli import progress
from replicator.cli.options import FILE, config_option, identity_option, json_option
from replicator.cli.places import explained, find_config, identities_of, is_folder, replica_of
from replicator.cli.words import note, tell
from replicator.errors import FormatError, NothingToRestore, ReplicatorError, UsageError
from replicator.values import format_size, format_time

if TYPE_CHECKING:
    from replicator.proof import Live, Verdict
    from replicator.restore_plan import RestoreOptions
    from replicator.store import ObjectStore

PAUSE_S = 0.5


@click.command()
@click.argument("source", metavar="URL|DB")
@config_option
@click.option("--against", type=FILE, metavar="DB", help="Compare with this live database too, at the same position.")
@click.option(
    "--every-segment", is_flag=True, help="Read all that the replica holds, not only what the newest position needs."
)
@click.option(
    "--scratch", type=FILE, metavar="DIR", help="Where there is room for the database, for the trial. Default: TMPDIR."
)
@click.option("--parallelism", type=click.IntRange(1, 64), default=8, show_default=True, help="Downloads at once.")
@identity_option
@json_option
def verify(
    source: str,
    config_file: Path | None,
    no_expand_env: bool,
    against: Path | None,
    every_segment: bool,
    scratch: Path | None,
    parallelism: int,
    identity_file: Path | None,
    as_json: bool,
) -> int:
    """Prove that a replica can be restored, by restoring it to a scratch file.

    Verifies checksums, that the segments follow from each other, the state checksum of all pages, and SQLite's
    integrity_check. Says up to when it is proved, and what can be restored besides. The URL of a folder's replica verifies all
    its databases. Exit code 1 when something is wrong, with what remains restorable.
    """
    from replicator import catalogue
    from replicator.restore_plan import RestoreOptions

    config = find_config(config_file, no_expand_env, required="://" not in source)
    store, _ = replica_of(source, config, identities_of(identity_file))
    options = RestoreOptions(parallelism=parallelism, integrity_check="full")
    if is_folder(store):
        if against is not None:
            raise UsageError("--against compares one database; give the URL of its replica")
        stores = [catalogue.replica_of(store, name) for name in sorted(catalogue.entries(store))]
    else:
        stores = [store]
    with tempfile.TemporaryDirectory(prefix="replicator-verify-", dir=scratch) as folder:
        found = [_verify_one(each, Path(folder), options, against, every_segment) for each in stores]
    if len(stores) == 1:
        document, lines, is_whole = found[0]
        tell(document, as_json, *lines)
        return 0 if is_whole else 1
    failed = sum(not is_whole for _, _, is_whole in found)
    summary = f"{len(found) - failed} of {len(found)} databases proved" + (f", {failed} NOT" if failed else "")
    documents = [document for document, _, _ in found]
    tell(
        {"databases": documents, "failed": failed}, as_json, *(line for _, lines, _ in found for line in lines), summary
    )
    return 1 if failed else 0


def _verify_one(
    store: ObjectStore, folder: Path, options: RestoreOptions, against: Path | None, every_segment: bool
) -> tuple[dict[str, Any], list[str], bool]:
    from dataclasses import replace

    from replicator import proof

    live: Live | None = None
    try:
        with explained(store, nothing_is_fine=False):
            timelines = _windows(store)
        if against is not None:
            live = proof.look_at_live(against.absolute(), store, pause=lambda: time.sleep(PAUSE_S))
            options = replace(options, position=live.position)
        with progress.shown(store.url) as on_progress:
            verdict = proof.verify(store, folder, options, every_segment=every_segment, on_progress=on_progress)
    except ReplicatorError as error:
        if isinstance(error, (UsageError, NothingToRestore)):
            raise
        note(f"{store.url}: {error}")
        return {"url": store.url, "proved": False, "problem": str(error)}, [f"{store.url}: NOT proved: {error}"], False
    compared, same = _compared(live, against, verdict)
    document = _document(store, verdict, timelines) | ({"against": compared} if compared else {})
    return document, _lines(store, verdict, timelines) + ([compared] if compared else []), verdict.is_whole and same


def _windows(store: ObjectStore) -> list[dict[str, Any]]:
    from replicator import history

    try:
        return history.read(store)
    except FormatError:  # the trial says what is damaged
        return []


def _compared(live: Live | None, against: Path | None, verdict: Verdict) -> tuple[str, bool]:
    from replicator.proof import differing_pages

    if live is None:
        return "", True
    report = verdict.report
    if live.position is not None and report is not None and report.state_checksum == live.hashes.checksum:
        return f"{against} has the same {report.page_count} pages, and was at {report.position} when it was read", True
    pages = (
        "" if report is None else f": {differing_pages(live.hashes, report.hashes)} pages differ from {report.position}"
    )
    return (
        f"{against} was in a state that the replica does not have{pages}; is it written all the time, or is something not shipped yet? "
        "try `replicator sync --wait` and then again",
        False,
    )


def _document(store: ObjectStore, verdict: Verdict, timelines: list[dict[str, Any]]) -> dict[str, Any]:
    report = verdict.report
    proved = None
    if report is not None:
        proved = {
            "position": str(report.position),
            "last_commit": format_time(report.reached_ms),
            "pages": report.page_count,
            "size_bytes": report.size_bytes,
            "state_checksum": f"{report.state_checksum:016x}",
            "segments": report.segments,
            "downloaded_bytes": report.downloaded_bytes,
            "took_s": round(report.took_s, 3),
        }
    return {
        "url": store.url,
        "proved": verdict.is_whole,
        "problem": verdict.problem or verdict.integrity,
        "integrity": verdict.integrity or verdict.unchecked or "ok",
        "restorable": proved,
        "damaged": [{"key": key, "problem": problem} for key, problem in verdict.damaged],
        "timelines": timelines,
    }


def _lines(store: ObjectStore, verdict: Verdict, timelines: list[dict[str, Any]]) -> list[str]:
    report = verdict.report
    lines = [f"{store.url}: DAMAGED: {verdict.problem}"] if verdict.problem else []
    if report is None:
        lines.append("nothing that remains could be restored")
    else:
        integrity = f"integrity_check left out: {verdict.unchecked}" if verdict.unchecked else "integrity_check ok"
        lines.append(
            f"{'what remains restorable' if verdict.problem else store.url}: proved up to {report.position}, last commit "
            f"{format_time(report.reached_ms)}: {report.page_count} pages ({format_size(report.size_bytes)}) as their source had them, "
            f"{'see below' if verdict.integrity else integrity}; from {report.segments} segments in {report.took_s:.1f} s"
        )
    if verdict.integrity:
        lines.append(f"the database itself is damaged: {verdict.integrity}")
    lines += [f"damaged: {problem}" for _, problem in verdict.damaged if problem != verdict.problem]
    return lines + [line for line in map(_window, timelines) if line]


def _window(timeline: dict[str, Any]) -> str:
    if timeline["last_time"] is None or not timeline["restorable"]:
        return ""
    ranges = ", ".join(f"{each['first']} to {each['last']}" for each in timeline["restorable"])
    times = f"{timeline['first_time']} to {timeline['last_time']}"
    return f"restorable on timeline {timeline['timeline']}, by what is there: {ranges} ({times})"


COMMANDS = (verify,)
