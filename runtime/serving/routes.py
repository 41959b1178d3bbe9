"""The plain routes: pictures in and out as files, health, metrics."""

from __future__ import annotations

import base64
import time
from dataclasses import replace
from typing import Annotated, Literal

from fastapi import APIRouter, File, Query, Request, Response, UploadFile
from pydantic import BaseModel, Field

from ..pictures.masks import THRESHOLD, MaskSettings
from ..pictures.settings import STRATEGIES
from .failures import FILLING, RequestError, documented
from .filling import MEDIA_TYPES, Filled, Filler

LONGEST = 4096
"""Most pixels that a client can ask a mask to grow by, or a crop's margin to be."""
Strategy = Literal["auto", "crop", "resize", "original"]
assert set(STRATEGIES) == set(Strategy.__args__)  # type: ignore[attr-defined]


class FilledPicture(BaseModel):
    """A finished picture as JSON, for clients that ask for it by `Accept: application/json`."""

    image: str = Field(description="The picture's file in base64")
    media_type: str
    width: int
    height: int
    strategy: Strategy
    crops: int = Field(description="How often the model ran")
    hole_pixels: int
    model_seconds: float


class Health(BaseModel):
    """Whether the server lives, or is ready for a request."""

    status: str


class Ready(Health):
    """What runs."""

    model: str
    backend: str
    device: str
    precision: str


PICTURES = {media_type: {"schema": {"type": "string", "format": "binary"}} for media_type in MEDIA_TYPES.values()}


def plain_routes(filler: Filler, model: str) -> APIRouter:
    """Return /inpaint, /healthz, /readyz and /metrics."""
    router = APIRouter()
    backend = filler.backend

    @router.post(
        "/inpaint",
        summary="Fill the holes of a picture",
        response_model=FilledPicture,
        responses=documented(
            *FILLING,
            success={"description": "The picture in its own format, or JSON if that is accepted.", "content": PICTURES},
        ),
    )
    async def inpaint(
        request: Request,
        image: Annotated[UploadFile, File(description="PNG, JPEG, WebP, TIFF, BMP, GIF or AVIF")],
        mask: Annotated[UploadFile, File(description="White is hole; of the size at which the picture is displayed")],
        strategy: Annotated[Strategy | None, Query(description="What the network sees; default: the server's")] = None,
        margin: Annotated[int | None, Query(ge=0, le=LONGEST, description="Pixels of context around a hole")] = None,
        grow: Annotated[int, Query(ge=0, le=LONGEST, description="Pixels by which the hole grows")] = 0,
        feather: Annotated[int, Query(ge=0, le=LONGEST, description="Pixels over which the fill blends in")] = 0,
        threshold: Annotated[int, Query(ge=0, le=254, description="Mask values above this are holes")] = THRESHOLD,
        invert: Annotated[bool, Query(description="Black is hole")] = False,
        from_alpha: Annotated[bool, Query(description="Holes are transparent instead of white")] = False,
        values: Annotated[list[int] | None, Query(description="Palette indices or grey values that are holes")] = None,
        resize: Annotated[bool, Query(description="Take a mask of another size")] = False,
    ) -> Response:
        started = time.perf_counter()
        image_data, mask_data = await image.read(), await mask.read()
        await image.close()  # or it would be in memory twice until the answer
        await mask.close()
        masks = MaskSettings(threshold, invert, from_alpha, tuple(values) if values else None, resize, grow, feather)
        settings = filler.inpainter.settings
        settings = replace(
            settings, strategy=strategy or settings.strategy, margin=settings.margin if margin is None else margin
        )

        def work() -> Filled:
            return filler.fill(image_data, mask_data, lambda mask: masks.hole(mask, quiet=True), settings, masks)

        filled = await filler.run(request.receive, request.state.request_id, work)
        if wants_json(request.headers.get("accept", "")):
            response: Response = Response(as_json(filled).model_dump_json(), media_type="application/json")
        else:
            response = Response(filled.data, media_type=filled.media_type)
        return with_facts(response, filler, started)

    @router.get("/healthz", summary="Whether the server lives, with its model", responses=documented(503))
    async def healthz() -> Health:
        if not backend.alive:
            raise RequestError(503, "the model does not run: start this server again")
        return Health(status="ok")

    @router.get("/readyz", summary="Whether a request would be taken", responses=documented(503))
    async def readyz() -> Ready:
        if not filler.ready:
            raise RequestError(503, "the queue is full" if backend.alive else "the model does not run", 1)
        return Ready(
            status="ready", model=model, backend=backend.name, device=backend.device, precision=backend.precision
        )

    @router.get(
        "/metrics",
        summary="Numbers for Prometheus",
        response_class=Response,
        responses=documented(401, success={"content": {"text/plain": {"schema": {"type": "string"}}}}),
    )
    async def metrics() -> Response:
        return Response(filler.metrics.text(), media_type="text/plain; version=0.0.4")

    return router


def wants_json(accept: str) -> bool:
    """Return whether an Accept header names JSON and no kind of picture."""
    return "application/json" in accept.lower() and "image/" not in accept.lower()


def as_json(filled: Filled) -> FilledPicture:
    """Return a finished picture as JSON."""
    report = filled.report
    return FilledPicture(
        image=base64.b64encode(filled.data).decode(),
        media_type=filled.media_type,
        width=filled.width,
        height=filled.height,
        strategy=report.strategy,  # type: ignore[arg-type] # one of STRATEGIES
        crops=report.crops,
        hole_pixels=report.hole_pixels,
        model_seconds=round(report.model_seconds, 4),
    )


def with_facts(response: Response, filler: Filler, started: float) -> Response:
    """Return the response with headers that say how long it took and in which precision the model ran."""
    response.headers["X-Process-Time"] = f"{time.perf_counter() - started:.4f}"
    response.headers["X-Precision"] = filler.backend.precision
    response.headers["Cache-Control"] = "no-store"
    return response
