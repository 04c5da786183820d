# SPDX-License-Identifier: Apache-2.0
# Machine set-up shared by scripts/run and scripts/test: Debian packages, a virtual environment, the build.
# To be sourced by bash with `set -eu`. Each step first looks whether there is anything to do.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=$root/.venv
state=${BLOCKTARGET_STATE:-$root/var}
case $state in /*) ;; *) state=$PWD/$state ;; esac

build_packages=(gcc libc6-dev libiscsi-dev liburing-dev)
python_packages=(python3 python3-dev python3-venv)
guest_packages=(busybox-static e2fsprogs kmod lz4 nbd-client qemu-system-x86)
bench_packages=(fio nbdkit qemu-system-common qemu-utils)
backend_packages=(libiscsi-bin nbdkit-plugin-python open-iscsi qemu-block-extra sg3-utils tgt)
test_packages=("${guest_packages[@]}" "${bench_packages[@]}" "${backend_packages[@]}" clang file libclang-rt-14-dev libnbd-bin nbd-server procps python3-cryptography python3-libnbd strace)

say() { printf '%s\n' "$*" >&2; }

die() {
    say "$(basename "$0"): $*"
    exit 1
}

# Runs a command; its output is shown only when it fails.
quietly() {
    local log
    log=$(mktemp)
    if ! "$@" >"$log" 2>&1 </dev/null; then
        cat "$log" >&2
        rm -f "$log"
        die "failed: $*"
    fi
    rm -f "$log"
}

have_package_lists() { compgen -G '/var/lib/apt/lists/*_Packages*' >/dev/null; }

apt_update() { quietly apt-get -q update; }

# Installs those of the named Debian packages that are not installed.
install_packages() {
    local missing=() package
    for package in "$@"; do
        [ "$(dpkg-query -W -f='${db:Status-Status}' "$package" 2>/dev/null)" = installed ] || missing+=("$package")
    done
    [ ${#missing[@]} -gt 0 ] || return 0
    [ "$(id -u)" = 0 ] || die "not root; these Debian packages are missing: ${missing[*]}"
    say "installing Debian packages: ${missing[*]}"
    have_package_lists || apt_update
    export DEBIAN_FRONTEND=noninteractive
    # Lists that are there can be old, and name versions that the mirror no longer has.
    apt-get -q -y --no-install-recommends install "${missing[@]}" >/dev/null 2>&1 </dev/null && return 0
    apt_update
    quietly apt-get -q -y --no-install-recommends install "${missing[@]}"
}

# True for a Python of at least 3.11 that can make virtual environments and compile extensions.
usable_python() {
    "$1" - >/dev/null 2>&1 <<'PY'
import os, sys, sysconfig
import ensurepip, venv
assert sys.version_info >= (3, 11)
assert os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h"))
PY
}

# Sets `python` to the interpreter for the virtual environment.
find_python() {
    for python in python3 /usr/bin/python3.11 /usr/bin/python3; do
        usable_python "$python" && return 0
    done
    install_packages "${python_packages[@]}"
    python=/usr/bin/python3
    usable_python "$python" || die "needs Python 3.11 or later with venv and headers"
}

# What the installed package depends on; Python sources are used in place and need no new install.
sources_stamp() {
    (
        cd "$root"
        cat pyproject.toml setup.py target/datapath/*.[ch] target/datapath/*/*.[ch]
        cat target/datapath/build.py target/datapath/*/build.py
        printf %s "${BLOCKTARGET_CFLAGS:-}"
    ) | sha256sum | cut -d' ' -f1
}

# Makes the virtual environment and installs the package into it: install_package [EXTRA]
install_package() {
    local extra=${1:-} wanted stamp=$venv/installed
    wanted=$(sources_stamp)
    if [ -f "$stamp" ] && [ "$(head -n1 "$stamp")" = "$wanted" ] && grep -qx -e "extra:$extra" "$stamp"; then
        return 0
    fi
    install_packages "${build_packages[@]}"
    if [ ! -x "$venv/bin/python" ]; then
        find_python
        quietly "$python" -m venv "$venv"
    fi
    say "building and installing blocktarget into ${venv#"$PWD"/}"
    rm -f "$root"/target/datapath/_*.so
    quietly "$venv/bin/python" -m pip install --disable-pip-version-check 'setuptools>=68' wheel 'cffi>=1.16'
    quietly "$venv/bin/python" -m pip install --disable-pip-version-check --no-build-isolation \
        -e "$root${extra:+[$extra]}"
    if [ -f "$stamp" ]; then sed -i -e "1s/.*/$wanted/" "$stamp"; else printf '%s\n' "$wanted" >"$stamp"; fi
    grep -qx -e "extra:$extra" "$stamp" || printf 'extra:%s\n' "$extra" >>"$stamp"
}
