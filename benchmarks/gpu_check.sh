#!/usr/bin/env bash
# Everything that only a GPU can show, in one command: builds csrc, runs the `gpu` tests, trains a bf16 model for 30 steps
# on every GPU, and writes OUT/gpu_check.json. Without a GPU it rehearses: the tests skip, the model trains in fp32.
#   benchmarks/gpu_check.sh OUT [python]       python: one with the package's dependencies; default .venv/bin/python
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:?folder for results}
python=${2:-.venv/bin/python}
mkdir -p "$out"
export PYTHONPATH=${PYTHONPATH:+$PYTHONPATH:}$PWD
"$python" setup.py --quiet build_ext --inplace
link=megaflow/kernels  # without an installation, kernels/ must stand where it is imported from
if ! (cd / && "$python" -c "import megaflow.kernels" 2>/dev/null); then ln -sfn ../kernels "$link"; trap 'rm -f "$link"' EXIT; fi

"$python" -m pytest -m gpu --junitxml "$out/gpu-tests.xml" | tee "$out/gpu-tests.txt"

gpus=$("$python" -c "import torch; print(torch.cuda.device_count())")
precision=$([ "$gpus" -gt 0 ] && echo bf16 || echo fp32)
for corpus in en zh parallel instruction; do
  case $corpus in
    en | zh) options=(--kind text) ;;
    parallel) options=(--kind parallel --seq-length 256) ;;
    instruction) options=(--kind instruction --seq-length 256 --loss response) ;;
  esac
  "$python" -m megaflow.tools.cli prepare "runs/demo-data/$corpus" "configs/demo/$corpus.jsonl.zst" --overwrite \
    --tokenizer configs/demo/tokenizer.model --language "$corpus" "${options[@]}"
done
rm -rf "$out/run"
"$python" -m torch.distributed.run --nproc-per-node "$((gpus > 0 ? gpus : 1))" megaflow/pretrain.py \
  --config configs/demo.yaml run_dir="$out/run" parallel.tp=1 train.precision=$precision train.steps=30 \
  train.tensorboard=false train.log_interval=10 | tee "$out/train.txt"

"$python" - "$out" <<'PY'
import json, pathlib, platform, sys, xml.etree.ElementTree as xml
import torch
out = pathlib.Path(sys.argv[1])
suite = xml.parse(out / "gpu-tests.xml").getroot().find("testsuite").attrib
records = [json.loads(line) for line in (out / "run" / "metrics.jsonl").read_text().splitlines()]
result = {
    "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    "versions": {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda},
    "tests": {key: int(suite[key]) for key in ("tests", "failures", "errors", "skipped")},
    "training": records,
}
(out / "gpu_check.json").write_text(json.dumps(result, indent=1))
print(out / "gpu_check.json", result["gpu"] or "no GPU: a rehearsal", result["tests"])
PY
