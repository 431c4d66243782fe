"""comp.py blocks|whole: small random model of the full form, 4 layers, 2 threads; graphs, seconds of compiling"""
import sys, time, torch
sys.path.insert(0,'..')
import reward_forcing as rf
from dataclasses import replace
from torch._dynamo.utils import counters
how = sys.argv[1]
cfg = replace(rf.PRESETS["full"], dim=192, ffn_dim=512, heads=6, layers=4, text_dim=64, text_len=32, height=64, width=96)
torch.manual_seed(0); m = rf.VideoTransformer(cfg).requires_grad_(False)
text = torch.randn(1, 32, 64)
def run():
    torch.manual_seed(1); t = time.time(); out = [x for x, _ in rf.rollout(m, text, cfg, chunks=8)]; return time.time() - t, torch.cat(out, 1)
run(); plain, want = run()
if how == 'blocks': rf.compile_student(m)
else:
    torch._dynamo.config.recompile_limit = 64
    rf.VideoTransformer.forward = torch.compile(rf.VideoTransformer.forward, dynamic=False)
    rf.EMASinkCache.lay_out = staticmethod(torch.compile(rf.EMASinkCache.lay_out, fullgraph=True, dynamic=False))
cold, got = run(); warm, got = run()
print(how, f"graphs {counters['stats']['unique_graphs']} cold {cold:.1f} s warm {warm:.2f} s eager {plain:.2f} s compiling {cold-warm:.1f} s, error {(got-want).abs().max():.1e}", flush=True)
