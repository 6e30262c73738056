"""Writes the voice of an audio or video file, without music and noise, to a wav (44.1 kHz stereo).

    python scripts/separate_vocals.py --audio_separator_model_file=checkpoints/Kim_Vocal_2.onnx --audio_file_path=song.wav \
        --saved_vocal_path=vocal.wav

It needs the package audio-separator. The arguments are those of the released vocal_seperator.py.
"""

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from stableavatar.command_line import Parser  # noqa: E402
from stableavatar.data.clips import one_line  # noqa: E402
from stableavatar.data.vocals import separate_vocals  # noqa: E402


def arguments() -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--audio_separator_model_file", type=Path, required=True, metavar="MODEL", help="Kim_Vocal_2.onnx")
    parser.add_argument("--audio_file_path", type=Path, required=True, metavar="FILE", help="audio or video of any format")
    parser.add_argument("--saved_vocal_path", type=Path, required=True, metavar="WAV", help="the file to write; its folder is made")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto takes a GPU where there is one")
    return parser.parse_args()


def main() -> int:
    args = arguments()
    target = args.saved_vocal_path
    try:
        if target.suffix.lower() != ".wav":
            raise ValueError(f"--saved_vocal_path must end in .wav, got {target}")
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".vocals-") as scratch:
            voice = separate_vocals(args.audio_file_path, args.audio_separator_model_file, scratch, args.device)
            shutil.move(voice, target)
    except (ValueError, OSError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    print(f"wrote {target}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
