"""Draws tiny_data: 12 captions x 10 clips of one coloured shape that moves and bounces on a dark ground.

    python tiny_data/make.py [FOLDER]     # writes clips/*.png (animated PNG) and captions.json, the same every time

What each thing is there for:
    colour, shape   in the caption; constant                   -> does the video obey its text?
    speed           0 to 4 px/frame, never in the caption      -> what the reward chooses
    size            never in the caption, constant in a clip   -> shows whether a stream remembers
    tint            the ground's hue turns once in 48 frames   -> shows whether a stream copies its first frames
"""
import json
import math
import random
import sys
from pathlib import Path

import numpy as np
from PIL import Image

SIZE, FRAMES, CLIPS_PER_CAPTION, DAY, FINE = 24, 48, 10, 48, 8     # FINE: sub-pixels per pixel side, for smooth edges
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
    """(FRAMES, SIZE, SIZE, 3) uint8 frames and the mean px/frame that the centroid really moved."""
    left, right, top, bottom = extent(shape, size)
    x, y = left + x * (SIZE - left - right), top + y * (SIZE - top - bottom)
    vx, vy = speed * math.cos(angle), speed * math.sin(angle)
    grid = (np.arange(SIZE * FINE) + 0.5) / FINE
    frames, path = [], []
    for t in range(FRAMES):
        cover = inside(shape, grid[None, :] - x, grid[:, None] - y, size)
        cover = cover.reshape(SIZE, FINE, SIZE, FINE).mean((1, 3))[..., None]
        hue = 2 * math.pi * (t / DAY + dawn)
        ground = np.array([255 * (0.20 + 0.16 * math.cos(hue + 2 * math.pi * c / 3)) for c in range(3)])
        frames.append(np.floor(cover * COLOURS[colour] + (1 - cover) * ground + 0.5).astype(np.uint8))
        path.append((x, y))
        x, y = x + vx, y + vy
        if x < left or x > SIZE - right:
            vx = -vx
            x = 2 * left - x if x < left else 2 * (SIZE - right) - x
        if y < top or y > SIZE - bottom:
            vy = -vy
            y = 2 * top - y if y < top else 2 * (SIZE - bottom) - y
    return np.stack(frames), float(np.linalg.norm(np.diff(path, axis=0), axis=1).mean())


def main(folder):
    rng = random.Random(2512_04678)                                 # random.random() is the same on every Python
    (folder / "clips").mkdir(parents=True, exist_ok=True)
    entries = []
    for i in range(CLIPS_PER_CAPTION):
        for colour in COLOURS:
            for shape in SHAPES:
                speed = 4.0 * (i + rng.random()) / CLIPS_PER_CAPTION
                size = 4.2 + 3.3 * rng.random()
                frames, moved = draw_clip(shape, colour, speed, size, 2 * math.pi * rng.random(),
                                          rng.random(), rng.random(), rng.random())
                name = f"clips/{colour}_{shape}_{i}.png"
                first, *rest = [Image.fromarray(f) for f in frames]
                first.save(folder / name, save_all=True, append_images=rest, duration=62, loop=0, optimize=True)
                entries.append({"file": name, "caption": f"a {colour} {shape}",
                                "truth": {"speed": round(moved, 4), "size": round(size, 4)}})
    lines = ",\n".join(json.dumps(entry) for entry in entries)
    (folder / "captions.json").write_text(f"[\n{lines}\n]\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
