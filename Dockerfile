# A machine with all optional parts: CUDA, FFCV, DALI, DeepSpeed and Slurm's client commands.
#   docker build -t hpc-supcon .
#   docker run --gpus all --shm-size=8g -v $PWD/runs:/data/runs hpc-supcon run quickstart
# Slurm's client finds its cluster by the host's files: -v /etc/slurm:/etc/slurm -v /run/munge:/run/munge
FROM nvidia/cuda:13.0.1-cudnn-devel-ubuntu24.04

ENV DEBIAN_FRONTEND=noninteractive PIP_DISABLE_PIP_VERSION_CHECK=1 PATH=/opt/venv/bin:$PATH
RUN apt-get update \
    && apt-get install -y --no-install-recommends \
        g++ git libopencv-dev libturbojpeg0-dev munge pkg-config python3-dev python3-venv slurm-client \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/hpc_supcon
COPY setup.cfg pyproject.toml README.md LICENSE ./
COPY hpc_supcon hpc_supcon
RUN python3 -m venv /opt/venv \
    && /opt/venv/bin/pip install --no-cache-dir wheel \
    && /opt/venv/bin/pip install --no-cache-dir '.[ffcv,dali,deepspeed,export]'

WORKDIR /data
ENTRYPOINT ["hpc-supcon"]
CMD ["doctor"]
