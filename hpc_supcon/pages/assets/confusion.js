/* Confusion matrices: the share of each true class that was predicted as each class, and the most frequent errors. */
page.widgets.confusion = (holder) => {
  const { data, element, choice, fill, shown, style } = page;
  const SHOWN = 15;
  let matrix = data.confusions[0];
  let at = null;
  const controls = element("div", { class: "controls" });
  const canvas = element("canvas", { tabindex: 0, role: "application" });
  const status = element("p", { class: "status", role: "status" });
  const errors = element("div");
  const plot = element("div", { class: "plot" }, canvas, status);
  holder.replaceChildren(controls, element("div", { class: "matrix" }, plot, errors));

  const nameOf = (one) => [data.runs.length > 1 ? data.runs[one.run].label : "", `${one.probe} probe`, one.split]
    .filter(Boolean).join(", ");

  function prepare(one) {
    if (one.cells) return one;
    const n = one.classes.length;
    one.totals = new Array(n).fill(0);
    one.cells = new Map();
    for (let i = 0; i < one.counts.length; i += 3) {
      const [row, column, count] = one.counts.slice(i, i + 3);
      one.cells.set(row * n + column, count);
      one.totals[row] += count;
    }
    return one;
  }

  function show() {
    prepare(matrix);
    const options = data.confusions.map((one) => ({ value: one, label: nameOf(one) }));
    fill(controls, choice("of", options, matrix, (one) => {
      [matrix, at] = [one, null];
      show();
    }));
    canvas.setAttribute("aria-label", `Confusion matrix, ${nameOf(matrix)}. Arrow keys go over the cells.`);
    status.textContent = "Rows: true class. Columns: prediction. Point at a cell, or use the arrow keys.";
    draw();
    listErrors();
  }

  function layout() {
    const n = matrix.classes.length;
    const context = canvas.getContext("2d");
    context.font = font();
    const named = n <= 40;
    const longest = named ? Math.max(...matrix.classes.map((name) => context.measureText(clip(name)).width)) : 0;
    const margin = Math.ceil(longest) + 10;
    const cell = Math.min(46, Math.max(0.5, (canvas.clientWidth - margin - 2) / n));
    return { n, named, margin, cell, side: cell * n };
  }
  const font = () => `12px ${getComputedStyle(document.body).fontFamily}`;
  const clip = (name) => (name.length > 18 ? `${name.slice(0, 17)}…` : name);

  function draw() {
    if (!canvas.clientWidth) return;
    const l = layout();
    const upright = l.named && matrix.classes.every((name) => name.length * 7 < l.cell - 2);
    l.top = l.named ? (upright ? 20 : l.margin) : 6;
    matrix.layout = l;
    canvas.style.height = `${l.top + l.side + 4}px`;
    const context = page.fit(canvas, canvas.clientWidth, l.top + l.side + 4);
    context.font = font();
    context.textBaseline = "middle";
    const [hit, miss, text, quiet] = ["--hit", "--miss", "--text", "--quiet"].map(style);
    context.strokeStyle = style("--line");
    context.strokeRect(l.margin - 0.5, l.top - 0.5, l.side + 1, l.side + 1);
    for (const [key, count] of matrix.cells) {
      const [row, column] = [Math.floor(key / l.n), key % l.n];
      const share = count / matrix.totals[row];
      const [x, y] = [l.margin + column * l.cell, l.top + row * l.cell];
      const strength = row === column ? 0.08 + 0.8 * share : 0.12 + 0.85 * Math.sqrt(share);
      context.fillStyle = `rgba(${row === column ? hit : miss}, ${strength})`;
      context.fillRect(x, y, Math.max(l.cell - 0.5, 0.5), Math.max(l.cell - 0.5, 0.5));
      const label = count.toLocaleString("en-US");
      if (l.cell >= 24 && context.measureText(label).width < l.cell - 3) {
        context.fillStyle = strength > 0.55 ? style("--back") : text;
        context.textAlign = "center";
        context.fillText(label, x + l.cell / 2, y + l.cell / 2 + 1);
      }
    }
    context.fillStyle = quiet;
    if (l.named && l.cell >= 10) names(context, l, upright);
    if (at) {
      context.strokeStyle = text;
      context.lineWidth = 2;
      context.strokeRect(l.margin + at[1] * l.cell, l.top + at[0] * l.cell, l.cell, l.cell);
    }
  }

  function names(context, l, upright) {
    matrix.classes.forEach((name, i) => {
      context.textAlign = "right";
      context.fillText(clip(name), l.margin - 6, l.top + (i + 0.5) * l.cell);
      context.save();
      context.translate(l.margin + (i + 0.5) * l.cell, l.top - 6);
      if (upright) context.textAlign = "center";
      else {
        context.rotate(-Math.PI / 2);
        context.textAlign = "left";
      }
      context.fillText(clip(name), 0, upright ? -4 : 0);
      context.restore();
    });
  }

  function tell(row, column) {
    at = [row, column];
    const n = matrix.classes.length;
    const count = matrix.cells.get(row * n + column) ?? 0;
    const share = matrix.totals[row] ? `, ${((100 * count) / matrix.totals[row]).toFixed(1)} % of its images` : "";
    status.textContent =
      `true ${matrix.classes[row]}, predicted ${matrix.classes[column]}: ${count.toLocaleString("en-US")}${share}`;
    draw();
  }

  function listErrors() {
    const n = matrix.classes.length;
    const wrong = [...matrix.cells].filter(([key]) => Math.floor(key / n) !== key % n)
      .sort((a, b) => b[1] - a[1]).slice(0, SHOWN);
    if (!wrong.length) {
      errors.replaceChildren(element("p", { class: "note" }, "No image is in a wrong class."));
      return;
    }
    const titles = ["true class", "prediction", "images", "share of the class"];
    const heading = (title, i) => element("th", { scope: "col", class: i > 1 ? "n" : "" }, title);
    const head = element("tr", {}, ...titles.map(heading));
    const rows = wrong.map(([key, count]) => {
      const [row, column] = [Math.floor(key / n), key % n];
      const share = count / matrix.totals[row];
      return element("tr", {}, element("td", {}, matrix.classes[row]), element("td", {}, matrix.classes[column]),
        element("td", { class: "n", "data-v": count }, shown(count)),
        element("td", { class: "n", "data-v": share }, `${(100 * share).toFixed(1)} %`));
    });
    const caption = element("caption", {}, "The most frequent confusions");
    const table = element("table", {}, caption, element("thead", {}, head), element("tbody", {}, ...rows));
    errors.replaceChildren(element("div", { class: "table scroll" }, table));
    page.prepareTables(errors);
  }

  canvas.addEventListener("pointermove", (event) => {
    const l = matrix.layout;
    const [column, row] = [(event.offsetX - l.margin) / l.cell, (event.offsetY - l.top) / l.cell].map(Math.floor);
    if (row >= 0 && column >= 0 && row < l.n && column < l.n) tell(row, column);
  });
  canvas.addEventListener("keydown", (event) => {
    const arrow = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
    if (!arrow) return;
    event.preventDefault();
    const clamp = (v) => Math.max(0, Math.min(matrix.classes.length - 1, v));
    if (at) tell(clamp(at[0] + arrow[0]), clamp(at[1] + arrow[1]));
    else tell(0, 0);
  });
  new ResizeObserver(draw).observe(canvas.parentElement);
  page.onTheme(draw);
  show();
};
