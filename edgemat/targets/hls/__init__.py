"""The HLS target: C++ for Vitis HLS, written around the template library in ``hls_templates/``."""

from edgemat.targets.hls.cost import DesignCost, ProcessCost, model_cost
from edgemat.targets.hls.plan import NodePlan, Plan, PlanError, load_plan
from edgemat.targets.hls.project import Project, export, plan_from, project
from edgemat.targets.hls.simulation import DeadlockError, Simulation, run_csim

__all__ = [
    "DeadlockError",
    "DesignCost",
    "NodePlan",
    "Plan",
    "PlanError",
    "ProcessCost",
    "Project",
    "Simulation",
    "export",
    "load_plan",
    "model_cost",
    "plan_from",
    "project",
    "run_csim",
]
