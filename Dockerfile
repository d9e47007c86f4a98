# syntax=docker/dockerfile:1
# The worker's image. The CUDA libraries come as wheels with torch, so a plain Python image is enough; the host
# brings the driver. Weights are not inside: the worker finds them in RunPod's cached-model folder, on a network
# volume or under MODEL_DIR, or downloads them. No draft voice: eSpeak NG is GPL (see requirements-draft.txt).
FROM python:3.11-slim-bookworm

ENV PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_ROOT_USER_ACTION=ignore \
    PYTHONUNBUFFERED=1

WORKDIR /app

# The largest layer first, in one of its own: it changes only when torch does.
COPY constraints/ constraints/
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install --constraint constraints/cuda.txt --extra-index-url https://download.pytorch.org/whl/cu128 torch

COPY requirements.txt requirements-upstream.txt requirements-languages.txt ./
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install --constraint constraints/cuda.txt -r requirements.txt -r requirements-languages.txt \
    && pip install --constraint constraints/cuda.txt --no-deps -r requirements-upstream.txt

COPY handler.py test_input.json LICENSE ./
COPY engine/ engine/
COPY jobs/ jobs/
COPY voice_library/ voice_library/

# An image whose packages do not import together, or that could not watermark, is not worth pushing.
RUN python -m compileall -q engine jobs voice_library handler.py \
    && python -c "from engine import upstream; upstream.chatterbox(); upstream.perth_network('model.encoder')"

# Runs as root, because RunPod mounts network volumes for root.
ENV MODEL=turbo
CMD ["python", "handler.py"]
