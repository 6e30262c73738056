"""Raw videos become a training set: clips of one shot, cropped around the head, with sound, masks, scores, lists and a report.

    python scripts/prepare_data.py [CONFIG.yaml] raw=FOLDER out=FOLDER [STEP ...] [key=value ...]

Steps, in their order; all of them if none is named:
    inventory   every file of raw that is a video with sound, and what is wrong with the others
    cuts        stretches of one shot that are neither black nor still
    crop        sub_clip.mp4 and audio.wav of every stretch, around the head, in OUT/{square,vec,rec,WxH}/{speech,singing,dancing}
    voice       the voice without music (if voice.separator is given), loudness, how much of it is speech
    masks       face_masks/ and lip_masks/
    scores      what the filters judge by
    manifest    manifest.parquet, lists for training, report.html, problems.txt

A run that was stopped goes on where it was; a step runs again for what its settings, or what it reads, have changed.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from stableavatar.command_line import run_program  # noqa: E402
from stableavatar.data.preparation.settings import PrepareConfig  # noqa: E402


def run(config: PrepareConfig) -> int:
    """Exit code: 0, or 1 if something could not be written and the same command has to be run again."""
    from stableavatar.data.preparation.steps import prepare

    return prepare(config)


def main(argv: list[str]) -> int:
    """Exit code: that of `run`; 2 for a mistake to mend, 130 interrupted."""
    return run_program(__doc__, PrepareConfig, run, argv, bare="steps")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
