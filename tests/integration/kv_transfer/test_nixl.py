"""KV transfer over NIXL: the contract if it is installed, else the error that names the remedy."""

from __future__ import annotations

import pytest
from kv_contract import TransferContract
from kv_ends import Held, pulling, random_blocks, serving
from kv_peers import pull_all
from serving.errors import KvTransferFailed, OperatorError
from serving.kv_transfer.transports.nixl import NixlTransport, nixl_module

pytestmark = pytest.mark.integration

needs_nixl = pytest.mark.skipif(
    not nixl_module(), reason="NIXL is not installed; pip install nixl-cu13"
)


@needs_nixl
class TestNixl(TransferContract):
    name = "nixl"


async def test_nixl_that_is_missing_names_the_remedy_and_fails_pulls_only() -> None:
    missing = NixlTransport(module="")
    with pytest.raises(OperatorError, match="not installed") as refused:
        async with serving("nixl", Held(), transport=missing):
            pass
    assert "pip install nixl-cu13" in refused.value.remedy
    async with pulling("nixl", transport=missing) as end:
        with pytest.raises(KvTransferFailed, match="NIXL does not work here"):
            await pull_all(end, "nixl://127.0.0.1:1", "a", random_blocks(1))
