# The server on NVIDIA GPUs: TensorRT-RTX engines, and onnxruntime's CUDA provider where none was built. CUDA's libraries
# come with the extras, the driver from the host (NVIDIA Container Toolkit). From the repository's root:
#   docker build -f docker/cuda.Dockerfile -t vega-edge:cuda .
#   docker run --rm --gpus all -v vega-edge:/data vega-edge:cuda build MODEL --engine tensorrt-rtx
#   docker run --rm --gpus all -p 127.0.0.1:8000:8000 -v vega-edge:/data vega-edge:cuda serve --host 0.0.0.0 --no-auth
FROM python:3.11-slim-bookworm AS build
COPY . /src
RUN python -m venv /opt/vega-edge \
    && /opt/vega-edge/bin/pip install --no-cache-dir -c /src/pins/main.txt --upgrade setuptools \
    && /opt/vega-edge/bin/pip install --no-cache-dir -c /src/pins/main.txt --no-build-isolation "/src[cuda,tensorrt-rtx,serve]"

FROM python:3.11-slim-bookworm
COPY --from=build /opt/vega-edge /opt/vega-edge
RUN useradd --uid 1000 --create-home vega && install -d -o vega -g vega /data /data/engines
ENV PATH=/opt/vega-edge/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    ORT_DISABLE_TELEMETRY=1 \
    HF_HUB_DISABLE_TELEMETRY=1 \
    VEGA_EDGE_HOME=/data \
    VEGA_EDGE_ENGINES=/data/engines \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 1000
WORKDIR /data
VOLUME /data
EXPOSE 8000
HEALTHCHECK --interval=30s --timeout=5s --start-period=120s \
    CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/healthz', timeout=4)"]
ENTRYPOINT ["vega-edge"]
# Refuses to start until it is told who may come in: --api-keys FILE, or --no-auth.
CMD ["serve", "--host", "0.0.0.0"]
