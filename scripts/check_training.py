#!/usr/bin/env python3
"""Trains the same adapters with our program and with PEFT, and compares every step's loss and the result.

    check_training.py [--program ./train_llama] [--logits-program build/release/logits_dump] [CASE...]

Bounds: relative difference of every step's loss and gradient norm 2e-5, also of the loss after the last update (our
adapter, evaluated by PEFT); logits of our adapter by PEFT and by us 1e-5 relative RMS. PEFT's own error against float64
is printed beside them. Without CASE also the first steps of dev/ref/tiny_bf16.json, on text instead of tokens.
"""

import argparse
import json
import math
import os
import subprocess
import tempfile

import check_adapter
import dump_reference
import peers
from peers import np, torch

STEPS, BATCH = 20, 4
# PEFT's own fp32 runs stay about 1e-6 from float64 here, in loss and in norm; the rest is for other orders of sums.
BOUND = 2e-5
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}


def model_config(dtype, tie, **more):
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 128,
              "intermediate_size": 320, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
              "vocab_size": 320, "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "hidden_act": "silu",
              "rope_theta": 500000.0, "tie_word_embeddings": tie, "bos_token_id": 256, "eos_token_id": 257,
              "dtype": dtype}
    return dict(config, **more)


BF16 = dict(config=model_config("bfloat16", True, rope_scaling=LLAMA3), dtype="bf16")
FP32 = dict(config=model_config("float32", False, hidden_size=144, head_dim=32), dtype="f32")
NF4 = dict(config=model_config("bfloat16", False), dtype="bf16", stored="nf4")
NF4_SINGLE = dict(config=model_config("bfloat16", True), dtype="bf16", stored="nf4-single")
ALL = dict(rank=8, alpha=16, targets=peers.ALL_LINEARS)
CONSTANT = dict(lr=1e-3, schedule="constant", warmup=0, weight_decay=0.0, clip=1.0)
LINEAR = dict(lr=2e-3, schedule="linear", warmup=3, weight_decay=0.01, clip=1.0)
COSINE = dict(lr=1e-3, schedule="cosine", warmup=2, weight_decay=0.1, clip=0.3)

# quant: what our program is told, and how PEFT's side holds a base that is not NF4 in itself
CASES = {
    "bf16, B zero": dict(model=BF16, lora=ALL, b_scale=0.0, recipe=CONSTANT, quant="none"),
    "bf16, B non-zero": dict(model=BF16, lora=ALL, b_scale=0.3, recipe=LINEAR, quant="none"),
    "f32, B zero, rsLoRA": dict(model=FP32, lora=dict(ALL, rslora=True), b_scale=0.0, recipe=LINEAR, quant="none"),
    "f32, q and v only": dict(model=FP32, lora=dict(rank=4, alpha=8, targets=["q_proj", "v_proj"]), b_scale=0.3,
                              recipe=COSINE, quant="none"),
    "bnb-NF4 checkpoint, B zero": dict(model=NF4, lora=ALL, b_scale=0.0, recipe=CONSTANT, quant="nf4"),
    "bnb-NF4 checkpoint, B non-zero": dict(model=NF4, lora=ALL, b_scale=0.3, recipe=COSINE, quant="nf4"),
    "bnb-NF4 checkpoint without double quantisation": dict(model=NF4_SINGLE, lora=ALL, b_scale=0.3, recipe=CONSTANT,
                                                           quant="nf4-single"),
    "bf16 quantised by us": dict(model=BF16, lora=ALL, b_scale=0.3, recipe=CONSTANT, quant="nf4"),
    "f32 quantised by us without double quantisation": dict(model=FP32, lora=ALL, b_scale=0.0, recipe=LINEAR,
                                                            quant="nf4-single"),
}


def write_data(path, vocab):
    """37 documents, so that the last step of an epoch holds one. Labels as transformers has them: -100 = none, not
    shifted. Returns [(tokens, targets)], targets shifted."""
    rng = np.random.default_rng(7)
    documents = []
    with open(path, "w", encoding="utf-8") as f:
        for _ in range(37):
            length = int(rng.integers(3, 60))
            prompt = int(rng.integers(1, length - 1))
            ids = rng.integers(0, vocab, length).tolist()
            labels = [-100] * prompt + ids[prompt:]
            if length > 12:
                labels[prompt + (length - prompt) // 2] = -100
            f.write(json.dumps({"input_ids": ids, "labels": labels}) + "\n")
            documents.append((ids, [t if t >= 0 else -1 for t in labels[1:]] + [-1]))
    return documents


def rate(recipe, step):
    """Learning rate of step 0, 1, …, as the README defines it."""
    if step < recipe["warmup"]:
        return recipe["lr"] * (step + 1) / recipe["warmup"]
    done, left = step - recipe["warmup"], STEPS - recipe["warmup"]
    factor = {"constant": 1.0, "linear": (left - done) / left, "cosine": 0.5 * (1 + math.cos(math.pi * done / left))}
    return recipe["lr"] * factor[recipe["schedule"]]


def batches(documents):
    """The documents of each step: file order, every epoch, the last step of an epoch shorter."""
    epoch = [documents[i:i + BATCH] for i in range(0, len(documents), BATCH)]
    return [epoch[s % len(epoch)] for s in range(STEPS)]


def peft_side(case, model_path, adapter, documents, dtype):
    recipe = case["recipe"]
    base, _ = peers.load_base(model_path, dtype, quant=case["quant"])
    model = peers.load_adapter(base, adapter, dtype, train=True)
    optimizer = peers.make_optimizer(model, recipe["lr"], 1e-6, recipe["weight_decay"])
    rows = []
    with peers.precision(dtype):
        for step, batch in enumerate(batches(documents)):
            optimizer.param_groups[0]["lr"] = rate(recipe, step)
            loss = peers.backward(model, batch)
            rows.append(dict(loss=loss, grad_norm=peers.clip_and_update(model, optimizer, recipe["clip"]),
                             lr=rate(recipe, step), tokens=sum(len(t) for t, _ in batch),
                             target_tokens=sum(t >= 0 for _, targets in batch for t in targets)))
        after = batch_loss(model, batches(documents)[0])
    return rows, after


def batch_loss(model, batch):
    count = sum(t >= 0 for _, targets in batch for t in targets)
    with torch.no_grad():
        return sum(peers.document_loss(model, tokens, targets, count)[0].item() for tokens, targets in batch
                   if any(t >= 0 for t in targets))


def our_side(program, case, model_path, adapter, data, out):
    recipe = case["recipe"]
    command = [program, "-m", model_path, "-i", data, "--format", "tokens", "--init-adapter", adapter, "--no-shuffle",
               "--math", "fp32", "--device", "cpu", "--eps", "1e-6", "-n", str(STEPS), "-b", str(BATCH), "--val",
               "none", "-o", out, "--quant", case["quant"].split("-")[0], "--lr", repr(recipe["lr"]), "--schedule",
               recipe["schedule"], "--warmup", str(recipe["warmup"]), "--weight-decay", repr(recipe["weight_decay"]),
               "--clip", repr(recipe["clip"])]
    # A checkpoint that is NF4 in itself is used as stored, whatever its levels.
    if case["quant"] == "nf4-single" and "stored" not in case["model"]:
        command.append("--no-double-quant")
    return subprocess.run(command, capture_output=True, text=True)


def read_log(path):
    with open(path, encoding="utf-8") as f:
        events = [json.loads(line) for line in f]
    return [e for e in events if e["event"] == "step"]


def worst(ours, theirs, key):
    """Largest relative difference over the steps; NaN stays NaN and fails every bound."""
    a, b = (np.array([r[key] for r in rows], np.float64) for rows in (ours, theirs))
    return float(np.max(np.abs(a / b - 1)))


def check_case(tally, name, case, args, folder):
    model, adapter, out = (os.path.join(folder, d) for d in ("model", "adapter", "out"))
    data, tokens, logits = (os.path.join(folder, f) for f in ("data.jsonl", "tokens.safetensors", "logits.safetensors"))
    spec = case["model"]
    if "stored" in spec:
        peers.write_model(os.path.join(folder, "source"), spec["config"], peers.DTYPES[spec["dtype"]], 31)
        peers.write_nf4_model(model, os.path.join(folder, "source"), spec["stored"] == "nf4")
    else:
        peers.write_model(model, spec["config"], peers.DTYPES[spec["dtype"]], 31)
    peers.write_tokenizer(model)
    peers.write_adapter(adapter, model, 32, case["b_scale"], **case["lora"])
    documents = write_data(data, spec["config"]["vocab_size"])

    done = our_side(args.program, case, model, adapter, data, out)
    if not tally.check(f"{name}: our program", done.returncode == 0, (done.stderr or done.stdout).strip()[-500:]
                       if done.returncode else ""):
        return
    ours = read_log(os.path.join(out, "log.jsonl"))
    numbers = [r["step"] for r in ours]
    if not tally.check(f"{name}: steps in the log", numbers == list(range(1, STEPS + 1)), str(len(ours))):
        return
    theirs, after = peft_side(case, model, adapter, documents, torch.float32)
    truth, after_truth = peft_side(case, model, adapter, documents, torch.float64)
    for key in ("tokens", "target_tokens"):
        tally.check(f"{name}: {key} of every step", [r[key] for r in ours] == [r[key] for r in theirs])
    # The rate is the same formula in double, or in single precision.
    err = worst(ours, theirs, "lr")
    tally.check(f"{name}: rate of every step", err <= 2.0 ** -23, f"{err:.1e}")
    for key in ("loss", "grad_norm"):
        err = worst(ours, theirs, key)
        tally.check(f"{name}: {key} of every step", err <= BOUND,
                    f"{theirs[0][key]:.4f} -> {theirs[-1][key]:.4f}, relative difference {err:.1e} (bound {BOUND:.0e}; "
                    f"PEFT against float64 {worst(theirs, truth, key):.1e})")

    base, _ = peers.load_base(model, torch.float32, quant=case["quant"])
    try:
        ours_after = batch_loss(peers.load_adapter(base, out, torch.float32, train=False), batches(documents)[0])
    except RuntimeError as problem:
        tally.check(f"{name}: loads in PEFT", False, str(problem))
        return
    err = abs(ours_after / after - 1)
    tally.check(f"{name}: loss after the last update", err <= BOUND,
                f"{after:.4f}, relative difference {err:.1e} (PEFT against float64 {abs(after / after_truth - 1):.1e})")

    ids = torch.tensor([t for d, _ in documents[:3] for t in d], dtype=torch.int32)
    peers.save_file({"tokens": ids}, tokens)
    done = subprocess.run([args.logits_program, model, out, tokens, logits, "--quant", case["quant"]],
                          capture_output=True, text=True)
    if tally.check(f"{name}: our logits", done.returncode == 0, done.stderr.strip()[-500:]):
        check_adapter.check(tally, name, out, model, logits, case["quant"])


def check_table(tally, args, first=4):
    """The fp32 losses of dev/ref/tiny_bf16.json: the options there give the run that PEFT made."""
    with open(os.path.join(dump_reference.REF, dump_reference.TABLE_FILE), encoding="utf-8") as f:
        table = json.load(f)
    for quant, row in table.items():
        with tempfile.TemporaryDirectory() as folder:
            done = subprocess.run([os.path.abspath(args.program), *row["options"].split(), "--math", "fp32", "--device",
                                   "cpu", "-o", os.path.join(folder, "out")], capture_output=True, text=True,
                                  cwd=dump_reference.ROOT)
            if not tally.check(f"tiny_llama, {quant}: our program", done.returncode == 0, done.stderr.strip()[-500:]):
                continue
            ours = [r["loss"] for r in read_log(os.path.join(folder, "out", "log.jsonl"))]
        err = np.max(np.abs(np.array(ours[:first]) / np.array(row["fp32"][:first]) - 1))
        tally.check(f"tiny_llama, {quant}: loss of the first {first} steps",
                    len(ours) == len(row["fp32"]) and err <= BOUND,
                    f"{ours[0]:.4f} -> {ours[first - 1]:.4f}, relative difference {err:.1e} (bound {BOUND:.0e})")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--program", default="./train_llama")
    parser.add_argument("--logits-program", default="build/release/logits_dump")
    parser.add_argument("cases", nargs="*")
    args = parser.parse_args()
    peers.print_versions()
    torch.set_num_threads(1)
    tally = peers.Tally()
    found = [peers.require_file(tally, path, what) for path, what in
             ((args.program, "the training program"), (args.logits_program, "the program that writes logits"))]
    if all(found):
        for name in args.cases or CASES:
            with tempfile.TemporaryDirectory() as folder:
                check_case(tally, name, CASES[name], args, folder)
        if not args.cases:
            check_table(tally, args)
    tally.finish()


if __name__ == "__main__":
    main()
