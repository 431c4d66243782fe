import sys, torch, time
from pathlib import Path
def evaluate(rf, f, note=''):
    data = Path('relo/tiny_data/world.npz')
    sd = torch.load(f)
    cfg = rf.Config(); W = rf.ToyWorld(cfg, data); caps = W.prompts * 80
    d = rf.track(W.decode(W.encode(W.clips)))[1]
    base = torch.stack([d[[i for i, x in enumerate(W.captions) if x == c]].median() for c in W.prompts]).repeat(80)
    m = rf.VideoTransformer(cfg); m.load_state_dict(sd); rf.set_seed(0, 'lev960'); levs = []
    with torch.no_grad():
        text = W.text(caps); kv = m.embed_text(text)
        for k, s in enumerate(cfg.sigmas):
            s = s.expand(len(caps), 1); z = torch.randn(len(caps), 3, *cfg.latent); xt = z if k == 0 else rf.add_noise(x0, z, s)
            x0 = rf.predict_x0(m, xt, s, kv); mask, a, c = rf.track(W.decode(x0)); levs.append((a.amin(1) == 0).sum().item())
    r = a.mean(1) / base; pace = c.diff(dim=1).norm(dim=2).nanmean().item()
    o = rf.shape_overlaps(mask, a, c).nan_to_num(-1).argmax(2); want = torch.tensor([["circle", "square", "triangle"].index(x.split()[2]) for x in caps])
    first = f"chunk0 of 960: none after 1-4 {levs} small {(r < .5).sum().item()} big {(r > 1.6).sum().item()} median {r.median():.2f} wrong {(o != want[:, None]).float().mean():.3f} pace {pace:.2f}"
    cfg = rf.Config(seed=555); caps = W.prompts * 4; v = []
    rf.play(m, W.decode, W.text(caps), cfg, 120, v.append); v = torch.cat(v, 1)
    _, a, c = rf.track(v); p = c.diff(dim=1).norm(dim=2); z = lambda i, j: p[:, i:j].nanmean().item()
    M = rf.measure(3, v, caps); L = rf.measure(3, v, caps, 60)
    line = f"{f.split('/')[-1]} | {first} | e48 pace {z(3,12):.2f} {z(12,30):.2f} {z(30,60):.2f} {z(60,90):.2f} {z(90,119):.2f} agree {M['agree']:.3f} {L['agree']:.3f} jit {M['jitter']:.2f} shape {M['shape']:.4f} area {M['area']:.4f} {L['area']:.4f} lost {M['lost']:.4f} drift {M['drift']:.2f} holds {M['holds']:.0f} size {a[:,:3].mean():.0f} {a[:,-9:].mean():.0f} | {note}"
    print(line, flush=True); open('x/x.txt', 'a').write(line + '\n')
    torch.save(v, f.replace('S_', 'V_'))
if __name__ == '__main__':
    sys.path.insert(0, 'relo'); import reward_forcing as rf; torch.set_num_threads(1)
    for f in sys.argv[1:]: evaluate(rf, f)
