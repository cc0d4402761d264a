# Doorward for the CPU, as a user without rights. Not built by the project's checks: they have no Docker daemon.
#
#   docker build --tag doorward --build-arg TORCH_INDEX=URL .
#   docker run --rm --network none --volume "$PWD:/work" doorward scan model.onnx --clean images/
#
# TORCH_INDEX is the index of CPU builds that PyTorch's installation page names; without it, Linux gets the CUDA
# build of several gigabytes.
FROM python:3.12-slim AS build
ARG TORCH_INDEX=
WORKDIR /source
COPY pyproject.toml README.md LICENSE constraints.txt ./
COPY src src
RUN python -m venv /opt/doorward \
 && /opt/doorward/bin/pip install --no-cache-dir --disable-pip-version-check \
      --constraint constraints.txt --build-constraint constraints.txt \
      ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} '.[hf,onnx]'

FROM python:3.12-slim
RUN useradd --create-home --uid 10001 doorward
COPY --from=build /opt/doorward /opt/doorward
ENV PATH=/opt/doorward/bin:$PATH \
    HF_HUB_DISABLE_TELEMETRY=1
USER doorward
WORKDIR /work
ENTRYPOINT ["doorward"]
CMD ["--help"]
