# The HTTP server over an index: docs/server.md.
#   docker build -t metaembed .
#   docker run -p 8000:8000 -e METAEMBED_API_KEY=... -v ./my-index:/index -v ./my-model:/model:ro metaembed --model /model
FROM python:3.12-slim

# The compiled MaxSim kernel is built on the machine that runs it, for its processor.
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*

WORKDIR /src
COPY . .
RUN pip install --no-cache-dir --constraint constraints.txt torch torchvision \
    && pip install --no-cache-dir --constraint constraints.txt '.[app,qdrant,postgres]' \
    && useradd --create-home metaembed
USER metaembed
WORKDIR /home/metaembed

EXPOSE 8000
HEALTHCHECK CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/health')"]
ENTRYPOINT ["metaembed", "serve", "/index", "--host", "0.0.0.0"]
