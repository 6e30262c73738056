"""Scenes of the puppet world, each from one seed, and the training set made of them in the project's own layout."""

import json
import logging
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import soundfile
from PIL import Image
from tqdm import tqdm

from stableavatar.config import Config, setting
from stableavatar.data.clips import IMAGES, MASKS, PROMPT, SOUND, frame_file
from stableavatar.files import replacing, write_json
from stableavatar.geometry import FPS, SAMPLE_RATE, WINDOW_FRAMES
from stableavatar.puppet.identity import Identity, draw_identity
from stableavatar.puppet.motion import Motion, draw_motion
from stableavatar.puppet.renderer import Rendered, render
from stableavatar.puppet.speech import KIND_SHARES, Utterance, draw_utterance
from stableavatar.puppet.visemes import mouth_track
from stableavatar.workers import shared_out

logger = logging.getLogger(__name__)

SHAPES = {"square": (128, 128), "vec": (96, 160), "rec": (160, 96)}
"""Width and height by the name of the layout's folder: the paper's three shapes in miniature."""
SHAPE_SHARES = {"square": 0.8, "vec": 0.1, "rec": 0.1}
TRUTH = "truth.npz"
"""Ground truth of a clip: every track of its motion [frames], and the identity's code."""
SETTINGS = "world.json"
"""What decides the clips of a world: it can grow, but not mix with another."""
TRAINING, HELD_OUT = 0, 1
"""First word of the seed of a scene: no held-out scene shares its draws with a training scene."""


@dataclass(frozen=True)
class Scene:
    """One clip of the world: who is seen, what is heard, how it moves."""

    kind: str
    size: tuple[int, int]
    identity: Identity
    utterance: Utterance
    motion: Motion

    def __len__(self) -> int:
        return len(self.motion.aperture)

    @property
    def prompt(self) -> str:
        """What is seen."""
        return self.identity.prompt(self.kind)

    def render(self, frame: int) -> Rendered:
        """One frame: pixels uint8 [H, W, 3], masks uint8 [H, W]."""
        return render(self.identity, self.motion, frame, self.size)

    def frames(self) -> Iterator[Rendered]:
        """All of them, in order."""
        return map(self.render, range(len(self)))


def draw_scene(
    seed: int,
    kind: str = "speech",
    size: tuple[int, int] = SHAPES["square"],
    frames: int = WINDOW_FRAMES,
    held_out: bool = False,
    style: str | None = None,
    framing: str | None = None,
) -> Scene:
    """A scene that follows from its seed.

    Args:
        kind: speech, singing or dancing.
        size: width and height in pixels.
        frames: at 25 per second; the sound lasts exactly as long.
        held_out: a voice, sentences and a face that no training scene has.
        style, framing: of the identity (`draw_identity`); None draws them.

    Raises:
        ValueError: an unknown kind, style or framing, no frames. Sizes are refused by `render`.
    """
    seeds = np.random.default_rng([HELD_OUT if held_out else TRAINING, seed]).integers(2**31, size=3).tolist()
    utterance = draw_utterance(seeds[0], frames / FPS, kind, held_out)
    mouth = mouth_track(utterance.phonemes, frames, FPS)
    return Scene(kind, size, draw_identity(seeds[1], style, framing), utterance, draw_motion(seeds[2], *mouth, kind, FPS))


@dataclass
class WorldConfig(Config):
    """The settings of `puppet.py world`."""

    output: str = setting("talking_face_data/puppet", "folder of the training set")
    clips: int = setting(1000, "clips in all", low=1)
    frames: int = setting(WINDOW_FRAMES, "frames of a clip, 25 per second", low=5)
    seed: int = setting(0, "seed of everything: which clips there are", low=0, high=2**31 - 1)
    held_out: bool = setting(False, "other faces, voices and sentences than training's, for validation")
    workers: int = setting(2, "processes that draw clips", low=1)


def write_world(config: WorldConfig) -> None:
    """Writes the clips that `config.output` lacks, and the path lists. The result does not depend on the number of workers.

    Raises:
        ValueError: the folder holds a world of another seed, of other frames or of the other side of held_out.
        OSError: the folder cannot be written.
    """
    home = Path(config.output).absolute()
    home.mkdir(parents=True, exist_ok=True)
    _check_settings(home / SETTINGS, config)
    jobs = shared_out(partial(write_numbered, home, config), range(config.clips), config.workers)
    folders = list(tqdm(jobs, "clips", config.clips))
    for shape in SHAPES:
        with replacing(home / f"video_{shape}_path.txt") as part:
            part.write_text("".join(f"{folder.relative_to(home)}\n" for folder in folders if folder.parts[-3] == shape), encoding="utf-8")
    logger.info("%s holds %d clips of %d frames", home, config.clips, config.frames)


def _check_settings(path: Path, config: WorldConfig) -> None:
    """Writes down what decides the clips, or compares it with what the folder was begun with."""
    wanted = {name: getattr(config, name) for name in ("seed", "frames", "held_out")}
    found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else wanted
    if found != wanted:
        raise ValueError(f"{path.parent} holds a world of {found}, expected {wanted}; give another output or remove it")
    write_json(path, wanted)


def write_numbered(home: Path, config: WorldConfig, number: int) -> Path:
    """Clip `number` of a world, unless it is there; its folder."""
    generator = np.random.default_rng([config.seed, number])
    shape, kind = (str(generator.choice(list(shares), p=list(shares.values()))) for shares in (SHAPE_SHARES, KIND_SHARES))
    folder = home / shape / kind / f"{number:05d}"
    if not folder.exists():
        write_clip(draw_scene(int(generator.integers(2**31)), kind, SHAPES[shape], config.frames, config.held_out), folder)
    return folder


def write_clip(scene: Scene, folder: Path) -> None:
    """A clip folder of the training layout, whole or not at all: pictures, masks, sound, prompt, ground truth."""
    part = folder.with_name(folder.name + ".partial")
    shutil.rmtree(part, ignore_errors=True)
    for name in (IMAGES, *MASKS):
        (part / name).mkdir(parents=True)
    for number, frame in enumerate(scene.frames()):
        for name, picture in zip((IMAGES, *MASKS), (frame.pixels, frame.face, frame.lips)):
            Image.fromarray(picture).save(frame_file(part / name, number), compress_level=1)
    soundfile.write(part / SOUND, scene.utterance.waveform, SAMPLE_RATE, subtype="PCM_16")
    (part / PROMPT).write_text(scene.prompt + "\n", encoding="utf-8")
    np.savez(part / TRUTH, code=scene.identity.code(), **vars(scene.motion))
    part.rename(folder)
