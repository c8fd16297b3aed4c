"""Model cards: what a person should know of a version, within what MLflow keeps of it."""

from __future__ import annotations

import pytest

from model.config import RunConfig, load_config, preset_names
from model.evaluation.card import card
from model.evaluation.gate import Verdict
from model.plumbing.assets import AssetWriter
from model.plumbing.registry import LONGEST_DESCRIPTION

VERDICT = Verdict(
    outcome="better",
    reason="by far",
    metric="retrieval",
    prompts="90 prompts held out",
    ours=0.75,
    theirs=0.5,
    difference=0.25,
    low=0.1,
    high=0.4,
    against=2,
    benchmark="b" * 16,
    judge="j" * 16,
)


def card_of(config: RunConfig, verdict: Verdict = VERDICT) -> str:
    images = AssetWriter("images", {}, {}).finish({"train": 284, "validation": 21})
    return card(
        config, "latent-gpt-x", 3, AssetWriter("evaluation", {}, {"images": images}).finish({}), verdict
    )


@pytest.mark.parametrize("preset", preset_names())
def test_a_card_says_what_a_version_is_and_what_its_data_are(store: str, preset: str) -> None:
    config = load_config(preset)
    text = card_of(config)
    assert len(text) < LONGEST_DESCRIPTION
    for heading in ("# latent-gpt-x, version 3", "## Data and licences", "## Limits", "## Use"):
        assert heading in text
    assert "**Verdict: better.** by far" in text
    assert "| retrieval accuracy over 90 prompts held out | 0.75 | 0.5 |" in text
    assert "284 for training, 21 held out" in text
    licence = {"openmoji": "CC BY-SA 4.0", "shapes": "nobody has rights in them"}
    assert licence.get(config.data.source.kind, "Yours: `s3://datasets/coco") in text
    assert ("Licences of their own have the CLIP ViT-L-14" in text) == (config.clip.kind == "pretrained")


def test_a_first_version_has_one_column(store: str) -> None:
    first = VERDICT.model_copy(
        update={"outcome": "first", "theirs": None, "difference": None, "against": None}
    )
    assert "| | version 3 |  |" in card_of(load_config("smoke"), first)
