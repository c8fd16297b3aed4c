"""Tiny models with random weights, the assets they would be published as, and jobs run in this process."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path

import torch

from model import steps
from model.config import DataConfig, RunConfig, TrainedCLIPConfig, VQVAEConfig, parse_config
from model.data import ingest as ingesting
from model.evaluation.benchmark import make_benchmark
from model.inference.bundle import make_bundle
from model.nets.clip import architecture, build_clip
from model.nets.gpt import GPT
from model.nets.vqvae import VQVAE
from model.plumbing import assets, worker
from model.plumbing.assets import AssetWriter, Kind, Manifest
from model.plumbing.checkpoints import save_model
from model.plumbing.jobs import JobSpec

SIDE = 16
TRAINING = {"steps": 3, "batch_size": 8, "warmup_steps": 1}


def config(**changes: object) -> RunConfig:
    """A run on shapes of 16 px whose nets have a few thousand weights."""
    return parse_config(
        {
            "name": "tiny",
            "data": {"source": {"kind": "shapes", "count": 64}, "image_size": SIDE, "validation_share": 0.2},
            "clip": {
                "kind": "trained", "embed_dim": 16, "text_width": 16, "text_layers": 1, "text_heads": 2,
                "context_length": 24, "vision_width": 16, "vision_layers": 1, "patch_size": 8,
                "training": TRAINING,
            },
            "tokenizer": {
                "kind": "vqvae", "factor": 4, "width": 8, "multipliers": [1, 1, 1], "blocks": 1,
                "codebook_size": 16, "code_dim": 4, "training": TRAINING,
            },
            "transformer": {"depth": 1, "width": 16, "heads": 2, "training": TRAINING},
            "evaluation": {"samples_per_prompt": 2, "pictures": 6},
            **changes,
        }
    )  # fmt: skip


def write_models(folder: Path, run: RunConfig, seed: int = 0) -> dict[str, Path]:
    """Folders of a tokenizer, two CLIPs and a transformer that fit together, with random weights."""
    torch.manual_seed(seed)
    assert isinstance(run.tokenizer, VQVAEConfig)
    assert isinstance(run.clip, TrainedCLIPConfig)
    assert run.transformer
    side = run.data.image_size
    folders = {name: folder / name for name in ("tokenizer", "text", "judge", "transformer")}
    vqvae = VQVAE(run.tokenizer)
    save_model(folders["tokenizer"], vqvae.state_dict(), run.tokenizer.model_dump(mode="json"))
    for role in ("text", "judge"):
        description = {
            "name": "tiny",
            "architecture": architecture(run.clip, side),
            "preprocess": {"size": side, "mean": [0.5] * 3, "std": [0.5] * 3},
        }
        save_model(folders[role], build_clip(description).state_dict(), description)
    grid = side // run.tokenizer.factor
    gpt = GPT(run.transformer, run.tokenizer.vocabulary, (grid, grid), run.clip.text_width)
    for parameter in gpt.parameters():  # the head starts at zero, which would hide every mistake
        torch.nn.init.normal_(parameter, std=1.0)
    save_model(folders["transformer"], gpt.state_dict(), gpt.description())
    return folders


def publish_models(folder: Path, run: RunConfig, images: Manifest, seed: int = 0) -> dict[str, Manifest]:
    """The same as assets in the store, with histories, made from `images`."""
    history = {"train/loss": [[1, 2.0], [2, 1.5], [3, 1.2]], "validation/loss": [[3, 1.4]]}
    made = {}
    for name, path in write_models(folder, run, seed).items():
        writer = AssetWriter(name, {"seed": seed}, {"images": images})  # type: ignore[arg-type]
        for file in sorted(path.iterdir()):
            writer.add_file(file.name, file)
        writer.add_bytes("history.json", json.dumps(history).encode())
        made[name] = writer.finish({})
    return made


def ingest(data: DataConfig) -> Manifest:
    """The images of a config, at their place in the store."""
    settings, version = steps.image_settings(data), steps.STEPS["images"].version
    return ingesting.ingest(data, AssetWriter("images", settings, {}, version))


def run_job(spec: JobSpec) -> Manifest:
    """A job through the `main` of its module, in this process and without MLflow."""
    made = worker.run(spec, import_module(spec.module).main, track=False)
    assert made is not None
    assert made.uri == spec.output
    return made


def make(kind: Kind, run: RunConfig, inputs: Mapping[str, Manifest]) -> Manifest:
    """The asset of a kind, by its job, in this process and without MLflow; or where it has none, as it is."""
    if kind == "benchmark":
        return make_benchmark(run, **inputs)
    if kind == "model":
        return make_bundle(run, inputs)
    return run_job(steps.job(kind, run, "test", inputs))


def make_in_rank(kind: Kind, run: str, inputs: dict[str, str]) -> None:
    """The same in one of several ranks: config as JSON, inputs by URI."""
    found = {name: assets.load(uri) for name, uri in inputs.items()}
    spec = steps.job(kind, parse_config(run), "test", found)
    worker.run(spec, import_module(spec.module).main, track=False)
