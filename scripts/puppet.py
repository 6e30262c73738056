"""The puppet world: its training set, the components of its small model, the finished pipeline folder, the measuring of it.

    python scripts/puppet.py COMMAND [CONFIG.yaml] [key=value ...]      COMMAND --help tells its settings

    world      draws a training set in the project's layout
    vae        trains the small video VAE
    speech     trains the small wav2vec2
    observer   trains what evaluation sees with
    assemble   puts the components together into one pipeline folder
    examples   draws the cases of examples/
    evaluate   measures a model on unseen faces, voices and sentences
    ablate     repeats an ablation of the paper in miniature
"""

import sys
from importlib import import_module
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from stableavatar.command_line import run_program  # noqa: E402

COMMANDS = {
    "world": ("world", "WorldConfig", "write_world"),
    "vae": ("train_vae", "VAEConfig", "train_vae"),
    "speech": ("speech_recipe", "SpeechConfig", "train_speech"),
    "observer": ("observer_recipe", "ObserverConfig", "train_observer"),
    "assemble": ("assemble", "AssembleConfig", "assemble"),
    "examples": ("examples", "ExamplesConfig", "write_examples"),
    "evaluate": ("evaluation", "EvaluateConfig", "evaluate"),
    "ablate": ("ablations", "AblateConfig", "ablate"),
}
"""Name -> module of the puppet world, class of its settings, function that takes them."""


def main(argv: list[str]) -> int:
    """The exit code."""
    if not argv or argv[0] in ("-h", "--help"):
        print(__doc__)
        return 0 if argv else 2
    if argv[0] not in COMMANDS:
        print(f"error: {argv[0]!r} is no command; expected one of {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    name, config, function = COMMANDS[argv[0]]
    try:
        module = import_module(f"stableavatar.puppet.{name}")
    except ModuleNotFoundError as error:
        print(f"error: {argv[0]} needs {error.name}, which is not installed; run bash scripts/setup.sh dev", file=sys.stderr)
        return 2

    def run(settings: object) -> int:
        getattr(module, function)(settings)
        return 0

    return run_program(getattr(module, function).__doc__.splitlines()[0], getattr(module, config), run, argv[1:])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
