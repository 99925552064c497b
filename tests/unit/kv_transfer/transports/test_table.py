"""The table of transports and the configuration name the same ones."""

from __future__ import annotations

from typing import get_args, get_type_hints

import pytest
from serving.config import KvTransferConfig
from serving.kv_transfer.transports import TRANSPORTS


def test_every_transport_can_be_configured() -> None:
    assert set(get_args(get_type_hints(KvTransferConfig)["transport"])) == set(TRANSPORTS)


@pytest.mark.parametrize("name", TRANSPORTS)
def test_addresses_of_a_transport_begin_with_its_name(name: str) -> None:
    assert TRANSPORTS[name].scheme == name
