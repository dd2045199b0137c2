"""Norms over rows and dynamic activations by row."""
