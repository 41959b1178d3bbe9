// The stage: the picture, what is painted on it and the brush, at any zoom. It draws what it is given, and changes none
// of it.

import { drawShapes } from "./shapes.js";

const MOST = 32; // screen pixels per pixel of the picture
const HOLE = getComputedStyle(document.documentElement).getPropertyValue("--hole");

export class View {
  scene = { picture: null, before: null, shapes: [], grow: 0, feather: 0, live: null, cursor: null, share: null };
  scale = 1;
  x = 0; // of the picture's corner, in CSS pixels
  y = 0;
  fitted = true;

  constructor(canvas) {
    this.canvas = canvas;
    this.context = canvas.getContext("2d");
    this.layer = document.createElement("canvas").getContext("2d");
    new ResizeObserver(() => this.resized()).observe(canvas);
  }

  show(changes) {
    Object.assign(this.scene, changes);
    this.request();
  }

  request() {
    this.frame ??= requestAnimationFrame(() => {
      this.frame = undefined;
      this.draw();
    });
  }

  resized() {
    this.ratio = window.devicePixelRatio || 1;
    const { clientWidth, clientHeight } = this.canvas;
    if (!clientWidth) return;
    for (const canvas of [this.canvas, this.layer.canvas]) {
      canvas.width = Math.round(clientWidth * this.ratio);
      canvas.height = Math.round(clientHeight * this.ratio);
    }
    this.fitted ? this.fit() : this.keepInSight();
    this.draw();
  }

  /** Left, top, width and height of where the whole picture is shown: above the zoom buttons. */
  get room() {
    const { clientWidth, clientHeight } = this.canvas;
    const edge = clientWidth < 500 ? 12 : 24;
    return [edge, edge, Math.max(1, clientWidth - 2 * edge), Math.max(1, clientHeight - edge - 56)];
  }

  get fittingScale() {
    const { width, height } = this.scene.picture;
    const [, , across, down] = this.room;
    return Math.min(across / width, down / height, 8);
  }

  fit() {
    const { picture } = this.scene;
    if (!picture) return;
    this.scale = this.fittingScale;
    const [left, top, across, down] = this.room;
    this.x = left + (across - picture.width * this.scale) / 2;
    this.y = top + (down - picture.height * this.scale) / 2;
    this.fitted = true;
    this.request();
  }

  /** Zoom so that the point of the picture under (x, y) of the stage stays there. */
  zoom(factor, x = this.canvas.clientWidth / 2, y = this.canvas.clientHeight / 2) {
    if (!this.scene.picture) return;
    const scale = Math.min(MOST, Math.max(Math.min(this.fittingScale / 2, 1), this.scale * factor));
    this.x = x - ((x - this.x) * scale) / this.scale;
    this.y = y - ((y - this.y) * scale) / this.scale;
    this.scale = scale;
    this.fitted = false;
    this.keepInSight();
  }

  pan(dx, dy) {
    this.x += dx;
    this.y += dy;
    this.fitted = false;
    this.keepInSight();
  }

  keepInSight() {
    const { picture } = this.scene;
    if (!picture) return;
    const within = (at, side, room) => Math.min(room - 60, Math.max(60 - side, at));
    this.x = within(this.x, picture.width * this.scale, this.canvas.clientWidth);
    this.y = within(this.y, picture.height * this.scale, this.canvas.clientHeight);
    this.request();
  }

  /** The point of the picture under a point of the window. */
  toPicture(clientX, clientY) {
    const { left, top } = this.canvas.getBoundingClientRect();
    return [(clientX - left - this.x) / this.scale, (clientY - top - this.y) / this.scale];
  }

  draw() {
    const { context, canvas, ratio } = this;
    const { picture, before, shapes, grow, feather, live, cursor, share } = this.scene;
    context.setTransform(1, 0, 0, 1, 0, 0);
    context.clearRect(0, 0, canvas.width, canvas.height);
    if (!picture) return;
    this.place(context);
    context.imageSmoothingEnabled = this.scale * ratio < 4;
    context.imageSmoothingQuality = "high";
    if (share === null) {
      this.drawPicture(picture, 0, canvas.width);
    } else {
      this.drawPicture(before, 0, share * canvas.width);
      this.drawPicture(picture, share * canvas.width, canvas.width);
      return;
    }
    const painted = live ? [...shapes, live] : shapes;
    if (painted.length && feather) this.drawMask(painted, 0.2, grow + feather);
    if (painted.length && grow) this.drawMask(painted, 0.3, grow);
    if (painted.length) this.drawMask(painted, grow || feather ? 0.4 : 0.55);
    if (live?.kind === "area") this.outline(live.points);
    if (cursor) this.ring(cursor);
  }

  /** Lay the mask over the picture, see-through. */
  drawMask(shapes, alpha, grow = 0) {
    const { context, layer } = this;
    layer.setTransform(1, 0, 0, 1, 0, 0);
    layer.clearRect(0, 0, layer.canvas.width, layer.canvas.height);
    this.place(layer);
    layer.save();
    layer.beginPath();
    layer.rect(0, 0, this.scene.picture.width, this.scene.picture.height);
    layer.clip();
    drawShapes(layer, shapes, HOLE, grow);
    layer.restore();
    context.save();
    context.setTransform(1, 0, 0, 1, 0, 0);
    context.globalAlpha = alpha;
    context.drawImage(layer.canvas, 0, 0);
    context.restore();
  }

  /** Let a context draw in the picture's pixels. */
  place(target) {
    const { ratio, scale, x, y } = this;
    target.setTransform(ratio * scale, 0, 0, ratio * scale, ratio * x, ratio * y);
  }

  /** Draw the part of a picture that lies between two columns of the screen. */
  drawPicture(picture, from, to) {
    const { context } = this;
    context.save();
    context.setTransform(1, 0, 0, 1, 0, 0);
    context.beginPath();
    context.rect(from, 0, to - from, this.canvas.height);
    context.clip();
    this.place(context);
    picture.draw(context, this.ratio * this.scale);
    context.restore();
  }

  outline(points) {
    this.context.beginPath();
    for (let at = 0; at < points.length; at += 2) this.context.lineTo(points[at], points[at + 1]);
    this.context.closePath();
    this.twoTone(1);
  }

  ring({ x, y, size, down }) {
    this.context.beginPath();
    this.context.arc(x, y, size / 2, 0, 2 * Math.PI);
    this.twoTone(down ? 2 : 1);
  }

  /** Light and dark, to be seen on any picture. */
  twoTone(width) {
    for (const [colour, more] of [
      ["#000a", 2],
      ["#fff", 0],
    ]) {
      this.context.strokeStyle = colour;
      this.context.lineWidth = (width + more) / this.scale;
      this.context.stroke();
    }
  }
}
