// What is painted, kept as shapes, not pixels: undo takes one away, and the mask is drawn anew at any zoom.
// A shape is {kind: "stroke", erase, size, points} or {kind: "area", erase, points}; points is [x, y, x, y, ...].

import { grid } from "./grid.js";

const BAND = 1024; // rows that are drawn at a time: no canvas of a large picture's size is needed

/** Draw shapes on an empty context; grown by some pixels to show about what growing the mask will do. */
export function drawShapes(context, shapes, colour = "#fff", grow = 0) {
  context.lineCap = context.lineJoin = "round";
  context.fillStyle = context.strokeStyle = colour;
  for (const shape of shapes) {
    context.globalCompositeOperation = shape.erase ? "destination-out" : "source-over";
    context.beginPath();
    const { points } = shape;
    context.moveTo(points[0], points[1]);
    for (let at = 2; at < points.length; at += 2) context.lineTo(points[at], points[at + 1]);
    if (shape.kind === "area") context.fill("evenodd");
    else if (points.length === 2) context.lineTo(points[0], points[1]);
    const width = (shape.size ?? 0) + (shape.erase ? -2 : 2) * grow;
    if (width <= 0) continue;
    context.lineWidth = width;
    context.stroke();
  }
  context.globalCompositeOperation = "source-over";
}

/** The mask of a picture: 1 where at least half of a pixel is painted. */
export function maskOf(shapes, width, height) {
  const mask = grid(width, height);
  const [top, bottom] = reach(shapes, height);
  for (let row = top; row < bottom; row += BAND) {
    const rows = Math.min(BAND, bottom - row);
    const context = new OffscreenCanvas(width, rows).getContext("2d", { willReadFrequently: true });
    context.translate(0, -row);
    drawShapes(context, shapes);
    const { data } = context.getImageData(0, 0, width, rows);
    for (let at = 0; at < width * rows; at++) if (data[at * 4 + 3] > 127) mask.data[row * width + at] = 1;
  }
  return mask;
}

function reach(shapes, height) {
  let [top, bottom] = [height, 0];
  for (const { points, size = 0 } of shapes) {
    for (let at = 1; at < points.length; at += 2) {
      top = Math.min(top, points[at] - size / 2 - 1);
      bottom = Math.max(bottom, points[at] + size / 2 + 1);
    }
  }
  return [Math.max(0, Math.floor(top)), Math.min(height, Math.ceil(bottom))];
}
