"""Settings of strangers, and what a person may type: words of `latent-gpt plan`, for a folder with files."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

Words = Callable[[Path], list[str]]

DEEP, DIGITS = 10**5, "9" * 5000
GOOD = "name: x\ndata: {source: {kind: shapes}}\n"


def preset(text: bytes | str, *words: str) -> Words:
    """A preset of this text."""
    return made(lambda path: path.write_bytes(text.encode() if isinstance(text, str) else text), *words)


def made(make: Callable[[Path], object], *words: str) -> Words:
    """A preset that something else makes."""

    def write(root: Path) -> list[str]:
        make(root / "preset.yaml")
        return [str(root / "preset.yaml"), *words]

    return write


def typed(*words: str) -> Words:
    """The preset of who names none, and these words."""
    return lambda root: list(words)


def of(data: Words) -> Words:
    """The same for a folder of pictures."""

    def write(root: Path) -> list[str]:
        from tests.refusals.sources import folder

        (root / "pictures").mkdir()
        folder()(root / "pictures")
        return [*data(root), "--data", str(root / "pictures")]

    return write


def hole(path: Path) -> None:
    """A file of terabytes, none of which are on the disk."""
    path.touch()
    os.truncate(path, 1 << 42)


LAUGHS = "a: &a [x]\n" + "".join(
    f"{after}: &{after} [{', '.join([f'*{before}'] * 10)}]\n"
    for before, after in zip("abcdefghijk", "bcdefghijkl", strict=True)
)
PRESETS: dict[str, bytes | str] = {
    "a preset that nests without end": "[" * DEEP,
    "a preset of tables without end": "{a: " * DEEP,
    "a preset that is not UTF-8": b"name: caf\xe9\n",
    "a preset of NUL": bytes(100),
    "a preset of 5,000 digits": f"{GOOD}seed: {DIGITS}\n",
    "a preset of 5,000 digits and a point": f"{GOOD}seed: {DIGITS}.5\n",
    "a preset of 200,000 hexadecimal digits": f"{GOOD}seed: 0x{'f' * 200_000}\n",
    "a preset of sixties without end": f"{GOOD}seed: 1{':59' * 50_000}\n",
    "a preset of a billion laughs": LAUGHS,
    "a preset that leads to itself": "data: &a {source: *a}\n",
    "a preset that makes objects": "name: !!python/object/apply:os.system [id]\n",
    "a preset of a list": "- a\n",
    "a preset of nothing": "",
    "a preset of 2 MB": "#" * (2 << 20),
    "a preset of names that break lines": '"a\\n\\x1b[31m": 1\n',
    "a preset of 20,000 keys": "".join(f"k{number}: 1\n" for number in range(20_000)),
    "a preset whose keys are numbers": "1: 2\n.nan: 3\nnull: 4\n",
    "a preset whose keys are lists": "? [a, b]\n: 1\n",
}
NUMBERS = {  # of settings
    "999,999,999,999 blocks": "transformer.depth=999999999999",
    "5,000 digits of blocks": f"transformer.depth={DIGITS}",
    "blocks below zero": "transformer.depth=-1",
    "blocks without end": "transformer.depth=.inf",
    "blocks that are none": "transformer.depth=.nan",
    "a transformer of no whole blocks": "transformer.depth=1.5",
    "a hundred million samples": "evaluation.samples_per_prompt=100000000",
    "a billion pictures to evaluate": "evaluation.pictures=10000000000",
    "pictures of a million pixels' side": "data.image_size=1000000",
    "a million heads": "transformer.heads=1000000",
    "steps below zero": "transformer.training.steps=-5",
    "steps without end": "transformer.training.steps=1e999",
    "a batch of 10^18": "transformer.training.batch_size=1000000000000000000",
    "texts of a million tokens": "clip.context_length=1000000",
    "texts of a token": "clip.context_length=1",
    "averages that never move": "transformer.training.betas=[0.9, 1.0]",
    "codes of one level": "tokenizer.fsq_levels=[1, 5]",
    "all pictures held out": "data.validation_share=1",
    "guidance greater than numbers of a net": "sampling.cfg_scale=1.0e+39",
    "a temperature next to nothing": "sampling.temperature=1.0e-40",
    "a recipe of minutes that are none": "recipe.minutes=.nan",
    "a recipe of minutes without end": "recipe.minutes=.inf",
    "a recipe of 1e300 minutes": "recipe.minutes=1.0e+300",
    "a recipe of effort below zero": "recipe.effort=-1",
    "a recipe that is a list": "recipe=[1]",
    "a recipe until never": "recipe.until=.inf",
    "a setting that nests without end": f"data.source={'[' * DEEP}",
    "a setting below settings without end": f"{'a.' * DEEP}b=1",
    "a setting of no name": "=1",
    "a setting of no value": "transformer.depth",
    "a setting of a value": "name.a.b=1",
    "a setting that breaks lines": "a\n\x1b[31m=1",
    "a setting of ten thousand names": f"name=[{'x,' * 10**4}]",
}
DIALS = {
    "minutes that are none": ("--minutes", "nan"),
    "minutes without end": ("--minutes", "inf"),
    "1e300 minutes": ("--minutes", "1e300"),
    "minutes below zero": ("--minutes", "-1"),
    "effort below zero": ("--effort", "-1"),
    "effort that is none": ("--effort", "nan"),
    "effort without end": ("--effort", "inf"),
    "1e300 effort": ("--effort", "1e300"),
    "minutes and effort": ("--minutes", "5", "--effort", "2"),
}
SETTINGS: dict[str, Words] = {
    **{name: preset(text) for name, text in PRESETS.items()},
    "a preset that is a pipe": made(os.mkfifo),
    "a preset that is a folder": made(Path.mkdir),
    "a preset that is a device": made(lambda path: path.symlink_to("/dev/zero")),
    "a preset of terabytes": made(hole),
    "a preset of no name": typed(""),
    "a preset of half characters": typed("\udcff\ud800"),
    "a preset that leads out": typed("../../../etc/passwd"),
    **{name: typed("--set", one) for name, one in NUMBERS.items()},
    **{f"{name}, for a folder": of(typed("--set", one)) for name, one in NUMBERS.items()},
    **{name: typed(*words) for name, words in DIALS.items()},
    **{f"{name}, for a folder": of(typed(*words)) for name, words in DIALS.items()},
}
