"""Drawn pictures as files: what they say of themselves in every format, and how they are enlarged."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image

from model.config import SamplingConfig
from model.errors import UserError
from model.inference.files import SUFFIXES, check_side, enlarged, origin, save

DRAWN = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8))


def said_by(path: Path) -> dict[str, str]:
    """What a file says of itself, by the reader of its format."""
    with Image.open(path) as picture:
        if path.suffix == ".png":
            picture.load()
            return dict(picture.text)  # type: ignore[attr-defined]
        tags = picture.getexif()
        assert tags[ExifTags.Base.Software].startswith("latent-gpt ")
        # Pillow reads EXIF's text as Latin-1; programs take it for the UTF-8 that it is
        said: dict[str, str] = json.loads(tags[ExifTags.Base.ImageDescription].encode("latin-1"))
        return said


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize(
    "prompt", ['a "red" apple', "ein Käsebrot, 赤いりんご 🍎\nzwei", "\udcff not decoded", "x" * 1000]
)
def test_a_file_says_how_it_came_to_be(suffix: str, prompt: str, tmp_path: Path) -> None:
    path = tmp_path / f"a{suffix}"
    sampling = SamplingConfig(cfg_scale=2.5)
    save(enlarged(DRAWN, 40), path, origin("latent-gpt-x version 3", prompt, 7, sampling, 16, 40))
    said = said_by(path)
    assert said.pop("Software").startswith("latent-gpt ")
    assert SamplingConfig.model_validate_json(said.pop("Sampling")) == sampling
    assert said == {
        "Model": "latent-gpt-x version 3",
        "Prompt": prompt.replace("\udcff", r"\udcff"),
        "Seed": "7",
        "Drawn size": "16 px",
        "Processing": "upscaled from 16 px by lanczos",
    }
    with Image.open(path) as picture:
        assert picture.size == (40, 40)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_what_was_not_done_is_not_said(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"a{suffix}"
    save(DRAWN, path, origin("folder", None, 0, SamplingConfig(), 16, 16))
    assert not {"Prompt", "Processing"} & said_by(path).keys()
    with Image.open(path) as picture:
        assert picture.size == (16, 16)
        if suffix == ".png":
            assert picture.tobytes() == DRAWN.tobytes()


def test_the_same_picture_is_the_same_file(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save(DRAWN, tmp_path / f"{name}.png", origin("m", "p", 1, SamplingConfig(), 16, 16))
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_enlarging_keeps_what_is_there() -> None:
    plain = Image.new("RGB", (16, 16), (200, 30, 90))
    assert set(enlarged(plain, 50).get_flattened_data()) == {(200, 30, 90)}
    smooth = Image.linear_gradient("L").resize((16, 16), Image.Resampling.BOX).convert("RGB")
    back = np.asarray(enlarged(smooth, 64).reduce(4), float)
    assert np.abs(back - np.asarray(smooth, float)).max() < 4


def test_no_picture_is_made_smaller() -> None:
    check_side(32, 32)
    check_side(33, 32)
    with pytest.raises(UserError, match=r"--size 31 is less than the 32 px that this model draws"):
        check_side(31, 32)
