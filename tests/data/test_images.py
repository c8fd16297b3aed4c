"""Pictures of strangers: every accepted mode has one result, everything else one reason."""

from __future__ import annotations

import contextlib
import io
import struct
import warnings
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo

from model.config import Augment, DataConfig, OpenMojiSource
from model.data import images
from model.data.images import (
    BadImage,
    augment,
    decode,
    draw_views,
    encode,
    is_jpeg,
    is_lossy,
    thumbnail,
    to_pixels,
    to_tensor,
    warp,
)


def config(**values) -> DataConfig:
    return DataConfig(source=OpenMojiSource(), **{"image_size": 32, **values})


def save(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def plain(mode: str, colour, size=(40, 32)) -> Image.Image:
    return Image.new(mode, size, colour)


def near(pixels: np.ndarray, colour, tolerance: int = 3) -> bool:
    return bool((np.abs(pixels.astype(int) - np.array(colour)) <= tolerance).all())


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_formats(kind):
    pixels = decode(save(plain("RGB", (200, 100, 50)), kind), config())
    assert pixels.shape == (32, 32, 3)
    assert pixels.dtype == np.uint8
    assert near(pixels, (200, 100, 50))


@pytest.mark.parametrize("kind", ["GIF", "BMP", "TIFF", "PPM"])
def test_other_formats_are_refused(kind):
    with pytest.raises(BadImage, match="not one of JPEG, PNG, WEBP"):
        decode(save(plain("RGB", (1, 2, 3)), kind), config())


def test_modes():
    assert near(decode(save(plain("L", 77)), config()), (77,) * 3)
    assert near(decode(save(plain("1", 1)), config()), (255,) * 3)
    assert near(decode(save(plain("I;16", 0x8012)), config()), (0x80,) * 3, 0)
    assert near(decode(save(plain("RGBA", (10, 20, 30, 0))), config(background=(0, 128, 255))), (0, 128, 255))
    assert near(decode(save(plain("RGBA", (0, 0, 0, 128))), config()), (127,) * 3)
    assert near(decode(save(plain("LA", (40, 0))), config()), (255,) * 3)
    cmyk = plain("CMYK", (0, 255, 255, 0))
    assert near(decode(save(cmyk, "JPEG"), config()), (255, 0, 0), 8)
    palette = plain("RGB", (12, 200, 90)).convert("P", palette=Image.Palette.ADAPTIVE)
    assert near(decode(save(palette), config()), (12, 200, 90))
    clear = palette.copy()
    clear.info["transparency"] = 0
    assert near(decode(save(clear, transparency=0), config()), (255,) * 3)


def test_exif_rotation_is_applied():
    image = Image.new("RGB", (64, 64), (255, 255, 255))
    image.paste((0, 0, 0), (0, 0, 64, 32))  # black on top
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera lay on its side: turn clockwise to see it upright, so top becomes right
    pixels = decode(save(image, "JPEG", exif=exif, quality=95), config())
    assert near(pixels[:, :12], (255,) * 3, 8)
    assert near(pixels[:, 20:], (0,) * 3, 8)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("value", range(2, 9))
def test_every_exif_orientation_is_made_upright(kind, value):
    upright = Image.fromarray(np.random.default_rng(value).integers(0, 256, (4, 6, 3), np.uint8)).resize(
        (96, 64)
    )
    exif = Image.Exif()
    exif[0x0112] = value
    turned = save(upright, kind, exif=exif, lossless=True, quality=95)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(turned)))
    expected.info.clear()
    assert near(decode(turned, config()), decode(save(expected), config()), 2)


EXIFS = {
    "garbage": b"Exif\0\0not a tiff at all",
    "empty": b"Exif\0\0",
    "cut off": b"Exif\0\0II*\0\x08\0\0\0\x05\0\x12\x01",
    "endless count": b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\xff\xff\xff\xff\x06\0\0\0\0\0\0\0",
    "orientation 9": b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x09\0\0\0\0\0\0\0",
    "orientation in words": b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x02\0\x02\0\0\0six\0\0\0\0\0",
}


@pytest.mark.parametrize("exif", EXIFS.values(), ids=EXIFS)
def test_damaged_exif_costs_no_picture(exif):
    data = save(plain("RGB", (200, 100, 50)), "JPEG")
    data = data[:2] + b"\xff\xe1" + (len(exif) + 2).to_bytes(2, "big") + exif + data[2:]
    assert near(decode(data, config()), (200, 100, 50))
    for kind in ("PNG", "WEBP"):
        assert near(decode(save(plain("RGB", (200, 100, 50)), kind, exif=exif), config()), (200, 100, 50))


def test_long_texts_of_a_png_cost_no_picture():
    notes = PngInfo()
    notes.add_text("workflow", "x" * (5 << 20), zip=True)
    notes.add_itxt("prompt", "é" * (5 << 20), zip=True)
    notes.add_text("plain", "x" * (2 << 20))
    assert near(decode(save(plain("RGB", (200, 100, 50)), pnginfo=notes), config()), (200, 100, 50))


def test_a_large_picture_converted_in_bands_is_the_same(monkeypatch):
    noise = np.random.default_rng(0).integers(0, 256, (90, 130, 4), dtype=np.uint8)
    modes = [Image.fromarray(noise).convert(mode) for mode in ("RGB", "RGBA", "L", "LA", "1", "P")]
    grey = Image.fromarray(noise[..., :2].copy().view(np.uint16)[..., 0])
    whole = [save(image) for image in (*modes, grey)] + [save(modes[0].convert("CMYK"), "JPEG")]
    expected = [decode(data, config()) for data in whole]
    monkeypatch.setattr("model.data.images.BAND", 500)
    assert all((decode(data, config()) == pixels).all() for data, pixels in zip(whole, expected, strict=True))


def test_crop_takes_the_centre_and_pad_keeps_all():
    image = Image.new("RGB", (96, 32), (0, 0, 255))
    image.paste((255, 0, 0), (32, 0, 64, 32))
    assert near(decode(save(image), config(fit="crop")), (255, 0, 0), 0)
    padded = decode(save(image), config(fit="pad", background=(9, 9, 9)))
    assert near(padded[:10], (9, 9, 9), 0)
    assert near(padded[-10:], (9, 9, 9), 0)
    assert near(padded[16, 0], (0, 0, 255))
    assert near(padded[16, 16], (255, 0, 0))


def test_very_long_picture_can_be_padded():
    assert decode(save(Image.new("RGB", (20, 3000))), config(fit="pad")).shape == (32, 32, 3)


def test_resize_is_antialiased_and_close_to_pillow():
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (200, 200, 3), dtype=np.uint8)
    pixels = decode(save(Image.fromarray(noise)), config())
    assert pixels.std() < 20  # a resize without antialiasing keeps the noise's 74
    reference = np.asarray(Image.fromarray(noise).resize((32, 32), Image.Resampling.BICUBIC))
    assert np.abs(pixels.astype(int) - reference).max() <= 1


def test_scaled_jpeg_decode_is_the_full_picture_reduced():
    ramp = np.linspace(0, 255, 1000)
    image = Image.fromarray(np.stack([np.tile(ramp, (800, 1))] * 3, -1).astype(np.uint8))
    data = save(image, "JPEG", quality=95)
    full = decode(save(image), config())
    assert np.abs(decode(data, config()).astype(int) - full).mean() < 1


def test_small_and_large():
    with pytest.raises(BadImage, match="40x15 pixels are below min_side 16"):
        decode(save(Image.new("RGB", (40, 15))), config())
    with pytest.raises(BadImage, match="exceed max_pixels 1000"):
        decode(save(Image.new("RGB", (40, 40))), config(max_pixels=1000))


def bomb(side: int = 12_000) -> bytes:
    """A PNG of side² grey pixels in some 17 KB."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    rows = zlib.compress(bytes((side // 8 + 1) * side), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@pytest.mark.parametrize("bombs_raise", [True, False])
def test_decompression_bomb_is_refused_from_its_header(bombs_raise):
    data = bomb()
    assert len(data) < 20_000
    with warnings.catch_warnings():
        warnings.simplefilter("error" if bombs_raise else "ignore", Image.DecompressionBombWarning)
        with pytest.raises(BadImage, match="pixels"):
            decode(data, config())


def test_parts_without_end_are_not_gone_through(monkeypatch):
    monkeypatch.setattr(images, "MOST_READS", 1000)
    red = plain("RGB", "red")
    for kind in ("PNG", "JPEG", "WEBP"):
        decode(save(red, kind), config())
    png, jpeg = save(red), save(red, "JPEG")
    text = b"\0\0\0\3tEXta\0b" + struct.pack(">I", zlib.crc32(b"tEXta\0b"))
    parts = b"\xff\xfe\0\2" * 1000
    for data in (png[:33] + text * 1000 + png[33:], jpeg[:2] + parts + jpeg[2:], jpeg[:-2] + parts):
        with pytest.raises(BadImage, match="it has parts without end"):
            decode(data, config())
        assert thumbnail(data, config()) == b""


@pytest.mark.parametrize(
    "before", [b"", b"\xff", b"\xff\xff", b"\xff\xd3", b"\xff\x01", b"\xff\x00\xff\xff", b"\xff\xe7\0\4xx"]
)
def test_scans_without_end_are_not_gone_through(monkeypatch, before):
    """Whatever stands before each of them."""
    monkeypatch.setattr(images, "MOST_SCANS", 15)
    whole = save(plain("RGB", "red"), "JPEG", progressive=True)
    scan = whole.rindex(b"\xff\xda")
    few, many = (whole[:scan] + (before + whole[scan:-2]) * count + whole[-2:] for count in (3, 15))
    assert whole.count(b"\xff\xda") + 2 < 15
    assert near(decode(few, config()), (254, 0, 0))
    with pytest.raises(BadImage, match="more than 15 scans"):
        decode(many, config())
    assert thumbnail(many, config()) == b""


@pytest.mark.parametrize("kind", ["baseline", "progressive"])
def test_scans_are_those_of_the_picture_and_not_of_what_is_put_behind_or_into_it(kind):
    """A video has such pairs of bytes, one of 65,536; a part has pictures of its own."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    whole = save(noise, "JPEG", progressive=kind == "progressive", quality=95)
    assert b"\xff\0" in whole
    scan = b"\xff\xda\0\x0c" + bytes(10)
    part = b"\xff\xe1" + (2 + 99 * len(scan)).to_bytes(2, "big") + scan * 99
    expected = decode(whole, config())
    for data in (whole + b"\0\x10ftypmp42" + scan * 99, whole[:2] + part + whole[2:], whole + part + whole):
        assert (decode(data, config()) == expected).all()
        assert thumbnail(data, config())


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_damage(kind):
    rng = np.random.default_rng(0)
    data = save(Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)), kind)
    for cut in (1, 10, len(data) // 2, len(data) - 30):
        with pytest.raises(BadImage):
            decode(data[:cut], config())
    with pytest.raises(BadImage, match="empty file"):
        decode(b"", config())


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_flipped_bytes_never_raise_anything_else(kind):
    rng = np.random.default_rng(1)
    data = save(Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)), kind)
    for _ in range(200):
        damaged = bytearray(data)
        for position in rng.integers(0, min(len(data), 400), 3):
            damaged[position] = rng.integers(0, 256)
        with contextlib.suppress(BadImage):
            assert decode(bytes(damaged), config()).shape == (32, 32, 3)


@pytest.mark.parametrize(
    ("kind", "mode", "settings", "lossy"),
    [
        ("JPEG", "RGB", {}, True),
        ("PNG", "RGB", {}, False),
        ("WEBP", "RGB", {}, True),
        ("WEBP", "RGB", {"exif": b"Exif\0\0" + bytes(8)}, True),
        ("WEBP", "RGB", {"lossless": True}, False),
        ("WEBP", "RGBA", {}, False),
    ],
)
def test_lossy_is_what_photographs_are_packed_as(kind, mode, settings, lossy):
    buffer = io.BytesIO()
    Image.new(mode, (8, 8), (200, 30, 30, 90)[: len(mode)]).save(buffer, kind, **settings)
    assert is_lossy(buffer.getvalue()) == lossy


def test_encode_keeps_lossless_exact_and_lossy_close():
    pixels = decode(save(plain("RGB", (200, 100, 50))), config())
    kind, data = encode(pixels, lossless=True)
    assert (kind, is_jpeg(data)) == ("png", False)
    assert (decode(data, config()) == pixels).all()
    kind, data = encode(pixels, lossless=False)
    assert (kind, is_jpeg(data)) == ("jpg", True)
    assert near(decode(data, config()), (200, 100, 50))


# ── tensors ─────────────────────────────────────────────────────────────────────────────────────────────


def test_tensor_and_pixels_are_inverse():
    pixels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).expand(2, 3, 16, 16)
    tensor = to_tensor(pixels)
    assert tensor.min() == -1
    assert tensor.max() == 1
    assert torch.equal(to_pixels(tensor), pixels)


def test_augment_off_is_the_identity():
    images = torch.rand(4, 3, 16, 16)
    assert augment(images, Augment(), torch.Generator()) is images


def test_augment_flips_half_exactly():
    images = torch.rand(64, 3, 8, 8)
    out = augment(images, Augment(flip=True), torch.Generator().manual_seed(0))
    flipped = (out == images.flip(-1)).flatten(1).all(1)
    kept = (out == images).flatten(1).all(1)
    assert (flipped ^ kept).all()
    assert 16 < flipped.sum() < 48


def test_whole_pixel_shift_moves_and_repeats_the_edge():
    images = torch.rand(1, 3, 8, 8)
    moved = warp(images, torch.tensor([[1.0, 1.0, 0.25, 0.0]]))
    assert torch.allclose(moved[..., :6], images[..., 2:], atol=1e-5)
    assert torch.allclose(moved[..., 6:], images[..., 7:].expand(1, 3, 8, 2), atol=1e-5)


def test_zoom_enlarges():
    images = torch.zeros(1, 3, 32, 32)
    images[..., 12:20, 12:20] = 1
    larger = warp(images, torch.tensor([[1.0, 1.5, 0.0, 0.0]]))
    assert larger.sum() / images.sum() == pytest.approx(2.25, rel=0.05)


def test_views_stay_in_their_range_and_follow_the_generator():
    wanted = Augment(flip=True, shift=0.1, scale=0.2)
    views = draw_views(1000, wanted, torch.Generator().manual_seed(3))
    assert set(views[:, 0].tolist()) == {-1.0, 1.0}
    assert 0.8 <= views[:, 1].min() < 0.82
    assert 1.18 < views[:, 1].max() <= 1.2
    assert views[:, 2:].abs().max() <= 0.1
    assert torch.equal(views, draw_views(1000, wanted, torch.Generator().manual_seed(3)))
