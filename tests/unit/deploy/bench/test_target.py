"""Finding the service to measure."""

from pathlib import Path

import pytest
from serving.deploy.bench.target import find_target
from serving.errors import OperatorError


def test_no_service_at_the_url_is_an_error() -> None:
    with pytest.raises(OperatorError, match="nothing serves at"):
        find_target("http://127.0.0.1:9", {}, Path("/t"))


def test_a_service_with_https_cannot_be_measured() -> None:
    with pytest.raises(OperatorError, match="uses HTTPS") as caught:
        find_target("https://127.0.0.1:9", {}, Path("/t"))
    assert "frontend.tls" in caught.value.remedy
