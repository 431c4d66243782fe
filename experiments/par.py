import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa
def rot(x, rope, rf):
    return rf.rotate(x, rope)
def attn(a, q, k, v):                # (B,c,T,H,D) each
    B, c = q.shape[:2]
    q, k, v = [x.flatten(0, 1).transpose(1, 2) for x in (q, k, v)]
    return sdpa(q, k, v).transpose(1, 2).flatten(2).view(B, c, q.shape[2], -1)
def make(rf, n):
    rotate, modulate = rf.rotate, rf.modulate
    def pblock(block, x, emb6, text_kv, P0, P3, P6, M):
        B, m = x.shape[:2]
        mod = (block.modulation + emb6).unsqueeze(3).unsqueeze(3)      # (B,m,6,1,1,dim)
        shift1, scale1, gate1, shift2, scale2, gate2 = mod.unbind(2)
        h = modulate(x, shift1, scale1).flatten(2, 3).flatten(0, 1)    # (B*m,48,dim)
        sa = block.self_attn
        q = sa.query(h).unflatten(0, (B, m))
        k, v = [y.unflatten(0, (B, m)) for y in sa.key_value(h)]
        kc, vc = k[:, :n-1], v[:, :n-1]
        sink_k = torch.einsum('ij,bjthd->bithd', M, kc); sink_v = torch.einsum('ij,bjthd->bithd', M, vc)
        ck = torch.cat([rotate(sink_k, P0), rotate(kc[:, 1:], P3)], 2)  # (B,n-2,96,..) for i=2..n-1
        cv = torch.cat([sink_v, vc[:, 1:]], 2)
        big = lambda y: torch.cat([y[:, 2:n-1], y[:, n+1:]], 1)
        K = torch.cat([torch.cat([ck[:, :n-3], ck], 1), rotate(big(k), P6)], 2)
        V = torch.cat([torch.cat([cv[:, :n-3], cv], 1), big(v)], 2)
        ob = attn(sa, rotate(big(q), P6), K, V)
        one = lambda y: torch.stack([y[:, 1], y[:, n]], 1)
        k0, v0 = kc[:, :1].expand(-1, 2, -1, -1, -1), vc[:, :1].expand(-1, 2, -1, -1, -1)
        o1 = attn(sa, rotate(one(q), P3), torch.cat([rotate(k0, P0), rotate(one(k), P3)], 2), torch.cat([v0, one(v)], 2))
        zero = lambda y: torch.stack([y[:, 0], y[:, n-1]], 1)
        o0 = attn(sa, rotate(zero(q), P0), rotate(zero(k), P0), zero(v))
        o = torch.cat([o0[:, :1], o1[:, :1], ob[:, :n-3], o0[:, 1:], o1[:, 1:], ob[:, n-3:]], 1)   # (B,m,48,dim)
        x = x + gate1 * sa.o(o).view_as(x)
        ca = block.cross_attn
        q = ca.query(block.norm3(x).flatten(1, 3))                     # (B, m*48, H, D)
        x = x + ca(q, *text_kv).view_as(x)
        x = x + gate2 * block.ffn(modulate(x, shift2, scale2))
        return x
    return pblock
def forward(rf, model, clean, noisy, sigma, text, cfg, pblock):
    """x0 predictions (B,F,C,h,w) of the noisy chunks, context gradient included"""
    B, F = clean.shape[:2]; n = F // 3
    x = torch.cat([clean[:, :-3], noisy], 1)
    s = torch.cat([torch.zeros(B, n - 1), sigma[:, ::3]], 1)
    emb = model.time_embedding(model.embed_sigma(s)); emb6 = model.time_projection(emb).unflatten(2, (6, -1))
    P = [rf.rope_table(cfg, p, 3, x.device) for p in (0, 3, 6)]
    a = cfg.alpha; rows = [torch.eye(n-1)[0]]
    for i in range(3, n): rows.append(a * rows[-1] + (1 - a) * torch.eye(n-1)[i-2])
    M = torch.stack(rows)
    h = model.patch_embedding(x.transpose(1, 2)).flatten(3).permute(0, 2, 3, 1).contiguous()
    h = h.unflatten(1, (2*n-1, 3))
    kv = model.embed_text(text)
    for l, b in enumerate(model.blocks): h = pblock(b, h, emb6, kv[l], *P, M)
    h, emb = h[:, n-1:].flatten(1, 2), emb[:, n-1:].repeat_interleave(3, 1)
    v = rf.unpatchify(model.head(h, emb), cfg.rows)
    return rf.recover_x0(noisy, v, sigma)
