"""Keys and values in etcd, of which not all are ours."""

from __future__ import annotations

import logging

import msgspec
import pytest
from serving.discovery.records import Records
from serving.protocol import InstanceInfo, ModelCard

CARD = ModelCard("model", "dir", 128, 16, "salt", "fingerprint", 0)


@pytest.mark.parametrize("key", [b"/ns/instances/\xff\xfe", b"/ns/instances/other"])
def test_key_that_is_not_the_instances_own_is_ignored(
    key: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    records = Records("ns")
    info = InstanceInfo("a", 1, "decode", [], "", CARD, 10, 4, 1, "here")
    value = msgspec.json.encode(info)
    assert records.decode(b"/ns/instances/a", value) == info
    with caplog.at_level(logging.WARNING):
        assert records.decode(key, value) is None
    assert "it names a" in caplog.text
    assert isinstance(records.instance_id(key), str), "of a key that is deleted"
