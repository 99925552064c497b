"""What the TensorRT-LLM adapter knows without the library: formats, mappings, checks."""
