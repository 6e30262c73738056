"""The settings of train.py and of the tools around it; the machinery (YAML, key=value, limits) is in `stableavatar.config`."""

import re
from dataclasses import dataclass, field

from stableavatar.config import RING_BACKENDS, Config, InferenceConfig, setting
from stableavatar.geometry import FPS, SIZE_MULTIPLE, TEMPORAL_STRIDE, WINDOW_FRAMES


@dataclass
class DataConfig:
    lists: str = setting("", "path lists, separated by commas: text files with one clip folder per line (video_rec_path.txt, ...)")
    sizes: str = setting("512x512", "WIDTHxHEIGHT of the buckets, separated by commas; a clip goes to the one nearest to its own shape")
    frames: str = setting(str(WINDOW_FRAMES), "lengths of the buckets in frames, 4n + 1, by commas; a clip goes to the longest it fills")
    fps: float = setting(FPS, "frames per second of the samples; clips of any other rate are resampled, sound in step", low=1, high=120)
    source_fps: float = setting(FPS, "rate of clips that are only images/, whose files do not tell it", low=1, high=240)
    runs: int = setting(0, "fixed runs of frames per clip, taken in turn epoch by epoch; 0 draws a new run every epoch (no cache)", low=0)
    seed: int = setting(42, "of the runs' starts, which a cache holds; all else that is random follows from the run's own seed",
                        low=0, high=2**63 - 1)
    cache: str = setting("", "folder that scripts/cache_latents.py wrote (needs runs of at least 1); empty encodes while training")
    cache_dtype: str = setting("float32", "precision of the cache: float32 trains exactly as without one, bfloat16 takes half the disk",
                               choices=("float32", "bfloat16"))
    workers: int = setting(4, "processes that read clips, for each training process; 0 reads in the process itself", low=0)
    max_broken: float = setting(0.05, "share of broken clips above which a run stops", low=0, high=1)
    validation_lists: str = setting("", "path lists of held-out clips, whose loss is measured for every checkpoint; empty for none")


@dataclass
class ObjectiveConfig:
    density: str = setting("uniform", "how often each noise level is trained, before the shift",
                           choices=("uniform", "logit_normal", "mode"))
    logit_mean: float = setting(0.0, "logit_normal: mean")
    logit_std: float = setting(1.0, "logit_normal: standard deviation", low=0.01)
    mode_scale: float = setting(1.29, "mode: how strongly the middle is favoured", low=-1, high=1.75)
    shift: float = setting(5.0, "shift of the noise schedule, as in sampling", low=0.01, high=100)
    masks: bool = setting(True, "weigh errors by face and lip masks (equation 11); false for the plain squared error")
    face_share: float = setting(0.1, "share of samples whose loss is that of the face mask alone (equation 11)", low=0, high=1)
    lip_share: float = setting(0.5, "share of samples whose loss is that of the lip mask alone (equation 11)", low=0, high=1)
    lip_weight: float = setting(1.0, "weight of the lips where the loss is that of all: 1 + face + lip_weight lips (equation 11: 1)", low=0)
    lip_area: float = setting(0.0, "part of the picture that lips count as, whatever they cover: small mouths then weigh as much as large "
                              "ones; 0 for as much as they cover (equation 11)", low=0, high=1)
    null_audio: float = setting(0.1, "share of samples with null audio (zero features): guidance's second term", low=0, high=1)
    drop_tokens: float = setting(0.1, "share of samples whose refined audio tokens are dropped: guidance's third term", low=0, high=1)
    clip_audio: float = setting(0.3, "share of forwards in which every frame attends to the audio of the whole clip", low=0, high=1)
    motion: float = setting(0.0, "share of the loss that compares differences between neighbouring latent frames", low=0, high=1)


@dataclass
class LoraConfig:
    rank: int = setting(128, "rank of the low-rank updates", low=1)
    alpha: float = setting(64.0, "the update is scaled by alpha / rank", low=0.001)
    targets: str = setting("q,k,v,o,ffn", "which linears of the blocks: any of q, k, v, o, ffn (k and v: text, image and audio keys alike)")
    adapter: str = setting("whole", "the audio adapter is trained whole, by LoRA as well, or not at all",
                           choices=("whole", "lora", "frozen"))


@dataclass
class OptimizerConfig:
    name: str = setting("adamw", "adamw or muon; adamw8bit (bitsandbytes) or came (came-pytorch) where installed",
                        choices=("adamw", "adamw8bit", "muon", "came"))
    lr: float = setting(1e-5, "learning rate: 1e-5 in the paper, 1e-4 in the released scripts", low=0)
    adapter_lr: float = setting(0.0, "learning rate of the audio adapter; 0 for that of the rest", low=0)
    audio_lr: float = setting(0.0, "learning rate of the blocks' audio keys and values; 0 for that of the rest", low=0)
    beta1: float = setting(0.9, "decay of the gradient's mean", low=0, high=1)
    beta2: float = setting(0.999, "decay of the gradient's square", low=0, high=1)
    eps: float = setting(1e-10, "added to the root of the square", low=0)
    weight_decay: float = setting(3e-2, "of matrices; norms, biases and modulations have none", low=0)
    clip: float = setting(0.05, "largest norm of the gradient; 0 for no clipping", low=0)
    clip_mode: str = setting("constant", "adaptive: the limit starts higher, falls, and tightens for outliers, as in the released scripts",
                             choices=("constant", "adaptive"))
    clip_start: int = setting(1000, "adaptive: step at which the limit has fallen to clip and outliers are tightened", low=1)
    clip_ratio: float = setting(5.0, "adaptive: the limit at the first step, as a multiple of clip", low=1)
    schedule: str = setting("constant", "learning rate after the warm-up", choices=("constant", "cosine", "linear"))
    warmup: int = setting(100, "steps of linear warm-up", low=0)
    ema: float = setting(0.0, "decay of the weights' moving average, which is then what is saved for use; 0 for none", low=0, high=1)


@dataclass
class CheckpointConfig:
    every: int = setting(500, "steps between two checkpoints", low=1)
    keep: int = setting(3, "how many of the last ones stay, beside the best one", low=1)
    released: bool = setting(True, "also write the weights under their released names, for inference.py and other tools")
    dtype: str = setting("bfloat16", "precision of the weights for use; the state to resume from is exact", choices=("float32", "bfloat16"))


@dataclass
class ValidationConfig:
    every: int = setting(0, "steps between two sets of videos of fixed cases; 0 for none", low=0)
    cases: str = setting("", "list of cases as of inference.py, made into videos with sound; empty for none")
    config: str = setting("", "YAML of inference.py with the settings of those videos")


@dataclass
class LogConfig:
    every: int = setting(1, "steps between two lines", low=1)
    tensorboard: bool = setting(True, "write the figures for tensorboard into the run folder")
    wandb: str = setting("", "project of Weights & Biases, where installed; empty for none")
    peak_tflops: float = setting(0.0, "peak of the device in TFLOP/s; 0 takes the data sheet's for known GPUs and measures others", low=0)


@dataclass
class SequenceConfig:
    ulysses: int = setting(1, "processes that share the tokens of each sample, exchanging heads; next to each other, inside a machine",
                           low=1)
    ring: int = setting(1, "such groups that share each sample, passing keys and values around; ulysses x ring divide the processes",
                        low=1)

    @property
    def size(self) -> int:
        """Processes that share each sample."""
        return self.ulysses * self.ring


@dataclass
class TrainConfig(Config):
    """The settings of train.py."""

    output: str = setting("runs/default", "run folder: settings, checkpoints, figures, validation videos")
    resume: str = setting("", "latest, or a checkpoint folder: go on from there; empty starts anew (in an empty run folder)")

    model: str = setting("", "folder of a complete pipeline (save_pretrained); used instead of checkpoints if given")
    checkpoints: str = setting("", "folder of the released files, laid out as published")
    transformer: str = setting("", "weights to fine-tune: file in checkpoints or absolute path; empty: the base model's own, fresh audio")
    base: str = setting(InferenceConfig.base, "Wan base model: folder in checkpoints, or absolute path")
    wav2vec: str = setting(InferenceConfig.wav2vec, "speech encoder: folder in checkpoints, or absolute path")
    scratch: str = setting("", "config.json of a transformer that starts from random weights (small models, ablations); empty for none")

    what: str = setting("attention", "what trains: attention + adapter (paper), blocks + adapter (released scripts), all, or LoRA",
                        choices=("attention", "blocks", "all", "lora"))
    epochs: int = setting(20, "epochs", low=1)
    max_steps: int = setting(0, "stop after this many optimiser steps; 0 for no limit but epochs", low=0)
    batch: int = setting(1, "samples per forward, of each process or of those that share them (parallel)", low=1)
    accumulation: int = setting(1, "forwards per optimiser step", low=1)
    seed: int = setting(42, "seed of everything random", low=0, high=2**63 - 1)
    device: str = setting("auto", "every process takes its own GPU; auto is the CPU where there is none", choices=("auto", "cpu", "cuda"))
    dtype: str = setting("bfloat16", "precision of computation; trained weights stay in float32 (with DeepSpeed: their master copy); "
                         "auto is bfloat16 but on CPUs without instructions for it", choices=("auto", "float32", "bfloat16"))
    gradient_checkpointing: bool = setting(True, "compute blocks again in the backward pass instead of keeping their activations")
    attention: str = setting("native", "attention backend by its diffusers name")
    compile: bool = setting(False, "torch.compile the transformer's blocks")
    encoders: str = setting("keep", "keep the encoders on the device, or hand it over: each visits it for its part of a batch",
                            choices=("keep", "handover"))

    parallel: SequenceConfig = field(default_factory=SequenceConfig)
    data: DataConfig = field(default_factory=DataConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    log: LogConfig = field(default_factory=LogConfig)

    def check(self) -> None:
        """Raise ValueError if settings contradict each other."""
        parse_sizes(self.data.sizes)
        parse_lengths(self.data.frames)
        if self.parallel.ring > 1 and self.attention not in RING_BACKENDS:
            raise ValueError(f"parallel.ring={self.parallel.ring} needs attention's log-sum-exp, which attention={self.attention} lacks; "
                             f"use attention={RING_BACKENDS[0]}, or parallel.ulysses")
        masked = self.objective.face_share + self.objective.lip_share
        if masked > 1:
            raise ValueError(f"objective.face_share + objective.lip_share must not exceed 1, got {masked:g}")
        if self.data.cache and not self.data.runs:
            raise ValueError("data.cache needs data.runs of at least 1: a cache holds fixed runs of frames")


def parse_words(text: str) -> list[str]:
    """Words separated by commas."""
    return [word.strip() for word in text.split(",") if word.strip()]


def parse_sizes(text: str) -> list[tuple[int, int]]:
    """`832x480,480x832` -> [(832, 480), (480, 832)]. Raises ValueError for anything but multiples of 16."""
    sizes = []
    for word in parse_words(text):
        match = re.fullmatch(r"(\d+)x(\d+)", word)
        size = (int(match[1]), int(match[2])) if match else (0, 0)
        if not all(side and side % SIZE_MULTIPLE == 0 for side in size):
            raise ValueError(f"data.sizes must be WIDTHxHEIGHT, multiples of {SIZE_MULTIPLE}, such as 832x480,480x832; got {word!r}")
        sizes.append(size)
    if not sizes:
        raise ValueError("data.sizes must name at least one size, such as 512x512")
    return sizes


def parse_lengths(text: str) -> list[int]:
    """`81,41` -> [81, 41]. Raises ValueError for anything but 4n + 1 with n of at least 1."""
    for word in (words := parse_words(text)):
        if not word.isdigit() or int(word) <= TEMPORAL_STRIDE or int(word) % TEMPORAL_STRIDE != 1:
            raise ValueError(f"data.frames must be {TEMPORAL_STRIDE}n + 1, such as {WINDOW_FRAMES}; got {word!r}")
    if not words:
        raise ValueError(f"data.frames must name at least one length, such as {WINDOW_FRAMES}")
    return [int(word) for word in words]
