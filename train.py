"""A folder of talking videos becomes a checkpoint: training, fine-tuning and LoRA; on several GPUs through `accelerate launch`.

python train.py configs/train/NAME.yaml [key=value ...]
"""

import logging
import sys

from stableavatar.command_line import run_program
from stableavatar.training.config import TrainConfig


def run(config: TrainConfig) -> int:
    """Exit code: 0 for a run that is finished, or saved and stopped by a signal; 1 for one whose loss is not finite."""
    from stableavatar.training.trainer import Trainer

    try:
        Trainer(config).run()
    except FloatingPointError as error:
        logging.getLogger("stableavatar").error("error: %s", error)
        return 1
    return 0


def main(argv: list[str]) -> int:
    """Exit code: that of `run`; 2 for a mistake to mend, 130 interrupted."""
    return run_program(__doc__, TrainConfig, run, argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
