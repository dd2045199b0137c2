"""Models from elsewhere and for elsewhere: other dialects of quantised ONNX to and from the lowered file."""
