"""train.py from clip folders to checkpoints: exact resume, cached = online, LoRA, what stops a run."""

import json
import shutil
import signal
from pathlib import Path

import pytest
import torch
from clip_files import make_clip
from train_runs import attempt, clip_list, finish, losses, metrics, run, start, tiny_words, video_words, wait_for_step, weights

from stableavatar.config import load_config
from stableavatar.media import AudioTrack
from stableavatar.models.dit import AvatarTransformer
from stableavatar.models.lora import merge_files
from stableavatar.models.weights import load_transformer
from stableavatar.training.caching import write_cache
from stableavatar.training.config import TrainConfig


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> Path:
    """The path list of five clips."""
    return clip_list(tmp_path_factory.mktemp("clips"))


@pytest.fixture
def words(tiny_folder, clips) -> list[str]:
    """Settings of a tiny run."""
    return tiny_words(tiny_folder, clips)


def test_a_run_writes_what_it_promises(words, tmp_path):
    run(words, tmp_path, "max_steps=4", "checkpoint.every=2", "optimizer.ema=0.5")
    last = tmp_path / "checkpoints/step_000004"
    assert (tmp_path / "config.yaml").is_file() and (tmp_path / "clips.jsonl").is_file()
    saved = AvatarTransformer.from_pretrained(last / "transformer")
    released = load_transformer(last / "transformer3d.safetensors", torch.float32, config={"num_heads": saved.config.num_heads})
    ours = dict(saved.named_parameters())
    assert all(torch.equal(parameter, ours[name]) for name, parameter in released.named_parameters())
    assert any(not torch.equal(ours[name].data, tensor) for name, tensor in weights(tmp_path).items()), "for use: the average"


def test_a_run_starts_again_from_its_own_settings(words, tmp_path):
    """config.yaml is a configuration like any other."""
    first = run(words, tmp_path / "a", "max_steps=2")
    assert losses(run([str(tmp_path / "a/config.yaml")], tmp_path / "b")) == losses(first)


def test_a_killed_run_goes_on_exactly(words, tmp_path):
    """Uninterrupted = killed twice by SIGKILL in the middle of things; every loss is the same to the last bit."""
    whole = run(words, tmp_path / "whole", "max_steps=20", "optimizer.ema=0.9", "objective.motion=0.2")
    settings = ["checkpoint.every=2", "max_steps=20", "optimizer.ema=0.9", "objective.motion=0.2", "resume=latest", "data.workers=1"]
    for step in (3, 6):
        process = start(*words, *settings, f"output={tmp_path / 'cut'}")
        wait_for_step(process, tmp_path / "cut", step)
        process.kill()
        process.communicate()
    assert len(metrics(tmp_path / "cut")) < 20, "the run was not killed in its middle"
    resumed = run(words, tmp_path / "cut", *settings)
    assert losses(resumed) == losses(whole) and len(losses(whole)) == 20
    after, expected = weights(tmp_path / "cut"), weights(tmp_path / "whole")
    assert all(torch.equal(after[name], expected[name]) for name in expected)
    assert not list((tmp_path / "cut").rglob("*.partial"))


def test_a_cluster_s_signal_saves_and_ends_the_run(words, tmp_path):
    process = start(*words, f"output={tmp_path}", "max_steps=100000", "epochs=100000")
    wait_for_step(process, tmp_path, 2)
    process.send_signal(signal.SIGTERM)
    text = finish(process)
    (checkpoint,) = (tmp_path / "checkpoints").glob("step_*")
    assert "stopped by a signal" in text and int(checkpoint.name[5:]) == metrics(tmp_path)[-1]["step"]


@pytest.mark.parametrize("what", ["attention", "blocks"])
def test_what_is_frozen_stays_as_it_was(words, tiny_folder, tmp_path, what):
    run(words, tmp_path, f"what={what}", "max_steps=2")
    before = AvatarTransformer.from_pretrained(tiny_folder / "transformer").state_dict()
    after = AvatarTransformer.from_pretrained(tmp_path / "checkpoints/step_000002/transformer").state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and changed <= set(weights(tmp_path)), "only what trains changes"
    assert any("ffn" in name for name in changed if name.startswith("blocks.")) is (what == "blocks")


def test_the_checkpoint_of_a_run_can_be_fine_tuned(words, tmp_path):
    run(words, tmp_path / "first", "max_steps=2")
    for kind in ("transformer", "transformer3d.safetensors"):
        first = tmp_path / "first/checkpoints/step_000002" / kind
        run(words, tmp_path / f"tuned {kind}", "max_steps=1", f"transformer={first}", "what=lora", "lora.rank=2", "optimizer.warmup=0")
    one, other = (metrics(tmp_path / f"tuned {kind}") for kind in ("transformer", "transformer3d.safetensors"))
    assert losses(one) == losses(other)
    assert losses(one) != losses(run(words, tmp_path / "untuned", "max_steps=1", "what=lora"))


@pytest.mark.parametrize("adapter", ["whole", "lora", "frozen"])
def test_a_lora_run_resumes_and_its_file_fits_the_model(words, tiny_folder, tmp_path, adapter):
    settings = ["what=lora", "lora.rank=4", f"lora.adapter={adapter}", "optimizer.lr=1e-2", "max_steps=4"]
    whole = run(words, tmp_path / "whole", *settings)
    run(words, tmp_path / "cut", *settings, "max_steps=2")
    assert losses(run(words, tmp_path / "cut", *settings, "resume=latest")) == losses(whole)
    last = tmp_path / "cut/checkpoints/step_000004"
    assert not (last / "transformer").exists(), "the base is not written again"
    model = AvatarTransformer.from_pretrained(tiny_folder / "transformer")
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    merge_files(model, [(last / "lora.safetensors", 1.0)])
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert any(name.startswith("blocks.") for name in changed)
    assert any(name.startswith("audio_adapter.") for name in changed) is (adapter != "frozen")


def test_training_from_the_cache_is_training_online(words, tmp_path):
    runs = ["data.runs=2", "max_steps=6", "batch=2", "objective.motion=0.1"]
    online = run(words, tmp_path / "online", *runs)
    cache = f"data.cache={tmp_path / 'cache'}"
    write_cache(load_config(TrainConfig, None, [*words, *runs, cache]))
    cached = run(words, tmp_path / "cached", *runs, cache)
    assert losses(cached) == pytest.approx(losses(online), rel=1e-5)
    handed_over = run(words, tmp_path / "handover", *runs, "encoders=handover")
    assert losses(handed_over) == losses(online)


def test_validation_gives_a_loss_and_videos(words, clips, portrait, make_voice, tmp_path):
    validation = video_words(tmp_path, portrait, make_voice(9600))
    settings = ["max_steps=4", "validation.every=2", "checkpoint.every=2", "optimizer.ema=0.5", *validation,
                f"data.validation_lists={clips}", "log.tensorboard=true"]
    figures = run(words, tmp_path / "run", *settings)
    assert len([line for line in figures if "validation_loss" in line]) == 2
    first, second = (tmp_path / f"run/validation/step_00000{step}/case_001.mp4" for step in (2, 4))
    assert AudioTrack(first).duration == pytest.approx(0.6, abs=0.04) and first.read_bytes() != second.read_bytes()
    without = run(words, tmp_path / "without", "max_steps=4", "optimizer.ema=0.5")
    assert losses(figures) == losses(without), "looking changes nothing"


def test_the_last_checkpoints_and_the_best_stay(words, tmp_path):
    run(words, tmp_path, "max_steps=8", "checkpoint.every=1", "checkpoint.keep=2")
    names = sorted(path.name for path in (tmp_path / "checkpoints").glob("step_*"))
    best = json.loads((tmp_path / "checkpoints/best.json").read_text())
    figures = losses(metrics(tmp_path))
    assert best["name"] == f"step_{1 + figures.index(min(figures)):06d}"
    assert names == sorted({"step_000007", "step_000008", best["name"]})


def test_a_loss_that_is_not_finite_stops_the_run_and_says_where(words, tmp_path, caplog):
    settings = ["optimizer.lr=1e30", "optimizer.warmup=0", "optimizer.clip=0", "max_steps=9", "checkpoint.every=1"]
    assert attempt(words, tmp_path, *settings) == 1
    error = caplog.messages[-1]
    assert "not finite" in error and "square/speech/0000" in error and "last good checkpoint is" in error and "step_" in error


def test_broken_clips_are_named_and_too_many_stop_the_run(words, clips, tmp_path, caplog):
    folders = clips.read_text().splitlines()
    shutil.copytree(folders[0], broken := tmp_path / "broken")
    for image in (broken / "images").glob("frame_*.png"):
        image.write_bytes(image.read_bytes()[:40])
    (tmp_path / "list.txt").write_text("\n".join([*folders, str(broken)]))
    some = [*words, f"data.lists={tmp_path / 'list.txt'}", "max_steps=6"]
    assert attempt(some, tmp_path / "few", "data.max_broken=0.2") == 0
    assert attempt(some, tmp_path / "many") == 2
    assert f"broken clip {broken}" in caplog.text and caplog.messages[-1].startswith("error: 1 of 6 clips are broken, more than")
    assert str(broken) in caplog.messages[-1]


def test_a_folder_with_a_run_is_not_overwritten(words, tmp_path, caplog):
    run(words, tmp_path, "max_steps=1")
    assert attempt(words, tmp_path) == 2
    assert "resume=latest" in caplog.messages[-1]


def test_a_resume_takes_the_settings_rates_and_refuses_what_it_cannot(words, tmp_path, caplog):
    lora = ["what=lora", "lora.rank=2", "checkpoint.every=1"]
    run(words, tmp_path / "a", *lora, "max_steps=2")
    figures = run(words, tmp_path / "a", *lora, "max_steps=4", "resume=latest", "optimizer.lr=1e-5")
    assert [line["lr"] for line in figures] == pytest.approx([5e-4, 1e-3, 1e-5, 1e-5])
    for other, said in (("optimizer.name=came", "adamw, not came"), ("lora.rank=4", "resume with the same model, what and lora")):
        assert attempt(words, tmp_path / "a", *lora, "max_steps=6", "resume=latest", other) == 2
        assert said in caplog.messages[-1]


def test_going_back_needs_another_folder(words, tmp_path, caplog):
    whole = run(words, tmp_path / "a", "max_steps=3", "checkpoint.every=1")
    back = f"resume={tmp_path / 'a/checkpoints/step_000001'}"
    assert attempt(words, tmp_path / "a", "max_steps=3", back) == 2 and "later steps" in caplog.messages[-1]
    assert losses(run(words, tmp_path / "b", "max_steps=3", back)) == losses(whole)[1:]


def test_a_new_run_looks_at_its_clips_again(words, clips, tmp_path, caplog):
    """A first attempt, without masks and stopped before its first checkpoint, leaves no trace in the next."""
    folder = make_clip(tmp_path / "clip", frames=12, masks=False)
    (tmp_path / "list.txt").write_text(str(folder))
    own = [*words, f"data.lists={tmp_path / 'list.txt'}", "max_steps=1"]
    run(own, tmp_path / "run")
    assert "masks count as ones" in caplog.text
    shutil.rmtree(tmp_path / "run/checkpoints")
    for kind in ("face_masks", "lip_masks"):
        shutil.copytree(Path(clips.read_text().splitlines()[0]) / kind, folder / kind)
    caplog.clear()
    run(own, tmp_path / "run")
    assert "masks count as ones" not in caplog.text


def test_a_run_of_one_process_shares_no_sequence(words, tmp_path, caplog):
    assert attempt(words, tmp_path, "parallel.ulysses=2") == 2
    assert "parallel.ulysses=2 x parallel.ring=1 processes share each sample, but 1 were started" in caplog.messages[-1]
    assert not list(tmp_path.iterdir())
