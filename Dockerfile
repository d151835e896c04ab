# The server on NVIDIA's Triton image, in two stages: `serve`, and `export`, which adds what builds
# engines. Not run yet: no machine with Docker and a GPU was at hand.
#
# The one place that names NVIDIA's image. 26.07: CUDA 13.3.1. Its release notes do not state its
# TensorRT version, so the build reads it from the image's libnvinfer, installs the package of that
# very version and writes it into /opt/closeup/TENSORRT_VERSION.
ARG TRITON_IMAGE=nvcr.io/nvidia/tritonserver:26.07-py3

# hadolint ignore=DL3006
FROM ${TRITON_IMAGE} AS serve

# Further package indexes, e.g. PyTorch's for its CPU build.
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
ENV PIP_BREAK_SYSTEM_PACKAGES=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1 \
    PYTHONUNBUFFERED=1

WORKDIR /opt/closeup
COPY closeup/nvinfer.py closeup/nvinfer.py
# Only the bindings: the libraries are the image's own, the ones Triton loads. `.*` takes a package
# that was published again, e.g. 10.14.1.48.post1.
RUN python3 closeup/nvinfer.py > TENSORRT_VERSION \
    && version="$(cat TENSORRT_VERSION)" \
    && { pip install --no-deps "tensorrt-cu13==$version.*" "tensorrt-cu13-bindings==$version.*" \
    || { echo "No package index has TensorRT $version of this image: set TRITON_IMAGE to another" \
    "release, or PIP_EXTRA_INDEX_URL to an index that has it." >&2; exit 1; }; }

COPY constraints.txt pyproject.toml README.md LICENSE ./
COPY closeup closeup
COPY client client
RUN test -x /opt/nvidia/nvidia_entrypoint.sh \
    && pip install -c constraints.txt '.[plans]' ./client \
    && python3 -c "import sys, tensorrt; from closeup.nvinfer import *; sys.exit(version_problem(library_version(), tensorrt.__version__) or None)"

COPY model_repository model_repository
COPY deploy deploy
# A volume mounted here takes over this owner.
RUN mkdir -p /srv/closeup/models /srv/loras && chown -R 1000:1000 /srv/closeup /srv/loras
USER 1000:1000
ENV HOME=/tmp CLOSEUP_LORA_DIR=/srv/loras
EXPOSE 8000 8001 8002
STOPSIGNAL SIGTERM
# NVIDIA's own comes first: it sets up CUDA's forward compatibility with older drivers.
ENTRYPOINT ["/opt/nvidia/nvidia_entrypoint.sh", "/opt/closeup/deploy/serve.sh"]

FROM serve AS export
USER 0:0
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
RUN pip install -c constraints.txt '.[export]'
COPY export export
COPY demo demo
USER 1000:1000
ENTRYPOINT ["/opt/nvidia/nvidia_entrypoint.sh", "/opt/closeup/deploy/export.sh"]
