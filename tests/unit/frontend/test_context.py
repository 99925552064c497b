"""The context that a frontend offers is the one that each of its workers has."""

from __future__ import annotations

from pathlib import Path

from msgspec.structs import replace
from serving.frontend.model import ModelLoader
from serving.protocol import InstanceInfo
from unit.frontend.fakes import make_card, write_tokenizer
from unit.frontend.scripted_workers import ScriptedWorker, pipeline_over
from waiting import until


def with_context(info: InstanceInfo, max_model_len: int) -> InstanceInfo:
    return replace(info, model=replace(info.model, max_model_len=max_model_len))


async def test_least_context_of_the_workers_is_offered(tmp_path: Path) -> None:
    large, small = ScriptedWorker(name="agg-0"), ScriptedWorker(name="agg-1")
    async with pipeline_over(tmp_path) as connected:
        await connected.add(with_context(await large.start(tmp_path), 8192))
        card = connected.pipeline.card
        assert card is not None
        assert card.max_model_len == 8192
        await connected.add(with_context(await small.start(tmp_path), 2048))
        assert connected.pipeline.card == replace(card, max_model_len=2048)
        assert connected.pipeline.describe()["max_model_len"] == 2048
        await small.server.close()
        await until(lambda: connected.pipeline.card == card)
        await large.server.close()


async def test_another_context_keeps_the_tokenizer_that_is_loaded(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    loader, card = ModelLoader(), make_card(tmp_path, max_model_len=256)
    first = await loader.load(card)
    second = await loader.load(replace(card, max_model_len=64))
    assert second.card.max_model_len == second.preprocessor.card.max_model_len == 64
    assert second.preprocessor.tokenizer is first.preprocessor.tokenizer
    assert first.card.max_model_len == 256
