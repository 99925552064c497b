"""The models that a frontend serves, and which of them a request is for.

Each model has a router, connections, tokenizer, metrics and limits of its own, so the models of one
frontend share nothing that could make one wait for another. A deployment of one model has one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from msgspec import Struct, field

from serving.errors import InvalidRequest, ModelNotFound
from serving.frontend.http.limits import InFlight
from serving.frontend.metrics.pages import join_labelled, label
from serving.frontend.metrics.registry import Metrics
from serving.frontend.model import LoadedModel, ModelLoader
from serving.frontend.pipeline import Pipeline
from serving.protocol import ModelCard


class ServedModel(Struct, frozen=True, kw_only=True):
    """One model: its names, and the parts that serve its requests."""

    name: str
    aliases: tuple[str, ...] = ()
    pipeline: Pipeline
    metrics: Metrics
    in_flight: InFlight
    loader: ModelLoader = field(default_factory=ModelLoader)

    @property
    def names(self) -> tuple[str, ...]:
        """Names that requests may use for the model."""
        return (self.name, *self.aliases)

    @property
    def card(self) -> ModelCard | None:
        """None until a worker has registered."""
        return self.pipeline.card

    async def load(self) -> LoadedModel:
        """Raises NoInstances until a worker has registered, ModelError for an unusable tokenizer."""
        return await self.loader.load(self.card)

    async def ready(self) -> tuple[bool, str, dict[str, str]]:
        """Whether a request could be served now, or the reason why not; how answers are read.

        Ready means that the first request will not wait for the tokenizer.
        """
        is_ready, reason = self.pipeline.ready()
        if not is_ready:
            return False, reason, {}
        loaded = await self.load()
        return True, "", loaded.preprocessor.answer_format.describe()


class ServedModels:
    """All models of this frontend, in the order of the configuration; at least one."""

    def __init__(self, models: Sequence[ServedModel], metrics: Metrics | None = None) -> None:
        """`metrics` count what belongs to no model. Default: the metrics of the only model."""
        self._models = tuple(models)
        self._by_name = {name: model for model in self._models for name in model.names}
        self.metrics = metrics or self._models[0].metrics

    def __iter__(self) -> Iterator[ServedModel]:
        return iter(self._models)

    @property
    def only(self) -> ServedModel | None:
        """The model, if there is one alone."""
        return self._models[0] if len(self._models) == 1 else None

    @property
    def title(self) -> str:
        """The names of all models, for people and for the log."""
        return ",".join(model.name for model in self._models)

    def find(self, requested: str) -> ServedModel:
        """The model of this name or alias. Raises ModelNotFound."""
        model = self._by_name.get(requested)
        if model is None:
            served = [f"`{model.name}`" for model in self._models]
            raise ModelNotFound(
                f"The model `{requested[:200]}` is not served here; "
                f"{' and '.join(served)} {'is' if len(served) == 1 else 'are'}",
                param="model",
                code="model_not_found",
            )
        return model

    def find_or_only(self, requested: str | None) -> ServedModel:
        """For requests that may leave the model out. Raises ModelNotFound, InvalidRequest."""
        if requested is not None:
            return self.find(requested)
        if self.only is None:
            raise InvalidRequest(
                "Several models are served here: say which one in `model`; `/v1/models` lists them",
                param="model",
            )
        return self.only

    def check_room(self) -> None:
        """Raises TooManyInFlight while no model takes another request. Called before the body is
        read, which names the model."""
        if self.only is not None:
            self.only.in_flight.check_room(1)
        elif not any(model.in_flight.has_room(1) for model in self._models):
            self._models[0].in_flight.check_room(1)

    def num_in_flight(self) -> int:
        return sum(model.in_flight.count for model in self._models)

    def metrics_page(self) -> bytes:
        """All metrics in Prometheus' text format. With several models, samples name theirs."""
        if self.only is not None:
            return self.metrics.render()
        pages = [("", self.metrics.render())]
        pages += [(label("model", model.name), model.metrics.render()) for model in self._models]
        return join_labelled(pages)

    async def close(self) -> None:
        """End the processes of loaded models."""
        for model in self._models:
            await model.loader.close()
