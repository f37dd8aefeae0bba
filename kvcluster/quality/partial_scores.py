"""Recipes that a calibration has measured, kept beside its file until it is written.

`FILE.recipes.json`: a report of a sweep, and a digest of the bases that it was measured with.
"""

from pathlib import Path

import msgspec

from kvcluster.quality.sweep_records import SweepReport, SweepSubject, replace_file


class _Kept(msgspec.Struct, frozen=True, kw_only=True):
    bases_digest: str
    report: SweepReport


class PartialScores:
    """The file of one calibration that is not finished."""

    def __init__(self, calibration: Path, bases_digest: str) -> None:
        self.path = calibration.with_name(f"{calibration.name}.recipes.json")
        self._bases_digest = bases_digest

    def load(self, subject: SweepSubject) -> SweepReport:
        """What is there of this subject with these bases; otherwise nothing: what is measured again
        costs time alone."""
        try:
            kept = msgspec.json.decode(self.path.read_bytes(), type=_Kept)
        except (OSError, msgspec.DecodeError):
            return SweepReport(subject=subject)
        if kept.bases_digest != self._bases_digest or kept.report.subject != subject:
            return SweepReport(subject=subject)
        return kept.report

    def save(self, report: SweepReport) -> None:
        """Replace the file once the new one is whole. Raises: OSError."""
        kept = _Kept(bases_digest=self._bases_digest, report=report)
        replace_file(self.path, msgspec.json.encode(kept))

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)
