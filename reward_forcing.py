#!/usr/bin/env python3
# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.13", "numpy", "tqdm>=4.66", "pillow"]
# ///
"""Reward Forcing: a video model that generates forever, in one file (after arXiv 2512.04678).

A *teacher* is a diffusion model that sees a whole clip at once and needs many denoising steps.
The *student* is the same transformer made causal: it makes a few frames (a *chunk*) in 4 steps
and attends, through a cache of keys and values, to the frames it made before. Two ideas:

    EMA-Sink   frames that leave the attention window are folded into the oldest frames, the
               *sink*, by an exponential moving average             -> class EMASinkCache
    Re-DMD     distribution matching distillation in which each sample is weighted by how well
               it moves: weight = exp(reward / beta)                -> train_student

    python reward_forcing.py --toy                            # the toy; stages 1, 2 are shipped
    python reward_forcing.py --stream --prompt "a red circle" # then stream what you like
    python reward_forcing.py --toy --ablate                   # both ideas, with controls
    python reward_forcing.py --full --bench                   # the speed of the 1.3B model
    torchrun --nproc-per-node 8 reward_forcing.py --full --train ...     # its training

What each flag means is said in class Config, the numbers of the method, and class Options.
Read from top to bottom. "Config" to "Training stages" is the method; where it departs from the
paper, it says so, and the README has a table of it. What follows is the toy's world, the plumbing
(how a batch is drawn is in class Run), and what the full size needs around the same classes.

    B batch      F frames      L frames per chunk     S sink frames
    W frames in the attention window: the sink, recent frames and the current chunk
    N tokens per frame         H heads     D head dim     C latent channels     h, w latent size

The time convention: sigma in [0, 1] is the noise level and 1 is pure noise.
    xt = (1 - sigma) x0 + sigma noise         the model predicts the velocity  v = noise - x0
    x0 = xt - sigma v                         (functions add_noise and predict_x0)

Papers: Reward Forcing 2512.04678, Self Forcing 2506.08009, DMD 2311.18828, DMD2 (more critic
updates than student updates) 2405.14867, VideoAlign 2501.13918, Wan2.1 2503.20314, Muon (K. Jordan,
2024).
"""
import argparse
import contextlib
import functools
import itertools
import json
import math
import os
import select
import shutil
import sys
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, ImageSequence
from torch import nn
from torch.nn import attention, functional
from torch.utils._pytree import tree_map_only
from torch.utils.benchmark import Timer
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm


# --------------------------------------------------------------------------------------- Config
@dataclass(frozen=True)
class Config:
    """The numbers of the method. Every field is a flag: text_dim is --text-dim; ode, which is
    true or false, is --ode and --no-ode. A field that must be a multiple of another stands after
    it: the other one is checked first."""
    # the transformer
    heads: int = 6                  # H
    dim: int = 96                   # width
    ffn_dim: int = 256              # width inside the feed-forward layers
    layers: int = 12                # transformer blocks
    freq_dim: int = 64              # sinusoids that encode the noise level; even
    rope_base: float = 10.0         # RoPE wavelengths: from 2 pi up, below 2 pi rope_base positions
    text_dim: int = 32              # features per text token; in the toy: most words it can know
    text_len: int = 4               # text tokens, padding included
    channels: int = 16              # C
    stride: int = 4                 # pixels per latent pixel, in height and in width
    height: int = 32                # video size in pixels
    width: int = 32
    time_stride: int = 1            # video frames per latent frame (the very first counts one)
    # the stream
    frames: int = 240               # video frames of a stream; at full size 477
    chunk: int = 3                  # L
    sink: int = 3                   # S, 0 for none; 3 = L: the first chunk, which was made at once
    window: int = 9                 # W
    alpha: float = 0.999            # what the sink keeps at an update, as in the public code (in
                                    # the paper .99); 1 is a static sink
    denoise_steps: int = 4          # per chunk
    sigma_shift: float = 3.0        # bends the noise schedule towards noise
    # training
    clip: int = 12                  # frames that are judged at once; above W: the sink is updated
    causal_clip: int = 18           # of the causal stage, not of --ode: its sink is updated more
    batch: int = 12                 # clips per update; fewer where they are longer than `clip`
    teacher_steps: int = 5000
    teacher_lr: float = 0.08        # of Muon, for blocks' matrices; AdamW, for the rest: a tenth
    drop_caption: float = 0.1       # how often training on data hides it: guidance needs that
    sample_steps: int = 16          # Euler steps of the teacher; a multiple of denoise_steps
    guidance: float = 0.5           # x0 = cond + guidance (cond - uncond); usual scale - 1
    causal_steps: int = 2400
    causal_lr: float = 0.02
    ode: bool = False               # in that stage regress the teacher's trajectories, as the paper
    distill_steps: int = 32         # student updates of Re-DMD
    critic_ratio: int = 2           # critic updates per student update
    student_lr: float = 0.003
    critic_lr: float = 0.01
    momentum: float = 0.5           # of their optimizers, below 1; the paper's have none
    beta: float = 0.5               # weight = exp(reward / beta); inf is plain DMD
    plain_norm: bool = False        # in Re-DMD the paper's mean square, instead of motion_square
    tilt: bool = False              # weight the critic's loss instead of the student's
    shuffle: bool = False           # weight by the reward of another sample: the control of both
    weight_ema: float = 0.9         # moving average of the student's weights, which streams
    ema_start: int = 0              # student updates before it averages; until then it is a copy
    adamw: bool = False             # the paper's AdamW(0, .999) at a constant rate, clipped at 10
    seed: int = 0
    data: str = "world.npz"         # the toy's world: a file in tiny_data, or by its full path

    @property
    def grid(self):                                                  # of tokens: rows, columns
        token = 2 * self.stride                                      # is so many pixels wide
        return self.height // token, self.width // token

    @property
    def tokens(self):                                                # N
        return math.prod(self.grid)

    @property
    def latent(self):                                                # (C, h, w)
        rows, cols = self.grid
        return self.channels, 2 * rows, 2 * cols

    @property
    def head_dim(self):                                              # D
        return self.dim // self.heads

    @property
    def sigmas(self):
        """Noise levels of the denoising steps, from 1 down; at shift 5: 1, .9375, .8333, .625."""
        return self.schedule(self.denoise_steps)[:-1]

    def schedule(self, steps):
        """steps + 1 noise levels from 1 to 0."""
        return shift_sigma(torch.linspace(1, 0, steps + 1), self.sigma_shift)

    def chunks_in(self, frames, name="frames"):
        """Chunks that make this many video frames; BadInput names the nearest counts that fit."""
        return units_in(name, frames, self.chunk * self.time_stride, self.time_stride - 1)

    def __post_init__(self):
        """BadInput, with the mend, for a config that cannot work: so nothing is loaded, let alone
        trained, before the numbers are known to fit each other."""
        # what must be in [0, 1], and what else may be 0, which means none
        shares = "alpha drop_caption momentum weight_ema".split()
        others = "sink guidance ema_start seed ode plain_norm tilt shuffle adamw".split()
        units = {
            "dim": 2 * self.heads,                                   # RoPE turns pairs in a head
            "height": 2 * self.stride,                               # a token: 2 x 2 latent pixels
            "width": 2 * self.stride,
            "clip": self.chunk,
            "causal_clip": self.chunk,
            "sample_steps": self.denoise_steps}
        for name, value in vars(self).items():
            check(name == "data" or value > 0 or not value and name in shares + others,
                  f"{name}={value} must be above 0; 0 only where that means none")
            check(name not in shares or value <= 1, f"{name}={value} must be at most 1")
            if name in units:                                        # its unit was checked before
                units_in(name, value, units[name])
        self.chunks_in(self.frames)
        check(self.head_dim >= 6, f"dim={self.dim} must be 6 heads={self.heads} or more, for RoPE")
        check(self.window >= self.sink + self.chunk, f"window={self.window} cannot hold sink="
              f"{self.sink} and chunk={self.chunk}: try --window {self.sink + 2 * self.chunk}")


# --------------------------------------------------------------------------------- Noise levels
def shift_sigma(u, shift):
    """u in [0, 1] to a noise level in [0, 1]; a larger shift stays longer near pure noise."""
    return shift * u / (1 + (shift - 1) * u)


def add_noise(x0, noise, sigma):
    """xt, the mixture of x0 and noise (B, F, C, h, w) at sigma: one for all (), one a sample (B, 1)
    or one a frame (B, F)."""
    sigma = sigma[..., None, None, None]
    return (1 - sigma) * x0 + sigma * noise


def predict_x0(model, xt, sigma, text_kv, cache=None):
    """x0 = xt - sigma v by the model's v for xt (B, F, C, h, w) at sigma; exact if the model is."""
    velocity = model(xt, sigma, text_kv, cache)
    return xt - sigma[..., None, None, None] * velocity


# --------------------------------------------------------------------------------------- Layers
def waves_of(position, count, base):
    """Cosines and sines of position (...) at frequencies base^-(i / count), i = 0 ... count - 1:
    two of (..., count), float64."""
    exponent = torch.arange(count).double() / count
    angles = position[..., None] * base ** -exponent
    return angles.cos(), angles.sin()


@functools.cache
def rope_table(cfg, first, frames):
    """Cosines and sines (T, 1, D/2) for the tokens of frame positions first, first + 1, ...

    The D/2 channel pairs are split into three bands: frame, row and column.
    """
    band = cfg.head_dim // 6
    bands = cfg.head_dim // 2 - 2 * band, band, band                 # 64 -> 22, 21, 21
    frame = first + torch.arange(frames)
    grid = torch.cartesian_prod(frame, *map(torch.arange, cfg.grid))
    waves = [waves_of(*pair, cfg.rope_base) for pair in zip(grid.T, bands)]
    return [torch.cat(wave, 1)[:, None].float() for wave in zip(*waves)]


def rotate(x, rope):
    """RoPE: turn each (even, odd) pair of channels of x (..., T, dim) by its token's angle, in all
    heads alike."""
    cos, sin = rope
    # not x.unflatten, here and in Attention: under a default device that cannot be compiled
    even, odd = torch.unflatten(x, -1, (-1, cos.shape[-1], 2)).unbind(-1)    # (..., T, H, D/2)
    turned = torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1)
    return turned.flatten(-3).type_as(x)


def mlp(inputs, hidden, outputs, activation):
    return nn.Sequential(nn.Linear(inputs, hidden), activation, nn.Linear(hidden, outputs))


class Attention(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.heads, dim = cfg.heads, cfg.dim
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in "qkvo")
        self.norm_q, self.norm_k = (nn.RMSNorm(dim, 1e-6) for _ in "qk")         # over all heads
        # equal biases: under RoPE, at first, attend to near tokens
        self.k.bias.data.copy_(nn.init.normal_(self.q.bias))

    def key_value(self, x):
        """What others see of x (B, T, dim)."""
        return self.norm_k(self.k(x)), self.v(x)

    def forward(self, x, kv, rope=None):
        """What x (B, F, N, dim) sees in keys and values (B, T, dim); rope turns its queries."""
        q = self.norm_q(self.q(x)).flatten(1, 2)
        if rope:
            q = rotate(q, rope)
        q, k, v = [torch.unflatten(t, 2, (self.heads, -1)).transpose(1, 2) for t in (q, *kv)]
        out = functional.scaled_dot_product_attention(q, k, v)               # (B, H, F*N, D)
        return self.o(out.transpose(1, 2).flatten(2)).view_as(x)


def modulate(x, shift, scale):
    return functional.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


class Block(nn.Module):
    """Self-attention to context and chunk, cross-attention to the text, feed-forward."""
    def __init__(self, cfg):
        super().__init__()
        dim = cfg.dim
        self.self_attn = Attention(cfg)
        self.cross_attn = Attention(cfg)
        self.norm3 = nn.LayerNorm(dim, 1e-6)
        self.ffn = mlp(dim, cfg.ffn_dim, dim, nn.GELU("tanh"))
        self.modulation = nn.Parameter(torch.randn(1, 6, dim) / dim ** 0.5)
        self.modulation.data[:, [2, 5]] += 0.3                       # gates: branches start open

    def embed_text(self, text):
        return self.cross_attn.key_value(text)

    def forward(self, x, sigma_emb, text_kv, rope, context):
        """x (B, F, N, dim); sigma_emb (B, 1 or F, 1, 6, dim); text_kv and context: keys and values
        (B, T, dim), those of the context, which may be None, already rotated. Returns the new x
        and this chunk's own keys and values, not rotated."""
        shift1, scale1, gate1, shift2, scale2, gate2 = (self.modulation + sigma_emb).unbind(3)
        h = modulate(x, shift1, scale1)
        k, v = self.self_attn.key_value(h.flatten(1, 2))                     # (B, F*N, dim)
        seen = rotate(k, rope), v
        if context:
            seen = [torch.cat(parts, 1) for parts in zip(context, seen)]
        # no causal mask is needed: the frames to come do not exist yet
        x = x + gate1 * self.self_attn(h, seen, rope)
        x = x + self.cross_attn(self.norm3(x), text_kv)
        x = x + gate2 * self.ffn(modulate(x, shift2, scale2))
        return x, (k, v)


# ---------------------------------------------------------------------------------- Transformer
class VideoTransformer(nn.Module):
    """Wan2.1's text-to-video transformer (2503.20314), parameter names included. It is teacher,
    critic and student: without a cache all frames see each other, with one a chunk sees its past.

        text_kv = model.embed_text(text)                      # once per prompt
        velocity = model(xt, sigma, text_kv, cache)
    """
    def __init__(self, cfg):
        super().__init__()
        self.cfg, dim = cfg, cfg.dim
        patch = 1, 2, 2                                              # frames, rows, columns
        self.patch_embedding = nn.Conv3d(cfg.channels, dim, patch, patch)
        self.text_embedding = mlp(cfg.text_dim, dim, dim, nn.GELU("tanh"))
        self.time_embedding = mlp(cfg.freq_dim, dim, dim, nn.SiLU())
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.layers))
        self.head = nn.Module()              # the last layer: a name for its two parts, as Wan2.1's
        self.head.head = nn.Linear(dim, 4 * cfg.channels)
        self.head.modulation = nn.Parameter(torch.randn(1, 2, dim) / dim ** 0.5)
        nn.init.zeros_(self.head.head.weight)                        # first velocity: near zero

    def embed_text(self, text):
        """text (B, T, text_dim) -> for every layer the keys and values of its cross-attention.

        Short text is padded with zeros *before* the text layers, so padding becomes a constant
        token that is attended to, as in Wan2.1. Longer text is cut by the same call.
        """
        text = functional.pad(text, (0, 0, 0, self.cfg.text_len - text.shape[1]))
        text = self.text_embedding(text.to(self.patch_embedding.weight))
        return [block.embed_text(text) for block in self.blocks]

    def embed_sigma(self, sigma):
        """[cos | sin] of 1000 sigma at freq_dim/2 frequencies, worked out in float64."""
        waves = waves_of(1000 * sigma.double(), self.cfg.freq_dim // 2, 10000.0)
        return torch.cat(waves, -1).to(self.patch_embedding.weight)

    def forward(self, x, sigma, text_kv, cache=None):
        """Velocity (B, F, C, h, w), in the model's precision, at x of that shape; sigma (),
        (B, 1) or (B, F).

        With a cache, the chunk x sees the cache's context and itself, and its own keys and values
        become cache.newest. Without one, the context is empty: the frames of x see each other."""
        past = cache or EMASinkCache(self.cfg)
        sigma = sigma + torch.zeros(len(x), 1)                       # (B, 1 or F)
        emb = self.time_embedding(self.embed_sigma(sigma))
        emb6 = self.time_projection(emb).unflatten(2, (1, 6, -1))    # (B, 1 or F, 1, 6, dim)
        rope = rope_table(self.cfg, len(past.frames), x.shape[1])
        h = self.patch_embedding(x.transpose(1, 2).type_as(emb))     # (B, dim, F, rows, cols)
        h = h.flatten(3).movedim(1, 3).contiguous()                          # (B, F, N, dim)
        for layer, block in enumerate(self.blocks):
            h, kv = block(h, emb6, text_kv[layer], rope, past.context[layer])
            if cache:                                                # a whole clip's would be GBs
                cache.newest[layer] = kv
        shift, scale = (self.head.modulation + emb[:, :, None, None]).unbind(3)
        patches = self.head.head(modulate(h, shift, scale))                  # (B, F, N, 2*2*C)
        patches = patches.unflatten(3, (2, 2, -1)).unflatten(2, self.cfg.grid)
        return patches.permute(0, 1, 6, 2, 4, 3, 5).reshape(x.shape)


# ------------------------------------------------------------------------------- EMA-Sink cache
class EMASinkCache:
    """What a stream remembers: keys and values of S sink frames and of the newest W - S - L.

    With S = L = 3 and W = 9, chunk by chunk (RoPE positions are those of the drawing's columns):

        position    0  1  2    3  4  5    6  7  8
        chunk 0    [f0 f1 f2]                           it is making frames 0-2
        chunk 1     f0 f1 f2  [f3 f4 f5]
        chunk 2     f0 f1 f2   f3 f4 f5  [f6 f7 f8]
        chunk 3     s0 s1 s2   f6 f7 f8  [f9 ...  ]     f3-f5 left: folded into the sink
        chunk 4     s0 s1 s2   f9 ...    [f12 ... ]     f6-f8 left: folded into the sink

    It moves on between two chunks: the clean pass of chunk 2 is appended, f3-f5 leave and are
    folded, and all five passes of chunk 3 see the result.

    A frame that leaves is folded into one sink slot, token by token, in every layer:

        sink <- alpha sink + (1 - alpha) leaving        for keys and for values   (EMA-Sink)

    The sink starts as the first S frames; frame f goes to slot f mod S: each slot is fed by
    every S-th frame. With S = L, frame i of a chunk goes to slot i. alpha = 1 is a static sink.
    All is kept in float32: in bf16 an update of the sink with alpha = .999 mostly rounds away.
    Keys are averaged after their norm and before RoPE; they are rotated when the window is laid
    out, so positions never grow and a stream never ends. Gradient flows through the cache in
    train_causal alone.
    """
    def __init__(self, cfg):
        self.cfg = cfg
        # the first S are the sink, then come the newest, up to W - S - L: keys and values of each
        self.frames = []                    # (2, layers, B, N, dim)
        self.updates = 0                    # frames folded into the sink so far
        self.newest = [None] * cfg.layers   # keys and values of the newest pass: (B, L*N, dim)
        self.context = [None] * cfg.layers  # what the next chunk sees of them: (B, T, dim)

    def append(self):
        """Keep the newest pass, which must be that of a clean chunk, and lay out the window."""
        cfg, frames = self.cfg, self.frames
        clean = torch.stack([torch.stack(kv) for kv in self.newest], 1)      # as frames; L*N tokens
        # contiguous, as lerp's results are: other strides would compile lay_out anew
        frames += [frame.float().contiguous() for frame in clean.chunk(cfg.chunk, 3)]
        while len(frames) > cfg.window - cfg.chunk:
            leaving = frames.pop(cfg.sink)
            if cfg.sink:                                             # without a sink it is lost
                slot = self.updates % cfg.sink                       # = its frame number mod S
                frames[slot] = frames[slot].lerp(leaving, 1 - cfg.alpha)
                self.updates += 1
        if frames:
            rope = rope_table(cfg, 0, len(frames))
            self.context = list(zip(*self.lay_out(frames, rope, clean)))

    @staticmethod
    def lay_out(frames, rope, like):
        """Frames side by side, keys turned to their positions; --compile makes it one kernel."""
        keys, values = torch.cat(frames, 3).type_as(like)
        return rotate(keys, rope), values                                    # (layers, B, T, dim)


# -------------------------------------------------------------------------------------- Rollout
@torch.no_grad()
def rollout(student, text, cfg, chunks, draw=torch.randn, steps=None, cache=None, start=(),
            steer=None, reread=False):
    """Yield (x0, xt) for so many chunks: the clean latents (B, L, C, h, w) and the noisy ones that
    they were predicted from. Distillation, evaluation and streaming all run this loop (2506.08009).

    draw      draw(B, L, C, h, w) gives noise of that shape, for every step of every chunk anew
    steps     denoising steps of every chunk, the first so many of cfg's; None: all
    cache     what was made before; None: nothing. The last of so many chunks is not added to it
    start     clean chunks (B, L, C, h, w) in place of the first ones; the stream goes on from them
    steer     steer(index) is asked before every chunk but the first for new text, embedded by the
              student, that holds from this chunk on; None: no change
    reread    at such a change the newest chunk is remembered under the new text, not under its own
    """
    cache = cache or EMASinkCache(cfg)
    text_kv = student.embed_text(text)
    for index in range(chunks):
        if index < len(start):
            x0 = xt = start[index]
        else:
            x0 = 0.0                                                 # sigma begins at 1: all noise
            for sigma in cfg.sigmas[:steps]:
                xt = add_noise(x0, draw(len(text), cfg.chunk, *cfg.latent), sigma)
                x0 = predict_x0(student, xt, sigma, text_kv, cache)
        yield x0, xt
        if index + 1 < chunks:
            own_kv = text_kv
            if steer:
                text_kv = steer(index + 1) or text_kv
            remember(student, x0, text_kv if reread else own_kv, cache)


def remember(student, x0, text_kv, cache):
    """One more pass, on the clean chunk at sigma 0: later chunks shall see keys and values of the
    frames as they are, not of the noisy ones that the last step saw."""
    student(x0, torch.zeros(1), text_kv, cache)
    cache.append()


# --------------------------------------------------------------------------------------- Losses
def mean_square(error):
    """Of all but the batch: (B, ...) -> (B,)."""
    return error.square().flatten(1).mean(1)


def motion_square(error):
    """A square of error (B, F, C, h, w) that counts first where things are and how they move: (B,).

    With e the error and a its averages over all 2 x 2 windows of latent pixels, which overlap:
        mean e^2 + mean (2 a)^2 + 4 mean (e[t+1] - e[t])^2 + 4 mean (2 a[t+1] - 2 a[t])^2
    where t are the frames given. 2 a is as loud as e where errors of neighbours have no relation.
    Like any fixed positive quadratic form it has the minimiser of the plain square, the conditional
    mean. In Re-DMD it turns the gradient g into M g, M a positive matrix: 0 where g is 0. The
    critic is trained by the plain square, as in the paper."""
    parts = error, 2 * functional.avg_pool3d(error, (1, 2, 2), 1)            # e, 2 a
    return sum(mean_square(x) + 4 * mean_square(x.diff(dim=1)) for x in parts)


def flow_matching_loss(model, x0, text, sigma, noise, weight=1.0, norm=mean_square):
    """mean of weight times norm, by default the mean square, of v - (noise - x0); x0 (B, F, C, h,
    w), sigma (B, 1 or F), weight (B,).
    It trains the teacher on data and the critic on the student's samples."""
    velocity = model(add_noise(x0, noise, sigma), sigma, model.embed_text(text))
    return (weight * norm(velocity - (noise - x0))).mean()


def guided_x0(teacher, xt, sigma, text, negative):
    """Classifier-free guidance: x0 = cond + guidance (cond - uncond). uncond is told negative
    prompts (B, T, text_dim); the toy's are empty, all zeros."""
    cond = predict_x0(teacher, xt, sigma, teacher.embed_text(text))
    uncond = predict_x0(teacher, xt, sigma, teacher.embed_text(negative))
    return cond + teacher.cfg.guidance * (cond - uncond)


def dmd_gradient(x, x0_real, x0_fake):
    """g, the direction in which a sample x is too much the student's own. All (B, F, C, h, w).

    DMD minimises KL(student || teacher) over noised samples xt. Its gradient in xt is the
    difference of the scores:  grad log p_student(xt) - grad log p_teacher(xt).
    A score is an x0 prediction in disguise:  grad log p(xt) = ((1 - sigma) x0 - xt) / sigma^2.
    So the difference of the scores is that of the x0 predictions, up to a factor, which DMD
    replaces by 1 / mean|x - x0_real| over each sample (2311.18828, eq. 7 and 8).
    """
    normaliser = (x - x0_real).abs().mean((1, 2, 3, 4), keepdim=True).clamp_min(1e-8)
    return (x0_fake - x0_real) / normaliser


def regression_loss(x0, target, weight, norm):
    """1/2 mean of weight (x0 - target)^2, weight (B,). With target = stopgrad(x0 - g) this is the
    loss of Re-DMD: its slope in x0 is weight g / numel, or in another norm weight M g / numel."""
    return (weight * norm(x0 - target)).mean() / 2


class RewardWeight(nn.Module):
    """weight = exp(reward / beta), one per sample (B,): the paper's; beta = inf is plain DMD.

    Divided by its running mean, which is not in the paper: the size of a step shall not depend on
    the general size of the rewards. Not by the mean of its own small batch, in which a great weight
    would mostly cancel itself: in the running mean a batch counts a twentieth, but for the first.
    There is one mean for all exit steps. Batches that stop late are sharper and move more, so they
    weigh more, as far as the clipping of gradients lets them.
    """
    def __init__(self, beta):
        super().__init__()
        self.beta = beta
        self.register_buffer("mean", torch.tensor(0.0).double())     # 0: not known yet

    def forward(self, reward):
        weight = torch.exp(reward.double() / self.beta)              # float64: exp(-120) is not 0
        self.mean.lerp_(weight.mean(), 0.05 if self.mean else 1)
        return (weight / self.mean).float()


# ------------------------------------------------------------------------------ Training stages
# run (class Run) has the config, the world's clips and captions, and the models that earlier stages
# made; its draw_... functions are where clips and noise come from. run.stage counts the steps
# that a stage has left, after a kill from what was saved last; run.end_step logs and saves.
# At full size a batch is computed sample by sample, on many GPUs: run.each_turn goes through the
# turns of this process, each with its samples, run.own, and run.judge has the rewards of all
# processes. In the toy there is one turn, with all samples. The noise levels of a clip:
#     teacher          any level; in half of the clips one for each frame
#     causal student   one of the four that it streams with, for each chunk
#     critic, judging  any level but the ends, one for the whole clip
def train_teacher(run):
    """Stage 1: flow matching on clips, sometimes without caption. All frames see each other."""
    cfg = run.cfg
    set_seed(cfg.seed)
    teacher = VideoTransformer(cfg)
    optimizers = make_optimizers(teacher, cfg.teacher_lr)
    for step in run.stage("teacher", cfg.teacher_steps, teacher, *optimizers):
        set_seed(cfg.seed, "teacher", step)
        x0, text = run.draw_clips(cfg.clip)                                  # (B, F, C, h, w)
        # In every other clip each frame has its own level: a cleaner neighbour teaches where a
        # noisy object is (2407.01392). In the others all have the same one, as in sampling.
        u = torch.rand(cfg.batch, cfg.clip)
        u[::2] = u[::2, :1]
        sigma = shift_sigma(u, cfg.sigma_shift)
        loss = flow_matching_loss(teacher, x0, text, sigma, torch.randn_like(x0),
                                  norm=motion_square)
        loss.backward()
        grad_norm = update(teacher, optimizers, step / cfg.teacher_steps)
        run.end_step(step, loss=loss.item(), grad_norm=grad_norm)


@torch.no_grad()
def teacher_trajectory(teacher, noise, text, cfg):
    """The guided teacher's path from noise (B, F, C, h, w) to clean frames, at the student's sigmas
    and at 0: (denoise_steps + 1, B, F, C, h, w).

    An Euler step of dx/dsigma = v = (x - x0) / sigma from sigma to after:
        x <- x + (after - sigma) v = x0 + (after / sigma) (x - x0)
    """
    path = [noise]
    for sigma, after in itertools.pairwise(cfg.schedule(cfg.sample_steps)):
        x = path[-1]
        x0 = guided_x0(teacher, x, sigma, text, 0 * text)
        path.append(x0 + after / sigma * (x - x0))
    return torch.stack(path[::cfg.sample_steps // cfg.denoise_steps])


def regress(student, text, cfg, noisy, sigma, clean, target, norm, weight=1.0,
            through_context=False):
    """Add to the student's gradients those of regression_loss: the x0 prediction of every noisy
    chunk against its target, the context being the clean chunks before it. Returns the loss.

    Chunk by chunk, through the cache as in streaming. By default the context carries no gradient,
    so each chunk has its backward pass at once, and only one chunk's activations are alive.
    through_context: it carries gradient, to the passes that made it, and a whole clip is alive.
    noisy, clean, target (B, F, C, h, w), sigma (B, F), weight (B,).
    """
    cache, frames = EMASinkCache(cfg), clean.shape[1]
    total = 0.0                                      # of the chunks so far
    for now in torch.arange(frames).split(cfg.chunk):                # the frames of a chunk
        text_kv = student.embed_text(text)           # anew: each backward frees its graph
        x0 = predict_x0(student, noisy[:, now], sigma[:, now], text_kv, cache)
        total += regression_loss(x0, target[:, now], weight, norm) * cfg.chunk / frames
        last = now[-1] + 1 == frames
        if last or not through_context:
            total.backward()
            total.detach_()                                          # its graph is used up
        if not last:                                                 # the last is nobody's context
            with torch.set_grad_enabled(through_context):
                remember(student, clean[:, now], text_kv, cache)
    return total


def train_causal(run):
    """Stage 2: the teacher becomes the causal student. Chunk by chunk, clean frames in its cache,
    it learns to predict x0 from any of the student's four noise levels; every chunk has its own.

    The paper regresses the ends of the teacher's trajectories, from points on them. --ode does so
    too, but with this norm and with gradient through the context; it takes only the text of clips.
    But where a trajectory leads depends on the noise of *later* frames, which a causal student
    cannot see: it learns the mean of many videos, in which things slow down (2602.02214). So here
    it sees noised data instead, where what comes next follows from what was.

    The gradient also goes through the clean passes, so that it learns what of a frame to remember.
    In Re-DMD, as in the paper, it does not.

    The loss is on x0, which is what the student is used for; flow matching's, on v, would count the
    errors at small sigma more.
    """
    cfg = run.cfg
    student = run.model("teacher")
    teacher = run.model("teacher") if cfg.ode else None
    optimizers = make_optimizers(student, cfg.causal_lr)
    for step in run.stage("causal", cfg.causal_steps, student, *optimizers):
        set_seed(cfg.seed, "start", step)    # not "causal": shipped.pt was trained by this word
        clean, text = run.draw_clips(cfg.clip if cfg.ode else cfg.causal_clip, mirror=True)
        level = torch.randint(cfg.denoise_steps, (len(clean), clean.shape[1] // cfg.chunk))
        level = level.repeat_interleave(cfg.chunk, 1)                        # (B, F)
        sigma, noise = cfg.sigmas[level], torch.randn_like(clean)
        if cfg.ode:
            path = teacher_trajectory(teacher, noise, text, cfg)
            noisy = path.take_along_dim(level[None, ..., None, None, None], 0)[0]
            clean = path[-1]
        else:
            noisy = add_noise(clean, noise, sigma)
        loss = regress(student, text, cfg, noisy, sigma, clean, target=clean, norm=motion_square,
                       through_context=True)
        grad_norm = update(student, optimizers, step / cfg.causal_steps)
        run.end_step(step, loss=loss, grad_norm=grad_norm)


def draw_samples(run, student, count):
    """The student's clips x (n, F, C, h, w), all stopped at one denoising step; their text; the
    noisy frames they were predicted from; that step's sigma (n, F); how many frames were folded.

    In the paper the step is random. Here they take turns by count, how many updates there were
    before, the critic's and the student's each by their own: each step is trained as often."""
    cfg, prompts = run.cfg, run.world.prompts
    picked = torch.randint(len(prompts), (cfg.batch,))[run.own]
    text = run.world.text([prompts[i] for i in picked])
    cache = EMASinkCache(cfg)
    steps = count % cfg.denoise_steps + 1
    chunks = rollout(student, text, cfg, cfg.clip // cfg.chunk, run.draw_noise, steps, cache)
    x, noisy = (torch.cat(part, 1) for part in zip(*chunks))
    sigma = cfg.sigmas[steps - 1].expand(x.shape[:2])
    return x, text, noisy, sigma, cache.updates


def train_student(run):
    """Stage 3: Re-DMD on the student's own rollouts.

        critic_ratio times:  x <- rollout;  critic <- flow matching on x, not weighted
        x, noisy  <- rollout, all chunks stopped at one of the steps  (sweep 1: no gradient)
        xt        <- x, noised to a random sigma
        x0_real   <- teacher(xt) with guidance
        x0_fake   <- critic(xt)
        g         <- (x0_fake - x0_real) / mean|x - x0_real|
        weight    <- exp(reward(x) / beta) / its running mean, one per sample
        student   <- regression of that last step, from noisy, to x - g, weighted     (sweep 2)
                     (in the paper and at full size by mean_square, in the toy by motion_square)
        average   <- weight_ema average + (1 - weight_ema) student             (it streams)

    Teacher and critic see the whole clip at once. They judge; only the student must be causal.

    Where does it end? g is 0 where the critic, which knows what the student makes, predicts what
    the guided teacher predicts. There no weight moves anything. So if a student can be the guided
    teacher, Re-DMD has the fixed point of DMD, and the weights only decide which samples are mended
    first. They matter for a student that is too small for that, or that is stopped early: it ends
    nearer to what was weighted most.
    """
    cfg = run.cfg
    # the average, of the student's weights, is what streams
    teacher, critic, student, average = map(run.model, ("teacher", "critic", "causal", "causal"))
    # In the toy, little momentum: at first the critic lags behind, and with .95 its misleading
    # gradients are followed long after. The student's objects then overshoot their size more.
    student_optimizers = make_optimizers(student, cfg.student_lr, cfg.momentum)
    critic_optimizers = make_optimizers(critic, cfg.critic_lr, cfg.momentum)
    # Beyond the paper, --tilt: the weights exp(-reward / beta) go into the critic's loss, and the
    # student's loss has none. Such a critic models student * exp(-reward / beta). DMD makes that
    # the guided teacher, so training ends at student = guided teacher * exp(reward / beta).
    weigh = RewardWeight(-cfg.beta if cfg.tilt else cfg.beta)
    shuffle = int(cfg.shuffle)               # by so many samples the rewards are shifted
    # the first three are saved also under the names that public code reads
    for step in run.stage("student", cfg.distill_steps, average, student, critic, weigh,
                          *student_optimizers, *critic_optimizers):
        progress = step / cfg.distill_steps
        for critic_step in range(cfg.critic_ratio):
            critic_loss = 0.0
            for share in run.each_turn("critic", step, critic_step):
                x, text, *_ = draw_samples(run, student, step * cfg.critic_ratio + critic_step)
                weight = weigh(run.judge(x).roll(shuffle)) if cfg.tilt else 1.0
                loss = flow_matching_loss(critic, x, text, *run.draw_level(x), weight) * share
                loss.backward()
                critic_loss += loss.item()
            update(critic, critic_optimizers, progress)

        samples = [draw_samples(run, student, step) for _ in run.each_turn("student", step)]
        reward = torch.cat([run.judge(x) for x, *_ in samples])              # (batch,)
        weight = weigh(reward.roll(shuffle))
        loss = gap = 0.0
        # each_turn is asked first: it sets run.own
        for share, (x, text, noisy, exit_sigma, updates) in zip(
                run.each_turn("judges", step), samples):
            sigma, noise = run.draw_level(x)
            xt = add_noise(x, noise, sigma)
            negative = run.world.text([run.negative] * len(text))
            with torch.no_grad():
                x0_real = guided_x0(teacher, xt, sigma, text, negative)
                x0_fake = predict_x0(critic, xt, sigma, critic.embed_text(text))
            target = x - dmd_gradient(x, x0_real, x0_fake)
            factor = 1.0 if cfg.tilt else weight[run.own]
            loss += regress(student, text, cfg, noisy, exit_sigma, x, target,
                            mean_square if cfg.plain_norm else motion_square, factor * share)
            gap += (x0_real - x0_fake).abs().mean() * share
        grad_norm = update(student, student_optimizers, progress)
        keep = cfg.weight_ema * (step >= cfg.ema_start)              # 0 at first: a copy
        for mean, new in zip(average.parameters(), student.parameters()):
            mean.data.lerp_(new.data, 1 - keep)
        run.end_step(step, loss=loss, critic_loss=critic_loss, grad_norm=grad_norm,
                     reward=reward.mean(), gap=gap,
                     weight_min=weight.min(), weight_max=weight.max(),
                     effective_samples=weight.sum() ** 2 / weight.square().sum(),
                     sink_updates=updates)


# =============================================================================================
# The method ends here. What follows is the world of the toy, the plumbing, and the full size.
# =============================================================================================


# ------------------------------------------------------------------------- The world of the toy
TINY_DATA = Path(__file__).parent / "tiny_data"


class ToyWorld:
    """What tiny_data/world.npz holds, made by make.py beside it: clips, their captions, and the
    toy's VAE, which is the principal components of stride x stride pixel patches.

    clips     (n, F, 3, height, width) uint8, of one coloured shape each
    captions  n strings; prompts: each once; words: what they are made of
    """
    def __init__(self, cfg):
        self.cfg = cfg
        with using(cfg.data, "give a world by make.py, in tiny_data or by its full path, that has "
                   "such latents and at most --text-dim words, or change the flags of its size"):
            file = np.load(TINY_DATA / cfg.data)
            self.captions = file["captions"].tolist()
            self.clips, self.mean, self.to_latent, self.to_patch = (
                torch.tensor(file[name]) for name in ("clips", "mean", "encode", "decode"))
            self.mean = self.mean[:, None, None]
            frames = max(cfg.clip, cfg.causal_clip)
            shape = 1, frames * cfg.time_stride, *cfg.latent
            check(self.encode(self.clips[:1, :frames]).shape == shape, f"latents are not {shape}")
            self.prompts = list(dict.fromkeys(self.captions))
            self.words = sorted(set(" ".join(self.captions).split()))
            self.text(self.prompts)          # refused now: a prompt too long, too many words

    def text(self, captions):
        """The toy's text encoder: captions to (B, text_len, text_dim).

        One-hot words, so that the model's first text layer learns one token per word; "" is all
        zeros, the null caption of guidance. BadInput for an unknown word and for too many.
        """
        features = torch.zeros(len(captions), self.cfg.text_len, self.cfg.text_dim)
        for row, caption in zip(features, captions):
            with using(repr(caption), f"take at most {len(row)} words of: {', '.join(self.words)}"):
                for position, word in enumerate(caption.split()):
                    row[position, self.words.index(word)] = 1
        return features

    def encode(self, frames):
        """(B, F, 3, height, width) uint8 -> latents (B, F, C, h, w) of variance about 1."""
        # p: the numbers of a patch
        patches = functional.pixel_unshuffle(frames / 127.5 - 1, self.cfg.stride) - self.mean
        return torch.einsum("bfphw,pc->bfchw", patches, self.to_latent)

    def decode(self, latents, past=None):
        """The inverse, as near as C components allow; past is for a VAE that has a memory."""
        patches = torch.einsum("bfchw,cp->bfphw", latents, self.to_patch) + self.mean
        return to_bytes(functional.pixel_shuffle(patches, self.cfg.stride))


def to_bytes(pixels):
    """[-1, 1], in any precision, to uint8."""
    return ((pixels.float() + 1) * 127.5).round().clamp(0, 255).byte()


def pixel_centres(mask):
    """y (height,) and x (width,) of the pixels in mask (B, F, height, width)."""
    return [torch.arange(size) + 0.5 for size in mask.shape[2:]]


def track(frames):
    """The one bright object in frames (B, F, 3, height, width) uint8: its mask (B, F, height,
    width) in [0, 1], its area (B, F) and its centre (B, F, 2), x and y in px. Where there is no
    object the area is 0 and the centre NaN."""
    pixels = frames / 255
    ground = pixels.flatten(3).median(3).values[..., None, None]
    distance = (pixels - ground).norm(dim=2)             # of colours, at most 3 ** 0.5
    peak = distance.amax((2, 3), keepdim=True)
    mask = distance / peak.clamp_min(1e-6) * (distance > 0.15 * peak) * (peak > 0.2)
    y, x = pixel_centres(mask)
    moment = torch.stack([mask.sum(2) @ x, mask.sum(3) @ y], 2)
    area = mask.sum((2, 3))
    return mask, area, moment / area[..., None]


def agreement(centre):
    """(B, F-2): motion in px per frame on which two neighbouring steps a, b of the centre agree,
    min(|a|, |b|) max(0, cos(a, b)). Trembling, and a jump after standing still, count nothing; nor
    does an object that stands still (0 / 0) or is lost (NaN)."""
    # |a| |b| cos / max(|a|, |b|) = min(|a|, |b|) cos
    steps = centre.diff(dim=1).unfold(1, 2, 1)                               # (B, F-2, x y, a b)
    product = steps.prod(3).sum(2).clamp_min(0)                              # |a| |b| max(0, cos)
    return (product / steps.norm(dim=2).amax(2)).nan_to_num()


def motion_reward(frames):
    """(B,), px per frame: the mean agreement, less where the object changes size on the way."""
    return steady_motion(*track(frames)[1:])


def steady_motion(area, centre):
    """motion_reward of what was tracked already: area (B, F), centre (B, F, 2)."""
    areas = area.unfold(1, 3, 1)                                             # (B, F-2, 3)
    steady = areas.amin(2) / areas.amax(2).clamp_min(1e-6)
    return (agreement(centre) * steady ** 2).mean(1)


def shape_overlaps(mask, area, centre):
    """(3, B, F): intersection over union of each mask with a circle, a square and a triangle of its
    own area and centre; NaN where there is no object."""
    y, x = pixel_centres(mask)
    dx = x - centre[..., :1, None]                                           # (B, F, 1, width)
    dy = y[:, None] - centre[..., 1:, None]                                  # (B, F, height, 1)
    reach = torch.stack([                        # the size of a shape that reaches a pixel
        torch.hypot(dx, dy),
        torch.maximum(dx.abs(), dy.abs()),
        torch.maximum(dy, 0.75 ** 0.5 * dx.abs() - dy / 2),
    ])                                                               # (3, B, F, height, width)
    areas = math.pi, 4, 27 ** 0.5                                    # at size 1
    size = torch.stack([area / unit for unit in areas]).sqrt()[..., None, None]
    drawn = (size - reach + 0.5).clamp(0, 1)
    return torch.minimum(drawn, mask).sum((3, 4)) / torch.maximum(drawn, mask).sum((3, 4))


def measure(chunk, video, captions, last=0):
    """Numbers about a video (B, F, 3, height, width) uint8 in chunks of L, or only about so many of
    its last frames (0: all): means over the B clips.

    shape   fraction of frames whose object is most like the captioned shape
    agree   px per frame of motion on which neighbouring steps agree (agreement)
    jitter  px by which neighbouring steps differ
    inside  px per frame within a chunk;      seam   px from one chunk to the next
    reward  motion_reward;                    lost   fraction of frames without an object
    area    deviation of the object's area over its mean, in the course of a clip
    holds   frames until the area is first off by half of what it began with: a stream forgets
    copy    largest correlation of a frame with one of the video's first chunk
    drift   standard deviation of quality over segments; quality = 100 x overlap with the shape
    """
    frames = video[:, -last:]
    mask, area, centre = track(frames)
    begun = area[:, :chunk].mean(1, keepdim=True)
    named = torch.tensor([[[shape in caption] for caption in captions]       # (3, B, 1)
                          for shape in "circle square triangle".split()])
    overlaps = shape_overlaps(mask, area, centre)                            # (3, B, F)
    quality = (overlaps * named).sum(0)                                      # the captioned one's
    move = centre.diff(dim=1)                                        # NaN where there is no object
    pace = move.norm(dim=2)
    at_seam = torch.arange(video.shape[1])[-last:][1:] % chunk == 0
    segment = max(chunk, frames.shape[1] // 30)
    # pixels of mean 0 and variance 1: the mean of their products is a correlation
    pixels = functional.layer_norm(video.float(), video.shape[2:]).flatten(2)
    numbers = {
        "shape": quality == overlaps.amax(0),                        # NaN equals nothing
        "agree": agreement(centre),
        "jitter": move.diff(dim=1).norm(dim=2),
        "inside": pace[:, ~at_seam],
        "seam": pace[:, at_seam],
        "reward": steady_motion(area, centre),
        "lost": area == 0,
        "area": area.std(1) / area.mean(1),                          # NaN: it is never there
        "holds": ((area / begun - 1).abs() < 0.5).cumprod(1).sum(1),
        "copy": (pixels[:, -last:] @ pixels[:, :chunk].mT).amax(2) / pixels.shape[2],
        "drift": 100 * functional.avg_pool1d(quality.nan_to_num(), segment).std(1, correction=0),
    }
    # what is NaN is left out
    return {name: round(number.float().nanmean().item(), 4) for name, number in numbers.items()}


# -------------------------------------------------------- Randomness, optimizers and checkpoint
def set_seed(*what):
    """All random numbers from here on depend on `what` alone: a resumed run draws the same."""
    torch.manual_seed(zlib.crc32(repr(what).encode()))


class Muon(torch.optim.Muon):
    """Momentum whose step moves a matrix alike in all directions (K. Jordan, 2024): its singular
    values are brought near 1 by five Newton-Schulz iterations, and taken times sqrt(rows / columns)
    if that is above 1. torch's iterates in bf16, this in float32: in bf16 a CPU without bf16 units
    is 20 times slower. And it uses the gradients up: none is left for the next optimizer."""
    @torch.no_grad()
    def step(self):
        [group] = self.param_groups
        lr = group["lr"]
        for p in group["params"]:
            mean = self.state[p].setdefault("mean", torch.zeros_like(p))
            mean.lerp_(p.grad, 1 - group["momentum"])
            x = p.grad.lerp(mean, group["momentum"])                 # Nesterov's
            x = x / x.norm().clamp_min(1e-30)
            for _ in range(5):
                a = x @ x.T
                x = 3.4445 * x + (2.0315 * a @ a - 4.775 * a) @ x
            p.mul_(1 - group["weight_decay"] * lr)
            p.sub_(x, alpha=lr * max(1, len(p) / p.shape[1]) ** 0.5)
            p.grad = None


def make_optimizers(model, lr, momentum=0.95):
    """Muon for the blocks' matrices; AdamW for the rest, its momentum at most .9. With --adamw, as
    in the paper, AdamW for all, without momentum."""
    if model.cfg.adamw:
        return [torch.optim.AdamW(model.parameters(), lr, betas=(0.0, 0.999))]
    matrices = [p for p in model.blocks.parameters() if p.dim() == 2]
    # Muon comes first and leaves its matrices without gradient; AdamW passes over such
    return [Muon(matrices, lr, 0.01, momentum),
            torch.optim.AdamW(model.parameters(), lr / 10,
                              betas=(min(0.9, momentum), 0.95), eps=1e-20)]


def update(model, optimizers, progress):
    """One step down the gradients, whose norm is clipped to 1, so that a loud batch counts no more
    than another; the paper's to 10. Clears them and returns the norm that they had. The learning
    rate rises in the first twentieth of a stage, then falls to 0; the paper's is constant; progress
    in [0, 1]."""
    norm = nn.utils.clip_grad_norm_(model.parameters(), 10.0 if model.cfg.adamw else 1.0)
    for optimizer in optimizers:
        rate = 1 if model.cfg.adamw else min(1, 0.05 + 20 * progress) * (1 - progress)
        optimizer.param_groups[0]["lr"] = optimizer.defaults["lr"] * rate
        optimizer.step()
    model.zero_grad()
    return norm.item()


def save(what, path):
    """Write a .json, or a .pt, under another name, then rename it: a killed run leaves the old file
    or the new one."""
    temporary = path.with_suffix(".tmp")
    if path.suffix == ".json":
        temporary.write_text(json.dumps(what, indent=1))
    else:
        torch.save(what, temporary)
    temporary.replace(path)


def load_checkpoint(path):
    """The state of a Run, of one that has not begun if there is no file. On many GPUs, where it is
    large, it is mapped and not copied."""
    if not path.exists():
        return {"log": []}                       # and by name the stages so far: see Run.stage
    with using(path, "delete it and train anew"):
        return torch.load(path, map_location="cpu", mmap=torch.distributed.is_initialized())


def load_shipped(cfg):
    """The stages of tiny_data/shipped.pt, as in a Run's state: teacher and, but for --ode, causal
    student; make.py beside it says how they were trained. A tensor is one of int8 and a scale."""
    stages = torch.load(TINY_DATA / "shipped.pt")
    for saved in stages.values():
        [pairs] = saved["parts"]
        for name, (whole, scale) in pairs.items():
            pairs[name] = whole * scale
    if cfg.ode:
        del stages["causal"]
    return stages


@dataclass
class Run:
    """A training run in the folder out: its world, its stages so far, its checkpoint and log.

    A batch may be computed in several turns, to save memory, and by several processes; in the toy
    one process does it in one turn. All draw the same random numbers, for the whole batch, and keep
    those of their own n samples. So any number of turns and processes trains alike, and they all
    stop rollouts at the same step.
    """
    cfg: Config
    out: Path
    world: ToyWorld
    reward: object = motion_reward   # of frames, as world.decode gives them: (B,)
    negative: str = ""               # what guidance leads away from
    own = slice(None)                # the n samples of this turn and process: all of the batch
    turns, rank = [own], 0           # own in each turn; the number of this process
    whole = cut = join = staticmethod(lambda x: x)      # of sharded tensors: see FullRun

    def __post_init__(self):
        self.state = load_checkpoint(self.out / "checkpoint.pt")

    def model(self, stage):
        """A VideoTransformer with the weights that a stage made; the critic starts as the
        teacher."""
        model = VideoTransformer(self.cfg)
        model.load_state_dict(self.state["teacher" if stage == "critic" else stage]["parts"][0])
        return model

    def each_turn(self, *what):
        """For each turn: set self.own, and seed, so that all draw the whole batch's numbers. Yields
        the turn's share of a mean."""
        for self.own in self.turns:
            set_seed(self.cfg.seed, *what)
            yield 1 / len(self.turns)

    def judge(self, x):
        """The rewards of this turn, of all processes, for x (n, F, C, h, w)."""
        return self.whole(self.reward(self.world.decode(x, {})))

    def draw_clips(self, frames, mirror=False):
        """Random cuts of random clips, as latents (B, frames, C, h, w), and their text, some of it
        dropped. Batches of longer cuts have fewer. mirror: every other cut is flipped."""
        cfg, world = self.cfg, self.world
        batch = math.ceil(cfg.batch * cfg.clip / frames)
        picked = torch.randint(len(world.clips), (batch, 1))
        start = torch.randint(world.clips.shape[1] - frames + 1, (batch, 1))
        cuts = world.clips[picked, start + torch.arange(frames)]
        if mirror:
            cuts[::2] = cuts[::2].flip(-1)
        text = world.text([world.captions[i] for i in picked])
        text[torch.rand(batch) < cfg.drop_caption] = 0
        return world.encode(cuts), text

    def draw_noise(self, n, *shape):
        """Noise (n, *shape) for the n samples, out of that for the whole batch."""
        return torch.randn(self.cfg.batch, *shape)[self.own]

    def draw_level(self, x):
        """Random noise levels (n, 1), and noise, for x (n, F, C, h, w). At level 1 a noised sample
        would say nothing of the sample, near 0 there is nothing left to judge."""
        u = torch.rand(self.cfg.batch, 1)[self.own]
        sigma = shift_sigma(u, self.cfg.sigma_shift).clamp(0.02, 0.98)
        return sigma, self.draw_noise(*x.shape)

    def stage(self, name, steps, *parts):
        """Count the steps that are left of a stage of training, with a bar. After a kill it goes on
        from what was saved last; BadInput if that was trained with other numbers or data.

        parts are all that the stage changes: first the model that is its result, then others, then
        optimizers. A step depends on nothing else but seed, stage and step, so a resumed run
        ends with the same numbers, bit for bit on a CPU.
        """
        self.parts = parts
        # frames may differ from run to run; a number of the world tells it from any other
        config = vars(self.cfg) | {"frames": Config.frames, "world": self.world.mean[0].item()}
        saved = self.state.setdefault(name, {"config": config, "step": 0, "parts": []})
        # of a shipped stage the config has only what it was settled by; step: how many are done
        differ = dict(saved["config"].items() - config.items())
        check(not differ,
              f"{name} was trained with {differ}: match it, change --out or add --from-scratch")
        for part, old in zip(parts, saved["parts"]):
            part.load_state_dict(tree_map_only(torch.Tensor, self.cut, old))
        self.bar = tqdm(range(saved["step"], steps), name, steps, initial=saved["step"])
        return self.bar

    def end_step(self, step, **numbers):
        """Log the numbers, means over the processes; save some twenty times a stage.
        BadInput, before it is saved, if one is not finite."""
        means = self.whole(torch.tensor([[*numbers.values()]])).mean(0)
        numbers = dict(zip(numbers, means.tolist()))
        bar, state = self.bar, self.state                            # bar.desc: the stage's name
        check(means.isfinite().all(), f"{bar.desc} step {step} is not finite, {numbers}: try a "
              "smaller learning rate or a larger beta in another --out")
        bar.set_postfix(numbers, refresh=False)
        state["log"].append({"stage": bar.desc, "step": step, **numbers})
        if step + 1 == bar.total or step % math.ceil(bar.total / 20) == 0:
            parts = [tree_map_only(torch.Tensor, self.join, part.state_dict())
                     for part in self.parts]
            state[bar.desc] |= {"step": step + 1, "parts": parts}
            if bar.desc == "student":                               # the names public code reads
                state |= zip(("generator_ema", "generator", "critic"), parts)
            if self.rank == 0:
                save(state, self.out / "checkpoint.pt")
                (self.out / "log.jsonl").write_text("\n".join(map(json.dumps, state["log"])))


# ----------------------------------------------------------------------- Streaming and pictures
def play(student, decode, text, frames, finish, **others):
    """Stream so many video frames, and call finish(those of a chunk, on the CPU) chunk by chunk.
    Returns the seconds of each chunk, and video frames per second by the median of their second
    half. BadInput unless frames make whole chunks.

    text (1, T, text_dim); decode: that of a VAE, None leaves them latents; others: rollout's cache,
    start, steer and reread. Decoding, copying and finish have a thread of their own, beside the
    next chunk's passes. At most two chunks are held.
    """
    cfg, past, clock = student.cfg, {}, [time.perf_counter()]
    # torch.cuda, or torch.cpu, whose streams do nothing
    device = torch.get_device_module(torch.get_default_device())
    beside = device.Stream()

    def job(x0):
        with device.stream(beside):
            finish((decode(x0, past) if decode else x0).cpu())
        clock.append(time.perf_counter())

    set_seed(cfg.seed, "stream")
    with ThreadPoolExecutor(1) as thread:
        done = thread.submit(int)                                    # nothing to wait for yet
        for x0, _ in rollout(student, text, cfg, cfg.chunks_in(frames), **others):
            done.result()
            beside.wait_stream(device.current_stream())              # until x0 is made
            done = thread.submit(job, x0)
        done.result()
    seconds = np.diff(clock)
    return seconds, cfg.chunk * cfg.time_stride / np.median(seconds[len(seconds) // 2:])


def tile(videos, scale):
    """A picture for each frame of videos (B, F, 3, height, width) uint8, in rows of at most 4."""
    columns = math.gcd(len(videos), 4)
    grid = np.block([[*row.numpy()] for row in videos.cpu().split(columns)])
    return [ImageOps.scale(Image.fromarray(frame), scale, Image.NEAREST)
            for frame in np.moveaxis(grid, 1, 3)]                    # (height, width, 3)


def save_pictures(path, videos):
    """Tiled videos as GIF, WebP or PNG."""
    first, *rest = tile(videos, 3)
    first.save(path, save_all=True, append_images=rest, duration=60, loop=0)


def write_webp(file, pictures):
    """Add frames to an animated WebP, which is open for writing: nothing is held. Its length is put
    right at each call, so that a stream which is stopped, even killed, leaves a file that plays."""
    box = b"".join((side - 1).to_bytes(3, "little") for side in pictures[0].size)

    def write_head(start, form):
        """Of the part of the file from start to its end: written last, as it holds the length."""
        length = file.seek(0, 2) - start - 8
        file.seek(start)
        file.write(form % (length.to_bytes(4, "little"), box))

    for picture in pictures:
        start = file.seek(0, 2) or 44                                # 44: of the file's own head
        file.seek(start + 12)
        picture.save(file, "WebP", method=0)                         # 0: fast
        # at 0, 0; 60 ms, opaque; 24 bytes, the last 12 over the RIFF with which a still begins
        write_head(start, b"ANMF%b\0\0\0\0\0\0%b\x3c\0\0\2")
    write_head(0, b"RIFF%bWEBPVP8X\x0a\0\0\0\2\0\0\0%bANIM\6\0\0\0\0\0\0\0\0\0")


def show(pictures, state):
    """Draw in the terminal, near the video's pace, a line of text beneath. A character is two
    pixels: a half block's colour is the upper one, its ground the lower."""
    columns, lines = shutil.get_terminal_size()
    for picture in pictures:
        small = np.asarray(ImageOps.contain(picture, (columns, 2 * lines - 6)))
        drawn = "\x1b7\x1b[H"                                       # keep the cursor, go to the top
        for pair in zip(small[::2], small[1::2]):
            for colours in np.hstack(pair):                                  # (width, 6)
                drawn += "\x1b[38;2;{};{};{};48;2;{};{};{}m\u2580".format(*colours)
            drawn += "\x1b[0m\x1b[K\n"
        print(f"{drawn}{state}\x1b[K\x1b8", end="")                  # at once, as it has lines
        time.sleep(0.06)


def stream_all(run, stage, frames, repeats=1):
    """Every caption, streamed by the student of a stage: (video (B, F, ...), the captions)."""
    captions, video = run.world.prompts * repeats, []
    text = run.world.text(captions)
    play(run.model(stage), run.world.decode, text, frames, video.append)
    return torch.cat(video, 1).to(text.device), captions


def report(run):
    """Measure and draw data, teacher and students, and a long stream of every caption."""
    cfg, world = run.cfg, run.world
    captions = world.prompts * 4
    set_seed(cfg.seed, "report")
    noise = torch.randn(len(captions), cfg.clip, *cfg.latent)
    path = teacher_trajectory(run.model("teacher"), noise, world.text(captions), cfg)
    shown = {
        "data": (world.clips, world.captions),
        "teacher": (world.decode(path[-1]), captions),
        "causal": stream_all(run, "causal", cfg.clip, 4),
        "student": stream_all(run, "student", cfg.clip, 4),          # from the same noise
    }
    save_pictures(run.out / "report.png", torch.cat(                 # a row for each
        [video[:4, :cfg.clip] for video, _ in shown.values()]))
    video, captions = stream_all(run, "student", cfg.frames)
    save_pictures(run.out / "stream.gif", video)
    shown["stream, first 60"] = video[:, :60], captions
    shown["stream, last 60"] = video, captions, 60
    rows = {}
    for name, what in shown.items():
        rows[name] = measure(cfg.chunk, *what)
        print(f"{name:16} {rows[name]}")
    save(rows, run.out / "metrics.json")


# ------------------------------------------------------------------------------------- Ablation
SEEDS = 100, 101, 102                        # they tuned nothing
ARMS = {                                     # an arm: the flags by which --toy alone would train it
    "Re-DMD": "",
    "DMD": "--beta inf",
    "rewards shuffled": "--shuffle",
    "tilted critic": "--tilt",
    "tilted, shuffled": "--tilt --shuffle",
    "plain norm": "--plain-norm",
    "static sink": "--alpha 1",
    "no sink": "--sink 0",
    "no distillation": "--distill-steps 1 --student-lr 1e-12",       # a step of nothing
}


def ablate(run):
    """Train every arm once per seed, all from one causal student, which saw the EMA-sink, and
    stream it.

    Prints means over seeds, and means of the differences from Re-DMD with the same seed, with
    standard errors. What Re-DMD gains is what "rewards shuffled" has less: there the weights are as
    uneven, but blind. Other flags hold in all arms, but for what an arm sets. ablation.json holds
    each student's numbers, by its whole config: one that is there is not trained again, so a killed
    ablation goes on.
    """
    path = run.out / "ablation.json"
    done = json.loads(path.read_text()) if path.exists() else {}
    base = run.cfg
    run.rank = 1                             # only rank 0 saves: --out keeps --toy's own student
    rows = []
    for seed, arm in itertools.product(SEEDS, ARMS):
        told = parse(f"--toy --seed {seed} {ARMS[arm]}".split())
        run.cfg = replace(base, **told.given)
        key = f"{arm}, {run.cfg}"
        if key not in done:
            print(f"{arm}, seed {seed}")
            del run.state["student"]
            train_student(run)
            done[key] = measure(base.chunk, *stream_all(run, "student", base.frames, 2))
            save(done, path)
        rows += done[key].values()

    # seeds, arms, measures, which have the names of any student's
    numbers = np.reshape(rows, (len(SEEDS), len(ARMS), -1))
    for suffix, table in (("", numbers), (" - Re-DMD", numbers - numbers[:, :1])):
        errors = table.std(0, ddof=1) / len(SEEDS) ** 0.5
        for arm, *row in zip(ARMS, table.mean(0), errors):
            print(f"{arm + suffix:28}", *map("{} {:.3f} +- {:.3f}".format, done[key], *row))


# ------------------------------------------------------------------------------------ Bad input
class BadInput(Exception):
    """What the user gave cannot work. The message is one sentence that says how to mend it."""


def check(fine, message):
    if not fine:
        raise BadInput(message)


@contextlib.contextmanager
def using(what, mend):
    """Turn what goes wrong with a file or library, in whatever kind of exception, into BadInput."""
    try:
        yield
    except Exception as error:
        raise BadInput(f"{what} cannot be used ({str(error)[:500]!r}): {mend}")


# ------------------------------------------------------------------------------------ Full size
# the full size computes in this; what is trained is kept in float32. The toy is all in float32
PRECISION = torch.bfloat16 if torch.cuda.is_available() else torch.float32


def load_weights(model, path):
    """Give a model the weights in path in place of its own, mapped and not copied.

    path: the released or a trained .pt (a bare dict of names, or one with generator_ema or
    generator), a .safetensors file, or Wan2.1's folder of them. "model." and FSDP's wrapper in
    the names are taken off. BadInput names a missing, extra or misshapen tensor.
    """
    state = {}
    with using(path, "give this model's .pt, .safetensors or folder (pip install safetensors)"):
        for file in sorted(path.glob("*.safetensors")) or [path]:
            state |= torch.load(file, map_location="cpu", mmap=True)
        state = state.get("generator_ema", state.get("generator", state))
        state = {name.replace("_fsdp_wrapped_module.", "").removeprefix("model."): p
                 for name, p in state.items()}
        model.load_state_dict(state, assign=True)


class WanWorld:
    """What ToyWorld is to the toy: Wan2.1's text encoder and VAE from its Diffusers folder; without
    one, a VAE with random weights. What was told once is remembered."""
    @using("Wan2.1's VAE", "pip install diffusers, and give Wan2.1's Diffusers folder as --wan")
    def __init__(self, folder):
        from diffusers import AutoencoderKLWan as Wan
        # strict: for a folder that is not there, the library would ask the network
        vae = Wan.from_pretrained((folder / "vae").resolve(strict=True)) if folder else Wan()
        self.vae = vae.to(torch.get_default_device(), PRECISION).requires_grad_(False)
        self.mean, self.std = torch.tensor(                                  # (C, 1, 1) each
            [vae.config.latents_mean, vae.config.latents_std])[..., None, None]
        self.folder, self.features = folder, {}

    @using("Wan2.1's text encoder", "pip install transformers, and see that --wan is complete")
    @torch.no_grad()
    def learn(self, prompts):
        """Keep the features (T, text_dim) of prompts by UMT5-XXL, T tokens. The encoder is loaded,
        used and freed in this one call."""
        from transformers import AutoTokenizer, UMT5EncoderModel
        tokenizer = AutoTokenizer.from_pretrained(self.folder / "tokenizer")
        with torch.device("cpu"):            # onto a GPU the library loads with another package
            encoder = UMT5EncoderModel.from_pretrained(
                self.folder / "text_encoder", dtype=PRECISION)
        encoder.encoder.embed_tokens = encoder.shared    # some releases of transformers forget to
        check(encoder.shared.weight.any(), f"the text encoder in {self.folder} has only zeros for "
              "its word embedding: download it again, or try another release of transformers")
        encoder.to(torch.get_default_device())
        for prompt in prompts:
            ids = tokenizer(prompt, truncation=True).input_ids       # embed_text cuts longer ones
            self.features[prompt] = encoder(torch.tensor([ids])).last_hidden_state[0].cpu()

    def text(self, prompts):
        """(B, T, text_dim), zero after the last token; T is the longest's."""
        if set(prompts) - self.features.keys():
            self.learn(prompts)
        return nn.utils.rnn.pad_sequence([self.features[p] for p in prompts], batch_first=True)

    def compile(self):
        """At most two graphs. The first chunk is not compiled and may leave its memory in another
        layout than compiled chunks do; each layout has a graph. They are traced in play's thread,
        which has no default device: under one the library's code cannot be."""
        nn.utils.convert_conv3d_weight_memory_format(self.vae, torch.channels_last_3d)
        self.vae.decoder.compile(fullgraph=True, dynamic=False)

    def decode(self, latents, past):
        """(B, F, 16, h, w) -> (B, 4 F, 3, 8 h, 8 w) uint8, 3 frames fewer at a stream's start.

        The VAE is causal and decodes one latent frame at a time. past carries its convolutions'
        memory from call to call, so decoding by chunks equals decoding the whole.
        """
        z = (latents * self.std + self.mean).transpose(1, 2).to(PRECISION)
        decoder = self.vae.decoder if past else self.vae.decoder.forward     # this: not compiled
        memory = past.setdefault("memory", [None] * 99)              # more than it has convolutions
        pixels = [decoder(frame, feat_cache=memory, feat_idx=[0])
                  for frame in self.vae.post_quant_conv(z).split(1, 2)]
        return to_bytes(torch.cat(pixels, 2).transpose(1, 2))

    def encode(self, frames):
        """The inverse at a stream's start: (B, 4 F - 3, 3, 8 h, 8 w) uint8 -> (B, F, 16, h, w)."""
        pixels = (frames / 127.5 - 1).transpose(1, 2).to(PRECISION)
        z = self.vae.encode(pixels).latent_dist.mean.transpose(1, 2)
        return (z - self.mean) / self.std                            # float32, as mean and std are


@using("--vae", "it needs a clone of github.com/madebyollin/taehv")
def tiny_decoder(folder):
    """As WanWorld.decode, by TAEHV (O. Boer Bohan), near it at a small part of its cost, in its own
    code: folder is a clone of github.com/madebyollin/taehv with the weights taew2_1.pth."""
    sys.path.append(folder)
    from taehv import TAEHV, StreamingTAEHV
    model = TAEHV(folder + "/taew2_1.pth").to(PRECISION).requires_grad_(False)

    def decode(latents, past):
        stream = past.setdefault("stream", StreamingTAEHV(model))    # it remembers
        frames = [stream.decode(latents.to(PRECISION)), *iter(stream.decode, None)]
        return to_bytes(2 * torch.cat(frames, 1) - 1)

    return decode


def compile_student(student):
    """A graph for each length of the context, shared by all blocks, and one to lay it out."""
    torch._dynamo.config.recompile_limit = 999                       # no window has so many lengths
    for block in student.blocks:
        block.compile(fullgraph=True, dynamic=False)
    EMASinkCache.lay_out = staticmethod(
        torch.compile(EMASinkCache.lay_out, fullgraph=True, dynamic=False))


def fastest_attention(cfg):
    """From here on attend by the fastest of torch's kernels, or of FA3 and FA4 where installed, for
    a chunk in a full window. Prints {name: seconds}; torch may take another where cuDNN is not
    there. Graphs are made anew, for the kernel is a part of them."""
    k = torch.randn(1, cfg.heads, cfg.window * cfg.tokens, cfg.head_dim, dtype=PRECISION)
    q = k[:, :, :cfg.chunk * cfg.tokens]
    timer = Timer("torch.nn.functional.scaled_dot_product_attention(q, k, k)", globals=locals())
    times = {}

    def choose(name):                                # FA3 and FA4 take the place of torch's flash
        torch.backends.cuda.enable_cudnn_sdp(name == "cudnn")
        torch.backends.cuda.enable_flash_sdp(name != "cudnn")
        if "FA" in name:
            attention.activate_flash_attention_impl(name)
        elif attention.current_flash_attention_impl():
            attention.restore_flash_attention_impl()

    for name in "flash", "cudnn", "FA3", "FA4":
        with contextlib.suppress(RuntimeError, ImportError):      # it is not there
            choose(name)
            times[name] = timer.blocked_autorange().median
    choose(min(times, key=times.get))
    torch.compiler.reset()
    print(f"seconds of an attention: {times}")


def to_float8(x):
    """x in 8 bits, each row of its own scale, and the scales."""
    scale = x.abs().amax(-1, keepdim=True).float().clamp_min(1e-12) / 448    # 448: of e4m3
    return (x / scale).to(torch.float8_e4m3fn), scale


class Float8Linear(nn.Linear):
    """A linear layer that multiplies in 8 bits."""
    def forward(self, x):
        rows, scale = to_float8(x.flatten(0, -2))
        by_row = functional.ScalingType.RowWise
        out = functional.scaled_mm(rows, self.weight.T, scale, by_row, self.scale.T, by_row)
        return out.view(*x.shape[:-1], -1) + self.bias               # of the bias' type, as x is


@using("--fp8", "of GPUs it needs an H100 or newer")
def use_float8(student):
    """In the blocks' linear layers, where most of the work is."""
    for layer in student.blocks.modules():
        if isinstance(layer, nn.Linear):
            layer.weight.data, layer.scale = to_float8(layer.weight.data)
            layer.__class__ = Float8Linear
    student.blocks[0].ffn(torch.zeros(16, student.cfg.dim))          # refused now or never


# ------------------------------------------------------------------------ Training at full size
@using("--reward", "it needs VideoAlign's model_config.json, one checkpoint-*/model.pth, its "
       "instruction as template.txt, and Qwen2-VL-2B-Instruct/")
def videoalign(folder):
    """The paper's reward, a function: VideoAlign's motion quality (MQ, arXiv 2501.13918).
    Qwen2-VL-2B reads the clip and a rating instruction, and a linear head scores its last state,
    at <|MQ_reward|>.

    The instruction quotes the caption after that token and the model is causal, so the caption
    cannot change MQ: the text is cut at <|MQ_reward|>. What the folder must hold:
        model_config.json        frames per second, LoRA, mean and std of the scores
        checkpoint-*/model.pth   one; all weights, under the names that peft gives them
        template.txt             the instruction in VideoAlign's prompt_template.py, to the letter
                                 (the line breaks at both ends too), {text_prompt} left as it is
        Qwen2-VL-2B-Instruct/    config and tokenizer of the model that it was trained from
    BadInput says what is missing or does not fit.
    """
    from transformers import AutoConfig, AutoModel, AutoTokenizer, Qwen2VLImageProcessor
    base = folder / "Qwen2-VL-2B-Instruct"
    config = json.loads((folder / "model_config.json").read_text())
    told = config["data_config"] | config["peft_lora_config"] | config["inference_config"]
    # patches of 1 image, paired below: asked for 2, it would show each image twice
    processor = Qwen2VLImageProcessor(
        temporal_patch_size=1, min_pixels=100_352, max_pixels=told["max_frame_pixels"])
    before, motion, _ = (folder / "template.txt").read_text().partition("<|MQ_reward|>")
    check("<|VQ_reward|>" in before and motion,
          "template.txt must have <|VQ_reward|> and then <|MQ_reward|>")
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens("<|VQ_reward|> <|MQ_reward|> <|TA_reward|>".split())
    model = AutoModel.from_config(AutoConfig.from_pretrained(base), dtype=PRECISION)
    model.eval().requires_grad_(False).resize_token_embeddings(len(tokenizer))
    path, = folder.glob("checkpoint-*/model.pth")
    state = {                                # peft's names -> those of newer transformers
        name.replace("base_layer.", "").replace("base_model.model.model", "language_model")
            .removeprefix("base_model.model."): p
        for name, p in torch.load(path, map_location=model.device).items()}
    for name in [name for name in state if "lora_A" in name]:        # W + alpha / r B A
        change = state.pop(name.replace("lora_A", "lora_B")) @ state.pop(name)
        state[name.replace("lora_A.default.", "")] += told["lora_alpha"] / told["lora_r"] * change
    head = state.pop("rm_head.weight").float()
    del state["lm_head.weight"]
    model.load_state_dict(state)                                     # strict: names every misfit

    def reward(frames):
        """frames (B, F, 3, height, width) uint8 at 16 fps -> (B,) float32, one score per clip, in
        standard deviations from VideoAlign's mean: negative scores are usual."""
        most = frames.shape[1]
        pairs = round(max(4, most / 16 * told["fps"]) / 2)           # of images that it sees
        chosen = torch.linspace(0, most - 1, 2 * pairs).round().long()
        images = frames[:, chosen].flatten(0, 1).cpu()
        cut = processor(images, return_tensors="pt").to(model.device)
        # (B pairs 2, h w, 3 14 14) -> (B pairs, h w, 3 2 14 14)
        patches = cut.pixel_values.view(len(images) // 2, 2, -1, 3, 196).movedim(1, 3)
        squares = pairs * patches.shape[1] // 4                      # of 2 x 2 patches
        ids = tokenizer(                                             # a chat in Qwen2-VL's format
            "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
            f"<|im_start|>user\n<|vision_start|>{'<|video_pad|>' * squares}<|vision_end|>"
            f"{before}<|MQ_reward|>").input_ids
        # It looks at each pair alone: here each is a video of its own. 1-D positions, as in
        # VideoAlign's training; without them Qwen2-VL makes its own 3-D ones
        states = model(
            torch.tensor([ids] * len(frames)), position_ids=torch.arange(len(ids))[None],
            pixel_values_videos=patches.reshape(-1, 1176),
            video_grid_thw=cut.image_grid_thw[::2]).last_hidden_state
        score = states[:, -1].float() @ head[len(head) // 2]         # its only row, or MQ's
        return (score - told["MQ_mean"]) / told["MQ_std"]
    return reward


def frame_flops(cfg, seen):
    """FLOPs of linear layers and attention in one pass, for each frame; it sees so many frames."""
    width = 6 * cfg.dim + 2 * cfg.ffn_dim + 2 * (seen * cfg.tokens + cfg.text_len)
    return 2 * cfg.layers * cfg.dim * cfg.tokens * width


def step_flops(cfg, teacher):
    """FLOPs of a step: critic_ratio critic updates and one of the student. A pass with gradient
    counts as three; VAE, reward, and what is computed again are left out, and the window is taken
    to be full all the time."""
    student = frame_flops(cfg, cfg.window)
    critic = frame_flops(cfg, cfg.clip)
    rollout = student * (cfg.denoise_steps + 3) / 2                  # mean exit, and the clean pass
    critic_update = rollout + 3 * critic
    student_update = rollout + 2 * frame_flops(teacher, cfg.clip) + critic + 4 * student
    return cfg.batch * cfg.clip * (cfg.critic_ratio * critic_update + student_update)


def dry_run(args, counts=(1, 8, 64)):
    """with --full: print what --train takes on 1, 8 and 64 H100: seconds and GB, by shapes"""
    # --train too calls this, for its own count and for the two configs
    cfg = replace(PRESETS["full"], **args.given)
    check(not cfg.tilt, "--tilt is for the toy: leave it out")
    teacher = cfg
    if args.large_teacher:
        teacher = replace(cfg, dim=5120, ffn_dim=13824, heads=40, layers=40)  # Wan2.1-T2V-14B
    with torch.device("meta"):
        trained, fixed = (sum(p.numel() for p in VideoTransformer(c).parameters())
                          for c in (cfg, teacher))
    frame = 2 * cfg.tokens * cfg.dim                                 # bytes of its tokens in bf16
    block = 20 + 2 * cfg.ffn_dim / cfg.dim           # what it keeps of a token, in units of dim
    for count in counts:
        parts = {
            "student and critic": 2 * 16 * trained / count,  # weight, gradient, moments in float32
            "average and teacher": (4 * trained + 2 * fixed) / count,        # float32 and bf16
            # keys and values: stored in float32 and laid out, those of the newest chunk in bf16
            "cache": 2 * cfg.layers * frame * (3 * cfg.window - 2 * cfg.chunk),
            "critic's activations": frame * cfg.clip * (cfg.layers + 2 * block),     # of blocks'
            "VAE and reward": 5e9}                           # inputs, and within one; gradients
        seconds = step_flops(cfg, teacher) / count / 400e12          # FLOP/s of a GPU, in practice
        print(f"{count} GPUs: {seconds:.0f} s a step, {sum(parts.values()) / 1e9:.1f} GB of each:",
              *[f"{name} {part / 1e9:.1f};" for name, part in parts.items()])
    return cfg, teacher


def train(args):
    """with --full, by torchrun: Re-DMD of the 1.3B model, from --weights"""
    processes = int(os.environ.get("WORLD_SIZE", 0))
    check(processes, "--train is started by torchrun, on one GPU too")
    from torch.distributed import fsdp, init_device_mesh, tensor     # late: it takes half a second
    cfg, guide = dry_run(args, [processes])
    units_in("batch", cfg.batch, processes)
    mesh = init_device_mesh(torch.get_default_device().type, (processes,))
    layout = mesh, [tensor.Shard(0)]
    reward = videoalign(Path(args.reward.removeprefix("videoalign:")))
    world = WanWorld(args.wan)
    with using(args.prompts, "write a prompt a line, in UTF-8"):
        world.prompts = [*filter(str.strip, args.prompts.read_text().splitlines())]
        check(world.prompts, "it is empty")
    world.learn([*world.prompts, args.negative])                     # before a model is loaded
    args.causal = args.weights               # so each stage starts from the option of its name

    class FullRun(Run):
        """A Run on all processes that torchrun started, each with a part of every parameter,
        gradient and moment (FSDP2). Its models start from files."""
        rank = mesh.get_rank()
        # a sample in each: its 33,000 tokens keep a GPU busy
        turns = torch.arange(rank, cfg.batch, processes).split(1)

        def model(self, stage):
            """A model in parts. A block is put together, in bf16, while it runs. Its activations
            are not kept but computed again in the backward pass, which is exact: a block depends
            on its arguments alone, and regress goes backward before the context moves on."""
            size, kept = cfg, torch.float32
            if stage == "teacher":           # which is not trained
                size, kept = guide, PRECISION
            with torch.device("meta"):
                model = VideoTransformer(size)
            load_weights(model, getattr(args, stage))
            policy = fsdp.MixedPrecisionPolicy(PRECISION, torch.float32, cast_forward_inputs=False)
            for block in model.blocks:
                block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
            for module in [*model.blocks, model]:
                # back to parts after every pass: what a rollout left whole would soon be outdated
                fsdp.fully_shard(module.to(kept), mp_policy=policy, reshard_after_forward=True)
                fsdp.register_fsdp_forward_method(module, "embed_text")
            return model

        def whole(self, x):
            """What all processes have of a batch, from what this one has."""
            return tensor.DTensor.from_local(x, *layout).full_tensor()

        def cut(self, p):
            """A state dict's tensor in parts; a single number stays whole."""
            return tensor.distribute_tensor(p, *layout, src_data_rank=None) if p.dim() else p

        def join(self, p):
            """The inverse, on the CPU of the first process."""
            if isinstance(p, tensor.DTensor):
                p = p.full_tensor()
            return None if self.rank else p.cpu()

        def end_step(self, step, **numbers):
            """Log also, since the run began or went on: tokens rolled out per second, a GPU's peak
            GB, on average, and the model's FLOPs as a part of an H100's peak in bf16."""
            seconds = self.bar.format_dict["elapsed"] / (step + 1 - self.bar.initial)
            tokens = cfg.batch * (cfg.critic_ratio + 1) * cfg.clip * cfg.tokens
            super().end_step(
                step, **numbers, tokens_per_second=tokens / seconds,
                memory=torch.cuda.max_memory_allocated() / 1e9,
                utilisation=step_flops(cfg, guide) / seconds / processes / 989e12)

    train_student(FullRun(cfg, args.out, world, reward, args.negative))
    torch.distributed.destroy_process_group()


# --------------------------------------------------------------------------------- Command line
class Options:
    """With which files, and how. Every field is a flag, as in Config; what is neither
    told nor given a value here is None. What main hands to a command has two more: command, that
    function, and given, {Config field: value}."""
    ablate: bool                    # with --toy: both ideas against their controls
    full: bool = False              # the 1.3B model: with --stream, --bench, --train or --dry-run
    compile: bool                   # compile blocks, cache and VAE: slow to start, then faster
    fp8: bool                       # blocks' linear layers multiply in 8 bits
    prompt: str
    then: list = []                 # --then 120 "a blue square": the prompt from that frame on;
                                    # may be given again
    reread: bool                    # remember the newest chunk under a new prompt, not the old
    live: bool                      # also show it in the terminal; a line entered is a new prompt
    vae: str                        # with --full: folder of TAEHV, in place of Wan's VAE
    start: Path                     # a picture, or a GIF or WebP, that the stream goes on from
    weights: Path                   # with --full: .pt, .safetensors, or a folder of them; with
                                    # --train where the student starts
    wan: Path                       # with --full: Diffusers folder of Wan2.1 (text encoder, VAE)
    critic: Path                    # with --train: Wan2.1-T2V-1.3B, where the critic starts; read
                                    # as --weights is
    teacher: Path                   # with --train: Wan2.1-T2V-1.3B or, so --large-teacher, -14B
    large_teacher: bool             # --teacher is Wan2.1-T2V-14B
    prompts: Path                   # with --train: a text file, one prompt a line
    negative: str = ""              # with --train: what guidance leads away from
    reward: str                     # with --train: videoalign:FOLDER
    out: Path = Path("out")         # folder of all that is written
    from_scratch: bool              # with --toy: train a small teacher too


def units_in(name, value, unit, missing=0):
    """How many units make value, which is `missing` short of them; BadInput unless they do."""
    count, rest = divmod(value + missing, unit)
    below = max(value - rest, unit - missing)
    check(rest == 0 < count,
          f"{name}={value} does not fit, it goes in steps of {unit}: try {below} or {below + unit}")
    return count


PRESETS = {
    "toy": Config(),
    "scratch": Config(dim=128, heads=8, layers=4, teacher_steps=2000, causal_steps=800,
                      distill_steps=64),
    "full": Config(                          # Wan2.1-T2V-1.3B and the settings of the paper
        dim=1536, ffn_dim=8960, heads=12, layers=30,
        freq_dim=256, rope_base=10000.0,
        text_dim=4096, text_len=512,         # UMT5-XXL
        height=480, width=832,
        stride=8, time_stride=4,             # of Wan2.1's VAE
        sigma_shift=5.0,
        frames=477, clip=21, batch=64, guidance=3.0,
        # the public trainer counts critic updates: 600 of them, and 200 before it averages
        distill_steps=120, critic_ratio=5,
        weight_ema=0.99, ema_start=40,
        plain_norm=True, adamw=True, student_lr=2e-6, critic_lr=4e-7),
}

USES = {                         # a command: the Options that it needs | and may have
    "toy": "| ablate from_scratch out",
    "stream": "prompt | compile fp8 then reread live start out",
    "full stream": "weights wan prompt | compile fp8 then reread live start vae out",
    "full bench": "| weights wan vae out",
    "full train": "weights critic teacher wan prompts reward | large_teacher negative out",
    "full dry_run": "| large_teacher out",
}


def parse(argv):
    """The Options that a command line tells; BadInput if its command does not take them."""
    parser = argparse.ArgumentParser(usage=__doc__, allow_abbrev=False)
    parser.error = functools.partial(check, False)
    commands = parser.add_mutually_exclusive_group(required=True)
    for command in toy, stream, bench, train, dry_run:
        commands.add_argument(f"--{command.__name__.replace('_', '-')}", action="store_const",
                              const=command, dest="command", help=command.__doc__)
    actions = {bool: {"action": argparse.BooleanOptionalAction},
               list: {"action": "append", "nargs": 2}}
    for name, kind in (Options.__annotations__ | Config.__annotations__).items():
        parser.add_argument(f"--{name.replace('_', '-')}", **actions.get(kind, {"type": kind}))
    args = parser.parse_args(argv, Options())
    told = {name: value for name, value in vars(args).items() if value is not None}
    args.given = {name: told.pop(name) for name in Config.__annotations__ if name in told}
    name = "full " * args.full + args.command.__name__
    check(name in USES, f"--{name} is none of the commands (a word is a flag): {', '.join(USES)}")
    needs, takes = USES[name].split("|")
    # needed and not told, or told and neither needed nor taken
    wrong = (told.keys() ^ needs.split()).difference(f"full command {takes}".split())
    check(not wrong, f"add or leave out --{', --'.join(sorted(wrong)).replace('_', '-')}: {name} "
          f"needs ({needs.strip()}) and may have ({takes.strip()}), beside what class Config has")
    return args


def open_student(args):
    """(student, world, cfg) to stream with: the toy's by the checkpoint in --out, or those of the
    full size; for --bench random where no file is given."""
    if args.full:
        cfg = replace(PRESETS["full"], **args.given)
        world = WanWorld(args.wan)
    else:
        check(not args.given.keys() - "frames alpha sink window seed data".split(),
              "only --frames, --alpha, --sink, --window, --seed, --data may differ from training's")
        args.weights = args.out / "checkpoint.pt"
        saved = load_checkpoint(args.weights).get("student")
        check(saved, f"{args.out} holds no student: let --toy go on")
        saved["config"].pop("world", None)
        cfg = Config(**saved["config"] | args.given)
        world = ToyWorld(cfg)
    with torch.device("meta" if args.weights else "cpu"):            # a file's replace its weights
        student = VideoTransformer(cfg)
    if args.weights:
        load_weights(student, args.weights)
    student.to(torch.get_default_device(), PRECISION if args.full else None)
    return student, world, cfg


def open_clip(path, cfg):
    """The frames of a GIF or WebP, or a picture, repeated to make a chunk: (1, F, 3, height, width)
    uint8, cropped and scaled to the model's size. BadInput unless they make whole chunks."""
    upright = ImageSequence.all_frames(Image.open(path), ImageOps.exif_transpose)  # as it was held
    frames = [ImageOps.fit(frame.convert("RGB"), (cfg.width, cfg.height)) for frame in upright]
    if len(frames) == 1:
        frames *= (cfg.chunk - 1) * cfg.time_stride + 1
    cfg.chunks_in(len(frames), f"frames in {path}")
    return torch.tensor(np.stack([frames])).movedim(4, 2)


def stream(args):
    """stream --prompt into out/stream.webp, and with --live into the terminal; say how fast"""
    check(not args.live or sys.stdout.isatty(),
          "--live needs a terminal, and this is none: leave it out, there will be a file")
    student, world, cfg = open_student(args)
    script = [None] * cfg.chunks_in(cfg.frames)                      # for each chunk: a new prompt
    for frame, prompt in args.then:
        with using(f"--then {frame}", f"give a frame before the end, {cfg.frames}, and a prompt"):
            script[cfg.chunks_in(int(frame))] = prompt
    text = world.text([args.prompt, *filter(None, script)])[:1]      # all: refused, learned now
    start = world.encode(open_clip(args.start, cfg)).split(cfg.chunk, 1) if args.start else ()
    check(len(start) < len(script), "--start is all of it: raise --frames")
    if args.fp8:
        use_float8(student)
    if args.compile:
        compile_student(student)
        if args.full:
            fastest_attention(cfg)
            world.compile()
    decode = tiny_decoder(args.vae) if args.vae else world.decode
    cache = EMASinkCache(cfg)

    def steer(chunk):
        prompt = script[chunk]
        if args.live and select.select([sys.stdin], [], [], 0)[0]:
            prompt = sys.stdin.readline().strip() or prompt
        if prompt:
            bar.desc = prompt
            try:
                return student.embed_text(world.text([prompt]))
            except BadInput as error:
                bar.desc = f"{error}"

    def finish(frames):
        pictures = tile(frames, 192 // cfg.width or 1)
        write_webp(file, pictures)
        bar.update(len(pictures))
        if args.live:
            show(pictures,
                 f"{bar}, {len(cache.frames)} frames in the window, {cache.updates} folded")

    bar = tqdm(desc=args.prompt, total=cfg.frames, unit=" frames")
    if args.live:
        bar.mininterval = math.inf                                   # show draws it
        print("\x1b[2J\x1b[999H", end="")                            # to type on the last line
    with open(f"{args.out}/stream.webp", "wb", 0) as file, bar:      # 0: not held in a buffer
        seconds, fps = play(student, decode, text, cfg.frames, finish, cache=cache,
                            start=start, steer=steer, reread=args.reread)
    print(f"{file.name}: first chunk {seconds[0]:.2f} s, then {fps:.1f} frames per second")


def bench(args):
    """with --full: speed, each rung on top of the last, with any weights"""
    student, world, cfg = open_student(args)
    text, speed = torch.zeros(1, 1, cfg.text_dim), {}
    decode = world.decode

    def climb(rung):
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        (cold, _), (warm, fps), (_, alone) = (play(student, each, text, cfg.frames, len)
                                              for each in (decode, decode, None))
        speed[rung] = fps
        print(f"{rung}: {fps:.2f} frames per second, {fps / speed['eager']:.2f} times eager's; "
              f"{alone:.2f} not decoded; first chunk {warm[0]:.2f} s, compiling "
              f"{sum(cold - warm):.2f} s; {torch.cuda.max_memory_allocated() / 1e9:.2f} GB")
    climb("eager")
    compile_student(student)
    climb("compiled")
    world.compile()
    climb("VAE compiled")
    fastest_attention(cfg)
    climb("attention")
    if args.vae:
        decode = tiny_decoder(args.vae)
        climb("tiny VAE")
    use_float8(student)
    climb("fp8")


def toy(args):
    """train what --out lacks, in the toy's world; then measure and draw, or compare"""
    cfg = replace(PRESETS["scratch" if args.from_scratch else "toy"], **args.given)
    check(1 < cfg.chunk < min(cfg.clip, cfg.frames),
          "training needs --chunk 2 or more, and --clip and --frames of more than a chunk")
    run = Run(cfg, args.out, ToyWorld(cfg))
    if not args.from_scratch:
        run.state = load_shipped(cfg) | run.state
    train_teacher(run)
    train_causal(run)
    train_student(run)
    (ablate if args.ablate else report)(run)


def main(argv=None):
    """Exit code 0; 2 for what cannot work, said in one sentence; 130 if interrupted."""
    try:
        args = parse(argv)
        if torch.cuda.is_available():
            torch.cuda.set_device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}")         # torchrun's
            torch.set_default_device("cuda")                         # here: it slows every call
        # given: what is unlike the preset
        print(f"{torch.get_default_device()}, torch {torch.__version__}; given: {args.given}")
        os.makedirs(args.out, exist_ok=True)
        args.command(args)
        return 0
    except (BadInput, OSError, OverflowError) as error:               # the last: a WebP of 4 GiB
        print(f"reward_forcing: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; --toy goes on from what is saved; a stream's file plays", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
