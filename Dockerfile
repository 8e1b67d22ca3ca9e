# Three images: `docker build --target cpu|gpu|export --tag engineshed:TARGET .`; see docs/deployment.md. Needs BuildKit.
ARG PYTHON=3.11

FROM python:${PYTHON}-slim AS build
# Another package index, or one more. They stay in the build stages, whose history is no part of the images.
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
ENV PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/engineshed
ENV PATH=/opt/engineshed/bin:$PATH
WORKDIR /src
COPY . .

FROM build AS build-cpu
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install --constraint constraints.txt .

FROM build AS build-gpu
# More extras than cuda, with commas: `tensorrt` or `tensorrt-rtx`.
ARG EXTRAS=
# The distributions onnxruntime and onnxruntime-gpu hold the same files: without the second installation, half of them are gone.
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install --constraint constraints.txt ".[cuda${EXTRAS:+,$EXTRAS}]" \
    && pip uninstall --yes onnxruntime \
    && pip install --constraint constraints.txt --force-reinstall --no-deps onnxruntime-gpu

FROM build AS build-export
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install --constraint constraints.txt ".[export]"

FROM python:${PYTHON}-slim AS base
# The user who owns the engines on the host, where they are a bind mount that export writes to.
ARG UID=10001
RUN useradd --no-log-init --uid "$UID" --create-home engineshed \
    && install --directory --owner engineshed /engines /home/engineshed/.cache
ENV PATH=/opt/engineshed/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
USER engineshed
WORKDIR /home/engineshed
VOLUME ["/engines"]

FROM base AS export
COPY --from=build-export /opt/engineshed /opt/engineshed
COPY engines engines
COPY tests/data tests/data
ENTRYPOINT ["engineshed", "export", "--engines", "/engines"]

FROM base AS serving
EXPOSE 8000
# A proxy in the environment is not asked for an address of this machine.
HEALTHCHECK --interval=5s --timeout=3s --start-period=5m --retries=3 CMD ["python", "-c", "from urllib.request import ProxyHandler, build_opener; build_opener(ProxyHandler({})).open('http://127.0.0.1:8000/readyz', timeout=2)"]
ENTRYPOINT ["engineshed"]
CMD ["serve", "--host", "0.0.0.0", "--engines", "/engines"]

FROM serving AS gpu
COPY --from=build-gpu /opt/engineshed /opt/engineshed
# `utility` brings NVML, by which GPUs are found.
ENV NVIDIA_DRIVER_CAPABILITIES=compute,utility
CMD ["serve", "--host", "0.0.0.0", "--engines", "/engines", "--device", "cuda:0"]

FROM serving AS cpu
COPY --from=build-cpu /opt/engineshed /opt/engineshed
