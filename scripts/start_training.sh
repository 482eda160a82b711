#!/usr/bin/env bash
# Train detached, so that a closed SSH session does not end it. All arguments go to `torchrl-vla train`.
#   bash scripts/start_training.sh --run-dir runs/spatial --task-suite libero_spatial
#   tail -f runs/spatial.log          kill "$(cat runs/spatial.pid)"
# Log and process id lie beside the run folder; a second start on the same folder is refused while the first one lives.
set -euo pipefail

program=$(dirname "$0")/../.venv/bin/torchrl-vla
[ -x "$program" ] || program=torchrl-vla
command -v "$program" >/dev/null || {
  echo "torchrl-vla is not installed here: run make install first." >&2
  exit 1
}

run_dir=
previous=
for argument in "$@"; do
  case "$argument" in
    -h | --help) exec "$program" train --help ;;
    --run[-_]dir=*) run_dir=${argument#*=} ;;
    *) case "$previous" in --run[-_]dir) run_dir=$argument ;; esac ;;
  esac
  previous=$argument
done
if [ -z "$run_dir" ]; then
  run_dir=runs/$(date +%Y%m%d-%H%M%S)
  set -- "$@" --run-dir "$run_dir"
fi
run_dir=${run_dir%/}
log=$run_dir.log
pid_file=$run_dir.pid
mkdir -p "$(dirname "$run_dir")"

# The lock, not the number in the file, says whether a run lives: it ends with the process, however that ends.
exec 9>>"$pid_file"
if ! flock -n 9; then
  echo "A run in $run_dir is going on already (process $(cat "$pid_file")). Watch it: tail -f $log   Stop it: kill $(cat "$pid_file")" >&2
  exit 1
fi

: >>"$log"
begin=$(wc -c <"$log")
nohup setsid "$program" train "$@" >>"$log" 2>&1 </dev/null &
process=$!
echo "$process" >"$pid_file"
# Bad arguments show before the run's folder is made; say so here instead of leaving a dead process id behind.
for _ in $(seq 120); do
  if ! kill -0 "$process" 2>/dev/null; then
    : >"$pid_file"
    if wait "$process"; then
      echo "Training has ended already. The end of $log:"
      tail -n 3 "$log"
      exit
    fi
    echo "Training stopped at once. The end of $log:" >&2
    tail -n 20 "$log" >&2
    exit 1
  fi
  if grep -q "results go to" <(tail -c "+$((begin + 1))" "$log"); then break; fi
  sleep 0.5
done
echo "Training in $run_dir, process $process. Watch it: tail -f $log   Stop it: kill \$(cat $pid_file)"
