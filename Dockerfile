# For machines with NVIDIA GPUs: docker build -t hyena-dist . && docker run --gpus all -v "$PWD/data:/data" -it hyena-dist
# The base image brings CUDA, cuDNN and NCCL; PyTorch's wheel of the tested version is built for its CUDA.
FROM nvidia/cuda:13.0.1-cudnn-devel-ubuntu24.04

RUN apt-get update \
 && apt-get install --yes --no-install-recommends python3 python3-venv python3-dev git make \
 && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/hyena-dist
COPY . .
RUN make setup
ENV PATH=/opt/hyena-dist/.venv/bin:$PATH
