"""Test code. What an LLM holds, for tests in another process: `STANDIN_TRTLLM_BOOKS` names a folder.

While it is set, each LLM keeps `PID.json` there up to date, ten times a second, until it is shut
down. `written` is a Unix time: what was so before then may have been different.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

PATH = os.environ.get("STANDIN_TRTLLM_BOOKS", "")
_EVERY_S = 0.1


async def keep(look: Callable[[], dict[str, Any]]) -> None:
    """Write what `look` returns, again and again. Ends by being cancelled."""
    path = _file()
    temporary = path.with_suffix(".tmp")
    while True:
        temporary.write_text(json.dumps(look() | {"written": time.time()}))
        temporary.replace(path)
        await asyncio.sleep(_EVERY_S)


def _file() -> Path:
    folder = Path(PATH)
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{os.getpid()}.json"
