#!/usr/bin/env bash
# What a GPU must show, in steps that can run one by one: build, tests, sanitize, bench. Results go to benchmarks/results.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
device=$($python -c 'import torch; print(torch.cuda.get_device_name().replace(" ", "-"))')

build() { $python setup.py -q build_ext --inplace; }

tests() { $python -m pytest -q tests; }

sanitize() {
  local small="agrees_with_the_reference or statistics or masks_of_rows or evaluation or laws or nonzero"
  for tool in memcheck racecheck initcheck; do
    compute-sanitizer --tool $tool --error-exitcode 1 $python -m pytest -q tests/kernels -k "$small"
  done
}

bench() { $python -m pytest benchmarks --benchmark-only --json-results "benchmarks/results/$device.json"; }

for step in "${@:-build tests sanitize bench}"; do
  for name in $step; do $name; done
done
