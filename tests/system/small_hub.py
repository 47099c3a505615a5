"""A model hub on loopback: as much of the Hugging Face hub's protocol as a push and a load speak."""

import base64
import hashlib
import json
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.parse import unquote, urlsplit


class Answers(BaseHTTPRequestHandler):
    """Repositories are dicts of path to bytes; every commit's name is the hash of what it holds."""

    def log_message(self, *_):
        pass

    def _send(self, status, content=b"", **headers):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _commit(self, repository):
        whole = hashlib.sha1()
        for path, content in sorted(self.server.repositories[repository].items()):
            whole.update(path.encode() + content)
        return whole.hexdigest()

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()
        path = urlsplit(self.path).path.strip("/")
        if not self.headers.get("Authorization"):
            self._send(401, {"error": "not logged in"})
        elif path == "api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            self.server.repositories.setdefault(name, {})
            # Older clients say "private", newer ones "visibility".
            visibility = asked.get("visibility") == "private"
            self.server.private[name] = bool(asked.get("private")) or visibility
            self._send(200, {"url": f"{self.server.url}/{name}", "name": name})
        elif path == "api/validate-yaml":
            self._send(200, {"errors": [], "warnings": []})
        elif "/preupload/" in path:
            files = json.loads(body)["files"]
            self._send(
                200,
                {
                    "files": [
                        {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                        for f in files
                    ]
                },
            )
        elif "/commit/" in path:
            repository = "/".join(path.split("/")[2:4])
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    content = base64.b64decode(line["value"]["content"])
                    self.server.repositories[repository][line["value"]["path"]] = content
            commit = self._commit(repository)
            url = f"{self.server.url}/{repository}/commit/{commit}"
            self._send(200, {"commitUrl": url, "commitOid": commit})
        else:
            self._send(404, {"error": path})

    def do_GET(self):
        parts = unquote(urlsplit(self.path).path.strip("/")).split("/")
        repository = "/".join(parts[2:4] if parts[:2] == ["api", "models"] else parts[:2])
        files = self.server.repositories.get(repository)
        if files is None:
            self._send(404, {"error": "not found"}, X_Error_Code="RepoNotFound")
        elif parts[0] == "api" and "tree" in parts:
            self._send(
                200,
                [
                    {"type": "file", "path": p, "size": len(c), "oid": hashlib.sha1(c).hexdigest()}
                    for p, c in files.items()
                ],
            )
        elif parts[0] == "api":
            self._send(
                200,
                {
                    "id": repository,
                    "sha": self._commit(repository),
                    "private": False,
                    "siblings": [{"rfilename": p} for p in files],
                    "tags": [],
                    "downloads": 0,
                },
            )
        elif (name := "/".join(parts[4:])) in files:
            self._send(
                200,
                files[name],
                ETag=f'"{hashlib.sha1(files[name]).hexdigest()}"',
                X_Repo_Commit=self._commit(repository),
            )
        else:
            self._send(404, {"error": "no such file"}, X_Error_Code="EntryNotFound")

    do_HEAD = do_GET


@contextmanager
def small_hub():
    """A running hub: `.url`, and `.repositories` as it holds them."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    server.url = f"http://127.0.0.1:{server.server_address[1]}"
    server.repositories, server.private = {}, {}
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
