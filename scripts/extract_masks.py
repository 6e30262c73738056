"""Face and lip masks of clips: face_masks/frame_i.png and lip_masks/frame_i.png, as training reads them.

    python scripts/extract_masks.py PATH [PATH ...] [key=value ...]
    python scripts/extract_masks.py --folder_root=talking_face_data/rec/singing --start=1 --end=500 [key=value ...]

PATH is a clip folder (it holds images/ or sub_clip.mp4), a folder with clip folders anywhere below it, a folder of frame_0.png,
frame_1.png, ..., or a video (its masks go into the folder NAME_masks next to it). The second form takes the clip folders 00001 to 00500
of --folder_root, as the released tool does. What has both kinds of masks is passed over. A clip that fails is named; the rest go on.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from stableavatar.command_line import Parser  # noqa: E402
from stableavatar.config import Config, help_text, load_config, setting  # noqa: E402
from stableavatar.data.clips import IMAGES, MASKS, VIDEO, frame_file, one_line  # noqa: E402
from stableavatar.data.preparation.masks import FaceConfig, write_masks  # noqa: E402
from stableavatar.data.preparation.pictures import Pictures, clip_pictures, image_pictures, video_pictures  # noqa: E402

Clip = tuple[Path, Callable[[], Pictures]]
"""The folder that gets the masks, and what opens its pictures."""


@dataclass
class MaskConfig(FaceConfig, Config):
    fps: float = setting(25.0, "pictures a second of clips that are only images/", low=1, high=240)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """`paths` and `settings`, and what the released tool takes."""
    listing = "settings:\n" + help_text(MaskConfig())
    parser = Parser(description=__doc__, epilog=listing, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("words", nargs="*", metavar="PATH | key=value", help="what to make masks of, and settings")
    parser.add_argument("--folder_root", type=Path, help="folder with the clip folders 00001, 00002, ...")
    parser.add_argument("--start", type=int, default=1, help="number of the first (default: %(default)s)")
    parser.add_argument("--end", type=int, help="number of the last")
    parser.add_argument("--redo", action="store_true", help="make masks anew where there are some")
    args = parser.parse_intermixed_args(argv)
    args.paths = [Path(word) for word in args.words if "=" not in word or Path(word).exists()]
    args.settings = [word for word in args.words if Path(word) not in args.paths]
    if (args.folder_root is None) == (not args.paths) or (args.folder_root is None) != (args.end is None):
        parser.error("give one or more paths, or --folder_root with --end")
    return args


def clips_in(path: Path, fps: float) -> list[Clip]:
    """The clips that a path means; ValueError where it means none."""
    if path.is_file():
        return [(path.parent if path.name == VIDEO else path.with_name(f"{path.stem}_masks"), partial(video_pictures, path))]
    if frame_file(path, 0).is_file():
        return [(path.parent if path.name == IMAGES else path, partial(image_pictures, path, fps))]
    folders = sorted({found.parent for pattern in (VIDEO, IMAGES) for found in path.rglob(pattern)})
    if not folders:
        raise ValueError(f"no clip in {path}: expected a video, or a folder with {IMAGES}/ or {VIDEO} in it or below it")
    return [(folder, partial(clip_pictures, folder, fps)) for folder in folders]


def numbered(root: Path, start: int, end: int, fps: float) -> list[Clip]:
    """The clip folders of these numbers that are there; ValueError where none is."""
    folders = [root / f"{number:05d}" for number in range(start, end + 1)]
    if not any(folder.is_dir() for folder in folders):
        raise ValueError(f"none of the clip folders {start:05d} to {end:05d} is in {root}")
    return [(folder, partial(clip_pictures, folder, fps)) for folder in folders if folder.is_dir()]


def summary(values: dict) -> str:
    """What a clip's values say, in one line."""
    empty = ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in values["missing"])
    lost = f"{values['missing_share']:.1%} without a face" + (f" (frames {empty})" if empty else "")
    return f"{values['frames']} frames, {values['masked_faces']} masked faces, {lost}, {values['filled_share']:.1%} filled in"


def main(argv: Sequence[str]) -> int:
    """Exit code: 0, or 2 if there was a mistake or a clip failed (one line each)."""
    args, failed = parse(argv), 0
    try:
        config = load_config(MaskConfig, None, args.settings)
        clips = [clip for path in args.paths for clip in clips_in(path, config.fps)]
        if args.folder_root is not None:
            clips = numbered(args.folder_root, args.start, args.end, config.fps)
    except (ValueError, OSError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    bar = tqdm(clips, "clips", delay=2, disable=len(clips) == 1)
    for folder, open_pictures in bar:
        if all((folder / name).is_dir() for name in MASKS) and not args.redo:
            bar.write(f"{folder}: has masks")
            continue
        try:
            bar.write(f"{folder}: {summary(write_masks(open_pictures(), folder, config, progress=len(clips) == 1))}")
        except (ValueError, OSError) as error:
            failed += 1
            bar.write(f"error: {folder}: {one_line(error)}", file=sys.stderr)
    return 2 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
