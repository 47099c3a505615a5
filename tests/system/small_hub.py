"""A model hub on loopback: as much of the Hugging Face hub's protocol as tasks speak.

Repositories have commits, branches, tags and large files; tokens read or write, of a user or of nobody.
"""

import base64
import hashlib
import json
import re
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event, Lock, Thread
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

WRITES, READS, STRANGER = "hf_writes", "hf_reads", "hf_of_another_user"
TOKENS = {
    WRITES: ("someone", True),
    READS: ("someone", False),
    STRANGER: ("another", True),
}
"""Whose each is, and whether it may write."""

LARGE = (".safetensors", ".png")


def name_content(path, content):
    """The digest by which the client sees that a file has not changed."""
    if path.endswith(LARGE):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def tags_of_base(said):
    """What the hub makes of a card's base models."""
    bases = said.get("base_model", [])
    bases = [bases] if isinstance(bases, str) else bases
    relation = said.get("base_model_relation", "finetune")
    return [f"base_model:{more}{base}" for base in bases for more in ("", f"{relation}:")]


@dataclass
class Repository:
    """Commits by name, the newest of each branch, and what each commit was made on."""

    owner: str
    private: bool = False
    gated: bool = False
    commits: dict = field(default_factory=dict)
    branches: dict = field(default_factory=dict)
    when: float = field(default_factory=time.time)

    def find(self, revision):
        """A commit by branch, tag or name; None for none."""
        return self.branches.get(revision) or (revision if revision in self.commits else None)

    def files(self, revision="main"):
        return self.commits[self.find(revision)]

    def commit(self, files, branch="main"):
        whole = hashlib.sha1(self.branches.get(branch, "").encode())
        for path, content in sorted(files.items()):
            whole.update(path.encode() + content)
        self.commits[whole.hexdigest()] = files
        self.branches[branch] = whole.hexdigest()
        self.when = time.time()
        return whole.hexdigest()


class Answers(BaseHTTPRequestHandler):
    """Errors carry the codes and headers that the hub's clients tell apart."""

    protocol_version = "HTTP/1.1"

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

    def _refuse(self, status, words, code=None):
        headers = {"X_Error_Message": words, **({"X_Error_Code": code} if code else {})}
        self._send(status, {"error": words}, **headers)

    def _who(self):
        """The user and whether writing is allowed; None for a token that nobody has."""
        given = self.headers.get("Authorization", "").removeprefix("Bearer ").strip()
        return TOKENS.get(given) if given else ("", False)

    def _open(self, name, writing=False):
        """The repository, or None after a refusal."""
        who = self._who()
        if who is None:
            self._refuse(401, "Invalid credentials in Authorization header")
            return None
        user, writes = who
        there = self.server.repositories.get(name)
        if there is None or (there.private and there.owner != user):
            # Nothing tells strangers what is there.
            self._refuse(404 if user else 401, "Repository not found", "RepoNotFound")
        elif writing and not (writes and there.owner == user):
            self._refuse(403, "Forbidden: you may not write here")
        elif there.gated and there.owner != user:
            self._refuse(403, "Access to this model is restricted", "GatedRepo")
        else:
            return there
        return None

    def do_PUT(self):
        self.server.asked.append(("PUT", self.path))
        content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.uploading.set()
        if self.server.hold is not None:
            self.server.hold.wait(30)
        self.server.large[self.path.rpartition("/")[2]] = content
        self._send(200)

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()
        path = urlsplit(self.path).path.strip("/")
        self.server.asked.append(("POST", path))
        parts = [unquote(p) for p in path.split("/")]
        if path == "api/validate-yaml":
            self._validate(json.loads(body)["content"])
        elif path == "api/repos/create":
            self._create(json.loads(body))
        elif path.endswith("info/lfs/objects/batch"):
            self._tell_uploads(json.loads(body))
        elif (there := self._open("/".join(parts[2:4]), writing=True)) is None:
            pass
        elif parts[4] == "branch":
            if parts[5] in there.branches:
                self._refuse(409, "Reference already exists")
            else:
                there.branches[parts[5]] = there.find(
                    json.loads(body or "{}").get("startingPoint", "main")
                )
                self._send(200, {})
        elif parts[4] == "preupload":
            before = there.files(parts[5])
            modes = [
                {
                    "path": path,
                    "uploadMode": "lfs" if path.endswith(LARGE) else "regular",
                    "shouldIgnore": False,
                    "oid": name_content(path, before[path]) if path in before else None,
                }
                for path in (f["path"] for f in json.loads(body)["files"])
            ]
            self._send(200, {"files": modes})
        elif parts[4] == "commit":
            self._commit("/".join(parts[2:4]), there, parts[5], map(json.loads, body.splitlines()))
        else:
            self._refuse(404, path)

    def _validate(self, content):
        """As the hub does: a head of YAML, and figures in their form."""
        found = re.match(r"---\n(.*?)\n---\n", content, re.S)
        head = yaml.safe_load(found[1]) if found else {}
        wrong = [] if isinstance(head, dict) else ["no keys"]
        for result in [r for m in (head or {}).get("model-index", []) for r in m["results"]]:
            if not result["metrics"] or not {"type", "name"} <= result["dataset"].keys():
                wrong.append("model-index")
        if head.get("license") not in (None, "apache-2.0", "mit", "other"):
            wrong.append('"license" must be one of ...')
        errors = [{"message": each} for each in wrong]
        self._send(400 if wrong else 200, {"errors": errors, "warnings": []})

    def _create(self, asked):
        who = self._who()
        if who is None or not who[0]:
            self._refuse(401, "Invalid username or password.")
            return
        name = f"{asked.get('organization') or who[0]}/{asked['name']}"
        if name in self.server.repositories:
            self._send(409, {"error": "exists", "url": f"{self.server.url}/{name}"})
        elif not who[1] or not name.startswith(f"{who[0]}/"):
            self._refuse(403, "Forbidden: you may not make this repository")
        else:
            # Older clients say "private", newer ones "visibility".
            private = bool(asked.get("private")) or asked.get("visibility") == "private"
            made = self.server.repositories[name] = Repository(who[0], private)
            made.commit({".gitattributes": b"*.safetensors filter=lfs\n"})
            self._send(200, {"url": f"{self.server.url}/{name}", "name": name})

    def _tell_uploads(self, asked):
        objects = [
            {
                **each,
                "actions": {
                    "upload": {"href": f"{self.server.url}/large/{each['oid']}", "header": {}}
                },
            }
            for each in asked["objects"]
        ]
        self._send(200, {"transfer": "basic", "objects": objects})

    def _commit(self, name, there, branch, lines):
        with self.server.lock:
            if branch not in there.branches:
                self._refuse(404, "no such branch", "RevisionNotFound")
                return
            files = dict(there.files(branch))
            for line in lines:
                value = line["value"]
                if line["key"] == "header" and value.get("parentCommit") not in (
                    None,
                    there.branches[branch],
                ):
                    self._refuse(412, "A commit has happened since. Please refresh and try again.")
                    return
                if line["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    files[value["path"]] = self.server.large[value["oid"]]
                elif line["key"] == "deletedFile":
                    del files[value["path"]]
            commit = there.commit(files, branch)
        self._send(
            200, {"commitUrl": f"{self.server.url}/{name}/commit/{commit}", "commitOid": commit}
        )

    def do_GET(self):
        address = urlsplit(self.path)
        parts = [unquote(p) for p in address.path.strip("/").split("/")]
        self.server.asked.append((self.command, unquote(address.path)))
        if self.server.failing:
            self._refuse(self.server.failing, "the hub is being mended")
        elif address.path == "/api/models":
            self._list(parse_qs(address.query))
        elif parts[:2] == ["api", "models"]:
            self._tell("/".join(parts[2:4]), parts[4:])
        elif parts[2:3] == ["resolve"]:
            self._give("/".join(parts[:2]), parts[3], "/".join(parts[4:]))
        else:
            self._refuse(404, address.path)

    do_HEAD = do_GET

    def _list(self, asked):
        user, _ = self._who() or ("", False)
        found = []
        newest = sorted(self.server.repositories.items(), key=lambda each: -each[1].when)
        for name, there in newest:
            card = there.files().get("README.md", b"").decode()
            head = re.match(r"---\n(.*?)\n---\n", card, re.S)
            said = yaml.safe_load(head[1]) if head else {}
            tags = [*said.get("tags", []), said.get("library_name")]
            wanted = (
                all(each in tags for each in asked.get("filter", []))
                and asked.get("author", [there.owner]) == [there.owner]
                and asked.get("search", [""])[0] in name
                and not (there.private and there.owner != user)
            )
            if wanted:
                found.append(
                    {
                        "id": name,
                        "sha": there.branches["main"],
                        "private": there.private,
                        "tags": tags + tags_of_base(said),
                        "usedStorage": sum(map(len, there.files().values())),
                        "model-index": said.get("model-index"),
                    }
                )
        self._send(200, found[: int(asked.get("limit", ["1000"])[0])])

    def _tell(self, name, more):
        if (there := self._open(name)) is None:
            return
        commit = there.find(more[1] if more[:1] == ["revision"] else "main")
        if commit is None:
            self._refuse(404, "Invalid rev id", "RevisionNotFound")
            return
        told = [
            {"rfilename": p, "size": self.server.sizes.get(p, len(c))}
            for p, c in there.files(commit).items()
        ]
        self._send(
            200, {"id": name, "sha": commit, "private": there.private, "siblings": told, "tags": []}
        )

    def _give(self, name, revision, path):
        if (there := self._open(name)) is None:
            return
        commit = there.find(revision)
        if commit is None:
            self._refuse(404, "Invalid rev id", "RevisionNotFound")
        elif path not in there.files(commit):
            self._refuse(404, "Entry not found", "EntryNotFound")
        else:
            content = there.files(commit)[path]
            tag = hashlib.sha256(content).hexdigest()
            self._send(200, content, ETag=f'"{tag}"', X_Repo_Commit=commit)


@contextmanager
def small_hub():
    """A running hub.

    `.url`, `.repositories` by name, `.asked` (methods and paths), `.sizes` that are told of files in place of the
    true ones, `.failing` (a status for every question), `.hold` (an event that uploads wait for), `.uploading`.
    """
    server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    server.url = f"http://127.0.0.1:{server.server_address[1]}"
    server.repositories, server.large, server.asked, server.sizes = {}, {}, [], {}
    server.failing, server.hold, server.uploading, server.lock = 0, None, Event(), Lock()
    server.daemon_threads = True
    Thread(target=server.serve_forever, daemon=True, kwargs={"poll_interval": 0.02}).start()
    try:
        yield server
    finally:
        if server.hold is not None:
            server.hold.set()
        server.shutdown()
        server.server_close()


@contextmanager
def at_hub(monkeypatch, cache, token=WRITES):
    """A small hub that the client of this process speaks to, with a cache and a login of its own."""
    from huggingface_hub import constants

    from restuning.runtime import hub

    with small_hub() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        # The client reads both when it is imported.
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(cache / "token"))
        monkeypatch.setattr(hub, "_asked", {})
        log_in(monkeypatch, token)
        yield server


def log_in(monkeypatch, token):
    """The token that the client sends; "" for none."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
