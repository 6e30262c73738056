"""The cases of examples/: puppets and voices of our own that no training set of the world holds."""

import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
from PIL import Image

from stableavatar.config import Config, setting
from stableavatar.geometry import SAMPLE_RATE
from stableavatar.puppet.identity import draw_identity
from stableavatar.puppet.motion import draw_motion
from stableavatar.puppet.renderer import render
from stableavatar.puppet.speech import Utterance, sing, speak

logger = logging.getLogger(__name__)

SIZE = (512, 512)
"""Of the portraits, in pixels."""
SILENCE = 0.2
"""Seconds before and after the voice."""


@dataclass(frozen=True)
class Example:
    """Who is seen and what is heard.

    Attributes:
        seed, style, framing: of the identity; kind: speech, singing or dancing.
        voice, variant, pitch, rate: of the speaker; melody: semitones of its notes, a word each, if it sings.
    """

    seed: int
    text: str
    style: str = "puppet"
    framing: str = "bust"
    kind: str = "speech"
    voice: str = "en-us"
    variant: str = "f3"
    pitch: int = 50
    rate: int = 150
    melody: tuple[float, ...] = ()

    def utterance(self) -> Utterance:
        """What is heard."""
        if self.melody:
            return sing(self.text, self.melody, self.voice, self.variant, self.rate)
        return speak(self.text, self.voice, self.variant, self.pitch, self.rate)


EXAMPLES = {
    "ada": Example(7023, "Hello, I am Ada. A small model moves my lips, and it learned to do so on two processor cores."),
    "bruno": Example(7027, "Guten Tag, ich heiße Bruno. Mein Mund folgt meiner Stimme, Wort für Wort.", voice="de", variant="m5", pitch=40),
    "carla": Example(7011, "la la la, the moon is bright, my voice will sing for you tonight", kind="singing", variant="f5", rate=90,
                     melody=(0, 2, 4, 5, 4, 2, 0, 4, 5, 7, 5, 4, 2, 0)),
    "dario": Example(7009, "Buongiorno a tutti. Oggi vi racconto una piccola storia.", framing="half", voice="it", variant="m8"),
    "emma": Example(7003, "I am a cartoon, but I talk like everybody else!", style="cartoon", variant="f5", pitch=65),
    "felix": Example(7006, "Bonjour. Regardez bien mes lèvres, elles bougent avec ma voix.", framing="close", voice="fr", variant="m5"),
}
"""By the name of the folder: a plain portrait, another language, singing, half a body with hands, a cartoon, a close-up."""


@dataclass
class ExamplesConfig(Config):
    """The settings of `puppet.py examples`."""

    output: str = setting("examples", "folder in which each case gets its own")


def write_examples(config: ExamplesConfig) -> None:
    """Draws the cases of examples/: reference.png, audio.wav and prompt.txt of each. Raises OSError where they cannot be written."""
    for name, example in EXAMPLES.items():
        folder = Path(config.output) / name
        folder.mkdir(parents=True, exist_ok=True)
        identity = draw_identity(example.seed, example.style, example.framing)
        rest = draw_motion(example.seed, np.zeros(2, np.float32), np.full(2, 0.5, np.float32))
        Image.fromarray(render(identity, rest, 0, SIZE).pixels).save(folder / "reference.png", optimize=True)
        quiet = np.zeros(round(SILENCE * SAMPLE_RATE), np.float32)
        waveform = np.concatenate([quiet, example.utterance().waveform, quiet])
        soundfile.write(folder / "audio.wav", waveform, SAMPLE_RATE, subtype="PCM_16")
        (folder / "prompt.txt").write_text(identity.prompt(example.kind) + "\n", encoding="utf-8")
        logger.info("%s: %.2f s, %s", folder, len(waveform) / SAMPLE_RATE, identity.prompt(example.kind))
