"""A conversation and sampling fields to the sequences that answer it; the same for every API."""

from __future__ import annotations

from serving.frontend.api.fields import GenerationFields, sample_seed
from serving.frontend.model import LoadedModel
from serving.text.conversation import Conversation
from serving.text.preprocess import PreparedRequest, SampleGroup


class BasicSampling(GenerationFields):
    """Sampling fields of an API that has fewer of them than OpenAI's."""

    model: str = ""


async def prepare_answer(
    fields: GenerationFields,
    conversation: Conversation,
    model: LoadedModel,
    request_id: str,
    *,
    max_tokens: int | None,
    logprobs: int | None = None,
    session: str | None = None,
    cut_to_context: bool = False,
) -> list[PreparedRequest]:
    """A sequence for each sample. `cut_to_context`: ask for what fits instead of an error.

    Raises InvalidRequest.
    """
    preprocessor = model.preprocessor
    stop = fields.stop_strings()
    prompt = await preprocessor.encode_conversation(conversation)
    guide = prompt.answer.guide
    if guide is not None:
        made_here = guide is not conversation.answer_guide and conversation.tools
        await model.check_guide(guide, "tools" if made_here else conversation.guide_param)
    prompt_only = max_tokens == 0
    sampling = fields.sampling(
        preprocessor,
        max_tokens=preprocessor.resolve_max_tokens(
            len(prompt.token_ids),
            None if cut_to_context else 1 if prompt_only else max_tokens,
            default=max_tokens if cut_to_context else None,
            param=conversation.param,
        ),
        logprobs=logprobs,
        guide=guide,
    )
    num_samples = fields.n or 1
    group = SampleGroup() if num_samples > 1 else None
    return [
        PreparedRequest(
            request_id=request_id if num_samples == 1 else f"{request_id}-{sample}",
            token_ids=prompt.token_ids,
            sampling=sample_seed(sampling, sample),
            stop=stop,
            skip_special_tokens=fields.skip_special_tokens is not False,
            session=session,
            sample_group=group,
            answer=prompt.answer,
            prompt_only=prompt_only,
            include_stop=fields.include_stop_str_in_output is True,
            return_token_ids=fields.return_token_ids is True,
        )
        for sample in range(num_samples)
    ]
