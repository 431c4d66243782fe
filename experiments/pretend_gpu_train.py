exec(open('f7.py').read().split("import diffusers")[0])
# videoalign, real tiny
os.makedirs(tmp/"va"); os.chdir(tmp/"va")
model,state=t.save_videoalign(1)
clips = torch.randint(0,256, (2, 81, 3, 224, 448)).byte()
plain=[t.plain_score(model, state[t.PEFT+"rm_head.weight"], c, "a panda") for c in clips]
os.chdir(tmp)
with mode:
    orig("gpu:0")
    try:
        for d in (torch.float32, torch.bfloat16):
            rf.PRECISION=d; r=rf.videoalign(tmp/"va")
            s=r(clips.to("gpu:0")); print(s, plain)
    except Exception: traceback.print_exc(limit=-6)
# training
import torch.distributed as dist
os.environ.update(RANK="0",WORLD_SIZE="1",MASTER_ADDR="localhost",MASTER_PORT="0",LOCAL_RANK="0")
class Mesh:
    def get_rank(self): return 0
dist.init_device_mesh=lambda *a,**k: Mesh()
dist.destroy_process_group=lambda: None
rf.checkpoint=lambda f,*a,use_reentrant=False: f(*a)
import torch.distributed.fsdp as fsdp, torch.distributed.tensor as dt
fsdp.fully_shard=lambda m,**k: m.to("gpu:0")
fsdp.register_fsdp_forward_method=lambda *a: None
class DT:
    @staticmethod
    def from_local(x,*l): return type("x",(),{"full_tensor":lambda self: x})()
dt.DTensor=DT
dt.distribute_tensor=lambda p,*l,**k: p
(tmp/"prompts").write_text("a\nred panda\n\na red\n")
torch.save(t.random_model(t.TINY_TRAINED, torch.float32).state_dict(), "w.pt")
steps=t.STEPS.replace("--wan .",f"--wan {wan}").replace("videoalign:.","videoalign:va").replace("--negative worst","--negative a")
steps=steps.replace("--height 32 --width 48","--height 64 --width 96")
main(f"--train {steps} --out o2 --distill-steps 1 --micro 2")
main(f"--train {steps} --out o2 --distill-steps 1 --micro 2")
