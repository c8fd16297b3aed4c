"""Try all of it, or what is named: see the package."""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from tests import ROOT
from tests.refusals.bundles import BUNDLES
from tests.refusals.measure import MEBIBYTES, SECONDS, Refusal, refusal
from tests.refusals.settings import SETTINGS
from tests.refusals.sources import SOURCES

TABLE = ROOT / "benchmarks/results/refusals.md"
SHOWN = 150  # characters of a refusal in the table
NOBODY = "nobody "  # begins the names of tries without root's rights


def main(arguments: list[str]) -> int:
    """Say which are not refused as they should be; 0 where all are."""
    parser = argparse.ArgumentParser("python -m tests.refusals")
    parser.add_argument("words", nargs="*", help="that names hold one of; left out, all of them")
    parser.add_argument("--only", choices=KINDS, help="of this kind alone")
    parser.add_argument("--all", action="store_true", help="show the others, too")
    parser.add_argument(
        "--write", action="store_true", help="write the table that the next ones are held against"
    )
    asked = parser.parse_args(arguments)
    recorded = set(map(_without_numbers, TABLE.read_text().splitlines())) if TABLE.exists() else set()
    found: dict[str, list[Refusal]] = {}
    wrong = 0
    with tempfile.TemporaryDirectory(prefix="refusals-") as folder:
        scratch = Path(folder)
        scratch.chmod(0o777)
        os.environ |= {
            **{f"LATENT_GPT_{name}": f"{folder}/{name.lower()}" for name in ("STATE", "STORE", "CACHE")},
            "TMPDIR": folder,
        }
        for kind in KINDS if asked.only is None else [asked.only]:
            found[kind] = []
            for one in KINDS[kind](
                scratch, lambda name: not asked.words or any(w in name for w in asked.words)
            ):
                one = replace(
                    one, said=[line.replace(folder, "").replace(f"{ROOT}/", "") for line in one.said]
                )
                found[kind].append(one)
                problem = one.wrong
                if not problem and not asked.write and _without_numbers(row(one)) not in recorded:
                    problem = "not as in the table"
                wrong += bool(problem)
                if problem or asked.all:
                    print(
                        f"{problem or 'refused'}: {one.name} ({one.seconds:.1f} s, {one.mebibytes:.0f} MiB)"
                    )
                    print(*(f"    {line[:300]}" for line in one.said[:4]), sep="\n", flush=True)
    if asked.write:
        TABLE.write_text(table(found))
    print(f"{sum(map(len, found.values())) - wrong} refused as they should be, {wrong} not")
    return bool(wrong)


def _without_numbers(line: str) -> str:
    """A row without what differs from machine to machine."""
    return re.sub(r"\d+", "#", line.rpartition(" | ")[0].rpartition(" | ")[0])


Wanted = Callable[[str], bool]


def bundles(scratch: Path, wanted: Wanted) -> Iterator[Refusal]:
    """Bundles, by `latent-gpt generate`."""
    import open_clip  # noqa: F401
    from diffusers import VQModel  # noqa: F401
    from transformers import Emu3VQVAE, JanusVQVAE  # noqa: F401

    import model.inference.generate
    import model.plumbing.registry  # noqa: F401
    from tests.instances import config, write_models

    def good() -> None:
        write_models(scratch / "good", config())
        (scratch / "good/sampling.json").write_text('{"best_of": 2}')
        for path in (scratch / "good").rglob("*"):
            path.chmod(0o755 if path.is_dir() else 0o644)

    words = ["generate", "a cat", "--model", str(scratch / "tried"), "--out", str(scratch / "out.png")]
    refusal("", good)
    for name, change in BUNDLES.items():
        if wanted(name):
            shutil.copytree(scratch / "good", scratch / "tried")
            yield _tried(name, lambda: change(scratch / "tried"), lambda: _command(words), scratch)  # noqa: B023


def sources(scratch: Path, wanted: Wanted) -> Iterator[Refusal]:
    """Sources, as a run recognises, looks at and reads them."""
    import encodings.utf_8_sig
    import encodings.utf_16  # noqa: F401

    import model.data.sources.folder
    import model.data.sources.parquet
    import model.data.sources.recognition
    import model.data.sources.webdataset  # noqa: F401
    from model.config import DataConfig
    from model.data.sources import recognise
    from model.data.survey import look
    from model.errors import UserError, one_line
    from tests.instances import ingest

    named = scratch / "named"

    def make() -> None:
        data = SOURCES[name](scratch / "tried") or str(scratch / "tried")
        named.write_text(data, errors="surrogatepass")

    def read() -> None:
        try:
            source = recognise(named.read_text(errors="surrogatepass"))
            config = DataConfig.model_validate({"source": source, "image_size": 16, "max_bad_share": 0})
            look(config.source)
            ingest(config)
        except UserError as error:
            print(f"error: {one_line(str(error))}", file=sys.stderr)
            sys.exit(2)

    for name in filter(wanted, SOURCES):
        (scratch / "tried").mkdir()
        yield _tried(name, make, read, scratch)


def settings(scratch: Path, wanted: Wanted) -> Iterator[Refusal]:
    """Settings, by `latent-gpt plan`."""
    import pipelines.plan  # noqa: F401

    for name in filter(wanted, SETTINGS):
        (scratch / "tried").mkdir()
        words = SETTINGS[name](scratch / "tried")
        yield _tried(name, lambda: None, lambda: _command(["plan", *words]), scratch)  # noqa: B023


def _command(words: list[str]) -> None:
    from pipelines.cli import main

    sys.argv = ["latent-gpt", *words]
    main()


def _tried(name: str, make: Callable[[], object], work: Callable[[], object], scratch: Path) -> Refusal:
    """How a try ends; what was made for it goes."""
    made = refusal(name, make)
    if made.status:
        raise RuntimeError(f"{name} could not be made: {made.said}")
    found = refusal(name, work, name.startswith(NOBODY))
    left = [scratch / name for name in ("tried", "store", "cache", "state")]
    subprocess.run(["rm", "-rf", *left], check=True)  # Python's own calls itself for each level of folders
    return found


KINDS = {"bundles": bundles, "sources": sources, "settings": settings}


def row(one: Refusal) -> str:
    """A line of the table."""
    said = " ".join(one.said).removeprefix("error: ").replace("|", "\\|").replace("`", "'")
    said = said if len(said) <= SHOWN else f"{said[:SHOWN]}…"
    return f"| {one.name} | {said} | {one.seconds:.1f} | {one.mebibytes:.0f} |"


def table(found: dict[str, list[Refusal]]) -> str:
    """Markdown."""
    lines = [
        "# What strangers hand over, and how it is refused",
        "",
        "`python -m tests.refusals --write`: each in a process of its own. Bounds are one line,"
        f" {SECONDS:.0f} s of a core and {MEBIBYTES:.0f} MiB above the idle process. Tests hold it.",
    ]
    for kind, tried in found.items():
        lines += [
            "",
            f"## {kind.capitalize()}",
            "",
            f"{len(tried)}; the longest took {max(one.seconds for one in tried):.1f} s, the largest"
            f" {max(one.mebibytes for one in tried):.0f} MiB.",
            "",
            "| what | refused with | s | MiB |",
            "|---|---|---|---|",
            *map(row, tried),
        ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
