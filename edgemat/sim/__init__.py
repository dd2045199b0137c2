"""Bit-exact simulation: the numpy reference, and a fast simulator on onnxruntime."""

from edgemat.sim.simulator import Simulator

__all__ = ["Simulator"]
