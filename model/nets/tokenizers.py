"""Tokenizers behind one interface, ours and pretrained ones, and the asset they are kept in.

A tokenizer asset is `model.safetensors` beside `config.json`; `load_tokenizer` opens it without knowing who
trained it. Weights made elsewhere enter once, through `import_pretrained`, and are an asset like any other
after that: hashed, versioned, safetensors only.

Letters: B batch, H W pixels, h w token grid (H / factor, W / factor), D code dimension, K codes.
"""

from __future__ import annotations

import json
import tempfile
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from safetensors import safe_open
from torch import Tensor, nn

from model.config import PretrainedTokenizerConfig, VQVAEConfig
from model.errors import UserError
from model.nets.folder import load
from model.nets.quantize import nearest_codes, nearest_others
from model.nets.vqvae import VQVAE, check_sides
from model.plumbing import storage
from model.plumbing.assets import AssetWriter, Manifest
from model.plumbing.checkpoints import CONFIG, WEIGHTS, save_model

TRIED = 4  # codes along the side of a picture that a tokenizer of a stranger has to decode


@runtime_checkable
class Tokenizer(Protocol):
    """Pictures to codes and back. Images are in [-1, 1], codes int64."""

    vocabulary: int  # K
    factor: int  # image side / token grid side

    def encode(self, images: Float[Tensor, "B 3 H W"]) -> Int[Tensor, "B h w"]:
        """Codes of images. Raises UserError when a side is not a multiple of the factor."""
        ...

    def decode(self, codes: Int[Tensor, "B h w"]) -> Float[Tensor, "B 3 H W"]:
        """Images of codes."""
        ...

    def reconstruct(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B 3 H W"]:
        """What is left of images after `encode` and `decode`."""
        ...


# ── pretrained families ─────────────────────────────────────────────────────────────────────────────────


class Pretrained(nn.Module):
    """A frozen tokenizer of another project: its convolutions, our search for the nearest code."""

    factor: int
    codebook: Tensor  # (K, D)
    _search: Tensor  # (K, D + 1)

    def __init__(self, codebook: Tensor) -> None:
        super().__init__()
        self.vocabulary = len(codebook)
        # |z - c|² is smallest where z·c - |c|²/2 is largest: one more column, and the search is a product.
        offset = -0.5 * codebook.square().sum(1, keepdim=True)
        self.register_buffer("codebook", codebook, persistent=False)
        self.register_buffer("_search", torch.cat([codebook, offset], dim=1), persistent=False)

    @abstractmethod
    def latents(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B D h w"]:
        """What images are before quantization."""

    @abstractmethod
    def render(self, codes: Int[Tensor, "B h w"]) -> Float[Tensor, "B 3 H W"]:
        """Images of codes, not clamped."""

    @torch.no_grad()
    def encode(self, images: Float[Tensor, "B 3 H W"]) -> Int[Tensor, "B h w"]:
        """The nearest row of the codebook to each latent; ties go to the lowest index."""
        check_sides(images, self.factor)
        latents = self.latents(images).movedim(1, -1)
        flat = latents.flatten(0, 2)
        search = torch.cat([flat, torch.ones_like(flat[:, :1])], dim=1)
        return nearest_codes(search, self._search).view(latents.shape[:-1])

    @torch.no_grad()
    def decode(self, codes: Int[Tensor, "B h w"]) -> Float[Tensor, "B 3 H W"]:
        """Images in [-1, 1] of codes."""
        return self.render(codes).clamp(-1, 1)

    def reconstruct(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B 3 H W"]:
        """What is left of the images after `encode` and `decode`."""
        return self.decode(self.encode(images))


class Janus(Pretrained):
    """`JanusVQVAE` of transformers: LlamaGen's VQ-16, 16384 codes of dimension 8, factor 16.

    Its `encode` compares with the raw codebook although `decode` normalises what it looks up, so its own ids
    are right only by chance; and its `decode` accepts one grid size alone. Here the rows are normalised on
    load, which makes search and lookup agree, and the convolutions take any grid.
    """

    @staticmethod
    def build(architecture: dict[str, Any]) -> nn.Module:
        from transformers import JanusVQVAE, JanusVQVAEConfig

        return JanusVQVAE(JanusVQVAEConfig.from_dict(architecture))

    def __init__(self, net: Any) -> None:
        super().__init__(nn.functional.normalize(net.quantize.embedding.weight.detach(), dim=1))
        self.net = net
        self.factor = 2 ** (len(net.config.channel_multiplier) - 1)

    def latents(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B D h w"]:
        return self.net.quant_conv(self.net.encoder(images))

    def render(self, codes: Int[Tensor, "B h w"]) -> Float[Tensor, "B 3 H W"]:
        return self.net.decoder(self.net.post_quant_conv(self.codebook[codes].movedim(-1, 1).contiguous()))


class Diffusers(Pretrained):
    """`VQModel` of diffusers: taming-transformers' and latent diffusion's VQ autoencoders."""

    @staticmethod
    def build(architecture: dict[str, Any]) -> nn.Module:
        from diffusers import VQModel

        return VQModel.from_config(architecture)

    def __init__(self, net: Any) -> None:
        super().__init__(net.quantize.embedding.weight.detach())
        self.net = net
        self.factor = 2 ** (len(net.config.block_out_channels) - 1)

    def latents(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B D h w"]:
        return self.net.quant_conv(self.net.encoder(images))

    def render(self, codes: Int[Tensor, "B h w"]) -> Float[Tensor, "B 3 H W"]:
        return self.net.decode(self.codebook[codes].movedim(-1, 1), force_not_quantize=True).sample


class Emu3(Pretrained):
    """`Emu3VQVAE` of transformers: a video tokenizer; a picture is a clip of identical frames."""

    @staticmethod
    def build(architecture: dict[str, Any]) -> nn.Module:
        from transformers import Emu3VQVAE, Emu3VQVAEConfig

        return Emu3VQVAE(Emu3VQVAEConfig.from_dict(architecture))

    def __init__(self, net: Any) -> None:
        super().__init__(net.quantize.embedding.weight.detach())
        self.net = net
        self.factor = net.spatial_scale_factor

    def latents(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B D h w"]:
        clip = images[:, None].repeat(1, self.net.config.temporal_downsample_factor, 1, 1, 1)
        return self.net.quant_conv(self.net.encoder(clip).transpose(1, 2))[:, :, 0]

    def render(self, codes: Int[Tensor, "B h w"]) -> Float[Tensor, "B 3 H W"]:
        return self.net.decode(codes)


FAMILIES: dict[str, type[Janus] | type[Diffusers] | type[Emu3]] = {
    "janus": Janus,
    "diffusers": Diffusers,
    "emu3": Emu3,
}


def neighbours(tokenizer: Tokenizer, codes: Int[Tensor, " M"]) -> Int[Tensor, "M _"] | None:
    """Codes that are most like each of `codes`; None for a tokenizer whose codebook is out of reach."""
    match tokenizer:
        case VQVAE():
            return tokenizer.quantizer.neighbours(codes)
        case Pretrained():
            return nearest_others(tokenizer.codebook[codes], tokenizer.codebook, codes)
    return None


# ── assets ──────────────────────────────────────────────────────────────────────────────────────────────


def load_tokenizer(folder: Path, device: torch.device | str = "cpu") -> Tokenizer:
    """Open the files of a tokenizer asset, fetched to `folder`; frozen and in evaluation mode.

    Raises:
        UserError: when the folder holds no tokenizer or its weights do not fit its config.
    """
    net, config = load(folder, _build, _decode)
    return _wrapped(net, config).to(device).eval().requires_grad_(False)  # type: ignore[return-value]


def _build(config: dict[str, Any]) -> nn.Module:
    match config.get("kind"):
        case "vqvae":
            return VQVAE(VQVAEConfig.model_validate(config))
        case "pretrained":
            return FAMILIES[config["family"]].build(config["architecture"])
        case other:
            raise ValueError(f"kind is {other!r}; a tokenizer is 'vqvae' or 'pretrained'")


def _wrapped(net: nn.Module, config: dict[str, Any]) -> nn.Module:
    return net if config["kind"] == "vqvae" else FAMILIES[config["family"]](net)


def _decode(net: nn.Module, config: dict[str, Any]) -> None:
    """Codes to a picture and back. Raises whatever a net does that is no tokenizer of pictures in colours."""
    tokenizer = _wrapped(net, config)
    if not isinstance(tokenizer, Pretrained):
        return
    codes = torch.zeros(1, TRIED, TRIED, dtype=torch.long)
    images, expected = tokenizer.decode(codes), (1, 3, *[TRIED * tokenizer.factor] * 2)
    if images.shape != expected:
        raise ValueError(f"pictures of {TRIED} x {TRIED} codes are {tuple(images.shape)}, not {expected}")
    if (again := tokenizer.encode(images)).shape != codes.shape:
        raise ValueError(f"codes of such a picture are {tuple(again.shape)}, not {tuple(codes.shape)}")


# ── import ──────────────────────────────────────────────────────────────────────────────────────────────


def import_pretrained(config: PretrainedTokenizerConfig, writer: AssetWriter) -> Manifest:
    """Publish a tokenizer trained elsewhere as the asset that `writer` stands for.

    `config.ref` is a local folder, an `s3://` folder, or a hub id `owner/name[/subfolder][@revision]`; it
    must hold `config.json` and safetensors.

    Raises:
        UserError: when the reference cannot be reached or does not hold the family's tokenizer.
    """
    with _local_copy(config.ref) as source, tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        described, weights = _read_reference(config, source)
        save_model(folder, weights, described)
        tokenizer = load_tokenizer(folder)  # what cannot be loaded is not published
        for name in (CONFIG, WEIGHTS):
            writer.add_file(name, folder / name)
    return writer.finish({"vocabulary": tokenizer.vocabulary, "factor": tokenizer.factor})


def _read_reference(
    config: PretrainedTokenizerConfig, folder: Path
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    described = _read_json(folder / CONFIG, config.ref)
    if config.family == "latent-gpt":
        return described, _read_tensors(folder, "", config.ref)
    # A whole Janus or Emu3 model keeps its tokenizer's config and weights under these names.
    whole = "vq_config" in described
    architecture = described["vq_config"] if whole else described
    described = {"kind": "pretrained", "family": config.family, "architecture": architecture}
    return described, _read_tensors(folder, "model.vqmodel." if whole else "", config.ref)


def _read_tensors(folder: Path, prefix: str, ref: str) -> dict[str, Tensor]:
    files = sorted(path for path in folder.glob("*.safetensors") if ".fp16." not in path.name)
    if not files:
        pickles = ", ".join(path.name for path in sorted(folder.glob("*.bin")) + sorted(folder.glob("*.pt*")))
        found = f"only {pickles}, and pickles are never loaded" if pickles else "none"
        raise UserError(f"{ref}: needs weights as .safetensors; found {found}")
    tensors: dict[str, Tensor] = {}
    for path in files:
        with safe_open(path, framework="pt") as file:
            names = [name for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118
            tensors.update({name.removeprefix(prefix): file.get_tensor(name) for name in names})
    return {
        name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()
    }


@contextmanager
def _local_copy(ref: str) -> Iterator[Path]:
    """A folder with the reference's config and weights: itself when local, else a copy for the duration."""
    if ref.startswith("s3://"):
        with tempfile.TemporaryDirectory() as scratch:
            for name in storage.list_sizes(ref):
                if name == CONFIG or (name.endswith(".safetensors") and "/" not in name):
                    storage.download_file(storage.join(ref, name), Path(scratch) / name)
            yield Path(scratch)
    elif storage.is_stored(ref):
        yield Path(ref).expanduser()
    else:
        yield _download_from_hub(ref)


def _download_from_hub(ref: str) -> Path:
    from huggingface_hub import snapshot_download

    place, _, revision = ref.partition("@")
    owner, _, rest = place.partition("/")
    name, _, subfolder = rest.partition("/")
    inside = f"{subfolder}/" if subfolder else ""
    try:
        snapshot = snapshot_download(
            f"{owner}/{name}",
            revision=revision or None,
            allow_patterns=[f"{inside}{CONFIG}", f"{inside}*.safetensors"],
        )
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(
            f"tokenizer.ref '{ref}' is neither a local folder nor can it be had from the hub ({reason});"
            f" where the hub is out of reach, put its {CONFIG} and *.safetensors into a folder and give that"
            " path or an s3:// URI as tokenizer.ref, or set HF_HOME to a cache that holds it"
        ) from None
    return Path(snapshot) / subfolder


def _read_json(path: Path, ref: str) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{ref}: no {CONFIG}; a tokenizer is {CONFIG} beside *.safetensors") from None
    except ValueError as error:
        raise UserError(f"{ref}: its {CONFIG} is not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise UserError(f"{ref}: its {CONFIG} must be a mapping, not {type(value).__name__}")
    return value
