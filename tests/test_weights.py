"""Released files load strictly by their own names, come back out the same, and never need a second copy in memory."""

import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection, UMT5Config, UMT5EncoderModel, Wav2Vec2Config, Wav2Vec2Model
from transformers.utils import logging as library_logging

from stableavatar.models import checkpoint_files, weights
from stableavatar.models.checkpoint_files import Checkpoint
from stableavatar.models.checkpoint_writing import write_tensors
from stableavatar.models.dit import AvatarTransformer
from stableavatar.models.key_maps import AUDIO_TENSOR, released_sources
from stableavatar.models.strict_loading import empty_model, export_state_dict, released_shapes
from stableavatar.vae import WanVAE

ROOT = Path(__file__).resolve().parents[1]
KEYS = ROOT.parent / "shared" / "reference" / "checkpoint_keys.json"

CLIP_SIZES = {"num_attention_heads": 2}


def transformer(hidden: tuple[int, ...] = ()) -> AvatarTransformer:
    torch.manual_seed(0)
    sizes = {"dim": 128, "num_heads": 1, "num_layers": 2, "ffn_dim": 32, "freq_dim": 16, "text_dim": 16, "image_dim": 16}
    model = AvatarTransformer(**sizes, audio_dim=8, audio_hidden_dims=hidden, adapter_layers=1)
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    return model


def text_encoder() -> UMT5EncoderModel:
    torch.manual_seed(0)
    return UMT5EncoderModel(UMT5Config(vocab_size=50, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=3))


def image_encoder() -> CLIPVisionModelWithProjection:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "projection_dim": 12, "num_hidden_layers": 2, "patch_size": 14}
    return CLIPVisionModelWithProjection(CLIPVisionConfig(**sizes, **CLIP_SIZES, hidden_act="gelu"))


def vae() -> WanVAE:
    torch.manual_seed(0)
    return WanVAE(base_dim=4)


LOADERS = {
    "transformer": (transformer, weights.load_transformer),
    "two_stage": (lambda: transformer((24,)), weights.load_transformer),
    "text_encoder": (text_encoder, weights.load_text_encoder),
    "image_encoder": (image_encoder, lambda *args: weights.load_image_encoder(*args, config=CLIP_SIZES)),
    "vae": (vae, weights.load_vae),
}


def released(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """A random model and its released state dict, with what else the published file holds."""
    model = LOADERS[name][0]()
    tensors = {key: tensor.detach().clone(memory_format=torch.contiguous_format) for key, tensor in export_state_dict(model).items()}
    if name == "image_encoder":
        tensors = {f"visual.{key}": tensor for key, tensor in tensors.items()}
        tensors |= {"log_scale": torch.zeros(()), "textual.norm.weight": torch.ones(3)}
    return model, tensors


def assert_same(loaded: nn.Module, model: nn.Module, dtype: torch.dtype) -> None:
    for name, expected in model.state_dict().items():
        got = loaded.state_dict()[name]
        assert got.dtype in (dtype, torch.float32), name
        assert torch.equal(got, expected.to(got.dtype)), name
    assert not any(tensor.is_meta for tensor in [*loaded.parameters(), *loaded.buffers()])
    assert not loaded.training


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", LOADERS)
def test_every_kind_loads_from_every_container(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model, tensors = released(name)
    torch.save(tensors, tmp_path / "plain.pth")
    torch.save({"state_dict": tensors, "step": 3}, tmp_path / "nested.pt")
    save_file(tensors, tmp_path / "single.safetensors")
    for file in ("plain.pth", "nested.pt", "single.safetensors"):
        assert_same(LOADERS[name][1](tmp_path / file, dtype), model, dtype)


def test_sharded_file_loads_from_its_index_and_from_its_folder(tmp_path: Path) -> None:
    model, tensors = released("transformer")
    names = list(tensors)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for shard, held in shards.items():
        save_file({name: tensors[name] for name in held}, tmp_path / shard)
    index = tmp_path / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {name: shard for shard, held in shards.items() for name in held}}))
    for path in (index, tmp_path):
        assert_same(weights.load_transformer(path, torch.float32), model, torch.float32)
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(ValueError, match="b.safetensors does not exist"):
        weights.load_transformer(index)


@pytest.mark.parametrize("ending", ["pt", "safetensors"])
@pytest.mark.parametrize("name", LOADERS)
def test_round_trip_keeps_every_bit(name: str, ending: str, tmp_path: Path) -> None:
    _, tensors = released(name)
    torch.save({key: tensor.bfloat16() for key, tensor in tensors.items()}, tmp_path / "in.pt")
    back = export_state_dict(LOADERS[name][1](tmp_path / "in.pt", None))
    file = tmp_path / f"out.{ending}"
    write_tensors(file, {key: (tensor.dtype, tensor.shape) for key, tensor in back.items()}, back.items())
    read = load_file(file) if ending == "safetensors" else torch.load(file, weights_only=True)
    ours = {key.removeprefix("visual."): tensor for key, tensor in tensors.items() if not key.startswith(("log", "textual"))}
    assert read.keys() == ours.keys()
    assert all(torch.equal(read[key], ours[key].bfloat16()) for key in ours)


def test_clip_parts_go_where_they_belong(tmp_path: Path) -> None:
    _, tensors = released("image_encoder")
    save_file(tensors, tmp_path / "clip.safetensors")
    model = weights.load_image_encoder(tmp_path / "clip.safetensors", torch.float32, config=CLIP_SIZES)
    fused = tensors["visual.transformer.1.attn.to_qkv.weight"]
    attention = model.vision_model.encoder.layers[1].self_attn
    assert torch.equal(torch.cat([attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]), fused)
    assert torch.equal(model.visual_projection.weight, tensors["visual.head"].T)
    assert torch.equal(model.vision_model.embeddings.position_ids[0], torch.arange(257))


def test_model_keeps_in_float32_what_its_class_marks(tmp_path: Path) -> None:
    _, tensors = released("transformer")
    save_file(tensors, tmp_path / "dit.safetensors")
    model = weights.load_transformer(tmp_path / "dit.safetensors", torch.bfloat16)
    assert model.time_embedding[0].weight.dtype == model.blocks[0].modulation.dtype == torch.float32
    assert model.blocks[0].ffn[0].weight.dtype == torch.bfloat16


def test_vae_names_are_those_of_the_librarys_converter() -> None:
    model = empty_model(WanVAE)
    ours = {source.name: name for name, source in released_sources(model).items()}
    assert convert_wan_vae_to_diffusers({name: name for name in ours}) == {name: source for source, name in ours.items()}


@pytest.mark.skipif(not KEYS.is_file(), reason="reference folder is absent")
@pytest.mark.parametrize(
    ("kind", "build"),
    [
        ("stableavatar_transformer_1.3b", AvatarTransformer),
        (
            "stableavatar_transformer_14b",
            lambda: AvatarTransformer(5120, 40, 40, 13824, audio_hidden_dims=(2048,)),
        ),
        (
            "umt5_xxl_encoder",
            lambda: UMT5EncoderModel(UMT5Config(vocab_size=256384, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64)),
        ),
        ("clip_visual", None),
        ("wan_vae", WanVAE),
    ],
)
def test_full_size_names_and_shapes_match_both_ways(kind: str, build: type | None) -> None:
    expected = json.loads(KEYS.read_text())[kind]
    if build is None:
        sizes = {"hidden_size": 1280, "intermediate_size": 5120, "projection_dim": 1024, "num_hidden_layers": 32, "patch_size": 14}
        settings = CLIPVisionConfig(**sizes, num_attention_heads=16)
        model = empty_model(lambda: CLIPVisionModelWithProjection(settings))
    else:
        model = empty_model(build)
    assert {name: list(shape) for name, shape in released_shapes(model).items()} == expected
    assert not {name for name, _ in model.named_buffers()} & model.state_dict().keys()


@pytest.mark.skipif(not KEYS.is_file(), reason="reference folder is absent")
def test_settings_of_the_published_files_follow_from_their_shapes() -> None:
    keys = json.loads(KEYS.read_text())

    def file(kind: str) -> Checkpoint:
        checkpoint = object.__new__(Checkpoint)
        checkpoint.path, checkpoint.prefix = Path(kind), ""
        checkpoint.shapes = {name: torch.Size(shape) for name, shape in keys[kind].items()}
        return checkpoint

    for kind, sizes in {"1.3b": (1536, 12, 30, 8960, ()), "14b": (5120, 40, 40, 13824, (2048,))}.items():
        c = weights.empty_transformer(file(f"stableavatar_transformer_{kind}")).config
        assert (c.dim, c.num_heads, c.num_layers, c.ffn_dim, tuple(c.audio_hidden_dims)) == sizes
        assert (c.text_dim, c.image_dim, c.audio_dim, c.adapter_layers, c.freq_dim) == (4096, 1280, 768, 2, 256)
    assert {**weights.empty_vae(file("wan_vae")).config} | {"_use_default_values": 0} == {**WanVAE().config} | {"_use_default_values": 0}
    c = weights.empty_text_encoder(file("umt5_xxl_encoder")).config
    assert (c.num_layers, c.num_heads, c.d_kv, c.relative_attention_num_buckets) == (24, 64, 64, 32)
    c = weights.empty_image_encoder(file("clip_visual")).config
    assert (c.num_hidden_layers, c.num_attention_heads, c.image_size) == (32, 16, 224)


@pytest.mark.parametrize(
    "sizes",
    [
        {"base_dim": 4, "dim_mult": [1, 2], "num_res_blocks": 1, "temperal_downsample": [True]},
        {"base_dim": 3, "dim_mult": [1, 1, 3], "num_res_blocks": 3, "temperal_downsample": [True, False]},
        {"base_dim": 2, "dim_mult": [2, 2, 4, 8], "num_res_blocks": 2, "temperal_downsample": [False, False, True]},
    ],
)
def test_vae_of_any_shape_is_recognised(sizes: dict, tmp_path: Path) -> None:
    model = WanVAE(**sizes)
    torch.save(export_state_dict(model), tmp_path / "vae.pth")
    loaded = weights.load_vae(tmp_path / "vae.pth")
    assert {key: loaded.config[key] for key in sizes} == sizes
    assert_same(loaded, model, torch.float32)


def test_wrong_tensors_are_listed(tmp_path: Path) -> None:
    _, tensors = released("transformer")
    tensors["blocks.1.ffn.2.bias"] = torch.zeros(7)
    tensors["stranger"] = torch.zeros(1)
    del tensors["head.head.bias"]
    save_file(tensors, tmp_path / "dit.safetensors")
    with pytest.raises(ValueError) as error:
        weights.load_transformer(tmp_path / "dit.safetensors")
    message = str(error.value)
    assert "1 missing: head.head.bias" in message
    assert "1 left over: stranger" in message
    assert "1 of another shape: blocks.1.ffn.2.bias [7] instead of [128]" in message
    assert "\n" not in message


def test_long_lists_of_wrong_tensors_are_cut(tmp_path: Path) -> None:
    _, tensors = released("text_encoder")
    save_file(tensors | {f"x{i}": torch.zeros(1) for i in range(25)}, tmp_path / "t5.safetensors")
    with pytest.raises(ValueError, match="25 left over: .*and 15 more"):
        weights.load_text_encoder(tmp_path / "t5.safetensors")


@pytest.mark.parametrize("hidden", [(), (24,)])
def test_base_model_gets_fresh_audio_only_on_request(hidden: tuple[int, ...], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = transformer(hidden)
    base = {name: tensor.detach() for name, tensor in export_state_dict(model).items() if not AUDIO_TENSOR.match(name)}
    save_file(base, tmp_path / "base.safetensors")
    with pytest.raises(ValueError, match="no audio tensors"):
        weights.load_transformer(tmp_path / "base.safetensors")
    sizes = {"audio_dim": 8, "audio_hidden_dims": hidden, "adapter_layers": 1}
    with caplog.at_level(logging.INFO):
        loaded = weights.load_transformer(tmp_path / "base.safetensors", torch.float32, config=sizes, fresh_audio=True)
    assert "start fresh" in caplog.text
    assert not any(parameter.is_meta for parameter in loaded.parameters())
    got = export_state_dict(loaded)
    assert all(torch.equal(got[name], tensor) for name, tensor in base.items())
    assert all(not tensor.any() for name, tensor in got.items() if "_vocal." in name)
    assert torch.equal(loaded.audio_adapter.projection[1].weight, torch.ones(hidden[0] if hidden else 128))
    assert loaded.audio_adapter.blocks[0].ffn[0].weight.std() > 0


def test_some_audio_tensors_missing_is_an_error_even_when_fresh_ones_are_welcome(tmp_path: Path) -> None:
    _, tensors = released("transformer")
    del tensors["blocks.0.cross_attn.k_vocal.weight"]
    save_file(tensors, tmp_path / "dit.safetensors")
    with pytest.raises(ValueError, match="1 missing: blocks.0.cross_attn.k_vocal.weight"):
        weights.load_transformer(tmp_path / "dit.safetensors", fresh_audio=True)


@pytest.mark.parametrize("file", [name for name in LOADERS if name != "two_stage"])
@pytest.mark.parametrize("loader", [name for name in LOADERS if name != "two_stage"])
def test_checkpoint_of_another_model_is_one_clear_line(file: str, loader: str, tmp_path: Path) -> None:
    if file != loader:
        torch.save(released(file)[1], tmp_path / "file.pt")
        with pytest.raises(ValueError, match="another model") as error:
            LOADERS[loader][1](tmp_path / "file.pt", torch.float32)
        assert "\n" not in str(error.value)


def test_settings_of_another_size_are_an_error_that_shows_shapes(tmp_path: Path) -> None:
    save_file(released("transformer")[1], tmp_path / "dit.safetensors")
    with pytest.raises(ValueError, match=r"of another shape: .*patch_embedding.weight \[128, 36, 1, 2, 2\] instead of \[64, 36"):
        weights.load_transformer(tmp_path / "dit.safetensors", config={"dim": 64})


class Intruder:
    """Pickles to a call of its own."""

    def __reduce__(self) -> tuple:
        return print, ("code from a checkpoint ran",)


def damaged_files(folder: Path) -> list[Path]:
    _, tensors = released("vae")
    torch.save(tensors, folder / "whole.pt")
    save_file(tensors, folder / "whole.safetensors")
    pickled, plain = (folder / "whole.pt").read_bytes(), (folder / "whole.safetensors").read_bytes()
    torch.save({"weight": Intruder()}, folder / "code.pt")
    torch.save({"weight": 3}, folder / "number.pt")
    torch.save([torch.zeros(1)], folder / "list.pt")
    contents = {
        "truncated.pt": pickled[: len(pickled) // 2],
        "garbage.pt": b"\x80\x02garbage" * 99,
        "broken_pickle.pt": pickled.replace(b"encoder.conv1", b"\xffncoder\xfe\x00\x92v1"),
        "empty.pth": b"",
        "truncated.safetensors": plain[:-100],
        "no_header.safetensors": plain[:5],
        "garbage.safetensors": b"not a checkpoint" * 99,
        "empty.safetensors": b"",
        "garbage.safetensors.index.json": b'["weight_map"]',
        "text.json": b"{",
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return [folder / name for name in (*contents, "code.pt", "number.pt", "list.pt", "missing.pt", ".")]


def test_damaged_files_are_one_clear_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for path in damaged_files(tmp_path):
        with pytest.raises(ValueError) as error:
            weights.load_vae(path)
        assert "\n" not in str(error.value) and str(path) in str(error.value)
    assert "code from a checkpoint ran" not in capsys.readouterr().out


def test_base_config_maps_known_keys_and_notes_the_others(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"model_type": "i2v", "num_heads": 2, "text_len": 9, "in_dim": 36, "window_size": [-1, -1]}))
    with caplog.at_level(logging.INFO):
        assert weights.read_base_config(file) == {"num_heads": 2, "text_length": 9, "in_channels": 36}
    assert "window_size" in caplog.text and "model_type" not in caplog.text
    save_file(released("transformer")[1], tmp_path / "dit.safetensors")
    assert weights.load_transformer(tmp_path / "dit.safetensors", base_config=file).config.num_heads == 2
    for content in ("{", "[]"):
        file.write_text(content)
        with pytest.raises(ValueError, match="base model config"):
            weights.read_base_config(file)


@pytest.mark.parametrize("value", ["2", 0, -1, 2.0, True, None, [2], float("nan"), float("inf")])
def test_wrong_values_in_a_base_config_name_the_key(value: object, tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    for key in weights.BASE_CONFIG_KEYS.keys() - {"audio_positions"} if value != 2.0 else ["dim"]:
        file.write_text(json.dumps({key: value}))
        with pytest.raises(ValueError, match=f": {key} must be a positive (whole )?number, got ") as error:
            weights.read_base_config(file)
        assert "\n" not in str(error.value)
    file.write_text('{"eps": 1, "audio_positions": true}')
    assert weights.read_base_config(file) == {"eps": 1, "audio_positions": True}
    file.write_text('{"audio_positions": 1}')
    with pytest.raises(ValueError, match="audio_positions must be true or false, got 1"):
        weights.read_base_config(file)


def test_the_library_prints_no_report_about_the_speech_encoder(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8, "conv_dim": (8,)}
    shape = {"conv_stride": (5,), "conv_kernel": (10,), "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
    Wav2Vec2Model(Wav2Vec2Config(**sizes, **shape)).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(tensors | {"lm_head.bias": torch.zeros(3)}, tmp_path / "model.safetensors", {"format": "pt"})
    before = library_logging.get_verbosity()
    library_logging.set_verbosity_warning()
    library_logging.enable_propagation()
    capfd.readouterr()
    try:
        weights._from_folder(tmp_path, Wav2Vec2Model.from_pretrained)
        assert "lm_head" not in "".join(capfd.readouterr()) and library_logging.get_verbosity() == logging.WARNING
    finally:
        library_logging.disable_propagation()
        library_logging.set_verbosity(before)


@pytest.mark.parametrize("ending", ["pt", "safetensors"])
def test_a_failed_write_leaves_nothing(ending: str, tmp_path: Path) -> None:
    def tensors():
        yield "a", torch.ones(2)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_tensors(tmp_path / f"x.{ending}", dict.fromkeys("ab", (torch.float32, torch.Size([2]))), tensors())
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="cannot write"):
        write_tensors(tmp_path / "file" / f"x.{ending}", {}, [])


def test_mixed_dtypes_and_scalars_are_written_aligned(tmp_path: Path) -> None:
    tensors = {"a": torch.tensor([True]), "b": torch.arange(3.0), "c": torch.tensor(2.5).bfloat16(), "d": torch.arange(2)}
    write_tensors(tmp_path / "x.safetensors", {name: (t.dtype, t.shape) for name, t in tensors.items()}, tensors.items())
    read = load_file(tmp_path / "x.safetensors")
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())


def test_reading_opens_anew_without_losing_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint_files, "BYTES_PER_OPENING", 100)
    for name in ("a.pt", "a.safetensors"):
        model, tensors = released("text_encoder")
        torch.save(tensors, tmp_path / name) if name.endswith("pt") else save_file(tensors, tmp_path / name)
        assert_same(weights.load_text_encoder(tmp_path / name, torch.float32), model, torch.float32)


PEAK = """
import sys, torch
from pathlib import Path
from stableavatar.models import checkpoint_files, weights
def kib(field): return next(int(l.split()[1]) for l in Path("/proc/self/status").read_text().splitlines() if l.startswith(field))
checkpoint_files.BYTES_PER_OPENING = 2**24
before = kib("VmRSS")
model = weights.load_text_encoder(sys.argv[1], torch.bfloat16)
print((kib("VmHWM") - before) / 1024, sum(p.nbytes for p in model.parameters()) / 2**20)
"""


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="needs Linux's account of a process's memory")
@pytest.mark.parametrize("ending", ["pt", "safetensors"])
def test_peak_memory_is_the_model_and_little_more(ending: str, tmp_path: Path) -> None:
    settings = UMT5Config(vocab_size=100, d_model=512, d_kv=64, d_ff=2048, num_layers=24, num_heads=8)
    model = empty_model(lambda: UMT5EncoderModel(settings))
    file = tmp_path / f"t5.{ending}"
    shapes = released_shapes(model)
    specs = {name: (torch.float32, shape) for name, shape in shapes.items()}
    write_tensors(file, specs, ((name, torch.ones(shape)) for name, shape in shapes.items()))
    run = subprocess.run([sys.executable, "-c", PEAK, file], cwd=ROOT, capture_output=True, text=True, check=True)
    peak, size = map(float, run.stdout.split())
    assert size > 190
    assert peak < size + 80, f"{peak:.0f} MiB for a model of {size:.0f} MiB from a file of {2 * size:.0f} MiB"
