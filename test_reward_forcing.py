"""Facts about reward_forcing.py, in file order:  python -m pytest test_reward_forcing.py

REWARD_FORCING_GOLDEN names another file of recorded numbers for the golden tests.
"""
import functools
import inspect
import io
import itertools
import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

import reward_forcing as rf
from reward_forcing import BadInput, EMASinkCache, PRESETS, VideoTransformer, rollout

HERE = Path(__file__).parent
WORLD = HERE / "tiny_data/world.npz"
TOY = PRESETS["scratch"]
FULL = PRESETS["full"]
SMALL = replace(TOY, dim=24, ffn_dim=32, heads=2, layers=2, height=16, width=24, text_dim=16)
TINY = ("--from-scratch --dim 24 --ffn-dim 24 --heads 2 --layers 1 --batch 4 --sample-steps 4 "
        "--ode-clips 1 --critic-ratio 1 --teacher-steps 60 --ode-steps 40 --distill-steps 40 --frames 24").split()


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def random_model(cfg, dtype=torch.float64):
    """Every parameter random and of a size that matters, norms, gates and head included."""
    model = VideoTransformer(cfg).to(dtype).requires_grad_(False)
    for name, p in model.named_parameters():
        mean = 1.0 if "norm" in name and "weight" in name else 0.0
        spread = 0.3 if p.dim() < 2 else p.shape[-1] ** -0.5
        p.normal_(mean, spread)
    return model


def random_text(cfg, batch=1):
    return torch.randn(batch, 3, cfg.text_dim)


def noises(cfg, batch=1, dtype=torch.float64, seed=0):
    """draw(chunk, step) for rollout, the same at every call."""
    def draw(chunk, step):
        generator = torch.Generator().manual_seed(1000 * seed + 10 * chunk + step)
        shape = batch, cfg.chunk, *cfg.latent
        return torch.randn(shape, generator=generator).to(dtype)
    return draw


def same(a, b):
    """Equal bit for bit: tensors, or nested dicts and lists of them."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def error(a, b):
    """The largest difference of two tensors of one shape."""
    assert a.shape == b.shape
    return (a - b).abs().max()


def per_sample(numbers):
    """(B,) as a factor of (B, F, C, h, w)."""
    return numbers[:, None, None, None, None]


def spy(monkeypatch, owner, name):
    """A list to which every call of owner.name adds its arguments, by name, and its result."""
    calls, original = [], getattr(owner, name)

    @functools.wraps(original)
    def recorded(*args, **named):
        bound = inspect.signature(original).bind(*args, **named)
        bound.apply_defaults()
        result = original(*args, **named)
        calls.append(SimpleNamespace(**bound.arguments, result=result))
        return result
    monkeypatch.setattr(owner, name, recorded)
    return calls


# ------------------------------------------------------------------------- Config and noise
def test_schedule_of_shift_5_is_the_papers():
    paper = torch.tensor([1, 0.9375, 5 / 6, 0.625])
    assert error(replace(TOY, sigma_shift=5.0).sigmas, paper) < 1e-6


@pytest.mark.parametrize("sigma", [[0.3, 1.0], [[0.0, 0.3, 1.0], [0.9, 0.5, 0.0]]])
def test_x0_is_recovered_from_a_perfect_velocity(sigma):
    x0, noise = torch.randn(2, 2, 3, 4, 2, 2, dtype=torch.float64)
    sigma = torch.tensor(sigma, dtype=torch.float64)
    xt = rf.add_noise(x0, noise, sigma)
    assert torch.equal(xt[sigma == 1], noise[sigma == 1])
    assert error(rf.recover_x0(xt, noise - x0, sigma), x0) < 1e-12


# ------------------------------------------------------------------------------------ Model
def test_rope_scores_depend_on_relative_position_only():
    q, k = torch.randn(2, 1, 6, 2, 12)

    def score(first):
        near, far = (rf.rope_table(SMALL, n, 1, q.device) for n in (first, first + 2))
        return (rf.rotate(q, near) * rf.rotate(k, far)).sum(-1)
    assert error(score(0), score(5)) < 1e-4 < 1e-2 < error(score(0), (q * k).sum(-1))


def test_unpatchify_puts_every_number_where_wan_has_it():
    tokens = torch.randn(2, 3, 6, 20)
    plain = tokens.view(2, 3, 2, 3, 2, 2, 5)                         # (B, F, row, column, dy, dx, C)
    plain = plain.permute(0, 1, 6, 2, 4, 3, 5).reshape(2, 3, 5, 4, 6)
    assert torch.equal(rf.unpatchify(tokens, rows=2), plain)


def test_full_preset_is_wan_1_3b_and_a_pass_in_a_full_window_is_24_teraflop():
    with torch.device("meta"):
        model = VideoTransformer(FULL).requires_grad_(False)
        sizes = [p.numel() for p in model.state_dict().values()]
        assert len(sizes) == 825 and sum(sizes) == 1_418_996_800
        cache = EMASinkCache(FULL)
        text_kv = model.embed_text(torch.empty(1, FULL.text_len, FULL.text_dim))
        for _ in range(4):                                           # the fourth has evicted
            with FlopCounterMode(display=False) as counter:
                x = torch.empty(1, FULL.chunk, *FULL.latent)
                model(x, torch.empty(1), text_kv, cache)
            cache.append()
    assert abs(counter.get_total_flops() / 1e12 - 24.26) < 0.005


def test_bidirectional_frames_see_the_future():
    model, x = random_model(SMALL), noises(SMALL)(0, 0)
    text_kv, sigma = model.embed_text(random_text(SMALL)), torch.tensor([0.5])
    velocity = model(x, sigma, text_kv)
    x[:, 2] += 1
    assert error(model(x, sigma, text_kv)[:, 0], velocity[:, 0]) > 1e-3


# ------------------------------------------------- Cache and rollout against a slow twin
def slow_rope(x, cfg):
    """x (layers, B, T, H, D), the tokens of frames 0, 1, ..., turned by complex numbers."""
    band = 2 * (cfg.head_dim // 6)
    frames = x.shape[2] // cfg.rows // cfg.cols
    places = itertools.product(range(frames), range(cfg.rows), range(cfg.cols))
    places = torch.tensor(list(places)).double()                     # (T, 3)
    angles = []
    for axis, size in enumerate((cfg.head_dim - 2 * band, band, band)):
        frequency = cfg.rope_base ** -(torch.arange(0, size, 2) / size)
        angles.append(places[:, axis, None] * frequency)
    turn = torch.exp(1j * torch.cat(angles, 1)[:, None])
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * turn).flatten(-2)


class SlowCache:
    """Keeps all clean frames and works out the window anew: the EMA by hand, in float64."""
    def __init__(self, cfg):
        self.cfg, self.past, self.context, self.frames = cfg, [], [], 0
        self.newest = [None] * cfg.layers

    def append(self):
        cfg = self.cfg
        chunk = torch.stack([torch.stack(kv) for kv in self.newest], 1)
        self.past += chunk.chunk(cfg.chunk, 3)                       # (2, layers, B, N, H, D)
        sink, others = self.past[:cfg.sink], self.past[cfg.sink:]
        gone = max(0, len(others) - (cfg.window - cfg.sink - cfg.chunk))
        for f in range(gone if cfg.sink else 0):
            slot = f % cfg.sink
            sink[slot] = cfg.alpha * sink[slot] + (1 - cfg.alpha) * others[f]
        seen = sink + others[gone:]
        self.frames = len(seen)
        if seen:
            keys, values = torch.cat(seen, 3)
            self.context = list(zip(slow_rope(keys, cfg), values))


def slow_rollout(model, text, cfg, draw, chunks):
    text_kv, cache = model.embed_text(text), SlowCache(cfg)
    for chunk in range(chunks):
        x = draw(chunk, 0)
        for step, sigma in enumerate(cfg.sigmas):
            xt = (1 - sigma) * x + sigma * draw(chunk, step)
            x = xt - sigma * model(xt, sigma.expand(len(x)), text_kv, cache)
        yield x
        model(x, torch.zeros(len(x)), text_kv, cache)
        cache.append()


@pytest.mark.parametrize("change", [
    {},
    {"alpha": 1.0},
    {"sink": 0},
    {"sink": 0, "window": 3},
    {"window": 6},
    {"sink": 1, "window": 7},
    {"sink": 4},
    {"chunk": 1, "window": 5},
], ids=str)
def test_stream_equals_a_plainly_written_one_with_a_hand_written_ema(change):
    cfg = replace(SMALL, **change)
    model, text, cache = random_model(cfg), random_text(cfg, 2), EMASinkCache(cfg)
    fast = rollout(model, text, cfg, noises(cfg, 2), 7, cache=cache)
    slow = slow_rollout(model, text, cfg, noises(cfg, 2), 7)
    for (ours, _), plain in zip(fast, slow):
        assert error(ours, plain) < 2e-5 * plain.abs().max()         # sink, RoPE: float32
    left = max(0, 7 * cfg.chunk - cfg.window)
    assert cache.updates == (left if cfg.sink else 0)


def test_noise_of_the_future_does_not_change_past_chunks():
    model, text = random_model(SMALL), random_text(SMALL)

    def other(chunk, step):
        return noises(SMALL, seed=int(chunk == 3))(chunk, step)
    pairs = zip(*(rollout(model, text, SMALL, draw, 5) for draw in (noises(SMALL), other)))
    assert [torch.equal(a, b) for (a, _), (b, _) in pairs] == [True] * 3 + [False] * 2


def test_bfloat16_stream_stays_near_the_float32_one():
    model, text, draw = random_model(SMALL, torch.float32), random_text(SMALL), noises(SMALL)
    plain = list(rollout(model, text, SMALL, draw, 20))
    half = list(rollout(model.bfloat16(), text, SMALL, draw, 20))
    worst = max((a - b).norm() / a.norm() for (a, _), (b, _) in zip(plain, half))
    assert 1e-4 < worst < 0.03                                       # measured: 0.014


def test_sink_of_a_bfloat16_stream_accumulates_in_float32():
    cfg = replace(SMALL, alpha=0.999)
    cache, shape = EMASinkCache(cfg), (1, cfg.chunk * 6, cfg.heads, cfg.head_dim)
    for chunk in range(40):                                          # starts as 1; what leaves is 2
        kv = torch.full(shape, 1.0 + (chunk > 0)).bfloat16()
        cache.newest = [(kv, kv)] * cfg.layers
        cache.append()
    want = 2 - cfg.alpha ** (cache.updates // cfg.sink)              # in bfloat16 1 + 0.001 is 1
    assert want > 1.03 and abs(torch.stack(cache.sink) - want).max() < 1e-4


def test_stream_memory_is_constant():
    cache, sizes, draw = EMASinkCache(SMALL), [], noises(SMALL, 1, torch.float32)
    stream = rollout(VideoTransformer(SMALL), random_text(SMALL), SMALL, draw, cache=cache)
    for _ in zip(range(40), stream):                                 # it goes on forever
        held = io.BytesIO()
        torch.save(vars(cache), held)                                # every storage once
        sizes.append(held.tell())
    assert sizes[0] < sizes[1] < sizes[2] and max(sizes[5:]) - min(sizes[5:]) < 200


def test_training_and_streaming_update_the_sink_alike():
    model, text, sinks = random_model(SMALL), random_text(SMALL), []
    for steps in (SMALL.denoise_steps, None):
        cache = EMASinkCache(SMALL)
        list(rollout(model, text, SMALL, noises(SMALL), 6, steps, cache))
        assert cache.updates == 9
        sinks.append(torch.stack(cache.sink))
    assert torch.equal(*sinks)


# ----------------------------------------------------------------------- Losses and gradients
def one_graph(student, text, cfg, noisy, sigma, clean, cache):
    """All chunks' x0 predictions in one graph; regress sends them back chunk by chunk."""
    text_kv, made = student.embed_text(text), []
    for chunk in zip(*(x.split(cfg.chunk, 1) for x in (noisy, sigma, clean))):
        made.append(rf.predict_x0(student, *chunk[:2], text_kv, cache))
        cache.exit = list(cache.newest)
        rf.remember(student, chunk[2], text_kv, cache)
    return torch.cat(made, 1)


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_regress_gives_the_gradients_of_one_graph(steps):
    cfg, student = replace(SMALL, window=6), random_model(SMALL).requires_grad_()
    text, cache, weight = random_text(cfg, 2), EMASinkCache(cfg), torch.tensor([0.5, 2.0])
    chunks = rollout(student, text, cfg, noises(cfg, 2), 4, steps)
    clean, noisy = (torch.cat(part, 1) for part in zip(*chunks))
    sigma, target = cfg.sigmas[steps - 1].expand(2, 12), torch.randn_like(clean)
    made = one_graph(student, text, cfg, noisy, sigma, clean, cache)
    assert error(made, clean) < 1e-12                                # it replays the rollout
    assert not any(keys.requires_grad for keys, _ in cache.context)
    loss = (per_sample(weight) * (made - target) ** 2).mean() / 2
    whole = torch.autograd.grad(loss, list(student.parameters()))
    total = rf.regress(student, text, cfg, noisy, sigma, clean, target, weight)
    assert abs(total - loss) < 1e-10
    assert all(error(p.grad, grad) < 1e-10 for p, grad in zip(student.parameters(), whole))


def test_dmd_gradient_is_zero_when_critic_is_teacher():
    x, real = torch.randn(2, 2, 3, 4, 4, 4)
    assert not rf.dmd_gradient(x, real, real).any()


def test_redmd_gradient_is_weight_times_g_over_numel():
    x, g = torch.randn(2, 3, 2, 4, 4, 4, dtype=torch.float64)
    weight = torch.tensor([0.5, 1.0, 2.0])
    x.requires_grad_()
    rf.regression_loss(x, (x - g).detach(), weight).backward()
    assert error(x.grad, per_sample(weight) * g / x.numel()) < 1e-12


def test_flow_matching_loss_is_weighted_by_sample_and_asks_most_of_motion():
    x0, noise = torch.randn(2, 2, 3, *SMALL.latent)
    weight, signs = torch.tensor([1.0, 3.0]), torch.tensor([1.0, -1.0, 1.0]).view(1, 3, 1, 1, 1)

    def model(xt, sigma, text_kv):                                   # trembling errors of 1 and 3
        return noise - x0 + signs * per_sample(weight)
    for norm, factor in ((rf.mean_square, 1), (rf.motion_square, (1 + 4) * (1 + 4 * 4))):
        loss = rf.flow_matching_loss(model, x0, None, weight / 4, noise, weight, norm)
        assert abs(loss / factor - (1 * 1 + 3 * 9) / 2) < 1e-3


def test_reward_weight_is_exp_of_reward_over_beta_and_of_mean_one_in_the_long_run():
    weigh, rewards = rf.RewardWeight(0.5), torch.rand(400, 4)
    weights = torch.stack([weigh(reward) for reward in rewards])
    assert abs(weights[100:].mean() - 1) < 0.02
    assert error(weights / weights[:, :1], torch.exp((rewards - rewards[:, :1]) / 0.5)) < 1e-4
    resumed = rf.RewardWeight(0.5)
    resumed.load_state_dict(weigh.state_dict())
    better = rewards[0] + 1
    assert torch.equal(resumed(better), weigh(better))
    assert weigh(better).mean() > 2                                  # the mean of no single batch
    assert torch.equal(rf.RewardWeight(math.inf)(better), torch.ones(4))


@pytest.mark.parametrize("student_beta, critic_beta", [
    pytest.param(math.inf, math.inf, id="DMD"),
    pytest.param(1.0, math.inf, id="Re-DMD"),
    pytest.param(math.inf, 1.0, id="tilted critic"),
])
def test_training_ends_at_the_teacher_and_only_a_tilted_critic_moves_the_end(student_beta,
                                                                             critic_beta):
    """Particles move by DMD between two Gaussians, with exact denoisers; the reward is x."""
    centres, spread, steps, x = torch.tensor([-1.0, 1.0]), 0.4, 600, torch.randn(400, 1)
    weigh, tilt = rf.RewardWeight(student_beta), rf.RewardWeight(-critic_beta)

    def denoise(xt, sigma, centres, spread, weight):                 # E[x0 | xt] of a mixture
        variance = (1 - sigma) ** 2 * spread ** 2 + sigma ** 2
        off = xt - (1 - sigma) * centres
        share = torch.softmax(weight.log() - off ** 2 / (2 * variance), 1)
        x0 = centres + (1 - sigma) * spread ** 2 / variance * off
        return (share * x0).sum(1, keepdim=True)
    for step in range(steps):
        sigma, reward = torch.rand(1).clamp(0.02, 0.98), x[:, 0]
        xt = rf.add_noise(x, torch.randn_like(x), sigma)
        fake = denoise(xt, sigma, reward, 0.1, tilt(reward))
        g = fake - denoise(xt, sigma, centres, spread, torch.ones(2))
        made = x.clone().requires_grad_()
        rf.regression_loss(made, x - g, weigh(reward)).backward()
        x = x - 0.1 * (1 - step / steps) * len(x) * made.grad
    mass = torch.softmax(centres / critic_beta, 0)                   # of teacher * exp(x / beta)
    mean = (mass * (centres + spread ** 2 / critic_beta)).sum()
    assert abs(x.mean() - mean) < 0.05
    assert abs((x > 0).float().mean() - mass[1]) < 0.02


# ------------------------------------- Golden: numbers recorded from the public implementation
GOLDEN = Path(os.environ.get("REWARD_FORCING_GOLDEN", HERE / "tiny_data/golden.npz"))
STREAMS = [name for name in ("stream", "static", "stream_b2") if name + ".x0" in np.load(GOLDEN)]
SAME_NAMES = "dim ffn_dim freq_dim text_dim text_len"
OTHER_NAMES = ("heads=num_heads layers=num_layers channels=in_dim chunk=frames_per_chunk "
               "sink=sink_size window=local_attn_size")


@pytest.fixture(scope="module")
def golden():
    """Every recorded array, and the config and model that the file describes."""
    a = {name: torch.from_numpy(array) for name, array in np.load(GOLDEN).items()}
    sizes = {name: int(a["cfg." + name]) for name in SAME_NAMES.split()}
    for pair in OTHER_NAMES.split():
        ours, theirs = pair.split("=")
        sizes[ours] = int(a["cfg." + theirs])
    for side in ("height", "width"):
        sizes[side] = TOY.stride * int(a["cfg." + side])
    cfg = replace(TOY, **sizes, alpha=a["cfg.alpha"].item(), sigma_shift=5.0, rope_base=10000.0,
                  guidance=a["cfg.guidance"].item(), clip=a["train.x0"].shape[1])
    model = VideoTransformer(cfg).requires_grad_(False)
    model.load_state_dict({name[3:]: p for name, p in a.items() if name.startswith("sd.")})
    return a, cfg, model


def nearest_sigma(a, timestep):
    """The public code's sigma of timestep (n,): the nearest in a table of 1000."""
    distance = a["sched.timesteps"] - timestep.float()[:, None]
    return a["sched.sigmas"][distance.abs().argmin(1)]


def test_golden_file_agrees_with_itself(golden):
    a, cfg, _ = golden
    assert a["cfg.frame_seqlen"] == cfg.rows * cfg.cols and a["cfg.out_dim"] == cfg.channels
    assert a["cfg.chunks"] * cfg.chunk == a["stream.noise"].shape[1]
    assert a["cfg.beta"] == a["redmd.beta"] and a["cfg.guidance"] == a["redmd.guidance"]


def test_golden_schedule(golden):
    a, cfg, _ = golden
    table = cfg.schedule(1000)[:-1]
    assert error(table, a["sched.sigmas"]) < 1e-6
    assert error(1000 * table, a["sched.timesteps"]) < 1e-3          # float32 of up to 1000
    assert error(1000 * cfg.sigmas, a["sched.warped"]) < 1e-3
    assert error(1000 * cfg.schedule(cfg.denoise_steps), a["stream.t"].float()) < 1e-3
    xt, sigma = a["sched.ex_xt"], a["sched.ex_sigma"]
    assert error(nearest_sigma(a, a["sched.ex_t"]), sigma) < 1e-6
    assert error(rf.add_noise(a["sched.ex_x"], a["sched.ex_noise"], sigma), xt) < 1e-5
    for flow in ("sched.ex_flow", "sched.ex_flow_back"):
        assert error(rf.recover_x0(xt, a[flow], sigma), a["sched.ex_x0"]) < 1e-5


def test_golden_rope_of_128_channels(golden):
    cfg = replace(FULL, height=32, width=48)                         # 2 rows of 3 tokens
    for first in (0, 6):
        rope = rf.rope_table(cfg, first, 3, torch.device("cpu"))
        turned = rf.rotate(golden[0]["rope128.x"], rope)
        assert error(turned, golden[0][f"rope128.start{first}"]) < 2e-5


def test_golden_time_embedding_and_bidirectional_forward(golden):
    a, cfg, model = golden
    assert error(model.embed_sigma(a["temb.t"].double() / 1000), a["temb.out"]) < 2e-5
    x, sigma, ctx = a["bidir.x"].transpose(1, 2), a["bidir.t"].double() / 1000, a["ctx"]
    flow = model(x, sigma, model.embed_text(ctx)).transpose(1, 2)
    assert error(flow, a["bidir.flow"]) < 2e-5
    flow = model(x[1:], sigma[1:], model.embed_text(ctx[1:, :3])).transpose(1, 2)
    assert error(flow, a["bidir.flow_len3"]) < 2e-5


@pytest.mark.parametrize("name", STREAMS)
def test_golden_stream(golden, name, monkeypatch):
    a, cfg, model = golden
    source = name
    if name == "static":
        cfg, source = replace(cfg, alpha=1.0), "stream"              # the same noise
    x0, noise = (a[key].split(cfg.chunk, 1) for key in (name + ".x0", source + ".noise"))
    last, cache = len(x0) - 1, EMASinkCache(cfg)

    def draw(chunk, step):                                           # one chunk more is begun, for
        chunk = min(chunk, last)                                     # the last one's cache pass
        return a[source + ".renoise"][chunk, step - 1] if step else noise[chunk]
    passes = spy(monkeypatch, VideoTransformer, "forward")
    chunks = rollout(model, a["ctx"][:len(noise[0])], cfg, draw, last + 2, cache=cache)
    for n in range(last + 1):
        assert error(next(chunks)[0], x0[n]) < 5e-5
        sinks = torch.stack(cache.sink, 3).flatten(3, 4) if n else ()
        for kind, sink in zip("kv", sinks):                          # (layers, B, S*N, H, D)
            if f"{name}.sink_{kind}" in a:
                assert error(sink, a[f"{name}.sink_{kind}"][n]) < 5e-5
            if n == last and f"{name}.sink_{kind}_final" in a:
                assert error(sink, a[f"{name}.sink_{kind}_final"]) < 5e-5
    next(chunks)
    recorded = a.get(name + ".flow", torch.zeros(0, 1)).flatten(0, 1)
    for call, flow in zip(passes, recorded):
        assert error(call.result, flow) < 5e-5


class LeakyCache(EMASinkCache):
    """The public training cache: values of the clean pass, gradient of the exit pass, a static
    sink."""
    @torch.enable_grad()
    def append(self):
        self.newest = [[clean + leak - leak.detach() for clean, leak in zip(*layer)]
                       for layer in zip(self.newest, self.exit)]
        EMASinkCache.append.__wrapped__(self)

    def evict(self, frame):
        pass


@pytest.fixture
def golden_training(golden):
    """The public training rollout, which caches noised frames: (a, a model for gradients, and what
    one_graph and regress take)."""
    a, cfg, model = golden
    noise, steps = a["train.noise"].split(cfg.chunk, 1), int(a["cfg.train_exit"]) + 1
    least, context_noise = a["sched.sigmas"][-1:], iter(a["train.context_noise"])
    cfg = replace(cfg, alpha=1.0)

    def draw(chunk, step):
        return a["train.renoise"][chunk, step - 1] if step else noise[chunk]

    def student(x, sigma, text_kv, cache):
        if sigma.max() == 0:
            x = rf.add_noise(x, next(context_noise), least)
        return model(x, sigma, text_kv, cache)
    student.embed_text = model.embed_text
    chunks = rollout(student, a["ctx"][:1], cfg, draw, len(noise), steps)
    x0, noisy = (torch.cat(part, 1) for part in zip(*chunks))
    assert error(x0, a["train.x0"]) < 1e-5
    clean = rf.add_noise(x0, torch.cat([*a["train.context_noise"]], 1), least)
    learner = VideoTransformer(cfg)
    learner.load_state_dict(model.state_dict())
    sigma = cfg.sigmas[steps - 1].expand(x0.shape[:2])
    return a, learner, (learner, a["ctx"][:1], cfg, noisy, sigma, clean)


def relative_errors(a, model):
    """{name: error of the gradient, relative to its largest element} of all recorded."""
    names = [key for key in a if key.startswith("train.grad.")]
    assert len(names) >= 4
    return {name: error(model.get_parameter(name[11:]).grad, a[name]) / a[name].abs().max()
            for name in names}


def test_golden_training_rollout_and_its_gradients_through_a_leaky_cache(golden_training):
    a, model, inputs = golden_training
    cfg = inputs[2]
    made = one_graph(*inputs, LeakyCache(cfg))
    assert error(made, a["train.x0"]) < 1e-5
    loss = rf.regression_loss(made, 0)
    assert abs(loss / a["train.loss"] - 1) < 1e-5
    loss.backward()
    assert max(relative_errors(a, model).values()) <= 1e-5
    times = [1000 * (1 - (a["cfg.train_exit"] + i) / cfg.denoise_steps) for i in (0, 1)]
    assert a["train.timestep_from_to"].tolist() == times             # of the unshifted schedule


def test_golden_departure_here_the_context_carries_no_gradient(golden_training):
    a, model, inputs = golden_training
    loss = rf.regress(*inputs, target=torch.zeros_like(a["train.x0"]))
    assert abs(loss / a["train.loss"] - 1) < 1e-5                    # the same frames
    for name, wrong in relative_errors(a, model).items():
        if "self_attn.k.weight" in name or "self_attn.v.weight" in name:
            assert wrong > 0.1


def test_golden_departure_here_teacher_and_critic_use_the_students_schedule(golden):
    a, cfg, model = golden
    table = replace(cfg, sigma_shift=8.0).schedule(1000)[:-1]
    nearest = table[(1000 * table - a["bidir.t"].float()[:, None]).abs().argmin(1)]
    x = a["bidir.x"].transpose(1, 2)
    flow = model(x, a["bidir.t"].double() / 1000, model.embed_text(a["ctx"]))
    assert error(rf.recover_x0(x, flow, nearest), a["bidir.x0_shift8"]) < 5e-5


def test_golden_departure_here_no_loss_is_weighted_by_the_noise_level(golden):
    x0, noise = torch.randn(2, 1, 3, 4, 2, 2)
    for sigma in golden[0]["sched.sigmas"][::100]:
        loss = rf.flow_matching_loss(lambda *_: noise - x0 + 1, x0, None, sigma[None], noise)
        assert abs(loss - 1) < 1e-5                                  # there by a bell of mean 1


def test_golden_redmd_and_critic(golden):
    a = {key.removeprefix("redmd."): array.double() for key, array in golden[0].items()}
    x, fake, cond = a["x0"], a["pred_fake"], a["pred_real_cond"]
    sigma = nearest_sigma(golden[0], a["timestep"][:, 0]).double()
    assert error(rf.add_noise(x, a["noise"], sigma), a["noisy"]) < 1e-5

    def teacher(xt, sigma, text, cache=None):                        # its x0 are the recorded ones
        return (xt - (cond if text.any() else a["pred_real_uncond"])) / per_sample(sigma)
    teacher.embed_text = lambda text: text
    told = torch.ones(len(x), 1)
    real = rf.guided_x0(teacher, a["noisy"], sigma, told, a["guidance"].item())
    g = rf.dmd_gradient(x, real, fake)
    assert error(g, a["grad"]) < 1e-5 * a["grad"].abs().max()
    assert error(rf.mean_each((x - real).abs()), a["normalizer"]) < 1e-5
    weigh, mean = rf.RewardWeight(1 / a["beta"].item()), torch.exp(a["beta"] * a["mq"]).mean()
    weight = mean * weigh(a["mq"])
    for i in range(len(x)):                                          # recorded one call a sample
        made = x[i:i + 1].clone().requires_grad_()
        loss = rf.regression_loss(made, x[i:i + 1] - g[i:i + 1], weight[i:i + 1])
        loss.backward()
        assert abs(loss / a["loss"][i] - 1) < 1e-5
        assert error(made.grad[0], a["dloss_dx0"][i]) < 1e-5 * a["dloss_dx0"][i].abs().max()

    def critic(xt, sigma, text_kv):
        return (xt - fake) / per_sample(sigma)
    sigma = nearest_sigma(golden[0], a["critic.timestep"][:, 0]).double()
    loss = rf.flow_matching_loss(critic, x, None, sigma, a["critic.noise"].view_as(x))
    assert abs(loss / a["critic.loss"] - 1) < 1e-6


def test_golden_departure_the_public_code_weights_the_batch_by_the_reward_of_sample_0(golden):
    a = golden[0]
    weight, official = torch.exp(a["redmd.beta"] * a["redmd.mq"]), a["redmd.official_b2_loss"]
    theirs = a["redmd.dloss_dx0"] * per_sample(weight[0] / weight) / 2
    assert error(theirs, a["redmd.official_b2_dloss_dx0"]) < 1e-5 * theirs.abs().max()
    x = a["redmd.x0"]
    for given, least, most in ((weight[:1], 0, 1e-5), (weight, 0.01, math.inf)):     # theirs, ours
        loss = rf.regression_loss(x, x - a["redmd.grad"], given)
        assert least <= abs(loss / official - 1) < most


# ------------------------------------------- The stages: who is asked what, in a step of each
@pytest.fixture
def make_run(tmp_path):
    """make_run(field=value, ...): a tiny Run in which teacher and ODE student are random."""
    def make(**change):
        options, given = rf.parse(TINY)
        run = rf.Run(replace(TOY, **{**given, **change}), tmp_path, WORLD)
        for stage in ("teacher", "ode"):
            weights = random_model(run.cfg, torch.float32).state_dict()
            run.state["stages"][stage] = {"step": 0, "parts": [weights]}
        return run
    return make


def test_clips_are_cut_in_order_with_their_captions_some_dropped(make_run, monkeypatch):
    run = make_run(batch=100, drop_caption=0.5)
    world, (clips, frames) = run.world, run.world.clips.shape[:2]
    world.clips[:, :, 0] = torch.arange(clips).view(-1, 1, 1, 1)
    world.clips[:, :, 1] = torch.arange(frames).view(-1, 1, 1)
    encoded = spy(monkeypatch, world, "encode")
    x0, text = run.draw_clips()
    cuts = encoded[0].frames
    assert x0 is encoded[0].result and (cuts[:, :, 1].diff(dim=1) == 1).all()
    told = world.text([world.captions[i] for i in cuts[:, 0, 0, 0, 0]])
    kept = text.flatten(1).any(1)
    assert torch.equal(text[kept], told[kept]) and 30 < kept.sum() < 70


def test_teacher_learns_from_clips_their_text_and_levels_of_half_the_frames(make_run, monkeypatch):
    run = make_run(teacher_steps=1)
    run.state["stages"].clear()
    drawn, asked = spy(monkeypatch, run, "draw_clips"), spy(monkeypatch, rf, "flow_matching_loss")
    first = run.model()
    rf.train_teacher(run)
    x0, text = drawn[0].result
    assert asked[0].x0 is x0 and asked[0].norm is rf.motion_square
    assert error(asked[0].text_kv[0][0], first.embed_text(text)[0][0]) < 1e-6
    levels = [len(sigma.unique()) for sigma in asked[0].sigma]
    assert levels == [1, run.cfg.clip] * 2


def test_guided_trajectory_of_a_known_teacher_is_the_known_line():
    noise = torch.randn(2, 3, *TOY.latent)

    def teacher(xt, sigma, text, cache):                             # the data is 1, or 0 untold
        return (xt - text.mean()) / per_sample(sigma)
    teacher.embed_text = lambda text: text
    path = rf.teacher_trajectory(teacher, noise, torch.ones(2, 1), TOY)
    for level, sigma in enumerate([1, 0.9, 0.75, 0.5, 0]):           # at shift 3
        line = (1 - sigma) * (1 + TOY.guidance) + sigma * noise
        assert error(path[:, level], line) < 1e-5


def test_ode_student_regresses_the_clean_end_from_a_level_of_each_chunk(make_run, monkeypatch):
    run = make_run(ode_steps=1)
    cfg, weights = run.cfg, run.state["stages"]["teacher"]["parts"][0]
    run.state["stages"].pop("ode")
    calls, asked = spy(monkeypatch, rf, "teacher_trajectory"), spy(monkeypatch, rf, "regress")
    rf.train_ode(run)
    step, paths = asked[0], torch.cat([call.result for call in calls])
    texts = torch.cat([call.text for call in calls])
    assert same(calls[0].teacher.state_dict(), weights)
    clip = (step.clean[:, None] == paths[:, -1]).flatten(2).all(2).long().argmax(1)
    level = (step.sigma[..., None] == cfg.sigmas).long().argmax(2)
    noisy = paths[clip[:, None], level, torch.arange(cfg.clip)]
    assert torch.equal(step.target, paths[clip, -1]) and torch.equal(step.noisy, noisy)
    assert torch.equal(step.text, texts[clip])
    chunks = level.unflatten(1, (-1, cfg.chunk))
    assert (chunks == chunks[..., :1]).all() and (chunks != chunks[:, :1]).any()


@pytest.mark.parametrize("change", [{}, {"tilt": True}, {"shuffle": True}], ids=str)
def test_student_step_asks_each_model_about_the_right_samples(make_run, monkeypatch, change):
    run = make_run(distill_steps=1, critic_ratio=2, student_lr=0.5, critic_lr=0.5, **change)
    cfg, saved, rewards = run.cfg, dict(run.state["stages"]), torch.tensor([0.1, 0.5, 0.2, 0.4])
    monkeypatch.setattr(rf, "motion_reward", lambda frames: rewards)
    names = "motion_reward", "flow_matching_loss", "update", "guided_x0", "regress"
    judged, critics, updates, teachers, steps = (spy(monkeypatch, rf, name) for name in names)
    samples = spy(monkeypatch, run, "draw_samples")
    rf.train_student(run)
    real, step, critic = teachers[0], steps[0], critics[0].model
    assert same(real.teacher.state_dict(), saved["teacher"]["parts"][0])
    assert [call.model for call in updates] == [critic, critic, step.student]
    for loss, drawn in zip(critics, samples):
        assert loss.x0 is drawn.result[0] and drawn.student is step.student
    told = real.teacher.embed_text(samples[0].result[3])             # the critic begins as it
    assert torch.equal(critics[0].text_kv[0][0], told[0][0])

    x, noisy, exit_sigma, text, _ = samples[2].result
    assert step.noisy is noisy and step.sigma is exit_sigma and step.clean is x
    assert step.text is text and real.text is text and real.guidance == cfg.guidance
    sigma = per_sample(real.sigma)
    assert abs(((real.xt - (1 - sigma) * x) / sigma).std() - 1) < 0.05
    assert len(torch.cat([real.sigma, critics[0].sigma]).unique()) > 6
    fake = rf.predict_x0(critic, real.xt, real.sigma, critic.embed_text(text))
    g = (fake - real.result) / per_sample(rf.mean_each((x - real.result).abs()))
    assert error(step.target, x - g) < 1e-4

    assert torch.equal(judged[-1].frames, run.world.decode(x))
    assert torch.equal(judged[0].frames, run.world.decode(samples[2 - 2 * cfg.tilt].result[0]))
    weights, ones = torch.exp(rewards / (-cfg.beta if cfg.tilt else cfg.beta)), torch.ones(4)
    weights = weights / weights.mean()
    given = step.weight * ones
    if cfg.shuffle:
        assert error(given, weights) > 0.1
        given, weights = given.sort().values, weights.sort().values
    assert error(given, ones if cfg.tilt else weights) < 1e-5
    assert error(critics[1].weight * ones, weights if cfg.tilt else ones) < 1e-5

    student, before = step.student.state_dict(), saved["ode"]["parts"][0]
    for name, streamed in run.state["stages"]["student"]["parts"][0].items():
        want = before[name].lerp(student[name], 1 - cfg.weight_ema)
        assert error(streamed, want) < 1e-5 < error(streamed, before[name])


def test_samples_stop_at_every_step_and_follow_from_their_noisy_frames(make_run):
    run, exits = make_run(), set()
    student = run.model("ode")
    for _ in range(16):
        x, noisy, sigma, text, _ = run.draw_samples(student)
        assert rf.regress(student, text, run.cfg, noisy, sigma, x, target=x) < 1e-8
        exits.add(sigma.unique().item())
    assert exits == set(run.cfg.sigmas.tolist())


# -------------------------------------------------------------------------- The toy's world
@pytest.fixture(scope="module")
def world():
    return rf.ToyWorld(TOY, WORLD)


def test_world_is_what_its_script_draws_and_small(tmp_path):
    subprocess.run([sys.executable, HERE / "tiny_data/make.py", tmp_path / "w.npz"], check=True)
    ours, drawn = np.load(WORLD), np.load(tmp_path / "w.npz")
    assert WORLD.stat().st_size < 2e6
    for name in ours:
        if name in ("mean", "encode", "decode"):
            assert np.abs(ours[name] - drawn[name]).max() < 1e-4
        else:
            assert np.array_equal(ours[name], drawn[name])


def test_vae_returns_the_pixels_near_enough_for_the_tracker(world):
    clips = world.clips[::4]
    latents = world.encode(clips)
    decoded = world.decode(latents)
    noise = (decoded.float() - clips.float()).square().mean()
    assert 10 * math.log10(255 ** 2 / noise) > 29                    # dB
    assert abs(latents.std() - 1) < 0.1
    assert rf.measure(decoded, world.captions[::4], 3)["shape"] > 0.98


def test_tracker_finds_the_true_speeds_and_shapes(world):
    truth = np.load(WORLD)["speed"]
    speed = rf.track(world.clips)[1].diff(dim=1).norm(dim=2).mean(1).numpy()
    assert (np.abs(speed - truth) <= np.maximum(0.1 * truth, 0.02)).all()
    assert rf.measure(world.clips, world.captions, 3)["shape"] > 0.99
    wrong = [caption.replace("square", "circle") for caption in world.captions]
    assert abs(rf.measure(world.clips, wrong, 3)["shape"] - 2 / 3) < 0.02


def discs(x, radius=5.0):
    """A clip (1, F, 3, 32, 32) of a bright disc at x (F,), of radius (F,); 0: none."""
    x, radius = x[:, None, None], torch.as_tensor(radius).view(-1, 1, 1)
    grid = torch.arange(32) + 0.5
    distance = ((grid - x) ** 2 + (grid[:, None] - 16) ** 2).sqrt()
    pixels = 30 + 200 * (radius + 0.5 - distance).clamp(0, 1) * (radius > 0)
    return pixels.to(torch.uint8)[None, :, None].expand(-1, -1, 3, -1, -1)


TIME = torch.arange(12.0)


@pytest.mark.parametrize("speed", [0.0, 0.5, 1.0, 1.5])
def test_reward_of_an_even_glide_is_its_speed(speed):
    assert abs(rf.motion_reward(discs(8 + speed * TIME)) - speed) < 0.03


@pytest.mark.parametrize("frames", [
    pytest.param(discs(8 + 3 * (TIME // 3)), id="jumps at every third frame"),
    pytest.param(discs(16 + TIME % 2), id="trembles"),
    pytest.param(discs(8 + TIME, 5 * (TIME % 2)), id="vanishes in every other frame"),
    pytest.param(discs(8 + TIME, 3 + 2 * (TIME % 2)), id="changes its size"),
    pytest.param(discs(16 + 3 * torch.sin(TIME ** 2)), id="shakes"),
])
def test_reward_of_broken_motion_is_below_that_of_a_clean_glide_at_half_the_speed(frames):
    assert rf.motion_reward(frames) < rf.motion_reward(discs(8 + 0.5 * TIME))


def test_measures_tell_frozen_gliding_jumping_and_empty_clips_apart():
    frozen, glide, jump, empty, grown = (rf.measure(discs(*disc), ["a red circle"], 3) for disc in (
        [0 * TIME + 8], [8 + TIME], [8 + 3 * (TIME // 3)], [TIME, 0 * TIME], [TIME, 3 + TIME / 3]))
    assert frozen["copy"] == frozen["shape"] == 1 and frozen["drift"] == frozen["area"] == 0
    assert glide["agree"] == glide["seam"] == glide["inside"] == 1 and glide["jitter"] == 0
    assert jump["inside"] == jump["agree"] == 0 and jump["seam"] == 3
    assert empty["shape"] == empty["agree"] == 0 and grown["area"] > 0.2
    assert rf.measure(discs(8 + TIME), ["a red square"], 3)["shape"] == 0
    away = rf.measure(discs(8 + TIME), ["a red circle"], 3, first=discs(24 + 0 * TIME))
    assert away["copy"] < glide["copy"]


# --------------------------------------------------------- Optimizers, checkpoint and ablation
def test_every_parameter_is_stepped_once_per_update(monkeypatch):
    model = VideoTransformer(SMALL)
    optimizers = rf.make_optimizers(model, 0.1)
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    owned = [id(p) for group in groups for p in group["params"]]
    assert sorted(owned) == sorted(map(id, model.parameters()))
    stepped = [spy(monkeypatch, optimizer, "step") for optimizer in optimizers]
    model.head.head.bias.grad = torch.full((64,), 0.5)
    assert rf.update(model, optimizers, 1.0, progress=0.5) == 4.0    # the norm before it is clipped
    assert [len(calls) for calls in stepped] == [1, 1] and model.head.head.bias.grad is None
    assert np.allclose([group["lr"] for group in groups], [0.05, 0.005])     # half of it is left


def test_resume_after_a_kill_in_every_stage_is_bitwise_equal(tmp_path, monkeypatch):
    kills, end = [("student", 33), ("ode", 15), ("teacher", 23)], rf.Stage.end

    def killed(stage, step, **numbers):                              # steps since the last save
        if kills and kills[-1] == (stage.name, step):                # are lost
            kills.pop()
            raise KeyboardInterrupt
        end(stage, step, **numbers)

    def toy(out):
        return rf.main(["--toy", *TINY, "--batch", "2", "--out", str(tmp_path / out)])
    assert toy("whole") == 0
    monkeypatch.setattr(rf.Stage, "end", killed)
    assert [toy("killed") for _ in range(4)] == [130, 130, 130, 0]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for name in ("metrics.json", "log.jsonl"):
        assert (whole / name).read_text() == (killed / name).read_text()
    assert same(*(torch.load(out / "checkpoint.pt") for out in (whole, killed)))


def test_nan_stops_the_run_names_the_step_and_is_not_saved(tmp_path, monkeypatch, capsys):
    steps, update = itertools.count(), rf.update

    def ruined(model, *rest):
        if next(steps) == 3:
            model.head.head.bias.grad += math.nan
        return update(model, *rest)
    monkeypatch.setattr(rf, "update", ruined)
    assert rf.main(["--toy", *TINY, "--out", str(tmp_path)]) == 1
    assert "teacher step 3 is not finite" in capsys.readouterr().err
    parts = rf.load_checkpoint(tmp_path / "checkpoint.pt")["stages"]["teacher"]["parts"]
    assert all(p.isfinite().all() for p in parts[0].values())


def test_ablation_trains_every_arm_once_with_its_own_change(tmp_path, monkeypatch, capsys):
    arms, train = [], rf.train_student

    def counted(run):
        arms.append(run.cfg)
        train(run)
    monkeypatch.setattr(rf, "train_student", counted)
    short = "--teacher-steps 1 --ode-steps 1 --distill-steps 1 --ablate --seeds 2".split()
    args = ["--toy", *TINY, *short, "--out", str(tmp_path)]
    assert rf.main(args) == 0
    base = arms.pop(0)
    changes = {}, {"beta": math.inf}, {"shuffle": True}, {"tilt": True}, {"alpha": 1.0}, {"sink": 0}
    want = [replace(base, seed=seed, **change) for seed in (100, 101) for change in changes]
    assert arms == want
    assert rf.main(args) == 0 and arms == [*want, base]              # which has no step to go
    done = json.loads((tmp_path / "ablation.json").read_text())
    gap = [done[f"no sink, seed {n}"]["copy"] - done[f"Re-DMD, seed {n}"]["copy"] for n in (100, 101)]
    row = capsys.readouterr().out.split("no sink - Re-DMD")[-1]
    assert f"'copy': '{np.mean(gap):.3f} +- {np.std(gap) :.3f}'" in row


# ----------------------------------------------------------------- Full size, with tiny parts
SIZES = ("--full --dim 24 --ffn-dim 32 --heads 2 --layers 2 --text-dim 16 --text-len 12 --height 32 "
         "--width 48 --frames 33").split()
TINY_WAN = replace(FULL, **rf.parse(SIZES)[1])


def package(name):
    """The package; where it is missing the test is skipped, but never in CI."""
    return __import__(name) if os.environ.get("CI") else pytest.importorskip(name)


@pytest.fixture(scope="module")
def wan(tmp_path_factory):
    """A Diffusers folder in Wan2.1's layout with tiny random parts."""
    diffusers, transformers = package("diffusers"), package("transformers")
    tokenizers, folder = package("tokenizers"), tmp_path_factory.mktemp("wan")
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKLWan(base_dim=8, dim_mult=[1, 2, 2, 2], num_res_blocks=1)
    vae.save_pretrained(folder / "vae")
    config = transformers.UMT5Config(vocab_size=8, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    transformers.UMT5EncoderModel(config).save_pretrained(folder / "text_encoder")
    vocabulary = {"<pad>": 0, "<unk>": 1, "a": 2, "red": 3, "panda": 4}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    words = transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>")
    words.save_pretrained(folder / "tokenizer")
    return folder


def save_layout(path, state):
    """The tensors of state as a file or folder in the layout that the path names."""
    named = {"model." + name: p for name, p in state.items()}
    wrapped = {name.replace(".", "._fsdp_wrapped_module.", 2): p for name, p in named.items()}
    old = {name: p + 1 for name, p in named.items()}
    contents = {"released.pt": named, "bare.pt": state,
                "trainer.pt": {"generator": named, "critic": old},
                "ema.pt": {"generator": old, "generator_ema": wrapped}}
    if path.name in contents:
        torch.save(contents[path.name], path)
        return
    package("safetensors")
    from safetensors.torch import save_file
    files = [path]
    if path.suffix == "":
        path.mkdir()
        files = [path / "1.safetensors", path / "2.safetensors"]
    for i, file in enumerate(files):
        save_file(dict(list(state.items())[i::len(files)]), file)


@pytest.mark.parametrize("layout", [
    "released.pt", "bare.pt", "trainer.pt", "ema.pt", "shards", "one.safetensors"])
def test_golden_weights_load_from_every_layout_and_misfits_are_named(golden, tmp_path, layout):
    state = golden[2].state_dict()
    with torch.device("meta"):
        model = VideoTransformer(golden[1])
    save_layout(tmp_path / layout, state)
    rf.load_weights(model, tmp_path / layout)
    assert same(model.state_dict(), state)
    state.pop("head.head.bias")
    for name in ("head.head.bias", "head.head.bias.*7", "surplus"):  # missing, misshapen, extra
        folder = tmp_path / name
        folder.mkdir()
        save_layout(folder / layout, state)
        with pytest.raises(BadInput, match=name) as refusal:
            rf.load_weights(model, folder / layout)
        assert "\n" not in str(refusal.value)
        state |= {"head.head.bias": torch.zeros(7)} if len(state) < 68 else {}


def test_text_is_the_encoders_and_zero_after_the_last_token(wan, monkeypatch):
    umt5 = package("transformers").UMT5EncoderModel
    encoder = umt5.from_pretrained(wan / "text_encoder")
    encoded = encoder(torch.tensor([[2, 3, 4]])).last_hidden_state
    encoder.encoder.embed_tokens = torch.nn.Embedding(8, 16)         # untied
    monkeypatch.setattr(umt5, "from_pretrained", lambda *_, **__: encoder)
    text = rf.wan_text("a red panda", wan, TINY_WAN, torch.float32)
    assert error(text[:, :3], encoded) < 1e-5 and not text[:, 3:].any()
    encoder.shared.weight.data.zero_()
    with pytest.raises(BadInput, match="word embedding"):
        rf.wan_text("a red panda", wan, TINY_WAN, torch.float32)


def test_decoding_by_chunks_equals_decoding_the_whole(wan, monkeypatch):
    vae, past, latents = rf.WanVAE(wan, torch.float32), {}, torch.randn(1, 9, 16, 4, 6)
    monkeypatch.setattr(rf, "to_bytes", lambda pixels: pixels.clamp(-1, 1))
    z = (latents * vae.std + vae.mean).transpose(1, 2)
    whole = vae.vae.decode(z).sample.transpose(1, 2)
    chunks = [vae.decode(chunk, past) for chunk in latents.split(3, 1)]
    assert [chunk.shape[1] for chunk in chunks] == [9, 12, 12]
    assert error(torch.cat(chunks, 1), whole) < 1e-4


def test_full_size_streams_and_benches(wan, tmp_path, capsys):
    save_layout(tmp_path / "ema.pt", random_model(TINY_WAN, torch.float32).state_dict())
    files = ["--wan", str(wan), "--weights", str(tmp_path / "ema.pt"), "--prompt", "a red panda"]
    assert rf.main([*SIZES, "--stream", *files, "--out", str(tmp_path)]) == 0
    with Image.open(tmp_path / "stream.webp") as image:
        assert image.n_frames == 33 and image.size == (192, 128)     # enlarged for the eye
    assert rf.main([*SIZES, "--bench", "--out", str(tmp_path)]) == 0
    assert "not decoded" in capsys.readouterr().out


# ----------------------------------------------------------------------------- Command line
def command(line, *more):
    """The command of a line as a process of its own."""
    program = [sys.executable, HERE / "reward_forcing.py", *line.split(), *more]
    return subprocess.run(program, capture_output=True, text=True)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("trained")
    ran = command("--toy", *TINY, "--teacher-steps", "150", "--distill-steps", "5", "--out", out)
    assert ran.returncode == 0, ran.stderr
    return out


def test_toy_writes_every_file_and_its_losses_fall(trained):
    files = {"report.png", "stream.gif", "log.jsonl", "checkpoint.pt", "metrics.json"}
    assert {path.name for path in trained.iterdir()} == files
    log = [json.loads(line) for line in (trained / "log.jsonl").read_text().splitlines()]
    for stage in ("teacher", "ode"):
        losses = [line["loss"] for line in log if line["stage"] == stage]
        assert np.mean(losses[-3:]) < 0.9 * np.mean(losses[:2])
    last = log[-1]
    assert last["stage"] == "student" and last["sink_updates"] == 3
    assert last["gap"] > 0 and last["weight_min"] < last["weight_max"]


def test_stream_of_other_length_sink_and_window_changes_no_file_but_the_gif(trained):
    gifs, before = set(), (trained / "checkpoint.pt").read_bytes()
    for more in ("", "--alpha 0", "--sink 0 --window 6", "--seed 1"):
        ran = command(f"--stream --frames 36 {more} --out {trained} --prompt", "a red circle")
        assert ran.returncode == 0, ran.stderr
        gifs.add((trained / "stream.gif").read_bytes())
        assert Image.open(trained / "stream.gif").n_frames == 36
    assert len(gifs) == 4 and (trained / "checkpoint.pt").read_bytes() == before


@pytest.mark.parametrize("line", [
    " | --toy or --stream",
    "--toy --teachr-steps 3 | --teachr-steps",
    "--toy --alpha much | --alpha",
    "--toy --alpha 1.5 | at most 1",
    "--toy --clip 10 | clip=10 does not fit, it goes in steps of 3: try 9 or 12",
    "--toy --sample-steps 10 | try 8 or 12",
    "--toy --window 5 | --window 9",
    "--toy --sink 7 | --window 13",
    "--toy --sink -1 | sink=-1",
    "--toy --chunk 0 | chunk=0",
    "--toy --beta nan | beta=nan",
    "--toy --guidance inf | guidance=inf",
    "--toy --dim 130 | heads=8 must split dim=130",
    "--toy --heads 32 | RoPE",
    "--toy --frames 10 | 9 or 12",
    "--toy --frames -3 | frames=-3",
    "--toy --layers 2 | 'layers': 2",
    "--toy --channels 8 | latents of [16, 8, 8]",
    "--toy --clip 51 | 48 frames",
    "--toy --text-dim 4 | 8 words",
    "--toy --full | --stream or --bench",
    "--toy --data nowhere.npz | nowhere.npz",
    "--toy --data README.md | README.md",
    "--toy --out /dev/null/x | /dev/null/x",
    "--stream | --prompt",
    "--stream --prompt pink | yellow",
    "--stream --prompt red --frames 10 | 9 or 12",
    "--stream --prompt red --dim 64 | --alpha, --sink",
    "--stream --prompt red --window 5 | --window 9",
    "--stream --prompt red --out damaged | damaged/checkpoint.pt",
    "--stream --prompt red --full | --weights",
    "--stream --prompt red --full --frames 34 | 33 or 45",
])
def test_bad_input_is_refused_in_one_line(trained, line, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    whole = (trained / "checkpoint.pt").read_bytes()
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged/checkpoint.pt").write_bytes(whole[:len(whole) // 2])
    (tmp_path / "README.md").write_text("no arrays")
    words, mend = line.split(" | ")
    assert rf.main(["--from-scratch", "--out", str(trained), *words.split()]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and mend in error
    assert (trained / "checkpoint.pt").read_bytes() == whole


def test_compiled_stream_has_one_graph_for_each_length_of_context_and_equals_eager(trained,
                                                                                   monkeypatch):
    graphs, videos = [], spy(monkeypatch, rf, "save_pictures")

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def compiled(block, fullgraph, dynamic):
        assert fullgraph and not dynamic                             # a break would be an error
        torch.nn.Module.compile(block, fullgraph=True, dynamic=False, backend=backend)
    monkeypatch.setattr(rf.Block, "compile", compiled)
    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 8)
    line = f"--stream --prompt red --frames 60 --window 36 --out {trained}".split()
    assert rf.main(line) == 0 and rf.main([*line, "--compile"]) == 0
    assert len(graphs) == 12                                         # of 0, 3, ..., 33 frames
    assert error(*(call.videos.float() for call in videos)) <= 1
