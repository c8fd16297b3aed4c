"""The VQ-VAE's shapes, its promises about resolution, and that it can learn a picture."""

import pytest
import torch

from model.config import TrainingConfig, VQVAEConfig
from model.errors import UserError
from model.nets.vqvae import VQVAE


def config(**values: object) -> VQVAEConfig:
    small = {"factor": 4, "width": 8, "multipliers": [1, 2, 2], "blocks": 1, "codebook_size": 32}
    return VQVAEConfig.model_validate(
        {**small, "training": TrainingConfig(steps=200, batch_size=1), **values}
    )


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"quantizer": "fsq", "fsq_levels": [4, 4, 4]},
        {"stem": 4, "multipliers": [1]},
        {"factor": 16, "stem": 2, "multipliers": [1, 1, 2, 2]},
        {"factor": 8, "multipliers": [1, 1, 2, 2], "width": 12},  # no whole groups of 16 channels
    ],
)
def test_shapes_and_ranges(values: dict) -> None:
    net = VQVAE(config(**values)).eval()
    images = torch.rand(2, 3, 32, 48) * 2 - 1
    codes = net.encode(images)
    assert codes.shape == (2, 32 // net.factor, 48 // net.factor)
    assert codes.dtype == torch.int64
    assert 0 <= int(codes.min()) <= int(codes.max()) < net.vocabulary
    decoded = net.decode(codes)
    assert decoded.shape == images.shape
    assert decoded.abs().max() <= 1
    assert torch.equal(decoded, net.reconstruct(images))


def test_forward_agrees_with_encode_and_decode() -> None:
    net = VQVAE(config()).eval()
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    reconstruction, codes, loss = net(images)
    assert torch.equal(codes, net.encode(images))
    torch.testing.assert_close(reconstruction.clamp(-1, 1), net.decode(codes))
    assert loss.shape == ()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_picture_does_not_depend_on_its_neighbours(precision: str) -> None:
    training = TrainingConfig(steps=200, batch_size=1, precision=precision)
    net = VQVAE(config(training=training, codebook_size=4096)).eval()
    images = torch.rand(4, 3, 32, 32) * 2 - 1
    assert torch.equal(net.encode(images)[2:3], net.encode(images[2:3]))


def test_pictures_are_encoded_in_the_precision_of_the_training() -> None:
    codes = {}
    for precision in ("fp32", "bf16"):
        torch.manual_seed(0)
        training = TrainingConfig(steps=200, batch_size=1, precision=precision)
        net = VQVAE(config(training=training, codebook_size=4096)).eval()
        images = torch.rand(4, 3, 32, 32) * 2 - 1
        codes[precision] = net.encode(images)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            assert torch.equal(codes[precision], net(images)[1])
    assert not torch.equal(codes["fp32"], codes["bf16"])  # so that the lines above tell them apart


def test_the_value_range_is_what_the_net_sees_and_nobody_else() -> None:
    signed, unit = (VQVAE(config(value_range=r, codebook_size=4096)).eval() for r in ((-1, 1), (0, 1)))
    unit.load_state_dict(signed.state_dict())
    seen: list[torch.Tensor] = []
    unit.encoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    codes = unit.encode(images)
    torch.testing.assert_close(seen[0], (images + 1) / 2)
    assert torch.equal(codes, signed.encode((images + 1) / 2))
    made = signed.decoder(signed.quantizer.lookup(codes)) * 2 - 1
    torch.testing.assert_close(unit.decode(codes), made.clamp(-1, 1))
    torch.testing.assert_close(unit(images)[0], made)


def test_a_value_range_must_rise() -> None:
    with pytest.raises(ValueError, match=r"value_range \[1.0, 0.0\] must be \[low, high\]"):
        config(value_range=(1, 0))


def test_sides_must_be_multiples_of_the_factor() -> None:
    with pytest.raises(UserError, match="30 x 32: both sides must be multiples of the factor 4"):
        VQVAE(config()).encode(torch.zeros(1, 3, 32, 30))


def test_every_parameter_learns() -> None:
    net = VQVAE(config())
    for _ in range(2):  # the residual branches' last layers are zero, so what is before them waits a step
        reconstruction, _, loss = net(torch.rand(2, 3, 16, 16) * 2 - 1)
        (reconstruction.square().mean() + loss).backward()
        with torch.no_grad():
            for parameter in net.parameters():
                parameter -= 0.1 * parameter.grad
    assert all(parameter.grad.abs().sum() > 0 for parameter in net.parameters())


def test_it_learns_two_pictures() -> None:
    torch.manual_seed(0)
    net = VQVAE(config(stem=2, multipliers=[1, 2], width=16))
    images = torch.rand(2, 3, 4, 4).repeat_interleave(4, 2).repeat_interleave(4, 3) * 2 - 1
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    errors = []
    for _ in range(120):
        reconstruction, _, loss = net(images)
        error = (reconstruction - images).abs().mean()
        optimizer.zero_grad()
        (error + loss).backward()
        optimizer.step()
        net.quantizer.update()
        errors.append(error.item())
    assert errors[-1] < 0.25 * errors[0]
