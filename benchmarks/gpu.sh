#!/usr/bin/env bash
# What a GPU must show, in steps that run one by one:
#
#   benchmarks/gpu.sh build tests sanitize profile bench_row_loss bench_corrupt ...
#
# bench_NAME measures benchmarks/bench_NAME.py, both backends and every peer that is installed, and puts its cases into
# benchmarks/results/<device>.json; a step that was cut off is simply run again. Without arguments: all of it.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
device=$($python -c 'import torch; print(torch.cuda.get_device_name().replace(" ", "-"))')
results=benchmarks/results/$device

build() { FASTDIFF_BUILD_CUDA=1 $python setup.py -q build_ext --inplace; }

tests() { $python -m pytest -q -n 8 --dist worksteal tests; }

sanitize() {
  for tool in memcheck racecheck initcheck synccheck; do
    echo "== $tool"
    compute-sanitizer --tool $tool --error-exitcode 1 $python benchmarks/each_kernel.py small | tail -3
  done
}

# What bounds each kernel: time, shares of the memory's and the multiprocessors' peaks, issue slots, registers.
profile() {
  ncu --nvtx --nvtx-include "regex:fastdiff.*/" --clock-control none --csv --print-nvtx-rename kernel --metrics \
gpu__time_duration.sum,dram__throughput.avg.pct_of_peak_sustained_elapsed,sm__throughput.avg.pct_of_peak_sustained_elapsed,\
smsp__issue_active.avg.pct_of_peak_sustained_active,sm__warps_active.avg.pct_of_peak_sustained_active,\
dram__bytes_read.sum,dram__bytes_write.sum,launch__registers_per_thread \
    $python benchmarks/each_kernel.py large > "$results.profile.csv"
}

bench() {
  $python -m pytest -q "benchmarks/bench_$1.py" --benchmark-only --json-results "$results.json"
}

benchmarks=$(basename -a -s .py benchmarks/bench_*.py)
for step in "${@:-build tests sanitize profile $benchmarks}"; do
  for name in $step; do
    echo "=== $name, $(date +%T)"
    case $name in
      bench_*) bench "${name#bench_}" ;;
      *) $name ;;
    esac
  done
done
