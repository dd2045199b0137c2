"""Quantisation-aware training, edgemat beside Brevitas and HGQ2, in one run and under one protocol.

``python -m tests.benchmarks qat`` runs what is missing in the cache and writes docs/evidence.md. Each training is a
process of its own (`trainers`), started from the same float network on the same samples in the same order.
"""
