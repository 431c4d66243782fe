# mo.sh NAME SEED STEPS KEEP ORDER [more]
n=$1; s=$2; st=$3; k=$4; o=$5; shift 5
r=$(python -c "print(round(1-$k,3))"); l=$(python -c "print(len($o))")
python xp.py $n $s "steps = count % cfg.denoise_steps + 1=>steps = $o[count % $l]" "momentum.lerp_(p.grad, 0.05)=>momentum.lerp_(p.grad, $r)" "x = p.grad.lerp(momentum, 0.95)=>x = p.grad.lerp(momentum, $k)" distill_steps=$st "$@" > $n.log 2>&1
