# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6", "numpy", "tqdm", "pillow"]
# ///
import argparse
import math
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from tqdm import tqdm


# ---------------------------------------------------------------------------------------------- Config
@dataclass
class Config:
    dim: int = 96           # width of the transformer
    ffn_dim: int = 384      # width inside its feed-forward layers
    heads: int = 4          # attention heads
    layers: int = 4         # transformer blocks
    freq_dim: int = 64      # sinusoids that encode the noise level
    text_dim: int = 32      # features per text token
    text_len: int = 4       # text tokens, padding included
    channels: int = 16      # latent channels
    height: int = 32        # video height in pixels
    width: int = 32         # video width in pixels
    stride: int = 4         # pixels per latent pixel
    chunk: int = 3          # L: latent frames generated together
    sink: int = 3           # S: frames of memory that never leave
    window: int = 9         # W: frames attention sees, sink and current chunk included
    alpha: float = 0.9      # what the sink keeps at each update; 1 is a static sink
    steps: int = 4          # denoising steps per chunk
    shift: float = 5.0      # bends the schedule towards noise
    clip: int = 15          # latent frames in a training clip

    @property
    def rows(self): return self.height // self.stride // 2
    @property
    def cols(self): return self.width // self.stride // 2
    @property
    def tokens(self): return self.rows * self.cols
    @property
    def head_dim(self): return self.dim // self.heads
    @property
    def latent_shape(self): return (self.channels, self.height // self.stride, self.width // self.stride)
    @property
    def sigmas(self): return [shift_sigma(1 - i / self.steps, self.shift) for i in range(self.steps)]


# ----------------------------------------------------------------------------------------- Noise maths
def shift_sigma(u, shift):
    return shift * u / (1 + (shift - 1) * u)


def add_noise(x0, noise, sigma):
    return (1 - sigma) * x0 + sigma * noise


def recover_x0(xt, velocity, sigma):
    return xt - sigma * velocity


# ---------------------------------------------------------------------------------------------- Layers
def rope_table(frames, rows, cols, head_dim):
    """(2, frames*rows*cols, 1, head_dim/2): cosine and sine"""
    band = 2 * (head_dim // 6)
    grid = torch.cartesian_prod(torch.arange(frames), torch.arange(rows), torch.arange(cols)).double()
    angles = [grid[:, axis, None] * 10000.0 ** -(torch.arange(0, size, 2).double() / size)
              for axis, size in enumerate((head_dim - 2 * band, band, band))]
    angles = torch.cat(angles, 1)[:, None]
    return torch.stack([angles.cos(), angles.sin()]).float()


def rotate(x, table):
    """x (..., T, H, D)"""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = table.to(x.dtype)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)


class Attention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = nn.RMSNorm(dim, eps=1e-6), nn.RMSNorm(dim, eps=1e-6)

    def query(self, x):
        return self.norm_q(self.q(x)).unflatten(-1, (self.heads, -1))

    def key_value(self, x):
        k, v = self.norm_k(self.k(x)), self.v(x)
        return k.unflatten(-1, (self.heads, -1)), v.unflatten(-1, (self.heads, -1))

    def forward(self, q, k, v):
        out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return self.o(out.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, dim, ffn_dim, heads):
        super().__init__()
        self.self_attn, self.cross_attn = Attention(dim, heads), Attention(dim, heads)
        self.norm3 = nn.LayerNorm(dim, eps=1e-6)
        self.ffn = nn.Sequential(nn.Linear(dim, ffn_dim), nn.GELU("tanh"), nn.Linear(ffn_dim, dim))
        self.modulation = nn.Parameter(torch.randn(1, 6, dim) / dim ** 0.5)

    def forward(self, x, time, text, rope, layer, cache):
        """x (B, F, N, C), time (B, 1 or F, 6, C), text: this layer's key and value"""
        norm = lambda x, shift, scale: F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift
        shift1, scale1, gate1, shift2, scale2, gate2 = (self.modulation + time).unsqueeze(2).unbind(3)
        h = norm(x, shift1, scale1).flatten(1, 2)                       # (B, F*N, C)
        q, (k, v) = self.self_attn.query(h), self.self_attn.key_value(h)
        if cache is None:
            q, k = rotate(q, rope), rotate(k, rope)
        else:
            q, k, v = cache.attend(layer, q, k, v)
        x = x + gate1 * self.self_attn(q, k, v).view_as(x)
        x = x + self.cross_attn(self.cross_attn.query(self.norm3(x).flatten(1, 2)), *text).view_as(x)
        return x + gate2 * self.ffn(norm(x, shift2, scale2))


class Head(nn.Module):
    def __init__(self, dim, out):
        super().__init__()
        self.head = nn.Linear(dim, out)
        self.modulation = nn.Parameter(torch.randn(1, 2, dim) / dim ** 0.5)

    def forward(self, x, time):
        shift, scale = (self.modulation + time.unsqueeze(2)).unsqueeze(2).unbind(3)
        return self.head(F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift)


def patchify(x):
    """(B, F, C, 2r, 2c) -> (B, F, r*c, C*4)"""
    return x.unflatten(-1, (-1, 2)).unflatten(-3, (-1, 2)).permute(0, 1, 3, 5, 2, 4, 6).flatten(4).flatten(2, 3)


def unpatchify(x, rows):
    """(B, F, rows*cols, 4*C) -> (B, F, C, 2*rows, 2*cols), the vector in the order (ph, pw, C)"""
    x = x.unflatten(3, (2, 2, -1)).unflatten(2, (rows, -1))             # (B, F, r, c, ph, pw, C)
    return x.permute(0, 1, 6, 2, 4, 3, 5).flatten(5, 6).flatten(3, 4)


class VideoTransformer(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.cfg, dim = cfg, cfg.dim
        self.patch_embedding = nn.Conv3d(cfg.channels, dim, (1, 2, 2), (1, 2, 2))
        self.text_embedding = nn.Sequential(nn.Linear(cfg.text_dim, dim), nn.GELU("tanh"), nn.Linear(dim, dim))
        self.time_embedding = nn.Sequential(nn.Linear(cfg.freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.blocks = nn.ModuleList(Block(dim, cfg.ffn_dim, cfg.heads) for _ in range(cfg.layers))
        self.head = Head(dim, cfg.channels * 4)
        self.register_buffer("rope", rope_table(cfg.clip, cfg.rows, cfg.cols, cfg.head_dim), persistent=False)

    def embed_text(self, text):
        """(B, T, text_dim) -> every layer's cross-attention key and value"""
        text = F.pad(text, (0, 0, 0, self.cfg.text_len - text.shape[1]))
        text = self.text_embedding(text)
        return [block.cross_attn.key_value(text) for block in self.blocks]

    def embed_time(self, sigma):
        half = self.cfg.freq_dim // 2
        freqs = 10000.0 ** (-torch.arange(half, device=sigma.device, dtype=torch.float64) / half)
        angles = 1000 * sigma.double()[..., None] * freqs
        return torch.cat([angles.cos(), angles.sin()], -1).to(self.head.modulation.dtype)

    def forward(self, x, sigma, text, cache=None):
        """x (B,F,C,h,w), sigma (B,) or (B,F)"""
        weight = self.patch_embedding.weight.flatten(1)
        if sigma.dim() == 1:
            sigma = sigma[:, None]
        time = self.time_embedding(self.embed_time(sigma))              # (B, F or 1, C)
        time6 = self.time_projection(time).unflatten(-1, (6, -1))
        rope = self.rope[:, :x.shape[1] * self.cfg.tokens]
        x = F.linear(patchify(x), weight, self.patch_embedding.bias)
        for layer, block in enumerate(self.blocks):
            x = block(x, time6, text[layer], rope, layer, cache)
        return unpatchify(self.head(x, time), self.cfg.rows)


# --------------------------------------------------------------------------------------- EMASinkCache
class EMASinkCache:
    def __init__(self, cfg, batch, device="cpu", dtype=torch.float32):
        def frames(n, dtype):
            return torch.zeros(2, cfg.layers, batch, n, cfg.tokens, cfg.heads, cfg.head_dim, device=device, dtype=dtype)
        self.cfg = cfg
        self.sink = frames(cfg.sink, torch.float32)
        self.recent = frames(cfg.window - cfg.sink, dtype)
        self.context = frames(cfg.window - cfg.chunk, dtype)
        self.rope = rope_table(cfg.window, cfg.rows, cfg.cols, cfg.head_dim).to(device)
        self.seen = self.held = self.length = self.updates = 0
        self.staged = [None] * cfg.layers

    def make_room(self):
        """Fold what must leave into the sink, then rotate the context once for all passes of the coming chunk."""
        cfg, filled = self.cfg, min(self.seen, self.cfg.sink)
        leave = max(0, filled + self.held + cfg.chunk - cfg.window)
        if leave:
            self.evict(leave)
        self.length = filled + self.held
        context = torch.cat([self.sink[:, :, :, :filled].to(self.recent.dtype), self.recent[:, :, :, :self.held]], 3)
        keys, values = context.flatten(3, 4)
        n = self.length * cfg.tokens
        self.context[0].flatten(2, 3)[:, :, :n] = rotate(keys, self.rope[:, :n])
        self.context[1].flatten(2, 3)[:, :, :n] = values

    def evict(self, n):
        first = self.seen - self.held
        for i in range(n if self.cfg.sink else 0):
            slot = self.sink[:, :, :, (first + i) % self.cfg.sink]
            slot.lerp_(self.recent[:, :, :, i].float(), 1 - self.cfg.alpha)
            self.updates += 1
        self.held -= n
        self.recent[:, :, :, :self.held] = self.recent[:, :, :, n:n + self.held].clone()

    def attend(self, layer, q, k, v):
        self.staged[layer] = (k, v)
        n, here = self.length * self.cfg.tokens, self.rope[:, self.length * self.cfg.tokens:][:, :q.shape[1]]
        context_k, context_v = self.context[:, layer].flatten(2, 3)[:, :, :n]
        return rotate(q, here), torch.cat([context_k, rotate(k, here)], 1), torch.cat([context_v, v], 1)

    def append(self):
        """keep the keys and values of the last pass"""
        new = torch.stack([torch.stack(kv) for kv in zip(*self.staged)]).detach().unflatten(3, (self.cfg.chunk, -1))
        into_sink = min(max(0, self.cfg.sink - self.seen), self.cfg.chunk)
        self.sink[:, :, :, self.seen:self.seen + into_sink] = new[:, :, :, :into_sink].float()
        rest = new[:, :, :, into_sink:]
        self.recent[:, :, :, self.held:self.held + rest.shape[3]] = rest
        self.held += rest.shape[3]
        self.seen += self.cfg.chunk


# -------------------------------------------------------------------------------------------- Rollout
def rollout(model, text, cfg, draw, chunks, exit_step=None, cache=None):
    """Yield `chunks` clean latent chunks (B, L, C, h, w)."""
    first = draw()
    cache = cache or EMASinkCache(cfg, first.shape[0], first.device, first.dtype)
    prompt = model.embed_text(text)
    sigmas = torch.tensor(cfg.sigmas + [0.0], device=first.device, dtype=first.dtype)
    last = cfg.steps - 1 if exit_step is None else exit_step
    for n in range(chunks):
        cache.make_room()
        xt = draw() if n else first
        for step in range(last + 1):
            sigma = sigmas[step]
            if step:
                xt = add_noise(x0, draw(), sigma)
            with torch.set_grad_enabled(torch.is_grad_enabled() and step == exit_step):
                x0 = recover_x0(xt, model(xt, sigma.expand(len(xt)), prompt, cache), sigma)
        yield x0
        with torch.no_grad():
            model(x0.detach(), sigmas[-1].expand(len(xt)), prompt, cache)
        cache.append()


# --------------------------------------------------------------------------------------------- Losses
def dmd_gradient(x, x0_real, x0_fake):
    normaliser = (x - x0_real).abs().mean(tuple(range(1, x.dim())), keepdim=True)
    return (x0_fake - x0_real) / normaliser


def redmd_loss(x, gradient, reward, beta):
    weight = torch.exp(reward / beta)
    per_sample = 0.5 * (x - (x - gradient).detach()).square().flatten(1).mean(1)
    return (weight * per_sample).mean()


def critic_loss(model, x0, text, sigma, noise, weight=1.0):
    s = sigma.view(-1, *[1] * (x0.dim() - 1))
    velocity = model(add_noise(x0, noise, s), sigma, text)
    return (weight * (velocity - (noise - x0)).square().flatten(1).mean(1)).mean()
