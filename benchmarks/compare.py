"""What got slower from one file of rows to another, by more than the noise.

``python benchmarks/compare.py old.csv new.csv`` looks at fused_rnn's rows that both files have. The
exit status is 1 where one is slower or no longer right, 2 where the files cannot be compared.

A row is slower where its median is more than ``--noise`` above the old one's and its fast fifth
above the old one's slow fifth: in milliseconds, and also in units of the calibration product that
was measured beside it, because what the whole machine does slower is not ours.
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import results  # noqa: F401, where the package is

from fused_rnn.bench.rows import Row, read

NOISE = 0.05


@dataclass(frozen=True)
class Change:
    """A row in both files."""

    old: Row
    new: Row

    @property
    def factors(self) -> tuple[float, float]:
        """New over old: in time, and in units of the calibration product."""
        time = self.new.p50_ms / self.old.p50_ms
        return time, time * self.new.calibration_gflops / self.old.calibration_gflops

    def is_slower(self, noise: float) -> bool:
        time, scaled = self.factors
        apart = self.new.p20_ms / self.old.p80_ms * min(1, scaled / time) > 1
        return apart and min(time, scaled) > 1 + noise

    def is_faster(self, noise: float) -> bool:
        return Change(self.new, self.old).is_slower(noise)

    def __str__(self) -> str:
        row = self.new
        what = f"{row.workload} {row.cell} {row.shape} {row.kind} {row.dtype}, {row.threads} thr"
        time, scaled = self.factors
        return (
            f"{time:5.2f}×  {what}, {row.provider}: {self.old.p50_ms:.4g} -> {row.p50_ms:.4g} ms "
            f"({scaled:.2f}× in products)"
        )


def pairs(old: list[Row], new: list[Row]) -> list[tuple[Row, Row]]:
    """Rows of the same measurement by us, as far as they count."""
    before = {row.key: row for row in old if row.counts}
    ours = [row for row in new if row.provider.startswith("fused_rnn")]
    return [(before[row.key], row) for row in ours if row.key in before]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--noise", type=float, default=NOISE, help=f"default: {NOISE}")
    arguments = parser.parse_args(argv)
    (old, before), (new, now) = read(arguments.old), read(arguments.new)
    both = pairs(old, new)
    if before.device != now.device or not both:
        print(f"nothing to compare: {len(both)} rows in common, {before.device} and {now.device}")
        return 2
    wrong = [row for _, row in both if row.is_bad]
    changes = [Change(a, b) for a, b in both if b.status == "ok" and b.counts]
    slower = [change for change in changes if change.is_slower(arguments.noise)]
    faster = [change for change in changes if change.is_faster(arguments.noise)]
    print(f"{before.commit} -> {now.commit} on {now.device}: {len(changes)} rows compared")
    for title, found in (("slower", slower), ("faster", faster)):
        print(f"{len(found)} {title} by more than {arguments.noise:.0%} and the noise")
        for change in sorted(found, key=lambda change: -change.factors[0]):
            print(f"  {change}")
    for row in wrong:
        print(f"no longer right: {row.workload} {row.kind} {row.provider}: {row.status}")
    return 1 if slower or wrong else 0


if __name__ == "__main__":
    sys.exit(main())
