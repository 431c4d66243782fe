"""t3.py: the guided teacher alone on 3 frames, on 12 with 9 at sigma 1 all the way (rollout of first 3), and on 12."""
import sys, torch
sys.path.insert(0,'relo')
import reward_forcing as rf
torch.set_num_threads(1)
cfg = rf.Config(); W = rf.ToyWorld(cfg, rf.Options.data); caps = W.prompts * 20
d = rf.track(W.decode(W.encode(W.clips)))[1]
base = torch.stack([d[[i for i, x in enumerate(W.captions) if x == c]].median() for c in W.prompts]).repeat(20)
m = rf.VideoTransformer(cfg); m.load_state_dict(rf.load_shipped(cfg)["teacher"]["parts"][0])
text = W.text(caps); nothing = torch.zeros_like(text[:1])
S = cfg.schedule(16)
@torch.no_grad()
def sample(F, free, g):
    rf.set_seed(0,'t3'); x = torch.randn(len(caps), F, *cfg.latent)
    for i in range(16):
        s = S[i].expand(len(x), F).clone()
        if free < F: s[:, free:] = 1
        x0 = rf.guided_x0(m, x, s, text, nothing, g)
        y = x0 + S[i+1]/S[i]*(x-x0)
        x = torch.cat([y[:, :free], x[:, free:]], 1)
    return x[:, :free]
for F, free in (3,3),(12,3),(12,12):
  for g in 0., .5:
    v = W.decode(sample(F, free, g)[:, :3]); mask, a, c = rf.track(v); r = a.mean(1)/base
    o = rf.shape_overlaps(mask, a, c).nan_to_num(-1).argmax(2)
    want = torch.tensor([["circle", "square", "triangle"].index(x.split()[2]) for x in caps])
    print(F, free, 'guidance', g, f'none {(a.amin(1)==0).float().mean():.4f} small {(r<.5).float().mean():.3f} big {(r>1.6).float().mean():.3f} median {r.median():.3f} wrong {(o!=want[:,None]).float().mean():.4f} pace {c.diff(dim=1).norm(dim=2).nanmean():.3f}', flush=True)
