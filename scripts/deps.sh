#!/usr/bin/env bash
# Installs what the build needs and this machine lacks, through apt or dnf, without asking. Says what it did.
set -u
say() { echo "deps: $*"; }

if command -v apt-get >/dev/null; then
    packages="g++ make nlohmann-json3-dev libpcre2-dev libcli11-dev libssl-dev"
    optional="libopenmpi-dev openmpi-bin"  # many ranks
    installed() { dpkg-query -W -f '${Status}' "$1" 2>/dev/null | grep -q 'ok installed'; }
elif command -v dnf >/dev/null; then
    packages="gcc-c++ make json-devel pcre2-devel cli11-devel openssl-devel"
    optional="openmpi-devel"
    installed() { rpm -q --whatprovides "$1" >/dev/null 2>&1; }
else
    say "neither apt nor dnf here. Install with your package manager, or with conda:"
    say "  conda install -c conda-forge gxx make nlohmann_json pcre2 cli11 openssl openmpi"
    say "  make train_llama CPPFLAGS=-I\$CONDA_PREFIX/include" \
        "LDFLAGS=\"-L\$CONDA_PREFIX/lib -Wl,-rpath,\$CONDA_PREFIX/lib\""
    exit 1
fi

command -v mpicxx >/dev/null && optional=""  # whichever MPI it is

wanted=() extra=()
for package in $packages "$@"; do
    installed "$package" || wanted+=("$package")
done
for package in $optional; do
    installed "$package" || extra+=("$package")
done
if [ ${#wanted[@]} = 0 ] && [ ${#extra[@]} = 0 ]; then
    say "nothing to install ($packages${optional:+ $optional})"
    exit 0
fi

root=()
if [ "$(id -u)" != 0 ]; then
    if command -v sudo >/dev/null; then
        root=(sudo)
    else
        say "must be root to install: ${wanted[*]} ${extra[*]} (no sudo here); as root:"
        say "  $(command -v apt-get >/dev/null && echo apt-get || echo dnf) install ${wanted[*]} ${extra[*]}"
        [ ${#wanted[@]} = 0 ]
        exit
    fi
fi

install() {
    [ $# != 0 ] || return 0
    say "installing: $*"
    if command -v apt-get >/dev/null; then
        local apt=("${root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -y -q install --no-install-recommends "$@")
        # A list of packages that is missing or out of date shows as a failed install: refresh it once, then try again.
        "${apt[@]}" >/dev/null 2>&1 || { "${root[@]}" apt-get -q update && "${apt[@]}"; }
    else
        "${root[@]}" dnf -y -q install "$@"
    fi && say "installed: $*" && return
    say "could not install: $*"
    return 1
}
install "${extra[@]}" || say "(only training on many ranks needs these)"
install "${wanted[@]}"
