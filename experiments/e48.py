"""e48.py FILE...: 48 streams of 120 frames, one noise for all students (seed 555, alpha .999)"""
import sys, torch, time
sys.path.insert(0,'rel')
import reward_forcing as rf
torch.set_num_threads(1)
cfg = rf.Config(seed=555); W = rf.ToyWorld(cfg, rf.Options.data); caps = W.prompts * 4
for f in sys.argv[1:]:
    m = rf.VideoTransformer(cfg); m.load_state_dict(torch.load(f)); v=[]; t=time.time()
    rf.play(m, W.decode, W.text(caps), cfg, 120, v.append); v = torch.cat(v,1); torch.save(v, f.replace('S_','E_').replace('W_','EW_'))
    _,a,c = rf.track(v); p = c.diff(dim=1).norm(dim=2); z = lambda i,j: p[:,i:j].nanmean().item()
    M = rf.measure(3,v,caps); L = rf.measure(3,v,caps,60)
    line = f"{f} pace {z(0,2):.2f} {z(3,12):.2f} {z(12,30):.2f} {z(30,60):.2f} {z(60,90):.2f} {z(90,119):.2f} | agree {M['agree']} last60 {L['agree']} jitter {M['jitter']} shape {M['shape']} area {M['area']} {L['area']} lost {M['lost']} drift {M['drift']} holds {M['holds']} size {a[:,:3].mean():.0f} {a[:,-9:].mean():.0f} {time.time()-t:.0f}s"
    print(line, flush=True); open('e48.txt','a').write(line+'\n')
