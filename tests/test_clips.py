import logging
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
from clip_files import HEIGHT, WIDTH, make_clip, pictures, rate, write_images, write_sound, write_video
from media_files import REAL, needs_real_input, run_ffmpeg, save

from stableavatar.data.clips import find_clips, probe, read_index, read_lists, write_index
from stableavatar.ffmpeg import probe_video

X264 = ("-c:v", "libx264", "-bf", "3", "-g", "24", "-pix_fmt", "yuv420p")


def count_decoded(path: Path, width: int, height: int) -> int:
    raw = run_ffmpeg("-i", str(path), "-map", "0:V:0", "-fps_mode", "passthrough", "-f", "rawvideo", "-pix_fmt", "gray", "-")
    return len(raw) // (width * height)


def test_lists_name_folders_in_three_ways(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    for folder in ("here/by cwd", "lists/by list", "else/absolute", "lists/both", "here/both"):
        (tmp_path / folder).mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    text = f"\ufeff# clips\n\nby cwd\r\n  by list \n{tmp_path / 'else/absolute'}\nboth\nnowhere\nby cwd/\n"
    (tmp_path / "lists/one.txt").write_text(text, encoding="utf-8")
    (tmp_path / "lists/two.txt").write_text("../else/absolute\nby list/../new\n")
    found = read_lists(f"{tmp_path}/lists/one.txt, ../lists/two.txt,")
    names = ["here/by cwd", "lists/by list", "else/absolute", "here/both", "here/nowhere", "here/new"]
    assert found == [tmp_path / name for name in names]
    assert "2 folders more than once" in caplog.text


@pytest.mark.parametrize(("lists", "words"), [(" ,", "no path list"), ("no.txt", "no.txt: No such"), ("empty.txt", "empty.txt names no"),
                                              ("a.png", "not UTF-8")])
def test_bad_lists_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lists: str, words: str) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty.txt").write_text("# nothing\n\n")
    save(Path("a.png"), np.zeros((8, 8, 3), np.uint8))
    with pytest.raises(ValueError, match=words) as error:
        read_lists(lists)
    assert "\n" not in str(error.value)


def test_prompts_follow_the_kind(tmp_path: Path) -> None:
    kinds = {
        "speech": "The protagonist is talking",
        "singing": "The protagonist is singing",
        "dancing": "The protagonist is simultaneously dancing and singing",
        "other": "The protagonist is talking",
    }
    first = make_clip(tmp_path / "speech" / "00001", 6, masks=False)
    for kind, prompt in kinds.items():
        if kind != "speech":
            shutil.copytree(first, tmp_path / kind / "00001")
        assert probe(tmp_path / kind / "00001", 25).prompt == prompt
    (first / "prompt.txt").write_text("  A man whispers.\n")
    assert probe(first, 25).prompt == "A man whispers."


def test_images_come_before_the_video_and_take_its_rate(tmp_path: Path) -> None:
    folder = make_clip(tmp_path / "a b é", 30)
    alone = probe(folder, 24)
    assert (alone.width, alone.height, alone.frames, alone.fps, alone.video) == (WIDTH, HEIGHT, 30, 24, None)
    assert (alone.sound, alone.samples, alone.masks) == ("audio.wav", 19_200, (True, True))
    write_video(folder / "sub_clip.mp4", pictures(30), "30000/1001")
    both = probe(folder, 24)
    assert both.video is None and both.fps == pytest.approx(30_000 / 1001)
    shutil.rmtree(folder / "images")
    (folder / "images").mkdir()
    video = probe(folder, 24)
    assert video.video is not None and video.frames == 30 and video.fps == both.fps


@pytest.mark.parametrize("fps", ["24000/1001", "24", "25", "30000/1001", "30", "50", "60"])
def test_frames_of_a_video_are_counted_without_decoding(tmp_path: Path, fps: str) -> None:
    write_video(tmp_path / "a.mp4", pictures(70), fps, *X264)
    stream = probe_video(tmp_path / "a.mp4")
    assert (stream.width, stream.height, stream.frames, stream.even) == (WIDTH, HEIGHT, 70, True)
    assert stream.fps == pytest.approx(rate(fps), rel=1e-9)


def test_cut_and_turned_and_uneven_videos(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", pictures(70), "25", *X264)
    run_ffmpeg("-ss", "1.2", "-i", str(tmp_path / "a.mp4"), "-c", "copy", str(tmp_path / "cut.mp4"))
    cut = probe_video(tmp_path / "cut.mp4")
    assert cut.frames == count_decoded(tmp_path / "cut.mp4", WIDTH, HEIGHT) == 40, "packets before the cut are not shown"
    run_ffmpeg("-display_rotation", "90", "-i", str(tmp_path / "a.mp4"), "-c", "copy", str(tmp_path / "turned.mp4"))
    turned = probe_video(tmp_path / "turned.mp4")
    assert (turned.width, turned.height) == (HEIGHT, WIDTH)
    drop = ["-vf", "select='not(eq(mod(n,7),3))'", "-fps_mode", "vfr"]
    run_ffmpeg("-i", str(tmp_path / "a.mp4"), *drop, str(tmp_path / "uneven.mp4"))
    uneven = probe_video(tmp_path / "uneven.mp4")
    assert (uneven.frames, uneven.fps, uneven.even) == (70, 25, False)


def test_sound_of_the_video(tmp_path: Path) -> None:
    write_video(tmp_path / "mute.mp4", pictures(25), "25")
    write_sound(tmp_path / "a.wav", 1)
    sound = ("-i", str(tmp_path / "a.wav"), "-map", "0:v", "-map", "1:a", "-c:v", "copy", "-c:a", "alac")
    for name, late in (("plain", "0"), ("late", "0.25")):
        (tmp_path / name).mkdir()
        run_ffmpeg("-i", str(tmp_path / "mute.mp4"), "-itsoffset", late, *sound, str(tmp_path / name / "sub_clip.mp4"))
    plain, late = probe(tmp_path / "plain", 25), probe(tmp_path / "late", 25)
    assert (plain.sound, plain.sound_delay, plain.samples) == ("sub_clip.mp4", 0, 16_000)
    assert (late.sound_delay, late.samples) == (4_000, 20_000)


def test_silence_is_sound_and_the_shorter_part_counts(tmp_path: Path) -> None:
    folder = make_clip(tmp_path / "a", 30, masks=False)
    soundfile.write(folder / "audio.wav", np.zeros((22_050, 2)), 44_100)
    clip = probe(folder, 25)
    assert clip.samples == 8_000 and clip.masks == (False, False)
    assert (clip.frames_at(25), clip.frames_at(50)) == (12, 25)


def broken_folders(root: Path) -> dict[str, str]:
    """Name -> words of the reason why it cannot be used."""
    whole = make_clip(root / "whole", 8)
    reasons = {"none": "no such folder"}

    def spoil(name: str, reason: str) -> Path:
        reasons[name] = reason
        return Path(shutil.copytree(whole, root / name))

    (spoil("gap", "images/ lacks frame_3.png") / "images" / "frame_3.png").unlink()
    (spoil("from one", "images/ lacks frame_0.png") / "images" / "frame_0.png").unlink()
    shutil.rmtree(spoil("blank", "no pictures") / "images")
    (spoil("mute", "no sound") / "audio.wav").unlink()
    (spoil("empty sound", "empty") / "audio.wav").write_bytes(b"")
    (spoil("mask gap", "lip_masks/ lacks frame_7.png") / "lip_masks" / "frame_7.png").unlink()
    (spoil("damaged", "damaged or truncated") / "images" / "frame_0.png").write_bytes((whole / "images/frame_0.png").read_bytes()[:60])
    write_video(spoil("other video", "8 pictures and sub_clip.mp4 12") / "sub_clip.mp4", pictures(12), "30")
    (spoil("text", "cannot read video") / "sub_clip.mp4").write_text("no video\n" * 50)
    cut = spoil("cut video", "truncated") / "sub_clip.mp4"
    noise = np.random.default_rng(0).integers(0, 256, (30, HEIGHT, WIDTH, 3), np.uint8)
    write_video(root / "long.mp4", noise, "25", "-movflags", "faststart")
    cut.write_bytes((root / "long.mp4").read_bytes()[:60_000])
    sound = spoil("no video", "no pictures in")
    run_ffmpeg("-i", str(whole / "audio.wav"), str(sound / "sub_clip.mp4"))
    return reasons


def test_clips_are_found_in_order_and_broken_ones_named(tmp_path: Path) -> None:
    reasons = broken_folders(tmp_path)
    names = [*reasons, "whole"]
    shutil.copytree(tmp_path / "whole", tmp_path / "second")
    (tmp_path / "list.txt").write_text("\n".join(["second", *names]))
    clips, broken = find_clips(str(tmp_path / "list.txt"), 25)
    assert [clip.folder.name for clip in clips] == ["second", "whole"]
    assert [Path(folder).name for folder, _ in broken] == list(reasons)
    for folder, reason in broken:
        assert reasons[Path(folder).name] in reason and "\n" not in reason, (folder, reason)


def test_the_index_saves_looking_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    clips = [probe(make_clip(tmp_path / "ü x" / source, 8, source=source), 25) for source in ("images", "video")]
    write_index(tmp_path / "run" / "clips.jsonl", clips)
    assert read_index(tmp_path / "run" / "clips.jsonl") == clips
    assert os.listdir(tmp_path / "run") == ["clips.jsonl"] and not caplog.text
    (tmp_path / "bad.jsonl").write_text('{"folder": "a"}\n')
    for name in ("bad.jsonl", "none.jsonl"):
        with pytest.raises(ValueError, match="clip index"):
            read_index(tmp_path / name)
    with pytest.raises(ValueError, match="cannot write the clip index"):
        write_index(tmp_path / "bad.jsonl" / "clips.jsonl", clips)


def test_odd_images_are_read(tmp_path: Path) -> None:
    write_images(tmp_path / "a" / "images", np.zeros((6, HEIGHT, WIDTH, 4), np.uint8))
    write_sound(tmp_path / "a" / "audio.wav", 1, 48_000, 2)
    assert probe(tmp_path / "a", 25).samples == 16_000


@needs_real_input
def test_real_input(tmp_path: Path) -> None:
    (tmp_path / "speech" / "1").mkdir(parents=True)
    (tmp_path / "speech" / "1" / "sub_clip.mp4").symlink_to(REAL / "talking_head_15s.mp4")
    clip = probe(tmp_path / "speech" / "1", 30)
    assert (clip.width, clip.height, clip.frames, clip.fps, clip.frames_at(25)) == (458, 458, 375, 25, 375)
