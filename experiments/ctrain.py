"""ctrain.py NAME STEPS CTX RANK WORLD START [key=value]: causal stage, data parallel by gloo."""
import sys, time, torch, os
sys.path.insert(0, './snap')
sys.path.insert(0, ".")
import par
import reward_forcing as rf
import torch.distributed as dist
from pathlib import Path
from dataclasses import replace
name, steps, ctx, rank, world, start = sys.argv[1], *map(int, sys.argv[2:6]), sys.argv[6]
extra = dict(a.split('=') for a in sys.argv[7:])
every = int(extra.pop('stop', 0))
torch.set_num_threads(1)
extra = {k: type(getattr(rf.Config(), k))(v) for k, v in extra.items()}
cfg = replace(rf.Config(alpha=.9, seed=7, causal_steps=steps), **extra)
if world > 1:
    os.environ.update(MASTER_ADDR='127.0.0.1', MASTER_PORT=str(20000 + sum(map(ord, name))))
    dist.init_process_group('gloo', rank=rank, world_size=world)
w = rf.ToyWorld(cfg, Path('./world1200.npz'))
run = rf.Run(cfg, Path('./none'), w)
student = rf.VideoTransformer(cfg)
shipped = rf.load_shipped(rf.Config())
student.load_state_dict(shipped[start]["parts"][0])
torch._dynamo.config.recompile_limit = 64
pb = torch.compile(par.make(rf, cfg.causal_clip // 3), dynamic=False)
opts = rf.make_optimizers(student, cfg.causal_lr)
def evict(self, frame):
    slot = self.updates % self.cfg.sink
    self.sink[slot] = self.sink[slot].lerp(frame.float(), 1 - self.cfg.alpha)
    self.updates += 1
own = lambda x: x.chunk(world)[rank]
t0 = time.time(); mean = 0; first = 0
path = Path(f'./{name}.ck')
if path.exists():
    state = torch.load(path); first = state['step']
    student.load_state_dict(state['model']); [o.load_state_dict(s) for o, s in zip(opts, state['opts'])]
for step in range(first, steps):
    rf.set_seed(cfg.seed, "start", step)
    clean, text = run.draw_clips(cfg.causal_clip, mirror=True)
    F = clean.shape[1]
    level = torch.randint(4, (len(clean), F // 3)).repeat_interleave(3, 1)
    sigma, noise = cfg.sigmas[level], torch.randn_like(clean)
    noisy = rf.add_noise(clean, noise, sigma)
    clean, text, sigma, noisy = map(own, (clean, text, sigma, noisy))
    x0 = par.forward(rf, student, clean, noisy, sigma, text, cfg, pb)
    cut = lambda y: y.unflatten(1, (-1, 3)).flatten(0, 1)
    loss = rf.regression_loss(cut(x0), cut(clean), 1.0, rf.motion_square); loss.backward(); loss = loss.item()
    if world > 1:
        grads = [p.grad for p in student.parameters() if p.grad is not None]
        flat = torch.cat([g.flatten() for g in grads]); dist.all_reduce(flat); flat /= world
        for g, f in zip(grads, flat.split([g.numel() for g in grads])): g.copy_(f.view_as(g))
    g = rf.update(student, opts, step / cfg.causal_steps)
    mean += loss
    if (step + 1) % 25 == 0 and rank == 0:
        print(step + 1, round(mean / 25, 4), round(g, 3), round(time.time() - t0, 1), flush=True); mean = 0
    if ((step + 1) % 200 == 0 or step + 1 == steps) and rank == 0:
        torch.save({'step': step + 1, 'model': student.state_dict(), 'opts': [o.state_dict() for o in opts]}, path)
    if step + 1 == every: break
if rank == 0: torch.save(student.state_dict(), f'./{name}.pt')
