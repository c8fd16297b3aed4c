"""Whether a challenger takes the champion's place: decided from what both were measured to, and nothing else.

One figure decides, a score for each prompt: the challenger must be better by the margin on average, and the
interval of that average (paired bootstrap over prompts) must lie above 0. Guards are figures that may not get
worse than their bounds. Few prompts show nothing: how many a margin needs follows from how much the
differences vary, and with fewer the verdict is `undecidable`.

Where those held out are too few, captions seen in training count as well. That alone would promote what
recalls more and understands less, so over the prompts held out nobody may then be worse by a margin.

The arithmetic of that number: whoever is better by twice the margin must pass in nine cases of ten. So the
margin has to be z(0.9) standard errors, and twice the margin z(0.9) + z of the interval. The variance takes
in one prompt won and one lost that nobody saw: a handful of prompts on which two models are equal, or one
always wins, does not say that they always will.

Letters: n prompts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import NormalDist
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from model.config import GateConfig
from model.errors import UserError

Outcome = Literal[
    "first",  # no version was in use
    "replaces",  # the champion is of no use to anybody
    "better",
    "not better",
    "undecidable",  # by so few prompts
    "refused",  # a guard is broken, or a figure is missing
    "not compared",  # the champion cannot be measured on the same
    "in use",  # it is the champion
]
PROMOTED = ("first", "replaces", "better")
SEEN, HELD_OUT = "train", ("validation", "composition")  # splits of prompts
RESAMPLES = 2000  # of the bootstrap
POWER = 0.9  # share of models better by twice the margin that pass
RANGE = {"clip_score": 10.0}  # largest difference that a prompt makes; 1 where scores are shares
SPEED = "pictures_per_second"
COPIES_SEEN, COPIES_HELD_OUT = f"{SEEN}/near_duplicates", "held_out/near_duplicates"

WORDS = {  # of figures, for people
    "oracle": "all attributes right",
    "retrieval": "retrieval accuracy",
    "clip_score": "CLIP score",
    "bits_per_token": "bits per token",
    "psnr": "PSNR in dB",
    "near_duplicates": "near-duplicates of training pictures",
    "diversity": "diversity",
    "bundle_bytes": "bytes of the bundle",
    SPEED: "pictures per second",
    "train": "captions seen",
    "validation": "captions held out",
    "composition": "combinations held out",
    "held_out": "all that is held out",
}


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Measured(_Part):
    """What a model was measured to on a benchmark."""

    benchmark: str  # its key: what has another one cannot be compared
    figures: dict[str, float]
    scores: dict[str, dict[str, list[float]]]  # by metric and split, one per prompt
    chance: dict[str, dict[str, float]] = {}  # of a blind judge, by metric and split
    tokenizer: str = ""  # hash of the asset that makes codes: bits per token of others mean something else

    @classmethod
    def of(cls, info: Mapping[str, Any], tokenizer: str = "") -> Measured:
        """From the `info` of an evaluation or a measurement."""
        known = {name: info[name] for name in ("benchmark", "figures", "scores", "chance") if name in info}
        return cls.model_validate(
            {"benchmark": "", "figures": {}, "scores": {}, **known, "tokenizer": tokenizer}
        )

    @property
    def splits(self) -> list[str]:
        """Those that there are prompts of."""
        there = {split for scores in self.scores.values() for split, one in scores.items() if one}
        return [split for split in (*HELD_OUT, SEEN) if split in there]

    def with_figure(self, name: str, value: float) -> Measured:
        """The same with one more figure."""
        return self.model_copy(update={"figures": {**self.figures, name: value}})

    def figure(self, name: str) -> float | None:
        """A figure by its name, or None: also of all samples held out, which each split is too few of."""
        if name != COPIES_HELD_OUT:
            return self.figures.get(name)
        splits = [split for split in self.splits if split != SEEN]
        shares = [self.figures.get(f"{split}/near_duplicates") for split in splits]
        sizes = [next(len(one[split]) for one in self.scores.values() if split in one) for split in splits]
        known = [share for share in shares if share is not None]
        if not shares or len(known) < len(shares):
            return None
        return sum(share * size for share, size in zip(known, sizes, strict=True)) / sum(sizes)


class Guard(_Part):
    """A figure that may not get worse than a bound."""

    figure: str
    value: float | None
    theirs: float | None  # the champion's
    bound: float | None  # None: there is nothing to hold it against
    holds: bool
    said: str  # the same in words


class Verdict(_Part):
    """What was decided, and from what."""

    outcome: Outcome
    reason: str  # one line
    metric: str = ""  # the figure that decides
    prompts: str = ""  # that it is of, in words
    count: int = 0  # of them
    needed: int = 0  # for the margin
    ours: float | None = None  # the deciding figure
    theirs: float | None = None
    difference: float | None = None  # of the two, with the interval of its mean
    low: float | None = None
    high: float | None = None
    margin: float = 0.0
    confidence: float = 0.0
    columns: dict[str, tuple[float | None, float | None]] = {}  # every figure: challenger's, champion's
    guards: list[Guard] = []
    against: int | None = None  # version of the champion
    benchmark: str = ""  # key of what both were measured on
    judge: str = ""  # by whom, in words

    @property
    def promoted(self) -> bool:
        """Whether the challenger is champion from now on."""
        return self.outcome in PROMOTED


# ── the rule ────────────────────────────────────────────────────────────────────────────────────────────


def decide(gate: GateConfig, challenger: Measured, champion: Measured | None = None) -> Verdict:
    """The verdict on a challenger.

    Args:
        gate: the rule.
        challenger: what it was measured to.
        champion: the same of the version in use; None where there is none.

    Raises:
        UserError: the two were measured on different prompts.
    """
    plain = _plain(gate, challenger, champion)
    if ill := _ill(challenger, plain.metric, plain.guards):
        return _with(plain, "refused", "; ".join(ill))
    if champion is None:
        return _first(gate, challenger, plain)
    if not _finite(champion.scores.get(plain.metric)):
        why = f"the champion's {WORDS[plain.metric]} is no finite number"
        return replaces(gate, challenger, why)
    return _compared(gate, challenger, champion, plain)


def replaces(gate: GateConfig, challenger: Measured, why: str) -> Verdict:
    """The verdict where the champion is of no use: any model takes its place that would be the first ever.

    Args:
        gate: the rule.
        challenger: what it was measured to.
        why: the champion is of no use.
    """
    plain = _plain(gate, challenger)
    if ill := _ill(challenger, plain.metric, plain.guards):
        return _with(plain, "refused", f"{'; '.join(ill)} (and {why})")
    alone = _first(gate, challenger, plain)
    if alone.outcome == "refused":
        return _with(alone, "refused", f"{alone.reason} (and {why})")
    return _with(alone, "replaces", why)


def not_compared(gate: GateConfig, challenger: Measured, why: str) -> Verdict:
    """The verdict where the champion cannot be measured on the same."""
    return _with(_plain(gate, challenger), "not compared", why)


def refused(gate: GateConfig, why: str) -> Verdict:
    """The verdict on a challenger that cannot be measured."""
    return Verdict(outcome="refused", reason=why, margin=gate.margin, confidence=gate.confidence)


def _plain(gate: GateConfig, challenger: Measured, champion: Measured | None = None) -> Verdict:
    """All but what is decided."""
    return Verdict(
        outcome="refused",
        reason="",
        metric=_metric(gate, challenger),
        margin=gate.margin,
        confidence=gate.confidence,
        columns=_columns(challenger, champion),
        guards=_guards(gate, challenger, champion),
    )


def _first(gate: GateConfig, challenger: Measured, plain: Verdict) -> Verdict:
    """Of the first version ever: nobody to be better than, but a blind judge."""
    metric = "retrieval" if plain.metric == "clip_score" else plain.metric  # which says nothing by itself
    if not _finite(challenger.scores.get(metric)):
        return _with(plain, "refused", f"{WORDS[metric]} is missing, or no finite number")
    if metric != plain.metric:  # whose margin is in points of the score
        gate = gate.model_copy(update={"margin": GateConfig.model_fields["margin"].default})
    pools = _pools(challenger.scores[metric])
    enough = (pool for pool in pools if len(pool.values) >= _needed(pool.values, metric, gate))
    pool = next(enough, pools[-1])
    low, high = interval(pool.values, gate.confidence, gate.seed)
    ours, chance = float(pool.values.mean()), _chance(challenger, metric, pool)
    of = {"metric": metric, "prompts": pool.words, "count": len(pool.values)}
    measured = plain.model_copy(update={**of, "ours": ours, "low": low, "high": high})
    figures = (
        f"{WORDS[metric]} {ours:.3f} over {pool.words} ({100 * gate.confidence:.3g} % interval {low:.3f} to"
        f" {high:.3f}, by chance {chance:.3f})"
    )
    if broken := [guard.said for guard in plain.guards if not guard.holds]:
        return _with(measured, "refused", "; ".join(broken))
    if gate.above_chance and not low > chance:
        return _with(measured, "refused", f"not above chance: {figures}")
    return _with(measured, "first", f"no other is in use: {figures}")


def _compared(gate: GateConfig, challenger: Measured, champion: Measured, plain: Verdict) -> Verdict:
    metric = plain.metric
    ours, theirs = challenger.scores[metric], champion.scores[metric]
    lengths = [{split: len(one) for split, one in side.items()} for side in (ours, theirs)]
    if challenger.benchmark != champion.benchmark or lengths[0] != lengths[1]:
        raise UserError("challenger and champion were measured on different prompts; measure both anew")
    differences = {
        split: (np.asarray(ours[split], float) - np.asarray(theirs[split], float)).tolist() for split in ours
    }
    pools = _pools(differences)
    needs = [_needed(pool.values, metric, gate) for pool in pools]
    enough = [i for i, pool in enumerate(pools) if len(pool.values) >= needs[i]]
    chosen = enough[0] if enough else len(pools) - 1
    pool, needed = pools[chosen], needs[chosen]
    low, high = interval(pool.values, gate.confidence, gate.seed)
    difference = float(pool.values.mean())
    guards = [*_held_out(gate, metric, pool, ours, theirs), *plain.guards]
    measured = plain.model_copy(
        update={
            "guards": guards,
            "prompts": pool.words,
            "count": len(pool.values),
            "needed": needed,
            "ours": _mean(ours, pool.splits),
            "theirs": _mean(theirs, pool.splits),
            "difference": difference,
            "low": low,
            "high": high,
        }
    )
    figures = (
        f"{WORDS[metric]} {measured.ours:.3f} against {measured.theirs:.3f} over {pool.words}"
        f" (difference {difference:+.3f}, {100 * gate.confidence:.3g} % interval {low:+.3f} to {high:+.3f},"
        f" margin {gate.margin:.3g})"
    )
    if not enough:
        return _with(
            measured,
            "undecidable",
            f"the margin needs {needed} prompts, there are {len(pool.values)}: {figures}",
        )
    if difference < gate.margin or low <= 0:
        return _with(measured, "not better", figures)
    if broken := [guard.said for guard in guards if not guard.holds]:
        return _with(measured, "refused", f"{'; '.join(broken)}, though better: {figures}")
    return _with(measured, "better", figures)


def _with(verdict: Verdict, outcome: Outcome, reason: str) -> Verdict:
    return verdict.model_copy(update={"outcome": outcome, "reason": reason})


def _metric(gate: GateConfig, measured: Measured) -> str:
    """The figure that decides."""
    if gate.metric != "auto":
        return gate.metric
    return "oracle" if "oracle" in measured.scores else "retrieval"


def _columns(challenger: Measured, champion: Measured | None) -> dict[str, tuple[float | None, float | None]]:
    theirs = champion.figures if champion else {}
    return {
        name: (challenger.figures.get(name), theirs.get(name))
        for name in [*challenger.figures, *(name for name in theirs if name not in challenger.figures)]
    }


def _ill(challenger: Measured, metric: str, guards: Sequence[Guard]) -> list[str]:
    """What is missing of a challenger, or is no finite number."""
    scores = challenger.scores.get(metric)
    found = []
    if not _finite(scores):
        found.append(f"{WORDS[metric]} is {'no finite number' if scores else 'missing'}")
    found += [f"{name} is {value}" for name, value in challenger.figures.items() if not math.isfinite(value)]
    return found + [f"{guard.figure} is missing" for guard in guards if guard.value is None]


def _finite(scores: Mapping[str, Sequence[float]] | None) -> bool:
    """Whether there are scores, and all of them finite numbers."""
    values = [value for one in (scores or {}).values() for value in one]
    return bool(values) and all(map(math.isfinite, values))


def shown(verdict: Verdict) -> list[tuple[str, str, str]]:
    """The figures that a verdict rests on, for people: name, challenger's and champion's; "" is none."""
    rows = []
    if verdict.ours is not None:
        of = f"{WORDS[verdict.metric]} over {verdict.prompts}"
        rows.append(
            (of, _shown("", verdict.ours), "" if verdict.theirs is None else _shown("", verdict.theirs))
        )
    if verdict.difference is not None:
        held = f"{verdict.low:+.3f} to {verdict.high:+.3f}"
        rows.append(("difference, and its interval", f"{verdict.difference:+.3f} ({held})", ""))
    theirs = {guard.figure: guard.theirs for guard in verdict.guards if guard.theirs is not None}
    for figure, value in {guard.figure: guard.value for guard in verdict.guards}.items():
        other = _shown(figure, theirs[figure]) if figure in theirs else ""
        rows.append((words(figure), _shown(figure, value), other))
    return rows


# ── guards ──────────────────────────────────────────────────────────────────────────────────────────────


def _guards(gate: GateConfig, challenger: Measured, champion: Measured | None) -> list[Guard]:
    """Every guard that is on, with what it says of the two."""
    splits = challenger.splits
    if not splits:
        return []
    held = splits[0]  # in the order of how much they say
    same = champion is None or not champion.tokenizer or champion.tokenizer == challenger.tokenizer
    more, less = 1, -1
    found = [
        _guard(
            f"{held}/bits_per_token",
            challenger,
            champion if same else None,
            more,
            gate.more_bits_per_token + _told(held, challenger, champion),
        ),
        _guard(f"{held}/psnr", challenger, champion, less, gate.less_psnr),
        _guard(f"{held}/diversity", challenger, champion, less, gate.less_diversity, share=True),
        _guard("bundle_bytes", challenger, champion, more, gate.more_bundle_bytes, share=True),
    ]
    for figure, most, there in (
        (COPIES_SEEN, gate.max_near_duplicates.seen, SEEN in splits),
        (COPIES_HELD_OUT, gate.max_near_duplicates.held_out, held != SEEN),
    ):
        if there:
            found.append(_guard(figure, challenger, champion, more, gate.more_near_duplicates))
            found.append(_bounded(figure, challenger.figure(figure), more, most))
    if gate.speed_ratio and champion:
        found.append(_guard(SPEED, challenger, champion, less, 1 - gate.speed_ratio, share=True))
    return found


def _told(split: str, challenger: Measured, champion: Measured | None) -> float:
    """How many bits per token a wrong caption costs the challenger more than the champion, or 0.

    A net that is surer of what captions say draws better pictures, though it is surer where it errs, too, and
    its bits per token are more (docs/EXPERIMENTS.md, "The right figure").
    """
    ours, theirs = (
        one.figure(f"{split}/bits_per_token_text_gain") if one else None for one in (challenger, champion)
    )
    more = ours - theirs if ours is not None and theirs is not None else 0.0
    return max(0.0, more) if math.isfinite(more) else 0.0


def _held_out(
    gate: GateConfig,
    metric: str,
    pool: _Pool,
    ours: Mapping[str, Sequence[float]],
    theirs: Mapping[str, Sequence[float]],
) -> list[Guard]:
    """The guard of a decision that rests on captions seen as well: the deciding figure over those held out.

    These are fewer than the margin needs, so their standard error is above 0.6 margins. The bound is a
    margin: an interval below 0, at two standard errors, comes later, and would let pass most models that are
    worse by a margin; a bound of 0 would refuse half of those that recall more and are as good on the rest.
    One prompt more may always be lost than won.
    """
    held = [split for split in pool.splits if split != SEEN]
    if not held or SEEN not in pool.splits:
        return []
    value, other = _mean(ours, held), _mean(theirs, held)
    one = RANGE.get(metric, 1.0) / sum(len(ours[split]) for split in held)
    bound = other - max(gate.less_held_out * gate.margin, one)
    return [_bounded(f"held_out/{metric}", value, -1, bound, other)]


def _guard(
    figure: str,
    challenger: Measured,
    champion: Measured | None,
    worse: int,
    allowed: float,
    share: bool = False,
) -> Guard:
    """A figure held against the champion's.

    Args:
        figure: its name.
        challenger: has it.
        champion: has it, too; else the guard holds.
        worse: 1 where more is worse, -1 where less is.
        allowed: how much worse it may be.
        share: as a share of the champion's.
    """
    theirs = champion.figure(figure) if champion else None
    if theirs is None or not math.isfinite(theirs):  # nothing to be worse than
        value = challenger.figure(figure)
        said = f"{words(figure)}: {_shown(figure, value)}, with nothing of the champion's to compare it with"
        return Guard(figure=figure, value=value, theirs=None, bound=None, holds=value is not None, said=said)
    bound = theirs + worse * allowed * (theirs if share else 1)
    return _bounded(figure, challenger.figure(figure), worse, bound, theirs)


def _bounded(
    figure: str, value: float | None, worse: int, bound: float, theirs: float | None = None
) -> Guard:
    holds = value is not None and worse * (value - bound) <= 1e-9 * max(1.0, abs(bound))
    than = f"{'above' if worse > 0 else 'below'} {_shown(figure, bound)}"
    of = f", as the champion's is {_shown(figure, theirs)}" if theirs is not None else ""
    said = f"{words(figure)}: {_shown(figure, value)} is {'not ' if holds else ''}{than}{of}"
    return Guard(figure=figure, value=value, theirs=theirs, bound=bound, holds=holds, said=said)


def words(figure: str) -> str:
    """A figure's name for people."""
    split, _, name = figure.rpartition("/")
    return WORDS.get(name, name) + (f" ({WORDS[split]})" if split else "")


def _shown(figure: str, value: float | None) -> str:
    if value is None:
        return "missing"
    return f"{value:.0f}" if figure == "bundle_bytes" else f"{value:.3g}"


# ── figures ─────────────────────────────────────────────────────────────────────────────────────────────


class _Pool(NamedTuple):
    """Prompts that a decision may rest on."""

    splits: tuple[str, ...]
    values: NDArray[np.float64]  # (n,)
    words: str


def _pools(scores: Mapping[str, Sequence[float]]) -> list[_Pool]:
    """The prompts held out, where there are any; then all prompts."""
    held = tuple(split for split in HELD_OUT if scores.get(split))
    seen = (SEEN,) if scores.get(SEEN) else ()
    pools = []
    if held:
        values = _joined(scores, held)
        pools.append(_Pool(held, values, f"{len(values)} prompts held out"))
    if seen:
        values = _joined(scores, held + seen)
        of = f", {len(scores[SEEN])} of them captions seen in training" if held else " seen in training"
        pools.append(_Pool(held + seen, values, f"{len(values)} prompts{of}"))
    return pools


def _joined(scores: Mapping[str, Sequence[float]], splits: Sequence[str]) -> NDArray[np.float64]:
    return np.asarray([value for split in splits for value in scores[split]], dtype=np.float64)


def _mean(scores: Mapping[str, Sequence[float]], splits: Sequence[str]) -> float:
    return float(_joined(scores, splits).mean())


def _chance(measured: Measured, metric: str, pool: _Pool) -> float:
    """What a blind judge would score over the prompts of a pool; 0 for what nobody guesses."""
    sizes = {split: len(measured.scores[metric][split]) for split in pool.splits}
    blind = measured.chance.get(metric, {})
    return sum(blind.get(split, 0.0) * size for split, size in sizes.items()) / sum(sizes.values())


def interval(values: NDArray[np.float64], confidence: float, seed: int) -> tuple[float, float]:
    """The two-sided bootstrap interval of a mean (percentiles; Efron & Tibshirani 1993, ch. 13).

    Args:
        values: (n,), of one prompt each.
        confidence: share of the resampled means that it holds.
        seed: of the resampling.
    """
    kinds, counts = np.unique(
        values, return_counts=True
    )  # resampling prompts is drawing how often each value
    drawn = np.random.default_rng(seed).multinomial(len(values), counts / len(values), size=RESAMPLES)
    means = drawn @ kinds / len(values)
    outside = (1 - confidence) / 2
    low = np.quantile(means, outside, method="lower")
    high = np.quantile(means, 1 - outside, method="higher")
    return float(low), float(high)


def prompts_needed(variance: float, margin: float, confidence: float) -> int:
    """How many prompts a margin needs, where the paired differences have this variance.

    So many that a model better by twice the margin passes with probability `POWER`, and at least as many as
    tell anything: n prompts that are all won are of one in 2^n by chance.
    """
    normal = NormalDist()
    passes, outside = normal.inv_cdf(POWER), normal.inv_cdf((1 + confidence) / 2)
    errors = max(passes, (passes + outside) / 2)  # standard errors that the margin has to be
    fewest = math.ceil(math.log2(2 / (1 - confidence)))
    return max(math.ceil(variance * (errors / margin) ** 2), fewest)


def _needed(values: NDArray[np.float64], metric: str, gate: GateConfig) -> int:
    most = RANGE.get(metric, 1.0)
    smoothed = np.append(values, [most, -most])  # one won and one lost that nobody saw
    return prompts_needed(float(smoothed.var(ddof=1)), gate.margin, gate.confidence)
