"""Certificates for etcd off loopback: a private authority that signs twice and is then forgotten.

The server shows one, and whoever has the other may speak to it. That other one, with its key and
the authority's certificate, is one file, `join.pem`: a node that has it can join. Names and
addresses are not in them: the server is called `serving-etcd` wherever it is.
"""

from __future__ import annotations

import datetime
import re
import ssl

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from msgspec import Struct

from serving.process_config import ETCD_SERVER_NAME

VALID = datetime.timedelta(days=3650)
CLOCK_SKEW = datetime.timedelta(days=1)
_USES = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH])


class Certificates(Struct, frozen=True):
    """PEM texts. `server` and `join` contain the key that belongs to them."""

    authority: str
    server: str
    join: str


def make() -> Certificates:
    """A new authority, and what it signs. Its own key exists in this call alone."""
    authority_key = ec.generate_private_key(ec.SECP256R1())
    name = _name("serving authority")
    authority = (
        _builder(name, name, authority_key)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(authority_key, hashes.SHA256())
    )

    def signed(common_name: str) -> str:
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = (
            _builder(_name(common_name), name, key)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(x509.SubjectAlternativeName([x509.DNSName(common_name)]), critical=False)
            # Both, since etcd's gateway connects to etcd with the server's own.
            .add_extension(_USES, critical=False)
            .sign(authority_key, hashes.SHA256())
        )
        return _pem(certificate) + key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        ).decode("ascii")

    trusted = _pem(authority)
    return Certificates(
        authority=trusted,
        server=signed(ETCD_SERVER_NAME),
        join=signed("serving-node") + trusted,
    )


def client_context(join_file: str) -> ssl.SSLContext:
    """For HTTPS to etcd. Raises OSError, ssl.SSLError."""
    context = ssl.create_default_context(cafile=join_file)
    context.check_hostname = False  # the authority vouches for nobody else
    context.load_cert_chain(join_file)
    return context


def is_join_file(text: str) -> bool:
    """Whether it has what a node needs: a certificate with its key, and the authority's."""
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
