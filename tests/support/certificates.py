"""Certificates that an authority of a test signs, as files."""

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec


@dataclass(frozen=True)
class Files:
    cert: Path
    key: Path


class Authority:
    """Signs certificates, and writes them as files."""

    def __init__(self, folder: Path, name: str) -> None:
        self._folder = folder
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
        self.ca = folder / f"{name}.pem"
        self.ca.write_bytes(pem(self._sign(self._name, self._key, is_ca=True)))

    def issue(self, name: str) -> Files:
        """For 127.0.0.1 and that name."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
        files = Files(self._folder / f"{name}-cert.pem", self._folder / f"{name}-key.pem")
        files.cert.write_bytes(pem(self._sign(subject, key, is_ca=False)))
        files.key.write_bytes(private_pem(key))
        return files

    def _sign(
        self, subject: x509.Name, key: ec.EllipticCurvePrivateKey, *, is_ca: bool
    ) -> x509.Certificate:
        now = datetime.now(UTC)
        common = subject.get_attributes_for_oid(x509.NameOID.COMMON_NAME)[0].value
        names = [x509.IPAddress(ip_address("127.0.0.1")), x509.DNSName(str(common))]
        own, signer = (
            x509.SubjectKeyIdentifier.from_public_key(each.public_key())
            for each in (key, self._key)
        )
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(days=1))
            .not_valid_after(now + timedelta(days=1))
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
            .add_extension(x509.BasicConstraints(ca=is_ca, path_length=None), critical=True)
            # Newer Pythons are strict about what RFC 5280 asks for.
            .add_extension(own, critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(signer),
                critical=False,
            )
        )
        if is_ca:
            signs = {
                "digital_signature": False,
                "content_commitment": False,
                "key_encipherment": False,
                "data_encipherment": False,
                "key_agreement": False,
                "key_cert_sign": True,
                "crl_sign": True,
                "encipher_only": False,
                "decipher_only": False,
            }
            builder = builder.add_extension(x509.KeyUsage(**signs), critical=True)
        return builder.sign(self._key, hashes.SHA256())


def pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def private_pem(
    key: ec.EllipticCurvePrivateKey,
    encryption: serialization.KeySerializationEncryption | None = None,
) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        encryption or serialization.NoEncryption(),
    )
