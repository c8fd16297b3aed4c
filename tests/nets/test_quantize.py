"""The quantizers against brute force, against vector-quantize-pytorch, and between processes."""

import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from vector_quantize_pytorch import FSQ
from vector_quantize_pytorch.vector_quantize_pytorch import rotate_to

from model.config import TrainingConfig, VQVAEConfig
from model.nets import quantize
from model.nets.quantize import (
    FiniteScalarQuantizer,
    VectorQuantizer,
    build_quantizer,
    nearest_codes,
    rotate,
)


def unit(*shape: int, seed: int = 0) -> torch.Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def quantizer(size: int = 16, reset_after: int = 0) -> VectorQuantizer:
    torch.manual_seed(0)
    return VectorQuantizer(size, dim=4, beta=0.25, reset_after=reset_after)


# ── search ──────────────────────────────────────────────────────────────────────────────────────────────


WIDE = 8 * quantize.BLOCK  # codes from which the search on CPU goes by blocks, where they fill them


@pytest.mark.parametrize("size", [33, WIDE, WIDE + 9])
@pytest.mark.parametrize("scores", [1, 4000, 2**20])  # a piece below one row, ragged pieces, all at once
def test_nearest_code_is_the_one_of_smallest_distance(
    monkeypatch: pytest.MonkeyPatch, scores: int, size: int
) -> None:
    monkeypatch.setattr(quantize, "SCORES_CPU", scores)
    codebook = unit(size, 8, seed=1)
    latents = torch.cat([unit(77, 8), codebook[:3], codebook[-3:]])
    distances = (latents.double()[:, None] - codebook.double()[None]).square().sum(-1)
    assert torch.equal(nearest_codes(latents, codebook), distances.argmin(1))


@pytest.mark.parametrize("size", [6, WIDE])
def test_ties_go_to_the_lowest_index(size: int) -> None:
    distinct = unit(4, 8)
    codebook = distinct[torch.arange(size) % 4]  # copies within a block and in other blocks
    assert nearest_codes(distinct, codebook).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("size", [100, WIDE])
def test_search_never_holds_all_scores(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(quantize, "SCORES_CPU", 8000)
    latents, codebook = unit(200, 8), unit(size, 8, seed=1)
    numbers = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), options=None):
            result = function(*arguments, **(options or {}))
            if isinstance(result, torch.Tensor):
                numbers.append(result.numel())
            return result

    with Recorder():
        nearest_codes(latents, codebook)
    assert 7000 < max(numbers) <= 8000


# ── gradients ───────────────────────────────────────────────────────────────────────────────────────────


def test_rotation_equals_the_reference() -> None:
    latents, targets, gradient = unit(50, 8), unit(50, 8, seed=1), torch.randn(50, 8)
    results = []
    for function in (rotate, rotate_to):
        leaf = latents.clone().requires_grad_()
        out = function(leaf, targets)
        out.backward(gradient)
        results.append((out.detach(), leaf.grad))
    torch.testing.assert_close(results[0][0], targets)
    torch.testing.assert_close(results[0], results[1])


def test_the_loss_pulls_to_the_code_that_is_looked_up() -> None:
    net = quantizer()
    latents = unit(1, 1, 2, 4).movedim(-1, 1).clone().requires_grad_()  # unit vectors along the channels
    quantized, codes, loss = net(latents)
    torch.testing.assert_close(quantized.detach(), net.lookup(codes))
    chosen = net.codebook[codes.flatten()]
    flat = latents.movedim(1, -1).flatten(0, 2)
    torch.testing.assert_close(loss, 0.25 * (flat - chosen).square().mean())
    (gradient,) = torch.autograd.grad(loss, latents)
    # Through the normalisation only what is tangential to the sphere is left of it.
    pull = 0.5 * (flat - chosen) / chosen.numel()
    tangential = pull - flat * (pull * flat).sum(1, keepdim=True)
    torch.testing.assert_close(gradient.movedim(1, -1).flatten(0, 2), tangential.detach())


def test_autocast_does_not_change_the_codes() -> None:
    net = quantizer(size=256).eval()
    latents = torch.randn(2, 4, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        quantized, codes, _ = net(latents)
    assert torch.equal(codes, net(latents)[1])
    assert quantized.dtype == torch.float32


# ── learning ────────────────────────────────────────────────────────────────────────────────────────────


def test_used_codes_move_to_their_latents_and_others_stay() -> None:
    net = quantizer()
    target = net.codebook[3] + 0.1 * torch.randn(4, generator=torch.Generator().manual_seed(1))
    before, wanted = net.codebook.clone(), F.normalize(target, dim=0)
    for _ in range(600):
        net(target.expand(2, 1, 1, 4).movedim(-1, 1))
        net.update()
    torch.testing.assert_close(net.codebook[3], wanted, atol=2e-3, rtol=0)
    others = torch.arange(16) != 3
    assert torch.equal(net.codebook[others], before[others])
    assert net.unused[3] == 0
    assert (net.unused[others] == 600).all()


def test_micro_batches_count_as_one_step() -> None:
    whole, parts = quantizer(), quantizer()
    latents = torch.randn(4, 4, 3, 3)
    whole(latents)
    for part in latents.split(1):
        parts(part)
    whole.update()
    parts.update()
    torch.testing.assert_close(whole.codebook, parts.codebook)
    assert torch.equal(whole.unused, parts.unused)


def test_evaluation_learns_nothing() -> None:
    net = quantizer().eval()
    before = net.codebook.clone()
    net(torch.randn(2, 4, 3, 3))
    net.update()
    assert torch.equal(net.codebook, before)


def test_dead_codes_become_latents_of_the_batch() -> None:
    net = quantizer(reset_after=3)
    latents = unit(1, 2, 2, 4, seed=5).movedim(-1, 1)
    dead = torch.ones(16, dtype=torch.bool)
    dead[net(latents)[1].unique()] = False
    for step in range(3):
        assert net.unused.max() == step
        net(latents)
        net.update()
    rows = latents.movedim(1, -1).reshape(4, 4)
    nearest = (net.codebook @ rows.t()).max(1).values
    torch.testing.assert_close(nearest[dead], torch.ones(int(dead.sum())))
    assert net.unused.max() == 0


def test_state_is_complete() -> None:
    """A quantizer restored from its state goes on exactly as the one it was saved from."""
    first, second = quantizer(reset_after=4), quantizer(reset_after=4)
    for _ in range(3):
        first(torch.randn(1, 4, 2, 2))
        first.update()
    second.load_state_dict(first.state_dict())
    for net in (first, second):
        torch.manual_seed(7)
        for _ in range(3):
            net(torch.randn(1, 4, 2, 2))
            net.update()
    assert all(torch.equal(a, b) for a, b in zip(first.buffers(), second.buffers(), strict=True))


def test_kmeans_finds_separate_clusters() -> None:
    centres = torch.eye(4)
    latents = (centres.repeat_interleave(64, 0) + 0.05 * torch.randn(256, 4)).view(1, 16, 16, 4)
    net = quantizer(size=8)
    net.initialise(latents.movedim(-1, 1))
    assert ((net.codebook @ centres.t()).max(0).values > 0.99).all()
    torch.testing.assert_close(net.codebook.norm(dim=1), torch.ones(8))


# ── processes ───────────────────────────────────────────────────────────────────────────────────────────

WORKER = """
import sys, torch, torch.distributed as dist
from model.nets.quantize import VectorQuantizer
rank, port, folder = int(sys.argv[1]), sys.argv[2], sys.argv[3]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
torch.manual_seed(rank)  # other codebooks, other latents, other choices on each rank
net = VectorQuantizer(32, dim=4, beta=0.25, reset_after=3)
net.initialise(torch.randn(2, 4, 4, 4))
books = [net.codebook.clone()]
for step in range(20):
    net(torch.randn(1, 4, 3, 3))
    net.update()
    books.append(net.codebook.clone())
torch.save((torch.stack(books), net.unused), f"{folder}/{rank}.pt")
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_ranks_keep_one_codebook_bit_for_bit(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    workers = [
        subprocess.Popen([sys.executable, "-c", textwrap.dedent(WORKER), str(rank), port, str(tmp_path)])
        for rank in range(2)
    ]
    assert [worker.wait(timeout=120) for worker in workers] == [0, 0]
    (first, unused), (second, other) = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert torch.equal(first, second)
    assert torch.equal(unused, other)
    moved = (first[1:] != first[:-1]).any(-1)  # (steps, K)
    assert moved.any(1).all()
    jumps = ((first[1:] * first[:-1]).sum(-1) < 0.9).sum()  # only a reset moves a code that far
    assert jumps > 10


# ── finite scalars ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("levels", [[8, 5, 5, 5], [3, 4], [7, 5, 5, 5, 5]])
def test_fsq_equals_the_reference(levels: list[int]) -> None:
    latents = 3 * torch.randn(2, len(levels), 6, 6)
    ours, reference = FiniteScalarQuantizer(levels), FSQ(levels)
    results = []
    for net in (ours, reference):
        leaf = latents.clone().requires_grad_()
        quantized, codes, *_ = net(leaf)
        quantized.square().sum().backward()
        results.append((quantized.detach(), codes.long(), leaf.grad))
    torch.testing.assert_close(results[0], results[1])
    quantized, codes, _ = results[0]
    torch.testing.assert_close(ours.lookup(codes), quantized)
    assert int(codes.max()) < ours.vocabulary


def test_config_chooses_the_quantizer() -> None:
    training = TrainingConfig(steps=200, batch_size=1)
    vq = build_quantizer(VQVAEConfig(codebook_size=64, training=training))
    fsq = build_quantizer(VQVAEConfig(quantizer="fsq", fsq_levels=[4, 4], training=training))
    assert (vq.vocabulary, fsq.vocabulary) == (64, 16)


def test_neighbours_of_a_learned_codebook_are_the_nearest_others() -> None:
    torch.manual_seed(0)
    quantizer = VectorQuantizer(32, 4, beta=0.25, reset_after=0)
    codes = torch.tensor([3, 3, 30])
    found = quantizer.neighbours(codes)
    assert found.shape == (3, 8)
    rows = torch.nn.functional.normalize(quantizer.codebook, dim=1)
    for code, near in zip(codes.tolist(), found.tolist(), strict=True):
        order = (rows - rows[code]).norm(dim=1).argsort().tolist()
        assert set(near) == set(order[1:9])
    assert VectorQuantizer(3, 4, beta=0.25, reset_after=0).neighbours(codes[:1] * 0).shape == (1, 2)


def test_neighbours_of_finite_scalars_are_one_level_off_in_one_dimension() -> None:
    levels = [3, 1, 4]
    quantizer = FiniteScalarQuantizer(levels)
    every = torch.arange(12)
    found = quantizer.neighbours(every)
    assert found.shape == (12, 4), "nothing moves in the dimension that has a single level"
    places = (found[..., None] // quantizer.basis) % quantizer.levels
    own = (every[:, None, None] // quantizer.basis) % quantizer.levels
    assert ((places - own).abs().sum(-1) == 1).all()
    assert ((found >= 0) & (found < 12)).all()
    inner = found[1 + 3 * 1].tolist()  # levels 1 of 3 and 1 of 4
    assert len(set(inner)) == 4
