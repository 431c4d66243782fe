"""area of the teacher's x0 prediction over that of the sample noised, by sigma and guidance; samples: data, streams' first 12 frames"""
import sys, torch; sys.path.insert(0,'relo'); import reward_forcing as rf
from pathlib import Path
torch.set_num_threads(1)
cfg=rf.Config(); W=rf.ToyWorld(cfg, Path('relo/tiny_data/world.npz'))
T=rf.VideoTransformer(cfg); T.load_state_dict(rf.load_shipped(cfg)["teacher"]["parts"][0])
torch.manual_seed(0); i=torch.randperm(120)[:24]
def pk(v):
    p=v/255; g=p.flatten(3).median(3).values[...,None,None]; return (p-g).norm(dim=2).amax((2,3))
sets={'data':(W.encode(W.clips[i][:, :12]), [W.captions[j] for j in i])}
for f in sys.argv[1:]: sets[f]=(W.encode(torch.load(f)[:24,:12]), W.prompts*2)
for n,(z,cap) in sets.items():
    text=W.text(cap); a=rf.track(W.decode(z))[1].clamp_min(1)
    with torch.no_grad():
      for s in .3,.5,.7,.8,.9:
        sg=torch.full((24,1),s); torch.manual_seed(1); xt=rf.add_noise(z,torch.randn_like(z),sg)
        c=rf.predict_x0(T,xt,sg,T.embed_text(text)); u=rf.predict_x0(T,xt,sg,T.embed_text(torch.zeros_like(text)))
        out=[]
        for g in 0,.5,3:
            v=W.decode(c+g*(c-u)); r=(rf.track(v)[1]/a); out.append(f'g{g}: {r.median():.3f} peak {pk(v).median():.2f}')
        print(n,s,' '.join(out),flush=True)
