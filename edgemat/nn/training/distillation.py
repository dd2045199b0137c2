"""Knowledge distillation: a float teacher's logits as soft targets of the quantised student."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from edgemat.errors import FormatError
from edgemat.nn import arguments


class DistillationLoss(nn.Module):
    """``alpha * T**2 * KL(softmax(teacher / T) || softmax(student / T)) + (1 - alpha) * loss(student, labels)``.

    The factor ``T**2`` keeps the size of the soft gradients when the temperature changes (Hinton, Vinyals and Dean,
    arXiv 1503.02531, section 2). The divergence is summed over the classes and averaged over everything else. The
    teacher gets no gradient.

    Args:
        temperature: T, above 0.
        alpha: Weight of the soft term, 0 to 1; at 1 no labels are needed.
        loss: The hard loss, of one output and its labels; by default the cross entropy of class indices.
        dim: The class axis.
        weights: For several outputs the weight of each, in their order or by name; by default 1 for each.

    Raises:
        FormatError: for a temperature or a weight out of range, or a setting of another type.
    """

    def __init__(
        self,
        temperature: float = 4.0,
        alpha: float = 0.5,
        loss: nn.Module | None = None,
        dim: int = 1,
        weights: Sequence[float] | Mapping[str, float] | None = None,
    ):
        super().__init__()
        self.temperature = arguments.number("DistillationLoss: temperature", temperature, above=0)
        self.alpha = arguments.number("DistillationLoss: alpha", alpha, least=0, most=1)
        if isinstance(dim, bool) or not isinstance(dim, int):
            raise FormatError(f"DistillationLoss: dim is {dim!r}, expected a whole number, the class axis")
        self.dim = dim
        if loss is not None and not callable(loss):
            raise FormatError(f"DistillationLoss: loss is {loss!r}, expected a module such as nn.CrossEntropyLoss()")
        self.hard = nn.CrossEntropyLoss() if loss is None else loss
        if weights is not None:
            listed = isinstance(weights, Mapping | Sequence) and not isinstance(weights, str)
            if not listed:
                raise FormatError(
                    f"DistillationLoss: weights is {weights!r}, expected a list or a dict with one number per output"
                )
            for value in weights.values() if isinstance(weights, Mapping) else weights:
                arguments.number("DistillationLoss: a weight", value)
        self.weights = weights

    def forward(self, student: Any, teacher: Any, labels: Any = None) -> Tensor:
        """The loss, a scalar.

        Args:
            student: Logits ``[N, classes, ...]``, or a tuple, list or dict of such for several outputs.
            teacher: The same of the teacher.
            labels: What the hard loss takes, in the same structure; one tensor serves every output. None where
                `alpha` is 1.

        Raises:
            FormatError: if student, teacher, labels and weights do not match.
        """
        if isinstance(student, Tensor):
            return self._one(student, teacher, labels, "the output")
        if not isinstance(student, Mapping | Sequence) or isinstance(student, str):
            raise FormatError(
                f"DistillationLoss: the student gives a {type(student).__name__}, expected logits, or a tuple, list or "
                "dict of them"
            )
        keys = list(student) if isinstance(student, Mapping) else list(range(len(student)))
        if not keys:
            raise FormatError("DistillationLoss: the student has no outputs, expected at least one")
        total: Tensor | None = None
        for key in keys:
            own = labels if labels is None or isinstance(labels, Tensor) else _item(labels, key, keys, "labels")
            weight = 1.0 if self.weights is None else float(_item(self.weights, key, keys, "weights"))
            term = weight * self._one(student[key], _item(teacher, key, keys, "teacher"), own, f"output {key!r}")
            total = term if total is None else total + term
        assert total is not None
        return total

    def _one(self, student: Tensor, teacher: Any, labels: Any, label: str) -> Tensor:
        if not isinstance(teacher, Tensor) or teacher.shape != student.shape:
            found = tuple(teacher.shape) if isinstance(teacher, Tensor) else type(teacher).__name__
            raise FormatError(
                f"DistillationLoss: the teacher gives {found} for {label}, expected {tuple(student.shape)} as the "
                "student; both must have the same classes"
            )
        soft = student.new_zeros(())
        if self.alpha > 0:
            log_student = F.log_softmax(student / self.temperature, self.dim)
            log_teacher = F.log_softmax(teacher.detach().to(student.dtype) / self.temperature, self.dim)
            divergence = F.kl_div(log_student, log_teacher, reduction="none", log_target=True).sum(self.dim).mean()
            soft = self.alpha * self.temperature**2 * divergence
        if self.alpha == 1:
            return soft
        if labels is None:
            raise FormatError(
                f"DistillationLoss: no labels came for {label} with alpha {self.alpha}, expected labels; alpha=1 needs "
                "none"
            )
        return soft + (1 - self.alpha) * self.hard(student, labels)

    def extra_repr(self) -> str:
        """Temperature and weight, for printing."""
        return f"temperature={self.temperature}, alpha={self.alpha}"


def _item(found: Any, key: Any, keys: list[Any], label: str) -> Any:
    """One entry of a structure that must be that of the student."""
    named = isinstance(found, Mapping)
    if not isinstance(found, Mapping | Sequence) or named != isinstance(key, str) or len(found) != len(keys):
        raise FormatError(
            f"DistillationLoss: {label} do not match the student's outputs {keys}, expected one entry for each"
        )
    if named and key not in found:
        raise FormatError(f"DistillationLoss: {label} have no entry {key!r}, expected {', '.join(map(str, keys))}")
    return found[key]
