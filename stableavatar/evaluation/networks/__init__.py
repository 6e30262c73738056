"""The networks behind the metrics, by the names that metrics and the cache use."""

from collections.abc import Callable
from functools import lru_cache

from stableavatar.evaluation.networks.arcface import ArcFace
from stableavatar.evaluation.networks.dino import Dino
from stableavatar.evaluation.networks.i3d import I3D
from stableavatar.evaluation.networks.inception import Inception
from stableavatar.evaluation.networks.landmarks import Landmarks
from stableavatar.evaluation.networks.lips import Lips, Voice
from stableavatar.evaluation.networks.looks import Looks
from stableavatar.evaluation.networks.plain import Change, Colour, Envelope
from stableavatar.evaluation.samples import Network, View
from stableavatar.evaluation.weights import Tools

LAST_TWO_SECONDS = 2.0
TAIL = 16
"""Pictures of the end of a video that LongCat looks at."""
NETWORKS: dict[str, Callable[[Tools], Network]] = {
    "colour": lambda tools: Colour(),
    "change": lambda tools: Change(),
    "envelope": lambda tools: Envelope(),
    "landmarks": Landmarks,
    "lips": Lips,
    "voice": Voice,
    "looks": Looks,
    "dino": Dino,
    "inception": lambda tools: Inception("inception", tools, View()),
    "inception_tail": lambda tools: Inception("inception_tail", tools, View(rate=25, seconds=TAIL / 25)),
    "arcface": lambda tools: ArcFace("arcface", tools, View(rate=5)),
    "arcface_tail": lambda tools: ArcFace("arcface_tail", tools, View(seconds=LAST_TWO_SECONDS, count=TAIL)),
    "i3d": lambda tools: I3D("i3d", tools, View(rate=25, count=128), clips=1),
    "i3d_16": lambda tools: I3D("i3d_16", tools, View(rate=25), clips=16, length=16),
    "i3d_tail": lambda tools: I3D("i3d_tail", tools, View(rate=25, seconds=TAIL / 25), clips=1),
}
"""Name -> what builds the network; its weights load when it first sees something."""


@lru_cache(maxsize=64)
def build_network(name: str, tools: Tools) -> Network:
    """The network of that name, one for each name and tools in a process."""
    return NETWORKS[name](tools)
