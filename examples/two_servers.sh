#!/usr/bin/env bash
# Two servers on one device that share its memory.
#
#   examples/two_servers.sh MODEL     with a GPU
#   examples/two_servers.sh           without one, on host memory, with a tiny model
#
# Each server is promised the same memory. Neither holds it until requests need it, and each gives back what it has
# cached when the other runs short. The script starts both, asks each one, shows what they hold, lowers the limit of the
# first one, puts it to sleep, and ends both. Run it in the environment that has sglang-vtensor.
set -euo pipefail

port=${PORT:-30000} # and the next one
if ! [[ $port =~ ^[1-9][0-9]{0,4}$ ]] || ((port > 65534)); then
    echo "PORT is $port: give a number from 1 to 65534, for the next one is the port of the second server" >&2
    exit 1
fi
# Where somebody listens already, the script would take that server for its own.
python -c 'import socket, sys
for port in map(int, sys.argv[1:]):
    try:
        socket.create_server(("127.0.0.1", port)).close()
    except OSError as error:
        sys.exit(f"port {port} cannot be had: {error}. End the program that has it, or give another PORT")
' "$port" "$((port + 1))"

folder=$(mktemp -d)
pids=()
end() {
    for pid in "${pids[@]}"; do kill "$pid" 2>/dev/null || true; done
    for pid in "${pids[@]}"; do wait "$pid" 2>/dev/null || true; done
    rm -rf "$folder"
}
trap end EXIT

arguments=(--kv-backend vtensor --sleep-on-idle --host 127.0.0.1)
if ! python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    export SGLANG_PLATFORM=vtensor_host
    export VTENSOR_HOST_DEVICE=two-servers-$$ # host memory has no device: processes with this name are neighbours
    arguments+=(--max-total-tokens 16384 --dtype bfloat16)
fi
model=${1:-$folder/tiny}
if [ $# -eq 0 ]; then
    python -c 'import pathlib, sys; from sglang_vtensor import tiny_model; tiny_model.build(pathlib.Path(sys.argv[1]))' "$model"
fi

# If a server has ended, show the end of its log and end too: what answers at its port is not ours.
still_runs() {
    if ! kill -0 "$1" 2>/dev/null; then
        echo "the server did not start:" >&2
        tail -n 25 "$2" >&2
        exit 1
    fi
}

# Start a server and wait until it answers. The second one starts after the first: each looks at the memory that is free.
start() {
    local url=http://127.0.0.1:$1 log=$folder/$1.log
    python -m sglang.launch_server --model-path "$model" --port "$1" "${arguments[@]}" >"$log" 2>&1 &
    pids+=($!)
    while
        still_runs "${pids[-1]}" "$log"
        ! curl -sf --max-time 5 -o /dev/null "$url/health_generate"
    do
        sleep 1
    done
    still_runs "${pids[-1]}" "$log"
    echo "$url serves"
}

ask() {
    curl -sf -o /dev/null "$1/generate" -H 'Content-Type: application/json' -d '{
        "text": "what is a page and who owns it when two users ask about the same thing at the same time",
        "sampling_params": {"temperature": 0, "max_new_tokens": 32, "ignore_eos": true}}'
    echo "$1 answered"
}

one=http://127.0.0.1:$port two=http://127.0.0.1:$((port + 1))
start "$port"
start "$((port + 1))"
ask "$one"
ask "$two"
sleep 1 # each looks for its neighbours once a second
for url in "$one" "$two"; do
    neighbours=$(sglang-vtensor stats --json --url "$url" | python -c 'import json, sys; print(json.load(sys.stdin)[0]["neighbours"])')
    if [ "$neighbours" != 1 ]; then
        echo "$url has $neighbours neighbours, where 1 is wanted: both servers must be on one device, and no other server with" \
            "sglang-vtensor there. Choose a device with CUDA_VISIBLE_DEVICES" >&2
        exit 1
    fi
    echo "$url has 1 neighbour"
done
sglang-vtensor top "$one" "$two" --once
sglang-vtensor limit --url "$one" 50%
sglang-vtensor sleep --url "$one"
ask "$two"
sglang-vtensor wake --url "$one"
ask "$one"
