"""Proof by comparison: the same inputs through every backend, codes held against the numpy reference."""

from edgemat.verification.report import BackendResult, Mismatch, Report
from edgemat.verification.verify import verify

__all__ = ["BackendResult", "Mismatch", "Report", "verify"]
