#!/usr/bin/env python3
"""Shows that the yardstick of the GPU tests is not inflated.

    check_bf16.py [OP...]

The tests of dev/tests/gpu_*.cpp allow a kernel twice the error of a plain evaluation that rounds to bf16 where PyTorch
rounds (check_yardstick of dev/tests/gpu.h). Here the same plain evaluations, written with the rounding points of those
tests, stand beside PyTorch's own bf16 operations, forward and backward, on the CPU. Both errors are root mean squares
against float64 on the same bf16 inputs. A plain evaluation whose error exceeds PyTorch's by more than 25 % would grant
a kernel more than twice PyTorch's error: that fails. A smaller one is only a stricter test.
"""

import argparse

import peers
from peers import torch
from transformers.models.llama import modeling_llama

F = torch.nn.functional
BOUND = 1.25
SEEDS = range(4)


def r(x):
    """x (float64) rounded to bf16."""
    return x.to(torch.bfloat16).double()


class Draw:
    """Random inputs that bf16 holds exactly, as float64."""

    def __init__(self, seed):
        self.generator = torch.Generator().manual_seed(seed)

    def uniform(self, *shape, size=1.0):
        return r(size * (2 * torch.rand(*shape, generator=self.generator, dtype=torch.float64) - 1))

    def normal(self, *shape, size=1.0):
        return r(size * torch.randn(*shape, generator=self.generator, dtype=torch.float64))

    def weight(self, *shape):
        return self.normal(*shape, size=0.7 / shape[-1] ** 0.5)

    def integers(self, high, *shape):
        return torch.randint(high, shape, generator=self.generator)


def differentiate(function, inputs, upstream, dtype, frozen=(), masters=()):
    """[output, gradient of every input] of `function` run by PyTorch on inputs + frozen + masters in `dtype`. Frozen
    ones have no gradient; masters are float32 where dtype is bf16, as autocast wants them."""
    wide = torch.float32 if dtype is torch.bfloat16 else dtype
    leaves = [x.detach().to(dtype).requires_grad_() for x in inputs]
    trained = [x.detach().to(wide).requires_grad_() for x in masters]
    out = function(*leaves, *[x.to(dtype) for x in frozen], *trained)
    out.backward(upstream.to(out.dtype))
    return [out.detach().double()] + [x.grad.double() for x in leaves + trained]


# ---------------------------------------------------------------------------------------------------------------------
# Each op: shapes, names of the values compared, PyTorch's operation, and the plain evaluation.
# An op's function gets a Draw and one of its shapes, and returns (names, exact, PyTorch's, plain).

def rmsnorm(draw, shape):
    """dx is added to the gradient that the residual stream brings."""
    N, C = shape
    x, dout, before = draw.uniform(N, C, size=3), draw.uniform(N, C), draw.uniform(N, C)
    w, eps = draw.uniform(C), 1e-5

    def torch_op(x, w):
        norm = modeling_llama.LlamaRMSNorm(C, eps)
        norm.weight = torch.nn.Parameter(w, requires_grad=False)
        return torch.cat((norm(x), x), -1)

    upstream = torch.cat((dout, before), -1)
    with peers.DoubleMode():
        exact = differentiate(torch_op, (x,), upstream, torch.float64, frozen=(w,))
    theirs = differentiate(torch_op, (x,), upstream, torch.bfloat16, frozen=(w,))
    rstd = (x.pow(2).mean(-1, keepdim=True) + eps).rsqrt()
    d = r(dout * w)
    dx = r(rstd * (d - x * rstd.pow(2) * (d * x).mean(-1, keepdim=True)))
    plain = [torch.cat((r(r(x * rstd) * w), x), -1), r(before + dx)]
    return ("out and x", "dx"), exact, theirs, plain


def rope(draw, shape, table=lambda x: x):
    """table: how the plain evaluation holds cosines and sines."""
    N, NH, HS = shape
    x, dout = draw.uniform(1, NH, N, HS), draw.uniform(1, NH, N, HS)
    frequency = 500000.0 ** (-torch.arange(0, HS, 2, dtype=torch.float64) / HS)
    angle = torch.arange(N, dtype=torch.float64)[:, None] * frequency
    cos, sin = (torch.cat((f(angle), f(angle)), -1)[None] for f in (torch.cos, torch.sin))

    def torch_op(x):
        return modeling_llama.apply_rotary_pos_emb(x, x, cos.to(x.dtype), sin.to(x.dtype))[0]

    def turn(x, sign):
        a, b = x.chunk(2, -1)
        c, s = table(cos[..., :HS // 2]), sign * table(sin[..., :HS // 2])
        return torch.cat((r(r(a * c) - r(b * s)), r(r(b * c) + r(a * s))), -1)

    exact = differentiate(torch_op, (x,), dout, torch.float64)
    theirs = differentiate(torch_op, (x,), dout, torch.bfloat16)
    return ("out", "dx"), exact, theirs, [turn(x, 1), turn(dout, -1)]


def rope_rounded_table(draw, shape):
    return rope(draw, shape, r)


def swiglu(draw, shape):
    gate, up, dout = (draw.uniform(*shape, size=s) for s in (8, 8, 1))

    def torch_op(gate, up):
        return F.silu(gate) * up

    exact = differentiate(torch_op, (gate, up), dout, torch.float64)
    theirs = differentiate(torch_op, (gate, up), dout, torch.bfloat16)
    s = torch.sigmoid(gate)
    silu = r(gate * s)
    plain = [r(silu * up), r(r(dout * up) * s * (1 + gate * (1 - s))), r(dout * silu)]
    return ("out", "dgate", "dup"), exact, theirs, plain


def cross_entropy(draw, shape):
    """With the head's product, as the classifier has it: x (n, C) -> loss of each row and the gradient of x."""
    n, C, V = shape
    x, head = draw.normal(n, C), 4 * draw.weight(V, C)
    targets = draw.integers(V, n)
    upstream = torch.full((n,), 1.0 / 64, dtype=torch.float64)

    def torch_op(x, head):
        logits = F.linear(x, head)
        return F.cross_entropy(logits if logits.dtype is torch.float64 else logits.float(), targets, reduction="none")

    exact = differentiate(torch_op, (x,), upstream, torch.float64, frozen=(head,))
    theirs = differentiate(torch_op, (x,), upstream, torch.bfloat16, frozen=(head,))
    logits = r(x @ head.T)
    p = torch.softmax(logits, -1)
    dlogits = r((p - F.one_hot(targets, V)) / 64)
    plain = [torch.logsumexp(logits, -1) - logits.gather(-1, targets[:, None])[:, 0], r(dlogits @ head)]
    return ("losses", "dx"), exact, theirs, plain


def repeat(x, times):
    return x.repeat_interleave(times, 1)


def per_kv_head(x, kv):
    """Sum over the query heads of a group, by one reduction."""
    b, heads, n, size = x.shape
    return x.reshape(b, kv, heads // kv, n, size).sum(2)


def attention_inputs(draw, shape):
    NH, NKV, T, HS, size = shape
    q, dout = draw.uniform(1, NH, T, HS, size=size), draw.uniform(1, NH, T, HS)
    k, v = (draw.uniform(1, NKV, T, HS, size=size) for _ in range(2))
    causal = torch.ones(T, T, dtype=torch.bool).tril()
    return q, k, v, dout, causal, HS ** -0.5, NH // NKV


def attention_eager(draw, shape):
    """transformers' own eager attention: scores and probabilities are bf16 tensors. The plain evaluation goes back through
    the softmax by the rounded probabilities, where PyTorch has kept them in fp32."""
    q, k, v, dout, causal, scale, group = attention_inputs(draw, shape)

    def torch_op(q, k, v):
        mask = torch.zeros(causal.shape, dtype=q.dtype).masked_fill(~causal, torch.finfo(q.dtype).min)
        scores = torch.matmul(q, repeat(k, group).transpose(2, 3)) * scale + mask
        p = F.softmax(scores, -1, dtype=torch.float64 if q.dtype is torch.float64 else torch.float32).to(q.dtype)
        return torch.matmul(p, repeat(v, group))

    exact = differentiate(torch_op, (q, k, v), dout, torch.float64)
    theirs = differentiate(torch_op, (q, k, v), dout, torch.bfloat16)
    kk, vv = repeat(k, group), repeat(v, group)
    scores = r(r(q @ kk.transpose(2, 3)) * scale).masked_fill(~causal, -torch.inf)
    p = r(torch.softmax(scores, -1))
    dp = r(dout @ vv.transpose(2, 3))
    ds = r(r(p * (dp - (dp * p).sum(-1, keepdim=True))) * scale)
    kv = k.shape[1]
    plain = [r(p @ vv), r(ds @ kk), r(per_kv_head(r(ds.transpose(2, 3) @ q), kv)),
             r(per_kv_head(r(p.transpose(2, 3) @ dout), kv))]
    return ("out", "dq", "dk", "dv"), exact, theirs, plain


def attention_sdpa(draw, shape):
    """PyTorch's flash attention on the CPU: scores in fp32, probabilities rounded for their product with v."""
    q, k, v, dout, causal, scale, group = attention_inputs(draw, shape)

    def torch_op(q, k, v):
        return F.scaled_dot_product_attention(q, repeat(k, group), repeat(v, group), is_causal=True)

    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        exact = differentiate(torch_op, (q, k, v), dout, torch.float64)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
        theirs = differentiate(torch_op, (q, k, v), dout, torch.bfloat16)
    kk, vv = repeat(k, group), repeat(v, group)
    scores = (q @ kk.transpose(2, 3) * scale).masked_fill(~causal, -torch.inf)
    largest = scores.amax(-1, keepdim=True)
    e = torch.exp(scores - largest)
    out = r(r(e) @ vv / e.sum(-1, keepdim=True))
    p = torch.softmax(scores, -1)
    delta = (dout * out).sum(-1, keepdim=True)
    ds = r(p * (dout @ vv.transpose(2, 3) - delta))
    kv = k.shape[1]
    plain = [out, r(ds @ kk * scale), r(per_kv_head(r(ds.transpose(2, 3) @ q * scale), kv)),
             r(per_kv_head(r(r(p).transpose(2, 3) @ dout), kv))]
    return ("out", "dq", "dk", "dv"), exact, theirs, plain


def linear_group(draw, shape):
    """Two PEFT LoRA linears of one input side by side, as gate and up, and a residual, under autocast. A and B are fp32
    masters, rounded to bf16 for the products. The plain evaluation keeps x A^T with the scale in it, and leaves the
    gradients of A and B in fp32, which PyTorch rounds."""
    N, C, OC, R = shape
    scale, parts = 1.75, 2
    x, dout, residual = draw.normal(N, C), draw.normal(N, parts * OC), draw.normal(N, parts * OC)
    w = [draw.weight(OC, C) for _ in range(parts)]
    masters = [0.3 * torch.randn(*s, generator=draw.generator).double() for s in ((R, C), (OC, R)) * parts]

    def part(x, w, a, b):
        linear = torch.nn.Linear(C, OC, bias=False)
        linear.weight = torch.nn.Parameter(w, requires_grad=False)
        config = peers.peft.LoraConfig(r=R, lora_alpha=R * scale, target_modules=["0"], lora_dropout=0.0)
        model = peers.peft.get_peft_model(torch.nn.Sequential(linear), config, autocast_adapter_dtype=False)
        layer = model.base_model.model[0]
        for product, value in ((layer.lora_A["default"], a), (layer.lora_B["default"], b)):
            del product.weight
            product.weight = value
        return layer(x)

    def torch_op(x, residual, w0, w1, a0, b0, a1, b1):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=x.dtype is torch.bfloat16):
            return torch.cat((part(x, w0, a0, b0), part(x, w1, a1, b1)), -1) + residual

    exact, theirs = (differentiate(torch_op, (x,), dout, t, frozen=(residual, *w), masters=masters)
                     for t in (torch.float64, torch.bfloat16))
    out, din, gradients = [], torch.zeros_like(x), []
    for k in range(parts):
        a, b, d = r(masters[2 * k]), r(masters[2 * k + 1]), dout[:, k * OC:(k + 1) * OC]
        xa, dlora = r(x @ a.T), r(scale * d)
        out.append(r(r(x @ w[k].T) + r(scale * r(xa @ b.T))))
        dxa = r(dlora @ b)
        din = r(r(din + r(d @ w[k])) + r(dxa @ a))
        gradients += [dxa.T @ x, dlora.T @ r(xa * scale) / scale]
    plain = [r(torch.cat(out, -1) + residual), din] + gradients
    return ("out", "dx", "dA 0", "dB 0", "dA 1", "dB 1"), exact, theirs, plain


ATTENTION_SHAPES = [(4, 2, 33, 16, 2), (3, 1, 70, 64, 2), (3, 1, 70, 64, 6), (2, 2, 130, 128, 2), (2, 2, 130, 128, 6)]
OPS = {
    "rmsnorm": (rmsnorm, [(70, 48), (33, 112), (33, 576)]),
    "rope": (rope, [(70, 3, 24), (33, 4, 64)]),
    "rope, bf16 table": (rope_rounded_table, [(70, 3, 24), (33, 4, 64)]),
    "swiglu": (swiglu, [(33, 112), (70, 48)]),
    "cross-entropy": (cross_entropy, [(33, 48, 101), (70, 64, 512)]),
    "attention, eager": (attention_eager, ATTENTION_SHAPES),
    "attention, sdpa": (attention_sdpa, ATTENTION_SHAPES),
    "LoRA linears": (linear_group, [(33, 48, 80, 4), (70, 112, 64, 16), (70, 576, 192, 8)]),
}


def check_op(tally, name):
    function, shapes = OPS[name]
    for shape in shapes:
        squares = {}
        for seed in SEEDS:
            names, exact, theirs, plain = function(Draw(seed), shape)
            for key, e, t, p in zip(names, exact, theirs, plain, strict=True):
                if not e.shape == t.shape == p.shape:
                    raise RuntimeError(f"{name} {key}: {e.shape}, {t.shape}, {p.shape}")
                sums = squares.setdefault(key, [0.0, 0.0, 0.0, 0])
                for i, square in enumerate(((t - e).pow(2).sum(), (p - e).pow(2).sum(), e.pow(2).sum(), e.numel())):
                    sums[i] += float(square)
        for key, (t, p, e, count) in squares.items():
            ratio = (p / t) ** 0.5
            tally.check(f"{name} {'x'.join(map(str, shape))} {key}", 0 < t and ratio <= BOUND,
                        f"{count:.0f} values, rms error PyTorch {(t / e) ** 0.5:.2e}, plain {(p / e) ** 0.5:.2e}, "
                        f"ratio {ratio:.2f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ops", nargs="*", metavar="OP", help=", ".join(OPS))
    args = parser.parse_args()
    unknown = [o for o in args.ops if o not in OPS]
    if unknown:
        parser.error(f"unknown op {unknown[0]}; one of: {', '.join(OPS)}")
    peers.print_versions()
    torch.set_num_threads(1)
    tally = peers.Tally()
    for name in args.ops or OPS:
        check_op(tally, name)
    tally.finish()


if __name__ == "__main__":
    main()
