"""Test code. The command-line tools of the TensorRT flow, which exists up to 1.2."""
