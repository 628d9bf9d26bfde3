"""What the commands ``restore`` and ``export`` do where Litestream is concerned: one call, a document for programs, words for people.

Knows no command line: options come in as values.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from replicator.litestream import choice, export, restore
from replicator.litestream.chain import parse_txid, txid_text
from replicator.litestream.export import ExportPlan, ExportReport
from replicator.litestream.restore import LitestreamPlan, LitestreamReport
from replicator.restore import OnProgress
from replicator.restore_plan import RestoreOptions
from replicator.store import ObjectStore
from replicator.store.seal import bare
from replicator.values import format_size, format_time

Said = tuple[dict[str, Any], str]
"""The document, the words."""


def is_meant(
    store: ObjectStore, kind: str | None, options: RestoreOptions, txid: str | None, mention: Callable[[str], None]
) -> bool:
    """Whether a restore is to be from Litestream's replica; what else is there is mentioned. kind, txid: as the user wrote them."""
    if kind is None and options.timeline is not None:
        kind = choice.NATIVE
    chosen = choice.choose(store, kind, options.at_ms, names_transaction=txid is not None)
    if chosen.besides:
        mention(chosen.besides)
    return chosen.is_litestream


def run_restore(
    store: ObjectStore,
    target: Path,
    options: RestoreOptions,
    txid: str | None,
    on_progress: OnProgress | None,
) -> Said:
    """on_progress: None to say only what would be done."""
    options = dataclasses.replace(options, txid=None if txid is None else parse_txid(txid))
    if on_progress is None:
        return of_plan(restore.plan_restore(bare(store), options), target)
    return of_restore(restore.restore(bare(store), target, options, on_progress=on_progress), target)


def run_export(source: ObjectStore, to: ObjectStore, from_ms: int | None, parallelism: int, *, dry_run: bool) -> Said:
    if dry_run:
        return of_export_plan(export.plan_export(source, to, from_ms), to)
    return of_export(export.export(source, to, from_ms, parallelism=parallelism), to)


def of_plan(plan: LitestreamPlan, target: Path) -> Said:
    document = {
        "target": str(target),
        "litestream": plan.version,
        "position": plan.position,
        "reached": format_time(plan.reached_ms),
        "size_bytes": plan.size_bytes,
        "download_bytes": plan.download_bytes,
        "objects": list(plan.keys),
    }
    size = "" if plan.size_bytes is None else f"{format_size(plan.size_bytes)} "
    return document, (
        f"{target} would be restored from the replica of Litestream {plan.version} to {plan.position}, last transaction "
        f"{format_time(plan.reached_ms)}: {size}from {len(plan.keys)} objects of {format_size(plan.download_bytes)}"
    )


def of_restore(report: LitestreamReport, target: Path) -> Said:
    document = {
        "restored": True,
        "target": str(target),
        "litestream": report.version,
        "position": report.position,
        "reached": format_time(report.reached_ms),
        "size_bytes": report.size_bytes,
        "objects": report.objects,
        "downloaded_bytes": report.downloaded_bytes,
        "took_s": round(report.took_s, 3),
    }
    return document, (
        f"restored {target} from the replica of Litestream {report.version} to {report.position}, last transaction "
        f"{format_time(report.reached_ms)}: {format_size(report.size_bytes)} from {report.objects} objects in {report.took_s:.1f} s"
    )


def of_export_plan(plan: ExportPlan, destination: ObjectStore) -> Said:
    document = _document(plan, destination) | {
        "files": [f"{step.level}/{txid_text(step.first)}-{txid_text(step.last)}" for step in plan.steps],
        "read_bytes": plan.size_bytes,
    }
    if not plan.steps:
        return document, _up_to_date(plan, destination)
    return document, (
        f"{len(plan.steps)} files would be written to {destination.url}, up to {plan.reached} ({txid_text(plan.reached.txid)}), "
        f"from segments of {format_size(plan.size_bytes)}"
    )


def of_export(report: ExportReport, destination: ObjectStore) -> Said:
    document = _document(report, destination) | {"files": report.files, "size_bytes": report.size_bytes}
    if not report.files:
        return document, _up_to_date(report, destination)
    words = (
        f"exported {report.files} files of {format_size(report.size_bytes)} to {destination.url}, up to {report.reached} "
        f"({txid_text(report.reached.txid)})"
    )
    if report.first_moment_ms is not None and destination.url.startswith("s3://"):
        words += (
            f"\nlitestream restore -timestamp takes no moment in a bucket from before its files were written, although these begin at "
            f"{format_time(report.first_moment_ms)}; use -txid there, or export into a folder"
        )
    return document, words


def _document(done: ExportPlan | ExportReport, destination: ObjectStore) -> dict[str, Any]:
    return {
        "url": destination.url,
        "position": str(done.reached),
        "txid": txid_text(done.reached.txid),
        "begins_after": done.begins,
    }


def _up_to_date(done: ExportPlan | ExportReport, destination: ObjectStore) -> str:
    return f"{destination.url} has everything, up to {done.reached} ({txid_text(done.reached.txid)})"
