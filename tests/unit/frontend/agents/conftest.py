"""A pipeline whose model thinks and calls a tool."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer
from unit.frontend.agents.thinking_model import ANSWER
from unit.frontend.fakes import TOOL_TEMPLATE, FakePipeline, make_card, write_tokenizer


@pytest.fixture
def pipeline(tmp_path: Path) -> FakePipeline:
    folder = write_tokenizer(tmp_path / "tokenizer", TOOL_TEMPLATE)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    fake = FakePipeline(make_card(folder, max_model_len=4096), tokenizer)
    fake.say(ANSWER)
    return fake
