"""lev.py FILE...: the first chunk's x0 after each of the four steps: peak colour distance, area, empties"""
import sys, torch
sys.path.insert(0,'relo')
import reward_forcing as rf
torch.set_num_threads(1)
cfg = rf.Config(); W = rf.ToyWorld(cfg, rf.Options.data); caps = W.prompts * 40
d = rf.track(W.decode(W.encode(W.clips)))[1]
base = torch.stack([d[[i for i, x in enumerate(W.captions) if x == c]].median() for c in W.prompts]).repeat(40)
def peak(v):
    p = v/255; g = p.flatten(3).median(3).values[..., None, None]; return (p-g).norm(dim=2).amax((2,3))
for f in sys.argv[1:]:
    m = rf.VideoTransformer(cfg); m.load_state_dict(rf.load_shipped(cfg)["causal"]["parts"][0] if f == 'shipped' else torch.load(f))
    rf.set_seed(0, 'lev'); noises = torch.randn(4, len(caps), 3, *cfg.latent); kv = m.embed_text(W.text(caps))
    with torch.no_grad():
      A=[]; P=[]
      for k, s in enumerate(cfg.sigmas):
        s = s.expand(len(caps), 1); xt = noises[k] if k == 0 else rf.add_noise(x0, noises[k], s)
        x0 = rf.predict_x0(m, xt, s, kv)
        v = W.decode(x0); a = rf.track(v)[1].mean(1)/base; p = peak(v).amin(1); A.append(a); P.append(p)
        print(f, 'step', k+1, f'none {(p<.2).float().mean():.4f} peak {p.median():.3f} q05 {p.quantile(.05):.3f} area median {a.median():.3f} q05 {a.quantile(.05):.3f} q95 {a.quantile(.95):.3f}')
    dead = P[3] < .2
    print('  dead ones: peaks', [[round(p[i].item(),2) for p in P] for i in dead.nonzero()[:8,0]], 'areas', [[round(p[i].item(),2) for p in A] for i in dead.nonzero()[:8,0]], flush=True)
