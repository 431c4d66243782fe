import json, numpy as np, glob, os
M = ("agree","reward","shape","lost","area","holds","copy","drift","jitter")
def f(x, m): return f"{x:.0f}" if m == "holds" and abs(x) >= 10 else f"{x:.3f}"
done = {}
for c in (0, 1):
    p = f'./abl_{c}/ablation.json'
    if os.path.exists(p): done.update(json.load(open(p)))
seeds = sorted({k.split('seed ')[1].split(',')[0] for k in done}); arms = []
for k in done:
    a = k.split(', seed')[0]
    if a not in arms: arms.append(a)
full = [a for a in arms if all(f"{a}, seed {s}, 240 frames" in done for s in seeds)]
T = {a: np.array([[done[f"{a}, seed {s}, 240 frames"][m] for m in M] for s in seeds]) for a in full}
print(seeds, len(done)); print("| arm | " + " | ".join(M) + " |"); print("|---" * (len(M)+1) + "|")
n = len(seeds) ** .5
for a in full: print(f"| {a} | " + " | ".join(f"{T[a][:,i].mean():.3f} ± {T[a][:,i].std(ddof=1)/n:.3f}" if m != 'holds' else f"{T[a][:,i].mean():.0f} ± {T[a][:,i].std(ddof=1)/n:.1f}" for i, m in enumerate(M)) + " |")
print()
for x, y in (("Re-DMD","rewards shuffled"),("Re-DMD","DMD"),("tilted critic","DMD"),("Re-DMD","plain norm"),("Re-DMD","no distillation"),("Re-DMD","static sink"),("Re-DMD","no sink")):
    if x in T and y in T:
        d = T[x] - T[y]
        print(f"| {x} - {y} | " + " | ".join(f"{d[:,i].mean():.3f} ± {d[:,i].std(ddof=1)/n:.3f}" if m != 'holds' else f"{d[:,i].mean():.0f} ± {d[:,i].std(ddof=1)/n:.1f}" for i, m in enumerate(M)) + " |")
print()
rows = {s: json.load(open(p)) for s in seeds if os.path.exists(p := f'./abl/rows_{s}.json')}
for part in ("clips", "first", "last"):
    for m in ("agree", "area", "shape", "lost", "inside", "seam", "jitter"):
        v = [rows[s][part][m] for s in rows]
        print(part, m, v, "median", np.median(v) if v else '')
    v = [rows[s][part]["seam"] / rows[s][part]["inside"] for s in rows]; print(part, "seam/inside", np.round(v, 3))
