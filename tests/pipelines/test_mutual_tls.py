"""The certificate by which the parts of a SeaweedFS know each other, as files."""

from __future__ import annotations

import tomllib
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from pipelines.embedded import mutual_tls


def test_a_folder_holds_one_key_and_the_settings_that_ask_for_it(tmp_path: Path) -> None:
    mutual_tls.main(tmp_path)
    pem = (tmp_path / "tls.pem").read_bytes()
    shown = x509.load_pem_x509_certificate(pem)
    assert shown.public_key() == load_pem_private_key(pem, None).public_key()  # type: ignore[union-attr]
    settings = tomllib.loads((tmp_path / "security.toml").read_text())
    assert settings["grpc"]["ca"] == "tls.pem"
    for part in ("master", "volume", "filer", "s3"):
        assert settings["grpc"][part] == {"cert": "tls.pem", "key": "tls.pem"}
    assert {one.stat().st_mode & 0o777 for one in tmp_path.iterdir()} == {0o600}


def test_each_start_makes_another(tmp_path: Path) -> None:
    mutual_tls.main(tmp_path)
    before = (tmp_path / "tls.pem").read_text()
    mutual_tls.main(tmp_path)
    assert (tmp_path / "tls.pem").read_text() != before
