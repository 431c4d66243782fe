import json, os, numpy as np
M = ("agree","reward","shape","lost","area","holds","copy","drift","jitter")
done = {}
for c in (0,1,2):
    p=f'BA/B_{c}/ablation.json'
    if os.path.exists(p): done.update(json.load(open(p)))
S = (100,101,102); arms = ["Re-DMD","rewards shuffled","DMD","static sink","no sink","tilted critic","plain norm","no distillation"]
arms=[a for a in arms if all(f"{a}, seed {s}, 240 frames" in done for s in S)]
T = {a: np.array([[done[f"{a}, seed {s}, 240 frames"][m] for m in M] for s in S]) for a in arms}; n = 3 ** .5
def row(t): return " | ".join(f"{t[:,i].mean():.3f} ± {t[:,i].std(ddof=1)/n:.3f}" if m != 'holds' else f"{t[:,i].mean():.0f} ± {t[:,i].std(ddof=1)/n:.1f}" for i, m in enumerate(M))
print("".join(f"| {a} | {row(T[a])} |\n" for a in arms))
pairs = (("Re-DMD","rewards shuffled"),("Re-DMD","DMD"),("tilted critic","DMD"),("Re-DMD","no distillation"),("Re-DMD","static sink"),("Re-DMD","no sink"),("Re-DMD","plain norm"))
print("".join(f"| {x} - {y} | {row(T[x]-T[y])} |\n" for x,y in pairs if x in T and y in T))
