"""Makes helpers beside the tests importable, and runs asynchronous tests on the product's loop."""

import asyncio
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import uvloop

# Triton reads it when it is first imported, by whichever test that is.
if not any(Path(path).exists() for path in ("/proc/driver/nvidia", "/dev/nvidia0")):
    os.environ.setdefault("TRITON_INTERPRET", "1")

sys.path.insert(0, str(Path(__file__).parent))  # from integration.services import ...
pytest_plugins = ["pytester", "missing_tools"]


def pytest_asyncio_loop_factories(
    config: pytest.Config, item: pytest.Item
) -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    return {"uvloop": uvloop.new_event_loop}
