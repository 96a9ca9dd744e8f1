#!/bin/sh
# A Dask scheduler on this machine: loopback by default, its address in a file that workers and drivers read.
# NTKDASK_HOST, NTKDASK_PORT, NTKDASK_DASHBOARD_PORT, NTKDASK_SCHEDULER_FILE; arguments go to `dask scheduler`.
set -eu

host=${NTKDASK_HOST:-127.0.0.1}

# the dashboard has no password and no encryption: beside an encrypted scheduler it stays on this machine
case $host in
    tls://*) dashboard=127.0.0.1 ;;
    *) dashboard=${host#*://} ;;
esac

exec dask scheduler \
    --host "$host" \
    --port "${NTKDASK_PORT:-8786}" \
    --scheduler-file "${NTKDASK_SCHEDULER_FILE:-scheduler.json}" \
    --dashboard-address "$dashboard:${NTKDASK_DASHBOARD_PORT:-8787}" \
    "$@"
