"""Facts about reward_forcing.py, in file order:  python -m pytest test_reward_forcing.py

REWARD_FORCING_GOLDEN names another file of recorded numbers for the golden tests.
"""
import inspect
import io
import itertools
import json
import math
import os
import pty
import resource
import shutil
import socket
import subprocess
import sys
import termios
import time
import weakref
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image
from pytest import fixture, importorskip, mark, raises
from torch import (arange, cat, equal, exp, float32, float64, ones, rand, randint, randn,
                   randn_like, stack, tensor, zeros)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import reward_forcing as rf
from reward_forcing import (BadInput, EMASinkCache, PRESETS, RewardWeight, VideoTransformer,
                            add_noise, flow_matching_loss, measure, motion_reward, recover_x0,
                            regress, regression_loss, rollout, rope_table, rotate, wan_text)

parametrize = mark.parametrize
HERE = Path(__file__).parent
WORLD = HERE / "tiny_data/world.npz"
TOY = PRESETS["scratch"]
FULL = PRESETS["full"]
SMALL = replace(TOY, dim=24, ffn_dim=32, heads=2, layers=2, height=16, width=24, text_dim=16)
TINY = ("--from-scratch --dim 24 --ffn-dim 24 --heads 2 --layers 1 --batch 4 --sample-steps 4 "
        "--ode-clips 1 --critic-ratio 1 --teacher-steps 60 --causal-steps 40 --distill-steps 40 "
        "--frames 24")


@fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def random_model(cfg, dtype=float64):
    """Every parameter random and of a size that matters, norms, gates and head included."""
    model = VideoTransformer(cfg).to(dtype).requires_grad_(False)
    for name, p in model.named_parameters():
        mean = 1.0 if "norm" in name and "weight" in name else 0.0
        spread = 0.3 if p.dim() < 2 else p.shape[-1] ** -0.5
        p.normal_(mean, spread)
    return model


def random_text(cfg, batch=1):
    return randn(batch, 3, cfg.text_dim)


def noises(cfg, batch=1, dtype=float64):
    """draw(chunk, step) for rollout, the same at every call."""
    def draw(chunk, step):
        generator = torch.Generator().manual_seed(10 * chunk + step)
        shape = batch, cfg.chunk, *cfg.latent
        return randn(shape, generator=generator).to(dtype)
    return draw


def same(a, b):
    """Equal bit for bit: nested dicts and lists of tensors."""
    return all(map(np.array_equal, tree_leaves(a), tree_leaves(b)))


def error(a, b):
    """The largest difference of two tensors of one shape."""
    assert a.shape == b.shape
    return (a - b).abs().max()


def main(line):
    """The exit code of a command line, run in this process."""
    return rf.main(line.split())


def given(line):
    """{field of Config: value} of the flags in a line."""
    return rf.parse(line.split())[1]


def per_sample(numbers):
    """(B,) as a factor of (B, F, C, h, w)."""
    return numbers[:, None, None, None, None]


@fixture
def spy(monkeypatch):
    """spy(owner, name): a list to which every call of owner.name adds its arguments, by name, and
    its result."""
    def watch(owner, name):
        calls, original = [], getattr(owner, name)

        def recorded(*args, **named):
            bound = inspect.signature(original).bind(*args, **named)
            bound.apply_defaults()
            result = original(*args, **named)
            calls.append(SimpleNamespace(**bound.arguments, result=result))
            return result
        monkeypatch.setattr(owner, name, recorded)
        return calls
    return watch


# ------------------------------------------------------------------------- Config and noise
@parametrize("sigma", [[0.3, 1.0], [[0.0, 0.3, 1.0], [0.9, 0.5, 0.0]]])
def test_x0_is_recovered_from_a_perfect_velocity(sigma):
    x0, noise = randn(2, 2, 3, 4, 2, 2, dtype=float64)
    sigma = tensor(sigma, dtype=float64)
    xt = add_noise(x0, noise, sigma)
    assert error(recover_x0(xt, noise - x0, sigma), x0) < 1e-12


# ------------------------------------------------------------------------------------ Model
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
    planned = rf.pass_flops(FULL, FULL.chunk, FULL.window)
    assert abs(planned / counter.get_total_flops() - 1) < 0.001


# ------------------------------------------------- Cache and rollout against a slow twin
class SlowCache:
    """Keeps all clean frames and works out the window anew: the EMA by hand, in float64."""
    def __init__(self, cfg):
        self.cfg, self.past, self.context, self.frames = cfg, [], [], 0
        self.newest = [None] * cfg.layers

    def append(self):
        cfg = self.cfg
        chunk = stack([stack(kv) for kv in self.newest], 1)
        self.past += chunk.chunk(cfg.chunk, 3)                       # (2, layers, B, N, H, D)
        sink, others = self.past[:cfg.sink], self.past[cfg.sink:]
        gone = max(0, len(others) - (cfg.window - cfg.sink - cfg.chunk))
        for f in range(gone if cfg.sink else 0):
            slot = f % cfg.sink
            sink[slot] = cfg.alpha * sink[slot] + (1 - cfg.alpha) * others[f]
        seen = sink + others[gone:]
        self.frames = len(seen)
        if seen:
            keys, values = cat(seen, 3)
            rope = rope_table(cfg, 0, self.frames, keys.device)
            self.context = list(zip(rotate(keys, rope), values))


def slow_rollout(model, text, cfg, draw, chunks, start=(), script=None, reread=False):
    text_kv, cache, script = model.embed_text(text), SlowCache(cfg), script or {}
    for chunk in range(chunks):
        x = draw(chunk, 0)
        for step, sigma in enumerate(cfg.sigmas):
            xt = (1 - sigma) * x + sigma * draw(chunk, step)
            x = xt - sigma * model(xt, sigma.expand(len(x)), text_kv, cache)
        x = start[chunk] if chunk < len(start) else x
        yield x
        told = model.embed_text(script[chunk + 1]) if chunk + 1 in script else text_kv
        model(x, zeros(len(x)), told if reread else text_kv, cache)
        cache.append()
        text_kv = told


@parametrize("change", [
    "",
    "--alpha 1",
    "--sink 0",
    "--sink 0 --window 3",
    "--window 6",
    "--sink 1 --window 7",
    "--sink 4",
    "--chunk 1 --window 5",
])
def test_stream_equals_a_plainly_written_one_with_a_hand_written_ema(change):
    cfg = replace(SMALL, **given(change))
    model, text, cache = random_model(cfg), random_text(cfg, 2), EMASinkCache(cfg)
    fast = rollout(model, text, cfg, noises(cfg, 2), 7, cache=cache)
    slow = slow_rollout(model, text, cfg, noises(cfg, 2), 7)
    for (ours, _), plain in zip(fast, slow):
        assert error(ours, plain) < 2e-5 * plain.abs().max()         # the sink is float32
    left = max(0, 7 * cfg.chunk - cfg.window)
    assert cache.updates == (left if cfg.sink else 0)


@parametrize("reread", [False, True])
def test_steered_stream_from_given_chunks_equals_a_plainly_written_one(reread):
    model, text = random_model(SMALL), random_text(SMALL, 2)
    start, script = [noises(SMALL, 2)(9, n) for n in (0, 1)], {1: text + 1, 4: -text}
    given = model, text, SMALL, noises(SMALL, 2), 7
    fast = [x0 for x0, _ in rollout(*given, None, None, start, script.get, reread)]
    slow = slow_rollout(*given, start, script, reread)
    assert same(fast[:2], start)
    assert all(error(ours, plain) < 2e-5 * plain.abs().max() for ours, plain in zip(fast, slow))


def test_noise_of_the_future_does_not_change_past_chunks():
    model, text = random_model(SMALL), random_text(SMALL)

    def other(chunk, step):
        return noises(SMALL)(chunk, step) + (chunk == 3)
    ours, theirs = (rollout(model, text, SMALL, draw, 5) for draw in (noises(SMALL), other))
    assert [equal(a, b) for (a, _), (b, _) in zip(ours, theirs)] == [True] * 3 + [False] * 2


def test_sink_of_a_bfloat16_stream_accumulates_in_float32():
    cfg = replace(SMALL, alpha=0.999)
    cache, shape = EMASinkCache(cfg), (1, cfg.chunk * 6, cfg.heads, cfg.head_dim)
    for chunk in range(40):                                          # starts as 1; what leaves is 2
        kv = torch.full(shape, 1.0 + (chunk > 0)).bfloat16()
        cache.newest = [(kv, kv)] * cfg.layers
        cache.append()
    want = 2 - cfg.alpha ** (cache.updates // cfg.sink)              # in bfloat16 1 + 0.001 is 1
    assert want > 1.03 and abs(stack(cache.sink) - want).max() < 1e-4


def test_stream_memory_is_constant():
    cache, sizes = EMASinkCache(SMALL), []
    stream = rollout(random_model(SMALL), random_text(SMALL), SMALL, noises(SMALL), cache=cache)
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
        sinks.append(stack(cache.sink))
    assert equal(*sinks)


# ----------------------------------------------------------------------- Losses and gradients
def one_graph(student, text, cfg, noisy, sigma, clean, cache):
    """All chunks' x0 predictions in one graph; regress sends them back chunk by chunk."""
    text_kv, made = student.embed_text(text), []
    for chunk in zip(*(x.split(cfg.chunk, 1) for x in (noisy, sigma, clean))):
        made.append(rf.predict_x0(student, *chunk[:2], text_kv, cache))
        cache.exit = list(cache.newest)
        rf.remember(student, chunk[2], text_kv, cache)
    return cat(made, 1)


def recompute(model):
    """Activations are computed again in the backward pass, block by block, as FullRun does it."""
    for block in model.blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


@parametrize("steps, recomputed", itertools.product([1, 2, 3, 4], [False, True]))
def test_regress_gives_the_gradients_of_one_graph(steps, recomputed):
    cfg, student = replace(SMALL, window=6), random_model(SMALL).requires_grad_()
    text, cache, weight = random_text(cfg, 2), EMASinkCache(cfg), tensor([0.5, 2.0])
    chunks = rollout(student, text, cfg, noises(cfg, 2), 4, steps)
    clean, noisy = (cat(part, 1) for part in zip(*chunks))
    sigma, target = cfg.sigmas[steps - 1].expand(2, 12), randn_like(clean)
    made = one_graph(student, text, cfg, noisy, sigma, clean, cache)
    assert error(made, clean) < 1e-12                                # it replays the rollout
    assert not any(keys.requires_grad for keys, _ in cache.context)
    loss = (per_sample(weight) * (made - target) ** 2).mean() / 2
    whole = torch.autograd.grad(loss, list(student.parameters()))
    if recomputed:
        recompute(student)
    total = regress(student, text, cfg, noisy, sigma, clean, target, weight)
    assert abs(total - loss) < 1e-10
    assert all(error(p.grad, grad) < 1e-10 for p, grad in zip(student.parameters(), whole))


class Memory(TorchDispatchMode):
    """most: the most bytes that were alive at a time, of tensors touched while this is entered."""
    def __init__(self):
        super().__init__()
        self.sizes, self.most = {}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            storage = x.untyped_storage() if torch.is_tensor(x) else None
            if storage is not None and storage._cdata not in self.sizes:
                self.sizes[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self.sizes.pop, storage._cdata)
        self.most = max(self.most, sum(self.sizes.values()))
        return result


@parametrize("recomputed", [False, True])
def test_memory_of_regress_does_not_grow_with_the_clip(recomputed):
    cfg, peaks = replace(SMALL, window=6), []
    student, text = random_model(cfg).requires_grad_(), random_text(cfg)
    if recomputed:
        recompute(student)
    for clip in (12, 12, 24):                                        # first makes the gradients
        x, sigma = randn(2, 1, clip, *cfg.latent, dtype=float64), torch.full((1, clip), 0.9)
        with Memory() as chunks:
            regress(student, text, cfg, x[0], sigma, x[0], target=x[1])
        with Memory() as one:
            one_graph(student, text, cfg, x[0], sigma, x[0], EMASinkCache(cfg)).sum().backward()
        peaks.append((chunks.most - x.nbytes, one.most - x.nbytes))
    _, (chunks, one), (longer_chunks, longer_one) = peaks
    assert longer_chunks < 1.001 * chunks and longer_one > 1.3 * one > 1.3 * chunks


def test_dmd_gradient_is_zero_when_critic_is_teacher():
    x, real = randn(2, 2, 3, 4, 4, 4)
    assert not rf.dmd_gradient(x, real, real).any()


def test_flow_matching_loss_is_weighted_by_sample():
    x0, noise = randn(2, 2, 3, *SMALL.latent)
    weight = tensor([1.0, 3.0])

    def model(xt, sigma, text_kv):                                   # errors of 1 and 3
        return noise - x0 + per_sample(weight)
    loss = flow_matching_loss(model, x0, None, weight / 4, noise, weight)
    assert abs(loss - (1 * 1 + 3 * 9) / 2) < 1e-3


def test_reward_weight_is_exp_of_reward_over_beta_and_of_mean_one_in_the_long_run():
    weigh, rewards = RewardWeight(0.5), rand(400, 4)
    weights = stack([weigh(reward) for reward in rewards])
    assert abs(weights[100:].mean() - 1) < 0.02
    assert error(weights / weights[:, :1], exp((rewards - rewards[:, :1]) / 0.5)) < 1e-4
    resumed = RewardWeight(0.5)
    resumed.load_state_dict(weigh.state_dict())
    better = rewards[0] + 1
    assert equal(resumed(better), weigh(better))
    assert weigh(better).mean() > 2                                  # the mean of no single batch
    assert equal(RewardWeight(math.inf)(better), ones(4))


@parametrize("student_beta, critic_beta", [
    (math.inf, math.inf),                                            # DMD
    (1.0, math.inf),                                                 # Re-DMD
    (math.inf, 1.0),                                                 # DMD by a tilted critic
])
def test_training_ends_at_the_teacher_and_only_a_tilted_critic_moves_the_end(student_beta,
                                                                             critic_beta):
    """Particles move by DMD between two Gaussians, with exact denoisers; the reward is x."""
    centres, spread, steps, x = tensor([-1.0, 1.0]), 0.4, 600, randn(400, 1)
    weigh, tilt = RewardWeight(student_beta), RewardWeight(-critic_beta)

    def denoise(xt, sigma, centres, spread, weight):                 # E[x0 | xt] of a mixture
        variance = (1 - sigma) ** 2 * spread ** 2 + sigma ** 2
        off = xt - (1 - sigma) * centres
        share = torch.softmax(weight.log() - off ** 2 / (2 * variance), 1)
        x0 = centres + (1 - sigma) * spread ** 2 / variance * off
        return (share * x0).sum(1, keepdim=True)

    for step in range(steps):
        sigma, reward = rand(1).clamp(0.02, 0.98), x[:, 0]
        xt = add_noise(x, randn_like(x), sigma)
        fake = denoise(xt, sigma, reward, 0.1, tilt(reward))
        real = denoise(xt, sigma, centres, spread, ones(2))
        made = x.clone().requires_grad_()
        loss = regression_loss(made, x - (fake - real), weigh(reward))
        loss.backward()
        x = x - 0.1 * (1 - step / steps) * len(x) * made.grad
    mass = torch.softmax(centres / critic_beta, 0)                   # of teacher * exp(x / beta)
    mean = mass @ (centres + spread ** 2 / critic_beta)
    assert abs(x.mean() - mean) < 0.05
    assert abs((x > 0).float().mean() - mass[1]) < 0.02


# ------------------------------------- Golden: numbers recorded from the public implementation
GOLDEN = Path(os.environ.get("REWARD_FORCING_GOLDEN", HERE / "tiny_data/golden.npz"))
STREAMS = [name for name in ("stream", "static", "stream_b2") if name + ".x0" in np.load(GOLDEN)]
SIZES_OF_GOLDEN = ("dim=dim ffn_dim=ffn_dim freq_dim=freq_dim text_dim=text_dim text_len=text_len "
                   "heads=num_heads layers=num_layers channels=in_dim chunk=frames_per_chunk "
                   "sink=sink_size window=local_attn_size")


@fixture(scope="module")
def golden():
    """Every recorded array, and the config and model that the file describes."""
    a = {name: torch.from_numpy(array) for name, array in np.load(GOLDEN).items()}
    sizes = {}
    for pair in SIZES_OF_GOLDEN.split():
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
    assert a["cfg.frame_seqlen"] == cfg.rows * cfg.cols
    assert a["cfg.chunks"] * cfg.chunk == a["stream.noise"].shape[1]


def test_golden_schedule(golden):
    a, cfg, _ = golden
    table = cfg.schedule(1000)[:-1]
    assert error(table, a["sched.sigmas"]) < 1e-6
    assert error(1000 * table, a["sched.timesteps"]) < 1e-3          # float32 of up to 1000
    assert error(1000 * cfg.schedule(cfg.denoise_steps), a["stream.t"].float()) < 1e-3
    xt, sigma = a["sched.ex_xt"], a["sched.ex_sigma"]
    assert error(nearest_sigma(a, a["sched.ex_t"]), sigma) < 1e-6
    assert error(add_noise(a["sched.ex_x"], a["sched.ex_noise"], sigma), xt) < 1e-5
    for flow in ("sched.ex_flow", "sched.ex_flow_back"):
        assert error(recover_x0(xt, a[flow], sigma), a["sched.ex_x0"]) < 1e-5


def test_golden_rope_of_128_channels(golden):
    cfg = replace(FULL, height=32, width=48)                         # 2 rows of 3 tokens
    for first in (0, 6):
        rope = rope_table(cfg, first, 3, torch.device("cpu"))
        turned = rotate(golden[0]["rope128.x"], rope)
        assert error(turned, golden[0][f"rope128.start{first}"]) < 2e-5


def test_golden_time_embedding_and_bidirectional_forward(golden):
    a, cfg, model = golden
    assert error(model.embed_sigma(a["temb.t"].double() / 1000), a["temb.out"]) < 2e-5
    x, sigma, ctx = a["bidir.x"].transpose(1, 2), a["bidir.t"].double() / 1000, a["ctx"]
    flow = model(x, sigma, model.embed_text(ctx)).transpose(1, 2)
    assert error(flow, a["bidir.flow"]) < 2e-5
    flow = model(x[1:], sigma[1:], model.embed_text(ctx[1:, :3])).transpose(1, 2)
    assert error(flow, a["bidir.flow_len3"]) < 2e-5


@parametrize("name", STREAMS)
def test_golden_stream(golden, name, spy):
    a, cfg, model = golden
    source = name
    if name == "static":
        cfg, source = replace(cfg, alpha=1.0), "stream"              # the same noise
    x0, noise = (a[key].split(cfg.chunk, 1) for key in (name + ".x0", source + ".noise"))
    last, cache = len(x0) - 1, EMASinkCache(cfg)

    def draw(chunk, step):                                           # one chunk more is begun, for
        chunk = min(chunk, last)                                     # the last one's cache pass
        return a[source + ".renoise"][chunk, step - 1] if step else noise[chunk]
    passes = spy(VideoTransformer, "forward")
    chunks = rollout(model, a["ctx"][:len(noise[0])], cfg, draw, last + 2, cache=cache)
    for n in range(last + 1):
        assert error(next(chunks)[0], x0[n]) < 5e-5
        sinks = stack(cache.sink, 3).flatten(3, 4) if n else ()
        for kind, sink in zip("kv", sinks):                          # (layers, B, S*N, H, D)
            recorded = a.get(f"{name}.sink_{kind}", {n: sink})[n]
            assert error(sink, recorded) < 5e-5
    for kind, sink in zip("kv", sinks):
        assert error(sink, a.get(f"{name}.sink_{kind}_final", sink)) < 5e-5
    next(chunks)
    recorded = a.get(name + ".flow", zeros(0, 1)).flatten(0, 1)
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


@fixture
def golden_training(golden, monkeypatch):
    """The public training rollout, which caches noised frames: (a, a model for gradients, and what
    one_graph and regress take)."""
    a, cfg, model = golden
    noise, steps = a["train.noise"].split(cfg.chunk, 1), int(a["cfg.train_exit"]) + 1
    context_noise, remember = iter(a["train.context_noise"]), rf.remember
    cfg, least = replace(cfg, alpha=1.0), a["sched.sigmas"][-1:]

    def draw(chunk, step):
        return a["train.renoise"][chunk, step - 1] if step else noise[chunk]

    def remember_noised(student, x0, *rest):
        remember(student, add_noise(x0, next(context_noise), least), *rest)
    with monkeypatch.context() as patched:
        patched.setattr(rf, "remember", remember_noised)
        chunks = list(rollout(model, a["ctx"][:1], cfg, draw, len(noise), steps))
    x0, noisy = (cat(part, 1) for part in zip(*chunks))
    assert error(x0, a["train.x0"]) < 1e-5
    clean = add_noise(x0, cat([*a["train.context_noise"]], 1), least)
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
    loss = regression_loss(made, 0)
    assert abs(loss / a["train.loss"] - 1) < 1e-5
    loss.backward()
    assert max(relative_errors(a, model).values()) <= 1e-5
    times = [1000 * (1 - (a["cfg.train_exit"] + i) / cfg.denoise_steps) for i in (0, 1)]
    assert a["train.timestep_from_to"].tolist() == times             # of the unshifted schedule


def test_golden_departure_here_the_context_carries_no_gradient(golden_training):
    a, model, inputs = golden_training
    loss = regress(*inputs, target=torch.zeros_like(a["train.x0"]))
    assert abs(loss / a["train.loss"] - 1) < 1e-5                    # the same frames
    for name, wrong in relative_errors(a, model).items():
        if "self_attn.k.weight" in name or "self_attn.v.weight" in name:
            assert wrong > 0.1


def test_golden_departure_here_teacher_and_critic_use_the_students_schedule(golden):
    a, cfg, model = golden
    theirs = {"sched.sigmas": replace(cfg, sigma_shift=8.0).schedule(1000)[:-1]}
    theirs["sched.timesteps"] = 1000 * theirs["sched.sigmas"]
    x, sigma = a["bidir.x"].transpose(1, 2), a["bidir.t"].double() / 1000
    flow = model(x, sigma, model.embed_text(a["ctx"]))
    x0 = recover_x0(x, flow, nearest_sigma(theirs, a["bidir.t"]))
    assert error(x0, a["bidir.x0_shift8"]) < 5e-5


def test_golden_departure_here_no_loss_is_weighted_by_the_noise_level(golden):
    x0, noise = randn(2, 1, 3, 4, 2, 2)
    for sigma in golden[0]["sched.sigmas"][::100]:
        loss = flow_matching_loss(lambda *_: noise - x0 + 1, x0, None, sigma[None], noise)
        assert abs(loss - 1) < 1e-5                                  # there by a bell of mean 1


def test_golden_redmd_and_critic(golden):
    a = SimpleNamespace(**{key[6:]: array.double() for key, array in golden[0].items()
                           if key.startswith("redmd.")})
    x, fake, sigma = a.x0, a.pred_fake, nearest_sigma(golden[0], a.timestep[:, 0])
    assert error(add_noise(x, a.noise, sigma), a.noisy) < 1e-5

    def teacher(xt, sigma, text, cache=None):                        # its x0 are the recorded ones
        x0 = a.pred_real_cond if text.any() else a.pred_real_uncond
        return (xt - x0) / per_sample(sigma)
    teacher.embed_text = lambda text: text
    told, untold = ones(len(x), 1, 1), zeros(1, 1, 1)
    real = rf.guided_x0(teacher, a.noisy, sigma.double(), told, untold, a.guidance.item())
    g = rf.dmd_gradient(x, real, fake)
    assert error(g, a.grad) < 1e-5 * a.grad.abs().max()
    assert error(rf.mean_each((x - real).abs()), a.normalizer) < 1e-5
    weight = RewardWeight(1 / a.beta.item())(a.mq) * exp(a.beta * a.mq).mean()
    for x, g, weight, loss, slope in zip(*(each.split(1) for each in (
            x, g, weight, a.loss, a.dloss_dx0))):                    # recorded one call a sample
        made = x.clone().requires_grad_()
        ours = regression_loss(made, x - g, weight)
        ours.backward()
        assert abs(ours / loss - 1) < 1e-5
        assert error(made.grad, slope) < 1e-5 * slope.abs().max()

    def critic(xt, sigma, text_kv):
        return (xt - fake) / per_sample(sigma)
    x, a = a.x0, golden[0]
    sigma = nearest_sigma(a, a["critic.timestep"][:, 0]).double()
    loss = flow_matching_loss(critic, x, None, sigma, a["critic.noise"].view_as(x))
    assert abs(loss / a["critic.loss"] - 1) < 1e-6


def test_golden_departure_the_public_code_weights_the_batch_by_the_reward_of_sample_0(golden):
    a = golden[0]
    weight, official = exp(a["redmd.beta"] * a["redmd.mq"]), a["redmd.official_b2_loss"]
    theirs = a["redmd.dloss_dx0"] * per_sample(weight[0] / weight) / 2
    assert error(theirs, a["redmd.official_b2_dloss_dx0"]) < 1e-5 * theirs.abs().max()
    x = a["redmd.x0"]
    for given, least, most in ((weight[:1], 0, 1e-5), (weight, 0.01, math.inf)):     # theirs, ours
        loss = regression_loss(x, x - a["redmd.grad"], given)
        assert least <= abs(loss / official - 1) < most


# ------------------------------------------- The stages: who is asked what, in a step of each
@fixture
def make_run(tmp_path):
    """make_run("flags"): a tiny Run in which teacher and ODE student are random."""
    def make(line=""):
        cfg = replace(TOY, **given(f"{TINY} {line}"))
        run = rf.Run(cfg, tmp_path, rf.ToyWorld(cfg, WORLD))
        for stage in ("teacher", "causal"):
            weights = random_model(run.cfg, float32).state_dict()
            run.state["stages"][stage] = {"step": 0, "parts": [weights]}
        return run
    return make


def test_clips_have_their_captions_some_of_which_are_dropped(make_run, spy):
    run = make_run("--batch 100 --drop-caption 0.5")
    world = run.world
    world.clips[:] = arange(120).view(-1, 1, 1, 1, 1)
    encoded = spy(world, "encode")
    x0, text = run.draw_clips(12)
    told = world.text([world.captions[i] for i in encoded[0].frames[:, 0, 0, 0, 0]])
    kept = text.flatten(1).any(1)
    assert equal(text[kept], told[kept]) and 30 < kept.sum() < 70
    world.clips[:] = arange(32)
    run.draw_clips(24, mirror=True)
    frames = encoded[1].frames
    assert frames.shape[:2] == (50, 24) and equal(frames[::2], frames[1::2].flip(-1))


def test_teacher_learns_from_clips_their_text_and_levels_of_half_the_frames(make_run, spy):
    run = make_run("--teacher-steps 1")
    run.state["stages"].clear()
    drawn, asked, first = spy(run, "draw_clips"), spy(rf, "flow_matching_loss"), run.model()
    rf.train_teacher(run)
    (x0, text), loss = drawn[0].result, asked[0]
    assert loss.x0 is x0 and loss.norm is rf.motion_square
    assert equal(loss.text_kv[0][0], first.embed_text(text)[0][0])
    assert [len(levels.unique()) for levels in loss.sigma] == [1, run.cfg.clip] * 2


def test_guided_trajectory_of_a_known_teacher_is_the_known_line():
    noise = randn(2, 3, *TOY.latent)

    def teacher(xt, sigma, text, cache):                             # the data is 1, or 0 untold
        return (xt - text.mean()) / per_sample(sigma)
    teacher.embed_text = lambda text: text
    path = rf.teacher_trajectory(teacher, noise, ones(2, 1, 1), TOY)
    for level, sigma in enumerate([1, 0.9, 0.75, 0.5, 0]):           # at shift 3
        line = (1 - sigma) * (1 + TOY.guidance) + sigma * noise
        assert error(path[:, level], line) < 1e-5


@parametrize("ode", ["", "--ode"])
def test_causal_student_regresses_the_clean_end_from_a_level_of_each_chunk(make_run, spy, ode):
    run = make_run(f"--causal-steps 1 --causal-clip 18 {ode}")
    cfg, weights = run.cfg, run.state["stages"]["teacher"]["parts"][0]
    run.state["stages"].pop("causal")
    calls, asked, drawn = spy(rf, "teacher_trajectory"), spy(rf, "regress"), spy(run, "draw_clips")
    rf.train_causal(run)
    step = asked[0]
    level = (step.sigma[..., None] == cfg.sigmas).long().argmax(2)
    if ode:
        assert same(calls[0].teacher.state_dict(), weights)
        paths, texts = cat([call.result for call in calls]), cat([call.text for call in calls])
        clip = (step.clean[:, None] == paths[:, -1]).flatten(2).all(2).long().argmax(1)
        noisy, text = paths[clip[:, None], level, arange(cfg.clip)], texts[clip]
        assert equal(step.noisy, noisy) and equal(step.target, paths[clip, -1])
    else:
        clean, text = drawn[0].result
        sigma = step.sigma[..., None, None, None]
        noise = (step.noisy - (1 - sigma) * clean) / sigma
        assert abs(noise.std() - 1) < 0.03 and abs(noise.mean()) < 0.03
        assert step.clean is step.target is clean and clean.shape[:2] == (3, 18)
    assert equal(step.text, text) and step.norm is rf.motion_square
    chunks = level.unflatten(1, (-1, cfg.chunk))
    assert (chunks == chunks[..., :1]).all() and (chunks != chunks[:, :1]).any()


@parametrize("change", ["", "--tilt", "--shuffle", "--ema-start 1"])
def test_student_step_asks_each_model_about_the_right_samples(make_run, monkeypatch, spy, change):
    run = make_run(f"--distill-steps 1 --critic-ratio 2 --student-lr 0.5 --critic-lr 0.5 {change}")
    cfg, saved, rewards = run.cfg, dict(run.state["stages"]), tensor([0.1, 0.5, 0.2, 0.4])
    run.reward = lambda frames, captions: rewards
    names = "flow_matching_loss", "update", "guided_x0", "regress"
    critics, updates, teachers, steps = (spy(rf, name) for name in names)
    samples, judged = spy(run, "draw_samples"), spy(run, "reward")
    rf.train_student(run)
    real, step, critic = teachers[0], steps[0], critics[0].model
    assert same(real.teacher.state_dict(), saved["teacher"]["parts"][0])
    assert [call.model for call in updates] == [critic, critic, step.student]
    for loss, drawn in zip(critics, samples):
        assert loss.x0 is drawn.result[0] and drawn.student is step.student
    told = run.world.text(samples[0].result[3])
    told = real.teacher.embed_text(told)                             # the critic begins as it
    assert equal(critics[0].text_kv[0][0], told[0][0])

    x, noisy, exit_sigma, captions, _ = samples[2].result
    text = run.world.text(captions)
    assert step.noisy is noisy and step.sigma is exit_sigma and step.clean is x
    assert equal(step.text, text) and real.text is step.text and real.guidance == cfg.guidance
    assert equal(real.negative, run.world.text([""]))
    sigma = per_sample(real.sigma)
    assert abs(((real.xt - (1 - sigma) * x) / sigma).std() - 1) < 0.05
    assert len(cat([real.sigma, critics[0].sigma]).unique()) > 6
    fake = rf.predict_x0(critic, real.xt, real.sigma, critic.embed_text(text))
    g = (fake - real.result) / per_sample(rf.mean_each((x - real.result).abs()))
    assert error(step.target, x - g) < 1e-4

    assert equal(judged[-1].frames, run.world.decode(x)) and judged[-1].captions is captions
    weights, even = exp(rewards / (-cfg.beta if cfg.tilt else cfg.beta)), ones(4)
    weights = weights / weights.mean()
    shown = step.weight * even
    if cfg.shuffle:
        assert error(shown, weights) > 0.1
        shown, weights = shown.sort().values, weights.sort().values
    assert error(shown, even if cfg.tilt else weights) < 1e-5
    assert error(critics[1].weight * even, weights if cfg.tilt else even) < 1e-5

    student, before = step.student.state_dict(), saved["causal"]["parts"][0]
    keep = 0 if cfg.ema_start else cfg.weight_ema
    for name, streamed in run.state["stages"]["student"]["parts"][0].items():
        want = before[name].lerp(student[name], 1 - keep)
        assert error(streamed, want) < 1e-5 < error(streamed, before[name])


def test_samples_stop_at_every_step_and_follow_from_their_noisy_frames(make_run):
    run, exits = make_run(), set()
    student = run.model("causal")
    for _ in range(16):
        x, noisy, sigma, captions, _ = run.draw_samples(student)
        text = run.world.text(captions)
        assert regress(student, text, run.cfg, noisy, sigma, x, target=x) < 1e-8
        exits.add(sigma.unique().item())
    assert exits == set(run.cfg.sigmas.tolist())


# -------------------------------------------------------------------------- The toy's world
@fixture(scope="module")
def world():
    return rf.ToyWorld(TOY, WORLD)


def test_world_is_what_its_script_draws_and_small(tmp_path):
    subprocess.run([sys.executable, HERE / "tiny_data/make.py", tmp_path / "w.npz"], check=True)
    ours, drawn = np.load(WORLD), np.load(tmp_path / "w.npz")
    assert WORLD.stat().st_size < 2e6
    for name in ours:
        exact = name not in ("mean", "encode", "decode")
        assert np.array_equal(ours[name], drawn[name]) if exact else np.allclose(
            ours[name], drawn[name], rtol=0, atol=1e-4)


def test_tracker_finds_true_speeds_and_shapes_and_the_vae_leaves_them(world):
    truth, decoded = np.load(WORLD)["speed"], world.decode(world.encode(world.clips))
    _, centre = rf.track(world.clips)
    speed = centre.diff(dim=1).norm(dim=2).mean(1)
    assert np.allclose(speed, truth, rtol=0.1, atol=0.02)
    noise = (decoded.float() - world.clips).square().mean()
    assert 10 * math.log10(255 ** 2 / noise) > 29                    # dB
    for frames in (world.clips, decoded):
        assert measure(frames, world.captions, 3)["shape"] > 0.98


def discs(x, radius=5.0):
    """A clip (1, F, 3, 32, 32) of a bright disc at x (F,), of radius (F,); 0: none."""
    x, radius = x[:, None, None], torch.as_tensor(radius).view(-1, 1, 1)
    grid = arange(32) + 0.5
    distance = ((grid - x) ** 2 + (grid[:, None] - 16) ** 2).sqrt()
    pixels = 30 + 200 * (radius + 0.5 - distance).clamp(0, 1) * (radius > 0)
    return pixels.to(torch.uint8)[None, :, None].expand(-1, -1, 3, -1, -1)


TIME = arange(12.0)


@parametrize("speed", [0.0, 0.5, 1.0, 1.5])
def test_reward_of_an_even_glide_is_its_speed(speed):
    assert abs(motion_reward(discs(8 + speed * TIME)) - speed) < 0.03


@parametrize("frames", [
    discs(8 + 3 * (TIME // 3)),                                      # jumps at every third frame
    discs(16 + TIME % 2),                                            # trembles
    discs(8 + TIME, 5 * (TIME % 2)),                                 # vanishes in every other frame
    discs(8 + TIME, 3 + 2 * (TIME % 2)),                             # changes its size
    discs(16 + 3 * torch.sin(TIME ** 2)),                            # shakes
], ids=["jumps", "trembles", "flickers", "pulses", "shakes"])
def test_reward_of_broken_motion_is_below_that_of_a_clean_glide_at_half_the_speed(frames):
    assert motion_reward(frames) < motion_reward(discs(8 + 0.5 * TIME))


def test_measures_tell_frozen_gliding_jumping_and_empty_clips_apart():
    def measured(*disc):
        return measure(discs(*disc), ["a red circle"], 3)
    frozen, glide = measured(8 + 0 * TIME), measured(8 + TIME)
    assert frozen["copy"] == frozen["shape"] == 1 and frozen["drift"] == 0
    assert glide["agree"] == glide["seam"] == 1 and glide["jitter"] == 0 and glide["copy"] < 1
    jump, empty = measured(8 + 3 * (TIME // 3)), measured(TIME, 0 * TIME)
    assert jump["seam"] == 3 and jump["inside"] == jump["agree"] == empty["shape"] == 0


# --------------------------------------------------------- Optimizers, checkpoint and ablation
def test_every_parameter_is_stepped_once_per_update(spy):
    model = VideoTransformer(SMALL)
    optimizers, p = rf.make_optimizers(model, 0.1), model.head.head.bias
    owned = sum((group["params"] for o in optimizers for group in o.param_groups), [])
    assert sorted(map(id, owned)) == sorted(map(id, model.parameters()))
    stepped = [spy(optimizer, "step") for optimizer in optimizers]
    p.grad = torch.full_like(p, 0.5)
    assert rf.update(model, optimizers, 1.0, progress=0.5) == 4.0    # the norm before clipping
    assert [len(calls) for calls in stepped] == [1, 1] and p.grad is None


def test_optimizer_of_the_paper_is_adamw_at_a_constant_rate():
    model = VideoTransformer(replace(SMALL, adamw=True))
    [adamw] = optimizers = rf.make_optimizers(model, FULL.student_lr)
    for progress in (0.0, 0.5):
        sum(p.sum() for p in model.parameters()).backward()
        rf.update(model, optimizers, 10.0, progress)
    [group] = adamw.param_groups
    assert (group["lr"], *group["betas"], group["weight_decay"]) == (2e-6, 0, 0.999, 0.01)
    assert type(adamw) is torch.optim.AdamW and FULL.critic_lr == 4e-7 and FULL.adamw


def test_resume_after_a_kill_in_every_stage_is_bitwise_equal(tmp_path, monkeypatch):
    kills, end = [("student", 33), ("causal", 15), ("teacher", 23)], rf.Stage.end

    def killed(stage, step, **numbers):                              # steps since the last save
        if kills and kills[-1] == (stage.name, step):                # are lost
            kills.pop()
            raise KeyboardInterrupt
        end(stage, step, **numbers)
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    assert main(f"--toy {TINY} --batch 2 --out {whole}") == 0
    monkeypatch.setattr(rf.Stage, "end", killed)
    codes = [main(f"--toy {TINY} --batch 2 --out {resumed}") for _ in range(4)]
    assert codes == [130, 130, 130, 0]
    for name in ("metrics.json", "log.jsonl"):
        assert (whole / name).read_text() == (resumed / name).read_text()
    assert same(*(torch.load(out / "checkpoint.pt") for out in (whole, resumed)))


def test_nan_stops_the_run_names_the_step_and_is_not_saved(tmp_path, monkeypatch, capsys):
    steps, update = itertools.count(), rf.update

    def ruined(model, *rest):
        if next(steps) == 3:
            model.head.head.bias.grad += math.nan
        return update(model, *rest)
    monkeypatch.setattr(rf, "update", ruined)
    assert main(f"--toy {TINY} --out {tmp_path}") == 1
    assert "teacher step 3 is not finite" in capsys.readouterr().err
    stage = rf.load_checkpoint(tmp_path / "checkpoint.pt")["stages"]["teacher"]
    assert stage["parts"][0]["head.head.bias"].isfinite().all()


def test_ablation_trains_every_arm_once_with_its_own_change(tmp_path, monkeypatch, capsys):
    arms, train = [], rf.train_student

    def counted(run):
        arms.append(run.cfg)
        train(run)
    monkeypatch.setattr(rf, "train_student", counted)
    monkeypatch.setattr(rf, "SEEDS", (100, 101))
    line = (f"--toy {TINY} --teacher-steps 1 --causal-steps 1 --distill-steps 1 --ablate "
            f"--out {tmp_path}")
    assert main(line) == 0
    base = arms.pop(0)
    changes = "", "--beta inf", "--shuffle", "--tilt", "--alpha 1", "--sink 0", None
    idle = dict(distill_steps=1, student_lr=1e-12)
    want = [replace(base, seed=n, **(given(change) if change is not None else idle))
            for n in (100, 101) for change in changes]
    assert arms == want
    assert main(line) == 0 and arms == [*want, base]                 # which has no step to go
    done = json.loads((tmp_path / "ablation.json").read_text())
    without, ours = ([done[f"{arm}, seed {n}"]["copy"] for n in (100, 101)]
                     for arm in ("no sink", "Re-DMD"))
    gap = np.subtract(without, ours)
    row = capsys.readouterr().out.split("no sink - Re-DMD")[-1]
    assert f"'copy': '{gap.mean():.3f} +- {gap.std():.3f}'" in row   # of two: error = deviation


# ----------------------------------------------------------------- Full size, with tiny parts
SIZES = ("--full --dim 24 --ffn-dim 32 --heads 2 --layers 2 --text-dim 16 --text-len 12 "
         "--height 32 --width 48 --frames 33")
TINY_WAN = replace(FULL, **given(SIZES))


@fixture(scope="module")
def wan(tmp_path_factory):
    """A Diffusers folder in Wan2.1's layout with tiny random parts. Where the packages are missing
    its tests are skipped, but never in CI."""
    if not os.environ.get("CI"):
        importorskip("diffusers")
        importorskip("transformers")
    from diffusers import AutoencoderKLWan
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel
    folder = tmp_path_factory.mktemp("wan")
    torch.manual_seed(0)
    vae = AutoencoderKLWan(base_dim=8, dim_mult=[1, 2, 2, 2], num_res_blocks=1)
    vae.save_pretrained(folder / "vae")
    config = UMT5Config(vocab_size=8, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    UMT5EncoderModel(config).save_pretrained(folder / "text_encoder")
    vocabulary = {"<pad>": 0, "<unk>": 1, "a": 2, "red": 3, "panda": 4}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>")
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
    if not os.environ.get("CI"):
        importorskip("safetensors")
    from safetensors.torch import save_file
    if path.suffix:
        save_file(state, path)
    else:
        path.mkdir()
        for i in (0, 1):
            save_file(dict(list(state.items())[i::2]), path / f"{i}.safetensors")


@parametrize("layout", [
    "released.pt", "bare.pt", "trainer.pt", "ema.pt", "shards", "one.safetensors"])
def test_golden_weights_load_from_every_layout_and_misfits_are_named(golden, tmp_path, layout):
    state, name = golden[2].state_dict(), "head.head.bias"
    with torch.device("meta"):
        model = VideoTransformer(golden[1])
    save_layout(tmp_path / layout, state)
    rf.load_weights(model, tmp_path / layout)
    assert same(model.state_dict(), state)
    bias = state.pop(name)
    misfits = {}, {name: zeros(7)}, {"surplus": bias}          # missing, misshapen, extra
    for extra, word in zip(misfits, (name, r"\[7\]", "surplus")):
        (tmp_path / word).mkdir()
        save_layout(tmp_path / word / layout, {**state, **extra})
        with raises(BadInput, match=word) as refusal:
            rf.load_weights(model, tmp_path / word / layout)
        assert "\n" not in str(refusal.value)


def test_text_is_the_encoders(wan, monkeypatch):
    from transformers import UMT5EncoderModel
    encoder = UMT5EncoderModel.from_pretrained(wan / "text_encoder")
    encoded = encoder(tensor([[2, 3, 4]])).last_hidden_state
    encoder.encoder.embed_tokens = torch.nn.Embedding(8, 16)         # untied
    monkeypatch.setattr(UMT5EncoderModel, "from_pretrained", lambda *_, **__: encoder)
    short, text = wan_text(["a", "a red panda"], wan, TINY_WAN, float32)
    assert error(text[None], encoded) < 1e-5 and len(short) == 1
    encoder.shared.weight.data.zero_()
    with raises(BadInput, match="word embedding"):
        wan_text(["a red panda"], wan, TINY_WAN, float32)


def test_prompts_of_any_length_are_told_as_if_alone(wan, tmp_path):
    (tmp_path / "prompts").write_text("a\na red panda\n")
    args = rf.Options(wan=wan, prompts=tmp_path / "prompts", negative="red")
    world, model = rf.PromptWorld(args, TINY_WAN, float32), random_model(TINY_WAN, float32)
    text = world.text(["a red panda", "a"])
    for row, caption in zip(text, world.prompts[::-1]):
        ours, alone = (model.embed_text(x)[1][0] for x in (row[None], world.text([caption])))
        assert error(ours, alone) < 1e-5
    assert world.text(["red"]).shape == (1, 1, 16)
    assert world.decode(randn(1, 3, 16, 4, 6), {}).shape == (1, 9, 3, 32, 48)


def test_decoding_by_chunks_equals_decoding_the_whole(wan, monkeypatch):
    vae, past, latents = rf.WanVAE(wan, float32), {}, randn(1, 9, 16, 4, 6)
    monkeypatch.setattr(rf, "to_bytes", lambda pixels: pixels.clamp(-1, 1))
    z = (latents * vae.std + vae.mean).transpose(1, 2)
    whole = vae.vae.decode(z).sample.transpose(1, 2)
    chunks = [vae.decode(chunk, past) for chunk in latents.split(3, 1)]
    assert error(cat(chunks, 1), whole) < 1e-4
    frames = torch.randint(255, (1, 33, 3, 32, 48), dtype=torch.uint8)
    z = vae.vae.encode((frames / 127.5 - 1).transpose(1, 2)).latent_dist.mode().transpose(1, 2)
    assert error(vae.encode(frames) * vae.std + vae.mean, z) < 1e-5


@fixture
def graphs(monkeypatch):
    """The graphs that are compiled; they run as they are."""
    made, compile = [], torch.compile

    def backend(graph, inputs):
        made.append(graph)
        return graph.forward

    def counted(function, fullgraph, dynamic):
        assert fullgraph                                             # a break would be an error
        return compile(function, fullgraph=True, dynamic=dynamic, backend=backend)
    monkeypatch.setattr(torch, "compile", counted)
    monkeypatch.setattr(EMASinkCache, "lay_out", staticmethod(EMASinkCache.lay_out))
    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 8)
    torch._dynamo.reset()
    return made


def test_compiled_vae_has_one_graph_and_equals_plain_decoding_chunk_by_chunk(wan, graphs):
    plain, fast, pasts = rf.WanVAE(wan, float32), rf.WanVAE(wan, float32), ({}, {})
    fast.compile()
    for chunk in randn(5, 1, 3, 16, 4, 6):
        ours, theirs = (vae.decode(chunk, past) for vae, past in zip((fast, plain), pasts))
        assert error(ours.int(), theirs.int()) <= 1                  # of 255
    assert len(graphs) == 1                                          # two where layouts differ


TAEHV = """
import torch
class TAEHV(torch.nn.Module):
    def __init__(self, path):
        super().__init__()
        self.gain = torch.nn.Parameter(torch.load(path))
class StreamingTAEHV:
    def __init__(self, model):
        self.model, self.queue, self.skip = model, [], 3
    def decode(self, latent=None):
        if latent is not None:
            self.queue += [latent[:, :, :3] * self.model.gain * n for n in (1, 2, 3, 4)]
        self.queue, self.skip = self.queue[self.skip:], 0
        return self.queue.pop(0) if self.queue else None
"""


def save_taehv(folder):
    (folder / "taehv.py").write_text(TAEHV)
    torch.save(tensor(0.1), folder / "taew2_1.pth")


def test_tiny_vae_decodes_by_the_code_in_its_folder(tmp_path):
    save_taehv(tmp_path)
    latents, vae = rand(1, 6, 16, 4, 6), rf.TinyVAE(tmp_path, float32)
    frames = cat([vae.decode(chunk, {}) for chunk in latents.split(3, 1)], 1)
    assert error(frames[:, -1] / 255, 0.4 * latents[:, -1, :3]) < 1 / 255


def test_full_size_streams_and_benches(wan, tmp_path, graphs):
    save_layout(tmp_path / "ema.pt", random_model(TINY_WAN, float32).state_dict())
    files = f"--wan {wan} --weights {tmp_path}/ema.pt --prompt panda"
    assert main(f"{SIZES} --stream {files} --out {tmp_path}") == 0
    assert Image.open(tmp_path / "stream.webp").n_frames == 33
    save_taehv(tmp_path)
    assert main(f"{SIZES} --stream {files} --vae {tmp_path} --out {tmp_path}") == 0
    assert main(f"{SIZES} --bench --wan {wan} --vae {tmp_path} --out {tmp_path}") == 0
    ladder = json.loads((tmp_path / "bench.json").read_text())
    assert len(ladder) == 4 and all(rung[1] > 0 for rung in ladder.values())


# ------------------------------------------------------------------- Streams that last and live
def test_stream_of_any_length_holds_nothing(tmp_path):
    """Of tiled frames of 48 kB."""
    peaks = []
    with open(tmp_path / "stream.webp", "wb", 0) as file:
        for chunk in range(100):
            frames = torch.randint(255, (12, 3, 3, 64, 64), dtype=torch.uint8)
            rf.write_webp(file, rf.tile(frames, 1, 4))
            peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    assert peaks[-1] - peaks[20] < 3000                              # kB; the frames are 35,000
    assert Image.open(tmp_path / "stream.webp").n_frames == 300


def test_play_hands_every_chunk_on_in_order_and_holds_at_most_two():
    model, text, made, seen, ahead = random_model(SMALL, float32), random_text(SMALL), [], [], []

    def finish(latents):
        time.sleep(0.1)                                              # slower than the model
        seen.append(latents)
        ahead.append(len(made) - len(seen))                          # the first is not asked for
    rf.play(model, None, text, SMALL, 18, finish, steer=made.append)
    assert same(seen, list(rf.stream(model, text, SMALL, 18))) and max(ahead) <= 1


# ------------------------------------------------------------------- The paper's reward
CHAT = ("<|im_start|> system You are a helpful assistant . <|im_end|> <|im_start|> user "
        "<|vision_start|> <|video_pad|> <|vision_end|> {} <|im_end|> <|im_start|> assistant")
REWARDS = ["<|VQ_reward|>", "<|MQ_reward|>", "<|TA_reward|>"]
TEMPLATE = "rate a <|VQ_reward|> a <|MQ_reward|> {text_prompt} <|TA_reward|>"
WORDS = ["<unk>", "rate", "panda", *dict.fromkeys(CHAT.replace("{} ", "").split()), *REWARDS]
PEFT = "base_model.model."


def save_videoalign(folder, rows):
    """(model, state): VideoAlign's files of a tiny random model, and the weights in them. Linears
    are saved as W - alpha / r B A: the model is what is right once LoRA is merged."""
    if not os.environ.get("CI"):
        importorskip("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2VLConfig, Qwen2VLModel
    base = folder / "Qwen2-VL-2B-Instruct"
    known = WORDS[:-3]
    ids = dict(zip(known, range(99)))
    words = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")
    words.add_tokens([word for word in known if "|" in word], special_tokens=True)
    words.save_pretrained(base)
    sizes = dict(hidden_size=32, initializer_range=0.2)
    text = dict(num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                intermediate_size=48, vocab_size=99, attention_dropout=0.5,
                rope_parameters={"rope_type": "default", "mrope_section": [1, 1, 2]})
    vision = dict(depth=1, embed_dim=32, num_heads=2)
    config = Qwen2VLConfig(text_config=sizes | text, vision_config=sizes | vision,
                           video_token_id=ids["<|video_pad|>"])
    Qwen2VLModel(config).save_pretrained(base)           # other weights, and more rows than words
    config.text_config.vocab_size = len(WORDS)
    model = Qwen2VLModel(config).eval()
    state = {"rm_head.weight": randn(rows, 32), "lm_head.weight": zeros(2, 32)}
    for name, p in model.state_dict().items():
        name = name.replace("language_model", "model")
        if "_proj.weight" in name:
            down, up = randn(3, p.shape[1]), randn(p.shape[0], 3)
            state[name.replace("weight", "lora_A.default.weight")] = down
            state[name.replace("weight", "lora_B.default.weight")] = up
            p = p - 4 / 3 * up @ down
        state[name.replace("_proj.", "_proj.base_layer.")] = p
    state = {PEFT + name: p for name, p in state.items()}
    (folder / "checkpoint-7").mkdir()
    torch.save(state, folder / "checkpoint-7/model.pth")
    (folder / "template.txt").write_text(TEMPLATE)
    (folder / "model_config.json").write_text(json.dumps({
        "data_config": {"fps": 2.0, "max_frame_pixels": 200704},
        "peft_lora_config": {"lora_r": 3, "lora_alpha": 4},
        "inference_config": {"MQ_mean": 0.3, "MQ_std": 7}}))
    return model, state


@torch.no_grad()
def plain_score(model, head, frames, caption):
    """The same score by hand, from the whole chat with its caption. The language model alone
    counts its positions in 1-D."""
    pixels = frames[[0, 9, 18, 27, 36, 44, 53, 62, 71, 80]] / 255    # 2 per second and even
    mean = tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]
    std = tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]
    patches = []
    for pair in ((pixels - mean) / std).split(2):
        for y, x in itertools.product(range(0, 224, 28), range(0, 448, 28)):
            square = pair[..., y:y + 28, x:x + 28]
            parts = [part for row in square.split(14, 2) for part in row.split(14, 3)]
            patches += [part.transpose(0, 1).flatten() for part in parts]
    seen = model.visual(stack(patches), grid_thw=tensor([[5, 16, 32]])).pooler_output
    chat = CHAT.format(TEMPLATE).replace("{text_prompt}", caption).split()
    at = chat.index("<|video_pad|>")
    words = model.language_model.embed_tokens(tensor([WORDS.index(word) for word in chat]))
    inputs = cat([words[:at], seen, words[at + 1:]])[None]
    states = model.language_model(inputs_embeds=inputs).last_hidden_state[0]
    scores = states[chat.index("<|MQ_reward|>") + len(seen) - 1] @ head.T
    return (scores[len(head) // 2] - 0.3) / 7


@parametrize("rows", [1, 3])
def test_videoalign_equals_the_plain_computation_for_every_clip(tmp_path, rows):
    model, state = save_videoalign(tmp_path, rows)
    clips = randint(256, (2, 81, 3, 224, 448)).to(torch.uint8)
    clips[1, 40:] //= 2
    captions = ["a panda", "panda are a panda ."]
    scores = rf.VideoAlign(tmp_path, float32)(clips, captions)
    head = state[PEFT + "rm_head.weight"]
    plain = [plain_score(model, head, *pair) for pair in zip(clips, captions)]
    assert error(scores, stack(plain)) < 1e-4 < 0.01 < error(*scores)


@parametrize("size, grid", [((480, 832), [24, 42]), ((120, 208), [18, 30])])
def test_videoalign_sees_squares_of_28_px_and_as_many_as_it_was_trained_on(tmp_path, size, grid):
    save_videoalign(tmp_path, 1)
    processor = rf.VideoAlign(tmp_path, float32).processor
    cut = processor(zeros(3, *size), return_tensors="pt")
    assert cut.image_grid_thw[0, 1:].tolist() == grid


@parametrize("place", REWARDS + ["{text_prompt}"])
def test_videoalign_refuses_another_instruction(tmp_path, place):
    save_videoalign(tmp_path, 1)
    (tmp_path / "template.txt").write_text(TEMPLATE.replace(place, ""))
    with raises(BadInput, match="template.txt must have"):
        rf.VideoAlign(tmp_path, float32)


def test_videoalign_names_what_is_missing_or_does_not_fit(tmp_path):
    _, state = save_videoalign(tmp_path, 1)
    weights = tmp_path / "checkpoint-7/model.pth"
    state["surplus"] = state.pop(PEFT + "model.norm.weight")
    torch.save(state, weights)
    with raises(BadInput, match="Missing.*model.norm.weight.*Unexpected.*surplus") as refusal:
        rf.VideoAlign(tmp_path, float32)
    assert "\n" not in str(refusal.value)
    weights.unlink()
    with raises(BadInput, match="got 0.*needs.*one checkpoint-"):
        rf.VideoAlign(tmp_path, float32)
    for name in "model_config.json", "template.txt":
        (tmp_path / name).unlink()
        with raises(BadInput, match="No such file.*" + name):
            rf.VideoAlign(tmp_path, float32)


# ----------------------------------------------------- Training at full size, with tiny parts
STEPS = ("--full --train --dim 24 --ffn-dim 32 --heads 2 --layers 2 --text-dim 16 --text-len 12 "
         "--height 32 --width 48 --clip 9 --window 6 --batch 4 --critic-ratio 1 --distill-steps 3 "
         "--ema-start 1 --student-lr 1e-3 --critic-lr 1e-3 --negative worst")


def train(folder, out, more=""):
    weights = f"--weights {folder}/w.pt --critic {folder}/w.pt --teacher {folder}/w.pt"
    files = f"{weights} --wan {folder} --prompts {folder}/prompts --out {folder / out}"
    assert main(f"{STEPS} {files} --reward videoalign:{folder} {more}") == 0


def stand_in(patch):
    """For text encoder, VAE and reward, which are large. The reward is of sample and caption."""
    class Reward:
        def __init__(self, folder, dtype):
            assert folder.is_dir()

        def __call__(self, frames, captions):
            return frames.flatten(1).mean(1) + tensor([float(len(told)) for told in captions]) / 10

    def wan_text(prompts, *_):
        return [randn(2 + i % 3, 16, generator=torch.Generator().manual_seed(i))
                for i in range(len(prompts))]
    patch(rf.WanVAE, "__init__", lambda *_: None)
    patch(rf.WanVAE, "decode", lambda vae, latents, past: latents)
    patch(rf, "wan_text", wan_text)
    patch(rf, "VideoAlign", Reward)


def worker(folder):
    """One of two processes: three steps, then the last again from what a kill before it leaves."""
    end = rf.Stage.end

    def copied(stage, step, **numbers):
        end(stage, step, **numbers)
        if step == 1 and stage.run.rank == 0:
            for copy in ("killed", "one"):
                shutil.copytree(folder / "whole", folder / copy, dirs_exist_ok=True)
    stand_in(setattr)
    torch.distributed.destroy_process_group = lambda: None           # torchrun makes one only
    rf.Stage.end = copied
    train(folder, "whole", "--micro 2")
    rf.Stage.end = end
    train(folder, "killed", "--micro 2")


@fixture(scope="module")
def two_processes(tmp_path_factory):
    """What worker left: {folder: checkpoint}, and the folder they are in."""
    folder = tmp_path_factory.mktemp("sharded")
    torch.manual_seed(0)
    state = random_model(replace(FULL, **given(STEPS)), float32).state_dict()
    torch.save({"generator": {"model." + name: p for name, p in state.items()}}, folder / "w.pt")
    (folder / "prompts").write_text("a\nred panda\nswims\n")
    line = "-m torch.distributed.run --standalone --nproc-per-node 2".split()
    subprocess.run([sys.executable, *line, __file__, folder], check=True)
    return folder


@fixture
def one_process(monkeypatch):
    """This process, as torchrun would start it alone."""
    with socket.create_server(("localhost", 0)) as free:
        port = free.getsockname()[1]
    for pair in f"RANK=0 WORLD_SIZE=1 MASTER_ADDR=localhost MASTER_PORT={port}".split():
        monkeypatch.setenv(*pair.split("="))
    stand_in(partial(monkeypatch.setattr, raising=False))
    return monkeypatch


def difference(folder, *outs):
    """The largest between the models, optimizers and logs of two runs."""
    states = [rf.load_checkpoint(folder / out / "checkpoint.pt") for out in outs]
    for row in states[0]["log"] + states[1]["log"]:
        del row["tokens_per_second"], row["utilisation"]
    parts = [tree_leaves([state["stages"], state["log"]]) for state in states]
    assert len(parts[0]) == len(parts[1]) > 700
    return max(np.abs(np.subtract(a, b)).max() for a, b in zip(*parts)
               if isinstance(a, (torch.Tensor, float)))


def test_three_sharded_steps_on_two_processes_equal_one_process_with_plain_models(two_processes,
                                                                                 one_process):
    def plain(run, stage):
        model = VideoTransformer(run.cfg)
        rf.load_weights(model, run.files[stage])
        return model
    one_process.setattr(rf.FullRun, "model", plain)
    train(two_processes, "plain")                                    # each sample has its turn
    assert 0 < difference(two_processes, "whole", "plain") < 1e-5


def test_sharded_run_resumes_bitwise_and_on_one_process_to_rounding(two_processes, one_process):
    assert difference(two_processes, "whole", "killed") == 0
    train(two_processes, "one", "--micro 4")
    assert 0 < difference(two_processes, "whole", "one") < 1e-5


def test_sharded_checkpoint_holds_whole_models_under_the_public_names(two_processes):
    path = two_processes / "whole/checkpoint.pt"
    state, start = rf.load_checkpoint(path), torch.load(two_processes / "w.pt")["generator"]
    with torch.device("meta"):
        model = VideoTransformer(replace(FULL, **given(STEPS)))
    rf.load_weights(model, path)
    assert same(model.state_dict(), state["generator_ema"])
    assert same(state["stages"]["student"]["parts"][1:3], [state["generator"], state["critic"]])
    for kind in ("generator_ema", "generator", "critic"):
        for name, p in state[kind].items():
            assert 1e-5 < error(p, start["model." + name]) < 0.02


def test_dry_run_counts_memory_of_the_real_shapes(tmp_path, capsys):
    assert main(f"--full --dry-run --out {tmp_path}") == 0
    lines = capsys.readouterr().out.splitlines()[1:]
    for line, count in zip(lines, (1, 8, 64)):
        assert f"{count} GPUs" in line
        assert f"student and critic {32 * 1_418_996_800 / count / 1e9:.1f}" in line
    assert len(lines) == 3


# ----------------------------------------------------------------------------- Command line
def process(line):
    """A command line as a process of its own."""
    subprocess.run([sys.executable, HERE / "reward_forcing.py", *line.split()], check=True)


@fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("trained")
    process(f"--toy {TINY} --teacher-steps 150 --distill-steps 5 --out {out}")
    return out


def test_toy_writes_every_file_and_its_losses_fall(trained):
    assert {path.suffix for path in trained.iterdir()} == set(".png .gif .jsonl .pt .json".split())
    log = [json.loads(line) for line in (trained / "log.jsonl").read_text().splitlines()]
    for stage, part in (("teacher", 0.9), ("causal", 1.0)):          # the second starts low
        losses = [line["loss"] for line in log if line["stage"] == stage]
        assert np.mean(losses[-3:]) < part * np.mean(losses[:2])
    assert log[-1]["sink_updates"] == 3 and log[-1]["weight_min"] < log[-1]["weight_max"]


def test_stream_of_other_length_sink_and_window_changes_no_file_but_its_own(trained):
    made, before = set(), (trained / "checkpoint.pt").read_bytes()
    for more in ("--seed 1", "--alpha 0", "--sink 0 --window 6"):
        process(f"--stream --prompt red --frames 36 {more} --out {trained}")
        made.add((trained / "stream.webp").read_bytes())
        assert Image.open(trained / "stream.webp").n_frames == 36
    assert len(made) == 3 and (trained / "checkpoint.pt").read_bytes() == before


def test_stream_goes_on_from_a_picture_or_a_clip(trained, tmp_path, spy):
    clip, tiled = np.load(WORLD)["clips"][0, :6], spy(rf, "tile")
    first, *others = [Image.fromarray(frame) for frame in clip.transpose(0, 2, 3, 1)]
    first.save(tmp_path / "still.png")
    first.save(tmp_path / "clip.webp", save_all=True, append_images=others, lossless=True)
    for name, given in (("still.png", clip[[0, 0, 0]]), ("clip.webp", clip)):
        line = f"--stream --prompt red --frames 12 --out {trained} --start {tmp_path}/{name}"
        assert main(line) == 0
        made = cat([call.videos[0] for call in tiled])[-12:]
        off = (made[:len(given)].float() - tensor(given)).square().mean()
        assert 10 * math.log10(255 ** 2 / off) > 25                  # dB


def test_live_stream_in_a_terminal_is_seen_steered_and_stopped(trained):
    line, file = f"--stream --prompt red --out {trained}", trained / "stream.webp"
    child, terminal = pty.fork()
    if not child:
        command = f"python {HERE}/reward_forcing.py {line} --live --frames 900"
        os.execv(sys.executable, command.split())
    before, screen = termios.tcgetattr(terminal), ""
    for awaited, answer in (("red: ", "pink\n"), ("'pink' must be", "blue square\n"),
                            ("blue square: ", "\3")):
        while screen.count(awaited) < 12:                            # a chunk has three frames
            screen = screen[-999999:] + os.read(terminal, 65536).decode(errors="replace")
        os.write(terminal, answer.encode())
    with raises(OSError):                                            # the child is gone
        while True:
            screen += os.read(terminal, 65536).decode(errors="replace")
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 130
    assert screen.count("\u2580") > 1500 and termios.tcgetattr(terminal) == before
    assert Image.open(file).n_frames > 5
    shown = file.read_bytes()
    assert main(line) == 0                                           # red to the end
    red = file.read_bytes()
    assert shown[-99:] not in red


@parametrize("line", [
    " | --toy, --stream",
    "--toy --stream --prompt red | --toy, --stream",
    "--bench | with --full one of",
    "--stream --prompt red --then ten blue | --then ten",
    "--stream --prompt red --then 10 blue | 9 or 12",
    "--stream --prompt red --then 9 pink | yellow",
    "--stream --prompt red --start README.md | README.md",
    "--stream --prompt red --live | --live",
    "--toy --teachr-steps 3 | --teachr-steps",
    "--toy --alpha much | --alpha",
    "--toy --alpha 1.5 | at most 1",
    "--toy --clip 10 | clip=10 does not fit, it goes in steps of 3: try 9 or 12",
    "--toy --sample-steps 10 | try 8 or 12",
    "--toy --height 20 | latents of [16, 8, 8]",
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
    "--toy --causal-clip 51 --out new | 48 frames",
    "--toy --chunk 1 --out new | --chunk 2",
    "--train --full --tilt | --tilt",
    "--toy --text-dim 4 | 8 words",
    "--toy --full | with --full one of",
    "--toy --data nowhere.npz | nowhere.npz",
    "--toy --data README.md | README.md",
    "--toy --out /dev/null/x | /dev/null/x",
    "--toy --freq-dim 65 | try 64 or 66",
    "--train --full | torchrun",
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
    assert main(f"--from-scratch --out {trained} {words}") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and mend in error
    assert (trained / "checkpoint.pt").read_bytes() == whole


def test_shipped_teacher_is_refused_where_it_does_not_fit(tmp_path, capsys):
    assert main(f"--toy --layers 2 --out {tmp_path}") == 2
    assert "add --from-scratch" in capsys.readouterr().err


def test_compiled_stream_has_two_graphs_for_each_length_of_context_and_equals_eager(trained, spy,
                                                                                    graphs):
    videos = spy(rf, "tile")
    line = f"--stream --prompt red --frames 60 --window 36 --out {trained}"
    assert main(line) == 0 and main(line + " --compile") == 0
    assert len(graphs) == 12 + 11                # blocks of 0, 3, ..., 33 frames; layouts of 3, ...
    eager, fast = torch.cat([call.videos for call in videos], 1).float().chunk(2, 1)
    assert error(eager, fast) <= 1


if __name__ == "__main__":
    worker(Path(sys.argv[1]))
