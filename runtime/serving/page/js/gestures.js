// Mouse, pen, touch and keys on the stage: they paint, move the picture and zoom.

const STEP = 8; // of an arrow key, in screen pixels; eight times as far with Shift

/**
 * brush: {tool, size, frozen}, read at each stroke. painted(shape): a shape is done. sized(factor): the brush was made
 * larger or smaller. said(text): for screen readers. Return {cancel(), look()}; look() is for when the tool changed.
 */
export function listen(stage, view, { brush, painted, sized, said }) {
  const { canvas } = view;
  const pointers = new Map();
  let live = null; // the shape being painted
  let pinch = null; // {x, y, distance} of two fingers
  let panning = false;
  let space = false;
  let cursor = null; // of the keys, in the picture

  canvas.addEventListener("pointerdown", (event) => {
    const eraser = event.pointerType === "pen" && event.button === 5; // the other end of the pen
    if (!view.scene.picture || (event.button > 1 && !eraser)) return;
    canvas.setPointerCapture(event.pointerId);
    pointers.set(event.pointerId, [event.clientX, event.clientY]);
    cursor = null;
    if (pointers.size === 2) {
      cancel();
      panning = false;
      pinch = spread();
    } else if (pointers.size === 1) {
      panning = event.button === 1 || space || brush.tool === "hand";
      if (!panning) begin(view.toPicture(event.clientX, event.clientY), event.shiftKey || eraser);
    }
    if (event.button === 1) event.preventDefault();
    look();
  });

  canvas.addEventListener("pointermove", (event) => {
    const before = pointers.get(event.pointerId);
    if (before) pointers.set(event.pointerId, [event.clientX, event.clientY]);
    if (pinch && pointers.size === 2) {
      const now = spread();
      const { left, top } = canvas.getBoundingClientRect();
      view.pan(now.x - pinch.x, now.y - pinch.y);
      view.zoom(now.distance / pinch.distance, now.x - left, now.y - top);
      pinch = now;
    } else if (before && panning) {
      view.pan(event.clientX - before[0], event.clientY - before[1]);
    } else if (before && live) {
      const moves = event.getCoalescedEvents?.() ?? [];
      for (const move of moves.length ? moves : [event]) extend(view.toPicture(move.clientX, move.clientY));
    }
    ring(event.pointerType === "touch" ? null : view.toPicture(event.clientX, event.clientY));
  });

  const lift = (event) => {
    if (!pointers.delete(event.pointerId)) return;
    if (event.type === "pointercancel") cancel();
    else if (live && !pointers.size) end();
    if (pointers.size < 2) pinch = null;
    if (!pointers.size) panning = false;
    look();
  };
  canvas.addEventListener("pointerup", lift);
  canvas.addEventListener("pointercancel", lift);
  canvas.addEventListener("pointerleave", () => cursor ?? ring(null));
  canvas.addEventListener("contextmenu", (event) => event.preventDefault());

  stage.addEventListener("wheel", wheel, { passive: false });
  function wheel(event) {
    if (!view.scene.picture) return;
    event.preventDefault();
    const turned = (event.deltaY || event.deltaX) * (event.deltaMode ? 16 : 1);
    if (event.altKey) {
      sized(Math.exp(-turned * 0.0015));
      ring(view.toPicture(event.clientX, event.clientY));
    } else {
      const { left, top } = canvas.getBoundingClientRect();
      view.zoom(Math.exp(-turned * (event.ctrlKey ? 0.01 : 0.0015)), event.clientX - left, event.clientY - top);
    }
  }

  canvas.addEventListener("keydown", (event) => {
    const { picture } = view.scene;
    const ways = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
    if (!picture || event.ctrlKey || event.metaKey) return;
    if (event.key in ways) {
      event.preventDefault();
      const step = (STEP * (event.shiftKey ? 8 : 1)) / view.scale;
      if (brush.tool === "hand") return view.pan(...ways[event.key].map((way) => -way * step * view.scale));
      const [x, y] = (cursor ??= [picture.width / 2, picture.height / 2]);
      cursor = [x + ways[event.key][0] * step, y + ways[event.key][1] * step];
      cursor = [Math.min(picture.width, Math.max(0, cursor[0])), Math.min(picture.height, Math.max(0, cursor[1]))];
      if (live) extend(cursor);
      follow();
    } else if (event.key === "Enter" && brush.tool !== "hand") {
      event.preventDefault();
      cursor ??= [picture.width / 2, picture.height / 2];
      const place = cursor.map(Math.round).join(", ");
      if (live) (said(`Lifted at ${place}.`), end());
      else (said(`Down at ${place}.`), begin(cursor, event.shiftKey));
      ring(cursor);
    }
  });
  canvas.addEventListener("blur", () => {
    if (cursor && live) end();
    cursor = null;
    ring(null);
  });

  window.addEventListener("keydown", (event) => {
    if (event.key !== " " || ![canvas, document.body].includes(event.target)) return;
    event.preventDefault();
    space = true;
    look();
  });
  window.addEventListener("keyup", (event) => {
    if (event.key !== " ") return;
    space = false;
    look();
  });

  function begin([x, y], shift) {
    if (brush.frozen) return;
    const erase = brush.tool === "eraser" || shift;
    const stroke = brush.tool === "brush" || brush.tool === "eraser";
    live = stroke
      ? { kind: "stroke", erase, size: brush.size, points: [x, y] }
      : { kind: "area", erase, points: [x, y] };
    view.show({ live });
  }

  function extend([x, y]) {
    const { points } = live;
    if (brush.tool === "rectangle") {
      const [left, top] = points;
      live.points = [left, top, x, top, x, y, left, y];
    } else if (Math.hypot(x - points.at(-2), y - points.at(-1)) * view.scale >= 1) {
      points.push(x, y);
    }
    view.request();
  }

  function end() {
    const shape = live;
    cancel();
    if (shape.kind === "stroke" || shape.points.length > 4) painted(shape);
  }

  function cancel() {
    live = null;
    view.show({ live });
  }

  function ring(at) {
    const stroke = brush.tool === "brush" || brush.tool === "eraser";
    if (!at || (!stroke && at !== cursor) || panning) return view.show({ cursor: null });
    view.show({ cursor: { x: at[0], y: at[1], size: stroke ? brush.size : STEP / view.scale, down: live !== null } });
  }

  /** Keep the keys' cursor in sight. */
  function follow() {
    const [x, y] = [cursor[0] * view.scale + view.x, cursor[1] * view.scale + view.y];
    const beyond = (at, room) => Math.min(0, room - 40 - at) + Math.max(0, 40 - at);
    const [dx, dy] = [beyond(x, canvas.clientWidth), beyond(y, canvas.clientHeight)];
    if (!view.fitted && (dx || dy)) view.pan(dx, dy);
    ring(cursor);
  }

  function spread() {
    const [[ax, ay], [bx, by]] = [...pointers.values()];
    return { x: (ax + bx) / 2, y: (ay + by) / 2, distance: Math.max(1, Math.hypot(ax - bx, ay - by)) };
  }

  function look() {
    const moving = space || panning || brush.tool === "hand";
    const painting = brush.tool === "brush" || brush.tool === "eraser" ? "none" : "crosshair";
    canvas.style.cursor = panning ? "grabbing" : moving ? "grab" : painting;
  }

  look();
  return { cancel, look };
}
