# A machine with CUDA, FFCV, DALI, DeepSpeed and Slurm's client commands, and the wheel in dist/ with what these need.
#   make image
#   docker run --gpus all --shm-size=8g -v $PWD/runs:/data/runs hpc-supcon run quickstart
# Slurm's client finds its cluster by the host's files: -v /etc/slurm:/etc/slurm -v /run/munge:/run/munge
FROM nvidia/cuda:13.0.1-cudnn-devel-ubuntu24.04

ENV DEBIAN_FRONTEND=noninteractive PIP_DISABLE_PIP_VERSION_CHECK=1 PATH=/opt/venv/bin:$PATH
# Versions cannot be pinned: a distribution's archive keeps only the newest, and the next security update is a new one.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends \
        g++ libopencv-dev libturbojpeg0-dev munge pkg-config python3-dev python3-venv slurm-client \
    && rm -rf /var/lib/apt/lists/*

COPY dist /opt/dist
# DeepSpeed and FFCV are built from source: FFCV's C library for its decoder, of DeepSpeed nothing is compiled.
RUN python3 -m venv /opt/venv \
    && DS_BUILD_OPS=0 /opt/venv/bin/pip install --no-cache-dir "$(echo /opt/dist/*.whl)[ffcv,dali,deepspeed,export,report]"

WORKDIR /data
ENTRYPOINT ["hpc-supcon"]
CMD ["doctor"]
