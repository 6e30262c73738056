"""A portrait and a voice become a talking video.

python inference.py configs/inference/NAME.yaml reference=face.png audio=speech.wav prompt="..." output=out.mp4 [key=value ...]
torchrun --nproc_per_node=8 inference.py ... parallel.ulysses=4 parallel.windows=2      on several GPUs (see README.md)
"""

import sys

from stableavatar.command_line import run_program
from stableavatar.config import InferenceConfig


def run(config: InferenceConfig) -> int:
    """Exit code: 0 done, 1 some cases of a list failed."""
    from stableavatar import cases

    return cases.run(config)


def main(argv: list[str]) -> int:
    """Exit code: that of `run`; 2 for a mistake to mend, 130 interrupted."""
    return run_program(__doc__, InferenceConfig, run, argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
