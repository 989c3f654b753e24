# Shared by the scripts in this folder: finds or installs what they need. Sourced, not run.
# shellcheck shell=bash

here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
needed_rust=1.95

say() { printf '%s\n' "$*" >&2; }
die() { say "error: $*"; exit 1; }

as_root() {
    if [ "$(id -u)" = 0 ]; then "$@"
    elif command -v sudo >/dev/null; then sudo "$@"
    else die "installing packages needs root: run this as root once, or install them yourself: $*"
    fi
}

# install_packages COMMAND=PACKAGE..: installs the Debian packages whose command is not there.
install_packages() {
    local missing=() pair
    for pair in "$@"; do
        command -v "${pair%%=*}" >/dev/null || missing+=("${pair#*=}")
    done
    [ ${#missing[@]} = 0 ] && return
    command -v apt-get >/dev/null || die "these are needed and this is not Debian: ${missing[*]}"
    say "installing ${missing[*]}"
    export DEBIAN_FRONTEND=noninteractive
    as_root apt-get update -qq
    as_root apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
}

# have_rust: whether the cargo on the path is new enough.
have_rust() {
    local version
    version=$(rustc --version 2>/dev/null | awk '{print $2}') || return 1
    [ -n "$version" ] && [ "$(printf '%s\n%s\n' "$needed_rust" "$version" | sort -V | head -n 1)" = "$needed_rust" ]
}

install_rust() {
    [ -f "$HOME/.cargo/env" ] && . "$HOME/.cargo/env"
    have_rust && return
    if ! command -v rustup >/dev/null && command -v apt-get >/dev/null; then
        say "installing rustup"
        as_root apt-get update -qq
        as_root apt-get install -y -qq --no-install-recommends rustup >/dev/null 2>&1 || true
    fi
    if command -v rustup >/dev/null; then
        rustup toolchain install --profile minimal --component clippy,rustfmt stable && rustup default stable
    fi
    have_rust || die "Rust $needed_rust or newer is needed: install it from https://rustup.rs and run this again"
}

# kvm_usable: whether this user can open /dev/kvm.
kvm_usable() { [ -r /dev/kvm ] && [ -w /dev/kvm ]; }

check_kvm() {
    [ -e /dev/kvm ] || die "/dev/kvm does not exist: this machine has no KVM. Load kvm-intel or kvm-amd, enable \
virtualisation in the firmware, or (inside a VM) enable nested virtualisation"
    { [ -r /dev/kvm ] && [ -w /dev/kvm ]; } || die "/dev/kvm may not be opened by $(id -un): add that user to the \
group that owns it (usually kvm) and log in again, or run as root"
}

# What building needs.
setup_build() {
    cd "$here"
    # cc: zstd and blake3 bring C and assembly.
    install_packages cc=gcc ld=binutils awk=gawk
    [ -e /usr/include/stdio.h ] || { as_root apt-get update -qq; as_root apt-get install -y -qq libc6-dev >/dev/null; }
    install_rust
}

# What the emulated hosts and the Debian guests are made with.
setup_nested() {
    install_packages qemu-system-x86_64=qemu-system-x86 mke2fs=e2fsprogs ip=iproute2 setpriv=util-linux \
        dpkg-deb=dpkg xz=xz-utils zstd=zstd tar=tar
}

# python_environment NAME PACKAGES..: a Python environment of its own below target/, for programs that tests speak to.
python_environment() {
    local name=$1 made="${CARGO_TARGET_DIR:-target}/$1"
    shift
    # ensurepip is a package of its own in Debian.
    install_packages python3=python3
    python3 -c 'import ensurepip, venv' 2>/dev/null ||
        { as_root apt-get update -qq; as_root apt-get install -y -qq --no-install-recommends python3-venv >/dev/null; }
    say "installing $name for the tests"
    # As cargo marks the folder when it makes it: by that it is found.
    mkdir -p "$made"
    echo 'Signature: 8a477f597d28d172789f06886806bc55' >"$made/../CACHEDIR.TAG"
    rm -rf "$made"
    python3 -m venv "$made"
    "$made/bin/pip" install --quiet --disable-pip-version-check "$@"
}

# moto, an S3-compatible server.
setup_s3() {
    [ -n "${MOTO_SERVER:-}" ] && return
    [ -x "${CARGO_TARGET_DIR:-target}/moto/bin/moto_server" ] && return
    python_environment moto 'moto[s3]==5.2.*' 'flask<4' 'flask-cors<7'
}

# A client library for Firecracker's API: of it what speaks to the socket, and what that needs.
setup_client() {
    [ -n "${FIRECRACKER_CLIENT:-}" ] && return
    [ -e "${CARGO_TARGET_DIR:-target}"/firecracker-client/lib/python3*/site-packages/firecracker/api.py ] && return
    python_environment firecracker-client --no-deps 'firecracker-python==0.0.5' 'requests-unixsocket==0.4.1' 'requests==2.32.3' \
        'urllib3<3' 'idna<4' 'certifi' 'charset-normalizer<4'
}

setup() {
    setup_build
    check_kvm
}
