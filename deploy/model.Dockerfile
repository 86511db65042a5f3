# An image with a model folder in it. The folder is the context:
#   docker build -f deploy/model.Dockerfile -t perceiver:0.2.0 models/perceiver-cifar100
# --target volume makes an image of the model alone, for the chart's model.source "ociImage".
ARG SERVICE_IMAGE=perceiver-service:local


# chmod: whatever the umask was under which the folder was written, the user who runs the service reads it.
FROM scratch AS volume
COPY --chmod=755 . /


FROM ${SERVICE_IMAGE}
ARG MODEL_NAME=perceiver-cifar100
COPY --chmod=755 . /models/${MODEL_NAME}
