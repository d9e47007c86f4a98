# syntax=docker/dockerfile:1
# The worker's image. The CUDA libraries come as wheels with torch, so a plain Python image is enough; the host
# brings the driver. No compiler is ever in it, and no draft voice: eSpeak NG is GPL (see requirements-draft.txt).
#
#   docker build -t worker .                             without weights: the worker takes them from RunPod's
#                                                        cached-model folder, from MODEL_DIR, or from the hub
#   docker build -t worker --build-arg MODEL=turbo .     with Turbo's weights inside, and no hub at run time
#     --build-arg MODEL_REVISION=COMMIT                  which ones; the worker then takes no others
#     --secret id=hf_token,env=HF_TOKEN                  a token of the hub; it stays out of the image
#   docker build -t worker --build-arg PLATFORM=cpu --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cpu .
#
# `make image-steps` performs these very steps in a fresh environment, without a container engine.
ARG PLATFORM=cuda


FROM python:3.11-slim-bookworm AS base

# /models is a Hugging Face cache outside /runpod-volume, which a network volume would hide.
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_ROOT_USER_ACTION=ignore \
    PYTHONUNBUFFERED=1 \
    HF_HUB_CACHE=/models

WORKDIR /app


# Torch's pin alone, so that its layer, of several gigabytes, stays when any other pin moves.
FROM base AS pins
ARG PLATFORM
COPY constraints/ constraints/
RUN grep '^torch==' "constraints/${PLATFORM}.txt" > torch.txt


# The weights, of which a change of the code is no change: only what fetches them is copied. Without MODEL this says
# what there is and leaves /models empty.
FROM base AS weights
COPY constraints/ constraints/
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install --constraint constraints/common.txt huggingface_hub typer
COPY engine/__init__.py engine/errors.py engine/models.py engine/manifest.py engine/hub.py engine/checkpoint.py engine/
COPY scripts/__init__.py scripts/download_models.py scripts/
ARG MODEL=
ARG MODEL_REVISION=
RUN --mount=type=secret,id=hf_token \
    mkdir -p "$HF_HUB_CACHE" \
    && python scripts/download_models.py "${MODEL:---list}" --revision "$MODEL_REVISION"


FROM base

# Not root. Its group is root's, so that a volume's folder can be opened to it by owner (chown) or by group (chmod g+w):
# a network volume belongs to root until somebody does either. 0 builds an image that runs as root.
ARG WORKER_UID=10001
RUN useradd --uid "$WORKER_UID" --non-unique --gid 0 --create-home worker \
    && mkdir out "$HF_HUB_CACHE" \
    && chown worker:root out "$HF_HUB_CACHE"

# The base image comes without the standard library's bytecode, and the worker may not write it: without this, every
# start would compile it anew.
RUN python -m compileall -q -j 0 -x '/(site-packages|tests?|lib2to3|idlelib)/' \
    "$(python -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')"

ARG TORCH_INDEX=https://download.pytorch.org/whl/cu128
COPY --from=pins /app/torch.txt ./
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install --requirement torch.txt ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"}

ARG PLATFORM
COPY constraints/ constraints/
COPY requirements.txt requirements-upstream.txt requirements-languages.txt ./
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install --constraint "constraints/${PLATFORM}.txt" -r requirements.txt -r requirements-languages.txt \
    && pip install --constraint "constraints/${PLATFORM}.txt" --no-deps -r requirements-upstream.txt

COPY --from=weights --chown=${WORKER_UID}:0 /models/ /models/

COPY handler.py test_input.json LICENSE ./
COPY engine/ engine/
COPY jobs/ jobs/
COPY voice_library/ voice_library/
RUN python -m compileall -q engine jobs voice_library handler.py

USER ${WORKER_UID}:0
ENV HOME=/home/worker

# An image whose packages do not import together, or that could not watermark, is not worth pushing. As the worker:
# a package that wants to write beside itself fails here.
RUN python -c "from engine import upstream; upstream.chatterbox(); upstream.perth_network('model.encoder')"

# With weights inside, a missing file is an error and not a download. Where the endpoint asks for another model than
# the one inside, HF_HUB_OFFLINE=0 lets it be fetched.
ARG MODEL=
ARG MODEL_REVISION=
ENV HF_HUB_OFFLINE=${MODEL:+1} \
    MODEL_REVISION=${MODEL_REVISION} \
    MODEL=${MODEL:-turbo}

LABEL org.opencontainers.image.title="worker-chatterbox" \
      org.opencontainers.image.description="RunPod serverless worker for the Chatterbox speech models" \
      org.opencontainers.image.licenses="MIT" \
      worker-chatterbox.model="${MODEL}" \
      worker-chatterbox.model-revision="${MODEL_REVISION}"

# The platform watches the worker's own calls, so there is no HEALTHCHECK: handler.py loads the model, and only then
# asks for the first job. On this signal it takes no more jobs and finishes those it has.
STOPSIGNAL SIGTERM
CMD ["python", "handler.py"]
