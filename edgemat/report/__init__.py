"""What a lowered file costs and why it cannot overflow, which operator runs where, and a page that shows a network."""

from edgemat.report.inspection import Inspection, inspect
from edgemat.report.operators import OpsTable, ops_table
from edgemat.report.page import write_report

__all__ = ["Inspection", "OpsTable", "inspect", "ops_table", "write_report"]
