"""How an engine folder for TensorRT-LLM is made: checks, arguments per role, and the manifest."""
