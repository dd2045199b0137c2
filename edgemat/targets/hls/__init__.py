"""The HLS target: C++ for Vitis HLS, written around the template library in ``hls_templates/``."""

from edgemat.targets.hls.plan import NodePlan, Plan, PlanError, load_plan
from edgemat.targets.hls.project import Project, export, plan_from, project
from edgemat.targets.hls.simulation import DeadlockError, Simulation, run_csim

__all__ = [
    "DeadlockError",
    "NodePlan",
    "Plan",
    "PlanError",
    "Project",
    "Simulation",
    "export",
    "load_plan",
    "plan_from",
    "project",
    "run_csim",
]
