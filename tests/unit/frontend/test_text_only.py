"""What the service says of a model whose images and sound it left out."""

from __future__ import annotations

import json
from pathlib import Path

import orjson
from msgspec.structs import replace
from serving.config import Config, FrontendConfig
from serving.deploy.report.service_answers import ServiceAnswers
from serving.deploy.report.status import _service_lines
from serving.frontend.api.models import describe_model
from serving.protocol import TextOf
from unit.frontend.fakes import make_card
from unit.frontend.scripted_workers import ScriptedWorker, pipeline_over

TEXT = TextOf("Qwen3VLForConditionalGeneration", ["model.visual"])


def test_models_name_what_was_left_out(tmp_path: Path) -> None:
    card = make_card(tmp_path)
    assert "text_only" not in describe_model("m", card, 0)
    described = describe_model("m", replace(card, text_of=TEXT), 0)
    assert described["text_only"] == {
        "architecture": "Qwen3VLForConditionalGeneration",
        "left_out": ["model.visual"],
    }


async def test_readiness_names_what_was_left_out(tmp_path: Path) -> None:
    worker = ScriptedWorker(name="agg-0")
    async with pipeline_over(tmp_path) as connected:
        assert connected.pipeline.describe()["text_only"] is None
        info = await worker.start(tmp_path)
        await connected.add(replace(info, model=replace(info.model, text_of=TEXT)))
        shown = json.loads(orjson.dumps(connected.pipeline.describe()))["text_only"]
        assert shown == {
            "architecture": "Qwen3VLForConditionalGeneration",
            "left_out": ["model.visual"],
        }
        await worker.server.close()


def test_status_names_what_was_left_out() -> None:
    ready = {
        "ready": True,
        "model": "m",
        "text_only": {"architecture": "A", "left_out": ["b", "c"]},
    }
    lines = _service_lines(Config(), FrontendConfig(), ServiceAnswers(ready=ready))
    assert "          text only: the language model of A, without b, c" in lines
