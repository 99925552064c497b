"""A GPU that is fit for everything."""

from serving.gpus import Gpu

GIB = 1024**3
H100 = Gpu("NVIDIA H100", 90, memory_bytes=80 * GIB, free_bytes=79 * GIB)
