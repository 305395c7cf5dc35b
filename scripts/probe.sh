#!/usr/bin/env bash
# probe.sh FILE: what compiler and libraries can do, by compiling a few lines. Writes the answers as make variables to
# FILE, prints one line for each, and stops with the install commands when something required is missing. Settings come
# from the environment (CXX, CPPFLAGS, CXXFLAGS, LDFLAGS, NVCC, NVCCFLAGS, OPENMP, MPICXX, NCCL, CUDA_ARCH, config,
# CONFIG_FLAGS); SETTINGS is what the Makefile compares.
set -u
out=$1
mkdir -p "$(dirname "$out")"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

missing=0
apt="" dnf="" conda=""
ok() { echo "  ✓ $1"; }
no() { echo "  ✗ $*"; }
need() {  # what, apt, dnf, conda
    no "$1"
    missing=1 apt="$apt $2" dnf="$dnf $3" conda="$conda $4"
}

# builds 'source' [flags]: compiles and links the lines with the user's flags, without optimisation (it is quicker)
# (eval, because a make recipe's shell takes the quotes in the flags away too)
builds() {
    printf '%s\n' "$1" >"$work/probe.cpp"
    eval "$CXX -std=c++17 $CONFIG_FLAGS $CPPFLAGS $CXXFLAGS -O0 '$work/probe.cpp' $LDFLAGS ${2:-} -o '$work/probe'" \
        >"$work/log" 2>&1
}

echo "probing for config=${config:=release} (once for these settings)"
if builds 'int main() { if constexpr (sizeof(int) == 4) { return 0; } }'; then
    ok "$CXX: $($CXX --version | head -1)"
elif command -v "${CXX%% *}" >/dev/null; then
    no "$CXX cannot build a C++17 program with these flags:"
    sed 's/^/      /' "$work/log" | head -5
    exit 1
else
    if [ "$config" = thread ]; then
        need "$CXX (config=thread needs clang)" clang clang clangxx
    else
        need "$CXX: a C++17 compiler" g++ gcc-c++ gxx
    fi
fi

have_openmp="" base_arch="" have_cuda="" have_nccl="" gpu_code="" cuda_libraries=""
if [ $missing = 0 ]; then
    if [ -z "$OPENMP" ]; then
        no "OpenMP: switched off, one thread"
    elif builds "#include <omp.h>
        int main() { return omp_get_max_threads() < 1; }" -fopenmp; then
        have_openmp=1
        ok "OpenMP"
    else
        no "OpenMP: not found, one thread (clang: apt install libomp-dev, dnf install libomp-devel)"
    fi
    case $($CXX -dumpmachine) in
        x86_64-*) builds 'int main() {}' -march=x86-64-v2 && base_arch=-march=x86-64-v2 ;;
    esac
    if builds "#include <nlohmann/json.hpp>
        static_assert(NLOHMANN_JSON_VERSION_MAJOR == 3 && NLOHMANN_JSON_VERSION_MINOR >= 9, \"too old\");
        int main() {}"; then
        ok "nlohmann-json"
    else
        need "nlohmann-json 3.9 or newer" nlohmann-json3-dev json-devel nlohmann_json
    fi
    if builds "#define PCRE2_CODE_UNIT_WIDTH 8
        #include <pcre2.h>
        int main() { int n; return pcre2_config(PCRE2_CONFIG_JIT, &n) < 0; }" -lpcre2-8; then
        ok "PCRE2"
    else
        need "PCRE2" libpcre2-dev pcre2-devel pcre2
    fi
    if builds "#include <CLI/CLI.hpp>
        static_assert(CLI11_VERSION_MAJOR >= 2, \"too old\");
        int main() {}"; then
        ok "CLI11"
    else
        need "CLI11 2.0 or newer" libcli11-dev cli11-devel cli11
    fi
    if builds "#include <openssl/evp.h>
        int main() { return EVP_sha256() == nullptr; }" -lcrypto; then
        ok "libcrypto"
    else
        need "libcrypto (OpenSSL)" libssl-dev openssl-devel openssl
    fi
fi
if [ $missing = 1 ]; then
    {
        echo "error: something required is missing (✗ above)"
        echo "hint: make deps, or one of"
        echo "        apt-get install$apt"
        echo "        dnf install$dnf"
        echo "        conda install -c conda-forge$conda   (with CPPFLAGS=-I\$CONDA_PREFIX/include" \
             "LDFLAGS=\"-L\$CONDA_PREFIX/lib -Wl,-rpath,\$CONDA_PREFIX/lib\")"
    } >&2
    exit 1
fi

# MPI: what its compiler wrapper adds to a command, without its C++ bindings, which nothing here uses. An rpath joins
# where the program does not find the library by itself (checked without LD_LIBRARY_PATH, which the next shell may not
# have).
have_mpi="" mpi_cflags="" mpi_libraries="" mpirun=""
mpi_hint="apt install libopenmpi-dev openmpi-bin, dnf install openmpi-devel, conda install openmpi"
mpi_program='#include <mpi.h>
    #include <cstdio>
    int main(int argc, char**) {
        char text[MPI_MAX_LIBRARY_VERSION_STRING] = "";
        int n = 0;
        if (argc > 1) { MPI_Init(nullptr, nullptr); }
        MPI_Get_library_version(text, &n);
        puts(text); }'
mpi_flags() {  # sets mpi_cflags, mpi_libraries, folders from the wrapper's command
    local word take=""
    mpi_cflags="-DOMPI_SKIP_MPICXX -DMPICH_SKIP_MPICXX" mpi_libraries="" folders=""
    for word in $("$MPICXX" -show 2>/dev/null); do
        if [ -n "$take" ]; then
            word=$take$word take=""
        fi
        case $word in
            -I | -L | -l | -D) take=$word ;;
            -I* | -D*) mpi_cflags="$mpi_cflags $word" ;;
            -lmpi_cxx | -lmpichcxx | -lmpicxx | -lmpi++) ;;
            -L*) mpi_libraries="$mpi_libraries $word" folders="$folders ${word#-L}" ;;
            -l* | -Wl,*) mpi_libraries="$mpi_libraries $word" ;;
        esac
    done
}
mpi_says() { env "$@" ASAN_OPTIONS=detect_leaks=0 "$work/probe" 2>/dev/null | head -1; }
if [ -z "${MPICXX:-}" ]; then
    no "MPI: switched off, one process"
elif ! command -v "$MPICXX" >/dev/null; then
    no "MPI: no $MPICXX, one process ($mpi_hint)"
else
    mpi_flags
    version=""
    if builds "$mpi_program" "$mpi_cflags $mpi_libraries"; then
        version=$(mpi_says -u LD_LIBRARY_PATH)
        if [ -z "$version" ]; then
            for folder in $folders; do
                mpi_libraries="$mpi_libraries -Wl,-rpath,$folder"
            done
            builds "$mpi_program" "$mpi_cflags $mpi_libraries" && version=$(mpi_says)
        fi
    fi
    version=${version%%,*}
    if [ -n "$version" ]; then
        have_mpi=1
        ok "MPI: $MPICXX, ${version//[[:space:]]/ }"
        # Its mpirun lies beside it, with the same ending.
        mpirun=$(command -v "$MPICXX" | sed -E 's,/mpi(cxx|c\+\+|CC)([^/]*)$,/mpirun\2,')
        [ "$mpirun" != "$(command -v "$MPICXX")" ] && [ -x "$mpirun" ] || mpirun=mpirun
    else
        no "MPI: $MPICXX is there, but a program cannot be built with what it adds, so this build is one process:"
        grep -m 2 -iE 'error|cannot' "$work/log" | sed 's/^/      /'
        echo "      $mpi_hint"
        mpi_cflags="" mpi_libraries=""
    fi
fi

# Prints how nvcc links: its library folders, and those of cuBLASLt and NCCL once more for the program, so that they are
# found when it runs.
cuda_links() {
    local folder folders
    folders=$("$NVCC" -dryrun "$work/probe.cu" 2>&1 | sed -n 's/^#\$ LIBRARIES=//p' | tr -d '"')
    for folder in $folders; do
        folder=$(cd "${folder#-L}" 2>/dev/null && pwd) || continue
        case $folder in */stubs) continue ;; esac
        printf -- '-L%s ' "$folder"
        if [ -e "$folder/libcublasLt.so" ] || [ -e "$folder/libnccl.so" ]; then
            printf -- '-Wl,-rpath,%s ' "$folder"
        fi
    done
    echo "-lcudart_static -lcublasLt -ldl -lrt -lpthread"
}

if [ -z "$NVCC" ]; then
    no "CUDA: no nvcc, CPU only"
else
    archs=$CUDA_ARCH
    why="as asked"
    if [ "$archs" = all ]; then
        archs="80 86 89 90a 100 120"
    elif [ -z "$archs" ]; then
        archs=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | tr -d '. ' | grep -E '^[0-9]+$' |
            sed 's/^90$/90a/' | sort -u | tr '\n' ' ')
        archs=${archs% }
        why="of the GPU here"
        if [ -z "$archs" ]; then
            archs="80 90a" why="no GPU here"
        fi
    fi
    for a in $archs; do
        gpu_code="$gpu_code -gencode arch=compute_$a,code=sm_$a"
    done
    release=$("$NVCC" --version | sed -n 's/.*release \([0-9.]*\).*/\1/p')
    compile_cu() {
        eval "$NVCC -ccbin ${CXX%% *} -std=c++17 $gpu_code $NVCCFLAGS -c '$work/probe.cu' -o '$work/probe.o'" \
            >"$work/log" 2>&1
    }
    echo 'int main() { return 0; }' >"$work/probe.cu"
    if ! compile_cu; then
        no "CUDA: $NVCC cannot build with ${CXX%% *} for: $archs"
        sed 's/^/      /' "$work/log" | head -5
        echo "hint: NVCC= (empty) builds for the CPU alone" >&2
        exit 1
    fi
    printf '%s\n' '#include <cublasLt.h>' '#include <cuda_runtime.h>' 'int main() {
        cublasLtHandle_t handle;
        int n = 0;
        return int(cudaGetDeviceCount(&n)) + int(cublasLtCreate(&handle)); }' >"$work/probe.cu"
    cuda_libraries=$(cuda_links)
    if compile_cu && eval "$CXX $CONFIG_FLAGS $CXXFLAGS '$work/probe.o' $LDFLAGS $cuda_libraries -o '$work/probe'" \
        >"$work/log" 2>&1; then
        have_cuda=1
        ok "CUDA: $NVCC $release with cuBLASLt, sm_${archs// / sm_} ($why)"
        printf '%s\n' '#include <nccl.h>' \
            'static_assert(NCCL_VERSION_CODE >= NCCL_VERSION(2, 17, 0), "NCCL is older than 2.17");' 'int main() {
            ncclUniqueId id;
            return ncclGetUniqueId(&id); }' >"$work/probe.cu"
        if [ -z "$NCCL" ]; then
            no "NCCL: switched off, GPUs train alone"
        elif compile_cu && eval "$CXX $CONFIG_FLAGS $CXXFLAGS '$work/probe.o' $LDFLAGS -lnccl $cuda_libraries" \
            "-o '$work/probe'" >"$work/log" 2>&1; then
            have_nccl=1
            cuda_libraries="-lnccl $cuda_libraries"
            ok "NCCL"
        elif grep -q 'NCCL is older than' "$work/log"; then
            no "NCCL: older than 2.17, GPUs train alone (a newer one: apt install libnccl-dev libnccl2," \
                "dnf install libnccl-devel, conda install nccl)"
        else
            no "NCCL: not found, GPUs train alone (apt install libnccl-dev libnccl2, dnf install libnccl-devel," \
                "conda install nccl)"
        fi
    else
        v=${release/./-}
        no "CUDA: $NVCC $release is there, cuBLASLt is not, so this build is for the CPU alone:"
        grep -m 2 -iE 'error|cannot' "$work/log" | sed 's/^/      /'
        echo "      for the GPU: apt install libcublas-dev-$v cuda-cudart-dev-$v, dnf install libcublas-devel-$v" \
            "cuda-cudart-devel-$v, conda install -c nvidia libcublas-dev cuda-cudart-dev"
    fi
fi

# PROBED is compared by the Makefile with its own settings. Nothing else but this file decides that objects are stale.
quote() { printf '%s' "$1" | sed 's/#/\\#/g; s/\$/$$/g'; }
{
    echo "# Written by scripts/probe.sh; remove it to probe again."
    echo "HAVE_OPENMP := $have_openmp"
    echo "BASE_ARCH := $base_arch"
    echo "HAVE_MPI := $have_mpi"
    echo "MPI_CFLAGS := $mpi_cflags"
    echo "MPI_LIBRARIES :=$mpi_libraries"
    echo "MPIRUN := $mpirun"
    echo "HAVE_CUDA := $have_cuda"
    echo "GPU_CODE :=$gpu_code"
    echo "HAVE_NCCL := $have_nccl"
    echo "CUDA_LIBRARIES := $cuda_libraries"
    echo "PROBED := $(quote "$SETTINGS")"
} >"$out"
