"""A stand-in for the Hugging Face hub on this machine."""

import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar
from urllib.parse import unquote, urlparse

COMMIT = "c" * 40


class Hub(BaseHTTPRequestHandler):
    """As much of the hub's interface as downloads and uploads need."""

    files: ClassVar[dict] = {}
    uploaded: ClassVar[dict] = {}
    asked: ClassVar[list] = []
    refusal: ClassVar[tuple] = ()  # status and reason with which the making of one is refused

    def log_message(self, *arguments):
        pass

    def reply(self, status, body=b"", headers=None, kind="application/json"):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for key, value in (
            {"Content-Length": len(body), "Content-Type": kind} | (headers or {})
        ).items():
            self.send_header(key, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, name):
        token = self.headers.get("Authorization")
        if name == "org/gated" and token != "Bearer good":
            return (
                self.reply(
                    403 if token else 401,
                    {"error": "gated"},
                    {"X-Error-Code": "GatedRepo", "X-Error-Message": "gated"},
                )
                or True
            )
        if name not in ("org/model", "org/gated", "org/torch", "org/shards"):
            return (
                self.reply(
                    401,
                    {"error": "none"},
                    {"X-Error-Code": "RepoNotFound", "X-Error-Message": "none"},
                )
                or True
            )
        return False

    def do_GET(self):
        path = unquote(urlparse(self.path).path)
        self.asked.append((self.command, path))
        parts = path.strip("/").split("/")
        name = "/".join(parts[2:4] if parts[0] == "api" else parts[:2])
        if self.refuse(name):
            return None
        revision = (
            parts[5]
            if parts[0] == "api" and len(parts) > 5
            else (parts[3] if "resolve" in parts else "main")
        )
        if revision not in ("main", "v2", COMMIT):
            return self.reply(
                404, {"error": "x"}, {"X-Error-Code": "RevisionNotFound", "X-Error-Message": "x"}
            )
        files = self.files[name]
        if parts[0] == "api":
            entries = [
                {"type": "file", "path": file, "rfilename": file, "size": len(body), "oid": "0"}
                for file, body in files.items()
            ]
            if "tree" in parts:
                return self.reply(200, entries)
            return self.reply(
                200,
                {"id": name, "sha": COMMIT, "siblings": entries, "private": False, "gated": False},
            )
        file = "/".join(parts[4:])
        if file not in files:
            return self.reply(404, {}, {"X-Error-Code": "EntryNotFound", "X-Error-Message": "none"})
        etag = hashlib.sha1(files[file]).hexdigest()
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        return self.reply(200, files[file], headers, "application/octet-stream")

    do_HEAD = do_GET

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = urlparse(self.path).path
        if self.headers.get("Authorization") != "Bearer good":
            return self.reply(403, {"error": "no"}, {"X-Error-Message": "no"})
        if path.endswith("/repos/create") and self.refusal:
            status, reason = self.refusal
            return self.reply(status, {"error": reason})
        if path.endswith("/repos/create"):
            return self.reply(
                200, {"url": "https://huggingface.co/org/mine", "name": "org/mine", "id": "0"}
            )
        if "/preupload/" in path:
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            return self.reply(200, {"files": files})
        if "/commit/" in path:
            for line in body.decode().splitlines():
                if (item := json.loads(line))["key"] == "file":
                    self.uploaded[item["value"]["path"]] = item["value"]["content"]
            return self.reply(
                200,
                {
                    "commitUrl": f"https://huggingface.co/org/mine/commit/{COMMIT}",
                    "commitOid": COMMIT,
                    "hookOutput": "",
                },
            )
        return self.reply(200, {})


@contextmanager
def serve(handler):
    """Answer requests by `handler` in a thread; gives the server's address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
