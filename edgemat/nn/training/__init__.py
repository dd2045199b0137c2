"""What a plain training loop calls around its steps: schedules, optimiser groups, losses, starts and baselines.

Nothing here replaces a loop or a `forward`. Objects that live through a training have `step()`, called after the
optimiser's, and `state_dict()` / `load_state_dict()`, with which a resumed training continues bit for bit.
"""

from __future__ import annotations

from edgemat.nn.training.checkpoint import load_float
from edgemat.nn.training.delay import QuantizationDelay
from edgemat.nn.training.distillation import DistillationLoss
from edgemat.nn.training.groups import parameter_groups
from edgemat.nn.training.normalization import FrozenBatchNorm, freeze_batch_norm
from edgemat.nn.training.orthogonality import ompq
from edgemat.nn.training.oscillation import OscillationTracker
from edgemat.nn.training.post_training import ptq
from edgemat.nn.training.scales import ScaleDeployment

__all__ = [
    "DistillationLoss",
    "FrozenBatchNorm",
    "OscillationTracker",
    "QuantizationDelay",
    "ScaleDeployment",
    "freeze_batch_norm",
    "load_float",
    "ompq",
    "parameter_groups",
    "ptq",
]
