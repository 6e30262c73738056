"""A portrait and a voice become a talking video.

python inference.py configs/inference/NAME.yaml reference=face.png audio=speech.wav prompt="..." output=out.mp4 [key=value ...]
"""

import argparse
import logging
import os
import signal
import sys

from stableavatar.config import InferenceConfig, help_text, load_config


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line, without the usage."""

    def error(self, message: str) -> None:
        self.exit(2, f"error: {message}; see --help\n")


def parse(argv: list[str]) -> argparse.Namespace:
    """The words of the command line."""
    listing = "settings, written key=value on the command line or key: value in the YAML:\n" + help_text(InferenceConfig())
    parser = Parser(description=__doc__, epilog=listing, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
                    usage="python inference.py [CONFIG.yaml] [key=value ...] [--verbose]")
    parser.add_argument("words", nargs="*", metavar="CONFIG.yaml | key=value", help="settings of a YAML, then single ones")
    parser.add_argument("--verbose", action="store_true", help="debug messages, and where an error came from")
    args = parser.parse_args(argv)
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


def main(argv: list[str]) -> int:
    """Exit code: 0 done, 1 some cases of a list failed, 2 a mistake to mend, 130 interrupted."""
    args = parse(argv)
    set_up_logging(args.verbose)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # A polite kill cleans up as Ctrl-C does.
    try:
        config = load_config(InferenceConfig, args.config, args.words)
        from stableavatar.cases import run  # Imports torch, which --help and a misspelt key need not wait for.

        return run(config)
    except (ValueError, OSError) as error:
        logging.getLogger("stableavatar").error("error: %s", " ".join(str(error).split()))
        logging.getLogger("stableavatar").debug("where it happened", exc_info=True)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
