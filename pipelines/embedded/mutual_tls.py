"""A certificate by which the parts of a SeaweedFS know each other, and refuse whoever has not got its key.

    python -m pipelines.embedded.mutual_tls FOLDER

leaves it there as `tls.pem`, with the `security.toml` that names it: so begins the SeaweedFS of a cluster.
"""

from __future__ import annotations

import datetime
import ipaddress
import os
import sys
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat


def certificate() -> str:
    """A key and the certificate that it has signed itself, as PEM. Who holds it shows it and accepts it."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "latent-gpt")])
    address = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(datetime.datetime(2000, 1, 1))  # a server may run for long, and clocks are set back
        .not_valid_after(datetime.datetime(9999, 1, 1))
        .add_extension(address, critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return (private + certificate.public_bytes(Encoding.PEM)).decode()


def settings(pem: str) -> str:
    """SeaweedFS's `security.toml`: every part shows this certificate and asks for it."""
    shown = f'cert = "{pem}"\nkey = "{pem}"\n'
    asked = f'ca = "{pem}"\n'
    sections = [f"[grpc]\n{asked}"]
    sections += [f"[grpc.{part}]\n{shown}" for part in ("master", "volume", "filer", "s3", "admin")]
    sections += [f"[grpc.{client}]\n{shown}" for client in ("client", "worker")]
    sections += [f"[https.{part}]\n{shown}{asked}" for part in ("master", "volume", "filer", "admin")]
    sections += [f"[https.client]\nenabled = true\n{shown}{asked}"]
    return "".join(sections)


def main(folder: Path) -> None:
    """Make a new one, for this user's eyes only."""
    os.umask(0o077)
    (folder / "tls.pem").write_text(certificate())
    (folder / "security.toml").write_text(settings("tls.pem"))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
