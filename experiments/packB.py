import torch, numpy as np, json
s=torch.load('B/causalB_ck.pt', map_location='cpu', weights_only=True)
out={}
import sys; sys.path.insert(0,'B'); import reward_forcing as rf
from dataclasses import fields
cfg=rf.Config(**{k:v for k,v in s['config'].items() if k!='data'})
for stage in ('teacher','causal'):
    sd=s['stages'][stage]['parts'][0]; m=rf.VideoTransformer(cfg); m.load_state_dict(sd)
    q=[];sc=[]
    for p in m.parameters():
        a=p.detach().flatten().numpy(); k=max(np.abs(a).max()/127,1e-12); q.append(np.round(a/k).astype(np.int8)); sc.append(k)
    out[stage]=np.concatenate(q); out[stage+' scale']=np.array(sc,np.float32)
np.savez_compressed('teacherB.npz',**out, config=json.dumps(s['config']))
import os; print(os.path.getsize('teacherB.npz'))
