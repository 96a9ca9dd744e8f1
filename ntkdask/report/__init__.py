"""report.html of a finished run."""

from ntkdask.report.page import write_report

__all__ = ["write_report"]
