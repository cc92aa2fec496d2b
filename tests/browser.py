"""A folder of files in headless Chromium: what its pages send back, with and without the server."""

import contextlib
import functools
import http.server
import json
import queue
import shutil
import subprocess
import threading

CHROMIUM = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)


class Site:
    """Serves a folder, or `only` some paths in it; pages send it JSON by POST."""

    def __init__(self, folder):
        site = self
        self.sent, self.only = queue.Queue(), None

        class Handler(http.server.SimpleHTTPRequestHandler):
            def do_GET(self):
                if site.only is not None and self.path not in site.only:
                    self.send_error(503)
                else:
                    super().do_GET()

            def do_POST(self):
                site.sent.put(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                self.send_response(204)
                self.end_headers()

            def log_message(self, *_):
                pass

        handler = functools.partial(Handler, directory=folder)
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.address = f"http://127.0.0.1:{self.server.server_port}"


@contextlib.contextmanager
def served(folder):
    """A `Site`."""
    site = Site(folder)
    threading.Thread(target=site.server.serve_forever, daemon=True).start()
    yield site
    site.server.shutdown()
    site.server.server_close()


@contextlib.contextmanager
def opened(site, page, profile):
    """Chromium at a page, with what it keeps in a folder `profile`."""
    # Without its sandbox, which does not start for root in a container.
    command = [
        CHROMIUM,
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
    ]
    command += [f"--user-data-dir={profile}", f"{site.address}/{page}"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield process
    finally:
        process.terminate()
        process.wait()
