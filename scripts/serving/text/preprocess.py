"""Prompts to token ids: chat template, tokenizer, context limit, end-of-sequence ids.

There is one `Preprocessor` per model. It loads the tokenizer with `tokenizers` alone, because
importing `transformers` costs seconds at start-up. It knows nothing about HTTP or workers.
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
    """Where a request went. The pipeline writes it for the request's log line."""

    instances: list[str] = field(default_factory=list)
    overlap_blocks: int = 0


class SampleGroup(Struct):
    """Samples of one prompt. All go to the instances of the first one, to share its blocks.

    `instances` maps roles to instance ids. The pipeline writes it.
    """

    instances: dict[str, str] = field(default_factory=dict)


class PreparedRequest(Struct, frozen=True):
    """One sample to generate: what the pipeline sends and what the detokenizer needs.

    `stop` holds the stop strings, which the detokenizer finds. Token ids that stop are in
    `sampling`. `session` names the conversation or user of the request, if the caller gave one.
    With `prompt_only`, the one token that must be generated is dropped.
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
    """The tokenizer and chat template of one model. Its constructor blocks; `load` does not."""

    def __init__(self, card: ModelCard, thread_chars: int = THREAD_CHARS) -> None:
        """Raises ModelError if the folder has no usable tokenizer."""
        self.card, self._thread_chars = card, thread_chars
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
        # The embedding may be padded beyond the tokenizer's vocabulary, and the padding is valid.
        self.vocab_size = max(1 + max(vocabulary.values()), model_vocab_size(folder))
        self._longest_token_chars = max(map(len, vocabulary))

    @classmethod
    async def load(cls, card: ModelCard) -> Preprocessor:
        """Load on a thread. Takes 0.1 s for 50k tokens and a second for the largest vocabularies."""
        return await asyncio.to_thread(cls, card)

    # --- prompts -------------------------------------------------------------------------------

    async def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        template_variables: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Render the chat template and tokenize the text.

        Raises InvalidRequest: no chat template, an error in it, or a prompt beyond the context.
        """
        template = self.chat_template
        if template is None:
            raise InvalidRequest(
                f"{self.card.name} has no chat template; use /v1/completions", param="messages"
            )
        num_chars = sum(len(message.get("content") or "") for message in messages)
        self._refuse_too_long(num_chars, "messages")

        def render_and_encode() -> list[int]:
            text = template.render(
                messages, add_generation_prompt=add_generation_prompt, extra=template_variables
            )
            self._refuse_too_long(len(text), "messages")
            # The template writes the special tokens itself.
            return self._encode(text, add_special_tokens=False)

        if num_chars > self._thread_chars:
            return await asyncio.to_thread(render_and_encode)
        return render_and_encode()

    async def encode_text(self, text: str, *, param: str = "prompt") -> list[int]:
        """Tokenize, with the special tokens that the tokenizer adds itself. Raises InvalidRequest."""
        self._refuse_too_long(len(text), param)
        if len(text) > self._thread_chars:
            return await asyncio.to_thread(self._encode, text, add_special_tokens=True)
        return self._encode(text, add_special_tokens=True)

    def check_token_ids(self, token_ids: Sequence[int], *, param: str = "prompt") -> None:
        """Raises InvalidRequest for an id outside the model's vocabulary."""
        if token_ids and not (min(token_ids) >= 0 and max(token_ids) < self.vocab_size):
            raise InvalidRequest(f"Token ids must be in 0..{self.vocab_size - 1}", param=param)

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of a prompt given as token ids, special tokens included."""
        text: str = self.tokenizer.decode(list(token_ids), skip_special_tokens=False)
        return text

    def resolve_max_tokens(
        self, num_prompt_tokens: int, requested: int | None, *, default: int | None, param: str
    ) -> int:
        """Tokens to generate.

        `requested` must fit into the context. Without it, `default` is cut to fit; None stands for
        all the room there is. Raises InvalidRequest with code `context_length_exceeded`.
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
        if requested is None:
            return room if default is None else min(default, room)
        if requested > room:
            raise InvalidRequest(
                f"The prompt has {num_prompt_tokens} tokens and {requested} more are requested: "
                f"{num_prompt_tokens + requested} exceed the context of {limit} tokens",
                param=param,
                code="context_length_exceeded",
            )
        return requested

    def _encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        # A batch of one, because only batches can be encoded without offsets into the text.
        encode = self.tokenizer.encode_batch_fast
        ids: list[int] = encode([text], add_special_tokens=add_special_tokens)[0].ids
        return ids

    def _refuse_too_long(self, num_chars: int, param: str) -> None:
        """Raises InvalidRequest without tokenizing for a text that cannot fit the context."""
        limit = self.card.max_model_len
        at_least = -(-num_chars // self._longest_token_chars)
        if at_least > limit:
            raise InvalidRequest(
                f"The prompt has at least {at_least} tokens ({num_chars} characters) and exceeds "
                f"the context of {limit} tokens",
                param=param,
                code="context_length_exceeded",
            )
