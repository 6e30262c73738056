"""Measures talking videos, and repeats the tables of papers: from weights to a table with published rows beside it.

    python scripts/evaluate.py configs/evaluation/TABLE.yaml [STEP ...] generated=DIR reference=DIR out=DIR [key=value ...]

Steps, in their order; only evaluate if none is named:
    cases      the cases of a test set, cut out of the videos in data, go to reference
    generate   the videos of every variant, case and seed go to OUT/videos
    evaluate   OUT/table.csv, table.md, table.tex, values.csv, problems.csv and report.html
    study      OUT/study, blind pages for a user study; with answers=DIR their preferences in percent

A run that was stopped goes on where it was: videos that are there are not made again, nor are the features of videos that were seen.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from stableavatar.command_line import run_program  # noqa: E402
from stableavatar.evaluation.settings import EvaluateConfig  # noqa: E402


def run(config: EvaluateConfig) -> int:
    """Exit code: 0, or 1 if something could not be made and the same command has to be run again."""
    try:
        from stableavatar.evaluation import run as walk
    except ModuleNotFoundError as error:
        raise ValueError(f"evaluation needs {error.name}, which is not installed; run bash scripts/setup.sh evaluation") from None
    return walk.run(config)


def main(argv: list[str]) -> int:
    """Exit code: that of `run`; 2 for a mistake to mend, 130 interrupted."""
    return run_program(__doc__, EvaluateConfig, run, argv, bare="steps")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
