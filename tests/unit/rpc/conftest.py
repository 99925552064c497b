"""The rig of the direct connection's tests."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from unit.rpc.rpc_rig import RpcRig, running_rig


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[RpcRig]:
    async with running_rig(tmp_path) as rig:
        yield rig
