/* The map of an embedding: which one is shown, its legend, and the image of the point that is pointed at. */
page.widgets.map = (holder) => {
  const { data, element, choice, fill, recall, remember } = page;
  const runs = data.runs.map((run, i) => ({ ...run, i })).filter((run) => run.maps.length);
  const SPACES = { projection: "projection", encoder: "encoder", pixels: "pixels" };
  const METHODS = { tsne: "t-SNE", umap: "UMAP", pca: "PCA" };
  const when = (step) => (step === null ? "trained" : step === 0 ? "before" : `step ${step.toLocaleString("en-US")}`);

  const controls = element("div", { class: "controls" });
  const canvas = element("canvas", { tabindex: 0, role: "application", "aria-describedby": "map-help" });
  const tip = element("div", { class: "tip", hidden: true });
  const status = element("p", { class: "status", role: "status" });
  const legend = element("ul", { class: "legend", "aria-label": "Classes" });
  const help = element("p", { class: "note", id: "map-help" },
    "Point at an image to see it; choose a class to see it alone. Keys: arrows, Shift and arrows, +, − and 0.");
  holder.append(controls, element("div", { class: "plot framed" }, canvas, tip), status, legend, help);

  const pictures = new Map();
  let run, map, index, labels, tiles, counts;
  const scatter = new page.Scatter(canvas, onpoint);

  /** The map of the run that is most like what was chosen. */
  function closest(wanted) {
    const score = (m) => 4 * (m.space === wanted.space) + 2 * (m.step === wanted.step) + (m.method === wanted.method);
    return run.maps.reduce((best, m) => (score(m) > score(best) ? m : best));
  }

  function choose(changes) {
    const wanted = { run: run.i, space: map.space, method: map.method, step: map.step, ...changes };
    run = runs.find((r) => r.i === wanted.run);
    // what was chosen just now is kept, what does not go with it is not
    const fixed = Object.keys(changes)[0];
    const fitting = run.maps.filter((m) => fixed === "run" || m[fixed] === wanted[fixed]);
    const all = run;
    run = { ...run, maps: fitting.length ? fitting : run.maps };
    map = closest(wanted);
    run = all;
    remember("map", { run: run.i, space: map.space, method: map.method, step: map.step });
    show();
  }

  function show() {
    const distinct = (key) => [...new Set(run.maps.map((m) => m[key]))];
    const options = (key, name) => distinct(key).map((value) => ({ value, label: name(value) }));
    const steps = options("step", when).sort((a, b) => (a.value ?? Infinity) - (b.value ?? Infinity));
    const button = (label, title, onclick) => element("button", { type: "button", title, onclick }, label);
    fill(controls,
      choice("run", runs.map((r) => ({ value: r.i, label: r.label })), run.i, (v) => choose({ run: v })),
      choice("space", options("space", (s) => SPACES[s]), map.space, (v) => choose({ space: v })),
      choice("method", options("method", (m) => METHODS[m]), map.method, (v) => choose({ method: v })),
      choice("weights", steps, map.step, (v) => choose({ step: v })),
      element("span", { class: "end" },
        button("+", "Zoom in", () => scatter.zoomBy(1.6)),
        button("−", "Zoom out", () => scatter.zoomBy(1 / 1.6)),
        button("Reset", "Show all points", () => {
          scatter.reset();
          scatter.draw();
        })));
    labels = page.uint16(map.labels);
    index = page.uint32(map.index);
    counts = new Array(map.classes.length).fill(0);
    for (const label of labels) counts[label]++;
    if (scatter.isolated >= map.classes.length) scatter.isolated = -1;
    scatter.show(page.uint16(map.points), labels, map.shape);
    paint();
    const of = map.n < map.total ? `${map.n.toLocaleString("en-US")} of ${map.total.toLocaleString("en-US")}`
      : map.n.toLocaleString("en-US");
    const what = `${METHODS[map.method]} of the ${SPACES[map.space]}${map.space === "pixels" ? "" : " embedding"}`;
    canvas.setAttribute("aria-label", `${what}, ${of} images ${map.labeled ? `of ${map.classes.length} classes` : "without labels"}`);
    status.textContent = `${what}, ${of} images${map.labeled ? "" : ", no labels"}`;
    legend.hidden = !map.labeled;
    tiles = run.thumbnails ? tilesOf(run.thumbnails) : null;
  }

  function drawLegend() {
    const colors = scatter.colors;
    const buttons = map.classes.map((name, i) => {
      const dot = document.createElementNS("http://www.w3.org/2000/svg", "svg");
      const circle = document.createElementNS("http://www.w3.org/2000/svg", "circle");
      const attributes = { cx: 7, cy: 6, r: 5, fill: colors[i] };
      for (const [key, value] of Object.entries(attributes)) circle.setAttribute(key, value);
      dot.setAttribute("aria-hidden", "true");
      dot.append(circle);
      const pressed = scatter.isolated === i;
      return element("li", {}, element("button", {
        type: "button", "aria-pressed": String(pressed), title: `Only ${name}`,
        class: scatter.isolated >= 0 && !pressed ? "off" : "",
        onclick: () => {
          scatter.isolated = pressed ? -1 : i;
          scatter.point(-1);
          scatter.draw();
          drawLegend();
          legend.querySelectorAll("button")[i].focus();
        },
      }, dot, element("span", { class: "name" }, name),
      element("span", { class: "value" }, counts[i].toLocaleString("en-US"))));
    });
    const scroll = legend.scrollTop;
    legend.replaceChildren(...buttons);
    legend.scrollTop = scroll;
  }

  /** The picture of tiles of a run, and where each image is in it. */
  function tilesOf(thumbnails) {
    if (!pictures.has(thumbnails.picture)) {
      const picture = new Image();
      picture.onload = () => scatter.at >= 0 && scatter.point(scatter.at);
      picture.src = `data:image/webp;base64,${data.blobs[thumbnails.picture]}`;
      pictures.set(thumbnails.picture, picture);
    }
    const places = new Map();
    page.uint32(thumbnails.index).forEach((image, place) => places.set(image, place));
    const { tile, columns } = thumbnails;
    return { picture: pictures.get(thumbnails.picture), places, tile, columns };
  }

  function onpoint(i, x, y) {
    tip.hidden = i < 0;
    if (i < 0) return;
    const text = map.labeled ? `${map.classes[labels[i]]}, image ${index[i]}` : `image ${index[i]}`;
    const place = tiles?.places.get(index[i]);
    const parts = [text];
    if (place !== undefined && tiles.picture.complete && tiles.picture.naturalWidth) {
      const [w, h] = tiles.tile;
      const image = element("canvas", { width: w, height: h, role: "img", "aria-label": text });
      const [left, top] = [(place % tiles.columns) * w, Math.floor(place / tiles.columns) * h];
      image.getContext("2d").drawImage(tiles.picture, left, top, w, h, 0, 0, w, h);
      parts.unshift(image);
    }
    tip.replaceChildren(...parts);
    const [width, height] = [canvas.clientWidth, canvas.clientHeight];
    const [w, h] = [tip.offsetWidth, tip.offsetHeight];
    tip.style.left = `${Math.max(0, Math.min(width - w, x + (x + w + 14 > width ? -w - 14 : 14)))}px`;
    tip.style.top = `${Math.max(0, Math.min(height - h, y - h / 2))}px`;
    if (document.activeElement === canvas) status.textContent = text;
  }

  /** Colors, and the legend with the number of images of each class. */
  function paint() {
    scatter.colors = map.classes.map((_, i) => page.color(i, map.classes.length));
    scatter.draw();
    drawLegend();
  }
  page.onTheme(paint);

  const kept = recall("map");
  run = runs.find((r) => r.i === kept?.run) ?? runs[0];
  map = kept ? closest(kept) : run.maps[0];
  show();
};
