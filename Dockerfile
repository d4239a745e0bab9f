# docker build -t vitkd .                                     torch as pip finds it: on Linux, with CUDA
# docker build -t vitkd --build-arg TORCH_INDEX=ADDRESS .     torch from the address that the selector on
#                                                             pytorch.org shows for CPU, or for another CUDA
# docker run --rm --gpus all --shm-size 8g -v ~/photos:/photos:ro -v "$PWD/runs:/home/vitkd/runs" vitkd \
#     distill --teacher deit3_small --student deit_tiny --pretrained --data /photos ...
FROM python:3.12-slim

ARG TORCH_INDEX=""
COPY . /src
RUN if [ -n "$TORCH_INDEX" ]; then \
        pip install --no-cache-dir --index-url "$TORCH_INDEX" torch torchvision; \
    fi \
    && pip install --no-cache-dir "/src[onnx,parquet]"

# A run needs no rights beyond its folders.
RUN useradd --create-home vitkd
USER vitkd
WORKDIR /home/vitkd
ENTRYPOINT ["vitkd"]
CMD ["--help"]
