"""Weights that the networks of the metrics need: where they are published, which checksum is right, and why a network is absent."""

from dataclasses import dataclass, field
from pathlib import Path

from stableavatar.config import setting
from stableavatar.files import digest_file


@dataclass(frozen=True)
class Published:
    """A published file of weights.

    Attributes:
        name: of the file. source: where it is published. sha256: of its content, empty where it is not known to us.
    """

    name: str
    source: str
    sha256: str = ""


BUFFALO = "https://github.com/deepinsight/insightface/releases/download/v0.7/buffalo_l.zip"
WEIGHTS = {
    "inception": Published(
        "weights-inception-2015-12-05-6726825d.pth", "https://github.com/toshas/torch-fidelity/releases/tag/v0.2.0",
        "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
    ),
    "i3d": Published(
        "i3d_torchscript.pt", "https://www.dropbox.com/s/ge9e5ujwgetktms/i3d_torchscript.pt",
        "bec6519f66ea534e953026b4ae2c65553c17bf105611c746d904657e5860a5e2",
    ),
    "arcface": Published("w600k_r50.onnx", BUFFALO, "4c06341c33c2ca1f86781dab0e829f88ad5b64be9fba56e56bc9ebdefc619e43"),
    "detector": Published("det_10g.onnx", BUFFALO, "5838f7fe053675b1c7a08b633df49e7af5495cee0493c7dcf6697200b85b5b91"),
    "syncnet": Published(
        "syncnet_v2.model", "https://www.robots.ox.ac.uk/~vgg/software/lipsync/data/syncnet_v2.model",
        "961e8696f888fce4f3f3a6c3d5b3267cf5b343100b238e79b2659bff2c605442",
    ),
    "dino": Published("model.safetensors", "https://huggingface.co/facebook/dinov2-base"),
    "qalign": Published("config.json", "https://huggingface.co/q-future/one-align"),
}  # fmt: skip
"""Setting `weights.*` -> what it should be ("detector" lies in the folder of "arcface")."""
FOLDERS = {"arcface": "the unpacked buffalo_l.zip: ", "dino": "facebook/dinov2-base: ", "qalign": "q-future/one-align: "}
"""Settings that are folders -> what the folder is."""


@dataclass(unsafe_hash=True)
class WeightPaths:
    """Where weights lie; a network whose weights are not given is left out, with a word on it."""

    inception: str = setting("", "weights-inception-2015-12-05-6726825d.pth of torch-fidelity, for fid")
    i3d: str = setting("", "i3d_torchscript.pt of StyleGAN-V, for fvd")
    arcface: str = setting("", "folder of buffalo_l.zip of InsightFace (det_10g.onnx, w600k_r50.onnx), for csim")
    dino: str = setting("", "folder of facebook/dinov2-base, for dino")
    syncnet: str = setting("", "syncnet_v2.model, for sync_c, sync_d and sync_offset")
    qalign: str = setting("", "folder of q-future/one-align, for iqa and ase")
    qalign_python: str = setting("", "python of an environment with transformers 4.37, which one-align needs; empty to run it in this one")
    trust_remote_code: bool = setting(False, "let the program that lies in the folder of Q-Align run")
    face: str = setting("", "face_landmarker.task of mediapipe; empty for the models inside mediapipe 0.10.14")
    any_checksum: bool = setting(False, "take weights of another checksum than the published; the figures are then not those of the papers")


@dataclass(frozen=True)
class Tools:
    """What networks are built with.

    Attributes:
        weights: where they lie. device: where they compute, such as cpu, cuda or auto. batch: pictures at a time.
    """

    weights: WeightPaths = field(default_factory=WeightPaths)
    device: str = "cpu"
    batch: int = 16


def absence(names: tuple[str, ...], paths: WeightPaths) -> str:
    """ "absent: give weights.NAME=..." for the first of these settings that is not given; empty if all are."""
    for name in names:
        if not getattr(paths, name):
            published = WEIGHTS[name]
            what = "FOLDER" if name in FOLDERS else "FILE"
            return f"absent: give weights.{name}={what} ({FOLDERS.get(name, '')}{published.name} from {published.source})"
    return ""


def checked_weights(name: str, path: Path, paths: WeightPaths) -> str:
    """The sha256 of a file of weights.

    Args:
        name: in WEIGHTS.

    Raises:
        ValueError: there is no such file, or it has another checksum than the published one and `any_checksum` is off.
    """
    published = WEIGHTS[name]
    if not path.is_file():
        raise ValueError(f"there are no weights {path}; fetch {published.name} from {published.source}")
    digest = digest_file(path)
    if published.sha256 and digest != published.sha256 and not paths.any_checksum:
        advice = f"fetch {published.name} from {published.source}, or set weights.any_checksum=true, for figures unlike the papers'"
        raise ValueError(f"{path} has sha256 {digest[:16]}..., expected {published.sha256[:16]}...; {advice}")
    return digest
