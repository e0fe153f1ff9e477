# syntax=docker/dockerfile:1
# ComfyUI and the worker in one image, for a GPU host with NVIDIA's container toolkit:
#
#   docker build -t comfyui-pyworker .
#   docker run --gpus all -p 8000:8000 -e AUTH_TOKEN=change-me --stop-timeout 330 \
#     -v /srv/models:/opt/ComfyUI/models:ro comfyui-pyworker
#
# --stop-timeout: more than the worker's SHUTDOWN_GRACE, as Docker kills after 10 s by itself.
# Models are not part of the image: mount a folder laid out like ComfyUI's models/ (checkpoints/,
# loras/, vae/, ...). It is not declared as a VOLUME, which would leave an anonymous volume behind
# each container started without -v.
FROM pytorch/pytorch:2.13.0-cuda13.0-cudnn9-runtime

# This is v0.38.1. A commit's id is a checksum of all its files, which a tag is not, and GitHub
# does not promise that its archives stay the same bytes. The builder fetches it: the image needs
# no git. --build-arg COMFYUI_REF=v0.39.0 takes another release, by its tag or its commit.
ARG COMFYUI_REF=20ca544ee0436721d8eb5f544665e490609f72c8
ADD https://github.com/Comfy-Org/ComfyUI.git#${COMFYUI_REF} /opt/ComfyUI

# The base's Python is the distribution's, which refuses pip (PEP 668). Nothing else in the image
# uses it, and a virtual environment would need a package that the base lacks.
ENV PIP_BREAK_SYSTEM_PACKAGES=1

# The base's torch packages belong together and to its CUDA: as constraints, pip cannot swap in
# other builds. Which of them there are is up to the base: newer ones have no torchaudio.
# No system packages: PyAV brings its own FFmpeg, and nothing here uses OpenCV.
RUN python -m pip list --format=freeze > /opt/packages.txt \
    && grep -E '^torch(vision|audio)?==' /opt/packages.txt > /opt/constraints.txt \
    && rm /opt/packages.txt \
    && python -m pip install --no-cache-dir -c /opt/constraints.txt \
        -r /opt/ComfyUI/requirements.txt boto3==1.44.5 websocket-client==1.9.2

# The folders that ComfyUI writes into, open to whoever the container runs as: 1000 is what most
# hosts give their first user, and `docker run --user` takes another one. HOME is for the caches of
# a user who has no home.
RUN install -d -m 1777 /opt/ComfyUI/input /opt/ComfyUI/output /opt/ComfyUI/temp /opt/ComfyUI/user
USER 1000:1000

# COMFYUI_ARGS: further arguments for ComfyUI, e.g. "--reserve-vram 2". The port stays 8188.
ENV WORKER_HOST=0.0.0.0 \
    PORT=8000 \
    COMFYUI_INSTALL_PATH=/opt/ComfyUI \
    COMFYUI_ARGS="" \
    HOME=/tmp \
    PYTHONUNBUFFERED=1
EXPOSE 8000

# The start period covers ComfyUI's imports on a cold disk. No proxies: one set for the container
# is not for loopback.
HEALTHCHECK --interval=30s --timeout=10s --start-period=180s --retries=3 \
    CMD ["python", "-c", "import os, urllib.request as r; \
        url = f'http://127.0.0.1:{os.environ[\"PORT\"]}/health'; \
        r.build_opener(r.ProxyHandler({})).open(url, timeout=8)"]

WORKDIR /opt/pyworker
COPY <<"EOF" start.sh
# ComfyUI is started again whenever it ends, after 2 s. One that ends within a minute of its start,
# again and again, is waited for twice as long each time, up to a minute: what it lacks may come
# back, and GET /health says meanwhile that it is away.
#
# Each ComfyUI has a database of its own, as the usual one in its user folder can be one that it
# cannot open (of a newer ComfyUI, locked by a neighbour, in a folder mounted from elsewhere), and
# ComfyUI 0.38 ends then. It holds a catalog of the files, which each start makes anew.
#
# It listens on loopback only, as it has no access control.
pause=2
while :; do
    if folder=$(mktemp -d); then database=$folder/comfyui.db; else database=:memory:; fi
    began=$(date +%s)
    # shellcheck disable=SC2086 # COMFYUI_ARGS are several
    python "$COMFYUI_INSTALL_PATH/main.py" --listen 127.0.0.1 --port 8188 \
        --database-url "sqlite:///$database" $COMFYUI_ARGS
    status=$?
    lived=$(($(date +%s) - began))
    rm -rf "$folder"
    if [ "$lived" -ge 60 ]; then pause=2; fi
    echo "ComfyUI ended with status $status after $lived s, starting it again in $pause s" >&2
    sleep "$pause"
    pause=$((pause < 30 ? pause * 2 : 60))
done &
# The worker takes over the shell's process, PID 1, so `docker stop` reaches it and ComfyUI keeps
# running while it finishes; when it exits, the container and ComfyUI in it end. No tini: the worker
# handles SIGTERM itself, and the loop reaps each ComfyUI, which leaves no children of its own
# behind. For custom nodes that do, there is `docker run --init`.
exec python pyworker.py
EOF

# Last, so that a change to the worker rebuilds nothing else; readable whatever the umask here was.
COPY --chmod=644 pyworker.py modifiers.py ./
CMD ["sh", "start.sh"]
