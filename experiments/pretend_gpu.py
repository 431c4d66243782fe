"""A pretend GPU: tensors that say they are on device gpu:0, compute on the CPU, and refuse to mix with CPU tensors as CUDA does."""
import torch
from torch.utils._pytree import tree_map
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend
_setup_privateuseone_for_python_backend("gpu")
aten = torch.ops.aten
COPY = {aten._to_copy.default, aten.copy_.default}
INDEX = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default}
MOVES = []
class T(torch.Tensor):
    @staticmethod
    def __new__(cls, raw):
        return torch.Tensor._make_wrapper_subclass(cls, raw.size(), strides=raw.stride(), storage_offset=raw.storage_offset(),
                                                   dtype=raw.dtype, device="gpu:0", requires_grad=raw.requires_grad)
    def __init__(self, raw): self.raw = raw
    def __repr__(self, **k): return f"T({self.raw})"
    def numpy(self, *a, **k): raise TypeError("can't convert gpu device type tensor to numpy")
    def __array__(self, *a, **k): raise TypeError("can't convert gpu device type tensor to numpy")
    @property
    def data(self): return torch.Tensor.data.__get__(self)
    @data.setter
    def data(self, value):
        if isinstance(value, T): self.raw = value.raw
        torch.Tensor.data.__set__(self, value)
    def tolist(self): return self.raw.tolist()
    def __reduce_ex__(self, p): return self.raw.__reduce_ex__(p)
    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})
def isgpu(d): return d is not None and torch.device(d).type == "gpu"
def run(func, args, kwargs):
    flat, _ = torch.utils._pytree.tree_flatten((args, kwargs))
    ts = [x for x in flat if isinstance(x, torch.Tensor)]
    gpu = any(isinstance(x, T) for x in ts)
    dev = kwargs.get("device")
    if gpu and func not in COPY:
        for x in ts:
            if not isinstance(x, T) and x.dim() > 0 and x.device.type != "meta":
                if func in INDEX and isinstance(args[0], T) and not x.is_floating_point(): continue
                if func in INDEX and isinstance(args[0], T) and len(args) > 2 and x is args[2]: pass
                raise RuntimeError(f"Expected all tensors on the same device, {func} got cpu {tuple(x.shape)}")
        if func in INDEX and not isinstance(args[0], T):
            raise RuntimeError(f"indices should be on cpu: {func}")
        # outputs in place on a CPU 0-dim tensor from gpu
        if func._schema.is_mutable and isinstance(args[0], torch.Tensor) and not isinstance(args[0], T):
            raise RuntimeError(f"{func} writes gpu into cpu")
    unwrap = lambda x: x.raw if isinstance(x, T) else (torch.device("cpu") if isinstance(x, torch.device) and x.type == "gpu" else x)
    a, k = tree_map(unwrap, args), tree_map(unwrap, kwargs)
    k.pop("pin_memory", None)
    if k.get("layout") is torch.strided: k.pop("layout")
    out_gpu = isgpu(dev) if dev is not None else gpu
    if func is aten.copy_.default:
        if isinstance(args[0], T) != isinstance(args[1], T): MOVES.append((tuple(args[1].shape)))
        a[0].copy_(a[1]); return args[0]
    if func is aten._local_scalar_dense.default: return func(*a, **k)
    out = func(*a, **k)
    if func._schema.is_mutable and isinstance(args[0], T) and isinstance(out, torch.Tensor) and out is a[0]:
        if not func.__name__.startswith(("set_", "resize_")) and out.shape == args[0].shape and out.stride() == args[0].stride(): return args[0]
    raws = {id(x.raw): x for x in ts if isinstance(x, T)}
    def wrap(x):
        if not isinstance(x, torch.Tensor) or isinstance(x, T) or not out_gpu: return x
        if func._schema.is_mutable and id(x) in raws: return raws[id(x)]
        return T(x)
    return tree_map(wrap, out)
class Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})
_tensor = torch.tensor
def tensor(data, *, dtype=None, device=None, **k):
    device = device or torch.empty(0).device
    if isinstance(data,(list,tuple)): data = tree_map(lambda x: x.item() if isinstance(x, torch.Tensor) and x.dim()==0 else x, data)
    with torch.device("cpu"):
        out = _tensor(data, dtype=dtype, **k)
    return out.to(device)
torch.tensor = tensor
class Stream:
    def wait_stream(self, o): pass
class Null:
    def __enter__(self): pass
    def __exit__(self, *a): pass
lib = torch.library.Library("aten", "IMPL")
def empty_strided(size, stride, *, dtype=None, layout=None, device=None, pin_memory=None):
    return T(torch.empty_strided(size, stride, dtype=dtype, device="cpu"))
def empty(size, *, dtype=None, layout=None, device=None, pin_memory=None, memory_format=None):
    return T(torch.empty(size, dtype=dtype, device="cpu"))
lib.impl("empty_strided", empty_strided, "PrivateUse1")
lib.impl("empty.memory_format", empty, "PrivateUse1")
def copy_from(src, dst, non_blocking=False):
    (dst.raw if isinstance(dst, T) else dst).copy_(src.raw if isinstance(src, T) else src)
    return dst
lib.impl("_copy_from", copy_from, "PrivateUse1")
_load = torch.load
def load(f, map_location=None, **k):
    if map_location is not None and torch.device(map_location).type == "gpu":
        with torch.device("cpu"):
            out = _load(f, map_location="cpu", **k)
        return tree_map(lambda x: x.to("gpu:0") if isinstance(x, torch.Tensor) else x, out)
    return _load(f, map_location=map_location, **k)
torch.load = load
import types
class _S:
    def wait_stream(self, o): pass
STUB = types.SimpleNamespace(is_available=lambda: False, device_count=lambda: 0, Stream=_S, stream=lambda s: Null(), current_stream=lambda: None)
REAL = torch.get_device_module
torch.get_device_module = lambda d=None: STUB if d is not None and torch.device(d).type == "gpu" else REAL(d)
