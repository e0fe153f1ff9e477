# ComfyUI and the worker in one image, for a GPU host with NVIDIA's container toolkit:
#
#   docker build -t comfyui-pyworker .
#   docker run --gpus all -p 8000:8000 -e AUTH_TOKEN=change-me --stop-timeout 330 \
#     -v /srv/models:/opt/ComfyUI/models comfyui-pyworker
#
# --stop-timeout: more than the worker's SHUTDOWN_GRACE, as Docker kills after 10 s by itself.
# Models are not part of the image: mount a folder laid out like ComfyUI's models/ (checkpoints/, loras/, vae/, ...).
# It is not declared as a VOLUME, which would leave an anonymous volume behind each container started without -v.
FROM pytorch/pytorch:2.8.0-cuda12.8-cudnn9-runtime AS base

# A stage of its own keeps the archive out of the image; ADD downloads it, so neither git nor curl is installed.
FROM base AS source
ARG COMFYUI_VERSION=v0.3.64
ADD https://github.com/comfyanonymous/ComfyUI/archive/refs/tags/${COMFYUI_VERSION}.tar.gz /tmp/comfyui.tar.gz
RUN mkdir /opt/ComfyUI && tar -xzf /tmp/comfyui.tar.gz --no-same-owner --strip-components=1 -C /opt/ComfyUI

FROM base
COPY --from=source /opt/ComfyUI /opt/ComfyUI

# The base image's torch packages belong together and to its CUDA: as constraints, pip cannot swap in other builds.
# ComfyUI's requirements have no upper bounds, and transformers 5 breaks text encoders of this ComfyUI.
# No system packages: PyAV brings its own FFmpeg, and nothing here uses OpenCV.
RUN python -c "from importlib.metadata import version as v; \
        print(*(f'{p}=={v(p)}' for p in ('torch', 'torchvision', 'torchaudio')), 'transformers<5', sep='\n')" \
        > /opt/constraints.txt \
    && pip install --no-cache-dir -c /opt/constraints.txt -r /opt/ComfyUI/requirements.txt \
    && pip install --no-cache-dir -c /opt/constraints.txt boto3==1.44.5 websocket-client==1.9.2

# COMFYUI_ARGS: further arguments for ComfyUI, e.g. "--lowvram --disable-all-custom-nodes". The port stays 8188.
ENV WORKER_HOST=0.0.0.0 \
    PORT=8000 \
    COMFYUI_INSTALL_PATH=/opt/ComfyUI \
    COMFYUI_ARGS="" \
    PYTHONUNBUFFERED=1
EXPOSE 8000

# The start period covers ComfyUI's imports on a cold disk. No proxies: one set for the container is not for loopback.
HEALTHCHECK --interval=30s --timeout=10s --start-period=180s --retries=3 \
    CMD ["python", "-c", "import os, urllib.request as r; \
        r.build_opener(r.ProxyHandler({})).open(f'http://127.0.0.1:{os.environ[\"PORT\"]}/health', timeout=8)"]

# Last, so that a change to the worker rebuilds nothing else.
WORKDIR /opt/pyworker
COPY pyworker.py modifiers.py ./

# The worker takes over the shell's process, PID 1, so `docker stop` reaches it and ComfyUI keeps running while it
# finishes; when it exits, the container and ComfyUI in it end. ComfyUI listens on loopback only, as it has no access
# control. No tini: the worker handles SIGTERM itself, and the loop reaps each ComfyUI, which leaves no children of its
# own behind. For custom nodes that do, there is `docker run --init`.
CMD ["sh", "-c", "while :; do \
        python \"$COMFYUI_INSTALL_PATH/main.py\" --listen 127.0.0.1 --port 8188 $COMFYUI_ARGS; \
        echo \"ComfyUI ended with status $?, starting it again\" >&2; \
        sleep 2; \
    done & \
    exec python pyworker.py"]
