"""Pretrained tokenizers: their ids are the nearest codes, their round trip is exact, their door is one."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from diffusers import VQModel
from safetensors.torch import save_file
from torch import nn
from transformers import Emu3VQVAE, Emu3VQVAEConfig, JanusVQVAE, JanusVQVAEConfig

from model.config import PretrainedTokenizerConfig, TrainingConfig, VQVAEConfig
from model.errors import UserError
from model.nets.tokenizers import import_pretrained, load_tokenizer, neighbours
from model.nets.vqvae import VQVAE
from model.plumbing import assets, cache, storage
from model.plumbing.checkpoints import save_model

CODES = 256


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LATENT_GPT_STORE", str(tmp_path / "store"))
    torch.manual_seed(0)
    return tmp_path / "store"


def spread(net: nn.Module) -> nn.Module:
    """Random codes of unlike lengths; the originals' start so small that all distances are alike."""
    codes = net.quantize.embedding.weight
    with torch.no_grad():
        codes.copy_(torch.randn_like(codes) * torch.rand(len(codes), 1).mul(2).add(0.1))
    return net.eval()


def janus() -> nn.Module:
    architecture = JanusVQVAEConfig(
        embed_dim=8,
        num_embeddings=CODES,
        latent_channels=32,
        base_channels=32,
        channel_multiplier=[1, 1, 2],
        num_res_blocks=1,
        num_patches=4,
    )
    return spread(JanusVQVAE(architecture))


def diffusers_vq(**change: int) -> nn.Module:
    net = VQModel(
        block_out_channels=(32, 32, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=4,
        num_vq_embeddings=CODES,
        norm_num_groups=8,
        **change,
    )
    return spread(net)


def emu3() -> nn.Module:
    architecture = Emu3VQVAEConfig(
        codebook_size=CODES,
        base_channels=32,
        channel_multiplier=[1, 1, 2],
        num_res_blocks=1,
        attn_resolutions=[2],
        hidden_size=64,
        temporal_downsample_factor=2,
    )
    return spread(Emu3VQVAE(architecture))


FAMILIES = {"janus": janus, "diffusers": diffusers_vq, "emu3": emu3}


def publish(family: str, ref: Path | str) -> assets.Manifest:
    config = PretrainedTokenizerConfig(family=family, ref=str(ref))
    return import_pretrained(config, assets.AssetWriter("tokenizer", config.model_dump(), {}))


def imported(family: str, net: nn.Module, tmp_path: Path) -> tuple[assets.Manifest, object]:
    net.save_pretrained(tmp_path / "reference", safe_serialization=True)
    manifest = publish(family, tmp_path / "reference")
    return manifest, load_tokenizer(cache.folder(manifest))


@torch.no_grad()
def reference_ids(family: str, net: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """The nearest code in float64, by distances written out."""
    codebook = net.quantize.embedding.weight.double()
    if family == "emu3":
        clip = images[:, None].repeat(1, 2, 1, 1, 1)
        latents = net.quant_conv(net.encoder(clip).transpose(1, 2))[:, :, 0]
    else:
        latents = net.quant_conv(net.encoder(images))
    latents = latents.movedim(1, -1).double()
    if family == "janus":
        latents, codebook = F.normalize(latents, dim=-1), F.normalize(codebook, dim=-1)
    return (latents[..., None, :] - codebook).square().sum(-1).argmin(-1)


@pytest.mark.parametrize("family", FAMILIES)
def test_ids_are_the_nearest_codes_and_the_round_trip_is_exact(family: str, tmp_path: Path) -> None:
    net = FAMILIES[family]()
    manifest, tokenizer = imported(family, net, tmp_path)
    assert (tokenizer.vocabulary, tokenizer.factor) == (CODES, 4)
    images = torch.rand(64, 3, 16, 16) * 2 - 1
    codes = tokenizer.encode(images)
    assert torch.equal(codes, reference_ids(family, net, images))  # all 1,024
    assert codes.unique().numel() > 5
    with torch.no_grad():  # the original's own decoder on the same ids
        if family == "diffusers":
            latents = net.quantize.embedding(codes).movedim(-1, 1)
            wanted = net.decode(latents, force_not_quantize=True).sample
        else:
            wanted = net.decode(codes.flatten(1) if family == "janus" else codes)
    assert wanted.shape == images.shape
    assert torch.equal(tokenizer.decode(codes), wanted.clamp(-1, 1))
    assert torch.equal(tokenizer.reconstruct(images), tokenizer.decode(codes))
    other = tokenizer.reconstruct(torch.rand(1, 3, 8, 24) * 2 - 1)  # a grid no config names
    assert other.shape == (1, 3, 8, 24)
    assert manifest.info["vocabulary"] == CODES


class Closed:
    """A tokenizer that shows nothing of its codebook."""

    vocabulary, factor = CODES, 4

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        return images[:, 0].long()

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        return codes[:, None].expand(-1, 3, -1, -1).float()

    reconstruct = decode


def test_neighbours_of_codes_wherever_the_codebook_can_be_reached(tmp_path: Path) -> None:
    _, theirs = imported("diffusers", diffusers_vq(), tmp_path)
    codes = torch.tensor([0, 7, 255])
    near = neighbours(theirs, codes)  # type: ignore[arg-type]
    assert near is not None
    rows = theirs.codebook  # type: ignore[attr-defined]
    for code, found in zip(codes.tolist(), near.tolist(), strict=True):
        order = (rows - rows[code]).norm(dim=1).argsort().tolist()
        assert set(found) == set(order[1:9])
    own(tmp_path / "ours")
    ours = neighbours(load_tokenizer(tmp_path / "ours"), codes[:2])
    assert ours is not None
    assert ours.shape == (2, 8)
    assert neighbours(Closed(), codes) is None


def test_janus_own_ids_are_not_the_nearest(tmp_path: Path) -> None:
    """Why the rows are normalised on load: transformers' own search disagrees with what decode looks up."""
    net = janus()
    images = torch.rand(4, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        own = net.encode(images).image_tokens.view(4, 4, 4)
    assert (own != reference_ids("janus", net, images)).any()


@pytest.mark.parametrize(("family", "model_type"), [("janus", "janus"), ("emu3", "emu3")])
def test_the_tokenizer_inside_a_whole_model_is_found(family: str, model_type: str, tmp_path: Path) -> None:
    net = FAMILIES[family]()
    whole = {f"model.vqmodel.{name}": tensor for name, tensor in net.state_dict().items()}
    whole["model.language_model.embed_tokens.weight"] = torch.zeros(2, 2)
    save_file(whole, tmp_path / "model-00001-of-00001.safetensors")
    described = {"model_type": model_type, "vq_config": net.config.to_dict()}
    (tmp_path / "config.json").write_text(json.dumps(described))
    manifest = publish(family, tmp_path)
    tokenizer = load_tokenizer(cache.folder(manifest))
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    assert torch.equal(tokenizer.encode(images), reference_ids(family, net, images))


@pytest.mark.parametrize(
    "change", [{"out_channels": 1}, {"in_channels": 4}], ids=["pictures of grey", "of four colours"]
)
def test_a_tokenizer_that_does_not_do_its_work_is_refused(change: dict[str, int], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"config.json is of a net that does not do its work: "):
        imported("diffusers", diffusers_vq(**change), tmp_path)


def own(folder: Path) -> VQVAE:
    config = VQVAEConfig(
        factor=4,
        width=8,
        multipliers=[1, 1, 2],
        blocks=1,
        codebook_size=32,
        training=TrainingConfig(steps=200, batch_size=1),
    )
    net = VQVAE(config).eval()
    save_model(folder, net.state_dict(), config.model_dump(mode="json"))
    return net


def test_one_of_ours_goes_through_the_same_door(tmp_path: Path) -> None:
    net = own(tmp_path / "ours")
    manifest = publish("latent-gpt", tmp_path / "ours")
    tokenizer = load_tokenizer(cache.folder(manifest))
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    assert torch.equal(tokenizer.encode(images), net.encode(images))
    assert torch.equal(tokenizer.reconstruct(images), net.reconstruct(images))
    assert not any(parameter.requires_grad for parameter in tokenizer.parameters())


@pytest.mark.slow
def test_the_same_from_s3(services: dict[str, str], tmp_path: Path) -> None:
    net = own(tmp_path / "ours")
    ref = storage.join(services["LATENT_GPT_STORE"], "elsewhere/tokenizer")
    for name in ("config.json", "model.safetensors"):
        storage.upload_file(tmp_path / "ours" / name, storage.join(ref, name))
    storage.write_bytes(storage.join(ref, "older/model.safetensors"), b"not to be read")
    tokenizer = load_tokenizer(cache.folder(publish("latent-gpt", ref)))
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    assert torch.equal(tokenizer.encode(images), net.encode(images))
    storage.delete(storage.join(ref, "config.json"))
    assert refused(ref).startswith(f"{ref}: no config.json")


def test_a_hub_id_may_name_subfolder_and_revision(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    own(tmp_path / "vq")
    asked: dict[str, object] = {}

    def snapshot(repository: str, **options: object) -> str:
        asked.update(options, repository=repository)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    publish("latent-gpt", "owner/name/vq@v2")
    assert (asked["repository"], asked["revision"]) == ("owner/name", "v2")
    assert asked["allow_patterns"] == ["vq/config.json", "vq/*.safetensors"]


# ── bad input ───────────────────────────────────────────────────────────────────────────────────────────


def refused(ref: Path | str, family: str = "latent-gpt") -> str:
    with pytest.raises(UserError) as caught:
        publish(family, ref)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_unreachable_hub_says_how_to_provide_the_weights(
    monkeypatch: pytest.MonkeyPatch, store: Path
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    line = refused("someone/never-cached", "janus")
    assert "tokenizer.ref 'someone/never-cached'" in line
    assert "config.json and *.safetensors into a folder" in line
    assert not store.exists()


def test_a_folder_without_config_or_weights_is_refused(tmp_path: Path, store: Path) -> None:
    assert "no config.json" in refused(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert "found none" in refused(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    assert "only pytorch_model.bin, and pickles are never loaded" in refused(tmp_path)
    assert not store.exists()


def test_weights_of_another_shape_are_refused(tmp_path: Path, store: Path) -> None:
    own(tmp_path)
    described = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(described | {"codebook_size": 64}))
    assert "quantizer.codebook is (32, 8) instead of (64, 8)" in refused(tmp_path)
    assert not store.exists()


def test_something_else_than_a_tokenizer_is_refused(tmp_path: Path) -> None:
    own(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"kind": "clip"}))
    assert "kind is 'clip'" in refused(tmp_path)
