import sys, torch
sys.path.insert(0,'rel')
import reward_forcing as rf
torch.set_num_threads(1)
cfg = rf.Config(); W = rf.ToyWorld(cfg, rf.Options.data); caps = W.prompts * 20
m = rf.VideoTransformer(cfg); m.load_state_dict(rf.load_shipped(cfg)["causal"]["parts"][0]); m.eval()
text = W.text(caps)
def rep(tag, x0):
    mask, a, c = rf.track(W.decode(x0)); r=a.mean(1); 
    o = rf.shape_overlaps(mask, a, c).nan_to_num(-1).argmax(2)
    want = torch.tensor([["circle", "square", "triangle"].index(x.split()[2]) for x in caps])
    print(tag, 'none %.4f'%(a.amin(1)==0).float().mean(), 'wrong %.3f'%(o!=want[:,None]).float().mean(), 'area', [round(q.item()) for q in r.quantile(torch.tensor([.05,.25,.5,.75,.95]))], flush=True)
with torch.no_grad():
    for s in (0,):
        rf.set_seed(s,'fc'); (x0,_),=rf.rollout(m,text,cfg,chunks=1); rep('4 step',x0)
    for n,g in ((4,0),(16,0),(16,.5)):
        rf.set_seed(0,'x'); x=torch.randn(len(caps),3,*cfg.latent); 
        S=cfg.schedule(n); c=rf.EMASinkCache(cfg)
        for i in range(n):
            p=lambda t: rf.predict_x0(m,x,S[i].expand(len(x),1),m.embed_text(t),rf.EMASinkCache(cfg))
            q=p(text)
            if g: q=q+g*(q-p(text*0))
            x=q+S[i+1]/S[i]*(x-q)
        rep(f'euler {n} g{g}',x)
