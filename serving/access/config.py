"""The settings of one server that decide who may ask: keys, tokens and certificates.

The gateway and the service have a record each. Both are made from flags and from the secrets of the
environment (serving/flags.py), and refuse contradictions when they are made.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from serving.access.caller import DEFAULT, GATEWAY
from serving.access.credentials import Access
from serving.access.errors import AccessError
from serving.access.key_file import KeyFile
from serving.access.keyring import Keyring, check_key
from serving.access.loopback import is_loopback
from serving.access.renewal import RenewedServerTls
from serving.access.tls import Certificate, ServerTls

if TYPE_CHECKING:
    from serving.access.entra import TokenVerifier


@dataclass(frozen=True, kw_only=True)
class AccessConfig:
    """Says who may ask a server.

    Raises AccessError if the values contradict one another, open too much, or let nobody in.
    """

    host: str
    """Address that the server listens on."""
    api_key: str | None = field(repr=False)
    """Key of the caller "default"."""
    gateway_key: str | None = field(repr=False)
    """Key that the gateway presents to the service, as the caller "gateway"."""
    admits_gateway: bool
    """Accept `gateway_key` from callers; True in the service, False in the gateway."""
    keys: Path | None
    """File of more keys."""
    entra_tenant: tuple[str, ...]
    entra_allow: tuple[str, ...]
    entra_audience: tuple[str, ...]
    entra_role: tuple[str, ...]
    """Roles of which a token must have one; empty: it needs none."""
    entra_authority: str | None
    no_auth: bool
    """Let everybody in."""
    tls_cert: Path | None
    tls_key: Path | None
    tls_client_ca: Path | None = None

    def __post_init__(self) -> None:
        for variable, key in (
            ("MIXTRAL_JAX_API_KEY", self.api_key),
            ("MIXTRAL_JAX_SERVICE_KEY", self.gateway_key),
        ):
            if key is not None:
                check_key(key, variable)
        if self.admits_gateway and self.api_key and self.api_key == self.gateway_key:
            raise AccessError(
                "MIXTRAL_JAX_API_KEY and MIXTRAL_JAX_SERVICE_KEY are the same; the gateway's key "
                "says for whom it asks, so give it one that no caller has"
            )
        if self.no_auth:
            if self.keys or self.entra_tenant:
                raise AccessError(
                    "--no-auth lets everybody in; leave out --keys and --entra-tenant"
                )
            if not is_loopback(self.host):
                raise AccessError(
                    f"--no-auth would let everybody in who reaches {self.host}; leave it out, or "
                    "listen on a loopback address such as --host 127.0.0.1"
                )
        if not self.entra_tenant and (
            self.entra_allow or self.entra_audience or self.entra_role or self.entra_authority
        ):
            raise AccessError("--entra-allow, -audience, -role and -authority need --entra-tenant")
        if not (self.no_auth or self._fixed_keys or self.keys or self.entra_tenant):
            raise AccessError(
                "MIXTRAL_JAX_API_KEY is not set; it holds the key that clients must present. Set "
                "it, or give --keys, --entra-tenant or --no-auth"
            )

    def access(self) -> Access:
        """Reads the files and returns what lets callers in.

        Raises AccessError if a file or a tenant cannot be used.
        """
        tokens = self._verifier() if self.entra_tenant else None
        file = KeyFile(self.keys) if self.keys else None
        try:
            keyring = Keyring(self._fixed_keys, file)
        except FileNotFoundError:
            raise AccessError(
                f"--keys {self.keys}: no such file; `mixtral-jax keys add NAME --file "
                f"{self.keys}` makes it"
            ) from None
        except OSError as error:
            raise AccessError(f"--keys {self.keys}: {error.strerror}") from None
        return Access(keyring, tokens, is_open=self.no_auth)

    def certificate(self) -> Certificate | None:
        """Reads the certificate of the server; None without TLS. Raises AccessError."""
        return Certificate.of_flags("tls", self.tls_cert, self.tls_key)

    def server_tls(self) -> ServerTls | None:
        """Reads the certificate of a gRPC server and the authority of its clients."""
        return ServerTls.of_flags(self.tls_cert, self.tls_key, self.tls_client_ca)

    def renewed_tls(self) -> RenewedServerTls | None:
        """Reads the same, and follows the files while the server runs."""
        tls = self.server_tls()
        return None if tls is None else RenewedServerTls(tls)

    def key_for_service(self) -> str:
        """Returns the key that the gateway presents to the service.

        Raises AccessError if there is none, because the service believes no other key who asks.
        """
        if not self.gateway_key:
            raise AccessError(
                "MIXTRAL_JAX_SERVICE_KEY is not set; it holds the key that the gateway shows to "
                "the service, where the same must be set"
            )
        return self.gateway_key

    @property
    def _fixed_keys(self) -> dict[str, str]:
        """The keys of the environment that callers may present, by the names of the callers."""
        keys = {DEFAULT: self.api_key, GATEWAY: self.gateway_key if self.admits_gateway else None}
        return {name: key for name, key in keys.items() if key}

    def _verifier(self) -> "TokenVerifier":
        try:
            from serving.access import entra
        except ImportError:
            raise AccessError(
                "--entra-tenant needs PyJWT; run pip install 'mixtral-jax[entra]'"
            ) from None
        return entra.TokenVerifier(
            self.entra_tenant,
            audiences=self.entra_audience or entra.AUDIENCES,
            allowed=self.entra_allow,
            roles=self.entra_role,
            authority=self.entra_authority or entra.AUTHORITY,
        )
