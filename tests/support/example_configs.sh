#!/usr/bin/env bash
# Fetches, once, LLaMA-Factory's own example configs and data set list, and prints the folder that holds them.
# usage: example_configs.sh CACHE_FOLDER PIP
set -euo pipefail

# The source package of 0.9.4 is the first that has them; the one of 0.9.3 holds the code only.
version=0.9.4
folder=$1/llamafactory-$version-source
pip=$2
log=$1/llamafactory-$version-source.log

# Two runs side by side must not unpack into one folder.
mkdir -p "$1"
exec 9>"$1/llamafactory-source.lock"
flock 9

if [ ! -e "$folder/.complete" ]; then
    echo "Fetching the example configs of LLaMA-Factory $version (5 MB) ..." >&2
    rm -rf "$folder"
    mkdir "$folder"
    {
        "$pip" download --quiet --no-deps --no-binary llamafactory --dest "$folder" "llamafactory==$version"
        tar -xzf "$folder/llamafactory-$version.tar.gz" -C "$folder" --strip-components=1
        rm "$folder/llamafactory-$version.tar.gz"
    } >"$log" 2>&1 || {
        echo "It failed; the last lines of $log:" >&2
        tail -n 20 "$log" >&2
        exit 1
    }
    touch "$folder/.complete"
fi
echo "$folder"
