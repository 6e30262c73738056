"""The network: identities that hold for any weights."""

from dataclasses import replace

import pytest
import torch
from diffusers import WanTransformer3DModel
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from make_tiny_model import tiny_transformer
from peft import LoraConfig

from stableavatar.geometry import AUDIO_WIDENING, audio_slices, latents_to_frames
from stableavatar.models import kernels
from stableavatar.models.audio_adapter import VARIANTS, slice_frames, slot_embedding
from stableavatar.models.cache import KVCache
from stableavatar.models.dit import AudioFeatures, AudioTokens, AvatarTransformer, Conditions
from stableavatar.models.layout import TokenLayout


def noise(batch: int = 1, frames: int = 3, height: int = 4, width: int = 6, seed: int = 1) -> torch.Tensor:
    return torch.randn((batch, 16, frames, height, width), generator=torch.Generator().manual_seed(seed))


def rows(conditions: Conditions, index: int) -> Conditions:
    one = slice(index, index + 1)
    audio = replace(conditions.audio, features=conditions.audio.features[one])
    return Conditions(conditions.text[one], conditions.image[one], conditions.reference[one], audio)


@torch.no_grad()
def test_a_batch_of_two_is_two_batches_of_one(dit, make_conditions):
    conditions, latents, times = make_conditions(batch=2), noise(2), torch.tensor([900.0, 30.0])
    together = dit(latents, times, conditions, TokenLayout.full(3))
    alone = [dit(latents[i : i + 1], times[i : i + 1], rows(conditions, i), TokenLayout.full(3)) for i in range(2)]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_one_timestep_is_the_same_timestep_for_every_frame(dit, make_conditions):
    conditions, latents = make_conditions(), noise()
    scalar = dit(latents, torch.tensor([500.0]), conditions, TokenLayout.full(3))
    per_frame = dit(latents, torch.full((1, 3), 500.0), conditions, TokenLayout.full(3))
    torch.testing.assert_close(scalar, per_frame, atol=1e-5, rtol=1e-5)
    mixed = dit(latents, torch.tensor([[0.0, 500.0, 500.0]]), conditions, TokenLayout.full(3))
    assert (mixed - scalar).abs().max() > 1e-3


@torch.no_grad()
def test_only_distances_in_time_matter_and_they_do(dit, make_conditions):
    conditions, latents, times = make_conditions(), noise(), torch.tensor([500.0])
    plain = dit(latents, times, conditions, TokenLayout.full(3))
    shifted = dit(latents, times, conditions, TokenLayout((-7.5, -6.5, -5.5)))
    torch.testing.assert_close(plain, shifted, atol=1e-4, rtol=1e-4)
    stretched = dit(latents, times, conditions, TokenLayout((0.0, 4.0, 8.0)))
    assert (stretched - plain).abs().max() > 1e-4


def block_causal(frames: int) -> TokenLayout:
    plan = tuple((slice(i, i + 1), (slice(0, i + 1),)) for i in range(frames))
    return replace(TokenLayout.full(frames), plan=plan)


@torch.no_grad()
def test_frame_by_frame_with_a_cache_is_one_block_causal_pass(dit, make_conditions):
    latents, times, frames = noise(), torch.tensor([500.0]), 3
    conditions = make_conditions()
    patches = dit.embed_patches(latents, conditions.reference)
    tokens = dit.refine_audio(conditions.audio, patches, *dit.embed_time(times))
    conditions = replace(conditions, audio=tokens)
    at_once = dit(latents, times, conditions, block_causal(frames))
    cache, parts = KVCache(), []
    for i in range(frames):
        one = AudioTokens(tokens.tokens[:, i : i + 1], tokens.lengths[i : i + 1])
        part = replace(conditions, reference=conditions.reference[:, :, i : i + 1], audio=one)
        parts.append(dit(latents[:, :, i : i + 1], times, part, TokenLayout((float(i),)), cache))
    torch.testing.assert_close(at_once, torch.cat(parts, dim=2), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_cache_that_does_not_record_stays_as_it_is(dit, make_conditions):
    latents, times, conditions, cache = noise(), torch.tensor([500.0]), make_conditions(), KVCache()
    cache.recording = False
    first = dit(latents, times, conditions, TokenLayout.full(3), cache)
    assert torch.equal(first, dit(latents, times, conditions, TokenLayout.full(3), cache))


def test_a_recording_cache_and_gradient_checkpointing_agree(dit, make_conditions):
    """The recomputed block must not find its own keys among the past ones."""
    conditions, dropped = make_conditions(), torch.tensor([500.0])

    def gradient() -> torch.Tensor:
        dit.zero_grad()
        dit(noise(), dropped, conditions, TokenLayout.full(3), KVCache()).square().mean().backward()
        return dit.blocks[0].self_attn.k.weight.grad.clone()

    plain = gradient()
    dit.enable_gradient_checkpointing()
    torch.testing.assert_close(plain, gradient())


def test_the_time_embedding_is_float32_under_autocast(dit):
    times = torch.tensor([437.0])
    with torch.autocast("cpu", torch.bfloat16):
        inside = dit.embed_time(times)
    assert all(torch.equal(a, b) for a, b in zip(inside, dit.embed_time(times), strict=True))


def dense(plan, length: int) -> torch.Tensor:
    mask = torch.zeros(length, length, dtype=torch.bool)
    for queries, keys in plan:
        for span in keys:
            mask[queries, span] = True
    return mask


def test_rectangles_equal_a_dense_mask():
    plan = TokenLayout.full(4)
    plan = replace(plan, plan=((slice(0, 1), (slice(0, 1),)), (slice(1, 4), (slice(0, 1), slice(2, 4))))).token_plan(5)
    q, k, v = (torch.randn(2, 20, 3, 8) for _ in range(3))
    expected = torch.nn.functional.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=dense(plan, 20)
    ).transpose(1, 2)
    torch.testing.assert_close(kernels.attend(q, k, v, plan), expected)


@pytest.mark.parametrize("plan", [((slice(0, 2), (slice(0, 3),)),), ((slice(1, 3), (slice(0, 3),)),)])
def test_a_plan_with_gaps_is_refused(plan):
    with pytest.raises(ValueError, match="must cover"):
        TokenLayout((0.0, 1.0, 2.0), plan)


@torch.no_grad()
def test_zero_audio_weights_give_plain_wan(make_conditions):
    torch.manual_seed(3)
    ours = AvatarTransformer(
        dim=48, num_heads=4, num_layers=2, ffn_dim=96, freq_dim=32, text_dim=32, image_dim=32, audio_dim=32
    ).eval()
    trunk = {k: v for k, v in ours.state_dict().items() if "audio" not in k}
    theirs = WanTransformer3DModel(
        num_attention_heads=4, attention_head_dim=12, in_channels=36, out_channels=16, text_dim=32, freq_dim=32, ffn_dim=96,
        num_layers=2, image_dim=32, added_kv_proj_dim=48, rope_max_seq_len=64,
    ).eval()  # fmt: skip
    theirs.load_state_dict(convert_wan_transformer_to_diffusers(dict(trunk)))
    conditions, latents, times = make_conditions(batch=2), noise(2), torch.tensor([900.0, 30.0])
    conditions = replace(conditions, text=torch.randn(2, 512, 32))  # the library's class takes 512 text tokens for granted
    expected = theirs(torch.cat([latents, conditions.reference], 1), times, conditions.text, conditions.image).sample
    torch.testing.assert_close(ours(latents, times, conditions, TokenLayout.full(3)), expected, atol=2e-5, rtol=2e-5)


@torch.no_grad()
def test_audio_is_local_in_time_unless_clip_level(dit, make_conditions):
    conditions, latents, times = make_conditions(frames=4), noise(frames=4), torch.tensor([500.0])
    patches = dit.embed_patches(latents, conditions.reference)
    tokens = dit.refine_audio(conditions.audio, patches, *dit.embed_time(times))
    other = AudioTokens(tokens.tokens.clone(), tokens.lengths)
    other.tokens[:, 3] += 1
    attention, x = dit.blocks[0].cross_attn, dit.blocks[0].norm3(patches)

    def attend(audio: AudioTokens, clip_audio: bool) -> torch.Tensor:
        context = dit.embed_conditions(replace(conditions, audio=audio), patches, *dit.embed_time(times))
        return attention(x, context, TokenLayout.full(4, clip_audio))

    local = (attend(tokens, False) - attend(other, False)).abs().amax((0, 2, 3))
    assert torch.equal(local[:3], torch.zeros(3)) and local[3] > 1e-3
    assert (attend(tokens, True) - attend(other, True)).abs().amax((0, 2, 3)).min() > 1e-4


@torch.no_grad()
def test_dropped_audio_is_zero_refined_tokens(dit, make_conditions):
    conditions, latents, times = make_conditions(batch=2), noise(2), torch.tensor([500.0, 500.0])
    dropped = replace(conditions, audio=AudioFeatures(conditions.audio.features, torch.tensor([1.0, 0.0])))
    kept, zero = dit(latents, times, conditions, TokenLayout.full(3)), dit(latents, times, dropped, TokenLayout.full(3))
    torch.testing.assert_close(kept[0], zero[0])
    lengths = torch.full((3,), 15)
    tokens = replace(rows(conditions, 1), audio=AudioTokens(torch.zeros(1, 3, 15, 64), lengths))
    torch.testing.assert_close(zero[1:], dit(latents[1:], times[1:], tokens, TokenLayout.full(3)), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("tokens, frames", [(161, 21), (1, 1), (81, 11), (40, 6), (9, 2)])
def test_audio_slices_put_padding_right(tokens, frames):
    audio = torch.arange(1.0, tokens + 1).view(1, tokens, 1)
    slices, lengths = slice_frames(audio, frames)
    for row, length in zip(slices[0, :, :, 0], lengths.tolist(), strict=True):
        assert row[:length].min() >= 1 and not row[length:].any()
        assert torch.equal(row[:length].diff(), torch.ones(max(0, length - 1)))
    assert slices.shape[1] == frames and lengths.max() > 0
    assert latents_to_frames(frames) == 4 * (frames - 1) + 1


def velocity(model: AvatarTransformer, conditions: Conditions, time: float = 500.0) -> torch.Tensor:
    with torch.no_grad():
        return model(noise(), torch.tensor([time]), conditions, TokenLayout.full(3))


@pytest.mark.parametrize("variant", VARIANTS)
def test_adapter_variants_differ_where_the_tables_say(variant, make_conditions):
    torch.manual_seed(0)
    model, conditions = tiny_transformer(adapter=variant), make_conditions()
    patches = model.embed_patches(noise(), conditions.reference)
    early, late = (model.embed_time(torch.tensor([t])) for t in (10.0, 900.0))
    with torch.no_grad():
        reference = model.refine_audio(conditions.audio, patches, *early).tokens
        by_time = (model.refine_audio(conditions.audio, patches, *late).tokens - reference).abs().max()
        by_latents = (model.refine_audio(conditions.audio, patches + 1, *early).tokens - reference).abs().max()
    assert (by_time > 1e-4) == (variant in ("full", "no_cross_attention"))
    assert (by_latents > 1e-4) == (variant in ("full", "no_modulation", "random_modulation"))
    names = {name for name, _ in model.named_parameters() if "audio_adapter" in name}
    assert any("modulation" in name for name in names) == (variant not in ("none", "no_modulation"))


@pytest.mark.parametrize("ordered", [False, True])
def test_only_audio_positions_tell_the_order_of_sounds(ordered, make_conditions):
    torch.manual_seed(0)
    model, conditions = tiny_transformer(audio_positions=ordered, mask_audio_padding=True), make_conditions(frames=1)
    for block in model.blocks:
        torch.nn.init.normal_(block.cross_attn.k_audio.weight, std=0.3)
        torch.nn.init.normal_(block.cross_attn.v_audio.weight, std=0.3)
    sounds = torch.randn(1, 6, 32)  # all of one slice
    conditions, backwards = (replace(conditions, audio=AudioFeatures(heard)) for heard in (sounds, sounds.flip(1)))
    with torch.no_grad():
        one, other = (model(noise()[:, :, :1], torch.tensor([500.0]), told, TokenLayout.full(1)) for told in (conditions, backwards))
    assert torch.allclose(one, other, atol=1e-5) == (not ordered)


def test_slots_count_from_where_a_slice_would_begin():
    total, frames = 41, 6
    tokens, lengths = slice_frames(torch.arange(float(total)).view(1, total, 1), frames)
    told, table = slot_embedding(total, frames, tokens.shape[2], 8), slot_embedding(4000, 500, 40, 8)[250]
    for frame, (start, _) in enumerate(audio_slices(total, latents_to_frames(frames))):
        for place in range(lengths[frame]):
            slot = int(tokens[0, frame, place, 0]) - (start - AUDIO_WIDENING)
            torch.testing.assert_close(told[frame, place], table[slot])


def test_an_unknown_variant_is_an_error():
    with pytest.raises(ValueError, match="expected one of"):
        tiny_transformer(adapter="fancy")


def test_masking_padding_changes_only_padded_frames(make_conditions):
    torch.manual_seed(0)
    seen, hidden = tiny_transformer(), tiny_transformer(mask_audio_padding=True)
    hidden.load_state_dict(seen.state_dict())
    conditions = make_conditions()
    assert (velocity(seen, conditions) - velocity(hidden, conditions)).abs().max() > 1e-5
    tokens = AudioTokens(torch.randn(1, 3, 15, 64), torch.full((3,), 15))
    full = replace(conditions, audio=tokens)
    torch.testing.assert_close(velocity(seen, full), velocity(hidden, full), atol=1e-5, rtol=1e-5)
    short = replace(conditions, audio=replace(tokens, lengths=torch.tensor([15, 4, 15])))
    garbage = tokens.tokens.clone()
    garbage[:, 1, 4:] = 50
    torch.testing.assert_close(
        velocity(hidden, short), velocity(hidden, replace(short, audio=replace(short.audio, tokens=garbage))), atol=1e-5, rtol=1e-5
    )


def test_save_and_load_give_the_same_model(dit, make_conditions, tmp_path):
    dit.save_pretrained(tmp_path)
    again = AvatarTransformer.from_pretrained(tmp_path)
    assert torch.equal(velocity(dit, make_conditions()), velocity(again, make_conditions()))


def test_gradient_checkpointing_gives_the_same_gradients(dit, make_conditions):
    def gradients() -> list[torch.Tensor]:
        dit.zero_grad()
        dit(noise(), torch.tensor([500.0]), make_conditions(), TokenLayout.full(3)).square().mean().backward()
        return [p.grad.clone() for p in dit.parameters() if p.grad is not None]

    plain = gradients()
    dit.enable_gradient_checkpointing()
    for before, after in zip(plain, gradients(), strict=True):
        torch.testing.assert_close(before, after)


def test_every_parameter_learns(dit, make_conditions):
    dit(noise(), torch.tensor([500.0]), make_conditions(), TokenLayout.full(3)).square().mean().backward()
    assert [name for name, p in dit.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_a_lora_starts_as_the_model_and_can_be_trained(dit, make_conditions):
    before = velocity(dit, make_conditions())
    dit.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=["q", "k", "v", "o", "ffn.0", "ffn.2"]))
    torch.testing.assert_close(before, velocity(dit, make_conditions()), atol=1e-5, rtol=1e-5)
    trainable = [name for name, p in dit.named_parameters() if p.requires_grad]
    assert trainable and all("lora" in name for name in trainable)


def test_float32_parts_stay_float32_when_loaded_in_bfloat16(dit, make_conditions, tmp_path):
    exact = velocity(dit, make_conditions())
    dit.save_pretrained(tmp_path)
    half = AvatarTransformer.from_pretrained(tmp_path, dtype=torch.bfloat16)
    kinds = {name: p.dtype for name, p in half.named_parameters()}
    assert kinds["blocks.0.modulation"] == kinds["time_embedding.0.weight"] == torch.float32
    assert kinds["blocks.0.self_attn.q.weight"] == torch.bfloat16
    assert (velocity(half, make_conditions()).float() - exact).abs().max() < 0.05 * exact.abs().max()


def test_eight_bit_storage_stays_close(dit, make_conditions):
    exact = velocity(dit, make_conditions())
    dit.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    assert dit.blocks[0].ffn[0].weight.dtype == torch.float8_e4m3fn
    difference = (velocity(dit, make_conditions()) - exact).abs().max()
    assert 0 < difference < 0.2 * exact.abs().max()


@pytest.mark.parametrize("backend", ["native", "_native_math", "_native_flash", "flex"])
def test_every_backend_that_runs_here_agrees(backend, dit, make_conditions):
    conditions = make_conditions()
    reference = velocity(dit, conditions)
    dit.set_attention_backend(backend)
    torch.testing.assert_close(velocity(dit, conditions), reference, atol=1e-5, rtol=1e-5)


def test_an_unknown_backend_is_an_error(dit):
    with pytest.raises(ValueError, match="expected one of"):
        dit.set_attention_backend("quick")


@pytest.mark.parametrize("backend", ["flash", "sage", "_native_cudnn", "flash_hub"])
def test_a_backend_that_cannot_run_here_is_one_line(backend):
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="attention backend"):
            kernels.check_backend(backend, torch.device("cpu"), torch.float32)
    kernels.check_backend("native", torch.device("cpu"), torch.bfloat16)


def test_compiled_blocks_agree(dit, make_conditions):
    conditions = make_conditions()
    reference = velocity(dit, conditions)
    dit.compile_repeated_blocks()
    torch.testing.assert_close(velocity(dit, conditions), reference, atol=1e-4, rtol=1e-4)


def test_a_tiny_model_overfits_one_sample(dit, make_conditions):
    conditions, latents, times = make_conditions(), noise(), torch.tensor([500.0])
    target = noise(seed=9)
    optimizer = torch.optim.Adam(dit.parameters(), 3e-3)
    losses = []
    for _ in range(60):
        loss = (dit(latents, times, conditions, TokenLayout.full(3)) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]
