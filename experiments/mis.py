"""mis.py FILE.pt...: how well the next chunk continues 120 held-out clips, after 12 and 45 frames; alpha .99 and .9"""
import sys, torch
sys.path.insert(0,'./rel')
import reward_forcing as rf
from pathlib import Path
from dataclasses import replace
torch.set_num_threads(1)
def evaluate(sd, alpha=.99):
    cfg = rf.Config(alpha=alpha); w = rf.ToyWorld(cfg, Path('./held.npz'))
    m = rf.VideoTransformer(cfg); m.load_state_dict(sd)
    z = w.encode(w.clips); true = w.decode(z)
    text = w.text(w.captions); out = []
    for k in 12, 45:
        rf.set_seed(0, "mis", k)
        *_, (x0, _) = rf.rollout(m, text, cfg, chunks=k//3+1, start=z[:, :k].split(3, 1))
        _, a, c = rf.track(w.decode(x0)); _, ta, tc = rf.track(true[:, k:k+3])
        la = (a/ta).mean(1).clamp_min(1e-3).log()
        d = (c - tc).norm(dim=2).mean(1)
        pace = c.diff(dim=1).norm(dim=2).nanmean()/tc.diff(dim=1).norm(dim=2).mean()
        sd_ = la[d.isfinite()]
        within = (d < 1.5).float().mean()
        out.append(f"k {k}: size {sd_.median():+.3f} sd {((sd_.quantile(.84)-sd_.quantile(.16))/2):.3f} std {sd_.std():.3f}  place {d.nanmean():.3f} within {within:.2f}  pace {pace:.2f}")
    return ' | '.join(out)
if __name__ == "__main__":
    for f in sys.argv[1:]:
        sd = rf.load_shipped(rf.Config())["causal"]["parts"][0] if f == "shipped" else torch.load(f)
        if 'model' in sd: sd = sd['model']
        print(f, evaluate(sd), flush=True)
