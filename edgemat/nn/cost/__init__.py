"""What a network costs in hardware, differentiable in its learned widths, and ways to train towards a cost.

* `cost(q, name)` is a scalar for the loss, `cost_table(q, name)` the same by layer; the models are `MODELS`.
* `CostTarget` keeps a cost at most N, `CostRamp` raises its weight, `Front` keeps the checkpoints nobody beats.
"""

from __future__ import annotations

from edgemat.nn.cost.front import Front, FrontPoint
from edgemat.nn.cost.models import MODELS, CostTable, cost, cost_table
from edgemat.nn.cost.ramp import CostRamp
from edgemat.nn.cost.target import CostTarget

__all__ = ["MODELS", "CostRamp", "CostTable", "CostTarget", "Front", "FrontPoint", "cost", "cost_table"]
