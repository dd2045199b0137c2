"""From a native step to the kernel variant it calls: element types, accumulator, epilogue, parameters, arrays.

Everything a template prints is decided here. A `Variant` is one instantiation of a kernel file; two steps of the same
types share it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from edgemat.errors import UnsupportedOpError
from edgemat.signed_digits import pack_digits
from edgemat.targets.layout import Step
from edgemat.targets.mcu.epilogue import EpilogueChoice, overflow_kind, overflow_macros, overflow_name
from edgemat.targets.mcu.rows import choose_rows
from edgemat.targets.mcu.storage import ConstantArray, array_storage, c_type, size_of, storage
from edgemat.targets.mcu.ternary import choose_trits, packed_rows

_BLOCK = 4
WORD_BITS = 32
SHORT_ROW = 16
SUBSET_OUTPUTS = 4, 512
SUBSET_BYTES = 4096
"""Bytes of inputs that a kernel of subset sums holds on its stack, beside its tables and the sums of its outputs."""
STACK_WORDS = 512
"""Longest row of signs (words of 32) an XNOR kernel packs on its stack; a convolution holds as long a mask, too."""
_WINDOW = ("in_h", "in_w", "in_c", "out_h", "out_w")
_KERNEL = ("kernel_h", "kernel_w", "stride_h", "stride_w")
_DILATION = ("dilation_h", "dilation_w")
_CONV = (*_WINDOW, "out_c", *_KERNEL, "pad_top", "pad_left", *_DILATION, "groups", "has_bias")
_POOL = (*_WINDOW, *_KERNEL, "pad_top", "pad_left", "pad_bottom", "pad_right", *_DILATION, "count_include_pad")
_BINARY = ("size", "align0", "align1", "broadcast", "dims", "stride0", "stride1")
_STRIDED = ("dims", "stride", "offset")
_NORM = ("total_offset", "norm_min", "norm_max", "root", "rows", "features", "norm_shift", "has_gain", "has_bias")


@dataclass(frozen=True)
class Kernel:
    """What the generator knows of a kernel file.

    Attributes:
        struct: parameter structure.
        fields: its members, each a key of the step's params.
        arrays: names of the constant arrays in argument order.
        epilogue: whether it takes an epilogue.
        moves: whether it only moves codes (one element type).
        accumulates: whether its bounds speak of a sum of products.
        in_place: whether the result may overwrite an operand.
    """

    struct: str
    fields: tuple[str, ...]
    arrays: tuple[str, ...] = ()
    epilogue: bool = True
    moves: bool = False
    in_place: bool = False


KERNELS = {
    "requantize": Kernel("em_requantize_params", ("size",), in_place=True),
    "relu": Kernel("em_relu_params", ("size",), in_place=True),
    "clip": Kernel("em_clip_params", ("low", "high", "size", "align"), in_place=True),
    "add": Kernel("em_binary_params", _BINARY, in_place=True),
    "sub": Kernel("em_binary_params", _BINARY, in_place=True),
    "mul": Kernel("em_binary_params", _BINARY, in_place=True),
    "linear": Kernel("em_linear_params", ("rows", "in_features", "out_features", "has_bias"), ("weight", "bias")),
    "conv": Kernel("em_conv_params", _CONV, ("weight", "bias")),
    "conv_transpose": Kernel("em_conv_params", _CONV, ("weight", "bias")),
    "affine": Kernel("em_affine_params", ("size", "channels"), ("scale", "bias"), in_place=True),
    "prelu": Kernel("em_prelu_params", ("size", "channels", "align"), ("slope",), in_place=True),
    "max_pool": Kernel("em_pool_params", _POOL),
    "average_pool": Kernel("em_pool_params", _POOL),
    "concat": Kernel("em_concat_params", ("outer", "inner", "row", "offset"), epilogue=False, moves=True),
    "slice": Kernel("em_strided_params", _STRIDED, epilogue=False, moves=True),
    "transpose": Kernel("em_strided_params", _STRIDED, epilogue=False, moves=True),
    "pad": Kernel("em_pad_params", ("value", "in_dims", "before", "after"), epilogue=False, moves=True),
    "arg_max": Kernel("em_arg_max_params", ("outer", "axis_size", "inner", "last"), epilogue=False),
    "embedding": Kernel("em_embedding_params", ("rows", "depth"), ("table",), epilogue=False),
    "table": Kernel("em_table_params", ("size", "x_min"), ("table",), epilogue=False, in_place=True),
    "thresholds": Kernel(
        "em_thresholds_params",
        ("start", "step", "size", "channels", "count"),
        ("threshold",),
        epilogue=False,
        in_place=True,
    ),
    "upsample": Kernel(
        "em_upsample_params", ("in_h", "in_w", "in_c", "scale_h", "scale_w"), epilogue=False, moves=True
    ),
    "softmax": Kernel("em_softmax_params", ("outer", "axis_size", "inner", "shift"), ("exp_table",), epilogue=False),
    "matmul": Kernel("em_matmul_params", ("batch", "m", "k", "n")),
    "rms_norm": Kernel("em_norm_params", _NORM, ("gain", "bias"), in_place=True),
    "layer_norm": Kernel("em_norm_params", _NORM, ("gain", "bias"), in_place=True),
    "token_exponent": Kernel("em_token_exponent_params", ("rows", "features", "width"), epilogue=False),
    "token_quantize": Kernel("em_rows_params", ("rows", "features"), epilogue=False),
    "token_rescale": Kernel("em_rows_params", ("rows", "features")),
}
_WIDE_FIELDS = frozenset({"low", "high", "value", "root", "norm_min", "norm_max", "total_offset", "start", "step"})
_INDEX_LIMIT = 1 << 30
_DEFAULTS = {"dilation_h": 1, "dilation_w": 1, "count_include_pad": 0}


@dataclass(frozen=True)
class Variant:
    """One instantiation of a kernel file: ``macros`` are defined, then ``file`` is included."""

    function: str
    file: str
    macros: tuple[tuple[str, str], ...]
    prototype: str


@dataclass(frozen=True)
class KernelCall:
    """One call.

    Attributes:
        step: the native step.
        variant: the kernel variant.
        operands: positions in ``step.inputs``.
        struct: type of the parameter structure.
        fields: its (member, int or tuple of int).
        arrays: constant arrays in argument order.
        shift: right shifts of the epilogue; empty where nothing is shifted.
        widths: bits of each channel's code where they differ and saturate; else empty.
        takes_epilogue: whether the kernel has an epilogue argument.
        suffix: told apart by it are several calls of one step.
        scratch_bytes: working memory, the kernel's last argument; 0: it has none.
    """

    step: Step
    variant: Variant
    operands: tuple[int, ...]
    struct: str
    fields: tuple[tuple[str, int | tuple[int, ...]], ...]
    arrays: tuple[ConstantArray | None, ...]
    shift: tuple[int, ...]
    takes_epilogue: bool
    suffix: str = ""
    widths: tuple[int, ...] = ()
    scratch_bytes: int = 0


def interleave(rows: np.ndarray, groups: int, repeat: bool = True) -> np.ndarray:
    """Weight rows ``[out, length]`` as linear.c and conv.c read them, flat.

    Inside each group: blocks of four rows, interleaved; where two or three rows are left, the last four as one more
    block (not without ``repeat``: depthwise); other rows left plainly.
    """
    parts = []
    per_group = len(rows) // groups
    for start in range(0, len(rows), per_group):
        group = rows[start : start + per_group]
        whole = per_group - per_group % _BLOCK
        parts += [group[at : at + _BLOCK].T.reshape(-1) for at in range(0, whole, _BLOCK)]
        if repeat and per_group > _BLOCK and per_group - whole > 1:
            parts.append(group[-_BLOCK:].T.reshape(-1))
        else:
            parts.append(group[whole:].reshape(-1))
    return np.concatenate(parts)


def plan_calls(step: Step) -> list[KernelCall]:
    """The kernel calls of a step (Concat: one for each input; a reshape: none).

    Raises:
        UnsupportedOpError: no kernel of that stem, or a sum beyond 64 bits.
    """
    if step.stem == "reshape":
        return []
    if step.stem not in KERNELS:
        raise UnsupportedOpError(
            f"node {step.node!r}: the target 'mcu' has no kernel for operator {step.stem!r}; replace the operator or "
            f"export to another target"
        )
    if step.stem == "concat":
        return _concat(step)
    return [_plan(step)]


def _concat(step: Step) -> list[KernelCall]:
    inner = step.params["inner"]
    element = storage(step.outputs[0].format)
    offset, calls = 0, []
    for position, width in enumerate(inner):
        if storage(step.inputs[position].format) != element:
            raise UnsupportedOpError(
                f"node {step.node!r}: concat joins {step.inputs[position].format} into {step.outputs[0].format}, "
                "expected one format; requantise its inputs first"
            )
        params = {"outer": step.params["outer"], "inner": width, "row": sum(inner), "offset": offset}
        calls.append(_moving(step, element, params, position, f"_{position}"))
        offset += width
    return calls


def _moving(step: Step, element: str, params: dict, position: int = 0, suffix: str = "") -> KernelCall:
    kernel = KERNELS[step.stem]
    function = f"em_{step.stem}_{element}"
    kind = c_type(element)
    prototype = f"void {function}(const {kernel.struct} *p, const {kind} *x, {kind} *y);"
    variant = Variant(function, f"{step.stem}.c", (("EM_X", kind),), prototype)
    fields = _fields(step, kernel, params)
    return KernelCall(step, variant, (position,), kernel.struct, fields, (), (), False, suffix)


def _plan(step: Step) -> KernelCall:
    kernel = KERNELS[step.stem]
    x = [storage(tensor.format) for tensor in step.inputs]
    y = storage(step.outputs[0].format)
    params = {**_DEFAULTS, **step.params}
    if kernel.moves:
        if x[0] != y:
            raise UnsupportedOpError(
                f"node {step.node!r}: {step.stem} turns {step.inputs[0].format} into {step.outputs[0].format}, "
                "expected one format"
            )
        return _moving(step, y, params)
    trits = choose_trits(step)
    signs = f"{step.stem}__trits.c" if trits else signs_file(step)
    codes = _arrays(step, y, bool(signs))
    arrays, digit_macros, digit_name = (codes, [], []) if signs else packed_digits(step, codes)
    macros = [("EM_X", c_type(x[0])), *digit_macros]
    name = [step.stem, x[0]]
    if len(x) > 1:
        macros.append(("EM_X1", c_type(x[1])))
        name.append(x[1])
    if arrays and step.stem not in ("table", "embedding") and arrays[0] is not None:
        macros.append(("EM_W", c_type(arrays[0].element)))
        name.append(arrays[0].element)
    name += digit_name
    for kind, macro, label in (("bipolar", "1", "signed"), ("ternary", "2", "ternary")):
        if step.params.get(kind) and not signs:
            macros.append(("EM_SIGNED", macro))
            name.append(label)
    if "bias" in kernel.arrays:
        bias = arrays[kernel.arrays.index("bias")]
        macros.append(("EM_B", c_type(bias.element if bias else "s32")))
        if bias is not None and bias.element != "s32":
            name.append(f"b{bias.element}")
    macros.append(("EM_Y", c_type(y)))
    name.append(y)
    depthwise = _is_depthwise(step)
    shift: tuple[int, ...] = ()
    widths: tuple[int, ...] = ()
    if kernel.epilogue:
        # Bits say nothing of an accumulator's reach.
        choice = EpilogueChoice(step, [None if signs and i == 0 else array for i, array in enumerate(codes)])
        shift, widths = choice.shift, choice.widths
        macros += choice.macros
        name += choice.name
    if step.stem == "softmax":
        _choose_quotient(step, macros, name)
    if step.stem == "thresholds":
        _choose_steps(step, macros, name)
    choose_rows(step, macros, name)
    if trits:
        macros += trits.macros
        name.append(trits.name)
    elif signs and not signs.endswith("__bipolar.c"):
        held = 1 << (sign_words(step) - 1).bit_length()
        macros.append(("EM_WORDS", str(held)))
        name.append(f"k{32 * held}")
    if signs.endswith("__subsets.c"):
        outputs = 1 << (_group_outputs(step) - 1).bit_length()
        macros.append(("EM_OUTPUTS", str(outputs)))
        name.append(f"o{outputs}")
    file = signs or (f"{step.stem}__depthwise.c" if depthwise else f"{step.stem}.c")
    function = "em_" + "_".join(name) + file.removeprefix(step.stem).removesuffix(".c")
    arguments = [f"const {kernel.struct} *p"]
    arguments += [f"const {c_type(e)} *x{i if len(x) > 1 else ''}" for i, e in enumerate(x)]
    for role, array in zip(kernel.arrays, arrays, strict=True):
        element = array.element if array else "s32"
        arguments.append(f"const {c_type(element)} *{role}")
    if kernel.epilogue:
        arguments.append("const em_epilogue *epilogue")
    arguments.append(f"{c_type(y)} *y")
    arguments += ["void *scratch"] if trits else []
    variant = Variant(function, file, tuple(macros), f"void {function}({', '.join(arguments)});")
    fields = _fields(step, kernel, params)
    operands = tuple(range(len(step.inputs)))
    return KernelCall(
        step, variant, operands, kernel.struct, fields, tuple(arrays), shift, kernel.epilogue, widths=widths,
        scratch_bytes=trits.scratch_bytes if trits else 0,
    )  # fmt: skip


def _fields(step: Step, kernel: Kernel, params: dict) -> tuple[tuple[str, int | tuple[int, ...]], ...]:
    """Members of the parameter structure; index arithmetic in int32_t needs them, and every size, below 2**30."""
    made = tuple((name, params[name]) for name in kernel.fields)
    sizes = [("an array of elements", array.size) for array in step.arrays.values()]
    sizes += [("a tensor of elements", tensor.size) for tensor in (*step.inputs, *step.outputs)]
    for name, value in (*made, *sizes):
        values = value if isinstance(value, tuple) else (value,)
        if name not in _WIDE_FIELDS and max(map(abs, values), default=0) >= _INDEX_LIMIT:
            raise UnsupportedOpError(
                f"node {step.node!r}: {name} is {value}, the mcu target indexes with 32 bits and expects less than "
                f"{_INDEX_LIMIT}; split the layer"
            )
    return made


def sign_words(step: Step) -> int:
    """Words of 32 bits that hold one row of a step's weights as signs."""
    weight = step.arrays["weight"]
    return -(-weight[0].size // WORD_BITS)


def _group_outputs(step: Step) -> int:
    """Outputs that share a row of inputs."""
    return len(step.arrays["weight"]) // int(step.params.get("groups", 1))


def signs_file(step: Step) -> str:
    """The kernel file of a step whose weights are signs as bits, or "".

    1. XNOR and bit counts where its inputs are signs, too, and a row of them fits the stack.
    2. Sums of subsets of inputs, where enough outputs share them and a row of inputs fits the stack.
    3. Otherwise additions, bit by bit.

    A row of few signs is not worth unpacking: there the plain kernel adds and subtracts by weights of a byte each.
    """
    if not step.params.get("bipolar") or step.arrays["weight"][0].size < SHORT_ROW:
        return ""
    words, outputs = sign_words(step), _group_outputs(step)
    if step.inputs[0].format.bipolar and words <= STACK_WORDS:
        return f"{step.stem}__xnor.c"
    held = words * WORD_BITS * size_of(storage(step.inputs[0].format))
    shared = SUBSET_OUTPUTS[0] <= outputs <= SUBSET_OUTPUTS[1] and held <= SUBSET_BYTES
    return f"{step.stem}__{'subsets' if shared else 'bipolar'}.c"


def _is_depthwise(step: Step) -> bool:
    params = step.params
    return step.stem == "conv" and params["groups"] == params["in_c"] == params["out_c"] > 1


def _choose_quotient(step: Step, macros: list[tuple[str, str]], name: list[str]) -> None:
    """Accumulator, rounding and overflow of a softmax: its bounds speak of sum and shifted numerator."""
    fmt = step.outputs[0].format
    overflow = overflow_kind(fmt, 0, 1 << int(step.params["shift"]))
    macros.append(("EM_ROUNDING", f"EM_{fmt.rounding}"))
    name.append(fmt.rounding.lower())
    if overflow != "FITS":
        macros += overflow_macros(fmt, overflow)
        name.append(overflow_name(fmt))
    if max(step.bounds.partial) >= 1 << 29 or fmt.max_code >= 1 << 31:
        macros.append(("EM_ACC_BITS", "64"))
        name.append("acc64")


def _choose_steps(step: Step, macros: list[tuple[str, str]], name: list[str]) -> None:
    """Accumulator and steps of Thresholds: its bounds speak of the result, not of what the result is compared from."""
    p, x = step.params, step.inputs[0]
    levels = abs(int(p["start"])) + abs(int(p["step"])) * int(p["count"])
    if max(levels, -x.lo, x.hi + 1) >= 1 << 31:
        macros.append(("EM_ACC_BITS", "64"))
        name.append("acc64")
    if p["step"] != 1:
        macros.append(("EM_STEPS", "1"))
        name.append("steps")


def sign_rows(rows: np.ndarray) -> np.ndarray:
    """Rows ``[out, length]`` of -1 and +1 as words: bit ``i % 32`` of word ``i / 32`` of a row is 1 for -1."""
    bits = np.zeros((len(rows), -(-rows.shape[1] // WORD_BITS) * WORD_BITS), np.int64)
    bits[:, : rows.shape[1]] = rows < 0
    return (bits.reshape(-1, WORD_BITS) << np.arange(WORD_BITS, dtype=np.int64)).sum(axis=1)


def packed_digits(
    step: Step, arrays: list[ConstantArray | None]
) -> tuple[list[ConstantArray | None], list[tuple[str, str]], list[str]]:
    """K-hot constants as words of packed digits, with the macros and the name of their layout; others as they are.

    Words hold all their digits where that is possible (edgemat_shift_add.h), so that the kernel asks nothing.
    """
    khot = int(step.params.get("khot", 0))
    if not khot or arrays[0] is None:
        return arrays, [], []
    packed = pack_digits(arrays[0].values, khot, dense=True)
    element = "u8" if packed.width <= 8 else "u16" if packed.width <= 16 else "u32"
    layout = {"EM_DIGITS": packed.count, "EM_DIGIT_BITS": packed.field_bits, "EM_DIGIT_NONE": packed.none}
    macros = [(key, f"{value}u" if key == "EM_DIGIT_NONE" else str(value)) for key, value in layout.items()]
    words = ConstantArray(arrays[0].role, element, packed.words)
    return [words, *arrays[1:]], macros, [f"d{packed.count}x{packed.field_bits}n{packed.none}"]


def _arrays(step: Step, y: str, signs: bool = False) -> list[ConstantArray | None]:
    found: list[ConstantArray | None] = []
    for role in KERNELS[step.stem].arrays:
        values = step.arrays.get(role)
        if values is None:
            found.append(None)
            continue
        values = np.asarray(values, dtype=np.int64)
        element = array_storage(values)
        if role == "table":
            element = y
        elif role == "bias":
            element = "s32" if size_of(element) <= 4 else "s64"
        trits = choose_trits(step) if role == "weight" else None
        if trits is not None:
            groups = int(step.params.get("groups", 1))
            element, values = "u8", packed_rows(values.reshape(len(values), -1), groups, trits.trits)
        elif role == "weight" and signs:
            element, values = "u32", sign_rows(values.reshape(len(values), -1))
        elif role == "weight":
            depthwise = _is_depthwise(step)
            groups = 1 if depthwise or step.stem != "conv" else step.params["groups"]
            if step.stem != "conv_transpose":
                values = interleave(values.reshape(len(values), -1), groups, repeat=not depthwise)
        found.append(ConstantArray(role, element, values.reshape(-1)))
    return found
