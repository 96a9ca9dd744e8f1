#!/bin/sh
# A Dask scheduler on this machine: loopback by default, its address in a file that workers and drivers read.
# NTKDASK_HOST, NTKDASK_PORT, NTKDASK_DASHBOARD_PORT, NTKDASK_SCHEDULER_FILE; arguments go to `dask scheduler`.
set -eu

host=${NTKDASK_HOST:-127.0.0.1}

exec dask scheduler \
    --host "$host" \
    --port "${NTKDASK_PORT:-8786}" \
    --scheduler-file "${NTKDASK_SCHEDULER_FILE:-scheduler.json}" \
    --dashboard-address "$host:${NTKDASK_DASHBOARD_PORT:-8787}" \
    "$@"
