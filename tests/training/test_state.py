"""What the loops share: one declaration of their state, sums that are exact over ranks, only numbers."""

from __future__ import annotations

import copy
import math
import os
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from model.config import TrainingConfig
from model.errors import Diverged
from model.plumbing import storage
from model.plumbing.checkpoints import Checkpointer
from model.plumbing.curves import Curves
from model.plumbing.distributed import Distributed, setup
from model.plumbing.worker import Job
from model.training import state
from model.training.optim import Ema, adamw, learning_rate, muon
from model.training.state import (
    Best,
    Clock,
    Pace,
    Patience,
    Resumable,
    RunningSums,
    explained,
    itstime,
    not_finite,
)
from tests.ranks import two_ranks

ALONE = Distributed(rank=0, world=1, local_rank=0, device=torch.device("cpu"))
TRAINING = TrainingConfig(steps=200, batch_size=1, ema=0.9)


class Silent:
    """Stands where the tracker stands."""

    def metrics(self, step: int, **values: float) -> None:
        pass


def test_what_is_due_is_due_at_the_end_too() -> None:
    assert [done for done in range(1, 8) if itstime(done, 3, 7)] == [3, 6, 7]


# ── a state ─────────────────────────────────────────────────────────────────────────────────────────────


class Training:
    """A small net with every kind of part, and steps of it."""

    def __init__(self, folder: Path, optimizer: str = "adamw", seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.net = nn.Sequential(nn.Linear(4, 8, bias=False), nn.BatchNorm1d(8), nn.Linear(8, 2, bias=False))
        if optimizer == "muon":
            self.optimizers = muon(self.net, self.net[0], TRAINING)
        elif optimizer == "adamw":
            self.optimizers = {"adamw": adamw(self.net, TRAINING)}
        else:
            self.optimizers = {"sgd": torch.optim.SGD(self.net.parameters(), lr=0.01, momentum=0.9)}
        self.ema, self.best, self.curves = Ema(self.net, 0.9), Best(), Curves(Silent())  # type: ignore[arg-type]
        self.sums = RunningSums(ALONE, "loss")
        self.state = Resumable(
            Checkpointer(str(folder)), ALONE, net=self.net, ema=self.ema, best=self.best, sums=self.sums,
            curves=self.curves, **self.optimizers,
        )  # fmt: skip

    def go(self, first: int, last: int) -> None:
        for step in range(first, last):
            torch.manual_seed(step)
            loss = self.net(torch.randn(5, 4)).square().mean()
            loss.backward()
            self.sums.add(loss=loss)
            for optimizer in self.optimizers.values():
                optimizer.step()
                optimizer.zero_grad()
            self.ema.update()
            if itstime(step + 1, 3, 20):
                self.curves.add(step + 1, "train", self.sums.means(step + 1))
                self.best.offer(-step if step < 4 else step - 20.5, self.net, {"step": step + 1})

    def everything(self) -> dict[str, Any]:
        return {name: part.state_dict() for name, part in self.state.parts.items()}


def saved(state: Resumable, done: int) -> None:
    state.save(done)
    state.wait()


def same(one: Any, other: Any) -> bool:
    """Equal to the bit, key by key; a checkpoint's keys are text and its tuples lists."""
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "sgd"])
@pytest.mark.parametrize("stop", [1, 3, 5])
def test_all_parts_go_on_to_the_bit(optimizer: str, stop: int, tmp_path: Path) -> None:
    whole = Training(tmp_path / "whole", optimizer)
    assert whole.state.restore() == 0
    whole.go(0, 12)
    killed = Training(tmp_path / "killed", optimizer)
    killed.go(0, stop)
    killed.state.save(stop)
    before = copy.deepcopy(killed.everything())
    killed.go(stop, stop + 2)  # while it is stored
    killed.state.wait()
    resumed = Training(tmp_path / "killed", optimizer, seed=1)
    assert resumed.state.restore() == stop
    assert same(resumed.everything(), before)
    resumed.go(stop, 12)
    assert same(resumed.everything(), whole.everything())


def test_a_checkpoint_of_other_parts_is_refused(tmp_path: Path) -> None:
    saved(Training(tmp_path).state, 1)
    training = Training(tmp_path, "sgd")
    with pytest.raises(KeyError, match="sgd"):
        training.state.restore()


def test_moments_of_channels_last_weights_survive_a_checkpoint(tmp_path: Path) -> None:
    """Fused kernels walk memory, not indices: moments must come back in their parameter's layout."""
    whole, killed = (nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last) for _ in range(2))
    killed.load_state_dict(whole.state_dict())
    first, second = adamw(whole, TRAINING), adamw(killed, TRAINING)
    picture = torch.randn(1, 3, 8, 8)

    def step(net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        net(picture).square().sum().backward()
        optimizer.step()

    step(whole, first)
    saved(Resumable(Checkpointer(str(tmp_path)), ALONE, net=whole, adamw=first), 1)
    Resumable(Checkpointer(str(tmp_path)), ALONE, net=killed, adamw=second).restore()
    for _ in range(2):
        step(whole, first)
        step(killed, second)
    assert torch.equal(whole.weight, killed.weight)


def test_the_best_is_kept_as_it_was() -> None:
    net, best = nn.Linear(1, 1, bias=False), Best()
    for value, score in ((1.0, -3.0), (2.0, -1.0), (3.0, -1.0), (4.0, -2.0)):
        nn.init.constant_(net.weight, value)
        best.offer(score, net, {"step": value})
    assert best.weights["weight"].item() == 2.0
    assert best.figures == {"step": 2.0}


# ── enough ──────────────────────────────────────────────────────────────────────────────────────────────


def test_it_is_over_when_so_many_in_a_row_were_not_the_best() -> None:
    patience = Patience(2, ALONE)
    assert [patience.over(score) for score in (1.0, 0.9, 1.1, 1.1, 1.0, 0.9)] == [
        *(False, False, False, False, True, True)
    ]
    never = Patience(0, ALONE)
    assert not any(never.over(-score) for score in range(100))
    assert never.parts == {}


def test_a_resumed_job_goes_on_counting(tmp_path: Path) -> None:
    first, second = Patience(2, ALONE), Patience(2, ALONE)
    first.over(1.0)
    first.over(0.5)
    saved(Resumable(Checkpointer(str(tmp_path)), ALONE, **first.parts), 1)
    assert Resumable(Checkpointer(str(tmp_path)), ALONE, **second.parts).restore() == 1
    assert second.over(0.9)


def _decide_in_ranks() -> None:
    with setup() as processes:
        patience = Patience(1, processes)
        patience.over(1.0)
        assert not patience.over(2.0 - 3 * processes.rank)  # the second rank measures something else
        assert patience.over(1.5 + 3 * processes.rank)


@pytest.mark.slow
def test_all_ranks_end_when_the_main_one_does(store: str) -> None:
    two_ranks(_decide_in_ranks, store)


# ── time ────────────────────────────────────────────────────────────────────────────────────────────────


def clock(until: float, foreseen: int = 100) -> Clock:
    training = TrainingConfig(steps=foreseen, batch_size=1, warmup_steps=8)
    return Clock(training, until, ALONE)


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What both clocks show."""
    now = [1000.0]
    for clock_of in ("time", "monotonic"):
        monkeypatch.setattr(f"model.training.state.time.{clock_of}", lambda: now[0])
    return now


def run(fitting: Clock, now: list[float], steps: range, each: float) -> None:
    for done in steps:
        now[0] += each
        fitting.fitted(done)


def test_steps_are_fitted_to_the_time_once_at_the_end_of_warm_up(now: list[float]) -> None:
    fitting = clock(until=1200.0)
    run(fitting, now, range(1, 2), 60)  # what comes once, such as compilation
    run(fitting, now, range(2, 8), 1)
    assert fitting.training.steps == 100, "what was learned so far depends on it nowhere"
    run(fitting, now, range(8, 9), 1)
    assert fitting.training.steps == 8 + int(133 / (1 * Clock.VALIDATIONS))
    fitted = fitting.training.steps
    run(fitting, now, range(9, 60), 10)
    assert fitting.training.steps == fitted, "it has become slower, and the learning rate has followed them"
    never = clock(until=0.0)
    run(never, now, range(1, 20), 100)
    assert never.training.steps == 100
    assert never.parts == {}


def test_the_same_steps_given_have_the_same_learning_rates(now: list[float]) -> None:
    fitting, rates = clock(until=1150.0), []
    for step in range(160):
        rates.append(learning_rate(step, fitting.training))
        run(fitting, now, range(step + 1, step + 2), 1)
    assert fitting.training.steps != 100
    given = fitting.training.model_copy()
    assert rates == [learning_rate(step, given) for step in range(160)]


def test_steps_are_no_fewer_than_half_and_no_more_than_twice(now: list[float]) -> None:
    for until, steps in ((1e9, 200), (1001.0, 50)):
        fitting = clock(until)
        run(fitting, now, range(1, 9), 1)
        assert fitting.training.steps == steps
        now[0] = 1000.0


def test_who_resumes_has_the_steps_that_were_fitted(tmp_path: Path, now: list[float]) -> None:
    first, second = clock(1150.0), clock(1150.0)
    run(first, now, range(1, 9), 1)
    saved(Resumable(Checkpointer(str(tmp_path)), ALONE, **first.parts), 20)
    assert Resumable(Checkpointer(str(tmp_path)), ALONE, **second.parts).restore() == 20
    assert second.training.steps == first.training.steps != 100


@pytest.mark.parametrize("warmup", [0, 1, 2])
def test_hardly_any_warm_up_will_do(warmup: int, now: list[float]) -> None:
    fitting = Clock(TrainingConfig(steps=100, batch_size=1, warmup_steps=warmup), 1150.0, ALONE)
    run(fitting, now, range(1, 20), 1)
    assert fitting.training.steps == 2 + int(148 / Clock.VALIDATIONS)


def test_who_resumes_at_the_end_of_warm_up_is_fitted_by_the_next_two_steps(now: list[float]) -> None:
    fitting = clock(1150.0)
    run(fitting, now, range(8, 9), 60)
    assert fitting.training.steps == 100
    run(fitting, now, range(9, 20), 1)
    assert fitting.training.steps == 9 + int(89 / Clock.VALIDATIONS)


# ── what a person is told ───────────────────────────────────────────────────────────────────────────────


def test_what_was_broken_before_the_first_step_is_not_blamed_on_the_learning_rate() -> None:
    training, job = TrainingConfig(steps=10, batch_size=1, warmup_steps=1), cast(Job, None)
    with pytest.raises(Diverged, match=r"^text: weight x is not finite$"), explained(job, "clip", training):
        raise Diverged("text: weight x is not finite")


# ── sums ────────────────────────────────────────────────────────────────────────────────────────────────


def test_sums_become_means_per_step_and_start_again() -> None:
    sums = RunningSums(ALONE, "loss", "grad_norm")
    for loss in (1.0, 2.0, 6.0):
        for part in (loss - 0.5, loss + 0.5):  # two micro-batches
            sums.add(2, loss=torch.tensor(part))
        sums.add(grad_norm=torch.tensor(10 * loss))
    assert sums.means(3) == {"loss": 3.0, "grad_norm": 30.0}
    sums.add(loss=torch.tensor(8.0), grad_norm=torch.tensor(1.0))
    assert sums.means(4) == {"loss": 8.0, "grad_norm": 1.0}


def _sum_in_ranks(folder: str) -> None:
    with setup() as processes:
        sums = RunningSums(processes, "loss")
        state = Resumable(Checkpointer(folder), processes, sums=sums)
        sums.add(loss=torch.tensor(3.0 + 2 * processes.rank))
        saved(state, 1)
        sums.add(loss=torch.tensor(100.0))  # of a step that is lost
        processes.barrier()
        again = RunningSums(processes, "loss")
        assert Resumable(Checkpointer(folder), processes, sums=again).restore() == 1
        assert again.state_dict()["sums"]["loss"].tolist() == [3.0, 5.0]
        again.add(loss=torch.tensor(1.0))
        assert again.means(2) == {"loss": 2.5}  # (3 + 1 and 5 + 1) / 2 steps, over both ranks
        if processes.rank == 1:
            again.add(loss=torch.tensor(math.nan))
        with pytest.raises(Diverged, match="train/loss is nan at step 3"):
            again.check(3)
        with pytest.raises(Diverged, match=r"sums\.sums\.loss is not finite at step 3"):
            Resumable(Checkpointer(folder), processes, sums=again).save(3)
    assert [path.name for path in Path(folder).iterdir()] == ["step-00000001"]


@pytest.mark.slow
def test_every_rank_takes_its_own_sums_back_and_all_stop_together(store: str) -> None:
    folder = os.path.join(store, "checkpoints")
    two_ranks(_sum_in_ranks, store, folder)
    alone = RunningSums(ALONE, "loss")  # one process goes on where two were: with the mean of both
    assert Resumable(Checkpointer(folder), ALONE, sums=alone).restore() == 1
    assert alone.means(1) == {"loss": 4.0}


# ── what MLflow sees beside ─────────────────────────────────────────────────────────────────────────────


def test_the_pace_is_that_since_the_last_line(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([100.0, 104.0, 105.0])
    monkeypatch.setattr(state.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(state, "peak_flops", lambda device: 1e12)
    pace = Pace(ALONE.device, "tokens", per_step=64, done=10, work=2e11)
    first = pace.since(30)
    assert 0.01 < first.pop("peak_memory_gib") < 100
    assert first == {"tokens_per_second": 64 * 5, "mfu": 1.0}
    assert pace.since(32)["tokens_per_second"] == 64 * 2
    assert pace.mfu == {"mfu": pytest.approx(0.4)}


def test_without_a_known_peak_there_is_no_share_of_it() -> None:
    pace = Pace(ALONE.device, "pictures", per_step=64, done=0)
    assert set(pace.since(1)) == {"pictures_per_second", "peak_memory_gib"}
    assert pace.mfu == {}


# ── numbers only ────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_one_bad_addend_spoils_the_sum(bad: float) -> None:
    sums = RunningSums(ALONE, "loss", "grad_norm")
    for value in (1.0, bad, -bad, 2.0):
        sums.add(loss=torch.tensor(1.0), grad_norm=torch.tensor(value))
    with pytest.raises(Diverged, match=r"train/grad_norm is \S*(nan|inf) at step 4"):
        sums.check(4)


@pytest.mark.parametrize("part", ["net", "ema", "adamw", "best"])
def test_no_part_that_is_not_finite_reaches_a_checkpoint(part: str, tmp_path: Path) -> None:
    training = Training(tmp_path)
    training.go(0, 3)
    saved(training.state, 3)
    tensor = {
        "net": training.net[1].running_mean,
        "ema": training.ema.average["0.weight"],
        "adamw": training.optimizers["adamw"].state[training.net[0].weight]["exp_avg"],
        "best": training.best.weights["0.weight"],
    }[part]
    tensor.data[0] = math.nan
    with pytest.raises(Diverged, match=rf"{part}\.\S+ is not finite at step 4"):
        training.state.save(4)
    assert {name.partition("/")[0] for name in storage.list_sizes(str(tmp_path))} == {"step-00000003"}


def test_integers_and_nothing_are_finite() -> None:
    assert not_finite({}) is None
    assert not_finite({"a": {"count": torch.tensor(3), "text": "nan"}}) is None
    assert not_finite({"a": {"b": torch.tensor([1.0, math.inf])}}) == "a.b"
