#!/usr/bin/env python3
"""resources.py [--check] BUILD: what each GPU kernel takes of the card, as ptxas said it while BUILD was made with
CUDA_ARCH=all (the Makefile keeps its words in BUILD/kernels/*.ptxas). Writes dev/results/resources.md; with --check
compares with it instead. Fails on a spill, a stack frame, local memory or a warning, and, with --check, on any
difference. `make resources CUDA_ARCH=all` calls it. Needs Python 3 and c++filt."""
import difflib
import glob
import os
import re
import subprocess
import sys

ARCHITECTURES = ["80", "86", "89", "90a", "100", "120"]
TABLE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "dev", "results", "resources.md")

ENTRY = re.compile(r"Compiling entry function '(\S+)' for 'sm_(\w+)'")
PROPERTIES = re.compile(r"Function properties for (\S+)")
FRAME = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
USED = re.compile(r"Used (\d+) registers")
# Lines that say nothing more. Whatever else is there counts as a warning.
PLAIN = re.compile(r"ptxas info +: (\d+ bytes gmem|Compile time)|Registers are spilled|^\s*$")


def parse(path, kernels, faults):
    """Adds path's kernels to kernels[name][architecture] and what is wrong to faults."""
    source = "kernels/" + os.path.basename(path).replace(".ptxas", ".cu")
    kernel = function = arch = ""
    with open(path) as lines:
        for line in lines:
            entry, properties, frame, used = (p.search(line) for p in (ENTRY, PROPERTIES, FRAME, USED))
            if entry:
                kernel, arch = entry.groups()
                kernels.setdefault((source, kernel), {})[arch] = {"registers": 0, "shared": 0}
            elif properties:
                function = properties.group(1)
            elif frame:
                stack, stores, loads = map(int, frame.groups())
                if stack or stores or loads:
                    faults.append((function, f"sm_{arch}: {stack} bytes of stack, {stores} and {loads} bytes spilled"))
            elif used:
                shared, local = re.search(r"(\d+) bytes smem", line), re.search(r"(\d+) bytes lmem", line)
                kernels[source, kernel][arch] = {"registers": int(used.group(1)),
                                                 "shared": int(shared.group(1)) if shared else 0}
                if local:
                    faults.append((kernel, f"sm_{arch}: {local.group(1)} bytes of local memory"))
            elif not PLAIN.search(line):
                faults.append((source, line.rstrip()))


def demangled(names):
    """Short names: without the result type, without the list of parameters."""
    text = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    short = {}
    for name, long in zip(names, text.split("\n")):
        depth, end = 0, len(long)
        for i, c in enumerate(long):
            depth += (c == "<") - (c == ">")
            if c == "(" and depth == 0:
                end = i
                break
        short[name] = long[:end][5:] if long.startswith("void ") else long[:end]
    return short


def natural(text):
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", text)]


def version():
    nvcc = os.environ.get("NVCC") or "nvcc"
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    return re.search(r"V([\d.]+)", text).group(1)


def table(kernels, short):
    lines = ["# Registers and shared memory of the GPU kernels", "",
             "Written by `make resources CUDA_ARCH=all` (scripts/resources.py); `.ci/run` makes it again and fails on a",
             "difference, and on any spill, stack frame, local memory or warning: there are none. Registers of a thread",
             "for each architecture; static shared memory of a block in bytes (dynamic: at the kernel's LAUNCH).", "",
             f"nvcc {version()}"]
    for source in sorted({source for source, _ in kernels}):
        lines += ["", f"## {source}", "",
                  "| kernel | " + " | ".join("sm_" + a for a in ARCHITECTURES) + " | shared |",
                  "|---|" + "---:|" * (len(ARCHITECTURES) + 1)]
        for name in sorted((n for s, n in kernels if s == source), key=lambda n: natural(short[n])):
            of = kernels[source, name]
            shared = sorted({of[a]["shared"] for a in ARCHITECTURES})
            lines.append(f"| `{short[name]}` | " + " | ".join(str(of[a]["registers"]) for a in ARCHITECTURES) +
                         " | " + "/".join(map(str, shared)) + " |")
    return "\n".join(lines) + "\n"


def main():
    check = "--check" in sys.argv[1:]
    folders = [a for a in sys.argv[1:] if a != "--check"]
    if len(folders) != 1:
        sys.exit(__doc__)
    kernels, faults = {}, []
    for path in sorted(glob.glob(os.path.join(folders[0], "kernels", "*.ptxas"))):
        parse(path, kernels, faults)
    short = demangled([name for _, name in kernels] + [name for name, _ in faults])
    for (_, name), of in kernels.items():
        if set(of) != set(ARCHITECTURES):
            sys.exit(f"error: {folders[0]} was built for sm_{', sm_'.join(sorted(of))} ({short[name]})\n"
                     "hint: make resources CUDA_ARCH=all")
    if not kernels:
        sys.exit(f"error: no kernels in {folders[0]}/kernels/*.ptxas\nhint: make resources CUDA_ARCH=all, with nvcc")
    for name, what in faults:
        print(f"{short[name]}: {what}")
    made = table(kernels, short)
    if check:
        try:
            with open(TABLE) as f:
                kept = f.read()
        except FileNotFoundError:
            kept = ""
        other = re.search(r"^nvcc (.*)$", kept, re.M)
        if other and other.group(1) != version():
            print(f"dev/results/resources.md is of nvcc {other.group(1)}, this is {version()}: not compared")
            kept = made
        difference = list(difflib.unified_diff(kept.splitlines(), made.splitlines(), "dev/results/resources.md",
                                               "this build", lineterm="", n=0))
        print("\n".join(difference))
        if difference:
            print("error: the kernels take other resources than dev/results/resources.md says\n"
                  "hint: make resources CUDA_ARCH=all writes it anew; look at the difference before you commit it")
        if difference or faults:
            return 1
    elif not faults:
        with open(TABLE, "w") as f:
            f.write(made)
    print(f"{len(kernels)} kernels, {len(faults)} faults")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
