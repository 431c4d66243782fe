"""workB.py CORE: teacher B's ablation students, this core's half; folder B_CORE, merged by fillB.py"""
import sys, json, torch, time, math
sys.path.insert(0, '.')
import reward_forcing as rf
from pathlib import Path
from dataclasses import replace, asdict
torch.set_num_threads(1)
core = int(sys.argv[1])
S = (103, 104, 105)
order = ("Re-DMD", "rewards shuffled", "DMD", "tilted critic")
jobs = [(seed, arm) for seed in S for arm in order]
out = Path(f'._{core}'); out.mkdir(exist_ok=True); keep = Path('.'); keep.mkdir(exist_ok=True)
path = out / 'ablation.json'
done = json.loads(path.read_text()) if path.exists() else {}
base = replace(rf.PRESETS["scratch"], dim=96, heads=6, layers=12, batch=16, teacher_steps=3000, causal_steps=800, seed=1)
steps = int(sys.argv[2]) if len(sys.argv) > 2 else None
run = rf.Run(base, Path(sys.argv[3] if len(sys.argv) > 3 else '.'), rf.ToyWorld(base, Path('._data/world.npz')))
if steps is None:
    assert run.state["stages"]["causal"]["step"] == 800
run.out = out / 'ablation'; run.out.mkdir(exist_ok=True)
if core == 1 and steps is None:
    t = time.time()
    cap = run.world.prompts * 4
    rf.set_seed(base.seed, "report")
    noise = torch.randn(len(cap), base.clip, *base.latent)
    p = rf.teacher_trajectory(run.model("teacher"), noise, run.world.text(cap), base)
    tv = run.world.decode(p[:, -1]); torch.save(tv, keep / "teacher.pt")
    print("teacher", rf.measure(3, tv, cap), round(time.time() - t), flush=True)
for seed, arm in jobs:
    key = f"{arm}, seed {seed}, 240 frames"
    if key in done: continue
    t = time.time()
    run.cfg = replace(base, seed=seed, **rf.ARMS[arm]); run.state["config"] |= asdict(run.cfg); run.state["log"] = []
    run.state["stages"].pop("student", None)
    if steps: run.cfg = replace(run.cfg, distill_steps=steps)
    rf.train_student(run)
    t1 = time.time()
    video, captions = rf.stream_all(run, "student", 240, 2)
    done[key] = rf.measure(3, video, captions)
    torch.save(video, keep / f"{arm}_{seed}.pt")
    torch.save(run.state["stages"]["student"]["parts"][0], keep / f"{arm}_{seed}_student.pt")
    if arm == "Re-DMD":
        clips, cap = rf.stream_all(run, "student", 12, 4)
        row = {"clips": rf.measure(3, clips, cap), "first": rf.measure(3, video[:, :60], captions), "last": rf.measure(3, video, captions, 60)}
        (out / f"rows_{seed}.json").write_text(json.dumps(row, indent=1))
        print({k: (v['agree'], v['area'], v['shape'], v['lost'], v['inside'], v['seam']) for k, v in row.items()}, flush=True)
    rf.write_safely(path, lambda p: p.write_text(json.dumps(done, indent=1)))
    print(key, round(t1 - t), round(time.time() - t1), {k: done[key][k] for k in ('agree', 'area', 'lost', 'shape', 'holds')}, flush=True)
