"""Which quantiser a recipe's `WeightSpec` or `ActivationSpec` means."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from edgemat.errors import FormatError
from edgemat.formats import Fixed
from edgemat.nn.accumulator import AccumulatorQuantizer
from edgemat.nn.bipolar import BipolarQuantizer
from edgemat.nn.khot import KHotQuantizer
from edgemat.nn.learned_activation import LearnedActivationQuantizer
from edgemat.nn.learned_width import LearnedWidthQuantizer
from edgemat.nn.quantizer import FixedQuantizer, check_points
from edgemat.nn.statistics import StatisticsQuantizer
from edgemat.nn.ternary_quantizer import TernaryQuantizer
from edgemat.nn.ternary_rank1 import Rank1Quantizer
from edgemat.recipe import ActivationSpec, WeightSpec, named_weights


def weight_spec(weights: str | Fixed | WeightSpec, per_channel: bool) -> WeightSpec:
    """The spec that a layer's `weights` and `per_channel` arguments mean."""
    if isinstance(weights, WeightSpec):
        return weights
    named = named_weights({"weights": weights})
    if "ternary" in named:
        return WeightSpec(named["weights"], "channel" if per_channel else "tensor", ternary=named["ternary"])
    fmt = Fixed.parse(weights) if isinstance(weights, str) else weights
    return WeightSpec(fmt, "channel" if per_channel else "tensor")


def weight_quantizer(
    spec: WeightSpec, shape: Sequence[int], outputs: int | None, axis: int, label: str
) -> FixedQuantizer:
    """The quantiser of a layer's weights.

    Args:
        spec: Format, groups and constraints.
        shape: Shape of the weights.
        outputs: Number of output channels, or None where binary points cannot differ by channel.
        axis: Axis of the output channels.
        label: What a message calls the layer.

    Raises:
        FormatError: if stated binary points do not match the channels.
    """
    check_points(spec.format, outputs, label)
    if len(shape) < 2:
        spec = replace(spec, accumulator=None)  # scales and slopes multiply, they do not sum
    channels = outputs if spec.groups == "channel" and spec.format.int_bits is None else None
    if spec.ternary is not None:
        _check_ternary(spec, label)
        if spec.ternary == "onebit":
            return Rank1Quantizer(shape, axis, spec.scale, label)
        per = outputs if spec.groups == "channel" and spec.ternary != "b1.58" else None
        return TernaryQuantizer(spec.ternary, spec.scale, per, axis)
    if spec.format.bipolar:
        _check_bipolar(spec, label)
        return BipolarQuantizer(role="weights")
    if spec.khot is not None:
        _check_khot(spec, label)
        return KHotQuantizer(spec.format, spec.khot, channels=channels, axis=axis)
    if spec.accumulator is not None:
        _check_accumulator(spec, axis, label)
        return AccumulatorQuantizer(spec.format, spec.accumulator, shape[axis], spec.accumulator_bound, channels, axis)
    if spec.learn_width or (spec.groups not in ("tensor", "channel") and spec.format.int_bits is None):
        return LearnedWidthQuantizer(spec.format, shape, outputs, axis, spec.groups)
    if spec.points == "statistics" and spec.format.int_bits is None:
        return StatisticsQuantizer(spec.format, channels=channels, axis=axis)
    return FixedQuantizer(spec.format, channels=channels, axis=axis, role="weights")


def bias_quantizer(spec: WeightSpec, outputs: int) -> LearnedWidthQuantizer | None:
    """The quantiser that coarsens each bias where the weights learn their widths; None where they do not."""
    if not spec.learn_width:
        return None
    return LearnedWidthQuantizer(Fixed(max(spec.format.width, 8)), (outputs,), None, 0, "weight")


def activation_quantizer(
    spec: ActivationSpec, channels: int | None, relu: bool = False, role: str = "requantize"
) -> FixedQuantizer:
    """The quantiser of a tensor between layers, or (role ``"input"``) of a network input.

    Args:
        spec: Format and groups.
        channels: Length of axis 1, or None where it is not known.
        relu: Whether a ReLU precedes the rounding.
        role: ``"requantize"`` or ``"input"``.
    """
    if spec.format.bipolar:
        return BipolarQuantizer(relu=relu, role=role)
    if spec.learn_width:
        return LearnedActivationQuantizer(spec.format, channels if spec.groups == "channel" else None, relu, role)
    return FixedQuantizer(spec.format, relu=relu, role=role)


_ELSEWHERE = "a rule for this layer can state another format of its weights, or leave the other setting out"


def _grouped(spec: WeightSpec) -> bool:
    return spec.groups not in ("tensor", "channel") and spec.format.int_bits is None


def _refuse_both(label: str, setting: str, remedy: str, *others: tuple[str, bool]) -> None:
    """Refuses a setting together with any of the others that is there."""
    for other, there in others:
        if there:
            raise FormatError(f"{label} has {setting} and {other}, expected one of the two; {remedy}")


def _check_ternary(spec: WeightSpec, label: str) -> None:
    """Refuses what trits cannot be combined with."""
    _refuse_both(
        label,
        f"ternary={spec.ternary!r}",
        _ELSEWHERE,
        (f"weights in groups of {spec.groups!r}", spec.groups not in ("tensor", "channel")),
        ("a learned width", spec.learn_width),
        (f"khot={spec.khot}", spec.khot is not None),
        ("a bound on its accumulator", spec.accumulator is not None),
        ("points from statistics", spec.points != "learned"),
    )


def _check_bipolar(spec: WeightSpec, label: str) -> None:
    """Refuses what {-1, +1} cannot be combined with."""
    _refuse_both(
        label,
        "bipolar weights",
        _ELSEWHERE,
        ("a learned width", spec.learn_width),
        ("a bound on its accumulator", spec.accumulator is not None),
        ("points from statistics", spec.points != "learned"),
    )


def _check_khot(spec: WeightSpec, label: str) -> None:
    """Refuses what sums of few powers of two cannot be combined with."""
    _refuse_both(
        label,
        f"khot={spec.khot}",
        "leave the other setting out, or state them in rules for different layers",
        ("a learned width", spec.learn_width),
        ("a binary point per weight or group of inputs", _grouped(spec)),
        ("a bound on its accumulator", spec.accumulator is not None),
        ("points from statistics", spec.points != "learned"),
    )


def _check_accumulator(spec: WeightSpec, axis: int, label: str) -> None:
    """Refuses what a bound on the accumulator cannot be combined with."""
    _refuse_both(
        label,
        f"accumulator={spec.accumulator}",
        "a rule for this layer can set accumulator=None, or leave the other setting out",
        ("a learned width", spec.learn_width),
        ("a binary point per weight or group of inputs", _grouped(spec)),
        ("points from statistics", spec.points != "learned"),
        ("a transposed convolution, whose sums overlap", axis != 0),
    )
