"""Draws docs/puppet_demo.jpg: frames of the example cases' videos, as inference.py made them, beside their portraits.

    python inference.py configs/inference/puppet.yaml cases=examples/cases.yaml
    python docs/make_demo_frames.py
"""

from itertools import islice
from pathlib import Path

from PIL import Image

from stableavatar.config import read_yaml
from stableavatar.evaluation.samples import Still, open_video
from stableavatar.sheets import fit_cell, grid

ROOT = Path(__file__).resolve().parents[1]
SIDE = 128
"""Pixels of a cell."""
FIRST, EVERY, FRAMES = 25, 4, 8
"""Every fourth frame, eight of them, from the second second on."""


def main() -> None:
    cells = []
    for case in read_yaml(ROOT / "examples/cases.yaml", list):
        frames = islice(open_video(ROOT / case["output"]).read(), FIRST, FIRST + EVERY * FRAMES, EVERY)
        cells += [fit_cell(picture, SIDE, SIDE) for picture in (*Still(ROOT / case["reference"]).read(), *frames)]
    Image.fromarray(grid(cells, FRAMES + 1)).save(ROOT / "docs/puppet_demo.jpg", quality=90)


if __name__ == "__main__":
    main()
