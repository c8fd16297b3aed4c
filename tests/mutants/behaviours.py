"""The mutants. A name says which behaviour is gone."""

from __future__ import annotations

from tests.mutants import Mutant

CONFIG = "model/config.py"
RULES = "tests/test_config.py::test_settings_that_contradict_each_other_are_named_with_their_figures"


def rule(row: str, condition: str) -> Mutant:
    """A rule of the config that no longer refuses anything."""
    return Mutant(f"config: {row}", CONFIG, f"if {condition}:", "if False:", f"{RULES}[{row}]")


MUTANTS = [
    rule("warm-up", "self.warmup_steps >= self.steps"),
    rule("accumulate", "self.batch_size % self.accumulate"),
    rule("levels", "self.factor % self.stem or len(self.multipliers) != levels"),
    rule("value range", "not self.value_range[0] < self.value_range[1]"),
    rule("heads", "self.width % self.heads"),
    rule("rotary positions", 'self.positions == "rope2d" and (self.width // self.heads) % 4'),
    rule(
        "gpt2 without gelu",
        'self.arch == "gpt2" and (self.mlp, self.positions, self.qk_norm) != ("gelu", "learned", False)',
    ),
    rule("side and factor", 'tokenizer.kind == "vqvae" and self.data.image_size % tokenizer.factor'),
    rule("side and patch", 'self.clip.kind == "trained" and self.data.image_size % self.clip.patch_size'),
    rule("nothing to train", 'tokenizer.kind == "pretrained" and self.transformer is None'),
    rule(
        "ranks of the transformer",
        "training and training.batch_size % (processes * training.accumulate)",
    ),
    Mutant(
        "config: a preset is a mapping",
        CONFIG,
        "if not isinstance(values, dict):",
        "if False:",
        "tests/test_config.py::test_a_preset_that_is_no_mapping_is_refused[list]",
    ),
    Mutant(
        "config: an override goes into a section",
        CONFIG,
        "if not isinstance(child, dict):",
        "if False:",
        "tests/test_config.py::test_an_override_that_makes_no_sense_is_refused_by_name[into a value]",
    ),
    Mutant(
        "ingest: a duplicate of a held-out picture is held out",
        "model/data/ingest.py",
        "same.composition |= outcome.composition",
        "pass",
        "tests/data/test_ingest.py"
        "::test_a_picture_that_is_held_out_under_one_of_its_names_is_held_out[second]",
    ),
    Mutant(
        "report: the floor of a score",
        "model/evaluation/report.py",
        '"floor": figures[f"{split}/{floor}"] if floor else 0.0',
        '"floor": 0.0',
        "tests/evaluation/test_report.py::test_the_floor_of_a_score_is_what_chance_gives",
    ),
    Mutant(
        "preflight: MLflow is asked",
        "components/preflight.py",
        "    tracking.check_server()\n",
        "",
        "tests/components/test_preflight.py::test_mlflow_that_does_not_answer_is_refused",
    ),
    Mutant(
        "preflight: the store is written to",
        "components/preflight.py",
        "    storage.check_store(root)\n",
        "",
        "tests/components/test_preflight.py::test_a_store_that_cannot_be_written_is_refused",
    ),
    Mutant(
        "preflight: the disk is looked at",
        "components/preflight.py",
        "    check_disk(Path(tempfile.gettempdir()))\n",
        "",
        "tests/components/test_preflight.py::test_a_disk_without_room_for_a_run_is_refused",
    ),
    Mutant(
        "step: a failed run is FAILED in MLflow",
        "components/step.py",
        "        if run:\n            _record_failure(name, run)\n",
        "",
        "tests/components/test_step.py::test_a_failed_step_fails_the_run_in_mlflow[defect]",
    ),
]
