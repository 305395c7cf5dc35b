#!/usr/bin/env python3
"""Loads an adapter in PEFT and compares its logits with ours.

    check_adapter.py ADAPTER MODEL --logits FILE [--quant none|nf4|nf4-single]

FILE: safetensors with tokens I32 [N], one document, and logits F32 [N, V], as our program computed them.
--quant: how our program held a base that is not NF4 in itself. An NF4 checkpoint is used as stored.
The bound is 1e-5 relative RMS.
"""

import argparse
import os

import peers
from peers import torch

BOUND = 1e-5


def check(tally, name, adapter, model, logits, quant):
    """Missing and unexpected keys, values that did not arrive: load_adapter raises on them."""
    try:
        stored = peers.load_file(logits)
        base, _ = peers.load_base(model, torch.float32, quant=quant)
        wrapped = peers.load_adapter(base, adapter, torch.float32, train=False)
    except Exception as problem:  # whatever the libraries raise is a failed check, and the tally must be printed
        return tally.check(f"{name}: loads in PEFT", False, f"{type(problem).__name__}: {problem}")
    keys = peers.load_file(peers.adapter_path(adapter))
    tally.check(f"{name}: loads in PEFT", True, f"{len(keys)} tensors, none missing, none unexpected")
    ids = stored["tokens"].long()[None]
    with torch.no_grad():
        theirs = wrapped(input_ids=ids, use_cache=False).logits[0]
        with wrapped.disable_adapter():
            plain = wrapped(input_ids=ids, use_cache=False).logits[0]
    found, need = tuple(stored["logits"].shape), tuple(theirs.shape)
    if found != need:
        return tally.check(f"{name}: logits", False, f"shape {found}, need {need}")
    err = peers.relative_rms(stored["logits"], theirs)
    effect = peers.relative_rms(plain, theirs)
    return tally.check(f"{name}: logits", err <= BOUND,
                       f"{ids.shape[1]} tokens, relative RMS {err:.1e} (bound {BOUND:.0e}); the adapter moves them by "
                       f"{effect:.1e}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapter")
    parser.add_argument("model")
    parser.add_argument("--logits", required=True)
    parser.add_argument("--quant", choices=["none", "nf4", "nf4-single"], default="none")
    args = parser.parse_args()
    peers.print_versions()
    torch.set_num_threads(1)
    tally = peers.Tally()
    check(tally, os.path.basename(os.path.normpath(args.adapter)), args.adapter, args.model, args.logits, args.quant)
    tally.finish()


if __name__ == "__main__":
    main()
