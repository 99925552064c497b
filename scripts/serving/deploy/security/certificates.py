"""Certificates for etcd off loopback, and for the API over HTTPS.

Each set comes from a private authority that signs its certificates at once; its key is then
forgotten. For etcd there are two: the server's, and one for nodes. The node's certificate, its key
and the authority's certificate are one file, `join.pem`; a node that has it can join. They contain
no addresses: the server is called `serving-etcd` wherever it is. The API's certificate contains its
address, for clients that check it.
"""

from __future__ import annotations

import datetime
import ipaddress
import re
import socket
import ssl
from collections.abc import Sequence

import psutil
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from msgspec import Struct

from serving.config.process import ETCD_SERVER_NAME

VALID = datetime.timedelta(days=3650)
CLOCK_SKEW = datetime.timedelta(days=1)
_USES = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH])


class EtcdCertificates(Struct, frozen=True):
    """PEM texts. `server` and `join` contain the key of their certificate."""

    authority: str
    server: str
    join: str


class ApiCertificate(Struct, frozen=True):
    """PEM texts. Clients trust `authority`; `server` has the API's certificate and its key."""

    authority: str
    server: str


class _Authority:
    """Signs certificates while it lives. Its key exists only in this object."""

    def __init__(self, name: str) -> None:
        self._name, self._key = _name(name), ec.generate_private_key(ec.SECP256R1())
        certificate = (
            _builder(self._name, self._name, self._key)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .sign(self._key, hashes.SHA256())
        )
        self.pem = _pem(certificate)

    def sign(self, common_name: str, names: Sequence[x509.GeneralName]) -> str:
        """A certificate and its key."""
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = (
            _builder(_name(common_name), self._name, key)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
            # Both, since etcd's gateway connects to etcd with the server's own.
            .add_extension(_USES, critical=False)
            .sign(self._key, hashes.SHA256())
        )
        return _pem(certificate) + key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        ).decode("ascii")


def make_etcd_certificates() -> EtcdCertificates:
    """A new authority, and the certificates of etcd and of nodes."""
    authority = _Authority("serving authority")
    server, node = (
        authority.sign(name, [x509.DNSName(name)]) for name in (ETCD_SERVER_NAME, "serving-node")
    )
    return EtcdCertificates(authority.pem, server, node + authority.pem)


def make_api_certificate(host: str) -> ApiCertificate:
    """A certificate for the API at `host`, also valid for clients on the same machine."""
    authority = _Authority("serving API authority")
    here = ["localhost", "127.0.0.1", socket.gethostname()]
    names = dict.fromkeys([*here, host, *(_every_address() if _is_wildcard(host) else [])])
    return ApiCertificate(authority.pem, authority.sign(host, [_general(n) for n in names]))


def is_certificate_for(pem: str, host: str) -> bool:
    """Whether the first certificate in `pem` is valid for `host`."""
    certificate = x509.load_pem_x509_certificate(pem.encode())
    found = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    return _general(host) in list(found.value)


def _general(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _is_wildcard(host: str) -> bool:
    return host in {"0.0.0.0", "::"}


def _every_address() -> list[str]:
    entries = (entry for each in psutil.net_if_addrs().values() for entry in each)
    families = (socket.AF_INET, socket.AF_INET6)
    return [e.address for e in entries if e.family in families and "%" not in e.address]


def client_context(join_file: str) -> ssl.SSLContext:
    """TLS to etcd. Raises OSError, ssl.SSLError."""
    context = ssl.create_default_context(cafile=join_file)
    context.check_hostname = False  # the authority signs nothing else
    context.load_cert_chain(join_file)
    return context


def is_join_file(text: str) -> bool:
    """Whether `text` has a certificate with its key, and the authority's certificate."""
    kinds = re.findall(r"^-----BEGIN ([A-Z ]+)-----$", text, re.MULTILINE)
    return kinds.count("CERTIFICATE") == 2 and kinds.count("PRIVATE KEY") == 1


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - CLOCK_SKEW)
        .not_valid_after(now + VALID)
    )


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _pem(certificate: x509.Certificate) -> str:
    return certificate.public_bytes(serialization.Encoding.PEM).decode("ascii")
