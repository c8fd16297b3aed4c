"""Which sampling settings a model draws best with: the job behind `sampling`.

    python -m model.evaluation.sweep SPEC_URI

Guidance is tried first, at the config's temperature, then temperature at the best guidance; what the config
says always takes part. The oracle decides where there is one, else retrieval; of equals the higher CLIP score
is taken. Prompts are captions that nothing is measured on (`benchmark.for_sweeps`), held-out ones first.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from model.config import SamplingConfig
from model.data.image_shards import index
from model.data.sources.shapes import parse
from model.evaluation import oracle
from model.evaluation.benchmark import READ, for_sweeps, look, spread
from model.inference.bundle import PARTS, SAMPLING
from model.inference.generate import Generator
from model.nets import metrics
from model.nets.clip import Judge, load_judge
from model.plumbing import cache, speech
from model.plumbing.assets import Manifest
from model.plumbing.speech import Progress
from model.plumbing.worker import Job, run_worker

SEEDS = 2_000_000  # behind the first seed of the benchmark: neither its pictures nor those of the grids
ORDER = ("composition", "validation", "train")  # splits that prompts are taken from
ORACLE, RETRIEVAL, SCORE = "all attributes right", "retrieval accuracy", "CLIP score"

Curves = dict[str, list[list[float]]]  # of [setting, figure] by the figure's name


def main(job: Job) -> Manifest:
    """Try the settings of `config.sweep`; the asset holds the best ones, its `info` the curves.

    Raises:
        UserError: an asset is damaged, or the parts do not belong together.
    """
    config, inputs = job.config, job.inputs
    sweep, own = config.sweep, config.sampling
    prompts = sweep_prompts(inputs["images"], sweep.prompts)
    if len(prompts) < sweep.prompts:
        why = f"{len(prompts)} captions are set apart for the sweep, which wants {sweep.prompts}"
        speech.warn(job.spec.name, f"{why}: sampling stays as configured")
        return _finish(job, own, {"kept": why})
    folders = {part: cache.folder(inputs[part]) for part in PARTS}
    scales = sorted({own.cfg_scale, *sweep.cfg_scale})
    temperatures = sorted({own.temperature, *sweep.temperature})
    total = len(prompts) * (len(scales) + len(temperatures) - 1)
    generator = Generator.open(folders, own, pictures=total)
    judge = load_judge(cache.folder(inputs["judge"]), generator.device)
    shapes = config.data.source.kind == "shapes"
    progress = job.progress(total, "img", counted="picture")
    tried = Tried(generator, judge, prompts, config.evaluation.seed + SEEDS, shapes, progress)
    curves, best = {}, own
    for name, values in (("cfg_scale", scales), ("temperature", temperatures)):
        points = [best.model_copy(update={name: value}) for value in values]
        if len(points) > 1:
            found = [tried.figures(point) for point in points]
            curves[name] = _curves(values, found)
            best = points[max(range(len(points)), key=lambda i: _rank(found[i]))]
    decided_by = ORACLE if shapes else RETRIEVAL
    said = {"prompts": len(prompts), "decided_by": decided_by, "curves": curves, "kept": ""}
    return _finish(job, best, said)


def _finish(job: Job, chosen: SamplingConfig, said: dict[str, object]) -> Manifest:
    job.output.add_bytes(SAMPLING, chosen.model_dump_json(indent=2).encode())
    return job.output.finish({"cfg_scale": chosen.cfg_scale, "temperature": chosen.temperature, **said})


def sweep_prompts(images: Manifest, wanted: int) -> list[str]:
    """Up to so many different captions that are set apart for sweeps, held-out ones first."""
    chosen: dict[str, None] = {}
    for split in ORDER:
        if any(name.startswith(f"{split}-") for name in images.info["shards"]):
            found = dict.fromkeys(_set_apart(images, split))
            fresh = [caption for caption in found if caption not in chosen]
            chosen |= dict.fromkeys(fresh[i] for i in spread(len(fresh), wanted - len(chosen)))
    return list(chosen)


def _set_apart(images: Manifest, split: str) -> Iterator[str]:
    captions = [caption for entry in index(images, split, READ) for caption in entry.captions]
    if not all(map(for_sweeps, captions)):  # if so, the benchmark has taken them: see `benchmark.py`
        yield from filter(for_sweeps, captions)


class Tried:
    """The figures of each setting over the same prompts and seeds; nothing is drawn twice."""

    def __init__(
        self,
        generator: Generator,
        judge: Judge,
        prompts: Sequence[str],
        seed: int,
        shapes: bool,
        progress: Progress,
    ) -> None:
        """
        Args:
            generator: the model.
            judge: scores what it draws.
            prompts: what is drawn.
            seed: of the first, the next ones count on.
            shapes: whether prompts describe scenes that the oracle reads.
            progress: hears of every picture drawn.
        """
        self.generator, self.judge, self.prompts = generator, judge, list(prompts)
        self.seeds = range(seed, seed + len(self.prompts))
        self.scenes = [parse(prompt) for prompt in self.prompts] if shapes else []
        self.text = self.judge.text_features(self.prompts)
        self._progress, self._count = progress, 0
        self._found: dict[SamplingConfig, dict[str, float]] = {}

    def figures(self, sampling: SamplingConfig) -> dict[str, float]:
        """By name, the deciding one first."""
        if sampling not in self._found:
            images = self.generator.draw(
                self.prompts,
                self.seeds,
                sampling,
                on_batch=lambda done: self._progress.update(self._count + done),
            ).cpu()
            self._count += len(images)
            features = look(self.judge, images)
            exact = {ORACLE: oracle.oracle_score(images, self.scenes)["all_right"]} if self.scenes else {}
            self._found[sampling] = exact | {
                RETRIEVAL: metrics.retrieval_accuracy(features, self.text, self.prompts),
                SCORE: float(metrics.clip_score(features, self.text).mean()),
            }
        return self._found[sampling]


def _rank(figures: dict[str, float]) -> tuple[float, float]:
    return figures.get(ORACLE, figures[RETRIEVAL]), figures[SCORE]


def _curves(values: Sequence[float], found: Sequence[dict[str, float]]) -> Curves:
    return {
        name: [[value, figures[name]] for value, figures in zip(values, found, strict=True)]
        for name in found[0]
    }


if __name__ == "__main__":
    run_worker(main)
