# One image for everything: seed, nodes, gateway, status page, operator.
#
#   docker build --tag sovereign-swarm:local .                                        # CPU
#   docker build --tag sovereign-swarm:cuda --build-arg DEVICE=cuda .
#
# pip takes torch from wherever it is told to. For DEVICE=cpu give it a source of CPU builds by
# --build-arg PIP_EXTRA_INDEX_URL=... or PIP_FIND_LINKS=...: the default builds bring CUDA along.

FROM python:3.11-slim-bookworm AS build
ARG DEVICE=cpu
ARG PIP_EXTRA_INDEX_URL=
ARG PIP_FIND_LINKS=
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore
RUN python -m venv /opt/swarm
WORKDIR /source
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY protocol protocol
COPY swarm swarm
COPY node node
COPY client client
RUN extras=demo; if [ "$DEVICE" = cuda ]; then extras=demo,cuda; fi \
    && /opt/swarm/bin/pip install --constraint constraints.txt ".[$extras]"
# The wrong torch is found out here, and not by a donor.
RUN /opt/swarm/bin/python -c "import sys, torch; \
cuda = torch.version.cuda is not None; wanted = '$DEVICE' == 'cuda'; \
sys.exit(0 if cuda == wanted else f'this torch is for {\"CUDA\" if cuda else \"CPUs\"}, and DEVICE=$DEVICE')"

FROM python:3.11-slim-bookworm
LABEL org.opencontainers.image.title="Sovereign Swarm" \
      org.opencontainers.image.licenses="Apache-2.0"
# The folders carry their owner over to volumes that are mounted there.
RUN useradd --uid 10001 --user-group --home-dir /data --shell /usr/sbin/nologin swarm \
    && install --directory --owner=swarm --group=swarm --mode=0700 /data \
    && install --directory --owner=swarm --group=swarm --mode=0755 /models /meeting
COPY --from=build /opt/swarm /opt/swarm
COPY scripts/prepare_demo_model.py /opt/swarm/share/scripts/prepare_demo_model.py
ENV PATH=/opt/swarm/bin:$PATH \
    PYTHONPATH=/opt/swarm/share \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    OMP_WAIT_POLICY=passive \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER swarm
WORKDIR /data
VOLUME ["/data"]
CMD ["swarm-node", "--help"]
