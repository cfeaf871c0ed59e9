"""A server that speaks Qdrant's REST: it records requests, checks them with the client's models, answers in memory."""

import http.server
import json
import threading
from urllib.parse import unquote

from qdrant_client import QdrantClient, models


class Server:
    """Listens on a port of this machine. `fail` holds the status codes of the next answers to writes."""

    def __init__(self):
        self.memory, self.requests, self.fail, self.lock = QdrantClient(":memory:"), [], [], threading.Lock()
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def handle_any(self):
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                path = unquote(self.path.partition("?")[0])
                with outer.lock:
                    status, result = outer.answer(self.command, path, json.loads(body) if body else None)
                text = json.dumps({"result": result, "status": "ok", "time": 0.0}).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            do_GET = do_PUT = do_POST = do_DELETE = handle_any

            def log_message(self, *arguments):
                pass

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def answer(self, method, path, body):
        self.requests.append((method, path, body))
        _, _, name, *rest = path.split("/")
        rest, memory = "/".join(rest), self.memory
        if method == "PUT" and rest == "points" and self.fail:
            return self.fail.pop(0), None
        if rest == "exists":
            return 200, {"exists": memory.collection_exists(name)}
        if rest == "" and method == "PUT":
            made = models.CreateCollection.model_validate(body)
            return 200, memory.create_collection(name, vectors_config=made.vectors)
        if rest == "":
            return 200, {**_plain(memory.get_collection(name)), "segments_count": 1}
        if rest == "index":
            models.CreateFieldIndex.model_validate(body)
            return 200, {"operation_id": 0, "status": "completed"}
        if rest == "points" and method == "PUT":
            return 200, _plain(memory.upsert(name, models.PointsList.model_validate(body).points))
        if rest == "points":
            asked = models.PointRequest.model_validate(body)
            found = memory.retrieve(name, asked.ids, with_payload=asked.with_payload, with_vectors=asked.with_vector)
            return 200, [_plain(record) for record in found]
        if rest == "points/delete":
            return 200, _plain(memory.delete(name, models.FilterSelector.model_validate(body)))
        if rest == "points/count":
            asked = models.CountRequest.model_validate(body)
            return 200, _plain(memory.count(name, asked.filter, exact=asked.exact))
        if rest == "points/query/batch":
            asked = models.QueryRequestBatch.model_validate(body)
            return 200, [_plain(answer) for answer in memory.query_batch_points(name, asked.searches)]
        raise AssertionError(f"unexpected request {method} {path}")

    def close(self):
        self.http.shutdown()
        self.http.server_close()


def _plain(model):
    return json.loads(model.model_dump_json(exclude_none=True))
