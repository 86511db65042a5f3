# Training and export on the host that serves. Built from the root of the repository:
#   docker build -f docker/training.Dockerfile -t perceiver-training .
# torch brings CUDA libraries of its own, in versions that it pins: constraints-cuda.txt is for the service alone.
ARG PYTHON_IMAGE=python:3.11.15-slim-bookworm


FROM ${PYTHON_IMAGE} AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /build
RUN python -m venv --without-pip /opt/venv
COPY pyproject.toml constraints.txt docker/requirements.py ./
# onnxruntime for the CPU: the export's gate runs there, and the service tests each version again where it serves.
RUN --mount=type=cache,target=/root/.cache/pip \
    python requirements.py train cpu > requirements.txt \
    && python -m pip --python /opt/venv/bin/python install -r requirements.txt -c constraints.txt \
    && python -m pip --python /opt/venv/bin/python check


FROM ${PYTHON_IMAGE}
# torch.compile calls a C compiler for a GPU and a C++ compiler for a CPU.
# Unpinned: Debian's mirrors drop a version when they get the next, so a pin would soon break the build; the release
# is pinned with the base image.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
COPY --from=build /opt/venv /opt/venv
COPY service /app/service
COPY imaging /app/imaging
COPY export /app/export
COPY training /app/training
COPY docker/train_and_export.py /app/
# Read by the user who runs this, whatever the umask was under which the repository was cloned. And mount points, for
# whatever user: a new volume takes over their mode.
RUN chmod -R a+rX /app && mkdir -m 1777 /app/data /app/runs
# The root file system is read-only where this runs; USER, because torch asks for a name that this user id has not;
# CUDA_DEVICE_ORDER: GPUs are counted as in the service's image, so that a number there is the same one here.
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    HOME=/tmp \
    USER=perceiver \
    MPLCONFIGDIR=/tmp/matplotlib \
    TORCHINDUCTOR_CACHE_DIR=/tmp/inductor \
    TRITON_CACHE_DIR=/tmp/triton \
    CUDA_DEVICE_ORDER=PCI_BUS_ID \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
WORKDIR /app
USER 10001:10001
# SIGTERM stops the training at the next step, with a checkpoint.
STOPSIGNAL SIGTERM
ENTRYPOINT ["python", "train_and_export.py"]
ARG VERSION=unknown
ARG REVISION=unknown
# There is no git in here: checkpoints and model cards name this commit.
ENV REVISION=${REVISION}
LABEL org.opencontainers.image.title="perceiver-training" \
      org.opencontainers.image.description="Trains a Perceiver image classifier and exports it for the service" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
