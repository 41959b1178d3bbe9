"""misf-serve: an Inpainter behind HTTP.

serve_cli.py        the command: options, socket, worker processes, signals
settings.py         every option of a server, as one value that worker processes can be given
app.py              the parts put together as one ASGI application; the page; OpenAPI
routes.py           the plain routes: /inpaint, /healthz, /readyz, /metrics
iopaint.py          the routes of IOPaint, for its clients and its page
filling.py          one request: decoded within limits, filled, encoded, by its deadline or not at all
micro_batching.py   a backend that runs calls of equal shape together
guard.py            what is refused before a route sees it: host, token, size, a slow body
observing.py        request ids, security headers, the access log, metrics
failures.py         what an error is to a client: status, one JSON line
protocol.py         uvicorn's HTTP protocol with a time limit on headers
page/               the page that is served at /
deploy/             container images, compose file, systemd unit
"""
