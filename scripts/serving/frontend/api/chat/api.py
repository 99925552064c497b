"""`/v1/chat/completions`: a request to the samples that answer it."""

from __future__ import annotations

from serving.frontend.api.answer import prepare_answer
from serving.frontend.api.chat.request import ChatRequest, parse
from serving.frontend.api.chat.writer import ChatWriter
from serving.frontend.api.plan import CompletionApi, CompletionPlan
from serving.frontend.api.writer import Identity
from serving.frontend.model import LoadedModel


async def prepare(request: ChatRequest, model: LoadedModel, request_id: str) -> CompletionPlan:
    """Raises InvalidRequest."""
    asked = request.max_completion_tokens
    if asked is None:
        asked = request.max_tokens
    samples = await prepare_answer(
        request,
        request.conversation(),
        model,
        request_id,
        max_tokens=asked,
        logprobs=(request.top_logprobs or 0) if request.logprobs else None,
        session=request.prompt_cache_key or request.user,
    )
    fingerprint = model.card.engine_fingerprint
    writer = ChatWriter(
        Identity.new(request_id, "chat.completion.chunk", request.model, fingerprint),
        Identity.new(request_id, "chat.completion", request.model, fingerprint),
        request.stream_options,
        token_text=model.token_text if request.logprobs else None,
    )
    return CompletionPlan(
        samples=samples,
        writer=writer,
        stream=bool(request.stream),
        samples_per_prompt=len(samples),
    )


API = CompletionApi("chat.completions", "chatcmpl-", parse, prepare)
