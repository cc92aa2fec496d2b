"""A server of chat completions in a thread, whose answers are a function of the messages."""

import contextlib
import http.server
import json
import re
import threading
import time


class Served:
    """What a server was asked: `requests` are (path, headers, body); `most`, how many at a time."""

    def __init__(self, url):
        self.url = url
        self.requests = []
        self.most = 0


@contextlib.contextmanager
def served(answer, delay=0.0):
    """Serves `answer(messages)`: a text, or (status, body, headers), or an exception to hang up with."""
    lock, under_way = threading.Lock(), [0]

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                seen.requests.append((self.path, dict(self.headers), body))
                under_way[0] += 1
                seen.most = max(seen.most, under_way[0])
            if delay:
                time.sleep(delay)
            said = answer(body["messages"])
            with lock:
                under_way[0] -= 1
            if isinstance(said, Exception):
                self.close_connection = True
                return
            status, text, headers = said if isinstance(said, tuple) else (200, said, {})
            if status == 200 and isinstance(text, str):
                choice = {
                    "message": {"role": "assistant", "content": text},
                    "finish_reason": "stop",
                }
                text = {"choices": [choice]}
            data = text if isinstance(text, bytes) else json.dumps(text).encode()
            self.send_response(status)
            for name, value in {"Content-Length": str(len(data)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            with contextlib.suppress(OSError):
                self.wfile.write(data)

        def log_message(self, *arguments):
            pass

    class Server(http.server.ThreadingHTTPServer):
        request_queue_size = 64

    server = Server(("127.0.0.1", 0), Handler)
    seen = Served(f"http://127.0.0.1:{server.server_port}/v1")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield seen
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def answers_of(messages):
    """The two answers that a judge is shown."""
    return re.findall(r"<answer of [AB]>\n(.*?)\n</answer", messages[-1]["content"], re.DOTALL)


def prefers_longer(messages):
    """A judge of two answers."""
    a, b = map(len, answers_of(messages))
    verdict = "C" if a == b else "A" if a > b else "B"
    return f"One might say [[C]] at first, but no.\n[[{verdict}]]"
