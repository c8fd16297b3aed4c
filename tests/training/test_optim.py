"""The learning rate's shape, which parameters decay, and the average of the weights."""

import pytest
import torch
from torch import nn

from model.config import TrainingConfig
from model.training.optim import Ema, adamw, learning_rate, muon, parameter_groups, set_learning_rate


def test_learning_rate_warms_up_and_ends_at_its_share() -> None:
    training = TrainingConfig(
        steps=101, batch_size=1, learning_rate=1e-2, warmup_steps=10, final_lr_share=0.1
    )
    rates = [learning_rate(step, training) for step in range(101)]
    assert rates[0] == pytest.approx(1e-3)
    assert rates[9] == rates[10] == pytest.approx(1e-2)
    assert rates[55] == pytest.approx(1e-2 * 0.55)
    assert rates[100] == pytest.approx(1e-3)
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_only_matrices_decay() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4))
    decayed, plain = parameter_groups(net.parameters(), 0.1)
    assert [p.ndim for p in decayed["params"]] == [4]
    assert [p.ndim for p in plain["params"]] == [1, 1, 1]
    assert plain["weight_decay"] == 0.0


def test_optimizer_takes_modules_without_vectors_and_follows_the_rate() -> None:
    optimizer = adamw(nn.Linear(2, 2, bias=False), TrainingConfig(steps=200, batch_size=1))
    set_learning_rate(optimizer, 0.5)
    assert [group["lr"] for group in optimizer.param_groups] == [0.5]


def test_muon_turns_the_matrices_of_the_blocks_and_leaves_the_rest_to_adamw() -> None:
    net = nn.ModuleDict(
        {"head": nn.Linear(4, 8), "blocks": nn.ModuleList([nn.Linear(4, 8), nn.Linear(8, 4)])}
    )
    optimizers = muon(net, net["blocks"], TrainingConfig(steps=200, batch_size=1, weight_decay=0.0))
    shapes = {
        name: sorted(tuple(p.shape) for group in optimizer.param_groups for p in group["params"])
        for name, optimizer in optimizers.items()
    }
    assert shapes == {"muon": [(4, 8), (8, 4)], "adamw": [(4,), (8,), (8,), (8, 4)]}
    matrix = net["blocks"][0].weight
    before = matrix.detach().clone()
    matrix.grad = torch.randn(8, 4, generator=torch.Generator().manual_seed(0)) * 1e-3
    optimizers["muon"].step()
    step = (before - matrix.detach()) / optimizers["muon"].param_groups[0]["lr"]
    # Whatever the gradient, all directions move alike: 0.2 times the root of the longer side.
    singular = torch.linalg.svdvals(step) / (0.2 * 8**0.5)
    assert (singular > 0.5).all()
    assert (singular < 1.5).all()


def test_ema_follows_applies_and_restores() -> None:
    net = nn.BatchNorm1d(2)  # parameters, float buffers and an integer buffer
    ema = Ema(net, 0.5)
    with torch.no_grad():
        net.weight.fill_(3.0)
        net.running_mean.fill_(2.0)
    ema.update()  # decay warm-up: (1 + 0) / (10 + 0)
    with ema.applied():
        torch.testing.assert_close(net.weight.detach(), torch.full((2,), 0.1 * 1 + 0.9 * 3))
        torch.testing.assert_close(net.running_mean, torch.full((2,), 0.9 * 2))
    assert net.weight.tolist() == [3.0, 3.0]
    assert net.running_mean.tolist() == [2.0, 2.0]


def test_ema_continues_from_what_was_saved() -> None:
    net, again = nn.Linear(2, 2), nn.Linear(2, 2)
    first, second = Ema(net, 0.9), Ema(again, 0.9)
    for _ in range(3):
        first.update()
    second.load_state_dict(first.state_dict())
    again.load_state_dict(net.state_dict())
    first.update()
    second.update()
    assert all(torch.equal(first.average[name], second.average[name]) for name in first.average)
    with pytest.raises(ValueError, match="another module"):
        second.load_state_dict({"average": {"other": torch.zeros(1)}, "updates": 1})


def test_without_decay_nothing_is_kept() -> None:
    net = nn.Linear(2, 2)
    ema = Ema(net, 0.0)
    ema.update()
    before = net.weight.detach().clone()
    with ema.applied():
        assert torch.equal(net.weight, before)
    assert ema.average == {}
