"""Every rule of the config: what is refused, and the line that says so, with the field and both figures."""

import random
import re
from functools import reduce
from itertools import takewhile
from pathlib import Path
from typing import get_args

import pytest
import torch

from model.config import (
    PRESETS,
    OpenMojiSource,
    RecipeConfig,
    RunConfig,
    Section,
    TrainedCLIPConfig,
    VQVAEConfig,
    config_hash,
    load_config,
    parse_config,
    preset_names,
)
from model.errors import UserError
from model.nets.clip import architecture, build_clip
from model.nets.gpt import GPT
from model.nets.vqvae import VQVAE

GPT2 = [f"transformer.{one}" for one in ("arch=gpt2", "mlp=gelu", "positions=learned", "qk_norm=false")]
GPT2_NEEDS = "transformer: arch gpt2 needs mlp: gelu, positions: learned, qk_norm: false"
LEVELS = "tokenizer: the product of fsq_levels, which is the codebook size, must be 2 to 1048576"
BETAS, BELOW_1 = "transformer.training.betas", "Input should be less than 1"
RULES = {  # overrides of `smoke`, and what is said
    "warm-up": (
        ["clip.training.warmup_steps=3"],
        "clip.training: warmup_steps (3) must be smaller than steps (3)",
    ),
    "accumulate": (
        ["transformer.training.accumulate=3"],
        "transformer.training: batch_size (8) must be a multiple of accumulate (3)",
    ),
    "a limit below the request": (
        ["jobs.cpu=1500m", "jobs.cpu_limit=1"],
        "jobs: cpu_limit (1) must be at least cpu (1500m), or empty",
    ),
    "accumulate of a CLIP": (
        ["clip.training.accumulate=2"],
        "clip: training.accumulate (2) must be 1, as captions are told apart within the whole batch; lower"
        " training.batch_size instead",
    ),
    "order without places": (
        ["transformer.positions=learned", "transformer.random_order=0.9"],
        "transformer: random_order and random_order_left need positions: rope2d, by which a token says where"
        " it lies",
    ),
    "oracle of photographs": (
        ["data.source={kind: folder, path: pictures}", "gate.metric=oracle"],
        "gate.metric oracle reads drawn shapes alone, and data.source.kind is folder; take auto, retrieval or"
        " clip_score",
    ),
    "levels": (
        ["tokenizer.multipliers=[1, 2]"],
        "tokenizer: multipliers has 2 entries; factor 4 with stem 1 needs 3",
    ),
    "levels with a stem": (
        ["data.image_size=32", "tokenizer.factor=16", "tokenizer.stem=2"],
        "tokenizer: multipliers has 3 entries; factor 16 with stem 2 needs 4",
    ),
    "value range": (
        ["tokenizer.value_range=[1.0, 1.0]"],
        "tokenizer: value_range [1.0, 1.0] must be [low, high] with low below high",
    ),
    "levels of no codes": (["tokenizer.quantizer=fsq", "tokenizer.fsq_levels=[]"], LEVELS),
    "levels of a trillion codes": (
        ["tokenizer.quantizer=fsq", "tokenizer.fsq_levels=[1000000, 1000000]"],
        LEVELS,
    ),
    "heads": (
        ["transformer.width=18", "transformer.heads=4"],
        "transformer: width (18) must be a multiple of heads (4)",
    ),
    "rotary positions": (
        ["transformer.width=12"],
        "transformer: rope2d needs width / heads (6) to be a multiple of 4",
    ),
    "gpt2 without gelu": ([*GPT2, "transformer.mlp=swiglu"], GPT2_NEEDS),
    "gpt2 without learned positions": ([*GPT2, "transformer.positions=rope2d"], GPT2_NEEDS),
    "gpt2 with normed queries": ([*GPT2, "transformer.qk_norm=true"], GPT2_NEEDS),
    "side and factor": (
        ["data.image_size=24", "tokenizer.factor=16", "tokenizer.multipliers=[1, 1, 1, 1, 1]"],
        "data.image_size (24) must be a multiple of tokenizer.factor (16)",
    ),
    "side and patch": (
        ["data.image_size=20"],
        "data.image_size (20) must be a multiple of clip.patch_size (8)",
    ),
    "heads of the text": (
        ["clip.text_width=18", "clip.text_heads=4"],
        "clip: text_width (18) must be a multiple of text_heads (4)",
    ),
    "heads of the pictures": (["clip.vision_width=48"], "clip: vision_width (48) must be a multiple of 32"),
    "an empty prompt": (
        ["evaluation.prompts=['a red circle', ' ']"],
        "evaluation: prompts: one is empty; say what to draw, or leave the whole list empty",
    ),
    "a long prompt": (
        [f"evaluation.prompts=['{'x' * 1001}']"],
        "evaluation: prompts: one has 1001 characters; at most 1000 are read",
    ),
    "nothing held out": (
        ["data.validation_share=0"],
        "data.validation_share (0) holds no picture out; nets are judged on some, e.g. 0.05 of them",
    ),
    "nothing to train": (
        ["tokenizer={kind: pretrained, ref: somewhere}", "transformer=null"],
        "transformer: null leaves nothing to train when the tokenizer is pretrained",
    ),
    "ranks of the tokenizer": (
        ["jobs.workers=3", "clip.training.batch_size=6", "transformer.training.batch_size=6"],
        "tokenizer.training.batch_size (8) must be a multiple of processes x accumulate (6 x 1)",
    ),
    "ranks of the clip": (
        ["jobs.workers=3", "tokenizer.training.batch_size=6", "transformer.training.batch_size=6"],
        "clip.training.batch_size (8) must be a multiple of processes x accumulate (6 x 1)",
    ),
    "ranks of the transformer": (
        ["jobs.workers=3", "tokenizer.training.batch_size=6", "clip.training.batch_size=6"],
        "transformer.training.batch_size (8) must be a multiple of processes x accumulate (6 x 1)",
    ),
    "ranks and micro-batches": (
        ["transformer.training.accumulate=8"],
        "transformer.training.batch_size (8) must be a multiple of processes x accumulate (2 x 8)",
    ),
}
POSITIVE = [
    "data.source.count",
    "data.image_size",
    "data.min_side",
    "data.max_pixels",
    "data.shard_images",
    "data.augment.views",
    "clip.embed_dim",
    "clip.text_width",
    "clip.text_layers",
    "clip.text_heads",
    "clip.vision_width",
    "clip.vision_layers",
    "clip.patch_size",
    "tokenizer.width",
    "tokenizer.blocks",
    "tokenizer.codebook_size",
    "tokenizer.code_dim",
    "transformer.depth",
    "transformer.width",
    "transformer.heads",
    "transformer.training.steps",
    "transformer.training.batch_size",
    "transformer.training.accumulate",
    "transformer.training.learning_rate",
    "transformer.training.grad_clip",
    "transformer.training.log_every",
    "transformer.training.eval_every",
    "transformer.training.checkpoint_every",
    "sampling.top_p",
    "sampling.best_of",
    "evaluation.samples_per_prompt",
    "evaluation.pictures",
    "sweep.prompts",
    "jobs.workers",
    "jobs.processes_per_worker",
    "jobs.deadline_hours",
    "jobs.grace_seconds",
    "gate.margin",
]
NOT_NEGATIVE = [
    "transformer.training.patience",
    "transformer.training.warmup_steps",
    "transformer.training.weight_decay",
    "tokenizer.loss.perceptual",
    "tokenizer.loss.adversarial",
    "tokenizer.reset_after",
    "sampling.temperature",
    "sampling.top_k",
    "sampling.cfg_scale",
    "seed",
    "data.source.seed",
    "evaluation.seed",
    "gate.seed",
    "gate.less_held_out",
    "gate.more_bits_per_token",
    "gate.less_psnr",
    "gate.more_bundle_bytes",
    "gate.speed_ratio",
    "jobs.gpus_per_worker",
    "jobs.max_restarts",
    "jobs.min_workers",
    "jobs.pending_hours",
]
QUANTITIES = ["jobs.cpu", "jobs.cpu_limit", "jobs.memory", "jobs.shared_memory"]
# Of another preset.
RECIPE = [f"recipe.{name}" for name in ("effort", "minutes", "version", "after", "until")]
FRACTIONS = ["data.validation_share", "data.augment.scale"]
OWN_TESTS = ["clip.context_length", "gate.confidence", "jobs.orphan_minutes", "model_name", *RECIPE]
SHARES = [
    "data.max_bad_share",
    "data.augment.shift",
    "tokenizer.dropout",
    "tokenizer.loss.adversarial_from",
    "transformer.dropout",
    "transformer.condition_dropout",
    "transformer.random_order",
    "transformer.random_order_left",
    "transformer.training.final_lr_share",
    "transformer.training.ema",
    "gate.more_near_duplicates",
    "gate.max_near_duplicates.seen",
    "gate.max_near_duplicates.held_out",
    "gate.less_diversity",
]


def refused(*overrides: str, preset: str = "smoke") -> str:
    """What a person reads behind the name of the file and the overrides."""
    with pytest.raises(UserError) as caught:
        load_config(preset, overrides)
    (line,) = str(caught.value).splitlines()
    return line.partition(f" with {' '.join(overrides)}: ")[2]


@pytest.mark.parametrize(("overrides", "expected"), RULES.values(), ids=RULES.keys())
def test_settings_that_contradict_each_other_are_named_with_their_figures(
    overrides: list[str], expected: str
) -> None:
    assert refused(*overrides) == expected


def test_what_stands_just_inside_the_rules_is_taken() -> None:
    load_config("smoke", ["clip.training.warmup_steps=2", "transformer.training.accumulate=4"])
    load_config(
        "smoke", ["clip.vision_width=8", "data.background=[0, 255, 0]", f"evaluation.seed={2**62 - 1}"]
    )
    load_config("smoke", [f"evaluation.prompts=['{'x' * 1000}']"])
    load_config("smoke", ["tokenizer.stem=2", "tokenizer.multipliers=[1, 2]"])
    load_config("smoke", ["sampling.cfg_scale=1.0e+30", "sampling.temperature=1.0e-30"])
    load_config("smoke", ["tokenizer.quantizer=fsq", "tokenizer.fsq_levels=[1024, 1024]"])
    load_config("smoke", ["transformer.width=12", "transformer.positions=learned"])
    gpt2 = "{arch: gpt2, mlp: gelu, positions: learned, qk_norm: false, depth: 1, width: 18, heads: 2"
    load_config("smoke", [f"transformer={gpt2}, training: {{steps: 200, batch_size: 8}}}}"])


@pytest.mark.parametrize("field", POSITIVE)
def test_a_number_that_must_be_positive(field: str) -> None:
    assert refused(f"{field}=0") == f"{field}: Input should be greater than 0"


@pytest.mark.parametrize(
    ("field", "limit"),
    [
        ("transformer.depth", 256),
        ("transformer.width", 16_384),
        ("transformer.heads", 256),
        ("transformer.training.steps", 10**9),
        ("tokenizer.codebook_size", 2**20),
        ("clip.text_layers", 256),
        ("data.image_size", 16_384),
        ("data.augment.views", 256),
        ("evaluation.samples_per_prompt", 256),
        ("jobs.workers", 1024),
    ],
)
def test_what_no_machine_could_do_is_refused_before_it_is_tried(field: str, limit: int) -> None:
    for value in (limit + 1, 999_999_999_999):
        assert refused(f"{field}={value}") == f"{field}: Input should be less than or equal to {limit}"


@pytest.mark.parametrize("field", NOT_NEGATIVE)
def test_a_number_that_must_not_be_negative(field: str) -> None:
    assert refused(f"{field}=-1") == f"{field}: Input should be greater than or equal to 0"


@pytest.mark.parametrize("field", SHARES)
def test_a_share_is_between_0_and_1(field: str) -> None:
    assert refused(f"{field}=-0.1") == f"{field}: Input should be greater than or equal to 0"
    assert refused(f"{field}=1.1") == f"{field}: Input should be less than or equal to 1"


@pytest.mark.parametrize("field", FRACTIONS)
def test_a_share_that_may_not_be_all(field: str) -> None:
    assert refused(f"{field}=-0.1") == f"{field}: Input should be greater than or equal to 0"
    assert refused(f"{field}=1") == f"{field}: Input should be less than 1"


@pytest.mark.parametrize("field", QUANTITIES)
def test_a_quantity_is_one_of_kubernetes(field: str) -> None:
    assert refused(f"{field}=16GB").startswith(f"{field}: String should match pattern")
    section, name = field.split(".")
    enough = ["jobs.cpu_limit=4"]
    assert getattr(getattr(load_config("smoke", [*enough, f"{field}=4"]), section), name) == "4"


def test_an_orphan_is_not_called_one_before_a_lease_can_be_late_twice() -> None:
    assert (
        refused("jobs.orphan_minutes=1.5")
        == "jobs.orphan_minutes: Input should be greater than or equal to 2"
    )


def test_a_text_has_room_for_its_start_its_end_and_something_between() -> None:
    for value, bound in ((2, "greater than or equal to 3"), (5000, "less than or equal to 4096")):
        assert refused(f"clip.context_length={value}") == f"clip.context_length: Input should be {bound}"


def test_an_interval_holds_half_at_least_and_never_all() -> None:
    for value, bound in (("0.4", "greater than or equal to 0.5"), ("1", "less than or equal to 0.999")):
        assert refused(f"gate.confidence={value}") == f"gate.confidence: Input should be {bound}"


def test_a_job_that_goes_on_with_fewer_workers_can_divide_its_batches_among_them() -> None:
    load_config("smoke", ["jobs.workers=2", "jobs.min_workers=1"])
    assert "jobs.min_workers (2) is above jobs.workers (1)" in refused("jobs.min_workers=2")
    assert "must be a multiple of processes x accumulate (6 x 1)" in refused(
        "jobs.workers=4", "jobs.min_workers=2"
    )


def test_no_bound_of_a_field_is_left_out_of_these_tables() -> None:
    bounded = {
        (section, name)
        for section in sections(RunConfig)
        for name, field in section.model_fields.items()
        if field.metadata
    }
    config = load_config("smoke").model_copy(update={"recipe": RecipeConfig()})
    shown = {(OpenMojiSource, "limit")}  # of another preset, and among the values below
    for path in (*POSITIVE, *NOT_NEGATIVE, *SHARES, *FRACTIONS, *QUANTITIES, *OWN_TESTS):
        *parents, name = path.split(".")
        shown.add((type(reduce(getattr, parents, config)), name))
    assert bounded == shown


def sections(part: object) -> set[type[Section]]:
    """All sections that a type is made of."""
    if isinstance(part, type) and issubclass(part, Section):
        fields = part.model_fields.values()
        return {part}.union(*(sections(field.annotation) for field in fields))
    return set().union(*map(sections, get_args(part)))


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("sampling.top_p=1.5", "sampling.top_p: Input should be less than or equal to 1"),
        ("tokenizer.factor=5", "tokenizer.factor: Input should be 4, 8 or 16"),
        ("tokenizer.stem=8", "tokenizer.stem: Input should be 1, 2 or 4"),
        ("tokenizer.fsq_levels=[8, 1]", "tokenizer.fsq_levels.1: Input should be greater than 1"),
        ("transformer.training.betas=[1.5, 2.0]", f"{BETAS}.0: {BELOW_1}; {BETAS}.1: {BELOW_1}"),
        ("transformer.training.betas=[0.9, 1.0]", f"{BETAS}.1: {BELOW_1}"),
        (
            "data.source={kind: openmoji, limit: -5}",
            "data.source.limit: Input should be greater than or equal to 0",
        ),
        ("tokenizer.multipliers=[1, 0, 1]", "tokenizer.multipliers.1: Input should be greater than 0"),
        ("tokenizer.loss.pixel=l3", "tokenizer.loss.pixel: Input should be 'l1' or 'l2'"),
        ("data.fit=stretch", "data.fit: Input should be 'crop' or 'pad'"),
        ("data.source.shapes_per_image=3", "data.source.shapes_per_image: Input should be 1 or 2"),
        ("transformer.keep=first", "transformer.keep: Input should be 'best' or 'last'"),
        ("data.background=[0, 256, 0]", "data.background.1: Input should be less than or equal to 255"),
        ("data.background=[0, 0, -1]", "data.background.2: Input should be greater than or equal to 0"),
        (f"evaluation.seed={2**62}", f"evaluation.seed: Input should be less than {2**62}"),
        (
            "sweep.cfg_scale=[1, -1]",
            "sweep.cfg_scale.1: Input should be greater than or equal to 0",
        ),
        ("sampling.cfg_scale=1.0e+39", f"sampling.cfg_scale: Input should be less than or equal to {10**30}"),
        ("sampling.temperature=1.0e-40", "sampling.temperature: Input should be 0, or 1e-30 at least"),
        ("sweep.temperature=[1.0e-40]", "sweep.temperature.0: Input should be 0, or 1e-30 at least"),
        ("sampling.temperature=.inf", "sampling.temperature: Input should be a finite number"),
        ("sampling.cfg_scale=.nan", "sampling.cfg_scale: Input should be a finite number"),
        ("evaluation.cfg_sweep=[1, 2]", "evaluation.cfg_sweep: unknown key"),
        ("sweep.cfg_scale=[1, .inf]", "sweep.cfg_scale.1: Input should be a finite number"),
        ("tokenizer.beta=.nan", "tokenizer.beta: Input should be a finite number"),
        ("seed=1.5", "seed: Input should be a valid integer, got a number with a fractional part"),
        (
            "model_name=a/b",
            "model_name: String should match pattern '^([A-Za-z0-9][A-Za-z0-9._-]*)?$'",
        ),
        ("name=null", "name: Input should be a valid string"),
    ],
)
def test_a_value_of_another_kind_is_refused_with_the_ones_that_are_right(
    override: str, expected: str
) -> None:
    assert refused(override) == expected


@pytest.mark.parametrize(
    ("section", "kinds"),
    [
        ("tokenizer", "'vqvae', 'pretrained'"),
        ("clip", "'trained', 'pretrained'"),
        ("data.source", "'openmoji', 'shapes', 'folder', 'webdataset', 'parquet', 'archive', 'hub'"),
    ],
)
def test_an_unknown_kind_of_a_section_comes_with_the_known_ones(section: str, kinds: str) -> None:
    said = refused(f"{section}.kind=odd")
    assert said.startswith(f"{section}: Input tag 'odd'")
    assert said.endswith(kinds)


@pytest.mark.parametrize(
    "key",
    ["sed", "data.imagesize", "data.source.cuont", "tokenizer.loss.pixels", "clip.training.lr", "jobs.gpus"],
)
def test_an_unknown_key_is_refused_at_any_depth(key: str) -> None:
    assert refused(f"{key}=1") == f"{key}: unknown key"


def test_several_problems_are_one_line() -> None:
    assert refused("data.imagesize=1", "sampling.top_p=2") == (
        "data.imagesize: unknown key; sampling.top_p: Input should be less than or equal to 1"
    )


def test_a_section_that_is_missing_is_named() -> None:
    with pytest.raises(UserError, match=r"^config: data: Field required; clip: Field required; "):
        parse_config({"name": "a"})


def test_settings_cannot_be_changed_behind_the_back_of_their_rules() -> None:
    config = load_config("smoke")
    with pytest.raises(ValueError, match="frozen"):
        config.data.image_size = 24


# ── overrides ───────────────────────────────────────────────────────────────────────────────────────────


def test_overrides_are_yaml_and_the_last_one_holds() -> None:
    config = load_config(
        "smoke",
        ["seed=1", "seed=2", "sweep.cfg_scale=[1, 2.5]", "data.source={kind: folder, path: a=b}"],
    )
    assert config.seed == 2
    assert config.sweep.cfg_scale == [1.0, 2.5]
    assert config.data.source.model_dump() == {"kind": "folder", "path": "a=b"}


@pytest.mark.parametrize("preset", preset_names())
def test_another_kind_takes_the_place_of_a_section_in_whatever_order(preset: str) -> None:
    overrides = [
        "data.source.path=/x",
        "data.source.kind=folder",
        "tokenizer.ref=/y",
        "tokenizer.kind=pretrained",
    ]
    for order in (overrides, overrides[::-1]):
        config = load_config(preset, order)
        assert config.data.source.model_dump() == {"kind": "folder", "path": "/x"}
        assert config.tokenizer.model_dump() == {"kind": "pretrained", "family": "janus", "ref": "/y"}


def test_the_same_kind_leaves_a_section_as_it_is() -> None:
    assert load_config("smoke", ["data.source.kind=shapes", "clip.kind=trained"]) == load_config("smoke")


def test_a_section_that_is_given_whole_wins_over_a_kind_before_it() -> None:
    whole = "data.source={kind: shapes, count: 3}"
    assert load_config("smoke", ["data.source.kind=folder", whole]).data.source.model_dump()["count"] == 3
    config = load_config("smoke", [whole, "data.source.kind=openmoji", "data.source.limit=3"])
    assert config.data.source.model_dump()["limit"] == 3


def test_another_kind_says_which_of_its_fields_are_missing_or_unknown() -> None:
    assert refused("data.source.kind=folder") == "data.source.path: Field required"
    assert refused("clip.kind=pretrained", "clip.widht=3") == "clip.widht: unknown key"
    overrides = ["data.source.kind=folder", "data.source.path=/x", "data.source.kind=webdataset"]
    assert refused(*overrides) == "data.source.urls: Field required; data.source.path: unknown key"


def test_an_override_makes_the_section_that_the_preset_leaves_out() -> None:
    assert load_config("smoke", ["data.augment.flip=true"]).data.augment.flip


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("seed", "override 'seed' must read section.field=value"),
        ("=3", "override '=3' must read section.field=value"),
        pytest.param(
            "data.image_size.x=3",
            "override 'data.image_size.x=3': image_size is a value, not a section",
            id="into a value",
        ),
        ("seed=[1", "override 'seed=[1': '[1' is not valid YAML"),
        pytest.param(
            f"seed={'9' * 5000}",
            f"override 'seed={'9' * 52}...': '{'9' * 57}...' is not valid YAML",
            id="a number of 5000 digits",
        ),
        pytest.param(
            f"{'a.' * 10**5}b=1",
            f"override '{'a.' * 28}a...': nested too deep; a config has a handful of levels",
            id="a hundred thousand sections",
        ),
        pytest.param(
            f"seed={'[' * 10**5}",
            f"override 'seed={'[' * 52}...': nested too deep; a config has a handful of levels",
            id="a hundred thousand brackets",
        ),
    ],
)
def test_an_override_that_makes_no_sense_is_refused_by_name(override: str, expected: str) -> None:
    with pytest.raises(UserError) as caught:
        load_config("smoke", [override])
    assert str(caught.value) == expected


# ── files ───────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("text", ["[1, 2]", "just words", "", "7"], ids=["list", "words", "empty", "number"])
def test_a_preset_that_is_no_mapping_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "odd.yaml"
    path.write_text(text)
    with pytest.raises(
        UserError, match=rf"^{path}: a config is a mapping of sections, not (list|str|None|int)"
    ):
        load_config(str(path))


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"name: caf\xe9\n", r"not UTF-8 \(byte 9\); save it as UTF-8"),
        (b"name: " + b"[" * 10**5, "nested too deep"),
        (b"seed: " + b"9" * 5000, "not valid YAML: Exceeds the limit"),
        (b"#" * (2**20 + 1), "has more than 1048576 bytes; no config is that long"),
    ],
    ids=["Latin-1", "brackets", "digits", "size"],
)
def test_a_preset_of_a_stranger_is_refused_in_one_line(data: bytes, said: str, tmp_path: Path) -> None:
    path = tmp_path / "odd.yaml"
    path.write_bytes(data)
    with pytest.raises(UserError, match=rf"^{path}:? {said}"):
        load_config(str(path))


def test_a_preset_that_is_no_yaml_is_refused_with_the_line(tmp_path: Path) -> None:
    path = tmp_path / "odd.yaml"
    path.write_text("name: a\ndata: {image_size: 3\nseed: 1\n")
    with pytest.raises(UserError, match=rf"^{path}: not valid YAML: .*line 3") as caught:
        load_config(str(path))
    assert len(str(caught.value).splitlines()) == 1


def test_a_preset_that_does_not_exist_comes_with_those_that_do() -> None:
    names = ", ".join(preset_names())
    with pytest.raises(UserError) as caught:
        load_config("smok")
    assert str(caught.value) == f"preset 'smok' does not exist; choose one of {names}, or a .yaml file"


def test_a_file_of_ones_own_is_a_preset(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(load_config("smoke").model_dump_json())
    assert load_config(str(path)) == load_config("smoke")


def test_other_data_replaces_the_presets_source_and_an_override_wins_over_it() -> None:
    data = {"kind": "folder", "path": "/pictures"}
    assert load_config("smoke", data=data).data.source.model_dump() == data
    config = load_config("smoke", ["data.source.path=/others"], data)
    assert config.data.source.model_dump() == data | {"path": "/others"}
    with pytest.raises(UserError, match=r"^the data: data is a value, not a section"):
        load_config("", data=data, text="data: 3")


def test_a_config_that_is_given_as_text_is_read_like_a_file() -> None:
    text = load_config("smoke").model_dump_json()
    assert load_config("openmoji", ["seed=3"], text=text) == load_config("smoke", ["seed=3"])
    with pytest.raises(UserError, match=r"^the config with seed=x: seed: "):
        load_config("openmoji", ["seed=x"], text=text)


def test_an_experiment_of_ones_own_is_used_and_none_leaves_no_trace() -> None:
    assert load_config("smoke", ["experiment_name=mine"]).experiment == "mine"
    assert "experiment_name" not in load_config("smoke").model_dump()


@pytest.mark.parametrize("preset", preset_names())
def test_a_config_is_the_same_after_a_trip_through_json(preset: str) -> None:
    config = load_config(preset)
    assert parse_config(config.model_dump_json()) == config
    assert config.name == (preset if preset != "auto" else "openmoji-tiny")  # where it has no data


@pytest.mark.parametrize("preset", preset_names())
def test_a_preset_says_how_it_is_run_on_what_for_how_long_and_what_for(preset: str) -> None:
    text = (PRESETS / f"{preset}.yaml").read_text().splitlines()
    head = list(takewhile(lambda line: line.startswith("#"), text))
    assert text[len(head)].partition(":")[0] == ("name" if preset != "auto" else "recipe")
    said = [line.removeprefix("# ").split()[0] for line in head if re.match(r"# \w+  ", line)]
    assert said == ["command", "hardware", "duration", "promise"]


def test_the_hash_of_settings_is_the_same_anywhere_and_another_for_other_settings() -> None:
    config = load_config("smoke")
    assert config_hash(config) == config_hash(load_config("smoke"))
    assert config_hash(config) != config_hash(load_config("smoke", ["seed=1"]))
    # of other machines' manifests: it must never change
    assert config_hash({"b": 1, "a": ["ä"]}, "x", 2).startswith("7ec1ea5d")


@pytest.mark.parametrize(
    ("overrides", "experiment"),
    [
        ([], "latent-gpt-custom-vqvae"),
        (["transformer=null"], "vqvae-training"),
        (["tokenizer={kind: pretrained, ref: somewhere}"], "latent-gpt-pretrained-vqvae"),
    ],
)
def test_each_phase_has_its_experiment(overrides: list[str], experiment: str) -> None:
    assert load_config("smoke", overrides).experiment == experiment


def test_a_tokenizers_vocabulary() -> None:
    assert load_config("smoke").tokenizer.vocabulary == 16  # type: ignore[union-attr]
    fsq = load_config("smoke", ["tokenizer.quantizer=fsq", "tokenizer.fsq_levels=[3, 5]"])
    assert fsq.tokenizer.vocabulary == 15  # type: ignore[union-attr]


ODD = {  # values that fit together in some ways, and not in most
    "data.image_size": [16, 24, 32],
    "clip.embed_dim": [4, 10, 16],
    "clip.text_width": [8, 10, 16, 18],
    "clip.text_heads": [1, 2, 3],
    "clip.vision_width": [8, 16, 32, 33, 40, 48],
    "clip.patch_size": [4, 5, 8],
    "tokenizer.width": [4, 6, 8, 12, 20, 32, 40],
    "tokenizer.multipliers": ["[1, 1, 1]", "[1, 2]", "[1, 2, 2, 2]", "[3, 1, 2]", "[1]"],
    "tokenizer.blocks": [1, 2],
    "tokenizer.code_dim": [1, 3, 4, 8],
    "tokenizer.codebook_size": [2, 7, 16],
    "tokenizer.stem": [1, 2, 4],
    "tokenizer.factor": [4, 8],
    "transformer.arch": ["latent", "gpt2"],
    "transformer.mlp": ["swiglu", "gelu"],
    "transformer.positions": ["rope", "learned"],
    "transformer.width": [8, 12, 16, 18, 24, 30, 33, 40],
    "transformer.heads": [1, 2, 3, 4, 5],
    "transformer.depth": [1, 2],
}


@pytest.mark.slow
def test_what_the_config_takes_can_be_built() -> None:
    """No rule is missing: what does not fit together is refused before anything starts, not by a job."""
    chance = random.Random(0)
    built = 0
    while built < 200:
        overrides = [f"{field}={chance.choice(ODD[field])}" for field in chance.sample(list(ODD), 5)]
        try:
            config = load_config("smoke", overrides)
        except UserError:
            continue
        clip, tokenizer, transformer = config.clip, config.tokenizer, config.transformer
        assert isinstance(clip, TrainedCLIPConfig)
        assert isinstance(tokenizer, VQVAEConfig)
        assert transformer
        grid = config.data.image_size // tokenizer.factor
        with torch.device("meta"):
            build_clip({"name": "", "architecture": architecture(clip, config.data.image_size)})
            VQVAE(tokenizer)
            GPT(transformer, tokenizer.vocabulary, (grid, grid), clip.text_width)
        built += 1
