# The service, on NVIDIA GPUs or (--build-arg RUNTIME=cpu) on CPUs. Built from the root of the repository:
#   docker build -f docker/service.Dockerfile -t perceiver-service .
# CUDA and cuDNN come from their PyPI wheels; the driver's own libraries are mounted in by the NVIDIA container toolkit.
ARG PYTHON_IMAGE=python:3.11.15-slim-bookworm


# The CUDA libraries: nearly four fifths of the image, and a layer of its own that only constraints-cuda.txt changes.
FROM ${PYTHON_IMAGE} AS cuda
ARG RUNTIME=gpu
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /build
# Without pip: nothing in the last stage can install.
RUN python -m venv --without-pip /opt/venv
COPY constraints-cuda.txt ./
# They lie apart, and a link stands where onnxruntime looks for them: in its own site-packages, below nvidia/.
RUN --mount=type=cache,target=/root/.cache/pip \
    packages="$(/opt/venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" \
    && mkdir -p /opt/cuda/nvidia \
    && ln -s /opt/cuda/nvidia "$packages/nvidia" \
    && if [ "$RUNTIME" = gpu ]; then \
         python -m pip --python /opt/venv/bin/python install --no-deps -r constraints-cuda.txt; \
       fi


# All other packages; pip finds the CUDA libraries installed.
FROM cuda AS build
ARG RUNTIME=gpu
COPY pyproject.toml constraints.txt docker/requirements.py ./
RUN --mount=type=cache,target=/root/.cache/pip \
    python requirements.py "$RUNTIME" > requirements.txt \
    && python -m pip --python /opt/venv/bin/python install \
         -r requirements.txt -c constraints.txt -c constraints-cuda.txt \
    && python -m pip --python /opt/venv/bin/python check
COPY service /app/service
COPY imaging /app/imaging
COPY docker/healthcheck.py /app/
# Whatever the umask was under which the repository was cloned, the user who runs this reads it.
RUN python -m compileall -q /app && chmod -R a+rX /app


FROM ${PYTHON_IMAGE}
# From the layer that changes least to the one that changes most.
COPY --from=cuda /opt/cuda /opt/cuda
COPY --from=build /opt/venv /opt/venv
COPY --from=build /app /app
# HOME and CUDA's cache of compiled kernels: the root file system is read-only where this runs, /tmp is not.
# CUDA_DEVICE_ORDER: by itself CUDA counts the fastest GPU first, and not as Docker, nvidia-smi and the metrics do.
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    HOME=/tmp \
    CUDA_CACHE_PATH=/tmp/cuda-cache \
    CUDA_DEVICE_ORDER=PCI_BUS_ID \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    PERCEIVER_HOST=0.0.0.0 \
    PERCEIVER_PORT=8000 \
    PERCEIVER_MODEL_DIR=/models/perceiver-cifar100 \
    PERCEIVER_LOG_FORMAT=json
WORKDIR /app
USER 10001:10001
EXPOSE 8000
# SIGTERM starts the drain (PERCEIVER_DRAIN_TIMEOUT_S, 30 s): give the container longer than that to stop.
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=5s --timeout=5s --start-period=180s --retries=3 \
    CMD ["python", "-IS", "/app/healthcheck.py"]
ENTRYPOINT ["python", "-m", "service"]
ARG VERSION=unknown
ARG REVISION=unknown
LABEL org.opencontainers.image.title="perceiver-service" \
      org.opencontainers.image.description="Serves a Perceiver image classifier over HTTP" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
