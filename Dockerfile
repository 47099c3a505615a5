# A server of the tasks in a folder: see docs/deploying.md.
#   docker build -t restuning .
#   docker run --rm -p 127.0.0.1:8000:8000 -v $PWD/tasks:/tasks:ro restuning
FROM python:3.12-slim

# PyTorch for CPUs, which is a tenth of the one with CUDA; for a GPU leave this line out.
RUN pip install --no-cache-dir torch torchvision --index-url https://download.pytorch.org/whl/cpu

COPY pyproject.toml README.md LICENSE /src/
COPY src /src/src
RUN pip install --no-cache-dir "/src[serve,transformers,hub]" && rm -r /src

# Not root; weights from a hub are kept in the home, which a volume may be.
RUN useradd --create-home server
USER server
WORKDIR /home/server
EXPOSE 8000
# Python of a slim image has no curl.
HEALTHCHECK --start-period=120s CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/readyz')"]
# Inside of it all addresses; which of the machine's it answers on, `docker run -p` says.
ENTRYPOINT ["restuning", "serve", "--host", "0.0.0.0", "--port", "8000"]
CMD ["--watch", "/tasks"]
