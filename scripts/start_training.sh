#!/usr/bin/env bash
# Train detached, so that a closed SSH session does not end it. All arguments go to `torchrl-vla train`.
#   bash scripts/start_training.sh --run-dir runs/spatial --task-suite libero_spatial
#   tail -f runs/spatial.log          kill "$(cat runs/spatial.pid)"
# Log and process id lie beside the run folder; a second start on the same folder is refused while the first one lives.
set -euo pipefail
cd "$(dirname "$0")/.."

run_dir=
previous=
for argument in "$@"; do
  case "$argument" in
    --run-dir=*) run_dir=${argument#*=} ;;
    *) if [ "$previous" = --run-dir ]; then run_dir=$argument; fi ;;
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

program=.venv/bin/torchrl-vla
[ -x "$program" ] || program=torchrl-vla
command -v "$program" >/dev/null || {
  echo "torchrl-vla is not installed here: run make install first." >&2
  exit 1
}
nohup setsid "$program" train "$@" >>"$log" 2>&1 </dev/null &
echo $! >"$pid_file"
# Bad arguments show within seconds; say so here instead of leaving a dead process id behind.
sleep 5
if ! kill -0 "$!" 2>/dev/null && ! wait "$!"; then
  echo "Training stopped at once. The end of $log:" >&2
  tail -n 20 "$log" >&2
  exit 1
fi
echo "Training in $run_dir, process $!. Watch it: tail -f $log   Stop it: kill \$(cat $pid_file)"
