"""mem.py FILE SEED: 12 prompts, 9,999 frames into one WebP; memory, lost, agree, shape as it goes"""
import sys, torch, resource, time, json
sys.path.insert(0,'./rel')
import reward_forcing as rf
torch.set_num_threads(1)
f, seed = sys.argv[1], int(sys.argv[2])
sd = torch.load('./toyout/checkpoint.pt')["stages"]["student"]["parts"][0] if f == 'toy' else torch.load(f)
cfg = rf.Config(seed=seed, alpha=float(sys.argv[3])); W = rf.ToyWorld(cfg, rf.Options.data); caps = W.prompts
m = rf.VideoTransformer(cfg); m.load_state_dict(sd)
def rss(): return int([l for l in open('/proc/self/status') if l.startswith('VmRSS')][0].split()[1]) / 1024
part, n = [], 0; out = open(f'./memx_{sys.argv[3]}.webp', 'wb', 0); log = open(f'./memx_{sys.argv[3]}.txt', 'a'); t = time.time()
def finish(frames):
    global part, n
    rf.write_webp(out, rf.tile(frames, 1)); part.append(frames); n += 3
    if n % 240 == 0 or n == 1200:
        v = torch.cat(part, 1); part = []
        r = rf.measure(3, v, caps); _, a, _ = rf.track(v)
        print(n, f'{rss():.0f} MiB', f'{time.time()-t:.0f} s', {k: r[k] for k in ('agree', 'shape', 'area', 'lost', 'jitter')}, 'sizes', [round(x) for x in a.mean(1).tolist()], 'lost by stream', [round(x, 2) for x in (a == 0).float().mean(1).tolist()], file=log, flush=True)
rf.play(m, W.decode, W.text(caps), cfg, 1200, finish)
