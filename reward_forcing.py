#!/usr/bin/env python3
# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6", "numpy", "tqdm>=4.66", "pillow"]
# ///
"""Reward Forcing: a video model that generates for ever, in one file (after arXiv 2512.04678).

A *teacher* looks at a whole clip at once and needs many denoising steps. The *student* is the same transformer made
causal: it makes a few frames (a *chunk*) in 4 steps, attending to what it made before through a cache. Two ideas:
    EMA-Sink  frames that leave the attention window are folded into the oldest ones, the *sink*, by an exponential
              moving average:  sink <- alpha sink + (1 - alpha) leaving    -> class EMASinkCache
    Re-DMD    distribution matching distillation, each sample weighted by how well it moves:
              grad = exp(reward / beta) (x0_fake - x0_real) / mean|x - x0_real|, x0_real being what the teacher makes
              of a noised sample x and x0_fake what a critic makes of it    -> dmd_gradient, redmd_loss

    python reward_forcing.py --toy                                      # train teacher and student, stream, report
    python reward_forcing.py --stream --prompt "a red circle" --frames 240
    python reward_forcing.py --toy --ablate                             # both ideas against their alternatives
    python reward_forcing.py --full --bench --compile                   # the 1.3B model; README: how to stream it

How to read it: top to bottom. The model, the sink, the rollout and the losses are the paper, and "Training stages" puts
them together; the rest is plumbing: reports, the ablation, and what the full size needs around the same classes.

    B batch   F frames   L frames per chunk   S sink frames   W window frames (sink and current chunk included)
    N tokens per frame   T tokens   H heads   D head dim   C channels   h, w latent rows and columns

Time: sigma in [0, 1], 1 is pure noise. x_t = (1 - sigma) x0 + sigma noise; the model predicts the velocity
v = noise - x0, so x0 = x_t - sigma v: see add_noise and recover_x0.

Papers: Reward Forcing 2512.04678; Self Forcing 2506.08009; DMD2 2405.14867; Wan2.1 2503.20314; Muon (K. Jordan, 2024).
"""
import argparse
import contextlib
import difflib
import functools
import importlib.util
import inspect
import itertools
import json
import math
import os
import pkgutil
import re
import shutil
import subprocess
import sys
import threading
import time
import zlib
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, fields, replace
from multiprocessing import active_children, get_context, parent_process
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps, ImageSequence
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm


# ----------------------------------------------------------------------------------------------------- Noise maths
def shift_sigma(u, shift):
    """u in [0, 1] to a noise level in [0, 1]; larger shifts spend more of the schedule near noise (SD3, 2403.03206)."""
    return shift * u / (1 + (shift - 1) * u)


def add_noise(x0, noise, sigma):
    """x_t: x0 and noise (B, ...) mixed at sigma (B,)."""
    sigma = sigma.view(-1, *[1] * (x0.dim() - 1))
    return (1 - sigma) * x0 + sigma * noise


def recover_x0(xt, velocity, sigma):
    return xt - sigma.view(-1, *[1] * (xt.dim() - 1)) * velocity


# ---------------------------------------------------------------------------------------------------------- Config
class BadInput(Exception):
    """What the user gave cannot work; the message is one sentence that says how to mend it. Exit code 2."""


def require(fits, wrong):
    """BadInput with the message `wrong` unless `fits`."""
    if not fits:
        raise BadInput(wrong)


@dataclass
class Config:
    """Every field is a flag (--text-dim), and the comment beside it is the flag's help."""
    # the transformer
    dim: int = 128               # width of the transformer
    ffn_dim: int = 256           # width inside its feed-forward layers
    heads: int = 8               # attention heads
    layers: int = 4              # transformer blocks
    freq_dim: int = 64           # sinusoids that encode the noise level
    rope_base: float = 100.0     # RoPE's wavelengths run from 2 pi to 2 pi rope_base positions
    text_dim: int = 32           # features per text token; in the toy the largest number of different words
    text_len: int = 4            # text tokens, padding included
    channels: int = 16           # latent channels
    height: int = 24             # video height in pixels
    width: int = 24              # video width in pixels
    stride: int = 4              # pixels per latent pixel, in height and width
    time_stride: int = 1         # video frames per latent frame, but for the first, which is one
    # the stream
    chunk: int = 3               # L: latent frames generated together
    sink: int = 3                # S: frames of memory that never leave the window; 0 is no sink
    window: int = 7              # W: frames attention sees, sink and current chunk included
    alpha: float = 0.9           # what the sink keeps at each update; 1 is a static sink
    steps: int = 4               # denoising steps per chunk
    shift: float = 3.0           # bends the noise schedule towards noise: sigma = shift u / (1 + (shift - 1) u)
    # training
    clip: int = 12               # frames in a training clip; longer than the window, so that the sink is updated too
    teacher_steps: int = 2000    # training steps of the teacher
    teacher_batch: int = 8       # clips per teacher step
    teacher_lr: float = 0.08     # Muon's step; AdamW, on what is not a matrix in a block, takes a tenth of every lr
    drop_caption: float = 0.1    # how often the teacher sees no caption, which guidance needs
    sample_steps: int = 16       # Euler steps of the teacher when it generates; a multiple of steps
    guidance: float = 2.0        # x0 = cond + guidance (cond - uncond); 0 is none
    ode_clips: int = 192         # teacher trajectories that the student regresses
    ode_steps: int = 120         # training steps of that regression
    ode_batch: int = 16          # clips per regression step
    ode_lr: float = 0.02         # see teacher_lr
    distill_steps: int = 60      # student steps of Re-DMD
    distill_batch: int = 12      # rollouts per student or critic step
    critic_ratio: int = 2        # critic steps per student step
    student_lr: float = 0.006    # see teacher_lr
    critic_lr: float = 0.01      # see teacher_lr
    beta: float = 0.2            # temperature of the reward: weight = exp(reward / beta); inf is plain DMD
    tilt: str = "student"        # what the reward weighs: the student's loss, as the paper, or the critic's
    ema: float = 0.9             # moving average of the student's weights, which is what streams
    reward: str = "motion"       # who judges (z-scored on the data): motion, or module:function of your own
    seed: int = 0                # of weights, batches and noise

    def __post_init__(self):
        for f in fields(self):
            value, least = getattr(self, f.name), 0 if f.name in ("sink", "seed") else 1
            require(f.type is not int or value >= least, f"{f.name}={value} must be {least} or more")
            require(f.type is not float or math.isfinite(value) or f.name == "beta", f"{f.name}={value} must be finite")
        require(self.seed < 2 ** 63, f"seed={self.seed} must be below 2^63")
        self.rows, self.cols = self.height // self.stride // 2, self.width // self.stride // 2      # of tokens
        self.tokens = self.rows * self.cols                             # N; a token covers 2 x 2 latent pixels
        self.latent = self.channels, 2 * self.rows, 2 * self.cols       # (C, h, w)
        self.head_dim = self.dim // self.heads                          # D
        for name, of, unit in (("clip", "chunk", self.chunk), ("sample_steps", "steps", self.steps),
                               ("height", "two latent pixels", 2 * self.stride), ("freq_dim", "sine and cosine", 2),
                               ("width", "two latent pixels", 2 * self.stride), ("dim", "2 heads", 2 * self.heads)):
            multiple(name, getattr(self, name), of, unit)
        require(self.window >= self.sink + self.chunk, f"window={self.window} cannot hold sink={self.sink} and "
                f"chunk={self.chunk}: try --window {self.sink + 2 * self.chunk}")
        require(self.head_dim >= 6, f"dim={self.dim} over heads={self.heads} leaves {self.head_dim} channels a head: "
                "3-D RoPE needs 6, try fewer --heads")
        require(self.channels <= 3 * self.stride ** 2, f"channels={self.channels} is more than the "
                f"{3 * self.stride ** 2} numbers in a patch of {self.stride} x {self.stride} pixels")
        require(self.tilt in ("student", "critic"), f"tilt={self.tilt} must be student or critic")
        for k in ("alpha", "drop_caption", "ema"):
            require(0 <= getattr(self, k) <= 1, f"{k}={getattr(self, k)} must lie between 0 and 1")
        for k in ("beta", "shift", "rope_base", "teacher_lr", "ode_lr", "student_lr", "critic_lr"):
            require(getattr(self, k) > 0, f"{k}={getattr(self, k)} must be above 0 (for plain DMD: --beta inf)")
        self.sigmas = [shift_sigma(1 - i / self.steps, self.shift) for i in range(self.steps)]

    def chunks_in(self, frames):
        """Chunks that make this many video frames. BadInput with the nearest numbers that work."""
        of = "chunk" if self.time_stride == 1 else "chunk * time_stride"
        return multiple("frames", frames, of, self.chunk * self.time_stride, self.time_stride - 1)


def multiple(name, value, of, unit, extra=0):
    count, over = divmod(value + extra, unit)
    if value < 1 or over:
        raise BadInput(f"{name}={value} is not a multiple of {of}={unit}{f' less {extra}' if extra else ''}: "
                       f"try {f'{value - over} or ' if value > over else ''}{max(value - over, -extra) + unit}")
    return count


PRESETS = {
    "toy": Config(),
    "full": Config(dim=1536, ffn_dim=8960, heads=12, layers=30, freq_dim=256, rope_base=10000.0,
                   text_dim=4096, text_len=512, height=480, width=832, stride=8, time_stride=4, window=9,
                   alpha=0.99, shift=5.0, clip=21, guidance=3.0, beta=0.5),                     # Wan2.1-T2V-1.3B
}


# ------------------------------------------------------------------------------------------------------------ Data
def read_frames(path, size):
    """An animated picture, or a still strip of square frames: (F, 3, height, width) uint8; size is (width, height)."""
    with Image.open(path) as image:
        frames = [frame.convert("RGB") for frame in ImageSequence.Iterator(image)]
    if len(frames) == 1:
        (wide, high), side = frames[0].size, min(frames[0].size)
        frames = [frames[0].crop((x, y, x + side, y + side))
                  for y in range(0, high - side + 1, side) for x in range(0, wide - side + 1, side)]
    return torch.from_numpy(np.stack([ImageOps.fit(frame, size) for frame in frames])).permute(0, 3, 1, 2).contiguous()


def load_clips(folder, cfg):
    """(clips, captions): a list of (F, 3, height, width) uint8 and one string each, as FOLDER/captions.json lists.
    BadInput that names the file: a missing or wrong list, a caption without its clip, a broken or short clip."""
    listing, clips = Path(folder) / "captions.json", []
    try:
        # + "": TypeError if it is not text
        listed = [(Path(folder) / entry["file"], entry["caption"] + "") for entry in json.loads(listing.read_text())]
        require(listed, f"{listing} is empty: list your clips in it")
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise BadInput(f"{listing} must be a list of {{\"file\": ..., \"caption\": ...}} ({error!r}): write it anew")
    for path, caption in listed:
        try:
            clips.append(read_frames(path, (cfg.width, cfg.height)))
        except Exception as error:                                      # Pillow raises many kinds on a broken file
            raise BadInput(f"the clip of {caption!r}, {path}, cannot be read ({error}): replace or unlist it")
        require(len(clips[-1]) >= cfg.clip, f"{path} has {len(clips[-1])} frames and a training clip {cfg.clip}: "
                "use a longer one or a smaller --clip")
    return clips, [caption for _, caption in listed]


def to_bytes(pixels):
    """[-1, 1] to uint8."""
    return ((pixels + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


class PatchCodec:
    """The toy's VAE: principal components of stride x stride pixel patches, found in closed form.

    encode: frames (B, F, 3, height, width) uint8 -> latents (B, F, C, h, w) float, unit variance on average.
    decode: the inverse, as near as C components allow. Another codec needs only decode to stream (WanCodec).
    """
    def __init__(self, cfg, state):
        require(cfg.time_stride == 1, f"time_stride={cfg.time_stride} is for the full size's VAE: try --time-stride 1")
        self.stride, self.state = cfg.stride, state

    @classmethod
    def fit(cls, cfg, clips):
        codec = cls(cfg, {})
        pixels = torch.cat([codec.patches(clip[None]).flatten(0, 3) for clip in clips])
        variance, basis = torch.linalg.eigh(torch.cov(pixels.double().T))   # ascending
        variance, basis = variance.flip(0)[:cfg.channels], basis.flip(1)[:, :cfg.channels]
        # Between plain PCA (details too faint to learn) and whitening (noise as loud as colour): divide by sqrt(std).
        scale = variance.clamp_min(1e-8) ** 0.25
        scale *= (variance / scale ** 2).mean().sqrt()
        codec.state = {"mean": pixels.mean(0), "basis": basis.float(), "scale": scale.float()}
        return codec

    def patches(self, frames):
        """(B, F, h, w, 3*stride*stride) in [-1, 1]"""
        return F.pixel_unshuffle(frames.float() / 127.5 - 1, self.stride).permute(0, 1, 3, 4, 2)

    def encode(self, frames):
        z = (self.patches(frames) - self.state["mean"]) @ self.state["basis"] / self.state["scale"]
        return z.permute(0, 1, 4, 2, 3).contiguous()

    def decode(self, latents, memory=None):
        """memory, a dict that lives as long as a stream, is for codecs whose frames depend on earlier ones."""
        z = latents.float().cpu().permute(0, 1, 3, 4, 2)
        x = (z * self.state["scale"]) @ self.state["basis"].T + self.state["mean"]
        x = F.pixel_shuffle(x.flatten(0, 1).permute(0, 3, 1, 2), self.stride)
        return to_bytes(x.unflatten(0, latents.shape[:2]))


class WordText:
    """The toy's text encoder: one-hot words, so that the model's first text layer is one learned token per word."""
    def __init__(self, cfg, captions):
        self.cfg, self.words = cfg, sorted({word for caption in captions for word in caption.lower().split()})
        count = len(self.words)
        require(count <= cfg.text_dim, f"the captions use {count} different words: try --text-dim {count}")

    def __call__(self, captions):
        """Captions to (B, text_len, text_dim); "" is the null caption of guidance. BadInput for an unknown word."""
        features = torch.zeros(len(captions), self.cfg.text_len, self.cfg.text_dim)
        for row, caption in zip(features, captions):
            words = caption.lower().split()
            require(len(words) <= self.cfg.text_len, f"{caption!r} has {len(words)} words and room is for "
                    f"{self.cfg.text_len}: shorten it or raise --text-len")
            for token, word in zip(row, words):
                require(word in self.words, f"the word {word!r} is not known; the words are: {', '.join(self.words)}")
                token[self.words.index(word)] = 1
        return features


# ---------------------------------------------------------------------------------------------------------- Layers
@functools.cache
def rope_table(frames, rows, cols, head_dim, base, device="cpu"):
    """(2, frames*rows*cols, 1, D/2): cosine and sine of each token's angles, token order frame, row, column.
    The D/2 pairs are split into three bands, for frame, row and column (44, 42 and 42 of 128 channels)."""
    band = 2 * (head_dim // 6)
    grid = torch.cartesian_prod(torch.arange(frames), torch.arange(rows), torch.arange(cols)).double()
    angles = torch.cat([grid[:, axis, None] * base ** -(torch.arange(0, size, 2).double() / size)
                        for axis, size in enumerate((head_dim - 2 * band, band, band))], 1)[:, None]
    return torch.stack([angles.cos(), angles.sin()]).float().to(device)


def rotate(x, table):
    """RoPE: turn each (even, odd) channel pair of x (..., T, H, D) by the table's angles, in float32 or better."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = table
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2).type_as(x)


def patchify(x):
    """(B, F, C, h, w) -> (B, F, N, C*4), each vector in the order (C, ph, pw)."""
    return F.pixel_unshuffle(x, 2).flatten(3).mT


def unpatchify(x, rows):
    """(B, F, N, 4*C) -> (B, F, C, h, w), each vector in the order (ph, pw, C): not the one that goes in."""
    x = x.unflatten(3, (2, 2, -1)).unflatten(2, (rows, -1))             # (B, F, rows, cols, ph, pw, C)
    return x.permute(0, 1, 6, 2, 4, 3, 5).flatten(5, 6).flatten(3, 4)


class Attention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = nn.RMSNorm(dim, eps=1e-6), nn.RMSNorm(dim, eps=1e-6)   # over all heads at once

    def query(self, x):
        return self.norm_q(self.q(x)).unflatten(-1, (self.heads, -1))                     # (B, T, H, D)

    def key_value(self, x):
        return self.norm_k(self.k(x)).unflatten(-1, (self.heads, -1)), self.v(x).unflatten(-1, (self.heads, -1))

    def forward(self, q, k, v):
        out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return self.o(out.transpose(1, 2).flatten(2))                                     # (B, T, H*D)


def modulated_norm(x, shift, scale):
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


class Block(nn.Module):
    def __init__(self, dim, ffn_dim, heads):
        super().__init__()
        self.self_attn, self.cross_attn = Attention(dim, heads), Attention(dim, heads)
        self.norm3 = nn.LayerNorm(dim, eps=1e-6)
        self.ffn = nn.Sequential(nn.Linear(dim, ffn_dim), nn.GELU("tanh"), nn.Linear(ffn_dim, dim))
        self.modulation = nn.Parameter(torch.randn(1, 6, dim) / dim ** 0.5)
        self.modulation.data[:, [2, 5]] += 0.3                              # gates: start with open branches

    def forward(self, x, time, prompt, rope, layer, cache):
        """x (B, F, N, dim); time (B, 1, 6, dim); prompt: this layer's cross-attention key and value."""
        shift1, scale1, gate1, shift2, scale2, gate2 = (self.modulation + time).unsqueeze(2).unbind(3)
        h = modulated_norm(x, shift1, scale1).flatten(1, 2)                               # (B, F*N, dim)
        q, (k, v) = self.self_attn.query(h), self.self_attn.key_value(h)
        q, k, v = cache.attend(layer, q, k, v) if cache else (rotate(q, rope), rotate(k, rope), v)
        x = x + gate1 * self.self_attn(q, k, v).view_as(x)
        x = x + self.cross_attn(self.cross_attn.query(self.norm3(x).flatten(1, 2)), *prompt).view_as(x)
        return x + gate2 * self.ffn(modulated_norm(x, shift2, scale2))


class Head(nn.Module):
    def __init__(self, dim, out):
        super().__init__()
        self.head = nn.Linear(dim, out)
        self.modulation = nn.Parameter(torch.randn(1, 2, dim) / dim ** 0.5)

    def forward(self, x, time):
        shift, scale = (self.modulation + time.unsqueeze(2)).unsqueeze(2).unbind(3)
        return self.head(modulated_norm(x, shift, scale))


# ---------------------------------------------------------------------------------------------------- EMASinkCache
class EMASinkCache:
    """What a causal stream remembers: S sink frames and the last W - S - L, as keys and values of every layer.

    A frame that leaves the window is not dropped but folded into the sink, token by token, in every layer:
        sink <- alpha sink + (1 - alpha) leaving            (Reward Forcing, EMA-Sink; alpha = 1 is a static sink)
    Frame f folds into slot f mod S. The sink starts as the first S frames. It accumulates in float32: in bf16 an
    update with alpha = 0.999 would mostly round away.
    Keys are kept before RoPE and rotated anew for every chunk, to their place in the window: positions never run out.
    Memory is constant however long the stream. What the cache keeps carries no gradient.

    One chunk: any number of passes (each calls attend in every layer), then append.
    """
    def __init__(self, cfg, batch, device="cpu", dtype=torch.float32):
        def zeros(*shape, dtype=dtype):
            return torch.zeros(*shape, cfg.heads, cfg.head_dim, device=device, dtype=dtype)
        self.cfg = cfg
        # frame f >= S is in slot f mod slots of `recent`; one slot more than stay, for the frame that is leaving
        self.slots = cfg.window - cfg.sink - cfg.chunk + 1
        self.sink = zeros(2, cfg.layers, batch, cfg.sink, cfg.tokens, dtype=torch.float32)      # 2: keys, values
        self.recent = zeros(2, cfg.layers, batch, self.slots, cfg.tokens)
        self.staged = [None] * cfg.layers   # keys and values of the newest pass, not rotated
        # what attention reads, keys rotated: two tensors a layer, so that a compiled pass writes them in place
        self.context = [[zeros(batch, cfg.window * cfg.tokens) for _ in range(2)] for _ in range(cfg.layers)]
        self.rope = rope_table(cfg.window, cfg.rows, cfg.cols, cfg.head_dim, cfg.rope_base, device)
        self.seen = 0                       # frames appended so far
        self.updates = 0                    # of which folded into the sink
        self.length = 0                     # tokens of context for the coming chunk

    def attend(self, layer, q, k, v):
        """q, k, v (B, L*N, H, D) of the chunk -> rotated q, and k, v with the context in front. Stages k, v."""
        end = self.length + q.shape[1]
        here = self.rope[:, self.length:end]
        keys, values = self.context[layer]
        self.staged[layer] = k, v
        q, k = rotate(q, here), rotate(k, here)
        if torch.is_grad_enabled():         # what carries gradient cannot be written in place
            return q, torch.cat([keys[:, :self.length], k], 1), torch.cat([values[:, :self.length], v], 1)
        keys[:, self.length:end], values[:, self.length:end] = k, v
        return q, keys[:, :end], values[:, :end]

    @torch.no_grad()
    def append(self):
        """Keep the newest pass's keys and values, which must be those of the clean chunk (sigma = 0), evict what that
        pushes out of the window, and rotate what stays, once for all passes of the coming chunk."""
        new = torch.stack([torch.stack(pair) for pair in self.staged], 1).unflatten(3, (self.cfg.chunk, -1))
        for frame in new.unbind(3):
            store = self.sink if self.seen < self.cfg.sink else self.recent     # the sink starts as the first S frames
            store[:, :, :, self.seen % store.shape[3]] = frame
            self.seen += 1
            if self.seen - self.slots >= self.cfg.sink:
                self.evict(self.seen - self.slots)
        held = range(max(self.cfg.sink, self.seen - self.slots + 1), self.seen)
        parts = [self.sink[:, :, :, :self.seen], *(self.recent[:, :, :, f % self.slots, None] for f in held)]
        for layer, (keys, values) in enumerate(self.context):
            k, v = torch.cat([part[:, layer].type_as(keys) for part in parts], 2).flatten(2, 3)
            self.length = k.shape[1]                                # (B, length, H, D)
            keys[:, :self.length], values[:, :self.length] = rotate(k, self.rope[:, :self.length]), v

    def evict(self, frame):
        """Fold frame number `frame`, the oldest that is not in the sink, into the sink; without a sink it is lost."""
        if self.cfg.sink:
            slot = self.sink[:, :, :, frame % self.cfg.sink]
            slot.lerp_(self.recent[:, :, :, frame % self.slots].float(), 1 - self.cfg.alpha)
            self.updates += 1


# ------------------------------------------------------------------------------------------------ VideoTransformer
class VideoTransformer(nn.Module):
    """Wan2.1's text-to-video transformer (2503.20314), its parameter names included: toy, teacher, critic and student.

    prompt = model.embed_text(text), text (B, T, text_dim) being what a text encoder made of the captions.
    model(x, sigma, prompt) sees the whole clip: bidirectional, the teacher and the critic.
    model(x, sigma, prompt, cache) sees the cached past and its own chunk: causal, the student.
    """
    def __init__(self, cfg):
        super().__init__()
        self.cfg, dim = cfg, cfg.dim
        self.patch_embedding = nn.Conv3d(cfg.channels, dim, (1, 2, 2), (1, 2, 2))
        self.text_embedding = nn.Sequential(nn.Linear(cfg.text_dim, dim), nn.GELU("tanh"), nn.Linear(dim, dim))
        self.time_embedding = nn.Sequential(nn.Linear(cfg.freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.blocks = nn.ModuleList(Block(dim, cfg.ffn_dim, cfg.heads) for _ in range(cfg.layers))
        self.head = Head(dim, cfg.channels * 4)
        nn.init.zeros_(self.head.head.weight)                               # starts by predicting no velocity
        nn.init.zeros_(self.head.head.bias)

    def embed_text(self, text):
        """(B, T <= text_len, text_dim) -> every layer's cross-attention key and value; once per prompt.
        Shorter text is padded with zeros before the text layers, so padding is a constant token that is attended to."""
        text = F.pad(text, (0, 0, 0, self.cfg.text_len - text.shape[1])).to(self.patch_embedding.weight)
        text = self.text_embedding(text)
        return [block.cross_attn.key_value(text) for block in self.blocks]

    def embed_sigma(self, sigma):
        """[cos | sin] of 1000 sigma at freq_dim/2 frequencies, computed in float64."""
        half = self.cfg.freq_dim // 2
        freqs = 10000.0 ** (-torch.arange(half, device=sigma.device, dtype=torch.float64) / half)
        angles = 1000 * sigma.double()[..., None] * freqs
        return torch.cat([angles.cos(), angles.sin()], -1).to(self.patch_embedding.weight.dtype)

    def forward(self, x, sigma, prompt, cache=None):
        """Velocity (B, F, C, h, w) at x of the same shape and dtype, at sigma (B,)."""
        time = self.time_embedding(self.embed_sigma(sigma))[:, None]        # (B, 1, dim): all frames alike
        modulation = self.time_projection(time).unflatten(-1, (6, -1))      # (B, 1, 6, dim)
        cfg = self.cfg
        rope = None if cache else rope_table(x.shape[1], cfg.rows, cfg.cols, cfg.head_dim, cfg.rope_base, x.device)
        weight, bias = self.patch_embedding.weight, self.patch_embedding.bias
        h = F.linear(patchify(x).to(weight.dtype), weight.flatten(1), bias)     # the convolution as a matrix product
        for layer, block in enumerate(self.blocks):
            h = block(h, modulation, prompt[layer], rope, layer, cache)
        return unpatchify(self.head(h, time), cfg.rows).type_as(x)


# ------------------------------------------------------------------------------------------------ Reward, measures
COLOURS = {"red": (242, 51, 38), "green": (51, 217, 64), "blue": (64, 102, 255), "yellow": (255, 217, 38)}
SHAPES = ("circle", "square", "triangle")


def track(frames):
    """Find the one bright object in frames (B, F, 3, height, width) uint8.

    Returns mask (B, F, height, width) in [0, 1], how much of each pixel it covers; centre (B, F, 2), x and y in px;
    colour (B, F, 3) in [0, 1]. The ground is the frame's median colour. A frame without an object has an empty mask
    and its centre in the middle of the picture.
    """
    pixels = frames.float() / 255
    ground = pixels.flatten(3).median(3).values[..., None, None]
    distance = (pixels - ground).square().sum(2).sqrt()
    peak = distance.flatten(2).max(2).values[..., None, None]
    core = (distance > 0.5 * peak).float()[:, :, None]
    colour = (pixels * core).flatten(3).sum(3) / core.flatten(3).sum(3).clamp_min(1)
    axis = colour[..., None, None] - ground                                 # from ground to object
    cover = ((pixels - ground) * axis).sum(2) / axis.square().sum(2).clamp_min(1e-6)
    mask = torch.where((cover > 0.1) & (peak > 0.2), cover.clamp(0, 1), 0.0)
    weight = mask + 1e-6
    rows, cols = (torch.arange(n, device=frames.device) + 0.5 for n in mask.shape[2:])
    centre = torch.stack([(weight.sum(2) * cols).sum(2), (weight.sum(3) * rows).sum(2)], -1)
    return mask, centre / weight.sum((2, 3))[..., None], colour


def overlap(a, b):
    """Soft intersection over union of masks (..., height, width), in [0, 1]; two empty masks overlap 0."""
    return torch.minimum(a, b).sum((-2, -1)) / torch.maximum(a, b).sum((-2, -1)).clamp_min(1e-6)


def shape_overlaps(mask, centre):
    """(B, F, 3): the overlap of each mask with a circle, square and triangle of its own area and centre."""
    rows, cols = (torch.arange(n, device=mask.device) + 0.5 for n in mask.shape[2:])
    dx, dy = cols - centre[..., 0, None, None], rows[:, None] - centre[..., 1, None, None]
    area = mask.sum((2, 3))[..., None, None]
    circle = (area / math.pi).sqrt() - (dx ** 2 + dy ** 2).sqrt()           # how far inside the edge, in px
    square = area.sqrt() / 2 - torch.maximum(dx.abs(), dy.abs())
    triangle = (area / (0.75 * math.sqrt(3))).sqrt() / 2 - torch.maximum(dy, math.sqrt(3) / 2 * dx.abs() - dy / 2)
    return torch.stack([overlap(mask, (inside + 0.5).clamp(0, 1)) for inside in (circle, square, triangle)], -1)


def motion_reward(frames, captions=None, span=2):
    """(B,): how far the object gets, in px per frame, counting only clean motion. Any callable like this will do.

    Over `span` frames: (net / span) (net / path) overlap^2, the mean over all starts. net is the straight distance,
    path the way taken there, so jitter earns little; overlap is that of each mask, moved along, with the next one, so
    what does not keep its form, flickers or breaks up earns little too.
    """
    mask, centre, _ = track(frames)
    step = centre.diff(dim=1)                                               # (B, F-1, 2)
    shift = -2 * step / torch.tensor([mask.shape[3], mask.shape[2]], device=mask.device)
    move = torch.cat([torch.eye(2, device=mask.device).expand(*step.shape, 2), shift[..., None]], 3).flatten(0, 1)
    before = mask[:, :-1].flatten(0, 1)[:, None]
    moved = F.grid_sample(before, F.affine_grid(move, before.shape, align_corners=False), align_corners=False)
    same = overlap(moved[:, 0].unflatten(0, step.shape[:2]), mask[:, 1:])   # (B, F-1)
    same, path = (x.unfold(1, span, 1).mean(-1) for x in (same, step.norm(dim=-1)))       # (B, F-span), per frame
    net = (centre[:, span:] - centre[:, :-span]).norm(dim=-1) / span
    return (net ** 2 / path.clamp_min(1e-3) * same ** 2).mean(1)


def find_reward(name, clips, captions, cfg):
    """The reward called `name`, shifted and scaled to mean 0 and deviation 1 over the data's training clips.

    "motion", or "module:function" of the user's own: (frames (B, F, 3, height, width) uint8, captions) -> (B,).
    """
    pieces = [(piece, caption) for clip, caption in zip(clips, captions)
              for piece in clip.split(cfg.clip) if len(piece) == cfg.clip]
    try:
        reward = torch.no_grad()(motion_reward if name == "motion" else pkgutil.resolve_name(name))
        scores = reward(torch.stack([piece for piece, _ in pieces]), [caption for _, caption in pieces])
        mean, deviation = scores.mean(), scores.std()
        if scores.shape != (len(pieces),) or not deviation > 1e-6:
            raise ValueError(f"{len(pieces)} clips gave {tuple(scores.shape)} numbers of deviation {deviation:.3g}")
    except Exception as error:                                              # whatever the user's module raises
        raise BadInput(f"--reward {name} cannot be used ({error}): give motion or module:function, and "
                       "clips that it tells apart")
    return lambda frames, captions: (reward(frames, captions) - mean) / deviation


def measure(frames, captions, cfg, first=None):
    """Five numbers about decoded frames (B, F, 3, height, width) uint8, means over the B clips.

    colour  fraction of frames whose object is nearest, by angle in RGB, to the captioned one (None if none is)
    shape   fraction of frames whose object overlaps the captioned shape best (None if no caption names one)
    speed   px per frame that the object's centre moves
    copy    mean over frames W and later (at least the last L) of the largest correlation, over pixels, with a frame of
            the first chunk; given `first`, a chunk from earlier in the stream, mean over all frames with that instead
    drift   standard deviation over some 30 equal segments (of L frames or more, so fewer in a short clip) of the
            quality, which is 100 times the overlap with the captioned shape, or with the best one (after the paper's)
    """
    def wanted(names):                                                      # (B,) index of the captioned name, else -1
        return torch.tensor([next((i for i, n in enumerate(names) if n in c.lower().split()), -1) for c in captions])

    def rate(best, target):
        named, best = target >= 0, torch.where(mask.sum((2, 3)) > 0, best, -1)     # nothing there is wrong
        return (best[named] == target[named, None]).float().mean().item() if named.any() else None

    def unit(x):                                                            # inner products are then correlations
        x = x.float().flatten(2)
        return F.normalize(x - x.mean(2, keepdim=True), dim=2)
    mask, centre, colour = track(frames)
    hues = F.normalize(torch.tensor(list(COLOURS.values())).float(), dim=1)
    overlaps, shape = shape_overlaps(mask, centre), wanted(SHAPES)
    quality = torch.where(shape[:, None] >= 0, overlaps[torch.arange(len(shape)), :, shape], overlaps.max(2).values)
    segment = max(cfg.chunk, frames.shape[1] // 30)
    later = frames if first is not None else frames[:, min(cfg.window, frames.shape[1] - cfg.chunk):]
    similarity = unit(later) @ unit(frames[:, :cfg.chunk] if first is None else first).mT
    return {"colour": rate((F.normalize(colour, dim=2) @ hues.T).argmax(2), wanted(COLOURS)),
            "shape": rate(overlaps.argmax(2), shape),
            "speed": centre.diff(dim=1).norm(dim=-1).mean().item(),
            "copy": similarity.max(2).values.mean().item(),
            "drift": 100 * quality.unfold(1, segment, segment).mean(2).std(1, correction=0).mean().item()}


# --------------------------------------------------------------------------------------------------------- Rollout
def rollout(student, text, cfg, draw, chunks=None, exit_step=None, cache=None):
    """Yield clean latent chunks (B, L, C, h, w), one after the other: training, evaluation and streaming are this.

    draw() gives noise (B, L, C, h, w); chunks=None goes on for ever. Each chunk starts from noise at sigma = 1, then
    predicts x0 and re-noises it with fresh noise, step by step; before the next one is begun, a pass on the clean x0 at
    sigma = 0 writes the cache (Self Forcing, 2506.08009). exit_step stops the denoising there and, where gradients are
    on, lets that step alone carry them: its x0 is the training sample.
    """
    learn = exit_step is not None and torch.is_grad_enabled()
    with torch.set_grad_enabled(learn):
        prompt = student.embed_text(text)
    like = prompt[0][0]                             # of the batch, device and dtype of all that follows
    sigmas = torch.tensor(cfg.sigmas + [0.0], device=like.device)[:, None].expand(-1, len(like))
    levels = sigmas[:-1] if exit_step is None else sigmas[:exit_step + 1]
    cache = cache or EMASinkCache(cfg, len(like), like.device, like.dtype)
    for n in itertools.count() if chunks is None else range(chunks):
        if n:                                       # only now, so that chunk n - 1 is seen before its cache pass is run
            with torch.no_grad():
                student(x0.detach(), sigmas[-1], prompt, cache)
            cache.append()
        for step, sigma in enumerate(levels):
            xt = add_noise(x0, draw(), sigma) if step else draw()
            with torch.set_grad_enabled(learn and step == exit_step):
                x0 = recover_x0(xt, student(xt, sigma, prompt, cache), sigma)
        yield x0


# ---------------------------------------------------------------------------------------------------------- Losses
def flow_matching_loss(model, x0, prompt, sigma, noise, weight=1.0):
    """Mean of weight (v - (noise - x0))^2: x0 (B, F, C, h, w), sigma and weight (B,), prompt from model.embed_text."""
    velocity = model(add_noise(x0, noise, sigma), sigma, prompt)
    return (weight * (velocity - (noise - x0)).square().flatten(1).mean(1)).mean()


critic_loss = flow_matching_loss    # the critic is a flow model of the student's samples


def critic_weight(reward, beta):
    """exp(-reward / beta) for each sample (B,), of mean 1 over the batch: --tilt critic, which goes beyond the paper.

    Where critic and teacher agree DMD's gradient is zero, however it is weighted: Re-DMD chooses what is mended first,
    not where training ends. A critic trained with these weights models student * exp(-reward / beta); unweighted DMD
    makes that equal to the teacher, so training ends at student = teacher * exp(reward / beta), the paper's own target.
    """
    return len(reward) * torch.softmax(-reward / beta, 0)


def guided_x0(teacher, xt, sigma, text, guidance):
    """The teacher's x0 with classifier-free guidance, cond + guidance (cond - uncond); no text is all zeros."""
    xt, sigma, text = xt.repeat(2, 1, 1, 1, 1), sigma.repeat(2), torch.cat([text, torch.zeros_like(text)])
    cond, uncond = recover_x0(xt, teacher(xt, sigma, teacher.embed_text(text)), sigma).chunk(2)
    return cond + guidance * (cond - uncond)


def dmd_gradient(x, x0_real, x0_fake):
    """(x0_fake - x0_real) / mean|x - x0_real|: where a sample should not go (DMD2, 2405.14867). All (B, F, C, h, w).

    x is the student's sample, x0_real the teacher's and x0_fake the critic's denoising of a noised x.
    The mean is over all but the batch. Zero where critic and teacher agree.
    """
    normaliser = (x - x0_real).abs().mean(tuple(range(1, x.dim())), keepdim=True)
    return (x0_fake - x0_real) / normaliser.clamp_min(1e-8)


def redmd_loss(x, gradient, reward, beta):
    """Half the mean of exp(reward / beta) (x - stopgrad(x - gradient))^2, reward (B,): one weight per sample.
    Its derivative in x is exp(reward / beta) gradient / x.numel() (Reward Forcing, Re-DMD). beta = inf is plain DMD."""
    return (torch.exp(reward / beta) * (x - (x - gradient).detach()).square().flatten(1).mean(1)).mean() / 2


# ------------------------------------------------------------------------------------- Optimiser, checkpoint, log
class Muon(torch.optim.Optimizer):
    """Momentum for matrices, orthogonalised by five Newton-Schulz steps (K. Jordan, 2024): every direction moves alike.

    Written out because torch has it from 2.9 on only, and to take all matrices of one shape through together.
    """
    @torch.no_grad()
    def step(self):
        lr, shapes = self.param_groups[0]["lr"], {}
        for p in self.param_groups[0]["params"]:
            shapes.setdefault(p.shape, []).append(p)
        for (rows, cols), params in shapes.items():
            grad = torch.stack([p.grad for p in params])
            momentum = self.state[params[0]].setdefault("momentum", torch.zeros_like(grad)).lerp_(grad, 0.05)
            x = grad.lerp(momentum, 0.95)
            x = F.normalize(x.mT if rows > cols else x, dim=(1, 2), eps=1e-30)
            for _ in range(5):
                gram = x @ x.mT                             # x <- (3.4445 - 4.7750 gram + 2.0315 gram^2) x
                x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
            for p, direction in zip(params, x.mT if rows > cols else x):
                p.mul_(1 - 0.01 * lr).sub_(direction, alpha=lr * max(1, rows / cols) ** 0.5)


def make_optimizers(model, lr):
    matrices = [p for p in model.blocks.parameters() if p.dim() == 2]
    chosen = set(matrices)
    others = [p for p in model.parameters() if p not in chosen]
    # Neither sees a gradient's scale, so of the reward weights only the ratios matter. Hence the small eps, too:
    # exp(reward / beta) scales gradients by many orders, and a larger one would silently stop the steps.
    return [Muon(matrices, {"lr": lr}),
            torch.optim.AdamW(others, lr / 10, betas=(0.9, 0.95), eps=1e-20, weight_decay=0.01)]


def update(model, loss, max_norm):
    """One step of the model's optimizers down the gradient of loss, clipped to max_norm; returns the norm before."""
    model.zero_grad()
    loss.backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    for optimizer in model.optimizers:
        optimizer.step()
    return norm.item()


def seeded(*what, device="cpu"):
    """A generator whose noise depends on `what` alone: a step needs no history, so a resumed run repeats it exactly."""
    return torch.Generator(device).manual_seed(zlib.crc32("/".join(map(str, what)).encode()))


def write_safely(path, write):
    """write(temporary path), then rename: a run killed at any moment leaves the old file or the new one, whole."""
    temporary = path.with_name("." + path.name)                             # Pillow goes by the suffix
    write(temporary)
    os.replace(temporary, path)


def write_json(path, content):
    """Write content, numpy's numbers included, as JSON; returns the text."""
    text = json.dumps(content, indent=1, default=float) + "\n"
    write_safely(path, lambda p: p.write_text(text))
    return text


def make_writable(folder):
    """Make the folder if need be. BadInput if nothing can be written there."""
    try:
        (folder / ".writable").mkdir(parents=True, exist_ok=True)
        (folder / ".writable").rmdir()
    except OSError as error:
        raise BadInput(f"--out {folder} cannot be written ({error.strerror}): choose another folder")


def load_checkpoint(path, given, free=()):
    """The checkpoint's dict, or None if there is no such file. BadInput if it is damaged, or, with what differs, if its
    config is not as `given` in fields that are not `free`; a field that it does not have is at its default."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        there = state["config"] = asdict(Config()) | state["config"]        # KeyError if it is another program's
    except FileNotFoundError:
        return None
    except Exception as error:                                              # torch raises many kinds on a broken file
        raise BadInput(f"{path} is damaged or not a checkpoint ({str(error)[:100]!r}): delete it to train again")
    if differ := [f"{k}={there.get(k)} there and {v} here" for k, v in given.items()
                  if k not in free and there.get(k) != v]:
        raise BadInput(f"{path} was made with another config ({', '.join(differ)}): match it or choose another --out")
    return state


class Run:
    """A training run in the folder `out`: its data, its models so far, its checkpoint and its log.

    state, which is what checkpoint.pt holds: config (with a checksum of the data), words, codec; models: the weights of
    every finished stage; seconds: what each took so far; log; partial: step, models, optimisers of the stage under way.
    """
    def __init__(self, cfg, out, data, device):
        self.cfg, self.out, self.data, self.device = cfg, Path(out), data, device
        self.clips, self.captions = load_clips(data, cfg)
        self.prompts = list(dict.fromkeys(self.captions))                   # every caption once
        self.reward = find_reward(cfg.reward, self.clips, self.captions, cfg)
        self.text = WordText(cfg, self.captions)
        self.text(self.captions)                                            # refuse a caption that is too long now
        checksum = zlib.crc32(b"".join(clip.numpy().tobytes() for clip in self.clips) + str(self.captions).encode())
        config = {**asdict(cfg), "data": checksum}
        self.path = self.out / "checkpoint.pt"
        self.state = load_checkpoint(self.path, config) or {
            "config": config, "models": {}, "seconds": {}, "log": [], "partial": None, "words": self.text.words,
            "codec": PatchCodec.fit(cfg, self.clips).state}
        self.codec = PatchCodec(cfg, self.state["codec"])
        self.began = time.time()                                            # of the stage under way

    def save(self):
        """Checkpoint and log together: a killed run leaves no log lines of steps that will be taken again."""
        write_safely(self.path, lambda path: torch.save(self.state, path))
        lines = "".join(json.dumps(row) + "\n" for row in self.state["log"])
        write_safely(self.out / "log.jsonl", lambda path: path.write_text(lines))

    def model(self, name=None, lr=None):
        """A new VideoTransformer, fresh or with the weights of a finished stage; given lr, to be trained."""
        torch.manual_seed(self.cfg.seed)
        model = VideoTransformer(self.cfg).to(self.device).requires_grad_(lr is not None)
        if name:
            model.load_state_dict(self.state["models"][name])
        model.optimizers = make_optimizers(model, lr) if lr else []
        return model

    def noise(self, generator, batch, frames):
        return torch.randn(batch, frames, *self.cfg.latent, generator=generator).to(self.device)

    def noise_levels(self, generator, batch):
        """(B,) random levels of the schedule, one in each equal slice of it."""
        even = (torch.arange(batch) + torch.rand(batch, generator=generator)) / batch
        return shift_sigma(even, self.cfg.shift).to(self.device)

    def train(self, stage, steps, models):
        """Yield (step, generator, log) `steps` times: the caller takes the step and puts {name: number} into log.

        Goes on where the checkpoint stopped; the last of models is the stage's result. FloatingPointError, naming the
        step, if a logged number is not finite.
        """
        optimizers = [optimizer for model in models for optimizer in model.optimizers]
        state, parts, start = self.state, [*models, *optimizers], 0
        if state["partial"]:
            start, self.began = state["partial"]["step"], time.time() - state["seconds"][stage]
            for part, saved in zip(parts, state["partial"]["parts"]):
                part.load_state_dict(saved)
        for step in (bar := tqdm(range(start, steps), stage, initial=start, total=steps)):
            for o in optimizers:
                o.param_groups[0]["lr"] = o.defaults["lr"] * min(1, (step + 1) / 20) * (1 - step / steps)
            yield step, seeded(self.cfg.seed, stage, step), (log := {})
            last = step + 1 == steps
            keep = last or (step + 1) % max(1, steps // 20) == 0                # some 20 checkpoints a stage
            if keep:
                log["weights"] = sum(p.norm().item() for model in models for p in model.parameters())
            if wrong := [name for name, number in log.items() if not math.isfinite(number)]:
                raise FloatingPointError(f"{stage} step {step}: {', '.join(wrong)} is not finite; a smaller learning "
                                         "rate, or a larger beta, in another --out may help")
            if last or step % 10 == 0:
                bar.set_postfix(log)
                state["log"].append({"stage": stage, "step": step, **log})
            if last:
                state["models"][stage], state["partial"] = models[-1].state_dict(), None
            elif keep:
                state["partial"] = {"step": step + 1, "parts": [part.state_dict() for part in parts]}
            if keep:
                state["seconds"][stage] = time.time() - self.began
                self.save()
        self.began = time.time()


# ------------------------------------------------------------------------------------------------- Training stages
def train_teacher(run):
    """Stage 1: a bidirectional model learns the data by flow matching, now and then without its caption."""
    cfg, teacher = run.cfg, run.model(lr=run.cfg.teacher_lr)
    for _, g, log in run.train("teacher", cfg.teacher_steps, [teacher]):
        captions, crops = [], []
        for i, flip in zip(torch.randint(len(run.clips), (cfg.teacher_batch,), generator=g).tolist(),
                           torch.rand(cfg.teacher_batch, generator=g) < 0.5):
            start = torch.randint(len(run.clips[i]) - cfg.clip + 1, (1,), generator=g).item()
            crop = run.clips[i][start:start + cfg.clip]
            crops.append(crop.flip(-1) if flip else crop)
            captions.append(run.captions[i] if torch.rand(1, generator=g) >= cfg.drop_caption else "")
        x0 = run.codec.encode(torch.stack(crops)).to(run.device)
        sigma, noise = run.noise_levels(g, len(x0)), run.noise(g, *x0.shape[:2])
        loss = flow_matching_loss(teacher, x0, teacher.embed_text(run.text(captions)), sigma, noise)
        log.update(loss=loss.item(), grad_norm=update(teacher, loss, 1.0))


@torch.no_grad()
def teacher_trajectory(teacher, noise, text, cfg):
    """The guided teacher's path from noise (B, F, C, h, w) to video: (B, steps + 1, F, C, h, w), clean frames last.

    sample_steps Euler steps; kept are the points at the student's sigmas.
    """
    sigmas = shift_sigma(torch.linspace(1, 0, cfg.sample_steps + 1), cfg.shift).tolist()
    x, points = noise, []
    for i, (sigma, after) in enumerate(tqdm(list(zip(sigmas, sigmas[1:])), "teacher samples", leave=False)):
        if i % (cfg.sample_steps // cfg.steps) == 0:
            points.append(x)
        x0 = guided_x0(teacher, x, torch.full((len(x),), sigma, device=x.device), text, cfg.guidance)
        x = x0 + (x - x0) * after / sigma
    return torch.stack(points + [x], 1)


def train_ode(run):
    """Stage 2: the causal student, started from the teacher, learns to jump to the end of the teacher's trajectories.

    Each chunk has its own noise level; its context is the trajectory's clean end, through the cache as in streaming.
    """
    cfg, student = run.cfg, run.model("teacher", lr=run.cfg.ode_lr)
    text = run.text([run.prompts[i % len(run.prompts)] for i in range(cfg.ode_clips)])
    noise = run.noise(seeded(cfg.seed, "trajectories"), cfg.ode_clips, cfg.clip)
    paths = teacher_trajectory(run.model("teacher"), noise, text, cfg).unflatten(2, (-1, cfg.chunk))
    sigmas = torch.tensor(cfg.sigmas, device=run.device)
    for _, g, log in run.train("ode", cfg.ode_steps, [student]):
        picked = torch.randint(cfg.ode_clips, (cfg.ode_batch,), generator=g)
        prompt, cache = student.embed_text(text[picked]), EMASinkCache(cfg, cfg.ode_batch, run.device)
        losses = []
        for chunk in range(cfg.clip // cfg.chunk):
            if chunk:
                with torch.no_grad():
                    student(clean, torch.zeros_like(sigma), prompt, cache)
                cache.append()
            level = torch.randint(cfg.steps, (cfg.ode_batch,), generator=g)
            xt, clean, sigma = paths[picked, level, chunk], paths[picked, -1, chunk], sigmas[level]
            x0 = recover_x0(xt, student(xt, sigma, prompt, cache), sigma)
            losses.append((x0 - clean).square().mean())
        loss = torch.stack(losses).mean()
        log.update(loss=loss.item(), grad_norm=update(student, loss, 1.0))


def train_student(run, watch=lambda step, average: None):
    """Stage 3: Re-DMD on the student's own rollouts. A critic, started from the teacher, learns what the student makes;
    the student moves away from the critic and towards the teacher, most where a sample was rewarded."""
    cfg, teacher, average = run.cfg, run.model("teacher"), run.model("ode")
    student, critic = run.model("ode", lr=cfg.student_lr), run.model("teacher", lr=cfg.critic_lr)
    judge = lambda x, captions: run.reward(run.codec.decode(x.detach()), captions).to(run.device)     # (B,)

    def sample(g):
        """Rollouts x (B, F, C, h, w), all stopped at one random step; their captions, text, noise and the cache."""
        captions = [run.prompts[i] for i in torch.randint(len(run.prompts), (cfg.distill_batch,), generator=g)]
        exit_step = torch.randint(cfg.steps, (1,), generator=g).item()
        cache, text = EMASinkCache(cfg, cfg.distill_batch, run.device), run.text(captions)
        draw = lambda: run.noise(g, cfg.distill_batch, cfg.chunk)
        x = torch.cat(list(rollout(student, text, cfg, draw, cfg.clip // cfg.chunk, exit_step, cache)), 1)
        sigma, noise = run.noise_levels(g, len(x)).clamp(0.02, 0.98), run.noise(g, *x.shape[:2])    # as DMD clamps
        return x, captions, text, sigma, noise, cache

    for step, g, log in run.train("student", cfg.distill_steps, [student, critic, average]):      # the average streams
        critic_losses = []
        for _ in range(cfg.critic_ratio):
            with torch.no_grad():
                x, captions, text, sigma, noise, _ = sample(g)
            weight = critic_weight(judge(x, captions), cfg.beta) if cfg.tilt == "critic" else 1.0
            loss = critic_loss(critic, x, critic.embed_text(text), sigma, noise, weight)
            update(critic, loss, 1.0)
            critic_losses.append(loss.item())

        x, captions, text, sigma, noise, cache = sample(g)
        reward = judge(x, captions)
        with torch.no_grad():
            xt = add_noise(x, noise, sigma)
            x0_real = guided_x0(teacher, xt, sigma, text, cfg.guidance)
            x0_fake = recover_x0(xt, critic(xt, sigma, critic.embed_text(text)), sigma)
        beta = cfg.beta if cfg.tilt == "student" else math.inf
        loss, weight = redmd_loss(x, dmd_gradient(x, x0_real, x0_fake), reward, beta), torch.exp(reward / beta)
        norm = update(student, loss, 10.0)                                  # the public code's limit
        for mean, new in zip(average.parameters(), student.parameters()):
            mean.lerp_(new.detach(), 1 - min(cfg.ema, (step + 1) / (step + 4)))    # a shorter memory at first
        log.update(loss=loss.item(), critic=sum(critic_losses) / cfg.critic_ratio, reward=reward.mean().item(),
                   weight_min=weight.min().item(), weight_max=weight.max().item(), grad_norm=norm,
                   gap=(x0_real - x0_fake).abs().mean().item(), sink_updates=cache.updates)
        watch(step, average)


# ------------------------------------------------------------------------------------------------------- Streaming
def stream(student, codec, text, cfg, captions, frames=None, seed=0):
    """Yield decoded frames (B, F, 3, height, width) uint8 chunk by chunk, as each is done; frames=None: for ever.

    codec (None: latents, not decoded) and text as PatchCodec and WordText. BadInput unless frames make whole chunks.
    """
    chunks, device = None if frames is None else cfg.chunks_in(frames), student.patch_embedding.weight.device
    generator, shape = seeded(seed, "stream", device=device), (len(captions), cfg.chunk, *cfg.latent)
    draw = lambda: torch.randn(shape, generator=generator, device=device)
    memory = {}                                                             # what the codec keeps of earlier frames
    for latents in rollout(student, text(captions), cfg, draw, chunks):
        yield codec.decode(latents, memory) if codec else latents


def save_gif(path, videos, scale=3):
    """Videos (B, F, 3, height, width) uint8 in a grid as one GIF or WebP of 16.7 frames per second."""
    columns = min(4, len(videos))
    videos = torch.cat([videos, torch.zeros_like(videos[:-len(videos) % columns])])       # black fills the last row
    grid = videos.unflatten(0, (-1, columns)).permute(2, 0, 4, 1, 5, 3)     # (F, rows, height, columns, width, 3)
    frames = grid.flatten(3, 4).flatten(1, 2).numpy()
    first, *rest = [ImageOps.scale(Image.fromarray(frame), scale, Image.NEAREST) for frame in frames]
    write_safely(path, lambda p: first.save(p, save_all=True, append_images=rest, duration=60, loop=0))


def save_mp4(path, chunks, width, height):
    """Pipe chunks (1, F, 3, height, width) uint8 through ffmpeg as they come, for 16 frames per second."""
    command = f"ffmpeg -y -v error -f rawvideo -pix_fmt rgb24 -s {width}x{height} -r 16 -i - -pix_fmt yuv420p".split()
    with contextlib.suppress(BrokenPipeError), subprocess.Popen([*command, path], stdin=subprocess.PIPE) as ffmpeg:
        for frames in chunks:
            ffmpeg.stdin.write(frames[0].permute(0, 2, 3, 1).contiguous().numpy().tobytes())
    require(ffmpeg.returncode == 0, f"ffmpeg could not write {path}: see its message above")


def save_report(path, rows, captions, shown=4, frames=6):
    """One picture: for each name in rows, videos (B, F, 3, height, width), `frames` frames of `shown` captions."""
    evenly = lambda count, of: torch.linspace(0, of - 1, count).round().long()
    picked = evenly(shown, len(captions))
    cells = torch.stack([videos[picked][:, evenly(frames, videos.shape[1])] for videos in rows.values()])
    cells = cells.permute(0, 4, 1, 2, 5, 3).flatten(3, 4)                   # (rows, height, shown, frames * width, 3)
    cells = F.pad(cells, (0, 0, 0, 3, 0, 0, 0, 2), value=255).flatten(2, 3).flatten(0, 1).numpy()
    grid = ImageOps.scale(Image.fromarray(cells), 3, Image.NEAREST)
    left, top = 6 * max(len(line) for name in rows for line in name.split("\n")) + 12, 18
    page = Image.new("RGB", (left + grid.width, top + grid.height), "white")
    pen = ImageDraw.Draw(page)
    for i, caption in enumerate(picked):
        pen.text((left + i * grid.width // shown, 3), captions[caption], "black")
    for i, name in enumerate(rows):
        middle = top + (2 * i + 1) * grid.height // (2 * len(rows))
        pen.text((4, middle - 6 * (1 + name.count("\n"))), name, "black")
    page.paste(grid, (left, top))
    write_safely(path, page.save)


def print_table(rows):
    """rows: {label: {column: text}}, all with the same columns."""
    table = [["", *next(iter(rows.values()))], *([label, *row.values()] for label, row in rows.items())]
    widths = [max(map(len, column)) for column in zip(*table)]
    for label, *cells in table:
        print(label.ljust(widths[0]) + "".join(cell.rjust(width + 2) for cell, width in zip(cells, widths[1:])))


def report(run, frames):
    """Stage 4: sample the captions four times from teacher and students, stream each of them, measure, draw."""
    cfg, prompts, began = run.cfg, run.prompts[:12], time.time()            # the toy has twelve
    captions, part = prompts * 4, min(60, frames)                           # part: frames at either end of the stream
    text, noise = run.text(captions), run.noise(seeded(cfg.seed, "report"), len(captions), cfg.clip)
    videos = {"teacher": run.codec.decode(teacher_trajectory(run.model("teacher"), noise, text, cfg)[:, -1])}
    for name in ("ode", "student"):
        g = seeded(cfg.seed, "renoise")                                     # chunks start from the teacher's noise
        draws = (draw for start in noise.split(cfg.chunk, 1)
                 for draw in (start, *(run.noise(g, len(captions), cfg.chunk) for _ in range(cfg.steps - 1))))
        latents = rollout(run.model(name), text, cfg, draws.__next__, cfg.clip // cfg.chunk)
        videos[name] = run.codec.decode(torch.cat(list(latents), 1))
    streaming = time.time()
    chunks = stream(run.model("student"), run.codec, run.text, cfg, prompts, frames, cfg.seed)
    streamed = torch.cat(list(tqdm(chunks, "stream", cfg.chunks_in(frames))), 1)
    streaming = time.time() - streaming

    examples = [[clip for clip, caption in zip(run.clips, run.captions) if caption == prompt] for prompt in prompts]
    data = torch.stack([clips[len(clips) // 2][:cfg.clip] for clips in examples])
    whole = torch.stack([clip[:min(map(len, run.clips))] for clip in run.clips])
    metrics = {"data": measure(whole, run.captions, cfg),
               **{name: measure(video, captions, cfg) for name, video in videos.items()},
               "stream": {**measure(streamed, prompts, cfg), "first": measure(streamed[:, :part], prompts, cfg),
                          "last": measure(streamed[:, -part:], prompts, cfg, streamed[:, :cfg.chunk])},
               "parameters": sum(p.numel() for p in run.model().parameters())}
    loss = "DMD" if cfg.beta == math.inf else "Re-DMD" if cfg.tilt == "student" else "tilted critic"
    rows = dict(zip(("data", "teacher", "student, ODE", f"student, {loss}"), metrics.values()))
    save_report(run.out / "report.png", dict(zip(rows, [data, *videos.values()])), prompts)
    for name, video in (("teacher", videos["teacher"]), ("student", videos["student"]), ("stream", streamed)):
        save_gif(run.out / f"{name}.gif", video[:len(prompts)])
    metrics["seconds"] = {**run.state["seconds"], "stream": streaming, "report": time.time() - began}
    write_json(run.out / "metrics.json", metrics)
    rows |= {f"stream, {end} {part}": metrics["stream"][end] for end in ("first", "last")}
    print_table({label: {k: "-" if x is None else f"{x:.3f}" for k, x in row.items()} for label, row in rows.items()})
    print(f"{len(prompts)} streams of {frames} frames in {streaming:.1f} s: {frames / streaming:.0f} frames per second "
          f"of each. report.png, the GIFs and metrics.json are in {run.out}")


# -------------------------------------------------------------------------------------------------------- Ablation
SINKS = {"none": {"sink": 0}, "static": {"alpha": 1.0}, "EMA": {}}
LOSSES = {"DMD": {"tilt": "student", "beta": math.inf}, "Re-DMD": {"tilt": "student"}}
VARIANTS = {f"{loss}, {sink}": LOSSES[loss] | SINKS[sink] for loss in LOSSES for sink in SINKS}
VARIANTS["tilted critic, EMA"] = {"tilt": "critic"}
ALPHAS, BETAS = (1.0, 0.999, 0.99, 0.9, 0.5), (math.inf, 1.0, 0.5, 0.2)
SEEDS = range(40, 50)                                                       # the toy was tuned on smaller ones
STUDENT_T = (math.inf, 12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)     # two-sided 95 %, by n - 1
MARGINS = {"higher": lambda new, old: new - old, "lower": lambda new, old: old - new,           # above zero if it is so
           "10 % higher": lambda new, old: new - 1.1 * old, "not 0.03 lower": lambda new, old: new - old + 0.03}
CLAIMS = (("EMA", "static", "speed", "higher"), ("EMA", "static", "copy", "lower"),     # new, old, measure, margin
          ("EMA", "none", "drift", "lower"), ("EMA", "none", "speed", "higher"),
          ("Re-DMD", "DMD", "speed", "higher"), ("Re-DMD", "DMD", "speed", "10 % higher"),
          ("Re-DMD", "DMD", "shape", "not 0.03 lower"),
          ("tilted critic", "DMD", "speed", "higher"), ("tilted critic", "Re-DMD", "speed", "higher"))


def interval(numbers):
    """(mean, half of its 95 % confidence interval) over seeds, by Student's t."""
    n = len(numbers)
    return np.mean(numbers), STUDENT_T[n - 1] * np.std(numbers, ddof=1) / n ** 0.5 if n > 1 else math.inf


def distil(of, name, cfg, frames):
    """Train one student, in a worker process, and stream it; returns what ablation.json holds of it.

    of: what makes the Run; name and cfg are the student's. That of the first seed also saves what the picture shows.
    """
    run, course = Run(*of), {}
    run.cfg, run.save, run.state["partial"] = cfg, lambda: None, None       # the same teacher, for another student

    def watched(student, cfg, frames, repeats):
        captions = run.prompts * repeats
        videos = torch.cat(list(stream(student, run.codec, run.text, cfg, captions, frames, cfg.seed)), 1)
        return videos, {**measure(videos, captions, cfg), "reward": run.reward(videos, captions).mean().item()}

    def watch(step, average):
        if name.endswith("EMA") and (step + 1) % max(1, cfg.distill_steps // 4) == 0:
            course[str(step + 1)] = watched(average, cfg, 4 * cfg.window // cfg.chunk * cfg.chunk, 1)[1]["speed"]
    train_student(run, watch)
    student = run.model("student")
    videos, numbers = watched(student, cfg, frames, 2)
    if cfg.seed == SEEDS[0]:
        torch.save(videos[:len(run.prompts), torch.linspace(0, frames - 1, 12).long()], run.out / f"ablation/{name}.pt")
        if name == "Re-DMD, EMA":
            numbers["alphas"] = {str(alpha): watched(student, replace(cfg, alpha=alpha), frames, 1)[1]["speed"]
                                 for alpha in ALPHAS}
    return {"variant": name, "seed": cfg.seed, **numbers, "course": course}


def start_worker():
    """Take one thread, and end when the parent has ended, however it did: nobody waits for this student then."""
    torch.set_num_threads(1)
    threading.Thread(target=lambda: parent_process().join() or os._exit(1), daemon=True).start()


def ablate(run, seeds, frames):
    """Distil one ODE student with every loss and sink, over seeds, and other betas once; stream each with its sink.

    Writes ablation.json (every student; one that is there is not trained again), ablation.png and ablation_curves.png,
    and in the folder ablation/ the frames that the picture shows. Up to 8 students at a time, one to a thread.
    """
    cfg, path = run.cfg, run.out / "ablation.json"
    (run.out / "ablation").mkdir(exist_ok=True)
    betas = {beta: f"beta {beta:g}" for beta in BETAS} | {math.inf: "DMD, EMA", cfg.beta: "Re-DMD, EMA"}
    variants = VARIANTS | {name: {"beta": beta, "tilt": "student"} for beta, name in betas.items()}
    empty = {"config": run.state["config"], "frames": frames, "students": {}}
    done = {}
    with contextlib.suppress(ValueError):
        done = json.loads(path.read_text()) if path.exists() else empty
    require(isinstance(done, dict) and {**done, "students": {}} == empty,
            f"{path} is damaged, or of another config or --frames: delete it or choose another --out")
    jobs = {f"{name}, seed {seed}": (name, replace(cfg, seed=seed, **variants[name]))
            for seed in SEEDS[:seeds] for name in (variants if seed == SEEDS[0] else VARIANTS)}
    os.environ["TQDM_DISABLE"] = "1"                                        # no bars in the workers, which inherit it
    with ProcessPoolExecutor(min(8, torch.get_num_threads()), get_context("spawn"), start_worker) as pool:
        try:
            futures = {pool.submit(distil, (cfg, run.out, run.data, run.device), *job, frames): key
                       for key, job in jobs.items() if key not in done["students"]}
            for future in tqdm(as_completed(futures), "ablation", len(jobs), initial=len(jobs) - len(futures)):
                done["students"][futures[future]] = future.result()
                write_json(path, done)
        except BrokenExecutor:
            raise BadInput("a worker was killed, perhaps for want of memory: the same command goes on from what is "
                           "saved, and with OMP_NUM_THREADS=1 trains one student at a time")
        except BaseException:                                               # Ctrl-C, say: do not wait for the others
            for worker in active_children():
                worker.terminate()
            raise
    summarise(run, {name: [done["students"][key] for key in jobs if jobs[key][0] == name] for name in variants}, betas)


def summarise(run, runs, betas):
    """Print means with 95 % intervals, and for each claim whether that of its margin, paired (the same seed on both
    sides), lies above zero; draw the pictures.

    runs: {variant: [what ablation.json holds of a student, by seed]}; betas: {beta: its variant}.
    """
    names = [name for name in ("speed", "reward", "copy", "drift", "colour", "shape")
             if runs["DMD, EMA"][0][name] is not None]
    texts = {variant: {name: "{:.3f} +- {:.3f}".format(*interval([student[name] for student in runs[variant]]))
                       for name in names} for variant in VARIANTS}
    print(f"{run.cfg.distill_steps} student steps, {len(runs['DMD, EMA'])} seeds: mean and 95 % interval")
    print_table(texts)
    for new, old, name, how in (claim for claim in CLAIMS if claim[2] in names):
        # a sink is compared under both losses, one number a seed; a loss with the EMA sink
        pairs = [(f"{x}, {new}", f"{x}, {old}") for x in LOSSES] if new in SINKS else [(f"{new}, EMA", f"{old}, EMA")]
        mean, half = interval(np.mean([[MARGINS[how](x[name], y[name]) for x, y in zip(runs[a], runs[b])]
                                       for a, b in pairs], 0))
        claim = f"{new} against {old}: {name} is {how}"
        print(f"{claim:48} {mean:+.3f} +- {half:.3f}  {'shown' if mean > half else 'not shown'}")

    rows = {"\n".join([variant, *(f"{name} {texts[variant][name]}" for name in names[:4])]):
            torch.load(run.out / f"ablation/{variant}.pt", weights_only=True) for variant in VARIANTS}
    save_report(run.out / "ablation.png", rows, run.prompts, shown=2, frames=12)
    save_curves(run.out / "ablation_curves.png", {
        "speed against alpha, one seed": {"": {x: [speed] for x, speed in runs["Re-DMD, EMA"][0]["alphas"].items()}},
        "speed against beta, one seed": {
            "": {f"{beta:g}": [runs[betas[beta]][0]["speed"]] for beta in sorted(betas, reverse=True)}},
        "speed against step": {
            variant: {step: [student["course"][step] for student in students] for step in students[0]["course"]}
            for variant, students in runs.items() if students[0]["course"]}})


def save_curves(path, panels, width=330, height=220):
    """One picture of small plots: means and 95 % intervals; one without bound, of a single number, is not drawn.
    panels: {title: {curve: {x label: numbers}}}, x in order."""
    page = Image.new("RGB", (width * len(panels), height), "white")
    pen = ImageDraw.Draw(page)
    for left, (title, curves) in zip(range(40, page.width, width), panels.items()):
        pen.text((left, 4), title, "black")
        bars = [np.nan_to_num([interval(numbers) for numbers in curve.values()], posinf=0) for curve in curves.values()]
        ends = [mean + side * half for mean, half in np.concatenate(bars) for side in (-1, 1)]
        low, scale = min(ends) - 0.02, (height - 70) / (max(ends) - min(ends) + 0.04)
        for top, colour, name, bar in zip((16, 26, 36), ("black", "firebrick", "royalblue"), curves, bars):
            line = [(left + 10 + j * (width - 90) // max(1, len(bar) - 1), height - 40 - (mean - low) * scale)
                    for j, (mean, _) in enumerate(bar)]
            pen.line(line, colour, 2)
            pen.text((left, top), name, colour)
            for (x, y), label, (mean, half) in zip(line, curves[name], bar):
                pen.line([(x, y - half * scale), (x, y + half * scale)], colour)
                pen.text((x - 8, height - 30), label, "black")
                pen.text((x + 3, y - 12), f"{mean:.2f}", colour)
    write_safely(path, page.save)


# ------------------------------------------------------------------------------------------------------- Full size
def load_weights(model, path):
    """Give a model built on the meta device the weights in path, mapped from the file rather than copied.

    path: a trainer's checkpoint (.pt: generator_ema, else generator, "model." before every name), or a Wan2.1 folder
    of safetensors, one file or shards. BadInput that names a missing, extra or misshapen tensor.
    """
    try:
        if path.is_dir():
            from safetensors.torch import load_file
            state = {name: tensor for file in path.glob("*.safetensors") for name, tensor in load_file(file).items()}
        else:
            state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
            state = state["generator_ema" if "generator_ema" in state else "generator"]
            state = {name.removeprefix("model."): tensor for name, tensor in state.items()}
        model.load_state_dict(state, assign=True)
    except Exception as error:                                              # each format raises its own kinds
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:500]
        raise BadInput(f"--weights {path} cannot be read or do not fit ({reason}): give this model's, a trainer's .pt "
                       "or a folder of safetensors (pip install safetensors)")


@torch.no_grad()
def wan_text(captions, folder, cfg, device, dtype):
    """Captions to (B, text_len, text_dim), zero where there is no token. UMT5-XXL, from the Diffusers folder of Wan2.1,
    is loaded, used and freed in this one call."""
    from transformers import AutoTokenizer, UMT5EncoderModel
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    encoder = UMT5EncoderModel.from_pretrained(folder / "text_encoder", dtype=dtype).to(device).eval()
    tokens = tokenizer([" ".join(caption.split()) for caption in captions], return_tensors="pt", truncation=True,
                       padding="max_length", max_length=cfg.text_len).to(device)
    features = encoder(tokens.input_ids, tokens.attention_mask).last_hidden_state
    return features * tokens.attention_mask[..., None]


class WanCodec:
    """Wan2.1's VAE, from its Diffusers folder; without a folder with random weights, which are as fast."""
    def __init__(self, folder, device, dtype):
        from diffusers import AutoencoderKLWan as Wan
        vae = Wan.from_pretrained(folder, subfolder="vae", torch_dtype=dtype) if folder else Wan().to(dtype)
        self.vae = vae.to(device).eval().requires_grad_(False)
        self.mean, self.std = (torch.tensor(numbers, device=device).view(-1, 1, 1)
                               for numbers in (vae.config.latents_mean, vae.config.latents_std))

    def decode(self, latents, memory):
        """(B, F, 16, h, w) -> (B, 4 F, 3, 8 h, 8 w) uint8, 3 frames fewer at the start of a stream.

        The VAE is causal and decodes one latent frame at a time; memory carries its convolutions' past from call to
        call, so that decoding chunk by chunk equals decoding the whole.
        """
        z = self.vae.post_quant_conv((latents * self.std + self.mean).transpose(1, 2).to(self.vae.dtype))
        pixels = []
        with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):    # one head, too wide for the others
            for frame in z.split(1, 2):
                if first := not memory:
                    self.vae.clear_cache()
                    memory["past"] = self.vae._feat_map
                pixels.append(self.vae.decoder(frame, feat_cache=memory["past"], feat_idx=[0], first_chunk=first))
        return to_bytes(torch.cat(pixels, 2).transpose(1, 2).float())


def seconds_of(work, times):
    """(times,) the seconds of each call of work(), until a GPU has finished what it was given."""
    clock = [time.perf_counter()]
    for _ in range(times):
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        clock.append(time.perf_counter())
    return np.diff(clock)


def fastest_attention(cfg, device, dtype):
    """Of the attentions that plain PyTorch offers here the fastest on one layer's pass in a full window."""
    q, k, text = (torch.randn(1, cfg.heads, tokens, cfg.head_dim, device=device, dtype=dtype)
                  for tokens in (cfg.chunk * cfg.tokens, cfg.window * cfg.tokens, cfg.text_len))
    both = lambda: [F.scaled_dot_product_attention(q, kv, kv) for kv in (k, text)]
    seconds = {}
    for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION):
        with sdpa_kernel(backend), contextlib.suppress(RuntimeError):       # raised where a backend is not offered
            seconds[backend] = np.median(seconds_of(both, 5))
    return min(seconds, key=seconds.get, default=SDPBackend.MATH)           # slow and large: only where nothing else is


def pass_flops(cfg):
    """Floating point operations of one pass in a full window, counted by PyTorch on shapes alone."""
    with torch.device("meta"), torch.no_grad():
        student, cache = VideoTransformer(cfg), EMASinkCache(cfg, 1, "meta")
        cache.length = (cfg.window - cfg.chunk) * cfg.tokens
        prompt = student.embed_text(torch.zeros(1, cfg.text_len, cfg.text_dim))     # once per stream, so not counted
        with FlopCounterMode(display=False) as counter:
            student(torch.zeros(1, cfg.chunk, *cfg.latent), torch.zeros(1), prompt, cache)
    return counter.get_total_flops()


# ------------------------------------------------------------------------------------------------------------ Main
def parse(argv):
    """(arguments, {config field: value given}); ArgumentError for a bad value, BadInput for an unknown flag."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--toy", action="store_true", help="train what --out lacks, stream, write the report")
    parser.add_argument("--stream", action="store_true", help="stream --prompt from the checkpoint in --out")
    parser.add_argument("--ablate", action="store_true", help="with --toy: every loss and sink over --seeds, compared")
    parser.add_argument("--seeds", type=int, default=5, choices=range(1, len(SEEDS) + 1), help="seeds of --ablate")
    parser.add_argument("--bench", action="store_true", help="measure speed on random weights; writes bench.json")
    parser.add_argument("--preset", choices=PRESETS, default="toy", help="of --stream and --bench; full is the 1.3B")
    parser.add_argument("--full", dest="preset", action="store_const", const="full", help="the same as --preset full")
    parser.add_argument("--weights", type=Path, help="with --full: a trainer's .pt, or a Wan2.1 folder of safetensors")
    parser.add_argument("--wan", type=Path, help="with --full: Diffusers folder of Wan2.1-T2V-1.3B (text encoder, VAE)")
    parser.add_argument("--compile", action="store_true", help="compile the student: slow to start, faster to run")
    parser.add_argument("--prompt", help="what to stream")
    parser.add_argument("--frames", type=int, help="video frames to stream [toy: 240, full: 81]")
    parser.add_argument("--out", type=Path, default="out", help="folder of the checkpoint and of all that is written")
    parser.add_argument("--data", default=Path(__file__).parent / "tiny_data", help="folder of clips and captions.json")
    helps = dict(re.findall(r"^    (\w+): .*?# (.*)$", inspect.getsource(Config), re.M))
    for f in fields(Config):
        parser.add_argument(f"--{f.name.replace('_', '-')}", type=f.type, default=argparse.SUPPRESS,
                            help=f"{helps[f.name]} [toy: {f.default}]")
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        near = difflib.get_close_matches(unknown[0].split("=")[0], parser._option_string_actions, 1)
        raise BadInput(f"there is no {unknown[0]}: " + (f"did you mean {near[0]}?" if near else "see --help"))
    args.frames = {"toy": 240, "full": 81}[args.preset] if args.frames is None else args.frames
    return args, {f.name: getattr(args, f.name) for f in fields(Config) if f.name in args}


def open_student(args, given, device, dtype):
    """(student, codec, text, cfg, attention to use); whatever text is asked, it answers args.prompt's features.

    --stream takes the toy of args.out, whose alpha, sink, window and seed may differ from training, or the full size of
    args.weights and args.wan; --bench needs no trained weights and encodes no text.
    """
    if args.stream and args.preset == "toy":
        path = args.out / "checkpoint.pt"
        state = load_checkpoint(path, given, free=("alpha", "sink", "window", "seed"))
        require(state and "student" in state["models"],
                f"{path} holds no trained student yet: run it with --toy --out {args.out} first")
        cfg = Config(**{f.name: state["config"][f.name] for f in fields(Config)} | given)
        features = WordText(cfg, state["words"])([args.prompt])
        student, codec = VideoTransformer(cfg), PatchCodec(cfg, state["codec"])
        student.load_state_dict(state["models"]["student"])
    else:
        cfg = replace(PRESETS[args.preset], **given)
        if args.stream:
            cfg.chunks_in(args.frames)                                      # refused before anything is loaded
            require(args.weights and args.wan,
                    "--full --stream needs --weights and --wan (see --help); --full --bench needs neither")
        with torch.device("meta" if args.weights else "cpu"):               # without, random ones, which are as fast
            student = VideoTransformer(cfg).to(dtype)
        if args.weights:
            load_weights(student, args.weights)
        codec = (PatchCodec.fit(cfg, load_clips(args.data, cfg)[0]) if args.preset == "toy" else
                 WanCodec(args.wan, device, dtype) if args.wan or importlib.util.find_spec("diffusers") else None)
        features = (wan_text([args.prompt], args.wan, cfg, device, dtype) if args.stream
                    else torch.zeros(1, cfg.text_len, cfg.text_dim))
    student.to(device, dtype)
    if args.compile:
        student.compile(fullgraph=True, dynamic=False)                      # a full window has one shape, so one graph
    backend = fastest_attention(cfg, device, dtype)
    print(f"attention {backend.name}{', compiled' if args.compile else ''}")
    return student, codec, lambda captions: features, cfg, backend


def stream_command(args, given, device, dtype):
    """Stream args.prompt: the toy from the checkpoint in args.out, the full size from args.weights and args.wan."""
    require(args.prompt, '--stream needs a --prompt, for example --prompt "a red circle"')
    student, codec, text, cfg, backend = open_student(args, given, device, dtype)
    chunks = stream(student, codec, text, cfg, [args.prompt], args.frames, cfg.seed)
    began, seconds = time.time(), []

    def clocked():
        for frames in map(torch.Tensor.cpu, tqdm(chunks, "stream", cfg.chunks_in(args.frames), unit="chunk")):
            seconds.append(time.time() - began)                             # .cpu() has waited for a GPU
            yield frames
    path = args.out / f"stream.{'gif' if args.preset == 'toy' else 'mp4' if shutil.which('ffmpeg') else 'webp'}"
    with sdpa_kernel(backend):
        if path.suffix == ".mp4":
            save_mp4(path, clocked(), cfg.width, cfg.height)
        else:
            save_gif(path, torch.cat(list(clocked()), 1), scale=max(1, 192 // cfg.width))
    print(f"{args.frames} frames in {seconds[-1]:.2f} s: {args.frames / seconds[-1]:.0f} frames per second, the first "
          f"after {seconds[0]:.2f} s. They are in {path}")


def bench(args, given, device, dtype, chunks=20):
    """Time streams with and without decoding; print and write bench.json. Text is not encoded."""
    student, codec, text, cfg, backend = open_student(args, given, device, dtype)
    fill = math.ceil(cfg.window / cfg.chunk)                                # chunks until every one updates the sink
    timed = lambda chunks, codec: seconds_of(stream(student, codec, text, cfg, [""]).__next__, chunks)
    with sdpa_kernel(backend):
        cold, warm, bare = timed(fill + 1, codec), timed(fill + chunks, codec), timed(fill + chunks, None)[fill:]
    n = 8192 if device == "cuda" else 1024
    a = torch.randn(n, n, device=device, dtype=dtype)
    roof = 2e-12 * n ** 3 / np.median(seconds_of(lambda: a @ a, 20))
    tflop, frames, seconds = pass_flops(cfg) / 1e12, cfg.chunk * cfg.time_stride, np.median(bare)
    pace = (cfg.steps + 1) * tflop / seconds
    if device == "cuda":
        name, peak = torch.cuda.get_device_name(), torch.cuda.max_memory_allocated()
    else:
        name, peak = "cpu", None
        with contextlib.suppress(ImportError):                              # Windows has none
            import resource
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    print(write_json(args.out / "bench.json", {
        "preset": args.preset, "attention": backend.name, "compiled": args.compile, "device": name,
        "threads": torch.get_num_threads(), "dtype": str(dtype), "torch": torch.__version__,
        "fps_transformer": frames / seconds, "fps_decoded": frames / np.median(warm[fill:]) if codec else None,
        "decoder": type(codec).__name__ if codec else "none: pip install diffusers",
        "first_chunk_seconds": warm[0], "chunk_seconds_median": seconds,
        "chunk_seconds_quartiles": np.quantile(bare, [0.25, 0.75]).tolist(), "chunks": chunks,
        "compile_and_warm_up_seconds": (cold - warm[:fill + 1]).sum(), "peak_memory_gb": peak and peak / 1e9,
        "tflop_per_pass": tflop, "tflop_per_second": pace, "matmul_tflop_per_second": roof,
        "fraction_of_matmul_rate": pace / roof}), end="")


def main(argv=None):
    """The command line; returns the exit code: 0, 1 if training failed, 2 for bad input, 130 if interrupted."""
    try:
        args, given = parse(argv)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = torch.bfloat16 if args.preset == "full" and device == "cuda" else torch.float32
        print(f"device {device} ({torch.get_num_threads()} threads), {dtype}, torch {torch.__version__}; config: the "
              f"{args.preset} preset" + "".join(f", {k}={v}" for k, v in given.items()))
        make_writable(args.out)
        if args.stream:
            stream_command(args, given, device, dtype)
        elif args.bench:
            bench(args, given, device, dtype)
        elif args.toy and args.preset == "toy":
            cfg = replace(PRESETS["toy"], **given)
            cfg.chunks_in(args.frames)
            require(not args.ablate or (cfg.beta < math.inf and cfg.sink and cfg.alpha < 1),
                    "--ablate wants a finite --beta, a --sink and an --alpha below 1: try 0.2, 3 and 0.9")
            run = Run(cfg, args.out, args.data, device)
            for stage, train in {"teacher": train_teacher, "ode": train_ode, "student": train_student}.items():
                if stage not in run.state["models"] and not (args.ablate and stage == "student"):   # it trains its own
                    train(run)
            ablate(run, args.seeds, args.frames) if args.ablate else report(run, args.frames)
        else:
            raise BadInput("say what to do: --toy trains and shows everything (--toy --ablate compares), --stream "
                           "streams from a checkpoint, --bench measures speed; --full goes with --stream or --bench")
        return 0
    except (BadInput, argparse.ArgumentError, OSError, ImportError, FloatingPointError, KeyboardInterrupt) as error:
        reason = str(error) or "stopped; with --toy the same command goes on from what is saved"
        if isinstance(error, ImportError):
            reason += ": the full size needs pip install diffusers transformers safetensors"
        print(f"reward_forcing: {reason}", file=sys.stderr)
        return {FloatingPointError: 1, KeyboardInterrupt: 130}.get(type(error), 2)


if __name__ == "__main__":
    sys.exit(main())
