#!/usr/bin/env python3
"""Times one LoRA step of the same shape in PyTorch + PEFT and in our program, in alternation, on the same processor.

    bench_step.py [--program ./train_llama] [--threads 2] [--rounds 3] [--steps 5] [--floor 0.5]
    bench_step.py --device cuda [--shape 1b|3b|8b] [-b 4] [-t 2048] [--quant nf4|none] [--checkpointing]
                  [--attention sdpa|flash_attention_2] [--rounds 3] [--steps 10] [--floor 1]

cpu: fp32, the 125m shape, 512 tokens. cuda: bf16 under autocast with fp32 adapters, rank 16 on all linears, `-b`
packed documents of `-t` tokens as the rows of one pass; --checkpointing: every layer made again in the backward pass,
in ours --recompute full. NF4 comes from bitsandbytes; without it the base is bf16 on PyTorch's side, and said so. Each
side runs in a process of its own, so that neither holds the other's memory; PyTorch is timed by CUDA events.
Prints tokens/s of every round, the medians and the ratio; fails when the ratio is below the floor.
"""

import argparse
import concurrent.futures
import multiprocessing
import os
import re
import statistics
import subprocess
import sys
import time

import peers
from peers import torch

LLAMA3 = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def shape(C, F, L, NH, NKV, HS, V, tied, rope):
    return dict(hidden_size=C, intermediate_size=F, num_hidden_layers=L, num_attention_heads=NH,
                num_key_value_heads=NKV, head_dim=HS, vocab_size=V, tie_word_embeddings=tied,
                max_position_embeddings=131072, rms_norm_eps=1e-5, rope_parameters=rope)


# As the program's -m shape:NAME.
SHAPES = {
    "125m": shape(768, 2048, 12, 12, 4, 64, 32000, False, {"rope_type": "default", "rope_theta": 10000.0}),
    "1b": shape(2048, 8192, 16, 32, 8, 64, 128256, True, LLAMA3),
    "3b": shape(3072, 8192, 28, 24, 8, 128, 128256, True, LLAMA3),
    "8b": shape(4096, 14336, 32, 32, 8, 128, 128256, False, dict(LLAMA3, factor=8.0)),
}


def quantise(model, device):
    """Every linear of the layers as bitsandbytes' NF4 with double quantisation, one at a time."""
    for layer in model.model.layers:
        for parent in (layer.self_attn, layer.mlp):
            for name in [n for n, _ in parent.named_children() if n in peers.ALL_LINEARS]:
                old = getattr(parent, name)
                new = peers.bnb.nn.Linear4bit(old.in_features, old.out_features, bias=False, quant_type="nf4",
                                              compute_dtype=torch.bfloat16, compress_statistics=True, device="meta")
                new.weight = peers.bnb.nn.Params4bit(old.weight.data, requires_grad=False, quant_type="nf4",
                                                     compress_statistics=True, module=new)
                setattr(parent, name, new.to(device))
    model.is_loaded_in_4bit = True


def peft_model(args):
    """Model with adapters, and its optimizer. Random weights: the time does not depend on them."""
    torch.manual_seed(0)
    config = peers.LlamaConfig(**SHAPES[args.shape])
    config._attn_implementation = args.attention
    mixed = args.device == "cuda"
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16 if mixed else torch.float32)
    with torch.device(args.device):
        base = peers.LlamaForCausalLM(config)
    torch.set_default_dtype(before)
    if mixed and args.quant == "nf4" and peers.bnb is not None:
        quantise(base, args.device)
    lora = peers.peft.LoraConfig(r=16, lora_alpha=32, target_modules=peers.ALL_LINEARS, lora_dropout=0.0,
                                 task_type="CAUSAL_LM")
    model = peers.peft.get_peft_model(base, lora)
    if args.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    if any(p.dtype is not torch.float32 for p in trained):
        raise RuntimeError("PEFT made adapters that are not fp32")
    return model, torch.optim.AdamW(trained, lr=2e-4)


class Clock:
    """Seconds between laps: CUDA events on a GPU, else the wall clock."""

    def __init__(self, device):
        self.cuda = device == "cuda"
        self.marks = []
        self.lap()

    def lap(self):
        if self.cuda:
            self.marks.append(torch.cuda.Event(enable_timing=True))
            self.marks[-1].record()
        else:
            self.marks.append(time.perf_counter())

    def seconds(self):
        pairs = list(zip(self.marks, self.marks[1:]))
        if self.cuda:
            torch.cuda.synchronize()
            return [a.elapsed_time(b) / 1000 for a, b in pairs]
        return [b - a for a, b in pairs]


def peft_round(model, optimizer, args):
    """Seconds of each step, after one that warms up."""
    ids = torch.randint(0, SHAPES[args.shape]["vocab_size"], (args.batch, args.tokens), device=args.device)
    trained = [p for p in model.parameters() if p.requires_grad]
    clock = Clock(args.device)
    for _ in range(args.steps + 1):
        with torch.autocast(args.device, dtype=torch.bfloat16, enabled=args.device == "cuda"):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        clock.lap()
    return clock.seconds()[1:]


def cuda_round(args):
    """What a process of its own does: (seconds of each step, the card, peak bytes)."""
    try:
        model, optimizer = peft_model(args)
        seconds = peft_round(model, optimizer, args)
    except torch.cuda.OutOfMemoryError:
        raise RuntimeError("out of GPU memory; lower -b or -t, or give --checkpointing") from None
    return seconds, torch.cuda.get_device_name(), torch.cuda.max_memory_reserved()


def our_round(args):
    """Our program's median tokens/s, from the last line of its benchmark, or (None, why)."""
    command = [args.program, "--benchmark", str(args.steps), "-m", f"shape:{args.shape}", "-b", str(args.batch), "-t",
               str(args.tokens), "--device", args.device, "--quant", args.quant]
    if args.device == "cuda":
        command += ["--pass-tokens", str(args.batch * args.tokens), "--recompute",
                    "full" if args.checkpointing else "none"]
    else:
        command += ["--math", "fp32", "--threads", str(args.threads)]
    done = subprocess.run(command, capture_output=True, text=True,
                          env=dict(os.environ, OMP_NUM_THREADS=str(args.threads)))
    found = re.fullmatch(r"tokens_per_s: ([0-9.eE+-]+)", (done.stdout.strip().splitlines() or [""])[-1].strip())
    if done.returncode or not found:
        return None, f"exit status {done.returncode}: {(done.stderr or done.stdout).strip()[-300:]}"
    return float(found[1]), ""


def rounds(tally, args):
    """(theirs, ours), tokens/s; None after a failure, which is in the tally."""
    theirs, ours = [], []
    model = peft_model(args) if args.device == "cpu" else None
    for i in range(args.rounds):
        if model:
            seconds = peft_round(*model, args)
        else:
            spawn = multiprocessing.get_context("spawn")
            with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn) as pool:
                try:
                    seconds, card, peak = pool.submit(cuda_round, args).result()
                except Exception as problem:  # of another process: whatever it was, it is told
                    tally.check("PyTorch + PEFT", False, f"{type(problem).__name__}: {problem}")
                    return None
            if i == 0:
                print(f"{card}, CUDA {torch.version.cuda}; PyTorch reserved {peak / 2 ** 30:.1f} GiB", flush=True)
        theirs += [args.batch * args.tokens / s for s in seconds]
        rate, why = our_round(args)
        if rate is None:
            tally.check("our benchmark", False, why)
            return None
        ours.append(rate)
        median = args.batch * args.tokens / statistics.median(seconds)
        print(f"round {i + 1}: PyTorch + PEFT {median:.1f} tokens/s, ours {rate:.1f} tokens/s", flush=True)
    return theirs, ours


def positive(text):
    value = int(text)
    if value < 1:
        raise ValueError
    return value


def read_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--program", default="./train_llama")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=positive, default=2, help="of the CPU")
    parser.add_argument("--rounds", type=positive, default=3)
    parser.add_argument("--steps", type=positive, help="of a round (default: 5, cuda 10)")
    parser.add_argument("--floor", type=float, help="least ratio ours / theirs (default: 0.5, cuda 1)")
    parser.add_argument("--shape", choices=SHAPES, help="default: 125m, cuda 8b")
    parser.add_argument("-b", "--batch", type=positive, help="documents a step (default: 1, cuda 4)")
    parser.add_argument("-t", "--tokens", type=positive, help="of a document (default: 512, cuda 2048)")
    parser.add_argument("--quant", choices=("nf4", "none"), default="nf4", help="cpu: of ours only; PyTorch has fp32")
    parser.add_argument("--attention", choices=("sdpa", "flash_attention_2"), default="sdpa", help="PyTorch's")
    parser.add_argument("--checkpointing", action="store_true", help="cuda: gradient checkpointing, --recompute full")
    args = parser.parse_args()
    cuda = args.device == "cuda"
    if not cuda and (args.checkpointing or args.attention != "sdpa"):
        parser.error("--checkpointing and --attention need --device cuda")
    for name, of_cpu, of_cuda in (("steps", 5, 10), ("floor", 0.5, 1.0), ("shape", "125m", "8b"), ("batch", 1, 4),
                                  ("tokens", 512, 2048)):
        if getattr(args, name) is None:
            setattr(args, name, of_cuda if cuda else of_cpu)
    return args


def main():
    args = read_arguments()
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit(f"error: --device cuda: PyTorch {torch.__version__} sees no usable GPU\n"
                 "hint: run it where nvidia-smi lists one, with a CUDA build of PyTorch")
    peers.print_versions()
    tally = peers.Tally()
    if not peers.require_file(tally, args.program, "the training program"):
        tally.finish()
    torch.set_num_threads(args.threads)
    print(f"{args.device}, shape {args.shape}, {args.batch} x {args.tokens} tokens, base {args.quant}"
          + (f", {args.attention}, checkpointing {'on' if args.checkpointing else 'off'}" if args.device == "cuda"
             else f", fp32, {args.threads} threads"), flush=True)
    if args.device == "cuda" and args.quant == "nf4" and peers.bnb is None:
        print("bitsandbytes is not installed: PyTorch's base is bf16, ours NF4", flush=True)
    rates = rounds(tally, args)
    if rates:
        b, a = (statistics.median(r) for r in rates)
        print(f"median: PyTorch + PEFT {b:.1f} tokens/s, ours {a:.1f} tokens/s")
        tally.check("tokens/s against PyTorch + PEFT", a / b >= args.floor, f"ratio {a / b:.2f}, floor {args.floor}")
    tally.finish()


if __name__ == "__main__":
    main()
