"""What steps say: progress lines, how often they come, and that only a step's own lines are heard."""

from __future__ import annotations

import io

import pytest

from model.plumbing import speech
from model.plumbing.speech import Count, Progress, Said, duration, figure, quantity, read


class Clock:
    """A clock that tests wind."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(speech.time, "monotonic", clock)
    return clock


def test_a_line_says_it_all(clock: Clock) -> None:
    out = io.StringIO()
    bar = Progress("transformer", 2000, "tok", per_count=4096, out=out)
    clock.now += 34
    bar.update(340, loss=3.2134)
    assert out.getvalue() == "transformer | step 340/2000  17%  loss 3.21  41k tok/s  ETA 2m46s\n"
    said = read(out.getvalue(), {"transformer"})
    assert said
    assert said.count == Count(340, 2000, eta=166)


def test_lines_come_at_intervals_and_at_the_end(clock: Clock) -> None:
    out = io.StringIO()
    bar = Progress("images", 100, "img", counted="image", every=1.0, out=out)
    for done in range(1, 101):
        clock.now += 0.05
        bar.update(done)
    bar.update(100)
    lines = out.getvalue().splitlines()
    assert len(lines) == 6
    assert lines[0].startswith("images | image 1/100  1%  20 img/s")
    assert lines[-1] == "images | image 100/100  100%  20 img/s  ETA 0s"


def test_the_rate_is_the_latest_and_the_resumed_part_is_not_counted(clock: Clock) -> None:
    out = io.StringIO()
    bar = Progress("train", 100, "step", done=50, out=out)
    clock.now += 10
    bar.update(60)
    clock.now += 10
    bar.update(80)
    assert out.getvalue().splitlines() == [
        "train | goes on from step 50",
        "train | step 60/100  60%  1.0 step/s  ETA 40s",
        "train | step 80/100  80%  2.0 step/s  ETA 13s",
    ]


def test_the_last_line_gives_the_rate_of_the_whole_when_it_follows_at_once(clock: Clock) -> None:
    out = io.StringIO()
    bar = Progress("images", 100, "img", out=out)
    clock.now += 9
    bar.update(90)
    clock.now += 0.001
    bar.update(100)
    assert out.getvalue().splitlines()[-1] == "images | step 100/100  100%  11 img/s  ETA 0s"


def test_an_unknown_total_has_no_percent(clock: Clock) -> None:
    out = io.StringIO()
    bar = Progress("images", 0, "img", counted="image", out=out)
    clock.now += 1
    bar.update(7)
    assert out.getvalue() == "images | image 7  7.0 img/s\n"


def test_other_ranks_are_silent() -> None:
    out = io.StringIO()
    Progress("train", 1, "step", enabled=False, out=out).update(1)
    assert out.getvalue() == ""


def test_numbers_are_short() -> None:
    assert [quantity(x) for x in (3.21, 12.3, 512.3, 1234, 41234, 1.2e6, 3e9)] == [
        "3.2", "12", "512", "1.2k", "41k", "1.2M", "3.0G",
    ]  # fmt: skip
    assert [duration(x) for x in (5.2, 59.7, 72.4, 3599.6, 7260)] == [
        "5s",
        "1m00s",
        "1m12s",
        "1h00m",
        "2h01m",
    ]
    assert [figure(x) for x in (3.2134, 0.000123, 12345.6, float("nan"))] == [
        "3.21",
        "0.000123",
        "12346",
        "nan",
    ]


def test_what_is_said_is_what_is_heard(capsys: pytest.CaptureFixture[str]) -> None:
    speech.started("images")
    speech.say("images", "bad: a.png: two\nlines")
    speech.warn("images", "little is left")
    speech.reused("images", "s3://b/images/0123")
    speech.done("images", 2.04)
    heard = [read(f"    {line}", {"images"}) for line in capsys.readouterr().out.splitlines()]
    assert heard == [
        Said("images", text)
        for text in (
            "started",
            "bad: a.png: two lines",
            "warning: little is left",
            "reused s3://b/images/0123",
            "done in 2.0 s",
        )
    ]
    assert [said.started for said in heard if said] == [True, False, False, False, False]
    assert [said.reused for said in heard if said] == [False, False, False, True, False]
    assert [said.seconds for said in heard if said] == [None, None, None, None, 2.0]


@pytest.mark.parametrize(
    "line",
    [
        "tokenizer  123 tensors",
        "tokenizer: 123 tensors",
        "text_model.embeddings | MISSING |",
        "INFO tokenizer | loaded",
        "tokenizer |",
        "judge | started",
        "",
    ],
)
def test_what_a_library_prints_is_no_line_of_a_step(line: str) -> None:
    assert read(line, {"tokenizer", "text"}) is None


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("step 1/2  50%  loss 3.2  4.0 tok/s  ETA 1h02m", Count(1, 2, 3720)),
        ("champion's picture 3/64  4%", Count(3, 64, 0)),
        ("image 7  7.0 img/s", Count(7, 0, 0)),
        ("step 2/2  100%  loss nan  4.0 tok/s  ETA 0s", Count(2, 2, 0)),
        ("version 3", None),
        ("300 read, 270 train, 30 validation", None),
        ("done in 2.0 s", None),
    ],
)
def test_progress_is_read_back(text: str, count: Count | None) -> None:
    assert Said("tokenizer", text).count == count
