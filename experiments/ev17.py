"""ev.py long|dial|switch|start ...: tables of the README, from students saved by work.py or in out/checkpoint.pt"""
import sys, json, torch, time
sys.path.insert(0,'reln')
import numpy as np
import reward_forcing as rf
from pathlib import Path
from dataclasses import replace
torch.set_num_threads(1)
W = rf.ToyWorld(rf.Config(), rf.Options.data)
def load(what):
    if what == 'toy': return torch.load('../out/checkpoint.pt')["stages"]["student"]["parts"][0]
    return torch.load(what)
def stream(sd, cfg, captions, frames, **kw):
    m = rf.VideoTransformer(cfg); m.load_state_dict(sd); video = []
    rf.play(m, W.decode, W.text(captions), cfg, frames, video.append, **kw)
    return torch.cat(video, 1)
def say(*a):
    print(*a, flush=True); open('ev17.txt','a').write(' '.join(map(str,a))+'\n')
cmd, what = sys.argv[1], sys.argv[2]
sd = load(what)
if cmd == 'long':                      # long FILE SEED ALPHA
    seed, alpha = int(sys.argv[3]), float(sys.argv[4])
    cfg = rf.Config(seed=seed, alpha=alpha); caps = W.prompts; t = time.time()
    v = stream(sd, cfg, caps, 2400)
    _, area, _ = rf.track(v); gone = area == 0
    by = [sum(bool(g[f-120:f].float().mean() > .5) for g in gone) for f in (240, 720, 1200, 2400)]
    big = area[:, -240:].mean(1) / area[:, :60].mean(1)
    say('long', what, 'seed', seed, 'alpha', alpha, 'lost streams at 240 720 1200 2400 (over half of the last 120 frames):', by, 'frames lost in last 240', round(gone[:, -240:].float().mean().item(), 4),
        'any lost', sum(bool(g.any()) for g in gone), 'size last/first', round(big.median().item(), 3), [round(x, 2) for x in sorted(big.tolist())[::23]], f'{time.time()-t:.0f} s')
    for name, f in (('first60', v[:, :60]), ('first240', v[:, :240]), ('last60', None), ('last240', None)):
        m = rf.measure(3, v if f is None else f, caps, {'last60': 60, 'last240': 240}.get(name, 0))
        say('   ', name, {k: m[k] for k in ('agree', 'shape', 'area', 'lost', 'drift', 'copy')})
    torch.save(v[:, -240:], f'long_{seed}_{alpha}.pt')
if cmd == 'dial':                      # dial FILE SEED
    seed = int(sys.argv[3])
    for name, kw in (('none', {'sink': 0}), ('.9', {'alpha': .9}), ('.99', {}), ('1', {'alpha': 1.0}), ('S1', {'sink': 1})):
        cfg = rf.Config(seed=seed, **kw); v = stream(sd, cfg, W.prompts, 240)
        m, l = rf.measure(3, v, W.prompts), rf.measure(3, v, W.prompts, 60)
        say('dial', what, seed, name, {k: m[k] for k in ('agree', 'area', 'copy', 'drift', 'lost', 'holds')}, 'copy last 60', l['copy'])
if cmd == 'switch':
    colours = {"red": (242, 51, 38), "green": (51, 217, 64), "blue": (64, 102, 255), "yellow": (255, 217, 38)}
    names, shapes = list(colours), ["circle", "square", "triangle"]
    pairs = [(f"a {c} {s}", f"a {names[(i + 1 + k) % 4]} {shapes[(j + 1 + k) % 3]}") for i, c in enumerate(names) for j, s in enumerate(shapes) for k in (0, 1)]
    old, new = map(list, zip(*pairs))
    def frames_until(right):           # (B, F) bool from the switch on
        out = []
        for r in right:
            run = r.float().unfold(0, 12, 1).amin(1); hit = run.nonzero()
            out.append(min(int(hit[0]), 49) if len(hit) else 49)
        return np.array(out)
    for arm, kw in (('EMA', {}), ('static', {'alpha': 1.0}), ('none', {'sink': 0})):
        for reread in (False, True):
            pass
            both, col, shp = [], [], []
            for seed in (0, 1, 2):
                cfg = rf.Config(seed=seed, **kw)
                texts = {10: W.text(new)}
                v = stream(sd, cfg, old, 30 + 60, steer=texts.get, reread=reread)
                f = v[:, 30:]
                mask, area, centre = rf.track(f)
                o = rf.shape_overlaps(mask, area, centre)
                want = torch.tensor([shapes.index(c.split()[2]) for c in new])
                okshape = o.nan_to_num(-1).argmax(2) == want[:, None]
                okshape &= area > 0
                solid = (mask > .6).float()[:, :, None]
                mean = (f * solid).sum((3, 4)) / solid.sum((3, 4)).clamp_min(1)
                palette = torch.tensor(list(colours.values())).float()
                okcol = (mean[:, :, None] - palette).norm(dim=3).argmin(2) == torch.tensor([names.index(c.split()[1]) for c in new])[:, None]
                both.append(frames_until(okshape & okcol)); col.append(frames_until(okcol)); shp.append(frames_until(okshape))
            b = np.concatenate(both)
            say('switch', what, arm, 'reread' if reread else 'plain', f'{b.mean():.2f} +- {b.std(ddof=1)/len(b)**.5:.2f}', 'not in 48:', (b >= 49).sum(), 'at once', f'{(b == 0).mean():.2f}', 'colour', f'{np.concatenate(col).mean():.2f}', 'shape', f'{np.concatenate(shp).mean():.2f}')
if cmd == 'start':                     # start FILE WORLD
    w = rf.ToyWorld(rf.Config(), Path(sys.argv[3])); cfg = rf.Config()
    z = w.encode(w.clips); true = w.decode(z); speed = torch.tensor(np.load(sys.argv[3])['speed'])
    m = rf.VideoTransformer(cfg); m.load_state_dict(sd)
    for k in (12, 3):
        rf.set_seed(cfg.seed, "stream")
        *_, (x0, _) = rf.rollout(m, w.text(w.captions), cfg, chunks=k//3+1, start=z[:, :k].split(3, 1))
        f = w.decode(x0); mask, a, c = rf.track(f); _, ta, tc = rf.track(true[:, k:k+3])
        d = (c - tc).norm(dim=2).mean(1); size = (a.mean(1) / ta.mean(1) - 1).abs()
        o = rf.shape_overlaps(mask, a, c).nan_to_num(-1).argmax(2)
        want = torch.tensor([["circle", "square", "triangle"].index(x.split()[2]) for x in w.captions])
        by = [d[[i for i, x in enumerate(w.captions) if x == p]].mean().item() for p in w.prompts]
        slow = speed < speed.quantile(.4)
        say('start', what, sys.argv[3], k, f'mean {d.nanmean():.3f} within 1.5: {(d < 1.5).float().mean():.3f} max {d.max():.2f} by caption {min(by):.2f}..{max(by):.2f} slow {d[slow].mean():.2f} {(d[slow] < 1.5).float().mean():.2f} size mean {size.nanmean():.3f} max {size.max():.3f} shape ok {(o == want[:, None]).float().mean():.3f} lost {(a==0).float().mean():.3f}')
