"""What was lost: compares the ledger of the writer with the rows that came back. Pure.

Owns the definitions of RPO and RTO that the summary prints, and the limits they are held to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from demo.writer import Ledger

RPO_LIMIT_S = 1.0
RTO_LIMIT_S = 20.0


@dataclass(frozen=True)
class Row:
    id: int
    text: str


@dataclass(frozen=True)
class Recovery:
    """What happened, on the monotonic clock, and what came back.

    power_off_s: the plug pulled. command_s: recover started. first_answer_s: of the app on the new host.
    """

    power_off_s: float
    command_s: float
    first_answer_s: float
    integrity: str
    rows: Sequence[Row]


@dataclass(frozen=True)
class Summary:
    """rpo_s: from the moment when the last recovered row was acknowledged until the plug was pulled.
    rto_s: from the start of ``minipaas recover`` to the first good answer of the app on the new host.
    last_moment_s: wall clock since 1970, when the last recovered row was acknowledged; None when none was.
    problems: why the verdict is bad; empty when it is good.
    """

    acknowledged: int
    recovered: int
    rpo_s: float
    rto_s: float
    last_moment_s: float | None
    integrity: str
    gapless: bool
    problems: tuple[str, ...] = field(default=())

    @property
    def good(self) -> bool:
        return not self.problems


def judge(ledger: Ledger, recovery: Recovery) -> Summary:
    """The summary of one loss and recovery."""
    ids = [row.id for row in recovery.rows]
    gapless = ids == list(range(1, len(ids) + 1))
    back = set(ids)
    kept = [row for row in ledger.acknowledged if row.id in back]
    last = max(kept, key=lambda row: row.at_s, default=None)
    first_sent_s = ledger.acknowledged[0].at_s if ledger.acknowledged else recovery.power_off_s
    rpo_s = max(0.0, recovery.power_off_s - (last.at_s if last else first_sent_s))
    summary = Summary(
        acknowledged=len(ledger.acknowledged),
        recovered=len(ids),
        rpo_s=rpo_s,
        rto_s=recovery.first_answer_s - recovery.command_s,
        last_moment_s=last.wall_s if last else None,
        integrity=recovery.integrity,
        gapless=gapless,
    )
    return Summary(**{**vars(summary), "problems": tuple(_problems(ledger, recovery, summary))})


def _problems(ledger: Ledger, recovery: Recovery, summary: Summary) -> list[str]:
    texts = {row.id: row.text for row in recovery.rows}
    changed = [row.id for row in ledger.acknowledged if texts.get(row.id, row.text) != row.text]
    acknowledged = {row.id for row in ledger.acknowledged}
    invented = [row.id for row in recovery.rows if row.id not in acknowledged and row.text not in ledger.unanswered]
    highest = max(acknowledged, default=0)
    never = sorted(set(range(1, highest + 1)) - acknowledged - set(texts))
    checks = [
        (not acknowledged, "no row was acknowledged"),
        (not recovery.rows, "no row was recovered"),
        (summary.integrity != "ok", f"the integrity check says: {summary.integrity}"),
        (not summary.gapless, "the recovered rows are not 1, 2, 3 … without a gap"),
        (bool(changed), f"{len(changed)} rows came back with another content, first id {changed[:1]}"),
        (bool(invented), f"{len(invented)} rows came back that nobody sent, first id {invented[:1]}"),
        (
            len(never) > len(ledger.unanswered),
            f"ids are missing among those acknowledged, first {never[:1]}: the ledger itself is not gapless",
        ),
        (summary.rpo_s > RPO_LIMIT_S, f"{summary.rpo_s:.2f} s of rows were lost, more than {RPO_LIMIT_S:.0f} s"),
        (summary.rto_s > RTO_LIMIT_S, f"recovery took {summary.rto_s:.1f} s, more than {RTO_LIMIT_S:.0f} s"),
    ]
    return [text for bad, text in checks if bad]
