"""What TensorRT-LLM reports by itself: KV events and statistics, polled and translated."""
