"""Writes the sound of videos as 16 kHz mono wav, in step with the first picture: what training and inference hear.

    python scripts/extract_audio.py --video_path=video.mp4 --saved_audio_path=audio.wav
    python scripts/extract_audio.py PATH [PATH ...]

The arguments of the first form are those of the released audio_extractor.py. PATH is a video (its sound goes to NAME.wav next to it) or a
folder: every sub_clip.mp4 anywhere below it gets its audio.wav. What is there already is passed over, unless --redo is given.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from stableavatar.command_line import Parser  # noqa: E402
from stableavatar.data.clips import SOUND, VIDEO, one_line  # noqa: E402
from stableavatar.data.preparation.cutting import extract_sound  # noqa: E402


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """`paths`, and what the released tool takes."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("paths", nargs="*", type=Path, metavar="PATH", help="a video, or a folder of clip folders")
    parser.add_argument("--video_path", type=Path, metavar="VIDEO", help="one video")
    parser.add_argument("--saved_audio_path", type=Path, metavar="WAV", help="the file to write; its folder is made")
    parser.add_argument("--redo", action="store_true", help="write sound anew where there is some")
    args = parser.parse_args(argv)
    if bool(args.paths) == bool(args.video_path) or bool(args.video_path) != bool(args.saved_audio_path):
        parser.error("give one or more paths, or --video_path with --saved_audio_path")
    return args


def targets(path: Path) -> list[tuple[Path, Path]]:
    """(video, wav) of all that a path means; ValueError where it means nothing."""
    if not path.is_dir():
        return [(path, path.with_name(SOUND) if path.name == VIDEO else path.with_suffix(".wav"))]
    videos = sorted(path.rglob(VIDEO))
    if not videos:
        raise ValueError(f"no {VIDEO} in {path} or below it; give a video or a folder of clip folders")
    return [(video, video.with_name(SOUND)) for video in videos]


def main(argv: Sequence[str]) -> int:
    """Exit code: 0, or 2 if there was a mistake or a file failed (one line each)."""
    args, failed = parse(argv), 0
    try:
        files = [(args.video_path, args.saved_audio_path)] if args.video_path else [pair for path in args.paths for pair in targets(path)]
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    bar = tqdm(files, "sound", delay=2)
    for video, wav in bar:
        try:
            if wav.exists() and not (args.redo or args.video_path):
                bar.write(f"{wav} is there")
                continue
            wav.parent.mkdir(parents=True, exist_ok=True)
            extract_sound(video, wav)
            bar.write(f"wrote {wav}")
        except (ValueError, OSError) as error:
            failed += 1
            bar.write(f"error: {one_line(error)}", file=sys.stderr)
    return 2 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
