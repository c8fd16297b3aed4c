"""The bundle: all that drawing needs in one asset of kind `model`, put together from the assets of its parts.

tokenizer/  text/  transformer/     config.json, model.safetensors, history.json where there is one
sampling.json                       the settings that it draws with unless told otherwise
"""

from __future__ import annotations

from collections.abc import Mapping

from model import steps
from model.config import RunConfig
from model.plumbing import assets, storage
from model.plumbing.assets import Manifest
from model.plumbing.curves import HISTORY

PARTS = ("tokenizer", "text", "transformer")
FILES = ("config.json", "model.safetensors")  # of every part
SAMPLING = "sampling.json"


def make_bundle(config: RunConfig, parts: Mapping[str, Manifest]) -> Manifest:
    """The bundle of these parts; found where it is already. S3 copies for itself, each copy is verified.

    Args:
        config: `sampling` decides, where no sweep did.
        parts: the assets `tokenizer`, `text` and `transformer`; what else the run made of the model, its
            `judge` and the `sampling` of a sweep, is named among the inputs.

    Raises:
        UserError: a part is damaged, or is no model.
    """
    writer = steps.writer("model", config, parts)
    if found := assets.find(writer.uri):
        return found
    for part in PARTS:
        manifest = parts[part]
        with_history = any(file.name == HISTORY for file in manifest.files)
        for name in (*FILES, HISTORY) if with_history else FILES:
            file = manifest.file(name)
            target = storage.join(writer.uri, part, name)
            storage.copy(manifest.where(name), target, file.sha256)
            writer.add(file.model_copy(update={"name": f"{part}/{name}", "asset": ""}))
    if swept := parts.get("sampling"):
        file = swept.file(SAMPLING)
        storage.copy(swept.where(SAMPLING), storage.join(writer.uri, SAMPLING), file.sha256)
        writer.add(file.model_copy(update={"asset": ""}))
    else:
        writer.add_bytes(SAMPLING, config.sampling.model_dump_json(indent=2).encode())
    return writer.finish({part: manifest.info for part, manifest in parts.items()})
