"""Test code. The version that this stand-in plays."""

from tensorrt_llm import _contract

__version__ = _contract.current_version()
