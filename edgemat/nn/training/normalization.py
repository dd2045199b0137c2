"""Freezing batch norm for the last part of a training, so that it sees exactly the deployed bits."""

from __future__ import annotations

from types import TracebackType

from torch import nn

from edgemat.nn import arguments
from edgemat.nn.batch_norm import BatchNorm, QuantBatchNorm


class FrozenBatchNorm:
    """What `freeze_batch_norm` changed; `undo` (or leaving it as a context manager) restores it.

    Attributes:
        names: Names of the batch norms that were frozen, in the order of the module.
    """

    def __init__(self, q: nn.Module, statistics: bool, affine: bool):
        self._norms: list[tuple[BatchNorm | QuantBatchNorm, bool]] = []
        self._parameters: list[tuple[nn.Parameter, bool]] = []
        self.names: tuple[str, ...] = ()
        for name, part in q.named_modules():
            if not isinstance(part, BatchNorm | QuantBatchNorm):
                continue
            self.names += (name,)
            if statistics:
                self._norms.append((part, part.frozen))
                part.frozen = True
            if affine:
                for parameter in (part.weight, part.bias):
                    if parameter is not None:
                        self._parameters.append((parameter, parameter.requires_grad))
                        parameter.requires_grad_(False)

    def undo(self) -> None:
        """Restores what was found; a second call does nothing."""
        for norm, frozen in self._norms:
            norm.frozen = frozen
        for parameter, trained in self._parameters:
            parameter.requires_grad_(trained)
        self._norms, self._parameters = [], []

    def __enter__(self) -> FrozenBatchNorm:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.undo()


def freeze_batch_norm(q: nn.Module, statistics: bool = True, affine: bool = False) -> FrozenBatchNorm:
    """Freezes the batch norms of a quantised module; unlike ``norm.eval()`` it survives ``q.train()``.

    With frozen statistics a training step uses the running mean and variance, and updates neither: each layer then
    computes in `train()` the very codes of `eval()` (dropout apart), so the loss sees the deployed network. Weight
    oscillations do not spoil the statistics any more, either (Nagel et al., arXiv 2203.08114, section 3.2).

    Args:
        q: The result of `edgemat.quantize`, or a module built from edgemat.nn layers. One without batch norms is left
            as it is.
        statistics: Whether the running statistics are frozen.
        affine: Whether gamma and beta stop learning (``requires_grad=False``).

    Returns:
        An object whose `undo()` restores what was found; as a context manager it does so at the end of the block. The
        freeze is not part of `q.state_dict()`: call this again after resuming.

    Raises:
        FormatError: for a float network, whose batch norms this cannot freeze, or for what is no module.
    """
    return FrozenBatchNorm(arguments.quantized("freeze_batch_norm", q), statistics, affine)
