"""The flags and variables that say who may ask: the same for the gateway and for the service."""

import argparse
import ipaddress
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from serving.access.credentials import Access
from serving.access.keyring import DEFAULT, GATEWAY, KeyFile, Keyring, check_key
from serving.access.tls import Certificate, add_certificate_flags

if TYPE_CHECKING:
    from serving.access.entra import TokenVerifier

# What lists of processes must not show. The first is a client's, the second the gateway's own,
# which it shows to the service.
KEY_VARIABLE = "MIXTRAL_JAX_API_KEY"
SERVICE_KEY_VARIABLE = "MIXTRAL_JAX_SERVICE_KEY"
_VARIABLES = {DEFAULT: KEY_VARIABLE, GATEWAY: SERVICE_KEY_VARIABLE}


def add_access_flags(parser: argparse.ArgumentParser) -> None:
    """Adds them; `access_of` reads them."""
    parser.add_argument(
        "--keys", metavar="FILE", help="more keys, of `mixtral-jax keys`; followed as it changes"
    )
    parser.add_argument(
        "--entra-tenant",
        metavar="GUID",
        action="append",
        help="let tokens of this tenant of Microsoft Entra ID in; can be repeated",
    )
    parser.add_argument(
        "--entra-allow",
        metavar="ID",
        action="append",
        help="object id or client id that may ask, or * for the whole tenant; can be repeated; "
        "without it tokens open nothing",
    )
    parser.add_argument(
        "--entra-audience",
        metavar="URI",
        action="append",
        help="what tokens must be for (https://ml.azure.com, https://cognitiveservices.azure.com)",
    )
    parser.add_argument(
        "--entra-authority",
        metavar="URL",
        help="where tenants publish their keys (https://login.microsoftonline.com)",
    )
    parser.add_argument(
        "--no-auth", action="store_true", help="let everybody in; on a loopback --host only"
    )


def access_of(
    options: argparse.Namespace,
    environment: Mapping[str, str],
    callers: Sequence[str] = (DEFAULT,),
) -> Access:
    """Who may ask, by the flags, `options.host` among them, and by the keys of the environment.

    `callers` are those whose key may stand there: "default", and for the service "gateway".

    Raises ValueError if the flags contradict one another, name what cannot be used, or let nobody
    in.
    """
    keys = {name: key for name in callers if (key := _key_of(_VARIABLES[name], environment))}
    if options.no_auth:
        if options.keys or options.entra_tenant:
            raise ValueError("--no-auth lets everybody in; leave out --keys and --entra-tenant")
        if not is_loopback(options.host):
            raise ValueError(
                f"--no-auth would let everybody in who reaches {options.host}; leave it out, or "
                "listen on a loopback address such as --host 127.0.0.1"
            )
    tokens = _verifier(options)
    if not (options.no_auth or keys or options.keys or tokens):
        raise ValueError(
            f"{KEY_VARIABLE} is not set; it holds the key that clients must present. Set it, or "
            "give --keys, --entra-tenant or --no-auth"
        )
    file = KeyFile(Path(options.keys)) if options.keys else None
    try:
        keyring = Keyring(keys, file)
    except FileNotFoundError:
        raise ValueError(
            f"--keys {options.keys}: no such file; `mixtral-jax keys add NAME --file "
            f"{options.keys}` makes it"
        ) from None
    except OSError as error:
        raise ValueError(f"--keys {options.keys}: {error.strerror}") from None
    return Access(keyring, tokens, is_open=options.no_auth)


def check_flags(arguments: Sequence[str], environment: Mapping[str, str]) -> None:
    """Raises ValueError if a gateway given these could not start: none but `--host` and such flags.

    For who starts servers, and can tell sooner and in one line.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("--host")
    add_access_flags(parser)
    add_certificate_flags(parser)
    options = parser.parse_args(arguments)
    access_of(options, environment)
    Certificate.of_flags("tls", options.tls_cert, options.tls_key)


def service_key_of(options: argparse.Namespace, environment: Mapping[str, str]) -> str:
    """The key that the gateway shows to the service: its own, or else the clients'.

    Raises ValueError if there is none, and the service might want one.
    """
    key = _key_of(SERVICE_KEY_VARIABLE, environment) or _key_of(KEY_VARIABLE, environment)
    if not key and not options.no_auth:
        raise ValueError(
            f"{SERVICE_KEY_VARIABLE} is not set; it holds the key that the gateway shows to the "
            "service, where the same must be set"
        )
    return key or "none"  # to a service that lets everybody in


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches what listens there."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _key_of(variable: str, environment: Mapping[str, str]) -> str | None:
    key = environment.get(variable) or None
    try:
        if key:
            check_key(key)
    except ValueError as error:
        raise ValueError(f"{variable} cannot be used: {error}") from None
    return key


def _verifier(options: argparse.Namespace) -> "TokenVerifier | None":
    if not options.entra_tenant:
        if options.entra_allow or options.entra_audience or options.entra_authority:
            raise ValueError("--entra-allow, -audience and -authority need --entra-tenant")
        return None
    try:
        from serving.access import entra
    except ImportError:
        raise ValueError(
            "--entra-tenant needs PyJWT; run pip install 'mixtral-jax[entra]'"
        ) from None
    return entra.TokenVerifier(
        options.entra_tenant,
        audiences=options.entra_audience or entra.AUDIENCES,
        allowed=options.entra_allow or (),
        authority=options.entra_authority or entra.AUTHORITY,
    )
