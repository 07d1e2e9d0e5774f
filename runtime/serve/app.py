"""The application: which path is answered by what."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import HTMLResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..version import __version__
from .access import BodyLimit, HostGuard, KeyGuard, origins
from .chat import create_chat
from .chat_body import ChatBody
from .completion_body import CompletionBody
from .completions import create_completion
from .errors import ApiError, ErrorReply, respond_with_error
from .replies import CLIENT_WENT_AWAY, json_reply
from .response_body import ResponseBody
from .responses import create_response
from .route import Route
from .service import Service

MAX_BODY_BYTES = 4 << 20
PAGE = Path(__file__).with_name("page.html")
# The page loads nothing from elsewhere, and nobody shows it within another.
PAGE_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
        "connect-src 'self'; img-src data:; frame-ancestors 'none'; base-uri 'none'; "
        "form-action 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


def make_app(
    service: Service,
    *,
    api_key: str | None = None,
    allowed_origins: Sequence[str] = (),
    allowed_hosts: Sequence[str] | None = None,
    max_body_bytes: int = MAX_BODY_BYTES,
) -> ASGIApp:
    """The application. `api_key`: what callers must show; `allowed_origins`: those of pages whose
    scripts may ask from a browser; `allowed_hosts`: names by which this machine may be asked, None
    for any."""
    app = FastAPI(
        title="osscompile",
        version=__version__,
        docs_url=None,  # a page that loads scripts from elsewhere
        redoc_url=None,
        redirect_slashes=False,  # it would send clients to the host that they named
        responses={"4XX": {"model": ErrorReply}, "5XX": {"model": ErrorReply}},
    )
    app.router.route_class = Route
    _add_api(app, service)
    _add_about(app, service)
    for schema in app.openapi()["components"]["schemas"].values():
        if "model" in schema.get("properties", {}):
            schema["properties"]["model"]["enum"] = [service.name]
    for route in app.routes:  # once they are described
        if isinstance(route, Route) and route.methods == {"GET"}:
            route.methods = {"GET", "HEAD"}
    for error in (HTTPException, Exception):  # outside of routes
        app.add_exception_handler(error, respond_with_error)
    # the last one added comes first
    app.add_middleware(BodyLimit, most=max_body_bytes)
    if api_key is not None:
        app.add_middleware(KeyGuard, key=api_key)
    if allowed_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=origins(allowed_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["Retry-After"],
        )
    if allowed_hosts is not None:
        app.add_middleware(HostGuard, names=allowed_hosts)
    app.add_middleware(_CountRequests, service=service)
    return app


def _add_api(app: FastAPI, service: Service) -> None:
    @app.post("/v1/chat/completions")
    async def chat(body: ChatBody, request: Request) -> Response:
        return await create_chat(service, body, request)

    @app.post("/v1/completions")
    async def completions(body: CompletionBody, request: Request) -> Response:
        return await create_completion(service, body, request)

    @app.post("/v1/responses")
    async def responses(body: ResponseBody, request: Request) -> Response:
        return await create_response(service, body, request)

    @app.get("/v1/models")
    async def models() -> Response:
        return json_reply({"object": "list", "data": [service.model]})

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        service.check_model(name)
        return json_reply(service.model)


def _add_about(app: FastAPI, service: Service) -> None:
    page = PAGE.read_text(encoding="utf-8")

    @app.get("/", include_in_schema=False)
    async def chat_page() -> Response:
        return HTMLResponse(page, headers=PAGE_HEADERS)

    @app.get("/health")
    async def health() -> Response:
        if service.desk.gate.ending:
            raise ApiError(503, "this server is ending")
        return json_reply({"status": "ok"})

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.desk.metrics.text(), media_type="text/plain; version=0.0.4")


class _CountRequests:
    """Counts what was asked, by path and status."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app, self._metrics = app, service.desk.metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        status = CLIENT_WENT_AWAY

        async def send_on(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, send_on)
        finally:
            route: Any = scope.get("route")  # unknown paths are counted together
            self._metrics.count_request(getattr(route, "path", "other"), status)
