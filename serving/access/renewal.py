"""Certificates that a server reads again when their files change, without a restart.

A renewed certificate counts for connections that are made after it; those that are open go on.
Files that cannot be used change nothing: the certificate that was read last stays, the reason is
logged once, and they are read again every second, because a chain and its key are written one after
the other.
"""

import logging
import ssl
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

import grpc

from serving.access.file_version import Version, version_of
from serving.access.tls import Certificate, ServerTls

LOOK_SECONDS = 1.0
"""Seconds from one look at the files to the next."""
T = TypeVar("T")

logger = logging.getLogger(__name__)


class Renewed(Generic[T]):
    """Holds what was read from files, and reads it again when they have changed. Thread-safe.

    Args:
        paths: The files.
        read: Reads them. Raises OSError or ValueError if they cannot be used: here as it is made,
            and later never.
    """

    def __init__(self, paths: Sequence[Path], read: Callable[[], T]) -> None:
        self._paths, self._read = paths, read
        self._lock = threading.Lock()
        self._seen = self._versions()
        self._error: str | None = None
        self.value = read()

    @property
    def reload_failed(self) -> bool:
        """True while an older certificate is in use, because the files cannot be used."""
        return self._error is not None

    def look(self) -> bool:
        """Reads the files if they have changed; returns True if there is a new value."""
        with self._lock:
            versions = self._versions()
            if versions == self._seen:
                self._error = None  # what could not be used was taken back
                return False
            try:
                value = self._read()
            except (OSError, ValueError) as error:
                if str(error) != self._error:
                    logger.error("the certificate read before stays in use: %s", error)
                self._error = str(error)
                return False
            if versions != self._versions():
                return False  # they are being written; the next look reads them as a whole
            self._seen, self._error, self.value = versions, None, value
            logger.info("read a new certificate from %s", self._paths[0])
            return True

    def follow(self) -> None:
        """Looks every second, in a thread that ends with the process."""

        def look() -> None:
            while True:
                time.sleep(LOOK_SECONDS)
                self.look()

        threading.Thread(target=look, name="certificates", daemon=True).start()

    def _versions(self) -> list[Version]:
        return [version_of(path) for path in self._paths]


class RenewedServerTls:
    """The certificate of a gRPC server and the authority of its clients, kept up to date.

    Args:
        tls: The files, which have been checked.
    """

    def __init__(self, tls: ServerTls) -> None:
        certificate, ca = tls.certificate, tls.client_ca
        self._requires_client = ca is not None
        self._given: grpc.ServerCertificateConfiguration | None = None

        def read() -> grpc.ServerCertificateConfiguration:
            ServerTls.of_flags(certificate.chain, certificate.key, ca)
            roots = ca.read_bytes() if ca else None
            return grpc.ssl_server_certificate_configuration([certificate.pair()], roots)

        files = [certificate.chain, certificate.key, *([ca] if ca else [])]
        self._renewed = Renewed(files, read)

    @property
    def reload_failed(self) -> bool:
        """True while an older certificate is in use, because the files cannot be used."""
        return self._renewed.reload_failed

    def credentials(self) -> grpc.ServerCredentials:
        """Returns credentials of gRPC's server that follow the files from now on."""
        self._given = self._renewed.value
        self._renewed.follow()
        return grpc.dynamic_ssl_server_credentials(
            self._given, self._changed, require_client_authentication=self._requires_client
        )

    def _changed(self) -> Any:
        """Returns a configuration that gRPC does not have yet; called before each handshake."""
        newest = self._renewed.value
        if newest is self._given:
            return None
        self._given = newest
        return newest


class RenewedContext:
    """The certificate of an HTTPS server, kept up to date.

    Args:
        certificate: The files, which have been checked.
    """

    def __init__(self, certificate: Certificate) -> None:
        def read() -> ssl.SSLContext:
            Certificate.of_flags("tls", certificate.chain, certificate.key)
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate.chain, certificate.key, password="")
            return context

        self._renewed = Renewed([certificate.chain, certificate.key], read)

    @property
    def reload_failed(self) -> bool:
        """True while an older certificate is in use, because the files cannot be used."""
        return self._renewed.reload_failed

    def attach(self, context: ssl.SSLContext) -> None:
        """Makes every handshake of a server's context show the newest certificate from now on."""

        def choose(connection: ssl.SSLObject, name: str | None, context: ssl.SSLContext) -> None:
            connection.context = self._renewed.value

        # OpenSSL calls it in every handshake, also where the client names no server.
        context.sni_callback = choose
        self._renewed.follow()
