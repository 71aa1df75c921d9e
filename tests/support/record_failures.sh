#!/usr/bin/env bash
# Records what the real LLaMA-Factory prints when it fails: the data of tests/unit/test_failures.py.
# usage: record_failures.sh LLAMAFACTORY_ENVIRONMENT LAB [CASE...]
#   LAB: an empty folder outside the checkout, where models are made and trained. Needs root (a small tmpfs is
#   mounted in it). Writes tests/data/failures/recorded/CASE.log and its line in recorded.tsv.
set -euo pipefail

venv=$1
lab=$2
shift 2
wanted=("$@")
here=$(cd "$(dirname "$0")" && pwd)
out=$(cd "$here/../data/failures" && pwd)/recorded
table=$out.tsv
export HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
export PATH="$venv/bin:/usr/bin:/bin"
# A whole output is kept up to this size, then the middle is cut.
most_bytes=60000

mkdir -p "$lab" "$out"
cd "$lab"
# Whatever ends this, no mount stays behind.
mounted=
trap '[ -z "$mounted" ] || umount "$mounted"' EXIT
[ -e train.yaml ] || python "$here/tiny_model.py" "$lab" >/dev/null
touch "$table"

# The training YAML under another name, with lines replaced, added or, where the value is empty, left out.
config() { # NAME 'key: value'...
    local name=$1 line key
    shift
    sed "s|^output_dir: .*|output_dir: $lab/saves/$name|" train.yaml >"$name.yaml"
    for line in "$@"; do
        key=${line%%:*}
        sed -i "/^$key:/d" "$name.yaml"
        [ "${line#*:}" = "" ] || printf '%s\n' "$line" >>"$name.yaml"
    done
}

asked() {
    local name
    [ ${#wanted[@]} = 0 ] && return 0
    for name in "${wanted[@]}"; do [ "$name" = "$1" ] && return 0; done
    return 1
}

# Run a command and keep its output, with this machine's paths and names replaced.
record() { # NAME HOW COMMAND...
    local name=$1 how=$2 status=0 raw
    shift 2
    raw=$(mktemp)
    "$@" >"$raw" 2>&1 </dev/null || status=$?
    sed -i -e "s|$venv|/opt/llamafactory|g" -e "s|$lab|/srv/lab|g" -e "s|$(hostname)|lab|g" "$raw"
    cut_middle "$raw" >"$out/$name.log"
    rm -f "$raw"
    sed -i "/^$name\t/d" "$table"
    how=${how//$'\n'/; }
    how=${how//"$lab"//srv/lab}
    printf '%s\t%s\t%s\n' "$name" "$status" "${how%; }" >>"$table"
    LC_ALL=C sort -o "$table" "$table"
    printf '%-28s exit status %s\n' "$name" "$status" >&2
}

cut_middle() {
    local size
    size=$(stat -c %s "$1")
    if [ "$size" -le "$most_bytes" ]; then
        cat "$1"
    else
        head -c 20000 "$1"
        printf '\n[cut here: %s bytes]\n' $((size - 55000))
        tail -c 35000 "$1"
    fi
}

one=(nice env FORCE_TORCHRUN=1 NPROC_PER_NODE=1 llamafactory-cli)
two=(nice env FORCE_TORCHRUN=1 NPROC_PER_NODE=2 llamafactory-cli)
bare=(nice env FORCE_TORCHRUN=0 llamafactory-cli)

# A training of one process that differs by some lines of its YAML.
train() { # NAME 'key: value'...
    local name=$1
    shift
    asked "$name" || return 0
    config "$name" "$@"
    record "$name" "one process under torchrun; $(printf '%s; ' "$@")" "${one[@]}" train "$name.yaml"
}

# ---- The YAML ----
train unknown_dataset 'dataset: summs'
train unknown_template 'template: lama3'
train unknown_key 'lora_rnak: 8' 'lora_rank:'
train text_as_number 'learning_rate: 1e-4'
train not_a_number 'lora_rank: many'
train no_eval_data 'do_eval: true' 'val_size: 0.0' 'eval_strategy: epoch'
train no_eval_data_at_end 'do_eval: true' 'do_train: false' 'val_size: 0.0'
train resume_from_nowhere "resume_from_checkpoint: $lab/saves/gone"
train layerwise_galore 'use_galore: true' 'galore_layerwise: true' 'finetuning_type: full' 'galore_target: all'
train lora_target 'lora_target: query_proj'
train bad_yaml $'dataset: sums\n  indented: wrong'
if asked not_utf8; then
    config not_utf8
    printf '# \xe4\xb8\xad\xe6\x96\x87\n' >>not_utf8.yaml
    record not_utf8 "one process under torchrun; a Chinese comment in the YAML, ASCII locale" \
        env PYTHONUTF8=0 PYTHONCOERCECLOCALE=0 LC_ALL=POSIX "${one[@]}" train not_utf8.yaml
fi
if asked unknown_dataset_bare; then
    config unknown_dataset_bare 'dataset: summs'
    record unknown_dataset_bare "FORCE_TORCHRUN=0; dataset: summs" "${bare[@]}" train unknown_dataset_bare.yaml
fi
if asked unknown_dataset_two; then
    config unknown_dataset_two 'dataset: summs'
    record unknown_dataset_two "two ranks; dataset: summs" "${two[@]}" train unknown_dataset_two.yaml
fi

# ---- Data ----
mkdir -p data/gone data/empty data/broken data/none
echo '{"sums": {"file_name": "gone.json"}}' >data/gone/dataset_info.json
echo '{"sums": {"file_name": "sums.json"}}' | tee data/empty/dataset_info.json >data/broken/dataset_info.json
echo '[{"question": "a", "answer": "b"}]' >data/empty/sums.json
echo '[{"instruction": "a", "output": ' >data/broken/sums.json
train no_data_folder "dataset_dir: $lab/data/none"
train no_data_file "dataset_dir: $lab/data/gone"
train wrong_columns "dataset_dir: $lab/data/empty"
train broken_json "dataset_dir: $lab/data/broken"

# ---- Models ----
mkdir -p models/no_weights models/cut
cp model/* models/cut/ && truncate -s 20000 models/cut/model.safetensors
cp model/tokenizer* model/special* models/no_weights/
train no_model_folder "model_name_or_path: $lab/modle"
train no_model_offline 'model_name_or_path: nobody/no-such-model-7B'
train model_without_config "model_name_or_path: $lab/models/no_weights"
train model_cut_short "model_name_or_path: $lab/models/cut"
train no_bitsandbytes 'quantization_bit: 4'
train no_deepspeed 'deepspeed: ds_z2.json'
train no_rouge 'do_train: false' 'do_predict: true' 'predict_with_generate: true' 'eval_dataset: sums' 'dataset:' 'val_size:'

# ---- The folder of results ----
if asked output_dir_not_empty; then
    config output_dir_not_empty 'overwrite_output_dir:'
    mkdir -p saves/output_dir_not_empty
    touch saves/output_dir_not_empty/adapter_model.safetensors
    record output_dir_not_empty "one process under torchrun; output_dir with final weights" \
        "${one[@]}" train output_dir_not_empty.yaml
fi
small() { # NAME SIZE 'key: value'...
    local name=$1 size=$2
    shift 2
    asked "$name" || return 0
    config "$name" "$@"
    mkdir -p "saves/$name"
    mount -t tmpfs -o "size=$size" tmpfs "saves/$name"
    mounted=$lab/saves/$name
    record "$name" "one process under torchrun; output_dir on a tmpfs of $size; $*" "${one[@]}" train "$name.yaml"
    umount "saves/$name"
    mounted=
}
small disk_full 40k
small disk_full_optimizer 2m 'lora_rank: 32' 'save_steps: 2'

# ---- Memory, signals, ports ----
if asked memory; then
    config memory 'lora_rank: 60000000'
    record memory "FORCE_TORCHRUN=0; ulimit -v 8000000; lora_rank: 60000000" \
        bash -c 'ulimit -v 8000000; exec "$@"' - "${bare[@]}" train memory.yaml
fi
# Send one process a signal once the training is under way. The pattern is matched with pgrep -f.
when_training() { # NAME SIGNAL PATTERN COMMAND...
    local name=$1 number=$2 pattern=$3 pid child
    shift 3
    rm -rf "saves/$name"
    "$@" &
    child=$!
    until [ "$(wc -l <"saves/$name/trainer_log.jsonl")" -gt 20 ] 2>/dev/null; do
        kill -0 "$child" || break
        sleep 0.2
    done
    for pid in $(pgrep -f "$pattern" | sort -n | tail -n 1); do kill "-$number" "$pid"; done
    wait "$child"
}
long='num_train_epochs: 500.0'
if asked rank_killed; then
    config rank_killed "$long" 'val_size: 0.0'
    record rank_killed "two ranks; SIGKILL to one" \
        when_training rank_killed KILL "[l]auncher.py rank_killed.yaml" "${two[@]}" train rank_killed.yaml
fi
if asked killed_bare; then
    config killed_bare "$long" 'val_size: 0.0'
    record killed_bare "FORCE_TORCHRUN=0; SIGKILL" \
        when_training killed_bare KILL "[t]rain killed_bare.yaml" "${bare[@]}" train killed_bare.yaml
fi
if asked terminated; then
    config terminated "$long" 'val_size: 0.0'
    record terminated "one process under torchrun; SIGTERM to torchrun" \
        when_training terminated TERM "[t]orchrun .*terminated.yaml" "${one[@]}" train terminated.yaml
fi
if asked interrupted; then
    config interrupted "$long" 'val_size: 0.0'
    record interrupted "FORCE_TORCHRUN=0; SIGINT" \
        when_training interrupted INT "[t]rain interrupted.yaml" \
        env --default-signal=INT "${bare[@]}" train interrupted.yaml
fi
if asked rank_1_short_of_memory; then
    # sitecustomize is the one place that is run in a rank and in nothing before it.
    mkdir -p limited
    cat >limited/sitecustomize.py <<'PYTHON'
import os, resource
if os.environ.get("LOCAL_RANK") == "1":
    resource.setrlimit(resource.RLIMIT_AS, (8_000_000_000, 8_000_000_000))
PYTHON
    config rank_1_short_of_memory 'lora_rank: 8000000' 'lora_target: q_proj'
    record rank_1_short_of_memory "two ranks; RLIMIT_AS 8 GB in rank 1 only; lora_rank: 8000000" \
        env PYTHONPATH="$lab/limited" "${two[@]}" train rank_1_short_of_memory.yaml
fi
if asked rank_1_fails_late; then
    mkdir -p late
    cat >late/sitecustomize.py <<'PYTHON'
import os, resource
if os.environ.get("LOCAL_RANK") == "1":
    import threading
    threading.Timer(25, lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))).start()
PYTHON
    config rank_1_fails_late "$long" 'val_size: 0.0' 'save_steps: 5'
    record rank_1_fails_late "two ranks; rank 1 may open no file after 25 s" \
        env PYTHONPATH="$lab/late" "${two[@]}" train rank_1_fails_late.yaml
fi
if asked port_taken; then
    config port_taken
    coproc taken { exec python -uc '
import socket, time
s = socket.socket(); s.bind(("127.0.0.1", 29517)); s.listen(); print("ready"); time.sleep(600)'; }
    # shellcheck disable=SC2154  # coproc sets it
    read -r _ <&"${taken[0]}"
    # shellcheck disable=SC2154
    pid=$taken_PID
    record port_taken "one process under torchrun; MASTER_PORT in use" env MASTER_PORT=29517 "${one[@]}" train port_taken.yaml
    kill "$pid"
fi
if asked no_processes; then
    config no_processes
    record no_processes "FORCE_TORCHRUN=1 without NPROC_PER_NODE on a machine without accelerators" \
        env FORCE_TORCHRUN=1 llamafactory-cli train no_processes.yaml
fi
if asked no_torchrun; then
    config no_torchrun
    record no_torchrun "FORCE_TORCHRUN=1, PATH without the environment's bin" \
        env PATH=/usr/bin:/bin FORCE_TORCHRUN=1 NPROC_PER_NODE=1 "$venv/bin/llamafactory-cli" train no_torchrun.yaml
fi

# ---- Export and benchmarks ----
export_config() { # NAME 'key: value'...
    local name=$1
    shift
    printf '%s\n' "model_name_or_path: $lab/model" "adapter_name_or_path: $lab/saves/adapter" 'template: default' \
        'finetuning_type: lora' "export_dir: $lab/merged/$name" >"$name.yaml"
    for line in "$@"; do
        sed -i "/^${line%%:*}:/d" "$name.yaml"
        printf '%s\n' "$line" >>"$name.yaml"
    done
}
if asked export_other_base || asked export_quantised || asked export_cut_adapter; then
    if [ ! -e saves/adapter/adapter_model.safetensors ]; then
        config adapter
        "${bare[@]}" train adapter.yaml >/dev/null 2>&1
    fi
    if [ ! -e other/model ]; then
        mkdir -p other
        sed 's/hidden_size=64/hidden_size=32/' "$here/tiny_model.py" >other/tiny_model.py
        python other/tiny_model.py "$lab/other" >/dev/null
    fi
    mkdir -p models/quantised saves/cut
    cp model/* models/quantised/
    python - models/quantised/config.json <<'PYTHON'
import json, sys
config = json.load(open(sys.argv[1]))
config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [16, 16]}
json.dump(config, open(sys.argv[1], "w"))
PYTHON
    cp saves/adapter/adapter_* saves/cut/
    truncate -s 2000 saves/cut/adapter_model.safetensors
fi
merge() { # NAME 'key: value'...
    asked "$1" || return 0
    export_config "$@"
    record "$1" "llamafactory-cli export; ${2:-}" "${bare[@]}" export "$1.yaml"
}
merge export_other_base "model_name_or_path: $lab/other/model"
merge export_quantised "model_name_or_path: $lab/models/quantised"
merge export_cut_adapter "adapter_name_or_path: $lab/saves/cut"
merge export_unknown_key 'learning_rate: 1.0e-4'
merge export_no_adapter "adapter_name_or_path: $lab/saves/gone"
merge export_oft 'finetuning_type: oft'

benchmark() { # NAME HOW COMMAND...
    asked "$1" || return 0
    printf '%s\n' "model_name_or_path: $lab/model" 'template: default' 'task: mmlu_test' 'lang: en' 'n_shot: 5' \
        "task_dir: $lab/evaluation" "save_dir: $lab/saves/$1" >"$1.yaml"
    record "$1" "llamafactory-cli eval; $2" "${bare[@]}" eval "$1.yaml"
}
benchmark benchmark_without_data 'task_dir is not there'
mkdir -p saves/benchmark_save_dir
benchmark benchmark_save_dir 'save_dir exists'
