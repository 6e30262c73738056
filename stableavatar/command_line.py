"""The face of every program with settings: `python PROGRAM.py [CONFIG.yaml] [key=value ...] [--verbose]`, one line for a mistake."""

import argparse
import logging
import os
import signal
import sys
from collections.abc import Callable, Sequence

from stableavatar.config import C, help_text, load_config

logger = logging.getLogger(__name__)


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line, without the usage."""

    def error(self, message: str) -> None:
        self.exit(2, f"error: {message}; see --help\n")


def parse(description: str, config: type[C], argv: Sequence[str]) -> argparse.Namespace:
    """The words of the command line: `config` (path or None), `words` (key=value) and `verbose`."""
    listing = "settings, written key=value on the command line or key: value in the YAML:\n" + help_text(config())
    parser = Parser(description=description, epilog=listing, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
                    usage="python %(prog)s [CONFIG.yaml] [key=value ...] [--verbose]")
    parser.add_argument("words", nargs="*", metavar="CONFIG.yaml | key=value", help="settings of a YAML, then single ones")
    parser.add_argument("--verbose", action="store_true", help="debug messages, and where an error came from")
    args = parser.parse_intermixed_args(argv)
    args.config = args.words.pop(0) if args.words and "=" not in args.words[0] else None
    return args


def set_up_logging(verbose: bool) -> None:
    """Messages go to stdout, errors alone to stderr."""
    messages, errors = logging.StreamHandler(sys.stdout), logging.StreamHandler(sys.stderr)
    messages.addFilter(lambda entry: entry.levelno < logging.ERROR)
    errors.setLevel(logging.ERROR)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[messages, errors])
    logging.captureWarnings(True)
    if not verbose:  # The libraries' remarks on how they load; what matters to a user is checked and said by us.
        os.environ |= {"DIFFUSERS_VERBOSITY": "error", "TRANSFORMERS_VERBOSITY": "error"}
    logging.getLogger("stableavatar").setLevel(logging.DEBUG if verbose else logging.INFO)


def run_program(description: str, config: type[C], run: Callable[[C], int], argv: Sequence[str]) -> int:
    """Loads the settings and runs the program.

    Args:
        run: takes the settings and gives the exit code; it imports what is slow, so that --help and a misspelt key need not wait.

    Returns:
        what `run` returns; 2 for a mistake to mend (one line on stderr), 130 for an interruption.
    """
    args = parse(description, config, argv)
    set_up_logging(args.verbose)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # A polite kill cleans up as Ctrl-C does.
    try:
        return run(load_config(config, args.config, args.words))
    except (ValueError, OSError) as error:
        logger.error("error: %s", " ".join(str(error).split()))
        logger.debug("where it happened", exc_info=True)
        return 2
    except KeyboardInterrupt:
        return 130
