#!/usr/bin/env bash
# Train a recipe on the CPU as two hosts would: two network namespaces of this machine, joined by a virtual cable,
# each with a host name, a process table and a torchrun of its own. They share the file system, as in a cluster.
#   scripts/two_hosts.sh RECIPE OUTPUT_DIR [N [OPTION...]]    N processes on each [default: 1]; options of lorakit train
#   scripts/two_hosts.sh --check                              say whether this machine permits it
# Needs Linux, ip (iproute2), unshare (util-linux), and root or user namespaces. stderr names the process of each host:
# kill -KILL it to lose this host with all of its processes. Options of torchrun are variables, as PET_MAX_RESTARTS=1.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
host=(unshare --net --uts --pid --fork --kill-child --mount-proc)
owner=(unshare --net)
"${owner[@]}" true 2> /dev/null || owner=(unshare --user --map-root-user --net)

fail() {
  echo "error: $*" >&2
  exit 2
}

check() {
  local tool reason
  for tool in ip unshare hostname; do
    command -v "$tool" > /dev/null || fail "two hosts need the command '$tool', which is not installed"
  done
  reason="$("${owner[@]}" "${host[@]}" ip link add host-a type veth peer name host-b 2>&1)" ||
    fail "two hosts need network namespaces, which are not permitted here: ${reason##*$'\n'}"
}

start() { # NAME ADDRESS IS_HOST: start torchrun on a host, to which the end NAME of the cable goes
  # shellcheck disable=SC2016
  "${host[@]}" bash -c '
    hostname "$1"
    ip link set lo up
    until ip link set eth0 up; do sleep 0.05; done 2> /dev/null
    ip address add "$2/24" dev eth0
    exec "${@:3}"' bash "$1" "$2" \
    python -m torch.distributed.run --nnodes 2 --nproc-per-node "$processes" \
    --rdzv-backend c10d --rdzv-id two-hosts --rdzv-endpoint 10.0.0.1:29500 --rdzv-conf "is_host=$3" --local-addr "$2" \
    -m lorakit train "$recipe" --output-dir "$output_dir" ${options[@]+"${options[@]}"} &
  hosts+=("$!")
  while [[ /proc/$!/ns/net -ef /proc/$$/ns/net ]]; do sleep 0.05; done
  exec {network}< "/proc/$!/ns/net" # the cable stays when the host is lost
  ip link set "$1" netns "$!" name eth0
  echo "$1, $2: process $!" >&2
}

stop() { # send SIGTERM to each torchrun
  local pid
  for pid in "${hosts[@]}"; do
    # shellcheck disable=SC2046
    kill -TERM $(< "/proc/$pid/task/$pid/children") || true
  done 2> /dev/null
}

ended() { # PID: wait for a host, through signals that are handled meanwhile
  local code=0
  while wait "$1" 2> /dev/null || code=$?; kill -0 "$1" 2> /dev/null; do code=0; done
  return "$code"
}

if [[ "${1:-}" == --check ]]; then
  check
  exit
elif [[ "${1:-}" != --inside ]]; then
  (($# >= 2)) || fail "usage: scripts/two_hosts.sh RECIPE OUTPUT_DIR [N [OPTION...]]"
  [[ -f $1 ]] || fail "RECIPE = $1: no such file"
  [[ ${3:-1} =~ ^[1-9][0-9]*$ ]] || fail "N = $3: allowed: an integer above 0, before any OPTION"
  check
  source "$root/scripts/venv.sh"
  exec "${owner[@]}" bash "${BASH_SOURCE[0]}" --inside "$@"
fi

recipe=$2 output_dir=$3 processes=${4:-1} options=("${@:5}") hosts=()
export CUDA_VISIBLE_DEVICES="" GLOO_SOCKET_IFNAME=eth0 PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
set -m # a group for each host, which Ctrl-C does not reach
trap 'kill -KILL "${hosts[@]}" 2> /dev/null || true' EXIT
trap stop INT TERM HUP
ip link add host-a type veth peer name host-b
start host-a 10.0.0.1 true
start host-b 10.0.0.2 false
code=0
for pid in "${hosts[@]}"; do ended "$pid" || : "$((code = code ? code : $?))"; done
exit "$code"
