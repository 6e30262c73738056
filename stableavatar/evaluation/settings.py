"""Every setting of scripts/evaluate.py: an experiment is a YAML of them (configs/evaluation)."""

import re
from dataclasses import dataclass, field

from stableavatar.config import Config, setting, split_word
from stableavatar.evaluation.weights import WeightPaths

STEPS = ("cases", "generate", "evaluate", "study")
"""In the order in which they run; each reads what those before it wrote."""
GIVEN = "?"
"""Value of `transformer` of a variant whose weights are trained differently and have to be named in `transformers`."""
RANGE = re.compile(r"(\d+)-(\d+)")


@dataclass
class EvaluateConfig(Config):
    """The settings of scripts/evaluate.py."""

    steps: str = setting("evaluate", f"what to do, separated by spaces or commas: {' '.join(STEPS)}")
    title: str = setting("Evaluation", "heading of the table and of the report")
    about: str = setting("", "a sentence or two on what is compared")
    out: str = setting("", "folder of the results; videos that are generated go to its folder videos")
    generated: str = setting("", "folder of the videos to measure: NAME.mp4, or VARIANT/NAME.mp4; empty: those of out")
    reference: str = setting("", "folder of the cases: NAME.mp4 (the true video), NAME.png (the portrait), NAME.wav (the voice), NAME.txt; "
                             "the step cases writes it; empty: the videos are measured without")
    set: str = setting("", "the test set, a YAML of configs/evaluation/sets")
    set_settings: str = setting("", "other settings of the set, KEY=VALUE words separated by spaces, such as 'count=20 seed=1'")
    data: str = setting("", "folder that the set's raw videos were downloaded to, for the step cases")
    limit: int = setting(0, "so many cases, the first of them by name; 0 for all", low=0)

    metrics: str = setting("fid,fvd,csim,sync_c,sync_d,iqa,ase", "columns of the table, separated by commas (docs/metrics.md)")
    ranges: str = setting("", "stretches of every video to measure apart, FIRST-LAST in frames counted from 1, separated by commas: rows A "
                          "and B of table 4, points of figure 2; empty for whole videos")
    published: str = setting("", "published rows to show, YAMLs of configs/evaluation/published, separated by commas")
    resamples: int = setting(50, "of the cases, for the interval of a figure of a whole set; each costs seconds of FID", low=2)
    least_frames: int = setting(16, "videos with fewer frames are left out and counted", low=1)

    variants: str = setting("", "lines 'NAME: KEY=VALUE KEY=VALUE ...' of settings of inference.py: the rows that are generated; "
                            f"transformer={GIVEN} stands for weights that transformers names")
    compared_with: str = setting("", "the variant that the others are compared with, case by case; empty for the last")
    seeds: str = setting("42", "of the noise, separated by commas; a case counts with the mean of its seeds")
    inference: str = setting("configs/inference/wan_1.3b_square.yaml", "settings of inference.py that all variants share, a YAML")
    settings: str = setting("", "more of them, KEY=VALUE words separated by spaces, such as 'steps=30 fps=30'")
    model: str = setting("", "folder of a pipeline; empty for what the YAML of inference names")
    checkpoints: str = setting("", "folder of the released files; empty for what the YAML of inference names")
    transformers: str = setting("", "VARIANT=FILE, separated by commas: weights of variants that were trained differently (a file, or a "
                                "folder transformer/ of a run of train.py); a variant that needs them and has none is absent")

    study_of: str = setting("", "the variant that the study compares with each other one; empty for compared_with")
    study_videos: int = setting(30, "cases of the study", low=1)
    study_seed: int = setting(0, "of the study's order and sides", low=0)
    answers: str = setting("", "folder of the participants' answers: the step study counts them instead of writing the page")
    key: str = setting("", "study_key.json of the study that the answers are to; empty for that in out")
    looks: bool = setting(True, "write a side-by-side video of every case, linked from the report")

    device: str = setting("auto", "of the networks that measure and generate: auto, cpu, cuda, cuda:1, ...")
    batch: int = setting(16, "pictures that a network sees at a time", low=1)
    workers: int = setting(0, "processes that measure; 0 for one per core, or one on a GPU", low=0, high=1024)
    cache: str = setting("", "folder of the networks' features, by content; empty for the folder features in out")
    weights: WeightPaths = field(default_factory=WeightPaths)

    def check(self) -> None:
        """Raise ValueError if a step, a variant, a seed or a range is not as it should be: before hours are spent."""
        self.wanted()
        names = [variant.name for variant in self.rows()]
        for key in ("compared_with", "study_of"):
            if names and getattr(self, key) not in ("", *names):
                raise ValueError(f"{key} must be one of {', '.join(names)}, got {getattr(self, key)!r}")
        if wrong := sorted(self.trained().keys() - {variant.name for variant in self.rows() if variant.needs_weights}):
            raise ValueError(f"transformers names {', '.join(wrong)}; expected variants with transformer={GIVEN}")
        self.noises()
        self.stretches()

    def wanted(self) -> list[str]:
        """The steps to run, in their order. Raises ValueError for one that there is not."""
        named = words(self.steps.replace(" ", ","))
        if unknown := [step for step in named if step not in STEPS] or not named:
            raise ValueError(f"there is no step {unknown[0]!r}" if named else f"no step is named; the steps are {' '.join(STEPS)}")
        return sorted(set(named), key=STEPS.index)

    def rows(self) -> list["Variant"]:
        """The variants, as `variants` lists them. Raises ValueError for a line or word that is none, or a name that comes twice."""
        found = [_parse_variant(line) for line in self.variants.splitlines() if line.strip()]
        names = [variant.name for variant in found]
        if len(set(names)) < len(names):
            raise ValueError(f"variants must have different names, got {', '.join(names)}")
        return found

    def noises(self) -> list[int]:
        """The seeds. Raises ValueError for anything but different whole numbers."""
        named = words(self.seeds)
        if not named or not all(word.isdecimal() for word in named) or len(set(named)) < len(named):
            raise ValueError(f"seeds must be different whole numbers, separated by commas; got {self.seeds!r}")
        return [int(word) for word in named]

    def stretches(self) -> list[tuple[int, int] | None]:
        """The stretches [first, stop) to measure, counted from 0; [None] for whole videos. Raises ValueError for what is none."""
        return [parse_range(word) for word in words(self.ranges)] or [None]

    def trained(self) -> dict[str, str]:
        """Variant -> its own weights. Raises ValueError unless they are written VARIANT=FILE."""
        return dict(split_word(word) for word in words(self.transformers))


@dataclass(frozen=True)
class Variant:
    """A row that is generated: its name, which is also a folder, and its own settings of inference.py."""

    name: str
    settings: dict[str, str]

    @property
    def needs_weights(self) -> bool:
        """Whether its weights are trained differently and have to be given."""
        return self.settings.get("transformer") == GIVEN


def words(text: str) -> list[str]:
    """What commas separate, without what is empty."""
    return [word.strip() for word in text.split(",") if word.strip()]


def _parse_variant(line: str) -> Variant:
    name, colon, rest = line.partition(":")
    if not colon or not re.fullmatch(r"\w[\w.-]*", name.strip()):
        raise ValueError(f"variants has lines 'NAME: KEY=VALUE ...', got {line.strip()!r}")
    return Variant(name.strip(), dict(map(split_word, rest.split())))


def parse_range(word: str) -> tuple[int, int]:
    """`1-200` -> (0, 200): frames [first, stop) counted from 0. Raises ValueError for anything else."""
    found = RANGE.fullmatch(word)
    if not found or not 0 < int(found[1]) <= int(found[2]):
        raise ValueError(f"ranges are written FIRST-LAST in frames counted from 1, such as 1-200, got {word!r}")
    return int(found[1]) - 1, int(found[2])
