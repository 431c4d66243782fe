import sys, random
sys.path.insert(0, '../tiny_data')
import make, math, numpy as np
from pathlib import Path
def draw(per, seed):
    rng = random.Random(seed)
    clips, captions, speeds, sizes = [], [], [], []
    for i in range(per):
        for colour in make.COLOURS:
            for shape in make.SHAPES:
                speed = 3.0 * (i + rng.random()) / per
                size = 5.0 + 2.0 * rng.random()
                frames, moved = make.draw_clip(shape, colour, speed, size, 2 * math.pi * rng.random(), rng.random(), rng.random(), rng.random())
                clips.append(frames); captions.append(f"a {colour} {shape}"); speeds.append(moved); sizes.append(size)
    return np.stack(clips), captions, speeds, sizes
if __name__ == "__main__":
    w = np.load('../tiny_data/world.npz')
    for per, seed, name in (100, 4242, 'world1200.npz'), (10, 777, 'held.npz'):
        c, cap, sp, si = draw(per, seed)
        np.savez(name, clips=c, captions=cap, speed=sp, size=si, mean=w['mean'], encode=w['encode'], decode=w['decode'])
