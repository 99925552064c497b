"""What of a request's wishes TensorRT-LLM cannot have, and its guide as the library has it.

Everything that is refused is named: a wish that is left out changes the answer unseen.
"""

from __future__ import annotations

from typing import Any

from serving.errors import EngineFailed, InvalidRequest
from serving.protocol import EngineRequest

LARK = "llguidance"
"""The backend that reads grammars as the frontend checks them; xgrammar wants them in EBNF."""


def check_supported(request: EngineRequest, backend: str | None) -> None:
    """Raises InvalidRequest. `backend` enforces guides, None: nothing does."""
    sampling = request.sampling
    if sampling.logit_bias:
        raise _refusal("logit_bias", "its PyTorch backend has no biases")
    if sampling.prompt_logprobs is not None:
        raise _refusal("logprobs", "with `echo`, the prompt's are not computed")
    guide = sampling.guide
    if guide is None:
        return
    if backend is None:
        raise _refusal("response_format", "`tensorrt_llm.guided_decoding` is `none`")
    if guide.kind == "grammar" and backend != LARK:
        raise _refusal("guided_grammar", f"`tensorrt_llm.guided_decoding` is not `{LARK}`")


def guide_arguments(request: EngineRequest, num_prompt: int) -> dict[str, Any]:
    """Keyword arguments of `GuidedDecodingParams`; `num_prompt` tokens go in as the prompt.

    Raises EngineFailed when some of those were generated: it would take the grammar from its
    beginning again.
    """
    guide = request.sampling.guide
    if guide is None:
        return {}
    if num_prompt > request.num_prompt_tokens:
        raise EngineFailed("TensorRT-LLM cannot continue a guided request that another one began")
    if guide.kind == "regex":
        return {"regex": guide.text}
    if guide.kind == "grammar":
        return {"grammar": guide.text}
    if guide.kind == "structural_tag":
        return {"structural_tag": guide.text}
    return {"json": guide.text}


def _refusal(field: str, why: str) -> InvalidRequest:
    return InvalidRequest(
        f"`{field}` is not supported by the TensorRT-LLM engine: {why}",
        param=field,
        code="unsupported_parameter",
    )
