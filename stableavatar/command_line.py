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
        line = f"error: {message}; see --help\n"
        self.exit(2, line if _first_to_say(line) else None)


def parse(description: str, config: type[C], argv: Sequence[str], bare: str = "") -> argparse.Namespace:
    """The words of the command line: `config` (path or None), `words` (key=value) and `verbose`.

    Args:
        bare: the setting that takes the words without =; only one that ends in .yaml is then a file of settings. Empty: there is none.
    """
    listing = "settings, written key=value on the command line or key: value in the YAML:\n" + help_text(config())
    named = f" [{bare.upper()} ...]" if bare else ""
    parser = Parser(description=description, epilog=listing, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
                    usage=f"python %(prog)s [CONFIG.yaml]{named} [key=value ...] [--verbose]")
    parser.add_argument("words", nargs="*", metavar="CONFIG.yaml | key=value", help="settings of a YAML, then single ones")
    parser.add_argument("--verbose", action="store_true", help="debug messages, and where an error came from")
    args = parser.parse_intermixed_args(argv)
    first = args.words[0] if args.words else "="
    args.config = args.words.pop(0) if "=" not in first and (not bare or first.endswith((".yaml", ".yml"))) else None
    if bare and (loose := [word for word in args.words if "=" not in word]):
        args.words = [word for word in args.words if "=" in word] + [f"{bare}={' '.join(loose)}"]
    return args


def _first_to_say(line: str) -> bool:
    """Whether a line is this process's to say: of those that a launcher starts together, one says what all of them find."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return True
    from stableavatar.parallel.launch import first_to_say

    return first_to_say(line)


def set_up_logging(verbose: bool) -> None:
    """Messages go to stdout, errors alone to stderr; of processes that work together the first alone has messages, unless `verbose`."""
    messages, errors = logging.StreamHandler(sys.stdout), logging.StreamHandler(sys.stderr)
    others = logging.ERROR if int(os.environ.get("RANK", 0)) and not verbose else logging.NOTSET
    messages.addFilter(lambda entry: others <= entry.levelno < logging.ERROR)
    errors.setLevel(logging.ERROR)
    errors.addFilter(lambda entry: _first_to_say(entry.getMessage()))
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[messages, errors])
    logging.captureWarnings(True)
    if not verbose:  # The libraries' remarks on how they load; what matters to a user is checked and said by us.
        os.environ |= {"DIFFUSERS_VERBOSITY": "error", "TRANSFORMERS_VERBOSITY": "error"}
    logging.getLogger("stableavatar").setLevel(logging.DEBUG if verbose else logging.INFO)


def run_program(description: str, config: type[C], run: Callable[[C], int], argv: Sequence[str], bare: str = "") -> int:
    """Loads the settings and runs the program.

    Args:
        run: takes the settings and gives the exit code; it imports what is slow, so that --help and a misspelt key need not wait.
        bare: the setting that takes the words without =, if there is one.

    Returns:
        what `run` returns; 2 for a mistake to mend (one line on stderr), 130 for an interruption.
    """
    args = parse(description, config, argv, bare)
    set_up_logging(args.verbose)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # A polite kill cleans up as Ctrl-C does.
    try:
        try:
            return run(load_config(config, args.config, args.words))
        except (ValueError, OSError) as error:
            logger.error("error: %s", " ".join(str(error).split()))
            logger.debug("where it happened", exc_info=True)
            return 2
    except KeyboardInterrupt:  # also while another process says what this one had to say
        return 130
