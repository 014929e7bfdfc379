"""A stand-in for the Hugging Face hub on the loopback: what downloading files asks."""

import hashlib
import http.server
import re
import threading
import urllib.parse


class Hub:
    """Repositories of files, served until `close`.

    Attributes:
      files: {(repository, revision): {file name: content}}; a revision is a commit or a
        branch.
      commits: {(repository, branch): commit}.
      requests: (method, path) of every request.
      cut: files whose content breaks off halfway.
      gated: repositories that are given to nobody.
    """

    def __init__(self):
        self.files, self.commits, self.requests = {}, {}, []
        self.cut, self.gated = set(), set()
        self._server = http.server.ThreadingHTTPServer(
            ("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self})
        )
        serve = self._server.serve_forever
        threading.Thread(target=serve, args=(0.01,), daemon=True).start()

    def add(self, repository, files, branch="main"):
        """Adds files as a commit, which the branch then points to; returns it."""
        digest = hashlib.sha1(
            repr((repository, branch, sorted(files.items()))).encode()
        )
        commit = digest.hexdigest()
        self.files[repository, commit] = self.files[repository, branch] = dict(files)
        self.commits[repository, commit] = self.commits[repository, branch] = commit
        return commit

    @property
    def url(self):
        return f"http://127.0.0.1:{self._server.server_port}"

    def close(self):
        self._server.shutdown()
        self._server.server_close()


class _Handler(http.server.BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self._answer(False)

    def do_GET(self):
        self._answer(True)

    def _answer(self, body):
        self.hub.requests.append((self.command, self.path))
        found = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self.path)
        if not found:
            return self._error(404, "")
        repository, revision, name = map(urllib.parse.unquote, found.groups())
        if repository in self.hub.gated:
            return self._error(403, "GatedRepo")
        if all(known != repository for known, _ in self.hub.files):
            return self._error(404, "RepoNotFound")
        if (repository, revision) not in self.hub.files:
            return self._error(404, "RevisionNotFound")
        commit = self.hub.commits[repository, revision]
        content = self.hub.files[repository, revision].get(name)
        if content is None:
            return self._error(404, "EntryNotFound", commit)
        self.send_response(200)
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", commit)
        self.send_header("X-Linked-Size", str(len(content)))
        if name in self.hub.cut:
            content = content[: len(content) // 2]
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            self.wfile.write(content)

    def _error(self, status, code, commit=""):
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        if commit:
            self.send_header("X-Repo-Commit", commit)
        self.send_header("Content-Length", "0")
        self.end_headers()
