"""tilted critic with the weights shuffled: the control of --tilt, both teachers, the seeds of the published students"""
import sys, json, torch, time
sys.path.insert(0, 'PATH')
import reward_forcing as rf
from pathlib import Path
from dataclasses import replace, asdict
torch.set_num_threads(1)
jobs = [("B", s) for s in (104, 105)] + [("A", s) for s in (100, 101, 102)] + [("B", s) for s in (100, 101, 102)]
out = Path('PATH'); out.mkdir(exist_ok=True); keep = Path('PATH')
path = out / 'ablation.json'
done = json.loads(path.read_text()) if path.exists() else {}
bases = {"B": replace(rf.PRESETS["scratch"], dim=96, heads=6, layers=12, batch=16, teacher_steps=3000, causal_steps=800, seed=1),
         "A": rf.PRESETS["toy"]}
for name, seed in jobs:
    key = f"{name}, seed {seed}"
    if key in done: continue
    base = bases[name]
    folder = Path('PATH') if name == "B" else out / 'Arun'
    folder.mkdir(exist_ok=True)
    run = rf.Run(base, folder, rf.ToyWorld(base, Path('PATH')))
    if name == "A":
        run.state["stages"] = rf.load_shipped(base) | run.state["stages"]
    run.out = out / 'ablation'; run.out.mkdir(exist_ok=True)
    t = time.time()
    run.cfg = replace(base, seed=seed, tilt=True); run.state["config"] |= asdict(run.cfg); run.state["log"] = []
    run.state["stages"].pop("student", None)
    rf.train_student(run)
    t1 = time.time()
    video, captions = rf.stream_all(run, "student", 240, 2)
    done[key] = rf.measure(3, video, captions)
    torch.save(video, keep / f"TS_{name}_{seed}.pt")
    rf.write_safely(path, lambda p: p.write_text(json.dumps(done, indent=1)))
    print(key, round(t1 - t), round(time.time() - t1), done[key], flush=True)
