"""Emptiness is never a secret, whoever reads it."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from serving.deploy.security import secret_files
from serving.deploy.security.secret_files import (
    API_CERTIFICATE_FILE,
    API_KEYS_FILE,
    ETCD_SERVER_FILE,
    FILES,
    JOIN_FILE,
    ensure_named_secrets,
    ensure_secret,
    write_secret,
)


@pytest.fixture(autouse=True)
def deployment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("run/secrets").mkdir(parents=True)
    return tmp_path


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("left", [b"", b"\n", b"\0" * 43])
def test_secret_that_a_power_cut_emptied_is_made_anew(file: str, left: bytes) -> None:
    Path(file).write_bytes(left)
    secret = ensure_secret(file)
    assert len(secret) >= 32
    assert Path(file).read_text() == secret == ensure_secret(file)
    assert Path(file).stat().st_mode & 0o777 == 0o600


def test_programs_that_start_side_by_side_agree_on_the_new_secret() -> None:
    Path(API_KEYS_FILE).touch()
    with ThreadPoolExecutor(16) as threads:
        made = set(threads.map(ensure_secret, [API_KEYS_FILE] * 64))
    assert len(made) == 1


@pytest.mark.parametrize("file", [ETCD_SERVER_FILE, JOIN_FILE])
def test_empty_certificate_is_made_anew_with_those_that_belong_to_it(file: str) -> None:
    ensure_named_secrets(ETCD_SERVER_FILE)
    before = Path(ETCD_SERVER_FILE).read_text()
    Path(file).write_text("")
    ensure_named_secrets(ETCD_SERVER_FILE)
    assert "PRIVATE KEY" in Path(file).read_text()
    assert Path(ETCD_SERVER_FILE).read_text() != before


def test_empty_api_certificate_is_made_anew() -> None:
    Path(API_CERTIFICATE_FILE).write_text("")
    ensure_named_secrets(API_CERTIFICATE_FILE)
    assert "PRIVATE KEY" in Path(API_CERTIFICATE_FILE).read_text()


def test_nothing_is_refused_as_a_secret() -> None:
    with pytest.raises(ValueError, match="no secret"):
        write_secret(JOIN_FILE, " \n", anew=True)
    assert not Path(JOIN_FILE).exists()


def test_secret_is_on_the_disk_before_its_name_is(monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[bool] = []
    fsync = os.fsync

    def seen(descriptor: int) -> None:
        synced.append(Path(API_KEYS_FILE).exists())
        fsync(descriptor)

    monkeypatch.setattr(secret_files.os, "fsync", seen)
    ensure_secret(API_KEYS_FILE)
    assert synced == [False, True]  # the content, then the folder
