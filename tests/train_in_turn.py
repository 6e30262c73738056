"""Several runs of train.py in the same processes: python train_in_turn.py '[[PORT, [WORD, ...]], ...]', under `accelerate launch`.

Starting processes takes longer than tiny runs do. Every run has a new group, at a port of its own.
"""

import importlib
import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import readings  # noqa: E402, F401
from accelerate.state import AcceleratorState, GradientState  # noqa: E402
from accelerate.utils import parse_flag_from_env  # noqa: E402

import train  # noqa: E402


def forget_group() -> None:
    """The libraries' memory of the group that has ended."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    if "deepspeed" in sys.modules:
        importlib.reload(sys.modules["deepspeed.utils.groups"])


def compile_nothing() -> None:
    """DeepSpeed would compile faster messages between the processes of a machine, which takes longer than all the runs."""
    from deepspeed import ops

    ops.__compatible_ops__["deepspeed_shm_comm"] = False


def main(orders: list[tuple[int, list[str]]]) -> int:
    """Exit code of the first run that fails, or 0."""
    if parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"):
        compile_nothing()
    for port, words in orders:
        os.environ |= {"MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "False"}
        if code := train.main(words):
            return code
        forget_group()
    return 0


if __name__ == "__main__":
    sys.exit(main(json.loads(sys.argv[1])))
