#!/usr/bin/env bash
# Write a model repository: the committed Python models, then what the export makes of the
# arguments. Run again, it does nothing that is done already.
set -euo pipefail

repository=${CLOSEUP_REPOSITORY:-/srv/closeup/models}
for model in generate generate_stream; do
    mkdir -p "$repository/$model"
    cp -R "/opt/closeup/model_repository/$model/." "$repository/$model/"
done
exec python3 -m export --repository "$repository" "$@"
