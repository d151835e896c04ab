# The embedded server for machines without a GPU: a slim image, and `export`, which adds what
# writes the graphs. The server runs its Python stub from the temporary folder: `docker run
# --read-only` goes with `--tmpfs /tmp:exec,mode=1777`. Not run yet: no machine with Docker was at hand.
ARG PYTHON_IMAGE=python:3.11-slim-bookworm

# hadolint ignore=DL3006
FROM ${PYTHON_IMAGE} AS serve

ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1 \
    PYTHONUNBUFFERED=1

WORKDIR /opt/closeup
COPY constraints.txt pyproject.toml README.md LICENSE ./
COPY closeup closeup
COPY client client
# Editable: the embedded server finds its backends beside the package.
RUN pip install -c constraints.txt -e '.[embedded]' ./client
COPY backends backends
COPY model_repository model_repository
COPY deploy deploy
RUN mkdir -p /srv/closeup/models /srv/loras && chown -R 1000:1000 /srv/closeup /srv/loras
USER 1000:1000
ENV HOME=/tmp
EXPOSE 8000 8001 8002
STOPSIGNAL SIGTERM
ENTRYPOINT ["python3", "-m", "closeup.server", "--repository", "/srv/closeup/models", \
            "--lora-dir", "/srv/loras", "--host", "0.0.0.0"]

FROM serve AS export
USER 0:0
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
RUN pip install -c constraints.txt -e '.[embedded,export]'
COPY export export
COPY demo demo
USER 1000:1000
ENTRYPOINT ["deploy/export.sh"]
