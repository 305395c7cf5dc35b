#!/usr/bin/env python3
"""Times LoRA steps of PyTorch + transformers + PEFT: the other side of bench_peers.py, a process for each measurement.

    peft_step.py --base fp32|bf16|nf4-fp32|nf4-bf16 [-m shape:125m] [-t 512] [--threads 2] [--steps 5]
    peft_step.py --device cuda --base nf4-bf16|bf16 [-m shape:8b] [-b 4] [-t 2048] [--steps 10] [--checkpointing]
                 [--attention sdpa|flash_attention_2]

A step: forward, backward, clip to norm 1, AdamW on the adapters, of `-b` documents of `-t` random tokens, rank 16 on
all seven linears. The first step warms up and is not counted. Random weights: the time does not depend on them. The
last line of the output is JSON: seconds of each step, versions, of a GPU its name and the bytes that PyTorch reserved.

PyTorch is to be neither hindered nor flattered:
  - torch.set_num_threads is --threads (the caller sets OMP_NUM_THREADS too), attention is sdpa unless told, gradient
    checkpointing off unless told, torch.compile off;
  - bf16 on the CPU: the whole model in bf16 and no autocast; the adapters are fp32, as PEFT's autocast_adapter_dtype
    makes them by default. On a GPU: the same model under bf16 autocast;
  - nf4: the linears of the layers are bitsandbytes' Linear4bit with double quantisation; everything else has the dtype
    of the computation, as from_pretrained with dtype= leaves it. prepare_model_for_kbit_training is not called: it
    would make embedding, norms and head fp32, and the step slower.
"""

import argparse
import json
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


def quantise(model, device, compute):
    """Every linear of the layers, one at a time."""
    for layer in model.model.layers:
        for parent in (layer.self_attn, layer.mlp):
            for name in [n for n, _ in parent.named_children() if n in peers.ALL_LINEARS]:
                old = getattr(parent, name)
                new = peers.bnb.nn.Linear4bit(old.in_features, old.out_features, bias=False, quant_type="nf4",
                                              compute_dtype=compute, compress_statistics=True, device="meta")
                new.weight = peers.bnb.nn.Params4bit(old.weight.data, requires_grad=False, quant_type="nf4",
                                                     compress_statistics=True, module=new)
                setattr(parent, name, new.to(device))
    model.is_loaded_in_4bit = True


def lora_model(args):
    torch.manual_seed(0)
    if args.model.startswith("shape:"):
        config = peers.LlamaConfig(**SHAPES[args.model[len("shape:"):]])
    else:
        config = peers.LlamaConfig.from_pretrained(args.model)
    config._attn_implementation = args.attention
    dtype = torch.float32 if args.base.endswith("fp32") else torch.bfloat16
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    with torch.device(args.device):
        base = peers.LlamaForCausalLM(config)
    torch.set_default_dtype(before)
    if args.base.startswith("nf4"):
        if peers.bnb is None:
            sys.exit("bitsandbytes is not installed")
        quantise(base, args.device, dtype)
    lora = peers.peft.LoraConfig(r=16, lora_alpha=32, target_modules=peers.ALL_LINEARS, lora_dropout=0.0,
                                 task_type="CAUSAL_LM")
    model = peers.peft.get_peft_model(base, lora)
    if args.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    if any(p.dtype is not torch.float32 for p in model.parameters() if p.requires_grad):
        sys.exit("PEFT made adapters that are not fp32")
    return model


class Clock:
    """Seconds between laps: CUDA events on a GPU, else the wall clock."""

    def __init__(self, device):
        self.cuda = device == "cuda"
        self.marks = []

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


def seconds_of_steps(args):
    model = lora_model(args)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-4)
    ids = torch.randint(0, model.config.vocab_size, (args.batch, args.tokens), device=args.device)
    clock = Clock(args.device)
    for _ in range(args.steps + 1):
        with torch.autocast(args.device, dtype=torch.bfloat16, enabled=args.device == "cuda"):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        clock.lap()
    return clock.seconds()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", choices=("fp32", "bf16", "nf4-fp32", "nf4-bf16"), required=True)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("-m", "--model", default="shape:125m", help="shape:NAME, or a directory with config.json")
    parser.add_argument("-b", "--batch", type=int, default=1)
    parser.add_argument("-t", "--tokens", type=int, default=512)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--attention", choices=("sdpa", "flash_attention_2"), default="sdpa")
    parser.add_argument("--checkpointing", action="store_true")
    args = parser.parse_args()
    if args.model.startswith("shape:") and args.model[len("shape:"):] not in SHAPES:
        parser.error(f"-m {args.model}: no such shape, need one of {', '.join(SHAPES)}")
    torch.set_num_threads(args.threads)
    modules = (torch, peers.transformers, peers.peft, *((peers.bnb,) if peers.bnb else ()))
    found = dict(versions={m.__name__: m.__version__.split("+")[0] for m in modules})
    if args.device == "cpu":
        found["seconds"] = seconds_of_steps(args)
    elif not torch.cuda.is_available():
        sys.exit(f"PyTorch {torch.__version__} sees no usable GPU: need a CUDA build, and a GPU that nvidia-smi lists")
    else:
        try:
            found["seconds"] = seconds_of_steps(args)
        except torch.cuda.OutOfMemoryError:
            sys.exit("out of GPU memory; lower -b or -t, or give --checkpointing")
        found.update(card=torch.cuda.get_device_name(), cuda=torch.version.cuda,
                     reserved=torch.cuda.max_memory_reserved())
    print(json.dumps(found))


if __name__ == "__main__":
    main()
