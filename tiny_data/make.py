"""Draws the toy's world: 12 captions x 10 clips of one coloured shape that moves and bounces on a dark ground.

    python tiny_data/make.py                                # tiny_data/world.npz, or the file that is named; the same every time
    python tiny_data/make.py pack big/checkpoint.pt out/checkpoint.pt    # trained stages as shipped.pt; the last has precedence
    python tiny_data/make.py causal 18                      # into shipped.pt, a causal student trained in clips of 18 frames

world.npz holds clips (120, 48, 3, 32, 32) uint8, captions, the true speed (px per frame) and size (px) of each, and the toy's
VAE: mean (48,), encode (48, 16) and decode (16, 48) between pixel patches of 4 x 4 and latents. What things are for:

    colour, shape   in the caption; constant                   -> does the video obey its text?
    speed           0 to 3 px a frame, never in the caption    -> what the reward chooses
    size            never in the caption, constant in a clip   -> shows whether a stream remembers
    tint            the ground's hue turns once in 48 frames   -> shows whether a stream copies its first frames

For a world of your own write the same arrays (speed and size are for the tests only), with the shape's name in every
caption to a file here, and give its name as --data, with --from-scratch.

shipped.pt holds the teacher and the causal student, trained on an AMD EPYC, torch 2.13: the teacher with one thread,
seed 0, by
    python reward_forcing.py --toy --from-scratch --dim 96 --heads 6 --layers 12 --batch 16 --teacher-steps 5000 --out big
(its stage only) in 66 minutes with other work beside it, 55 alone; the causal student from it, by the computation of
    python tiny_data/make.py causal 18
in 37 minutes: two processes had half of every batch each, compiled, with all chunks of a clip side by side, which is the
same to rounding. It is trained on 1,200 clips that are drawn like those of world.npz, from another seed (4242), with alpha
.9, in clips of 18 frames, 2,400 steps, seed 7.
"""
import io
import math
import random
import sys
import zipfile
from pathlib import Path

import numpy as np

SIZE, FRAMES, CLIPS_PER_CAPTION, DAY = 32, 48, 10, 48
FINE = 8                                                            # sub-pixels per pixel side, for smooth edges
STRIDE, CHANNELS = 4, 16
COLOURS = {"red": (242, 51, 38), "green": (51, 217, 64), "blue": (64, 102, 255), "yellow": (255, 217, 38)}
SHAPES = ("circle", "square", "triangle")


def inside(shape, dx, dy, size):
    """True where the offset (dx, dy) from the shape's centroid lies inside it; y points down, the triangle up."""
    if shape == "circle":
        return dx ** 2 + dy ** 2 <= size ** 2
    if shape == "square":
        return np.maximum(abs(dx), abs(dy)) <= 0.92 * size
    slope = math.sqrt(3) / 2                                        # equilateral, circumradius 1.3 size
    return np.maximum(dy, slope * abs(dx) - dy / 2) <= 0.65 * size


def extent(shape, size):
    """Distances from the centroid to the left, right, top and bottom edge, in px."""
    if shape == "triangle":
        return (1.3 * size * math.sqrt(3) / 2,) * 2 + (1.3 * size, 0.65 * size)
    return (size if shape == "circle" else 0.92 * size,) * 4


def draw_clip(shape, colour, speed, size, angle, x, y, dawn):
    """(FRAMES, 3, SIZE, SIZE) uint8 frames and the mean px per frame that the centroid really moved."""
    left, right, top, bottom = extent(shape, size)
    x, y = left + x * (SIZE - left - right), top + y * (SIZE - top - bottom)
    vx, vy = speed * math.cos(angle), speed * math.sin(angle)
    grid = (np.arange(SIZE * FINE) + 0.5) / FINE
    frames, path = [], []
    for t in range(FRAMES):
        cover = inside(shape, grid[None, :] - x, grid[:, None] - y, size)
        cover = cover.reshape(SIZE, FINE, SIZE, FINE).mean((1, 3))
        for c in range(3):
            hue = 2 * math.pi * (t / DAY + dawn + c / 3)
            ground = 255 * (0.20 + 0.16 * math.cos(hue))
            frames.append(np.floor(cover * COLOURS[colour][c] + (1 - cover) * ground + 0.5))
        path.append((x, y))
        x, y = x + vx, y + vy
        if x < left or x > SIZE - right:
            vx = -vx
            x = 2 * left - x if x < left else 2 * (SIZE - right) - x
        if y < top or y > SIZE - bottom:
            vy = -vy
            y = 2 * top - y if y < top else 2 * (SIZE - bottom) - y
    frames = np.stack(frames).reshape(FRAMES, 3, SIZE, SIZE).astype(np.uint8)
    return frames, np.linalg.norm(np.diff(path, axis=0), axis=1).mean()


def fit_vae(clips):
    """mean (P,), encode (P, CHANNELS), decode (CHANNELS, P) for patches of P = 3 * STRIDE ** 2 numbers in [-1, 1].

    The principal components. Plain ones leave details too faint to learn, whitened ones make noise as loud as colour.
    Between the two: each is divided by the square root of its deviation; then all by one number, for variance 1.
    """
    n, frames, _, height, width = clips.shape
    patches = clips.reshape(n, frames, 3, height // STRIDE, STRIDE, width // STRIDE, STRIDE)
    patches = patches.transpose(0, 1, 3, 5, 2, 4, 6).reshape(-1, 3 * STRIDE ** 2) / 127.5 - 1
    variance, basis = np.linalg.eigh(np.cov(patches.T))
    variance, basis = variance[::-1][:CHANNELS], basis[:, ::-1][:, :CHANNELS]
    basis = basis * np.sign(basis[abs(basis).argmax(0), range(CHANNELS)])       # the sign is free: fix it
    scale = variance ** 0.25
    scale *= np.sqrt((variance / scale ** 2).mean())
    return [x.astype(np.float32) for x in (patches.mean(0), basis / scale, (basis * scale).T)]


def draw(seed, count):
    """So many clips of every caption: clips (n, FRAMES, 3, SIZE, SIZE) uint8, captions, speeds and sizes."""
    rng = random.Random(seed)                                       # random.random() is the same on every Python
    clips, captions, speeds, sizes = [], [], [], []
    for i in range(count):
        for colour in COLOURS:
            for shape in SHAPES:
                speed = 3.0 * (i + rng.random()) / count
                size = 5.0 + 2.0 * rng.random()
                frames, moved = draw_clip(shape, colour, speed, size, 2 * math.pi * rng.random(),
                                          rng.random(), rng.random(), rng.random())
                clips.append(frames)
                captions.append(f"a {colour} {shape}")
                speeds.append(moved)
                sizes.append(size)
    return np.stack(clips), captions, speeds, sizes


def main(path):
    clips, captions, speeds, sizes = draw(2512_04678, CLIPS_PER_CAPTION)
    mean, encode, decode = fit_vae(clips)
    np.savez_compressed(path, clips=clips, captions=captions, speed=speeds, size=sizes,
                        mean=mean, encode=encode, decode=decode)


SETTLED = {             # the fields of Config, and the world, that a shipped stage settles: with others it is refused
    "teacher": "dim ffn_dim heads layers freq_dim rope_base text_dim text_len channels height width stride time_stride "
               "sigma_shift drop_caption teacher_steps teacher_lr world",
    "causal": "chunk denoise_steps causal_clip causal_steps causal_lr ode",
}


def pack(*checkpoints):
    """The stages in these checkpoints as shipped.pt, which is a checkpoint too, but has of each stage the model alone, and
    for every parameter whole numbers, as int8, and their scale, a 127th of the largest. The file, a zip, is compressed."""
    import torch
    packed, file = {}, io.BytesIO()
    for checkpoint in checkpoints:
        stages = torch.load(checkpoint)
        for stage in SETTLED.keys() & stages.keys():
            saved, pairs = stages[stage], {}
            for name, weight in saved["parts"][0].items():
                scale = weight.abs().max() / 127
                pairs[name] = (weight / scale).round().to(torch.int8), scale
            config = {name: saved["config"][name] for name in SETTLED[stage].split() if name in saved["config"]}
            packed[stage] = {"config": config, "step": saved["step"], "parts": [pairs]}
    torch.save(packed, file)
    with zipfile.ZipFile(file) as plain, zipfile.ZipFile(Path(__file__).parent / "shipped.pt", "w", zipfile.ZIP_DEFLATED,
                                                         compresslevel=9) as small:
        for name in plain.namelist():
            small.writestr(name, plain.read(name))


def causal(clip):
    """Train a causal student from the shipped teacher, on 1,200 fresh clips, in out/causal (a killed run goes on), and
    pack both."""
    sys.path.insert(0, str(Path(__file__).parent.parent))
    import reward_forcing as rf
    import torch
    cfg, out = rf.Config(alpha=0.9, causal_clip=clip, seed=7), Path("out/causal")
    out.mkdir(parents=True, exist_ok=True)
    world = rf.ToyWorld(cfg)                                        # its VAE stays
    clips, world.captions, *_ = draw(4242, 100)
    world.clips = torch.tensor(clips)
    run = rf.Run(cfg, out, world)
    run.state.setdefault("teacher", rf.load_shipped(cfg)["teacher"])
    rf.train_causal(run)
    pack(out / "checkpoint.pt")                                     # the teacher stays as it is, bit for bit


if __name__ == "__main__":
    if sys.argv[1:2] == ["pack"]:
        pack(*sys.argv[2:])
    elif sys.argv[1:2] == ["causal"]:
        causal(int(sys.argv[2]))
    else:
        main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "world.npz")
