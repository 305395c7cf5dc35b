#!/usr/bin/env python3
"""Times one LoRA step of the 125m shape in PyTorch + PEFT (fp32) and in our program, in alternation, on the same cores.

    bench_step.py [--program ./train_llama] [--threads 2] [--rounds 3] [--steps 5] [--floor 0.5]

Prints tokens/s of every round, the medians and the ratio; fails when the ratio is below the floor.
"""

import argparse
import os
import re
import statistics
import subprocess
import time

import peers
from peers import torch

TOKENS = 512
SHAPE = dict(hidden_size=768, num_hidden_layers=12, num_attention_heads=12, num_key_value_heads=4,
             intermediate_size=2048, vocab_size=32000, tie_word_embeddings=False, max_position_embeddings=8192,
             rope_parameters={"rope_type": "default", "rope_theta": 500000.0})


def peft_model():
    torch.manual_seed(0)
    config = peers.LlamaConfig(**SHAPE)
    config._attn_implementation = "sdpa"
    lora = peers.peft.LoraConfig(r=16, lora_alpha=32, target_modules=peers.ALL_LINEARS, lora_dropout=0.0,
                                 task_type="CAUSAL_LM")
    model = peers.peft.get_peft_model(peers.LlamaForCausalLM(config).float(), lora)
    return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-4)


def peft_round(model, optimizer, steps):
    """Seconds of each step, after one that warms up."""
    ids = torch.randint(0, SHAPE["vocab_size"], (1, TOKENS))
    seconds = []
    for _ in range(steps + 1):
        start = time.perf_counter()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds.append(time.perf_counter() - start)
    return seconds[1:]


def our_round(program, threads, steps):
    """Our program's median tokens/s, from the last line of its benchmark, or (None, why)."""
    command = [program, "--benchmark", str(steps), "-m", "shape:125m", "-b", "1", "-t", str(TOKENS), "--math", "fp32",
               "--device", "cpu", "--threads", str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ, OMP_NUM_THREADS=str(threads)))
    found = re.fullmatch(r"tokens_per_s: ([0-9.eE+-]+)", (done.stdout.strip().splitlines() or [""])[-1].strip())
    if done.returncode or not found:
        return None, f"exit status {done.returncode}: {(done.stderr or done.stdout).strip()[-300:]}"
    return float(found[1]), ""


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--program", default="./train_llama")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--floor", type=float, default=0.5)
    args = parser.parse_args()
    peers.print_versions()
    tally = peers.Tally()
    if not peers.require_file(tally, args.program, "the training program"):
        tally.finish()
    torch.set_num_threads(args.threads)
    model, optimizer = peft_model()
    theirs, ours = [], []
    for i in range(args.rounds):
        seconds = peft_round(model, optimizer, args.steps)
        theirs += [TOKENS / s for s in seconds]
        rate, why = our_round(args.program, args.threads, args.steps)
        if rate is None:
            tally.check("our benchmark", False, why)
            tally.finish()
        ours.append(rate)
        median = TOKENS / statistics.median(seconds)
        print(f"round {i + 1}: PyTorch + PEFT {median:.1f} tokens/s, ours {rate:.1f} tokens/s", flush=True)
    a, b = statistics.median(ours), statistics.median(theirs)
    print(f"median: PyTorch + PEFT {b:.1f} tokens/s, ours {a:.1f} tokens/s, {args.threads} threads")
    tally.check("tokens/s against PyTorch + PEFT", a / b >= args.floor, f"ratio {a / b:.2f}, floor {args.floor}")
    tally.finish()


if __name__ == "__main__":
    main()
