"""work.py CORE: ablation students, this core's part; own folder ab3_CORE, merged later."""
import sys, json, torch, time, shutil
sys.path.insert(0,'reln')
import reward_forcing as rf
from pathlib import Path
from dataclasses import replace, asdict
torch.set_num_threads(1)
core = int(sys.argv[1])
arms = list(rf.ARMS)
S = rf.SEEDS
first = ["Re-DMD", "rewards shuffled", "DMD", "static sink", "no sink", "plain norm", "tilted critic", "no distillation"]
jobs = [(seed, arm) for arm in ("Re-DMD", "rewards shuffled", "static sink", "DMD", "no sink", "no distillation", "tilted critic", "plain norm") for seed in S]
jobs = jobs[core::2]
out = Path(f'ab3_{core}'); out.mkdir(exist_ok=True); keep = Path('ab3'); keep.mkdir(exist_ok=True)
path = out / 'ablation.json'
done = json.loads(path.read_text()) if path.exists() else {}
base = rf.Config(); run = rf.Run(base, out / 'none', rf.ToyWorld(base, rf.Options.data))
run.out = out / 'ablation'; run.out.mkdir(exist_ok=True)
run.state["stages"] = rf.load_shipped(base)
for seed, arm in jobs:
    key = f"{arm}, seed {seed}, 240 frames"
    if key in done: continue
    t = time.time()
    run.cfg = replace(base, seed=seed, **rf.ARMS[arm]); run.state["config"] |= asdict(run.cfg); run.state["log"] = []
    run.state["stages"].pop("student", None)
    rf.train_student(run)
    t1 = time.time()
    video, captions = rf.stream_all(run, "student", 240, 2)
    done[key] = rf.measure(3, video, captions)
    torch.save(video, keep / f"{arm}_{seed}.pt")
    torch.save(run.state["stages"]["student"]["parts"][0], keep / f"{arm}_{seed}_student.pt")
    if arm == "Re-DMD":
        clips, cap = rf.stream_all(run, "student", 12, 4)
        row = {"clips": rf.measure(3, clips, cap), "first": rf.measure(3, video[:, :60], captions), "last": rf.measure(3, video, captions, 60)}
        (keep / f"rows_{seed}.json").write_text(json.dumps(row, indent=1))
    rf.write_safely(path, lambda p: p.write_text(json.dumps(done, indent=1)))
    print(key, round(t1 - t), round(time.time() - t1), {k: done[key][k] for k in ('agree', 'area', 'lost', 'shape')}, flush=True)
