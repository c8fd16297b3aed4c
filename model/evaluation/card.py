"""The model card of a registered version: what it is, made from what, how good, for what not, how to use it.

Markdown, which MLflow shows as the version's description. After Mitchell et al., arXiv:1810.03993.
"""

from __future__ import annotations

from model.config import RunConfig, Source
from model.evaluation import gate
from model.evaluation.gate import Verdict
from model.plumbing.assets import Manifest


def card(config: RunConfig, name: str, version: int, evaluation: Manifest, verdict: Verdict) -> str:
    """The card of a version.

    Args:
        config: of the run that made it.
        name: of the registered model.
        version: its number.
        evaluation: of the model; names pictures and headline.
        verdict: on the version.
    """
    images = evaluation.input("images")
    return "\n\n".join(
        [
            f"# {name}, version {version}",
            _what(config),
            f"**Verdict: {verdict.outcome}.** {verdict.reason}",
            _table(verdict, version),
            "## Data and licences",
            _data(config, images),
            "## Limits",
            _limits(images),
            "## Use",
            _use(name, version),
        ]
    )


def _what(config: RunConfig) -> str:
    net, tokenizer = config.transformer, config.tokenizer
    assert net
    side = config.data.image_size
    made = "trained with it" if tokenizer.kind == "vqvae" else f"{tokenizer.ref}, frozen"
    reads = "a compact CLIP trained with it" if config.clip.kind == "trained" else f"CLIP {config.clip.name}"
    return (
        f"Draws pictures of {side} by {side} pixels from a prompt: a transformer of {net.depth} blocks of"
        f" width {net.width} predicts the codes of a VQ-VAE ({made}); prompts are read by {reads}. Made by"
        f" preset `{config.name}` of latent-gpt."
    )


def _table(verdict: Verdict, version: int) -> str:
    rows = gate.shown(verdict)
    if not rows:
        return "It was not measured beside others."
    against = "" if verdict.against is None else f"champion, version {verdict.against}"
    lines = [f"| | version {version} | {against} |", "|---|---|---|"]
    lines += [f"| {what} | {ours} | {theirs} |" for what, ours, theirs in rows]
    by = (
        f"\n\nMeasured on benchmark `{verdict.benchmark}`, by judge {verdict.judge}." if verdict.judge else ""
    )
    return "\n".join(lines) + by


def _data(config: RunConfig, images: Manifest) -> str:
    counts = ", ".join(
        f"{images.info[split]} {words}"
        for split, words in (
            ("train", "for training"),
            ("validation", "held out"),
            ("composition", "of combinations held out"),
        )
        if images.info.get(split)
    )
    pretrained = [
        what
        for what in (
            config.clip.kind == "pretrained" and f"the CLIP {config.clip.name} ({config.clip.weights})",
            config.tokenizer.kind == "pretrained" and f"the tokenizer {config.tokenizer.ref}",
        )
        if what
    ]
    others = f" Licences of their own have {' and '.join(pretrained)}." if pretrained else ""
    return f"{_source(config.data.source)} Pictures: {counts or 'as its manifest says'}.{others}"


def _source(source: Source) -> str:
    if source.kind == "openmoji":
        return (
            "[OpenMoji](https://openmoji.org): all emojis designed by OpenMoji, the open-source emoji and"
            " icon project. Licence: CC BY-SA 4.0. Captions: names and aliases of Unicode CLDR (Unicode"
            " licence)."
        )
    if source.kind == "shapes":
        return "Coloured shapes, drawn for the purpose: nobody has rights in them."
    if source.kind == "hub":
        return (
            f"`{source.repo}` of the Hugging Face hub, revision `{source.revision}`. Its card there says what"
            " may be done with the pictures, and with what learned from them."
        )
    where = source.urls if source.kind == "webdataset" else source.path
    return f"Yours: `{where}`. What may be done with the pictures, and with what learned from them, you know."


def _limits(images: Manifest) -> str:
    return (
        f"It knows what {images.info.get('train', 'its')} training pictures show, no more, and recalls some"
        " of them (near-duplicates, above). Figures hold for prompts like its captions, by a judge that was"
        " made from the same pictures, or is a network itself. Nothing keeps prompts or pictures decent."
    )


def _use(name: str, version: int) -> str:
    return (
        f'    latent-gpt generate "red apple" --model models:/{name}/{version}\n\n'
        f'or `mlflow.pyfunc.load_model("models:/{name}/{version}").predict({{"prompt": ["red apple"]}})`,'
        " which gives PNG files in base64."
    )
