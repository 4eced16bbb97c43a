# The server on any CPU, with the embedded model inside. From the repository's root:
#   docker build -f docker/cpu.Dockerfile -t vega-edge:cpu .
#   docker run --rm -p 127.0.0.1:8000:8000 -v vega-edge:/data vega-edge:cpu serve --host 0.0.0.0 --no-auth
FROM python:3.11-slim-bookworm AS build
COPY . /src
RUN python -m venv /opt/vega-edge \
    && /opt/vega-edge/bin/pip install --no-cache-dir -c /src/pins/main.txt --upgrade setuptools \
    && /opt/vega-edge/bin/pip install --no-cache-dir -c /src/pins/main.txt --no-build-isolation "/src[cpu,openvino,serve]"

FROM python:3.11-slim-bookworm
COPY --from=build /opt/vega-edge /opt/vega-edge
RUN useradd --uid 1000 --create-home vega && install -d -o vega -g vega /data
ENV PATH=/opt/vega-edge/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    ORT_DISABLE_TELEMETRY=1 \
    HF_HUB_DISABLE_TELEMETRY=1 \
    VEGA_EDGE_HOME=/data
USER 1000
WORKDIR /data
# Bundles, engines and what engines compile; a volume of yours keeps them.
VOLUME /data
EXPOSE 8000
HEALTHCHECK --interval=30s --timeout=5s --start-period=60s \
    CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/healthz', timeout=4)"]
ENTRYPOINT ["vega-edge"]
# Refuses to start until it is told who may come in: --api-keys FILE, or --no-auth.
CMD ["serve", "--host", "0.0.0.0"]
