"""What the frontend stands on, made small: a tokenizer of bytes and a scripted pipeline."""

from __future__ import annotations

import asyncio
import json
from array import array
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

from serving.protocol import EngineOutput, FinishReason, ModelCard, TokenLogprob
from serving.text.preprocess import PreparedRequest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

MODEL = "org/tiny"
TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role == 'tool' and not message.tool_call_id %}"
    "{{ raise_exception('tool without id') }}{% endif %}"
    "<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TOOL_TEMPLATE = (
    "{% if tools %}<|im_start|>system\n<tool_call> {{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for message in messages %}"
    "<|im_start|>{{ message.role }}\n"
    "{% if message.reasoning_content %}<think>{{ message.reasoning_content }}</think>{% endif %}"
    "{{ message.content }}"
    "{% for call in message.tool_calls or [] %}<tool_call>"
    "{{ {'name': call.function.name, 'arguments': call.function.arguments} | tojson }}"
    "</tool_call>{% endfor %}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Of a model that thinks and calls tools, as Qwen's."""
CORPUS = ["the quick brown fox jumps over the lazy dog", "hello world, hello there"] * 4


def write_tokenizer(folder: Path, template: str = TEMPLATE) -> Path:
    """A byte-level BPE tokenizer with every byte in it, and a ChatML template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[AddedToken(t, special=True) for t in ("<|im_start|>", "<|im_end|>")],
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(template)
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>"}))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1]}))
    return folder


def make_card(folder: Path, *, max_model_len: int = 256) -> ModelCard:
    return ModelCard(
        name=MODEL,
        tokenizer_dir=str(folder),
        max_model_len=max_model_len,
        block_size=16,
        hash_salt="salt",
        engine_fingerprint="0123456789abcdef",
        created=1_700_000_000,
    )


class FakePipeline:
    """Says `text`, `per_step` tokens at a time, and remembers what was done to it."""

    def __init__(self, card: ModelCard | None, tokenizer: Tokenizer) -> None:
        self.card, self.tokenizer = card, tokenizer
        self.token_ids: list[int] = []
        self.per_step = 1
        self.delay_s = 0.0
        self.cached_tokens = 3
        self.finish_reason: FinishReason = "stop"
        self.fail_after: int | None = None
        self.error: Exception = RuntimeError("broken")
        self.endless = False
        self.vector = [1.0, 2.0, 2.0]
        self.seen: list[PreparedRequest] = []
        self.active = 0
        self.aborted: list[str] = []
        self.num_steps = 0
        self.reason = ""

    def say(self, text: str) -> None:
        self.token_ids = self.tokenizer.encode(text, add_special_tokens=False).ids

    def ready(self) -> tuple[bool, str]:
        return not self.reason, self.reason

    def describe(self) -> dict[str, Any]:
        return {"topology": "disagg", "instances": []}

    async def generate(self, prepared: PreparedRequest) -> AsyncIterator[EngineOutput]:
        self.seen.append(prepared)
        prepared.trace.instances.append("prefill-0")
        self.active += 1
        finished = False
        try:
            async for output in self._outputs(prepared):
                finished = output.finish_reason is not None
                self.num_steps += 1
                yield output
        finally:
            self.active -= 1
            if not finished:
                self.aborted.append(prepared.request_id)

    async def _outputs(self, prepared: PreparedRequest) -> AsyncIterator[EngineOutput]:
        limit = prepared.sampling.max_tokens
        tokens = self.token_ids[:limit]
        cut: FinishReason = "length" if len(self.token_ids) > limit else self.finish_reason
        step = 0
        while True:
            if self.fail_after is not None and step == self.fail_after:
                raise self.error
            await asyncio.sleep(self.delay_s)
            if prepared.pooling is not None:
                vector = array("f", self.vector).tobytes()
                yield EngineOutput(prepared.request_id, [], "stop", embedding=vector)
                return
            start = step * self.per_step
            some = tokens[start : start + self.per_step]
            if self.endless:
                some = some or self.token_ids[:1]
            last = not self.endless and start + self.per_step >= len(tokens)
            yield EngineOutput(
                prepared.request_id,
                some,
                finish_reason=cut if last else None,
                cached_tokens=self.cached_tokens if step == 0 else None,
                logprobs=_logprobs(some, prepared.sampling.logprobs),
                prompt_logprobs=_logprobs(prepared.token_ids[1:], prepared.sampling.prompt_logprobs)
                if step == 0
                else None,
            )
            if last:
                return
            step += 1


def _logprobs(tokens: Sequence[int], count: int | None) -> list[TokenLogprob] | None:
    if count is None:
        return None
    alternatives = [(5, float("-inf")), (6, -3.0)]
    return [TokenLogprob(t, -0.5, [(t, -0.5), *alternatives][:count]) for t in tokens]
