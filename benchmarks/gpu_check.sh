#!/usr/bin/env bash
# Everything that only a GPU can show, in one command of at most nine minutes on an H200 with 16 cores and no network:
#   build     csrc/, by nvcc
#   tests     pytest -m gpu; fails if no test ran on the GPU
#   sanitize  every kernel under compute-sanitizer, memcheck and racecheck; skipped where the tool refuses the machine
#   train     the demo model in bf16 with the kernels, and again with plain torch: the losses must agree
#   kernels   benchmarks/kernels.py: kernels against floors and peers
#
#   benchmarks/gpu_check.sh OUT [python]       python: one with the package's dependencies; default .venv/bin/python
#
# PEERS=FOLDER    wheels, which are installed beside what the python has, and .tar.xz archives of unpacked packages
# SECONDS_IN_ALL  when everything is stopped; default 535. KERNELS_SECONDS: of the benchmark at most; default 210
#
# A part that fails or runs out of its time does not stop the others; the exit code is 1 if any failed. Without a GPU
# all of it is rehearsed on small shapes: tests and sanitizer skip, the model trains in fp32.
#
# OUT has eight files afterwards, none of them large: gpu_check.json (versions, device, tests, every part's exit status
# and seconds), gpu_check.log (what the parts printed), gpu-tests.xml, train.json (both runs' losses), sanitize.json,
# kernels.json, kernels.md and kernels.png. kernels.json is written as rows are measured.
# shellcheck disable=SC2329  # functions are called by another bash, under a time limit
set -uo pipefail
begin=$(date +%s)
cd "$(dirname "$0")/.." || exit 2
mkdir -p "${1:?folder for results}" || exit 2
out=$(cd "$1" && pwd)
python=${2:-.venv/bin/python}
case $python in */*) python=$(cd "$(dirname "$python")" && pwd)/$(basename "$python") ;; esac
in_all=${SECONDS_IN_ALL:-535}
kernels_seconds=${KERNELS_SECONDS:-210}
work=$(mktemp -d)
link=megaflow/kernels
linked=
cleanup() {
  [ -z "$linked" ] || rm -f "$link"
  rm -rf "$work"
}
trap cleanup EXIT
export PYTHONPATH=${PYTHONPATH:+$PYTHONPATH:}$PWD PYTHONUNBUFFERED=1
# results of an earlier check are none of this one's
rm -f "$out"/{gpu_check,train,sanitize,kernels}.json "$out"/{gpu-tests.xml,kernels.md,kernels.png}
: >"$out/gpu_check.log"

# part NAME LIMIT COMMAND...: runs it, notes exit status and seconds, and keeps what it printed
part() {
  local name=$1 limit=$2 signal=TERM start status=0 left
  start=$(date +%s)
  left=$((in_all - (start - begin)))
  shift 2
  if [ "$left" -lt 5 ]; then
    printf '%s\t%s\t%s\n' "$name" 124 0 >>"$work/parts.tsv"
    echo "== $name: no time was left"
    return
  fi
  [ "$limit" -le "$left" ] || limit=$left
  [ "$name" != tests ] || signal=INT # at which pytest writes its results
  timeout --signal="$signal" --kill-after=5 "$limit" "$@" >"$work/$name.txt" 2>&1 || status=$?
  local end
  end=$(date +%s)
  printf '%s\t%s\t%s\n' "$name" "$status" $((end - start)) >>"$work/parts.tsv"
  {
    echo "======== $name: exit status $status"
    tail -c 1500000 "$work/$name.txt"
  } >>"$out/gpu_check.log"
  echo "== $name: exit status $status after $((end - start)) s, $((end - begin)) s in all"
  [ "$status" -eq 0 ] || tail -n 8 "$work/$name.txt"
}

peers() {
  local wheels=() archive
  mkdir -p "$work/site"
  while IFS= read -r -d '' wheel; do wheels+=("$wheel"); done < <(find "$PEERS" -maxdepth 1 -name '*.whl' -print0)
  if [ "${#wheels[@]}" -gt 0 ]; then
    "$python" -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$work/site" \
      "${wheels[@]}" || return
  fi
  for archive in "$PEERS"/*.tar.xz; do
    [ -e "$archive" ] || continue
    tar -xJf "$archive" -C "$work/site" || "$python" -m tarfile -e "$archive" "$work/site" || return
  done
}

prepare() {
  local corpus
  for corpus in en zh parallel instruction; do
    case $corpus in
      en | zh) set -- --kind text ;;
      parallel) set -- --kind parallel --seq-length 256 ;;
      instruction) set -- --kind instruction --seq-length 256 --loss response ;;
    esac
    "$python" -m megaflow.tools.cli prepare "$work/data/$corpus" "configs/demo/$corpus.jsonl.zst" \
      --tokenizer configs/demo/tokenizer.model --language "$corpus" "$@" || return
  done
}

build() {
  "$python" setup.py --quiet build_ext --inplace || return
  # a library without its CUDA half is no error of the installation's, but it is here
  [ "$gpus" -eq 0 ] || "$python" -c '
import sys, torch
from megaflow.kernels.adamw import csrc_missing
sys.exit(csrc_missing("adamw", torch.device("cuda")))'
}

tests() {
  local files options=() cores
  cores=$(nproc)
  mapfile -t files < <(grep -rlE 'mark\.gpu\b|\bplace: Place\b' tests --include='test_*.py' | sort)
  if [ "$gpus" -gt 0 ] && "$python" -c 'import xdist' 2>/dev/null; then options=(-n "$((cores * 3 / 4 + 1))"); fi
  env --default-signal=INT "$python" -m pytest -m gpu -p no:cacheprovider --continue-on-collection-errors --junitxml "$out/gpu-tests.xml" \
    "${options[@]}" "${files[@]}"
}

train() { # FOLDER OVERRIDE...
  local folder=$1 precision=fp32 steps=4
  shift
  [ "$gpus" -eq 0 ] || { precision=bf16 && steps=30; }
  "$python" megaflow/pretrain.py --config configs/demo.yaml run_dir="$work/$folder" parallel.tp=1 \
    train.precision="$precision" train.steps="$steps" train.log_interval=1 train.eval_interval=0 \
    train.tensorboard=false optim.warmup_steps=3 checkpoint.interval=1000 \
    "data.groups.en.sources.novels.path=$work/data/en" \
    "data.groups.zh.sources.wikipedia_zh.path=$work/data/zh" \
    "data.groups.parallel.sources.tatoeba.path=$work/data/parallel" \
    "data.groups.instruction.sources.instructions.path=$work/data/instruction" "$@"
}

both_trainings() {
  local plain=() operation
  for operation in $("$python" -c 'from megaflow.kernels.dispatch import OPERATIONS; print(*OPERATIONS)'); do
    plain+=("kernels.$operation=reference")
  done
  train kernels || return
  train plain "${plain[@]}" || return
  "$python" benchmarks/gpu_check.py losses "$work/kernels/metrics.jsonl" "$work/plain/metrics.jsonl" "$out/train.json"
}

kernels() {
  local budget=$((in_all - ($(date +%s) - begin) - 25)) options=()
  [ "$budget" -le "$kernels_seconds" ] || budget=$kernels_seconds
  [ "$gpus" -gt 0 ] || options=(--quick)
  "$python" benchmarks/kernels.py --budget "$budget" --out "$out" --name kernels "${options[@]}"
}

export -f peers prepare build tests train both_trainings kernels
gpus=$("$python" -c 'import torch; print(torch.cuda.device_count())') || exit 2
if [ -n "${PEERS:-}" ]; then
  export PYTHONPATH=$work/site:$work/site/nvidia_cutlass_dsl/python_packages:$PYTHONPATH PEERS
fi
[ "$gpus" -gt 0 ] || export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
export out python work gpus in_all begin kernels_seconds
echo "$gpus GPUs; parts run side by side until the benchmark"
# without an installation, kernels/ must stand where it is imported from
if ! (cd / && env -u PYTHONPATH "$python" -c 'import megaflow.kernels' 2>/dev/null) && [ ! -e "$link" ]; then
  ln -sn ../kernels "$link" && linked=yes
fi

[ -z "${PEERS:-}" ] || part peers 90 bash -c peers
part build 150 bash -c build &
part prepare 120 bash -c prepare &
wait
part tests 300 bash -c tests &
part sanitize 200 "$python" benchmarks/sanitize.py --out "$work" --limit 90 &
part train 200 bash -c both_trainings &
wait
cp "$work/sanitize.json" "$out/" 2>/dev/null
for tool in memcheck racecheck; do
  [ -e "$work/sanitize-$tool.txt" ] || continue
  { echo "======== $tool" && tail -c 500000 "$work/sanitize-$tool.txt"; } >>"$out/gpu_check.log"
done
part kernels $((kernels_seconds + 60)) bash -c kernels
"$python" benchmarks/gpu_check.py report "$work/parts.tsv" "$out"
status=$?
echo "== $(($(date +%s) - begin)) s in all"
exit $status
