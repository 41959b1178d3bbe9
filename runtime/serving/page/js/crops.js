// Which parts of a picture the network sees: runtime/pictures/crops.py in JavaScript, function by function and in the
// same order. A test compares the two on random masks. Sizes are [height, width]; boxes exclude right and bottom.

import { bounds, cut, grid, squaredDistances } from "./grid.js";

const ABOUT = 1.5;
const BLOCK = 8;
const THIN = 0.4;
const LEAST_MARGIN = 32;

export function strategyFor([height, width], { strategy, workingSize }) {
  if (strategy !== "auto") return strategy;
  return height * width <= ABOUT * workingSize ** 2 ? "original" : "crop";
}

/** [{box, size, core, hole}]: what the network sees, at which size, and the grid of hole pixels that it fills. */
export function planCrops(mask, { strategy = "auto", workingSize = 512, margin = null } = {}) {
  strategy = strategyFor([mask.height, mask.width], { strategy, workingSize });
  const around = bounds(mask);
  if (!around) return [];
  if (strategy !== "crop") {
    const whole = box(0, 0, mask.width, mask.height);
    const size = strategy === "resize" ? reduced(sizeOf(whole), workingSize, 1) : sizeOf(whole);
    return [{ box: whole, size, core: around, hole: cut(mask, around) }];
  }
  const pieces = merge(piecesOf(mask, workingSize, margin), workingSize);
  return pieces.map((piece) => crop(mask, piece, workingSize));
}

const box = (left, top, right, bottom) => ({ left, top, right, bottom });
const sizeOf = ({ left, top, right, bottom }) => [bottom - top, right - left];
const longest = (core) => Math.max(...sizeOf(core));
const union = (a, b) =>
  box(Math.min(a.left, b.left), Math.min(a.top, b.top), Math.max(a.right, b.right), Math.max(a.bottom, b.bottom));

/** Two grids of 8x8 blocks: which hold any hole pixel, and which hold nothing else. */
function blocksOf({ data, width, height }) {
  const [columns, rows] = [Math.ceil(width / BLOCK), Math.ceil(height / BLOCK)];
  const counts = grid(columns, rows);
  for (let y = 0; y < height; y++) {
    const cells = (y >> 3) * columns;
    for (let x = 0, at = y * width; x < width; x++, at++) if (data[at]) counts.data[cells + (x >> 3)]++;
  }
  return [counts.data.map((count) => count > 0), counts.data.map((count) => count === BLOCK * BLOCK)].map((data) =>
    grid(columns, rows, data),
  );
}

function piecesOf(mask, workingSize, margin) {
  const [occupied, solid] = blocksOf(mask);
  const pieces = [];
  for (const { top, left, part } of connected(occupied)) {
    const piece = whole(top, left, part, margin);
    const [height, width] = sizeOf(piece.core);
    if ((height + 2 * piece.margin) * (width + 2 * piece.margin) <= ABOUT * workingSize ** 2) {
      pieces.push(piece);
      continue;
    }
    const inside = cut(solid, box(left, top, left + part.width, top + part.height));
    const wide = widePart(part, and(part, inside), workingSize);
    for (const found of connected(wide)) pieces.push(whole(top + found.top, left + found.left, found.part, margin));
    pieces.push(...walk(top, left, without(part, wide), workingSize, margin));
  }
  return pieces;
}

const and = (a, b) =>
  grid(
    a.width,
    a.height,
    a.data.map((value, at) => value & b.data[at]),
  );
const without = (a, b) =>
  grid(
    a.width,
    a.height,
    a.data.map((value, at) => value & (b.data[at] ^ 1)),
  );

/** The connected parts of a grid, corners included, in the order of their first cells: top, left, and each part. */
function connected({ data, width, height }) {
  const labels = new Int32Array(data.length);
  const parts = [];
  for (let first = 0; first < data.length; first++) {
    if (!data[first] || labels[first]) continue;
    const label = parts.length + 1;
    const cells = [first];
    labels[first] = label;
    let [left, top, right, bottom] = [width, height, 0, 0];
    for (let done = 0; done < cells.length; done++) {
      const [y, x] = [Math.floor(cells[done] / width), cells[done] % width];
      [left, right] = [Math.min(left, x), Math.max(right, x + 1)];
      [top, bottom] = [Math.min(top, y), Math.max(bottom, y + 1)];
      for (let row = Math.max(0, y - 1); row <= Math.min(height - 1, y + 1); row++) {
        for (let column = Math.max(0, x - 1); column <= Math.min(width - 1, x + 1); column++) {
          const next = row * width + column;
          if (!data[next] || labels[next]) continue;
          labels[next] = label;
          cells.push(next);
        }
      }
    }
    const part = grid(right - left, bottom - top);
    for (const cell of cells) part.data[(Math.floor(cell / width) - top) * part.width + (cell % width) - left] = 1;
    parts.push({ top, left, part });
  }
  return parts;
}

function whole(top, left, blocks, margin) {
  const core = blockBox(top, left, blocks);
  return { core, margin: margin ?? Math.max(LEAST_MARGIN, Math.floor(longest(core) / 4)), blocks };
}

/** The part of a hole that is too thick to be walked, with the stubs on it. */
function widePart(blocks, solid, workingSize) {
  const radius = (THIN * workingSize) / 2 / BLOCK;
  const { width, height } = blocks;
  const padded = grid(width + 2, height + 2);
  for (let y = 0; y < height; y++) {
    padded.data.set(solid.data.subarray(y * width, (y + 1) * width), (y + 1) * padded.width + 1);
  }
  const inwards = squaredDistances(padded, 0);
  const thick = grid(width, height);
  for (let y = 0; y < height; y++) {
    for (let x = 0; x < width; x++) {
      if (Math.sqrt(inwards[(y + 1) * padded.width + x + 1]) > radius) thick.data[y * width + x] = 1;
    }
  }
  if (!thick.data.includes(1)) return thick;
  const outwards = squaredDistances(thick, 1);
  const wide = grid(
    width,
    height,
    blocks.data.map((value, at) => value & (Math.sqrt(outwards[at]) <= 2 * radius)),
  );
  for (const { top, left, part } of connected(without(blocks, wide))) {
    if (Math.max(part.width, part.height) * BLOCK <= Math.floor(workingSize / 2)) setBlocks(wide, top, left, part);
  }
  return wide;
}

function walk(firstRow, firstColumn, blocks, workingSize, margin) {
  const around = margin === null ? Math.floor((3 * workingSize) / 16) : Math.min(margin, Math.floor(workingSize / 4));
  const step = Math.floor((workingSize - 2 * around) / BLOCK);
  const pieces = [];
  for (let top = 0; top < blocks.height; top += step) {
    for (let left = 0; left < blocks.width; left += step) {
      const [right, bottom] = [Math.min(left + step, blocks.width), Math.min(top + step, blocks.height)];
      const cell = cut(blocks, box(left, top, right, bottom));
      if (!cell.data.includes(1)) continue;
      pieces.push({ core: blockBox(firstRow + top, firstColumn + left, cell), margin: around, blocks: cell });
    }
  }
  return pieces;
}

function blockBox(top, left, { width, height }) {
  return box(left * BLOCK, top * BLOCK, (left + width) * BLOCK, (top + height) * BLOCK);
}

function merge(pieces, workingSize) {
  const step = Math.floor(workingSize / 2);
  const cells = new Map();
  for (const piece of pieces) {
    const [row, column] = [Math.floor(piece.core.top / step), Math.floor(piece.core.left / step)];
    const name = cellName(row, column);
    if (!cells.has(name)) cells.set(name, { row, column, members: [] });
    cells.get(name).members.push(piece);
  }
  const inOrder = [...cells.values()].sort((a, b) => a.row - b.row || a.column - b.column);
  return mergeGreedily(
    inOrder.flatMap(({ members }) => mergeGreedily(members, workingSize)),
    workingSize,
  );
}

const cellName = (row, column) => `${row},${column}`;

/** Fewer pieces: each joins the first group before it that has room for it. */
function mergeGreedily(pieces, workingSize) {
  const step = Math.max(1, workingSize - 2 * Math.min(...pieces.map((piece) => piece.margin)));
  const groups = [];
  const cells = new Map();
  const place = ({ top, left }) => [Math.floor(top / step), Math.floor(left / step)];
  const members = (name) => cells.get(name) ?? cells.set(name, new Set()).get(name);
  for (const piece of pieces) {
    const [row, column] = place(piece.core);
    const near = new Set();
    for (let y = row - 1; y <= row + 1; y++) {
      for (let x = column - 1; x <= column + 1; x++) cells.get(cellName(y, x))?.forEach((index) => near.add(index));
    }
    const home = [...near]
      .sort((a, b) => a - b)
      .find((index) => {
        const around = Math.max(groups[index].margin, piece.margin);
        return longest(union(groups[index].core, piece.core)) + 2 * around <= workingSize;
      });
    if (home === undefined) {
      members(cellName(row, column)).add(groups.length);
      groups.push({ core: piece.core, margin: piece.margin, members: [piece] });
      continue;
    }
    const group = groups[home];
    members(cellName(...place(group.core))).delete(home);
    group.core = union(group.core, piece.core);
    group.margin = Math.max(group.margin, piece.margin);
    group.members.push(piece);
    members(cellName(...place(group.core))).add(home);
  }
  return groups.map(({ core, margin, members }) => ({ core, margin, blocks: unionBlocks(core, members) }));
}

function unionBlocks(core, members) {
  if (members.length === 1) return members[0].blocks;
  const [height, width] = sizeOf(core);
  const blocks = grid(width / BLOCK, height / BLOCK);
  for (const piece of members) {
    setBlocks(blocks, (piece.core.top - core.top) / BLOCK, (piece.core.left - core.left) / BLOCK, piece.blocks);
  }
  return blocks;
}

function setBlocks(target, top, left, part) {
  for (let y = 0; y < part.height; y++) {
    for (let x = 0; x < part.width; x++) {
      if (part.data[y * part.width + x]) target.data[(top + y) * target.width + left + x] = 1;
    }
  }
}

function crop(mask, piece, workingSize) {
  const { left, top, right, bottom } = piece.core;
  const core = box(left, top, Math.min(right, mask.width), Math.min(bottom, mask.height));
  const hole = cut(mask, core);
  for (let y = 0; y < hole.height; y++) {
    const row = (y >> 3) * piece.blocks.width;
    for (let x = 0; x < hole.width; x++) hole.data[y * hole.width + x] &= piece.blocks.data[row + (x >> 3)];
  }
  const [first, last] = span(core.top, core.bottom, piece.margin, workingSize, mask.height);
  const [start, stop] = span(core.left, core.right, piece.margin, workingSize, mask.width);
  const seen = box(start, first, stop, last);
  return { box: seen, size: reduced(sizeOf(seen), workingSize, ABOUT), core, hole };
}

function span(start, stop, margin, least, limit) {
  const length = Math.min(limit, Math.max(stop - start + 2 * margin, least));
  const first = Math.min(Math.max(0, Math.floor((start + stop - length) / 2)), limit - length);
  return [first, first + length];
}

function reduced([height, width], workingSize, slack) {
  if (height * width <= slack * workingSize ** 2) return [height, width];
  const scale = workingSize / Math.sqrt(height * width);
  return [height, width].map((side) => Math.max(1, roundHalfEven(side * scale)));
}

/** As Python's round and NumPy's rint. */
export function roundHalfEven(value) {
  const below = Math.floor(value);
  return value - below === 0.5 ? below + (below & 1) : Math.round(value);
}
