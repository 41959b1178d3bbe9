"""The routes of IOPaint (iopaint/api.py), so that its page and its clients work unchanged.

What they rely on: unknown, null and misspelt keys are accepted; the mask's alpha is dropped (its page sends white
strokes on transparent black) and grey over 127 is hole; the answer is the raw picture in the input's format with the
header X-Seed; failures are JSON with the keys error, detail, body and errors.
"""

from __future__ import annotations

import base64
import binascii
import io
import time
from dataclasses import replace
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import APIRouter, Body, File, Request, Response, UploadFile
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field

from ..pictures.geometry import Mask
from ..pictures.masks import MaskSettings, grown_mask, mask_from_image
from ..pictures.settings import CropSettings
from .failures import FILLING, RequestError, documented, failure_response
from .filling import Filled, Filler
from .routes import LONGEST, PICTURES, with_facts

PAINT = (255, 203, 0, 186)
"""What IOPaint's page draws masks in."""
STRATEGIES = {"original": "original", "resize": "resize", "crop": "auto"}
"""IOPaint's names; its Crop leaves small pictures whole, which is our auto."""

Base64Picture = Annotated[str, Field(description="A picture's file in base64, or as a data URI")]


class InpaintRequest(BaseModel):
    """IOPaint's request, as far as it says something to this network; its other keys are ignored."""

    model_config = ConfigDict(extra="ignore")

    image: Base64Picture
    mask: Base64Picture
    hd_strategy: Any = Field(None, description="Crop, Resize or Original; anything else: the server's")
    hd_strategy_crop_margin: Any = Field(None, description="Pixels of context around a hole, with Crop")
    hd_strategy_resize_limit: Any = Field(None, description="Side that the network sees, with Resize")
    sd_seed: Any = Field(None, description="Comes back as X-Seed; this network draws no random numbers")


class ModelInfo(BaseModel):
    """IOPaint's facts about a model."""

    name: str
    path: str
    model_type: str = "inpaint"
    is_single_file_diffusers: bool = False
    need_prompt: bool = False
    controlnets: list[str] = []
    brushnets: list[str] = []
    support_strength: bool = False
    support_outpainting: bool = False
    support_lcm_lora: bool = False
    support_controlnet: bool = False
    support_brushnet: bool = False
    support_powerpaint_v2: bool = False


class ServerConfig(BaseModel):
    """IOPaint's facts about a server: one model, nothing else."""

    plugins: list[dict[str, Any]] = []
    modelInfos: list[ModelInfo]  # noqa: N815 - IOPaint's names
    removeBGModel: str = ""  # noqa: N815
    removeBGModels: list[str] = []  # noqa: N815
    realesrganModel: str = ""  # noqa: N815
    realesrganModels: list[str] = []  # noqa: N815
    interactiveSegModel: str = ""  # noqa: N815
    interactiveSegModels: list[str] = []  # noqa: N815
    enableFileManager: bool = False  # noqa: N815
    enableAutoSaving: bool = False  # noqa: N815
    enableControlnet: bool = False  # noqa: N815
    controlnetMethod: str = ""  # noqa: N815
    disableModelSwitch: bool = True  # noqa: N815
    isDesktop: bool = False  # noqa: N815
    samplers: list[str] = []


class ModelName(BaseModel):
    """The model to switch to."""

    name: str


class GenerationInfo(BaseModel):
    """Prompts that a picture was generated with: none."""

    prompt: str = ""
    negative_prompt: str = ""


class AdjustMaskRequest(BaseModel):
    """A mask and what to do with it."""

    model_config = ConfigDict(extra="ignore")

    mask: Base64Picture
    operate: Literal["expand", "shrink", "reverse"]
    kernel_size: int | None = Field(5, ge=0, le=LONGEST, description="Pixels to expand or shrink by")


def iopaint_routes(filler: Filler, model: str) -> APIRouter:
    """Return what lies under /api/v1."""
    router = APIRouter(prefix="/api/v1", tags=["IOPaint"])
    info = ModelInfo(name=model, path=model)

    @router.post(
        "/inpaint",
        summary="Fill the holes of a picture",
        response_class=Response,
        responses=documented(
            *FILLING,
            success={
                "description": "The picture in its own format",
                "content": PICTURES,
                "headers": {"X-Seed": {"schema": {"type": "string"}}},
            },
        ),
    )
    async def inpaint(request: Request, wish: InpaintRequest) -> Response:
        started = time.perf_counter()
        settings = crop_settings(wish, filler.inpainter.settings)

        def work() -> Filled:
            image, mask = decoded(wish.image, "image"), decoded(wish.mask, "mask")
            return filler.fill(image, mask, painted_mask, settings, MaskSettings())

        filled = await filler.run(request.receive, request.state.request_id, work)
        response = Response(filled.data, media_type=filled.media_type)
        seed = whole_number(wish.sd_seed, 0, 2**63)
        response.headers["X-Seed"] = str(0 if seed is None else seed)
        return with_facts(response, filler, started)

    @router.get("/server-config", responses=documented(401))
    async def server_config() -> ServerConfig:
        return ServerConfig(modelInfos=[info])

    @router.get("/model", responses=documented(401))
    async def current_model() -> ModelInfo:
        return info

    @router.post("/model", responses=documented(400, 401, 413, 422))
    async def switch_model(wanted: ModelName) -> ModelInfo:
        if wanted.name != model:
            raise RequestError(422, f"this server has the model {model} only")
        return info

    @router.get("/inputimage", responses=documented(401), response_class=Response)
    async def input_image() -> Response:
        # IOPaint's page takes the answer for a picture only if its type says so, and an error of HTTP for its end.
        return failure_response(200, "this server was started without a picture")

    @router.post("/gen-info", responses=documented(400, 401, 413, 422))
    async def generation_info(file: Annotated[UploadFile, File()]) -> GenerationInfo:
        await file.close()
        return GenerationInfo()

    @router.post(
        "/adjust_mask",
        response_class=Response,
        responses=documented(
            400, 401, 408, 413, 415, 422, 503, 504, success={"content": {"image/png": PICTURES["image/png"]}}
        ),
    )
    async def adjust_mask(request: Request, wish: AdjustMaskRequest) -> Response:
        def adjust(image: Image.Image) -> bytes:
            return painted(adjusted(painted_mask(image), wish.operate, wish.kernel_size or 0))

        def work() -> bytes:
            return filler.with_mask(decoded(wish.mask, "mask"), adjust)

        data = await filler.run(request.receive, request.state.request_id, work)
        return Response(data, media_type="image/png")

    @router.get("/samplers", responses=documented(401))
    async def samplers() -> list[str]:
        return []

    @router.post("/save_image", status_code=400, response_class=Response, responses=documented(400, 401, 413, 422))
    async def save_image(file: Annotated[UploadFile, File()]) -> Response:
        await file.close()
        return failure_response(400, "this server saves nothing: download the picture")

    async def plugin(_wish: Annotated[Any, Body()] = None) -> Response:
        return failure_response(422, "Plugin not found: this server has none")

    for name in ("run_plugin_gen_mask", "run_plugin_gen_image", "switch_plugin_model"):
        router.add_api_route(
            f"/{name}",
            plugin,
            methods=["POST"],
            status_code=422,
            response_class=Response,
            responses=documented(400, 401, 413, 422),
        )
    return router


def decoded(text: str, what: str) -> bytes:
    """Return the bytes of a data URI or of plain base64. Raises RequestError for anything else."""
    if text.startswith("data:"):
        text = text.partition(",")[2]
    try:
        return base64.b64decode(text)
    except (binascii.Error, ValueError):
        raise RequestError(422, f"{what} is not base64: expected a picture's file in base64, or a data URI") from None


def painted_mask(image: Image.Image) -> Mask:
    """Return bool H,W, True = hole, by IOPaint's rule: alpha is dropped, grey over 127 is hole."""
    if image.has_transparency_data:
        image = image.convert("RGBA").convert("RGB")
    return mask_from_image(image, quiet=True)


def painted(mask: Mask) -> bytes:
    """Return a mask as IOPaint's page draws it: a PNG, RGBA."""
    pixels = np.zeros((*mask.shape, 4), np.uint8)
    pixels[mask] = PAINT
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def adjusted(mask: Mask, operate: str, pixels: int) -> Mask:
    """Return a mask grown or shrunk by a disc, or reversed.

    IOPaint takes OpenCV's ellipse of side 2 * pixels + 1, which is up to a pixel wider than the disc.
    """
    if operate == "reverse":
        return ~mask
    return grown_mask(mask, pixels) if operate == "expand" else ~grown_mask(~mask, pixels)


def crop_settings(wish: InpaintRequest, default: CropSettings) -> CropSettings:
    """Return the server's settings, changed as far as a client says something that makes sense."""
    strategy = STRATEGIES.get(str(wish.hd_strategy).lower())
    if strategy is None:
        return default
    settings = replace(default, strategy=strategy)
    margin = whole_number(wish.hd_strategy_crop_margin, 0, LONGEST)
    if strategy == "auto" and margin is not None:
        settings = replace(settings, margin=margin)
    limit = whole_number(wish.hd_strategy_resize_limit, 64, LONGEST // 2)
    if strategy == "resize" and limit is not None:
        settings = replace(settings, working_size=limit)
    return settings


def whole_number(value: Any, least: int, most: int) -> int | None:
    """Return a JSON value if it is a whole number within the limits."""
    fits = isinstance(value, int | float) and not isinstance(value, bool) and least <= value <= most
    return int(value) if fits else None
