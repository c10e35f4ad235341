"""Certificates from files: of the gateway before its clients, and of both ends of gRPC.

Files are PEM, and are read when a server starts. Whatever is wrong with one is an AccessError that
names its flag.
"""

import ssl
from dataclasses import dataclass
from pathlib import Path

import grpc

from serving.access.errors import AccessError


@dataclass(frozen=True)
class Certificate:
    """A certificate, with those that vouch for it after it, and its private key."""

    chain: Path
    key: Path

    @classmethod
    def of_flags(cls, prefix: str, chain: Path | None, key: Path | None) -> "Certificate | None":
        """What `--PREFIX-cert` and `--PREFIX-key` name, checked; None without them."""
        if chain is None and key is None:
            return None
        if chain is None or key is None:
            raise AccessError(f"--{prefix}-cert and --{prefix}-key need one another; give both")
        one = cls(chain, key)
        _read(one.chain, f"--{prefix}-cert")
        _read(one.key, f"--{prefix}-key")
        try:
            # A key that is encrypted would have OpenSSL ask the terminal.
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(chain, key, password="")
        except ssl.SSLError as error:
            why = "the two do not belong together" if "MISMATCH" in str(error.reason) else None
            raise AccessError(
                f"--{prefix}-cert {chain} and --{prefix}-key {key}: "
                f"{why or 'they are no certificate and key in PEM without a password'}"
            ) from None
        return one

    def pair(self) -> tuple[bytes, bytes]:
        """Key and chain, as gRPC takes them."""
        return self.key.read_bytes(), self.chain.read_bytes()


@dataclass(frozen=True)
class ServerTls:
    """How a gRPC service shows who it is and, with `client_ca`, whom it wants to see."""

    certificate: Certificate
    client_ca: Path | None = None

    @classmethod
    def of_flags(
        cls, chain: Path | None, key: Path | None, client_ca: Path | None
    ) -> "ServerTls | None":
        """What `--tls-cert`, `--tls-key` and `--tls-client-ca` name; None without them."""
        certificate = Certificate.of_flags("tls", chain, key)
        if certificate is None:
            if client_ca is not None:
                raise AccessError("--tls-client-ca needs --tls-cert and --tls-key")
            return None
        return cls(certificate, _authority(client_ca, "--tls-client-ca"))

    def credentials(self) -> grpc.ServerCredentials:
        roots = self.client_ca.read_bytes() if self.client_ca else None
        return grpc.ssl_server_credentials(
            [self.certificate.pair()], roots, require_client_auth=roots is not None
        )


@dataclass(frozen=True)
class ServiceTls:
    """How a service is known, and how its client is known to it.

    `name` is the one in the service's certificate, where that is not its address.
    """

    ca: Path
    certificate: Certificate | None = None
    name: str | None = None

    @classmethod
    def of_flags(
        cls, ca: Path | None, chain: Path | None, key: Path | None, name: str | None
    ) -> "ServiceTls | None":
        """What `--service-ca`, `-cert`, `-key` and `-name` say; None without them."""
        certificate = Certificate.of_flags("service", chain, key)
        path = _authority(ca, "--service-ca")
        if path is None:
            if certificate is not None or name is not None:
                raise AccessError("--service-cert and --service-name need --service-ca")
            return None
        return cls(path, certificate, name)

    def credentials(self) -> grpc.ChannelCredentials:
        key, chain = self.certificate.pair() if self.certificate else (None, None)
        return grpc.ssl_channel_credentials(self.ca.read_bytes(), key, chain)

    def options(self) -> list[tuple[str, str]]:
        """Options for the channel."""
        return [("grpc.ssl_target_name_override", self.name)] if self.name else []


def _authority(file: Path | None, flag: str) -> Path | None:
    if file is None:
        return None
    _read(file, flag)
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(file)
    except ssl.SSLError:
        raise AccessError(f"{flag} {file}: no certificate in PEM") from None
    return file


def _read(path: Path, flag: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise AccessError(f"{flag} {path}: {error.strerror}") from None
