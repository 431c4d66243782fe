import sys, os, pytest
sys.path.insert(0,'.')
os.chdir('.')
import test_reward_forcing as t
from f4 import *
import tempfile, inspect
tmp=Path(tempfile.mkdtemp()); os.chdir(tmp); print(tmp)
class F:
    def mktemp(self,n): p=tmp/n; p.mkdir(); return p
wan=t.wan.__wrapped__(F()) if hasattr(t.wan,'__wrapped__') else inspect.unwrap(t.wan._get_wrapped_function())(F())
print(wan, list(Path(wan).iterdir()))
torch.save(t.random_model(t.TINY_WAN, torch.float32).state_dict(), "w.pt")
Path("taehv.py").write_text(t.TAEHV); torch.save(torch.tensor(0.1), "taew2_1.pth")
torch.compile=lambda f,**k: f
torch.nn.Module.compile=lambda self,*a,**k: None
rf.fastest_attention=lambda cfg: {}
from PIL import Image
Image.new("RGB",(640,400),"red").save("a.png")
S=t.SIZES
import diffusers, transformers
if os.path.isdir(wan/"text_encoder"): pass
for more in ("--stream --prompt panda","--stream --compile --prompt panda --frames 45 --then 21 red","--stream --prompt panda --frames 33 --start a.png","--stream --prompt panda --vae .", "--stream --prompt panda --fp8"):
    main(f"{S} {more} --wan {wan} --weights w.pt")
main(f"{S} --bench --wan {wan} --vae .")
