"""Facts about reward_forcing.py, in file order:  python -m pytest test_reward_forcing.py

Each test runs in an empty folder. REWARD_FORCING_GOLDEN names another file of recorded numbers for
the golden tests.
"""
import inspect
import json
import os
import pickle
import pty
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from math import inf, nan
from pathlib import Path
from types import SimpleNamespace
from weakref import WeakSet

os.environ["OMP_NUM_THREADS"] = "1"                  # for torch: several processes share the CPU

import numpy as np
import torch
from PIL import Image
from pytest import fixture, importorskip, mark, raises
from torch import (arange, bfloat16, cat, equal, exp, float32, float64, ones, rand, randint, randn,
                   randn_like, stack, tensor, zeros)
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import reward_forcing as rf
from reward_forcing import (BadInput, EMASinkCache, PRESETS, RewardWeight, VideoTransformer,
                            WanWorld, add_noise, draw_samples, flow_matching_loss, measure,
                            mean_square, motion_reward, predict_x0, regress, regression_loss,
                            rollout, rope_table, rotate)

parametrize = mark.parametrize
HERE = Path(__file__).parent
WORLD = HERE / "tiny_data/world.npz"
TOY = PRESETS["scratch"]
FULL = PRESETS["full"]
SMALL = replace(TOY, dim=24, ffn_dim=32, heads=2, layers=2, height=16, width=24, text_dim=16)
TINY = ("--from-scratch --dim 24 --ffn-dim 24 --heads 2 --layers 1 --batch 4 --sample-steps 4 "
        "--critic-ratio 1 --teacher-steps 32 --causal-steps 22 --distill-steps 22 --frames 24")


@fixture(autouse=True)
def seed_and_folder(tmp_path, monkeypatch):
    torch.manual_seed(0)
    torch.set_default_device(None)                                   # main sets one
    torch.backends.cuda.enable_flash_sdp(True)                       # fastest_attention may not
    monkeypatch.chdir(tmp_path)


def random_model(cfg, dtype=float64):
    """Every parameter random and of a size that matters, norms, gates and head included."""
    model = VideoTransformer(cfg).to(dtype).requires_grad_(False)
    for name, p in model.named_parameters():
        p.normal_(float("norm" in name), p.shape[-1] ** -0.5)
    return model


def random_text(cfg, batch=1):
    return randn(batch, 3, cfg.text_dim)


def noises(cfg, batch=1):
    """(8 chunks, denoise_steps, batch, L, C, h, w)"""
    return randn(8, cfg.denoise_steps, batch, cfg.chunk, *cfg.latent, dtype=float64)


def drawing(noise):
    """rollout's draw: noise (chunks, steps, B, L, C, h, w), one after the other."""
    drawn = iter(noise.flatten(0, 1))
    return lambda *shape: next(drawn).view(shape)


def predicting(x0, cfg=TOY):
    """A model whose x0 prediction is x0(text), whatever it sees."""
    def model(xt, sigma, text, cache=None):
        return (xt - x0(text)) / sigma[..., None, None, None]
    model.cfg, model.embed_text = cfg, lambda text: text
    return model


def same(a, b):
    """Equal bit for bit: nested dicts and lists of tensors."""
    return all(map(np.array_equal, tree_leaves(a), tree_leaves(b)))


def error(a, b):
    """The largest difference of two tensors of one shape."""
    assert a.shape == b.shape
    return (a - b).abs().max()


JOBS = {
    "compared": [__file__, "compare"],
    "drawn": [HERE / "tiny_data/make.py", "w.npz"],
    "sharded": [*"-m torch.distributed.run --standalone --nproc-per-node 2".split(), __file__,
                "share"],
    "toys": [__file__, "resume"],
}


@fixture(scope="session", autouse=True)
def jobs(request, tmp_path_factory):
    """{name: (process, its folder)} of JOBS that a test needs: they run beside the other tests."""
    needed = {name for item in request.session.items for name in item.fixturenames}
    started = {}
    for level, name in enumerate(sorted(needed & set(JOBS))):
        folder = tmp_path_factory.mktemp(name)
        save_start(folder)
        command = ["nice", "-n", str(6 * level), sys.executable, *JOBS[name]]
        started[name] = subprocess.Popen(command, cwd=folder), folder
    return started


def ended(jobs, name):
    """The folder of a job that ends well."""
    process, folder = jobs[name]
    assert process.wait() == 0
    return folder


@fixture(scope="session")
def toys(jobs):
    return ended(jobs, "toys")


@fixture(scope="session")
def trained(toys):
    """What a tiny run left."""
    return toys / "out"


def main(line):
    """The exit code of a command line, run in this process."""
    return rf.main(line.split())


def given(line, command="--toy"):
    """{field of Config: value} of the flags in a line."""
    return rf.parse([command, *line.split()]).given


def refused(call, *args, mend):
    """BadInput in one line, which names the mend."""
    with raises(BadInput, match=mend) as refusal:
        call(*args)
    assert "\n" not in str(refusal.value)


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
def test_x0_is_recovered_from_a_perfect_velocity():
    x0, noise = randn(2, 2, 3, 4, 2, 2, dtype=float64)
    for shape in (2, 1), (2, 3):                                     # one a clip, one a frame
        sigma = rand(shape, dtype=float64)
        xt = add_noise(x0, noise, sigma)
        assert error(predict_x0(lambda *_: noise - x0, xt, sigma, None), x0) < 1e-12


# ------------------------------------------------------------------------------------ Model
def test_full_preset_is_wan_1_3b_and_a_pass_in_a_full_window_is_24_teraflop():
    with torch.device("meta"):
        model = VideoTransformer(FULL).requires_grad_(False)
        sizes = [p.numel() for p in model.state_dict().values()]
        assert len(sizes) == 825 and sum(sizes) == 1_418_996_800
        cache, text_kv = EMASinkCache(FULL), model.embed_text(random_text(FULL))
        kv = randn(1, FULL.chunk * FULL.tokens, FULL.dim)
        for _ in "abc":
            cache.newest = [(kv, kv)] * FULL.layers
            cache.append()
        with FlopCounterMode(display=False) as counter:
            model(randn(1, FULL.chunk, *FULL.latent), ones(1, 1), text_kv, cache)
    counted = counter.get_total_flops()
    assert abs(counted / 1e12 - 24.26) < 0.005
    assert abs(FULL.chunk * rf.frame_flops(FULL, FULL.window) / counted - 1) < 0.001


# ------------------------------------------------- Cache and rollout against a slow twin
def slow_rollout(model, text, cfg, noise, start, script, reread):
    """Keeps all clean frames and works out the window anew: the EMA by hand, in float64."""
    text_kv, past = model.embed_text(text), []                       # each (2, layers, B, N, dim)
    for chunk in range(7):
        sink, others = past[:cfg.sink], past[cfg.sink:]
        gone = max(0, len(past) + cfg.chunk - cfg.window)
        for slot in range(cfg.sink):
            for frame in others[slot:gone:cfg.sink]:
                sink[slot] = cfg.alpha * sink[slot] + (1 - cfg.alpha) * frame
        cache = EMASinkCache(cfg)
        cache.frames = sink + others[gone:]
        if cache.frames:
            keys, values = cat(cache.frames, 3)
            rope = rope_table(cfg, 0, len(cache.frames))
            cache.context = list(zip(rotate(keys, rope), values))
        x = noise[chunk, 0]
        for step, sigma in enumerate(cfg.sigmas):
            xt = (1 - sigma) * x + sigma * noise[chunk, step]
            x = xt - sigma * model(xt, sigma, text_kv, cache)
        if chunk < len(start):
            x = start[chunk]
        yield x
        told = script.get(chunk + 1, text_kv)
        model(x, zeros(1), told if reread else text_kv, cache)
        text_kv = told
        past += stack([stack(kv) for kv in cache.newest], 1).chunk(cfg.chunk, 3)


@parametrize("started, reread", [(0, False), (2, True)])
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
def test_steered_stream_equals_a_plainly_written_one_with_a_hand_written_ema(change, started,
                                                                            reread):
    cfg = replace(SMALL, **given(change))
    model, text, noise = random_model(cfg), random_text(cfg, 2), noises(cfg, 2)
    start = [*noise[7, :started]]
    script = {1: model.embed_text(text + 1), 4: model.embed_text(-text)}
    cache, draw = EMASinkCache(cfg), drawing(noise[started:])
    fast = rollout(model, text, cfg, 7, draw, cfg.denoise_steps, cache, start, script.get, reread)
    slow = slow_rollout(model, text, cfg, noise, start, script, reread)
    for (ours, _), plain in zip(fast, slow):
        assert error(ours, plain) < 2e-5 * plain.abs().max()         # the sink is float32
    left = max(0, 7 * cfg.chunk - cfg.window)
    assert cache.updates == (left if cfg.sink else 0)


def test_cache_of_a_long_bfloat16_stream_is_of_constant_size_and_its_sink_is_float32():
    cache, sizes = EMASinkCache(replace(SMALL, alpha=0.999)), []
    for chunk in range(40):                                          # starts as 1; what leaves is 2
        kv = torch.full((1, 18, 24), 1.0 + (chunk > 0)).bfloat16()
        cache.newest = [(kv, kv)] * SMALL.layers
        cache.append()
        sizes.append(len(pickle.dumps(vars(cache))))                 # every tensor in it
    want = 2 - 0.999 ** (cache.updates // SMALL.sink)                # in bfloat16 1 + 0.001 is 1
    assert abs(stack(cache.frames[:SMALL.sink]) - want).max() < 1e-4
    assert max(sizes[5:]) - min(sizes[5:]) < 200


# ----------------------------------------------------------------------- Losses and gradients
def one_graph(student, text, cfg, noisy, sigma, clean, through=False, leaky=False):
    """All chunks' x0 predictions in one graph; regress otherwise sends them back one by one.
    leaky: as the public training cache, with the clean pass's values, the exit pass's gradient."""
    cache, text_kv, made = EMASinkCache(cfg), student.embed_text(text), []
    for now in arange(clean.shape[1]).split(cfg.chunk):
        made.append(predict_x0(student, noisy[:, now], sigma[:, now], text_kv, cache))
        leaks = [*cache.newest]
        with torch.set_grad_enabled(through):
            student(clean[:, now], zeros(1), text_kv, cache)
        if leaky:
            cache.newest = [[kept + leak - leak.detach() for kept, leak in zip(*layer)]
                            for layer in zip(cache.newest, leaks)]
        cache.append()
    return cat(made, 1)


@parametrize("through", [False, True])
@parametrize("recomputed", [False, True])
def test_regress_gives_the_gradients_of_one_graph(recomputed, through):
    student, text = random_model(SMALL).requires_grad_(), random_text(SMALL, 2)
    sigma, weight = rand(2, 12), tensor([0.5, 2.0])                  # the fourth chunk has evicted
    noisy, clean, target = randn(3, 2, 12, *SMALL.latent, dtype=float64)
    made = one_graph(student, text, SMALL, noisy, sigma, clean, through)
    loss = (per_sample(weight) * (made - target) ** 2).mean() / 2
    whole = torch.autograd.grad(loss, [*student.parameters()])
    for block in student.blocks if recomputed else ():               # as FullRun does it
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    total = regress(student, text, SMALL, noisy, sigma, clean, target, mean_square,
                    weight, through)
    assert abs(total - loss) < 1e-10
    assert all(error(p.grad, grad) < 1e-10 for p, grad in zip(student.parameters(), whole))


def test_memory_of_regress_does_not_grow_with_the_clip():
    student, x = random_model(SMALL).requires_grad_(), randn(1, 24, *SMALL.latent, dtype=float64)
    alive, counts = WeakSet(), []

    def keep(saved):                                                 # for a backward pass
        def kept():
            return saved
        alive.add(kept)
        counts.append(len(alive))
        return kept
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda kept: kept()):
        regress(student, random_text(SMALL), SMALL, x, ones(1, 24), x, x, mean_square)
    assert max(counts) == len(counts) / 8                            # what one chunk of 8 saves


def test_reward_weight_is_exp_of_reward_over_beta_and_of_mean_one_in_the_long_run():
    weigh, rewards = RewardWeight(0.5), rand(400, 4)
    weights = stack([weigh(reward) for reward in rewards])
    assert abs(weights[100:].mean() - 1) < 0.02
    assert error(weights / weights[:, :1], exp((rewards - rewards[:, :1]) / 0.5)) < 1e-4
    better = rewards[0] + 1
    assert weigh(better).mean() > 2                                  # the mean of no single batch
    assert equal(RewardWeight(inf)(better), ones(4))


@parametrize("student_beta, critic_beta", [
    (inf, inf),                                                      # DMD
    (1.0, inf),                                                      # Re-DMD
    (inf, 1.0),                                                      # DMD by a tilted critic
])
def test_training_ends_at_the_teacher_and_only_a_tilted_critic_moves_the_end(student_beta,
                                                                             critic_beta):
    """Particles move by DMD from one Gaussian to another, with exact denoisers; the reward is x."""
    x, variance, steps = 1 + randn(400, 1), 0.36, 600
    weigh, tilt = RewardWeight(student_beta), RewardWeight(-critic_beta)

    def denoise(xt, sigma, mean, variance):                          # E[x0 | xt]
        signal = (1 - sigma) * variance
        return mean + signal / ((1 - sigma) * signal + sigma ** 2) * (xt - (1 - sigma) * mean)

    for step in range(steps):
        sigma, weight = rand(1).clamp(0.02, 0.98), tilt(x[:, 0])
        xt, mean = (1 - sigma) * x + sigma * randn_like(x), weight @ x / weight.sum()
        fake = denoise(xt, sigma, mean, torch.cov(x[:, 0], aweights=weight))
        real = denoise(xt, sigma, 0.0, variance)
        made = x.clone().requires_grad_()
        regression_loss(made, x - (fake - real), weigh(x[:, 0]), mean_square).backward()
        x = x - 0.1 * (1 - step / steps) * len(x) * made.grad
    assert abs(x.mean() - variance / critic_beta) < 0.05             # of teacher * exp(x / beta)
    assert abs(x.var() - variance) < 0.05


# ------------------------------------- Golden: numbers recorded from the public implementation
RECORDED = np.load(os.environ.get("REWARD_FORCING_GOLDEN", HERE / "tiny_data/golden.npz"))
STREAMS = [name for name in ("stream", "static", "stream_b2") if name + ".x0" in RECORDED]
SIZES_OF_GOLDEN = ("dim=dim ffn_dim=ffn_dim freq_dim=freq_dim text_dim=text_dim text_len=text_len "
                   "heads=num_heads layers=num_layers channels=in_dim chunk=frames_per_chunk "
                   "sink=sink_size window=local_attn_size height=height width=width")


@fixture(scope="module")
def golden():
    """Every recorded array, and the config and model that the file describes."""
    a = {name: torch.from_numpy(array) for name, array in RECORDED.items()}
    names = dict(pair.split("=") for pair in SIZES_OF_GOLDEN.split())
    sizes = {ours: int(a["cfg." + theirs]) for ours, theirs in names.items()}
    cfg = replace(TOY, **sizes, alpha=a["cfg.alpha"].item(), stride=1, sigma_shift=5.0,
                  rope_base=10000.0)
    model = VideoTransformer(cfg)
    model.load_state_dict({name[3:]: p for name, p in a.items() if name.startswith("sd.")})
    return a, cfg, model


def nearest_sigma(table, timestep):
    """(n, 1), the public code's sigma of timestep (n,): the nearest in a table of 1000."""
    distance = 1000 * table - timestep[:, None]
    return table[distance.abs().argmin(1, keepdim=True)]


def test_golden_file_agrees_with_itself(golden):
    a, cfg, _ = golden
    assert a["cfg.frame_seqlen"] == cfg.tokens
    assert a["cfg.chunks"] * cfg.chunk == a["stream.noise"].shape[1]


def test_golden_schedule(golden):
    a, cfg, _ = golden
    table = cfg.schedule(1000)[:-1]
    assert error(table, a["sched.sigmas"]) < 1e-6
    assert error(1000 * cfg.schedule(cfg.denoise_steps), a["stream.t"]) < 1e-3   # of up to 1000
    xt, sigma = a["sched.ex_xt"], nearest_sigma(table, a["sched.ex_t"])[:, 0]
    assert error(add_noise(a["sched.ex_x"], a["sched.ex_noise"], sigma), xt) < 1e-5
    x0 = predict_x0(lambda *_: a["sched.ex_flow"], xt, sigma, None)
    assert error(x0, a["sched.ex_x0"]) < 1e-5


def test_golden_rope_of_128_channels(golden):
    cfg = replace(FULL, height=32, width=48)                         # 2 rows of 3 tokens
    for first in 0, 6:
        rope = rope_table(cfg, first, 3)
        x = golden[0]["rope128.x"]                                   # (B, T, H, D)
        turned = rotate(x.flatten(2), rope).view_as(x)
        assert error(turned, golden[0][f"rope128.start{first}"]) < 2e-5


def test_golden_time_embedding_and_bidirectional_forward(golden):
    a, cfg, model = golden
    assert error(model.embed_sigma(a["temb.t"].double() / 1000), a["temb.out"]) < 2e-5
    x, ctx = a["bidir.x"].transpose(1, 2), a["ctx"]
    sigma = a["bidir.t"][:, None].double() / 1000
    flow = model(x, sigma, model.embed_text(ctx))
    assert error(flow.transpose(1, 2), a["bidir.flow"]) < 2e-5
    theirs = replace(cfg, sigma_shift=8.0)       # of teacher and critic; here the student's shift
    sigma8 = nearest_sigma(theirs.schedule(1000)[:-1], a["bidir.t"])
    x0 = predict_x0(lambda *_: flow, x, sigma8, None)
    assert error(x0, a["bidir.x0_shift8"]) < 5e-5
    flow = model(x[1:], sigma[1:], model.embed_text(ctx[1:, :3])).transpose(1, 2)
    assert error(flow, a["bidir.flow_len3"]) < 2e-5


def recorded_noise(a, name, cfg):
    """(chunks, steps, B, L, C, h, w)"""
    first = stack(a[name + ".noise"].split(cfg.chunk, 1))
    return cat([first[:, None], a[name + ".renoise"]], 1)


@parametrize("name", STREAMS)
def test_golden_stream(golden, name, spy):
    a, cfg, model = golden
    source = name
    if name == "static":
        cfg, source = replace(cfg, alpha=1.0), "stream"              # the same noise
    x0, noise = a[name + ".x0"].split(cfg.chunk, 1), recorded_noise(a, source, cfg)
    cache, passes, sinks = EMASinkCache(cfg), spy(VideoTransformer, "forward"), ()
    chunks = rollout(model, a["ctx"][:len(x0[0])], cfg, len(x0), drawing(noise), cache=cache)
    for n, (made, _) in enumerate(chunks):
        assert error(made, x0[n]) < 5e-5
        if n:
            sinks = cat(cache.frames[:cfg.sink], 3).unflatten(4, (cfg.heads, -1))
        for kind, sink in zip("kv", sinks):
            recorded = a.get(f"{name}.sink_{kind}", {n: sink})[n]
            assert error(sink, recorded) < 5e-5
    for kind, sink in zip("kv", sinks):
        assert error(sink, a.get(f"{name}.sink_{kind}_final", sink)) < 5e-5
    for call, flow in zip(passes, a.get(name + ".flow", zeros(0, 1)).flatten(0, 1)):
        assert error(call.result, flow) < 5e-5


@fixture
def golden_training(golden, monkeypatch):
    """The public training rollout, which caches noised frames and has a static sink: (a, what
    one_graph and regress take)."""
    a, cfg, model = golden
    noise, steps = a["train.context_noise"], int(a["cfg.train_exit"]) + 1
    context_noise, remember = iter(noise), rf.remember
    cfg, least = replace(cfg, alpha=1.0), a["sched.sigmas"][-1:]

    def remember_noised(student, x0, *rest):
        remember(student, add_noise(x0, next(context_noise), least), *rest)
    with monkeypatch.context() as patched:
        patched.setattr(rf, "remember", remember_noised)
        draw = drawing(recorded_noise(a, "train", cfg)[:, :steps])
        parts = zip(*rollout(model, a["ctx"][:1], cfg, len(noise), draw, steps))
    x0, noisy = (cat(part, 1) for part in parts)
    assert error(x0, a["train.x0"]) < 1e-5
    clean = add_noise(x0, cat([*noise], 1), least)
    model.zero_grad()
    return a, (model, a["ctx"][:1], cfg, noisy, cfg.sigmas[steps - 1].expand(x0.shape[:2]), clean)


def relative_errors(a, model):
    """{name: error of the gradient, relative to its largest element} of all recorded."""
    return {name: error(model.get_parameter(name[11:]).grad, g) / g.abs().max()
            for name, g in a.items() if name.startswith("train.grad.")}


def test_golden_training_rollout_and_its_gradients_through_a_leaky_cache(golden_training):
    a, inputs = golden_training
    loss = regression_loss(one_graph(*inputs, leaky=True), 0, 1, mean_square)
    assert abs(loss / a["train.loss"] - 1) < 1e-5
    loss.backward()
    assert max(relative_errors(a, inputs[0]).values()) <= 1e-5


def test_golden_departure_here_the_context_carries_no_gradient(golden_training):
    a, inputs = golden_training
    loss = regress(*inputs, 0 * inputs[3], mean_square)
    assert abs(loss / a["train.loss"] - 1) < 1e-5                    # the same frames
    keys_and_values = [wrong for name, wrong in relative_errors(a, inputs[0]).items()
                       if "self_attn.k." in name or "self_attn.v." in name]
    assert min(keys_and_values) > 0.1


def test_golden_redmd_and_critic(golden):
    a, cfg, _ = golden
    x, noise, noisy, fake, cond, uncond, grad, slopes, mq, beta = (
        a["redmd." + name].double() for name in (
            "x0 noise noisy pred_fake pred_real_cond pred_real_uncond grad dloss_dx0 mq beta"
        ).split())
    table = cfg.schedule(1000)[:-1]
    sigma = nearest_sigma(table, a["redmd.timestep"][:, 0])
    assert error(add_noise(x, noise, sigma), noisy) < 1e-5
    cfg = replace(cfg, guidance=a["redmd.guidance"].item())
    teacher = predicting(lambda text: cond if text.any() else uncond, cfg)
    real = rf.guided_x0(teacher, noisy, sigma.double(), ones(2, 1, 1), zeros(2, 1, 1))
    g = rf.dmd_gradient(x, real, fake)
    assert error(g, grad) < 1e-5 * grad.abs().max()
    weight = RewardWeight(1 / beta.item())(mq) * exp(beta * mq).mean()
    made = x.clone().requires_grad_()
    loss = regression_loss(made, x - g, weight, mean_square)
    loss.backward()
    assert abs(loss / a["redmd.loss"].mean() - 1) < 1e-5             # recorded one call a sample
    for ours, slope in zip(2 * made.grad, slopes):
        assert error(ours, slope) < 1e-5 * slope.abs().max()
    sigma, noise = nearest_sigma(table, a["critic.timestep"][:, 0]), a["critic.noise"].view_as(x)
    loss = flow_matching_loss(predicting(lambda _: fake), x, None, sigma.double(), noise)
    assert abs(loss / a["critic.loss"] - 1) < 1e-6


def test_golden_departure_the_public_code_weights_the_batch_by_the_reward_of_sample_0(golden):
    x, grad, mq, beta, official = (golden[0]["redmd." + name] for name in (
        "x0", "grad", "mq", "beta", "official_b2_loss"))

    def off(reward):
        loss = regression_loss(x, x - grad, exp(beta * reward), mean_square)
        return abs(loss / official - 1)
    assert off(mq[:1]) < 1e-5 and off(mq) > 0.01


# ------------------------------------------- The stages: who is asked what, in a step of each
def make_run(line):
    """A tiny Run in which teacher and ODE student are random."""
    cfg = replace(TOY, **given(f"{TINY} {line}"))
    run = rf.Run(cfg, Path(), rf.ToyWorld(cfg))
    for stage in "teacher", "causal":
        weights = random_model(cfg, float32).state_dict()
        run.state[stage] = {"config": {}, "step": 0, "parts": [weights]}
    return run


def test_clips_have_their_captions_some_of_which_are_dropped_and_every_other_is_mirrored(spy):
    run = make_run("--batch 200 --drop-caption 0.5")
    world, encoded = run.world, spy(run.world, "encode")
    world.clips[:, :, 0] = arange(120).view(-1, 1, 1, 1)             # which clip
    world.clips[:, :, 1] = arange(32)                                # which column
    _, text = run.draw_clips(24, mirror=True)
    which, column, _ = encoded[0].frames.unbind(2)
    assert which.shape == (100, 24, 32, 32) and equal(column[::2], column[1::2].flip(-1))
    told = world.text([world.captions[i] for i in which[:, 0, 0, 0]])
    kept = text.flatten(1).any(1)
    assert equal(text[kept], told[kept]) and 30 < kept.sum() < 70


def test_teacher_learns_from_clips_their_text_and_levels_of_half_the_frames(spy):
    run = make_run("--teacher-steps 1")
    drawn, asked = spy(run, "draw_clips"), spy(rf, "flow_matching_loss")
    rf.train_teacher(run)
    (x0, text), loss = drawn[0].result, asked[0]
    assert loss.x0 is x0 and loss.text is text and loss.norm is rf.motion_square
    assert [len(levels.unique()) for levels in loss.sigma] == [1, run.cfg.clip] * 2


def test_guided_trajectory_of_a_known_teacher_is_the_known_line():
    teacher, noise = predicting(torch.mean), randn(2, 3, *TOY.latent)    # data is 1, or 0 untold
    path = rf.teacher_trajectory(teacher, noise, ones(2, 1, 1), TOY)
    for level, sigma in enumerate([1, 0.9, 0.75, 0.5, 0]):           # at shift 3
        line = (1 - sigma) * (1 + TOY.guidance) + sigma * noise
        assert error(path[level], line) < 1e-5


@parametrize("ode", ["", "--ode"])
def test_causal_student_regresses_the_clean_end_from_a_level_of_each_chunk(spy, monkeypatch, ode):
    run = make_run(f"--causal-steps 1 --causal-clip 18 {ode}")
    cfg, weights = run.cfg, run.state["teacher"]["parts"][0]

    def end(text):                                                   # of its trajectory
        return per_sample(text.flatten(1) @ arange(128.0))

    def straight(teacher, noise, text, cfg):
        assert same(teacher.state_dict(), weights)
        sigmas = cfg.schedule(cfg.denoise_steps)
        return stack([add_noise(end(text), noise, sigma) for sigma in sigmas])
    monkeypatch.setattr(rf, "teacher_trajectory", straight)
    asked, drawn = spy(rf, "regress"), spy(run, "draw_clips")
    rf.train_causal(run)
    step = asked[0]
    assert step.clean is step.target and step.norm is rf.motion_square and step.through_context
    if ode:
        assert equal(step.clean, end(step.text).expand(4, 12, *cfg.latent))
    else:
        assert (step.clean, step.text) == drawn[0].result and step.clean.shape[:2] == (3, 18)
    sigma = step.sigma[..., None, None, None]
    noise = (step.noisy - (1 - sigma) * step.clean) / sigma
    assert abs(noise.std() - 1) < 0.03
    assert torch.isin(step.sigma, cfg.sigmas).all()
    chunks = step.sigma.unflatten(1, (-1, cfg.chunk))
    assert (chunks == chunks[..., :1]).all() and (chunks != chunks[:, :1]).any()


@parametrize("change", ["", "--tilt", "--tilt --shuffle", "--shuffle", "--ema-start 1"])
def test_student_step_asks_each_model_about_the_right_samples(spy, change):
    run = make_run(f"--distill-steps 1 --critic-ratio 2 --student-lr 0.5 --critic-lr 0.5 {change}")
    cfg, stages = run.cfg, dict(run.state)
    run.reward = lambda frames: frames[:, 0, 0, 0, 0] / 255
    names = "draw_samples flow_matching_loss update guided_x0 regress".split()
    samples, critics, updates, teachers, steps = (spy(rf, name) for name in names)
    rf.train_student(run)
    [real], [step], critic = teachers, steps, critics[0].model
    assert same(real.teacher.state_dict(), stages["teacher"]["parts"][0])
    assert [call.model for call in updates] == [critic, critic, step.student]
    for call in updates:                                             # Muon, then AdamW
        assert call.optimizers[0].defaults["momentum"] == 0.5
    for loss, drawn in zip(critics, samples):
        assert loss.x0 is drawn.result[0] and drawn.student is step.student
        assert loss.text is drawn.result[1]
    first = vars(critics[0]) | {"model": real.teacher}               # the critic begins as it
    loss = first.pop("result")
    assert equal(flow_matching_loss(**first), loss)
    assert [drawn.count for drawn in samples] == [0, 1, 0]
    begun = run.model("causal")
    for _ in run.each_turn("critic", 0, 0):                          # the student begins as this
        assert equal(draw_samples(run, begun, 0)[0], samples[0].result[0])

    x, text, noisy, exit_sigma, _ = samples[2].result
    assert step.noisy is noisy and step.sigma is exit_sigma and step.clean is x
    assert step.text is real.text is text and real.teacher.cfg is cfg
    assert step.norm is rf.motion_square and not real.negative.any()
    sigma = per_sample(real.sigma[:, 0])
    assert abs(((real.xt - (1 - sigma) * x) / sigma).std() - 1) < 0.05
    assert len(cat([real.sigma, critics[0].sigma]).unique()) > 6
    fake = predict_x0(critic, real.xt, real.sigma, critic.embed_text(text))
    assert error(step.target, x - rf.dmd_gradient(x, real.result, fake)) < 1e-4

    weighted, even, beta = step, critics[1], cfg.beta
    if cfg.tilt:
        weighted, even, beta = even, step, -beta
        x = samples[1].result[0]
    reward = run.reward(run.world.decode(x))
    if cfg.shuffle:
        reward = reward.roll(1)
    weight = exp(reward / beta)
    assert even.weight == 1
    assert error(weighted.weight / weighted.weight.mean(), weight / weight.mean()) < 1e-5

    student, before = step.student.state_dict(), stages["causal"]["parts"][0]
    keep = 0 if cfg.ema_start else cfg.weight_ema
    for name, streamed in run.state["student"]["parts"][0].items():
        want = before[name].lerp(student[name], 1 - keep)
        assert error(streamed, want) < 1e-5 < error(streamed, before[name])


def test_samples_stop_at_every_step_and_follow_from_their_noisy_frames():
    run = make_run("")
    student = run.model("causal")
    for count in range(4):
        x, text, noisy, sigma, _ = draw_samples(run, student, count)
        assert regress(student, text, run.cfg, noisy, sigma, x, x, mean_square) < 1e-8
        assert (sigma == run.cfg.sigmas[count]).all()


# -------------------------------------------------------------------------- The toy's world
@fixture
def drawn(jobs):
    return np.load(ended(jobs, "drawn") / "w.npz")


def test_world_is_what_its_script_draws(drawn):
    ours = np.load(WORLD)
    assert np.array_equal(ours["captions"], drawn["captions"])
    for name in set(ours) - {"captions"}:                            # of the VAE only to rounding
        assert np.allclose(ours[name], drawn[name], rtol=0, atol=1e-4)


def test_tracker_finds_true_speeds_and_shapes_and_the_vae_leaves_them():
    world, truth = rf.ToyWorld(TOY), np.load(WORLD)["speed"]
    clips = world.clips[:36]                                         # of each caption three
    *_, centre = rf.track(clips)
    speed = centre.diff(dim=1).norm(dim=2).mean(1)
    assert np.allclose(speed, truth[:36], rtol=0.1, atol=0.02)
    decoded = world.decode(world.encode(clips))
    assert (decoded.float() - clips).square().mean() < 9 ** 2        # 29 dB
    for frames in clips, decoded:
        assert measure(3, frames, world.captions[:36])["shape"] > 0.98


def discs(x, radius=5.0):
    """A clip (1, F, 3, 32, 32) of a bright disc at x (F,), of radius (F,); 0: none."""
    x, radius = x[:, None, None], (radius + 0 * x)[:, None, None]
    grid = arange(32) + 0.5
    distance = torch.hypot(grid - x, grid[:, None] - 16)
    pixels = 30 + 200 * (radius + 0.5 - distance).clamp(0, 1)
    return pixels.byte()[None, :, None].repeat(1, 1, 3, 1, 1)


TIME = arange(12.0)


@parametrize("speed", [0.0, 1.0, 1.5])
def test_reward_of_an_even_glide_is_its_speed(speed):
    assert abs(motion_reward(discs(8 + speed * TIME)) - speed) < 0.03


@parametrize("frames", [
    discs(8 + 3 * (TIME // 3)),                                      # jumps at every third frame
    discs(16 + TIME % 2),                                            # trembles
    discs(8 + TIME, 5 * (TIME % 2)),                                 # vanishes in every other frame
    discs(8 + TIME, 3 + 2 * (TIME % 2)),                             # changes its size
], ids="jumps trembles flickers pulses".split())
def test_reward_of_broken_motion_is_below_that_of_a_clean_glide_at_half_the_speed(frames):
    assert 0 <= motion_reward(frames) < motion_reward(discs(8 + 0.5 * TIME))


def test_measures_tell_frozen_gliding_jumping_and_empty_clips_apart():
    def measured(*disc, last=0):
        return measure(3, discs(*disc), ["a red circle"], last)
    frozen, glide = measured(8 + 0 * TIME), measured(8 + TIME)
    assert frozen["copy"] == frozen["shape"] == 1 and frozen["drift"] == 0
    assert glide["agree"] == glide["seam"] == 1 and glide["jitter"] == 0 and glide["copy"] < 1
    end, leaps = measured(8 + TIME, last=3), 8 + 3 * (TIME // 3)
    assert end["copy"] < glide["copy"]                               # like itself, not the start
    assert measured(leaps[:11], last=4)["seam"] == 3                    # frame 8 ends a chunk
    jump, empty = measured(leaps), measured(TIME, 0)
    assert jump["seam"] == 3 and jump["inside"] == jump["agree"] == empty["shape"] == 0
    grows = measured(8 + TIME, 4 + 0.3 * TIME)                       # by half in the sixth frame
    assert glide["holds"] == 12 > 7 > grows["holds"] > 3 and empty["lost"] == 1 > grows["lost"] == 0
    blinks = measured(8 + TIME, 5 * (TIME != 6))                     # a lost object has not jumped
    assert blinks["jitter"] == 0 < blinks["lost"] and blinks["agree"] == 0.7


# --------------------------------------------------------- Optimizers, checkpoint and ablation
def test_every_parameter_is_stepped_once_per_update_by_clipped_gradients(spy):
    model = VideoTransformer(SMALL)
    optimizers, p = rf.make_optimizers(model, 0.1), model.head.head.bias
    stepped = [spy(optimizer, "step") for optimizer in optimizers]
    for other in model.parameters():
        other.grad = torch.zeros_like(other)
    p.grad = grad = torch.full_like(p, 0.5)
    assert rf.update(model, optimizers, progress=0.5) == 4.0         # the norm before clipping
    assert [len(calls) for calls in stepped] == [1, 1] and p.grad is None
    moved = [p for optimizer in optimizers for p in optimizer.state]
    assert sorted(map(id, moved)) == sorted(map(id, model.parameters()))
    assert abs(grad.norm() - 1) < 1e-4


def test_muon_is_that_of_torch_to_the_rounding_of_bfloat16():
    start = randn(24, 8)
    ours, theirs = (start.clone().requires_grad_() for _ in "ab")
    optimizers = [muon([p], 0.1, 0.01, 0.5)
                  for muon, p in ((rf.Muon, ours), (torch.optim.Muon, theirs))]
    for _ in "abc":
        ours.grad = theirs.grad = randn_like(start)
        for optimizer in optimizers:
            optimizer.step()
    assert error(ours, theirs) < 0.0048                              # of 0.24 that they moved


def test_optimizer_of_the_paper_is_adamw_at_a_constant_rate():
    model = VideoTransformer(replace(SMALL, adamw=FULL.adamw))
    [adamw] = rf.make_optimizers(model, FULL.student_lr)
    rf.update(model, [adamw], progress=0.5)
    [group] = adamw.param_groups
    assert (group["lr"], *group["betas"], group["weight_decay"]) == (2e-6, 0, 0.999, 0.01)
    assert type(adamw) is torch.optim.AdamW and FULL.critic_lr == 4e-7


def test_nan_stops_the_run_names_the_step_and_is_not_saved(monkeypatch, capsys):
    norms = iter([1.0, 1.0, nan])                                    # the third step would save
    monkeypatch.setattr(rf, "update", lambda *_: next(norms))
    assert main(f"--toy {TINY}") == 2
    assert "teacher step 2 is not finite" in capsys.readouterr().err
    assert torch.load("out/checkpoint.pt")["teacher"]["step"] == 1


def test_stage_of_another_world_is_refused_though_its_name_is_the_same():
    run = make_run("--dim 96 --ffn-dim 256 --heads 6 --layers 12 --teacher-steps 5000")
    run.state = rf.load_shipped(run.cfg)
    run.stage("teacher", 5000)                                       # is taken
    run.world.mean += 1
    refused(run.stage, "teacher", 5000, mend="with {'world': -0.51[^,]*}.*--from-scratch")


ABLATION = f"{TINY} --clip 6 --frames 6 --teacher-steps 1 --causal-steps 1 --distill-steps 1"


def compare():
    """An ablation of two seeds, and again when there is nothing left to train. Prints the config
    with which train_student is called, too."""
    train = rf.train_student

    def told(run):
        print(run.cfg)
        train(run)
    rf.train_student, rf.SEEDS = told, (100, 101)
    sys.stdout = open("printed", "w")
    for _ in "ab":
        assert main(f"--toy --ablate {ABLATION}") == 0


@fixture
def compared(jobs):
    return ended(jobs, "compared")


def test_ablation_trains_every_arm_once_with_its_own_change(compared):
    base = replace(TOY, **given(ABLATION))
    changes = ("", "--beta inf", "--shuffle", "--tilt", "--tilt --shuffle", "--plain-norm",
               "--alpha 1", "--sink 0", "--distill-steps 1 --student-lr 1e-12")
    arms = [replace(base, seed=seed, **given(change)) for seed in (100, 101) for change in changes]
    printed = (compared / "printed").read_text()
    configs = [line for line in printed.splitlines() if "Config(" in line]
    assert configs == [*map(str, [base, *arms, base])]               # base: --toy's own student
    done = (compared / "out/ablation.json").read_text()
    copies = [numbers["copy"] for numbers in json.loads(done).values()]
    gap = np.subtract(copies[7::9], copies[::9])                     # of no sink, of Re-DMD
    # of two, the error is the deviation
    assert f"copy {gap.mean():.3f} +- {gap.std():.3f}" in printed.split("no sink - Re-DMD")[-1]


# ----------------------------------------------------------------- Full size, with tiny parts
SIZES = ("--full --dim 24 --ffn-dim 32 --heads 2 --layers 2 --text-dim 16 --text-len 12 "
         "--height 32 --width 48 --frames 21")
TINY_WAN = replace(FULL, **given(SIZES, "--bench"))


def needs(*packages):
    """Skips a test where a package is missing, but never in CI."""
    for package in packages:
        if not os.environ.get("CI"):
            importorskip(package)


def save_tokenizer(folder, words, special=()):
    """It knows whole words, numbered as they come, and no others."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    tokenizer = Tokenizer(models.WordLevel(dict(zip(words, range(99)))))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    tokenizer.add_tokens(special, special_tokens=True)
    tokenizer.save_pretrained(folder)


@fixture(scope="module")
def wan(tmp_path_factory):
    """A Diffusers folder in Wan2.1's layout with tiny random parts."""
    needs("diffusers", "transformers")
    from diffusers import AutoencoderKLWan
    from transformers import UMT5Config, UMT5EncoderModel
    folder = tmp_path_factory.mktemp("wan")
    torch.manual_seed(0)
    vae = AutoencoderKLWan(base_dim=8, dim_mult=[1, 2, 2, 2], num_res_blocks=1)
    vae.save_pretrained(folder / "vae")
    config = UMT5Config(vocab_size=8, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    UMT5EncoderModel(config).save_pretrained(folder / "text_encoder")
    save_tokenizer(folder / "tokenizer", ["a", "red", "panda"])
    return folder


def save_layout(path, state):
    """The tensors of state as a file or folder in the layout that the path names."""
    named = {"model." + name: p for name, p in state.items()}
    wrapped = {name.replace(".", "._fsdp_wrapped_module.", 2): p for name, p in named.items()}
    old = {name: p + 1 for name, p in named.items()}
    contents = {"released.pt": named, "trainer.pt": {"generator": named},
                "ema.pt": {"generator": old, "generator_ema": wrapped}}
    if path.name in contents:
        torch.save(contents[path.name], path)
        return
    needs("safetensors")
    from safetensors.torch import save_file
    if path.suffix:
        save_file(state, path)
    else:
        path.mkdir(exist_ok=True)
        for i in 0, 1:
            save_file(dict([*state.items()][i::2]), path / f"{i}.safetensors")


@parametrize("layout", "released.pt trainer.pt ema.pt shards one.safetensors".split())
def test_golden_weights_load_from_every_layout_and_misfits_are_named(golden, layout):
    state, path, name = golden[2].state_dict(), Path(layout), "head.head.bias"
    with torch.device("meta"):
        model = VideoTransformer(golden[1])
    save_layout(path, state)
    rf.load_weights(model, path)
    assert same(model.state_dict(), state)
    misfits = [({"surplus": state.pop(name)}, "surplus"), ({name: zeros(7)}, r"\[7\]"), ({}, name)]
    for extra, word in misfits:
        save_layout(path, state | extra)
        refused(rf.load_weights, model, path, mend=word)


def test_text_of_each_prompt_is_the_encoders(wan, monkeypatch):
    from transformers import UMT5EncoderModel
    encoder = UMT5EncoderModel.from_pretrained(wan / "text_encoder")
    long, short = (encoder(tensor([ids])).last_hidden_state for ids in ([0, 1, 2], [0]))
    encoder.encoder.embed_tokens = torch.nn.Embedding(8, 16)         # untied
    monkeypatch.setattr(UMT5EncoderModel, "from_pretrained", lambda *_, **__: encoder)
    world = WanWorld(wan)
    text = world.text(["a red panda", "a"])
    assert error(text[:1], long) < 1e-5 and error(text[1:, :1], short) < 1e-5
    assert not text[1, 1:].any()
    encoder.shared.weight.data.zero_()
    refused(world.text, ["red"], mend="word embedding")


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
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=8):
        yield made


def test_decoding_by_chunks_equals_decoding_the_whole_also_compiled_to_one_graph(wan, graphs,
                                                                                 monkeypatch):
    vae, latents = WanWorld(wan), randn(1, 9, 16, 4, 6)
    monkeypatch.setattr(rf, "to_bytes", lambda pixels: pixels.clamp(-1, 1))

    def scaled(latents):
        return (latents * vae.std + vae.mean).transpose(1, 2)
    whole = vae.vae.decode(scaled(latents)).sample.transpose(1, 2)
    for _ in "plain", "compiled":
        past = {}
        chunks = [vae.decode(chunk, past) for chunk in latents.split(3, 1)]
        assert error(cat(chunks, 1), whole) < 1e-4
        vae.compile()
    assert len(graphs) == 1                                          # two where layouts differ
    frames = randint(255, (1, 33, 3, 32, 48))
    z = vae.vae.encode((frames / 127.5 - 1).transpose(1, 2)).latent_dist.mode()
    assert error(scaled(vae.encode(frames)), z) < 1e-5


def test_fp8_stream_errs_by_2_percent_and_no_more_as_it_goes_on(capsys):
    cfg = replace(FULL, **given("--dim 192 --ffn-dim 1120 --heads 6 --layers 6 --text-dim 64 "
                                "--text-len 32 --height 32 --width 64"))
    state, text, noise = random_model(cfg, float32).state_dict(), random_text(cfg), noises(cfg)
    videos = {}
    for name, dtype in ("float32", float32), ("bfloat16", bfloat16), ("fp8", bfloat16):
        model = VideoTransformer(cfg).to(dtype).requires_grad_(False)
        model.load_state_dict(state)
        if name == "fp8":
            rf.use_float8(model)
        chunks = rollout(model, text, cfg, 5, drawing(noise))
        videos[name] = stack([x0 for x0, _ in chunks])
    for other in "bfloat16", "float32":
        off = (videos["fp8"] - videos[other]).flatten(1).norm(dim=1)
        off /= videos[other].flatten(1).norm(dim=1)
        with capsys.disabled():
            print(f"\nfp8 against {other}, chunk by chunk: {off.tolist()}")
        assert 0.005 < off.min() and off.max() < 0.02


def test_attention_is_by_the_fastest_kernel(monkeypatch, capsys):
    seconds = iter([2.0, 1.0])
    timer = SimpleNamespace(blocked_autorange=lambda: SimpleNamespace(median=next(seconds)))
    monkeypatch.setattr(rf, "Timer", lambda *_, **__: timer)
    rf.fastest_attention(SMALL)
    assert "{'flash': 2.0, 'cudnn': 1.0}" in capsys.readouterr().out
    assert not torch.backends.cuda.flash_sdp_enabled()


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
            for one in latent.split(1, 1):
                self.queue += [one[:, :, :3] * self.model.gain * n for n in (1, 2, 3, 4)]
        self.queue, self.skip = self.queue[self.skip:], 0
        return self.queue.pop(0) if self.queue else None
"""


@fixture
def taehv():
    """Such a clone in this folder."""
    Path("taehv.py").write_text(TAEHV)
    torch.save(tensor(0.1), "taew2_1.pth")


def test_tiny_vae_decodes_by_the_code_in_its_folder(taehv):
    latents, decode = rand(1, 6, 16, 4, 6), rf.tiny_decoder(".")
    for past in {}, {}:                                              # two streams, each anew
        frames = cat([decode(chunk, past) for chunk in latents.split(3, 1)], 1)
        assert frames.shape[1] == 21
        assert error(frames[:, -1] / 255, 0.4 * latents[:, -1, :3]) < 1 / 255


def test_full_size_streams_and_benches(wan, taehv, graphs, capsys):
    torch.save(random_model(TINY_WAN, float32).state_dict(), "w.pt")
    for more in "--stream", "--stream --vae .":
        assert main(f"{SIZES} {more} --wan {wan} --weights w.pt --prompt panda") == 0
        assert Image.open("out/stream.webp").n_frames == 21
    assert main(f"{SIZES} --bench --wan {wan} --vae .") == 0
    ladder = capsys.readouterr().out
    assert ladder.count(" times eager's; ") == 6
    assert ": 0.00 f" not in ladder and "; 0.00 not" not in ladder


# ------------------------------------------------------------------- Streams that last and live
def test_stream_of_any_length_holds_nothing():
    """Of tiled frames of 48 kB."""
    peaks = []
    with open("stream.webp", "wb", 0) as file:
        for chunk in range(100):
            frames = randint(255, (12, 3, 3, 64, 64)).byte()
            rf.write_webp(file, rf.tile(frames, 1))
            peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    assert peaks[-1] - peaks[20] < 3000                              # kB; the frames are 35,000
    assert Image.open("stream.webp").n_frames == 300


def test_play_hands_every_chunk_on_in_order_and_holds_at_most_two():
    model, text, made, seen, ahead = random_model(SMALL, float32), random_text(SMALL), [], [], []

    def finish(latents):
        time.sleep(0.1)                                              # slower than the model
        seen.append(latents)
        ahead.append(len(made) - len(seen))                          # the first is not asked for
    rf.play(model, None, text, 18, finish, steer=made.append)
    rf.set_seed(SMALL.seed, "stream")
    assert same(seen, [x0 for x0, _ in rollout(model, text, SMALL, chunks=6)]) and max(ahead) <= 1


# ------------------------------------------------------------------- The paper's reward
CHAT = ("<|im_start|> system You are a helpful assistant . <|im_end|> <|im_start|> user "
        "<|vision_start|> <|video_pad|> <|vision_end|> {} <|im_end|> <|im_start|> assistant")
REWARDS = ["<|VQ_reward|>", "<|MQ_reward|>", "<|TA_reward|>"]
TEMPLATE = "rate a <|VQ_reward|> a <|MQ_reward|> {text_prompt} <|TA_reward|>"
WORDS = ["rate", "panda", *dict.fromkeys(CHAT.replace("{} ", "").split())]
PEFT = "base_model.model."


def videoalign():
    return rf.videoalign(Path())


def save_videoalign(rows=1):
    """(model, state): VideoAlign's files of a tiny random model, and the weights in them. Linears
    are saved as W - alpha / r B A: the model is what is right once LoRA is merged."""
    needs("transformers")
    from transformers import Qwen2VLConfig, Qwen2VLModel
    base = "Qwen2-VL-2B-Instruct"
    save_tokenizer(base, WORDS, [word for word in WORDS if "|" in word])
    sizes = dict(hidden_size=32, initializer_range=0.2)
    text = dict(num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                intermediate_size=48, vocab_size=99,
                rope_parameters={"rope_type": "default", "mrope_section": [1, 1, 2]})
    vision = dict(depth=1, embed_dim=32, num_heads=2)
    config = Qwen2VLConfig(text_config=sizes | text, vision_config=sizes | vision,
                           video_token_id=WORDS.index("<|video_pad|>"))
    Qwen2VLModel(config).save_pretrained(base)           # other weights, and more rows than words
    config.text_config.vocab_size = len(WORDS + REWARDS)
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
    Path("checkpoint-7").mkdir()
    torch.save(state, "checkpoint-7/model.pth")
    Path("template.txt").write_text(TEMPLATE)
    Path("model_config.json").write_text(json.dumps({
        "data_config": {"fps": 2.0, "max_frame_pixels": 200704},
        "peft_lora_config": {"lora_r": 3, "lora_alpha": 4},
        "inference_config": {"MQ_mean": 0.3, "MQ_std": 7}}))
    return model, state


@torch.no_grad()
def plain_score(model, head, frames, caption):
    """The same score by hand, from the whole chat with its caption. The language model alone
    counts its positions in 1-D."""
    pixels = frames[[0, 9, 18, 27, 36, 44, 53, 62, 71, 80]] / 255    # 2 per second and even
    mean, std = tensor([[0.48145466, 0.4578275, 0.40821073],
                        [0.26862954, 0.26130258, 0.27577711]])[..., None, None]
    patches = (pixels - mean) / std                      # pairs of 8 x 16 squares of 2 x 2 patches
    patches = patches.view(5, 2, 3, 8, 2, 14, 16, 2, 14).permute(0, 3, 6, 4, 7, 2, 1, 5, 8)
    grid = tensor([[5, 16, 32]])
    seen = model.visual(patches.reshape(-1, 1176), grid_thw=grid).pooler_output
    chat = CHAT.format(TEMPLATE).replace("{text_prompt}", caption).split()
    at, known = chat.index("<|video_pad|>"), WORDS + REWARDS
    words = model.language_model.embed_tokens(tensor([known.index(word) for word in chat]))
    inputs = cat([words[:at], seen, words[at + 1:]])[None]
    states = model.language_model(inputs_embeds=inputs).last_hidden_state[0]
    scores = states[chat.index("<|MQ_reward|>") + len(seen) - 1] @ head.T
    return (scores[len(head) // 2] - 0.3) / 7


@parametrize("rows", [1, 3])
def test_videoalign_equals_the_plain_computation_for_every_clip(rows):
    model, state = save_videoalign(rows)
    clips = randint(256, (2, 81, 3, 224, 448)).byte()
    clips[1, 40:] //= 2
    captions, head = ["a panda", "panda are a panda ."], state[PEFT + "rm_head.weight"]
    scores = videoalign()(clips)
    plain = [plain_score(model, head, *pair) for pair in zip(clips, captions)]
    assert error(scores, stack(plain)) < 1e-4 < 0.01 < error(*scores)


@parametrize("size, grid", [((480, 832), [24, 42]), ((120, 208), [18, 30])])
def test_videoalign_sees_squares_of_28_px_and_as_many_as_it_was_trained_on(size, grid, spy):
    save_videoalign()
    from transformers import Qwen2VLImageProcessor
    cut = spy(Qwen2VLImageProcessor, "__call__")
    videoalign()(zeros(1, 4, 3, *size).byte())
    assert cut[0].result.image_grid_thw[0, 1:].tolist() == grid


def test_videoalign_names_what_is_missing_or_does_not_fit():
    _, state = save_videoalign()
    weights, template = Path("checkpoint-7/model.pth"), Path("template.txt")
    for token in REWARDS[:2]:                                        # what comes after is not read
        template.write_text(TEMPLATE.replace(token, ""))
        refused(videoalign, mend="template.txt must have")
    template.write_text(TEMPLATE)
    state["surplus"] = state.pop(PEFT + "model.norm.weight")
    torch.save(state, weights)
    refused(videoalign, mend="Missing.*model.norm.weight.*Unexpected.*surplus")
    weights.unlink()
    refused(videoalign, mend="got 0.*needs.*one checkpoint-")
    for path in template, Path("model_config.json"):
        path.unlink()
        refused(videoalign, mend=f"No such file.*{path}")


# ----------------------------------------------------- Training at full size, with tiny parts
STEPS = ("--full --dim 24 --ffn-dim 32 --heads 2 --layers 2 --text-dim 16 --text-len 12 "
         "--height 32 --width 48 --clip 9 --window 6 --batch 4 --critic-ratio 1 --distill-steps 3 "
         "--ema-start 1 --student-lr 1e-3 --critic-lr 1e-3 --negative worst --weights w.pt "
         "--critic w.pt --teacher w.pt --wan . --prompts prompts --reward videoalign:.")
TINY_TRAINED = replace(FULL, **given(STEPS, "--train"))


def train(out):
    assert main(f"--train {STEPS} --out {out}") == 0


def replace_large_parts(patch):
    """Text encoder, VAE and reward."""
    def reward(frames):
        return frames.flatten(1).mean(1)

    def learn(world, prompts):
        assert "" not in prompts                                     # an empty line is none
        world.features = {prompt: (i + arange(16.0)).cos().expand(2 + i % 3, 16)
                          for i, prompt in enumerate(prompts)}
    patch(rf.WanWorld, "__init__", lambda world, _: setattr(world, "mean", ones(1)))
    patch(rf.WanWorld, "decode", lambda world, latents, past: latents)
    patch(rf.WanWorld, "learn", learn)
    patch(rf, "videoalign", lambda folder: folder.is_dir() and reward)


def save_start(folder):
    """What a run with STEPS begins from."""
    torch.manual_seed(0)
    torch.save(random_model(TINY_TRAINED, float32).state_dict(), folder / "w.pt")
    (folder / "prompts").write_text("a\nred panda\n\nswims\n")


def share():
    """One of two processes: three steps, then the last again from what a kill before it leaves."""
    end = rf.Run.end_step

    def copied(run, step, **numbers):
        end(run, step, **numbers)
        if step == 1 and run.rank == 0:
            for copy in "killed", "one":
                shutil.copytree("whole", copy)
    replace_large_parts(setattr)
    torch.distributed.destroy_process_group = lambda: None           # torchrun makes one only
    rf.Run.end_step = copied
    train("whole")
    train("killed")


@fixture
def sharded(jobs, monkeypatch):
    """This process in the folder of those two, as torchrun would start it alone."""
    monkeypatch.chdir(ended(jobs, "sharded"))
    for pair in "RANK=0 WORLD_SIZE=1 MASTER_ADDR=localhost MASTER_PORT=0".split():
        monkeypatch.setenv(*pair.split("="))
    replace_large_parts(partial(monkeypatch.setattr, raising=False))
    return monkeypatch


def difference(*outs):
    """The largest between the models, optimizers and logs of two runs."""
    parts = []
    for out in outs:
        state = torch.load(f"{out}/checkpoint.pt")
        for row in state["log"]:
            del row["tokens_per_second"], row["utilisation"]
        parts.append(tree_leaves(state))
    return max(np.abs(np.subtract(a, b)).max() for a, b in zip(*parts, strict=True)
               if isinstance(a, (torch.Tensor, float)))


def test_three_sharded_steps_on_two_processes_equal_one_process_with_plain_models(sharded):
    sharded.setattr("torch.distributed.fsdp.fully_shard", lambda *_, **__: None)
    train("plain")
    assert 0 < difference("whole", "plain") < 1e-5


def test_sharded_run_resumes_bitwise_and_on_one_process_to_rounding(sharded):
    assert difference("whole", "killed") == 0
    train("one")
    assert 0 < difference("whole", "one") < 1e-5


def test_sharded_checkpoint_holds_whole_models_under_the_public_names(sharded):
    path = Path("whole/checkpoint.pt")
    state, start = torch.load(path), torch.load("w.pt")
    model = VideoTransformer(TINY_TRAINED)
    rf.load_weights(model, path)
    models = [state[name] for name in "generator_ema generator critic".split()]
    assert same(model.state_dict(), models[0])
    assert same(state["student"]["parts"][:3], models)
    for name, before in start.items():
        assert all(1e-5 < error(made[name], before) < 0.02 for made in models)


def test_dry_run_counts_memory_of_the_real_shapes(capsys):
    assert main("--full --dry-run") == 0
    _, *lines = capsys.readouterr().out.splitlines()
    for line, count in zip(lines, (1, 8, 64), strict=True):
        assert f"{count} GPUs" in line
        assert f"student and critic {32 * 1_418_996_800 / count / 1e9:.1f};" in line


# ----------------------------------------------------------------------------- Command line
@fixture
def streamed(trained, spy):
    """streamed(flags): the frames of a stream."""
    tiled = spy(rf, "tile")

    def stream(flags):
        tiled.clear()
        assert main(f"--stream --prompt red --out {trained} {flags}") == 0
        return cat([call.videos[0] for call in tiled]).float()
    return stream


def test_toy_writes_every_file_and_its_losses_fall(trained):
    assert {path.suffix for path in trained.iterdir()} == set(".png .gif .jsonl .pt .json".split())
    assert Image.open(trained / "stream.gif").size == (384, 288)   # 4 x 3 captions, x 3
    log = [json.loads(line) for line in (trained / "log.jsonl").read_text().splitlines()]
    for stage, part in ("teacher", 0.9), ("causal", 1.0):            # the second starts low
        losses = [line["loss"] for line in log if line["stage"] == stage]
        assert np.mean(losses[-3:]) < part * np.mean(losses[:2])
    assert log[-1]["sink_updates"] == 3 and log[-1]["weight_min"] < log[-1]["weight_max"]


def resume():
    """A run, and one that is killed in every stage, and taken up again."""
    assert main(f"--toy {TINY}") == 0
    kills, end = [("student", 16), ("causal", 14), ("teacher", 22)], rf.Run.end_step

    def killed(run, step, **numbers):                                # every other step is saved,
        if kills and kills[-1] == (run.bar.desc, step):                  # so an ended one is lost
            kills.pop()
            raise KeyboardInterrupt
        end(run, step, **numbers)
    rf.Run.end_step = killed
    line = f"--toy {TINY} --out resumed"
    assert {main(line) for _ in "abc"} == {130}
    assert main("--stream --prompt red --out resumed") == 0          # as it was saved last
    assert main(line) == 0


def test_resume_after_a_kill_in_every_stage_is_bitwise_equal(toys, trained):
    resumed = toys / "resumed"
    for name in "metrics.json", "log.jsonl":
        assert (resumed / name).read_text() == (trained / name).read_text()
    assert same(*(torch.load(out / "checkpoint.pt") for out in (resumed, trained)))


def test_stream_of_other_length_sink_and_window_changes_no_file_but_its_own(trained, streamed):
    before = (trained / "checkpoint.pt").read_bytes()
    flags = "--seed 1", "--alpha 0", "--sink 0 --window 6"
    videos = stack([streamed("--frames 36 " + more) for more in flags])
    assert len(videos.unique(dim=0)) == 3 and (trained / "checkpoint.pt").read_bytes() == before
    assert len(videos[0]) == Image.open(trained / "stream.webp").n_frames == 36


def test_stream_is_told_another_prompt_at_the_frame_that_is_given(streamed, spy):
    plain, told = streamed("--frames 24"), streamed("--frames 24 --then 12 blue")
    assert equal(plain[:12], told[:12]) and not equal(plain[12:15], told[12:15])
    rolled = spy(rf, "rollout")      # one layer's keys know no text: no picture could tell
    streamed("--frames 6 --reread")
    assert rolled[0].reread


def test_stream_goes_on_from_a_picture_or_a_clip(streamed):
    clip = np.load(WORLD)["clips"][0, :6]
    first, *others = [Image.fromarray(frame) for frame in clip.transpose(0, 2, 3, 1)]
    first.save("still.png")
    first.save("clip.webp", save_all=True, append_images=others, lossless=True)
    for name, given in (("still.png", clip[[0, 0, 0]]), ("clip.webp", clip)):
        made = streamed(f"--frames 12 --start {name}")
        off = made[:len(given)] - tensor(given)
        assert off.square().mean() < 14 ** 2                         # 25 dB
    refused(rf.open_clip, Path("clip.webp"), FULL, mend="frames in clip.webp=6")


def test_live_stream_in_a_terminal_is_seen_steered_and_stopped(trained):
    line, file = f"--stream --prompt red --out {trained}", trained / "stream.webp"
    child, terminal = pty.fork()
    if not child:
        signal.signal(signal.SIGINT, signal.SIG_DFL)     # a shell's background ignores Ctrl-C
        flags = f"--live --frames 900 {line}".split()
        os.execv(sys.executable, ["python", HERE / "reward_forcing.py", *flags])
    screen, script = "", [("red: ", b"pink\n"), ("'pink' cannot be", b"blue square\n"),
                          ("blue square: ", b"\3")]
    with raises(OSError):                                            # the child is gone
        while True:
            screen += os.read(terminal, 65536).decode(errors="replace")
            if script and screen.count(script[0][0]) > 6:            # a chunk has three frames
                os.write(terminal, script.pop(0)[1])
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 130
    assert screen.count("\u2580") > 1500 and Image.open(file).n_frames > 5
    shown = file.read_bytes()
    line += " --frames 60"                                           # red to the end
    assert main(line) == 0 and shown[-99:] not in file.read_bytes()


@parametrize("line", [
    " | --toy --stream",
    "--toy --stream --prompt red | not allowed with",
    "--bench | none of the commands (a word is a flag): toy, stream, full stream",
    "--stream --prompt red --then ten blue | --then ten",
    "--stream --prompt red --then 10 blue | 9 or 12",
    "--stream --prompt red --then 240 blue | before the end, 240",
    "--stream --prompt red --out new | let --toy go on",
    "--stream --prompt red --start README.md | README.md",
    "--stream --prompt red --start {}/stream.gif --frames 6 | raise --frames",
    "--stream --prompt red --live | --live",
    "--toy --from-scratch --teachr-steps 3 | --teachr-steps",
    "--toy --from-scratch --alpha 1.5 | at most 1",
    "--toy --from-scratch --clip 10 | clip=10 does not fit, it goes in steps of 3: try 9 or 12",
    "--toy --from-scratch --height 24 | latents are not (1, 18, 16, 6, 8)",
    "--toy --from-scratch --time-stride 2 --frames 239 | not (1, 36, 16, 8, 8)",
    "--stream --full --prompt red --width 840 --weights x --wan . | try 832 or 848",
    "--toy --from-scratch --window 5 | --window 9",
    "--toy --from-scratch --chunk 0 | chunk=0",
    "--toy --from-scratch --beta nan | beta=nan",
    "--toy --from-scratch --dim 130 | dim=130 does not fit, it goes in steps of 16: try 128 or 144",
    "--toy --from-scratch --heads 32 | RoPE",
    "--toy --from-scratch --sample-steps 10 | try 8 or 12",
    "--toy --from-scratch --frames 10 | 9 or 12",
    "--toy --from-scratch --frames -3 | frames=-3",
    "--toy --from-scratch --layers 2 | 'layers': 1",
    "--toy --layers 2 --out new | add --from-scratch",
    "--bench --full --compile | leave out --compile: full bench",
    "--stream --prompt red --weights x | leave out --weights: stream",
    "--toy --from-scratch --causal-clip 51 --out new | not (1, 51, 16, 8, 8)",
    "--toy --from-scratch --chunk 1 --out new | --chunk 2",
    "--toy --from-scratch --clip 3 --out new | more than a chunk",
    "--dry-run --full --tilt | --tilt",
    "--dry-run --full --batch 0 | batch=0",
    "--toy --from-scratch --full | --full toy is none",
    "--toy --from-scratch --data nowhere.npz | nowhere.npz",
    "--toy --from-scratch --out /dev/null/x | /dev/null/x",
    "--train --full --weights x --critic x --teacher x --wan . --prompts x --reward x | torchrun",
    "--stream --prompt red --full --weights x --wan . --critic x | leave out --critic: full stream",
    "--stream --prompt red --full --weights x --wan nowhere | --wan",
    "--stream | add or leave out --prompt",
    "--stream --prompt pink | yellow",
    "--stream --prompt red --dim 64 | --alpha, --sink",
    "--stream --prompt red --out damaged | damaged/checkpoint.pt",
    "--stream --prompt red --full | add or leave out --wan, --weights",
    "--stream --prompt red --full --frames 34 --weights x --wan . | 33 or 45",
])
def test_bad_input_is_refused_in_one_line(trained, line, capsys):
    whole = (trained / "checkpoint.pt").read_bytes()
    Path("damaged").mkdir()
    Path("damaged/checkpoint.pt").write_bytes(whole[:len(whole) // 2])
    Path("README.md").write_text("no arrays")
    words, mend = line.split(" | ")
    assert main(f"--out {trained} {words}".format(trained)) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and mend in error
    assert (trained / "checkpoint.pt").read_bytes() == whole


def test_compiled_stream_has_two_graphs_for_each_length_of_context_and_equals_eager(streamed,
                                                                                    graphs):
    flags = "--frames 42 --window 36"
    assert error(streamed(flags), streamed(flags + " --compile")) <= 1
    assert len(graphs) == 12 + 11                # blocks of 0, 3, ..., 33 frames; layouts of 3, ...


if __name__ == "__main__":
    globals()[sys.argv[1]]()
