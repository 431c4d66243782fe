"""xp.py NAME SEED [old=>new ...] [key=value ...]: distil the shipped causal student by a changed source, then 960 first
chunks and 48 streams of 120 frames from one noise. One line into x.txt"""
import sys, time, types, torch
from pathlib import Path
from dataclasses import replace
sys.path.insert(0, 'x')
src = open('relo/reward_forcing.py').read()
name, seed = sys.argv[1], int(sys.argv[2]); kw = {}
for a in sys.argv[3:]:
    if '=>' in a:
        old, new = a.split('=>', 1); assert src.count(old) == 1, (old, src.count(old)); src = src.replace(old, new)
    else: k, v = a.split('=', 1); kw[k] = v
Path(f'x/m_{name}.py').write_text(src)
import importlib, os
spec = importlib.util.spec_from_file_location(f'm_{name}', f'x/m_{name}.py'); rf = importlib.util.module_from_spec(spec); sys.modules[f'm_{name}'] = rf; spec.loader.exec_module(rf)
torch.set_num_threads(1)
data = Path('relo/tiny_data/world.npz')
rf.Options.data = data
base = rf.Config()
cfg = replace(base, seed=seed, **{k: (v == '1' if isinstance(getattr(base, k), bool) else type(getattr(base, k))(float(v))) for k, v in kw.items() if k != 'start'})
out = Path(f'x/out_{name}'); out.mkdir(exist_ok=True)
W = rf.ToyWorld(cfg, data); run = rf.Run(cfg, out, W)
ship = {}
sys_file = rf.__file__; rf.__file__ = 'relo/reward_forcing.py'; ship = rf.load_shipped(base); rf.__file__ = sys_file
if 'start' in kw: ship["causal"]["parts"] = [torch.load(kw['start'])]
run.state["stages"] = ship | run.state["stages"]
t = time.time(); rf.train_student(run); t1 = time.time() - t
torch.save(run.state["stages"]["student"]["parts"][0], f'x/S_{name}.pt'); os.remove(out/'checkpoint.pt')
import evx
evx.evaluate(rf, f'x/S_{name}.pt', f'{t1:.0f}s {sys.argv[2:]}')
