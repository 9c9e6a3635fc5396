"""From an ONNX file to a plain PyTorch model file with its weights beside it.

Everything behind that (tracing, placement, emission, verify, run) is as for any other model file.
"""
