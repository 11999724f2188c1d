"""moto's S3 server that turns two of three requests about objects away, as a store does that is asked too much.

python -m tests.training.throttled_s3 PORT
"""

import itertools
import sys

from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
from werkzeug.serving import run_simple

REFUSALS = (
    ("503 Slow Down", b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"),
    ("429 Too Many Requests", b"<Error><Code>TooManyRequests</Code><Message>Too many requests.</Message></Error>"),
)


class Throttled:
    def __init__(self, served):
        self.served, self.number = served, itertools.count()

    def __call__(self, environ, start_response):
        turn = next(self.number) % 3 if environ["PATH_INFO"].count("/") > 1 else 2
        if turn == 2:
            return self.served(environ, start_response)
        environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        status, body = REFUSALS[turn]
        start_response(status, [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))])
        return [body]


if __name__ == "__main__":
    served = Throttled(DomainDispatcherApplication(create_backend_app))
    run_simple("127.0.0.1", int(sys.argv[1]), served, threaded=True, request_handler=MotoRequestHandler)
