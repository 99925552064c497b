"""The served model's tokenizer, loaded once, when the first worker has said where it is."""

from __future__ import annotations

import asyncio
from pathlib import Path

from msgspec import Struct

from serving.errors import NoInstances
from serving.grammar import Grammars
from serving.protocol import Guide, ModelCard
from serving.text.detokenize import TokenText
from serving.text.preprocess import Preprocessor


class LoadedModel(Struct, frozen=True):
    """What it takes to read requests for a model and to write its answers."""

    preprocessor: Preprocessor
    token_text: TokenText
    grammars: Grammars

    async def check_guide(self, guide: Guide, param: str) -> None:
        """On a thread. Raises InvalidRequest, which names `param`, when it does not compile."""
        await asyncio.to_thread(self.grammars.matcher, guide, param=param)

    @property
    def card(self) -> ModelCard:
        return self.preprocessor.card


class ModelLoader:
    """Holds the loaded model; another card (a new deployment of workers) replaces it."""

    def __init__(self) -> None:
        self._lock = asyncio.Lock()
        self._loaded: LoadedModel | None = None

    async def load(self, card: ModelCard | None) -> LoadedModel:
        """Raises NoInstances before there is a card; ModelError for an unusable tokenizer."""
        if card is None:
            raise NoInstances("No worker has registered yet")
        if (loaded := self._loaded) is not None and loaded.card == card:
            return loaded
        async with self._lock:
            if self._loaded is None or self._loaded.card != card:
                preprocessor = await Preprocessor.load(card)
                self._loaded = LoadedModel(
                    preprocessor,
                    TokenText(preprocessor.tokenizer),
                    Grammars(Path(card.tokenizer_dir)),
                )
            return self._loaded
