#!/usr/bin/env bash
# What only a GPU can tell, on a machine that has one; no network is needed.
#
#   scripts/gpu_check.sh tests|ops|steps|compare|all [--carried DIR]
#   scripts/gpu_check.sh pack DIR
#
#   tests     test_llama's gpu_ groups; the default base trained on the card and on the CPU, losses compared;
#             compute-sanitizer where it is there
#   ops       every kernel harness of dev/: checked, then timed against the card's own ceilings
#   steps     1b, 3b and 8b shapes: tokens a second, time by op, memory planned and taken
#   compare   the same step in PyTorch + PEFT, where Python has them
#   pack      builds for CUDA_ARCH ("80 90a") and puts the programs, with the libraries they need, into DIR, for a
#             machine without those libraries' headers: take this tree and DIR there. Without MPI; cuBLASLt and NCCL are
#             looked for there (NCCL= builds without NCCL, for a machine that has none)
#
# Each piece ends within 8 minutes; what there was no time for is listed. It replaces its own sections of
# dev/results/<device>.md; logs of all that it ran are in build/release/gpu_check. The exit status is 1 when a test
# fails or a comparison is out of bounds; a speed below its target is written down and is no failure.
#
# Programs of these very sources in DIR are used as they are; else they are built here; else those in DIR are used, and
# the report says that they are of other sources. GPU_CHECK_PROGRAMS=build/release/simt tries the script without a GPU.
#
#   GPU_CHECK_PROGRAMS=DIR   programs as they are, nothing is built      GPU_CHECK_RESULTS=DIR  instead of dev/results
#   GPU_CHECK_SECONDS=450    for a piece                                 SHAPES="8b 3b 1b"      of steps and compare
#   DOCUMENT=2048            tokens a document; passes are 2, 4, 8 of them
#   TRAIN_STEPS=20           of the comparison with the CPU              BENCHMARK=5            timed steps of a shape
#   SANITIZE="GROUP ..."     test groups for compute-sanitizer           BUILD=build/release    where objects go
set -u
cd "$(dirname "$0")/.." || exit 1
export CUDA_DEVICE_ORDER=PCI_BUS_ID LC_ALL=C
unset MAKEFLAGS MAKELEVEL
BUILD=${BUILD:-build/release}
results=${GPU_CHECK_RESULTS:-dev/results}
shapes=${SHAPES:-8b 3b 1b}
document=${DOCUMENT:-2048}
logs=$BUILD/gpu_check
programs="" programs_text="" pieces="" carried="" with_libraries=()

usage() {
    sed -n '2,/^set -u/s/^#  \{0,1\}//p' "$0"
    exit 2
}
die() {
    echo "error: $1" >&2
    [ $# -lt 2 ] || echo "hint: $2" >&2
    exit 1
}

# The programs of the harness: every .cu of dev/ but a tool and the harness itself.
ops() {
    local file op
    for file in dev/*.cu; do
        op=$(basename "$file" .cu)
        case $op in logits_dump | harness*) ;; *) echo "$op" ;; esac
    done
}

# One number for all that the programs are made of.
sources_hash() {
    find . \( -path ./build -o -path ./.git -o -path ./runs \) -prune -o -type f \
        \( -name '*.cu' -o -name '*.cuh' -o -name '*.cpp' -o -name '*.h' -o -name '*.inc' -o -name Makefile \) -print |
        LC_ALL=C sort | xargs sha256sum | sha256sum | cut -d' ' -f1
}

# ---- programs: given, carried, or built

# build_programs [NAME=VALUE...]: both programs and the harness; false when there is no CUDA in the result.
build_programs() {
    local targets=("$BUILD/train_llama" "$BUILD/test_llama" bench)
    make BUILD="$BUILD" "$@" "${targets[@]}" && grep -q '^HAVE_CUDA := 1' "$BUILD/probe.mk"
}

# One archive, since every program holds the same kernels: a dictionary larger than a program keeps them once.
pack() {
    local dir=$1 stage=$BUILD/pack name path size arch=${CUDA_ARCH:-80 90a}
    local skip='linux-vdso|ld-linux|libc\.so|libm\.so|libdl\.|librt\.|libpthread|libstdc|libgcc_s|libcuda|libcublas|libnccl'
    build_programs CUDA_ARCH="$arch" MPICXX= ${NCCL+NCCL="$NCCL"} || die "nothing to pack: the build above failed, or has no CUDA"
    rm -rf "$stage"
    mkdir -p "$dir" "$stage/lib" || exit 1
    mapfile -t all < <(printf '%s\n' train_llama test_llama; ops)
    for name in "${all[@]}"; do
        strip -o "$stage/$name" "$BUILD/$name" || exit 1
        while read -r path; do
            cp -Lf "$path" "$stage/lib/" || exit 1
        done < <(ldd "$BUILD/$name" | awk '$2 == "=>" && $3 ~ /^\// { print $1, $3 }' | grep -vE "^($skip)" |
            cut -d' ' -f2)
    done
    XZ_OPT=--lzma2=preset=3,dict=64MiB tar -C "$stage" -cJf "$dir/programs.tar.xz" . || exit 1
    sources_hash >"$dir/sources.sha256"
    size=$(du -sm "$dir" | cut -f1)
    echo "$dir: ${#all[@]} programs with their libraries, $size MiB, for sm_${arch// /, sm_}"
    [ "$size" -lt 60 ] || die "$dir is too large to carry (found $size MiB, need less than 60)" \
        "fewer architectures: CUDA_ARCH=90a scripts/gpu_check.sh pack $dir"
}

# library_folder libNAME: the folder of a library that carried programs want (cuBLASLt, NCCL): the toolkit's, else the one
# that Python packages bring. Nothing for one that they do not want.
library_folder() {
    local name folder nvcc
    name=$(ldd "$programs/train_llama" | awk -v library="$1" 'index($1, library ".") == 1 { print $1 }')
    [ -n "$name" ] || return
    nvcc=$(readlink -f "$(command -v nvcc || echo /usr/local/cuda/bin/nvcc)")
    for folder in "${nvcc%/bin/nvcc}"/lib64 "${nvcc%/bin/nvcc}"/lib "${nvcc%/bin/nvcc}"/targets/*/lib /usr/local/cuda*/lib64 \
        /usr/lib/x86_64-linux-gnu \
        $(python3 -c 'import glob, sys; print(*(f for p in sys.path for f in glob.glob(p + "/nvidia/*/lib")))' 2>&-); do
        if [ -e "$folder/$name" ]; then
            echo "$folder"
            return
        fi
    done
}

use_carried() {
    local cublas nccl
    programs=$BUILD/carried programs_text="carried, $1"
    rm -rf "$programs"
    mkdir -p "$programs" || exit 1
    tar -C "$programs" -xJf "$carried/programs.tar.xz" 2>/dev/null ||
        python3 -m tarfile -e "$carried/programs.tar.xz" "$programs" ||
        die "$carried/programs.tar.xz cannot be unpacked"
    cublas=$(library_folder libcublasLt) nccl=$(library_folder libnccl)
    with_libraries=(env "LD_LIBRARY_PATH=$(realpath "$programs")/lib${cublas:+:$cublas}${nccl:+:$nccl}")
    if "${with_libraries[@]}" ldd "$programs/train_llama" | grep 'not found'; then
        die "the carried programs lack the libraries above"
    fi
}

find_programs() {
    local same=""
    if [ -n "${GPU_CHECK_PROGRAMS:-}" ]; then
        programs=$GPU_CHECK_PROGRAMS programs_text="given, $programs"
        return
    fi
    if [ -n "$carried" ]; then
        [ -e "$carried/programs.tar.xz" ] || die "no programs in $carried" "scripts/gpu_check.sh pack DIR makes them"
        [ "$(cat "$carried/sources.sha256")" != "$(sources_hash)" ] || same=1
    fi
    if [ -n "$same" ]; then
        use_carried "of these sources"
    elif build_programs; then
        programs=$BUILD
        programs_text="built here for $(grep -o 'code=sm_[0-9a-z]*' "$BUILD/probe.mk" | cut -d= -f2 | tr '\n' ' ')"
    elif [ -n "$carried" ]; then
        echo "warning: nothing can be built here; $carried holds programs of OTHER sources" >&2
        use_carried "of OTHER sources than this tree"
    else
        die "the programs cannot be built here" \
            "make them elsewhere with scripts/gpu_check.sh pack DIR, and give --carried DIR"
    fi
}

# A program of the harness lies beside the others, or one folder up when the others are the stand-in's.
program() {
    if [ -x "$programs/$1" ]; then
        echo "$programs/$1"
    else
        echo "$programs/../$1"
    fi
}

# ---- running and noting

# logged NAME SECONDS COMMAND...: the command's words, output, status and what nvidia-smi saw meanwhile go to files that
# begin with $work/NAME. Without the time for it, it is only noted.
logged() {
    local name=$1 limit=$2 left status cut="" sampler="" started=$SECONDS
    shift 2
    left=$((deadline - SECONDS))
    if [ "$left" -lt "$limit" ]; then
        limit=$left cut=1
    fi
    printf '%s\n' "$*" | sed 's/^env [^ ]*LD_LIBRARY_PATH=[^ ]* //' >"$work/$name.command"
    if [ "$limit" -lt 10 ]; then
        echo "no time" >"$work/$name.status"
        echo "  $name: no time left"
        return
    fi
    if [ -n "$smi" ]; then
        nvidia-smi -i "$card" -lms 200 --format=csv,noheader,nounits \
            --query-gpu=memory.used,clocks.sm,clocks.mem,power.draw,temperature.gpu >"$work/$name.smi" 2>/dev/null &
        sampler=$!
        sleep 0.5  # what is used before the program starts
    fi
    timeout -k 5 "$limit" "$@" >"$work/$name.log" 2>&1
    status=$?
    if [ "$status" = 124 ] && [ -n "$cut" ]; then
        status="no time"  # with all of its own time it would be a program that hangs
    fi
    echo "$status" >"$work/$name.status"
    if [ -n "$sampler" ]; then
        kill "$sampler" 2>/dev/null
        wait "$sampler" 2>/dev/null
    fi
    echo "  $name: exit $status, $((SECONDS - started)) s"
}

# What the report says of the machine. The device's name is the one that the program gives it.
device_facts() {
    smi=$(command -v nvidia-smi || true)
    card=${CUDA_VISIBLE_DEVICES:-0}
    card=${card%%,*}
    logged device 60 "${with_libraries[@]}" "$programs/train_llama" --device cuda -m shape:125m --dry-run
    if [ "$(cat "$work/device.status")" != 0 ]; then
        cat "$work/device.log"
        die "no device to check"
    fi
    {
        echo "programs=$programs_text"
        echo "date=$(date -u '+%Y-%m-%d %H:%M UTC')"
        echo "cpus=$(nproc)"
        if [ -n "$smi" ]; then
            nvidia-smi -i "$card" --format=csv,noheader \
                --query-gpu=driver_version,memory.total,clocks.max.sm,clocks.max.mem,power.limit,clocks.sm,clocks.mem |
                awk -F', ' '{ print "driver=" $1; print "memory=" $2; print "limits=" $3 " SM, " $4 " memory, " $5
                              print "idle=" $6 " SM, " $7 " memory" }'
        fi
        command -v nvcc >/dev/null && nvcc --version | sed -n 's/.*release \([0-9.]*\).*/nvcc=\1/p'
    } >"$work/facts"
}

# ---- the pieces

# One training of the default base: NAME QUANT OPTIONS...
train() {
    local name=$1 quant=$2
    shift 2
    # shellcheck disable=SC2046  # the table's options are words
    logged "train-$name" 150 "${with_libraries[@]}" "$programs/train_llama" \
        $(scripts/gpu_report.py options "$quant" "${TRAIN_STEPS:-20}") -m dev/tiny_llama -q -o "$work/run-$name" "$@"
}

piece_tests() {
    local quant tool group test
    test=$(program test_llama)
    logged "test" 300 "${with_libraries[@]}" env TRAIN_LLAMA_PROGRAM="$programs/train_llama" "$test" gpu_
    for quant in nf4 none; do
        train "$quant-cpu" "$quant" --device cpu
        train "$quant-cuda" "$quant" --device cuda
        train "$quant-cuda-fp32" "$quant" --device cuda --math fp32
    done
    train nf4-cuda-again nf4 --device cuda
    train nf4-cuda-full nf4 --device cuda --recompute full
    train nf4-cuda-dequant nf4 --device cuda --gemm dequant
    if ! command -v compute-sanitizer >/dev/null && [ -x /usr/local/cuda/bin/compute-sanitizer ]; then
        PATH=$PATH:/usr/local/cuda/bin
    fi
    command -v compute-sanitizer >/dev/null || return
    # The variable keeps the program from starting itself once more.
    for group in ${SANITIZE:-gpu_elementwise gpu_adamw gpu_classifier gpu_nf4 gpu_attention gpu_matmul gpu_linear gpu_device}; do
        for tool in memcheck racecheck; do
            logged "sanitizer-$tool-$group" 90 "${with_libraries[@]}" env OMP_WAIT_POLICY=passive compute-sanitizer \
                --tool "$tool" --error-exitcode 99 --target-processes all --print-limit 5 "$test" "$group/"
        done
    done
}

piece_ops() {
    local op path versions
    # The harness appends to dev/results of its root; the report puts the rows into the real one.
    mkdir -p "$work/root/dev/results"
    for op in $(ops); do
        path=$(program "$op")
        # The versions of the GPU have plain numbers; an unknown option lists all of them.
        versions=$("${with_libraries[@]}" "$path" --versions 2>&1 | sed -n 's/^ *versions://p' | tr ' ' '\n' |
            grep -E '^[0-9]+$' | tr '\n' ' ')
        # shellcheck disable=SC2086  # versions are words
        logged "op-$op" 120 "${with_libraries[@]}" env TRAIN_LLAMA_ROOT="$work/root" "$path" $versions --csv
    done
}

# step SHAPE QUANT DOCUMENT PASS RECOMPUTE GEMM: documents of DOCUMENT tokens fill one pass, which is one step.
step() {
    local shape=$1 quant=$2 length=$3 pass=$4 recompute=$5 gemm=$6
    logged "step-$shape-$quant-$length-$pass-$recompute-$gemm" 120 "${with_libraries[@]}" "$programs/train_llama" \
        --device cuda -m "shape:$shape" --benchmark "${BENCHMARK:-5}" -b $((pass / length)) -t "$length" \
        --pass-tokens "$pass" --recompute "$recompute" --quant "$quant" --gemm "$gemm" -r 16
}

piece_steps() {
    local D=$document shape first=${shapes%% *} small=()
    local quarter=$((D > 8 ? D / 4 : 2)) sixteenth=$((D > 32 ? D / 16 : 2))
    for shape in $shapes; do
        step "$shape" nf4 "$D" $((4 * D)) none auto
        [ "$shape" != "$first" ] || step "$shape" nf4 $quarter $quarter full auto
    done
    if "${with_libraries[@]}" "$programs/train_llama" --help | grep -q -e --paged-optimizer; then
        small=(--paged-optimizer)
    fi
    logged "plan-$first-small" 60 "${with_libraries[@]}" "$programs/train_llama" --device cuda -m "shape:$first" \
        --dry-run -b 1 -t $quarter --pass-tokens $quarter --recompute full --gemm fused -r 16 "${small[@]}"
    for shape in $shapes; do
        step "$shape" none "$D" $((4 * D)) none auto
        step "$shape" nf4 "$D" $((4 * D)) full auto
    done
    step "$first" nf4 "$D" $((8 * D)) none auto
    step "$first" nf4 "$D" $((2 * D)) none auto
    step "$first" nf4 "$D" $((4 * D)) attn auto
    step "$first" nf4 "$D" $((4 * D)) ffn auto
    step "$first" nf4 $sixteenth $sixteenth none fused
    step "$first" nf4 $sixteenth $sixteenth none dequant
    step "$first" nf4 "$D" $((4 * D)) none fused
    for shape in ${shapes#"$first"}; do
        step "$shape" nf4 "$D" $((8 * D)) none auto
        step "$shape" nf4 "$D" $((2 * D)) none auto
    done
}

# compare SHAPE QUANT [--checkpointing]
compare() {
    logged "compare-$1-$2${3:+-full}" 150 python3 scripts/bench_peers.py --program "$work/train_llama" --device cuda \
        --rounds 2 --steps 5 -m "shape:$1" --quant "$2" -b 4 -t "$document" "${@:3}"
}

piece_compare() {
    local shape why
    if ! why=$(PYTHONPATH=scripts python3 -c 'import peers
assert peers.torch.cuda.is_available(), "no GPU for PyTorch"' 2>&1); then
        echo "not all here: ${why##*$'\n'}" | tee "$work/absent"
        return
    fi
    # A program of its own, so that Python itself keeps its libraries.
    printf '#!/bin/sh\nexec %s "%s/train_llama" "$@"\n' "${with_libraries[*]}" "$(realpath "$programs")" \
        >"$work/train_llama"
    chmod +x "$work/train_llama"
    for shape in $shapes; do
        compare "$shape" nf4 --checkpointing
        compare "$shape" nf4
    done
    for shape in $shapes; do
        compare "$shape" none
    done
}

run_piece() {
    work=$logs/$1
    rm -rf "$work"
    mkdir -p "$work" "$results" || exit 1
    work=$(realpath "$work")
    echo "=== $1"
    device_facts
    case $1 in
        tests) piece_tests ;;
        ops) piece_ops ;;
        steps) piece_steps ;;
        compare) piece_compare ;;
    esac
    scripts/gpu_report.py "$1" "$work" "$results" || failed=1
}

# ---- the command line

[ $# -gt 0 ] || usage
case $1 in
    pack)
        [ $# = 2 ] || usage
        pack "$2"
        exit ;;
    tests | ops | steps | compare) pieces=$1 ;;
    all) pieces="tests ops steps compare" ;;
    *) usage ;;
esac
shift
while [ $# -gt 0 ]; do
    case $1 in
        --carried)
            [ $# -gt 1 ] || usage
            carried=$(realpath "$2")
            shift 2 ;;
        *) usage ;;
    esac
done
command -v python3 >/dev/null || die "python3 is needed for the report"
failed=0
deadline=$((SECONDS + ${GPU_CHECK_SECONDS:-450}))
find_programs
for piece in $pieces; do
    run_piece "$piece"
    deadline=$((SECONDS + ${GPU_CHECK_SECONDS:-450}))
done
exit $failed
