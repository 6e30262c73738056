"""Every setting of data preparation. Groups stand with the steps that read them, but for those whose steps are slow to import."""

from dataclasses import dataclass, field
from pathlib import Path

from stableavatar.config import Config, setting
from stableavatar.data.preparation.crops import ClipConfig, bucket_sizes
from stableavatar.data.preparation.cuts import CutConfig
from stableavatar.data.preparation.filters import FilterConfig, ScoreConfig
from stableavatar.data.preparation.public_sets import SETS
from stableavatar.data.preparation.records import KINDS
from stableavatar.data.preparation.splits import SplitConfig

STEPS = ("inventory", "cuts", "crop", "voice", "masks", "scores", "manifest")
"""In the order in which they run; each reads what those before it wrote."""
NEED_RAW = STEPS[:3]


@dataclass
class FaceConfig:
    model: str = setting("", "face_landmarker.task, for mediapipe 0.10.30 and later; empty for the model inside mediapipe 0.10.14")
    max_faces: int = setting(4, "faces that are looked for in a picture, the largest first", low=1)
    # The loss that masks weight teaches lips to follow the sound, so by default they are on those whose sound it is: one speaker, or
    # both in a conversation, but neither a listener nor a portrait on the wall. The released tool masks every face.
    masked: str = setting("speaking", "who gets masks: all whose mouths move, the most prominent of them (main), or all faces",
                          choices=("speaking", "main", "all"))
    max_gap: float = setting(0.5, "seconds for which a face that is lost and found again is filled in between", low=0)


@dataclass
class VoiceConfig:
    separator: str = setting("", "Kim_Vocal_2.onnx, to write vocals.wav, the voice without music and noise; empty for off")
    device: str = setting("auto", "where the voice is separated; auto takes a GPU where torch and onnxruntime can use one",
                          choices=("auto", "cpu", "cuda"))
    train_on_vocals: bool = setting(False, "audio.wav, which training hears, becomes the separated voice; recording.wav keeps the original")
    loudness: float = setting(0.0, "LUFS to bring audio.wav to, such as -23, but no further than a peak of -1 dB; recording.wav keeps the "
                              "original; 0 leaves the sound as it is", low=-70, high=0)
    strictness: int = setting(2, "how sure webrtcvad must be that it hears a voice", low=0, high=3)

    def check(self) -> None:
        """ValueError if there would be no vocals to train on."""
        if self.train_on_vocals and not self.separator:
            raise ValueError("voice.train_on_vocals needs voice.separator; give the path of Kim_Vocal_2.onnx")


@dataclass
class PublicConfig:
    name: str = setting("", "the public set that the raw videos are of; empty for none", choices=("", *SETS))
    path: str = setting("", "its published annotations, a file or a folder (see docs/data_preparation.md)")


@dataclass
class PrepareConfig(Config):
    """The settings of scripts/prepare_data.py."""

    raw: str = setting("", "folder of raw videos, searched with all its folders")
    out: str = setting("", "folder of the training set; what is known of files and clips lies in its folder .work")
    steps: str = setting("", f"what to do, separated by spaces or commas: {' '.join(STEPS)}; empty for all")
    workers: int = setting(0, "processes that share the work; 0 for one per core", low=0, high=1024)
    table: str = setting("", "csv with path (in raw), and any of kind, person, start, end, x0, y0, x1, y1; empty for none")
    kind: str = setting("speech", "of clips whose kind neither the table nor a folder nor the classifier tells", choices=KINDS)
    classifier: str = setting("", "module:function that takes path, start and end of a clip and gives its kind; empty for none")
    person_folders: bool = setting(False, "the first folder below raw that is not named like a kind is named after the person")
    public: PublicConfig = field(default_factory=PublicConfig)
    cuts: CutConfig = field(default_factory=CutConfig)
    clip: ClipConfig = field(default_factory=ClipConfig)
    voice: VoiceConfig = field(default_factory=VoiceConfig)
    faces: FaceConfig = field(default_factory=FaceConfig)
    scores: ScoreConfig = field(default_factory=ScoreConfig)
    filters: FilterConfig = field(default_factory=FilterConfig)
    split: SplitConfig = field(default_factory=SplitConfig)

    def check(self) -> None:
        """Raise ValueError if a step is not known, a folder is not given, or settings contradict each other."""
        if unknown := [step for step in self.wanted() if step not in STEPS]:
            raise ValueError(f"there is no step {unknown[0]!r}; the steps are {' '.join(STEPS)}")
        if self.public.name and not self.public.path:
            raise ValueError(f"public.name={self.public.name} needs public.path, where its published annotations are")
        if self.cuts.max_seconds < 2 * self.cuts.min_seconds:
            raise ValueError(f"cuts.max_seconds must be at least twice cuts.min_seconds, so that a long stretch can be divided; got "
                             f"{self.cuts.max_seconds:g} and {self.cuts.min_seconds:g}")
        bucket_sizes(self.clip.buckets)
        self.voice.check()

    def check_folders(self) -> None:
        """Raise ValueError unless the folders that the wanted steps need are named and there."""
        if not self.out:
            raise ValueError("out is not given; set out=FOLDER, where the training set goes")
        if set(self.wanted()) & set(NEED_RAW) and not Path(self.raw or "?").is_dir():
            raise ValueError(f"raw must be a folder of videos, got {self.raw!r}; set raw=FOLDER" if self.raw else
                             "raw is not given; set raw=FOLDER, the folder of videos")

    def wanted(self) -> list[str]:
        """The steps to run, in their order."""
        named = self.steps.replace(",", " ").split()
        return sorted(set(named), key=lambda step: STEPS.index(step) if step in STEPS else -1) if named else list(STEPS)
