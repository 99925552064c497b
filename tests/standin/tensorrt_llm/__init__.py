"""Test code: stands in for TensorRT-LLM where it cannot be installed. Not the real thing.

Classes, fields and signatures come from `contract.json` for the version that
`STANDIN_TRTLLM_VERSION` names; behind them the project's torch engine computes on the CPU.
"""

from tensorrt_llm.version import __version__

# The real package says so too, on standard output.
print(f"[TensorRT-LLM] TensorRT LLM version: {__version__}", flush=True)

from tensorrt_llm.disaggregated_params import DisaggregatedParams  # noqa: E402
from tensorrt_llm.llmapi.llm import LLM  # noqa: E402
from tensorrt_llm.sampling_params import SamplingParams  # noqa: E402

__all__ = ["LLM", "DisaggregatedParams", "SamplingParams", "__version__"]
