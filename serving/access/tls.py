"""Certificates for HTTPS and for both ends of gRPC, read from PEM files when a server starts.

A file that cannot be used is an AccessError that names its flag.
"""

import ssl
from dataclasses import dataclass
from pathlib import Path

import grpc

from serving.access.errors import AccessError


@dataclass(frozen=True)
class Certificate:
    """Files of a certificate chain and of its private key."""

    chain: Path
    key: Path

    @classmethod
    def of_flags(cls, prefix: str, chain: Path | None, key: Path | None) -> "Certificate | None":
        """Checks the files of `--PREFIX-cert` and `--PREFIX-key`; None without the two flags."""
        if chain is None and key is None:
            return None
        if chain is None or key is None:
            raise AccessError(f"--{prefix}-cert and --{prefix}-key need one another; give both")
        _read(chain, f"--{prefix}-cert")
        _read(key, f"--{prefix}-key")
        try:
            # Without a password OpenSSL would ask the terminal for that of an encrypted key.
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(chain, key, password="")
        except ssl.SSLError as error:
            why = "the two do not belong together" if "MISMATCH" in str(error.reason) else None
            raise AccessError(
                f"--{prefix}-cert {chain} and --{prefix}-key {key}: "
                f"{why or 'they are no certificate and key in PEM without a password'}"
            ) from None
        return cls(chain, key)

    def pair(self) -> tuple[bytes, bytes]:
        """Reads the key and the chain, as gRPC takes them."""
        return self.key.read_bytes(), self.chain.read_bytes()


@dataclass(frozen=True)
class ServerTls:
    """The certificate of a gRPC server and, with `client_ca`, the authority of its clients."""

    certificate: Certificate
    client_ca: Path | None = None

    @classmethod
    def of_flags(
        cls, chain: Path | None, key: Path | None, client_ca: Path | None
    ) -> "ServerTls | None":
        """Checks the files of `--tls-cert`, `-key` and `-client-ca`; None without them."""
        certificate = Certificate.of_flags("tls", chain, key)
        if certificate is None:
            if client_ca is not None:
                raise AccessError("--tls-client-ca needs --tls-cert and --tls-key")
            return None
        return cls(certificate, _authority(client_ca, "--tls-client-ca"))

    def credentials(self) -> grpc.ServerCredentials:
        """Reads the files as gRPC's server takes them."""
        roots = self.client_ca.read_bytes() if self.client_ca else None
        return grpc.ssl_server_credentials(
            [self.certificate.pair()], roots, require_client_auth=roots is not None
        )

    def client_credentials(self) -> grpc.ChannelCredentials:
        """Reads the files as a client of another process with certificates of that authority."""
        assert self.client_ca is not None
        key, chain = self.certificate.pair()
        return grpc.ssl_channel_credentials(self.client_ca.read_bytes(), key, chain)


@dataclass(frozen=True)
class ServiceTls:
    """The authority that a client of a service trusts, and the client's own certificate.

    `name` is the one in the service's certificate, if that is not its address.
    """

    ca: Path
    certificate: Certificate | None = None
    name: str | None = None

    @classmethod
    def of_flags(
        cls, ca: Path | None, chain: Path | None, key: Path | None, name: str | None
    ) -> "ServiceTls | None":
        """Checks the files of `--service-ca`, `-cert` and `-key`; None without them."""
        certificate = Certificate.of_flags("service", chain, key)
        path = _authority(ca, "--service-ca")
        if path is None:
            if certificate is not None or name is not None:
                raise AccessError("--service-cert and --service-name need --service-ca")
            return None
        return cls(path, certificate, name)

    def credentials(self) -> grpc.ChannelCredentials:
        """Reads the files as gRPC's client takes them."""
        key, chain = self.certificate.pair() if self.certificate else (None, None)
        return grpc.ssl_channel_credentials(self.ca.read_bytes(), key, chain)

    @property
    def files(self) -> list[Path]:
        """The files that are read."""
        own = [self.certificate.chain, self.certificate.key] if self.certificate else []
        return [self.ca, *own]

    def checked_credentials(self) -> grpc.ChannelCredentials:
        """Reads the files again, which may have changed. Raises AccessError or OSError."""
        chain, key = (
            (self.certificate.chain, self.certificate.key) if self.certificate else (None, None)
        )
        ServiceTls.of_flags(self.ca, chain, key, self.name)
        return self.credentials()

    def options(self) -> list[tuple[str, str]]:
        """Returns options of the channel."""
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
