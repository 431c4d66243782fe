"""12 prompts, 9,999 frames into one WebP, toy student seed 0, alpha .999: memory as it goes, and measures"""
import sys, torch, time
sys.path.insert(0,'reln')
import reward_forcing as rf
torch.set_num_threads(1)
sd = torch.load('../out/checkpoint.pt')["generator_ema"]
cfg = rf.Config(); W = rf.ToyWorld(cfg, rf.Options.data); caps = W.prompts
m = rf.VideoTransformer(cfg); m.load_state_dict(sd)
def rss(): return int([l for l in open('/proc/self/status') if l.startswith('VmRSS')][0].split()[1]) / 1024
n, track = 0, []; out = open('mem17.webp', 'wb', 0); log = open('mem17.txt', 'a'); t = time.time(); most = 0
store = np = None
import numpy as np
tr = np.lib.format.open_memmap('mem17_track.npy', mode='w+', dtype='f4', shape=(12, 3600, 3))
def finish(frames):
    global n, most
    rf.write_webp(out, rf.tile(frames, 1)); _, a, c = rf.track(frames)
    tr[:, n:n+3, 0] = a; tr[:, n:n+3, 1:] = c; n += 3; most = max(most, rss())
    if n % 501 == 0 or n == 3600: print(n, f'{rss():.0f} MiB, most {most:.0f}', f'{time.time()-t:.0f} s', out.tell(), file=log, flush=True)
rf.play(m, W.decode, W.text(caps), cfg, 3600, finish)
