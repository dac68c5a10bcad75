#!/usr/bin/env bash
# Measure generation as the variables below say; edit them here, or set them before:
#
#     bash run_benchmark.sh --model DIR
#     INFERENCE_ENGINE="transformers-sdpa vllm vllm-module" bash run_benchmark.sh --shape 1b
#
# Arguments are passed to `chatlearn-vllm bench` and win over the variables; docs/bench.md.
set -euo pipefail
# Paths among the arguments are relative to where the script is called.
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"

# Which engines: transformers, transformers-sdpa, transformers-flash, vllm, vllm-module.
export INFERENCE_ENGINE="${INFERENCE_ENGINE:-transformers}"
# target_ar: one token per step; speculative: several, proposed and verified.
export INFERENCE_METHOD="${INFERENCE_METHOD:-target_ar}"

# vLLM. An empty value leaves the choice to the benchmark.
export VLLM_TENSOR_PARALLEL_SIZE="${VLLM_TENSOR_PARALLEL_SIZE:-1}"
export VLLM_GPU_MEMORY_UTILIZATION="${VLLM_GPU_MEMORY_UTILIZATION:-0.9}"
export VLLM_MAX_MODEL_LEN="${VLLM_MAX_MODEL_LEN:-4096}"
export VLLM_MAX_NUM_SEQS="${VLLM_MAX_NUM_SEQS:-128}"
export VLLM_MAX_NUM_BATCHED_TOKENS="${VLLM_MAX_NUM_BATCHED_TOKENS:-}"
export VLLM_DISABLE_LOG_STATS="${VLLM_DISABLE_LOG_STATS:-true}"
export VLLM_DTYPE="${VLLM_DTYPE:-half}"

# Speculative decoding inside vLLM; needs INFERENCE_METHOD=speculative, too. Empty: as that says.
export VLLM_ENABLE_SPECULATIVE="${VLLM_ENABLE_SPECULATIVE:-}"
# Tokens proposed per step; empty: GAMMA_VALUE.
export VLLM_NUM_SPECULATIVE_TOKENS="${VLLM_NUM_SPECULATIVE_TOKENS:-}"
export GAMMA_VALUE="${GAMMA_VALUE:-5}"

PYTHON="${PYTHON:-$([[ -x $here/.venv/bin/python ]] && echo "$here/.venv/bin/python" || echo python3)}"
export PYTHONPATH="$here${PYTHONPATH:+:$PYTHONPATH}"
exec "$PYTHON" -m chatlearn_vllm.cli.main bench --from-environment "$@"
