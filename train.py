"""A folder of talking videos becomes a checkpoint: training, fine-tuning and LoRA; on several GPUs through `accelerate launch`.

python train.py configs/train/NAME.yaml [key=value ...]
"""

import sys

from stableavatar.command_line import run_program
from stableavatar.training.config import TrainConfig


def run(config: TrainConfig) -> int:
    """Exit code: 0 for a run that is finished, or saved and stopped by SIGTERM."""
    from stableavatar.training.trainer import Trainer

    Trainer(config).run()
    return 0


def main(argv: list[str]) -> int:
    """Exit code: that of `run`; 2 for a mistake to mend, 130 interrupted."""
    return run_program(__doc__, TrainConfig, run, argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
