import json,os,numpy as np
A={};B={}
for i in range(3): A.update(json.load(open(f'BA/A_{i}.json')))
for i in range(3):
    p=f'BA/B_{i}/ablation.json'
    if os.path.exists(p): B.update(json.load(open(p)))
for x,y in (("Re-DMD","rewards shuffled"),("Re-DMD","DMD"),("tilted critic","DMD"),("Re-DMD","static sink"),("Re-DMD","no sink")):
    for m in ('agree','reward','area','jitter','lost'):
        v=[]
        for D in (A,B):
            try: v.append([round(D[f"{x}, seed {s}, 240 frames"][m]-D[f"{y}, seed {s}, 240 frames"][m],4) for s in (100,101,102)])
            except KeyError: pass
        f=np.array(sum(v,[])); print(x,'-',y,m,v,'pooled %.3f +- %.3f'%(f.mean(),f.std(ddof=1)/len(f)**.5), len(f))
