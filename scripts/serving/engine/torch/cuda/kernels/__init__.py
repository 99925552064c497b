"""Triton kernels of the CUDA path. Nothing else is here: who calls them, and when, is elsewhere.

Each wrapper allocates its output (CUDA graphs then own that memory), takes no value from the
device, and launches on the current stream, so all of them can be captured. Accumulation is in
float32 whatever the inputs are. The KV pool is addressed as `[block, layer, 2, block_size, Hkv, D]`
(`kv_layout`), given by strides.
"""
