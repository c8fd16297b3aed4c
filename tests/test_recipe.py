"""Sizes and steps that are derived: what they follow from, what is kept, what is refused."""

import re
import unicodedata
from dataclasses import replace
from typing import Any

import pytest

from model import recipe
from model.config import GateConfig, load_config, parse_config
from model.errors import UserError
from model.evaluation.gate import prompts_needed
from model.recipe import HARDWARE, Derived, Memory, Speeds, Survey, derive, refit

SURVEY = Survey(3000, True, 300, 0.02, 300.0, 0.0, 2800, 4.0, 0.004)
CPU = Speeds(
    2.1, {"tokenizer": 0.022, "text": 0.05, "judge": 0.05, "transformer": 0.12}, 0.001, 0.02, spent=20
)
FOLDER = {"kind": "folder", "path": "/pictures/flags"}


def values(**sections: Any) -> dict[str, Any]:
    base = {"recipe": {}, "data": {"source": FOLDER}, "jobs": {"processes_per_worker": 2}}
    return base | sections


def derived(survey: Survey = SURVEY, speeds: Speeds | None = CPU, **sections: Any) -> Derived:
    found = derive(values(**sections), survey, speeds)
    parse_config(found.values)
    return found


def of(found: Derived, path: str) -> Any:
    node: Any = found.values
    for name in path.split("."):
        node = node[name]
    return node


@pytest.mark.parametrize(("pictures", "minutes"), [(60, 5), (300, 10), (3000, 25), (30_000, 60)])
@pytest.mark.parametrize("speed", [0.5, 1.0, 2.0])
def test_the_minutes_are_filled_whatever_the_speed(pictures: int, minutes: int, speed: float) -> None:
    step = {name: seconds / speed for name, seconds in CPU.step.items()}
    found = derived(replace(SURVEY, pictures=pictures), replace(CPU, step=step), recipe={"minutes": minutes})
    assert found.minutes == pytest.approx(minutes, rel=0.1)


@pytest.mark.parametrize(("pictures", "minutes"), [(60, 5), (300, 9.5), (3000, 24), (30_000, 60)])
def test_effort_1_is_the_usual_time_for_so_many_pictures(pictures: int, minutes: float) -> None:
    found = derived(replace(SURVEY, pictures=pictures))
    assert found.minutes == pytest.approx(minutes, rel=0.1)
    twice = derived(replace(SURVEY, pictures=pictures), recipe={"effort": 2})
    assert twice.minutes == pytest.approx(2 * minutes, rel=0.1)


def test_more_minutes_or_hardware_make_larger_nets_and_no_smaller_ones() -> None:
    def weights(found: Derived) -> int:
        net = found.values["transformer"]
        return int(net["depth"] * net["width"] ** 2)

    by_minutes = [weights(derived(recipe={"minutes": minutes})) for minutes in (5, 25, 120, 1000)]
    assert by_minutes == sorted(by_minutes)
    assert by_minutes[0] < by_minutes[-1]
    cores = {
        cpu: weights(derived(jobs={"cpu": cpu}, recipe={"minutes": 25})) for cpu in ("2", "64", "64000m")
    }
    assert by_minutes[1] == cores["2"] < cores["64"] == cores["64000m"]
    gpus = {"gpus_per_worker": 1, "processes_per_worker": 1}
    assert weights(derived(jobs=gpus, recipe={"minutes": 25})) > by_minutes[1]
    eight = {"gpus_per_worker": 8, "processes_per_worker": 8, "workers": 2}
    many, fast, hours = replace(SURVEY, pictures=10**6), replace(CPU, encode=1e-5), {"minutes": 600}
    on_sixteen = weights(derived(replace(many, seconds=1e-4), fast, jobs=eight, recipe=hours))
    assert on_sixteen > weights(derived(replace(many, seconds=1e-4), fast, jobs=gpus, recipe=hours))


@pytest.mark.parametrize("hardware", ["cpu", *(kind for kind in HARDWARE if kind != "cpu")])
@pytest.mark.parametrize("minutes", [6, 60, 6000])
@pytest.mark.parametrize("side", [20.0, 48.0, 90.0, 2000.0])
@pytest.mark.parametrize("pictures", [20, 2_000, 5_000_000])
def test_whatever_is_derived_is_a_config(hardware: str, minutes: int, side: float, pictures: int) -> None:
    jobs = {"gpus_per_worker": 4, "processes_per_worker": 4, "gpu": hardware, "workers": 3}
    survey = replace(SURVEY, side=side, pictures=pictures, seconds=1e-6, length=40.0)
    found = derived(
        survey, replace(CPU, encode=1e-6), recipe={"minutes": minutes}, jobs=jobs if hardware != "cpu" else {}
    )
    assert of(found, "data.image_size") <= max(32, 1.25 * side)
    reasons = [choice.reason for choice in found.choices]
    assert all(reasons)
    fields = [choice.field for choice in found.choices]
    assert len(fields) == len(set(fields)), "each is chosen once"


@pytest.mark.parametrize(
    ("given", "path", "value"),
    [
        ({"data": {"source": FOLDER, "image_size": 64}}, "data.image_size", 64),
        ({"tokenizer": {"codebook_size": 32}}, "tokenizer.codebook_size", 32),
        ({"tokenizer": {"factor": 8, "stem": 1, "multipliers": [1, 1, 2, 2]}}, "tokenizer.factor", 8),
        ({"tokenizer": {"factor": 16}}, "tokenizer.factor", 16),
        ({"transformer": {"width": 96}}, "transformer.width", 96),
        ({"transformer": {"training": {"steps": 500}}}, "transformer.training.steps", 500),
        ({"clip": {"kind": "pretrained"}}, "clip.kind", "pretrained"),
        ({"tokenizer": {"kind": "pretrained", "ref": "a/b"}}, "tokenizer.ref", "a/b"),
        ({"transformer": None}, "transformer", None),
        ({"evaluation": {"pictures": 10}}, "evaluation.pictures", 10),
        ({"name": "x"}, "name", "x"),
    ],
)
def test_every_value_can_be_set_and_the_others_go_by_it(given: dict[str, Any], path: str, value: Any) -> None:
    found = derived(recipe={"minutes": 20}, **given)
    assert of(found, path) == value
    if (choice := next((one for one in found.choices if one.field == path), None)) is not None:
        assert choice.given
    assert found.minutes == pytest.approx(20, rel=0.1) or path in (
        "transformer",
        "transformer.training.steps",
    )


@pytest.mark.parametrize("side", [32, 64, 256])
def test_what_a_plan_prints_may_be_said_and_changes_nothing(side: int) -> None:
    sections: dict[str, Any] = {"recipe": {"minutes": 6000 if side == 256 else 25 * side / 32}}
    sections["data"] = {"source": FOLDER, "image_size": side}
    sections["jobs"] = {"gpus_per_worker": side == 256 and 4}
    survey, speeds = replace(SURVEY, side=1.0 * side), replace(CPU, encode=1e-4)
    found = derived(survey, speeds, **sections)
    for choice in found.choices:
        section, _, name = choice.field.partition(".")
        if section in ("recipe", "sweep") or not name:  # who says a sweep has that one, and no other
            continue
        *parents, leaf = name.split(".")
        said: dict[str, Any] = {leaf: choice.value}
        for parent in reversed(parents):
            said = {parent: said}
        again = derived(survey, speeds, **sections | {section: sections.get(section, {}) | said})
        assert again.values == found.values, choice


@pytest.mark.parametrize(
    ("given", "shape"),
    [
        ({}, (4, 2, [1, 2])),
        ({"factor": 8}, (8, 2, [1, 2, 2])),
        ({"factor": 16}, (16, 2, [1, 2, 2, 2])),
        ({"stem": 1}, (4, 1, [1, 2, 2])),
        ({"stem": 4}, (4, 4, [1])),
        ({"multipliers": [1, 2, 4]}, (4, 1, [1, 2, 4])),
        ({"multipliers": [1, 2, 2, 4]}, (8, 1, [1, 2, 2, 4])),
        ({"multipliers": [1, 3], "factor": 8}, (8, 4, [1, 3])),
    ],
)
def test_a_tokenizer_is_as_near_to_the_tables_as_what_is_said_allows(
    given: dict[str, Any], shape: tuple[Any, ...]
) -> None:
    found = derived(tokenizer=given)
    names = ("factor", "stem", "multipliers")
    assert tuple(of(found, f"tokenizer.{name}") for name in names) == shape
    for choice in found.choices:
        name = choice.field.removeprefix("tokenizer.")
        if name in names and name not in given:
            usual = choice.value == recipe.TOKENIZERS[32, False][name]
            assert choice.reason.startswith("tuned" if usual else "nearest")
    large = derived(tokenizer={"factor": 8}, data={"source": FOLDER, "image_size": 64})
    assert of(large, "tokenizer.stem") == 2, "as it is tuned"
    odd = derived(data={"source": FOLDER, "image_size": 52})
    assert of(odd, "tokenizer.factor") == 4, "which divides 52"


@pytest.mark.parametrize(("width", "heads"), [(96, 3), (200, 5), (404, 1), (384, 6), (1280, 20)])
def test_heads_go_by_the_width(width: int, heads: int) -> None:
    assert of(derived(transformer={"width": width}), "transformer.heads") == heads
    learned = derived(transformer={"width": 30, "positions": "learned"})
    assert of(learned, "transformer.heads") == 1


@pytest.mark.parametrize(("side", "least"), [(3, 4), (8, 4), (20, 10), (30.5, 15), (32, 16), (500, 16)])
def test_small_pictures_are_left_out_where_most_are_larger(side: float, least: int) -> None:
    assert of(derived(replace(SURVEY, side=side)), "data.min_side") == least


@pytest.mark.parametrize(("gpus", "processes"), [(0, 2), (1, 1), (8, 8)])
def test_there_is_a_process_for_each_gpu(gpus: int, processes: int) -> None:
    config = load_config("auto", [f"jobs.gpus_per_worker={gpus}"], FOLDER)
    assert config.jobs.processes_per_worker == processes
    kind = "a100" if gpus else "cpu"
    assert config.recipe
    assert config.recipe.fitted == f"effort 1 on {processes} x {kind}"


@pytest.mark.parametrize(
    "setting",
    [*("workers=two", "workers=null", "workers=0", "gpu=[1]"), *("min_workers=.inf", "min_workers=-1")],
)
def test_hardware_that_is_none_is_refused_by_name(setting: str) -> None:
    with pytest.raises(UserError, match=f"jobs.{setting.partition('=')[0]}"):
        load_config("auto", [f"jobs.{setting}"], FOLDER)


def test_few_pictures_get_no_large_net_however_many_gpus_there_are() -> None:
    gpus = {"gpus_per_worker": 8, "processes_per_worker": 8}
    depth, width = (
        of(derived(replace(SURVEY, pictures=60), jobs=gpus, recipe={"minutes": 600}), f"transformer.{one}")
        for one in ("depth", "width")
    )
    assert 16 * depth * width**2 <= 1.2 * 200 * 60 * (128 // 8) ** 2


def test_a_batch_that_does_not_fit_a_gpu_is_taken_in_parts() -> None:
    gpus = {"gpus_per_worker": 2, "processes_per_worker": 2, "gpu": "l4"}
    needs = {"transformer": Memory(4 * 2**30, 2**30 / 4)}  # 32 GiB for its share of 128
    found = derive(values(jobs=gpus, recipe={"minutes": 600}), SURVEY, CPU, needs)
    assert parse_config(found.values).transformer
    assert (of(found, "transformer.training.accumulate"), of(found, "tokenizer.training.accumulate")) == (
        4,
        1,
    )
    assert of(found, "transformer.training.batch_size") == 256


def test_a_clip_that_does_not_fit_a_gpu_has_a_smaller_batch() -> None:
    needs = {"text": Memory(2**30, 2**30)}
    found = derive(values(jobs={"gpus_per_worker": 1, "gpu": "l4"}), SURVEY, None, needs)
    parse_config(found.values)
    assert of(found, "clip.training.accumulate") == 1
    batch = of(found, "clip.training.batch_size")
    assert 1 + batch <= 0.8 * HARDWARE["l4"]["memory"] / 2**30 < 1 + 2 * batch


def test_where_a_token_does_not_say_where_it_lies_the_order_is_raster() -> None:
    assert of(derived(), "transformer.random_order") == 0.9
    found = derived(transformer={"positions": "learned"})
    assert "random_order" not in found.values["transformer"]


def test_a_codebook_grows_with_the_pictures_up_to_what_their_size_can_use() -> None:
    sizes = [
        of(derived(replace(SURVEY, pictures=pictures), recipe={"minutes": 60}), "tokenizer.codebook_size")
        for pictures in (20, 60, 300, 100_000)
    ]
    assert sizes == [128, 128, 256, 256]


def test_some_are_held_out_however_few_there_are() -> None:
    for pictures, least in ((20, 4), (60, 12), (300, 12), (30_000, 900)):
        share = of(
            derived(replace(SURVEY, pictures=pictures), recipe={"minutes": 60}), "data.validation_share"
        )
        assert share * pictures >= least


@pytest.mark.parametrize("pictures", [25, 60, 300, 3000, 30_000, 10**6])
def test_there_are_prompts_enough_for_the_margin(pictures: int) -> None:
    found = derived(replace(SURVEY, pictures=pictures, seconds=1e-5), replace(CPU, encode=1e-6))
    measured = of(found, "evaluation.pictures")
    held_out = min(measured, of(found, "data.validation_share") * pictures)
    seen = min(measured, pictures - held_out)
    margin = of(found, "gate.margin")
    assert prompts_needed(0.5, margin, GateConfig().confidence) <= held_out + seen
    assert margin <= 0.3


def test_too_few_minutes_are_refused_with_what_would_do() -> None:
    with pytest.raises(
        UserError, match=r"recipe.minutes: 1 minutes are too few: .*; \d+ would do"
    ) as refused:
        derived(recipe={"minutes": 1})
    enough = int(str(refused.value).split("; ")[1].split()[0])
    assert derived(recipe={"minutes": enough}).parts


def test_what_would_do_is_not_refused_again() -> None:
    slow = replace(CPU, step={net: 20 * seconds for net, seconds in CPU.step.items()})
    for minutes in (8, 12):
        with pytest.raises(UserError, match=r"minutes are too few: the fewest steps") as refused:
            derived(speeds=slow, recipe={"minutes": minutes})
        enough = int(str(refused.value).split("; ")[1].split()[0])
        assert derived(speeds=slow, recipe={"minutes": enough}).minutes <= recipe.BEYOND * enough


def test_steps_that_are_given_and_minutes_that_they_exceed_are_refused() -> None:
    steps = {"training": {"steps": 100_000}}
    with pytest.raises(UserError, match="or those that are given, take 2"):
        derived(recipe={"minutes": 20}, transformer=steps)
    assert derived(recipe={}, transformer=steps).minutes > 200, "who names no minutes has them"


def test_a_sweep_of_temperatures_alone_takes_its_time() -> None:
    swept = derived(recipe={"minutes": 25}, sweep={"temperature": [0.7, 1.0], "prompts": 64})
    (part,) = (part for part in swept.parts if part.name == recipe.SWEEP)
    assert part.seconds > 2 * 64 * CPU.draw


def test_views_of_each_picture_are_encoded_in_time() -> None:
    slow = replace(CPU, encode=0.01)
    found = derived(speeds=slow, recipe={"minutes": 60})
    views = of(found, "data.augment.views")
    assert views > 2
    (tokens,) = (part for part in found.parts if part.name == "tokens")
    assert tokens.seconds > views * SURVEY.pictures * slow.encode
    assert found.minutes == pytest.approx(60, rel=0.1)


@pytest.mark.parametrize("steps", [0, -5, "many", None, ".nan", ".inf", "[1]"])
def test_steps_that_are_none_are_refused_by_name(steps: Any) -> None:
    with pytest.raises(UserError, match=r"transformer\.training\.steps"):
        load_config("auto", [f"transformer.training.steps={'null' if steps is None else steps}"], FOLDER)


def test_so_little_effort_that_there_is_no_time_trains_as_little_as_makes_sense() -> None:
    found = derived(recipe={"effort": 0.001})
    for net, least in recipe.LEAST_STEPS.items():
        assert of(found, f"{net}.training.steps") == least


@pytest.mark.parametrize("effort", [0.001, 0.05, 0.1, 0.2, 1.0])
@pytest.mark.parametrize("pictures", [60, 300, 3000, 10**7])
def test_where_all_but_training_leaves_little_time_the_reasons_say_so(effort: float, pictures: int) -> None:
    found = derived(replace(SURVEY, pictures=pictures), recipe={"effort": effort})
    other = sum(part.seconds for part in found.parts if not part.name.endswith("'s steps")) / 60
    (said,) = (choice.reason for choice in found.choices if choice.field == "recipe.effort")
    assert ("raised" in said) == (other > 0.75 * float(said.split()[0])), "as with minutes"
    if "raised" in said:
        raised = float(said.partition("raised to ")[2].partition(":")[0])
        assert raised >= round(other * (1 + effort / 3), 1), "for training, a quarter of it at effort 1"
        assert said.endswith(f": what is no training takes {other:.1f}")
    for choice in found.choices:
        assert not re.search(r"-\d+(\.\d+)? minutes|\d{3}%|-\d+%", choice.reason), choice


def test_the_fewest_steps_that_make_sense_are_said_to_be_that() -> None:
    slow = replace(CPU, step={net: 50 * seconds for net, seconds in CPU.step.items()})
    found = derived(speeds=slow, recipe={"effort": 0.1})
    said = {choice.field: choice.reason for choice in found.choices}
    for net, least in recipe.LEAST_STEPS.items():
        assert of(found, f"{net}.training.steps") == least
        assert said[f"{net}.training.steps"].startswith("no fewer make sense, at ")


@pytest.mark.parametrize("said", ["abc", "[1]", "null", ".nan", ".inf", "-1", "1e400"])
@pytest.mark.parametrize("field", ["recipe.effort", "recipe.minutes"])
def test_a_dial_that_is_no_number_is_refused_by_name(field: str, said: str) -> None:
    with pytest.raises(UserError, match=f"{field}: Input should be"):
        load_config("auto", [f"{field}={said}"], FOLDER)


@pytest.mark.parametrize("gpus", [0, 1])
@pytest.mark.parametrize(("least", "unit"), [(0, 4), (1, 12), (2, 12), (3, 12), (4, 4)])
def test_a_batch_is_shared_by_whatever_number_of_workers_goes_on(gpus: int, least: int, unit: int) -> None:
    jobs = {"gpus_per_worker": gpus, "workers": 4, "min_workers": least, "processes_per_worker": 2}
    found = derived(jobs=jobs)
    for net in recipe.NETS:
        batch, usual = of(found, f"{net}.training.batch_size"), recipe.BATCHES[net][bool(gpus)]
        assert batch % (2 * unit) == 0
        assert usual - 2 * unit < batch <= max(usual, 2 * unit)


def test_a_batch_fits_on_the_fewest_workers_that_go_on() -> None:
    needs = {"transformer": Memory(0, 0.6 * 2**30)}  # 38 GiB for each of four, 77 for each of two
    jobs = {"gpus_per_worker": 1, "workers": 4}
    for least, parts in ((0, 1), (2, 2)):
        found = derive(values(jobs=jobs | {"min_workers": least}), SURVEY, CPU, needs)
        assert of(found, "transformer.training.accumulate") == parts


def test_a_dial_that_turns_nothing_is_refused() -> None:
    with pytest.raises(UserError, match="says the steps of each net itself"):
        load_config("shapes-tiny", ["recipe.minutes=10"])


def test_who_says_all_steps_and_turns_no_dial_has_the_rest_derived() -> None:
    found = derived(**{net: {"training": {"steps": 10}} for net in recipe.NETS})
    assert of(found, "transformer.depth") > 0


def test_until_the_pictures_are_seen_a_config_has_its_form_and_says_that_nothing_is_derived() -> None:
    config = load_config("auto", data=FOLDER)
    assert config.recipe
    assert config.recipe.version == 0
    assert config.registered_model == "latent-gpt-flags"
    assert load_config("auto").name == "openmoji-tiny", "who names no data"
    whole = load_config("auto", ["data={image_size: 64, source: {kind: folder, path: /home/me/flags}}"])
    assert whole.registered_model == "latent-gpt-flags"


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ({"kind": "folder", "path": "/home/me/My Birds/"}, "latent-gpt-my-birds"),
        ({"kind": "folder", "path": "/data/birds/train"}, "latent-gpt-birds"),
        ({"kind": "webdataset", "urls": "s3://bucket/birds/{00000..00099}.tar"}, "latent-gpt-birds"),
        ({"kind": "parquet", "path": "s3://birds/data/*.parquet"}, "latent-gpt-birds"),
        ({"kind": "folder", "path": "/Vögel"}, "latent-gpt-v-gel"),
        ({"kind": "folder", "path": "/data"}, "latent-gpt-data"),
        ({"kind": "folder", "path": "/home/me/pictures"}, "latent-gpt-pictures"),
        ({"kind": "folder", "path": "/Users/me"}, "latent-gpt-folder"),
        ({"kind": "folder", "path": "/root/birds/img"}, "latent-gpt-birds"),
        ({"kind": "folder", "path": "/home/me/фото"}, "latent-gpt-pictures-5cea44"),
        ({"kind": "folder", "path": "/home/me/ドラゴン/train"}, "latent-gpt-pictures-1a74dc"),
        ({"kind": "folder", "path": unicodedata.normalize("NFD", "/ドラゴン")}, "latent-gpt-pictures-1a74dc"),
        ({"kind": "folder", "path": "/отпуск 2024"}, "latent-gpt-2024-63e895"),
        ({"kind": "folder", "path": "/birds/2024"}, "latent-gpt-2024"),
        ({"kind": "folder", "path": "s3://bucket/home/me/birds"}, "latent-gpt-birds"),
    ],
)
def test_a_model_is_named_after_its_pictures(source: dict[str, Any], name: str) -> None:
    assert parse_config(derived(data={"source": source}).values).registered_model == name


def test_refitted_for_other_minutes_or_hardware_sizes_stay_and_steps_change() -> None:
    first = derived(recipe={"minutes": 10})
    stored = parse_config(first.values).model_dump(mode="json")
    assert recipe.fitted(stored) == stored["recipe"]["fitted"] == "10 minutes on 2 x cpu"
    stored["recipe"]["minutes"] = 40
    stored["jobs"] |= {"workers": 3}
    assert recipe.fitted(stored) == "40 minutes on 6 x cpu"
    second = refit(stored, SURVEY, CPU, {})
    config = parse_config(second.values)
    assert second.minutes == pytest.approx(40, rel=0.1)
    assert config.transformer
    assert config.transformer.training.steps > 3 * of(first, "transformer.training.steps")
    assert config.transformer.training.batch_size % 6 == 0
    changed = {choice.field.rpartition(".")[2] for choice in second.choices}
    assert changed <= {
        *(
            "steps",
            "batch_size",
            "accumulate",
            "warmup_steps",
            "log_every",
            "eval_every",
            "checkpoint_every",
            "ema",
        ),
        "minutes",
    }
    for path in ("tokenizer.codebook_size", "data.image_size", "transformer.depth", "transformer.dropout"):
        assert of(second, path) == of(first, path)


def test_what_is_given_now_no_refit_changes() -> None:
    stored = parse_config(derived(recipe={"minutes": 10}).values).model_dump(mode="json")
    stored["recipe"]["minutes"] = 40
    stored["transformer"]["training"] |= {"steps": 77, "batch_size": 10}
    given = {"transformer.training.steps", "transformer.training.batch_size"}
    found = refit(stored, SURVEY, CPU, {}, given.__contains__)
    assert {of(found, field) for field in given} == {77, 10}
    assert given <= {choice.field for choice in found.choices if choice.given}
    assert of(refit(stored, SURVEY, CPU, {}), "transformer.training.steps") > 1000
