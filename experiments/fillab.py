import json, os, numpy as np, re
M = ("agree","reward","shape","lost","area","holds","copy","drift","jitter")
done = {}
for c in (0,1,2):
    p=f'ab3_{c}/ablation.json'
    if os.path.exists(p): done.update(json.load(open(p)))
S = (100,101,102); arms = ["Re-DMD","rewards shuffled","DMD","static sink","no sink","tilted critic","no distillation"]
T = {a: np.array([[done[f"{a}, seed {s}, 240 frames"][m] for m in M] for s in S]) for a in arms}; n = 3 ** .5
def row(t): return " | ".join(f"{t[:,i].mean():.3f} ± {t[:,i].std(ddof=1)/n:.3f}" if m != 'holds' else f"{t[:,i].mean():.0f} ± {t[:,i].std(ddof=1)/n:.1f}" for i, m in enumerate(M))
A = "".join(f"| {a} | {row(T[a])} |\n" for a in arms)
pairs = (("Re-DMD","rewards shuffled"),("Re-DMD","DMD"),("tilted critic","DMD"),("Re-DMD","no distillation"),("Re-DMD","static sink"),("Re-DMD","no sink"))
D = {f"{x} - {y}": T[x]-T[y] for x,y in pairs}
B = "".join(f"| {k} | {row(d)} |\n" for k,d in D.items())
print(A); print(B)
