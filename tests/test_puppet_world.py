"""Scenes, the training set in the project's layout, the recipe from there to a pipeline folder, and the examples."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image
from transformers import Wav2Vec2FeatureExtractor

import train
from scripts.convert_checkpoint import main as convert
from scripts.puppet import COMMANDS
from scripts.puppet import main as puppet
from stableavatar.config import InferenceConfig, override, read_yaml
from stableavatar.data.clips import find_clips
from stableavatar.data.frames import read_masks, read_pixels, read_sound
from stableavatar.geometry import SAMPLE_RATE
from stableavatar.models.checkpoint_files import Checkpoint
from stableavatar.pipeline import StableAvatarPipeline
from stableavatar.puppet.examples import EXAMPLES
from stableavatar.puppet.speech_recipe import speech_model
from stableavatar.puppet.vae import PuppetVAE
from stableavatar.puppet.world import SHAPES, draw_scene

ROOT = Path(__file__).parents[1]
RECIPE = str(ROOT / "configs/train/puppet.yaml")
SMALL = {"dim": 64, "num_heads": 2, "num_layers": 2, "ffn_dim": 128, "adapter_heads": 2, "adapter_layers": 1}


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    assert puppet(["world", f"output={folder}", "clips=6", "frames=21", "workers=1"]) == 0
    return folder


def lists(world: Path) -> str:
    return ",".join(str(path) for path in sorted(world.glob("video_*_path.txt")) if path.read_text())


def test_a_scene_follows_from_its_seed():
    one, same, other, held_out = (draw_scene(*arguments) for arguments in ((3,), (3,), (4,), (3, "speech", (128, 128), 81, True)))
    assert np.array_equal(one.utterance.waveform, same.utterance.waveform) and one.identity == same.identity
    assert np.array_equal(one.render(40).pixels, same.render(40).pixels) and one.prompt == same.prompt
    for scene in (other, held_out):
        assert scene.identity != one.identity and not np.array_equal(scene.utterance.waveform, one.utterance.waveform)
    assert len(one.utterance.waveform) == len(one) * 640


def test_the_training_set_is_read_by_the_projects_own_reader(world):
    clips, broken = find_clips(lists(world), 25.0)
    assert not broken and len(clips) == 6
    for clip in clips:
        assert clip.frames_at(25.0) == 21 and clip.masks == (True, True)
        assert (clip.width, clip.height) == SHAPES[clip.folder.parts[-3]]
        truth = np.load(clip.folder / "truth.npz")
        assert truth["aperture"].shape == truth["yaw"].shape == (21,) and truth["code"].ndim == 1
        face, lips = read_masks(clip, range(21), clip.width, clip.height)
        assert face.max() > 0.9 and 0 < lips.mean() < face.mean() < 0.9
        assert len(read_sound(clip, 0, 21, 25.0)) == 21 * 640
    first = clips[0]
    folder_kind = {"speech": "talking", "singing": "singing", "dancing": "dancing"}[first.folder.parent.name]
    assert folder_kind in first.prompt
    picture = np.asarray(Image.open(first.folder / "images/frame_5.png"))
    assert np.array_equal(read_pixels(first, [5], first.width, first.height)[0], picture)


def test_the_world_does_not_depend_on_workers_and_goes_on_where_it_was(world, tmp_path):
    clips = [line for path in sorted(world.glob("video_*_path.txt")) for line in path.read_text().split()]
    stopped = tmp_path / clips[0]
    stopped.with_name(stopped.name + ".partial").mkdir(parents=True)
    assert puppet(["world", f"output={tmp_path}", "clips=6", "frames=21", "workers=2"]) == 0
    for clip in clips:
        for path in (world / clip).rglob("*.*"):
            if path.suffix in (".png", ".wav", ".txt"):
                assert (tmp_path / path.relative_to(world)).read_bytes() == path.read_bytes(), path
    assert not list(tmp_path.rglob("*.partial"))


@pytest.mark.parametrize("other", ["frames=25", "seed=1", "held_out=true"])
def test_two_worlds_do_not_mix(world, other, caplog):
    before = sorted(world.rglob("*.png"))
    words = [f"output={world}", "clips=6", "workers=1", *([] if other.startswith("frames") else ["frames=21"]), other]
    assert puppet(["world", *words]) == 2
    assert "holds a world of" in caplog.text and sorted(world.rglob("*.png")) == before


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> Path:
    """A pipeline folder with a VAE and a speech encoder that have learned nothing yet."""
    home = tmp_path_factory.mktemp("parts")
    torch.manual_seed(0)
    vae = PuppetVAE(widths=(8, 16, 32), encoder_depths=(1, 1, 1), decoder_depths=(1, 1, 1))
    noise = torch.linalg.qr(torch.randn(768, 16)).Q.T
    vae.set_components(torch.zeros(768), noise, torch.ones(16))
    vae.save_pretrained(home / "vae")
    speech_model().wav2vec2.save_pretrained(home / "speech")
    Wav2Vec2FeatureExtractor(sampling_rate=SAMPLE_RATE, do_normalize=True).save_pretrained(home / "speech")
    Path(home / "small.json").write_text(json.dumps(json.loads((ROOT / "configs/train/puppet_transformer.json").read_text()) | SMALL))
    words = [f"vae={home}/vae", f"speech={home}/speech", f"settings={home}/small.json", f"output={home}/model"]
    assert puppet(["assemble", *words]) == 0
    return home


def test_an_assembled_folder_is_a_pipeline_that_makes_videos(parts):
    pipe = StableAvatarPipeline.from_pretrained(parts / "model", local_files_only=True)
    assert isinstance(pipe.vae, PuppetVAE) and pipe.transformer.config.audio_dim == pipe.audio_encoder.config.hidden_size
    assert not list(parts.glob("*.partial"))
    assert not [file for file in (parts / "model").rglob("*.json") if str(parts) in file.read_text()], "names a folder of this machine"
    quick = {"width": 64, "height": 64, "steps": 1, "windows.frames": 9, "windows.overlap": 1, "guidance.name": "none"}
    case, sound = ROOT / "examples/ada", str(parts / "sound.wav")
    soundfile.write(sound, soundfile.read(case / "audio.wav")[0][: 9 * 640], SAMPLE_RATE)
    pipe.set_progress_bar_config(disable=True)
    frames = pipe(str(case / "reference.png"), sound, "", override(InferenceConfig(), quick))
    assert frames.shape == (9, 64, 64, 3) and frames.dtype == torch.uint8


def test_its_transformer_goes_through_the_released_names_and_back(parts, tmp_path):
    names = ["--transformer", "Avatar/weights.pt", "--base", "Wan", "--wav2vec", "speech", "--only", "transformer"]
    assert convert(["to-released", str(parts / "model"), str(tmp_path / "released"), *names]) == 0
    assert convert(["to-diffusers", str(tmp_path / "released"), str(tmp_path / "folder"), *names]) == 0
    there, back = (dict(Checkpoint(home / "transformer").read()) for home in (parts / "model", tmp_path / "folder"))
    assert there.keys() == back.keys() and all(torch.equal(there[name], back[name]) for name in there)


def test_the_whole_folder_goes_to_released_files_and_back(parts, tmp_path):
    names = ["--transformer", "Avatar/weights.pt", "--base", "Wan", "--wav2vec", "speech"]
    assert convert(["to-released", str(parts / "model"), str(tmp_path / "released"), *names]) == 0
    assert convert(["to-diffusers", str(tmp_path / "released"), str(tmp_path / "folder"), *names]) == 0
    index, again = (json.loads((home / "model_index.json").read_text()) for home in (parts / "model", tmp_path / "folder"))
    assert index == again and index["vae"][1] == "PuppetVAE"
    for name in ("transformer", "vae", "text_encoder", "image_encoder", "audio_encoder"):
        there, back = (dict(Checkpoint(home / name).read()) for home in (parts / "model", tmp_path / "folder"))
        assert there.keys() == back.keys() and all(torch.equal(there[key], back[key]) for key in there), name
    assert (tmp_path / "folder/vae/config.json").read_text() == (parts / "model/vae/config.json").read_text()
    assert isinstance(StableAvatarPipeline.from_pretrained(tmp_path / "folder", local_files_only=True).vae, PuppetVAE)


def test_a_pipeline_lends_its_vae_and_its_speech_encoder(parts, tmp_path):
    words = [f"vae={parts}/model", f"speech={parts}/model", f"settings={parts}/small.json", f"output={tmp_path}/model"]
    assert puppet(["assemble", *words]) == 0
    for part in ("vae", "audio_encoder"):
        own, lent = (dict(Checkpoint(home / part).read()) for home in (parts / "model", tmp_path / "model"))
        assert own.keys() == lent.keys() and all(torch.equal(own[name], lent[name]) for name in own), part
    assert (tmp_path / "model/audio_processor/preprocessor_config.json").is_file()


def test_assembling_spares_what_is_no_pipeline(parts, caplog):
    assert puppet(["assemble", f"vae={parts}/vae", f"speech={parts}/speech", f"output={parts}"]) == 2
    assert "holds something else than a pipeline" in caplog.text and (parts / "vae/config.json").exists()
    assert puppet(["assemble", f"vae={parts}/vae", f"speech={parts}/nowhere", f"output={parts}/other"]) == 2
    assert "the speech encoder in" in caplog.text and not (parts / "other").exists()


def test_a_short_training_learns(world, parts, tmp_path, monkeypatch):
    """The recipe of puppet.yaml from the world's clips through the latent cache, with a smaller transformer."""
    monkeypatch.chdir(tmp_path)
    words = [f"data.lists={lists(world)}", f"model={parts}/model", f"scratch={parts}/small.json"]
    words += ["data.frames=21", "data.runs=1", "data.cache=cache"]
    subprocess.run([sys.executable, str(ROOT / "scripts/cache_latents.py"), RECIPE, *words], check=True, capture_output=True)
    steps = ["max_steps=60", "batch=2", "optimizer.warmup=5", "output=run", "checkpoint.every=60", "log.every=1"]
    assert train.main([RECIPE, *words, *steps]) == 0
    losses = [json.loads(line)["velocity"] for line in Path("run/metrics.jsonl").read_text().splitlines() if "velocity" in line]
    assert np.mean(losses[-10:]) < 0.8 * np.mean(losses[:10]), (np.mean(losses[:10]), np.mean(losses[-10:]))


def test_the_examples_are_those_that_the_command_draws(tmp_path):
    assert puppet(["examples", f"output={tmp_path}"]) == 0
    for name in EXAMPLES:
        kept, made = ROOT / "examples" / name, tmp_path / name
        assert np.array_equal(np.asarray(Image.open(kept / "reference.png")), np.asarray(Image.open(made / "reference.png"))), name
        assert np.array_equal(soundfile.read(kept / "audio.wav")[0], soundfile.read(made / "audio.wav")[0]), name
        assert (kept / "prompt.txt").read_text() == (made / "prompt.txt").read_text(), name
    cases = {Path(case["reference"]).parent.name: case["prompt"] for case in read_yaml(ROOT / "examples/cases.yaml", list)}
    assert cases == {name: (ROOT / "examples" / name / "prompt.txt").read_text().strip() for name in EXAMPLES}


def test_commands_explain_themselves(capsys):
    assert puppet(["--help"]) == 0
    listing = capsys.readouterr().out
    assert all(f"    {name} " in listing for name in COMMANDS)
    assert puppet(["wrold"]) == 2 and puppet([]) == 2
    assert puppet(["world", "clps=3"]) == 2
