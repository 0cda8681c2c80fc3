/* Points on a canvas: pan, zoom, the nearest point under the pointer, all of it also by keyboard. */
page.Scatter = class {
  static CELLS = 64;
  static REACH = 14;

  /** onpoint(i or -1, x, y): the point that is pointed at, and where it is in the canvas. */
  constructor(canvas, onpoint) {
    this.canvas = canvas;
    this.onpoint = onpoint;
    this.isolated = -1;
    this.at = -1;
    this.reset();
    this.listen();
    new ResizeObserver(() => this.draw()).observe(canvas);
  }

  /** points: uint16 pairs in 0..65535; labels: uint16; shape: width / height. Draw when `colors` has one for each. */
  show(points, labels, shape) {
    [this.points, this.labels, this.shape] = [points, labels, shape];
    this.count = labels.length;
    this.at = -1;
    this.index();
    this.reset();
  }

  reset() {
    [this.zoom, this.x, this.y] = [1, 0.5, 0.5]; // the point of the map that is in the middle
  }

  /** Sorts the points into square cells, by counting, for a quick search. */
  index() {
    const n = this.constructor.CELLS;
    this.starts = new Uint32Array(n * n + 1);
    const cells = new Uint32Array(this.count);
    for (let i = 0; i < this.count; i++) {
      cells[i] = this.cell(this.points[2 * i] / 65536, this.points[2 * i + 1] / 65536);
      this.starts[cells[i] + 1]++;
    }
    for (let c = 0; c < n * n; c++) this.starts[c + 1] += this.starts[c];
    const next = this.starts.slice();
    this.members = new Uint32Array(this.count);
    for (let i = 0; i < this.count; i++) this.members[next[cells[i]]++] = i;
  }

  cell(x, y) {
    const n = this.constructor.CELLS;
    const clamp = (v) => Math.max(0, Math.min(n - 1, Math.floor(v * n)));
    return clamp(y) * n + clamp(x);
  }

  /** The rectangle of the whole map in pixels, before zooming: all points are in it, with their shape kept. */
  frame() {
    const [width, height, margin] = [this.canvas.clientWidth, this.canvas.clientHeight, 12];
    const side = Math.min((width - 2 * margin) / this.shape, height - 2 * margin);
    return { width, height, w: side * this.shape, h: side };
  }

  place(i, f = this.frame()) {
    const u = this.points[2 * i] / 65535 - this.x;
    const v = 1 - this.points[2 * i + 1] / 65535 - this.y;
    return [f.width / 2 + u * f.w * this.zoom, f.height / 2 + v * f.h * this.zoom];
  }

  draw() {
    if (!this.colors || !this.canvas.clientWidth) return;
    const f = this.frame();
    const context = page.fit(this.canvas, f.width, f.height);
    context.clearRect(0, 0, f.width, f.height);
    const radius = Math.max(1.4, Math.min(5, 60 / Math.sqrt(this.count) + 0.6)) * Math.min(2, this.zoom ** 0.3);
    const other = page.style("--line");
    if (this.isolated >= 0) this.paint(context, f, radius * 0.8, (label) => label !== this.isolated, () => other);
    const own = (label) => this.isolated < 0 || label === this.isolated;
    this.paint(context, f, radius, own, (label) => this.colors[label]);
    if (this.at >= 0) {
      const [x, y] = this.place(this.at, f);
      context.beginPath();
      context.arc(x, y, radius + 2.5, 0, 2 * Math.PI);
      context.lineWidth = 2;
      context.strokeStyle = page.style("--text");
      context.stroke();
    }
  }

  /** Disks that were drawn once for each color: ten thousand take a few milliseconds. */
  paint(context, f, radius, chosen, color) {
    const ratio = this.canvas.width / f.width;
    const side = Math.ceil(2 * radius + 2);
    const disks = new Map();
    for (let i = 0; i < this.count; i++) {
      const label = this.labels[i];
      if (!chosen(label)) continue;
      const [x, y] = this.place(i, f);
      if (x < -side || y < -side || x > f.width + side || y > f.height + side) continue;
      const fill = color(label);
      let disk = disks.get(fill);
      if (!disk) {
        disk = document.createElement("canvas");
        disk.width = disk.height = Math.ceil(side * ratio);
        const brush = disk.getContext("2d");
        brush.scale(ratio, ratio);
        brush.globalAlpha = 0.82;
        brush.fillStyle = fill;
        brush.beginPath();
        brush.arc(side / 2, side / 2, radius, 0, 2 * Math.PI);
        brush.fill();
        disks.set(fill, disk);
      }
      context.drawImage(disk, x - side / 2, y - side / 2, side, side);
    }
  }

  /** The nearest point that is not dimmed, within reach of pixels; -1 without one. */
  nearest(px, py) {
    const f = this.frame();
    const n = this.constructor.CELLS;
    const reach = this.constructor.REACH;
    const toMap = (a, b) => [
      (a - f.width / 2) / (f.w * this.zoom) + this.x,
      1 - ((b - f.height / 2) / (f.h * this.zoom) + this.y),
    ];
    const [low, high] = [toMap(px - reach, py + reach), toMap(px + reach, py - reach)];
    const [first, last] = [this.cell(low[0], low[1]), this.cell(high[0], high[1])];
    let [best, distance] = [-1, reach * reach];
    for (let row = Math.floor(first / n); row <= Math.floor(last / n); row++) {
      for (let k = this.starts[row * n + (first % n)]; k < this.starts[row * n + (last % n) + 1]; k++) {
        const i = this.members[k];
        if (this.isolated >= 0 && this.labels[i] !== this.isolated) continue;
        const [x, y] = this.place(i, f);
        const d = (x - px) ** 2 + (y - py) ** 2;
        if (d < distance) [best, distance] = [i, d];
      }
    }
    return best;
  }

  /** The next point in a direction, for the arrow keys: near, and not much to the side. */
  neighbor(dx, dy) {
    const f = this.frame();
    const [x0, y0] = this.at < 0 ? [f.width / 2 - dx, f.height / 2 - dy] : this.place(this.at, f);
    let [best, cost] = [-1, Infinity];
    for (let i = 0; i < this.count; i++) {
      if (i === this.at || (this.isolated >= 0 && this.labels[i] !== this.isolated)) continue;
      const [x, y] = this.place(i, f);
      if (x < 0 || y < 0 || x > f.width || y > f.height) continue;
      const along = (x - x0) * dx + (y - y0) * dy;
      if (along < 0.5) continue;
      const aside = Math.abs((x - x0) * dy - (y - y0) * dx);
      if (along + 2 * aside < cost) [best, cost] = [i, along + 2 * aside];
    }
    return best;
  }

  point(i) {
    if (i === this.at && i < 0) return;
    this.at = i;
    this.draw();
    const [x, y] = i < 0 ? [0, 0] : this.place(i);
    this.onpoint(i, x, y);
  }

  zoomBy(factor, px = this.canvas.clientWidth / 2, py = this.canvas.clientHeight / 2) {
    const f = this.frame();
    const zoom = Math.max(1, Math.min(200, this.zoom * factor));
    const shift = 1 / this.zoom - 1 / zoom; // what is under the pointer stays there
    this.x += ((px - f.width / 2) / f.w) * shift;
    this.y += ((py - f.height / 2) / f.h) * shift;
    this.zoom = zoom;
    if (zoom === 1) this.reset();
    this.point(-1);
    this.draw();
  }

  pan(dx, dy) {
    const f = this.frame();
    this.x = Math.max(0, Math.min(1, this.x - dx / (f.w * this.zoom)));
    this.y = Math.max(0, Math.min(1, this.y - dy / (f.h * this.zoom)));
    this.draw();
  }

  listen() {
    const canvas = this.canvas;
    const held = new Map();
    let spread = 0;
    const spreadOf = () => {
      const [a, b] = [...held.values()];
      return Math.hypot(a[0] - b[0], a[1] - b[1]);
    };
    canvas.addEventListener("pointerdown", (event) => {
      canvas.setPointerCapture(event.pointerId);
      held.set(event.pointerId, [event.offsetX, event.offsetY]);
      if (held.size === 2) spread = spreadOf();
      if (event.pointerType !== "mouse") this.point(this.nearest(event.offsetX, event.offsetY));
    });
    canvas.addEventListener("pointermove", (event) => {
      const before = held.get(event.pointerId);
      const now = [event.offsetX, event.offsetY];
      if (!before) return this.point(this.nearest(...now));
      held.set(event.pointerId, now);
      if (held.size === 2) {
        const wider = spreadOf();
        this.zoomBy(wider / spread, ...now);
        spread = wider;
      } else {
        this.pan(now[0] - before[0], now[1] - before[1]);
      }
    });
    for (const name of ["pointerup", "pointercancel"])
      canvas.addEventListener(name, (event) => held.delete(event.pointerId));
    canvas.addEventListener("pointerleave", () => this.point(-1));
    canvas.addEventListener("blur", () => this.point(-1));
    canvas.addEventListener("dblclick", (event) => this.zoomBy(2, event.offsetX, event.offsetY));
    canvas.addEventListener("wheel", (event) => {
      // the page scrolls over a map that nobody has clicked
      if (!event.ctrlKey && !event.metaKey && document.activeElement !== canvas) return;
      event.preventDefault();
      this.zoomBy(Math.exp(-event.deltaY / 300), event.offsetX, event.offsetY);
    }, { passive: false });
    const arrows = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
    canvas.addEventListener("keydown", (event) => {
      const arrow = arrows[event.key];
      if (arrow && event.shiftKey) this.pan(-40 * arrow[0], -40 * arrow[1]);
      else if (arrow) {
        const found = this.neighbor(...arrow);
        if (found >= 0) this.point(found);
      } else if (event.key === "+" || event.key === "=") this.zoomBy(1.5);
      else if (event.key === "-") this.zoomBy(1 / 1.5);
      else if (event.key === "0" || event.key === "Escape") {
        this.reset();
        this.point(-1);
        this.draw();
      } else return;
      event.preventDefault();
    });
  }
};
