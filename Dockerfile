# A server with sglang-vtensor, for NVIDIA GPUs:
#
#   docker build -t sglang-vtensor .
#   docker run --gpus all --ipc host -p 127.0.0.1:30000:30000 sglang-vtensor --model-path MODEL
#
# The first start compiles kernels for the GPU. To have that done before, and kept, on a machine with that GPU:
#
#   VOLUMES="-v vtensor-triton:/root/.triton -v vtensor-cache:/root/.cache"
#   docker run --gpus all --ipc host $VOLUMES --entrypoint sglang-vtensor sglang-vtensor compile --model MODEL
#
# Servers with these volumes find the kernels there: docker run --gpus all --ipc host $VOLUMES ...
#
# The devel image has the compilers that SGLang and Triton call at run time.
FROM nvidia/cuda:13.0.1-devel-ubuntu24.04

RUN apt-get update && apt-get install -y --no-install-recommends python3 python3-dev python3-venv libnuma1 \
    && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/vtensor
ENV VIRTUAL_ENV=/opt/vtensor PATH=/opt/vtensor/bin:$PATH
WORKDIR /opt/sglang-vtensor

# The locked packages change less often than the code.
COPY requirements-0.5.23.lock .
RUN pip install --no-cache-dir uv && uv pip install --no-cache -r requirements-0.5.23.lock
COPY pyproject.toml README.md LICENSE ./
COPY sglang_vtensor sglang_vtensor
COPY kernels kernels
COPY patches patches
RUN uv pip install --no-cache --no-deps .

EXPOSE 30000
# Without --model-path it says that one is needed.
ENTRYPOINT ["sglang", "serve", "--host", "0.0.0.0", "--port", "30000", "--kv-backend", "vtensor", "--sleep-on-idle"]
