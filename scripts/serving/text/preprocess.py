"""Prompts to token ids: chat template, tokenizer, context limit, end-of-sequence ids.

One `Preprocessor` per model. It loads the tokenizer with `tokenizers` alone, because importing
`transformers` costs seconds at start-up. It knows nothing of HTTP or of workers.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from msgspec import Struct, field
from tokenizers import Tokenizer

from serving.errors import InvalidRequest, ModelError
from serving.model_folder import eos_token_ids, json_object, model_vocab_size
from serving.protocol import ModelCard, SamplingParams
from serving.text.chat_template import load_chat_template

THREAD_CHARS = 8192
"""Longer texts are tokenized on a thread; at a few million characters a second that is ~1 ms."""


class RequestTrace(Struct):
    """What the pipeline learned on the way, for the request's log line. Written by the pipeline."""

    instances: list[str] = field(default_factory=list)
    overlap_blocks: int = 0


class SampleGroup(Struct):
    """Samples of one prompt: they go where the first one went, to share its blocks.

    `instances` maps roles to where that was. Written by the pipeline.
    """

    instances: dict[str, str] = field(default_factory=dict)


class PreparedRequest(Struct, frozen=True):
    """One sequence to generate: what the pipeline sends and what the detokenizer needs.

    `stop` holds strings, found by the detokenizer; token ids that stop are in `sampling`.
    `session` names what the request belongs to, if the caller said.
    `prompt_only`: the one token that has to be generated is not wanted.
    """

    request_id: str
    token_ids: list[int]
    sampling: SamplingParams
    stop: tuple[str, ...] = ()
    skip_special_tokens: bool = True
    session: str | None = None
    prompt_only: bool = False
    sample_group: SampleGroup | None = None
    trace: RequestTrace = field(default_factory=RequestTrace)


class Preprocessor:
    """The tokenizer and chat template of one model. Blocking; see `load`."""

    def __init__(self, card: ModelCard) -> None:
        """Raises ModelError when the folder does not hold a usable tokenizer."""
        self.card = card
        folder = Path(card.tokenizer_dir)
        try:
            self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        except Exception as exc:  # the Rust library raises nothing narrower
            raise ModelError(
                f"{folder}/tokenizer.json cannot be read: {exc}",
                remedy="build the engine again; it writes the tokenizer",
            ) from exc
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.chat_template = load_chat_template(
            folder, json_object(folder / "tokenizer_config.json")
        )
        self.eos_token_ids = eos_token_ids(folder, self.tokenizer)
        vocabulary = self.tokenizer.get_vocab(with_added_tokens=True)
        # The embedding may be padded beyond the tokenizer's vocabulary: such ids do run.
        self.vocab_size = max(1 + max(vocabulary.values()), model_vocab_size(folder))
        self._longest_token_chars = max(map(len, vocabulary))

    @classmethod
    async def load(cls, card: ModelCard) -> Preprocessor:
        """On a thread: takes 0.1 s for 50k tokens, a second for the largest vocabularies."""
        return await asyncio.to_thread(cls, card)

    # --- prompts -------------------------------------------------------------------------------

    async def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        template_variables: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Raises InvalidRequest: no chat template, template error, longer than the context."""
        template = self.chat_template
        if template is None:
            raise InvalidRequest(
                f"{self.card.name} has no chat template; use /v1/completions", param="messages"
            )
        num_chars = sum(len(message.get("content") or "") for message in messages)
        self._refuse_absurd(num_chars, "messages")

        def render_and_encode() -> list[int]:
            text = template.render(
                messages, add_generation_prompt=add_generation_prompt, extra=template_variables
            )
            self._refuse_absurd(len(text), "messages")
            # The template writes the special tokens itself.
            return self._encode(text, add_special_tokens=False)

        if num_chars > THREAD_CHARS:
            return await asyncio.to_thread(render_and_encode)
        return render_and_encode()

    async def encode_text(self, text: str, *, param: str = "prompt") -> list[int]:
        """With the special tokens that the tokenizer adds by itself. Raises InvalidRequest."""
        self._refuse_absurd(len(text), param)
        if len(text) > THREAD_CHARS:
            return await asyncio.to_thread(self._encode, text, add_special_tokens=True)
        return self._encode(text, add_special_tokens=True)

    def check_token_ids(self, token_ids: Sequence[int], *, param: str = "prompt") -> None:
        """Raises InvalidRequest for an id that the model does not have."""
        if token_ids and not (min(token_ids) >= 0 and max(token_ids) < self.vocab_size):
            raise InvalidRequest(f"Token ids must be in 0..{self.vocab_size - 1}", param=param)

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of a prompt given as token ids, special tokens included."""
        text: str = self.tokenizer.decode(list(token_ids), skip_special_tokens=False)
        return text

    def resolve_max_tokens(
        self, num_prompt_tokens: int, asked: int | None, *, default: int | None, param: str
    ) -> int:
        """Tokens to generate. `asked` must fit; `default` (None: all there is) is cut to fit.

        Raises InvalidRequest with code `context_length_exceeded`.
        """
        limit = self.card.max_model_len
        room = limit - num_prompt_tokens
        if room < 1:
            raise InvalidRequest(
                f"The prompt has {num_prompt_tokens} tokens; with at least one more to generate "
                f"it exceeds the context of {limit} tokens",
                param=param,
                code="context_length_exceeded",
            )
        if asked is None:
            return room if default is None else min(default, room)
        if asked > room:
            raise InvalidRequest(
                f"The prompt has {num_prompt_tokens} tokens and {asked} more were asked for: "
                f"{num_prompt_tokens + asked} exceed the context of {limit} tokens",
                param=param,
                code="context_length_exceeded",
            )
        return asked

    def _encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        # The batch of one, because only batches can be had without offsets into the text.
        encode = self.tokenizer.encode_batch_fast
        ids: list[int] = encode([text], add_special_tokens=add_special_tokens)[0].ids
        return ids

    def _refuse_absurd(self, num_chars: int, param: str) -> None:
        """A text that cannot fit even in the longest tokens is not worth tokenizing."""
        limit = self.card.max_model_len
        at_least = -(-num_chars // self._longest_token_chars)
        if at_least > limit:
            raise InvalidRequest(
                f"The prompt has at least {at_least} tokens ({num_chars} characters) and exceeds "
                f"the context of {limit} tokens",
                param=param,
                code="context_length_exceeded",
            )
