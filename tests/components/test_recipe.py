"""A config that is derived, with the real S3 and MLflow: once, kept, and fitted anew where the dial says."""

from __future__ import annotations

import io
import uuid
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from components import page, recipe
from components.beginning import begin
from components.parameters import TEXT_TO_IMAGE, VQVAE
from components.recipe import Resolved, lines, looked, planned, resolved, with_end
from components.retraining import look
from model.config import RunConfig, load_config, parse_config
from model.data import survey
from model.errors import UserError
from model.plumbing import uses
from model.recipe import Speeds
from model.steps import STEPS, parts
from tests.components.test_retraining import Version, source, version
from tests.data.test_ingest import picture, write

__all__ = ["source", "version"]  # fixtures of a registered model

pytestmark = pytest.mark.slow

SPEEDS = Speeds(2.0, {"tokenizer": 0.02, "text": 0.03, "judge": 0.03, "transformer": 0.1}, 1e-4, 0.01)


@pytest.fixture
def name() -> str:
    return f"latent-gpt-{uuid.uuid4().hex[:8]}"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Forty pictures and their captions."""
    pictures = {f"{number}.png": picture(number) for number in range(40)}
    return write(tmp_path / "flags", pictures | {f"{number}.txt": f"flag {number}" for number in range(40)})


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> list[RunConfig]:
    """Configs whose hardware was timed; each time it is slower."""
    asked: list[RunConfig] = []

    def speeds_of(config: RunConfig) -> Speeds:
        asked.append(config)
        slower = {net: seconds * (1 + 0.3 * len(asked)) for net, seconds in SPEEDS.step.items()}
        return Speeds(2.0, slower, 1e-4, 0.01)

    monkeypatch.setattr(recipe, "speeds_of", speeds_of)
    return asked


def asked(data: Path, *overrides: str, **more: Any) -> dict[str, Any]:
    return {"pipeline": TEXT_TO_IMAGE, "preset": "auto", "data": str(data)} | {
        "overrides": "\n".join(("recipe.minutes=10", *overrides)),
        **more,
    }


def test_what_was_derived_is_kept_for_whoever_asks_the_same(
    services: dict[str, str], folder: Path, timed: list[RunConfig]
) -> None:
    first = resolved(asked(folder))
    assert first.look
    assert first.config.recipe
    assert first.config.recipe.version == 1
    again = resolved(asked(folder))
    assert again.config == first.config
    assert (again.choices, again.parts) == (first.choices, first.parts)
    assert len(timed) == 1, "the second time nothing is timed"
    assert any(one.startswith(f"{uses.NOBODY}/recipe-") for one in uses.said()), "no sweep takes it meanwhile"
    other = resolved(asked(folder, "seed=1"))
    assert len(timed) == 2
    assert other.config != first.config

    write(folder, {"new.png": picture(99), "new.txt": "a flag more"})
    assert resolved(asked(folder)).look, "other pictures are looked at"


def test_people_are_told_what_is_there_and_what_is_chosen(
    services: dict[str, str], folder: Path, timed: list[RunConfig]
) -> None:
    found = resolved(asked(folder))
    said = "\n".join(lines(found))
    assert "40 pictures" in said
    assert "flag 0" in said
    assert "10 minutes on 2 x cpu: 32 px, 64 tokens of 128 codes, a transformer of 3 x 128" in said
    text = page.checks(found, "run", [], "")
    assert "about twice the root of 2,560 codes" in text
    assert text.count("<img") == 3
    assert lines(Resolved(found.config.model_copy(update={"recipe": None}))) == []
    foreseen = planned(asked(folder))
    assert foreseen.config.data == found.config.data
    assert recipe.FIRST in lines(foreseen)


def test_pictures_are_told_of_where_nothing_is_derived_or_all_was_before(
    services: dict[str, str], folder: Path, timed: list[RunConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    seen = "a folder with captions in .txt files beside the pictures: 40 pictures (40 looked at)"
    plain = Resolved(load_config("smoke", data={"kind": "folder", "path": str(folder)}))
    assert lines(plain) == []
    assert lines(looked(plain))[0].startswith(seen)
    assert page.checks(looked(plain), "run", [], "").count("<img") == 3
    for preset in ("smoke", "auto", "auto"):  # of the last one the sizes are kept
        begun = begin("job", **asked(folder) | {"preset": preset, "overrides": ""})
        told = capsys.readouterr().out
        assert told.count(seen) == 1, preset
        assert begun.page.count("<img") == 3
    again = resolved(asked(folder) | {"overrides": ""})
    assert again.look is None, "the last of them was looked at by the beginning"


def square(side: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (side, side), (200, 30, side)).save(buffer, "PNG")
    return buffer.getvalue()


def drawn(tmp_path: Path, sides: list[int]) -> dict[str, Any]:
    """Pictures of these sides, asked for; none of 0 can be read."""
    files = {f"{number}.png": square(side) if side else b"none" for number, side in enumerate(sides)}
    write(tmp_path / "icons", files | {f"{number}.txt": f"icon {number}" for number in range(len(sides))})
    return asked(tmp_path / "icons")


@pytest.mark.parametrize(
    ("sides", "least", "pictures"),
    [([8] * 20, 4, 20), ([20] * 19 + [8], 10, 19), ([300] * 19 + [15], 16, 19), ([300] * 20, 16, 20)],
)
def test_how_small_pictures_may_be_follows_from_those_that_are_there(
    tmp_path: Path, sides: list[int], least: int, pictures: int
) -> None:
    found = planned(drawn(tmp_path, sides), here=False)
    assert found.config.data.min_side == least
    assert found.look
    assert found.look.survey.pictures == pictures, "as the ingest will count them"


def test_what_is_said_of_the_data_holds_for_the_look(tmp_path: Path) -> None:
    small = drawn(tmp_path, [8] * 20)
    for said, name in (("data.min_side=9", "min_side 9"), ("data.max_pixels=63", "max_pixels 63")):
        with pytest.raises(UserError, match=f"none of the 20 .* 20 x 8x8 pixels .* {name}"):
            planned(small | {"overrides": said}, here=False)
    found = planned(small | {"overrides": "data.min_side=8"}, here=False)
    assert found.config.data.min_side == 8


def test_where_more_are_bad_than_may_be_nothing_is_derived(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = drawn(tmp_path, ([0] * 3 + [40] * 7) * 4)  # three of ten cannot be read
    with pytest.raises(
        UserError,
        match=r"^data: 30% of 40 pictures that were looked at .* data.max_bad_share 0.25: 12 x not one of"
        r" JPEG, PNG, WEBP \(0.png\); .*, or leave the others out by --set data.max_bad_share=0.4$",
    ):
        planned(data, here=False)
    assert planned(data | {"overrides": "data.max_bad_share=0.4"}, here=False).config
    monkeypatch.setattr(survey, "MOST", 20)
    assert planned(data, here=False).config, "so many of twenty are chance, if a quarter may be of all"
    for number in range(40):
        write(tmp_path / "icons", {f"{number}.png": square(40) if number % 4 == 0 else b"none"})
    with pytest.raises(UserError, match=r"^data: [678].% of 20 pictures"):
        planned(data, here=False)


def test_a_registered_model_keeps_its_sizes_whatever_the_pictures_are_now(
    services: dict[str, str], folder: Path, timed: list[RunConfig], version: Version, name: str
) -> None:
    mine = asked(folder, f"model_name={name}", "tokenizer.codebook_size=64", "data.image_size=16")
    before = resolved(mine).config
    version(before, 1)
    later = resolved(asked(folder, f"model_name={name}"))
    assert later.said == (f"sizes are those of version 1 of {name}",)
    assert later.config == before, "although the codebook is named no more"
    assert len(timed) == 1

    longer = resolved(asked(folder, f"model_name={name}", "recipe.minutes=30")).config
    assert len(timed) == 2
    assert (longer.tokenizer.kind, longer.tokenizer.vocabulary) == ("vqvae", 64)  # type: ignore[union-attr]
    assert longer.data.image_size == 16
    assert longer.transformer
    assert before.transformer
    assert longer.transformer.depth == before.transformer.depth
    assert longer.transformer.training.steps > 1.5 * before.transformer.training.steps
    deeper = resolved(asked(folder, f"model_name={name}", "transformer.depth=5")).config
    assert deeper.transformer
    assert deeper.transformer.depth == 5, "whoever says a size has it"


def test_a_name_that_nobody_chose_is_not_shared_by_other_pictures(
    services: dict[str, str], folder: Path, timed: list[RunConfig], version: Version, name: str
) -> None:
    where = folder.rename(folder.parent / name.removeprefix("latent-gpt-"))  # which the model is called after
    config = resolved(asked(where)).config
    assert config.registered_model == name
    theirs = config.model_dump(mode="json")
    theirs["data"]["source"]["path"] = "/elsewhere/flags"
    version(parse_config(theirs), 1)
    with pytest.raises(UserError, match=f"{name} is the model of other pictures .*/elsewhere/flags.*; say"):
        resolved(asked(where))
    assert resolved(asked(where, f"model_name={name}")).said, "as the refusal says"
    assert resolved(asked(where, f"model_name={name}-2")).config.registered_model == f"{name}-2"


def test_the_tokenizer_alone_is_derived_as_well(
    services: dict[str, str], folder: Path, timed: list[RunConfig]
) -> None:
    found = resolved(asked(folder) | {"pipeline": VQVAE})
    assert found.config.transformer is None
    assert found.config.tokenizer.training.steps > 300  # type: ignore[union-attr]


def test_until_when_there_is_time_is_said_anew_by_each_run(
    services: dict[str, str], folder: Path, timed: list[RunConfig]
) -> None:
    def until(found: Resolved) -> float:
        recipe = with_end(found, 1000.0).config.recipe
        assert recipe
        return recipe.until

    found = resolved(asked(folder))
    assert 1000 + 400 < until(found) < 1000 + 600
    assert until(resolved(asked(folder))) == until(found), "of what is kept, too"
    stale = found.config.recipe.model_copy(update={"minutes": 0.0, "until": 5.0})  # type: ignore[union-attr]
    assert until(Resolved(found.config.model_copy(update={"recipe": stale}))) == 0
    assert until(resolved(asked(folder, "transformer.training.steps=500"))) == 0, (
        "whoever says steps has them"
    )


def test_a_model_that_exists_has_its_minutes_and_the_steps_that_somebody_says_now(
    services: dict[str, str], folder: Path, timed: list[RunConfig], version: Version, name: str
) -> None:
    first = with_end(resolved(asked(folder, f"model_name={name}")), 1000.0)
    version(first.config, 1)
    again = with_end(resolved(asked(folder, f"model_name={name}")), 2000.0)
    assert again.config.recipe
    assert first.config.recipe
    assert again.config.recipe.until == first.config.recipe.until + 1000
    steps = ("transformer.training.steps=700", "transformer.training.batch_size=32")
    for minutes in (10, 30):
        given = with_end(
            resolved(asked(folder, f"model_name={name}", f"recipe.minutes={minutes}", *steps)), 0
        )
        assert given.config.transformer
        training = given.config.transformer.training
        assert (training.steps, training.batch_size) == (700, 32), minutes
        assert given.config.recipe
        assert given.config.recipe.until == 0
    whole = yaml.safe_dump(first.config.model_dump(mode="json"))
    text = {"pipeline": TEXT_TO_IMAGE, "preset": "auto", "config": whole}
    assert with_end(resolved(text), 2000.0).config == again.config, "as a retraining has it"
    exact = with_end(resolved(text | {"overrides": steps[0]}), 2000.0).config
    assert exact.recipe
    assert exact.recipe.until == 0
    assert "steps" not in STEPS["transformer"].settings(exact)
    assert STEPS["transformer"].settings(again.config)["steps"] == "fitted to the time"


def test_a_schedule_has_its_minutes_from_the_first_training_on(
    services: dict[str, str], folder: Path, timed: list[RunConfig], version: Version, name: str
) -> None:
    def seen(overrides: str) -> RunConfig:
        config = look(name, "", asked(folder) | {"overrides": f"model_name={name}\n{overrides}"}).config
        whole = yaml.safe_dump(config.model_dump(mode="json"))
        run = with_end(resolved({"pipeline": TEXT_TO_IMAGE, "preset": "", "config": whole}), 5e9).config
        assert parts(config) == parts(run), "the next look is to find what the run notes of itself"
        return run

    first = seen("recipe.minutes=10")
    assert first.recipe
    assert first.recipe.until > 5e9
    version(first, 1)
    by_effort = seen("recipe.minutes=0\nrecipe.effort=2")
    assert by_effort.recipe
    assert by_effort.recipe.until == 0


def test_hardware_is_timed_by_a_job_where_the_run_has_its_minutes(
    services: dict[str, str], folder: Path
) -> None:
    small = [
        *("transformer.depth=1", "transformer.width=16", "transformer.heads=2", "tokenizer.width=8"),
        *("clip.text_layers=1", "clip.vision_layers=1", "jobs.processes_per_worker=1"),
    ]
    found = planned(asked(folder, *small, "recipe.minutes=200"))  # enough for a machine that is busy
    assert 170 < sum(part.seconds for part in found.parts) / 60 < 210
    training = found.config.tokenizer.training  # type: ignore[union-attr]
    assert training.steps > 300
