"""Training of the puppet world's speech encoder: a small wav2vec2 that learns phonemes by CTC, and figures of what it hears.

CTC (Graves et al. 2006) with the pause as its blank. CTC alone stays long at "always blank" and spikes once per phoneme; the known
alignment is a second, frame-wise loss on the same classes, so that each token says what is spoken while it lasts. A third loss reads the
mouth from each token: a large wav2vec2 has learned articulation from a thousand hours of speech, a small one would not from phonemes alone.
"""

import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm
from transformers import Wav2Vec2Config, Wav2Vec2FeatureExtractor, Wav2Vec2ForCTC

from stableavatar.config import Config, setting
from stableavatar.files import filling, write_json
from stableavatar.geometry import SAMPLE_RATE
from stableavatar.puppet.recipe import PRECISIONS, Trainer, autocast
from stableavatar.puppet.speech_pool import (
    LONGEST,
    Batch,
    Segment,
    draw_segments,
    mouth_at,
    normalise,
    spoken,
    token_times,
    training_batch,
)  # fmt: skip
from stableavatar.puppet.visemes import PHONEMES

__all__ = ["SpeechConfig", "SpeechTrainer", "measure", "speech_model", "train_speech"]

logger = logging.getLogger(__name__)

STATE_FILE, FIGURES_FILE = "state.pt", "figures.json"
NEIGHBOURS = 2
"""Tokens on both sides that the probe of the mouth sees too."""
RIDGE = 100.0
LOG_EVERY = 250


@dataclass
class SpeechConfig(Config):
    """The settings of `puppet.py speech`."""

    output: str = setting("checkpoints/puppet/speech", "folder of the encoder and of the training's state")
    steps: int = setting(16000, "training steps", low=1)
    batch: int = setting(5, "segments of a step, each 1.64 to 3.24 s", low=1)
    pool: int = setting(6000, "utterances that segments are cut from, a quarter of a megabyte each", low=1)
    held_out: int = setting(120, "utterances of other voices and words to measure it on; as many of training's fit the probe", low=2)
    lr: float = setting(2e-3, "largest learning rate", low=0)
    warmup: int = setting(50, "steps until then", low=1)
    align_weight: float = setting(1.5, "weight of the frame-wise loss next to CTC", low=0)
    mouth_weight: float = setting(70.0, "weight of the squared error of aperture and width, as a matrix reads them from a token", low=0)
    dtype: str = setting("auto", "precision of computation; auto is bfloat16 where the CPU has instructions for it", choices=PRECISIONS)
    seed: int = setting(0, "seed of everything", low=0, high=2**31 - 1)
    workers: int = setting(1, "processes that draw utterances", low=1)
    save_every: float = setting(60.0, "seconds between two saves of the state", low=0)


def speech_model(hidden: int = 192, layers: int = 3) -> Wav2Vec2ForCTC:
    """The encoder with a head of phonemes: strides of the real wav2vec2, layer norms first, no dropout of layers or time."""
    config = Wav2Vec2Config(
        hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=4, intermediate_size=hidden * 8 // 3,
        conv_dim=(32, 48, 64, 96, 128, 128, 128), feat_extract_norm="group", do_stable_layer_norm=True,
        num_conv_pos_embeddings=32, num_conv_pos_embedding_groups=8, vocab_size=len(PHONEMES), pad_token_id=0,
        hidden_dropout=0.0, attention_dropout=0.0, activation_dropout=0.0, feat_proj_dropout=0.0, final_dropout=0.0, layerdrop=0.0,
        mask_time_prob=0.0, ctc_loss_reduction="mean", ctc_zero_infinity=True,
    )  # fmt: skip
    return Wav2Vec2ForCTC(config)


class SpeechTrainer(Trainer):
    """The model, its optimiser and how far they are."""

    free = frozenset({"output", "held_out", "workers", "save_every"})
    config: SpeechConfig

    def __init__(self, config: SpeechConfig, model: Wav2Vec2ForCTC | None = None) -> None:
        torch.manual_seed(config.seed)
        self.model = (model or speech_model()).train()
        self.mouth = nn.Linear(self.model.config.hidden_size, 2)
        weights = [*self.model.parameters(), *self.mouth.parameters()]
        optimizer = torch.optim.AdamW(weights, config.lr, betas=(0.9, 0.98), weight_decay=0.01, foreach=True)
        super().__init__(config, optimizer, model=self.model, mouth=self.mouth)

    def advance(self, pool: list[Segment]) -> tuple[float, float, float]:
        """One step; CTC's loss per phoneme, the frame-wise one, the mouth's. The step's number decides all that is random in it."""
        config = self.config
        rng = np.random.default_rng([config.seed, self.step])
        torch.manual_seed(int(rng.integers(2**31)))
        self.set_rate(config.lr, (self.step + 1) / config.warmup, self.step / config.steps)
        ctc, aligned, mouth = self.losses(training_batch(pool, config.batch, rng))
        self.descend(ctc + config.align_weight * aligned + config.mouth_weight * mouth)
        return ctc.item(), aligned.item(), mouth.item()

    def losses(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """CTC's, the frame-wise and the mouth's loss of a batch."""
        with autocast(self.config.dtype):
            hidden = self.model.wav2vec2(batch.waveforms).last_hidden_state
            logits, mouths = self.model.lm_head(hidden).float(), self.mouth(hidden).float()
        lengths = torch.full((len(logits),), logits.shape[1])
        said = (batch.labels >= 0).sum(1)
        likely = logits.log_softmax(-1).transpose(0, 1)
        ctc = functional.ctc_loss(likely, batch.labels.clamp(min=0), lengths, said, zero_infinity=True)
        return ctc, functional.cross_entropy(logits.transpose(1, 2), batch.classes), functional.mse_loss(mouths, batch.mouths)


def train_speech(config: SpeechConfig) -> None:
    """Trains, and writes the encoder (Wav2Vec2Model), its processor and its figures into `config.output`.

    Raises:
        ValueError: the state file there is damaged, or of another training.
        OSError: the folder cannot be written.
    """
    output = Path(config.output)
    output.mkdir(parents=True, exist_ok=True)
    trainer, state = SpeechTrainer(config), output / STATE_FILE
    if state.exists():
        trainer.load(state)
    if trainer.step < config.steps:
        _train(trainer, draw_segments(config.pool, config.seed, workers=config.workers), state)
    figures = measure(trainer.model, config.held_out, config.seed)
    with filling(output) as part:
        trainer.model.wav2vec2.save_pretrained(part)
        Wav2Vec2FeatureExtractor(sampling_rate=SAMPLE_RATE, do_normalize=True).save_pretrained(part)
        write_json(part / FIGURES_FILE, figures | {"steps": trainer.step})
    logger.info("phoneme error rate %(phoneme_error_rate).3f, R2 of aperture %(r2_aperture).3f, of width %(r2_width).3f", figures)


def _train(trainer: SpeechTrainer, pool: list[Segment], state: Path) -> None:
    config, losses = trainer.config, []
    for _ in tqdm(range(trainer.step, config.steps), "steps", config.steps, initial=trainer.step, mininterval=5):
        losses.append(trainer.advance(pool))
        if trainer.step % LOG_EVERY == 0:
            logger.info("step %d: CTC %.3f, frame-wise %.3f, mouth %.4f", trainer.step, *np.mean(losses, axis=0))
            losses.clear()
        trainer.save(state, config.save_every)
    trainer.save(state)


def measure(model: Wav2Vec2ForCTC, count: int, seed: int) -> dict[str, float]:
    """What the encoder hears in held-out voices.

    A ridge regression from a token's feature and its neighbours' to the mouth is fitted on as many utterances of training's voices.

    Returns:
        phoneme_error_rate (edit distance per phoneme of the greedy decoding), r2_aperture and r2_width.
    """
    fitted = draw_segments(count, seed + 1, LONGEST)
    tested = draw_segments(count, seed, LONGEST, held_out=True)
    features, mouths, _ = _listen(model, fitted)
    weights = _ridge(np.concatenate(features), np.concatenate(mouths))
    features, mouths, heard = _listen(model, tested)
    score = _explained(_with_one(np.concatenate(features)) @ weights, np.concatenate(mouths))
    said = [spoken(segment.phonemes, LONGEST) for segment in tested]
    errors = sum(edit_distance(one, other) for one, other in zip(heard, said)) / sum(map(len, said))
    return {"phoneme_error_rate": errors, "r2_aperture": float(score[0]), "r2_width": float(score[1])}


@torch.no_grad()
def _listen(model: Wav2Vec2ForCTC, segments: list[Segment]) -> tuple[list[np.ndarray], list[np.ndarray], list[list[int]]]:
    """Per segment: features with neighbours [tokens, 5 dim], mouth at the tokens' times [tokens, 2], phonemes heard."""
    model.eval()
    features, mouths, heard = [], [], []
    for segment in segments:
        hidden = model.wav2vec2(torch.from_numpy(normalise(segment.waveform))[None]).last_hidden_state
        features.append(_with_neighbours(hidden[0].numpy()))
        mouths.append(mouth_at(segment.mouth, token_times(len(features[-1]))))
        heard.append(greedy(model.lm_head(hidden)[0]))
    return features, mouths, heard


def greedy(logits: Tensor) -> list[int]:
    """Best path of CTC [tokens, classes]: repeats joined, blanks dropped."""
    return [index for index in torch.unique_consecutive(logits.argmax(1)).tolist() if index]


def edit_distance(one: list[int], other: list[int]) -> int:
    """Insertions, deletions and substitutions between two sequences (Levenshtein)."""
    row = list(range(len(other) + 1))
    for count, left in enumerate(one, 1):
        previous, row = row, [count]
        for index, right in enumerate(other):
            row.append(min(previous[index] + (left != right), previous[index + 1] + 1, row[index] + 1))
    return row[-1]


def _with_neighbours(features: np.ndarray) -> np.ndarray:
    padded = np.pad(features, ((NEIGHBOURS, NEIGHBOURS), (0, 0)), mode="edge")
    return np.concatenate([padded[shift : shift + len(features)] for shift in range(2 * NEIGHBOURS + 1)], axis=1)


def _with_one(features: np.ndarray) -> np.ndarray:
    return np.pad(features, ((0, 0), (0, 1)), constant_values=1.0).astype(np.float64)


def _ridge(features: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Weights [dim + 1, targets]; the last row is the constant."""
    inputs = _with_one(features)
    return np.linalg.solve(inputs.T @ inputs + RIDGE * np.eye(inputs.shape[1]), inputs.T @ targets)


def _explained(predicted: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """R2 of each column."""
    return 1 - ((predicted - targets) ** 2).mean(0) / targets.var(0)
