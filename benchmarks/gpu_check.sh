#!/usr/bin/env bash
# Everything that needs a GPU, from a bare machine with CUDA torch and no network, in under 9 minutes.
#
#     benchmarks/gpu_check.sh [part ...]      parts: build suite verify sanitize bench; all of them by default
#
# PYTHON names the interpreter; it must have torch for CUDA, transformers, peft, pytest, pybind11, setuptools and ninja.
# pytest-xdist is used where it is; without datasets, hypothesis or rich some suites stay out (tests/conftest.py says
# which). Each part has a limit in seconds, 520 in all. Results go to benchmarks/results/<gpu>/*.json; the exit status is
# that of the first part that failed, after all parts have run.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
parts=("$@")
[ ${#parts[@]} -eq 0 ] && parts=(build suite verify sanitize bench)
status=0
summary=()
export PYTHONUNBUFFERED=1

run() { # name, seconds, command...
  local name=$1 limit=$2 start=$SECONDS
  shift 2
  echo "=== $name: $*"
  timeout -k 5 "$limit" "$@"
  local code=$?
  echo "=== $name: exit $code after $((SECONDS - start)) s"
  summary+=("$(printf '%-22s %-8s %4d s' "$name" "$([ $code -eq 0 ] && echo ok || echo "FAILED $code")" $((SECONDS - start)))")
  [ $code -ne 0 ] && [ $status -eq 0 ] && status=$code
  return 0
}

"$python" - <<'PY' || exit 1
import torch
assert torch.cuda.is_available(), "no CUDA device, or a torch without CUDA"
print(torch.cuda.get_device_name(), "torch", torch.__version__, "cuda", torch.version.cuda)
PY

for part in "${parts[@]}"; do
  case $part in
    build)
      # For this GPU alone: the whole list of arches takes minutes.
      TORCH_CUDA_ARCH_LIST=$("$python" -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())') \
        FASTREFT_BUILD_CUDA=1 MAX_JOBS=${MAX_JOBS:-16} \
        run build 120 "$python" -m pip install --no-build-isolation --no-deps --no-index -q -e .
      ;;
    suite)
      # The tests that a CUDA device changes: they run on every device there is (DEVICES and everything_on in
      # tests/helpers/common.py and tests/conftest.py). The rest of the suite knows CPUs alone and was run where the tree was made.
      files=(tests/ops/test_{edit,gemms,build}.py tests/optim/test_{adamw,capturable}.py tests/test_interventions.py
        tests/tuner/test_model.py tests/plan/test_generate.py tests/cuda/test_policy.py)
      workers=$("$python" -c 'import xdist' 2>/dev/null && echo "-n 4")
      # shellcheck disable=SC2086
      run suite 115 "$python" -m pytest -q -rs $workers "${files[@]}" \
        -k "not test_every_instruction_set and not test_a_thousand_steps" ;;
    verify) run verify 45 "$python" benchmarks/gpu_verify.py ;;
    sanitize)
      if ! command -v compute-sanitizer >/dev/null; then
        summary+=("sanitize               NOT RUN: there is no compute-sanitizer here")
        [ $status -eq 0 ] && status=1
        continue
      fi
      for tool in memcheck racecheck synccheck initcheck; do
        # torch's caching allocator hides overruns: without it every tensor is its own allocation.
        PYTORCH_NO_CUDA_MEMORY_CACHING=1 run "sanitize $tool" 36 \
          compute-sanitizer --tool "$tool" --error-exitcode 9 "$python" benchmarks/gpu_verify.py --small
      done
      ;;
    bench) run bench 95 "$python" benchmarks/gpu_bench.py --save ;;
    *) echo "unknown part: $part" >&2; exit 2 ;;
  esac
done
for part in build suite verify sanitize bench; do
  [[ " ${parts[*]} " == *" $part "* ]] || summary+=("$(printf '%-22s not asked for' "$part")")
done
printf '\n=== summary\n'
printf '  %s\n' "${summary[@]}"
exit $status
