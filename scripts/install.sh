#!/bin/sh
# Installs what building and testing needs and is not there yet: with apt when run as root, else prints the line to
# run. Python packages go into .venv. Nothing that is there is touched.
#   sh scripts/install.sh          compiler, MPI, doctest, and all Python packages
#   sh scripts/install.sh --no-python
set -e
cd "$(dirname "$0")/.."

packages=""
has() { command -v "$1" >/dev/null 2>&1; }
echo 'int main(){}' > /tmp/probe_$$.cpp
probe() { ${CXX:-g++} -std=c++20 "$@" /tmp/probe_$$.cpp -o /tmp/probe_$$ >/dev/null 2>&1; }
has make || packages="$packages make"
probe -fopenmp || packages="$packages g++"
has mpicxx && has mpirun || packages="$packages openmpi-bin libopenmpi-dev"
probe -fsyntax-only -include doctest/doctest.h || packages="$packages doctest-dev"
has python3 && python3 -c 'import venv, ensurepip' 2>/dev/null || packages="$packages python3 python3-venv"
rm -f /tmp/probe_$$ /tmp/probe_$$.cpp

if [ -n "$packages" ]; then
    if [ "$(id -u)" = 0 ] && has apt-get; then
        echo "installing$packages"
        apt-get update -qq >/dev/null
        DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $packages >/dev/null
    else
        echo "missing, install them with:"
        echo "    sudo apt-get update && sudo apt-get install -y$packages"
        exit 1
    fi
fi

[ "$1" = --no-python ] && exit 0
if ! [ -x .venv/bin/python ]; then
    python3 -m venv .venv
fi
if ! cmp -s scripts/requirements.txt .venv/installed.txt; then
    echo "installing the Python packages of scripts/requirements.txt into .venv"
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -r scripts/requirements.txt
    cp scripts/requirements.txt .venv/installed.txt
fi
