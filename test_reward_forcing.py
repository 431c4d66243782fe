"""Facts about reward_forcing.py, in file order. `pytest test_reward_forcing.py`, about a minute on two cores."""
import itertools
import json
import math
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import reward_forcing as rf
from reward_forcing import BadInput, Config, EMASinkCache, PRESETS, VideoTransformer, rollout

HERE = Path(__file__).parent
TOY = PRESETS["toy"]
SMALL = replace(TOY, dim=24, ffn_dim=32, heads=2, layers=2, height=16, width=24, text_dim=16, window=9)   # 6 tokens per frame


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def data():
    clips, captions = rf.load_clips(HERE / "tiny_data", TOY)
    return torch.stack(clips), captions


def random_model(cfg, dtype=torch.float64):
    """Every parameter random and of a size that matters, norms, gates and head included."""
    model = VideoTransformer(cfg).to(dtype).requires_grad_(False)
    for name, p in model.named_parameters():
        p.normal_(1.0 if "norm" in name and "weight" in name else 0.0, 0.3 if p.dim() < 2 else p.shape[-1] ** -0.5)
    return model


def noise_of(cfg, batch, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return lambda: torch.randn(batch, cfg.chunk, *cfg.latent, generator=generator, dtype=dtype)


def per_sample(numbers):
    """(B,) as a factor of (B, F, C, h, w)."""
    return numbers[:, None, None, None, None]


# ------------------------------------------------------------------------------------------------ Config and flags
def test_every_config_field_is_a_flag_with_help():
    helps = subprocess.run([sys.executable, HERE / "reward_forcing.py", "--help"], capture_output=True, text=True, check=True).stdout
    for f in fields(Config):
        assert re.search(rf"--{f.name.replace('_', '-')} [A-Z_]+\s+\w[^\[]{{10,}}\[toy:", helps), f.name


@pytest.mark.parametrize("change, mend", [
    ({"clip": 10}, "clip=10 is not a multiple of chunk=3: try 9 or 12"), ({"window": 5}, "--window 9"),
    ({"sink": -1}, "0 or more"), ({"chunk": 0}, "chunk=0 must be 1 or more"), ({"shift": 0.0}, "above 0"),
    ({"guidance": math.inf}, "guidance=inf must be finite"), ({"seed": 2 ** 63}, "must be below 2"), ({"beta": math.nan}, "beta=nan"),
    ({"channels": 64}, "more than the 48"), ({"freq_dim": 65}, "64 or 66"), ({"critic_ratio": 0}, "critic_ratio=0"), ({"alpha": 1.5}, "between 0 and 1"), ({"beta": 0.0}, "--beta inf"), ({"dim": 130}, "128"),
    ({"height": 20}, "try 16 or 24"), ({"sample_steps": 10}, "try 8 or 12"), ({"heads": 32}, "RoPE")])
def test_impossible_config_is_refused_with_the_mend(change, mend):
    with pytest.raises(BadInput, match=mend.replace("(", ".")):
        replace(TOY, **change)


# ----------------------------------------------------------------------------------------------------- Noise maths
def test_x0_is_recovered_from_a_perfect_velocity():
    x0, noise = torch.randn(2, 3, 4, dtype=torch.float64), torch.randn(2, 3, 4, dtype=torch.float64)
    for sigma in torch.tensor([[0.0, 0.3], [1.0, 0.0]], dtype=torch.float64):
        assert torch.allclose(rf.recover_x0(rf.add_noise(x0, noise, sigma), noise - x0, sigma), x0, atol=1e-12)


def test_schedule_starts_at_pure_noise_and_matches_the_papers_levels():
    assert np.allclose(replace(TOY, shift=5.0).sigmas, [1, 0.9375, 5 / 6, 0.625])


# ------------------------------------------------------------------------------------------------------------ Data
def test_tiny_data_is_what_its_script_draws_byte_for_byte(tmp_path):
    subprocess.run([sys.executable, HERE / "tiny_data" / "make.py", tmp_path], check=True)
    drawn = sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*") if p.is_file())
    assert len(drawn) == 121
    for name in drawn:
        ours, theirs = HERE / "tiny_data" / name, tmp_path / name
        if name.suffix == ".json":
            assert ours.read_text() == theirs.read_text()
        elif ours.read_bytes() != theirs.read_bytes():      # another zlib packs otherwise; the pixels may not differ
            assert torch.equal(rf.read_frames(ours, (24, 24)), rf.read_frames(theirs, (24, 24))), name


def test_tiny_data_is_small():
    assert sum(p.stat().st_size for p in (HERE / "tiny_data/clips").iterdir()) < 2e6


def test_strips_and_animations_load_alike_and_other_sizes_are_cropped(tmp_path):
    frames = rf.read_frames(HERE / "tiny_data/clips/red_square_3.png", (24, 24))
    Image.fromarray(torch.cat(list(frames), 2).permute(1, 2, 0).numpy()).save(tmp_path / "strip.png")
    assert torch.equal(rf.read_frames(tmp_path / "strip.png", (24, 24)), frames)
    assert rf.read_frames(tmp_path / "strip.png", (16, 8)).shape == (48, 3, 8, 16)


def test_broken_data_is_refused_by_file_name(tmp_path):
    def refused(match):
        with pytest.raises(BadInput, match=match):
            rf.load_clips(tmp_path, TOY)
    refused("captions.json.*No such file")
    for text in ("[", "{}", '[{"file": "a.png"}]', "[]", '[{"file": "a.png", "caption": 5}]'):
        (tmp_path / "captions.json").write_text(text)
        refused("captions.json")
    (tmp_path / "captions.json").write_text('[{"file": "a.png", "caption": "a red circle"}]')
    refused("'a red circle'.*a.png.*No such file")
    clip = (HERE / "tiny_data/clips/red_square_3.png").read_bytes()
    (tmp_path / "a.png").write_bytes(clip[:len(clip) // 2])
    refused("a.png")
    Image.new("RGB", (96, 24)).save(tmp_path / "a.png")
    refused("a.png has 4 frames")


def test_codec_returns_the_pixels_near_enough_for_the_tracker(data):
    codec = rf.PatchCodec.fit(TOY, data[0])
    latents = codec.encode(data[0])
    assert latents.shape == (120, 48, 16, 6, 6) and abs(latents.std() - 1) < 0.05
    decoded = codec.decode(latents)
    assert 10 * math.log10(255 ** 2 / (decoded.float() - data[0].float()).square().mean()) > 29    # dB
    seen = rf.measure(decoded, data[1], TOY)
    assert seen["colour"] == 1 and seen["shape"] > 0.99


def test_codec_without_compression_is_exact(data):
    codec = rf.PatchCodec.fit(replace(TOY, channels=48), data[0][:, ::8])
    assert torch.equal(codec.decode(codec.encode(data[0][:4])), data[0][:4])


def test_unknown_word_is_refused_with_the_known_ones():
    text = rf.WordText(TOY, ["a red circle", "a blue square"])
    with pytest.raises(BadInput, match="'purple'.*a, blue, circle, red, square"):
        text(["a purple circle"])
    assert text(["a red circle"]).sum() == 3 and text([""]).abs().sum() == 0


# ----------------------------------------------------------------------------------------------------------- Model
def test_unpatchify_inverts_patchify():
    x = torch.randn(2, 3, 5, 4, 6)
    vectors = rf.patchify(x).unflatten(-1, (5, 4)).transpose(-1, -2).flatten(-2)      # (C, ph, pw) to (ph, pw, C)
    assert torch.equal(rf.unpatchify(vectors, rows=2), x)


def test_patchify_feeds_the_embedding_as_a_convolution_would():
    model, x = VideoTransformer(SMALL), torch.randn(1, 3, *SMALL.latent)
    tokens = torch.nn.functional.linear(rf.patchify(x), model.patch_embedding.weight.flatten(1), model.patch_embedding.bias)
    assert torch.allclose(tokens.flatten(1, 2), model.patch_embedding(x.transpose(1, 2)).flatten(2).mT, atol=1e-5)


def test_rope_scores_depend_on_relative_position_only():
    table = rf.rope_table(9, 2, 3, 24, 100.0).double()
    q, k = torch.randn(2, 1, 18, 1, 24, dtype=torch.float64)
    score = lambda start: (rf.rotate(q, table[:, start:start + 18]) * rf.rotate(k, table[:, start + 6:start + 24])).sum(-1)
    assert torch.allclose(score(0), score(24), atol=1e-5) and not torch.allclose(score(0), (q * k).sum(-1), atol=1e-2)


def test_full_preset_is_wan_1_3b():
    with torch.device("meta"):
        model = VideoTransformer(PRESETS["full"])
    state = model.state_dict()
    assert len(state) == 825 and sum(p.numel() for p in state.values()) == 1_418_996_800
    assert PRESETS["full"].tokens == 1560


# --------------------------------------------------------------------------- Cache and rollout against a slow twin
def slow_attention(attention, q, k, v):
    out = torch.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5
    return attention.o(torch.einsum("bhqk,bkhd->bqhd", out.softmax(-1), v).flatten(2))


def slow_rope(x, positions, cfg):
    """x (B, frames*N, H, D) with the given frame positions, by complex numbers."""
    D, tokens = cfg.head_dim, []
    for f in positions:
        for r in range(cfg.rows):
            for c in range(cfg.cols):
                band = 2 * (D // 6)
                tokens.append([f * cfg.rope_base ** (-2 * i / (D - 2 * band)) for i in range((D - 2 * band) // 2)]
                              + [p * cfg.rope_base ** (-2 * i / band) for p in (r, c) for i in range(band // 2)])
    turn = torch.polar(torch.ones(len(tokens), 1, D // 2, dtype=torch.float64), torch.tensor(tokens, dtype=torch.float64)[:, None])
    return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * turn).flatten(-2).type_as(x)


def slow_pass(model, x, sigma, text, history):
    """One plainly written pass of a chunk. history[layer]: clean (k, v) of every earlier frame; the window is worked out anew.

    Returns the velocity and every layer's own (k, v). Written from the paper, for float64.
    """
    cfg = model.cfg
    time = model.time_embedding(model.embed_sigma(sigma))[:, None]
    modulation = model.time_projection(time).unflatten(-1, (6, -1))
    x = torch.nn.functional.linear(rf.patchify(x), model.patch_embedding.weight.flatten(1), model.patch_embedding.bias)
    shape, own = x.shape, []
    norm = lambda x: torch.nn.functional.layer_norm(x, x.shape[-1:], eps=1e-6)
    for layer, block in enumerate(model.blocks):
        shift1, scale1, gate1, shift2, scale2, gate2 = (block.modulation + modulation).unsqueeze(2).unbind(3)
        h = (norm(x) * (1 + scale1) + shift1).flatten(1, 2)
        q, (k, v) = block.self_attn.query(h), block.self_attn.key_value(h)
        own.append((k, v))
        past, keep = history[layer], max(0, cfg.window - cfg.sink - cfg.chunk)
        sink = [frame for frame in past[:cfg.sink]]
        gone = range(cfg.sink, max(cfg.sink, len(past) - keep))
        for f in gone if cfg.sink else []:
            sink[f % cfg.sink] = tuple(cfg.alpha * s + (1 - cfg.alpha) * e for s, e in zip(sink[f % cfg.sink], past[f]))
        window = sink + past[cfg.sink:][len(gone):]
        keys, values = (torch.cat([frame[i] for frame in window] + [own[-1][i]], 1) for i in (0, 1))
        frames = keys.shape[1] // cfg.tokens
        q = slow_rope(q, range(frames - cfg.chunk, frames), cfg)
        x = x + gate1 * slow_attention(block.self_attn, q, slow_rope(keys, range(frames), cfg), values).view(shape)
        x = x + slow_attention(block.cross_attn, block.cross_attn.query(block.norm3(x).flatten(1, 2)), *text[layer]).view(shape)
        x = x + gate2 * block.ffn(norm(x) * (1 + scale2) + shift2)
    return rf.unpatchify(model.head(x, time), cfg.rows), own


def slow_rollout(model, text, cfg, draw, chunks):
    history, prompt = [[] for _ in model.blocks], model.embed_text(text)
    for _ in range(chunks):
        x = draw()
        for sigma in cfg.sigmas:
            noisy = x if sigma == 1 else (1 - sigma) * x + sigma * draw()
            x = noisy - sigma * slow_pass(model, noisy, torch.full((len(x),), sigma).double(), prompt, history)[0]
        _, own = slow_pass(model, x, torch.zeros(len(x)).double(), prompt, history)
        for layer, (k, v) in enumerate(own):
            history[layer] += zip(k.split(cfg.tokens, 1), v.split(cfg.tokens, 1))
        yield x


@pytest.mark.parametrize("change", [{}, {"sink": 0}, {"sink": 1, "window": 7}, {"sink": 4, "window": 9}, {"sink": 0, "window": 3},
                                    {"sink": 2, "window": 5}, {"chunk": 1, "sink": 3, "window": 5}, {"alpha": 1.0}])
def test_stream_equals_a_plainly_written_one_with_a_hand_written_ema(change):
    cfg = replace(SMALL, **change)
    model, text = random_model(cfg), torch.randn(2, 3, cfg.text_dim, dtype=torch.float64)
    cache = EMASinkCache(cfg, 2, dtype=torch.float64)
    fast = rollout(model, text, cfg, noise_of(cfg, 2), 7, cache=cache)
    for n, (a, b) in enumerate(zip(fast, slow_rollout(model, text, cfg, noise_of(cfg, 2), 7))):
        assert (a - b).abs().max() < 2e-5 * b.abs().max(), n    # the sink and the RoPE table are float32
    gone = max(0, 6 * cfg.chunk - cfg.sink - (cfg.window - cfg.sink - cfg.chunk))
    assert cache.updates == (gone if cfg.sink else 0)


def test_sink_of_a_bfloat16_stream_accumulates_in_float32():
    cfg = replace(SMALL, alpha=0.999)
    cache, shape = EMASinkCache(cfg, 1, dtype=torch.bfloat16), (1, cfg.chunk * cfg.tokens, cfg.heads, cfg.head_dim)
    for n in range(40):                                         # the sink starts at 1, all that leaves is 2
        cache.staged = [(torch.full(shape, 1.0 + (n > 0)).bfloat16(),) * 2] * cfg.layers
        cache.append()
    want = 2 - cfg.alpha ** (cache.updates // cfg.sink)         # in bfloat16 1 + 0.001 is 1
    assert want > 1.03 and (cache.sink - want).abs().max() < 1e-4


def test_alpha_changes_the_stream_only_once_a_frame_has_left_the_window():
    model, text = random_model(SMALL), torch.randn(1, 3, SMALL.text_dim, dtype=torch.float64)
    a, b = (list(rollout(model, text, replace(SMALL, alpha=alpha), noise_of(SMALL, 1), 5)) for alpha in (0.5, 1.0))
    assert [torch.equal(x, y) for x, y in zip(a, b)] == [True, True, True, False, False]


def test_future_frames_do_not_change_past_frames():
    model, text = random_model(SMALL), torch.randn(1, 3, SMALL.text_dim, dtype=torch.float64)
    draws = [noise_of(SMALL, 1, seed=s)() for s in range(40)]
    a = list(rollout(model, text, SMALL, iter(draws).__next__, 5))
    draws[4 * SMALL.steps] = torch.randn_like(draws[0])         # the noise that the fifth chunk starts from
    b = list(rollout(model, text, SMALL, iter(draws).__next__, 5))
    assert [torch.equal(x, y) for x, y in zip(a, b)] == [True] * 4 + [False]


def test_bidirectional_frames_do_see_the_future():
    model, x = random_model(SMALL), torch.randn(1, 6, *SMALL.latent, dtype=torch.float64)
    text, sigma = model.embed_text(torch.randn(1, 3, SMALL.text_dim).double()), torch.tensor([0.5]).double()
    changed = torch.cat([x[:, :5], torch.randn_like(x[:, 5:])], 1)
    assert (model(x, sigma, text) - model(changed, sigma, text))[:, 0].abs().max() > 1e-3


def test_training_and_streaming_update_the_sink_alike():
    model, text = random_model(SMALL, torch.float32).requires_grad_(True), torch.randn(2, 3, SMALL.text_dim)
    caches = [EMASinkCache(SMALL, 2) for _ in range(2)]
    train = list(rollout(model, text, SMALL, noise_of(SMALL, 2, torch.float32), 6, SMALL.steps - 1, caches[0]))
    play = list(rollout(model, text, SMALL, noise_of(SMALL, 2, torch.float32), 6, None, caches[1]))
    assert all(x.requires_grad and not y.requires_grad and torch.equal(x, y) for x, y in zip(train, play))
    assert torch.equal(caches[0].sink, caches[1].sink) and caches[0].updates == caches[1].updates == 9


def test_the_toys_training_clip_updates_its_sink():
    cache, cfg = EMASinkCache(TOY, 1), TOY
    list(rollout(VideoTransformer(cfg), torch.zeros(1, 3, cfg.text_dim), cfg, noise_of(cfg, 1, torch.float32), cfg.clip // cfg.chunk,
                 exit_step=0, cache=cache))
    assert cache.updates > 0


def test_only_the_exit_step_of_its_own_chunk_carries_gradient():
    model, text = random_model(SMALL).requires_grad_(True), torch.randn(1, 3, SMALL.text_dim, dtype=torch.float64)
    draws = [noise_of(SMALL, 1, seed=s)().requires_grad_() for s in range(20)]
    chunks = list(rollout(model, text, SMALL, iter(draws).__next__, 3, exit_step=1))    # draws 0, 1 | 2, 3 | 4, 5
    grads = torch.autograd.grad(chunks[2].sum(), draws[:6], allow_unused=True)
    assert [g is not None for g in grads] == [False, False, False, False, False, True]  # the re-noise of chunk 2's exit
    with torch.no_grad():
        assert not next(rollout(model, text, SMALL, noise_of(SMALL, 1), 1, exit_step=1)).requires_grad


def test_stream_memory_is_constant():
    cache = EMASinkCache(SMALL, 1)
    size, seen = [], rollout(VideoTransformer(SMALL), torch.zeros(1, 3, SMALL.text_dim), SMALL, noise_of(SMALL, 1, torch.float32), cache=cache)
    for _, _ in zip(range(40), seen):                           # chunks=None goes on for ever
        held = [cache.sink, cache.recent, *(kv for layer in cache.context + cache.staged for kv in layer)]
        size.append(sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in held}.values()))
    assert len(set(size[1:])) == 1 and cache.sink.dtype == torch.float32


# ---------------------------------------------------------------------------------------------------------- Losses
def test_dmd_gradient_is_zero_when_critic_is_teacher():
    x, real = torch.randn(2, 2, 3, 4, 4, 4)
    assert rf.dmd_gradient(x, real, real).abs().max() == 0
    assert torch.allclose(rf.dmd_gradient(x, real, x)[0], ((x - real)[0] / (x - real)[0].abs().mean()))


def test_redmd_gradient_is_weight_times_gradient_over_numel_and_the_reward_is_per_sample():
    x = torch.randn(3, 2, 4, 4, 4, dtype=torch.float64, requires_grad=True)
    gradient, reward = torch.randn_like(x), torch.tensor([0.0, 1.0, -2.0], dtype=torch.float64)
    rf.redmd_loss(x, gradient, reward, beta=0.5).backward()
    want = per_sample(torch.exp(reward / 0.5)) * gradient / x.numel()
    assert torch.allclose(x.grad, want, rtol=1e-12)


def test_infinite_beta_is_plain_dmd():
    x, gradient = torch.randn(2, 3, 2, 4, 4, 4)
    plain = rf.redmd_loss(x, gradient, torch.zeros(3), 1.0)
    assert torch.equal(rf.redmd_loss(x, gradient, torch.tensor([3.0, -1.0, 9.0]), math.inf), plain)
    assert torch.allclose(plain, gradient.square().mean() / 2)


def test_first_critic_loss_is_not_zero_and_vanishes_for_a_perfect_critic():
    x0, noise, sigma = torch.randn(2, 3, *SMALL.latent), torch.randn(2, 3, *SMALL.latent), torch.tensor([0.3, 0.9])
    assert rf.critic_loss(lambda x, sigma, text: noise - x0, x0, None, sigma, noise) == 0
    model = random_model(SMALL, torch.float32)
    assert rf.critic_loss(model, x0, model.embed_text(torch.zeros(2, 3, SMALL.text_dim)), sigma, noise) > 0.1


def test_training_ends_at_the_teacher_however_the_student_is_weighted_and_at_the_tilted_teacher_if_the_critic_is(capsys):
    """Particles move by DMD between two Gaussians, with the exact denoisers of teacher and critic; the reward is x."""
    centres, spread, beta, bandwidth, count = torch.tensor([-1.0, 1.0]), 0.4, 1.0, 0.1, 400

    def denoise(xt, sigma, centres, spread, weight):                        # E[x0 | xt], x0 a weighted mixture of Gaussians
        variance = (1 - sigma) ** 2 * spread ** 2 + sigma ** 2
        off = xt[:, None] - (1 - sigma) * centres
        share = torch.softmax(weight.log() - off ** 2 / (2 * variance), 1)
        return (share * (centres + (1 - sigma) * spread ** 2 / variance * off)).sum(1)

    def trained(loss_beta, critic_beta, steps=600):
        g = torch.Generator().manual_seed(0)
        x = torch.randn(count, 1, generator=g)
        for step in range(steps):
            reward, sigma = x[:, 0], torch.rand(1, generator=g).clamp(0.02, 0.98)
            xt = rf.add_noise(x[:, 0], torch.randn(count, generator=g), sigma)
            fake = denoise(xt, sigma, x[:, 0], bandwidth, rf.critic_weight(reward, critic_beta))
            gradient = (fake - denoise(xt, sigma, centres, spread, torch.ones(2)))[:, None]
            x.requires_grad_()
            slope, = torch.autograd.grad(rf.redmd_loss(x, gradient, reward.detach(), loss_beta), x)
            x = x.detach() - 0.1 * (1 - step / steps) * count * slope / torch.exp(reward.detach() / loss_beta).mean()
        return x.mean().item(), (x > 0).float().mean().item()
    tilted = torch.exp(centres / beta) / torch.exp(centres / beta).sum()    # teacher * exp(x / beta): masses of the two, whose
    mean = (tilted * (centres + spread ** 2 / beta)).sum().item()           # centres move by spread^2 / beta
    ends = {"DMD": trained(math.inf, math.inf), "Re-DMD": trained(beta, math.inf), "tilted critic": trained(math.inf, beta)}
    with capsys.disabled():
        print(" [mean, mass of the rewarded mode: " + ", ".join(f"{k} {m:.3f} {p:.3f}" for k, (m, p) in ends.items())
              + f", teacher 0 0.5, tilted {mean:.3f} {tilted[1]:.3f}]", end="")
    for name, (want_mean, want_mass) in {"DMD": (0, 0.5), "Re-DMD": (0, 0.5), "tilted critic": (mean, tilted[1])}.items():
        assert abs(ends[name][0] - want_mean) < 0.05 and abs(ends[name][1] - want_mass) < 0.02, name


# ------------------------------------------------------------- Golden: numbers recorded from the public implementation
GOLDEN = Path(os.environ.get("REWARD_FORCING_GOLDEN", HERE / "tiny_data" / "golden.npz"))


@pytest.fixture(scope="module")
def golden():
    """Every recorded array, and the model and config that the file describes; nothing about its sizes is known here."""
    arrays = {k: torch.from_numpy(v) for k, v in np.load(GOLDEN).items()}

    def n(key):
        assert arrays["cfg." + key] == int(arrays["cfg." + key])
        return int(arrays["cfg." + key])
    cfg = replace(TOY, dim=n("dim"), ffn_dim=n("ffn_dim"), heads=n("num_heads"), layers=n("num_layers"), freq_dim=n("freq_dim"),
                  text_dim=n("text_dim"), text_len=n("text_len"), channels=n("in_dim"), height=n("height") * TOY.stride,
                  width=n("width") * TOY.stride, chunk=n("frames_per_chunk"), sink=n("sink_size"), window=n("local_attn_size"),
                  alpha=float(arrays["cfg.alpha"]), guidance=float(arrays["cfg.guidance"]), shift=5.0, rope_base=10000.0)
    model = VideoTransformer(cfg).requires_grad_(False)
    model.load_state_dict({k[3:]: v for k, v in arrays.items() if k.startswith("sd.")})
    return arrays, cfg, model


def close(ours, recorded, tolerance):
    assert ours.shape == recorded.shape and (ours - recorded).abs().max() <= tolerance, (ours - recorded).abs().max()


def normal(noise):
    assert abs(noise.mean()) < 4 / noise.numel() ** 0.5 and abs(noise.var() - 1) < 6 / noise.numel() ** 0.5 and noise.abs().max() < 6


def test_golden_file_agrees_with_itself(golden):
    a, cfg, _ = golden
    for key, value in (("frame_seqlen", cfg.tokens), ("out_dim", cfg.channels), ("chunks", a["stream.noise"].shape[1] / cfg.chunk),
                       ("b2_chunks", a.get("stream_b2.noise", torch.zeros(1, 0)).shape[1] / cfg.chunk), ("beta", a["redmd.beta"]), ("guidance", a["redmd.guidance"])):
        assert key == "b2_chunks" and value == 0 or a["cfg." + key] == value, key


def test_golden_schedule(golden):
    a, cfg, _ = golden
    sigmas = rf.shift_sigma(torch.linspace(1, 0, 1001)[:-1], cfg.shift)
    close(sigmas, a["sched.sigmas"], 1e-6)
    close(1000 * sigmas, a["sched.timesteps"], 1e-3)                        # float32 of numbers up to 1000
    close(1000 * torch.tensor(cfg.sigmas), a["sched.warped"], 1e-3)
    close(1000 * torch.tensor(cfg.sigmas + [0.0]), a["stream.t"].float(), 1e-3)
    sigma = a["sched.ex_sigma"]
    nearest = (a["sched.timesteps"] - a["sched.ex_t"].float()[:, None]).abs().argmin(1)
    close(a["sched.sigmas"][nearest], a["sched.ex_sigma"], 1e-6)
    close(rf.add_noise(a["sched.ex_x"], a["sched.ex_noise"], sigma), a["sched.ex_xt"], 1e-5)
    close(rf.recover_x0(a["sched.ex_xt"], a["sched.ex_flow"], sigma), a["sched.ex_x0"], 1e-5)
    close(rf.recover_x0(a["sched.ex_xt"], a["sched.ex_flow_back"], sigma), a["sched.ex_x0"], 1e-5)
    assert a["sched.ex_sigma"][a["sched.ex_t"] == 0].min() > 0.004          # there t = 0 is sigma 0.005; here 0 is 0


def test_golden_rope_of_128_channels(golden):
    a, cfg = golden[0], PRESETS["full"]
    assert cfg.head_dim == 128 and cfg.rope_base == 10000
    close(rf.rotate(a["rope128.x"], rf.rope_table(3, 2, 3, 128, 10000.0)), a["rope128.start0"], 2e-5)
    close(rf.rotate(a["rope128.x"], rf.rope_table(9, 2, 3, 128, 10000.0)[:, 36:]), a["rope128.start6"], 2e-5)


def test_golden_time_embedding_and_bidirectional_forward(golden):
    a, cfg, model = golden
    close(model.embed_sigma(a["temb.t"].double() / 1000), a["temb.out"], 2e-5)
    x, sigma = a["bidir.x"].transpose(1, 2), a["bidir.t"].double() / 1000
    close(model(x, sigma, model.embed_text(a["ctx"])).transpose(1, 2), a["bidir.flow"], 2e-5)
    close(model(x[1:], sigma[1:], model.embed_text(a["ctx"][1:, :3])).transpose(1, 2), a["bidir.flow_len3"], 2e-5)


@pytest.mark.parametrize("name", [name for name in ("stream", "static", "stream_b2") if name + ".x0" in np.load(GOLDEN)])
def test_golden_stream(golden, name):
    a, cfg, model = golden
    batch = len(a[name + ".x0"])
    cfg = replace(cfg, alpha=1.0) if name == "static" else cfg
    noises = a["stream.noise" if name == "static" else name + ".noise"].unflatten(1, (-1, cfg.chunk))
    renoise = a["stream.renoise" if name == "static" else name + ".renoise"]
    draws = [draw for n in range(noises.shape[1]) for draw in (noises[:, n], *renoise[n])]
    draws = itertools.chain(draws, itertools.repeat(noises[:, 0]))          # one chunk more: it begins with the last's cache pass
    flows, cache = [], EMASinkCache(cfg, batch)

    def recording(*args):
        flows.append(model(*args))
        return flows[-1]
    recording.embed_text = model.embed_text
    for n, x0 in enumerate(rollout(recording, a["ctx"][:batch], cfg, draws.__next__, noises.shape[1] + 1, cache=cache)):
        if n == noises.shape[1]:
            break
        close(x0, a[name + ".x0"].unflatten(1, (-1, cfg.chunk))[:, n], 5e-5)
        sink = cache.sink.clone()
        if n and name + ".sink_k" in a:                                     # recorded after the chunk; chunk 0 is cached later
            for ours, recorded in zip(cache.sink.flatten(3, 4), (a[name + ".sink_k"][n], a[name + ".sink_v"][n])):
                close(ours, recorded, 5e-5)
    if name + ".sink_k" in a:
        first = a[name + ".sink_k"][0], a[name + ".sink_v"][0]
        assert all(torch.equal(now, then) for now, then in zip(first, (a[name + ".sink_k"][1], a[name + ".sink_v"][1])))
    if name + ".flow" in a:
        close(torch.stack(flows[:noises.shape[1] * (cfg.steps + 1)]).unflatten(0, (-1, cfg.steps + 1)), a[name + ".flow"], 5e-5)
    for key, most in (("global_end", math.inf), ("local_end", cfg.window)):   # tokens seen, tokens held, after each chunk
        for n, recorded in enumerate(a.get(f"{name}.{key}", [])):
            assert (recorded == min((n + 1) * cfg.chunk, most) * cfg.tokens).all(), key
    if name + ".sink_k_final" in a:
        close(sink[0].flatten(2, 3), a[name + ".sink_k_final"], 5e-5)
        close(sink[1].flatten(2, 3), a[name + ".sink_v_final"], 5e-5)


class LeakyCache(EMASinkCache):
    """As the public training cache: the values of the clean pass, the gradient of the exit pass's keys and values."""
    def attend(self, layer, q, k, v):
        if not torch.is_grad_enabled():
            return super().attend(layer, q, k, v)
        cfg, n = self.cfg, self.seen // self.cfg.chunk
        self.exits = getattr(self, "exits", {})
        self.exits[layer, n] = k, v
        q, keys, values = super().attend(layer, q, k, v)
        window = [0, *range(max(1, n - (cfg.window - cfg.sink) // cfg.chunk + 1), n)] if n else []      # chunks in the context
        for i, into in enumerate((keys, values)):
            if window:
                exits = torch.cat([self.exits[layer, m][i] for m in window], 1)
                exits = rf.rotate(exits, self.rope[:, :self.length]) if i == 0 else exits
                into = torch.cat([into[:, :self.length] + exits - exits.detach(), into[:, self.length:]], 1)
            keys, values = (into, values) if i == 0 else (keys, into)
        return q, keys, values


def train_as_golden(golden, cache_class):
    """The public training rollout: a static sink, noise of sigma 0.005 on what is cached. Clean frames and gradients."""
    a, cfg, model = golden
    cfg, exit_step = replace(cfg, alpha=1.0), int(a["cfg.train_exit"])
    assert exit_step == a["cfg.train_exit"]
    normal(a["train.context_noise"])                                        # that of the last chunk is never used
    noises, n = a["train.noise"].unflatten(1, (-1, cfg.chunk)), itertools.count()
    draws = iter([draw for i in range(noises.shape[1]) for draw in (noises[:, i], *a["train.renoise"][i])])
    least = a["sched.sigmas"].min()

    def student(x, sigma, text, cache):
        return model(rf.add_noise(x, a["train.context_noise"][next(n)], least) if sigma.max() == 0 else x, sigma, text, cache)
    student.embed_text = model.embed_text
    model.zero_grad()
    model.requires_grad_(True)
    x0 = torch.cat(list(rollout(student, a["ctx"][:1], cfg, draws.__next__, noises.shape[1], exit_step, cache_class(cfg, 1))), 1)
    loss = x0.square().mean() / 2
    loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.requires_grad_(False)
    return x0.detach(), loss.detach(), grads


def test_golden_training_rollout_and_its_gradients_through_a_leaky_cache(golden):
    a, cfg, model = golden
    x0, loss, grads = train_as_golden(golden, LeakyCache)
    close(x0, a["train.x0"], 1e-5)
    assert abs(loss / a["train.loss"] - 1) < 1e-5
    recorded = {key[11:]: value for key, value in a.items() if key.startswith("train.grad.")}
    assert len(recorded) >= 4
    for name, grad in recorded.items():
        close(grads[name], grad, 1e-5 * grad.abs().max())
    start = int(a["cfg.train_exit"])                                        # in steps of the unwarped schedule
    assert a["train.timestep_from_to"].tolist() == [1000 * (1 - (start + i) / cfg.steps) for i in (0, 1)]


def test_golden_departure_here_the_context_carries_no_gradient(golden):
    a, _, _ = golden
    x0, _, grads = train_as_golden(golden, EMASinkCache)
    close(x0, a["train.x0"], 5e-5)                                          # the same frames
    for key in a:
        if key.startswith("train.grad.") and re.search(r"self_attn\.[kv]\.weight", key):
            assert (grads[key[11:]] - a[key]).abs().max() > 0.1 * a[key].abs().max(), key


def test_golden_departure_here_teacher_and_critic_use_the_students_schedule(golden):
    a, cfg, model = golden
    table = rf.shift_sigma(torch.linspace(1, 0, 1001)[:-1], 8.0)
    nearest = table[(1000 * table - a["bidir.t"].float()[:, None]).abs().argmin(1)]
    x = a["bidir.x"].transpose(1, 2)
    flow = model(x, a["bidir.t"].double() / 1000, model.embed_text(a["ctx"])).double()
    close(rf.recover_x0(x.double(), flow, nearest.double()).float(), a["bidir.x0_shift8"], 5e-5)


def test_golden_departure_here_no_loss_is_weighted_by_the_noise_level(golden):
    a, _, _ = golden
    if "sched.training_weights" in a:                                       # a bell over the steps, of mean 1
        bell = torch.exp(-2 * ((a["sched.timesteps"].double() - 500) / 1000) ** 2)
        bell = bell - bell.min()
        close((bell * 1000 / bell.sum()).float(), a["sched.training_weights"], 2e-5)


def test_golden_redmd_and_critic(golden):
    a, cfg, _ = golden
    sigma = a["redmd.timestep"][:, 0].double() / 1000
    nearest = a["sched.sigmas"][(a["sched.timesteps"] - 1000 * sigma.float()[:, None]).abs().argmin(1)]
    close(rf.add_noise(a["redmd.x0"], a["redmd.noise"], nearest), a["redmd.noisy"], 1e-5)
    cond, uncond = a["redmd.pred_real_cond"], a["redmd.pred_real_uncond"]

    def teacher(xt, sigma, text):                                           # a teacher whose x0 are the recorded ones
        return (xt - torch.cat([cond, uncond])) / per_sample(sigma)
    teacher.embed_text = lambda text: text
    real = rf.guided_x0(teacher, a["redmd.noisy"].double(), nearest.double(), torch.zeros(2, 1), float(a["redmd.guidance"]))
    x0 = a["redmd.x0"].double().requires_grad_()
    gradient = rf.dmd_gradient(x0.detach(), real, a["redmd.pred_fake"].double())
    close(gradient.float(), a["redmd.grad"], 1e-5 * a["redmd.grad"].abs().max())
    close((x0 - real).abs().mean((1, 2, 3, 4)).float(), a["redmd.normalizer"], 1e-5)
    for i in range(len(x0)):                                                # recorded with one call per sample
        x = a["redmd.x0"][i:i + 1].double().requires_grad_()
        loss = rf.redmd_loss(x, gradient[i:i + 1], a["redmd.mq"][i:i + 1].double(), 1 / float(a["redmd.beta"]))
        loss.backward()
        assert abs(loss / a["redmd.loss"][i] - 1) < 1e-5
        close(x.grad[0].float(), a["redmd.dloss_dx0"][i], 1e-5 * a["redmd.dloss_dx0"][i].abs().max())

    def critic(xt, sigma, text):
        return (xt - a["redmd.pred_fake"]) / per_sample(sigma)
    level = a["sched.sigmas"][(a["sched.timesteps"] - a["critic.timestep"][:, :1].float()).abs().argmin(1)]
    noise = a["critic.noise"].view_as(a["redmd.x0"]).double()               # cancels out of the loss: seen to be normal at least
    normal(noise)
    loss = rf.critic_loss(critic, a["redmd.x0"].double(), None, level.double(), noise)
    assert abs(loss / a["critic.loss"] - 1) < 1e-6


def test_golden_departure_the_public_code_weights_the_batch_by_the_reward_of_sample_0(golden):
    a, cfg, _ = golden
    weight = torch.exp(a["redmd.beta"] * a["redmd.mq"])
    loss = (weight[0] * a["redmd.loss"] / weight).mean()                    # both samples weighted alike
    assert abs(loss / a["redmd.official_b2_loss"] - 1) < 1e-5
    theirs = (a["redmd.dloss_dx0"] * per_sample(weight[0] / weight)) / 2
    close(theirs, a["redmd.official_b2_dloss_dx0"], 1e-5 * theirs.abs().max())
    ours = rf.redmd_loss(a["redmd.x0"], a["redmd.grad"], a["redmd.mq"], 1 / float(a["redmd.beta"]))
    assert abs(ours / a["redmd.official_b2_loss"] - 1) > 0.01               # so it matters


# ------------------------------------------------------------------------------------------------ Reward, measures
def test_tracker_knows_the_truth_of_tiny_data(data):
    clips, captions = data
    truth = [entry["truth"]["speed"] for entry in json.loads((HERE / "tiny_data/captions.json").read_text())]
    rows = [rf.measure(clip[None], [caption], TOY) for clip, caption in zip(clips, captions)]
    assert np.mean([r["colour"] for r in rows]) >= 0.99 and np.mean([r["shape"] for r in rows]) >= 0.95
    assert all(abs(r["speed"] - t) <= max(0.1 * t, 0.02) for r, t in zip(rows, truth))     # 8-bit edges shiver by 0.01 px
    assert abs(np.mean([r["speed"] for r in rows]) / np.mean(truth) - 1) < 0.01
    wrong = rf.measure(clips, [c.replace("red", "blue").replace("square", "circle") for c in captions], TOY)
    assert abs(wrong["colour"] - 0.75) < 0.01 and abs(wrong["shape"] - 2 / 3) < 0.02


def test_frames_without_an_object_count_as_wrong(data):
    black = rf.measure(torch.zeros(1, 12, 3, 24, 24, dtype=torch.uint8), ["a red circle"], TOY)
    assert black["colour"] == black["shape"] == black["speed"] == 0


def test_copy_is_one_for_a_frozen_clip_and_lower_for_one_that_goes_on(data):
    frozen = data[0][:, :1].expand(-1, 12, -1, -1, -1)
    assert rf.measure(frozen, data[1], TOY)["copy"] > 0.999 and rf.measure(frozen, data[1], TOY)["drift"] < 1e-3
    assert rf.measure(data[0], data[1], TOY)["copy"] < 0.6


def test_reward_orders_clips_by_speed_and_is_normalised_on_the_data(data):
    clips, captions = data
    truth = torch.tensor([entry["truth"]["speed"] for entry in json.loads((HERE / "tiny_data/captions.json").read_text())])
    reward = rf.motion_reward(clips, captions)
    assert reward.shape == (120,) and torch.corrcoef(torch.stack([reward, truth]))[0, 1] > 0.97
    scores = rf.find_reward("motion", clips, captions, TOY)(clips[:, :12], captions)
    assert abs(scores.mean()) < 0.15 and abs(scores.std() - 1) < 0.2


def test_reward_of_broken_motion_is_below_that_of_slow_clean_motion(data):
    clips, _ = data
    speed = rf.motion_reward(clips)
    slow = speed[(speed > 0.3) & (speed < 0.7)].mean()
    g, broken = torch.Generator().manual_seed(0), {}
    broken["vanishes every other frame"] = clips.clone()
    broken["vanishes every other frame"][:, ::2] = clips.flatten(3).median(3).values[..., None, None][:, ::2].to(torch.uint8)
    broken["jumps at random"] = torch.stack([torch.stack([f.roll(torch.randint(24, (2,), generator=g).tolist(), (1, 2)) for f in c]) for c in clips])
    broken["jitters"] = clips[:, [0, 4] * 24]
    mixed = clips[:, :, :, torch.randperm(24, generator=g)]
    broken["breaks up"] = torch.where((torch.arange(48) % 2 == 0)[None, :, None, None, None], clips, mixed)
    time = torch.arange(48) * 0.3
    dx, dy = torch.arange(24) + 0.5 - (5 + time)[:, None], torch.arange(24) + 0.5 - 12
    distance = (dx[:, None] ** 2 + dy[:, None] ** 2).sqrt()
    even = (5 - distance).clamp(0, 1) * 255                         # one disc that glides, one that pulses on the way
    pulse = (torch.tensor([3, 6] * 24)[:, None, None] - distance).clamp(0, 1) * 255
    even, pulse = (rf.motion_reward(disc[None, :, None].expand(-1, -1, 3, -1, -1).to(torch.uint8)) for disc in (even, pulse))
    assert abs(even - 0.3) < 0.05 and pulse < even / 4
    for name, frames in broken.items():
        assert rf.measure(frames, ["a red circle"] * 120, TOY)["speed"] > 0.9 or "vanish" in name, name
        assert rf.motion_reward(frames).mean() < slow, name


# -------------------------------------------------------------------------------------------- Optimiser and resume
def test_muon_orthogonalises_and_takes_equal_shapes_together():
    shapes = [(8, 8), (8, 8), (16, 8), (8, 16)]
    params = [torch.nn.Parameter(torch.zeros(s)) for s in shapes]
    for p in params:
        p.grad = torch.randn_like(p)
    optimizer = rf.Muon(params, {"lr": 1.0})
    optimizer.step()
    for p in params:
        scale = max(1, p.shape[0] / p.shape[1]) ** 0.5
        spread = torch.linalg.svdvals(p.detach()) / scale
        assert spread.min() > 0.4 and spread.max() < 1.3
        assert (p.detach() * p.grad).sum() < 0                  # downhill
    before, grad = params[0].detach().clone(), torch.randn(8, 8)
    fresh = torch.nn.Parameter(before.clone())
    params[0].grad, fresh.grad = grad.clone(), grad.clone()
    optimizer.step(), rf.Muon([fresh], {"lr": 1.0}).step()
    assert (params[0] - fresh).abs().max() > 0.01               # the first step's gradient is remembered


def test_optimizer_steps_once_per_update(monkeypatch):
    model, calls = VideoTransformer(SMALL), []
    optimizers = model.optimizers = rf.make_optimizers(model, 0.1)
    owned = [p for o in optimizers for group in o.param_groups for p in group["params"]]
    assert len(owned) == len(set(owned)) == len(list(model.parameters()))
    for o in optimizers:
        monkeypatch.setattr(o, "step", lambda o=o: calls.append(o))
    rf.update(model, sum(p.square().sum() for p in model.parameters()), 1.0)
    assert calls == optimizers


TINY = ["--dim", "24", "--ffn-dim", "24", "--heads", "2", "--layers", "1", "--teacher-steps", "20", "--teacher-batch", "2",
        "--ode-steps", "5", "--ode-clips", "12", "--ode-batch", "2", "--distill-steps", "5", "--distill-batch", "2",
        "--sample-steps", "4", "--critic-ratio", "2", "--frames", "24"]


def without_seconds(path):
    metrics = json.loads((path / "metrics.json").read_text())
    assert set(metrics.pop("seconds")) == {"teacher", "ode", "student", "stream", "report"}
    return metrics


def test_toy_resumed_after_a_kill_in_every_stage_is_bitwise_equal(tmp_path, monkeypatch, capsys):
    assert rf.main(["--toy", "--out", str(tmp_path / "whole"), *TINY]) == 0
    kills = iter([("teacher", 13), ("ode", 2), ("student", 3)])
    kill, train = next(kills), rf.Run.train

    def killed(self, stage, *what):
        nonlocal kill
        for step, g, log in train(self, stage, *what):
            if (stage, step) == kill:
                kill = next(kills, None)
                raise KeyboardInterrupt
            yield step, g, log
    monkeypatch.setattr(rf.Run, "train", killed)
    assert [rf.main(["--toy", "--out", str(tmp_path / "killed"), *TINY]) for _ in range(4)] == [130, 130, 130, 0]
    assert without_seconds(tmp_path / "whole") == without_seconds(tmp_path / "killed")
    assert (tmp_path / "whole/log.jsonl").read_text() == (tmp_path / "killed/log.jsonl").read_text()
    a, b = (torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)["models"] for name in ("whole", "killed"))
    assert all(torch.equal(a[m][k], b[m][k]) for m in a for k in a[m])


# -------------------------------------------------------------------------------------------------------- Ablation
def test_interval_is_students_95_percent():
    mean, half = rf.interval([1.0, 2.0, 3.0])                               # deviation 1, t = 4.303 for two degrees of freedom
    assert mean == 2 and abs(half - 4.303 / 3 ** 0.5) < 1e-9 and rf.interval([5.0]) == (5.0, math.inf)


@pytest.fixture
def few(tmp_path):
    """--data with a fifth of the clips, so that every student of an ablation opens them fast."""
    listing = json.loads((HERE / "tiny_data/captions.json").read_text())[::5]
    (tmp_path / "few").mkdir()
    (tmp_path / "few/captions.json").write_text(json.dumps([{**clip, "file": str(HERE / "tiny_data" / clip["file"])} for clip in listing]))
    return ["--data", str(tmp_path / "few")]


def test_ablation_trains_every_variant_with_its_own_loss_and_sink_and_resumes(tmp_path, few, monkeypatch, capsys):
    made, ruin, train = [], ["the fifth is ruined"], rf.train_student

    def counted(run, watch):
        made.append((run.cfg.beta, run.cfg.tilt, run.cfg.sink, run.cfg.alpha, run.cfg.seed))
        if len(made) >= 5 and ruin:                                          # and those that were under way behind it
            raise FloatingPointError(*ruin)
        train(run, watch)
    monkeypatch.setattr(rf, "train_student", counted)
    monkeypatch.setattr(rf, "ProcessPoolExecutor", lambda *what: ThreadPoolExecutor(1))       # a process would not see `counted`
    args = ["--toy", "--ablate", "--seeds", "2", "--out", str(tmp_path), *TINY, "--distill-steps", "2", *few]
    assert rf.main(args) == 1 and ruin.pop() in capsys.readouterr().err
    kept, before = json.loads((tmp_path / "ablation.json").read_text())["students"], len(made)
    assert rf.main(args) == 0
    beta, alpha = TOY.beta, TOY.alpha
    want = {(b, "student", s, a, seed) for b in (math.inf, beta) for s, a in ((0, alpha), (3, 1.0), (3, alpha)) for seed in (40, 41)}
    want |= {(beta, "critic", 3, alpha, seed) for seed in (40, 41)} | {(b, "student", 3, alpha, 40) for b in rf.BETAS if b not in (math.inf, beta)}
    assert set(made) == want and len(kept) == 4 and len(made) == before + len(want) - 4     # none twice of those before the fifth
    students = json.loads((tmp_path / "ablation.json").read_text())["students"]
    assert len(students) == len(want) and {"speed", "copy", "drift", "colour", "shape", "reward"} <= set(students["DMD, none, seed 40"])
    printed = capsys.readouterr().out
    pair = [students[f"Re-DMD, EMA, seed {s}"]["speed"] - students[f"DMD, EMA, seed {s}"]["speed"] for s in (40, 41)]
    assert f"Re-DMD against DMD: speed is higher              {np.mean(pair):+.3f}" in printed
    copies = [students[f"{loss}, static, seed {s}"]["copy"] - students[f"{loss}, EMA, seed {s}"]["copy"] for loss in rf.LOSSES for s in (40, 41)]
    assert f"EMA against static: copy is lower                {np.mean(copies):+.3f}" in printed     # above zero is what is claimed
    assert Image.open(tmp_path / "ablation.png").size[1] > 7 * 70 and (tmp_path / "ablation_curves.png").exists()
    for damaged in ("{", "[]"):
        (tmp_path / "ablation.json").write_text(damaged)
        assert rf.main(args) == 2 and "ablation.json is damaged, or" in capsys.readouterr().err


def test_ablation_in_processes_stops_when_one_is_killed_or_it_is_interrupted_and_goes_on(tmp_path, few, monkeypatch, capsys):
    (tmp_path / "deadly.py").write_text(
        "import multiprocessing, os, pathlib\n"
        "def reward(frames, captions):\n"
        f"    if multiprocessing.parent_process() and pathlib.Path({str(tmp_path / 'deadly')!r}).exists():\n"
        "        os._exit(9)\n"
        "    return frames.float().std((1, 2, 3, 4))\n")
    (tmp_path / "deadly").touch()
    monkeypatch.syspath_prepend(tmp_path)
    args = ["--toy", "--ablate", "--seeds", "1", "--out", str(tmp_path / "out"), *TINY, "--distill-steps", "1",
            "--reward", "deadly:reward", *few]
    assert rf.main(args) == 2 and "a worker was killed" in capsys.readouterr().err
    (tmp_path / "deadly").unlink()
    write = rf.write_json

    def interrupted(path, content):                                          # as soon as the first student is done
        write(path, content)
        raise KeyboardInterrupt
    with monkeypatch.context() as once:
        once.setattr(rf, "write_json", interrupted)
        assert rf.main(args) == 130 and len(json.loads((tmp_path / "out/ablation.json").read_text())["students"]) == 1
    assert not multiprocessing.active_children()
    assert rf.main(args) == 0 and "1 student steps, 1 seeds" in capsys.readouterr().out
    students = json.loads((tmp_path / "out/ablation.json").read_text())["students"]
    assert len(students) == len(rf.VARIANTS) + len({*rf.BETAS} - {math.inf, TOY.beta}) and all(s["seed"] == 40 for s in students.values())


def test_tilt_weighs_the_critics_loss_and_leaves_the_students_alone():
    reward = torch.tensor([0.0, 1.0, 2.0])
    weight = rf.critic_weight(reward, 0.5)
    assert torch.allclose(weight / weight[0], torch.exp(-reward / 0.5)) and abs(weight.mean() - 1) < 1e-6
    assert torch.equal(rf.critic_weight(reward, math.inf), torch.ones(3))
    x0, noise, sigma = torch.randn(3, 3, *SMALL.latent), torch.randn(3, 3, *SMALL.latent), torch.tensor([0.3, 0.9, 0.5])
    model = lambda x, sigma, text: x                                         # any
    each = torch.stack([rf.critic_loss(model, x0[i:i + 1], None, sigma[i:i + 1], noise[i:i + 1]) for i in range(3)])
    assert torch.allclose(rf.critic_loss(model, x0, None, sigma, noise, weight), (weight * each).mean())


# ------------------------------------------------------------------------------------------------------- Full size
def load_in_ci(name):
    """The package; where it is missing the test is skipped, but never in CI."""
    return __import__(name) if os.environ.get("CI") else pytest.importorskip(name)


TINY_FULL = ["--full", "--dim", "24", "--ffn-dim", "32", "--heads", "2", "--layers", "2", "--text-dim", "16", "--text-len", "12",
             "--height", "32", "--width", "48"]
TINY_WAN = replace(PRESETS["full"], dim=24, ffn_dim=32, heads=2, layers=2, text_dim=16, text_len=12, height=32, width=48)


@pytest.fixture(scope="module")
def wan(tmp_path_factory):
    """A Diffusers folder in Wan2.1's layout with tiny random parts, and a trainer's checkpoint."""
    diffusers, transformers, tokenizers = load_in_ci("diffusers"), load_in_ci("transformers"), load_in_ci("tokenizers")
    folder = tmp_path_factory.mktemp("wan")
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKLWan(base_dim=8, dim_mult=[1, 2, 2, 2], num_res_blocks=1)
    vae.save_pretrained(folder / "vae")
    config = transformers.UMT5Config(vocab_size=20, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    transformers.UMT5EncoderModel(config).save_pretrained(folder / "text_encoder")
    vocabulary = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", "a", "red", "panda", "swims"])}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>").save_pretrained(folder / "tokenizer")
    state = {"model." + name: p for name, p in random_model(TINY_WAN, torch.float32).state_dict().items()}
    torch.save({"generator": {name: p + 1 for name, p in state.items()}, "generator_ema": state}, folder / "model.pt")
    return folder


def test_full_size_streams_with_a_text_encoder_and_a_vae(wan, tmp_path, capsys, monkeypatch):
    freed, encoder = [], rf.wan_text
    monkeypatch.setattr(rf, "wan_text", lambda captions, *where: freed.append(captions) or encoder(captions, *where))
    args = [*TINY_FULL, "--weights", str(wan / "model.pt"), "--wan", str(wan), "--prompt", "a red  panda swims", "--out", str(tmp_path)]
    if shutil.which("ffmpeg"):
        assert rf.main(["--stream", "--frames", "33", *args]) == 0
        assert (tmp_path / "stream.mp4").stat().st_size > 500 and str(tmp_path / "stream.mp4") in capsys.readouterr().out
    monkeypatch.setattr(rf.shutil, "which", lambda name: None)
    freed.clear()
    assert rf.main(["--stream", "--frames", "33", *args]) == 0
    assert freed == [["a red  panda swims"]] and str(tmp_path / "stream.webp") in capsys.readouterr().out
    with Image.open(tmp_path / "stream.webp") as image:
        assert image.n_frames == 33 and image.size == (192, 128)            # enlarged for the eye
    for change, words in ((["--frames", "34"], "33 or 45"), (["--wan", str(tmp_path)], "tmp"), (["--weights", str(tmp_path)], "tensors")):
        assert rf.main(["--stream", *args, *change]) == 2
        assert words in capsys.readouterr().err


def test_text_features_are_the_encoders_and_zero_after_the_last_token(wan):
    transformers = load_in_ci("transformers")
    ours = rf.wan_text(["a red panda"], wan, TINY_WAN, "cpu", torch.float32)
    encoder = transformers.UMT5EncoderModel.from_pretrained(wan / "text_encoder")
    with torch.no_grad():
        theirs = encoder(torch.tensor([[3, 4, 5]])).last_hidden_state
    assert ours.shape == (1, 12, 16) and torch.allclose(ours[:, :3], theirs, atol=1e-5) and ours[:, 3:].abs().max() == 0


def test_decoding_chunk_by_chunk_equals_decoding_the_whole(wan, monkeypatch):
    codec, memory = rf.WanCodec(wan, "cpu", torch.float32), {}
    latents = torch.randn(1, 9, 16, 4, 6)
    with torch.no_grad():
        whole = codec.vae.decode((latents * codec.std + codec.mean).transpose(1, 2)).sample.transpose(1, 2)
    assert codec.decode(latents, {}).dtype == torch.uint8
    monkeypatch.setattr(rf, "to_bytes", lambda pixels: pixels.clamp(-1, 1))  # before they are rounded
    parts = [codec.decode(chunk, memory) for chunk in latents.split(3, 1)]
    assert [part.shape[1] for part in parts] == [9, 12, 12] and parts[0].shape[2:] == (3, 32, 48)
    assert (torch.cat(parts, 1) - whole).abs().max() < 1e-4
    forgetful = torch.cat([codec.decode(chunk, {}) for chunk in latents.split(3, 1)], 1)
    assert (forgetful[:, 9:18] - whole[:, 9:18]).abs().max() > 1e-2          # so the memory matters


def saved_layouts(folder, state):
    """The checkpoint `state` in every layout that --weights takes."""
    safetensors = load_in_ci("safetensors")
    import safetensors.torch
    prefixed, half = {"model." + name: p for name, p in state.items()}, len(state) // 2
    torch.save({"generator": prefixed, "generator_ema": prefixed, "critic": {}}, folder / "ema.pt")
    torch.save({"generator": prefixed}, folder / "trainer.pt")
    (folder / "single").mkdir(), (folder / "shards").mkdir()
    safetensors.torch.save_file(state, folder / "single" / "diffusion_pytorch_model.safetensors")
    shards = {"a.safetensors": dict(list(state.items())[:half]), "b.safetensors": dict(list(state.items())[half:])}
    for name, shard in shards.items():
        safetensors.torch.save_file(shard, folder / "shards" / name)
    index = {"weight_map": {key: name for name, shard in shards.items() for key in shard}}
    (folder / "shards" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    return [folder / name for name in ("ema.pt", "trainer.pt", "single", "shards")]


def test_golden_weights_load_from_every_layout(golden, tmp_path):
    a, cfg, model = golden
    for path in saved_layouts(tmp_path, model.state_dict()):
        with torch.device("meta"):
            loaded = VideoTransformer(cfg)
        rf.load_weights(loaded, path)
        x, sigma = a["bidir.x"].transpose(1, 2), a["bidir.t"].double() / 1000
        with torch.no_grad():
            close(loaded(x, sigma, loaded.embed_text(a["ctx"])).transpose(1, 2), a["bidir.flow"], 2e-5)


def test_weights_that_do_not_fit_are_refused_by_name(golden, tmp_path):
    _, cfg, model = golden
    whole = model.state_dict()
    missing = {name: p for name, p in whole.items() if name != "blocks.0.ffn.2.weight"}
    for state, message in ((missing, 'Missing key.* "blocks.0.ffn.2.weight"'), ({**whole, "surplus": torch.zeros(1)}, 'Unexpected key.* "surplus"'),
                           ({**whole, "head.head.bias": torch.zeros(7)}, r"size mismatch for head.head.bias.* torch.Size\(\[7\]\)")):
        folder = tmp_path / str(len(state))
        folder.mkdir(exist_ok=True)
        for path in saved_layouts(Path(tempfile.mkdtemp(dir=folder)), state):
            with torch.device("meta"):
                empty = VideoTransformer(cfg)
            with pytest.raises(BadInput, match=message):
                rf.load_weights(empty, path)
    for path in ("nowhere.pt", "empty"):
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(BadInput, match="nowhere.pt.*No such file|empty.*Missing key"):
            rf.load_weights(empty, tmp_path / path)


def test_a_pass_of_the_full_size_is_24_teraflop():
    assert abs(rf.pass_flops(PRESETS["full"]) / 1e12 - 24.26) < 0.005


def test_a_stream_of_the_full_size_never_asks_the_device_for_a_value():
    cfg = PRESETS["full"]
    with torch.device("meta"):                                               # there, a host synchronisation is an error
        model, draw = VideoTransformer(cfg), lambda: torch.empty(1, cfg.chunk, *cfg.latent)
        stream = rollout(model, torch.empty(1, cfg.text_len, cfg.text_dim), cfg, draw, 5)
        assert [chunk.shape for chunk in stream] == [(1, 3, 16, 60, 104)] * 5


def test_a_compiled_pass_has_no_graph_break_and_no_graph_after_the_window_is_full():
    model, graphs = random_model(SMALL, torch.float32), []
    text = torch.randn(1, 3, SMALL.text_dim)
    plain = torch.cat(list(rollout(model, text, SMALL, noise_of(SMALL, 1, torch.float32), 8)), 1)

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward
    model.compile(fullgraph=True, dynamic=False, backend=count)              # fullgraph raises on a graph break
    chunks, made = [], []
    with torch.no_grad():
        for chunk in rollout(model, text, SMALL, noise_of(SMALL, 1, torch.float32), 8):
            chunks.append(chunk)
            made.append(len(graphs))
    assert (torch.cat(chunks, 1) - plain).abs().max() < 1e-5 * plain.abs().max() and made == [1, 2, 3, 3, 3, 3, 3, 3]


def test_a_pass_in_a_full_window_works_in_place_on_one_shape():
    cache, model = EMASinkCache(SMALL, 1), random_model(SMALL, torch.float32)
    places = set()
    attend = cache.attend

    def watched(layer, q, k, v):
        q, k, v = attend(layer, q, k, v)
        places.add((layer, k.data_ptr(), v.data_ptr(), k.shape[1], k.is_contiguous()))
        return q, k, v
    cache.attend = watched
    steady = rollout(model, torch.zeros(1, 3, SMALL.text_dim), SMALL, noise_of(SMALL, 1, torch.float32), cache=cache)
    for n, _ in zip(range(8), steady):
        if n == 2:
            places.clear()
    assert len(places) == SMALL.layers and {length for *_, length, _ in places} == {SMALL.window * SMALL.tokens}


def test_the_cache_is_faster_than_recomputing_the_window_and_gives_the_same(capsys):
    cfg = replace(SMALL, dim=96, height=48, width=48)
    model, text = random_model(cfg, torch.float32), torch.randn(1, 3, cfg.text_dim)
    seconds = {"cached": [], "plain": []}
    for _ in range(3):
        for name, make in (("cached", rollout), ("plain", slow_rollout)):
            began = time.perf_counter()
            out = torch.cat(list(make(model, text, cfg, noise_of(cfg, 1, torch.float32), 8)), 1)
            seconds[name].append(time.perf_counter() - began)
            same = out if name == "cached" else same - out
        assert same.abs().max() < 1e-4 * out.abs().max()
    ratio = np.median(seconds["plain"]) / np.median(seconds["cached"])
    with capsys.disabled():
        print(f" [plain / cached: {ratio:.1f}]", end="")
    assert ratio > 1


def test_bench_measures_any_preset_and_writes_json(tmp_path, capsys):
    small = ["--dim", "48", "--heads", "2", "--layers", "1", "--ffn-dim", "48"]
    assert rf.main(["--bench", "--preset", "toy", *small, "--out", str(tmp_path)]) == 0
    numbers = json.loads((tmp_path / "bench.json").read_text())
    assert all(numbers[key] > 0 for key in ("fps_transformer", "fps_decoded", "first_chunk_seconds", "chunk_seconds_median", "peak_memory_gb",
                                            "tflop_per_pass", "tflop_per_second", "matmul_tflop_per_second", "fraction_of_matmul_rate"))
    assert numbers["chunks"] >= 20 and numbers["decoder"] == "PatchCodec" and numbers["attention"] and numbers["dtype"] == "torch.float32"
    assert abs(numbers["fps_transformer"] - 3 / numbers["chunk_seconds_median"]) < 1e-6 * numbers["fps_transformer"]


# ------------------------------------------------------------------------------------------------- The command line
@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("trained")
    more = ["--dim", "48", "--ffn-dim", "96", "--teacher-steps", "150", "--teacher-batch", "4"]
    run = subprocess.run([sys.executable, HERE / "reward_forcing.py", "--toy", "--out", out, *TINY, *more], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return out, run.stdout


def test_toy_writes_every_file_and_its_losses_fall(trained):
    out, printed = trained
    assert {p.name for p in out.iterdir()} == {"report.png", "teacher.gif", "student.gif", "stream.gif", "log.jsonl", "checkpoint.pt", "metrics.json"}
    metrics = without_seconds(out)
    assert set(metrics) == {"data", "teacher", "ode", "student", "stream", "parameters"}
    five = {"colour", "shape", "speed", "copy", "drift"}
    assert set(metrics["teacher"]) == set(metrics["student"]) == set(metrics["stream"]["last"]) == five
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    teacher = [row["loss"] for row in log if row["stage"] == "teacher"]
    assert np.mean(teacher[-3:]) < 0.8 * np.mean(teacher[:3])
    distill = [row for row in log if row["stage"] == "student"]
    assert all(row["weight_min"] <= row["weight_max"] and row["sink_updates"] == 5 and row["gap"] > 0 and row["grad_norm"] > 0 for row in distill)
    assert Image.open(out / "stream.gif").n_frames == 24 and "frames per second" in printed


def test_stream_writes_a_gif_and_refuses_bad_input_with_exit_code_2(trained, capsys):
    out = ["--out", str(trained[0])]
    assert rf.main(["--stream", "--prompt", "a red circle", "--frames", "12", "--alpha", "1", *out]) == 0
    assert Image.open(trained[0] / "stream.gif").n_frames == 12

    def refused(args, *words):
        capsys.readouterr()
        assert rf.main(args) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and all(word in error for word in words), error
    before = (trained[0] / "checkpoint.pt").read_bytes()
    refused(["--stream", "--prompt", "a red circle", "--frames", "10", *out], "10", "9 or 12")
    refused(["--stream", "--prompt", "a pink circle", *out], "pink", "yellow")
    refused(["--stream", *out], "--prompt")
    refused(["--stream", "--prompt", "a red circle", "--window", "5", *out], "--window 9")
    refused(["--stream", "--prompt", "a red circle", "--dim", "96", *out], "dim=48 there and 96 here")
    refused(["--toy", *out, *TINY], "dim=48 there and 24 here")
    refused(["--toy", "--teachr-steps", "3"], "--teachr-steps", "--teacher-steps")
    refused(["--toy", "--alpha", "much"], "--alpha")
    refused([], "--toy", "--stream")
    refused(["--toy", "--full", *out], "--stream or --bench")
    refused(["--stream", "--full", "--prompt", "a panda", *out], "--weights and --wan")
    refused(["--toy", "--ablate", "--seeds", "11", *out], "--seeds", "choose from 1, 2", "10")
    refused(["--toy", "--ablate", "--sink", "0", *out], "a --sink and an --alpha below 1")
    refused(["--toy", "--ablate", "--alpha", "1", *out], "a --sink and an --alpha below 1")
    refused(["--toy", "--out", "/dev/null/x", *TINY], "/dev/null/x", "cannot be written")
    refused(["--toy", "--data", str(trained[0]), *out], "captions.json")
    refused(["--toy", "--reward", "nothing:here", *out, *TINY], "nothing:here")
    assert (trained[0] / "checkpoint.pt").read_bytes() == before


def test_truncated_checkpoint_is_refused(trained, tmp_path, capsys):
    whole = (trained[0] / "checkpoint.pt").read_bytes()
    (tmp_path / "checkpoint.pt").write_bytes(whole[:len(whole) // 2])
    assert rf.main(["--stream", "--prompt", "a red circle", "--out", str(tmp_path)]) == 2
    assert "checkpoint.pt is damaged" in capsys.readouterr().err


def test_nan_stops_the_run_and_names_the_step(tmp_path, capsys):
    assert rf.main(["--toy", "--out", str(tmp_path), *TINY, "--teacher-lr", "1e30", "--teacher-steps", "60"]) == 1
    assert re.search("teacher step [0-9]: loss.* is not finite", capsys.readouterr().err)


def test_ruined_weights_are_never_saved(tmp_path, capsys):
    assert rf.main(["--toy", "--out", str(tmp_path), *TINY, "--teacher-lr", "1e30"]) == 1       # a checkpoint every step
    assert "teacher step 0: weights" in capsys.readouterr().err and not (tmp_path / "checkpoint.pt").exists()
    run = rf.Run(TOY, tmp_path, HERE / "tiny_data", "cpu")
    model = run.model(lr=0.1)
    with pytest.raises(FloatingPointError, match="teacher step 40: weights"):
        for step, _, log in run.train("teacher", 41, [model]):
            log["loss"] = 1.0
            if step == 40:                                                  # the last of 41 steps ruins the weights
                model.head.head.weight.data.fill_(math.nan)


def test_another_reward_can_take_its_place(data, tmp_path, monkeypatch):
    (tmp_path / "my_reward.py").write_text(
        "import torch\nlearnt = torch.nn.Parameter(torch.ones(()))\n"
        "def red(frames, captions):\n    return learnt * frames[:, :, 0].float().mean((1, 2, 3))\n")
    monkeypatch.syspath_prepend(tmp_path)
    scores = rf.find_reward("my_reward:red", data[0], data[1], TOY)(data[0], data[1])
    assert not scores.requires_grad                                         # a graph kept from here would be walked twice
    assert scores[["red" in c for c in data[1]]].mean() > scores[["blue" in c for c in data[1]]].mean() + 0.5
    (tmp_path / "bad_reward.py").write_text("import torch\ndef two(frames, captions):\n    return torch.rand(len(frames), 2)\n"
                                            "def same(frames, captions):\n    return torch.ones(len(frames))\n")
    for name, why in (("os:sep", "callable"), ("nothing:here", "No module"), ("words", "No module"), ("bad_reward:two", "2\\) numbers"),
                      ("bad_reward:same", "deviation 0")):
        with pytest.raises(BadInput, match=f"--reward {name} cannot be used.*{why}"):
            rf.find_reward(name, data[0], data[1], TOY)
