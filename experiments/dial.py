"""streams of 12 x 240 frames by the Re-DMD students of seeds 100 to 102 with other sinks, not trained again"""
import sys, json, torch, numpy as np
sys.path.insert(0,'reln')
import reward_forcing as rf
torch.set_num_threads(1)
W = rf.ToyWorld(rf.Config(), rf.Options.data); M = ("agree","area","copy","drift","holds","lost"); T = {}
for seed in 100, 101, 102:
    sd = torch.load(f'ab3/Re-DMD_{seed}_student.pt')
    for name, kw in ('S3 .999', {}), ('S3 .9', {'alpha': .9}), ('S1 .999', {'sink': 1}), ('S3 1', {'alpha': 1.0}), ('S3 .99', {'alpha': .99}):
        cfg = rf.Config(seed=seed, **kw); m = rf.VideoTransformer(cfg); m.load_state_dict(sd); v = []
        rf.play(m, W.decode, W.text(W.prompts), cfg, 240, v.append); v = torch.cat(v, 1)
        r, l = rf.measure(3, v, W.prompts), rf.measure(3, v, W.prompts, 60)
        T.setdefault(name, []).append([r[k] for k in M] + [l['agree'], l['copy']])
        print(seed, name, dict(zip(M + ('agree60', 'copy60'), T[name][-1])), flush=True)
for n, t in T.items():
    t = np.array(t); print(n, ' '.join(f'{k} {a:.3f}±{b:.3f}' for k, a, b in zip(M + ('agree60', 'copy60'), t.mean(0), t.std(0, ddof=1) / len(t) ** .5)))
