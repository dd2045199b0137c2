"""All operators, in one explicit tuple; adding one is a dossier, its native files and one line here."""

from __future__ import annotations

from edgemat.op import Op
from edgemat.ops.affine import Affine
from edgemat.ops.arg_max import ArgMax
from edgemat.ops.boundary import Constant, Dequantize, Quantize, Requantize
from edgemat.ops.clip import Clip
from edgemat.ops.conv import Conv
from edgemat.ops.conv_transpose import ConvTranspose
from edgemat.ops.elementwise import Add, Mul, Sub
from edgemat.ops.embedding import Embedding
from edgemat.ops.layer_norm import LayerNorm
from edgemat.ops.linear import Linear
from edgemat.ops.matmul import MatMul
from edgemat.ops.pooling import AveragePool, MaxPool
from edgemat.ops.prelu import PRelu
from edgemat.ops.relu import Relu
from edgemat.ops.rms_norm import RmsNorm
from edgemat.ops.shape import Concat, Pad, Reshape, Slice, Transpose
from edgemat.ops.softmax import Softmax
from edgemat.ops.state import NextState, State
from edgemat.ops.table import Table
from edgemat.ops.thresholds import Thresholds
from edgemat.ops.token_exponent import TokenExponent
from edgemat.ops.token_quantize import TokenQuantize
from edgemat.ops.token_rescale import TokenRescale
from edgemat.ops.upsample import Upsample

OPS: tuple[Op, ...] = (
    Quantize(),
    Dequantize(),
    Constant(),
    State(),
    NextState(),
    Requantize(),
    Linear(),
    Conv(),
    ConvTranspose(),
    Affine(),
    Relu(),
    Clip(),
    PRelu(),
    Table(),
    Thresholds(),
    Embedding(),
    Softmax(),
    RmsNorm(),
    LayerNorm(),
    TokenExponent(),
    TokenQuantize(),
    TokenRescale(),
    Add(),
    Sub(),
    Mul(),
    MatMul(),
    MaxPool(),
    AveragePool(),
    Concat(),
    Slice(),
    Pad(),
    Reshape(),
    Transpose(),
    Upsample(),
    ArgMax(),
)

BY_NAME: dict[str, Op] = {op.name: op for op in OPS}
