"""d.py NAME START SEED [key=value]: distil from START (.pt or shipped), stream 24 x 240, measure; append to table.txt"""
import sys, time, json, torch
sys.path.insert(0,'rel')
import reward_forcing as rf
from pathlib import Path
from dataclasses import replace
torch.set_num_threads(1)
name, start, seed = sys.argv[1], sys.argv[2], int(sys.argv[3])
kw = dict(a.split('=') for a in sys.argv[4:])
base = rf.Config()
cfg = replace(base, seed=seed, **{k: type(getattr(base,k))(float(v)) for k,v in kw.items()})
out = Path(f'out_{name}'); out.mkdir(exist_ok=True)
run = rf.Run(cfg, out, rf.ToyWorld(cfg, rf.Options.data))
ship = rf.load_shipped(cfg)
if start != 'shipped':
    sd = torch.load(start); ship["causal"]["parts"] = [sd.get('model', sd)]
run.state["stages"] = ship | run.state["stages"]
t = time.time(); rf.train_student(run); t1 = time.time() - t
torch.save(run.state["stages"]["student"]["parts"][0], f'S_{name}.pt')
def row(what, m): 
    line = f"{name} {start.split('/')[-1]} s{seed} {kw} {what}: " + ' '.join(f"{k} {m[k]}" for k in ('agree','jitter','shape','lost','area','inside','seam','copy','drift'))
    print(line, flush=True); open('table.txt','a').write(line+'\n')
if 'fast' in name: sys.exit()
clip12, cap = rf.stream_all(run, "student", 12, 4)
row('clips', rf.measure(3, clip12, cap))
video, cap = rf.stream_all(run, "student", 240, 2)
torch.save(video, f'V_{name}.pt')
row('first', rf.measure(3, video[:, :60], cap)); row('last', rf.measure(3, video, cap, 60))
_, area, _ = rf.track(video); lost = (area == 0).float().mean(1)
row('all', rf.measure(3, video, cap))
import numpy as np
c = area.view(24, 80, 3).mean(2).clamp_min(1e-3).log(); d = c.diff(dim=1)
open('table.txt','a').write(f"   {t1:.0f} s, lost streams {(lost>.02).sum().item()}, chunk step sd {d.std():.4f} autocorr {np.corrcoef(c[:,:-1].flatten(), c[:,1:].flatten())[0,1]:.3f} sizes {[round(c[:, i:i+8].mean().exp().item()) for i in range(0,80,16)]}\n")
