#!/usr/bin/env bash
# Everything that needs a GPU, from a bare machine with CUDA torch and no network, in two calls of less than 560 seconds:
#
#     benchmarks/gpu_check.sh build bench models        what the design takes for granted (gpu_micro.cu), then the figures
#     benchmarks/gpu_check.sh suite verify sanitize     whether it is right; with the build of the first call
#
# Parts: micro build bench models suite verify sanitize, in the order given; all of them without any. `build` begins with
# `micro`, which is compiled and run in under a minute. Each part has a limit in seconds; after a build that failed
# nothing else runs.
#
# PYTHON names the interpreter; it must have torch for CUDA, transformers, peft, pytest, pybind11, setuptools and ninja.
# pytest-xdist is used where it is; without datasets, hypothesis or rich some suites stay out (tests/conftest.py says
# which). SANITIZERS: the tools of compute-sanitizer, by default memcheck, initcheck and racecheck (which an H200's driver did not take). Results go to
# benchmarks/results/<gpu>/*.json; where OUT names a folder they and the built modules are copied there, too. The exit
# status is that of the first part that failed.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
python=${PYTHON:-python3}
all=(micro build bench models suite verify sanitize)
parts=("$@")
[ ${#parts[@]} -eq 0 ] && parts=("${all[@]}")
for part in "${parts[@]}"; do
  [[ " ${all[*]} " == *" $part "* ]] || { echo "unknown part: $part; there are ${all[*]}" >&2; exit 2; }
done
status=0
summary=()
work=$(mktemp -d)
export PYTHONUNBUFFERED=1
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} # a build that was taken along is not installed

finish() {
  printf '\n=== summary\n'
  printf '  %s\n' "${summary[@]}"
  if [ -n "${OUT:-}" ]; then
    mkdir -p "$OUT/fastreft"
    cp -r benchmarks/results "$OUT/"
    cp fastreft/*.so "$OUT/fastreft/" 2>/dev/null
    cp "$work"/*.txt "$OUT/" 2>/dev/null
  fi
  rm -rf "$work"
  exit "$status"
}

say() { # name, what became of it
  summary+=("$(printf '%-22s %s' "$1" "$2")")
}

run() { # name, seconds, command...
  local name=$1 limit=$2 start=$SECONDS
  shift 2
  echo "=== $name: $*"
  timeout -k 5 "$limit" "$@"
  local code=$?
  echo "=== $name: exit $code after $((SECONDS - start)) s"
  say "$name" "$(printf '%-8s %4d s' "$([ $code -eq 0 ] && echo ok || echo "FAILED $code")" $((SECONDS - start)))"
  [ $code -ne 0 ] && [ $status -eq 0 ] && status=$code
  return $code
}

# The toolkit: nvcc may be a script far from it, as compute-sanitizer may be in it alone.
command -v nvcc >/dev/null || PATH=$PATH:${CUDA_HOME:-/usr/local/cuda}/bin
if [ -z "${CUDA_HOME:-}" ] && command -v nvcc >/dev/null; then
  top=$(nvcc --dryrun none.cu 2>&1 | sed -n 's/^#\$ TOP=//p' | head -n 1)
  if [ -n "$top" ] && [ -x "$top/bin/nvcc" ]; then
    CUDA_HOME=$(cd "$top" && pwd -P)
    export CUDA_HOME
  fi
fi
PATH=$PATH${CUDA_HOME:+:$CUDA_HOME/bin:$CUDA_HOME/compute-sanitizer}
export PATH

"$python" - <<'PY' || exit 1
import re, sys
from importlib import metadata
from pathlib import Path

import torch

assert torch.cuda.is_available(), "no CUDA device, or a torch without CUDA"
print(torch.cuda.get_device_name(), "torch", torch.__version__, "cuda", torch.version.cuda, "python", sys.version.split()[0])
numbers = lambda version: [int(x) for x in re.findall(r"\d+", version)[:3]]
wrong = []
for name, wanted in sorted(set(re.findall(r'"(torch|transformers|peft|setuptools)>=([\d.]+)"', Path("pyproject.toml").read_text()))):
    try:
        there = metadata.version(name)
    except metadata.PackageNotFoundError:
        there = ""
    good = bool(there) and numbers(there) >= numbers(wanted)
    print(f"  {name} {there or 'is missing'}" + ("" if good else f", but {wanted} or later is needed"))
    wrong += [] if good else [name]
sys.exit(f"too old or missing: {', '.join(wrong)}" if wrong else 0)
PY
capability=$("$python" -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())') || exit 1
echo "  nvcc $(command -v nvcc || echo 'is missing'), CUDA_HOME ${CUDA_HOME:-unset}, compute capability $capability"
trap finish EXIT

micro() {
  if ! command -v nvcc >/dev/null; then
    say micro "NOT RUN: there is no nvcc here"
    return
  fi
  if [ "${capability%%.*}" -lt 9 ]; then
    say micro "NOT RUN: this device has no clusters"
    return
  fi
  # shellcheck disable=SC2016
  run micro 60 bash -o pipefail -c 'nvcc -std=c++17 -O3 -arch="sm_${1/./}" -o "$2/micro" benchmarks/gpu_micro.cu &&
    "$2/micro" | tee "$2/gpu_micro.txt"' micro "$capability" "$work"
}

sanitize() { # tool; false where the tool does not take this device
  local log=$work/sanitize_$1.txt before=$status
  # torch's caching allocator hides overruns: without it every tensor is its own allocation. Our kernels alone are
  # looked into: those of others are slow so, and not ours to judge.
  # shellcheck disable=SC2016
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 run "sanitize $1" 90 bash -o pipefail -c '"${@:2}" 2>&1 | tee "$1"' sanitize "$log" \
    compute-sanitizer --tool "$1" --kernel-name kns=fastreft --error-exitcode 9 "$python" benchmarks/gpu_verify.py --small &&
    return 0
  local refusal
  refusal=$(grep -m 1 -iE 'not supported|unsupported|Internal Sanitizer Error|before first instrumented API call' "$log")
  if [ -n "$refusal" ] && ! grep -q '^ok ' "$log"; then # not one check was made
    unset 'summary[-1]'
    say "sanitize" "NOT RUN: compute-sanitizer does not take this device: ${refusal#========= }"
    status=$before
    return 1
  fi
  return 0
}

for part in "${parts[@]}"; do
  if [[ $part =~ ^(suite|verify|sanitize|bench|models)$ ]] && ! "$python" -c 'import torch, fastreft._C' 2>"$work/import.log"; then
    say "$part" "NOT RUN: there is no build; run the part build first ($(tail -n 1 "$work/import.log"))"
    [ $status -eq 0 ] && status=1
    continue
  fi
  case $part in
    micro) [[ " ${parts[*]} " == *" build "* ]] || micro ;; # else it is the beginning of the build
    build)
      micro
      # For this GPU alone: the whole list of arches takes minutes.
      if ! TORCH_CUDA_ARCH_LIST=$capability FASTREFT_BUILD_CUDA=1 \
        run build 240 "$python" -m pip install --no-build-isolation --no-deps --no-index -q -e .; then
        say "the rest" "NOT RUN: the build failed"
        exit
      fi
      ;;
    suite)
      # The tests that a CUDA device changes: they run on every device there is (DEVICES and everything_on in
      # tests/helpers/common.py and tests/conftest.py). The rest of the suite knows CPUs alone and was run where the tree was made.
      files=(tests/ops/test_{edit,gemms,build,pooled}.py tests/optim/test_{adamw,capturable}.py tests/test_interventions.py
        tests/tuner/test_model.py tests/plan/test_generate.py tests/cuda/test_policy.py)
      workers=()
      "$python" -c 'import xdist' 2>/dev/null && workers=(-n 4)
      run suite 180 "$python" -m pytest -q -rs "${workers[@]}" "${files[@]}" \
        -k "not test_every_instruction_set and not test_a_thousand_steps"
      ;;
    verify) run verify 60 "$python" benchmarks/gpu_verify.py ;;
    sanitize)
      if ! command -v compute-sanitizer >/dev/null; then
        say sanitize "NOT RUN: there is no compute-sanitizer here"
        [ $status -eq 0 ] && status=1
        continue
      fi
      for tool in ${SANITIZERS:-memcheck initcheck racecheck}; do
        sanitize "$tool" || break
      done
      ;;
    bench) run bench 120 "$python" benchmarks/gpu_bench.py --save ;;
    models) run models 120 "$python" benchmarks/gpu_models.py --rounds 5 --save ;;
  esac
done
for part in "${all[@]}"; do
  [[ " ${parts[*]} " == *" $part "* ]] || [ "$part" = micro ] || say "$part" "not asked for"
done
