"""What the command ``restore`` says of a plan and of its result: a document for programs, a line for people."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from replicator.values import format_size, format_time

if TYPE_CHECKING:
    from replicator.restore import RestoreReport
    from replicator.restore_plan import RestorePlan


def plan_document(plan: RestorePlan, target: Path) -> dict[str, Any]:
    return {
        "target": str(target),
        "position": str(plan.position),
        "reached": format_time(plan.reached_ms),
        "size_bytes": plan.size_bytes,
        "download_bytes": plan.download_bytes,
        "segments": [ref.key for ref in plan.segments],
    }


def plan_words(plan: RestorePlan, target: Path) -> str:
    return (
        f"{target} would be restored to {plan.position}, last commit {format_time(plan.reached_ms)}: {format_size(plan.size_bytes)} "
        f"from {len(plan.segments)} segments of {format_size(plan.download_bytes)}"
    )


def report_document(report: RestoreReport, target: Path) -> dict[str, Any]:
    return {
        "restored": True,
        "target": str(target),
        "position": str(report.position),
        "reached": format_time(report.reached_ms),
        "size_bytes": report.size_bytes,
        "state_checksum": f"{report.state_checksum:016x}",
        "segments": report.segments,
        "downloaded_bytes": report.downloaded_bytes,
        "took_s": round(report.took_s, 3),
    }


def report_words(report: RestoreReport, target: Path) -> str:
    return (
        f"restored {target} to {report.position}, last commit {format_time(report.reached_ms)}: "
        f"{format_size(report.size_bytes)} from {report.segments} segments in {report.took_s:.1f} s"
    )


def moment_words(wanted_ms: int, reached_ms: int, next_ms: int | None, *, is_to_come: bool) -> str:
    """Which commits are around the moment that was asked for. next_ms: of the first after it, None when there is none.

    is_to_come: more may be made until then.
    """
    wanted, reached = format_time(wanted_ms), format_time(reached_ms)
    if is_to_come:
        return f"--timestamp {wanted} is in the future; what was reached is {reached}, the newest"
    if next_ms is None:
        return f"--timestamp {wanted} is after the last commit there is; what was reached is {reached}, the newest"
    return f"of the moments around --timestamp {wanted}, {reached} was reached; the next one is {format_time(next_ms)}"
