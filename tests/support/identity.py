"""A stand-in for Microsoft Entra ID: signs tokens, publishes its keys, hands tokens to clients.

DefaultAzureCredential asks the address in IDENTITY_ENDPOINT for a token, as on Azure's machines.
"""

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import jwt
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from tests.support.servers import Server

TENANT = "11111111-2222-3333-4444-555555555555"


@dataclass(frozen=True)
class Identity:
    """Where it is, and who gets its tokens."""

    url: str
    object_id: str

    @property
    def environment(self) -> dict[str, str]:
        """What makes DefaultAzureCredential ask here."""
        return {
            "IDENTITY_ENDPOINT": f"{self.url}/msi/token",
            "IDENTITY_HEADER": "not-a-secret",
            "AZURE_TOKEN_CREDENTIALS": "ManagedIdentityCredential",
        }


@contextmanager
def running_identity() -> Iterator[Identity]:
    """Runs it on 127.0.0.1 until the block ends."""
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    public = json.loads(jwt.algorithms.RSAAlgorithm.to_jwk(key.public_key()))
    keys = {"keys": [{**public, "kid": "first", "use": "sig"}]}
    object_id = "99999999-8888-7777-6666-555555555555"

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            address = urlsplit(self.path)
            root = f"http://127.0.0.1:{self.server.server_address[1]}"
            answer: dict[str, Any]
            if address.path.endswith("/.well-known/openid-configuration"):
                issuer = f"https://sts.windows.net/{TENANT}/"
                if "/v2.0/" in address.path:
                    issuer = f"https://login.microsoftonline.com/{TENANT}/v2.0"
                answer = {"issuer": issuer, "jwks_uri": f"{root}/{TENANT}/discovery/keys"}
            elif address.path.endswith("/keys"):
                answer = keys
            elif address.path == "/msi/token":
                assert self.headers["X-IDENTITY-HEADER"] == "not-a-secret"
                resource = parse_qs(address.query)["resource"][0]
                answer = self.token(resource)
            else:
                self.send_error(404)
                return
            body = json.dumps(answer).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def token(self, resource: str) -> dict[str, Any]:
            now = int(time.time())
            claims = {
                "aud": resource,
                "iss": f"https://sts.windows.net/{TENANT}/",
                "iat": now,
                "nbf": now,
                "exp": now + 3600,
                "oid": object_id,
                "appid": "aaaaaaaa-2222-3333-4444-555555555555",
                "idtyp": "app",
                "tid": TENANT,
                "ver": "1.0",
            }
            token = jwt.encode(claims, key, "RS256", {"kid": "first"})
            return {
                "access_token": token,
                "expires_on": str(now + 3600),
                "resource": resource,
                "token_type": "Bearer",
            }

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield Identity(f"http://127.0.0.1:{server.server_address[1]}", object_id)
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def surroundings(server: Server, pem: Path, identity: Identity, credential: str) -> dict[str, str]:
    """What Azure's clients find in their environment: where, whom to trust, and a key or none."""
    # They can be told of a certificate that nobody else vouches for in this way only.
    trusted = ("REQUESTS_CA_BUNDLE", "SSL_CERT_FILE", "NODE_EXTRA_CA_CERTS")
    place = {"AZURE_INFERENCE_ENDPOINT": server.url, **dict.fromkeys(trusted, str(pem))}
    if credential == "key":
        return {**place, "AZURE_INFERENCE_CREDENTIAL": server.key}
    return {**place, **identity.environment}


def certificate(folder: Path) -> Path:
    """A file with a new key and a certificate that it signed itself, for 127.0.0.1."""
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "mixtral-jax test")])
    now = datetime.now(UTC)
    signed = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(
            x509.SubjectAlternativeName(
                [x509.DNSName("localhost"), x509.IPAddress(ip_address("127.0.0.1"))]
            ),
            critical=False,
        )
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    path = folder / "server.pem"
    path.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        + signed.public_bytes(serialization.Encoding.PEM)
    )
    return path
