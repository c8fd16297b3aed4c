"""The mutants. A name says which behaviour is gone."""

from __future__ import annotations

from tests import ROOT
from tests.mutants import Mutant

CONFIG = "model/config.py"
PREFLIGHT = "components/preflight/__init__.py"
RULES = "tests/test_config.py::test_settings_that_contradict_each_other_are_named_with_their_figures"

CLUSTER = "tests/pipelines/cluster/"
SETTINGS = "tests/test_steps.py::test_every_setting_moves_the_assets_that_it_decides_and_no_others"

RIGHTS = "test_what_a_step_may_not_do_is_named_with_the_rule_that_is_missing[delete-pytorchjobs-kubeflow.org]"


def rule(row: str, condition: str) -> Mutant:
    """A rule of the config that no longer refuses anything."""
    return Mutant(f"config: {row}", CONFIG, f"if {condition}:", "if False:", f"{RULES}[{row}]")


def probe(name: str, test: str) -> Mutant:
    """A check before the start that is never made."""
    line = next(line for line in (ROOT / PREFLIGHT).read_text().splitlines() if f'", "{name}", ' in line)
    where = "tests/components/test_preflight.py::"
    return Mutant(f"preflight: {name}", PREFLIGHT, f"{line}\n", "", where + test)


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
        "pipelines: a config of the other one is refused",
        "components/parameters.py",
        "if (right := pipeline_of(resolved)) != pipeline:",
        "if (right := pipeline_of(resolved)) and False:",
        "tests/components/test_parameters.py::test_what_is_wrong_is_refused_with_what_would_be_right",
    ),
    Mutant(
        "pipelines: the page offers the presets",
        "pipelines/compile.py",
        '    parameters["preset"]["literals"] = presets\n',
        "",
        "tests/pipelines/test_compile.py::test_a_person_chooses_among_the_presets_that_the_pipeline_takes",
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
        "growth: what was held out never moves into training",
        "model/data/growth.py",
        "return before or now",
        "return now",
        "tests/data/test_growth.py::test_what_was_held_out_never_moves_into_training",
    ),
    Mutant(
        "growth: a shard with another caption is not taken over",
        "model/data/growth.py",
        "(wish.split, digest(wish.captions)) == (split_of_shard(shard), captions)",
        "wish.split == split_of_shard(shard)",
        "tests/data/test_growth.py::test_an_entry_of_a_list_is_as_it_was_with_its_captions",
    ),
    Mutant(
        "report: the floor of a score",
        "model/evaluation/report.py",
        '"floor": figures[f"{split}/{floor}"] if floor else 0.0',
        '"floor": 0.0',
        "tests/evaluation/test_report.py::test_the_floor_of_a_score_is_what_chance_gives",
    ),
    probe("has room", "test_a_disk_without_room_for_a_run_is_refused"),
    probe("lists", "test_a_store_that_lacks_something_is_refused_by_name[no right to list]"),
    probe("writes only what is absent", "test_a_store_that_lacks_something_is_refused_by_name[501]"),
    probe("deletes many at once", "test_a_store_that_lacks_something_is_refused_by_name[no batches]"),
    probe("takes uploads in parts", "test_a_store_that_lacks_something_is_refused_by_name[no parts]"),
    probe("is read from the middle on", "test_a_store_that_lacks_something_is_refused_by_name[no ranges]"),
    probe("keeps models", "test_an_mlflow_that_lacks_something_is_refused_by_name[models]"),
    probe("keeps artifacts", "test_an_mlflow_that_lacks_something_is_refused_by_name[artifacts]"),
    probe("answers", "test_a_cluster_that_has_all_a_job_needs_is_named_with_the_image"),
    probe("has training jobs", "test_a_cluster_without_the_operator_is_refused"),
    probe("allows what a step does", RIGHTS),
    probe("tells workers their services", "test_half_a_pair_of_keys_is_named"),
    probe("has the image", "test_a_pull_secret_that_is_not_there_is_named"),
    probe("lets workers in", "test_a_used_up_quota_stops_no_run_and_a_warning_is_passed_on"),
    probe("has a node for them", "test_two_nodes_are_no_one"),
    probe("has quota left", "test_a_job_beyond_a_quota_is_refused_and_one_beyond_what_is_left_waits"),
    probe("keeps time", "test_a_clock_that_is_wrong_is_said_to_be"),
    probe("has drop-downs", "test_a_kfp_that_is_not_there_stops_nothing"),
    probe("is no Service named mlflow", "test_a_service_named_mlflow_is_warned_of"),
    Mutant(
        "slurm: srun is told to end by nobody but us",
        "components/launch/slurm.py",
        ", start_new_session=True",
        "",
        "tests/components/test_slurm.py::test_a_group_that_is_told_to_end_leaves_srun_its_time",
    ),
    Mutant(
        "step: a failed run is FAILED in MLflow",
        "components/step.py",
        '        if run:\n            _record(name, run, "FAILED", end.reason)\n',
        "",
        "tests/components/test_step.py::test_a_failed_step_fails_the_run_in_mlflow[defect]",
    ),
    Mutant(
        "step: its reason is left as an outcome",
        "components/step.py",
        "outcome.recorded(name):",
        "environment.within({}):",
        "tests/components/test_step.py::test_a_failed_step_says_why_to_the_run_and_to_its_container",
    ),
    Mutant(
        "key: a transformer depends on the seed",
        "model/steps.py",
        '{"transformer": _plain(config.transformer), "seed": config.seed}',
        '{"transformer": _plain(config.transformer)}',
        f"{SETTINGS}[0-seed]",
    ),
    Mutant(
        "key: tokens depend on the augmentation",
        "model/steps.py",
        '{"augment": _plain(config.data.augment), "seed": config.seed}',
        '{"seed": config.seed}',
        f"{SETTINGS}[0-data.augment.flip]",
    ),
    Mutant(
        "key: the version of a step",
        "model/plumbing/assets.py",
        '"version": version, ',
        "",
        "tests/plumbing/test_assets.py::test_the_version_of_a_step_moves_its_assets",
    ),
    Mutant(
        "assets: inputs are found where the store is now",
        "model/plumbing/assets.py",
        "def place(kind: Kind, key: str) -> str:",
        '@__import__("functools").cache\ndef place(kind: Kind, key: str) -> str:',
        "tests/plumbing/test_assets.py::test_inputs_are_found_where_the_store_is_now",
    ),
    Mutant(
        "assets: an input is the very one that was used",
        "model/plumbing/assets.py",
        "if manifest.sha256 != self.sha256:",
        "if False:",
        "tests/plumbing/test_assets.py::test_an_input_with_other_bytes_is_refused",
    ),
    Mutant(
        "assets: no metric that is not finite is kept",
        "model/plumbing/assets.py",
        "if not _finite(value):",
        "if False:",
        "tests/plumbing/test_assets.py::test_what_is_not_finite_is_not_kept[nan]",
    ),
    Mutant(
        "assets: tidying up after it fails nothing",
        "model/plumbing/assets.py",
        "except (UserError, OSError) as error:",
        "except ZeroDivisionError as error:",
        "tests/plumbing/test_assets.py"
        "::test_work_that_is_done_stays_done_where_tidying_up_after_it_fails[local]",
    ),
    Mutant(
        "launch: a process that was killed was killed",
        "components/launch/elastic.py",
        "    if spoken and not unstopped:\n",
        "    if spoken:\n",
        "tests/components/test_elastic.py::test_the_blame_is_on_the_process_that_made_the_others_fail"
        "[one is killed, the other loses it]",
    ),
    Mutant(
        "launch: who was told to end is not to blame",
        "components/launch/elastic.py",
        'if one[1].kind not in ("lost", "stopped")',
        'if one[1].kind != "lost"',
        "tests/components/test_elastic.py::test_the_blame_is_on_the_process_that_made_the_others_fail"
        "[one loses another pod's, and the rest is stopped for it]",
    ),
    Mutant(
        "attempts: a checkpoint won starts the count anew",
        "model/plumbing/attempts.py",
        "count = 0 if after > before else count + 1",
        "count += 1",
        "tests/plumbing/test_attempts.py::test_restarts_count_from_the_last_one_that_came_further"
        "[a checkpoint won]",
    ),
    Mutant(
        "cores: the container's quota counts",
        "model/plumbing/parallel.py",
        "if quota := cgroups.cpu_quota():",
        "if quota := None:",
        "tests/plumbing/test_cgroups.py::test_cores_are_those_of_the_quota_where_it_is_less[96-1-3]",
    ),
    Mutant(
        "logs: each line is printed once",
        "pipelines/logs.py",
        "self._shown[uri] = start + len(data)",
        "pass",
        "tests/pipelines/test_logs.py::test_who_follows_sees_each_line_once_until_the_work_is_done",
    ),
    Mutant(
        "launch: an older outcome is not this one's",
        "components/launch/torchrun.py",
        'return Path(tempfile.mkdtemp(prefix=f"{name}-", dir=logs or None))',
        "return Path(logs) / name",
        "tests/components/test_launch.py::test_an_older_outcome_is_not_taken_for_this_one",
    ),
    Mutant(
        "launch: a job that is being made goes, too",
        "components/launch/follow.py",
        '        self.uid, self.alive = "", False\n        try:\n',
        "        try:\n",
        "tests/components/test_follow.py::test_sigterm_deletes_a_job_that_is_just_being_made"
        "[it had been there before]",
    ),
    Mutant(
        "leases: who holds one beside others is not the last",
        "model/plumbing/leases.py",
        "all(age >= LIVE for age in others)",
        "True",
        "tests/plumbing/test_leases.py::test_two_who_want_the_same_know_of_each_other[local]",
    ),
    Mutant(
        "leases: what did not end well leaves a sign",
        "model/plumbing/leases.py",
        "storage.write_bytes(storage.join(self.uri, LEFT), self._content)",
        "pass",
        "tests/plumbing/test_leases.py::test_one_that_does_not_end_well_leaves_a_sign_of_when[local]",
    ),
    Mutant(
        "leases: only one writes the next number of a lock",
        "model/plumbing/leases.py",
        "self._content, if_absent=True)",
        "self._content)",
        "tests/plumbing/test_leases.py::test_who_comes_late_with_a_number_that_was_used_has_lost[local]",
    ),
    Mutant(
        "leases: a dead holder on this machine is not waited for",
        "model/plumbing/leases.py",
        'return state in "ZX" or started != holder["started"]',
        "return False",
        "tests/plumbing/test_leases.py::test_a_process_is_dead_when_it_is_gone_or_another_has_its_number",
    ),
    Mutant(
        "leases: a step that dies has not said that its run waits",
        "model/plumbing/leases.py",
        "        renewal.stop(patience=0)\n",
        "        say(WAITS)\n",
        "tests/plumbing/test_leases.py"
        "::test_a_run_is_given_up_when_its_step_dies_and_not_between_two_steps[local]",
    ),
    Mutant(
        "leases: a late number has lost",
        "model/plumbing/leases.py",
        "if _highest(ages) > self._number:",
        "if False:",
        "tests/plumbing/test_leases.py::test_who_comes_late_with_a_number_that_was_used_has_lost[local]",
    ),
    Mutant(
        "leases: a lock is renewed",
        "model/plumbing/leases.py",
        '_Renewal(name, "its lock", lock.renew)',
        '_Renewal(name, "its lock", lambda: None)',
        "tests/plumbing/test_leases.py"
        "::test_one_that_dies_elsewhere_keeps_others_waiting_until_its_lock_runs_out[local]",
    ),
    Mutant(
        "checkpoints: what is stored is a copy",
        "model/plumbing/checkpoints.py",
        "self._memory[path] = copy.copy_(tensor, non_blocking=True)",
        "self._memory[path] = tensor",
        "tests/plumbing/test_checkpoints.py::test_what_changes_while_it_is_stored_is_stored_as_it_was",
    ),
    Mutant(
        "checkpoints: one is under way at a time",
        "model/plumbing/checkpoints.py",
        "        self.wait()\n        flat",
        "        flat",
        "tests/plumbing/test_checkpoints.py::test_a_full_disk_is_told_when_the_next_one_begins",
    ),
    Mutant(
        "stopping: a store that does not answer is no expired lease",
        "model/plumbing/stopping.py",
        "age = 0.0  # nobody knows",
        "age = 10.0**9",
        "tests/plumbing/test_stopping.py::test_a_store_that_does_not_answer_is_no_expired_lease",
    ),
    Mutant(
        "stopping: within a loop the step is kept first",
        "model/plumbing/stopping.py",
        "if not self._heeded and not self._raised:",
        "if not self._raised:",
        "tests/plumbing/test_stopping.py::test_within_a_loop_the_step_is_kept_first",
    ),
    Mutant(
        "tracking: what may get through later is sent again",
        "model/plumbing/tracking.py",
        "return status >= 500 or status == 429",
        "return False",
        "tests/plumbing/test_tracking.py::test_only_what_may_get_through_is_sent_again[server]",
    ),
    Mutant(
        "training: a resumed job goes on counting towards its early end",
        "model/training/state.py",
        'self.best, self.since = state["best"], state["since"]',
        'self.best = state["best"]',
        "tests/training/test_state.py::test_a_resumed_job_goes_on_counting",
    ),
    Mutant(
        "speech: a library's line is no step's",
        "model/plumbing/speech.py",
        "if match and match[1] in names",
        "if match",
        "tests/plumbing/test_speech.py::test_what_a_library_prints_is_no_line_of_a_step[judge | started]",
    ),
    Mutant(
        "plan: an average of the weights takes memory",
        "pipelines/plan.py",
        ", *moments, *average.values()]",
        ", *moments]",
        "tests/pipelines/test_plan.py::test_the_average_of_the_weights_takes_as_much_memory_as_they_do",
    ),
    Mutant(
        "cache: what was not asked for the longest goes first",
        "model/plumbing/cache.py",
        "in sorted(copies):",
        "in sorted(copies, reverse=True):",
        "tests/plumbing/test_cache.py::test_what_was_not_asked_for_the_longest_goes_first",
    ),
    Mutant(
        "cache: a folder in use stays",
        "model/plumbing/cache.py",
        "    _hold(home)\n",
        "",
        "tests/plumbing/test_cache.py::test_a_folder_stays_while_the_process_that_was_given_it_lives",
    ),
    Mutant(
        "sampling: captions for sweeps are not measured on",
        "model/evaluation/benchmark.py",
        "if not for_sweeps(one)]) for entry",
        "]) for entry",
        "tests/evaluation/test_benchmark.py::test_captions_of_sweeps_are_not_measured_on",
    ),
    Mutant(
        "sampling: of equals the higher CLIP score is taken",
        "model/evaluation/sweep.py",
        "return figures.get(ORACLE, figures[RETRIEVAL]), figures[SCORE]",
        "return figures.get(ORACLE, figures[RETRIEVAL]), 0",
        "tests/evaluation/test_sweep.py::test_the_deciding_figure_chooses_and_of_equals_the_clip_score",
    ),
    Mutant(
        "benchmark: a deleted picture leaves it",
        "model/evaluation/benchmark.py",
        "left = {split: [one for one in rows if one.content in there]",
        "left = {split: list(rows)",
        "tests/evaluation/test_benchmark.py::test_deleted_pictures_leave_the_benchmark",
    ),
    Mutant(
        "registration: a better challenger is promoted",
        "components/registration.py",
        "before.promoted(version) if better",
        "before.refused(version) if better",
        "tests/components/test_registration.py"
        "::test_a_better_challenger_becomes_champion_and_a_worse_one_does_not",
    ),
    Mutant(
        "registration: what is no number is no champion",
        "components/registration.py",
        "if not finite(deciding(evaluation.info)):",
        "if False:",
        "tests/components/test_registration.py::test_a_model_that_is_no_numbers_never_becomes_champion",
    ),
    Mutant(
        "registration: other pictures are not compared",
        "components/registration.py",
        '.get(IMAGES_TAG) != evaluation.inputs["images"].sha256:',
        ".get(IMAGES_TAG) is None:",
        "tests/components/test_registration.py::test_what_was_made_from_other_pictures_is_not_compared",
    ),
    Mutant(
        "training: no checkpoint holds what is not finite",
        "model/training/state.py",
        "if bad := not_finite(states):",
        "if bad := None:",
        "tests/training/test_state.py::test_no_part_that_is_not_finite_reaches_a_checkpoint[net]",
    ),
    Mutant(
        "training: a figure that is not finite stops it",
        "model/training/state.py",
        "if not math.isfinite(value):",
        "if False:",
        "tests/training/test_state.py::test_one_bad_addend_spoils_the_sum[nan]",
    ),
    Mutant(
        "sources: a shard that changed is another source",
        "model/data/sources/webdataset.py",
        'f"{uri}\\0{mark}\\n"',
        'f"{uri}\\n"',
        "tests/data/test_strangers.py::test_a_shard_that_changed_is_another_source",
    ),
    Mutant(
        "launcher: a job goes with the last step that wants it",
        "components/launch/follow.py",
        "if self.lease.last:",
        "if True:",
        "tests/components/test_follow.py::test_two_steps_share_a_job_and_it_goes_with_the_last_of_them",
    ),
    Mutant(
        "launcher: whoever reads our output may be gone",
        "components/launch/follow.py",
        "    except OSError:\n        with suppress(OSError, ValueError):",
        "    except KeyError:\n        with suppress(OSError, ValueError):",
        "tests/components/test_follow.py::test_sigterm_deletes_the_job_first_of_all[dead]",
    ),
    Mutant(
        "launcher: a line of the log is repeated once",
        "components/launch/follow.py",
        "if when == before and again:",
        "if False:",
        "tests/components/test_follow.py::test_an_api_server_that_misbehaves_is_weathered[drop]",
    ),
    Mutant(
        "launcher: a watch begins anew where the server has forgotten",
        "components/launch/cluster.py",
        "if error.status == 410:",
        "if False:",
        "tests/components/test_cluster.py::test_a_watch_misses_nothing[forgotten]",
    ),
    Mutant(
        "launcher: a delete that might hit another job has a UID",
        "components/launch/cluster.py",
        "preconditions=client.V1Preconditions(uid=uid) if uid else None, ",
        "",
        "tests/components/test_follow.py::test_a_failed_job_is_read_for_its_reason_and_deleted",
    ),
    Mutant(
        "launcher: an orphaned job is made anew",
        "components/launch/decide.py",
        'seen.end.kind == "orphaned"',
        'seen.end.kind == "finished"',
        "tests/components/test_decide.py::test_what_to_do_next[orphaned, while we follow]",
    ),
    Mutant(
        "launcher: a failed job of an earlier launch is made anew",
        "components/launch/decide.py",
        "    if seen.ours:\n        return End(end, remove",
        "    if True:\n        return End(end, remove",
        "tests/components/test_decide.py::test_what_to_do_next[failed, an earlier one]",
    ),
    Mutant(
        "launcher: restarts are bounded",
        "components/launch/decide.py",
        "if seen.restarts > jobs.max_restarts:",
        "if False:",
        "tests/components/test_decide.py::test_what_to_do_next[too many]",
    ),
    Mutant(
        "launcher: progress resets the count of restarts",
        "components/launch/follow.py",
        "self.restarts = 0 if step > self.step else",
        "self.restarts =",
        "tests/components/test_follow.py::test_progress_resets_the_count_of_restarts",
    ),
    Mutant(
        "deploy: what belongs to somebody else's object stays",
        "pipelines/cluster/deploy.py",
        ' and not one["metadata"].get("ownerReferences")]\n    for one in rest:',
        "]\n    for one in rest:",
        f"{CLUSTER}test_deploy.py::"
        "test_what_a_new_set_has_no_more_is_removed_but_no_data_and_nothing_of_others",
    ),
    Mutant(
        "deploy: a changed Secret reaches the servers",
        "pipelines/cluster/deploy.py",
        '"\\n".join([told, *versions])',
        "told",
        f"{CLUSTER}test_deploy.py::test_servers_start_anew_when_what_they_read_is_another_and_only_then",
    ),
    Mutant(
        "kfp: an upload without a change does nothing",
        "pipelines/cluster/kfp.py",
        'if before and before[0].partition("-")[0] == content:',
        "if False:",
        f"{CLUSTER}test_kfp.py::test_an_upload_without_a_change_does_nothing",
    ),
    Mutant(
        "kfp: a cancelled run is called so",
        "pipelines/cluster/kfp.py",
        'if state == "FAILED" and "CANCELING" in history[-2:]:',
        "if False:",
        f"{CLUSTER}test_kfp.py::test_a_cancelled_run_is_called_so[states4-cancelled-True]",
    ),
    Mutant(
        "retraining: a run that had fewer pictures is not known by those that came meanwhile",
        "model/steps.py",
        'made = kind == "images" and images is not None',
        "made = False",
        "tests/test_steps.py::test_a_run_is_known_by_the_pictures_that_it_had_and_not_by_what_came_meanwhile",
    ),
    Mutant(
        "retraining: other weights to begin from make another asset",
        "model/steps.py",
        "made_from[START] = start.as_input",
        "pass",
        "tests/test_steps.py::test_what_a_retraining_starts_from_is_no_part_of_what_it_is_known_by",
    ),
    Mutant(
        "schedule: what fails leaves one of them",
        "pipelines/cluster/schedule.py",
        "    for one in before:  # last, so that whatever fails leaves one of them",
        "    for one in before[1:]:",
        f"{CLUSTER}test_schedule.py::test_whatever_fails_leaves_a_schedule",
    ),
    Mutant(
        "schedule: five fields are refused",
        "pipelines/cluster/cron.py",
        'if len(fields) == 5 and not fields[0].startswith(("@", "TZ=")):',
        "if False:",
        f"{CLUSTER}test_cron.py::test_a_cron_that_kfp_would_not_take_or_take_amiss_is_refused"
        "[0 3 * * *-cron '0 3 * * *' has five fields; KFP's begin with seconds: write '0 0 3 * * *']",
    ),
    Mutant(
        "runs: a wrong config is not sent",
        "pipelines/cluster/runs.py",
        'resolve(pipeline, **{**asked, "preset": preset})',
        'dict(pipeline=pipeline, **{**asked, "preset": preset})',
        f"{CLUSTER}test_runs.py::test_a_wrong_config_is_refused_before_anybody_is_asked[how2-jobs.workers]",
    ),
]
