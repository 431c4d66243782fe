from f4 import *
import collections
cnt=collections.Counter()
real=gpu.run
def run(func,args,kwargs):
    cnt[str(func)]+=1
    dev=kwargs.get("device")
    if func is gpu.aten._to_copy.default and isinstance(args[0],gpu.T) and dev is not None and not gpu.isgpu(dev): cnt['TOCPU']+=1
    if func is gpu.aten._to_copy.default and not isinstance(args[0],gpu.T) and gpu.isgpu(dev): cnt['TOGPU']+=1
    if func is gpu.aten._local_scalar_dense.default: cnt['SYNC']+=1
    return real(func,args,kwargs)
gpu.run=run
cfg=replace(rf.PRESETS["toy"],layers=2)
with mode:
    orig("gpu:0")
    m=rf.VideoTransformer(cfg); text=torch.zeros(1,4,32)
    g=rf.rollout(m,text,cfg)
    for i in range(6):
        cnt.clear(); next(g)
        print(i, sum(v for k,v in cnt.items() if 'aten' in k), {k:v for k,v in cnt.items() if 'aten' not in k})
    print(cnt.most_common(40))
