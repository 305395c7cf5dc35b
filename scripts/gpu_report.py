#!/usr/bin/env python3
"""Reads what scripts/gpu_check.sh ran and writes its sections of RESULTS/<device>.md.

    gpu_report.py tests|ops|steps|compare WORK RESULTS    exit status 1: a test failed or a comparison is out of bounds
    gpu_report.py options nf4|none [STEPS]                options of the training that is compared with the CPU

WORK holds NAME.command, NAME.log, NAME.status and, of a GPU, NAME.smi for everything that ran. Needs Python 3.8 alone.
"""

import csv
import glob
import json
import math
import os
import re
import statistics
import sys

ROOT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..")
TABLE = os.path.join(ROOT, "dev", "ref", "tiny_bf16.json")

# What the targets were set for: TFLOP/s of large bf16 products on an H200. On another card they go by its own.
REFERENCE_TFLOPS = 790
FLOOR, GOAL = 13000, 17000  # tok/s, 8B, NF4, rank 16, 8,192 tokens a pass, nothing made again
SMALL_CARD = 8e9            # bytes in which 8B, rank 16, 512 tokens are to be trained
DRIVER = 768 << 20          # bytes that the plan leaves to driver and library (plan_budget in train_step.h)
MEMORY = 0.03               # planned against measured; of a small plan
LIBRARY = 64 << 20          # bytes: cuBLASLt's workspace
# fp32 on both devices: sums in another order move the first loss by their rounding, AdamW blows that up over the steps
# (the bounds of scripts/dump_reference.py for the same training made again).
FP32_FIRST, FP32_ALL = 2e-6, 1e-3

OK, FAILED, MET, MISSED, UNJUDGED = "ok", "FAILED", "met", "missed", "not judged"


def text_of(path):
    try:
        with open(path, encoding="utf-8", errors="replace") as f:
            return f.read()
    except FileNotFoundError:
        return ""


class Ran:
    """One command that gpu_check.sh ran."""

    def __init__(self, work, name):
        self.name = name
        path = os.path.join(work, name)
        self.command = text_of(path + ".command").strip().replace(work + "/", "")
        self.command = self.command.replace(os.path.realpath(ROOT) + "/", "")
        self.log = text_of(path + ".log")
        self.status = text_of(path + ".status").strip() or "not run"
        self.samples = []  # [MiB used, SM MHz, memory MHz, W, degrees]
        for line in text_of(path + ".smi").splitlines():
            values = re.findall(r"[\d.]+", line)
            if len(values) == 5:
                self.samples.append([float(v) for v in values])

    def find(self, pattern, default=None):
        found = re.search(pattern, self.log, re.M)
        return found[1] if found else default

    def why(self):
        """One line on why it did not end well."""
        if self.status in ("no time", "not run"):
            return self.status
        lines = [x for x in self.log.strip().splitlines() if x.startswith("error:")] or self.log.strip().splitlines()
        return f"exit {self.status}: {lines[-1][:160] if lines else 'no output'}"

    def card_bytes(self):
        """Most that the card held beyond what it held before."""
        used = [s[0] for s in self.samples]
        return (max(used) - used[0]) * 2 ** 20 if used else None

    def clocks(self):
        busy = [s for s in self.samples if s[0] > self.samples[0][0]]
        if not busy:
            return "-"
        return f"{statistics.median(s[1] for s in busy):.0f} MHz, {max(s[3] for s in busy):.0f} W"


def all_ran(work, prefix):
    names = [os.path.basename(p)[:-len(".command")] for p in glob.glob(os.path.join(work, prefix + "*.command"))]
    return [Ran(work, n) for n in sorted(names, key=lambda n: os.path.getmtime(os.path.join(work, n + ".command")))]


class Section:
    def __init__(self, title):
        self.title = title
        self.checks = []  # [what, found, bound, verdict]
        self.body = []
        self.ran = []

    def check(self, what, found, bound, verdict):
        self.checks.append([what, found, bound, verdict])

    def must(self, what, good, found, bound=""):
        """good: a comparison that is false for NaN."""
        self.check(what, found, bound, OK if good else FAILED)

    def failed(self):
        return any(c[3] == FAILED for c in self.checks)

    def text(self, facts):
        lines = [f"## {self.title}", "", facts_text(facts), ""]
        if self.checks:
            lines += table(["check", "found", "bound or target", ""], self.checks) + [""]
        lines += self.body
        if self.body and self.body[-1] != "":
            lines.append("")
        if self.ran:
            lines += ["<details><summary>commands</summary>", "", "```"]
            lines += [r.command for r in self.ran if r.command and r.status != "no time"]
            lines += ["```", "", "</details>", ""]
        return "\n".join(lines)


def table(head, rows):
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return lines + ["| " + " | ".join(str(c).replace("|", "/") for c in row) + " |" for row in rows]


def read_facts(work):
    facts = dict(line.split("=", 1) for line in text_of(os.path.join(work, "facts")).splitlines() if "=" in line)
    facts["device"] = Ran(work, "device").find(r"^# train_llama \S+ on cuda, (.*), \w+, \d+ threads", "unknown device")
    facts["gpu"] = "driver" in facts  # else it is the stand-in: no figure of speed means anything
    return facts


def facts_text(facts):
    parts = [facts.get("date", ""), facts["device"]]
    if facts["gpu"]:
        parts += [facts["memory"], "driver " + facts["driver"], "clocks at most " + facts["limits"],
                  "idle " + facts["idle"]]
    else:
        parts.append("no GPU: kernels on the CPU, no figure of speed means anything")
    if "nvcc" in facts:
        parts.append("nvcc " + facts["nvcc"])
    return "; ".join(parts + [facts.get("cpus", "?") + " CPUs", "programs " + facts.get("programs", "?")]) + "."


def slug(name):
    """As the harness names its csv."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).lstrip("-")


def bytes_of(text):
    number, unit = text.split()
    return float(number) * {"B": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}[unit]


def gigabytes(x):
    return "-" if x is None else f"{x / 1e9:.3g} GB"


# ---------------------------------------------------------------------------------------------------------------------
# tests

def training_options(quant, steps=None):
    with open(TABLE, encoding="utf-8") as f:
        options = json.load(f)[quant]["options"]
    return re.sub(r"-n \d+", f"-n {steps}", options) if steps else options


def read_losses(work, name):
    """(losses, hash of the adapter) of a training, or None."""
    losses, adapter = [], None
    for line in text_of(os.path.join(work, "run-" + name, "log.jsonl")).splitlines():
        event = json.loads(line)
        if event["event"] == "step":
            losses.append(event["loss"])
        elif event["event"] == "end" and event["reason"] == "finished":
            adapter = event["adapter_sha256"]
    return (losses, adapter) if adapter else None


def greatest(x):
    return math.nan if any(map(math.isnan, x)) else max(x)


def rms(x):
    return math.sqrt(sum(v * v for v in x) / len(x))


def trainings(section, work):
    with open(TABLE, encoding="utf-8") as f:
        yardstick = json.load(f)
    names = [f"{q}-{d}" for q in ("nf4", "none") for d in ("cpu", "cuda", "cuda-fp32")]
    names += ["nf4-cuda-again", "nf4-cuda-full", "nf4-cuda-dequant"]
    got = {n: read_losses(work, n) for n in names}
    for name in names:
        ran = Ran(work, "train-" + name)
        section.ran.append(ran)
        if not got[name]:
            section.check(f"training {name}", ran.why(), "", UNJUDGED if ran.status == "no time" else FAILED)
    columns = [n for n in names if got[n]]
    for name in columns:
        quant, device = name.split("-", 1)
        base = got[quant + "-cpu"]
        if device == "cpu" or not base:
            continue
        a, b = got[name][0], base[0]
        apart = [abs(x - y) for x, y in zip(a, b)]
        relative = [d / y for d, y in zip(apart, b)]
        what = f"training {name}: greatest relative difference of a loss from the CPU's"
        if len(a) != len(b) or not a:
            section.must(what, False, f"{len(a)} and {len(b)} steps")
        elif device == "cuda-fp32":
            section.must(what, relative[0] <= FP32_FIRST and greatest(relative) <= FP32_ALL,
                         f"{greatest(relative):.2e}, first step {relative[0]:.1e}", f"{FP32_ALL:g}, {FP32_FIRST:g}")
        else:
            # The yardstick of the kernels' tests: twice PyTorch's own bf16 error, root mean square and greatest.
            theirs = yardstick[quant]["distance"][:len(a)]
            section.must(what, rms(apart) <= 2 * rms(theirs) and greatest(apart) <= 2 * max(theirs),
                         f"{greatest(relative):.2e} (absolute: rms {rms(apart):.4f}, greatest {greatest(apart):.4f})",
                         f"twice PyTorch's bf16: {2 * rms(theirs):.4f}, {2 * max(theirs):.4f}")
    for name, what in (("again", "the same run again"), ("full", "--recompute full")):
        a, b = got["nf4-cuda"], got["nf4-cuda-" + name]
        if a and b:
            section.must(f"{what}: same losses, same adapter", a == b,
                         "equal" if a == b else f"{sum(x != y for x, y in zip(a[0], b[0]))} losses differ", "bitwise")
    if columns:
        rows = [[i + 1] + [f"{got[n][0][i]:.5f}" if i < len(got[n][0]) else "-" for n in columns]
                for i in range(max(len(got[n][0]) for n in columns))]
        section.body += ["Losses of the default base, step by step:", ""] + table(["step"] + columns, rows) + [""]


def sanitizers(section, work):
    runs = all_ran(work, "sanitizer-")
    if not runs:
        section.check("compute-sanitizer", "not on this machine", "0 errors", UNJUDGED)
    for ran in runs:
        tool = ran.name.split("-")[1]
        summaries = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (.*)", ran.log)
        tests = ran.find(r"^(\d+ passed, \d+ failed.*)$", "no tests")
        section.ran.append(ran)
        if ran.status == "no time" or "Device not supported" in ran.log:
            why = "no time" if ran.status == "no time" else "the tool does not support this device"
            section.check(ran.name, why, "0 errors", UNJUDGED)
        else:
            clean = summaries and all(re.match(r"0 (errors|hazards)", s) for s in summaries)
            section.must(f"{tool} {ran.name.split('-')[2]}", bool(clean) and ran.status == "0",
                         f"{'; '.join(sorted(set(summaries))) or ran.why()}; {tests}", "0 errors")


def report_tests(work, facts):
    section = Section("tests")
    ran = Ran(work, "test")
    section.ran.append(ran)
    counts = re.search(r"^(\d+) passed, (\d+) failed(?:, (\d+) skipped)?", ran.log, re.M)
    good = counts and int(counts[1]) > 0 and int(counts[2]) == 0 and ran.status == "0"
    found = counts[0] if counts else ran.why()
    section.must("test_llama gpu_", bool(good), found, "none fails, not all are skipped")
    for word in ("FAILED", "skipped"):
        names = re.findall(rf"^(\S+) +{word} ", ran.log, re.M)
        if names:
            section.body += [f"{word.capitalize()}: " + ", ".join(f"`{n}`" for n in names) + ".", ""]
    if not good:
        section.body += ["```"] + ran.log.strip().splitlines()[-40:] + ["```", ""]
    trainings(section, work)
    sanitizers(section, work)
    return [section]


# ---------------------------------------------------------------------------------------------------------------------
# ops

KEY = ("op", "version", "type", "shape")


def merge_csv(work, results):
    """Rows of this run, by file; they take the place of rows of the same op, version, type and shape."""
    fresh = []
    for path in glob.glob(os.path.join(work, "root", "dev", "results", "*.csv")):
        target = os.path.join(results, os.path.basename(path))
        with open(path, encoding="utf-8", newline="") as f:
            rows = list(csv.DictReader(f))
        old = []
        if os.path.exists(target):
            with open(target, encoding="utf-8", newline="") as f:
                old = list(csv.DictReader(f))
        new = {tuple(r[k] for k in KEY): r for r in rows}
        kept = [r for r in old if tuple(r[k] for k in KEY) not in new]
        with open(target, "w", encoding="utf-8", newline="") as f:
            writer = csv.DictWriter(f, fieldnames=list(rows[0]) if rows else list(old[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(sorted(kept + list(new.values()), key=lambda r: tuple(r[k] for k in KEY)))
        fresh += list(new.values())
    return fresh


def letters(row):
    return {k: int(v) for k, v in (pair.split("=") for pair in row["shape"].split())}


def share(row, what):
    return float(row["gb_per_s"]) / float(row["copy_gb_per_s"]) if what == "copy" else \
        float(row["tflop_per_s"]) / float(row["matmul_tflop_per_s"])


def op_targets(section, rows):
    """Judged at the shape that takes longest, where a launch weighs least."""
    production = [r for r in rows if r["version"].endswith("*") and r["type"] == "bf16"]

    def attention(row, direction):
        shape = letters(row)
        return row["op"] == "attention_" + direction and shape.get("HS") == 128 and shape.get("T") == 2048

    wanted = [("dequantise, share of the copy rate", lambda r: r["op"] == "nf4_dequantize", "copy", 0.90),
              ("attention forward, head size 128, T 2,048, share of the matmul rate", lambda r: attention(r, "forward"),
               "matmul", 0.30),
              ("attention backward, likewise", lambda r: attention(r, "backward"), "matmul", 0.28)]
    for what, chosen, ceiling, target in wanted:
        mine = [r for r in production if chosen(r)]
        longest = share(max(mine, key=lambda r: float(r["us"])), ceiling) if mine else None
        least = min((share(r, ceiling) for r in mine), default=None)
        if mine:
            found = f"{100 * longest:.0f} %" + (f", least of all shapes {100 * least:.0f} %" if least < longest else "")
            section.check(what, found, f">= {100 * target:.0f} %", MET if longest >= target else MISSED)
        else:
            section.check(what, "not measured", f">= {100 * target:.0f} %", UNJUDGED)


def crossover(section, rows):
    """The fused way against dequantise + cuBLASLt, up to how many rows it is ahead: the product alone, and the whole
    linear with its adapter. The words are of the versions' ideas."""
    words = {"nf4_matmul": ("by its table", "then cuBLASLt"), "linear": ("the fused kernel", "dequantised each time")}
    by_matrix = {}
    for r in rows:
        way = next((w for w, word in zip(("fused", "dequantise"), words.get(r["op"], ())) if word in r["idea"]), "")
        if r["type"] == "bf16" and way:
            shape = letters(r)
            M = shape.pop("M" if "M" in shape else "N")
            matrix = r["op"] + (" backward" if shape.pop("BWD", 0) else " forward")
            matrix += "".join(f" {k}={v}" for k, v in shape.items())
            by_matrix.setdefault(matrix, {}).setdefault(M, {})[way] = float(r["us"])
    lines, ahead = [], []
    for matrix, by_rows in sorted(by_matrix.items()):
        gain = {M: t["dequantise"] / t["fused"] for M, t in sorted(by_rows.items()) if len(t) == 2}
        if gain:
            won = [M for M in gain if all(gain[k] >= 1 for k in gain if k <= M)]
            lines.append([matrix, won[-1] if won else "none", ", ".join(f"{M}: {gain[M]:.2f}" for M in gain)])
            if len(gain) > 1 and matrix.startswith("nf4_matmul"):
                ahead.append(won[-1] if won else 0)
    if lines:
        section.body += ["Fused NF4 kernel against dequantise + cuBLASLt, dequantisation counted in:", ""]
        section.body += table(["matrix", "fused is ahead up to M", "M: speed of fused over dequantise"], lines) + [""]
    section.check("fused product ahead of dequantise + cuBLASLt up to M", min(ahead) if ahead else "not measured",
                  ">= 128", UNJUDGED if not ahead else MET if min(ahead) >= 128 else MISSED)


def report_ops(work, results, facts):
    section = Section("ops")
    section.ran = all_ran(work, "op-")
    for ran in section.ran:
        name = ran.name[len("op-"):]
        wrong = re.findall(r"^.*FAILED.*$\n?.*", ran.log, re.M)
        if ran.status == "no time":
            section.check(name, "no time", "", UNJUDGED)
        else:
            right = len(set(re.findall(r"^ [ *] +(\d+)  .* ok ", ran.log, re.M)))
            section.must(name, ran.status == "0" and not wrong and right > 0,
                         f"{right} versions right" if ran.status == "0" else ran.why(),
                         "twice a plain evaluation's error")
        if wrong:
            section.body += ["```"] + [line for w in wrong for line in w.splitlines()] + ["```", ""]
    rows = merge_csv(work, results)
    if rows:
        copy, matmul = (max(float(r[k]) for r in rows) for k in ("copy_gb_per_s", "matmul_tflop_per_s"))
        section.body += [f"Ceilings: copy {copy:,.0f} GB/s, bf16 matrix products {matmul:,.0f} TFLOP/s (the best "
                         f"that a program measured). All versions are in `{slug(facts['device'])}.csv`.", ""]
        op_targets(section, rows)
        crossover(section, rows)
        lines = []
        for r in rows:
            if not r["version"].endswith("*"):
                continue
            others = [o for o in rows if all(o[k] == r[k] for k in ("op", "type", "shape")) and o is not r]
            best = min(others, key=lambda o: float(o["us"]), default=None)
            us, low, high = (f"{float(r[k]):,.1f}" for k in ("us", "us_p10", "us_p90"))
            lines.append([r["op"], r["shape"], f"{us} ({low} - {high})", r["gb_per_s"], f"{100 * share(r, 'copy'):.0f}",
                          r["tflop_per_s"], f"{100 * share(r, 'matmul'):.0f}", r["err_over_bound"],
                          f"{best['version']}: {float(best['us']) / float(r['us']):.2f} x the time" if best else "-"])
        section.body += table(["op in kernels/", "shape", "us (p10 - p90)", "GB/s", "% of copy", "TFLOP/s",
                               "% of matmul", "error / bound", "best other version"], lines)
    return [section]


# ---------------------------------------------------------------------------------------------------------------------
# steps

MODELS = {  # C, F, L, NH, NKV, HS, V
    "125m": (768, 2048, 12, 12, 4, 64, 32000), "1b": (2048, 8192, 16, 32, 8, 64, 128256),
    "3b": (3072, 8192, 28, 24, 8, 128, 128256), "8b": (4096, 14336, 32, 32, 8, 128, 128256)}
OPS = ["embedding", "rmsnorm", "qkv", "attention", "o", "gate_up", "down", "swiglu", "head+loss", "adamw"]


def expected_ms(shape, quant, T, M, recompute, flops, copy):
    """Milliseconds of a step of one pass by op, first version of every kernel at its ceiling: products at `flops` a
    second, bytes at `copy` a second, attention at the targets' shares. The ops are the program's; what each holds:

      qkv, o, gate_up, down   forward, input gradient, both with the adapters' 64 more columns (16 a slice for down);
                              NF4 written out in 16 bits twice (2.516 bytes a weight); the adapters' passes over input
                              (xa, dA) and output gradient (D and dB together); the norm or SwiGLU that is their input,
                              written in both directions; RoPE both ways in qkv
      rmsnorm                 rstd, and the norms' gradients            swiglu      its gradient
      attention               forward, gradient, delta                  head+loss   both products, softmax thrice
    """
    C, F, L, NH, NKV, HS, V = MODELS[shape]
    q = NH * HS
    groups = {"qkv": (C, q + 2 * NKV * HS), "o": (q, C), "gate_up": (C, 2 * F), "down": (F, C)}
    # Elements a token and direction: the input made, and RoPE.
    made = {"qkv": 2 * C + 2 * (q + NKV * HS), "o": 0, "gate_up": 2 * C, "down": 3 * F}
    again = {"none": [], "ffn": ["gate_up"], "attn": ["gate_up", "qkv"], "full": ["gate_up", "qkv", "o"]}[recompute]
    seconds = dict.fromkeys(OPS, 0.0)
    for name, (inputs, outputs) in groups.items():
        forward = (2.0 * M * inputs * outputs + 2.0 * M * 64 * outputs) / flops + 2 * M * made[name] / copy
        forward += 2 * M * inputs / copy
        backward = (2.0 * M * inputs * outputs + 2.0 * M * 64 * inputs) / flops + 2 * M * made[name] / copy
        backward += 2 * M * (inputs + outputs) / copy
        restore = 2.516 * inputs * outputs / copy if quant == "nf4" else 0
        seconds[name] = L * (forward + backward + 2 * restore + (forward if name in again else 0))
    work = 2.0 * M * T * q * L
    forward = work / (0.30 * flops)
    backward = 2.5 * work / (0.28 * flops) + L * 4 * M * q / copy
    seconds["attention"] = forward * (2 if recompute == "full" else 1) + backward
    seconds["rmsnorm"] = L * M * 2 * (2 * C + 8 * C) / copy
    seconds["swiglu"] = L * M * 2 * 5 * F / copy
    seconds["head+loss"] = 4.0 * M * V * C / flops + 3 * 2.0 * M * V / copy
    parameters = 16 * L * sum(a + b for a, b in [(C, q), (C, NKV * HS), (C, NKV * HS), (q, C), (C, F), (C, F), (F, C)])
    seconds["adamw"] = 32.0 * parameters / copy
    seconds["embedding"] = 4.0 * M * C / copy
    return {k: 1e3 * v for k, v in seconds.items()}


class Step:
    def __init__(self, ran):
        self.ran = ran
        _, self.shape, self.quant, length, pass_tokens, self.recompute, self.gemm = ran.name.split("-")
        self.T, self.M = int(length), int(pass_tokens)
        rate = ran.find(r"^tokens_per_s: ([0-9.eE+-]+)$")
        self.rate = float(rate) if rate and ran.status == "0" else None
        predicted = ran.find(r"^# predicted speed ([\d.]+) tok/s")
        self.predicted = float(predicted) if predicted else None
        self.copy = float(ran.find(r"memory at ([\d.]+) GB/s\)", "0")) * 1e9
        self.peak = float(ran.find(r"measured peak ([\d.]+) GFLOP/s", "0")) * 1e9
        self.achieved = float(ran.find(r"achieved ([\d.]+) GFLOP/s", "0")) * 1e9
        self.ms = float(ran.find(r"^# median ([\d.]+) ms a step", "0"))
        taken = ran.find(r"peak memory ([\d.]+ [kMGT]?B) on the card")
        self.taken = bytes_of(taken) if taken else None
        planned = ran.find(r"^#\s+together, of .*?\s\s+([\d.]+ [kMGT]?B)\s*$")
        self.planned = bytes_of(planned) if planned else None
        self.losses = re.findall(r"\| loss (\S+) \|", ran.log)
        self.ops = {k: float(v) for k, v in re.findall(r"^#\s+(\S+)\s+([\d.]+)\s+[\d.]+ %$", ran.log, re.M) if k in OPS}

    def fits(self):
        return not re.search(r"^error: the run needs .* of memory", self.ran.log, re.M)

    def label(self):
        return f"{'NF4' if self.quant == 'nf4' else '16 bit'}, {self.M:,} tokens a pass, recompute {self.recompute}" + \
            ("" if self.gemm == "auto" else f", gemm {self.gemm}")


def step_checks(section, steps, facts):
    for s in steps:
        what = s.label()
        if s.ran.status == "no time":
            section.check(what, "no time", "", UNJUDGED)
        elif not s.fits():
            section.check(what, "does not fit: " + s.ran.find(r"^error: (.*)$"), "", UNJUDGED)
        elif s.rate is None or not s.losses or not all(math.isfinite(float(x)) for x in s.losses):
            section.must(what, False, s.ran.why() if s.rate is None else "a loss is not finite: " + " ".join(s.losses))
        else:
            memory_check(section, s, what)
    find = {(s.quant, s.T, s.M, s.recompute, s.gemm): s for s in steps if s.rate}
    if not facts["gpu"] or steps[0].shape != "8b":
        return
    s = find.get(("nf4", 2048, 8192, "none", "auto"))
    scale = s.peak / 1e12 / REFERENCE_TFLOPS if s and s.peak and "h200" not in facts["device"].lower() else 1
    for name, target in (("floor", FLOOR), ("goal", GOAL)):
        section.check(f"NF4, 8,192 tokens a pass, nothing made again: {name}",
                      f"{s.rate:,.0f} tok/s" if s else "not measured",
                      f">= {scale * target:,.0f}" + ("" if scale == 1 else f" ({target:,} by its matmul rate)"),
                      UNJUDGED if not s else MET if s.rate >= scale * target else MISSED)
    s = find.get(("nf4", 512, 512, "full", "auto"))
    held = (s.ran.card_bytes() or s.taken) if s else None
    section.check("NF4, 512 tokens, everything made again: card memory, driver included", gigabytes(held),
                  f"<= {SMALL_CARD / 1e9:g} GB", UNJUDGED if not held else MET if held <= SMALL_CARD else MISSED)
    fused, other = (find.get(("nf4", 128, 128, "none", gemm)) for gemm in ("fused", "dequant"))
    if fused and other:
        section.check("whole step at 128 tokens: fused over dequantise", f"{fused.rate / other.rate:.2f}", ">= 1",
                      MET if fused.rate >= other.rate else MISSED)


def memory_check(section, s, what):
    """The arena is what was planned; the card's own count adds the driver and cuBLASLt's kernels."""
    if s.planned is None or s.taken is None:
        section.must(what + ": memory", False, "no figure in the output")
        return
    off, card = s.taken / s.planned - 1, s.ran.card_bytes()
    good = abs(s.taken - s.planned) <= max(MEMORY * s.planned, LIBRARY)
    found = f"planned {gigabytes(s.planned)}, taken {100 * off:+.1f} %"
    if card is not None:
        good = good and -MEMORY <= card / s.planned - 1 and card <= (1 + MEMORY) * s.planned + DRIVER
        found += f", card {gigabytes(card)} ({100 * (card / s.planned - 1):+.1f} %)"
    section.must(what + ": memory", good, found,
                 f"{100 * MEMORY:.0f} %, at least {gigabytes(LIBRARY)}" +
                 ("" if card is None else f"; card: and {gigabytes(DRIVER)} of driver"))


def breakdown(section, steps):
    timed = [s for s in steps if s.ops and s.rate]
    main = next((s for s in timed if s.gemm == "auto" and s.quant == "nf4" and s.recompute == "none"), None)
    if main and main.peak and main.copy:
        want = expected_ms(main.shape, main.quant, main.T, main.M, main.recompute, main.peak, main.copy)
        rows = [[op, f"{main.ops[op]:.1f}", f"{want[op]:.1f}",
                 f"{main.ops[op] / want[op]:.2f}" if want[op] >= 0.05 else "-", f"{100 * main.ops[op] / main.ms:.1f}"]
                for op in OPS if op in main.ops]
        total, wanted = sum(main.ops.values()), sum(want.values())
        rows.append(["all of these", f"{total:.1f}", f"{wanted:.1f}", f"{total / wanted:.2f}",
                     f"{100 * total / main.ms:.1f}"])
        rows.append(["between them", f"{main.ms - total:.1f}", "0", "-", f"{100 * (1 - total / main.ms):.1f}"])
        section.body += [f"Time by op, {main.label()}, T = {main.T:,}. Expected: every kernel at its ceiling, with the "
                         f"{main.peak / 1e12:,.0f} TFLOP/s and {main.copy / 1e9:,.0f} GB/s of this card.", ""]
        section.body += table(["op", "ms", "expected ms", "ratio", "% of the step"], rows) + [""]
    if timed:
        section.body += ["Milliseconds a step by op:", ""]
        section.body += table(["run"] + OPS, [[s.label()] + [f"{s.ops.get(op, math.nan):.1f}" for op in OPS]
                                              for s in timed]) + [""]


def report_steps(work, facts):
    steps = [Step(r) for r in all_ran(work, "step-")]
    sections = []
    for shape in dict.fromkeys(s.shape for s in steps):
        section = Section("steps " + shape)
        mine = [s for s in steps if s.shape == shape]
        step_checks(section, mine, facts)
        rows = []
        for s in mine:
            rows.append([s.label(), f"{s.T:,}",
                         f"{s.rate:,.0f}" if s.rate else s.ran.why() if s.fits() else "does not fit",
                         f"{s.predicted:,.0f}" if s.predicted else "-",
                         f"{s.rate / s.predicted:.2f}" if s.rate and s.predicted else "-",
                         f"{s.achieved / 1e12:,.0f} ({100 * s.achieved / s.peak:.0f} %)" if s.rate and s.peak else "-",
                         gigabytes(s.planned), gigabytes(s.taken), gigabytes(s.ran.card_bytes()), s.ran.clocks()])
        section.body += table(["run", "T", "tok/s", "predicted", "ratio", "TFLOP/s (of the peak)", "planned",
                               "taken", "card", "clock, power"], rows) + [""]
        breakdown(section, mine)
        section.ran = [s.ran for s in mine]
        for ran in all_ran(work, f"plan-{shape}-"):
            section.ran.append(ran)
            if ran.log.strip():
                section.body += ["The plan for the smallest memory:", "", "```"] + ran.log.strip().splitlines()
                section.body += ["```", ""]
        sections.append(section)
    return sections


# ---------------------------------------------------------------------------------------------------------------------
# against PyTorch

def report_compare(work, facts):
    section = Section("compare")
    section.ran = all_ran(work, "compare-")
    absent = text_of(os.path.join(work, "absent")).strip()
    if absent:
        section.check("PyTorch + PEFT", absent, "", UNJUDGED)
    rows = []
    for ran in section.ran:
        what = ran.name[len("compare-"):].replace("-", ", ")
        medians = re.search(r"^median: PyTorch \+ PEFT ([\d.]+) tokens/s, ours ([\d.]+) tokens/s", ran.log, re.M)
        if medians:
            theirs, ours = float(medians[1]), float(medians[2])
            section.check(what, f"{ours / theirs:.2f} x PyTorch + PEFT", ">= 1", MET if ours >= theirs else MISSED)
            rows.append([what, f"{theirs:,.0f}", f"{ours:,.0f}", f"{ours / theirs:.2f}",
                         ran.find(r"PyTorch reserved ([\d.]+ GiB)", "-")])
        elif ran.status == "no time" or "PyTorch + PEFT: " in ran.log:
            section.check(what, ran.find(r"^FAIL (PyTorch \+ PEFT: .*)$", "no time"), "", UNJUDGED)
        else:
            section.must(what, False, ran.find(r"^FAIL (.*)$", ran.why()))
    if rows:
        first = section.ran[0].log
        said = [x for x in first.splitlines() if re.match(r"torch|transformers|bitsandbytes|.*CUDA \d", x)]
        section.body += [" ".join(said)] * bool(said) + [""]
        section.body += table(["step", "PyTorch + PEFT tok/s", "ours tok/s", "ratio", "PyTorch's memory"], rows)
    return [section]


# ---------------------------------------------------------------------------------------------------------------------
# the file

def place(results, facts, sections):
    """Puts the sections into the device's file; other sections stay as they are."""
    path = os.path.join(results, slug(facts["device"]) + ".md")
    parts = re.split(r"^(?=## )", text_of(path), flags=re.M)
    kept = {p.splitlines()[0][3:]: p.rstrip() + "\n" for p in parts if p.startswith("## ")}
    for s in sections:
        kept[s.title] = s.text(facts).rstrip() + "\n"
    order = {"tests": 0, "ops": 1, "compare": 3}
    head = f"# {facts['device']}\n\nWritten by `scripts/gpu_check.sh`, each section by a run of its own. The reasons " \
           "for the targets are in `gpu-template.md`.\n"
    with open(path, "w", encoding="utf-8") as f:
        f.write("\n".join([head] + [kept[t] for t in sorted(kept, key=lambda t: (order.get(t, 2), t))]))
    return path


def main():
    if len(sys.argv) in (3, 4) and sys.argv[1] == "options":
        print(training_options(*sys.argv[2:]))
        return 0
    reports = {"tests": report_tests, "steps": report_steps, "compare": report_compare,
               "ops": lambda work, facts: report_ops(work, sys.argv[3], facts)}
    if len(sys.argv) != 4 or sys.argv[1] not in reports:
        sys.exit(__doc__)
    piece, work, results = sys.argv[1:]
    facts = read_facts(work)
    sections = reports[piece](work, facts)
    path = place(results, facts, sections)
    for s in sections:
        print(f"--- {s.title}")
        for what, found, bound, verdict in s.checks:
            print(f"{verdict:10} {what}: {found}" + (f"  [{bound}]" if bound else ""))
    print(f"written: {path}")
    return 1 if any(s.failed() for s in sections) else 0


if __name__ == "__main__":
    sys.exit(main())
