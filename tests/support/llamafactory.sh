#!/usr/bin/env bash
# Makes, once, the environment with the real LLaMA-Factory and prints its path.
# usage: llamafactory.sh CACHE_FOLDER
set -euo pipefail

# The test machine's user runs it.
umask 022
version=0.9.3
venv=$1/llamafactory-$version
python=${LFSVC_PYTHON:-/usr/bin/python3}
log=$1/llamafactory-$version.log

# Two runs side by side must not install into one folder.
mkdir -p "$1"
exec 9>"$1/llamafactory.lock"
flock 9

if [ ! -e "$venv/.complete" ]; then
    echo "Installing LLaMA-Factory $version with a CPU build of PyTorch (about 2.2 GB, two minutes) ..." >&2
    rm -rf "$venv"
    {
        "$python" -m venv "$venv"
        # torch first, this version exactly: a range would bring a CUDA build of several GB.
        "$venv/bin/pip" install --quiet torch==2.13.0
        "$venv/bin/pip" install --quiet "llamafactory==$version" 'pyarrow<20'
    } >"$log" 2>&1 || {
        echo "It failed; the last lines of $log:" >&2
        tail -n 20 "$log" >&2
        exit 1
    }
    touch "$venv/.complete"
fi
echo "$venv"
