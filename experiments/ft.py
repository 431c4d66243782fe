"""ft.py NAME STEPS OWN LR: go on with the shipped causal student; context chunks are its own predictions with probability OWN"""
import sys, time, torch
sys.path.insert(0,'relo')
import reward_forcing as rf
from pathlib import Path
torch.set_num_threads(1)
name, steps, own, lr = sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), float(sys.argv[4])
cfg = rf.Config(alpha=.9, seed=11, causal_steps=steps, causal_lr=lr)
w = rf.ToyWorld(cfg, Path('world1200.npz')); run = rf.Run(cfg, Path('none'), w)
student = rf.VideoTransformer(cfg); student.load_state_dict(rf.load_shipped(rf.Config())["causal"]["parts"][0])
opts = rf.make_optimizers(student, lr); t0 = time.time(); mean = 0
for step in range(steps):
    rf.set_seed(cfg.seed, "start", step)
    clean, text = run.draw_clips(18, mirror=True); F = 18
    level = torch.randint(4, (len(clean), F // 3)); use = (level > 0) & (torch.rand(level.shape) < own)
    lv = level.repeat_interleave(3, 1); sigma, noise = cfg.sigmas[lv], torch.randn_like(clean)
    noisy = rf.add_noise(clean, noise, sigma)
    cache, total = rf.EMASinkCache(cfg), 0.
    text_kv = student.embed_text(text)
    for i, now in enumerate(torch.arange(F).split(3)):
        x0 = rf.predict_x0(student, noisy[:, now], sigma[:, now], text_kv, cache)
        total = total + rf.regression_loss(x0, clean[:, now], 1.0, rf.motion_square) / 6
        if i < 5: rf.remember(student, torch.where(use[:, i, None, None, None, None], x0.detach(), clean[:, now]), text_kv, cache)
    total.backward(); rf.update(student, opts, step / steps); mean += total.item()
    if (step + 1) % 20 == 0: print(step + 1, round(mean / 20, 4), round(time.time() - t0), flush=True); mean = 0
    if (step + 1) % 100 == 0: torch.save(student.state_dict(), f'{name}.pt')
torch.save(student.state_dict(), f'{name}.pt')
