"""Joining a head."""

from __future__ import annotations

from pathlib import Path

import pytest
from serving.config import parse
from serving.deploy.cluster.join import require_join_file
from serving.deploy.security import certificates
from serving.errors import ConfigError


def test_a_missing_or_damaged_join_file_is_an_error(tmp_path: Path) -> None:
    config = parse({"cluster": {"join_file": str(tmp_path / "join.pem")}})
    with pytest.raises(ConfigError, match="No such file") as caught:
        require_join_file(config)
    assert "scp HEAD:" in caught.value.remedy
    (tmp_path / "join.pem").write_text("-----BEGIN CERTIFICATE-----\n")
    with pytest.raises(ConfigError, match="is not a join file"):
        require_join_file(config)
    (tmp_path / "join.pem").write_text(certificates.make_etcd_certificates().join)
    assert require_join_file(config) == tmp_path / "join.pem"
