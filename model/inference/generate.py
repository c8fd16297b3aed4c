"""From prompts to pictures: the whole way through text encoder, transformer and tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from pydantic import ValidationError
from torch import Tensor

from model.config import LONGEST_PROMPT, SamplingConfig, without_retired
from model.data.images import to_pixels
from model.errors import Diverged, UserError, reason
from model.inference.bundle import PARTS, SAMPLING
from model.nets.clip import Judge, TextEncoder, load_judge, load_text_encoder
from model.nets.compiled import CompiledSampler, pays
from model.nets.folder import read_description
from model.nets.gpt import GPT, load_gpt
from model.nets.sampler import OnToken, Rerank, Sampler
from model.nets.tokenizers import Tokenizer, load_tokenizer

BATCH_CPU, BATCH_CUDA = 64, 256  # pictures drawn side by side
CACHED = 0.25  # share of a GPU's memory for their keys and values, of which two programs may have some


def fitting(each: int, memory: int) -> int:
    """Pictures that a GPU with so many bytes of memory draws at once; keys and values of one take `each`."""
    most = int(CACHED * memory / each)
    return min(BATCH_CUDA, 2 ** (most.bit_length() - 1)) if most else 1


class Unfit(UserError):
    """A model that cannot draw: its parts do not fit, or its numbers are none."""


class Generator:
    """Draws pictures from prompts; `load` makes one from a bundle."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        text: TextEncoder,
        gpt: GPT,
        reranker: Callable[[], Judge] | None = None,
        sampling: SamplingConfig | None = None,
        compile: bool = False,
    ) -> None:
        """
        Args:
            tokenizer, text, gpt: on one device, in evaluation mode.
            reranker: opens the CLIP that chooses where `best_of` asks for several draws: the one that reads
                the prompts, so that what the judge says of the chosen means as much as of any.
            sampling: settings of draws that bring none.
            compile: see `model.nets.compiled`.
        """
        if gpt.vocabulary != tokenizer.vocabulary or gpt.text_width != text.width:
            raise Unfit(
                f"the parts do not belong together: the transformer has {gpt.vocabulary} codes and reads text"
                f" of width {gpt.text_width}, the tokenizer has {tokenizer.vocabulary} codes and the text"
                f" encoder width {text.width}"
            )
        self.tokenizer, self.text, self.gpt, self._reranker = tokenizer, text, gpt, reranker
        self.sampling = sampling or SamplingConfig()
        self.sampler = CompiledSampler(gpt) if compile else Sampler(gpt)

    @classmethod
    def load(
        cls, folder: str | Path, device: str | torch.device | None = None, pictures: int = 1
    ) -> Generator:
        """The generator of a bundle (see `bundle.py`); on the GPU where there is one, unless told otherwise.
        It compiles its steps where that pays for so many `pictures`.

        Raises:
            UserError: where the folder is no bundle, a part is missing or does not fit, or a weight is no
                finite number (`Diverged`).
        """
        folder = Path(folder)
        if not (folder / SAMPLING).is_file():
            raise Unfit(
                f"{folder} is no model: it has no {SAMPLING}; a model folder has {', '.join(PARTS)} and that"
            )
        try:
            stored = read_description(folder, SAMPLING)
            sampling = SamplingConfig.model_validate(without_retired(stored))
        except ValidationError as error:
            raise UserError(f"{folder / SAMPLING}: {reason(error)}") from None
        return cls.open({part: folder / part for part in PARTS}, sampling, device, pictures)

    @classmethod
    def open(
        cls,
        parts: Mapping[str, Path],
        sampling: SamplingConfig,
        device: str | torch.device | None = None,
        pictures: int = 1,
    ) -> Generator:
        """The generator of the folders of its parts, which need be no bundle yet; else as `load`."""
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        gpt = load_gpt(parts["transformer"], device)
        if device.type == "cuda" and gpt.config.training.precision == "bf16":
            gpt = gpt.bfloat16()
        tokenizer = load_tokenizer(parts["tokenizer"], device)
        text = load_text_encoder(parts["text"], device)
        reranker = cache(partial(load_judge, parts["text"], device))
        if sampling.best_of > 1:  # what does not fit is to be known before anything is drawn
            reranker()
        return cls(tokenizer, text, gpt, reranker, sampling, compile=pays(device, pictures))

    @property
    def device(self) -> torch.device:
        """Where pictures are drawn."""
        return self.gpt.embedding.weight.device

    @property
    def side(self) -> int:
        """Of a picture as it is drawn, pixels."""
        return self.gpt.grid[0] * self.tokenizer.factor

    def generate(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        sampling: SamplingConfig | None = None,
        unconditional: bool = False,
    ) -> list[Image.Image]:
        """One picture per prompt and seed; the same prompt, seed and settings give the same picture.

        Args:
            prompts: in words; ignored where `unconditional`.
            seeds: 0 ≤ seed < 2⁶³, as many as prompts.
            sampling: other settings than the model's own.
            unconditional: draw without text.

        Raises:
            UserError: an empty prompt, one of more than 1,000 characters, an impossible seed or setting, or
                the nets make what is no finite number (`Diverged`).
        """
        images = self.draw(prompts, seeds, sampling, unconditional)
        return [Image.fromarray(pixels.permute(1, 2, 0).numpy()) for pixels in to_pixels(images).cpu()]

    @torch.no_grad()
    def draw(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        sampling: SamplingConfig | None = None,
        unconditional: bool = False,
        on_batch: Callable[[int], object] | None = None,
        on_token: OnToken | None = None,
    ) -> Tensor:
        """As `generate`, but float (N, 3, H, W) in [-1, 1]; `on_batch` hears how many are done."""
        if len(prompts) != len(seeds):
            raise ValueError(f"{len(seeds)} seeds for {len(prompts)} prompts; each picture needs both")
        if not unconditional:
            for prompt in prompts:
                check_prompt(prompt)
        for seed in seeds:
            if not 0 <= seed < 2**63:
                raise UserError(f"seed {seed} is out of range; a seed is a whole number from 0 to 2^63 - 1")
        sampling = checked(sampling or self.sampling)
        size = max(1, self._side_by_side() // sampling.best_of)
        images = []
        for start in range(0, len(seeds), size):
            batch, chosen = list(prompts[start : start + size]), list(seeds[start : start + size])
            count = len(chosen)
            if isinstance(self.sampler, CompiledSampler):  # compiles for each size of a batch: fill it up
                batch += batch[-1:] * (size - count)
                chosen += chosen[-1:] * (size - count)
            codes = self._codes(batch, chosen, sampling, unconditional, on_token)[:count]
            images.append(self._decoded(codes))
            if on_batch is not None:
                on_batch(min(start + size, len(seeds)))
        return torch.cat(images)

    def _side_by_side(self) -> int:
        """Pictures that are drawn at once."""
        if self.device.type != "cuda":
            return BATCH_CPU
        gpt = self.gpt  # keys and values, with text and without
        each = 4 * gpt.config.depth * gpt.config.width * gpt.tokens * gpt.embedding.weight.element_size()
        return fitting(each, torch.cuda.get_device_properties(self.device).total_memory)

    def _codes(
        self,
        prompts: list[str],
        seeds: list[int],
        sampling: SamplingConfig,
        unconditional: bool,
        on_token: OnToken | None,
    ) -> Tensor:
        """Codes (B, T), one row per seed."""
        if unconditional:
            alone = sampling.model_copy(update={"best_of": 1})  # there is nothing to judge a picture by
            return self.sampler(None, None, alone, seeds, on_token=on_token)
        states, mask = self.text.encode(self.text.tokenize(prompts))
        rerank = self._rerank(prompts, self._reranker()) if self._reranker and sampling.best_of > 1 else None
        most = self._side_by_side()
        return self.sampler(states, mask, sampling, seeds, on_token=on_token, rerank=rerank, at_once=most)

    def _decoded(self, codes: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) of codes (B, T)."""
        images = self.tokenizer.decode(codes.view(len(codes), *self.gpt.grid))
        if not images.isfinite().all():
            raise Diverged("codes are decoded to what is no finite number; train the tokenizer anew")
        return images

    def _rerank(self, prompts: list[str], clip: Judge) -> Rerank:
        def scores(codes: Tensor) -> Tensor:  # (B, n, T) -> (B, n)
            parts = codes.flatten(0, 1).split(self._side_by_side())
            features = torch.cat([clip.image_features(self._decoded(part)) for part in parts])
            features = features.view(*codes.shape[:2], -1)
            found = torch.einsum("bne,be->bn", features, clip.text_features(prompts))
            if not found.isfinite().all():
                raise Diverged("pictures are chosen by what is no finite number; train the text encoder anew")
            return found

        return scores


def check_prompt(prompt: str) -> None:
    """Refuse what cannot be drawn from. Raises UserError. (What exceeds the text encoder loses its end.)"""
    if not prompt.strip():
        raise UserError("the prompt is empty; say what to draw, or draw unconditionally")
    if len(prompt) > LONGEST_PROMPT:
        raise UserError(f"the prompt has {len(prompt)} characters; at most {LONGEST_PROMPT} are read")


def checked(sampling: SamplingConfig | Mapping[str, Any]) -> SamplingConfig:
    """Sampling settings, validated. Raises UserError naming the first that is impossible."""
    values = sampling.model_dump() if isinstance(sampling, SamplingConfig) else dict(sampling)
    try:
        return SamplingConfig.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"]))
        message = first["msg"].removeprefix("Value error, ")
        raise UserError(f"sampling: {name} is {first['input']!r}: {message}") from None
