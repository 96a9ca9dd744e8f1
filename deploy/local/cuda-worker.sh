#!/bin/sh
# GPU workers on this machine: one process per visible GPU, one task at a time each.
# NTKDASK_HOST, NTKDASK_SCHEDULER_FILE, NTKDASK_CORES, NTKDASK_MEMORY, CUDA_VISIBLE_DEVICES; arguments go to `dask cuda worker`.
set -eu

host=${NTKDASK_HOST:-127.0.0.1}
host=${host#*://}
cores=${NTKDASK_CORES:-$(python3 -c "from dask.system import CPU_COUNT; print(CPU_COUNT)")}
if [ -n "${CUDA_VISIBLE_DEVICES:-}" ]; then
    gpus=$(echo "$CUDA_VISIBLE_DEVICES" | tr ',' '\n' | grep -c .)
else
    gpus=$(nvidia-smi -L | grep -c '^GPU')
fi
threads=$((cores / gpus))
if [ "$threads" -lt 1 ]; then threads=1; fi

export MALLOC_TRIM_THRESHOLD_="${MALLOC_TRIM_THRESHOLD_:-268435456}" MALLOC_MMAP_THRESHOLD_="${MALLOC_MMAP_THRESHOLD_:-33554432}"
export OMP_NUM_THREADS="$threads" OPENBLAS_NUM_THREADS="$threads" MKL_NUM_THREADS="$threads" NUMBA_NUM_THREADS="$threads"
export DASK_DISTRIBUTED__WORKER__MEMORY__TARGET=False
export DASK_DISTRIBUTED__WORKER__MEMORY__SPILL=False
export DASK_DISTRIBUTED__WORKER__MEMORY__PAUSE=False

# its own dashboard listens on every interface unless told
exec dask cuda worker \
    --scheduler-file "${NTKDASK_SCHEDULER_FILE:-scheduler.json}" \
    --host "$host" \
    --nthreads 1 \
    --memory-limit "${NTKDASK_MEMORY:-auto}" \
    --dashboard-address "$host:0" \
    --death-timeout "${NTKDASK_DEATH_TIMEOUT:-60}" \
    "$@"
