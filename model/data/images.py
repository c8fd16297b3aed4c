"""Pictures of strangers made into pixels: what is accepted, how each mode is converted, how it is resized.

The specification, because other pixels give other codes:

1. JPEG, PNG and WEBP only, at most `max_pixels`, both read from the header before anything is decoded.
2. Fully decoded; a truncated file is bad. Of an animation the first frame. A JPEG whose sides are both at
   least four times the wanted size is decoded at the DCT scale (1/2, 1/4, 1/8) that leaves at least twice
   the wanted size, which the next reduction cannot tell from the full picture.
3. EXIF orientation applied where it can be read. Transparency over `background`; CMYK as Pillow converts it;
   of 16-bit samples the high byte; colour profiles ignored.
4. `fit: crop` cuts the centre square (offset rounded down), `pad` keeps all; then one antialiased bicubic
   reduction in 8-bit integers (torch's, equal to Pillow's within rounding, at three times its speed).
"""

from __future__ import annotations

import io
import re
import warnings
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, PngImagePlugin

from model.config import Augment, DataConfig

FORMATS = ("JPEG", "PNG", "WEBP")
ORIENTATION = 0x0112  # EXIF's tag
TURNS: dict[Any, Callable[[np.ndarray], np.ndarray]] = {  # that make pictures of its values upright
    2: lambda pixels: pixels[:, ::-1],
    3: lambda pixels: pixels[::-1, ::-1],
    4: lambda pixels: pixels[::-1],
    5: lambda pixels: pixels.swapaxes(0, 1),
    6: lambda pixels: np.rot90(pixels, 3),
    7: lambda pixels: pixels[::-1, ::-1].swapaxes(0, 1),
    8: lambda pixels: np.rot90(pixels),
}
THUMBNAIL = 64  # longer side of a small picture for people, pixels
MOST_READS = 1 << 18  # of a picture's file by its parser; of the largest that are read some 100,000
MOST_SCANS = 64  # of a JPEG; each goes over all pixels, and programs write ten
# Where libjpeg looks for parts of a JPEG it passes over all bytes but these: its end, and what has a length.
MARKER = re.compile(rb"\xff[\xc0-\xcf\xd9-\xfe]")
BAND = 1 << 22  # pixels converted at a time: of a large picture, no second copy in another mode is held

# Drawing programs store whole workflows as text; 64 MiB of it, Pillow's own limit for all, is no damage.
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY
warnings.filterwarnings("error", category=Image.DecompressionBombWarning)


class BadImage(Exception):
    """A picture that cannot be used; its message is the reason, for the quarantine list."""


class _Bytes(io.BytesIO):
    """A picture's bytes, for which a parser may ask so many times: some lead it on and on, part by part."""

    asked = 0

    def read(self, size: int | None = -1) -> bytes:
        self.asked += 1
        if self.asked > MOST_READS:
            raise ValueError("it has parts without end")
        return super().read(size)


# ── bytes to pixels ─────────────────────────────────────────────────────────────────────────────────────


def decode(data: bytes, config: DataConfig) -> np.ndarray:
    """Judge, decode and normalise one picture: uint8 (image_size, image_size, 3), RGB.

    Raises:
        BadImage: with the reason.
    """
    if not data:
        raise BadImage("empty file")
    try:
        image = _opened(data)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise BadImage(str(error)) from None
    except Image.UnidentifiedImageError:
        raise BadImage(f"not one of {', '.join(FORMATS)}") from None
    except Exception as error:  # whatever a parser throws at a stranger's header
        raise BadImage(f"broken header: {_first_line(error)}") from None
    with image:
        width, height = image.size
        if width * height > config.max_pixels:
            raise BadImage(f"{width}x{height} pixels exceed max_pixels {config.max_pixels}")
        if min(width, height) < config.min_side:
            raise BadImage(f"{width}x{height} pixels are below min_side {config.min_side}")
        try:
            if image.format == "JPEG":
                image.draft(None, (2 * config.image_size, 2 * config.image_size))
            image.load()
            pixels = _to_rgb(image, config.background)
            turn = _turn(image)
        except Exception as error:  # whatever a decoder throws at a stranger's data
            raise BadImage(f"truncated or corrupt: {_first_line(error)}") from None
    del image  # large, and done with
    return _resize(turn(pixels) if turn else pixels, config)


def _opened(data: bytes) -> Image.Image:
    """A picture of a stranger, of which the header is read. Raises ValueError, and whatever Pillow does."""
    if is_jpeg(data):
        _count_scans(data)
    return Image.open(_Bytes(data), formats=FORMATS)


def _count_scans(data: bytes) -> None:
    """Raises ValueError: a JPEG has more scans or parts before its end than are gone through.

    Scans of what is embedded in its parts do not count, nor what follows: phones put a video there.
    """
    scans, at = 0, 2
    for _ in range(MOST_READS):
        found = MARKER.search(data, at)
        if not found or found[0] == b"\xff\xd9":
            return
        scans += found[0] == b"\xff\xda"
        if scans > MOST_SCANS:
            raise ValueError(f"more than {MOST_SCANS} scans")
        at = found.end() + max(2, int.from_bytes(data[found.end() : found.end() + 2], "big"))
    raise ValueError("it has parts without end")


def _turn(image: Image.Image) -> Callable[[np.ndarray], np.ndarray] | None:
    try:
        return TURNS.get(image.getexif().get(ORIENTATION))
    except Exception:  # whatever a parser throws at a damaged block; the pixels are whole
        return None


def _to_rgb(image: Image.Image, background: tuple[int, int, int]) -> np.ndarray:
    width, height = image.size
    pixels = np.empty((height, width, 3), dtype=np.uint8)
    rows = max(1, BAND // width)
    for top in range(0, height, rows):
        part = image if rows >= height else image.crop((0, top, width, min(top + rows, height)))
        pixels[top : top + rows] = _band_to_rgb(part, background)
    return pixels


def _band_to_rgb(image: Image.Image, background: tuple[int, int, int]) -> np.ndarray:
    if image.mode in ("I;16", "I;16B", "I;16L", "I"):
        return (np.asarray(image).astype(np.uint32) >> 8).clip(0, 255)[..., None]
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (*background, 255)), image)
    return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))  # convert always copies


def _resize(pixels: np.ndarray, config: DataConfig) -> np.ndarray:
    size = config.image_size
    height, width, _ = pixels.shape
    if config.fit == "crop":
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        return _scale(pixels[top : top + side, left : left + side], size, size)
    longest = max(height, width)
    new_height, new_width = (max(1, round(side * size / longest)) for side in (height, width))
    canvas = np.empty((size, size, 3), dtype=np.uint8)
    canvas[:] = config.background
    top, left = (size - new_height) // 2, (size - new_width) // 2
    canvas[top : top + new_height, left : left + new_width] = _scale(pixels, new_height, new_width)
    return canvas


def _scale(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    pixels = np.ascontiguousarray(pixels)
    if pixels.shape[:2] == (height, width):
        return pixels
    tensor = torch.from_numpy(pixels)[None].permute(
        0, 3, 1, 2
    )  # channels last, and seen to be: the quick path
    scaled = F.interpolate(tensor, size=(height, width), mode="bicubic", antialias=True)
    return scaled[0].permute(1, 2, 0).contiguous().numpy()


def encode(pixels: np.ndarray, lossless: bool) -> tuple[str, bytes]:
    """Pixels for a shard: ("png", bytes), or ("jpg", bytes) for what was lossy (quality 95, 4:4:4)."""
    buffer = io.BytesIO()
    if lossless:
        # Runs alone are sought for: on photographs, drawings and shapes faster than matches, and no larger.
        Image.fromarray(pixels).save(buffer, "PNG", compress_level=3, compress_type=zlib.Z_RLE)
        return "png", buffer.getvalue()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=95, subsampling=0)
    return "jpg", buffer.getvalue()


def is_jpeg(data: bytes) -> bool:
    """Whether bytes begin as a JPEG does."""
    return data[:3] == b"\xff\xd8\xff"


def is_lossy(data: bytes) -> bool:
    """Whether a picture is packed as photographs are: JPEG, or WEBP that is neither exact nor transparent."""
    return is_jpeg(data) or (data[8:12] == b"WEBP" and b"VP8 " in data and b"ALPH" not in data)


def dimensions(data: bytes) -> tuple[int, int]:
    """Width and height of a picture that `decode` takes, as its file says them, pixels."""
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        return image.size


def thumbnail(data: bytes, config: DataConfig) -> bytes:
    """A small JPEG of a picture that cannot be used, for people; empty where nothing can be seen of it."""
    if is_jpeg(data):
        data += b"\xff\xd9"  # an end: what precedes the break can be seen then
    try:
        with _opened(data) as image:
            if image.width * image.height > config.max_pixels:  # a progressive JPEG is held whole
                return b""
            if image.format == "JPEG":
                image.draft(None, (THUMBNAIL, THUMBNAIL))
            pixels = _to_rgb(image, config.background)
    except Exception:  # whatever a parser or decoder throws at what was refused already
        return b""
    small = Image.fromarray(pixels if pixels.shape[2] == 3 else pixels.repeat(3, axis=2))
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=70)
    return buffer.getvalue()


def _first_line(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0]


# ── pixels to what nets see ─────────────────────────────────────────────────────────────────────────────


def to_tensor(images: torch.Tensor) -> torch.Tensor:
    """uint8 (B, 3, H, W), 0…255, to float (B, 3, H, W), -1…1."""
    return images.float().div_(127.5).sub_(1)


def to_pixels(images: torch.Tensor) -> torch.Tensor:
    """float (…, H, W), -1…1 and cut there, to uint8: the inverse of `to_tensor`."""
    return images.float().clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8)


def to_image(image: torch.Tensor) -> Image.Image:
    """One picture, float (3, H, W) in -1…1, for a file or a person."""
    return Image.fromarray(to_pixels(image).permute(1, 2, 0).cpu().numpy())


def draw_views(count: int, config: Augment, generator: torch.Generator) -> torch.Tensor:
    """The chances of `count` random views, float (count, 4): flip (±1), zoom, shift x, shift y (shares)."""
    chance = torch.rand(count, 4, generator=generator, device=generator.device)
    flip = torch.where(chance[:, 0] < 0.5, -1.0, 1.0) if config.flip else torch.ones(count)
    zoom = 1 + (2 * chance[:, 1] - 1) * config.scale
    shift = (2 * chance[:, 2:] - 1) * config.shift
    return torch.cat([flip.to(chance)[:, None], zoom[:, None], shift], dim=1)


def warp(images: torch.Tensor, views: torch.Tensor) -> torch.Tensor:
    """Apply `draw_views` to float (B, 3, H, W); what comes in from outside repeats the edge.

    Shifts are rounded to whole pixels, so that a view that is not zoomed is not blurred either.
    """
    batch, _, height, width = images.shape
    flip, zoom, shift_x, shift_y = views.to(images.device, torch.float32).unbind(1)
    if (zoom == 1).all() and not shift_x.any() and not shift_y.any():
        return torch.where(flip[:, None, None, None] < 0, images.flip(-1), images)
    matrix = images.new_zeros(batch, 2, 3, dtype=torch.float32)  # where an output pixel looks, in -1…1
    matrix[:, 0, 0], matrix[:, 1, 1] = flip / zoom, 1 / zoom
    matrix[:, 0, 2] = (shift_x * width).round() * 2 / width
    matrix[:, 1, 2] = (shift_y * height).round() * 2 / height
    grid = F.affine_grid(matrix, list(images.shape), align_corners=False).to(images.dtype)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)


def augment(images: torch.Tensor, config: Augment, generator: torch.Generator) -> torch.Tensor:
    """One random view of each picture, float (B, 3, H, W) in and out; chances come from `generator`."""
    if not (config.flip or config.shift or config.scale):
        return images
    return warp(images, draw_views(len(images), config, generator))
