"""What a lowered file costs and why it cannot overflow, and which operator runs where."""

from edgemat.report.inspection import Inspection, inspect
from edgemat.report.operators import OpsTable, ops_table

__all__ = ["Inspection", "OpsTable", "inspect", "ops_table"]
