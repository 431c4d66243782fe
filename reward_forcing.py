#!/usr/bin/env python3
# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6", "numpy", "tqdm", "pillow"]
# ///
"""Reward Forcing: a video model that generates for ever, in one file (after arXiv 2512.04678).

A *teacher* looks at a whole clip at once and needs many denoising steps. The *student* is the same transformer made
causal: it makes a few frames (a *chunk*) in 4 steps, attending to what it made before through a cache. Two ideas:
    EMA-Sink  frames that leave the attention window are folded into the oldest ones, the *sink*, by an exponential
              moving average:  sink <- alpha sink + (1 - alpha) leaving    -> class EMASinkCache
    Re-DMD    distribution matching distillation, each sample weighted by how well it moves:
              grad = exp(reward / beta) (x0_critic - x0_teacher) / mean|x - x0_teacher|   -> dmd_gradient, redmd_loss

    python reward_forcing.py --toy                                      # train teacher and student, stream, report
    python reward_forcing.py --stream --prompt "a red circle" --frames 240

How to read it: top to bottom. The model, the sink, the rollout and the losses are the paper, and "Training stages" puts
them together; the rest is plumbing.

    B batch   F frames   L frames per chunk   S sink frames   W window frames (sink and current chunk included)
    N tokens per frame   T tokens   H heads   D head dim   C channels   h, w latent rows and columns

Time: sigma in [0, 1], 1 is pure noise. x_t = (1 - sigma) x0 + sigma noise; the model predicts the velocity
v = noise - x0, so x0 = x_t - sigma v: see add_noise and recover_x0.

Papers: Reward Forcing 2512.04678; Self Forcing 2506.08009; DMD2 2405.14867; Wan2.1 2503.20314; Muon (K. Jordan, 2024).
"""
import argparse
import difflib
import importlib
import inspect
import itertools
import json
import math
import os
import re
import sys
import time
import zlib
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps, ImageSequence
from torch import nn
from tqdm import tqdm


# ---------------------------------------------------------------------------------------------------------- Config
class BadInput(Exception):
    """What the user gave cannot work; the message is one sentence that says how to mend it. Exit code 2."""


@dataclass
class Config:
    """Every field is a flag (--text-dim), and the comment beside it is the flag's help."""
    # the transformer
    dim: int = 128               # width of the transformer
    ffn_dim: int = 256           # width inside its feed-forward layers
    heads: int = 8               # attention heads
    layers: int = 4              # transformer blocks
    freq_dim: int = 64           # sinusoids that encode the noise level
    text_dim: int = 32           # features per text token; in the toy the largest number of different words
    text_len: int = 4            # text tokens, padding included
    channels: int = 16           # latent channels
    height: int = 24             # video height in pixels
    width: int = 24              # video width in pixels
    stride: int = 4              # pixels per latent pixel, in height and width
    # the stream
    chunk: int = 3               # L: frames generated together
    sink: int = 3                # S: frames of memory that never leave the window; 0 is no sink
    window: int = 9              # W: frames attention sees, sink and current chunk included
    alpha: float = 0.9           # what the sink keeps at each update; 1 is a static sink
    steps: int = 4               # denoising steps per chunk
    shift: float = 3.0           # bends the noise schedule towards noise: sigma = shift u / (1 + (shift - 1) u)
    # training
    clip: int = 12               # frames in a training clip; longer than the window, so that the sink is updated too
    teacher_steps: int = 1900    # training steps of the teacher
    teacher_batch: int = 8       # clips per teacher step
    teacher_lr: float = 0.08     # Muon's step; AdamW, on what is not a matrix in a block, takes a tenth of every lr
    drop_caption: float = 0.1    # how often the teacher sees no caption, which guidance needs
    sample_steps: int = 16       # Euler steps of the teacher when it generates; a multiple of steps
    guidance: float = 1.0        # x0 = cond + guidance (cond - uncond); 0 is none
    ode_clips: int = 192         # teacher trajectories that the student regresses
    ode_steps: int = 120         # training steps of that regression
    ode_batch: int = 16          # clips per regression step
    ode_lr: float = 0.02         # see teacher_lr
    distill_steps: int = 40      # student steps of Re-DMD
    distill_batch: int = 16      # rollouts per student or critic step
    critic_ratio: int = 3        # critic steps per student step
    student_lr: float = 0.006    # see teacher_lr
    critic_lr: float = 0.01      # see teacher_lr
    beta: float = 0.5            # temperature of the reward: weight = exp(reward / beta); inf is plain DMD
    ema: float = 0.9             # moving average of the student's weights, which is what streams
    reward: str = "motion"       # who judges (z-scored on the data): motion, or module:function of your own
    seed: int = 0                # of weights, batches and noise

    def __post_init__(self):
        for f in fields(self):
            least = {"sink": 0, "seed": 0}.get(f.name, 1)
            if f.type is int and getattr(self, f.name) < least:
                raise BadInput(f"{f.name}={getattr(self, f.name)} must be {least} or more")
        if self.window < self.sink + self.chunk:
            raise BadInput(f"window={self.window} cannot hold sink={self.sink} and chunk={self.chunk}: "
                           f"try --window {self.sink + 2 * self.chunk}")
        multiple("clip", self.clip, "chunk", self.chunk)
        multiple("sample_steps", self.sample_steps, "steps", self.steps)
        multiple("height", self.height, "two latent pixels", 2 * self.stride)
        multiple("width", self.width, "two latent pixels", 2 * self.stride)
        multiple("freq_dim", self.freq_dim, "sine and cosine", 2)
        multiple("dim", self.dim, "twice the heads", 2 * self.heads)
        if self.head_dim < 6:
            raise BadInput(f"dim={self.dim} over heads={self.heads} leaves {self.head_dim} channels a head: "
                           "3-D RoPE needs 6, try fewer --heads")
        if self.channels > 3 * self.stride ** 2:
            raise BadInput(f"channels={self.channels} is more than the numbers in a patch: try {3 * self.stride ** 2}")
        for name in ("alpha", "drop_caption", "ema"):
            if not 0 <= getattr(self, name) <= 1:
                raise BadInput(f"{name}={getattr(self, name)} must lie between 0 and 1")
        for name in ("beta", "shift"):
            if not getattr(self, name) > 0:
                raise BadInput(f"{name}={getattr(self, name)} must be above 0 (for plain DMD: --beta inf)")

    @property
    def rows(self): return self.height // self.stride // 2              # a token covers 2 x 2 latent pixels
    @property
    def cols(self): return self.width // self.stride // 2
    @property
    def tokens(self): return self.rows * self.cols                      # N
    @property
    def head_dim(self): return self.dim // self.heads                   # D
    @property
    def latent(self): return self.channels, 2 * self.rows, 2 * self.cols   # (C, h, w)
    @property
    def sigmas(self): return [shift_sigma(1 - i / self.steps, self.shift) for i in range(self.steps)]


def multiple(name, value, of, unit):
    if value < 1 or value % unit:
        below = value // unit * unit
        raise BadInput(f"{name}={value} is not a multiple of {of}={unit}: "
                       f"try {f'{below} or ' if below > 0 else ''}{max(below, 0) + unit}")


PRESETS = {
    "toy": Config(),
    "full": Config(dim=1536, ffn_dim=8960, heads=12, layers=30, freq_dim=256, text_dim=4096, text_len=512,
                   height=480, width=832, stride=8, alpha=0.99, shift=5.0, clip=21, guidance=3.0),   # Wan2.1-T2V-1.3B
}


# ----------------------------------------------------------------------------------------------------- Noise maths
def shift_sigma(u, shift):
    """u in [0, 1] to a noise level in [0, 1]; larger shifts spend more of the schedule near noise (SD3, 2403.03206)."""
    return shift * u / (1 + (shift - 1) * u)


def add_noise(x0, noise, sigma):
    return (1 - sigma) * x0 + sigma * noise


def recover_x0(xt, velocity, sigma):
    return xt - sigma * velocity


def per_sample(sigma, x):
    """(B,) to (B, 1, ..., 1), so that it multiplies x (B, ...)."""
    return sigma.view(-1, *[1] * (x.dim() - 1))


# ------------------------------------------------------------------------------------------------------------ Data
def read_frames(path, size):
    """An animated picture, or a still strip of square frames: (F, 3, height, width) uint8; size is (width, height)."""
    with Image.open(path) as image:
        frames = [frame.convert("RGB") for frame in ImageSequence.Iterator(image)]
    if len(frames) == 1:
        strip, side = frames[0], min(frames[0].size)
        starts = range(0, max(strip.size) - side + 1, side)
        corners = [(x, 0) if strip.width > side else (0, x) for x in starts]
        frames = [strip.crop((x, y, x + side, y + side)) for x, y in corners]
    frames = [frame if frame.size == size else ImageOps.fit(frame, size) for frame in frames]
    return torch.from_numpy(np.stack([np.asarray(frame) for frame in frames])).permute(0, 3, 1, 2).contiguous()


def load_clips(folder, cfg):
    """(clips, captions): a list of (F, 3, height, width) uint8 and one string each, as FOLDER/captions.json lists them.

    Raises BadInput that names the file for a missing list, a caption without its clip, and a broken or short clip.
    """
    folder, clips, captions = Path(folder), [], []
    try:
        entries = json.loads((folder / "captions.json").read_text())
        files = [(entry["file"] + "", entry["caption"] + "") for entry in entries]      # TypeError if not text
    except FileNotFoundError:
        raise BadInput(f"{folder} has no captions.json: it should hold a list of {{\"file\": ..., \"caption\": ...}}")
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise BadInput(f"{folder / 'captions.json'} is not a list of {{\"file\": ..., \"caption\": ...}} ({error!r})")
    if not files:
        raise BadInput(f"{folder / 'captions.json'} lists no clip: add at least one")
    for name, caption in files:
        try:
            frames = read_frames(folder / name, (cfg.width, cfg.height))
        except FileNotFoundError:
            raise BadInput(f"the caption {caption!r} has no clip: {folder / name} does not exist")
        except Exception as error:                                      # Pillow raises many kinds on a broken file
            raise BadInput(f"{folder / name} is not a picture that Pillow can read ({error}): replace or unlist it")
        if len(frames) < cfg.clip:
            raise BadInput(f"{folder / name} has {len(frames)} frames and a training clip {cfg.clip}: "
                           "use a longer one or a smaller --clip")
        clips.append(frames)
        captions.append(caption)
    return clips, captions


class PatchCodec:
    """The toy's VAE: principal components of stride x stride pixel patches, found in closed form.

    encode: frames (B, F, 3, height, width) uint8 -> latents (B, F, C, h, w) float, unit variance on average.
    decode: the inverse, as near as C components allow. Another codec needs only these two methods.
    """
    def __init__(self, cfg, state):
        self.cfg, self.state = cfg, state

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

    def patches(self, frames):                                          # (B, F, h, w, 3*stride*stride) in [-1, 1]
        s = self.cfg.stride
        x = (frames.float() / 127.5 - 1).unflatten(-1, (-1, s)).unflatten(-3, (-1, s))   # (B, F, 3, h, s, w, s)
        return x.permute(0, 1, 3, 5, 2, 4, 6).flatten(4)

    def encode(self, frames):
        z = (self.patches(frames) - self.state["mean"]) @ self.state["basis"] / self.state["scale"]
        return z.permute(0, 1, 4, 2, 3).contiguous()

    def decode(self, latents):
        latents = latents.float().cpu()
        s = self.cfg.stride
        x = (latents.permute(0, 1, 3, 4, 2) * self.state["scale"]) @ self.state["basis"].T + self.state["mean"]
        x = x.unflatten(-1, (3, s, s)).permute(0, 1, 4, 2, 5, 3, 6).flatten(5, 6).flatten(3, 4)
        return ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


class WordText:
    """The toy's text encoder: one-hot words, so that the model's first text layer is one learned token per word."""
    def __init__(self, cfg, words):
        self.cfg, self.words = cfg, words
        if len(words) > cfg.text_dim:
            raise BadInput(f"the captions use {len(words)} different words: try --text-dim {len(words)}")

    @classmethod
    def from_captions(cls, cfg, captions):
        return cls(cfg, sorted({word for caption in captions for word in caption.lower().split()}))

    def __call__(self, captions):
        """Captions to (B, text_len, text_dim); "" is the null caption of guidance. BadInput for an unknown word."""
        features = torch.zeros(len(captions), self.cfg.text_len, self.cfg.text_dim)
        for row, caption in zip(features, captions):
            words = caption.lower().split()
            if len(words) > self.cfg.text_len:
                raise BadInput(f"{caption!r} has {len(words)} words and room is for {self.cfg.text_len}: "
                               "shorten it or raise --text-len")
            for position, word in enumerate(words):
                if word not in self.words:
                    raise BadInput(f"the word {word!r} is not known; the words are: {', '.join(self.words)}")
                row[position, self.words.index(word)] = 1
        return features


# ---------------------------------------------------------------------------------------------------------- Layers
def rope_table(frames, rows, cols, head_dim):
    """(2, frames*rows*cols, 1, D/2): cosine and sine of each token's angles, token order frame, row, column.

    The D/2 pairs are split into three bands, for frame, row and column (44, 42 and 42 of 128 channels).
    """
    band = 2 * (head_dim // 6)
    grid = torch.cartesian_prod(torch.arange(frames), torch.arange(rows), torch.arange(cols)).double()
    angles = [grid[:, axis, None] * 10000.0 ** -(torch.arange(0, size, 2).double() / size)
              for axis, size in enumerate((head_dim - 2 * band, band, band))]
    angles = torch.cat(angles, 1)[:, None]
    return torch.stack([angles.cos(), angles.sin()]).float()


def rotate(x, table):
    """RoPE: turn each (even, odd) channel pair of x (..., T, H, D) by the table's angles."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = table.to(x.dtype)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)


def patchify(x):
    """(B, F, C, h, w) -> (B, F, N, C*4), each vector in the order (C, ph, pw)."""
    return x.unflatten(-1, (-1, 2)).unflatten(-3, (-1, 2)).permute(0, 1, 3, 5, 2, 4, 6).flatten(4).flatten(2, 3)


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
        with torch.no_grad():
            self.modulation[:, [2, 5]] += 0.3                               # gates: start with open branches

    def forward(self, x, time, text, rope, layer, cache):
        """x (B, F, N, dim); time (B, F or 1, 6, dim); text: this layer's cross-attention key and value."""
        shift1, scale1, gate1, shift2, scale2, gate2 = (self.modulation + time).unsqueeze(2).unbind(3)
        h = modulated_norm(x, shift1, scale1).flatten(1, 2)                               # (B, F*N, dim)
        q, (k, v) = self.self_attn.query(h), self.self_attn.key_value(h)
        q, k, v = cache.attend(layer, q, k, v) if cache else (rotate(q, rope), rotate(k, rope), v)
        x = x + gate1 * self.self_attn(q, k, v).view_as(x)
        x = x + self.cross_attn(self.cross_attn.query(self.norm3(x).flatten(1, 2)), *text).view_as(x)
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
    """What a causal stream remembers: S sink frames and the most recent W - S, as keys and values of every layer.

    A frame that leaves the window is not dropped but folded into the sink, token by token, in every layer:
        sink <- alpha sink + (1 - alpha) leaving            (Reward Forcing, EMA-Sink; alpha = 1 is a static sink)
    Frame f folds into slot f mod S. The sink starts as the first S frames. It accumulates in float32: in bf16 an
    update with alpha = 0.999 would mostly round away.
    Keys are kept before RoPE and rotated at read time to their place in the window, so positions never run out.
    Memory is constant however long the stream. What the cache keeps carries no gradient.

    One chunk: make_room, then any number of passes (each calls attend in every layer), then append.
    """
    def __init__(self, cfg, batch, device="cpu", dtype=torch.float32):
        def zeros(frames, dtype):
            shape = 2, cfg.layers, batch, frames, cfg.tokens, cfg.heads, cfg.head_dim     # 2: keys, values
            return torch.zeros(shape, device=device, dtype=dtype)
        self.cfg = cfg
        self.sink = zeros(cfg.sink, torch.float32)
        self.recent = zeros(cfg.window - cfg.sink, dtype)
        self.context = zeros(cfg.window - cfg.chunk, dtype).flatten(3, 4)   # what passes read, keys rotated
        self.rope = rope_table(cfg.window, cfg.rows, cfg.cols, cfg.head_dim).to(device)
        self.staged = [None] * cfg.layers   # keys and values of the newest pass
        self.seen = 0                       # frames appended so far
        self.held = 0                       # of which in `recent`
        self.length = 0                     # tokens of context for the coming chunk
        self.updates = 0                    # frames folded into the sink so far

    def make_room(self):
        """Evict what the coming chunk pushes out of the window; rotate what stays, once for all its passes."""
        filled = min(self.seen, self.cfg.sink)
        self.evict(max(0, filled + self.held + self.cfg.chunk - self.cfg.window))
        frames = [self.sink[:, :, :, :filled].to(self.recent.dtype), self.recent[:, :, :, :self.held]]
        keys, values = torch.cat(frames, 3).flatten(3, 4)                   # (layers, B, length, H, D)
        self.length = keys.shape[2]
        self.context[0, :, :, :self.length] = rotate(keys, self.rope[:, :self.length])
        self.context[1, :, :, :self.length] = values

    def evict(self, frames):
        """Fold the oldest recent frames into the sink: one update per frame."""
        oldest = self.seen - self.held
        for i in range(frames if self.cfg.sink else 0):
            slot = self.sink[:, :, :, (oldest + i) % self.cfg.sink]
            slot.lerp_(self.recent[:, :, :, i].float(), 1 - self.cfg.alpha)
            self.updates += 1
        self.held -= frames
        self.recent[:, :, :, :self.held] = self.recent[:, :, :, frames:frames + self.held].clone()

    def attend(self, layer, q, k, v):
        """q, k, v (B, L*N, H, D) of the chunk -> rotated q, and k, v with the context in front. Stages k, v."""
        self.staged[layer] = k, v
        here = self.rope[:, self.length:self.length + q.shape[1]]
        context_k, context_v = self.context[:, layer, :, :self.length]
        return rotate(q, here), torch.cat([context_k, rotate(k, here)], 1), torch.cat([context_v, v], 1)

    @torch.no_grad()
    def append(self):
        """Keep the newest pass's keys and values, which must be those of the clean chunk (sigma = 0)."""
        new = torch.stack([torch.stack(pair) for pair in zip(*self.staged)]).unflatten(3, (self.cfg.chunk, -1))
        to_sink = min(max(0, self.cfg.sink - self.seen), self.cfg.chunk)    # the first S frames are the sink's start
        self.sink[:, :, :, self.seen:self.seen + to_sink] = new[:, :, :, :to_sink]
        self.recent[:, :, :, self.held:self.held + self.cfg.chunk - to_sink] = new[:, :, :, to_sink:]
        self.held += self.cfg.chunk - to_sink
        self.seen += self.cfg.chunk


# ------------------------------------------------------------------------------------------------ VideoTransformer
class VideoTransformer(nn.Module):
    """Wan2.1's text-to-video transformer (2503.20314), its parameter names included: toy, teacher, critic and student.

    model(x, sigma, model.embed_text(text)) sees the whole clip: bidirectional, the teacher and the critic.
    model(x, sigma, model.embed_text(text), cache) sees the cached past and its own chunk: causal, the student.
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
        self.register_buffer("rope", rope_table(cfg.clip, cfg.rows, cfg.cols, cfg.head_dim), persistent=False)

    def embed_text(self, text):
        """(B, T <= text_len, text_dim) -> every layer's cross-attention key and value; once per prompt.

        Shorter text is padded with zeros before the text layers, so padding is a constant token that is attended to.
        """
        text = self.text_embedding(F.pad(text, (0, 0, 0, self.cfg.text_len - text.shape[1])))
        return [block.cross_attn.key_value(text) for block in self.blocks]

    def embed_sigma(self, sigma):
        """[cos | sin] of 1000 sigma at freq_dim/2 frequencies, computed in float64."""
        half = self.cfg.freq_dim // 2
        freqs = 10000.0 ** (-torch.arange(half, device=sigma.device, dtype=torch.float64) / half)
        angles = 1000 * sigma.double()[..., None] * freqs
        return torch.cat([angles.cos(), angles.sin()], -1).to(self.head.modulation.dtype)

    def forward(self, x, sigma, text, cache=None):
        """Velocity (B, F, C, h, w) at x of the same shape; sigma (B,), or (B, F) for a level per frame."""
        if sigma.dim() == 1:
            sigma = sigma[:, None]
        time = self.time_embedding(self.embed_sigma(sigma))                 # (B, F or 1, dim)
        modulation = self.time_projection(time).unflatten(-1, (6, -1))      # (B, F or 1, 6, dim)
        rope = self.rope[:, :x.shape[1] * self.cfg.tokens]
        x = F.linear(patchify(x), self.patch_embedding.weight.flatten(1), self.patch_embedding.bias)
        for layer, block in enumerate(self.blocks):
            x = block(x, modulation, text[layer], rope, layer, cache)
        return unpatchify(self.head(x, time), self.cfg.rows)


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
    half, circumradius = area.sqrt() / 2, (area / (0.75 * math.sqrt(3))).sqrt()
    inside = (                                                              # distance to the edge, in px
        (area / math.pi).sqrt() - (dx ** 2 + dy ** 2).sqrt(),
        half - torch.maximum(dx.abs(), dy.abs()),
        circumradius / 2 - torch.maximum(dy, math.sqrt(3) / 2 * dx.abs() - dy / 2),
    )
    return torch.stack([overlap(mask, (edge + 0.5).clamp(0, 1)) for edge in inside], -1)


def motion_reward(frames, captions=None):
    """(B,): how far the object travels, in px per frame, counting only clean motion. Any callable like this will do.

    Of two steps in a row a and b only (|a + b| - |a - b|) / 2 counts: the whole of a straight move, nothing of a
    jitter or of jumps at random. It is multiplied by the overlap of each mask, moved along, with the next one: what
    does not keep its form, flickers or breaks up earns nothing.
    """
    mask, centre, _ = track(frames)
    step = centre[:, 1:] - centre[:, :-1]                                   # (B, F-1, 2)
    a, b = step[:, :-1], step[:, 1:]
    progress = ((a + b).norm(dim=-1) - (a - b).norm(dim=-1)).clamp_min(0) / 2
    size = torch.tensor([mask.shape[3], mask.shape[2]], device=mask.device)
    move = torch.eye(2, device=mask.device).expand(step.shape[0] * step.shape[1], 2, 2)
    move = torch.cat([move, (-2 * step / size).flatten(0, 1)[..., None]], 2)
    before = mask[:, :-1].flatten(0, 1)[:, None]
    moved = F.grid_sample(before, F.affine_grid(move, before.shape, align_corners=False), align_corners=False)
    same = overlap(moved[:, 0].unflatten(0, step.shape[:2]), mask[:, 1:])   # (B, F-1)
    return (progress * same[:, :-1] * same[:, 1:]).mean(1)


def normalised(reward, clips, captions, cfg):
    """`reward` shifted and scaled to mean 0 and deviation 1 over the data's training clips."""
    pieces = [(piece, caption) for clip, caption in zip(clips, captions)
              for piece in clip.split(cfg.clip) if len(piece) == cfg.clip]
    scores = reward(torch.stack([piece for piece, _ in pieces]), [caption for _, caption in pieces])
    if scores.shape != (len(pieces),) or not scores.is_floating_point():
        raise BadInput(f"the reward returned {tuple(scores.shape)} {scores.dtype}: it must be one float per clip")
    mean, deviation = scores.mean(), scores.std()
    if not deviation > 1e-6:
        raise BadInput(f"the reward is {mean:.3g} for every clip of the data: it can choose nothing, try another")
    return lambda frames, captions: (reward(frames, captions) - mean) / deviation


def find_reward(name):
    """"motion", or "module:function" of the user's own: (frames (B, F, 3, H, W) uint8, captions) -> (B,)."""
    if name == "motion":
        return motion_reward
    module, _, function = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), function)
        if callable(found):
            return found
        error = "not a function"
    except Exception as reason:                                             # whatever the user's module raises
        error = reason
    raise BadInput(f"--reward {name} cannot be used ({error}): give motion, or module:function")


def measure(frames, captions, cfg, first=None):
    """Five numbers about decoded frames (B, F, 3, height, width) uint8, means over the B clips.

    colour  fraction of frames whose object is nearest, by angle in RGB, to the captioned one (None if none is)
    shape   fraction of frames whose object overlaps the captioned shape best (None if no caption names one)
    speed   px per frame that the object's centre moves
    copy    mean over frames W and later of the largest correlation, over pixels, with a frame of the first chunk;
            given `first`, a chunk from earlier in the stream, mean over all frames with that instead
    drift   standard deviation over 30 equal segments (of L frames or more) of the quality, which is 100 times the
            overlap with the captioned shape, or with the best one (after the paper's, of imaging quality)
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
    named = shape.clamp_min(0)[:, None, None].expand(-1, frames.shape[1], 1)
    quality = torch.where(shape[:, None] >= 0, overlaps.gather(2, named)[..., 0], overlaps.max(2).values)
    segment = max(cfg.chunk, frames.shape[1] // 30)
    segments = quality[:, :frames.shape[1] // segment * segment].unflatten(1, (-1, segment)).mean(2)
    flat = unit(frames)
    later = 0 if first is not None else min(cfg.window, frames.shape[1] - cfg.chunk)
    similarity = flat[:, later:] @ (flat[:, :cfg.chunk] if first is None else unit(first)).mT
    return {"colour": rate((F.normalize(colour, dim=2) @ hues.T).argmax(2), wanted(COLOURS)),
            "shape": rate(overlaps.argmax(2), shape),
            "speed": (centre[:, 1:] - centre[:, :-1]).norm(dim=-1).mean().item(),
            "copy": similarity.max(2).values.mean().item(),
            "drift": 100 * segments.std(1, correction=0).mean().item()}


# --------------------------------------------------------------------------------------------------------- Rollout
def rollout(student, text, cfg, draw, chunks=None, exit_step=None, cache=None):
    """Yield clean latent chunks (B, L, C, h, w), one after the other: training, evaluation and streaming are this.

    draw() gives noise (B, L, C, h, w); chunks=None goes on for ever. Each chunk starts from noise at sigma = 1, then
    predicts x0 and re-noises it with fresh noise, step by step; a last pass on the clean x0 at sigma = 0 writes the
    cache (Self Forcing, 2506.08009). exit_step stops the denoising there and, where gradients are on, lets that step
    alone carry them: its x0 is the training sample.
    """
    noise = draw()
    cache = cache or EMASinkCache(cfg, len(noise), noise.device, noise.dtype)
    learn = exit_step is not None and torch.is_grad_enabled()
    sigmas = torch.tensor(cfg.sigmas + [0.0], device=noise.device, dtype=noise.dtype)[:, None].expand(-1, len(noise))
    levels = sigmas[:-1] if exit_step is None else sigmas[:exit_step + 1]
    with torch.set_grad_enabled(learn):
        prompt = student.embed_text(text)
    for n in itertools.count() if chunks is None else range(chunks):
        cache.make_room()
        xt = draw() if n else noise
        for step, sigma in enumerate(levels):
            s = per_sample(sigma, xt)
            if step:
                xt = add_noise(x0, draw(), s)
            with torch.set_grad_enabled(learn and step == exit_step):
                x0 = recover_x0(xt, student(xt, sigma, prompt, cache), s)
        yield x0                                                            # handed out before the cache pass: latency
        with torch.no_grad():
            student(x0.detach(), sigmas[-1], prompt, cache)
        cache.append()


# ---------------------------------------------------------------------------------------------------------- Losses
def flow_matching_loss(model, x0, text, sigma, noise):
    """Mean squared error of the velocity, (v - (noise - x0))^2: x0 (B, F, C, h, w), sigma (B,), text embedded."""
    velocity = model(add_noise(x0, noise, per_sample(sigma, x0)), sigma, text)
    return (velocity - (noise - x0)).square().mean()


critic_loss = flow_matching_loss    # the critic is a flow model of the student's samples; no reward weighs its loss


def guided_x0(teacher, xt, sigma, text, null, guidance):
    """The teacher's x0 with classifier-free guidance: cond + guidance (cond - uncond), text and null as features."""
    both = teacher(xt.repeat(2, 1, 1, 1, 1), sigma.repeat(2), teacher.embed_text(torch.cat([text, null])))
    cond, uncond = recover_x0(xt.repeat(2, 1, 1, 1, 1), both, per_sample(sigma.repeat(2), xt)).chunk(2)
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

    Its derivative in x is exp(reward / beta) gradient / x.numel() (Reward Forcing, Re-DMD). beta = inf is plain DMD.
    """
    weight = torch.exp(reward / beta)
    return (weight * (x - (x - gradient).detach()).square().flatten(1).mean(1)).mean() / 2


# ------------------------------------------------------------------------------------- Optimiser, checkpoint, log
class Muon(torch.optim.Optimizer):
    """Momentum for matrices, orthogonalised by five Newton-Schulz steps (K. Jordan, 2024): every direction moves alike.

    Written out because torch has it from 2.9 on only, and to take all matrices of one shape through together.
    """
    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self):
        shapes = {}
        for p in self.param_groups[0]["params"]:
            shapes.setdefault(p.shape, []).append(p)
        for (rows, cols), params in shapes.items():
            grad = torch.stack([p.grad for p in params])
            momentum = self.state[params[0]].setdefault("momentum", torch.zeros_like(grad))
            momentum.lerp_(grad, 0.05)
            x = grad.lerp(momentum, 0.95)
            x = x.mT if rows > cols else x
            x = x / x.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7)
            for _ in range(5):
                gram = x @ x.mT
                x = 3.4445 * x + (2.0315 * gram @ gram - 4.7750 * gram) @ x
            lr = self.param_groups[0]["lr"]
            for p, direction in zip(params, x.mT if rows > cols else x):
                p.mul_(1 - 0.01 * lr).sub_(direction, alpha=lr * max(1, rows / cols) ** 0.5)


def make_optimizers(model, lr):
    matrices = [p for p in model.blocks.parameters() if p.dim() == 2]
    chosen = set(matrices)
    others = [p for p in model.parameters() if p not in chosen]
    return [Muon(matrices, lr), torch.optim.AdamW(others, lr / 10, betas=(0.9, 0.95), weight_decay=0.01)]


def update(model, optimizers, loss, max_norm):
    """One optimiser step down the gradient of loss, clipped to max_norm; returns the norm before clipping."""
    for optimizer in optimizers:
        optimizer.zero_grad()
    loss.backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    for optimizer in optimizers:
        optimizer.step()
    return norm.item()


def seeded(*what):
    """A generator whose noise depends on `what` alone: a step needs no history, so a resumed run repeats it exactly."""
    return torch.Generator().manual_seed(zlib.crc32("/".join(map(str, what)).encode()))


def write_safely(path, write):
    """write(temporary path), then rename: a run killed at any moment leaves the old file or the new one, whole."""
    temporary = path.with_name(f".{path.name}.tmp")
    write(temporary)
    os.replace(temporary, path)


def load_checkpoint(path):
    """The checkpoint's dict, or None if there is no such file. BadInput if it is damaged."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        return {**state, "config": state["config"]}                         # KeyError if it is another program's
    except FileNotFoundError:
        return None
    except Exception as error:                                              # torch raises many kinds on a broken file
        reason = str(error).split("\n")[0][:100]
        raise BadInput(f"{path} is damaged or not a checkpoint ({reason}): delete it to train again")


def refuse_other_config(path, state, here, free=()):
    """BadInput that says what differs, unless the checkpoint's config is `here` in all but the `free` fields."""
    there = state["config"]
    differ = [f"{k}={there.get(k)} there and {here.get(k)} here" for k in {**there, **here}
              if k not in free and there.get(k) != here.get(k)]
    if differ:
        raise BadInput(f"{path} was made with another config ({', '.join(differ)}): match it or choose another --out")


class Run:
    """A training run in the folder `out`: its data, its models so far, its checkpoint and its log.

    state, which is what checkpoint.pt holds: config (with a checksum of the data), words, codec; models: the weights of
    every finished stage, and the seconds it took; log; partial: step, weights, optimisers of the stage under way.
    """
    def __init__(self, cfg, out, data, device):
        self.cfg, self.out, self.device = cfg, Path(out), device
        self.clips, self.captions = load_clips(data, cfg)
        self.reward = normalised(find_reward(cfg.reward), self.clips, self.captions, cfg)
        checksum = zlib.crc32(b"".join(clip.numpy().tobytes() for clip in self.clips) + str(self.captions).encode())
        self.path = self.out / "checkpoint.pt"
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            (self.out / "log.jsonl").touch()
        except OSError as error:
            raise BadInput(f"--out {out} cannot be written ({error.strerror}): choose another folder")
        self.state = load_checkpoint(self.path)
        config = {**asdict(cfg), "data": checksum}
        if self.state is None:
            self.state = {"config": config, "models": {}, "seconds": {}, "log": [], "partial": None,
                          "words": WordText.from_captions(cfg, self.captions).words,
                          "codec": PatchCodec.fit(cfg, self.clips).state}
        refuse_other_config(self.path, self.state, config)
        self.codec, self.text = PatchCodec(cfg, self.state["codec"]), WordText(cfg, self.state["words"])
        self.text(self.captions)                                            # refuse a caption that is too long now
        self.prompts = list(dict.fromkeys(self.captions))                   # every caption once
        self.began = time.time()                                            # of the stage under way

    def save(self):
        """Checkpoint and log together: a killed run leaves no log lines of steps that will be taken again."""
        write_safely(self.path, lambda path: torch.save(self.state, path))
        lines = "".join(json.dumps(row) + "\n" for row in self.state["log"])
        write_safely(self.out / "log.jsonl", lambda path: path.write_text(lines))

    def model(self, name=None, trainable=False):
        """A new VideoTransformer: freshly initialised, or with the weights of a finished stage."""
        torch.manual_seed(self.cfg.seed)
        model = VideoTransformer(self.cfg)
        if name:
            model.load_state_dict(self.state["models"][name])
        return model.to(self.device).requires_grad_(trainable)

    def noise(self, generator, batch, frames):
        return torch.randn(batch, frames, *self.cfg.latent, generator=generator).to(self.device)

    def noise_levels(self, generator, batch):
        """(B,) random levels of the schedule, one in each equal slice of it."""
        even = (torch.arange(batch) + torch.rand(batch, generator=generator)) / batch
        return shift_sigma(even, self.cfg.shift).to(self.device)

    def features(self, captions):
        return self.text(captions).to(self.device)

    def train(self, stage, steps, models, optimizers, train_step, result):
        """Call train_step(step, generator) -> {name: number} `steps` times; models[result] is then the stage's result.

        Goes on where the checkpoint stopped. FloatingPointError, naming the step, if a logged number is not finite.
        """
        peak = [group["lr"] for o in optimizers for group in o.param_groups]
        partial, start, before = self.state["partial"], 0, 0.0
        if partial and partial["stage"] == stage:
            start, before = partial["step"], partial["seconds"]
            for name, model in models.items():
                model.load_state_dict(partial["models"][name])
            for optimizer, saved in zip(optimizers, partial["optimizers"]):
                optimizer.load_state_dict(saved)
        for step in (bar := tqdm(range(start, steps), stage, initial=start, total=steps)):
            for group, lr in zip((group for o in optimizers for group in o.param_groups), peak):
                group["lr"] = lr * min(1, (step + 1) / 20) * (1 - step / steps)
            numbers = train_step(step, seeded(self.cfg.seed, stage, step))
            if (step + 1) % max(1, steps // 20) == 0:
                numbers["weights"] = sum(p.norm().item() for model in models.values() for p in model.parameters())
            wrong = [name for name, number in numbers.items() if not math.isfinite(number)]
            if wrong:
                raise FloatingPointError(f"{stage} step {step}: {', '.join(wrong)} is not finite; a smaller learning "
                                         "rate, or a larger beta, in another --out may help")
            if step % 10 == 0 or step == steps - 1:
                bar.set_postfix_str(" ".join(f"{name} {number:.3g}" for name, number in numbers.items()))
                self.state["log"].append({"stage": stage, "step": step, **numbers})
            if (step + 1) % max(1, steps // 20) == 0 and step + 1 < steps:  # some 20 checkpoints a stage
                self.state["partial"] = {"stage": stage, "step": step + 1, "seconds": before + time.time() - self.began,
                                         "models": {name: model.state_dict() for name, model in models.items()},
                                         "optimizers": [o.state_dict() for o in optimizers]}
                self.save()
        self.state["models"][stage] = {name: p.clone() for name, p in models[result].state_dict().items()}
        self.state["seconds"][stage] = before + time.time() - self.began
        self.state["partial"], self.began = None, time.time()
        self.save()


# ------------------------------------------------------------------------------------------------- Training stages
def train_teacher(run):
    """Stage 1: a bidirectional model learns the data by flow matching, now and then without its caption."""
    cfg, teacher = run.cfg, run.model(trainable=True)
    optimizers = make_optimizers(teacher, cfg.teacher_lr)

    def train_step(step, g):
        captions, crops = [], []
        for i, flip in zip(torch.randint(len(run.clips), (cfg.teacher_batch,), generator=g).tolist(),
                           torch.rand(cfg.teacher_batch, generator=g) < 0.5):
            start = torch.randint(len(run.clips[i]) - cfg.clip + 1, (1,), generator=g).item()
            crop = run.clips[i][start:start + cfg.clip]
            crops.append(crop.flip(-1) if flip else crop)
            captions.append(run.captions[i] if torch.rand(1, generator=g) >= cfg.drop_caption else "")
        x0 = run.codec.encode(torch.stack(crops)).to(run.device)
        sigma = run.noise_levels(g, cfg.teacher_batch)
        text = teacher.embed_text(run.features(captions))
        loss = flow_matching_loss(teacher, x0, text, sigma, run.noise(g, *x0.shape[:2]))
        return {"loss": loss.item(), "grad_norm": update(teacher, optimizers, loss, 1.0)}
    run.train("teacher", cfg.teacher_steps, {"teacher": teacher}, optimizers, train_step, "teacher")


@torch.no_grad()
def teacher_trajectory(teacher, noise, text, null, cfg):
    """The guided teacher's path from noise (B, F, C, h, w) to video: (B, steps + 1, F, C, h, w), clean frames last.

    sample_steps Euler steps; kept are the points at the student's sigmas.
    """
    sigmas = shift_sigma(torch.linspace(1, 0, cfg.sample_steps + 1), cfg.shift).tolist()
    x, points = noise, []
    for i, (sigma, after) in enumerate(tqdm(list(zip(sigmas, sigmas[1:])), "teacher samples", leave=False)):
        if i % (cfg.sample_steps // cfg.steps) == 0:
            points.append(x)
        x0 = guided_x0(teacher, x, torch.full((len(x),), sigma, device=x.device), text, null, cfg.guidance)
        x = x0 + (x - x0) * after / sigma
    return torch.stack(points + [x], 1)


def train_ode(run):
    """Stage 2: the causal student, started from the teacher, learns to jump to the end of the teacher's trajectories.

    Each chunk has its own noise level; its context is the trajectory's clean end, through the cache as in streaming.
    """
    cfg, teacher = run.cfg, run.model("teacher")
    captions = [run.prompts[i % len(run.prompts)] for i in range(cfg.ode_clips)]
    text = run.features(captions)
    noise = run.noise(seeded(cfg.seed, "trajectories"), cfg.ode_clips, cfg.clip)
    paths = teacher_trajectory(teacher, noise, text, torch.zeros_like(text), cfg).unflatten(2, (-1, cfg.chunk))
    student = run.model("teacher", trainable=True)
    optimizers = make_optimizers(student, cfg.ode_lr)
    sigmas = torch.tensor(cfg.sigmas, device=run.device)

    def train_step(step, g):
        picked = torch.randint(cfg.ode_clips, (cfg.ode_batch,), generator=g)
        prompt = student.embed_text(text[picked])
        cache = EMASinkCache(cfg, cfg.ode_batch, run.device)
        losses = []
        for chunk in range(cfg.clip // cfg.chunk):
            cache.make_room()
            level = torch.randint(cfg.steps, (cfg.ode_batch,), generator=g)
            xt, clean, sigma = paths[picked, level, chunk], paths[picked, -1, chunk], sigmas[level]
            x0 = recover_x0(xt, student(xt, sigma, prompt, cache), per_sample(sigma, xt))
            losses.append((x0 - clean).square().mean())
            with torch.no_grad():
                student(clean, torch.zeros_like(sigma), prompt, cache)
            cache.append()
        loss = torch.stack(losses).mean()
        return {"loss": loss.item(), "grad_norm": update(student, optimizers, loss, 1.0)}
    run.train("ode", cfg.ode_steps, {"student": student}, optimizers, train_step, "student")


def train_student(run):
    """Stage 3: Re-DMD on the student's own rollouts. A critic, started from the teacher, learns what the student makes;
    the student moves away from the critic and towards the teacher, most where a sample was rewarded."""
    cfg, teacher = run.cfg, run.model("teacher")
    student, critic = run.model("ode", trainable=True), run.model("teacher", trainable=True)
    average = run.model("ode")
    student_optimizers = make_optimizers(student, cfg.student_lr)
    critic_optimizers = make_optimizers(critic, cfg.critic_lr)

    def sample(g):
        """A batch of rollouts (B, F, C, h, w), all stopped at one random step, their captions and the cache."""
        captions = [run.prompts[i] for i in torch.randint(len(run.prompts), (cfg.distill_batch,), generator=g)]
        exit_step = torch.randint(cfg.steps, (1,), generator=g).item()
        cache = EMASinkCache(cfg, cfg.distill_batch, run.device)
        chunks = rollout(student, run.features(captions), cfg, lambda: run.noise(g, cfg.distill_batch, cfg.chunk),
                         cfg.clip // cfg.chunk, exit_step, cache)
        return torch.cat(list(chunks), 1), captions, cache

    def train_step(step, g):
        critic_losses = []
        for _ in range(cfg.critic_ratio):
            with torch.no_grad():
                x, captions, _ = sample(g)
            text = critic.embed_text(run.features(captions))
            sigma = run.noise_levels(g, len(x)).clamp(0.02, 0.98)
            loss = critic_loss(critic, x, text, sigma, run.noise(g, *x.shape[:2]))
            update(critic, critic_optimizers, loss, 1.0)
            critic_losses.append(loss.item())

        x, captions, cache = sample(g)
        text, sigma = run.features(captions), run.noise_levels(g, len(x)).clamp(0.02, 0.98)
        with torch.no_grad():
            reward = run.reward(run.codec.decode(x), captions).to(run.device)
            xt = add_noise(x, run.noise(g, *x.shape[:2]), per_sample(sigma, x))
            x0_real = guided_x0(teacher, xt, sigma, text, torch.zeros_like(text), cfg.guidance)
            x0_fake = recover_x0(xt, critic(xt, sigma, critic.embed_text(text)), per_sample(sigma, x))
            gradient = dmd_gradient(x, x0_real, x0_fake)
            weight = torch.exp(reward / cfg.beta)
        loss = redmd_loss(x, gradient, reward, cfg.beta)
        norm = update(student, student_optimizers, loss, 10.0)
        with torch.no_grad():
            for mean, new in zip(average.parameters(), student.parameters()):
                mean.lerp_(new, 1 - min(cfg.ema, (step + 1) / (step + 4)))    # a shorter memory at first
        return {"loss": loss.item(), "critic": sum(critic_losses) / cfg.critic_ratio, "reward": reward.mean().item(),
                "weight_min": weight.min().item(), "weight_max": weight.max().item(), "grad_norm": norm,
                "gap": (x0_real - x0_fake).abs().mean().item(), "sink_updates": cache.updates}
    run.train("student", cfg.distill_steps, {"student": student, "critic": critic, "average": average},
              student_optimizers + critic_optimizers, train_step, "average")


# ------------------------------------------------------------------------------------------------------- Streaming
def stream(student, codec, text, cfg, captions, frames=None, seed=0):
    """Yield decoded frames (B, L, 3, height, width) uint8 chunk by chunk, as each is done; frames=None: for ever.

    codec and text as PatchCodec and WordText. BadInput if frames is not a multiple of the chunk.
    """
    if frames is not None:
        multiple("frames", frames, "chunk", cfg.chunk)
    generator, shape = seeded(seed, "stream"), (len(captions), cfg.chunk, *cfg.latent)
    device = student.patch_embedding.weight.device
    draw = lambda: torch.randn(shape, generator=generator).to(device)
    for latents in rollout(student, text(captions).to(device), cfg, draw, frames and frames // cfg.chunk):
        yield codec.decode(latents)


def save_gif(path, videos, scale=3, columns=4):
    """Videos (B, F, 3, height, width) uint8 in a grid as one GIF of 16.7 frames per second."""
    columns = min(columns, len(videos))
    videos = torch.cat([videos, torch.zeros_like(videos[:-len(videos) % columns])])       # black fills the last row
    frames = torch.cat([torch.cat(list(row), 3) for row in videos.split(columns)], 2).permute(0, 2, 3, 1).cpu().numpy()
    images = [Image.fromarray(f).resize((f.shape[1] * scale, f.shape[0] * scale), Image.NEAREST) for f in frames]
    options = {"format": "GIF", "save_all": True, "append_images": images[1:], "duration": 60, "loop": 0}
    write_safely(path, lambda p: images[0].save(p, **options))


def save_report(path, rows, captions, scale=3, shown=4, frames=6):
    """One picture: for each name in rows, videos (B, F, 3, height, width), `frames` frames of `shown` captions."""
    picked = [round(i * (len(captions) - 1) / (shown - 1)) for i in range(shown)]
    height, width = next(iter(rows.values())).shape[3:]
    left, top, cell_h, cell_w = 110, 18, height * scale + 4, width * scale * frames + 8
    page = Image.new("RGB", (left + cell_w * shown, top + cell_h * len(rows)), "white")
    pen = ImageDraw.Draw(page)
    for x, b in enumerate(picked):
        pen.text((left + x * cell_w, 3), captions[b], "black")
    for y, (name, videos) in enumerate(rows.items()):
        pen.text((4, top + y * cell_h + cell_h // 2 - 6), name, "black")
        for x, b in enumerate(picked):
            times = [round(i * (videos.shape[1] - 1) / (frames - 1)) for i in range(frames)]
            cells = torch.cat([videos[b, t] for t in times], 2).permute(1, 2, 0).cpu().numpy()
            picture = Image.fromarray(cells).resize((cell_w - 8, cell_h - 4), Image.NEAREST)
            page.paste(picture, (left + x * cell_w, top + y * cell_h))
    write_safely(path, lambda p: page.save(p, format="PNG"))


@torch.no_grad()
def report(run, repeats=4, frames=240, part=60):
    """Stage 4: sample every caption `repeats` times from teacher and students, stream every caption, measure, draw."""
    cfg, prompts, began = run.cfg, run.prompts[:12], time.time()           # the toy has twelve
    captions, text = prompts * repeats, run.features(prompts * repeats)
    noise = run.noise(seeded(cfg.seed, "report"), len(captions), cfg.clip)
    trajectory = teacher_trajectory(run.model("teacher"), noise, text, torch.zeros_like(text), cfg)
    videos = {"teacher": run.codec.decode(trajectory[:, -1])}
    for name in ("ode", "student"):
        g = seeded(cfg.seed, "renoise")                                     # chunks start from the teacher's noise
        draws = (draw for start in noise.split(cfg.chunk, 1)
                 for draw in (start, *(run.noise(g, len(captions), cfg.chunk) for _ in range(cfg.steps - 1))))
        latents = rollout(run.model(name), text, cfg, draws.__next__, cfg.clip // cfg.chunk)
        videos[name] = run.codec.decode(torch.cat(list(latents), 1))
    streaming = time.time()
    chunks = stream(run.model("student"), run.codec, run.text, cfg, prompts, frames, cfg.seed)
    streamed = torch.cat(list(tqdm(chunks, "stream", frames // cfg.chunk)), 1)
    streaming = time.time() - streaming

    examples = {prompt: [clip for clip, c in zip(run.clips, run.captions) if c == prompt] for prompt in prompts}
    data = torch.stack([clips[len(clips) // 2][:cfg.clip] for clips in examples.values()])
    whole = torch.stack([clip[:min(map(len, run.clips))] for clip in run.clips])
    metrics = {"data": measure(whole, run.captions, cfg),
               **{name: measure(video, captions, cfg) for name, video in videos.items()},
               "stream": {**measure(streamed, prompts, cfg), "first": measure(streamed[:, :part], prompts, cfg),
                          "last": measure(streamed[:, -part:], prompts, cfg, streamed[:, :cfg.chunk])},
               "parameters": sum(p.numel() for p in run.model().parameters())}
    save_report(run.out / "report.png", {"data": data, "teacher": videos["teacher"], "student, ODE": videos["ode"],
                                         "student, Re-DMD": videos["student"]}, prompts)
    for name, video in (("teacher", videos["teacher"]), ("student", videos["student"]), ("stream", streamed)):
        save_gif(run.out / f"{name}.gif", video[:len(prompts)])
    metrics["seconds"] = {**run.state["seconds"], "stream": streaming, "report": time.time() - began}
    write_safely(run.out / "metrics.json", lambda p: p.write_text(json.dumps(metrics, indent=1) + "\n"))

    rows = {"data": metrics["data"], "teacher": metrics["teacher"], "student, ODE": metrics["ode"],
            "student, Re-DMD": metrics["student"], f"stream, first {part}": metrics["stream"]["first"],
            f"stream, last {part}": metrics["stream"]["last"]}
    print(" " * 18 + "".join(f"{k:>8}" for k in metrics["data"]))
    for label, row in rows.items():
        print(f"{label:18}" + "".join(f"{'-':>8}" if v is None else f"{v:8.3f}" for v in row.values()))
    print(f"{len(prompts)} streams of {frames} frames in {streaming:.1f} s: {frames / streaming:.0f} frames per second "
          f"of each. report.png, the GIFs and metrics.json are in {run.out}")


# ------------------------------------------------------------------------------------------------------------ Main
def make_parser():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False,
                                     argument_default=argparse.SUPPRESS)

    def refuse(message):
        raise BadInput(message)
    parser.error = refuse                                                   # one sentence instead of the usage text
    parser.add_argument("--toy", action="store_true", help="train what --out lacks, stream, write the report")
    parser.add_argument("--stream", action="store_true", help="stream --prompt from the checkpoint in --out")
    parser.add_argument("--prompt", help="what to stream")
    parser.add_argument("--frames", type=int, default=240, help="frames to stream")
    parser.add_argument("--out", default="out", help="folder of the checkpoint and of all that is written")
    parser.add_argument("--data", default=Path(__file__).parent / "tiny_data", help="folder of clips and captions.json")
    helps = dict(re.findall(r"^    (\w+): .*?# (.*)$", inspect.getsource(Config), re.M))
    for f in fields(Config):
        parser.add_argument(f"--{f.name.replace('_', '-')}", type=f.type, help=f"{helps[f.name]} [toy: {f.default}]")
    return parser


def parse(argv):
    """(arguments, {config field: value given}); BadInput for a flag that does not exist, naming the nearest."""
    parser = make_parser()
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        near = difflib.get_close_matches(unknown[0].split("=")[0], parser._option_string_actions, 1)
        raise BadInput(f"there is no {unknown[0]}: " + (f"did you mean {near[0]}?" if near else "see --help"))
    return args, {f.name: getattr(args, f.name) for f in fields(Config) if f.name in args}


def stream_command(args, given, device):
    """Stream args.prompt from the checkpoint in args.out; alpha, sink, window and seed may differ from training."""
    path = Path(args.out) / "checkpoint.pt"
    state = load_checkpoint(path)
    if state is None or "student" not in state["models"]:
        raise BadInput(f"{path} holds no trained student yet: run it with --toy --out {args.out} first")
    known = {f.name: state["config"][f.name] for f in fields(Config) if f.name in state["config"]}
    cfg = replace(Config(**known), **given)
    refuse_other_config(path, state, asdict(cfg), free=("data", "alpha", "sink", "window", "seed"))
    if "prompt" not in args:
        raise BadInput('--stream needs a --prompt, for example --prompt "a red circle"')
    multiple("frames", args.frames, "chunk", cfg.chunk)
    student = VideoTransformer(cfg).to(device).requires_grad_(False)
    student.load_state_dict(state["models"]["student"])
    codec, text = PatchCodec(cfg, state["codec"]), WordText(cfg, state["words"])
    text([args.prompt])                                                     # an unknown word is refused before the bar
    began = time.time()
    chunks = stream(student, codec, text, cfg, [args.prompt], args.frames, cfg.seed)
    frames = torch.cat(list(tqdm(chunks, "stream", args.frames // cfg.chunk, unit="chunk")), 1)
    seconds = time.time() - began
    save_gif(path.with_name("stream.gif"), frames, scale=8)
    print(f"{args.frames} frames in {seconds:.2f} s: {args.frames / seconds:.0f} frames per second. "
          f"They are in {path.with_name('stream.gif')}")


def main(argv=None):
    """The command line; returns the exit code: 0, 1 if training failed, 2 for bad input, 130 if interrupted."""
    try:
        args, given = parse(argv)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        print(f"device {device} ({torch.get_num_threads()} threads), float32, torch {torch.__version__}")
        if "stream" in args:
            stream_command(args, given, device)
        elif "toy" in args:
            cfg = replace(PRESETS["toy"], **given)
            print("config: the toy preset" + "".join(f", {k}={v}" for k, v in given.items()))
            multiple("frames", args.frames, "chunk", cfg.chunk)
            run = Run(cfg, args.out, args.data, device)
            for stage, train in (("teacher", train_teacher), ("ode", train_ode), ("student", train_student)):
                if stage not in run.state["models"]:
                    train(run)
            report(run, frames=args.frames)
        else:
            raise BadInput("say what to do: --toy trains and shows everything, --stream streams from a checkpoint")
        return 0
    except (BadInput, FloatingPointError, KeyboardInterrupt) as error:
        reason = str(error) or "stopped; training goes on from the last checkpoint when the command is given again"
        print(f"reward_forcing: {reason}", file=sys.stderr)
        return {BadInput: 2, FloatingPointError: 1, KeyboardInterrupt: 130}[type(error)]


if __name__ == "__main__":
    sys.exit(main())
