"""Draws docs/puppet_demo.jpg: frames of the example cases' videos, as inference.py made them, beside their portraits.

    python inference.py configs/inference/puppet.yaml cases=examples/cases.yaml
    python docs/make_demo_frames.py
"""

from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image

from stableavatar.config import read_yaml
from stableavatar.evaluation.samples import open_video
from stableavatar.sheets import fit_cell, grid

ROOT = Path(__file__).resolve().parents[1]
SIDE, EVERY, FRAMES = 128, 4, 8
"""Pixels of a cell; every fourth frame, eight of them, from the second second on."""
FIRST = 25


def main() -> None:
    cells = []
    for case in read_yaml(ROOT / "examples/cases.yaml", list):
        cells.append(fit_cell(np.asarray(Image.open(ROOT / case["reference"]).convert("RGB")), SIDE, SIDE))
        frames = islice(open_video(ROOT / case["output"]).read(), FIRST, FIRST + EVERY * FRAMES, EVERY)
        cells += [fit_cell(np.asarray(frame), SIDE, SIDE) for frame in frames]
    Image.fromarray(grid(cells, FRAMES + 1)).save(ROOT / "docs/puppet_demo.jpg", quality=90)


if __name__ == "__main__":
    main()
