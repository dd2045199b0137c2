"""Quantised torch layers, and the way from a float module to a trained, deployable one."""

from __future__ import annotations

from edgemat.nn.activation import QuantClip, QuantConstant, QuantPReLU, QuantReLU
from edgemat.nn.batch_norm import BatchNorm, QuantBatchNorm
from edgemat.nn.bipolar import BipolarQuantizer, clip_latent_weights
from edgemat.nn.calibration import calibrate
from edgemat.nn.conversion import quantize
from edgemat.nn.convolution import QuantConv1d, QuantConv2d, QuantConvTranspose2d
from edgemat.nn.embedding import QuantEmbedding
from edgemat.nn.fracbnn import FracBNN, FracBNNBlock, FractionalConv2d, QuantRPReLU
from edgemat.nn.glu import GLU
from edgemat.nn.join import QuantAdd, QuantConcat, QuantMatMul, QuantMul, QuantSub
from edgemat.nn.layer import QuantLayer
from edgemat.nn.linear import QuantLinear
from edgemat.nn.matmulfree import MatMulFreeLM
from edgemat.nn.mlgru import MLGRU
from edgemat.nn.normalization import LayerNorm, QuantLayerNorm, QuantRMSNorm, RMSNorm
from edgemat.nn.pooling import QuantAdaptiveAvgPool, QuantAvgPool, QuantMean
from edgemat.nn.preparation import prepare_export
from edgemat.nn.quantizer import FixedQuantizer, codes
from edgemat.nn.state import QuantState, reset_states
from edgemat.nn.tables import QuantSigmoid, QuantSoftmax, QuantTable, QuantTanh
from edgemat.nn.ternary import TernaryConv1d, TernaryConv2d, TernaryLinear
from edgemat.nn.ternary_quantizer import TernaryQuantizer
from edgemat.nn.thermometer import ThermometerEncoding
from edgemat.nn.token_quantizer import TokenQuantizer

__all__ = [
    "GLU",
    "MLGRU",
    "BatchNorm",
    "BipolarQuantizer",
    "FixedQuantizer",
    "FracBNN",
    "FracBNNBlock",
    "FractionalConv2d",
    "LayerNorm",
    "MatMulFreeLM",
    "QuantAdaptiveAvgPool",
    "QuantAdd",
    "QuantAvgPool",
    "QuantBatchNorm",
    "QuantClip",
    "QuantConcat",
    "QuantConstant",
    "QuantConv1d",
    "QuantConv2d",
    "QuantConvTranspose2d",
    "QuantEmbedding",
    "QuantLayer",
    "QuantLayerNorm",
    "QuantLinear",
    "QuantMatMul",
    "QuantMean",
    "QuantMul",
    "QuantPReLU",
    "QuantRMSNorm",
    "QuantRPReLU",
    "QuantReLU",
    "QuantSigmoid",
    "QuantSoftmax",
    "QuantState",
    "QuantSub",
    "QuantTable",
    "QuantTanh",
    "RMSNorm",
    "TernaryConv1d",
    "TernaryConv2d",
    "TernaryLinear",
    "TernaryQuantizer",
    "ThermometerEncoding",
    "TokenQuantizer",
    "calibrate",
    "clip_latent_weights",
    "codes",
    "prepare_export",
    "quantize",
    "reset_states",
]
