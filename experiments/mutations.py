import subprocess,sys
exec(open('PATH').read().split("src=open")[0])
R={"wrong samples":("weigh(reward.roll(shuffle))","weigh(reward.roll(1))"),
"critic wrong captions":("flow_matching_loss(critic, x, text, *run","flow_matching_loss(critic, x, text.roll(1, 0), *run"),
"EMA never":("mean.data.lerp_(new.data, 1 - keep)","mean.data.lerp_(new.data, 0)"),
"guidance 0 in trajectories":("x0 = guided_x0(teacher, x, sigma, text, 0 * text)\n        path","x0 = predict_x0(teacher, x, sigma, teacher.embed_text(text))\n        path"),
"DMD sigma fixed":("u = torch.rand(self.cfg.batch, 1)[self.own]","u = torch.full((self.cfg.batch, 1), 0.5)[self.own]"),
"leaves newest":("leaving = frames.pop(cfg.sink)","leaving = frames.pop()")}
M=[(n,*R.get(n,(a,b))) for n,a,b in M]
M+=[("tilt not shuffled","weigh(run.judge(x).roll(shuffle))","weigh(run.judge(x))"),
("config not compared","check(not differ,","check(True,"),
("AdamW steps matrices too","            p.grad = None\n",""),
("means of rank only","means = self.whole(torch.tensor([[*numbers.values()]])).mean(0)","means = torch.tensor([[*numbers.values()]]).mean(0)"),
("own of wrong turn","split(args.micro)[rank::processes]","split(args.micro)[:cfg.batch // args.micro // processes]"),
]
src=open('reward_forcing.py').read()
for name,a,b in M:
    if src.count(a)!=1: print(name,'PATTERN',src.count(a)); continue
    open('reward_forcing.py','w').write(src.replace(a,b))
    k='student_step or causal_student or trajectory or samples_stop or clips_have or steered or golden_schedule or golden_stream'
    if name=="config not compared": k='bad_input'
    if name.startswith("AdamW"): k='muon or stepped'
    if name in("means of rank only","own of wrong turn"): k='sharded'
    r=subprocess.run([sys.executable,'-m','pytest','-q','-x','-W','ignore','test_reward_forcing.py','-k',k],capture_output=True,text=True)
    print(name,'|',[l[:110] for l in r.stdout.splitlines() if l.startswith(('FAILED','ERROR'))] or 'SURVIVES',flush=True)
open('reward_forcing.py','w').write(src)
