"""An `Explanation` as a folder: a page to look at, its pictures as PNG, and the numbers as JSON. No scripts."""

from __future__ import annotations

import functools
import html
import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ...plugins.shared.errors import MisfError
from ...plugins.shared.files import folder_written_whole
from ...runtime.pictures.geometry import Mask
from .explain import Array, Explanation, FeatureFilter, PictureFilter, Point, steps

Rgb = NDArray[np.uint8]

PAGE, NUMBERS = "index.html", "numbers.json"
TOOL = "misf-explain"
HEAT = ("#0b1026", "#3b2f7f", "#8c2f80", "#d94f5c", "#f9a242", "#fcf6b8")  # from little to much
DIVERGING = ("#1f5fbf", "#7fb0e6", "#e9e9e6", "#eda27f", "#b4321f")  # from less to more
OUTLINE = (255, 47, 99)


def check_folder(folder: Path) -> None:
    """Raise MisfError if a folder holds anything but an earlier result of misf-explain, OSError if it is no folder."""
    if folder.exists() and not folder.is_dir():
        raise OSError(f"cannot write {folder}: it is not a folder")
    found = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    try:
        numbers = json.loads((folder / NUMBERS).read_text(encoding="utf-8"))
        own = set(numbers["files"]) if numbers["tool"] == TOOL else set()
    except (OSError, ValueError, TypeError, KeyError):
        own = set()
    if others := sorted(found - own):
        raise MisfError(
            f"{folder} is not empty and holds {others[0]}, which is not {TOOL}'s: "
            "name a new folder, or one with an earlier result"
        )


def write_page(folder: Path, found: Explanation, points: list[Point], about: dict[str, Any]) -> dict[str, Any]:
    """Write the page, its pictures and its numbers, all or nothing, and return the numbers.

    Args:
        folder: created, or replaced where it holds an earlier result; see `check_folder`.
        found: what to show.
        points: where to show the picture's filter.
        about: more for the numbers: "image", "model" and "picture" {"width", "height"} are shown on the page.

    """
    check_folder(folder)
    with folder_written_whole(folder) as temporary:
        draw = _Drawing(temporary, found.hole)
        sections = [_pictures(draw, found), _parts(draw, found)]
        if found.feature_filter is not None:
            sections.append(_feature_filter(draw, found, found.feature_filter))
        if found.picture_filter is not None:
            sections.append(_picture_filter(draw, found, found.picture_filter, points))
        numbers = {
            "tool": TOOL,
            **about,
            **numbers_of(found, points),
            "files": sorted([PAGE, NUMBERS, *draw.names]),
        }
        (temporary / NUMBERS).write_text(json.dumps(numbers, indent=2) + "\n", encoding="utf-8")
        (temporary / PAGE).write_text(_page(found, about, sections), encoding="utf-8")
    return numbers


def numbers_of(found: Explanation, points: list[Point]) -> dict[str, Any]:
    """Return the numbers of an explanation, ready for JSON; changes are in steps of 8 bits, lengths in pixels."""
    numbers: dict[str, Any] = {
        "size": {"width": found.hole.shape[1], "height": found.hole.shape[0]},
        "hole_pixels": int(found.hole.sum()),
        "known_mean": [round(255 * float(value), 3) for value in found.known_mean],
        "parts": [{"part": part.name, **steps(part.change, found.hole)} for part in found.parts],
        "feature_filter": None,
        "picture_filter": None,
    }
    if (features := found.feature_filter) is not None:
        numbers["feature_filter"] = {
            "energy": features.means,
            "change_of_the_prediction": steps(features.left_out, found.hole),
        }
    if (taps := found.picture_filter) is not None:
        numbers["picture_filter"] = {
            "pixels_per_tap": taps.factor,
            "points": [_at(taps, point) for point in points],
        }
    return numbers


def _at(taps: PictureFilter, point: Point) -> dict[str, Any]:
    """Return what the picture's filter is at a point."""
    cell = taps.cell(point.x, point.y)
    offset = taps.offset[cell]
    return {
        "x": point.x,
        "y": point.y,
        "why": point.why,
        "from_x": float(offset[0]),
        "from_y": float(offset[1]),
        "spread": float(taps.spread[cell]),
        "taps": taps.taps[cell].tolist(),
    }


class _Drawing:
    """Writes pictures into a folder and returns the lines of HTML that show them."""

    def __init__(self, folder: Path, hole: Mask) -> None:
        self._folder, self._size = folder, hole.shape
        inner = np.pad(hole, 1, mode="edge")
        inner = inner[:-2, 1:-1] & inner[2:, 1:-1] & inner[1:-1, :-2] & inner[1:-1, 2:]
        self._edge = hole & ~inner
        self.names: list[str] = []

    def figure(
        self, name: str, rgb: Rgb, caption: str, outline: bool = True, over: str = "", legend: str = "", factor: int = 1
    ) -> str:
        """Write a picture h,w,3, enlarged by a factor to the whole picture's size, and return its figure.

        over: SVG to lay over it, in pixels of the picture. legend: HTML below the caption.
        """
        height, width = self._size
        rgb = np.repeat(np.repeat(rgb, factor, 0), factor, 1)[:height, :width].copy()
        if outline:
            rgb[self._edge] = OUTLINE
        Image.fromarray(rgb).save(self._folder / f"{name}.png")
        self.names.append(f"{name}.png")
        svg = f'<svg viewBox="0 0 {width} {height}" aria-hidden="true">{over}</svg>' if over else ""
        text = html.escape(caption)
        image = f'<img src="{name}.png" width="{width}" height="{height}" alt="{text}">'
        return (
            f'<figure><a class="stack" href="{name}.png">{image}{svg}</a>'
            f"<figcaption>{text}{legend}</figcaption></figure>"
        )


def _pictures(draw: _Drawing, found: Explanation) -> str:
    damaged = _bytes(np.where(found.hole[..., None], 0.5, found.image))
    figures = [
        draw.figure("input", damaged, "What the network sees; the hole is outlined"),
        draw.figure("filled", _bytes(_finished(found, found.prediction)), "The hole filled", outline=False),
        draw.figure("prediction", _bytes(found.prediction), "The whole prediction, of which only the hole is used"),
    ]
    return _section("The picture", "", figures)


def _parts(draw: _Drawing, found: Explanation) -> str:
    sizes = [steps(part.change, found.hole) for part in found.parts]
    most = max(size["mean"] for size in sizes) or 1
    rows = [
        f'<tr><td>{html.escape(part.name)}</td><td class="n">{size["mean"]:.2f}</td>'
        f'<td class="n">{size["percentile_95"]:.2f}</td>'
        f'<td class="bar"><i style="width:{100 * size["mean"] / most:.1f}%"></i></td></tr>'
        for part, size in zip(found.parts, sizes, strict=True)
    ]
    text = (
        "The parts work one after the other. Each changes the picture of the one before it; the first starts from the "
        "mean colour of the known pixels. The changes add up to the prediction. The numbers are means of |change| in "
        "the hole, and its 95th percentile, in steps of 8 bits (1/255 of the range)."
    )
    head = '<tr><th>part</th><th class="n">mean</th><th class="n">95th percentile</th><th></th></tr>'
    figures = []
    for index, (part, size) in enumerate(zip(found.parts, sizes, strict=True)):
        if size["percentile_95"] == 0:
            continue  # nothing to see
        slug = f"part-{index + 1}-{''.join(c if c.isalnum() else '-' for c in part.name)}"
        finished = _bytes(_finished(found, part.picture))
        scale = size["percentile_95"] / 255
        change = np.where(found.hole[..., None], 0.5 + 0.5 * part.change / scale, 0.5)
        figures += [
            '<div class="pair">'
            + draw.figure(slug, finished, f"after {part.name}", outline=False)
            + draw.figure(
                f"{slug}-change",
                _bytes(change),
                f"its change: grey is none, black and white are {size['percentile_95']:.1f} steps less and more",
            )
            + "</div>"
        ]
    return _section("What each part adds", text, figures, f"<table>{head}{''.join(rows)}</table>", wide=True)


def _feature_filter(draw: _Drawing, found: Explanation, features: FeatureFilter) -> str:
    logs = [np.log10(np.maximum(energy, 1e-12)) for energy in (features.before, features.after)]
    low, high = (float(value) for value in np.percentile(np.concatenate([x.ravel() for x in logs]), (1, 99)))
    legend = _legend(HEAT, f"{10**low:.2g}", f"{10**high:.2g}")
    decibels = 10 * (logs[1] - logs[0])
    reach = max(float(np.percentile(np.abs(decibels), 99)), 0.1)
    change = 255 * np.abs(np.where(found.hole[..., None], features.left_out, 0)).mean(2)
    top = max(float(np.percentile(change[found.hole], 99)), 0.1)
    size = steps(features.left_out, found.hole)
    coarse = functools.partial(draw.figure, factor=features.factor)
    figures = [
        coarse("energy-before", _ramp(logs[0], low, high, HEAT), "energy before, logarithmic", legend=legend),
        coarse("energy-after", _ramp(logs[1], low, high, HEAT), "energy after, same scale", legend=legend),
        coarse(
            "energy-change",
            _ramp(decibels, -reach, reach, DIVERGING),
            "change of the energy in dB",
            legend=_legend(DIVERGING, f"-{reach:.2g}", f"+{reach:.2g}"),
        ),
        draw.figure(
            "feature-filter-left-out",
            _ramp(change, 0, top, HEAT),
            "difference of the prediction without the filter, in steps of 8 bits",
            legend=_legend(HEAT, "0", f"{top:.1f}"),
        ),
    ]
    rows = [
        f'<tr><td>{label}</td><td class="n">{_number(means["before"])}</td><td class="n">{_number(means["after"])}</td>'
        f'<td class="n">{_decibels(means)}</td></tr>'
        for label, means in (("in the hole", features.means["hole"]), ("outside", features.means["known"]))
    ]
    head = '<tr><th>mean energy</th><th class="n">before</th><th class="n">after</th><th class="n">dB</th></tr>'
    text = (
        "Energy is the mean of the squared features over their channels. A pixel of the features is "
        f"{features.factor} x {features.factor} pixels of the picture. The last map compares with the same network "
        "when its features pass unfiltered: the prediction in the hole "
        f"differs by {size['mean']:.2f} steps on average. "
        "That is how much this network relies on the filter, not how much worse one trained without it would be."
    )
    return _section("The filter of the features", text, figures, f"<table>{head}{''.join(rows)}</table>")


def _picture_filter(draw: _Drawing, found: Explanation, taps: PictureFilter, points: list[Point]) -> str:
    offset, spread = taps.offset, taps.spread
    inside = _reduced(found.hole, taps.factor)
    length = np.hypot(offset[..., 0], offset[..., 1])
    reach = max(float(np.percentile(length[inside], 99)), 1e-3)
    low, high = float(np.percentile(spread[inside], 1)), float(np.percentile(spread[inside], 99))
    high = max(high, low + 1e-3)
    radius = max(max(found.hole.shape) / 45, 4)
    marks = "".join(
        f'<g class="mark"><circle cx="{point.x + 0.5}" cy="{point.y + 0.5}" r="{radius:.1f}"/>'
        f'<text x="{point.x + 0.5}" y="{point.y + 0.5}" font-size="{1.4 * radius:.1f}">{number}</text></g>'
        for number, point in enumerate(points, start=1)
    )
    wheel = (
        f'<span class="legend"><svg class="wheel" viewBox="-1 -1 2 2" role="img" aria-label="colour of each direction">'
        f"{_wheel()}</svg>full colour: {reach:.2g} pixels or more, white: none</span>"
    )
    coarse = functools.partial(draw.figure, factor=taps.factor)
    figures = [
        draw.figure(
            "points",
            _bytes(_finished(found, found.prediction)),
            "the points whose taps are shown below",
            over=marks or "<g></g>",
        ),
        coarse(
            "direction",
            _direction_colours(offset, reach),
            "direction in which the centre of mass of |taps| lies from each pixel",
            legend=wheel,
        ),
        coarse(
            "spread",
            _ramp(spread, low, high, HEAT),
            "spread of |taps| around it, in pixels",
            legend=_legend(HEAT, f"{low:.2f}", f"{high:.2f}"),
        ),
    ]
    grids = "".join(_grid(taps, point, number) for number, point in enumerate(points, start=1))
    k = taps.taps.shape[-1]
    text = (
        f"Every pixel is a weighted sum of the {k} x {k} pixels around it"
        + (f", each of {taps.factor} x {taps.factor} pixels of the picture" if taps.factor > 1 else "")
        + ". The arrows, and the colours of the map, lead from a pixel to the centre of mass of its |taps|: where its "
        "value came from. The grids are means over the three colour channels; the JSON file has each."
    )
    grids = f'<div class="figures grids">{grids}</div>'
    return _section("The filter of the picture", text, figures, below=grids)


def _grid(taps: PictureFilter, point: Point, number: int) -> str:
    """Return a figure with the taps at a point, K x K cells, and the arrow to their centre of mass."""
    cell = taps.cell(point.x, point.y)
    weights, offset = taps.taps[cell].mean(0), taps.offset[cell]
    k, top = len(weights), float(np.abs(weights).max()) or 1
    shapes = []
    for row, column in np.ndindex(k, k):
        value = float(weights[row, column])
        colour = HEAT[3] if value >= 0 else DIVERGING[0]
        shapes.append(
            f'<rect x="{column}" y="{row}" width="1" height="1" fill="{colour}" fill-opacity="{abs(value) / top:.3f}"/>'
        )
        if k <= 5:
            shapes.append(f'<text x="{column + 0.5}" y="{row + 0.92}">{round(value, 2) + 0.0:.2f}</text>')
    x, y = (k / 2 + float(value) / taps.factor for value in offset)
    head = ' marker-end="url(#tip)"' if np.hypot(*offset) > 0.1 * taps.factor else ""  # longer than its head
    shapes.append(
        f'<circle class="centre" cx="{k / 2}" cy="{k / 2}" r=".045"/>'
        f'<line x1="{k / 2}" y1="{k / 2}" x2="{x:.3f}" y2="{y:.3f}"{head}/>'
    )
    total = float(weights.sum())
    caption = (
        f"<b>{number}</b> {html.escape(point.why)}: {point.x}, {point.y}<br>sum {total:.2f}; from "
        f"{_side(float(offset[0]), 'right', 'left')}, {_side(float(offset[1]), 'below', 'above')}; "
        f"spread {float(taps.spread[cell]):.2f} pixels"
    )
    return (
        f'<figure><svg class="taps" viewBox="-.02 -.02 {k + 0.04} {k + 0.04}" role="img" '
        f'aria-label="taps at point {number}">{"".join(shapes)}</svg><figcaption>{caption}</figcaption></figure>'
    )


def _side(value: float, more: str, less: str) -> str:
    return f"{abs(value):.2f} {more if value >= 0 else less}"


def _finished(found: Explanation, prediction: Array) -> Array:
    return np.where(found.hole[..., None], prediction, found.image)


def _bytes(picture: NDArray[Any]) -> Rgb:
    return np.asarray(np.rint(255 * np.clip(picture, 0, 1)), np.uint8)


def _reduced(hole: Mask, factor: int) -> Mask:
    """Return where a pixel of `factor` pixels touches the hole."""
    padded = np.pad(hole, [(0, -side % factor) for side in hole.shape])
    height, width = (side // factor for side in padded.shape)
    return np.asarray(padded.reshape(height, factor, width, factor).any((1, 3)))


def _ramp(values: NDArray[Any], low: float, high: float, colours: tuple[str, ...]) -> Rgb:
    """Return h,w,3: the colour between `colours` of each value between `low` and `high`."""
    place = np.clip((values - low) / max(high - low, 1e-12), 0, 1)
    stops = np.linspace(0, 1, len(colours))
    table = np.array([list(bytes.fromhex(colour[1:])) for colour in colours])
    return np.stack([np.rint(np.interp(place, stops, table[:, c])).astype(np.uint8) for c in range(3)], axis=-1)


def _direction_colours(offset: Array, reach: float) -> Rgb:
    """Return h,w,3: the hue is the direction of each offset h,w,2, the saturation its length, full at `reach`."""
    x, y = offset[..., 0], offset[..., 1]
    hue = (np.arctan2(y, x) / (2 * np.pi)) % 1
    saturation = np.minimum(np.hypot(x, y) / reach, 1)
    planes = np.stack([hue * 255, saturation * 255, np.full_like(hue, 245)], axis=-1)
    return np.asarray(Image.fromarray(np.rint(planes).astype(np.uint8), mode="HSV").convert("RGB"))


def _wheel(slices: int = 24) -> str:
    """Return the colours of all directions as SVG, in a circle of radius 1."""
    angles = 2 * np.pi * np.arange(slices) / slices
    colours = _direction_colours(np.stack([np.cos(angles), np.sin(angles)], -1)[None].astype(np.float32), 1)[0]
    half = np.pi / slices + 0.01
    return "".join(
        f'<path d="M0 0L{np.cos(a - half):.3f} {np.sin(a - half):.3f}A1 1 0 0 1 {np.cos(a + half):.3f} '
        f'{np.sin(a + half):.3f}Z" fill="#{bytes(colour.tolist()).hex()}"/>'
        for a, colour in zip(angles, colours, strict=True)
    )


def _legend(colours: tuple[str, ...], low: str, high: str) -> str:
    ramp = f"linear-gradient(90deg,{','.join(colours)})"
    return f'<span class="legend">{low}<i style="background:{ramp}"></i>{high}</span>'


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.4g}"


def _decibels(means: dict[str, float | None]) -> str:
    before, after = means["before"], means["after"]
    return f"{10 * np.log10(after / before):+.2f}" if before and after else "none"


def _section(title: str, text: str, figures: list[str], above: str = "", wide: bool = False, below: str = "") -> str:
    paragraph = f"<p>{html.escape(text)}</p>" if text else ""
    kind = "figures wide" if wide else "figures"
    return f'<section><h2>{title}</h2>{paragraph}{above}<div class="{kind}">{"".join(figures)}</div>{below}</section>'


def _page(found: Explanation, about: dict[str, Any], sections: list[str]) -> str:
    height, width = found.hole.shape
    picture = about["picture"]
    given = f"{picture['width']} x {picture['height']}"
    seen = given if (picture["width"], picture["height"]) == (width, height) else f"{given}, seen at {width} x {height}"
    title = html.escape(f"{about['image']}, filled by {about['model']}")
    line = f"{seen} pixels, {100 * found.hole.mean():.1f} % hole; written by {TOOL}"
    return _TEMPLATE.format(title=title, line=html.escape(line), style=_STYLE, sections="\n".join(sections))


_TEMPLATE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<svg width="0" height="0" aria-hidden="true"><defs><marker id="tip" viewBox="0 0 10 10" refX="8" refY="5"
markerWidth="3" markerHeight="3" orient="auto"><path d="M0 0L10 5L0 10z" fill="context-stroke"/></marker></defs></svg>
<header><h1>{title}</h1><p>{line}</p></header>
<main>
{sections}
</main>
</body>
</html>
"""

_STYLE = """
:root { color-scheme: light dark; --text: light-dark(#1b1d1e, #ebebe9); --muted: light-dark(#5b6063, #a3a9ad);
  --page: light-dark(#fbfbfa, #1c1e1f); --line: light-dark(#d9d9d5, #34383a); --accent: light-dark(#0b6b5d, #55c5b0);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", "Noto Sans", "DejaVu Sans", sans-serif;
  color: var(--text); background: var(--page); }
body { max-width: 1120px; margin: 0 auto; padding: 24px 20px 48px; }
h1 { font-size: 22px; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 17px; margin: 36px 0 4px; padding-top: 12px; border-top: 1px solid var(--line); }
header p, figcaption { color: var(--muted); margin: 4px 0 0; }
figcaption { font-size: 13px; line-height: 1.4; }
section p { max-width: 76ch; margin: 4px 0 14px; }
.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 250px), 1fr)); gap: 18px; }
.wide { grid-template-columns: repeat(auto-fill, minmax(min(100%, 500px), 1fr)); }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 10px; }
.grids { grid-template-columns: repeat(auto-fill, minmax(200px, 1fr)); margin-top: 20px; }
figure { margin: 0; }
.stack { display: block; position: relative; }
.stack img { display: block; width: 100%; height: auto; border-radius: 3px; }
.stack svg { position: absolute; inset: 0; width: 100%; height: 100%; }
.mark circle { fill: #fff; stroke: #000; stroke-width: .08em; }
.mark text { fill: #000; font-weight: 600; text-anchor: middle; dominant-baseline: central; }
table { border-collapse: collapse; margin: 0 0 18px; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 4px 18px 4px 0; border-bottom: 1px solid var(--line); font-weight: 400; }
th { color: var(--muted); }
.n { text-align: right; }
.bar { width: 240px; }
.bar i { display: block; height: 9px; min-width: 1px; border-radius: 2px; background: var(--accent); }
.legend { display: flex; align-items: center; gap: 7px; margin-top: 4px; }
.legend i { flex: 0 1 130px; height: 9px; border-radius: 2px; }
.wheel { width: 30px; height: 30px; flex: none; }
.taps { display: block; width: 100%; max-width: 220px; }
.taps rect { stroke: var(--line); stroke-width: .015; }
.taps text { font-size: .18px; text-anchor: middle; fill: var(--text); }
.taps line { stroke: var(--text); stroke-width: .045; }
.taps .centre { fill: var(--text); }
"""
