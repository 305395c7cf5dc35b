#!/usr/bin/env bash
# Installs what the build needs and this machine lacks, through apt or dnf, without asking. Says what it did.
set -u
say() { echo "deps: $*"; }

if command -v apt-get >/dev/null; then
    packages="g++ make nlohmann-json3-dev libpcre2-dev libcli11-dev libssl-dev"
    installed() { dpkg-query -W -f '${Status}' "$1" 2>/dev/null | grep -q 'ok installed'; }
elif command -v dnf >/dev/null; then
    packages="gcc-c++ make json-devel pcre2-devel cli11-devel openssl-devel"
    installed() { rpm -q --whatprovides "$1" >/dev/null 2>&1; }
else
    say "neither apt nor dnf here. Install with your package manager, or with conda:"
    say "  conda install -c conda-forge gxx make nlohmann_json pcre2 cli11 openssl"
    say "  make train_llama CPPFLAGS=-I\$CONDA_PREFIX/include" \
        "LDFLAGS=\"-L\$CONDA_PREFIX/lib -Wl,-rpath,\$CONDA_PREFIX/lib\""
    exit 1
fi

wanted=()
for package in $packages "$@"; do
    installed "$package" || wanted+=("$package")
done
if [ ${#wanted[@]} = 0 ]; then
    say "nothing to install ($packages)"
    exit 0
fi

root=()
if [ "$(id -u)" != 0 ]; then
    if command -v sudo >/dev/null; then
        root=(sudo)
    else
        say "must be root to install: ${wanted[*]} (no sudo here); as root:"
        say "  $(command -v apt-get >/dev/null && echo apt-get || echo dnf) install ${wanted[*]}"
        exit 1
    fi
fi

say "installing: ${wanted[*]}"
if command -v apt-get >/dev/null; then
    install=("${root[@]}" env DEBIAN_FRONTEND=noninteractive
        apt-get -y -q install --no-install-recommends "${wanted[@]}")
    # A list of packages that is missing or out of date shows as a failed install: refresh it once, then try again.
    "${install[@]}" >/dev/null 2>&1 || { "${root[@]}" apt-get -q update && "${install[@]}"; }
else
    "${root[@]}" dnf -y -q install "${wanted[@]}"
fi || {
    say "could not install: ${wanted[*]}"
    exit 1
}
say "installed: ${wanted[*]}"
