"""torchrun with the manners of the programs that it starts: what they say is not followed by a report, and their exit code is its own.

    python scripts/launch.py --nproc_per_node=8 inference.py configs/inference/NAME.yaml ... parallel.ulysses=8

Its flags are torchrun's (`--help` lists them): --nnodes, --node_rank, --master_addr and --master_port for several machines.
"""

import logging
import sys

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

MISTAKE, INTERRUPTED = 2, 130


def main(argv: list[str]) -> int:
    """Exit code: 0 done, 130 interrupted, else that of the process that failed first; 1 where a signal ended it."""
    logging.disable(logging.CRITICAL)  # torchrun's own reports
    try:
        run.main(argv)
    except SignalException:
        return INTERRUPTED
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode not in (1, MISTAKE, INTERRUPTED):
            print(f"error: process {rank} ended with {failure.signal_name() or f'exit code {failure.exitcode}'}", file=sys.stderr)
        return failure.exitcode if failure.exitcode > 0 else 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
