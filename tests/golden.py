"""What each step makes of a tiny run, as recorded for the step's version.

    python -m tests.golden        records anew (after raising the version of a step whose result has changed)

Bytes where every machine makes the same ones; curves and metrics to three digits, as kernels of other CPUs
add in another order.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from model.data.token_shards import TokenReader
from model.plumbing import storage
from model.plumbing.assets import Kind, Manifest
from model.steps import STEPS
from tests.instances import config, ingest, make

RECORDED = Path(__file__).parent / "golden.json"
KINDS = [kind for kind in STEPS if kind not in ("speed", "recipe", "race")]  # by how fast this machine is
TRAINING = {"steps": 6, "batch_size": 16, "warmup_steps": 1, "log_every": 2, "eval_every": 3, "ema": 0.5}


def results(make: Callable[..., Manifest] = make) -> dict[str, Any]:
    """Version and result of every step, each made of what those before it made, in the store at hand."""
    tiny = config()
    run = config(
        tokenizer=tiny.tokenizer.model_dump() | {"training": TRAINING},
        clip=tiny.clip.model_dump() | {"training": TRAINING},
        sweep={"cfg_scale": [1.0, 3.0], "temperature": [0.9], "prompts": 4},
        transformer={**tiny.transformer.model_dump(), "dropout": 0.1, "training": TRAINING},  # type: ignore[union-attr]
        data={
            **tiny.data.model_dump(),
            "augment": {"views": 2, "flip": True, "shift": 0.1, "scale": 0.1},
        },
    )
    made: dict[Kind, Manifest] = {"images": ingest(run.data)}
    for kind in KINDS:
        step = STEPS[kind]
        if kind not in made:
            needed = (name for name in (*step.needs, *step.also) if name in made)
            made[kind] = make(kind, run, {name: made[name] for name in needed})
    return {kind: {"version": STEPS[kind].version, **_result(made[kind])} for kind in KINDS}


def _result(made: Manifest) -> dict[str, Any]:
    if made.kind in ("images", "model", "benchmark"):
        numbers = (".safetensors", "history.json")  # which other CPUs round otherwise
        names = [file.name for file in made.files if not file.name.endswith(numbers)]
        data = b"".join(storage.read_bytes(storage.join(made.uri, name)) for name in names)
        return {"files": names, "sha256": hashlib.sha256(data).hexdigest()}
    if made.kind == "tokens":
        batches = list(TokenReader(made, "train", 1).ordered())
        return {"codes": [batch.codes[0].tolist() for batch in batches[:16]],
                "ids": [batch.ids[0].tolist() for batch in batches[:4]]}  # fmt: skip
    if made.kind == "sampling":
        return made.info
    if made.kind in ("evaluation", "measurement"):
        figures = made.info["figures"].items()
        return {"metrics": {name: value for name, value in figures if isinstance(value, float)}}
    return {"history": json.loads(storage.read_bytes(storage.join(made.uri, "history.json")))}


def main() -> None:
    """Record what the steps make now."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["LATENT_GPT_STORE"] = folder
        RECORDED.write_text(json.dumps(results(), indent=1) + "\n")


if __name__ == "__main__":
    main()
