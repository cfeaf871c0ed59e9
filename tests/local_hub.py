"""A small Hub on 127.0.0.1: the endpoints for repositories, commits, LFS uploads and downloads of huggingface_hub.

Run as a program, `python local_hub.py`, it prints its address and serves until it is killed.
"""

import base64
import hashlib
import json
import re
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlparse

COMMITS = {}  # repository -> [(commit, {path: content})], oldest first
REFS = {}  # repository -> {name: commit}
BLOBS = {}  # sha256 -> content
BIG = (".safetensors", ".bin", ".png", "tokenizer.json")


def sha(content, kind="sha1"):
    return hashlib.new(kind, content).hexdigest()


class Hub(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def body(self):
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def reply(self, content=b"", status=200, headers=None):
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": len(content), **(headers or {})}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def missing(self, what):
        self.reply({"error": what}, 404, {"X-Error-Code": what})

    def files(self, repository, revision):
        """Return the commit and the files of a revision, or send an error and return None."""
        if repository not in COMMITS:
            return self.missing("RepoNotFound")
        commit = REFS[repository].get(unquote(revision), unquote(revision))
        found = dict(COMMITS[repository]).get(commit)
        if found is None:
            return self.missing("RevisionNotFound")
        return commit, found

    def do_GET(self):
        path = unquote(urlparse(self.path).path)
        if path == "/api/whoami-v2":
            return self.reply({"name": "you", "type": "user", "auth": {}, "orgs": []})
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path):
            repository, revision = match[1], match[2] or "main"
            if found := self.files(repository, revision):
                siblings = [{"rfilename": name} for name in found[1]]
                self.reply({"_id": "0", "id": repository, "sha": found[0], "siblings": siblings, "tags": []})
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)(?:/(.+))?", path):
            if found := self.files(match[1], match[2]):
                inside = {n: c for n, c in found[1].items() if not match[3] or n.startswith(match[3] + "/")}
                if match[3] and not inside:
                    return self.missing("EntryNotFound")
                self.reply([entry(name, content) for name, content in inside.items()])
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            if found := self.files(match[1], match[2]):
                if match[3] not in found[1]:
                    return self.missing("EntryNotFound")
                content = found[1][match[3]]
                self.reply(content, headers={"ETag": f'"{sha(content)}"', "X-Repo-Commit": found[0]})
        else:
            self.unknown()

    do_HEAD = do_GET

    def do_PUT(self):
        content = self.body()
        BLOBS[sha(content, "sha256")] = content
        self.reply()

    def do_POST(self):
        path, body = unquote(urlparse(self.path).path), self.body()
        address = f"http://{self.headers['Host']}"
        if path == "/api/repos/create":
            data = json.loads(body)
            name = f"{data.get('organization') or 'you'}/{data['name']}"
            if name in COMMITS:
                return self.reply({"error": "exists", "url": f"{address}/{name}"}, 409)
            first = sha(name.encode())
            COMMITS[name], REFS[name] = [(first, {})], {"main": first}
            self.reply({"url": f"{address}/{name}", "id": "0", "name": name})
        elif path == "/api/validate-yaml":
            self.reply({"errors": [], "warnings": []})
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/(.+)", path):
            self.reply(
                {
                    "files": [
                        {
                            "path": file["path"],
                            "uploadMode": "lfs" if file["path"].endswith(BIG) else "regular",
                            "shouldIgnore": False,
                        }
                        for file in json.loads(body)["files"]
                    ]
                }
            )
        elif path.endswith(".git/info/lfs/objects/batch"):
            objects = [
                {**wanted, "actions": {"upload": {"href": f"{address}/upload/{wanted['oid']}"}}}
                for wanted in json.loads(body)["objects"]
            ]
            self.reply({"transfer": "basic", "objects": objects})
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/(.+)", path):
            if found := self.files(match[1], match[2]):
                files = dict(found[1])
                for line in map(json.loads, body.splitlines()):
                    value = line["value"]
                    if line["key"] == "file":
                        files[value["path"]] = base64.b64decode(value["content"])
                    elif line["key"] == "lfsFile":
                        files[value["path"]] = BLOBS[value["oid"]]
                    elif line["key"] == "deletedFile":
                        del files[value["path"]]
                commit = sha(b"".join([found[0].encode(), *(n.encode() + c for n, c in sorted(files.items()))]))
                COMMITS[match[1]].append((commit, files))
                REFS[match[1]][match[2]] = commit
                url = f"{address}/{match[1]}/commit/{commit}"
                self.reply({"success": True, "commitUrl": url, "commitOid": commit, "hookOutput": ""})
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/paths-info/(.+)", path):
            if found := self.files(match[1], match[2]):
                paths = json.loads(body)["paths"] if body.startswith(b"{") else []
                self.reply([entry(name, found[1][name]) for name in paths if name in found[1]])
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/(tag|branch)/(.+)", path):
            name = json.loads(body)["tag"] if match[2] == "tag" else match[3]
            if name in REFS[match[1]]:
                return self.reply({"error": "exists"}, 409)
            REFS[match[1]][name] = REFS[match[1]]["main"]
            self.reply()
        else:
            self.unknown()

    def unknown(self):
        if "/models/" in self.path or self.command != "GET":  # of other things it may ask, but needs no answer
            print(f"unsupported request: {self.command} {self.path}", file=sys.stderr, flush=True)
        self.reply({"error": "not spoken here"}, 404)


def entry(name, content):
    found = {"type": "file", "path": name, "oid": sha(content), "size": len(content)}
    if name.endswith(BIG):
        found["lfs"] = {"oid": sha(content, "sha256"), "size": len(content), "pointerSize": 128}
    return found


if __name__ == "__main__":
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    print(f"http://127.0.0.1:{server.server_port}", flush=True)
    server.serve_forever()
