#!/bin/sh
# CPU workers on this machine, one task at a time each, sharing its cores and its memory evenly.
# NTKDASK_HOST, NTKDASK_SCHEDULER_FILE, NTKDASK_WORKERS, NTKDASK_CORES, NTKDASK_MEMORY; arguments go to `dask worker`.
set -eu

host=${NTKDASK_HOST:-127.0.0.1}
host=${host#*://}

# nproc would follow OMP_NUM_THREADS and overlook a container's quota
cores=${NTKDASK_CORES:-$(python3 -c "from dask.system import CPU_COUNT; print(CPU_COUNT)")}
if [ "$cores" -le 4 ]; then default=$cores; else default=$((cores / 4)); fi
workers=${NTKDASK_WORKERS:-$default}
threads=$((cores / workers))
if [ "$threads" -lt 1 ]; then threads=1; fi

export OMP_NUM_THREADS="$threads" OPENBLAS_NUM_THREADS="$threads" MKL_NUM_THREADS="$threads" NUMBA_NUM_THREADS="$threads"

# glibc keeps the memory of a batch for the next one; Dask's default gives every array back to the system
export MALLOC_TRIM_THRESHOLD_="${MALLOC_TRIM_THRESHOLD_:-268435456}" MALLOC_MMAP_THRESHOLD_="${MALLOC_MMAP_THRESHOLD_:-33554432}"

# results are receipts of a few bytes: there is nothing to spill, and a full worker is a working one
export DASK_DISTRIBUTED__WORKER__MEMORY__TARGET=False
export DASK_DISTRIBUTED__WORKER__MEMORY__SPILL=False
export DASK_DISTRIBUTED__WORKER__MEMORY__PAUSE=False

# these workers leave GPUs to cuda-worker.sh
export CUDA_VISIBLE_DEVICES=

# Dask reads a number up to 1 as a fraction of the machine's memory; its own "auto" gives each worker one core's share
memory=${NTKDASK_MEMORY:-$(LC_ALL=C awk "BEGIN { print 1 / $workers }")}

# its dashboard listens on every interface unless told
exec dask worker \
    --scheduler-file "${NTKDASK_SCHEDULER_FILE:-scheduler.json}" \
    --host "$host" \
    --dashboard-address "$host:0" \
    --nworkers "$workers" \
    --nthreads 1 \
    --memory-limit "$memory" \
    --death-timeout "${NTKDASK_DEATH_TIMEOUT:-60}" \
    "$@"
