"""Text as the transformer reads it, and the judge of picture and prompt: open_clip models, used frozen.

A `text` or `judge` asset is a folder with `model.safetensors` and a `config.json` that holds the open_clip
architecture, so a model this project trained and a pretrained one are loaded through the same door.

Letters: B batch, S text tokens, W width of the text tower, E width of the shared embedding.
"""

from __future__ import annotations

import logging
import tempfile
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from pydantic import BaseModel, Field, model_validator
from torch import Tensor, nn

from model.config import HEAD_WIDTH, Context, Layers, PretrainedCLIPConfig, TrainedCLIPConfig
from model.errors import UserError
from model.nets.folder import fit, load

log = logging.getLogger(__name__)

CLIPModel = Any  # open_clip's `CLIP`, which is not imported before it is needed

START, END = 49406, 49407  # of CLIP's byte-pair vocabulary
VOCABULARY = 49408
CACHED_CAPTIONS = 8192  # text states kept by an encoder, least recently used first to go
CAPTIONS_READ = 1 << 16  # whose ids are kept, in the same way
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class TextEncoder:
    """Captions → per-token states before the pooled projection, with the mask of real tokens.

    Args:
        model: an open_clip `CLIP`.
        device: where states are computed and returned.
        dtype: of the tower and of the states.
        cached: number of captions whose states are kept.
    """

    def __init__(
        self,
        model: CLIPModel,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        cached: int = CACHED_CAPTIONS,
    ) -> None:
        self.device, self.dtype = torch.device(device), dtype
        self.context_length: int = model.context_length
        self.width: int = model.token_embedding.embedding_dim
        self._tower = _TextTower(model).to(self.device, dtype).eval()
        self._cached = cached
        self._states: OrderedDict[bytes, Tensor] = OrderedDict()

    def tokenize(self, captions: Sequence[str]) -> Int[Tensor, "B S"]:
        """Ids of captions, padded with 0; longer ones lose their end, with a warning."""
        return tokenize(captions, self.context_length)

    @torch.no_grad()
    def encode(self, ids: Int[Tensor, "B S"]) -> tuple[Float[Tensor, "B S W"], Bool[Tensor, "B S"]]:
        """States of ids, and their mask: True = a token of the caption, its ends included.

        An empty caption has no real token: the transformer reads it as the null text.
        """
        ids = ids.cpu()
        keys = [row.numpy().tobytes() for row in ids]
        missing = {key: row for key, row in zip(keys, ids, strict=True) if key not in self._states}
        if missing:
            rows = torch.stack(list(missing.values())).to(self.device)
            self._states.update(zip(missing, self._compute(rows), strict=True))
        for key in keys:
            self._states.move_to_end(key)
        batch = torch.stack([self._states[key] for key in keys])
        while len(self._states) > self._cached:
            self._states.popitem(last=False)
        return batch, text_mask(ids).to(self.device)

    def _compute(self, rows: Int[Tensor, "B S"]) -> Float[Tensor, "B S W"]:
        """States of new captions, in groups of one fixed size: products of another shape round otherwise, and
        a resumed training must find the very states that it would have had."""
        group = 1 if self.device.type == "cpu" else 64
        padded = torch.cat([rows, rows[-1:].expand(-len(rows) % group, -1)])
        return torch.cat([self._tower(part) for part in padded.split(group)])[: len(rows)]


class Judge:
    """How well pictures fit captions, in CLIP's shared space; `logit_scale` is the trained temperature."""

    def __init__(
        self, model: CLIPModel, preprocess: dict[str, Any], device: str | torch.device = "cpu"
    ) -> None:
        self.device = torch.device(device)
        self.model = model.to(self.device).eval()
        self.size = _square(preprocess["size"])
        self._mean = torch.tensor(preprocess["mean"], device=self.device).view(3, 1, 1)
        self._std = torch.tensor(preprocess["std"], device=self.device).view(3, 1, 1)

    @property
    def logit_scale(self) -> float:
        """Factor on cosine similarities before a softmax over candidates."""
        return float(self.model.logit_scale.detach().exp())

    @torch.no_grad()
    def image_features(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B E"]:
        """Unit vectors of pictures in [-1, 1]."""
        images = images.to(self.device)
        if images.shape[-2:] != self.size:
            images = F.interpolate(images, self.size, mode="bicubic", antialias=True).clamp(-1, 1)
        pixels = (images / 2 + 0.5 - self._mean) / self._std
        return self.model.encode_image(pixels, normalize=True).float()

    @torch.no_grad()
    def text_features(self, captions: Sequence[str]) -> Float[Tensor, "B E"]:
        """Unit vectors of captions."""
        ids = tokenize(captions, self.model.context_length).to(self.device)
        return self.model.encode_text(ids, normalize=True).float()


# ── tokens ──────────────────────────────────────────────────────────────────────────────────────────────


def tokenize(captions: Sequence[str], context_length: int) -> Int[Tensor, "B S"]:
    """CLIP's byte-pair ids, int64: start, caption, end, then zeros. Never fails on a string."""
    encode = _byte_pairs()
    ids = torch.zeros(len(captions), context_length, dtype=torch.long)
    truncated = []
    for row, caption in enumerate(captions):
        tokens = encode(caption)
        if len(tokens) > context_length - 2:
            truncated.append(caption)
            tokens = tokens[: context_length - 2]
        ids[row, : len(tokens) + 2] = torch.tensor([START, *tokens, END])
    if truncated:
        shown = truncated[0] if len(truncated[0]) <= 60 else truncated[0][:57] + "..."
        log.warning(
            "%d of %d captions exceed %d text tokens and lose their end, the first: %r",
            len(truncated),
            len(captions),
            context_length,
            shown,
        )
    return ids


def token_counts(captions: Sequence[str]) -> list[int]:
    """How many of CLIP's byte pairs each caption is, without its start and end."""
    encode = _byte_pairs()
    return [len(encode(caption)) for caption in captions]


def text_mask(ids: Int[Tensor, "B S"]) -> Bool[Tensor, "B S"]:
    """Mask of the tokens up to the end token; all False for an empty caption."""
    end = ids.argmax(dim=1)  # the end token has the largest id
    return (torch.arange(ids.shape[1], device=ids.device) <= end[:, None]) & (end > 1)[:, None]


@cache
def _byte_pairs() -> Callable[[str], list[int]]:
    """open_clip's tokenizer (its vocabulary ships in the wheel), made once. It keeps what it has read: a GPU
    waits longer for a step's captions than it computes on them, and few captions come again and again."""
    import open_clip  # seconds to import

    return lru_cache(CAPTIONS_READ)(open_clip.SimpleTokenizer().encode)


# ── models ──────────────────────────────────────────────────────────────────────────────────────────────


def architecture(config: TrainedCLIPConfig, image_size: int) -> dict[str, Any]:
    """The open_clip architecture of a compact CLIP that this project trains."""
    heads = config.text_heads
    return {
        "embed_dim": config.embed_dim,
        "vision_cfg": {
            "image_size": image_size,
            "patch_size": config.patch_size,
            "width": config.vision_width,
            "layers": config.vision_layers,
            "head_width": min(HEAD_WIDTH, config.vision_width),
        },
        "text_cfg": {
            "context_length": config.context_length,
            "vocab_size": VOCABULARY,
            "width": config.text_width,
            "layers": config.text_layers,
            "heads": heads,
        },
    }


def pretrained_architecture(name: str) -> dict[str, Any]:
    """The open_clip architecture of that name.

    Raises:
        UserError: where there is none, or it is not OpenAI's (another tokenizer, or no per-token states).
    """
    import open_clip

    values: dict[str, Any] | None = open_clip.get_model_config(name)
    if values is None:
        close = [known for known in open_clip.list_models() if known.startswith(name[:5])]
        similar = ", ".join(close[:8]) or "none"
        raise UserError(f"clip.name '{name}' is no open_clip architecture; similar: {similar}")
    text = values["text_cfg"]
    if values.pop("custom_text", False) or "hf_model_name" in text or text.get("hf_tokenizer_name"):
        raise UserError(
            f"clip.name '{name}' has a text tower or tokenizer of its own; choose one with CLIP's, for"
            " example ViT-B-32, ViT-L-14 or ViT-H-14"
        )
    return values


Side = Annotated[int, Field(gt=0, le=4096)]  # pixels


class VisionTower(BaseModel, extra="allow"):
    """What open_clip is told of a tower for pictures."""

    image_size: Side | tuple[Side, Side] = 224
    layers: Layers | tuple[Layers, Layers, Layers, Layers] = 12
    pos_embed_type: Literal["learnable"] = "learnable"  # the others are computed at a size of their own


class TextTower(BaseModel, extra="allow"):
    """What open_clip is told of a tower for texts."""

    context_length: Context = 77
    vocab_size: Literal[49408] = 49408  # ids are CLIP's
    layers: Layers = 12


class Architecture(BaseModel, extra="allow"):
    """What open_clip is told of a CLIP; what is not named here it judges itself."""

    vision_cfg: VisionTower
    text_cfg: TextTower


class Preprocess(BaseModel):
    """How pictures in [0, 1] become what a vision tower sees."""

    size: Side | tuple[Side, Side]
    mean: Annotated[list[float], Field(min_length=3, max_length=3)]
    std: Annotated[list[Annotated[float, Field(gt=0)]], Field(min_length=3, max_length=3)]


class Description(BaseModel):
    """What a CLIP's `config.json` has to say; other entries are for people."""

    architecture: Architecture
    preprocess: Preprocess
    precision: Literal["fp32", "bf16"] = "fp32"

    @model_validator(mode="after")
    def _consistent(self) -> Description:
        seen, made = self.architecture.vision_cfg.image_size, self.preprocess.size
        if _square(seen) != _square(made):
            raise ValueError(f"preprocess.size is {made} and the tower sees pictures of {seen} pixels")
        return self


def _square(side: int | tuple[int, int]) -> tuple[int, int]:
    return (side, side) if isinstance(side, int) else side


def build_clip(description: dict[str, Any]) -> CLIPModel:
    """An open_clip `CLIP` with fresh weights from a `config.json`'s content."""
    import open_clip

    return open_clip.model.CLIP(**description["architecture"])


def load_text_encoder(folder: str | Path, device: str | torch.device = "cpu") -> TextEncoder:
    """The text encoder of a `text` asset's folder, in the precision that it names, so that a transformer
    reads the same states wherever it is used. Raises UserError where a file is missing or does not fit."""
    model, said = load(folder, _build_described, _read)
    return TextEncoder(model, device, DTYPES[Description.model_validate(said).precision])


def load_judge(folder: str | Path, device: str | torch.device = "cpu") -> Judge:
    """The CLIP of the folder of a `judge` asset, or of a `text` one. Raises UserError as `load`."""
    model, said = load(folder, _build_described, _compare)
    return Judge(model, Description.model_validate(said).preprocess.model_dump(), device)


def _build_described(said: dict[str, Any]) -> CLIPModel:
    return build_clip(Description.model_validate(said).model_dump(exclude_unset=True))


def _read(model: CLIPModel, _: object) -> None:
    """States of a text. Raises whatever a tower does that has none."""
    states = _TextTower(model)(torch.zeros(1, model.context_length, dtype=torch.long))
    expected = (1, model.context_length, model.token_embedding.embedding_dim)
    if states.shape != expected:
        raise ValueError(f"states of a text are {tuple(states.shape)}, not {expected}")


def _compare(model: CLIPModel, _: object) -> None:
    """A picture and a text in the shared space. Raises whatever a CLIP does that has none."""
    text = model.encode_text(torch.zeros(1, model.context_length, dtype=torch.long), normalize=True)
    image = model.encode_image(torch.zeros(1, 3, *_square(model.visual.image_size)), normalize=True)
    if text.ndim != 2 or text.shape != image.shape:
        raise ValueError(
            f"a text is {tuple(text.shape)} and a picture {tuple(image.shape)}, not one vector each"
        )


def import_pretrained(config: PretrainedCLIPConfig) -> tuple[CLIPModel, dict[str, Any]]:
    """A pretrained open_clip model and the `config.json` that describes it.

    `weights` is a tag of open_clip (downloaded or taken from the Hugging Face cache), or a `.safetensors`
    file by path or `s3://` URI. Pickled checkpoints are not loaded.

    Raises:
        UserError: where architecture or weights cannot be had, with the ways to provide them.
    """
    import open_clip

    values = pretrained_architecture(config.name)
    tag = open_clip.get_pretrained_cfg(config.name, config.weights)
    if tag.get("quick_gelu"):
        values["quick_gelu"] = True
    defaults = open_clip.transform.PreprocessCfg()
    description = {
        "name": config.name,
        "weights": config.weights,
        "precision": config.precision,
        "architecture": values,
        "preprocess": {
            "size": values["vision_cfg"]["image_size"],
            "mean": list(tag.get("mean") or defaults.mean),
            "std": list(tag.get("std") or defaults.std),
        },
    }
    model = build_clip(description)
    tensors = _pretrained_tensors(config, tag)
    for name in ("attn_mask", "text.attn_mask"):  # a buffer in older checkpoints
        tensors.pop(name, None)
    fit(model, tensors, config.weights)
    return model.eval(), description


def _pretrained_tensors(config: PretrainedCLIPConfig, tag: dict[str, Any]) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    ref = config.weights
    how = (
        "set clip.weights to a .safetensors file (a path, or an s3:// URI) with open_clip's keys, or to a tag"
        f" of {config.name} on a machine that reaches the Hugging Face hub or has it in HF_HOME (OpenAI's own"
        " weights in a file need a clip.name that ends in -quickgelu); or set clip.kind: trained to train a"
        " compact CLIP on the run's own captions"
    )
    if tag:
        if not tag.get("hf_hub"):
            raise UserError(
                f"clip.weights '{ref}' exists only as a pickled checkpoint, which is not loaded; {how}"
            )
        from huggingface_hub import hf_hub_download

        repository = str(tag["hf_hub"]).strip("/")
        try:
            return load_file(hf_hub_download(repository, "open_clip_model.safetensors"))
        except Exception as error:  # the hub raises many kinds; a person needs one line
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UserError(
                f"clip.weights '{ref}' ({repository}) cannot be had here ({reason}); {how}"
            ) from None
    if not ref.endswith(".safetensors"):
        import open_clip

        tags = ", ".join(open_clip.list_pretrained_tags_by_model(config.name)) or "none"
        raise UserError(
            f"clip.weights '{ref}' is neither a tag of {config.name} ({tags}) nor a .safetensors; {how}"
        )
    try:
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(ref)
            if ref.startswith("s3://"):
                from model.plumbing import storage

                path = Path(scratch) / "clip.safetensors"
                storage.download_file(ref, path)
            return load_file(path)
    except (FileNotFoundError, SafetensorError) as error:
        raise UserError(f"clip.weights '{ref}' cannot be read ({error}); {how}") from None


class _TextTower(nn.Module):
    """The text half of a CLIP up to its last LayerNorm; the pooled projection is left out."""

    attn_mask: Tensor

    def __init__(self, model: CLIPModel) -> None:
        super().__init__()
        self.token_embedding = model.token_embedding
        self.positional_embedding = nn.Parameter(model.positional_embedding.detach(), requires_grad=False)
        self.transformer = model.transformer
        self.ln_final = model.ln_final
        self.register_buffer("attn_mask", model.attn_mask, persistent=False)

    def forward(self, ids: Int[Tensor, "B S"]) -> Float[Tensor, "B S W"]:
        x = self.token_embedding(ids) + self.positional_embedding  # (B, S, W)
        return self.ln_final(self.transformer(x, attn_mask=self.attn_mask))  # (B, S, W)
