"""What a person sees of a run: the lines of its steps, and nobody else's; and what came of it."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from pipelines.terminal import HEADING, Follower, summary

STEPS = ["prepare", "tokenizer", "transformer"]
SPOKEN = [
    "21:43:12 - INFO - Executing task 'transformer'\n",
    "    transformer | started\n",
    "     transformer | step 1/2  50%  loss 3.2  ETA 1s\n",
    "     transformer | step 2/2  100%  loss 3.1  ETA 0s\n",
    "    {'a': 1}\n",
    "    transformer | done in 2.5 s\n",
]


def follow(lines: list[str], terminal: bool = False) -> tuple[Follower, str]:
    out = io.StringIO()
    out.isatty = lambda: terminal  # type: ignore[method-assign]
    follower = Follower(STEPS, out=out)
    for line in lines:
        follower.line(line)
    follower.end_line()
    return follower, out.getvalue()


def test_only_what_steps_say_is_shown() -> None:
    follower, shown = follow(SPOKEN)
    assert shown.splitlines() == [
        "[1/3] transformer",
        "      step 1/2  50%  loss 3.2  ETA 1s",
        "      step 2/2  100%  loss 3.1  ETA 0s",
        "      done in 2.5 s",
    ]
    assert follower.seconds == {"transformer": 2.5}
    assert HEADING.fullmatch(shown.splitlines()[0])


@pytest.mark.parametrize(
    "line",
    [
        "loading  weights",
        "tokenizer  2 files",
        "tokenizer: 2 files",
        "prepare | another step's line while this one runs",
        "weights | started",
        "100%|#####| 3/3",
        "error: a library's, which it mended itself",
    ],
)
def test_what_a_library_prints_is_no_progress(line: str) -> None:
    follower, shown = follow(["prepare | started", "prepare | done in 0.1 s", "tokenizer | started", line])
    assert shown.splitlines()[-1] == "[2/3] tokenizer"
    assert follower.running == "tokenizer"


def test_steps_that_run_side_by_side_are_told_apart_while_they_do() -> None:
    both = ["text | started", "judge | started", "text | step 1/2  50%", "judge | reused x"]
    rest = ["text | done in 1.0 s", "judge | warning: odd", "judge | done in 2.0 s"]
    out = io.StringIO()
    follower = Follower(["text", "judge"], out=out)
    for line in both + rest:
        follower.line(line)
    assert out.getvalue().splitlines() == [
        "[1/2] text",
        "[2/2] judge",
        "      text | step 1/2  50%",
        "      judge | reused x",
        "      text | done in 1.0 s",
        "      warning: odd",
        "      done in 2.0 s",
    ]
    assert (follower.seconds, follower.running) == ({"text": 1.0, "judge": 2.0}, "")


def test_a_step_that_is_tried_again_keeps_its_number() -> None:
    _, shown = follow(
        ["prepare | started", "prepare | done in 0.1 s", "tokenizer | started"] + 2 * ["prepare | started"]
    )
    assert [line for line in shown.splitlines() if line.startswith("[")] == [
        "[1/3] prepare",
        "[2/3] tokenizer",
        "[1/3] prepare",
        "[1/3] prepare",
    ]


def test_a_step_that_has_ended_says_nothing_more() -> None:
    _, shown = follow(["prepare | started", "prepare | done in 0.1 s", "prepare | late"])
    assert "late" not in shown


def test_on_a_terminal_progress_replaces_progress_and_nothing_else() -> None:
    _, shown = follow(SPOKEN, terminal=True)
    assert shown == (
        "[1/3] transformer\n"
        "      step 1/2  50%  loss 3.2  ETA 1s\r\033[2K      step 2/2  100%  loss 3.1  ETA 0s\n"
        "      done in 2.5 s\n"
    )


def test_reuse_is_remembered_and_so_is_the_last_line_of_a_step() -> None:
    follower, _ = follow(
        [
            "prepare | started\n",
            "  prepare | reused s3://x\n",
            "    sh: not found\n",
            "KFP: FAILURE\n",
            "    \n",
        ]
    )
    assert follower.reused == {"prepare"}
    assert (follower.running, follower.last) == ("prepare", "sh: not found")


def test_the_end_says_what_came_of_it() -> None:
    follower, _ = follow(SPOKEN)
    registered = {
        "model": "latent-gpt-smoke",
        "headline": [["21.0 dB", "tokenizer PSNR", "80 % of the codebook in use"]],
        "headline_of": "captions held out",
        "prompt": "Pinocchio's hat for $5",
        "version": 3,
        "alias": "champion",
        "reason": "better",
        "verdict": {
            "outcome": "better",
            "reason": "by far",
            "metric": "oracle",
            "prompts": "90 prompts held out",
            "ours": 0.9,
            "theirs": 0.5,
        },
    }
    lines = summary(follower, Path("/runs/1"), 5.0, registered).splitlines()
    assert lines[1:3] == ["finished in 5 s, 50 % of it outside the steps", "steps     transformer 2 s"]
    assert "model     latent-gpt-smoke version 3, champion" in lines
    assert "verdict   better: by far" in lines
    assert "          all attributes right over 90 prompts held out: 0.9 (champion 0.5)" in lines
    said = [
        "measured  on captions held out:",
        "          21.0 dB tokenizer PSNR (80 % of the codebook in use)",
    ]
    assert lines[lines.index(said[0]) :][:2] == said
    prompt = "'Pinocchio'\"'\"'s hat for $5'"  # as a shell reads it
    assert f"draw      make generate PROMPT={prompt} OUT=picture.png" in lines
    other = summary(follower, Path("/runs/1"), 5.0, registered | {"alias": "challenger"})
    assert 'OUT=picture.png ARGS="--model models:/latent-gpt-smoke/3"' in other
    assert "report    /runs/1/report.html" in lines
    assert lines[-1] == "log       /runs/1/log.txt"


def test_a_run_without_a_model_names_none() -> None:
    follower, _ = follow(["prepare | started", "prepare | reused x", "prepare | done in 1.0 s"])
    said = summary(follower, Path("/runs/1"), 1.0, None)
    assert "reused    prepare" in said
    assert "model" not in said
