"""fc.py FILE...: first chunks without an object, of 480; tiny: less than a third of the data's area of that caption"""
import sys, torch
sys.path.insert(0,'./rel')
import reward_forcing as rf
torch.set_num_threads(1)
cfg = rf.Config(); W = rf.ToyWorld(cfg, rf.Options.data); caps = W.prompts * 40
d = rf.track(W.decode(W.encode(W.clips)))[1]
base = torch.stack([d[[i for i, x in enumerate(W.captions) if x == c]].median() for c in W.prompts]).repeat(40)
for f in sys.argv[1:]:
    sd = rf.load_shipped(cfg)["causal"]["parts"][0] if f == 'shipped' else torch.load(f)
    m = rf.VideoTransformer(cfg); m.load_state_dict(sd); rf.set_seed(0, "fc")
    (x0, _), = rf.rollout(m, W.text(caps), cfg, chunks=1)
    mask, a, c = rf.track(W.decode(x0)); r = a.mean(1) / base
    o = rf.shape_overlaps(mask, a, c).nan_to_num(-1).argmax(2)
    want = torch.tensor([["circle", "square", "triangle"].index(x.split()[2]) for x in caps])
    pace = c.diff(dim=1).norm(dim=2).mean(1)
    print(f, f'none {(a.amin(1) == 0).float().mean():.4f} tiny {(r < .33).float().mean():.4f} small {(r < .5).float().mean():.4f} big {(r > 1.6).float().mean():.4f} median {r.median():.3f} shape wrong {(o != want[:, None]).float().mean():.4f} pace {pace.nanmean():.3f}', flush=True)
