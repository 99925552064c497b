"""Prompts to token ids: chat template, tokenizer, context limit, end-of-sequence ids.

There is one `Preprocessor` per model. It loads the tokenizer with `tokenizers` alone, because
importing `transformers` costs seconds at start-up. It knows nothing about HTTP or workers.
"""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from msgspec import Struct, field
from msgspec.structs import replace
from tokenizers import Tokenizer

from serving.errors import InvalidRequest, ModelError
from serving.model_folder import eos_token_ids, json_object, model_vocab_size
from serving.protocol import ModelCard, Pooling, SamplingParams
from serving.text.answer_format import answer_format
from serving.text.chat_template import ChatTemplate, load_chat_template
from serving.text.conversation import (
    AnswerPlan,
    Conversation,
    messages_for,
    plan_answer,
    template_tools,
)
from serving.text.segment_cache import SegmentCache
from serving.text.special_tokens import (
    QUOTE_BEGIN,
    SpecialTokenQuotes,
    split_quoted,
)
from serving.text.tool_calls.base import ToolSet

THREAD_CHARS = 8192
"""Longer texts are tokenized on a thread; at a few million characters a second that is ~1 ms."""


PROMPT_END_CHARS = 400
"""The end of a prompt that shows whether the template opened the model's reasoning."""


class Prompt(NamedTuple):
    """A conversation's token ids, and how its answer is guided and parsed."""

    token_ids: list[int]
    answer: AnswerPlan


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

    `stop` holds strings, found by the detokenizer; token ids that stop are in `sampling`.
    `session` names what the request belongs to, if the caller named it.
    The last `num_generated` of the token ids are part of the answer already. `prompt_only`: the one token that has to be generated is not wanted. `answer` says how the
    answer is parsed; None: it is text. With `pooling` it is an embedding.
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
    answer: AnswerPlan | None = None
    include_stop: bool = False
    num_generated: int = 0
    return_token_ids: bool = False
    pooling: Pooling | None = None


class Preprocessor:
    """The tokenizer and chat template of one model. Its constructor blocks; `load` does not."""

    def __init__(
        self,
        card: ModelCard,
        *,
        tool_parser: str = "auto",
        reasoning_parser: str = "auto",
        special_tokens_in_text: bool = False,
        thread_chars: int = THREAD_CHARS,
    ) -> None:
        """`special_tokens_in_text`: a message's text may contain special tokens, else it cannot.

        Raises ModelError when the folder does not hold a usable tokenizer.
        """
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
        self.answer_format = answer_format(
            self.tokenizer,
            self.chat_template.source if self.chat_template is not None else "",
            tool_parser=tool_parser,
            reasoning_parser=reasoning_parser,
        )
        self.document_start_id = self._document_start(folder)
        self._special_tokens_in_text = special_tokens_in_text
        self._quotes = SpecialTokenQuotes(self.answer_format.special_tokens)
        self._plain: Tokenizer | None = None
        self._segments = SegmentCache(self.tokenizer)

    def with_context(self, max_model_len: int) -> Preprocessor:
        """The same, for a service that now offers another context."""
        other = copy.copy(self)
        other.card = replace(self.card, max_model_len=max_model_len)
        return other

    @classmethod
    async def load(
        cls,
        card: ModelCard,
        *,
        tool_parser: str = "auto",
        reasoning_parser: str = "auto",
        special_tokens_in_text: bool = False,
    ) -> Preprocessor:
        """On a thread: takes 0.1 s for 50k tokens, a second for the largest vocabularies."""
        return await asyncio.to_thread(
            cls,
            card,
            tool_parser=tool_parser,
            reasoning_parser=reasoning_parser,
            special_tokens_in_text=special_tokens_in_text,
        )

    def _document_start(self, folder: Path) -> int:
        """The token that an empty prompt consists of: the model's first, or else one that ends."""
        config = json_object(folder / "tokenizer_config.json")
        token = config.get("bos_token")
        text = token.get("content") if isinstance(token, Mapping) else token
        start = self.tokenizer.token_to_id(text) if isinstance(text, str) else None
        if start is not None:
            return int(start)
        return self.eos_token_ids[0] if self.eos_token_ids else 0

    # --- prompts -------------------------------------------------------------------------------

    async def encode_conversation(self, conversation: Conversation) -> Prompt:
        """The prompt, and how its answer is guided and parsed.

        Raises InvalidRequest: no chat template, a template error, longer than the context.
        """
        template, param = self.chat_template, conversation.param
        if template is None:
            raise InvalidRequest(
                f"{self.card.name} has no chat template; use /v1/completions", param=param
            )
        num_chars = sum(len(message.get("content") or "") for message in conversation.messages)
        self._refuse_too_long(num_chars, param)

        if num_chars > self._thread_chars:
            text = await asyncio.to_thread(self._render, template, conversation)
        else:
            text = self._render(template, conversation)
        self._refuse_too_long(len(text), param)
        answer = plan_answer(conversation, self.answer_format, text[-PROMPT_END_CHARS:])
        # The template writes the special tokens itself.
        return Prompt(await self._encode_rendered(text), answer)

    async def _encode_rendered(self, text: str) -> list[int]:
        """Token ids of a rendered prompt, on a thread if many of them have to be computed."""
        if QUOTE_BEGIN in text:
            return await asyncio.to_thread(self._encode_quoted, text)
        pieces = self._segments.look_up(text)
        if pieces.num_missing_chars > self._thread_chars:
            return await asyncio.to_thread(self._segments.ids, pieces)
        return self._segments.ids(pieces)

    def _render(self, template: ChatTemplate, conversation: Conversation) -> str:
        messages = messages_for(conversation, self.answer_format)
        variables = dict(conversation.template_variables)
        if variables and not self._special_tokens_in_text:
            variables = self._quotes.quote_large(variables)
        if conversation.tools and self.answer_format.tools.template_knows_tools:
            variables["tools"] = conversation.callable_tools().derive(
                self._quotes, self._template_tools
            )
        if not self._special_tokens_in_text:
            messages = self._quotes.quote(messages)
        last = messages[-1]["content"] if conversation.continue_final_message else None
        text = template.render(
            messages,
            add_generation_prompt=conversation.add_generation_prompt and last is None,
            extra=variables,
        )
        if last is None:
            return text
        # The answer goes on where the last message ends, before what closes it.
        last = last.strip()
        return text[: text.rindex(last) + len(last)] if last in text else text

    def _template_tools(self, tools: ToolSet) -> list[dict[str, Any]] | None:
        """Tools as the template reads them; None: there are none."""
        described = template_tools(tools) or None
        return described if self._special_tokens_in_text else self._quotes.quote_large(described)

    async def encode_text(
        self, text: str, *, param: str = "prompt", add_special_tokens: bool = True
    ) -> list[int]:
        """Token ids, with the special tokens that the tokenizer adds by itself.

        Raises InvalidRequest for a text that is longer than the context.
        """
        self._refuse_too_long(len(text), param)
        if len(text) > self._thread_chars:
            return await asyncio.to_thread(
                self._encode, text, add_special_tokens=add_special_tokens
            )
        return self._encode(text, add_special_tokens=add_special_tokens)

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
                f"This model's maximum context length is {limit} tokens. The prompt has "
                f"{num_prompt_tokens} tokens, and at least one more must be generated. Shorten the "
                f"prompt, or raise `engine.max_model_len`",
                param=param,
                code="context_length_exceeded",
            )
        if requested is None:
            return room if default is None else min(default, room)
        if requested > room:
            raise InvalidRequest(
                f"This model's maximum context length is {limit} tokens. The prompt has "
                f"{num_prompt_tokens} tokens and {requested} more are requested, "
                f"{num_prompt_tokens + requested} in all. Shorten the prompt, request fewer tokens, "
                f"or raise `engine.max_model_len`",
                param=param,
                code="context_length_exceeded",
            )
        return requested

    def _encode_quoted(self, text: str) -> list[int]:
        """Token ids of a rendered prompt in which some special tokens are quoted as plain text."""
        plain = self._plain_tokenizer()
        ids: list[int] = []
        for piece, is_quoted in split_quoted(text):
            if is_quoted:
                ids += plain.encode(piece, add_special_tokens=False).ids
            else:
                ids += self._encode(piece, add_special_tokens=False)
        return ids

    def _plain_tokenizer(self) -> Tokenizer:
        """The tokenizer for text in which special tokens mean nothing. Made when first needed."""
        if self._plain is None:
            self._plain = Tokenizer.from_str(self.tokenizer.to_str())
            self._plain.encode_special_tokens = True
        return self._plain

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
                f"This model's maximum context length is {limit} tokens. The prompt has at least "
                f"{at_least} tokens ({num_chars} characters). Shorten the prompt, or raise "
                f"`engine.max_model_len`",
                param=param,
                code="context_length_exceeded",
            )
