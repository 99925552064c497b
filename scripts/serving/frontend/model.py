"""The served model's tokenizer, loaded once the first worker has registered."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

from msgspec import Struct
from msgspec.structs import replace

from serving.config import FrontendConfig
from serving.errors import NoInstances
from serving.grammar.check import GuideChecker
from serving.protocol import Guide, ModelCard
from serving.text.preprocess import Preprocessor
from serving.text.token_text import TokenText

log = logging.getLogger(__name__)


class LoadedModel(Struct, frozen=True):
    """What the frontend needs to read requests for a model and to write its answers."""

    preprocessor: Preprocessor
    token_text: TokenText
    guide_checker: GuideChecker

    async def check_guide(self, guide: Guide, param: str) -> None:
        """Raises InvalidRequest for `param` if no engine can follow `guide`."""
        await self.guide_checker.check(guide, param)

    @property
    def card(self) -> ModelCard:
        return self.preprocessor.card


class ModelLoader:
    """Holds the loaded model. A different card, from newly deployed workers, replaces it."""

    def __init__(self, config: FrontendConfig | None = None) -> None:
        """`config` has the parsers of answers."""
        self._config = config or FrontendConfig()
        self._lock = asyncio.Lock()
        self._loaded: LoadedModel | None = None

    async def load(self, card: ModelCard | None) -> LoadedModel:
        """Raises NoInstances while there is no card, ModelError for an unusable tokenizer."""
        if card is None:
            raise NoInstances("No worker has registered yet")
        if (loaded := self._loaded) is not None and loaded.card == card:
            return loaded
        if loaded is not None and replace(loaded.card, max_model_len=card.max_model_len) == card:
            preprocessor = loaded.preprocessor.with_context(card.max_model_len)
            self._loaded = replace(loaded, preprocessor=preprocessor)
            return self._loaded
        async with self._lock:
            if self._loaded is None or self._loaded.card != card:
                await self._close_loaded()
                preprocessor = await Preprocessor.load(
                    card,
                    tool_parser=self._config.tool_parser,
                    reasoning_parser=self._config.reasoning_parser,
                    special_tokens_in_text=self._config.special_tokens_in_text,
                )
                found = preprocessor.answer_format.describe()
                log.info(
                    "%s: tool calls by %s (%s), reasoning by %s (%s)", card.name, *found.values()
                )
                self._loaded = LoadedModel(
                    preprocessor,
                    TokenText(preprocessor.tokenizer),
                    GuideChecker(
                        Path(card.tokenizer_dir),
                        max_bytes=self._config.guide_bytes,
                        cpu_s=self._config.guide_compile_s,
                    ),
                )
            return self._loaded

    async def close(self) -> None:
        """End the process that checks guides, if one was started."""
        async with self._lock:
            await self._close_loaded()

    async def _close_loaded(self) -> None:
        loaded, self._loaded = self._loaded, None
        if loaded is not None:
            await loaded.guide_checker.close()
