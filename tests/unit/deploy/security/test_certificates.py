"""Certificates and secrets of a deployment."""

from __future__ import annotations

import contextlib
import ssl
from pathlib import Path

import pytest
from serving.config import FrontendConfig, parse
from serving.deploy.security import certificates
from serving.deploy.security.api_access import client_tls, url_scheme, with_certificate_files
from serving.deploy.security.secret_files import (
    API_CERTIFICATE_FILE,
    ETCD_SERVER_FILE,
    JOIN_FILE,
    ensure_named_secrets,
)
from serving.discovery.etcd import read_join_file
from serving.errors import ConfigError


def test_certificates_fit_each_other_and_nobody_elses(tmp_path: Path) -> None:
    made, other = certificates.make_etcd_certificates(), certificates.make_etcd_certificates()
    for name, text in (("join", made.join), ("server", made.server), ("other", other.join)):
        (tmp_path / f"{name}.pem").write_text(text)
    certificate, key, authority = read_join_file(str(tmp_path / "join.pem"))
    assert certificate.count(b"BEGIN CERTIFICATE") == authority.count(b"BEGIN CERTIFICATE") == 1
    assert key.startswith(b"-----BEGIN PRIVATE KEY-----")
    assert made.authority.encode() in authority

    def handshake(client_file: str) -> None:
        server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        server.load_cert_chain(tmp_path / "server.pem")
        server.load_verify_locations(cadata=made.authority)
        server.verify_mode = ssl.CERT_REQUIRED
        client = certificates.client_context(str(tmp_path / client_file))
        pipes = [ssl.MemoryBIO() for _ in range(4)]
        ends = [
            server.wrap_bio(pipes[0], pipes[1], server_side=True),
            client.wrap_bio(pipes[2], pipes[3]),
        ]
        for _ in range(6):
            for end in ends:
                with contextlib.suppress(ssl.SSLWantReadError):
                    end.do_handshake()
                pipes[2].write(pipes[1].read())
                pipes[0].write(pipes[3].read())
        assert ends[0].getpeercert()

    handshake("join.pem")
    with pytest.raises(ssl.SSLError):
        handshake("other.pem")


def test_certificates_are_made_once_and_only_for_this_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("run").mkdir()
    ensure_named_secrets(f"--cert-file={ETCD_SERVER_FILE}")
    first = Path(JOIN_FILE).read_text()
    ensure_named_secrets(f"--cert-file={ETCD_SERVER_FILE}")
    assert Path(JOIN_FILE).read_text() == first
    assert {path.stat().st_mode & 0o777 for path in Path("run/secrets").iterdir()} == {0o600}


def test_api_gets_a_certificate_for_where_it_listens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("run").mkdir()
    frontend = with_certificate_files(FrontendConfig(tls=True))
    settings = f"{frontend.tls_cert_file} {frontend.tls_key_file}"
    ensure_named_secrets(settings, "10.0.0.1")
    first = Path(API_CERTIFICATE_FILE).read_text()
    assert certificates.is_certificate_for(first, "10.0.0.1")
    assert certificates.is_certificate_for(first, "localhost")
    assert not certificates.is_certificate_for(first, "10.0.0.2")
    ensure_named_secrets(settings, "10.0.0.1")
    assert Path(API_CERTIFICATE_FILE).read_text() == first
    ensure_named_secrets(settings, "10.0.0.2")
    assert certificates.is_certificate_for(Path(API_CERTIFICATE_FILE).read_text(), "10.0.0.2")
    assert client_tls(frontend) is not None
    assert client_tls(FrontendConfig()) is None


def test_own_certificate_means_https_and_needs_its_key() -> None:
    given = {"tls_cert_file": "a.pem", "tls_key_file": "k.pem"}
    frontend = with_certificate_files(parse({"frontend": given}).frontend)
    assert frontend.tls
    assert url_scheme(frontend) == "https"
    with pytest.raises(ConfigError, match=r"frontend\.tls_key_file"):
        parse({"frontend": {"tls_cert_file": "a.pem"}})
