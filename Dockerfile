# For a CPU. docs/setup.md says how to build and run it.
FROM python:3.12-slim
RUN apt-get update && apt-get install -y --no-install-recommends make && rm -rf /var/lib/apt/lists/*
WORKDIR /app
ENV PATH=/app/.venv/bin:$PATH PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu
COPY Makefile requirements.txt requirements-export.txt requirements-dev.txt ./
RUN make setup
COPY . .
CMD ["make", "demo"]
