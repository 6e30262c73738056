"""Encodes the training samples once: VAE latents, references, image and text tokens and speech features, into a folder of shards.

    python scripts/cache_latents.py configs/train/NAME.yaml data.cache=FOLDER data.runs=1 [key=value ...]
    accelerate launch --num_processes 8 scripts/cache_latents.py configs/train/NAME.yaml data.cache=FOLDER data.runs=1

train.py with the same settings then trains from the cache, without the encoders. A run that was stopped goes on where it was, and
more runs or clips are added to what is there.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from stableavatar.command_line import run_program  # noqa: E402
from stableavatar.training.config import TrainConfig  # noqa: E402


def run(config: TrainConfig) -> int:
    """The exit code."""
    from stableavatar.training.caching import write_cache  # Imports torch, which --help and a misspelt key need not wait for.

    write_cache(config)
    return 0


if __name__ == "__main__":
    sys.exit(run_program(__doc__, TrainConfig, run, sys.argv[1:]))
