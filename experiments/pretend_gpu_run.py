import sys; sys.path.insert(0,'.'); sys.path.insert(0,'PATH')
import gpu, torch, traceback, os, tempfile
from dataclasses import replace
from pathlib import Path
import reward_forcing as rf
torch.cuda.is_available=lambda: True
torch.cuda.set_device=lambda i: None
torch.cuda.Stream=gpu.Stream
torch.cuda.current_stream=lambda: None
torch.cuda.stream=lambda s: gpu.Null()
torch.cuda.max_memory_allocated=lambda: 1e9
torch.cuda.reset_peak_memory_stats=lambda: None
orig=torch.set_default_device
torch.set_default_device=lambda d: orig("gpu:0" if d=="cuda" else d)
mode=gpu.Mode(); rf.PRECISION=torch.bfloat16
import threading
def main(args):
    with mode:
        try:
            print(args, '->', rf.main(args.split()) if isinstance(args,str) else rf.main(args), flush=True)
        except Exception: traceback.print_exc()
if __name__=="__main__":
    os.chdir(tempfile.mkdtemp())
    main("--toy --distill-steps 2 --frames 12")
