#!/usr/bin/env bash
# Check the repository's plans, then serve it; arguments go to tritonserver.
set -euo pipefail

repository=${CLOSEUP_REPOSITORY:-/srv/closeup/models}
limit_s=${CLOSEUP_EXIT_TIMEOUT_S:-30}
export CLOSEUP_DRAIN_FILE=${CLOSEUP_DRAIN_FILE:-/tmp/closeup-draining}
rm -f "$CLOSEUP_DRAIN_FILE"

python3 -m closeup.preflight --repository "$repository"
# Fixed options: nothing is loaded or unloaded by clients, and clients hand over no shared memory.
tritonserver \
    --model-repository="$repository" \
    --model-control-mode=none \
    --allow-client-shm=false \
    --exit-timeout-secs="$limit_s" \
    --backend-config=python,shm-default-byte-size=4194304 \
    --backend-config=python,shm-growth-byte-size=4194304 \
    "$@" &
server=$!

# Triton that was told to stop refuses the calls between models: running requests end first.
stop() {
    python3 -m closeup.drain --file "$CLOSEUP_DRAIN_FILE" --limit-s "$limit_s" || true
    kill -TERM "$server" 2>/dev/null || true
}
trap stop TERM INT

status=0
wait "$server" || status=$?
# A signal ends the wait, not the server.
while kill -0 "$server" 2>/dev/null; do
    status=0
    wait "$server" || status=$?
done
exit "$status"
