"""The plan's figures against real nets, and every shipped preset planned."""

import re

import pytest
import torch
import torch.nn.functional as F

from components.recipe import FIRST
from model.config import PRESETS, load_config, preset_names
from model.data.sources import recognition
from model.errors import UserError
from model.nets.gpt import GPT
from model.recipe import HARDWARE
from model.training.optim import adamw, muon
from pipelines.plan import UTILISATION, is_timed, lines, plan
from tests.data.test_ingest import picture, write

pytestmark = pytest.mark.slow  # too long for the inner loop


def stage_of(config, name):
    return next(stage for stage in plan(config, "cpu").stages if stage.name == name)


def small(*overrides):
    return load_config("smoke", ["jobs.processes_per_worker=1", *overrides])


def test_weights_memory_and_operations_are_those_of_the_real_net():
    config = small()
    transformer, size = config.transformer, config.data.image_size
    assert transformer
    assert config.tokenizer.kind == "vqvae"
    assert config.clip.kind == "trained"
    side, text = size // config.tokenizer.factor, config.clip.context_length
    gpt = GPT(transformer, config.tokenizer.vocabulary, (side, side), config.clip.text_width).train()
    batch = transformer.training.batch_size
    codes = torch.zeros(batch, side * side, dtype=torch.long)
    kept = {}
    own = {parameter.untyped_storage().data_ptr() for parameter in gpt.parameters()}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        states = torch.zeros(batch, text, config.clip.text_width)
        mask = torch.ones(batch, text, dtype=torch.bool)
        logits = gpt(codes, states, mask, torch.zeros(batch, dtype=torch.bool))
        F.cross_entropy(logits.flatten(0, 1), codes.flatten())
    really = sum(storage.nbytes() for place, storage in kept.items() if place not in own)

    stage = stage_of(config, "transformer")
    assert stage.parameters == gpt.parameter_count()
    assert stage.activation_bytes == pytest.approx(really, rel=0.1)
    flops = stage.flops / (stage.samples * side * side)
    assert flops == pytest.approx(gpt.flops_per_token(text), rel=0.35)  # that formula leaves small terms out
    assert stage.tokens == stage.samples * side * side
    assert stage.hours == pytest.approx(stage.flops / (HARDWARE["cpu"]["fp32"] * UTILISATION) / 3600)


def test_the_average_of_the_weights_takes_as_much_memory_as_they_do():
    plain, averaged = (
        stage_of(small(f"transformer.training.ema={decay}"), "transformer") for decay in (0, 0.99)
    )
    assert averaged.state_bytes - plain.state_bytes == 4 * plain.parameters
    assert averaged.activation_bytes == plain.activation_bytes


def test_memory_of_optimisers_is_what_they_hold():
    """Two moments a weight with AdamW; one with Muon, for the blocks' matrices."""
    of_adamw, of_muon = (
        stage_of(small(f"transformer.optimizer={name}", "transformer.training.ema=0"), "transformer")
        for name in ("adamw", "muon")
    )
    config = small().transformer
    assert config
    gpt = GPT(config, small().tokenizer.vocabulary, (4, 4), small().clip.text_width)
    for parameter in gpt.parameters():
        parameter.grad = torch.zeros_like(parameter)
    matrices = sum(p.numel() for p in gpt.blocks.parameters() if p.ndim == 2)
    held = {}
    for name, optimizers in {
        "adamw": [adamw(gpt, config.training)],
        "muon": muon(gpt, gpt.blocks, config.training).values(),
    }.items():
        for optimizer in optimizers:
            optimizer.step()
        held[name] = sum(v.nbytes for o in optimizers for s in o.state.values() for v in s.values())
    assert of_adamw.state_bytes - of_muon.state_bytes == held["adamw"] - held["muon"]
    assert held["adamw"] - held["muon"] == pytest.approx(4 * matrices, rel=0.01)


def test_more_devices_and_accumulation_divide_the_micro_batch():
    batch = "transformer.training.batch_size=32"
    whole = stage_of(small(batch), "transformer").activation_bytes
    halved = stage_of(small(batch, "transformer.training.accumulate=2"), "transformer").activation_bytes
    shared = stage_of(small(batch, "jobs.processes_per_worker=2"), "transformer").activation_bytes
    assert halved == pytest.approx(whole / 2)
    assert shared == pytest.approx(whole / 2)


@pytest.mark.parametrize("preset", preset_names())
def test_every_preset_is_planned(preset):
    config = load_config(preset)
    text = plan(config, "a100").render()
    assert config.name in text
    assert ("transformer" in text) == (config.transformer is not None)


@pytest.mark.parametrize(
    ("preset", "weights"),
    [("coco256-base", 110e6), ("coco256-large", 345e6), ("coco256-xl-8xa100", 775e6)],
)
def test_large_presets_fit_their_gpus_at_256_and_at_1024_tokens(preset, weights):
    header = (PRESETS / f"{preset}.yaml").read_text().partition("name:")[0]
    (longer,) = (line for line in header.splitlines() if "1024 tokens" in line)
    for tokens, overrides in ((256, []), (1024, re.findall(r"--set (\S+)", longer))):
        planned = plan(load_config(preset, overrides), "a100")
        transformer = planned.stages[-1]
        assert transformer.parameters == pytest.approx(weights, rel=0.02)
        assert transformer.tokens == transformer.samples * tokens
        assert "GiB of 80 GiB" not in planned.render(), "the plan asks for smaller batches"


def test_the_tokenizers_judges_are_counted():
    def tokenizer(*overrides):
        return stage_of(small("tokenizer.training.precision=fp32", *overrides), "tokenizer")

    plain = tokenizer()
    lpips = tokenizer(
        "tokenizer.loss.perceptual=1", "tokenizer.loss.perceptual_weights=not/at/hand.safetensors"
    )
    adversary = tokenizer("tokenizer.loss.adversarial=0.5")
    for other in (lpips, adversary):
        assert other.activation_bytes > plain.activation_bytes
        assert other.flops > plain.flops
        assert other.parameters == plain.parameters


def test_a_pretrained_text_tower_has_its_own_width():
    large, huge = (
        stage_of(load_config("coco256-base", [f"clip.name={name}"]), "transformer").parameters
        for name in ("ViT-L-14", "ViT-H-14")
    )
    # Keys and values of each block read the states as they are, after one norm and the null state.
    assert huge - large == (1024 - 768) * (9 * 2 * 768 + 2)


def test_a_source_is_recognised_once_for_all_that_follows_from_it(tmp_path, monkeypatch):
    write(tmp_path, {"a.png": picture(1), "a.txt": "a flag", "b.png": picture(2), "b.txt": "a tree"})
    asked = []
    recognise = recognition.recognise
    monkeypatch.setattr(recognition, "recognise", lambda *named: asked.append(named) or recognise(*named))
    said = "\n".join(lines("auto", str(tmp_path), ()))
    assert "2 pictures" in said
    assert len(asked) == 1


@pytest.mark.parametrize(
    ("hardware", "jobs", "named"),
    [
        ("cpu", ("jobs.gpus_per_worker=2",), "2 x cpu"),
        ("h100", ("jobs.workers=2",), "2 x h100"),
    ],
)
def test_all_of_a_plan_is_for_the_hardware_that_is_named(tmp_path, hardware, jobs, named):
    write(tmp_path, {f"{number}.png": picture(number) for number in range(20)})
    write(tmp_path, {f"{number}.txt": f"flag {number}" for number in range(20)})
    asked = "auto", str(tmp_path), (*jobs, "recipe.minutes=30")
    assert is_timed(*asked)
    assert not is_timed(*asked, hardware), "by the table, without a job"
    said = lines(*asked, hardware)
    assert FIRST in said
    chosen, by_part = (next(line for line in said if mark in line) for mark in ("chosen for", "of peak"))
    batch = next(line for line in said if line.startswith("transformer.training.batch_size"))
    assert f"chosen for 30 minutes on {named}: " in chosen
    assert f"on {'2 x H100' if hardware == 'h100' else '2 processes on one CPU'}, " in by_part
    assert f"tuned on {'GPUs' if hardware == 'h100' else 'a CPU'}" in batch


def test_bad_input_is_named(tmp_path):
    with pytest.raises(UserError, match="hardware 'tpu' is unknown; choose one of cpu"):
        plan(small(), "tpu")
    with pytest.raises(UserError, match="hardware 'tpu' is unknown; choose one of cpu"):
        lines("auto", "shapes", (), "tpu")
    values = small().model_dump()
    values["tokenizer"] = {"kind": "pretrained", "family": "diffusers", "ref": "some/model"}
    from model.config import parse_config

    with pytest.raises(UserError, match="vocabulary is unknown until some/model is loaded"):
        plan(parse_config(values), "cpu")
