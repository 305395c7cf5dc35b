#!/usr/bin/env python3
"""Compares our NF4 quantiser with bitsandbytes on more than 10 million random and adversarial weights.

    check_nf4.py [PROGRAM]      default: build/release/nf4_dump

PROGRAM IN.f32 OUT.safetensors quantises a raw little-endian float32 file of n weights, n a multiple of 64.
OUT: codes U8 [n/2], absmax F32 [n/64], absmax8 U8 [n/64], absmax2 F32 [ceil(n/64/256)], offset F32 [1].
4-bit codes and absmax must equal bitsandbytes' bytes. Second-level codes must be the nearest entries of the dynamic
map; bitsandbytes' CPU back end picks a neighbour near some midpoints, which is counted and printed.
"""

import os
import subprocess
import sys
import tempfile

import peers
from peers import bnb, np, torch

BLOCK, BLOCK2 = 64, 256
F32 = np.float32
TINY, HUGE = np.finfo(F32).tiny, np.finfo(F32).max


def scaled_blocks(rng, blocks, scales):
    """Normal values, each block of 64 with its own scale."""
    return (rng.standard_normal((blocks, BLOCK)) * np.asarray(scales).reshape(-1, 1)).astype(F32).reshape(-1)


def threshold_blocks(rng, blocks):
    """Values whose quotient by the block's absmax lies at a decision threshold, or up to 2 ulp to either side."""
    code = bnb.functional.get_4bit_type("nf4", device="cpu").numpy()
    thresholds = ((code[1:] + code[:-1]) / F32(2)).astype(F32)
    absmax = np.exp(rng.uniform(-12, 4, blocks)).astype(F32)
    absmax[::7] = (2.0 ** rng.integers(-30, 30, len(absmax[::7]))).astype(F32)
    t = thresholds[rng.integers(0, 15, (blocks, BLOCK))]
    x = (t * absmax[:, None]).astype(F32)
    bits = x.view(np.int32) + rng.integers(-2, 3, x.shape, dtype=np.int32)
    x = bits.view(F32)
    place = rng.integers(0, BLOCK, blocks)
    x[np.arange(blocks), place] = np.where(rng.random(blocks) < 0.5, absmax, -absmax)
    return x.reshape(-1)


def constant_blocks(rng, blocks):
    """All-equal blocks, blocks of one non-zero value, blocks of +a and -a."""
    a = np.exp(rng.uniform(-20, 10, (blocks, 1))).astype(F32)
    sign = np.where(rng.random((blocks, 1)) < 0.5, F32(1), F32(-1))
    x = np.repeat(a * sign, BLOCK, axis=1)
    single = np.zeros((blocks, BLOCK), F32)
    single[np.arange(blocks), rng.integers(0, BLOCK, blocks)] = (a * sign)[:, 0]
    both = np.where(rng.random((blocks, BLOCK)) < 0.5, a, -a).astype(F32)
    kind = rng.integers(0, 3, (blocks, 1))
    return np.where(kind == 0, x, np.where(kind == 1, single, both)).astype(F32).reshape(-1)


def zero_blocks(rng, blocks):
    """A third of the blocks all +0, a third +0 and -0 mixed, a third normal."""
    x = scaled_blocks(rng, blocks, np.full(blocks, 0.02)).reshape(blocks, BLOCK)
    kind = rng.integers(0, 3, blocks)
    x[kind == 0] = 0.0
    signs = np.where(rng.random(x.shape) < 0.5, F32(0.0), F32(-0.0))
    x[kind == 1] = signs[kind == 1]
    x[kind == 2, ::5] = F32(-0.0)
    return x.reshape(-1)


def bits_blocks(rng, blocks):
    """Any finite bit pattern, every exponent."""
    bits = rng.integers(0, 1 << 32, blocks * BLOCK, dtype=np.uint64).astype(np.uint32)
    bits[(bits & 0x7F800000) == 0x7F800000] &= 0xFF7FFFFF
    return bits.view(F32)


def as_bf16(x):
    return torch.from_numpy(x).to(torch.bfloat16).float().numpy()


def cases(rng):
    """(name, weights). Lengths are multiples of 64, with and without a partial second-level block."""
    n = 16384 + 37
    yield "normal, 0.02", scaled_blocks(rng, n, np.full(n, 0.02))
    yield "normal, 0.02, bf16", as_bf16(scaled_blocks(rng, 4 * n, np.full(4 * n, 0.02)))
    yield "normal, own scale a block", scaled_blocks(rng, n, np.exp(rng.uniform(-10, 3, n)))
    yield "uniform", rng.uniform(-1, 1, n * BLOCK).astype(F32)
    yield "Student t, 2 degrees of freedom, bf16", as_bf16((0.02 * rng.standard_t(2, n * BLOCK)).astype(F32))
    yield "Cauchy", rng.standard_cauchy(n * BLOCK).astype(F32)
    yield "thresholds and 1, 2 ulp beside them", threshold_blocks(rng, 2 * n)
    yield "constant, single, plus-minus blocks", constant_blocks(rng, 4096)
    yield "zero blocks, negative zeros", zero_blocks(rng, 4096)
    yield "small normal numbers", (scaled_blocks(rng, 4096, np.full(4096, 1.0)) * F32(64 * TINY)).astype(F32)
    yield "subnormal numbers", (scaled_blocks(rng, 4096, np.exp(rng.uniform(-16, 0, 4096))) * TINY).astype(F32)
    yield "huge numbers", np.clip(scaled_blocks(rng, 4096, np.full(4096, 1.0)).astype(np.float64) * 1e38,
                                  -float(HUGE), float(HUGE)).astype(F32)
    yield "any finite bits", bits_blocks(rng, 4096)
    yield "one block", scaled_blocks(rng, 1, [0.5])
    yield "257 blocks", scaled_blocks(rng, 257, np.full(257, 0.02))
    yield "equal blocks (second level all zero)", np.tile(scaled_blocks(rng, 1, [0.3]), 300)


def compare(tally, name, w, got):
    """Returns (weights, second-level codes, ties, differences from bitsandbytes' CPU back end)."""
    blocks = w.size // BLOCK
    groups = -(-blocks // BLOCK2)
    shapes = {"codes": ((w.size // 2,), np.uint8), "absmax": ((blocks,), F32), "absmax8": ((blocks,), np.uint8),
              "absmax2": ((groups,), F32), "offset": ((1,), F32)}
    wrong = [k for k, (shape, dtype) in shapes.items()
             if k not in got or got[k].shape != shape or got[k].dtype != dtype]
    if not tally.check(f"{name}: names, shapes and types", not wrong, ", ".join(wrong)):
        return 0, 0, 0, 0

    packed, state = bnb.functional.quantize_4bit(torch.from_numpy(w), blocksize=BLOCK, quant_type="nf4",
                                                 compress_statistics=False)
    theirs, absmax = packed.reshape(-1).numpy(), state.absmax.numpy()
    zero = np.abs(w).reshape(blocks, BLOCK).max(axis=1) == 0
    pairs = np.repeat(zero, BLOCK // 2)
    differ = np.flatnonzero((got["codes"] != theirs) & ~pairs)
    tally.check(f"{name}: 4-bit codes", differ.size == 0,
                f"{w.size} weights" + (f", {differ.size} bytes differ, the first at weight {2 * differ[0]}"
                                       if differ.size else ""))
    differ = np.flatnonzero((got["absmax"].view(np.uint32) != absmax.view(np.uint32)) & ~zero)
    tally.check(f"{name}: absmax bytes", differ.size == 0,
                f"{blocks} blocks" + (f", {differ.size} differ" if differ.size else ""))
    if zero.any():
        # bitsandbytes' CUDA kernel gives code 0 there, its CPU back end code 7; both restore zeros.
        tally.check(f"{name}: zero blocks are code 7, absmax +0",
                    (got["codes"][pairs] == 0x77).all() and (got["absmax"][zero].view(np.uint32) == 0).all(),
                    f"{zero.sum()} blocks, {np.sum(theirs[pairs] != 0x77)} bytes of bitsandbytes' differ")

    nearest, absmax2, offset, x, usable = peers.second_level(absmax)
    tally.check(f"{name}: offset", got["offset"][0] == offset, f"{got['offset'][0]}, need {offset}")
    tally.check(f"{name}: second-level absmax", (got["absmax2"] == absmax2).all(), f"{groups} blocks")
    table = peers.dynamic_map().astype(np.float64)
    ours = got["absmax8"].astype(np.int64)
    distance = np.abs(table[ours] - x) - np.abs(table[nearest] - x)
    # A midpoint held in fp32 is rounded: a distance within that of the least one is a tie.
    tie = (ours != nearest) & (distance <= 2.0 ** -23 * np.abs(x)) & usable
    bad = (ours != nearest) & ~tie & usable
    _, nested = bnb.functional.quantize_4bit(torch.from_numpy(w), blocksize=BLOCK, quant_type="nf4",
                                             compress_statistics=True)
    other = int(np.sum((nested.absmax.numpy() != ours) & usable))
    tally.check(f"{name}: second-level codes", not bad.any(),
                f"{blocks} codes, {tie.sum()} at a midpoint, {np.sum(~usable)} without a scale, "
                f"{other} differ from bitsandbytes' CPU back end"
                + (f", {bad.sum()} wrong, the first at block {np.flatnonzero(bad)[0]}" if bad.any() else ""))
    return w.size, blocks, int(tie.sum()), other


def main():
    if len(sys.argv) > 2 or sys.argv[1:] in (["-h"], ["--help"]):
        sys.exit(__doc__)
    program = sys.argv[1] if len(sys.argv) > 1 else "build/release/nf4_dump"
    peers.print_versions()
    torch.set_num_threads(1)
    tally = peers.Tally()
    totals = np.zeros(4, np.int64)
    if peers.require_file(tally, program, "the program that quantises"):
        rng = np.random.default_rng(20240607)
        with tempfile.TemporaryDirectory() as folder:
            source, target = os.path.join(folder, "in.f32"), os.path.join(folder, "out.safetensors")
            for name, w in cases(rng):
                w.astype("<f4").tofile(source)
                done = subprocess.run([program, source, target], capture_output=True, text=True)
                if tally.check(f"{name}: exit status", done.returncode == 0, done.stderr.strip()[-300:]):
                    got = {k: v.numpy().copy() for k, v in peers.load_file(target).items()}
                    os.remove(target)
                    totals += compare(tally, name, w, got)
        print(f"{totals[0]} weights, {totals[1]} second-level codes, {totals[2]} at a midpoint; "
              f"{totals[3]} second-level codes differ from bitsandbytes' CPU back end")
        tally.check("at least 10 million weights", totals[0] >= 10_000_000, str(totals[0]))
    tally.finish()


if __name__ == "__main__":
    main()
