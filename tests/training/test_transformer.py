"""The transformer's training loop: it learns, stops and resumes exactly, and keeps its losses."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save

from model.config import AssetRef, RecipeConfig, RunConfig
from model.data.token_shards import TokenReader, TokenShard
from model.errors import Stopped, UserError
from model.nets.clip import architecture, build_clip, load_text_encoder, tokenize
from model.nets.gpt import GPT, load_gpt
from model.nets.metrics import TEMPERATURES, token_nll
from model.nets.vqvae import VQVAE
from model.plumbing import assets
from model.plumbing.assets import START, AssetWriter, Manifest
from model.plumbing.checkpoints import Checkpointer
from model.plumbing.distributed import setup
from model.plumbing.tracking import Tracker
from model.plumbing.worker import open_job
from model.steps import job as make_spec
from model.training import transformer
from tests.instances import config, make, make_in_rank
from tests.ranks import two_ranks

COLOURS = ["red", "blue", "green", "black"]
GOLDEN = [2.5541, 1.8347, 1.1957, 0.9208]  # train/nll of `run_config()`, mean of six steps each


def run_config(**training: object) -> RunConfig:
    """A few seconds of training with everything on: dropout, EMA, accumulation, both halves of guidance."""
    return config(
        transformer={
            "depth": 2,
            "width": 32,
            "heads": 4,
            "dropout": 0.1,
            "condition_dropout": 0.2,
            "random_order": 0.25,
            "training": {
                "steps": 24,
                "batch_size": 16,
                "accumulate": 2,
                "warmup_steps": 2,
                "learning_rate": 1e-2,
                "ema": 0.9,
                "log_every": 6,
                "eval_every": 12,
                "checkpoint_every": 10,
                **training,
            },
        }
    )


def publish(run: RunConfig) -> dict[str, Manifest]:
    """Text encoder, tokenizer, and tokens that captions determine: each colour is one of four patterns."""
    torch.manual_seed(0)
    description = {
        "architecture": architecture(run.clip, 16),
        "preprocess": {"size": 16, "mean": [0.5] * 3, "std": [0.5] * 3},
    }
    clip = AssetWriter("text", {"of": "test"}, {})
    clip.add_bytes("model.safetensors", save(dict(build_clip(description).state_dict())))
    clip.add_bytes("config.json", json.dumps(description).encode())
    tokens = AssetWriter("tokens", {"of": "test"}, {})
    rng = np.random.default_rng(0)
    patterns = rng.integers(0, 16, (4, 16))
    sizes = {"train-00000.safetensors": 48, "train-00001.safetensors": 16, "validation-00000.safetensors": 20}
    for name, size in sizes.items():
        colours = rng.integers(0, 4, size)
        captions = [[tokenize([COLOURS[c]], 24)[0, :3].tolist()] for c in colours]
        codes = patterns[colours][:, None]
        noisy = np.where(rng.random(codes.shape) < 0.05, rng.integers(0, 16, codes.shape), codes)
        tokens.add_bytes(name, TokenShard.to_bytes(noisy, captions, 16))
    info = {"vocabulary": 16, "grid": [4, 4], "tokens": 16, "views": 1, "context_length": 24, "shards": sizes}
    tokenizer = AssetWriter("tokenizer", {"of": "test"}, {})
    weights = save({name: part.contiguous() for name, part in VQVAE(run.tokenizer).state_dict().items()})
    tokenizer.add_bytes(
        "model.safetensors",
        weights,
    )
    tokenizer.add_bytes("config.json", run.tokenizer.model_dump_json().encode())
    return {"tokens": tokens.finish(info), "text": clip.finish({}), "tokenizer": tokenizer.finish({})}


def fit(run: RunConfig, inputs: dict[str, Manifest]) -> Manifest:
    """Train here, without MLflow."""
    return make("transformer", run, inputs)


def history(made: Manifest) -> dict[str, list[list[float]]]:
    return json.loads((Path(made.uri) / "history.json").read_text())


def test_it_learns_the_captions_and_keeps_its_losses(store: str) -> None:
    run = run_config()
    sets = publish(run)
    made = fit(run, sets)
    info = made.info
    assert info["validation_nll"] < 1.6 < np.log(16)
    assert info["validation_nll_shuffled"] > info["validation_nll"] + 0.2
    assert info["validation_nll_unconditional"] > info["validation_nll"] + 0.05
    assert info["best_step"] in (12, 24)
    curves = history(made)
    assert [step for step, _ in curves["train/nll"]] == [6, 12, 18, 24]
    assert [step for step, _ in curves["validation/nll"]] == [12, 24]
    last = {name: points[-1][1] for name, points in curves.items() if name.startswith("validation/")}
    assert last["validation/text_gain"] == last["validation/nll_shuffled"] - last["validation/nll"]
    assert last["validation/nll_fitted"] <= last["validation/nll"]
    assert last["validation/temperature"] in TEMPERATURES
    losses = [value for _, value in curves["train/nll"]]
    # Kernels of other CPUs add in another order, which 24 steps amplify; a real change moves the 2nd digit.
    assert losses == pytest.approx(GOLDEN, abs=5e-3)
    gpt = load_gpt(made.uri)
    assert gpt.parameter_count() == info["parameters"]
    figures = transformer.validate(
        gpt,
        load_text_encoder(sets["text"].uri),
        sets["tokens"],
        "validation",
        setup(),
    )
    assert figures["nll"] == pytest.approx(info["validation_nll"], abs=1e-5)
    assert not list(Path(made.uri).glob("checkpoints/**/*.safetensors"))


def test_the_tokenizer_is_loaded_once_however_often_samples_are_shown(
    store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[Path] = []
    load = transformer.load_tokenizer
    monkeypatch.setattr(transformer, "load_tokenizer", lambda path: (loaded.append(path), load(path))[1])
    run = run_config(steps=4, eval_every=1)
    assert [step for step, _ in history(fit(run, publish(run)))["validation/nll"]] == [1, 2, 3, 4]
    assert len(loaded) == 1


def test_the_last_weights_are_kept_where_the_config_says_so(
    store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    worsening = iter([4.0, 3.0, 2.0, 1.0])
    figures = {"nll": 1.0, "nll_unconditional": 5.0, "nll_shuffled": 5.0}
    monkeypatch.setattr(transformer, "validate", lambda *_: {"text_gain": next(worsening)} | figures)
    run = run_config()
    sets = publish(run)
    assert fit(run, sets).info["best_step"] == 12
    assert run.transformer
    last = run.transformer.model_copy(update={"keep": "last"})
    worsening = iter([4.0, 3.0, 2.0, 1.0])
    assert fit(run.model_copy(update={"transformer": last}), sets).info["best_step"] == 24


def test_a_wrong_caption_costs_the_best_most_and_where_it_costs_nothing_nll_decides() -> None:
    surer, likelier = {"text_gain": 2.0, "nll": 3.1}, {"text_gain": 1.2, "nll": 2.8}
    assert transformer.worth(surer) > transformer.worth(likelier)
    noise = 0.01  # of captions that tell nothing
    assert transformer.worth(likelier | {"text_gain": 0.0}) > transformer.worth(surer | {"text_gain": noise})


def test_who_watches_sees_the_averaged_net_of_each_validation(store: str) -> None:
    run = run_config(steps=4, eval_every=2)
    assert run.transformer
    run = run.model_copy(update={"transformer": run.transformer.model_copy(update={"keep": "last"})})
    seen: list[tuple[int, float, torch.Tensor]] = []

    def watch(gpt: GPT, step: int, figures: dict[str, float]) -> None:
        seen.append((step, figures["nll"], gpt.embedding.weight.detach().clone()))

    with open_job(make_spec("transformer", run, "test", publish(run)), track=False) as job:
        assert run.transformer
        made = transformer.train(job, run.transformer, watch)
    assert made
    assert [[step, nll] for step, nll, _ in seen] == history(made)["validation/nll"]
    assert torch.equal(seen[-1][2], load_gpt(made.uri).embedding.weight)


def test_who_is_told_to_end_while_torch_compiles_ends_as_stopped_for_the_tracker_too(
    store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended: list[type[BaseException] | None] = []
    monkeypatch.setattr(Tracker, "__exit__", lambda self, kind, error, trace: ended.append(kind))
    run = run_config()

    def backend(*_: object) -> None:
        raise Stopped("told to end")

    compiled = torch.compile(lambda x: x + 1, backend=backend)
    spec = make_spec("transformer", run, "test", publish(run))
    with pytest.raises(Stopped, match="told to end"), open_job(spec, track=False):
        compiled(torch.ones(2))
    assert ended == [Stopped]


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_killed_job_continues_as_if_nothing_had_happened(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optimizer: str
) -> None:
    run = run_config()
    assert run.transformer
    run = run.model_copy(update={"transformer": run.transformer.model_copy(update={"optimizer": optimizer})})
    sets = publish(run)
    begin = Checkpointer.begin
    saved: list[int] = []

    def begin_and_die(self: Checkpointer, step: int, *args: object) -> None:
        begin(self, step, *args)  # type: ignore[arg-type]
        saved.append(step)
        raise KeyboardInterrupt

    monkeypatch.setattr(Checkpointer, "begin", begin_and_die)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            fit(run, sets)
    assert saved == [10, 20]
    monkeypatch.setattr(Checkpointer, "begin", begin)
    continued = fit(run, sets)

    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.setenv("LATENT_GPT_STORE", str(elsewhere))
    whole = fit(run, publish(run))
    assert history(continued) == history(whole)
    assert continued.info == whole.info
    assert continued.files == whole.files  # names, sizes, SHA-256


@pytest.mark.slow
def test_a_retraining_begins_from_the_champions_weights_and_resumes_from_its_own(
    store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = {"dropout": 0.0, "condition_dropout": 0.0, "random_order": 0.0}
    run = run_config()
    sets = publish(run)
    champion = fit(run, sets)
    assert run.transformer
    training = run.transformer.training.model_copy(update={"log_every": 1, "accumulate": 1})
    again = run.model_copy(
        update={
            "transformer": run.transformer.model_copy(update={**plain, "training": training}),
            "origin": {"transformer": AssetRef(key=champion.key, sha256=champion.sha256)},
        }
    )
    assert make_spec("transformer", again, "test", sets).inputs[START] == champion.as_input

    begin = Checkpointer.begin
    saved: list[int] = []

    def begin_and_die(self: Checkpointer, step: int, *args: object) -> None:
        begin(self, step, *args)  # type: ignore[arg-type]
        saved.append(step)
        raise KeyboardInterrupt

    monkeypatch.setattr(Checkpointer, "begin", begin_and_die)
    with pytest.raises(KeyboardInterrupt):
        fit(again, sets)
    monkeypatch.setattr(Checkpointer, "begin", begin)
    continued = fit(again, sets)
    assert saved == [10]
    first = history(continued)["train/nll"][0][1]
    batch = next(TokenReader(sets["tokens"], "train", 16, again.seed).batches(0))
    text = load_text_encoder(sets["text"].uri)
    logits = load_gpt(champion.uri)(batch.codes, *text.encode(batch.ids))
    assert first == pytest.approx(token_nll(logits, batch.codes).mean().item(), abs=1e-5)
    assert first < history(champion)["train/nll"][0][1] - 0.5, "and not where scratch begins"

    (Path(continued.uri) / "manifest.json").unlink()
    whole = fit(again, sets)
    assert (history(whole), whole.files) == (history(continued), continued.files), "a checkpoint wins"
    other = again.model_copy(update={"transformer": again.transformer.model_copy(update={"depth": 3})})
    with pytest.raises(UserError, match=r"do not fit GPT: blocks\.2.* is missing.*retrain\.start=scratch"):
        fit(other, sets)


@pytest.mark.slow
def test_a_run_with_its_minutes_trains_as_long_as_there_is_time(store: str) -> None:
    run = run_config(warmup_steps=4, eval_every=100, checkpoint_every=100)
    sets = publish(run)
    assert run.transformer
    foreseen = run.transformer.training.steps
    recipe = RecipeConfig(minutes=5, version=1, until=time.time() + 3600)
    timed = run.model_copy(update={"recipe": recipe})
    made = fit(timed, sets)
    assert made.info["steps"] == 2 * foreseen, "there is time for more than twice as many"
    (Path(made.uri) / "manifest.json").unlink()
    late = fit(run.model_copy(update={"recipe": recipe.model_copy(update={"until": 1.0})}), sets)
    assert late.info["steps"] == foreseen // 2
    fewer = run.transformer.training.model_copy(update={"steps": foreseen // 2})
    told = run.transformer.model_copy(update={"training": fewer})
    repeated = fit(run.model_copy(update={"transformer": told}), sets)
    assert repeated.key != late.key
    weights = (
        {file.sha256 for file in one.files if file.name == "model.safetensors"} for one in (late, repeated)
    )
    assert next(weights) == next(weights), "weight for weight"
    assert "steps" not in repeated.info


def test_random_order_ends_when_it_should() -> None:
    config = run_config().transformer
    assert config
    training = config.training
    shares = [transformer._mixed(config, step, training) for step in (0, 2, 4, 6, 24)]
    assert shares == [1, 1, 0.5, 0, 0], "from the end of warm-up to a quarter of the steps"
    more = training.model_copy(update={"steps": 48})
    assert transformer._mixed(config, 2, more) == 1, "before it, their number changes nothing"
    some = config.model_copy(update={"random_order_left": 0.7})
    assert [transformer._mixed(some, step, training) for step in (0, 3, 4, 24)] == [1, 0.75, 0.7, 0.7]
    never = config.model_copy(update={"random_order": 0.0})
    assert transformer._mixed(never, 0, training) == 0

    codes = torch.arange(16).repeat(64, 1)
    mixed, order = transformer._reorder(codes, 1.0)
    assert torch.equal(mixed, order)  # a code is its own position here
    assert (order.sort(dim=1).values == codes).all()
    assert (order != codes).any(dim=1).all()
    same, raster = transformer._reorder(codes, 0.0)
    assert torch.equal(same, codes)
    assert torch.equal(raster, codes)


@pytest.mark.slow
def test_two_processes_train_as_one_does(store: str) -> None:
    """Without chances (dropout, dropped captions) the same batches give the same curve."""
    run = run_config(steps=12, checkpoint_every=100)
    plain = {"dropout": 0.0, "condition_dropout": 0.0, "random_order": 0.0}
    assert run.transformer
    run = run.model_copy(update={"transformer": run.transformer.model_copy(update=plain)})
    sets = publish(run)
    made = fit(run, sets)
    one = history(made)
    for path in Path(made.uri).glob("*"):
        if path.is_file():
            path.unlink()
    uris = {name: manifest.uri for name, manifest in sets.items()}
    two_ranks(make_in_rank, store, "transformer", run.model_dump_json(), uris)
    two = history(assets.load(made.uri))
    assert two.keys() == one.keys()
    for name in ("train/nll", "validation/nll", "validation/nll_unconditional"):
        assert np.allclose(two[name], one[name], atol=1e-4), name
