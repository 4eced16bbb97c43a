# The server on a Jetson with JetPack 6: TensorRT 10.3 and CUDA 12.6 are the base image's, and there is no torch.
# On the device, from the repository's root:
#   docker build -f docker/jetson.Dockerfile -t vega-edge:jetson .
#   docker run --rm --runtime nvidia --network host -v vega-edge:/data vega-edge:jetson MODEL --no-auth
# The first start builds MODEL's engines for this device (minutes), later ones find them. docs/kiosk.md tells the rest.
FROM nvcr.io/nvidia/l4t-jetpack:r36.4.0
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3-venv python3-libnvinfer \
    && rm -rf /var/lib/apt/lists/*
COPY . /src
# The system's packages are seen, because TensorRT's Python module is one of them.
RUN python3 -m venv --system-site-packages /opt/vega-edge \
    && /opt/vega-edge/bin/pip install --no-cache-dir -c /src/pins/jetson.txt --upgrade setuptools \
    && /opt/vega-edge/bin/pip install --no-cache-dir -c /src/pins/jetson.txt --no-build-isolation "/src[jetson,serve]" \
    && install -m 755 /src/docker/jetson-start.sh /usr/local/bin/jetson-start && rm -rf /src \
    && useradd --uid 1000 --create-home --groups video vega && install -d -o vega -g vega /data /data/engines
ENV PATH=/opt/vega-edge/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    ORT_DISABLE_TELEMETRY=1 \
    HF_HUB_DISABLE_TELEMETRY=1 \
    VEGA_EDGE_HOME=/data \
    VEGA_EDGE_ENGINES=/data/engines
USER 1000
WORKDIR /data
VOLUME /data
EXPOSE 8000
HEALTHCHECK --interval=30s --timeout=5s --start-period=1800s \
    CMD ["python3", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/healthz', timeout=4)"]
ENTRYPOINT ["jetson-start"]
# Refuses to start, before it builds, until it is told who may come in: --api-keys FILE, or --no-auth.
CMD ["demo-vegart"]
