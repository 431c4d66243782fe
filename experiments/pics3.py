import sys, torch
sys.path.insert(0,'reln')
import reward_forcing as rf
from pathlib import Path
from PIL import Image, ImageOps, ImageSequence
torch.set_num_threads(1)
cfg = rf.Config(seed=100); W = rf.ToyWorld(cfg, rf.Options.data); E = Path('../tiny_data/expected')
def save(path, frames, scale, ms):
    pics = [ImageOps.scale(Image.fromarray(f.permute(1, 2, 0).numpy()), scale, Image.NEAREST) for f in frames]
    pics[0].save(path, save_all=True, append_images=pics[1:], duration=ms, loop=0)
if 'arms' in sys.argv:
    rows = [0, 4, 8]; caps = [W.prompts[r] for r in rows]
    teacher = rf.VideoTransformer(cfg); teacher.load_state_dict(rf.load_shipped(cfg)["teacher"]["parts"][0])
    rf.set_seed(100, "report")
    path = rf.teacher_trajectory(teacher, torch.randn(3, 12, *cfg.latent), W.text(caps), cfg)
    t = W.decode(path[:, -1]).repeat(1, 20, 1, 1, 1)
    d = torch.stack([W.clips[W.captions.index(c)] for c in caps]).repeat(1, 5, 1, 1, 1)
    cols = [d, t] + [torch.load(f'ab3/{a}_100.pt')[rows] for a in ("no sink", "static sink", "Re-DMD", "DMD", "no distillation")]
    grid = torch.cat([torch.cat([c[r] for c in cols], 3) for r in range(3)], 2)      # (240, 3, 96, 224)
    save(E / 'arms.gif', grid[::2], 2, 120)
if 'stream' in sys.argv:
    im = Image.open('./toyout/stream.gif'); fr = [f.convert('RGB') for f in ImageSequence.Iterator(im)]
    assert len(fr) == 240
    fr = fr[:40] + fr[-40:]
    fr[0].save(E / 'stream.gif', save_all=True, append_images=fr[1:], duration=60, loop=0)
    import shutil; shutil.copy('./toyout/report.png', E / 'report.png')
if 'switch' in sys.argv:
    c = rf.Config(seed=0); m = rf.VideoTransformer(c); m.load_state_dict(torch.load('../out/checkpoint.pt')["stages"]["student"]["parts"][0])
    old = ["a red circle", "a green square", "a blue triangle", "a yellow circle"]; new = ["a blue square", "a yellow triangle", "a red circle", "a green square"]
    v = []
    rf.play(m, W.decode, W.text(old), c, 27, v.append, steer={2: W.text(new)}.get)
    v = torch.cat(v, 1); save(E / 'switch.gif', torch.cat(list(v), 3), 2, 60)
