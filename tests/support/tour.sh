#!/usr/bin/env bash
# What the demo shows. usage: tour.sh LLAMAFACTORY_VENV TINY_MODEL_SCRIPT systemd|machine|process
set -euo pipefail

llamafactory=$1 tiny_model=$2 how=$3
work=$(mktemp -d "${HOME:-/tmp}/lfsvc-demo.XXXXXX")
# First on PATH: the demo trains with its own LLaMA-Factory, whatever else is installed.
export PATH=$llamafactory/bin:$PATH HF_HUB_OFFLINE=1

settings=${XDG_CONFIG_HOME:-$HOME/.config}/lfsvc
installed='' serve='' id=''

# `lfsvc setup` writes the jobs' environment anew: a user who had one gets it back.
keep_settings() {
    local name
    for name in environment environment.old; do
        if [ -e "$settings/$name" ]; then cp -p "$settings/$name" "$work/kept-$name"; fi
    done
}

restore_settings() {
    local name
    for name in environment environment.old; do
        if [ -e "$work/kept-$name" ]; then
            mv "$work/kept-$name" "$settings/$name"
        else
            rm -f "$settings/$name"
        fi
    done
}

finish() {
    # Where the demo ends before its job does: a stopped scheduler leaves jobs running, so the job goes first.
    if [ -n "$id" ] && lfsvc kill "$id" >/dev/null 2>&1; then lfsvc wait "$id" >/dev/null 2>&1 || true; fi
    if [ -n "$serve" ]; then
        kill "$serve" 2>/dev/null || true
        wait "$serve" 2>/dev/null || true
    fi
    if [ -n "$installed" ]; then
        lfsvc setup --remove >/dev/null 2>&1 || true
        restore_settings
    fi
    rm -rf "$work"
}
trap finish EXIT

show() {
    printf '\n\033[1m$ %s\033[0m\n' "$*"
    "$@"
}

echo "Making a tiny model and its data ..."
"$llamafactory/bin/python" "$tiny_model" "$work" >"$work/tiny_model.log" 2>&1 || {
    cat "$work/tiny_model.log" >&2
    exit 1
}

cd "$work"
environment=(--env NPROC_PER_NODE=1 --env HF_HUB_OFFLINE=1)
if [ "$how" = process ]; then
    # A scheduler of the demo's own: neither the user's queue, settings and bus nor his systemd are touched.
    export XDG_STATE_HOME=$work/state XDG_DATA_HOME=$work/data XDG_CONFIG_HOME=$work/config
    export XDG_RUNTIME_DIR=$work/run DBUS_SESSION_BUS_ADDRESS=unix:path=$work/none
    mkdir -m 700 "$work/run"
    printf '\n\033[1m$ lfsvc serve &\033[0m\n'
    # In a session of its own: a Ctrl-C would end it before `finish` can end the job through it.
    setsid lfsvc serve >"$work/serve.log" 2>&1 &
    serve=$!
    # It answers when it is ready; until then nothing owns the name.
    until lfsvc status >/dev/null 2>&1; do
        kill -0 "$serve" 2>/dev/null || {
            cat "$work/serve.log" >&2
            exit 1
        }
        sleep 0.1
    done
    cat "$work/serve.log"
elif systemctl --user cat lfsched.service >/dev/null 2>&1; then
    echo "lfsched.service is installed already: the demo's job joins your own queue."
    environment+=(--env "PATH=$PATH")
else
    keep_settings
    installed=yes
    show lfsvc setup --no-linger
fi

printf '\n\033[1m$ lfsvc submit train:%s --name sums %s\033[0m\n' "$work/train.yaml" "${environment[*]:0:4}"
accepted=$(lfsvc submit "train:$work/train.yaml" --name sums "${environment[@]}")
# job 42 queued (2 ahead): ...
id=${accepted#job }
id=${id%% *}
printf '%s\n' "$accepted"

# A training and, by the same log, its merge.
show lfsvc logs "$id" --follow
show lfsvc wait "$id"
show lfsvc status
evaluation=$(lfsvc show "$id" | sed -n 's/^ *evaluation  job \([0-9]*\),.*/\1/p')
show lfsvc wait "$evaluation"
show lfsvc show "$id"
show lfsvc show "$evaluation"
if [ "$how" != process ]; then
    show busctl --user get-property org.lfsvc1 /org/lfsvc1 org.lfsvc1.Scheduler State
    printf '\n\033[1m$ journalctl --user -u lfsched JOB_ID=%s\033[0m   (first and last lines)\n' "$id"
    journalctl --user -u lfsched "JOB_ID=$id" --no-pager -o short >"$work/journal" 2>&1 || true
    head -n 3 "$work/journal"
    echo "..."
    tail -n 3 "$work/journal"
fi
printf '\n\033[1mWhere everything is\033[0m\n'
where() { printf '  %-18s %s\n' "$1" "$2"; }
where "the training's log" "$(ls "$work"/saves/sums/llamafactory_train_*.log)"
where "its adapter" "$work/saves/sums/adapter_model.safetensors"
where "the merge's log" "$(ls "$work"/saves/sums/merge_lora_*.log)"
where "the merged model" "$work/saves/sums/merged"
where "the evaluation" "$(ls "$work"/saves/sums/eval_*.yaml)"
results=$(lfsvc show "$evaluation" | sed -n 's/^ *output dir  //p')
where "its results" "$results/eval_results.json"
where "the table" "$(dirname "$results")/summary.csv"

show lfsvc results

echo
if [ "$how" != systemd ]; then
    echo "That was the demo; its queue, model and results are taken away again."
else
    echo "That was the demo; its model is taken away again, its results stay in $results."
fi
