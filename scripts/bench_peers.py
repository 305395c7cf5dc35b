#!/usr/bin/env python3
"""Times one LoRA step in our program and in PyTorch + transformers + PEFT, alternating in one run, and compares them.

    bench_peers.py [-m shape:125m] [-t 512 1024] [--math fp32,int16,bf16,auto] [--threads N] [--rounds 3] [--steps 5]
                   [--floor fp32=1.35 --floor int16=1.9 ...] [--out FILE]
    bench_peers.py --device cuda [-m shape:8b] [-b 4] [-t 2048] [--quant nf4|none] [--checkpointing]
                   [--attention sdpa|flash_attention_2] [--rounds 3] [--steps 10] [--floor cuda=1]

Each side is a process of its own, one after another: in every round ours, theirs, ours, theirs, ... Theirs is
peft_step.py: how it sets PyTorch up stands there. Ours is --benchmark, with an NF4 base unless --quant says otherwise.
Both: rank 16 on all seven linears, a step that warms up, then --steps of forward, backward, clip, AdamW.

cpu: prints a table and writes it to --out. Ours in each arithmetic of --math; one that this processor lacks is left out
and named. Theirs with an fp32 base, a bf16 base, and bitsandbytes' NF4 that computes in fp32 and in bf16. One document.
  - PyTorch's threads wait passively, as ours do: spinning beside other jobs makes a step many times slower.
  - On AMD, MKL (PyTorch's fp32 products) keeps to AVX2. A library that calls the processor Intel's is put before it
    (LD_PRELOAD): its products are then 2.3 times as fast on a Zen 5. PyTorch as PyPI ships it: a row without a ratio.
  - Other variables (an allocator by LD_PRELOAD, MALLOC_..., OMP_PROC_BIND) are passed to both sides and named.
Share of the FMA peak: the work by our program's count; the peak of fp32 as our fp32 runs measure it, between the
others. A PyTorch whose fp32 base stays below 35 % of it is no baseline: void, no ratios, exit status 3.
Ratios, the names for --floor: fp32 and int16 (ours against its fp32 base), bf16 (its bf16 base), like for like
nf4-fp32, nf4-int16, nf4-bf16 (bitsandbytes, in fp32 for the first, in bf16 for the others), auto (the best of theirs).

cuda: `-b` packed documents are the rows of one pass, --checkpointing is --recompute full in ours. Without bitsandbytes
the base is bf16 on PyTorch's side, and said so. The output is what gpu_report.py reads; the ratio's name is cuda.

Exit status: 0 done, 1 one of ours failed or a ratio is below its floor, 2 bad option, 3 void.
"""

import argparse
import importlib.util
import json
import math
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile

# PyTorch is not imported here: what a parent holds counts for the peak memory of its children.
SCRIPTS = os.path.dirname(os.path.abspath(__file__))
LEAST_SHARE = 0.35
SHIPPED = "shipped"
NAMED = re.compile(r"(OMP|GOMP|KMP|MKL|MALLOC|DNNL|ONEDNN|OPENBLAS|TORCH|TRAIN_LLAMA)_|LD_PRELOAD$|GLIBC_TUNABLES$")
PEERS = {"fp32": "PyTorch, fp32 base", "bf16": "PyTorch, bf16 base",
         "nf4-fp32": "PyTorch, bitsandbytes NF4, fp32 compute", "nf4-bf16": "PyTorch, bitsandbytes NF4, bf16 compute",
         SHIPPED: "PyTorch, fp32 base, MKL as shipped"}
# ratio: (ours, theirs)
RATIOS = {"fp32": ("fp32", "fp32"), "int16": ("int16", "fp32"), "bf16": ("bf16", "bf16"),
          "nf4-fp32": ("fp32", "nf4-fp32"), "nf4-int16": ("int16", "nf4-bf16"), "nf4-bf16": ("bf16", "nf4-bf16"),
          "auto": ("auto", "the best")}


# ---------------------------------------------------------------------------------------------------------------------
# one turn of a side: {"rates": tokens/s of each step, "peak": bytes, ...}, {"failed": why} or {"refused": why}

def run(command, environment):
    """(output, exit status, peak resident bytes) of a process."""
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=dict(os.environ, **environment))
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        return out.read(), process.returncode, usage.ru_maxrss * 1024


def failure(out, status):
    if status < 0:
        return f"killed by signal {-status}; is there memory enough?"
    lines = [x.strip() for x in out.splitlines() if x.strip()] or ["no output"]
    return f"exit {status}: {([x for x in lines if x.startswith('error:')] or lines)[-1][:200]}"


def our_turn(args, length, arithmetic):
    command = [args.program, "--benchmark", str(args.steps), "-m", args.model, "-b", str(args.batch), "-t", str(length),
               "--device", args.device, "--quant", args.quant]
    if args.device == "cuda":
        command += ["--pass-tokens", str(args.batch * length), "--recompute", "full" if args.checkpointing else "none"]
    else:
        command += ["--math", arithmetic, "--threads", str(args.threads)]
    out, status, peak = run(command, {"OMP_NUM_THREADS": str(args.threads)})
    rates = [float(x) for x in re.findall(r"^step \d+/\d+ .*\| ([\d.]+) tok/s", out, re.M)]
    median = re.search(r"^tokens_per_s: ([\d.eE+-]+)", out, re.M)
    if status or not rates or not median:
        why = failure(out, status)
        return dict(refused=why.split("error: ")[-1]) if status == 2 and "--math" in out else dict(failed=why)
    header = re.search(r"^# train_llama (\S+) on \w+, ([^,]+), (\w+)", out, re.M) or [""] + 3 * ["?"]
    speed = re.search(r"achieved ([\d.]+) GFLOP/s, measured peak ([\d.]+) GFLOP/s", out) or [""] + 2 * ["nan"]
    return dict(rates=rates, peak=peak, version=header[1], ran=f"{header[3]} on {header[2]}",
                gflops=float(speed[2]), gflop_per_token=float(speed[1]) / float(median[1]))


def their_turn(args, length, base, preload=None):
    command = [sys.executable, os.path.join(SCRIPTS, "peft_step.py"), "--device", args.device, "-m", args.model, "-b",
               str(args.batch), "-t", str(length), "--steps", str(args.steps), "--threads", str(args.threads),
               "--attention", args.attention, *["--checkpointing"] * args.checkpointing,
               "--base", "fp32" if base == SHIPPED else base]
    environment = {"OMP_NUM_THREADS": str(args.threads)}
    if args.device == "cpu":
        environment["OMP_WAIT_POLICY"] = os.environ.get("OMP_WAIT_POLICY", "passive")
    if preload and base != SHIPPED:
        environment["LD_PRELOAD"] = " ".join(filter(None, (preload, os.environ.get("LD_PRELOAD"))))
    out, status, peak = run(command, environment)
    if status:
        return dict(failed=failure(out, status))
    found = json.loads(out.strip().splitlines()[-1])
    return dict(found, peak=peak, rates=[args.batch * length / s for s in found["seconds"]], ran="")


class Side:
    """Its turns in one length of tokens."""

    def __init__(self, label):
        self.label = label
        self.turns = []
        self.why = ""  # it did not run
        self.failed = False

    def add(self, turn):
        self.turns.append(turn)
        self.failed = "failed" in turn
        self.why = turn.get("failed") or turn.get("refused", "")
        return self.why or f"{statistics.median(turn['rates']):.1f} tokens/s"

    def rates(self):
        return [r for t in self.turns for r in t["rates"]]

    def median(self, key=None):
        """Of the steps of all turns; of one fact of each turn."""
        return statistics.median([t[key] for t in self.turns] if key else self.rates()) if not self.why else math.nan


def measure(args, length, preload):
    """All rounds of one length: (ours, theirs)."""
    ours = {m: Side(f"train_llama, NF4 base, --math {m}") for m in args.math}
    theirs = {n: Side(label) for n, label in PEERS.items() if preload or n != SHIPPED}
    pairs = [list(ours.items()), list(theirs.items())]
    for i in range(args.rounds):
        for k in range(max(len(ours), len(theirs))):
            for who in (0, 1):
                for name, side in pairs[who][k:k + 1]:
                    if not side.why:
                        turn = their_turn(args, length, name, preload) if who else our_turn(args, length, name)
                        print(f"{length} tokens, round {i + 1}: {side.label}: {side.add(turn)}", flush=True)
    return ours, theirs


# ---------------------------------------------------------------------------------------------------------------------
# the table of the CPU

def cpu_facts():
    """(vendor, a line on the processor) by /proc/cpuinfo."""
    with open("/proc/cpuinfo", encoding="utf-8") as f:
        processors = [dict(re.findall(r"^(.+?)\s*: (.*)$", p, re.M)) for p in f.read().strip().split("\n\n")]
    one, flags = processors[0], processors[0].get("flags", "").split()
    sets = [x for x in ("avx2", "fma", "avx_vnni") if x in flags]
    for family, all_of in (("avx512", ("avx512f", "avx512bw", "avx512dq", "avx512vl")), ("amx", ("amx_tile",))):
        found = [x[len(family):].strip("_") for x in flags if x.startswith(family)]
        parts = sorted(x for x in found if x in ("vnni", "vbmi", "bf16", "fp16", "int8"))
        sets.append(f"{family} ({' '.join(parts)})" if set(all_of) <= set(flags) else f"no {family}")
    cores = len({(p.get("physical id"), p.get("core id", p.get("processor"))) for p in processors})
    name = f"{one.get('model name')} (family {one.get('cpu family')}, model {one.get('model')})"
    return one.get("vendor_id"), f"{name}, {cores} cores, {len(processors)} processors: {', '.join(sets)}"


def mkl_preload(folder, vendor):
    """A library that has MKL take the processor for Intel's; None where that is not needed or cannot be built."""
    source, library = os.path.join(folder, "mkl.c"), os.path.join(folder, "mkl.so")
    with open(source, "w", encoding="utf-8") as f:
        f.write("int mkl_serv_intel_cpu_true(void) { return 1; }\n")
    if vendor != "AuthenticAMD" or not shutil.which("cc"):
        return None
    return None if subprocess.call(["cc", "-shared", "-fPIC", "-o", library, source]) else library


def quantile(values, q):
    values = sorted(values)
    low = int(q * (len(values) - 1))
    return values[low] + (q * (len(values) - 1) - low) * (values[min(low + 1, len(values) - 1)] - values[low])


def table(head, rows):
    return ["| " + " | ".join(x) + " |" for x in (head, ["---"] * len(head), *rows)] + [""]


def section(length, ours, theirs):
    """(lines, {ratio: value}, whether it is void)."""
    work, peak = ours["fp32"].median("gflop_per_token"), ours["fp32"].median("gflops")
    rows = []
    for side in [*ours.values(), *theirs.values()]:
        if side.why:
            rows.append([side.label, "did not run: " + side.why.replace("|", "/"), "", "", "", ""])
            continue
        spread = f"{quantile(side.rates(), 0.1):.1f} - {quantile(side.rates(), 0.9):.1f}"
        rows.append([side.label, side.turns[0]["ran"], f"{side.median():.1f}", spread,
                     f"{100 * side.median() * work / peak:.0f} %",
                     f"{max(t['peak'] for t in side.turns) / 1e6:,.0f} MB"])
    lines = [f"## {length} tokens", "", f"Peak of fp32 FMA {peak:.0f} GFLOP/s; {work:.3f} GFLOP a token.", ""]
    lines += table(["side", "arithmetic", "tokens/s", "p10 - p90", "share of the FMA peak", "peak memory"], rows)
    share = theirs["fp32"].median() * work / peak
    if not share >= LEAST_SHARE:
        return lines + [f"**VOID**, no ratios: PyTorch's fp32 base reached {100 * share:.0f} % of the FMA peak, "
                        f"a baseline needs {100 * LEAST_SHARE:.0f} %.", ""], {}, True
    best = max((n for n in theirs if not theirs[n].why and n != SHIPPED), key=lambda n: theirs[n].median())
    values, rows = {}, []
    for name, (a, b) in RATIOS.items():
        b = best if name == "auto" else b
        if a in ours and not ours[a].why and not theirs[b].why:
            values[name] = ours[a].median() / theirs[b].median()
            each = [statistics.median(x["rates"]) / statistics.median(y["rates"])
                    for x, y in zip(ours[a].turns, theirs[b].turns)]
            rows.append([name, ours[a].turns[0]["ran"], theirs[b].label, f"**{values[name]:.2f}**",
                         ", ".join(f"{e:.2f}" for e in each)])
    return lines + table(["ratio", "ours", "theirs", "of medians", "by round"], rows), values, False


def heading(args, model, cpu, preload, sides):
    def first(key, default):
        return next((t[key] for s in sides for t in s.turns if key in t), default)
    compiler = subprocess.run(["g++", "-dumpfullversion"], capture_output=True, text=True).stdout.strip()
    variables = sorted(f"{k}={v}" for k, v in os.environ.items() if NAMED.match(k))
    return [f"# One LoRA step on the CPU, {model}: train_llama and PyTorch + PEFT", "",
            f"`python scripts/bench_peers.py -m {args.model} -t {' '.join(map(str, args.tokens))} --math "
            f"{','.join(args.math)} --threads {args.threads} --rounds {args.rounds} --steps {args.steps}`", "",
            f"- {cpu}; {args.threads} threads on either side",
            f"- train_llama {first('version', '?')}; g++ {compiler}; "
            + ", ".join(f"{k} {v}" for k, v in first("versions", {}).items()),
            "- MKL " + ("told that the processor is Intel's, but for the row as shipped" if preload else "as shipped")
            + f"; variables of the environment: {', '.join(variables) or 'none'}",
            f"- rank 16 on all seven linears, one document a step; {args.rounds} alternations, {args.steps} steps each "
            "after a warm-up; medians of all steps", ""]


def bench_cpu(args):
    vendor, cpu = cpu_facts()
    with tempfile.TemporaryDirectory() as folder:
        preload = mkl_preload(folder, vendor)
        found = {length: measure(args, length, preload) for length in args.tokens}
    model = os.path.basename(os.path.normpath(args.model.removeprefix("shape:")))
    lines = heading(args, model, cpu, preload, [s for both in found.values() for d in both for s in d.values()])
    status = 0
    for length, (ours, theirs) in found.items():
        text, values, void = section(length, ours, theirs)
        missed = [(n, v) for n, v in args.floor if not void and not values.get(n, math.nan) >= v]
        for n, v in missed:
            ratio = f"ratio {values[n]:.2f}" if n in values else "no such ratio in this run"
            text += [f"FAIL {n}: {ratio}, floor {v:g}", ""]
        lines += text
        status = max(status, 3 * void, int(bool(missed) or any(s.failed for s in ours.values())))
    out = args.out or os.path.join(SCRIPTS, "..", "dev", "results", f"cpu-{model}.md")
    with open(out, "w", encoding="utf-8") as f:
        f.write("\n".join(lines).rstrip() + "\n")
    print("\n" + "\n".join(lines) + f"written: {os.path.relpath(out)}")
    return status


# ---------------------------------------------------------------------------------------------------------------------
# a GPU

def bench_cuda(args):
    length, ours, theirs = args.tokens[0], Side("ours"), Side("PyTorch + PEFT")
    base = "nf4-bf16" if args.quant == "nf4" and importlib.util.find_spec("bitsandbytes") else "bf16"
    if args.quant == "nf4" and base == "bf16":
        print("bitsandbytes is not installed: PyTorch's base is bf16, ours NF4")
    for i in range(args.rounds):
        for side in (theirs, ours):
            side.add(our_turn(args, length, None) if side is ours else their_turn(args, length, base))
            if side.why:
                print(f"FAIL {side.label}: {side.why}")
                return 1
        first = theirs.turns[0]
        if i == 0:
            print(*(f"{k} {v}" for k, v in first["versions"].items()))
            print(f"{first['card']}, CUDA {first['cuda']}; PyTorch reserved {first['reserved'] / 2 ** 30:.1f} GiB")
        print(f"round {i + 1}: " + ", ".join(f"{s.label} {statistics.median(s.turns[-1]['rates']):.1f} tokens/s"
                                             for s in (theirs, ours)), flush=True)
    ratio = ours.median() / theirs.median()
    print(f"median: PyTorch + PEFT {theirs.median():.1f} tokens/s, ours {ours.median():.1f} tokens/s")
    missed = any(not ratio >= v for _, v in args.floor)
    print(f"{'FAIL' if missed else 'ok  '} tokens/s against PyTorch + PEFT: ratio {ratio:.2f}")
    return int(missed)


# ---------------------------------------------------------------------------------------------------------------------
# the command line

def positive(text):
    if int(text) < 1:
        raise ValueError
    return int(text)


def arithmetics(text):
    names = ["fp32"] + [n for n in text.split(",") if n != "fp32"]
    if not set(names) <= {"fp32", "int16", "bf16", "auto"}:
        raise ValueError
    return list(dict.fromkeys(names))


def floor(text):
    name, value = text.split("=")
    if name not in (*RATIOS, "cuda"):
        raise ValueError
    return name, float(value)


def read_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--program", default="./train_llama")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("-m", "--model", help="shape:NAME or a model's directory (default: shape:125m, cuda shape:8b)")
    parser.add_argument("-b", "--batch", type=positive, help="cuda: documents a step (default: 4)")
    parser.add_argument("-t", "--tokens", type=positive, nargs="+", help="of a document (default: 512 1024, cuda 2048)")
    parser.add_argument("--math", type=arithmetics, default="fp32,int16,bf16,auto",
                        help="of ours; fp32, which measures the peak, is always among them (default: all)")
    parser.add_argument("--threads", type=positive, default=len(os.sched_getaffinity(0)), help="default: all")
    parser.add_argument("--rounds", type=positive, default=3)
    parser.add_argument("--steps", type=positive, help="of a round (default: 5, cuda 10)")
    parser.add_argument("--floor", type=floor, action="append", default=[], metavar="NAME=X", help="least ratio")
    parser.add_argument("--out", help="file of the table (default: dev/results/cpu-<model>.md)")
    parser.add_argument("--quant", choices=("nf4", "none"), default="nf4", help="cuda: of both sides")
    parser.add_argument("--attention", choices=("sdpa", "flash_attention_2"), default="sdpa", help="cuda: PyTorch's")
    parser.add_argument("--checkpointing", action="store_true", help="cuda: gradient checkpointing, --recompute full")
    args = parser.parse_args()
    on_gpu = args.device == "cuda"
    if not on_gpu and (args.batch or args.quant != "nf4" or args.attention != "sdpa" or args.checkpointing):
        parser.error("-b, --quant, --attention and --checkpointing need --device cuda")
    if on_gpu and len(args.tokens or [0]) > 1:
        parser.error("--device cuda takes one -t")
    for name, of_cpu, of_cuda in (("steps", 5, 10), ("model", "shape:125m", "shape:8b"), ("batch", 1, 4),
                                  ("tokens", [512, 1024], [2048])):
        if getattr(args, name) is None:
            setattr(args, name, of_cuda if on_gpu else of_cpu)
    if not os.path.exists(args.program):
        parser.error(f"--program {args.program}: not found; build it first")
    return args


def main():
    args = read_arguments()
    return bench_cuda(args) if args.device == "cuda" else bench_cpu(args)


if __name__ == "__main__":
    sys.exit(main())
