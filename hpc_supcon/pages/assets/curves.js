/* Curves of all runs over each other, and of the seeds of a grid with their intervals. */
(() => {
  const { data, element, choice, fill, color, style, shown, recall, remember } = page;
  const DASHES = { train: [], validation: [6, 4] };
  const X = { step: "step", epoch: "epoch", hours: "time", images: "images" };

  /** The places of a series on an axis, or null where the run does not tell them. */
  function places(series, axis) {
    const x = data.curves.x[series.x];
    const run = data.curves.runs[series.run];
    if (axis === "step") return x.step;
    if (!x.hours) return null;
    if (axis === "hours") return x.hours;
    const factor = axis === "images" ? run.batch : run.epoch && 1 / run.epoch;
    return factor ? x.step.map((step) => step * factor) : null;
  }

  /** An axis of time in the unit that fits. */
  function unitOf(axis, most) {
    if (axis !== "hours") return { label: X[axis], factor: 1 };
    if (most > 2) return { label: "time (h)", factor: 1 };
    return most > 1 / 30 ? { label: "time (min)", factor: 60 } : { label: "time (s)", factor: 3600 };
  }

  function axes(labels) {
    return labels.map((label, i) => ({
      label,
      stroke: () => style("--quiet"),
      grid: { stroke: () => style("--line"), width: 1 },
      ticks: { stroke: () => style("--line"), width: 1, size: 5 },
      font: `12px ${getComputedStyle(document.body).fontFamily}`,
      labelFont: `12px ${getComputedStyle(document.body).fontFamily}`,
      labelSize: 20,
      ...(i ? {} : { size: 36 }),
    }));
  }

  function line(run, dash, width = 16) {
    const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
    const path = document.createElementNS("http://www.w3.org/2000/svg", "line");
    const attributes = { x1: 0, x2: width, y1: 6, y2: 6, stroke: run, "stroke-width": 3, "stroke-dasharray": dash };
    for (const [name, value] of Object.entries(attributes)) path.setAttribute(name, value);
    svg.setAttribute("aria-hidden", "true");
    svg.append(path);
    return svg;
  }

  page.widgets.curves = (holder) => {
    const metrics = Object.keys(data.curves.series);
    const kept = recall("curves") ?? {};
    const state = {
      metric: metrics.includes(kept.metric) ? kept.metric : metrics[0],
      axis: kept.axis ?? "step", log: kept.log ?? "linear", hidden: new Set(kept.hidden ?? []),
    };
    const controls = element("div", { class: "controls" });
    const frame = element("div", { class: "plot", role: "img" });
    const legend = element("ul", { class: "legend", "aria-label": "Curves" });
    const values = element("details", {}, element("summary", {}, "The values as a table"));
    const hint = element("p", { class: "note" }, "Drag to zoom in, double-click or Reset to see all.");
    holder.replaceChildren(controls, frame, legend, hint, values);
    let plot = null;
    values.addEventListener("toggle", () => fillValues());

    const isShown = (series) => !state.hidden.has(`${data.runs[series.run].label} ${series.split}`);

    function show() {
      remember("curves", { ...state, hidden: [...state.hidden] });
      const all = data.curves.series[state.metric];
      const available = Object.keys(X).filter((axis) => all.some((series) => places(series, axis)));
      const axis = available.includes(state.axis) ? state.axis : "step";
      const positive = all.every((series) => series.y.every((y) => y > 0));
      const set = (changes) => show(Object.assign(state, changes));
      fill(controls,
        choice("number", metrics.map((m) => ({ value: m, label: m.replaceAll("_", " ") })), state.metric,
          (metric) => set({ metric })),
        choice("over", available.map((a) => ({ value: a, label: X[a] })), axis, (a) => set({ axis: a })),
        positive && choice("scale", [{ value: "linear", label: "linear" }, { value: "log", label: "log" }], state.log,
          (log) => set({ log })),
        element("span", { class: "end" }, element("button", { type: "button", onclick: show }, "Reset")));
      draw(all.filter((series) => places(series, axis)), axis, positive && state.log === "log");
    }

    function draw(all, axis, log) {
      const chosen = all.filter(isShown);
      const most = Math.max(0, ...chosen.map((series) => places(series, axis).at(-1)));
      const { label, factor } = unitOf(axis, most);
      const tables = chosen.map((series) => [places(series, axis).map((x) => x * factor), series.y]);
      const few = chosen.every((series) => series.y.length < 30);
      const joined = tables.length ? uPlot.join(tables) : [[]];
      const stroke = (series) => color(series.run, Math.max(data.runs.length, 2));
      plot?.destroy();
      plot = new uPlot({
        width: frame.clientWidth, height: 340, legend: { show: false }, padding: [10, 14, 0, 0],
        scales: { x: { time: false }, y: { distr: log ? 3 : 1 } },
        axes: axes([label, state.metric.replaceAll("_", " ")]),
        series: [{}, ...chosen.map((series) => ({
          stroke: stroke(series), width: 2, dash: DASHES[series.split] ?? [], spanGaps: true,
          points: { show: few, size: 5, fill: stroke(series) },
        }))],
        cursor: { points: { size: 7 }, drag: { x: true, y: false } },
        hooks: { setCursor: [(u) => drawLegend(all, chosen, u.cursor.idx, joined, label)] },
      }, joined, frame);
      const count = `${chosen.length} curve${chosen.length === 1 ? "" : "s"}`;
      frame.setAttribute("aria-label", `${state.metric} over ${label}, ${count}; see the values below`);
      drawLegend(all, chosen, null, joined, label);
      fillValues();
    }

    function drawLegend(all, chosen, at, joined) {
      const focused = [...legend.querySelectorAll("button")].indexOf(document.activeElement);
      legend.replaceChildren(...all.map((series) => {
        const name = `${data.runs[series.run].label} ${series.split}`;
        const on = isShown(series);
        let value = on ? series.y.at(-1) : null;
        if (on && at !== null && at !== undefined) {
          const y = joined[chosen.indexOf(series) + 1];
          for (let i = at; i >= 0 && (value = y[i]) === undefined; i--); // the value before, where runs differ
          value ??= null;
        }
        const text = data.runs.length > 1 ? name : series.split;
        return element("li", {}, element("button", {
          type: "button", "aria-pressed": String(on), class: on ? "" : "off", title: on ? "Hide" : "Show",
          onclick: () => {
            if (on) state.hidden.add(name);
            else state.hidden.delete(name);
            show();
          },
        }, line(color(series.run, Math.max(data.runs.length, 2)), series.split === "validation" ? "4 3" : ""),
        element("span", { class: "name" }, text), element("span", { class: "value" }, shown(value))));
      }));
      legend.querySelectorAll("button")[focused]?.focus();
    }

    function fillValues() {
      values.querySelector(".scroll")?.remove();
      if (!values.open) return;
      const all = data.curves.series[state.metric].filter(isShown);
      const head = element("tr", {}, ...["curve", "step", state.metric.replaceAll("_", " ")].map((text, i) =>
        element("th", { scope: "col", class: i ? "n" : "" }, text)));
      const body = element("tbody");
      for (const series of all) {
        const steps = data.curves.x[series.x].step;
        steps.forEach((step, i) => body.append(element("tr", {},
          element("td", {}, `${data.runs[series.run].label} ${series.split}`),
          element("td", { class: "n" }, shown(step)), element("td", { class: "n" }, shown(series.y[i])))));
      }
      values.append(element("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": state.metric },
        element("table", {}, element("thead", {}, head), body)));
    }

    new ResizeObserver(() => plot?.setSize({ width: frame.clientWidth, height: 340 })).observe(frame);
    page.onTheme(show);
    show();
  };

  /** The chart of a table of a grid: the mean of the seeds and its interval, as lines where rows are numbers. */
  page.widgets.chart = (holder) => {
    const chart = data.charts[Number(holder.dataset.chart)];
    const label = `${chart.title}, ${chart.score}; see the table below`;
    const frame = element("div", { role: "img", "aria-label": label });
    const legend = element("ul", { class: "legend" });
    const paint = () => legend.replaceChildren(...chart.columns.map((column) =>
      element("li", {}, line(color(column.color, chart.colors), column.dash), ` ${column.label}`)));
    holder.replaceChildren(frame, ...(chart.columns.length > 1 ? [legend] : []));
    drawChart(chart, frame);
    paint();
    page.onTheme(paint);
  };

  function drawChart(chart, frame) {
    const n = chart.columns.length;
    const xs = chart.numeric ? chart.rows.map(Number) : chart.rows.map((_, i) => i);
    const positive = xs.filter((x) => x > 0);
    const log = chart.numeric && positive.length === xs.length && Math.max(...xs) / Math.min(...xs) >= 5;
    const low = chart.columns.map((c) => c.mean.map((m, i) => (m === null ? null : m - c.half[i])));
    const high = chart.columns.map((c) => c.mean.map((m, i) => (m === null ? null : m + c.half[i])));
    const ends = [...low.flat(), ...high.flat()].filter((value) => value !== null);
    const pad = 0.06 * (Math.max(...ends) - Math.min(...ends)) || 0.01;
    const room = Math.min(60, frame.clientWidth / xs.length / 2);
    const shift = (i) => (chart.numeric ? 0 : ((i - (n - 1) / 2) * room) / n);
    const plot = new uPlot({
      width: frame.clientWidth, height: 280, legend: { show: false }, padding: [10, 14, 0, 0],
      cursor: { show: false },
      scales: {
        x: { time: false, distr: log ? 3 : 1, ...(chart.numeric ? {} : { range: [-0.6, xs.length - 0.4] }) },
        y: { range: ends.length ? [Math.min(...ends) - pad, Math.max(...ends) + pad] : [0, 1] },
      },
      axes: axes([chart.axis, chart.score]).map((axis, i) => (i ? axis : {
        ...axis, splits: () => xs, values: () => chart.rows, ...(log ? { filter: (u, splits) => splits } : {}),
      })),
      series: [{}, ...chart.columns.map((c) => ({
        stroke: () => color(c.color, chart.colors), width: chart.numeric ? 2 : 0, spanGaps: true,
        dash: c.dash ? c.dash.split(" ").map(Number) : [], points: { show: false },
      }))],
      hooks: { draw: [(u) => whiskers(u, xs, chart, low, high, shift)] },
    }, [xs, ...chart.columns.map((c) => c.mean)], frame);
    page.onTheme(() => plot.redraw());
    new ResizeObserver(() => plot.setSize({ width: frame.clientWidth, height: 280 })).observe(frame);
  }

  /** Points of the test split are disks, those of another split rings. */
  function whiskers(u, xs, chart, lows, highs, shift) {
    const context = u.ctx;
    const ratio = devicePixelRatio;
    context.save();
    chart.columns.forEach((column, i) => {
      context.strokeStyle = color(column.color, chart.colors);
      context.fillStyle = column.dash ? style("--back") : context.strokeStyle;
      context.lineWidth = 2 * ratio;
      column.mean.forEach((value, k) => {
        if (value === null) return;
        const x = u.valToPos(xs[k], "x", true) + shift(i) * ratio;
        const [y, a, b] = [value, lows[i][k], highs[i][k]].map((v) => u.valToPos(v, "y", true));
        context.beginPath();
        context.moveTo(x, a);
        context.lineTo(x, b);
        if (a !== b) {
          for (const end of [a, b]) {
            context.moveTo(x - 4 * ratio, end);
            context.lineTo(x + 4 * ratio, end);
          }
        }
        context.stroke();
        context.beginPath();
        context.arc(x, y, 4 * ratio, 0, 2 * Math.PI);
        context.fill();
        context.stroke();
      });
    });
    context.restore();
  }
})();
