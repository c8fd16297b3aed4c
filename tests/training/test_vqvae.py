"""The tokenizer's job: that it learns, that it forgets nothing when killed, and what it leaves behind."""

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
import torch
from PIL import Image

from components.launch import launch
from model.config import RunConfig, load_config
from model.data.images import to_pixels, to_tensor
from model.nets.tokenizers import load_tokenizer
from model.nets.vqvae import VQVAE
from model.plumbing import assets, cache, storage
from model.plumbing.assets import Manifest
from model.plumbing.checkpoints import save_model
from model.plumbing.distributed import Distributed
from model.plumbing.jobs import JobSpec
from model.plumbing.tracking import RUN_TAG, STEP_TAG
from model.steps import job
from model.training import vqvae
from tests.instances import ingest, run_job

ALONE = Distributed(rank=0, world=1, local_rank=0, device=torch.device("cpu"))


def config(*overrides: str) -> RunConfig:
    return load_config("smoke", [f"tokenizer.{override}" for override in overrides])


def spec_of(run: RunConfig) -> JobSpec:
    return job("tokenizer", run, "test", {"images": ingest(run.data)})


def history(manifest: Manifest) -> dict[str, list[list[float]]]:
    return json.loads(storage.read_bytes(storage.join(manifest.uri, "history.json")))


EVERYTHING = (  # all that a checkpoint has to hold
    "training.steps=9",
    "training.log_every=4",
    "training.eval_every=3",
    "training.checkpoint_every=3",
    "training.accumulate=2",
    "training.ema=0.9",
    "training.precision=bf16",
    "reset_after=2",
    "dropout=0.1",
    "loss.perceptual=0.5",
    "loss.adversarial=0.5",
    "loss.adversarial_from=0.3",
)


GOLDEN = [1.0033, 0.9160, 0.8863]  # train/loss of `EVERYTHING`, means of four, four and one steps


def test_it_keeps_its_losses(store: str) -> None:
    losses = [value for _, value in history(run_job(spec_of(config(*EVERYTHING))))["train/loss"]]
    assert losses == pytest.approx(GOLDEN, abs=1e-2)


def test_it_leaves_reconstructions_to_look_at_which_are_no_part_of_it(store: str) -> None:
    made = run_job(spec_of(config()))
    shown = Path(made.uri, assets.PICTURES, assets.RECONSTRUCTIONS)
    assert Image.open(shown).size[0] > 100
    assert sorted(file.name for file in made.files) == ["config.json", "history.json", "model.safetensors"]


@pytest.mark.slow
@pytest.mark.parametrize("crash", [2, 3, 8])  # before the first checkpoint, right after it, near the end
def test_a_killed_job_ends_as_if_nothing_had_happened(
    crash: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = config(*EVERYTHING)
    monkeypatch.setenv("LATENT_GPT_STORE", str(tmp_path / "whole"))
    whole = run_job(spec_of(run))

    monkeypatch.setenv("LATENT_GPT_STORE", str(tmp_path / "killed"))
    spec = spec_of(run)
    rate = vqvae.learning_rate
    with monkeypatch.context() as patch:
        patch.setattr(
            vqvae,
            "learning_rate",
            lambda step, training: rate(step, training) if step < crash else pytest.fail("killed"),
        )
        with pytest.raises(pytest.fail.Exception):
            run_job(spec)
    assert assets.find(spec.output) is None
    resumed = run_job(spec)
    assert history(resumed) == history(whole)
    assert resumed.files == whole.files  # every weight, by SHA-256


def test_the_asset_is_the_best_validation_and_loads_as_a_tokenizer(store: str, tmp_path: Path) -> None:
    run = config("training.steps=40", "training.eval_every=10", "training.learning_rate=5e-3")
    made = run_job(spec_of(run))
    curve = history(made)["validation/psnr"]
    assert [step for step, _ in curve] == [10, 20, 30, 40]
    assert made.info["psnr"] == max(value for _, value in curve)
    assert made.info["psnr"] > curve[0][1] + 0.5  # it learns
    assert 0 < made.info["codebook_use"] <= 1
    assert not storage.list_sizes(storage.join(made.uri, "checkpoints"))

    tokenizer = load_tokenizer(cache.folder(made))
    held_out, _ = vqvae.load_images(made.input("images"), "validation")
    measured = vqvae.validate(tokenizer, held_out, ALONE)
    assert math.isclose(measured["psnr"], made.info["psnr"], abs_tol=1e-4)

    second = cast(Distributed, SimpleNamespace(rank=1, world=2, device="cpu", sum=lambda tensor: tensor))
    nothing = vqvae.validate(tokenizer, held_out[:1], second)
    assert nothing == {"psnr": 0.0, "codebook_use": 0.0}, "one picture is the first rank's"


def test_finite_scalars_go_the_same_way(store: str, tmp_path: Path) -> None:
    run = config("quantizer=fsq", "fsq_levels=[4, 4]", "training.steps=20", "training.learning_rate=5e-3")
    made = run_job(spec_of(run))
    losses = [value for _, value in history(made)["train/loss"]]
    assert losses[-1] < 0.8 * losses[0]
    assert made.info["vocabulary"] == 16
    tokenizer = load_tokenizer(cache.folder(made))
    codes = tokenizer.encode(torch.rand(2, 3, 16, 16) * 2 - 1)
    assert codes.shape == (2, 4, 4)
    assert tokenizer.decode(codes).shape == (2, 3, 16, 16)


def test_the_adversary_plays_along_from_its_step_on(store: str) -> None:
    curves = []
    for start in (0.5, 1.0):
        overrides = ("training.steps=6", "loss.adversarial=0.5", f"loss.adversarial_from={start}")
        made = run_job(spec_of(config(*overrides)))
        curves.append([value for _, value in history(made)["train/loss"]])
    early, never = curves  # the loss of reconstruction alone, before each step
    assert early[:4] == never[:4]
    assert early[4] != never[4]


def test_no_training_picture_is_held_out(store: str) -> None:
    images = ingest(config().data)
    held_out, _ = vqvae.load_images(images, "validation")
    seen, _ = vqvae.load_images(images, "train")
    assert not {picture.numpy().tobytes() for picture in held_out} & {
        picture.numpy().tobytes() for picture in seen
    }


def test_the_grid_shows_each_original_beside_its_reconstruction() -> None:
    net = VQVAE(config().tokenizer).eval()
    held_out = torch.randint(0, 256, (5, 3, 16, 16), dtype=torch.uint8)
    grid = torch.from_numpy(np.array(vqvae._pairs(net, held_out))).permute(2, 0, 1)
    assert grid.shape == (3, 2 + 2 * 18, 2 + 8 * 18)  # four pairs in a row, 2 pixels between tiles
    tiles = [grid[:, 20:36, left : left + 16] for left in (2, 20)]  # of the fifth picture, in the second row
    assert torch.equal(tiles[0], held_out[4])
    assert torch.equal(tiles[1], to_pixels(net.reconstruct(to_tensor(held_out[4:])))[0])


# ── through the real entry point ────────────────────────────────────────────────────────────────────────


@pytest.mark.slow
def test_two_processes_train_one_tokenizer(services: dict[str, str], tmp_path: Path) -> None:
    adversary = ("loss.adversarial=0.5", "loss.adversarial_from=0.3")
    run = config("training.steps=6", "training.eval_every=3", "training.checkpoint_every=4", *adversary)
    spec = spec_of(run)
    made = launch(spec)
    assert made.kind == "tokenizer"
    tokenizer = load_tokenizer(cache.folder(made))
    assert tokenizer.vocabulary == 16
    assert [step for step, _ in history(made)["validation/psnr"]] == [3, 6]

    from mlflow import MlflowClient

    client = MlflowClient(services["MLFLOW_TRACKING_URI"])
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    ours = f"tags.`{RUN_TAG}` = '{spec.tracking.run}' and tags.`{STEP_TAG}` = '{spec.tracking.step}'"
    (child,) = client.search_runs(experiments, ours)
    assert child.info.status == "FINISHED"
    assert child.data.metrics["validation/psnr"] == pytest.approx(history(made)["validation/psnr"][-1][1])
    grids = client.list_artifacts(child.info.run_id, "reconstructions")
    assert [grid.path for grid in grids] == [f"reconstructions/step-000000{step}.png" for step in (3, 6)]


@pytest.mark.slow
def test_the_same_job_imports_a_pretrained_tokenizer(services: dict[str, str], tmp_path: Path) -> None:
    trained = config().tokenizer
    net = VQVAE(trained).eval()
    save_model(tmp_path / "reference", net.state_dict(), trained.model_dump(mode="json"))
    run = load_config(
        "smoke", [f"tokenizer={{kind: pretrained, family: latent-gpt, ref: {tmp_path / 'reference'}}}"]
    )
    made = launch(spec_of(run))
    tokenizer = load_tokenizer(cache.folder(made))
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    assert torch.equal(tokenizer.encode(images), net.encode(images))
