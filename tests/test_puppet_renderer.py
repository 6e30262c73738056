"""The puppet's person, movement and pictures."""

from dataclasses import replace

import numpy as np
import pytest

from stableavatar.puppet.face import OPENING, Pose, lip_curves
from stableavatar.puppet.identity import BACKGROUNDS, FRAMINGS, STYLES, draw_identity
from stableavatar.puppet.motion import Motion, draw_motion
from stableavatar.puppet.renderer import render

SIZE = (128, 128)
REST = ("brow", "gaze_x", "gaze_y", "head_x", "head_y", "roll", "yaw", "sway", "blink")


def still(apertures=(0.0,), width: float = 0.5, **fixed: float) -> Motion:
    """A motion whose mouth opens as told while everything else stays where `fixed` says, at rest by default."""
    frames = len(apertures)
    rest = {name: np.full(frames, fixed.get(name, 0), np.float32) for name in (*REST, "left_hand", "right_hand")}
    return Motion(aperture=np.array(apertures, np.float32), width=np.full(frames, width, np.float32), **rest)


def heights(mask: np.ndarray) -> int:
    return int(mask.any(axis=1).sum())


def test_a_seed_is_a_person():
    assert draw_identity(3) == draw_identity(3)
    first, again = (render(draw_identity(3), still(), 0, SIZE) for _ in range(2))
    assert np.array_equal(first.pixels, again.pixels)
    assert not np.array_equal(first.pixels, render(draw_identity(4), still(), 0, SIZE).pixels)
    codes = np.stack([draw_identity(seed).code() for seed in range(50)])
    assert codes.dtype == np.float32 and len(np.unique(codes, axis=0)) == 50 and 0 <= codes.min() and codes.max() < 2


def test_a_given_style_or_framing_changes_nothing_else():
    drawn = draw_identity(7)
    assert replace(draw_identity(7, style="cartoon", framing="half"), style=drawn.style, framing=drawn.framing) == drawn


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("framing", FRAMINGS)
@pytest.mark.parametrize("size", [(128, 128), (96, 160), (160, 96), (512, 512)], ids=str)
def test_every_picture_has_a_face_with_lips_in_it(style, framing, size):
    motion = draw_motion(0, np.linspace(0, 1, 3), np.full(3, 0.5))
    for seed in range(3):
        seen = render(draw_identity(seed, style, framing), motion, 2, size)
        assert seen.pixels.shape == (size[1], size[0], 3) and seen.pixels.dtype == np.uint8
        assert seen.face.shape == seen.lips.shape == (size[1], size[0]) and set(np.unique(seen.lips)) == {0, 255}
        assert not (seen.lips & ~seen.face).any() and 4 * (seen.lips > 0).sum() < (seen.face > 0).sum()


@pytest.mark.parametrize("background", BACKGROUNDS)
def test_the_background_stands_still(background):
    identity = replace(draw_identity(2), background=background, framing="bust", hair_style="short")
    motion = draw_motion(1, np.linspace(0, 1, 40), np.full(40, 0.5), "dancing")
    frames = np.stack([render(identity, motion, frame, SIZE).pixels for frame in range(40)])
    edge = np.concatenate([frames[:, :, :12], frames[:, :, -12:]], axis=2)[:, :64]
    assert (edge == edge[0]).all() and (frames != frames[0]).any()


@pytest.mark.parametrize("framing", FRAMINGS)
def test_lips_part_with_the_aperture(framing):
    identity, motion = draw_identity(5, framing=framing), still(np.linspace(0, 1, 11))
    tall = [heights(render(identity, motion, frame, SIZE).lips) for frame in range(11)]
    assert tall == sorted(tall) and tall[-1] - tall[0] >= {"close": 11, "bust": 7, "half": 5}[framing]


def test_the_gap_between_the_lips_is_linear_in_the_aperture():
    identity = draw_identity(5)
    gaps = [float(np.diff([edge[9, 1] for edge in lip_curves(identity, Pose(a, 0.5, 0, 0, 0, 0, 0))[1:3]])[0]) for a in (0, 0.25, 0.5, 1)]
    assert np.allclose(gaps, np.array([0, 0.25, 0.5, 1]) * OPENING)


def test_small_openings_show_in_the_pixels():
    """Antialiasing: an opening of a fortieth (0.3 pixels) changes the mouth, and ever more so."""
    identity, motion = draw_identity(5, framing="close"), still((0, 0.025, 0.05, 0.075))
    frames = [render(identity, motion, frame, SIZE).pixels.astype(float) for frame in range(4)]
    changes = [np.abs(frame - frames[0]).sum() for frame in frames]
    assert 0 == changes[0] < changes[1] < changes[2] < changes[3]


def test_a_wide_mouth_is_wider():
    round_, spread = (render(draw_identity(5), still(width=width), 0, SIZE).lips.any(axis=0).sum() for width in (0, 1))
    assert 1.4 < spread / round_ < 2


def test_lids_close_over_the_eyes():
    """White of the eye is gone; everything but the eyes stays."""
    identity = replace(draw_identity(5, "puppet", "close"), glasses="none")
    opened, closed = (render(identity, still(blink=blink), 0, SIZE).pixels.astype(int) for blink in (0, 1))
    changed = np.abs(opened - closed).max(axis=2) > 40
    rows = np.flatnonzero(changed.any(axis=1))
    assert changed.sum() > 80 and rows.min() > 40 and rows.max() < 80


def test_prompts_say_what_is_seen():
    for seed in range(40):
        identity = draw_identity(seed)
        prompt = identity.prompt("singing")
        bare = render(replace(identity, glasses="none"), still(), 0, SIZE).pixels
        drawn = not np.array_equal(bare, render(identity, still(), 0, SIZE).pixels)
        assert drawn == ("glasses" in prompt) and "singing" in prompt and ("cartoon" in prompt) == (identity.style == "cartoon")
    with pytest.raises(ValueError, match="'shouting'"):
        identity.prompt("shouting")


@pytest.mark.parametrize("kind", ["speech", "singing", "dancing"])
def test_motion_starts_at_rest_and_is_smooth(kind):
    for seed in range(10):
        motion = draw_motion(seed, np.zeros(500), np.full(500, 0.5), kind)
        tracks = {name: getattr(motion, name) for name in REST}
        assert all(track.dtype == np.float32 and abs(track[0]) < 1e-6 for track in tracks.values())
        assert max(np.abs(np.diff(track)).max() for name, track in tracks.items() if name != "blink") < 0.13
        assert np.abs(np.diff(motion.head_x)).max() < 0.03 and np.abs(motion.roll).max() < 0.25
    calm = draw_motion(0, np.zeros(500), np.full(500, 0.5)).sway.std()
    assert kind == "speech" or draw_motion(0, np.zeros(500), np.full(500, 0.5), kind).sway.std() > 1.5 * calm


def test_only_the_mouth_listens():
    silent, loud = (vars(draw_motion(3, np.full(200, level), np.full(200, 0.5))) for level in (0, 1))
    assert [name for name in silent if not np.array_equal(silent[name], loud[name])] == ["aperture"]


def test_blinks_are_as_frequent_and_short_as_ours():
    blinks = [draw_motion(seed, np.zeros(1500), np.zeros(1500)).blink for seed in range(10)]
    counts = [int((np.diff((blink > 0.5).astype(int)) == 1).sum()) for blink in blinks]
    assert 14 <= np.mean(counts) <= 21 and all(blink.max() > 0.9 for blink in blinks)
    assert np.mean([blink > 0 for blink in blinks]) < 0.1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: draw_identity(0, style="oil"), "style is 'oil'"),
        (lambda: draw_identity(0, framing="wide"), "framing is 'wide'"),
        (lambda: draw_motion(0, np.zeros(3), np.zeros(4)), r"\(3,\) and width \(4,\)"),
        (lambda: draw_motion(0, np.zeros(3), np.zeros(3), "shouting"), "kind is 'shouting'"),
        (lambda: render(draw_identity(0), still(), 1, SIZE), "frame is 1"),
        (lambda: render(draw_identity(0), still(), 0, (16, 128)), "size is 16x128"),
    ],
)
def test_wrong_requests_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
