"""LoRA: zero at start, trains, saves, loads, merges to the same output; files of other tools; the programs that take it."""

import json
import logging
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import soundfile
import torch
from make_tiny_model import tiny_transformer
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import inference
from scripts import lora as program
from stableavatar.models.checkpoint_writing import write_tensors
from stableavatar.models.dit import AvatarTransformer, Conditions
from stableavatar.models.layout import TokenLayout
from stableavatar.models.lora import TrainedLora, add_lora, apply_loras, merge, merge_files, unmerge_files
from stableavatar.models.lora_files import export_lora, parse_loras, read_about, read_lora, tensor_name
from stableavatar.models.strict_loading import export_state_dict
from stableavatar.models.weights import load_transformer
from stableavatar.pipeline import StableAvatarPipeline

ALL = "q,k,v,o,ffn"


def base(seed: int = 0, **changes: object) -> AvatarTransformer:
    torch.manual_seed(seed)
    return tiny_transformer(**changes).eval()


def run(model: AvatarTransformer, conditions: Conditions) -> Tensor:
    latents = torch.randn(1, 16, 3, 4, 6, generator=torch.Generator().manual_seed(5)).to(model.dtype)
    return model(latents, torch.tensor([700.0]), conditions, TokenLayout.full(3))


def train(model: AvatarTransformer, conditions: Conditions, steps: int = 3, autocast: bool = False) -> list[float]:
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for _ in range(steps):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = run(model, conditions).float().sub(1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def trained_file(path: Path, conditions: Conditions, targets: str = ALL, adapter: str = "whole", rank: int = 4, seed: int = 1) -> Tensor:
    """Trains a LoRA on the base, saves it, and gives the trained model's output."""
    model = base()
    lora = add_lora(model, rank, 2.0, targets, adapter, seed)
    train(model, conditions)
    lora.save(path, model.named_parameters(), step=3)
    with torch.no_grad():
        return run(model, conditions)


@pytest.fixture
def conditions(make_conditions) -> Conditions:
    return make_conditions()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("adapter", ["whole", "lora", "frozen"])
@torch.no_grad()
def test_zero_at_start(conditions, adapter, dtype):
    model = base().to(dtype)
    before = run(model, conditions)
    add_lora(model, 4, 8.0, ALL, adapter, seed=0)
    assert torch.equal(run(model, conditions), before)
    assert {p.dtype for name, p in model.named_parameters() if ".lora_" in name} == {torch.float32}


def test_targets_are_the_linears_of_the_blocks():
    def modules(targets: str, adapter: str) -> set[str]:
        model = base()
        add_lora(model, 2, 2.0, targets, adapter, seed=0)
        return {name.split(".lora_A")[0] for name, _ in model.named_parameters() if ".lora_A" in name}

    assert modules("q", "frozen") == {f"blocks.{n}.{part}_attn.q" for n in (0, 1) for part in ("self", "cross")}
    keys = {f"blocks.{n}.{name}" for n in (0, 1) for name in ("self_attn.k", *(f"cross_attn.k{end}" for end in ("", "_img", "_audio")))}
    assert modules("k", "whole") == keys
    both = modules("ffn, o", "lora")
    assert {"blocks.1.ffn.0", "blocks.1.ffn.2", "blocks.0.cross_attn.o", "audio_adapter.blocks.0.ffn.2"} <= both
    assert "audio_adapter.blocks.1.cross_attn.o" in both and len(both) == 2 * 4 + 2 * 3
    assert len(modules(ALL, "frozen")) == 2 * (4 + 8 + 2)


@pytest.mark.parametrize(("targets", "adapter"), [("q,w", "whole"), ("", "whole"), (ALL, "half")])
def test_unknown_words_are_one_line(targets, adapter):
    with pytest.raises(ValueError, match=r"^[^\n]+got '(w||half)'$"):
        add_lora(base(), 4, 4.0, targets, adapter, seed=0)


def test_the_start_follows_from_the_seed_alone():
    def start(seed: int) -> Tensor:
        model = base()
        torch.rand(seed)
        state = torch.get_rng_state()
        add_lora(model, 4, 4.0, "q", "frozen", seed)
        assert torch.equal(torch.get_rng_state(), state)
        return model.get_parameter("blocks.1.self_attn.q.lora_A.trained.weight")

    assert torch.equal(start(1), start(1)) and not torch.equal(start(1), start(2))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("adapter", ["whole", "lora", "frozen"])
def test_only_what_should_train_does(conditions, adapter, checkpointing):
    model = base()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    add_lora(model, 4, 8.0, ALL, adapter, seed=0)
    if checkpointing:
        model.train().enable_gradient_checkpointing()
    losses = train(model, conditions, steps=4)
    assert losses[-1] < 0.98 * losses[0]
    for name, parameter in model.named_parameters():
        trains = ".lora_" in name or (adapter == "whole" and name.startswith("audio_adapter."))
        assert (parameter.grad is not None) == trains == parameter.requires_grad, name
        if not trains:
            assert torch.equal(parameter, before[name.replace(".base_layer", "")]), name
        elif ".lora_B" in name:
            assert parameter.any(), name


@pytest.mark.parametrize("autocast", [False, True])
def test_it_trains_on_a_bfloat16_base(conditions, autocast):
    model = base().to(torch.bfloat16)
    add_lora(model, 4, 8.0, ALL, "lora", seed=0)
    losses = train(model, conditions, steps=4, autocast=autocast)
    assert losses[-1] < 0.98 * losses[0]


@pytest.mark.parametrize(("targets", "adapter"), [(ALL, "whole"), ("q,ffn", "lora"), ("v", "frozen")])
@torch.no_grad()
def test_saved_loaded_merged_and_unmerged(conditions, tmp_path, targets, adapter):
    with torch.enable_grad():
        expected = trained_file(tmp_path / "a.safetensors", conditions, targets, adapter)
    model, files = base(), [(tmp_path / "a.safetensors", 1.0)]
    plain = {name: p.clone() for name, p in model.named_parameters()}
    start = run(model, conditions)
    apply_loras(model, files)
    torch.testing.assert_close(run(model, conditions), expected, rtol=1e-5, atol=1e-5)
    assert (expected - start).abs().max() > 1e-2
    merge(model)
    assert model.state_dict().keys() == plain.keys()
    torch.testing.assert_close(run(model, conditions), expected, rtol=1e-5, atol=1e-5)
    unmerge_files(model, files)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, plain[name], rtol=0, atol=1e-6)


@torch.no_grad()
def test_several_files_with_weights_add_up(conditions, tmp_path):
    files = [(tmp_path / "a.safetensors", 0.7), (tmp_path / "b.safetensors", -1.5)]
    with torch.enable_grad():
        trained_file(files[0][0], conditions, rank=4, seed=1)
        trained_file(files[1][0], conditions, "q,k", rank=6, seed=2)
    a, b = (load_file(path) for path, _ in files)
    model = base()
    matrix, key, norm = "blocks.1.cross_attn.k_audio", "blocks.0.ffn.2", "audio_adapter.blocks.0.norm3"
    expected = {
        f"{matrix}.weight": model.get_parameter(f"{matrix}.weight")
        + 0.7 * 2 / 4 * a[f"{matrix}.lora_B.weight"] @ a[f"{matrix}.lora_A.weight"]
        - 1.5 * 2 / 6 * b[f"{matrix}.lora_B.weight"] @ b[f"{matrix}.lora_A.weight"],
        f"{key}.weight": model.get_parameter(f"{key}.weight") + 0.7 * 0.5 * a[f"{key}.lora_B.weight"] @ a[f"{key}.lora_A.weight"],
        f"{norm}.weight": model.get_parameter(f"{norm}.weight") + 0.7 * a[f"{norm}.diff"] - 1.5 * b[f"{norm}.diff"],
        f"{norm}.bias": model.get_parameter(f"{norm}.bias") + 0.7 * a[f"{norm}.diff_b"] - 1.5 * b[f"{norm}.diff_b"],
    }
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        apply_loras(model, files)
    beside = run(model, conditions)
    merge(model)
    for name, value in expected.items():
        torch.testing.assert_close(model.get_parameter(name), value, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(run(model, conditions), beside, rtol=1e-5, atol=1e-5)


def test_the_file_says_what_it_is(conditions, tmp_path):
    trained_file(tmp_path / "a.safetensors", conditions)
    about, tensors = read_about(tmp_path / "a.safetensors"), load_file(tmp_path / "a.safetensors")
    assert (about["rank"], about["alpha"], about["targets"], about["adapter"], about["step"]) == (4, 2.0, ALL, "whole", 3)
    assert about["transformer"]["num_heads"] == 4 and len(about["base"]) == 16
    assert tensors["blocks.0.self_attn.q.alpha"] == 2 and tensors["blocks.0.self_attn.q.lora_A.weight"].shape == (4, 64)
    whole = {name for name in tensors if name.startswith("audio_adapter.")}
    assert len(whole) == len(list(base().audio_adapter.parameters())) and {name.rpartition(".")[2] for name in whole} == {"diff", "diff_b"}


def test_an_average_can_be_saved_instead_and_in_bfloat16(conditions, tmp_path):
    model = base()
    lora = add_lora(model, 4, 4.0, "q", "whole", seed=0)
    doubled = {name: p.detach() * 2 for name, p in model.named_parameters() if p.requires_grad}
    tensors = lora.tensors(doubled.items(), torch.bfloat16)
    name = "audio_adapter.blocks.0.ffn.0"
    torch.testing.assert_close(tensors[f"{name}.diff"], base().get_parameter(f"{name}.weight").bfloat16())
    assert tensors["blocks.0.self_attn.q.lora_A.weight"].dtype == torch.bfloat16


@pytest.mark.parametrize("changes", [{}, {"audio_hidden_dims": (48,)}])
@torch.no_grad()
def test_exported_to_released_names_and_loaded_again(conditions, tmp_path, changes):
    model = base(**changes)
    with torch.enable_grad():
        lora = add_lora(model, 4, 2.0, ALL, "whole", seed=0)
        train(model, conditions)
    lora.save(tmp_path / "ours.safetensors", model.named_parameters(), 3)
    export_lora(tmp_path / "ours.safetensors", tmp_path / "released.safetensors")
    names = load_file(tmp_path / "released.safetensors").keys()
    assert all(name.startswith("diffusion_model.") for name in names)
    assert {"diffusion_model.blocks.0.cross_attn.k_vocal.lora_A.weight", "diffusion_model.vocal_projector.final_head.final_proj.diff",
            "diffusion_model.vocal_projector.blocks.1.modulation.diff", "diffusion_model.blocks.1.ffn.2.alpha"} <= names  # fmt: skip
    released = {f"diffusion_model.{name}" for name in export_state_dict(base(**changes))}
    assert {name.replace(".diff_b", ".bias") for name in names if name.endswith(".diff_b")} <= released
    again = base(**changes)
    merge_files(again, [(tmp_path / "released.safetensors", 1.0)])
    torch.testing.assert_close(run(again, conditions), run(model, conditions), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_file_of_another_tool(tmp_path):
    """lora_down and lora_up, ranks and alphas that differ, an alpha of one axis, no alpha at all."""
    generator = torch.Generator().manual_seed(0)
    q, k, o = ([torch.randn(rank, 64, generator=generator), torch.randn(64, rank, generator=generator)] for rank in (2, 3, 2))
    names = [f"diffusion_model.blocks.0.cross_attn.{name}" for name in ("q", "k_vocal", "o")]
    tensors = {f"{names[0]}.lora_down.weight": q[0], f"{names[0]}.lora_up.weight": q[1], f"{names[0]}.alpha": torch.tensor([1.0])}
    tensors |= {f"{names[1]}.lora_A.weight": k[0], f"{names[1]}.lora_B.weight": k[1], f"{names[1]}.alpha": torch.tensor(6.0)}
    tensors |= {f"{names[2]}.lora_A.weight": o[0].half(), f"{names[2]}.lora_B.weight": o[1].half()}
    save_file(tensors, tmp_path / "a.safetensors")
    model, expected = base(), base().blocks[0].cross_attn
    merge_files(model, [(tmp_path / "a.safetensors", 1.0)])
    found = model.blocks[0].cross_attn
    torch.testing.assert_close(found.q.weight, expected.q.weight + 0.5 * q[1] @ q[0])
    torch.testing.assert_close(found.k_audio.weight, expected.k_audio.weight + 2 * k[1] @ k[0])
    torch.testing.assert_close(found.o.weight, expected.o.weight + o[1].half().float() @ o[0].half().float())
    assert torch.equal(found.k.weight, expected.k.weight)


A, B = "blocks.0.self_attn.q.lora_A.weight", "blocks.0.self_attn.q.lora_B.weight"
GOOD = {A: (2, 64), B: (64, 2)}


@pytest.mark.parametrize(
    ("shapes", "words"),
    [
        ({A: (2, 32), B: (64, 2)}, (A, "shape [2, 32]", "another width")),
        ({A: (2, 64), B: (64, 3)}, (B, "expected [64, 2]")),
        ({A: (2, 64)}, (A, "lacks its counterpart")),
        ({"blocks.0.self_attn.q.alpha": ()}, ("lacks its counterpart",)),
        (GOOD | {"blocks.0.self_attn.q.alpha": (2,)}, ("alpha has shape [2]",)),
        (GOOD | {"blocks.7.self_attn.q.lora_A.weight": (2, 64)}, ("blocks.7.self_attn.q.lora_A.weight", "no place")),
        (GOOD | {"blocks.0.self_attn.q.weight": (64, 64)}, ("'blocks.0.self_attn.q.weight'", "no LoRA file")),
        (GOOD | {"blocks.0.self_attn.q.dora_scale": (64,)}, ("dora_scale",)),
        (GOOD | {"lora_unet_blocks_0_self_attn_q.lora_A.weight": (2, 64)}, ("no place",)),
        (GOOD | {"diffusion_model.blocks.0.self_attn.q.lora_down.weight": (2, 64)}, ("same place",)),
        (GOOD | {"blocks.0.norm3.diff": (32,)}, ("blocks.0.norm3.diff has shape [32], expected [64]",)),
        ({"patch_embedding.lora_A.weight": (2, 36), "patch_embedding.lora_B.weight": (64, 2)}, ("than a linear",)),
    ],
)  # fmt: skip
def test_loading_is_strict(tmp_path, shapes, words):
    save_file({name: torch.zeros(shape) for name, shape in shapes.items()}, tmp_path / "a.safetensors")
    model = base()
    with pytest.raises(ValueError, match=r"^[^\n]+$") as caught:
        apply_loras(model, [(tmp_path / "a.safetensors", 1.0)])
    assert all(word in str(caught.value) for word in words), caught.value
    assert model.state_dict().keys() == base().state_dict().keys()


def test_a_file_for_another_base_is_said(conditions, tmp_path, caplog):
    trained_file(tmp_path / "a.safetensors", conditions)
    with caplog.at_level(logging.WARNING, "stableavatar"):
        merge_files(base().to(torch.bfloat16), [(tmp_path / "a.safetensors", 1.0)])
        assert "another transformer" not in caplog.text
        merge_files(base(seed=3), [(tmp_path / "a.safetensors", 1.0)])
    assert caplog.text.count("was trained on another transformer") == 1


@pytest.mark.parametrize(
    ("text", "files"),
    [
        ("", []),
        ("a.safetensors", [("a.safetensors", 1.0)]),
        ("a.safetensors:0.5, b/c.pt:-1e0", [("a.safetensors", 0.5), ("b/c.pt", -1.0)]),
        ("a:b/c.safetensors", [("a:b/c.safetensors", 1.0)]),
    ],
)
def test_lists_of_files(text, files):
    assert parse_loras(text) == [(Path(name), weight) for name, weight in files]


@pytest.mark.parametrize("text", ["a.safetensors:much", "a.safetensors:", "a.safetensors:nan"])
def test_a_weight_that_is_none(text):
    with pytest.raises(ValueError, match=r"must be a number.*a\.safetensors:"):
        parse_loras(text)


def test_names_of_differences():
    assert tensor_name("a.b.weight", "diff") == "a.b.diff" and tensor_name("a.modulation", "diff") == "a.modulation.diff"
    assert tensor_name("a.b.bias", "diff") == "a.b.diff_b" and tensor_name("a.weight", "alpha") == "a.alpha"


def write_released(path: Path, model: AvatarTransformer) -> None:
    tensors = export_state_dict(model)
    write_tensors(path, {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}, tensors.items())


@torch.no_grad()
def test_the_program_merges_a_released_file(conditions, tmp_path, capsys):
    with torch.enable_grad():
        trained_file(tmp_path / "a.safetensors", conditions)
    source = base().to(torch.bfloat16)
    write_released(tmp_path / "base.pt", source)
    paths = [str(tmp_path / name) for name in ("base.pt", "merged.safetensors", "back.pt")]
    assert program.main(["merge", *paths[:2], f"lora={tmp_path / 'a.safetensors'}:0.5"]) == 0
    merged = load_transformer(paths[1], None, config={"num_heads": 4})
    expected = base().to(torch.bfloat16)
    merge_files(expected, [(tmp_path / "a.safetensors", 0.5)])
    assert merged.dtype == torch.bfloat16
    for name, parameter in merged.named_parameters():
        assert torch.equal(parameter, expected.get_parameter(name)), name
    assert program.main(["unmerge", *paths[1:], f"lora={tmp_path / 'a.safetensors'}:0.5"]) == 0
    back = load_transformer(paths[2], None)
    for name, parameter in back.named_parameters():
        original = source.get_parameter(name)
        torch.testing.assert_close(parameter, original, rtol=2**-7, atol=2**-7 * merged.get_parameter(name).abs().max().item())


@torch.no_grad()
def test_the_program_merges_a_folder(conditions, tmp_path):
    with torch.enable_grad():
        expected = trained_file(tmp_path / "a.safetensors", conditions)
    base().save_pretrained(tmp_path / "base")
    words = [str(tmp_path / "base"), str(tmp_path / "merged"), f"lora={tmp_path / 'a.safetensors'}"]
    assert program.main(["merge", *words]) == 0
    merged = AvatarTransformer.from_pretrained(tmp_path / "merged", local_files_only=True)
    torch.testing.assert_close(run(merged, conditions), expected, rtol=1e-5, atol=1e-5)


def test_the_program_shows_and_exports(conditions, tmp_path, capsys):
    trained_file(tmp_path / "a.safetensors", conditions)
    assert program.main(["export", str(tmp_path / "a.safetensors"), str(tmp_path / "b.safetensors")]) == 0
    for name, names in (("a", "ours"), ("b", "released")):
        capsys.readouterr()
        assert program.main(["show", str(tmp_path / f"{name}.safetensors")]) == 0
        facts = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines())
        assert (facts["rank"], facts["alpha"], facts["targets"], facts["names"]) == ("4", "2.0", ALL, names)
        tensors = load_file(tmp_path / f"{name}.safetensors")
        assert int(facts["parameters"]) == sum(tensor.numel() for key, tensor in tensors.items() if not key.endswith(".alpha"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["show", "none.safetensors"], "does not exist"),
        (["show", "base.safetensors"], "no LoRA file"),
        (["merge", "base.safetensors", "out.safetensors", "none.safetensors"], "name the LoRA files as lora="),
        (["merge", "base.safetensors", "base.safetensors", "lora=a.safetensors"], "OUTPUT is TRANSFORMER itself"),
        (["merge", "base.safetensors", "out.safetensors", "lora=none.safetensors"], "does not exist"),
        (["merge", "none.safetensors", "out.safetensors", "lora=a.safetensors"], "does not exist"),
        (["merge", "wide.safetensors", "out.safetensors", "lora=a.safetensors"], "another width"),
        (["export", "plain.safetensors", "out.safetensors"], "does not say which transformer"),
        (["export", "a.safetensors", "out.pt"], "must be named .safetensors"),
    ],
)
def test_the_program_says_mistakes_in_one_line(tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    write_released(Path("base.safetensors"), base())
    write_released(Path("wide.safetensors"), base(dim=128))
    model = base()
    add_lora(model, 2, 2.0, "q", "frozen", 0).save("a.safetensors", model.named_parameters(), 0)
    save_file(load_file("a.safetensors"), "plain.safetensors")
    assert program.main(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line and not list(tmp_path.glob("out*"))


def test_the_program_runs_on_its_own(tmp_path):
    script = Path(program.__file__)
    done = subprocess.run([sys.executable, str(script), "show", "none.safetensors"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and done.stderr == "error: checkpoint none.safetensors does not exist\n"


@pytest.fixture
def lora_file(tiny_folder, conditions, tmp_path) -> Path:
    """A LoRA with a visible effect on the tiny pipeline's transformer."""
    model = AvatarTransformer.from_pretrained(tiny_folder / "transformer", local_files_only=True)
    lora: TrainedLora = add_lora(model, 4, 8.0, ALL, "whole", seed=0)
    for name, parameter in model.named_parameters():
        if ".lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    lora.save(tmp_path / "a.safetensors", model.named_parameters(), 1)
    return tmp_path / "a.safetensors"


def test_a_video_with_a_lora(pipe, tiny_folder, lora_file, portrait, make_voice, settings):
    inputs = (str(portrait), str(make_voice(3000)), "x", settings(steps=1))

    def video(lora: str) -> Tensor:
        return StableAvatarPipeline.from_config(settings(model=str(tiny_folder), lora=lora))(*inputs)

    plain = pipe(*inputs)
    assert torch.equal(video(f"{lora_file}:0"), plain)
    assert not torch.equal(video(str(lora_file)), plain)
    assert (video(f"{lora_file},{lora_file}:-1").short() - plain.short()).abs().max() <= 1


def test_a_lora_goes_with_fp8(tiny_folder, lora_file, settings):
    pipe = StableAvatarPipeline.from_config(settings(model=str(tiny_folder), lora=str(lora_file), memory__fp8=True))
    assert pipe.transformer.blocks[0].self_attn.q.weight.dtype == torch.float8_e4m3fn


def test_a_resumed_run_notices_another_lora(tiny_folder, lora_file, portrait, make_voice, settings, tmp_path):
    words = {"steps": 1, "model": str(tiny_folder), "work_dir": str(tmp_path / "work"), "save_every": 0.0}
    config = settings(**words, lora=str(lora_file))
    pipe = StableAvatarPipeline.from_config(config)
    inputs = (str(portrait), str(make_voice(20_000)), "x")
    stream = pipe.stream(*inputs, config)
    next(stream)
    stream.close()
    with pytest.raises(ValueError, match="differs in: lora"):
        next(pipe.stream(*inputs, settings(**words)))
    tensors = load_file(lora_file)
    save_file(tensors, lora_file)
    with pytest.raises(ValueError, match="differs in: weights"):
        next(pipe.stream(*inputs, config))


@pytest.fixture
def other(tiny_folder, tmp_path) -> AvatarTransformer:
    """Another transformer of the tiny pipeline's shape, saved as a folder and as a released file."""
    model = AvatarTransformer.from_config(AvatarTransformer.load_config(tiny_folder / "transformer"))
    torch.manual_seed(9)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(tmp_path / "transformer")
    write_released(tmp_path / "transformer3d.safetensors", model)
    return model


@pytest.mark.parametrize("name", ["transformer", "transformer3d.safetensors"])
def test_a_transformer_in_place_of_the_folders_own(tiny_folder, other, settings, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    pipe = StableAvatarPipeline.from_config(settings(model=str(tiny_folder), transformer=name))
    assert pipe.transformer.config.num_heads == 4 and not pipe.transformer.training
    for key, parameter in pipe.transformer.named_parameters():
        assert torch.equal(parameter, other.get_parameter(key)), key


def test_a_transformer_that_does_not_fit_is_an_error(tiny_folder, settings, tmp_path):
    base(audio_dim=48).save_pretrained(tmp_path / "folder")
    write_released(tmp_path / "file.pt", base(dim=128))
    for name, message in (("folder", "speech encoder gives 32"), ("file.pt", "of another shape")):
        with pytest.raises(ValueError, match=message):
            StableAvatarPipeline.from_config(settings(model=str(tiny_folder), transformer=str(tmp_path / name)))


def words(*more: str) -> list[str]:
    puppet = Path(inference.__file__).parent / "configs/inference/puppet.yaml"
    return [str(puppet), "audio=voice.wav", "output=out.mp4", "width=64", "height=64", "steps=1", "guidance.name=none", *more]


def test_inference_py_takes_both(tiny_folder, other, lora_file, portrait, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    soundfile.write("voice.wav", torch.rand(3000).numpy() - 0.5, 16_000)
    given = [f"model={tiny_folder}", f"reference={portrait}", "transformer=transformer", "lora=a.safetensors:0.5"]
    assert inference.main(words(*given)) == 0
    record = json.loads(Path("out.json").read_text())["settings"]
    assert (record["lora"], record["transformer"]) == ("a.safetensors:0.5", "transformer")


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("lora=none.safetensors", "none.safetensors does not exist"),
        ("lora=voice.wav", "voice.wav"),
        ("lora=other.safetensors", "no LoRA file"),
        ("lora=a.safetensors:x", "must be a number"),
        ("transformer=nowhere", "transformer nowhere does not exist"),
    ],
)
def test_mistakes_show_before_any_weights_load(tiny_folder, portrait, tmp_path, monkeypatch, caplog, word, message):
    monkeypatch.chdir(tmp_path)
    soundfile.write("voice.wav", torch.rand(3000).numpy() - 0.5, 16_000)
    save_file({"a.weight": torch.zeros(1)}, "other.safetensors")
    monkeypatch.setattr(StableAvatarPipeline, "from_config", lambda *_: pytest.fail("weights were loaded"))
    assert inference.main(words(f"model={tiny_folder}", f"reference={portrait}", word)) == 2
    (line,) = [entry.getMessage() for entry in caplog.records if entry.levelno >= logging.ERROR]
    assert message in line and "\n" not in line


def test_the_header_is_plain_safetensors(conditions, tmp_path):
    trained_file(tmp_path / "a.safetensors", conditions)
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert file.metadata()["format"] == "pt"
    lora = read_lora(tmp_path / "a.safetensors", base())
    assert len(lora.matrices) == 28 and all(up.dtype == torch.float32 for _, up in lora.matrices.values())
