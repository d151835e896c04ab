#!/usr/bin/env bash
# Check the repository's plans, then serve it; arguments go to tritonserver.
set -euo pipefail

repository=${CLOSEUP_REPOSITORY:-/srv/closeup/models}
python3 -m closeup.preflight --repository "$repository"
# Fixed options: nothing is loaded or unloaded by clients, and clients hand over no shared memory.
exec tritonserver \
    --model-repository="$repository" \
    --model-control-mode=none \
    --allow-client-shm=false \
    --exit-timeout-secs="${CLOSEUP_EXIT_TIMEOUT_S:-30}" \
    --backend-config=python,shm-default-byte-size=4194304 \
    --backend-config=python,shm-growth-byte-size=4194304 \
    "$@"
