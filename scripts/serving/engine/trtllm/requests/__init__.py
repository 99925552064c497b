"""A request on its way through TensorRT-LLM: admission, sampling, KV fetch, outputs."""
